"""The laws of the angle and of its cosine.

The cosine is a Beta((n-1)/2, (n-1)/2) variable stretched to [-1, 1]. For small angles, and near the
right angle in high dimension, it is the square of sine or cosine that carries the digits; so points
are handed around with both, and neither is computed from the other by subtraction.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.polynomial.polynomial import polyval
from numpy.typing import ArrayLike
from scipy.special import (
    betainc,
    betaincc,
    betainccinv,
    betaincinv,
    digamma,
    gammaln,
    polygamma,
    xlog1py,
    xlogy,
)

__all__ = ["RandomAngle", "RandomCosine"]

Reals: TypeAlias = ArrayLike | float
Floats: TypeAlias = Float[np.ndarray, "..."]
Values: TypeAlias = np.float64 | Floats


class RandomAngle:
    r"""Law of the angle between two random directions, in radians on [0, π].

    Density :math:`C_n \sin^{n-2}\theta`, mean π/2, variance :math:`\frac12\psi'(n/2) \approx 1/n`.
    All methods take scalars and arrays, broadcast them against ``dimension``, and return numpy
    scalars and arrays of float64. A point outside [0, π] has density 0; a probability outside
    [0, 1], like NaN, gives NaN.

    Parameters
    ----------
    dimension : int or array of int
        Dimension of the space, at least 2.

    Raises
    ------
    ValueError
        Where ``dimension`` is below 2, fractional or NaN.
    TypeError
        Where ``dimension``, or an argument of a method, is complex or no number.

    Examples
    --------
    In 100 dimensions, one angle in a thousand is below 72 degrees:

    >>> import numpy as np
    >>> bool(np.isclose(np.degrees(RandomAngle(100).ppf(0.001)), 72.30421298))
    True
    >>> RandomAngle([3, 10, 1000]).std().round(4)
    array([0.6837, 0.3327, 0.0316])
    """

    def __init__(self, dimension: Reals) -> None:
        self._n = _dimensions(dimension)
        self.dimension = np.array(dimension)[()]

    def __repr__(self) -> str:
        return f"RandomAngle({self.dimension})"

    def support(self) -> tuple[float, float]:
        """Return the ends of the support."""
        return 0.0, math.pi

    def pdf(self, x: Reals) -> Values:
        """Return the density at the angle ``x``."""
        return np.exp(self.logpdf(x))

    def logpdf(self, x: Reals) -> Values:
        """Return the logarithm of the density at ``x``."""
        x = _reals(x)
        inside = _log_constant(self._n) + _log_power(_at_angle(x), self._n - 2)
        return np.where((x < 0) | (x > math.pi), -np.inf, inside)[()]

    def cdf(self, x: Reals) -> Values:
        """Return the probability of an angle of at most ``x``."""
        return _above(self._n, _at_angle(_reals(x)))[()]

    def sf(self, x: Reals) -> Values:
        """Return the probability of an angle above ``x``."""
        return _above(self._n, _opposite(_at_angle(_reals(x))))[()]

    def logcdf(self, x: Reals) -> Values:
        """Return the logarithm of ``cdf(x)``, finite where that underflows."""
        return _log_above(self._n, _at_angle(_reals(x)))[()]

    def logsf(self, x: Reals) -> Values:
        """Return the logarithm of ``sf(x)``, finite where that underflows."""
        return _log_above(self._n, _opposite(_at_angle(_reals(x))))[()]

    def ppf(self, q: Reals) -> Values:
        """Return the angle below which a share ``q`` of all angles lies."""
        cos, sin = _quantile(self._n, _reals(q))
        return np.arctan2(sin, cos)[()]

    def isf(self, q: Reals) -> Values:
        """Return the angle above which a share ``q`` of all angles lies."""
        cos, sin = _quantile(self._n, _reals(q))
        return np.arctan2(sin, -cos)[()]

    def interval(self, confidence: Reals) -> tuple[Values, Values]:
        """Return the ends of the central interval of probability ``confidence``."""
        outside = (1 - _confidence(confidence)) / 2
        return self.ppf(outside), self.isf(outside)

    def mean(self) -> Values:
        """Return the mean, a right angle."""
        return np.full(self._n.shape, math.pi / 2)[()]

    def median(self) -> Values:
        """Return the median, a right angle."""
        return self.mean()

    def var(self) -> Values:
        """Return the variance."""
        return (polygamma(1, self._n / 2) / 2)[()]

    def std(self) -> Values:
        """Return the standard deviation."""
        return np.sqrt(self.var())

    def kurtosis(self) -> Values:
        """Return the excess kurtosis, close to -2/n."""
        fourth_cumulant = -polygamma(3, self._n / 2) / 8
        return (fourth_cumulant / self.var() ** 2)[()]

    def entropy(self) -> Values:
        """Return the differential entropy in nats."""
        return _entropy(self._n, self._n - 2)[()]

    def rvs(self, size: int | tuple[int, ...] | None = None, random_state: Any = None) -> Values:
        """Draw angles of shape ``size`` (that of ``dimension`` by default).

        ``random_state`` is a seed or a numpy Generator; the cost of a draw does not depend on n.
        """
        along, across = _draw(self._n, size, random_state)
        return np.arctan2(across, along)[()]


class RandomCosine:
    r"""Law of the cosine of the angle between two random directions, on [-1, 1].

    Density :math:`C_n (1 - \eta^2)^{(n-3)/2}`, mean 0, variance 1/n. All methods take scalars and
    arrays, broadcast them against ``dimension``, and return numpy scalars and arrays of float64. A
    point outside [-1, 1] has density 0; a probability outside [0, 1], like NaN, gives NaN.

    Parameters
    ----------
    dimension : int or array of int
        Dimension of the space, at least 2.

    Raises
    ------
    ValueError
        Where ``dimension`` is below 2, fractional or NaN.
    TypeError
        Where ``dimension``, or an argument of a method, is complex or no number.

    Examples
    --------
    Between two embeddings of dimension 768, a cosine of 0.15 is no chance:

    >>> float(RandomCosine(768).sf(0.15).round(8))
    1.48e-05
    >>> RandomCosine([2, 3, 4]).pdf(0.0).round(4)
    array([0.3183, 0.5   , 0.6366])
    """

    def __init__(self, dimension: Reals) -> None:
        self._n = _dimensions(dimension)
        self.dimension = np.array(dimension)[()]

    def __repr__(self) -> str:
        return f"RandomCosine({self.dimension})"

    def support(self) -> tuple[float, float]:
        """Return the ends of the support."""
        return -1.0, 1.0

    def pdf(self, x: Reals) -> Values:
        """Return the density at the cosine ``x``."""
        return np.exp(self.logpdf(x))

    def logpdf(self, x: Reals) -> Values:
        """Return the logarithm of the density at ``x``."""
        x = _reals(x)
        inside = _log_constant(self._n) + _log_power(_at_cosine(x), self._n - 3)
        return np.where(np.abs(x) > 1, -np.inf, inside)[()]

    def cdf(self, x: Reals) -> Values:
        """Return the probability of a cosine of at most ``x``."""
        return _above(self._n, _opposite(_at_cosine(_reals(x))))[()]

    def sf(self, x: Reals) -> Values:
        """Return the probability of a cosine above ``x``."""
        return _above(self._n, _at_cosine(_reals(x)))[()]

    def logcdf(self, x: Reals) -> Values:
        """Return the logarithm of ``cdf(x)``, finite where that underflows."""
        return _log_above(self._n, _opposite(_at_cosine(_reals(x))))[()]

    def logsf(self, x: Reals) -> Values:
        """Return the logarithm of ``sf(x)``, finite where that underflows."""
        return _log_above(self._n, _at_cosine(_reals(x)))[()]

    def ppf(self, q: Reals) -> Values:
        """Return the cosine below which a share ``q`` of all cosines lies."""
        cos, _ = _quantile(self._n, _reals(q))
        return (0.0 - cos)[()]

    def isf(self, q: Reals) -> Values:
        """Return the cosine above which a share ``q`` of all cosines lies."""
        cos, _ = _quantile(self._n, _reals(q))
        return cos[()]

    def interval(self, confidence: Reals) -> tuple[Values, Values]:
        """Return the ends of the central interval of probability ``confidence``."""
        outside = (1 - _confidence(confidence)) / 2
        return self.ppf(outside), self.isf(outside)

    def mean(self) -> Values:
        """Return the mean, 0."""
        return np.zeros(self._n.shape)[()]

    def median(self) -> Values:
        """Return the median, 0."""
        return self.mean()

    def var(self) -> Values:
        """Return the variance, 1/n."""
        return 1 / self._n

    def std(self) -> Values:
        """Return the standard deviation."""
        return np.sqrt(self.var())

    def kurtosis(self) -> Values:
        """Return the excess kurtosis, -6/(n + 2)."""
        return -6 / (self._n + 2)

    def entropy(self) -> Values:
        """Return the differential entropy in nats."""
        return _entropy(self._n, self._n - 3)[()]

    def moment(self, order: int) -> Values:
        """Return the mean of the cosine's power of ``order``, a non-negative integer."""
        half, odd = divmod(_integer(order, "order", 0), 2)
        if odd:
            return self.mean()
        j = np.arange(half)
        return np.prod((2 * j + 1) / (self._n[..., None] + 2 * j), axis=-1)[()]

    def rvs(self, size: int | tuple[int, ...] | None = None, random_state: Any = None) -> Values:
        """Draw cosines of shape ``size`` (that of ``dimension`` by default).

        ``random_state`` is a seed or a numpy Generator; the cost of a draw does not depend on n.
        """
        along, across = _draw(self._n, size, random_state)
        return (along / np.hypot(along, across))[()]


