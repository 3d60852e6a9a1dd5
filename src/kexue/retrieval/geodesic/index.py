"""An index of points that answers by distances along their neighbour graph."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from sklearn.exceptions import NotFittedError

from kexue._files import replacing
from kexue.retrieval.geodesic.graph import (
    DisconnectedGraphError,
    Edges,
    as_integer,
    as_limit,
    as_nodes,
    bridges,
    check_neighbors,
    check_options,
    device_of,
    edges_of,
    edges_of_new_points,
    neighbor_edges,
)
from kexue.retrieval.geodesic.metric import Corpus, as_vectors, pair_lengths, warn_of_cosine
from kexue.retrieval.geodesic.neighbors import exact_neighbors
from kexue.retrieval.geodesic.search import (
    Entries,
    GeodesicPath,
    NeighborResult,
    distances_from_entries,
    nearest_from_entries,
    shortest_path,
)

__all__ = ["GeodesicIndex", "summarize"]

_DISCONNECTED = ("infinite", "bridge", "error")
_FORMAT = "kexue geodesic index 1"


class GeodesicIndex:
    """Points, the graph of their nearest neighbours, and shortest ways through it.

    The number of neighbours decides everything: it must stay below the number of points that are
    close in truth, because a single edge across, a short circuit, undoes all far distances.

    Parameters
    ----------
    n_neighbors : int
        Neighbours of each point, 1 to samples - 1, the point itself not among them.
    radius : float, optional
        Keep only edges of at most this length, those of queries included.
    metric : {"angular", "euclidean", "cosine"}
        The local distance: the angle in radians, the Euclidean one, or 1 - cos, which is no metric
        and warns at every ``fit``.
    mutual : bool
        Keep an edge only where each end is a neighbour of the other; by default one is enough.
    disconnected : {"infinite", "bridge", "error"}
        What becomes of a graph in several components: nothing, so that distances between them are
        inf; they are joined by the edges of the shortest tree; DisconnectedGraphError.
    backend : {"auto", "exact", "faiss", "sklearn"}
        What finds the neighbours in ``fit``; "auto" compares all pairs in double precision below
        5000 points and for tensors on an accelerator, else asks faiss where installed, else
        scikit-learn. Queries and added points are always compared with all points.
    n_jobs : int, optional
        Threads that faiss or scikit-learn may use in ``fit``, -1 for all.

    Attributes
    ----------
    graph_ : scipy.sparse.csr_array of shape (samples, samples)
        Symmetric, float64, bridges included; stored zeros join duplicates.
    n_components_ : int
        Connected components of ``graph_``.
    component_labels_ : int array of shape (samples,)
        The component of each point.

    Raises
    ------
    ValueError
        For arguments out of range; from all methods: for points or queries that are not 2-D, not
        finite, of another width, or zero where directions count.
    TypeError
        For arguments or arrays of a wrong kind.

    Examples
    --------
    Three points of a line and one that arrives later; way beyond the last, a query enters through
    it:

    >>> index = GeodesicIndex(1, metric="euclidean").fit([[0.0], [1.0], [2.5]])
    >>> index.add([[4.5]]).distances([[5.0]])
    array([[5. , 4. , 2.5, 0.5]])
    """

    graph_: csr_array
    n_components_: int
    component_labels_: Int64[np.ndarray, " samples"]

    def __init__(
        self,
        n_neighbors: int = 15,
        *,
        radius: float | None = None,
        metric: str = "angular",
        mutual: bool = False,
        disconnected: str = "infinite",
        backend: str = "auto",
        n_jobs: int | None = None,
    ) -> None:
        check_options(n_neighbors, metric, mutual, radius, backend)
        if disconnected not in _DISCONNECTED:
            raise ValueError(
                f"disconnected must be one of {', '.join(_DISCONNECTED)}, got {disconnected!r}"
            )
        if n_jobs is not None and as_integer(n_jobs, "n_jobs") == 0:
            raise ValueError("n_jobs must be None or an integer other than 0, got 0")
        self.n_neighbors = as_integer(n_neighbors, "n_neighbors")
        self.radius = None if radius is None else float(radius)
        self.metric = metric
        self.mutual = bool(mutual)
        self.disconnected = disconnected
        self.backend = backend
        self.n_jobs = None if n_jobs is None else as_integer(n_jobs, "n_jobs")

    def fit(self, x: Any) -> GeodesicIndex:
        """Build the graph of the points ``x`` (samples, features): numpy, torch or nested lists.

        Raises ImportError where faiss is asked for and missing, and DisconnectedGraphError where
        the graph falls apart and must not.
        """
        corpus = Corpus(as_vectors(x, self.metric), self.metric)
        check_neighbors(self.n_neighbors, len(corpus))
        warn_of_cosine(self.metric, stacklevel=2)
        edges = neighbor_edges(
            corpus,
            self.n_neighbors,
            mutual=self.mutual,
            radius=self.radius,
            backend=self.backend,
            n_jobs=self.n_jobs,
            device=device_of(x),
        )
        return self._take(corpus, edges)

    def add(self, x: Any) -> GeodesicIndex:
        """Append points, each joined to its nearest among all points, old and new.

        Old edges stay, bridges among them, so no distance between old points grows.
        """
        old = self._fitted()
        new = as_vectors(x, self.metric, features=old.vectors.shape[1])
        if not len(new):
            return self
        corpus = old.extended(new)
        edges = edges_of_new_points(
            corpus, len(old), self.n_neighbors, mutual=self.mutual, radius=self.radius
        )
        return self._take(corpus, edges_of(self.graph_).joined(edges))

    def distances(
        self, queries: Any = None, *, indices: Any = None, limit: float = math.inf
    ) -> Float64[np.ndarray, "queries samples"]:
        """Return distances along the graph to all points.

        ``queries`` (queries, features) enter through their own nearest neighbours, each by itself;
        ``indices`` are points of the index. What is above ``limit`` or out of reach is inf.
        """
        self._fitted()
        if (queries is None) == (indices is None):
            given = "neither" if queries is None else "both"
            raise ValueError(f"exactly one of queries and indices must be given, got {given}")
        limit = as_limit(limit)
        if indices is not None:
            nodes = as_nodes(indices, self.graph_.shape[0])
            if not len(nodes):
                return np.empty((0, self.graph_.shape[0]))
            return dijkstra(self.graph_, directed=True, indices=nodes, limit=limit)
        return distances_from_entries(self.graph_, self._entries(queries), limit)

    def nearest(self, queries: Any, k: int) -> NeighborResult:
        """Return the k points nearest to each query along the graph, ties by lower index.

        The search ends with the k-th point, so that its cost depends on k and not on the number of
        points. Where fewer than k can be reached, places hold -1 and inf.
        """
        self._fitted()
        if as_integer(k, "k") < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return nearest_from_entries(self.graph_, self._entries(queries), as_integer(k, "k"))

    def path(self, source: int, target: int) -> GeodesicPath:
        """Return a shortest way from one point of the index to another."""
        self._fitted()
        n = self.graph_.shape[0]
        for name, node in (("source", source), ("target", target)):
            if not 0 <= as_integer(node, name) < n:
                raise ValueError(f"{name} must be an index in [0, {n - 1}], got {node}")
        return shortest_path(self.graph_, int(source), int(target))

    def scores(self, center: Any) -> Float64[np.ndarray, " samples"]:
        """Return 1/G of every point for one vector: inf at distance 0, 0 where out of reach."""
        self._fitted()
        entries = self._entries(_as_row(center), name="center")
        if len(entries.nodes) != 1:
            raise ValueError(f"center must be one vector, got {len(entries.nodes)}")
        with np.errstate(divide="ignore", over="ignore"):
            return 1 / distances_from_entries(self.graph_, entries, math.inf)[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a file, whole or not at all: what stood there stays until then."""
        corpus = self._fitted()
        options = {
            name: getattr(self, name)
            for name in (
                "n_neighbors", "radius", "metric", "mutual", "disconnected", "backend", "n_jobs",
            )
        }  # fmt: skip
        edges = edges_of(self.graph_)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                options=np.array(json.dumps(options)),
                vectors=corpus.vectors,
                low=edges.low,
                high=edges.high,
                length=edges.length,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GeodesicIndex:
        """Read an index that ``save`` has written; ValueError where the file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"its format is {str(file['format'])!r}")
                index = cls(**json.loads(str(file["options"])))
                corpus = Corpus(file["vectors"], index.metric)
                edges = Edges(file["low"], file["high"], file["length"])
            _check_loaded(corpus, edges)
        except FileNotFoundError:
            raise
        except (
            AttributeError, EOFError, IndexError, KeyError, MemoryError, NotImplementedError,
            OSError, RuntimeError, SyntaxError, TypeError, ValueError, zipfile.BadZipFile,
            zlib.error,
        ) as error:  # fmt: skip
            raise ValueError(f"{os.fspath(path)} is no complete geodesic index: {error}") from error
        return index._set(corpus, edges.graph(len(corpus)))

    def _fitted(self) -> Corpus:
        if not hasattr(self, "_corpus"):
            raise NotFittedError("the index has no points yet: call fit first")
        return self._corpus

    def _entries(self, queries: Any, *, name: str = "queries") -> Entries:
        features = self._corpus.vectors.shape[1]
        vectors = as_vectors(queries, self.metric, features=features, name=name)
        return Entries(*exact_neighbors(vectors, self._corpus, self.n_neighbors)).within(
            self.radius
        )

    def _take(self, corpus: Corpus, edges: Edges) -> GeodesicIndex:
        """Deal with islands, then become an index of these points."""
        graph = edges.graph(len(corpus))
        n_components, labels = connected_components(graph, directed=False)
        if n_components > 1 and self.disconnected == "error":
            raise DisconnectedGraphError(
                f"the neighbour graph has {n_components} connected components; take more "
                "neighbours, a larger radius, or disconnected='bridge'"
            )
        if n_components > 1 and self.disconnected == "bridge":
            graph = edges.joined(bridges(corpus, labels)).graph(len(corpus))
        return self._set(corpus, graph)

    def _set(self, corpus: Corpus, graph: csr_array) -> GeodesicIndex:
        self._corpus = corpus
        self.graph_ = graph
        n_components, self.component_labels_ = connected_components(graph, directed=False)
        self.n_components_ = int(n_components)
        return self


def summarize(
    index: GeodesicIndex, center: Any, *, n_sentences: int, min_distance: float = 0.0
) -> Int64[np.ndarray, " chosen"]:
    """Return the points that stand for a theme, best first, without repetitions.

    Parameters
    ----------
    index : GeodesicIndex
        Of the sentences' vectors.
    center : array of shape (features,) or (1, features)
        The theme: the mean of the vectors of all sentences, or of those about an aspect.
    n_sentences : int
        How many to take at most.
    min_distance : float
        A sentence closer than this, by the local metric, to one already taken is passed over.

    Returns
    -------
    int64 array
        Indices by decreasing score 1/G, ties by lower index; fewer than ``n_sentences`` where the
        others are too close or cannot be reached.

    Raises
    ------
    ValueError
        For a center that is no vector of the index's width, n_sentences below 1, a min_distance
        that is negative or NaN.
    TypeError
        For arguments of a wrong kind.

    Examples
    --------
    >>> index = GeodesicIndex(2, metric="euclidean").fit([[0.0], [0.1], [1.0], [2.5]])
    >>> summarize(index, [0.1], n_sentences=2, min_distance=0.5)
    array([1, 2])
    """
    if not isinstance(index, GeodesicIndex):
        raise TypeError(f"index must be a GeodesicIndex, got {type(index).__name__}")
    if as_integer(n_sentences, "n_sentences") < 1:
        raise ValueError(f"n_sentences must be at least 1, got {n_sentences}")
    if not isinstance(min_distance, int | float | np.number) or not min_distance >= 0:
        raise ValueError(f"min_distance must be a number of at least 0, got {min_distance!r}")
    scores = index.scores(center)
    vectors = index._corpus.vectors
    taken = np.empty(0, np.int64)
    for point in np.argsort(-scores, kind="stable"):
        if len(taken) == n_sentences or scores[point] == 0:
            break
        itself = np.full(len(taken), point)
        apart = pair_lengths(vectors, itself, vectors, taken, index.metric)
        if np.all(apart >= min_distance):
            taken = np.append(taken, point)
    return taken


def _as_row(center: Any) -> Any:
    """A vector of shape (features,) as the only row of a matrix."""
    row = center if hasattr(center, "ndim") else np.asarray(center)
    return row[None] if row.ndim == 1 else row


def _check_loaded(corpus: Corpus, edges: Edges) -> None:
    """Refuse arrays that no index has: a file may be made by anyone."""
    vectors = corpus.vectors
    if vectors.dtype != np.float64 or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError("its vectors are no finite matrix")
    if not all(column.ndim == 1 and len(column) == len(edges.low) for column in edges):
        raise ValueError("its edges are incomplete")
    if edges.low.dtype != np.int64 or edges.high.dtype != np.int64:
        raise ValueError("its edges have no integer ends")
    if (
        np.any(edges.low < 0)
        or np.any(edges.low >= edges.high)
        or (np.any(edges.high >= len(vectors)))
    ):
        raise ValueError("its edges lead to points that it lacks")
    if edges.length.dtype != np.float64 or not np.all(
        np.isfinite(edges.length) & (edges.length >= 0)
    ):
        raise ValueError("its edges have no lengths")
