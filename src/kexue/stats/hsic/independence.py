"""The test of independence: permutations or a gamma law for tr(KHLH)/n."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import is_torch_array
from jaxtyping import Float, Shaped
from scipy.linalg.lapack import dpstrf
from scipy.special import gammaincc

from kexue._precision import without_autocast
from kexue.stats.hsic.estimators import _blocks, _centred_trace, _pair, _Sums, _sums, _upper
from kexue.stats.hsic.kernels import (
    _KERNELS,
    Array,
    Kernel,
    _array,
    _check_same_kind,
    _Gram,
    _integer,
)

__all__ = ["HSICTestResult", "hsic_test"]

_METHODS = ("permutation", "gamma")
# Below, the first two moments say too little of the null law's tail.
_GAMMA_LEAST = 50
_TIE = 1e-12
# Relative errors of the trace: what a factor has to reach, and where rounding begins.
_TRACE = 1e-13
_NOISE = 4 * np.finfo(np.float64).eps
# A permutation costs 2·rank·rank·n in the product of the factors, n² look-ups without them.
_WORTH = 16
_POSITIVE = 1e-9
# Bytes: of permuted factors at a time, and of a kernel matrix that is kept to be looked up.
_CHUNK = 2**26
_LOOKED_UP = 2**30
# A stripe of a kernel matrix of a few thousand samples stays in the processor's cache.
_STRIPE = 64

Vector: TypeAlias = Float[np.ndarray, " _"]
Matrix: TypeAlias = Float[np.ndarray, "_ _"]


@dataclass(frozen=True, eq=False)
class HSICTestResult:
    """Outcome of a test of independence.

    Attributes
    ----------
    statistic : float
        tr(KHLH)/n.
    pvalue : float
        Probability of a statistic at least as large under independence.
    method : str
        ``"permutation"`` or ``"gamma"``.
    null_distribution : ndarray or None
        Statistics of the permuted samples, (n_permutations,).
    bandwidth_x, bandwidth_y : float or None
        The bandwidths that were used; None for kernels without one.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(60) % 3
    >>> result = hsic_test(x, x * x, kernel_x="delta", bandwidth_y=1.0, random_state=0)
    >>> result.pvalue, result.bandwidth_x, result.bandwidth_y
    (0.001, None, 1.0)
    """

    statistic: float
    pvalue: float
    method: str
    null_distribution: Float[np.ndarray, " n_permutations"] | None
    bandwidth_x: float | None
    bandwidth_y: float | None


@without_autocast
def hsic_test(
    x: Shaped[Array, "n dx"] | Shaped[Array, " n"] | Sequence[Any],
    y: Shaped[Array, "n dy"] | Shaped[Array, " n"] | Sequence[Any],
    *,
    kernel_x: Kernel = "gaussian",
    kernel_y: Kernel = "gaussian",
    bandwidth_x: float | str = "median",
    bandwidth_y: float | str = "median",
    method: str = "permutation",
    n_permutations: int = 999,
    random_state: Any = None,
    block_size: int | None = None,
) -> HSICTestResult:
    r"""Test whether paired samples are independent.

    ``"permutation"`` pairs x with y at random and counts statistics that are at least as large,
    :math:`p = (1 + \#\{T_\pi \ge T\})/(1 + \text{n_permutations})`: valid for any kernel and any
    number of samples. Where the centred kernel matrices have low rank (smooth kernels of few
    dimensions, linear kernels, categories) they are factored once, and no matrix is ever permuted.
    ``"gamma"`` compares with the gamma law of the same mean and variance as the null law: faster
    for kernels of high rank, approximate, and not for fewer than 50 samples.

    Everything is computed by numpy in float64, and without gradient.

    Parameters
    ----------
    x : array, shape (n,) or (n, dx)
        At least 6 samples, numpy or torch; one-dimensional input is n scalars.
    y : array, shape (n,) or (n, dy)
        As many samples, paired with those of ``x``.
    kernel_x, kernel_y : str or callable
        See :func:`kernel_matrix`. Take ``"delta"`` for categories.
    bandwidth_x, bandwidth_y : float or "median"
        See :func:`median_bandwidth`. A gaussian kernel of the median bandwidth is blind to what
        oscillates faster.
    method : {"permutation", "gamma"}
        Where the p-value comes from.
    n_permutations : int
        Number of permutations; the smallest p-value is 1/(n_permutations + 1).
    random_state : None, int or numpy Generator
        Source of the permutations; the same whatever the block size.
    block_size : int, optional
        See :func:`hsic`. It bounds memory, except that permutations of kernels of high rank are
        looked up in one whole matrix where that takes less than a gigabyte, and cost a
        kernel evaluation each where it does not.

    Returns
    -------
    HSICTestResult
        Statistic, p-value, null distribution and bandwidths.

    Raises
    ------
    ValueError
        If the numbers of samples differ or are below 6, there is a batch dimension, a number is not
        finite, a bandwidth is not positive or a median 0, a kernel or method is unknown, a
        precomputed matrix is not symmetric, or ``n_permutations`` is below 1.
    TypeError
        If an array is complex or no array of numbers, or numpy and torch are mixed.

    Examples
    --------
    Noise whose size depends on x, but not its mean:

    >>> import numpy as np
    >>> x, noise = np.random.default_rng(0).standard_normal((2, 200))
    >>> result = hsic_test(x, x * noise, random_state=0)
    >>> result.pvalue, bool(abs(np.corrcoef(x, x * noise)[0, 1]) < 0.2)
    (0.001, True)
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    n_permutations = _integer(n_permutations, "n_permutations", 1)
    x, y = _array(x), _array(y)
    _check_same_kind(x, y)
    kernels = _in_numpy(kernel_x, x), _in_numpy(kernel_y, y)
    gram_x, gram_y = _pair(_as_numpy(x), _as_numpy(y), kernels, (bandwidth_x, bandwidth_y), least=6)
    if gram_x.batch or gram_y.batch:
        raise ValueError(
            "a test takes one sample of shape (n,) or (n, d) on each side, got batch dimensions "
            f"{gram_x.batch} and {gram_y.batch}"
        )
    blocks = _blocks(gram_x, gram_y, block_size)
    null = None
    if method == "gamma":
        statistic, pvalue = _gamma_test(gram_x, gram_y, blocks)
    else:
        statistic, null = _permuted_statistics(
            gram_x, gram_y, blocks, n_permutations, np.random.default_rng(random_state)
        )
        reached = int(np.count_nonzero(null >= statistic - _TIE * abs(statistic)))
        pvalue = (1 + reached) / (1 + n_permutations)
    return HSICTestResult(statistic, pvalue, method, null, gram_x.bandwidth, gram_y.bandwidth)


