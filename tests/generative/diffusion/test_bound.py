"""The bound against the entropy, 30-digit arithmetic and Monte Carlo."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from generative.diffusion.mixtures import SCHEDULES, double, gaussian, mixture
from kexue.generative.diffusion import (
    DiscreteSchedule,
    NetworkDenoiser,
    reverse_transition,
    sample,
    transition_weights,
    variational_bound,
)
from kexue.generative.vae import DiscretizedNormal

LINEAR = DiscreteSchedule.linear()
ENTROPY = 0.816952131041705


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def exact_expectation(monkeypatch):
    """Replace the draws by nodes ±1: with data at m ± s they integrate quadratics exactly.

    For Gaussian data and its exact denoiser every term is quadratic in data and noise, so the
    mean over the four combinations is the expectation, without sampling error.
    """
    signs = double(list(itertools.product([-1, 1], repeat=2)))
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: signs[:, 1:].clone())
    return 0.7 + math.sqrt(0.3) * signs[:, :1]


def no_variance(x, time, prediction, condition=None):
    return torch.zeros_like(x)


def standard_normal(x, time, prediction, condition=None):
    return prediction.noise_scale**2


@pytest.mark.parametrize("num_steps", [1, 2, 10, 100, 1000])
def test_exact_variance_gives_the_entropy_for_every_number_of_steps(num_steps, exact_expectation):
    denoiser = gaussian(0.7, 0.3, LINEAR)
    bound = variational_bound(
        denoiser, exact_expectation, num_steps=num_steps, clean_variance=denoiser.clean_variance
    )
    # Up to 1000 terms of order 1e-3, each good to 1e-15 of the numbers it is a difference of.
    assert bound.total.mean().item() == pytest.approx(0.816962019024161, rel=1e-12)
    assert bound.total.mean().item() == pytest.approx(ENTROPY, abs=2e-5)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, 1.06893853332439),
        (2, 1.05017412746776),
        (10, 0.887592261218831),
        (100, 0.82495968939139),
        (1000, 0.817769534040514),
    ],
)
def test_large_variance_matches_thirty_digit_arithmetic(num_steps, expected, exact_expectation):
    denoiser = gaussian(0.7, 0.3, LINEAR)
    bound = variational_bound(
        denoiser, exact_expectation, num_steps=num_steps, clean_variance=standard_normal
    )
    assert bound.total.mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (2, 1.0493886742036),
        (10, 1.07203559978759),
        (100, 1.67541195890152),
        (1000, 1.38835094176649),
    ],
)
def test_small_variance_matches_thirty_digit_arithmetic(num_steps, expected, exact_expectation):
    denoiser = gaussian(0.7, 0.3, LINEAR)
    bound = variational_bound(denoiser, exact_expectation, num_steps=num_steps)
    assert bound.total.mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_variance_is_exact_for_every_schedule(name, exact_expectation):
    """Only the start differs from the truth: KL(p_T ‖ N(0, prior²)) is all that is left."""
    schedule = SCHEDULES[name]
    denoiser = gaussian(0.7, 0.3, schedule)
    bound = variational_bound(
        denoiser, exact_expectation, num_steps=5, clean_variance=denoiser.clean_variance
    )
    last = schedule.maximum_time
    signal, noise = schedule.signal_scale(last), schedule.noise_scale(last)
    state = Normal(0.7 * signal, (signal**2 * 0.3 + noise**2).sqrt())
    mismatch = kl_divergence(state, Normal(double(0.0), double(schedule.prior_scale)))
    assert bound.total.mean().item() == pytest.approx(ENTROPY + mismatch.item(), abs=1e-11)


def test_parts_are_torchs_divergences(generator):
    denoiser = mixture(LINEAR)
    clean = denoiser.sample(4, generator=generator)
    times = double([900, 400, 120, 0])
    bound = variational_bound(
        denoiser, clean, times=times, clean_variance=denoiser.clean_variance,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    source = torch.Generator().manual_seed(1)

    def noisy(time):
        noise = torch.randn(4, 2, dtype=torch.float64, generator=source)
        return LINEAR.add_noise(clean, noise, time)

    signal, noise = LINEAR.signal_scale(900), LINEAR.noise_scale(900)
    prior = kl_divergence(Normal(signal * clean, noise), Normal(torch.zeros_like(clean), 1.0)).sum(
        1
    )
    torch.testing.assert_close(bound.prior, prior, rtol=1e-11, atol=0)
    for i, (time, before) in enumerate(((900, 400), (400, 120))):
        x = noisy(time)
        step = reverse_transition(denoiser, x, time, before, clean_variance=denoiser.clean_variance)
        current, weight, sigma = transition_weights(LINEAR, time, before)
        posterior = Normal(current * x + weight * clean, sigma)
        expected = kl_divergence(posterior, Normal(step.mean, step.variance.sqrt())).sum(1)
        torch.testing.assert_close(bound.transitions[:, i], expected, rtol=1e-11, atol=1e-13)
    x = noisy(120)
    decoder = Normal(denoiser.predict(x, 120).sample, denoiser.clean_variance(x, 120).sqrt())
    torch.testing.assert_close(bound.reconstruction, -decoder.log_prob(clean).sum(1))
    total = bound.prior + bound.transitions.sum(1) + bound.reconstruction
    assert torch.equal(bound.total, total)


def test_bound_is_never_below_the_entropy_and_tightens_with_steps(generator):
    denoiser = mixture(LINEAR)
    clean = denoiser.sample(4000, generator=generator)
    # Measured with 50 000 points, to 0.007.
    for num_steps, expected in ((2, 1.285), (10, 0.343), (100, 0.026)):
        bound = variational_bound(
            denoiser, clean, num_steps=num_steps, clean_variance=denoiser.clean_variance,
            generator=generator,
        )  # fmt: skip
        gap = bound.total + denoiser.log_prob(clean)
        error = 5 * gap.std().item() / math.sqrt(4000)
        assert gap.mean().item() > -error
        assert gap.mean().item() == pytest.approx(expected, abs=error + 0.02)


def test_less_noise_than_the_posterior_costs_more(generator):
    """Below η = 1 the chain that is scored is no longer Markov: exact variances do not help."""
    denoiser = gaussian(0.7, 0.3, LINEAR)
    clean = denoiser.sample(20_000, generator=generator)
    totals = [
        variational_bound(
            denoiser, clean, num_steps=5, eta=eta, clean_variance=denoiser.clean_variance,
            generator=generator,
        ).total.mean()
        for eta in (1.0, 0.7, 0.2)
    ]  # fmt: skip
    assert totals[0] < totals[1] < totals[2]


def test_further_variance_is_worth_its_cost_only_if_it_is_right(exact_expectation):
    denoiser = gaussian(0.7, 0.3, LINEAR)

    def scaled(factor):
        def variance(x, time, prediction, condition=None):
            return factor * denoiser.clean_variance(x, time)

        return variational_bound(
            denoiser, exact_expectation, num_steps=10, clean_variance=variance
        ).total.mean()

    assert scaled(1.0) < scaled(0.8)
    assert scaled(1.0) < scaled(1.25)


def test_zero_clean_variance_equals_none(exact_expectation):
    denoiser = gaussian(0.7, 0.3, LINEAR)
    options = {"num_steps": 5, "decoder_variance": 0.1}
    plain = variational_bound(denoiser, exact_expectation, **options)
    zero = variational_bound(denoiser, exact_expectation, clean_variance=no_variance, **options)
    torch.testing.assert_close(plain.total, zero.total, rtol=1e-13, atol=0)


def test_discretised_decoder_is_a_probability_of_the_grid(generator):
    """Summed over all values of a pixel the last term is a distribution."""
    values = torch.linspace(-1, 1, 17).unsqueeze(1)
    denoiser = NetworkDenoiser(lambda x, time: 0 * x + 0.3, LINEAR, prediction_type="sample")
    bound = variational_bound(
        denoiser, values, times=double([50, 0]), decoder="discretized_normal", bin_width=1 / 8,
        decoder_variance=0.04, generator=generator,
    )  # fmt: skip
    expected = DiscretizedNormal(double(0.3), 0.2, bin_width=1 / 8, low=-1.0, high=1.0)
    assert torch.exp(-bound.reconstruction).sum().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(
        -bound.reconstruction, expected.log_prob(values.double()).squeeze(1), rtol=1e-6, atol=1e-6
    )


def test_decoder_variance_defaults_to_the_transition_before_it(generator):
    denoiser = mixture(LINEAR)
    clean = denoiser.sample(3, generator=generator)
    times = double([500, 100, 0])
    variance = transition_weights(LINEAR, 500, 100).noise.item() ** 2
    default, explicit = (
        variational_bound(
            denoiser, clean, times=times, decoder_variance=value, eta=0.5,
            generator=torch.Generator().manual_seed(0),
        )
        for value in (None, variance)
    )  # fmt: skip
    torch.testing.assert_close(default.total, explicit.total, rtol=1e-13, atol=0)


def test_bits_are_nats_over_dimensions_with_the_bin_width(generator):
    denoiser = mixture(LINEAR)
    bound = variational_bound(
        denoiser, denoiser.sample(3, generator=generator), num_steps=3, generator=generator
    )
    assert bound.num_dimensions == 2
    expected = bound.total / (2 * math.log(2)) + 3
    torch.testing.assert_close(bound.bits_per_dimension(bin_width=1 / 8), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_terms_are_added_in_float64_whatever_the_network(dtype, generator):
    denoiser = mixture(LINEAR)
    clean = denoiser.sample(200, generator=generator)
    bounds = [
        variational_bound(
            denoiser, clean.to(kind), num_steps=20, decoder_variance=0.01,
            generator=torch.Generator().manual_seed(0),
        )
        for kind in (dtype, torch.float64)
    ]  # fmt: skip
    low, exact = bounds
    assert low.total.dtype == low.transitions.dtype == torch.float64
    # The draws differ by dtype, so only the expectation agrees: five standard errors.
    error = 5 * math.hypot(low.total.std().item(), exact.total.std().item()) / math.sqrt(200)
    assert abs(low.total.mean() - exact.total.mean()).item() < error


def test_same_generator_state_gives_the_same_bound_and_no_gradient():
    network = torch.nn.Linear(2, 2)
    denoiser = NetworkDenoiser(lambda x, time: network(x), LINEAR, prediction_type="v_prediction")
    clean = torch.zeros(3, 2)
    state = torch.get_rng_state()
    one, two = (
        variational_bound(denoiser, clean, num_steps=5, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    assert torch.equal(one.total, two.total)
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.total.requires_grad


def test_one_step_has_no_transitions_and_an_empty_batch_is_empty(generator):
    denoiser = mixture(LINEAR)
    for batch, steps in ((3, 1), (0, 1), (0, 4)):
        bound = variational_bound(
            denoiser, denoiser.sample(batch), num_steps=steps,
            clean_variance=denoiser.clean_variance, generator=generator,
        )  # fmt: skip
        assert bound.transitions.shape == (batch, steps - 1)
        assert bound.total.shape == bound.prior.shape == bound.reconstruction.shape == (batch,)


def test_a_clean_variance_sees_the_prediction_before_it_is_clamped():
    """In a transition, in every step of a chain, and in every term of the bound."""
    seen = []

    def variance(x, time, prediction, condition=None):
        seen.append(prediction.sample.max().item())
        return torch.full_like(x, 0.1)

    clipped = NetworkDenoiser(
        lambda x, time: torch.full_like(x, 3.0), LINEAR, prediction_type="sample",
        clip_sample=(-1.0, 1.0),
    )  # fmt: skip
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    transition = reverse_transition(clipped, x, 500, 250, clean_variance=variance)
    weights = transition_weights(LINEAR, 500, 250)
    torch.testing.assert_close(transition.mean, weights.current * x + weights.clean)
    sample(clipped, initial=x, num_steps=3, clean_variance=variance)
    variational_bound(clipped, x, num_steps=3, clean_variance=variance)
    assert seen == [3.0] * 7


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of times and num_steps"),
        ({"times": double([5, 1])}, "times must end at 0.*1"),
        ({"times": double([5, 6, 0])}, "strictly decreasing"),
        ({"num_steps": 3, "eta": 0.0}, r"eta.*\(0, 1\].*0.0"),
        ({"num_steps": 3, "eta": 1.1}, "eta.*1.1"),
        ({"num_steps": 3, "decoder": "laplace"}, "decoder.*normal, discretized_normal.*'laplace'"),
        ({"num_steps": 3, "decoder": "discretized_normal"}, "bin_width"),
        ({"num_steps": 3, "decoder_variance": 0.0}, "decoder_variance.*0.0"),
        ({"num_steps": 1}, "decoder_variance"),
        (
            {"num_steps": 3, "decoder": "discretized_normal", "bin_width": 0.3},
            "whole number of bins",
        ),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ValueError, match=words):
        variational_bound(mixture(LINEAR), torch.zeros(2, 2), **options)
