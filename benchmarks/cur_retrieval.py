"""CUR retrieval: time of a query beside its calls, cost of keeping scores, and CrossEncoder.rank.

The authors' research code (iesl/anncur) is no package; its formula is written out here instead.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.timing import compare, measure
from kexue.linalg.cur import cur_decomposition
from kexue.retrieval.cur import CURIndex, SearchResult

N_ANCHOR_QUERIES, N_ITEMS, N_ANCHOR_ITEMS = 500, 100_000, 100


def main() -> None:
    index, scores = large_index()
    one_round(index, scores)
    five_rounds(index)
    against_the_formula(index, scores)
    keeping()
    decomposition()
    cross_encoder()


def large_index() -> tuple[CURIndex, np.ndarray]:
    """An index whose scorer takes no time: a row that is looked up."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((N_ANCHOR_QUERIES + 1, 40), dtype=np.float32)
    scores = left @ rng.standard_normal((40, N_ITEMS), dtype=np.float32)
    scores += 0.1 * rng.standard_normal(scores.shape, dtype=np.float32)

    def scorer(pairs: list[tuple[int, int]]) -> np.ndarray:
        return scores[pairs[0][0], [item for _, item in pairs]]

    index = CURIndex(
        scorer, range(N_ITEMS), range(N_ANCHOR_QUERIES), batch_size=N_ITEMS, block_size=N_ITEMS
    )
    return index.build(), scores


def one_round(index: CURIndex, scores: np.ndarray) -> None:
    query = N_ANCHOR_QUERIES
    options = {"budget": 2 * N_ANCHOR_ITEMS, "n_anchor_items": N_ANCHOR_ITEMS}
    seconds = measure(lambda: index.search(query, 10, **options))
    print(f"one round, fixed anchor items: {seconds * 1e3:.1f} ms a query, allowed 30 ms")
    first = np.random.default_rng(1).choice(N_ITEMS, N_ANCHOR_ITEMS, replace=False)
    seconds = measure(lambda: index.search(query, 10, initial=first, **options))
    print(f"one round, anchor items of its own: {seconds * 1e3:.1f} ms a query, allowed 90 ms")


def five_rounds(index: CURIndex) -> None:
    query, budget = N_ANCHOR_QUERIES, 2 * N_ANCHOR_ITEMS
    seconds = measure(lambda: index.search(query, 10, budget=budget, rounds=5), repeats=3)
    print(f"five rounds: {seconds / 5 * 1e3:.1f} ms a round, allowed 90 ms")


def against_the_formula(index: CURIndex, scores: np.ndarray) -> None:
    anchors = np.random.default_rng(1).choice(N_ITEMS, N_ANCHOR_ITEMS, replace=False)
    known = scores[N_ANCHOR_QUERIES, anchors].astype(np.float64)
    h = scores[:N_ANCHOR_QUERIES]

    def formula() -> np.ndarray:
        return known @ np.linalg.pinv(h[:, anchors].astype(np.float64), rcond=1e-2) @ h

    compare(
        f"prediction, {N_ANCHOR_QUERIES} x {N_ITEMS}, {N_ANCHOR_ITEMS} anchor items, against the "
        "formula in mixed precision",
        lambda: index.approximate_scores(anchors, known),
        formula,
        agree=1e-4,
        repeats=3,
    )


def keeping() -> None:
    """Time of everything but the scorer, a pair, on disk: 1 % of a millisecond is 10 µs."""
    n_queries, n_items = 50, 20_000
    ready = np.ones(256)

    def scorer(pairs: list[tuple[int, int]]) -> np.ndarray:
        return ready[: len(pairs)]

    with TemporaryDirectory() as folder:
        index = CURIndex(scorer, range(n_items), range(n_queries), path=folder)
        start = time.perf_counter()
        index.build()
        built = time.perf_counter() - start
        start = time.perf_counter()
        CURIndex(scorer, range(n_items), range(n_queries), path=folder)
        opened = time.perf_counter() - start
    each = built / (n_queries * n_items)
    print(
        f"keeping a score on disk: {each * 1e6:.2f} µs, allowed 10 µs; opening and checking "
        f"{n_queries * n_items} scores: {opened * 1e3:.0f} ms",
        flush=True,
    )


def decomposition() -> None:
    """Pivoted columns against LAPACK by scipy, which decomposes to the end."""
    import scipy.linalg

    matrix = np.random.default_rng(0).standard_normal((400, 600))
    cur = cur_decomposition(matrix, n_columns=30, n_rows=30)
    pivots = scipy.linalg.qr(matrix, mode="r", pivoting=True)[1][:30]
    if not np.array_equal(cur.column_indices, pivots):
        raise AssertionError(f"pivots differ: {cur.column_indices} and {pivots}")
    compare(
        "30 columns and 30 rows of 400 x 600 by pivoting, against scipy's pivoted QR of both",
        lambda: cur_decomposition(matrix, n_columns=30, n_rows=30),
        lambda: [scipy.linalg.qr(m, mode="r", pivoting=True) for m in (matrix, matrix.T)],
        agree=None,
        repeats=3,
    )


def cross_encoder() -> None:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        print("sentence-transformers is not installed: no comparison with CrossEncoder.rank")
        return
    words = [f"w{i}" for i in range(60)]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 12)) for _ in range(2064)]
    anchors, documents, query = texts[:63], texts[64:], texts[63]
    with TemporaryDirectory() as folder:
        write_small_bert(Path(folder), words)
        model = CrossEncoder(folder, device="cpu")

    def ranked(n: int) -> list[dict[str, Any]]:
        return model.rank(query, documents[:n], top_k=10)

    def value(found: Any) -> np.ndarray:
        if isinstance(found, SearchResult):
            return found.scores
        return np.array([hit["score"] for hit in found])

    small = CURIndex(model, documents[:300], anchors[:2]).build()
    compare(
        "the ten best of 300, all scored, against CrossEncoder.rank",
        lambda: small.search(query, 10, budget=300),
        lambda: ranked(300),
        agree=1e-5,
        value=value,
        repeats=3,
    )
    index = CURIndex(model, documents, anchors).build()
    found = index.search(query, 10, budget=200, rounds=5)
    best = [hit["corpus_id"] for hit in ranked(len(documents))]
    comparison = compare(
        f"the ten best of {len(documents)}, five rounds with 200 calls, against CrossEncoder.rank",
        lambda: index.search(query, 10, budget=200, rounds=5),
        lambda: ranked(len(documents)),
        agree=None,
        repeats=3,
    )
    shared = len(set(found.indices.tolist()) & set(best))
    print(
        f"{comparison.ratio:.1f}x faster with a tenth of the calls, {shared} of the best 10 found"
    )


def write_small_bert(folder: Path, words: list[str]) -> None:
    """A BERT with random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    parts: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=128, num_labels=1,
            max_position_embeddings=64, initializer_range=0.1,
        )
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
