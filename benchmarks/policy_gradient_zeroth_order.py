"""A zeroth-order step against MeZO's loop and evotorch's PGPE; BLEU against nltk and sacrebleu."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import compare
from kexue.losses import sentence_bleu
from kexue.optim import ZerothOrderSGD, zeroth_order_gradient

SHAPES = [(1000, 1000)] * 10


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        agreement()
        step()
        population()
        sentences()
    finally:
        torch.set_num_threads(threads)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full(shape, 0.01)) for shape in SHAPES]


class Reference:
    """The loop of the paper: one seed, four draws, each parameter reassigned."""

    def __init__(self, params: list[nn.Parameter], lr: float, epsilon: float) -> None:
        self.params, self.lr, self.epsilon, self.seed = params, lr, epsilon, 0

    def move(self, scale: float) -> None:
        torch.manual_seed(self.seed)
        for p in self.params:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z * self.epsilon

    @torch.no_grad()
    def step(self, loss) -> float:
        self.seed += 1
        self.move(1)
        ahead = float(loss())
        self.move(-2)
        behind = float(loss())
        self.move(1)
        slope = (ahead - behind) / (2 * self.epsilon)
        torch.manual_seed(self.seed)
        for p in self.params:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.device, dtype=p.dtype)
            p.data = p.data - self.lr * slope * z
        return (ahead + behind) / 2


def agreement() -> None:
    """Directions differ, so what can be compared is what both do to a quadratic on average."""

    def descent(build) -> np.ndarray:
        weight = nn.Parameter(torch.ones(1000))
        optimizer = build(weight)
        for _ in range(2000):
            optimizer.step(lambda: weight.square().mean() / 2)
        return weight.square().mean().item()

    ours = descent(lambda w: ZerothOrderSGD([w], lr=0.3, epsilon=1e-3))
    theirs = descent(lambda w: Reference([w], lr=0.3, epsilon=1e-3))
    # Descent by exp(-2 lr t / d) up to the noise of 2000 random slopes.
    if not 0.8 < ours / theirs < 1.25:
        raise AssertionError(f"descents differ: {ours:.3g} against {theirs:.3g}")
    print(f"loss of a quadratic after 2000 steps: ours {ours:.4f}, MeZO loop {theirs:.4f}")


def step() -> None:
    reference = Reference(parameters(), 1e-6, 1e-3)
    for what, target, given in (
        ("in place", 1 / 0.7, {}),
        ("exact restore", 1 / 0.6, {"exact_restore": True}),
        ("random signs, in place", 1 / 0.4, {"distribution": "rademacher"}),
    ):
        params = parameters()
        optimizer = ZerothOrderSGD(params, lr=1e-6, **given)
        compare(
            f"one step on ten matrices of a million, {what}, against MeZO's loop",
            lambda optimizer=optimizer, params=params: optimizer.step(lambda: params[0][0, 0]),
            lambda: reference.step(lambda: reference.params[0][0, 0]),
            agree=None,
            target=target,
            repeats=5,
        )


def population() -> None:
    try:
        from evotorch import Problem
        from evotorch.algorithms import PGPE
    except ImportError:
        print("evotorch is not installed: PGPE is not timed (pip install evotorch)")
        return
    d, size = 200_000, 20
    problem = Problem(
        "min", lambda x: x.square().sum(-1), solution_length=d, initial_bounds=(-1, 1),
        vectorized=True, dtype=torch.float32,
    )  # fmt: skip
    pgpe = PGPE(
        problem, popsize=size, center_learning_rate=0.01, stdev_learning_rate=0.1, stdev_init=0.1,
        distributed=False,
    )  # fmt: skip
    weight = nn.Parameter(torch.zeros(d).uniform_(-1, 1))
    optimizer = ZerothOrderSGD([weight], lr=0.01, epsilon=0.1, directions=size // 2)
    compare(
        "d = 200 000, population of 20 in antithetic pairs, against evotorch's PGPE",
        lambda: optimizer.step(lambda: weight.square().sum()),
        pgpe.step,
        agree=None,
        target=1 / 0.65,
        repeats=5,
    )
    center = torch.zeros(d)
    compare(
        "the same as one estimate that holds all directions, against evotorch's PGPE",
        lambda: zeroth_order_gradient(
            lambda x: x.square().sum(-1), center, epsilon=0.1, samples=size // 2
        ),
        pgpe.step,
        agree=None,
        repeats=5,
    )


def sentences() -> None:
    rng = np.random.default_rng(0)
    candidates, references = rng.integers(0, 30, (2, 256, 25))
    actions, targets = torch.from_numpy(candidates), torch.from_numpy(references)

    def ours() -> Tensor:
        return sentence_bleu(actions, targets)

    try:
        from nltk.translate.bleu_score import SmoothingFunction
        from nltk.translate.bleu_score import sentence_bleu as nltk_bleu
    except ImportError:
        print("nltk is not installed: its BLEU is not timed (pip install nltk)")
    else:
        smooth = SmoothingFunction().method2
        lists = candidates.tolist(), references.tolist()
        compare(
            "BLEU of 256 sentences of 25 tokens, against nltk",
            ours,
            lambda: [
                nltk_bleu([r], c, smoothing_function=smooth) for c, r in zip(*lists, strict=True)
            ],
            agree=1e-12,
        )
    try:
        import sacrebleu
    except ImportError:
        print("sacrebleu is not installed: its BLEU is not timed (pip install sacrebleu)")
        return
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # a remark on each short sentence
    metric = sacrebleu.BLEU(smooth_method="add-k", smooth_value=1, tokenize="none")
    texts = [[" ".join(map(str, row)) for row in side] for side in (candidates, references)]
    compare(
        "BLEU of 256 sentences of 25 tokens, against sacrebleu",
        ours,
        lambda: [metric.sentence_score(c, [r]).score / 100 for c, r in zip(*texts, strict=True)],
        agree=1e-12,
    )


if __name__ == "__main__":
    main()
