"""A step of Amos against pytorch_optimizer's and against torch's AdamW, and the state of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.timing import compare
from kexue.optim.amos import Amos

TARGET_PEER = 1 / 0.65
TARGET_ADAMW = 1 / 0.7


def main() -> None:
    agreement()
    peers()
    adamw()
    state()


def shapes() -> list[tuple[int, ...]]:
    """Six blocks of a Transformer of width 256: 4.7 million entries in 72 tensors."""
    block = [(256, 256)] * 4 + [(1024, 256), (256, 1024)] + [(256,)] * 6
    return [shape for _ in range(6) for shape in block]


def parameters(all_shapes: Iterable[tuple[int, ...]], **options: Any) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(s, generator=generator, **options)) for s in all_shapes]
    for one in made:
        one.grad = torch.randn(one.shape, generator=generator, **options)
    return made


def agreement() -> None:
    """Where both have one slot a tensor and the same scales, both must walk the same way."""
    peer = _peer()
    if peer is None:
        return
    ours, theirs = (parameters(shapes()[:12], dtype=torch.float64) for _ in range(2))
    groups = [
        {"params": [p], "scale": (2 / p.shape[1]) ** 0.5 if p.ndim == 2 else 0.5} for p in ours
    ]
    one = Amos(groups, lr=0.01, momentum=0.9, slots="per_tensor")
    other = peer(theirs, lr=0.01, momentum=0.9, extra_l2=0.0, eps=0.0)
    for _ in range(5):
        one.step()
        other.step()
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    print(
        f"five steps with one slot a tensor, against pytorch_optimizer: differ by {difference:.0e}"
    )
    if not difference <= 1e-12:
        raise AssertionError(f"trajectories differ by {difference:.1e}, allowed 1e-12")


def peers() -> None:
    peer = _peer()
    if peer is None:
        print("pytorch_optimizer is not installed: no peer to time")
        return
    for name, options in (("loop", {"foreach": False}), ("foreach", {"foreach": True})):
        _against(f"a step, against pytorch_optimizer ({name})", peer, TARGET_PEER, **options)


def adamw() -> None:
    _against("a step, against AdamW(foreach=True)", torch.optim.AdamW, TARGET_ADAMW, foreach=True)
    _against("a step, against AdamW(fused=True)", torch.optim.AdamW, None, fused=True)


def state() -> None:
    sizes = {}
    for name, build in {
        "AdamW": torch.optim.AdamW,
        "Amos": Amos,
        "Amos with momentum": lambda params: Amos(params, momentum=0.9),
    }.items():
        optimizer = build(parameters(shapes()))
        optimizer.step()
        sizes[name] = sum(
            slot.numel() * slot.element_size()
            for slots in optimizer.state.values()
            for slot in slots.values()
        )
    for name, size in sizes.items():
        share = size / sizes["AdamW"]
        print(f"state of {name}: {size} bytes, {100 * share:.1f} % of AdamW's")


def _against(
    what: str, other: Callable[..., torch.optim.Optimizer], target: float | None, **options: Any
) -> None:
    # A small rate, so that thousands of timed steps stay in the range of usual weights.
    ours, theirs = (
        Amos(parameters(shapes()), lr=1e-4),
        other(parameters(shapes()), lr=1e-4, **options),
    )
    compare(what, ours.step, theirs.step, agree=None, target=target, repeats=15)


def _peer() -> Callable[..., torch.optim.Optimizer] | None:
    try:
        import pytorch_optimizer
    except ImportError:
        return None
    return pytorch_optimizer.Amos


if __name__ == "__main__":
    main()
