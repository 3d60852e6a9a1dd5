"""All pairs of many directions: what chance allows, and what given vectors do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
from jaxtyping import Shaped
from scipy.special import gammaincc

from kexue._precision import without_autocast
from kexue.stats.angles.law import RandomCosine, _integer, _reals

__all__ = [
    "CosineSummary",
    "OrthogonalityTestResult",
    "cosine_summary",
    "max_cosine_quantile",
    "max_vectors",
    "orthogonality_test",
]


@dataclass(frozen=True)
class CosineSummary:
    """What the cosines of all pairs i < j of a set of vectors look like.

    Attributes
    ----------
    n_vectors : int
        Number of vectors, N.
    dimension : int
        Number of their coordinates, d.
    n_pairs : int
        Number of pairs, N(N-1)/2.
    mean : float
        Mean cosine.
    mean_square : float
        Mean squared cosine; 1/d is expected of random directions.
    max_abs : float
        Largest absolute cosine, at most 1.
    effective_dimension : float
        1/mean_square: d for random directions, less where they crowd.

    Examples
    --------
    >>> cosine_summary([[1.0, 0.0], [3.0, 4.0]]).max_abs
    0.6
    """

    n_vectors: int
    dimension: int
    n_pairs: int
    mean: float
    mean_square: float
    max_abs: float
    effective_dimension: float


@dataclass(frozen=True)
class OrthogonalityTestResult:
    """Outcome of a test against random directions.

    Attributes
    ----------
    statistic : float
        z for ``"mean_square"``, the largest absolute cosine for ``"max"``, the modified Rayleigh
        statistic S* for ``"rayleigh"``.
    pvalue : float
        Probability of a statistic at least as large among random directions.
    method : str
        The test.
    summary : CosineSummary
        What the test has seen.

    Examples
    --------
    >>> result = orthogonality_test([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], method="max")
    >>> result.statistic, result.pvalue
    (1.0, 0.0)
    """

    statistic: float
    pvalue: float
    method: str
    summary: CosineSummary


@without_autocast
def cosine_summary(
    x: Shaped[Any, "n_vectors dimension"] | Sequence[Sequence[float]],
    *,
    block_size: int = 1024,
) -> CosineSummary:
    """Return mean, mean square and largest absolute value of the cosines of all pairs.

    The Gram matrix is walked in blocks, so that beyond ``x`` only a few arrays of
    ``block_size * max(block_size, dimension)`` numbers are held. Half and single precision input is
    multiplied in single precision, everything else in double; sums are double.

    Parameters
    ----------
    x : array or torch tensor (n_vectors, dimension)
        The vectors, of any length but 0. A tensor is worked on where it lies, without gradient.
    block_size : int
        Number of vectors in a block.

    Returns
    -------
    CosineSummary
        Statistics of the pairs i < j.

    Raises
    ------
    ValueError
        Where ``x`` has not two dimensions, fewer than two rows or columns, a row of zeros or a
        number that is not finite, or ``block_size`` is below 1.
    TypeError
        Where ``x`` is complex or no array of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.random.default_rng(0).standard_normal((2000, 64))
    >>> round(cosine_summary(rows).effective_dimension)
    64
    """
    block_size = _integer(block_size, "block_size", 1)
    x, xp = _vectors(x)
    n_vectors, dimension = x.shape
    blocks = [slice(start, start + block_size) for start in range(0, n_vectors, block_size)]
    precision = _precision(xp, x.dtype)
    peaks = xp.concat([xp.max(xp.abs(xp.astype(x[b, :], precision)), axis=1) for b in blocks])
    _check_rows(xp, peaks)

    resultant = self_products = squares = 0.0
    largest = xp.zeros_like(peaks[0])
    for i, these in enumerate(blocks):
        rows = _directions(xp, x[these, :], peaks[these])
        resultant = resultant + xp.sum(rows, axis=0, dtype=xp.float64)
        self_products = self_products + xp.sum(xp.linalg.vecdot(rows, rows), dtype=xp.float64)
        for those in blocks[i:]:
            cosines = rows @ xp.matrix_transpose(_directions(xp, x[those, :], peaks[those]))
            if those is these:
                cosines = xp.triu(cosines, k=1)
            squares = squares + xp.sum(xp.linalg.vecdot(cosines, cosines), dtype=xp.float64)
            largest = xp.maximum(largest, xp.max(xp.abs(cosines)))

    n_pairs = n_vectors * (n_vectors - 1) // 2
    # The cosines of all ordered pairs and of every vector with itself add up to |resultant|^2.
    mean = float(xp.sum(resultant**2) - self_products) / (2 * n_pairs)
    mean_square = float(squares) / n_pairs
    return CosineSummary(
        n_vectors=n_vectors,
        dimension=dimension,
        n_pairs=n_pairs,
        mean=mean,
        mean_square=mean_square,
        max_abs=min(float(largest), 1.0),
        effective_dimension=1 / mean_square if mean_square > 0 else math.inf,
    )


def orthogonality_test(
    x: Shaped[Any, "n_vectors dimension"] | Sequence[Sequence[float]],
    *,
    method: str = "mean_square",
    block_size: int = 1024,
) -> OrthogonalityTestResult:
    """Test whether vectors point in random directions, by the cosines of all pairs.

    Each method sees one kind of departure: ``"mean_square"`` (Bingham's) too much alignment with
    some axis, ``"rayleigh"`` a preferred direction, ``"max"`` a pair that is too close. A large
    p-value of one is no proof of isotropy.

    Parameters
    ----------
    x : array or torch tensor (n_vectors, dimension)
        The vectors, of any length but 0.
    method : {"mean_square", "max", "rayleigh"}
        The statistic. All tests are one-sided: large values speak against random directions.
    block_size : int
        Number of vectors in a block, see :func:`cosine_summary`.

    Returns
    -------
    OrthogonalityTestResult
        Statistic, p-value and the summary behind them.

    Raises
    ------
    ValueError
        Where ``method`` is unknown, or :func:`cosine_summary` refuses ``x``.
    TypeError
        Where ``x`` is complex or no array of numbers.

    Examples
    --------
    Normal vectors pass; the same vectors made non-negative do not:

    >>> import numpy as np
    >>> rows = np.random.default_rng(0).standard_normal((500, 30))
    >>> orthogonality_test(rows).pvalue > 0.01, orthogonality_test(abs(rows)).pvalue < 1e-10
    (True, True)
    """
    if method not in _TESTS:
        raise ValueError(f"method must be one of {', '.join(_TESTS)}, got {method!r}")
    summary = cosine_summary(x, block_size=block_size)
    statistic, pvalue = _TESTS[method](summary)
    return OrthogonalityTestResult(statistic, pvalue, method, summary)


def max_cosine_quantile(dimension: int, n_vectors: float, probability: float) -> float:
    r"""Return t such that all pairs of random directions stay below it with given probability.

    Pairs count as independent, :math:`P(\max|\eta| \le t) = P(|\eta| \le t)^{N(N-1)/2}`, which is
    what the Poisson (Chen-Stein) approximation comes to where exceeding t is rare.

    Parameters
    ----------
    dimension : int
        Dimension of the space, at least 2.
    n_vectors : int
        Number of directions, 2 to 1e150.
    probability : float
        In (0, 1).

    Returns
    -------
    float
        A cosine in (0, 1).

    Raises
    ------
    ValueError
        Where an argument is out of its range.

    Examples
    --------
    Among ten thousand random directions in 768 dimensions some pair reaches a cosine of 0.2:

    >>> round(max_cosine_quantile(768, 10_000, 0.5), 4)
    0.2028
    """
    dimension = _integer(dimension, "dimension", 2)
    n_vectors = _integer(n_vectors, "n_vectors", 2)
    if n_vectors > 1e150:
        raise ValueError(f"n_vectors must be at most 1e150, got {n_vectors!r}")
    n_pairs = n_vectors * (n_vectors - 1) / 2
    exceeds = -math.expm1(math.log(_probability(probability, "probability")) / n_pairs)
    return float(RandomCosine(dimension).isf(exceeds / 2))


def max_vectors(
    dimension: int,
    *,
    max_cosine: float,
    failure_probability: float = 0.5,
) -> float:
    r"""Return how many random directions fit below a cosine.

    The largest N with :math:`\frac{N(N-1)}{2} P(|\eta| > t) \le \delta`: by the union bound, all
    pairs of N random directions stay below t with probability 1 - δ or more.

    Parameters
    ----------
    dimension : int
        Dimension of the space, at least 2.
    max_cosine : float
        The bound t on the absolute cosine, in (0, 1).
    failure_probability : float
        δ, in (0, 1).

    Returns
    -------
    float
        A whole number, at least 1; inf where it exceeds the range of floats.

    Raises
    ------
    ValueError
        Where an argument is out of its range.

    Examples
    --------
    >>> max_vectors(768, max_cosine=0.2)
    6708.0
    """
    dimension = _integer(dimension, "dimension", 2)
    max_cosine = _probability(max_cosine, "max_cosine")
    delta = _probability(failure_probability, "failure_probability")
    log_exceeds = math.log(2) + float(RandomCosine(dimension).logsf(max_cosine))
    log_pairs = math.log(delta) - log_exceeds
    if log_pairs > 100:
        log_vectors = (math.log(2) + log_pairs) / 2
        return math.exp(log_vectors) if log_vectors < math.log(np.finfo(float).max) else math.inf
    pairs = math.exp(log_pairs)
    vectors = math.floor((1 + math.sqrt(1 + 8 * pairs)) / 2)
    return float(vectors)


def _mean_square_test(summary: CosineSummary) -> tuple[float, float]:
    """Bingham's: exact mean and variance, chi-square limit in N, normal limit in d."""
    d, n_pairs = summary.dimension, summary.n_pairs
    variance = 2 * (d - 1) / (d**2 * (d + 2))
    z = (summary.mean_square - 1 / d) * math.sqrt(n_pairs / variance)
    degrees = (d - 1) * (d + 2) / 2
    return z, _chi_square_sf(degrees + z * math.sqrt(2 * degrees), degrees)


def _max_test(summary: CosineSummary) -> tuple[float, float]:
    exceeds = 2 * RandomCosine(summary.dimension).sf(summary.max_abs)
    if exceeds >= 1:
        return summary.max_abs, 1.0
    return summary.max_abs, -math.expm1(summary.n_pairs * math.log1p(-exceeds))


def _rayleigh_test(summary: CosineSummary) -> tuple[float, float]:
    """Rayleigh's d N |mean direction|², corrected to order 1/N."""
    n, d = summary.n_vectors, summary.dimension
    s = max(d * (1 + (n - 1) * summary.mean), 0.0)
    corrected = (1 - 1 / (2 * n)) * s + s**2 / (2 * n * (d + 2))
    return corrected, _chi_square_sf(corrected, d)


_TESTS: dict[str, Callable[[CosineSummary], tuple[float, float]]] = {
    "mean_square": _mean_square_test,
    "max": _max_test,
    "rayleigh": _rayleigh_test,
}


def _chi_square_sf(x: float, degrees: float) -> float:
    return float(gammaincc(degrees / 2, max(x, 0.0) / 2))


def _probability(value: Any, name: str) -> float:
    number = _reals(value, name)
    if number.ndim or not 0 < number < 1:
        raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")
    return float(number)


def _vectors(x: Any) -> tuple[Any, Any]:
    """The matrix of vectors, and the array library it belongs to."""
    if array_api_compat.is_torch_array(x):
        x = x.detach()
    elif not array_api_compat.is_array_api_obj(x):
        x = np.asarray(x)
    if array_api_compat.is_numpy_array(x) and x.dtype.kind not in "buif":
        raise TypeError(f"x must hold real numbers, got an array of {x.dtype}")
    xp = array_api_compat.array_namespace(x)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x must hold real numbers, got an array of {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix (n_vectors, dimension), got shape {tuple(x.shape)}")
    if x.shape[0] < 2 or x.shape[1] < 2:
        raise ValueError(
            f"x must have at least 2 rows and 2 columns, got {x.shape[0]} rows and "
            f"{x.shape[1]} columns"
        )
    return x, xp


def _precision(xp: Any, given: Any) -> Any:
    """Single for half and single precision, double for everything else."""
    if xp.isdtype(given, "real floating") and xp.finfo(given).bits <= 32:
        return xp.float32
    return xp.float64


def _check_rows(xp: Any, peaks: Any) -> None:
    """Refuse rows by their largest absolute entries."""
    broken = int(xp.count_nonzero(~xp.isfinite(peaks)))
    if broken:
        raise ValueError(f"x must be finite, got NaN or infinity in {broken} rows")
    zero = int(xp.count_nonzero(peaks == 0))
    if zero:
        raise ValueError(f"every row of x must have a direction, got {zero} rows of zeros")


def _directions(xp: Any, rows: Any, peaks: Any) -> Any:
    """Rows of length 1, in the precision of the rows' largest absolute entries."""
    # Dividing by these first keeps squares of very long and very short rows in range.
    scaled = xp.astype(rows, peaks.dtype) / peaks[:, None]
    return scaled / xp.linalg.vector_norm(scaled, axis=1, keepdims=True)
