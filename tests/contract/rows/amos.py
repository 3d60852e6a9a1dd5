"""Rows of `kexue.optim.amos`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from contract.row import Arguments, Row
from kexue.optim.amos import (
    Amos,
    ScaleDecayLR,
    amos_parameter_groups,
    relative_scale_groups,
)

ANY_VALUE = "a training loop must not wait for a check of its values"
ANY_SHAPE = "parameters have any shape"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def settings(groups: list[dict[str, object]]) -> list[list[object]]:
    """What stands in groups beside the parameters."""
    return [[v for k, v in group.items() if k not in ("params", "names")] for group in groups]


def stepped(
    parameter: torch.Tensor, gradient: torch.Tensor, **options: object
) -> list[torch.Tensor]:
    theta = nn.Parameter(parameter.clone())
    optimizer = Amos([theta], **options)
    for _ in range(3):
        theta.grad = gradient
        optimizer.step()
    return [theta.detach(), *optimizer.state[theta].values()]


def scheduled(half_life: float, kind: str, warmup_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.3)
    schedule = ScaleDecayLR(optimizer, half_life=half_life, kind=kind, warmup_steps=warmup_steps)
    rates = []
    for _ in range(6):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


def of(**changes: object) -> object:
    return lambda given: {**given, **changes}


SCHEDULE = {"half_life": 3.0, "kind": "inverse_square"}
WRONG_SCHEDULE = {
    "no half-life": of(half_life=0.0),
    "endless half-life": of(half_life=np.inf),
    "unknown kind": of(kind="cosine"),
}
WRONG_MODEL = {
    "parameters instead of a model": lambda given: {
        **given, "model": list(given["model"].parameters())
    },
    "a scale of nothing": of(scale_rules={"weight": 0.0}),
    "no regular expression": of(scale_rules={"(": 1.0}),
}  # fmt: skip


def step_arguments(rng: np.random.Generator) -> Arguments:
    return {
        "parameter": rng.standard_normal((4, 3)),
        "gradient": rng.standard_normal((4, 3)),
        "lr": 0.1,
        "scale": 0.3,
        "momentum": 0.9,
    }


ROWS = [
    Row(
        name="kexue.optim.amos.optimizer.Amos",
        make=step_arguments,
        call=stepped,
        arrays=("parameter", "gradient"),
        backends=("torch",),
        wrong={
            "negative rate": of(lr=-0.1),
            "rate that is no number": of(lr=np.nan),
            "scale of nothing": of(scale=0.0),
            "momentum of one": of(momentum=1.0),
            "memory of more than one": of(beta=1.5),
            "negative decay": of(initial_decay=-1.0),
            "negative coefficient": of(decay_coefficient=-0.25),
            "no fine-tune rate": of(finetune_rate=0.0),
            "unknown slots": of(slots="per_layer"),
            "complex parameter": lambda given: {**given, "parameter": given["parameter"] + 1j},
            "joined and differentiable": of(foreach=True, differentiable=True),
        },
        without={
            "not_finite_is_refused": ANY_VALUE,
            "wrong_rank_is_refused": ANY_SHAPE,
            "wrong_dtype_is_refused": "torch keeps gradients of another type from a parameter",
            "non_contiguous_input": "gradients have the layout of their parameter",
        },
    ),
    Row(
        name="kexue.optim.amos.scale.parameter_scale",
        make=lambda rng: {"parameter": torch.zeros(4, 25)},
        wrong={"a number": of(parameter=0.5)},
    ),
    Row(
        name="kexue.optim.amos.scale.amos_parameter_groups",
        make=lambda rng: {"model": model(), "scale_rules": {"^2.weight": 0.7}},
        call=lambda **given: settings(amos_parameter_groups(**given)),
        wrong=WRONG_MODEL,
    ),
    Row(
        name="kexue.optim.amos.scale.relative_scale_groups",
        make=lambda rng: {"model": model(), "relative_lr": 0.01},
        call=lambda **given: settings(relative_scale_groups(**given)),
        wrong={
            **WRONG_MODEL,
            "no rate": of(relative_lr=0.0),
            "no q": of(q=0.0),
            "negative update": of(update_rms=-1.0),
        },
    ),
    Row(
        name="kexue.optim.amos.schedule.scale_decay",
        make=lambda rng: {"step": 5.0, **SCHEDULE},
        wrong={**WRONG_SCHEDULE, "before the start": of(step=-1.0)},
    ),
    Row(
        name="kexue.optim.amos.schedule.ScaleDecayLR",
        make=lambda rng: {"warmup_steps": 2, **SCHEDULE},
        call=scheduled,
        wrong={**WRONG_SCHEDULE, "negative warm-up": of(warmup_steps=-1)},
    ),
]
