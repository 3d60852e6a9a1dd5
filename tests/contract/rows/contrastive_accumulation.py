"""Rows of `kexue.losses.contrastive` and `kexue.training.gradient_cache`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.row import Arguments, Row

NOT_FINITE = (
    "a loss runs in the training loop, where looking at values would stop an accelerator; NaN "
    "shows in the loss, as with PyTorch's own"
)
ANY_SHAPE = "an input may have any shape, as long as it has a batch dimension"


def pair(rng: np.random.Generator) -> Arguments:
    return {
        "queries": rng.standard_normal((4, 3)),
        "keys": rng.standard_normal((8, 3)),
        "temperature": 0.3,
    }


def views(rng: np.random.Generator) -> Arguments:
    return {"first": rng.standard_normal((4, 3)), "second": rng.standard_normal((4, 3))}


def samples(rng: np.random.Generator) -> Arguments:
    return {
        "representations": rng.standard_normal((4, 3)),
        "targets": np.array([1, 2, 3, 0]),
        "temperature": 0.7,
    }


def batch(rng: np.random.Generator) -> Arguments:
    return {"inputs": rng.standard_normal((5, 3)), "chunk_size": 2}


def encoder(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return layers.to(dtype)


def chunked(inputs: Tensor, chunk_size: int) -> Tensor:
    from kexue.training.gradient_cache import chunked_encode

    return chunked_encode(encoder(inputs.dtype), inputs, chunk_size=chunk_size)


def step(inputs: Tensor, chunk_size: Any, n_encoders: int = 1) -> list[Tensor]:
    """The loss, and the gradients of the encoder."""
    from kexue.training.gradient_cache import GradientCache

    tower = encoder(inputs.dtype)
    cache = GradientCache([tower] * n_encoders, spread, chunk_size=chunk_size)
    loss = cache.step(inputs).loss
    return [loss, *(parameter.grad for parameter in tower.parameters())]


def spread(h: Tensor) -> Tensor:
    return (h @ h.mT).logsumexp(1).sum()


def output() -> Any:
    from kexue.training.gradient_cache import GradientCacheOutput

    return GradientCacheOutput(torch.tensor(1.5), (torch.ones(2, 3), {"mean": torch.zeros(2)}))


WRONG_CHUNKS = {
    "no samples in a chunk": lambda given: {**given, "chunk_size": 0},
    "half a sample": lambda given: {**given, "chunk_size": 1.5},
    "truth as a size": lambda given: {**given, "chunk_size": True},
    "an empty batch": lambda given: {**given, "inputs": given["inputs"][:0]},
}

ROWS = [
    Row(
        name="kexue.losses.contrastive.info_nce",
        make=pair,
        arrays=("queries", "keys"),
        backends=("torch",),
        differentiable=("queries", "keys"),
        compiles=True,
        wrong={
            "temperature zero": lambda given: {**given, "temperature": 0.0},
            "another dimension": lambda given: {**given, "keys": given["keys"][:, :2]},
            "too few keys": lambda given: {**given, "keys": given["keys"][:3]},
            "symmetric with hard negatives": lambda given: {**given, "symmetric": True},
            "unknown reduction": lambda given: {**given, "reduction": "median"},
            "no queries": lambda given: {**given, "queries": given["queries"][:0]},
        },
        without={"not_finite_is_refused": NOT_FINITE},
    ),
    Row(
        name="kexue.losses.contrastive.nt_xent",
        make=views,
        arrays=("first", "second"),
        backends=("torch",),
        differentiable=("first", "second"),
        compiles=True,
        wrong={
            "negative temperature": lambda given: {**given, "temperature": -1.0},
            "other samples": lambda given: {**given, "second": given["second"][:3]},
        },
        without={"not_finite_is_refused": NOT_FINITE},
    ),
    Row(
        name="kexue.losses.contrastive.label_vectors",
        make=samples,
        arrays=("representations",),
        backends=("torch",),
        compiles=True,
        wrong={
            "temperature zero": lambda given: {**given, "temperature": 0.0},
            "too few targets": lambda given: {**given, "targets": given["targets"][:3]},
            "no such sample": lambda given: {**given, "targets": given["targets"] + 1},
        },
        without={"not_finite_is_refused": NOT_FINITE},
    ),
    Row(
        name="kexue.training.gradient_cache.batches.split_batch",
        make=batch,
        arrays=("inputs",),
        backends=("torch",),
        differentiable=("inputs",),
        wrong={
            **WRONG_CHUNKS,
            "nothing to split": lambda given: {**given, "inputs": ["a", "b"]},
            "two batch sizes": lambda given: {
                **given,
                "inputs": (given["inputs"], given["inputs"][:3]),
            },
        },
        without={
            "not_finite_is_refused": "it only takes apart what an encoder will look at",
            "wrong_dtype_is_refused": "it splits tensors of every type",
        },
    ),
    Row(
        name="kexue.training.gradient_cache.step.chunked_encode",
        make=batch,
        call=chunked,
        arrays=("inputs",),
        backends=("torch",),
        batched=("inputs",),
        differentiable=("inputs",),
        wrong=WRONG_CHUNKS,
        without={
            "not_finite_is_refused": "what an input may be is the encoder's affair",
            "wrong_dtype_is_refused": "what an input may be is the encoder's affair",
            "empty_batch": "an empty batch is refused, because encoders need not take one",
        },
    ),
    Row(
        name="kexue.training.gradient_cache.step.GradientCache",
        make=batch,
        call=step,
        arrays=("inputs",),
        backends=("torch",),
        wrong={
            **WRONG_CHUNKS,
            "two chunk sizes for one encoder": lambda given: {**given, "chunk_size": [2, 2]},
            "one input for two encoders": lambda given: {**given, "n_encoders": 2},
        },
        without={
            "not_finite_is_refused": "what an input may be is the encoder's affair",
            "wrong_dtype_is_refused": "what an input may be is the encoder's affair",
        },
    ),
    Row(
        name="kexue.training.gradient_cache.step.GradientCacheOutput",
        make=lambda rng: vars(output()),
        instance=output,
    ),
]
