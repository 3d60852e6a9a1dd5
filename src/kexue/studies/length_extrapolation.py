r"""Length extrapolation by positional robustness.

A Transformer that was trained on sequences of length $N$ usually fails on longer ones. Restricting
attention to a window hides the failure on text, perhaps only because text is read well from close
by; where an answer depends on symbols far apart, a window cannot help. Is there a way that changes
neither the attention nor the cost of a test?

## Two things that are new at a greater length

**Positions that were never seen.** Whatever the position code, absolute or relative, a model that
was trained on $0, \dots, N-1$ has met no position and no distance beyond.

**Attention over more tokens.** A key whose score exceeds those of $n$ others by $\Delta$ gets the
share $1/(1 + n e^{-\Delta})$ of the attention, and loses it as $n$ grows. Multiplied by
$\lambda_n = \log n / \log m$, where $m$ is the length of training, the scores give it the share
$1/(1 + n^{1 - \Delta/\log m})$ instead: a key that stands out enough at length $m$, with
$\Delta > \log m$, stands out at every length. The factor is 1 at $n = m$, so it costs nothing.

## Random subsets

Choose $L$ larger than any length to come. In training, the tokens of every sequence get the sorted
numbers of a random subset of $\{0, \dots, L-1\}$, drawn anew for each. The model then meets all
positions and all distances below $L$, and since the gaps between neighbours are random, nothing but
the order carries information: $[1, 3, 5]$ must mean what $[2, 4, 8]$ means. At test the tokens get
the evenly spaced positions $\lfloor iL/n \rfloor$. These are nearly the mean of a random subset,
whose $i$-th number ($i = 1, \dots, n$) is the order statistic with

$$\mathbb E\,X_{(i)} = \frac{i(L+1)}{n+1} - 1, \qquad
\operatorname{Var} X_{(i)} = \frac{i(n+1-i)(L+1)(L-n)}{(n+1)^2(n+2)}.$$

What remains different at a greater length is the mean gap, $L/N$ in training and $L/n$ at test.

## Equal means

To take the test positions $0, 1, 2, \dots$ as they are, make them the mean of those in training:
draw a real number $n'$ with mean $N$ for each sequence, and let its tokens stand at
$i\,n'/N$, $i = 0, \dots, N-1$. (The article lets the last token stand at $n'$, which makes the mean
spacing $N/(N-1)$.) The law of $n'$ must reach the lengths of the test. A Poisson law does not, its
standard deviation being $\sqrt N$; an exponential one has the standard deviation $N$ and
$P(n' > cN) = e^{-c}$. Positions are fractional, which sinusoidal and rotary codes welcome. All
tokens of one sequence share a scale: this scheme randomises the scale, the other one the gaps.

## What is measured, and why it decides

Sorting digits (`bucket_sort`) needs every symbol, so that locality cannot pass for extrapolation,
and the answer is known at every length. A small encoder reads strings of 2 to 16 symbols, and is
then tested on up to 64; a blind guess is right in one of five. It is trained on the positions
$0, 1, 2, \dots$, on random subsets, and with equal means. All else is equal: weights at the start,
strings, steps. Nothing is chosen by looking at longer strings.

The first scheme counts as working if the mean accuracy over the lengths that were not seen rises
by at least 0.4, and that at length 16 falls by at most 0.08; the second one if it gains 0.2 with
rotary positions. In the full budget the same holds for two position codes and the mean of three
seeds, four more tasks show how far a scheme carries, and a language model fills in masked
characters of prose at up to eight times its length of training: there equal means must gain 0.05.
Whether the logarithmic factor helps that model is reported. At this scale nobody expects that it
does.

The reader should see the accuracy with ordinary positions fall to chance just behind the length of
training, and that with random subsets stay where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import Lab
from kexue.lab.formal_languages import (
    TASKS,
    ExtrapolationResult,
    FormalLanguageTask,
    evaluate_length_extrapolation,
)
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.attention import MultiHeadAttention
from kexue.nn.position import (
    SinusoidalPositionEmbedding,
    equal_mean_positions,
    evenly_spaced_positions,
    random_positions,
)
from kexue.nn.rotary import RotaryEmbedding

TRAIN_LENGTH = 16
TEST_LENGTHS = (16, 24, 32, 48, 64)
MAX_LENGTH = 256
SINUSOIDAL, ROTARY = "sinusoidal", "rotary"
STANDARD, SUBSET, EQUAL_MEAN = "0, 1, 2, …", "random subset", "equal mean"
SORTING = "bucket_sort"
OTHER_TASKS = {"reverse_string": 500, "odds_first": 500, "missing_duplicate": 500,
               "even_pairs": 2000}  # fmt: skip

TEXT_LENGTH = 16
TEXT_TEST_LENGTHS = (16, 32, 64, 128)
TEXT_MAX_LENGTH = 512
MASKED_SHARE = 0.15

Positions = Callable[[int, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Scheme:
    """Positions of n tokens, for so many sequences in training and for all of them at test."""

    train: Positions
    test: Callable[[int], Tensor]


def schemes(max_length: int) -> dict[str, Scheme]:
    return {
        STANDARD: Scheme(lambda n, batch, generator: torch.arange(n), torch.arange),
        SUBSET: Scheme(
            lambda n, batch, generator: random_positions(
                n, max_length, batch_size=batch, generator=generator
            ),
            lambda n: evenly_spaced_positions(n, max_length),
        ),
        EQUAL_MEAN: Scheme(
            lambda n, batch, generator: equal_mean_positions(
                n, batch_size=batch, generator=generator
            ),
            torch.arange,
        ),
    }


def run(lab: Lab) -> None:
    """Show the positions, train on them, and test where the model has never been."""
    with _one_thread():
        _moments(lab)
        _positions_in_training(lab)
        _sorting(lab)
        if lab.budget != "quick":
            _other_tasks(lab)
        if lab.budget != "quick" or lab.data.path is not None:
            _text(lab)


def _moments(lab: Lab) -> None:
    """Compare drawn subsets with the exact moments, for the sizes of the article."""
    n, size, draws = 64, 2048, lab.pick(smoke=200, quick=20_000, full=200_000)
    drawn = random_positions(n, size, batch_size=draws, generator=lab.generator()).double()
    i = torch.arange(1, n + 1, dtype=torch.float64)
    mean = i * (size + 1) / (n + 1) - 1
    sd = (i * (n + 1 - i) * (size + 1) * (size - n) / ((n + 1) ** 2 * (n + 2))).sqrt()
    lab.table(
        "Positions of a random subset",
        [
            {
                "$i$": k,
                "mean": mean[k - 1],
                "mean, drawn": drawn[:, k - 1].mean(),
                "sd": sd[k - 1],
                "sd, drawn": drawn[:, k - 1].std(),
                "$(i-1)L/n$": (k - 1) * size / n,
            }
            for k in (1, 2, 32, 64)
        ],
        f"The $i$-th of {n} positions out of {size}: exact moments against {draws} draws. The last "
        "column is where the token stands at test.",
    )
    lab.observe(
        "largest distance of a mean position from its exact value, in standard errors",
        ((drawn.mean(0) - mean).abs() / (sd / math.sqrt(draws))).max(),
        "<",
        5.0,
    )


def _positions_in_training(lab: Lab) -> None:
    """Draw positions of all training lengths, as the model meets them."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    longest = max(TEST_LENGTHS)
    for axes, (name, scheme) in zip(panels, schemes(MAX_LENGTH).items(), strict=True):
        generator, seen = lab.generator(), []
        for n in range(2, TRAIN_LENGTH + 1):
            seen.append(scheme.train(n, 400, generator).double().expand(400, n).flatten())
        end = MAX_LENGTH if name == SUBSET else 1.5 * longest
        axes.hist(torch.cat(seen).numpy(), bins=48, range=(0, end), density=True, alpha=0.6)
        test = scheme.test(longest)
        axes.plot(test, torch.zeros(longest), "|", color="black", markersize=9, clip_on=False)
        axes.set_title(name, fontsize="medium")
        axes.set_yscale("log")
        axes.set(xlabel="position", ylim=(1e-5, None), xlim=(0, end))
    panels[0].set_ylabel("density in training")
    lab.figure(
        "positions",
        figure,
        f"Positions seen in training on strings of 2 to {TRAIN_LENGTH} symbols, on a logarithmic "
        f"scale, and those of a test string of {longest} symbols (bars). Left: three quarters of "
        "the test lie where nothing was seen.",
    )


