"""Guidance by the difference of a conditional and an unconditional prediction of one network.

    ε̃ = ε̂(x_t, ∅) + γ (ε̂(x_t, y) − ε̂(x_t, ∅))

With exact predictions it is guidance by the classifier that the two imply, at the same γ.

Source: https://arxiv.org/abs/2207.12598, https://arxiv.org/abs/2305.08891 (rescaling),
https://arxiv.org/abs/2404.07724 (interval).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction, _check_state
from kexue.generative.diffusion.guidance.strength import (
    Scale,
    _check_clip,
    _check_denoiser,
    _check_scale,
    _clip,
    _scale_at,
)
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _plain

__all__ = ["ClassifierFreeGuidance", "drop_condition"]


class ClassifierFreeGuidance(nn.Module):
    """A conditional denoiser whose condition is amplified.

    γ = 0 is unconditional and evaluates the null branch alone, γ = 1 is the condition as it is
    and evaluates the conditional branch alone; every other number needs both, below 1 and below
    0 too. `from_weight` takes the convention w = γ − 1.

    Parameters
    ----------
    denoiser : Denoiser
        Trained with conditions that were replaced by ``null_condition`` now and then, see
        `drop_condition`.
    scale : float, Tensor of shape (batch,), or callable
        γ, or a function of time that gives it. Only numbers can save a branch.
    null_condition : Tensor or number
        What "no condition" looks like, of the shape of one condition; or a negative condition to
        steer away from, for one or for every example.
    rescale : float
        Share φ in [0, 1] of ε̃ that is given the standard deviation of the conditional ε̂, over
        the entries of each example: large scales then do not overexpose. Not used
        where γ is the number 0.
    interval : (float, float), optional
        Range of sigma in which γ applies, ends included; outside it is 1. Needs one time for all.
    batched : bool
        Evaluate both branches in one call, the conditional in the first half of the batch.
    clip_sample : (float, float), optional
        Range of the data: the guided x̂_0 is clamped to it.

    Raises
    ------
    ValueError
        For a rescaling outside [0, 1], an interval or range that does not increase, a scale that
        is not finite or of another length, a condition that is missing or of another length, a
        null condition that does not fit to it, in shape, kind or (on the CPU) value.
    TypeError
        For a denoiser, scale or null condition that is none.

    Examples
    --------
    >>> from kexue.generative.diffusion import GaussianMixtureDenoiser, HeatSchedule
    >>> two = GaussianMixtureDenoiser(
    ...     torch.tensor([[-1.0], [1.0]]), torch.ones(2), schedule=HeatSchedule(),
    ...     labels=torch.tensor([0, 1]),
    ... )
    >>> guided = ClassifierFreeGuidance(two, scale=3.0, null_condition=-1)
    >>> guided.predict(torch.zeros(1, 1), 1.0, condition=1).sample  # three times as far from 0
    tensor([[1.5000]])
    """

    null_condition: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        scale: Scale,
        null_condition: int | float | Tensor,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
        batched: bool = True,
        clip_sample: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _check_denoiser(denoiser)
        _check_scale(scale)
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], got {rescale}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(
                f"interval must be an increasing pair of sigmas from 0 on, got {interval}"
            )
        _check_clip(clip_sample)
        self.denoiser = denoiser
        self.scale = scale
        # It comes from the caller every time, like the scale: no part of the weights.
        null = _as_condition(null_condition, "null_condition")
        self.register_buffer("null_condition", null, persistent=False)
        self.rescale = rescale
        self.interval = interval
        self.batched = batched
        self.clip_sample = clip_sample

    @classmethod
    def from_weight(
        cls, denoiser: Denoiser, weight: Scale, **options: Any
    ) -> ClassifierFreeGuidance:
        """Build from the weight w of (1 + w) ε̂(x, y) − w ε̂(x, ∅).

        Parameters
        ----------
        denoiser : Denoiser
            As for the class.
        weight : float, Tensor of shape (batch,), or callable
            w = γ − 1.
        **options
            Everything else but ``scale``.

        Returns
        -------
        ClassifierFreeGuidance
        """
        _check_scale(weight)
        scale = partial(_one_more, weight) if callable(weight) else 1 + weight
        return cls(denoiser, scale=scale, **options)

    @property
    def schedule(self) -> NoiseSchedule:
        """That of the denoiser."""
        return self.denoiser.schedule

    def predict(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        *,
        condition: int | float | Tensor | None = None,
    ) -> Prediction:
        """Return the guided estimate of clean data and noise."""
        _check_state(x)
        if condition is None:
            raise ValueError("condition must be given for classifier-free guidance, got None")
        condition = _per_batch(_as_condition(condition, "condition").to(x.device), len(x))
        null = _fitted(self.null_condition, condition)
        scale = self._scale_inside_the_interval(x, time)
        if isinstance(scale, float) and scale in (0.0, 1.0):
            only = condition if scale == 1 else null
            return _clip(self.denoiser.predict(x, time, condition=only), self.clip_sample, x)
        conditional, unconditional = self._both(x, time, condition, null)
        guided = _extrapolate(unconditional, conditional, scale)
        if self.rescale > 0:
            guided = _rescale(guided, conditional, self.rescale)
        return _clip(guided, self.clip_sample, x)

    def _scale_inside_the_interval(self, x: Tensor, time: float | Tensor) -> float | Tensor:
        if self.interval is not None:
            if isinstance(time, Tensor) and time.ndim:
                raise ValueError(
                    f"time must be one for all with an interval, got shape {tuple(time.shape)}"
                )
            low, high = self.interval
            if not low <= float(self.schedule.sigma(time)) <= high:
                return 1.0
        return _scale_at(self.scale, time, x)

    def _both(
        self, x: Tensor, time: float | Tensor, condition: Tensor, null: Tensor
    ) -> tuple[Prediction, Prediction]:
        """Return the conditional and the unconditional prediction."""
        if not self.batched:
            return (
                self.denoiser.predict(x, time, condition=condition),
                self.denoiser.predict(x, time, condition=null),
            )
        if isinstance(time, Tensor) and time.ndim:
            time = torch.cat([time, time])
        both = self.denoiser.predict(
            torch.cat([x, x]), time, condition=torch.cat([condition, null])
        )
        # One time for all comes with one pair of scales for all.
        parts = [
            part.tensor_split(2) if part.ndim and part.shape[0] == 2 * len(x) else (part, part)
            for part in (both.sample, both.epsilon, both.signal_scale, both.noise_scale)
        ]
        first, second = zip(*parts, strict=True)
        return Prediction(*first), Prediction(*second)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, rescale={self.rescale}, interval={self.interval}"


def drop_condition(
    condition: Shaped[Tensor, " batch *shape"],
    null_condition: int | float | Tensor,
    *,
    probability: float,
    generator: torch.Generator | None = None,
) -> Shaped[Tensor, " batch *shape"]:
    """Replace the condition of some examples, so that one training learns both branches.

    Draws one uniform number per example.

    Parameters
    ----------
    condition : Tensor, shape (batch, *shape)
        Labels, embeddings, or whatever the denoiser is told.
    null_condition : Tensor, shape (*shape), or number
        What "no condition" looks like.
    probability : float
        Of each example, on its own, to lose its condition.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``condition``.

    Returns
    -------
    Tensor, shape (batch, *shape)

    Raises
    ------
    ValueError
        For a probability outside [0, 1], a condition without a batch, and a null condition of
        another shape or kind, or (on the CPU) of a value that the condition's dtype has not.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> drop_condition(torch.arange(8), 10, probability=0.3, generator=generator)
    tensor([ 0,  1, 10, 10,  4,  5,  6,  7])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    if not isinstance(condition, Tensor) or condition.ndim == 0:
        got = tuple(condition.shape) if isinstance(condition, Tensor) else type(condition).__name__
        raise ValueError(f"condition must be a tensor with one entry per example, got {got}")
    null = _fitted(_as_condition(null_condition, "null_condition"), condition)
    dropped = torch.rand(len(condition), generator=generator, device=condition.device)
    dropped = (dropped < probability).reshape(-1, *(1,) * (condition.ndim - 1))
    return torch.where(dropped, null, condition)


