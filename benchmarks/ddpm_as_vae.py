"""Sampling and bounds against bare network calls, and against the schedulers of diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import compare
from kexue.generative.diffusion import (
    DiscreteSchedule,
    NetworkDenoiser,
    sample,
    variational_bound,
)
from kexue.models import MLPDenoiser

STEPS = 50


def main() -> None:
    torch.manual_seed(0)
    schedule = DiscreteSchedule.linear()
    network = MLPDenoiser(64, hidden=256, depth=3).eval()
    denoiser = NetworkDenoiser(network, schedule, prediction_type="v_prediction")
    x = torch.randn(256, 64)
    times = schedule.times(STEPS)

    @torch.no_grad()
    def bare_calls() -> None:
        for time in times[:-1].tolist():
            network(x, torch.full((256,), time))

    # The bare calls are the floor; at most 8 and 5 percent above it.
    compare(
        f"{STEPS} steps at 256×64 with an MLP of width 256, over bare calls",
        lambda: sample(denoiser, initial=x, times=times, eta=0.0),
        bare_calls,
        agree=None,
        target=1 / 1.08,
    )
    compare(
        "the same with noise (eta = 1)",
        lambda: sample(denoiser, initial=x, times=times),
        bare_calls,
        agree=None,
        target=1 / 1.08,
    )
    compare(
        f"bound of {STEPS} steps, over bare calls",
        lambda: variational_bound(denoiser, x, times=times),
        bare_calls,
        agree=None,
        target=1 / 1.05,
    )
    against_diffusers(schedule)


def against_diffusers(schedule: DiscreteSchedule) -> None:
    """Compare chains of steps without a network: the output is the same tensor every time."""
    import diffusers

    initial = torch.randn(16, 3, 32, 32)
    output = 0.9 * initial + 0.1 * torch.randn(16, 3, 32, 32)
    denoiser = NetworkDenoiser(lambda x, time: output, schedule, time_offset=-1)
    times = schedule.times(STEPS)

    def chain(scheduler: Any, **options: Any) -> Callable[[], Tensor]:
        scheduler.set_timesteps(STEPS)

        @torch.no_grad()
        def walk() -> Tensor:
            x = initial
            source = torch.Generator().manual_seed(0)
            for timestep in scheduler.timesteps:
                x = scheduler.step(output, timestep, x, generator=source, **options).prev_sample
            return x

        return walk

    def ours(eta: float) -> Tensor:
        source = torch.Generator().manual_seed(0)
        return sample(denoiser, initial=initial, times=times, eta=eta, generator=source)

    options = {"timestep_spacing": "trailing", "clip_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ddim = diffusers.DDIMScheduler(set_alpha_to_one=True, **options)
        ddpm = diffusers.DDPMScheduler(variance_type="fixed_small", **options)
    compare(
        f"{STEPS} DDIM steps at 16×3×32×32 without network, against diffusers",
        lambda: ours(0.0),
        chain(ddim, eta=0.0),
        agree=1e-5,
        target=2.0,
    )
    compare(
        f"{STEPS} DDPM steps at 16×3×32×32 without network, against diffusers",
        lambda: ours(1.0),
        chain(ddpm),
        agree=1e-5,
    )


if __name__ == "__main__":
    main()
