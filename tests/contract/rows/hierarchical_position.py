"""Rows of kexue.nn.position.hierarchical and kexue.nn.position.extension."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from contract.row import Row


def _table(rng: np.random.Generator) -> dict[str, Any]:
    return {"weight": rng.normal(size=(7, 3)), "length": 20, "num_reserved": 2}


def _module() -> Any:
    from kexue.nn.position import HierarchicalPositionEmbedding

    return HierarchicalPositionEmbedding(7, 3, num_reserved=2, padding_idx=1)


def _ids(rng: np.random.Generator) -> dict[str, Any]:
    return {"position_ids": rng.integers(27, size=(4, 6))}


def _extended(weight: Any, max_length: int, **options: Any) -> Any:
    from kexue.nn.position import extend_position_embeddings

    embedding = torch.nn.Embedding.from_pretrained(weight, freeze=False)
    table = extend_position_embeddings(embedding, max_length, **options)
    return table(torch.tensor([0, 5, max_length - 1]))


WRONG_ALPHA = {
    f"alpha {alpha}": lambda given, alpha=alpha: {**given, "alpha": alpha}
    for alpha in (-0.1, 0.5, 1.0, float("nan"))
}
NOT_READ = "the model's table is only moved to its place, at any size, and read when it is used"

ROWS = [
    Row(
        name="kexue.nn.position.hierarchical.hierarchical_position_embedding",
        make=_table,
        arrays=("weight",),
        backends=("torch",),
        differentiable=("weight",),
        compiles=True,
        wrong={
            **WRONG_ALPHA,
            "no position": lambda given: {**given, "length": 0},
            "more than n² positions": lambda given: {**given, "length": 26},
            "every row reserved": lambda given: {**given, "num_reserved": 7},
            "a negative number of reserved rows": lambda given: {**given, "num_reserved": -1},
            "whole numbers": lambda given: {**given, "weight": torch.ones(7, 3, dtype=torch.int)},
        },
    ),
    Row(
        name="kexue.nn.position.hierarchical.HierarchicalPositionEmbedding",
        make=_ids,
        module=_module,
        batched=("position_ids",),
        backends=("torch",),
        compiles=True,
        wrong={
            "fractional positions": lambda given: {"position_ids": given["position_ids"] + 0.5},
            "yes and no": lambda given: {"position_ids": given["position_ids"] > 3},
        },
    ),
    Row(
        name="kexue.nn.position.extension.extend_position_embeddings",
        make=lambda rng: {"weight": rng.normal(size=(5, 3)), "max_length": 20},
        call=_extended,
        arrays=("weight",),
        backends=("torch",),
        wrong={
            **WRONG_ALPHA,
            "no longer than before": lambda given: {**given, "max_length": 5},
            "more than n² positions": lambda given: {**given, "max_length": 26},
            "every row reserved": lambda given: {**given, "num_reserved": 5},
        },
        without={
            "not_finite_is_refused": NOT_READ,
            "wrong_rank_is_refused": "the argument is a module; its table always has two axes",
            "wrong_dtype_is_refused": "the argument is a module, whose dtype is its own affair",
        },
    ),
]
