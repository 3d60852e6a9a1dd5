"""Guidance by the gradient of a classifier, or of any objective, in its two forms.

    ε̃ = ε̂(x_t) − β̄_t γ ∇ log p(y | x_t)        μ̃ = μ + σ² γ ∇ log p(y | x_t)

The first changes the score, and so works for every sampler and every variance. The second changes
the mean of a noisy transition, to first order by the same amount; where σ = 0 it does nothing.

Source: https://arxiv.org/abs/2105.05233, https://arxiv.org/abs/2112.05744.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction, _check_state
from kexue.generative.diffusion.guidance.strength import (
    Scale,
    _check_clip,
    _check_denoiser,
    _check_log_probability,
    _check_scale,
    _clip,
    _scale_at,
)
from kexue.generative.diffusion.schedule.base import (
    NoiseSchedule,
    _add_multiple,
    _as_number,
    _plain,
)

__all__ = ["ClassifierGuidance", "MeanShiftGuidance"]

LogProbability = Callable[..., Tensor]
Parts = tuple[Tensor, ...]


class ClassifierGuidance(nn.Module):
    """A denoiser steered by the gradient of log p(y | x_t), or of anything else to be increased.

    ε̃ = ε̂ − β̄_t γ ∇ log p(y | x_t), that is x̂_0 + (β̄_t²/ᾱ_t) γ ∇ log p(y | x_t): at high noise
    small errors of the gradient are large errors of x̂_0. Clamp it there.

    Parameters
    ----------
    denoiser : Denoiser
        What is steered. It is called without the condition.
    log_probability : callable
        ``(x, time, condition) -> (batch,)``, differentiable in x, an example's value depending on
        that example alone: `class_log_probability`, a similarity, or your own.
    scale : float, Tensor of shape (batch,), or callable
        γ, or a function of time that gives it. The number 0 skips the gradient.
    evaluate_at : {"noisy", "denoised"}
        Whether the objective sees x_t and its time, or x̂_0(x_t) and time 0. The second is for
        objectives that know clean data only; its gradient passes through the denoiser.
    clip_sample : (float, float), optional
        Range of the data: the guided x̂_0 is clamped to it.

    Raises
    ------
    ValueError
        For an unknown ``evaluate_at``, a scale that is not finite or of another length, a range
        that does not increase, and a log-probability whose shape is not (batch,).
    TypeError
        For a denoiser, scale or log-probability that is none.

    Notes
    -----
    Gradients are enabled where they are needed, also under `torch.no_grad`. Results are detached,
    unless x requires a gradient: then they stay differentiable, twice if need be. In that case, in
    inference mode and under the transforms of `torch.func` the gradient is `torch.func.grad`'s,
    and the objective may not call `torch.autograd.grad` itself.

    Examples
    --------
    >>> from kexue.generative.diffusion import GaussianMixtureDenoiser, HeatSchedule
    >>> two = GaussianMixtureDenoiser(
    ...     torch.tensor([[-1.0], [1.0]]), torch.ones(2), schedule=HeatSchedule(),
    ...     labels=torch.tensor([0, 1]),
    ... )
    >>> guided = ClassifierGuidance(two, two.class_log_prob)
    >>> x = torch.tensor([[0.3]])
    >>> guided.predict(x, 1.0, condition=1).sample, two.predict(x, 1.0, condition=1).sample
    (tensor([[0.6500]]), tensor([[0.6500]]))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_probability: LogProbability,
        *,
        scale: Scale = 1.0,
        evaluate_at: Literal["noisy", "denoised"] = "noisy",
        clip_sample: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _check_denoiser(denoiser)
        _check_log_probability(log_probability)
        _check_scale(scale)
        if evaluate_at not in ("noisy", "denoised"):
            raise ValueError(f"evaluate_at must be 'noisy' or 'denoised', got {evaluate_at!r}")
        _check_clip(clip_sample)
        self.denoiser = denoiser
        self.log_probability = log_probability
        self.scale = scale
        self.evaluate_at = evaluate_at
        self.clip_sample = clip_sample

    @property
    def schedule(self) -> NoiseSchedule:
        """That of the denoiser."""
        return self.denoiser.schedule

    def predict(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        *,
        condition: int | Tensor | None = None,
    ) -> Prediction:
        """Return the guided estimate; the condition goes to the log-probability."""
        _check_state(x)
        scale = _scale_at(self.scale, time, x)

        def noisy(at: Tensor) -> tuple[Tensor, Parts]:
            return self.log_probability(at, time, condition), ()

        def denoised(at: Tensor) -> tuple[Tensor, Parts]:
            parts = _parts(self.denoiser.predict(at, time))
            return self.log_probability(parts[0], 0.0, condition), parts

        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            if isinstance(scale, float) and scale == 0:
                return _clip(self.denoiser.predict(x, time), self.clip_sample, x)
            if self.evaluate_at == "noisy":
                prediction = self.denoiser.predict(x, time)
                gradient, _ = _gradient(noisy, x)
            else:
                gradient, parts = _gradient(denoised, x)
                prediction = Prediction(*parts)
            return _clip(_shift(prediction, scale * gradient), self.clip_sample, x)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, evaluate_at={self.evaluate_at!r}"


