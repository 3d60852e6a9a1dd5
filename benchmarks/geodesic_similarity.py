"""Geodesic index: time and memory of fit, the first k against a full search, all pairs as Isomap.

Neighbours come from faiss (faiss-cpu) where it is installed, else from scikit-learn.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, vstack
from scipy.sparse.csgraph import dijkstra, shortest_path
from sklearn.neighbors import NearestNeighbors, kneighbors_graph

from benchmarks.timing import compare
from kexue.retrieval.geodesic import GeodesicIndex

N, N_SMALL, N_QUERIES, N_NEIGHBORS = 100_000, 3_000, 64, 15


def main() -> None:
    x = manifold(N + N_QUERIES)
    index = large_fit(x[:N])
    for k, target in ((10, 100.0), (100, 20.0), (1000, None)):
        first_k(index, x[:N], x[N:], k, target)
    all_pairs()


def manifold(n: int) -> np.ndarray:
    """Six free numbers a point, bent into 64 coordinates."""
    rng = np.random.default_rng(0)
    bent = np.tanh(rng.standard_normal((n, 6)) @ rng.standard_normal((6, 64)))
    return bent @ rng.standard_normal((64, 64)) / 8


def large_fit(x: np.ndarray) -> GeodesicIndex:
    before = resident_memory()
    start = time.perf_counter()
    index = GeodesicIndex(N_NEIGHBORS, metric="euclidean").fit(x)
    seconds = time.perf_counter() - start
    print(
        f"fit, {N} x 64, {N_NEIGHBORS} neighbours: {seconds:.1f} s, allowed 60 s on two cores; "
        f"{(peak_memory() - before) / 1e9:.2f} GB more than before, allowed 1 GB; "
        f"{index.graph_.nnz} stored entries, {index.n_components_} components",
        flush=True,
    )
    return index


def resident_memory() -> float:
    """Memory of the process now, in bytes; its peak where the system does not say."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return peak_memory()
    return int(statistics.read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> float:
    """Largest memory of the process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def first_k(
    index: GeodesicIndex, x: np.ndarray, queries: np.ndarray, k: int, target: float | None
) -> None:
    """Both sides look for the queries' neighbours, too."""
    search = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(x)

    def full_search() -> np.ndarray:
        entries = search.kneighbors_graph(queries, mode="distance")
        graph = csr_array(vstack([index.graph_, entries]))
        graph.resize((N + len(queries), N + len(queries)))
        sources = np.arange(N, N + len(queries))
        distances = dijkstra(graph, indices=sources)[:, :N]
        return np.sort(np.partition(distances, k - 1, axis=1)[:, :k], axis=1)

    compare(
        f"the first {k} of {N} along the graph for {len(queries)} queries, against scipy's search "
        "for all",
        lambda: index.nearest(queries, k),
        full_search,
        # Sums of the same steps in the same order, entered at lengths of another routine.
        agree=1e-9,
        target=target,
        value=lambda found: found if isinstance(found, np.ndarray) else found.distances,
        repeats=1,
    )


def all_pairs() -> None:
    """Isomap's way to distances: scikit-learn's neighbours, then scipy's shortest paths."""
    x = manifold(N_SMALL)

    def isomap() -> np.ndarray:
        graph = kneighbors_graph(x, N_NEIGHBORS, mode="distance")
        return shortest_path(graph, method="auto", directed=False)

    def ours() -> np.ndarray:
        index = GeodesicIndex(N_NEIGHBORS, metric="euclidean").fit(x)
        return index.distances(indices=np.arange(N_SMALL))

    compare(
        f"all pairs of {N_SMALL} points, against the distances of scikit-learn's Isomap",
        ours,
        isomap,
        agree=1e-9,
        target=1.0,
        repeats=1,
    )


if __name__ == "__main__":
    main()
