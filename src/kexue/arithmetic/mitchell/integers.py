"""Mitchell's product of integers: shifts and additions, no rounding at any size.

Source: J. N. Mitchell (1962).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from kexue.arithmetic.mitchell.corrections import checked_options

__all__ = ["multiply_integers"]

Integers: TypeAlias = int | np.integer | Integer[np.ndarray, "..."] | Integer[Tensor, "..."]


def multiply_integers(a: Integers, b: Integers, *, terms: int = 0) -> Integers:
    r"""Return Mitchell's product of integers, in exact arithmetic.

    With :math:`a = 2^n + r` and :math:`b = 2^{n'} + s`,

    .. math::
        a \otimes b = \begin{cases}
            2^{n+n'} + 2^{n'} r + 2^n s & \text{if } 2^{n'} r + 2^n s < 2^{n+n'}, \\
            2 (2^{n'} r + 2^n s) & \text{otherwise,} \end{cases}

    which lacks :math:`rs`, or :math:`(2^n - r)(2^{n'} - s)`. Each further term adds the Mitchell
    product of these two; for numbers of b bits, b/2 terms leave nothing. It is what a logarithmic
    multiplier computes, bit for bit.

    Parameters
    ----------
    a, b : int, or array or torch tensor of integers
        Python integers of any size; in arrays, absolute values below 2^31. Arrays broadcast.
    terms : int
        Number of deficits added, at least 0.

    Returns
    -------
    int, or array or torch tensor of int64
        An int from two ints, else of the kind of the operands.

    Raises
    ------
    TypeError
        Where an operand holds no integers.
    ValueError
        Where an array holds an absolute value of 2^31 or more, or ``terms`` is negative.

    Examples
    --------
    >>> multiply_integers(3, 3), multiply_integers(3, -3, terms=1)
    (8, -9)
    >>> multiply_integers(10**30 + 1, 10**30 + 1) / 10**60 > 8 / 9
    True
    """
    terms = checked_options("none", 0.0, 0, terms).terms
    if isinstance(a, int) and isinstance(b, int) and _is_int(a) and _is_int(b):
        magnitude = _multiply_natural(abs(a), abs(b), terms)
        return -magnitude if (a < 0) != (b < 0) else magnitude
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        device = next(x.device for x in (a, b) if isinstance(x, Tensor))
        return _multiply_arrays(_from_torch(a, device), _from_torch(b, device), terms)
    return _multiply_arrays(_from_numpy(a), _from_numpy(b), terms).numpy()[()]


def _multiply_natural(a: int, b: int, terms: int) -> int:
    total = 0
    while a and b:
        n, n_b = a.bit_length() - 1, b.bit_length() - 1
        r, s = a - (1 << n), b - (1 << n_b)
        cross, one = (r << n_b) + (s << n), 1 << (n + n_b)
        if cross < one:
            total += one + cross
            a, b = r, s
        else:
            total += 2 * cross
            a, b = (1 << n) - r, (1 << n_b) - s
        if terms == 0:
            break
        terms -= 1
    return total


def _multiply_arrays(a: Tensor, b: Tensor, terms: int) -> Tensor:
    """The same for int64 with absolute values below 2^31: no sum below leaves 63 bits."""
    negative = (a < 0) != (b < 0)
    a, b = torch.broadcast_tensors(a.abs(), b.abs())
    total = torch.zeros_like(a, memory_format=torch.contiguous_format)
    # A term takes the leading bit off both, so after 31 nothing is left.
    for _ in range(min(terms, 31) + 1):
        some = (a > 0) & (b > 0)
        n, n_b = _exponent(a), _exponent(b)
        one, power, power_b = 1 << (n + n_b), 1 << n, 1 << n_b
        r, s = a - power, b - power_b
        cross = (r << n_b) + (s << n)
        carry = cross >= one
        total = total + torch.where(some, torch.where(carry, 2 * cross, one + cross), 0)
        a = torch.where(some, torch.where(carry, power - r, r), 0)
        b = torch.where(some, torch.where(carry, power_b - s, s), 0)
    return torch.where(negative, -total, total)


def _exponent(x: Tensor) -> Tensor:
    """Position of the leading bit, 0 for 0: read off the float, which holds 53 bits exactly."""
    return ((x.double().view(torch.int64) >> 52) - 1023).clamp(min=0)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _from_torch(value: Any, device: torch.device) -> Tensor:
    if _is_int(value):
        return torch.tensor(_in_range(value), device=device)
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        raise _wrong_type(value.dtype if isinstance(value, Tensor) else type(value).__name__)
    if value.dtype == torch.bool:
        raise _wrong_type(value.dtype)
    wide = value.long()
    # Unsigned numbers of 2^63 and more come out negative.
    unsigned = wide.numel() and not value.dtype.is_signed and int(wide.min()) < 0
    if unsigned or (wide.numel() and not -_LIMIT < int(wide.min()) <= int(wide.max()) < _LIMIT):
        raise _out_of_range()
    return wide


def _from_numpy(value: Any) -> Tensor:
    if _is_int(value):
        return torch.tensor(_in_range(value))
    if not isinstance(value, np.ndarray | np.generic):
        raise _wrong_type(type(value).__name__)
    if value.dtype.kind not in "iu":
        raise _wrong_type(value.dtype)
    if value.size and not -_LIMIT < int(value.min()) <= int(value.max()) < _LIMIT:
        raise _out_of_range()
    return torch.from_numpy(np.array(value, dtype=np.int64, order="C"))


_LIMIT = 1 << 31


def _in_range(value: int) -> int:
    if not -_LIMIT < value < _LIMIT:
        raise _out_of_range()
    return value


def _out_of_range() -> ValueError:
    return ValueError(
        "expected absolute values below 2**31 in arrays, got larger ones; Python integers may have "
        "any size"
    )


def _wrong_type(got: Any) -> TypeError:
    return TypeError(f"expected integers, got {str(got).removeprefix('torch.')}")
