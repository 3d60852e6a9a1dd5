r"""Stronger multi-head attention.

Attention is divided among heads, and with it the width of the model: with $d = 512$ and 8 heads,
each head has 64 numbers for a query and 64 for a key. More heads, smaller keys. At some point the
heads are many and every one of them is nearly blind. How small is too small, and does it help to
give the keys a size of their own, or to let the heads talk?

## Counting

A head turns $n$ queries and $m$ keys into a matrix of probabilities,

$$P = \operatorname{softmax}\big(QK^\top\big), \qquad
Q \in \mathbb R^{n \times r},\; K \in \mathbb R^{m \times r},$$

each row over the keys, the factor $r^{-1/2}$ taken into $Q$. On the right there are $(n + m)\,r$
numbers, on the left about $nm$. For $n = m = 512$ and $r = 64$ that is one quarter. Something must
be out of reach, and we can say exactly what.

Take any $P$ with positive entries, let $L = \log P$ entry by entry, and centre its rows,
$L_c = L\,(I - \mathbf 1 \mathbf 1^\top/m)$. A softmax does not notice a constant that is added to
a row of its logits. So if $P = \operatorname{softmax}(QK^\top)$, then
$L = QK^\top - c\,\mathbf 1^\top$ for some column $c$, and centring removes $c$:

$$L_c = Q\,K^\top\Big(I - \frac{\mathbf 1 \mathbf 1^\top}{m}\Big)
\quad\Longrightarrow\quad \operatorname{rank} L_c \le r.$$

Conversely, factor an $L_c$ of rank $r$ as $QK^\top$, and its softmax is $P$. The key size that a
head needs for $P$ is therefore $\operatorname{rank} L_c$, no less and no more, and at most
$\min(n, m-1)$. This is a statement about exact equality. A permutation can be approached by
keys on a circle, $r = 2$, with growing length; what a small key size forbids is detail.

## Two remedies

**A key size of its own.** Queries and keys must share their size, because they meet in an inner
product. Nothing ties it to $d/h$; only the values make the width of the output. So enlarge $r$
and leave $d$ alone. The projections of queries and keys grow, and nothing else does.

**Talking heads.** Mix the logits of the heads before the softmax, and their weights after it:

$$J_i = \sum_g A_{ig}\, Q_g K_g^\top, \qquad W_i = \operatorname{softmax}(J_i), \qquad
U_v = \sum_i B_{vi} W_i.$$

The first mixing is a larger key size in disguise, for with $h$ heads

$$J_i = \big[A_{i1} Q_1, \dots, A_{ih} Q_h\big]\,\big[K_1, \dots, K_h\big]^\top$$

has rank up to $hr$; the keys are shared by all heads, and $A$ has only $h^2$ numbers. The second
mixing is another thing. Adding logits multiplies distributions; $B$ adds them. The logarithm of a
sum of softmaxes has no bound on its rank at all. So the two attack the same limit from two sides.

## What is measured

Real distributions rather than random matrices. In English prose of 64 symbols, how is the
character at distance $\ell$ after a given one distributed? Each $\ell = 1, \dots, 8$ gives a
64×64 matrix of conditional probabilities $P_\ell$, smoothed by adding 0.1 to the counts. Eight
heads, each with free queries and keys for the 64 symbols, have to reproduce the eight matrices:
as they are, with $A$, and with both $A$ and $B$, where the rows of $B$ pass through a softmax so
that what comes out are distributions. All are trained alike, by Adam at 0.05 with a cosine to
zero; what remains is the divergence $\mathrm{KL}(P_\ell \,\|\, \text{head})$ in nats, averaged
with the frequencies of the characters.

The claim holds if the error falls strictly with the key size up to 32, if $r = 32$ leaves at
most a quarter of the error of $r = 4$ (4 is $d/h$ for a $d$ of 32), and if each of the mixings
leaves at most 0.85 of the error without, at every measured $r \le 4$; in every seed. Where the
help of mixing ends is reported beside it. The full budget also trains small language models of
characters, where the parameters that a larger key size costs are taken from the feed-forward
layer. No threshold stands on these: it is a comparison of three losses, with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

from kexue.lab import Lab, seeded
from kexue.lab.data import Characters
from kexue.nn.attention import (
    TalkingHeadsAttention,
    factor_attention_weights,
    minimum_key_dim,
)

SYMBOLS, HEADS, SMOOTHING = 64, 8, 0.1
STANDARD, LOGITS, BOTH = "standard", "logits mixed", "logits and weights mixed"
VARIANTS = (STANDARD, LOGITS, BOTH)
DIM = 64
"""Width of the language models."""
BASE_WIDTH = 512
"""Their feed-forward, wide enough that sixteen heads can take 28 numbers a key from it."""

Errors = dict[tuple[str, int], list[float]]
"""Mean divergence in nats of each seed, by variant and key size."""


def run(lab: Lab) -> None:
    characters = Characters(lab.data.text().lower(), size=SYMBOLS)
    targets, frequencies = conditional_distributions(characters)
    few, all_sizes = (1, 4, 32), (1, 2, 4, 8, 16, 32, 63)
    key_dims = lab.pick(smoke=few, quick=few, full=all_sizes)
    errors = reproduce(lab, targets, frequencies, key_dims)

    report(lab, errors, targets, frequencies)
    judge(lab, errors)
    if lab.budget == "full":
        language_models(lab, characters)


def conditional_distributions(characters: Characters) -> tuple[Tensor, Tensor]:
    """Return P_l(next | character) for the lags 1 to 8, and how frequent the characters are."""
    tokens, size = characters.tokens, len(characters)
    counts = torch.stack(
        [
            torch.bincount(size * tokens[:-lag] + tokens[lag:], minlength=size**2)
            for lag in range(1, HEADS + 1)
        ]
    ).reshape(HEADS, size, size)
    smoothed = counts.double() + SMOOTHING
    frequencies = torch.bincount(tokens, minlength=size).double() / len(tokens)
    return smoothed / smoothed.sum(-1, keepdim=True), frequencies


def divergence(targets: Tensor, predicted: Tensor, frequencies: Tensor) -> Tensor:
    """Return the mean divergence of the heads from their targets, in nats."""
    rows = (targets * (targets.log() - predicted.clamp_min(1e-30).log())).sum(-1)
    return (rows @ frequencies).mean()


def reproduce(lab: Lab, targets: Tensor, frequencies: Tensor, key_dims: Sequence[int]) -> Errors:
    """Train eight heads of every variant and key size to be the eight distributions."""
    seeds = lab.pick(smoke=1, quick=1, full=3)
    runs = [(v, r, s) for r in key_dims for v in VARIANTS for s in range(seeds)]
    errors: Errors = {}
    progress = lab.progress(runs, "heads")
    for variant, key_dim, seed in progress:
        generator = torch.Generator().manual_seed(1000 * lab.seed + seed)
        error = train_heads(
            variant, key_dim, targets.float(), frequencies.float(), generator,
            steps=lab.pick(smoke=5, quick=200, full=400),
        )  # fmt: skip
        errors.setdefault((variant, key_dim), []).append(error)
        progress.metric(nats=error)
    return errors


def train_heads(
    variant: str, key_dim: int, targets: Tensor, frequencies: Tensor,
    generator: torch.Generator, *, steps: int,
) -> float:  # fmt: skip
    heads, symbols, _ = targets.shape
    core = TalkingHeadsAttention(heads)
    query, key = (
        nn.Parameter(torch.randn(1, heads, symbols, key_dim, generator=generator)) for _ in range(2)
    )
    # With values that are unit vectors, what a head gathers is its distribution.
    value = torch.eye(symbols).expand(1, heads, symbols, symbols)
    logits_mixing = torch.eye(heads).requires_grad_(variant != STANDARD)
    # A softmax of these rows is nearly the identity.
    scores = (math.log(100) * torch.eye(heads)).requires_grad_(variant == BOTH)
    trained = [p for p in (query, key, logits_mixing, scores) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def predicted() -> Tensor:
        mixings = {
            "logits_mixing": logits_mixing,
            "weights_mixing": scores.softmax(-1) if variant == BOTH else torch.eye(heads),
        }
        return functional_call(core, mixings, (query, key, value)).output[0]

    for _ in range(steps):
        optimizer.zero_grad()
        divergence(targets, predicted(), frequencies).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(divergence(targets.double(), predicted().double(), frequencies.double()))


def report(lab: Lab, errors: Errors, targets: Tensor, frequencies: Tensor) -> None:
    """Put the divergences, their ratios and the singular values on the page."""
    key_dims = sorted({key_dim for _, key_dim in errors})
    mean = {case: sum(values) / len(values) for case, values in errors.items()}
    cut = {r: cut_divergence(targets, frequencies, r) for r in key_dims}
    least = minimum_key_dim(targets).tolist()
    lab.table(
        "Divergence from the distributions of characters",
        [
            {
                "$r$": r,
                STANDARD: mean[STANDARD, r],
                "with $A$": mean[LOGITS, r],
                "with $A$, $B$": mean[BOTH, r],
                "$A$ / standard": mean[LOGITS, r] / mean[STANDARD, r],
                "$A$, $B$ / standard": mean[BOTH, r] / mean[STANDARD, r],
            }
            for r in key_dims
        ],
        "Mean KL divergence in nats of eight trained heads from eight distributions of the next "
        f"characters; {lab.pick(smoke='one seed', quick='one seed', full='mean of three seeds')}. "
        "A ratio above 1 says that the mixing hurts.",
    )
    lab.figure(
        "key-size",
        key_size_figure(errors, cut, targets[0]),
        "Above: what is left of the divergence at each key size $r$. Mixing helps where keys are "
        "small, and is harder to train where they are large. The dotted line needs no training: "
        r"it cuts the singular values of $L_c$ after the first $r$, which serves $L_c$ but not "
        "the divergence. Below: these singular values for the characters that follow at once; a "
        f"key size $r$ takes $r$ of them. {least[0]} are not zero: no smaller key size is exact.",
    )
    lab.observe(
        "smallest key size at which any of the eight matrices is exact",
        min(least),
        "==",
        targets.shape[-1] - 1,
    )
    flips = [r for r in key_dims if mean[LOGITS, r] >= mean[STANDARD, r]]
    lab.observe(
        "smallest measured key size at which mixing logits does not help",
        min(flips, default=math.inf),
        ">",
        4,
    )


def judge(lab: Lab, errors: Errors) -> None:
    """Claim what the text above says, over all seeds; a user's own text is only reported on."""
    claim = lab.claim if lab.data.path is None else lab.observe
    sizes = sorted({r for _, r in errors if r <= 32})
    standard = {r: errors[STANDARD, r] for r in sizes}
    steps = [
        after / before
        for small, large in pairwise(sizes)
        for before, after in zip(standard[small], standard[large], strict=True)
    ]
    claim("largest ratio of the error at a key size to that at the one before", max(steps), "<", 1)
    fall = [large / small for small, large in zip(standard[4], standard[32], strict=True)]
    claim("error at $r = 32$ over that at $r = 4$, largest", max(fall), "<=", 0.25)
    for variant in (LOGITS, BOTH):
        left = [
            mixed / plain
            for r in sizes
            if r <= 4
            for mixed, plain in zip(errors[variant, r], standard[r], strict=True)
        ]
        claim(rf"{variant}: largest error over standard up to $r = 4$", max(left), "<=", 0.85)


