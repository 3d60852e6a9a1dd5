"""Clean variances, their table and its estimation against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative.diffusion.mixtures import SCHEDULES, TIMES, double, gaussian, mixture
from kexue.generative.diffusion import (
    ClassifierFreeGuidance,
    DiscreteSchedule,
    GaussianMixtureDenoiser,
    NetworkDenoiser,
    PointDataVariance,
    StandardNormalDataVariance,
    TabulatedVariance,
    clip_clean_variance,
    estimate_clean_variance,
    reverse_transition,
    sample,
    transition_weights,
    variational_bound,
)

LINEAR = DiscreteSchedule.linear()
SPREAD = 0.3


@pytest.fixture
def generator():
    # Another stream than that of `draws`: noise must not repeat the data.
    return torch.Generator().manual_seed(5)


def exact_variance(times):
    """Clean variance of N(m, 0.3), 1/(1/0.3 + 1/σ²)."""
    return 1 / (1 / SPREAD + 1 / LINEAR.sigma(times) ** 2)


def estimate(data, **options):
    denoiser = gaussian(0.7, SPREAD, LINEAR)
    options = {"generator": torch.Generator().manual_seed(1), **options}
    return estimate_clean_variance(denoiser, data, **options)


def draws(count):
    return gaussian(0.7, SPREAD, LINEAR).sample(count, generator=torch.Generator().manual_seed(0))


def test_constants_match_thirty_digit_arithmetic():
    times = double([1, 100, 500, 1000])
    expected = double([9.9976672109841e-5, 0.083030397601012, 0.292515413001199, 0.299996367650594])
    torch.testing.assert_close(exact_variance(times), expected, rtol=1e-12, atol=0)
    bounds = double([0.0001000100010001, 0.114804650074889, 11.7247115858784, 24777.0520521265])
    unbounded = torch.full_like(bounds, 1e9)
    torch.testing.assert_close(
        clip_clean_variance(unbounded, LINEAR, times), bounds, rtol=1e-11, atol=0
    )


@pytest.mark.parametrize(
    ("time", "norm"),
    [
        (1, 0.00033325557369947),
        (100, 0.276767992003373),
        (500, 0.975051376670662),
        (1000, 0.999987892168648),
    ],
)
def test_exact_denoiser_has_the_noise_norm_of_thirty_digit_arithmetic(time, norm):
    """E‖ε̂‖²/d by Gauss–Hermite quadrature, which is exact for a quadratic."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    signal, noise = LINEAR.signal_scale(time), LINEAR.noise_scale(time)
    x = signal * 0.7 + torch.sqrt(signal**2 * SPREAD + noise**2) * double(nodes)
    epsilon = gaussian(0.7, SPREAD, LINEAR).predict(x.unsqueeze(1), time).epsilon
    mean = (double(weights) * epsilon.squeeze(1) ** 2).sum() / math.sqrt(2 * math.pi)
    assert mean.item() == pytest.approx(norm, rel=1e-11)
    # And with it the ε-norm formula gives the clean variance; cancellation costs 1/σ² digits.
    variance = LINEAR.sigma(time) ** 2 * (1 - mean)
    assert variance.item() == pytest.approx(exact_variance(double(time)).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("times", "eta", "small", "large", "analytic"),
    [
        ((500, 250), 1.0, 0.43905474794187, 0.850048776770546, 0.56953057124157),
        ((1000, 900), 1.0, 0.853151943567809, 0.853352359421977, 0.85321207002268),
        ((500, 250), 0.0, 0.0, None, 0.0798481410176862),
        ((1000, 900), 0.0, 0.0, None, 3.14400622621826e-5),
    ],
)
def test_transition_variances_match_thirty_digit_arithmetic(times, eta, small, large, analytic):
    denoiser = gaussian(0.7, SPREAD, LINEAR)
    x = torch.zeros(1, 1, dtype=torch.float64)
    now = double([times[0]])
    table = TabulatedVariance(now, exact_variance(now), schedule=LINEAR)

    def variance(clean_variance):
        step = reverse_transition(denoiser, x, *times, eta=eta, clean_variance=clean_variance)
        return step.variance.item()

    assert variance(PointDataVariance()) == pytest.approx(small, rel=1e-12, abs=1e-30)
    # λ² is a square of a difference: at 1000→900 it keeps ten digits.
    assert variance(table) == pytest.approx(analytic, rel=1e-10)
    if large is not None:
        assert variance(StandardNormalDataVariance()) == pytest.approx(large, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "variance_preserving"])