def _gamma_test(gram_x: _Gram, gram_y: _Gram, blocks: list[slice]) -> tuple[float, float]:
    """The statistic, and its tail under the gamma law with the null law's mean and variance."""
    n = gram_x.n
    if n < _GAMMA_LEAST:
        warnings.warn(
            f"the gamma law is an approximation for n >= {_GAMMA_LEAST}, and n is {n}: "
            "take method='permutation'",
            UserWarning,
            stacklevel=3,
        )
    sums = _sums(gram_x, gram_y, diagonal=True, block_size=blocks[0].stop)
    statistic = float(_centred_trace(n, sums.xy, sums.rows_x, sums.rows_y)) / n
    mean, variance = _null_moments(gram_x, gram_y, sums, blocks)
    if not (mean > 0 and variance > 0):
        # One side is constant: every pairing gives the same statistic.
        return statistic, 1.0
    shape, scale = mean**2 / variance, n * variance / mean
    return statistic, float(gammaincc(shape, max(statistic, 0.0) / scale))


def _null_moments(
    gram_x: _Gram, gram_y: _Gram, sums: _Sums, blocks: list[slice]
) -> tuple[float, float]:
    """Mean and variance of tr(KHLH)/n² under independence."""
    n = gram_x.n
    mean = _excess_of_diagonal(gram_x, sums.rows_x) * _excess_of_diagonal(gram_y, sums.rows_y) / n
    centred_x, centred_y = _Centred(gram_x, sums.rows_x), _Centred(gram_y, sums.rows_y)
    squares = 0.0
    for i, j in _upper(len(blocks)):
        product = centred_x.block(blocks[i], blocks[j]) * centred_y.block(blocks[i], blocks[j])
        if i == j:
            np.fill_diagonal(product, 0.0)
        squares += (1 if i == j else 2) * float(np.vdot(product, product))
    # The paper's formula for this mean lacks the number of pairs.
    mean_square = squares / (n * (n - 1))
    finite = (n - 4) * (n - 5) / (n * (n - 1) * (n - 2) * (n - 3))
    return mean, 2 * finite * mean_square


