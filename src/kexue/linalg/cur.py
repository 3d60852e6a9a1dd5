r"""Low-rank factorisation of a matrix by some of its own columns and rows (CUR, skeleton).

With columns U and rows V of a matrix S,

.. math::
    S \approx S_{:,U}\, G\, S_{V,:}, \qquad
    G = (S_{V,U})^+ \quad\text{or}\quad G = (S_{:,U})^+\, S\, (S_{V,:})^+ .

The first core sees the chosen rows and columns only, and is exact if and only if their intersection
has the rank of S. The second needs all of S and is the best one in Frobenius norm. The factors are
columns and rows of S itself: as sparse, as positive, as readable as S is, and they need no new
function where the entries of S are a function of its row and its column.

References
----------
Su Jianlin, "利用CUR分解加速交互式相似度模型的检索": the core as a pseudoinverse. Mahoney and
Drineas, "CUR matrix decompositions for improved data analysis" (2009): leverage scores. Sorensen
and Embree, arXiv 1407.5516: DEIM.

Examples
--------
>>> import numpy as np
>>> rank_two = np.outer([1.0, 2, 3], [1, 1, 2, 0]) + np.outer([0.0, 1, 1], [0, 1, 1, 5])
>>> cur = cur_decomposition(rank_two, n_columns=2, n_rows=2)
>>> bool(np.allclose(cur.reconstruct(), rank_two))
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, is_torch_array
from jaxtyping import Float, Integer, Real

from kexue._precision import without_autocast

__all__ = ["CURDecomposition", "cur_decomposition", "leverage_scores", "select_columns"]

Selection: TypeAlias = Literal["qr", "leverage", "norm", "uniform", "deim"]
Core: TypeAlias = Literal["intersection", "optimal"]

# numpy or torch; jaxtyping checks shape and kind of number, the functions check the rest.
Array: TypeAlias = Any
Matrix: TypeAlias = Real[Array, "*batch m n"] | Sequence[Any]
Indices: TypeAlias = Integer[Array, "*#batch n_chosen"] | Sequence[Any]
RandomState: TypeAlias = int | np.random.Generator | None


@dataclass(frozen=True)
class CURDecomposition:
    """A matrix as columns times core times rows.

    Attributes
    ----------
    columns : array (..., m, c)
        The chosen columns.
    core : array (..., c, r)
        What joins them.
    rows : array (..., r, n)
        The chosen rows.
    column_indices, row_indices : array of int64 (..., c) and (..., r)
        Where they stand in the matrix.

    Examples
    --------
    >>> import numpy as np
    >>> cur = cur_decomposition(np.diag([3.0, 2.0, 1.0]), n_columns=2, n_rows=2)
    >>> cur.column_indices, cur.core
    (array([0, 1]), array([[0.33333333, 0.        ],
           [0.        , 0.5       ]]))
    """

    columns: Array
    core: Array
    rows: Array
    column_indices: Array
    row_indices: Array

    @without_autocast
    def reconstruct(self) -> Float[Array, "*batch m n"]:
        """Return columns @ core @ rows."""
        return self.columns @ self.core @ self.rows


def leverage_scores(a: Matrix, rank: int, *, axis: int = -1) -> Float[Array, "*batch size"]:
    r"""Return how much each column, or row, weighs in the leading singular directions.

    With the singular value decomposition :math:`A = \sum_k \sigma_k u_k v_k^\top`, column j has the
    score :math:`\sum_{k \le \text{rank}} v_{kj}^2`: the squared length of the j-th coordinate axis
    inside the space of the leading right singular vectors.

    Parameters
    ----------
    a : array (..., m, n)
        The matrix. Half precision is computed in single, integers and lists in double.
    rank : int
        Number of singular directions, 1 to min(m, n).
    axis : {-1, -2}
        -1 for columns, -2 for rows.

    Returns
    -------
    array (..., n) or (..., m)
        Scores in [0, 1] that add up to ``rank``. Their gradients need distinct singular values.

    Raises
    ------
    TypeError
        Where ``a`` holds no real numbers.
    ValueError
        Where ``a`` is no finite matrix, or rank or axis is out of its range.

    Examples
    --------
    >>> leverage_scores([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]], rank=2).round(3)
    array([1. , 0.5, 0.5])
    """
    xp, dtype, a = _matrix(a)
    if axis not in (-1, -2):
        raise ValueError(f"axis must be -1 (columns) or -2 (rows), got {axis!r}")
    if axis == -2:
        a = xp.matrix_transpose(a)
    return xp.astype(_leverage(xp, a, _rank(rank, a)), dtype, copy=False)


@without_autocast
def select_columns(
    a: Matrix,
    n: int,
    *,
    selection: Selection = "qr",
    rank: int | None = None,
    random_state: RandomState = None,
) -> Integer[Array, "*batch n_chosen"]:
    """Choose n columns of a matrix, no column twice.

    ============  ==================================================================================
    selection     columns
    ============  ==================================================================================
    ``qr``        greedily the one farthest from the span of those before (pivoted QR, in its order)
    ``deim``      where the interpolation of the next right singular vector errs most
    ``leverage``  drawn with probability proportional to :func:`leverage_scores`
    ``norm``      drawn with probability proportional to squared lengths
    ``uniform``   drawn with equal probability
    ============  ==================================================================================

    Drawing is without replacement. Columns that have probability 0, or lie in the span of those
    before up to rounding, come last.

    Parameters
    ----------
    a : array (..., m, n_columns)
        The matrix; its transpose for choosing rows.
    n : int
        Number of columns, 1 to n_columns; for ``deim`` at most m.
    selection : {"qr", "leverage", "norm", "uniform", "deim"}
        How they are chosen.
    rank : int, optional
        Number of singular directions behind the leverage scores; min(n, m) by default. The other
        selections do not depend on it.
    random_state : int or numpy.random.Generator, optional
        Source of the draws, which are the same for every matrix of a batch.

    Returns
    -------
    array of int64 (..., n)
        Indices in the order of choice, without gradient.

    Raises
    ------
    TypeError
        Where ``a`` holds no real numbers, or a count is not an integer.
    ValueError
        Where ``a`` is no finite matrix, n or rank is out of its range, or the selection is unknown.

    Examples
    --------
    >>> select_columns([[1.0, 1.0, 0.0], [0.0, 0.1, 0.5]], 2)
    array([1, 2])
    """
    xp, _, a = _matrix(a)
    a = a.detach() if is_torch_array(a) else a
    m, size = a.shape[-2:]
    n = _count("n", n, size)
    if rank is not None:
        rank = _rank(rank, a)
    if selection == "qr":
        return _pivots(xp, a, n)
    if selection == "deim":
        _, _, v = xp.linalg.svd(a, full_matrices=False)
        return _interpolation_points(xp, v[..., : _count("n for selection 'deim'", n, m), :])
    if selection == "leverage":
        return _drawn(xp, _leverage(xp, a, rank or min(n, m)), n, random_state)
    if selection == "norm":
        return _drawn(xp, xp.sum(_scaled(xp, a) ** 2, axis=-2), n, random_state)
    if selection == "uniform":
        return _drawn(xp, xp.ones_like(a[..., 0, :]), n, random_state)
    raise ValueError(f"selection must be one of {_either(Selection)}, got {selection!r}")


@without_autocast
def cur_decomposition(
    a: Matrix,
    *,
    n_columns: int | None = None,
    n_rows: int | None = None,
    column_indices: Indices | None = None,
    row_indices: Indices | None = None,
    selection: Selection = "qr",
    core: Core = "intersection",
    rcond: float | None = None,
    random_state: RandomState = None,
) -> CURDecomposition:
    """Factorise a matrix by some of its columns and some of its rows.

    Parameters
    ----------
    a : array (..., m, n)
        The matrix.
    n_columns, n_rows : int, optional
        How many to choose, see :func:`select_columns`.
    column_indices, row_indices : array of int (..., c) and (..., r), optional
        Given ones instead, for all matrices or for each; repetitions are harmless. Exactly one of
        ``n_columns`` and ``column_indices`` is needed, and of ``n_rows`` and ``row_indices``.
    selection : {"qr", "leverage", "norm", "uniform", "deim"}
        How columns and rows are chosen.
    core : {"intersection", "optimal"}
        Pseudoinverse of the intersection, which is all that can be had where the other entries are
        unknown; or the best core for these columns and rows.
    rcond : float, optional
        Singular values up to ``rcond`` times the largest one count as 0 in a pseudoinverse. By
        default the larger dimension of what is inverted, max(c, r) for the intersection, times the
        precision of the numbers. Where entries are no better than approximately of low rank and c
        is close to r, the intersection needs far more, 1e-2 say: its smallest singular values are
        noise.
    random_state : int or numpy.random.Generator, optional
        Source of the draws, first for columns and then for rows.

    Returns
    -------
    CURDecomposition
        Of the kind and dtype of ``a``. Differentiable in its entries for fixed indices; gradients
        take what a pseudoinverse cuts off for 0, as it is where only rounding is cut off.

    Raises
    ------
    TypeError
        Where ``a`` holds no real numbers, indices are no integers, or a count is not an integer.
    ValueError
        Where ``a`` is no finite matrix, both or none of number and indices are given for an axis,
        one of them or rcond is out of its range, or selection or core is unknown.

    Examples
    --------
    >>> hilbert = [[1 / (i + j + 1) for j in range(8)] for i in range(6)]
    >>> cur = cur_decomposition(hilbert, column_indices=[0, 3], row_indices=[1, 4])
    >>> cur.core.round(4)
    array([[ 5.5556, -8.8889],
           [-8.8889, 22.2222]])
    """
    xp, dtype, a = _matrix(a)
    transposed = xp.matrix_transpose(a)
    if core not in get_args(Core):
        raise ValueError(f"core must be one of {_either(Core)}, got {core!r}")
    if rcond is not None and not 0 <= rcond < 1:
        raise ValueError(f"rcond must be in [0, 1), got {rcond!r}")
    random = np.random.default_rng(random_state)
    of_columns = _indices(xp, a, "column", n_columns, column_indices, selection, random)
    of_rows = _indices(xp, transposed, "row", n_rows, row_indices, selection, random)

    columns = xp.matrix_transpose(_take(xp, transposed, of_columns))
    rows = _take(xp, a, of_rows)
    if core == "intersection":
        middle = _pseudoinverse(xp, _take(xp, columns, of_rows), rcond)
    else:
        middle = _pseudoinverse(xp, columns, rcond) @ a @ _pseudoinverse(xp, rows, rcond)
    columns, middle, rows = (
        xp.astype(factor, dtype, copy=False) for factor in (columns, middle, rows)
    )
    return CURDecomposition(columns, middle, rows, of_columns, of_rows)


def _pivots(xp: Any, a: Array, n: int) -> Array:
    """Order of the columns in a QR decomposition with column pivoting."""
    # A row for each column of a; scaling has made an array that may be changed in place.
    residual = _scaled(xp, xp.matrix_transpose(a))
    squares = xp.linalg.vecdot(residual, residual)
    # Below this a column lies in the span of the chosen ones, and only rounding is left of it.
    rounding = (xp.finfo(a.dtype).eps * max(a.shape[-2:])) ** 2 * xp.max(
        squares, axis=-1, keepdims=True
    )
    taken = xp.zeros_like(squares, dtype=xp.bool)
    chosen = []
    for _ in range(n):
        squares = xp.linalg.vecdot(residual, residual)
        squares = xp.where(squares > rounding, squares, 0.0)
        chosen.append(xp.argmax(xp.where(taken, -1.0, squares), axis=-1))
        taken = taken | _one_hot(xp, chosen[-1], like=squares)
        column = _take(xp, residual, chosen[-1][..., None])
        norm = xp.linalg.vector_norm(column, axis=-1, keepdims=True)
        direction = xp.where(norm > 0, column / xp.where(norm > 0, norm, 1.0), 0.0)
        residual -= (residual @ xp.matrix_transpose(direction)) * direction
    return xp.stack(chosen, axis=-1)


def _interpolation_points(xp: Any, v: Array) -> Array:
    """DEIM for the rows of v.

    Each vector is interpolated at the points so far by the vectors before it; the next point is
    where that errs most. Subtracting each interpolation as soon as its point is known is Gaussian
    elimination with partial pivoting.
    """
    chosen = []
    for k in range(v.shape[-2]):
        chosen.append(xp.argmax(xp.abs(v[..., k, :]), axis=-1))
        here = _one_hot(xp, chosen[-1], like=v[..., k, :])
        at_point = xp.sum(xp.where(here[..., None, :], v, 0.0), axis=-1)
        share = at_point / at_point[..., k, None]
        v = v - share[..., :, None] * v[..., k, None, :]
        # Zeros by construction; what rounding leaves there must not be chosen again.
        v = xp.where(here[..., None, :], 0.0, v)
    return xp.stack(chosen, axis=-1)


def _drawn(xp: Any, weights: Array, n: int, random_state: RandomState) -> Array:
    """n indices in the order of draws without replacement, in proportion to the weights.

    Of exponential variables with these rates each is the smallest with probability proportional to
    its rate, and so is the next among the others.
    """
    waiting = np.random.default_rng(random_state).standard_exponential(weights.shape[-1])
    waiting = xp.asarray(waiting, device=device(weights))
    weights = xp.astype(weights, waiting.dtype)
    possible = weights > 0
    times = xp.where(possible, waiting / xp.where(possible, weights, 1.0), math.inf)
    return xp.argsort(times, axis=-1, stable=True)[..., :n]


def _leverage(xp: Any, a: Array, rank: int) -> Array:
    _, _, v = xp.linalg.svd(a, full_matrices=False)
    return xp.sum(v[..., :rank, :] ** 2, axis=-2)


def _pseudoinverse(xp: Any, a: Array, rcond: float | None) -> Array:
    cut = max(a.shape[-2:]) * xp.finfo(a.dtype).eps if rcond is None else rcond
    return xp.linalg.pinv(a, rtol=cut)


def _take(xp: Any, a: Array, indices: Array) -> Array:
    """Rows of each matrix at the indices that belong to it."""
    batch = a.shape[:-2]
    flat = xp.reshape(a, (math.prod(batch), *a.shape[-2:]))
    which = xp.reshape(indices, (math.prod(batch), indices.shape[-1]))
    each = xp.arange(math.prod(batch), device=device(a))[:, None]
    return xp.reshape(flat[each, which], (*batch, indices.shape[-1], a.shape[-1]))


def _one_hot(xp: Any, index: Array, like: Array) -> Array:
    return xp.arange(like.shape[-1], device=device(like)) == index[..., None]


def _scaled(xp: Any, a: Array) -> Array:
    """The matrix with largest entry 1, so that squares stay in range."""
    peak = xp.max(xp.abs(a), axis=(-2, -1), keepdims=True)
    return a / xp.where(peak > 0, peak, 1.0)


def _matrix(a: Any) -> tuple[Any, Any, Array]:
    """The array library, the dtype of results, and the matrix in the dtype of the work."""
    a = a if is_array_api_obj(a) else np.asarray(a)
    if a.dtype == object or not array_namespace(a).isdtype(a.dtype, ("integral", "real floating")):
        raise TypeError(f"a must hold real numbers, got {a.dtype}")
    xp = array_namespace(a)
    if a.ndim < 2 or 0 in a.shape[-2:]:
        raise ValueError(f"a must have shape (..., m, n) with m, n >= 1, got {tuple(a.shape)}")
    dtype = a.dtype if xp.isdtype(a.dtype, "real floating") else xp.float64
    work = dtype if xp.finfo(dtype).bits >= 32 else xp.float32
    a = xp.astype(a, work, copy=False)
    if not bool(xp.all(xp.isfinite(a))):
        raise ValueError("a must be finite, got NaN or infinity")
    return xp, dtype, a


def _indices(
    xp: Any,
    a: Array,
    what: str,
    n: int | None,
    given: Any,
    selection: Selection,
    random: np.random.Generator,
) -> Array:
    """Indices of columns of a, chosen or given, for every matrix of the batch."""
    if (n is None) == (given is None):
        count = "none" if n is None else "both"
        raise ValueError(f"expected one of n_{what}s and {what}_indices, got {count}")
    size = a.shape[-1]
    if given is None:
        return select_columns(a, _count(f"n_{what}s", n, size), selection=selection,
                              random_state=random)  # fmt: skip
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {_either(Selection)}, got {selection!r}")
    name = f"{what}_indices"
    indices = given if is_array_api_obj(given) else np.asarray(given)
    if indices.dtype == object or not array_namespace(indices).isdtype(indices.dtype, "integral"):
        raise TypeError(f"{name} must be integers, got {indices.dtype}")
    if indices.ndim == 0 or indices.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., c), c >= 1, got {tuple(indices.shape)}")
    indices = xp.asarray(indices, dtype=xp.int64, device=device(a))
    if not bool(xp.all((indices >= 0) & (indices < size))):
        raise ValueError(f"{name} must lie in [0, {size - 1}], got {indices.tolist()}")
    shape = (*a.shape[:-2], indices.shape[-1])
    try:
        fits = np.broadcast_shapes(tuple(indices.shape), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must fit shape {shape}, got {tuple(indices.shape)}")
    # A copy: a broadcast view, or the caller's own array, is no result to hand out.
    return xp.asarray(xp.broadcast_to(indices, shape), copy=True)


def _rank(rank: Any, a: Array) -> int:
    return _count("rank", rank, min(a.shape[-2:]))


def _count(name: str, value: Any, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 1 <= value <= largest:
        raise ValueError(f"{name} must be in [1, {largest}], got {value}")
    return int(value)


def _either(names: Any) -> str:
    return ", ".join(get_args(names))
