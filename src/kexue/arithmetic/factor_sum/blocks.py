r"""Many consecutive p at once, for numbers beyond some thirty digits.

The smaller factor :math:`a(p) = (p - w)/2`, :math:`w = \sqrt{p^2 - 4n}`, is a smooth function of p,
and with δ its fractional part the remainder of p is

.. math:: c = w\,\delta + \delta^2.

So c <= C needs δ <= C/w, and a Taylor polynomial of a modulo 1 finds the few p that can have it. A
float holds the polynomial although w may have dozens of digits: at integers, a coefficient counts
only modulo 1, and big integers reduce those coefficients that are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt

import numpy as np
from jaxtyping import Float

__all__: list[str] = []

_LONGEST = 1 << 15
_SHORTEST = 64
_BITS = 64

# Bounds of what δ can be off at either end of a block: 1e-7 by truncation (see `length`), 1.2e-7
# by rounding of the quadratic term, at most half of 2**14 squared, and 0.6e-7 of the cubic one.
_MARGIN = 1e-6


class _BlockScan:
    """Finds the values of p whose remainder may be small; keeps two buffers between calls."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._first = isqrt(4 * n) + 1
        self._values = np.empty(0)
        self._floors = np.empty(0)

    def length(self, p: int) -> int:
        r"""Return how many values from p on one polynomial can serve, or 0 where too few.

        At the distance t of p from :math:`2\sqrt n`, w grows like the root of t, so the first
        neglected term is :math:`\frac{21}{2048} w (h/t)^6` for a half-length h. Twice that must
        stay below 1e-7, and the cubic term, :math:`\frac{1}{32} w (h/t)^3`, below :math:`2^{26}`.
        """
        t = p - self._first
        log_w = (p * p - 4 * self._n).bit_length() / 2
        truncation = (1e-7 / 0.0206) ** (1 / 6) * 2.0 ** (-log_w / 6)
        cubic = 2.0 ** ((31 - log_w) / 3)
        length = int(2 * t * min(truncation, cubic))
        if length < _SHORTEST:
            return 0
        return min(_LONGEST, 1 << (length.bit_length() - 1))

    def suspects(self, start: int, stop: int, total: int, length: int) -> Iterator[int]:
        """Yield, ascending, every p in [start, stop) with p + c <= total, and few others."""
        n_blocks = -(-(stop - start) // length)
        centres = range(start + length // 2, start + n_blocks * length, length)
        coefficients = np.array([_coefficients(self._n, p) for p in centres])
        coefficients[:, 0] += _MARGIN

        if self._values.shape != (n_blocks, length):
            self._values = np.empty((n_blocks, length))
            self._floors = np.empty((n_blocks, length))
        values, floors = self._values, self._floors
        np.matmul(coefficients, _powers(length), out=values)
        np.floor(values, out=floors)
        fractions = np.subtract(values, floors, out=values)

        w = isqrt(start * start - 4 * self._n)
        offsets = np.flatnonzero(fractions <= (total - start) / w + 2 * _MARGIN)
        return (start + offset for offset in offsets.tolist() if offset < stop - start)


def _coefficients(n: int, p: int) -> tuple[float, ...]:
    r"""Return the Taylor coefficients of a at p, up to the fifth, the first three modulo 1.

    The second is :math:`n/w^3`; its derivatives give the others, in :math:`u = p/w^2` and
    :math:`v = 1/w^2`.
    """
    gap = p * p - 4 * n
    w = isqrt(gap << 2 * _BITS)  # in units of 2^-64, like all that is made of it
    constant = (p << _BITS) - w
    slope = (1 << _BITS) - (p << 2 * _BITS) // w
    curvature = (n << 4 * _BITS) // w**3
    a2, u, v = curvature / (1 << _BITS), p / gap, 1 / gap
    return (
        _centred_fraction(constant, _BITS + 1),
        _centred_fraction(slope, _BITS + 1),
        _centred_fraction(curvature, _BITS),
        -a2 * u,
        a2 * (5 * u * u - v) / 4,
        -a2 * u * (7 * u * u - 3 * v) / 4,
    )


def _centred_fraction(x: int, bits: int) -> float:
    """Return x 2^-bits modulo 1, between -1/2 and 1/2."""
    half = 1 << (bits - 1)
    return (((x + half) & (2 * half - 1)) - half) / (2 * half)


@lru_cache(maxsize=16)
def _powers(length: int) -> Float[np.ndarray, "6 length"]:
    steps = np.arange(-length // 2, length // 2, dtype=np.float64)
    return steps ** np.arange(6)[:, None]
