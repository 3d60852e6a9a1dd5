"""Search by predicted scores: what is predicted, what is scored, what comes back."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.retrieval.cur import CURIndex, SearchResult
from sentence_models import tiny_cross_encoder

EPS32 = float(np.finfo(np.float32).eps)


class Matrix:
    """A scorer of (row, column) pairs that looks them up and remembers them."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores
        self.asked: list[tuple[int, int]] = []
        self.batches: list[int] = []

    def __call__(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        self.asked += pairs
        self.batches.append(len(pairs))
        return np.array([self.scores[pair] for pair in pairs])

    def index(self, n_anchor_queries: int, **options: Any) -> CURIndex:
        """Built; the first rows are the anchor queries, the others are for searching."""
        n_items = self.scores.shape[1]
        return CURIndex(self, range(n_items), range(n_anchor_queries), **options).build()


def low_rank(rank: int, n_queries: int, n_items: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_queries, rank)) @ rng.standard_normal((rank, n_items))


def noisy(n_queries: int, n_items: int, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return low_rank(8, n_queries, n_items, seed) + noise * rng.standard_normal((n_queries, n_items))


def test_low_rank_scores_are_predicted_exactly_and_the_best_are_found() -> None:
    scorer = Matrix(low_rank(8, 60, 500))
    index = scorer.index(20, rcond=1e-5)
    anchors = np.random.default_rng(0).choice(500, 16, replace=False)
    for query in range(20, 60):
        exact = scorer.scores[query]
        predicted = index.approximate_scores(anchors, exact[anchors])
        np.testing.assert_allclose(predicted, exact, atol=1e3 * EPS32 * abs(exact).max())
        found = index.search(query, k=12, budget=40, n_anchor_items=16)
        assert found.indices.tolist() == np.argsort(-exact)[:12].tolist()
        assert found.scores.tolist() == exact[found.indices].tolist()
        assert found.n_calls == 40


@pytest.mark.parametrize("n_anchors", [5, 12, 30])
def test_prediction_takes_the_weights_of_least_norm(n_anchors: int) -> None:
    """With |U| below, at and above |V|: a transposition could not pass all three."""
    scorer = Matrix(noisy(13, 40))
    index = scorer.index(12, rcond=1e-6)
    anchors = np.random.default_rng(1).choice(40, n_anchors, replace=False)
    known = scorer.scores[12, anchors]
    h = index.anchor_scores_.astype(np.float64)
    weights = np.linalg.lstsq(h[:, anchors].T, known, rcond=1e-6)[0]
    allowed = 1e3 * EPS32 * np.abs(weights).sum() * np.abs(h).max()
    predicted = index.approximate_scores(anchors, known)
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, weights @ h, atol=allowed)


def test_cutting_small_singular_values_removes_the_peak_at_equal_numbers() -> None:
    scores = noisy(80, 300, noise=0.1)
    anchors = np.random.default_rng(0).choice(300, 40, replace=False)

    def error(rcond: float) -> float:
        index = Matrix(scores).index(40, rcond=rcond)
        rest = [index.approximate_scores(anchors, row[anchors]) - row for row in scores[40:]]
        return float(np.linalg.norm(rest) / np.linalg.norm(scores[40:]))

    # 40 anchor queries, 40 anchor items, rank 8 and noise: the inverse of noise is what peaks.
    assert error(1e-2) < 0.2
    assert error(1e-12) > 5 * error(1e-2)


