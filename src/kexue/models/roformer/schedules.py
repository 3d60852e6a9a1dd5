"""What changes during training: the scale of the branches, and the learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["PiecewiseLinearLR", "ResidualWarmup"]


class ResidualWarmup:
    r"""Lets the α of :math:`x \leftarrow N(x + \alpha F(x))` grow from 0 to 1.

    At α = 0 the network is nearly the identity, as post-norm networks are not when they start; α
    grows linearly over the first steps and is not trained. Its state belongs into the training
    checkpoint.

    Parameters
    ----------
    model : nn.Module
        A :class:`RoFormerV2Model`, or a model that holds one as ``roformer``. Its
        ``residual_scale`` becomes 0 at once.
    warmup_steps : int
        Number of calls of ``step`` after which α is 1.

    Raises
    ------
    ValueError
        For a number of steps below 1.
    TypeError
        For a model without a ``residual_scale``.

    Examples
    --------
    >>> from kexue.models.roformer import RoFormerV2Config, RoFormerV2Model
    >>> encoder = RoFormerV2Model(RoFormerV2Config(20, 8, 2, 2, 16))
    >>> warmup = ResidualWarmup(encoder, 4)
    >>> scales = [encoder.residual_scale]
    >>> for _ in range(5):
    ...     warmup.step()
    ...     scales.append(encoder.residual_scale)
    >>> scales
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __init__(self, model: nn.Module, warmup_steps: int) -> None:
        encoder = getattr(model, "roformer", model)
        if not hasattr(encoder, "residual_scale"):
            raise TypeError(
                f"model must be a RoFormerV2 with a residual_scale, got a {type(model).__name__}"
            )
        if isinstance(warmup_steps, bool) or not warmup_steps >= 1:
            raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")
        self._encoder = encoder
        self.warmup_steps = warmup_steps
        self._steps = 0
        self._apply()

    def step(self) -> None:
        """Count one optimiser step."""
        self._steps += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps so far, and of all."""
        return {"steps": self._steps, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that ``state_dict`` returned."""
        self._steps = int(state_dict["steps"])
        self.warmup_steps = int(state_dict["warmup_steps"])
        self._apply()

    def _apply(self) -> None:
        self._encoder.residual_scale = min(1.0, self._steps / self.warmup_steps)


class PiecewiseLinearLR(LRScheduler):
    """Learning rate that is linear between given factors.

    It rises from 0 at step 0 to the first milestone and stays constant after the last.

    Parameters
    ----------
    optimizer : Optimizer
        Whose rates are multiplied by the factor.
    milestones : mapping of int to float
        Step -> factor.
    last_epoch : int
        The last step, −1 to begin.

    Raises
    ------
    ValueError
        For no milestones, steps below 0 or fractional, factors below 0 or not finite.

    Examples
    --------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    >>> scheduler = PiecewiseLinearLR(optimizer, {2: 1.0, 4: 0.5})
    >>> rates = [scheduler.get_last_lr()[0]]
    >>> for _ in range(5):
    ...     optimizer.step()
    ...     scheduler.step()
    ...     rates.append(scheduler.get_last_lr()[0])
    >>> rates
    [0.0, 1.0, 2.0, 1.5, 1.0, 1.0]
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Mapping[int, float], last_epoch: int = -1
    ) -> None:
        if not milestones:
            raise ValueError("milestones must hold at least one step, got none")
        for step, factor in milestones.items():
            if step < 0 or step != int(step):
                raise ValueError(f"the steps of milestones must be integers from 0, got {step}")
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"the factors of milestones must be finite and not negative, got {factor}"
                )
        self.milestones = {int(step): float(milestones[step]) for step in sorted(milestones)}
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return the rates of the current step."""
        factor = self._factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        points = {0: 0.0, **self.milestones}
        steps, factors = sorted(points), [points[at] for at in sorted(points)]
        after = bisect_right(steps, step)
        if after == len(steps):
            return factors[-1]
        share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
        return factors[after - 1] + share * (factors[after] - factors[after - 1])
