"""Transitions between any two times, and the sampler that chains them.

    x_s = κ x_t + λ x̂_0(x_t) + noise,    κ = sqrt(β̄_s² − σ²)/β̄_t,    λ = ᾱ_s − ᾱ_t κ

keeps the marginal of x_s for every σ ≤ β̄_s and every s < t, adjacent or not. σ = η σ_posterior:
η = 1 is DDPM, η = 0 is DDIM. The variance of the transition is σ² + λ² Var[x_0 | x_t]; which
estimate of the clean variance stands there is the only difference between DDPM's "small" (none),
"large" (that of standard normal data) and the analytic choices.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2010.02502.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction, _check_state
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _over_event

__all__ = ["Transition", "TransitionWeights", "reverse_transition", "sample", "transition_weights"]

CleanVariance = Callable[..., Tensor]
MeanShift = Callable[..., Tensor]
Source = torch.Generator | Sequence[torch.Generator] | None


class TransitionWeights(NamedTuple):
    """Weights of x_s = current · x_t + clean · x_0 + noise · ε.

    Attributes
    ----------
    current : Tensor
        κ, the weight of the state.
    clean : Tensor
        λ, the weight of the clean data.
    noise : Tensor
        σ, the standard deviation of fresh noise.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> weights = transition_weights(DiscreteSchedule.linear(), 500, 0)
    >>> [float(w) for w in weights]
    [0.0, 1.0, 0.0]
    """

    current: Float[Tensor, "..."]
    clean: Float[Tensor, "..."]
    noise: Float[Tensor, "..."]


class Transition(NamedTuple):
    """Mean and variance of a normal transition, per entry.

    Attributes
    ----------
    mean : Tensor, shape (batch, *event)
        κ x_t + λ x̂_0.
    variance : Tensor, shape (batch, *event)
        σ² + λ² Var[x_0 | x_t].

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 2), torch.ones(1), schedule=DiscreteSchedule.linear()
    ... )
    >>> transition = reverse_transition(denoiser, torch.ones(3, 2), 500, 250)
    >>> transition.mean.shape, transition.variance.shape
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    mean: Float[Tensor, " batch *event"]
    variance: Float[Tensor, " batch *event"]


def transition_weights(
    schedule: NoiseSchedule,
    time: float | Tensor,
    previous_time: float | Tensor,
    *,
    eta: float = 1.0,
) -> TransitionWeights:
    """Return the weights of the step from ``time`` back to ``previous_time``.

    σ_posterior² = β̄_s² (1 − σ_s²/σ_t²), where σ_s and σ_t are the noise-to-signal ratios: this
    form of β̄_s²/β̄_t² (β̄_t² − (ᾱ_t/ᾱ_s)² β̄_s²) does not cancel for neighbouring times.

    Parameters
    ----------
    schedule : NoiseSchedule
        Scales.
    time, previous_time : float or Tensor
        Time t of the state and earlier time s; tensors broadcast.
    eta : float
        Share of the posterior noise, in [0, 1]: 1 is DDPM, 0 is DDIM.

    Returns
    -------
    TransitionWeights
        κ, λ and σ in float64.

    Raises
    ------
    ValueError
        Where ``previous_time`` is not below ``time``, one of them is out of range, or ``eta`` is.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> weights = transition_weights(DiscreteSchedule.linear(), 500, 250, eta=0.0)
    >>> print(f"{weights.current:.4f} {weights.clean:.4f} {weights.noise:.4f}")
    0.7187 0.5225 0.0000
    """
    _check_eta(eta)
    now, before = schedule._check_time(time, positive=True), schedule._check_time(previous_time)
    if not bool((before < now).all()):
        raise ValueError(
            f"previous_time must be smaller than time, got previous_time {previous_time} "
            f"and time {time}"
        )
    return _weights(schedule, now, before, eta)


def _weights(schedule: NoiseSchedule, now: Tensor, before: Tensor, eta: float) -> TransitionWeights:
    """Return the weights of checked times, which broadcast; NaN where time would not go back."""
    signal, noise = schedule._scales(now)
    signal_before, noise_before = schedule._scales(before)
    log_kept = 2 * (schedule._log_sigma(before) - schedule._log_sigma(now))
    # 1 − η²(1 − kept), without a difference that cancels at η = 1.
    current = noise_before * torch.sqrt(eta**2 * log_kept.exp() + (1 - eta**2)) / noise
    removed = -torch.expm1(log_kept)
    clean = signal_before - signal * current
    return TransitionWeights(current, clean, eta * noise_before * torch.sqrt(removed))


