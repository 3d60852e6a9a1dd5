"""Initialisation that keeps a post-norm residual stream bounded."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["initialize_weights"]

_TRUNCATION = 2.0
_density = math.exp(-(_TRUNCATION**2) / 2) / math.sqrt(2 * math.pi)
_TRUNCATED_DEVIATION = math.sqrt(
    1 - 2 * _TRUNCATION * _density / math.erf(_TRUNCATION / math.sqrt(2))
)
"""Standard deviation 0.8796256610 of a standard normal variable that is cut at ±2."""


def initialize_weights(
    module: nn.Module, num_hidden_layers: int, *, generator: torch.Generator | None = None
) -> None:
    r"""Draw all matrices of a module such that L layers add up to a stream of order one.

    The entries are normal with parameter
    :math:`s = 1.13684723 \, \text{fan\_in}^{-1/2} L^{-1/2}`, cut at ±2s; the factor undoes what
    the cut takes from the standard deviation, which so is :math:`1/\sqrt{\text{fan\_in} \, L}`. The
    fan is the input dimension of a matrix, and the width of an embedding. Biases become zero.

    Parameters
    ----------
    module : nn.Module
        Its Linear and Embedding layers, at any depth, are drawn in place.
    num_hidden_layers : int
        L, at least 1.
    generator : torch.Generator, optional
        On the device of the weights; torch's own by default.

    Returns
    -------
    None

    Raises
    ------
    ValueError
        For a number of layers below 1.

    Examples
    --------
    >>> linear = nn.Linear(100, 400)
    >>> initialize_weights(linear, 4, generator=torch.Generator().manual_seed(0))
    >>> bool(abs(linear.weight.std() - 0.05) < 0.001)
    True
    """
    if num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers must be at least 1, got {num_hidden_layers}")
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        fan_in = layer.weight.shape[1]
        s = 1 / (_TRUNCATED_DEVIATION * math.sqrt(fan_in * num_hidden_layers))
        cut = _TRUNCATION * s
        nn.init.trunc_normal_(layer.weight, std=s, a=-cut, b=cut, generator=generator)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
