r"""Initialisation, parametrisation and normalisation of Transformers.

A Transformer that does not converge is usually one forgotten constant: a division by $\sqrt d$, a
truncated normal whose variance shrank, a stack of residuals whose early layers are damped to
nothing. Each of them can be computed on paper. What do they cost in training?

## Second moments

Let $y_j = b_j + \sum_i x_i w_{ij}$ with independent weights of mean zero. Cross terms vanish, so

$$E[y_j^2] = m \, E[x^2] \, E[w^2]$$

with $m$ inputs, whatever the mean of $x$. A variance of $1/m$ keeps the signal (LeCun); after a
ReLU, which halves it, $2/m$ does (He). Any law of that variance will do, if it has that variance: a
normal law that is cut at two standard deviations keeps only

$$\gamma = \frac{\int_{-2}^{2} x^2 e^{-x^2/2} dx}{\int_{-2}^{2} e^{-x^2/2} dx} = 0.7737$$

of it, so it must be drawn $1/\sqrt\gamma = 1.1368$ times as wide. For tanh or sigmoid no weight
keeps a second moment of 1; then the activation is divided by the root of its own.

## Why attention divides by $\sqrt d$

Queries and keys of $d$ entries with second moment 1 have products of second moment $d$. A softmax
of logits of size $\pm 3\sqrt d$ is nearly one-hot at the start: it looks at one token, and learns
slowly to look elsewhere. There are two cures. Divide the logits; or start with smaller queries, as
T5 does: $\operatorname{std}(W_q) = (n d)^{-1/2}$ for $n$ inputs. They agree at the start. Later
they do not: T5's query weights are $\sqrt d$ times smaller and receive gradients $\sqrt d$ times
larger, so that relative to their size they move $d$ times as fast.

## One learning rate for every width

An optimiser like Adam moves every entry by about the learning rate, a weight has entries of size
$1/\sqrt m$: the wider the layer, the rougher the step. Write $W = V/\sqrt m$ and train $V$, whose
entries are of order one at any width (the parametrisation of the neural tangent kernel). The
function is the same, and a rate of 0.01 is a hundredth of every parameter.

## Residuals

Variances of independent terms add. After a post-norm $x_{t+1} \approx (x_t + F_t)/\sqrt 2$, so

$$x_l = 2^{-l/2} x_0 + \sum_k 2^{-(l-k)/2} F_k,$$

and the shortcut of early layers is damped exponentially: the residual is there in name only, hence
warm-up. A pre-norm keeps all paths. Best is to start as the identity, $x + \alpha F(x)$ with
$\alpha = 0$. Then $\alpha$ may be learned; but a scalar that starts at 0 and ends near 1 is no
parameter like the others, and networks with $\alpha = 1$ do train once they are on their way. So
raise it from 0 to 1 by a small fixed amount each step (`GradualResidual`, `advance_ramps`).

## What decides it

*Scale of attention.* A small language model of one wide head (size 256), three times: divided, not
divided, not divided but started as T5 does. The normalised entropy of the last query's attention at
the start, and the loss after training.

*Parametrisation.* A classifier of digits, every pixel standardised, with three hidden layers at
several widths and learning rates, with He's initialisation and with the raw parameters above it.

*Residuals.* Sixty-four blocks of two layers on digits with Adam, without warm-up: post-norm,
pre-norm, a learned gate, a ramp, and a ramp without any norm.

The tables of the audit at the end show what `audit_signal` says of a network that fails and of one
that trains.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab
from kexue.models import Transformer, TransformerConfig
from kexue.nn.attention import AttentionOutput, DotProductAttention
from kexue.nn.diagnosis import observed
from kexue.nn.init import (
    GradualResidual,
    SoftmaxSaturation,
    advance_ramps,
    audit_signal,
    ntk_parametrize,
    softmax_saturation,
    transformer_init_,
    variance_scaling_,
)
from kexue.nn.residual import Residual

HEAD = 256
CONTEXT = 64
DIVIDED, RAW, T5 = "divided by √d", "not divided", "not divided, T5"
STANDARD, NTK = "standard", "NTK"
RATES = (1e-3, 1e-2, 3e-2, 1e-1)
Digits = tuple[Tensor, Tensor, Tensor, Tensor]
POST, PRE, LEARNED = "post-norm", "pre-norm", "learned gate"
RAMP, BARE_RAMP = "ramp", "ramp without norm"
BLOCKS = 64


def run(lab: Lab) -> None:
    attention_scale(lab)
    parametrisation(lab)
    residuals(lab)


def attention_scale(lab: Lab) -> None:
    """Train a language model with and without the division of its logits."""
    seeds, steps = lab.pick(smoke=1, quick=1, full=3), lab.pick(smoke=3, quick=60, full=120)
    given = lab.data.path is None or lab.data.holds_text
    characters = lab.data.Characters(lab.data.text() if given else lab.data.prose())
    ids = characters.tokens
    first: dict[str, list[SoftmaxSaturation]] = {DIVIDED: [], RAW: [], T5: []}
    curves: dict[str, list[list[float]]] = {DIVIDED: [], RAW: [], T5: []}
    for arm in lab.progress(first, "scale of attention"):
        for seed in range(seeds):
            torch.manual_seed(1000 * lab.seed + seed)
            model = language_model(arm, len(characters))
            first[arm].append(last_query(model, ids[: 16 * CONTEXT].reshape(16, CONTEXT), arm))
            curves[arm].append(language_losses(model, ids, steps, seed))
    losses = {arm: mean([mean(curve[-20:]) for curve in runs]) for arm, runs in curves.items()}
    entropy = {arm: mean([s.normalized_entropy for s in found]) for arm, found in first.items()}
    lab.table(
        "Scale of attention",
        [
            {
                "logits": arm,
                "entropy": entropy[arm],
                "largest probability": mean([s.largest_probability for s in first[arm]]),
                "Jacobian": mean([s.jacobian_norm for s in first[arm]]),
                "loss": losses[arm],
            }
            for arm in first
        ],
        f"One head of size {HEAD}; entropy (1 is uniform), largest probability and norm of the "
        "softmax's Jacobian of the last query at the start; loss over the last 20 of "
        f"{steps} steps, in nats. The mean Jacobian does not vanish without the division: what "
        "suffers is the entropy and, with it, the loss.",
    )
    lab.figure(
        "attention-scale",
        curve_figure({arm: runs[0] for arm, runs in curves.items()}, "loss in nats"),
        "Training loss of the three models.",
    )
    # The thresholds are those of the embedded data; a user's are reported.
    judge = lab.observe if lab.data.holds_text else lab.claim
    judge("entropy of attention that is not divided", entropy[RAW], "<=", 0.25)
    judge(f"entropy of attention {DIVIDED}", entropy[DIVIDED], ">=", 0.75)
    judge("entropy of attention that starts as T5", entropy[T5], ">=", 0.75)
    judge("loss that the division saves", losses[RAW] - losses[DIVIDED], ">=", 0.05)
    judge("loss that T5's start saves", losses[RAW] - losses[T5], ">", 0.0)


class Undivided(DotProductAttention):
    """Attention whose logits are the products of queries and keys as they are."""

    def forward(self, *given: Tensor, **options: Any) -> AttentionOutput:
        return super().forward(*given, **{**options, "scale": 1.0})


def language_model(arm: str, symbols: int) -> nn.Module:
    config = TransformerConfig(
        vocab_size=symbols, dim=64, num_layers=2, num_heads=1, key_dim=HEAD, max_length=CONTEXT,
        tie_embeddings=False,
    )  # fmt: skip
    return Transformer(
        config,
        attention_core=None if arm == DIVIDED else lambda config: Undivided(),
        initializer=partial(
            transformer_init_, scheme="t5" if arm == T5 else "lecun", head_dim=HEAD
        ),
    )


def last_query(model: nn.Module, tokens: Tensor, arm: str) -> SoftmaxSaturation:
    """Saturation of the last query's attention, over layers and examples."""
    scale = HEAD**-0.5 if arm == DIVIDED else 1.0
    logits = []

    def see(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        query, key, _ = given
        logits.append(scale * query[:, :, -1:] @ key.mT)

    with torch.no_grad(), observed(
        model, see, include=lambda name, module: isinstance(module, DotProductAttention)
    ):  # fmt: skip
        model(tokens)
    return softmax_saturation(torch.cat(logits))


def language_losses(model: nn.Module, ids: Tensor, steps: int, seed: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (16, 1), generator=generator)
        window = ids[starts + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        losses.append(step(optimizer, loss))
    return losses


def parametrisation(lab: Lab) -> None:
    """Train classifiers of several widths at several rates, in both parametrisations."""
    widths = lab.pick(smoke=(64,), quick=(1024,), full=(64, 256, 1024))
    seeds, steps = lab.pick(smoke=1, quick=1, full=3), lab.pick(smoke=2, quick=60, full=60)
    rates = lab.pick(smoke=RATES[2:3], quick=RATES[1:], full=RATES)
    digits = read_images(lab)
    accuracy: dict[tuple[str, int, float], float] = {}
    for width in lab.progress(widths, "parametrisation"):
        for kind in (STANDARD, NTK):
            for rate in rates:
                scores = []
                for seed in range(seeds):
                    torch.manual_seed(1000 * lab.seed + seed)
                    model = classifier(digits, width, kind)
                    scores.append(train(model, digits, rate, steps, seed)[1])
                accuracy[kind, width, rate] = mean(scores)
    lab.table(
        "Accuracy by parametrisation, width and learning rate",
        [
            {"width": width, "weights": kind}
            | {f"rate {rate:g}": accuracy[kind, width, rate] for rate in rates}
            for width in widths
            for kind in (STANDARD, NTK)
        ],
        f"Held-out digits after {steps} steps of Adam, three hidden layers of ReLU.",
    )
    lab.figure(
        "parametrisation",
        rate_figure(accuracy, widths, rates),
        "Held-out accuracy against the learning rate. Raw parameters of order one stand rates that "
        "wreck ordinary weights, the more so the wider the layer.",
    )
    at = 3e-2
    worst = min(accuracy[NTK, width, at] for width in widths)
    judge = judge_images(lab)
    judge("accuracy of NTK at rate 0.03, worst width", worst, ">=", 0.85)
    gain = accuracy[NTK, widths[-1], at] - accuracy[STANDARD, widths[-1], at]
    judge("accuracy that NTK adds at rate 0.03 and the largest width", gain, ">=", 0.1)


def classifier(digits: Digits, width: int, kind: str) -> nn.Module:
    sizes = [digits[0].shape[1], width, width, width, int(digits[1].max()) + 1]
    model = nn.Sequential()
    for index, (before, after) in enumerate(pairwise(sizes)):
        linear = nn.Linear(before, after)
        # Inputs of the last three layers come out of a ReLU, which halves the second moment.
        power = 1.0 if index == 0 else 2.0
        nn.init.zeros_(linear.bias)
        if kind == NTK:
            ntk_parametrize(linear, gain=power**0.5, reinitialize=True)
        else:
            variance_scaling_(linear.weight, scale=power, distribution="normal")
        model.append(linear)
        if index < len(sizes) - 2:
            model.append(nn.ReLU())
    return model


def residuals(lab: Lab) -> None:
    """Train sixty-four blocks whose shortcuts differ."""
    seeds, steps = lab.pick(smoke=1, quick=1, full=3), lab.pick(smoke=2, quick=60, full=60)
    digits = read_images(lab)
    curves, scores, audits = {}, {}, {}
    for arm in lab.progress((POST, PRE, LEARNED, RAMP, BARE_RAMP), "residuals"):
        runs = []
        for seed in range(seeds):
            torch.manual_seed(1000 * lab.seed + seed)
            model = deep_classifier(digits, arm)
            if seed == 0:
                inputs, targets = (part[:128] for part in digits[:2])
                loss = partial(nn.functional.cross_entropy, target=targets)
                audits[arm] = audit_signal(
                    model, inputs, compute_loss=loss,
                    include=lambda name, module: isinstance(module, Residual | GradualResidual),
                )  # fmt: skip
            runs.append(train(model, digits, 3e-3, steps, seed))
        curves[arm] = runs[0][0]
        scores[arm] = mean([score for _, score in runs])
    lab.table(
        "Residuals",
        [
            {
                "blocks": arm,
                "accuracy": scores[arm],
                "first output": audits[arm].records[0].output_second_moment,
                "last output": audits[arm].records[-1].output_second_moment,
                "first gradient": audits[arm].records[0].gradient_second_moment,
                "last gradient": audits[arm].records[-1].gradient_second_moment,
            }
            for arm in scores
        ],
        f"{BLOCKS} blocks of two layers, Adam at 0.003, {steps} steps without warm-up: held-out "
        "accuracy, and second moments of outputs and gradients of the first and the last block at "
        "the start, from the audit.",
    )
    lab.figure(
        "residuals", curve_figure(curves, "training loss"), "Training loss by kind of residual."
    )
    judge = judge_images(lab)
    judge("accuracy of the post-norm", scores[POST], "<=", 0.3)
    judge("accuracy of the ramp", scores[RAMP], ">=", 0.8)
    gap = scores[RAMP] - scores[PRE]
    judge("accuracy of the ramp minus that of the pre-norm", gap, ">=", -0.05)


def deep_classifier(digits: Digits, arm: str) -> nn.Module:
    width, features, classes = 64, digits[0].shape[1], int(digits[1].max()) + 1

    def block() -> nn.Module:
        layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        normed = nn.Sequential(nn.LayerNorm(width), *layers)
        builders: Mapping[str, Callable[[], nn.Module]] = {
            POST: lambda: Residual(layers, width, style="post"),
            PRE: lambda: Residual(layers, width, style="pre"),
            LEARNED: lambda: GradualResidual(normed, mode="learned"),
            RAMP: lambda: GradualResidual(normed, steps=1000),
            BARE_RAMP: lambda: GradualResidual(layers, steps=10_000),
        }
        return builders[arm]()

    last = nn.Identity() if arm in (POST, BARE_RAMP) else nn.LayerNorm(width)
    blocks = [block() for _ in range(BLOCKS)]
    ends = nn.Linear(features, width), nn.Linear(width, classes)
    model = nn.Sequential(ends[0], *blocks, last, ends[1])
    transformer_init_(model)
    return model


def read_images(lab: Lab) -> Digits:
    """Inputs and labels to train on, then those held out: digits, or the user's images.

    Each pixel is standardised on the training part: the first layer's variance is computed for
    inputs of second moment 1, and is too small or too large for any other.
    """
    if lab.data.path is None or lab.data.holds_text:
        table = lab.data.tabular("digits")
        inputs, targets = torch.as_tensor(table.features).float(), torch.as_tensor(table.target)
        trained_on = 1400
    else:
        images = lab.data.images()
        if images.train.labels is None:
            raise DataError(f"{lab.data.path}: these images have no labels to learn")
        inputs, targets = images.train.images.flatten(1)[:10_000], images.train.labels[:10_000]
        trained_on = int(0.8 * len(inputs))
    deviation, centre = torch.std_mean(inputs[:trained_on], 0)
    inputs = (inputs - centre) / deviation.clamp(min=1e-3)
    return inputs[:trained_on], targets[:trained_on], inputs[trained_on:], targets[trained_on:]


def judge_images(lab: Lab) -> Callable[..., Any]:
    return lab.claim if lab.data.path is None or lab.data.holds_text else lab.observe


def train(
    model: nn.Module, digits: Digits, rate: float, steps: int, seed: int
) -> tuple[list[float], float]:
    """Return the losses of Adam and the held-out accuracy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets, held_out, answers = digits
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(inputs), (128,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        losses.append(step(optimizer, loss))
        advance_ramps(model)
    with torch.no_grad():
        return losses, (model(held_out).argmax(1) == answers).float().mean().item()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def curve_figure(curves: Mapping[str, Sequence[float]], label: str) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, losses in curves.items():
        ax.plot(range(1, len(losses) + 1), losses, label=name)
    ax.set_xlabel("step")
    ax.set_ylabel(label)
    ax.set_ylim(0, 1.2 * max(losses[0] for losses in curves.values()))
    ax.legend()
    return figure


def rate_figure(
    accuracy: Mapping[tuple[str, int, float], float],
    widths: Sequence[int],
    rates: Sequence[float],
) -> Figure:
    figure, axes = plt.subplots(
        1, len(widths), figsize=(3 * len(widths) + 2, 3.2), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax, width in zip(axes[0], widths, strict=True):
        for kind in (STANDARD, NTK):
            ax.semilogx(rates, [accuracy[kind, width, rate] for rate in rates], "o-", label=kind)
        ax.set_xlabel(f"learning rate, width {width}")
    axes[0, 0].set_ylabel("held-out accuracy")
    axes[0, 0].legend()
    return figure
