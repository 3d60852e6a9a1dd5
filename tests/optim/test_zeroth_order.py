"""Oracles, bit-exactness and refusals of kexue.optim.zeroth_order."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.losses import expected_reward
from kexue.optim import StepRecord, ZerothOrderSGD, replay, zeroth_order_gradient

DIGITS = 1e-12  # the oracles are printed with twelve digits
# A fixed seed is one draw: each number within four and a half of its standard errors, which one
# draw in 150 000 would miss.
ERRORS = 4.5
F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def normal_pdf(x: float) -> float:
    return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def assert_within_error(gradient: Tensor, error: Tensor, exact: Any) -> None:
    exact = torch.as_tensor(exact, dtype=F64)
    assert bool(((gradient - exact).abs() < ERRORS * error).all()), (gradient, exact, error)
    # And the error is small enough to say something.
    assert bool((error < 0.05 * exact.abs().max()).all())


@pytest.mark.parametrize("antithetic", [True, False])
def test_gradient_of_the_fourth_power_is_that_of_the_smoothed_one(antithetic: bool) -> None:
    x = torch.tensor([0.5, -0.3, 1.0, 0.2], dtype=F64)
    estimate = zeroth_order_gradient(
        lambda y: y.square().sum(-1).square(), x, epsilon=0.4, samples=400_000,
        antithetic=antithetic, generator=seeded(),
    )  # fmt: skip
    assert_within_error(estimate.gradient, estimate.standard_error, [4.68, -2.808, 9.36, 1.872])
    # f_e = |x|^4 + (2d + 4) e^2 |x|^2 + (d^2 + 2d) e^4; f ranges over about its own size.
    assert estimate.value.item() == pytest.approx(5.1684, rel=ERRORS * 2 / math.sqrt(400_000))


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (lambda y: y[:, 0] > 0, 0.666449205784),
        (lambda y: y[:, 0].abs(), 2 * normal_cdf(0.6) - 1),
    ],
    ids=["step", "kink"],
)
def test_gradient_of_what_has_none(function: Callable[[Tensor], Tensor], exact: float) -> None:
    assert normal_pdf(0.6) / 0.5 == pytest.approx(0.666449205784, abs=DIGITS)
    estimate = zeroth_order_gradient(
        function, torch.tensor([0.3], dtype=F64), epsilon=0.5, samples=400_000, generator=seeded()
    )
    assert_within_error(estimate.gradient, estimate.standard_error, [exact])


@pytest.mark.parametrize(
    ("distribution", "ratio"), [("normal", 51), ("rademacher", 49), ("sphere", 49)]
)
def test_variance_grows_with_the_dimension(distribution: Any, ratio: float) -> None:
    a = torch.randn(50, generator=seeded(3), dtype=F64)
    count = 100_000
    estimate = zeroth_order_gradient(
        lambda y: y @ a, torch.zeros(50, dtype=F64), epsilon=0.1, samples=count,
        distribution=distribution, generator=seeded(),
    )  # fmt: skip
    measured = (estimate.standard_error.square().sum() * count / a.square().sum()).item()
    # |g|^2 is about (a.u)^2 d with (a.u)^4 = 3: a spread of sqrt(2) relative to its mean.
    assert measured == pytest.approx(ratio, abs=ERRORS * ratio * math.sqrt(2 / count))
    assert_within_error(estimate.gradient, estimate.standard_error, a)


def test_without_a_baseline_the_level_of_the_function_is_noise() -> None:
    d, epsilon, level, count = 10, 0.5, 3.0, 100_000
    a = torch.ones(d, dtype=F64)
    estimate = zeroth_order_gradient(
        lambda y: y @ a + level, torch.zeros(d, dtype=F64), epsilon=epsilon, samples=count,
        antithetic=False, baseline="none", generator=seeded(),
    )  # fmt: skip
    trace = estimate.standard_error.square().sum().item() * count
    exact = (d + 1) * d + level**2 * d / epsilon**2
    assert trace == pytest.approx(exact, rel=ERRORS * math.sqrt(3 / count))


@pytest.mark.parametrize("baseline", ["none", "current", "leave_one_out", "optimal"])
@pytest.mark.parametrize("samples", [2, 5])
def test_no_baseline_moves_the_mean(baseline: Any, samples: int) -> None:
    # A quadratic, for which the estimate is unbiased at any epsilon.
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    x = torch.tensor([0.7, -0.4], dtype=F64)

    def function(y: Tensor) -> Tensor:
        return 1 + 0.5 * ((y @ hessian) * y).sum(-1)

    generator = seeded()
    each = torch.stack(
        [
            zeroth_order_gradient(
                function, x, epsilon=0.3, samples=samples, antithetic=False, baseline=baseline,
                generator=generator,
            ).gradient
            for _ in range(800)
        ]
    )  # fmt: skip
    error = each.std(0) / math.sqrt(len(each))
    assert bool(((each.mean(0) - hessian @ x).abs() < ERRORS * error).all())


def test_baselines_take_variance_away() -> None:
    x = torch.tensor([0.5, -0.3, 1.0, 0.2], dtype=F64)

    def trace(baseline: Any) -> float:
        estimate = zeroth_order_gradient(
            lambda y: 10 + y.square().sum(-1), x, epsilon=0.1, samples=20_000, antithetic=False,
            baseline=baseline, generator=seeded(),
        )  # fmt: skip
        return estimate.standard_error.square().sum().item()

    assert trace("optimal") < 0.01 * trace("none")
    assert trace("leave_one_out") < 0.01 * trace("none")
    assert trace("current") < 0.01 * trace("none")


@pytest.mark.parametrize("distribution", ["normal", "rademacher", "sphere"])
def test_quadratic_is_unbiased_and_its_mean_value_is_known(distribution: Any) -> None:
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    x = torch.tensor([0.7, -0.4], dtype=F64)
    epsilon, count = 2.0, 100_000
    estimate = zeroth_order_gradient(
        lambda y: 0.5 * ((y @ hessian) * y).sum(-1), x, epsilon=epsilon, samples=count,
        distribution=distribution, generator=seeded(),
    )  # fmt: skip
    assert_within_error(estimate.gradient, estimate.standard_error, hessian @ x)
    exact = (0.5 * x @ hessian @ x + epsilon**2 * hessian.trace() / 2).item()
    spread = epsilon**2 * math.sqrt(0.5 * hessian.square().sum().item())
    assert estimate.value.item() == pytest.approx(exact, abs=ERRORS * spread / math.sqrt(count))


def test_zeroth_order_gradient_of_a_classifier_is_the_policy_gradient_at_matched_temperature() -> (
    None
):
    x, theta = torch.tensor([1.2, -0.7], dtype=F64), torch.tensor([0.4, 0.9], dtype=F64)
    epsilon, norm = 0.5, math.hypot(1.2, 0.7)
    margin = (theta @ x).item() / (epsilon * norm)
    exact = 0.75 * normal_pdf(margin) / (epsilon * norm) * x
    np.testing.assert_allclose(exact, [0.504984303718, -0.294574177169], atol=DIGITS)
    estimate = zeroth_order_gradient(
        lambda weights: torch.where(weights @ x > 0, 1.0, 0.25), theta, epsilon=epsilon,
        samples=400_000, generator=seeded(),
    )  # fmt: skip
    assert_within_error(estimate.gradient, estimate.standard_error, exact)

    temperature = math.sqrt(2 * math.pi) / 4 * epsilon * norm
    assert temperature == pytest.approx(0.435289911346, abs=DIGITS)
    weights = theta.clone().requires_grad_()
    logits = torch.stack([torch.zeros((), dtype=F64), weights @ x])
    expected_reward(
        logits, torch.tensor([0.25, 1.0], dtype=F64), temperature=temperature
    ).backward()
    np.testing.assert_allclose(weights.grad, [0.501850471633, -0.292746108452], atol=DIGITS)


def test_one_sample_has_no_standard_error() -> None:
    estimate = zeroth_order_gradient(lambda y: y.sum((1, 2)), torch.zeros(2, 3), epsilon=0.1)
    assert estimate.gradient.shape == estimate.standard_error.shape == (2, 3)
    assert bool(estimate.standard_error.isnan().all())
    assert estimate.value.shape == ()


@pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
def test_directions_have_the_length_that_identity_covariance_asks_for(distribution: Any) -> None:
    seen: list[Tensor] = []

    def function(y: Tensor) -> Tensor:
        seen.append(y)
        return y.sum((1, 2))

    zeroth_order_gradient(
        function, torch.zeros(7, 3, dtype=F64), epsilon=0.5, samples=9, distribution=distribution,
        generator=seeded(),
    )  # fmt: skip
    torch.testing.assert_close(
        seen[0].flatten(1).norm(dim=1), torch.full((9,), 0.5 * math.sqrt(21), dtype=F64)
    )
    torch.testing.assert_close(seen[0], -seen[1])


def model_and_loss(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(20, 3, generator=seeded(1)).to(dtype)
    y = torch.randint(0, 2, (20,), generator=seeded(2))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def direction(seed: int, like: list[Tensor], distribution: str = "normal") -> list[Tensor]:
    """The direction of a seed: what a replay of one step adds to zeros."""
    zeros = [torch.zeros_like(p) for p in like]
    rates, decays = (1.0,) * len(zeros), (0.0,) * len(zeros)
    replay(zeros, [StepRecord((seed,), (-1.0,), rates, decays, 1.0, True, True, distribution)])
    return zeros


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("baseline", ["pairs", "current", "leave_one_out", "none"])
def test_step_is_the_formula(baseline: str, exact: bool) -> None:
    model, loss = model_and_loss(F64)
    start = [p.detach().clone() for p in model.parameters()]
    lr, epsilon, decay, count = 0.3, 0.05, 0.1, 3
    given: Any = (
        {"antithetic": True} if baseline == "pairs" else {"antithetic": False, "baseline": baseline}
    )
    optimizer = ZerothOrderSGD(
        model.parameters(), lr=lr, epsilon=epsilon, directions=count, weight_decay=decay,
        exact_restore=exact, seed=5, **given,
    )  # fmt: skip
    mean = optimizer.step(loss)
    end = [p.detach().clone() for p in model.parameters()]

    directions = [direction(seed, start) for seed in optimizer.trajectory[0].seeds]

    def at(j: int, scale: float) -> float:
        with torch.no_grad():
            for p, origin, u in zip(model.parameters(), start, directions[j], strict=True):
                p.copy_(origin + scale * u)
            return loss().item()

    ahead = [at(j, epsilon) for j in range(count)]
    behind = [at(j, -epsilon) for j in range(count)]
    current = at(0, 0.0)
    level = {
        "pairs": behind,
        "current": [current] * count,
        "leave_one_out": [(sum(ahead) - value) / (count - 1) for value in ahead],
        "none": [0.0] * count,
    }[baseline]
    width = 2 * epsilon if baseline == "pairs" else epsilon
    coefficients = [(a - b) / width / count for a, b in zip(ahead, level, strict=True)]
    # Losses of size one with errors of some 1e-16, divided by epsilon.
    np.testing.assert_allclose(
        optimizer.trajectory[0].coefficients, coefficients, atol=1e-13 / epsilon
    )
    for p, origin, *us in zip(end, start, *directions, strict=True):
        by_hand = origin * (1 - lr * decay)
        for c, u in zip(coefficients, us, strict=True):
            by_hand = by_hand - lr * c * u
        torch.testing.assert_close(p, by_hand, rtol=0, atol=1e-11)
    evaluations = ahead + behind if baseline == "pairs" else ahead
    assert mean == pytest.approx(sum(evaluations) / len(evaluations), rel=1e-12)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_replay_is_bit_identical(
    exact: bool, antithetic: bool, distribution: Any, dtype: torch.dtype
) -> None:
    model, loss = model_and_loss(dtype)
    again, _ = model_and_loss(dtype)
    first, *_ = model.parameters()
    optimizer = ZerothOrderSGD(
        model.parameters(), lr=0.05, epsilon=0.02, directions=3, antithetic=antithetic,
        distribution=distribution, weight_decay=0.1, exact_restore=exact,
    )  # fmt: skip
    for step in range(10):
        first.requires_grad_(step % 3 != 1)  # frozen and released again
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.step(loss)
    replay(again.parameters(), optimizer.trajectory)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    through_json = json.loads(json.dumps(optimizer.state_dict()["trajectory"]))
    again, _ = model_and_loss(dtype)
    replay(again.parameters(), through_json)
    assert torch.equal(next(again.parameters()), first)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("failure", ["raises", "nan", "raises at once"])
def test_failed_step_restores_and_the_run_can_still_be_replayed(exact: bool, failure: str) -> None:
    model, loss = model_and_loss()
    again, _ = model_and_loss()
    optimizer = ZerothOrderSGD(
        model.parameters(), lr=0.05, epsilon=0.1, directions=2, weight_decay=0.5,
        exact_restore=exact,
    )  # fmt: skip
    calls = itertools.count()

    def failing() -> float | Tensor:
        call = next(calls)
        if failure == "nan":
            return math.nan if call == 1 else loss()
        if call == (1 if failure == "raises" else 0):
            raise RuntimeError("no answer")
        return loss()

    optimizer.step(loss)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError if failure == "nan" else RuntimeError,
        match="non-finite" if failure == "nan" else "no answer",
    ):
        optimizer.step(failing)
    for p, origin in zip(model.parameters(), before, strict=True):
        # Three roundings a direction, each half a unit at numbers below 2.
        tolerance = 0.0 if exact else 6 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(p.detach(), origin, rtol=0, atol=tolerance)
    assert optimizer.step_count == 1
    optimizer.step(loss)
    replay(again.parameters(), optimizer.trajectory)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("antithetic", [False, True])
def test_exact_restore_evaluates_around_the_same_bits(antithetic: bool) -> None:
    weight = nn.Parameter(torch.randn(1000, generator=seeded()))
    start = weight.detach().clone()
    optimizer = ZerothOrderSGD(
        [weight], lr=0.0, directions=5, antithetic=antithetic, exact_restore=True
    )
    seen = []

    def closure() -> float:
        seen.append(weight.detach().clone())
        return 0.0

    for _ in range(20):
        optimizer.step(closure)
    assert torch.equal(weight, start)
    if antithetic:
        # Mirror images of each other, to the rounding of the second one.
        torch.testing.assert_close(
            seen[0] + seen[1], 2 * start, rtol=0, atol=2 * torch.finfo(torch.float32).eps * 4
        )


def test_directions_depend_on_seed_step_and_number_and_not_on_frozen_neighbours() -> None:
    def seeds(seed: int) -> list[int]:
        weight = nn.Parameter(torch.zeros(2))
        optimizer = ZerothOrderSGD([weight], directions=4, seed=seed)
        for _ in range(50):
            optimizer.step(lambda: 0.0)
        return [s for record in optimizer.trajectory for s in record.seeds]

    every = seeds(0) + seeds(1) + seeds(2)
    assert len(set(every)) == len(every)
    assert seeds(1) == seeds(1)

    def second_after_a_step(frozen: bool) -> Tensor:
        one, two = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
        one.requires_grad_(not frozen)
        ZerothOrderSGD([one, two], lr=1.0, maximize=True).step(lambda: two.sum())
        assert bool((one == 0).all()) == frozen
        assert not torch.equal(one.detach(), two.detach())
        return two.detach()

    assert torch.equal(*map(second_after_a_step, (False, True)))


def test_directions_have_the_moments_they_should() -> None:
    count = 1 << 18
    for distribution, fourth in (("normal", 3.0), ("rademacher", 1.0)):
        (u,) = direction(7, [torch.zeros(count)], distribution)
        # Standard errors 1, sqrt(fourth - 1) and, for neighbours, 1 over the root of the count.
        error = ERRORS / math.sqrt(count)
        assert abs(u.mean().item()) < error
        assert abs(u.square().mean().item() - 1) <= error * math.sqrt(2)
        assert u.pow(4).mean().item() == pytest.approx(fourth, abs=error * math.sqrt(96))
        for lag in (1, 8, 64):
            assert abs((u[lag:] * u[:-lag]).mean().item()) < error


def test_layout_of_a_tensor_does_not_matter_but_its_order_does() -> None:
    plain = torch.zeros(40, 30)
    turned = torch.zeros(30, 40).T
    assert not turned.is_contiguous()
    (u,), (v,) = direction(3, [plain]), [turned]
    replay([v], [StepRecord((3,), (-1.0,), (1.0,), (0.0,), 1.0, True, True, "normal")])
    assert torch.equal(u, v)


class LargestAllocation(TorchDispatchMode):
    """Watches for the largest storage that an operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_in_place_needs_one_chunk_of_memory(distribution: Any) -> None:
    weight = nn.Parameter(torch.zeros(3 * (1 << 20) + 5))
    optimizer = ZerothOrderSGD([weight], distribution=distribution, weight_decay=0.1)
    watch = LargestAllocation()
    with watch:
        optimizer.step(lambda: 0.0)
    assert 0 < watch.bytes <= 4 * (1 << 20)


