"""The fused linear form: it is the plain form, in the memory of a few rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from kexue.losses import linear_tailr_loss, tailr_loss

EPS = torch.finfo(torch.float64).eps
ROWS, DIM, CLASSES = 23, 6, 11


def layer(
    dtype: torch.dtype = torch.float64, *, requires_grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, bias and a target of which every fifth is ignored."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((ROWS, DIM), (CLASSES, DIM), (CLASSES,))
    ]
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[::5] = -100
    return *(x.requires_grad_(requires_grad) for x in tensors), target


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    **options: object,
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    return tailr_loss(logits.reshape(-1, len(weight)), target.reshape(-1), **options)


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_is_the_plain_form(chunk_size: int | None, reduction: str) -> None:
    hidden, weight, bias, target = layer()
    for gamma, min_weight, b in itertools.product((0.0, 0.1, 1.0), (0.0, 0.2), (None, bias)):
        options = {"gamma": gamma, "min_weight": min_weight, "reduction": reduction, "bias": b}
        fused = linear_tailr_loss(hidden, weight, target, chunk_size=chunk_size, **options)
        whole = plain(hidden, weight, target, **options)
        # Sums of 23 rows, 11 classes and 6 products in another order.
        tolerance = {"rtol": 64 * EPS, "atol": 64 * EPS}
        torch.testing.assert_close(fused, whole, **tolerance)
        inputs = [x for x in (hidden, weight, b) if x is not None]
        ours, theirs = (torch.autograd.grad(3 * loss, inputs) for loss in (fused, whole))
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, **tolerance)


def test_leading_axes_are_rows() -> None:
    hidden, weight, bias, target = layer()
    for axes in ((2, 10), (2, 2, 5), ()):
        count = max(1, torch.Size(axes).numel())
        some, labels = hidden[1 : count + 1].reshape(*axes, DIM), target[1 : count + 1]
        labels = labels.reshape(axes)
        fused = linear_tailr_loss(some, weight, labels, bias=bias, chunk_size=3)
        torch.testing.assert_close(fused, plain(some, weight, labels, bias=bias))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted_exist(wanted: tuple[bool, bool]) -> None:
    hidden, weight, _, target = layer(requires_grad=False)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    loss = linear_tailr_loss(hidden, weight, target)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
        assert (hidden.grad is not None, weight.grad is not None) == wanted
    with torch.no_grad():
        assert torch.equal(linear_tailr_loss(hidden, weight, target), loss)


def test_gradcheck() -> None:
    hidden, weight, bias, target = layer()

    def loss(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear_tailr_loss(h, w, target, bias=b, gamma=0.1, chunk_size=4)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_second_derivative_is_refused_and_not_silently_zero() -> None:
    for penalised in (0, 1):
        hidden, weight, _, target = layer()
        loss = linear_tailr_loss(hidden, weight, target)
        gradient = torch.autograd.grad(loss, (hidden, weight), create_graph=True)[penalised]
        with pytest.raises(RuntimeError, match="keeps no second derivative"):
            (loss + gradient.square().sum()).backward()
        with pytest.raises(RuntimeError, match="keeps no second derivative"):
            torch.autograd.grad(gradient.sum(), hidden)


def test_backward_may_run_twice() -> None:
    hidden, weight, _, target = layer()
    loss = linear_tailr_loss(hidden, weight, target)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(2 * loss, hidden)[0]
    assert torch.equal(2 * first, second)


def test_nothing_but_ignored_rows_is_zero() -> None:
    hidden, weight, _, target = layer()
    for h, t in ((hidden, torch.full_like(target, -100)), (hidden[:0], target[:0])):
        loss = linear_tailr_loss(h, weight, t)
        assert loss.item() == 0.0
        assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_products_and_single_precision_loss(dtype: torch.dtype) -> None:
    *tensors, target = layer(dtype)
    single = [x.detach().float().requires_grad_() for x in tensors]
    half_loss = linear_tailr_loss(tensors[0], tensors[1], target, bias=tensors[2], chunk_size=7)
    loss = linear_tailr_loss(single[0], single[1], target, bias=single[2])
    assert half_loss.dtype == dtype
    # Logits and their gradients are rounded to the half precision; they are below 10, and the
    # curve's slope is at most 1.
    eps = torch.finfo(dtype).eps
    assert half_loss.item() == pytest.approx(loss.item(), abs=10 * eps)
    half_loss.backward()
    loss.backward()
    for half, full in zip(tensors, single, strict=True):
        assert half.grad.dtype == dtype
        torch.testing.assert_close(half.grad.float(), full.grad, rtol=10 * eps, atol=10 * eps)


def test_gradients_of_many_rows_do_not_overflow_float16() -> None:
    # One class whose label is always another: its weight's gradient sums 4000 rows of size 30.
    hidden = torch.full((4000, 2), 30.0, dtype=torch.float16)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    loss = linear_tailr_loss(hidden, weight, torch.zeros(4000, dtype=torch.long), gamma=0.0)
    loss.backward()
    exact = torch.tensor([[-20.0, -20.0], [10.0, 10.0], [10.0, 10.0]])
    torch.testing.assert_close(weight.grad.float(), exact, rtol=1e-3, atol=0)


def test_autocast_is_that_of_the_linear_layer() -> None:
    hidden, weight, bias, target = layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = linear_tailr_loss(hidden, weight, target, bias=bias, chunk_size=6)
        whole = plain(hidden, weight, target, bias=bias)
    assert fused.dtype == whole.dtype == torch.float32
    assert fused.item() == pytest.approx(whole.item(), rel=1e-6)
    eps = torch.finfo(torch.bfloat16).eps
    for one, two in zip(
        torch.autograd.grad(fused, (hidden, weight, bias)),
        torch.autograd.grad(whole, (hidden, weight, bias)),
        strict=True,
    ):
        assert one.dtype == torch.float32
        # Gradients of logits are rounded before and after the factor 1/N.
        torch.testing.assert_close(one, two, rtol=4 * eps, atol=eps * float(two.abs().max()))


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of more numbers than a chunk's logits, or a gradient, passes through."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    hidden = torch.randn(300, 4, requires_grad=True)
    weight = torch.randn(200, 4, requires_grad=True)
    with Largest() as seen:
        linear_tailr_loss(hidden, weight, torch.arange(300) % 200, chunk_size=10).backward()
    assert seen.numbers == 10 * 200

    from kexue.losses.tailr import linear

    monkeypatch.setattr(linear, "_LOGITS_AT_A_TIME", 1000)
    with Largest() as seen:
        linear_tailr_loss(hidden, weight, torch.arange(300) % 200).backward()
    assert seen.numbers == max(1000, 300 * 4)


@pytest.mark.gpu
def test_agrees_with_the_host_on_a_gpu() -> None:
    hidden, weight, bias, target = layer(torch.float32)
    host = linear_tailr_loss(hidden, weight, target, bias=bias, chunk_size=5)
    there = [x.detach().cuda().requires_grad_() for x in (hidden, weight, bias)]
    device = linear_tailr_loss(there[0], there[1], target.cuda(), bias=there[2], chunk_size=5)
    assert device.item() == pytest.approx(host.item(), rel=1e-5)
    host.backward()
    device.backward()
    for one, two in zip(there, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(one.grad.cpu(), two.grad, rtol=1e-4, atol=1e-6)


# Refusals.


@pytest.mark.parametrize("bad", [CLASSES, -1])
def test_class_index_out_of_range_is_refused(bad: int) -> None:
    hidden, weight, _, target = layer()
    target[3] = bad
    with pytest.raises(IndexError, match="out of bounds"):
        linear_tailr_loss(hidden, weight, target, chunk_size=2)


@pytest.mark.bad_input
def test_shapes_are_named() -> None:
    hidden, weight, bias, target = layer()
    with pytest.raises(ValueError, match=r"share D, got hidden \(23, 5\), weight \(11, 6\)"):
        linear_tailr_loss(hidden[:, 1:], weight, target)
    with pytest.raises(ValueError, match=r"target must have shape \(23,\).*got \(22,\)"):
        linear_tailr_loss(hidden, weight, target[1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(V,\).*bias \(10,\)"):
        linear_tailr_loss(hidden, weight, target, bias=bias[1:])


@pytest.mark.bad_input
def test_options_are_checked() -> None:
    hidden, weight, _, target = layer()
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        linear_tailr_loss(hidden, weight, target, chunk_size=0)
    with pytest.raises(ValueError, match="reduction must be mean or sum"):
        linear_tailr_loss(hidden, weight, target, reduction="none")
    with pytest.raises(ValueError, match=r"gamma must be between 0 and 1, got 1\.5"):
        linear_tailr_loss(hidden, weight, target, gamma=1.5)
    with pytest.raises(TypeError, match="hidden must be a tensor of floating dtype"):
        linear_tailr_loss(hidden.long(), weight, target)
    with pytest.raises(TypeError, match="one dtype outside of autocast"):
        linear_tailr_loss(hidden, weight.float(), target)
