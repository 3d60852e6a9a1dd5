"""Langevin chains of an energy, plain or with Metropolis' correction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from kexue._autograd import outside_inference_mode

__all__ = ["ChainResult", "energy_and_grad", "langevin_sample"]

EnergyFunction: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ChainResult:
    """Where the chains ended.

    Attributes
    ----------
    samples : Tensor, shape (batch, *sample)
        Their last states.
    acceptance_rate : Tensor, shape (batch,)
        Share of accepted proposals; ones without the Metropolis correction.
    energies : Tensor, shape (batch,)
        U at the samples, at least in float32.
    trajectory : Tensor, shape (num_steps + 1, batch, *sample), or None
        All states, from the first, where it was asked for.

    Examples
    --------
    >>> chains = langevin_sample(lambda x: x.square().sum(1) / 2, torch.zeros(3, 2),
    ...                          step_size=0.1, num_steps=5)
    >>> chains.samples.shape, chains.acceptance_rate
    (torch.Size([3, 2]), tensor([1., 1., 1.]))
    """

    samples: Float[Tensor, " batch *sample"]
    acceptance_rate: Float[Tensor, " batch"]
    energies: Float[Tensor, " batch"]
    trajectory: Float[Tensor, " steps batch *sample"] | None


@outside_inference_mode
def energy_and_grad(
    energy: EnergyFunction, x: Float[Tensor, " batch *sample"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch *sample"]]:
    """Return U and its gradient in x, both detached.

    Parameters and their ``.grad``, and x itself, stay as they are, also under ``torch.no_grad`` and
    ``torch.inference_mode``.
    An energy with batch norm couples the examples of a batch, and so the chains.

    Parameters
    ----------
    energy : callable
        (batch, *sample) -> (batch,), differentiable in its argument.
    x : Tensor, shape (batch, *sample)
        Where to evaluate it.

    Returns
    -------
    (Tensor, Tensor)
        Energies (batch,) and gradients (batch, *sample).

    Raises
    ------
    ValueError
        Where x is no real tensor with a batch dimension, or the energy gives another shape.

    Examples
    --------
    >>> energy_and_grad(lambda x: x.square().sum(1) / 2, torch.tensor([[3.0, 4.0]]))
    (tensor([12.5000]), tensor([[3., 4.]]))
    """
    _check_states(x, "x")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = energy(leaf)
        _check_energies(value, x)
        if not value.requires_grad:  # a constant pulls nowhere
            return value.detach(), torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return value.detach(), torch.zeros_like(x) if gradient is None else gradient


def langevin_sample(
    energy: EnergyFunction,
    x: Float[Tensor, " batch *sample"],
    *,
    step_size: float,
    num_steps: int,
    temperature: float = 1.0,
    noise_std: float | None = None,
    metropolis: bool = False,
    clamp: tuple[float, float] | None = None,
    max_grad_norm: float | None = None,
    return_trajectory: bool = False,
    generator: torch.Generator | None = None,
) -> ChainResult:
    r"""Run a Langevin chain from every row of x.

    .. math:: x' = x - \tfrac{\varepsilon}{2} \nabla U(x) + \sqrt{\varepsilon T}\, n, \qquad
        n \sim \mathcal N(0, I),

    samples :math:`e^{-U/T}` in the limit of small steps. For :math:`U = x^\top P x/2` the plain
    chain has the covariance :math:`T [P(I - \varepsilon P/4)]^{-1}`, and diverges where
    :math:`\varepsilon \ge 4/\lambda_{\max}`; for energies that grow faster it diverges from far
    enough away at any step. With ``metropolis`` the step is a proposal, and exact at every size.

    The energy is called ``num_steps + 1`` times. Each step draws its normal numbers, then, with
    ``metropolis``, its uniform ones.

    Parameters
    ----------
    energy : callable
        (batch, *sample) -> (batch,).
    x : Tensor, shape (batch, *sample)
        First states. Half precision is kept in float32 between the calls of the energy.
    step_size : float
        ε, positive.
    num_steps : int
        Number of steps, from 0.
    temperature : float
        T; 1 samples the model, 0 descends the gradient.
    noise_std : float, optional
        Standard deviation of the noise instead of :math:`\sqrt{\varepsilon T}`. The law is then
        that of the temperature :math:`\sigma^2/\varepsilon`, and T is not used.
    metropolis : bool
        Accept or reject each step (MALA).
    clamp : (float, float), optional
        Range that each state is clamped to.
    max_grad_norm : float, optional
        Bound on the norm of each example's gradient.
    return_trajectory : bool
        Keep all states.
    generator : torch.Generator, optional
        Source of randomness, on the device of x.

    Returns
    -------
    ChainResult
        Last states, acceptance rates, energies.

    Raises
    ------
    ValueError
        For sizes out of range, states that are not finite, an energy of another shape, and
        ``metropolis`` together with anything that its ratio does not know: ``clamp``,
        ``max_grad_norm``, ``noise_std`` or temperature 0.
    FloatingPointError
        Where a chain ends in no finite number: the step was too large.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> chains = langevin_sample(
    ...     lambda x: x.square().sum(1) / 2, torch.zeros(4000, 1), step_size=1.0, num_steps=50,
    ...     generator=generator,
    ... )
    >>> bool((chains.samples.var() - 4 / 3).abs() < 0.12)  # 1/(1 - ε/4), and not 1
    True
    """
    _check_states(x, "x")
    _check_options(step_size, num_steps, temperature, noise_std, clamp, max_grad_norm)
    plain = noise_std is None and clamp is None and max_grad_norm is None and temperature > 0
    if metropolis and not plain:
        raise ValueError(
            "metropolis correction needs the plain kernel: no clamp, max_grad_norm or noise_std "
            f"and a positive temperature, got {clamp}, {max_grad_norm}, {noise_std} and "
            f"{temperature}"
        )
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, got NaN or infinity among the first states")
    deviation = math.sqrt(step_size * temperature) if noise_std is None else noise_std
    given = x.dtype
    state = x.detach().to(_working_dtype(given))

    def evaluate(state: Tensor) -> Point:
        value, gradient = energy_and_grad(energy, state.to(given))
        value, gradient = value.to(_working_dtype(value.dtype)), gradient.to(state.dtype)
        if max_grad_norm is not None:
            gradient = _bounded(gradient, max_grad_norm)
        return Point(state, value, gradient)

    point = evaluate(state)
    accepted = torch.zeros_like(point.energy)
    trajectory = [point.state]
    for _ in range(num_steps):
        moved = _drift(point, step_size)
        if deviation > 0:
            moved = moved.add_(_normal(moved, generator), alpha=deviation)
        if clamp is not None:
            moved = moved.clamp_(*clamp)
        proposal = evaluate(moved)
        if metropolis:
            point, moves = metropolis_choice(
                point, proposal, step_size, temperature, generator=generator
            )
            accepted += moves
        else:
            point = proposal
        if return_trajectory:
            trajectory.append(point.state)
    if not bool(point.state.isfinite().all() & point.energy.isfinite().all()):
        advice = "" if metropolis else ", or use metropolis=True"
        raise FloatingPointError(f"the chain diverged: reduce step_size, got {step_size}{advice}")
    rate = accepted / num_steps if metropolis and num_steps else torch.ones_like(point.energy)
    return ChainResult(
        samples=point.state.to(given, copy=num_steps == 0),
        acceptance_rate=rate,
        energies=point.energy,
        trajectory=torch.stack(trajectory).to(given) if return_trajectory else None,
    )


class Point(NamedTuple):
    """A state with the energy and the gradient that are known of it."""

    state: Tensor
    energy: Tensor
    gradient: Tensor


def metropolis_choice(
    point: Point,
    proposal: Point,
    step_size: float,
    temperature: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Point, Tensor]:
    r"""Accept each proposal of a Langevin step with the probability that makes it exact.

    .. math:: \log\alpha = \frac{U(x) - U(y)}{T} + \log r(x \mid y) - \log r(y \mid x), \qquad
        r(y \mid x) = \mathcal N(y; x - \tfrac\varepsilon2 \nabla U(x), \varepsilon T).

    A proposal without a finite energy is rejected.
    """

    def squared_distance(to: Point, start: Point) -> Tensor:
        return _squared_norm(to.state - _drift(start, step_size))

    forth, back = squared_distance(proposal, point), squared_distance(point, proposal)
    log_ratio = (point.energy - proposal.energy) / temperature + (forth - back).to(
        point.energy.dtype
    ) / (2 * step_size * temperature)
    uniform = torch.rand(
        log_ratio.shape, dtype=log_ratio.dtype, device=log_ratio.device, generator=generator
    )
    moves = (uniform.log() < log_ratio) & proposal.energy.isfinite()

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(moves.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return Point(*(chosen(new, old) for new, old in zip(proposal, point, strict=True))), moves


def _drift(point: Point, step_size: float) -> Tensor:
    return torch.sub(point.state, point.gradient, alpha=step_size / 2)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _squared_norm(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1) if x.ndim > 1 else x.square()


def _bounded(gradient: Tensor, most: float) -> Tensor:
    def over_sample(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (gradient.ndim - 1))

    # In units of the largest entry, whose square may be too large for a number.
    peak = gradient.abs().flatten(1).amax(1) if gradient.ndim > 1 else gradient.abs()
    peak = peak.clamp(min=torch.finfo(gradient.dtype).tiny)
    unit = gradient / over_sample(peak)
    norm = _squared_norm(unit).sqrt()
    return torch.where(over_sample(norm > most / peak), unit * over_sample(most / norm), gradient)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _check_states(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a real tensor of shape (batch, *sample), got {kind}")


def _check_energies(value: Tensor, x: Tensor) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != (len(x),):
        raise ValueError(
            f"the energy must give one number an example, shape ({len(x)},) for x of shape "
            f"{tuple(x.shape)}, got {shape}"
        )


def _check_options(
    step_size: float,
    num_steps: int,
    temperature: float,
    noise_std: float | None,
    clamp: tuple[float, float] | None,
    max_grad_norm: float | None,
) -> None:
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {step_size}")
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if noise_std is not None and not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std must be at least 0 and finite, got {noise_std}")
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be an increasing pair, got {clamp}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
