"""Losses against closed forms and against one another."""

import math

import pytest
import torch

from generative.diffusion.mixtures import SCHEDULES, double, gaussian, mixture
from kexue.generative.diffusion import (
    DiscreteSchedule,
    HeatSchedule,
    NetworkDenoiser,
    VariancePreservingSchedule,
    denoising_loss,
    sample_times,
    transition_weights,
)

LINEAR = DiscreteSchedule.linear()
TARGETS = ["epsilon", "sample", "v_prediction", "score"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_discrete_times_are_uniform_integers(generator):
    times = sample_times(DiscreteSchedule.linear(10), 100_000, generator=generator)
    assert times.dtype == torch.float64
    counts = torch.bincount(times.long(), minlength=11)
    assert counts[0] == 0
    # Five standard deviations of a binomial count.
    assert bool(((counts[1:] - 10_000).abs() < 5 * math.sqrt(9000)).all())


def test_stratified_times_put_one_in_every_slice(generator):
    times = sample_times(LINEAR, 1000, method="stratified", generator=generator)
    assert torch.equal(times.sort().values, torch.arange(1, 1001, dtype=torch.float64))
    continuous = VariancePreservingSchedule()
    times = sample_times(continuous, 8, method="stratified", generator=generator)
    gaps = times.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.999 / 8))


def test_both_methods_have_the_same_expectation(generator):
    schedule = VariancePreservingSchedule()
    for method in ("uniform", "stratified"):
        times = torch.stack(
            [sample_times(schedule, 4, method=method, generator=generator) for _ in range(2000)]
        )
        # U(0.001, 1): mean 0.5005 and standard deviation 0.2884 for every entry.
        error = 5 * 0.2884 / math.sqrt(2000)
        assert bool(((times.mean(0) - 0.5005).abs() < error).all())


def test_heat_times_are_log_uniform(generator):
    schedule = HeatSchedule(80.0, minimum_sigma=0.002)
    times = sample_times(schedule, 100_000, generator=generator).log()
    low, high = math.log(0.002), math.log(80)
    assert times.min() >= low - 1e-12
    assert times.max() <= high + 1e-12
    # A uniform variable: mean in the middle, standard deviation width/sqrt(12).
    error = 5 * (high - low) / math.sqrt(12 * 100_000)
    assert times.mean().item() == pytest.approx((low + high) / 2, abs=error)


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_denoiser_of_gaussian_data_has_the_closed_form_loss(name, generator):
    """E(ε − ε̂)² = ᾱ²s²/(ᾱ²s² + β̄²), the part of the state's variance that the data cause."""
    schedule = SCHEDULES[name]
    denoiser = gaussian(0.7, 0.3, schedule)
    time = 0.3 * schedule.maximum_time
    clean = denoiser.sample(200_000, generator=generator)
    loss = denoising_loss(denoiser, clean, times=time, reduction="none", generator=generator)
    signal, noise = schedule.signal_scale(time), schedule.noise_scale(time)
    expected = (signal**2 * 0.3 / (signal**2 * 0.3 + noise**2)).item()
    # ε − ε̂ is normal: the squared error has relative standard deviation sqrt(2).
    assert loss.mean().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 200_000))


@pytest.mark.parametrize("name", SCHEDULES)
def test_targets_differ_by_known_factors(name, generator):
    schedule = SCHEDULES[name]
    denoiser = NetworkDenoiser(lambda x, time: torch.tanh(x), schedule)
    clean, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    times = torch.linspace(0.2, 0.9, 5, dtype=torch.float64) * schedule.maximum_time
    losses = {
        target: denoising_loss(
            denoiser, clean, times=times, noise=noise, target=target, reduction="none"
        )
        for target in TARGETS
    }
    signal, scale = schedule.signal_scale(times), schedule.noise_scale(times)
    factors = {
        "epsilon": torch.ones_like(signal),
        "sample": (signal / scale) ** 2,
        "v_prediction": (signal / (signal**2 + scale**2)) ** 2,
        "score": scale**2,
    }
    for target in TARGETS:
        # x̂_0 of a nearly signal-free state is a difference multiplied by β̄/ᾱ.
        torch.testing.assert_close(
            factors[target] * losses[target], losses["epsilon"], rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("weighting", ["variational", "min_snr"])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_weighted_losses_do_not_depend_on_the_target(weighting, target, generator):
    denoiser = NetworkDenoiser(
        lambda x, time: torch.tanh(x), LINEAR, prediction_type="v_prediction"
    )
    clean, noise = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    times = double([1, 2, 50, 400, 800, 1000])
    one, other = (
        denoising_loss(
            denoiser, clean, times=times, noise=noise, weighting=weighting, target=name,
            reduction="none",
        )
        for name in ("epsilon", target)
    )  # fmt: skip
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_variational_weight_is_the_divergence_of_a_step_with_large_variance(generator):
    """w_t ‖ε − ε̂‖² = λ²‖x_0 − x̂_0‖²/(2 β_t²), the KL of two normals of variance β_t²."""
    clean, noise = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    denoiser = NetworkDenoiser(lambda x, time: torch.tanh(x), LINEAR)
    for time in (2, 300, 1000):
        loss = denoising_loss(
            denoiser, clean, times=float(time), noise=noise, weighting="variational",
            reduction="none",
        )  # fmt: skip
        x = LINEAR.add_noise(clean, noise, time)
        error = ((denoiser.predict(x, time).sample - clean) ** 2).sum(1)
        weight = transition_weights(LINEAR, time, time - 1).clean ** 2 / LINEAR.betas[time - 1]
        torch.testing.assert_close(loss, weight * error / 2, rtol=1e-8, atol=0)


def test_variational_weight_is_finite_at_the_first_step():
    """β_1² = β̄_1²: the weight is 1/(2 α_1²)."""
    clean = torch.zeros(1, 1, dtype=torch.float64)
    denoiser = NetworkDenoiser(lambda x, time: torch.zeros_like(x), LINEAR)
    loss = denoising_loss(
        denoiser, clean, times=1.0, noise=torch.ones_like(clean), weighting="variational"
    )
    assert loss.item() == pytest.approx(1 / (2 * (1 - 1e-4)), rel=1e-11)


def test_min_snr_caps_the_weight_of_the_sample_error_at_five(generator):
    """In x̂_0 the weight is min(SNR, 5), as published."""
    clean, noise = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator)
    denoiser = NetworkDenoiser(lambda x, time: torch.tanh(x), LINEAR, prediction_type="sample")
    for time in (10.0, 500.0):
        plain, capped = (
            denoising_loss(
                denoiser, clean, times=time, noise=noise, target="sample", weighting=weighting
            )
            for weighting in ("uniform", "min_snr")
        )
        snr = LINEAR.log_signal_to_noise(time).exp().item()
        assert (capped / plain).item() == pytest.approx(min(snr, 5), rel=1e-12)


