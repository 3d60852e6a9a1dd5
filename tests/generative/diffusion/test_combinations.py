"""The rule of the package: every denoiser × schedule × variance × guidance × solver fits together.

The data are Gaussians in two classes, so the denoiser of a class is known exactly. Whatever asks
for that class, in any parametrisation, is then the same denoiser: along every solver it must walk
the same way to rounding, and the walk must end in that class's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generative.diffusion.mixtures import SCHEDULES, double
from kexue.generative.diffusion import (
    AnalyticVarianceScheduler,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    GaussianMixtureDenoiser,
    HeatSchedule,
    JacobianVariance,
    MeanShiftGuidance,
    NetworkDenoiser,
    PointDataVariance,
    Prediction,
    StandardNormalDataVariance,
    TabulatedVariance,
    estimate_clean_variance,
    log_likelihood,
    optimal_times,
    sample,
    solve_ode,
)

LABEL = 1
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score")


def classes(schedule: Any) -> GaussianMixtureDenoiser:
    """Three Gaussians; the second and the third are class 1."""
    return GaussianMixtureDenoiser(
        double([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]]),
        double([[0.05, 0.04], [0.02, 0.1], [0.1, 0.05]]),
        double([0.2, 0.5, 0.3]),
        labels=torch.tensor([0, 1, 1]),
        schedule=schedule,
    )


def of_the_class(schedule: Any) -> GaussianMixtureDenoiser:
    """The same without the other class: what every combination must amount to."""
    return GaussianMixtureDenoiser(
        double([[1.0, 0.0], [0.2, -1.0]]),
        double([[0.02, 0.1], [0.1, 0.05]]),
        double([0.5, 0.3]),
        schedule=schedule,
    )


class Network(nn.Module):
    """The exact mixture, called as a network that predicts one of the four quantities."""

    def __init__(self, mixture: GaussianMixtureDenoiser, kind: str) -> None:
        super().__init__()
        self.mixture, self.kind = mixture, kind

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        return getattr(self.mixture.predict(x, time, condition=condition), self.kind)


def denoisers(schedule: Any) -> dict[str, Any]:
    exact = classes(schedule)
    networks = {
        f"network of {kind}": NetworkDenoiser(Network(exact, kind), schedule, prediction_type=kind)
        for kind in PREDICTION_TYPES
    }
    return {"exact": exact, **networks}


def class_probability(schedule: Any) -> Callable[[Tensor, Any, Any], Tensor]:
    mixture = classes(schedule)

    def log_probability(x: Tensor, time: Any, condition: Tensor) -> Tensor:
        return mixture.class_log_prob(x, time, condition)

    return log_probability


class Bound(nn.Module):
    """A conditional denoiser with its condition bound, as the specification's small wrapper."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def predict(self, x: Tensor, time: Any, *, condition: Tensor | None = None) -> Prediction:
        return self.denoiser.predict(x, time, condition=torch.full((len(x),), LABEL))


def guided(kind: str, denoiser: Any) -> Any:
    null = torch.tensor(-1)
    match kind:
        case "condition":
            return Bound(denoiser)
        case "classifier":
            return ClassifierGuidance(denoiser, class_probability(denoiser.schedule))
        case "classifier-free":
            return ClassifierFreeGuidance(denoiser, scale=1.0, null_condition=null)
        case "both":
            # Half of the way by the condition, the other half by the classifier.
            half = ClassifierFreeGuidance(denoiser, scale=0.5, null_condition=null)
            return ClassifierGuidance(Bound(half), class_probability(denoiser.schedule), scale=0.5)
    raise AssertionError(kind)


GUIDANCES = ("condition", "classifier", "classifier-free", "both")


def table(schedule: Any) -> TabulatedVariance:
    """The best variance per time of the class's exact denoiser."""
    denoiser = of_the_class(schedule)
    generator = torch.Generator().manual_seed(0)
    clean = denoiser.sample(400, generator=generator)
    low = schedule.minimum_time
    times = torch.linspace(0, 1, 40, dtype=torch.float64) ** 2 * (schedule.maximum_time - low) + low
    return estimate_clean_variance(denoiser, clean, times=times, generator=generator)


