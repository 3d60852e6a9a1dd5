"""Contract rows of kexue.generative.reparameterization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from contract.row import Arguments, Row
from kexue.generative import reparameterization as r

PATH = "kexue.generative.reparameterization"


def _noisy(rng: np.random.Generator) -> Arguments:
    return {"logits": rng.normal(size=(3, 5)), "noise": rng.gumbel(size=(3, 5))}


def _variables(rng: np.random.Generator) -> Arguments:
    return {"logits": rng.normal(size=(4, 2, 3))}


def _cost(states: Any) -> Any:
    weights = torch.arange(6, dtype=states.dtype).reshape(2, 3)
    return (states * weights).sum((-2, -1)).sin()


def _seeded(call: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(generator: Any = None, **given: Any) -> Any:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return call(generator=generator, **given)

    return drawn


def _single_rows(given: Arguments) -> Arguments:
    return {**given, "logits": given["logits"][0]}


def _temperature(given: Arguments) -> Arguments:
    return {**given, "temperature": 0.0}


def _masked(given: Arguments) -> Arguments:
    return {**given, "logits": torch.full_like(given["logits"], -torch.inf)}


def _short_noise(given: Arguments) -> Arguments:
    return {**given, "noise": given["noise"][:, :-1]}


def _schedule(steps: int = 3, **given: float) -> list[float]:
    temperature = r.ExponentialTemperature(**given)
    return [temperature.step() for _ in range(steps)]


def _moments(parameter: Any, repeats: int = 5) -> Any:
    return r.gradient_moments(lambda: parameter.square().sum(), parameter, repeats=repeats)


def _leaf(**given: Any) -> Any:
    return _moments(given.pop("parameter").detach().requires_grad_(), **given)


WRONG_NOISY = {"noise of another shape": _short_noise, "every category masked": _masked}

ROWS = [
    Row(
        name=f"{PATH}.sampling.gumbel_noise",
        make=lambda rng: {"shape": (4, 5)},
        call=_seeded(r.gumbel_noise),
        seeded="generator",
        wrong={
            "negative length": lambda given: {**given, "shape": (2, -1)},
            "integers": lambda given: {**given, "dtype": torch.int64},
        },
    ),
    Row(
        name=f"{PATH}.sampling.reparameterize_normal",
        make=lambda rng: {"mean": rng.normal(size=(3, 2)), "log_variance": rng.normal(size=(3, 2))},
        call=_seeded(r.reparameterize_normal),
        arrays=("mean", "log_variance"),
        backends=("torch",),
        differentiable=("mean", "log_variance"),
        seeded="generator",
        wrong={
            "shapes that differ": lambda given: {**given, "mean": given["mean"][:1]},
            "no samples": lambda given: {**given, "samples": 0},
        },
        without={"float32_agrees_with_float64": "normal draws of the two kinds differ"},
    ),
    Row(
        name=f"{PATH}.sampling.gumbel_max",
        make=_noisy,
        arrays=("logits", "noise"),
        backends=("torch",),
        batched=("logits", "noise"),
        wrong=WRONG_NOISY,
        compiles=True,
    ),
    Row(
        name=f"{PATH}.sampling.gumbel_max",
        make=lambda rng: {"logits": rng.normal(size=(20, 5))},
        call=_seeded(r.gumbel_max),
        seeded="generator",
        backends=("torch",),
        without={"docstring": "checked in the row above"},
    ),
    Row(
        name=f"{PATH}.sampling.gumbel_softmax",
        make=lambda rng: {**_noisy(rng), "temperature": 0.7},
        arrays=("logits", "noise"),
        backends=("torch",),
        batched=("logits", "noise"),
        differentiable=("logits", "noise"),
        compiles=True,
        wrong={**WRONG_NOISY, "temperature 0": _temperature},
    ),
    Row(
        name=f"{PATH}.sampling.gumbel_softmax",
        make=lambda rng: {**_noisy(rng), "temperature": 0.5 + rng.random((3, 1))},
        arrays=("logits", "noise", "temperature"),
        backends=("torch",),
        batched=("logits", "noise", "temperature"),
        differentiable=("logits", "noise", "temperature"),
        without={
            "docstring": "checked in the row above",
            "wrong_rank_is_refused": "a temperature may be a scalar",
        },
    ),
    Row(
        name=f"{PATH}.sampling.gumbel_softmax",
        make=lambda rng: {"logits": rng.normal(size=(3, 5)), "hard": False},
        call=_seeded(r.gumbel_softmax),
        seeded="generator",
        backends=("torch",),
        without={"docstring": "checked in the first row"},
    ),
    Row(
        name=f"{PATH}.sampling.conditional_gumbel",
        make=lambda rng: {"logits": rng.normal(size=(3, 5)), "index": np.array([0, 4, 2])},
        call=_seeded(r.conditional_gumbel),
        arrays=("logits",),
        backends=("torch",),
        differentiable=("logits",),
        seeded="generator",
        wrong={
            "index out of range": lambda given: {**given, "index": given["index"] + 5},
            "an index too few": lambda given: {**given, "index": given["index"][:2]},
            "no samples": lambda given: {**given, "samples": 0},
        },
        without={"float32_agrees_with_float64": "Gumbel draws of the two kinds differ"},
    ),
    Row(
        name=f"{PATH}.sampling.ExponentialTemperature",
        make=lambda rng: {"initial": 1.0, "minimum": 0.1, "rate": 0.2},
        call=_schedule,
        instance=lambda: r.ExponentialTemperature(rate=0.1),
        wrong={
            "minimum 0": lambda given: {**given, "minimum": 0.0},
            "minimum above initial": lambda given: {**given, "minimum": 2.0},
            "rate below 0": lambda given: {**given, "rate": -0.1},
        },
    ),
    Row(
        name=f"{PATH}.subsets.gumbel_top_k",
        make=lambda rng: {**_noisy(rng), "k": 2},
        arrays=("logits", "noise"),
        backends=("torch",),
        batched=("logits", "noise"),
        compiles=True,
        wrong={
            **WRONG_NOISY,
            "nothing to draw": lambda given: {**given, "k": 0},
            "more than there are": lambda given: {**given, "k": 6},
        },
    ),
    Row(
        name=f"{PATH}.subsets.gumbel_top_k",
        make=lambda rng: {"logits": rng.normal(size=(3, 5))},
        call=_seeded(lambda logits, generator: r.gumbel_top_k(logits, 3, generator=generator)[1]),
        seeded="generator",
        differentiable=("logits",),
        backends=("torch",),
        without={"docstring": "checked in the row above"},
    ),
    Row(
        name=f"{PATH}.subsets.relaxed_top_k",
        make=lambda rng: {**_noisy(rng), "k": 2, "temperature": 0.7},
        arrays=("logits", "noise"),
        backends=("torch",),
        batched=("logits", "noise"),
        differentiable=("logits", "noise"),
        compiles=True,
        wrong={
            **WRONG_NOISY,
            "temperature 0": _temperature,
            "nothing to draw": lambda given: {**given, "k": 0},
            "more than there are": lambda given: {**given, "k": 6},
        },
    ),
    Row(
        name=f"{PATH}.subsets.relaxed_top_k",
        make=lambda rng: {"logits": rng.normal(size=(3, 5)), "k": 2},
        call=_seeded(r.relaxed_top_k),
        seeded="generator",
        backends=("torch",),
        without={"docstring": "checked in the row above"},
    ),
    Row(
        name=f"{PATH}.subsets.TopKSample",
        make=lambda rng: {"indices": torch.tensor([2, 0]), "log_probability": torch.tensor(-1.0)},
        backends=("torch",),
    ),
    Row(
        name=f"{PATH}.expectation.categorical_expectation",
        make=_variables,
        call=lambda logits: r.categorical_expectation(_cost, logits, estimator="exact"),
        arrays=("logits",),
        backends=("torch",),
        batched=("logits",),
        differentiable=("logits",),
        wrong={"two dimensions": _single_rows, "every category masked": _masked},
    ),
    Row(
        name=f"{PATH}.expectation.categorical_expectation",
        make=lambda rng: {**_variables(rng), "estimator": "gumbel_rao"},
        call=_seeded(lambda **given: r.categorical_expectation(_cost, **given)),
        arrays=("logits",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "unknown estimator": lambda given: {**given, "estimator": "reinforce"},
            "unknown baseline": lambda given: {**given, "baseline": "mean"},
            "temperature 0": _temperature,
            "no samples": lambda given: {**given, "samples": 0},
        },
        without={
            "docstring": "checked in the row above",
            "float32_agrees_with_float64": "Gumbel draws of the two kinds differ",
        },
    ),
    Row(
        name=f"{PATH}.gradients.relax_gradient",
        make=_variables,
        call=_seeded(
            lambda **given: r.relax_gradient(
                _cost, control_variate=lambda z: z.tanh().sum((-2, -1)), **given
            )
        ),
        arrays=("logits",),
        backends=("torch",),
        seeded="generator",
        wrong={"two dimensions": _single_rows, "every category masked": _masked},
        without={"float32_agrees_with_float64": "Gumbel draws of the two kinds differ"},
    ),
    Row(
        name=f"{PATH}.gradients.RelaxGradient",
        make=lambda rng: {"value": torch.zeros(2), "gradient": torch.zeros(2, 1, 3)},
        backends=("torch",),
    ),
    Row(
        name=f"{PATH}.gradients.gradient_moments",
        make=lambda rng: {"parameter": rng.normal(size=(3, 2))},
        call=_leaf,
        arrays=("parameter",),
        backends=("torch",),
        wrong={"one repeat": lambda given: {**given, "repeats": 1}},
        without={
            "not_finite_is_refused": "a parameter may hold anything that the estimate can use",
            "wrong_rank_is_refused": "a parameter may be a scalar",
        },
    ),
    Row(
        name=f"{PATH}.gradients.GradientMoments",
        make=lambda rng: vars(_moments(torch.ones(2, requires_grad=True))),
        call=r.GradientMoments,
        instance=lambda: _moments(torch.ones(2, requires_grad=True)),
        backends=("torch",),
    ),
]
