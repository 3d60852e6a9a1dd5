"""Gradient estimators against enumeration.

Independent draws are rows of the batch: one backward pass gives the gradient of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.generative.reparameterization import (
    categorical_expectation,
    conditional_gumbel,
    gradient_moments,
    relax_gradient,
)

STANDARD_ERRORS = 5.0
MASKED = -math.inf
SAMPLED = (
    "score_function",
    "straight_through",
    "gumbel_softmax",
    "straight_through_gumbel",
    "gumbel_rao",
    "reinmax",
    "rebar",
)
LOGITS = torch.tensor([[0.4, -0.3, 0.2], [-0.6, 0.5, 0.1]], dtype=torch.float64)
MIXING = torch.tensor(
    [[0.9, -0.4], [-1.1, 0.7], [0.3, 1.2], [0.8, -0.2], [-0.5, 0.6], [1.3, -0.9]],
    dtype=torch.float64,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(states: Tensor) -> Tensor:
    """A cost that is neither linear nor quadratic, nor a sum over the variables."""
    mixed = states.flatten(-2) @ MIXING
    return mixed.sin().sum(-1) + mixed.square().mean(-1)


def gradients(
    cost: Callable[[Tensor], Tensor], logits: Tensor, draws: int, **options: Any
) -> Tensor:
    """One estimate of the gradient per row."""
    batch = logits.expand(draws, *logits.shape).clone().requires_grad_()
    options.setdefault("generator", seeded())
    value = categorical_expectation(cost, batch, **options)
    return torch.autograd.grad(value.sum(), batch)[0]


def exact_gradient(cost: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return gradients(cost, logits, 1, estimator="exact")[0]


def z_scores(estimates: Tensor, truth: Tensor) -> Tensor:
    error = estimates.std(0) / math.sqrt(len(estimates))
    return ((estimates.mean(0) - truth) / error).abs()


def total_variance(estimates: Tensor) -> float:
    return estimates.var(0).sum().item()


def test_enumeration_equals_a_loop_over_states() -> None:
    logits = torch.stack([LOGITS, 2 * LOGITS.flip(0)])
    p = logits.softmax(-1)
    expected = torch.zeros(2, dtype=torch.float64)
    for i, j in itertools.product(range(3), repeat=2):
        state = torch.zeros(2, 3, dtype=torch.float64)
        state[0, i] = state[1, j] = 1.0
        expected += p[:, 0, i] * p[:, 1, j] * toy(state)
    measured = categorical_expectation(toy, logits, estimator="exact")
    torch.testing.assert_close(measured, expected, rtol=1e-14, atol=1e-14)
    leaf = LOGITS[None].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o: categorical_expectation(toy, o, estimator="exact"), (leaf,)
    )


def test_enumeration_calls_the_function_once() -> None:
    shapes = []

    def cost(states: Tensor) -> Tensor:
        shapes.append(tuple(states.shape))
        return states[..., 0].sum(-1)

    categorical_expectation(cost, torch.zeros(64, 3, 4), estimator="exact")
    assert shapes == [(64, 64, 3, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "score_function"},
        {"estimator": "score_function", "baseline": torch.tensor(1.3), "samples": 2},
        {"estimator": "score_function", "baseline": "leave_one_out", "samples": 2},
        {"estimator": "score_function", "baseline": "leave_one_out", "samples": 5},
        {"estimator": "rebar", "temperature": 0.5},
        {"estimator": "rebar", "temperature": 0.3, "control_scale": 0.6, "samples": 2},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_unbiased_estimators_are_unbiased(options: dict[str, Any]) -> None:
    # With 40 000 draws a leave-one-out mean that leaves none out would be off by 100 errors.
    estimates = gradients(toy, LOGITS, 40_000, **options)
    assert z_scores(estimates, exact_gradient(toy, LOGITS)).max() < STANDARD_ERRORS


def test_relaxed_estimators_are_biased_and_colder_ones_less() -> None:
    truth = exact_gradient(toy, LOGITS)
    bias, variance = {}, {}
    for estimator in ("gumbel_softmax", "straight_through_gumbel", "gumbel_rao"):
        for tau in (1.0, 0.3):
            estimates = gradients(toy, LOGITS, 20_000, estimator=estimator, temperature=tau)
            bias[estimator, tau] = (estimates.mean(0) - truth).norm().item()
            variance[estimator, tau] = total_variance(estimates)
        assert bias[estimator, 1.0] > 1.3 * bias[estimator, 0.3]
        assert variance[estimator, 1.0] < variance[estimator, 0.3] / 1.5
    score = gradients(toy, LOGITS, 20_000, estimator="score_function")
    assert total_variance(score) > 5 * variance["gumbel_softmax", 1.0]
    assert z_scores(gradients(toy, LOGITS, 20_000, estimator="straight_through"), truth).max() > 10


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_rao_blackwell_keeps_the_mean_and_lowers_the_variance(tau: float) -> None:
    draws = 20_000
    plain = gradients(toy, LOGITS, draws, estimator="straight_through_gumbel", temperature=tau)
    mean = gradients(
        toy, LOGITS, draws, estimator="gumbel_rao", temperature=tau, generator=seeded(1)
    )
    error = ((plain.var(0) + mean.var(0)) / draws).sqrt()
    assert ((plain.mean(0) - mean.mean(0)) / error).abs().max() < STANDARD_ERRORS
    assert total_variance(mean) < 0.9 * total_variance(plain)


@pytest.mark.parametrize("estimator", ["gumbel_softmax", "straight_through_gumbel", "gumbel_rao"])
@pytest.mark.parametrize(
    ("a", "tau", "slope"),
    [(0.8, 0.5, 0.19270925089), (0.8, 1.0, 0.15639452081), (-1.5, 0.25, 0.15004465645)],
)
def test_expected_derivative_of_two_categories(
    estimator: str, a: float, tau: float, slope: float
) -> None:
    logits = torch.tensor([[a, 0.0]], dtype=torch.float64)
    estimates = gradients(
        lambda z: z[..., 0].sum(-1), logits, 50_000, estimator=estimator, temperature=tau
    )
    assert z_scores(estimates, torch.tensor([[slope, -slope]])).max() < STANDARD_ERRORS


@pytest.mark.parametrize(("a", "slope"), [(0.8, 0.21390969650), (-1.5, 0.14914645207)])
def test_exact_derivative_of_two_categories(a: float, slope: float) -> None:
    logits = torch.tensor([[a, 0.0]], dtype=torch.float64)
    gradient = exact_gradient(lambda z: z[..., 0].sum(-1), logits)
    assert gradient[0, 0].item() == pytest.approx(slope, abs=6e-11)


def by_outcome(estimator: str, cost: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Mean over the outcomes of one variable, weighted with their probabilities."""
    batch = logits.expand(300, 1, -1).clone().requires_grad_()
    value = categorical_expectation(cost, batch, estimator=estimator, generator=seeded())
    (slopes,) = torch.autograd.grad(value.sum(), batch)
    mean = torch.zeros_like(logits)
    for k, p in enumerate(logits.softmax(-1)):
        state = torch.nn.functional.one_hot(torch.tensor([k]), len(logits)).to(logits)
        drawn = slopes[value == cost(state), 0]
        assert len(drawn) > 0
        torch.testing.assert_close(drawn, drawn[:1].expand_as(drawn))  # a function of the outcome
        mean += p * drawn[0]
    return mean


