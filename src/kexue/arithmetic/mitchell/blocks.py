"""Sums of Mitchell products over the inner dimension of two matrices, block by block.

Products are summed as they are formed, so memory stays at a few blocks. Where the numbers of a
block allow no special case, a product is one addition of signed patterns, in which the signs cancel
by wrap-around, and one addition of floats.

Source: A. Kosson and M. Jaggi, arXiv 2305.17190, whose kernels need a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product as all_of
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.arithmetic.mitchell.corrections import Options, cell, correction_table, corrector
from kexue.arithmetic.mitchell.patterns import LAYOUTS, Correct, Layout, product

__all__: list[str] = []

# Products formed at once. On a CPU torch shares larger operations among threads, which in a loop of
# so many short ones costs more than it saves, and a great deal where other programs hold the cores.
_BLOCK = 1 << 15
_COLUMNS = 256
_DEPTH = 96
# A GPU wants large ones.
_BLOCK_ELSEWHERE = 1 << 22
_COLUMNS_ELSEWHERE = _DEPTH_ELSEWHERE = 2048


# An operator of its own, so that compilers call it whole: which way a block is computed depends on
# its numbers.
@torch.library.custom_op(
    "kexue::mitchell_matmul",
    mutates_args=(),
    schema="(Tensor a, Tensor b, str backward, str correction, float constant, int table_bits, "
    "int terms) -> Tensor",
)
def sums_of_products(a: Tensor, b: Tensor, backward: str, *options: Any) -> Tensor:
    """Matrix product of float32 or float64 tensors (..., m, k) and (..., k, n)."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (m, k), n = a.shape[-2:], b.shape[-1]
    a = a.expand(*batch, m, k).reshape(math.prod(batch), m, k)
    b = b.expand(*batch, k, n).reshape(math.prod(batch), k, n)
    # Rows of the result are what is worked on at once, so they had better be the longer side.
    wide = m <= n
    out = blocked(a, b, Options(*options)) if wide else blocked(b.mT, a.mT, Options(*options)).mT
    return out.reshape(*batch, m, n).contiguous()


@sums_of_products.register_fake
def _shape(a: Tensor, b: Tensor, backward: str, *options: Any) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *ctx.settings = inputs
    ctx.save_for_backward(a, b)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    grad_a = _times(grad, b.mT, ctx).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
    grad_b = _times(a.mT, grad, ctx).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, *(None for _ in ctx.settings)


def _times(x: Tensor, y: Tensor, ctx: Any) -> Tensor:
    """The matrix product that a gradient takes."""
    return x @ y if ctx.settings[0] == "exact" else sums_of_products(x, y, *ctx.settings)


sums_of_products.register_autograd(_gradients, setup_context=_save)


