"""TaiLr on logits: values from mpmath at 30 digits, identities, and torch's cross entropy."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import TaiLrLoss, tailr_loss, token_weight

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
DIGITS = 1e-12  # the oracles below are printed with 13 to 14 digits

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 1])


def two_classes(p: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits of one sample whose class 0 has probability p."""
    return torch.tensor([[math.log(p), math.log1p(-p) if p < 1 else -math.inf]], dtype=dtype)


def loss_at(p: float, gamma: float, min_weight: float = 0.0) -> float:
    options = {"gamma": gamma, "min_weight": min_weight}
    return tailr_loss(two_classes(p), torch.tensor([0]), **options).item()


def exact_loss(lp: float, gamma: float) -> mpmath.mpf:
    """The loss at a log-probability, with 50 digits."""
    with mpmath.workdps(50):
        g, p = mpmath.mpf(gamma), mpmath.exp(mpmath.mpf(lp))
        return 1 - p if g == 1 else -mpmath.log(g + (1 - g) * p) / (1 - g)


# Values.


@pytest.mark.parametrize(
    ("p", "gamma", "loss", "weight"),
    [
        (0.5, 0.1, 0.66426333417291, 0.909090909091),
        (0.01, 0.1, 2.4626748852811, 0.0917431192661),
        (1e-6, 1e-7, 13.720201841089, 0.909090991736),
        (0.3, 0.8, 0.75411444867292, 0.348837209302),
        (0.9, 0.5, 0.1025865887751, 0.947368421053),
        (0.25, 1.0, 0.75, 0.25),
    ],
)
def test_loss_and_weight_of_a_probability(
    p: float, gamma: float, loss: float, weight: float
) -> None:
    assert loss_at(p, gamma) == pytest.approx(loss, rel=DIGITS)
    log_probability = torch.tensor(math.log(p), dtype=torch.float64)
    assert token_weight(log_probability, gamma=gamma).item() == pytest.approx(weight, rel=1e-11)


@pytest.mark.parametrize(
    ("p", "gamma", "min_weight", "loss", "join"),
    [
        (0.001, 0.1, 0.2, 2.9767634805336, 0.024390243902439),
        (0.5, 0.1, 0.2, 0.66426333417291, 0.024390243902439),
        (0.001, 1.0, 0.3, 2.4111347423969, 0.3),
        (0.05, 0.8, 0.1, 1.0637248536398, 0.081632653061224),
    ],
)
def test_loss_with_a_minimum_weight(
    p: float, gamma: float, min_weight: float, loss: float, join: float
) -> None:
    assert loss_at(p, gamma, min_weight) == pytest.approx(loss, rel=DIGITS)
    # At p_b the weight w is b: below it b, above it w.
    at = torch.tensor([join * (1 - 1e-3), join, join * (1 + 1e-3)], dtype=torch.float64).log()
    below, there, above = token_weight(at, gamma=gamma, min_weight=min_weight)
    assert below == min_weight
    assert there.item() == pytest.approx(min_weight, rel=1e-12)
    assert above > min_weight


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"gamma": 0.1}, 1.8171745802357724),
        ({"gamma": 0.1, "label_smoothing": 0.1}, 1.7505110717092274),
        ({"gamma": 0.3, "weight": torch.tensor([1, 2, 0.5]).double()}, 1.3906743671221669),
        ({"gamma": 0.0}, 2.2558682848905542),
        ({"gamma": 1.0}, 0.8940088872599454),
    ],
)
def test_mean_loss_of_two_samples(options: dict, loss: float) -> None:
    assert tailr_loss(LOGITS, TARGET, **options).item() == pytest.approx(loss, rel=8 * EPS)


def test_gradient_of_two_samples() -> None:
    logits = LOGITS.clone().requires_grad_()
    tailr_loss(logits, TARGET, gamma=0.1).backward()
    expected = [
        [-0.22627794641827814, 0.06085551253441531, 0.1654224338838628],
        [0.1588809046486244, -0.2552470445608946, 0.09636613991227017],
    ]
    torch.testing.assert_close(
        logits.grad, torch.tensor(expected, dtype=torch.float64), rtol=16 * EPS, atol=0
    )


@pytest.mark.parametrize(("gamma", "bound"), [(0.1, 2.5584278811045), (1e-7, 16.118097262768)])
def test_loss_of_an_impossible_label_is_finite_and_without_gradient(
    gamma: float, bound: float
) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = tailr_loss(logits, torch.tensor([0]), gamma=gamma)
    loss.backward()
    assert loss.item() == pytest.approx(bound, rel=DIGITS)
    assert not logits.grad.any()


