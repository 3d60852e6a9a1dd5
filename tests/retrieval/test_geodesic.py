"""Distances along the neighbour graph: closed forms, brute force, islands, duplicates, files."""

from __future__ import annotations

import builtins
import math
import os
import threading
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components, dijkstra, floyd_warshall
from scipy.spatial.distance import cdist

from kexue.retrieval.geodesic import (
    METRICS,
    DisconnectedGraphError,
    GeodesicIndex,
    geodesic_distances,
    knn_graph,
    summarize,
)
from kexue.retrieval.geodesic import neighbors as neighbors_module
from kexue.retrieval.geodesic.graph import Edges
from kexue.retrieval.geodesic.search import Entries, nearest_from_entries
from sentence_models import tiny_sentence_transformer

EPS = np.finfo(float).eps
TRUE_METRICS = ["euclidean", "angular"]


def points(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def polygon(n: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def swiss_roll(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    turn = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return np.stack([turn * np.cos(turn), 21 * rng.random(n), turn * np.sin(turn)], axis=1)


def clusters(n_clusters: int = 4, size: int = 30, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 100 * rng.standard_normal((n_clusters, 3))
    x = np.repeat(centres, size, axis=0) + rng.standard_normal((n_clusters * size, 3))
    return rng.permutation(x)


def local_distances(x: np.ndarray, y: np.ndarray, metric: str) -> np.ndarray:
    """A second derivation: scipy's distances, the angle by the law of cosines."""
    if metric == "euclidean":
        return cdist(x, y)
    cosine = np.clip(1 - cdist(x, y, "cosine"), -1, 1)
    return np.arccos(cosine) if metric == "angular" else 1 - cosine


def dense_geodesics(x: np.ndarray, k: int, metric: str, mutual: bool) -> np.ndarray:
    """Floyd-Warshall on the dense matrix of edges; inf, not 0, where there is none."""
    d = local_distances(x, x, metric)
    order = np.argsort(np.where(np.eye(len(x), dtype=bool), np.inf, d), axis=1)[:, :k]
    edge = np.zeros_like(d, dtype=bool)
    np.put_along_axis(edge, order, True, axis=1)
    edge = edge & edge.T if mutual else edge | edge.T
    g = np.where(edge, d, np.inf)
    np.fill_diagonal(g, 0.0)
    for middle in range(len(x)):
        g = np.minimum(g, g[:, middle, None] + g[middle])
    return g


@pytest.mark.parametrize(
    ("metric", "n", "step"),
    [
        ("angular", 12, 0.523598775598),
        ("angular", 41, 0.153248422126),
        ("angular", 100, 0.062831853072),
        ("euclidean", 12, 0.517638090205),
        ("euclidean", 41, 0.153098505673),
        ("euclidean", 100, 0.062821518156),
    ],
)
def test_regular_polygon_is_walked_along_its_sides(metric: str, n: int, step: float) -> None:
    g = GeodesicIndex(2, metric=metric).fit(polygon(n)).distances(indices=[0])[0]
    j = np.arange(n)
    # The oracle has twelve decimals.
    np.testing.assert_allclose(g, np.minimum(j, n - j) * step, atol=n * 5e-13)


def test_antipode_of_the_hundred_gon() -> None:
    angular = GeodesicIndex(2).fit(polygon(100)).distances(indices=[0])[0, 50]
    chords = GeodesicIndex(2, metric="euclidean").fit(polygon(100)).distances(indices=[0])[0, 50]
    assert angular == pytest.approx(math.pi, rel=200 * EPS)
    assert chords == pytest.approx(3.141075907813, abs=5e-13)


@pytest.mark.parametrize(
    ("n", "length"), [(12, 0.803847577293), (41, 0.234391524393), (100, 0.098663578586)]
)
def test_one_minus_cosine_makes_far_points_close(n: int, length: float) -> None:
    with pytest.warns(UserWarning, match="1 - cos is no metric"):
        index = GeodesicIndex(2, metric="cosine").fit(polygon(n))
    assert index.distances(indices=[0])[0, n // 2] == pytest.approx(length, abs=5e-13)
    assert length < 2  # the direct distance of antipodes


def test_cosine_warns_once_a_fit_and_metrics_do_not() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = GeodesicIndex(2, metric="cosine").fit(polygon(12))
        index.add(polygon(12)[:2]).distances(polygon(7))
        for metric in TRUE_METRICS:
            GeodesicIndex(2, metric=metric).fit(polygon(12))
    assert [warning.category for warning in caught] == [UserWarning]


def test_line_is_counted_in_steps() -> None:
    x = np.arange(30.0)[:, None]
    g = GeodesicIndex(2, metric="euclidean").fit(x).distances(indices=np.arange(30))
    np.testing.assert_array_equal(g, np.abs(x - x.T))


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.filterwarnings("ignore:1 - cos")
def test_distances_equal_floyd_warshall_on_the_dense_matrix(metric: str, mutual: bool) -> None:
    x = points(90)
    index = GeodesicIndex(4, metric=metric, mutual=mutual).fit(x)
    # arccos and 1 - cos of the second derivation lose up to sqrt(eps) of small values.
    np.testing.assert_allclose(
        index.distances(indices=range(90)), dense_geodesics(x, 4, metric, mutual), atol=1e-9
    )


def test_scipys_floyd_warshall_agrees() -> None:
    graph = knn_graph(points(60), n_neighbors=5)
    np.testing.assert_allclose(geodesic_distances(graph), floyd_warshall(graph), rtol=60 * EPS)


@pytest.mark.parametrize("metric", TRUE_METRICS)
def test_all_neighbours_give_back_the_metric(metric: str) -> None:
    x = points(40)
    index = GeodesicIndex(39, metric=metric).fit(x)
    q = points(7, seed=1)
    # Straight ways win but for a rounding error.
    np.testing.assert_allclose(
        index.distances(indices=range(40)), local_distances(x, x, metric), atol=1e-7
    )
    np.testing.assert_allclose(
        GeodesicIndex(39, metric=metric).fit(x).distances(q),
        np.min(
            np.sort(local_distances(q, x, metric), axis=1)[:, :39, None]
            + local_distances(x, x, metric)[
                np.argsort(local_distances(q, x, metric), axis=1)[:, :39]
            ],
            axis=1,
        ),
        atol=1e-7,
    )


def test_isomap_has_the_same_distances() -> None:
    from sklearn.manifold import Isomap

    x = swiss_roll(500)
    index = GeodesicIndex(10, metric="euclidean").fit(x)
    assert index.n_components_ == 1
    peer = Isomap(n_neighbors=10).fit(x).dist_matrix_
    np.testing.assert_allclose(index.distances(indices=range(500)), peer, atol=1e-7)


@pytest.mark.parametrize("angle", [1e-9, 1e-6, 0.5, math.pi - 1e-9])
def test_small_and_large_angles_keep_their_digits(angle: float) -> None:
    x = [[3.0, 0.0], [2 * math.cos(angle), 2 * math.sin(angle)]]
    g = GeodesicIndex(1).fit(x).distances(indices=[0])[0, 1]
    assert g == pytest.approx(angle, rel=1e-6)


def test_very_long_and_very_short_vectors_have_angles() -> None:
    x = [[1e300, 0.0], [0.0, 1e-300], [5e-324, 5e-324]]
    g = GeodesicIndex(2).fit(x).distances(indices=[0])
    np.testing.assert_allclose(g, [[0, math.pi / 2, math.pi / 4]], rtol=4 * EPS)


@pytest.mark.parametrize("metric", TRUE_METRICS)
def test_query_at_a_point_of_the_corpus_is_that_point(metric: str) -> None:
    x = points(80)
    index = GeodesicIndex(5, metric=metric).fit(x)
    np.testing.assert_array_equal(index.distances(x[:9]), index.distances(indices=range(9)))


@pytest.mark.parametrize("radius", [None, 1.4])
def test_query_enters_through_its_nearest_points(radius: float | None) -> None:
    x, q = points(60), points(5, seed=1)
    index = GeodesicIndex(4, metric="euclidean", radius=radius).fit(x)
    inner, d = index.distances(indices=range(60)), cdist(q, x)
    expected = np.full((5, 60), np.inf)
    for row in range(5):
        for entry in np.argsort(d[row])[:4]:
            if radius is None or d[row, entry] <= radius:
                expected[row] = np.minimum(expected[row], d[row, entry] + inner[entry])
    np.testing.assert_allclose(index.distances(q), expected, rtol=100 * EPS)


@pytest.mark.parametrize("metric", TRUE_METRICS)
def test_batch_of_queries_equals_single_queries_bit_for_bit(metric: str) -> None:
    index = GeodesicIndex(4, metric=metric).fit(points(200, 17))
    q = points(30, 17, seed=1)
    q[7] = q[8]
    np.testing.assert_array_equal(
        index.distances(q), np.concatenate([index.distances(q[i : i + 1]) for i in range(30)])
    )
    together = index.nearest(q, 6)
    for i in range(30):
        alone = index.nearest(q[i : i + 1], 6)
        np.testing.assert_array_equal(alone.distances[0], together.distances[i])
        np.testing.assert_array_equal(alone.indices[0], together.indices[i])


def sorted_search(index: GeodesicIndex, q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    g = index.distances(q)
    order = np.stack([np.lexsort((np.arange(g.shape[1]), row))[:k] for row in g])
    distances = np.take_along_axis(g, order, axis=1)
    return distances, np.where(np.isfinite(distances), order, -1)


@pytest.mark.parametrize("k", [1, 10, 100, 300])
def test_nearest_equals_the_sorted_full_search(k: int) -> None:
    index = GeodesicIndex(6).fit(points(300))
    q = points(10, seed=1)
    found, (distances, indices) = index.nearest(q, k), sorted_search(index, q, k)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    np.testing.assert_array_equal(found.indices, indices)
    assert found.indices.dtype == np.int64


def test_nearest_of_very_many_takes_the_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from kexue.retrieval.geodesic import search

    index, q = GeodesicIndex(3).fit(clusters()), points(4, 3)
    few = index.nearest(q, 50)
    monkeypatch.setattr(search, "_HEAP_UP_TO", 10)
    many = index.nearest(q, 50)
    np.testing.assert_array_equal(many.indices, few.indices)
    np.testing.assert_array_equal(many.distances, few.distances)
    assert (few.indices == -1).any()


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=30),
    k=st.integers(1, 3),
    wanted=st.integers(1, 40),
)
def test_ties_go_to_the_lower_index_on_a_grid(
    x: list[tuple[int, int]], k: int, wanted: int
) -> None:
    """Duplicates and equal steps everywhere: what a heap meets first is not what comes first."""
    index = GeodesicIndex(k, metric="euclidean").fit(np.array(x, float))
    q = np.array([[1.0, 1.0], [0.0, 3.0]])
    found = index.nearest(q, wanted)
    distances, indices = sorted_search(index, q, wanted)
    reach = min(wanted, len(x))
    np.testing.assert_array_equal(found.distances[:, :reach], distances)
    np.testing.assert_array_equal(found.indices[:, :reach], indices)
    assert np.all(found.indices[:, reach:] == -1)
    assert np.all(np.isinf(found.distances[:, reach:]))


def test_edges_of_length_zero_lead_to_the_lower_index_after_the_last_place_is_taken() -> None:
    graph = Edges(np.array([0, 1]), np.array([3, 2]), np.array([0.0, 1.0])).graph(4)
    entry = Entries(np.array([[1.0]]), np.array([[3]]))
    assert nearest_from_entries(graph, entry, 1).indices.tolist() == [[0]]


def test_nearest_looks_at_few_points_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    index = GeodesicIndex(4, metric="euclidean").fit(np.arange(3000.0)[:, None])
    visited = []

    class Counted(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            visited.append(key)
            return super().__getitem__(key)

    index.graph_.data = index.graph_.data.view(Counted)
    monkeypatch.setattr(
        "kexue.retrieval.geodesic.search.dijkstra", lambda *_, **__: pytest.fail("full search")
    )
    index.nearest([[1500.2]], 10)
    assert 10 <= len(visited) <= 12


@pytest.mark.parametrize("backend", ["exact", "faiss", "sklearn"])
def test_duplicates_are_joined_by_edges_of_length_zero(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    x = np.repeat(points(10, 3), 8, axis=0)
    index = GeodesicIndex(5, metric="euclidean", backend=backend).fit(x)
    assert np.sum(index.graph_.data == 0) >= 80
    assert np.all(np.diff(index.graph_.indptr) >= 5)
    assert np.all(index.graph_.diagonal() == 0)
    own = index.distances(indices=[0])[0, :8]
    np.testing.assert_array_equal(own, 0)
    assert index.n_components_ == 10


@pytest.mark.parametrize("backend", ["exact", "faiss", "sklearn"])
@pytest.mark.parametrize("metric", TRUE_METRICS)
def test_point_with_more_duplicates_than_neighbours_is_never_its_own(
    metric: str, backend: str
) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    x = np.concatenate([np.tile(points(1, 4), (60, 1)), points(20, 4, seed=1)])
    graph = knn_graph(x, n_neighbors=3, metric=metric, backend=backend)
    rows = np.repeat(np.arange(80), np.diff(graph.indptr))
    assert not np.any(rows == graph.indices)
    assert np.all(np.diff(graph.indptr)[:60] >= 3)
    assert np.sum(graph.data[rows == 5] == 0) >= 3


def test_graph_is_symmetric_sorted_and_double() -> None:
    graph = GeodesicIndex(5).fit(points(100)).graph_
    assert isinstance(graph, sp.csr_array)
    assert graph.dtype == np.float64
    assert graph.has_sorted_indices
    assert (graph != graph.T).nnz == 0
    assert np.all(np.diff(graph.indptr) >= 5)


def test_radius_removes_long_edges_only() -> None:
    x = points(100)
    full = knn_graph(x, n_neighbors=6, metric="euclidean")
    cut = knn_graph(x, n_neighbors=6, metric="euclidean", radius=1.5)
    assert 0 < cut.nnz < full.nnz
    full.data[full.data > 1.5] = 0
    assert (cut != full).nnz == 0


def test_mutual_edges_are_those_of_both_directions() -> None:
    x = points(70)
    d = cdist(x, x) + np.diag(np.full(70, np.inf))
    listed = np.zeros((70, 70), bool)
    np.put_along_axis(listed, np.argsort(d, axis=1)[:, :4], True, axis=1)
    for mutual, expected in ((True, listed & listed.T), (False, listed | listed.T)):
        graph = knn_graph(x, n_neighbors=4, metric="euclidean", mutual=mutual)
        np.testing.assert_array_equal(graph.toarray() > 0, expected)


@pytest.mark.parametrize("metric", TRUE_METRICS)
@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_libraries_find_the_graph_of_exact_search(metric: str, backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    # An offset of 1000 would cost single precision three digits, were it not centred.
    x = points(1500, 6) + (1000 if metric == "euclidean" else 0)
    exact = knn_graph(x, n_neighbors=8, metric=metric, backend="exact")
    found = knn_graph(x, n_neighbors=8, metric=metric, backend=backend)
    np.testing.assert_array_equal(found.indices, exact.indices)
    np.testing.assert_array_equal(found.data, exact.data)


def test_navigable_graph_finds_nearly_all_neighbours_twice_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbors_module, "_FLAT_UP_TO", 100)
    x = points(1500, 6)
    exact = knn_graph(x, n_neighbors=8, backend="exact")
    one, two = (knn_graph(x, n_neighbors=8, backend="faiss") for _ in range(2))
    assert (one != two).nnz == 0
    # Recall of HNSW with these settings is above 0.999 in six dimensions.
    assert (one != exact).nnz < 0.01 * exact.nnz


def _without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_missing_faiss_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "faiss")
    with pytest.raises(ImportError, match=r"kexue\[faiss\]"):
        GeodesicIndex(3, backend="faiss").fit(points(50))


def test_scikit_learn_takes_over_where_faiss_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbors_module, "_EXACT_BELOW", 100)
    asked = []
    for name in ("_faiss_proposals", "_sklearn_proposals"):
        original = getattr(neighbors_module, name)
        monkeypatch.setattr(
            neighbors_module,
            name,
            lambda *given, name=name, original=original: asked.append(name) or original(*given),
        )
    x = points(400)
    exact = knn_graph(x, n_neighbors=5, backend="exact")
    assert (knn_graph(x, n_neighbors=5) != exact).nnz == 0
    _without(monkeypatch, "faiss")
    assert (knn_graph(x, n_neighbors=5) != exact).nnz == 0
    knn_graph(x[:99], n_neighbors=5)
    assert asked == ["_faiss_proposals", "_sklearn_proposals"]


@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e8])
def test_estimates_of_the_exact_search_never_lose_a_neighbour(offset: float, scale: float) -> None:
    """Up to 1e16 in the squares with differences near 1: a matrix product has no digit left."""
    x = scale * (points(300, 3) + offset)
    x[0] = 0.0  # an outlier, so that the others are close together in every frame
    d = np.linalg.norm((x[:, None] - x) / scale, axis=2) + np.diag(np.full(300, np.inf))
    index = GeodesicIndex(1, metric="euclidean").fit(x)
    starts = index.graph_.indptr
    shortest = [index.graph_.data[a:b].min() for a, b in pairwise(starts)]
    np.testing.assert_allclose(shortest, scale * d.min(axis=1), rtol=8 * EPS)
    # Queries far from everything enter where double precision says, too.
    q = scale * 1e18 * points(4, 3, seed=1)
    entry = np.linalg.norm((q[:, None] - x) / scale, axis=2).min(axis=1)
    np.testing.assert_allclose(index.nearest(q, 1).distances[:, 0], scale * entry, rtol=8 * EPS)


def test_wide_searches_bound_the_kth_neighbour_by_classes() -> None:
    """From 4·32·k points on, the bound comes from minima of classes."""
    x = points(1000, 2)
    order = np.argsort(cdist(x, x) + np.diag(np.full(1000, np.inf)), axis=1)
    for k in (1, 7, 8):
        graph = knn_graph(x, n_neighbors=k, metric="euclidean", mutual=True)
        listed = np.zeros((1000, 1000), bool)
        np.put_along_axis(listed, order[:, :k], True, axis=1)
        np.testing.assert_array_equal(graph.toarray() > 0, listed & listed.T)


def kruskal(x: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    """All cross edges in ascending order, each taken that joins two groups."""
    n, group, taken = len(x), labels.copy(), []
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if labels[i] != labels[j]]
    d = cdist(x, x)
    for i, j in sorted(pairs, key=lambda pair: d[pair]):
        if group[i] != group[j]:
            taken.append((i, j))
            group[group == group[j]] = group[i]
    return taken


def test_bridges_are_the_edges_that_kruskal_takes() -> None:
    x = clusters(7, 12)
    islands = GeodesicIndex(3, metric="euclidean").fit(x)
    bridged = GeodesicIndex(3, metric="euclidean", disconnected="bridge").fit(x)
    extra = (bridged.graph_ - islands.graph_).tocoo()
    added = sorted((i, j) for i, j in zip(*extra.coords, strict=True) if i < j)
    assert added == sorted(kruskal(x, islands.component_labels_))
    assert islands.n_components_ == len(added) + 1 >= 7
    assert bridged.n_components_ == 1


def test_bridges_change_nothing_inside_a_component() -> None:
    x = clusters()
    islands = GeodesicIndex(4, metric="euclidean").fit(x)
    bridged = GeodesicIndex(4, metric="euclidean", disconnected="bridge").fit(x)
    inside = islands.component_labels_[:, None] == islands.component_labels_
    before, after = (index.distances(indices=range(len(x))) for index in (islands, bridged))
    np.testing.assert_array_equal(after[inside], before[inside])
    assert np.all(np.isinf(before[~inside]))
    assert np.all(np.isfinite(after))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
def test_ties_among_bridges_close_no_circle(x: list[tuple[int, int]]) -> None:
    grid = np.array(x, float)
    islands = GeodesicIndex(1, metric="euclidean").fit(grid)
    bridged = GeodesicIndex(1, metric="euclidean", disconnected="bridge").fit(grid)
    assert bridged.n_components_ == 1
    assert bridged.graph_.nnz - islands.graph_.nnz == 2 * (islands.n_components_ - 1)


def test_islands_are_infinitely_far_or_refused() -> None:
    x = clusters(3, 10)
    index = GeodesicIndex(3, metric="euclidean").fit(x)
    assert index.n_components_ == 3
    _, labels = connected_components(index.graph_, directed=False)
    np.testing.assert_array_equal(index.component_labels_, labels)
    other = int(np.flatnonzero(labels != labels[0])[0])
    path = index.path(0, other)
    assert path.distance == math.inf
    assert path.nodes.shape == (0,)
    found = index.nearest(x[:1], 15)
    assert np.sum(found.indices >= 0) == 10
    assert np.all(np.isinf(found.distances[0, 10:]))
    with pytest.raises(DisconnectedGraphError, match="has 3 connected components"):
        GeodesicIndex(3, metric="euclidean", disconnected="error").fit(x)


@pytest.mark.parametrize("mutual", [False, True])
def test_adding_points_never_lengthens_a_distance(mutual: bool) -> None:
    x = points(200, 3)
    index = GeodesicIndex(5, metric="euclidean", mutual=mutual).fit(x[:120])
    before = index.distances(indices=range(120))
    for start in (120, 150):
        index.add(x[start : start + (30 if start == 120 else 50)])
        after = index.distances(indices=range(120))[:, :120]
        assert np.all(after <= before)
        before = after
    assert index.graph_.shape == (200, 200)
    assert (index.graph_ != index.graph_.T).nnz == 0


def test_added_points_get_their_nearest_among_all_points() -> None:
    x = points(150, 3)
    index = GeodesicIndex(4, metric="euclidean").fit(x[:100])
    old = index.graph_.toarray()
    index.add(x[100:])
    d = cdist(x, x) + np.diag(np.full(150, np.inf))
    listed = np.zeros((150, 150), bool)
    np.put_along_axis(listed[100:], np.argsort(d[100:], axis=1)[:, :4], True, axis=1)
    expected = listed | listed.T
    expected[:100, :100] = old > 0
    np.testing.assert_array_equal(index.graph_.toarray() > 0, expected)
    np.testing.assert_array_equal(index.graph_.toarray()[:100, :100], old)


def test_added_points_join_mutually_where_both_list_each_other() -> None:
    x = points(150, 3)
    index = GeodesicIndex(4, metric="euclidean", mutual=True).fit(x[:100]).add(x[100:])
    d = cdist(x, x) + np.diag(np.full(150, np.inf))
    listed = np.zeros((150, 150), bool)
    np.put_along_axis(listed, np.argsort(d, axis=1)[:, :4], True, axis=1)
    both = listed & listed.T
    np.testing.assert_array_equal(index.graph_.toarray()[100:] > 0, both[100:])


def test_refused_points_leave_the_index_as_it_was() -> None:
    x = points(60, 3)
    index = GeodesicIndex(3, metric="euclidean", radius=3.0, disconnected="error").fit(x)
    before = index.distances(indices=[0])
    with pytest.raises(DisconnectedGraphError):
        index.add([[100.0, 100.0, 100.0]])
    np.testing.assert_array_equal(index.distances(indices=[0]), before)
    assert index.add(np.empty((0, 3))).graph_.shape == (60, 60)


def test_path_is_a_way_of_its_length() -> None:
    index = GeodesicIndex(4).fit(points(150))
    path = index.path(3, 77)
    steps = [index.graph_[i, j] for i, j in pairwise(path.nodes)]
    assert path.nodes[0] == 3
    assert path.nodes[-1] == 77
    assert all(step > 0 for step in steps)
    assert path.distance == pytest.approx(sum(steps), rel=len(steps) * EPS)
    assert path.distance == index.distances(indices=3)[0, 77]
    here = index.path(5, 5)
    assert (here.distance, here.nodes.tolist()) == (0.0, [5])


def test_limit_cuts_what_is_farther() -> None:
    index = GeodesicIndex(4).fit(points(100))
    q = points(3, seed=1)
    for asked in ({"queries": q}, {"indices": [0, 5]}):
        full, limited = index.distances(**asked), index.distances(**asked, limit=1.5)
        np.testing.assert_array_equal(limited, np.where(full > 1.5, np.inf, full))


def test_scores_are_inverse_distances() -> None:
    x = np.array([[0.0], [0.0], [1.0], [3.0], [100.0], [101.0]])
    index = GeodesicIndex(2, metric="euclidean", radius=5.0).fit(x)
    for center in ([0.0], np.array([[0.0]]), torch.tensor([0.0])):
        np.testing.assert_allclose(
            index.scores(center), [np.inf, np.inf, 1.0, 1 / 3, 0.0, 0.0], rtol=2 * EPS
        )


def test_summary_follows_the_graph_and_not_the_local_distance() -> None:
    """A horseshoe: its far end is close to the centre in space and far along the graph."""
    turn = np.linspace(0, 1.9 * np.pi, 60)
    x = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    index = GeodesicIndex(2, metric="euclidean").fit(x)
    chosen = summarize(index, x[0], n_sentences=10)
    np.testing.assert_array_equal(chosen, np.arange(10))
    assert 59 in np.argsort(cdist(x[:1], x)[0])[:10]
    assert chosen.dtype == np.int64


def test_summary_skips_what_is_close_to_what_is_taken() -> None:
    x = np.array([[0.0], [0.0], [0.2], [1.0], [1.5], [2.5]])
    index = GeodesicIndex(3, metric="euclidean").fit(x)
    assert summarize(index, [0.0], n_sentences=9).tolist() == [0, 1, 2, 3, 4, 5]
    assert summarize(index, [0.0], n_sentences=9, min_distance=0.5).tolist() == [0, 3, 4, 5]
    assert summarize(index, [0.0], n_sentences=2, min_distance=0.6).tolist() == [0, 3]


def test_summary_never_takes_what_cannot_be_reached() -> None:
    x = clusters(2, 10)
    index = GeodesicIndex(3, metric="euclidean").fit(x)
    chosen = summarize(index, x[0], n_sentences=20)
    assert len(chosen) == 10
    assert set(index.component_labels_[chosen]) == {index.component_labels_[0]}


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda x: torch.from_numpy(x).float().requires_grad_(),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: x.astype(np.float16),
        lambda x: x.tolist(),
        lambda x: (100 * x).astype(np.int16),
    ],
    ids=["torch", "with gradient", "bfloat16", "half", "lists", "integers"],
)
def test_every_kind_of_matrix_is_taken_at_its_values(convert: Any) -> None:
    x = convert(points(50))
    values = x.detach().double().numpy() if torch.is_tensor(x) else np.array(x, np.float64)
    one, two = GeodesicIndex(4).fit(x), GeodesicIndex(4).fit(values)
    np.testing.assert_array_equal(one.graph_.data, two.graph_.data)
    np.testing.assert_array_equal(one.distances(x[:3]), two.distances(values[:3]))


