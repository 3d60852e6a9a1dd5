r"""Gradient accumulation for contrastive learning.

Whoever lacks the memory for a large batch adds up the gradients of small ones. That is exact where
the loss is a sum over samples. A contrastive loss is not: every sample is a negative of every
other, so that small batches train with few negatives, however many of them are added up.
Is the gradient of the large batch then out of reach for a small memory? It is not; it costs one
forward pass more.

## What does not add up

Let $h_i(\theta)$ be representations, $s_{ij} = \langle h_i, h_j\rangle$ their similarities with the
temperature absorbed, and $t_{ij}$ one-hot labels. With $p_{ij} = \operatorname{softmax}_j(s_{ij})$
the loss of a batch is

$$L = -\sum_{i,j} t_{ij}\log p_{ij} = -\sum_{i,j} t_{ij}s_{ij} + \sum_i\log\sum_j e^{s_{ij}} .$$

The second term joins all samples. Cut into parts, the batch loses every pair whose members fall
into different parts. Adding up the parts' gradients is called naive accumulation below.

## What does

Differentiate, and hold constant (sg) what multiplies the derivative of the similarities:

$$\nabla_\theta L = \sum_{i,j}(p_{ij} - t_{ij})\,\nabla_\theta s_{ij}
= \nabla_\theta\sum_{i,j}\operatorname{sg}(p_{ij} - t_{ij})\, s_{ij} .$$

An inner product has the derivative
$\nabla\langle h_i, h_j\rangle = \nabla\big(\langle h_i, \operatorname{sg} h_j\rangle +
\langle \operatorname{sg} h_i, h_j\rangle\big)$. Exchange the names of the indices in the second
part, and one sum over samples is left:

$$\nabla_\theta L = \nabla_\theta\sum_i\langle h_i, \tilde h_i\rangle, \qquad
\tilde h_i = \operatorname{sg}\sum_j (p_{ij} + p_{ji} - 2t_{ij})\, h_j .$$

This is the chain rule: $\tilde h_i = \partial L/\partial h_i$, so the same holds for any loss of
the representations, any number of encoders, and parameters of the loss such as a temperature. A
step has four parts.

1. Encode the batch chunk by chunk, without keeping activations.
2. Differentiate the loss with respect to all representations: that gives all $\tilde h_i$.
3. Encode each chunk again, now with its activations, and send its $\tilde h_i$ back.
4. Take one step of the optimiser.

The value of $\sum_i\langle h_i,\tilde h_i\rangle$ is not the loss, need not fall and may be
negative; it belongs in no log. Gao, Zhang, Han and Callan call the method GradCache. It is what
activation checkpointing computes, with a chunk of the batch in the place of a layer.

## Dropout and batch normalisation

The article concludes that dropout has to go, because the second pass draws other masks. It can
stay: save the state of the random generators before each chunk's first pass and restore it before
its second. Batch normalisation in training mode lies outside of the theorem, like every layer that
mixes the samples of a batch: each chunk has statistics of its own. It is refused.

## What it costs

With $F$ for a forward and $B$ for a backward pass a step takes $(2F + B)/(F + B)$ of a plain one,
$4/3$ if a backward pass costs two forward ones. The last chunk's graph can be kept, so a little
less. The memory is that of one chunk's activations, all representations, and the loss's own matrix
of similarities.

## Several machines

Let each of $R$ processes have $b$ samples, let $L_r$ be the mean over its own queries against the
keys of all processes, and gather the keys so that a gradient returns to the process that it
belongs to. DistributedDataParallel averages the gradients, $\frac1R\sum_r\nabla L_r$, and that is
the gradient of the batch of $Rb$. The reduction happens once in a step. A training script:

```python
import torch
import torch.distributed as dist
from torch import nn
from kexue.training import GradientCache, info_nce

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = "cpu"
if torch.cuda.is_available():
    device = f"cuda:{dist.get_node_local_rank()}"
    torch.cuda.set_device(device)
torch.manual_seed(dist.get_rank())  # other data in each process

encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
encoder = nn.parallel.DistributedDataParallel(encoder.to(device))
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
cache = GradientCache([encoder, encoder], info_nce, chunk_size=64)
for step in range(10):
    # Your batch: a share for each process, of one size for all.
    queries = torch.randn(1024, 64, device=device)
    keys = queries + 0.1 * torch.randn_like(queries)
    optimizer.zero_grad()
    cache.step(queries, keys, gather=True)
    optimizer.step()
dist.destroy_process_group()
```

On one machine, `torchrun --standalone --nproc-per-node 2 train.py` starts two processes. On two
machines, `alpha` and `beta`, with eight GPUs each, start one command on each, in whatever order;
they meet at port 29500 of `alpha`, which `beta` has to be able to reach:

```text
alpha$ torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
           --rdzv-id 1 --rdzv-endpoint alpha:29500 train.py
beta$  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
           --rdzv-id 1 --rdzv-endpoint alpha:29500 train.py
```

A temperature that is learned belongs to a loss module, which is wrapped like the encoder.

## What is measured

A small network, 64–256–64, learns to recognise digits (pixels from 0 to 1) that were shifted by up
to one pixel, lost a fifth of their pixels, and became noisy by 0.1: symmetric InfoNCE, temperature
0.2, batches of 256. Three arms start from the same weights and see the same samples: full batch,
cached in chunks of 8, and naive in chunks of 8, each weighted by its share.

The gradient of the first step decides whether the theorem holds, and whether it was needed: the
cached one must be that of the full batch to rounding, the naive one must not. After training, both
exact arms must classify held-out digits alike by their five nearest neighbours. The bytes that
autograd holds for the encoder must not grow with the batch. And the larger batch should be worth
its trouble: among the 597 held-out digits, changed ones must find their originals (recall@1) at
least as often as after naive accumulation. That part is no theorem, and it may fail.

The reader should see an error at the level of rounding, beside one that is of the order of the
gradient itself and vanishes only where the chunk is the batch. Exact gradients do not give equal
weights for ever, because roundings grow from step to step: after 200 steps, one of five seeds had
three of the 597 digits classified otherwise.
"""

