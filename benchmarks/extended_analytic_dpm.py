"""Tables, grids and steps against bare network calls, a plain recursion and diffusers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import compare, measure
from kexue.generative.diffusion import (
    AnalyticVarianceScheduler,
    DiscreteSchedule,
    JacobianVariance,
    NetworkDenoiser,
    TabulatedVariance,
    estimate_clean_variance,
    optimal_times,
    sample,
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
    nodes = times[:-1].flip(0)

    @torch.no_grad()
    def bare_calls() -> None:
        for time in times[:-1].tolist():
            network(x, torch.full((256,), time))

    # The bare calls are the floor; at most 5 percent above it.
    compare(
        f"table of {STEPS} times from 256×64 with an MLP of width 256, over bare calls",
        lambda: estimate_clean_variance(denoiser, x, times=nodes),
        bare_calls,
        agree=None,
        target=1 / 1.05,
    )
    table = TabulatedVariance(
        nodes, 1 / (1 / 0.3 + 1 / schedule.sigma(nodes) ** 2), schedule=schedule
    )
    # At most 2 percent above DDPM without a table.
    compare(
        f"{STEPS} steps at 256×64 with a table, over DDPM without",
        lambda: sample(denoiser, initial=x, times=times, clean_variance=table),
        lambda: sample(denoiser, initial=x, times=times),
        agree=None,
        target=1 / 1.02,
    )
    probe = JacobianVariance(denoiser, num_probes=1)
    call = measure(lambda: denoiser.predict(x, 300))
    print(f"one probe of the Jacobian: {measure(lambda: probe(x, 300)) / call:.2f} calls")

    grids(schedule)
    against_diffusers(schedule)


def grids(schedule: DiscreteSchedule) -> None:
    """Compare the dynamic programme with the plain recursion over all 1000 steps in NumPy."""
    times = torch.arange(1, 1001, dtype=torch.float64)
    values = schedule.sigma(times) ** 2 / (1 + 3 * schedule.sigma(times))
    table = TabulatedVariance(times, values, schedule=schedule)
    signal, noise = (f(times).numpy() for f in (schedule.signal_scale, schedule.noise_scale))
    variance = values.numpy()

    def recursion() -> float:
        count = len(variance)
        cost = np.full((count, count), np.inf)
        for t in range(1, count):
            s = np.arange(t)
            ratio = signal[t] / signal[s]
            posterior = noise[s] ** 2 / noise[t] ** 2 * (noise[t] ** 2 - (ratio * noise[s]) ** 2)
            weight = signal[s] - signal[t] * np.sqrt(noise[s] ** 2 - posterior) / noise[t]
            cost[s, t] = np.log((posterior + weight**2 * variance[t]) / posterior) / 2
        best = np.full(count, np.inf)
        best[-1] = 0.0
        origins = []
        for _ in range(STEPS - 1):
            total = cost + best
            origins.append(total.argmin(1))
            best = total[np.arange(count), origins[-1]]
        path = [0]
        for origin in reversed(origins):
            path.append(int(origin[path[-1]]))
        assert path[-1] == count - 1
        return float(best[0])

    compare(
        f"grid of {STEPS} steps out of 1000, against the plain recursion in NumPy",
        lambda: optimal_times(table, STEPS),
        recursion,
        agree=1e-8,
        value=lambda result: np.asarray(getattr(result, "cost", result)),
        target=1.0,
        repeats=3,
    )
    print(f"longest: {measure(lambda: optimal_times(table, 333), repeats=3):.2f} s, target 1.5 s")


def against_diffusers(schedule: DiscreteSchedule) -> None:
    """Compare steps without a network: the output is the same tensor every time."""
    try:
        import diffusers
    except ImportError:
        print("diffusers is not installed: its scheduler is left out")
        return
    initial = torch.randn(16, 3, 32, 32)
    output = 0.9 * initial + 0.1 * torch.randn(16, 3, 32, 32)

    @torch.no_grad()
    def walk(scheduler: Any) -> Tensor:
        x, source = initial, torch.Generator().manual_seed(0)
        for timestep in scheduler.timesteps:
            x = scheduler.step(output, timestep, x, generator=source).prev_sample
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.DDPMScheduler(
            timestep_spacing="trailing", clip_sample=False, variance_type="fixed_small"
        )
    plain = AnalyticVarianceScheduler(schedule)
    nodes = torch.arange(1, 1001, dtype=torch.float64)
    table = TabulatedVariance(
        nodes, 1 / (1 / 0.3 + 1 / schedule.sigma(nodes) ** 2), schedule=schedule
    )
    analytic = AnalyticVarianceScheduler(schedule, table)
    for scheduler in (theirs, plain, analytic):
        scheduler.set_timesteps(STEPS)
    shape = "16×3×32×32"
    compare(
        f"{STEPS} scheduler steps at {shape}, no table, against diffusers' DDPM",
        lambda: walk(plain),
        lambda: walk(theirs),
        agree=1e-5,
        target=1.5,
    )
    compare(
        f"{STEPS} scheduler steps at {shape}, with a table, against diffusers' DDPM",
        lambda: walk(analytic),
        lambda: walk(theirs),
        agree=None,
        target=1.5,
    )


if __name__ == "__main__":
    main()
