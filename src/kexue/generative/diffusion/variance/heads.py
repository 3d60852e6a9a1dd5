"""Clean variances per sample and entry, learned by a small network beside a finished denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.network import _per_example
from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction, _check_state
from kexue.generative.diffusion.schedule.base import NoiseSchedule
from kexue.generative.diffusion.training import sample_times
from kexue.generative.diffusion.variance.clean import (
    _check_data_range,
    _unclipped,
    _wide,
    clip_clean_variance,
)

__all__ = ["NoiseResidualVariance", "SquaredNoiseVariance", "variance_loss"]

_OBJECTIVES = ("moment", "likelihood")


class _MomentVariance(nn.Module):
    """A clean variance from a network for a conditional second moment of the noise."""

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        schedule: NoiseSchedule,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        data_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _check_data_range(data_range)
        self.network = network
        self.schedule = schedule
        self.time_scale = time_scale
        self.time_offset = time_offset
        self.data_range = data_range

    def moment(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch *event"]:
        """Return the network's output, the moment given x at a time."""
        _check_state(x)
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
        return output

    def target(self, noise: Tensor, prediction: Prediction) -> Tensor:
        """Return what the moment is the conditional mean of."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        prediction: Prediction,
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch *event"]:
        """Return the variance of each entry, clipped to what is possible."""
        variance = self._unbounded(x, time, prediction, condition)
        clipped = clip_clean_variance(variance, self.schedule, time, data_range=self.data_range)
        return clipped.to(x.dtype)

    def extra_repr(self) -> str:
        return f"schedule={self.schedule}, data_range={self.data_range}"

    def _unbounded(
        self, x: Tensor, time: float | Tensor, prediction: Prediction, condition: Tensor | None
    ) -> Tensor:
        share = self._share(_wide(self.moment(x, time, condition)), prediction)
        # In a wide dtype: σ² leaves the range of float16 where the share is small.
        signal, noise = self.schedule._scales_for(_wide(x), time, positive=True)
        return share * ((noise / signal) ** 2).to(share.dtype)

    def _share(self, moment: Tensor, prediction: Prediction) -> Tensor:
        """Return the variance of the noise given x, that is Var[x_0 | x_t] ᾱ²/β̄²."""
        raise NotImplementedError


class NoiseResidualVariance(_MomentVariance):
    """The clean variance from a network for E[(ε − ε̂)² | x_t], "NPR".

    Var[x_0 | x_t] = (β̄²/ᾱ²) E[(ε − ε̂)² | x_t]: the best variance for x̂_0 as it is, right or wrong.

    Parameters
    ----------
    network : Module or callable
        Called as `NetworkDenoiser` calls its network. Gives a tensor of the shape of x, made
        non-negative by its own last layer, a softplus for instance.
    schedule : NoiseSchedule
        What time means.
    time_scale, time_offset : float
        The network sees ``time * time_scale + time_offset``.
    data_range : (float, float), optional
        Bounds of the data, which bound the variance too.

    Raises
    ------
    ValueError
        For a ``data_range`` that does not increase, an output of another shape than x.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> schedule = DiscreteSchedule.linear()
    >>> denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2), torch.ones(1), schedule=schedule)
    >>> head = nn.Sequential(nn.Linear(2, 2), nn.Softplus())
    >>> variance = NoiseResidualVariance(lambda x, time: head(x), schedule=schedule)
    >>> loss = variance_loss(variance, denoiser, torch.randn(8, 2))
    >>> loss.backward()
    >>> x = torch.randn(5, 2)
    >>> variance(x, 300, denoiser.predict(x, 300)).shape
    torch.Size([5, 2])
    """

    def target(
        self, noise: Float[Tensor, " batch *event"], prediction: Prediction
    ) -> Float[Tensor, " batch *event"]:
        """Return (ε − ε̂)²."""
        return (_wide(prediction.epsilon) - noise).square()

    def _share(self, moment: Tensor, prediction: Prediction) -> Tensor:
        return moment


class SquaredNoiseVariance(_MomentVariance):
    """The clean variance from a network for E[ε² | x_t], "SN".

    Var[x_0 | x_t] = (β̄²/ᾱ²)(E[ε² | x_t] − ε̂²), right for a perfect ε̂. With an error of ε̂ it is
    off by first order in the error, of either sign; negative values are clipped to 0.

    Parameters
    ----------
    network : Module or callable
        Called as `NetworkDenoiser` calls its network. Gives a tensor of the shape of x, made
        non-negative by its own last layer, a softplus for instance.
    schedule : NoiseSchedule
        What time means.
    time_scale, time_offset : float
        The network sees ``time * time_scale + time_offset``.
    data_range : (float, float), optional
        Bounds of the data, which bound the variance too.

    Raises
    ------
    ValueError
        For a ``data_range`` that does not increase, an output of another shape than x.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> schedule = DiscreteSchedule.linear()
    >>> denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2), torch.ones(1), schedule=schedule)
    >>> variance = SquaredNoiseVariance(lambda x, time: torch.ones_like(x), schedule=schedule)
    >>> x = torch.zeros(1, 2)  # ε̂ = 0 and E[ε²] = 1: as uncertain as the noise is large
    >>> variance(x, 300, denoiser.predict(x, 300)) / schedule.sigma(300) ** 2
    tensor([[1., 1.]])
    """

    def target(
        self, noise: Float[Tensor, " batch *event"], prediction: Prediction
    ) -> Float[Tensor, " batch *event"]:
        """Return ε²."""
        return _wide(noise).square()

    def _share(self, moment: Tensor, prediction: Prediction) -> Tensor:
        return moment - prediction.epsilon.to(moment).square()


def variance_loss(
    variance: _MomentVariance,
    denoiser: Denoiser,
    clean: Float[Tensor, " batch *event"],
    *,
    objective: str = "moment",
    times: Float[Tensor, " batch"] | float | None = None,
    noise: Float[Tensor, " batch *event"] | None = None,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return the loss of a variance network beside a denoiser that is left as it is.

    The denoiser runs without gradient and with its clipping of x̂_0 set aside: training both at
    once would disturb the mean. Draws what is not given, times before noise.

    Parameters
    ----------
    variance : NoiseResidualVariance or SquaredNoiseVariance
        What is trained.
    denoiser : Denoiser
        A trained one.
    clean : Tensor, shape (batch, *event)
        Clean data.
    objective : {"moment", "likelihood"}
        moment: ‖network − target‖², the regression that needs no division. likelihood:
        ½ Σ[(x_0 − x̂_0)²/v + log v] for the variance v before it is clipped, but at least a
        rounding error of its upper bound.
    times : Tensor, shape (batch,), or float, optional
        Positive times; drawn by `sample_times` by default.
    noise : Tensor, shape (batch, *event), optional
        Standard normal noise.
    condition : Tensor, optional
        Passed to both networks.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``clean``.

    Returns
    -------
    Tensor, shape ()
        Mean over the batch of a sum over entries; in float32 for half precision.

    Raises
    ------
    ValueError
        For an unknown objective, no data, noise of another shape, times that are out of range.

    Examples
    --------
    The moment of standard normal data and their exact denoiser does not depend on x, and with it
    the loss is the variance of a squared normal variable.

    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> schedule = DiscreteSchedule.linear()
    >>> denoiser = GaussianMixtureDenoiser(torch.zeros(1, 1), torch.ones(1), schedule=schedule)
    >>> exact = schedule.signal_scale(300).item() ** 2
    >>> variance = NoiseResidualVariance(lambda x, t: torch.full_like(x, exact), schedule=schedule)
    >>> source = torch.Generator().manual_seed(0)
    >>> clean = torch.randn(50_000, 1, generator=source)
    >>> loss = variance_loss(variance, denoiser, clean, times=300.0, generator=source)
    >>> round(loss.item() / exact**2, 1)
    2.0
    """
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)}, got {objective!r}")
    _check_state(clean, "clean")
    if not clean.numel():
        raise ValueError(f"clean must hold at least one entry, got shape {tuple(clean.shape)}")
    schedule = denoiser.schedule
    if times is None:
        times = sample_times(schedule, len(clean), generator=generator, device=clean.device)
    if noise is None:
        noise = torch.randn(
            clean.shape, dtype=clean.dtype, device=clean.device, generator=generator
        )
    x = schedule.add_noise(clean, noise, times)
    with torch.no_grad():
        prediction = _unclipped(denoiser).predict(x, times, condition=condition)

    if objective == "moment":
        error = _wide(variance.moment(x, times, condition)) - variance.target(noise, prediction)
        losses = error.square()
    else:
        signal, scale = schedule._scales_for(_wide(x), times, positive=True)
        ratio = (scale / signal) ** 2
        v = variance._unbounded(x, times, prediction, condition)
        # Of β̄²/(ᾱ² + β̄²), which is below both β̄²/ᾱ² and 1.
        smallest = torch.finfo(v.dtype).eps * ratio / (1 + ratio)
        v = torch.maximum(v, smallest.to(v))
        squared = (_wide(prediction.epsilon) - noise).square() * ratio.to(v)
        losses = (squared / v + v.log()) / 2
    return losses.reshape(len(clean), -1).sum(1).mean()