def test_reinmax_is_exact_for_quadratic_costs_and_straight_through_for_linear_ones() -> None:
    logits = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64)
    matrix = torch.randn(3, 3, generator=seeded(), dtype=torch.float64)
    linear = lambda z: (z @ matrix[0]).sum(-1)  # noqa: E731
    quadratic = lambda z: ((z @ matrix) * z).sum((-2, -1)) + linear(z)  # noqa: E731
    for estimator, cost in (
        ("reinmax", linear),
        ("reinmax", quadratic),
        ("straight_through", linear),
    ):
        truth = exact_gradient(cost, logits[None])[0]
        measured = by_outcome(estimator, cost, logits)
        torch.testing.assert_close(measured, truth, rtol=0.0, atol=1e-12)
    off = by_outcome("straight_through", quadratic, logits) - exact_gradient(
        quadratic, logits[None]
    )
    assert off.abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["exact", *SAMPLED])
def test_parameters_of_the_cost_get_its_own_gradient(estimator: str) -> None:
    # A cost that is linear in its parameters equals parameters times gradient, draw by draw; any
    # control variate that leaked into the parameters would break this.
    weight = torch.randn(6, generator=seeded(), dtype=torch.float64).requires_grad_()

    def cost(states: Tensor) -> Tensor:
        return (states.flatten(-2) + states.flatten(-2).square().sum(-1, keepdim=True)) @ weight

    logits = LOGITS.expand(5, 2, 3).clone().requires_grad_()
    value = categorical_expectation(
        cost, logits, estimator=estimator, samples=3, generator=seeded()
    ).sum()
    (gradient,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close((gradient * weight).sum(), value)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_the_value_is_the_mean_cost_of_states(estimator: str) -> None:
    states = categorical_expectation(
        lambda z: z[..., 0, :] @ torch.arange(3.0) + 10 * (z[..., 1, :] @ torch.arange(3.0)),
        torch.zeros(200, 2, 3),
        estimator=estimator,
        generator=seeded(),
    )
    whole = torch.equal(states, states.round())
    assert whole == (estimator != "gumbel_softmax")
    assert states.mean().item() == pytest.approx(11.0, abs=5 * 8.3 / math.sqrt(200))


@pytest.mark.parametrize("estimator", ["exact", *SAMPLED])
def test_masked_categories_are_never_drawn_and_gradients_stay_finite(estimator: str) -> None:
    logits = torch.tensor([[[0.3, MASKED, -0.2, MASKED], [MASKED, MASKED, 1.0, MASKED]]])
    batch = logits.expand(100, 2, 4).clone().requires_grad_()
    seen = []

    def cost(states: Tensor) -> Tensor:
        seen.append(states.detach())
        return (states * torch.arange(8.0).reshape(2, 4)).sum((-2, -1)).square()

    value = categorical_expectation(cost, batch, estimator=estimator, generator=seeded())
    value.sum().backward()
    assert bool(value.isfinite().all())
    assert batch.grad is not None
    assert bool(batch.grad.isfinite().all())
    assert not batch.grad[logits.expand_as(batch).isneginf()].any()
    if estimator != "exact":
        assert not any(s[..., 0, [1, 3]].any() for s in seen)


@pytest.mark.parametrize("estimator", ["exact", *SAMPLED])
def test_half_precision_logits_are_estimated_in_single_precision(estimator: str) -> None:
    logits = LOGITS.to(torch.bfloat16).expand(400, 2, 3).clone().requires_grad_()
    kinds = set()

    def cost(states: Tensor) -> Tensor:
        kinds.add(states.dtype)
        return toy(states.double()).float()

    value = categorical_expectation(cost, logits, estimator=estimator, generator=seeded())
    value.mean().backward()
    assert kinds == {torch.bfloat16}
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_without_control_rebar_is_the_score_function() -> None:
    plain = gradients(toy, LOGITS, 50, estimator="score_function")
    rebar = gradients(toy, LOGITS, 50, estimator="rebar", control_scale=0.0)
    torch.testing.assert_close(rebar, plain)


def test_relax_with_the_relaxed_cost_as_control_is_rebar() -> None:
    tau = 0.5
    batch = LOGITS.expand(50, 2, 3)
    estimate = relax_gradient(
        toy, batch, control_variate=lambda z: toy((z / tau).softmax(-1)), generator=seeded()
    )
    rebar = gradients(toy, LOGITS, 50, estimator="rebar", temperature=tau)
    torch.testing.assert_close(estimate.gradient, rebar)
    value = categorical_expectation(toy, batch, generator=seeded())
    torch.testing.assert_close(estimate.value, value)


def test_relax_without_control_is_the_score_function() -> None:
    batch = LOGITS.expand(50, 2, 3)
    estimate = relax_gradient(
        toy, batch, control_variate=lambda z: torch.zeros(len(z)).double(), generator=seeded()
    )
    plain = gradients(toy, LOGITS, 50, estimator="score_function")
    torch.testing.assert_close(estimate.gradient, plain)


def test_relax_is_unbiased_for_any_control_and_a_trained_one_has_less_variance() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    ).double()
    control = lambda z: network(z.flatten(-2)).squeeze(-1)  # noqa: E731
    truth, generator = exact_gradient(toy, LOGITS), seeded()
    step_cost = lambda b: toy(b.round())  # noqa: E731 - RELAX needs no derivative of the cost

    def draw(draws: int) -> Tensor:
        batch = LOGITS.expand(draws, 2, 3)
        return relax_gradient(
            step_cost, batch, control_variate=control, generator=generator
        ).gradient

    before = draw(20_000).detach()
    assert z_scores(before, truth).max() < STANDARD_ERRORS
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        draw(200).square().sum((-2, -1)).mean().backward()
        optimizer.step()
    after = draw(20_000).detach()
    assert z_scores(after, truth).max() < STANDARD_ERRORS
    assert total_variance(after) < 0.7 * total_variance(before)


