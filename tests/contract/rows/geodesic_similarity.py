"""Rows of `kexue.retrieval.geodesic`."""

from typing import Any

import numpy as np

from contract.row import Arguments, Row
from kexue.retrieval.geodesic import (
    DisconnectedGraphError,
    GeodesicIndex,
    GeodesicPath,
    NeighborResult,
    geodesic_distances,
    knn_graph,
    summarize,
)

POINTS = np.random.default_rng(0).standard_normal((12, 3))


def fitted() -> GeodesicIndex:
    return GeodesicIndex(3).fit(POINTS)


def points(rng: np.random.Generator) -> Arguments:
    return {"x": rng.standard_normal((15, 4))}


def answers(x: Any, queries: Any, **options: object) -> list[object]:
    index = GeodesicIndex(**{"n_neighbors": 3, **options}).fit(x)
    return [index.distances(queries), index.nearest(queries, 4), index.n_components_]


def dense(x: Any, **options: object) -> np.ndarray:
    return knn_graph(x, **{"n_neighbors": 3, **options}).toarray()


def ways(lengths: Any, **options: Any) -> np.ndarray:
    graph = knn_graph(POINTS, n_neighbors=3)
    graph.data = np.resize(np.asarray(lengths), graph.nnz)
    return geodesic_distances(graph, **options)


def falls_apart(first: float) -> str:
    x = [[first], [1.0], [100.0], [101.0]]
    try:
        GeodesicIndex(1, metric="euclidean", disconnected="error").fit(x)
    except DisconnectedGraphError as error:
        return str(error)
    raise AssertionError("the graph is in two parts")


WRONG_POINTS = {
    "one dimension": lambda given: {**given, "x": given["x"][0]},
    "a zero vector": lambda given: {**given, "x": given["x"] * ([[0.0]] + [[1.0]] * 14)},
    "too few points": lambda given: {**given, "x": given["x"][:3]},
    "words": lambda given: {**given, "x": [["a", "b"]] * 9},
    "no neighbour": lambda given: {**given, "n_neighbors": 0},
    "half a neighbour": lambda given: {**given, "n_neighbors": 1.5},
    "unknown metric": lambda given: {**given, "metric": "manhattan"},
    "unknown backend": lambda given: {**given, "backend": "annoy"},
    "radius of zero": lambda given: {**given, "radius": 0.0},
}

ROWS = [
    Row(
        name="kexue.retrieval.geodesic.index.GeodesicIndex",
        make=lambda rng: {**points(rng), "queries": rng.standard_normal((5, 4))},
        call=answers,
        arrays=("x", "queries"),
        batched=("queries",),
        wrong={
            **WRONG_POINTS,
            "queries of another width": lambda given: {**given, "queries": given["queries"][:, :3]},
            "one query without an axis": lambda given: {**given, "queries": given["queries"][0]},
            "unknown treatment of islands": lambda given: {**given, "disconnected": "drop"},
            "no thread": lambda given: {**given, "n_jobs": 0},
        },
        instance=fitted,
    ),
    Row(
        name="kexue.retrieval.geodesic.graph.knn_graph",
        make=points,
        call=dense,
        arrays=("x",),
        wrong=WRONG_POINTS,
    ),
    Row(
        name="kexue.retrieval.geodesic.graph.geodesic_distances",
        make=lambda rng: {"lengths": rng.uniform(0.1, 1.0, 50), "indices": [0, 5, 7]},
        call=ways,
        arrays=("lengths",),
        batched=("indices",),
        wrong={
            "a length below 0": lambda given: {**given, "lengths": -given["lengths"]},
            "a node that is none": lambda given: {**given, "indices": [12]},
            "half a node": lambda given: {**given, "indices": [0.5]},
            "negative limit": lambda given: {**given, "limit": -1.0},
        },
        without={"wrong_rank_is_refused": "the lengths are entries of a graph, which has no rank"},
    ),
    Row(
        name="kexue.retrieval.geodesic.index.summarize",
        make=lambda rng: {"center": rng.standard_normal(3), "n_sentences": 4, "min_distance": 0.1},
        call=lambda **given: summarize(fitted(), **given),
        arrays=("center",),
        wrong={
            "two centres": lambda given: {**given, "center": POINTS[:2]},
            "another width": lambda given: {**given, "center": given["center"][:2]},
            "no sentence": lambda given: {**given, "n_sentences": 0},
            "negative distance": lambda given: {**given, "min_distance": -1.0},
        },
    ),
    Row(
        name="kexue.retrieval.geodesic.search.NeighborResult",
        make=lambda rng: vars(fitted().nearest(POINTS[:2], 3)),
        call=NeighborResult,
        instance=lambda: fitted().nearest(POINTS[:2], 3),
    ),
    Row(
        name="kexue.retrieval.geodesic.search.GeodesicPath",
        make=lambda rng: vars(fitted().path(0, 7)),
        call=GeodesicPath,
        instance=lambda: fitted().path(0, 7),
    ),
    Row(
        name="kexue.retrieval.geodesic.graph.DisconnectedGraphError",
        make=lambda rng: {"first": 0.0},
        call=falls_apart,
        without={"docstring": "an exception takes what every exception takes"},
    ),
]
