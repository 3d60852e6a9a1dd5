r"""TeaForN: teacher forcing with n-grams.

A decoder that is trained by teacher forcing sees true prefixes only, and is asked for the next
token only. When it writes, it reads its own tokens (exposure bias); and nothing ever made its
state care about more than one token (no foresight), so that it prefers what is safe for one step.
To train it on what it writes itself would cure both, but runs token after token and is hard to
optimise. Is there a middle way that stays parallel?

## Two passes, three passes, N passes

Let $e_t = E(w_t)$ be the embedding of a token, M the causal body of the decoder. Teacher forcing
reads $w_0 \dots w_{L-1}$ and is asked for $w_1 \dots w_L$:

$$[h^1_1, \dots, h^1_L] = M([e_0, e_1, \dots, e_{L-1}]), \qquad
p^1_t = \operatorname{softmax}(W h^1_t + b).$$

The vector that predicted $w_t$ now stands where $e_t$ stood, and the decoder runs again, over the
whole sequence at once:

$$[h^i_1, \dots, h^i_L] = M([e_0, \varphi(h^{i-1}_1), \dots, \varphi(h^{i-1}_{L-1})]),
\qquad i = 2, \dots, N.$$

Every pass is asked for the same tokens, and the losses are added up with weights
$\lambda_i = \gamma^{i-1}$:

$$\mathcal L = \sum_{i=1}^N \lambda_i \, \operatorname{mean}_t \bigl(-\log p^i_t[w_t]\bigr).$$

Only the first pass is used afterwards; writing works and costs as before. What does $\varphi$ do?
The simplest choice, and the paper's best, is nothing: $\varphi(h) = h$. No law makes $h$ resemble
an embedding; M learns to accept it. Otherwise the embeddings are averaged with the probabilities
(`expectation`), over the $k$ best (`top_k`), the best one is taken with the gradient of the average
(`hard`), or Gumbel noise draws one (`gumbel`).

## What a pass can know

Because M is causal, $h^i_1 = h^1_1$ in every pass, since both have read $e_0$ alone. Hence
$\varphi(h^i_1)$ does not change, so neither does $h^i_2$ from the second pass on, and by induction

$$h^i_t = h^t_t \quad \text{for } i \ge t:$$

each pass settles one more position. After $L$ passes all are settled, and the last one *is* the
roll-out that starts from $e_0$ and feeds $\varphi(h)$ back step by step. So $N = 1$ is teacher
forcing, $N \ge L$ is soft student forcing, computed in parallel, and TeaForN lies between.

Before it settles, $h^i_t$ rests on the true tokens $w_0 \dots w_{t-i}$ only: it predicts $w_t$ from
a prefix that ends $i$ tokens earlier. All that it knows of the way from there went through the one
vector $h^1_{t-i+1}$, which is therefore pushed to contain what is needed for
$w_{t-i+1} \dots w_t$. That push, and the gradient that carries it from pass to pass, is the
foresight.

The paper stacks its decoders without prepending $e_0$: pass $i$ reads the outputs where they stand
and is asked for labels that are shifted by $i - 1$. From the second pass on that is another loss.
With $e_0$ prepended, as in the article, start token, positions and targets are those of writing.

## What is measured, and why it decides

A small character model, a GRU of 96 units between an embedding and a linear layer of the same
width, is trained on prose with equal windows, starts and numbers of updates. All comparisons are to
teacher forcing.

- **Foresight.** The first pass is frozen, and a linear probe reads from $h^1_t$ the symbol that
  comes $2, 3, 4$ steps ahead (the model itself is asked for the one that is 1 ahead). If TeaForN
  does what it says, the probe at two steps gains at least 0.05 nats.
- **Price.** A state that serves two ends serves each a little less. The likelihood of held-out text
  may fall by at most 0.06 nats at equal updates.
- **Writing.** The model continues 32 true characters greedily. Its accuracy over the steps 2 to 8,
  where it reads its own output, must not fall by more than 0.01. That is little to ask. In a model
  as small as this one the accuracy of a roll-out is governed by its first error, and differences
  are mostly noise.

All three are means over seeds, two in the quick budget and four in the full one. They compare equal
numbers of updates, but N passes cost N times the time. So the full budget trains by teacher forcing
with twice the updates as well; at that equal compute teacher forcing is expected to win on the
likelihood of held-out text, and by far. It also takes two things away: the gradient between the
passes, and the vector $h$ itself, in whose place it puts the expected embedding, which knows no
more than the probabilities of single tokens.

The reader should see a gain at two steps ahead that shrinks with the distance, that more updates do
not bring, and that is gone without the gradient between the passes: foresight is what flows back
through them. The roll-out is hardly moved by it; who wants this model to write better lets it learn
longer. The time is proportional to N.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import Lab, seeded
from kexue.training.teaforn import TeaForNOutput, teaforn_loss

WIDTH, SYMBOLS = 96, 48
LENGTH, BATCH, RATE, CLIP = 32, 24, 3e-3, 1.0
DISCOUNT = 0.5
AHEAD = (2, 3, 4)
WRITTEN = 8
"""Characters of a greedy continuation."""

NLL, FIRST, ROLLED_OUT = "held-out NLL", "accuracy at step 1", f"accuracy at steps 2 to {WRITTEN}"
PROBES = tuple(f"probe {d} ahead" for d in AHEAD)


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    n_grams: int
    options: dict[str, Any] = field(default_factory=dict)
    longer: int = 1
    """How many times the usual number of updates."""


FORCED = Arm("teacher forcing", 1)
TWO = Arm("2-grams", 2)
THREE = Arm("3-grams", 3)
LONGER = Arm("teacher forcing, twice the updates", 1, longer=2)
QUICK = (FORCED, TWO)
FULL = (
    *QUICK,
    LONGER,
    THREE,
    Arm("2-grams, expectation", 2, {"approximation": "expectation"}),
    Arm("2-grams, gradient cut", 2, {"backpropagate_through_steps": False}),
)


class Decoder(nn.Module):
    """Embedding, GRU, linear layer, logits; the body takes embeddings."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, symbols)

    def body(self, embeddings: Tensor) -> Tensor:
        return self.linear(self.gru(embeddings)[0])

    def loss(self, window: Tensor, n_grams: int, **options: Any) -> TeaForNOutput:
        return teaforn_loss(
            self.body,
            self.head,
            self.embedding(window[:, :-1]),
            window[:, 1:],
            embedding=self.embedding,
            n_grams=n_grams,
            discount=DISCOUNT,
            **options,
        )