def test_global_generator_and_gradients_are_left_alone() -> None:
    model, loss = model_and_loss()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    state = torch.get_rng_state()
    optimizer = ZerothOrderSGD(model.parameters(), distribution="rademacher")
    optimizer.step(loss)
    with torch.enable_grad():
        optimizer.step(loss)
    zeroth_order_gradient(
        lambda y: y.sum(-1), torch.zeros(2), epsilon=0.1, generator=torch.Generator()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((p.grad == 7).all()) for p in model.parameters())


def test_closure_runs_without_gradients() -> None:
    model, loss = model_and_loss()
    seen = []

    def closure() -> Tensor:
        value = loss()
        seen.append(value.requires_grad)
        return value

    ZerothOrderSGD(model.parameters()).step(closure)
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("given", "evaluations"),
    [
        ({}, 6),
        ({"antithetic": False}, 4),
        ({"antithetic": False, "baseline": "none"}, 3),
        ({"antithetic": False, "fitness_shaping": "centered_rank"}, 3),
    ],
)
def test_number_of_evaluations(given: Any, evaluations: int) -> None:
    weight = nn.Parameter(torch.zeros(2))
    calls = []
    ZerothOrderSGD([weight], directions=3, **given).step(lambda: calls.append(0) or 0.0)
    assert len(calls) == evaluations


