"""What Poisson flow draws: Student t noise, the prior on a far plane, points near the data.

    x = σ √D g / √χ²_D,    g ~ N(0, I):    r²/(σ² D) ~ BetaPrime(N/2, D/2)

The plane at distance z sees the field lines of one far charge: a Student t distribution with D
degrees of freedom and scale σ = z/√D. For D = 1 it is a Cauchy distribution, without mean and
without variance: look at its quantiles.

Source: https://arxiv.org/abs/2209.11178, https://arxiv.org/abs/2302.04265.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.poisson_flow.field import log_student_constant, log_student_kernel
from kexue.generative.poisson_flow.inputs import (
    check_augmented_dim,
    check_points,
    check_positive,
    heights,
    per_sample,
)

__all__ = ["PerturbedSample", "perturb", "prior_log_density", "sample_prior", "student_t_noise"]


def student_t_noise(
    shape: Sequence[int],
    scale: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    *,
    augmented_dim: float,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, " batch *sample"]:
    """Return noise from the multivariate Student t distribution, one radius for each sample.

    Tails are heavy and nothing is clipped.

    Parameters
    ----------
    shape : sequence of int
        (batch, *sample).
    scale : float or Tensor, shape () or (batch,)
        Scale σ = z/√D, positive: the standard deviation where D is infinite.
    augmented_dim : float
        Degrees of freedom D, positive; ``math.inf`` for normal noise.
    generator : torch.Generator, optional
        Source of randomness, on ``device``.
    dtype, device : optional
        Of the result; torch's defaults, or the device of a scale that is a tensor. Drawn in
        float64, then cast.

    Returns
    -------
    Tensor, shape (batch, *sample)
        Noise.

    Raises
    ------
    ValueError
        For a scale or D that is not positive, or a shape without batch and sample.
    TypeError
        For a scale, or a dtype, that is not floating point.

    Examples
    --------
    >>> noise = student_t_noise(
    ...     (1000, 64), 1.0, augmented_dim=128, generator=torch.Generator().manual_seed(0)
    ... )
    >>> noise.std()
    tensor(1.0088)
    """
    check_augmented_dim(augmented_dim)
    batch = _check_shape(shape)
    dtype = real_dtype(dtype)
    if device is None:
        device = scale.device if isinstance(scale, Tensor) else torch.get_default_device()
    scales = heights(scale, batch, torch.device(device), "scale")
    noise = torch.randn(tuple(shape), dtype=torch.float64, device=device, generator=generator)
    if not math.isinf(augmented_dim):
        half = torch.full((batch,), augmented_dim / 2, dtype=torch.float64, device=device)
        # A χ² variable with D degrees of freedom is twice a Gamma(D/2) variable.
        scales = scales * (half / torch._standard_gamma(half, generator=generator)).sqrt()
    return (per_sample(scales, noise) * noise).to(dtype)


def sample_prior(
    shape: Sequence[int],
    z_max: float,
    *,
    augmented_dim: float = 1.0,
    max_norm: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, " batch *sample"]:
    """Return points where field lines of one far charge at 0 meet the plane z = z_max.

    Parameters
    ----------
    shape : sequence of int
        (batch, *sample).
    z_max : float
        Distance of the plane, positive; the standard deviation where D is infinite.
    augmented_dim : float
        Number D of extra dimensions, positive, up to ``math.inf``.
    max_norm : float, optional
        Samples of a larger norm are scaled to it, not drawn again.
    generator : torch.Generator, optional
        Source of randomness, on ``device``.
    dtype, device : optional
        Of the result.

    Returns
    -------
    Tensor, shape (batch, *sample)
        The prior's samples; direction uniform, r²/z_max² ~ BetaPrime(N/2, D/2).

    Raises
    ------
    ValueError
        For ``z_max``, D or ``max_norm`` that are not positive, or a shape without batch and sample.
    TypeError
        For a dtype that is not floating point.

    Examples
    --------
    >>> x = sample_prior((10_000, 2), 40.0, generator=torch.Generator().manual_seed(0))
    >>> median = (x.norm(dim=1) / 40.0).median()  # the law says √3
    >>> bool((median - 3**0.5).abs() < 0.1)
    True
    """
    check_augmented_dim(augmented_dim)
    check_positive(z_max, "z_max")
    if max_norm is not None:
        check_positive(max_norm, "max_norm")
    x = student_t_noise(
        shape,
        scale_from_height(z_max, augmented_dim),
        augmented_dim=augmented_dim,
        generator=generator,
        dtype=torch.float64,
        device=device,
    )
    if max_norm is not None:
        x = _bounded(x, max_norm)
    return x.to(real_dtype(dtype))


def scale_from_height(z: float, augmented_dim: float) -> float:
    """Return σ = z/√D; for infinite D the height is σ itself."""
    return z if math.isinf(augmented_dim) else z / math.sqrt(augmented_dim)


def prior_log_density(
    x: Float[Tensor, " batch *sample"],
    z: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    *,
    augmented_dim: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Return the log-density of the prior on the plane at distance z.

    Parameters
    ----------
    x : Tensor, shape (batch, *sample)
        Points.
    z : float or Tensor, shape () or (batch,)
        Distance of the plane, positive; the standard deviation where D is infinite.
    augmented_dim : float
        Degrees of freedom D, positive, up to ``math.inf``.

    Returns
    -------
    Tensor, shape (batch,)
        In nats, in the dtype of x.

    Raises
    ------
    TypeError
        For anything but floating point tensors.
    ValueError
        For NaN, infinity, or z or D that is not positive.

    Examples
    --------
    >>> prior_log_density(torch.tensor([[1.0, 2.0, 3.0]]), 40.0)
    tensor([-13.3735])
    """
    check_augmented_dim(augmented_dim)
    check_points(x, "x")
    height = heights(z, len(x), x.device)
    flat = x.flatten(1)
    relative = flat.double().square().sum(1) / height.square()
    kernel = log_student_kernel(relative, flat.shape[1], augmented_dim)
    return (kernel + log_student_constant(flat.shape[1], height, augmented_dim)).to(x.dtype)


