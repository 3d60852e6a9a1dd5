"""kexue.nn.residual: the size of one step, measured and taken back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kexue.nn.residual import fit_power_law, measure_update


def quadratic(model: nn.Module) -> Tensor:
    return sum((p.square().sum() / 2 for p in model.parameters()), torch.zeros(()))


def smooth() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return model, torch.randn(7, 3, dtype=torch.float64)


def test_step_on_a_quadratic_loss() -> None:
    """theta -> (1 - eta) theta, so half the squared norm changes by ((1 - eta)^2 - 1)."""
    model, _ = smooth()
    norm = sum(p.detach().square().sum().item() for p in model.parameters())
    report = measure_update(model, quadratic, learning_rate=0.1)
    assert report.loss == pytest.approx(norm / 2)
    assert report.predicted_change == pytest.approx(-0.1 * norm, rel=1e-12)
    assert report.measured_change == pytest.approx(norm / 2 * (0.9**2 - 1), rel=1e-12)
    assert report.gradient_norm_squared == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
def test_error_of_the_prediction_is_of_second_order(optimizer: str) -> None:
    model, x = smooth()

    def gap(rate: float) -> float:
        report = measure_update(
            model, lambda m: m(x).square().mean(), learning_rate=rate, optimizer=optimizer
        )
        return report.measured_change - report.predicted_change

    assert gap(1e-3) / gap(5e-4) == pytest.approx(4, rel=0.05)


def test_steps_of_the_optimisers_by_hand() -> None:
    model = nn.Linear(3, 2).double()
    torch.manual_seed(1)
    x = torch.randn(4, 3, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]

    def loss(m: nn.Module) -> Tensor:
        return m(x).sin().sum()

    gradients = torch.autograd.grad(loss(model), list(model.parameters()))
    for optimizer in ("sgd", "adam", "lamb"):
        rms = [p.detach().square().mean().sqrt() if optimizer == "lamb" else 1.0 for p in before]
        steps = [g if optimizer == "sgd" else g.sign() for g in gradients]
        other = nn.Linear(3, 2).double()
        with torch.no_grad():
            for p, b, r, s in zip(other.parameters(), before, rms, steps, strict=True):
                p.copy_(b - 0.01 * r * s)
        predicted = sum(
            -0.01 * float(r) * float((g * s).sum())
            for r, g, s in zip(rms, gradients, steps, strict=True)
        )
        report = measure_update(model, loss, learning_rate=0.01, optimizer=optimizer)
        change = (loss(other) - loss(model)).item()
        assert report.measured_change == pytest.approx(change, rel=1e-10)
        assert report.predicted_change == pytest.approx(predicted, rel=1e-12)
        parts = report.by_name
        assert parts["weight"].numel == 6
        assert (parts["weight"].ndim, parts["bias"].ndim) == (2, 1)
        total = parts["weight"].predicted_change + parts["bias"].predicted_change
        assert total == pytest.approx(predicted)
        norm_one = sum(g.abs().sum().item() for g in gradients)
        assert report.gradient_norm_one == pytest.approx(norm_one)


def test_nothing_remains_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    model(x).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients, state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    measure_update(model, lambda m: m(x).square().mean(), learning_rate=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_the_same_before_and_after() -> None:
    """With other masks the difference would be of the size of the loss, not of the rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    report = measure_update(model, lambda m: m(x).square().mean(), learning_rate=1e-7)
    assert report.measured_change == pytest.approx(report.predicted_change, rel=1e-4)


