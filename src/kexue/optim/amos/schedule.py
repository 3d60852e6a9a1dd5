"""The decay that the derivation asks for: it has a half-life and no end."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["ScaleDecayLR", "scale_decay"]

_KINDS = ("inverse_time", "inverse_square")


def scale_decay(
    step: float,
    *,
    half_life: float,
    kind: Literal["inverse_time", "inverse_square"] = "inverse_time",
) -> float:
    r"""Return the factor on the learning rate after some steps; ½ after the half-life.

    With the error :math:`\|\varepsilon_t\| \propto e^{-S_t}`, the rate follows :math:`e^{-2S_t}`:

    - ``"inverse_time"``: convergence slows down with the error, :math:`1/(1 + t/T)`;
    - ``"inverse_square"``: it does not, :math:`1/(1 + (\sqrt2 - 1)\,t/T)^2`.

    Parameters
    ----------
    step : float
        t, at least 0.
    half_life : float
        T, in steps, above 0.
    kind : {"inverse_time", "inverse_square"}
        Which of the two.

    Returns
    -------
    float
        In (0, 1].

    Raises
    ------
    ValueError
        For a negative step, a half-life that is not positive, or an unknown kind.

    Examples
    --------
    >>> [round(scale_decay(step, half_life=1000), 3) for step in (0, 1000, 3000)]
    [1.0, 0.5, 0.25]
    >>> round(scale_decay(3000, half_life=1000, kind="inverse_square"), 3)
    0.199
    """
    _check_schedule(half_life, kind)
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if kind == "inverse_time":
        return 1 / (1 + step / half_life)
    return 1 / (1 + (math.sqrt(2) - 1) * step / half_life) ** 2


class ScaleDecayLR(LRScheduler):
    """Learning rates that follow :func:`scale_decay`, for any optimiser of torch's kind.

    There is no total number of steps: training may stop or go on at any time. With groups of
    :func:`relative_scale_groups` the constant weight decay of AdamW is then right at every step.
    :class:`Amos` decays by itself and wants no schedule but, if any, a warm-up.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimiser, whose rates at construction are the initial ones.
    half_life : float
        Steps after the warm-up until the rate is half of the initial one.
    kind : {"inverse_time", "inverse_square"}
        See :func:`scale_decay`.
    warmup_steps : int
        Steps w with the factor (t + 1)/(w + 1) first.
    last_epoch : int
        As in torch's schedulers: the last step taken, -1 for a new run.

    Raises
    ------
    ValueError
        For a half-life that is not positive, an unknown kind or a negative warm-up.

    Examples
    --------
    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    >>> schedule = ScaleDecayLR(optimizer, half_life=2, warmup_steps=1)
    >>> rates = []
    >>> for _ in range(4):
    ...     rates.append(round(schedule.get_last_lr()[0], 4))
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.05, 0.1, 0.0667, 0.05]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        half_life: float,
        kind: Literal["inverse_time", "inverse_square"] = "inverse_time",
        warmup_steps: int = 0,
        last_epoch: int = -1,
    ) -> None:
        _check_schedule(half_life, kind)
        if not warmup_steps >= 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.half_life = half_life
        self.kind = kind
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of all groups at the current step."""
        factor = self._factor(self.last_epoch)
        return [initial * factor for initial in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        since = step - self.warmup_steps
        return scale_decay(since, half_life=self.half_life, kind=self.kind)


def _check_schedule(half_life: float, kind: str) -> None:
    if not 0 < half_life < math.inf:
        raise ValueError(f"half_life must be a positive number of steps, got {half_life}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
