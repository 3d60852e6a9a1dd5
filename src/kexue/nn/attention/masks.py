"""Masks of attention: True, or a finite summand, lets a query attend to a key."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__: list[str] = []

MaskShape = tuple[int, int, int, int]


def _checked(mask: Tensor, shape: MaskShape) -> Tensor:
    """Return the mask with four dimensions; refuse one that does not fit."""
    if not isinstance(mask, Tensor) or not (
        mask.dtype == torch.bool or mask.dtype.is_floating_point
    ):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be bool (True = attend) or floating point, got {kind}")
    fits = mask.ndim <= 4 and all(
        size in (1, whole)
        for size, whole in zip(mask.shape[::-1], shape[::-1], strict=False)
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"mask must be broadcastable to (batch, heads, query_length, key_length) = {shape}, "
            f"got shape {tuple(mask.shape)}"
        )
    return mask[(None,) * (4 - mask.ndim)]


def _causal(
    query_length: int, key_length: int, device: torch.device
) -> Bool[Tensor, "query_length key_length"]:
    """Let query i see the keys j <= i + key_length - query_length, aligned to the lower right."""
    everything = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return everything.tril(key_length - query_length)


def _restricted(mask: Tensor | None, allowed: Bool[Tensor, "..."]) -> Tensor:
    """Combine a mask of either kind with a boolean one."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return torch.where(allowed, mask, -math.inf)


def _without_dead_rows(mask: Tensor) -> tuple[Tensor, Bool[Tensor, "... 1"]]:
    """Open the rows that may attend nothing, and tell which rows may attend something.

    A softmax over no key is 0/0, in the value and in the gradient. Whoever calls this lets such a
    row attend to everything, and puts zeros in its place afterwards.
    """
    if mask.dtype == torch.bool:
        alive = mask.any(-1, keepdim=True)
        return mask | ~alive, alive
    alive = (mask != -math.inf).any(-1, keepdim=True)
    return torch.where(alive, mask, 0.0), alive


def _masked(logits: Float[Tensor, "..."], mask: Tensor) -> Float[Tensor, "..."]:
    """Apply a mask of either kind to logits."""
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, -math.inf)
    return logits + mask.to(logits.dtype)
