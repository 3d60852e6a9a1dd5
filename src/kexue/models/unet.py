"""A small U-Net for images: convolutions on several scales, joined by shortcuts.

Residual blocks with group norm and SiLU; the time enters by scale and shift of the second norm.

Source: https://arxiv.org/abs/1505.04597, https://arxiv.org/abs/2105.05233 (scale and shift).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.models.embedding import TimeEmbedding
from kexue.nn.attention import MultiHeadAttention

__all__ = ["SmallUNet"]


class SmallUNet(nn.Module):
    """A U-Net that is told the time and, where there are classes, the class.

    Parameters
    ----------
    channels : int
        Channels of the images.
    base : int
        Channels of the first level, even.
    multipliers : sequence of int
        Channels of each level as multiples of ``base``; every level after the first has half the
        height and width of the one before. Two levels suit 8×8 images, three 28×28 and 32×32.
    num_classes : int, optional
        Number of classes; label ``num_classes``, a negative label and no condition all mean "no
        class".
    attention_at : sequence of int
        Levels with self-attention, named by how far they are scaled down: 1, 2, 4, ….
    output_channels : int, optional
        Channels of the output, ``channels`` by default.
    dropout : float
        Probability inside the blocks.

    Raises
    ------
    ValueError
        For sizes below 1, levels that do not exist, or images that cannot be halved often enough.

    Examples
    --------
    >>> network = SmallUNet(1, base=8, multipliers=(1, 2))
    >>> network(torch.randn(2, 1, 8, 8), torch.tensor(3.0)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        base: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        num_classes: int | None = None,
        attention_at: Sequence[int] = (),
        output_channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        output_channels = channels if output_channels is None else output_channels
        if min(channels, output_channels, base, *multipliers, len(multipliers)) < 1:
            raise ValueError(
                "channels, base and multipliers must be at least 1, "
                f"got {channels}, {output_channels}, {base} and {tuple(multipliers)}"
            )
        scales = [2**level for level in range(len(multipliers))]
        unknown = sorted(set(attention_at) - set(scales))
        if unknown:
            raise ValueError(f"attention_at must name levels among {scales}, got {unknown}")
        self.channels = channels
        self.divisor = scales[-1]
        width = 4 * base
        self.embedding = TimeEmbedding(width, num_classes=num_classes)
        self.input = nn.Conv2d(channels, base, 3, padding=1)

        widths = [base * multiplier for multiplier in multipliers]

        def level(before: int, after: int, scale: int) -> _Level:
            return _Level(before, after, width, dropout, attention=scale in attention_at)

        self.down = nn.ModuleList(
            [level(b, a, s) for b, a, s in zip([base, *widths], widths, scales, strict=False)]
        )
        self.shrink = nn.ModuleList([nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1]])
        self.middle = level(widths[-1], widths[-1], scales[-1])
        above = [widths[-1], *widths[:0:-1]]
        self.up = nn.ModuleList(
            [
                level(below + own, own, scale)
                for below, own, scale in zip(above, widths[::-1], scales[::-1], strict=True)
            ]
        )
        self.grow = nn.ModuleList([nn.Conv2d(w, w, 3, padding=1) for w in widths[:0:-1]])
        self.norm = _group_norm(base * multipliers[0])
        self.output = nn.Conv2d(base * multipliers[0], output_channels, 3, padding=1)
        # At the start the network predicts 0, whatever its input.
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def trunk(
        self,
        x: Float[Tensor, "batch channels height width"],
        time: float | Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "batch hidden height width"]:
        """Return the last hidden activation, which further heads may share."""
        self._check_image(x)
        embedded = self.embedding(time, condition, batch=len(x))
        hidden = self.input(x)
        shortcuts = []
        for index, level in enumerate(self.down):
            if index:
                hidden = self.shrink[index - 1](hidden)
            hidden = level(hidden, embedded)
            shortcuts.append(hidden)
        hidden = self.middle(hidden, embedded)
        for index, level in enumerate(self.up):
            if index:
                enlarged = nn.functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
                hidden = self.grow[index - 1](enlarged)
            hidden = level(torch.cat([hidden, shortcuts.pop()], 1), embedded)
        return nn.functional.silu(self.norm(hidden))

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        time: float | Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "batch output_channels height width"]:
        """Return the output for noisy images at a time, one for all or one per example."""
        return self.output(self.trunk(x, time, condition))

    def _check_image(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
            kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x must be a real tensor of shape (batch, channels, height, width), got {kind}"
            )
        if x.shape[1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, got {x.shape[1]}")
        height, width = x.shape[-2:]
        if height % self.divisor or width % self.divisor or not height or not width:
            raise ValueError(
                f"height and width must be multiples of {self.divisor} for "
                f"{len(self.down)} levels, got {height}×{width}; "
                f"{_next_multiple(height, self.divisor)}×{_next_multiple(width, self.divisor)} "
                "would work"
            )


class _Level(nn.Module):
    """A residual block, and self-attention where it is wanted."""

    def __init__(
        self, before: int, after: int, embedding: int, dropout: float, *, attention: bool
    ) -> None:
        super().__init__()
        self.first_norm = _group_norm(before)
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.scale_and_shift = nn.Linear(embedding, 2 * after)
        self.second_norm = _group_norm(after)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.attention = _SpatialAttention(after) if attention else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        hidden = self.first(nn.functional.silu(self.first_norm(x)))
        scale, shift = self.scale_and_shift(embedded)[..., None, None].chunk(2, 1)
        hidden = nn.functional.silu(self.second_norm(hidden) * (1 + scale) + shift)
        return self.attention(self.shortcut(x) + self.second(self.dropout(hidden)))


class _SpatialAttention(nn.Module):
    """Self-attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.attention = MultiHeadAttention(
            channels, num_heads=max(channels // 32, 1) if channels % 32 == 0 else 1
        )

    def forward(self, x: Tensor) -> Tensor:
        positions = self.norm(x).flatten(2).mT
        return x + self.attention(positions).output.mT.reshape(x.shape)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _next_multiple(size: int, divisor: int) -> int:
    return max(math.ceil(size / divisor), 1) * divisor
