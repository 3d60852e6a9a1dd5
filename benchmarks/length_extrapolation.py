"""Random positions against sorting random keys; strings against a loop; both against training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from benchmarks.timing import compare, measure
from kexue.lab.formal_languages import TASKS
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.position import equal_mean_positions, random_positions
from kexue.nn.rotary import RotaryEmbedding

# A generated batch may cost 5 % of the step that learns from it.
SHARE = 0.05


def main() -> None:
    positions()
    strings()
    share_of_a_training_step()


def at_most(what: str, seconds: float, limit: float) -> None:
    met = "met" if seconds <= limit else "MISSED"
    print(f"{what}: {seconds * 1e3:.3f} ms, target {limit * 1e3:g} ms {met}", flush=True)


def positions() -> None:
    def ours() -> torch.Tensor:
        return random_positions(40, 2048, batch_size=512)

    def by_keys() -> torch.Tensor:
        return torch.rand(512, 2048).argsort(-1)[:, :40].sort(-1).values

    i = torch.arange(1, 41, dtype=torch.float64)
    mean = i * 2049 / 41 - 1
    error = (i * (41 - i) * 2049 * 2008 / (41**2 * 42) / 512).sqrt()
    for name, draw in (("ours", ours), ("keys", by_keys)):
        distance = ((draw().double().mean(0) - mean).abs() / error).max()
        print(f"{name}: means of the positions within {distance:.1f} standard errors")
        if distance > 6:
            raise AssertionError(f"{name} does not draw uniform subsets")
    compare("512 subsets of 40 out of 2048, against keys", ours, by_keys, agree=None, target=5.0)
    at_most("the same", measure(ours), 5e-3)
    at_most(
        "64 subsets of 256 out of 2^20, where keys would be 67 million",
        measure(lambda: random_positions(256, 2**20, batch_size=64)),
        20e-3,
    )
    at_most(
        "512 sequences of 64 equal-mean positions, exponential",
        measure(lambda: equal_mean_positions(64, batch_size=512)),
        1e-3,
    )
    at_most(
        "512 sequences of 64 equal-mean positions, beta",
        measure(
            lambda: equal_mean_positions(64, batch_size=512, distribution="beta", max_length=512)
        ),
        1e-3,
    )


IN_PYTHON: dict[str, Callable[[list[int]], list[int]]] = {
    "even_pairs": lambda s: [1 - sum(a != b for a, b in pairwise(s)) % 2],
    "parity_check": lambda s: [1 - s.count(1) % 2],
    "reverse_string": lambda s: s[::-1],
    "duplicate_string": lambda s: s + s,
    "odds_first": lambda s: s[::2] + s[1::2],
    "bucket_sort": sorted,
}


def strings() -> None:
    """A loop draws and answers one string after the other, symbol by symbol."""
    for name, answer in IN_PYTHON.items():
        task = TASKS[name]
        symbols, rng = len(task.input_vocabulary), random.Random(0)

        def loop(answer=answer, symbols=symbols, rng=rng) -> torch.Tensor:
            batch = [[rng.randrange(symbols) for _ in range(500)] for _ in range(512)]
            return torch.tensor([string + answer(string) for string in batch])

        drawn = task.sample(512, 500, generator=torch.Generator().manual_seed(0))
        expected = [answer(string) for string in drawn.inputs.tolist()]
        if drawn.targets.tolist() != expected:
            raise AssertionError(f"{name}: answers differ from those of the loop")
        compare(
            f"512 strings of 500 symbols, {name}, against a loop",
            lambda task=task: task.sample(512, 500),
            loop,
            agree=None,
            target=20.0,
            repeats=3,
        )
    slowest = {name: measure(lambda t=task: t.sample(1000, 500), repeats=3) for name, task in
               TASKS.items()}  # fmt: skip
    name = max(slowest, key=lambda name: slowest[name])
    at_most(f"1000 strings of 500 symbols, slowest task ({name})", slowest[name], 2.0)


def share_of_a_training_step() -> None:
    """The study's model, 64 strings of 9 symbols, the mean length of its training."""
    for name, task in TASKS.items():
        symbols = max(len(task.input_vocabulary) + 1, len(task.output_vocabulary))
        config = TransformerConfig(
            vocab_size=symbols, dim=48, num_layers=3, max_length=None, causal=False,
            tie_embeddings=False, activation="relu",
        )  # fmt: skip
        model = Transformer(config, position=RotaryEmbedding(12))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        at = random_positions(9, 256, batch_size=64)
        # What is learnt has no bearing on the time: symbols of the input serve as targets.
        tokens = task.sample(64, 9).inputs
        at = at[:, : tokens.shape[1]]

        def step(model=model, optimizer=optimizer, tokens=tokens, at=at) -> None:
            optimizer.zero_grad()
            logits = model(tokens, positions=at)
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()

        def generate(task=task) -> None:
            task.sample(64, 9)
            random_positions(9, 256, batch_size=64)

        share = measure(generate, repeats=5) / measure(step, repeats=5)
        met = "met" if share <= SHARE else "MISSED"
        shown = math.ceil(share * 1e4) / 1e2
        print(f"strings and positions of {name}: {shown} % of a training step, "
              f"target {SHARE:.0%} {met}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
