"""Vectors of one sample each: their lengths, their derivatives, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []


def rows(values: Tensor) -> Tensor:
    """One row a sample."""
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def beside(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample, shaped to be broadcast against ``like``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision has neither the range nor the digits for sums of squares and logarithms."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def squared_norm(values: Tensor) -> Tensor:
    """Square of each sample's length."""
    return rows(at_least_float32(values)).square().sum(1)


def unit(values: Tensor) -> Tensor:
    """Each sample divided by its length; a sample of zeros stays zero.

    Division by the largest entry first: the square of a gradient of 1e-30 underflows. After it a
    length is at least 1, or 0, so that the clamp touches zeros only.
    """
    flat = rows(at_least_float32(values))
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(1)
    return (scaled / length).to(values.dtype).reshape(values.shape)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where nothing may be perturbed, whatever stood there."""
    return values if mask is None else values.masked_fill(~mask, 0)


def differentiable(inputs: Tensor) -> Tensor:
    """The point at which to differentiate: a new leaf, or a view that leads back to the inputs."""
    if inputs.requires_grad:
        return inputs.view_as(inputs)
    # A tensor of inference mode can have no gradient; a copy outside of the mode can.
    values = inputs.clone() if inputs.is_inference() else inputs.detach()
    return values.requires_grad_()


def pulled_back(
    results: Tensor, at: Tensor, weights: Tensor, *, create_graph: bool = False
) -> Tensor:
    """Vector-Jacobian product of what a callable returned at a point."""
    derivative = None
    if results.requires_grad:
        (derivative,) = torch.autograd.grad(
            results, at, weights, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    if derivative is None:
        raise ValueError(
            "the callable's result must depend on its argument through differentiable operations, "
            "got one without a gradient: is it detached, or computed from other inputs?"
        )
    return derivative


def gradients(losses: Tensor, at: Tensor, *, create_graph: bool = False) -> Tensor:
    """Gradient of each sample's loss in its own input."""
    return pulled_back(losses, at, torch.ones_like(losses), create_graph=create_graph)


# Drawn in float32 for every dtype, so that a seed means the same noise in all of them.


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers."""
    drawn = torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return drawn.to(like.dtype)


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers uniform on [0, 1)."""
    drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return drawn.to(like.dtype)


def signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs."""
    return 1 - 2 * torch.randint(
        2, like.shape, generator=generator, device=like.device, dtype=like.dtype
    )
