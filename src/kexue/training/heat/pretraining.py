"""Pre-training by completion: encode a block, extend its features, decode the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kexue.training.heat.blocks import Block, _fitting, block_mask

__all__ = ["QBHeat", "QBHeatOutput"]


@dataclass(frozen=True, eq=False)
class QBHeatOutput:
    """What :class:`QBHeat` returns.

    Attributes
    ----------
    loss : Tensor, scalar
        Mean squared error over the masked pixels, plus the weighted one over the visible ones.
    reconstruction : Tensor, shape (batch, channels, height, width)
        The decoder's image.
    features : Tensor, shape (batch, features, rows, columns)
        The feature map after propagation: the encoder's inside the block, predicted outside.
    mask : Tensor, shape (height, width)
        True where masked.

    Examples
    --------
    >>> same = torch.nn.Identity()
    >>> from kexue.training.heat import MaskToken
    >>> output = QBHeat(same, MaskToken(1), same)(torch.ones(1, 1, 2, 2), Block(0, 0, 1, 2))
    >>> output.mask
    tensor([[False, False],
            [ True,  True]])
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, "batch channels height width"]
    features: Float[Tensor, "batch features rows columns"]
    mask: Bool[Tensor, "height width"]


class QBHeat(nn.Module):
    """Learns an encoder by completing images from one block of them.

    The encoder sees the crop alone. Its stride is the size of the crop divided by that of its
    feature map; block and image must be multiples of it. After training the encoder takes whole
    images; completing one goes through this module.

    Parameters
    ----------
    encoder : nn.Module
        Crop to feature map, both (batch, channels, height, width).
    propagation : nn.Module
        Called as ``propagation(features, size=..., offset=...)``: a
        :class:`~kexue.training.heat.LinearPropagation`, a
        :class:`~kexue.training.heat.MaskToken`, or one of your own.
    decoder : nn.Module
        Feature map of the whole image to images.
    visible_weight : float
        Weight of the mean squared error over the visible pixels. At 0, the default of masked
        autoencoders, nothing asks the decoder to get those right.

    Raises
    ------
    ValueError
        For a negative ``visible_weight``; in ``forward``, where the block does not fit, is not
        aligned with the stride or leaves nothing to complete, or encoder or decoder return another
        shape than expected.

    Examples
    --------
    >>> from kexue.training.heat import LinearPropagation, quarter_block
    >>> encoder = torch.nn.Conv2d(3, 16, 2, stride=2)
    >>> decoder = torch.nn.ConvTranspose2d(16, 3, 2, stride=2)
    >>> model = QBHeat(encoder, LinearPropagation(16), decoder)
    >>> output = model(torch.rand(5, 3, 8, 8), quarter_block(8, 8, position="center"))
    >>> output.features.shape, output.reconstruction.shape
    (torch.Size([5, 16, 4, 4]), torch.Size([5, 3, 8, 8]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        propagation: nn.Module,
        decoder: nn.Module,
        *,
        visible_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= visible_weight < math.inf:
            raise ValueError(f"visible_weight must be finite and at least 0, got {visible_weight}")
        self.encoder = encoder
        self.propagation = propagation
        self.decoder = decoder
        self.visible_weight = float(visible_weight)

    def extra_repr(self) -> str:
        return f"visible_weight={self.visible_weight}"

    def forward(
        self, images: Float[Tensor, "batch channels height width"], block: Block
    ) -> QBHeatOutput:
        """Complete the images from the block, and return the loss with what led to it."""
        size = _image_size(images)
        block = _fitting(size, block)
        if block[2:] == size:
            raise ValueError(f"block must leave something to complete, got all of {size}")
        top, left, height, width = block
        features = self.encoder(images[..., top : top + height, left : left + width])
        stride = _stride(features, block, size)
        grid = size[0] // stride[0], size[1] // stride[1]
        features = self.propagation(
            features, size=grid, offset=(top // stride[0], left // stride[1])
        )
        reconstruction = self.decoder(features)
        if reconstruction.shape != images.shape:
            raise ValueError(
                f"decoder must return the images' shape {tuple(images.shape)}, "
                f"got {tuple(reconstruction.shape)}"
            )
        mask = block_mask(size, block, device=images.device)
        return QBHeatOutput(
            self._loss(reconstruction, images, mask, height * width), reconstruction, features, mask
        )

    def _loss(
        self,
        reconstruction: Tensor,
        images: Tensor,
        mask: Bool[Tensor, "height width"],
        visible: int,
    ) -> Float[Tensor, ""]:
        dtype = torch.promote_types(images.dtype, torch.float32)
        error = (reconstruction.to(dtype) - images.to(dtype)).square().mean((0, 1))
        loss = torch.where(mask, error, 0.0).sum() / (mask.numel() - visible)
        if self.visible_weight:
            loss = loss + self.visible_weight * torch.where(mask, 0.0, error).sum() / visible
        return loss


def _image_size(images: Tensor) -> tuple[int, int]:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images must be a tensor of floating-point numbers, got {kind}")
    if images.ndim != 4:
        raise ValueError(
            f"images must have shape (batch, channels, height, width), got {tuple(images.shape)}"
        )
    return images.shape[2], images.shape[3]


def _stride(features: Tensor, block: Block, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels per feature along each axis, from the crop and its feature map."""
    if features.ndim != 4 or 0 in features.shape[2:]:
        raise ValueError(
            "the encoder's features must have shape (batch, channels, rows, columns), "
            f"got {tuple(features.shape)}"
        )
    crop, grid = block[2:], features.shape[2:]
    stride = crop[0] // grid[0], crop[1] // grid[1]
    for axis, offset in enumerate(block[:2]):
        step = stride[axis]
        whole = step > 0 and crop[axis] == step * grid[axis]
        if not whole or offset % step or size[axis] % step:
            raise ValueError(
                f"block and image must be aligned with the encoder's stride: a crop of {crop} at "
                f"{block[:2]} of {size} gave features of {tuple(grid)}"
            )
    return stride
