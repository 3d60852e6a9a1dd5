"""Attention against torch.nn.MultiheadAttention, x-transformers and timm.

All in one run on the machine's processor, without gradients. Needs the packages x-transformers and
timm; where one is missing, its lines are left out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import compare
from kexue.nn.attention import (
    DotProductAttention,
    MultiHeadAttention,
    TalkingHeadsAttention,
)

HEADS, KEY_DIM = 8, 64


def main() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        module_against_torch()
        unequal_widths_against_sdpa()
        talking_heads_against_x_transformers()
        talking_heads_against_timm()
    memory()


def numbers(result: Any) -> np.ndarray:
    return (result[0] if isinstance(result, tuple) else result).numpy()


def draw(batch: int, length: int, key_dim: int = KEY_DIM, value_dim: int = KEY_DIM) -> list[Tensor]:
    return [torch.randn(batch, HEADS, length, size) for size in (key_dim, key_dim, value_dim)]


def module_against_torch() -> None:
    dim = 512
    theirs = nn.MultiheadAttention(dim, HEADS, batch_first=True)
    ours = MultiHeadAttention(dim, HEADS)
    parts = (ours.query_projection, ours.key_projection, ours.value_projection)
    for part, weight, bias in zip(
        parts, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
    ):
        part.weight.copy_(weight)
        part.bias.copy_(bias)
    ours.output_projection.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 1024, dim)
    for mode in ("training mode", "evaluation mode"):
        ours.train(mode == "training mode")
        theirs.train(mode == "training mode")
        compare(
            f"module (2, 1024, 512), {HEADS} heads, {mode}, against torch.nn.MultiheadAttention",
            lambda: ours(x),
            lambda: theirs(x, x, x, need_weights=False),
            agree=1e-5,
            value=numbers,
            target=1 / 1.05,
        )


def unequal_widths_against_sdpa() -> None:
    core = DotProductAttention()
    for key_dim, value_dim in ((64, 8), (128, 32)):
        query, key, value = draw(2, 1024, key_dim, value_dim)
        compare(
            f"plain core, n = 1024, key size {key_dim}, value size {value_dim}, against SDPA",
            lambda q=query, k=key, v=value: core(q, k, v),
            lambda q=query, k=key, v=value: nn.functional.scaled_dot_product_attention(q, k, v),
            agree=1e-5,
            value=numbers,
            target=1.0,
        )


def talking_heads_against_x_transformers() -> None:
    try:
        from x_transformers.attend import Attend
    except ImportError as error:
        print(f"x-transformers is missing ({error}); pip install x-transformers")
        return
    theirs = Attend(heads=HEADS, pre_talking_heads=True, post_talking_heads=True)
    ours = TalkingHeadsAttention(HEADS)
    copy_mixings(ours, theirs)
    for batch, length, target in ((2, 256, 1.0), (2, 1024, 1.6), (1, 4096, None)):
        query, key, value = draw(batch, length)
        compare(
            f"talking heads, batch {batch}, n = {length}, against x-transformers",
            lambda q=query, k=key, v=value: ours(q, k, v),
            lambda q=query, k=key, v=value: theirs(q, k, v),
            agree=1e-4,
            value=numbers,
            target=target,
            repeats=5 if length < 4096 else 3,
        )


def copy_mixings(ours: TalkingHeadsAttention, theirs: Any) -> None:
    """Give both the same random mixings; theirs adds the logits as they were."""
    before, after = theirs.pre_softmax_talking_heads, theirs.post_softmax_talking_heads
    for convolution in (before, after):
        nn.init.normal_(convolution.weight, std=HEADS**-0.5)
    ours.logits_mixing.copy_(before.weight[..., 0, 0] + torch.eye(HEADS))  # type: ignore[union-attr]
    ours.weights_mixing.copy_(after.weight[..., 0, 0])  # type: ignore[union-attr]


def talking_heads_against_timm() -> None:
    try:
        from timm.models.cait import TalkingHeadAttn
    except (ImportError, RuntimeError) as error:
        print(f"timm is missing, or cannot be imported ({error}); pip install timm torchvision")
        return
    dim = HEADS * KEY_DIM
    theirs = TalkingHeadAttn(dim, HEADS, qkv_bias=True).eval()
    for linear in (theirs.proj_l, theirs.proj_w):
        nn.init.zeros_(linear.bias)  # ours has none
    core = TalkingHeadsAttention(HEADS)
    core.logits_mixing.copy_(theirs.proj_l.weight)  # type: ignore[union-attr]
    core.weights_mixing.copy_(theirs.proj_w.weight)  # type: ignore[union-attr]
    ours = MultiHeadAttention(dim, HEADS, core=core).eval()
    parts = (ours.query_projection, ours.key_projection, ours.value_projection)
    for part, weight, bias in zip(
        parts, theirs.qkv.weight.chunk(3), theirs.qkv.bias.chunk(3), strict=True
    ):
        part.weight.copy_(weight)
        part.bias.copy_(bias)
    ours.output_projection.load_state_dict(theirs.proj.state_dict())
    x = torch.randn(2, 1024, dim)
    compare(
        "module with talking heads (2, 1024, 512), against timm",
        lambda: ours(x),
        lambda: theirs(x),
        agree=1e-4,
        value=numbers,
        repeats=5,
    )


def memory() -> None:
    """Print the peak of extra memory at n = 4096, each measured in a process of its own."""
    for name, allowed in (("ours", 64.0), ("x-transformers", None)):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.stronger_attention", name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(f"extra memory of {name}: not measured ({done.stderr.strip().splitlines()[-1]})")
            continue
        limit = "" if allowed is None else f", allowed {allowed:g} MB"
        print(f"extra memory, talking heads, n = 4096, batch 1, {name}: {done.stdout.strip()} MB"
              f"{limit}")  # fmt: skip


def peak(name: str) -> float:
    """Return by how many MB the largest resident size grows in one call."""
    call: Callable[..., Any]
    if name == "ours":
        call = TalkingHeadsAttention(HEADS)
    else:
        from x_transformers.attend import Attend

        call = Attend(heads=HEADS, pre_talking_heads=True, post_talking_heads=True)
    with torch.no_grad():
        call(*draw(1, 64))  # kernels and thread pools
        given = draw(1, 4096)
        before = _peak_resident()
        call(*given)
    return (_peak_resident() - before) / 2**10


def _peak_resident() -> int:
    """Return the peak of this process in KiB; Linux only (getrusage would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"{peak(sys.argv[1]):.0f}")
    else:
        main()
