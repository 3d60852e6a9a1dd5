r"""Activations that keep the second moment by themselves.

.. math::
    \tilde\varphi(x) = \frac{\varphi(x) - s}{\sqrt{E[(\varphi(z) - s)^2]}}, \qquad z \sim N(0, 1),

with :math:`s = 0`, or :math:`E[\varphi(z)]` where it is centred. No variance of the weights does
this for tanh or sigmoid. SELU is an ELU that needs no such correction.

Source: https://kexue.fm/archives/8620, https://arxiv.org/abs/1706.02515 (SELU).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from kexue.nn.init.fans import _check_floating
from kexue.nn.init.moments import _BY_NAME, activation_moments

__all__ = ["StandardizedActivation"]


class StandardizedActivation(nn.Module):
    r"""An activation, shifted and scaled: :math:`(\varphi(x) - \text{shift}) \cdot \text{scale}`.

    Of standard normal inputs the outputs have second moment 1, and mean 0 with ``center``.

    Parameters
    ----------
    activation : str or callable
        As in :func:`activation_moments`.
    center : bool
        Whether the mean is removed first.

    Raises
    ------
    TypeError
        For an activation that is neither name nor callable, or an input that is not floating.
    ValueError
        For an unknown name, or an activation that is constant, not finite, or not elementwise.

    Examples
    --------
    >>> import torch
    >>> tanh = StandardizedActivation("tanh")
    >>> round(tanh(torch.randn(10**6)).square().mean().item(), 2)
    1.0
    """

    def __init__(
        self, activation: str | Callable[[Tensor], Tensor], *, center: bool = False
    ) -> None:
        super().__init__()
        moments = activation_moments(activation)
        spread = moments.variance if center else moments.second_moment
        if not spread > 0:
            raise ValueError(f"activation must not be constant, got {activation!r}")
        self.activation = _BY_NAME[activation] if isinstance(activation, str) else activation
        self.shift = moments.mean if center else 0.0
        self.scale = 1 / math.sqrt(spread)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the corrected activation of x."""
        _check_floating(x, "x")
        return (self.activation(x) - self.shift) * self.scale

    def extra_repr(self) -> str:
        return f"shift={self.shift:g}, scale={self.scale:g}"
