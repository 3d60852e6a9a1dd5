"""Samples with a gradient: laws, limits, and exact numbers."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kexue.generative.reparameterization import (
    ExponentialTemperature,
    conditional_gumbel,
    gumbel_max,
    gumbel_noise,
    gumbel_softmax,
    gumbel_top_k,
    relaxed_top_k,
    reparameterize_normal,
)
from kexue.studies.gumbel_softmax import sine_crossing, sine_moments

EULER = 0.57721566490153286
EPS = torch.finfo(torch.float64).eps
MASKED = -math.inf
STANDARD_ERRORS = 5.0
"""Random checks allow five standard errors: one false alarm in two million."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_gumbel_law(dtype: torch.dtype) -> None:
    noise = gumbel_noise((400, 500), dtype=dtype, generator=seeded())
    assert noise.dtype == dtype
    assert stats.kstest(noise.flatten().double().numpy(), "gumbel_r").pvalue > 1e-3


def test_single_precision_noise_has_its_tail() -> None:
    # Multiples of 2^-24 would end at 16.6; P(G > g) = 1 - exp(-exp(-g)).
    draws, generator = 10**8, seeded(1)
    counts = dict.fromkeys((9, 12, 14), 0)
    largest = 0.0
    for _ in range(20):
        noise = gumbel_noise(draws // 20, generator=generator)
        largest = max(largest, noise.max().item())
        tail = noise[noise > 9]
        assert len(tail.unique()) > 0.99 * len(tail)
        counts = {g: count + int((tail > g).sum()) for g, count in counts.items()}
    assert largest > 17
    for g, count in counts.items():
        expected = -draws * math.expm1(-math.exp(-g))
        assert count == pytest.approx(expected, abs=STANDARD_ERRORS * math.sqrt(expected))


def test_half_precision_noise_is_rounded_single_precision_noise() -> None:
    noise = gumbel_noise(1000, dtype=torch.bfloat16, generator=seeded())
    assert torch.equal(noise, gumbel_noise(1000, generator=seeded()).bfloat16())


SINE = [
    (0.25, 0.2416271359, 0.0001346839, 0.1143960471),
    (0.5, 0.436293706822, 0.007077910262, 0.309647801388),
    (1.0, 0.5794408710, 0.2200967916, 0.3317938208),
    (2.0, 0.223394058418, 1.950338209630, 0.451006775798),
    (4.0, 0.0004862299, 7.9999997636, 0.4999997636),
]


@pytest.mark.parametrize(("w", "gradient", "pathwise", "score"), SINE)
def test_closed_forms_of_a_sine(w: float, gradient: float, pathwise: float, score: float) -> None:
    # Half a unit of the tenth decimal, to which the shortest of these numbers is given.
    assert sine_moments(w, 0.3, 1.0) == pytest.approx((gradient, pathwise, score), abs=6e-11)


def test_variances_of_a_sine_cross() -> None:
    assert sine_crossing(0.3, 1.0) == pytest.approx(1.0903730954196, abs=1e-12)


@pytest.mark.parametrize(("w", "gradient", "variance", "_score"), SINE)
def test_normal_samples_carry_the_gradient(
    w: float, gradient: float, variance: float, _score: float
) -> None:
    draws = 200_000
    mean = torch.full((draws,), 0.3, dtype=torch.float64, requires_grad=True)
    z = reparameterize_normal(mean, torch.zeros_like(mean), generator=seeded())
    (slopes,) = torch.autograd.grad(torch.sin(w * z).sum(), mean)
    error = math.sqrt(variance / draws)
    assert slopes.mean().item() == pytest.approx(gradient, abs=STANDARD_ERRORS * error)
    spread = (slopes - slopes.mean()).square()
    assert spread.mean().item() == pytest.approx(
        variance, abs=STANDARD_ERRORS * spread.std().item() / math.sqrt(draws)
    )


def test_both_variances_of_a_square() -> None:
    m, s, draws = 0.7, 1.3, 400_000
    mean = torch.full((draws,), m, dtype=torch.float64, requires_grad=True)
    log_variance = torch.full_like(mean, 2 * math.log(s), requires_grad=False)
    z = reparameterize_normal(mean, log_variance, generator=seeded())
    (pathwise,) = torch.autograd.grad(z.square().sum(), mean)
    score = z.detach().square() * (z.detach() - m) / s**2
    for slopes, variance in ((pathwise, 6.76), (score, 32.352071005917)):
        error = math.sqrt(variance / draws)
        assert slopes.mean().item() == pytest.approx(1.4, abs=STANDARD_ERRORS * error)
        spread = (slopes - 1.4).square()
        error = spread.std().item() / math.sqrt(draws)
        assert spread.mean().item() == pytest.approx(variance, abs=STANDARD_ERRORS * error)


def test_normal_samples_have_the_gradient_of_the_standard_deviation() -> None:
    log_variance = double(0.4, -1.0).requires_grad_()
    z = reparameterize_normal(double(1.0, 2.0), log_variance, samples=3, generator=seeded())
    assert z.shape == (3, 2)
    (slope,) = torch.autograd.grad(z.sum(), log_variance)
    # dz/d log σ² = (z - m)/2
    torch.testing.assert_close(slope, ((z.detach() - double(1.0, 2.0)) / 2).sum(0))


TWO_CATEGORIES = [
    (0.8, 0.5, 0.6656900765187, 0.19270925089),
    (0.8, 1.0, 0.63055254524235, 0.15639452081),
    (-1.5, 0.25, 0.19162843629289, 0.15004465645),
]


@pytest.mark.parametrize(("a", "tau", "mean", "slope"), TWO_CATEGORIES)
def test_relaxed_mean_of_two_categories(a: float, tau: float, mean: float, slope: float) -> None:
    # The difference of two Gumbel variables is logistic: the midpoint rule over its quantiles.
    points = 200_000
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    noise = torch.stack([u.logit(), torch.zeros_like(u)], -1)
    first = double(a).requires_grad_()
    logits = torch.stack([first, torch.zeros_like(first)], -1).expand(points, 2)
    average = gumbel_softmax(logits, temperature=tau, noise=noise)[:, 0].mean()
    (derivative,) = torch.autograd.grad(average, first)
    # At tau = 1 the integrand's slope in u is bounded, so the rule errs by about points^-2.
    assert average.item() == pytest.approx(mean, abs=2e-10)
    assert derivative.item() == pytest.approx(slope, abs=2e-10)


def test_gumbel_max_has_the_softmax_law() -> None:
    logits = double(0.3, -1.0, 2.0, 0.0, MASKED) + 700
    draws = 100_000
    index = gumbel_max(logits.expand(draws, 5), generator=seeded())
    counts = torch.bincount(index, minlength=5)
    assert counts[4] == 0
    expected = draws * logits.softmax(-1)
    assert stats.chisquare(counts[:4].numpy(), expected[:4].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_without_preference(dtype: torch.dtype) -> None:
    draws, categories = 4000, 512
    logits = torch.full((draws, categories), 100.0, dtype=dtype)
    error = 0.5 / math.sqrt(draws)
    for index in (
        gumbel_max(logits, generator=seeded()),
        gumbel_softmax(logits, hard=True, generator=seeded(1)).argmax(-1),
        gumbel_top_k(logits, 2, generator=seeded(2)).indices[:, 0],
        conditional_gumbel(logits, gumbel_max(logits, generator=seeded(3))).argmax(-1),
    ):
        share = (index < categories // 2).double().mean().item()
        assert share == pytest.approx(0.5, abs=4 * error)
    assert gumbel_softmax(logits).dtype == dtype


def test_only_the_argmax_of_a_relaxed_sample_is_categorical() -> None:
    logits, draws = double(0.8, 0.0), 40_000
    soft = gumbel_softmax(logits.expand(draws, 2), generator=seeded())
    p = logits.softmax(-1)[0].item()
    error = math.sqrt(p * (1 - p) / draws)
    share = (soft.argmax(-1) == 0).double().mean().item()
    assert share == pytest.approx(p, abs=STANDARD_ERRORS * error)
    assert soft[:, 0].mean().item() < p - 20 * error


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("hard", [False, True])
def test_categories_may_be_in_any_dimension(dim: int, hard: bool) -> None:
    logits, noise = torch.randn(3, 4, 5, generator=seeded()), gumbel_noise((3, 4, 5))
    sample = gumbel_softmax(logits, temperature=0.7, hard=hard, dim=dim, noise=noise)
    moved = gumbel_softmax(
        logits.movedim(dim, -1), temperature=0.7, hard=hard, noise=noise.movedim(dim, -1)
    )
    torch.testing.assert_close(sample, moved.movedim(-1, dim))
    assert torch.equal(gumbel_max(logits, dim=dim, noise=noise), sample.argmax(dim))


@pytest.mark.parametrize("temperature", [0.5, torch.tensor(0.5), torch.full((6, 1), 0.5)])
def test_hard_samples_are_exact_with_the_soft_gradient(temperature: float | Tensor) -> None:
    logits = torch.randn(6, 5, generator=seeded()).requires_grad_()
    noise, weight = gumbel_noise((6, 5), generator=seeded(1)), torch.randn(6, 5)
    gradients = []
    for hard in (True, False):
        sample = gumbel_softmax(logits, temperature=temperature, hard=hard, noise=noise)
        gradients.append(torch.autograd.grad((sample * weight).sum(), logits)[0])
        if hard:
            assert torch.equal(sample, sample.round())
            assert torch.equal(sample.argmax(-1), (logits + noise).argmax(-1))
            assert torch.equal(sample.sum(-1), torch.ones(6))
    assert torch.equal(*gradients)


def test_hard_samples_take_the_largest_even_where_the_soft_sample_ties() -> None:
    logits, noise = torch.tensor([1.0, 1.0 + 2e-7]), torch.zeros(2)
    soft = gumbel_softmax(logits, temperature=1e4, noise=noise)
    assert soft[0] == soft[1]
    hard = gumbel_softmax(logits, temperature=1e4, hard=True, noise=noise)
    assert hard.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("tau", [1e-3, 1e-10, 1e-30, 1e-40])
@pytest.mark.parametrize("tensor", [False, True])
def test_cold_samples_are_one_hot_with_finite_gradients(tau: float, tensor: bool) -> None:
    logits = torch.tensor([[0.0, 1000.0, -1e30], [MASKED, 2.0, 1.0]], requires_grad=True)
    temperature: Any = torch.full((2, 1), tau).requires_grad_() if tensor else tau
    for sample in (
        gumbel_softmax(logits, temperature=temperature, noise=torch.zeros(2, 3)),
        relaxed_top_k(logits, 1, temperature=temperature, noise=torch.zeros(2, 3)),
    ):
        assert sample.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
        wanted = [logits, temperature] if tensor else [logits]
        for gradient in torch.autograd.grad((sample * torch.arange(3)).sum(), wanted):
            assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_masked_categories_have_no_share_and_finite_gradients(hard: bool, tensor: bool) -> None:
    logits = torch.tensor([0.3, MASKED, -1.0, MASKED]).expand(50, 4).clone().requires_grad_()
    temperature: Any = torch.tensor(0.6, requires_grad=True) if tensor else 0.6
    for sample in (
        gumbel_softmax(logits, temperature=temperature, hard=hard, generator=seeded()),
        relaxed_top_k(logits, 2, temperature=temperature, hard=hard, generator=seeded()),
    ):
        assert not sample[:, [1, 3]].any()
        wanted = [logits, temperature] if tensor else [logits]
        gradients = torch.autograd.grad((sample * torch.arange(4)).sum(), wanted)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert not gradients[0][:, [1, 3]].any()


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6),
    tau=st.floats(1e-30, 1e30),
    seed=st.integers(0, 100),
)
def test_every_sample_lies_in_the_simplex(logits: list[float], tau: float, seed: int) -> None:
    soft = gumbel_softmax(double(*logits), temperature=tau, generator=seeded(seed))
    assert bool((soft >= 0).all())
    assert soft.sum().item() == pytest.approx(1.0, abs=16 * EPS)


@pytest.mark.parametrize("sampler", [gumbel_softmax, lambda o, **g: relaxed_top_k(o, 2, **g)])
def test_gradients_in_logits_noise_and_temperature(sampler: Callable[..., Tensor]) -> None:
    logits, noise = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64).unbind()
    temperature = double([0.4], [0.9], [2.0])
    assert torch.autograd.gradcheck(
        lambda o, g, t: sampler(o, temperature=t, noise=g),
        tuple(x.requires_grad_() for x in (logits, noise, temperature)),
    )
    fixed = lambda o: sampler(o, temperature=0.7, noise=noise.detach())  # noqa: E731
    assert torch.autograd.gradgradcheck(fixed, (logits,))


