"""Kernels, their bandwidths, and kernel matrices that are evaluated where they are looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array, is_torch_array
from jaxtyping import Shaped
from scipy.spatial.distance import cdist, pdist

from kexue._precision import without_autocast

__all__ = ["kernel_matrix", "median_bandwidth"]

Array: TypeAlias = Any  # numpy or torch
Kernel: TypeAlias = str | Callable[[Array, Array], Array]

_METRICS = {"gaussian": "euclidean", "laplacian": "cityblock"}
_KERNELS = ("gaussian", "laplacian", "linear", "delta", "distance", "precomputed")
# Up to here, as for single rows and columns, distances are sums of squared differences: these lose
# no digits to an outlier.
_FEW_FEATURES = 8
_SYMMETRY = 1e-8


def median_bandwidth(
    x: Shaped[Array, "*batch n d"] | Shaped[Array, " n"] | Sequence[Any],
    *,
    kernel: str = "gaussian",
    max_samples: int = 1000,
    random_state: Any = None,
) -> float:
    r"""Return the median distance of all pairs, the usual bandwidth when nothing is known.

    The median of :math:`\|x_i - x_j\|` over i < j; of the sum of absolute differences for the
    laplacian kernel.

    Parameters
    ----------
    x : array, shape (n,) or (..., n, d)
        Samples; one-dimensional input is n scalars. Of a batch, the pairs within each entry count,
        all together.
    kernel : {"gaussian", "laplacian"}
        The kernel that the bandwidth is for.
    max_samples : int
        Where there are more samples than this (in a batch, more pairs than those of so many), as
        many are drawn without replacement.
    random_state : None, int or numpy Generator
        Source of that draw.

    Returns
    -------
    float
        In the units of ``x``. A constant for autograd.

    Raises
    ------
    ValueError
        If there are fewer than two samples or a number that is not finite, if the median is 0, or
        for an unknown kernel.
    TypeError
        If ``x`` is complex or no array of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> median_bandwidth(np.array([0.0, 1.0, 2.0, 4.0, 7.0, 11.0]))
    4.0
    """
    if kernel not in _METRICS:
        raise ValueError(f"kernel must be one of {', '.join(_METRICS)}, got {kernel!r}")
    max_samples = _integer(max_samples, "max_samples", 2)
    return _median_distance(_samples(x, "x", kernel), "x", kernel, max_samples, random_state)


@without_autocast
def kernel_matrix(
    x: Shaped[Array, "*batch n d"] | Shaped[Array, " n"] | Sequence[Any],
    y: Shaped[Array, "*batch m d"] | Shaped[Array, " m"] | Sequence[Any] | None = None,
    *,
    kernel: Kernel = "gaussian",
    bandwidth: float | str = "median",
) -> Shaped[Array, "*batch n m"]:
    r"""Return the kernel of every sample of ``x`` with every sample of ``y``.

    With the bandwidth σ: gaussian :math:`e^{-\|x-x'\|^2/(2\sigma^2)}`, laplacian
    :math:`e^{-\|x-x'\|_1/\sigma}`, linear :math:`x^\top x'`, delta :math:`1[x = x']`, distance
    :math:`\frac12(\|x\| + \|x'\| - \|x-x'\|)`.

    Parameters
    ----------
    x : array, shape (n,) or (..., n, d)
        Samples; one-dimensional input is n scalars.
    y : array, shape (m,) or (..., m, d), optional
        Other samples; ``x`` itself by default.
    kernel : {"gaussian", "laplacian", "linear", "delta", "distance", "precomputed"} or callable
        A callable takes samples (a, d) and (b, d) and returns (a, b). With ``"precomputed"``,
        ``x`` is the symmetric matrix, which comes back checked.
    bandwidth : float or "median"
        σ; by default the median distance within ``x``. Other kernels ignore it.

    Returns
    -------
    array, shape (..., n, m)
        In the dtype of ``x``, float64 for integers.

    Raises
    ------
    ValueError
        If shapes do not match, a number is not finite, the bandwidth is not positive, the kernel is
        unknown, or a precomputed matrix is not square or not symmetric.
    TypeError
        If an array is complex or no array of numbers, or numpy and torch are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> kernel_matrix(np.array([0.0, 2.0]), kernel="gaussian", bandwidth=2.0).round(4)
    array([[1.    , 0.6065],
           [0.6065, 1.    ]])
    """
    _check_kernel(kernel, "kernel")
    a = _samples(x, "x", kernel)
    xp = array_namespace(a)
    if y is not None and kernel == "precomputed":
        raise ValueError("a precomputed kernel matrix is one of x with itself, got y as well")
    b = a if y is None else _samples(y, "y", kernel)
    _check_same_kind(a, b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"x and y must have the same number of features, got {a.shape[-1]} and {b.shape[-1]}"
        )
    if kernel == "precomputed":
        return a.clone() if is_torch_array(a) else a.copy()
    if a.dtype != b.dtype:
        common = xp.result_type(a, b)
        a, b = xp.astype(a, common), xp.astype(b, common)
    if kernel == "gaussian":
        middle = xp.mean(_constant(a), axis=-2, keepdims=True)
        a, b = a - middle, b - middle
    sigma = _bandwidth(a, "x", kernel, bandwidth, "bandwidth")
    if sigma is not None:
        a, b = a / sigma, b / sigma
    values = _evaluate(kernel, a, b, same=y is None)
    return xp.astype(values, _result_dtype(xp, x), copy=False)


_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class _Gram:
    """The kernel matrix of a sample with itself, evaluated block by block."""

    points: Array
    """Samples (..., n, d) in units of the bandwidth; the matrix itself where it is precomputed."""
    kernel: Kernel
    bandwidth: float | None = None

    @property
    def xp(self) -> Any:
        return array_namespace(self.points)

    @property
    def n(self) -> int:
        return int(self.points.shape[-2])

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.points.shape[:-2])

    def block(self, rows: Any, columns: Any) -> Array:
        """Rows and columns by slice or index array; the same object for both means the diagonal."""
        if self.kernel == "precomputed":
            return self.points[..., rows, :][..., columns]
        a = self.points[..., rows, :]
        if rows is columns:
            return _evaluate(self.kernel, a, a, same=True)
        return _evaluate(self.kernel, a, self.points[..., columns, :])

    def diagonal(self) -> Array:
        xp, x = self.xp, self.points
        if self.kernel in ("gaussian", "laplacian", "delta"):
            return xp.ones(x.shape[:-1], dtype=xp.float64, device=device(x))
        if self.kernel == "precomputed":
            values = xp.linalg.diagonal(x)
        elif self.kernel == "linear":
            values = xp.sum(x * x, axis=-1)
        elif self.kernel == "distance":
            values = xp.linalg.vector_norm(x, axis=-1)
        else:
            one_by_one = [self.block(slice(i, i + 1), slice(i, i + 1)) for i in range(self.n)]
            values = xp.concat(one_by_one, axis=-1)[..., 0, :]
        return xp.astype(values, xp.float64, copy=False)

    def evaluated(self) -> _Gram:
        """The same with the whole matrix in memory, if its kernel needs evaluation."""
        if self.kernel == "precomputed":
            return self
        return _Gram(self.block(_ALL, _ALL), "precomputed", self.bandwidth)


def _gram(x: Any, name: str, kernel: Kernel, bandwidth: Any, *, exact: bool = False) -> _Gram:
    """Check a sample and its kernel; ``exact`` takes it to float64, outside of autograd.

    The sample is moved to the origin, which changes none of the centred kernel matrices and saves
    digits.
    """
    _check_kernel(kernel, f"kernel_{name}")
    points = _samples(x, name, kernel)
    xp = array_namespace(points)
    sigma = _bandwidth(points, name, kernel, bandwidth, f"bandwidth_{name}")
    if kernel in ("gaussian", "laplacian", "linear", "distance"):
        # A constant for autograd, since nothing that comes out depends on it.
        points = points - xp.mean(_constant(points), axis=-2, keepdims=True)
    if sigma is not None:
        points = points / sigma
    return _Gram(points, kernel, sigma)


def _evaluate(kernel: Kernel, a: Array, b: Array, *, same: bool = False) -> Array:
    """Kernel of samples in units of the bandwidth; ``same`` where ``a`` is ``b``."""
    if not isinstance(kernel, str):
        return _called(kernel, a, b)
    xp = array_namespace(a)
    if kernel == "gaussian":
        return _gaussian(a, b, same)
    if kernel == "laplacian":
        return xp.exp(-_distances(a, b, "cityblock"))
    if kernel == "linear":
        return a @ xp.matrix_transpose(b)
    if kernel == "distance":
        length_a, length_b = (xp.linalg.vector_norm(v, axis=-1) for v in (a, b))
        lengths = length_a[..., :, None] + length_b[..., None, :]
        return (lengths - _distances(a, b, "euclidean")) / 2
    equal = a[..., :, None, 0] == b[..., None, :, 0]
    for feature in range(1, a.shape[-1]):
        equal = equal & (a[..., :, None, feature] == b[..., None, :, feature])
    return xp.astype(equal, xp.float64)


def _gaussian(a: Array, b: Array, same: bool) -> Array:
    xp = array_namespace(a)
    if a.shape[-1] <= _FEW_FEATURES or 1 in (a.shape[-2], b.shape[-2]):
        return xp.exp(_distances(a, b, "sqeuclidean") / -2)
    # -|a - b|²/2 as one product: (a, -|a|²/2, 1) with (b, 1, -|b|²/2).
    half_a, half_b = (xp.sum(v * v, axis=-1, keepdims=True) / -2 for v in (a, b))
    left = xp.concat([a, half_a, xp.ones_like(half_a)], axis=-1)
    right = xp.concat([b, xp.ones_like(half_b), half_b], axis=-1)
    exponent = xp.clip(left @ xp.matrix_transpose(right), None, 0.0)
    if same:
        diagonal = xp.eye(a.shape[-2], dtype=xp.bool, device=device(a))
        exponent = xp.where(diagonal, xp.zeros_like(exponent), exponent)
    return xp.exp(exponent)


def _distances(a: Array, b: Array, metric: str) -> Array:
    """Distances from coordinate differences: exactly 0, with gradient 0, where points coincide."""
    if is_torch_array(a):
        import torch

        p = 1.0 if metric == "cityblock" else 2.0
        d = torch.cdist(a, b, p=p, compute_mode="donot_use_mm_for_euclid_dist")
        return d**2 if metric == "sqeuclidean" else d
    if a.ndim == 2:
        return cdist(a, b, metric)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    distances = np.empty((*batch, a.shape[-2], b.shape[-2]))
    for i in np.ndindex(batch):
        distances[i] = cdist(a[i], b[i], metric)
    return distances


def _called(kernel: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    xp = array_namespace(a)
    shape = (*a.shape[:-1], b.shape[-2])
    if a.ndim == 2:
        values = kernel(a, b)
    else:
        one_by_one = [kernel(a[i], b[i]) for i in np.ndindex(*a.shape[:-2])]
        values = xp.reshape(xp.stack(one_by_one), shape) if one_by_one else xp.zeros(shape)
    if is_torch_array(values) != is_torch_array(a) or tuple(getattr(values, "shape", ())) != shape:
        raise ValueError(
            f"a kernel must return an array of the kind that it got, of shape {shape}, got "
            f"{type(values).__name__} of shape {tuple(getattr(values, 'shape', ()))}"
        )
    return values


def _bandwidth(points: Array, name: str, kernel: Kernel, bandwidth: Any, what: str) -> float | None:
    """The bandwidth as a number, None for kernels without one."""
    if not isinstance(kernel, str) or kernel not in _METRICS:
        return None
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(f"{what} must be 'median' or a positive number, got {bandwidth!r}")
        return _median_distance(points, name, kernel, 1000, 0)
    sigma = float(bandwidth)
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"{what} must be 'median' or a positive number, got {bandwidth!r}")
    return sigma


def _median_distance(
    points: Array, name: str, kernel: str, max_samples: int, random_state: Any
) -> float:
    if is_torch_array(points):
        points = points.detach().cpu().numpy()
    *batch, n, d = points.shape
    entries = math.prod(batch)
    if n < 2 or entries == 0:
        raise ValueError(
            f"a median distance needs at least 2 samples, got {name} of shape {points.shape}"
        )
    if entries * n**2 > max_samples**2:
        per_entry = max(2, min(n, math.isqrt(max_samples**2 // entries)))
        chosen = np.random.default_rng(random_state).choice(n, per_entry, replace=False)
        points = points[..., np.sort(chosen), :]
    entry_points = points.astype(np.float64).reshape(entries, -1, d)
    # In units of the largest number, whose square may be none.
    peak = float(np.abs(entry_points).max()) or 1.0
    distances = [pdist(entry / peak, _METRICS[kernel]) for entry in entry_points]
    median = peak * float(np.median(np.concatenate(distances)))
    if not math.isfinite(median):
        raise ValueError(f"the median distance of {name} must be finite, got {median}")
    if not median > 0:
        raise ValueError(
            f"the median distance of {name} is 0, because more than half of the pairs coincide; "
            "give a bandwidth, or take the delta kernel for categories"
        )
    return median


def _constant(x: Array) -> Array:
    return x.detach() if is_torch_array(x) else x


def _samples(x: Any, name: str, kernel: Kernel) -> Array:
    """The samples as finite numbers (..., n, d), or the precomputed matrix."""
    x = _array(x)
    xp = array_namespace(x)
    numeric = not is_numpy_array(x) or x.dtype.kind in "buif"
    if not numeric or xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"{name} must hold real numbers, got an array of {x.dtype}")
    x = xp.astype(x, _working_dtype(xp, x.dtype, kernel), copy=False)
    shape = tuple(x.shape)
    if kernel == "precomputed":
        _check_precomputed(x, name)
    elif x.ndim == 0 or shape[-1] == 0:
        raise ValueError(f"{name} must have shape (n,) or (..., n, d) with d >= 1, got {shape}")
    elif x.ndim == 1:
        x = x[:, None]
    if xp.isdtype(x.dtype, "real floating"):
        broken = int(xp.count_nonzero(~xp.isfinite(_constant(x))))
        if broken:
            raise ValueError(f"{name} must be finite, got {broken} values that are NaN or infinite")
    return x


def _array(x: Any) -> Array:
    return x if is_numpy_array(x) or is_torch_array(x) else np.asarray(x)


def _working_dtype(xp: Any, given: Any, kernel: Kernel) -> Any:
    """Single precision for half and single, double for the rest; labels are left alone."""
    if not xp.isdtype(given, "real floating"):
        # A float64 would take long integer identifiers for one another.
        return xp.int64 if kernel == "delta" else xp.float64
    return xp.float32 if xp.finfo(given).bits <= 32 else xp.float64


def _result_dtype(xp: Any, *given: Any) -> Any:
    """The dtype of the floating ones among what was given, float64 if there are none."""
    dtypes = [a.dtype for a in given if is_numpy_array(a) or is_torch_array(a)]
    floating = [dtype for dtype in dtypes if xp.isdtype(dtype, "real floating")]
    return xp.result_type(*floating) if floating else xp.float64


def _check_precomputed(matrix: Array, name: str) -> None:
    shape = tuple(matrix.shape)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"a precomputed kernel {name} must have shape (n, n), got {shape}")
    xp = array_namespace(matrix)
    if 0 in shape:
        return
    values = _constant(matrix)
    largest = float(xp.max(xp.abs(values)))
    asymmetry = float(xp.max(xp.abs(values - xp.matrix_transpose(values))))
    if asymmetry > _SYMMETRY * largest:
        raise ValueError(
            f"a precomputed kernel {name} must be symmetric, got entries that differ from their "
            f"mirror image by up to {asymmetry:.3g}"
        )


def _check_kernel(kernel: Any, what: str) -> None:
    if callable(kernel) or kernel in _KERNELS:
        return
    raise ValueError(f"{what} must be one of {', '.join(_KERNELS)} or a callable, got {kernel!r}")


def _check_same_kind(x: Array, y: Array) -> None:
    if is_torch_array(x) != is_torch_array(y):
        kinds = " and ".join("torch" if is_torch_array(v) else "numpy" for v in (x, y))
        raise TypeError(f"x and y must both be numpy or both be torch, got {kinds}")
    if device(x) != device(y):
        raise ValueError(f"x and y must be on the same device, got {device(x)} and {device(y)}")


def _integer(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
