r"""CUR retrieval with a cross-encoder.

A cross-encoder reads a query $q$ and an item $k$ together and returns one number $s(q, k)$. It
ranks better than two vectors and their inner product, but nothing of it can be prepared: to find
the best of $n$ items it must read $n$ pairs, for every query. The usual cure is to let a cheap
model choose a hundred items and to read only those, and then the cheap model decides what can be
found. Can the expensive scores themselves say where to look?

## Rows and columns of the matrix of all scores

Write all scores as a matrix $S$, a row for each query and a column for each item, and look for a
factorisation

$$S \approx F\,G\,H, \qquad F: |Q| \times |U|, \quad G: |U| \times |V|, \quad H: |V| \times |K|.$$

With $F$ and $H$ free and $G$ diagonal, the best one is the singular value decomposition. Its
representatives are virtual: a new query has no row in $F$, and a network would have to be trained
to give it one. So let the representatives be real. If $U$ is a set of items and $V$ a set of
queries, then

$$F = S_{:,U}, \qquad H = S_{V,:}$$

need no new function: a new query gets its row of $F$ from $|U|$ calls of the scorer. Only $G$ is
free. If $U$ and $V$ were everything, $S = S\,G\,S$ would force $G = S^{-1}$, and this is how to
choose it in general, with the Moore–Penrose inverse of the intersection:

$$S \approx S_{:,U}\;(S_{V,U})^{+}\;S_{V,:}.$$

That is exact if and only if the intersection $W = S_{V,U}$ has the rank of $S$. The best core for
given rows and columns would be $F^+ S H^+$, but this needs all of $S$.

## A query is a combination of queries

For one query, with $e = s(q, U)$, the prediction is

$$e\,W^+ H = \alpha H, \qquad \alpha = e\,W^+ .$$

The weights $\alpha$ are those of least norm by which the anchor queries $V$, combined, score the
anchor items as $q$ does. The prediction is what the same combination says of all other items: a
regression of a new query on known ones. $H$ costs $|V|\,|K|$ calls, once. A query costs $|U|$ calls
for its prediction and some more to score, exactly, what is predicted best.

## Noise, where the two numbers are close

$S$ is of low rank only roughly. If $|U|$ is near $|V|$, the smallest singular values of $W$ are
noise, and $W^+$ divides by them: the error peaks, like the test error of a regression with as many
parameters as observations. Cutting off all singular values below a hundredth of the largest removes
the peak, and costs nothing where there is none.

## Anchors that move

Items drawn uniformly make the average error small, not the error at the top. So spend the calls in
rounds: predict, score the best unscored items exactly, count them among the anchor items, predict
again. The regression then learns where it matters. And where there is a cheap retriever, its list
can take the place of the first draw.

## What is measured, and why it decides

Sentences of Python's language reference, as vectors of 64 numbers (TF-IDF and its singular
vectors). A small network reads two of them, $[u, v, u \odot v, |u - v|]$, and is trained to say
whether they are from the same topic: a cross-encoder that is no inner product, hence of no low rank
by construction. Its logits are the scores; what it finds best among all items is the truth. Anchor
queries, test queries and items are different sentences. Every method gets the same number of calls
for a query, calls for anchor items included. The competitor is *dense* retrieval: cosine of the
very vectors that the network reads, then exact scores for the best of them.

With 100 calls, one round with 50 anchor items must find at least 0.03 more of the best 10, and of
the best 50, than dense retrieval; five rounds must find at least 0.10 more of the best 10. With
fewer calls, or at the very best item, a single round has less to offer: that is shown, and decides
nothing. So is a scorer for which all this is useless: a soft match of words, which TF-IDF knows
nearly as well.

The reader should see one curve that rises much faster with the number of calls, and an error that
explodes where two numbers are equal, unless small singular values are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from kexue.lab import Lab, seeded
from kexue.retrieval.cur import CURIndex

Pairs = list[tuple[str, str]]
DIMENSION = 64
LENGTH = 8.0
"""Length of the vectors, at which the network's inputs are of the order of 1."""
KS = (1, 10, 50)
BUDGET = 100

