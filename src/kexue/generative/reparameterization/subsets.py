"""Samples of k categories without replacement, exact and relaxed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue.generative.reparameterization.perturbation import (
    Temperature,
    _check_logits,
    _check_temperature,
    _hardened,
    _holds,
    _perturbed,
    _quotient,
)

__all__ = ["TopKSample", "gumbel_top_k", "relaxed_top_k"]


class TopKSample(NamedTuple):
    """An ordered sample without replacement, and its log-probability.

    Attributes
    ----------
    indices : Tensor
        Categories in the order in which they were drawn, shape ``(..., k)``, int64.
    log_probability : Tensor
        Log-probability of drawing them in this order, shape ``(...)``, differentiable.

    Examples
    --------
    >>> sample = gumbel_top_k(torch.zeros(5), 2)
    >>> sample.log_probability  # 1/5 times 1/4
    tensor(-2.9957)
    """

    indices: Int[Tensor, "*batch k"]
    log_probability: Float[Tensor, "*batch"]


def gumbel_top_k(
    logits: Float[Tensor, "*batch categories"],
    k: int,
    *,
    noise: Float[Tensor, "*batch categories"] | None = None,
    generator: torch.Generator | None = None,
    validate_args: bool = True,
) -> TopKSample:
    r"""Draw k categories without replacement: the k largest of logits + noise.

    The order has the law of Plackett and Luce,
    :math:`\log P = \sum_j \big[o_{i_j} - \log \sum_{i \text{ not yet drawn}} e^{o_i}\big]`.

    Parameters
    ----------
    logits : Tensor
        Logits of categories in the last dimension; -inf masks a category.
    k : int
        How many to draw.
    noise : Tensor, optional
        Gumbel noise of the same shape, to be used instead of a new draw.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.
    validate_args : bool
        Whether values are checked, which waits for the device.

    Returns
    -------
    TopKSample
        ``indices`` in drawing order and the differentiable ``log_probability``, which is at least
        float32.

    Raises
    ------
    TypeError
        For logits that are not floating-point.
    ValueError
        For k below 1 or above the number of categories, fewer than k finite logits in a row, NaN,
        +inf, or noise of another shape.

    Examples
    --------
    >>> logits = torch.tensor([0.0, 1.0, 2.0])
    >>> gumbel_top_k(logits, 2, noise=torch.zeros(3))
    TopKSample(indices=tensor([2, 1]), log_probability=tensor(-0.7209))
    """
    working = _check_subset(logits, k, noise, validate_args)
    indices = _perturbed(working.detach(), noise, generator).topk(k, dim=-1).indices
    chosen = working.gather(-1, indices)
    # log-sum-exp over what remains before each draw, from the last to the first.
    remaining = _log_sum_of_the_rest(working, indices)
    log_probability = torch.zeros_like(remaining)
    for drawn in reversed(chosen.unbind(-1)):
        remaining = torch.logaddexp(remaining, drawn)
        log_probability = log_probability + (drawn - remaining)
    return TopKSample(indices, log_probability)


def relaxed_top_k(
    logits: Float[Tensor, "*batch categories"],
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    hard: bool = False,
    noise: Float[Tensor, "*batch categories"] | None = None,
    generator: torch.Generator | None = None,
    validate_args: bool = True,
) -> Float[Tensor, "*batch categories"]:
    r"""Draw relaxed k-hot vectors with a gradient: k softmaxes, each making way for the next.

    :math:`a_1 = o + G`, :math:`a_{j+1} = a_j + \log(1 - \mathrm{softmax}(a_j/\tau))`, and the sum
    of all :math:`\mathrm{softmax}(a_j/\tau)`.

    Parameters
    ----------
    logits : Tensor
        Logits of categories in the last dimension; -inf masks a category.
    k : int
        How many ones the vector approximates.
    temperature : float or Tensor
        τ, positive; a tensor broadcasts against the logits and receives a gradient.
    hard : bool
        Straight-through: forward the exact k-hot vector of the k largest of o + G.
    noise : Tensor, optional
        Gumbel noise of the same shape, to be used instead of a new draw.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.
    validate_args : bool
        Whether values are checked, which waits for the device.

    Returns
    -------
    Tensor
        Shape and dtype of the logits; rows sum to k.

    Raises
    ------
    TypeError
        For logits or a temperature that are not floating-point.
    ValueError
        For k below 1 or above the number of categories, fewer than k finite logits in a row, a
        temperature that is not positive and finite, NaN, +inf, or noise of another shape.

    Examples
    --------
    >>> logits = torch.tensor([0.0, 1.0, 2.0])
    >>> relaxed_top_k(logits, 2, temperature=0.1, noise=torch.zeros(3))
    tensor([4.5421e-05, 1.0000e+00, 9.9995e-01])
    """
    working = _check_subset(logits, k, noise, validate_args)
    temperature = _check_temperature(temperature, logits, validate_args)
    perturbed = _perturbed(working, noise, generator)
    soft = _successive_softmaxes(perturbed, k, temperature)
    if hard:
        indices = perturbed.detach().topk(k, dim=-1).indices
        soft = _hardened(soft, indices, -1)
    return soft.to(logits.dtype)


def _successive_softmaxes(perturbed: Tensor, k: int, temperature: Temperature) -> Tensor:
    total = torch.zeros_like(perturbed)
    for draw in range(k):
        top, winner = perturbed.detach().max(-1, keepdim=True)
        scaled = _quotient(perturbed - top, temperature)
        weights = scaled.softmax(-1)
        total = total + weights
        if draw < k - 1:
            perturbed = perturbed + _log_complement(scaled, weights, winner)
    return total


def _log_complement(scaled: Tensor, weights: Tensor, winner: Tensor) -> Tensor:
    """log(1 - weights), with all digits also where a weight rounds to one.

    Only the largest weight can: its complement is the sum of all others.
    """
    at_winner = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, winner, True)
    others = scaled.masked_fill(at_winner, -torch.inf).logsumexp(-1, keepdim=True)
    whole = scaled.logsumexp(-1, keepdim=True)
    return torch.where(at_winner, others - whole, torch.log1p(-weights.masked_fill(at_winner, 0.0)))


def _log_sum_of_the_rest(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-sum-exp over all categories but those at `indices`; very small where there are none."""
    rest = logits.scatter(-1, indices, -torch.inf)
    empty = rest.isneginf().all(-1, keepdim=True)
    # -inf would do but for its gradient.
    log_sum = rest.masked_fill(empty, 0.0).logsumexp(-1)
    return log_sum.masked_fill(empty.squeeze(-1), torch.finfo(logits.dtype).min)


def _check_subset(logits: Tensor, k: int, noise: Tensor | None, validate: bool) -> Tensor:
    working = _check_logits(logits, noise, -1, validate)
    categories = logits.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= categories:
        raise ValueError(f"k must be between 1 and {categories}, got {k!r}")
    if validate and k > 1:
        finite = logits.detach().isfinite().sum(-1)
        if not _holds((finite >= k).all()):
            raise ValueError(
                f"every row needs at least k = {k} finite logits, got {finite.min().item()}"
            )
    return working
