"""Along the field lines: from the prior to the data, and back with the likelihood.

    dx/dz = drift(x, z),    log p(x) = log p_prior(x(z_max)) + ∫ div_x(drift) dz

By default the solvers step in log z, where the equation is dx/dlog z = x − m: from z = 40 to
0.001 everything happens within ten units of it.

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

from kexue.generative.poisson_flow.inputs import (
    check_augmented_dim,
    check_points,
    check_positive,
    working_dtype,
)
from kexue.generative.poisson_flow.noise import prior_log_density, sample_prior
from kexue.generative.poisson_flow.training import check_output

__all__ = ["LogLikelihood", "integrate", "log_likelihood", "sample"]

Drift = Callable[[Tensor, Tensor], Tensor]

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
        The last adapts its steps to ``rtol`` and ``atol`` (Dormand and Prince, in log z).
    spacing : {"log", "rho"}
        Even steps in log z; or steps in z between heights that are even in z^(1/rho), as in EDM.
    rho : float
        Of the spacing "rho", positive.
    rtol, atol : float
        Tolerances of "rk45".

    Returns
    -------
    Tensor, shape (batch, *sample)
        Points at ``z_end``.

    Raises
    ------
    TypeError
        Where x is no floating point tensor.
    ValueError
        For NaN or infinity in x, heights or rho that are not positive, fewer than one step, an
        unknown method or spacing, and a drift of another shape than x.

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
    if method == _ADAPTIVE:
        return _adaptive(drift, x, z_start, z_end, rtol, atol)
    if spacing == "log":
        velocity = _in_log_z(drift)
        times = _even(math.log(z_start), math.log(z_end), num_steps)
    else:
        velocity = partial(_velocity, drift)
        times = [r**rho for r in _even(z_start ** (1 / rho), z_end ** (1 / rho), num_steps)]
    for time, next_time in pairwise(times):
        x = _step(velocity, x, time, next_time - time, *_METHODS[method])
    return x


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
        Of the result.

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
    x = sample_prior(
        shape,
        z_max,
        augmented_dim=augmented_dim,
        max_norm=max_norm,
        generator=generator,
        dtype=dtype,
        device=device,
    )
    x = integrate(drift, x, z_max, z_min, num_steps=num_steps, method=method, spacing=spacing)
    return x - z_min * _velocity(drift, x, z_min) if final_denoise else x


@dataclass(frozen=True)
class LogLikelihood:
    """The log-density of samples at height z_min, and where it comes from.

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
    probes = _probes(x, divergence, num_probes, generator)

    movement = _in_log_z(drift)

    def velocity(state: Tensor, log_z: float) -> Tensor:
        points = state[:, :-1].reshape(x.shape)
        with torch.enable_grad():
            if not differentiable:
                points = points.detach().requires_grad_()
            moving = movement(points, log_z)
            grown = _divergence(moving, points, probes, differentiable)
        moved = torch.cat([moving.flatten(1), grown[:, None]], 1)
        return moved if differentiable else moved.detach()

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    if not differentiable:
        state = state.detach()
    for log_z, next_log_z in pairwise(_even(math.log(z_min), math.log(z_max), num_steps)):
        state = _step(velocity, state, log_z, next_log_z - log_z, *_METHODS["rk4"])
    latent, integral = state[:, :-1].reshape(x.shape), state[:, -1]
    prior = prior_log_density(latent, z_max, augmented_dim=augmented_dim)
    return LogLikelihood(prior + integral, latent, integral)


def _step(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    time: float,
    width: float,
    nodes: tuple[float, ...],
    weights: tuple[float, ...],
) -> Tensor:
    """Take one step of an explicit Runge-Kutta method."""
    slope = velocity(x, time)
    total = weights[0] * slope
    for node, weight in zip(nodes, weights[1:], strict=True):
        slope = velocity(x + node * width * slope, time + node * width)
        total = total + weight * slope
    return x + width * total


def _velocity(drift: Drift, x: Tensor, z: float) -> Tensor:
    height = torch.full((len(x),), z, dtype=working_dtype(x.dtype), device=x.device)
    velocity = drift(x, height)
    check_output(velocity, x, "the drift")
    return velocity


def _in_log_z(drift: Drift) -> Callable[[Tensor, float], Tensor]:
    """Return dx/dlog z = z drift."""

    def velocity(x: Tensor, log_z: float) -> Tensor:
        z = math.exp(log_z)
        return z * _velocity(drift, x, z)

    return velocity


def _even(start: float, end: float, num_steps: int) -> list[float]:
    return torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()


def _adaptive(
    drift: Drift, x: Tensor, z_start: float, z_end: float, rtol: float, atol: float
) -> Tensor:
    from torchdiffeq import odeint

    if z_start == z_end or not len(x):
        return x

    velocity = _in_log_z(drift)
    ends = torch.tensor([math.log(z_start), math.log(z_end)], dtype=torch.float64, device=x.device)
    path = odeint(
        lambda log_z, x: velocity(x, log_z.item()), x, ends, method="dopri5", rtol=rtol, atol=atol
    )
    return path[-1]


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
        """vᵀ J v for each sample."""
        (row,) = torch.autograd.grad(
            velocity, x, vector, retain_graph=True, create_graph=differentiable
        )
        return (row * vector).flatten(1).sum(1)

    if probes is not None:
        return torch.stack([product(probe) for probe in probes]).mean(0)
    total = x.new_zeros(len(x))
    for row in torch.eye(x.flatten(1).shape[1], dtype=x.dtype, device=x.device):
        total = total + product(row.reshape(1, *x.shape[1:]).expand_as(x))
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