def test_model_is_restored_when_the_loss_fails() -> None:
    model, x = smooth()
    before, calls = [p.clone() for p in model.parameters()], []

    def loss(m: nn.Module) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError
        return m(x).square().mean()

    with pytest.raises(KeyError):
        measure_update(model, loss, learning_rate=0.1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_selected_and_unused_parameters() -> None:
    model, x = smooth()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    report = measure_update(model, lambda m: m(x).square().mean(), learning_rate=0.1)
    assert set(report.by_name) == {"unused", "0.weight", "2.weight", "2.bias"}
    assert report.by_name["unused"].gradient_norm_squared == 0
    matrices = measure_update(
        model, lambda m: m(x).square().mean(), learning_rate=0.1,
        parameters=lambda name, parameter: parameter.ndim == 2,
    )  # fmt: skip
    assert set(matrices.by_name) == {"0.weight", "2.weight"}


def test_gradients_that_share_their_memory_are_counted_apart() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    report = measure_update(
        Sum(), lambda m: (3 * (m.a + m.b)).sum(), learning_rate=0.1, optimizer="adam"
    )
    assert [part.gradient_norm_one for part in report.by_name.values()] == [9.0, 9.0]


def test_report_prints_finds_and_plots() -> None:
    model, x = smooth()
    good = measure_update(model, lambda m: m(x).square().mean() + 1, learning_rate=1e-3)
    assert "0.weight" in str(good)
    assert str(good).splitlines()[0].startswith("parameter")
    assert json.loads(json.dumps(good.to_dict()))["optimizer"] == "sgd"
    assert all(finding.severity == "note" for finding in good.findings())
    too_far = measure_update(model, lambda m: m(x).square().mean(), learning_rate=100.0)
    assert too_far.findings()[0].severity == "error"
    assert "lower the rate" in too_far.findings()[0].advice
    ax = good.plot()
    assert len(ax.patches) == 4
    assert good.plot(ax) is ax


def test_vectors_that_carry_the_step_are_found() -> None:
    model = nn.Linear(2, 3)
    report = measure_update(model, lambda m: m(torch.zeros(1, 2)).sum() + 9, learning_rate=1e-3)
    assert [finding.where for finding in report.findings()] == ["(vectors)"]
    assert "100%" in report.findings()[0].message


def test_power_law_is_the_least_squares_line() -> None:
    generator = np.random.default_rng(0)
    x = np.array([8, 16, 32, 64, 128.0])
    y = 3 * x**-0.7 * np.exp(0.1 * generator.normal(size=5))
    fit = fit_power_law(x, y)
    design = np.stack([np.ones(5), np.log(x)], 1)
    solution, residual, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    covariance = residual[0] / 3 * np.linalg.inv(design.T @ design)
    assert fit.log_intercept == pytest.approx(solution[0])
    assert fit.exponent == pytest.approx(solution[1])
    assert fit.standard_error == pytest.approx(covariance[1, 1] ** 0.5)
    assert math.isnan(fit_power_law([1, 2], [3, 4]).standard_error)


@pytest.mark.bad_input
def test_wrong_calls_are_refused() -> None:
    model, x = smooth()

    def loss(m: nn.Module) -> Tensor:
        return m(x).square().mean()

    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning_rate"):
            measure_update(model, loss, learning_rate=rate)
    with pytest.raises(ValueError, match="sgd, adam, lamb, got 'adagrad'"):
        measure_update(model, loss, learning_rate=0.1, optimizer="adagrad")
    with pytest.raises(ValueError, match="no trainable parameter"):
        measure_update(model, loss, learning_rate=0.1, parameters=lambda name, p: False)
    with pytest.raises(ValueError, match=r"one element, got \(7, 1\)"):
        measure_update(model, lambda m: m(x), learning_rate=0.1)
    with pytest.raises(ValueError, match="one element, got float"):
        measure_update(model, lambda m: 1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="finite loss, got nan"):
        measure_update(model, lambda m: m(x).sum() * math.nan, learning_rate=0.1)
    with pytest.raises(ValueError, match="got a constant"):
        measure_update(model, lambda m: torch.ones(()), learning_rate=0.1)
    with pytest.raises(TypeError, match=r"nn\.Module, got int"):
        measure_update(3, loss, learning_rate=0.1)
    for x_, y_, message in (
        ([1, 2], [1, 2, 3], "same length"), ([1], [1], "two points"), ([1, 0], [1, 1], "positive"),
        ([1, 2], [1, math.nan], "positive"), ([2, 2], [1, 3], "all equal"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fit_power_law(x_, y_)