def test_vmap_equals_a_loop() -> None:
    logits, noise = torch.randn(2, 5, 4, generator=seeded(), dtype=torch.float64).unbind()
    index = logits.argmax(-1)
    for call in (
        lambda o, g: gumbel_softmax(o, temperature=0.5, noise=g),
        lambda o, g: gumbel_softmax(o, temperature=0.5, hard=True, noise=g),
        lambda o, g: relaxed_top_k(o, 2, temperature=0.5, noise=g),
        lambda o, g: gumbel_top_k(o, 2, noise=g).log_probability,
        lambda o, g: gumbel_max(o, noise=g),
    ):
        torch.testing.assert_close(torch.func.vmap(call)(logits, noise), call(logits, noise))
        slope = torch.func.vmap(torch.func.grad(lambda o, g: call(o, g).double().max()))  # noqa: B023
        assert slope(logits, noise).shape == logits.shape
    assert index.shape == (5,)


COMPILED = """
import torch
from kexue.generative.reparameterization import gumbel_softmax, relaxed_top_k, gumbel_top_k
logits, noise = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
for call in (
    lambda o, g: gumbel_softmax(o, temperature=0.5, noise=g, validate_args=False),
    lambda o, g: gumbel_softmax(o, temperature=0.5, hard=True, noise=g, validate_args=False),
    lambda o, g: relaxed_top_k(o, 2, temperature=0.5, noise=g, validate_args=False),
    lambda o, g: gumbel_top_k(o, 2, noise=g, validate_args=False).log_probability,
):
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (compiled, call):
        leaf = logits.clone().requires_grad_()
        result = run(leaf, noise)
        weights = torch.arange(result.numel(), dtype=result.dtype).reshape(result.shape)
        gradients.append(torch.autograd.grad((result * weights).sum(), leaf)[0])
    torch.testing.assert_close(*gradients)
"""


