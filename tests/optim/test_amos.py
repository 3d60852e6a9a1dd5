"""Tests of kexue.optim.amos."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.optim import (
    Amos,
    ScaleDecayLR,
    amos_parameter_groups,
    parameter_scale,
    relative_scale_groups,
    scale_decay,
)
from kexue.optim.amos.update import advance

LAYOUTS = ("per_row", "per_column", "per_tensor", "per_element")
MATRIX = [[1.0, -2.0], [0.5, 3.0]]
GRADIENTS = [[[1, 2], [3, -4]], [[-1, 0.5], [2, 2]], [[0, 1], [-1, 5]]]
MATRIX_AFTER = [
    [[0.979188611699158, -2.0216227766016837], [0.4762867965644036, 3.013284271247462]],
    [[0.9974834126971244, -2.027608704869139], [0.4574592287132281, 2.988139999057593]],
    [[0.9952970525412798, -2.046573174537051], [0.462403838889359, 2.92868673540132]],
]


def parameter(values: Any, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())


def step(optimizer: torch.optim.Optimizer, gradients: dict[Tensor, Any]) -> None:
    for one, gradient in gradients.items():
        one.grad = torch.as_tensor(gradient, dtype=one.dtype).clone()
    optimizer.step()


def follow(start: Any, gradients: list[Any], **options: Any) -> tuple[nn.Parameter, Amos]:
    """Where a parameter ends that meets these gradients."""
    theta = parameter(start)
    optimizer = Amos([theta], **options)
    for gradient in gradients:
        step(optimizer, {theta: gradient})
    return theta, optimizer


def random_steps(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), [rng.standard_normal(shape) for _ in range(count)]


def by_the_paper(
    theta: np.ndarray,
    gradients: list[np.ndarray],
    axes: tuple[int, ...],
    *,
    xi: float,
    eta: float,
    beta: float,
    zeta: float = 0.25,
    rate: float = 1.0,
    b: float = 0.0,
    momentum: float = 0.0,
) -> np.ndarray:
    """The algorithm of the paper, written down once more in numpy."""
    v = m = 0.0
    for t, g in enumerate(gradients, start=1):
        g2 = np.mean(g**2, axis=axes, keepdims=True) if axes else g**2
        v = beta * v + (1 - beta) * g2
        v_hat = v / (1 - beta**t)
        c = 1 / np.sqrt(1 + zeta * math.sqrt(xi) * b)
        d = 1 / (1 + zeta * math.sqrt(xi * eta) * b)
        gamma = math.sqrt(rate) * c * xi**2 * g2 / v_hat
        delta = -rate * d * (xi * eta * g / np.sqrt(v_hat) + gamma * theta / 2)
        b = b + gamma * (rate + b)
        m = momentum * m + (1 - momentum) * delta
        theta = theta + m
    return theta


# The algorithm. Numbers with many digits: mpmath, 30 digits, from the formulas of the paper.


@pytest.mark.parametrize(
    ("xi", "after"),
    [(0.01, {1: 1.0e-4, 2: 2.00009874988e-4, 100: 0.0100490352451, 1000: 0.105094168765}),
     (0.05, {1000: 9.15534020113})],
)  # fmt: skip
def test_decay_under_a_constant_gradient(xi: float, after: dict[int, float]) -> None:
    theta = parameter(0.0)
    optimizer = Amos([theta], lr=xi, scale=0.5)
    for n in range(1, max(after) + 1):
        step(optimizer, {theta: 3.7})
        if n in after:
            # 12 digits are given.
            assert optimizer.state[theta]["decay"].item() == pytest.approx(after[n], rel=1e-11)


@pytest.mark.slow
def test_decay_and_both_its_factors_after_a_hundred_thousand_steps() -> None:
    xi, eta = 0.01, 0.5
    group = {"lr": xi, "decay_coefficient": 0.25, "finetune_rate": 1.0, "beta": 0.0, "eps": 1e-30}
    v = b = torch.zeros((), dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for _ in range(100_000):
        v, b, _, _ = advance(one, v, b, 1.0, eta, group)
    # Each step rounds b by 1e-16 of it, and 1e5 roundings grow with it: below 1e-11.
    assert b.item() == pytest.approx(527.177138928, rel=1e-11)
    _, _, of_gradient, of_parameter = advance(one, v, b, 1.0, eta, group)
    d = -of_gradient.item() / (xi * eta)
    c = -2 * of_parameter.item() / d / xi**2
    assert c == pytest.approx(0.265564877732, rel=1e-11)
    assert d == pytest.approx(0.0969061430263, rel=1e-11)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e8])
def test_scalar_under_a_constant_gradient_of_any_size(size: float) -> None:
    theta = parameter(1.0)
    optimizer = Amos([theta], lr=0.01, scale=0.5)
    seen = []
    for _ in range(10):
        step(optimizer, {theta: size})
        seen.append(theta.item())
    expected = [0.99495, 0.98990026148895, 0.94951176535354]
    assert [seen[0], seen[1], seen[9]] == pytest.approx(expected, abs=1e-14)
    assert optimizer.state[theta]["decay"].item() == pytest.approx(0.00100044448854, rel=1e-11)


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"capturable": True}])
def test_matrix_with_one_slot_a_row(way: dict[str, bool]) -> None:
    theta = parameter(MATRIX)
    optimizer = Amos([theta], lr=0.1, scale=0.25, beta=0.9, slots="per_row", **way)
    for gradient, expected in zip(GRADIENTS, MATRIX_AFTER, strict=True):
        step(optimizer, {theta: gradient})
        # A dozen roundings of numbers up to 3.
        np.testing.assert_allclose(theta.detach().numpy(), expected, rtol=0, atol=2e-14)
    state = optimizer.state[theta]
    np.testing.assert_allclose(state["second_moment"].numpy(), [[0.30875], [2.6725]], rtol=1e-13)
    np.testing.assert_allclose(
        state["decay"].numpy(), [[0.018618451891], [0.028404075217]], rtol=1e-10
    )


@settings(max_examples=25, deadline=None)
@given(
    slots=st.sampled_from(LAYOUTS),
    shape=st.sampled_from([(), (1,), (5,), (3, 4), (4, 1), (2, 3, 2), (1, 3, 2, 2)]),
    momentum=st.sampled_from([0.0, 0.9]),
    rate=st.floats(0.1, 1.0),
    decay=st.floats(0.0, 100.0),
    xi=st.floats(1e-3, 0.2),
    foreach=st.booleans(),
)
def test_every_layout_is_the_algorithm_of_the_paper(
    slots: str,
    shape: tuple[int, ...],
    momentum: float,
    rate: float,
    decay: float,
    xi: float,
    foreach: bool,
) -> None:
    ndim = len(shape)
    axes = {
        "per_row": tuple(range(1, ndim)),
        "per_column": tuple(range(ndim - 1)),
        "per_tensor": tuple(range(ndim)),
        "per_element": (),
    }[slots]
    start, gradients = random_steps(shape, 5)
    theta, _ = follow(
        start, gradients, lr=xi, scale=0.3, beta=0.95, slots=slots, momentum=momentum,
        finetune_rate=rate, initial_decay=decay, foreach=foreach,
    )  # fmt: skip
    expected = by_the_paper(
        start, gradients, axes, xi=xi, eta=0.3, beta=0.95, rate=rate, b=decay, momentum=momentum
    )
    np.testing.assert_allclose(theta.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_slots_have_the_shape_of_their_layout() -> None:
    shapes = {
        ("auto", (4, 3)): (4, 1), ("auto", (4, 3, 2, 2)): (4, 1, 1, 1), ("auto", (4,)): (),
        ("auto", ()): (), ("per_row", (4, 3)): (4, 1), ("per_column", (4, 3, 2)): (1, 1, 2),
        ("per_tensor", (4, 3)): (), ("per_element", (4, 3)): (4, 3),
    }  # fmt: skip
    for (slots, shape), expected in shapes.items():
        theta, optimizer = follow(np.ones(shape), [np.ones(shape)], slots=slots)
        state = optimizer.state[theta]
        assert state["second_moment"].shape == state["decay"].shape == expected
        assert set(state) == {"step", "second_moment", "decay"}


def test_first_step_is_lr_times_scale_for_any_gradient() -> None:
    _, [gradient] = random_steps((6, 5), 1)
    for size in (1e-8, 1.0, 1e8):
        theta, _ = follow(np.zeros((6, 5)), [size * gradient], lr=0.02, scale=0.3)
        rms = theta.detach().square().mean(dim=1).sqrt()
        np.testing.assert_allclose(rms.numpy(), 0.02 * 0.3, rtol=1e-13)


def test_trajectory_does_not_see_the_size_of_the_gradient() -> None:
    start, gradients = random_steps((4, 3), 8)
    one, _ = follow(start, gradients, lr=0.05)
    other, _ = follow(start, [1e-5 * g for g in gradients], lr=0.05)
    np.testing.assert_allclose(other.detach().numpy(), one.detach().numpy(), rtol=1e-12)


def test_trajectory_scales_with_parameter_and_scale_as_long_as_nothing_decays() -> None:
    start, gradients = random_steps((4, 3), 8)
    options = {"lr": 0.05, "decay_coefficient": 0.0}
    one, _ = follow(start, gradients, scale=0.2, **options)
    other, _ = follow(7 * start, [g / 7 for g in gradients], scale=7 * 0.2, **options)
    np.testing.assert_allclose(other.detach().numpy(), 7 * one.detach().numpy(), rtol=1e-12)


def test_without_gradient_nothing_moves() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        theta = parameter(MATRIX, dtype)
        optimizer = Amos([theta], lr=0.1, momentum=0.9)
        for _ in range(3):
            step(optimizer, {theta: torch.zeros(2, 2)})
        assert theta.tolist() == MATRIX
        assert optimizer.state[theta]["decay"].tolist() == [[0.0], [0.0]]


def test_dead_rows_stay_while_others_move() -> None:
    theta, _ = follow(MATRIX, [[[0.0, 0.0], [1.0, 1.0]]], lr=0.1)
    assert theta[0].tolist() == MATRIX[0]
    assert (theta[1].detach() != torch.tensor(MATRIX[1])).all()


def test_agrees_with_pytorch_optimizer_where_that_has_the_same_slots() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    rng = np.random.default_rng(0)
    shapes = [(5, 4), (7,), (3, 6)]
    ours = [parameter(rng.standard_normal(shape)) for shape in shapes]
    theirs = [parameter(p.detach()) for p in ours]
    groups = [
        {"params": [p], "scale": math.sqrt(2 / p.shape[1]) if p.ndim == 2 else 0.5} for p in ours
    ]
    one = Amos(groups, lr=0.05, momentum=0.9, slots="per_tensor")
    # Its eps is added to v where ours bounds it.
    other = peer.Amos(theirs, lr=0.05, momentum=0.9, extra_l2=0.0, eps=0.0)
    for _ in range(50):
        gradients = [rng.standard_normal(shape) for shape in shapes]
        step(one, dict(zip(ours, gradients, strict=True)))
        step(other, dict(zip(theirs, gradients, strict=True)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=0, atol=1e-14)


# Numbers: types, ranges, ways to run.


def test_constant_gradient_has_a_ratio_of_one_in_single_precision_too() -> None:
    theta = parameter([1.0], torch.float32)
    optimizer = Amos([theta], lr=1e-3, beta=0.999, scale=1.0)
    for _ in range(300):
        step(optimizer, {theta: [0.3]})
    xi, b = 1e-3, 0.0
    for _ in range(300):
        b += (1 + 0.25 * math.sqrt(xi) * b) ** -0.5 * xi**2 * (1 + b)
    # 300 roundings of v and of b, half a unit in the last place each, at random.
    assert optimizer.state[theta]["decay"].item() == pytest.approx(b, rel=300 * 6e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("capturable", [False, True])
def test_joined_and_single_parameters_agree(
    dtype: torch.dtype, tolerance: float, momentum: float, capturable: bool
) -> None:
    shapes = [(8, 16), (4, 16), (16,), (16,), (3, 4, 2, 2), (5, 7), (), (2, 8, 2), (16, 8)]

    def trained(foreach: bool, slots: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda: [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]  # noqa: E731
        parameters = [parameter(value, dtype) for value in draw()]
        optimizer = Amos(
            parameters, lr=0.05, momentum=momentum, slots=slots, foreach=foreach,
            capturable=capturable,
        )  # fmt: skip
        for n in range(6):
            gradients = dict(zip(parameters, draw(), strict=True))
            if n == 2:  # from here on the steps differ
                del gradients[parameters[0]]
                parameters[0].grad = None
            step(optimizer, gradients)
        return [p.detach() for p in parameters]

    for slots in ("auto", *LAYOUTS):
        for one, other in zip(trained(False, slots), trained(True, slots), strict=True):
            difference = (one - other).abs().max() / other.abs().max()
            assert difference <= tolerance


def test_joined_matrices_have_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from kexue.optim.amos import update

    entries = [
        update.Entry(torch.zeros(n), *[torch.zeros(n)] * 3, None, 1.0, 1.0) for n in (3, 3, 9, 1)
    ]
    monkeypatch.setattr(update, "_JOINED_TOTAL", 6)
    cut = update.portions(entries)
    assert [[e.parameter.numel() for e in part] for part in cut] == [[3, 3], [9], [1]]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_and_rounded_once(
    dtype: torch.dtype, foreach: bool
) -> None:
    start, [gradient] = random_steps((4, 8), 1)
    theta = parameter(start, dtype)
    exact = parameter(theta.detach(), torch.float32)
    options = {"lr": 0.1, "scale": 0.5, "foreach": foreach}
    optimizer, single = Amos([theta], **options), Amos([exact], **options)
    # Squares of 300 and more are out of the range of float16.
    half = torch.as_tensor(300 * gradient).to(dtype)
    step(optimizer, {theta: half})
    step(single, {exact: half.float()})
    assert torch.equal(theta.detach(), exact.detach().to(dtype))
    state = optimizer.state[theta]
    assert state["second_moment"].dtype == state["decay"].dtype == torch.float32


def test_slots_are_single_below_double_and_the_average_follows_the_parameter() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        theta = parameter(MATRIX, dtype)
        optimizer = Amos([theta], momentum=0.5)
        step(optimizer, {theta: MATRIX})
        state = optimizer.state[theta]
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert state["second_moment"].dtype == state["decay"].dtype == expected
        assert state["momentum_buffer"].dtype == dtype
        assert state["step"].dtype == torch.float32


def test_parameters_without_gradient_or_entries_are_passed_over() -> None:
    used, unused, empty = parameter([1.0]), parameter([1.0]), parameter(np.ones((0, 3)))
    optimizer = Amos([used, unused, empty], lr=0.1)
    empty.grad = torch.zeros_like(empty)
    step(optimizer, {used: [1.0]})
    step(optimizer, {used: [1.0]})
    assert optimizer.state[used]["step"].item() == 2
    assert unused not in optimizer.state
    assert unused.item() == 1.0
    step(optimizer, {unused: [1.0]})
    assert optimizer.state[unused]["step"].item() == 1


@pytest.mark.parametrize("foreach", [False, True])
def test_maximizing_goes_the_other_way_and_leaves_the_gradient(foreach: bool) -> None:
    start, gradients = random_steps((3, 4), 4)
    down, _ = follow(start, [-g for g in gradients], lr=0.1, foreach=foreach)
    up, _ = follow(start, gradients, lr=0.1, maximize=True, foreach=foreach)
    assert torch.equal(up, down)
    assert torch.equal(up.grad, torch.as_tensor(gradients[-1]))


class NothingIsReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [False, True])
def test_capturable_step_reads_nothing_back_and_takes_a_tensor_for_lr(foreach: bool) -> None:
    start, gradients = random_steps((3, 4), 4)
    expected, _ = follow(start, gradients, lr=0.1)
    theta = parameter(start)
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = Amos([theta], lr=rate, capturable=True, foreach=foreach)
    for gradient in gradients:
        theta.grad = torch.as_tensor(gradient)
        with NothingIsReadBack():
            optimizer.step()
    # 1 - β^t is -expm1(t log β) here.
    np.testing.assert_allclose(theta.detach().numpy(), expected.detach().numpy(), rtol=1e-12)


def test_gradients_flow_through_differentiable_steps() -> None:
    start, gradients = random_steps((2, 3), 3)

    def end(lr: Tensor, first: Tensor) -> Tensor:
        theta = torch.as_tensor(start).requires_grad_().clone()
        optimizer = Amos([theta], lr=lr, scale=0.3, beta=0.9, momentum=0.5, differentiable=True)
        for gradient in [first, *map(torch.as_tensor, gradients[1:])]:
            theta.grad = gradient
            optimizer.step()
        return theta

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    first = torch.as_tensor(gradients[0]).requires_grad_()
    assert torch.autograd.gradcheck(end, (lr, first))


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"momentum": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_dict_continues_bit_for_bit(dtype: torch.dtype, way: dict[str, Any]) -> None:
    start, gradients = random_steps((3, 4), 6)
    one, other = parameter(start, dtype), parameter(start, dtype)
    optimizer = Amos([{"params": [one], "scale": 0.3, "names": ["weight"]}], lr=0.1, **way)
    for gradient in gradients[:3]:
        step(optimizer, {one: gradient})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = Amos([other], lr=0.7)
    again.load_state_dict(torch.load(file, weights_only=True))
    other.data.copy_(one.data)
    for gradient in gradients[3:]:
        step(optimizer, {one: gradient})
        step(again, {other: gradient})
    assert torch.equal(one, other)
    for name, value in optimizer.state[one].items():
        assert torch.equal(value, again.state[other][name])
        assert value.dtype == again.state[other][name].dtype


def test_loaded_state_is_not_shared() -> None:
    one, optimizer = follow(MATRIX, GRADIENTS, lr=0.1)
    other = parameter(one.detach())
    again = Amos([other], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    step(optimizer, {one: GRADIENTS[0]})
    step(again, {other: GRADIENTS[0]})
    assert torch.equal(one, other)


def test_groups_have_options_of_their_own_and_may_come_later() -> None:
    one, other = parameter(MATRIX), parameter(MATRIX)
    optimizer = Amos([{"params": [one], "scale": 0.25, "slots": "per_row"}], lr=0.1, beta=0.9)
    step(optimizer, {one: GRADIENTS[0]})
    optimizer.add_param_group({"params": [other], "lr": 0.0})
    step(optimizer, {one: GRADIENTS[1], other: GRADIENTS[1]})
    np.testing.assert_allclose(one.detach().numpy(), MATRIX_AFTER[1], rtol=0, atol=2e-14)
    assert other.tolist() == MATRIX


def test_state_is_a_small_share_of_that_of_adamw() -> None:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)

    def state(optimizer: torch.optim.Optimizer) -> int:
        layer(torch.randn(1, 4, 256)).sum().backward()
        optimizer.step()
        return sum(
            value.numel() * value.element_size()
            for slots in optimizer.state.values()
            for value in slots.values()
        )

    adamw = state(torch.optim.AdamW(layer.parameters()))
    assert state(Amos(layer.parameters())) < 0.02 * adamw
    assert state(Amos(layer.parameters(), momentum=0.9)) <= 0.51 * adamw


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", math.nan), ("beta", 1.0), ("beta", -0.1), ("momentum", 1.0),
     ("momentum", -0.5), ("decay_coefficient", -0.25), ("scale", 0.0), ("scale", -1.0),
     ("finetune_rate", 0.0), ("initial_decay", -1.0), ("slots", "per_layer"), ("eps", 0.0)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(option: str, value: Any) -> None:
    for params, options in [
        ([parameter(MATRIX)], {option: value}),
        ([{"params": [parameter(MATRIX)], option: value}], {}),
    ]:
        with pytest.raises(ValueError, match=rf"{option} must .*{re.escape(str(value))}"):
            Amos(params, **options)
    optimizer = Amos([parameter(MATRIX)])
    with pytest.raises(ValueError, match=option):
        optimizer.add_param_group({"params": [parameter(MATRIX)], option: value})
    assert len(optimizer.param_groups) == 1


def test_what_cannot_be_stepped_is_refused() -> None:
    with pytest.raises(ValueError, match="foreach=True"):
        Amos([parameter(MATRIX)], foreach=True, differentiable=True)
    with pytest.raises(TypeError, match="complex128"):
        Amos([nn.Parameter(torch.ones(2, dtype=torch.complex128))])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        Amos([parameter(MATRIX)], lr=torch.ones(2))
    words = nn.Embedding(5, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Amos(words.parameters()).step()


# Scales and groups.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.words.weight
        self.free = nn.Parameter(torch.ones(8, 2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["names"]}


def test_scale_of_layers() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), groups=2)
    words = nn.Embedding(100, 32)
    assert parameter_scale(nn.Linear(64, 10).weight) == 1 / 8
    assert parameter_scale(conv.weight) == math.sqrt(1 / (2 * 15))
    assert parameter_scale(words.weight, owner=words, name="weight") == math.sqrt(2 / 32)
    assert parameter_scale(words.weight) == math.sqrt(1 / 32)
    assert parameter_scale(torch.ones(7)) == parameter_scale(torch.tensor(1.0)) == 0.5


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm((2, 4)), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.BatchNorm3d(4),
     nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4), nn.SyncBatchNorm(4)],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_weights_of_norms_have_a_scale_of_one(norm: Any) -> None:
    assert parameter_scale(norm.weight, owner=norm) == 1.0
    assert parameter_scale(norm.weight, owner=norm, name="blocks.3.norm.weight") == 1.0
    if getattr(norm, "bias", None) is not None and norm.bias.ndim == 1:
        assert parameter_scale(norm.bias, owner=norm, name="bias") == 0.5
        assert parameter_scale(norm.bias, owner=norm) == 0.5


def test_groups_hold_each_trainable_parameter_once() -> None:
    model = Model()
    groups = amos_parameter_groups(model)
    assert by_name(groups, "scale") == {
        "free": math.sqrt(1 / 2),
        "words.weight": math.sqrt(2 / 8),
        "conv.weight": math.sqrt(1 / 24),
        "conv.bias": 0.5,
        "norm.weight": 1.0,
        "norm.bias": 0.5,
        "head.bias": 0.5,
    }
    scales = [group["scale"] for group in groups]
    assert len(scales) == len(set(scales))
    named = dict(model.named_parameters())
    for group in groups:
        assert set(group) == {"params", "scale", "names"}
        for name, value in zip(group["names"], group["params"], strict=True):
            assert value is named[name]
    Amos(groups)


def test_first_matching_rule_sets_the_scale() -> None:
    rules: dict[str, float | Callable[[Tensor], float]] = {
        r"^conv\.weight$": lambda kernel: math.sqrt(2 / kernel[0].numel()),
        r"weight": 0.125,
        r"^conv": 3.0,
    }
    scales = by_name(amos_parameter_groups(Model(), scale_rules=rules), "scale")
    assert scales["conv.weight"] == math.sqrt(2 / 24)
    assert scales["norm.weight"] == scales["words.weight"] == 0.125
    assert scales["conv.bias"] == 3.0
    assert scales["norm.bias"] == 0.5


def test_relative_rate_on_adamw() -> None:
    groups = relative_scale_groups(nn.Linear(768, 768, bias=False))
    [group] = groups
    assert group["lr"] == pytest.approx(3.608439182435161e-05, rel=1e-14)
    assert group["weight_decay"] == pytest.approx(0.013856406460551, rel=1e-13)
    assert set(group) == {"params", "lr", "weight_decay", "scale", "names"}


@pytest.mark.parametrize(("sigma", "decay"), [(0.05, 0.01), (0.02, 0.025)])
def test_folklore_weight_decay_appears(sigma: float, decay: float) -> None:
    [group] = relative_scale_groups(nn.Linear(4, 4, bias=False), scale_rules={"": sigma})
    assert group["weight_decay"] == pytest.approx(decay, rel=1e-14)


def test_weights_of_norms_travel_half_and_do_not_decay() -> None:
    model = Model()
    groups = relative_scale_groups(model, relative_lr=0.01)
    assert by_name(groups, "scale")["norm.weight"] == 0.5
    assert by_name(groups, "weight_decay")["norm.weight"] == 0.0
    assert by_name(groups, "weight_decay")["norm.bias"] == pytest.approx(0.01)
    decaying = relative_scale_groups(model, relative_lr=0.01, decay_norms=True)
    assert by_name(decaying, "weight_decay")["norm.weight"] == pytest.approx(0.01)


def test_decay_per_step_is_that_of_the_derivation_at_every_step() -> None:
    alpha, q, rms, half_life = 0.01, 1.5, 0.3, 20
    model = Model()
    groups = relative_scale_groups(model, relative_lr=alpha, q=q, update_rms=rms, decay_norms=True)
    optimizer = torch.optim.AdamW(groups)
    schedule = ScaleDecayLR(optimizer, half_life=half_life)
    for t in range(50):
        f = 1 / (1 + t / half_life)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(alpha * group["scale"] / rms * f, rel=1e-13)
            rho = group["lr"] * group["weight_decay"]
            assert rho == pytest.approx(alpha**2 / (2 * q) * f, rel=1e-13)
        optimizer.step()
        schedule.step()


@pytest.mark.bad_input
def test_bad_groups_are_refused_by_name() -> None:
    for option in ("relative_lr", "q", "update_rms"):
        for value in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"{option} must .*{value}"):
                relative_scale_groups(Model(), **{option: value})
    with pytest.raises(ValueError, match=r"scale of norm\.weight must .*-1"):
        amos_parameter_groups(Model(), scale_rules={"norm": -1.0})
    with pytest.raises(ValueError, match="regular expressions"):
        amos_parameter_groups(Model(), scale_rules={"(": 1.0})
    with pytest.raises(TypeError, match="list"):
        amos_parameter_groups([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="float"):
        parameter_scale(0.5)


# The schedule.


def test_schedule_at_four_times() -> None:
    expected = {
        "inverse_time": [0.6666666666666666, 0.5, 0.25, 0.09090909090909091],
        "inverse_square": [0.6862915010152396, 0.5, 0.1988294017779445, 0.03781925296427915],
    }
    for kind, factors in expected.items():
        found = [scale_decay(t, half_life=1000, kind=kind) for t in (500, 1000, 3000, 10_000)]
        assert found == pytest.approx(factors, rel=1e-15)


def test_schedule_is_the_continuous_limit_of_the_recursion() -> None:
    rate = 1e-3

    def factor(steps: int, *, slows: bool) -> float:
        s = 0.0
        for _ in range(steps):
            s += rate * math.exp(-2 * s if slows else -s)
        return math.exp(-2 * s)

    found = [factor(1000, slows=False), factor(10_000, slows=False), factor(1000, slows=True)]
    assert found == pytest.approx([0.249913336622, 0.00826266122064, 0.3332112199], rel=1e-10)
    square_life, time_life = (math.sqrt(2) - 1) / rate, 1 / (2 * rate)
    closed = [
        scale_decay(1000, half_life=square_life, kind="inverse_square"),
        scale_decay(10_000, half_life=square_life, kind="inverse_square"),
        scale_decay(1000, half_life=time_life),
    ]
    assert closed == pytest.approx([0.25, 0.00826446280992, 1 / 3], rel=1e-12)
    # One step of the recursion is off by the order of its rate.
    assert found == pytest.approx(closed, rel=rate)


def test_schedule_warms_up_then_decays_every_group() -> None:
    groups = [{"params": [parameter([1.0])], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = ScaleDecayLR(optimizer, half_life=2, kind="inverse_time", warmup_steps=3)
    seen = []
    for _ in range(6):
        assert schedule.get_last_lr()[1] == pytest.approx(0.1 * schedule.get_last_lr()[0])
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 2])


def test_schedule_resumes() -> None:
    def new() -> tuple[torch.optim.Optimizer, ScaleDecayLR]:
        optimizer = torch.optim.AdamW([parameter([1.0])], lr=0.1)
        return optimizer, ScaleDecayLR(optimizer, half_life=5, warmup_steps=2)

    optimizer, schedule = new()
    for _ in range(7):
        optimizer.step()
        schedule.step()
    again, continued = new()
    again.load_state_dict(optimizer.state_dict())
    continued.load_state_dict(schedule.state_dict())
    for each in (optimizer, schedule, again, continued):
        each.step()
    assert continued.get_last_lr() == schedule.get_last_lr() == [0.1 / (1 + 6 / 5)]


def test_schedule_fills_a_tensor_rate_in_place() -> None:
    rate = torch.tensor(0.4)
    optimizer = torch.optim.AdamW([parameter([1.0])], lr=rate)
    schedule = ScaleDecayLR(optimizer, half_life=1)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.2)


@pytest.mark.bad_input
def test_bad_schedules_are_refused() -> None:
    optimizer = torch.optim.SGD([parameter([1.0])], lr=1.0)
    for options, words in [
        ({"half_life": 0.0}, "half_life must .*0"),
        ({"half_life": -3.0}, "half_life must .*-3"),
        ({"half_life": 1.0, "kind": "cosine"}, "kind must .*'cosine'"),
        ({"half_life": 1.0, "warmup_steps": -1}, "warmup_steps must .*-1"),
    ]:
        with pytest.raises(ValueError, match=words):
            ScaleDecayLR(optimizer, **options)
        if "warmup_steps" not in options:
            with pytest.raises(ValueError, match=words):
                scale_decay(1.0, **options)
    with pytest.raises(ValueError, match=r"step must .*-1"):
        scale_decay(-1.0, half_life=1.0)


# Doors.


def test_schedulers_of_torch_drive_amos() -> None:
    start, gradients = random_steps((3, 4), 4)
    theta = parameter(start)
    optimizer = Amos([theta], lr=0.1, scale=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    for gradient in gradients:
        step(optimizer, {theta: gradient})
        schedule.step()
    expected = parameter(start)
    by_hand = Amos([expected], lr=0.1, scale=0.3)
    for t, gradient in enumerate(gradients):
        by_hand.param_groups[0]["lr"] = 0.1 / (t + 1)
        step(by_hand, {expected: gradient})
    assert torch.equal(theta, expected)


def test_one_cycle_policy_may_switch_the_momentum_on() -> None:
    theta = parameter(MATRIX)
    optimizer = Amos([theta], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    for gradient in GRADIENTS:
        step(optimizer, {theta: gradient})
        schedule.step()
    assert optimizer.state[theta]["momentum_buffer"].shape == theta.shape
    late, without = follow(MATRIX, GRADIENTS[:1], lr=0.1)
    without.param_groups[0]["momentum"] = 0.9
    step(without, {late: GRADIENTS[1]})
    assert without.state[late]["momentum_buffer"].abs().sum() > 0


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sentences whose every token is followed by the next number."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(8) + index) % 11
        return {"input_ids": tokens, "labels": tokens}


def test_trainer_of_transformers_takes_amos_and_resumes_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trainer(folder: str, **options: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2,
                                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        )  # fmt: skip
        optimizer = Amos(amos_parameter_groups(model), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 4))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, per_device_train_batch_size=8,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0,
            save_strategy="steps", save_steps=3, dataloader_num_workers=0,
        )  # fmt: skip
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=Pairs(), optimizers=(optimizer, schedule)
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
    assert {len(state) for state in resumed.optimizer.state.values()} == {4}


def test_gradient_scaler_and_clipping_come_before_the_step() -> None:
    model = nn.Linear(4, 3)
    optimizer = Amos(amos_parameter_groups(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.weight, before)


COMPILED = """
import torch
from kexue.optim import Amos

