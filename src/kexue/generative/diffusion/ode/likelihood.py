"""Exact log-density along the flow: prior, change of volume, latent code, all in one solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kexue._autograd import outside_inference_mode
from kexue.generative.diffusion.denoiser.prediction import Denoiser, _check_state
from kexue.generative.diffusion.ode.flow import (
    _COORDINATES,
    _DIVERGENCES,
    _check_choice,
    _divergence,
    _Place,
    _places,
    _scale,
    _sum_event,
    _velocity,
)
from kexue.generative.diffusion.ode.solve import _default_times, _integrate
from kexue.generative.vae import bits_per_dimension

__all__ = ["LogLikelihood", "log_likelihood"]

_METHODS = ("euler", "heun", "dopri5")
_PROBES = ("rademacher", "gaussian")


@dataclass(frozen=True)
class LogLikelihood:
    """Log-density of each example and what it is made of, in nats and float64.

    Attributes
    ----------
    log_prob : Tensor, shape (batch,)
        prior_log_prob + d (log ᾱ_T − log ᾱ_start) + divergence_integral.
    prior_log_prob : Tensor, shape (batch,)
        log N(latent; 0, prior_scale² I).
    divergence_integral : Tensor, shape (batch,)
        ∫ ∇_y·ε̂ dσ from the start to the largest time, whichever coordinate was used.
    latent : Tensor, shape (batch, *event)
        State at the largest time, in the schedule's own scaling.
    num_evaluations : int
        Evaluations of the flow and its divergence.

    Examples
    --------
    >>> half = torch.tensor([-2.0], dtype=torch.float64)
    >>> result = LogLikelihood(2 * half, half, half, torch.zeros(1, 2), 10)
    >>> result.bits_per_dimension(2)
    tensor([2.8854], dtype=torch.float64)
    """

    log_prob: Float64[Tensor, " batch"]
    prior_log_prob: Float64[Tensor, " batch"]
    divergence_integral: Float64[Tensor, " batch"]
    latent: Float[Tensor, " batch *event"]
    num_evaluations: int

    def bits_per_dimension(
        self, num_dimensions: int, *, bin_width: float = 1.0
    ) -> Float64[Tensor, " batch"]:
        """Return the density as a code length of quantised data, in bits per entry.

        Parameters
        ----------
        num_dimensions : int
            Entries of one example.
        bin_width : float
            Spacing of the original values, to which uniform noise of that width was added.

        Returns
        -------
        Tensor, shape (batch,)
        """
        return bits_per_dimension(self.log_prob, num_dimensions, bin_width=bin_width)


@outside_inference_mode
def log_likelihood(
    denoiser: Denoiser,
    x: Float[Tensor, " batch *event"],
    *,
    start: float | None = None,
    divergence_method: Literal["exact", "hutchinson"] = "exact",
    num_probes: int = 1,
    probe: Literal["rademacher", "gaussian"] = "rademacher",
    method: Literal["euler", "heun", "dopri5"] = "dopri5",
    coordinate: Literal["sigma", "angle"] = "angle",
    num_steps: int = 64,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Return the log-density of states at time ``start`` under the flow.

    It is the density of the data *noised to* ``start``, not of the data. A likelihood with fixed
    steps can be wrong without a sign of it, by several bits per pixel in coordinate "sigma":
    repeat with doubled ``num_steps`` (or tighter tolerances) and believe the digits that stay.
    Differentiable where x requires grad; without gradient otherwise.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    x : Tensor, shape (batch, *event)
        States at time ``start``, in the schedule's own scaling.
    start : float, optional
        Positive time; the schedule's ``minimum_time`` by default.
    divergence_method : {"exact", "hutchinson"}
        d backward passes an evaluation, or ``num_probes`` and an estimate without bias.
    num_probes : int
        Probes of "hutchinson"; their mean is taken in nats, before anything is exponentiated.
    probe : {"rademacher", "gaussian"}
        Entries of ±1, which are exact for a diagonal Jacobian, or normal ones. Drawn once a call.
    method : {"euler", "heun", "dopri5"}
    coordinate : {"sigma", "angle"}
        What is integrated; the angle is bounded and needs far fewer steps.
    num_steps : int
        Of "euler" and "heun", on the default grids of `solve_ode`.
    rtol, atol : float
        Tolerances of "dopri5".
    condition : Tensor, optional
        Passed to the denoiser: the density given the condition.
    generator : torch.Generator, optional
        Source of the probes, on the device of x.

    Returns
    -------
    LogLikelihood

    Raises
    ------
    ValueError
        For unknown methods, coordinates or probes, a start that is not positive or beyond the
        schedule, and less than one step or probe.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 2), torch.tensor([4.0]), schedule=DiscreteSchedule.cosine()
    ... )
    >>> x = torch.tensor([[1.0, -2.0]])
    >>> log_likelihood(denoiser, x, start=10.0).log_prob
    tensor([-3.84...], dtype=torch.float64)
    >>> denoiser.log_prob(x, 10.0)
    tensor([-3.84...], dtype=torch.float64)
    """
    _check_state(x)
    _check_choice("divergence_method", divergence_method, _DIVERGENCES)
    _check_choice("probe", probe, _PROBES)
    _check_choice("method", method, _METHODS)
    _check_choice("coordinate", coordinate, _COORDINATES)
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}")
    schedule = denoiser.schedule
    start = schedule.minimum_time if start is None else start
    times = _default_times(schedule, start, schedule.maximum_time, num_steps, coordinate)
    places = _places(schedule, times)
    probes = None
    if divergence_method == "hutchinson":
        probes = _draw_probes(x, num_probes, probe, generator)

    differentiable = torch.is_grad_enabled() and x.requires_grad
    evaluations = 0

    def slope(state: tuple[Tensor, Tensor], place: _Place) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        point = state[0].to(x.dtype)
        with torch.enable_grad():
            if not differentiable:
                point = point.detach().requires_grad_()
            value, trace = _divergence(
                lambda point: _velocity(denoiser, point, *place, coordinate, condition),
                point,
                probes,
                differentiable=differentiable,
            )
        if not differentiable:
            value, trace = value.detach(), trace.detach()
        return value.to(state[0].dtype), trace

    with torch.set_grad_enabled(differentiable):
        exact = method == "dopri5" or x.dtype.itemsize < 4
        state = (x.double() if exact else x) / _scale(places[0], coordinate)
        state, integral = _integrate(
            slope,
            (state, torch.zeros(len(x), dtype=torch.float64, device=x.device)),
            schedule,
            places,
            method,
            coordinate,
            rtol,
            atol,
        )
        latent = _scale(places[-1], coordinate) * state
        dimensions = math.prod(x.shape[1:])
        if coordinate == "angle":
            integral = integral + dimensions * (_log_cosine(places[0]) - _log_cosine(places[-1]))
        squares = _sum_event((latent.double() / schedule.prior_scale) ** 2)
        log_constant = math.log(2 * math.pi) / 2 + math.log(schedule.prior_scale)
        prior = -squares / 2 - dimensions * log_constant
        volume = dimensions * math.log(places[-1].signal / places[0].signal)
        return LogLikelihood(
            log_prob=prior + volume + integral,
            prior_log_prob=prior,
            divergence_integral=integral,
            latent=latent.to(x.dtype),
            num_evaluations=evaluations,
        )


def _log_cosine(place: _Place) -> float:
    """log cos arctan σ."""
    return math.log(place.signal / math.hypot(place.signal, place.noise))


def _draw_probes(
    x: Tensor, num_probes: int, probe: str, generator: torch.Generator | None
) -> Tensor:
    shape = (num_probes, *x.shape)
    if probe == "gaussian":
        return torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    signs = torch.randint(0, 2, shape, device=x.device, generator=generator)
    return (2 * signs - 1).to(x.dtype)