class _Place(NamedTuple):
    """A direction seen from the pole: cosine and sine of its angle, and the cap around it."""

    cos: Any
    sin: Any
    cap: Any
    """(1 - |cos|)/2, the share of the diameter that the cap beyond the direction takes."""


def _at_cosine(x: Floats) -> _Place:
    t = np.clip(x, -1.0, 1.0)
    return _Place(t, np.sqrt((1 - t) * (1 + t)), (1 - np.abs(t)) / 2)


def _at_angle(x: Floats) -> _Place:
    theta = np.clip(x, 0.0, math.pi)
    # The double next to π means π: its sine, 1.2e-16, is that of a rounding error.
    cos, sin = np.cos(theta), np.where(theta == math.pi, 0.0, np.sin(theta))
    far = np.abs(cos)
    cap = np.where(far < 0.7, (1 - far) / 2, sin * sin / (2 * (1 + far)))
    return _Place(cos, sin, cap)


def _opposite(place: _Place) -> _Place:
    return place._replace(cos=-place.cos)


def _above(n: Floats, place: _Place) -> Floats:
    """Probability of a cosine above that of the place, relatively accurate."""
    tail = _tail(n, place)
    return np.where(place.cos < 0, 1 - tail, tail)


def _log_above(n: Floats, place: _Place) -> Floats:
    n, cos, sin, cap = np.broadcast_arrays(n, *place)
    tail = _tail(n, _Place(cos, sin, cap))
    above = np.full(n.shape, np.nan)
    low, deep = cos < 0, (cos > 0) & (tail < _DEEP)
    high = ~(low | deep)
    above[low] = np.log1p(-tail[low])
    above[high] = np.log(tail[high])
    above[deep] = _log_deep_tail(n[deep], cos[deep], sin[deep])
    return above


