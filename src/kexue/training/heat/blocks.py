"""Which block of an image stays visible.

A block is contiguous, unlike the scattered patches of a masked autoencoder: what lies outside is
extrapolated from its edges, and what lies inside is an ordinary small image for the encoder.
"""

from __future__ import annotations

import operator
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = ["Block", "block_mask", "quarter_block"]

Position: TypeAlias = Literal[
    "top_left", "top_right", "bottom_left", "bottom_right", "center", "random"
]


class Block(NamedTuple):
    """A rectangle of pixels: its first row and column, and its size.

    Attributes
    ----------
    top, left : int
        First row and first column, from 0.
    height, width : int
        Number of rows and columns.

    Examples
    --------
    >>> Block(top=2, left=2, height=4, width=4)
    Block(top=2, left=2, height=4, width=4)
    """

    top: int
    left: int
    height: int
    width: int


def quarter_block(
    height: int,
    width: int,
    *,
    position: Position = "random",
    generator: torch.Generator | None = None,
) -> Block:
    """Return a block of half the height and half the width of an image.

    Parameters
    ----------
    height, width : int
        Size of the image, even.
    position : {"top_left", "top_right", "bottom_left", "bottom_right", "center", "random"}
        A corner, the centre (the upper left one of several), or uniform over all positions. An
        encoder of stride s wants multiples of s: draw for the size divided by s, then scale.
    generator : torch.Generator, optional
        Source of a random position; torch's global one by default.

    Returns
    -------
    Block
        Of size ``height // 2`` by ``width // 2``.

    Raises
    ------
    ValueError
        Where a size is odd or below 2, or the position unknown.

    Examples
    --------
    >>> quarter_block(8, 12, position="center")
    Block(top=2, left=3, height=4, width=6)
    """
    height, width = _integers((height, width), "height and width")
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(
            f"height and width must be even and at least 2, to be halved, got {height} x {width}"
        )
    if position not in get_args(Position):
        raise ValueError(f"position must be one of {get_args(Position)}, got {position!r}")
    half = height // 2, width // 2
    if position == "random":
        top, left = (
            int(torch.randint(side + 1, (), generator=generator, device=_device(generator)))
            for side in half
        )
    elif position == "center":
        top, left = (side // 2 for side in half)
    else:
        top = half[0] if position.startswith("bottom") else 0
        left = half[1] if position.endswith("right") else 0
    return Block(top, left, *half)


def block_mask(
    size: tuple[int, int], block: Block, *, device: torch.device | str | None = None
) -> Bool[Tensor, "height width"]:
    """Return the mask of everything outside a block.

    Parameters
    ----------
    size : tuple of int
        Height and width of the image.
    block : Block
        What stays visible.
    device : torch.device, optional
        Where the mask is made.

    Returns
    -------
    Tensor, shape (height, width)
        True where masked, which is outside the block.

    Raises
    ------
    ValueError
        Where the block does not lie within the image.

    Examples
    --------
    >>> block_mask((2, 4), Block(0, 1, 1, 2)).int()
    tensor([[1, 0, 0, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    size = _pair(size, "size")
    block = _fitting(size, block)
    mask = torch.ones(size, dtype=torch.bool, device=device)
    mask[block.top : block.top + block.height, block.left : block.left + block.width] = False
    return mask


def _fitting(size: tuple[int, int], block: Block) -> Block:
    """Return the block in whole numbers, after a check that it lies within an image."""
    top, left, height, width = _integers(block, "the block's top, left, height and width")
    rows = 0 <= top < top + height <= size[0]
    columns = 0 <= left < left + width <= size[1]
    if not (rows and columns):
        raise ValueError(
            f"a block of {height} x {width} at row {top} and column {left} does not fit into "
            f"{size[0]} x {size[1]}"
        )
    return Block(top, left, height, width)


def _pair(values: tuple[int, int], name: str) -> tuple[int, int]:
    height, width = _integers(values, f"{name} (height, width)", 2)
    return height, width


def _integers(values: tuple[int, ...], name: str, count: int | None = None) -> tuple[int, ...]:
    try:
        whole = tuple(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"{name} must be integers, got {values!r}") from None
    if count is not None and len(whole) != count:
        raise ValueError(f"{name} must be {count} integers, got {values!r}")
    return whole


def _device(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device
