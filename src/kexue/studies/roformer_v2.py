r"""RoFormerV2: a simplified encoder, pre-trained without labels and then with them.

How much language understanding fits into a given number of parameters? RoFormerV2 takes from the
Transformer what training does not need, and then trains it in two stages: first on plain text, then
on many labelled tasks at once. With 314 million parameters it was fifth on the Chinese benchmark
CLUE, the smallest of the first five. Which of the two, the simplification or the labels, is worth
what?

## The encoder

No layer has a bias, and the norm has no parameters at all,

$$N(x) = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \varepsilon}}, \qquad
x \leftarrow N(x + \alpha F(x)),$$

where $F$ is attention or a feed-forward network with ReLU. Positions are rotations of queries and
keys: components $2i$ and $2i + 1$ at position $n$ turn by $n \cdot 10000^{-2i/d}$. The output layer
is the word embedding once more, without bias and without the usual transform. That leaves
$Vd + 2d + L(4d^2 + 2df)$ parameters, all of them entries of matrices.

## How it starts

After $L$ layers the stream has collected $2L$ branches. A matrix with fan-in $m$ is drawn with
standard deviation $1/\sqrt{mL}$, so that together they stay of order one. The normal distribution
is cut at twice its parameter $s$, which takes a share of the deviation; so
$s = 1.1368/\sqrt{mL}$. (A well-known port cuts at $\pm 2$ instead of $\pm 2s$, that is nowhere, and
takes the output side for the fan.)

A post-norm network is hard to start all the same. The article lets $\alpha$ grow from 0 to 1 over
the first steps: at $\alpha = 0$ the network is the identity, as $N(N(x)) = N(x)$ up to
$\varepsilon$.

## Two stages

Stage 1 is masked language modelling on whole words. Stage 2 keeps it as one of many tasks, here
beside one labelled task. Their gradients have very different sizes, so each is divided by its norm
over the shared encoder,

$$u = \frac1k \sum_{i=1}^k \frac{g_i}{\|g_i\|}.$$

For two tasks, $\langle u, g_1 \rangle \propto \|g_1\| (1 + \cos\theta) \ge 0$ and likewise for the
other: no step points against either.

## What decides it

The text is the documentation of Python's standard library. Twenty modules serve for pre-training;
the labelled task of stage 2 is to tell from which of them a paragraph comes. Then eight *other*
modules are to be told apart after twenty examples each. Three encoders compete: a fresh one, one
with masked language modelling only, and one with both stages, the last two with **the same number
of updates**. The article is right if the labels of stage 2 add at least two points of accuracy on
modules that the encoder has never seen, over three seeds and three draws of the examples each.

The other half of the article's claim is speed: without biases and norm parameters its training was
1.2 to 1.3 times as fast, in the TensorFlow of 2022. The same network with and without them is timed
below, in today's PyTorch. It should be 1.05 times as fast for that claim to hold on this machine.
Last come curves of training with and without the growing $\alpha$, at three depths; they decide
nothing.
"""

import ast
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import Lab
from kexue.lab.errors import DataError
from kexue.models.roformer import (
    MaskedLanguageModelCollator,
    MultiTaskTrainer,
    PiecewiseLinearLR,
    ResidualWarmup,
    RoFormerV2Config,
    RoFormerV2ForMaskedLM,
    RoFormerV2ForSequenceClassification,
    RoFormerV2Tokenizer,
    Task,
)
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.residual import Residual
from kexue.nn.rotary import RotaryEmbedding

SEEN = (
    "configparser", "difflib", "doctest", "email", "http", "imaplib", "importlib", "inspect",
    "multiprocessing", "pdb", "pydoc", "shutil", "statistics", "subprocess", "threading", "typing",
    "unittest", "wsgiref", "xml", "xmlrpc",
)  # fmt: skip
UNSEEN = (
    "asyncio", "collections", "logging", "mailbox", "smtplib", "tarfile", "urllib", "zipfile",
)  # fmt: skip
VOCABULARY, LENGTH, BATCH = 1500, 32, 32
EXAMPLES, HELD_OUT, EPOCHS, DRAWS = 20, 60, 8, 3
RATE = 1e-3
ARMS = ("no pre-training", "masked LM only", "stage 1 + stage 2")


