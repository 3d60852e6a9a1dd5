"""The graph of short steps, its islands, and the lengths of shortest ways."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer
from scipy.sparse import csr_array, issparse
from scipy.sparse.csgraph import connected_components, dijkstra

from kexue.retrieval.geodesic.metric import Corpus, as_vectors, check_metric, warn_of_cosine
from kexue.retrieval.geodesic.neighbors import BACKENDS, exact_neighbors, neighbors_within

__all__ = ["DisconnectedGraphError", "geodesic_distances", "knn_graph"]


class DisconnectedGraphError(ValueError):
    """Raised where the graph must be connected and falls into several components.

    Examples
    --------
    >>> from kexue.retrieval.geodesic import GeodesicIndex
    >>> pairs = [[0.0], [1.0], [10.0], [11.0]]
    >>> try:
    ...     GeodesicIndex(1, metric="euclidean", disconnected="error").fit(pairs)
    ... except DisconnectedGraphError as error:
    ...     print(str(error).split(";")[0])
    the neighbour graph has 2 connected components
    """


class Edges(NamedTuple):
    """Undirected edges, each once, with ``low < high``."""

    low: Int64[np.ndarray, " edges"]
    high: Int64[np.ndarray, " edges"]
    length: Float64[np.ndarray, " edges"]

    def within(self, radius: float | None) -> Edges:
        if radius is None:
            return self
        near = self.length <= radius
        return Edges(self.low[near], self.high[near], self.length[near])

    def joined(self, other: Edges) -> Edges:
        return Edges(*(np.concatenate(columns) for columns in zip(self, other, strict=True)))

    def graph(self, n: int) -> csr_array:
        """Both directions of every edge in one matrix, which is built once.

        Sums, maxima and conversions of sparse matrices drop entries that are 0, and those are the
        edges between duplicates.
        """
        source = np.concatenate([self.low, self.high])
        target = np.concatenate([self.high, self.low])
        length = np.concatenate([self.length, self.length])
        order = np.lexsort((target, source))
        starts = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=n))])
        # The routines of csgraph work on 32-bit indices and would convert at every call.
        kind = np.int32 if len(order) < 2**31 else np.int64
        return csr_array(
            (length[order], target[order].astype(kind), starts.astype(kind)), shape=(n, n)
        )


def edges_of(graph: csr_array) -> Edges:
    """The edges that a symmetric graph was built from."""
    source = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    upper = source < graph.indices
    return Edges(source[upper], graph.indices[upper].astype(np.int64), graph.data[upper])


def neighbor_edges(
    corpus: Corpus,
    k: int,
    *,
    mutual: bool,
    radius: float | None,
    backend: str,
    n_jobs: int | None = None,
    device: torch.device | str = "cpu",
) -> Edges:
    """Edges of the k-nearest-neighbour graph."""
    _, indices = neighbors_within(corpus, k, backend=backend, n_jobs=n_jobs, device=device)
    source = np.repeat(np.arange(len(corpus)), k)
    return _undirected(corpus, source, indices.ravel(), mutual=mutual).within(radius)


def edges_of_new_points(
    corpus: Corpus, n_old: int, k: int, *, mutual: bool, radius: float | None
) -> Edges:
    """Edges between the points from ``n_old`` on and their k nearest among all points."""
    source, target = _neighbor_pairs(corpus, np.arange(n_old, len(corpus)), k)
    if mutual:
        # The old neighbours' own neighbours may have changed by what is new.
        asked = np.unique(target[target < n_old])
        back, forth = _neighbor_pairs(corpus, asked, k)
        new = forth >= n_old
        source = np.concatenate([source, back[new]])
        target = np.concatenate([target, forth[new]])
    return _undirected(corpus, source, target, mutual=mutual).within(radius)


def bridges(corpus: Corpus, labels: Integer[np.ndarray, " n"]) -> Edges:
    """Edges of the shortest tree that joins components, after Borůvka.

    In every round each group but the largest picks the shortest edge that leaves it. Lengths, then
    indices, order all edges strictly, so that no two picks can close a circle.
    """
    found = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    groups = labels
    while (sizes := np.bincount(groups)).size > 1:
        asked = np.flatnonzero(groups != np.argmax(sizes))
        length, nearest = exact_neighbors(
            corpus.vectors[asked], corpus, 1, groups=groups[asked], corpus_groups=groups
        )
        low, high = np.minimum(asked, nearest[:, 0]), np.maximum(asked, nearest[:, 0])
        order = np.lexsort((high, low, length[:, 0]))
        _, first = np.unique(groups[asked][order], return_index=True)
        picked = order[first]
        pairs = np.unique(np.stack([low[picked], high[picked]], axis=1), axis=0)
        picks = Edges(pairs[:, 0], pairs[:, 1], corpus.lengths(pairs[:, 0], pairs[:, 1]))
        found = found.joined(picks)
        between = csr_array(
            (np.ones(len(pairs)), (groups[pairs[:, 0]], groups[pairs[:, 1]])),
            shape=(sizes.size, sizes.size),
        )
        groups = connected_components(between, directed=False)[1][groups]
    return found


def knn_graph(
    x: Any,
    *,
    n_neighbors: int = 15,
    metric: str = "angular",
    mutual: bool = False,
    radius: float | None = None,
    backend: str = "auto",
) -> csr_array:
    """Return the symmetric graph of every point's nearest neighbours, weighted by distance.

    Parameters
    ----------
    x : array of shape (n, features)
        Points, as numpy array, torch tensor on any device, or nested lists.
    n_neighbors : int
        Neighbours of each point, 1 to n - 1, the point itself not among them.
    metric : {"angular", "euclidean", "cosine"}
        The angle, the Euclidean distance, or 1 - cos, which is no metric and warns.
    mutual : bool
        Keep an edge only where each end is a neighbour of the other; by default one is enough.
    radius : float, optional
        Keep only edges of at most this length.
    backend : {"auto", "exact", "faiss", "sklearn"}
        What finds the neighbours; "auto" compares all pairs in double precision below 5000 points
        and for tensors on an accelerator, else asks faiss where installed, else scikit-learn.

    Returns
    -------
    scipy.sparse.csr_array of shape (n, n)
        Float64; duplicates are joined by stored zeros, which scipy.sparse.csgraph reads as edges of
        length 0.

    Raises
    ------
    ValueError
        For x that is not 2-D, not finite, or holds a zero vector where directions count; for
        arguments out of range.
    TypeError
        For x that holds no real numbers.
    ImportError
        Where faiss is asked for and missing.

    Examples
    --------
    >>> knn_graph([[0.0], [1.0], [3.0]], n_neighbors=1, metric="euclidean").toarray()
    array([[0., 1., 0.],
           [1., 0., 2.],
           [0., 2., 0.]])
    """
    check_options(n_neighbors, metric, mutual, radius, backend)
    corpus = Corpus(as_vectors(x, metric), metric)
    check_neighbors(n_neighbors, len(corpus))
    warn_of_cosine(metric, stacklevel=2)
    edges = neighbor_edges(
        corpus, n_neighbors, mutual=mutual, radius=radius, backend=backend, device=device_of(x)
    )
    return edges.graph(len(corpus))


def geodesic_distances(
    graph: Any, *, indices: Any = None, limit: float = math.inf
) -> Float64[np.ndarray, "..."]:
    """Return the lengths of the shortest ways from some nodes to all others.

    This is Dijkstra's search by :func:`scipy.sparse.csgraph.dijkstra`, for graphs whose stored
    zeros are edges of length 0.

    Parameters
    ----------
    graph : sparse array of shape (n, n)
        Entry (i, j) is the length of the edge from i to j, finite and not negative. A graph that is
        not symmetric is taken as directed.
    indices : int or array of int, optional
        Where to start; everywhere by default, which takes n² numbers.
    limit : float
        Ways that are longer count as none.

    Returns
    -------
    float64 array of shape (len(indices), n), or (n,) for a single int
        inf where there is no way.

    Raises
    ------
    TypeError
        For a graph that is not sparse: in a dense one, 0 cannot be both an edge and none.
    ValueError
        For a graph that is not square or has lengths below 0 or not finite, nodes that do not
        exist, a negative limit.

    Examples
    --------
    >>> graph = knn_graph([[0.0], [1.0], [3.0]], n_neighbors=1, metric="euclidean")
    >>> geodesic_distances(graph, indices=0)
    array([0., 1., 3.])
    """
    if not issparse(graph):
        raise TypeError(f"graph must be a scipy sparse array, got {type(graph).__name__}")
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1]:
        raise ValueError(f"graph must be square, got shape {graph.shape}")
    if graph.dtype.kind not in "buif":
        raise TypeError(f"graph must hold real lengths, got entries of {graph.dtype}")
    rows = graph.tocsr()
    if not np.all(np.isfinite(rows.data) & (rows.data >= 0)):
        raise ValueError("graph must hold lengths that are finite and not negative")
    if indices is None:
        nodes = None
    else:
        nodes = as_nodes(indices, rows.shape[0])
        nodes = nodes[0] if np.ndim(indices) == 0 else nodes
    return dijkstra(rows, directed=True, indices=nodes, limit=as_limit(limit))


def check_options(n_neighbors: Any, metric: Any, mutual: Any, radius: Any, backend: Any) -> None:
    """Refuse what is wrong whatever the data are."""
    check_metric(metric)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not isinstance(mutual, bool | np.bool_):
        raise TypeError(f"mutual must be True or False, got {mutual!r}")
    if as_integer(n_neighbors, "n_neighbors") < 1:
        raise ValueError(f"n_neighbors must be in [1, samples - 1], got {n_neighbors}")
    if radius is not None and not (isinstance(radius, int | float | np.number) and radius > 0):
        raise ValueError(f"radius must be a positive number or None, got {radius!r}")


def check_neighbors(n_neighbors: int, n: int) -> None:
    if n_neighbors > n - 1:
        raise ValueError(
            f"n_neighbors must be in [1, samples - 1] = [1, {n - 1}], got {n_neighbors} for "
            f"{n} samples"
        )


def as_integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def as_nodes(indices: Any, n: int) -> Int64[np.ndarray, " nodes"]:
    """Return node numbers as a 1-D array."""
    given = indices.detach().cpu().numpy() if torch.is_tensor(indices) else np.asarray(indices)
    if given.size and given.dtype.kind not in "ui":
        raise TypeError(f"indices must be integers, got {given.dtype}")
    nodes = np.atleast_1d(given).astype(np.int64)
    if nodes.ndim != 1:
        raise ValueError(f"indices must be a number or 1-D, got shape {given.shape}")
    outside = (nodes < 0) | (nodes >= n)
    if outside.any():
        raise ValueError(f"indices must be in [0, {n - 1}], got index {nodes[outside][0]}")
    return nodes


def as_limit(limit: Any) -> float:
    if not isinstance(limit, int | float | np.number) or not limit >= 0:
        raise ValueError(f"limit must be a number of at least 0, got {limit!r}")
    return float(limit)


def device_of(x: Any) -> torch.device | str:
    """Where to compare points: not every accelerator has double precision, CUDA does."""
    return x.device if torch.is_tensor(x) and x.is_cuda else "cpu"


def _neighbor_pairs(
    corpus: Corpus, points: Int64[np.ndarray, " m"], k: int
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Some points, and their k nearest other points."""
    _, indices = exact_neighbors(
        corpus.vectors[points], corpus, k, groups=points, corpus_groups=np.arange(len(corpus))
    )
    return np.repeat(points, k), indices.ravel()


def _undirected(
    corpus: Corpus,
    source: Integer[np.ndarray, " pairs"],
    target: Integer[np.ndarray, " pairs"],
    *,
    mutual: bool,
) -> Edges:
    """Pairs that appear in one direction, or in both, as edges with their lengths."""
    n = len(corpus)
    pair = np.minimum(source, target) * n + np.maximum(source, target)
    pairs, directions = np.unique(pair, return_counts=True)
    if mutual:
        pairs = pairs[directions == 2]
    low, high = np.divmod(pairs, n)
    return Edges(low, high, corpus.lengths(low, high))