@pytest.mark.gpu
def test_tensors_on_a_gpu_give_the_same_graph() -> None:
    x = torch.from_numpy(points(6000, 16))
    one, two = GeodesicIndex(8).fit(x.cuda()), GeodesicIndex(8, backend="exact").fit(x)
    np.testing.assert_array_equal(one.graph_.indices, two.graph_.indices)
    np.testing.assert_array_equal(one.graph_.data, two.graph_.data)


def test_fit_forms_no_square_matrix() -> None:
    x = points(20_000, 4)
    tracemalloc.start()
    GeodesicIndex(5, backend="sklearn").fit(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A square matrix of float64 would be 3.2 GB; chunks are 64 MB, edges a few.
    assert peak < 200e6


def test_concurrent_reads_agree() -> None:
    index, q = GeodesicIndex(5).fit(points(300)), points(20, seed=1)
    expected = index.nearest(q, 20).distances, index.distances(q)
    wrong = []

    def read() -> None:
        for _ in range(3):
            ours = index.nearest(q, 20).distances, index.distances(q)
            wrong.extend(1 for a, b in zip(ours, expected, strict=True) if not np.array_equal(a, b))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "index.npz"
    GeodesicIndex(4, disconnected="bridge", radius=0.5).fit(points(40)).save(path)
    return path


def test_saved_index_answers_as_before(tmp_path: Path) -> None:
    x = np.concatenate([points(60), points(5)])
    index = GeodesicIndex(4, mutual=True, radius=2.0, n_jobs=2).fit(x)
    path = tmp_path / "with no suffix"
    index.save(path)
    again = GeodesicIndex.load(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    q = points(6, seed=1)
    np.testing.assert_array_equal(again.distances(q), index.distances(q))
    np.testing.assert_array_equal(again.graph_.indices, index.graph_.indices)
    np.testing.assert_array_equal(again.component_labels_, index.component_labels_)
    for name in ("n_neighbors", "radius", "metric", "mutual", "disconnected", "backend", "n_jobs"):
        assert getattr(again, name) == getattr(index, name)
    np.testing.assert_array_equal(again.add(q).graph_.data, index.add(q).graph_.data)


def test_interrupted_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def no_rename(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(KeyboardInterrupt):
        GeodesicIndex(3).fit(points(90)).save(saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_file_that_was_cut_short_is_refused_by_name(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"index\.npz is no complete geodesic index"):
        GeodesicIndex.load(saved)


def test_flipped_bytes_are_refused_or_harmless(saved: Path) -> None:
    content = saved.read_bytes()
    whole = GeodesicIndex.load(saved)
    refused = 0
    for place in range(3, len(content), 61):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        saved.write_bytes(damaged)
        try:
            again = GeodesicIndex.load(saved)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(again.graph_.data, whole.graph_.data)
    # Nearly all bytes are data, under a checksum; the others name files and times twice.
    assert refused > 0.9 * len(range(3, len(content), 61))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, format=np.array(["kexue geodesic index 1"], dtype=object))
    with pytest.raises(ValueError, match=r"other\.npz"):
        GeodesicIndex.load(path)
    with pytest.raises(FileNotFoundError):
        GeodesicIndex.load(tmp_path / "missing.npz")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(low=f["low"][:-1]), "edges are incomplete"),
        (lambda f: f.update(high=f["high"] + 1000), "lead to points that it lacks"),
        (lambda f: f.update(length=-f["length"]), "have no lengths"),
        (lambda f: f.update(low=f["low"].astype(float)), "no integer ends"),
        (lambda f: f.update(vectors=f["vectors"] * np.nan), "no finite matrix"),
        (lambda f: f.update(options=np.array('{"metric": "manhattan"}')), "metric must be"),
        (lambda f: f.update(options=np.array('{"shape": 3}')), "shape"),
        (lambda f: f.update(format=np.array("another")), "its format is 'another'"),
        (lambda f: f.pop("vectors"), "vectors"),
    ],
)
def test_file_of_impossible_contents_is_refused(saved: Path, change: Any, words: str) -> None:
    with np.load(saved) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(saved, **arrays)
    with pytest.raises(ValueError, match=words):
        GeodesicIndex.load(saved)


