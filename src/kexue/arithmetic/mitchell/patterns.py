"""Bit patterns of floats: their layouts, and product and quotient as sums of patterns.

The pattern of p = 2^n (1 + x) without its sign is 2^m (n + bias + x), m mantissa bits: Mitchell's
logarithm of p in fixed point. So the order of patterns is the order of numbers, the pattern of 1
is the logarithm 0, and what is added below is exact.

Source: IEEE 754, and J. N. Mitchell (1962).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import threshold

__all__: list[str] = []

Correct: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From two patterns without sign to what is added to their sum."""


@dataclass(frozen=True)
class Layout:
    """Where a float keeps its sign, exponent and mantissa, and the patterns that delimit it."""

    real: torch.dtype
    integer: torch.dtype
    mantissa_bits: int
    bias: int
    sign: int
    magnitude: int
    mantissa: int
    tiny: int
    """The smallest normal number; everything below counts as zero."""
    one: int
    infinity: int
    nan: int

    def pattern(self, x: Tensor) -> Tensor:
        """Read floats as integers."""
        return x.resolve_neg().view(self.integer)

    def number(self, pattern: Tensor) -> Tensor:
        """Read integers as floats."""
        return pattern.view(self.real)


def _layout(real: torch.dtype, integer: torch.dtype, exponent_bits: int) -> Layout:
    m = torch.iinfo(integer).bits - 1 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    infinity = (2**exponent_bits - 1) << m
    return Layout(
        real=real,
        integer=integer,
        mantissa_bits=m,
        bias=bias,
        sign=torch.iinfo(integer).min,
        magnitude=torch.iinfo(integer).max,
        mantissa=(1 << m) - 1,
        tiny=1 << m,
        one=bias << m,
        infinity=infinity,
        nan=infinity | 1 << (m - 1),
    )


LAYOUTS = {
    torch.float16: _layout(torch.float16, torch.int16, 5),
    torch.bfloat16: _layout(torch.bfloat16, torch.int16, 8),
    torch.float32: _layout(torch.float32, torch.int32, 8),
    torch.float64: _layout(torch.float64, torch.int64, 11),
}


def product(a: Tensor, b: Tensor, layout: Layout, correct: Correct) -> Tensor:
    """Pattern of a ⊗ b with its special cases, from the patterns of a and b.

    Built on ``threshold``, which keeps what is large enough and replaces the rest: it is ten times
    as fast as ``where``.
    """
    p, q = a & layout.magnitude, b & layout.magnitude
    high, low = torch.maximum(p, q), torch.minimum(p, q)
    # In place of zero stands what draws every finite product below the range, and after the
    # pattern of 1 is subtracted is still an integer.
    low = threshold(low, layout.tiny - 1, -layout.one - 2 * layout.tiny)
    total = high + torch.minimum(low - layout.one + correct(p, q), layout.infinity - high)
    # Infinity and NaN prevail. One more than the pattern of infinity is NaN: infinity times zero.
    special = threshold(high, layout.infinity - 1, 0) | (low < 0)
    total = threshold(torch.maximum(total, special), layout.tiny - 1, 0)
    return total | ((a ^ b) & layout.sign)


def quotient(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """Pattern of a ⊘ b with its special cases, from the patterns of a and b."""
    p, q = a & layout.magnitude, b & layout.magnitude
    zero, infinite = p < layout.tiny, p == layout.infinity
    by_zero, by_infinite = q < layout.tiny, q == layout.infinity
    total = p + torch.minimum(layout.one - q, layout.infinity - p)
    total = torch.where(total < layout.tiny, 0, total)
    total = torch.where(zero | by_infinite, 0, total)
    total = torch.where(infinite | by_zero, layout.infinity, total)
    invalid = (zero & by_zero) | (infinite & by_infinite)
    invalid = invalid | (torch.maximum(p, q) > layout.infinity)
    return torch.where(invalid, layout.nan, total) | ((a ^ b) & layout.sign)