# Identities.


@pytest.mark.parametrize("curve", [{"gamma": 0.0}, {"gamma": 0.4, "min_weight": 1.0}])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_cross_entropy_at_gamma_zero_and_at_full_weight(
    curve: dict, shape: tuple[int, ...], reduction: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    classes = shape[0] if len(shape) == 1 else shape[1]
    others = () if len(shape) == 1 else (shape[0], *shape[2:])
    indices = torch.randint(classes, others, generator=generator)
    indices = torch.where(torch.rand(others, generator=generator) < 0.2, 1, indices)
    probabilities = torch.rand(shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
    for target, weight, smoothing in itertools.product(
        (indices, probabilities), (None, weights), (0.0, 0.1, 1.0)
    ):
        ignore = 1 if target is indices and len(shape) > 1 else -100
        options = {
            "weight": weight,
            "ignore_index": ignore,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        ours = tailr_loss(logits, target, **curve, **options)
        theirs = F.cross_entropy(logits, target, **options)
        assert ours.shape == theirs.shape
        # A few dozen terms of size up to 10, in another order.
        torch.testing.assert_close(ours, theirs, rtol=64 * EPS, atol=64 * EPS)


@settings(max_examples=200, deadline=None)
@given(
    p=st.floats(1e-12, 1.0),
    gammas=st.tuples(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0)),
)
def test_loss_is_bounded_and_decreases_in_gamma(p: float, gammas: tuple[float, float]) -> None:
    small, large = sorted(gammas)
    bound = 1.0 if large == 1 else math.log(1 / large) / (1 - large)
    # Near γ = 1 the bound is itself a quotient of two small numbers.
    slack = 1 + 8 * EPS / max(1 - large, 1e-3)
    cross_entropy, one, two = loss_at(p, 0.0), loss_at(p, small), loss_at(p, large)
    assert 0 <= two <= bound * slack
    assert two <= one * (1 + 1e-12)
    assert one <= cross_entropy * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(p=st.floats(1e-8, 0.999), gamma=st.floats(0.0, 1.0), min_weight=st.floats(0.0, 1.0))
def test_gradient_is_that_of_cross_entropy_times_the_weight(
    p: float, gamma: float, min_weight: float
) -> None:
    logits = torch.cat([two_classes(p), torch.tensor([[-1.0]]).double()], 1).requires_grad_()
    target = torch.tensor([0])
    tailr_loss(logits, target, gamma=gamma, min_weight=min_weight).backward()
    softmax = logits.detach().softmax(1)
    weight = max(min_weight, softmax[0, 0] / (gamma + (1 - gamma) * softmax[0, 0]))
    expected = weight * (softmax - F.one_hot(target, 3))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=4 * EPS)


def test_minimum_weight_has_the_gradient_of_the_stopped_weight() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).double() * 3
    target = torch.arange(50) % 8
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    tailr_loss(ours, target, gamma=0.1, min_weight=0.3, reduction="sum").backward()
    nll = F.cross_entropy(theirs, target, reduction="none")
    p = (-nll).exp()
    weight = (p / (0.1 + 0.9 * p)).clamp(0.3, 1.0).detach()
    assert 0 < (weight == 0.3).sum() < 50  # both sides of the threshold are met
    (weight * nll).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=8 * EPS)


@pytest.mark.parametrize("gamma", [1e-7, 0.1, 0.8, 1.0])
@pytest.mark.parametrize("min_weight", [1e-6, 0.2, 0.95])
def test_minimum_weight_joins_without_a_step(gamma: float, min_weight: float) -> None:
    log_pb = math.log(min_weight * gamma) - math.log1p(-min_weight * (1 - gamma))
    lp = torch.tensor([log_pb - 1e-9, log_pb + 1e-9], dtype=torch.float64)
    # Two logits of which the first has exactly this log-probability.
    logits = torch.stack([lp, (-lp.expm1()).log()], 1)
    below, above = tailr_loss(
        logits, torch.tensor([0, 0]), gamma=gamma, min_weight=min_weight, reduction="none"
    ).tolist()
    # The slope in log p is b, over a distance of 2e-9; the rest is rounding.
    assert below - above == pytest.approx(2e-9 * min_weight, abs=64 * EPS * (1 + abs(log_pb)))