def new(**options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5, 3), (4,), (2, 3, 2)]
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return parameters, Amos(parameters, capturable=True, **options)

for options in ({"lr": 0.1}, {"lr": 0.1, "foreach": True, "momentum": 0.9},
                {"lr": torch.tensor(0.1)}):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, one = new(**options)
    compiled, other = new(**options)
    step = torch.compile(other.step, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for a, b in zip(eager, compiled):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        step()
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
print("one graph")
"""


@pytest.mark.slow
def test_step_compiles_to_one_graph() -> None:
    # Not in this process: shape checks on the package cannot be traced.
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {key: value for key, value in os.environ.items() if key != "KEXUE_CHECK_SHAPES"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False,
        env={**environment, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert done.stdout.strip() == "one graph", done.stderr


@pytest.mark.parametrize("foreach", [False, True])
def test_a_gradient_whose_square_is_no_number_does_no_harm(foreach: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Amos([parameter], lr=0.1, foreach=foreach)
    parameter.grad = torch.full_like(parameter, 2e19)
    optimizer.step()
    state = optimizer.state[parameter]
    assert parameter.isfinite().all()
    assert all(slot.isfinite().all() for slot in state.values() if isinstance(slot, torch.Tensor))
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.isfinite().all()
    assert bool(((parameter - before).abs() < 1).all())