def grid(schedule: Any, steps: int) -> Tensor:
    """Times equally spaced in the angle arctan σ, which suits every schedule."""
    low, high = schedule.sigma(schedule.minimum_time), schedule.sigma(schedule.maximum_time)
    angles = torch.linspace(float(high.atan()), float(low.atan()), steps, dtype=torch.float64)
    times = schedule.time_from_sigma(angles.tan()).clamp(
        schedule.minimum_time, schedule.maximum_time
    )
    return torch.cat([times, times.new_zeros(1)])


def walks(schedule: Any) -> dict[str, Callable[..., Tensor]]:
    """Every way from noise to data: (denoiser, noise, steps, condition) -> samples."""

    def chain(eta: float, variance: Callable[[Any], Any] | None) -> Callable[..., Tensor]:
        def walk(denoiser: Any, noise: Tensor, steps: int, condition: Any) -> Tensor:
            return sample(
                denoiser,
                initial=noise,
                times=grid(schedule, steps),
                eta=eta,
                clean_variance=None if variance is None else variance(denoiser),
                condition=condition,
                generator=torch.Generator().manual_seed(1),
            )

        return walk

    def ode(method: str, coordinate: str) -> Callable[..., Tensor]:
        adaptive = method == "dopri5"

        def walk(denoiser: Any, noise: Tensor, steps: int, condition: Any) -> Tensor:
            options: dict[str, Any] = (
                {"start": schedule.maximum_time, "end": schedule.minimum_time, "rtol": 1e-4}
                if adaptive
                else {"start": None, "end": None, "times": grid(schedule, steps)}
            )
            return solve_ode(
                denoiser, noise, method=method, coordinate=coordinate, condition=condition,
                **options,
            )  # fmt: skip

        return walk

    of_time = table(schedule)
    variances: dict[str, Callable[[Any], Any] | None] = {
        "none": None,
        "point": lambda denoiser: PointDataVariance(),
        "standard normal": lambda denoiser: StandardNormalDataVariance(),
        "table": lambda denoiser: of_time,
        "Jacobian": lambda denoiser: JacobianVariance(denoiser),
    }
    return {
        **{
            f"eta {eta}, variance {name}": chain(eta, variance)
            for eta, (name, variance) in product((0.0, 0.5, 1.0), variances.items())
        },
        **{
            f"{method} in {coordinate}": ode(method, coordinate)
            for method, coordinate in product(("euler", "heun", "dopri5"), ("sigma", "angle"))
        },
        "dpm_solver_2m in sigma": ode("dpm_solver_2m", "sigma"),
    }


