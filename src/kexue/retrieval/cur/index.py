"""The index: scores of anchor queries, kept, and the search that is predicted from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int64, Integer

from kexue.retrieval.cur.scoring import (
    Scorer,
    checked_scores,
    in_single_precision,
    scoring_function,
)
from kexue.retrieval.cur.storage import Manifest, MemoryScores, StoredScores, digest

__all__ = ["CURIndex", "SearchResult"]


Candidates: TypeAlias = Integer[Any, " n"] | Sequence[int] | None


@dataclass(frozen=True)
class SearchResult:
    """The best items for a query, and all that was scored to find them.

    Attributes
    ----------
    indices : array of int64 (k,)
        Items, best first.
    scores : array of float64 (k,)
        What the scorer says of them; never a prediction.
    n_calls : int
        Number of pairs that were scored.
    scored_indices : array of int64 (n_calls,)
        All scored items, in the order of scoring.
    scored : array of float64 (n_calls,)
        Their scores.

    Examples
    --------
    >>> index = CURIndex(lambda pairs: [q * i for q, i in pairs], [1.0, 3.0, 2.0], [1.0])
    >>> index.build().search(2.0, k=1, budget=2, n_anchor_items=1)
    SearchResult(indices=array([1]), scores=array([6.]), n_calls=2,
                 scored_indices=array([2, 1]), scored=array([4., 6.]))
    """

    indices: Int64[np.ndarray, " k"]
    scores: Float[np.ndarray, " k"]
    n_calls: int
    scored_indices: Int64[np.ndarray, " n_calls"]
    scored: Float[np.ndarray, " n_calls"]


class CURIndex:
    """Items that are searched by an expensive pair scorer, within a budget of calls a query.

    Parameters
    ----------
    scorer : callable or object with ``predict``
        Takes a list of (query, item) pairs and returns as many numbers, an array-like of shape
        (pairs,) or (pairs, 1), torch tensors on any device included. A ``CrossEncoder`` of
        sentence-transformers fits as it is. Scores should be raw logits: a sigmoid or softmax
        saturates, which destroys the low rank that predictions rest on, so rather pass
        ``lambda pairs: model.predict(pairs, activation_fn=torch.nn.Identity())``.
    items : sequence
        What is searched.
    anchor_queries : sequence
        Typical queries, a few hundred, but none of those that quality is measured on.
    path : str or path, optional
        A folder where scores are kept; it is created, or opened as complete or partial as it is.
        Items and anchor queries must then consist of text, bytes, numbers and arrays, and be the
        same ones each time. Scores stay in memory without it.
    rcond : float
        Singular values up to ``rcond`` times the largest are cut off where scores are predicted. At
        0.01 the error has no peak where there are as many anchor items as anchor queries.
    batch_size : int
        Largest number of pairs in a call of the scorer.
    block_size : int
        Largest number of pairs that are written, or lost by a kill, at a time. A folder keeps the
        one that it was created with.

    Raises
    ------
    TypeError
        Where the scorer cannot be called, items or anchor queries are no sequence, or the folder
        could not recognise them another time.
    ValueError
        Where there are no items or no anchor queries, a number is out of its range, or the folder
        is about other items or anchor queries.
    RuntimeError
        Where somebody else is writing in the folder.

    Examples
    --------
    >>> from difflib import SequenceMatcher
    >>> def similarity(pairs):
    ...     return [SequenceMatcher(None, query, item).ratio() for query, item in pairs]
    >>> words = ["matrix", "vector", "tensor", "number", "matron", "victor", "cursor", "slumber"]
    >>> anchor_queries = ["vectors", "numbers", "patron", "sense"]
    >>> index = CURIndex(similarity, words, anchor_queries).build()
    >>> found = index.search("sensor", k=2, budget=5)
    >>> [words[i] for i in found.indices], found.n_calls, index.n_calls
    (['tensor', 'vector'], 5, 37)
    """

    def __init__(
        self,
        scorer: Scorer,
        items: Sequence[Any],
        anchor_queries: Sequence[Any],
        *,
        path: str | os.PathLike[str] | None = None,
        rcond: float = 1e-2,
        batch_size: int = 256,
        block_size: int = 4096,
    ) -> None:
        self._score = scoring_function(scorer)
        self._items = _listed("items", items)
        self._anchor_queries = _listed("anchor_queries", anchor_queries)
        if not 0 <= rcond < 1:
            raise ValueError(f"rcond must be in [0, 1), got {rcond!r}")
        self.rcond = float(rcond)
        self.batch_size = _count("batch_size", batch_size)
        self.path = None if path is None else Path(path)
        self._n_calls = 0
        self._store: MemoryScores | StoredScores
        manifest = Manifest(
            len(self._anchor_queries),
            len(self._items),
            _count("block_size", block_size),
            self._digest(self._anchor_queries, "anchor_queries"),
            self._digest(self._items, "items"),
            (0, len(self._items)),
        )
        if self.path is None:
            self._store = MemoryScores(manifest)
        else:
            self._store = StoredScores(self.path, manifest)
        self._fixed_anchors: tuple[tuple[bytes, float], np.ndarray] | None = None

    @property
    def complete(self) -> bool:
        """Whether every anchor query has been scored against every item."""
        return len(self._store.done) == self._store.manifest.n_blocks

    @property
    def n_calls(self) -> int:
        """Number of pairs that this object has had scored, for building and for searching."""
        return self._n_calls

    @property
    def anchor_scores_(self) -> Float[np.ndarray, "n_anchor_queries n_items"]:
        """Scores of anchor queries and items, read-only; 0 where they are still missing."""
        view = self._store.matrix.view()
        view.flags.writeable = False
        return view

    def build(
        self,
        *,
        max_calls: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> CURIndex:
        """Score the anchor queries against the items, except what has been scored already.

        Parameters
        ----------
        max_calls : int, optional
            No block is begun after as many pairs in this call; another call goes on.
        progress : callable, optional
            Is told, after each block that is kept, the number of pairs that are scored and the
            number of all.

        Returns
        -------
        CURIndex
            Itself.

        Raises
        ------
        ValueError
            Where the scorer returns something else than one finite number a pair; blocks before
            stay, this one is not kept.
        RuntimeError
            Where somebody else is writing in the folder.
        """
        if max_calls is not None:
            max_calls = _count("max_calls", max_calls, least=0)
        n_before = self._n_calls
        with self._store.writing():
            n_all = len(self._anchor_queries) * len(self._items)
            n_done = sum(block.stop - block.start for block in self._store.done)
            for block in self._store.manifest.blocks():
                if block in self._store.done:
                    continue
                if max_calls is not None and self._n_calls - n_before >= max_calls:
                    break
                scores = self._scores(
                    self._anchor_queries[block.row], np.arange(block.start, block.stop)
                )
                self._store.write(block, in_single_precision(scores, block))
                n_done += len(scores)
                if progress is not None:
                    progress(n_done, n_all)
        self._fixed_anchors = None
        return self

    def add_items(self, new_items: Sequence[Any]) -> CURIndex:
        """Append items; :meth:`build` then scores them, and only them.

        Parameters
        ----------
        new_items : sequence
            They follow the present ones. An index on disk has all or none of them, should the
            process be killed meanwhile.

        Returns
        -------
        CURIndex
            Itself, not complete.

        Raises
        ------
        TypeError
            Where these are no sequence, or the folder could not recognise them another time.
        ValueError
            Where there are none.
        RuntimeError
            Where somebody else is writing in the folder.
        """
        items = self._items + _listed("new_items", new_items)
        with self._store.writing():
            manifest = self._store.manifest
            self._store.extend(manifest.extended(len(items), self._digest(items, "items")))
        self._items = items
        self._fixed_anchors = None
        return self

    def approximate_scores(
        self, anchor_items: Any, anchor_item_scores: Any
    ) -> Float[np.ndarray, " n_items"]:
        r"""Predict the scores of all items from those of some, e W⁺ H.

        Parameters
        ----------
        anchor_items : array of int (n,)
            Items whose scores are known; repetitions are harmless.
        anchor_item_scores : array (n,)
            Their scores e for the query.

        Returns
        -------
        array of float32 (n_items,)
            Predictions for all items, the known ones included.

        Raises
        ------
        ValueError
            Where an item is out of range, a score is missing or not finite.
        RuntimeError
            Where the index is not complete.
        """
        self._require_complete()
        anchors = self._item_numbers("anchor_items", anchor_items)
        known = checked_scores(anchor_item_scores, len(anchors), "anchor_item_scores")
        return self._predicted(anchors, known)

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        budget: int,
        n_anchor_items: int | None = None,
        rounds: int = 1,
        initial: Candidates = None,
        random_state: int | np.random.Generator | None = 0,
    ) -> SearchResult:
        """Find the k best items with a fixed number of calls.

        First anchor items are scored; then, in each round, all scores are predicted from those that
        are known and an equal share of the remaining calls goes to the items predicted best. One
        round is enough for k in the tens; for the very best items several rounds, and a first list
        from a cheap retriever, find more with the same calls.

        Parameters
        ----------
        query : Any
            Whatever the scorer takes as first of a pair.
        k : int
            Number of items, 1 to budget.
        budget : int
            Number of pairs to score, anchor items included; with as many as there are items, or
            more, the search is exhaustive.
        n_anchor_items : int, optional
            How many to score before the first prediction, 1 to budget - 1; by default half of the
            budget for one round, and else ``budget // (rounds + 1)``.
        rounds : int
            Number of predictions.
        initial : array of int, optional
            Distinct items of which the first ``n_anchor_items`` are scored first; drawn uniformly
            without it.
        random_state : int or numpy.random.Generator, optional
            Source of this draw. With an int it is the same for all queries, and what they share is
            computed once and kept, n_anchor_items x (number of items) numbers.

        Returns
        -------
        SearchResult
            The min(k, number of items) best among all that were scored, ties by order of scoring.

        Raises
        ------
        ValueError
            Where a number is out of its range, initial items repeat or do not exist, or the scorer
            returns something else than one finite number a pair.
        RuntimeError
            Where the index is not complete.
        """
        budget = _count("budget", budget)
        k = _count("k", k, most=budget)
        rounds = _count("rounds", rounds)
        if n_anchor_items is not None:
            n_anchor_items = _count("n_anchor_items", n_anchor_items, most=budget - 1)
        else:
            n_anchor_items = max(1, budget // (rounds + 1))
        first = None if initial is None else self._item_numbers("initial", initial)
        if first is not None and len(np.unique(first)) < len(first):
            raise ValueError("initial items must differ, got some of them twice")
        self._require_complete()

        n_items = len(self._items)
        if budget >= n_items:
            known = np.arange(n_items)
            return _best(k, known, self._scores(query, known))
        if first is not None:
            known = first[:n_anchor_items]
        else:
            rng = np.random.default_rng(random_state)
            known = rng.choice(n_items, n_anchor_items, replace=False).astype(np.int64)
        is_fixed = first is None and isinstance(random_state, int)
        scores = self._scores(query, known)
        for round_ in range(rounds):
            share = (budget - len(known)) // (rounds - round_)
            if share == 0:
                continue
            if round_ == 0 and is_fixed:
                predicted = self._predicted_from_fixed(known, scores)
            else:
                predicted = self._predicted(known, scores)
            chosen = _largest_of_others(predicted, share, known)
            known = np.concatenate([known, chosen])
            scores = np.concatenate([scores, self._scores(query, chosen)])
        return _best(k, known, scores)

    def search_many(
        self, queries: Iterable[Any], k: int = 10, **options: Any
    ) -> list[SearchResult]:
        """Search for each query with the same options.

        Parameters
        ----------
        queries : iterable
            The queries.
        k : int
            Number of items for each.
        options : Any
            Those of :meth:`search`.

        Returns
        -------
        list of SearchResult
            One for each query.
        """
        return [self.search(query, k, **options) for query in queries]

    def _scores(self, query: Any, items: Int64[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Exact scores in double precision, asked for in batches."""
        scores = np.empty(len(items))
        for batch in _slices(len(items), self.batch_size):
            pairs = [(query, self._items[item]) for item in items[batch].tolist()]
            found = self._score(pairs)
            self._n_calls += len(pairs)
            scores[batch] = checked_scores(found, len(pairs), "scores", items[batch])
        return scores

    def _predicted(
        self, anchors: Int64[np.ndarray, " n"], known: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n_items"]:
        weights = known @ self._pseudoinverse(anchors)
        # A product of mixed types would convert the whole matrix first.
        return weights.astype(np.float32) @ np.asarray(self._store.matrix)

    def _predicted_from_fixed(
        self, anchors: Int64[np.ndarray, " n"], known: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n_items"]:
        """The same from item vectors W⁺ H, which are kept: a fixed draw is the same each time.

        Which of the two is taken depends on the arguments of a search and not on what came before,
        so that rounding cannot make a second search differ from the first.
        """
        if 2 * len(anchors) > len(self._anchor_queries):
            return self._predicted(anchors, known)
        key = anchors.tobytes(), self.rcond
        if self._fixed_anchors is None or self._fixed_anchors[0] != key:
            # In float64: where W is nearly singular, W⁺ H is a difference of large numbers.
            inverse, matrix = self._pseudoinverse(anchors), np.asarray(self._store.matrix)
            vectors = np.empty((len(anchors), matrix.shape[1]))
            for part in _slices(matrix.shape[1], _COLUMNS):
                np.matmul(inverse, matrix[:, part].astype(np.float64), out=vectors[:, part])
            self._fixed_anchors = key, vectors
        return known @ self._fixed_anchors[1]

    def _pseudoinverse(
        self, anchors: Int64[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n n_anchor_queries"]:
        intersection = np.asarray(self._store.matrix)[:, anchors].astype(np.float64)
        return np.linalg.pinv(intersection, rcond=self.rcond)

    def _item_numbers(self, name: str, given: Any) -> Int64[np.ndarray, " n"]:
        numbers = np.asarray(given)
        if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be a list of item numbers, got {numbers.dtype} of shape "
                f"{numbers.shape}"
            )
        if numbers.min() < 0 or numbers.max() >= len(self._items):
            raise ValueError(
                f"{name} must lie in [0, {len(self._items) - 1}], got {numbers.min()} to "
                f"{numbers.max()}"
            )
        return numbers.astype(np.int64)

    def _require_complete(self) -> None:
        if not self.complete:
            raise RuntimeError("some items are not scored by the anchor queries yet: call build()")

    def _digest(self, things: list[Any], name: str) -> str:
        return "" if self.path is None else digest(things, name)


def _largest_of_others(
    predicted: Float[np.ndarray, " n_items"], n: int, known: Int64[np.ndarray, " n_known"]
) -> Int64[np.ndarray, " n"]:
    """The n items of largest prediction that are not known yet, largest first, ties by number."""
    falling = np.negative(predicted, out=predicted)
    # Scores near the largest number may have made predictions of ±∞ or NaN.
    largest = np.finfo(falling.dtype).max
    np.nan_to_num(falling, copy=False, nan=largest, posinf=largest, neginf=-largest)
    falling[known] = np.inf
    others = np.sort(np.argpartition(falling, n - 1)[:n])
    return others[np.argsort(falling[others], kind="stable")]


def _best(k: int, known: Int64[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> SearchResult:
    order = np.argsort(-scores, kind="stable")[:k]
    return SearchResult(known[order], scores[order], len(known), known, scores)


_COLUMNS = 2**14  # of the matrix, widened at once


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


def _listed(name: str, things: Any) -> list[Any]:
    if isinstance(things, str | bytes) or not hasattr(things, "__len__"):
        raise TypeError(f"{name} must be a sequence, got a {type(things).__name__}")
    if not len(things):
        raise ValueError(f"{name} must not be empty")
    return list(things)


def _count(name: str, value: Any, *, least: int = 1, most: float = float("inf")) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= most:
        allowed = f"in [{least}, {most}]" if np.isfinite(most) else f"at least {least}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return int(value)
