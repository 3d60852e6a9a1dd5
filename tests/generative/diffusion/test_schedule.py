"""Schedules against 30-digit arithmetic, diffusers' grids, and themselves."""

import gc
import math
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from kexue.generative.diffusion import (
    DiscreteSchedule,
    HeatSchedule,
    NoiseSchedule,
    VariancePreservingSchedule,
)

# Fifteen printed digits, and at most 1000 additions of log1p in float64: 1e-12 leaves a factor.
EXACT = {"rel": 1e-12}

SCHEDULES = [
    DiscreteSchedule.linear(),
    DiscreteSchedule.proportional(),
    DiscreteSchedule.scaled_linear(),
    DiscreteSchedule.cosine(),
    DiscreteSchedule.linear(7),
    VariancePreservingSchedule(),
    HeatSchedule(),
]


@pytest.mark.parametrize(
    ("schedule", "time", "signal", "noise"),
    [
        (DiscreteSchedule.linear(), 1, 0.999949998749937, 0.01),
        (DiscreteSchedule.linear(), 10, 0.999052153186126, 0.0435292455042053),
        (DiscreteSchedule.linear(), 500, 0.280334162887398, 0.959902472711797),
        (DiscreteSchedule.linear(), 1000, 0.00635281808757002, 0.99997982064757),
        (DiscreteSchedule.proportional(), 1, 0.999989999949999, 0.00447213595499958),
        (DiscreteSchedule.proportional(), 500, 0.284591568880102, 0.958648861117751),
        (DiscreteSchedule.proportional(), 1000, 0.00648203085214472, None),
        (DiscreteSchedule.cosine(), 1, 0.999979357674536, 0.00642528013566551),
        (DiscreteSchedule.cosine(), 500, 0.702740058941169, 0.711446701840245),
        (DiscreteSchedule.cosine(), 1000, 4.92825213136916e-5, None),
    ],
)
def test_scales_match_thirty_digit_arithmetic(schedule, time, signal, noise):
    assert schedule.signal_scale(time).item() == pytest.approx(signal, **EXACT)
    if noise is not None:
        assert schedule.noise_scale(time).item() == pytest.approx(noise, **EXACT)


def test_every_step_of_the_linear_schedule_matches_high_precision():
    schedule = DiscreteSchedule.linear()
    with mp.workdps(30):
        product, expected = mpf(1), []
        for step in range(1000):
            product *= 1 - (mpf(1e-4) + (mpf(0.02) - mpf(1e-4)) * step / 999)
            expected.append((float(mp.sqrt(product)), float(mp.sqrt(1 - product))))
    signal, noise = torch.tensor(expected, dtype=torch.float64).T
    steps = torch.arange(1, 1001)
    torch.testing.assert_close(schedule.signal_scale(steps), signal, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.noise_scale(steps), noise, rtol=1e-12, atol=0)


def test_betas_and_alphas_cumprod_are_the_literatures():
    schedule = DiscreteSchedule.linear()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.betas, betas, rtol=1e-10, atol=0)
    cumulated = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(schedule.alphas_cumprod, cumulated, rtol=1e-11, atol=0)


def test_the_three_constructors_agree():
    betas = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    cumulated = torch.cumprod(1 - betas, 0)
    times = torch.linspace(0, 20, 81, dtype=torch.float64)
    expected = DiscreteSchedule.from_betas(betas).sigma(times)
    for other in (
        DiscreteSchedule(cumulated.sqrt()),
        DiscreteSchedule.from_alphas_cumprod(cumulated),
    ):
        torch.testing.assert_close(other.sigma(times), expected, rtol=1e-12, atol=0)


def test_half_a_standard_normal_variance_of_the_article_is_only_near_e_to_minus_five():
    last = DiscreteSchedule.proportional().signal_scale(1000).item()
    assert math.exp(-5) != pytest.approx(last, rel=0.03)
    assert math.exp(-5) == pytest.approx(last, rel=0.05)


