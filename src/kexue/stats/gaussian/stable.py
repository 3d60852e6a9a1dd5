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
    """Sum of squares over the last two axes; a mere value needs no room for all squares."""
    if x.requires_grad and torch.is_grad_enabled():
        return (x * x).sum((-2, -1))
    return torch.linalg.vector_norm(x, dim=(-2, -1)) ** 2


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _solve_difference(factor: Tensor, minuend: Tensor, subtrahend: Tensor) -> Tensor:
    """The solution x of factor @ x = minuend - subtrahend, for a lower triangular factor.

    Where many right sides share a factor it is not repeated: they become columns of one system,
    subtracted where LAPACK wants them, since moving them costs as much as solving.
    """
    lead = max(factor.ndim, minuend.ndim, subtrahend.ndim) - 2
    factor, minuend, subtrahend = (
        x[(None,) * (lead + 2 - x.ndim)] for x in (factor, minuend, subtrahend)
    )
    whole = torch.broadcast_shapes(minuend.shape, subtrahend.shape)
    shared = [k for k in range(lead) if factor.shape[k] == 1 and whole[k] != 1]
    if not shared:
        return torch.linalg.solve_triangular(factor, minuend - subtrahend, upper=False)
    own = [k for k in range(lead) if k not in shared]
    order = [*own, *shared, lead + 1, lead]
    right = minuend.permute(order).contiguous() - subtrahend.permute(order).contiguous()
    n_columns = math.prod(right.shape[len(own) : -1])
    columns = right.reshape(*right.shape[: len(own)], n_columns, right.shape[-1]).mT
    solved = torch.linalg.solve_triangular(factor.squeeze(shared), columns, upper=False).mT
    solved = solved.reshape(*solved.shape[: len(own)], *right.shape[len(own) :])
    return solved.permute([order.index(k) for k in range(lead + 2)])