def test_limit_at_gamma_one_is_continuous() -> None:
    for p in (1e-3, 0.5, 0.999):
        values = [loss_at(p, gamma) for gamma in (1 - 1e-6, 1 - 1e-12, 1 - 2**-53, 1.0)]
        assert values == pytest.approx([1 - p] * 4, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_are_the_expected_loss(gamma: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 4, 3, generator=generator).double()
    q = torch.rand(6, 4, 3, generator=generator).double().softmax(1)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for k in range(4):
        label = torch.full((6, 3), k)
        share = (1 - smoothing) * q[:, k] + smoothing / 4
        expected += share * tailr_loss(logits, label, gamma=gamma, reduction="none")
    soft = tailr_loss(logits, q, gamma=gamma, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(soft, expected, rtol=32 * EPS, atol=0)
    # A label and the distribution that is certain of it are the same.
    target = torch.randint(4, (6, 3), generator=generator)
    certain = F.one_hot(target, 4).movedim(-1, 1).double()
    options = {"gamma": gamma, "label_smoothing": smoothing}
    assert tailr_loss(logits, certain, **options).item() == pytest.approx(
        tailr_loss(logits, target, **options).item(), rel=32 * EPS
    )


def test_smoothing_at_gamma_one_is_an_affine_map() -> None:
    plain = tailr_loss(LOGITS, TARGET, gamma=1.0, reduction="none")
    smooth = tailr_loss(LOGITS, TARGET, gamma=1.0, label_smoothing=0.3, reduction="none")
    # Σ_k (1 - p_k) = K - 1.
    torch.testing.assert_close(smooth, 0.7 * plain + 0.3 * 2 / 3, rtol=16 * EPS, atol=0)


# Ignored positions and class weights.


def test_ignored_positions_count_nowhere() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, generator=generator).double().requires_grad_()
    target = torch.tensor([0, -100, 3, 1, -100, 4])
    kept = target != -100
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0, 1.0]).double()
    for options in ({}, {"label_smoothing": 0.2}, {"weight": weight, "label_smoothing": 0.2}):
        full = tailr_loss(logits, target, gamma=0.2, min_weight=0.1, **options)
        part = tailr_loss(logits[kept], target[kept], gamma=0.2, min_weight=0.1, **options)
        torch.testing.assert_close(full, part, rtol=16 * EPS, atol=0)
        none = tailr_loss(logits, target, gamma=0.2, reduction="none", **options)
        assert none[~kept].tolist() == [0.0, 0.0]
        (gradient,) = torch.autograd.grad(full, logits)
        assert not gradient[~kept].any()
        assert gradient[kept].all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_but_ignored_positions_is_zero(smoothing: float, reduction: str) -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.full((3,), -100)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    loss = tailr_loss(logits, target, **options)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    assert tailr_loss(logits[:0], target[:0], **options).item() == 0.0
    assert tailr_loss(logits[:0], target[:0], reduction="none").shape == (0,)


def test_class_weights_enter_the_mean_once() -> None:
    weight = torch.tensor([1.0, 2.0, 0.5]).double()
    losses = tailr_loss(LOGITS, TARGET, gamma=0.3, reduction="none")
    mean = (losses * weight[TARGET]).sum() / weight[TARGET].sum()
    ours = tailr_loss(LOGITS, TARGET, gamma=0.3, weight=weight)
    assert ours.item() == pytest.approx(mean.item(), rel=8 * EPS)


def test_labels_of_weight_zero_only_have_a_mean_of_zero() -> None:
    weight = torch.tensor([0.0, 0.0, 1.0]).double()
    assert tailr_loss(LOGITS, TARGET, weight=weight).item() == 0.0


def test_forbidden_classes_are_allowed() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    allowed = logits.detach()[:, [0, 2]]
    for gamma in (0.0, 0.1, 1.0):
        hard = tailr_loss(logits, torch.tensor([0]), gamma=gamma)
        assert hard.item() == pytest.approx(
            tailr_loss(allowed, torch.tensor([0]), gamma=gamma).item(), rel=8 * EPS
        )
        soft = tailr_loss(logits, q, gamma=gamma)
        assert soft.item() == pytest.approx(
            tailr_loss(allowed, q[:, [0, 2]], gamma=gamma).item(), rel=8 * EPS
        )
        (gradient,) = torch.autograd.grad(hard + soft, logits)
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0


# Precision.


