"""What a projection did to all pairs of points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import scipy.sparse
from jaxtyping import Float

__all__ = ["DistortionSummary", "distortion"]

# Below this share of ‖x‖² + ‖y‖², a squared distance is computed from the difference itself:
# from the products it would have lost half of its digits.
_CLOSE = 1e-7
_CLOSE_AT_ONCE = 2**20


@dataclass(frozen=True)
class DistortionSummary:
    """How far distances and inner products moved under a projection.

    Attributes
    ----------
    n_pairs : int
        Number of pairs of different points.
    max_distance_error, mean_distance_error : float
        Of the squared distance, relative to what it was; over pairs of different points.
    max_inner_product_error : float
        Relative to the product of the lengths before; over pairs without a zero vector.

    Examples
    --------
    >>> distortion([[3.0, 0.0], [0.0, 4.0]], [[3.0], [3.0]])
    DistortionSummary(n_pairs=1, max_distance_error=1.0, mean_distance_error=1.0,
    max_inner_product_error=0.75)
    """

    n_pairs: int
    max_distance_error: float
    mean_distance_error: float
    max_inner_product_error: float


def distortion(X: Any, Z: Any, *, block_size: int = 1024) -> DistortionSummary:
    r"""Compare all distances and inner products of points before and after a projection.

    The distance error of a pair is :math:`|\|z_i-z_j\|^2 / \|x_i-x_j\|^2 - 1|`, the inner-product
    error :math:`|\langle z_i,z_j\rangle - \langle x_i,x_j\rangle| / (\|x_i\|\|x_j\|)`. Pairs are
    walked in blocks and computed in double precision.

    Parameters
    ----------
    X : array, sparse matrix or torch tensor (n_samples, n_features)
        The points.
    Z : array, sparse matrix or torch tensor (n_samples, n_components)
        Their projections.
    block_size : int
        Number of points in a block.

    Returns
    -------
    DistortionSummary
        Largest and mean errors; 0 where there is no pair to speak of.

    Raises
    ------
    ValueError
        Where X or Z is no matrix, holds NaN or infinity, both differ in their number of rows, or
        ``block_size`` is no integer of at least 1.
    TypeError
        Where X or Z does not hold real numbers.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((50, 8))
    >>> distortion(X, 2 * X).mean_distance_error
    3.0
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1, got {block_size!r}")
    X, Z = _points(X, "X"), _points(Z, "Z")
    if X.shape[0] != Z.shape[0]:
        raise ValueError(
            f"X and Z must have the same number of rows, got {X.shape[0]} and {Z.shape[0]}"
        )
    # One factor for both leaves all errors as they are, and squares within range.
    scale = max(float(abs(A).max()) if 0 not in A.shape else 0.0 for A in (X, Z)) or 1.0
    n_pairs, largest, total, largest_inner = 0, 0.0, 0.0, 0.0
    starts = range(0, X.shape[0], block_size)
    for i in starts:
        x, z = (_block(A, i, block_size, scale) for A in (X, Z))
        for j in range(i, X.shape[0], block_size):
            y, w = (x, z) if j == i else (_block(A, j, block_size, scale) for A in (X, Z))
            counted = np.triu(np.ones((len(x), len(y)), dtype=bool), k=1) if j == i else None
            before, different = _squared_distances(x, y, counted)
            after, _ = _squared_distances(z, w, counted)
            errors = np.abs(after[different] / before[different] - 1)
            n_pairs += errors.size
            total += float(errors.sum())
            largest = max(largest, float(errors.max(initial=0.0)))
            inner = _inner_errors(x, y, z, w)
            inner = inner if counted is None else inner[counted]
            largest_inner = max(largest_inner, float(inner.max(initial=0.0)))
    return DistortionSummary(n_pairs, largest, total / max(n_pairs, 1), largest_inner)


def _squared_distances(
    x: np.ndarray, y: np.ndarray, counted: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances, and where they are counted and not zero."""
    sizes = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    squared = sizes - 2 * (x @ y.T)
    close = squared <= _CLOSE * sizes
    if counted is not None:
        close &= counted
    rows, columns = np.nonzero(close)
    step = max(1, _CLOSE_AT_ONCE // max(1, x.shape[1]))
    for start in range(0, len(rows), step):
        r, c = rows[start : start + step], columns[start : start + step]
        squared[r, c] = ((x[r] - y[c]) ** 2).sum(axis=1)
    different = squared > 0
    return squared, different if counted is None else different & counted


def _inner_errors(x: np.ndarray, y: np.ndarray, z: np.ndarray, w: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    return np.divide(
        np.abs(z @ w.T - x @ y.T), lengths, out=np.zeros_like(lengths), where=lengths > 0
    )


def _points(A: Any, name: str) -> Any:
    if array_api_compat.is_torch_array(A):
        A = A.detach().cpu()
        A = (A.double() if A.is_floating_point() else A).numpy()
    elif not scipy.sparse.issparse(A):
        A = np.asarray(A)
    if A.dtype.kind not in "buif":
        raise TypeError(f"{name} must hold real numbers, got an array of {A.dtype}")
    if A.ndim != 2:
        raise ValueError(f"{name} must be a matrix with one row a point, got shape {A.shape}")
    if scipy.sparse.issparse(A):
        A = A.tocsr()
    if not np.isfinite(A.data if scipy.sparse.issparse(A) else A).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return A


def _block(A: Any, start: int, size: int, scale: float) -> Float[np.ndarray, "rows columns"]:
    rows = A[start : start + size]
    rows = rows.toarray() if scipy.sparse.issparse(rows) else rows
    return rows.astype(np.float64) / scale
