"""A denoiser made of a network, whatever the network predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.prediction import (
    Prediction,
    _check_prediction_type,
    _check_state,
)
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _as_number

__all__ = ["NetworkDenoiser"]


class NetworkDenoiser(nn.Module):
    """A denoiser made of a network and the knowledge of what the network predicts.

    Parameters
    ----------
    network : Module or callable
        Called as ``network(x, time)`` or ``network(x, time, condition)``, with time of shape
        (batch,), in float32 for half-precision x and in the dtype of x otherwise. Gives a tensor
        of the shape of x, or an object that has one as ``.sample`` (diffusers).
    schedule : NoiseSchedule
        The schedule of training.
    prediction_type : {"epsilon", "sample", "v_prediction", "score"}
        What the network's output estimates.
    time_scale, time_offset : float
        The network sees ``time * time_scale + time_offset``: offset −1 for networks trained with
        diffusers, whose timesteps count from 0.
    clip_sample : (float, float), optional
        Range of the data: x̂_0 is clamped to it, and ε̂ follows.

    Raises
    ------
    ValueError
        For an unknown prediction type, a time that is not positive, an output of another shape.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> from kexue.models import MLPDenoiser
    >>> network = MLPDenoiser(2, hidden=16)
    >>> denoiser = NetworkDenoiser(network, DiscreteSchedule.cosine(), clip_sample=(-1.0, 1.0))
    >>> denoiser.predict(torch.randn(5, 2), 500).sample.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        prediction_type: str = "epsilon",
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        clip_sample: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _check_prediction_type(prediction_type)
        if clip_sample is not None and not clip_sample[0] < clip_sample[1]:
            raise ValueError(f"clip_sample must be an increasing pair, got {clip_sample}")
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.time_scale = time_scale
        self.time_offset = time_offset
        self.clip_sample = clip_sample

    def predict(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        *,
        condition: Tensor | None = None,
    ) -> Prediction:
        """Return the network's estimate of clean data and noise in x at a positive time."""
        _check_state(x)
        scales = self.schedule._scales_for(x, time, positive=True)
        network_time = _per_example(time, x, self.time_scale, self.time_offset)
        given = (x, network_time) if condition is None else (x, network_time, condition)
        output = self.network(*given)
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the network's output must have the shape of its input, {tuple(x.shape)}, "
                f"got {got}"
            )
        prediction = Prediction._read(output, x, *scales, self.prediction_type)
        if self.clip_sample is not None:
            prediction = prediction._clamped(self.clip_sample, x)
        return prediction

    def extra_repr(self) -> str:
        return f"schedule={self.schedule}, prediction_type={self.prediction_type!r}"


def _per_example(time: float | Tensor, x: Tensor, scale: float, offset: float) -> Tensor:
    """Return time as a network takes it: (batch,), never in half precision."""
    dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    batch = x.shape[0]
    number = _as_number(time)
    if number is not None:
        # Filling needs no copy to an accelerator, and so no synchronisation.
        return torch.full((batch,), number * scale + offset, dtype=dtype, device=x.device)
    times = torch.as_tensor(time, dtype=torch.float64) * scale + offset
    return times.to(x.device, dtype).expand(batch)
