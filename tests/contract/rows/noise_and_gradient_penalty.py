"""Rows of `kexue.training.regularization`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.row import Arguments, Row
from kexue.training.regularization import (
    VirtualAdversarialLoss,
    adversarial_perturbation,
    consistency_loss,
    freeze_running_statistics,
    gradient_penalty,
    laplacian,
    noisy_loss,
    parameter_adversarial_perturbation,
    parameter_noise,
    perturb_output,
    perturb_parameters,
    virtual_adversarial_perturbation,
)

PACKAGE = "kexue.training.regularization"
NOT_FINITE = "looking at values in every training step would wait for the accelerator"
PARAMETER = "a parameter may have any number of dimensions"
DRAWS = "each sample has noise of its own, and a smaller batch draws less of it"

WEIGHT = [[0.5, -1.0, 0.25], [1.5, 0.75, -0.5], [-0.25, 0.5, 1.0], [1.0, 1.0, -1.0]]


def function(x: Tensor) -> Tensor:
    return (x @ torch.tensor(WEIGHT, dtype=x.dtype).T).tanh()


def loss_function(x: Tensor) -> Tensor:
    return function(x).square().sum(1) + x.sin().sum(1)


def inputs(rng: np.random.Generator) -> Arguments:
    return {"inputs": rng.standard_normal((4, 3))}


def and_another(name: str) -> Callable[[np.random.Generator], Arguments]:
    return lambda rng: {**inputs(rng), name: rng.standard_normal((4, 3))}


def seeded(public: Callable[..., Any], *first: Any, **options: Any) -> Callable[..., Any]:
    """Call with a copy of the generator, which a call would otherwise move on."""

    def call(inputs: Any, generator: Any = None, **given: Any) -> Any:
        generator = torch.Generator().manual_seed(3) if generator is None else generator
        return public(*first, inputs, generator=generator.clone_state(), **options, **given)

    return call


class Loss(nn.Module):
    """The loss of a network, as it stands in a training loop."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.loss = VirtualAdversarialLoss(epsilon=0.5, **options)

    def forward(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(3) if generator is None else generator
        return self.loss(self.network, inputs, generator=generator.clone_state())


def around(context: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """What a normalised linear layer gives inside the context, and its state afterwards."""

    def call(inputs: Tensor, **given: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).to(inputs.dtype)
        given = {
            name: value.clone_state() if isinstance(value, torch.Generator) else value
            for name, value in given.items()
        }
        with context(layer, **options, **given):
            inside = layer(inputs)
        return [inside, *layer.state_dict().values()]

    return call


def perturbed_weights(parameter: Tensor, perturbation: Tensor) -> list[Tensor]:
    weight = parameter.detach().clone().requires_grad_()
    with perturb_parameters([weight], [perturbation]):
        inside = weight.detach().clone()
    return [inside, weight]


def along_gradient(gradient: Tensor, epsilon: float) -> list[Tensor]:
    parameter = nn.Parameter(torch.zeros_like(gradient, memory_format=torch.contiguous_format))
    parameter.grad = gradient
    return parameter_adversarial_perturbation([parameter], epsilon=epsilon)


def changing(name: str, value: Any) -> Callable[[Arguments], Arguments]:
    return lambda given: {**given, name: value}


def without(*pairs: tuple[str, str]) -> Iterator[tuple[str, str]]:
    yield "not_finite_is_refused", NOT_FINITE
    yield from pairs


TOKENS = {"token indices": changing("inputs", torch.ones(4, 3, dtype=torch.long))}

ROWS = [
    Row(
        name=f"{PACKAGE}.expansion.noisy_loss",
        make=inputs,
        call=seeded(noisy_loss, loss_function, standard_deviation=0.3, reduction="none"),
        arrays=("inputs",),
        backends=("torch",),
        batched=("inputs",),
        differentiable=("inputs",),
        seeded="generator",
        wrong={
            **TOKENS,
            "no samples": changing("samples", 0),
            "odd pairs": lambda given: {**given, "samples": 3, "antithetic": True},
        },
        without=dict(without(("batch_equals_loop", DRAWS))),
    ),
    Row(
        name=f"{PACKAGE}.expansion.laplacian",
        make=inputs,
        call=seeded(laplacian, loss_function, create_graph=True),
        arrays=("inputs",),
        backends=("torch",),
        batched=("inputs",),
        differentiable=("inputs",),
        wrong={
            **TOKENS,
            "unknown estimator": changing("estimator", "monte carlo"),
            "no probes": changing("probes", 0),
        },
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.expansion.gradient_penalty",
        make=lambda rng: {**inputs(rng), "metric": "categorical"},
        call=seeded(gradient_penalty, function, reduction="none"),
        arrays=("inputs",),
        backends=("torch",),
        batched=("inputs",),
        differentiable=("inputs",),
        wrong={
            **TOKENS,
            "unknown metric": changing("metric", "cosine"),
            "unknown estimator": changing("estimator", "hutchinson"),
            "half a probe": changing("probes", 0.5),
        },
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.expansion.gradient_penalty",
        make=lambda rng: {**inputs(rng), "metric": "bernoulli"},
        call=seeded(gradient_penalty, function, estimator="rademacher", reduction="none"),
        arrays=("inputs",),
        backends=("torch",),
        differentiable=("inputs",),
        seeded="generator",
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.divergence.consistency_loss",
        make=and_another("perturbation"),
        call=lambda **given: consistency_loss(
            function, **given, detach_target=False, reduction="none"
        ),
        arrays=("inputs", "perturbation"),
        backends=("torch",),
        batched=("inputs", "perturbation"),
        differentiable=("inputs", "perturbation"),
        wrong={
            **TOKENS,
            "one perturbation for all": lambda given: {
                **given,
                "perturbation": given["perturbation"][0],
            },
            "unknown metric": changing("metric", "cosine"),
        },
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.adversarial.adversarial_perturbation",
        make=lambda rng: {**inputs(rng), "epsilon": 0.5, "steps": 3},
        call=seeded(adversarial_perturbation, loss_function),
        arrays=("inputs",),
        backends=("torch",),
        batched=("inputs",),
        wrong={
            **TOKENS,
            "negative radius": changing("epsilon", -0.5),
            "no step": changing("steps", 0),
            "unknown norm": changing("norm", "l1"),
            "mask of numbers": changing("mask", torch.ones(4, 3)),
        },
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.adversarial.adversarial_perturbation",
        make=lambda rng: {**inputs(rng), "epsilon": 0.5},
        call=seeded(
            adversarial_perturbation, loss_function, norm="l2", random_start=True, step_size=0.1
        ),
        arrays=("inputs",),
        backends=("torch",),
        seeded="generator",
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.virtual.virtual_adversarial_perturbation",
        make=lambda rng: {**and_another("initial")(rng), "epsilon": 0.5, "choose_sign": True},
        call=lambda **given: virtual_adversarial_perturbation(function, **given),
        arrays=("inputs", "initial"),
        backends=("torch",),
        batched=("inputs", "initial"),
        wrong={
            **TOKENS,
            "negative radius": changing("epsilon", -0.5),
            "no step of the difference": changing("xi", 0.0),
            "negative iterations": changing("iterations", -1),
            "unknown hessian": changing("hessian", "newton"),
        },
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.virtual.virtual_adversarial_perturbation",
        make=inputs,
        call=seeded(virtual_adversarial_perturbation, function, epsilon=0.5),
        arrays=("inputs",),
        backends=("torch",),
        seeded="generator",
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.virtual.VirtualAdversarialLoss",
        make=inputs,
        module=lambda: Loss(reduction="none"),
        arrays=("inputs",),
        backends=("torch",),
        batched=("inputs",),
        seeded="generator",
        wrong=TOKENS,
        without=dict(without(("batch_equals_loop", DRAWS))),
    ),
    Row(
        name=f"{PACKAGE}.contexts.freeze_running_statistics",
        make=inputs,
        call=around(freeze_running_statistics),
        arrays=("inputs",),
        backends=("torch",),
        without=dict(
            without(
                ("wrong_rank_is_refused", "the layer within refuses them, in its own words"),
                ("wrong_dtype_is_refused", "the layer within refuses them, in its own words"),
            )
        ),
    ),
    Row(
        name=f"{PACKAGE}.contexts.parameter_noise",
        make=lambda rng: {**inputs(rng), "standard_deviation": 0.3},
        call=around(parameter_noise),
        arrays=("inputs",),
        backends=("torch",),
        seeded="generator",
        wrong={"negative noise": changing("standard_deviation", -0.3)},
        without=dict(
            without(
                ("wrong_rank_is_refused", "the layer within refuses them, in its own words"),
                ("wrong_dtype_is_refused", "the layer within refuses them, in its own words"),
                ("same_input_same_result", "without a generator, noise is another each time"),
                ("non_contiguous_input", "without a generator, noise is another each time"),
                ("float32_agrees_with_float64", "the noise is rounded with the parameters"),
            )
        ),
    ),
    Row(
        name=f"{PACKAGE}.contexts.perturb_output",
        make=and_another("perturbation"),
        call=around(perturb_output),
        arrays=("inputs", "perturbation"),
        backends=("torch",),
        wrong={"no tensor": changing("perturbation", 1.0)},
        without=dict(
            without(
                ("wrong_rank_is_refused", "the layer within refuses them, in its own words"),
                ("wrong_dtype_is_refused", "the layer within refuses them, in its own words"),
            )
        ),
    ),
    Row(
        name=f"{PACKAGE}.contexts.perturb_parameters",
        make=lambda rng: {
            "parameter": rng.standard_normal((4, 3)),
            "perturbation": rng.standard_normal((4, 3)),
        },
        call=perturbed_weights,
        arrays=("parameter", "perturbation"),
        backends=("torch",),
        wrong={"another shape": lambda given: {**given, "perturbation": given["perturbation"][:1]}},
        without=dict(without()),
    ),
    Row(
        name=f"{PACKAGE}.adversarial.parameter_adversarial_perturbation",
        make=lambda rng: {"gradient": rng.standard_normal((4, 3)), "epsilon": 0.5},
        call=along_gradient,
        arrays=("gradient",),
        backends=("torch",),
        wrong={"negative radius": changing("epsilon", -0.5)},
        without=dict(without(("wrong_rank_is_refused", PARAMETER))),
    ),
]