def test_relax_has_no_graph_to_the_logits() -> None:
    leaf = LOGITS[None].clone().requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    estimate = relax_gradient(
        toy, leaf, control_variate=lambda z: scale * z.sum((-2, -1)), generator=seeded()
    )
    (slope, through) = torch.autograd.grad(
        estimate.gradient.square().sum(), [scale, leaf], allow_unused=True
    )
    assert bool(slope.isfinite())
    assert through is None


def test_moments_are_those_of_the_drawn_gradients() -> None:
    parameter = torch.randn(2, 3, generator=seeded()).requires_grad_()
    drawn, source = [], seeded(1)

    def estimate() -> Tensor:
        weight = 1e4 + torch.rand(2, 3, generator=source)
        drawn.append(weight.double())
        return (weight * parameter).sum(-1)

    moments = gradient_moments(estimate, parameter, repeats=50)
    sample = torch.stack(drawn)
    torch.testing.assert_close(moments.mean, sample.mean(0), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(moments.variance, sample.var(0), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(moments.standard_error, (moments.variance / 50).sqrt())
    assert moments.repeats == 50
    assert parameter.grad is None


def test_moments_agree_with_enumeration() -> None:
    leaf, generator = LOGITS[None].clone().requires_grad_(), seeded()
    truth = exact_gradient(toy, LOGITS)[None]
    moments = gradient_moments(
        lambda: categorical_expectation(
            toy, leaf, samples=2, baseline="leave_one_out", generator=generator
        ),
        leaf,
        repeats=600,
    )
    assert ((moments.mean - truth) / moments.standard_error).abs().max() < STANDARD_ERRORS


def test_conditional_draws_of_rebar_depend_on_the_logits() -> None:
    # E over the index of E[c(z given b)] is E[c(z)]: its derivative is found only if both the
    # probabilities and the conditional noise move.
    draws = 40_000
    index = torch.arange(3).repeat(draws, 1)
    logits = LOGITS[0].expand(draws, 3, 3).clone().requires_grad_()
    control = conditional_gumbel(logits, index, generator=seeded()).softmax(-1)[..., 0]
    p = logits.softmax(-1)[:, 0]
    (slopes,) = torch.autograd.grad((p * control).sum(), logits)
    free = LOGITS[0].expand(draws, 1, 3)
    direct = gradients(
        lambda z: z[..., 0].sum(-1), free[0], draws, estimator="gumbel_softmax", generator=seeded(7)
    )
    both = slopes.sum(1)
    error = ((both.var(0) + direct[:, 0].var(0)) / draws).sqrt()
    assert ((both.mean(0) - direct[:, 0].mean(0)) / error).abs().max() < STANDARD_ERRORS


@pytest.mark.bad_input
def test_choices_are_listed() -> None:
    logits = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="estimator must be one of exact, score_function"):
        categorical_expectation(toy, logits, estimator="reinforce")
    for bad in ("mean", None, 3.0):
        with pytest.raises(ValueError, match="baseline must be"):
            categorical_expectation(toy, logits, baseline=bad)
    with pytest.raises(ValueError, match="only estimator 'score_function'"):
        categorical_expectation(toy, logits, estimator="rebar", samples=2, baseline="leave_one_out")


@pytest.mark.bad_input
def test_sizes_are_checked() -> None:
    cost = lambda z: z[..., 0].sum(-1)  # noqa: E731
    logits = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="samples >= 2, got 1"):
        categorical_expectation(cost, logits, baseline="leave_one_out")
    with pytest.raises(ValueError, match=r"baseline must broadcast to .* \(2, 4\)"):
        categorical_expectation(cost, logits, samples=2, baseline=torch.zeros(3))
    with pytest.raises(ValueError, match="control_scale must broadcast"):
        categorical_expectation(cost, logits, estimator="rebar", control_scale=torch.zeros(3))
    with pytest.raises(ValueError, match="81 states, more than max_states = 80"):
        categorical_expectation(cost, torch.zeros(1, 4, 3), estimator="exact", max_states=80)
    for name in ("samples", "conditional_samples", "max_states"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
            categorical_expectation(cost, logits, **{name: 0})
    for bad in (torch.zeros(2, 3), torch.zeros(1, 4, 2, 3)):
        with pytest.raises(ValueError, match=r"\(batch, variables, categories\)"):
            categorical_expectation(cost, bad)
        with pytest.raises(ValueError, match=r"\(batch, variables, categories\)"):
            relax_gradient(cost, bad, control_variate=cost)
    with pytest.raises(ValueError, match="temperature"):
        categorical_expectation(cost, logits, temperature=0.0)


@pytest.mark.bad_input
@pytest.mark.parametrize("estimator", ["exact", *SAMPLED])
def test_logits_and_costs_are_checked(estimator: str) -> None:
    cost = lambda z: z[..., 0].sum(-1)  # noqa: E731
    good = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="nan"):
        categorical_expectation(cost, good + math.nan, estimator=estimator)
    with pytest.raises(ValueError, match="finite"):
        categorical_expectation(cost, good - math.inf, estimator=estimator)
    with pytest.raises(TypeError, match="floating-point"):
        categorical_expectation(cost, good.long(), estimator=estimator)
    with pytest.raises(ValueError, match=r"function must return costs of shape \(\d, 4\)"):
        categorical_expectation(lambda z: z.sum(-1), good, estimator=estimator)
    with pytest.raises(TypeError, match="function must return"):
        categorical_expectation(lambda z: z.sum().item(), good, estimator=estimator)


@pytest.mark.bad_input
def test_moments_are_checked() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        gradient_moments(lambda: leaf.sum(), leaf, repeats=1)
    with pytest.raises(ValueError, match="require grad"):
        gradient_moments(lambda: leaf.sum(), torch.zeros(2), repeats=3)
    for estimate in (lambda: torch.zeros(()), lambda: torch.ones(2, requires_grad=True)):
        with pytest.raises(ValueError, match="depends on the parameter"):
            gradient_moments(estimate, leaf, repeats=3)
    with pytest.raises(TypeError, match="floating-point"):
        gradient_moments(lambda: 1.0, leaf, repeats=3)


def test_relax_has_its_pathwise_term_in_inference_mode() -> None:
    def estimate() -> Tensor:
        return relax_gradient(
            lambda b: b[..., 0].sum(-1), LOGITS.expand(4, 2, 3),
            control_variate=lambda z: z.softmax(-1)[..., 0].sum(-1),
            generator=torch.Generator().manual_seed(0),
        ).gradient  # fmt: skip

    expected = estimate()
    with torch.inference_mode():
        assert torch.equal(estimate(), expected)