def searched_by_the_book(
    scores: np.ndarray, query: int, h: np.ndarray, budget: int, n_first: int, rounds: int, seed: int
) -> tuple[list[int], np.ndarray]:
    """The protocol, word by word and in double precision."""
    n_items = scores.shape[1]
    known = list(np.random.default_rng(seed).choice(n_items, n_first, replace=False))
    for round_ in range(rounds):
        w = h[:, known].astype(np.float64)
        predicted = scores[query, known] @ np.linalg.pinv(w, rcond=1e-2) @ h.astype(np.float64)
        others = [i for i in np.argsort(-predicted, kind="stable") if i not in known]
        known += others[: (budget - len(known)) // (rounds - round_)]
    return [int(i) for i in known], scores[query, known]


@pytest.mark.parametrize(
    ("rounds", "n_anchor_items", "expected_first"), [(1, None, 30), (1, 20, 20), (5, None, 10)]
)
def test_search_follows_the_protocol(
    rounds: int, n_anchor_items: int | None, expected_first: int
) -> None:
    scorer = Matrix(noisy(60, 400))
    index = scorer.index(50)
    for query in range(50, 60):
        found = index.search(
            query, k=7, budget=60, rounds=rounds, n_anchor_items=n_anchor_items, random_state=query
        )
        known, exact = searched_by_the_book(
            scorer.scores, query, index.anchor_scores_, 60, expected_first, rounds, query
        )
        assert found.scored_indices.tolist() == known
        np.testing.assert_array_equal(found.scored, exact)
        best = np.argsort(-exact, kind="stable")[:7]
        assert found.indices.tolist() == [known[i] for i in best]
        np.testing.assert_array_equal(found.scores, exact[best])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_budget_is_spent_exactly_and_no_pair_is_scored_twice(data: st.DataObject) -> None:
    n_items = data.draw(st.integers(1, 30))
    scorer = Matrix(np.round(noisy(6, n_items), 1))
    index = scorer.index(5, batch_size=data.draw(st.integers(1, 8)))
    budget = data.draw(st.integers(1, 35))
    rounds = data.draw(st.integers(1, 8))
    n_anchor_items = None
    if budget > 1:
        n_anchor_items = data.draw(st.none() | st.integers(1, budget - 1))
    initial = data.draw(st.none() | st.permutations(range(n_items)))
    k = data.draw(st.integers(1, budget))
    scorer.asked.clear()
    before = index.n_calls
    found = index.search(
        5, k, budget=budget, rounds=rounds, n_anchor_items=n_anchor_items, initial=initial
    )
    spent = min(budget, n_items)
    assert found.n_calls == len(scorer.asked) == index.n_calls - before == spent
    assert len(set(scorer.asked)) == spent
    assert [item for _, item in scorer.asked] == found.scored_indices.tolist()
    assert len(found.indices) == min(k, n_items)
    # Best first, ties by order of scoring.
    order = np.argsort(-found.scored, kind="stable")[:k]
    assert found.indices.tolist() == found.scored_indices[order].tolist()
    assert found.scores.tolist() == scorer.scores[5, found.indices].tolist()


def test_exhaustive_search_finds_the_truth() -> None:
    scorer = Matrix(noisy(4, 50, noise=5.0))
    found = scorer.index(3).search(3, k=50, budget=1000)
    assert found.indices.tolist() == np.argsort(-scorer.scores[3], kind="stable").tolist()


def test_ties_come_in_the_order_of_scoring() -> None:
    found = Matrix(np.ones((2, 9))).index(1).search(1, k=4, budget=6, initial=[7, 2, 5, 0])
    assert found.scored_indices.tolist() == [7, 2, 5, 0, 1, 3]
    assert found.indices.tolist() == [7, 2, 5, 0]


def test_search_starts_with_the_initial_items() -> None:
    index = Matrix(noisy(21, 100)).index(20)
    initial = list(range(60, 100))
    found = index.search(20, budget=30, rounds=2, initial=initial)
    assert found.scored_indices[:10].tolist() == initial[:10]
    few = index.search(20, budget=30, initial=np.array([4, 3]), n_anchor_items=10)
    assert few.scored_indices[:2].tolist() == [4, 3]
    assert few.n_calls == 30


def test_several_rounds_find_more_of_the_best() -> None:
    scorer = Matrix(noisy(160, 600, noise=1.0))
    index = scorer.index(100)
    truth = np.argsort(-scorer.scores[100:], axis=1)[:, :10]

    def recall(**options: Any) -> float:
        found = index.search_many(range(100, 160), 10, budget=60, **options)
        return float(np.mean([len(set(f.indices) & set(t)) for f, t in zip(found, truth,
                              strict=True)])) / 10  # fmt: skip

    assert recall(rounds=5) > recall(rounds=1) > 60 / 600


def test_same_search_asks_for_the_same_pairs_in_the_same_order() -> None:
    scorer = Matrix(noisy(90, 300))
    index = scorer.index(80)
    searches = []
    for options in ({}, {"rounds": 3}, {}, {"random_state": 5}, {}):
        scorer.asked.clear()
        index.search(85, budget=40, **options)
        searches.append(list(scorer.asked))
    assert searches[0] == searches[2] == searches[4] != searches[3]
    again = Matrix(noisy(90, 300))
    fresh = again.index(80)
    again.asked.clear()
    fresh.search(85, budget=40)
    assert again.asked == searches[0]


def test_kept_item_vectors_follow_the_cut_off() -> None:
    index = Matrix(noisy(90, 300)).index(80)
    for rcond in (1e-2, 0.5, 1e-2):
        index.rcond = rcond
        found = index.search(85, budget=40)
        fresh = Matrix(noisy(90, 300)).index(80, rcond=rcond).search(85, budget=40)
        assert found.scored_indices.tolist() == fresh.scored_indices.tolist()


def test_search_many_is_a_loop() -> None:
    index = Matrix(noisy(30, 100)).index(20)
    together = index.search_many(range(20, 30), 4, budget=20, rounds=2)
    for query, found in zip(range(20, 30), together, strict=True):
        alone = index.search(query, 4, budget=20, rounds=2)
        assert found.indices.tolist() == alone.indices.tolist()
        assert found.scored_indices.tolist() == alone.scored_indices.tolist()


def test_repeated_anchor_items_are_harmless() -> None:
    scorer = Matrix(low_rank(4, 11, 30))
    index = scorer.index(10, rcond=1e-5)
    anchors = np.array([3, 9, 3, 27, 14, 9, 1])
    predicted = index.approximate_scores(anchors, scorer.scores[10, anchors])
    np.testing.assert_allclose(predicted, scorer.scores[10], atol=1e-3)


def test_scores_that_are_all_zero_predict_zeros() -> None:
    index = Matrix(np.zeros((3, 8))).index(2)
    np.testing.assert_array_equal(index.approximate_scores([1, 2], [1.0, 0.0]), np.zeros(8))


def test_pairs_of_a_block_come_in_item_order_and_in_batches() -> None:
    scorer = Matrix(noisy(3, 25))
    scorer.index(2, batch_size=10, block_size=20)
    assert scorer.asked == [(query, item) for query in range(2) for item in range(25)]
    assert scorer.batches == [10, 10, 5, 10, 10, 5]


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "folder"])
def test_build_stops_before_a_block_and_goes_on_later(kept: bool, tmp_path: Path) -> None:
    path = tmp_path if kept else None
    scorer = Matrix(noisy(4, 50))
    index = CURIndex(scorer, range(50), range(3), block_size=20, path=path)
    reports: list[tuple[int, int]] = []
    index.build(max_calls=30, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(20, 150), (40, 150)]
    assert not index.complete
    assert index.n_calls == 40
    with pytest.raises(RuntimeError, match=r"call build\(\)"):
        index.search(3, budget=10)
    with pytest.raises(RuntimeError, match=r"call build\(\)"):
        index.approximate_scores([0], [1.0])
    assert index.build(max_calls=0).n_calls == 40
    index.build(progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (150, 150)
    assert index.complete
    assert len(scorer.asked) == len(set(scorer.asked)) == 150
    assert index.build().n_calls == 150
    np.testing.assert_array_equal(index.anchor_scores_, scorer.scores[:3].astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        index.anchor_scores_[0, 0] = 1.0


def test_added_items_are_scored_alone_and_then_found(tmp_path: Path) -> None:
    for path in (None, tmp_path):
        scorer = Matrix(noisy(12, 60))
        index = CURIndex(scorer, range(40), range(10), path=path, block_size=16).build()
        index.search(11, budget=20)
        scorer.asked.clear()
        assert not index.add_items(range(40, 60)).complete
        index.build()
        assert scorer.asked == [(query, item) for query in range(10) for item in range(40, 60)]
        whole = Matrix(noisy(12, 60)).index(10)
        np.testing.assert_array_equal(index.anchor_scores_, whole.anchor_scores_)
        one, other = (i.search(11, budget=20, rounds=2) for i in (index, whole))
        assert one.scored_indices.tolist() == other.scored_indices.tolist()


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        lambda scores: scores[:, None],
        lambda scores: scores.astype(np.float32),
        lambda scores: torch.tensor(scores, requires_grad=True),
        lambda scores: torch.tensor(scores).bfloat16()[:, None],
        lambda scores: [torch.tensor(score) for score in scores],
    ],
    ids=["list", "column", "single", "with gradient", "bfloat16", "list of tensors"],
)
def test_scorers_may_return_any_array(wrap: Callable[[np.ndarray], Any]) -> None:
    scores = np.arange(12.0).reshape(3, 4)

    class Model:
        def __call__(self, tokens: Any) -> Any:
            raise AssertionError("predict is what takes pairs")

        def predict(self, pairs: list[tuple[int, int]]) -> Any:
            return wrap(np.array([scores[pair] for pair in pairs]))

    index = CURIndex(Model(), range(4), [0, 1]).build()
    np.testing.assert_array_equal(index.anchor_scores_, scores[:2])
    found = index.search(2, k=2, budget=3)
    assert found.scores.dtype == np.float64
    assert set(found.scores) <= set(scores[2])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: np.zeros(n + 1), r"shape \(10,\), one a pair, got \(11,\)"),
        (lambda n: np.zeros((n, 2)), r"shape \(10,\), one a pair, got \(10, 2\)"),
        (lambda n: 0.0, r"shape \(10,\), one a pair, got \(\)"),
        (lambda n: [*[0.0] * (n - 2), np.nan, 1.0], "got nan for pair 8, the one with item 28"),
        (lambda n: [np.inf] * n, "got inf for pair 0, the one with item 20"),
        (lambda n: [1e300] * n, "single precision, got 1e.300 for anchor query 0 and item 20"),
        (lambda n: ["good"] * n, "real numbers, got"),
        (lambda n: None, "real numbers|must be finite|shape"),
        (lambda n: [1j] * n, "real numbers, got"),
    ],
)
def test_block_with_wrong_scores_is_refused_and_not_kept(
    answer: Callable[[int], Any], message: str, tmp_path: Path
) -> None:
    def scorer(pairs: list[tuple[int, int]]) -> Any:
        return answer(len(pairs)) if (0, 20) in pairs else np.ones(len(pairs))

    for path in (None, tmp_path):
        index = CURIndex(scorer, range(30), [0, 1], path=path, block_size=10)
        with pytest.raises(ValueError, match=message):
            index.build()
        assert not index.complete
        np.testing.assert_array_equal(index.anchor_scores_[0], [1.0] * 20 + [0.0] * 10)
    mended = CURIndex(lambda pairs: np.ones(len(pairs)), range(30), [0, 1], path=tmp_path)
    assert mended.build().n_calls == 40


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 20\], got 0"),
        ({"k": 21}, r"k must be in \[1, 20\], got 21"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"budget": 2.5}, "budget must be an integer"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"n_anchor_items": 0}, r"n_anchor_items must be in \[1, 19\], got 0"),
        ({"n_anchor_items": 20}, r"n_anchor_items must be in \[1, 19\], got 20"),
        ({"initial": [3, 4, 3]}, "initial items must differ"),
        ({"initial": [30]}, r"initial must lie in \[0, 29\], got 30 to 30"),
        ({"initial": [-1]}, r"initial must lie in \[0, 29\], got -1"),
        ({"initial": []}, "initial must be a list of item numbers"),
        ({"initial": [0.5]}, "initial must be a list of item numbers"),
    ],
)
def test_wrong_searches_are_refused_before_anything_is_scored(
    options: dict[str, Any], message: str
) -> None:
    scorer = Matrix(noisy(3, 30))
    index = scorer.index(2)
    scorer.asked.clear()
    with pytest.raises(ValueError, match=message):
        index.search(2, **{"k": 5, "budget": 20, **options})
    assert not scorer.asked


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"items": []}, ValueError, "items must not be empty"),
        ({"anchor_queries": []}, ValueError, "anchor_queries must not be empty"),
        ({"items": "text"}, TypeError, "items must be a sequence, got a str"),
        ({"items": iter("ab")}, TypeError, "items must be a sequence"),
        ({"scorer": "model"}, TypeError, "scorer must be callable or have a method predict"),
        ({"rcond": -0.1}, ValueError, "rcond must be in"),
        ({"rcond": 1.0}, ValueError, "rcond must be in"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
    ],
)
def test_wrong_indices_are_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"scorer": max, "items": ["a"], "anchor_queries": ["b"], **changed}
    with pytest.raises(error, match=message):
        CURIndex(**options)


