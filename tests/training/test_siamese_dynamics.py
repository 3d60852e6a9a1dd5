"""The flow of a linear siamese network against closed forms and conserved quantities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.training.siamese import (
    SimSiam,
    linear_siamese_flow,
    mode_limit,
    mode_trajectory,
    weight_decay_threshold,
)

# A relative tolerance of 1e-12 a step, over the hundred steps that a trajectory takes; the oracles'
# numbers have 12 decimals.
FLOW = 1e-10
TIMES = [1.0, 2.0, 5.0, 10.0, 20.0]

TRAJECTORIES = {
    "stop_gradient": [0.127064143663, 0.161231507697, 0.322221763499, 0.70771686367,
                      0.806037079444],
    "full": [0.085336697913, 0.072992181157, 0.046058983263, 0.021638176757, 0.004820985619],
    "target_only": [0.0671363349, 0.0451581060, 0.0137907924, 0.0019134026, 0.0000368419],
}  # fmt: skip
PREDICTOR = [0.605099410517, 0.6131848001, 0.673666731299, 0.92242244071, 0.999847875148]

# (gradient, predictor, encoder) at the start -> where they end.
LIMITS = [
    ("stop_gradient", 0.6, 0.1, 1.0, 0.806225774830),
    ("stop_gradient", 0.6, 0.5, 1.0, 0.943398113206),
    ("stop_gradient", 1.3, 0.2, 1.284523257867, 0.0),
    ("stop_gradient", -0.5, 0.3, -0.4, 0.0),
    ("stop_gradient", -0.3, 0.5, 1.0, 1.077032961427),
    ("full", 0.6, 0.1, 0.612701665379, 0.0),
    ("full", 0.6, 0.5, 1.0, 0.3),
    ("full", 0.9, 0.6, 1.0, 0.591607978310),
    ("full", 1.3, 0.2, 1.223606797750, 0.0),
    ("target_only", 0.6, 0.1, 0.605, 0.0),
    ("target_only", 1.3, 0.2, 1.0, 0.8),
    ("target_only", 0.9, 0.6, 1.0, 0.4),
]


def final(**settings: Any) -> tuple[float, float]:
    """The mode after a time in which all of the test's starts settle."""
    trajectory = mode_trajectory([600.0], **settings)
    return trajectory.predictor[-1], trajectory.encoder[-1]


@pytest.mark.parametrize("gradient", TRAJECTORIES)
def test_trajectory_of_the_article(gradient: Any) -> None:
    trajectory = mode_trajectory(TIMES, gradient=gradient)
    np.testing.assert_allclose(trajectory.encoder, TRAJECTORIES[gradient], rtol=0, atol=FLOW)
    np.testing.assert_array_equal(trajectory.target, trajectory.encoder)
    np.testing.assert_array_equal(trajectory.time, TIMES)


def test_predictor_of_the_article() -> None:
    np.testing.assert_allclose(mode_trajectory(TIMES).predictor, PREDICTOR, rtol=0, atol=FLOW)


@pytest.mark.parametrize(("gradient", "p", "s", "p_end", "s_end"), LIMITS)
def test_limits(gradient: Any, p: float, s: float, p_end: float, s_end: float) -> None:
    limit = mode_limit(predictor=p, encoder=s, gradient=gradient)
    assert (limit.predictor, limit.encoder) == pytest.approx((p_end, s_end), abs=1e-12)
    assert limit.collapsed == (s_end == 0)
    simulated = final(predictor=p, encoder=s, gradient=gradient)
    assert simulated == pytest.approx((p_end, s_end), abs=FLOW)


@settings(max_examples=25, deadline=None)
@given(
    p=st.floats(-1.5, 2),
    s=st.floats(-1.5, 1.5),
    gradient=st.sampled_from(["stop_gradient", "full", "target_only"]),
    v=st.floats(0, 1),
    a=st.floats(0.2, 5),
)
def test_the_flow_ends_at_the_closed_form(
    p: float, s: float, gradient: Any, v: float, a: float
) -> None:
    if gradient != "stop_gradient":
        v, a = 0.0, 1.0
    options: dict[str, Any] = {
        "predictor": p, "encoder": s, "gradient": gradient,
        "augmentation_variance": v, "predictor_rate": a,
    }  # fmt: skip
    limit = mode_limit(**options)
    best = 1 / (1 + v)
    # Near the border between life and collapse the approach is as slow as one likes: these
    # rates, of the linear flow around the limit, bring e^{-30} after the time 600 at least.
    rate = {
        "stop_gradient": abs((best - limit.predictor) * limit.predictor / best)
        if limit.collapsed
        else limit.encoder**2 * a,
        "full": limit.encoder**2 + (1 - limit.predictor) ** 2,
        "target_only": limit.encoder**2 if not limit.collapsed else 1 - limit.predictor,
    }[gradient]
    assume(rate > 0.05 and abs(s) > 1e-3)
    assert final(**options) == pytest.approx((limit.predictor, limit.encoder), abs=1e-7)


def test_a_sign_of_the_encoder_is_kept() -> None:
    for gradient in TRAJECTORIES:
        for p, s in ((0.9, 0.6), (0.6, 0.1)):
            plus = mode_limit(predictor=p, encoder=s, gradient=gradient)
            minus = mode_limit(predictor=p, encoder=-s, gradient=gradient)
            assert (minus.predictor, minus.encoder) == (plus.predictor, -plus.encoder)


@pytest.mark.parametrize("gradient", TRAJECTORIES)
def test_an_encoder_at_zero_has_collapsed_already(gradient: Any) -> None:
    for p in (-0.5, 0.6, 1.3):
        limit = mode_limit(predictor=p, encoder=0.0, gradient=gradient)
        assert (limit.predictor, limit.encoder, limit.collapsed) == (p, 0.0, True)
        assert final(predictor=p, encoder=0.0, gradient=gradient) == (p, 0.0)


def test_augmentation_lowers_the_predictor_and_a_fast_one_the_encoder() -> None:
    slow = mode_limit(augmentation_variance=0.25)
    assert (slow.predictor, slow.encoder) == pytest.approx((0.8, 0.538516480713), abs=1e-12)
    fast = mode_limit(augmentation_variance=0.25, predictor_rate=5)
    assert (fast.predictor, fast.encoder) == pytest.approx((0.8, 0.256904651573), abs=1e-12)
    assert final(augmentation_variance=0.25, predictor_rate=5) == pytest.approx(
        (fast.predictor, fast.encoder), abs=FLOW
    )


def test_byol_ends_where_simsiam_does() -> None:
    trajectory = mode_trajectory([20.0, 600.0], ema_rate=0.1)
    assert trajectory.encoder[0] == pytest.approx(0.306635383453, abs=FLOW)
    # The slow target is still 1e-9 away from the limit.
    assert trajectory.predictor[1] == pytest.approx(1, abs=1e-9)
    assert trajectory.encoder[1] == pytest.approx(0.806225774830, abs=1e-9)
    assert trajectory.target[1] == pytest.approx(0.806225774830, abs=1e-9)


def test_a_kept_target_is_met() -> None:
    trajectory = mode_trajectory([500.0], ema_rate=0.0, target=0.5, augmentation_variance=0.25)
    assert trajectory.target[0] == 0.5
    assert trajectory.predictor[0] * trajectory.encoder[0] * 1.25 == pytest.approx(0.5, abs=FLOW)
    # p² - s² is conserved for any target.
    conserved = trajectory.predictor[0] ** 2 - trajectory.encoder[0] ** 2
    assert conserved == pytest.approx(0.6**2 - 0.1**2, abs=FLOW)


@pytest.mark.parametrize(("w", "end"), [(0.05, 0.7464101615), (0.1, 0.6828427125),
                                        (0.19, 0.4894427191)])  # fmt: skip
def test_weight_decay_below_the_threshold_shrinks(w: float, end: float) -> None:
    assert w < weight_decay_threshold(augmentation_variance=0.25)
    options = {"predictor": 0.6, "encoder": 0.6, "augmentation_variance": 0.25}
    closed = (1 + math.sqrt(1 - 5 * w)) / 2.5
    assert closed == pytest.approx(end, abs=1e-10)
    assert final(weight_decay=w, **options) == pytest.approx((closed, closed), abs=FLOW)


def test_weight_decay_above_the_threshold_collapses() -> None:
    assert weight_decay_threshold(augmentation_variance=0.25) == 0.2
    assert weight_decay_threshold() == 0.25
    options = {"predictor": 0.6, "encoder": 0.6, "augmentation_variance": 0.25}
    assert final(weight_decay=0.21, **options) == pytest.approx((0, 0), abs=FLOW)


def test_a_predictor_that_does_not_learn() -> None:
    assert mode_limit(predictor_rate=0).encoder == math.inf
    assert mode_limit(predictor_rate=0, encoder=-0.1).encoder == -math.inf
    assert mode_limit(predictor_rate=0, predictor=1.2).collapsed
    still = mode_limit(predictor_rate=0, predictor=1.0, encoder=0.3)
    assert (still.predictor, still.encoder, still.collapsed) == (1.0, 0.3, False)
    grown = mode_trajectory([10.0], predictor_rate=0)
    # s' = (1 - p) p s with p = 0.6.
    assert grown.encoder[0] == pytest.approx(0.1 * math.exp(2.4), rel=1e-8)
    assert grown.predictor[0] == 0.6


def test_the_state_at_time_zero_is_the_start() -> None:
    trajectory = mode_trajectory([0.0], predictor=0.7, encoder=0.2)
    assert (trajectory.predictor[0], trajectory.encoder[0]) == (0.7, 0.2)


def matrices(k: int = 3, d: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((d, d))
    return {
        "encoder": 0.5 * rng.standard_normal((k, d)),
        "predictor": 0.5 * rng.standard_normal((k, k)),
        "covariance": mixing @ mixing.T / d,
        "augmentation_covariance": np.diag(np.linspace(0.1, 0.4, d)),
    }


def spectra_apart(trajectory: Any, a: float = 1.0) -> np.ndarray:
    W, P = trajectory.encoder, trajectory.predictor
    return W @ W.swapaxes(1, 2) - P.swapaxes(1, 2) @ P / a


def test_one_by_one_matrices_are_a_mode() -> None:
    for options in (
        {}, {"gradient": "full"}, {"gradient": "target_only"}, {"weight_decay": 0.1},
        {"predictor_rate": 3.0}, {"ema_rate": 0.2},
    ):  # fmt: skip
        mode = mode_trajectory(TIMES, augmentation_variance=0.3, **options)
        flow = linear_siamese_flow(
            [[0.1]], [[0.6]], covariance=[[1.0]], augmentation_covariance=[[0.3]], times=TIMES,
            **options,
        )  # fmt: skip
        for name in ("encoder", "predictor", "target"):
            np.testing.assert_allclose(
                getattr(flow, name)[:, 0, 0], getattr(mode, name), rtol=0, atol=FLOW
            )


@pytest.mark.parametrize("options", [{}, {"predictor_rate": 4.0}, {"ema_rate": 0.1}])
def test_difference_of_the_spectra_is_conserved(options: dict[str, float]) -> None:
    trajectory = linear_siamese_flow(**matrices(), times=np.linspace(0, 300, 13), **options)
    difference = spectra_apart(trajectory, options.get("predictor_rate", 1.0))
    drift = np.abs(difference - difference[0]).max()
    # A hundred times the relative tolerance of the solver, on squares of about 1.
    assert drift < 1e-10


def test_difference_of_the_spectra_fades_under_weight_decay() -> None:
    w, times = 0.05, np.linspace(0, 30, 7)
    difference = spectra_apart(linear_siamese_flow(**matrices(), times=times, weight_decay=w))
    expected = difference[0] * np.exp(-2 * w * times)[:, None, None]
    np.testing.assert_allclose(difference, expected, rtol=0, atol=1e-9)


def test_full_gradient_with_augmentation_always_collapses() -> None:
    trajectory = linear_siamese_flow(**matrices(), times=[0, 300], gradient="full")
    first, last = np.linalg.norm(trajectory.encoder, axis=(1, 2))
    assert first > 1
    assert last < 1e-9


def test_without_a_predictor_the_encoder_decays_like_the_matrix_exponential() -> None:
    # P = 1 fixed: both gradients together are W' = -2 W V, the article's expanded loss.
    given = matrices() | {"predictor": np.eye(3)}
    times = np.array([0.5, 1.0, 4.0])
    trajectory = linear_siamese_flow(**given, times=times, gradient="full", predictor_rate=0.0)
    decay = np.exp(-2 * times[:, None] * np.linspace(0.1, 0.4, 5))
    np.testing.assert_allclose(
        trajectory.encoder, given["encoder"] * decay[:, None], rtol=0, atol=FLOW
    )


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_small_steps_of_a_network_follow_the_flow(stop_gradient: bool) -> None:
    # Four samples with their views' exact covariances; the loss of both directions has no ½.
    shared = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    noise = torch.tensor([[0.5, 0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5]], dtype=torch.float64)
    x_1, x_2 = torch.cat([shared + noise, shared - noise]), torch.cat([shared, shared])
    common = (x_1.T @ x_2 + x_2.T @ x_1) / 16
    each = (x_1.T @ x_1 + x_2.T @ x_2) / 16
    given = {"encoder": [[0.3, -0.2], [0.1, 0.4]], "predictor": [[0.6, 0.1], [-0.2, 0.5]]}
    model = SimSiam(
        nn.Linear(2, 2, bias=False), predictor=nn.Linear(2, 2, bias=False),
        stop_gradient=stop_gradient, loss="mse",
    ).double()  # fmt: skip
    with torch.no_grad():
        model.encoder.weight.copy_(torch.tensor(given["encoder"]))
        model.predictor.weight.copy_(torch.tensor(given["predictor"]))
    rate, steps = 1e-3, 400
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x_1, x_2).loss.backward()
        optimizer.step()
    # A step of weight decay 0.2 over the time 2·rate is a decay of 0.1.
    flow = linear_siamese_flow(
        **given, covariance=common, augmentation_covariance=each - common,
        times=[2 * rate * steps], gradient="stop_gradient" if stop_gradient else "full",
        weight_decay=0.1,
    )  # fmt: skip
    # Euler's error after the time T is T/2 · step · |second derivative|, 0.4 · 0.002 · about 1.
    found = [model.encoder.weight, model.predictor.weight]
    for ours, theirs in zip(found, (flow.encoder[0], flow.predictor[0]), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=2e-3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"times": [1.0, 1.0]}, "times"),
        ({"times": [-1.0, 1.0]}, "times"),
        ({"times": [[1.0]]}, "times"),
        ({"times": []}, "times"),
        ({"times": [math.nan]}, "times"),
        ({"gradient": "half"}, "gradient"),
        ({"augmentation_variance": -0.1}, "augmentation_variance"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"predictor_rate": -1.0}, "predictor_rate"),
        ({"ema_rate": -1.0}, "ema_rate"),
        ({"ema_rate": 0.1, "gradient": "full"}, "ema_rate"),
        ({"target": 0.1}, "target"),
        ({"predictor": math.inf}, "predictor"),
        ({"encoder": math.nan}, "encoder"),
    ],
)
def test_a_mode_refuses_impossible_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mode_trajectory(**{"times": [1.0], **options})


