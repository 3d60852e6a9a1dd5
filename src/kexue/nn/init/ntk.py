r"""The parametrisation in which one learning rate fits every width.

.. math::
    W = c\,V, \qquad c = \frac{g}{\sqrt{\text{fan}}}, \qquad V_{ij} \sim N(0, 1).

The function is that of an ordinary weight of variance :math:`g^2/\text{fan}`, but every raw
parameter is of order one: a step of Adam at rate 0.01 moves each of them by about a hundredth, at
any width. A step of plain gradient descent at rate r on V is one at rate :math:`r c^2` on W.

Source: https://kexue.fm/archives/8620, https://arxiv.org/abs/1806.07572.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kexue.nn.init.fans import _check_floating, _fan

__all__ = ["NTKParametrization", "ntk_parametrize"]


class NTKParametrization(nn.Module):
    """A weight that is a raw parameter times a fixed number.

    For ``torch.nn.utils.parametrize.register_parametrization``; :func:`ntk_parametrize` chooses the
    number.

    Parameters
    ----------
    scale : float
        Factor c.

    Raises
    ------
    ValueError
        For a factor that is not positive and finite.

    Examples
    --------
    >>> NTKParametrization(0.5)(torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.scale = float(scale)

    def forward(self, raw: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the weight of a raw parameter."""
        _check_floating(raw, "raw")
        return raw * self.scale

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the raw parameter of a weight."""
        return weight / self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def ntk_parametrize(
    module: nn.Module,
    *,
    name: str = "weight",
    gain: float = 1.0,
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
    reinitialize: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give a module's weight the NTK parametrisation, in place.

    ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` takes it back.

    Parameters
    ----------
    module : nn.Module
        Module that owns the weight, such as ``nn.Linear``.
    name : str
        Name of the weight.
    gain : float
        Factor g on top of the root of the fan: the root of 2 before a ReLU.
    mode : {"fan_in", "fan_out", "fan_avg"}
        Which fan.
    reinitialize : bool
        Whether the raw parameter is drawn from N(0, 1); otherwise the weight keeps its values, and
        the module its function.
    generator : torch.Generator, optional
        Source of the draws.

    Returns
    -------
    nn.Module
        The same module.

    Raises
    ------
    ValueError
        For a module without such a weight, one that is parametrised already or has no fan, a gain
        that is not positive and finite, or another mode.

    Examples
    --------
    >>> layer, x = nn.Linear(64, 8), torch.randn(3, 64)
    >>> before = layer(x)
    >>> torch.allclose(ntk_parametrize(layer)(x), before, atol=1e-6)
    True
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{name} of {type(module).__name__} is parametrised already")
    weight = dict(module.named_parameters(recurse=False)).get(name)
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no parameter named {name!r}")
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be positive and finite, got {gain}")
    scale = gain / math.sqrt(_fan(weight, mode, name))
    parametrize.register_parametrization(module, name, NTKParametrization(scale))
    if reinitialize:
        raw = module.parametrizations[name].original  # type: ignore[index, union-attr]
        with torch.no_grad():
            raw.normal_(generator=generator)
    return module
