"""Contract rows of kexue.optim.zeroth_order and kexue.losses.policy_gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from contract.row import Arguments, Row
from kexue.losses.policy_gradient import (
    PolicyGradientLoss,
    end_mask,
    sample_actions,
    sequence_log_probability,
    token_f1,
)
from kexue.optim.zeroth_order import (
    StepRecord,
    ZerothOrderEstimate,
    ZerothOrderSGD,
    replay,
    zeroth_order_gradient,
)

ANY_SHAPE = "the point may have any shape, a single number included"
DRAWS = "a draw near a boundary falls on the other side in another precision"

RECORD = StepRecord((3, 4), (0.5, -0.2), (0.1,), (0.01,), 1e-3, True, False, "normal")


def tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 5, shape)


def metric(rng: np.random.Generator) -> Arguments:
    return {"actions": tokens(rng, 2, 3, 6), "targets": tokens(rng, 3, 6)}


def scores(rng: np.random.Generator) -> Arguments:
    return {"logits": rng.standard_normal((3, 5)), "rewards": rng.random((3, 5))}


def sampled(rng: np.random.Generator) -> Arguments:
    return {"log_probability": -rng.random((4, 3)) - 0.1, "rewards": rng.random((4, 3))}


def floats(name: str) -> Any:
    return lambda given: {**given, name: given[name].double()}


def bowl(points: torch.Tensor) -> torch.Tensor:
    return points.square().flatten(1).sum(1)


def estimate(inputs: Any, generator: Any = None, **given: Any) -> ZerothOrderEstimate:
    source = generator or torch.Generator().manual_seed(0)
    return zeroth_order_gradient(bowl, inputs, generator=source, **given)


def train(weight: Any, **given: Any) -> Any:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = ZerothOrderSGD([parameter], **given)
    losses = [optimizer.step(lambda: parameter.square().sum()) for _ in range(2)]
    return parameter, losses


def repeat(trajectory: Any, count: int = 1) -> list[torch.Tensor]:
    weights = [torch.ones(4) for _ in range(count)]
    replay(weights, trajectory)
    return weights


def learn(logits: Any, targets: Any, generator: Any = None, **given: Any) -> Any:
    source = generator or torch.Generator().manual_seed(0)
    return PolicyGradientLoss(token_f1, **given)(logits, targets, generator=source)


def draw(logits: Any, generator: Any = None, **given: Any) -> torch.Tensor:
    source = generator or torch.Generator().manual_seed(0)
    return sample_actions(logits, generator=source, **given)


def log_probability(logits: Any, actions: Any, mask: Any) -> Any:
    return sequence_log_probability(logits, actions, mask=torch.as_tensor(mask))


WRONG_METRIC = {
    "float actions": floats("actions"),
    "float targets": floats("targets"),
    "other batch": lambda given: {**given, "targets": given["targets"][:2]},
    "one token": lambda given: {**given, "actions": given["actions"][0, 0, 0]},
}
WRONG_REWARDS = {
    "rewards of another shape": lambda given: {**given, "rewards": given["rewards"][:1]},
    "infinite reward": lambda given: {**given, "rewards": given["rewards"] / 0},
}

ROWS = [
    Row(
        name="kexue.optim.zeroth_order.estimate.zeroth_order_gradient",
        make=lambda rng: {"inputs": rng.standard_normal((3, 2)), "epsilon": 0.1, "samples": 3},
        call=estimate,
        arrays=("inputs",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "epsilon 0": lambda given: {**given, "epsilon": 0.0},
            "no sample": lambda given: {**given, "samples": 0},
            "unknown distribution": lambda given: {**given, "distribution": "cauchy"},
            "unknown baseline": lambda given: {**given, "baseline": "mean"},
            "no other sample": lambda given: {
                **given,
                "samples": 1,
                "antithetic": False,
                "baseline": "optimal",
            },
            "integers": lambda given: {**given, "inputs": given["inputs"].long()},
        },
        without={
            "wrong_rank_is_refused": ANY_SHAPE,
            "float32_agrees_with_float64": "one seed gives other directions in each precision",
        },
    ),
    Row(
        name="kexue.optim.zeroth_order.estimate.ZerothOrderEstimate",
        make=lambda rng: {
            "gradient": torch.ones(2),
            "standard_error": torch.ones(2),
            "value": torch.ones(()),
        },
    ),
    Row(
        name="kexue.optim.zeroth_order.optimizer.ZerothOrderSGD",
        make=lambda rng: {"weight": rng.standard_normal(5), "lr": 0.01, "directions": 2},
        call=train,
        arrays=("weight",),
        backends=("torch",),
        seeded="seed",
        wrong={
            "epsilon 0": lambda given: {**given, "epsilon": 0.0},
            "no direction": lambda given: {**given, "directions": 0},
            "negative rate": lambda given: {**given, "lr": -0.1},
            "negative decay": lambda given: {**given, "weight_decay": -0.1},
            "sphere": lambda given: {**given, "distribution": "sphere"},
            "optimal baseline": lambda given: {**given, "baseline": "optimal"},
            "unknown shaping": lambda given: {**given, "fitness_shaping": "rank"},
            "unknown parallel": lambda given: {**given, "parallel": "pipeline"},
            "no process group": lambda given: {**given, "parallel": "data"},
        },
        without={
            "wrong_rank_is_refused": ANY_SHAPE,
            "float32_agrees_with_float64": "one seed gives other directions in each precision",
        },
    ),
    Row(
        name="kexue.optim.zeroth_order.trajectory.StepRecord",
        make=lambda rng: RECORD._asdict(),
    ),
    Row(
        name="kexue.optim.zeroth_order.trajectory.replay",
        make=lambda rng: {"trajectory": [RECORD]},
        call=repeat,
        wrong={"other parameters": lambda given: {**given, "count": 2}},
    ),
    Row(
        name="kexue.losses.policy_gradient.sequences.sample_actions",
        make=lambda rng: {"logits": rng.standard_normal((6, 5)), "samples": 4},
        call=draw,
        arrays=("logits",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "no sample": lambda given: {**given, "samples": 0},
            "nothing to draw": lambda given: {**given, "logits": given["logits"] - torch.inf},
            "integers": lambda given: {**given, "logits": given["logits"].long()},
        },
        without={"float32_agrees_with_float64": DRAWS},
    ),
    Row(
        name="kexue.losses.policy_gradient.sequences.end_mask",
        make=lambda rng: {"actions": tokens(rng, 4, 6), "end_token": 0},
        batched=("actions",),
        backends=("torch",),
        call=lambda actions, end_token: end_mask(torch.as_tensor(actions), end_token),
        wrong={
            "floats": lambda given: {**given, "actions": torch.ones(2, 3)},
            "one token": lambda given: {**given, "actions": torch.ones((), dtype=torch.int64)},
        },
        compiles=True,
    ),
    Row(
        name="kexue.losses.policy_gradient.sequences.sequence_log_probability",
        make=lambda rng: {
            "logits": rng.standard_normal((3, 6, 5)),
            "actions": tokens(rng, 3, 6),
            "mask": rng.random((3, 6)) < 0.8,
        },
        call=log_probability,
        arrays=("logits",),
        backends=("torch",),
        batched=("logits", "actions", "mask"),
        differentiable=("logits",),
        wrong={
            "float actions": floats("actions"),
            "another batch": lambda given: {**given, "actions": given["actions"][:2]},
            "no such token": lambda given: {**given, "actions": given["actions"] + 9},
            "mask of numbers": lambda given: {**given, "mask": given["mask"].double()},
            "mask of another shape": lambda given: {**given, "mask": given["mask"][:2]},
        },
        compiles=True,
    ),
    Row(
        name="kexue.losses.policy_gradient.loss.expected_reward",
        make=scores,
        arrays=("logits", "rewards"),
        backends=("torch",),
        batched=("logits", "rewards"),
        differentiable=("logits",),
        wrong={
            **WRONG_REWARDS,
            "temperature 0": lambda given: {**given, "temperature": 0.0},
        },
        compiles=True,
    ),
    Row(
        name="kexue.losses.policy_gradient.loss.optimal_baseline",
        make=scores,
        arrays=("logits", "rewards"),
        backends=("torch",),
        batched=("logits", "rewards"),
        wrong=WRONG_REWARDS,
        compiles=True,
    ),
    Row(
        name="kexue.losses.policy_gradient.loss.policy_gradient_loss",
        make=sampled,
        arrays=("log_probability", "rewards"),
        backends=("torch",),
        differentiable=("log_probability",),
        wrong={
            **WRONG_REWARDS,
            "unknown baseline": lambda given: {**given, "baseline": "mean"},
            "unknown reduction": lambda given: {**given, "reduction": "median"},
            "no greedy rewards": lambda given: {**given, "baseline": "self_critical"},
            "one sample": lambda given: {
                "log_probability": given["log_probability"][:1],
                "rewards": given["rewards"][:1],
            },
            "integers": lambda given: {
                **given,
                "log_probability": given["log_probability"].long(),
            },
        },
        compiles=True,
    ),
    Row(
        name="kexue.losses.policy_gradient.loss.PolicyGradientLoss",
        make=lambda rng: {"logits": rng.standard_normal((3, 6, 5)), "targets": tokens(rng, 3, 4)},
        call=learn,
        arrays=("logits",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "no sample": lambda given: {**given, "samples": 0},
            "one sample": lambda given: {**given, "samples": 1},
            "unknown baseline": lambda given: {**given, "baseline": "mean"},
        },
        without={"float32_agrees_with_float64": DRAWS},
    ),
    Row(
        name="kexue.losses.policy_gradient.metrics.token_accuracy",
        make=metric,
        backends=("torch",),
        wrong={
            **WRONG_METRIC,
            "other length": lambda given: {**given, "targets": given["targets"][:, :3]},
            "mask of numbers": lambda given: {**given, "mask": torch.ones(3, 6)},
        },
        compiles=True,
    ),
    Row(
        name="kexue.losses.policy_gradient.metrics.token_f1",
        make=metric,
        backends=("torch",),
        wrong=WRONG_METRIC,
    ),
    Row(
        name="kexue.losses.policy_gradient.metrics.sentence_bleu",
        make=metric,
        backends=("torch",),
        wrong={
            **WRONG_METRIC,
            "unknown smoothing": lambda given: {**given, "smoothing": "floor"},
            "order 0": lambda given: {**given, "max_order": 0},
        },
    ),
]