from __future__ import annotations

import math
import statistics
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import normalize, pad

from kexue.lab import DataError, Lab, seeded
from kexue.training.gradient_cache import GradientCache, info_nce

BATCH, CHUNK = 256, 8
TEMPERATURE = 0.2
HIDDEN, DIM = 256, 64
SHIFT, DROPPED, NOISE = 1, 0.2, 0.1
NEIGHBOURS = 5
VIEWS = 8
"""Changed copies of each held-out sample: from one of them, recall is noisy."""
FULL, CACHED, NAIVE = "full batch", "cached", "naive"
ARMS = (FULL, CACHED, NAIVE)
GRAMS = 1024

View = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Task:
    """Pairs to be matched: two views of a sample, or two sentences."""

    first: Tensor
    second: Tensor
    held_out_first: Tensor
    held_out_second: Tensor
    view: View
    labels: tuple[Tensor, Tensor] | None
    """Classes of the samples trained on and held out."""


@dataclass
class Arm:
    trajectory: list[Tensor]
    recall: float
    accuracy: float
    loss: float


def run(lab: Lab) -> None:
    task = _digits(lab) if lab.data.path is None else _sentence_pairs(lab)
    judge = lab.claim if lab.data.path is None else lab.observe
    cached, naive = _first_step(lab, task)
    judge("relative error of the cached gradient at the first step", cached, "<=", 1e-5)
    judge("relative error of the naive gradient at the first step", naive, ">=", 0.1)
    arms = _train_all(lab, task)
    if task.labels is not None:
        pairs = zip(arms[FULL], arms[CACHED], strict=True)
        differences = [abs(one.accuracy - other.accuracy) for one, other in pairs]
        statement = "difference of the nearest neighbours' accuracy, cached to full"
        judge(f"{statement}, largest of all seeds", max(differences), "<=", 0.005)
        lab.observe(f"{statement}, mean over seeds", statistics.mean(differences), "<=", 0.005)
    statement = "activations at batch 1024 over those at batch 128, both in chunks of 32"
    judge(statement, _memory(lab, task), "<=", 1.3)
    gains = [c.recall - n.recall for c, n in zip(arms[CACHED], arms[NAIVE], strict=True)]
    judge("mean gain of recall@1, cached over naive", statistics.mean(gains), ">=", 0.0)
    if len(gains) > 1:
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        lab.observe("standard error of that gain", error, "<", statistics.mean(gains) / 2)


