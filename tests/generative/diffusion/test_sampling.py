"""Transitions against closed forms, and the sampler against exact laws and diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative.diffusion.mixtures import SCHEDULES, TIMES, double, gaussian, mixture
from kexue.generative.diffusion import (
    DiscreteSchedule,
    HeatSchedule,
    NetworkDenoiser,
    PointDataVariance,
    VariancePreservingSchedule,
    reverse_transition,
    sample,
    transition_weights,
)

LINEAR = DiscreteSchedule.linear()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("eta", "current", "clean", "noise"),
    [
        (0.0, 0.718683072160484, 0.522465992741918, 0.0),
        (0.5, 0.630380783699471, 0.547220140858677, 0.331306032220163),
        (1.0, 0.200009137791607, 0.66786801594473, 0.662612064440325),
    ],
)
def test_weights_from_500_to_250_match_thirty_digit_arithmetic(eta, current, clean, noise):
    weights = transition_weights(LINEAR, 500, 250, eta=eta)
    expected = [pytest.approx(value, rel=1e-12) for value in (current, clean, noise)]
    assert [w.item() for w in weights] == expected


def test_forward_variance_is_that_of_standard_normal_data():
    """Var[x_0|x_t] = β̄_t² gives σ² + λ² β̄_t² = β² of the forward step, DDPM's "large"."""
    weights = transition_weights(LINEAR, 500, 250)
    large = weights.noise**2 + weights.clean**2 * LINEAR.noise_scale(500) ** 2
    forward = 1 - (LINEAR.signal_scale(500) / LINEAR.signal_scale(250)) ** 2
    assert large.item() == pytest.approx(0.850048776770546, rel=1e-12)
    assert forward.item() == pytest.approx(0.850048776770546, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=60, deadline=None)