DENSE, TFIDF = "dense, rerank", "TF-IDF, rerank"
ONE_ROUND, FIVE_ROUNDS, WARM = "one round", "five rounds", "five rounds, dense start"


class Sizes(NamedTuple):
    """Numbers of items, anchor queries and test queries, and steps of training."""

    items: int
    anchors: int
    tests: int
    steps: int


class Texts(NamedTuple):
    """Sentences, the topic of each, and two kinds of vectors."""

    sentences: list[str]
    topics: np.ndarray
    dense: np.ndarray
    tfidf: Any
    vectorizer: TfidfVectorizer
    terms: np.ndarray


@dataclass(frozen=True)
class Task:
    """A scorer, the sentences that play each part, the truth and the lists of cheap retrievers."""

    index: CURIndex
    scorer: Callable[[Pairs], np.ndarray]
    items: list[str]
    anchors: list[str]
    tests: list[str]
    scores: np.ndarray
    lists: Mapping[str, np.ndarray]

    def best(self, k: int) -> np.ndarray:
        """Truth: the k best items of each test query."""
        return np.argsort(-self.scores, axis=1, kind="stable")[:, :k]

    def found_by_list(self, name: str, budget: int) -> list[np.ndarray]:
        """Reranking keeps every one of the best items that is in the list at all."""
        return list(self.lists[name][:, :budget])

    def found_by_search(self, budget: int, **options: Any) -> list[np.ndarray]:
        return [
            found.indices for found in self.index.search_many(self.tests, budget=budget, **options)
        ]

    def found_from_list(self, name: str, budget: int, **options: Any) -> list[np.ndarray]:
        return [
            self.index.search(query, budget=budget, initial=initial, **options).indices
            for query, initial in zip(self.tests, self.lists[name], strict=True)
        ]

    def recall(self, found: list[np.ndarray], k: int) -> float:
        """Share of the k best items that were scored."""
        hits = [len(np.intersect1d(f, b)) for f, b in zip(found, self.best(k), strict=True)]
        return float(np.mean(hits)) / k


def run(lab: Lab) -> None:
    """A cross-encoder, the number of anchor items, a scorer with nothing to gain, the costs."""
    sizes = lab.pick(
        smoke=Sizes(300, 60, 10, 50),
        quick=Sizes(1000, 150, 40, 600),
        full=Sizes(2209, 300, 100, 1500),
    )
    texts = _texts(lab, sizes)
    network = _cross_encoder(lab, texts, sizes.steps)
    task = _task(lab, texts, sizes, _reader(texts, network))
    recall = _methods(lab, task, "Cross-encoder", (50, BUDGET))
    at_budget = f"{BUDGET} calls, one round of 50 anchor items against dense: recall at"
    one, five, dense = (recall[name, BUDGET] for name in (ONE_ROUND, FIVE_ROUNDS, DENSE))
    lab.claim(f"{at_budget} 50", one[50] - dense[50], ">=", 0.03)
    lab.claim(f"{at_budget} 10", one[10] - dense[10], ">=", 0.03)
    lab.claim(
        f"{BUDGET} calls, five rounds against dense: recall at 10", five[10] - dense[10], ">=", 0.10
    )
    _calls(lab, task, sizes, five[10])
    _numbers_of_anchors(lab, task)
    _nothing_to_gain(lab, texts, sizes)


def _texts(lab: Lab, sizes: Sizes) -> Texts:
    """As many sentences as the parts need, in random order."""
    from pydoc_data.topics import topics

    topic_of: dict[str, int] = {}
    for number, name in enumerate(sorted(topics)):
        for sentence in lab.data.sentences(topics[name]):
            if 40 <= len(sentence) <= 300:
                topic_of.setdefault(sentence, number)
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    everything = list(topic_of)
    weights = vectorizer.fit_transform(everything)
    svd = TruncatedSVD(DIMENSION, random_state=lab.seed)
    dense = svd.fit_transform(weights)
    dense *= LENGTH / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    with_words = np.flatnonzero(weights.getnnz(axis=1))
    n = sizes.items + sizes.anchors + sizes.tests
    chosen = np.random.default_rng(lab.seed).permutation(with_words)[:n]
    return Texts(
        [everything[i] for i in chosen],
        np.array(list(topic_of.values()))[chosen],
        dense[chosen].astype(np.float32),
        weights[chosen],
        vectorizer,
        svd.components_.T * svd.singular_values_,
    )


