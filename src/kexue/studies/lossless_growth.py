r"""Growing a Transformer without loss.

A large language model spends the first part of its training on what a small one learns for a
fraction of the cost. So train the small one, enlarge it by a fixed map of its weights, and go on.
For this to be worth anything the large model must start where the small one stopped: not near it,
but with the same output for every input. Is there such a map for a Transformer, and is what it
gives any good?

## Writers and readers

Let every activation $x$ of $n$ units become $\tilde x = E x$ of $N$ units, where $E$ copies
units, $\tilde x_j = s\,x_{\mathrm{src}(j)}$, or leaves them empty. There is a left inverse that
shares the weight of a unit equally among its $m$ copies: $R E = I$. A matrix that writes into the
space takes $E$ on its output, one that reads takes $R$ on its input:

$$\tilde W = E_{\text{out}} W R_{\text{in}},\quad \tilde b = E_{\text{out}}\, b
\quad\Longrightarrow\quad \tilde W \tilde x + \tilde b = E_{\text{out}}(W x + b).$$

An activation function acts on each unit alone, so it commutes with pure copies ($s = 1$), and so do
products of two branches. A norm commutes with copies if all units have the same number. For linear
layers any scale will do, but not in front of a GELU.

The article takes $s = 1/\sqrt k$ for $N = kn$, which makes $E$ orthogonal: the feed-forward becomes
$W_1/\sqrt k$ and $W_2/(k\sqrt k)$, with biases $b_1$ and $b_2/\sqrt k$. (Its table has $b_2/2$ for
$k = 2$, a misprint.) Inside a head of $k d$ units there are $k$ times as many products, divided by
$\sqrt{kd}$ instead of $\sqrt d$; query and key take a factor $k^{1/4}$ each.

## Two details

**Epsilon.** A norm divides by $\sqrt{\sigma^2 + \varepsilon}$. With $s = 1/\sqrt k$ the variance
shrinks by $k$, and $\varepsilon$ does not: the map is exact only if the configuration's
$\varepsilon$ becomes $\varepsilon/k$. Where one model normalises both kinds of units, as BERT does
in front of its output layer, no single $\varepsilon$ will do. With $s = 1$ nothing changes; then
the last norm is divided by $k$ if the output layer is the embedding, whose rows now count $k$
times. That is the default of `grow_transformer`.

**Rotations.** Repeating units inside a head puts old planes at other frequencies, and the article
concludes that models with rotary positions can be grown only approximately. There are two ways out.
Repeat whole heads: then no head changes. Or move planes instead of repeating them. Plane $i$ of a
head of $d$ units turns at $\theta^{-2i/d}$, and in a head of $kd$ units

$$\theta^{-2(ki)/(kd)} = \theta^{-2i/d}:$$

plane $i$ goes to $ki$, the planes between stay empty. Their keys must be zero for now; their
queries may be anything.

Depth is free where a branch may be zero: insert layers whose branches end in zeros, and
$x + 0 = x$. Behind a post-norm it is impossible, since $\mathrm{LN}(x + 0)$ is not $x$.

## Copies stay copies

Equal units receive equal gradients. They remain equal for ever, and the large model cannot leave
the functions of the small one: all its matrices keep their rank. But the reader was only one choice
among many. For any $Z$,

$$(\tilde W + Z)\,E x = \tilde W E x \quad\text{if}\quad Z E = 0,$$

and such a $Z$ is any noise minus its mean over the copies of each unit. It changes nothing in the
function and everything in the gradients.

## What decides it

*Exactness.* Models with random biases and gains, and with $\varepsilon = 10^{-2}$, because with
fresh ones most mistakes would leave no trace: largest difference of logits in float32. Control: the
article's repetition inside rotated heads, which must fail.

*Use.* A small decoder learns characters of prose, is grown to twice its width, and trains on, with
noise 0, 0.1 and 0.5. It must beat a large one from scratch that was given the whole compute, the
small model's included. And the rank of the first feed-forward matrix must show that without noise
the new units are idle.

Two cautions. Noise makes the rank grow, yet over so short a training the loss hardly notices: the
difference between the grown models is a thousandth of a nat. And growth saves only what a large
model spends to come as far as the small one. As long as the small model still improves, it is
growing too early: a small model that simply goes on with the same compute is far ahead of all the
large ones here. The page reports both, and the verdict does not rest on them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import Lab
from kexue.models import Transformer, TransformerConfig
from kexue.nn.growth import Expansion, expand_linear, grow_transformer
from kexue.nn.residual import Residual
from kexue.nn.rotary import RotaryEmbedding

Config = dict[str, Any]
Curve = list[tuple[float, float]]

CONTEXT = 64
WIDTH, LARGE = 48, 96
NOISES = (0.0, 0.1, 0.5)
SMALL_STEP = 0.28
"""Compute of a step of the small model, in steps of the large one."""
EPSILON = 1e-2
FIELDS = tuple(TransformerConfig.__dataclass_fields__)
CONTROL = "article's repetition inside heads"


def run(lab: Lab) -> None:
    differences = exactness(lab)
    control = differences.pop(("rotary decoder", CONTROL))
    worst = training(lab, max(differences.values()))
    judge = lab.claim if lab.data.path is None else lab.observe
    judge("largest difference of logits at growth, in float32", worst, "<=", 1e-4)
    lab.claim("difference where units are repeated inside rotated heads", control, ">", 1e-2)


def exactness(lab: Lab) -> dict[tuple[str, str], float]:
    """Differences of logits, by family and by what was grown."""
    families: Mapping[str, Config] = {
        "decoder": settings(),
        "rotary decoder": settings(norm="RMSNorm", rotary="half", tie_embeddings=False),
        "post-norm encoder": settings(norm_style="post", causal=False, tie_embeddings=False),
    }
    growths: Mapping[str, Config] = {
        "heads": {"hidden_size": 96},
        "size of heads": {"hidden_size": 96, "attention": "head_dim"},
        "heads, orthogonal": {"hidden_size": 96, "scaling": "orthogonal"},
        "feed-forward": {"intermediate_size": 200},
        "depth": {"num_layers": 5},
        "all of these": {"hidden_size": 96, "intermediate_size": 450, "num_layers": 3},
    }
    found: dict[tuple[str, str], float] = {}
    for family, config in families.items():
        small = random_model(config, lab.seed)
        for growth, options in growths.items():
            if config["norm_style"] == "post" and "num_layers" in options:
                continue
            if config["rotary"] is not None and options.get("attention") == "head_dim":
                found |= {
                    (family, "size of heads"): difference(
                        small, larger_rotated_heads(small, config)
                    ),
                    (family, CONTROL): difference(small, repeated_inside_heads(small, config)),
                }
                continue
            grown = grow_transformer(
                small.state_dict(), config, noise=0.5, generator=lab.generator(), **options
            )
            found[family, growth] = difference(small, load(grown.config, grown.state_dict))
    lab.table(
        "Largest difference of logits",
        [
            {"model": family, "grown": growth, "difference": value}
            for (family, growth), value in found.items()
        ],
        "Random models of width 48 in float32, weights grown with noise 0.5 (the rotated heads "
        "without). Logits are of order ten, and float32 keeps seven digits.",
    )
    lab.figure(
        "exactness",
        difference_figure(found),
        "Largest difference of logits between the small and the grown model. Only repetition "
        "inside rotated heads changes the function.",
    )
    return found


def settings(**changes: Any) -> Config:
    sizes = TransformerConfig(
        vocab_size=32, dim=WIDTH, num_layers=2, num_heads=3, max_length=CONTEXT
    )
    parts = {"norm": "LayerNorm", "norm_eps": EPSILON, "norm_style": "pre", "rotary": None}
    return {"model_type": "kexue", **asdict(sizes), **parts, **changes}


def build(config: Config) -> Transformer:
    norm = partial(
        nn.RMSNorm if config["norm"] == "RMSNorm" else nn.LayerNorm, eps=config["norm_eps"]
    )
    head_dim = config["key_dim"] or config["dim"] // config["num_heads"]
    return Transformer(
        TransformerConfig(**{name: config[name] for name in FIELDS}),
        position=config["rotary"] and RotaryEmbedding(head_dim, layout=config["rotary"]),
        residual=partial(Residual, style=config["norm_style"], norm=norm),
        norm=norm,
    )


def load(config: Config, state: Mapping[str, Tensor]) -> Transformer:
    """The grown model; a rotation computes the frequencies of its own size."""
    model = build(config)
    own = {name: value for name, value in model.state_dict().items() if "frequencies" in name}
    model.load_state_dict({**own, **{n: v for n, v in state.items() if "frequencies" not in n}})
    return model.eval()


def random_model(config: Config, seed: int) -> Transformer:
    model, generator = build(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def repeated_inside_heads(small: Transformer, config: Config) -> Transformer:
    """Grow a rotary model as if it had no rotation: each unit of a head is repeated."""
    state = {name: value for name, value in small.state_dict().items() if "frequencies" not in name}
    grown = grow_transformer(
        state, {**config, "rotary": None}, hidden_size=LARGE, attention="head_dim"
    )
    return load({**grown.config, "rotary": config["rotary"]}, grown.state_dict)


def larger_rotated_heads(small: Transformer, config: Config) -> Transformer:
    """The same, but queries and keys move plane i to 2 i."""
    large = repeated_inside_heads(small, config)
    stream = Expansion.repeat(WIDTH, 2)
    heads = Expansion.rotary(config["num_heads"], WIDTH // config["num_heads"], 2)
    with torch.no_grad():
        for old, new in zip(small.layers, large.layers, strict=True):
            for name in ("query_projection", "key_projection"):
                before = getattr(old.attention.sublayer, name)
                after = getattr(new.attention.sublayer, name)
                grown = expand_linear(before.weight, before.bias, inputs=stream, outputs=heads)
                after.weight.copy_(grown.weight)
                after.bias.copy_(grown.bias)
    return large


@torch.no_grad()
def difference(small: Transformer, large: Transformer, tokens: Tensor | None = None) -> float:
    if tokens is None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(small.config.vocab_size, (8, CONTEXT), generator=generator)
    return (large(tokens) - small(tokens)).abs().max().item()


def training(lab: Lab, worst: float) -> float:
    """Train, grow, train on; return the largest difference of logits that was seen."""
    seeds = lab.pick(smoke=1, quick=1, full=3)
    first = lab.pick(smoke=4, quick=125, full=250)
    then = lab.pick(smoke=2, quick=60, full=120)
    characters = lab.data.Characters(lab.data.text())
    held_out = len(characters.tokens) // 10
    learn, test = characters.tokens[:-held_out], characters.tokens[-held_out:]
    base = settings(vocab_size=len(characters), norm_eps=1e-5)
    names = [f"grown, noise {noise:g}" for noise in NOISES]
    scratch, late, continued = "from scratch", "from scratch, equal compute", "small, continued"
    losses: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    spectra: dict[str, np.ndarray] = {}
    ranks: dict[str, list[int]] = {name: [] for name in names}
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "training"):
        torch.manual_seed(seed)
        arm = partial(train, learn=learn, test=test, seed=seed, every=max(1, then // 6))
        small = build(base)
        history = {"small": arm(small, first, cost=SMALL_STEP)}
        start = history["small"][-1][0]
        for name, noise in zip(names, NOISES, strict=True):
            generator = torch.Generator().manual_seed(seed)
            grown = grow_transformer(
                small.state_dict(), base, hidden_size=LARGE, noise=noise, generator=generator
            )
            large = load(grown.config, grown.state_dict)
            window = test[: 8 * CONTEXT].reshape(8, CONTEXT)
            worst = max(worst, difference(small, large, window))
            history[name] = arm(large, then, start=start)
            weight = large.layers[0].feedforward.sublayer.fc1.weight.detach()
            spectra[name] = torch.linalg.svdvals(weight).numpy()
            ranks[name].append(int((spectra[name] > 1e-3 * spectra[name][0]).sum()))
        new = build({**base, "dim": LARGE, "num_heads": 6, "feedforward_dim": 4 * LARGE})
        history[late] = arm(new, then + round(start))
        history[scratch] = [point for point in history[late] if point[0] <= then]
        history[continued] = arm(small, round(then / SMALL_STEP), cost=SMALL_STEP, start=start)
        for name, curve in history.items():
            losses.setdefault(name, []).append(curve[-1][1])
        curves = history
    mean = {name: float(np.mean(values)) for name, values in losses.items()}
    lab.table(
        "Training",
        [
            {
                "model": name,
                "compute": round(curves[name][-1][0]),
                "loss": loss,
                "rank": float(np.mean(ranks[name])) if name in ranks else None,
            }
            for name, loss in mean.items()
        ],
        "Compute in steps of the large model, the small one's share included; held-out loss in "
        f"nats per character at the end, mean over {seeds} seed(s); rank of the first feed-forward "
        f"matrix, which has {LARGE} inputs: singular values above a thousandth of the largest.",
    )
    shown = {name: curve for name, curve in curves.items() if name != scratch}
    lab.figure(
        "training",
        curve_figure(shown),
        "Held-out loss against compute. A grown model starts at the small one's loss.",
    )
    lab.figure(
        "spectra",
        spectrum_figure(spectra),
        "Singular values of the first feed-forward matrix after training. Without noise there are "
        f"only {WIDTH}, those of the small model.",
    )
    judge = lab.claim if lab.data.path is None else lab.observe
    noisy = names[1]
    judge("loss saved by growth at equal compute", mean[late] - mean[noisy], ">", 0.0)
    judge("largest rank without noise", max(ranks[names[0]]), "<=", WIDTH)
    judge("smallest rank with noise 0.1", min(ranks[noisy]), ">", 1.5 * WIDTH)
    lab.observe("loss saved by noise 0.1", mean[names[0]] - mean[noisy], ">", 0.0)
    lab.observe(
        "loss saved against the small model at equal compute",
        mean[continued] - mean[noisy],
        ">",
        0.0,
    )
    return worst


def train(
    model: nn.Module, steps: int, *, learn: Tensor, test: Tensor, seed: int, every: int,
    cost: float = 1.0, start: float = 0.0,
) -> Curve:  # fmt: skip
    """Train with Adam and return held-out losses by compute, from the start to the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    curve = [(start, held_out_loss(model, test))]
    for step in range(1, steps + 1):
        at = torch.randint(len(learn) - CONTEXT, (16, 1), generator=generator)
        loss = next_character_loss(model, learn[at + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((start + cost * step, held_out_loss(model, test)))
    return curve


@torch.no_grad()
def held_out_loss(model: nn.Module, test: Tensor) -> float:
    at = torch.linspace(0, len(test) - CONTEXT - 1, 64).long()[:, None]
    return next_character_loss(model, test[at + torch.arange(CONTEXT + 1)]).item()


def next_character_loss(model: nn.Module, window: Tensor) -> Tensor:
    logits = model(window[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def difference_figure(found: Mapping[tuple[str, str], float]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
    labels = [f"{family}: {growth}" for family, growth in found]
    # What is exactly 0 has no logarithm; it is drawn at the left edge.
    values = np.maximum(list(found.values()), 1e-9)
    ax.barh(labels, values)
    ax.axvline(1e-4, linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlim(1e-9, 1e2)
    ax.invert_yaxis()
    ax.set_xlabel("largest difference of logits")
    return figure


def curve_figure(curves: Mapping[str, Curve]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name, curve in curves.items():
        ax.plot(*zip(*curve, strict=True), label=name)
    ax.set_xlabel("compute, in steps of the large model")
    ax.set_ylabel("held-out loss in nats")
    ends = [curve[-1][1] for curve in curves.values()]
    ax.set_ylim(min(ends) - 0.1, max(ends) + 1.0)
    ax.legend()
    return figure


def spectrum_figure(spectra: Mapping[str, np.ndarray]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, values in spectra.items():
        ax.semilogy(range(1, len(values) + 1), values / values[0], label=name)
    ax.set_xlabel("number")
    ax.set_ylabel("singular value, the largest being 1")
    ax.set_ylim(1e-8, 2)
    ax.legend()
    return figure
