"""What a denoising network is told besides its input: the time, and a class.

    (cos ω_i t, sin ω_i t),    ω_i from 1 down to 1/10000 in equal ratios

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2207.12598 (no class as a class).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["TimeEmbedding"]

_LONGEST_PERIOD = 10_000.0


class TimeEmbedding(nn.Module):
    """Embedding of a real-valued time, plus that of a class where there are any.

    Parameters
    ----------
    width : int
        Features of the result, even.
    num_classes : int, optional
        Number of classes. Entry ``num_classes`` of the class embedding means "no class"; a
        negative label and no condition at all mean the same.

    Raises
    ------
    ValueError
        For an odd width, a time or condition of another length than the batch, a condition where
        there are no classes.

    Examples
    --------
    >>> embedding = TimeEmbedding(8, num_classes=10)
    >>> embedding(0.5, None, batch=3).shape
    torch.Size([3, 8])
    """

    def __init__(self, width: int, *, num_classes: int | None = None) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width must be even and at least 2, got {width}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.width = width
        self.num_classes = num_classes
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)

    def forward(
        self, time: float | Tensor, condition: Tensor | None = None, *, batch: int
    ) -> Float[Tensor, "batch width"]:
        """Return the embedding of one time or ``batch`` times."""
        weight = self.first.weight
        time = torch.as_tensor(time, device=weight.device)
        if time.shape not in ((), (batch,)) or time.is_complex():
            raise ValueError(
                f"time must be a real number or one per example, of shape ({batch},), "
                f"got {time.dtype} {tuple(time.shape)}"
            )
        # Large times in half precision would have lost their last digits before the sine.
        time = time if time.dtype == torch.float64 else time.float()
        half = self.width // 2
        exponent = torch.arange(half, dtype=time.dtype, device=weight.device) / max(half - 1, 1)
        angle = time.expand(batch).unsqueeze(-1) * torch.exp(-math.log(_LONGEST_PERIOD) * exponent)
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(weight.dtype)
        embedded = self.second(nn.functional.silu(self.first(waves)))
        if self.classes is None:
            if condition is not None:
                raise ValueError("condition must be None for a network without num_classes")
            return embedded
        return embedded + self.classes(self._labels(condition, batch, weight.device))

    def _labels(self, condition: Tensor | None, batch: int, device: torch.device) -> Tensor:
        no_class = self.num_classes or 0
        if condition is None:
            return torch.full((batch,), no_class, device=device)
        condition = torch.as_tensor(condition, device=device)
        if condition.is_floating_point() or condition.shape not in ((), (batch,)):
            raise ValueError(
                f"condition must be integer labels of shape ({batch},), "
                f"got {condition.dtype} {tuple(condition.shape)}"
            )
        return torch.where(condition < 0, no_class, condition).expand(batch)
