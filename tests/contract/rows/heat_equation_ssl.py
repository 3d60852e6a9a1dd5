"""Rows of `kexue.training.heat`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from contract.row import Arguments, Row
from kexue.training.heat import (
    Block,
    FirstOrderFit,
    LaplaceFit,
    LinearPropagation,
    MaskToken,
    QBHeat,
    QBHeatOutput,
    SequencePropagation,
    fit_first_order,
    fit_laplace,
    quarter_block,
)

IN_A_LOOP = (
    "runs in training loops on accelerators, where looking at values costs a synchronisation; NaN "
    "stays in its own image"
)
HOLE = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
ONLY_THE_MASK = "values under the mask are ignored, even NaN; a visible NaN stays in its own map"


def maps(rng: np.random.Generator) -> Arguments:
    return {"features": rng.standard_normal((2, 3, 2, 2)), "size": (4, 5), "offset": (1, 2)}


def fitted(rng: np.random.Generator) -> Arguments:
    return {"features": rng.standard_normal((2, 2, 5, 6)), "ridge": 0.1}


def model() -> QBHeat:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 2, 2))
    return QBHeat(encoder, LinearPropagation(4), nn.ConvTranspose2d(4, 1, 2, 2), visible_weight=0.5)


def random_blocks(generator: torch.Generator | None, **given: Any) -> Any:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return [quarter_block(generator=generator, **given) for _ in range(8)]


def changed(**values: Any) -> Any:
    return lambda given: {**given, **values}


WRONG_MAPS = {
    "another number of channels": lambda given: {**given, "features": given["features"][:, :2]},
    "a map that is too small": changed(size=(4, 3)),
    "an offset too far": changed(offset=(3, 0)),
    "a negative offset": changed(offset=(-1, 0)),
    "half a row": changed(size=(4.5, 5)),
}
WRONG_FIT = {
    "a negative ridge": changed(ridge=-0.1),
    "no batch": lambda given: {**given, "features": given["features"][0]},
    "integers": lambda given: {**given, "features": given["features"].long()},
}

ROWS = [
    Row(
        name="kexue.training.heat.blocks.Block",
        make=lambda rng: {"top": 1, "left": 2, "height": 3, "width": 4},
        instance=lambda: Block(1, 2, 3, 4),
        without={"instance_pickles": "a tuple has no attributes to compare; equality is its own"},
    ),
    Row(
        name="kexue.training.heat.blocks.quarter_block",
        make=lambda rng: {"height": 20, "width": 30, "generator": None},
        call=random_blocks,
        backends=("torch",),
        seeded="generator",
        wrong={
            "an odd height": changed(height=7),
            "no width": changed(width=0),
            "a fractional width": changed(width=8.0),
            "an unknown position": changed(position="left"),
        },
    ),
    Row(
        name="kexue.training.heat.blocks.block_mask",
        make=lambda rng: {"size": (4, 5), "block": Block(1, 2, 2, 3)},
        backends=("torch",),
        wrong={
            "a block that sticks out": changed(block=Block(1, 3, 2, 3)),
            "an empty block": changed(block=Block(1, 1, 0, 2)),
            "one size": changed(size=(4,)),
            "words": changed(block="left"),
        },
    ),
    Row(
        name="kexue.training.heat.propagation.LinearPropagation",
        make=maps,
        module=lambda: LinearPropagation(3, initial_scale=0.3),
        arrays=("features",),
        backends=("torch",),
        batched=("features",),
        differentiable=("features",),
        compiles=True,
        wrong=WRONG_MAPS,
        without={"not_finite_is_refused": IN_A_LOOP},
    ),
    Row(
        name="kexue.training.heat.propagation.MaskToken",
        make=maps,
        module=lambda: MaskToken(3),
        arrays=("features",),
        backends=("torch",),
        batched=("features",),
        differentiable=("features",),
        compiles=True,
        wrong=WRONG_MAPS,
        without={"not_finite_is_refused": IN_A_LOOP},
    ),
    Row(
        name="kexue.training.heat.propagation.SequencePropagation",
        make=lambda rng: {"features": rng.standard_normal((2, 3, 4)), "length": 6, "offset": 2},
        module=lambda: SequencePropagation(4, initial_scale=0.3),
        arrays=("features",),
        backends=("torch",),
        batched=("features",),
        differentiable=("features",),
        compiles=True,
        wrong={
            "vectors of another length": lambda given: {
                **given,
                "features": given["features"][..., :3],
            },
            "too short": changed(length=2),
            "an offset too far": changed(offset=4),
        },
        without={"not_finite_is_refused": IN_A_LOOP},
    ),
    Row(
        name="kexue.training.heat.pretraining.QBHeat",
        make=lambda rng: {"images": rng.standard_normal((2, 1, 8, 8)), "block": Block(2, 4, 4, 4)},
        module=model,
        arrays=("images",),
        backends=("torch",),
        batched=("images",),
        differentiable=("images",),
        compiles=True,
        wrong={
            "a block that sticks out": changed(block=Block(6, 4, 4, 4)),
            "a block between two features": changed(block=Block(1, 4, 4, 4)),
            "nothing masked": changed(block=Block(0, 0, 8, 8)),
            "no batch": lambda given: {**given, "images": given["images"][0]},
        },
        without={"not_finite_is_refused": IN_A_LOOP},
    ),
    Row(
        name="kexue.training.heat.pretraining.QBHeatOutput",
        make=lambda rng: vars(model()(torch.ones(1, 1, 8, 8), Block(0, 0, 4, 4))),
        instance=lambda: QBHeatOutput(
            torch.tensor(0.5), torch.ones(1, 1, 2, 2), torch.ones(1, 3, 2, 2), HOLE[:2, :2]
        ),
    ),
    Row(
        name="kexue.training.heat.equation.harmonic_fill",
        make=lambda rng: {"features": rng.standard_normal((2, 3, 4, 3)), "mask": HOLE},
        arrays=("features",),
        backends=("torch",),
        batched=("features",),
        differentiable=("features",),
        wrong={
            "nothing visible": changed(mask=torch.ones_like(HOLE)),
            "a mask of another shape": changed(mask=HOLE.T),
            "a mask of numbers": changed(mask=HOLE.float()),
            "a matrix": lambda given: {**given, "features": given["features"][0, 0]},
        },
        without={"not_finite_is_refused": ONLY_THE_MASK},
    ),
    Row(
        name="kexue.training.heat.equation.heat_diffuse",
        make=lambda rng: {"maps": rng.standard_normal((2, 3, 4)), "time": 0.7},
        arrays=("maps",),
        backends=("torch",),
        batched=("maps",),
        differentiable=("maps",),
        compiles=True,
        wrong={
            "negative time": changed(time=-1.0),
            "for ever": changed(time=float("inf")),
            "time in words": changed(time="long"),
            "one row": lambda given: {**given, "maps": given["maps"][0, 0]},
        },
        without={"not_finite_is_refused": IN_A_LOOP},
    ),
    Row(
        name="kexue.training.heat.diagnosis.fit_first_order",
        make=fitted,
        arrays=("features",),
        backends=("torch",),
        wrong=WRONG_FIT,
    ),
    Row(
        name="kexue.training.heat.diagnosis.fit_laplace",
        make=fitted,
        arrays=("features",),
        backends=("torch",),
        wrong={
            **WRONG_FIT,
            "two rows": lambda given: {**given, "features": given["features"][:, :, :2]},
        },
    ),
    Row(
        name="kexue.training.heat.diagnosis.FirstOrderFit",
        make=lambda rng: vars(fit_first_order(torch.rand(1, 2, 3, 3))),
        call=FirstOrderFit,
        instance=lambda: fit_first_order(torch.arange(9.0).view(1, 1, 3, 3)),
    ),
    Row(
        name="kexue.training.heat.diagnosis.LaplaceFit",
        make=lambda rng: vars(fit_laplace(torch.rand(1, 2, 3, 3))),
        call=LaplaceFit,
        instance=lambda: fit_laplace(torch.arange(9.0).view(1, 1, 3, 3)),
    ),
]