def test_samples_compile_without_a_graph_break() -> None:
    # In a process of its own: dynamo cannot trace through the shape checks of this one.
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=environment)


def test_a_given_generator_leaves_the_global_one_alone() -> None:
    logits = torch.randn(3, 4, generator=seeded())
    index = logits.argmax(-1)
    for draw in (
        lambda g: gumbel_noise((3, 4), generator=g),
        lambda g: reparameterize_normal(logits, logits, generator=g),
        lambda g: gumbel_softmax(logits, generator=g),
        lambda g: gumbel_top_k(logits, 2, generator=g).log_probability,
        lambda g: relaxed_top_k(logits, 2, generator=g),
        lambda g: conditional_gumbel(logits, index, generator=g),
    ):
        before = torch.get_rng_state()
        assert torch.equal(draw(seeded(3)), draw(seeded(3)))
        assert torch.equal(before, torch.get_rng_state())


def test_conditional_noise_mixed_over_the_index_is_plain_noise() -> None:
    draws, logits = 20_000, double(0.5, -1.0, 1.5)
    index = gumbel_max(logits.expand(draws, 3), generator=seeded())
    conditional = conditional_gumbel(logits.expand(draws, 3), index, generator=seeded(1))
    assert torch.equal(conditional.argmax(-1), index)
    plain = logits + gumbel_noise((draws, 3), dtype=torch.float64, generator=seeded(2))
    for one, two in zip(conditional.T, plain.T, strict=True):
        assert stats.ks_2samp(one.numpy(), two.numpy()).pvalue > 1e-3


