"""kexue.generative.diffusion.guidance: both kinds of guidance against what is known exactly."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import torch
from torch.autograd import forward_ad

from generative.diffusion.mixtures import SCHEDULES, TIMES, double, mixture
from kexue.generative.diffusion import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Denoiser,
    GaussianMixtureDenoiser,
    HeatSchedule,
    ImageDenoiser,
    MeanShiftGuidance,
    NetworkDenoiser,
    Prediction,
    class_log_probability,
    cosine_similarity,
    drop_condition,
    gram_similarity,
    reverse_transition,
    sample,
)
from kexue.models import MLP, MLPDenoiser

LINEAR = SCHEDULES["linear"]
EPS = 2.0**-52
LABELS = torch.tensor([0, 1, 1])
EACH = pytest.mark.parametrize("name", SCHEDULES)


def labelled(schedule=LINEAR):
    """Three Gaussians in the plane, the last two of one class."""
    return mixture(schedule, labels=LABELS)


def states(count=6, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(one: Prediction, two: Prediction, bound: float) -> None:
    """Relative to the largest entry, as the rounding errors of sums are."""
    for a, b in ((one.sample, two.sample), (one.epsilon, two.epsilon)):
        assert ((a - b).abs().max() / b.abs().max()).item() < bound


def autograd(function, x):
    """The gradient of a sum, the plain way."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


