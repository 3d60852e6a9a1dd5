"""Negative cosine similarity and squared distance of predictions and targets."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["negative_cosine_similarity"]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
LossName: TypeAlias = Literal["cosine", "mse"]

# Shorter vectors count as zero: their direction is rounding error.
_SHORTEST = 1e-12


def negative_cosine_similarity(
    prediction: Float[Tensor, "batch dim"],
    target: Float[Tensor, "batch dim"],
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    r"""Return the negative cosine of each prediction and its target.

    .. math:: D(p, t) = -\frac{p \cdot t}{\|p\| \|t\|}

    The cosine with a zero vector is 0, with gradient 0. Both arguments get gradients: detach the
    target where that is meant. Half precision is normalised, and returned, in float32.

    Parameters
    ----------
    prediction, target : Tensor (batch, dim)
        Row i of one belongs to row i of the other.
    reduction : {"mean", "sum", "none"}
        Over the batch.

    Returns
    -------
    Tensor () or (batch,)
        Between -1 and 1 for each pair.

    Raises
    ------
    ValueError
        For shapes that are not the same (batch, dim), an empty batch to average, or an unknown
        reduction.
    TypeError
        For what is no tensor of real floating-point numbers.

    Examples
    --------
    >>> prediction = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    >>> target = torch.tensor([[2.0, 0.0], [4.0, 3.0]])
    >>> negative_cosine_similarity(prediction, target, reduction="none")
    tensor([-1.0000, -0.9600])
    """
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}"
        )
    check_matrix("prediction", prediction)
    check_matrix("target", target)
    if prediction.shape != target.shape:
        raise ValueError(
            "prediction and target must have the same shape (batch, dim), "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    cosine = (_unit(prediction) * _unit(target)).sum(1)
    if reduction == "none":
        return -cosine
    if reduction == "sum":
        return -cosine.sum()
    if len(cosine) == 0:
        raise ValueError("reduction 'mean' needs at least one pair, got an empty batch")
    return -cosine.mean()


def squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance, summed over dim, mean over the batch."""
    return (_wide(prediction) - _wide(target)).square().sum(1).mean()


def check_matrix(name: str, x: Any) -> None:
    """Refuse what is no real matrix (batch, dim)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of real floating-point numbers, got {kind}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (batch, dim), got {tuple(x.shape)}")


def _unit(x: Tensor) -> Tensor:
    x = _wide(x)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # A clamp alone would send gradients of size 1/shortest through a zero vector. NaN stays NaN.
    return torch.where(norm <= _SHORTEST, 0.0, x / norm.clamp_min(_SHORTEST))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