@pytest.mark.bad_input
def test_limits_without_a_closed_form_are_refused() -> None:
    for gradient in ("full", "target_only"):
        for options in ({"augmentation_variance": 0.1}, {"predictor_rate": 2.0}):
            with pytest.raises(ValueError, match="closed form"):
                mode_limit(gradient=gradient, **options)
    with pytest.raises(ValueError, match="gradient"):
        mode_limit(gradient="half")
    with pytest.raises(ValueError, match="augmentation_variance"):
        weight_decay_threshold(augmentation_variance=-1)


@pytest.mark.bad_input
def test_matrices_that_do_not_fit_are_refused() -> None:
    good = matrices()
    for name, bad, words in (
        ("predictor", np.eye(4), r"shapes.*\(4, 4\)"),
        ("covariance", np.eye(3), r"shapes.*\(3, 3\)"),
        ("encoder", np.ones(5), r"shapes.*\(5,\)"),
        ("covariance", np.triu(np.ones((5, 5))), "symmetric"),
        ("augmentation_covariance", -np.eye(5), "negative variance"),
        ("encoder", np.full((3, 5), np.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_siamese_flow(**(good | {name: bad}), times=[1.0])


def test_a_flow_without_bound_is_an_arithmetic_error() -> None:
    with pytest.raises(ArithmeticError, match="no finite state at time 10000"):
        mode_trajectory([10_000.0], predictor_rate=0.0)