def reverse_transition(
    denoiser: Denoiser,
    x: Float[Tensor, " batch *event"],
    time: float | Tensor,
    previous_time: float | Tensor,
    *,
    eta: float = 1.0,
    clean_variance: CleanVariance | None = None,
    condition: Tensor | None = None,
    prediction: Prediction | None = None,
) -> Transition:
    """Return mean and variance of x at ``previous_time`` given x at ``time``.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    x : Tensor, shape (batch, *event)
        State at ``time``.
    time, previous_time : float or Tensor
        One for all or one per example, ``previous_time`` the smaller.
    eta : float
        Share of the posterior noise, in [0, 1].
    clean_variance : callable, optional
        ``(x, time, prediction, condition) -> Tensor`` broadcastable to x: an estimate of
        Var[x_0 | x_t] per entry. None counts as 0. Where the denoiser clamps x̂_0, the prediction
        is the one before: only the mean is clamped.
    condition : Tensor, optional
        Passed to the denoiser and to ``clean_variance``.
    prediction : Prediction, optional
        The denoiser's prediction, where it is known already.

    Returns
    -------
    Transition
        Both of the shape and dtype of x.

    Raises
    ------
    ValueError
        For times that do not decrease or are out of range, and ``eta`` outside [0, 1].

    Examples
    --------
    >>> from kexue.generative.diffusion import GaussianMixtureDenoiser, HeatSchedule
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.ones(1), schedule=HeatSchedule()
    ... )
    >>> transition = reverse_transition(denoiser, torch.ones(1, 1), 1.0, 0.0)
    >>> float(transition.mean), float(transition.variance)
    (0.5, 0.0)
    """
    _check_state(x)
    weights = transition_weights(denoiser.schedule, time, previous_time, eta=eta)
    current, clean, noise = (_over_event(weight, x) for weight in weights)
    if prediction is None:
        prediction = denoiser.predict(x, time, condition=condition)
    variance = noise**2
    if clean_variance is not None:
        further = clean_variance(x, time, prediction._unclamped, condition)
        variance = variance + clean**2 * further
    mean = current * x + clean * prediction.sample
    return Transition(mean, variance.to(mean).expand_as(mean))


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: Sequence[int] | None = None,
    *,
    initial: Float[Tensor, " batch *event"] | None = None,
    times: Float[Tensor, " length"] | None = None,
    num_steps: int | None = None,
    eta: float = 1.0,
    clean_variance: CleanVariance | None = None,
    condition: Tensor | None = None,
    mean_shift: MeanShift | None = None,
    final_noise: bool = False,
    noise_limit: float | None = None,
    return_trajectory: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    """Walk from noise to data along a decreasing grid of times.

    Draws, in this order: the initial state, then one ``randn`` of its shape for every transition
    with positive variance, except for the step into time 0. A variance per entry, or one on an
    accelerator, counts as positive. One call of the denoiser a step; the
    memory is two states.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    shape : sequence of int, optional
        Shape of the samples, batch first: they start from N(0, prior_scale² I).
    initial : Tensor, shape (batch, *event), optional
        State at the first time, instead of ``shape``; its dtype and device are kept.
    times : Tensor, shape (length,), optional
        Strictly decreasing times; the last may be 0, or a time at which to stop.
    num_steps : int, optional
        Use ``schedule.times(num_steps)`` instead of ``times``.
    eta : float
        Share of the posterior noise, in [0, 1]: 1 is DDPM, 0 is DDIM.
    clean_variance : callable, optional
        Estimate of Var[x_0 | x_t], see `reverse_transition`.
    condition : Tensor, optional
        Passed on untouched.
    mean_shift : callable, optional
        ``(x, time, previous_time, mean, variance, condition) -> Tensor`` added to the mean.
    final_noise : bool
        Whether the step into time 0 draws noise too, where it has any variance.
    noise_limit : float, optional
        Upper bound on E|noise| per entry in the transition into the smallest positive time, that
        is of ``limit · sqrt(π/2)`` on its standard deviation.
    return_trajectory : bool
        Return the state at every time instead of the last.
    generator : torch.Generator, optional
        Source of randomness, on the device of the samples.
    dtype, device
        Of the samples, where ``shape`` is given. The device defaults to the generator's, or CPU.

    Returns
    -------
    Tensor, shape (batch, *event), or (length, batch, *event) with ``return_trajectory``

    Raises
    ------
    ValueError
        Unless exactly one of ``shape`` and ``initial`` and one of ``times`` and ``num_steps`` are
        given, for times that are not strictly decreasing or out of range, ``eta`` outside [0, 1]
        and a negative ``noise_limit``.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.tensor([[3.0, 0.0]]), torch.tensor([0.01]), schedule=DiscreteSchedule.linear()
    ... )
    >>> generator = torch.Generator().manual_seed(0)
    >>> samples = sample(denoiser, (200, 2), num_steps=20, generator=generator)
    >>> bool(((samples.mean(0) - torch.tensor([3.0, 0.0])).abs() < 0.05).all())
    True
    """
    _exactly_one("shape", shape, "initial", initial)
    schedule = denoiser.schedule
    grid = _grid(schedule, times, num_steps)
    if noise_limit is not None and not noise_limit >= 0:
        raise ValueError(f"noise_limit must not be negative, got {noise_limit}")
    if initial is not None:
        _check_state(initial, "initial")
        x = initial
    else:
        device = device or (generator.device if generator is not None else "cpu")
        x = torch.randn(tuple(shape or ()), dtype=dtype, device=device, generator=generator)
        x = schedule.prior_scale * x

    weights = transition_weights(schedule, grid[:-1], grid[1:], eta=eta)
    smallest = len(grid) - (3 if grid[-1] == 0 else 2)
    trajectory = [x]
    instants = grid.unbind()
    factors = zip(*(weight.tolist() for weight in weights), strict=True)
    for step, (current, clean, noise) in enumerate(factors):
        time, previous_time = instants[step], instants[step + 1]
        prediction = denoiser.predict(x, time, condition=condition)
        variance: float | Tensor = noise**2
        if clean_variance is not None:
            further = clean_variance(x, time, prediction._unclamped, condition)
            variance = variance + clean**2 * further
        mean = (current * x).add_(prediction.sample, alpha=clean)
        if mean_shift is not None:
            spread = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
            mean = mean + mean_shift(
                x, time, previous_time, mean, spread.expand_as(mean), condition
            )
        x = mean
        if final_noise or step < len(grid) - 2 or grid[-1] > 0:
            limit = noise_limit if step == smallest else None
            x = _add_noise(mean, variance, limit, generator)
        if return_trajectory:
            trajectory.append(x)
    return torch.stack(trajectory) if return_trajectory else x


