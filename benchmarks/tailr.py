"""TaiLr against torch's cross entropy: time and memory, on logits and fused with a linear layer."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import compare
from kexue.losses.tailr import expected_calibration_error, linear_tailr_loss, tailr_loss


def main() -> None:
    logits()
    for soft in ("label smoothing", "probabilities"):
        soft_labels(soft)
    fused(1024, 256)
    fused(4096, 512)
    calibration()


def logits() -> None:
    """The target: at most 1.10 times the time of cross entropy, forward and backward."""
    x, target = draw_logits(1024, 32000)

    def ours(gamma: float = 0.1) -> Tensor:
        return gradient(lambda: tailr_loss(x, target, gamma=gamma), x)

    def theirs() -> Tensor:
        return gradient(lambda: F.cross_entropy(x, target), x)

    check("gradient at γ = 0", ours(0.0), theirs(), 1e-6)
    compare("(1024, 32000) logits", ours, theirs, agree=None, target=1 / 1.10, repeats=15)


def soft_labels(kind: str) -> None:
    """No target: the curve is applied to every class, not to one."""
    x, target = draw_logits(512, 8000)
    options = {"label_smoothing": 0.1} if kind == "label smoothing" else {}
    if not options:
        target = torch.rand(512, 8000).softmax(1)

    def ours(gamma: float = 0.1) -> Tensor:
        return gradient(lambda: tailr_loss(x, target, gamma=gamma, **options), x)

    def theirs() -> Tensor:
        return gradient(lambda: F.cross_entropy(x, target, **options), x)

    check(f"gradient at γ = 0, {kind}", ours(0.0), theirs(), 1e-5)
    compare(f"(512, 8000) logits, {kind}", ours, theirs, agree=None, repeats=7)


def fused(rows: int, dim: int, classes: int = 32000) -> None:
    """The targets: at most the time of the plain form, a fifth of its memory at N = 4096."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator).requires_grad_()
    # Logits of size 1: larger ones have subnormal probabilities, which take 20 times as long.
    weight = (torch.randn(classes, dim, generator=generator) / dim**0.5).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)

    def ours(gamma: float = 0.1) -> tuple[Tensor, ...]:
        loss = linear_tailr_loss(hidden, weight, target, gamma=gamma)
        return torch.autograd.grad(loss, (hidden, weight))

    def theirs() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(hidden @ weight.mT, target), (hidden, weight))

    name = f"linear + loss, N = {rows}, D = {dim}, V = {classes}"
    for of, one, two in zip(("hidden", "weight"), ours(0.0), theirs(), strict=True):
        check(f"{name}: gradient of {of} at γ = 0", one, two, 1e-4)
    our_peak, their_peak = peak_memory(ours), peak_memory(theirs)
    target_words = ""
    if rows == 4096:
        met = "met" if our_peak <= 0.2 * their_peak else "MISSED"
        target_words = f"  target 0.2 {met}"
    print(
        f"{name}: peak memory ours {our_peak / 2**20:.0f} MiB, theirs {their_peak / 2**20:.0f} "
        f"MiB, ratio {our_peak / their_peak:.3f}{target_words}",
        flush=True,
    )
    compare(name, ours, theirs, agree=None, target=1.0, repeats=3 if rows == 4096 else 5)


def calibration() -> None:
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError:
        print("torchmetrics is not installed; the calibration error is compared with nothing")
        return
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(100_000, 10, generator=generator).mul(2).softmax(1)
    labels = torch.randint(10, (100_000,), generator=generator)
    compare(
        "calibration error of 100000 samples, against torchmetrics",
        lambda: expected_calibration_error(probabilities, labels),
        lambda: multiclass_calibration_error(probabilities, labels, 10).item(),
        agree=1e-4,  # theirs sums in float32
    )


def draw_logits(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, classes, generator=generator).requires_grad_()
    return x, torch.randint(classes, (rows,), generator=generator)


def gradient(loss: Callable[[], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(loss(), x)[0]


def check(what: str, ours: Tensor, theirs: Tensor, allowed: float) -> None:
    """Both do the same work at γ = 0, where their results must be the same."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{what}: largest difference {difference:.1e} of the largest entry", flush=True)
    if not difference <= allowed:
        raise AssertionError(f"{what} differs by {difference:.2e}, allowed {allowed:.2e}")


def peak_memory(call: Callable[[], object]) -> float:
    """Return how far the resident memory of the process rises during a call, in bytes."""
    page, statm = 4096, Path("/proc/self/statm")
    if not statm.exists():
        print("no /proc here; memory is not measured")
        return float("nan")
    gc.collect()
    # What was freed before goes back to the system: taken again, it has to count.
    ctypes.CDLL(None).malloc_trim(0)

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    start = peak = resident()
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    running = False
    watcher.join()
    return peak - start