def _sorting(lab: Lab) -> None:
    """The verdict: sorting, with ordinary positions and with two kinds of random ones."""
    codes = lab.pick(smoke=(ROTARY,), quick=(ROTARY,), full=(SINUSOIDAL, ROTARY))
    seeds = lab.pick(smoke=1, quick=1, full=3)
    steps = lab.pick(smoke=5, quick=250, full=500)
    accuracy: dict[tuple[str, str], Tensor] = {}
    rows = []
    for code in codes:
        for name in schemes(MAX_LENGTH):
            results = [
                _accuracy(lab, TASKS[SORTING], code, name, steps, lab.seed + seed)
                for seed in range(seeds)
            ]
            each = torch.tensor([result.token_accuracy for result in results]).double()
            accuracy[code, name] = each.mean(0)
            unseen = each[:, 1:].mean(1)
            rows.append({
                "code": code,
                "positions in training": name,
                **_by_length(TEST_LENGTHS, each.mean(0)),
                "unseen lengths": unseen.mean(),
                "worst seed": unseen.min(),
            })  # fmt: skip
    lab.table(
        "Sorting",
        rows,
        f"Share of symbols in their place, by the length of the string; trained on up to "
        f"{TRAIN_LENGTH} symbols for {steps} steps, mean of {seeds} "
        f"seed{'s' if seeds > 1 else ''}. A guess is right in 0.2.",
    )
    lab.figure("accuracy", _accuracy_figure(accuracy, codes), "Sorting: share of symbols in their "
               "place against the length of the string. The model was trained left of the dotted "
               "line; the dashed line is chance.")  # fmt: skip
    _entropy(lab, steps)
    unseen = {key: value[1:].mean() for key, value in accuracy.items()}
    for code in codes:
        lab.claim(
            f"gain of a random subset at lengths not seen, {code}",
            unseen[code, SUBSET] - unseen[code, STANDARD],
            ">=",
            0.4,
        )
        lab.claim(
            f"price of a random subset at length {TRAIN_LENGTH}, {code}",
            accuracy[code, STANDARD][0] - accuracy[code, SUBSET][0],
            "<=",
            0.08,
        )
    for code in codes:
        record = lab.claim if code == ROTARY else lab.observe
        record(
            f"gain of equal means at lengths not seen, {code}",
            unseen[code, EQUAL_MEAN] - unseen[code, STANDARD],
            ">=",
            0.2,
        )