@pytest.mark.parametrize("antithetic", [False, True])
def test_ranks_know_only_the_order(antithetic: bool) -> None:
    def run(transform: Callable[[float], float]) -> Tensor:
        weight = nn.Parameter(torch.ones(4))
        optimizer = ZerothOrderSGD(
            [weight], lr=0.1, epsilon=0.3, directions=5, antithetic=antithetic,
            fitness_shaping="centered_rank",
        )  # fmt: skip
        for _ in range(10):
            optimizer.step(lambda: transform(weight.square().sum().item()))
        return weight.detach()

    assert torch.equal(run(lambda x: x), run(lambda x: math.exp(3 * x) - 100))


def test_centered_ranks_average_ties() -> None:
    weight = nn.Parameter(torch.zeros(1))
    values = iter([1.0, 5.0, 1.0, 3.0])
    optimizer = ZerothOrderSGD(
        [weight], directions=4, epsilon=1.0, antithetic=False, fitness_shaping="centered_rank"
    )
    optimizer.step(lambda: next(values))
    # Ranks 0.5, 3, 0.5, 2 of 0 … 3, over four directions.
    expected = [(rank / 3 - 0.5) / 4 for rank in (0.5, 3, 0.5, 2)]
    assert optimizer.trajectory[0].coefficients == pytest.approx(expected, abs=1e-15)


