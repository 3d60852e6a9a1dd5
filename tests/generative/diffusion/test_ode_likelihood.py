"""Likelihoods along the flow against exact densities."""

import math

import pytest
import torch

from generative.diffusion.mixtures import SCHEDULES, double, mixture
from kexue.generative.diffusion import (
    GaussianMixtureDenoiser,
    HeatSchedule,
    LogLikelihood,
    NetworkDenoiser,
    log_likelihood,
)

HEAT = HeatSchedule()
COVARIANCE = double([[0.5, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 2.0]])
TIGHT = {"rtol": 1e-7, "atol": 1e-7}


def states(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noised(denoiser, count, sigma):
    """Data at the noise level sigma, and its time."""
    generator = torch.Generator().manual_seed(0)
    time = denoiser.schedule.time_from_sigma(sigma).item()
    clean = denoiser.sample(count, generator=generator)
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    return denoiser.schedule.add_noise(clean, noise, time), time


def with_true_prior(result, denoiser):
    """Replace N(0, prior_scale² I) by the true law of the latent: then only the solver errs."""
    end = denoiser.schedule.maximum_time
    return result.log_prob - result.prior_log_prob + denoiser.log_prob(result.latent, end)


@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_centred_gaussian_is_prior_and_ratio_of_deviations(name, coordinate):
    schedule = SCHEDULES[name]
    denoiser = GaussianMixtureDenoiser(double([[0.0] * 3]), COVARIANCE[None], schedule=schedule)
    values, axes = torch.linalg.eigh(COVARIANCE)
    start, end = schedule.time_from_sigma(0.05).item(), schedule.maximum_time

    def deviation(time):
        signal, noise = schedule.signal_scale(time), schedule.noise_scale(time)
        return (signal**2 * values + noise**2).sqrt()

    x = states(4, 3)
    ratio = deviation(end) / deviation(start)
    latent = (x @ axes * ratio) @ axes.T
    prior = torch.distributions.Normal(0.0, double(schedule.prior_scale)).log_prob(latent).sum(1)
    result = log_likelihood(denoiser, x, start=start, coordinate=coordinate, **TIGHT)
    # A hundred steps of 1e-7 each, and growth by some ten of errors made early.
    torch.testing.assert_close(result.latent, latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.prior_log_prob, prior, rtol=0, atol=1e-3)
    torch.testing.assert_close(result.log_prob, prior + ratio.log().sum(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
def test_density_on_the_line_matches_thirty_digit_arithmetic(coordinate):
    denoiser = GaussianMixtureDenoiser(
        double([[-1.2], [0.514285714285714]]),
        double([0.04, 0.25]),
        double([0.3, 0.7]),
        schedule=HEAT,
    )
    x = double([[-1.1], [0.0], [0.9]])
    expected_near = double([-0.633644815133901, -1.11143431226739, -0.880098304183251])
    expected_far = double([-1.585370437606, -1.26078894815145, -1.38857398023287])
    for time, expected in ((0.01, expected_near), (1.0, expected_far)):
        result = log_likelihood(
            denoiser, x, start=time, coordinate=coordinate, rtol=1e-9, atol=1e-9
        )
        # Some fifty steps of 1e-9 each.
        torch.testing.assert_close(with_true_prior(result, denoiser), expected, rtol=0, atol=1e-7)
        # The data are centred with variance 0.80: log N(z; 0, 80²) is wrong by
        # (0.8/80²)|z²/80² − 1|/2, which is below 1e-4 for |z| < 80 sqrt(2).
        torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_parts_of_a_mixtures_density_add_up(name, coordinate):
    denoiser = mixture(SCHEDULES[name])
    x, start = noised(denoiser, 6, 0.1)
    result = log_likelihood(denoiser, x, start=start, coordinate=coordinate, **TIGHT)
    exact = denoiser.log_prob(x, start)
    # A hundred steps of 1e-7 each, and scores of size ten.
    torch.testing.assert_close(with_true_prior(result, denoiser), exact, rtol=0, atol=1e-4)
    signal = denoiser.schedule.signal_scale
    volume = 2 * (signal(denoiser.schedule.maximum_time).log() - signal(start).log())
    total = result.prior_log_prob + volume + result.divergence_integral
    torch.testing.assert_close(result.log_prob, total, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine", "heat"])
def test_angle_needs_far_fewer_steps_than_sigma(name):
    denoiser = mixture(SCHEDULES[name])
    x, start = noised(denoiser, 64, 0.01)
    exact = denoiser.log_prob(x, start)

    def error(coordinate):
        result = log_likelihood(
            denoiser, x, start=start, method="heun", coordinate=coordinate, num_steps=32
        )
        return (with_true_prior(result, denoiser) - exact).square().mean().sqrt().item()

    assert error("angle") < 0.02
    assert error("angle") < error("sigma") / 10


def test_divergence_integral_does_not_depend_on_the_coordinate():
    denoiser = mixture(HEAT)
    x, start = noised(denoiser, 6, 0.1)
    one, two = (
        log_likelihood(denoiser, x, start=start, coordinate=c, **TIGHT) for c in ("sigma", "angle")
    )
    torch.testing.assert_close(one.divergence_integral, two.divergence_integral, rtol=0, atol=1e-4)


class Guided:
    """Bayes: the score of a class is the score plus the gradient of its log-probability."""

    def __init__(self, denoiser, label):
        self.denoiser, self.label, self.schedule = denoiser, label, denoiser.schedule

    def predict(self, x, time, *, condition=None):
        differentiable = x.requires_grad
        with torch.enable_grad():
            x = x if differentiable else x.detach().requires_grad_()
            log_prob = self.denoiser.class_log_prob(x, time, self.label).sum()
            (gradient,) = torch.autograd.grad(log_prob, x, create_graph=differentiable)
        prediction = self.denoiser.predict(x, time)
        return prediction.with_epsilon(prediction.epsilon - prediction.noise_scale * gradient, x)


@pytest.mark.parametrize("divergence_method", ["exact", "hutchinson"])
def test_likelihood_under_a_classifiers_guidance_is_that_of_the_class(divergence_method):
    denoiser = GaussianMixtureDenoiser(
        double([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]]),
        double([0.1, 0.2, 0.1]),
        schedule=SCHEDULES["cosine"],
        labels=torch.tensor([0, 1, 1]),
    )
    x = states(4, 2)
    options = {"start": 100.0, "method": "heun", "divergence_method": divergence_method}
    with torch.no_grad():
        guided = log_likelihood(
            Guided(denoiser, 1), x, generator=torch.Generator().manual_seed(1), **options
        )
    direct = log_likelihood(
        denoiser,
        x,
        condition=torch.tensor(1),
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    # The same numbers computed in two ways; ᾱ of 5e-5 takes four digits.
    torch.testing.assert_close(guided.log_prob, direct.log_prob, rtol=0, atol=1e-9)
    assert not guided.log_prob.requires_grad


def test_hutchinson_estimates_the_exact_likelihood():
    """The mean of ten calls is within six standard errors of the exact value: p < 2e-4 each."""
    denoiser = mixture(SCHEDULES["linear"])
    x, start = noised(denoiser, 3, 0.1)
    options = {"start": start, "method": "heun", "num_steps": 8}
    exact = log_likelihood(denoiser, x, **options).log_prob
    for probe in ("rademacher", "gaussian"):
        draws = torch.stack(
            [
                log_likelihood(
                    denoiser, x, divergence_method="hutchinson", num_probes=8, probe=probe,
                    generator=torch.Generator().manual_seed(seed), **options,
                ).log_prob
                for seed in range(10)
            ]
        )  # fmt: skip
        error = draws.std(0) / math.sqrt(10)
        assert bool(((draws.mean(0) - exact).abs() < 6 * error + 1e-9).all())


def test_probes_are_drawn_once_and_by_the_generator():
    denoiser = mixture(SCHEDULES["linear"])
    x, start = noised(denoiser, 3, 0.1)
    for probe in ("rademacher", "gaussian"):
        generator = torch.Generator().manual_seed(5)
        log_likelihood(
            denoiser, x, start=start, divergence_method="hutchinson", num_probes=4, probe=probe,
            generator=generator,
        )  # fmt: skip
        expected = torch.Generator().manual_seed(5)
        if probe == "gaussian":
            torch.randn(4, 3, 2, dtype=torch.float64, generator=expected)
        else:
            torch.randint(0, 2, (4, 3, 2), generator=expected)
        assert bool((generator.get_state() == expected.get_state()).all())


def test_gradient_of_the_likelihood_is_the_score():
    denoiser = mixture(SCHEDULES["cosine"])
    x, start = noised(denoiser, 4, 0.3)
    x.requires_grad_()
    result = log_likelihood(denoiser, x, start=start, **TIGHT)
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), x)
    score = denoiser.predict(x.detach(), start).score
    # The steps are chosen for the likelihood; its derivatives by x are up to ten times larger.
    torch.testing.assert_close(gradient, score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "count"), [("euler", 12), ("heun", 24)])
def test_evaluations_are_counted(method, count):
    calls = []

    def network(x, time):
        calls.append(time)
        return torch.tanh(x)

    denoiser = NetworkDenoiser(network, SCHEDULES["cosine"])
    result = log_likelihood(denoiser, states(3, 2), method=method, num_steps=12)
    assert result.num_evaluations == len(calls) == count
    calls.clear()
    result = log_likelihood(denoiser, states(3, 2), rtol=1e-3, atol=1e-3)
    assert result.num_evaluations == len(calls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_log_terms_are_double_whatever_the_network_computes_in(dtype, method):
    denoiser = NetworkDenoiser(
        lambda x, time: torch.tanh(x), SCHEDULES["cosine"], prediction_type="v_prediction"
    )
    x = states(3, 4).to(dtype)
    options = {"start": 100.0, "method": method, "rtol": 1e-2, "atol": 1e-2}
    result = log_likelihood(denoiser, x, **options)
    exact = log_likelihood(denoiser, x.double(), **options)
    for name in ("log_prob", "prior_log_prob", "divergence_integral"):
        assert getattr(result, name).dtype == torch.float64
    assert result.latent.dtype == dtype
    # Half precision rounds x and velocities to 2^-11, over an angle of 1.5 and d = 4; the
    # adaptive steps themselves are good for 1e-2 each.
    bound = {torch.float16: 0.03, torch.float32: 1e-4}[dtype] + 0.05 * (method == "dopri5")
    torch.testing.assert_close(result.log_prob, exact.log_prob, rtol=0, atol=bound)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
def test_velocity_that_is_not_finite_is_an_error_in_words(value, coordinate):
    denoiser = NetworkDenoiser(lambda x, time: x + value, SCHEDULES["cosine"])
    with pytest.raises(RuntimeError, match="not finite"):
        log_likelihood(denoiser, states(3, 4), start=100.0, coordinate=coordinate)


@pytest.mark.parametrize("divergence_method", ["exact", "hutchinson"])
def test_inference_mode_changes_no_likelihood(divergence_method):
    options = {"divergence_method": divergence_method, "method": "heun", "num_steps": 6}
    denoiser = mixture(HEAT)

    def likelihood():
        generator = torch.Generator().manual_seed(0)
        return log_likelihood(denoiser, states(3, 2), generator=generator, **options)

    expected = likelihood()
    with torch.inference_mode():
        found = likelihood()
    assert bool((expected.divergence_integral != 0).all())
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=0)
    assert not found.log_prob.requires_grad


def test_bits_per_dimension_of_a_density():
    parts = double([-10.0, 4.0])
    result = LogLikelihood(parts, parts, parts, states(2, 5), 3)
    expected = -parts / (5 * math.log(2)) - math.log2(1 / 8)
    torch.testing.assert_close(result.bits_per_dimension(5, bin_width=1 / 8), expected)


def test_no_examples_have_no_likelihoods():
    for method in ("heun", "dopri5"):
        result = log_likelihood(mixture(HEAT), torch.zeros(0, 2), method=method)
        assert result.log_prob.shape == (0,)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "dpm_solver_2m"}, "euler, heun, dopri5"),
        ({"coordinate": "time"}, "sigma, angle"),
        ({"divergence_method": "finite"}, "exact, hutchinson"),
        ({"probe": "uniform"}, "rademacher, gaussian"),
        ({"start": 0.0}, "positive"),
        ({"start": 80.0}, "differ"),
        ({"start": 90.0}, "80"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_probes": 0}, "num_probes"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        log_likelihood(mixture(HEAT), states(2, 2), **options)
