"""Contract rows of kexue.generative.energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.row import Arguments, Row
from kexue.generative import energy

PATH = "kexue.generative.energy"
NETWORK_DECIDES = "not finite energies are the network's affair, and stay visible in the loss"
OTHER_DRAWS = {
    "float32_agrees_with_float64": "the draws of another dtype are other draws",
    "batch_equals_loop": "an example alone meets other draws",
}


def quartic(x: Tensor) -> Tensor:
    return (x.square().square() / 4 + x.square() / 2).flatten(1).sum(1)


def matrix(x: Tensor) -> Tensor:
    """An energy of the wrong shape."""
    return x.square()


def change(**changed: Any) -> Callable[[Arguments], Arguments]:
    return lambda given: {**given, **changed}


def examples(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(3, 2))}


def seeded(call: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(generator: Any = None, **given: Any) -> Any:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return call(generator=generator, **given)

    return drawn


def chain(**given: Any) -> energy.ChainResult:
    return energy.langevin_sample(
        **{"energy": quartic, "step_size": 0.1, "num_steps": 4, "metropolis": True, **given}
    )


def descend(x: Tensor) -> Tensor:
    return energy.langevin_sample(quartic, x, step_size=0.1, num_steps=3, temperature=0.0).samples


def loss(positive: Tensor, negative: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = energy.contrastive_divergence_loss(
        **{"energy": quartic, "energy_penalty": 0.1, **given, "positive": positive},
        negative=negative,
    )
    return output.loss, output.contrast, output.regularization


def buffered(states: Tensor, generator: Any = None, **given: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    buffer = energy.ReplayBuffer(
        **{
            "capacity": 4,
            "sample_shape": (2,),
            "reinit_probability": 0.5,
            "dtype": states.dtype,
            "generator": generator,
            **given,
        }
    )
    buffer.add(states)
    return buffer.draw(6)


def trained(x: Tensor, generator: Any = None, **given: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    network = network.to(torch.float64 if x.is_complex() else x.dtype)
    trainer = energy.EnergyModelTrainer(
        network,
        torch.optim.SGD(network.parameters(), 0.01),
        energy.ReplayBuffer(8, (2,), dtype=x.dtype, generator=generator),
        **{"num_steps": 3, "generator": generator, **given},
    )
    trainer.step(x)
    return [trainer.generate(4, num_steps=2), *network.parameters()]


def bounded(weight: Tensor) -> Tensor:
    layer = nn.Linear(3, 2).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        # Power iteration starts from a random vector and is long over when this one ends.
        energy.apply_spectral_norm(layer)
        for _ in range(500):
            layer(weight)
    return layer.weight.detach()


def partition(
    samples: Tensor | None, generator: Any = None, **given: Any
) -> energy.LogPartitionEstimate:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    dtype = torch.float64 if samples is None or samples.is_complex() else samples.dtype
    base = energy.DiagonalNormal(torch.zeros(2, dtype=dtype), 1.5)
    return energy.ais_log_partition(
        **{
            "energy": quartic,
            "base": base,
            "num_chains": 3,
            "num_temperatures": 4,
            "direction": "reverse",
            "samples": samples,
            "generator": generator,
            **given,
        }
    )


def normal(mean: Tensor, std: Tensor, generator: Any = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    law = energy.DiagonalNormal(mean, std)
    return law.log_prob(torch.ones(2, 3, dtype=mean.dtype)), law.sample((4,), generator)


def box(low: Tensor, high: Tensor, generator: Any = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    law = energy.UniformBox(low, high)
    return law.log_prob(torch.zeros(2, 3, dtype=low.dtype)), law.sample((4,), generator)


DRAWN_SAMPLE = {
    "float32_agrees_with_float64": "the draws of another dtype are other draws",
    "wrong_rank_is_refused": "a state may be a number",
}

ROWS = [
    Row(
        name=f"{PATH}.chain.energy_and_grad",
        make=lambda rng: {"energy": quartic, **examples(rng)},
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        compiles=True,
        wrong={"an energy of another shape": change(energy=matrix)},
        without={"not_finite_is_refused": "a diverging chain is reported by the sampler"},
    ),
    Row(
        name=f"{PATH}.chain.langevin_sample",
        make=examples,
        call=seeded(chain),
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        seeded="generator",
        wrong={
            "no step": change(step_size=0.0),
            "steps back": change(num_steps=-1),
            "cold below zero": change(temperature=-1.0, metropolis=False),
            "a clamp upside down": change(clamp=(1.0, -1.0), metropolis=False),
            "metropolis with a clamp": change(clamp=(-1.0, 1.0)),
            "metropolis with a bound": change(max_grad_norm=1.0),
            "metropolis with its own noise": change(noise_std=0.1),
            "metropolis at temperature 0": change(temperature=0.0),
            "an energy of another shape": change(energy=matrix),
            "a start that is no number": change(x=torch.full((3, 2), np.nan)),
        },
        without=OTHER_DRAWS,
    ),
    Row(
        name=f"{PATH}.chain.langevin_sample",
        make=examples,
        call=descend,
        arrays=("x",),
        backends=("torch",),
        compiles=True,
        without={"docstring": "checked in the row above"},
    ),
    Row(
        name=f"{PATH}.chain.ChainResult",
        make=examples,
        call=seeded(chain),
        arrays=("x",),
        backends=("torch",),
        instance=lambda: seeded(chain)(x=torch.ones(2, 2), return_trajectory=True),
        without=OTHER_DRAWS,
    ),
    Row(
        name=f"{PATH}.buffer.ReplayBuffer",
        make=lambda rng: {"states": rng.normal(size=(3, 2))},
        call=buffered,
        arrays=("states",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "no capacity": change(capacity=0),
            "a probability above 1": change(reinit_probability=1.5),
            "other states": change(sample_shape=(3,)),
        },
        without={
            "not_finite_is_refused": "a buffer stores; the sampler refuses such a start",
            "float32_agrees_with_float64": "fresh starts of another dtype are other draws",
            "wrong_dtype_is_refused": "torch itself converts or refuses it",
        },
    ),
    Row(
        name=f"{PATH}.training.contrastive_divergence_loss",
        make=lambda rng: {
            "positive": rng.normal(size=(3, 2)),
            "negative": rng.normal(size=(4, 2)),
        },
        call=loss,
        arrays=("positive", "negative"),
        backends=("torch",),
        differentiable=("positive",),
        compiles=True,
        wrong={
            "an unknown penalty": change(penalty="product"),
            "a negative penalty": change(energy_penalty=-1.0),
            "an energy of another shape": change(energy=matrix),
            "no negatives": lambda given: {**given, "negative": given["negative"][:0]},
        },
        without={"not_finite_is_refused": NETWORK_DECIDES},
    ),
    Row(
        name=f"{PATH}.training.ContrastiveDivergenceOutput",
        make=lambda rng: {"positive": rng.normal(size=(3, 2)), "negative": rng.normal(size=(4, 2))},
        call=lambda positive, negative: energy.contrastive_divergence_loss(
            quartic, positive, negative
        ),
        arrays=("positive", "negative"),
        backends=("torch",),
        instance=lambda: energy.contrastive_divergence_loss(
            quartic, torch.ones(3, 2), torch.zeros(2, 2)
        ),
        without={"not_finite_is_refused": NETWORK_DECIDES},
    ),
    Row(
        name=f"{PATH}.training.EnergyModelTrainer",
        make=lambda rng: {"x": rng.normal(size=(4, 2))},
        call=trained,
        arrays=("x",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "no step": change(step_size=0.0),
            "an unknown penalty": change(penalty="product"),
            "a clamp upside down": change(clamp=(1.0, -1.0)),
        },
        without={
            "not_finite_is_refused": NETWORK_DECIDES,
            "float32_agrees_with_float64": "the draws of another dtype are other draws",
        },
    ),
    Row(
        name=f"{PATH}.training.apply_spectral_norm",
        make=lambda rng: {"weight": rng.normal(size=(2, 3))},
        call=bounded,
        backends=("torch",),
    ),
    Row(
        name=f"{PATH}.partition.DiagonalNormal",
        make=lambda rng: {"mean": rng.normal(size=3), "std": rng.uniform(0.5, 2, size=3)},
        call=normal,
        arrays=("mean", "std"),
        backends=("torch",),
        differentiable=("mean", "std"),
        seeded="generator",
        wrong={"no width": lambda given: {**given, "std": 0 * given["std"]}},
        without=DRAWN_SAMPLE,
    ),
    Row(
        name=f"{PATH}.partition.UniformBox",
        make=lambda rng: {"low": -rng.uniform(1, 2, size=3), "high": rng.uniform(1, 2, size=3)},
        call=box,
        arrays=("low", "high"),
        backends=("torch",),
        seeded="generator",
        wrong={"a box inside out": lambda given: {"low": given["high"], "high": given["low"]}},
        without=DRAWN_SAMPLE,
    ),
    Row(
        name=f"{PATH}.partition.ais_log_partition",
        make=lambda rng: {"samples": rng.normal(size=(3, 2))},
        call=partition,
        arrays=("samples",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "no chains": change(num_chains=0),
            "no temperatures": change(num_temperatures=0),
            "no step": change(step_size=0.0),
            "moves back": change(num_mcmc_steps=-1),
            "an unknown direction": change(direction="sideways"),
            "backwards from nowhere": change(samples=None, num_chains=3),
            "a sample too few": change(num_chains=4),
            "betas that stand still": change(betas=[0.0, 0.5, 0.5, 1.0]),
            "an energy of another shape": change(energy=matrix),
        },
        without={
            "float32_agrees_with_float64": "the draws of another dtype are other draws",
            "not_finite_is_refused": NETWORK_DECIDES,
        },
    ),
    Row(
        name=f"{PATH}.partition.LogPartitionEstimate",
        make=lambda rng: {"samples": rng.normal(size=(3, 2))},
        call=partition,
        backends=("torch",),
        instance=lambda: partition(torch.ones(3, 2)),
    ),
    Row(
        name=f"{PATH}.scores.energy_score",
        make=lambda rng: {"energy": quartic, **examples(rng)},
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        compiles=True,
        wrong={"an energy of another shape": change(energy=matrix)},
        without={"not_finite_is_refused": "the energy of such an example is its score: not finite"},
    ),
    Row(
        name=f"{PATH}.scores.typicality_score",
        make=lambda rng: {
            "energy": quartic,
            **examples(rng),
            "reference_energies": rng.normal(size=5),
        },
        arrays=("x", "reference_energies"),
        backends=("torch",),
        batched=("x",),
        wrong={
            "no reference": lambda given: {
                **given,
                "reference_energies": given["reference_energies"][:0],
            },
            "one number": lambda given: {
                **given,
                "reference_energies": torch.ones_like(given["reference_energies"]),
            },
        },
        without={"not_finite_is_refused": "the energy of such an example is its score: not finite"},
    ),
]
