"""Performer attention against performer-pytorch's and against PyTorch's fused softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import compare, measure
from kexue.nn.linear_attention import LinearAttentionState, PerformerAttention

HEADS, DIM, FEATURES = 4, 64, 256


def main() -> None:
    core = PerformerAttention(
        DIM, FEATURES, center=False, generator=torch.Generator().manual_seed(0)
    ).eval()
    against_softmax(core)
    against_peer(core)
    decoding(core)


def against_softmax(core: PerformerAttention) -> None:
    for n, target in ((2048, None), (4096, 1.8), (8192, 3.5)):
        given = heads(n)
        with torch.no_grad():
            # Another function: the values are compared in the tests, where features are many.
            compare(
                f"both directions, n = {n}, against fused softmax",
                lambda given=given: core(*given).output,
                partial(scaled_dot_product_attention, *given),
                agree=None,
                target=target,
                repeats=3,
            )
    given = heads(4096)
    with torch.no_grad():
        compare(
            "causal, n = 4096, against fused softmax",
            lambda: core(*given, is_causal=True).output,
            partial(scaled_dot_product_attention, *given, is_causal=True),
            agree=None,
            repeats=3,
        )


def against_peer(core: PerformerAttention) -> None:
    try:
        from performer_pytorch import FastAttention
    except ImportError:
        print("performer-pytorch is not installed, so there is no peer to compare with")
        return
    peers = {causal: FastAttention(DIM, nb_features=FEATURES, causal=causal)
             for causal in (False, True)}  # fmt: skip
    for peer in peers.values():
        peer.projection_matrix.copy_(core.features.projection)
    for n in (2048, 4096):
        given = heads(n)
        with torch.no_grad():
            compare(
                f"both directions, n = {n}, against performer-pytorch",
                lambda given=given: core(*given).output,
                lambda given=given: peers[False](*given),
                # The peer adds 1e-4 to every feature, a small pull towards the mean.
                agree=0.02,
                target=1.1,
                repeats=5,
            )
    given = heads(2048)
    with torch.no_grad():
        compare(
            "causal, n = 2048, against performer-pytorch",
            lambda: core(*given, is_causal=True).output,
            lambda: peers[True](*given),
            agree=0.02,
            target=8.0,
            repeats=3,
        )
    compare(
        "causal, n = 2048, forwards and backwards, against performer-pytorch",
        lambda: gradients(lambda *qkv: core(*qkv, is_causal=True).output, given),
        lambda: gradients(peers[True], given),
        agree=None,
        target=5.0,
        repeats=3,
    )


def decoding(core: PerformerAttention) -> None:
    """A step after many tokens takes as long as one after few."""
    token, times = heads(1), {}
    for length in (64, 16384):
        state = LinearAttentionState()
        with torch.no_grad():
            core(*heads(length), is_causal=True, cache=state)
            step = partial(core, *token, is_causal=True, cache=state)
            times[length] = measure(step, repeats=7)
    early, late = times.values()
    print(
        f"one decoding step: {early * 1e3:.3f} ms after 64 tokens, {late * 1e3:.3f} ms after "
        f"16384, ratio {late / early:.2f}"
    )


def heads(n: int) -> list[Tensor]:
    """Queries and keys small enough that the peer's epsilon, 1e-4 in each feature, stays small."""
    generator = torch.Generator().manual_seed(n)
    query, key, value = torch.randn(3, 1, HEADS, n, DIM, generator=generator).unbind()
    return [0.3 * query, 0.3 * key, value]


def gradients(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[Any, ...]:
    inputs = [x.clone().requires_grad_() for x in given]
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)


if __name__ == "__main__":
    main()