def test_maximize_is_minimising_the_negative() -> None:
    def run(sign: float, maximize: bool) -> Tensor:
        weight = nn.Parameter(torch.ones(4))
        optimizer = ZerothOrderSGD([weight], lr=0.1, maximize=maximize)
        for _ in range(5):
            optimizer.step(lambda: sign * weight.square().sum())
        return weight.detach()

    assert torch.equal(run(1.0, False), run(-1.0, True))


def test_groups_and_schedulers_set_the_rate_of_each_parameter() -> None:
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = ZerothOrderSGD(
        [{"params": [one], "lr": 0.0, "weight_decay": 0.5}, {"params": [two], "lr": 0.1}]
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        optimizer.step(lambda: two.square().sum())
        scheduler.step()
    assert [record.learning_rates for record in optimizer.trajectory] == [(0.0, 0.1), (0.0, 0.05)]
    assert optimizer.trajectory[0].weight_decays == (0.5, 0.0)
    # The walk forth and back rounds three times a step.
    torch.testing.assert_close(one.detach(), torch.ones(3), rtol=0, atol=6 * 1.2e-7)
    assert not torch.equal(two.detach(), torch.ones(3))


@pytest.mark.parametrize("exact", [False, True])
def test_continued_run_is_the_whole_run(exact: bool) -> None:
    def fresh(**given: Any) -> tuple[nn.Module, Callable[[], Tensor], ZerothOrderSGD]:
        model, loss = model_and_loss()
        return model, loss, ZerothOrderSGD(model.parameters(), **given)

    settings: Any = {"lr": 0.05, "directions": 2, "seed": 9, "exact_restore": exact}
    model, loss, optimizer = fresh(**settings)
    for _ in range(4):
        optimizer.step(loss)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    pickled = pickle.loads(pickle.dumps(optimizer))
    copied = copy.deepcopy(optimizer)
    assert pickled.trajectory == copied.trajectory == optimizer.trajectory
    for _ in range(4):
        optimizer.step(loss)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, other_loss, resumed = fresh()
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for _ in range(4):
        resumed.step(other_loss)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert resumed.trajectory == optimizer.trajectory
    assert resumed.step_count == 8
    # And from nothing but the seed of the model and the numbers of the run.
    again, _ = model_and_loss()
    replay(again.parameters(), resumed.trajectory)
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def test_half_precision_is_warned_of_lost_perturbations_once() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = ZerothOrderSGD([weight], epsilon=1e-3)
    with pytest.warns(UserWarning, match="epsilon"):
        optimizer.step(lambda: 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: 0.0)
        # The spacing of bfloat16 at 1 is 2^-7.
        weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        ZerothOrderSGD([weight], epsilon=2.01 * 2**-7).step(lambda: 0.0)
        ZerothOrderSGD([nn.Parameter(torch.ones(8))], epsilon=1e-3).step(lambda: 0.0)
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="epsilon"):
        ZerothOrderSGD([weight], epsilon=1.9 * 2**-7).step(lambda: 0.0)