def run(lab: Lab) -> None:
    corpus = paragraphs(lab)
    accuracies = compare_arms(lab, corpus)
    none, masked, both = (accuracies[arm] for arm in ARMS)
    gain = statistics.mean(both) - statistics.mean(masked)
    lab.claim("accuracy that the labels of stage 2 add at equal updates", gain, ">=", 0.02)
    lab.observe(
        "accuracy that masked language modelling adds to a fresh encoder",
        statistics.mean(masked) - statistics.mean(none),
        ">",
        0.0,
    )
    ratio = step_times(lab)
    lab.observe(
        "how many times as fast a step is without biases and norm parameters", ratio, ">=", 1.05
    )
    growing_scale(lab, corpus)
    own_pairs(lab)


@dataclass(frozen=True)
class Corpus:
    """Paragraphs by module, and a vocabulary learnt on those that are seen."""

    seen: dict[str, list[str]]
    unseen: dict[str, list[str]]
    tokenizer: RoFormerV2Tokenizer

    @property
    def texts(self) -> list[str]:
        return list(chain(*self.seen.values()))


def paragraphs(lab: Lab) -> Corpus:
    source = lab.data.python_source([*SEEN, *UNSEEN])
    found = {name: docstring_paragraphs(text) for name, text in source.items()}
    seen = {name: found[name] for name in SEEN if name in found}
    unseen = {name: found[name] for name in UNSEEN if len(found.get(name, ())) > EXAMPLES}
    tokenizer = RoFormerV2Tokenizer.train(chain(*seen.values()), vocab_size=VOCABULARY)
    return Corpus(seen, unseen, tokenizer)


def docstring_paragraphs(source: str) -> list[str]:
    """Return the paragraphs of more than forty characters in docstrings, each once."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    pieces = chain(*(re.split(r"\n\s*\n", docstring) for docstring in docstrings))
    lines = (" ".join(piece.split()) for piece in pieces)
    return list(dict.fromkeys(line for line in lines if len(line) > 40))


def compare_arms(lab: Lab, corpus: Corpus) -> dict[str, list[float]]:
    seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=1, full=3))]
    first = lab.pick(smoke=4, quick=150, full=200)
    second = lab.pick(smoke=4, quick=100, full=220)
    accuracies: dict[str, list[float]] = {arm: [] for arm in ARMS}
    rows = []
    for seed in seeds:
        encoders, curves = pretrained(lab, corpus, seed, first, second)
        for arm, state in encoders.items():
            bar = lab.progress(range(DRAWS), f"fine-tuning, {arm}")
            few = [fine_tuned(lab, corpus, state, seed, draw) for draw in bar]
            accuracies[arm] += few
            rows.append(
                {
                    "seed": seed,
                    "pre-training": arm,
                    "updates": 0 if arm == ARMS[0] else first + second,
                    **{f"draw {i}": accuracy for i, accuracy in enumerate(few, 1)},
                    "mean": statistics.mean(few),
                }
            )
    lab.table(
        "Accuracy on eight unseen modules",
        rows,
        f"After {EXAMPLES} examples of each module, on up to {HELD_OUT} further paragraphs each. "
        "Chance is 0.125.",
    )
    lab.figure(
        "accuracy",
        accuracy_figure(accuracies),
        "Accuracy on modules that pre-training has not seen; a dot is one draw of the examples.",
    )
    lab.figure(
        "curves",
        curve_figure(curves, first),
        "Losses of the last seed. In stage 2 masked language modelling is drawn in one update of "
        "three, and the modules in the others.",
    )
    return accuracies


def pretrained(
    lab: Lab, corpus: Corpus, seed: int, first: int, second: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[tuple[int, float]]]]:
    """Return the encoders of the three arms, and the losses of the two that were trained."""
    model = RoFormerV2ForMaskedLM(configuration(corpus.tokenizer), generator=source(seed)).to(
        lab.device
    )
    encoders = {ARMS[0]: copy.deepcopy(model.state_dict())}
    words = masked_words(corpus, model, source(seed))
    stage_one = train(lab, model, [words], first, seed, "stage 1", 2 * RATE)
    more = copy.deepcopy(model)
    words_only = masked_words(corpus, more, source(seed + 1))
    longer = train(lab, more, [words_only], second, seed, "masked LM only")
    encoders[ARMS[1]] = more.state_dict()

    head = nn.Linear(model.config.hidden_size, len(corpus.seen)).to(lab.device)
    nn.init.zeros_(head.weight)
    tasks = [
        masked_words(corpus, model, source(seed + 1)),
        which_module(lab, corpus, model, head, source(seed + 2)),
    ]
    stage_two = train(lab, model, tasks, second, seed, "stage 2", heads=[head])
    encoders[ARMS[2]] = model.state_dict()
    beginning = stage_one["words"]
    curves = {
        "words, masked LM only": beginning + shifted(longer["words"], first),
        "words, with stage 2": shifted(stage_two.get("words", []), first),
        "modules, with stage 2": shifted(stage_two.get("modules", []), first),
    }
    return encoders, curves


def configuration(tokenizer: RoFormerV2Tokenizer, **changes: Any) -> RoFormerV2Config:
    base = RoFormerV2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=384,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(UNSEEN),
    )
    return replace(base, **changes)


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled(items: int, batch: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of indices, epoch after epoch without end."""
    while True:
        order = torch.randperm(items, generator=generator)
        yield from (part.tolist() for part in order.split(batch))