@dataclass(frozen=True)
class PerturbedSample:
    """Points near the data at which a network learns the field.

    Attributes
    ----------
    x : Tensor, shape (batch, *sample)
        Positions.
    z : Tensor, shape (batch,)
        Distances to the data plane, positive.

    Examples
    --------
    >>> perturb(torch.zeros(4, 2)).z.shape
    torch.Size([4])
    """

    x: Float[Tensor, " batch *sample"]
    z: Float[Tensor, " batch"]


def perturb(
    x: Float[Tensor, " batch *sample"],
    *,
    sigma: float = 0.01,
    tau: float = 0.03,
    max_exponent: float = 291.0,
    restrict_exponent: float | None = None,
    generator: torch.Generator | None = None,
) -> PerturbedSample:
    """Return a point at a random distance from each sample, near ones as likely as far ones.

        x + ‖e_x‖ (1+τ)^k u,    z = abs(e_z) (1+τ)^k,    (e_x, e_z) ~ N(0, σ² I_{N+1}),  k ~ U[0, M]

    with a direction u that is uniform and independent of e_x.

    Parameters
    ----------
    x : Tensor, shape (batch, *sample)
        Data.
    sigma, tau, max_exponent : float
        σ, τ and M; σ and 1 + τ positive, M at least 0.
    restrict_exponent : float, optional
        Share of [0, M], in [0, 1], from which k is drawn where abs(e_z) < σ/2 (0.7 in PFGM).
    generator : torch.Generator, optional
        Source of randomness, on the device of x.

    Returns
    -------
    PerturbedSample
        In the dtype of x.

    Raises
    ------
    TypeError
        Where x is no floating point tensor.
    ValueError
        For NaN or infinity in x, and parameters out of range.

    Examples
    --------
    >>> near = perturb(torch.zeros(1000, 64), generator=torch.Generator().manual_seed(0))
    >>> bool((near.z > 0).all())
    True
    """
    check_points(x, "x")
    check_perturbation(sigma, tau, max_exponent, restrict_exponent)
    batch, device = len(x), x.device
    # One Gamma variable instead of the N normal ones of e_x, of which only the norm matters.
    half = torch.full((batch,), x.flatten(1).shape[1] / 2, dtype=torch.float64, device=device)
    norm_x = sigma * (2 * torch._standard_gamma(half, generator=generator)).sqrt()
    height = (
        sigma * torch.randn(batch, generator=generator, dtype=torch.float64, device=device).abs()
    )
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=device)
    direction = direction / per_sample(direction.flatten(1).norm(dim=1), direction)

    exponent = max_exponent * torch.rand(
        batch, generator=generator, dtype=torch.float64, device=device
    )
    if restrict_exponent is not None:
        exponent = torch.where(height < sigma / 2, restrict_exponent * exponent, exponent)
    growth = (1 + tau) ** exponent
    z = (height * growth).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
    moved = x.double() + per_sample(norm_x * growth, x) * direction
    return PerturbedSample(moved.to(x.dtype), z)


def check_perturbation(
    sigma: float, tau: float, max_exponent: float, restrict_exponent: float | None
) -> None:
    check_positive(sigma, "sigma")
    check_positive(1 + tau, "1 + tau")
    if not 0 <= max_exponent < math.inf:
        raise ValueError(f"max_exponent must be at least 0 and finite, got {max_exponent}")
    if restrict_exponent is not None and not 0 <= restrict_exponent <= 1:
        raise ValueError(f"restrict_exponent must be a share in [0, 1], got {restrict_exponent}")


def _bounded(x: Tensor, max_norm: float) -> Tensor:
    """Scale the samples of a larger norm to this one."""
    # In units of the largest entry, whose square may be too large for a number.
    peak = x.flatten(1).abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny)
    unit = x / per_sample(peak, x)
    norm = torch.linalg.vector_norm(unit.flatten(1), dim=1)
    longer = norm > max_norm / peak
    return torch.where(per_sample(longer, x), unit * per_sample(max_norm / norm, x), x)


def _check_shape(shape: Sequence[int]) -> int:
    if len(shape) < 2 or min(shape) < 0 or 0 in tuple(shape)[1:]:
        raise ValueError(f"shape must be (batch, *sample) with sizes above 0, got {tuple(shape)}")
    return int(shape[0])


def real_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    return dtype
