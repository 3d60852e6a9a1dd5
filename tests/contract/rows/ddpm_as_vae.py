"""Contract rows of DDPM as a VAE: kexue.generative.diffusion and the likelihoods it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from contract.row import Row

_NOT_FINITE = (
    "states of a sampler are not inspected: it would synchronise the device at every step; "
    "NaN stays in its own row"
)
_TIME_RANK = "one number for the whole batch is right; the rank of x is tested by hand"


def _linear() -> Any:
    from kexue.generative.diffusion import DiscreteSchedule

    return DiscreteSchedule.linear()


def _mixture(dtype: torch.dtype = torch.float64) -> Any:
    from kexue.generative.diffusion import GaussianMixtureDenoiser

    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=dtype)
    return GaussianMixtureDenoiser(means, torch.tensor([0.05, 0.1]), schedule=_linear())


def _states(rng: np.random.Generator) -> dict[str, Any]:
    return {"x": rng.normal(size=(3, 2)), "time": np.array([5.0, 300.0, 900.0])}


def _steps(rng: np.random.Generator) -> dict[str, Any]:
    return {**_states(rng), "previous_time": np.array([0.0, 299.0, 400.0])}


def _clean(rng: np.random.Generator) -> dict[str, Any]:
    return {"clean": rng.normal(size=(3, 2)), "generator": None}


def _source(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _network_predict(x: Any, time: Any) -> Any:
    from kexue.generative.diffusion import NetworkDenoiser

    return NetworkDenoiser(lambda x, time: torch.sin(3 * x), _linear()).predict(x, time)


def _mixture_predict(x: Any, time: Any) -> Any:
    prediction = _mixture().predict(x, time)
    return prediction, _mixture().clean_variance(x, time)


def _read(output: Any, x: Any, time: Any) -> Any:
    from kexue.generative.diffusion import Prediction

    prediction = Prediction.from_output(output, x, time, _linear(), "v_prediction")
    return prediction.sample, prediction.epsilon, prediction.score


def _prediction() -> Any:
    return _mixture().predict(torch.zeros(2, 2, dtype=torch.float64), 5)


def _weights(time: Any, previous_time: Any, eta: float = 1.0) -> Any:
    from kexue.generative.diffusion import transition_weights

    return transition_weights(_linear(), time, previous_time, eta=eta)


def _transition(x: Any, time: Any, previous_time: Any) -> Any:
    from kexue.generative.diffusion import reverse_transition

    denoiser = _mixture()
    return reverse_transition(
        denoiser, x, time, previous_time, clean_variance=denoiser.clean_variance
    )


def _sample(initial: Any, generator: Any = None, num_steps: int = 4) -> Any:
    from kexue.generative.diffusion import sample

    return sample(_mixture(), initial=initial, num_steps=num_steps, generator=_source(generator))


def _loss(clean: Any, generator: Any = None, target: str = "epsilon") -> Any:
    from kexue.generative.diffusion import denoising_loss

    return denoising_loss(
        _mixture(), clean, target=target, reduction="none", generator=_source(generator)
    )


def _bound(clean: Any, generator: Any = None, num_steps: int = 4) -> Any:
    from kexue.generative.diffusion import variational_bound

    return variational_bound(_mixture(), clean, num_steps=num_steps, generator=_source(generator))


def _image_denoiser() -> Any:
    from kexue.generative.diffusion import ImageDenoiser

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageDenoiser((1, 2, 2), hidden=8, depth=1).eval()


def _image_predict(x: Any) -> Any:
    return _image_denoiser().to(x.dtype).predict(x, 300)


def _bound_instance() -> Any:
    return _bound(torch.zeros(2, 2, dtype=torch.float64))


def _times(batch: int, generator: Any = None) -> Any:
    from kexue.generative.diffusion import sample_times

    return sample_times(_linear(), batch, generator=_source(generator))


def _discrete(signal_scale: Any) -> Any:
    from kexue.generative.diffusion import DiscreteSchedule

    schedule = DiscreteSchedule(signal_scale)
    return schedule.sigma(torch.tensor([0.5, 1.5, 3.0])), schedule.betas


def _add_noise(clean: Any, noise: Any, time: Any) -> Any:
    return _linear().add_noise(clean, noise, time)


def _continuous(time: Any) -> Any:
    from kexue.generative.diffusion import VariancePreservingSchedule

    schedule = VariancePreservingSchedule()
    return schedule.signal_scale(time), schedule.log_sigma(time)


def _heat(time: Any) -> Any:
    from kexue.generative.diffusion import HeatSchedule

    return HeatSchedule().log_signal_to_noise(time)


def _discretized(loc: Any, scale: Any) -> Any:
    from kexue.generative.vae import DiscretizedNormal

    grid = DiscretizedNormal(loc, scale, bin_width=0.5, low=-1.0, high=1.0)
    return grid.log_prob(torch.tensor([-1.0, 0.5, 1.0], dtype=loc.dtype))


def _dequantize(value: Any, bin_width: float, generator: Any = None) -> Any:
    from kexue.generative.vae import uniform_dequantize

    return uniform_dequantize(value, bin_width=bin_width, generator=_source(generator))


_DRAWS = {
    "float32_agrees_with_float64": "the draws of another dtype are other draws",
    "batch_equals_loop": "an example alone meets other draws",
}

ROWS = [
    Row(
        name="kexue.generative.diffusion.schedule.base.NoiseSchedule",
        make=lambda rng: {
            "clean": rng.normal(size=(3, 2)),
            "noise": rng.normal(size=(3, 2)),
            "time": np.array([0.0, 10.0, 900.0]),
        },
        call=_add_noise,
        arrays=("clean", "noise"),
        backends=("torch",),
        batched=("clean", "noise", "time"),
        differentiable=("clean", "noise"),
        wrong={
            "noise of another shape": lambda given: {**given, "noise": given["noise"][:2]},
            "a time beyond the last": lambda given: {**given, "time": given["time"] + 500},
        },
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_dtype_is_refused": "complex data may be noised too",
        },
    ),
    Row(
        name="kexue.generative.diffusion.schedule.discrete.DiscreteSchedule",
        make=lambda rng: {"signal_scale": np.array([0.9, 0.7, 0.4, 0.1])},
        call=_discrete,
        arrays=("signal_scale",),
        backends=("torch",),
        wrong={"no decrease": lambda given: {"signal_scale": given["signal_scale"].flip(0)}},
        instance=_linear,
        without={"instance_pickles": "its state is compared in test_schedule"},
    ),
    Row(
        name="kexue.generative.diffusion.schedule.continuous.VariancePreservingSchedule",
        make=lambda rng: {"time": rng.uniform(0.1, 0.9, size=4)},
        call=_continuous,
        arrays=("time",),
        backends=("torch",),
        batched=("time",),
        differentiable=("time",),
        wrong={"a time beyond 1": lambda given: {"time": given["time"] + 1}},
        without={"wrong_rank_is_refused": "a single time is right"},
    ),
    Row(
        name="kexue.generative.diffusion.schedule.continuous.HeatSchedule",
        make=lambda rng: {"time": rng.uniform(0.1, 70, size=4)},
        call=_heat,
        arrays=("time",),
        backends=("torch",),
        batched=("time",),
        differentiable=("time",),
        wrong={"a negative time": lambda given: {"time": -given["time"]}},
        without={"wrong_rank_is_refused": "a single time is right"},
    ),
    Row(
        name="kexue.generative.diffusion.denoiser.prediction.Prediction",
        make=lambda rng: {**_states(rng), "output": rng.normal(size=(3, 2))},
        call=_read,
        arrays=("output", "x"),
        backends=("torch",),
        batched=("output", "x", "time"),
        differentiable=("output", "x"),
        wrong={"another shape": lambda given: {**given, "output": given["output"][:, :1]}},
        instance=_prediction,
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_dtype_is_refused": "complex outputs are refused where the state is: in predict",
        },
    ),
    Row(
        name="kexue.generative.diffusion.denoiser.prediction.Denoiser",
        make=_states,
        call=lambda x, time: _mixture().predict(x, time),
        arrays=("x", "time"),
        backends=("torch",),
        batched=("x", "time"),
        without={"not_finite_is_refused": _NOT_FINITE, "wrong_rank_is_refused": _TIME_RANK},
    ),
    Row(
        name="kexue.generative.diffusion.denoiser.network.NetworkDenoiser",
        make=_states,
        call=_network_predict,
        arrays=("x", "time"),
        backends=("torch",),
        batched=("x", "time"),
        differentiable=("x",),
        wrong={"time zero": lambda given: {**given, "time": 0 * given["time"]}},
        without={"not_finite_is_refused": _NOT_FINITE, "wrong_rank_is_refused": _TIME_RANK},
    ),
    Row(
        name="kexue.generative.diffusion.denoiser.mixture.GaussianMixtureDenoiser",
        make=_states,
        call=_mixture_predict,
        arrays=("x", "time"),
        backends=("torch",),
        batched=("x", "time"),
        differentiable=("x",),
        wrong={"another event": lambda given: {**given, "x": given["x"][:, :1]}},
        without={"not_finite_is_refused": _NOT_FINITE, "wrong_rank_is_refused": _TIME_RANK},
    ),
    Row(
        name="kexue.generative.diffusion.sampling.TransitionWeights",
        make=lambda rng: {"time": np.array([5.0, 300.0]), "previous_time": np.array([0.0, 299.0])},
        call=_weights,
        arrays=("time", "previous_time"),
        backends=("torch",),
        instance=lambda: _weights(500, 250),
        without={
            "wrong_rank_is_refused": "a single time is right",
            "instance_pickles": "a named tuple has no state of its own",
        },
    ),
    Row(
        name="kexue.generative.diffusion.sampling.transition_weights",
        make=lambda rng: {"time": np.array([5.0, 300.0]), "previous_time": np.array([0.0, 299.0])},
        call=_weights,
        arrays=("time", "previous_time"),
        backends=("torch",),
        batched=("time", "previous_time"),
        wrong={
            "times that do not decrease": lambda given: {**given, "previous_time": given["time"]},
            "too much noise": lambda given: {**given, "eta": 1.5},
        },
        without={"wrong_rank_is_refused": "a single time is right"},
    ),
    Row(
        name="kexue.generative.diffusion.sampling.Transition",
        make=_steps,
        call=_transition,
        arrays=("x",),
        backends=("torch",),
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.sampling.reverse_transition",
        make=_steps,
        call=_transition,
        arrays=("x",),
        backends=("torch",),
        batched=("x", "time", "previous_time"),
        differentiable=("x",),
        wrong={"times that do not decrease": lambda g: {**g, "previous_time": g["time"]}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.sampling.sample",
        make=lambda rng: {"initial": rng.normal(size=(3, 2)), "generator": None},
        call=_sample,
        arrays=("initial",),
        backends=("torch",),
        batched=("initial",),
        seeded="generator",
        wrong={"no steps": lambda given: {**given, "num_steps": 0}},
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
    Row(
        name="kexue.generative.diffusion.training.sample_times",
        make=lambda rng: {"batch": 50, "generator": None},
        call=_times,
        seeded="generator",
        wrong={"a negative number": lambda given: {**given, "batch": -1}},
    ),
    Row(
        name="kexue.generative.diffusion.training.denoising_loss",
        make=_clean,
        call=_loss,
        arrays=("clean",),
        backends=("torch",),
        batched=("clean",),
        differentiable=("clean",),
        seeded="generator",
        wrong={"an unknown target": lambda given: {**given, "target": "noise"}},
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
    Row(
        name="kexue.generative.diffusion.bound.variational_bound",
        make=_clean,
        call=_bound,
        arrays=("clean",),
        backends=("torch",),
        batched=("clean",),
        seeded="generator",
        wrong={"no decoder variance": lambda given: {**given, "num_steps": 1}},
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
    Row(
        name="kexue.generative.diffusion.bound.VariationalBound",
        make=_clean,
        call=lambda clean, generator: _bound(clean, generator).bits_per_dimension(),
        arrays=("clean",),
        backends=("torch",),
        instance=_bound_instance,
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
    Row(
        name="kexue.generative.diffusion.images.ImageDenoiser",
        make=lambda rng: {"x": rng.normal(size=(3, 1, 2, 2))},
        call=_image_predict,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        instance=_image_denoiser,
        wrong={"other images": lambda given: {"x": given["x"][..., :1]}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.vae.likelihood.DiscretizedNormal",
        make=lambda rng: {"loc": rng.normal(size=3), "scale": rng.uniform(0.2, 1, size=3)},
        call=_discretized,
        arrays=("loc", "scale"),
        backends=("torch",),
        differentiable=("loc", "scale"),
        wrong={"no scale": lambda given: {**given, "scale": 0 * given["scale"]}},
        without={
            "not_finite_is_refused": "NaN of one row must not stop the likelihood of the others",
            "wrong_rank_is_refused": "parameters broadcast",
        },
    ),
    Row(
        name="kexue.generative.vae.likelihood.bits_per_dimension",
        make=lambda rng: {"log_likelihood": rng.normal(size=4), "num_dimensions": 8},
        arrays=("log_likelihood",),
        backends=("torch",),
        batched=("log_likelihood",),
        differentiable=("log_likelihood",),
        wrong={"no dimensions": lambda given: {**given, "num_dimensions": 0}},
        without={
            "not_finite_is_refused": "an impossible example costs infinitely many bits",
            "wrong_rank_is_refused": "a single log-likelihood is right",
        },
    ),
    Row(
        name="kexue.generative.vae.likelihood.uniform_dequantize",
        make=lambda rng: {"value": rng.normal(size=(3, 2)), "bin_width": 0.5, "generator": None},
        call=_dequantize,
        arrays=("value",),
        backends=("torch",),
        batched=("value",),
        seeded="generator",
        wrong={"no width": lambda given: {**given, "bin_width": 0.0}},
        without={
            **_DRAWS,
            "not_finite_is_refused": "NaN of one row must not stop the others",
            "wrong_rank_is_refused": "values of any shape are right",
        },
    ),
]