def test_accuracy_itself_is_trained() -> None:
    generator = seeded()
    x = torch.randn(200, 2, generator=generator)
    y = (x @ torch.tensor([1.0, -2.0]) > 0.3).long()
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    optimizer = ZerothOrderSGD(
        model.parameters(), lr=1.0, epsilon=0.3, directions=8, maximize=True, exact_restore=True
    )

    def accuracy() -> Tensor:
        return (model(x).argmax(-1) == y).float().mean()

    for _ in range(60):
        optimizer.step(accuracy)
    assert accuracy().item() > 0.93


@pytest.mark.bad_input
def test_refusals_of_the_estimate() -> None:
    x = torch.zeros(2)

    def estimate(function: Any = lambda y: y.sum(-1), inputs: Any = x, **given: Any) -> Any:
        return zeroth_order_gradient(function, inputs, **{"epsilon": 0.1, **given})

    for epsilon in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            estimate(epsilon=epsilon)
    with pytest.raises(ValueError, match="samples"):
        estimate(samples=0)
    with pytest.raises(ValueError, match="distribution"):
        estimate(distribution="uniform")
    with pytest.raises(ValueError, match="baseline"):
        estimate(baseline="mean")
    for baseline in ("leave_one_out", "optimal"):
        with pytest.raises(ValueError, match=baseline):
            estimate(baseline=baseline, antithetic=False)
    with pytest.raises(ValueError, match=r"\(samples,\)"):
        estimate(function=lambda y: y.sum())
    with pytest.raises(ValueError, match=r"\(samples,\)"):
        estimate(function=lambda y: 1.0)
    with pytest.raises(ValueError, match="non-finite"):
        estimate(function=lambda y: y.sum(-1) / 0)
    with pytest.raises(TypeError, match="floating-point"):
        estimate(inputs=torch.zeros(2, dtype=torch.int64))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"directions": 0}, "samples"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"distribution": "sphere"}, "distribution"),
        ({"distribution": "uniform"}, "distribution"),
        ({"baseline": "optimal"}, "baseline"),
        ({"baseline": "mean"}, "baseline"),
        ({"fitness_shaping": "rank"}, "fitness_shaping"),
        ({"parallel": "model"}, "parallel"),
        ({"baseline": "leave_one_out", "antithetic": False}, "leave_one_out"),
        ({"fitness_shaping": "centered_rank", "antithetic": False}, "fitness_shaping"),
    ],
)
def test_refusals_of_the_optimizer(given: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ZerothOrderSGD([nn.Parameter(torch.zeros(2))], **given)


@pytest.mark.bad_input
def test_refusals_of_a_step_and_of_a_replay() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = ZerothOrderSGD([weight])
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: torch.zeros(2))
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match="init_process_group"):
        ZerothOrderSGD([weight], parallel="data").step(lambda: 0.0)
    with pytest.raises(TypeError, match="floating-point"):
        ZerothOrderSGD([torch.zeros(2, dtype=torch.int64)])
    optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="params"):
        replay([weight, weight], optimizer.trajectory)