def test_the_winner_has_the_mean_of_a_shifted_gumbel_variable() -> None:
    draws, logits = 100_000, double(0.5, -1.0, 1.5)
    error = math.pi / math.sqrt(6 * draws)
    for winner in range(3):
        z = conditional_gumbel(logits, torch.tensor(winner), samples=draws, generator=seeded())
        assert z.shape == (draws, 3)
        expected = logits.logsumexp(-1).item() + EULER
        largest = z[:, winner]
        assert largest.mean().item() == pytest.approx(expected, abs=STANDARD_ERRORS * error)


def test_conditional_noise_depends_on_the_logits() -> None:
    logits = torch.randn(3, 4, generator=seeded(), dtype=torch.float64).requires_grad_()
    index = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(
        lambda o: conditional_gumbel(o, index, samples=2, generator=seeded(5)), (logits,)
    )


def test_conditional_noise_is_accurate_for_logits_far_apart() -> None:
    logits = torch.tensor([1000.0, 0.0, MASKED, -1000.0], requires_grad=True)
    z = conditional_gumbel(logits, torch.tensor(0), samples=500, generator=seeded())
    exact = conditional_gumbel(logits.double(), torch.tensor(0), samples=500, generator=seeded(1))
    # The losers are all but free of the winner: o + G, with the digits of a number near 0.
    assert stats.ks_2samp(z[:, 1].detach(), exact[:, 1].detach()).pvalue > 1e-3
    assert len(z[:, 1].unique()) == 500
    assert bool(z[:, 2].isneginf().all())
    (gradient,) = torch.autograd.grad(z.softmax(-1)[:, 1].sum(), logits)
    assert bool(gradient.isfinite().all())