def masked_words(
    corpus: Corpus, model: RoFormerV2ForMaskedLM, generator: torch.Generator, batch: int = BATCH
) -> Task:
    texts = corpus.texts
    collate = MaskedLanguageModelCollator(corpus.tokenizer, max_length=LENGTH, generator=generator)

    def loss(rows: list[int]) -> Tensor:
        masked = collate([texts[row] for row in rows])
        device = next(model.parameters()).device
        output = model(
            masked.input_ids.to(device),
            attention_mask=masked.attention_mask.to(device),
            labels=masked.labels.to(device),
        )
        return output.loss

    return Task("words", shuffled(len(texts), batch, generator), loss, weight=1.0)


def which_module(
    lab: Lab,
    corpus: Corpus,
    model: RoFormerV2ForMaskedLM,
    head: nn.Module,
    generator: torch.Generator,
) -> Task:
    texts = corpus.tokenizer(corpus.texts, max_length=LENGTH)
    counts = torch.tensor([len(found) for found in corpus.seen.values()])
    modules = torch.arange(len(counts)).repeat_interleave(counts)

    def loss(rows: list[int]) -> Tensor:
        state = model.roformer(
            texts.input_ids[rows].to(lab.device),
            attention_mask=texts.attention_mask[rows].to(lab.device),
        ).last_hidden_state[:, 0]
        return nn.functional.cross_entropy(head(state), modules[rows].to(lab.device))

    return Task("modules", shuffled(len(modules), BATCH, generator), loss, weight=2.0)


