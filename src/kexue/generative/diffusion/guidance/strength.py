"""What all guidance shares: how strong it is at a time, and the range of data it must not leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import TypeAlias

from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction

__all__: list[str] = []

Scale: TypeAlias = float | Tensor | Callable[..., float | Tensor]
"""γ: a number, one entry per example, or a function of time that gives either."""


def _scale_at(scale: Scale, time: float | Tensor, x: Tensor) -> float | Tensor:
    """Return γ at a time, as a number of the host or shaped to multiply x.

    Numbers stay numbers: one that passed through float32 would cost digits in float64, and one
    that passed through a tensor could not decide which branch is evaluated.
    """
    value = scale(time) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return float(value)
    if value.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"scale must be a number or one per example, of shape ({len(x)},), "
            f"got shape {tuple(value.shape)}"
        )
    return value.to(x).reshape(-1, *(1,) * (x.ndim - 1)) if value.ndim else value.to(x)


def _check_scale(scale: Scale) -> None:
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.ndim > 1:
            raise ValueError(
                "scale must be a number or a real tensor with one entry per example, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )
    elif isinstance(scale, Real):
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
    elif not callable(scale):
        raise TypeError(
            f"scale must be a number, a tensor or a function of time, got {type(scale).__name__}"
        )


def _check_denoiser(denoiser: Denoiser) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"denoiser must have a schedule and a method predict, got {type(denoiser).__name__}"
        )


def _check_log_probability(log_probability: object) -> None:
    if not callable(log_probability):
        raise TypeError(
            "log_probability must be a function of x, time and condition, "
            f"got {type(log_probability).__name__}"
        )


def _check_clip(clip_sample: tuple[float, float] | None) -> None:
    if clip_sample is not None and not clip_sample[0] < clip_sample[1]:
        raise ValueError(f"clip_sample must be an increasing pair, got {clip_sample}")


def _clip(prediction: Prediction, clip_sample: tuple[float, float] | None, x: Tensor) -> Prediction:
    """Clamp x̂_0 to the range of the data; ε̂ follows."""
    return prediction if clip_sample is None else prediction._clamped(clip_sample, x)
