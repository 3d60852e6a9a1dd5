"""Sheets of images: many small pictures in rows, on white."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sheet", "sheet_figure"]

_WIDTH = 6.5
"""Inches, the measure of a page."""


def sheet(
    images: Float[Tensor, "count channels height width"], columns: int | None = None
) -> Float[Tensor, "rows cells channels"]:
    """Lay images in [−1, 1] out in rows, each in a frame of one white pixel.

    Parameters
    ----------
    images : Tensor, shape (count, channels, height, width)
        Clamped to [−1, 1].
    columns : int, optional
        Images in a row; nearly a square without it. What is left of the last row is white.

    Returns
    -------
    Tensor, shape (rows, cells, channels)
        In [0, 1], on the CPU.
    """
    count = len(images)
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    framed = nn.functional.pad(images.detach().float().cpu().clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    missing = framed.new_ones(-count % columns, *framed.shape[1:])
    grid = torch.cat([framed, missing]).unflatten(0, (-1, columns))
    return (grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1) + 1) / 2


def sheet_figure(sheets: Mapping[str, Tensor], columns: int = 12) -> Figure:
    """Draw one sheet below the other, with their names on the left.

    Parameters
    ----------
    sheets : mapping of str to Tensor, shape (count, channels, height, width)
        One or three channels, in [−1, 1].
    columns : int
        Images in a row.
    """
    from matplotlib.figure import Figure

    tiles = [sheet(images, columns) for images in sheets.values()]
    # The names take a fifth of the width.
    heights = [0.8 * _WIDTH * tile.shape[0] / tile.shape[1] for tile in tiles]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.08 * len(tiles)), layout="constrained")
    axes = figure.subplots(len(tiles), height_ratios=heights, squeeze=False)[:, 0]
    for axis, name, tile in zip(axes, sheets, tiles, strict=True):
        axis.imshow(tile.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure
