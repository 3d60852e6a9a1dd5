"""Noise, gradient penalty, adversarial and virtual adversarial perturbations against oracles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from kexue.training.regularization import (
    VirtualAdversarialLoss,
    adversarial_perturbation,
    consistency_loss,
    gradient_penalty,
    laplacian,
    noisy_loss,
    virtual_adversarial_perturbation,
)

F64 = torch.float64
METRICS = ("euclidean", "categorical", "bernoulli")
# The oracles are given to twelve decimals.
DIGITS = {"rtol": 0.0, "atol": 2e-12}

X = torch.tensor([[0.3, -0.7, 1.1]], dtype=F64)
W = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.25, 3.0]], dtype=F64)
W3 = torch.cat([W, torch.tensor([[-1.0, 0.75, 0.2]], dtype=F64)])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ weight.T


def network(inputs: int = 3, outputs: int = 4, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.7)
    return layers.to(dtype)


def curvature(outputs: Tensor, metric: str) -> Tensor:
    """Second derivative of the divergence in its first argument, written out per sample."""
    if metric == "euclidean":
        return 2 * torch.eye(outputs.shape[1], dtype=F64).expand(len(outputs), -1, -1)
    if metric == "categorical":
        p = outputs.softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    p = outputs.sigmoid()
    return torch.diag_embed(p * (1 - p))


def gauss_newton(function: Callable[[Tensor], Tensor], x: Tensor, metric: str) -> Tensor:
    jacobian = vmap(jacrev(lambda one: function(one[None])[0].reshape(-1)))(x).flatten(2)
    outer = curvature(function(x).flatten(1), metric)
    return jacobian.mT @ outer @ jacobian


def gaussian_grid(dimension: int, points: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes (points^dimension, dimension) and weights of a standard normal expectation."""
    node, weight = np.polynomial.hermite_e.hermegauss(points)
    nodes = torch.tensor(list(product(node, repeat=dimension)), dtype=F64)
    weights = torch.tensor([math.prod(w) for w in product(weight, repeat=dimension)], dtype=F64)
    return nodes, weights / weights.sum()


# The penalty G.


@pytest.mark.parametrize(
    ("metric", "weight", "expected"),
    [
        ("euclidean", W, 15.3125),
        ("bernoulli", W, 0.387127622994),
        ("categorical", W, 0.031280814273),
        ("categorical", W3, 0.108478170648),
    ],
)
def test_penalty_of_linear_functions(metric: Any, weight: Tensor, expected: float) -> None:
    assert gradient_penalty(linear(weight), X, metric=metric).item() == pytest.approx(
        expected, abs=DIGITS["atol"]
    )


@pytest.mark.parametrize("metric", METRICS)
def test_penalty_is_half_the_trace_of_the_gauss_newton_matrix(metric: Any) -> None:
    net, x = network(), torch.randn(5, 3, dtype=F64, generator=source())
    expected = gauss_newton(net, x, metric).diagonal(dim1=1, dim2=2).sum(1) / 2
    measured = gradient_penalty(net, x, metric=metric, reduction="none")
    torch.testing.assert_close(measured, expected, rtol=1e-12, atol=0)
    for reduction, total in (("mean", expected.mean()), ("sum", expected.sum())):
        measured = gradient_penalty(net, x, metric=metric, reduction=reduction)
        torch.testing.assert_close(measured, total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "bernoulli"])
def test_further_output_dimensions_are_flattened(metric: Any) -> None:
    net, x = network(), torch.randn(5, 3, dtype=F64, generator=source())
    flat = gradient_penalty(net, x, metric=metric)
    square = gradient_penalty(lambda v: net(v).unflatten(1, (2, 2)), x, metric=metric)
    assert square.item() == flat.item()