def test_sentence_transformers_vectors_are_taken_as_they_come(tmp_path: Path) -> None:
    words = ["the", "cat", "dog", "bird", "runs", "sleeps", "eats"]
    encoder = tiny_sentence_transformer(tmp_path, words)
    sentences = [f"the {a} {b}" for a in ("cat", "dog", "bird") for b in ("runs", "sleeps", "eats")]
    sentences += sentences[:1]
    arrays = encoder.encode(sentences)
    tensors = encoder.encode(sentences, convert_to_tensor=True)
    assert arrays.dtype == np.float32
    index = GeodesicIndex(3).fit(arrays)
    np.testing.assert_array_equal(GeodesicIndex(3).fit(tensors).graph_.data, index.graph_.data)
    found = index.nearest(encoder.encode(["the cat runs"]), 2)
    # The same sentence, first alone and then padded in a batch, in single precision.
    assert set(found.indices[0]) == {0, 9}
    np.testing.assert_allclose(found.distances, 0.0, atol=1e-2)
    chosen = summarize(index, arrays.mean(axis=0), n_sentences=3, min_distance=1e-3)
    assert len(set(chosen.tolist())) == 3


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (np.ones(5), ValueError, r"must be 2-D .* got an array of shape \(5,\)"),
        (np.ones((2, 3, 4)), ValueError, r"shape \(2, 3, 4\)"),
        (np.ones((9, 0)), ValueError, "at least one feature"),
        ([[1.0, 2.0], [np.nan, 1.0], [3.0, np.inf]], ValueError, "infinity in row 1"),
        ([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0], [0.0, 0.0]], ValueError, "one in row 2"),
        (np.ones((4, 2)) + 1j, TypeError, "real numbers"),
        (torch.ones(4, 2) + 1j, TypeError, "real numbers"),
        ([["a", "b"], ["c", "d"]], TypeError, "real numbers"),
    ],
)
def test_points_are_checked(x: Any, kind: type[Exception], words: str) -> None:
    fitted = GeodesicIndex(1).fit([[1.0, 2.0], [2.0, 1.0]])
    for call in (
        GeodesicIndex(1).fit,
        lambda points: knn_graph(points, n_neighbors=1),
        fitted.add,
        fitted.distances,
        lambda points: fitted.nearest(points, 1),
    ):
        # Where the width is known, it is named instead.
        with pytest.raises(kind, match=f"{words}|must have 2 features"):
            call(x)


