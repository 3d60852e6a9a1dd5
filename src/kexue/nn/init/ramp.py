r"""A residual that starts as the identity and grows into an ordinary one.

.. math::
    x \mapsto x + \alpha F(x), \qquad \alpha: 0 \to 1 .

The weight is a question of initialisation, not of capacity: it rises by a fixed small amount a step
and stays at 1. Learned, it is SkipInit and ReZero.

Source: https://kexue.fm/archives/8620, https://arxiv.org/abs/2003.04887.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.nn.residual.block import _branch

__all__ = ["GradualResidual", "advance_ramps"]


class GradualResidual(nn.Module):
    """A sublayer beside the identity, with a weight that is 0 at first.

    Parameters
    ----------
    sublayer : nn.Module
        Maps x to its own shape; of a tuple the first item counts.
    mode : {"ramp", "learned"}
        Whether :meth:`advance` raises the weight to 1, or the optimiser moves it.
    steps : int
        Steps of the ramp. They are counted as whole numbers, so no half precision can lose one; the
        count and the weight are buffers and come back with the ``state_dict``.

    Raises
    ------
    TypeError
        For a sublayer that is no module.
    ValueError
        For another mode, fewer steps than 1, or an input that the sublayer gives another shape.

    Examples
    --------
    >>> block = GradualResidual(nn.Linear(4, 4), steps=10)
    >>> x = torch.ones(1, 4)
    >>> bool((block(x) == x).all())
    True
    >>> block.advance(10)
    >>> torch.equal(block(x), x + block.sublayer(x))
    True
    """

    alpha: Tensor
    step_count: Tensor

    def __init__(
        self,
        sublayer: nn.Module,
        *,
        mode: Literal["ramp", "learned"] = "ramp",
        steps: int = 1000,
    ) -> None:
        super().__init__()
        if not isinstance(sublayer, nn.Module):
            raise TypeError(f"sublayer must be an nn.Module, got {type(sublayer).__name__}")
        if mode not in ("ramp", "learned"):
            raise ValueError(f"mode must be one of ramp, learned, got {mode!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.sublayer = sublayer
        self.mode = mode
        self.steps = steps
        if mode == "ramp":
            self.register_buffer("alpha", torch.zeros(()))
            self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        else:
            self.alpha = nn.Parameter(torch.zeros(()))

    def advance(self, n: int = 1) -> None:
        """Go on by n steps of the ramp; after each step of the optimiser."""
        if self.mode == "learned":
            raise RuntimeError("a learned alpha has no ramp to advance; the optimiser moves it")
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        self.step_count += n
        self.alpha.fill_(min(1.0, int(self.step_count) / self.steps))

    def forward(self, x: Float[Tensor, "..."], *args: Any, **kwargs: Any) -> Float[Tensor, "..."]:
        """Return x plus the weighted sublayer, which is given the further arguments."""
        if not x.is_floating_point():
            raise TypeError(f"x must be real and floating, got {x.dtype}")
        return x + self.alpha * _branch(self.sublayer, x, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, steps={self.steps}"


def advance_ramps(model: nn.Module, n: int = 1) -> int:
    """Advance every ramp in a model.

    Parameters
    ----------
    model : nn.Module
        Model with :class:`GradualResidual` blocks.
    n : int
        Number of steps.

    Returns
    -------
    int
        How many ramps there are.

    Raises
    ------
    ValueError
        For a negative number of steps.

    Examples
    --------
    >>> advance_ramps(nn.Sequential(GradualResidual(nn.Linear(4, 4)), nn.ReLU()))
    1
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    ramps = [m for m in model.modules() if isinstance(m, GradualResidual) and m.mode == "ramp"]
    for ramp in ramps:
        ramp.advance(n)
    return len(ramps)
