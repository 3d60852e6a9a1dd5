"""The training loss of any denoiser, whatever its network predicts.

    E ‖ε − ε̂(ᾱ_t x_0 + β̄_t ε, t)‖²

The loss of an example is the squared norm of its error, not the mean over entries: a mean divides
the gradient by the number of entries, and in half precision pushes it below the smallest number.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2303.09556 (min-SNR).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import Denoiser, _check_state
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _over_event
from kexue.generative.diffusion.schedule.discrete import DiscreteSchedule

__all__ = ["denoising_loss", "sample_times"]

_METHODS = ("uniform", "stratified")
_TARGETS = ("epsilon", "sample", "v_prediction", "score")
_WEIGHTINGS = ("uniform", "variational", "min_snr")
_LOG_LARGEST = math.log(5.0)


def sample_times(
    schedule: NoiseSchedule,
    batch: int,
    *,
    method: str = "uniform",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, " batch"]:
    """Draw times of training: 1…T, uniform in [minimum, maximum], or log-uniform for heat.

    Parameters
    ----------
    schedule : NoiseSchedule
        Decides on the distribution.
    batch : int
        Number of times.
    method : {"uniform", "stratified"}
        Independent draws, or one per equal slice of the distribution (one random offset for all):
        the loss of a batch then varies less.
    generator : torch.Generator, optional
        Source of randomness.
    device : torch.device or str, optional
        Of the times; the generator's by default, or CPU.

    Returns
    -------
    Tensor, shape (batch,), float64

    Raises
    ------
    ValueError
        For an unknown method or a negative number.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> generator = torch.Generator().manual_seed(0)
    >>> times = sample_times(
    ...     DiscreteSchedule.linear(), 4, method="stratified", generator=generator
    ... )
    >>> times.sort().values.diff()
    tensor([250., 250., 250.], dtype=torch.float64)
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if batch < 0:
        raise ValueError(f"batch must not be negative, got {batch}")
    device = device or (generator.device if generator is not None else "cpu")
    count = batch if method == "uniform" else 1
    uniform = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
    if method == "stratified":
        slices = torch.arange(batch, dtype=torch.float64, device=device) / max(batch, 1)
        uniform = (uniform + slices) % 1
    return schedule._time_from_uniform(uniform)


def denoising_loss(
    denoiser: Denoiser,
    clean: Float[Tensor, " batch *event"],
    *,
    condition: Tensor | None = None,
    times: Float[Tensor, "..."] | float | None = None,
    noise: Float[Tensor, " batch *event"] | None = None,
    target: str = "epsilon",
    weighting: str = "uniform",
    event_reduction: str = "sum",
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Return the weighted squared error of a denoiser on noised data.

    Draws what is not given, times before noise.

    Parameters
    ----------
    denoiser : Denoiser
        What is trained.
    clean : Tensor, shape (batch, *event)
        Clean data.
    condition : Tensor, optional
        Passed to the denoiser.
    times : Tensor, shape (batch,), or float, optional
        Positive times; drawn by `sample_times` by default.
    noise : Tensor, shape (batch, *event), optional
        Standard normal noise.
    target : {"epsilon", "sample", "v_prediction", "score"}
        In which quantity the error is measured; any denoiser has all four.
    weighting : {"uniform", "variational", "min_snr"}
        uniform: weight 1 in the target's space. variational: the weight β_t²/(2 α_t² β̄_t²) of
        ‖ε − ε̂‖² in the bound with σ_t = β_t, for a `DiscreteSchedule` and times from 1.
        min_snr: weight min(SNR, 5)/SNR of ‖ε − ε̂‖². The last two do not depend on the target.
    event_reduction : {"sum", "mean"}
        Squared norm of an example, or its mean over entries.
    reduction : {"mean", "none"}
        Over the batch.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``clean``.

    Returns
    -------
    Tensor, shape () or (batch,)
        In the dtype of ``clean``; in float32 for half precision.

    Raises
    ------
    ValueError
        For unknown options, noise of another shape, times that are out of range or of another
        length.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 3), torch.zeros(1), schedule=DiscreteSchedule.linear()
    ... )
    >>> loss = denoising_loss(denoiser, torch.zeros(5, 3))
    >>> bool(loss < 1e-9)  # all data at one point: the noise is known
    True
    """
    _check_option("target", target, _TARGETS)
    _check_option("weighting", weighting, _WEIGHTINGS)
    _check_option("event_reduction", event_reduction, ("sum", "mean"))
    _check_option("reduction", reduction, ("mean", "none"))
    _check_state(clean, "clean")
    schedule = denoiser.schedule
    if times is None:
        times = sample_times(schedule, len(clean), generator=generator, device=clean.device)
    times = schedule._check_time(times, positive=True)
    if noise is None:
        noise = torch.randn(
            clean.shape, dtype=clean.dtype, device=clean.device, generator=generator
        )
    x = schedule.add_noise(clean, noise, times)
    times = times.expand(len(clean))
    prediction = denoiser.predict(x, times, condition=condition)

    signal, noise_scale = schedule._scales_for(clean, times)
    error = {
        "epsilon": lambda: prediction.epsilon - noise,
        "sample": lambda: prediction.sample - clean,
        "v_prediction": lambda: prediction.v_prediction - (signal * noise - noise_scale * clean),
        "score": lambda: (prediction.epsilon - noise) / noise_scale,
    }[target]()
    if error.dtype.itemsize < 4:
        error = error.float()
    squared = error**2
    if weighting != "uniform":
        weight = _epsilon_weight(schedule, times, weighting) * _as_epsilon(schedule, times, target)
        squared = _over_event(weight, squared) * squared
    entries = tuple(range(1, squared.ndim))
    if entries:
        squared = squared.sum(entries) if event_reduction == "sum" else squared.mean(entries)
    return squared.mean() if reduction == "mean" else squared


def _epsilon_weight(schedule: NoiseSchedule, times: Tensor, weighting: str) -> Tensor:
    """Weight of ‖ε − ε̂‖²."""
    if weighting == "min_snr":
        log_snr = schedule.log_signal_to_noise(times)
        return torch.exp(log_snr.clamp(max=_LOG_LARGEST) - log_snr)
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            "weighting 'variational' needs the steps of a DiscreteSchedule, "
            f"got {type(schedule).__name__}"
        )
    if bool((times < 1).any()):
        raise ValueError(f"times must be at least 1 for 'variational', got {times.min().item()}")
    noise = schedule.noise_scale(times)
    alpha_squared = (schedule.signal_scale(times) / schedule.signal_scale(times - 1)) ** 2
    return (1 - alpha_squared) / (2 * alpha_squared * noise**2)


def _as_epsilon(schedule: NoiseSchedule, times: Tensor, target: str) -> Tensor:
    """‖ε − ε̂‖² as a multiple of the squared error in the target."""
    signal, noise = schedule._scales(times)
    return {
        "epsilon": torch.ones_like(signal),
        "sample": (signal / noise) ** 2,
        "v_prediction": (signal / (signal**2 + noise**2)) ** 2,
        "score": noise**2,
    }[target]


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