def _add_noise(
    mean: Tensor, variance: float | Tensor, limit: float | None, generator: Source
) -> Tensor:
    """Add noise in place; draw none where the host knows that the variance is zero."""
    if isinstance(variance, Tensor) and variance.numel() == 1 and variance.device.type == "cpu":
        variance = variance.item()
    if not isinstance(variance, Tensor) and variance == 0:
        return mean
    normal = _normal(mean, generator)
    # E|N(0, s²)| = s sqrt(2/π).
    largest = math.inf if limit is None else limit * math.sqrt(math.pi / 2)
    if isinstance(variance, Tensor):
        return mean.addcmul_(variance.sqrt().clamp(max=largest).to(mean.dtype), normal)
    return mean.add_(normal, alpha=min(math.sqrt(variance), largest))


def _normal(like: Tensor, generator: Source) -> Tensor:
    """Draw from one source for all, or from one for each example."""
    if isinstance(generator, Sequence):
        rows = zip(like.split(1), generator, strict=True)
        return torch.cat([_normal(row, source) for row, source in rows])
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _grid(
    schedule: NoiseSchedule, times: Tensor | None, num_steps: int | None, *, to_zero: bool = False
) -> Tensor:
    """Return the checked grid of times, on the CPU in float64."""
    _exactly_one("times", times, "num_steps", num_steps)
    if num_steps is not None:
        return schedule.times(num_steps)
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times must be a list of at least two, got shape {tuple(grid.shape)}")
    if not bool((grid.diff() < 0).all()):
        raise ValueError(f"times must be strictly decreasing, got {grid.tolist()}")
    if to_zero and grid[-1] != 0:
        raise ValueError(f"times must end at 0, got {grid[-1].item()}")
    return schedule._check_time(grid)


def _exactly_one(first: str, one: object, second: str, other: object) -> None:
    if (one is None) == (other is None):
        got = "neither" if one is None else "both"
        raise ValueError(f"exactly one of {first} and {second} must be given, got {got}")


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
