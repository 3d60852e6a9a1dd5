"""Rotary embedding against a plain copy, rotary-embedding-torch and Hugging Face's formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import compare
from kexue.nn.rotary import RotaryEmbedding

SHAPE = (1, 8, 2048, 64)
# At most 3 times the time of a copy is a ratio of at least 1 / 3.
AT_MOST_3 = 1 / 3
# The peers' angles are float32: at position 2047 they are off by 2^-14, values by 4 times that.
FLOAT32_ANGLES = 3e-4


def main() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    interleaved = RotaryEmbedding(SHAPE[-1])
    half = RotaryEmbedding(SHAPE[-1], layout="half")
    against_a_copy(x, interleaved, half)
    against_rotary_embedding_torch(x, interleaved)
    against_hugging_face(x, half)
    at_a_million()


def against_a_copy(x: Tensor, interleaved: RotaryEmbedding, half: RotaryEmbedding) -> None:
    for rope, target in ((interleaved, AT_MOST_3), (half, None)):
        compare(
            f"forward {SHAPE}, {rope.layout}, against x.clone()",
            lambda rope=rope: rope.rotate(x),
            x.clone,
            agree=None,
            target=target,
        )


def against_rotary_embedding_torch(x: Tensor, rope: RotaryEmbedding) -> None:
    try:
        from rotary_embedding_torch import RotaryEmbedding as Peer
    except ImportError:
        print("no comparison with rotary-embedding-torch, which is not installed")
        return
    peer = Peer(dim=SHAPE[-1], cache_max_seq_len=SHAPE[-2])
    for name, run in (("forward", _forward), ("forward and backward", _forward_and_backward)):
        compare(
            f"{name} {SHAPE}, interleaved, against rotary-embedding-torch",
            run(rope.rotate, x),
            run(peer.rotate_queries_or_keys, x),
            agree=FLOAT32_ANGLES,
            target=4.0,
        )


def against_hugging_face(x: Tensor, rope: RotaryEmbedding) -> None:
    try:
        from transformers.models.llama.modeling_llama import (
            LlamaConfig,
            LlamaRotaryEmbedding,
            rotate_half,
        )
    except ImportError:
        print("no comparison with Hugging Face's formula: transformers is not installed")
        return
    config = LlamaConfig(hidden_size=512, num_attention_heads=8)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(SHAPE[-2])[None])
    cos, sin = cos[:, None], sin[:, None]
    for name, run in (("forward", _forward), ("forward and backward", _forward_and_backward)):
        compare(
            f"{name} {SHAPE}, half, against Hugging Face's formula",
            run(rope.rotate, x),
            run(lambda x: x * cos + rotate_half(x) * sin, x),
            agree=FLOAT32_ANGLES,
            target=1.5,
        )


def _forward(rotate: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return rotate(x)

    return call


def _forward_and_backward(rotate: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    leaf = x.clone().requires_grad_()
    upstream = x.flip(-1).contiguous()

    def call() -> Tensor:
        return torch.autograd.grad(rotate(leaf), leaf, upstream)[0]

    return call


def at_a_million() -> None:
    """No race: how far cosines and sines are off, far out."""
    position = torch.tensor([1_000_003])
    unit = torch.tensor([[1.0, 0.0]]).repeat(1, 32)
    exact = RotaryEmbedding(64).angles(position).cos()[0]
    ours = RotaryEmbedding(64).rotate(unit, positions=position)[0, ::2]
    print(f"error of cosines at position 1000003: ours {(ours - exact).abs().max():.1e}")
    try:
        from rotary_embedding_torch import RotaryEmbedding as Peer
    except ImportError:
        return
    theirs = Peer(dim=64)(position.float())[0, ::2].cos()
    print(f"error of cosines at position 1000003: theirs {(theirs - exact).abs().max():.1e}")


if __name__ == "__main__":
    main()