def test_log_sigma_is_linear_between_steps_and_sigma_is_linear_below_the_first():
    schedule = DiscreteSchedule.linear()
    between = schedule.log_sigma(10.25)
    ends = schedule.log_sigma(torch.tensor([10, 11]))
    torch.testing.assert_close(between, 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.sigma(0.3), 0.3 * schedule.sigma(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_zero_is_clean_data(schedule):
    assert schedule.signal_scale(0).item() == 1
    assert schedule.noise_scale(0).item() == 0
    assert schedule.log_signal_to_noise(0).item() == math.inf


@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=repr)
def test_variance_is_preserved(schedule):
    time = torch.linspace(0, schedule.maximum_time, 333, dtype=torch.float64)
    total = schedule.signal_scale(time) ** 2 + schedule.noise_scale(time) ** 2
    # Two squares, each good to a few ulp.
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=4e-15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_sigma_log_sigma_and_signal_to_noise_say_the_same(schedule):
    time = torch.linspace(schedule.minimum_time, schedule.maximum_time, 100, dtype=torch.float64)
    sigma = schedule.noise_scale(time) / schedule.signal_scale(time)
    torch.testing.assert_close(schedule.sigma(time), sigma, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.log_sigma(time).exp(), sigma, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        schedule.log_signal_to_noise(time).exp(), sigma**-2, rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@settings(max_examples=50, deadline=None)
@given(share=st.floats(1e-6, 1.0))
def test_time_from_sigma_inverts_sigma(schedule, share):
    time = share * schedule.maximum_time
    back = schedule.time_from_sigma(schedule.sigma(time)).item()
    # d time / d log sigma is at most a few hundred times time where a schedule is flat.
    assert back == pytest.approx(time, rel=1e-10)


def test_time_from_sigma_works_for_a_single_step():
    schedule = DiscreteSchedule(torch.tensor([0.5]))
    assert schedule.time_from_sigma(schedule.sigma(1)).item() == pytest.approx(1)
    assert schedule.time_from_sigma(schedule.sigma(0.25)).item() == pytest.approx(0.25)


def test_continuous_schedule_matches_its_formula():
    schedule = VariancePreservingSchedule(0.1, 20.0)
    with mp.workdps(30):
        log_signal = -(mpf("0.3") ** 2) * mpf("19.9") / 4 - mpf("0.3") * mpf("0.1") / 2
        signal, noise = mp.exp(log_signal), mp.sqrt(1 - mp.exp(2 * log_signal))
    assert schedule.signal_scale(0.3).item() == pytest.approx(float(signal), rel=1e-14)
    assert schedule.noise_scale(0.3).item() == pytest.approx(float(noise), rel=1e-14)


def test_heat_schedule_has_time_as_its_noise():
    schedule = HeatSchedule(80.0, minimum_sigma=0.01)
    assert (schedule.minimum_time, schedule.maximum_time, schedule.prior_scale) == (0.01, 80, 80)
    time = torch.tensor([0.5, 70.0], dtype=torch.float64)
    assert torch.equal(schedule.sigma(time), time)
    assert torch.equal(schedule.signal_scale(time), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_scales_are_differentiable_in_time(schedule):
    middle = 0.4137 * schedule.maximum_time
    time = torch.tensor([middle], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(schedule.signal_scale, time)
    assert torch.autograd.gradcheck(schedule.noise_scale, time)


def test_integers_and_float32_times_give_float64_scales():
    schedule = DiscreteSchedule.linear()
    expected = schedule.signal_scale(500.0)
    for time in (500, torch.tensor(500), torch.tensor(500.0, dtype=torch.float32)):
        assert schedule.signal_scale(time).dtype == torch.float64
        assert torch.equal(schedule.signal_scale(time), expected)


def test_add_noise_takes_one_time_or_one_per_example():
    schedule = DiscreteSchedule.linear()
    clean, noise = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    both = schedule.add_noise(clean, noise, torch.tensor([1.0, 700.0, 20.0]))
    for i, time in enumerate((1, 700, 20)):
        alone = schedule.add_noise(clean, noise, time)
        expected = schedule.signal_scale(time) * clean + schedule.noise_scale(time) * noise
        torch.testing.assert_close(alone, expected, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(both[i], alone[i], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_grids_are_those_of_diffusers_plus_one(spacing):
    """Except where rounding in diffusers decides about a tie or adds a step (13 of 1000: #9261)."""
    diffusers = pytest.importorskip("diffusers")
    schedule = DiscreteSchedule.linear()
    for num_steps in (1, 2, 3, 4, 5, 7, 10, 13, 20, 25, 50, 64, 99, 100, 250, 333, 500, 999, 1000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
            theirs.set_timesteps(num_steps)
        expected = theirs.timesteps.double() + 1
        if len(expected) != num_steps:
            continue
        assert torch.equal(schedule.times(num_steps, spacing=spacing)[:-1], expected), num_steps


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quadratic", "karras"])
def test_every_grid_decreases_strictly_within_the_schedule_and_ends_at_zero(spacing):
    schedule = DiscreteSchedule.linear(50)
    for num_steps in range(1, 51):
        times = schedule.times(num_steps, spacing=spacing)
        assert times.shape == (num_steps + 1,)
        assert times.dtype == torch.float64
        assert bool((times.diff() < 0).all())
        assert times[-1] == 0
        assert times[0] <= 50


def test_quadratic_grid_has_equally_spaced_roots_where_integers_allow():
    times = DiscreteSchedule.linear().times(5, spacing="quadratic")
    roots = torch.linspace(1, math.sqrt(1000), 5, dtype=torch.float64)
    assert torch.equal(times[:-1].flip(0), (roots**2).round())


@pytest.mark.parametrize("schedule", [DiscreteSchedule.cosine(), HeatSchedule()], ids=repr)
def test_karras_grid_is_equally_spaced_in_the_root_of_sigma(schedule):
    times = schedule.times(12, spacing="karras", rho=5.0)
    assert times[0] == schedule.maximum_time
    assert times[-2] == schedule.minimum_time
    steps = (schedule.sigma(times[:-1]) ** 0.2).diff()
    torch.testing.assert_close(steps, steps.mean().expand(11), rtol=1e-9, atol=0)


def test_continuous_grid_is_uniform_down_to_the_smallest_time_of_training():
    times = VariancePreservingSchedule(minimum_time=0.01).times(4)
    expected = torch.tensor([1.0, 0.67, 0.34, 0.01, 0.0], dtype=torch.float64)
    torch.testing.assert_close(times, expected, rtol=1e-14, atol=0)


@dataclass
class Tilted(NoiseSchedule):
    """A schedule of a user's own, with a slope that may change."""

    slope: float
    minimum_time: float = 1e-3
    maximum_time: float = 1.0

    def _scales(self, time):
        return torch.ones_like(time), self.slope * time

    def _log_sigma(self, time):
        return torch.log(self.slope * time)

    def time_from_sigma(self, sigma):
        return torch.as_tensor(sigma) / self.slope


class Learned(VariancePreservingSchedule):
    def __init__(self):
        super().__init__()
        self.rate = torch.ones((), dtype=torch.float64)

    def _log_signal(self, time):
        return self.rate * super()._log_signal(time)


def noisy(schedule, time=0.5):
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    return schedule.add_noise(zeros, torch.ones_like(zeros), time).item()


def test_scales_follow_a_schedule_that_changes():
    tilted = Tilted(2.0)
    assert noisy(tilted) == 1.0
    tilted.slope = 3.0
    assert noisy(tilted) == 1.5

    learned = Learned()
    assert noisy(learned) == VariancePreservingSchedule().noise_scale(0.5).item()
    learned.rate.mul_(2)
    assert noisy(learned) == learned.noise_scale(0.5).item()

    ours = VariancePreservingSchedule()
    before = noisy(ours)
    ours.beta_max = 10.0
    assert noisy(ours) == VariancePreservingSchedule(beta_max=10.0).noise_scale(0.5).item() < before


def test_scales_of_a_time_are_computed_once(monkeypatch):
    schedule, calls = DiscreteSchedule.linear(), []
    scales = DiscreteSchedule._scales
    monkeypatch.setattr(
        DiscreteSchedule, "_scales", lambda self, time: calls.append(time) or scales(self, time)
    )
    assert len({noisy(schedule, time) for time in (500, 500.0, torch.tensor(500))}) == 1
    assert len(calls) == 1


def test_a_schedule_is_not_kept_alive_by_its_scales():
    schedule = DiscreteSchedule.linear()
    noisy(schedule, 500)
    alive = weakref.ref(schedule)
    del schedule
    gc.collect()
    assert alive() is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DiscreteSchedule(torch.tensor([0.9, 0.9])), "decrease"),
        (lambda: DiscreteSchedule(torch.tensor([0.8, 0.9])), "decrease"),
        (lambda: DiscreteSchedule(torch.tensor([1.0, 0.9])), "signal_scale"),
        (lambda: DiscreteSchedule(torch.tensor([0.9, 0.0])), "0.0"),
        (lambda: DiscreteSchedule(torch.tensor([0.9, float("nan")])), "nan"),
        (lambda: DiscreteSchedule(torch.tensor([])), "at least one step"),
        (lambda: DiscreteSchedule.from_betas(torch.tensor([0.1, 1.0])), "betas"),
        (lambda: DiscreteSchedule.from_betas(torch.tensor([0.0, 0.1])), "betas"),
        (lambda: DiscreteSchedule.linear(beta_end=1.5), "betas"),
        (lambda: DiscreteSchedule.scaled_linear(beta_start=-0.1), "betas"),
        (lambda: DiscreteSchedule.cosine(0), "num_steps"),
        (lambda: DiscreteSchedule.from_alphas_cumprod(torch.tensor([0.9, 1.1])), "1.1"),
        (lambda: DiscreteSchedule.linear().signal_scale(1000.5), "time.*1000.5"),
        (lambda: DiscreteSchedule.linear().noise_scale(-1.0), "time.*-1"),
        (lambda: HeatSchedule().sigma(float("nan")), "time.*nan"),
        (
            lambda: VariancePreservingSchedule().log_sigma(torch.tensor([0.5, 1.01])),
            "time.*1.00999",
        ),
        (lambda: DiscreteSchedule.linear().time_from_sigma(1e6), "sigma"),
        (lambda: DiscreteSchedule.linear().times(0), "num_steps.*1…1000.*0"),
        (lambda: DiscreteSchedule.linear().times(1001), "num_steps.*1001"),
        (lambda: HeatSchedule().times(0), "num_steps"),
        (lambda: DiscreteSchedule.linear().times(5, spacing="uniform"), "spacing.*trailing"),
        (lambda: HeatSchedule().times(5, spacing="trailing"), "spacing.*uniform, karras"),
        (lambda: HeatSchedule().times(5, spacing="karras", rho=0.0), "rho"),
        (lambda: HeatSchedule(1.0, minimum_sigma=2.0), "minimum_sigma"),
        (lambda: VariancePreservingSchedule(0.0), "beta_min"),
        (lambda: VariancePreservingSchedule(minimum_time=1.0), "minimum_time"),
        (
            lambda: HeatSchedule().add_noise(torch.zeros(2, 3), torch.zeros(2, 1), 1.0),
            "same shape",
        ),
        (
            lambda: HeatSchedule().add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)),
            r"time.*\(3,\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_abstract_schedule_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        NoiseSchedule()