def test_penalty_of_images_is_that_of_their_pixels() -> None:
    net, x = network(12), torch.randn(4, 3, 2, 2, dtype=F64, generator=source())
    images = x.contiguous(memory_format=torch.channels_last)
    measured = gradient_penalty(lambda v: net(v.flatten(1)), images)
    torch.testing.assert_close(measured, gradient_penalty(net, x.flatten(1)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_rademacher_averaged_over_all_signs_is_exact_in_value_and_parameter_gradient(
    metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three outputs, eight equally likely vectors of signs: the mean over them is the expectation.
    net, x = network(outputs=3), torch.randn(2, 3, dtype=F64, generator=source())
    every = iter([torch.tensor(s, dtype=F64).expand(2, 3) for s in product((1.0, -1.0), repeat=3)])
    monkeypatch.setattr(
        "kexue.training.regularization.expansion.signs", lambda like, generator: next(every)
    )
    estimate = gradient_penalty(net, x, metric=metric, estimator="rademacher", probes=8)
    exact = gradient_penalty(net, x, metric=metric)
    torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=0)
    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(estimate, parameters, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(exact, parameters, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
def test_rademacher_with_one_output_is_exact(metric: Any) -> None:
    net, x = network(outputs=1), torch.randn(5, 3, dtype=F64, generator=source())
    exact = gradient_penalty(net, x, metric=metric, reduction="none")
    for function in (net, lambda v: net(v)[:, 0]):
        estimate = gradient_penalty(
            function, x, metric=metric, estimator="rademacher", generator=source(), reduction="none"
        )
        torch.testing.assert_close(estimate, exact, rtol=1e-13, atol=1e-30)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ["exact", "rademacher"])
def test_penalty_passes_first_and_second_gradient_checks(metric: Any, estimator: Any) -> None:
    net, x = network(), torch.randn(2, 3, dtype=F64, generator=source())
    names = [name for name, _ in net.named_parameters()]

    def penalty(x: Tensor, *parameters: Tensor) -> Tensor:
        held = dict(zip(names, parameters, strict=True))
        return gradient_penalty(
            lambda v: functional_call(net, held, (v,)),
            x,
            metric=metric,
            estimator=estimator,
            generator=source(1),
            reduction="none",
        )

    at = (x.requires_grad_(), *(p.detach().requires_grad_() for p in net.parameters()))
    assert torch.autograd.gradcheck(penalty, at)
    assert torch.autograd.gradgradcheck(penalty, at, fast_mode=True)


def test_impossible_and_saturated_classes_give_finite_values_and_gradients() -> None:
    weight = W3.clone().requires_grad_()

    def function(x: Tensor) -> Tensor:
        logits = 400 * x @ weight.T
        return torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1)

    for estimator in ("exact", "rademacher"):
        penalty = gradient_penalty(function, X, metric="categorical", estimator=estimator)
        loss = penalty + consistency_loss(function, X, torch.full_like(X, 0.01))
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    bernoulli = gradient_penalty(lambda x: 1000 * x @ weight.T, X, metric="bernoulli")
    assert torch.isfinite(torch.autograd.grad(bernoulli, weight)[0]).all()


# The expansion.


@pytest.mark.parametrize("metric", METRICS)
def test_ratio_of_noise_to_penalty_approaches_one_quadratically(metric: Any) -> None:
    net, x = network(inputs=2), tensor(0.8, 0.4)[None]
    nodes, weights = gaussian_grid(2)
    penalty = gradient_penalty(net, x, metric=metric).item()

    def excess(s: float) -> float:
        losses = consistency_loss(
            net, x.expand(len(nodes), -1), s * nodes, metric=metric, reduction="none"
        )
        return (weights @ losses).item() / (s**2 * penalty) - 1

    # With a fourth-order term of its own the ratio of excesses is 4 (1 + O(s²)).
    assert excess(0.02) / excess(0.01) == pytest.approx(4, abs=0.05)
    assert abs(excess(0.01)) < 0.001


def test_linear_function_fulfils_the_euclidean_expansion_exactly() -> None:
    nodes, weights = gaussian_grid(3, 5)
    losses = consistency_loss(
        linear(W), X.expand(len(nodes), -1), 0.7 * nodes, metric="euclidean", reduction="none"
    )
    assert (weights @ losses).item() == pytest.approx(0.49 * 15.3125, rel=1e-12)


def logistic(x: Tensor) -> Tensor:
    return nn.functional.softplus(-(x @ tensor(1.0, -2.0, 0.5)))


X0 = tensor(0.2, 0.1, -0.4)[None]


def test_noise_on_the_logistic_loss() -> None:
    assert logistic(X0).item() == pytest.approx(0.798138869382, abs=DIGITS["atol"])
    trace = laplacian(logistic, X0).item()
    assert trace == pytest.approx(1.299462006737, abs=DIGITS["atol"])
    for s, predicted, exact in (
        (0.1, 0.804636179415, 0.804595485175),
        (0.5, 0.960571620224, 0.941568344295),
    ):
        assert logistic(X0).item() + s**2 / 2 * trace == pytest.approx(predicted, abs=2e-12)
        drawn = noisy_loss(
            logistic,
            X0.expand(40_000, -1),
            standard_deviation=s,
            samples=2,
            antithetic=True,
            generator=source(),
            reduction="none",
        )
        nodes, weights = gaussian_grid(1, 80)
        along = s * math.sqrt(5.25) * nodes[:, 0]
        quadrature = weights @ nn.functional.softplus(-(X0 @ tensor(1.0, -2.0, 0.5)) + along)
        assert quadrature.item() == pytest.approx(exact, abs=2e-12)
        error = drawn.std().item() / math.sqrt(drawn.numel())
        assert drawn.mean().item() == pytest.approx(exact, abs=5 * error)


def test_quadratic_loss_makes_the_noise_expansion_exact_and_pairs_cancel_odd_orders() -> None:
    def loss(x: Tensor) -> Tensor:
        return 3 * x[:, 0] - x[:, 1] + 0.5 * (x @ tensor(1.0, 2.0, 2.0)) ** 2

    assert laplacian(loss, X).item() == pytest.approx(9.0, rel=1e-14)
    drawn = noisy_loss(
        loss,
        X.expand(20_000, -1),
        standard_deviation=0.3,
        samples=2,
        antithetic=True,
        generator=source(),
        reduction="none",
    )
    # In each pair only (w·ε)²/2 is left: s²|w|²/2 times a chi-squared variable.
    excess = (drawn - loss(X)) / (0.09 * 9 / 2)
    assert (excess >= -1e-12).all()
    assert excess.mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 20_000))


def test_noise_of_standard_deviation_zero_changes_nothing() -> None:
    x = torch.randn(4, 3, dtype=F64, generator=source())
    measured = noisy_loss(logistic, x, standard_deviation=0.0, samples=3, reduction="sum")
    torch.testing.assert_close(measured, logistic(x).sum(), rtol=1e-15, atol=0)


def test_noise_on_a_squared_error_of_a_parabola() -> None:
    t, x, y, s = 0.8, 0.9, 0.3, 0.4
    nodes, weights = gaussian_grid(1)
    exact = (t * x**2 - y) ** 2 + 6 * s**2 * t**2 * x**2 - 2 * s**2 * t * y + 3 * s**4 * t**2
    mean = weights @ (t * (x + s * nodes[:, 0]) ** 2 - y) ** 2
    assert mean.item() == pytest.approx(exact, rel=1e-12)
    second_order = (t * x**2 - y) ** 2 + s**2 / 2 * laplacian(
        lambda v: (t * v[:, 0] ** 2 - y) ** 2, tensor(x)[:, None]
    ).item()
    assert exact - second_order == pytest.approx(3 * s**4 * t**2, rel=1e-12)


@pytest.mark.parametrize(
    ("detach", "factor"), [(False, 4), (True, 5)], ids=["attached", "detached"]
)
def test_detaching_the_target_changes_the_parameter_gradient(detach: bool, factor: int) -> None:
    x, s = 0.9, 0.1
    t = torch.tensor(0.8, dtype=F64, requires_grad=True)
    nodes, weights = gaussian_grid(1, 8)
    inputs = torch.full_like(nodes, x)
    losses = consistency_loss(
        lambda v: t * v**2,
        inputs,
        s * nodes,
        metric="euclidean",
        detach_target=detach,
        reduction="none",
    )
    (gradient,) = torch.autograd.grad(weights @ losses, t)
    exact = 2 * t.item() * s**2 * (factor * x**2 + 3 * s**2)
    assert gradient.item() == pytest.approx(exact, rel=1e-12)


# The Laplacian.


def waves(x: Tensor) -> Tensor:
    return x[:, 0].sin() * x[:, 1].exp() * x[:, 2] ** 2


def test_laplacian_of_a_product() -> None:
    assert laplacian(waves, X).item() == pytest.approx(0.293501983203, abs=DIGITS["atol"])
    expected = 2 * math.sin(0.3) * math.exp(-0.7)
    assert laplacian(waves, X).item() == pytest.approx(expected, rel=1e-14)


def test_hutchinson_is_exact_for_a_diagonal_hessian_and_unbiased_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(4, 3, dtype=F64, generator=source())
    one_probe = partial(laplacian, estimator="hutchinson", generator=source())
    torch.testing.assert_close(
        one_probe(lambda v: (v**4).sum(1), x), 12 * (x**2).sum(1), rtol=1e-13, atol=0
    )
    every = iter([torch.tensor(s, dtype=F64).expand(4, 3) for s in product((1.0, -1.0), repeat=3)])
    monkeypatch.setattr(
        "kexue.training.regularization.expansion.signs", lambda like, generator: next(every)
    )
    torch.testing.assert_close(
        laplacian(waves, x, estimator="hutchinson", probes=8),
        laplacian(waves, x),
        rtol=1e-12,
        atol=1e-14,
    )


def test_laplacian_of_channels_last_images_and_of_linear_losses() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=F64, generator=source())
    images = x.contiguous(memory_format=torch.channels_last)
    expected = 6 * x.flatten(1).sum(1)
    for given_images in (x, images):
        trace = laplacian(lambda v: (v**3).flatten(1).sum(1), given_images)
        torch.testing.assert_close(trace, expected, rtol=1e-12, atol=1e-12)
    assert laplacian(lambda v: v.flatten(1).sum(1), x).tolist() == [0.0, 0.0]


def test_laplacian_can_be_differentiated_on_demand() -> None:
    x = torch.randn(2, 3, dtype=F64, generator=source()).requires_grad_()
    assert not laplacian(waves, x).requires_grad
    for estimator in ("exact", "hutchinson"):

        def trace(v: Tensor, estimator: Any = estimator) -> Tensor:
            return laplacian(waves, v, estimator=estimator, create_graph=True, generator=source())

        assert torch.autograd.gradcheck(trace, (x,))


# Adversarial perturbations.


def test_one_step_on_the_logistic_loss() -> None:
    r = adversarial_perturbation(logistic, X0, epsilon=0.1)
    expected = tensor(-0.043643578047, 0.087287156094, -0.021821789024)[None]
    torch.testing.assert_close(r, expected, **DIGITS)
    assert logistic(X0 + r).item() == pytest.approx(0.930556026827, abs=DIGITS["atol"])
    r = adversarial_perturbation(logistic, X0, epsilon=0.1, norm="linf")
    assert r.tolist() == [[-0.1, 0.1, -0.1]]
    assert logistic(X0 + r).item() == pytest.approx(1.005492481463, abs=DIGITS["atol"])


def test_first_order_gain_is_the_norm_of_the_gradient() -> None:
    penalty = gradient_penalty(lambda x: logistic(x)[:, None], X0).item()
    assert penalty == pytest.approx(1.587166479153, abs=DIGITS["atol"])
    small = 1e-6
    slope = {"l2": math.sqrt(penalty), "linf": 3.5 * math.sqrt(penalty / 5.25)}
    for norm, expected in slope.items():
        r = adversarial_perturbation(logistic, X0, epsilon=small, norm=norm)
        gain = (logistic(X0 + r) - logistic(X0)).item() / small
        # The next order is ε times half the curvature, below ε; rounding is 1e-16 / ε.
        assert gain == pytest.approx(expected, abs=2e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    norm=st.sampled_from(["l2", "linf"]),
    steps=st.integers(1, 5),
    epsilon=st.just(0.0) | st.floats(1e-200, 3.0),
    random_start=st.booleans(),
)
def test_projected_ascent_stays_in_the_ball_and_behind_the_mask(
    seed: int, norm: Any, steps: int, epsilon: float, random_start: bool
) -> None:
    x = torch.randn(4, 3, 2, dtype=F64, generator=source(seed))
    mask = torch.rand(4, 3, 1, generator=source(seed)) < 0.6
    r = adversarial_perturbation(
        lambda v: v.flatten(1).sin().sum(1),
        x,
        epsilon=epsilon,
        norm=norm,
        steps=steps,
        random_start=random_start,
        mask=mask,
        generator=source(seed),
    )
    # In units of the radius: the square of a tiny one underflows.
    relative = r.flatten(1) / (epsilon or 1.0)
    size = torch.linalg.vector_norm(relative, 2 if norm == "l2" else math.inf, dim=1)
    assert (size <= (1 + 1e-14 if epsilon else 0)).all()
    assert (r.masked_select(~mask) == 0).all()
    assert not r.requires_grad


def test_projected_ascent_finds_the_maximum_of_a_concave_loss_in_the_ball() -> None:
    # -|x + r - c|² with c outside of the ball around x: the best r points to c. A step
    # of 0.5 divides the angle to it by 1.7: (4 - 0.5)/4 along the sphere, 1 + 0.5 across.
    x, c = torch.zeros(1, 2, dtype=F64), tensor(3.0, 4.0)
    r = adversarial_perturbation(
        lambda v: -(v - c).square().sum(1), x, epsilon=1.0, steps=60, step_size=0.5,
        random_start=True, generator=source(),
    )  # fmt: skip
    torch.testing.assert_close(r, tensor(0.6, 0.8)[None], rtol=0, atol=1e-6)
    # With a small step the radius is not reached: 3 steps of 0.1 along a constant gradient.
    r = adversarial_perturbation(lambda v: v @ c, x, epsilon=1.0, steps=3, step_size=0.1)
    torch.testing.assert_close(r, 0.3 * tensor(0.6, 0.8)[None], rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_start_is_uniform_in_the_ball(norm: Any) -> None:
    n, d = 20_000, 3
    r = adversarial_perturbation(
        lambda v: 0 * v.sum(1),
        torch.zeros(n, d + 1, dtype=F64),
        epsilon=2.0,
        norm=norm,
        random_start=True,
        mask=torch.tensor([True, True, True, False]),
        generator=source(),
    )
    size = torch.linalg.vector_norm(r, 2 if norm == "l2" else math.inf, dim=1) / 2
    # The share of the volume within a radius is uniform on [0, 1]: mean 1/2, variance 1/12.
    share = size**d
    assert share.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / n))
    assert share.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / n))
    assert (r[:, 3] == 0).all()
    assert r[:, :3].mean(0).abs().max() < 5 * 2 / math.sqrt(n)


def test_radius_below_the_range_of_the_dtype_gives_zero_and_not_nan() -> None:
    x = torch.randn(3, 2, generator=source())
    for norm in ("l2", "linf"):
        r = adversarial_perturbation(lambda v: v.sum(1), x, epsilon=1e-60, norm=norm, steps=2)
        assert (r == 0).all()


def test_zero_gradient_gives_zero_perturbation() -> None:
    x = torch.randn(3, 2, generator=source())
    for norm in ("l2", "linf"):
        r = adversarial_perturbation(lambda v: (0 * v).sum(1), x, epsilon=1.0, norm=norm)
        assert (r == 0).all()


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 1e-30, 1e-6), (torch.float16, 1e-6, 0.03), (torch.bfloat16, 1e-30, 0.01)],
)
def test_tiny_gradients_give_unit_vectors(
    dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    # In float16 a gradient of 1e-6 is a multiple of 6e-8, known to 3 %; bfloat16 has 8 bits.
    slope = torch.tensor([3.0, -4.0]) * scale
    r = adversarial_perturbation(
        lambda v: v.float() @ slope, torch.zeros(1, 2, dtype=dtype), epsilon=1.0
    )
    assert r.dtype == dtype
    torch.testing.assert_close(r.float(), torch.tensor([[0.6, -0.8]]), rtol=0, atol=tolerance)


# Virtual adversarial perturbations.

EIGENVECTOR = tensor(0.314008708404, -0.362006821379, 0.877695614847)
ONES = torch.ones_like(X)


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (1, (0.403909041134, -0.322699769988, 0.855992023876)),
        (2, (0.320914417823, -0.359163622452, 0.876364894745)),
        (5, (0.314011649426, -0.362005616519, 0.877695059593)),
        (40, tuple(EIGENVECTOR.tolist())),
    ],
)
def test_power_iteration_step_by_step(iterations: int, expected: tuple[float, ...]) -> None:
    r = virtual_adversarial_perturbation(
        linear(W3), X, epsilon=2.0, iterations=iterations, initial=ONES
    )
    sign = 1.0 if (r @ tensor(*expected)).item() > 0 else -1.0
    torch.testing.assert_close(r / 2, sign * tensor(*expected)[None], **DIGITS)


def test_eigenvalues_of_the_curvature_of_three_classes() -> None:
    p = linear(W3)(X).softmax(1)
    torch.testing.assert_close(
        p, tensor(0.002902004007, 0.982795965277, 0.014302030716)[None], **DIGITS
    )
    values, vectors = torch.linalg.eigh(gauss_newton(linear(W3), X, "categorical")[0])
    expected = tensor(0.0, 0.015174640296, 0.201781701001)
    torch.testing.assert_close(values, expected, **DIGITS)
    torch.testing.assert_close(vectors[:, 2].abs(), EIGENVECTOR.abs(), **DIGITS)
    penalty = gradient_penalty(linear(W3), X, metric="categorical").item()
    assert values.sum().item() == pytest.approx(2 * penalty, abs=DIGITS["atol"])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hessian", ["exact", "finite_difference"])
def test_direction_is_the_principal_eigenvector(metric: Any, hessian: Any) -> None:
    net, x = network(), torch.randn(6, 3, dtype=F64, generator=source())
    r = virtual_adversarial_perturbation(
        net, x, epsilon=1.0, iterations=300, metric=metric, hessian=hessian, xi=1e-6,
        generator=source(),
    )  # fmt: skip
    principal = torch.linalg.eigh(gauss_newton(net, x, metric))[1][:, :, -1]
    cosine = (r * principal).sum(1).abs()
    # Exact up to the iteration's convergence; the difference is off by about ξ.
    torch.testing.assert_close(
        cosine, torch.ones_like(cosine), rtol=0, atol=1e-9 if hessian == "exact" else 1e-8
    )


def test_two_signs_of_the_eigenvector_differ_and_the_larger_is_chosen() -> None:
    vector = torch.linalg.eigh(gauss_newton(linear(W), X, "categorical")[0])[1][:, -1]
    u = (vector * vector[0].sign())[None]
    torch.testing.assert_close(u, tensor(0.1083, 0.4874, -0.8664)[None], rtol=0, atol=5e-5)
    losses = [consistency_loss(linear(W), X, s * u).item() for s in (0.5, -0.5)]
    assert losses == pytest.approx([0.019519811905, 0.004140921206], abs=DIGITS["atol"])
    quadratic = 0.125 * (u @ gauss_newton(linear(W), X, "categorical")[0] @ u.T).item()
    assert quadratic == pytest.approx(0.007820203568, abs=DIGITS["atol"])
    for start in (u, -u):
        for iterations in (0, 1):
            r = virtual_adversarial_perturbation(
                linear(W), X, epsilon=0.5, iterations=iterations, choose_sign=True, initial=start
            )
            torch.testing.assert_close(r, 0.5 * u, rtol=1e-12, atol=1e-14)


def test_finite_difference_direction_in_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 100)
    )
    x, u = torch.randn(32, 256, generator=source()), torch.randn(32, 256, generator=source(1))
    exact = virtual_adversarial_perturbation(
        net.double(), x.double(), epsilon=1.0, initial=u.double()
    )
    net.float()

    def cosine(**options: Any) -> float:
        r = virtual_adversarial_perturbation(net, x, epsilon=1.0, initial=u, **options)
        return (r.double() * exact).sum(1).mean().item()

    # Rounding of about 1e-7 / ξ against a curvature error of order ξ².
    assert cosine() > 1 - 1e-6
    assert cosine(hessian="finite_difference") > 0.99999
    assert cosine(hessian="finite_difference", xi=1e-6) < 0.5
    assert cosine(hessian="finite_difference", xi=10.0) < 0.97


def test_no_iterations_return_the_start_normalised() -> None:
    start = 7 * torch.randn(4, 2, 3, generator=source())
    r = virtual_adversarial_perturbation(
        lambda v: v.flatten(1), torch.zeros(4, 2, 3), epsilon=0.5, iterations=0, initial=start
    )
    expected = 0.5 * start / start.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(r, expected, rtol=1e-6, atol=0)


def test_flat_function_keeps_the_direction() -> None:
    start = torch.randn(3, 2, dtype=F64, generator=source())
    for hessian in ("exact", "finite_difference"):
        r = virtual_adversarial_perturbation(
            lambda v: 0 * v, torch.zeros_like(start), epsilon=1.0, hessian=hessian, initial=start
        )
        torch.testing.assert_close(r, start / start.norm(dim=1, keepdim=True))


def test_mask_makes_padding_immovable_and_free() -> None:
    net = network(inputs=6)
    x = torch.randn(3, 3, 2, dtype=F64, generator=source())
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)[..., None]
    r = virtual_adversarial_perturbation(
        lambda v: net(v.flatten(1)), x, epsilon=0.7, iterations=200, mask=mask, generator=source()
    )
    assert (r.masked_select(~mask) == 0).all()
    torch.testing.assert_close(
        r.flatten(1).norm(dim=1), torch.full((3,), 0.7, dtype=F64), rtol=1e-14, atol=0
    )
    # For the last sample: the principal eigenvector of the block that may move.
    block = gauss_newton(net, x.flatten(1), "categorical")[2, :2, :2]
    principal = 0.7 * torch.linalg.eigh(block)[1][:, -1]
    torch.testing.assert_close(r[2, 0].abs(), principal.abs(), rtol=1e-8, atol=0)
    nothing = virtual_adversarial_perturbation(
        lambda v: net(v.flatten(1)), x, epsilon=0.7, mask=torch.zeros(1, dtype=torch.bool)
    )
    assert (nothing == 0).all()


def test_targeting_gains_between_d_over_rank_and_d() -> None:
    net, x = network(inputs=6, outputs=3), torch.randn(8, 6, dtype=F64, generator=source())
    small = 1e-4
    r = virtual_adversarial_perturbation(net, x, epsilon=small, iterations=100, generator=source())
    worst = consistency_loss(net, x, r, reduction="none")
    random = small**2 * gradient_penalty(net, x, metric="categorical", reduction="none") / 6
    gain = worst / random
    # Softmax of three classes has a curvature of rank 2.
    assert (gain > 6 / 2 * 0.999).all()
    assert (gain < 6 * 1.001).all()


