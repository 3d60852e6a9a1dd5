"""All distances between two collections of normal laws, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.gaussian.divergences import _bhattacharyya, _hellinger, _kl
from kexue.stats.gaussian.laws import (
    Array,
    Numbers,
    _check_choice,
    _covariance_batch,
    _Diagonal,
    _full_precision,
    _Law,
    _two_laws,
)
from kexue.stats.gaussian.transport import _wasserstein, _wasserstein_squared

__all__ = ["pairwise_distance"]

METRICS: dict[str, Callable[[Any, Any], Tensor]] = {
    "wasserstein": _wasserstein,
    "kl": _kl,
    "bhattacharyya": _bhattacharyya,
    "hellinger": _hellinger,
}


def pairwise_distance(
    means1: Real[Array, "n d"] | Numbers,
    covariances1: Real[Array, " n *shape1"] | Numbers,
    means2: Real[Array, "m d"] | Numbers | None = None,
    covariances2: Real[Array, " m *shape2"] | Numbers | None = None,
    *,
    metric: str = "wasserstein",
    covariance_type: str = "full",
    squared: bool = False,
) -> Float[Array, "n m_or_n"]:
    """Return the distance of every law of one collection to every law of another.

    Each covariance is factored once. Pairs are taken in tiles, so that less than 256 MB are needed
    beside the arguments and the result (more where a gradient is recorded, or where one pair of
    matrices alone exceeds it). Without a second collection the first is compared with itself: the
    diagonal is exactly 0, and symmetric distances are computed once for each pair.

    Parameters
    ----------
    means1 : array (n, d)
        Means of the first collection.
    covariances1 : array (n, d, d), (n, d) for "diag" or (n,) for "spherical"
        Its covariances.
    means2, covariances2 : array, optional
        The second collection, of m laws; the first by default.
    metric : {"wasserstein", "kl", "bhattacharyya", "hellinger"}
        The distance. For "kl", entry (i, j) is KL(i || j).
    covariance_type : {"full", "cholesky", "diag", "spherical"}
        See :func:`kl_divergence`.
    squared : bool
        Whether to return W2² for W2; no other metric heeds it.

    Returns
    -------
    array (n, m)
        Distances.

    Raises
    ------
    ValueError
        Where only one of ``means2`` and ``covariances2`` is given, the number of means and
        covariances differs, ``metric`` is unknown, or the distance refuses the laws.
    TypeError
        Where numpy and torch are mixed, or numbers are not in single or double precision.

    Examples
    --------
    >>> import numpy as np
    >>> means, covariances = np.array([[0.0], [3.0], [7.0]]), np.array([4.0, 25.0, 16.0])
    >>> pairwise_distance(means, covariances, covariance_type="spherical", squared=True)
    array([[ 0., 18., 53.],
           [18.,  0., 17.],
           [53., 17.,  0.]])
    """
    _check_choice("metric", metric, tuple(METRICS))
    if (means2 is None) != (covariances2 is None):
        given, missing = ("means2", "covariances2")[:: -1 if means2 is None else 1]
        raise ValueError(f"means2 and covariances2 belong together, got {given} without {missing}")
    with_itself = means2 is None
    first, second, as_given = _two_laws(
        covariance_type,
        (metric == "wasserstein",) * 2,
        means1=means1,
        covariances1=covariances1,
        **({} if with_itself else {"means2": means2, "covariances2": covariances2}),
    )
    for i, law in enumerate((first, second), start=1):
        batch = _covariance_batch(law)
        if law.mean.ndim != 2 or batch != law.mean.shape[:1]:
            raise ValueError(
                f"means{i} must have shape (n, d) and covariances{i} n entries, "
                f"got {tuple(law.mean.shape)} and leading dimensions {tuple(batch)}"
            )
    distance = METRICS[metric]
    if metric == "wasserstein" and squared:
        distance = _wasserstein_squared
    with _full_precision(first.mean):
        if not with_itself:
            return as_given(_tiled(distance, first, second, _tiles(first, second)))
        if metric == "kl":
            return as_given(_tiled(distance, first, first, _tiles(first, first)).fill_diagonal_(0))
        # Eight tiles a side leave little more than the upper half of the pairs.
        side = math.ceil(len(first.mean) / 8)
        upper = [(i, j) for i, j in _tiles(first, first, side) if i.start <= j.start]
        half = _tiled(distance, first, first, upper).triu(1)
        return as_given(half + half.mT)


def _tiled(
    distance: Callable[[Any, Any], Tensor],
    first: _Law,
    second: _Law,
    tiles: list[tuple[slice, slice]],
) -> Tensor:
    shape = len(first.mean), len(second.mean)
    result = first.mean.new_zeros(shape)
    for rows, columns in tiles:
        result[rows, columns] = distance(first.at(rows).at((slice(None), None)), second.at(columns))
    return result


def _tiles(first: _Law, second: _Law, largest: int | None = None) -> list[tuple[slice, slice]]:
    """Squares of pairs whose working memory stays within bounds."""
    entries = first.mean.shape[-1] ** (1 if isinstance(first, _Diagonal) else 2)
    pair_bytes = _WORKING_COPIES * entries * first.mean.element_size()
    working_bytes = _WORKING_BYTES.get(first.mean.device.type, _WORKING_BYTES["other"])
    side = max(1, math.isqrt(working_bytes // pair_bytes))
    side = min(side, largest or side)
    return [
        (rows, columns)
        for rows in _slices(len(first.mean), side)
        for columns in _slices(len(second.mean), side)
    ]


# What a pair needs at most, in matrices of its size: the hungriest formula, Bhattacharyya's, holds
# average, factor, difference, two solutions and the workspace of eigenvalues.
_WORKING_COPIES = 12
# On a CPU fresh pages cost more than the arithmetic in them, so tiles there are small.
_WORKING_BYTES = {"cpu": 32 * 2**20, "other": 192 * 2**20}


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, max(size, 1)))