def test_sum_is_mean_times_entries_and_none_averages_to_mean(generator):
    denoiser = mixture(LINEAR)
    clean, noise = torch.randn(2, 7, 2, dtype=torch.float64, generator=generator)
    given = {"times": torch.arange(1.0, 8.0), "noise": noise}
    total = denoising_loss(denoiser, clean, **given)
    mean = denoising_loss(denoiser, clean, event_reduction="mean", **given)
    each = denoising_loss(denoiser, clean, reduction="none", **given)
    assert each.shape == (7,)
    torch.testing.assert_close(total, 2 * mean)
    torch.testing.assert_close(each.mean(), total)


def test_times_are_drawn_before_noise():
    denoiser = mixture(LINEAR)
    clean = torch.randn(5, 2, dtype=torch.float64)
    source = torch.Generator().manual_seed(3)
    times = sample_times(LINEAR, 5, generator=source)
    noise = torch.randn(5, 2, dtype=torch.float64, generator=source)
    expected = denoising_loss(denoiser, clean, times=times, noise=noise)
    result = denoising_loss(denoiser, clean, generator=torch.Generator().manual_seed(3))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck_in_the_data_and_the_network(target):
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    denoiser = NetworkDenoiser(lambda x, time: torch.tanh(x @ weight), LINEAR)
    noise = torch.randn(2, 3, dtype=torch.float64)
    times = double([30, 700])
    clean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda clean, weight: denoising_loss(
            denoiser, clean, times=times, noise=noise, target=target
        ),
        (clean, weight),
        atol=1e-4,
    )


def test_half_precision_losses_are_added_up_in_float32():
    clean = torch.zeros(1, 100_000, dtype=torch.float16)
    denoiser = NetworkDenoiser(lambda x, time: torch.zeros_like(x), LINEAR)
    loss = denoising_loss(denoiser, clean, times=500.0, noise=torch.ones_like(clean))
    assert loss.dtype == torch.float32
    assert loss.item() == 100_000  # float16 ends at 65504


def test_an_empty_batch_gives_an_empty_loss():
    assert denoising_loss(mixture(LINEAR), torch.zeros(0, 2), reduction="none").shape == (0,)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "noise"}, "target.*epsilon, sample.*'noise'"),
        ({"weighting": "snr"}, "weighting.*min_snr.*'snr'"),
        ({"event_reduction": "max"}, "event_reduction.*'max'"),
        ({"reduction": "sum"}, "reduction.*'sum'"),
        ({"noise": torch.zeros(2, 1)}, "same shape"),
        ({"times": torch.ones(3)}, r"time.*\(3,\)"),
        ({"times": torch.tensor([1.0, 0.0])}, "positive"),
        ({"times": 2000.0}, "time.*2000"),
        ({"times": 0.5, "weighting": "variational"}, "times.*0.5"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ValueError, match=words):
        denoising_loss(mixture(LINEAR), torch.zeros(2, 2), **options)


@pytest.mark.bad_input
def test_the_variational_weight_needs_steps():
    with pytest.raises(ValueError, match=r"variational.*HeatSchedule"):
        denoising_loss(mixture(HeatSchedule()), torch.zeros(2, 2), weighting="variational")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [({"method": "sobol"}, "method.*uniform, stratified.*'sobol'"), ({"batch": -1}, "batch.*-1")],
)
def test_bad_requests_for_times_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sample_times(LINEAR, **{"batch": 2, **options})
