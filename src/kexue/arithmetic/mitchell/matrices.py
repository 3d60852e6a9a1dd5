"""Matrix products and linear layers in which every product is Mitchell's.

Products are formed block by block and summed over the inner dimension as they come, so memory
stays at a few blocks. Where a block's numbers allow no special case, a product is one addition of
signed patterns (the signs cancel by wrap-around) and the rest of the work is the sum.

Source: T. Mogami, arXiv 2012.03458; A. Kosson and M. Jaggi, arXiv 2305.17190.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product as all_pairs
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.arithmetic.mitchell.corrections import (
    MINIMAX_CONSTANT,
    Backward,
    Correction,
    Options,
    cell,
    checked_options,
    correction_table,
    corrector,
    one_of,
)
from kexue.arithmetic.mitchell.operands import Array, operands
from kexue.arithmetic.mitchell.patterns import LAYOUTS, Layout, product

__all__ = ["MitchellLinear", "linear", "matmul"]


def matmul(
    a: Array,
    b: Array,
    *,
    correction: Correction = "none",
    constant: float = MINIMAX_CONSTANT,
    table_bits: int = 4,
    terms: int = 1,
    backward: Backward = "mitchell",
) -> Array:
    r"""Return the matrix product with Mitchell products, :math:`\sum_k a_{ik} \otimes b_{kj}`.

    Half precision is widened to float32 first; products and sums are then those of float32, or of
    float64 for float64, and the result is rounded to the operands' dtype. Extra memory is a few
    megabytes whatever the shapes, beside the result and, for broadcast batches, the operands.

    Parameters
    ----------
    a : array or torch tensor (..., m, k)
        Left matrices.
    b : array or torch tensor (..., k, n)
        Right matrices; batch dimensions broadcast.
    correction, constant, table_bits, terms
        How products are corrected, see :func:`multiply`.
    backward : {"mitchell", "exact"}
        Whether the gradients, g bᵀ and aᵀ g, use the same approximate products or exact ones.

    Returns
    -------
    array or torch tensor (..., m, n)
        Of the kind and common dtype of the operands.

    Raises
    ------
    TypeError
        Where an operand is none of float16, bfloat16, float32 and float64.
    ValueError
        Where the shapes do not match, or an option is unknown or out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> matmul(np.array([[3.0, 1.0]]), np.array([[3.0], [4.0]]))
    array([[12.]])
    """
    options = checked_options(correction, constant, table_bits, terms)
    one_of("backward", backward, get_args(Backward))
    (a, b), give_back = operands(a, b)
    _check_shapes(tuple(a.shape), tuple(b.shape))
    return give_back(_product(a, b, backward, options))


def linear(
    input: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
    *,
    correction: Correction = "none",
    constant: float = MINIMAX_CONSTANT,
    table_bits: int = 4,
    terms: int = 1,
    backward: Backward = "mitchell",
) -> Float[Tensor, "*batch out_features"]:
    r"""Return :func:`matmul` of the input and the transposed weight, plus the bias.

    Parameters
    ----------
    input : torch tensor (..., in_features)
        Rows to be mapped.
    weight : torch tensor (out_features, in_features)
        As in ``torch.nn.functional.linear``.
    bias : torch tensor (out_features,), optional
        Added in ordinary arithmetic.
    correction, constant, table_bits, terms
        How products are corrected, see :func:`multiply`.
    backward : {"mitchell", "exact"}
        How products of the gradients are taken, see :func:`matmul`.

    Returns
    -------
    torch tensor (..., out_features)
        Of the common dtype of the arguments.

    Raises
    ------
    TypeError
        Where an argument is no tensor of float16, bfloat16, float32 or float64.
    ValueError
        Where the shapes do not match, or an option is unknown or out of its range.

    Examples
    --------
    >>> linear(torch.tensor([3.0, 2.0]), torch.tensor([[3.0, 0.5], [1.0, 1.0]]))
    tensor([9., 5.])
    """
    options = checked_options(correction, constant, table_bits, terms)
    one_of("backward", backward, get_args(Backward))
    given = [input, weight] if bias is None else [input, weight, bias]
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected torch tensors, got {type(tensor).__name__}")
    (input, weight), _ = operands(input, weight)
    if weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            "expected input (..., in_features) and weight (out_features, in_features), got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    rows = input if input.ndim > 1 else input[None]
    out = _product(rows, weight.mT, backward, options)
    if bias is not None:
        (out, bias), _ = operands(out, bias)
        out = out + bias
    return out if input.ndim > 1 else out[0]


class MitchellLinear(nn.Linear):
    """A linear layer that multiplies by adding, in place of ``torch.nn.Linear``.

    Parameters, their start values and ``state_dict`` are those of ``torch.nn.Linear``, so weights
    can be exchanged with it in both directions.

    Parameters
    ----------
    in_features : int
        Entries of an input.
    out_features : int
        Entries of an output.
    bias : bool
        Whether a bias is added, in ordinary arithmetic.
    correction, constant, table_bits, terms
        How products are corrected, see :func:`multiply`.
    backward : {"mitchell", "exact"}
        How products of the gradients are taken, see :func:`matmul`.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError
        Where the input is no tensor of float16, bfloat16, float32 or float64.
    ValueError
        Where an option is unknown or out of its range, or the input has another width.

    Examples
    --------
    >>> layer = MitchellLinear(64, 10, correction="constant")
    >>> layer(torch.randn(5, 64)).shape
    torch.Size([5, 10])
    >>> layer.load_state_dict(nn.Linear(64, 10).state_dict())
    <All keys matched successfully>
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        correction: Correction = "none",
        constant: float = MINIMAX_CONSTANT,
        table_bits: int = 4,
        terms: int = 1,
        backward: Backward = "mitchell",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        checked_options(correction, constant, table_bits, terms)
        one_of("backward", backward, get_args(Backward))
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.correction: Correction = correction
        self.constant = constant
        self.table_bits = table_bits
        self.terms = terms
        self.backward_mode: Backward = backward

    def forward(
        self, input: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the output for rows of ``in_features`` numbers."""
        return linear(
            input,
            self.weight,
            self.bias,
            correction=self.correction,
            constant=self.constant,
            table_bits=self.table_bits,
            terms=self.terms,
            backward=self.backward_mode,
        )

    def extra_repr(self) -> str:
        """Return sizes and the way of multiplying, for ``repr``."""
        of_correction = {
            "constant": f", constant={self.constant}",
            "table": f", table_bits={self.table_bits}",
            "mitchell": f", terms={self.terms}",
        }.get(self.correction, "")
        return (
            f"{super().extra_repr()}, correction={self.correction!r}{of_correction}, "
            f"backward={self.backward_mode!r}"
        )


def _check_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    match = len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2]
    if match:
        batches = zip(reversed(a[:-2]), reversed(b[:-2]), strict=False)
        match = all(one == other or 1 in (one, other) for one, other in batches)
    if not match:
        raise ValueError(
            f"expected matrices (..., m, k) and (..., k, n), got shapes {tuple(a)} and {tuple(b)}"
        )


def _product(a: Tensor, b: Tensor, backward: str, options: Options) -> Tensor:
    result = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(result, torch.float32)
    if a.ndim > 2 and b.ndim == 2:
        # One matrix for the whole batch: its rows are rows of one product.
        flat = _product(a.reshape(-1, a.shape[-1]), b, backward, options)
        return flat.reshape(*a.shape[:-1], b.shape[-1])
    return _sums_of_products(a.to(wide), b.to(wide), backward, *options).to(result)


# An operator of its own, so that compilers call it whole: which way a block is computed depends on
# its numbers.
@torch.library.custom_op(
    "kexue::mitchell_matmul",
    mutates_args=(),
    schema="(Tensor a, Tensor b, str backward, str correction, float constant, int table_bits, "
    "int terms) -> Tensor",
)
def _sums_of_products(a: Tensor, b: Tensor, backward: str, *options: Any) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (m, k), n = a.shape[-2:], b.shape[-1]
    a = a.expand(*batch, m, k).reshape(math.prod(batch), m, k)
    b = b.expand(*batch, k, n).reshape(math.prod(batch), k, n)
    # Rows of the result are what is worked on at once, so they had better be the longer side.
    if m <= n:
        out = _blocked(a, b, Options(*options))
    else:
        out = _blocked(b.mT, a.mT, Options(*options)).mT
    return out.reshape(*batch, m, n).contiguous()


@_sums_of_products.register_fake
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
    return x @ y if ctx.settings[0] == "exact" else _sums_of_products(x, y, *ctx.settings)


_sums_of_products.register_autograd(_gradients, setup_context=_save)


# Products formed at once: on a CPU what its cache holds, on a GPU what keeps it busy.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ELSEWHERE = 1 << 22
_COLUMNS = 512
_DEPTH = 512


def _blocked(
    a: Float[Tensor, "batch m k"], b: Float[Tensor, "batch k n"], options: Options
) -> Float[Tensor, "batch m n"]:
    layout = LAYOUTS[a.dtype]
    sums = _block_sums(layout, options, a.device)
    batch, m, k = a.shape
    n = b.shape[2]
    block = _BLOCK.get(a.device.type, _BLOCK_ELSEWHERE)
    columns = min(_COLUMNS, max(1, n))
    rows = min(max(1, block // columns), max(1, m))
    matrices = max(1, block // (columns * rows))
    out = a.new_zeros(batch, m, n)
    for at, i, j in all_pairs(_slices(batch, matrices), _slices(m, rows), _slices(n, columns)):
        for inner in _slices(k, _DEPTH):
            # Partial sums, so that rounding errors grow with the depth of a block, not with k.
            out[at, i, j] += sums(a[at, i, inner], b[at, inner, j])
    return out


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def _block_sums(
    layout: Layout, options: Options, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that multiplies blocks (batch, m, k) and (batch, k, n)."""
    block = _BLOCK.get(device.type, _BLOCK_ELSEWHERE)
    correct = corrector(options, layout, device)
    table = correction_table(options, layout, device)
    largest = int(table.max()) if table is not None else 0

    def sums(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        # The inner dimension leads, so that a step is one slice.
        p = layout.pattern(a).permute(2, 0, 1).unsqueeze(-1).contiguous()
        q = layout.pattern(b).transpose(0, 1).unsqueeze(-2).contiguous()
        size = max(1, block // max(1, total.numel()))
        pairs = zip(p.split(size), q.split(size), strict=True)
        steps: Iterator[Tensor] = (product(x, y, layout, correct) for x, y in pairs)
        # Selecting rows of a table pays where there are more rows than cells.
        if table is not None and a.shape[1] >= len(table):
            masks = _masks(p, q, largest, layout)
            if masks is not None:
                steps = _plain_products(p, q, masks, table, size, layout)
        for patterns in steps:
            products = layout.number(patterns)
            total += products[0] if size == 1 else products.sum(0)
        return total

    return sums


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


def _range(pattern: Tensor, layout: Layout) -> list[int]:
    """The smallest magnitude of a normal number, the largest, and the smallest of all."""
    magnitude = pattern & layout.magnitude
    least, largest = magnitude.aminmax()
    normal = torch.where(magnitude < layout.tiny, layout.infinity, magnitude).amin()
    return torch.stack([normal, largest, least]).tolist()


def _plain_products(
    p: Tensor, q: Tensor, masks: list[Tensor], table: Tensor, size: int, layout: Layout
) -> Iterator[Tensor]:
    """Patterns of products that stay normal, ``size`` steps of the inner dimension at a time.

    For each cell of the table there is a row of shifted q; a row of the result is p plus the row
    of its cell.
    """
    parts = [tensor.split(size) for tensor in (p, q, *masks)]
    (_, batch, m, _), n = p.shape, q.shape[3]
    buffer = p.new_empty(min(size, len(p)) * batch * m, n)
    cells = len(table)
    for x, y, *blots in zip(*parts, strict=True):
        shape = (len(x), batch, m, n)
        if cells == 1:
            rows = buffer[: len(x) * batch * m]
            total = torch.add(x, y + (table - layout.one), out=rows.view(shape))
        else:
            columns = cell(y.squeeze(2), cells, layout)
            shifted = table[:, columns].permute(1, 2, 0, 3) + (y - layout.one)
            first = torch.arange(0, len(x) * batch * cells, cells, device=p.device)
            chosen = first.view(-1, batch, 1) + cell(x.squeeze(3), cells, layout)
            rows = buffer[: chosen.numel()]
            torch.index_select(shifted.reshape(-1, n), 0, chosen.flatten(), out=rows)
            total = rows.view(shape).add_(x)
        for blot in blots:
            total &= blot
        yield total