@dataclass(frozen=True)
class Text:
    """Symbols to learn from and symbols held out."""

    characters: Any
    train: Tensor
    held_out: Tensor

    def windows(self, length: int, stride: int) -> Tensor:
        """Windows of the held-out part, (count, length)."""
        return self.held_out.unfold(0, length, stride)


@dataclass(frozen=True)
class Result:
    """What one trained decoder can do."""

    values: dict[str, float]
    greedy: list[float]
    """Accuracy by step of a continuation."""


def run(lab: Lab) -> None:
    arms = lab.pick(smoke=QUICK, quick=QUICK, full=FULL)
    seeds = lab.pick(smoke=1, quick=2, full=4)
    updates = lab.pick(smoke=5, quick=250, full=350)
    text = read_text(lab)
    results: dict[str, list[Result]] = {}
    models: dict[str, Decoder] = {}
    progress = lab.progress([(arm, seed) for arm in arms for seed in range(seeds)], "training")
    for arm, seed in progress:
        model = trained(lab, text, arm, updates, 1000 * lab.seed + seed)
        result = measured(lab, text, model, 1000 * lab.seed + seed)
        progress.metric(NLL=result.values[NLL])
        results.setdefault(arm.name, []).append(result)
        models.setdefault(arm.name, model)
    report(lab, results, updates, seeds)
    judge(lab, results)
    settling(lab, text, models[TWO.name])
    continuations(lab, text, models)
    price(lab, text)


