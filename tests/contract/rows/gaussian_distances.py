"""Rows of `kexue.stats.gaussian`."""

from typing import Any

import numpy as np

from contract.row import Arguments, Row
from kexue.stats.gaussian import (
    GaussianParameters,
    OptimalTransportMap,
    entropy,
    pairwise_distance,
)

LAW = ("mean1", "covariance1", "mean2", "covariance2")
COLLECTIONS = ("means1", "covariances1", "means2", "covariances2")


def covariances(rng: np.random.Generator, n: int, d: int = 3) -> np.ndarray:
    factor = rng.standard_normal((n, d, d))
    return factor @ factor.swapaxes(1, 2) + np.eye(d)


def symmetric(x: Any) -> Any:
    """Finite differences change one entry of a pair; the functions want both alike."""
    if x.ndim < 2:
        return x
    return (x + x.swapaxes(-1, -2)) / 2


def laws(rng: np.random.Generator) -> Arguments:
    n, d = 3, 3
    return {
        "mean1": rng.standard_normal((n, d)),
        "covariance1": covariances(rng, n, d),
        "mean2": rng.standard_normal((n, d)),
        "covariance2": covariances(rng, n, d),
    }


def symmetrised(function: Any) -> Any:
    def call(**given: Any) -> Any:
        return function(**{
            name: symmetric(value) if name.startswith("cov") and hasattr(value, "ndim") else value
            for name, value in given.items()
        })  # fmt: skip

    return call


def collections(rng: np.random.Generator) -> Arguments:
    return {
        "means1": rng.standard_normal((4, 3)),
        "covariances1": covariances(rng, 4),
        "means2": rng.standard_normal((2, 3)),
        "covariances2": covariances(rng, 2),
        "metric": "kl",
    }


WRONG_LAW = {
    "another dimension": lambda given: {**given, "mean2": given["mean2"][:, :2]},
    "a vector as matrix": lambda given: {**given, "covariance1": given["covariance1"][0, 0]},
    "batches of 3 and 2": lambda given: {
        **given,
        "mean2": given["mean2"][:2],
        "covariance2": given["covariance2"][:2],
    },
    "negative definite": lambda given: {**given, "covariance2": -given["covariance2"]},
    "unknown type": lambda given: {**given, "covariance_type": "tied"},
    "words": lambda given: {**given, "mean1": ["a", "b", "c"]},
}
WRONG_SAMPLES = {
    "one sample": lambda given: {**given, "samples": given["samples"][:, :1], "ddof": 1},
    "negative ddof": lambda given: {**given, "ddof": -1},
    "half a ddof": lambda given: {**given, "ddof": 0.5},
}


def distance_row(name: str) -> Row:
    from kexue.stats import gaussian

    function = getattr(gaussian, name)
    return Row(
        name=f"{function.__module__}.{name}",
        make=laws,
        call=symmetrised(function),
        arrays=LAW,
        batched=LAW,
        differentiable=LAW,
        wrong=WRONG_LAW,
    )


def moved_points(**given: Any) -> Any:
    return OptimalTransportMap(given["matrix"], given["shift"])(given["points"])


ROWS = [
    *map(
        distance_row,
        (
            "kl_divergence",
            "bhattacharyya_distance",
            "hellinger_distance",
            "wasserstein_distance",
            "optimal_transport_map",
        ),
    ),
    Row(
        name="kexue.stats.gaussian.laws.entropy",
        make=lambda rng: {"covariance": covariances(rng, 4)},
        call=symmetrised(entropy),
        arrays=("covariance",),
        batched=("covariance",),
        differentiable=("covariance",),
        wrong={
            "one variance": lambda given: {**given, "covariance_type": "spherical"},
            "singular": lambda given: {**given, "covariance": 0 * given["covariance"]},
            "not square": lambda given: {**given, "covariance": given["covariance"][..., :2]},
        },
    ),
    Row(
        name="kexue.stats.gaussian.laws.fit_gaussian",
        make=lambda rng: {"samples": rng.standard_normal((3, 8, 2)), "ddof": 0},
        arrays=("samples",),
        batched=("samples",),
        differentiable=("samples",),
        wrong=WRONG_SAMPLES,
    ),
    Row(
        name="kexue.stats.gaussian.transport.frechet_distance",
        make=lambda rng: {
            "samples1": rng.standard_normal((5, 8)),
            "samples2": rng.standard_normal((6, 8)) + 1,
        },
        arrays=("samples1", "samples2"),
        differentiable=("samples1", "samples2"),
        wrong={
            "another dimension": lambda given: {**given, "samples2": given["samples2"][:, :7]},
            "one sample": lambda given: {**given, "samples1": given["samples1"][:1]},
            "batches": lambda given: {**given, "samples1": given["samples1"][None]},
        },
    ),
    Row(
        name="kexue.stats.gaussian.pairs.pairwise_distance",
        make=collections,
        arrays=COLLECTIONS,
        batched=("means1", "covariances1"),
        differentiable=COLLECTIONS,
        call=symmetrised(pairwise_distance),
        wrong={
            "unknown metric": lambda given: {**given, "metric": "cosine"},
            "means without covariances": lambda given: {**given, "covariances2": None},
            "more means than covariances": lambda given: {
                **given,
                "covariances1": given["covariances1"][:3],
            },
        },
    ),
    Row(
        name="kexue.stats.gaussian.laws.GaussianParameters",
        make=lambda rng: {"mean": np.zeros(2), "covariance": np.eye(2)},
        call=GaussianParameters,
    ),
    Row(
        name="kexue.stats.gaussian.transport.OptimalTransportMap",
        make=lambda rng: {
            "matrix": covariances(rng, 2),
            "shift": rng.standard_normal((2, 3)),
            "points": rng.standard_normal((2, 5, 3)),
        },
        call=moved_points,
        wrong={
            "points of another dimension": lambda given: {
                **given,
                "points": given["points"][..., :2],
            }
        },
    ),
]
