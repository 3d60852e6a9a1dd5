r"""TaiLr: a bounded cross entropy.

A classifier is judged by how often it is right, and trained on something else. Cross entropy
$-\log p$ of the labelled class has no upper end: a sample whose label the model does not believe
costs as much as it likes, and all training runs after it. If the label is right, that is how one
learns. If somebody mistyped it, the model will in the end learn that, too, by heart. Can one keep
the good part of the logarithm and leave the other?

## Look at the gradients

The accuracy itself is flat almost everywhere, but there is a smooth form of it: guess by drawing
from the model, and be right with probability $p$. Minimising $1 - p$ instead of $-\log p$ is
nearly hopeless from scratch, and the gradients say why. With $\theta$ for the parameters,

$$\nabla_\theta\,(-\log p) = -\frac1p\, \nabla_\theta\, p, \qquad
\nabla_\theta\,(1 - p) = -1 \cdot \nabla_\theta\, p.$$

The two losses differ by a factor, $1/p$ against $1$. At the start, $p$ is about one over the number
of classes, so the first is a fast start and the second a slow one; later, the first factor is
what sends everybody running after the worst samples. We want to go from one to the other. It
would be natural to mix the two losses. But optimisers never see a loss, they see its gradient, and
things are simpler there. So mix the denominators,

$$\frac1p \;\longrightarrow\; \frac{1}{\gamma + (1-\gamma)\,p}, \qquad 0 \le \gamma \le 1,$$

and integrate over $p$:

$$\boxed{\;\ell_\gamma(p) = -\frac{\log\big(\gamma + (1-\gamma)\,p\big)}{1 - \gamma}\;}$$

At $\gamma = 0$ this is cross entropy. At $\gamma = 1$, where it reads $0/0$, put
$\gamma = 1 - \delta$: $-\log(1 - \delta(1-p))/\delta \to 1 - p$, the smooth error rate. (One often
sees $-p$, which has the same gradient; but then the loss jumps by 1 when a schedule arrives.)
For every $\gamma$ certainty costs nothing, $\ell_\gamma(1) = 0$, and the worst that can happen is
$\ell_\gamma(0) = \log(1/\gamma)/(1-\gamma)$: at $\gamma = 0.1$ no more than 2.56.

Ji and others arrived at the same loss for texts, through a chain of inequalities for the total
variation distance, and called it TaiLr. Nothing in the result remembers the distance or the text.

## What it does

Let $z$ be the logits and $y$ the label. Then

$$\frac{\partial \ell_\gamma}{\partial z_k} = w(p)\,\big(p_k - 1_{k=y}\big), \qquad
w(p) = \frac{p}{\gamma + (1-\gamma)\,p},$$

which is the gradient of cross entropy with a weight between 0 and 1. The weight grows with $p$. A
sample counts as far as the model believes it already, and $\gamma$ says how far that has to be: at
$p = \gamma/(1+\gamma)$ the weight is one half.

So there is a price. At the start nobody is believed: with $K$ classes $p \approx 1/K$, and the
weight is about $1/(\gamma K)$ once $\gamma$ is far above $1/K$. With ten classes that is no harm,
with thirty thousand it is the end of training. The authors therefore do not let the weight of a
sample fall below some $b$, and since a simple antiderivative is not at hand, stop the gradient of
the weight. But there is one. The weight is $b$ at $p_b = b\gamma/(1 - b(1-\gamma))$; from there on
down, go on with $b$ times the cross entropy,

$$\ell_{\gamma,b}(p) = \ell_\gamma(p_b) - b \log\frac{p}{p_b}, \qquad p < p_b,$$

and value and slope fit together.

## What is measured

The digits, pixels scaled to $[-1, 1]$, split 60 to 40 with all classes in proportion; a network
64–256–256–10, AdamW at $10^{-3}$, batches of 64, 40 epochs. Of the training labels 30 % (or none)
are replaced by another class. On the clean test digits we look at three numbers: the accuracy; the
negative log-likelihood; and how far the predicted probabilities can be taken at their word,

$$\mathrm{ECE} = \sum_{\text{bins}} \frac{n_b}{n}\,
\big|\,\text{accuracy}_b - \text{mean confidence}_b\,\big|,$$

over 15 bins of the largest probability. A fourth number says what went wrong: the share of the
replaced training labels that the network gives back, wrong as they are.

The claim holds if, over at least three seeds and at 30 % noise, $\gamma = 0.3$ is at least 0.05
more accurate than cross entropy, has at most half of its ECE and gives back at most half as many
wrong labels; and if without noise it loses no more than 0.01 of accuracy. Every seed has a split,
a noise and a start of its own, the same for all losses.

Two things that the claim does not say should be said. Without noise the bounded loss does *not*
make probabilities more honest here; the benefit is about dirty data. And the ECE of cross entropy
is no simple thing: while it learns the true labels it is far too modest (it has been told that
three in ten are wrong), when it has learnt the wrong ones by heart far too sure, and on the way
from one to the other it passes through a small ECE by accident. The full budget shows such a case:
with pixels from 0 to 16 the network memorises much faster, and after the same 40 epochs the
accuracies are further apart than ever, while the ECE of cross entropy has fallen below half.

The full budget adds more of $\gamma$, a schedule from 0 to 1, the best-known relatives
$(1 - p^q)/q$ (generalised cross entropy) and $-(1-p)^2 \log p$ (focal loss, whose weight goes the
other way), and a small language model of bytes, a tenth of whose training targets are noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from kexue.lab import DataError, Lab, seeded
from kexue.lab.data import TABLES
from kexue.losses.tailr import (
    TaiLrLoss,
    expected_calibration_error,
    reliability_diagram,
    tailr_loss,
    token_weight,
)
from kexue.models.mlp import MLP

NOISE = 0.3
GAMMA = 0.3
CROSS_ENTROPY, SMOOTHED, BOUNDED = "cross entropy", "label smoothing 0.1", f"γ = {GAMMA}"

Objective = Callable[[Tensor, Tensor, float], Tensor]
"""Logits, labels and the share of the training that is over -> mean loss."""


def tailr(gamma: float) -> Objective:
    return lambda logits, labels, _: tailr_loss(logits, labels, gamma=gamma)


def scheduled(logits: Tensor, labels: Tensor, elapsed: float) -> Tensor:
    return tailr_loss(logits, labels, gamma=elapsed)


def generalised_cross_entropy(logits: Tensor, labels: Tensor, _: float) -> Tensor:
    p = logits.softmax(1).gather(1, labels[:, None])
    return ((1 - p**0.7) / 0.7).mean()


def focal(logits: Tensor, labels: Tensor, _: float) -> Tensor:
    lp = logits.log_softmax(1).gather(1, labels[:, None])
    return (-(lp.expm1() ** 2) * lp).mean()


OBJECTIVES: dict[str, Objective] = {
    CROSS_ENTROPY: lambda logits, labels, _: F.cross_entropy(logits, labels),
    SMOOTHED: lambda logits, labels, _: F.cross_entropy(logits, labels, label_smoothing=0.1),
    BOUNDED: tailr(GAMMA),
    "γ = 0.01": tailr(0.01),
    "γ = 0.1": tailr(0.1),
    "γ = 0.8": tailr(0.8),
    "γ = 1": tailr(1.0),
    "γ from 0 to 1": scheduled,
    "(1 − p^0.7)/0.7": generalised_cross_entropy,
    "focal, (1 − p)² log 1/p": focal,
}
ORDER = (
    CROSS_ENTROPY, "γ = 0.01", "γ = 0.1", BOUNDED, "γ = 0.8", "γ = 1", "γ from 0 to 1", SMOOTHED,
    "(1 − p^0.7)/0.7", "focal, (1 − p)² log 1/p",
)  # fmt: skip


class Trial(NamedTuple):
    """One trained network: its predictions for the test set, and what it is judged by."""

    probabilities: Tensor
    labels: Tensor
    accuracy: float
    calibration_error: float
    log_loss: float
    reproduced: float
    """Share of the replaced training labels that it gives back; NaN where none were."""


class Split(NamedTuple):
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


Trials = dict[tuple[str, float], list[Trial]]
"""One trial a seed, by loss and noise."""


def run(lab: Lab) -> None:
    lab.figure(
        "curves",
        curve_figure(),
        r"The loss and the weight of a sample against the probability of its label. Cross entropy "
        r"is the line $\gamma = 0$: no bound at the left, and every sample counts the same.",
    )
    three = (CROSS_ENTROPY, SMOOTHED, BOUNDED)
    names = lab.pick(smoke=(CROSS_ENTROPY, BOUNDED), quick=three, full=ORDER)
    seeds = lab.pick(smoke=1, quick=3, full=5)
    data, features = read_data(lab)
    cells = [(name, noise) for noise in (NOISE, 0.0) for name in names]
    trials = train_all(lab, features, cells, seeds)

    report(lab, trials, names, data, seeds)
    judge(lab, trials)
    sweep(lab, features, trials)
    if lab.budget == "full":
        if lab.data.path is None:
            raw_pixels(lab, features)
        language_models(lab)


def train_all(
    lab: Lab,
    features: tuple[Tensor, Tensor],
    cells: Sequence[tuple[str, float]],
    seeds: int,
    label: str = "networks",
) -> Trials:
    """Train every loss at every noise, with the same seeds."""
    epochs = lab.pick(smoke=1, quick=40, full=40)
    trials: Trials = {cell: [] for cell in cells}
    progress = lab.progress([(*cell, s) for cell in cells for s in range(seeds)], label)
    for name, noise, seed in progress:
        trial = train(
            features, OBJECTIVES[name], noise, epochs=epochs, seed=1000 * lab.seed + seed,
            device=lab.device,
        )  # fmt: skip
        trials[name, noise].append(trial)
        progress.metric(accuracy=trial.accuracy)
    return trials


def train(
    features: tuple[Tensor, Tensor],
    objective: Objective,
    noise: float,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
) -> Trial:
    """Train one network on labels of which a share is replaced by another class."""
    generator = torch.Generator().manual_seed(seed)
    split = stratified_split(*features, seed=seed)
    classes = int(features[1].max()) + 1
    replaced = torch.rand(len(split.labels), generator=generator) < noise
    shift = torch.randint(1, classes, (len(split.labels),), generator=generator)
    labels = torch.where(replaced, (split.labels + shift) % classes, split.labels)
    with seeded(seed):
        model = MLP(features[0].shape[1], [256, 256], classes, activation="relu").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    inputs, targets = split.inputs.to(device), labels.to(device)
    for epoch in range(epochs):
        elapsed = epoch / max(epochs - 1, 1)
        for batch in torch.randperm(len(inputs), generator=generator).to(device).split(64):
            optimizer.zero_grad()
            objective(model(inputs[batch]), targets[batch], elapsed).backward()
            optimizer.step()

    with torch.no_grad():
        log_probabilities = model(split.test_inputs.to(device)).log_softmax(1).cpu().double()
        given_back = model(inputs).argmax(1).cpu() == labels
    probabilities = log_probabilities.exp()
    return Trial(
        probabilities=probabilities,
        labels=split.test_labels,
        accuracy=_share(probabilities.argmax(1) == split.test_labels),
        calibration_error=expected_calibration_error(probabilities, split.test_labels),
        log_loss=F.nll_loss(log_probabilities, split.test_labels).item(),
        reproduced=_share(given_back[replaced]),
    )


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def read_data(lab: Lab) -> tuple[str, tuple[Tensor, Tensor]]:
    """Digits as vectors in [-1, 1], or the user's table or images: name, features and labels."""
    path = lab.data.path
    if path is None or path.suffix.lower() in TABLES:
        table = lab.data.tabular("digits") if path is None else lab.data.tabular()
        features, name = torch.as_tensor(table.features).float(), table.name
        labels = torch.as_tensor(table.target).long()
        if path is None:
            return name, (features / 8 - 1, labels)
        return name, ((features - features.mean(0)) / (features.std(0) + 1e-12), labels)
    images = lab.data.images()
    if images.train.labels is None or images.test.labels is None:
        raise DataError(f"{path}: these images have no labels to learn")
    pixels = torch.cat([images.train.images, images.test.images]).flatten(1)
    return images.name, (pixels, torch.cat([images.train.labels, images.test.labels]))