def _as_condition(value: int | float | Tensor, name: str) -> Tensor:
    if not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
    return torch.as_tensor(value)


def _per_batch(condition: Tensor, batch: int) -> Tensor:
    """Give every example its condition."""
    if condition.ndim == 0:
        return condition.expand(batch)
    if condition.shape[0] != batch:
        raise ValueError(
            f"condition must be one for all or have one entry per example, {batch}, "
            f"got shape {tuple(condition.shape)}"
        )
    return condition


def _fitted(null: Tensor, condition: Tensor) -> Tensor:
    """Shape the null condition like the condition of a batch."""
    event = condition.shape[1:]
    if null.shape not in (event, (1, *event), condition.shape) or (
        null.is_floating_point() and not condition.is_floating_point()
    ):
        raise ValueError(
            f"null_condition must be of the kind and shape of one condition, {condition.dtype} "
            f"{tuple(event)}, got {null.dtype} {tuple(null.shape)}"
        )
    fitted = null.to(condition)
    integers = null.dtype != condition.dtype and not condition.is_floating_point()
    # On an accelerator the look would halt the chain at every step.
    seen = null.device.type == "cpu" and not torch.compiler.is_compiling()
    if integers and seen and not bool((fitted == null).all()):
        raise ValueError(
            f"null_condition must be a value of the condition's dtype, {condition.dtype}, "
            f"got {null.tolist()}"
        )
    return fitted.expand(condition.shape)


def _one_more(weight: Any, time: float | Tensor) -> float | Tensor:
    return 1 + weight(time)


def _extrapolate(start: Prediction, end: Prediction, scale: float | Tensor) -> Prediction:
    """Go from one prediction towards the other, γ of the way.

    Clean data and noise both move along, so that neither is computed from the other.
    """
    return Prediction(
        _between(start.sample, end.sample, scale),
        _between(start.epsilon, end.epsilon, scale),
        end.signal_scale,
        end.noise_scale,
    )


def _between(start: Tensor, end: Tensor, scale: float | Tensor) -> Tensor:
    # Under autocast ε̂ may have another dtype than x, which γ has been shaped for.
    return torch.lerp(start, end, scale.to(start) if isinstance(scale, Tensor) else scale)


def _rescale(guided: Prediction, conditional: Prediction, share: float) -> Prediction:
    """Pull the spread of ε̃ towards that of the conditional ε̂, example by example."""
    if math.prod(guided.epsilon.shape[1:]) < 2:
        raise ValueError(
            "rescale needs examples of at least two entries, "
            f"got shape {tuple(guided.epsilon.shape)}"
        )
    spread = _spread(guided.epsilon)
    spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)
    factor = 1 + share * (_spread(conditional.epsilon) / spread - 1)
    signal, noise = _plain(guided.signal_scale), _plain(guided.noise_scale)
    return Prediction(
        # ᾱ x̂_0 gains what β̄ ε̃ loses.
        guided.sample + (noise / signal) * ((1 - factor) * guided.epsilon),
        factor * guided.epsilon,
        guided.signal_scale,
        guided.noise_scale,
    )


def _spread(epsilon: Tensor) -> Tensor:
    return epsilon.std(tuple(range(1, epsilon.ndim)), keepdim=True)
