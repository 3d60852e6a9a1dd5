"""The partition function by annealed importance sampling, in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kexue.generative.energy.chain import (
    EnergyFunction,
    Point,
    _check_states,
    _drift,
    _normal,
    _squared_norm,
    _working_dtype,
    energy_and_grad,
    metropolis_choice,
)

__all__ = ["DiagonalNormal", "LogPartitionEstimate", "UniformBox", "ais_log_partition"]

_DIRECTIONS = ("forward", "reverse")


@runtime_checkable
class Base(Protocol):
    """A density with log Z = 0 that can be sampled exactly."""

    def sample(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


class DiagonalNormal:
    """A normal distribution with independent entries.

    Parameters
    ----------
    mean : Tensor, shape (*sample)
        Means.
    std : float or Tensor, shape (*sample)
        Standard deviations, positive.

    Raises
    ------
    ValueError
        For deviations that are not positive, of another shape, or values that are not finite.

    Examples
    --------
    >>> normal = DiagonalNormal(torch.zeros(2), 1.0)
    >>> normal.log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    >>> normal.sample((5,)).shape
    torch.Size([5, 2])
    """

    def __init__(self, mean: Float[Tensor, "*sample"], std: float | Tensor) -> None:
        dtypes = [one.dtype for one in (mean, torch.as_tensor(std))]
        if not mean.is_floating_point() or dtypes[1].is_complex:
            raise ValueError(f"mean and std must be real tensors, got {dtypes[0]}, {dtypes[1]}")
        self.mean = mean
        std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
        if std.ndim and std.shape != mean.shape:
            raise ValueError(
                f"std must be a number or have the shape of mean, {tuple(mean.shape)}, "
                f"got {tuple(std.shape)}"
            )
        self.std = std.expand_as(mean)
        if not bool((mean.isfinite() & (self.std > 0) & self.std.isfinite()).all()):
            raise ValueError("mean must be finite and std positive and finite in every entry")

    def sample(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """Return independent draws, shape (*shape, *sample)."""
        like = self.mean.expand(*shape, *self.mean.shape)
        return torch.addcmul(like, self.std, _normal(like, generator))

    def log_prob(self, x: Float[Tensor, " batch *sample"]) -> Float[Tensor, " batch"]:
        """Return the log-density of each example, at least in float32."""
        _check_event(x, self.mean)
        std = self.std.to(_working_dtype(self.std.dtype))
        standard = (x.to(_working_dtype(x.dtype)) - self.mean) / std
        constant = std.log().sum() + self.mean.numel() / 2 * math.log(2 * math.pi)
        return -_squared_norm(standard) / 2 - constant


class UniformBox:
    """The uniform distribution in a box.

    Parameters
    ----------
    low, high : Tensor, shape (*sample)
        Corners of the box.

    Raises
    ------
    ValueError
        For corners of different shapes, or a box without volume.

    Examples
    --------
    >>> box = UniformBox(torch.zeros(2), torch.full((2,), 2.0))
    >>> box.log_prob(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    tensor([-1.3863,    -inf])
    """

    def __init__(self, low: Float[Tensor, "*sample"], high: Float[Tensor, "*sample"]) -> None:
        if not (low.is_floating_point() and high.is_floating_point()):
            raise ValueError(f"low and high must be real tensors, got {low.dtype}, {high.dtype}")
        if low.shape != high.shape or not bool(((high - low) > 0).all()):
            raise ValueError(
                "low and high must have one shape, and low be below high in every entry, got "
                f"shapes {tuple(low.shape)} and {tuple(high.shape)}"
            )
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError("low and high must be finite")
        self.low = low
        self.high = high

    def sample(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """Return independent draws, shape (*shape, *sample)."""
        uniform = torch.rand(
            (*shape, *self.low.shape),
            dtype=self.low.dtype,
            device=self.low.device,
            generator=generator,
        )
        return torch.addcmul(self.low, self.high - self.low, uniform)

    def log_prob(self, x: Float[Tensor, " batch *sample"]) -> Float[Tensor, " batch"]:
        """Return the log-density of each example, at least in float32: minus infinity outside."""
        _check_event(x, self.low)
        inside = (x >= self.low) & (x <= self.high)
        inside = inside.flatten(1).all(1) if inside.ndim > 1 else inside
        wide = _working_dtype(self.low.dtype)
        height = -(self.high.to(wide) - self.low.to(wide)).log().sum()
        return torch.where(inside, height, -math.inf)


@dataclass(frozen=True)
class LogPartitionEstimate:
    """An estimate of log Z.

    Attributes
    ----------
    log_z : Tensor, shape ()
        Below log Z on average ("forward"), above it ("reverse").
    standard_error : Tensor, shape ()
        Of ``log_z``, by the delta method.
    effective_sample_size : Tensor, shape ()
        (Σw)²/Σw².
    log_weights : Tensor, shape (chains,), float64
        Log importance weights.
    samples : Tensor, shape (chains, *sample)
        Where the chains ended.

    Examples
    --------
    >>> base = DiagonalNormal(torch.zeros(2), 1.0)
    >>> estimate = ais_log_partition(lambda x: x.square().sum(1) / 2, base, num_chains=10,
    ...                              num_temperatures=1)
    >>> estimate.log_z  # log 2π: the base is the model
    tensor(1.8379, dtype=torch.float64)
    """

    log_z: Float64[Tensor, ""]
    standard_error: Float64[Tensor, ""]
    effective_sample_size: Float64[Tensor, ""]
    log_weights: Float64[Tensor, " chains"]
    samples: Float[Tensor, " chains *sample"]


def ais_log_partition(
    energy: EnergyFunction,
    base: Base,
    *,
    num_chains: int,
    num_temperatures: int,
    step_size: float = 0.1,
    num_mcmc_steps: int = 1,
    betas: Float[Tensor, " temperatures"] | Sequence[float] | None = None,
    direction: str = "forward",
    samples: Float[Tensor, " chains *sample"] | None = None,
    generator: torch.Generator | None = None,
) -> LogPartitionEstimate:
    r"""Estimate log Z of an energy along a path from a base density.

    The path :math:`\log f_\beta = (1-\beta) \log q_0 - \beta U` leads from the base to the model.
    A chain starts in the base, and at each :math:`\beta_k`, before a Metropolis-adjusted Langevin
    move that leaves :math:`f_{\beta_k}` as it is,

    .. math:: \log w \mathrel{+}= (\beta_k - \beta_{k-1}) \big(-U(x) - \log q_0(x)\big).

    E[w] = Z, so the mean over chains is unbiased, and its logarithm lies below log Z on average: a
    likelihood computed with it is overstated. Backwards, from exact samples of the model, the same
    bounds log Z from above. The base must be at least as wide as the model.

    Parameters
    ----------
    energy : callable
        (batch, *sample) -> (batch,).
    base : DiagonalNormal, UniformBox, or of the same kind
        ``sample(shape, generator)`` and ``log_prob(x)``. In a box, Z is the integral over the box.
    num_chains : int
        Number of independent weights.
    num_temperatures : int
        Number of steps from the base to the model.
    step_size : float
        Of the moves.
    num_mcmc_steps : int
        Moves at each temperature; 0 with one temperature is plain importance sampling.
    betas : Tensor or sequence, optional
        Strictly increasing from 0 to 1, instead of ``num_temperatures`` even steps.
    direction : {"forward", "reverse"}
        From the base, or back to it.
    samples : Tensor, shape (num_chains, *sample), optional
        Exact samples of the model, for "reverse".
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    LogPartitionEstimate
        log Z with its standard error, the weights, and where the chains ended.

    Raises
    ------
    ValueError
        For sizes out of range, betas that do not increase from 0 to 1, an unknown direction,
        "reverse" without samples, with another number of them, or with some that are not finite.
    FloatingPointError
        Where the energy of a chain's state is NaN.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> base = DiagonalNormal(torch.zeros(1, dtype=torch.float64), 2.0)
    >>> estimate = ais_log_partition(
    ...     lambda x: (x[:, 0] ** 2 - 1) ** 2, base, num_chains=500, num_temperatures=50,
    ...     generator=generator,
    ... )
    >>> bool((estimate.log_z - 0.679926).abs() < 4 * estimate.standard_error)
    True
    """
    if min(num_chains, num_temperatures) < 1 or num_mcmc_steps < 0:
        raise ValueError(
            "num_chains and num_temperatures must be at least 1 and num_mcmc_steps at least 0, "
            f"got {num_chains}, {num_temperatures} and {num_mcmc_steps}"
        )
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {step_size}")
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(_DIRECTIONS)}, got {direction!r}")
    path = _path(betas, num_temperatures)
    if direction == "forward":
        x = base.sample((num_chains,), generator)
    elif samples is None:
        raise ValueError("direction 'reverse' needs exact samples of the model, got none")
    elif len(samples) != num_chains:
        raise ValueError(f"samples must hold num_chains = {num_chains} of them, got {len(samples)}")
    else:
        _check_states(samples, "samples")
        if not bool(samples.isfinite().all()):
            raise ValueError("samples must be finite, got NaN or infinity among them")
        x = samples.detach()

    given = x.dtype

    def evaluate(x: Tensor) -> _Place:
        """Half precision is kept in float32 between the calls of the energy."""
        value, gradient = energy_and_grad(energy, x.to(given))
        value, gradient = value.to(_working_dtype(value.dtype)), gradient.to(x.dtype)
        return _Place(x, value, gradient, *energy_and_grad(base.log_prob, x))

    place = evaluate(x.to(_working_dtype(given)))
    log_weights = torch.zeros(num_chains, dtype=torch.float64, device=x.device)
    steps = list(pairwise(path))
    if direction == "forward":
        for before, after in steps:
            log_weights += (after - before) * place.log_ratio()
            place = _moved(evaluate, place, after, step_size, num_mcmc_steps, generator)
    else:
        for before, after in reversed(steps):
            place = _moved(evaluate, place, after, step_size, num_mcmc_steps, generator)
            log_weights -= (after - before) * place.log_ratio()
    if bool(log_weights.isnan().any()):
        raise FloatingPointError("the energy must be a number wherever chains go, got NaN")
    sign = 1 if direction == "forward" else -1
    return _estimate(log_weights, place.state.to(given), sign=sign)


@dataclass(frozen=True)
class _Place:
    """A state, and all that a step at any β needs to know of it."""

    state: Tensor
    energy: Tensor
    energy_gradient: Tensor
    log_base: Tensor
    base_gradient: Tensor

    def log_ratio(self) -> Tensor:
        return -self.energy.double() - self.log_base.double()

    def at(self, beta: float) -> Point:
        # Outside of the base's support no β leads anywhere, not even 1: 0 · ∞ is no density.
        base = torch.where(self.log_base.isneginf(), self.log_base, (1 - beta) * self.log_base)
        gradient = beta * self.energy_gradient - (1 - beta) * self.base_gradient
        return Point(self.state, beta * self.energy - base, gradient)


def _moved(
    evaluate: Callable[[Tensor], _Place],
    place: _Place,
    beta: float,
    step_size: float,
    steps: int,
    generator: torch.Generator | None,
) -> _Place:
    for _ in range(steps):
        here = place.at(beta)
        proposed = _drift(here, step_size)
        proposed = proposed.add_(_normal(proposed, generator), alpha=math.sqrt(step_size))
        there = evaluate(proposed)
        _, moves = metropolis_choice(here, there.at(beta), step_size, generator=generator)
        place = _Place(
            *(
                torch.where(moves.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(_fields(there), _fields(place), strict=True)
            )
        )
    return place


def _fields(place: _Place) -> tuple[Tensor, ...]:
    return (
        place.state,
        place.energy,
        place.energy_gradient,
        place.log_base,
        place.base_gradient,
    )


def _estimate(log_weights: Tensor, samples: Tensor, *, sign: int) -> LogPartitionEstimate:
    """Mean of the weights in logarithms, its relative error, and how many weights really count."""
    count = len(log_weights)
    scaled = (log_weights - log_weights.max()).exp()
    mean = scaled.mean()
    deviation = scaled.std() if count > 1 else scaled.new_full((), math.nan)
    return LogPartitionEstimate(
        log_z=sign * (log_weights.logsumexp(0) - math.log(count)),
        standard_error=deviation / (math.sqrt(count) * mean),
        effective_sample_size=scaled.sum().square() / scaled.square().sum(),
        log_weights=log_weights,
        samples=samples,
    )


def _path(betas: Tensor | Sequence[float] | None, num_temperatures: int) -> list[float]:
    if betas is None:
        return [k / num_temperatures for k in range(num_temperatures + 1)]
    path = [float(beta) for beta in betas]
    increasing = all(a < b for a, b in pairwise(path))
    if len(path) < 2 or path[0] != 0 or path[-1] != 1 or not increasing:
        raise ValueError(f"betas must increase strictly from 0 to 1, got {path}")
    return path


def _check_event(x: Tensor, like: Tensor) -> None:
    if x.shape[1:] != like.shape or x.ndim == 0:
        raise ValueError(
            f"x must have shape (batch, {', '.join(map(str, like.shape))}), got {tuple(x.shape)}"
        )