def stratified_split(features: Tensor, labels: Tensor, *, seed: int) -> Split:
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.4, stratify=labels.numpy(), random_state=seed
    )
    return Split(features[train], labels[train], features[test], labels[test])


def mean(trials: Sequence[Trial], what: str) -> float:
    return sum(getattr(trial, what) for trial in trials) / len(trials)


def report(lab: Lab, trials: Trials, names: Sequence[str], data: str, seeds: int) -> None:
    """Put what was measured on the page, and the reliability diagrams."""
    for noise, title in ((NOISE, "Three labels in ten are wrong"), (0.0, "All labels are right")):
        rows = []
        for name in names:
            found = trials[name, noise]
            row: dict[str, Any] = {
                "loss": name,
                "accuracy": mean(found, "accuracy"),
                "ECE": mean(found, "calibration_error"),
                "NLL": mean(found, "log_loss"),
            }
            if noise:
                row["given back"] = mean(found, "reproduced")
            rows.append(row)
        caption = (
            f"Test set of {data}, with clean labels; mean over {seeds} seed{'s'[: seeds - 1]}."
        )
        if noise:
            caption += " Given back: share of the replaced training labels that are reproduced."
        lab.table(title, rows, caption)
    lab.figure(
        "reliability",
        reliability_figure({name: trials[name, NOISE] for name in (CROSS_ENTROPY, BOUNDED)}),
        "Accuracy against confidence on clean test data after training with 30 % wrong labels, "
        "all seeds together; on the diagonal, probabilities come true. Bars: share of the samples "
        "in each bin. Above the diagonal a network is right more often than it says, which is what "
        "three wrong labels in ten teach cross entropy; below it, a network is too sure.",
    )