def cut_divergence(targets: Tensor, frequencies: Tensor, key_dim: int) -> float:
    """Return the divergence of the factors that a singular value decomposition gives."""
    query, key = factor_attention_weights(targets, key_dim)
    return float(divergence(targets, torch.softmax(query @ key.mT, -1), frequencies))


def key_size_figure(errors: Errors, cut: dict[int, float], target: Tensor) -> Figure:
    key_dims = sorted(cut)
    figure = Figure(figsize=(6.4, 7.0), layout="constrained")
    above, below = figure.subplots(2)
    for variant, marker in zip(VARIANTS, "os^", strict=True):
        seeds = torch.tensor([errors[variant, r] for r in key_dims])
        above.loglog(key_dims, seeds.mean(1), marker=marker, label=variant)
    # At the full rank the cut is exact, which a logarithmic axis cannot show.
    inexact = [r for r in key_dims if cut[r] > 1e-6]
    above.loglog(inexact, [cut[r] for r in inexact], ":", color="black", label="cut, untrained")
    above.set_xticks([], minor=True)
    above.set_xticks(key_dims, [str(r) for r in key_dims])
    above.set(xlabel="key size $r$", ylabel="divergence, nats")
    above.legend()

    log_weights = target.log()
    centred = log_weights - log_weights.mean(-1, keepdim=True)
    values = torch.linalg.svdvals(centred)[:-1]
    below.semilogy(range(1, len(values) + 1), values, ".")
    for r in key_dims:
        if 4 <= r < len(values):
            below.axvline(r + 0.5, color="black", linewidth=0.8, linestyle=":")
            below.annotate(
                f"$r={r}$", (r + 0.8, float(values[0])), rotation=90, va="top", fontsize="small"
            )
    below.set(xlabel="index", ylabel="singular value of $L_c$")
    return figure


