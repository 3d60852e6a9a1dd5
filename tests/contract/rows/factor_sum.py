"""Rows of `kexue.arithmetic.factor_sum`."""

import numpy as np

from contract.row import Arguments, Row
from kexue.arithmetic.factor_sum import FactorSum, factor_sum, factor_sum_bounds
from kexue.arithmetic.factor_sum.arrays import FactorSumBatch, factor_sum_batch

WRONG_NUMBER = {
    "a negative number": lambda given: {**given, "n": -1},
    "a float": lambda given: {**given, "n": 12.0},
    "a truth value": lambda given: {**given, "n": True},
    "words": lambda given: {**given, "n": "twelve"},
    "nothing": lambda given: {**given, "n": None},
}


def layout() -> Arguments:
    best = factor_sum(130)
    return {
        "n": best.n,
        "a": best.a,
        "b": best.b,
        "c": best.c,
        "total": best.total,
        "lower_bound": best.lower_bound,
        "candidates": best.candidates,
    }


ROWS = [
    Row(
        name="kexue.arithmetic.factor_sum.search.factor_sum",
        make=lambda rng: {"n": int(rng.integers(10**15)), "method": "adaptive"},
        wrong={
            **WRONG_NUMBER,
            "unknown method": lambda given: {**given, "method": "sixth_root"},
            "no candidate": lambda given: {**given, "max_candidates": 0},
            "half a candidate": lambda given: {**given, "max_candidates": 0.5},
            "a budget for another method": lambda given: {
                **given,
                "method": "fourth_root",
                "max_candidates": 9,
            },
        },
    ),
    Row(
        name="kexue.arithmetic.factor_sum.search.factor_sum_minimizers",
        make=lambda rng: {"n": int(rng.integers(10**12))},
        wrong=WRONG_NUMBER,
    ),
    Row(
        name="kexue.arithmetic.factor_sum.search.factor_sum_bounds",
        make=lambda rng: {"n": int(rng.integers(10**12))},
        wrong=WRONG_NUMBER,
    ),
    Row(
        name="kexue.arithmetic.factor_sum.search.FactorSum",
        make=lambda rng: layout(),
        instance=lambda: factor_sum(130),
        call=FactorSum,
    ),
    Row(
        name="kexue.arithmetic.factor_sum.search.FactorSumBounds",
        make=lambda rng: {"lower": 23, "upper": 28},
        instance=lambda: factor_sum_bounds(130),
    ),
    Row(
        name="kexue.arithmetic.factor_sum.arrays.factor_sum_table",
        make=lambda rng: {"limit": 100},
        wrong={
            "a negative limit": lambda given: {"limit": -1},
            "a float": lambda given: {"limit": 1e6},
            "a truth value": lambda given: {"limit": True},
        },
    ),
    Row(
        name="kexue.arithmetic.factor_sum.arrays.factor_sum_batch",
        make=lambda rng: {"n": rng.integers(10**15, size=(5, 3))},
        batched=("n",),
        wrong={
            "real numbers": lambda given: {"n": given["n"].astype(np.float64)},
            "truth values": lambda given: {"n": given["n"] > 0},
            "one negative number": lambda given: {"n": np.array([7, -1])},
            "one number too large": lambda given: {"n": np.array([7, 2**62])},
            "a list of real numbers": lambda given: {"n": [1, 2.5]},
        },
    ),
    Row(
        name="kexue.arithmetic.factor_sum.arrays.FactorSumBatch",
        make=lambda rng: vars(factor_sum_batch(np.array([10, 130]))),
        instance=lambda: factor_sum_batch(np.array([10, 130])),
        call=FactorSumBatch,
    ),
]