def _other_tasks(lab: Lab) -> None:
    """How far the schemes carry, with rotary positions and one seed."""
    rows, at_16 = [], {}
    for task, full in OTHER_TASKS.items():
        steps = lab.pick(smoke=3, quick=full, full=full)
        for name in schemes(MAX_LENGTH):
            result = _accuracy(lab, TASKS[task], ROTARY, name, steps, lab.seed)
            at_16[task, name] = result.token_accuracy[0]
            rows.append({
                "task": task.replace("_", " "),
                "positions in training": name,
                "steps": steps,
                **_by_length(TEST_LENGTHS, result.token_accuracy),
            })  # fmt: skip
    lab.table(
        "Four more tasks",
        rows,
        "Rotary positions, one seed. A guess is right in 0.5. Where length 16 itself is not "
        "learnt, there is nothing to extrapolate: random positions make learning slower.",
    )
    lab.observe(
        "even pairs at length 16 after 2000 steps on random subsets",
        at_16["even_pairs", SUBSET],
        ">",
        0.9,
    )
    lab.observe(
        "what random subsets cost at length 16, mean of four tasks",
        sum(at_16[task, STANDARD] - at_16[task, SUBSET] for task in OTHER_TASKS) / len(OTHER_TASKS),
        ">",
        0.0,
    )


