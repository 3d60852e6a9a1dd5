"""One number of any size: the search over p = a + b, its bounds and its proof."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, SupportsIndex, get_args

from kexue.arithmetic.factor_sum.blocks import _BlockScan

__all__ = [
    "FactorSum",
    "FactorSumBounds",
    "factor_sum",
    "factor_sum_bounds",
    "factor_sum_minimizers",
]

Method = Literal["adaptive", "fourth_root", "square_root"]

# Below this many candidates a loop over Python integers is done before blocks pay off.
_ONE_BY_ONE = 100_000
_ROUND = 1 << 17


@dataclass(frozen=True, slots=True)
class FactorSum:
    """A layout n = ab + c, and what is proven about its sum.

    Attributes
    ----------
    n : int
        The number.
    a, b : int
        The factors, 0 <= a <= b.
    c : int
        The remainder, at least 0.
    total : int
        The sum a + b + c.
    lower_bound : int
        No layout of n has a smaller sum; equal to ``total`` when the search was completed.
    candidates : int
        Number of values of p = a + b, or of a for ``"square_root"``, that were examined.

    Examples
    --------
    >>> FactorSum(n=130, a=11, b=11, c=9, total=31, lower_bound=23, candidates=1).optimal
    False
    """

    n: int
    a: int
    b: int
    c: int
    total: int
    lower_bound: int
    candidates: int

    @property
    def optimal(self) -> bool:
        """Whether the sum is proven to be the smallest."""
        return self.total == self.lower_bound


@dataclass(frozen=True, slots=True)
class FactorSumBounds:
    """Two numbers that enclose the smallest sum.

    Attributes
    ----------
    lower : int
        min(n, ⌈2√n⌉), which n = m² and n = m(m + 1) reach.
    upper : int
        The sum at p = ⌈2√n⌉, or one more; at most 2√n + 2 + √(1 + 4√n).

    Examples
    --------
    >>> bounds = factor_sum_bounds(130)
    >>> bounds.lower <= factor_sum(130).total <= bounds.upper
    True
    """

    lower: int
    upper: int


def factor_sum(
    n: SupportsIndex, *, method: Method = "adaptive", max_candidates: SupportsIndex | None = None
) -> FactorSum:
    r"""Return the layout n = ab + c with the smallest a + b + c.

    Among layouts of equal sum it is the one with the smallest c.

    Parameters
    ----------
    n : int
        The number, at least 0 and of any size.
    method : {"adaptive", "fourth_root", "square_root"}
        ``"adaptive"`` examines ascending p = a + b until p exceeds the best sum: about
        :math:`1.18\,n^{1/6}` candidates for a random n, :math:`2 n^{1/4}` at worst; seconds for 50
        digits, minutes for 60. The other two are the article's reference points:
        ``"fourth_root"`` examines every p that its bound on the sum admits, ``"square_root"`` every
        a between √(n/2) and √n, where among equal sums another layout may be found.
    max_candidates : int, optional
        Stop after so many candidates with the best layout so far (``"adaptive"`` only). The
        ``lower_bound`` of the result then says how far from the smallest sum it can be.

    Returns
    -------
    FactorSum
        The layout, with a proven lower bound of the smallest sum.

    Raises
    ------
    ValueError
        Where ``n`` is negative, ``method`` is unknown, or ``max_candidates`` is below 1 or given
        with another method than ``"adaptive"``.
    TypeError
        Where ``n`` or ``max_candidates`` is no integer.

    Examples
    --------
    >>> factor_sum(10**9 + 7)
    FactorSum(n=1000000007, a=31250, b=32000, c=7, total=63257, lower_bound=63257, candidates=13)

    Thirty-one digits of π, first with a few candidates, then with a proof:

    >>> pi = 3141592653589793238462643383279
    >>> guess = factor_sum(pi, max_candidates=5000)
    >>> guess.total - guess.lower_bound, guess.optimal
    (165246, False)
    >>> factor_sum(pi).optimal
    True
    """
    n = _natural(n, "n")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if max_candidates is not None:
        max_candidates = _positive(max_candidates, "max_candidates")
        if method != "adaptive":
            raise ValueError(f"max_candidates needs the method 'adaptive', got {method!r}")
    if n < 4:
        return _without_factors(n)
    if method == "square_root":
        return _scan_smaller_factors(n)
    search = _Search(n)
    if method == "fourth_root":
        search.run_to_the_bound()
    else:
        search.run(max_candidates)
    return search.layout(*search.ties[-1])


def factor_sum_minimizers(n: SupportsIndex) -> tuple[FactorSum, ...]:
    """Return every layout n = ab + c, a <= b, with the smallest a + b + c.

    Parameters
    ----------
    n : int
        The number, at least 0 and of any size.

    Returns
    -------
    tuple of FactorSum
        The layouts, by ascending c.

    Raises
    ------
    ValueError
        Where ``n`` is negative.
    TypeError
        Where ``n`` is no integer.

    Examples
    --------
    >>> [(best.a, best.b, best.c) for best in factor_sum_minimizers(2628)]
    [(36, 73, 0), (37, 71, 1), (41, 64, 4), (43, 61, 5), (46, 57, 6)]
    """
    n = _natural(n, "n")
    if n < 4:
        return (_without_factors(n),)
    search = _Search(n)
    search.run(None)
    ties = [search.layout(p, c) for p, c in reversed(search.ties)]
    # Between p = 0 and ⌊2√n⌋ lie larger sums only; a = b = 0 itself ties with n = 4 and 5.
    if search.total == n:
        ties.append(search.layout(0, n))
    return tuple(ties)


def factor_sum_bounds(n: SupportsIndex) -> FactorSumBounds:
    r"""Return two numbers that enclose the smallest a + b + c with n = ab + c, without a search.

    Below, :math:`a + b \ge 2\sqrt{ab}` gives :math:`\lceil 2\sqrt n \rceil`. Above,
    :math:`p = \lceil 2\sqrt n \rceil` has a candidate with
    :math:`c \le \lceil \sqrt{p^2 - 4n} \rceil`, and with c = 0 where that root is an integer.

    Parameters
    ----------
    n : int
        The number, at least 0 and of any size.

    Returns
    -------
    FactorSumBounds
        The bounds; they differ by at most √(1 + 4√n) + 1.

    Raises
    ------
    ValueError
        Where ``n`` is negative.
    TypeError
        Where ``n`` is no integer.

    Examples
    --------
    >>> factor_sum_bounds(10**12 + 1)
    FactorSumBounds(lower=2000001, upper=2002001)
    """
    n = _natural(n, "n")
    if n == 0:
        return FactorSumBounds(0, 0)
    p = isqrt(4 * n - 1) + 1
    root = isqrt(p * p - 4 * n)
    is_square = root * root == p * p - 4 * n
    return FactorSumBounds(min(n, p), min(n, p if is_square else p + root + 1))


class _Search:
    """The best layouts among p = ⌊2√n⌋, …, next - 1, by ascending p and so descending c.

    Below ⌊2√n⌋ sums are larger: there c = n - ab with the largest ab of each p, and a step of p
    gains more than it costs.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.first = isqrt(4 * n)
        c = (4 * n - self.first**2 + (self.first & 1)) >> 2
        self.total = self.first + c
        self.ties = [(self.first, c)]
        self.next = self.first + 1

    def run(self, max_candidates: int | None) -> None:
        """Go on until p exceeds the best sum, or for so many candidates."""
        limit = None if max_candidates is None else self.first + max_candidates
        self.scan(self.next, _at_most(self.next + _ONE_BY_ONE, limit), adaptive=True)
        blocks = _BlockScan(self.n)
        while self.next <= self.total and self.next != limit:
            start, stop = self.next, _at_most(self.next + _ROUND, limit)
            length = blocks.length(start)
            if length == 0:
                self.scan(start, stop, adaptive=True)
                continue
            for p in blocks.suspects(start, stop, self.total, length):
                self.scan(p, p + 1, adaptive=True)
            self.next = stop

    def run_to_the_bound(self) -> None:
        """Examine every p up to 2√n + 2 + √(1 + 4√n), a bound on the smallest sum."""
        if self.first**2 < 4 * self.n:
            # Each square root is rounded up, so that no p of the interval is lost.
            last = self.first + 1 + 2 + isqrt(1 + isqrt(16 * self.n)) + 1
            self.scan(self.next, last + 1, adaptive=False)

    def scan(self, start: int, stop: int, *, adaptive: bool) -> None:
        """Examine p = start, …, stop - 1 one by one; if adaptive, leave off beyond the best sum."""
        p, total = start, self.total
        if adaptive:
            stop = min(stop, total + 1)
        gap = p * p - 4 * self.n
        while p < stop:
            q = isqrt(gap - 1) + 1
            q += (p - q) & 1
            c = (q * q - gap) >> 2
            if p + c <= total:
                if p + c < total:
                    self.total = total = p + c
                    self.ties.clear()
                    if adaptive:
                        stop = min(stop, total + 1)
                self.ties.append((p, c))
            gap += 2 * p + 1
            p += 1
        self.next = p

    def layout(self, p: int, c: int) -> FactorSum:
        """Return the layout with a + b = p and remainder c, with what is proven by now."""
        q = isqrt(p * p - 4 * (self.n - c))
        a = (p - q) // 2
        lower_bound = min(self.total, self.next)
        return FactorSum(self.n, a, p - a, c, p + c, lower_bound, self.next - self.first)


def _scan_smaller_factors(n: int) -> FactorSum:
    """Examine every a from ⌊√(n/2)⌋ to ⌊√n⌋ with the largest b.

    For n > 110000, 2√n + 2 + √(1 + 4√n) is below the sum at any smaller a; up to there it was
    compared with all sums.
    """
    high = isqrt(n)
    low = high if high * high == n else isqrt(n // 2)
    total, a, c = min((a + n // a + n % a, a, n % a) for a in range(low, high + 1))
    return FactorSum(n, a, n // a, c, total, total, high - low + 1)


def _without_factors(n: int) -> FactorSum:
    """Return the only optimal layout of n < 4: no grid at all."""
    return FactorSum(n, 0, 0, n, n, n, 1)


def _at_most(stop: int, limit: int | None) -> int:
    return stop if limit is None else min(stop, limit)


def _index(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def _natural(value: Any, name: str) -> int:
    number = _index(value, name)
    if number < 0:
        raise ValueError(f"{name} must be non-negative, got {number}")
    return number


def _positive(value: Any, name: str) -> int:
    number = _index(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
