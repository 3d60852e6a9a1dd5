"""Pieces of the formulas, each of them with relative accuracy where its value is small."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def _excess(t: Tensor, log: Tensor) -> Tensor:
    """t - log(1 + t), from t and that logarithm; never negative."""
    small = t.detach().abs() < 0.1
    u = torch.where(small, t, torch.zeros_like(t))
    # log(1 + t) = 2 artanh s = 2 (s + s³/3 + s⁵/5 + …), and t - 2 s = s t.
    s = u / (2 + u)
    square = s * s
    series = torch.full_like(s, 1 / 17)
    for odd in range(15, 1, -2):
        series = series * square + 1 / odd
    return torch.where(small, s * (u - 2 * square * series), t - log)


def _deviation_gap(variance1: Tensor, variance2: Tensor) -> Tensor:
    """Difference of the standard deviations."""
    return (variance1 - variance2) / (torch.sqrt(variance1) + torch.sqrt(variance2))


class _LogDetOfSquare(torch.autograd.Function):
    """-log det(1 - X²) / 4 of a symmetric X with eigenvalues in (-1, 1).

    The value needs eigenvalues; the derivative, X (1 - X²)⁻¹ / 2, does not, and so has derivatives
    of all orders where eigenvalues coincide.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return -torch.log1p(-(torch.linalg.eigvalsh(x) ** 2)).sum(-1) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return gradients[0][..., None, None] * torch.linalg.solve(one - x @ x, x) / 2


def _sqrt(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, torch.ones_like(x))), 0.0)


def _square_norm(x: Tensor) -> Tensor:
    """Sum of squares over the last two axes, as a product: there is no room for all squares."""
    flat = x.flatten(-2)
    return (flat[..., None, :] @ flat[..., None])[..., 0, 0]


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _solve_lower(factor: Tensor, right: Tensor) -> Tensor:
    """The solution x of factor @ x = right, where no factor is repeated to fit the right side."""
    lead = max(factor.ndim, right.ndim) - 2
    factor = factor[(None,) * (lead + 2 - factor.ndim)]
    right = right[(None,) * (lead + 2 - right.ndim)]
    shared = [k for k in range(lead) if factor.shape[k] == 1 and right.shape[k] != 1]
    if not shared:
        return torch.linalg.solve_triangular(factor, right, upper=False)
    own = [k for k in range(lead) if k not in shared]
    order = [*own, *shared, lead + 1, lead]
    # Axes that share a factor become columns of one system, in the memory layout of LAPACK.
    moved = right.permute(order)
    n_columns = math.prod(moved.shape[len(own) : -1])
    columns = moved.reshape(*moved.shape[: len(own)], n_columns, moved.shape[-1]).mT
    solved = torch.linalg.solve_triangular(factor.squeeze(shared), columns, upper=False).mT
    moved = solved.reshape(*solved.shape[: len(own)], *moved.shape[len(own) :])
    return moved.permute([order.index(k) for k in range(lead + 2)])