def judge(lab: Lab, trials: Trials) -> None:
    """Claim what the text says; thresholds are those of the digits, else numbers are reported."""
    claim = lab.claim if lab.data.path is None else lab.observe
    plain, bounded = trials[CROSS_ENTROPY, NOISE], trials[BOUNDED, NOISE]
    gain = mean(bounded, "accuracy") - mean(plain, "accuracy")
    claim(r"30 % noise: accuracy of $\gamma = 0.3$ above cross entropy's", gain, ">=", 0.05)
    for what, words in (("calibration_error", "ECE"), ("reproduced", "wrong labels given back")):
        ratio = mean(bounded, what) / mean(plain, what)
        claim(rf"30 % noise: {words} of $\gamma = 0.3$ over cross entropy's", ratio, "<=", 0.5)
    plain, bounded = trials[CROSS_ENTROPY, 0.0], trials[BOUNDED, 0.0]
    loss = mean(plain, "accuracy") - mean(bounded, "accuracy")
    claim(r"no noise: accuracy that $\gamma = 0.3$ loses against cross entropy", loss, "<=", 0.01)
    change = mean(bounded, "calibration_error") - mean(plain, "calibration_error")
    lab.observe(r"no noise: ECE of $\gamma = 0.3$ minus cross entropy's", change, "<", 0)


def sweep(lab: Lab, features: tuple[Tensor, Tensor], trials: Trials) -> None:
    """Show the accuracy against the share of wrong labels."""
    rates = lab.pick(smoke=(), quick=(0.15, 0.45), full=(0.1, 0.2, 0.4, 0.5, 0.6))
    seeds = lab.pick(smoke=1, quick=1, full=3)
    names = (CROSS_ENTROPY, BOUNDED)
    cells = [(name, rate) for name in names for rate in rates]
    found = trials | train_all(lab, features, cells, seeds, "noise rates")
    noises = sorted({NOISE, 0.0, *rates})
    accuracies = {name: [mean(found[name, r], "accuracy") for r in noises] for name in names}
    lab.figure(
        "noise",
        noise_figure(noises, accuracies),
        "Accuracy on clean test data against the share of training labels that are wrong; of "
        f"{seeds} seed{'s'[: seeds - 1]}, but at 0 and 0.3 of those of the tables.",
    )


def raw_pixels(lab: Lab, features: tuple[Tensor, Tensor]) -> None:
    """The same with pixels from 0 to 16, on which networks memorise faster."""
    raw = (8 * (features[0] + 1), features[1])
    names = (CROSS_ENTROPY, BOUNDED)
    trials = train_all(lab, raw, [(name, NOISE) for name in names], 3, "raw pixels")
    lab.table(
        "The same with pixels from 0 to 16",
        [
            {
                "loss": name,
                "accuracy": mean(trials[name, NOISE], "accuracy"),
                "ECE": mean(trials[name, NOISE], "calibration_error"),
                "NLL": mean(trials[name, NOISE], "log_loss"),
                "given back": mean(trials[name, NOISE], "reproduced"),
            }
            for name in names
        ],
        "30 % wrong labels, mean over 3 seeds. Nearly all wrong labels are learnt by heart, and "
        "the ECE of that network is small by accident.",
    )
    ratio = mean(trials[BOUNDED, NOISE], "calibration_error") / mean(
        trials[CROSS_ENTROPY, NOISE], "calibration_error"
    )
    lab.observe(
        r"pixels from 0 to 16: ECE of $\gamma = 0.3$ over cross entropy's", ratio, "<=", 0.5
    )


