r"""Images completed from a quarter by linear extrapolation of features, with controls and nulls.

QB-Heat keeps one block of half the height and half the width, encodes it alone with any
convolutional network, extends its feature map :math:`z` over the rest of the grid by a first-order
linear system, and asks a decoder for the image:

.. math::
    z_x = A z, \quad z_y = B z \qquad\Longrightarrow\qquad
    z_{xx} + S z_{yy} = 0, \quad S = -A^2 (B^2)^{-1} .

Here :math:`x` runs along the last dimension, and matrices act on channel vectors from the left. The
system has solutions only where :math:`AB = BA`; :class:`LinearPropagation` therefore shares the
eigenvectors, or averages both orders of two free matrices. :class:`MaskToken` in its place is the
masked autoencoder, and a frozen ``initial_scale=0`` copies the nearest feature: without these two
controls a reconstruction says nothing about heat. :func:`fit_first_order` and :func:`fit_laplace`
ask any feature map whether it is continuous, linear or harmonic, :func:`harmonic_fill` and
:func:`heat_diffuse` solve the equation itself.

References
----------
Su Jianlin, "用热传导方程来指导自监督学习". Chen et al., arXiv 2211.13228 (QB-Heat). He et al.,
arXiv 2111.06377 (masked autoencoders).

Examples
--------
>>> import torch
>>> signal = torch.tensor([[1.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0]])[..., None]
>>> harmonic_fill(signal, torch.tensor([0, 1, 1, 1, 0, 1, 1]).bool())[0, :, 0]
tensor([1., 3., 5., 7., 9., 9., 9.])
"""

from kexue.training.heat.blocks import Block, block_mask, quarter_block
from kexue.training.heat.diagnosis import (
    FirstOrderFit,
    LaplaceFit,
    fit_first_order,
    fit_laplace,
)
from kexue.training.heat.equation import harmonic_fill, heat_diffuse
from kexue.training.heat.pretraining import QBHeat, QBHeatOutput
from kexue.training.heat.propagation import LinearPropagation, MaskToken, SequencePropagation

__all__ = [
    "Block",
    "FirstOrderFit",
    "LaplaceFit",
    "LinearPropagation",
    "MaskToken",
    "QBHeat",
    "QBHeatOutput",
    "SequencePropagation",
    "block_mask",
    "fit_first_order",
    "fit_laplace",
    "harmonic_fill",
    "heat_diffuse",
    "quarter_block",
]
