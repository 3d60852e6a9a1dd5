"""Likelihoods, divergences and solvers of the flow, against bare loops and k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import compare
from kexue.generative.diffusion import (
    DiscreteSchedule,
    ImageDenoiser,
    NetworkDenoiser,
    divergence,
    log_likelihood,
    solve_ode,
)
from kexue.generative.vae import uniform_dequantize
from kexue.lab.data import Data
from kexue.models import MLPDenoiser


def main() -> None:
    torch.manual_seed(0)
    solver_overhead()
    divergence_against_a_loop()
    likelihood_against_k_diffusion()


def solver_overhead() -> None:
    """Compare solvers with the calls of the network alone; at most 5 percent above them."""
    schedule = DiscreteSchedule.cosine()
    network = MLPDenoiser(64, hidden=256, depth=3).eval()
    denoiser = NetworkDenoiser(network, schedule, prediction_type="v_prediction")
    x = torch.randn(256, 64)

    def bare_calls(count: int) -> Callable[[], None]:
        @torch.no_grad()
        def calls() -> None:
            for step in range(count):
                network(x, torch.full((256,), float(step)))

        return calls

    for method, coordinate, evaluations in (
        ("euler", "sigma", 1),
        ("heun", "angle", 2),
        ("dpm_solver_2m", "sigma", 1),
    ):
        options: dict[str, Any] = {"method": method, "coordinate": coordinate, "num_steps": 20}
        compare(
            f"20 steps of {method} at 256×64 with an MLP of width 256, over bare calls",
            lambda options=options: solve_ode(denoiser, x, start=1000.0, end=40.0, **options),
            bare_calls(20 * evaluations),
            agree=None,
            target=1 / 1.05,
        )


def divergence_against_a_loop() -> None:
    """Compare the exact divergence with one vector–Jacobian product after the other."""
    schedule = DiscreteSchedule.cosine()
    network = MLPDenoiser(64, hidden=256, depth=3).eval()
    denoiser = NetworkDenoiser(network, schedule, prediction_type="v_prediction")

    def velocity(x: Tensor) -> Tensor:
        return denoiser.predict(x, 300.0).v_prediction

    def loop(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = velocity(x)
        trace = torch.zeros(len(x))
        for i in range(x.shape[1]):
            (row,) = torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)
            trace += row[:, i]
        return trace

    # What is saved is the overhead of 64 calls: with the batch, arithmetic takes its place.
    for batch, target in ((1, 3.0), (4, 3.0), (64, 3.0)):
        x = torch.randn(batch, 64)
        compare(
            f"exact divergence at d = 64, batch {batch}, over a loop",
            lambda x=x: divergence(velocity, x)[1].float(),
            lambda x=x: loop(x),
            agree=1e-4,
            target=target,
        )


def likelihood_against_k_diffusion() -> None:
    """Compare likelihoods of 64 digits with one probe, ours within 0.01 bits per pixel."""
    data = Data(None, seed=0).digits()
    denoiser = ImageDenoiser(data.train.images.shape[1:], levels=data.levels)
    denoiser.fit(data.train.images, steps=600, generator=torch.Generator().manual_seed(0))
    schedule, end = denoiser.schedule, 40.0
    filled = uniform_dequantize(
        data.test.images[:64],
        bin_width=data.bin_width,
        generator=torch.Generator().manual_seed(0),
    )
    signal = schedule.signal_scale(end).item()

    def ours(**options: Any) -> Any:
        return log_likelihood(
            denoiser,
            signal * filled,
            start=end,
            divergence_method="hutchinson",
            generator=torch.Generator().manual_seed(1),
            **options,
        )

    def bits(result: Any) -> float:
        return result.bits_per_dimension(64, bin_width=data.bin_width).mean().item()

    exact = bits(ours(method="heun", num_steps=256))
    enough = next(n for n in (4, 8, 12, 16, 24, 32, 48, 64) if near(bits(fixed(ours, n)), exact))
    result = fixed(ours, enough)
    print(
        f"ours: {enough} steps of Heun along the angle, {result.num_evaluations} evaluations, "
        f"{abs(bits(result) - exact):.4f} bits per pixel from 256 steps with the same probe"
    )

    ends = {
        "sigma_min": schedule.sigma(end).item(),
        "sigma_max": schedule.sigma(schedule.maximum_time).item(),
    }

    def x_hat(y: Tensor, sigma: Tensor) -> Tensor:
        # float32 rounds the ends of the schedule, to outside for one of them.
        known = sigma[0].double().clamp(ends["sigma_min"], ends["sigma_max"])
        time = schedule.time_from_sigma(known)
        return denoiser.predict(y * schedule.signal_scale(time).float(), time).sample

    try:
        from k_diffusion.sampling import log_likelihood as theirs
    except ImportError:
        print("k-diffusion is not installed: its algorithm is run through torchdiffeq instead")
        theirs = density_by_sigma

    log_prob, facts = theirs(x_hat, filled, **ends)
    mean = -log_prob.double().mean().item() / (64 * math.log(2)) - math.log2(data.bin_width)
    print(
        f"theirs: {facts['fevals']} evaluations, {mean:.4f} bits per pixel with a probe of its "
        f"own, ours {exact - math.log2(signal):.4f}"
    )
    compare(
        "likelihood of 64 digits, one probe, against k-diffusion at its tolerances of 1e-4",
        lambda: fixed(ours, enough),
        lambda: theirs(x_hat, filled, **ends),
        agree=None,
        target=2.0,
        repeats=3,
    )


def fixed(likelihood: Callable[..., Any], num_steps: int) -> Any:
    return likelihood(method="heun", num_steps=num_steps)


def near(bits: float, exact: float) -> bool:
    return abs(bits - exact) <= 0.01


def density_by_sigma(
    x_hat: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma_min: float, sigma_max: float
) -> tuple[Tensor, dict[str, int]]:
    """Integrate in σ with adaptive steps, state and density in float32, one probe of signs."""
    from torchdiffeq import odeint

    signs = torch.randint(0, 2, x.shape).to(x) * 2 - 1
    calls = 0

    def slope(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        # The choice of the first step asks beyond the end of the schedule.
        sigma = sigma.clamp(sigma_min, sigma_max)
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            rate = (y - x_hat(y, sigma * y.new_ones(len(y)))) / sigma
            (product,) = torch.autograd.grad((rate * signs).sum(), y)
        return rate.detach(), (product * signs).flatten(1).sum(1)

    ends = x.new_tensor([sigma_min, sigma_max])
    start = (x, x.new_zeros(len(x)))
    latent, change = odeint(slope, start, ends, rtol=1e-4, atol=1e-4, method="dopri5")
    prior = torch.distributions.Normal(0.0, sigma_max).log_prob(latent[-1]).flatten(1).sum(1)
    return prior + change[-1], {"fevals": calls}


if __name__ == "__main__":
    main()
