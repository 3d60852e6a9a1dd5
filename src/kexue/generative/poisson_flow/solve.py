"""Along the field lines: from the prior to the data, and back with the likelihood.

    dx/dz = drift(x, z),    log p(x) = log p_prior(x(z_max)) + ∫ div_x(drift) dz

By default the solvers step in log z, where the equation is dx/dlog z = x − m: from z = 40 to
0.001 everything happens within ten units of it. Half precision is for the drift alone: states and
integrals are kept in float32.

Source: https://arxiv.org/abs/2209.11178, https://arxiv.org/abs/2206.00364 (Heun, rho spacing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from kexue._autograd import outside_inference_mode
from kexue.generative.diffusion.ode.integrate import dopri5
from kexue.generative.poisson_flow.inputs import (
    check_augmented_dim,
    check_points,
    check_positive,
    working_dtype,
)
from kexue.generative.poisson_flow.noise import prior_log_density, real_dtype, sample_prior
from kexue.generative.poisson_flow.training import check_output

__all__ = ["LogLikelihood", "integrate", "log_likelihood", "sample"]

Drift = Callable[[Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, float], Tensor]

# Explicit Runge-Kutta methods: where each stage after the first stands (it looks back at the one
# before it only), and the weights of all stages.
_METHODS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "euler": ((), (1.0,)),
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "rk4": ((1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
_ADAPTIVE = "rk45"
_SPACINGS = ("log", "rho")
_DIVERGENCES = ("exact", "hutchinson")


def integrate(
    drift: Drift,
    x: Float[Tensor, " batch *sample"],
    z_start: float,
    z_end: float,
    *,
    num_steps: int = 50,
    method: str = "heun",
    spacing: str = "log",
    rho: float = 7.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Float[Tensor, " batch *sample"]:
    """Follow the lines dx/dz = drift(x, z) from one height to another, down or up.

    Differentiable in x and in the parameters of the drift.

    Parameters
    ----------
    drift : callable
        ``drift(x, z)`` with z of shape (batch,).
    x : Tensor, shape (batch, *sample)
        Points at ``z_start``.
    z_start, z_end : float
        Heights, both positive.
    num_steps : int
        Steps of the fixed-step methods; "heun" calls the drift twice a step, "rk4" four times.
    method : {"euler", "heun", "rk4", "rk45"}
        The last adapts its steps to ``rtol`` and ``atol`` (Dormand and Prince, in log z, with a
        state of float64).
    spacing : {"log", "rho"}
        Even steps in log z; or steps in z between heights that are even in z^(1/rho), as in EDM.
    rho : float
        Of the spacing "rho", positive.
    rtol, atol : float
        Tolerances of "rk45", positive.

    Returns
    -------
    Tensor, shape (batch, *sample)
        Points at ``z_end``, in the dtype of x.

    Raises
    ------
    TypeError
        Where x is no floating point tensor.
    ValueError
        For NaN or infinity in x, heights, rho or tolerances that are not positive, fewer than one
        step, an unknown method or spacing, and a drift of another shape than x.
    RuntimeError
        Where no step of "rk45" is small enough for its tolerances, as for a drift that is not
        finite.

    Examples
    --------
    The line to a single charge is straight:

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> integrate(lambda x, z: x / z[:, None], x, 40.0, 10.0, num_steps=20, method="rk4")
    tensor([[0.7500, 1.0000]])
    """
    check_points(x, "x")
    check_positive(z_start, "z_start")
    check_positive(z_end, "z_end")
    _check_solver(num_steps, method, spacing, rho)
    end = _integrate(
        partial(_velocity, drift, x.dtype),
        x.to(_state_dtype(x.dtype, method)),
        z_start,
        z_end,
        num_steps=num_steps,
        method=method,
        spacing=spacing,
        rho=rho,
        rtol=rtol,
        atol=atol,
    )
    return end.to(x.dtype)


@torch.no_grad()
def sample(
    drift: Drift,
    shape: Sequence[int],
    *,
    z_max: float = 40.0,
    z_min: float = 1e-3,
    augmented_dim: float = 1.0,
    num_steps: int = 50,
    method: str = "heun",
    spacing: str = "log",
    max_norm: float | None = None,
    final_denoise: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, " batch *sample"]:
    """Draw from the prior and follow the lines down to the data.

    Parameters
    ----------
    drift : callable
        ``drift(x, z)`` with z of shape (batch,).
    shape : sequence of int
        (batch, *sample).
    z_max, z_min : float
        Heights where the lines start and end, 0 < z_min < z_max. z_min must be below the distance
        of neighbouring data, or they blur into their mean.
    augmented_dim : float
        That of the drift; for ``math.inf`` heights are noise levels σ.
    num_steps, method, spacing
        As `integrate`.
    max_norm : float, optional
        Start points of a larger norm are scaled to it.
    final_denoise : bool
        Whether to end with an Euler step from z_min to 0, which gives m(x, z_min) exactly. Without
        it samples for D = 1 have neither mean nor variance.
    generator : torch.Generator, optional
        Source of randomness, on ``device``.
    dtype, device : optional
        Of the result, and of what the drift is asked at. Start points beyond the largest number
        of the dtype are scaled to it, as to ``max_norm``.

    Returns
    -------
    Tensor, shape (batch, *sample)
        Samples, without gradient.

    Raises
    ------
    ValueError
        For heights, steps or names out of range, as `integrate` and `sample_prior`.

    Examples
    --------
    >>> drift = lambda x, z: x / z[:, None]
    >>> sample(drift, (2, 3), generator=torch.Generator().manual_seed(0)).abs().max() < 1e-4
    tensor(True)
    """
    _check_interval(z_min, z_max)
    _check_solver(num_steps, method, spacing, 7.0)
    dtype = real_dtype(dtype)
    largest = torch.finfo(dtype).max
    x = sample_prior(
        shape,
        z_max,
        augmented_dim=augmented_dim,
        max_norm=largest if max_norm is None else min(max_norm, largest),
        generator=generator,
        dtype=_state_dtype(dtype, method),
        device=device,
    )
    velocity = partial(_velocity, drift, dtype)
    x = _integrate(velocity, x, z_max, z_min, num_steps=num_steps, method=method, spacing=spacing)
    if final_denoise:
        x = x.to(dtype).to(x.dtype)  # the step gives m exactly from where the drift is asked only
        x = x - z_min * velocity(x, z_min)
    return x.to(dtype)


@dataclass(frozen=True)
class LogLikelihood:
    """The log-density of samples at height z_min, and where it comes from.

    Its terms are at least in float32, the latent in the dtype of the samples.

    Attributes
    ----------
    log_density : Tensor, shape (batch,)
        In nats: that of the prior at ``latent`` plus ``divergence_integral``.
    latent : Tensor, shape (batch, *sample)
        Where the lines through the samples meet the plane at z_max.
    divergence_integral : Tensor, shape (batch,)
        ∫ div_x(dx/dz) dz from z_min to z_max.

    Examples
    --------
    >>> likelihood = log_likelihood(lambda x, z: x / z[:, None], torch.zeros(1, 2))
    >>> likelihood.latent
    tensor([[0., 0.]])
    """

    log_density: Float[Tensor, " batch"]
    latent: Float[Tensor, " batch *sample"]
    divergence_integral: Float[Tensor, " batch"]


@outside_inference_mode
def log_likelihood(
    drift: Drift,
    x: Float[Tensor, " batch *sample"],
    *,
    z_min: float = 1e-3,
    z_max: float = 40.0,
    augmented_dim: float = 1.0,
    num_steps: int = 100,
    divergence: str = "exact",
    num_probes: int = 1,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Return the log-density of samples under the flow, at height z_min.

    x and the divergence are integrated together by the classical Runge-Kutta method, with even
    steps in log z: dx/dlog z = z drift has a divergence that is bounded at both ends.

    Parameters
    ----------
    drift : callable
        ``drift(x, z)``, differentiable in x; each sample's drift depends on that sample only.
    x : Tensor, shape (batch, *sample)
        Samples at height z_min.
    z_min, z_max : float
        Heights, 0 < z_min < z_max.
    augmented_dim : float
        That of the drift.
    num_steps : int
        Steps of four calls each.
    divergence : {"exact", "hutchinson"}
        N vector-Jacobian products a call, or an unbiased estimate from ``num_probes`` of them.
    num_probes : int
        Random sign vectors, the same along a whole line.
    generator : torch.Generator, optional
        Source of the probes, on the device of x.

    Returns
    -------
    LogLikelihood
        Detached, unless x requires a gradient.

    Raises
    ------
    TypeError
        Where x is no floating point tensor.
    ValueError
        For NaN or infinity in x, heights or counts out of range, and an unknown divergence.

    Examples
    --------
    For one charge the flow is the Cauchy distribution at every height, 1/(π z) at its centre:

    >>> drift = lambda x, z: x / z[:, None]
    >>> likelihood = log_likelihood(drift, torch.zeros(1, 1), z_min=1.0)
    >>> likelihood.log_density.exp()
    tensor([0.3183])
    """
    check_points(x, "x")
    _check_interval(z_min, z_max)
    check_augmented_dim(augmented_dim)
    if num_steps < 1 or num_probes < 1:
        raise ValueError(
            f"num_steps and num_probes must be at least 1, got {num_steps} and {num_probes}"
        )
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(_DIVERGENCES)}, got {divergence!r}")
    differentiable = x.requires_grad and torch.is_grad_enabled()
    wide = x.to(working_dtype(x.dtype))
    probes = _probes(wide, divergence, num_probes, generator)
    height = _from_log(z_min, z_max)

    def velocity(state: Tensor, log_z: float) -> Tensor:
        points, z = state[:, :-1].reshape(x.shape), height(log_z)
        with torch.enable_grad():
            if not differentiable:
                points = points.detach().requires_grad_()
            moving = _velocity(drift, x.dtype, points, z)
            grown = _divergence(moving, points, probes, differentiable)
        moved = z * torch.cat([moving.flatten(1), grown[:, None]], 1)
        return moved if differentiable else moved.detach()

    state = torch.cat([wide.flatten(1), wide.new_zeros(len(x), 1)], 1)
    if not differentiable:
        state = state.detach()
    for log_z, next_log_z in pairwise(_even(math.log(z_min), math.log(z_max), num_steps)):
        state = _step(velocity, state, log_z, next_log_z, *_METHODS["rk4"])
    latent, integral = state[:, :-1].reshape(x.shape), state[:, -1]
    prior = prior_log_density(latent, z_max, augmented_dim=augmented_dim)
    return LogLikelihood(prior + integral, latent.to(x.dtype), integral)