@given(first=st.floats(1e-4, 1.0), share=st.floats(0.0, 0.999), eta=st.floats(0.0, 1.0))
def test_marginals_are_kept_for_every_eta(name, first, share, eta):
    schedule = SCHEDULES[name]
    time = first * schedule.maximum_time
    before = share * time
    current, clean, noise = transition_weights(schedule, time, before, eta=eta)
    signal, scale = schedule.signal_scale(time), schedule.noise_scale(time)
    signal_before, scale_before = schedule.signal_scale(before), schedule.noise_scale(before)
    # λ is a difference of numbers up to 1, κ²β̄² + σ² a sum of positive ones.
    assert (current * signal + clean).item() == pytest.approx(signal_before.item(), rel=1e-14)
    variance = (current * scale) ** 2 + noise**2
    assert variance.item() == pytest.approx(scale_before.item() ** 2, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_eta_one_is_the_bayes_posterior(name):
    """Precisions of the forward step and of p(x_s | x_0) add up."""
    schedule = SCHEDULES[name]
    time, before = TIMES[name], 0.7 * TIMES[name]
    ratio = schedule.signal_scale(time) / schedule.signal_scale(before)
    step_variance = schedule.noise_scale(time) ** 2 - (ratio * schedule.noise_scale(before)) ** 2
    variance = 1 / (ratio**2 / step_variance + 1 / schedule.noise_scale(before) ** 2)
    current, clean, noise = transition_weights(schedule, time, before)
    assert (noise**2).item() == pytest.approx(variance.item(), rel=1e-12)
    assert current.item() == pytest.approx((variance * ratio / step_variance).item(), rel=1e-12)
    expected = variance * schedule.signal_scale(before) / schedule.noise_scale(before) ** 2
    assert clean.item() == pytest.approx(expected.item(), rel=1e-12)


def test_adjacent_small_variance_is_the_articles():
    """β̄_{t−1}² β_t²/β̄_t², for one training point."""
    for time in (2, 37, 1000):
        expected = (
            LINEAR.noise_scale(time - 1) ** 2
            * LINEAR.betas[time - 1]
            / LINEAR.noise_scale(time) ** 2
        )
        noise = transition_weights(LINEAR, time, time - 1).noise
        assert (noise**2).item() == pytest.approx(expected.item(), rel=1e-10)


def test_step_to_time_zero_is_the_clean_estimate():
    for schedule in SCHEDULES.values():
        weights = transition_weights(schedule, schedule.maximum_time, 0, eta=1.0)
        assert [w.item() for w in weights] == [0.0, 1.0, 0.0]


def test_weights_broadcast_over_times():
    times = LINEAR.times(5)
    together = transition_weights(LINEAR, times[:-1], times[1:], eta=0.3)
    for i in range(5):
        alone = transition_weights(LINEAR, times[i], times[i + 1], eta=0.3)
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[i], one, rtol=1e-14, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_data_keep_their_marginal_through_an_exact_transition(name, eta):
    """Mean and variance of x_s from those of x_t, with the exact mean and clean variance."""
    schedule = SCHEDULES[name]
    denoiser = gaussian(0.7, 0.3, schedule)
    time, before = TIMES[name], 0.6 * TIMES[name]

    def moments(t):
        signal, noise = schedule.signal_scale(t), schedule.noise_scale(t)
        return signal * 0.7, signal**2 * 0.3 + noise**2

    mean, variance = moments(time)
    # The mean of a transition is linear in x: two states decide it.
    x = torch.stack([mean, mean + 1]).unsqueeze(1)
    step = reverse_transition(
        denoiser, x, time, before, eta=eta, clean_variance=denoiser.clean_variance
    )
    slope = step.mean[1] - step.mean[0]
    expected_mean, expected_variance = moments(before)
    torch.testing.assert_close(step.mean[0, 0], expected_mean, rtol=1e-12, atol=0)
    total = (slope**2 * variance + step.variance[0]).squeeze()
    torch.testing.assert_close(total, expected_variance, rtol=1e-11, atol=0)


def test_transition_takes_a_time_per_example_and_a_given_prediction(generator):
    denoiser = mixture(LINEAR)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    times, before = double([10, 400, 900]), double([0, 399, 100])
    together = reverse_transition(
        denoiser, x, times, before, clean_variance=denoiser.clean_variance
    )
    for i in range(3):
        row = x[i : i + 1]
        prediction = denoiser.predict(row, times[i])
        alone = reverse_transition(
            denoiser, row, times[i], before[i],
            clean_variance=denoiser.clean_variance, prediction=prediction,
        )  # fmt: skip
        torch.testing.assert_close(together.mean[i], alone.mean[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(together.variance[i], alone.variance[0], rtol=1e-12, atol=1e-15)
    assert together.variance.shape == together.mean.shape == x.shape


def test_large_variance_does_not_touch_the_mean(generator):
    denoiser = mixture(LINEAR)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    small = reverse_transition(denoiser, x, 500, 250)

    def standard_normal(x, time, prediction, condition=None):
        return prediction.noise_scale**2

    large = reverse_transition(denoiser, x, 500, 250, clean_variance=standard_normal)
    assert torch.equal(small.mean, large.mean)
    torch.testing.assert_close(
        large.variance, torch.full_like(x, 0.850048776770546), rtol=1e-12, atol=0
    )


def test_transition_is_differentiable():
    denoiser = mixture(LINEAR)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reverse_transition(denoiser, x, 500, 400).mean, (x,))


def test_deterministic_sampling_of_gaussian_data_multiplies_closed_form_factors(generator):
    """For N(m, s²) one DDIM step is linear: y = x/ᾱ contracts towards m."""
    denoiser = gaussian(0.7, 0.3, LINEAR)
    initial = torch.randn(6, 1, dtype=torch.float64, generator=generator)
    times = LINEAR.times(10)
    scaled = initial / LINEAR.signal_scale(1000)
    sigma = LINEAR.sigma(times)
    for now, before in pairwise(sigma):
        # ŷ = m + s²/(s² + σ²)(y − m), and Euler in σ with dy/dσ = (y − ŷ)/σ.
        clean = 0.7 + 0.3 / (0.3 + now**2) * (scaled - 0.7)
        scaled = scaled + (before - now) * (scaled - clean) / now
    result = sample(denoiser, initial=initial, times=times, eta=0.0)
    torch.testing.assert_close(result, scaled, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_exact_variance_samples_exactly_in_any_number_of_steps(name, num_steps, generator):
    schedule = SCHEDULES[name]
    denoiser = gaussian(0.0, 0.3, schedule)
    count = 40_000
    draws = sample(
        denoiser, (count, 1), num_steps=num_steps, clean_variance=denoiser.clean_variance,
        final_noise=True, generator=generator, dtype=torch.float64,
    )  # fmt: skip
    # Five standard errors, plus the mismatch ᾱ_T² of the start.
    assert abs(draws.mean().item()) < 5 * math.sqrt(0.3 / count)
    assert abs(draws.var().item() - 0.3) < 5 * 0.3 * math.sqrt(2 / count) + 1e-3


def test_sampler_reaches_every_mode_with_its_weight(generator):
    denoiser = mixture(DiscreteSchedule.cosine())
    draws = sample(denoiser, (4000, 2), num_steps=100, generator=generator, dtype=torch.float64)
    nearest = torch.cdist(draws, denoiser.means).argmin(1)
    counts = torch.bincount(nearest, minlength=3) / 4000
    exact = torch.bincount(
        torch.cdist(denoiser.sample(200_000, generator=generator), denoiser.means).argmin(1)
    )
    # Five standard errors of 4000 draws, and 0.01 for the hundred steps.
    assert bool(((counts - exact / 200_000).abs() < 5 * 0.5 / math.sqrt(4000) + 0.01).all())


def test_draws_come_in_the_promised_order():
    """Initial state, then one noise a transition, none into time 0."""
    denoiser = mixture(LINEAR)
    times = double([1000, 600, 300, 0])
    result = sample(
        denoiser,
        (4, 2),
        times=times,
        generator=torch.Generator().manual_seed(5),
        dtype=torch.float64,
    )
    source = torch.Generator().manual_seed(5)

    def draw():
        return torch.randn(4, 2, dtype=torch.float64, generator=source)

    x = draw()
    for time, before in pairwise(times):
        step = reverse_transition(denoiser, x, time, before)
        x = step.mean + (step.variance.sqrt() * draw() if before > 0 else 0)
    torch.testing.assert_close(result, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({"eta": 1.0}, 3),
        ({"eta": 0.0}, 1),
        ({"eta": 1.0, "final_noise": True}, 3),
        ({"eta": 0.0, "clean_variance": PointDataVariance()}, 1),
        ({"eta": 1.0, "clean_variance": PointDataVariance()}, 3),
        ({"eta": 0.0, "clean_variance": "exact"}, 3),
        ({"eta": 0.0, "clean_variance": "exact", "final_noise": True}, 4),
    ],
)
def test_noise_is_drawn_only_where_there_is_variance(options, draws):
    denoiser = mixture(LINEAR)
    if options.get("clean_variance") == "exact":
        options = {**options, "clean_variance": denoiser.clean_variance}
    used, reference = (torch.Generator().manual_seed(1) for _ in range(2))
    sample(denoiser, (3, 2), times=double([1000, 500, 250, 0]), generator=used, **options)
    for _ in range(draws):
        torch.randn(3, 2, generator=reference)
    assert torch.equal(used.get_state(), reference.get_state())


def test_a_chain_may_stop_and_go_on():
    denoiser = mixture(LINEAR)
    whole, parts = (torch.Generator().manual_seed(2) for _ in range(2))
    full = sample(denoiser, (5, 2), times=double([1000, 500, 200, 0]), generator=whole)
    half = sample(denoiser, (5, 2), times=double([1000, 500]), generator=parts)
    rest = sample(denoiser, initial=half, times=double([500, 200, 0]), generator=parts)
    assert torch.equal(full, rest)


def test_trajectory_holds_every_state():
    denoiser = mixture(LINEAR)

    def run(**options):
        return sample(
            denoiser, (3, 2), num_steps=4, generator=torch.Generator().manual_seed(3), **options
        )

    trajectory = run(return_trajectory=True)
    assert trajectory.shape == (5, 3, 2)
    assert torch.equal(trajectory[-1], run())
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(trajectory[0], start)


def test_heat_chains_start_at_their_prior_scale():
    start = sample(
        gaussian(0.0, 1.0, HeatSchedule(80.0)), (4000, 1), times=double([80.0, 0.0]),
        return_trajectory=True, generator=torch.Generator().manual_seed(0),
    )[0]  # fmt: skip
    assert start.std().item() == pytest.approx(80, rel=5 / math.sqrt(8000))


def test_noise_limit_caps_the_last_visible_noise():
    """Against data at one point the state is pure noise: its spread is the limit."""
    denoiser = gaussian(0.0, 0.0, LINEAR)
    limit = 0.01
    trajectory = sample(
        denoiser, (20_000, 1), times=double([1000, 500, 100, 0]), noise_limit=limit,
        return_trajectory=True, generator=torch.Generator().manual_seed(0), dtype=torch.float64,
    )  # fmt: skip
    weights = transition_weights(LINEAR, 500, 100)
    noise = trajectory[2] - weights.current * trajectory[1]
    assert weights.noise.item() > 0.1
    # Standard error of a mean absolute value: limit sqrt(π/2 − 1)/sqrt(n).
    assert noise.abs().mean().item() == pytest.approx(limit, rel=5 * 0.756 / math.sqrt(20_000))
    before = transition_weights(LINEAR, 1000, 500)
    wide = (trajectory[1] - before.current * trajectory[0]).std().item()
    assert wide == pytest.approx(before.noise.item(), rel=5 / math.sqrt(40_000))


def test_noise_limit_caps_estimated_variances_too():
    denoiser = gaussian(0.0, 0.3, LINEAR)
    calm = sample(
        denoiser, (50, 1), times=double([500, 100, 0]), noise_limit=0.0,
        clean_variance=denoiser.clean_variance, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    initial = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    mean = reverse_transition(denoiser, initial, 500, 100).mean
    # The chain adds its two products in one operation: an ulp of float32.
    torch.testing.assert_close(calm, denoiser.predict(mean, 100).sample, rtol=1e-6, atol=1e-7)


def test_mean_shift_is_added_to_the_mean_and_sees_the_transition():
    denoiser = mixture(LINEAR)
    calls = []

    def shift(x, time, previous_time, mean, variance, condition):
        calls.append((float(time), float(previous_time), variance, condition))
        return torch.full_like(mean, 0.25) * (previous_time > 0)

    initial = torch.zeros(2, 2, dtype=torch.float64)
    label = torch.tensor([-1, -1])
    labelled = mixture(LINEAR, labels=torch.arange(3))
    shifted = sample(
        labelled, initial=initial, times=double([500, 250]), eta=0.0, mean_shift=shift,
        condition=label,
    )  # fmt: skip
    plain = sample(denoiser, initial=initial, times=double([500, 250]), eta=0.0)
    torch.testing.assert_close(shifted, plain + 0.25, rtol=1e-14, atol=0)
    assert calls[0][:2] == (500, 250)
    assert calls[0][2].shape == (2, 2)
    assert calls[0][3] is label


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chains_keep_the_means_of_float32(dtype):
    """The same noise in half and in single precision; specified: means differ by < 2e-2."""
    denoiser = mixture(DiscreteSchedule.cosine())
    initial = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    half = sample(denoiser, initial=initial, num_steps=200, eta=0.0)
    single = sample(denoiser, initial=initial.float(), num_steps=200, eta=0.0)
    assert half.dtype == dtype
    assert bool(((half.float() - single).mean(0).abs() < 2e-2).all())


def test_sampling_needs_no_gradient_and_leaves_the_global_source_alone():
    network = torch.nn.Linear(2, 2)
    denoiser = NetworkDenoiser(lambda x, time: network(x), LINEAR, prediction_type="v_prediction")
    before = torch.get_rng_state()
    one = sample(denoiser, (3, 2), num_steps=3, generator=torch.Generator().manual_seed(0))
    two = sample(denoiser, (3, 2), num_steps=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not one.requires_grad


def test_an_empty_batch_stays_empty():
    assert sample(mixture(LINEAR), (0, 2), num_steps=3).shape == (0, 2)


class Flaw(torch.nn.Module):
    """A smooth network of no merit: what counts is that both libraries see the same one."""

    def forward(self, x, time):
        return 0.9 * x + 0.1 * torch.sin(3 * x + time.reshape(-1, 1) / 300)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_of_diffusers_is_reproduced(spacing, num_steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True
    )
    theirs.set_timesteps(num_steps)
    network = Flaw()
    initial = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    x = initial
    for timestep in theirs.timesteps:
        x = theirs.step(network(x, timestep.float()), timestep, x, eta=0.0).prev_sample
    ours = sample(
        NetworkDenoiser(network, LINEAR, time_offset=-1), initial=initial, eta=0.0,
        times=LINEAR.times(num_steps, spacing=spacing),
    )  # fmt: skip
    # float32 and a float32 cumprod on their side, relative to the largest sample.
    assert ((ours - x).abs().max() / x.abs().max()).item() < 2e-6


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_of_diffusers_is_reproduced(spacing):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        timestep_spacing=spacing, clip_sample=False, variance_type="fixed_small"
    )
    theirs.set_timesteps(20)
    network = Flaw()
    source = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=source)
    for timestep in theirs.timesteps:
        x = theirs.step(network(x, timestep.float()), timestep, x, generator=source).prev_sample
    ours = sample(
        NetworkDenoiser(network, LINEAR, time_offset=-1), (8, 3),
        times=LINEAR.times(20, spacing=spacing), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert ((ours - x).abs().max() / x.abs().max()).item() < 2e-6


@pytest.mark.gpu
def test_a_chain_on_a_gpu_does_not_wait_for_the_device():
    device = torch.device("cuda")
    network = torch.nn.Linear(4, 4).to(device)
    denoiser = NetworkDenoiser(lambda x, time: network(x), LINEAR)
    source = torch.Generator(device).manual_seed(0)
    sample(denoiser, (3, 4), num_steps=2, generator=source)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sample(denoiser, (3, 4), num_steps=20, generator=source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.device.type == "cuda"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of shape and initial.*neither"),
        ({"shape": (2, 2), "initial": torch.zeros(2, 2)}, "exactly one.*both"),
        ({"shape": (2, 2)}, "exactly one of times and num_steps.*neither"),
        ({"shape": (2, 2), "num_steps": 2, "times": double([5, 0])}, "exactly one.*both"),
        ({"shape": (2, 2), "times": double([5, 5, 0])}, "strictly decreasing"),
        ({"shape": (2, 2), "times": double([0, 5])}, "strictly decreasing"),
        ({"shape": (2, 2), "times": double([float("nan"), 0])}, "strictly decreasing"),
        ({"shape": (2, 2), "times": double([5])}, "at least two"),
        ({"shape": (2, 2), "times": double([1001, 0])}, "time.*1001"),
        ({"shape": (2, 2), "times": double([5, -1])}, "time.*-1"),
        ({"shape": (2, 2), "num_steps": 0}, "num_steps.*0"),
        ({"shape": (2, 2), "num_steps": 1001}, "num_steps.*1001"),
        ({"shape": (2, 2), "num_steps": 2, "eta": 1.5}, "eta.*1.5"),
        ({"shape": (2, 2), "num_steps": 2, "eta": -0.1}, "eta.*-0.1"),
        ({"shape": (2, 2), "num_steps": 2, "noise_limit": -1.0}, "noise_limit.*-1"),
        ({"initial": torch.zeros(2, 2).long(), "num_steps": 2}, "initial.*int64"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ValueError, match=words):
        sample(mixture(LINEAR), **options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("times", "eta", "words"),
    [
        ((5, 5), 1.0, "previous_time.*5"),
        ((5, 6), 1.0, "previous_time.*6"),
        ((0, 0), 1.0, "positive"),
        ((1001, 0), 1.0, "time.*1001"),
        ((5, 0), 2.0, "eta.*2"),
        ((torch.tensor([5.0, 7.0]), torch.tensor([4.0, 7.0])), 1.0, "previous_time"),
    ],
)
def test_bad_transitions_are_refused(times, eta, words):
    with pytest.raises(ValueError, match=words):
        transition_weights(LINEAR, *times, eta=eta)
    with pytest.raises(ValueError, match=words):
        reverse_transition(mixture(LINEAR), torch.zeros(2, 2), *times, eta=eta)


def test_continuous_schedules_sample_on_their_own_grids(generator):
    for schedule in (VariancePreservingSchedule(), HeatSchedule()):
        denoiser = mixture(schedule)
        times = schedule.times(40, spacing="karras")
        draws = sample(denoiser, (2000, 2), times=times, generator=generator, dtype=torch.float64)
        mean = double([0.2, 0.5, 0.3]) @ denoiser.means
        # Five standard errors, and 0.02 for forty steps.
        error = 5 * draws.std(0) / math.sqrt(2000) + 0.02
        assert bool(((draws.mean(0) - mean).abs() < error).all())