def test_standard_normal_variance_gives_the_forward_variance(name):
    """β² of the forward step, for any two times of a variance preserving schedule."""
    schedule = SCHEDULES[name]
    denoiser = gaussian(0.0, 1.0, schedule)
    now, before = TIMES[name], 0.3 * TIMES[name]
    step = reverse_transition(
        denoiser, torch.ones(1, 1, dtype=torch.float64), now, before,
        clean_variance=StandardNormalDataVariance(),
    )  # fmt: skip
    forward = 1 - (schedule.signal_scale(now) / schedule.signal_scale(before)) ** 2
    assert step.variance.item() == pytest.approx(forward.item(), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_standard_normal_variance_is_that_of_its_exact_denoiser(name):
    schedule = SCHEDULES[name]
    denoiser = gaussian(0.0, 1.0, schedule)
    x = torch.ones(3, 1, dtype=torch.float64)
    for time in (TIMES[name], torch.full((3,), TIMES[name], dtype=torch.float64)):
        value = StandardNormalDataVariance()(x, time, denoiser.predict(x, time))
        torch.testing.assert_close(
            value.expand_as(x), denoiser.clean_variance(x, time), rtol=1e-12, atol=0
        )


def test_point_data_variance_is_ddpm_small_and_ddim(generator):
    denoiser = mixture(LINEAR)
    initial = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    for eta in (0.0, 1.0):
        plain, zero = (
            sample(
                denoiser, initial=initial, num_steps=5, eta=eta, clean_variance=clean_variance,
                generator=torch.Generator().manual_seed(3),
            )
            for clean_variance in (None, PointDataVariance())
        )  # fmt: skip
        torch.testing.assert_close(zero, plain, rtol=1e-13, atol=1e-13)
    assert PointDataVariance()(initial.to("meta"), 5).device.type == "cpu"


@pytest.mark.parametrize("estimator", ["residual", "epsilon_norm", "mean_spread"])
def test_every_estimator_is_unbiased_for_an_exact_denoiser(estimator):
    times = double([1, 100, 500])
    table = estimate(draws(40_000), times=times, estimator=estimator)
    assert table.standard_error is not None
    error = table.standard_error
    if estimator == "mean_spread":
        # Its error counts the spread of x̂_0 only; that of the sample variance comes on top.
        error = error + math.sqrt(2 / 40_000) * SPREAD
    assert bool(((table.values - exact_variance(times)).abs() < 5 * error).all())


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("residual", [1.4142135623731] * 3),
        ("epsilon_norm", [0.541194310531351, 55.2708204655404, 17124.4427207449]),
        ("mean_spread", [3.69553035034011, 0.0361854588579327, 0.000116792121800096]),
    ],
)
def test_relative_deviation_of_a_draw_matches_the_closed_form(estimator, expected):
    count = 100_000
    times = double([100, 500, 900])
    # Without the error of the sample mean: at t = 900 it is a third of the spread of x̂_0.
    data = draws(count)
    table = estimate(data - data.mean() + 0.7, times=times, estimator=estimator)
    relative = table.standard_error * math.sqrt(count) / exact_variance(times)
    # A standard deviation of squared normals has relative error sqrt((kurtosis − 1)/4n) = 0.006.
    torch.testing.assert_close(relative, double(expected), rtol=5 * 0.006, atol=0)


