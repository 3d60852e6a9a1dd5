"""Contract rows of kexue.generative.vae; those of what diffusion uses stand in ddpm_as_vae."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from contract.row import Arguments, Row
from kexue.generative import vae

PATH = "kexue.generative.vae"
ROW_ONLY = "NaN stays in its row: one bad example must not stop the others"
DRAWS = {
    "not_finite_is_refused": ROW_ONLY,
    "float32_agrees_with_float64": "the draws of another dtype are other draws",
    "batch_equals_loop": "an example alone meets other draws",
}


def _linear(kind: str = "diagonal", dtype: torch.dtype = torch.float64) -> vae.LinearGaussianModel:
    weight = torch.tensor([[1.0, 0.5], [0.6, 0.9], [-0.4, 0.2]], dtype=dtype)
    bias = torch.tensor([0.1, -0.2, 0.3], dtype=dtype)
    return vae.LinearGaussianModel(weight, bias, 0.25, proposal=kind)


def _autoencoder(outputs: int) -> vae.VariationalAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vae.VariationalAutoencoder(nn.Linear(3, outputs), nn.Linear(2, 6), 2)


def _seeded(call: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(generator: Any = None, **given: Any) -> Any:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return call(generator=generator, **given)

    return drawn


def _examples(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(3, 3))}


def _weights(**given: Any) -> Any:
    model = _linear(dtype=given["x"].dtype)
    return vae.log_importance_weights(model, **{"num_samples": 4, **given})


def _loss(**given: Any) -> Any:
    return vae.vae_loss(_linear(dtype=given["x"].dtype), num_samples=4, **given)


def _estimate(**given: Any) -> Any:
    model = _linear(dtype=given["x"].dtype)
    return vae.estimate_log_likelihood(model, **{"num_samples": 4, **given})


def _annealed(**given: Any) -> Any:
    model = _linear(dtype=given["x"].dtype)
    return vae.annealed_importance_sampling(
        model, **{"num_chains": 3, "num_temperatures": 4, **given}
    )


def _draw(loc: Any, generator: Any) -> Any:
    normal = torch.distributions.Normal(loc, 0.5, validate_args=False)
    return vae.reparameterized_sample(normal, (4,), generator=generator)


def _rates(x: Any) -> Any:
    estimate = _seeded(_estimate)(x=x)
    return estimate.bits_per_dimension(3, bin_width=0.5), estimate


def _linear_results(x: Any) -> Any:
    model = _linear(dtype=x.dtype)
    return model.log_prob(x), model.posterior(x).mean, model.proposal(x).variance


def _autoencoder_results(x: Any, outputs: int = 4) -> Any:
    model = _autoencoder(outputs).to(x.dtype)
    proposal = model.proposal(x)
    return proposal.mean, model.likelihood(proposal.mean).stddev


def _discretized(loc: Any, scale: Any) -> Any:
    grid = vae.DiscretizedLogistic(loc, scale, bin_width=0.5, low=-1.0, high=1.0)
    return grid.log_prob(torch.tensor([-1.0, 0.5, 1.0], dtype=loc.dtype))


def _change(**changed: Any) -> Callable[[Arguments], Arguments]:
    return lambda given: {**given, **changed}


def _narrow(given: Arguments) -> Arguments:
    return {**given, "x": given["x"][:, :2]}


def _compiled_loss(x: Any) -> Any:
    # The exact proposal's bound does not depend on the draws, which compiled code may order anew.
    return vae.vae_loss(_linear("exact"), x, num_samples=4)


ROWS = [
    Row(
        name=f"{PATH}.likelihood.DiscretizedLogistic",
        make=lambda rng: {"loc": rng.normal(size=3), "scale": rng.uniform(0.2, 1, size=3)},
        call=_discretized,
        arrays=("loc", "scale"),
        backends=("torch",),
        differentiable=("loc", "scale"),
        wrong={"no scale": lambda given: {**given, "scale": 0 * given["scale"]}},
        without={
            "not_finite_is_refused": ROW_ONLY,
            "wrong_rank_is_refused": "parameters broadcast",
        },
    ),
    Row(
        name=f"{PATH}.models.LatentVariableModel",
        make=lambda rng: {"x": rng.normal(size=(3, 3))},
        call=_linear_results,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        without={"not_finite_is_refused": ROW_ONLY},
    ),
    Row(
        name=f"{PATH}.models.LinearGaussianModel",
        make=_examples,
        call=_linear_results,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        wrong={"other features": _narrow},
        instance=_linear,
        without={
            "not_finite_is_refused": ROW_ONLY,
            "instance_pickles": "its state is compared in the row below",
        },
    ),
    Row(
        name=f"{PATH}.models.LinearGaussianModel",
        make=lambda rng: {"weight": rng.normal(size=(3, 2)), "bias": rng.normal(size=3)},
        call=lambda weight, bias: vae.LinearGaussianModel(weight, bias, 0.5).log_prob(
            torch.ones(2, 3, dtype=weight.dtype)
        ),
        arrays=("weight", "bias"),
        backends=("torch",),
        differentiable=("weight", "bias"),
        wrong={"a bias too few": lambda given: {**given, "bias": given["bias"][:2]}},
        without={
            "docstring": "checked in the row above",
            "not_finite_is_refused": "a diverged model must still give NaN, as a network does",
        },
    ),
    Row(
        name=f"{PATH}.models.LinearGaussianModel",
        make=lambda rng: {"x": rng.normal(size=(12, 4))},
        call=lambda x: vae.LinearGaussianModel.fit(x, 2).log_prob(x),
        arrays=("x",),
        backends=("torch",),
        without={
            "docstring": "checked in the first row",
        },
    ),
    Row(
        name=f"{PATH}.models.VariationalAutoencoder",
        make=_examples,
        call=_autoencoder_results,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        wrong={"an encoder too narrow": _change(outputs=3)},
        without={
            "not_finite_is_refused": ROW_ONLY,
            "wrong_rank_is_refused": "the encoder decides which ranks it takes",
            "wrong_dtype_is_refused": "the encoder decides which dtypes it takes",
        },
    ),
    Row(
        name=f"{PATH}.bound.reparameterized_sample",
        make=lambda rng: {"loc": rng.normal(size=(3, 2))},
        call=_seeded(_draw),
        arrays=("loc",),
        backends=("torch",),
        differentiable=("loc",),
        seeded="generator",
        without={
            **DRAWS,
            "wrong_rank_is_refused": "a distribution may be a scalar's",
            "wrong_dtype_is_refused": "torch's distribution itself refuses or takes it",
        },
    ),
    Row(
        name=f"{PATH}.bound.log_importance_weights",
        make=_examples,
        call=_seeded(_weights),
        arrays=("x",),
        backends=("torch",),
        differentiable=("x",),
        seeded="generator",
        wrong={
            "no samples": _change(num_samples=0),
            "an unknown proposal": _change(proposal="posterior"),
            "no scale": _change(proposal_scale=0.0),
            "other features": _narrow,
        },
        without=DRAWS,
    ),
    Row(
        name=f"{PATH}.bound.importance_weighted_bound",
        make=lambda rng: {"log_weights": rng.normal(size=(4, 3)), "dim": -1},
        arrays=("log_weights",),
        backends=("torch",),
        batched=("log_weights",),
        differentiable=("log_weights",),
        compiles=True,
        wrong={"no samples": lambda given: {"log_weights": given["log_weights"][:, :0], "dim": 1}},
        without={"not_finite_is_refused": "an impossible example has weight 0, whose log is -inf"},
    ),
    Row(
        name=f"{PATH}.bound.vae_loss",
        make=_examples,
        call=_seeded(_loss),
        arrays=("x",),
        backends=("torch",),
        differentiable=("x",),
        seeded="generator",
        wrong={
            "an unknown objective": _change(objective="iwae"),
            "an unknown gradient": _change(gradient="score_function"),
            "other features": _narrow,
        },
        without=DRAWS,
    ),
    Row(
        name=f"{PATH}.bound.vae_loss",
        make=_examples,
        call=_compiled_loss,
        backends=("torch",),
        compiles=True,
        without={"docstring": "checked in the row above"},
    ),
    Row(
        name=f"{PATH}.estimate.estimate_log_likelihood",
        make=_examples,
        call=_seeded(_estimate),
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        seeded="generator",
        wrong={
            "no samples": _change(num_samples=0),
            "an empty chunk": _change(chunk_size=0),
            "an unknown proposal": _change(proposal="posterior"),
            "an unknown correction": _change(bias_correction="bootstrap"),
            "a jackknife of one": _change(bias_correction="jackknife", num_samples=1),
            "other features": _narrow,
        },
        without=DRAWS,
    ),
    Row(
        name=f"{PATH}.estimate.LogLikelihoodEstimate",
        make=_examples,
        call=_rates,
        arrays=("x",),
        backends=("torch",),
        instance=lambda: _seeded(_estimate)(x=torch.ones(2, 3, dtype=torch.float64)),
        without=DRAWS,
    ),
    Row(
        name=f"{PATH}.annealed.annealed_importance_sampling",
        make=_examples,
        call=_seeded(_annealed),
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        seeded="generator",
        wrong={
            "no chains": _change(num_chains=0),
            "one temperature": _change(num_temperatures=1),
            "no step": _change(step_size=0.0),
            "an unknown direction": _change(direction="backward"),
            "no draw of the posterior": _change(direction="reverse"),
            "other features": _narrow,
        },
        without=DRAWS,
    ),
]