def _state_dtype(dtype: torch.dtype, method: str) -> torch.dtype:
    # Rounding must have no part in the choice of steps.
    return torch.float64 if method == _ADAPTIVE else working_dtype(dtype)


def _integrate(
    velocity: Velocity,
    x: Tensor,
    z_start: float,
    z_end: float,
    *,
    num_steps: int,
    method: str,
    spacing: str,
    rho: float = 7.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    if z_start == z_end:
        return x
    height = _from_log(z_start, z_end)

    def in_log_z(x: Tensor, log_z: float) -> Tensor:
        """Return dx/dlog z = z drift."""
        z = height(log_z)
        return z * velocity(x, z)

    log_start, log_end = math.log(z_start), math.log(z_end)
    if method == _ADAPTIVE:
        end: Tensor = dopri5(in_log_z, x, log_start, log_end, rtol=rtol, atol=atol)
        return end
    if spacing == "log":
        slope: Velocity = in_log_z
        times = _even(log_start, log_end, num_steps)
    else:
        slope = velocity
        roots = _even(z_start ** (1 / rho), z_end ** (1 / rho), num_steps)
        times = [z_start, *(root**rho for root in roots[1:-1]), z_end]
    for time, next_time in pairwise(times):
        x = _step(slope, x, time, next_time, *_METHODS[method])
    return x


def _from_log(z_start: float, z_end: float) -> Callable[[float], float]:
    """Return the way from log z back to z that never leaves the interval, and meets its ends."""
    low, high = sorted((z_start, z_end))
    ends = {math.log(low): low, math.log(high): high}
    return lambda log_z: ends.get(log_z, min(max(math.exp(log_z), low), high))


def _step(
    velocity: Velocity,
    x: Tensor,
    time: float,
    next_time: float,
    nodes: tuple[float, ...],
    weights: tuple[float, ...],
) -> Tensor:
    """Take one step of an explicit Runge-Kutta method."""
    width = next_time - time
    slope = velocity(x, time)
    total = weights[0] * slope
    for node, weight in zip(nodes, weights[1:], strict=True):
        # The sum of time and width may miss the next time by rounding.
        stage = next_time if node == 1 else time + node * width
        slope = velocity(x + node * width * slope, stage)
        total = total + weight * slope
    return x + width * total


def _velocity(drift: Drift, dtype: torch.dtype, x: Tensor, z: float) -> Tensor:
    """Return dx/dz in the dtype of the state x, from a drift that is asked in another."""
    height = torch.full((len(x),), z, dtype=working_dtype(dtype), device=x.device)
    velocity = drift(x.to(dtype), height)
    check_output(velocity, x, "the drift")
    return velocity.to(x.dtype)


def _even(start: float, end: float, num_steps: int) -> list[float]:
    return torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()


def _probes(
    x: Tensor, divergence: str, num_probes: int, generator: torch.Generator | None
) -> Tensor | None:
    """Return random signs of shape (probes, *x.shape), or None where none are needed."""
    if divergence == "exact":
        return None
    coins = torch.randint(2, (num_probes, *x.shape), generator=generator, device=x.device)
    return (2 * coins - 1).to(x.dtype)


def _divergence(velocity: Tensor, x: Tensor, probes: Tensor | None, differentiable: bool) -> Tensor:
    """Return the trace of the Jacobian of each sample's velocity, or an estimate of it."""
    if not velocity.requires_grad:
        return x.new_zeros(len(x))

    def product(vector: Tensor) -> Tensor:
        """Return Jᵀ v for each sample, flat."""
        (row,) = torch.autograd.grad(
            velocity, x, vector, retain_graph=True, create_graph=differentiable, allow_unused=True
        )
        # A velocity of parameters alone does not depend on x.
        return vector.new_zeros(x.shape).flatten(1) if row is None else row.flatten(1)

    if probes is not None:
        forms = [(product(probe) * probe.flatten(1)).sum(1) for probe in probes]
        return torch.stack(forms).mean(0)
    total, dimensions = x.new_zeros(len(x)), x.flatten(1).shape[1]
    for entry in range(dimensions):
        unit = x.new_zeros(dimensions)
        unit[entry] = 1
        total = total + product(unit.reshape(1, *x.shape[1:]).expand_as(x))[:, entry]
    return total


def _check_interval(z_min: float, z_max: float) -> None:
    check_positive(z_max, "z_max")
    check_positive(z_min, "z_min")
    if not z_min < z_max:
        raise ValueError(f"z_min must be below z_max, got z_min {z_min} and z_max {z_max}")


def _check_solver(num_steps: int, method: str, spacing: str, rho: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    methods = [*_METHODS, _ADAPTIVE]
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    if spacing not in _SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(_SPACINGS)}, got {spacing!r}")
    check_positive(rho, "rho")
