r"""Hierarchical decomposition of trained positions.

A model like BERT has learned one vector for each of its 512 positions; the 513th token has none.
Can the table be continued without training, without a change of the model on inputs that it could
read before, and well enough that a little training on long inputs completes it?

## Places in blocks

Write a position as two digits: block $i$ and place $j$ in the block, both below $n$. Su's proposal
is to compose the code of the position from vectors of its digits,

$$q_{in+j} = \alpha\, u_i + (1-\alpha)\, u_j, \qquad i, j = 0, \dots, n-1,$$

and to choose the $u$ so that the first block is what was trained, $q_j = p_j$ for $i = 0$. Place 0
of block 0 says $u_0 = p_0$, and the others follow: $u_j = (p_j - \alpha p_0)/(1-\alpha)$. With
$\alpha = \frac12$ the digits could be exchanged, $q_{in+j} = q_{jn+i}$, so that value is excluded;
from $n$ vectors come $n^2$ codes, $262\,144$ of them for BERT.

Now put $u$ into $q$. The weights of $p_0$ collect, and what remains is

$$q_{in+j} = p_j + c\,(p_i - p_0), \qquad c = \frac{\alpha}{1-\alpha}.$$

This form says more than the first one:

- In block 0 the second term is exactly zero, in every floating format, so the first $n$ codes are
  the trained ones **bit for bit**. Computed through $u$ they would be rounded twice.
- Block $i$ is the trained table moved by one vector. Differences inside a block are those of the
  trained table, so what a head has learned about neighbours holds, but at the borders of blocks.
- With $\alpha = 0$ all blocks coincide: the table is tiled, as Longformer starts, and no layer can
  tell block from block. Towards 1 the blocks drift apart without bound. For independent rows of
  variance $\sigma^2$ a code has variance $(1 + 2c^2)\sigma^2$: $1.9\,\sigma^2$ at $\alpha = 0.4$,
  but $33\,\sigma^2$ at $0.8$, where after the next normalisation little is left of the word.
- The map $p \mapsto q$ is linear with at most three entries in a row, so it can be left in the
  model: the parameters stay the $n$ trained rows, gradients of all blocks meet there, and
  checkpoints from before still load (*factorised*). Or the codes become a table of their own
  (*materialised*).

Nothing in this shows that a trained table *has* two digits. Its author calls it an invention that
can be interpreted, neither the best nor guaranteed; experiment decides.

## What is measured

The article's experiment in small. A Transformer encoder learns to restore masked characters of
English prose (15% are masked) from windows of $n = 16$ characters, with a trained table of
positions. Then the table is continued to 48 positions, and the accuracy on masked characters of
held-out windows of 48 is measured at once, and after brief training on such windows:

- *hierarchical* codes with several $\alpha$, factorised and materialised;
- *tiled*: the table again and again;
- *random rows* behind the trained ones, of their standard deviation or of the usual 0.02;
- *interpolated*: the table stretched to 48 rows, as image models do it. It changes what the model
  does on inputs of up to 16, so it is reported beside the others with that price.

All variants of a seed start from the same trained model and see the same batches. Judged are four
statements: outputs on short inputs do not change in a single bit; training regains at least half of
what the longer input costs at first; 0.4, which the article recommends, is within 0.01 of the best
$\alpha$; and it is better than random rows and than tiling by more than two standard errors of the
difference over three seeds. The first one belongs to every run; the others are about 250 steps of
training, which the full budget has, and a quick run reports what 60 steps give.

With `--data FOLDER` the article's own experiment runs on a real model as well: a checkpoint for
masked words, as `save_pretrained` of `transformers` leaves it with its tokenizer, and a `text.txt`.

The reader should see a clear loss at the moment of extension for every way of extending, and for
hierarchical codes no smaller one than for random rows; what distinguishes the ways is how fast
training makes up for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab, NotRun, seeded
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.position import extend_position_embeddings, hierarchical_position_embedding

MASKED_SHARE = 0.15
CHARACTERS = 62
SEEDS = 3
TILED, INTERPOLATED = "tiled", "interpolated"
RANDOM, SMALL_RANDOM = "random rows", "random rows, std 0.02"
CHECKPOINT_TEXT = "text.txt"

Extend = Callable[[nn.Module, int, torch.Generator], object]
"""Gives a model a table of so many positions."""


@dataclass(frozen=True)
class Scale:
    """Sizes of one experiment."""

    trained: int
    extended: int
    base_steps: int
    base_batch: int
    steps: int
    batch: int
    rate: float
    alphas: tuple[float, ...]
    baselines: tuple[str, ...]
    materialized: bool = False
    marks: int = 5
    """How often training is interrupted for a point of the curve."""

    @property
    def name(self) -> str:
        return f"{self.trained} to {self.extended}"

    def ways(self) -> dict[str, Extend]:
        """The ways to extend, in the order of the tables."""
        kinds = (True, False) if self.materialized else (True,)
        ways = {hierarchical_name(a, k): hierarchical(a, k) for k in kinds for a in self.alphas}
        return ways | {name: BASELINES[name] for name in self.baselines}


@dataclass(frozen=True)
class Outcome:
    """What became of one way for one seed: accuracies on masked characters."""

    curve: dict[int, float]
    """At the extended length, after so many steps of training there."""
    by_position: Tensor
    """Likewise after none."""
    short: float
    """At the trained length, after none."""

    @property
    def start(self) -> float:
        return self.curve[0]

    @property
    def end(self) -> float:
        return self.curve[max(self.curve)]


def run(lab: Lab) -> None:
    folder = lab.data.path if lab.data.path is not None and lab.data.path.is_dir() else None
    text = (lab.data.prose() if folder else lab.data.text()).lower()
    alphas, baselines = (0.4, 0.8), (TILED, RANDOM)
    everything = (*baselines, SMALL_RANDOM, INTERPOLATED)
    main = lab.pick(
        smoke=Scale(16, 48, 10, 16, 5, 16, 2e-3, alphas, baselines),
        quick=Scale(16, 48, 400, 48, 60, 16, 2e-3, alphas, baselines, marks=2),
        full=Scale(16, 48, 900, 48, 250, 16, 3e-3, (0.2, 0.4, 0.6, 0.8), everything, True),
    )
    experiment(lab, main, text, judged=lab.budget == "full")
    if lab.budget == "full":
        longer = Scale(64, 192, 900, 24, 250, 8, 3e-3, (0.4,), (*baselines, INTERPOLATED))
        experiment(lab, longer, text, judged=False)
    if folder:
        checkpoint_experiment(lab, folder)


def experiment(lab: Lab, scale: Scale, text: str, *, judged: bool) -> None:
    """Train, extend in every way, train on; the tables, figures and claims of one scale."""
    masked_text = characters_of(lab, text, scale.extended)
    bases = [Base(lab, scale, masked_text, SEEDS * lab.seed + i) for i in range(SEEDS)]
    ways = scale.ways()
    outcomes = {
        name: [base.outcome(name, ways[name]) for base in bases]
        for name in lab.progress(ways, scale.name)
    }
    reached = [base.accuracy for base in bases]
    show(lab, scale, reached, outcomes)

    changed = sum(base.changed_outputs(alpha) for base in bases for alpha in scale.alphas)
    what = f"outputs on inputs of up to {scale.trained} of which extension changes a bit"
    lab.claim(what, changed, "==", 0)
    judge = lab.claim if judged else lab.observe
    ours = outcomes[hierarchical_name(0.4)]
    when = f"({scale.name}, {scale.steps} steps)"
    start, end = mean(one.start for one in ours), mean(one.end for one in ours)
    lost = mean(reached) - start
    regained = (end - start) / lost if lost else math.nan
    judge(rf"share of the loss that $\alpha = 0.4$ regains {when}", regained, ">=", 0.5)
    if len(scale.alphas) > 1:
        ends = [mean(one.end for one in outcomes[hierarchical_name(a)]) for a in scale.alphas]
        what = rf"accuracy by which the best $\alpha$ exceeds 0.4 {when}"
        judge(what, max(ends) - end, "<=", 0.01)
    for baseline in scale.baselines:
        advantage = in_standard_errors(ours, outcomes[baseline])
        statement = rf"advantage of $\alpha = 0.4$ over {baseline}, in standard errors {when}"
        (judge if baseline in (TILED, RANDOM) else lab.observe)(statement, advantage, ">", 2.0)
    if INTERPOLATED in outcomes:
        price = mean(reached) - mean(one.short for one in outcomes[INTERPOLATED])
        what = f"accuracy that interpolation costs on inputs of {scale.trained} characters"
        lab.observe(what, price, ">", 0.0)


@dataclass(frozen=True)
class MaskedText:
    """A text whose masked tokens are to be restored, and how a model is asked for them."""

    lab: Lab
    learned: Tensor
    held_out: Tensor
    """Windows of the longest length, shape (windows, length)."""
    mask_token: int
    ask: Callable[[nn.Module, Tensor], Tensor]
    """Logits of a model for tokens, some of them masked."""

    def train(
        self, model: nn.Module, length: int, batch: int, steps: int, rate: float, seed: int
    ) -> Iterator[int]:
        """Train on random windows, and yield after each step how many were taken."""
        device = self.lab.device
        generator = torch.Generator().manual_seed(seed)
        windows = self.learned.unfold(0, length, 1)
        optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
        bar = self.lab.progress(range(1, steps + 1), f"train at {length}")
        for step in bar:
            tokens = windows[torch.randint(len(windows), (batch,), generator=generator)]
            masked = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
            tokens, masked = tokens.to(device), masked.to(device)
            logits = self.ask(model, tokens.masked_fill(masked, self.mask_token))
            loss = nn.functional.cross_entropy(logits[masked], tokens[masked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.metric(loss=loss)
            yield step

    @torch.no_grad()
    def accuracies(self, model: nn.Module, length: int, batch: int = 256) -> Tensor:
        """Return the accuracy by position on held-out tokens, masked alike for every model."""
        generator = torch.Generator().manual_seed(0)
        masked = torch.rand(self.held_out.shape, generator=generator) < MASKED_SHARE
        columns = self.held_out.shape[1] // length * length
        windows, masked = (x[:, :columns].reshape(-1, length) for x in (self.held_out, masked))
        asked = windows.masked_fill(masked, self.mask_token)
        parts = asked.to(self.lab.device).split(batch)
        guess = torch.cat([self.ask(model, part).argmax(-1).cpu() for part in parts])
        right = (guess == windows) & masked
        return right.sum(0) / masked.sum(0).clamp(min=1)

    def accuracy(self, model: nn.Module, length: int) -> float:
        return self.accuracies(model, length).mean().item()


def characters_of(lab: Lab, text: str, length: int) -> MaskedText:
    characters = lab.data.Characters(text, size=CHARACTERS + 1)
    border = len(characters.tokens) * 9 // 10
    if len(characters.tokens) - border < length:
        raise DataError(f"a text must have at least {10 * length} characters, got {len(text)}")
    windows = characters.tokens[border:].unfold(0, length, length)
    # Spread over the whole held-out part, whose topics differ.
    count = min(len(windows), lab.pick(smoke=960, quick=12_000, full=28_800) // length)
    held_out = windows[torch.linspace(0, len(windows) - 1, count).long()]
    return MaskedText(
        lab, characters.tokens[:border], held_out, len(characters), lambda m, tokens: m(tokens)
    )


class Base:
    """A model trained at the short length, and what extension makes of it, for one seed."""

    def __init__(self, lab: Lab, scale: Scale, text: MaskedText, seed: int) -> None:
        self.lab, self.scale, self.text, self.seed = lab, scale, text, seed
        self.model = self._trained()
        self.accuracy = text.accuracy(self.model, scale.trained)

    def _trained(self) -> Transformer:
        scale = self.scale
        config = TransformerConfig(
            vocab_size=self.text.mask_token + 1, dim=64, num_layers=2, num_heads=4, causal=False,
            max_length=scale.trained, tie_embeddings=False, activation="relu",
        )  # fmt: skip
        with seeded(self.seed):
            # Layers keep PyTorch's own start, with which so few steps reach furthest.
            model = Transformer(config, initializer=lambda model: None).to(self.lab.device)

        def build() -> dict[str, Tensor]:
            batch, steps = scale.base_batch, scale.base_steps
            for _ in self.text.train(model, scale.trained, batch, steps, 5e-3, 10 * self.seed):
                pass
            return model.state_dict()

        model.load_state_dict(self.lab.cache(f"base-{scale.trained}-{self.seed}", build))
        return model

    def outcome(self, name: str, extend: Extend) -> Outcome:
        """Extend a copy of the model, measure, train at the new length, measure."""
        scale, text = self.scale, self.text
        marks = [scale.steps * part // scale.marks for part in range(1, scale.marks + 1)]

        def build() -> dict[str, Tensor]:
            model = copy.deepcopy(self.model)
            extend(model, scale.extended, torch.Generator().manual_seed(10 * self.seed + 1))
            by_position = text.accuracies(model, scale.extended)
            short = text.accuracy(model, scale.trained)
            seed = 10 * self.seed + 2
            steps = text.train(model, scale.extended, scale.batch, scale.steps, scale.rate, seed)
            curve = [text.accuracy(model, scale.extended) for step in steps if step in marks]
            return {
                "curve": torch.tensor([by_position.mean(), *curve]),
                "by_position": by_position,
                "short": torch.tensor(short),
            }

        key = f"extended-{scale.trained}-{self.seed}"
        kept = self.lab.cache(key, build, inputs={"way": name})
        curve = dict(zip([0, *marks], kept["curve"].tolist(), strict=True))
        return Outcome(curve, kept["by_position"], kept["short"].item())

    @torch.no_grad()
    def changed_outputs(self, alpha: float) -> int:
        """Count the logits on short inputs that are not the same bits after extension."""
        changed = 0
        for factorized in (True, False):
            model = copy.deepcopy(self.model)
            hierarchical(alpha, factorized)(model, self.scale.extended, torch.Generator())
            for length in (self.scale.trained, self.scale.trained // 3):
                tokens = self.text.held_out[:64, :length].to(self.lab.device)
                before, after = (m(tokens).view(torch.int32) for m in (self.model, model))
                changed += int((before != after).sum())
        return changed


def hierarchical_name(alpha: float, factorized: bool = True) -> str:
    return f"α = {alpha:g}, {'factorised' if factorized else 'materialised'}"


def hierarchical(alpha: float, factorized: bool) -> Extend:
    return lambda model, length, _: extend_position_embeddings(
        model, length, alpha=alpha, factorized=factorized
    )


def independent_rows(make: Callable[[Tensor, int, torch.Generator], Tensor]) -> Extend:
    """Return the way that puts rows made from the trained ones into an ordinary table."""

    def extend(model: nn.Module, length: int, generator: torch.Generator) -> None:
        trained = model.get_parameter("position_embeddings.weight").detach()
        rows = make(trained.cpu(), length, generator).contiguous().to(trained.device)
        model.position_embeddings = nn.Embedding.from_pretrained(rows, freeze=False)

    return extend


def tiled(trained: Tensor, length: int, _: torch.Generator) -> Tensor:
    return hierarchical_position_embedding(trained, length, alpha=0.0)


def random_rows(std: float | None) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    def rows(trained: Tensor, length: int, generator: torch.Generator) -> Tensor:
        new = torch.randn(length - len(trained), trained.shape[1], generator=generator)
        return torch.cat([trained, new * (trained.std() if std is None else std)])

    return rows


def interpolated(trained: Tensor, length: int, _: torch.Generator) -> Tensor:
    columns = trained.T.unsqueeze(0)
    return nn.functional.interpolate(columns, length, mode="linear", align_corners=True)[0].T


BASELINES = {
    TILED: independent_rows(tiled),
    RANDOM: independent_rows(random_rows(None)),
    SMALL_RANDOM: independent_rows(random_rows(0.02)),
    INTERPOLATED: independent_rows(interpolated),
}


def in_standard_errors(ours: list[Outcome], theirs: list[Outcome]) -> float:
    """Return the mean difference over seeds after training, in its standard errors."""
    differences = [a.end - b.end for a, b in zip(ours, theirs, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    return mean(differences) / error if error > 0 else math.copysign(math.inf, mean(differences))


def show(
    lab: Lab, scale: Scale, reached: list[float], outcomes: Mapping[str, list[Outcome]]
) -> None:
    n = scale.trained
    rows = []
    for name, many in outcomes.items():
        by_position = torch.stack([one.by_position for one in many]).mean(0)
        rows.append({
            "table": name,
            "at once": mean(one.start for one in many),
            "first block": by_position[:n].mean(),
            "later blocks": by_position[n:].mean(),
            f"{scale.steps} steps": mean(one.end for one in many),
            "std": stdev(one.end for one in many),
            f"at ${n}$": mean(one.short for one in many),
        })  # fmt: skip
    lab.table(
        f"From {scale.name} positions",
        rows,
        f"Accuracy on masked characters, means of {SEEDS} seeds: on windows of {scale.extended} "
        "right after the extension, altogether and in blocks, and after training on such windows, "
        f"with the standard deviation over seeds. Last: on windows of {n} right after the "
        f"extension; before, it was {mean(reached):.4f}.",
    )
    hidden = ("materialised", SMALL_RANDOM)
    drawn = {k.split(", f")[0]: v for k, v in outcomes.items() if not k.endswith(hidden)}
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name, many in drawn.items():
        heights = {step: mean(one.curve[step] for one in many) for step in many[0].curve}
        style = "--" if name in scale.baselines else "-"
        axes.plot(list(heights), list(heights.values()), style, label=name)
    axes.axhline(mean(reached), color="black", linestyle=":")
    axes.set(xlabel=f"steps of training at length {scale.extended}", ylabel="accuracy")
    axes.legend(ncols=2)
    caption = f"Accuracy on held-out windows of {scale.extended} during training there. Dotted: "
    lab.figure(f"recovery-{n}", figure, f"{caption}before the extension, on windows of {n}.")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    centres = torch.arange(scale.extended).double().unfold(0, n // 4, n // 4).mean(1)
    for name in [name for name in drawn if name == "α = 0.4" or name in scale.baselines]:
        by_position = torch.stack([one.by_position for one in drawn[name]]).mean(0)
        axes.plot(centres, by_position.unfold(0, n // 4, n // 4).mean(1), marker="o", label=name)
    for border in range(n, scale.extended, n):
        axes.axvline(border - 0.5, color="black", linestyle=":")
    axes.set(xlabel="position", ylabel="accuracy right after the extension")
    axes.legend(ncols=2)
    caption = "Accuracy by position right after the extension, averaged over neighbours."
    lab.figure(f"positions-{n}", figure, f"{caption} Dotted: borders of blocks.")


def checkpoint_experiment(lab: Lab, folder: Path) -> None:
    """Repeat the article's experiment on the checkpoint in ``folder``."""
    text, model, trained = checkpoint(lab, folder)
    longest = text.held_out.shape[1]
    steps = lab.pick(smoke=2, quick=10, full=3000)
    before = text.accuracies(model, longest // 3, batch=4).mean()
    rows = []
    for alpha in (0.4, 0.0):
        longer = copy.deepcopy(model)
        extend_position_embeddings(longer, 3 * trained, alpha=alpha)
        at_once = text.accuracies(longer, longest, batch=4).mean()
        for _ in text.train(longer.train(), longest, 4, steps, 3e-5, lab.seed):
            pass
        rows.append({
            r"$\alpha$": alpha,
            f"{trained} tokens, before": before,
            f"{3 * trained} tokens, at once": at_once,
            f"after {steps} steps": text.accuracies(longer.eval(), longest, batch=4).mean(),
        })  # fmt: skip
    lab.table(
        "Your checkpoint",
        rows,
        "Accuracy on masked tokens of held-out text. The article has 55 % at 512 tokens, 38 % at "
        "1536 at once, and 55 % again after 3000 steps.",
    )


def checkpoint(lab: Lab, folder: Path) -> tuple[MaskedText, nn.Module, int]:
    """Read text and model from a folder; also return how many positions were trained."""
    try:
        from transformers import AutoModelForMaskedLM, AutoTokenizer
    except ImportError:
        raise NotRun("a checkpoint needs transformers: pip install 'kexue[transformers]'") from None
    try:
        words = (folder / CHECKPOINT_TEXT).read_text("utf-8")
        # From this folder only, and from the format of weights that runs no code.
        local = {"local_files_only": True}
        model = AutoModelForMaskedLM.from_pretrained(folder, use_safetensors=True, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} must hold a checkpoint for masked words (config.json, model.safetensors, "
            f"tokenizer files) and a text in {CHECKPOINT_TEXT}: {error}"
        ) from None
    named = dict(model.named_modules()).items()
    tables = [m for name, m in named if name.endswith("position_embeddings")]
    cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    if not tables or None in (cls, sep, mask):
        raise DataError(f"{folder} must have position_embeddings and tokens for cls, sep and mask")
    padding_idx = tables[0].padding_idx
    trained = tables[0].num_embeddings - (0 if padding_idx is None else padding_idx + 1)

    def ask(model: nn.Module, tokens: Tensor) -> Tensor:
        framed = nn.functional.pad(tokens, (1, 0), value=cls)
        framed = nn.functional.pad(framed, (0, 1), value=sep)
        return model(input_ids=framed).logits[:, 1:-1]

    tokens = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])
    # Three windows that fill the trained positions are as long as one that fills the new ones.
    length = 3 * (trained - 2)
    border = len(tokens) * 9 // 10
    if len(tokens) - border < length:
        raise DataError(f"{folder / CHECKPOINT_TEXT} must have at least {10 * length} tokens")
    held_out = tokens[border:].unfold(0, length, length)[: lab.pick(smoke=2, quick=10, full=100)]
    text = MaskedText(lab, tokens[:border], held_out, mask, ask)
    return text, model.to(lab.device).eval(), trained
