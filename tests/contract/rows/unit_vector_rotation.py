"""Maps between directions."""

import numpy as np

from contract.row import Arguments, Row

PAIRS, VECTORS, DIM = 3, 3, 4


def pairs(rng: np.random.Generator) -> Arguments:
    return {"a": rng.normal(size=(PAIRS, DIM)), "b": rng.normal(size=(PAIRS, DIM))}


def mapped(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(PAIRS, DIM)), **pairs(rng), "inverse": True}


def one_pair(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(VECTORS, DIM)), "a": rng.normal(size=DIM), "b": np.ones(DIM)}


WRONG_PAIRS = {
    "another dimension": lambda given: {**given, "b": given["b"][..., 1:]},
    "one dimension": lambda given: {
        name: value[..., :1] if name in "xab" else value for name, value in given.items()
    },
    "pairs of another number": lambda given: {**given, "b": given["b"][:2]},
    "a zero vector": lambda given: {**given, "a": given["a"] * [[0.0], [1.0], [1.0]]},
}
WRONG_OPTIONS = {
    "an unknown kind": lambda given: {**given, "kind": "mirror"},
    "a fraction of a reflection": lambda given: {**given, "kind": "reflection", "fraction": 0.5},
    "a fraction that is not finite": lambda given: {**given, "fraction": np.nan},
    "fractions for other pairs": lambda given: {**given, "fraction": [0.1, 0.2]},
    "a complex fraction": lambda given: {**given, "fraction": 0.5j},
}
CARRIED_THROUGH = "x is mapped, not judged: NaN and infinity come out as NaN, in their own row"

ROWS = [
    Row(
        name="kexue.linalg.rotation.alignment_matrix",
        make=pairs,
        arrays=("a", "b"),
        batched=("a", "b"),
        differentiable=("a", "b"),
        wrong={**WRONG_PAIRS, **WRONG_OPTIONS},
        compiles=True,
    ),
    Row(
        name="kexue.linalg.rotation.alignment_matrix",
        make=lambda rng: {**pairs(rng), "fraction": rng.normal(size=PAIRS)},
        arrays=("a", "b"),
        batched=("a", "b", "fraction"),
        differentiable=("a", "b", "fraction"),
    ),
    Row(
        name="kexue.linalg.rotation.align",
        make=mapped,
        arrays=("a", "b"),
        batched=("x", "a", "b"),
        differentiable=("x", "a", "b"),
        compiles=True,
        wrong={
            **WRONG_PAIRS,
            **WRONG_OPTIONS,
            "an x of another dimension": lambda given: {**given, "x": given["x"][:, 1:]},
        },
    ),
    Row(
        name="kexue.linalg.rotation.align",
        make=one_pair,
        arrays=("x", "a", "b"),
        batched=("x",),
        differentiable=("x", "a", "b"),
        without={"not_finite_is_refused": CARRIED_THROUGH},
    ),
    Row(
        name="kexue.linalg.rotation.angle_between",
        make=pairs,
        arrays=("a", "b"),
        batched=("a", "b"),
        differentiable=("a", "b"),
        compiles=True,
        wrong=WRONG_PAIRS,
    ),
]
