"""Logarithm, power of two, root, product and quotient of floats, one element at a time.

Source: J. N. Mitchell (1962); derivatives as in T. Mogami, arXiv 2012.03458.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from kexue.arithmetic.mitchell.corrections import (
    MINIMAX_CONSTANT,
    Backward,
    Correction,
    Options,
    checked_options,
    corrector,
    one_of,
)
from kexue.arithmetic.mitchell.operands import Array, Result, operands
from kexue.arithmetic.mitchell.patterns import LAYOUTS, product, quotient

__all__ = ["divide", "exp2", "log2", "multiply", "sqrt"]

# A piece of this many elements keeps all intermediate patterns in the cache of a core, and is the
# largest for which torch starts no threads.
_PIECE = 1 << 15


def log2(x: Array) -> Result:
    r"""Return Mitchell's logarithm: n + f for :math:`x = 2^n (1 + f)`.

    Between 0 and 0.0861 below the true logarithm, equal at powers of two; rounded once. Subnormal
    numbers count as zero. The gradient is that of the true logarithm.

    Parameters
    ----------
    x : array or torch tensor of floats, or number
        -inf comes from 0, NaN from negative numbers.

    Returns
    -------
    array or torch tensor
        Of the kind, shape and dtype of ``x``.

    Raises
    ------
    TypeError
        Where ``x`` is none of float16, bfloat16, float32 and float64.

    Examples
    --------
    >>> log2(10.0)
    np.float64(3.25)
    """
    (x,), give_back = operands(x)
    return give_back(_Log2.apply(x))


def exp2(x: Array) -> Result:
    r"""Return Mitchell's power of two: :math:`2^n (1 + f)` for x = n + f with n an integer.

    Up to 6.15 % above the true power, equal at integers, and the inverse of :func:`log2`; the
    mantissa is rounded to nearest. The gradient is that of the true power.

    Parameters
    ----------
    x : array or torch tensor of floats, or number
        What lies beyond the range of the dtype gives infinity or 0.

    Returns
    -------
    array or torch tensor
        Of the kind, shape and dtype of ``x``.

    Raises
    ------
    TypeError
        Where ``x`` is none of float16, bfloat16, float32 and float64.

    Examples
    --------
    >>> exp2(3.25)
    np.float64(10.0)
    """
    (x,), give_back = operands(x)
    return give_back(_Exp2.apply(x))


def sqrt(x: Array) -> Result:
    """Return Mitchell's square root, half the logarithm.

    Up to 6.07 % above the true root, equal at powers of four; the last bit is cut off. Subnormal
    numbers count as zero. The gradient is that of the true root.

    Parameters
    ----------
    x : array or torch tensor of floats, or number
        NaN comes from negative numbers.

    Returns
    -------
    array or torch tensor
        Of the kind, shape and dtype of ``x``.

    Raises
    ------
    TypeError
        Where ``x`` is none of float16, bfloat16, float32 and float64.

    Examples
    --------
    >>> sqrt(2.0), sqrt(16.0)
    (np.float64(1.5), np.float64(4.0))
    """
    (x,), give_back = operands(x)
    return give_back(_Sqrt.apply(x))


def multiply(
    a: Array,
    b: Array,
    *,
    correction: Correction = "none",
    constant: float = MINIMAX_CONSTANT,
    table_bits: int = 4,
    terms: int = 1,
    backward: Backward = "mitchell",
) -> Result:
    r"""Return Mitchell's product, one integer addition for each pair.

    .. math:: I(a \otimes b) = I(a) + I(b) - I(1) + T

    with patterns I without sign and the correction T. It commutes, and scaling by powers of two and
    changes of sign pass through it unchanged. NaN, infinity and signed zero behave as in IEEE 754;
    subnormal inputs count as zero, and results below the smallest normal number are zero.
    :func:`relative_error_bounds` gives the error.

    Parameters
    ----------
    a, b : array or torch tensor of floats, or number
        Broadcast against each other and promoted to a common dtype; a Python number takes the
        dtype of the other operand.
    correction : {"none", "constant", "table", "mitchell"}
        What T is: 0; a constant; an entry of a table that the leading bits of both mantissas
        index; or the deficit, approximated by Mitchell products of what the mantissas leave.
    constant : float
        For ``"constant"``, in [0, 1).
    table_bits : int
        For ``"table"``: leading bits of each mantissa, 0 to 6.
    terms : int
        For ``"mitchell"``: number of deficits added, at least 0.
    backward : {"mitchell", "exact"}
        The gradients are those of the true product, g b and g a, each taken with the same
        approximate product or exactly.

    Returns
    -------
    array or torch tensor
        Of the kind of the operands.

    Raises
    ------
    TypeError
        Where an operand is none of float16, bfloat16, float32 and float64.
    ValueError
        Where an option is unknown or out of its range, or shapes do not broadcast.

    Examples
    --------
    >>> multiply(3.0, 3.0), multiply(-1.5, 1.5)
    (np.float64(8.0), np.float64(-2.0))
    >>> multiply(3.0, 3.0, correction="mitchell")
    np.float64(9.0)
    """
    options = checked_options(correction, constant, table_bits, terms)
    one_of("backward", backward, get_args(Backward))
    (a, b), give_back = operands(a, b)
    _check_broadcast(a, b)
    return give_back(_Multiply.apply(a, b, backward, options))


def divide(a: Array, b: Array, *, backward: Backward = "mitchell") -> Result:
    r"""Return Mitchell's quotient, one integer subtraction for each pair.

    .. math:: I(a \oslash b) = I(a) - I(b) + I(1)

    Never too small, and at most one eighth too large. Special values as in :func:`multiply`; x/0 is
    infinite, 0/0 is NaN.

    Parameters
    ----------
    a, b : array or torch tensor of floats, or number
        Broadcast against each other and promoted to a common dtype; a Python number takes the
        dtype of the other operand.
    backward : {"mitchell", "exact"}
        The gradients are g / b and -(g · out) / b, with approximate or exact operations.

    Returns
    -------
    array or torch tensor
        Of the kind of the operands.

    Raises
    ------
    TypeError
        Where an operand is none of float16, bfloat16, float32 and float64.
    ValueError
        Where ``backward`` is unknown, or shapes do not broadcast.

    Examples
    --------
    >>> divide(1.0, 1.5), divide(8.0, 2.0)
    (np.float64(0.75), np.float64(4.0))
    """
    one_of("backward", backward, get_args(Backward))
    (a, b), give_back = operands(a, b)
    _check_broadcast(a, b)
    return give_back(_Divide.apply(a, b, backward))


def _check_broadcast(a: Tensor, b: Tensor) -> None:
    for one, other in zip(reversed(a.shape), reversed(b.shape), strict=False):
        if one != other and 1 not in (one, other):
            raise ValueError(
                f"expected shapes that broadcast, got {tuple(a.shape)} and {tuple(b.shape)}"
            )


class _Log2(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        layout = LAYOUTS[x.dtype]
        p = layout.pattern(x) & layout.magnitude
        value = (p - layout.one).double() * 2.0**-layout.mantissa_bits
        value = torch.where(p == layout.infinity, math.inf, value)
        value = torch.where((x < 0) | (p > layout.infinity), math.nan, value)
        return torch.where(p < layout.tiny, -math.inf, value).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (x * math.log(2))


class _Exp2(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        layout = LAYOUTS[x.dtype]
        # Pattern 2^m (n + bias + f): x itself in fixed point. The ends are infinity and below tiny.
        limit = layout.bias + 1
        fixed = (x.double().clamp(-limit, limit) * 2.0**layout.mantissa_bits).round()
        pattern = fixed.long() + layout.one
        pattern = torch.where(pattern < layout.tiny, 0, pattern).to(layout.integer)
        return torch.where(x.isnan(), x, layout.number(pattern))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (math.log(2) * torch.exp2(x))


class _Sqrt(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        layout = LAYOUTS[x.dtype]
        pattern = layout.pattern(x)
        p = pattern & layout.magnitude
        root = ((p - layout.one) >> 1) + layout.one
        root = torch.where(p == layout.infinity, p, root)
        root = torch.where((x < 0) | (p > layout.infinity), layout.nan, root)
        # The root of -0 is -0.
        return layout.number(torch.where(p < layout.tiny, pattern & layout.sign, root))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (2 * torch.sqrt(x))


class _Multiply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, backward: str, options: Options) -> Tensor:
        layout = LAYOUTS[a.dtype]
        correct = corrector(options, layout, a.device)
        return _in_pieces(
            lambda p, q: layout.number(
                product(layout.pattern(p), layout.pattern(q), layout, correct)
            ),
            a,
            b,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.mode, ctx.options = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad_a = _times(grad, b, ctx).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        grad_b = _times(grad, a, ctx).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None


def _times(grad: Tensor, x: Tensor, ctx: Any) -> Tensor:
    """The product that a gradient takes."""
    return grad * x if ctx.mode == "exact" else _Multiply.apply(grad, x, ctx.mode, ctx.options)


class _Divide(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, backward: str) -> Tensor:
        layout = LAYOUTS[a.dtype]
        return _in_pieces(
            lambda p, q: layout.number(quotient(layout.pattern(p), layout.pattern(q), layout)),
            a,
            b,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.mode = inputs
        ctx.save_for_backward(a, b, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, out = ctx.saved_tensors
        if ctx.mode == "exact":
            grad_a, grad_b = grad / b, -(grad * out) / b
        else:
            grad_a = _Divide.apply(grad, b, ctx.mode)
            scaled = _Multiply.apply(grad, out, ctx.mode, Options())
            grad_b = -_Divide.apply(scaled, b, ctx.mode)
        return grad_a.sum_to_size(a.shape), grad_b.sum_to_size(b.shape), None


def _in_pieces(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The kernel on broadcast tensors, on the CPU in pieces that stay in its cache."""
    a, b = torch.broadcast_tensors(a, b)
    if torch.compiler.is_compiling() or a.device.type != "cpu" or a.numel() <= _PIECE:
        return kernel(a, b)
    dim = max(range(a.ndim), key=lambda d: a.shape[d])
    size = max(1, _PIECE * a.shape[dim] // a.numel())
    pieces = zip(a.split(size, dim), b.split(size, dim), strict=True)
    return torch.cat([kernel(p, q) for p, q in pieces], dim)