def _encoder(task: Task, seed: int) -> nn.Sequential:
    size, device = task.first.shape[1], task.first.device
    with seeded(seed):
        layers = nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))
    return layers.to(device)


def _loss(first: Tensor, second: Tensor) -> Tensor:
    return info_nce(first, second, temperature=TEMPERATURE, symmetric=True)


def _add_gradient(arm: str, encoder: nn.Module, first: Tensor, second: Tensor, size: int) -> None:
    if arm == FULL:
        _loss(encoder(first), encoder(second)).backward()
    elif arm == CACHED:
        GradientCache([encoder, encoder], _loss, chunk_size=size).step(first, second)
    else:
        for a, b in zip(first.split(size), second.split(size), strict=True):
            (_loss(encoder(a), encoder(b)) * len(a) / len(first)).backward()


def _batch(task: Task, generator: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(task.first), generator=generator)[:size].to(task.first.device)
    return task.view(task.first[chosen], generator), task.view(task.second[chosen], generator)


def _first_step(lab: Lab, task: Task) -> tuple[float, float]:
    """Return the relative errors of the cached and the naive gradient at the chunk size."""
    encoder = _encoder(task, lab.seed)
    first, second = _batch(task, lab.generator())

    def gradient(arm: str, size: int) -> Tensor:
        encoder.zero_grad()
        _add_gradient(arm, encoder, first, second, size)
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    exact = gradient(FULL, BATCH)
    rows, errors = [], {}
    for size in (4, 8, 16, 32, 64, 128, 256):
        cached, naive = gradient(CACHED, size), gradient(NAIVE, size)
        errors[size] = [((g - exact).norm() / exact.norm()).item() for g in (cached, naive)]
        rows.append({
            "chunk size": size,
            "cached: error": errors[size][0],
            "naive: error": errors[size][1],
            "naive: cosine": torch.cosine_similarity(naive, exact, dim=0).item(),
        })  # fmt: skip
    lab.table(
        "The gradient of the first step",
        rows,
        f"Distance from the gradient of the full batch of {BATCH}, relative to its length, in "
        "float32. A naive chunk of 256 is the full batch.",
    )
    # A chunk that is the batch has no error, which a logarithmic axis cannot show.
    partial = [size for size in errors if size < BATCH]
    series = {arm: [errors[size][i] for size in partial] for i, arm in enumerate((CACHED, NAIVE))}
    lab.figure(
        "gradient-error",
        _lines(partial, series, xlabel="chunk size", ylabel="relative error"),
        "Naive accumulation approaches the gradient of the full batch only with the chunk size; "
        "the cached gradient is exact to the rounding of float32 for every chunk size.",
    )
    return errors[CHUNK][0], errors[CHUNK][1]


def _train_all(lab: Lab, task: Task) -> dict[str, list[Arm]]:
    steps = lab.pick(smoke=3, quick=60, full=200)
    seeds = lab.pick(smoke=1, quick=4, full=5)
    arms: dict[str, list[Arm]] = {arm: [] for arm in ARMS}
    progress = lab.progress([(seed, arm) for seed in range(seeds) for arm in ARMS], "training")
    for seed, arm in progress:
        arms[arm].append(_train(task, arm, 1000 * lab.seed + seed, steps))
        progress.metric(recall=arms[arm][-1].recall)
    _report(lab, task, arms, steps)
    return arms