def permutation_sample(logits: Tensor, order: tuple[int, ...], k: int) -> Any:
    """The sample that comes in this order, by noise that leaves no other."""
    place = torch.empty_like(logits)
    place[list(order)] = -torch.arange(len(order), dtype=logits.dtype) - 100
    return gumbel_top_k(logits, k, noise=place - logits)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_probabilities_of_all_ordered_samples_sum_to_one(k: int) -> None:
    logits = double(0.5, -1.0, 40.0, 0.0)
    total = 0.0
    for order in itertools.permutations(range(4)):
        sample = permutation_sample(logits, order, k)
        assert tuple(sample.indices.tolist()) == order[:k]
        total += sample.log_probability.exp().item() / math.factorial(4 - k)
    assert total == pytest.approx(1.0, abs=64 * EPS)


def test_log_probability_of_an_ordered_sample_term_by_term() -> None:
    logits = torch.randn(6, generator=seeded(), dtype=torch.float64) * 3
    order = (4, 1, 5, 0, 2, 3)
    left, expected = set(range(6)), 0.0
    for i in order[:4]:
        expected += logits[i].item() - logits[sorted(left)].logsumexp(-1).item()
        left.remove(i)
    measured = permutation_sample(logits, order, 4).log_probability.item()
    assert measured == pytest.approx(expected, abs=64 * EPS * abs(expected))


def test_ordered_samples_have_the_law_of_plackett_and_luce() -> None:
    logits, draws = double(0.5, -0.5, 1.0), 60_000
    sample = gumbel_top_k(logits.expand(draws, 3), 2, generator=seeded())
    code = sample.indices[:, 0] * 3 + sample.indices[:, 1]
    orders = list(itertools.permutations(range(3), 2))
    counts = [int((code == 3 * a + b).sum()) for a, b in orders]
    expected = [
        draws * permutation_sample(logits, (*o, 3 - sum(o)), 2).log_probability.exp().item()
        for o in orders
    ]
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_log_probability_is_differentiable_with_and_without_a_remainder() -> None:
    noise = double([0.1, 2.0, -1.0, 0.0], [1.0, 0.0, 3.0, 2.0])
    logits = double([0.5, 0.1, MASKED, -1.0], [0.0, 1.0, 2.0, MASKED])
    for k in (1, 2, 3):
        leaf = logits.clone().requires_grad_()
        sample = gumbel_top_k(leaf, k, noise=noise)
        (gradient,) = torch.autograd.grad(sample.log_probability.sum(), leaf)
        assert bool(gradient.isfinite().all())
        # The score has mean zero in every direction; along (1, ..., 1) it vanishes altogether.
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, dtype=torch.float64))
    free = double([0.5, 0.1, 0.7, -1.0]).requires_grad_()
    for k in (1, 3, 4):
        assert torch.autograd.gradcheck(
            lambda o, k=k: gumbel_top_k(o, k, noise=noise[:1]).log_probability, (free,)
        )


