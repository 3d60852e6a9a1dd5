"""Many numbers at once: arrays of 64-bit integers, and all numbers up to a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from array_api_compat import is_torch_array
from jaxtyping import Float64, Int64, Shaped

from kexue.arithmetic.factor_sum.search import _natural

__all__ = ["FactorSumBatch", "factor_sum_batch", "factor_sum_table"]

Array: TypeAlias = Any  # numpy or torch
Integers: TypeAlias = Int64[np.ndarray, " size"]

_LIMIT = 1 << 62

# Numbers that are searched together, and (number, p) pairs that are examined together: two
# buffers of float64 that stay in a processor's cache.
_SLAB = 2048
_TILE = 1 << 14

# An excess ranks before an equal one with larger p by this much; both are exact in float64.
_TIE = 2.0**-24


@dataclass(frozen=True)
class FactorSumBatch:
    """The layouts n = ab + c of an array of numbers: four integer arrays of its shape.

    Attributes
    ----------
    a, b : array of int64
        The factors, 0 <= a <= b.
    c : array of int64
        The remainders, at least 0.
    total : array of int64
        The smallest sums a + b + c.

    Examples
    --------
    >>> factor_sum_batch([10, 130]).total
    array([ 7, 23])
    """

    a: Int64[Array, "..."]
    b: Int64[Array, "..."]
    c: Int64[Array, "..."]
    total: Int64[Array, "..."]


def factor_sum_batch(n: Shaped[Array, "..."] | Sequence[Any] | SupportsIndex) -> FactorSumBatch:
    """Return the layouts n = ab + c with the smallest a + b + c for an array of numbers.

    The layouts are those of :func:`factor_sum`: among equal sums, the smallest c.

    Parameters
    ----------
    n : array, torch tensor or nested list of int, of any shape
        The numbers, from 0 to 2**62 - 1.

    Returns
    -------
    FactorSumBatch
        Four int64 arrays of the shape of ``n``; tensors, on its device, if ``n`` is one. The search
        itself runs on the CPU.

    Raises
    ------
    ValueError
        Where a number is negative or at least 2**62.
    TypeError
        Where ``n`` has no integer dtype.

    Examples
    --------
    >>> batch = factor_sum_batch([[10, 130], [10**9 + 7, 2**61 - 1]])
    >>> batch.a
    array([[         2,         10],
           [     31250, 1518444813]])
    >>> batch.c
    array([[   0,    0],
           [   7, 2794]])
    """
    numbers = _int64(n)
    flat = numbers.reshape(-1)
    layouts = np.empty((4, flat.size), dtype=np.int64)
    for start in range(0, flat.size, _SLAB):
        slab = slice(start, start + _SLAB)
        layouts[:, slab] = _smallest(flat[slab])
    layouts = layouts.reshape(4, *numbers.shape)
    if is_torch_array(n):
        import torch

        return FactorSumBatch(*torch.from_numpy(layouts).to(n.device))
    return FactorSumBatch(*layouts)


def factor_sum_table(limit: SupportsIndex) -> Int64[np.ndarray, " size"]:
    r"""Return the smallest a + b + c with k = ab + c for every k from 0 to a limit.

    Either c = 0, or one can be taken from c, so
    :math:`S(k) = \min(S(k-1) + 1, \min_{ab = k} (a + b))`: a sieve, then a running minimum of
    S(k) - k, in time and memory proportional to ``limit``.

    Parameters
    ----------
    limit : int
        The largest k.

    Returns
    -------
    int64 array, shape (limit + 1,)
        Entry k is the smallest sum for k.

    Raises
    ------
    ValueError
        Where ``limit`` is negative.
    TypeError
        Where ``limit`` is no integer.

    Examples
    --------
    >>> factor_sum_table(12)
    array([0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 8, 7])
    """
    limit = _natural(limit, "limit")
    table = np.arange(limit + 1)
    for a in range(2, isqrt(limit) + 1):
        # Some optimal layout has a >= ⌊√(k/2)⌋, as "square_root" knows: b < 2(a + 1)²/a. Larger a
        # come later and give smaller a + b to the same k, so they may simply overwrite.
        last = min(limit // a, 2 * a + 4)
        table[a * a : a * last + 1 : a] = np.arange(2 * a, a + last + 1)
    ramp = np.arange(limit + 1)
    table -= ramp
    np.minimum.accumulate(table, out=table)
    table += ramp
    return table


def _smallest(n: Integers) -> Int64[np.ndarray, "4 size"]:
    """Return a, b, c and total of every n < 2**62.

    With p = first + k, the search minimises the excess k + c over first = ⌊2√n⌋; the last p of the
    smallest excess has the smallest c. Products of 64 bits wrap around; their differences are
    right, as they fit.
    """
    first = _floor_of_twice_the_root(n)
    best = ((4 * n - first * first + (first & 1)) >> 2).astype(np.float64)
    alive = np.flatnonzero((best > 0) & (n >= 4))
    k = 1
    while alive.size:
        steps = max(_TILE // (2 * alive.size), 1)
        ranks = _ranks(n[alive], first[alive], k, steps)
        best[alive] = np.minimum(best[alive], ranks.min(axis=(0, 1)))
        k += 2 * steps
        alive = alive[np.ceil(best[alive]) >= k]

    excess = np.ceil(best)
    p = first + ((excess - best) / _TIE).astype(np.int64)
    c = first + excess.astype(np.int64) - p
    q = np.sqrt((p * p - 4 * n + 4 * c).astype(np.float64)).astype(np.int64)
    a = (p - q) >> 1
    no_grid = n < 4
    a, b, c = np.where(no_grid, 0, a), np.where(no_grid, 0, p - a), np.where(no_grid, n, c)
    return np.stack([a, b, c, a + b + c])


def _ranks(n: Integers, first: Integers, k: int, steps: int) -> Float64[np.ndarray, "steps 2 size"]:
    """Return k' + c, less a little for larger k', at k' = k, …, k + 2 steps - 1.

    With x = w/2, half the root of p² - 4n, c = r² - x² for the smallest r >= x that is an integer
    where p is even, and half of an odd number where p is odd. All of it is exact: p² - 4n is below
    2**51, where a correctly rounded root does not pass an integer.
    """
    offset = np.arange(k, k + 2 * steps, dtype=np.float64).reshape(steps, 2, 1)
    half_odd = ((first + np.array([[k], [k + 1]])) & 1) / 2
    # The longer of the two directions is the contiguous one.
    order: Literal["C", "F"] = "C" if n.size > steps else "F"
    square = np.empty((steps, 2, n.size), order=order)
    np.add(first / 2, offset / 4, out=square)
    square *= offset
    square += (first * first - 4 * n) / 4
    r = np.sqrt(square)
    r -= half_odd
    np.ceil(r, out=r)
    r += half_odd
    r *= r
    r -= square
    r += offset * (1 - _TIE)
    return r


def _floor_of_twice_the_root(n: Integers) -> Integers:
    root = (2 * np.sqrt(n.astype(np.float64))).astype(np.int64)
    root -= root * root - 4 * n > 0
    root += (root + 1) * (root + 1) - 4 * n <= 0
    return root


def _int64(n: Any) -> Int64[np.ndarray, "..."]:
    """Return the numbers as int64, or refuse them."""
    is_array = isinstance(n, np.ndarray | np.generic) or is_torch_array(n)
    if is_torch_array(n) and n.dtype.is_floating_point:  # numpy has no bfloat16
        raise TypeError(f"n must have an integer dtype, got {str(n.dtype).removeprefix('torch.')}")
    given = n.detach().cpu().numpy() if is_torch_array(n) else np.asarray(n)
    if given.dtype.kind not in "iu":
        # An empty list, or one with an integer too large for numpy, gets no integer dtype.
        objects = np.asarray(n, dtype=object)
        if is_array or not all(type(x) is int for x in objects.flat):
            raise TypeError(f"n must have an integer dtype, got {given.dtype}")
        given = objects
    if given.size:
        smallest, largest = given.min(), given.max()
        if smallest < 0:
            raise ValueError(f"n must be non-negative, got {smallest}")
        if largest >= _LIMIT:
            raise ValueError(f"n must be below 2**62, got {largest}")
    return given.astype(np.int64)
