"""Rows of `kexue.nn.linear_attention`."""

from typing import Any

import numpy as np
import torch
from torch import nn

from contract.row import Arguments, Row
from kexue.nn.attention import MultiHeadAttention
from kexue.nn.linear_attention import (
    LinearAttention,
    LinearAttentionState,
    PerformerAttention,
    RandomFeatures,
    linear_attention,
    random_projection,
    replace_attention,
)

NO_LOOK = (
    "attention runs in loops on accelerators, where looking at values costs a synchronisation; "
    "as in torch.nn, NaN passes through"
)


def vectors(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(2, 3, 4))}


def pairs(rng: np.random.Generator) -> Arguments:
    query, key = 0.5 * rng.normal(size=(2, 3, 4))
    return {"query": query, "key": key, "num_features": 6, "orthogonal": True, "scale": 0.7}


def heads(rng: np.random.Generator, *, is_causal: bool = True) -> Arguments:
    query, key, value = rng.normal(size=(3, 2, 2, 5, 4))
    return {"query": query, "key": key, "value": value, "is_causal": is_causal}


def summands(rng: np.random.Generator) -> Arguments:
    query, key, value = rng.normal(size=(3, 2, 2, 5, 4))
    return {"query_features": query, "key_features": key, "value": value, "is_causal": True}


def log_attention(**given: Any) -> Any:
    return linear_attention(**given, log_features=True, chunk_size=2)


def features(kind: str) -> RandomFeatures:
    return RandomFeatures(4, 3, kind=kind, generator=torch.Generator().manual_seed(0))


def performer() -> PerformerAttention:
    return PerformerAttention(4, 6, chunk_size=2, generator=torch.Generator().manual_seed(0))


def filled_state() -> LinearAttentionState:
    state = LinearAttentionState()
    tokens = torch.ones(1, 1, 3, 4)
    LinearAttention()(tokens, tokens, tokens, is_causal=True, cache=state)
    return state


