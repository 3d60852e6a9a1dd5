"""The normalised target against the formula of PFGM's authors, and sampling from the exact field.

The peer forms all differences, (batch, charges, N + 1) numbers, and scales distances by the
smallest before it raises them to the power N + 1. Its repository is no package, so the formula is
written out here.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks.timing import compare, measure
from kexue.generative.poisson_flow import EmpiricalPoissonField, poisson_target, sample

GAMMA = 5.0


def main() -> None:
    for batch, charges, dim, target in ((128, 512, 768, 20.0), (128, 2048, 64, 20.0)):
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(charges, dim, generator=generator)
        z = torch.logspace(-3, 1.6, batch)
        x = data[:batch] + z[:, None] * torch.randn(batch, dim, generator=generator)
        compare(
            f"target of {batch} points from {charges} charges in {dim} dimensions",
            lambda x=x, z=z, data=data: with_height(x, z, data),
            lambda x=x, z=z, data=data: all_differences(x, z, data),
            # The peer's own rounding: it works in float32.
            agree=1e-4,
            target=target,
            value=lambda result: result.double().numpy(),
            repeats=3,
        )
        exact = all_differences(x.double(), z.double(), data.double())
        error = (with_height(x, z, data).double() - exact).norm() / exact.norm()
        print(f"  relative error against float64: {error:.1e}, target 1e-6")

        def product(x: Tensor = x, data: Tensor = data) -> Tensor:
            return x.double() @ data.double().T

        print(f"  the matrix product alone: {measure(product) * 1e3:.2f} ms")
    digits()


def digits() -> None:
    """Time 4000 samples from 100 images of 8×8 in 60 Heun steps, the first run included."""
    data = torch.rand(100, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    field = EmpiricalPoissonField(data)
    start = time.perf_counter()
    sample(field, (4000, 64), num_steps=60, generator=torch.Generator().manual_seed(1))
    seconds = time.perf_counter() - start
    verdict = "met" if seconds <= 6 else "MISSED"
    print(f"4000 samples, 100 charges, 60 Heun steps: {seconds:.2f} s, target 6 s {verdict}")


def with_height(x: Tensor, z: Tensor, data: Tensor) -> Tensor:
    target = poisson_target(x, z, data, gamma=GAMMA)
    return torch.cat([target.x, target.z[:, None]], 1)


def all_differences(x: Tensor, z: Tensor, data: Tensor) -> Tensor:
    """Return the same by the authors' way, without the constant that they add to the distance."""
    points = torch.cat([x, z[:, None]], 1)[:, None]
    charges = torch.cat([data, data.new_zeros(len(data), 1)], 1)
    difference = points - charges
    distance = difference.square().sum(2).sqrt()
    ratio = (distance.min(1, keepdim=True).values / distance) ** points.shape[2]
    weights = ratio / ratio.sum(1, keepdim=True)
    field = -(weights[:, :, None] * difference).sum(1)
    return math.sqrt(x.shape[1]) * field / (field.norm(dim=1, keepdim=True) + GAMMA)


if __name__ == "__main__":
    main()
