"""Rows of `kexue.arithmetic.mitchell`."""

from __future__ import annotations

import numpy as np

from contract.row import Arguments, Row
from kexue.arithmetic.mitchell import MitchellLinear, RelativeErrorBounds

SPECIAL_VALUES = "NaN and infinity pass through as in IEEE 754 arithmetic"
ANY_SHAPE = "an operand may be a number or an array of any shape"


def positive(rng: np.random.Generator) -> Arguments:
    return {"x": rng.lognormal(0.0, 1.5, (4, 3))}


def pair(rng: np.random.Generator) -> Arguments:
    return {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal((4, 3))}


def matrices(rng: np.random.Generator) -> Arguments:
    return {"a": rng.standard_normal((3, 4, 5)), "b": rng.standard_normal((3, 5, 2))}


def layer(rng: np.random.Generator) -> Arguments:
    return {
        "input": rng.standard_normal((4, 5)),
        "weight": rng.standard_normal((3, 5)),
        "bias": rng.standard_normal(3),
    }


def whole_numbers(rng: np.random.Generator) -> Arguments:
    a, b = rng.integers(-(2**31) + 1, 2**31, (2, 6))
    return {"a": a, "b": b, "terms": 2}


WRONG_OPTIONS = {
    "unknown correction": lambda given: {**given, "correction": "best"},
    "constant of 1": lambda given: {**given, "constant": 1.0},
    "seven bits": lambda given: {**given, "table_bits": 7},
    "terms below 0": lambda given: {**given, "terms": -1},
}
WRONG_BACKWARD = {"unknown backward": lambda given: {**given, "backward": "none"}}
WRONG_PAIR = {
    "shapes that do not broadcast": lambda given: {**given, "b": given["b"][:, :2]},
    "words": lambda given: {**given, "b": "two"},
    "truth values": lambda given: {**given, "b": given["b"] > 0},
}

ROWS = [
    *(
        Row(
            name=f"kexue.arithmetic.mitchell.elementwise.{name}",
            make=positive,
            arrays=("x",),
            batched=("x",),
            wrong={"whole numbers": lambda given: {"x": given["x"].astype("int64")}},
            without={"not_finite_is_refused": SPECIAL_VALUES, "wrong_rank_is_refused": ANY_SHAPE},
        )
        for name in ("log2", "exp2", "sqrt")
    ),
    Row(
        name="kexue.arithmetic.mitchell.elementwise.multiply",
        make=pair,
        arrays=("a", "b"),
        batched=("a", "b"),
        wrong={**WRONG_PAIR, **WRONG_OPTIONS, **WRONG_BACKWARD},
        without={"not_finite_is_refused": SPECIAL_VALUES, "wrong_rank_is_refused": ANY_SHAPE},
    ),
    Row(
        name="kexue.arithmetic.mitchell.elementwise.divide",
        make=pair,
        arrays=("a", "b"),
        batched=("a", "b"),
        wrong={**WRONG_PAIR, **WRONG_BACKWARD},
        without={"not_finite_is_refused": SPECIAL_VALUES, "wrong_rank_is_refused": ANY_SHAPE},
    ),
    Row(
        name="kexue.arithmetic.mitchell.integers.multiply_integers",
        make=whole_numbers,
        batched=("a", "b"),
        wrong={
            "fractions": lambda given: {**given, "a": 1.5},
            "floats": lambda given: {**given, "a": given["a"] / 2},
            "numbers of 32 bits": lambda given: {**given, "a": given["a"] * 0 + 2**31},
            "terms below 0": lambda given: {**given, "terms": -1},
        },
    ),
    Row(
        name="kexue.arithmetic.mitchell.matrices.matmul",
        make=matrices,
        arrays=("a", "b"),
        batched=("a", "b"),
        wrong={
            "inner sizes that differ": lambda given: {**given, "a": given["a"][..., :4]},
            "batches that do not broadcast": lambda given: {**given, "a": given["a"][:2]},
            "a vector": lambda given: {**given, "a": given["a"][0, 0]},
            **WRONG_OPTIONS,
            **WRONG_BACKWARD,
        },
        without={"not_finite_is_refused": SPECIAL_VALUES},
    ),
    Row(
        name="kexue.arithmetic.mitchell.matrices.linear",
        make=layer,
        arrays=("input", "weight", "bias"),
        backends=("torch",),
        batched=("input",),
        wrong={
            "input of another width": lambda given: {**given, "input": given["input"][:, :4]},
            "bias of another length": lambda given: {**given, "bias": given["bias"][:2]},
            **WRONG_OPTIONS,
            **WRONG_BACKWARD,
        },
        without={"not_finite_is_refused": SPECIAL_VALUES},
    ),
    Row(
        name="kexue.arithmetic.mitchell.matrices.MitchellLinear",
        make=lambda rng: {"input": rng.standard_normal((4, 5))},
        module=lambda: MitchellLinear(5, 3, correction="table"),
        arrays=("input",),
        backends=("torch",),
        batched=("input",),
        # A table is a step function: an input that rounds into another cell makes a jump.
        float32_rtol=0.02,
        wrong={"input of another width": lambda given: {"input": given["input"][:, :4]}},
        without={"not_finite_is_refused": SPECIAL_VALUES},
    ),
    Row(
        name="kexue.arithmetic.mitchell.bounds.relative_error_bounds",
        make=lambda rng: {"operation": "multiply"},
        wrong={
            "unknown operation": lambda given: {"operation": "log2"},
            "a corrected root": lambda given: {"operation": "sqrt", "correction": "table"},
            **WRONG_OPTIONS,
        },
    ),
    Row(
        name="kexue.arithmetic.mitchell.bounds.RelativeErrorBounds",
        make=lambda rng: {"lower": -1 / 9, "upper": 0.0},
        instance=lambda: RelativeErrorBounds(lower=-1 / 9, upper=0.0),
    ),
]