@pytest.mark.parametrize("gamma", [1e-7, 1e-4, 0.1, 0.5, 0.9, 0.999999, 1.0])
def test_single_precision_keeps_its_digits_at_both_ends(gamma: float) -> None:
    """From log-probabilities -30 to -1e-7, against 50 digits at the same float32 numbers."""
    from kexue.losses.tailr.curve import _loss_of

    lp = -torch.logspace(-7, math.log10(30), 400)
    ours = _loss_of(lp, gamma, 0.0)
    assert ours.dtype == torch.float32
    errors = [
        abs(float((mpmath.mpf(value) - exact) / exact))
        for value, exact in (
            (v, exact_loss(x, gamma)) for v, x in zip(ours.tolist(), lp.tolist(), strict=True)
        )
    ]
    # expm1, 1 - γ, log1p and the quotient: half to one unit in the last place each.
    assert max(errors) < 3 * EPS32


def test_loss_near_certainty_is_not_rounded_away() -> None:
    """Where log(γ + (1-γ) softmax) in float32 is off by percents."""
    gap = torch.tensor([9.0, 12.0, 14.0])
    logits = torch.stack([gap, torch.zeros(3)], 1)
    ours = tailr_loss(logits, torch.zeros(3, dtype=torch.long), gamma=0.1, reduction="none")
    lp = F.log_softmax(logits, 1)[:, 0].double()  # what cross entropy knows, exactly converted
    exact = torch.tensor([float(exact_loss(x, 0.1)) for x in lp.tolist()])
    naive = -(0.1 + 0.9 * logits.softmax(1)[:, 0]).log() / 0.9
    torch.testing.assert_close(ours, exact, rtol=4 * EPS32, atol=0)
    assert ((naive - exact).abs() / exact).max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    target = torch.arange(20) % 7
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        half = tailr_loss(logits, target, gamma=1e-7, **options)
        single = tailr_loss(logits.float(), target, gamma=1e-7, **options)
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))
    weight = token_weight(torch.tensor([-20.0, -1.0], dtype=dtype), gamma=1e-7)
    assert weight.dtype == dtype
    exact = token_weight(torch.tensor([-20.0, -1.0]), gamma=1e-7)
    torch.testing.assert_close(weight.float(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1e-300, 1e-12, 0.1, 1.0])
