"""The parts of the package meet: every schedule with every parametrisation and every noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from kexue.generative import diffusion
from kexue.generative.diffusion import (
    Denoiser,
    DiscreteSchedule,
    GaussianMixtureDenoiser,
    HeatSchedule,
    NetworkDenoiser,
    NoiseSchedule,
    VariancePreservingSchedule,
    reverse_transition,
    sample,
    transition_weights,
    variational_bound,
)

SCHEDULES = {
    "linear": DiscreteSchedule.linear(),
    "cosine": DiscreteSchedule.cosine(),
    "proportional": DiscreteSchedule.proportional(),
    "scaled linear": DiscreteSchedule.scaled_linear(),
    "variance preserving": VariancePreservingSchedule(),
    "heat": HeatSchedule(20.0),
}
VARIANCE = 0.04
MEAN = torch.tensor([0.8, -0.3], dtype=torch.float64)


def one_gaussian(schedule: NoiseSchedule) -> GaussianMixtureDenoiser:
    variance = torch.tensor([VARIANCE], dtype=torch.float64)
    return GaussianMixtureDenoiser(MEAN[None], variance, schedule=schedule)


class Exact(nn.Module):
    """The exact network of one Gaussian for a prediction type."""

    def __init__(self, schedule: NoiseSchedule, kind: str) -> None:
        super().__init__()
        self.denoiser, self.kind = one_gaussian(schedule), kind

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        prediction = self.denoiser.predict(x, time)
        return getattr(prediction, self.kind)


def test_the_package_offers_every_name_of_its_parts() -> None:
    for part in ("schedule", "denoiser", "sampling", "training", "bound"):
        module = getattr(diffusion, part)
        for name in module.__all__:
            assert getattr(diffusion, name) is getattr(module, name)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "score"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_parametrisation_is_the_same_denoiser(name: str, kind: str) -> None:
    schedule = SCHEDULES[name]
    exact = one_gaussian(schedule)
    network = NetworkDenoiser(Exact(schedule, kind), schedule, prediction_type=kind)
    assert isinstance(network, Denoiser)
    time = schedule.times(4)[1]
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (reverse_transition(d, x, time, time / 2) for d in (network, exact))
    # Through v or the score a few roundings are magnified by at most sigma, here below 1e3.
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-11, atol=1e-11)


def chain_moments(schedule: NoiseSchedule, times: Tensor, eta: float) -> tuple[Tensor, float]:
    """Mean and variance of the chain without clean variance: each step is an affine map."""
    mean, variance = torch.zeros_like(MEAN), schedule.prior_scale**2
    for time, previous in itertools.pairwise(times):
        current, clean, noise = transition_weights(schedule, time, previous, eta=eta)
        signal, noise_scale = schedule.signal_scale(time), schedule.noise_scale(time)
        gain = signal * VARIANCE / (signal**2 * VARIANCE + noise_scale**2)
        factor = current + clean * gain
        mean = factor * mean + clean * (1 - gain * signal) * MEAN
        variance = float(factor**2 * variance + noise**2)
    return mean, variance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_have_the_moments_of_their_chain(name: str, eta: float) -> None:
    schedule, count = SCHEDULES[name], 4000
    times = schedule.times(12, spacing="karras")[:-1]
    drawn = sample(
        one_gaussian(schedule),
        (count, 2),
        times=times,
        eta=eta,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    mean, variance = chain_moments(schedule, times, eta)
    # Five standard errors, of a mean and of a variance.
    assert (drawn.mean(0) - mean).abs().max() <= 5 * math.sqrt(variance / count)
    assert (drawn.var(0) / variance - 1).abs().max() <= 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_exact_variance_samples_have_the_moments_of_the_data(name: str) -> None:
    schedule, count = SCHEDULES[name], 4000
    denoiser = one_gaussian(schedule)
    drawn = sample(
        denoiser,
        (count, 2),
        times=schedule.times(3, spacing="karras"),
        clean_variance=denoiser.clean_variance,
        final_noise=True,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    # What the start from the prior misses of N(m, V) is smaller than the sampling error here.
    assert (drawn.mean(0) - MEAN).abs().max() <= 5 * math.sqrt(VARIANCE / count)
    assert (drawn.var(0) / VARIANCE - 1).abs().max() <= 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_of_gaussian_data_is_the_entropy_whatever_the_schedule(
    name: str, num_steps: int
) -> None:
    schedule = SCHEDULES[name]
    denoiser = one_gaussian(schedule)
    generator = torch.Generator().manual_seed(2)
    clean = denoiser.sample(20_000, generator=generator)
    bound = variational_bound(
        denoiser,
        clean,
        num_steps=num_steps,
        clean_variance=denoiser.clean_variance,
        generator=generator,
    )
    gap = bound.total + denoiser.log_prob(clean)
    entropy_error = gap.mean().item()
    # Above zero by the mismatch of the prior, KL(p(x_T) || N(0, prior_scale^2 I)) in closed form.
    end = schedule.maximum_time
    signal, noise = schedule.signal_scale(end), schedule.noise_scale(end)
    prior = schedule.prior_scale**2
    variance = (signal**2 * VARIANCE + noise**2) / prior
    shift = signal**2 * MEAN.square().sum() / prior
    mismatch = (variance - 1 - torch.log(variance) + shift / 2).item()
    standard_error = gap.std().item() / math.sqrt(len(clean))
    assert abs(entropy_error - mismatch) <= 5 * standard_error + 1e-12
