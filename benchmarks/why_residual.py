"""Residual blocks against the same written by hand; the cost of measuring a step; magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.timing import compare, measure
from kexue.nn.residual import Residual, magnitude, measure_update


def main() -> None:
    block()
    step()
    size()


class ByHand(nn.Module):
    """What one would write: a fused addition and the norm."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.sublayer, self.norm, self.alpha = residual.sublayer, residual.norm, residual.alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.add(self.sublayer(x), x, alpha=self.alpha))


def block() -> None:
    residual = Residual(nn.Linear(512, 512), 512, style="post", alpha=2.0)
    by_hand = ByHand(residual)
    x = torch.randn(32, 128, 512, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def there_and_back(module: nn.Module) -> Tensor:
        return torch.autograd.grad(module(x).square().mean(), x)[0]

    compare(
        "post-norm block, forward and backward, (32, 128, 512), against the same by hand",
        lambda: there_and_back(residual),
        lambda: there_and_back(by_hand),
        agree=1e-6,
        target=1 / 1.03,
        value=lambda gradient: gradient.numpy(),
        repeats=15,
    )


def step() -> None:
    torch.manual_seed(0)

    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))

    model = nn.Sequential(*[Residual(branch(), 256) for _ in range(24)])
    x = torch.randn(16, 64, 256)

    def loss(m: nn.Module) -> Tensor:
        return m(x).square().mean()

    def there_and_back() -> None:
        torch.autograd.grad(loss(model), list(model.parameters()))

    compare(
        "measure_update of 24 blocks, against three times forward and backward",
        lambda: measure_update(model, loss, learning_rate=1e-3),
        lambda: [there_and_back() for _ in range(3)],
        agree=None,
        target=1,
        repeats=5,
    )
    print(f"  forward and backward alone: {measure(there_and_back, repeats=5) * 1e3:.0f} ms")


def size() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

    def by_singular_values() -> Tensor:
        singular = torch.linalg.svdvals(weight)
        return singular.pow(4).sum().sqrt() / singular.square().sum().sqrt()

    compare(
        "magnitude of a 1024 x 1024 matrix, against its singular values",
        lambda: magnitude(weight),
        by_singular_values,
        agree=1e-4,
        target=5,
        value=float,
    )


if __name__ == "__main__":
    main()