@pytest.mark.bad_input
def test_coordinates_beyond_squaring_are_refused_under_the_euclidean_metric() -> None:
    with pytest.raises(ValueError, match=r"at most 1e\+140, got 1e\+200 in row 1"):
        GeodesicIndex(1, metric="euclidean").fit([[1.0], [1e200], [0.0]])
    assert GeodesicIndex(1, metric="euclidean").fit(np.zeros((3, 2))).n_components_ == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"metric": "manhattan"}, ValueError, "euclidean, angular, cosine, got 'manhattan'"),
        ({"disconnected": "drop"}, ValueError, "infinite, bridge, error, got 'drop'"),
        ({"backend": "annoy"}, ValueError, "auto, exact, faiss, sklearn, got 'annoy'"),
        ({"n_neighbors": 0}, ValueError, r"\[1, samples - 1\], got 0"),
        ({"n_neighbors": 2.5}, TypeError, "must be an integer, got 2.5"),
        ({"radius": 0.0}, ValueError, "radius must be a positive number"),
        ({"radius": math.nan}, ValueError, "radius must be a positive number"),
        ({"mutual": "yes"}, TypeError, "mutual must be True or False"),
        ({"n_jobs": 0}, ValueError, "n_jobs must be"),
    ],
)
def test_options_are_checked(options: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        GeodesicIndex(**options)


@pytest.mark.bad_input
def test_number_of_neighbours_must_fit_the_samples() -> None:
    with pytest.raises(ValueError, match=r"= \[1, 4\], got 5 for 5 samples"):
        GeodesicIndex(5).fit(points(5))
    with pytest.raises(ValueError, match=r"got 1 for 1 samples"):
        knn_graph(points(1), n_neighbors=1)


@pytest.mark.bad_input
def test_questions_are_checked() -> None:
    index = GeodesicIndex(3).fit(points(20))
    q = points(2)
    for call, words in (
        (lambda: index.distances(), "exactly one of queries and indices .* neither"),
        (lambda: index.distances(q, indices=[0]), "exactly one of queries and indices .* both"),
        (lambda: index.distances(q[:, :3]), "queries must have 5 features.* got 3"),
        (lambda: index.distances(indices=[0, 20]), r"\[0, 19\], got index 20"),
        (lambda: index.distances(indices=[-1]), r"\[0, 19\], got index -1"),
        (lambda: index.distances(q, limit=-1.0), "limit must be"),
        (lambda: index.distances(q, limit=math.nan), "limit must be"),
        (lambda: index.nearest(q, 0), "k must be at least 1, got 0"),
        (lambda: index.nearest(q[:, :3], 1), "queries must have 5 features.* got 3"),
        (lambda: index.path(0, 20), r"target must be an index in \[0, 19\], got 20"),
        (lambda: index.path(-1, 0), r"source must be an index in \[0, 19\], got -1"),
        (lambda: index.scores(q), "center must be one vector, got 2"),
        (lambda: index.scores(q[0, :3]), "center must have 5 features"),
        (lambda: index.add(q[:, :3]), "x must have 5 features"),
        (lambda: summarize(index, q[0], n_sentences=0), "n_sentences must be at least 1"),
        (lambda: summarize(index, q[0], n_sentences=1, min_distance=-1.0), "min_distance must"),
        (lambda: GeodesicIndex(3).distances(q), "call fit first"),
        (lambda: GeodesicIndex(3).add(q), "call fit first"),
        (lambda: GeodesicIndex(3).save("x"), "call fit first"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="indices must be integers"):
        index.distances(indices=[0.5])
    with pytest.raises(TypeError, match="k must be an integer"):
        index.nearest(q, 1.5)


@pytest.mark.bad_input
def test_graphs_are_checked() -> None:
    graph = knn_graph(points(10), n_neighbors=2)
    with pytest.raises(TypeError, match="scipy sparse array, got ndarray"):
        geodesic_distances(graph.toarray())
    with pytest.raises(ValueError, match=r"square, got shape \(3, 10\)"):
        geodesic_distances(graph[:3])
    with pytest.raises(ValueError, match="finite and not negative"):
        geodesic_distances(-graph)
    with pytest.raises(ValueError, match="got index 10"):
        geodesic_distances(graph, indices=[10])


def test_distances_of_a_graph_are_dijkstras() -> None:
    graph = knn_graph(points(50), n_neighbors=3)
    np.testing.assert_array_equal(geodesic_distances(graph), dijkstra(graph))
    assert geodesic_distances(graph, indices=[4]).shape == (1, 50)
    assert geodesic_distances(graph, indices=4).shape == (50,)
    limited = geodesic_distances(graph.tocoo(), indices=[4, 2], limit=1.0)
    assert np.all((limited <= 1) | np.isinf(limited))


def test_questions_without_a_query_have_answers_without_a_row() -> None:
    index = GeodesicIndex(3).fit(points(20))
    assert index.distances(np.empty((0, 5))).shape == (0, 20)
    assert index.distances(indices=[]).shape == (0, 20)
    assert index.nearest(np.empty((0, 5)), 4).indices.shape == (0, 4)


def test_neighbours_far_from_the_origin_are_the_same_with_every_backend() -> None:
    x = np.random.default_rng(0).normal(size=(400, 20)) + 1e8
    exact, found = (
        knn_graph(x, n_neighbors=5, metric="euclidean", backend=backend)
        for backend in ("exact", "sklearn")
    )
    assert (exact != found).nnz == 0
