"""How many dimensions N points need: four bounds on one tail, and a union bound over events."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincc

__all__ = [
    "johnson_lindenstrauss_eps",
    "johnson_lindenstrauss_min_dim",
    "norm_failure_probability",
]

Floats: TypeAlias = float | np.float64 | Float[np.ndarray, "..."]

# Beyond this, consecutive integers are no longer apart as floats.
_MAX_COMPONENTS = 2.0**53


def johnson_lindenstrauss_min_dim(
    n_samples: ArrayLike,
    *,
    eps: ArrayLike = 0.1,
    failure_probability: float | None = None,
    preserve: str = "distance",
    bound: str = "exact",
) -> int | Int[np.ndarray, "..."]:
    r"""Return how many random dimensions keep the geometry of N points.

    The smallest n with :math:`E\, p_n(\varepsilon) \le \delta`, where :math:`E` counts the events
    that must not happen: N(N-1)/2 distances, N(N-1) norms of sums and differences for inner
    products, or N norms.

    Parameters
    ----------
    n_samples : int or array of int
        Number of points N, at least 2.
    eps : float or array of float
        Allowed relative error ε of squared distances or squared norms, in (0, 1); for inner
        products the allowed error in units of :math:`\|x\|\|y\|`.
    failure_probability : float, optional
        δ in (0, 1), the probability that some event happens. 2E/N³ by default, which is (N-1)/N²
        for distances.
    preserve : {"distance", "inner_product", "norm"}
        What has to be kept.
    bound : {"exact", "chernoff", "dasgupta-gupta", "article"}
        Which :math:`p_n`, see :func:`norm_failure_probability`. "exact" is for normal entries;
        signs of density 1/3 or more obey the others.

    Returns
    -------
    int or array of int
        The dimension; an array of the broadcast shape where an argument is an array.

    Raises
    ------
    ValueError
        Where an argument is out of its range, or the dimension exceeds 2**53.
    TypeError
        Where ``n_samples`` or ``eps`` is no real number.

    Examples
    --------
    >>> johnson_lindenstrauss_min_dim(1000, eps=0.5)
    364
    >>> johnson_lindenstrauss_min_dim([10**4, 10**6], eps=0.1, bound="article")
    array([22105, 33158])
    """
    N, epsilon = _samples(n_samples), _epsilon(eps)
    log_p, log_allowed = _log_bound(bound), _log_allowed(N, failure_probability, preserve)
    scalar = N.ndim == epsilon.ndim == 0
    log_allowed, epsilon = np.broadcast_arrays(log_allowed, epsilon)

    low, high = np.zeros(epsilon.shape), np.ones(epsilon.shape)
    while (short := log_p(high, epsilon) > log_allowed).any():
        low, high = np.where(short, high, low), np.where(short, 2 * high, high)
        if (high > _MAX_COMPONENTS).any():
            raise ValueError(f"eps must allow a dimension of at most 2**53, got {eps!r}")
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        short = log_p(np.maximum(middle, 1), epsilon) > log_allowed
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return int(high) if scalar else high.astype(np.int64)


def johnson_lindenstrauss_eps(
    n_samples: int,
    n_components: int,
    *,
    failure_probability: float | None = None,
    preserve: str = "distance",
    bound: str = "exact",
) -> float:
    """Return the error that a number of random dimensions guarantees for N points.

    The inverse of :func:`johnson_lindenstrauss_min_dim`, whose parameters have the same meaning.

    Parameters
    ----------
    n_samples : int
        Number of points N, at least 2.
    n_components : int
        Dimension n of the projection, at least 1.
    failure_probability : float, optional
        δ in (0, 1), 2E/N³ by default.
    preserve : {"distance", "inner_product", "norm"}
        What has to be kept.
    bound : {"exact", "chernoff", "dasgupta-gupta", "article"}
        Which bound on the tail.

    Returns
    -------
    float
        The smallest ε in (0, 1); inf where no ε below 1 can be guaranteed.

    Raises
    ------
    ValueError
        Where an argument is out of its range.
    TypeError
        Where ``n_samples`` is no real number.

    Examples
    --------
    >>> round(johnson_lindenstrauss_eps(1000, 500, failure_probability=0.01), 6)
    0.386962
    """
    N = _samples(n_samples)
    if N.ndim:
        raise ValueError(f"n_samples must be a single integer, got {n_samples!r}")
    n = np.float64(_components(n_components))
    log_p = _log_bound(bound)
    log_allowed = float(_log_allowed(N, failure_probability, preserve))

    def excess(epsilon: float) -> float:
        return float(log_p(n, np.float64(epsilon))) - log_allowed

    largest = np.nextafter(1.0, 0.0)
    if excess(largest) > 0:
        return math.inf
    # Every bound exceeds what is allowed at 0, where it is 1 or 2 for a single event.
    return float(brentq(excess, 1e-18, largest, xtol=1e-18, rtol=4 * np.finfo(float).eps))


def norm_failure_probability(n_components: int, eps: float, *, bound: str = "exact") -> float:
    r"""Return p_n(ε), the chance that a projection changes a squared norm by more than ε.

    ==============  ======================================================================
    exact           :math:`P(\chi^2_n > n(1+\varepsilon)) + P(\chi^2_n < n(1-\varepsilon))`
    chernoff        :math:`e^{(\log(1+\varepsilon)-\varepsilon)n/2}
                    + e^{(\log(1-\varepsilon)+\varepsilon)n/2}`
    dasgupta-gupta  :math:`2e^{-(\varepsilon^2/2-\varepsilon^3/3)n/2}`
    article         :math:`2e^{-\varepsilon^2 n/8}`
    ==============  ======================================================================

    Parameters
    ----------
    n_components : int
        Dimension n of the projection, at least 1.
    eps : float
        Relative error ε of the squared norm, in (0, 1).
    bound : {"exact", "chernoff", "dasgupta-gupta", "article"}
        The law itself, for normal entries, or a bound on it.

    Returns
    -------
    float
        The probability. A bound above 1 comes back as it is: it says nothing.

    Raises
    ------
    ValueError
        Where an argument is out of its range.
    TypeError
        Where ``eps`` is no real number.

    Examples
    --------
    >>> round(norm_failure_probability(1000, 0.1), 6)
    0.025332
    """
    epsilon = _epsilon(eps)
    if epsilon.ndim:
        raise ValueError(f"eps must be a single number, got {eps!r}")
    return math.exp(_log_bound(bound)(np.float64(_components(n_components)), epsilon))


def _log_exact(n: Floats, epsilon: Floats) -> Floats:
    return np.logaddexp(_log_tail(n / 2, epsilon), _log_tail(n / 2, -epsilon))


def _log_chernoff(n: Floats, epsilon: Floats) -> Floats:
    return np.logaddexp(n / 2 * _rate(epsilon), n / 2 * _rate(-epsilon))


def _log_dasgupta_gupta(n: Floats, epsilon: Floats) -> Floats:
    return math.log(2) - n / 2 * (epsilon**2 / 2 - epsilon**3 / 3)


def _log_article(n: Floats, epsilon: Floats) -> Floats:
    return math.log(2) - n * epsilon**2 / 8


_LOG_BOUNDS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "exact": _log_exact,
    "chernoff": _log_chernoff,
    "dasgupta-gupta": _log_dasgupta_gupta,
    "article": _log_article,
}

# log E, the number of things that must not happen.
_LOG_EVENTS: dict[str, Callable[[Floats], Floats]] = {
    "distance": lambda N: np.log(N) + np.log(N - 1) - math.log(2),
    "inner_product": lambda N: np.log(N) + np.log(N - 1),
    "norm": np.log,
}


def _rate(e: Floats) -> Floats:
    """log(1 + e) - e, by its series where the difference would cancel."""
    series = -(e**2) * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6 - e / 7)))))
    return np.where(np.abs(e) < 1e-3, series, np.log1p(e) - e)


def _log_tail(a: Floats, e: Floats) -> Floats:
    """Log of the tail of a Gamma(a) variable beyond a(1 + e): above for e > 0, below for e < 0.

    The incomplete gamma functions underflow, and beyond four and a half standard deviations those
    of scipy lose all digits at large ``a``. There a continued fraction takes over, whose k-th term
    is about k over the square of that number.
    """
    a, e = np.broadcast_arrays(a, e)
    far = e**2 * a > _FAR**2
    near = np.where(e > 0, gammaincc(a, a * (1 + e)), gammainc(a, a * (1 + e)))
    with np.errstate(divide="ignore"):
        return np.where(far, _log_far_tail(np.maximum(a, _FAR**2), e), np.log(near))


_FAR, _TERMS = 4.5, 60


def _log_far_tail(a: Floats, e: Floats) -> Floats:
    x, excess = a * (1 + e), a * e
    fraction = np.zeros(np.shape(a))
    for k in range(_TERMS, 0, -1):
        # Legendre's fraction above the mean, the one of 1F1(1; a + 1; x) below it.
        top = np.where(e > 0, k * (a - k), k * x)
        bottom = np.where(e > 0, excess + 2 * k + 1, k - excess)
        fraction = top / (bottom + fraction)
    denominator = np.where(e > 0, excess + 1, -excess) + fraction
    # log(a^a e^-a / Γ(a)); out here a is above 20.
    stirling = (
        np.log(a / (2 * math.pi)) / 2
        - 1 / (12 * a)
        + 1 / (360 * a**3)
        - 1 / (1260 * a**5)
        + 1 / (1680 * a**7)
    )
    return a * _rate(e) + stirling - np.log(denominator)


def _log_allowed(N: Floats, failure_probability: float | None, preserve: str) -> Floats:
    """log(δ / E), what p_n must not exceed."""
    if preserve not in _LOG_EVENTS:
        raise ValueError(f"preserve must be one of {', '.join(_LOG_EVENTS)}, got {preserve!r}")
    if failure_probability is None:
        return math.log(2) - 3 * np.log(N)
    return math.log(_probability(failure_probability)) - _LOG_EVENTS[preserve](N)


def _log_bound(bound: str) -> Callable[[Floats, Floats], Floats]:
    if bound not in _LOG_BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(_LOG_BOUNDS)}, got {bound!r}")
    return _LOG_BOUNDS[bound]


def _reals(value: Any, name: str) -> Float[np.ndarray, "..."]:
    array = np.asarray(value)
    if array.dtype.kind not in "uif":
        raise TypeError(f"{name} must be real numbers, got {value!r}")
    return array.astype(np.float64)


def _samples(n_samples: Any) -> Float[np.ndarray, "..."]:
    N = _reals(n_samples, "n_samples")
    if not ((N >= 2) & (np.floor(N) == N) & np.isfinite(N)).all():
        raise ValueError(f"n_samples must be integers of at least 2, got {n_samples!r}")
    return N


def _epsilon(eps: Any) -> Float[np.ndarray, "..."]:
    epsilon = _reals(eps, "eps")
    if not ((epsilon > 0) & (epsilon < 1)).all():
        raise ValueError(f"eps must be between 0 and 1, both excluded, got {eps!r}")
    return epsilon


def _probability(value: Any) -> float:
    if not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
        raise ValueError(
            f"failure_probability must be None or a number between 0 and 1, got {value!r}"
        )
    return float(value)


def _components(value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"n_components must be an integer of at least 1, got {value!r}")
    return int(value)