def read_text(lab: Lab) -> Text:
    """Lower-case prose in 48 symbols, or the user's text in as many as it needs."""
    given = lab.data.holds_text
    written = (lab.data.text() if given else lab.data.prose()).lower()
    characters = lab.data.Characters(written, size=None if given else SYMBOLS)
    cut = len(characters.tokens) * 9 // 10
    return Text(characters, characters.tokens[:cut], characters.tokens[cut:])


def trained(lab: Lab, text: Text, arm: Arm, updates: int, seed: int) -> Decoder:
    """The same start and the same windows for every arm of a seed."""
    with seeded(seed):
        model = Decoder(len(text.characters))

    def fit() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        generator = torch.Generator().manual_seed(seed)
        windows = text.characters.batches(LENGTH + 1, BATCH, generator, tokens=text.train)
        for _, window in zip(range(arm.longer * updates), windows, strict=False):
            update(model, optimizer, window, arm)

    name = "".join(c if c.isalnum() else "-" for c in arm.name)
    return lab.trained(name, model, fit, inputs={"updates": updates, "run": seed})


def update(model: Decoder, optimizer: torch.optim.Optimizer, window: Tensor, arm: Arm) -> None:
    optimizer.zero_grad()
    model.loss(window, arm.n_grams, **arm.options).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()


@torch.no_grad()
def states(model: Decoder, windows: Tensor) -> Tensor:
    """Output vectors of the first pass."""
    return model.body(model.embedding(windows))


def measured(lab: Lab, text: Text, model: Decoder, seed: int) -> Result:
    window = text.windows(LENGTH + 1, LENGTH)
    with torch.no_grad():
        nll = model.loss(window, 1).loss.item()
    probes = dict(zip(PROBES, probe(lab, text, model, seed), strict=True))
    greedy = greedy_accuracy(text, model)
    ends = {FIRST: greedy[0], ROLLED_OUT: statistics.mean(greedy[1:])}
    return Result({NLL: nll, **probes, **ends}, greedy)


def probe(lab: Lab, text: Text, model: Decoder, seed: int) -> list[float]:
    """Held-out loss of one linear layer that reads later symbols from the frozen states."""
    count, steps = lab.pick(smoke=50, quick=1500, full=4000), lab.pick(smoke=5, quick=300, full=800)
    generator = torch.Generator().manual_seed(seed)
    longest = LENGTH + max(AHEAD)
    windows = text.characters.batches(longest, count, generator, tokens=text.train)
    train, test = next(windows), text.windows(longest, LENGTH)
    inputs = states(model, train[:, :LENGTH]).flatten(0, 1)
    # Arms differ in the size of their states; the probe should not.
    center, spread = inputs.mean(0), inputs.std(0)
    symbols = len(text.characters)
    torch.manual_seed(seed)
    readout = nn.Linear(WIDTH, len(AHEAD) * symbols)
    optimizer = torch.optim.Adam(readout.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)

    def losses(rows: Tensor, targets: Tensor) -> Tensor:
        logits = readout((rows - center) / spread).unflatten(-1, (len(AHEAD), symbols))
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return loss.unflatten(0, (-1, len(AHEAD))).mean(0)

    targets = later_symbols(train)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (1024,), generator=generator)
        optimizer.zero_grad()
        losses(inputs[chosen], targets[chosen]).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rows = states(model, test[:, :LENGTH]).flatten(0, 1)
        return losses(rows, later_symbols(test)).tolist()


def later_symbols(windows: Tensor) -> Tensor:
    """The state at place s predicts the symbol at s + 1, which is one step ahead."""
    return torch.stack([windows[:, d : d + LENGTH].flatten() for d in AHEAD], -1)


