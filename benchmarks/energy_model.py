"""Langevin chains against torchebm and against their network alone; the replay buffer.

torchebm's η is half of our step size, and its noise √(2η). The draws of both come from equal
generators in the same order, so that chains agree state by state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import compare, measure
from kexue.generative.energy import ReplayBuffer, langevin_sample

CHAINS, DIM, STEPS = 128, 64, 300
STEP_SIZE = 0.02


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(DIM, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1),
        nn.Flatten(0),
    )  # fmt: skip
    start = torch.randn(CHAINS, DIM)

    def ours() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return langevin_sample(
            network, start, step_size=STEP_SIZE, num_steps=STEPS, generator=generator
        ).samples

    against_the_network(network, start, ours)
    against_torchebm(network, start, ours)
    buffer()


def against_the_network(network: nn.Module, start: Tensor, ours: Callable[[], Tensor]) -> None:
    """Time the chain against its STEPS + 1 gradients, which nothing can save."""

    def gradients() -> None:
        for _ in range(STEPS + 1):
            leaf = start.detach().requires_grad_()
            torch.autograd.grad(network(leaf).sum(), leaf)

    comparison = compare(
        f"{CHAINS} chains of {STEPS} steps against {STEPS + 1} bare gradients",
        ours,
        gradients,
        agree=None,
        target=1 / 1.1,
        repeats=5,
    )
    print(f"  {100 * (1 / comparison.ratio - 1):.0f} % above the bare cost, target 10 %")


def against_torchebm(network: nn.Module, start: Tensor, ours: Callable[[], Tensor]) -> None:
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError as error:
        print(f"torchebm is not installed, so chains were not compared with its own ({error}).")
        return

    class Energy(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

    sampler = LangevinDynamics(Energy(), step_size=STEP_SIZE / 2)

    def theirs() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return sampler.sample(x=start, n_steps=STEPS, generator=generator)

    compare(
        f"{CHAINS} chains of {STEPS} steps in {DIM} dimensions against torchebm",
        ours,
        theirs,
        # Both round in float32, on every one of the steps.
        agree=STEPS * torch.finfo(torch.float32).eps,
        target=1.2,
        value=lambda x: x.detach().double().numpy(),
        repeats=5,
    )


def buffer() -> None:
    """Time storing and drawing a batch of images, the size of CIFAR's."""
    generator = torch.Generator().manual_seed(0)
    stored = ReplayBuffer(10_000, (3, 32, 32), generator=generator)
    images = torch.rand(256, 3, 32, 32, generator=generator)
    for _ in range(math.ceil(stored.capacity / len(images))):
        stored.add(images)
    for what, call in (("add", lambda: stored.add(images)), ("draw", lambda: stored.draw(256))):
        seconds = measure(call)
        verdict = "met" if seconds <= 1e-3 else "MISSED"
        print(f"buffer, {what} 256 images: {seconds * 1e3:.2f} ms, target 1 ms {verdict}")


if __name__ == "__main__":
    main()
