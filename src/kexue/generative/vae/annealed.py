"""Annealed importance sampling: from the proposal to the posterior in many small steps.

    f_β(z) = p(z|x)^(1−β) (q(x|z) q(z))^β,
    log w = Σ (β_i − β_{i−1}) [log q(x, z_{i−1}) − log p(z_{i−1}|x)]

Between two temperatures Hamiltonian dynamics move z and leave f_β as it is. E w = q(x), so that the
log of the mean weight is a lower bound in expectation. The same chain, run backwards from a draw of
the exact posterior, has E 1/w = 1/q(x), and gives an upper bound.

Source: https://arxiv.org/abs/1611.04273, https://arxiv.org/abs/1511.02543 (both directions).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from kexue._autograd import outside_inference_mode
from kexue.generative.vae.bound import (
    _check_examples,
    _check_model,
    _log_joint,
    _log_prob,
    _proposal,
    reparameterized_sample,
)
from kexue.generative.vae.estimate import LogLikelihoodEstimate, _from_log_weights
from kexue.generative.vae.likelihood import _check_generator, _check_real
from kexue.generative.vae.models import LatentVariableModel

__all__ = ["annealed_importance_sampling"]


@outside_inference_mode
@torch.no_grad()
def annealed_importance_sampling(
    model: LatentVariableModel,
    x: Float[Tensor, " batch *event"],
    *,
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog_steps: int = 5,
    step_size: float = 0.1,
    initial: Literal["encoder", "prior"] = "encoder",
    direction: Literal["forward", "reverse"] = "forward",
    latent: Float[Tensor, "batch latent_dim"] | None = None,
    generator: torch.Generator | None = None,
) -> LogLikelihoodEstimate:
    """Estimate log q(x) where the weights of plain importance sampling vary too much.

    Costs ``batch × num_chains × num_temperatures × num_leapfrog_steps`` gradients of the decoder.
    The step size stays as it is: one that follows the chain would bias the weights.

    Parameters
    ----------
    model : LatentVariableModel
        Prior, proposal and likelihood, the latter differentiable in z.
    x : Tensor, shape (batch, *event)
        Examples.
    num_chains : int
        Independent chains for each.
    num_temperatures : int
        Values of β, both ends included, dense near them: equally spaced under a sigmoid.
    num_leapfrog_steps : int
        Length of a trajectory.
    step_size : float
        Size of its steps, in units of z.
    initial : {"encoder", "prior"}
        The distribution at β = 0.
    direction : {"forward", "reverse"}
        Lower or upper bound, in expectation.
    latent : Tensor, shape (batch, latent_dim), optional
        For "reverse": one draw of the **exact** posterior for each example, such as the z that x
        was generated from. From any other start the result is no bound. All chains of an example
        start there, so that its standard error does not know how this draw varies.
    generator : torch.Generator, optional
        Source of randomness, on the device of x.

    Returns
    -------
    LogLikelihoodEstimate
        With the chains as samples. In reverse ``evidence_lower_bound``, the mean of log w, is an
        upper bound, too.

    Raises
    ------
    ValueError
        For sizes below 1, fewer than two temperatures, a step size that is not positive, unknown
        options, a missing or misplaced ``latent``, and what `log_importance_weights` refuses.
    TypeError
        As there.

    Examples
    --------
    >>> from kexue.generative.vae import LinearGaussianModel
    >>> weight = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    >>> model = LinearGaussianModel(weight, torch.zeros(3), 0.5, proposal="diagonal")
    >>> x, generator = torch.ones(1, 3), torch.Generator().manual_seed(0)
    >>> lower = annealed_importance_sampling(model, x, generator=generator)
    >>> latent = model.posterior(x).sample()
    >>> upper = annealed_importance_sampling(
    ...     model, x, direction="reverse", latent=latent, generator=generator
    ... )
    >>> bool((lower.log_likelihood - upper.log_likelihood).abs() < 0.1)
    True
    """
    for name, size, least in (
        ("num_chains", num_chains, 1),
        ("num_temperatures", num_temperatures, 2),
        ("num_leapfrog_steps", num_leapfrog_steps, 1),
    ):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    if initial not in ("encoder", "prior"):
        raise ValueError(f"initial must be one of encoder, prior, got {initial!r}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be one of forward, reverse, got {direction!r}")
    _check_model(model)
    _check_examples(x)
    _check_generator(generator, x)
    start = _proposal(model, x, initial, 1.0)
    if direction == "forward":
        if latent is not None:
            raise ValueError("latent belongs to direction 'reverse', got it with 'forward'")
        z = reparameterized_sample(start, (num_chains,), generator=generator)
    else:
        z = _posterior_draws(latent, (len(x), *start.event_shape)).expand(num_chains, -1, -1)

    densities = _Densities(model, x, start)
    state = densities.at(z, check=True)
    betas = _temperatures(num_temperatures)
    log_weights = torch.zeros_like(state.log_joint)
    path = list(pairwise(betas))
    if direction == "reverse":
        path.reverse()
    for step, (lower, upper) in enumerate(path):
        log_weights += (upper - lower) * (state.log_joint - state.log_start)
        if step < len(path) - 1:
            # The temperature that this interval shares with the next one.
            beta = upper if direction == "forward" else lower
            state = _transition(densities, state, beta, num_leapfrog_steps, step_size, generator)
    if direction == "forward":
        return _from_log_weights(log_weights)
    inverse = _from_log_weights(-log_weights)
    return replace(
        inverse,
        log_likelihood=-inverse.log_likelihood,
        evidence_lower_bound=-inverse.evidence_lower_bound,
    )


@dataclass(frozen=True)
class _State:
    """Where the chains are, with both log-densities there and their gradients."""

    z: Tensor
    log_joint: Tensor
    log_start: Tensor
    joint_gradient: Tensor
    start_gradient: Tensor

    def log_density(self, beta: float) -> Tensor:
        return (1 - beta) * self.log_start + beta * self.log_joint

    def gradient(self, beta: float) -> Tensor:
        return (1 - beta) * self.start_gradient + beta * self.joint_gradient

    def where(self, accepted: Tensor, other: _State) -> _State:
        """Return the state of the accepted chains, and the other state of the rest."""
        rows = accepted.unsqueeze(-1)
        return _State(
            torch.where(rows, self.z, other.z),
            torch.where(accepted, self.log_joint, other.log_joint),
            torch.where(accepted, self.log_start, other.log_start),
            torch.where(rows, self.joint_gradient, other.joint_gradient),
            torch.where(rows, self.start_gradient, other.start_gradient),
        )


@dataclass(frozen=True)
class _Densities:
    """The two ends of the path of distributions, for these examples."""

    model: LatentVariableModel
    x: Tensor
    start: Distribution

    def at(self, z: Tensor, *, check: bool = False) -> _State:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            log_joint = _log_joint(self.model, self.x, leaf, check=check)
            log_start = _log_prob(self.start, leaf)
            # Chains do not meet: the gradient of their sum is the gradient of each.
            (joint_gradient,) = torch.autograd.grad(log_joint.sum(), leaf)
            (start_gradient,) = torch.autograd.grad(log_start.sum(), leaf)
        return _State(
            leaf.detach(), log_joint.detach(), log_start.detach(), joint_gradient, start_gradient
        )


def _transition(
    densities: _Densities,
    state: _State,
    beta: float,
    num_steps: int,
    step_size: float,
    generator: torch.Generator | None,
) -> _State:
    """Move all chains by Hamiltonian dynamics, with the accept step that makes f_β invariant."""
    momentum = torch.randn(
        state.z.shape, dtype=state.z.dtype, device=state.z.device, generator=generator
    )
    log_before = state.log_density(beta) - _kinetic(momentum)
    proposed = state
    for _ in range(num_steps):
        momentum = momentum + step_size / 2 * proposed.gradient(beta)
        proposed = densities.at(proposed.z + step_size * momentum)
        momentum = momentum + step_size / 2 * proposed.gradient(beta)
    log_after = proposed.log_density(beta) - _kinetic(momentum)
    uniform = torch.rand(
        log_after.shape, dtype=log_after.dtype, device=log_after.device, generator=generator
    )
    # A trajectory that ended in NaN is not accepted.
    return proposed.where(uniform.log() < log_after - log_before, state)


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.double().square().sum(-1) / 2


def _temperatures(count: int) -> list[float]:
    """Return sigmoid-spaced values from exactly 0 to exactly 1."""
    raw = torch.linspace(-4, 4, count, dtype=torch.float64).sigmoid()
    return ((raw - raw[0]) / (raw[-1] - raw[0])).tolist()


def _posterior_draws(latent: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if latent is None:
        raise ValueError("direction 'reverse' needs latent, draws of the exact posterior, got none")
    _check_real(latent, "latent")
    if latent.shape != shape:
        raise ValueError(
            f"latent must have shape (batch, latent_dim) = {shape}, got {tuple(latent.shape)}"
        )
    return latent
