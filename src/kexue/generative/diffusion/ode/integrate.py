"""Integrators of ordinary differential equations, as plain functions of a velocity and a state.

A state is a tensor or a tuple of tensors, the velocity ``velocity(state, position)`` is of the same
kind, positions are numbers. Nothing here knows of diffusion.

Source: https://arxiv.org/abs/2206.00364 (Heun), Dormand and Prince (1980) through torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["dopri5", "euler", "heun"]

# Beyond this the tolerances are out of reach for the precision of the velocity.
_MOST_STEPS = 20_000

State: TypeAlias = Any
Velocity: TypeAlias = Callable[[Any, float], Any]


def euler(velocity: Velocity, state: State, grid: Sequence[float]) -> State:
    """Walk along a grid with Euler's method: first order, one evaluation a step.

    Parameters
    ----------
    velocity : callable
        ``(state, position) -> rate of change``, of the kind of the state.
    state : Tensor or tuple of Tensor
        State at ``grid[0]``.
    grid : sequence of float
        Positions, in either direction.

    Returns
    -------
    Tensor or tuple of Tensor
        State at ``grid[-1]``.

    Raises
    ------
    ValueError
        Where the grid is empty.

    Examples
    --------
    >>> euler(lambda x, position: -x, torch.ones(1), [0.0, 0.5, 1.0])
    tensor([0.2500])
    """
    _check_grid(grid)
    for here, there in pairwise(grid):
        state = _along(state, velocity(state, here), there - here)
    return state


def heun(velocity: Velocity, state: State, grid: Sequence[float]) -> State:
    """Walk along a grid with Heun's method: second order, two evaluations a step.

    Parameters
    ----------
    velocity : callable
        ``(state, position) -> rate of change``, of the kind of the state.
    state : Tensor or tuple of Tensor
        State at ``grid[0]``.
    grid : sequence of float
        Positions, in either direction.

    Returns
    -------
    Tensor or tuple of Tensor
        State at ``grid[-1]``.

    Raises
    ------
    ValueError
        Where the grid is empty.

    Examples
    --------
    >>> heun(lambda x, position: -x, torch.ones(1), [0.0, 0.5, 1.0])
    tensor([0.3906])
    """
    _check_grid(grid)
    for here, there in pairwise(grid):
        step = there - here
        slope = velocity(state, here)
        ahead = velocity(_along(state, slope, step), there)
        state = _along(_along(state, slope, step / 2), ahead, step / 2)
    return state


def dopri5(
    velocity: Velocity, state: State, start: float, end: float, *, rtol: float, atol: float
) -> State:
    """Integrate with steps chosen so that each is accurate to the tolerances.

    The error is the root mean square over the batch, the largest of those of a tuple's parts. The
    velocity is asked between ``start`` and ``end`` only, although the choice of the first step
    would try positions outside.

    Parameters
    ----------
    velocity : callable
        ``(state, position) -> rate of change``, of the kind of the state.
    state : Tensor or tuple of Tensor
        State at ``start``; float64 keeps rounding out of the choice of steps.
    start, end : float
        Positions, in either order.
    rtol, atol : float
        Relative and absolute tolerance of a step.

    Returns
    -------
    Tensor or tuple of Tensor
        State at ``end``.

    Raises
    ------
    ValueError
        Where a tolerance is not positive.
    RuntimeError
        Where no step is small enough for the tolerances, as for a velocity that is not finite.

    Examples
    --------
    >>> x = torch.ones(1, dtype=torch.float64)
    >>> dopri5(lambda x, position: -x, x, 0.0, 1.0, rtol=1e-8, atol=1e-8)
    tensor([0.3679], dtype=torch.float64)
    """
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not tolerance > 0:
            raise ValueError(f"{name} must be positive, got {tolerance}")
    first = state[0] if isinstance(state, tuple) else state
    if first.numel() == 0:
        return state
    from torchdiffeq import odeint

    low, high = min(start, end), max(start, end)

    def inside(position: Tensor, state: State) -> State:
        # A velocity that is not finite makes a step of NaN; from an end, as min gives it here, the
        # solver then finds no step, and the error is said in words below.
        return velocity(state, max(low, min(high, position.item())))

    ends = torch.tensor([start, end], dtype=torch.float64, device=first.device)
    # The last step ends at the end: a value interpolated from beyond it would be less accurate.
    options = {"step_t": ends[1:], "norm": _error_norm, "max_num_steps": _MOST_STEPS}
    try:
        solution = odeint(
            inside, state, ends, rtol=rtol, atol=atol, method="dopri5", options=options
        )
    except AssertionError as error:
        raise RuntimeError(
            f"no step between {start:g} and {end:g} is accurate to rtol {rtol:g} and atol {atol:g} "
            f"({error}): the velocity is not finite, or rounded more coarsely than that; "
            "take larger tolerances, a wider dtype or fixed steps"
        ) from error
    return tuple(part[-1] for part in solution) if isinstance(state, tuple) else solution[-1]


def _error_norm(state: State) -> Tensor:
    # Detached: the choice of steps must have no part in the gradient of the solution.
    parts = state if isinstance(state, tuple) else (state,)
    return torch.stack([part.detach().square().mean().sqrt() for part in parts]).max()


def _along(state: State, slope: State, step: float) -> State:
    if isinstance(state, tuple):
        return tuple(_along(part, rate, step) for part, rate in zip(state, slope, strict=True))
    return torch.add(state, slope.to(state.dtype), alpha=step)


def _check_grid(grid: Sequence[float]) -> None:
    if not len(grid):
        raise ValueError("grid must hold at least one position, got none")
