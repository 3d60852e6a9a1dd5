"""The exact denoiser of a mixture of Gaussians: what a network could learn at best."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.prediction import Prediction, _check_state
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _over_event

__all__ = ["GaussianMixtureDenoiser"]


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