# The loss.


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hessian", ["exact", "finite_difference"])
@pytest.mark.parametrize("detach_target", [True, False])
@pytest.mark.parametrize("iterations", [0, 1])
def test_loss_is_consistency_under_the_perturbation(
    metric: Any, hessian: Any, detach_target: bool, iterations: int
) -> None:
    net, x = network(), torch.randn(5, 3, dtype=F64, generator=source()).requires_grad_()
    at = [x, *net.parameters()]
    loss = VirtualAdversarialLoss(
        epsilon=0.5, iterations=iterations, metric=metric, hessian=hessian,
        detach_target=detach_target, reduction="sum",
    )(net, x, generator=source(7))  # fmt: skip
    r = virtual_adversarial_perturbation(
        net, x, epsilon=0.5, iterations=iterations, metric=metric, hessian=hessian,
        generator=source(7),
    )  # fmt: skip
    expected = consistency_loss(
        net, x, r, metric=metric, detach_target=detach_target, reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(loss, at), torch.autograd.grad(expected, at), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_divergence_is_the_entropy_of_the_clean_distribution_relative_to_the_moved_one() -> None:
    net, x = network(), torch.randn(5, 3, dtype=F64, generator=source())
    r = 0.4 * torch.randn(5, 3, dtype=F64, generator=source(1))
    p, q = net(x).softmax(1), net(x + r).softmax(1)
    torch.testing.assert_close(
        consistency_loss(net, x, r, reduction="none"), (p * (p / q).log()).sum(1)
    )
    p, q = net(x).sigmoid(), net(x + r).sigmoid()
    binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(
        consistency_loss(net, x, r, metric="bernoulli", reduction="none"), binary.sum(1)
    )


def test_confident_samples_in_half_precision_find_their_direction() -> None:
    weight = 1.4 * torch.tensor([[3.0, -1.0], [-1.0, 2.0], [0.5, 0.5]])
    x = torch.tensor([[2.0, -2.0, 0.5]])

    def found(dtype: torch.dtype) -> Tensor:
        return virtual_adversarial_perturbation(
            lambda z: z @ weight.to(z.dtype), x.to(dtype), epsilon=1.0, iterations=3,
            initial=torch.ones(1, 3, dtype=dtype),
        ).float()  # fmt: skip

    cosine = (found(torch.float16) * found(torch.float32)).sum().abs()
    assert cosine.item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("length", [1e-30, 1e6])
def test_the_length_of_a_start_does_not_matter_to_half_precision(length: float) -> None:
    found = virtual_adversarial_perturbation(
        lambda z: z, torch.zeros(1, 4).half(), epsilon=1.0, iterations=0,
        initial=length * torch.ones(1, 4),
    )  # fmt: skip
    assert found.tolist() == [[0.5] * 4]


def test_a_laplacian_of_many_features_is_summed_in_single() -> None:
    x = torch.zeros(2, 784, dtype=torch.bfloat16)
    assert laplacian(lambda z: (z * z).sum(1) / 2, x).tolist() == [784.0, 784.0]


def test_tensors_of_inference_mode_are_inputs_like_others() -> None:
    with torch.inference_mode():
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plain = x.clone()
    assert torch.equal(
        laplacian(lambda z: (z**3).sum(1), x), laplacian(lambda z: (z**3).sum(1), plain)
    )
    options = {"epsilon": 1.0, "initial": torch.ones(3, 4)}
    for hessian in ("exact", "finite_difference"):
        ours, theirs = (
            virtual_adversarial_perturbation(torch.tanh, given, hessian=hessian, **options)
            for given in (x, plain)
        )
        assert torch.equal(ours, theirs)