def language_models(lab: Lab, characters: Characters) -> None:
    """Train small models of characters with equal numbers of parameters."""
    seeds, steps = 3, 1000
    narrow = BASE_WIDTH - round(2 * (DIM + 1) * 16 * (32 - 4) / (2 * DIM + 1))
    models: dict[str, dict[str, Any]] = {
        "key size 4": {"key_dim": 4, "feedforward_dim": BASE_WIDTH},
        "key size 32": {"key_dim": 32, "feedforward_dim": narrow},
        "key size 4, talking heads": {"key_dim": 4, "feedforward_dim": BASE_WIDTH, "talk": True},
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    parameters: dict[str, int] = {}
    runs = [(name, seed) for seed in range(seeds) for name in models]
    progress = lab.progress(runs, "language models")
    for name, seed in progress:
        trained = lab.cache(
            f"language-model-{name.replace(' ', '-').replace(',', '')}-{seed}",
            lambda name=name, seed=seed: train_language_model(
                characters, seed=1000 * lab.seed + seed, steps=steps, **models[name]
            ),
            inputs={"steps": steps, **models[name]},
        )
        losses[name].append(float(trained["loss"]))
        parameters[name] = int(trained["parameters"])
        progress.metric(nats=losses[name][-1])

    base = next(iter(models))
    rows = []
    for name, sizes in models.items():
        differences = [a - b for a, b in zip(losses[name], losses[base], strict=True)]
        mean = sum(differences) / seeds
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (seeds - 1) / seeds)
        reading = None
        if name != base:
            # 4.30 standard errors are 95 % of Student's law with two degrees of freedom.
            reading = (
                "inconclusive" if abs(mean) < 4.30 * error else "better" if mean < 0 else "worse"
            )
            lab.observe(f"{name}: difference of the loss to {base}, nats", mean, "<", 0)
        rows.append(
            {
                "model": name,
                "feed-forward": sizes["feedforward_dim"],
                "parameters": parameters[name],
                "loss": sum(losses[name]) / seeds,
                "difference": mean if name != base else None,
                "standard error": error if name != base else None,
                "reading": reading,
            }
        )
    lab.table(
        "Language models of characters",
        rows,
        f"Two layers, width {DIM}, 16 heads, 64 characters of context, {steps} steps; loss in "
        f"nats a character on the last tenth of the text, mean over {seeds} seeds. Differences are "
        "paired by seed; inconclusive is what a t-test at 5 % does not tell from 0.",
    )