def _text(lab: Lab) -> None:
    """Masked characters of prose, or of the user's own text."""
    characters = lab.data.Characters(lab.data.text(), 96)
    cut = int(0.9 * len(characters.tokens))
    training, held_out = characters.tokens[:cut], characters.tokens[cut:]
    steps = lab.pick(smoke=5, quick=300, full=600)
    windows = lab.pick(smoke=2**10, quick=2**15, full=2**16)
    chosen = schemes(TEXT_MAX_LENGTH)
    variants = {
        STANDARD: (chosen[STANDARD], None),
        EQUAL_MEAN: (chosen[EQUAL_MEAN], None),
        "equal mean, log n": (chosen[EQUAL_MEAN], TEXT_LENGTH),
        SUBSET: (chosen[SUBSET], None),
    }
    accuracy = {}
    for name, (scheme, log_length) in variants.items():
        model = _encoder(len(characters) + 1, ROTARY, 64, 2, lab, log_length=log_length)

        def loss(generator: torch.Generator, model: nn.Module = model, scheme: Scheme = scheme):  # type: ignore[no-untyped-def]
            hidden, true, mask = _masked(training, TEXT_LENGTH, 48, len(characters), generator)
            positions = scheme.train(TEXT_LENGTH, 48, generator)
            logits = model(hidden.to(lab.device), positions=positions.to(lab.device))
            return nn.functional.cross_entropy(logits[mask], true[mask].to(lab.device))

        _fit(lab, model, loss, f"text, {name}", steps, lab.seed, learning_rate=5e-3)
        accuracy[name] = torch.tensor([
            _masked_accuracy(lab, model, scheme, held_out, n, windows // n, len(characters))
            for n in TEXT_TEST_LENGTHS
        ])  # fmt: skip
    lab.table(
        "Masked characters",
        [
            {"positions in training": name.replace("log n", r"$\log n$"),
             **_by_length(TEXT_TEST_LENGTHS, values)}
            for name, values in accuracy.items()
        ],
        f"Share of masked characters of held-out text that are guessed, by the length of the "
        f"window; trained on windows of {TEXT_LENGTH} characters for {steps} steps.",
    )  # fmt: skip
    gain = accuracy[EQUAL_MEAN] - accuracy[STANDARD]
    record = lab.claim if lab.data.path is None else lab.observe
    record("gain of equal means on text at 8 times the length of training", gain[-1], ">=", 0.05)
    scaled = accuracy["equal mean, log n"] - accuracy[EQUAL_MEAN]
    for place, times in ((2, 4), (3, 8)):
        lab.observe(
            rf"gain of the factor $\log n$ on text at {times} times the length of training",
            scaled[place],
            ">=",
            0.0,
        )


# Models and their training


def _encoder(
    symbols: int,
    code: str,
    dim: int,
    layers: int,
    lab: Lab,
    *,
    seed: int | None = None,
    log_length: int | None = None,
) -> Transformer:
    """An encoder that starts with torch's own values, so that every scheme starts alike."""
    config = TransformerConfig(
        vocab_size=symbols, dim=dim, num_layers=layers, num_heads=4, max_length=None,
        causal=False, tie_embeddings=False, activation="relu",
    )  # fmt: skip
    rotary = code == ROTARY
    position = RotaryEmbedding(dim // 4) if rotary else SinusoidalPositionEmbedding(dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lab.seed if seed is None else seed)
        model = Transformer(config, position=position, initializer=lambda model: None)
    _scale_attention(model, log_length)
    return model.to(lab.device)


def _scale_attention(model: nn.Module, log_length: int | None) -> None:
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.log_length = log_length


def _fit(
    lab: Lab,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    name: str,
    steps: int,
    seed: int,
    *,
    learning_rate: float = 1e-3,
) -> None:
    """Train, or take up the weights of an earlier run; ``loss_of`` draws a batch."""

    def build() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
        progress = lab.progress(range(steps), name)
        for _ in progress:
            optimizer.zero_grad()
            loss = loss_of(generator)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.metric(loss=loss.detach())
        return model.state_dict()

    model.train()
    weights = lab.cache("weights", build, inputs={"model": name, "steps": steps, "seed": seed})
    model.load_state_dict(weights)
    model.eval()


def _trained(
    lab: Lab, task: FormalLanguageTask, code: str, name: str, steps: int, seed: int
) -> Transformer:
    """A model that answers strings of the task, of 2 to 16 symbols in training."""
    symbols = max(len(task.input_vocabulary) + 1, len(task.output_vocabulary))
    model = _encoder(symbols, code, 48, 3, lab, seed=seed)
    scheme = schemes(MAX_LENGTH)[name]

    def loss(generator: torch.Generator) -> Tensor:
        low = max(2, task.minimum_length)
        length = int(torch.randint(low, TRAIN_LENGTH + 1, (), generator=generator))
        batch = task.sample(64, length, generator=generator)
        logits = _logits(
            model, task, batch.inputs, batch.targets.shape[1],
            lambda n: scheme.train(n, 64, generator),
        )  # fmt: skip
        mask = batch.mask.to(lab.device)
        return nn.functional.cross_entropy(logits[mask], batch.targets.to(lab.device)[mask])

    _fit(lab, model, loss, f"{task.name}, {code}, {name}", steps, seed)
    return model


def _logits(
    model: nn.Module,
    task: FormalLanguageTask,
    inputs: Tensor,
    output_length: int,
    positions: Callable[[int], Tensor],
) -> Tensor:
    """Answer at the symbols themselves where there are as many, else at blanks behind them."""
    if output_length != inputs.shape[1]:
        blanks = torch.full((len(inputs), output_length), len(task.input_vocabulary))
        inputs = torch.cat([inputs, blanks], 1)
    device = next(model.parameters()).device
    logits = model(inputs.to(device), positions=positions(inputs.shape[1]).to(device))
    return logits[:, -output_length:, : len(task.output_vocabulary)]


def _accuracy(
    lab: Lab, task: FormalLanguageTask, code: str, name: str, steps: int, seed: int
) -> ExtrapolationResult:
    model, scheme = _trained(lab, task, code, name, steps, seed), schemes(MAX_LENGTH)[name]
    return evaluate_length_extrapolation(
        lambda inputs, output_length: _logits(model, task, inputs, output_length, scheme.test),
        task,
        TEST_LENGTHS,
        batch_size=lab.pick(smoke=16, quick=256, full=512),
        generator=torch.Generator().manual_seed(2**32 + lab.seed),
    )


def _masked(
    text: Tensor, length: int, count: int, blank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of the text with some characters blanked, the windows, and where the blanks are."""
    start = torch.randint(len(text) - length, (count, 1), generator=generator)
    true = text[start + torch.arange(length)]
    mask = torch.rand(true.shape, generator=generator) < MASKED_SHARE
    return true.masked_fill(mask, blank), true, mask


@torch.no_grad()
def _masked_accuracy(
    lab: Lab, model: nn.Module, scheme: Scheme, text: Tensor, length: int, count: int, blank: int
) -> float:
    generator = torch.Generator().manual_seed(2**32 + lab.seed)
    hidden, true, mask = _masked(text, length, count, blank, generator)
    logits = model(hidden.to(lab.device), positions=scheme.test(length).to(lab.device))
    return (logits.argmax(-1).cpu()[mask] == true[mask]).double().mean().item()


def _entropy(lab: Lab, steps: int) -> None:
    """Entropy of attention against length, of a model that was trained on random subsets."""
    task, scheme = TASKS[SORTING], schemes(MAX_LENGTH)[SUBSET]
    model = _trained(lab, task, ROTARY, SUBSET, steps, lab.seed)
    lengths = torch.tensor([8, 16, 32, 64, 128])
    mean: dict[str, list[float]] = {}
    for label, log_length in (("plain", None), (r"with $\log n$", TRAIN_LENGTH)):
        _scale_attention(model, log_length)
        mean[label] = []
        for n in lengths.tolist():
            inputs = task.sample(64, n, generator=lab.generator()).inputs.to(lab.device)
            with _entropies(model) as entropies, torch.no_grad():
                model(inputs, positions=scheme.test(n).to(lab.device))
            mean[label].append(sum(entropies) / len(entropies))
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for label, values in mean.items():
        axes.plot(lengths, values, marker="o", label=label)
    axes.plot(lengths, lengths.log(), color="black", linestyle="--", label=r"uniform, $\log n$")
    axes.axvline(TRAIN_LENGTH, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths.tolist()])
    axes.set(xlabel="number of keys $n$", ylabel="mean entropy of attention, nats")
    axes.legend()
    lab.figure(
        "entropy",
        figure,
        r"Mean entropy of all attention heads of the model trained on random subsets. Logits "
        rf"multiplied by $\log n/\log {TRAIN_LENGTH}$ spread less over more keys. The dotted line "
        "is the length of training.",
    )
    plain, scaled = mean.values()
    doublings = math.log2(lengths[-1] / TRAIN_LENGTH)
    at_train = lengths.tolist().index(TRAIN_LENGTH)
    lab.observe(
        rf"entropy gained with each doubling of $n$, with $\log n$ (without it "
        rf"{(plain[-1] - plain[at_train]) / doublings:.2f}, uniform {math.log(2):.2f})",
        (scaled[-1] - scaled[at_train]) / doublings,
        "<",
        (plain[-1] - plain[at_train]) / doublings,
    )


@contextmanager
def _entropies(model: nn.Module) -> Iterator[list[float]]:
    """Collect the mean entropy of each attention layer while the model runs."""
    found: list[float] = []

    def look(core: nn.Module, heads: tuple[Any, ...], options: dict[str, Any]) -> None:
        query, key, _ = heads
        scale = options.get("scale") or query.shape[-1] ** -0.5
        log_weights = (scale * query @ key.mT).log_softmax(-1)
        found.append(-(log_weights.exp() * log_weights).sum(-1).mean().item())

    cores = [m.core for m in model.modules() if isinstance(m, MultiHeadAttention)]
    handles = [core.register_forward_pre_hook(look, with_kwargs=True) for core in cores]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# What is shown


def _by_length(lengths: tuple[int, ...], values: Any) -> dict[str, Any]:
    return {str(n): value for n, value in zip(lengths, values, strict=True)}


def _accuracy_figure(accuracy: dict[tuple[str, str], Tensor], codes: tuple[str, ...]) -> Figure:
    figure = Figure(figsize=(3.6 * len(codes) + 1.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(codes), sharey=True, squeeze=False)[0]
    for axes, code in zip(panels, codes, strict=True):
        for name in schemes(MAX_LENGTH):
            axes.plot(TEST_LENGTHS, accuracy[code, name], marker="o", label=name)
        axes.axvline(TRAIN_LENGTH, color="black", linestyle=":", linewidth=1)
        axes.axhline(TASKS[SORTING].random_accuracy, color="black", linestyle="--", linewidth=1)
        axes.set_title(code, fontsize="medium")
        axes.set_xticks(TEST_LENGTHS)
        axes.set(xlabel="length of the string", ylim=(0, 1.03))
    panels[0].set_ylabel("share of right symbols")
    panels[0].legend(loc="lower left", fontsize="small", bbox_to_anchor=(0.12, 0.2))
    return figure


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of this size are done before a second thread has started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
