"""The optimal variance behind the interface of a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import (
    Prediction,
    _check_prediction_type,
    _check_state,
)
from kexue.generative.diffusion.sampling import (
    CleanVariance,
    _add_noise,
    _check_eta,
    transition_weights,
)
from kexue.generative.diffusion.schedule.base import _plain
from kexue.generative.diffusion.schedule.discrete import DiscreteSchedule

__all__ = ["AnalyticVarianceScheduler", "SchedulerOutput"]

_SPACINGS = ("trailing", "leading", "linspace", "quadratic")


class SchedulerOutput(NamedTuple):
    """What a step of a scheduler returns.

    Attributes
    ----------
    prev_sample : Tensor, shape (batch, *event)
        State at the next, less noisy timestep.
    pred_original_sample : Tensor, shape (batch, *event)
        Estimate x̂_0 of the clean data.

    Examples
    --------
    >>> SchedulerOutput(torch.zeros(1), torch.ones(1)).pred_original_sample
    tensor([1.])
    """

    prev_sample: Float[Tensor, " batch *event"]
    pred_original_sample: Float[Tensor, " batch *event"]


class _Step(NamedTuple):
    """One transition of the chain: its time, scales, weights and place."""

    time: float
    signal_scale: Tensor
    noise_scale: Tensor
    current: float
    clean: float
    noise: float
    final: bool
    limited: bool


class AnalyticVarianceScheduler:
    """A scheduler for existing diffusers pipelines, with any clean variance and any grid.

    Does what `sample` does, with the same draws, one step at a time. Timesteps count from 0 as in
    diffusers: timestep t is time t + 1 of the schedule. The previous timestep is looked up in
    ``timesteps``; the step from the last one leads to the clean data and adds no noise.

    Parameters
    ----------
    schedule : DiscreteSchedule
        The schedule of training.
    clean_variance : callable, optional
        ``(x, time, prediction, condition) -> Tensor``, a `TabulatedVariance` for instance. None
        counts as 0.
    prediction_type : {"epsilon", "sample", "v_prediction", "score"}
        What the network's output estimates.
    eta : float
        Share of the posterior noise, in [0, 1]: 1 is DDPM, 0 is DDIM.
    clip_sample : (float, float), optional
        Range of the data. x̂_0 is clamped to it for the mean; ``clean_variance`` sees what the
        network said.
    noise_limit : float, optional
        Upper bound on E|noise| per entry in the transition into the smallest timestep.
    timestep_spacing : {"trailing", "leading", "linspace", "quadratic"}
        Grid for a number of steps.

    Attributes
    ----------
    timesteps : Tensor of int64
        Decreasing, from 0 to T − 1.
    num_inference_steps : int or None
        Their number; None before `set_timesteps`.
    init_noise_sigma : float
        Standard deviation to start from.
    order : int
        Network calls per step, 1.

    Raises
    ------
    ValueError
        For options that are unknown or out of range, a step before `set_timesteps`, a timestep
        that is not in the list, and generators that are not one for each example.

    Notes
    -----
    There is no ``config``. ``DDIMPipeline`` builds a scheduler of its own from one and so would
    run without the clean variance: it is not supported. Pipelines that look at one only when they
    are made, like ``StableDiffusionPipeline``, take this scheduler afterwards, by
    ``pipeline.scheduler = ...``. ``save_pretrained`` leaves it out.

    Examples
    --------
    >>> scheduler = AnalyticVarianceScheduler(DiscreteSchedule.linear())
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps
    tensor([999, 749, 499, 249])
    >>> x = torch.zeros(1, 2)
    >>> for timestep in scheduler.timesteps:
    ...     x = scheduler.step(torch.zeros(1, 2), timestep, x).prev_sample
    >>> x.shape
    torch.Size([1, 2])
    """

    order = 1

    def __init__(
        self,
        schedule: DiscreteSchedule,
        clean_variance: CleanVariance | None = None,
        *,
        prediction_type: str = "epsilon",
        eta: float = 1.0,
        clip_sample: tuple[float, float] | None = None,
        noise_limit: float | None = None,
        timestep_spacing: str = "trailing",
    ) -> None:
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(f"schedule must be a DiscreteSchedule, got {type(schedule).__name__}")
        _check_prediction_type(prediction_type)
        _check_eta(eta)
        if clip_sample is not None and not clip_sample[0] < clip_sample[1]:
            raise ValueError(f"clip_sample must be an increasing pair, got {clip_sample}")
        if noise_limit is not None and not noise_limit >= 0:
            raise ValueError(f"noise_limit must not be negative, got {noise_limit}")
        if timestep_spacing not in _SPACINGS:
            raise ValueError(
                f"timestep_spacing must be one of {', '.join(_SPACINGS)}, got {timestep_spacing!r}"
            )
        self.schedule = schedule
        self.clean_variance = clean_variance
        self.prediction_type = prediction_type
        self.eta = eta
        self.clip_sample = clip_sample
        self.noise_limit = noise_limit
        self.timestep_spacing = timestep_spacing
        self.init_noise_sigma = schedule.prior_scale
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(schedule.num_steps - 1, -1, -1)
        self._steps: dict[float, _Step] = {}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the grid, by a number of steps or as decreasing timesteps that count from 0.

        `optimal_times` fits with ``timesteps=times[:-1] - 1``.
        """
        if (num_inference_steps is None) == (timesteps is None):
            got = "neither" if timesteps is None else "both"
            raise ValueError(
                f"exactly one of num_inference_steps and timesteps must be given, got {got}"
            )
        if num_inference_steps is not None:
            times = self.schedule.times(num_inference_steps, spacing=self.timestep_spacing)[:-1]
            chosen = times.long() - 1
        else:
            chosen = self._check_timesteps(torch.as_tensor(timesteps).cpu())
        self._steps = self._plan(chosen)
        self.timesteps = chosen.to(device or "cpu")
        self.num_inference_steps = len(chosen)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample as it is."""
        return sample

    def add_noise(
        self,
        original_samples: Float[Tensor, " batch *event"],
        noise: Float[Tensor, " batch *event"],
        timesteps: Tensor,
    ) -> Float[Tensor, " batch *event"]:
        """Return the noisy state at one timestep for all, or at one for each example."""
        last = self.schedule.num_steps - 1
        if not bool(((timesteps >= 0) & (timesteps <= last)).all()):
            raise ValueError(f"timesteps must lie in 0…{last}, got {timesteps.tolist()}")
        times = timesteps + 1
        # Pipelines for inpainting give one timestep in a list.
        times = times[0] if times.shape == (1,) else times
        return self.schedule.add_noise(original_samples, noise, times)

    @torch.no_grad()
    def step(
        self,
        model_output: Float[Tensor, " batch *event"],
        timestep: int | Tensor,
        sample: Float[Tensor, " batch *event"],
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Return the state at the timestep after this one in the list, and x̂_0.

        With a generator for each example, its noise does not depend on the batch.
        """
        step = self._step_at(timestep)
        _check_state(sample, "sample")
        _check_state(model_output, "model_output")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}"
            )
        if isinstance(generator, Sequence) and len(generator) != len(sample):
            raise ValueError(
                f"generator must be one for all or one for each of the {len(sample)} examples, "
                f"got {len(generator)}"
            )
        prediction = Prediction._read(
            model_output, sample, step.signal_scale, step.noise_scale, self.prediction_type
        )
        clean = prediction.sample
        if self.clip_sample is not None:
            clean = clean.clamp(*self.clip_sample)
        moved = (step.current * sample).add_(clean, alpha=step.clean)
        if not step.final:
            variance: float | Tensor = step.noise**2
            if self.clean_variance is not None:
                further = self.clean_variance(sample, step.time, prediction, None)
                # As a number where the host knows it: the noise is then added in one pass.
                variance = variance + step.clean**2 * _plain(further)
            limit = self.noise_limit if step.limited else None
            moved = _add_noise(moved, variance, limit, generator)
        output = SchedulerOutput(moved, clean)
        return output if return_dict else (moved, clean)

    def __len__(self) -> int:
        return self.schedule.num_steps

    def _step_at(self, timestep: int | Tensor) -> _Step:
        if self.num_inference_steps is None:
            raise ValueError("step needs a grid: call set_timesteps first, got none")
        number = timestep.item() if isinstance(timestep, Tensor) else timestep
        step = self._steps.get(number)
        if step is None:
            raise ValueError(
                f"timestep must be one of timesteps, {list(self._steps)}, got {number}"
            )
        return step

    def _check_timesteps(self, timesteps: Tensor) -> Tensor:
        whole = timesteps.ndim == 1 and len(timesteps) and not timesteps.is_complex()
        if (
            not whole
            or not bool((timesteps == timesteps.long()).all())
            or not bool((timesteps.diff() < 0).all())
            or timesteps[0] >= self.schedule.num_steps
            or timesteps[-1] < 0
        ):
            raise ValueError(
                "timesteps must be decreasing integers in "
                f"0…{self.schedule.num_steps - 1}, got {timesteps.tolist()}"
            )
        return timesteps.long()

    def _plan(self, timesteps: Tensor) -> dict[float, _Step]:
        times = torch.cat([timesteps + 1.0, timesteps.new_zeros(1)]).double()
        weights = transition_weights(self.schedule, times[:-1], times[1:], eta=self.eta)
        signals, noises = self.schedule._scales(times[:-1])
        instants, last = times.tolist(), len(timesteps) - 1
        current, clean, noise = (weight.tolist() for weight in weights)
        return {
            timestep: _Step(
                time=instants[i],
                signal_scale=signals[i],
                noise_scale=noises[i],
                current=current[i],
                clean=clean[i],
                noise=noise[i],
                final=i == last,
                limited=i == last - 1,
            )
            for i, timestep in enumerate(timesteps.tolist())
        }
