"""Rows of `kexue.training.siamese`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.row import Arguments, Row
from kexue.training.siamese import (
    BYOL,
    CollapseMetrics,
    LinearTrajectory,
    ModeLimit,
    ModeTrajectory,
    SiameseOutput,
    SimSiam,
    collapse_metrics,
    mode_limit,
    mode_trajectory,
    prediction_head,
    projection_head,
)

PACKAGE = "kexue.training.siamese"
NOT_FINITE = (
    "a loss runs in the training loop, where looking at values would stop an accelerator; NaN "
    "shows in the loss, as with PyTorch's own"
)
ANY_KIND = "views may be of any shape and kind that the encoder takes, such as indices"
WRONG_VIEWS = {
    "views of different samples": lambda given: {**given, "view_2": given["view_2"][:3]},
    "no samples": lambda given: {name: view[:0] for name, view in given.items()},
    "a list": lambda given: {**given, "view_2": [[1.0, 2.0]]},
    "projections that are no matrix": lambda given: {
        name: view[:, None] for name, view in given.items()
    },
}
WRONG_MODE = {
    "unknown gradient": lambda given: {**given, "gradient": "half"},
    "negative variance": lambda given: {**given, "augmentation_variance": -0.1},
    "negative rate": lambda given: {**given, "predictor_rate": -1.0},
    "an encoder that is not finite": lambda given: {**given, "encoder": np.nan},
}


def pair(rng: np.random.Generator) -> Arguments:
    return {"prediction": rng.standard_normal((4, 3)), "target": rng.standard_normal((4, 3))}


def views(rng: np.random.Generator) -> Arguments:
    return {"view_1": rng.standard_normal((4, 3)), "view_2": rng.standard_normal((4, 3))}


def siamese(kind: type[SimSiam], **options: Any) -> SimSiam:
    heads = {"projector": nn.Linear(6, 4), "predictor": prediction_head(4, 2)}
    return kind(nn.Linear(3, 6), **heads, **options)


def output() -> SiameseOutput:
    pair = (torch.ones(2, 3), torch.zeros(2, 3))
    return SiameseOutput(torch.tensor(-0.5), pair, pair, pair)


def mode(rng: np.random.Generator) -> Arguments:
    return {"predictor": 0.6, "encoder": 0.1, "augmentation_variance": 0.2, "predictor_rate": 2.0}


def network(rng: np.random.Generator) -> Arguments:
    mixing = rng.standard_normal((4, 4))
    return {
        "encoder": rng.standard_normal((2, 4)),
        "predictor": rng.standard_normal((2, 2)),
        "covariance": mixing @ mixing.T,
        "augmentation_covariance": 0.1 * np.eye(4),
        "times": np.array([0.5, 2.0]),
    }


def head(public: Any, *widths: int) -> Any:
    """The output of a head, whose parameters are numbered instead of drawn."""

    def call(x: Tensor, **options: Any) -> Tensor:
        module = public(*widths, **options).to(x.dtype).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                count = torch.arange(1.0, parameter.numel() + 1, dtype=x.dtype)
                parameter.copy_(count.sin().view_as(parameter))
        return module(x)

    return call


HEAD_INPUT = {
    "not_finite_is_refused": NOT_FINITE,
    "wrong_rank_is_refused": "the head is PyTorch's own Sequential, whose layers refuse it",
    "wrong_dtype_is_refused": "the head is PyTorch's own Sequential, whose layers refuse it",
}
MODULE = {
    "arrays": ("view_1", "view_2"),
    "backends": ("torch",),
    "compiles": True,
    "wrong": WRONG_VIEWS,
    "without": {"not_finite_is_refused": NOT_FINITE, "wrong_dtype_is_refused": ANY_KIND},
}

ROWS = [
    Row(
        name=f"{PACKAGE}.loss.negative_cosine_similarity",
        make=pair,
        arrays=("prediction", "target"),
        backends=("torch",),
        differentiable=("prediction", "target"),
        compiles=True,
        wrong={
            "another dimension": lambda given: {**given, "target": given["target"][:, :2]},
            "other samples": lambda given: {**given, "target": given["target"][:2]},
            "unknown reduction": lambda given: {**given, "reduction": "median"},
            "no samples": lambda given: {name: x[:0] for name, x in given.items()},
        },
        without={"not_finite_is_refused": NOT_FINITE},
    ),
    Row(
        name=f"{PACKAGE}.model.SimSiam",
        make=views,
        # What is detached has a gradient that no difference of values shows.
        module=lambda: siamese(SimSiam, stop_gradient=False),
        differentiable=("view_1", "view_2"),
        **MODULE,
    ),
    Row(name=f"{PACKAGE}.model.BYOL", make=views, module=lambda: siamese(BYOL), **MODULE),
    Row(
        name=f"{PACKAGE}.model.SiameseOutput",
        make=lambda rng: vars(output()),
        call=SiameseOutput,
        instance=output,
    ),
    Row(
        name=f"{PACKAGE}.model.cosine_momentum",
        make=lambda rng: {"step": 30, "total_steps": 100, "base": 0.99, "final": 1.0},
        wrong={
            "a step after the last": lambda given: {**given, "step": 101},
            "a step before the first": lambda given: {**given, "step": -1},
            "no steps": lambda given: {**given, "step": 0, "total_steps": 0},
            "momentum above one": lambda given: {**given, "base": 1.5},
            "momentum below zero": lambda given: {**given, "final": -0.5},
        },
    ),
    Row(
        name=f"{PACKAGE}.heads.projection_head",
        make=lambda rng: {"x": rng.standard_normal((4, 3)), "layers": 2, "last_norm": False},
        call=head(projection_head, 3, 5, 2),
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            "no layers": lambda given: {**given, "layers": 0},
            "half a layer": lambda given: {**given, "layers": 1.5},
        },
        without=HEAD_INPUT,
    ),
    Row(
        name=f"{PACKAGE}.heads.prediction_head",
        make=lambda rng: {"x": rng.standard_normal((4, 3))},
        call=head(prediction_head, 3, 2),
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        without=HEAD_INPUT,
    ),
    Row(
        name=f"{PACKAGE}.metrics.collapse_metrics",
        make=lambda rng: {
            "embeddings": rng.standard_normal((7, 4)),
            "other": rng.standard_normal((7, 4)),
            "max_pairs": 5,
        },
        arrays=("embeddings", "other"),
        backends=("torch",),
        wrong={
            "one row": lambda given: {name: given[name][:1] for name in ("embeddings", "other")},
            "no dimension": lambda given: {"embeddings": given["embeddings"][:, :0]},
            "other samples": lambda given: {**given, "other": given["other"][:3]},
            "no pairs": lambda given: {**given, "max_pairs": 1},
            "half a pair": lambda given: {**given, "max_pairs": 2.5},
        },
    ),
    Row(
        name=f"{PACKAGE}.metrics.CollapseMetrics",
        make=lambda rng: vars(collapse_metrics(torch.eye(3), torch.eye(3))),
        call=CollapseMetrics,
        instance=lambda: collapse_metrics(torch.eye(3), torch.eye(3)),
    ),
    Row(
        name=f"{PACKAGE}.dynamics.mode_trajectory",
        make=lambda rng: {**mode(rng), "times": np.array([0.0, 1.0, 5.0]), "weight_decay": 0.05},
        arrays=("times",),
        backends=("numpy",),
        wrong={
            **WRONG_MODE,
            "negative decay": lambda given: {**given, "weight_decay": -0.1},
            "times backwards": lambda given: {**given, "times": [2.0, 1.0]},
            "times before the start": lambda given: {**given, "times": [-1.0, 1.0]},
            "an average with the full gradient": lambda given: {
                **given, "ema_rate": 0.1, "gradient": "full",
            },
            "a target without an average": lambda given: {**given, "target": 0.1},
        },
    ),
    Row(
        name=f"{PACKAGE}.dynamics.ModeTrajectory",
        make=lambda rng: vars(mode_trajectory([0.0, 1.0])),
        call=ModeTrajectory,
        instance=lambda: mode_trajectory([0.0, 1.0]),
    ),
    Row(
        name=f"{PACKAGE}.dynamics.mode_limit",
        make=mode,
        wrong={
            **WRONG_MODE,
            "no closed form": lambda given: {**given, "gradient": "full"},
        },
    ),
    Row(
        name=f"{PACKAGE}.dynamics.ModeLimit",
        make=lambda rng: vars(mode_limit()),
        call=ModeLimit,
        instance=mode_limit,
    ),
    Row(
        name=f"{PACKAGE}.dynamics.weight_decay_threshold",
        make=lambda rng: {"augmentation_variance": 0.25},
        wrong={"negative variance": lambda given: {"augmentation_variance": -0.25}},
    ),
    Row(
        name=f"{PACKAGE}.flow.linear_siamese_flow",
        make=network,
        arrays=("encoder", "predictor", "covariance", "augmentation_covariance", "times"),
        backends=("numpy",),
        wrong={
            "another dimension": lambda given: {**given, "covariance": np.eye(3)},
            "a predictor of another width": lambda given: {**given, "predictor": np.eye(3)},
            "negative variance": lambda given: {**given, "augmentation_covariance": -np.eye(4)},
            "no covariance": lambda given: {
                **given, "covariance": np.triu(np.ones((4, 4))),
            },
            "negative decay": lambda given: {**given, "weight_decay": -0.1},
            "times backwards": lambda given: {**given, "times": [2.0, 1.0]},
        },
    ),
    Row(
        name=f"{PACKAGE}.flow.LinearTrajectory",
        make=lambda rng: {
            "time": np.zeros(2), "encoder": np.zeros((2, 1, 3)),
            "predictor": np.zeros((2, 1, 1)), "target": np.zeros((2, 1, 3)),
        },
        call=LinearTrajectory,
        instance=lambda: LinearTrajectory(
            np.zeros(2), np.ones((2, 1, 3)), np.ones((2, 1, 1)), np.ones((2, 1, 3))
        ),
    ),
]  # fmt: skip
