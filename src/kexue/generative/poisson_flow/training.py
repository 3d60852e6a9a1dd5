"""What a network learns from: the normalised field, or the clean sample.

    v* = −√N (x − m_B, z) / (‖(x − m_B, z)‖ + γ),    L = E ‖v_θ(x, z) − v*‖²          (PFGM)
    L = E λ(σ) ‖m_θ(y + noise, σ) − y‖²,    λ = (σ² + s²)/(σ s)²                    (PFGM++)

The first normalises an average over a finite batch B, which is a biased estimate of the
normalised field: B must be large. The second has the exact posterior mean as its minimiser,
from pairs alone.

Source: https://arxiv.org/abs/2209.11178, https://arxiv.org/abs/2302.04265.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.poisson_flow.field import exact_field
from kexue.generative.poisson_flow.inputs import (
    check_augmented_dim,
    check_gamma,
    check_points,
    check_positive,
    check_same_sample,
    per_sample,
    working_dtype,
)
from kexue.generative.poisson_flow.noise import check_perturbation, perturb, student_t_noise

__all__ = ["FieldTarget", "PoissonFlowLoss", "PoissonFlowPlusLoss", "poisson_target"]


@dataclass(frozen=True)
class FieldTarget:
    """The normalised field that a network learns; it points towards the data.

    Attributes
    ----------
    x : Tensor, shape (batch, *sample)
        Its part along the data.
    z : Tensor, shape (batch,)
        Its part along the extra dimensions, never positive.

    Examples
    --------
    >>> target = poisson_target(torch.zeros(1, 2), 1.0, torch.ones(3, 2), gamma=0.0)
    >>> bool(target.z < 0)
    True
    """

    x: Float[Tensor, " batch *sample"]
    z: Float[Tensor, " batch"]


def poisson_target(
    x: Float[Tensor, " batch *sample"],
    z: Float[Tensor, " batch"] | Float[Tensor, ""] | float | None,
    data: Float[Tensor, " charges *sample"],
    *,
    gamma: float = 5.0,
    augmented_dim: float = 1.0,
    weights: Float[Tensor, " charges"] | None = None,
) -> FieldTarget:
    """Return the normalised field of the charges, −√N d/(‖d‖ + γ) with d = (x − m, z).

    Parameters
    ----------
    x : Tensor, shape (batch, *sample)
        Points.
    z : float or Tensor, shape () or (batch,)
        Distance to the data plane, positive; None where ``augmented_dim`` is 0.
    data : Tensor, shape (charges, *sample)
        Charges: the large batch, which must contain the samples that the points came from.
    gamma : float
        Keeps the target smooth near the data, at least 0.
    augmented_dim : float
        Number of extra dimensions, from 0, finite.
    weights : Tensor, shape (charges,), optional
        Charges, at least 0; equal by default.

    Returns
    -------
    FieldTarget
        In the dtype of x.

    Raises
    ------
    TypeError, ValueError
        As `poisson_field`, and for a negative ``gamma``.

    Examples
    --------
    >>> target = poisson_target(torch.tensor([[3.0]]), 4.0, torch.tensor([[0.0]]), gamma=0.0)
    >>> target.x, target.z
    (tensor([[-0.6000]]), tensor([-0.8000]))
    """
    check_gamma(gamma)
    displacement, height, _ = exact_field(x, z, data, augmented_dim=augmented_dim, weights=weights)
    flat = displacement.flatten(1)
    norm = torch.cat([flat, height[:, None]], 1).norm(dim=1)
    # On a charge without extra dimension, and gamma 0, there is no direction: 0.
    scale = -math.sqrt(flat.shape[1]) / (norm + gamma).clamp_min(torch.finfo(norm.dtype).tiny)
    return FieldTarget(
        (per_sample(scale, displacement) * displacement).to(x.dtype), (scale * height).to(x.dtype)
    )


class PoissonFlowLoss(nn.Module):
    """Loss of PFGM: regression on the normalised field of a large batch.

    Parameters
    ----------
    gamma : float
        Of the target, at least 0.
    sigma, tau, max_exponent, restrict_exponent : float
        Of `perturb`.

    Raises
    ------
    ValueError
        For parameters out of range.

    Examples
    --------
    >>> loss = PoissonFlowLoss()
    >>> big_batch = torch.randn(512, 2)
    >>> loss(lambda x, z: (-x, -z), big_batch[:128], big_batch).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        gamma: float = 5.0,
        sigma: float = 0.01,
        tau: float = 0.03,
        max_exponent: float = 291.0,
        restrict_exponent: float | None = None,
    ) -> None:
        super().__init__()
        check_gamma(gamma)
        check_perturbation(sigma, tau, max_exponent, restrict_exponent)
        self.gamma = gamma
        self.sigma = sigma
        self.tau = tau
        self.max_exponent = max_exponent
        self.restrict_exponent = restrict_exponent

    def forward(
        self,
        model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Float[Tensor, " batch *sample"],
        field_batch: Float[Tensor, " charges *sample"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over the batch of the squared error, summed over N + 1 components.

        ``model(x, z)`` gives (v_x, v_z) of shapes (batch, *sample) and (batch,). ``field_batch``
        is the large batch, which must contain x; x itself by default. The loss is in float32 at
        least.
        """
        _check_batch(x)
        field_batch = x if field_batch is None else field_batch
        check_same_sample(x, field_batch, "field_batch")
        with torch.no_grad():
            points = perturb(
                x,
                sigma=self.sigma,
                tau=self.tau,
                max_exponent=self.max_exponent,
                restrict_exponent=self.restrict_exponent,
                generator=generator,
            )
            wide = working_dtype(x.dtype)
            target = poisson_target(
                points.x.to(wide), points.z.to(wide), field_batch, gamma=self.gamma
            )
        v_x, v_z = model(points.x, points.z.to(working_dtype(x.dtype)))
        check_output(v_x, target.x, "v_x")
        check_output(v_z, target.z, "v_z")
        # The target's float32 makes sums of squares such: halves overflow.
        error_x = (v_x - target.x).flatten(1).square().sum(1)
        return (error_x + (v_z - target.z).square()).mean()

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, sigma={self.sigma}, tau={self.tau}, "
            f"max_exponent={self.max_exponent}, restrict_exponent={self.restrict_exponent}"
        )


class PoissonFlowPlusLoss(nn.Module):
    """Loss of PFGM++: a denoiser of Student t noise, weighted as in EDM; needs no large batch.

    Parameters
    ----------
    augmented_dim : float
        Number D of extra dimensions, positive; ``math.inf`` is diffusion.
    log_scale_mean, log_scale_std : float
        The scale σ of the noise is log-normal with these.
    data_std : float
        Standard deviation s of the data, positive.

    Raises
    ------
    ValueError
        For parameters out of range.

    Examples
    --------
    >>> loss = PoissonFlowPlusLoss(augmented_dim=128)
    >>> loss(lambda x, sigma: x / (1 + sigma[:, None] ** 2), torch.randn(16, 2)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        augmented_dim: float,
        log_scale_mean: float = -1.2,
        log_scale_std: float = 1.2,
        data_std: float = 0.5,
    ) -> None:
        super().__init__()
        check_augmented_dim(augmented_dim)
        check_positive(data_std, "data_std")
        if not math.isfinite(log_scale_mean) or not 0 <= log_scale_std < math.inf:
            raise ValueError(
                "log_scale_mean must be finite and log_scale_std at least 0, "
                f"got {log_scale_mean} and {log_scale_std}"
            )
        self.augmented_dim = augmented_dim
        self.log_scale_mean = log_scale_mean
        self.log_scale_std = log_scale_std
        self.data_std = data_std

    def forward(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        x: Float[Tensor, " batch *sample"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over the batch of λ(σ) ‖denoiser(x + noise, σ) − x‖².

        The loss is in float32 at least.
        """
        _check_batch(x)
        normal = torch.randn(len(x), dtype=torch.float64, device=x.device, generator=generator)
        sigma = (self.log_scale_mean + self.log_scale_std * normal).exp()
        noise = student_t_noise(
            x.shape,
            sigma,
            augmented_dim=self.augmented_dim,
            generator=generator,
            dtype=x.dtype,
            device=x.device,
        )
        clean = denoiser(x + noise, sigma.to(working_dtype(x.dtype)))
        check_output(clean, x, "the denoiser's output")
        weight = (sigma.square() + self.data_std**2) / (sigma * self.data_std).square()
        # Summed in float32 at least: halves overflow.
        error = (clean - x.to(working_dtype(x.dtype))).flatten(1).square().sum(1)
        return (weight.to(error.dtype) * error).mean()

    def extra_repr(self) -> str:
        return (
            f"augmented_dim={self.augmented_dim}, log_scale_mean={self.log_scale_mean}, "
            f"log_scale_std={self.log_scale_std}, data_std={self.data_std}"
        )


def _check_batch(x: Tensor) -> None:
    check_points(x, "x")
    if not x.numel():
        raise ValueError(f"x must hold at least one sample, got none: {tuple(x.shape)}")


def check_output(output: Tensor, like: Tensor, name: str) -> None:
    """Refuse the output of a network that would broadcast instead of fit."""
    if output.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(output.shape)}")
