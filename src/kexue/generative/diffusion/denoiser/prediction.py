"""What a denoiser says, in one form for all parametrisations, and what a denoiser is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.schedule.base import NoiseSchedule, _add_multiple, _plain

__all__ = ["Denoiser", "Prediction"]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score")


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says about a noisy state x: clean data and noise, of which x is the sum.

    Attributes
    ----------
    sample : Tensor, shape (batch, *event)
        Estimate x̂_0 of E[x_0 | x_t].
    epsilon : Tensor, shape (batch, *event)
        Estimate ε̂ of the total noise, E[ε | x_t].
    signal_scale, noise_scale : Tensor
        ᾱ_t and β̄_t, broadcastable to x; x = signal_scale · sample + noise_scale · epsilon.

    Raises
    ------
    ValueError
        `from_output` refuses an output of another shape and a time that is not positive.

    Examples
    --------
    >>> import torch
    >>> from kexue.generative.diffusion import HeatSchedule
    >>> x = torch.tensor([[2.0]])
    >>> prediction = Prediction.from_output(x / 4, x, 3.0, HeatSchedule(), "sample")
    >>> prediction.epsilon, prediction.score
    (tensor([[0.5000]]), tensor([[-0.1667]]))
    """

    sample: Float[Tensor, " batch *event"]
    epsilon: Float[Tensor, " batch *event"]
    signal_scale: Float[Tensor, "..."]
    noise_scale: Float[Tensor, "..."]
    _said: Prediction | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def score(self) -> Float[Tensor, " batch *event"]:
        """Estimate of the gradient of log p_t, −ε̂/β̄_t."""
        return -self.epsilon / self.noise_scale

    @property
    def v_prediction(self) -> Float[Tensor, " batch *event"]:
        """The velocity ᾱ_t ε̂ − β̄_t x̂_0."""
        return self.signal_scale * self.epsilon - self.noise_scale * self.sample

    @classmethod
    def from_output(
        cls,
        output: Float[Tensor, " batch *event"],
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        schedule: NoiseSchedule,
        prediction_type: str,
    ) -> Prediction:
        """Read a network's output.

        Parameters
        ----------
        output, x : Tensor, shape (batch, *event)
            What the network gave, and the noisy state it was given.
        time : float or Tensor
            Positive; one for all or one per example.
        schedule : NoiseSchedule
            Scales at this time.
        prediction_type : {"epsilon", "sample", "v_prediction", "score"}
            What the output is an estimate of.

        Returns
        -------
        Prediction
        """
        _check_prediction_type(prediction_type)
        if output.shape != x.shape:
            raise ValueError(
                "the network's output must have the shape of its input, "
                f"{tuple(x.shape)}, got {tuple(output.shape)}"
            )
        scales = schedule._scales_for(x, time, positive=True)
        return cls._read(output, x, *scales, prediction_type)

    def with_sample(self, sample: Tensor, x: Tensor) -> Prediction:
        """Return the prediction for x whose clean estimate is ``sample``."""
        return self._read(sample, x, self.signal_scale, self.noise_scale, "sample")

    def with_epsilon(self, epsilon: Tensor, x: Tensor) -> Prediction:
        """Return the prediction for x whose noise estimate is ``epsilon``."""
        return self._read(epsilon, x, self.signal_scale, self.noise_scale, "epsilon")

    def _clamped(self, limits: tuple[float, float], x: Tensor) -> Prediction:
        """Return the prediction for x with x̂_0 clamped, which remembers what was said before."""
        clamped = self.with_sample(self.sample.clamp(*limits), x)
        object.__setattr__(clamped, "_said", self)
        return clamped

    @property
    def _unclamped(self) -> Prediction:
        """What a clean variance sees: E[ε²] − ε̂² holds for the ε̂ of the network."""
        return self if self._said is None else self._said

    @classmethod
    def _read(
        cls,
        output: Tensor,
        x: Tensor,
        signal_scale: Tensor,
        noise_scale: Tensor,
        prediction_type: str,
    ) -> Prediction:
        signal, noise = _plain(signal_scale), _plain(noise_scale)
        if prediction_type == "v_prediction":
            total = signal**2 + noise**2
            sample = _add_multiple((signal / total) * x, -noise / total, output)
            epsilon = _add_multiple((noise / total) * x, signal / total, output)
        elif prediction_type == "sample":
            sample = output
            epsilon = _add_multiple(x, -signal, sample).mul_(1 / noise)
        else:
            epsilon = -noise * output if prediction_type == "score" else output
            sample = _add_multiple(x, -noise, epsilon).mul_(1 / signal)
        return cls(sample, epsilon, signal_scale, noise_scale)


@runtime_checkable
class Denoiser(Protocol):
    """Anything with a schedule that predicts clean data and noise.

    Guidance, ensembles and exact denoisers are denoisers that wrap denoisers or data.

    Attributes
    ----------
    schedule : NoiseSchedule
        What time means.
    """

    schedule: NoiseSchedule

    def predict(
        self, x: Tensor, time: float | Tensor, *, condition: Tensor | None = None
    ) -> Prediction:
        """Return the estimate of clean data and noise in x at a positive time."""


def _check_state(x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a real tensor with a leading dimension, got {kind}")


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in _PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(_PREDICTION_TYPES)}, "
            f"got {prediction_type!r}"
        )
