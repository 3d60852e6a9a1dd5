"""N passes against N steps of teacher forcing; memory with checkpointing. No package is a peer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import compare, measure
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.training.teaforn import TeaForNOutput, teaforn_loss


def main() -> None:
    for problem in (gru(), transformer()):
        agreement(problem)
        for n_grams in (2, 3):
            passes(problem, n_grams)
        approximations(problem)
    for n_grams in (2, 3):
        memory(transformer(), n_grams)


class Problem:
    """A model in parts, and a batch of tokens."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        body: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        embedding: nn.Embedding,
        shape: tuple[int, int],
    ) -> None:
        self.name, self.model, self.body, self.head = name, model, body, head
        self.embedding = embedding
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(embedding.num_embeddings, shape, generator=generator)

    def teaforn(self, n_grams: int, **options: object) -> TeaForNOutput:
        return teaforn_loss(
            self.body, self.head, self.embedding(self.tokens[:, :-1]), self.tokens[:, 1:],
            embedding=self.embedding, n_grams=n_grams, **options,
        )  # fmt: skip

    def forced(self) -> Tensor:
        """What a training loop without TeaForN computes."""
        logits = self.head(self.body(self.embedding(self.tokens[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def step(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Forward and backward, which is what N passes multiply."""
        return list(torch.autograd.grad(loss(), list(self.model.parameters())))


def gru() -> Problem:
    torch.manual_seed(0)
    parts = nn.ModuleList(
        [nn.Embedding(48, 96), nn.GRU(96, 96, batch_first=True), nn.Linear(96, 96)]
    )
    embedding, recurrent, linear = parts
    head = nn.Linear(96, 48)
    parts.append(head)
    return Problem(
        "GRU of 96, |V| = 48", parts, lambda e: linear(recurrent(e)[0]), head, embedding, (24, 33)
    )


def transformer() -> Problem:
    torch.manual_seed(0)
    config = TransformerConfig(8000, dim=256, num_layers=4, max_length=64)
    model = Transformer(config)
    table = model.token_embeddings
    return Problem(
        "Transformer 4 x 256, |V| = 8000",
        model,
        lambda e: model(inputs_embeds=e, return_hidden=True),
        lambda h: nn.functional.linear(h, table.weight),
        table,
        (8, 65),
    )


def agreement(problem: Problem) -> None:
    """One pass is teacher forcing, and discount 0 has its gradient."""
    expected = problem.step(problem.forced)
    for options in ({"n_grams": 1}, {"n_grams": 2, "discount": 0.0}):
        found = problem.step(lambda options=options: problem.teaforn(**options).loss)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two)


def passes(problem: Problem, n_grams: int) -> None:
    compare(
        f"{problem.name}: {n_grams} passes, forward and backward, against {n_grams} steps of "
        "teacher forcing",
        lambda: problem.step(lambda: problem.teaforn(n_grams).loss),
        lambda: [problem.step(problem.forced) for _ in range(n_grams)],
        agree=None,
        target=1 / 1.05,
        repeats=11,
    )


def approximations(problem: Problem) -> None:
    def seconds(approximation: str) -> float:
        return measure(
            lambda: problem.step(lambda: problem.teaforn(2, approximation=approximation).loss),
            repeats=5,
        )

    times = {a: seconds(a) for a in ("hidden", "expectation", "top_k", "hard", "gumbel")}
    print(
        f"  {problem.name}, two passes: "
        + ", ".join(f"{name} {time * 1e3:.1f} ms" for name, time in times.items())
    )


def memory(problem: Problem, n_grams: int) -> None:
    """Peak of what is allocated in forward and backward, with and without checkpointing."""
    one = peak(lambda: problem.step(problem.forced))
    for checkpointing in (False, True):
        many = peak(
            lambda checkpointing=checkpointing: problem.step(
                lambda: problem.teaforn(n_grams, activation_checkpointing=checkpointing).loss
            )
        )
        # Output vectors, and the inputs made of them, of every pass.
        hidden = 2 * n_grams * problem.tokens[:, 1:].numel() * problem.embedding.embedding_dim * 4
        ratio = (many - hidden) / one
        verdict = f"  target 1.3 {'met' if ratio <= 1.3 else 'MISSED'}" if checkpointing else ""
        print(
            f"{problem.name}: peak memory of {n_grams} passes"
            f"{' with checkpointing' if checkpointing else ''} {many / 2**20:.1f} MiB, of one "
            f"{one / 2**20:.1f} MiB; without hidden states the ratio is {ratio:.2f}{verdict}"
        )


def peak(function: Callable[[], object]) -> int:
    """Largest number of bytes that torch holds at a time beyond what it held before."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    main()
