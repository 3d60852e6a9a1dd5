"""Truncated normal draws against torch's; the cost of the audit and of the parametrisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import compare
from kexue.nn.init import audit_signal, ntk_parametrize, truncated_normal_
from kexue.nn.residual import Residual


def main() -> None:
    draws()
    audit()
    parametrisation()


def draws() -> None:
    weight = torch.empty(2048, 2048)
    compare(
        "truncated normal, 2048 x 2048, against torch.nn.init.trunc_normal_",
        lambda: truncated_normal_(weight, std=0.02, rescale=False),
        lambda: nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04),
        agree=None,
        target=4,
        repeats=5,
    )
    ours = truncated_normal_(weight, std=0.02).std().item()
    theirs = nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04).std().item()
    print(f"  standard deviation that was asked for 0.02, ours {ours:.5f}, theirs {theirs:.5f}")


def audit() -> None:
    torch.manual_seed(0)

    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))

    model = nn.Sequential(*[Residual(branch(), 256) for _ in range(12)])
    x = torch.randn(16, 64, 256)

    def loss(y: Any) -> Tensor:
        return y.square().mean()

    compare(
        "audit of 12 blocks, against 1.6 times forward and backward",
        lambda: audit_signal(model, x, compute_loss=loss),
        lambda: torch.autograd.grad(loss(model(x)), list(model.parameters())),
        agree=None,
        target=1 / 1.6,
        repeats=7,
    )


def parametrisation() -> None:
    plain, raw = nn.Linear(1024, 1024), ntk_parametrize(nn.Linear(1024, 1024))
    x = torch.randn(256, 1024)

    def there_and_back(layer: nn.Module) -> Any:
        return torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))

    compare(
        "NTK parametrisation, forward and backward, against the plain layer",
        lambda: there_and_back(raw),
        lambda: there_and_back(plain),
        agree=None,
        target=1 / 1.03,
        repeats=15,
    )


if __name__ == "__main__":
    main()