@pytest.mark.bad_input
def test_wrong_known_scores_are_refused() -> None:
    index = Matrix(noisy(3, 30)).index(2)
    with pytest.raises(ValueError, match=r"anchor_item_scores must have shape \(2,\)"):
        index.approximate_scores([1, 2], [0.5])
    with pytest.raises(ValueError, match="anchor_item_scores must be finite"):
        index.approximate_scores([1, 2], [0.5, np.nan])
    with pytest.raises(ValueError, match="max_calls must be at least 0"):
        index.build(max_calls=-1)
    with pytest.raises(ValueError, match="new_items must not be empty"):
        index.add_items([])


def test_search_needs_two_rows_beside_the_memory_map(tmp_path: Path) -> None:
    n_queries, n_items = 32, 100_000

    def scorer(pairs: list[tuple[int, int]]) -> np.ndarray:
        query = pairs[0][0]
        items = np.array([item for _, item in pairs])
        return np.cos(items * 0.01 + query) + np.sin(items * 0.003 * query)

    items, anchors = range(n_items), range(n_queries)
    index = CURIndex(scorer, items, anchors, path=tmp_path, batch_size=20_000, block_size=n_items)
    index.build()
    row = n_items * np.dtype(np.float32).itemsize
    tracemalloc.start()
    # Anchors that fall to a search alone, so that no item vectors are kept for the next one.
    index.search(3, budget=40, rounds=2, initial=range(20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The predictions and, of twice their width, the numbers of the items; beside them only what
    # belongs to the 40 scored ones.
    assert peak < 3 * row + 2 * 40 * n_queries * 8 + 2**18
    assert isinstance(index.anchor_scores_, np.memmap)


def test_result_is_what_it_says() -> None:
    found = Matrix(noisy(3, 30)).index(2).search(2, k=4, budget=11)
    assert isinstance(found, SearchResult)
    assert found.indices.dtype == found.scored_indices.dtype == np.int64
    assert found.scores.dtype == found.scored.dtype == np.float64
    assert (found.indices.shape, found.scored.shape) == ((4,), (11,))


WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sings", "sleeps", "runs"]


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_cross_encoder(tmp_path_factory.mktemp("cross_encoder"), WORDS)


@pytest.mark.slow
def test_cross_encoder_fits_as_it_is(cross_encoder: Any, tmp_path: Path) -> None:
    documents = [f"{a} {b} {c}" for a in WORDS[:3] for b in WORDS[3:6] for c in WORDS[6:]]
    queries = ["red dog runs", "bird sleeps", "green", "blue cat"]
    index = CURIndex(cross_encoder, documents, queries, path=tmp_path, block_size=10).build()
    found = index.search("cat runs", k=3, budget=12, rounds=2)
    assert found.n_calls == 12
    pairs = [("cat runs", documents[i]) for i in found.indices]
    # Other batches are padded to other lengths, which moves single precision a little.
    np.testing.assert_allclose(found.scores, cross_encoder.predict(pairs), atol=1e-5)
    everything = index.search("cat runs", k=3, budget=27)
    ranked = cross_encoder.rank("cat runs", documents, top_k=3)
    np.testing.assert_allclose(everything.scores, [hit["score"] for hit in ranked], atol=1e-5)

    def logits(pairs: list[tuple[str, str]]) -> torch.Tensor:
        return cross_encoder.predict(
            pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True
        )

    raw = CURIndex(logits, documents, queries).build()
    probabilities = 1 / (1 + np.exp(-raw.anchor_scores_.astype(np.float64)))
    np.testing.assert_allclose(index.anchor_scores_, probabilities, atol=1e-5)


def test_scores_near_the_largest_number_repeat_no_item() -> None:
    """A scorer that forbids with the smallest float32: predictions overflow."""
    rng = np.random.default_rng(1)
    scores = np.where(rng.random((12, 40)) < 0.5, -3.4e38, rng.normal(size=(12, 40)))
    matrix = Matrix(scores)
    index = matrix.index(6)
    with np.errstate(over="ignore", invalid="ignore"):
        for query in range(6, 12):
            before = len(matrix.asked)
            found = index.search(query, 5, budget=30, rounds=3)
            asked = matrix.asked[before:]
            assert len(asked) == len(set(asked)) == 30
            assert len(set(found.indices.tolist())) == 5


def test_kept_item_vectors_are_as_good_as_fresh_predictions() -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(60, 8)) * np.logspace(0, -6, 8)
    index = Matrix(left @ rng.normal(size=(500, 8)).T).index(30, rcond=1e-9)
    options = {"budget": 24, "n_anchor_items": 12}
    for query in range(30, 40):
        kept = index.search(query, 10, random_state=7, **options)
        fresh = index.search(query, 10, random_state=np.random.default_rng(7), **options)
        assert kept.indices.tolist() == fresh.indices.tolist()
