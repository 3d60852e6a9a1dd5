"""Rows of `kexue.stats.hsic`."""

from typing import Any

import numpy as np
import torch

from contract.row import Arguments, Row
from kexue.stats.hsic import (
    HSICTestResult,
    centered_kernel_alignment,
    hsic,
    hsic_test,
    kernel_matrix,
)


def samples(rng: np.random.Generator, n: int = 9) -> Arguments:
    return {"x": rng.standard_normal((n, 3)), "y": rng.standard_normal((n, 2))}


def batch(rng: np.random.Generator) -> Arguments:
    return {
        "x": rng.standard_normal((3, 7, 10)),
        "y": rng.standard_normal((3, 7, 2)),
        "bandwidth_x": 2.0,
        "bandwidth_y": 1.5,
        "kernel_y": "laplacian",
        "block_size": 4,
    }


def estimates(function: Any, **given: Any) -> list[Any]:
    """Both estimates, so that one row holds both to the contract."""
    return [function(**given, estimator=estimator) for estimator in ("biased", "unbiased")]


def other_kind(array: Any) -> Any:
    return array.numpy() if isinstance(array, torch.Tensor) else torch.from_numpy(array)


WRONG = {
    "a sample too few": lambda given: {**given, "y": given["y"][..., :-1, :]},
    "numpy with torch": lambda given: {**given, "y": other_kind(given["y"])},
    "three samples": lambda given: {
        **given, "x": given["x"][..., :3, :], "y": given["y"][..., :3, :]
    },
    "words": lambda given: {**given, "x": np.array([["a"]] * given["x"].shape[-2])},
    "unknown kernel": lambda given: {**given, "kernel_x": "sigmoid"},
    "bandwidth 0": lambda given: {**given, "kernel_x": "gaussian", "bandwidth_x": 0.0},
    "infinite bandwidth": lambda given: {
        **given, "kernel_x": "laplacian", "bandwidth_x": float("inf")
    },
    "bandwidth in words": lambda given: {
        **given, "kernel_x": "gaussian", "bandwidth_x": "mean"
    },
    "constant sample, median bandwidth": lambda given: {
        **given, "kernel_x": "gaussian", "x": given["x"] * 0, "bandwidth_x": "median"
    },
    "no block": lambda given: {**given, "block_size": 0},
    "a kernel matrix that is not square": lambda given: {**given, "kernel_x": "precomputed"},
}  # fmt: skip
WRONG_ESTIMATE = {
    **WRONG,
    "batches that do not broadcast": lambda given: {**given, "y": given["y"][:2]},
}
WRONG_TEST = {
    **WRONG,
    "five samples": lambda given: {**given, "x": given["x"][:5], "y": given["y"][:5]},
    "a batch": lambda given: {**given, "x": given["x"][None], "y": given["y"][None]},
    "unknown method": lambda given: {**given, "method": "bootstrap"},
    "no permutation": lambda given: {**given, "n_permutations": 0},
}

ROWS = [
    Row(
        name="kexue.stats.hsic.estimators.hsic",
        make=batch,
        call=lambda **given: estimates(hsic, **given),
        arrays=("x", "y"),
        batched=("x", "y"),
        differentiable=("x", "y"),
        wrong=WRONG_ESTIMATE,
    ),
    Row(
        name="kexue.stats.hsic.estimators.centered_kernel_alignment",
        make=lambda rng: {**batch(rng), "kernel_x": "gaussian"},
        call=lambda **given: estimates(centered_kernel_alignment, **given),
        arrays=("x", "y"),
        batched=("x", "y"),
        differentiable=("x", "y"),
        wrong=WRONG_ESTIMATE,
    ),
    Row(
        name="kexue.stats.hsic.independence.hsic_test",
        make=lambda rng: {**samples(rng), "n_permutations": 19, "random_state": 0},
        call=hsic_test,
        arrays=("x", "y"),
        seeded="random_state",
        wrong=WRONG_TEST,
    ),
    Row(
        name="kexue.stats.hsic.independence.HSICTestResult",
        make=lambda rng: vars(hsic_test(*rng.standard_normal((2, 8)), n_permutations=5)),
        call=HSICTestResult,
        instance=lambda: hsic_test(np.arange(8), np.arange(8) % 3, random_state=0),
    ),
    Row(
        name="kexue.stats.hsic.kernels.kernel_matrix",
        make=lambda rng: {
            "x": rng.standard_normal((2, 4, 3)),
            "y": rng.standard_normal((2, 5, 3)),
            "bandwidth": 1.3,
        },
        call=kernel_matrix,
        arrays=("x", "y"),
        batched=("x", "y"),
        differentiable=("x", "y"),
        wrong={
            "other features": lambda given: {**given, "y": given["y"][..., :2]},
            "unknown kernel": lambda given: {**given, "kernel": "rbf"},
            "negative bandwidth": lambda given: {**given, "bandwidth": -1.0},
            "numpy with torch": lambda given: {**given, "y": other_kind(given["y"])},
            "precomputed, of two samples": lambda given: {**given, "kernel": "precomputed"},
        },
    ),
    Row(
        name="kexue.stats.hsic.kernels.median_bandwidth",
        make=lambda rng: {"x": rng.standard_normal((30, 2)), "max_samples": 20, "random_state": 0},
        arrays=("x",),
        seeded="random_state",
        wrong={
            "one sample": lambda given: {**given, "x": given["x"][:1]},
            "a kernel without bandwidth": lambda given: {**given, "kernel": "linear"},
            "one sample at most": lambda given: {**given, "max_samples": 1},
            "all alike": lambda given: {**given, "x": given["x"] * 0},
        },
    ),
]