def train(
    lab: Lab,
    model: RoFormerV2ForMaskedLM,
    tasks: list[Task],
    updates: int,
    seed: int,
    label: str,
    rate: float = RATE,
    *,
    heads: list[nn.Module] | None = None,
) -> dict[str, list[tuple[int, float]]]:
    """Train with gradients of length one; return the losses of each task by update."""
    parameters = [*model.parameters(), *chain(*(head.parameters() for head in heads or []))]
    optimizer = torch.optim.AdamW(parameters, rate)
    trainer = MultiTaskTrainer(
        model.roformer,
        tasks,
        optimizer,
        scheduler=PiecewiseLinearLR(optimizer, {max(updates // 10, 1): 1.0}),
        generator=source(seed),
    )
    losses: dict[str, list[tuple[int, float]]] = {}
    bar = lab.progress(range(updates), label)
    for update in bar:
        history = trainer.train(1)
        losses.setdefault(history.task[0], []).append((update, history.loss[0]))
        bar.metric(loss=history.loss[0])
    return losses


def shifted(losses: list[tuple[int, float]], by: int) -> list[tuple[int, float]]:
    return [(update + by, loss) for update, loss in losses]


@dataclass(frozen=True)
class Example:
    """A text, or two, and their class."""

    text: str
    label: int
    second: str | None = None


def fine_tuned(
    lab: Lab, corpus: Corpus, state: Mapping[str, Tensor], seed: int, draw: int
) -> float:
    """Return the accuracy on unseen modules after twenty examples of each."""
    generator = source(1000 * seed + draw)
    few: list[Example] = []
    rest: list[Example] = []
    for label, texts in enumerate(corpus.unseen.values()):
        order = torch.randperm(len(texts), generator=generator).tolist()
        drawn = [Example(texts[i], label) for i in order[: EXAMPLES + HELD_OUT]]
        few += drawn[:EXAMPLES]
        rest += drawn[EXAMPLES:]
    model = RoFormerV2ForSequenceClassification(
        replace(configuration(corpus.tokenizer), hidden_dropout_prob=0.1), generator=generator
    )
    model.load_checkpoint_state(state)
    epochs = lab.pick(smoke=1, quick=EPOCHS, full=EPOCHS)
    return fit_and_score(lab, model, corpus.tokenizer, few, rest, epochs, generator)


def fit_and_score(
    lab: Lab,
    model: RoFormerV2ForSequenceClassification,
    tokenizer: RoFormerV2Tokenizer,
    few: Sequence[Example],
    rest: Sequence[Example],
    epochs: int,
    generator: torch.Generator,
) -> float:
    """Fine-tune on some examples and return the accuracy on others."""

    def tokens(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        texts = [example.text for example in examples]
        seconds = [example.second or "" for example in examples]
        paired = any(seconds)
        encoded = tokenizer(
            texts, seconds if paired else None, max_length=LENGTH * (2 if paired else 1)
        )
        labels = torch.tensor([example.label for example in examples])
        return tuple(
            tensor.to(lab.device) for tensor in (encoded.input_ids, encoded.attention_mask, labels)
        )

    model.to(lab.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    ids, mask, labels = tokens(few)
    batches = shuffled(len(ids), BATCH, generator)
    with torch.random.fork_rng():  # dropout draws from torch's own source
        torch.manual_seed(generator.initial_seed())
        for rows in islice(batches, epochs * -(-len(ids) // BATCH)):
            loss = model(ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    hits = 0
    with torch.inference_mode():
        for part in zip(*(tensor.split(256) for tensor in tokens(rest)), strict=True):
            ids, mask, labels = part
            predicted = model(ids, attention_mask=mask).logits.argmax(-1)
            hits += int((predicted == labels).sum())
    return hits / len(rest)


def step_times(lab: Lab) -> float:
    """Time training steps of the same network with and without biases and norm parameters."""
    repeats = lab.pick(smoke=1, quick=5, full=21)
    rows, ratios = [], []
    for width in (128, 256):
        steps = [training_step(lab, width, simplified) for simplified in (False, True)]
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for step, samples in zip(steps, times, strict=True):
                start = time.perf_counter()
                step()
                samples.append(time.perf_counter() - start)
        full, simplified = (1e3 * statistics.median(samples) for samples in times)
        ratios.append(full / simplified)
        rows.append(
            {
                "width $d$": width,
                "biases and LayerNorm, ms": full,
                "without, ms": simplified,
                "ratio": ratios[-1],
            }
        )
    lab.table(
        "Time of a training step",
        rows,
        "Three layers, masked-LM head of 1500 words, 16 texts of 32 tokens, AdamW; the median of "
        f"{repeats}, in turns. The claim takes the geometric mean of both ratios.",
    )
    lab.figure(
        "steps",
        step_figure(rows),
        "With fused kernels, a bias or a gain costs next to nothing beside its matrix.",
    )
    return statistics.geometric_mean(ratios)


def training_step(lab: Lab, width: int, simplified: bool) -> Callable[[], None]:
    norm = partial(nn.RMSNorm, elementwise_affine=False) if simplified else nn.LayerNorm
    with torch.random.fork_rng():
        torch.manual_seed(lab.seed)
        model = Transformer(
            TransformerConfig(
                VOCABULARY, width, 3, 4, max_length=None, causal=False, activation="relu"
            ),
            position=RotaryEmbedding(width // 4),
            residual=partial(Residual, style="post", norm=norm),
            norm=norm,
        ).to(lab.device)
    if simplified:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_parameter("bias", None)
    tokens = torch.randint(VOCABULARY, (16, LENGTH), generator=lab.generator()).to(lab.device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if lab.device.type == "cuda":
            torch.cuda.synchronize(lab.device)

    step()
    return step


def growing_scale(lab: Lab, corpus: Corpus) -> None:
    """Show the beginning of training with α = 1 and with α that grows."""
    updates = lab.pick(smoke=3, quick=20, full=100)
    batch = lab.pick(smoke=4, quick=8, full=BATCH)
    curves: dict[int, dict[str, list[float]]] = {}
    for depth in (6, 12, 24):
        curves[depth] = {}
        for name in ("α = 1", "α grows"):
            config = configuration(
                corpus.tokenizer,
                hidden_size=64,
                num_hidden_layers=depth,
                num_attention_heads=2,
                intermediate_size=256,
            )
            model = RoFormerV2ForMaskedLM(config, generator=source(lab.seed)).to(lab.device)
            optimizer = torch.optim.AdamW(model.parameters(), 2 * RATE)
            words = masked_words(corpus, model, source(lab.seed), batch)
            grows = name == "α grows"
            trainer = MultiTaskTrainer(
                model.roformer,
                [words],
                optimizer,
                residual_warmup=ResidualWarmup(model, updates // 2) if grows else None,
            )
            bar = lab.progress(range(updates), f"{depth} layers, {name}")
            curves[depth][name] = [trainer.train(1).loss[0] for _ in bar]
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axis, (depth, named) in zip(
        figure.subplots(1, 3, sharey=True), curves.items(), strict=True
    ):
        for (name, losses), style in zip(named.items(), ("-", "--"), strict=True):
            axis.plot(smoothed(losses), style, label=name)
        axis.set_xlabel(f"update, L = {depth}")
    figure.axes[0].set_ylabel("loss, nats")
    figure.axes[0].legend()
    lab.figure(
        "scale",
        figure,
        f"The first {updates} updates of masked language modelling at width 64, mean of five; "
        "$\\alpha$ grows over the first half. With this initialisation even 24 layers start well "
        "without it.",
    )


def own_pairs(lab: Lab) -> None:
    """Fine-tune on the user's labelled sentence pairs, with and without masked LM before."""
    pairs = lab.data.pairs()
    if pairs is None:
        return
    if len(pairs) < 50 or any(pair.label is None for pair in pairs):
        raise DataError("expected at least 50 sentence pairs, each with a label in a third column")
    classes = sorted({pair.label for pair in pairs if pair.label is not None})
    middle = statistics.median(classes)
    few_classes = len(classes) <= 10
    order = torch.randperm(len(pairs), generator=lab.generator()).tolist()
    examples = [
        Example(
            pairs[i].first,
            classes.index(pairs[i].label) if few_classes else int(pairs[i].label > middle),
            pairs[i].second,
        )
        for i in order[: lab.pick(smoke=100, quick=1500, full=20_000)]
    ]
    split = len(examples) // 5
    rest, few = examples[:split], examples[split:]
    texts = [text for example in few for text in (example.text, example.second or "")]
    corpus = Corpus({"pairs": texts}, {}, RoFormerV2Tokenizer.train(texts, vocab_size=3000))
    config = configuration(
        corpus.tokenizer, num_labels=len(classes) if few_classes else 2, hidden_dropout_prob=0.1
    )
    model = RoFormerV2ForMaskedLM(config, generator=source(lab.seed)).to(lab.device)
    fresh = copy.deepcopy(model.state_dict())
    words = masked_words(corpus, model, source(lab.seed))
    train(lab, model, [words], lab.pick(smoke=4, quick=150, full=2000), lab.seed, "own pairs")
    rows = []
    for name, state in ((ARMS[0], fresh), (ARMS[1], model.state_dict())):
        classifier = RoFormerV2ForSequenceClassification(config, generator=source(lab.seed))
        classifier.load_checkpoint_state(state)
        epochs = lab.pick(smoke=1, quick=3, full=4)
        accuracy = fit_and_score(
            lab, classifier, corpus.tokenizer, few, rest, epochs, source(lab.seed)
        )
        rows.append({"pre-training": name, "accuracy": accuracy})
    common = max(sum(e.label == label for e in rest) for label in range(config.num_labels))
    lab.table(
        "Your sentence pairs",
        rows,
        f"{len(few)} pairs to learn from, {len(rest)} to be judged; always to say the most "
        f"frequent class gives {common / len(rest):.3f}.",
    )


def smoothed(losses: Sequence[float], width: int = 5) -> list[float]:
    """Return the mean of the last few values at each place."""
    return [statistics.mean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]


def accuracy_figure(accuracies: Mapping[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axis = figure.subplots()
    places = range(len(accuracies))
    means = [statistics.mean(values) for values in accuracies.values()]
    axis.barh(places, means, height=0.6, alpha=0.4)
    for place, values in zip(places, accuracies.values(), strict=True):
        axis.plot(values, [place] * len(values), "o", color="C1", markersize=4)
    axis.set_yticks(places, labels=list(accuracies))
    axis.invert_yaxis()
    axis.axvline(1 / len(UNSEEN), linestyle=":", color="black")
    axis.set_xlabel("accuracy (dotted: chance)")
    return figure


def curve_figure(curves: Mapping[str, list[tuple[int, float]]], first: int) -> Figure:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--", "-."), strict=True):
        updates = [update for update, _ in losses]
        axis.plot(updates, smoothed([loss for _, loss in losses], 10), style, label=name)
    axis.axvline(first, linestyle=":", color="black")
    axis.set_xlabel("update (dotted: stage 2 begins)")
    axis.set_ylabel("loss, nats")
    axis.legend()
    return figure


def step_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axis = figure.subplots()
    for shift, column in ((-0.2, "biases and LayerNorm, ms"), (0.2, "without, ms")):
        places = [place + shift for place in range(len(rows))]
        axis.barh(places, [row[column] for row in rows], height=0.35, label=column[:-4])
    axis.set_yticks(range(len(rows)), labels=[f"d = {row['width $d$']}" for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds a step")
    axis.legend()
    return figure