def relaxed_in_high_precision(a: list[float], k: int, tau: float) -> list[float]:
    with mpmath.workdps(400):
        values = [mpmath.mpf(x) for x in a]
        total = [mpmath.mpf(0)] * len(a)
        for _ in range(k):
            top = max(values)
            weights = [mpmath.exp((v - top) / mpmath.mpf(tau)) for v in values]
            share = [w / mpmath.fsum(weights) for w in weights]
            total = [t + s for t, s in zip(total, share, strict=True)]
            values = [v + mpmath.log(1 - s) for v, s in zip(values, share, strict=True)]
        return [float(t) for t in total]


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "a", [[0.0, 1.0, -0.5, 2.0], [0.0, 60.0, 59.0, 1.0], [0.0, 100.0, 1.0, 2.0]]
)
def test_relaxed_subsets_in_high_precision(a: list[float], tau: float) -> None:
    for k in (1, 2, 3, 4):
        exact = relaxed_in_high_precision(a, k, tau)
        measured = relaxed_top_k(double(*a), k, temperature=tau, noise=torch.zeros(4).double())
        # A rounding of a is amplified by 1/tau in the exponent, once for each draw.
        assert measured.tolist() == pytest.approx(exact, abs=k * 64 * EPS * max(a) / tau)
        assert measured.sum().item() == pytest.approx(k, abs=16 * k * EPS)


def test_cold_relaxed_subsets_are_the_exact_ones() -> None:
    # Here 1 - softmax is 0 in single precision: its logarithm must not repeat the winner.
    logits = torch.tensor([0.0, 1000.0, 2.0, -3.0])
    soft = relaxed_top_k(logits, 2, temperature=0.05, noise=torch.zeros(4))
    hard = relaxed_top_k(logits, 2, temperature=0.05, hard=True, noise=torch.zeros(4))
    assert hard.tolist() == [0.0, 1.0, 1.0, 0.0]
    torch.testing.assert_close(soft, hard)


def test_annealing_follows_its_law_and_goes_on_from_a_checkpoint() -> None:
    temperature = ExponentialTemperature(initial=2.0, minimum=0.5, rate=0.1)
    assert temperature.value == 2.0
    for step in range(1, 20):
        assert temperature.step() == max(0.5, 2.0 * math.exp(-0.1 * step))
    other = ExponentialTemperature(rate=0.3)
    other.load_state_dict(temperature.state_dict())
    assert other.step() == temperature.step()
    assert other.state_dict() == temperature.state_dict()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": -0.1},
        {"rate": math.nan},
        {"rate": 1.0, "minimum": 0.0},
        {"rate": 1.0, "initial": 0.001},
        {"rate": 1.0, "initial": math.inf},
    ],
)
def test_schedules_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rate|temperatures"):
        ExponentialTemperature(**wrong)


@pytest.mark.bad_input
def test_states_of_a_schedule_are_checked() -> None:
    temperature = ExponentialTemperature(rate=0.3)
    good = temperature.state_dict()
    for bad in ({}, {**good, "step_count": -1}, {**good, "rate": -1.0}, {**good, "more": 1}):
        with pytest.raises(ValueError, match=r"keys|step_count|rate"):
            temperature.load_state_dict(bad)
    assert temperature.state_dict() == good