def noise(schedule: Any, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return schedule.prior_scale * normal


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_combination_is_the_class_denoiser(name: str) -> None:
    schedule = SCHEDULES[name]
    begin = noise(schedule, 6)
    label = torch.full((len(begin),), LABEL)
    for walk_name, walk in walks(schedule).items():
        expected = walk(of_the_class(schedule), begin, 5, None)
        assert bool(expected.isfinite().all())
        for (kind, denoiser), guidance in product(denoisers(schedule).items(), GUIDANCES):
            wrapped = guided(guidance, denoiser)
            condition = None if guidance == "condition" else label
            if guidance in ("classifier", "both"):
                condition = torch.tensor(LABEL)
            found = walk(wrapped, begin, 5, condition)
            # Steps of the adaptive solver are chosen by an error that rounding moves.
            tolerance = 1e-5 if "dopri5" in walk_name else 1e-7
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance,
                msg=lambda text, what=(walk_name, kind, guidance): f"{what}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_walk_ends_in_the_distribution(name: str) -> None:
    schedule = SCHEDULES[name]
    denoiser = of_the_class(schedule)
    count, steps = 4000, 80
    begin = noise(schedule, count)
    weights = denoiser.log_weights.exp()
    mean = weights @ denoiser.means
    spread = denoiser.means - mean
    covariance = torch.diag(weights @ double([[0.02, 0.1], [0.1, 0.05]])) + spread.T @ (
        weights[:, None] * spread
    )
    # Four standard errors of a mean of this many, and what a finite number of steps may cost: the
    # steps are first order, so a few hundredths of the spread at 80 of them.
    error = 4 * covariance.diagonal().sqrt() / count**0.5
    for walk_name, walk in walks(schedule).items():
        if "Jacobian" in walk_name and name != "cosine":
            continue  # the same transitions as with the exact variance, at ten times the cost
        found = walk(denoiser, begin, steps, None)
        scale = covariance.diagonal().sqrt()
        assert bool(((found.mean(0) - mean).abs() < error + 0.04 * scale).all()), walk_name
        relative = (found.T.cov() - covariance) / torch.outer(scale, scale)
        # DDPM's "large" variance is meant for standard normal data, and widens these a little.
        allowed = 0.2 if "standard normal" in walk_name else 0.12
        assert relative.abs().max() < allowed, (walk_name, relative)


@pytest.mark.parametrize("name", SCHEDULES)
def test_mean_shift_guides_where_there_is_noise_and_nowhere_else(name: str) -> None:
    schedule = SCHEDULES[name]
    begin = noise(schedule, 2000)
    # The label is bound: a condition would reach the mixture as well, and guide twice.
    probability = class_probability(schedule)
    shift = MeanShiftGuidance(lambda x, time, _: probability(x, time, torch.tensor(LABEL)))

    def draw(eta: float, mean_shift: Any) -> Tensor:
        return sample(
            classes(schedule), initial=begin, times=grid(schedule, 120), eta=eta,
            mean_shift=mean_shift,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    target = of_the_class(schedule)
    mean = target.log_weights.exp() @ target.means
    torch.testing.assert_close(draw(1.0, shift).mean(0), mean, atol=0.08, rtol=0)
    torch.testing.assert_close(draw(0.0, shift), draw(0.0, None))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_every_guided_likelihood_is_that_of_the_class(name: str, guidance: str) -> None:
    schedule = SCHEDULES[name]
    start = float(schedule.time_from_sigma(0.05))
    x = of_the_class(schedule).sample(4, generator=torch.Generator().manual_seed(0))
    condition = None if guidance == "condition" else torch.full((4,), LABEL)
    if guidance in ("classifier", "both"):
        condition = torch.tensor(LABEL)
    options: dict[str, Any] = {"start": start, "method": "heun", "num_steps": 48}
    found = log_likelihood(
        guided(guidance, classes(schedule)), x, condition=condition, **options
    ).log_prob
    same = log_likelihood(of_the_class(schedule), x, **options).log_prob
    torch.testing.assert_close(found, same, atol=1e-7, rtol=1e-7)
    exact = of_the_class(schedule).log_prob(x, start)
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0)


def test_what_does_not_fit_says_why() -> None:
    schedule = SCHEDULES["linear"]
    denoiser = of_the_class(schedule)
    x = noise(schedule, 2)
    ends: dict[str, Any] = {"start": 1000.0, "end": 0.0}
    with pytest.raises(ValueError, match="angle"):
        solve_ode(denoiser, x, method="dpm_solver_2m", coordinate="angle", **ends)
    with pytest.raises(ValueError, match="positive"):
        solve_ode(denoiser, x, method="dopri5", **ends)
    with pytest.raises(ValueError, match="positive"):
        log_likelihood(denoiser, x, start=0.0)
    continuous = table(HeatSchedule())
    with pytest.raises(ValueError, match="grid"):
        optimal_times(continuous, 3)
    with pytest.raises((TypeError, ValueError), match="DiscreteSchedule"):
        AnalyticVarianceScheduler(HeatSchedule())  # type: ignore[arg-type]
    unlabelled = ClassifierFreeGuidance(denoiser, scale=2.0, null_condition=torch.tensor(-1))
    with pytest.raises(ValueError, match="condition"):
        unlabelled.predict(x, 500.0)
    with pytest.raises(ValueError, match="labels"):
        unlabelled.predict(x, 500.0, condition=torch.tensor([1, 1]))
