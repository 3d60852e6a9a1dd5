"""Virtual adversarial loss against smart-pytorch and a plain step; penalties against Jacobians."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy

from benchmarks.timing import compare
from kexue.training.regularization import (
    VirtualAdversarialLoss,
    consistency_loss,
    gradient_penalty,
)

FEATURES, WIDTH, CLASSES, BATCH = 256, 512, 100, 256


def main() -> None:
    net, x, y = example()
    virtual_adversaries(net, x, y)
    against_smart(net, x)
    penalties(net, x)


def example() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.Tanh(),
        nn.Linear(WIDTH, WIDTH), nn.Tanh(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip
    return net, torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,))


def gradients(net: nn.Module, loss: Tensor) -> Tensor:
    """All parameters' gradients in one vector; the last bias has none in an euclidean penalty."""
    found = torch.autograd.grad(
        loss, list(net.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in found])


def virtual_adversaries(net: nn.Module, x: Tensor, y: Tensor) -> None:
    for hessian, target in (("finite_difference", 1 / 3.6), ("exact", 1 / 4.5)):
        loss = VirtualAdversarialLoss(epsilon=1.0, hessian=hessian)
        compare(
            f"virtual adversarial loss and backward, {hessian}, against a plain step",
            lambda loss=loss: gradients(net, loss(net, x)),
            lambda: gradients(net, cross_entropy(net(x), y)),
            agree=None,
            target=target,
        )


def against_smart(net: nn.Module, x: Tensor) -> None:
    try:
        from smart_pytorch import SMARTLoss, kl_loss
    except ImportError:
        print("smart-pytorch is not installed: pip install smart-pytorch")
        return
    moved = 0.1 * torch.randn_like(x)
    with torch.no_grad():
        theirs = kl_loss(net(x + moved), net(x))
        difference = (consistency_loss(net, x, moved) - theirs).abs() / theirs
    # Where both look at the same point the divergence is the same; their radius is another.
    if not difference < 1e-3:
        raise AssertionError(f"divergences differ by {difference:.1e}")
    smart = SMARTLoss(net, kl_loss, num_steps=1)
    ours = VirtualAdversarialLoss(epsilon=1.0, hessian="finite_difference")
    for name, loss, target in (
        ("finite difference", ours, 1 / 1.25),
        ("exact", VirtualAdversarialLoss(epsilon=1.0), None),
    ):
        compare(
            f"virtual adversarial loss and backward, {name}, against smart-pytorch",
            lambda loss=loss: gradients(net, loss(net, x)),
            lambda: gradients(net, smart(x, net(x))),
            agree=None,
            target=target,
        )


def penalties(net: nn.Module, x: Tensor) -> None:
    parameters = dict(net.named_parameters())

    def one(sample: Tensor) -> Tensor:
        return functional_call(net, parameters, (sample[None],))[0]

    def by_jacobian() -> Tensor:
        return gradients(net, vmap(jacrev(one))(x).square().sum((1, 2)).mean())

    compare(
        f"exact penalty and backward, {CLASSES} outputs, against vmap(jacrev)",
        lambda: gradients(net, gradient_penalty(net, x)),
        by_jacobian,
        agree=1e-4,
        target=1 / 1.05,
        value=lambda found: found.numpy(),
        repeats=3,
    )
    compare(
        f"rademacher penalty and backward, {CLASSES} outputs, against vmap(jacrev)",
        lambda: gradients(net, gradient_penalty(net, x, estimator="rademacher")),
        by_jacobian,
        agree=None,
        target=30,
        repeats=3,
    )


if __name__ == "__main__":
    main()
