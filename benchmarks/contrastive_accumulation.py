"""Cached gradients against the plain step, GradCache and sentence-transformers.

Needs the packages gradcache and sentence-transformers; where one is missing, its lines are left
out. Times are of whole steps on the machine's processor, memory is what autograd holds for the
backward pass.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.timing import compare
from kexue.training.gradient_cache import GradientCache, info_nce

BATCH = 512
WORDS = ["in", "high", "dimension", "random", "vectors", "are", "almost", "orthogonal", "to", "me"]


def main() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 128)
    )
    first, second = torch.randn(2, BATCH, 256)

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        return info_nce(queries, keys, temperature=0.05)

    def plain() -> np.ndarray:
        encoder.zero_grad()
        loss(encoder(first), encoder(second)).backward()
        return gradients(encoder)

    def cached(chunk_size: int) -> Callable[[], np.ndarray]:
        cache = GradientCache([encoder, encoder], loss, chunk_size=chunk_size)

        def step() -> np.ndarray:
            encoder.zero_grad()
            cache.step(first, second)
            return gradients(encoder)

        return step

    for chunk_size, allowed in ((512, None), (128, 1.40), (32, None)):
        compare(
            f"batch {BATCH}, chunks of {chunk_size}, against the plain step",
            cached(chunk_size),
            plain,
            agree=1e-4,
            target=None if allowed is None else 1 / allowed,
            repeats=5,
        )
        ratio = processor_time(cached(chunk_size), plain)
        print(f"  in seconds of the processor {ratio:.2f} times the plain step"
              + (f", allowed {allowed:g}" if allowed else ""))  # fmt: skip
    against_grad_cache(encoder, loss, first, second, cached)
    memory_against_batch(encoder, loss)
    against_sentence_transformers()


def processor_time(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Return the ratio of the medians, which other work on the machine disturbs less."""
    times: list[list[float]] = [[], []]
    for _ in range(7):
        for step, found in zip((ours, theirs), times, strict=True):
            start = time.process_time()
            step()
            found.append(time.process_time() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def gradients(*modules: nn.Module) -> np.ndarray:
    found = [p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None]
    return torch.cat(found).numpy()


def against_grad_cache(
    encoder: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    first: Tensor,
    second: Tensor,
    cached: Callable[[int], Callable[[], np.ndarray]],
) -> None:
    try:
        # The wheel's own modules import one another under the name of the repository.
        import gradcache.context_managers

        sys.modules.setdefault("grad_cache", gradcache)
        sys.modules.setdefault("grad_cache.context_managers", gradcache.context_managers)
        from gradcache.grad_cache import GradCache
    except ImportError as error:
        print(f"gradcache is missing, or cannot be imported ({error}); pip install gradcache")
        return
    for chunk_size in (128, 32):
        cache = GradCache([encoder, encoder], chunk_size, loss)

        def theirs(cache: Any = cache) -> np.ndarray:
            encoder.zero_grad()
            cache(first, second)
            return gradients(encoder)

        compare(
            f"batch {BATCH}, chunks of {chunk_size}, against luyug/GradCache",
            cached(chunk_size),
            theirs,
            agree=1e-4,
            target=1 / 1.02,
            repeats=9,
        )
        ratio = processor_time(cached(chunk_size), theirs)
        print(f"  in seconds of the processor {ratio:.2f} times theirs, allowed 1.02")


def memory_against_batch(encoder: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Print what one step holds for its backward passes, the loss's matrix included."""
    for batch in (512, 1024, 2048):
        first, second = torch.randn(2, batch, 256)
        cache = GradientCache([encoder, encoder], loss, chunk_size=64)
        plain = held_bytes(lambda a=first, b=second: loss(encoder(a), encoder(b)).backward())
        ours = held_bytes(lambda a=first, b=second, c=cache: c.step(a, b))
        matrix = batch**2 * 4
        print(f"held at batch {batch}: plain {plain / 2**20:.1f} MiB, chunks of 64 "
              f"{ours / 2**20:.1f} MiB; a matrix of similarities {matrix / 2**20:.1f}")  # fmt: skip


def held_bytes(step: Callable[[], object]) -> int:
    """Return the peak of the memory that tensors saved for backward passes share."""
    memory: dict[int, tuple[int, int]] = {}
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()

    def hold(tensor: Tensor) -> Held:
        nonlocal peak
        held = Held(tensor)
        storage = tensor.untyped_storage()
        memory[id(held)] = storage.data_ptr(), storage.nbytes()
        peak = max(peak, sum(dict(memory.values()).values()))
        weakref.finalize(held, memory.pop, id(held))
        return held

    with saved_tensors_hooks(hold, lambda held: held.tensor):
        step()
    return peak


def against_sentence_transformers() -> None:
    try:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )
    except ImportError as error:
        print(f"sentence-transformers is missing ({error}); pip install sentence-transformers")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = sentence_transformer(Path(folder)).train()
    generator = np.random.default_rng(0)
    columns = [
        model.preprocess([" ".join(generator.choice(WORDS, 24)) for _ in range(256)])
        for _ in range(2)
    ]

    def encoder(features: dict[str, Any]) -> Tensor:
        return model(features)["sentence_embedding"]

    cache = GradientCache([encoder, encoder], info_nce, chunk_size=32)
    their_loss = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=32)

    def ours() -> np.ndarray:
        model.zero_grad()
        cache.step(*((column,) for column in columns), temperature=0.05)
        return gradients(model)

    def theirs() -> np.ndarray:
        model.zero_grad()
        their_loss([dict(column) for column in columns], torch.empty(0)).backward()
        return gradients(model)

    compare(
        "small BERT, batch 256, chunks of 32, against sentence-transformers",
        ours,
        theirs,
        agree=1e-4,
        target=1 / 1.02,
        repeats=5,
    )
    for name, step in (("ours", ours), ("sentence-transformers", theirs)):
        print(f"held by that step, {name}: {held_bytes(step) / 2**20:.1f} MiB")


def sentence_transformer(folder: Path) -> Any:
    """Build a random one of two layers, with a vocabulary of a few words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=32)
    return SentenceTransformer(modules=[transformer, Pooling(128)], device="cpu")


if __name__ == "__main__":
    main()
