"""Searches in the graph: full, the first k, and single ways."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from kexue.retrieval.geodesic.metric import chunks

__all__ = ["GeodesicPath", "NeighborResult"]

_HEAP_UP_TO = 2_000
"""Beyond so many, the compiled search for all points is faster than ours for the first k."""


@dataclass(frozen=True)
class NeighborResult:
    """The geodesically nearest points of some queries, ascending.

    Attributes
    ----------
    distances : float64 array of shape (queries, k)
        inf where fewer than k points can be reached.
    indices : int64 array of shape (queries, k)
        -1 where fewer than k points can be reached.

    Examples
    --------
    >>> from kexue.retrieval.geodesic import GeodesicIndex
    >>> index = GeodesicIndex(1, metric="euclidean").fit([[0.0], [1.0], [3.0]])
    >>> index.nearest([[0.0]], k=2)
    NeighborResult(distances=array([[0., 1.]]), indices=array([[0, 1]]))
    """

    distances: Float64[np.ndarray, "queries k"]
    indices: Int64[np.ndarray, "queries k"]


@dataclass(frozen=True)
class GeodesicPath:
    """A shortest way between two points.

    Attributes
    ----------
    distance : float
        Its length; inf where there is no way.
    nodes : int64 array
        Points from source to target, both included; empty where there is no way.

    Examples
    --------
    >>> from kexue.retrieval.geodesic import GeodesicIndex
    >>> index = GeodesicIndex(1, metric="euclidean").fit([[0.0], [1.0], [3.0]])
    >>> index.path(0, 2)
    GeodesicPath(distance=3.0, nodes=array([0, 1, 2]))
    """

    distance: float
    nodes: Int64[np.ndarray, " nodes"]


@dataclass(frozen=True)
class Entries:
    """Edges by which queries enter the graph: -1 and inf where one has fewer."""

    lengths: Float64[np.ndarray, "queries k"]
    nodes: Int64[np.ndarray, "queries k"]

    def within(self, radius: float | None) -> Entries:
        if radius is None:
            return self
        far = self.lengths > radius
        return Entries(np.where(far, np.inf, self.lengths), np.where(far, -1, self.nodes))


def distances_from_entries(
    graph: csr_array, entries: Entries, limit: float
) -> Float64[np.ndarray, "queries n"]:
    """Lengths of shortest ways from queries to all nodes.

    Queries are rows below the graph's, with edges that lead out of them only: no way leads through
    one, so none can shorten another's.
    """
    m, n = len(entries.nodes), graph.shape[0]
    distances = np.empty((m, n))
    present = entries.nodes >= 0
    ends = graph.indptr[-1] + np.cumsum(present.sum(axis=1))
    extended = csr_array(
        (
            np.concatenate([graph.data, entries.lengths[present]]),
            np.concatenate([graph.indices, entries.nodes[present].astype(graph.indices.dtype)]),
            np.concatenate([graph.indptr, ends.astype(graph.indptr.dtype)]),
        ),
        shape=(n + m, n + m),
    )
    for part in chunks(m, 8 * (n + m)):
        sources = np.arange(n + part.start, n + part.stop)
        distances[part] = dijkstra(extended, directed=True, indices=sources, limit=limit)[:, :n]
    return distances


def nearest_from_entries(graph: csr_array, entries: Entries, k: int) -> NeighborResult:
    """The k nodes nearest to each query."""
    m, n = len(entries.nodes), graph.shape[0]
    distances, indices = np.full((m, k), np.inf), np.full((m, k), -1)
    for query in range(m):
        present = entries.nodes[query] >= 0
        if k <= _HEAP_UP_TO:
            first = _first_nodes(
                graph, entries.lengths[query, present], entries.nodes[query, present], k
            )
        else:
            one = Entries(entries.lengths[query : query + 1], entries.nodes[query : query + 1])
            everywhere = distances_from_entries(graph, one, math.inf)[0]
            order = np.lexsort((np.arange(n), everywhere))[:k]
            first = [(everywhere[i], i) for i in order if everywhere[i] < math.inf]
        if first:
            distances[query, : len(first)], indices[query, : len(first)] = zip(*first, strict=True)
    return NeighborResult(distances, indices)


def _first_nodes(
    graph: csr_array,
    lengths: Float64[np.ndarray, " entries"],
    nodes: Int64[np.ndarray, " entries"],
    k: int,
) -> list[tuple[float, int]]:
    """Dijkstra's search that ends when the k nearest nodes, and all as near as the last, stand."""
    starts, targets, weights = graph.indptr, graph.indices, graph.data
    heap = list(zip(lengths.tolist(), nodes.tolist(), strict=True))
    heapq.heapify(heap)
    tentative = {node: distance for distance, node in heap}
    # The k smallest lengths of first ways to different nodes, negative for a heap with the largest
    # on top: none of the first k nodes can be farther than that.
    smallest = [-distance for distance in sorted(tentative.values())[:k]]
    heapq.heapify(smallest)
    bound = -smallest[0] if len(smallest) == k else math.inf
    settled: dict[int, float] = {}
    while heap:
        distance, node = heapq.heappop(heap)
        if distance > bound:
            break
        if node in settled:
            continue
        settled[node] = distance
        if len(settled) == k:
            # Edges of length 0 may still lead to a node of the same distance and a lower index.
            bound = distance
        edges = slice(starts[node], starts[node + 1])
        for neighbor, weight in zip(targets[edges].tolist(), weights[edges].tolist(), strict=True):
            through = distance + weight
            if through > bound:
                continue
            known = tentative.get(neighbor)
            if known is None:
                heapq.heappush(smallest, -through)
                if len(smallest) > k:
                    heapq.heappop(smallest)
                if len(smallest) == k:
                    bound = min(bound, -smallest[0])
            elif through >= known:
                continue
            tentative[neighbor] = through
            heapq.heappush(heap, (through, neighbor))
    return sorted((distance, node) for node, distance in settled.items())[:k]


def shortest_path(graph: csr_array, source: int, target: int) -> GeodesicPath:
    """One of the shortest ways between two nodes."""
    distances, previous = dijkstra(graph, directed=True, indices=source, return_predecessors=True)
    if not np.isfinite(distances[target]):
        return GeodesicPath(math.inf, np.empty(0, np.int64))
    nodes = [target]
    while nodes[-1] != source:
        nodes.append(int(previous[nodes[-1]]))
    return GeodesicPath(float(distances[target]), np.array(nodes[::-1], np.int64))