class Recorded(torch.nn.Module):
    """A denoiser that remembers how it was called."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.schedule, self.calls = denoiser, denoiser.schedule, []

    def predict(self, x, time, *, condition=None):
        self.calls.append((len(x), condition))
        return self.denoiser.predict(x, time, condition=condition)


def classifier(seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP(2, [16], 3).to(dtype)
    return lambda x, time: network(x)


# Identities of the exact mixture. A posterior share is a softmax of terms of size d²/2β̄² ≲ 100;
# each of some ten operations rounds to EPS, hence 1e3 EPS at most, 2e-15 in the spec.


@EACH
@pytest.mark.parametrize("label", [0, 1])
def test_bayes_exact_classifier_gives_the_conditional_denoiser(name, label):
    exact, x, time = labelled(SCHEDULES[name]), states(), TIMES[name]
    guided = ClassifierGuidance(exact, exact.class_log_prob)
    expected = exact.predict(x, time, condition=label)
    assert_same(guided.predict(x, time, condition=label), expected, 100 * EPS)


@EACH
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.7, 10.0])
def test_classifier_free_guidance_is_classifier_guidance_at_the_same_scale(name, scale):
    exact, x, time = labelled(SCHEDULES[name]), states(), TIMES[name]
    by_classifier = ClassifierGuidance(exact, exact.class_log_prob, scale=scale)
    free = ClassifierFreeGuidance(exact, scale=scale, null_condition=-1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert_same(
        free.predict(x, time, condition=labels),
        by_classifier.predict(x, time, condition=labels),
        1000 * EPS,
    )


@EACH
def test_every_example_has_its_own_time(name):
    exact, x = labelled(SCHEDULES[name]), states()
    times = double([0.2, 0.3, 0.5, 0.6, 0.7, 1.0]) * TIMES[name]
    for guided in (
        ClassifierGuidance(exact, exact.class_log_prob, scale=3.0),
        ClassifierGuidance(exact, exact.class_log_prob, scale=3.0, evaluate_at="denoised"),
        ClassifierFreeGuidance(exact, scale=3.0, null_condition=-1, rescale=0.5),
    ):
        whole = guided.predict(x, times, condition=1)
        for i, time in enumerate(times):
            alone = guided.predict(x[i : i + 1], time, condition=torch.tensor([1]))
            here = Prediction(whole.sample[i], whole.epsilon[i], time, time)
            there = Prediction(alone.sample[0], alone.epsilon[0], time, time)
            assert_same(here, there, 1000 * EPS)


@EACH
def test_guided_predictions_keep_the_identity_of_clean_data_and_noise(name):
    exact, x, time = labelled(SCHEDULES[name]), states(), TIMES[name]
    for guided in (
        ClassifierGuidance(exact, exact.class_log_prob, scale=4.0),
        ClassifierGuidance(exact, exact.class_log_prob, scale=4.0, clip_sample=(-0.5, 0.5)),
        ClassifierFreeGuidance(exact, scale=4.0, null_condition=-1, rescale=0.7),
        ClassifierFreeGuidance(exact, scale=4.0, null_condition=-1, clip_sample=(-0.5, 0.5)),
    ):
        assert isinstance(guided, Denoiser)
        p = guided.predict(x, time, condition=1)
        back = p.signal_scale * p.sample + p.noise_scale * p.epsilon
        torch.testing.assert_close(back, x, rtol=0, atol=100 * EPS * p.sample.abs().max().item())
        if guided.clip_sample:
            assert p.sample.abs().max() == 0.5


def test_the_score_is_shifted_by_the_scaled_gradient():
    """∇log p(x|y) form, straight from log-densities: score = ∇log p + γ∇log p(y|x)."""
    exact, x, time = labelled(), states(), 300.0
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.5)
    score = autograd(lambda at: exact.log_prob(at, time), x)
    gradient = autograd(lambda at: exact.class_log_prob(at, time, 1), x)
    measured = guided.predict(x, time, condition=1).score
    torch.testing.assert_close(measured, score + 2.5 * gradient, rtol=1e-12, atol=1e-12)


def test_epsilon_and_mean_shift_forms_differ_by_the_ratio_of_signal_scales():
    """At η = 1 and variance β_{t|s}² the ratio is ᾱ_s/ᾱ_t, 1.0030418… for 300 → 299."""
    exact, x = labelled(), states()
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.0)
    plain = reverse_transition(exact, x, 300, 299).mean
    by_epsilon = reverse_transition(guided, x, 300, 299, condition=torch.tensor(1)).mean - plain
    large = LINEAR.betas[299].expand_as(x)  # β_{300|299}²
    shift = MeanShiftGuidance(exact.class_log_prob, scale=2.0)(x, 300, 299, plain, large, 1)
    ratio = by_epsilon / shift
    # The difference of means loses about 1/0.003 of its digits.
    torch.testing.assert_close(ratio, torch.full_like(x, 1.003041851238079), rtol=1e-10, atol=0)
    assert (LINEAR.signal_scale(299) / LINEAR.signal_scale(300)).item() == pytest.approx(
        1.003041851238079, rel=1e-14
    )


def test_mean_shift_of_the_small_variance_differs_by_the_posterior_ratio_more():
    exact, x = labelled(), states()
    small = reverse_transition(exact, x, 300, 299).variance
    large = LINEAR.betas[299]
    ratio = (LINEAR.noise_scale(299) / LINEAR.noise_scale(300)) ** 2
    torch.testing.assert_close(small, (large * ratio).expand_as(small), rtol=1e-10, atol=0)


# Gaussians: conditional N(1 or 0, 1/4), unconditional N(0, 5/4), in 30-digit arithmetic.

CONDITIONAL, UNCONDITIONAL = torch.tensor(1), torch.tensor(0)
LARGEST = 1e4
HEAT = HeatSchedule(LARGEST)
PREDICTED = {  # γ: variance of flow, of SDE, of the tempered density
    1.0: (0.25, 0.25, 0.25),
    2.0: (0.05, 0.103333333333333, 0.138888888888889),
    4.0: (0.002, 0.0446422857142857, 0.0735294117647059),
}


def two_gaussians(mean, scale):
    pair = GaussianMixtureDenoiser(
        double([[0.0], [mean]]), double([1.25, 0.25]), schedule=HEAT,
        labels=torch.stack([UNCONDITIONAL, CONDITIONAL]),
    )  # fmt: skip
    return ClassifierFreeGuidance(pair, scale=scale, null_condition=UNCONDITIONAL)


def flow_ends(guided, starts):
    """dy/dσ = ε̂(y, σ), by the classical Runge–Kutta method in log σ down to σ = 1e-4."""
    steps = 200
    grid = torch.linspace(math.log(LARGEST), math.log(1e-4), steps + 1, dtype=torch.float64)
    h, y = grid[1] - grid[0], starts

    def velocity(y, log_sigma):
        sigma = log_sigma.exp().clamp(max=LARGEST)
        return sigma * guided.predict(y, sigma, condition=CONDITIONAL).epsilon

    for s in grid[:-1]:
        one = velocity(y, s)
        two = velocity(y + h / 2 * one, s + h / 2)
        three = velocity(y + h / 2 * two, s + h / 2)
        four = velocity(y + h * three, s + h)
        y = y + h / 6 * (one + 2 * two + 2 * three + four)
    return y


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 4.0])
def test_guided_flow_of_gaussians_ends_with_the_geometric_variance(scale):
    """The flow is affine, so two starts give its slope. Beginning at σ = 1e4 and ending at 1e-4
    costs (V/σ²)γ ~ 1e-8 each, Runge–Kutta with h = 0.092 of the order of h⁴ = 7e-5.
    """
    ends = flow_ends(two_gaussians(0.0, scale), double([[0.0], [LARGEST]])).squeeze(1)
    variance = (ends[1] - ends[0]).item() ** 2
    assert variance == pytest.approx(1.25 ** (1 - scale) * 0.25**scale, rel=1e-4)
    expected = {0.0: 1.25, **{gamma: three[0] for gamma, three in PREDICTED.items()}}[scale]
    assert variance == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("scale", "mean"), [(1, 1.0), (2, 1.322806705723), (4, 1.3968420117169)])
def test_guided_flow_of_gaussians_ends_at_the_known_mean(scale, mean):
    ends = flow_ends(two_gaussians(1.0, float(scale)), double([[0.0]]))
    # A flow from infinity stands at about γ at σ = 1e4, not at 0; from there on differences
    # shrink by the slope of the flow, √variance/σ.
    slope = math.sqrt(PREDICTED[scale][0]) / LARGEST
    assert ends.item() == pytest.approx(mean, abs=1.5 * scale * slope)


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_guided_chain_of_gaussians_ends_with_the_variance_of_the_sde(scale):
    """Mean and variance pass through affine transitions exactly; steps of 1/n are extrapolated."""
    guided = two_gaussians(0.0, scale)

    def variance_after(steps):
        times = torch.cat(
            [torch.logspace(4, -3, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
        )
        times[0] = LARGEST
        variance = LARGEST**2
        points = double([[0.0], [1.0]])
        for time, before in pairwise(times):
            step = reverse_transition(guided, points, time, before, condition=CONDITIONAL)
            slope = (step.mean[1] - step.mean[0]).item()
            variance = slope**2 * variance + step.variance[0].item()
        return variance

    coarse, fine = variance_after(400), variance_after(800)
    extrapolated = 2 * fine - coarse
    # What is left is of second order: the square of the first order's relative size.
    first_order = abs(fine - coarse) / fine
    flow, sde, tempered = PREDICTED[scale]
    assert extrapolated == pytest.approx(sde, rel=4 * first_order**2 + 1e-5)
    assert tempered == pytest.approx(1 / ((1 - scale) / 1.25 + scale / 0.25), rel=1e-14)
    if scale != 1:
        assert flow < 0.9 * extrapolated < extrapolated < 0.9 * tempered


# Objectives.


def test_exact_sharpening_differs_from_scaling_by_the_gradient_of_the_normaliser():
    """∇log(p^γ/Z) = γ∇log p − ∇log Z, so ε̂ differs by β̄∇log Σ p^γ."""
    exact, x, time, network = labelled(), states(), 400.0, classifier()
    sharp = ClassifierGuidance(exact, class_log_probability(network, sharpness=3.0))
    scaled = ClassifierGuidance(exact, class_log_probability(network), scale=3.0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    difference = (
        sharp.predict(x, time, condition=labels).epsilon
        - scaled.predict(x, time, condition=labels).epsilon
    )
    log_z = autograd(
        lambda at: torch.logsumexp(3 * torch.log_softmax(network(at, time), -1), -1), x
    )
    expected = LINEAR.noise_scale(time) * log_z
    torch.testing.assert_close(difference, expected, rtol=0, atol=100 * EPS)
    assert difference.abs().max() > 0.01


def test_class_log_probability_is_the_normalised_power():
    x, network = states(), classifier()
    labels = torch.tensor([2, 1, 0, 0, 1, 2])
    probability = torch.softmax(network(x, 0), -1)
    power = probability**2.5
    expected = (power / power.sum(-1, keepdim=True)).gather(1, labels[:, None]).squeeze(1)
    measured = class_log_probability(network, sharpness=2.5)(x, 7, labels).exp()
    torch.testing.assert_close(measured, expected, rtol=100 * EPS, atol=0)
    one = class_log_probability(network)(x, 7, 2)
    torch.testing.assert_close(one, probability[:, 2].log(), rtol=100 * EPS, atol=0)


def test_cosine_similarity_and_its_gradient_follow_their_formulas():
    x = states()
    target = double([[0.6, -0.8]])
    objective = cosine_similarity(lambda x, time: x)
    cosine = x @ target[0] / x.norm(dim=1)
    torch.testing.assert_close(objective(x, 1, target), cosine, rtol=1e-14, atol=0)
    # ∇cos = (t − cos · x/‖x‖)/‖x‖ for a unit target.
    expected = (target - cosine[:, None] * x / x.norm(dim=1, keepdim=True)) / x.norm(
        dim=1, keepdim=True
    )
    measured = autograd(lambda at: objective(at, 1, target), x)
    torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-14)


def test_gram_similarity_is_the_distance_of_second_moments():
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    target = torch.randn(1, 3, 7, dtype=torch.float64)
    measured = gram_similarity(lambda x, time: x)(features, 1, target)
    for i in range(2):
        f, t = features[i].reshape(3, 20).numpy(), target[0].numpy()
        distance = ((f @ f.T / 20 - t @ t.T / 7) ** 2).sum()
        assert measured[i].item() == pytest.approx(-distance, rel=1e-13)


def test_networks_of_objectives_see_one_time_per_example():
    seen = []

    def network(x, time):
        seen.append(time)
        return x

    cosine_similarity(network)(states(3), torch.tensor(250.0), double([[1.0, 0.0]]))
    assert torch.equal(seen[0], double([250.0, 250.0, 250.0]))


# Classifier guidance.


def test_a_clean_classifier_is_differentiated_through_the_denoiser():
    """The chain rule by hand: ∇_{x_t} log p_o(y|x̂_0) = (∂x̂_0/∂x_t)ᵀ ∇log p_o."""
    exact, x, time, network = labelled(), states(), 300.0, classifier()
    guided = ClassifierGuidance(
        exact, class_log_probability(network), scale=2.0, evaluate_at="denoised"
    )
    plain = exact.predict(x, time)
    inner = autograd(lambda at: torch.log_softmax(network(at, 0), -1)[:, 2], plain.sample)
    jacobian = torch.autograd.functional.jacobian
    jacobians = torch.stack(
        [jacobian(lambda at: exact.predict(at[None], time).sample[0], row) for row in x]
    )
    gradient = torch.einsum("bij,bi->bj", jacobians, inner)
    expected = plain.epsilon - LINEAR.noise_scale(time) * 2.0 * gradient
    measured = guided.predict(x, time, condition=2)
    torch.testing.assert_close(measured.epsilon, expected, rtol=1e-12, atol=1e-13)


def test_the_objective_of_denoised_states_sees_time_zero():
    seen = []

    def objective(x, time, condition):
        seen.append((float(time), condition))
        return x.sum(1)

    exact = labelled()
    for where in ("noisy", "denoised"):
        ClassifierGuidance(exact, objective, evaluate_at=where).predict(states(), 300, condition=1)
    assert seen == [(300.0, 1), (0.0, 1)]


def test_scale_zero_needs_no_gradient():
    def refuse(*given):
        raise RuntimeError("called")

    exact, x = labelled(), states()
    for scale in (0, 0.0, lambda time: 0.0):
        guided = ClassifierGuidance(exact, refuse, scale=scale)
        assert torch.equal(guided.predict(x, 300).epsilon, exact.predict(x, 300).epsilon)
    shift = MeanShiftGuidance(refuse, scale=0.0)
    assert torch.equal(shift(x, 300, 299, x, torch.ones_like(x)), torch.zeros_like(x))


def test_the_denoiser_is_called_without_the_condition():
    inner = Recorded(labelled())
    for where in ("noisy", "denoised"):
        guided = ClassifierGuidance(inner, inner.denoiser.class_log_prob, evaluate_at=where)
        guided.predict(states(), 300, condition=1)
    assert [condition for _, condition in inner.calls] == [None, None]


@pytest.mark.parametrize("where", ["noisy", "denoised"])
def test_gradients_are_found_under_no_grad_and_in_inference_mode(where):
    exact, x = labelled(), states()
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.0, evaluate_at=where)
    plain = guided.predict(x, 300, condition=1)
    with torch.no_grad():
        silent = guided.predict(x, 300, condition=1)
    with torch.inference_mode():
        inferred = guided.predict(states(), 300, condition=torch.ones(6, dtype=torch.long))
    assert torch.equal(plain.sample, silent.sample)
    assert torch.equal(plain.sample, inferred.sample)
    network = ImageDenoiser((1, 1, 2), hidden=8, depth=1)
    other = ClassifierGuidance(network, lambda x, t, y: x.flatten(1).sum(1), evaluate_at=where)
    assert not other.predict(torch.randn(3, 1, 1, 2), 300).sample.requires_grad
    assert not plain.epsilon.requires_grad


@pytest.mark.parametrize("where", ["noisy", "denoised"])
def test_guided_predictions_are_twice_differentiable_in_x(where):
    exact = labelled()
    guided = ClassifierGuidance(
        exact, class_log_probability(classifier()), scale=2.0, evaluate_at=where
    )

    def epsilon(x):
        return guided.predict(x, 300.0, condition=2).epsilon

    x = states(2).requires_grad_()
    assert torch.autograd.gradcheck(epsilon, x)
    assert torch.autograd.gradgradcheck(epsilon, x)


@pytest.mark.parametrize("where", ["noisy", "denoised"])
def test_transforms_of_torch_func_see_through_guidance(where):
    exact, x = labelled(), states(1)
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.0, evaluate_at=where)

    def epsilon(at):
        return guided.predict(at, 300.0, condition=1).epsilon[0]

    backward = torch.autograd.functional.jacobian(epsilon, x)
    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(epsilon, (x,), (tangent,))
    torch.testing.assert_close(forward, backward.sum((1, 2)), rtol=1e-12, atol=1e-13)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(epsilon(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, forward, rtol=1e-12, atol=1e-13)


def test_plain_sampling_keeps_no_second_derivative():
    """An objective that differentiates on its own may do so: nothing is traced around it."""

    def slope(x, time, condition):
        at = x.detach().requires_grad_()
        (own,) = torch.autograd.grad(at.sin().sum(), at)
        return (own * x).sum(1)

    exact, x = labelled(), states()
    score = ClassifierGuidance(exact, slope).predict(x, 300).score
    torch.testing.assert_close(score, exact.predict(x, 300).score + x.cos(), rtol=1e-12, atol=1e-13)


def test_the_gradient_of_an_example_does_not_depend_on_the_batch():
    exact, x = labelled(), states(50)
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.0)
    many = guided.predict(x, 300, condition=1).epsilon
    few = guided.predict(x[:2], 300, condition=1).epsilon
    torch.testing.assert_close(many[:2], few, rtol=1e-14, atol=1e-14)


def test_guidances_nest():
    """Two independent objectives: their gradients add up."""
    exact, x = labelled(), states()
    one, two = (lambda x, t, y: -(x[:, 0] ** 2)), (lambda x, t, y: x[:, 1].sin())
    inner = ClassifierGuidance(exact, one, scale=0.5)
    nested = ClassifierGuidance(inner, two, scale=0.25)
    both = ClassifierGuidance(exact, lambda x, t, y: 0.5 * one(x, t, y) + 0.25 * two(x, t, y))
    assert_same(nested.predict(x, 300), both.predict(x, 300), 100 * EPS)
    through = ClassifierGuidance(inner, two, evaluate_at="denoised")
    expected = autograd(lambda at: two(inner.predict(at, 300).sample, 0, None), x)
    shift = inner.predict(x, 300).score + expected
    torch.testing.assert_close(through.predict(x, 300).score, shift, rtol=1e-12, atol=1e-12)


def test_an_objective_that_ignores_the_state_changes_nothing():
    exact, x = labelled(), states()
    guided = ClassifierGuidance(exact, lambda x, t, y: torch.zeros(len(x)))
    assert torch.equal(guided.predict(x, 300).sample, exact.predict(x, 300).sample)


def test_a_guided_float32_state_at_almost_no_signal_keeps_its_digits():
    """ᾱ = 5e-5: x̂_0 recomputed from ε̃ would be off by 2^-24/ᾱ = 1e-3."""
    cosine = SCHEDULES["cosine"]
    exact, x = labelled(cosine), states()
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=3.0)
    single = guided.predict(x.float(), 1000, condition=1).sample.double()
    double_ = guided.predict(x.float().double(), 1000, condition=1).sample
    # Terms of up to 4, each rounded in float32.
    assert (single - double_).abs().max() < 8 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_classifier_guides_a_chain_in_half_precision(dtype):
    seen = []
    network = MLPDenoiser(2, hidden=16, depth=1, output_features=3)
    network.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    guided = ClassifierGuidance(labelled(), class_log_probability(network), scale=2.0)
    x = states().to(dtype)
    half = guided.predict(x, 300, condition=1)
    single = guided.predict(x.float(), 300, condition=1)
    assert seen == [torch.float32] * 2
    assert half.epsilon.dtype == dtype
    # ε̂, the gradient and their sum are rounded once each, at entries of up to 4.
    assert (half.epsilon.float() - single.epsilon).abs().max() < 8 * torch.finfo(dtype).eps


def test_quantised_networks_see_the_precision_of_their_other_parameters():
    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = torch.nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, time):
            return x * self.whole * self.scale

    x = states().half()
    value = cosine_similarity(Quantised())(x, 300, torch.tensor([[3.0, 4.0]]))
    assert value.dtype == torch.float32
    expected = torch.nn.functional.cosine_similarity(x.float(), torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(value, expected)


# Scales.


def test_a_number_stays_a_number_in_float64():
    exact, x = labelled(), states()
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.7)
    plain = exact.predict(x, 300).epsilon
    one = ClassifierGuidance(exact, exact.class_log_prob).predict(x, 300, condition=1).epsilon
    # float32 would leave 1e-8.
    expected = plain + 2.7 * (one - plain)
    torch.testing.assert_close(
        guided.predict(x, 300, condition=1).epsilon, expected, rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("kind", ["classifier", "free", "mean shift"])
def test_scales_per_example_and_by_time_are_the_numbers_they_give(kind):
    exact, x = labelled(), states(3)

    def result(scale, x=x):
        if kind == "classifier":
            guided = ClassifierGuidance(exact, exact.class_log_prob, scale=scale)
        elif kind == "free":
            guided = ClassifierFreeGuidance(exact, scale=scale, null_condition=-1)
        else:
            shift = MeanShiftGuidance(exact.class_log_prob, scale=scale)
            return shift(x, 300, 299, x, torch.full_like(x, 0.3), 1)
        return guided.predict(x, 300, condition=1).epsilon

    scales = [0.0, 1.0, 3.5]
    each = result(double(scales))
    for i, scale in enumerate(scales):
        alone = result(scale, x[i : i + 1])
        torch.testing.assert_close(each[i : i + 1], alone, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(result(lambda time: time / 100), result(3.0), rtol=0, atol=0)
    torch.testing.assert_close(result(lambda time: double(scales)), each, rtol=0, atol=0)
    torch.testing.assert_close(result(double(3.5)), result(3.5), rtol=1e-14, atol=1e-15)


# Mean shift.


@pytest.mark.parametrize("where", ["current", "mean"])
def test_the_shift_is_variance_times_scale_times_gradient(where):
    exact, x = labelled(), states()
    mean, variance = 0.9 * x, torch.linspace(0.1, 0.6, 12, dtype=torch.float64).reshape(6, 2)
    shift = MeanShiftGuidance(exact.class_log_prob, scale=1.5, expand_at=where)
    measured = shift(x, 300, 200, mean, variance, 1)
    point, time = (x, 300) if where == "current" else (mean, 200)
    gradient = autograd(lambda at: exact.class_log_prob(at, time, 1), point)
    torch.testing.assert_close(measured, 1.5 * variance * gradient, rtol=1e-13, atol=1e-15)
    assert not measured.requires_grad


def test_the_last_step_expands_at_the_current_point():
    exact, x = labelled(), states()
    arguments = (0.9 * x, torch.full_like(x, 0.1), 1)
    current = MeanShiftGuidance(exact.class_log_prob)(x, 10, 0, *arguments)
    at_mean = MeanShiftGuidance(exact.class_log_prob, expand_at="mean")
    assert torch.equal(at_mean(x, 10, 0, *arguments), current)
    assert torch.equal(at_mean(x, 10, torch.tensor(0.0), *arguments), current)
    mixed = at_mean(x, 10.0, double([0, 5, 0, 5, 0, 5]), *arguments)
    torch.testing.assert_close(mixed[::2], current[::2], rtol=1e-14, atol=0)
    torch.testing.assert_close(
        mixed[1::2], at_mean(x, 10, 5.0, *arguments)[1::2], rtol=1e-14, atol=0
    )


def test_times_of_the_mean_shift_may_stay_on_the_cpu():
    x = states().to("meta")
    shift = MeanShiftGuidance(lambda x, time, condition: x.sum(1), expand_at="mean")
    before = double([0, 5, 0, 5, 0, 5])
    assert shift(x, 10.0, before, x, torch.ones_like(x)).device.type == "meta"


def test_mean_shift_steers_a_noisy_chain_and_is_dead_without_noise():
    """Exact classifier, scale 1: nearly every sample of the chain is of the class asked for."""
    exact = labelled()
    shift = MeanShiftGuidance(exact.class_log_prob)

    def share(eta):
        source = torch.Generator().manual_seed(0)
        drawn = sample(
            exact, (400, 2), num_steps=100, eta=eta,
            mean_shift=lambda *given: shift(*given[:5], 0), generator=source,
            dtype=torch.float64,
        )  # fmt: skip
        return exact.class_log_prob(drawn, 1, 0).exp().mean().item()

    # Class 0 has weight 0.2; the standard error of a share is at most 0.025.
    assert share(1.0) > 0.9
    assert abs(share(0.0) - 0.2) < 0.1


def test_samplers_take_guided_denoisers():
    exact = labelled()
    for guided in (
        ClassifierGuidance(exact, exact.class_log_prob),
        ClassifierFreeGuidance(exact, scale=1.5, null_condition=-1),
    ):
        for eta in (0.0, 1.0):
            drawn = sample(
                guided, (300, 2), num_steps=50, eta=eta, condition=torch.zeros(300).long(),
                generator=torch.Generator().manual_seed(0), dtype=torch.float64,
            )  # fmt: skip
            # The class is one Gaussian about (-1, 0.5) with deviations (0.22, 0.2).
            assert exact.class_log_prob(drawn, 1, 0).exp().mean() > 0.99


# Classifier-free guidance.


def test_one_branch_is_evaluated_at_one_and_zero_and_both_elsewhere():
    inner, x = Recorded(labelled()), states()

    def calls(scale, **options):
        inner.calls.clear()
        guided = ClassifierFreeGuidance(inner, scale=scale, null_condition=-1, **options)
        guided.predict(x, 300, condition=1)
        return [(n, condition.tolist()) for n, condition in inner.calls]

    only, null = [1] * 6, [-1] * 6
    assert calls(1.0) == calls(lambda time: 1) == [(6, only)]
    assert calls(0) == calls(0, rescale=0.5) == [(6, null)]
    for scale in (-1.0, 0.5, 0.999, 1.5, double(1.0), double([1.0] * 6)):
        assert calls(scale) == [(12, only + null)]
        assert calls(scale, batched=False) == [(6, only), (6, null)]


@EACH
def test_one_doubled_call_equals_two_calls(name):
    exact, x, time = labelled(SCHEDULES[name]), states(), TIMES[name]
    times = double([0.2, 0.3, 0.5, 0.6, 0.7, 1.0]) * time
    labels = torch.tensor([0, 1, 0, 1, -1, 1])
    for given in (time, times, torch.tensor(time)):
        one, two = (
            ClassifierFreeGuidance(exact, scale=2.5, null_condition=-1, batched=batched)
            .predict(x, given, condition=labels)
            for batched in (True, False)
        )  # fmt: skip
        assert_same(one, two, 100 * EPS)
        assert one.signal_scale.shape == two.signal_scale.shape


def test_weights_and_scales_are_one_apart():
    exact, x = labelled(), states()
    conditional = exact.predict(x, 300, condition=1).epsilon
    null = exact.predict(x, 300).epsilon

    def epsilon(guided):
        return guided.predict(x, 300, condition=1).epsilon

    for w in (-2.0, -0.5, 0.3, 4.0, lambda time: time / 100, double(1.5)):
        weight = w(300) if callable(w) else w
        expected = (1 + weight) * conditional - weight * null
        guided = ClassifierFreeGuidance.from_weight(exact, w, null_condition=-1)
        torch.testing.assert_close(epsilon(guided), expected, rtol=1e-13, atol=1e-14)

    def at(scale):
        return epsilon(ClassifierFreeGuidance(exact, scale=scale, null_condition=-1))

    torch.testing.assert_close(at(0.5), (conditional + null) / 2, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(at(-1.0), 2 * null - conditional, rtol=1e-14, atol=1e-15)


class Embedded(torch.nn.Module):
    """Predicts from an embedding as condition: ε̂ = x + c₀ + c₁ x²."""

    schedule = LINEAR

    def predict(self, x, time, *, condition=None):
        first, second = (condition[:, i].reshape(-1, *(1,) * (x.ndim - 1)) for i in (0, 1))
        output = x + first + second * x**2
        return Prediction.from_output(output, x, time, LINEAR, "epsilon")


def test_embeddings_and_negative_conditions_are_conditions():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    condition, negative = (torch.randn(3, 2, dtype=torch.float64) for _ in range(2))
    denoiser = Embedded()

    def epsilon(null):
        guided = ClassifierFreeGuidance(denoiser, scale=3.0, null_condition=null)
        return guided.predict(x, 300.0, condition=condition).epsilon

    for null in (torch.zeros(2), negative[:1], negative[0], negative):
        full = null.to(x).expand(3, 2)
        one = denoiser.predict(x, 300.0, condition=condition).epsilon
        other = denoiser.predict(x, 300.0, condition=full).epsilon
        torch.testing.assert_close(epsilon(null), other + 3 * (one - other), rtol=1e-13, atol=1e-13)


def test_one_condition_serves_all_examples():
    exact, x = labelled(), states()
    guided = ClassifierFreeGuidance(exact, scale=2.0, null_condition=torch.tensor(-1))
    expected = guided.predict(x, 300, condition=torch.ones(6, dtype=torch.long)).epsilon
    for one in (1, torch.tensor(1)):
        assert torch.equal(guided.predict(x, 300, condition=one).epsilon, expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaling_gives_each_example_its_share_of_the_conditional_spread(share):
    denoiser, x = Embedded(), torch.randn(3, 2, 4, dtype=torch.float64)
    condition = torch.randn(3, 2, dtype=torch.float64)
    null = torch.zeros(2)
    plain = ClassifierFreeGuidance(denoiser, scale=5.0, null_condition=null)
    rescaled = ClassifierFreeGuidance(denoiser, scale=5.0, null_condition=null, rescale=share)
    before = plain.predict(x, 300.0, condition=condition).epsilon
    target = denoiser.predict(x, 300.0, condition=condition).epsilon
    measured = rescaled.predict(x, 300.0, condition=condition).epsilon
    for i in range(3):
        ratio = target[i].numpy().std(ddof=1) / before[i].numpy().std(ddof=1)
        expected = share * ratio * before[i] + (1 - share) * before[i]
        torch.testing.assert_close(measured[i], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.5, 2.0, 3.0, 1.0, 0.0, -1.0]), torch.tensor(2.0)]
)
def test_scales_of_a_tensor_work_under_autocast(scale):
    """Two numbers at once are exact in bfloat16, so that scales of numbers give the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = NetworkDenoiser(MLPDenoiser(2, hidden=8, depth=1, num_classes=2), LINEAR)
    x, guided = states().float(), ClassifierFreeGuidance(inner, scale=scale, null_condition=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        measured = guided.predict(x, 300, condition=1)
        for row, number in enumerate(scale.expand(6).tolist()):
            guided.scale = number
            single = guided.predict(x, 300, condition=1)
            # A number may skip a branch: halves of a few products then round differently.
            for one, two in ((measured.sample, single.sample), (measured.epsilon, single.epsilon)):
                torch.testing.assert_close(one[row], two[row], rtol=2**-6, atol=2**-6)


def test_rescaling_survives_a_denoiser_that_predicts_nothing():
    silent = NetworkDenoiser(lambda x, time, condition: torch.zeros_like(x), LINEAR)
    guided = ClassifierFreeGuidance(silent, scale=5.0, null_condition=0, rescale=0.7)
    assert guided.predict(torch.ones(2, 3), 300, condition=1).epsilon.tolist() == [[0.0] * 3] * 2


def test_outside_its_interval_guidance_is_the_condition():
    inner, x = Recorded(labelled()), states()
    guided = ClassifierFreeGuidance(inner, scale=4.0, null_condition=-1, interval=(0.5, 2.0))
    full = ClassifierFreeGuidance(inner, scale=4.0, null_condition=-1)
    for sigma in (0.1, 0.49, 0.51, 1.0, 1.99, 2.01, 30.0):
        time = LINEAR.time_from_sigma(sigma)
        inner.calls.clear()
        measured = guided.predict(x, time, condition=1)
        inside = 0.5 <= sigma <= 2.0
        assert inner.calls[0][0] == (12 if inside else 6)
        expected = full if inside else inner.denoiser
        assert_same(measured, expected.predict(x, time, condition=1), EPS)


def test_guiders_of_diffusers_are_reproduced():
    guiders = pytest.importorskip("diffusers.guiders")
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    condition = torch.randn(3, 2, dtype=torch.float64)
    denoiser, null = Embedded(), torch.zeros(2)
    one = denoiser.predict(x, 300.0, condition=condition).epsilon
    other = denoiser.predict(x, 300.0, condition=null.to(x).expand(3, 2)).epsilon
    for amount in (0.3, 2.0, 7.5):
        for rescale in (0.0, 0.7):
            options = {"null_condition": null, "rescale": rescale}
            for original, ours in (
                (False, ClassifierFreeGuidance(denoiser, scale=amount, **options)),
                (True, ClassifierFreeGuidance.from_weight(denoiser, amount, **options)),
            ):
                theirs = guiders.ClassifierFreeGuidance(
                    guidance_scale=amount, guidance_rescale=rescale,
                    use_original_formulation=original,
                )  # fmt: skip
                expected = theirs.forward(one, other).pred
                measured = ours.predict(x, 300.0, condition=condition).epsilon
                # Specified: 1e-8; both compute in float64.
                assert ((measured - expected).abs().max() / expected.abs().max()).item() < 1e-13


def test_modules_move_and_pickle_with_what_they_hold():
    network = MLPDenoiser(2, hidden=8, depth=1, output_features=2)
    inner = NetworkDenoiser(MLPDenoiser(2, hidden=8, depth=1, num_classes=2), LINEAR)
    by_classifier = ClassifierGuidance(inner, class_log_probability(network), scale=2.0)
    free = ClassifierFreeGuidance.from_weight(
        inner, 1.0, null_condition=torch.tensor(2), interval=(0.1, 5.0)
    )
    x = states(3)
    for guided in (by_classifier, free):
        guided.double()
        before = guided.predict(x, 300, condition=torch.tensor([0, 1, 1]))
        again = pickle.loads(pickle.dumps(guided))
        after = again.predict(x, 300, condition=torch.tensor([0, 1, 1]))
        assert torch.equal(before.sample.detach(), after.sample.detach())
    assert set(free.state_dict()) == {f"denoiser.{name}" for name in inner.state_dict()}
    assert any(name.startswith("log_probability.network") for name in by_classifier.state_dict())


def test_classifier_free_guidance_lets_gradients_through():
    inner = NetworkDenoiser(MLPDenoiser(2, hidden=8, depth=1, num_classes=2), LINEAR)
    guided = ClassifierFreeGuidance(inner, scale=2.0, null_condition=2)
    guided.predict(states().float(), 300, condition=1).sample.sum().backward()
    assert inner.network.output.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_both_branches_compile_without_a_break():
    """In a process of its own: run-time shape checks cannot be traced."""
    script = """
    import torch
    from kexue.generative.diffusion import (
        ClassifierFreeGuidance, DiscreteSchedule, HeatSchedule, NetworkDenoiser, Prediction,
    )

    class Plain(torch.nn.Module):
        schedule = HeatSchedule()
        def predict(self, x, time, *, condition=None):
            epsilon = torch.sin(x * condition.reshape(-1, 1))
            scale = torch.ones((), dtype=torch.float64)
            return Prediction(x - epsilon, epsilon, scale, scale)

    def check(denoiser=Plain(), time=None, **options):
        guided = ClassifierFreeGuidance(denoiser, null_condition=0.0, **options)
        def run(x, time, condition):
            prediction = guided.predict(x, time, condition=condition)
            return prediction.sample, prediction.epsilon
        time = torch.rand(4) if time is None else time
        given = torch.randn(4, 3), time, torch.rand(4)
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for one, two in zip(compiled(*given), run(*given)):
            torch.testing.assert_close(one, two)

    check(scale=2.5)
    check(scale=torch.rand(4), rescale=0.5, clip_sample=(-1.0, 1.0))
    check(scale=lambda time: time.mean() + 2, batched=False)

    layer = torch.nn.Linear(3, 3)
    def network(x, time, condition):
        return torch.sin(layer(x) * condition.reshape(-1, 1) + time.reshape(-1, 1))
    for schedule in (DiscreteSchedule.linear(), HeatSchedule()):
        denoiser = NetworkDenoiser(network, schedule)
        for time in (50.0, torch.tensor(50.5), torch.rand(4) + 50):
            check(denoiser, time, scale=2.5, rescale=0.5, clip_sample=(-1.0, 1.0))
            with torch.no_grad():
                check(denoiser, time, scale=2.5)
    """
    import os

    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_guided_chains_on_a_gpu_do_not_wait_for_the_device():
    device = torch.device("cuda")
    with torch.random.fork_rng():
        inner = NetworkDenoiser(
            MLPDenoiser(2, hidden=8, depth=1, num_classes=2), SCHEDULES["cosine"]
        ).to(device)
        network = MLPDenoiser(2, hidden=8, depth=1, output_features=2).to(device)
    labels = torch.tensor([0, 1, 1], device=device)
    source = torch.Generator(device).manual_seed(0)
    for guided in (
        ClassifierFreeGuidance(inner, scale=2.0, null_condition=2, rescale=0.5).to(device),
        ClassifierGuidance(inner, class_log_probability(network), scale=2.0),
        ClassifierGuidance(inner, class_log_probability(network), evaluate_at="denoised"),
    ):
        sample(guided, (3, 2), num_steps=2, generator=source, condition=labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            drawn = sample(guided, (3, 2), num_steps=9, generator=source, condition=labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert drawn.device.type == "cuda"
        assert bool(torch.isfinite(drawn).all())


# Dropping conditions.


def test_each_condition_is_dropped_on_its_own():
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(20_000) % 10
    kept = drop_condition(labels, 10, probability=0.2, generator=source)
    dropped = kept == 10
    assert torch.equal(kept[~dropped], labels[~dropped])
    # Five standard errors of a share.
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=5 * 0.4 / math.sqrt(20_000))
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped, uniform < 0.2)
    assert torch.equal(drop_condition(labels, 10, probability=0.0), labels)
    assert bool((drop_condition(labels, 10, probability=1.0) == 10).all())


def test_embeddings_are_dropped_as_a_whole():
    embeddings, null = torch.randn(50, 3, 4), torch.full((3, 4), 7.0)
    kept = drop_condition(embeddings, null, probability=0.5)
    gone = (kept == 7).all((1, 2))
    assert torch.equal(kept[~gone], embeddings[~gone])
    assert 0 < gone.sum() < 50
    assert drop_condition(embeddings[:0], null, probability=0.5).shape == (0, 3, 4)


def test_training_drops_labels_with_the_draws_it_always_had():
    """Rows first, then one uniform per example, then times and noise."""
    images = torch.rand(8, 1, 2, 2) * 2 - 1
    source, reference = (torch.Generator().manual_seed(3) for _ in range(2))
    denoiser = ImageDenoiser((1, 2, 2), hidden=8, depth=1, num_classes=2)
    denoiser.fit(
        images, torch.arange(8) % 2, steps=2, batch_size=5, label_dropout=0.4, generator=source
    )
    for _ in range(2):
        torch.randint(8, (5,), generator=reference)
        torch.rand(5, generator=reference)
        torch.rand(5, dtype=torch.float64, generator=reference)
        torch.randn(5, 1, 2, 2, generator=reference)
    assert torch.equal(source.get_state(), reference.get_state())


# Errors.


def free(**options):
    return ClassifierFreeGuidance(labelled(), **{"scale": 2.0, "null_condition": -1, **options})


def by(objective=None, **options):
    return ClassifierGuidance(labelled(), objective or labelled().class_log_prob, **options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: by(evaluate_at="clean"), "evaluate_at.*'clean'"),
        (lambda: by(scale=math.nan), "scale must be finite, got nan"),
        (lambda: by(scale=double([[1.0]])), "scale"),
        (lambda: by(clip_sample=(1.0, -1.0)), "clip_sample must be an increasing pair"),
        (
            lambda: by(scale=double([1.0, 2.0])).predict(states(), 300, condition=1),
            r"scale.*\(6,\)",
        ),
        (lambda: by(lambda x, t, y: x).predict(states(), 300), r"shape \(6,\).*\(6, 2\)"),
        (lambda: by(lambda x, t, y: x.sum()).predict(states(), 300), r"shape \(6,\).*\(\)"),
        (lambda: by(lambda x, t, y: 1.0).predict(states(), 300), "shape.*float"),
        (
            lambda: by(lambda x, t, y: x.mean(), evaluate_at="denoised").predict(states(), 300),
            r"shape \(6,\)",
        ),
        (lambda: by().predict(states(), 0, condition=1), "time must be positive"),
        (lambda: by().predict(states().long(), 300, condition=1), "x must be a real tensor"),
        (lambda: MeanShiftGuidance(print, expand_at="x"), "expand_at.*'x'"),
        (
            lambda: MeanShiftGuidance(lambda x, t, y: x)(
                states(), 300, 299, states(), torch.ones(6, 2)
            ),
            "shape",
        ),
        (lambda: class_log_probability(classifier(), sharpness=0.0), "sharpness.*0.0"),
        (lambda: class_log_probability(classifier(), sharpness=-1.0), "sharpness.*-1.0"),
        (lambda: class_log_probability(classifier())(states(), 1), "condition"),
        (lambda: class_log_probability(classifier())(states(), 1, 3), r"\[0, 2\].*3"),
        (lambda: class_log_probability(classifier())(states(), 1, torch.tensor([1, 2])), "labels"),
        (lambda: class_log_probability(classifier())(states(), 1, double(1.0)), "integer labels"),
        (lambda: class_log_probability(lambda x, t: x[:, 0])(states(), 1, 0), "logits of shape"),
        (lambda: cosine_similarity(lambda x, t: x)(states(), 1), "condition"),
        (lambda: cosine_similarity(lambda x, t: x)(states(), 1, double([1.0, 2.0])), "shape"),
        (lambda: cosine_similarity(lambda x, t: x)(states(), 1, states(2)), "shape"),
        (lambda: gram_similarity(lambda x, t: x)(states(), 1, torch.ones(1, 3)), "channels"),
        (lambda: gram_similarity(lambda x, t: x)(states(), 1, torch.ones(2, 2)), "batch"),
        (lambda: free(rescale=1.5), "rescale must lie in.*1.5"),
        (lambda: free(rescale=-0.1), "rescale"),
        (lambda: free(interval=(2.0, 2.0)), "interval must be an increasing"),
        (lambda: free(interval=(-1.0, 2.0)), "interval"),
        (lambda: free(interval=(math.nan, 2.0)), "interval"),
        (lambda: free(clip_sample=(0.0, 0.0)), "clip_sample"),
        (lambda: free(scale=math.inf), "scale"),
        (lambda: free().predict(states(), 300), "condition must be given"),
        (lambda: free(scale=1.0).predict(states(), 300), "condition must be given"),
        (lambda: free().predict(states(), 300, condition=torch.tensor([0, 1])), "condition.*6"),
        (lambda: free(null_condition=-1.0).predict(states(), 300, condition=1), "null_condition"),
        (
            lambda: free(null_condition=torch.zeros(3).long()).predict(states(), 300, condition=1),
            "null_condition",
        ),
        (
            lambda: free(interval=(0.5, 2.0)).predict(states(), torch.ones(6), condition=1),
            "one for all",
        ),
        (
            lambda: free(rescale=0.5).predict(states(), 300, condition=1)
            and ClassifierFreeGuidance(
                two_gaussians(0.0, 2.0), scale=2.0, null_condition=0, rescale=0.5
            ).predict(states()[:, :1], 300, condition=1),
            "at least two entries",
        ),
        (lambda: drop_condition(torch.arange(3), 3, probability=1.1), "probability.*1.1"),
        (lambda: drop_condition(torch.arange(3), 3, probability=-0.1), "probability"),
        (lambda: drop_condition(torch.arange(3), 3, probability=math.nan), "probability.*nan"),
        (lambda: drop_condition(torch.tensor(3), 3, probability=0.1), "one entry per example"),
        (lambda: drop_condition(torch.arange(3), 0.5, probability=0.1), "null_condition"),
        (
            lambda: drop_condition(torch.zeros(3, dtype=torch.uint8), -1, probability=1.0),
            r"null_condition.*uint8.*-1",
        ),
        (
            lambda: drop_condition(torch.zeros(3, dtype=torch.bool), 2, probability=1.0),
            r"null_condition.*bool.*2",
        ),
        (
            lambda: free().predict(states(1), 300, condition=torch.zeros(1, dtype=torch.uint8)),
            r"null_condition.*uint8.*-1",
        ),
        (lambda: drop_condition(torch.ones(3, 2), 0.5, probability=0.1), "null_condition"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ClassifierGuidance(torch.nn.Linear(2, 2), print), "schedule.*Linear"),
        (lambda: ClassifierFreeGuidance("no", scale=1.0, null_condition=0), "denoiser.*str"),
        (lambda: ClassifierGuidance(labelled(), 3.0), "log_probability.*float"),
        (lambda: MeanShiftGuidance(None), "log_probability.*NoneType"),
        (lambda: by(scale="2"), "scale.*str"),
        (lambda: free(null_condition=None), "null_condition.*NoneType"),
        (lambda: class_log_probability(None), "NoneType"),
    ],
)
def test_things_of_another_kind_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()
