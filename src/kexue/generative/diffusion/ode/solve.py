"""Solving the flow between two times: sampling, encoding and decoding.

In y and σ Euler's method on any grid is DDIM without noise, and Heun's on the default grid is EDM's
deterministic sampler. The step into time 0 is always x̂_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import Denoiser, _check_state
from kexue.generative.diffusion.ode.flow import (
    _COORDINATES,
    _check_choice,
    _Place,
    _places,
    _scale,
    _velocity,
)
from kexue.generative.diffusion.ode.integrate import dopri5, euler, heun
from kexue.generative.diffusion.schedule.base import NoiseSchedule

__all__ = ["decode", "encode", "solve_ode"]

_METHODS = ("euler", "heun", "dpm_solver_2m", "dopri5")
# Exponent of the grid in sigma: Karras et al., arXiv 2206.00364.
_RHO = 7.0


@torch.no_grad()
def solve_ode(
    denoiser: Denoiser,
    x: Float[Tensor, " batch *event"],
    *,
    start: float | None = None,
    end: float | None = None,
    method: Literal["euler", "heun", "dpm_solver_2m", "dopri5"] = "heun",
    coordinate: Literal["sigma", "angle"] = "sigma",
    num_steps: int = 18,
    times: Float[Tensor, " length"] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    condition: Tensor | None = None,
) -> Float[Tensor, " batch *event"]:
    """Follow the flow from one time to another, in either direction, without gradient.

    Evaluations of the denoiser: ``num_steps`` for "euler" and "dpm_solver_2m", twice that for
    "heun", which saves one where the last step goes into time 0. Compare methods at equal
    evaluations, and the answer with that of doubled steps.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    x : Tensor, shape (batch, *event)
        State at ``start``, in the schedule's own scaling.
    start, end : float
        Times; ``start`` is positive, ``end`` may be 0 except for "dopri5".
    method : {"euler", "heun", "dpm_solver_2m", "dopri5"}
        "dpm_solver_2m" is DPM-Solver++(2M), in sigma only; "dopri5" chooses its own steps, in
        log σ or the angle, with a state of float64.
    coordinate : {"sigma", "angle"}
        What is integrated, and how the default grid is spaced: equally in σ^{1/7} (for end 0
        down to the schedule's minimum time in all steps but the last), or in the root of the
        angle.
    num_steps : int
        Steps of the default grid.
    times : Tensor, shape (length,), optional
        Strictly monotone times, instead of ``start``, ``end`` and ``num_steps``.
    rtol, atol : float
        Tolerances of "dopri5".
    condition : Tensor, optional
        Passed to the denoiser.

    Returns
    -------
    Tensor, shape (batch, *event)
        State at ``end``, in the schedule's own scaling and the dtype of x.

    Raises
    ------
    ValueError
        For unknown methods or coordinates, "dpm_solver_2m" along the angle, times that are not
        monotone, not positive where they must be, or beyond the schedule.

    Examples
    --------
    >>> from kexue.generative.diffusion import GaussianMixtureDenoiser, HeatSchedule
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.ones(1), schedule=HeatSchedule()
    ... )
    >>> solve_ode(denoiser, torch.tensor([[1.0]]), start=0.01, end=3.0)  # sqrt(10)
    tensor([[3.1...]])
    """
    _check_state(x)
    _check_choice("method", method, _METHODS)
    _check_choice("coordinate", coordinate, _COORDINATES)
    if method == "dpm_solver_2m" and coordinate == "angle":
        raise ValueError("method dpm_solver_2m must be used with coordinate 'sigma', got 'angle'")
    schedule = denoiser.schedule
    if times is not None:
        grid = _checked_times(schedule, times)
    else:
        grid = _default_times(schedule, start, end, num_steps, coordinate)
    if method == "dopri5" and grid[-1] == 0:
        raise ValueError(
            "end must be positive for the method 'dopri5', whose coordinates end above time 0, "
            "got 0; decode to the schedule's minimum_time instead"
        )
    into_zero = bool(grid[-1] == 0)
    places = _places(schedule, grid[:-1] if into_zero else grid)

    # Half precision is for the network: a sum of many small steps would lose them.
    exact = method == "dopri5" or x.dtype.itemsize < 4
    state = (x.double() if exact else x) / _scale(places[0], coordinate)
    if method == "dpm_solver_2m":
        state = _dpm_solver_2m(denoiser, state, places, x.dtype, condition)
    else:

        def velocity(state: Tensor, place: _Place) -> Tensor:
            return _velocity(denoiser, state.to(x.dtype), *place, coordinate, condition)

        state = _integrate(velocity, state, schedule, places, method, coordinate, rtol, atol)
    state = (_scale(places[-1], coordinate) * state).to(x.dtype)
    if into_zero:
        clean = denoiser.predict(state, places[-1].time, condition=condition).sample
        return float(schedule.signal_scale(0.0)) * clean
    return state


def encode(
    denoiser: Denoiser,
    x: Float[Tensor, " batch *event"],
    *,
    start: float | None = None,
    **options: Any,
) -> Float[Tensor, " batch *event"]:
    """Follow the flow from data to its latent code at the largest time.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    x : Tensor, shape (batch, *event)
        Data, at the noise level of ``start``.
    start : float, optional
        Positive time; the schedule's ``minimum_time`` by default.
    **options
        Further arguments of `solve_ode`.

    Returns
    -------
    Tensor, shape (batch, *event)
        For data of the model close to N(0, prior_scale² I).

    Raises
    ------
    ValueError
        As `solve_ode`.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.tensor([[0.0, 3.0]]), torch.tensor([0.5]), schedule=DiscreteSchedule.cosine()
    ... )
    >>> data = torch.tensor([[0.2, 3.1]])
    >>> options = {"coordinate": "angle", "num_steps": 50}
    >>> again = decode(denoiser, encode(denoiser, data, **options), end=1.0, **options)
    >>> bool((again - data).abs().max() < 1e-3)
    True
    """
    start = denoiser.schedule.minimum_time if start is None else start
    return solve_ode(
        denoiser, x, **{"start": start, "end": denoiser.schedule.maximum_time, **options}
    )


def decode(
    denoiser: Denoiser,
    latent: Float[Tensor, " batch *event"],
    *,
    end: float = 0.0,
    **options: Any,
) -> Float[Tensor, " batch *event"]:
    """Follow the flow from a latent code at the largest time to data.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    latent : Tensor, shape (batch, *event)
        Codes: drawn from N(0, prior_scale² I), from `encode`, or between two of them.
    end : float
        Time to stop at.
    **options
        Further arguments of `solve_ode`.

    Returns
    -------
    Tensor, shape (batch, *event)

    Raises
    ------
    ValueError
        As `solve_ode`.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.tensor([[0.0, 3.0]]), torch.tensor([0.01]), schedule=DiscreteSchedule.linear()
    ... )
    >>> decode(denoiser, torch.zeros(1, 2)).round(decimals=1).abs()
    tensor([[0., 3.]])
    """
    return solve_ode(
        denoiser, latent, **{"start": denoiser.schedule.maximum_time, "end": end, **options}
    )


def _integrate(
    slope: Callable[[Any, _Place], Any],
    state: Any,
    schedule: NoiseSchedule,
    places: list[_Place],
    method: str,
    coordinate: str,
    rtol: float,
    atol: float,
) -> Any:
    """Integrate a slope of (state, place) along the coordinate through these places."""
    if method == "dopri5":
        return _integrate_adaptively(slope, state, schedule, places, coordinate, rtol, atol)
    if coordinate == "sigma":
        grid = [place.sigma for place in places]
    else:
        grid = [math.atan2(place.noise, place.signal) for place in places]
    at = dict(zip(grid, places, strict=True))
    integrator = euler if method == "euler" else heun
    return integrator(lambda state, position: slope(state, at[position]), state, grid)


def _integrate_adaptively(
    slope: Callable[[Any, _Place], Any],
    state: Any,
    schedule: NoiseSchedule,
    places: list[_Place],
    coordinate: str,
    rtol: float,
    atol: float,
) -> Any:
    ends = (places[0].sigma, places[-1].sigma)

    def at(sigma: float) -> _Place:
        # The way through tangent or exponential may leave the interval by a rounding error.
        time = schedule.time_from_sigma(min(max(sigma, min(ends)), max(ends)))
        return _places(schedule, time.reshape(1))[0]

    if coordinate == "angle":
        start, end = (math.atan(sigma) for sigma in ends)
        return dopri5(
            lambda state, angle: slope(state, at(math.tan(angle))),
            state,
            start,
            end,
            rtol=rtol,
            atol=atol,
        )

    def by_log_sigma(state: Any, log_sigma: float) -> Any:
        place = at(math.exp(log_sigma))
        rate = slope(state, place)
        if isinstance(rate, tuple):
            return tuple(place.sigma * part for part in rate)
        return place.sigma * rate

    start, end = (math.log(sigma) for sigma in ends)
    return dopri5(by_log_sigma, state, start, end, rtol=rtol, atol=atol)


def _dpm_solver_2m(
    denoiser: Denoiser,
    state: Tensor,
    places: list[_Place],
    dtype: torch.dtype,
    condition: Tensor | None,
) -> Tensor:
    """Solve in data prediction: x̂_0 is extrapolated linearly in −log σ from the last two."""
    previous, last_step = None, math.nan
    for here, there in pairwise(places):
        if here.sigma == there.sigma:  # a step of nothing leaves no slope to extrapolate
            continue
        scaled = (here.signal * state).to(dtype)
        clean = denoiser.predict(scaled, here.time, condition=condition).sample.to(state)
        step = math.log(here.sigma / there.sigma)
        target = clean
        if previous is not None:
            target = torch.lerp(previous, clean, 1 + step / (2 * last_step))
        state = torch.add(math.exp(-step) * state, target, alpha=-math.expm1(-step))
        previous, last_step = clean, step
    return state


def _checked_times(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    if isinstance(times, Tensor) and times.is_complex():
        raise ValueError(f"times must be real, got dtype {times.dtype}")
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times must be a list of at least two, got shape {tuple(grid.shape)}")
    differences = grid.diff()
    if not bool((differences > 0).all() | (differences < 0).all()):
        raise ValueError(f"times must be strictly monotone, got {grid.tolist()}")
    if not grid[0] > 0:
        raise ValueError(f"the first of times must be positive, got {grid[0].item()}")
    return schedule._check_time(grid)


def _default_times(
    schedule: NoiseSchedule,
    start: float | None,
    end: float | None,
    num_steps: int,
    coordinate: str,
) -> Tensor:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if start is None or end is None:
        raise ValueError(f"start and end must be given without times, got {start} and {end}")
    if not start > 0:
        raise ValueError(f"start must be positive, there is no noise at time 0, got {start}")
    if start == end:
        raise ValueError(f"start and end must differ for a monotone grid, got {start} twice")
    first, last = schedule._check_time(start), schedule._check_time(end)
    if last == 0 and coordinate == "sigma":
        positive = torch.as_tensor(schedule.minimum_time, dtype=torch.float64)
        if num_steps == 1 or first <= positive:
            return torch.stack([first, last])
        spaced = _spaced_times(schedule, first, positive, num_steps - 1, coordinate)
        return torch.cat([spaced, last.reshape(1)])
    return _spaced_times(schedule, first, last, num_steps, coordinate)


def _spaced_times(
    schedule: NoiseSchedule, first: Tensor, last: Tensor, num_steps: int, coordinate: str
) -> Tensor:
    """Return times equally spaced in σ^{1/7}, or in the root of the angle."""
    sigmas = schedule.sigma(torch.stack([first, last]))
    fraction = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if coordinate == "sigma":
        begin, finish = sigmas ** (1 / _RHO)
        between = (begin + fraction * (finish - begin)) ** _RHO
    else:
        begin, finish = torch.atan(sigmas).sqrt()
        between = torch.tan((begin + fraction * (finish - begin)) ** 2)
    times = schedule.time_from_sigma(between.clamp(sigmas.min(), sigmas.max()))
    # The way through sigma and back rounds; the ends are known.
    times[0], times[-1] = first, last
    return times