_DEEP = math.exp(-600)


def _tail(n: Floats, place: _Place) -> Floats:
    """Probability of a cosine above |cos|, in [0, 1/2]."""
    n, cos, sin, cap = np.broadcast_arrays(n, *place)
    a = (n - 1) / 2
    square = cos**2
    tail = np.full(n.shape, np.nan)
    plane, vast = n == 2, n > _VAST
    # The symmetric form is several times faster; what it loses grows with the dimension.
    case = ~(plane | vast)
    tail[case] = betainc(a[case], a[case], cap[case])
    case = plane
    tail[case] = np.arctan2(sin[case], np.abs(cos[case])) / math.pi
    case = vast & (square <= 0.5)
    tail[case] = betaincc(0.5, a[case], square[case]) / 2
    case = vast & (square > 0.5)
    tail[case] = betainc(a[case], 0.5, sin[case] ** 2) / 2
    return tail


_VAST = 1e6


def _log_deep_tail(n: Floats, cos: Floats, sin: Floats) -> Floats:
    r"""Logarithm of the tail where it is below exp(-600).

    I_x(a, 1/2) = x^a (1-x)^{-1/2} C_n / a · F(1/2, 1; a + 1; -y) at x = sin², y = tan²: Pfaff's
    transformation of the usual series. Gauss's continued fraction of F has positive terms, the m-th
    about m y/(2a); so deep in the tail y/(2a) < 1/1200, and eight of them exhaust a double.
    """
    a = (n - 1) / 2
    y = (sin / cos) ** 2
    fraction = np.ones_like(y)
    for m in range(4, 0, -1):
        even = m * (a + m - 0.5) / ((a + 2 * m - 1) * (a + 2 * m))
        odd = (m - 0.5) * (a + m - 1) / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd * y / (1 + even * y / fraction)
    log_power = _log_power(_Place(cos, sin, None), n - 1)
    return log_power + _log_constant(n) - np.log(2 * a * np.abs(cos) * fraction)


