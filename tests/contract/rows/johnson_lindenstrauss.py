"""Rows of `kexue.stats.projection`."""

import numpy as np

from contract.row import Arguments, Row
from kexue.stats.projection import (
    DistortionSummary,
    GaussianRandomProjection,
    HadamardRandomProjection,
    SparseRandomProjection,
    distortion,
    hadamard_transform,
)

NO_SYNC = "a tensor is not read back to look for NaN, which spreads as in any torch product"
VECTOR = "a tensor may have any leading dimensions, or none; a scalar is refused below"
COMPONENTS, FEATURES = 5, 12


def data(rng: np.random.Generator) -> Arguments:
    return {"X": rng.standard_normal((4, FEATURES)), "random_state": 3}


def points(rng: np.random.Generator) -> Arguments:
    X = rng.standard_normal((9, 6))
    return {"X": X, "Z": X[:, :4] * 1.2, "block_size": 4}


def projected(kind: type, X: object, **parameters: object) -> object:
    parameters = {"n_components": COMPONENTS, **parameters}
    projection = kind(**parameters).fit(X)
    return projection.transform(X), projection.transform_columns(X[:, 2:7], 2)


WRONG_LAW = {
    "eps 0": lambda given: {**given, "eps": 0.0},
    "eps 1": lambda given: {**given, "eps": 1.0},
    "eps in words": lambda given: {**given, "eps": "half"},
    "certain failure": lambda given: {**given, "failure_probability": 1.0},
}
WRONG_EVENTS = {
    "one sample": lambda given: {**given, "n_samples": 1},
    "half a sample": lambda given: {**given, "n_samples": 10.5},
    "no failure": lambda given: {**given, "failure_probability": 0.0},
    "unknown kind of event": lambda given: {**given, "preserve": "angle"},
    "unknown bound": lambda given: {**given, "bound": "tight"},
}
WRONG_MAP = {
    **WRONG_LAW,
    "no component": lambda given: {**given, "n_components": 0},
    "half a component": lambda given: {**given, "n_components": 2.5},
    "components in words": lambda given: {**given, "n_components": "many"},
    "more dimensions than features": lambda given: {**given, "n_components": "auto"},
    "one row": lambda given: {**given, "X": given["X"][0]},
}


def map_rows(kind: type, wrong: dict) -> list[Row]:
    shared = {
        "name": f"kexue.stats.projection.maps.{kind.__name__}",
        "make": data,
        "call": lambda **given: projected(kind, **given),
        "arrays": ("X",),
        "seeded": "random_state",
    }
    return [
        Row(
            **shared,
            batched=("X",),
            differentiable=("X",),
            wrong={**WRONG_MAP, **wrong},
            instance=lambda: kind(3, random_state=0).fit(np.ones((2, 7))),
            estimators=lambda: [kind(n_components=2, random_state=0)],
            without={
                "not_finite_is_refused": NO_SYNC,
                "empty_batch": "scikit-learn refuses numpy data without samples",
            },
        ),
        Row(**shared, backends=("numpy",)),
    ]


ROWS = [
    Row(
        name="kexue.stats.projection.bounds.johnson_lindenstrauss_min_dim",
        make=lambda rng: {"n_samples": 1000, "eps": 0.3, "failure_probability": 0.01},
        wrong={**WRONG_LAW, **WRONG_EVENTS},
    ),
    Row(
        name="kexue.stats.projection.bounds.johnson_lindenstrauss_eps",
        make=lambda rng: {"n_samples": 1000, "n_components": 500},
        wrong={
            **WRONG_EVENTS,
            "no component": lambda given: {**given, "n_components": 0},
            "several samples": lambda given: {**given, "n_samples": [10, 100]},
        },
    ),
    Row(
        name="kexue.stats.projection.bounds.norm_failure_probability",
        make=lambda rng: {"n_components": 100, "eps": 0.3},
        wrong={
            "no component": lambda given: {**given, "n_components": 0},
            "eps 1": lambda given: {**given, "eps": 1.0},
            "several eps": lambda given: {**given, "eps": [0.1, 0.2]},
            "unknown bound": lambda given: {**given, "bound": "tight"},
        },
    ),
    Row(
        name="kexue.stats.projection.hadamard.hadamard_transform",
        make=lambda rng: {"x": rng.standard_normal((3, 16))},
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            "no power of two": lambda given: {**given, "x": given["x"][:, :12]},
            "no column": lambda given: {**given, "x": given["x"][:, :0]},
            "words": lambda given: {**given, "x": [["a", "b"]]},
        },
        without={"not_finite_is_refused": NO_SYNC},
    ),
    Row(
        name="kexue.stats.projection.hadamard.hadamard_transform",
        make=lambda rng: {"x": rng.standard_normal((3, 16))},
        call=hadamard_transform,
        arrays=("x",),
        backends=("numpy",),
    ),
    *map_rows(GaussianRandomProjection, {}),
    *map_rows(
        SparseRandomProjection,
        {
            "density 0": lambda given: {**given, "density": 0.0},
            "density above 1": lambda given: {**given, "density": 1.5},
            "density in words": lambda given: {**given, "density": "thin"},
        },
    ),
    *map_rows(
        HadamardRandomProjection,
        {"more components than padded": lambda given: {**given, "n_components": 17}},
    ),
    Row(
        name="kexue.stats.projection.pairs.distortion",
        make=points,
        arrays=("X", "Z"),
        wrong={
            "a row less": lambda given: {**given, "Z": given["Z"][1:]},
            "no block": lambda given: {**given, "block_size": 0},
            "words": lambda given: {**given, "X": [["a"]] * 9},
        },
    ),
    Row(
        name="kexue.stats.projection.pairs.DistortionSummary",
        make=lambda rng: vars(distortion([[1.0], [2.0]], [[1.0], [3.0]])),
        call=DistortionSummary,
        instance=lambda: distortion([[1.0], [2.0]], [[1.0], [3.0]]),
    ),
]