class MeanShiftGuidance:
    """A shift of the transition mean by σ² γ ∇ log p(y | x), for `sample(..., mean_shift=...)`.

    Any distribution p(x_s | x_t) exp(γ · similarity(x_s, y)) gives it, to first order. The shift
    is in proportion to the transition's variance: at η = 0 there is none.

    Parameters
    ----------
    log_probability : callable
        ``(x, time, condition) -> (batch,)``, see `ClassifierGuidance`.
    scale : float, Tensor of shape (batch,), or callable
        γ, or a function of time that gives it. The number 0 skips the gradient.
    expand_at : {"current", "mean"}
        Where the gradient is taken: at the state x_t and its time, or at the transition's mean
        and the time it leads to. At time 0 the current point is used in either case.

    Raises
    ------
    ValueError
        For an unknown ``expand_at``, a scale that is not finite or of another length, a mean of
        another shape than x, and a log-probability whose shape is not (batch,).
    TypeError
        For a scale or log-probability that is none.

    Examples
    --------
    >>> from kexue.generative.diffusion import GaussianMixtureDenoiser, HeatSchedule, sample
    >>> two = GaussianMixtureDenoiser(
    ...     torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.01), schedule=HeatSchedule(),
    ...     labels=torch.tensor([0, 1]),
    ... )
    >>> samples = sample(
    ...     two, (50, 1), times=HeatSchedule().times(100, spacing="karras"),
    ...     mean_shift=MeanShiftGuidance(two.class_log_prob), condition=torch.tensor(1),
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> bool((samples > 0).float().mean() > 0.95)
    True
    """

    def __init__(
        self,
        log_probability: LogProbability,
        *,
        scale: Scale = 1.0,
        expand_at: Literal["current", "mean"] = "current",
    ) -> None:
        _check_log_probability(log_probability)
        _check_scale(scale)
        if expand_at not in ("current", "mean"):
            raise ValueError(f"expand_at must be 'current' or 'mean', got {expand_at!r}")
        self.log_probability = log_probability
        self.scale = scale
        self.expand_at = expand_at

    def __call__(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        previous_time: float | Tensor,
        mean: Float[Tensor, " batch *event"],
        variance: Float[Tensor, "..."],
        condition: int | Tensor | None = None,
    ) -> Float[Tensor, " batch *event"]:
        """Return what is to be added to the mean of the transition."""
        _check_state(x)
        _check_state(mean, "mean")
        if mean.shape != x.shape:
            raise ValueError(
                f"mean must have the shape of x, {tuple(x.shape)}, got {tuple(mean.shape)}"
            )
        scale = _scale_at(self.scale, time, x)
        if isinstance(scale, float) and scale == 0:
            return torch.zeros_like(mean)
        differentiable = x.requires_grad or mean.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
            if self.expand_at == "mean":
                x, time = _unless_clean(x, time, mean, previous_time)
            gradient, _ = _gradient(lambda at: (self.log_probability(at, time, condition), ()), x)
            return scale * (variance * gradient)

    def __repr__(self) -> str:
        return f"MeanShiftGuidance(scale={self.scale}, expand_at={self.expand_at!r})"


def _unless_clean(
    x: Tensor, time: float | Tensor, mean: Tensor, previous_time: float | Tensor
) -> tuple[Tensor, float | Tensor]:
    """Return the mean and its time, or x and its own where the mean is of clean data."""
    number = _as_number(previous_time)
    if number is not None:
        return (x, time) if number == 0 else (mean, previous_time)
    before = torch.as_tensor(previous_time)
    clean = before == 0
    chosen = clean.reshape(-1, *(1,) * (x.ndim - 1)) if clean.ndim else clean
    time = torch.as_tensor(time, dtype=before.dtype, device=before.device)
    return torch.where(chosen.to(x.device), x, mean), torch.where(clean, time, before)


def _parts(prediction: Prediction) -> Parts:
    scales = prediction.signal_scale, prediction.noise_scale
    return prediction.sample, prediction.epsilon, *scales


def _gradient(
    log_probability: Callable[[Tensor], tuple[Tensor, Parts]], x: Tensor
) -> tuple[Tensor, Parts]:
    """Return the gradient in x, and what was computed on the way to the log-probability.

    Differentiable itself where gradients are enabled.
    """

    def total(at: Tensor) -> tuple[Tensor, Parts]:
        value, parts = log_probability(at)
        return _total(value, at), parts

    if torch.is_grad_enabled() or _is_transformed(x):
        return torch.func.grad(total, has_aux=True)(x)
    # torch.func.grad keeps the graph of a second derivative, which plain sampling has no use for.
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        value, parts = total(at)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, at, materialize_grads=True)
        else:
            gradient = torch.zeros_like(x)
    return gradient, tuple(part.detach() for part in parts)


def _is_transformed(x: Tensor) -> bool:
    """Whether x carries more than its values: detaching it would lose a derivative of the caller.

    Inference tensors count too: only torch.func can differentiate past them.
    """
    return (
        torch.is_inference_mode_enabled()
        or x.is_inference()
        or torch._C._are_functorch_transforms_active()
        or unpack_dual(x).tangent is not None
    )


def _total(log_probability: Tensor, x: Tensor) -> Tensor:
    """Sum over the batch: as examples do not mix, its gradient is that of each of them."""
    shape = tuple(log_probability.shape) if isinstance(log_probability, Tensor) else None
    if shape != tuple(x.shape[:1]):
        got = type(log_probability).__name__ if shape is None else shape
        raise ValueError(
            f"a log-probability must be a tensor of shape ({len(x)},), one per example, got {got}"
        )
    return log_probability.sum()


def _shift(prediction: Prediction, gradient: Tensor) -> Prediction:
    """Add a gradient to the score.

    Both estimates move by what they gain; x̂_0 computed from ε̃ would cancel where ᾱ is small.
    """
    signal, noise = _plain(prediction.signal_scale), _plain(prediction.noise_scale)
    return Prediction(
        _add_multiple(prediction.sample, noise**2 / signal, gradient),
        _add_multiple(prediction.epsilon, -noise, gradient),
        prediction.signal_scale,
        prediction.noise_scale,
    )