def _log_power(place: _Place, exponent: Values) -> Floats:
    """Logarithm of sin^exponent, with 0 for an exponent of 0 even at the poles."""
    # Near the equator log sin would lose the digits of a cosine that is small against 1.
    near_equator = xlog1py(exponent, -(place.cos**2)) / 2
    return np.where(np.abs(place.cos) < 0.7, near_equator, xlogy(exponent, place.sin))


def _log_constant(n: Floats) -> Floats:
    """Logarithm of C_n = Γ(n/2) / (Γ((n-1)/2) √π)."""
    z = (n - 1) / 2
    large = np.maximum(z, _LARGE)
    # A difference of two gammaln loses six digits at n = 1e9.
    series = np.log(large) / 2 + np.log1p(polyval(1 / large, _GAMMA_RATIO))
    step = np.where(z < _LARGE, gammaln(z + 0.5) - gammaln(z), series)
    return np.asarray(step - math.log(math.pi) / 2)


_LARGE = 30.0
# Γ(z + 1/2) / (Γ(z) √z) - 1 in powers of 1/z.
_GAMMA_RATIO = (
    0.0,
    -1 / 8,
    1 / 128,
    5 / 1024,
    -21 / 32768,
    -399 / 262144,
    869 / 4194304,
    39325 / 33554432,
    -334477 / 1073741824,
)


def _entropy(n: Floats, exponent: Values) -> Floats:
    """Mean of -log(C_n sin^exponent)."""
    z = (n - 1) / 2
    large = np.maximum(z, _LARGE)
    series = polyval(1 / large, _DIGAMMA_STEP)
    step = np.where(z < _LARGE, digamma(z + 0.5) - digamma(z), series)
    return np.asarray(exponent / 2 * step - _log_constant(n))


# ψ(z + 1/2) - ψ(z) in powers of 1/z.
_DIGAMMA_STEP = (0.0, 1 / 2, 1 / 8, 0.0, -1 / 64, 0.0, 1 / 128, 0.0, -17 / 2048)


def _quantile(n: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of the angle below which a share q of all angles lies."""
    n, q = np.broadcast_arrays(n, np.where((q >= 0) & (q <= 1), q, np.nan))
    a = (n - 1) / 2
    # 1 - q is exact where it is needed, above one half.
    tail = np.minimum(q, 1 - q)
    cos2 = betainccinv(0.5, a, 2 * tail, out=np.empty(n.shape))
    sin2 = np.asarray(1 - cos2)
    polar = cos2 > 0.5
    sin2[polar] = betaincinv(a[polar], 0.5, 2 * tail[polar])
    cos2[polar] = 1 - sin2[polar]
    plane = n == 2
    cos = np.where(plane, np.cos(math.pi * tail), np.sqrt(cos2))
    sin = np.where(plane, np.sin(math.pi * tail), np.sqrt(sin2))
    return np.where(q <= 0.5, cos, -cos), sin


def _draw(n: Floats, size: int | tuple[int, ...] | None, random_state: Any) -> tuple[Any, Any]:
    """Lengths of a normal vector along a fixed direction and across it."""
    generator = np.random.default_rng(random_state)
    across = np.sqrt(2 * generator.standard_gamma((n - 1) / 2, size))
    return generator.standard_normal(np.shape(across)), across


def _reals(x: Any, name: str = "the argument") -> Floats:
    array = np.asarray(x)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{name} must be real numbers, got an array of {array.dtype}")
    return array.astype(np.float64)


def _dimensions(dimension: Any) -> Floats:
    n = _reals(dimension, "dimension")
    bad = ~(n >= 2) | (n != np.floor(n)) | np.isinf(n)
    if bad.any():
        raise ValueError(f"dimension must be an integer of at least 2, got {n[bad][0]:g}")
    return n


def _integer(value: Any, name: str, least: int) -> int:
    if not isinstance(value, int):
        number = _reals(value, name)
        if number.ndim or not math.isfinite(number) or number != int(number):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        value = int(number)
    if value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def _confidence(confidence: Any) -> Floats:
    level = _reals(confidence, "confidence")
    if not ((level >= 0) & (level <= 1)).all():
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
    return level