def _features(u: Tensor, v: Tensor) -> Tensor:
    return torch.cat([u, v, u * v, (u - v).abs()], dim=-1)


def _cross_encoder(lab: Lab, texts: Texts, steps: int) -> nn.Module:
    """A network that says whether two sentences are of one topic."""
    vectors = torch.from_numpy(texts.dense).to(lab.device)
    topics = texts.topics
    rng = np.random.default_rng([lab.seed, 1])
    with seeded(lab.seed):
        network = nn.Sequential(
            nn.Linear(4 * DIMENSION, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(),
            nn.Linear(128, 1),
        ).to(lab.device)  # fmt: skip

    by_topic = np.argsort(topics, kind="stable")
    starts, counts = np.searchsorted(topics[by_topic], topics), np.bincount(topics)[topics]

    def pairs(size: int) -> tuple[np.ndarray, np.ndarray]:
        """Half of them from one topic by design, the other half at random."""
        one = rng.integers(len(topics), size=size)
        other = rng.integers(len(topics), size=size)
        half = one[: size // 2]
        other[: size // 2] = by_topic[starts[half] + rng.integers(counts[half])]
        return one, other

    def train() -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        progress = lab.progress(range(steps), "cross-encoder")
        for _ in progress:
            one, other = pairs(512)
            same = torch.from_numpy(topics[one] == topics[other]).float().to(lab.device)
            logits = network(_features(vectors[one], vectors[other]))[:, 0]
            loss = binary_cross_entropy_with_logits(logits, same)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.metric(loss=loss.detach())

    return lab.trained("cross-encoder", network, train, inputs={"steps": steps})


def _reader(texts: Texts, network: nn.Module) -> Callable[[Pairs], np.ndarray]:
    """The scorer: takes pairs of sentences, returns logits."""
    place = next(network.parameters()).device
    vectors = torch.from_numpy(texts.dense).to(place)
    number = {sentence: i for i, sentence in enumerate(texts.sentences)}

    @torch.no_grad()
    def read(pairs: Pairs) -> np.ndarray:
        one, other = np.array([(number[q], number[k]) for q, k in pairs]).T
        return network(_features(vectors[one], vectors[other]))[:, 0].cpu().numpy()

    return read


def _word_matcher(texts: Texts) -> Callable[[Pairs], np.ndarray]:
    """A lexical scorer: how well each word of the query is met by one of the item's.

    Sum over the query's words of their IDF weights times the largest cosine to a word of the item.
    """
    words = texts.terms / np.maximum(np.linalg.norm(texts.terms, axis=1, keepdims=True), 1e-12)
    idf = texts.vectorizer.idf_
    number = {sentence: i for i, sentence in enumerate(texts.sentences)}
    matrix = texts.tfidf.tocsr()
    words_of = np.split(matrix.indices, matrix.indptr[1:-1])

    def match(pairs: Pairs) -> np.ndarray:
        (query,) = {q for q, _ in pairs}
        asked = words_of[number[query]]
        offered = [words_of[number[item]] for _, item in pairs]
        starts = np.cumsum([0, *map(len, offered[:-1])])
        cosines = words[asked] @ words[np.concatenate(offered)].T
        return idf[asked] @ np.maximum.reduceat(cosines, starts, axis=1) / idf[asked].sum()

    return match


def _task(
    lab: Lab, texts: Texts, sizes: Sizes, scorer: Callable[[Pairs], np.ndarray], name: str = ""
) -> Task:
    n_anchors, n_tests = sizes.anchors, sizes.tests
    anchors, tests = texts.sentences[:n_anchors], texts.sentences[n_anchors : n_anchors + n_tests]
    items = texts.sentences[n_anchors + n_tests :]
    index = CURIndex(scorer, items, anchors, batch_size=1024).build()
    progress = lab.progress(tests, f"the truth {name}".strip())
    scores = np.array([scorer([(query, item) for item in items]) for query in progress])
    of_tests, of_items = slice(n_anchors, n_anchors + n_tests), slice(n_anchors + n_tests, None)
    lists = {}
    for method, vectors in ((DENSE, texts.dense), (TFIDF, texts.tfidf)):
        similar = vectors[of_tests] @ vectors[of_items].T
        similar = similar.toarray() if hasattr(similar, "toarray") else similar
        lists[method] = np.argsort(-similar, axis=1, kind="stable")
    return Task(index, scorer, items, anchors, tests, scores, lists)


def _methods(
    lab: Lab, task: Task, name: str, budgets: tuple[int, ...]
) -> dict[tuple[str, int], dict[int, float]]:
    """Recall of every method with each number of calls, as a table."""
    recall = {}
    rows = []
    n_first = {budget: (budget // 4, budget // 2, 3 * budget // 4) for budget in budgets}
    for budget in lab.progress(budgets, name):
        k = min(max(KS), budget)
        ways: dict[str, list[np.ndarray]] = {
            DENSE: task.found_by_list(DENSE, budget),
            TFIDF: task.found_by_list(TFIDF, budget),
        }
        for n in n_first[budget]:
            way = ONE_ROUND if n == budget // 2 else f"{ONE_ROUND}, {n} anchor items"
            ways[way] = task.found_by_search(budget, k=k, n_anchor_items=n)
        ways["two rounds"] = task.found_by_search(budget, k=k, rounds=2)
        ways[FIVE_ROUNDS] = task.found_by_search(budget, k=k, rounds=5)
        ways[WARM] = task.found_from_list(DENSE, budget, k=k, rounds=5)
        for way, found in ways.items():
            recall[way, budget] = {k: task.recall(found, k) for k in KS}
            label = f"{way}, {budget // 2} anchor items" if way == ONE_ROUND else way
            at = {f"at {k}": recall[way, budget][k] for k in KS}
            rows.append({"calls": budget, "method": label, **at})
    lab.table(
        name,
        rows,
        f"Recall: share of the truly best items that are found, mean of {len(task.tests)} queries "
        f"to {len(task.items)} items, with {len(task.anchors)} anchor queries. All calls for a "
        "query count.",
    )
    return recall


def _calls(lab: Lab, task: Task, sizes: Sizes, reached: float) -> None:
    """Recall against the number of calls; what dense retrieval needs for the same; when it pays."""
    budgets = [b for b in (20, 35, 50, 70, 100, 140, 200, 300, 400) if b < len(task.items) // 2]
    if lab.budget == "smoke":
        budgets = budgets[2:5:2]
    curves: dict[str, list[float]] = {
        way: [] for way in (DENSE, TFIDF, ONE_ROUND, FIVE_ROUNDS, WARM)
    }
    for budget in lab.progress(budgets, "numbers of calls"):
        curves[DENSE].append(task.recall(task.found_by_list(DENSE, budget), 10))
        curves[TFIDF].append(task.recall(task.found_by_list(TFIDF, budget), 10))
        curves[ONE_ROUND].append(task.recall(task.found_by_search(budget, k=10), 10))
        curves[FIVE_ROUNDS].append(task.recall(task.found_by_search(budget, k=10, rounds=5), 10))
        curves[WARM].append(task.recall(task.found_from_list(DENSE, budget, k=10, rounds=5), 10))
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for (way, curve), style in zip(curves.items(), ("--", ":", "-", "-", "-"), strict=True):
        marker = "o" if style == "-" else None
        axes.plot(budgets, curve, style, marker=marker, markersize=4, label=way)
    axes.set(xscale="log", xlabel="calls for a query", ylabel="recall at 10", ylim=(0, 1.02))
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    lab.figure(
        "calls",
        figure,
        "Share of the ten best items that are found. Dotted and dashed: cheap retrievers whose "
        "list is reranked; lines with points: CUR, which knows nothing but scores, and in one case "
        "where to start.",
    )
    needed = next(
        (b for b in range(1, len(task.items) + 1)
         if task.recall(task.found_by_list(DENSE, b), 10) >= reached), len(task.items)
    )  # fmt: skip
    offline = sizes.anchors * len(task.items)
    lab.observe(
        f"calls that dense retrieval needs for the recall at 10 of five rounds, over {BUDGET}",
        needed / BUDGET,
        ">=",
        4,
    )
    rows = [
        {"instead of": instead, "index": offline, "saved": saved,
         "pays after": math.ceil(offline / saved) if saved > 0 else None}
        for instead, saved in (
            (f"dense, {needed} calls, same recall", needed - BUDGET),
            ("all items, exactly", len(task.items) - BUDGET),
        )
    ]  # fmt: skip
    lab.table(
        "Costs",
        rows,
        f"In calls: {sizes.anchors} anchor queries are scored against {len(task.items)} items "
        f"once, for the index; what five rounds with {BUDGET} calls save a query; and the number "
        "of queries after which the index has paid.",
    )


def _numbers_of_anchors(lab: Lab, task: Task) -> None:
    """The error of the prediction, with and without small singular values."""
    n_anchors = lab.pick(smoke=40, quick=100, full=100)
    index = CURIndex(task.scorer, task.items, task.anchors[:n_anchors], batch_size=1024).build()
    numbers = sorted({round(n_anchors * s) for s in
                      (0.25, 0.5, 0.65, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2)})  # fmt: skip
    cuts = {"all kept": 1e-12, "below 1e-2 cut off": 1e-2}
    errors: dict[str, list[float]] = {name: [] for name in cuts}
    for number in lab.progress(numbers, "anchor items"):
        rng = np.random.default_rng([lab.seed, number])
        anchors = rng.choice(len(task.items), number, replace=False)
        for name, cut in cuts.items():
            index.rcond = cut
            rest = [index.approximate_scores(anchors, row[anchors]) - row for row in task.scores]
            errors[name].append(float(np.linalg.norm(rest) / np.linalg.norm(task.scores)))
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for (name, curve), style in zip(errors.items(), ("--o", "-o"), strict=True):
        axes.plot(numbers, curve, style, markersize=4, label=f"singular values: {name}")
    axes.axvline(n_anchors, color="black", linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xlabel="anchor items", ylabel="relative error")
    axes.legend(frameon=False, fontsize="small")
    lab.figure(
        "condition",
        figure,
        f"Error of the predicted scores with {n_anchors} anchor queries (dotted line). Where there "
        "are as many anchor items, the inverse amplifies noise, unless it is cut off.",
    )
    lab.table(
        "Conditioning",
        [
            {"anchor items": n, **{name: errors[name][i] for name in cuts}}
            for i, n in enumerate(numbers)
        ],
        f"Relative error of the prediction, {n_anchors} anchor queries, for two ways of inverting "
        "the intersection.",
    )
    peak = numbers.index(n_anchors)
    lab.observe(
        "as many anchor items as anchor queries: error with all singular values over that with "
        "small ones cut off",
        errors["all kept"][peak] / errors["below 1e-2 cut off"][peak],
        ">",
        2,
    )


def _nothing_to_gain(lab: Lab, texts: Texts, sizes: Sizes) -> None:
    """The case against: a scorer that agrees with a cheap retriever."""
    task = _task(lab, texts, sizes, _word_matcher(texts), "of the word matcher")
    recall = _methods(lab, task, "Word matcher", (BUDGET,))
    lab.observe(
        f"word matcher, {BUDGET} calls, five rounds against TF-IDF: recall at 10",
        recall[FIVE_ROUNDS, BUDGET][10] - recall[TFIDF, BUDGET][10],
        "<",
        0,
    )