def test_residual_is_the_variance_plus_the_squared_bias(generator):
    """For x̂_0 off by a constant b: E(x_0 − x̂_0)² = Var + b², which no other estimator sees."""
    exact = gaussian(0.7, SPREAD, LINEAR)

    class Biased:
        schedule = LINEAR

        def predict(self, x, time, *, condition=None):
            prediction = exact.predict(x, time)
            return prediction.with_sample(prediction.sample + 0.2, x)

    data = draws(40_000)
    table = estimate_clean_variance(Biased(), data, times=[300], generator=generator)
    expected = exact_variance(double([300])) + 0.04
    assert abs(table.values - expected).item() < 5 * table.standard_error.item()
    norm = estimate_clean_variance(
        Biased(), data, times=[300], estimator="epsilon_norm", generator=generator
    )
    # The bias of ε̂ does not depend on ε̂, so the identity loses b² with the wrong sign.
    expected_norm = exact_variance(double([300])) - 0.04
    assert abs(norm.values - expected_norm).item() < 5 * norm.standard_error.item()


def test_a_residual_at_the_noisiest_step_keeps_its_digits_in_float32():
    """σ² = 24 777: the residual is formed between noises and multiplied once."""
    data = draws(20_000)
    double_table = estimate(data, times=[1000])
    denoiser = gaussian(0.7, SPREAD, LINEAR).float()
    source = torch.Generator().manual_seed(1)
    single = estimate_clean_variance(denoiser, data.float(), times=[1000], generator=source)
    # Other draws; five standard errors each. The rounding of ε̂ adds (6e-8 σ)² = 1e-10.
    error = 5 * (double_table.standard_error + single.standard_error)
    assert (single.values - double_table.values).abs().item() < error.item()
    assert single.values.item() == pytest.approx(SPREAD, rel=0.06)


