"""Contract rows of kexue.losses.tailr."""

from __future__ import annotations

from typing import Any

import numpy as np

from contract.row import Arguments, Row
from kexue.losses.tailr import ReliabilityDiagram, TaiLrLoss, reliability_diagram

_NOT_FINITE = (
    "a loss is run in loops on accelerators, where looking at values costs a synchronisation; "
    "logits of -inf forbid a class, NaN stays NaN as in cross entropy"
)


def _logits(rng: np.random.Generator) -> Arguments:
    return {
        "input": 2 * rng.normal(size=(6, 5)),
        "target": np.array([0, 4, 2, -100, 1, 3]),
        "weight": rng.uniform(0.5, 2, size=5),
        "gamma": 0.1,
        "label_smoothing": 0.1,
        "reduction": "none",
    }


def _layer(rng: np.random.Generator) -> Arguments:
    return {
        "hidden": rng.normal(size=(2, 3, 4)),
        "weight": rng.normal(size=(7, 4)),
        "bias": rng.normal(size=7),
        "target": np.array([[0, 6, 2], [-100, 1, 3]]),
        "chunk_size": 4,
    }


def _predictions(rng: np.random.Generator) -> Arguments:
    # Counts of sixteenths: float32 holds them exactly, so no sample changes its bin.
    return {
        "probabilities": rng.multinomial(16, np.full(3, 1 / 3), size=40) / 16,
        "labels": rng.integers(0, 3, size=40),
        "n_bins": 5,
    }


def _diagram(**fields: Any) -> ReliabilityDiagram:
    return ReliabilityDiagram(**fields)


def _some_diagram() -> ReliabilityDiagram:
    import torch

    return reliability_diagram(torch.eye(3), torch.tensor([0, 1, 1]), n_bins=4)


_WRONG_CURVE = {
    "gamma above 1": lambda given: {**given, "gamma": 1.5},
    "gamma below 0": lambda given: {**given, "gamma": -0.1},
    "gamma NaN": lambda given: {**given, "gamma": np.nan},
    "a word as gamma": lambda given: {**given, "gamma": "0.1"},
    "min_weight above 1": lambda given: {**given, "min_weight": 2.0},
}
_WRONG_LOSS = {
    **_WRONG_CURVE,
    "label_smoothing above 1": lambda given: {**given, "label_smoothing": 1.1},
    "unknown reduction": lambda given: {**given, "reduction": "batchmean"},
    "fewer targets": lambda given: {**given, "target": given["target"][:-1]},
    "a class axis too many": lambda given: {**given, "target": given["target"][:, None]},
    "indices as input": lambda given: {**given, "input": given["input"].long()},
    "truth values as target": lambda given: {**given, "target": given["target"] > 0},
    "weights of fewer classes": lambda given: {**given, "weight": given["weight"][:-1]},
    "probabilities of fewer classes": lambda given: {
        **given,
        "target": given["input"][:, 1:].softmax(1),
    },
    "probabilities and a class to ignore": lambda given: {
        **given,
        "target": given["input"].softmax(1),
        "ignore_index": 0,
    },
}
_WRONG_LAYER = {
    **_WRONG_CURVE,
    "single losses wanted": lambda given: {**given, "reduction": "none"},
    "another D": lambda given: {**given, "weight": given["weight"][:, 1:]},
    "fewer targets": lambda given: {**given, "target": given["target"][:, 1:]},
    "a short bias": lambda given: {**given, "bias": given["bias"][1:]},
    "no rows in a chunk": lambda given: {**given, "chunk_size": 0},
    "soft targets": lambda given: {**given, "target": given["target"].double()},
    "two dtypes": lambda given: {**given, "weight": given["weight"].float()},
}
_WRONG_PREDICTIONS = {
    "no bins": lambda given: {**given, "n_bins": 0},
    "no samples": lambda given: {
        **given,
        "probabilities": given["probabilities"][:0],
        "labels": given["labels"][:0],
    },
    "logits": lambda given: {**given, "probabilities": 5 * given["probabilities"]},
    "fewer labels": lambda given: {**given, "labels": given["labels"][1:]},
    "labels of no class": lambda given: {**given, "labels": given["labels"] + 1},
    "labels that are no integers": lambda given: {**given, "labels": given["labels"].double()},
    "integer probabilities": lambda given: {
        **given,
        "probabilities": given["probabilities"].long(),
    },
}

ROWS = [
    Row(
        name="kexue.losses.tailr.loss.tailr_loss",
        make=_logits,
        arrays=("input", "weight"),
        backends=("torch",),
        batched=("input", "target"),
        differentiable=("input",),
        # Twenty roundings of float32 beside logits below 10.
        float32_rtol=1e-5,
        wrong=_WRONG_LOSS,
        compiles=True,
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.losses.tailr.loss.TaiLrLoss",
        make=lambda rng: {name: _logits(rng)[name] for name in ("input", "target")},
        module=lambda: TaiLrLoss(
            gamma=0.3, min_weight=0.05, reduction="none", weight=_class_weights()
        ),
        arrays=("input",),
        backends=("torch",),
        batched=("input", "target"),
        differentiable=("input",),
        float32_rtol=1e-5,
        compiles=True,
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.losses.tailr.curve.token_weight",
        make=lambda rng: {
            "log_probability": -rng.exponential(3, size=(4, 3)),
            "gamma": 0.1,
            "min_weight": 0.02,
        },
        arrays=("log_probability",),
        backends=("torch",),
        batched=("log_probability",),
        differentiable=("log_probability",),
        float32_rtol=1e-5,
        wrong=_WRONG_CURVE,
        compiles=True,
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "log-probabilities may have any shape",
        },
    ),
    Row(
        name="kexue.losses.tailr.linear.linear_tailr_loss",
        make=_layer,
        arrays=("hidden", "weight", "bias"),
        backends=("torch",),
        differentiable=("hidden", "weight", "bias"),
        float32_rtol=1e-5,
        wrong=_WRONG_LAYER,
        compiles=True,
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.losses.tailr.calibration.reliability_diagram",
        make=_predictions,
        arrays=("probabilities",),
        backends=("torch",),
        wrong=_WRONG_PREDICTIONS,
    ),
    Row(
        name="kexue.losses.tailr.calibration.expected_calibration_error",
        make=_predictions,
        arrays=("probabilities",),
        backends=("torch",),
        wrong=_WRONG_PREDICTIONS,
    ),
    Row(
        name="kexue.losses.tailr.calibration.ReliabilityDiagram",
        make=lambda rng: vars(_some_diagram()),
        call=_diagram,
        instance=_some_diagram,
    ),
]


def _class_weights() -> Any:
    import torch

    return torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
