"""Latent-variable models: prior q(z), likelihood q(x|z), and a proposal p(z|x) for where to look.

    q(x) = ∫ q(x|z) q(z) dz = E_{z ~ p(z|x)} [q(x|z) q(z) / p(z|x)]

The proposal is an importance sampler, whatever it was trained for. `LinearGaussianModel` knows all
of its integrals, so it is what the estimators are checked against.

Source: https://arxiv.org/abs/1312.6114; Tipping and Bishop, "Probabilistic principal component
analysis", JRSS B 61 (1999), for the linear model.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
)

from kexue.generative.vae.likelihood import (
    DiscretizedLogistic,
    DiscretizedNormal,
    _check_real,
    _last_level,
)

__all__ = ["LatentVariableModel", "LinearGaussianModel", "VariationalAutoencoder"]

Likelihood = Literal["normal", "bernoulli", "discretized_normal", "discretized_logistic"]
_DISCRETIZED = {
    "discretized_normal": DiscretizedNormal,
    "discretized_logistic": DiscretizedLogistic,
}


@runtime_checkable
class LatentVariableModel(Protocol):
    """What the losses and estimators ask of a model; any object with these methods will do."""

    def prior(self) -> Distribution:
        """Return q(z): no batch, event (latent_dim,)."""

    def proposal(self, x: Tensor) -> Distribution:
        """Return p(z|x), normal or multivariate normal: batch (batch,), event (latent_dim,)."""

    def likelihood(self, latent: Tensor) -> Distribution:
        """Return q(x|z): batch ``latent.shape[:-1]``, event that of an example."""


class VariationalAutoencoder(nn.Module):
    """Two networks: an encoder that proposes latent variables, a decoder that explains the data.

    The prior is N(0, I), the proposal normal with diagonal covariance. Distributions are float32 at
    least, also where the networks are half precision. They do not validate their arguments, so
    that NaN stays in its row and a GPU need not wait; the losses and estimators check once whether
    the data can have come from the likelihood.

    Parameters
    ----------
    encoder : nn.Module
        Maps x to ``(batch, 2 * latent_dim)``: mean and log standard deviation, in this order.
    decoder : nn.Module
        Maps ``(n, latent_dim)`` to ``(n, C, ...)``. Without ``scale``, the two halves along
        dimension 1 are location and log scale; with it, the output is the location. For
        "bernoulli" it is the logit.
    latent_dim : int
        Number of latent variables.
    likelihood : {"normal", "bernoulli", "discretized_normal", "discretized_logistic"}
        Distribution of every entry of x, independent given z.
    scale : float or Tensor, optional
        Fixed scale, broadcast against an example.
    bin_width, low, high : float, optional
        The grid of a discretised likelihood, which must have them; others do not use them.

    Raises
    ------
    ValueError
        For an unknown likelihood, a scale or grid that is none, an input that does not fit, or
        networks whose output has another width.

    Examples
    --------
    >>> encoder, decoder = nn.Linear(5, 4), nn.Linear(2, 10)
    >>> model = VariationalAutoencoder(encoder, decoder, 2)
    >>> latent = torch.randn(7, 3, 2)
    >>> model.likelihood(latent).batch_shape, model.likelihood(latent).event_shape
    (torch.Size([7, 3]), torch.Size([5]))
    """

    scale: Tensor | None
    _origin: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        *,
        likelihood: Likelihood = "normal",
        scale: float | Tensor | None = None,
        bin_width: float | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in get_args(Likelihood):
            raise ValueError(
                f"likelihood must be one of {', '.join(get_args(Likelihood))}, got {likelihood!r}"
            )
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        # Where the networks are, and in their precision.
        parameters = (p for part in (decoder, encoder) for p in part.parameters())
        first = next((p for p in parameters if p.is_floating_point()), torch.zeros(0))
        if scale is not None:
            if likelihood == "bernoulli":
                raise ValueError(f"scale has no meaning for a bernoulli likelihood, got {scale}")
            scale = _scale_of(scale, first)
        self._grid: dict[str, float] = {}
        if likelihood in _DISCRETIZED:
            if bin_width is None or low is None or high is None:
                raise ValueError(
                    f"likelihood {likelihood!r} needs bin_width, low and high, "
                    f"got {bin_width}, {low} and {high}"
                )
            _last_level(bin_width, low, high)
            self._grid = {"bin_width": bin_width, "low": low, "high": high}
        self.encoder, self.decoder = encoder, decoder
        self.latent_dim = latent_dim
        self.likelihood_kind = likelihood
        self.register_buffer("scale", scale)
        # Not part of the state: it only says where, and in which precision, the model lives.
        self.register_buffer("_origin", first.new_zeros(latent_dim), persistent=False)

    def prior(self) -> Independent:
        """Return N(0, I)."""
        origin = _at_least_single(self._origin)
        return _independent(Normal(origin, torch.ones_like(origin), validate_args=False), 1)

    def proposal(self, x: Float[Tensor, " batch *event"]) -> Independent:
        """Return the encoder's normal distribution for every example."""
        parameters = self.encoder(x.to(_dtype(self.encoder, x.dtype)))
        if parameters.shape != (len(x), 2 * self.latent_dim):
            raise ValueError(
                f"the encoder's output must have shape (batch, 2*latent_dim) = "
                f"({len(x)}, {2 * self.latent_dim}), got {tuple(parameters.shape)}"
            )
        mean, log_deviation = _at_least_single(parameters).chunk(2, dim=1)
        return _independent(Normal(mean, log_deviation.exp(), validate_args=False), 1)

    def likelihood(self, latent: Float[Tensor, "*batch latent_dim"]) -> Independent:
        """Return the decoder's distribution of x for every latent point."""
        _check_real(latent, "latent")
        if latent.ndim < 1 or latent.shape[-1] != self.latent_dim:
            raise ValueError(
                f"latent must have shape (..., {self.latent_dim}), got {tuple(latent.shape)}"
            )
        batch = latent.shape[:-1]
        flat = latent.reshape(math.prod(batch), self.latent_dim)
        output = _at_least_single(self.decoder(flat.to(_dtype(self.decoder, flat.dtype))))
        if output.ndim < 2 or len(output) != len(flat):
            raise ValueError(
                f"the decoder's output must have shape ({len(flat)}, C, ...), "
                f"got {tuple(output.shape)}"
            )
        entries = self._entries(output, batch)
        return _independent(entries, len(entries.batch_shape) - len(batch))

    def _entries(self, output: Tensor, batch: torch.Size) -> Distribution:
        """Return the distribution of single entries that the decoder's output stands for."""

        def restored(values: Tensor) -> Tensor:
            return values.reshape(*batch, *values.shape[1:])

        if self.likelihood_kind == "bernoulli":
            return Bernoulli(logits=restored(output), validate_args=False)
        if self.scale is not None:
            location, scale = restored(output), _at_least_single(self.scale)
        elif output.shape[1] % 2 == 0:
            location, log_scale = map(restored, output.chunk(2, dim=1))
            scale = log_scale.exp()
        else:
            raise ValueError(
                "the decoder's output must halve along dimension 1 into location and log scale, "
                f"got shape {tuple(output.shape)}"
            )
        if self.likelihood_kind == "normal":
            return Normal(location, scale, validate_args=False)
        kind = _DISCRETIZED[self.likelihood_kind]
        return kind(location, scale, **self._grid, validate_args=False)


