"""Denoisers: whatever estimates the clean data from a noisy state.

    x_t = ᾱ_t x̂_0 + β̄_t ε̂

A denoiser has a `schedule` and a `predict`; its `Prediction` holds x̂_0 and ε̂, so that no sampler,
loss or bound has to know how a network is parametrised. `NetworkDenoiser` makes one of a network,
`GaussianMixtureDenoiser` is exact for a mixture of Gaussians.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2202.00512 (v-prediction).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kexue.generative.diffusion.schedule import (
    NoiseSchedule,
    _add_multiple,
    _as_number,
    _over_event,
    _plain,
)

__all__ = ["Denoiser", "GaussianMixtureDenoiser", "NetworkDenoiser", "Prediction"]

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
            prediction = prediction.with_sample(prediction.sample.clamp(*self.clip_sample), x)
        return prediction

    def extra_repr(self) -> str:
        return f"schedule={self.schedule}, prediction_type={self.prediction_type!r}"


class GaussianMixtureDenoiser(nn.Module):
    """The exact denoiser of a mixture of Gaussians, with its density, variance and samples.

    With data points as means and covariance 0 it is the optimal denoiser of a finite training
    set. Everything is computed in float64; cost and memory are batch × components × dimensions.

    Parameters
    ----------
    means : Tensor, shape (components, *event)
        Centres of the components.
    covariances : Tensor, shape (components,), (components, *event) or (components, d, d)
        Variances of isotropic or diagonal components, or full covariance matrices over the
        flattened event of d entries.
    weights : Tensor, shape (components,), optional
        Proportions, normalised here; equal by default.
    schedule : NoiseSchedule
        What time means.
    labels : Tensor of integers, shape (components,), optional
        Class of each component: ``condition`` then selects a class, one for all or one per
        example; −1 selects all of them.

    Raises
    ------
    ValueError
        For shapes that do not fit, covariances that are not positive semi-definite, weights that
        are negative or sum to 0, a condition that no component carries.

    Examples
    --------
    >>> from kexue.generative.diffusion import HeatSchedule
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.tensor([[-1.0], [1.0]]), torch.zeros(2), schedule=HeatSchedule()
    ... )
    >>> denoiser.predict(torch.tensor([[0.5]]), 1.0).sample  # tanh(0.5)
    tensor([[0.4621]])
    """

    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor | None
    log_weights: Tensor
    labels: Tensor | None

    def __init__(
        self,
        means: Float[Tensor, " components *event"],
        covariances: Float[Tensor, "components ..."],
        weights: Float[Tensor, " components"] | None = None,
        *,
        schedule: NoiseSchedule,
        labels: Int[Tensor, " components"] | None = None,
    ) -> None:
        super().__init__()
        _check_state(means, "means")
        if not bool(torch.isfinite(means).all()):
            raise ValueError("means must be finite, got NaN or infinity")
        count = len(means)
        if weights is None:
            weights = means.new_ones(count)
        if weights.shape != (count,) or not bool((weights >= 0).all() & (weights.sum() > 0)):
            raise ValueError(
                f"weights must be {count} numbers that are not negative and not all 0, "
                f"got {weights.tolist()}"
            )
        if labels is not None and (labels.shape != (count,) or labels.is_floating_point()):
            raise ValueError(
                f"labels must be {count} integers, got {labels.dtype} {tuple(labels.shape)}"
            )
        eigenvalues, eigenvectors = _diagonalise(means, covariances)
        self.schedule = schedule
        self.register_buffer("means", means)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("eigenvectors", eigenvectors)
        self.register_buffer("log_weights", torch.log(weights.double() / weights.double().sum()))
        self.register_buffer("labels", labels)

    def predict(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        *,
        condition: int | Tensor | None = None,
    ) -> Prediction:
        """Return E[x_0 | x_t = x] and E[ε | x_t = x] at a positive time."""
        time = self.schedule._check_time(time, positive=True)
        signal, noise, offset, variance, log_joint = self._components(x, time, condition)
        share = torch.softmax(log_joint, -1).unsqueeze(-1)
        # Both from the pull of each component, so that neither is a difference of large numbers.
        pull = offset / variance
        sample = share * (self._flat_means + signal * self._from_eigen(self.eigenvalues * pull))
        epsilon = noise * share * self._from_eigen(pull)
        scales = self.schedule._scales_for(x, time)
        return Prediction(
            sample.sum(1).reshape(x.shape).to(x.dtype),
            epsilon.sum(1).reshape(x.shape).to(x.dtype),
            *scales,
        )

    def log_prob(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor = 0.0,
        *,
        condition: int | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the log-density of x_t, in nats and float64; at time 0 that of the data."""
        time = self.schedule._check_time(time)
        if bool((self.eigenvalues == 0).any()) and bool((time == 0).any()):
            raise ValueError(
                "time must be positive where a covariance is singular: there is no density at 0"
            )
        return torch.logsumexp(self._components(x, time, condition)[-1], -1)

    def class_log_prob(
        self, x: Float[Tensor, " batch *event"], time: float | Tensor, label: int | Tensor
    ) -> Float[Tensor, " batch"]:
        """Return log p(label | x_t = x), the exact noisy classifier."""
        joint = self._components(x, self.schedule._check_time(time), None)[-1]
        of_label = joint.masked_fill(~self._members(label, x), -torch.inf)
        return torch.logsumexp(of_label, -1) - torch.logsumexp(joint, -1)

    def clean_variance(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        prediction: Prediction | None = None,
        condition: int | Tensor | None = None,
    ) -> Float[Tensor, " batch *event"]:
        """Return the diagonal of Cov[x_0 | x_t = x]; ``prediction`` is not needed."""
        time = self.schedule._check_time(time, positive=True)
        signal, noise, offset, variance, log_joint = self._components(x, time, condition)
        share = torch.softmax(log_joint, -1).unsqueeze(-1)
        mean = self._flat_means + signal * self._from_eigen(self.eigenvalues * offset / variance)
        within = (self.eigenvalues * noise**2 / variance).expand(mean.shape)
        if self.eigenvectors is not None:
            within = torch.einsum("bke,kde->bkd", within, self.eigenvectors**2)
        between = (mean - (share * mean).sum(1, keepdim=True)) ** 2
        return (share * (within + between)).sum(1).reshape(x.shape).to(x.dtype)

    def sample(
        self,
        num_samples: int,
        *,
        condition: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " num_samples *event"]:
        """Draw clean data: first the components, then the values."""
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}")
        device = self.means.device
        rows = torch.empty(num_samples, 1, device=device)
        weights = self._log_weights(condition, rows).exp().expand(num_samples, -1)
        uniform = torch.rand(
            num_samples, 1, dtype=torch.float64, device=device, generator=generator
        )
        chosen = torch.searchsorted(weights.cumsum(-1), uniform).squeeze(-1)
        chosen = chosen.clamp(max=len(self.means) - 1)
        normal = torch.randn(
            num_samples,
            self._flat_means.shape[-1],
            dtype=torch.float64,
            device=device,
            generator=generator,
        )
        value = self.eigenvalues[chosen].sqrt() * normal
        if self.eigenvectors is not None:
            value = torch.einsum("be,bde->bd", value, self.eigenvectors[chosen])
        value = self._flat_means[chosen] + value
        return value.reshape(num_samples, *self.means.shape[1:]).to(self.means.dtype)

    def extra_repr(self) -> str:
        return f"components={len(self.means)}, event={tuple(self.means.shape[1:])}"

    @property
    def _flat_means(self) -> Tensor:
        return self.means.double().reshape(len(self.means), -1)

    def _from_eigen(self, coordinates: Tensor) -> Tensor:
        if self.eigenvectors is None:
            return coordinates
        return torch.einsum("bke,kde->bkd", coordinates, self.eigenvectors)

    def _components(
        self, x: Tensor, time: Tensor, condition: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return ᾱ, β̄, then per component: x − ᾱm, its variances (both along the axes of the
        component) and the log joint density with x.
        """
        _check_state(x)
        if x.shape[1:] != self.means.shape[1:]:
            raise ValueError(
                f"x must have event shape {tuple(self.means.shape[1:])}, got {tuple(x.shape[1:])}"
            )
        means = self._flat_means
        flat = x.double().reshape(len(x), 1, means.shape[-1])
        signal, noise = (_over_event(s, flat) for s in self.schedule._scales(time))
        offset = flat - signal * means
        if self.eigenvectors is not None:
            offset = torch.einsum("bkd,kde->bke", offset, self.eigenvectors)
        variance = signal**2 * self.eigenvalues + noise**2
        log_density = -(offset**2 / variance + torch.log(2 * math.pi * variance)).sum(-1) / 2
        return signal, noise, offset, variance, self._log_weights(condition, x) + log_density

    def _log_weights(self, condition: int | Tensor | None, x: Tensor) -> Tensor:
        if condition is None:
            return self.log_weights.unsqueeze(0)
        chosen = self.log_weights.masked_fill(~self._members(condition, x), -torch.inf)
        return torch.log_softmax(chosen, -1)

    def _members(self, label: int | Tensor, x: Tensor) -> Tensor:
        """Which components carry the label, (batch or 1, components)."""
        if self.labels is None:
            raise ValueError("condition needs a mixture with labels, got one without")
        label = torch.as_tensor(label, device=self.labels.device)
        if label.is_floating_point() or label.shape not in ((), (1,), (len(x),)):
            raise ValueError(
                f"condition must be an integer label, one for all or one per example ({len(x)},), "
                f"got {label.dtype} {tuple(label.shape)}"
            )
        label = label.reshape(-1, 1)
        member = (self.labels == label) | (label == -1)
        if not bool(member.any(-1).all()):
            known = sorted(set(self.labels.tolist()))
            raise ValueError(
                f"condition must be -1 or one of {known}, got {label[~member.any(-1)][0].item()}"
            )
        return member


def _diagonalise(means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the variances of each component along its axes, and the axes where they are turned."""
    count, event = len(means), means.shape[1:]
    dimensions = math.prod(event)
    covariances = covariances.double()
    if not bool(torch.isfinite(covariances).all()):
        raise ValueError("covariances must be finite, got NaN or infinity")
    axes = None
    if covariances.shape == (count,):
        values = covariances.unsqueeze(-1).expand(count, dimensions)
    elif covariances.shape == means.shape:
        values = covariances.reshape(count, dimensions)
    elif covariances.shape == (count, dimensions, dimensions):
        if not torch.allclose(covariances, covariances.mT, atol=1e-12):
            raise ValueError("covariances must be symmetric, got a matrix that is not")
        values, axes = torch.linalg.eigh(covariances)
        # eigh of a singular matrix returns zeros as small numbers of either sign.
        tolerance = 1e-12 * values.abs().amax(-1, keepdim=True)
        values = torch.where(values.abs() <= tolerance, 0.0, values)
    else:
        raise ValueError(
            f"covariances must have shape ({count},), {tuple(means.shape)} or "
            f"({count}, {dimensions}, {dimensions}), got {tuple(covariances.shape)}"
        )
    if bool((values < 0).any()):
        raise ValueError(
            f"covariances must be positive semi-definite, got a variance of {values.min().item()}"
        )
    return values.contiguous(), axes


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