def blocked(
    a: Float[Tensor, "batch m k"], b: Float[Tensor, "batch k n"], options: Options
) -> Float[Tensor, "batch m n"]:
    """The sums in blocks of the result, none of them with more than a few megabytes of products."""
    batch, m, k = a.shape
    n = b.shape[2]
    on_cpu = a.device.type == "cpu"
    block = _BLOCK if on_cpu else _BLOCK_ELSEWHERE
    columns = min(_COLUMNS if on_cpu else _COLUMNS_ELSEWHERE, max(1, n))
    depth = _DEPTH if on_cpu else _DEPTH_ELSEWHERE
    rows = min(max(1, block // columns), max(1, m))
    matrices = max(1, block // (columns * rows))
    out = a.new_zeros(batch, m, n)
    for at, i, j in all_of(_slices(batch, matrices), _slices(m, rows), _slices(n, columns)):
        for inner in _slices(k, depth):
            # Partial sums, so that rounding errors grow with the depth of a block, not with k.
            out[at, i, j] += _block_sums(a[at, i, inner], b[at, inner, j], block, options)
    return out


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def _block_sums(a: Tensor, b: Tensor, block: int, options: Options) -> Tensor:
    layout = LAYOUTS[a.dtype]
    correct, table, largest = _corrections(options, layout, a.device)
    total = a.new_zeros(1, a.shape[0], a.shape[1], b.shape[2])
    # Patterns are (k, batch, m, 1) and (k, batch, 1, n): a step of the inner dimension is a slice.
    p = layout.pattern(a).permute(2, 0, 1).unsqueeze(-1).contiguous()
    q = layout.pattern(b).transpose(0, 1).unsqueeze(-2).contiguous()
    size = max(1, (block - 1) // max(1, total.numel()))
    masks = None
    # Selecting rows of a table pays where there are more rows than cells.
    if table is not None and a.shape[1] >= len(table):
        masks = _masks(p, q, largest, layout)
    if masks is None or table is None:
        pairs = zip(p.split(size), q.split(size), strict=True)
        steps: Iterator[Tensor] = (layout.number(product(x, y, layout, correct)) for x, y in pairs)
    else:
        steps = _plain_products(p, q, masks, table, size, layout)
    for products in steps:
        total += products if size == 1 else products.sum(0, keepdim=True)
    return total[0]


@lru_cache(maxsize=64)
def _corrections(
    options: Options, layout: Layout, device: torch.device
) -> tuple[Correct, Tensor | None, int]:
    """The correction as a function, as a table where it is one, and its largest entry."""
    table = correction_table(options, layout, device)
    return corrector(options, layout, device), table, 0 if table is None else int(table.max())


def _masks(p: Tensor, q: Tensor, largest: int, layout: Layout) -> list[Tensor] | None:
    """None where some product is a special case; else what blots out the products with zero."""
    (low_p, high_p, least_p), (low_q, high_q, least_q) = _range(p, layout), _range(q, layout)
    if (
        max(high_p, high_q) >= layout.infinity
        or low_p + low_q - layout.one < layout.tiny
        or high_p + high_q - layout.one + largest >= layout.infinity
    ):
        return None
    return [
        -((pattern & layout.magnitude) >= layout.tiny).to(layout.integer)
        for pattern, least in ((p, least_p), (q, least_q))
        if least < layout.tiny
    ]


def _range(pattern: Tensor, layout: Layout) -> tuple[int, int, int]:
    """The smallest magnitude of a normal number, the largest, and the smallest of all."""
    magnitude = pattern & layout.magnitude
    least, largest = torch.stack(magnitude.aminmax()).tolist()
    if least >= layout.tiny:
        return least, largest, least
    normal = torch.where(magnitude < layout.tiny, layout.infinity, magnitude).amin()
    return int(normal), largest, least


def _plain_products(
    p: Tensor, q: Tensor, masks: list[Tensor], table: Tensor, size: int, layout: Layout
) -> Iterator[Tensor]:
    """Products that stay normal, ``size`` steps of the inner dimension at a time."""
    q = q - layout.one
    corrected = len(table) > 1
    if not corrected:
        q = q + table[0, 0]
    total = p.new_empty(min(size, len(p)), p.shape[1], p.shape[2], q.shape[3])
    products = layout.number(total)
    for x, y, *blots in zip(*(tensor.split(size) for tensor in (p, q, *masks)), strict=True):
        if x.shape[0] < total.shape[0]:
            total, products = total[: len(x)], products[: len(x)]
        if corrected:
            _corrected_sum(x, y, table, layout, total)
        else:
            torch.add(x, y, out=total)
        for blot in blots:
            total &= blot
        yield products


def _corrected_sum(x: Tensor, y: Tensor, table: Tensor, layout: Layout, out: Tensor) -> None:
    """x + y plus entries of the table; of y the pattern of 1 is already subtracted."""
    cells, (steps, batch, _, n) = len(table), y.shape
    # The subtraction has kept the mantissa of y. Entries are looked up once for y and each cell;
    # then every x takes the row of its cell.
    entries = table.index_select(1, cell(y, cells, layout).flatten())
    rows = entries.view(cells, steps, batch, n).permute(1, 2, 0, 3) + y
    first = torch.arange(0, steps * batch * cells, cells, device=x.device)
    chosen = first.view(steps, batch, 1, 1) + cell(x, cells, layout)
    torch.index_select(rows.reshape(-1, n), 0, chosen.flatten(), out=out.view(-1, n))
    out += x
