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
    # In inches; letters of the names are about a twelfth of an inch wide.
    left = 0.1 + max(len(line) for name in sheets for line in [*name.split("\n"), ""]) / 12
    width, gap = _WIDTH - left - 0.05, 0.12
    heights = [width * tile.shape[0] / tile.shape[1] for tile in tiles]
    total = sum(heights) + gap * len(tiles)
    figure = Figure(figsize=(_WIDTH, total))
    figure.set_layout_engine("none")
    bottom = total
    for name, tile, height in zip(sheets, tiles, heights, strict=True):
        bottom -= height + gap
        box = (left / _WIDTH, (bottom + gap / 2) / total, width / _WIDTH, height / total)
        axis = figure.add_axes(box)
        axis.imshow(tile.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure
