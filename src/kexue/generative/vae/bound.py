"""Importance weights, the bound of their average, and the loss that raises it.

    w_i = q(x|z_i) q(z_i) / p(z_i|x),  z_i ~ p(z|x),      L_M = E log (1/M) Σ w_i ≤ log q(x)

L_1 is the usual evidence lower bound. Each weight is computed in the precision of the model, sums
over entries and over samples are float64: what differs between models is a nat in thousands.

Source: https://arxiv.org/abs/1509.00519 (importance-weighted bound), https://arxiv.org/abs/1810.04152
(doubly reparameterised gradient).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, MultivariateNormal, Normal

from kexue.generative.vae.likelihood import _check_generator, _check_real, _Discretized
from kexue.generative.vae.models import LatentVariableModel, _at_least_single, _independent

__all__ = [
    "importance_weighted_bound",
    "log_importance_weights",
    "reparameterized_sample",
    "vae_loss",
]


def reparameterized_sample(
    distribution: Distribution,
    sample_shape: Sequence[int] = (),
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Draw from a normal distribution with gradient, as ``rsample`` does, from a given generator.

    Parameters
    ----------
    distribution : Normal, MultivariateNormal, or Independent of one of them
        What to draw from.
    sample_shape : sequence of int
        Shape of the sample, in front of the distribution's own.
    generator : torch.Generator, optional
        Source of randomness, on the distribution's device.

    Returns
    -------
    Tensor, shape (*sample_shape, *batch_shape, *event_shape)
        In the dtype of the mean.

    Raises
    ------
    TypeError
        For any other distribution.
    ValueError
        For a generator on another device.

    Examples
    --------
    >>> from torch.distributions import Normal
    >>> generator = torch.Generator().manual_seed(0)
    >>> draws = reparameterized_sample(Normal(torch.zeros(3), 0.1), (5,), generator=generator)
    >>> draws.shape
    torch.Size([5, 3])
    """
    normal = _base(distribution)
    if not isinstance(normal, Normal | MultivariateNormal):
        raise TypeError(
            "the distribution must be Normal or MultivariateNormal, or Independent of one, "
            f"got {type(normal).__name__}"
        )
    _check_generator(generator, normal.loc)
    shape = torch.Size(sample_shape) + normal.batch_shape + normal.event_shape
    mean = _at_least_single(normal.loc)
    noise = torch.randn(shape, dtype=mean.dtype, device=mean.device, generator=generator)
    if isinstance(normal, MultivariateNormal):
        deviation = (_root(normal).to(mean.dtype) @ noise.unsqueeze(-1)).squeeze(-1)
    else:
        deviation = normal.scale * noise
    return (mean + deviation).to(normal.loc.dtype)


def log_importance_weights(
    model: LatentVariableModel,
    x: Float[Tensor, " batch *event"],
    num_samples: int,
    *,
    proposal: Literal["encoder", "prior"] = "encoder",
    proposal_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float64[Tensor, "num_samples batch"]:
    """Return log q(x|z) + log q(z) − log p(z|x) for draws z of the proposal.

    The average of the weights is q(x), in expectation. Where the proposal is the posterior all
    weights are equal to it; where it is narrower their variance may be infinite.

    Parameters
    ----------
    model : LatentVariableModel
        Prior, proposal and likelihood.
    x : Tensor, shape (batch, *event)
        Examples.
    num_samples : int
        Draws M for each.
    proposal : {"encoder", "prior"}
        The model's proposal, or its prior, which is aimless beyond a few dimensions.
    proposal_scale : float
        Factor of the proposal's standard deviation. Above 1 the bound is looser and the variance
        of the weights may become finite.
    generator : torch.Generator, optional
        Source of randomness, on the device of x.

    Returns
    -------
    Tensor, shape (num_samples, batch)
        Float64; differentiable in all parameters.

    Raises
    ------
    ValueError
        For ``num_samples`` below 1, an unknown proposal, a scale that is not positive, data that
        the likelihood cannot produce, shapes that do not fit, a generator on another device.
    TypeError
        For a model without these three methods, or a proposal that is no normal distribution.

    Examples
    --------
    Weights of the exact posterior do not vary:

    >>> from kexue.generative.vae import LinearGaussianModel
    >>> model = LinearGaussianModel(torch.tensor([[2.0], [0.0]]), torch.zeros(2), 1.0)
    >>> log_importance_weights(model, torch.zeros(1, 2), 3).squeeze(1)
    tensor([-2.6426, -2.6426, -2.6426], dtype=torch.float64)
    """
    _check_model(model)
    _check_examples(x)
    _check_generator(generator, x)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    chosen = _proposal(model, x, proposal, proposal_scale)
    latent = reparameterized_sample(chosen, (num_samples,), generator=generator)
    return _log_joint(model, x, latent) - _log_prob(chosen, latent)


def importance_weighted_bound(
    log_weights: Float[Tensor, "..."], *, dim: int = 0
) -> Float64[Tensor, "..."]:
    """Return log of the mean weight: logsumexp(log w) − log M.

    Parameters
    ----------
    log_weights : Tensor
        Logarithms of importance weights.
    dim : int
        Dimension that the samples lie along.

    Returns
    -------
    Tensor
        Float64, without that dimension.

    Raises
    ------
    ValueError
        For a tensor that is not real, or has no sample.

    Examples
    --------
    >>> importance_weighted_bound(torch.tensor([-1.0, -2.0, -4.0, 0.5]))
    tensor(-0.6115, dtype=torch.float64)
    """
    _check_real(log_weights, "log_weights")
    if log_weights.ndim < 1 or log_weights.shape[dim] < 1:
        raise ValueError(
            f"log_weights must have samples along dimension {dim}, "
            f"got shape {tuple(log_weights.shape)}"
        )
    return torch.logsumexp(log_weights.double(), dim) - math.log(log_weights.shape[dim])


def vae_loss(
    model: LatentVariableModel,
    x: Float[Tensor, " batch *event"],
    *,
    num_samples: int = 1,
    objective: Literal["importance_weighted", "elbo"] = "importance_weighted",
    gradient: Literal["reparameterized", "doubly_reparameterized"] = "reparameterized",
    generator: torch.Generator | None = None,
) -> Float64[Tensor, ""]:
    """Return the negative bound on the log-likelihood, in nats, averaged over the batch.

    One sample is the loss of the ordinary autoencoder, with either objective.

    Parameters
    ----------
    model : LatentVariableModel
        What is trained.
    x : Tensor, shape (batch, *event)
        Examples.
    num_samples : int
        Draws M for each.
    objective : {"importance_weighted", "elbo"}
        The log of the mean weight, or the mean of the log weights.
    gradient : {"reparameterized", "doubly_reparameterized"}
        How the proposal's parameters get theirs. The second has the same expectation and less
        variance, down to zero where the proposal is the posterior. Parameters that the proposal
        shares with the likelihood must use the first. The value is the same.
    generator : torch.Generator, optional
        Source of randomness, on the device of x.

    Returns
    -------
    Tensor, shape ()
        Float64. NaN for an empty batch, as with other mean losses of torch.

    Raises
    ------
    ValueError
        For an unknown objective or gradient, and what `log_importance_weights` refuses.
    TypeError
        As there.

    Examples
    --------
    >>> from torch import nn
    >>> from kexue.generative.vae import VariationalAutoencoder
    >>> model = VariationalAutoencoder(nn.Linear(5, 4), nn.Linear(2, 10), 2)
    >>> loss = vae_loss(model, torch.randn(64, 5), num_samples=8)
    >>> loss.backward()
    """
    if objective not in ("importance_weighted", "elbo"):
        raise ValueError(f"objective must be one of importance_weighted, elbo, got {objective!r}")
    if gradient not in ("reparameterized", "doubly_reparameterized"):
        raise ValueError(
            f"gradient must be one of reparameterized, doubly_reparameterized, got {gradient!r}"
        )
    if gradient == "doubly_reparameterized":
        return -_doubly_reparameterized(model, x, num_samples, objective, generator).mean()
    log_weights = log_importance_weights(model, x, num_samples, generator=generator)
    return -_combine(log_weights, objective).mean()


def _combine(log_weights: Tensor, objective: str) -> Tensor:
    if objective == "elbo":
        return log_weights.mean(0)
    return importance_weighted_bound(log_weights)


def _doubly_reparameterized(
    model: LatentVariableModel,
    x: Tensor,
    num_samples: int,
    objective: str,
    generator: torch.Generator | None,
) -> Tensor:
    """The bound, whose gradient reaches the proposal through the samples only.

    The decoder's gradient is Σ w̃_i ∂log w_i, the encoder's Σ w̃_i² ∂log w_i/∂z_i ∂z_i: what comes
    back to a sample is multiplied by its normalised weight a second time.
    """
    _check_model(model)
    _check_examples(x)
    _check_generator(generator, x)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    chosen = _proposal(model, x, "encoder", 1.0)
    latent = reparameterized_sample(chosen, (num_samples,), generator=generator)
    if objective == "elbo":
        return (_log_joint(model, x, latent) - _log_prob(_detached(chosen), latent)).mean(0)
    log_weights = _log_joint(model, x, latent) - _log_prob(_detached(chosen), latent)
    normalized = log_weights.detach().softmax(0).to(latent.dtype)
    if latent.requires_grad:
        latent.register_hook(lambda arriving: arriving * normalized.unsqueeze(-1))
    return importance_weighted_bound(log_weights)


def _proposal(
    model: LatentVariableModel, x: Tensor, kind: str, scale: float
) -> MultivariateNormal | Independent:
    """Return the normal distribution to draw from, one for each example."""
    if kind not in ("encoder", "prior"):
        raise ValueError(f"proposal must be one of encoder, prior, got {kind!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"proposal_scale must be positive, got {scale}")
    chosen = model.proposal(x) if kind == "encoder" else model.prior().expand((len(x),))
    normal = _base(chosen)
    if not isinstance(normal, Normal | MultivariateNormal):
        raise TypeError(
            "the model's proposal and prior must be Normal or MultivariateNormal, or Independent "
            f"of one, got {type(normal).__name__}"
        )
    if chosen.batch_shape != x.shape[:1] or len(chosen.event_shape) != 1:
        raise ValueError(
            f"the {kind}'s distribution must have batch shape ({len(x)},) and an event shape "
            f"(latent_dim,), got {tuple(chosen.batch_shape)} and {tuple(chosen.event_shape)}"
        )
    if isinstance(normal, MultivariateNormal):
        return _multivariate(normal.loc, scale * _root(normal))
    return _independent(Normal(normal.loc, scale * normal.scale, validate_args=False), 1)


def _detached(chosen: MultivariateNormal | Independent) -> Distribution:
    """Return the same normal distribution as a constant."""
    if isinstance(chosen, MultivariateNormal):
        return _multivariate(chosen.loc.detach(), _root(chosen).detach())
    normal = chosen.base_dist
    constant = Normal(normal.loc.detach(), normal.scale.detach(), validate_args=False)
    return _independent(constant, 1)


def _log_joint(
    model: LatentVariableModel, x: Tensor, latent: Tensor, *, check: bool = True
) -> Tensor:
    """Return log q(x|z) + log q(z); x is checked against the likelihood unless it was before."""
    likelihood = model.likelihood(latent)
    if check:
        _check_likelihood(likelihood, x, latent)
        _check_support(likelihood, x)
    return _log_prob(likelihood, x) + _log_prob(model.prior(), latent)


def _log_prob(distribution: Distribution, value: Tensor) -> Tensor:
    """Return the log-density of whole events: entries in float32 at least, added in float64.

    Normal and Bernoulli distributions are taken without torch's check of the value, which would
    let one NaN stop a whole batch.
    """
    base, event_dims = _base(distribution), _reinterpreted(distribution)
    value = _at_least_single(value)
    if isinstance(base, Normal):
        return _normal_log_prob(base, value, event_dims)
    if isinstance(base, MultivariateNormal):
        base = _multivariate(_at_least_single(base.loc), _at_least_single(_root(base)))
    elif isinstance(base, Bernoulli):
        base = Bernoulli(logits=_at_least_single(base.logits), validate_args=False)
    return _sum(base.log_prob(value), event_dims)


def _normal_log_prob(normal: Normal, value: Tensor, event_dims: int) -> Tensor:
    """Return −½ Σ ((x − μ)/s)² − Σ log s − d/2 log 2π, in half the passes of torch's own.

    A scale that is the same for many entries is expanded, not copied: its logarithm is taken once.
    """
    scale = normal.scale
    for dim, stride in enumerate(scale.stride()):
        if stride == 0 and scale.shape[dim] > 1:
            scale = scale.narrow(dim, 0, 1)
    scale = _at_least_single(scale)
    first = scale.ndim - event_dims
    count = normal.scale.shape[first:].numel()
    repeats = count // max(1, scale.shape[first:].numel())
    squares = ((value - _at_least_single(normal.loc)) / scale).square()
    return (
        -_sum(squares, event_dims) / 2
        - repeats * _sum(scale.log(), event_dims)
        - count * math.log(2 * math.pi) / 2
    )


def _sum(entries: Tensor, event_dims: int) -> Tensor:
    if not event_dims:
        return entries.double()
    return entries.sum(tuple(range(-event_dims, 0)), dtype=torch.float64)


def _multivariate(mean: Tensor, root: Tensor) -> MultivariateNormal:
    return MultivariateNormal(mean, scale_tril=root, validate_args=False)


def _root(normal: MultivariateNormal) -> Tensor:
    """Return the Cholesky factor as it was given: one for a batch need not be copied."""
    return normal._unbroadcasted_scale_tril


def _base(distribution: Distribution) -> Distribution:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _reinterpreted(distribution: Distribution) -> int:
    """Return how many batch dimensions of the base are entries of one event."""
    count = 0
    while isinstance(distribution, Independent):
        count += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    return count


def _check_model(model: object) -> None:
    for method in ("prior", "proposal", "likelihood"):
        if not hasattr(model, method):
            raise TypeError(
                f"the model must have methods prior, proposal and likelihood, "
                f"got {type(model).__name__} without {method}"
            )


def _check_examples(x: Tensor) -> None:
    _check_real(x, "x")
    if x.ndim < 1:
        raise ValueError("x must have shape (batch, *event), got a single number")


def _check_likelihood(likelihood: Distribution, x: Tensor, latent: Tensor) -> None:
    if likelihood.batch_shape != latent.shape[:-1] or likelihood.event_shape != x.shape[1:]:
        raise ValueError(
            f"the likelihood of latent points {tuple(latent.shape)} must have batch shape "
            f"{tuple(latent.shape[:-1])} and the event shape of x, {tuple(x.shape[1:])}, "
            f"got {tuple(likelihood.batch_shape)} and {tuple(likelihood.event_shape)}"
        )


def _check_support(likelihood: Distribution, x: Tensor) -> None:
    """Refuse data that the likelihood cannot produce; NaN passes, and stays in its row."""
    base = _base(likelihood)
    if isinstance(base, _Discretized):
        base._check_on_grid(x, base._level(x))
    elif isinstance(base, Bernoulli):
        outside = (x != 0) & (x != 1) & ~x.isnan()
        if bool(outside.any()):
            raise ValueError(
                f"x must be 0 or 1 for a Bernoulli likelihood, got {x[outside][0].item()}"
            )
