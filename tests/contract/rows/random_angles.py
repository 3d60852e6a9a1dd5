"""Rows of `kexue.stats.angles`."""

import numpy as np

from contract.row import Arguments, Row
from kexue.stats.angles import (
    CosineSummary,
    OrthogonalityTestResult,
    RandomAngle,
    RandomCosine,
    cosine_summary,
    orthogonality_test,
)

ROWS_OF_VECTORS = [[1.0, 0.0], [3.0, 4.0], [-1.0, 2.0]]
ANY_POINT = "NaN at a point gives NaN, and infinity lies outside the support, as in scipy"
ANY_SHAPE = "a point may be a scalar or an array of any shape"


def points(low: float, high: float) -> Arguments:
    return {"dimension": 7, "x": np.linspace(low, high, 6).reshape(3, 2)}


def vectors(rng: np.random.Generator) -> Arguments:
    return {"x": rng.standard_normal((9, 4)), "block_size": 4}


def law(kind: type, dimension: object, x: object, random_state: object = 0) -> list[object]:
    angle_or_cosine = kind(dimension)
    return [
        angle_or_cosine.logpdf(x),
        angle_or_cosine.cdf(x),
        angle_or_cosine.logsf(x),
        angle_or_cosine.rvs(5, random_state),
    ]


WRONG_DIMENSION = {
    "dimension below 2": lambda given: {**given, "dimension": 1},
    "fractional dimension": lambda given: {**given, "dimension": 2.5},
    "one bad dimension among good ones": lambda given: {**given, "dimension": [2, np.nan]},
    "dimension in words": lambda given: {**given, "dimension": "seven"},
}
WRONG_VECTORS = {
    "one vector": lambda given: {**given, "x": given["x"][:1]},
    "one coordinate": lambda given: {**given, "x": given["x"][:, :1]},
    "a vector of zeros": lambda given: {**given, "x": given["x"] * ([[0.0]] + [[1.0]] * 8)},
    "no block": lambda given: {**given, "block_size": 0},
    "words": lambda given: {**given, "x": [["a", "b"], ["c", "d"]]},
}

ROWS = [
    Row(
        name="kexue.stats.angles.law.RandomAngle",
        make=lambda rng: points(0.1, 3.0),
        call=lambda **given: law(RandomAngle, **given),
        arrays=("x",),
        backends=("numpy",),
        batched=("x",),
        seeded="random_state",
        wrong=WRONG_DIMENSION,
        instance=lambda: RandomAngle([2, 7]),
        without={"not_finite_is_refused": ANY_POINT, "wrong_rank_is_refused": ANY_SHAPE},
    ),
    Row(
        name="kexue.stats.angles.law.RandomCosine",
        make=lambda rng: points(-0.95, 0.9),
        call=lambda **given: law(RandomCosine, **given),
        arrays=("x",),
        backends=("numpy",),
        batched=("x",),
        seeded="random_state",
        wrong=WRONG_DIMENSION,
        instance=lambda: RandomCosine(7),
        without={"not_finite_is_refused": ANY_POINT, "wrong_rank_is_refused": ANY_SHAPE},
    ),
    Row(
        name="kexue.stats.angles.pairs.cosine_summary",
        make=vectors,
        arrays=("x",),
        wrong=WRONG_VECTORS,
    ),
    Row(
        name="kexue.stats.angles.pairs.orthogonality_test",
        make=lambda rng: {**vectors(rng), "method": "rayleigh"},
        arrays=("x",),
        wrong={
            **WRONG_VECTORS,
            "unknown method": lambda given: {**given, "method": "median"},
        },
    ),
    Row(
        name="kexue.stats.angles.pairs.CosineSummary",
        make=lambda rng: vars(cosine_summary(ROWS_OF_VECTORS)),
        instance=lambda: cosine_summary(ROWS_OF_VECTORS),
        call=CosineSummary,
    ),
    Row(
        name="kexue.stats.angles.pairs.OrthogonalityTestResult",
        make=lambda rng: vars(orthogonality_test(ROWS_OF_VECTORS)),
        instance=lambda: orthogonality_test(ROWS_OF_VECTORS),
        call=OrthogonalityTestResult,
    ),
    Row(
        name="kexue.stats.angles.pairs.max_cosine_quantile",
        make=lambda rng: {"dimension": 64, "n_vectors": 1797, "probability": 0.99},
        wrong={
            "dimension below 2": lambda given: {**given, "dimension": 1},
            "several dimensions": lambda given: {**given, "dimension": [64, 128]},
            "one vector": lambda given: {**given, "n_vectors": 1},
            "half a vector": lambda given: {**given, "n_vectors": 2.5},
            "certainty": lambda given: {**given, "probability": 1.0},
            "NaN": lambda given: {**given, "probability": np.nan},
        },
    ),
    Row(
        name="kexue.stats.angles.pairs.max_vectors",
        make=lambda rng: {"dimension": 64, "max_cosine": 0.3},
        wrong={
            "dimension below 2": lambda given: {**given, "dimension": 1},
            "cosine 0": lambda given: {**given, "max_cosine": 0.0},
            "cosine above 1": lambda given: {**given, "max_cosine": 1.5},
            "certain failure": lambda given: {**given, "failure_probability": 1.0},
            "complex cosine": lambda given: {**given, "max_cosine": 0.5j},
        },
    ),
]