SAMPLERS = [
    gumbel_max,
    gumbel_softmax,
    lambda o, **g: gumbel_top_k(o, 2, **g),
    lambda o, **g: relaxed_top_k(o, 2, **g),
]


@pytest.mark.bad_input
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_logits_are_checked(sampler: Callable[..., Any]) -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="floating-point"):
        sampler(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point"):
        sampler([0.0, 1.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="nan"):
            sampler(torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, MASKED]]))
    with pytest.raises(ValueError, match="finite"):
        sampler(torch.tensor([[0.0, 1.0, 2.0], [MASKED] * 3]))
    with pytest.raises(ValueError, match=r"noise must have the shape .*\(2, 3\), got \(3,\)"):
        sampler(good, noise=torch.zeros(3))
    with pytest.raises(ValueError, match="noise must be finite"):
        sampler(good, noise=good + math.nan)
    sampler(good + math.nan, validate_args=False)


@pytest.mark.bad_input
@pytest.mark.parametrize("sampler", [SAMPLERS[1], SAMPLERS[3]])
def test_temperatures_are_checked(sampler: Callable[..., Any]) -> None:
    for bad in (0.0, -1.0, math.nan, math.inf, torch.tensor(0.0), torch.tensor([[1.0], [-1.0]])):
        with pytest.raises(ValueError, match="temperature must be positive"):
            sampler(torch.zeros(2, 3), temperature=bad)
    with pytest.raises(ValueError, match="temperature must broadcast"):
        sampler(torch.zeros(2, 3), temperature=torch.ones(2, 2, 3))
    for bad in ("warm", None, torch.tensor(1), True):
        with pytest.raises(TypeError, match="temperature"):
            sampler(torch.zeros(2, 3), temperature=bad)


@pytest.mark.bad_input
@pytest.mark.parametrize("sampler", [gumbel_top_k, relaxed_top_k])
def test_sizes_of_subsets_are_checked(sampler: Callable[..., Any]) -> None:
    for bad in (0, -1, 4, 1.5, True):
        with pytest.raises(ValueError, match="k must be between 1 and 3"):
            sampler(torch.zeros(2, 3), bad)
    with pytest.raises(ValueError, match="k = 2 finite logits, got 1"):
        sampler(torch.tensor([[0.0, 1.0, 2.0], [0.0, MASKED, MASKED]]), 2)


@pytest.mark.bad_input
def test_indices_and_sizes_are_checked() -> None:
    logits = torch.tensor([[0.0, MASKED, 2.0]])
    with pytest.raises(ValueError, match=r"index must have shape \(1,\)"):
        conditional_gumbel(logits, torch.tensor(0))
    with pytest.raises(TypeError, match="int64"):
        conditional_gumbel(logits, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="between 0 and 2"):
        conditional_gumbel(logits, torch.tensor([3]))
    with pytest.raises(ValueError, match="must be finite"):
        conditional_gumbel(logits, torch.tensor([1]))
    with pytest.raises(ValueError, match="samples"):
        conditional_gumbel(logits, torch.tensor([0]), samples=0)
    with pytest.raises(ValueError, match="samples"):
        reparameterize_normal(torch.zeros(2), torch.zeros(2), samples=0)
    with pytest.raises(ValueError, match="one shape"):
        reparameterize_normal(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="dim must be between -2 and 1"):
        gumbel_softmax(logits, dim=2)
    with pytest.raises(TypeError, match="floating-point"):
        gumbel_noise(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="shape"):
        gumbel_noise((2, -1))


@pytest.mark.gpu
def test_noise_and_samples_on_a_gpu() -> None:
    noise = gumbel_noise((1000, 1000), device="cuda")
    assert stats.kstest(noise.flatten()[::7].cpu().numpy(), "gumbel_r").pvalue > 1e-3
    logits = torch.zeros(4000, 512, device="cuda", dtype=torch.bfloat16)
    share = (gumbel_softmax(logits, hard=True).argmax(-1) < 256).double().mean().item()
    assert share == pytest.approx(0.5, abs=STANDARD_ERRORS * 0.5 / math.sqrt(4000))