@pytest.mark.gpu
def test_replay_is_bit_identical_on_a_gpu() -> None:
    for exact, distribution in itertools.product((False, True), ("normal", "rademacher")):
        weight = nn.Parameter(torch.ones(1 << 16, device="cuda"))
        optimizer = ZerothOrderSGD(
            [weight], directions=2, exact_restore=exact, distribution=distribution
        )
        for _ in range(5):
            optimizer.step(lambda weight=weight: weight.square().mean())
        again = torch.ones_like(weight)
        replay([again], optimizer.trajectory)
        assert torch.equal(again, weight)


SCRIPT = Path(__file__).parent / "processes" / "zeroth_order.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two real processes under torchrun."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "INFO",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    environment.pop("KEXUE_CHECK_SHAPES", None)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(SCRIPT), str(folder)],
        env=environment, timeout=240, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def processes() -> Any:
    spec = importlib.util.spec_from_file_location("zeroth_order_processes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_ranks_stay_bit_identical_and_give_what_one_process_gives(ranks: Path) -> None:
    script = processes()
    for name, settings in script.RUNS.items():
        one, two = (load_file(ranks / f"{name}-{rank}.safetensors") for rank in range(2))
        alone = script.train(settings, device=script.device_kind()).cpu().state_dict()
        for key, value in alone.items():
            assert torch.equal(one[key], two[key]), name
            if settings["parallel"] == "directions":
                # The same evaluations on other machines: not even rounding differs.
                assert torch.equal(one[key], value), name
            else:
                # Losses in float64 of a float32 network, 6e-8 apart, over 2 epsilon, times lr and
                # |u| up to 4, over 8 steps of three directions whose errors add at most.
                tolerance = 6e-8 * 4 / 0.01 * 0.02 * 4 * script.STEPS
                torch.testing.assert_close(one[key], value, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_only_a_table_of_scalars_travels(ranks: Path) -> None:
    script = processes()
    n = script.DIRECTIONS
    for rank in range(2):
        report = json.loads((ranks / f"report-{rank}.json").read_text())
        for name, settings in script.RUNS.items():
            check, steps = report["wire"][name][:2], report["wire"][name][2:]
            # Under debugging, two integers at the first step tell that parameters are equal.
            assert check == [8, 8]
            per_step = 16 * n if settings["antithetic"] else 8 * n + 8
            assert steps == [per_step] * script.STEPS
            assert per_step <= 16 * n + 8


@pytest.mark.slow
def test_failure_of_one_rank_reaches_all_and_leaves_them_identical(ranks: Path) -> None:
    reports = [json.loads((ranks / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert reports[1]["failure"] == "RuntimeError: no answer"
    assert "non-finite" in reports[0]["failure"]
    one, two = (load_file(ranks / f"failure-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_ranks_with_different_parameters_are_told_so(ranks: Path) -> None:
    for rank in range(2):
        report = json.loads((ranks / f"report-{rank}.json").read_text())
        assert "equal parameters" in report["apart"]


def test_the_value_of_half_inputs_is_not_rounded_to_them() -> None:
    found = zeroth_order_gradient(
        lambda z: 1e5 + z.float().sum(-1), torch.zeros(3, dtype=torch.float16), epsilon=0.1,
        samples=4, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.value.item() == pytest.approx(1e5, abs=1)
    assert found.gradient.dtype == torch.float16