def language_models(lab: Lab) -> None:
    """Train models of bytes on targets of which a tenth is noise, and read clean text."""
    steps = 1000
    text = torch.frombuffer(bytearray(lab.data.prose().encode()), dtype=torch.uint8).long()
    rows = []
    progress = lab.progress((0.0, 1e-3, 1e-2, 0.1), "language models")
    for gamma in progress:
        trained = lab.cache(
            f"bytes-{gamma:g}".replace(".", "-"),
            lambda gamma=gamma: train_bytes(text, gamma, seed=1000 * lab.seed, steps=steps),
            inputs={"gamma": gamma, "steps": steps},
        )
        perplexity = math.exp(float(trained["loss"]))
        progress.metric(perplexity=perplexity)
        name = "cross entropy" if gamma == 0 else f"γ = {gamma:g}"
        rows.append({"loss": name, "perplexity": perplexity, "weight at p = 1/256": float(
            token_weight(torch.tensor(-math.log(256)), gamma=gamma)
        )})  # fmt: skip
    lab.table(
        "A language model of bytes",
        rows,
        f"One training target in ten replaced by a random byte; two layers, width 64, {steps} "
        "steps, one seed; perplexity of a byte on the last tenth of the text, which is clean. Far "
        "above 1/256, γ lets hardly a sample count at the start, and training stalls.",
    )


def train_bytes(text: Tensor, gamma: float, *, seed: int, steps: int) -> dict[str, Tensor]:
    """Train one model of bytes; return its cross entropy on clean held-out text."""
    from kexue.models.transformer import Transformer, TransformerConfig

    context, batch = 64, 16
    train, held_out = text.tensor_split([9 * len(text) // 10])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(train), generator=generator) < 0.1
    random_bytes = torch.randint(256, (len(train),), generator=generator)
    targets = torch.where(noise, random_bytes, train)
    with seeded(seed):
        model = Transformer(
            TransformerConfig(
                256, dim=64, num_layers=2, num_heads=4, feedforward_dim=256, max_length=context
            )
        )
    objective = TaiLrLoss(gamma=gamma)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    for _ in range(steps):
        start = torch.randint(len(train) - context - 1, (batch, 1), generator=generator)
        places = start + torch.arange(context)
        optimizer.zero_grad()
        objective(model(train[places]).mT, targets[places + 1]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        windows = held_out.unfold(0, context + 1, context)
        losses = [F.cross_entropy(model(w[:, :-1]).mT, w[:, 1:], reduction="sum")
                  for w in windows.split(64)]  # fmt: skip
    return {"loss": torch.stack(losses).sum() / windows[:, 1:].numel()}


def curve_figure() -> Figure:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    p = torch.linspace(0.002, 1, 500, dtype=torch.float64)
    for gamma in (0.0, 0.01, 0.1, 0.3, 1.0):
        logits = torch.stack([p.log(), (-p).log1p()], 1)
        label = torch.zeros(len(p), dtype=torch.long)
        loss = tailr_loss(logits, label, gamma=gamma, reduction="none")
        left.plot(p, loss, label=rf"$\gamma = {gamma:g}$")
        right.plot(p, token_weight(p.log(), gamma=gamma))
    left.set(xlabel="probability $p$ of the label", ylabel=r"loss $\ell_\gamma(p)$", ylim=(0, 5))
    right.set(xlabel="probability $p$ of the label", ylabel="weight $w(p)$", ylim=(0, 1.04))
    left.legend()
    return figure


def reliability_figure(trials: Mapping[str, Sequence[Trial]]) -> Figure:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots(1, len(trials), sharey=True)
    for ax, color, (name, found) in zip(axes, ("C0", "C1"), trials.items(), strict=True):
        diagram = reliability_diagram(
            torch.cat([trial.probabilities for trial in found]),
            torch.cat([trial.labels for trial in found]),
        )
        bins = len(diagram.count)
        middle = (torch.arange(bins) + 0.5) / bins
        ax.bar(middle, diagram.count / diagram.count.sum(), 0.9 / bins, color=color, alpha=0.3)
        ax.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
        ax.plot(diagram.confidence, diagram.accuracy, "o-", color=color)
        ax.set(xlabel="confidence", xlim=(0, 1), ylim=(0, 1.03))
        ax.set_title(name, fontsize="medium")
    axes[0].set_ylabel("accuracy; share of samples")
    return figure


def noise_figure(noises: Sequence[float], accuracies: Mapping[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    for (name, values), marker in zip(accuracies.items(), "os", strict=True):
        ax.plot(noises, values, marker=marker, label=name)
    ax.set(xlabel="share of wrong training labels", ylabel="accuracy")
    ax.legend()
    return figure