def _train(task: Task, arm: str, seed: int, steps: int) -> Arm:
    encoder = _encoder(task, seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    trajectory = []
    for _ in range(steps):
        first, second = _batch(task, generator)
        optimizer.zero_grad()
        _add_gradient(arm, encoder, first, second, CHUNK)
        optimizer.step()
        trajectory.append(nn.utils.parameters_to_vector(encoder.parameters()).detach())
    return _evaluate(task, encoder, trajectory)


@torch.no_grad()
def _evaluate(task: Task, encoder: nn.Module, trajectory: list[Tensor]) -> Arm:
    originals = normalize(encoder(task.held_out_second), dim=1)
    places = torch.arange(len(originals), device=originals.device)
    found, losses = [], []
    for number in range(VIEWS):
        # The same views for all arms and seeds: what is compared is the encoders.
        generator = torch.Generator().manual_seed(number)
        first = encoder(task.view(task.held_out_first, generator))
        second = encoder(task.view(task.held_out_second, generator))
        nearest = (normalize(first, dim=1) @ originals.mT).argmax(dim=1)
        found.append((nearest == places).float().mean().item())
        losses += [
            _loss(a, b).item()
            for a, b in zip(first.split(BATCH), second.split(BATCH), strict=True)
            if len(a) == BATCH or len(first) < BATCH
        ]
    accuracy = math.nan
    if task.labels is not None:
        known, asked = task.labels
        similarities = originals @ normalize(encoder(task.first), dim=1).mT
        votes = known[similarities.topk(NEIGHBOURS, dim=1).indices].mode(dim=1).values
        accuracy = (votes == asked).float().mean().item()
    return Arm(trajectory, statistics.mean(found), accuracy, statistics.mean(losses))


def _report(lab: Lab, task: Task, arms: dict[str, list[Arm]], steps: int) -> None:
    table = [
        {
            "gradient": arm,
            "recall@1": statistics.mean(run.recall for run in runs),
            "InfoNCE": statistics.mean(run.loss for run in runs),
            "accuracy": None if not task.labels else statistics.mean(r.accuracy for r in runs),
        }
        for arm, runs in arms.items()
    ]
    lab.table(
        "After training",
        table,
        f"{steps} steps, mean of {len(arms[FULL])} seeds, on held-out data. Recall over {VIEWS} "
        f"changed copies of each, InfoNCE in batches of 256, accuracy of {NEIGHBOURS} neighbours.",
    )

    def distance(arm: str, step: int) -> float:
        return statistics.mean(
            (
                (run.trajectory[step] - full.trajectory[step]).norm() / full.trajectory[step].norm()
            ).item()
            for run, full in zip(arms[arm], arms[FULL], strict=True)
        )

    rows = [
        {"step": s, **{arm: distance(arm, s - 1) for arm in (CACHED, NAIVE)}}
        for s in sorted({min(step, steps) for step in (1, 3, 10, 30, 60, 100, 200)})
    ]
    lab.table(
        "Distance of the weights from those of the full batch",
        rows,
        "Relative to their length, mean over the seeds.",
    )
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for place, runs in enumerate(arms.values()):
        recalls = [run.recall for run in runs]
        axes.bar(place, statistics.mean(recalls), width=0.6, alpha=0.5)
        axes.plot([place] * len(recalls), recalls, ".", color="black")
    axes.set_xticks(range(len(arms)), list(arms))
    axes.set_ylabel("recall@1")
    lab.figure("recall", figure, "How often a held-out sample is found. A point for each seed.")


def _memory(lab: Lab, task: Task) -> float:
    """Return the activations at batch 1024 over those at batch 128, in chunks of 32."""
    batches, size = (128, 256, 512, 1024), 32
    encoder = _encoder(task, lab.seed)
    peaks: dict[str, list[int]] = {FULL: [], CACHED: []}
    for batch in batches:
        shape = (2, batch, task.first.shape[1])
        samples = torch.randn(shape, generator=lab.generator()).to(task.first.device)
        for arm, found in peaks.items():
            counted = _HeldBytes(encoder)
            _add_gradient(arm, counted, samples[0], samples[1], size)
            found.append(counted.peak)
    lab.table(
        "Activations that are held, in KiB",
        [
            {
                "batch": batch,
                FULL: peaks[FULL][i] / 1024,
                "cached, chunks of 32": peaks[CACHED][i] / 1024,
                "representations": 2 * batch * DIM * 4 / 1024,
                "similarities": batch**2 * 4 / 1024,
            }
            for i, batch in enumerate(batches)
        ],
        "Largest sum of what autograd holds for the backward pass of the encoder, counted as it is "
        "saved and freed; parameters are not counted. To be added in both cases: representations "
        "of both views, and matrices of similarities.",
    )
    held = {arm: [peak / 1024 for peak in found] for arm, found in peaks.items()}
    held["one matrix of similarities"] = [batch**2 * 4 / 1024 for batch in batches]
    lab.figure(
        "memory",
        _lines(list(batches), held, xlabel="batch", ylabel="KiB"),
        "Activations of the encoder against the batch: in proportion for the full batch, constant "
        "for chunks of 32. What grows is the loss's own matrix.",
    )
    return peaks[CACHED][-1] / peaks[CACHED][0]


def _lines(x: list[int], series: dict[str, list[float]], **labels: Any) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for (name, y), style in zip(series.items(), ("o-", "s-", "^:"), strict=False):
        axes.loglog(x[: len(y)], y, style, label=name)
    axes.set_xticks([], minor=True)
    axes.set_xticks(x, [str(value) for value in x])
    axes.set(**labels)
    axes.legend()
    return figure


@dataclass(eq=False)
class _Held:
    tensor: Tensor


class _HeldBytes(nn.Module):
    """An encoder whose tensors saved for backward passes are counted while they live."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.now = self.peak = 0
        # A linear layer saves its weight transposed: another tensor in the same memory.
        self.own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def forward(self, x: Tensor) -> Tensor:
        with saved_tensors_hooks(self._hold, lambda held: held.tensor):
            return self.encoder(x)

    def _hold(self, tensor: Tensor) -> _Held:
        held = _Held(tensor.detach())  # its history would keep alive what is counted
        if tensor.untyped_storage().data_ptr() not in self.own:
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, size)
        return held

    def _release(self, size: int) -> None:
        self.now -= size


def _digits(lab: Lab) -> Task:
    digits = lab.data.digits(held_out=597)
    side = digits.train.images.shape[-1]

    def view(flat: Tensor, generator: torch.Generator) -> Tensor:
        """Shift by up to a pixel, black out a fifth of the pixels, add noise."""
        n, device = len(flat), flat.device
        framed = pad(flat.view(n, side, side), (SHIFT,) * 4)
        place = SHIFT + torch.arange(side)
        shift = torch.randint(-SHIFT, SHIFT + 1, (2, n, 1), generator=generator)
        row, column = ((place + s).to(device) for s in shift)
        each = torch.arange(n, device=device)[:, None, None]
        shifted = framed[each, row[:, :, None], column[:, None, :]].flatten(1)
        lost = torch.rand(shifted.shape, generator=generator).to(device) < DROPPED
        noise = NOISE * torch.randn(shifted.shape, generator=generator).to(device)
        return shifted.masked_fill(lost, 0.0) + noise

    # From 0, which is paper, to 1: the scale in which noise of 0.1 is meant.
    train, held_out = (
        (split.images.flatten(1).to(lab.device) + 1) / 2 for split in (digits.train, digits.test)
    )
    known, asked = digits.train.labels, digits.test.labels
    labels = (known.to(lab.device), asked.to(lab.device)) if known is not None else None
    return Task(train, train, held_out, held_out, view, labels)


def _sentence_pairs(lab: Lab) -> Task:
    """Pairs of the user's file as counts of hashed character trigrams."""
    pairs = lab.data.pairs() or []
    labels = [float(pair.label) for pair in pairs if pair.label is not None]
    if labels:
        # A class or a similarity: the upper half says the same twice.
        middle = (min(labels) + max(labels)) / 2
        pairs = [p for p in pairs if float(p.label or 0) >= middle]
    if len(pairs) < 2 * BATCH:
        raise DataError(f"expected at least {2 * BATCH} matching pairs, got {len(pairs)}")
    order = torch.randperm(len(pairs), generator=lab.generator()).tolist()[:20_000]
    first, second = (
        torch.stack([_trigrams(sentences[i]) for i in order]).to(lab.device)
        for sentences in ([p.first for p in pairs], [p.second for p in pairs])
    )
    held_out = min(597, len(order) // 3)
    trained, asked = slice(held_out, None), slice(held_out)
    return Task(first[trained], second[trained], first[asked], second[asked], lambda x, _: x, None)


def _trigrams(sentence: str) -> Tensor:
    text = f"  {sentence.lower()} "
    grams = [zlib.crc32(text[i : i + 3].encode()) % GRAMS for i in range(len(text) - 2)]
    return normalize(torch.bincount(torch.tensor(grams), minlength=GRAMS).float(), dim=0)
