r"""What makes Mitchell's product more accurate without a multiplication.

Every correction is a number added to the sum of two patterns; it depends on the mantissas only, so
corrected products keep commuting with powers of two and signs.

* ``"constant"``: the same for all pairs, :math:`2^m c` rounded.
* ``"table"``: :math:`2^m T` rounded, where T is what the sum lacks at the centre of the cell that
  the leading bits of both mantissas name.
* ``"mitchell"``: the deficit is itself a product, :math:`xy` where :math:`x + y < 1` and
  :math:`(1-x)(1-y)` otherwise; it is taken by the same method and added, again and again.

Source: J. N. Mitchell (1962), section on error correction.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from kexue.arithmetic.mitchell.patterns import LAYOUTS, Correct, Layout

__all__ = ["MINIMAX_CONSTANT", "UNBIASED_CONSTANT", "Backward", "Correction"]

MINIMAX_CONSTANT: float = 0.06885753624646394
"""Root of (1 - c)(3 - c)² = 8: errors of either sign reach the same 6.886 %."""

UNBIASED_CONSTANT: float = 0.0566232706886193
"""Mean error 0 for mantissas that are uniform in [1, 2)."""

Correction = Literal["none", "constant", "table", "mitchell"]
Backward = Literal["mitchell", "exact"]


class Options(NamedTuple):
    """How products are corrected."""

    correction: str = "none"
    constant: float = MINIMAX_CONSTANT
    table_bits: int = 4
    terms: int = 1


def checked_options(correction: Any, constant: Any, table_bits: Any, terms: Any) -> Options:
    """The options, refused where one is out of its range, also if it is not the one in use."""
    one_of("correction", correction, get_args(Correction))
    if not isinstance(constant, float | int | np.number) or not 0 <= constant < 1:
        raise ValueError(f"constant must be a number in [0, 1), got {constant!r}")
    if not isinstance(table_bits, int | np.integer) or not 0 <= table_bits <= 6:
        raise ValueError(f"table_bits must be an integer from 0 to 6, got {table_bits!r}")
    if not isinstance(terms, int | np.integer) or terms < 0:
        raise ValueError(f"terms must be an integer of at least 0, got {terms!r}")
    return Options(correction, float(constant), int(table_bits), int(terms))


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def corrector(options: Options, layout: Layout, device: torch.device) -> Correct:
    """Return the function from two patterns to what is added to their sum."""
    table = correction_table(options, layout, device)
    if table is None:
        return partial(_series_correction, terms=options.terms, layout=layout)
    if table.numel() == 1:
        return lambda p, q: table[0, 0]
    return partial(_looked_up, table=table, layout=layout)


def correction_table(options: Options, layout: Layout, device: torch.device) -> Tensor | None:
    """Return the corrections (cells, cells) by the cells of both mantissas; None for a series."""
    if options.correction == "mitchell" and options.terms > 0:
        return None
    bits = options.table_bits if options.correction == "table" else 0
    centre = (torch.arange(2**bits, dtype=torch.float64, device=device) + 0.5) / 2**bits
    u, v = centre[:, None], centre
    true = (1 + u) * (1 + v)
    corrections = torch.where(true < 2, true - 1, true / 2) - u - v
    if options.correction != "table":
        constant = options.constant if options.correction == "constant" else 0.0
        corrections = torch.full_like(corrections, constant)
    return (corrections * 2.0**layout.mantissa_bits).round().to(layout.integer)


def _looked_up(p: Tensor, q: Tensor, table: Tensor, layout: Layout) -> Tensor:
    cells = len(table)
    entry = cell(p, cells, layout) * cells + cell(q, cells, layout)
    return table.flatten().index_select(0, entry.flatten()).view(entry.shape)


def cell(pattern: Tensor, cells: int, layout: Layout) -> Tensor:
    """Number of the cell that a mantissa lies in, of ``cells`` equal ones: its leading bits."""
    bits = cells.bit_length() - 1
    return (pattern >> (layout.mantissa_bits - bits)).int() & (cells - 1)


def _series_correction(p: Tensor, q: Tensor, terms: int, layout: Layout) -> Tensor:
    # Twice the mantissa holds the sum of all terms exactly, so only its end is rounded. float64
    # has nothing wider: there each term is rounded, the smallest first.
    wide = LAYOUTS[torch.float64 if layout.mantissa_bits > 10 else torch.float32]
    x, y = p & layout.mantissa, q & layout.mantissa
    first = layout.number(x | layout.one).to(wide.real)
    second = layout.number(y | layout.one).to(wide.real)
    # Every term takes a leading bit off both residues, so this many leave nothing.
    product = _series(first, second, min(terms, layout.mantissa_bits), wide).to(layout.real)
    return layout.pattern(product) - layout.one - x - y


def _series(p: Tensor, q: Tensor, terms: int, layout: Layout) -> Tensor:
    """p ⊗ q and ``terms`` corrections, for zero and normal numbers far from both ends."""
    p_pattern, q_pattern = layout.pattern(p), layout.pattern(q)
    plain = layout.number(p_pattern + q_pattern - layout.one)
    plain = torch.where((p == 0) | (q == 0), 0.0, plain)
    if terms == 0:
        return plain
    p_power = layout.number(p_pattern & layout.infinity)
    q_power = layout.number(q_pattern & layout.infinity)
    carry = (p_pattern & layout.mantissa) + (q_pattern & layout.mantissa) >= layout.tiny
    p_residue = torch.where(carry, 2 * p_power - p, p - p_power)
    q_residue = torch.where(carry, 2 * q_power - q, q - q_power)
    return plain + _series(p_residue, q_residue, terms - 1, layout)