@torch.no_grad()
def greedy_accuracy(text: Text, model: Decoder) -> list[float]:
    window = text.windows(LENGTH + WRITTEN, LENGTH // 2)
    written = continued(model, window[:, :LENGTH], WRITTEN)
    return (written == window[:, LENGTH:]).float().mean(0).tolist()


@torch.no_grad()
def continued(model: Decoder, prompt: Tensor, steps: int) -> Tensor:
    """Greedy continuation of the prompts, (batch, steps)."""
    output, state = model.gru(model.embedding(prompt))
    written = [model.head(model.linear(output[:, -1])).argmax(-1)]
    for _ in range(steps - 1):
        output, state = model.gru(model.embedding(written[-1][:, None]), state)
        written.append(model.head(model.linear(output[:, -1])).argmax(-1))
    return torch.stack(written, 1)


def gaps(results: dict[str, list[Result]], name: str, value: str) -> tuple[float, float]:
    """Mean difference to teacher forcing, seed by seed, and its standard error."""
    found = [
        one.values[value] - forced.values[value]
        for one, forced in zip(results[name], results[FORCED.name], strict=True)
    ]
    spread = statistics.stdev(found) if len(found) > 1 else math.nan
    return statistics.mean(found), spread / math.sqrt(len(found))


def report(lab: Lab, results: dict[str, list[Result]], updates: int, seeds: int) -> None:
    columns = (NLL, *PROBES, FIRST, ROLLED_OUT)
    lab.table(
        "Trained in different ways",
        [
            {"trained by": name}
            | {c: statistics.mean(run.values[c] for run in runs) for c in columns}
            for name, runs in results.items()
        ],
        f"{updates} updates unless it says otherwise, mean of {seeds} "
        f"seed{'s' * (seeds > 1)}. Losses in nats per character: of the model on the next "
        "character, of the probes on later ones. Accuracy of a greedy continuation of "
        f"{LENGTH} true characters.",
    )
    lab.table(
        "Differences to teacher forcing",
        [
            {"trained by": name}
            | {c: with_error(gaps(results, name, c)) for c in (NLL, *PROBES, ROLLED_OUT)}
            for name in results
            if name != FORCED.name
        ],
        "Mean over seeds, with its standard error.",
    )
    lab.figure(
        "foresight",
        foresight_figure(results),
        "What the probe gains over teacher forcing, by how far ahead it looks. Bars: standard "
        "error over seeds.",
    )
    lab.figure(
        "greedy",
        greedy_figure(results),
        "Accuracy of a greedy continuation, step by step. It falls because one wrong character "
        "makes the next ones wrong, whatever the training.",
    )


def with_error(difference: tuple[float, float]) -> str:
    mean, error = difference
    text = f"{mean:+.4f}" if math.isnan(error) else f"{mean:+.4f} ± {error:.4f}"
    return text.replace("-", "−")


def judge(lab: Lab, results: dict[str, list[Result]]) -> None:
    # The thresholds are those of the embedded prose; a user's text is reported.
    judge = lab.observe if lab.data.holds_text else lab.claim
    foresight = {name: -gaps(results, name, PROBES[0])[0] for name in results}
    cost = {name: gaps(results, name, NLL)[0] for name in results}
    written, error = gaps(results, TWO.name, ROLLED_OUT)
    judge("nats that 2-grams save the probe two steps ahead", foresight[TWO.name], ">=", 0.05)
    judge("nats that 2-grams cost on held-out text at equal updates", cost[TWO.name], "<=", 0.06)
    judge(
        f"{ROLLED_OUT} with 2-grams minus that of teacher forcing"
        + ("" if math.isnan(error) else f" (standard error {error:.4f})"),
        written, ">=", -0.01,
    )  # fmt: skip
    if LONGER.name in results:
        lab.observe(
            "nats that 2-grams cost on held-out text at equal compute, where teacher forcing has "
            "twice the updates",
            cost[TWO.name] - cost[LONGER.name], ">", 0.0,
        )  # fmt: skip
    for name in foresight:
        if name not in (FORCED.name, TWO.name):
            lab.observe(
                f"nats that {name} save{'s' * (name == LONGER.name)} the probe two steps ahead",
                foresight[name], ">=" if name == THREE.name else "<", 0.05,
            )  # fmt: skip


@torch.no_grad()
def settling(lab: Lab, text: Text, model: Decoder) -> None:
    """As many passes as positions are the roll-out, step by step."""
    window = text.windows(LENGTH + 1, LENGTH)[:64]
    passes = model.loss(window, LENGTH).hidden[-1]
    fed, state = model.embedding(window[:, :1]), None
    rolled = []
    for _ in range(LENGTH):
        output, state = model.gru(fed, state)
        fed = model.linear(output)
        rolled.append(fed)
    gap = (passes - torch.cat(rolled, 1)).abs().max() / passes.abs().max()
    lab.observe(
        f"largest difference between pass {LENGTH} and the roll-out that feeds $h$ back, relative "
        "to the largest output",
        gap, "<=", 1e-4,
    )  # fmt: skip


def continuations(lab: Lab, text: Text, models: dict[str, Decoder]) -> None:
    """What the models write, for the eye."""
    windows = text.windows(LENGTH + 1, LENGTH)[:, :LENGTH]
    prompts = windows[:: max(1, len(windows) // 4)][1:4]
    rows = []
    for prompt in prompts:
        row = {"prompt": visible(text, prompt)}
        for name in (FORCED.name, TWO.name):
            row[name] = visible(text, continued(models[name], prompt[None], LENGTH)[0])
        rows.append(row)
    lab.table(
        "Greedy continuations",
        rows,
        "Held-out prompts of the first seed. Both models are small and soon repeat themselves; "
        "⏎ is the end of a line.",
    )


def visible(text: Text, tokens: Tensor) -> str:
    return " ".join(text.characters.decode(tokens).replace("\n", " ⏎ ").split()) or "(spaces)"


def price(lab: Lab, text: Text) -> None:
    """Time of an update by number of passes, in turns, so that a busy machine is fair to all."""
    repeats = lab.pick(smoke=2, quick=10, full=40)
    model = Decoder(len(text.characters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    window = text.train[: BATCH * (LENGTH + 1)].reshape(BATCH, LENGTH + 1)
    arms = [Arm("", n) for n in (1, 2, 3, 4)]
    times: dict[int, list[float]] = {arm.n_grams: [] for arm in arms}
    for _ in range(repeats):
        for arm in arms:
            start = time.perf_counter()
            update(model, optimizer, window, arm)
            times[arm.n_grams].append(time.perf_counter() - start)
    medians = {n: statistics.median(seconds) for n, seconds in times.items()}
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    ax.plot(list(medians), [1e3 * s for s in medians.values()], "o", label="measured")
    ax.plot(
        list(medians), [1e3 * n * medians[1] for n in medians], ":", color="black",
        label="N times the first",
    )  # fmt: skip
    ax.set_xticks(list(medians))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("passes N")
    ax.set_ylabel("milliseconds per update")
    ax.legend()
    lab.figure("time", figure, "Median time of an update against the number of passes.")
    lab.observe("time of an update with 2-grams over that of teacher forcing",
                medians[2] / medians[1], "<=", 2.1)  # fmt: skip


def foresight_figure(results: dict[str, list[Result]]) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    ax.axhline(0, color="black", linewidth=0.8)
    names = [name for name in results if name != FORCED.name]
    for place, name in enumerate(names):
        found = [gaps(results, name, value) for value in PROBES]
        # Side by side, so that no error bar hides another one.
        shift = 0.06 * (place - (len(names) - 1) / 2)
        ax.errorbar(
            [d + shift for d in AHEAD], [-mean for mean, _ in found],
            yerr=[0.0 if math.isnan(error) else error for _, error in found],
            marker="o", linestyle="none", capsize=3, label=name,
        )  # fmt: skip
    ax.set_xticks(AHEAD)
    ax.set_xlabel("characters ahead")
    ax.set_ylabel("gain of the probe in nats")
    ax.legend()
    return figure


def greedy_figure(results: dict[str, list[Result]]) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    steps = range(1, WRITTEN + 1)
    for name, runs in results.items():
        means = [statistics.mean(r.greedy[step - 1] for r in runs) for step in steps]
        ax.plot(steps, means, marker="o", markersize=4, label=name)
    ax.set_xticks(steps)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step of the continuation")
    ax.set_ylabel("accuracy")
    ax.legend()
    return figure