def _excess_of_diagonal(gram: _Gram, row_sums: Vector) -> float:
    """Mean diagonal entry less mean off-diagonal entry."""
    n, trace = gram.n, float(np.sum(gram.diagonal()))
    return trace / n - (float(np.sum(row_sums)) - trace) / (n * (n - 1))


class _Centred:
    """The kernel matrix with the means of its rows and columns taken away, HKH, in blocks."""

    def __init__(self, gram: _Gram, row_sums: Vector) -> None:
        self._gram = gram
        self._means = row_sums / gram.n
        self._mean = np.mean(self._means)

    def block(self, rows: slice, columns: slice) -> Matrix:
        means = self._means[rows, None] + (self._means[columns] - self._mean)
        return self._gram.block(rows, columns) - means


def _permuted_statistics(
    gram_x: _Gram,
    gram_y: _Gram,
    blocks: list[slice],
    n_permutations: int,
    rng: np.random.Generator,
) -> tuple[float, Float[np.ndarray, " n_permutations"]]:
    """The statistic, and those with y permuted, all of them rounded alike."""
    n = gram_x.n
    orders = itertools.chain([np.arange(n)], (rng.permutation(n) for _ in range(n_permutations)))
    factors = _factors(gram_x, gram_y, blocks)
    if factors is None:
        values = _statistics_of_matrices(gram_x, gram_y, blocks, np.stack(list(orders)))
    else:
        values = _statistics_of_factors(*factors, orders)
    return float(values[0]), values[1:]


