"""Rows of `kexue.linalg.cur` and `kexue.retrieval.cur`."""

from tempfile import TemporaryDirectory

import numpy as np

from contract.row import Arguments, Row
from kexue.linalg.cur import CURDecomposition, cur_decomposition
from kexue.retrieval.cur import CURIndex, SearchResult, stored_shape

SCORES = np.random.default_rng(0).standard_normal((6, 12))

COMPARISONS = (
    "same_input_same_result", "numpy_equals_torch", "float32_agrees_with_float64",
    "non_contiguous_input",
)  # fmt: skip


def matrices(rng: np.random.Generator) -> Arguments:
    return {"a": rng.standard_normal((2, 6, 8))}


def index(**options: object) -> CURIndex:
    def scorer(pairs: list[tuple[int, int]]) -> list[float]:
        return [SCORES[pair] for pair in pairs]

    return CURIndex(scorer, range(12), range(5), **options)


def search(random_state: int, **options: object) -> list[object]:
    found = index(**options).build().search(5, k=3, budget=6, random_state=random_state)
    return [found.indices, found.scores, found.scored_indices]


def create_and_look() -> tuple[int, int] | None:
    with TemporaryDirectory() as folder:
        index(path=folder)
        return stored_shape(folder)


OUT_OF_RANGE = {
    "no column": lambda given: {**given, "n_columns": 0},
    "more rows than there are": lambda given: {**given, "n_rows": 7},
    "number and indices": lambda given: {**given, "row_indices": [0]},
    "neither number nor indices": lambda given: {**given, "n_rows": None},
    "unknown selection": lambda given: {**given, "selection": "best"},
    "unknown core": lambda given: {**given, "core": "middle"},
    "fractional number": lambda given: {**given, "n_rows": 1.5},
    "rcond of one": lambda given: {**given, "rcond": 1.0},
    "one dimension": lambda given: {**given, "a": given["a"][0, 0]},
}

ROWS = [
    Row(
        name="kexue.linalg.cur.leverage_scores",
        make=lambda rng: {**matrices(rng), "rank": 3},
        arrays=("a",),
        batched=("a",),
        differentiable=("a",),
        wrong={
            "rank 0": lambda given: {**given, "rank": 0},
            "rank above both dimensions": lambda given: {**given, "rank": 7},
            "batch axis": lambda given: {**given, "axis": 0},
            "no columns": lambda given: {**given, "a": given["a"][..., :0]},
        },
    ),
    Row(
        name="kexue.linalg.cur.select_columns",
        make=lambda rng: {**matrices(rng), "n": 4, "selection": "deim"},
        arrays=("a",),
        batched=("a",),
        wrong={
            "none": lambda given: {**given, "n": 0},
            "more than there are": lambda given: {**given, "n": 9, "selection": "qr"},
            "unknown selection": lambda given: {**given, "selection": "first"},
            "rank 0": lambda given: {**given, "rank": 0},
        },
    ),
    Row(
        name="kexue.linalg.cur.select_columns",
        make=lambda rng: {**matrices(rng), "n": 4, "selection": "leverage"},
        arrays=("a",),
        seeded="random_state",
        without=dict.fromkeys(COMPARISONS, "draws without a random_state differ"),
    ),
    Row(
        name="kexue.linalg.cur.cur_decomposition",
        make=lambda rng: {**matrices(rng), "n_columns": 3, "n_rows": 2},
        arrays=("a",),
        batched=("a",),
        differentiable=("a",),
        # The intersection's condition number, some tens, multiplies the rounding of its entries.
        float32_rtol=1e-4,
        wrong=OUT_OF_RANGE,
    ),
    Row(
        name="kexue.linalg.cur.CURDecomposition",
        make=lambda rng: vars(cur_decomposition(SCORES, n_columns=3, n_rows=2)),
        call=lambda **given: CURDecomposition(**given).reconstruct(),
        instance=lambda: cur_decomposition(SCORES, n_columns=3, n_rows=2),
    ),
    Row(
        name="kexue.retrieval.cur.index.CURIndex",
        make=lambda rng: {"random_state": 0},
        call=search,
        seeded="random_state",
        wrong={
            "no batch": lambda given: {**given, "batch_size": 0},
            "no block": lambda given: {**given, "block_size": 0},
            "rcond of one": lambda given: {**given, "rcond": 1.0},
        },
    ),
    Row(
        name="kexue.retrieval.cur.index.SearchResult",
        make=lambda rng: vars(index().build().search(5, k=3, budget=6)),
        call=SearchResult,
        instance=lambda: index().build().search(5, k=3, budget=6),
    ),
    Row(
        name="kexue.retrieval.cur.storage.stored_shape",
        make=lambda rng: {},
        call=create_and_look,
    ),
]