class LinearGaussianModel(nn.Module):
    """Probabilistic principal component analysis: x = Wz + b + noise, everything in closed form.

    The marginal is N(b, WWᵀ + s²I), the posterior has precision P = I + WᵀW/s².

    Parameters
    ----------
    weight : Tensor, shape (observed, latent)
        The matrix W.
    bias : Tensor, shape (observed,)
        The mean of x.
    noise_variance : float
        The variance s².
    proposal : {"exact", "diagonal"}
        The posterior, or the normal distribution with independent entries that is nearest to it:
        same mean, variances 1/diag(P).

    Attributes
    ----------
    weight, bias : Tensor
        As given; buffers.
    noise_variance : float

    Raises
    ------
    ValueError
        For shapes that do not fit, a noise variance that is not positive, an unknown proposal.

    Examples
    --------
    >>> model = LinearGaussianModel(torch.tensor([[2.0], [0.0]]), torch.zeros(2), 1.0)
    >>> model.log_prob(torch.zeros(1, 2))
    tensor([-2.6426])
    >>> model.posterior(torch.tensor([[5.0, 0.0]])).mean
    tensor([[2.]])
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "observed latent"],
        bias: Float[Tensor, " observed"],
        noise_variance: float,
        *,
        proposal: Literal["exact", "diagonal"] = "exact",
    ) -> None:
        super().__init__()
        _check_real(weight, "weight")
        _check_real(bias, "bias")
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                "weight and bias must have shapes (observed, latent) and (observed,), "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not 0 < noise_variance < math.inf:
            raise ValueError(f"noise_variance must be positive, got {noise_variance}")
        if proposal not in ("exact", "diagonal"):
            raise ValueError(f"proposal must be one of exact, diagonal, got {proposal!r}")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.noise_variance = float(noise_variance)
        self._proposes_exactly = proposal == "exact"

    @classmethod
    def fit(
        cls, x: Float[Tensor, "samples observed"], latent_dim: int, **kw: Any
    ) -> LinearGaussianModel:
        """Return the model of maximum likelihood: W = U_k (Λ_k − s²I)^½.

        The noise variance s² is the mean of the other eigenvalues.

        Parameters
        ----------
        x : Tensor, shape (samples, observed)
            Data, whose covariance with the factor 1/samples has eigenvalues Λ.
        latent_dim : int
            Number k of latent variables, smaller than the number of observed ones.
        **kw
            Passed on, such as ``proposal``.

        Returns
        -------
        LinearGaussianModel

        Raises
        ------
        ValueError
            For k out of range, data that is not finite or has no variance outside of k
            dimensions.
        """
        _check_real(x, "x")
        if x.ndim != 2 or len(x) < 1:
            raise ValueError(f"x must have shape (samples, observed), got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x must be finite, got NaN or infinite entries")
        observed = x.shape[1]
        if not 1 <= latent_dim < observed:
            raise ValueError(
                f"latent_dim must be at least 1 and below the {observed} observed entries, "
                f"got {latent_dim}"
            )
        wide = x.double()
        bias = wide.mean(0)
        _, singular, axes = torch.linalg.svd(wide - bias, full_matrices=False)
        eigenvalues = singular.square() / len(x)
        kept, discarded = eigenvalues[:latent_dim], eigenvalues[latent_dim:]
        noise_variance = discarded.sum().item() / (observed - latent_dim)
        # What rounding leaves of a zero eigenvalue is no variance.
        smallest = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.sum().item()
        if not noise_variance > smallest:
            raise ValueError(
                f"x must vary in more than latent_dim = {latent_dim} dimensions, "
                f"got a remaining variance of {noise_variance}"
            )
        weight = axes[:latent_dim].T * (kept - noise_variance).clamp(min=0).sqrt()
        return cls(weight.to(x.dtype), bias.to(x.dtype), noise_variance, **kw)

    def get_extra_state(self) -> Tensor:
        """Return the noise variance, which belongs to the state like the matrix."""
        return torch.tensor(self.noise_variance, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the noise variance of another model."""
        self.noise_variance = float(state)

    def prior(self) -> Independent:
        """Return N(0, I)."""
        origin = _at_least_single(self.weight).new_zeros(self.weight.shape[1])
        return _independent(Normal(origin, torch.ones_like(origin), validate_args=False), 1)

    def likelihood(self, latent: Float[Tensor, "*batch latent"]) -> Independent:
        """Return N(Wz + b, s²I)."""
        weight = _at_least_single(self.weight)
        mean = latent.to(weight.dtype) @ weight.T + self.bias
        deviation = mean.new_full((), math.sqrt(self.noise_variance))
        return _independent(Normal(mean, deviation, validate_args=False), 1)

    def proposal(self, x: Float[Tensor, "batch observed"]) -> MultivariateNormal | Independent:
        """Return what was chosen as ``proposal``."""
        if self._proposes_exactly:
            return self.posterior(x)
        mean = self._posterior_mean(self._residual(x))
        deviation = self._precision().diagonal().rsqrt().expand_as(mean)
        return _independent(Normal(mean, deviation, validate_args=False), 1)

    def posterior(self, x: Float[Tensor, "batch observed"]) -> MultivariateNormal:
        """Return the exact distribution of z given x."""
        mean = self._posterior_mean(self._residual(x))
        covariance_root = torch.linalg.cholesky(torch.cholesky_inverse(self._precision_root()))
        return MultivariateNormal(mean, scale_tril=covariance_root, validate_args=False)

    def log_prob(self, x: Float[Tensor, "batch observed"]) -> Float[Tensor, " batch"]:
        """Return the exact log-density of every example, in nats."""
        residual, weight = self._residual(x), _at_least_single(self.weight)
        observed, latent = weight.shape
        if latent >= observed:
            covariance = weight @ weight.T
            covariance.diagonal().add_(self.noise_variance)
            centred = MultivariateNormal(
                residual.new_zeros(observed), covariance, validate_args=False
            )
            return centred.log_prob(residual)
        mean = self._posterior_mean(residual)
        # A sum of squares, where Woodbury's form is a difference that may cancel.
        distance = (residual - mean @ weight.T).square().sum(-1) / self.noise_variance
        distance = distance + mean.square().sum(-1)
        log_determinant = 2 * self._precision_root().diagonal().log().sum()
        constant = observed * math.log(2 * math.pi * self.noise_variance)
        return -(constant + log_determinant + distance) / 2

    def _residual(self, x: Tensor) -> Tensor:
        _check_real(x, "x")
        if x.ndim != 2 or x.shape[1] != len(self.bias):
            raise ValueError(f"x must have shape (batch, {len(self.bias)}), got {tuple(x.shape)}")
        weight = _at_least_single(self.weight)
        return x.to(torch.promote_types(x.dtype, weight.dtype)) - self.bias

    def _precision(self) -> Tensor:
        weight = _at_least_single(self.weight)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return identity + weight.T @ weight / self.noise_variance

    def _precision_root(self) -> Tensor:
        return torch.linalg.cholesky(self._precision())

    def _posterior_mean(self, residual: Tensor) -> Tensor:
        projected = residual @ _at_least_single(self.weight) / self.noise_variance
        return torch.cholesky_solve(projected.T, self._precision_root()).T


def _independent(base: Distribution, event_dims: int) -> Independent:
    return Independent(base, event_dims, validate_args=False)


def _scale_of(scale: float | Tensor, like: Tensor) -> Tensor:
    """Return the checked scale; a number goes where ``like`` is."""
    values = scale if isinstance(scale, Tensor) else torch.tensor(float(scale), dtype=like.dtype)
    _check_real(values, "scale")
    if not bool((values > 0).all()):
        raise ValueError(f"scale must be positive, got {values.min().item()}")
    return scale if isinstance(scale, Tensor) else values.to(like.device)


def _at_least_single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Return the floating dtype that a network computes in."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    return otherwise if parameter is None else parameter.dtype
