"""The log-likelihood of given examples, with what is known about its error.

    log q̂ = log (1/M) Σ w_i,    se² = M/(M−1) Σ (w̃_i − 1/M)²,    ESS = 1/Σ w̃_i²,    w̃ = w/Σ w

The estimate is a lower bound in expectation, and tight up to Var(w/q)/2M where that variance is
finite. Standard error and effective sample size come from the same weights: draws that miss a
region leave no trace in them.

Source: https://arxiv.org/abs/1509.00519; Nowozin, "Debiasing evidence approximations", ICLR 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kexue.generative.vae.bound import (
    _check_examples,
    _check_model,
    _log_joint,
    _log_prob,
    _proposal,
    importance_weighted_bound,
    reparameterized_sample,
)
from kexue.generative.vae.likelihood import _check_generator, bits_per_dimension
from kexue.generative.vae.models import LatentVariableModel

__all__ = ["LogLikelihoodEstimate", "estimate_log_likelihood"]

# Latent points decoded at once where the caller does not say: enough for matrix products at full
# speed, few enough that activations are reused memory and not fetched anew from the system.
_POINTS_AT_ONCE = 1024


@dataclass(frozen=True)
class LogLikelihoodEstimate:
    """An estimate of log q(x) for every example, in nats, with its error.

    Attributes
    ----------
    log_likelihood : Tensor, shape (batch,)
        The estimate.
    standard_error : Tensor, shape (batch,)
        Of the estimate, by the delta method; NaN for a single sample.
    effective_sample_size : Tensor, shape (batch,)
        1/Σ w̃², between 1 and the number of samples.
    evidence_lower_bound : Tensor, shape (batch,)
        Mean of the log weights.
    num_samples : int
        Weights per example.

    Examples
    --------
    >>> value = torch.tensor([-100.0], dtype=torch.float64)
    >>> estimate = LogLikelihoodEstimate(value, 0 * value, 0 * value + 5, value - 3, num_samples=5)
    >>> estimate.bits_per_dimension(64, bin_width=1 / 8)
    tensor([5.2542], dtype=torch.float64)
    """

    log_likelihood: Float64[Tensor, " batch"]
    standard_error: Float64[Tensor, " batch"]
    effective_sample_size: Float64[Tensor, " batch"]
    evidence_lower_bound: Float64[Tensor, " batch"]
    num_samples: int

    def bits_per_dimension(
        self, num_dimensions: int, *, bin_width: float = 1.0
    ) -> Float64[Tensor, " batch"]:
        """Return the estimate as a code length per entry.

        Parameters
        ----------
        num_dimensions : int
            Entries of one example.
        bin_width : float
            Spacing of the original values where the likelihood is a density; 1 for a probability.

        Returns
        -------
        Tensor, shape (batch,)
        """
        return bits_per_dimension(self.log_likelihood, num_dimensions, bin_width=bin_width)


@torch.no_grad()
def estimate_log_likelihood(
    model: LatentVariableModel,
    x: Float[Tensor, " batch *event"],
    *,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    proposal: Literal["encoder", "prior"] = "encoder",
    proposal_scale: float = 1.0,
    bias_correction: Literal["none", "jackknife"] = "none",
    generator: torch.Generator | None = None,
) -> LogLikelihoodEstimate:
    """Estimate log q(x) for every example by importance sampling; without gradient.

    Encodes once, decodes ``batch × num_samples`` latent points.

    Parameters
    ----------
    model : LatentVariableModel
        Prior, proposal and likelihood.
    x : Tensor, shape (batch, *event)
        Examples, held out from training.
    num_samples : int
        Draws M for each.
    chunk_size : int, optional
        Draws per example that are held at once; by default about 1024 for the whole batch.
    proposal : {"encoder", "prior"}
        Where to draw from.
    proposal_scale : float
        Factor of its standard deviation. If results grow with M and the effective sample size
        does not, the variance may be infinite: try a factor above 1, or
        `annealed_importance_sampling`.
    bias_correction : {"none", "jackknife"}
        The jackknife removes the bias of order 1/M; its result is no lower bound any more.
    generator : torch.Generator, optional
        Source of randomness, on the device of x.

    Returns
    -------
    LogLikelihoodEstimate

    Raises
    ------
    ValueError
        For sizes below 1, a jackknife of one sample, unknown options, and what
        `log_importance_weights` refuses.
    TypeError
        As there.

    Examples
    --------
    >>> from kexue.generative.vae import LinearGaussianModel
    >>> model = LinearGaussianModel(torch.tensor([[2.0], [0.0]]), torch.zeros(2), 1.0)
    >>> estimate_log_likelihood(model, torch.zeros(1, 2), num_samples=10).log_likelihood
    tensor([-2.6426], dtype=torch.float64)
    """
    if bias_correction not in ("none", "jackknife"):
        raise ValueError(f"bias_correction must be one of none, jackknife, got {bias_correction!r}")
    if num_samples < (2 if bias_correction == "jackknife" else 1):
        raise ValueError(
            f"num_samples must be at least 1, and 2 for the jackknife, got {num_samples}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    _check_model(model)
    _check_examples(x)
    _check_generator(generator, x)
    if chunk_size is None:
        chunk_size = max(1, _POINTS_AT_ONCE // max(1, len(x)))
    chosen = _proposal(model, x, proposal, proposal_scale)
    log_weights = x.new_empty((num_samples, len(x)), dtype=torch.float64)
    for first in range(0, num_samples, chunk_size):
        chunk = log_weights[first : first + chunk_size]
        latent = reparameterized_sample(chosen, (len(chunk),), generator=generator)
        joint = _log_joint(model, x, latent, check=first == 0)
        torch.sub(joint, _log_prob(chosen, latent), out=chunk)
    estimate = _from_log_weights(log_weights)
    if bias_correction == "none":
        return estimate
    return LogLikelihoodEstimate(
        _jackknife(log_weights),
        estimate.standard_error,
        estimate.effective_sample_size,
        estimate.evidence_lower_bound,
        num_samples,
    )


def _from_log_weights(log_weights: Tensor) -> LogLikelihoodEstimate:
    """Return value, standard error and effective sample size of weights (samples, batch)."""
    count = len(log_weights)
    normalized = log_weights.softmax(0)
    spread = (normalized - 1 / count).square().sum(0)
    return LogLikelihoodEstimate(
        importance_weighted_bound(log_weights),
        # One weight says nothing about its error.
        (spread * count / (count - 1)).sqrt() if count > 1 else torch.full_like(spread, math.nan),
        1 / normalized.square().sum(0),
        log_weights.mean(0),
        count,
    )


def _jackknife(log_weights: Tensor) -> Tensor:
    """Return M L̂_M − (M−1) mean L̂_{M−1}, over all ways to leave one weight out."""
    count = len(log_weights)
    total = torch.logsumexp(log_weights, 0)
    without = total + torch.log1p(-(log_weights - total).exp())
    # The largest weight may be nearly all there is: the rest is summed, not subtracted.
    largest = log_weights.argmax(0, keepdim=True)
    rest = torch.logsumexp(log_weights.scatter(0, largest, -math.inf), 0, keepdim=True)
    left_out = without.scatter(0, largest, rest) - math.log(count - 1)
    bound = total - math.log(count)
    return count * bound - (count - 1) * left_out.mean(0)