def test_huge_logits_stay_finite(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = tailr_loss(logits, torch.tensor([0, 0]), gamma=gamma, reduction="none")
    loss.sum().backward()
    bound = 1.0 if gamma == 1 else -math.log(gamma) / (1 - gamma)
    assert loss.tolist() == pytest.approx([0.0, bound], rel=4 * EPS32)
    assert logits.grad.isfinite().all()


def test_weight_reaches_one_exactly_and_never_exceeds_it() -> None:
    for dtype in (torch.float32, torch.float64):
        lp = torch.cat([-torch.logspace(-17, 3, 500), torch.tensor([0.0, -math.inf])]).to(dtype)
        for gamma in (0.0, 1e-300, 1e-7, 0.1, 1 / 3, 0.9, 1.0):
            weight = token_weight(lp, gamma=gamma)
            assert weight.max() <= 1
            assert weight[-2] == 1
            assert weight[-1] == (1 if gamma == 0 else 0)


# Derivatives and transforms.


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_first_and_second_derivatives(gamma: float, soft: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, generator=generator).double().requires_grad_()
    target = torch.randint(5, (4,), generator=generator)
    if soft:
        target = F.one_hot(target, 5).double().add(0.1).requires_grad_()
    inputs = (logits, target) if soft else (logits,)

    def loss(x: torch.Tensor, y: torch.Tensor = target) -> torch.Tensor:
        return tailr_loss(x, y, gamma=gamma, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_gradients_of_single_examples_under_vmap() -> None:
    logits, target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    target = target % 4
    single = torch.func.vmap(torch.func.grad(lambda x, y: tailr_loss(x, y, gamma=0.1)))
    rows = [x.clone().requires_grad_() for x in logits]
    for row, label in zip(rows, target, strict=True):
        tailr_loss(row, label, gamma=0.1).backward()
    torch.testing.assert_close(single(logits, target), torch.stack([row.grad for row in rows]))


def test_memory_of_soft_targets_is_that_of_cross_entropy() -> None:
    """Nothing of the size of the logits is saved for backward but what cross entropy saves."""

    def saved(loss: object, **options: float) -> int:
        numbers: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            numbers[x.untyped_storage().data_ptr()] = x.numel()
            return x

        logits = torch.randn(64, 50).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss(logits, torch.arange(64) % 50, **options)
        return sum(numbers.values())

    assert saved(tailr_loss) < saved(F.cross_entropy) + 10 * 64
    assert saved(tailr_loss, label_smoothing=0.1) <= 2 * 64 * 50 + 20 * 64


def test_autocast_runs_in_single_precision() -> None:
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 2, 4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ torch.eye(8)[:, :6]
        loss = tailr_loss(logits, target, gamma=0.1)
        assert F.cross_entropy(logits, target).dtype == loss.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert torch.equal(loss, tailr_loss(logits.float(), target, gamma=0.1))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    """Both kinds of target, forwards and backwards, and a gamma that changes in between."""
    program = """
import torch
from kexue.losses import TaiLrLoss, linear_tailr_loss, tailr_loss
torch.manual_seed(0)
logits, weight = torch.randn(6, 5).double(), torch.rand(5).double()
target = torch.tensor([0, 4, -100, 2, 1, 3])
module = TaiLrLoss(weight=weight, min_weight=0.05, label_smoothing=0.1)
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
for gamma in (0.0, 0.1, 1.0):
    module.gamma = gamma
    for given in (target, logits.softmax(1)):
        results = []
        for run in (module, compiled):
            x = logits.clone().requires_grad_()
            loss = run(x, given)
            loss.backward()
            results.append((loss, x.grad))
        for one, two in zip(*results):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
layer = torch.randn(7, 5).double()
results = []
for run in (linear_tailr_loss, torch.compile(linear_tailr_loss, backend="aot_eager")):
    x, w = logits.clone().requires_grad_(), layer.clone().requires_grad_()
    loss = run(x, w, target, chunk_size=4)
    loss.backward()
    results.append((loss, x.grad, w.grad))
for one, two in zip(*results):
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# The module.


def test_module_is_the_function_and_gamma_follows_a_schedule() -> None:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    module = TaiLrLoss(gamma=0.0, weight=weight, label_smoothing=0.1, reduction="sum")
    for gamma in (0.0, 0.5, 1.0):
        module.gamma = gamma
        expected = tailr_loss(
            LOGITS, TARGET, gamma=gamma, weight=weight, label_smoothing=0.1, reduction="sum"
        )
        assert torch.equal(module(LOGITS, TARGET), expected)
    assert "gamma=1.0" in repr(module)
    assert list(module.state_dict()) == ["weight"]
    module.gamma = 1.5
    with pytest.raises(ValueError, match=r"gamma must be between 0 and 1, got 1\.5"):
        module(LOGITS, TARGET)


# Refusals.


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["gamma", "min_weight", "label_smoothing"])
@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_shares_are_checked(name: str, value: float) -> None:
    for call in (lambda **o: tailr_loss(LOGITS, TARGET, **o), lambda **o: TaiLrLoss(**o)):
        with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got"):
            call(**{name: value})


@pytest.mark.bad_input
def test_reductions_are_listed() -> None:
    with pytest.raises(ValueError, match="one of none, mean, sum, got 'average'"):
        tailr_loss(LOGITS, TARGET, reduction="average")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.zeros(3, dtype=torch.long), r"shape \(2,\) for input of shape \(2, 3\), got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.long), r"class indices must have shape \(2,\).*\(2, 3\)"),
        (torch.zeros(2), r"probabilities must have shape \(2, 3\).*got \(2,\)"),
    ],
)
def test_shape_of_the_target_is_checked(target: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tailr_loss(LOGITS, target)


@pytest.mark.bad_input
def test_shape_of_class_weights_is_checked() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\).*\(2, 3\), got \(2,\)"):
        tailr_loss(LOGITS, TARGET, weight=torch.ones(2))


@pytest.mark.bad_input
def test_integer_input_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"input must be a tensor of floating dtype, got torch\.int"
    ):
        tailr_loss(LOGITS.long(), TARGET)
    with pytest.raises(TypeError, match="log_probability must be"):
        token_weight(TARGET, gamma=0.1)


@pytest.mark.parametrize("bad", [3, -1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_index_out_of_range_is_refused_as_torch_does(bad: int, smoothing: float) -> None:
    target = torch.tensor([0, bad])
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(LOGITS, target)
    for weight in (None, torch.ones(3).double()):
        with pytest.raises(IndexError, match="out of bounds"):
            tailr_loss(LOGITS, target, label_smoothing=smoothing, weight=weight)
