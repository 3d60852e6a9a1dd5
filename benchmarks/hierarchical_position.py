"""A hierarchical table against an ordinary one of the same length, and its making and extension.

The peer is `nn.Embedding` with the materialised codes as its rows: the same values by one lookup.
"""

from __future__ import annotations

import importlib.util
import time

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import compare, measure
from kexue.nn.position import (
    HierarchicalPositionEmbedding,
    extend_position_embeddings,
    hierarchical_position_embedding,
)

TRAINED, LONGER, DIM, BATCH = 512, 2048, 768, 8


def main() -> None:
    lookups()
    tables()
    models()


def lookups() -> None:
    """Forward, and forward with backward: at most 4 times an embedding, 2 times for a range."""
    torch.manual_seed(0)
    table = HierarchicalPositionEmbedding(TRAINED, DIM)
    peer = table.materialize(LONGER)
    gradient = torch.randn(BATCH, LONGER, DIM)
    every_id = torch.arange(LONGER).expand(BATCH, -1).contiguous()
    kinds = {
        "any ids": (torch.randint(LONGER, (BATCH, LONGER)), 1 / 4),
        "a plain range": (every_id, 1 / 2),
    }
    for kind, (ids, target) in kinds.items():

        def forward(module: nn.Module, ids: Tensor = ids) -> Tensor:
            with torch.no_grad():
                return module(ids)

        def both(module: nn.Module, ids: Tensor = ids) -> Tensor:
            module.zero_grad()
            output = module(ids)
            output.backward(gradient)
            return output.detach()

        for what, call in (("forward", forward), ("forward and backward", both)):
            compare(
                f"{what} of {kind} ({BATCH}, {LONGER}), dim {DIM}, against nn.Embedding({LONGER})",
                lambda call=call: call(table),
                lambda call=call: call(peer),
                agree=0.0,
                target=target,
            )


def tables() -> None:
    """A longer table within 50 ms; tiling, which is what one would do instead, beside it."""
    weight = torch.randn(TRAINED, DIM)
    table = HierarchicalPositionEmbedding.from_embedding(nn.Embedding.from_pretrained(weight))
    for what, make in (
        ("hierarchical_position_embedding", lambda: hierarchical_position_embedding(weight, 8192)),
        ("materialize", lambda: table.materialize(8192)),
        ("Tensor.repeat", lambda: weight.repeat(16, 1)),
    ):
        print(f"{what}, {TRAINED} to 8192 at dim {DIM}: {measure(make) * 1e3:.1f} ms, target 50 ms")


def models() -> None:
    """Extension of a model of the size of BERT-base within 0.2 s; its outputs stay the same."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: no extension of BERT here")
        return
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=12)).eval()
    tokens = torch.randint(1000, (1, 64))
    with torch.no_grad():
        before = model(tokens).last_hidden_state
        start = time.perf_counter()
        extend_position_embeddings(model, LONGER)
        seconds = time.perf_counter() - start
        after = model(tokens).last_hidden_state
    same = bool(np.array_equal(before.numpy().view(np.int32), after.numpy().view(np.int32)))
    print(f"extension of BERT-base to {LONGER}: {seconds * 1e3:.1f} ms, target 200 ms")
    print(f"its outputs for 64 tokens are the same bits: {same}")


if __name__ == "__main__":
    main()