def replaced(query: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    layer = MultiHeadAttention(4, 2).to(query.dtype)
    replace_attention(layer, lambda layer: LinearAttention())
    return layer(query).output


def kinds_of(name: str) -> Any:
    def wrong(given: Arguments) -> Arguments:
        return {**given, name: given[name].long()}

    return wrong


HEADS_WRONG = {
    "another key size": lambda given: {**given, "key": given["key"][..., :3]},
    "another length": lambda given: {**given, "value": given["value"][:, :, :3]},
    "causal of different lengths": lambda given: {
        **given,
        "query": given["query"][:, :, :3],
        "is_causal": True,
    },
    "weights": lambda given: {**given, "need_weights": True},
    "a mask for each query": lambda given: {**given, "mask": torch.ones(5, 5, dtype=torch.bool)},
    "an additive mask": lambda given: {**given, "mask": torch.zeros(1, 1, 1, 5)},
    "a mask of another length": lambda given: {
        **given,
        "mask": torch.ones(1, 1, 1, 4, dtype=torch.bool),
    },
    "scale 0": lambda given: {**given, "scale": 0.0},
    "a cache for both directions": lambda given: {
        **given,
        "is_causal": False,
        "cache": LinearAttentionState(),
    },
    "another kind of cache": lambda given: {**given, "cache": [1]},
    "integers": kinds_of("query"),
}


ROWS = [
    Row(
        name="kexue.nn.linear_attention.features.random_projection",
        make=lambda rng: {"num_features": 7, "dim": 3, "norm": "stratified"},
        call=lambda generator=None, **given: random_projection(
            generator=generator or torch.Generator().manual_seed(0), **given
        ),
        seeded="generator",
        wrong={
            "no features": lambda given: {**given, "num_features": 0},
            "no dimensions": lambda given: {**given, "dim": 0},
            "unknown norm": lambda given: {**given, "norm": "unit"},
        },
    ),
    *(
        Row(
            name="kexue.nn.linear_attention.features.RandomFeatures",
            make=vectors,
            module=lambda kind=kind: features(kind),
            arrays=("x",),
            backends=("torch",),
            batched=("x",),
            differentiable=("x",),
            compiles=True,
            wrong={
                "another length": lambda given: {"x": given["x"][..., :3]},
                "scale 0": lambda given: {**given, "scale": 0.0},
                "integers": kinds_of("x"),
            },
            without={"not_finite_is_refused": NO_LOOK},
        )
        for kind in ("positive", "trigonometric")
    ),
    Row(
        name="kexue.nn.linear_attention.variance.softmax_kernel_variance",
        make=pairs,
        arrays=("query", "key"),
        backends=("torch",),
        batched=("query", "key"),
        differentiable=("query", "key"),
        wrong={
            "another length": lambda given: {**given, "key": given["key"][..., :3]},
            "shapes that do not broadcast": lambda given: {**given, "key": given["key"][:2]},
            "no features": lambda given: {**given, "num_features": 0},
            "orthogonal without a closed form": lambda given: {**given, "kind": "hyperbolic"},
            "unknown kind": lambda given: {**given, "kind": "cosine"},
            "negative scale": lambda given: {**given, "scale": -1.0},
        },
        without={"not_finite_is_refused": "the variance of NaN is NaN, as for any formula"},
    ),
    *(
        Row(
            name="kexue.nn.linear_attention.attention.linear_attention",
            make=make,
            call=call,
            arrays=("query_features", "key_features", "value"),
            backends=("torch",),
            batched=("query_features", "key_features", "value"),
            differentiable=("query_features", "key_features", "value"),
            compiles=True,
            wrong={
                "other features": lambda given: {
                    **given,
                    "key_features": given["key_features"][..., :3],
                },
                "another length": lambda given: {**given, "value": given["value"][:, :, :3]},
                "causal of different lengths": lambda given: {
                    **given,
                    "query_features": given["query_features"][:, :, :3],
                    "is_causal": True,
                },
                "a mask of another length": lambda given: {
                    **given,
                    "key_mask": torch.ones(4, dtype=torch.bool),
                },
                "a mask of numbers": lambda given: {**given, "key_mask": torch.ones(5)},
            },
            without={"not_finite_is_refused": NO_LOOK},
        )
        for make, call in (
            (summands, log_attention),
            (
                lambda rng: {k: np.abs(v) for k, v in summands(rng).items()} | {"is_causal": False},
                None,
            ),
        )
    ),
    Row(
        name="kexue.nn.linear_attention.attention.LinearAttentionState",
        make=lambda rng: {},
        instance=filled_state,
    ),
    *(
        Row(
            name=f"kexue.nn.linear_attention.performer.{build.__name__}",
            make=lambda rng, is_causal=is_causal: heads(rng, is_causal=is_causal),
            module=module,
            arrays=("query", "key", "value"),
            backends=("torch",),
            batched=("query", "key", "value"),
            differentiable=("query", "key", "value"),
            compiles=True,
            wrong=HEADS_WRONG,
            without={"not_finite_is_refused": NO_LOOK},
        )
        for build, module in (
            (PerformerAttention, performer),
            (LinearAttention, lambda: LinearAttention(chunk_size=2)),
        )
        for is_causal in (True, False)
    ),
    Row(
        name="kexue.nn.linear_attention.replace.replace_attention",
        make=lambda rng: {"query": rng.normal(size=(2, 3, 4))},
        call=lambda query=None, model=None, make_core=None: (
            replaced(query) if model is None else replace_attention(model, make_core)
        ),
        arrays=("query",),
        backends=("torch",),
        batched=("query",),
        wrong={
            "a model without attention": lambda given: {
                "model": nn.Linear(2, 2),
                "make_core": lambda layer: LinearAttention(),
            },
            "no core": lambda given: {
                "model": MultiHeadAttention(4, 2),
                "make_core": lambda layer: None,
            },
        },
        without={
            "not_finite_is_refused": NO_LOOK,
            "wrong_dtype_is_refused": "the layer around the core sees the input first",
        },
    ),
]
