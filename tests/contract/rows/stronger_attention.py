"""Contract rows of kexue.nn.attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from contract.row import Arguments, Row

_NOT_FINITE = (
    "a layer is run in loops on accelerators, where looking at values costs a synchronisation; "
    "NaN stays in its own example"
)


def _heads(rng: np.random.Generator) -> Arguments:
    return {
        "query": rng.normal(size=(2, 3, 4, 5)),
        "key": rng.normal(size=(2, 3, 6, 5)),
        "value": rng.normal(size=(2, 3, 6, 4)),
        "mask": rng.random((4, 6)) < 0.7,
        "is_causal": True,
    }


def _inputs(rng: np.random.Generator) -> Arguments:
    return {
        "query": rng.normal(size=(2, 4, 8)),
        "key": rng.normal(size=(2, 6, 8)),
        "key_mask": rng.random((2, 6)) < 0.7,
        "need_weights": True,
    }


def _weights(rng: np.random.Generator) -> Arguments:
    weights = np.exp(rng.normal(size=(2, 5, 4)))
    return {"weights": weights / weights.sum(-1, keepdims=True)}


def _plain() -> Any:
    from kexue.nn.attention import DotProductAttention

    return DotProductAttention()


def _talking() -> Any:
    import torch

    from kexue.nn.attention import TalkingHeadsAttention

    core = TalkingHeadsAttention(3, query_chunk_size=3)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    return core


def _module() -> Any:
    from kexue.nn.attention import MultiHeadAttention

    return MultiHeadAttention(8, 2, key_dim=5, log_length=4)


def _product(weights: Any, key_dim: int = 3) -> Any:
    """The logits, which are unique where queries and keys are not."""
    from kexue.nn.attention import factor_attention_weights

    query, key = factor_attention_weights(weights, key_dim)
    return query @ key.mT


def _append(key: Any, value: Any) -> Any:
    from kexue.nn.attention import KeyValueCache

    cache = KeyValueCache()
    cache.append(key, value)
    return cache.append(key[:, :, :1], value[:, :, :1])


def _filled_cache() -> Any:
    import torch

    from kexue.nn.attention import KeyValueCache

    cache = KeyValueCache()
    cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5))
    return cache


def _output(output: Any, weights: Any) -> Any:
    from kexue.nn.attention import AttentionOutput

    return AttentionOutput(output, weights)


_WRONG_HEADS = {
    "another key size": lambda given: {**given, "key": given["key"][..., :4]},
    "fewer values": lambda given: {**given, "value": given["value"][:, :, :5]},
    "another batch": lambda given: {**given, "key": given["key"][:1]},
    "an integer mask": lambda given: {**given, "mask": given["mask"].int()},
    "a mask of another length": lambda given: {**given, "mask": given["mask"][:, :5]},
    "more causal queries than keys": lambda given: {
        **given,
        "key": given["key"][:, :, :3],
        "value": given["value"][:, :, :3],
        "mask": None,
    },
}
_WRONG_WEIGHTS = {
    "a weight of 0": lambda given: {**given, "weights": given["weights"] * 0},
    "a negative weight": lambda given: {**given, "weights": -given["weights"]},
}

ROWS = [
    Row(
        name="kexue.nn.attention.cores.AttentionOutput",
        make=lambda rng: {"output": rng.normal(size=(2, 3)), "weights": rng.normal(size=(2, 3))},
        call=_output,
        instance=lambda: _output(np.ones(3), np.ones(2)),
        without={"instance_pickles": "a named tuple has no dictionary to compare"},
    ),
    Row(
        name="kexue.nn.attention.cores.DotProductAttention",
        make=_heads,
        module=_plain,
        arrays=("query", "key", "value"),
        backends=("torch",),
        batched=("query", "key", "value"),
        differentiable=("query", "key", "value"),
        compiles=True,
        wrong=_WRONG_HEADS,
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "state_dict_round_trip": "there are no parameters to save",
        },
    ),
    Row(
        name="kexue.nn.attention.cores.TalkingHeadsAttention",
        make=_heads,
        module=_talking,
        arrays=("query", "key", "value"),
        backends=("torch",),
        batched=("query", "key", "value"),
        differentiable=("query", "key", "value"),
        compiles=True,
        wrong={
            **_WRONG_HEADS,
            "other numbers of heads": lambda given: {
                **given,
                "query": given["query"][:, :2],
                "key": given["key"][:, :2],
            },
        },
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.nn.attention.multi_head.MultiHeadAttention",
        make=_inputs,
        module=_module,
        arrays=("query", "key"),
        backends=("torch",),
        batched=("query", "key", "key_mask"),
        differentiable=("query", "key"),
        compiles=True,
        wrong={
            "another width": lambda given: {**given, "query": given["query"][..., :7]},
            "another batch": lambda given: {**given, "key": given["key"][:1]},
            "a key mask of another length": lambda given: {
                **given,
                "key_mask": given["key_mask"][:, :5],
            },
            "an integer mask": lambda given: {**given, "mask": given["key_mask"][:1].int()},
            "more causal queries than keys": lambda given: {
                **given,
                "key": given["key"][:, :3],
                "key_mask": None,
                "is_causal": True,
            },
        },
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.nn.attention.cache.KeyValueCache",
        make=lambda rng: {
            "key": rng.normal(size=(2, 3, 4, 5)),
            "value": rng.normal(size=(2, 3, 4, 6)),
        },
        call=_append,
        arrays=("key", "value"),
        backends=("torch",),
        batched=("key", "value"),
        differentiable=("key", "value"),
        instance=_filled_cache,
        wrong={
            "another batch": lambda given: {**given, "key": given["key"][:1]},
            "another length": lambda given: {**given, "key": given["key"][:, :, :2]},
        },
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_dtype_is_refused": "it keeps what it is given, and computes nothing",
        },
    ),
    Row(
        name="kexue.nn.attention.rank.minimum_key_dim",
        make=_weights,
        arrays=("weights",),
        backends=("torch",),
        batched=("weights",),
        wrong={**_WRONG_WEIGHTS, "a negative rtol": lambda given: {**given, "rtol": -1.0}},
    ),
    Row(
        name="kexue.nn.attention.rank.factor_attention_weights",
        make=_weights,
        call=_product,
        arrays=("weights",),
        backends=("torch",),
        batched=("weights",),
        differentiable=("weights",),
        wrong={**_WRONG_WEIGHTS, "a key size of 0": lambda given: {**given, "key_dim": 0}},
    ),
]