def train_language_model(
    characters: Characters, *, seed: int, steps: int, key_dim: int, feedforward_dim: int,
    talk: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Train one model; return its loss on held-out text, and how many parameters it has."""
    from kexue.models.transformer import Transformer, TransformerConfig

    context, batch = 64, 8
    train, held_out = characters.tokens.tensor_split([9 * len(characters.tokens) // 10])
    config = TransformerConfig(
        len(characters), dim=DIM, num_layers=2, num_heads=16, key_dim=key_dim,
        feedforward_dim=feedforward_dim, max_length=context,
    )  # fmt: skip
    with seeded(seed):
        model = Transformer(config, attention_core=_talking if talk else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    windows = characters.batches(
        context + 1, batch, torch.Generator().manual_seed(seed), tokens=train
    )

    def loss_of(window: Tensor) -> Tensor:
        logits = model(window[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    for _, window in zip(range(steps), windows, strict=False):
        optimizer.zero_grad()
        loss_of(window).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        parts = held_out.unfold(0, context + 1, context).split(64)
        loss = sum(loss_of(part) * len(part) for part in parts) / sum(map(len, parts))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"loss": torch.as_tensor(loss), "parameters": torch.tensor(parameters)}


def _talking(config: Any) -> nn.Module:
    return TalkingHeadsAttention(config.num_heads)