def test_per_dimension_values_are_those_of_each_dimension():
    """Independent entries with variances 0.1 and 0.4."""
    from kexue.generative.diffusion import GaussianMixtureDenoiser

    variances = double([[0.1, 0.4]])
    denoiser = GaussianMixtureDenoiser(double([[0.0, 1.0]]), variances, schedule=LINEAR)
    data = denoiser.sample(20_000, generator=torch.Generator().manual_seed(0))
    times = double([200, 600])
    expected = 1 / (1 / variances + 1 / LINEAR.sigma(times)[:, None] ** 2)
    for estimator in ("residual", "mean_spread", "epsilon_norm"):
        table = estimate_clean_variance(
            denoiser, data, times=times, per_dimension=True, estimator=estimator,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert table.values.shape == (2, 2)
        assert table.standard_error.shape == (2,)
        # Five standard errors: √2/√n relative for the residual, σ²√2/√n at most for the others.
        scale = expected if estimator == "residual" else LINEAR.sigma(times)[:, None] ** 2
        assert bool(((table.values - expected).abs() < 5 * math.sqrt(2 / 20_000) * scale).all())
        scalar = estimate_clean_variance(
            denoiser, data, times=times, estimator=estimator,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        torch.testing.assert_close(table.values.mean(1), scalar.values, rtol=1e-9, atol=0)
        torch.testing.assert_close(table.standard_error, scalar.standard_error)


def test_the_table_is_sorted_and_independent_of_the_batch_size_for_one_time():
    """With one time and one batch of noise after the other the draws are the same stream.

    Draws of at least 16 entries are filled in one go, so batches of 64 see the same numbers.
    """
    data = torch.randn(256, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = NetworkDenoiser(lambda x, time: 0.5 * x, LINEAR)

    def run(batch_size):
        return estimate_clean_variance(
            denoiser, data, times=[400.0], batch_size=batch_size,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    torch.testing.assert_close(run(64).values, run(256).values, rtol=1e-12, atol=0)
    torch.testing.assert_close(run(64).standard_error, run(256).standard_error, rtol=1e-9, atol=0)
    unsorted = estimate(draws(50), times=[900, 1, 30])
    assert unsorted.times.tolist() == [1, 30, 900]


def test_draws_of_one_example_are_averaged_before_the_standard_error():
    """At t = 1000 the residual is x_0 − E x_0 whatever the noise: more draws tell nothing new."""
    data = draws(2000)
    once, often = (estimate(data, times=[1000], num_noise=n) for n in (1, 8))
    assert often.standard_error.item() == pytest.approx(once.standard_error.item(), rel=0.02)
    # At t = 1 it is all noise: eight draws have a standard error 1/√8 as large.
    once, often = (estimate(data, times=[1], num_noise=n) for n in (1, 8))
    ratio = often.standard_error.item() / once.standard_error.item()
    assert ratio == pytest.approx(1 / math.sqrt(8), rel=0.15)


def test_every_cost_is_a_call_of_the_denoiser():
    calls = []

    def network(x, time):
        calls.append(len(x))
        return 0 * x

    estimate_clean_variance(
        NetworkDenoiser(network, LINEAR), torch.zeros(10, 2), times=[1, 5, 9], num_noise=2,
        batch_size=4,
    )  # fmt: skip
    assert sum(calls) == 10 * 3 * 2
    assert max(calls) == 4


def test_clipping_of_the_denoiser_is_set_aside(generator):
    data = draws(100).float()
    plain, clipped = (
        NetworkDenoiser(lambda x, time: 0.3 * x, LINEAR, clip_sample=clip)
        for clip in (None, (-1.0, 1.0))
    )
    tables = [
        estimate_clean_variance(
            denoiser, data, times=[100, 900], generator=torch.Generator().manual_seed(0)
        )
        for denoiser in (plain, clipped)
    ]
    assert torch.equal(tables[0].values, tables[1].values)
    assert clipped.clip_sample == (-1.0, 1.0)


def wrapped(kind, clip):
    """A denoiser that clips somewhere below what is seen of it."""
    inner = NetworkDenoiser(lambda x, time, label: 0.3 * x, LINEAR, clip_sample=clip)
    if kind == "compiled":
        return torch.compile(inner)
    guided = ClassifierFreeGuidance(inner, scale=1.5, null_condition=0.0)
    return torch.compile(guided) if kind == "compiled guidance" else guided


@pytest.mark.parametrize("kind", ["compiled", "guidance", "compiled guidance"])
def test_clipping_inside_of_a_denoiser_is_set_aside_and_stays(kind):
    data, label = draws(100).float(), torch.zeros(100)
    clipped, tables = wrapped(kind, (-1.0, 1.0)), []
    before = clipped.predict(9 * data, 900, condition=label).sample
    for denoiser in (wrapped(kind, None), clipped):
        generator = torch.Generator().manual_seed(0)
        tables.append(
            estimate_clean_variance(
                denoiser, data, times=[100, 900], condition=label, generator=generator
            )
        )
    assert torch.equal(tables[0].values, tables[1].values)
    assert torch.equal(clipped.predict(9 * data, 900, condition=label).sample, before)
    assert before.abs().max() == 1


def test_estimates_are_clipped_to_the_bounds():
    """A denoiser of no merit has a residual above σ²; data in [−1, 1] bound the variance by 1."""
    denoiser = NetworkDenoiser(lambda x, time: -x, LINEAR)
    data = torch.ones(20, 3).sign()
    free = estimate_clean_variance(denoiser, data, times=[100, 900])
    torch.testing.assert_close(free.values, LINEAR.sigma(double([100, 900])) ** 2)
    bounded = estimate_clean_variance(denoiser, data, times=[100, 900], data_range=(-1, 1))
    assert bounded.values.tolist() == [pytest.approx(free.values[0].item()), 1.0]
    # ε-norms above 1 would give a negative variance.
    loud = NetworkDenoiser(lambda x, time: 9 * torch.ones_like(x), LINEAR)
    table = estimate_clean_variance(loud, data, times=[100], estimator="epsilon_norm")
    assert table.values.tolist() == [0.0]


def test_conditions_follow_their_examples(generator):
    seen = []

    def network(x, time, condition):
        seen.append(condition)
        return x * condition.reshape(-1, 1)

    labels = torch.arange(7.0)
    estimate_clean_variance(
        NetworkDenoiser(network, LINEAR), torch.zeros(7, 2), times=[5], batch_size=3,
        condition=labels,
    )  # fmt: skip
    assert torch.equal(torch.cat(seen), labels)


def test_a_condition_may_be_a_number_for_all():
    classes = GaussianMixtureDenoiser(
        double([[-2.0], [2.0]]), double([0.3, 0.1]), schedule=LINEAR, labels=torch.tensor([0, 1])
    )
    data, generators = double([[2.0], [1.7], [2.1]]), (torch.Generator() for _ in range(2))
    number, tensor = (
        estimate_clean_variance(
            classes, data, times=[300], condition=given, generator=generator.manual_seed(0)
        )
        for given, generator in zip((1, torch.tensor(1)), generators, strict=True)
    )
    assert torch.equal(number.values, tensor.values)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_the_table_interpolates_the_ratio_in_log_sigma(name, share):
    schedule = SCHEDULES[name]
    nodes = double([0.2, 0.5]) * schedule.maximum_time
    values = double([0.01, 0.2])
    table = TabulatedVariance(nodes, values, schedule=schedule)
    assert torch.equal(table.at(nodes), values)
    time = nodes[0] + share * (nodes[1] - nodes[0])
    log_sigma = [math.log(s) for s in schedule.sigma(torch.cat([nodes, time[None]])).tolist()]
    ratios = [v / math.exp(2 * s) for v, s in zip(values.tolist(), log_sigma, strict=False)]
    weight = (log_sigma[2] - log_sigma[0]) / (log_sigma[1] - log_sigma[0])
    expected = ((1 - weight) * ratios[0] + weight * ratios[1]) * math.exp(2 * log_sigma[2])
    assert table.at(time).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("event", [(), (3,)])
def test_a_table_speaks_the_dtype_of_the_state(dtype, event):
    times = double([1, 333, 999])
    values = double([0.01, 0.2, 0.5]).reshape(3, *(1,) * len(event)).expand(3, *event)
    table = TabulatedVariance(times, values, schedule=LINEAR).to(dtype)
    assert table.values.dtype == table.times.dtype == torch.float64
    assert torch.equal(table.times, times)
    x = torch.zeros(4, 3, dtype=dtype)
    for time in (333, 333.0, double(333), double([333, 333, 333, 333]).to(torch.float32)):
        value = table(x, time, None)
        assert value.dtype == dtype
        assert torch.equal(value.expand_as(x), torch.full_like(x, 0.2))
    mixed = table(x, double([1, 1, 333, 999]), None).expand_as(x)
    assert torch.equal(mixed[:, 0], double([0.01, 0.01, 0.2, 0.5]).to(dtype))


@pytest.mark.parametrize("event", [(), (3,)])
def test_what_a_table_returns_may_be_changed_in_place(event):
    values = double([0.01, 0.2]).reshape(2, *(1,) * len(event)).expand(2, *event)
    table = TabulatedVariance(double([1, 333]), values, schedule=LINEAR)
    x = torch.zeros(4, 3, dtype=torch.float64)
    for time in (333, 200.0, double([333] * 4), double([1, 333, 333, 200])):
        table(x, time).mul_(-1)
        table.at(time).mul_(-1)
    assert torch.equal(table.values, values)


def test_half_precision_chains_take_a_table():
    denoiser = mixture(DiscreteSchedule.cosine())
    times = denoiser.schedule.times(20)
    data = denoiser.sample(500, generator=torch.Generator().manual_seed(0))
    table = estimate_clean_variance(denoiser, data, times=times[:-1])
    for dtype in (torch.float16, torch.bfloat16):
        draws = sample(denoiser, (64, 2), times=times, clean_variance=table, dtype=dtype)
        assert draws.dtype == dtype
        assert bool(torch.isfinite(draws).all())


def test_a_table_survives_its_state_dict_and_forgets_what_it_knew():
    one, two = (
        TabulatedVariance(
            double(times), double(values), schedule=LINEAR, standard_error=double([0.1, 0.2])
        )
        for times, values in (([1, 10], [1e-5, 1e-4]), ([5, 900], [2e-4, 0.3]))
    )
    x = torch.zeros(2, 1, dtype=torch.float64)
    assert one(x, 5, None) != two(x, 5, None)
    one.load_state_dict(two.state_dict())
    assert set(two.state_dict()) == {"times", "values", "standard_error"}
    assert one(x, 5, None) == two(x, 5, None)
    assert one.at(900) == double(0.3)


def test_the_bound_of_gaussian_data_with_its_table_does_not_depend_on_the_grid(generator):
    denoiser = gaussian(0.7, SPREAD, LINEAR)
    times = torch.arange(1, 1001, dtype=torch.float64)
    table = TabulatedVariance(times, exact_variance(times), schedule=LINEAR)
    data = denoiser.sample(20_000, generator=generator)
    entropy = 0.5 * math.log(2 * math.pi * math.e * SPREAD)
    for num_steps in (2, 17):
        total = variational_bound(
            denoiser, data, num_steps=num_steps, clean_variance=table, generator=generator
        ).total
        error = 5 * total.std().item() / math.sqrt(len(data))
        assert abs(total.mean().item() - entropy) < error


def test_the_table_improves_the_bound_of_the_mixture(generator):
    """Five steps: the table is below both fixed choices, as in the study."""
    denoiser = mixture(LINEAR)
    data = denoiser.sample(1000, generator=generator)
    times = LINEAR.times(5)
    table = estimate_clean_variance(denoiser, data, times=times[:-1], generator=generator)

    def bound(clean_variance):
        source = torch.Generator().manual_seed(7)
        return variational_bound(
            denoiser, data, times=times, clean_variance=clean_variance, generator=source
        ).total.mean().item()  # fmt: skip

    assert bound(table) < min(bound(None), bound(StandardNormalDataVariance())) - 0.05
    assert bound(denoiser.clean_variance) < bound(table) - 0.1


def test_the_clean_variance_enters_with_the_square_of_its_weight():
    weights = transition_weights(LINEAR, 500, 250, eta=0.0)
    table = TabulatedVariance(double([500]), double([0.25]), schedule=LINEAR)
    denoiser = gaussian(0.0, 0.3, LINEAR)
    x = torch.zeros(1, 1, dtype=torch.float64)
    step = reverse_transition(denoiser, x, 500, 250, eta=0.0, clean_variance=table)
    assert step.variance.item() == pytest.approx(weights.clean.item() ** 2 * 0.25, rel=1e-13)


@settings(max_examples=50, deadline=None)
@given(
    value=st.floats(-10, 1e6), time=st.floats(1, 1000), half_width=st.floats(0.1, 10),
)  # fmt: skip
def test_clipped_variances_are_possible(value, time, half_width):
    bounds = (1 - half_width, 1 + half_width)
    clipped = clip_clean_variance(double([value]), LINEAR, time, data_range=bounds).item()
    largest = min(LINEAR.sigma(time).item() ** 2, ((bounds[1] - bounds[0]) / 2) ** 2)
    assert 0 <= clipped <= largest * (1 + 1e-12)
    if 0 <= value <= largest:
        assert clipped == value


def test_clipping_takes_a_time_per_example():
    variance = torch.full((2, 3), 50.0)
    clipped = clip_clean_variance(variance, LINEAR, double([100, 1000]), data_range=(0, 10))
    assert clipped[0].tolist() == [pytest.approx(0.114804650074889, rel=1e-6)] * 3
    assert clipped[1].tolist() == [25.0] * 3


@pytest.mark.parametrize("num_noise", [1, 2])
def test_one_example_has_an_infinite_standard_error(num_noise):
    table = estimate(draws(1), times=[100], num_noise=num_noise)
    assert table.standard_error.item() == math.inf


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "guess"}, "estimator.*guess"),
        ({"num_noise": 0}, "num_noise.*0"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"data": torch.zeros(0, 2)}, "data.*at least one"),
        ({"data_range": (1.0, -1.0)}, "data_range.*increasing"),
        ({"data_range": (1.0, 1.0)}, "data_range.*increasing"),
        ({"times": [0, 5]}, "time.*positive"),
        ({"times": [5, 5]}, "times.*5"),
        ({"times": [2000]}, "time.*2000"),
        ({"times": []}, "times.*increasing"),
        ({"condition": torch.zeros(3)}, "condition.*4"),
        ({"data": torch.zeros(4, 2).long()}, "data.*int64"),
    ],
)
def test_bad_options_of_the_estimation_are_refused_by_name_and_value(options, words):
    options = {"data": torch.zeros(4, 2), "times": [5], **options}
    with pytest.raises(ValueError, match=words):
        estimate_clean_variance(
            NetworkDenoiser(lambda x, time: x, LINEAR), options.pop("data"), **options
        )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.0, 5.0], [1.0, 1.0]), "times.*positive and increasing"),
        (([5.0, 5.0], [1.0, 1.0]), "times.*positive and increasing"),
        (([6.0, 5.0], [1.0, 1.0]), "times.*positive and increasing"),
        (([5.0, math.nan], [1.0, 1.0]), "times.*positive and increasing"),
        (([5.0, 2000.0], [1.0, 1.0]), "time.*2000"),
        (([5.0], [1.0, 1.0]), r"values.*\(2,\)"),
        (([5.0], [-1.0]), "values.*non-negative.*-1"),
        (([5.0], [math.nan]), "values.*non-negative.*nan"),
        (([5.0], [math.inf]), "values.*non-negative.*inf"),
        (([5.0], [1.0], [0.1, 0.1]), "standard_error.*2"),
        (([5.0], [1.0], [-0.1]), "standard_error.*non-negative.*-0.1"),
    ],
)
def test_bad_tables_are_refused(arguments, words):
    times, values, *error = map(double, arguments)
    with pytest.raises(ValueError, match=words):
        TabulatedVariance(
            times, values, schedule=LINEAR, standard_error=error[0] if error else None
        )


@pytest.mark.bad_input
def test_times_outside_the_table_are_refused():
    table = TabulatedVariance(double([10, 20]), double([0.1, 0.2]), schedule=LINEAR)
    x = torch.zeros(2, 1)
    for time in (9.99, 20.5, double([15, 21]), math.nan):
        with pytest.raises(ValueError, match="range"):
            table.at(time)
        with pytest.raises(ValueError, match="range"):
            table(x, time, None)
    with pytest.raises(ValueError, match="one per example"):
        table(x, double([15, 15, 15]), None)


@pytest.mark.bad_input
def test_a_single_variance_has_no_time_per_example():
    with pytest.raises(ValueError, match=r"time must be a number or one per example.*\(2,\)"):
        clip_clean_variance(torch.tensor(0.3), LINEAR, double([1, 500]))


@pytest.mark.bad_input
def test_a_clip_range_must_increase():
    with pytest.raises(ValueError, match=r"data_range.*increasing"):
        clip_clean_variance(torch.ones(2), LINEAR, 5, data_range=(2.0, 1.0))