def _statistics_of_factors(a: Matrix, b: Matrix, orders: Iterator[np.ndarray]) -> Vector:
    """|AᵀB[π]|²/n for each order, a stack of them in one product."""
    # Permuting one side is permuting the other one back; the thinner one is moved.
    invert = a.shape[1] < b.shape[1]
    if invert:
        a, b = b, a
    (n, rank_a), rank_b = a.shape, b.shape[1]
    at_a_time = max(1, _CHUNK // (8 * n * max(rank_b, 1)))
    values = []
    while stack := list(itertools.islice(orders, at_a_time)):
        order = np.stack(stack, axis=1)
        if invert:
            order = np.argsort(order, axis=0)
        product = a.T @ b[order].reshape(n, len(stack) * rank_b)
        squares = product.reshape(rank_a, len(stack), rank_b) ** 2
        values.append(np.sum(squares, axis=(0, 2)) / n)
    return np.concatenate(values)


def _statistics_of_matrices(
    gram_x: _Gram, gram_y: _Gram, blocks: list[slice], orders: np.ndarray
) -> Vector:
    """tr(HKH·PLPᵀ)/n for each order, by looking up L in stripes from the diagonal to the right."""
    n = gram_x.n
    sums = _sums(gram_x, gram_y, diagonal=True, block_size=blocks[0].stop)
    centred = _Centred(gram_x, sums.rows_x)
    if 8 * n**2 <= _LOOKED_UP:
        gram_y = gram_y.evaluated()
    values = np.zeros(len(orders))
    for start in range(0, n, _STRIPE):
        stop = min(start + _STRIPE, n)
        stripe = centred.block(slice(start, stop), slice(start, n))
        stripe[:, stop - start :] *= 2
        for m, order in enumerate(orders):
            values[m] += np.vdot(stripe, _looked_up(gram_y, order[start:stop], order[start:]))
    return values / n


def _looked_up(gram: _Gram, rows: np.ndarray, columns: np.ndarray) -> Matrix:
    if gram.kernel == "precomputed":
        return np.take(gram.points[rows], columns, axis=1)
    return gram.block(rows, columns)


def _factors(gram_x: _Gram, gram_y: _Gram, blocks: list[slice]) -> tuple[Matrix, Matrix] | None:
    """A and B with HKH = AAᵀ and HLH = BBᵀ, None where they are too wide to be of use."""
    n = gram_x.n
    a, b = (_thin_factor(gram, math.isqrt(_WORTH * n)) for gram in (gram_x, gram_y))
    if 8 * n**2 <= _LOOKED_UP:
        # One side may be wide where the other one is all the thinner.
        if a is None and b is not None:
            a = _wide_factor(gram_x)
        elif b is None and a is not None:
            b = _wide_factor(gram_y)
    if a is None or b is None or a.shape[1] * b.shape[1] > _WORTH * n:
        return None
    if not (_is_factor(a, gram_x, blocks) and _is_factor(b, gram_y, blocks)):
        return None
    return a - np.mean(a, axis=0), b - np.mean(b, axis=0)


def _thin_factor(gram: _Gram, most: int) -> Matrix | None:
    """Pivoted Cholesky, column by column; None if it takes more than ``most`` of them."""
    n, most = gram.n, min(most, gram.n)
    residual = gram.diagonal()
    noise = _NOISE * float(np.max(residual))
    columns = np.zeros((most + 1, n))
    centred_trace = 0.0
    for rank in range(most + 1):
        pivot = int(np.argmax(residual))
        if residual[pivot] <= noise or np.sum(residual) <= _TRACE * centred_trace:
            return columns[:rank].T
        column = gram.block(slice(None), slice(pivot, pivot + 1))[:, 0]
        column = column - columns[:rank, pivot] @ columns[:rank]
        columns[rank] = column / math.sqrt(residual[pivot])
        residual = np.maximum(residual - columns[rank] ** 2, 0.0)
        residual[pivot] = 0.0
        centred_trace += n * float(np.var(columns[rank]))
    return None


def _wide_factor(gram: _Gram) -> Matrix:
    """Pivoted Cholesky of the whole matrix, down to its rounding errors."""
    matrix = gram.evaluated().points
    noise = _NOISE * float(np.max(np.abs(np.diagonal(matrix))))
    lower, order, rank, _ = dpstrf(matrix, lower=1, tol=noise)
    factor = np.empty((gram.n, rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return factor


def _is_factor(factor: Matrix, gram: _Gram, blocks: list[slice]) -> bool:
    """Whether FFᵀ is the kernel matrix: a kernel from outside need not be positive.

    The diagonal, which is all that the factorisation sees, does not tell; the product with a random
    vector does.
    """
    if gram.kernel in _KERNELS and gram.kernel != "precomputed":
        return True
    vector = np.random.default_rng(0).standard_normal(gram.n)
    exact = [sum(gram.block(rows, columns) @ vector[columns] for columns in blocks)
             for rows in blocks]  # fmt: skip
    error = np.concatenate(exact) - factor @ (factor.T @ vector)
    return float(np.linalg.norm(error)) <= _POSITIVE * float(np.linalg.norm(gram.diagonal()))


def _as_numpy(x: Array) -> np.ndarray:
    """The sample as numpy sees it, floating numbers in double precision."""
    if is_torch_array(x):
        x = x.detach().cpu()
        x = (x.double() if x.is_floating_point() else x).numpy()
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def _in_numpy(kernel: Kernel, x: Array) -> Kernel:
    """A kernel for numpy; a callable keeps seeing tensors where the sample was one."""
    if isinstance(kernel, str) or not callable(kernel) or not is_torch_array(x):
        return kernel
    import torch

    def of_arrays(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            values = kernel(*(torch.from_numpy(v).to(x.device) for v in (a, b)))
        return values.cpu().numpy()

    return of_arrays
