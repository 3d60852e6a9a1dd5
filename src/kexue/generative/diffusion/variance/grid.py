"""Where a given number of steps is spent best, by dynamic programming over a table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.sampling import _weights
from kexue.generative.diffusion.schedule.discrete import DiscreteSchedule
from kexue.generative.diffusion.variance.clean import TabulatedVariance

__all__ = ["OptimalTimes", "optimal_times"]

_CHUNK = 2**18  # numbers at a time


class OptimalTimes(NamedTuple):
    """A grid of times and what its transitions cost.

    Attributes
    ----------
    times : Tensor, shape (num_steps + 1,)
        Decreasing, the last is 0: goes straight into `sample` and `variational_bound`.
    cost : Tensor, shape ()
        Contribution of the transitions to the bound in nats per entry, up to a constant.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> table = TabulatedVariance(
    ...     torch.tensor([1.0, 1000.0]), torch.tensor([1e-5, 0.3]),
    ...     schedule=DiscreteSchedule.linear(),
    ... )
    >>> optimal_times(table, 2)
    OptimalTimes(times=tensor([1000.,    1.,    0.], dtype=torch.float64), cost=tensor(...))
    """

    times: Float[Tensor, " length"]
    cost: Float[Tensor, ""]


def optimal_times(
    table: TabulatedVariance,
    num_steps: int,
    *,
    grid: Float[Tensor, " candidates"] | None = None,
    eta: float = 1.0,
) -> OptimalTimes:
    """Return the grid of ``num_steps`` steps on which the bound is smallest.

    Up to a constant the bound of a grid is the sum over its transitions t → s of the mean over
    entries of ½ log((σ² + λ² σ̄_t²)/σ²), where σ̄_t² is the clean variance. Sums are minimised
    exactly. Takes O(num_steps · candidates²) time and O(candidates²) memory.

    On quantised data let the smallest candidate be the time where the noise is about half a bin:
    every grid ends there before 0, and a time far below costs bits.

    Parameters
    ----------
    table : TabulatedVariance
        Clean variance; its range must hold all candidates.
    num_steps : int
        Steps of the result, 1 … candidates.
    grid : Tensor, shape (candidates,), optional
        Positive times to choose from, in any order; the largest and the smallest are kept.
        1, …, T by default for a `DiscreteSchedule`.
    eta : float
        Share of the posterior noise, in (0, 1].

    Returns
    -------
    OptimalTimes
        On the CPU, in float64.

    Raises
    ------
    ValueError
        For a number of steps out of range, no grid for a continuous schedule, candidates that
        repeat or lie outside the table, and ``eta`` outside (0, 1].

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> schedule = DiscreteSchedule.linear()
    >>> times = torch.arange(1.0, 1001)
    >>> spread = 1 / (1 + 1 / schedule.sigma(times) ** 2)  # clean variance of standard normal data
    >>> table = TabulatedVariance(times, spread, schedule=schedule)
    >>> optimal_times(table, 3).times[[0, 2, 3]]
    tensor([1000.,    1.,    0.], dtype=torch.float64)
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must lie in (0, 1], got {eta}")
    candidates = _candidates(table, grid)
    count = len(candidates)
    if not 1 <= num_steps <= count:
        raise ValueError(f"num_steps must lie in 1…{count}, the length of grid, got {num_steps}")
    costs = _transition_costs(table, candidates, eta)

    # After k of K transitions the chain is at a candidate from K − k to count − 1 − k: it needs
    # room for the steps before and after. `best` holds the cost of getting to each of them.
    transitions = num_steps - 1
    room = count - num_steps + 1
    best = torch.full((room,), torch.inf, dtype=torch.float64)
    best[-1] = 0.0
    earlier = []
    for low in range(transitions - 1, -1, -1):
        earlier.append(best)
        best = (costs[low : low + room, low + 1 : low + 1 + room] + best).amin(1)
    cost = best[0] if transitions else best[-1]
    # Back from the smallest candidate, asking at each where the least sum came from.
    path = [0 if transitions else room - 1]
    for low in range(transitions):
        total = costs[path[-1], low + 1 : low + 1 + room] + earlier[-1 - low]
        path.append(low + 1 + int(total.argmin()))
    times = candidates[path[::-1]]
    return OptimalTimes(torch.cat([times, times.new_zeros(1)]), cost)


def _candidates(table: TabulatedVariance, grid: Tensor | None) -> Tensor:
    if grid is None:
        if not isinstance(table.schedule, DiscreteSchedule):
            raise ValueError(
                f"grid must be given for a continuous schedule, {type(table.schedule).__name__}"
            )
        return torch.arange(1, table.schedule.num_steps + 1, dtype=torch.float64)
    candidates = torch.as_tensor(grid)
    if candidates.ndim != 1 or not len(candidates) or candidates.is_complex():
        raise ValueError(
            f"grid must be a list of real times, got {candidates.dtype} {tuple(candidates.shape)}"
        )
    candidates = candidates.to("cpu", torch.float64).sort().values
    if bool((candidates.diff() == 0).any()):
        raise ValueError(f"the times of grid must differ, got {candidates.tolist()}")
    return table.schedule._check_time(candidates, positive=True)


def _transition_costs(table: TabulatedVariance, candidates: Tensor, eta: float) -> Tensor:
    """Return the cost of going from each candidate to each smaller one, (to, from)."""
    count = len(candidates)
    variance = table.at(candidates).cpu().reshape(count, -1)
    costs = torch.full((count, count), torch.inf, dtype=torch.float64)
    rows = max(1, _CHUNK // variance.numel())
    for row in range(0, count - 1, rows):
        before, now = candidates[row : row + rows, None], candidates[row + 1 :]
        weights = _weights(table.schedule, now, before, eta)
        ratio = (weights.clean / weights.noise) ** 2
        cost = torch.log1p(ratio[..., None] * variance[row + 1 :]).mean(-1) / 2
        costs[row : row + rows, row + 1 :] = cost.where(before < now, torch.inf)
    return costs
