r"""Why SimSiam does not collapse.

Learn to give two views of the same image the same code. The best solution is to give every image
the same code: a constant encoder has the perfect loss. SimSiam and BYOL minimise just this and do
not end there. Why not, and how would you notice if yours did?

## It is not the optimum, it is the way

Alternating descent on $E \|F_\theta(T(x)) - \eta_x\|^2$, the reading of SimSiam as an EM algorithm,
has the constant solution too, so that it explains nothing. The article looks at the dynamics
instead. A random network is already a fair encoder, so training must only not destroy it. With the
loss $l(h_\varphi(f_\theta(T_1 x)), f_\theta(T_2 x))$ gradient descent is

$$\dot\varphi = -\frac{\partial l}{\partial h} \frac{\partial h}{\partial \varphi}, \qquad
\dot\theta = -\frac{\partial l}{\partial h} \frac{\partial h}{\partial f}
\frac{\partial f}{\partial \theta} - \underbrace{\frac{\partial l}{\partial f}
\frac{\partial f}{\partial \theta}}_{\text{stopped}} .$$

What remains carries $\partial l / \partial h$. The predictor is next to the output and fast; it
brings $\partial l / \partial h$ to zero, and the force on the encoder dies before the encoder does.
The stopped term would be a fast lane to collapse.

## One mode, solved

In $l = \frac12 (\varphi\theta - \theta)^2$ every variant conserves a number, so that its end is
known without solving anything. Where the encoder lives, $\varphi$ ends at 1.

| encoder follows | conserved | lives if | $\theta^2$ at the end |
|---|---|---|---|
| stop-gradient | $c = \varphi^2 - \theta^2$ | $c < 1$ | $1 - c$ |
| both terms | $c = \theta^2 - (1 - \varphi)^2$ | $c > 0$ | $c$ |
| target only | $c = \varphi + \theta^2 / 2$ | $c > 1$ | $2(c - 1)$ |

With stop-gradient and $\varphi_0 \le 0$ the predictor has to pass zero first; that takes $c < 0$.

The article shows the start $\varphi = 0.6$, $\theta = 0.1$, where only stop-gradient lives. The
map of all starts says more: stop-gradient is no unconditional rescue, since a predictor that starts
too large collapses the encoder, and without it there are starts that live too.

## What augmentation changes

Let two views have the covariance $X$ in common and $X + V$ each, with a linear encoder $W$, a
predictor $P$ of relative rate $a$, weight decay $w$, and a target $T$:

$$\dot P = a E W^\top - w P, \qquad \dot W = P^\top E - w W, \qquad E = T X - P W (X + V) .$$

For $w = 0$, whatever the target does, $W W^\top - P^\top P / a$ is conserved; so the moving target
of BYOL ends where SimSiam does. In a mode with $X = 1$ and $V = v$ the predictor tends to
$1 / (1 + v)$, and decay has a threshold, $w = 1 / (4 (1 + v))$, beyond which only collapse remains.
With the full gradient and $V > 0$ the encoder always dies.

## The article's open question

Putting the best $\eta_x = E_T F(T x)$ back and expanding gives $E \|J (T x - \bar x)\|^2$, against
$E \|J (T_2 x - T_1 x)\|^2$ without stop-gradient and predictor. The article suspects that the
larger loss and variance of the latter do the harm, and asks whether
$\|F(T x) - F(\bar x)\|^2$ would not collapse. It does. For independent views the second
expression is exactly twice the first, no more than a learning rate; and in the linear model both
are $\dot W = -W V$ up to that rate, hence $W(t) = W(0)\, e^{-V t}$: every direction that the
augmentation touches dies, with stop-gradient on $F(\bar x)$ or without.

## What decides it

*The closed forms.* From a grid of starts the flow is followed until it stands still. All ends must
agree with the formulas to $10^{-6}$, and so must the verdict, life or collapse.

*A network.* Handwritten digits, shifted by up to one pixel, with changed brightness and noise; an
encoder with one hidden layer. The measure is the relative standard deviation of normalised codes,
1 for isotropic and 0 for constant ones. SimSiam and BYOL must keep it at 0.5 or more; without
stop-gradient, without predictor, and without both it must fall to 0.15 or less. The target
$F(\bar x)$, from the mean of eight views, must end below half of SimSiam's.

*The flow.* The size $\|W\|$ of a linear network, trained on samples at rate 0.001, must follow the
flow within 2 %, at decays on both sides of the threshold.

The predictor's own learning rate is varied too. The theory of one mode lets a frozen predictor kill
the encoder or blow it up, as its size will have it. Behind a normalised loss and a batch norm
neither happens in 250 steps: a slow predictor only fails to bring the loss down.

The reader should also see what does not show a collapse. The loss is best where all is lost. The
accuracy of nearest neighbours hardly falls, because tiny deviations from the constant still hold
the information in float32. And the effective rank, which looks at centred codes, can even be higher
after a complete collapse: read it with the relative deviation, never alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab, seeded
from kexue.training.siamese import (
    BYOL,
    CollapseMetrics,
    SimSiam,
    collapse_metrics,
    mode_limit,
    mode_trajectory,
    negative_cosine_similarity,
    prediction_head,
    weight_decay_threshold,
)
from kexue.training.siamese.dynamics import Gradient

FOLLOWED = {
    "stop_gradient": "stop-gradient",
    "full": "both terms",
    "target_only": "target only",
}
CODE, BATCH, RATE = 32, 128, 0.05
TEST_IMAGES, NEIGHBOURS, MEAN_OF = 500, 5, 8
LINEAR_RATE, AUGMENTATION = 1e-3, 0.25


@dataclass(frozen=True)
class Variant:
    """A way to train the encoder, or to break the training."""

    name: str
    predictor: bool = True
    stop_gradient: bool = True
    teacher: bool = False
    mean_view: bool = False
    predictor_rate: float = 1.0


SIMSIAM, BYOL_VARIANT = Variant("SimSiam"), Variant("BYOL", teacher=True)
ABLATIONS = (
    Variant("no stop-gradient", stop_gradient=False),
    Variant("no predictor", predictor=False),
    Variant("neither", predictor=False, stop_gradient=False),
)
MEAN_VIEW = Variant("mean view", predictor=False, stop_gradient=False, mean_view=True)
MEAN_VIEW_STOPPED = Variant("mean view, stopped", predictor=False, mean_view=True)
VARIANTS = (SIMSIAM, BYOL_VARIANT, *ABLATIONS, MEAN_VIEW, MEAN_VIEW_STOPPED)


@dataclass(frozen=True)
class Task:
    """Images in [0, 1] to learn from and to look at, with classes where they are known."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None


@dataclass(frozen=True)
class Trained:
    """Loss and metrics along the way, and the accuracy of neighbours at the end."""

    steps: list[int]
    losses: list[float]
    metrics: list[CollapseMetrics]
    accuracy: float


def run(lab: Lab) -> None:
    closed_forms(lab)
    networks(lab)
    linear_networks(lab)


def closed_forms(lab: Lab) -> None:
    """Compare where modes end with where the formulas say."""
    columns, rows = lab.pick(smoke=(4, 3), quick=(12, 8), full=(24, 16))
    # Multiples of these steps from this corner keep clear of the borders between life and
    # collapse, where the flow needs arbitrarily long.
    predictors = -1.4 + 3.3 * np.arange(columns) / (columns - 1)
    encoders = 0.16 + 1.33 * np.arange(rows) / (rows - 1)
    starts = [(p, s, g) for g in get_args(Gradient) for p in predictors for s in encoders]
    worst = dict.fromkeys(get_args(Gradient), 0.0)
    mistaken = dict.fromkeys(get_args(Gradient), 0)
    ends = []
    for p, s, gradient in lab.progress(starts, "ends of the flow"):
        limit = mode_limit(predictor=p, encoder=s, gradient=gradient)
        p_end, s_end = settled(p, s, gradient)
        error = max(abs(p_end - limit.predictor), abs(s_end - limit.encoder))
        worst[gradient] = max(worst[gradient], error)
        collapsed = abs(s_end) < 1e-4
        mistaken[gradient] += collapsed != limit.collapsed
        ends.append((p, s, gradient, collapsed))
    lab.table(
        "Closed forms against the flow",
        [
            {
                "encoder follows": name,
                "starts": len(predictors) * len(encoders),
                "largest error of an end": worst[gradient],
                "wrong verdicts": mistaken[gradient],
                "start of the article": end_of_article(gradient),
            }
            for gradient, name in FOLLOWED.items()
        ],
        "The flow is integrated until it stands still. Last column: $\\varphi$ and $\\theta$ at "
        "the end, from $\\varphi = 0.6$, $\\theta = 0.1$.",
    )
    lab.figure(
        "article",
        article_figure(),
        "The article's start. With stop-gradient the encoder grows until the predictor has "
        "reached one and the force is gone. The other gradients shrink it to nothing.",
    )
    lab.figure(
        "map",
        map_figure(ends),
        "Where the mode lives (shaded, from the formulas) and where the integrated flow ended "
        "(circles: alive, crosses: collapsed). The star is the article's start.",
    )
    lab.claim("largest error of a closed-form limit", max(worst.values()), "<=", 1e-6)
    lab.claim("starts classified wrongly by the closed form", sum(mistaken.values()), "==", 0)


def settled(predictor: float, encoder: float, gradient: Gradient) -> tuple[float, float]:
    """Follow the flow, twice as long each time, until it stands still."""
    duration, p, s = 50.0, predictor, encoder
    while duration < 1e6:
        end = mode_trajectory([duration], predictor=p, encoder=s, gradient=gradient)
        step = max(abs(end.predictor[0] - p), abs(end.encoder[0] - s))
        p, s = float(end.predictor[0]), float(end.encoder[0])
        if step < 1e-8:
            break
        duration *= 2
    return p, s


def end_of_article(gradient: Any) -> str:
    limit = mode_limit(gradient=gradient)
    return f"{limit.predictor:.4f}, {limit.encoder:.4f}"


def article_figure() -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    times = np.linspace(0, 25, 200)
    for (gradient, name), style in zip(FOLLOWED.items(), ("-", "--", ":"), strict=True):
        trajectory = mode_trajectory(times, gradient=gradient)  # type: ignore[arg-type]
        axes[0].plot(times, trajectory.encoder, style, label=name)
        axes[1].plot(times, trajectory.predictor, style, label=name)
    axes[0].set_ylabel(r"encoder $\theta$")
    axes[1].set_ylabel(r"predictor $\varphi$")
    for axis in axes:
        axis.set_xlabel("time")
    axes[0].legend()
    return figure


def map_figure(ends: list[tuple[float, float, Gradient, bool]]) -> Figure:
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 3.1), sharex=True, sharey=True, layout="constrained"
    )
    predictors, encoders = np.linspace(-1.6, 2.1, 149), np.linspace(0.02, 1.6, 80)
    for axis, (gradient, name) in zip(axes, FOLLOWED.items(), strict=True):
        limit = partial(mode_limit, gradient=gradient)  # type: ignore[arg-type]
        alive = [
            [not limit(predictor=p, encoder=s).collapsed for p in predictors] for s in encoders
        ]
        axis.contourf(predictors, encoders, np.array(alive, float), [0.5, 1.5], alpha=0.3)
        for collapsed, marker in ((False, "o"), (True, "x")):
            points = [(p, s) for p, s, g, c in ends if g == gradient and c == collapsed]
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, marker, color="black", markersize=4, fillstyle="none", linestyle="")
        axis.plot([0.6], [0.1], "*", color="C1", markersize=11)
        axis.set_title(name)
        axis.set_xlabel(r"predictor at the start, $\varphi_0$")
    axes[0].set_ylabel(r"encoder at the start, $\theta_0$")
    return figure


def networks(lab: Lab) -> None:
    """Train the variants on images and measure their collapse."""
    task = images(lab)
    # The criterion is one of the digits; on a user's images the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe
    steps = lab.pick(smoke=5, quick=250, full=250)
    seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=2, full=6))]
    found: dict[str, list[Trained]] = {}
    for variant, seed in lab.progress([(v, s) for v in VARIANTS for s in seeds], "networks"):
        found.setdefault(variant.name, []).append(train(task, variant, seed, steps, lab.device))

    def spread(variant: Variant) -> list[float]:
        return [trained.metrics[-1].relative_std for trained in found[variant.name]]

    rows = [row(name, trained, -1) for name, trained in found.items()]
    untrained = row("at the start", found[SIMSIAM.name], 0)
    untrained[f"{NEIGHBOURS}-nn accuracy"] = start(task, seeds)
    lab.table(
        "Seven ways to train",
        [*rows, untrained],
        f"After {steps} steps of {BATCH} images, mean of {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}, measured on {len(task.test)} images that were held out. "
        f"A rank of {CODE} would be full. Uniformity and alignment: less is better, and both are 0 "
        f"for a constant. Nearest neighbours of raw pixels: {raw_accuracy(task)}.",
    )
    lab.figure(
        "training",
        training_figure(found),
        "Loss and relative deviation of the codes. The runs with the best loss are the ones that "
        "collapse, within some thirty steps.",
    )
    judge("least relative deviation of SimSiam", min(spread(SIMSIAM)), ">=", 0.5)
    judge("least relative deviation of BYOL", min(spread(BYOL_VARIANT)), ">=", 0.5)
    judge(
        "largest relative deviation without stop-gradient, predictor or both",
        max(value for variant in ABLATIONS for value in spread(variant)), "<=", 0.15,
    )  # fmt: skip
    judge(
        "largest relative deviation with the mean-view target, stopped or not, over SimSiam's",
        max(
            a / b
            for variant in (MEAN_VIEW, MEAN_VIEW_STOPPED)
            for a, b in zip(spread(variant), spread(SIMSIAM), strict=True)
        ), "<", 0.5,
    )  # fmt: skip
    best = mean([t.accuracy for t in found[SIMSIAM.name]])
    worst = mean([t.accuracy for name in ABLATIONS for t in found[name.name]])
    if task.test_labels is not None:
        lab.observe("accuracy of neighbours that the ablations lose", best - worst, "<", 0.1)
    lab.observe(
        "effective rank of the collapsed codes over that of SimSiam's",
        mean([t.metrics[-1].effective_rank for v in ABLATIONS for t in found[v.name]])
        / mean([t.metrics[-1].effective_rank for t in found[SIMSIAM.name]]), ">", 1.0,
    )  # fmt: skip
    predictor_rates(lab, task, steps, seeds[: lab.pick(smoke=1, quick=1, full=6)], found)


def predictor_rates(
    lab: Lab, task: Task, steps: int, seeds: list[int], found: dict[str, list[Trained]]
) -> None:
    """Report how far the encoder drifts where its predictor is slow."""
    rows, deviations = [], {}
    for rate in lab.progress((0.0, 0.1, 1.0, 10.0), "predictor rates"):
        variant = replace(SIMSIAM, predictor_rate=rate)
        trained = (
            found[SIMSIAM.name][: len(seeds)]
            if variant == SIMSIAM
            else [train(task, variant, seed, steps, lab.device) for seed in seeds]
        )
        rows.append(row(f"predictor {rate:g} ×", trained, -1))
        deviations[rate] = mean([t.metrics[-1].relative_std for t in trained])
    lab.table(
        "The predictor's learning rate",
        rows,
        f"SimSiam; the rate of its predictor is a multiple of the encoder's, {RATE}.",
    )
    lab.observe(
        "relative deviation with a predictor that does not learn, over SimSiam's",
        deviations[0.0] / deviations[1.0], "<", 1.0,
    )  # fmt: skip


def images(lab: Lab) -> Task:
    """Images in [0, 1], the user's or the digits."""
    data = lab.data.digits(held_out=TEST_IMAGES) if lab.data.path is None else lab.data.images()
    if len(data.train) < BATCH or len(data.test) < 2:
        raise DataError(
            f"the study needs at least {BATCH} images to train on and 2 to test, "
            f"got {len(data.train)} and {len(data.test)}"
        )
    (train, train_labels), (test, test_labels) = (
        (
            ((split.images[:limit] + 1) / 2).to(lab.device),
            None if split.labels is None else split.labels[:limit].to(lab.device),
        )
        for split, limit in ((data.train, 10_000), (data.test, TEST_IMAGES))
    )
    return Task(train, test, train_labels, test_labels)


def encoder_for(task: Task) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(task.train[0].numel(), 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, CODE),
    )


def train(task: Task, variant: Variant, seed: int, steps: int, device: torch.device) -> Trained:
    """Train one encoder; every variant sees the same start, batches and views."""
    with seeded(seed):
        encoder = encoder_for(task)
        predictor = prediction_head(CODE, CODE // 2) if variant.predictor else None
        model = (
            BYOL(encoder, predictor=predictor, momentum=0.98)
            if variant.teacher
            else SimSiam(encoder, predictor=predictor, stop_gradient=variant.stop_gradient)
        ).to(device)
    groups: list[dict[str, Any]] = [
        {"params": list(model.encoder.parameters())},
        {"params": list(model.predictor.parameters()), "lr": RATE * variant.predictor_rate},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], lr=RATE, momentum=0.9, weight_decay=1e-4
    )
    generator = torch.Generator().manual_seed(seed)
    every = max(1, steps // 25)
    marks: list[int] = []
    losses: list[float] = []
    metrics: list[CollapseMetrics] = []
    for step, batch in enumerate(batches(task.train, steps + 1, generator)):
        looks = step % every == 0 or step == steps
        if looks:
            metrics.append(measured(model, task, seed))
        one = view(batch, generator)
        if variant.mean_view:
            loss = mean_view_loss(model, batch, one, generator, variant)
        else:
            loss = model(one, view(batch, generator)).loss
        if looks:
            marks.append(step)
            losses.append(loss.item())
        if step == steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model, BYOL):
            model.update_teacher()
    accuracy = neighbours(codes(model, task.train), codes(model, task.test), task)
    return Trained(marks, losses, metrics, accuracy)


def mean_view_loss(
    model: SimSiam, batch: Tensor, one: Tensor, generator: torch.Generator, variant: Variant
) -> Tensor:
    """The article's question: the code of a view against that of the mean of several."""
    views = view(batch.repeat(MEAN_OF, 1, 1, 1), generator)
    mean_of_views = views.unflatten(0, (MEAN_OF, -1)).mean(0)
    target = model.embed(mean_of_views)
    if variant.stop_gradient:
        target = target.detach()
    return negative_cosine_similarity(model.embed(one), target)


def batches(images: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.empty(0, dtype=torch.long)
    for _ in range(count):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        yield images[order[:BATCH].to(images.device)]
        order = order[BATCH:]


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by at most one pixel, change the brightness by 30 %, add noise of 0.1."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(3, (2, n, 1), generator=generator).to(images.device)
    across = torch.arange(width, device=images.device) + right
    along = torch.arange(height, device=images.device) + down
    sample = torch.arange(n, device=images.device)[:, None, None]
    shifted = padded[sample, :, along[:, :, None], across[:, None, :]].movedim(-1, 1)
    brightness = (0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=generator)).to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return brightness * shifted + 0.1 * noise


@torch.no_grad()
def codes(model: SimSiam, images: Tensor) -> Tensor:
    model.eval()
    embedded = model.embed(images)
    model.train()
    return embedded


def measured(model: SimSiam, task: Task, seed: int) -> CollapseMetrics:
    """Metrics of the test images, with the alignment of the same views each time."""
    looked = view(task.test, torch.Generator().manual_seed(seed))
    return collapse_metrics(codes(model, task.test), codes(model, looked), max_pairs=TEST_IMAGES)


def neighbours(train: Tensor, test: Tensor, task: Task) -> float:
    """Share of test images whose nearest codes, by angle, have their class in the majority."""
    if task.train_labels is None or task.test_labels is None:
        return math.nan
    unit = partial(nn.functional.normalize, dim=1)
    nearest = (unit(test.double()) @ unit(train.double()).T).topk(NEIGHBOURS).indices
    voted = task.train_labels[nearest].mode(1).values
    return (voted == task.test_labels).double().mean().item()


def start(task: Task, seeds: list[int]) -> float | None:
    """Accuracy of the codes of networks that were not trained."""
    if task.test_labels is None:
        return None
    found = []
    for seed in seeds:
        with seeded(seed):
            model = SimSiam(encoder_for(task)).to(task.train.device)
        found.append(neighbours(codes(model, task.train), codes(model, task.test), task))
    return mean(found)


def raw_accuracy(task: Task) -> str:
    accuracy = neighbours(task.train.flatten(1), task.test.flatten(1), task)
    return "unknown" if math.isnan(accuracy) else f"{accuracy:.3f}"


def row(name: str, trained: list[Trained], at: int) -> dict[str, Any]:
    """Means over the seeds, at one of the moments that were looked at."""
    looked = [t.metrics[at] for t in trained]
    accuracy = mean([t.accuracy for t in trained])
    return {
        "training": name,
        "loss": mean([t.losses[at] for t in trained]),
        "relative deviation": mean([m.relative_std for m in looked]),
        "mean cosine": mean([m.mean_cosine for m in looked]),
        "effective rank": mean([m.effective_rank for m in looked]),
        "uniformity": mean([m.uniformity for m in looked]),
        "alignment": mean([m.alignment for m in looked]),
        f"{NEIGHBOURS}-nn accuracy": None if math.isnan(accuracy) else accuracy,
    }


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def training_figure(found: dict[str, list[Trained]]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), sharex=True, layout="constrained")
    styles = ("-", "-", "--", "--", "--", ":", ":")
    for i, ((name, trained), style) in enumerate(zip(found.items(), styles, strict=True)):
        steps = trained[0].steps
        losses = np.mean([t.losses for t in trained], axis=0)
        deviations = np.mean([[m.relative_std for m in t.metrics] for t in trained], axis=0)
        axes[0].plot(steps, losses, style, color=f"C{i}", label=name)
        axes[1].plot(steps, deviations, style, color=f"C{i}", label=name)
    axes[0].set_ylabel("loss")
    axes[1].set_ylabel("relative deviation")
    for axis in axes:
        axis.set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def linear_networks(lab: Lab) -> None:
    """Train linear networks on samples and compare them with one mode of the flow."""
    steps = lab.pick(smoke=50, quick=4000, full=15_000)
    threshold = weight_decay_threshold(augmentation_variance=AUGMENTATION)
    decays = (0.0, threshold / 2, 1.5 * threshold)
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    rows = []
    for i, decay in enumerate(lab.progress(decays, "linear networks")):
        at, sizes = linear_network(lab, decay, steps)
        # A loss without its ½ makes each step twice as long.
        times = 2 * LINEAR_RATE * at
        mode = mode_trajectory(
            times, predictor=0.6, encoder=0.6, augmentation_variance=AUGMENTATION,
            weight_decay=decay,
        )  # fmt: skip
        flow = np.abs(mode.encoder)
        rows.append(
            {
                "weight decay": decay,
                "over its threshold": decay / threshold,
                "$\\|W\\|$ of the network": sizes[-1],
                "$\\|W\\|$ of the flow": flow[-1],
                "largest deviation": float(np.max(np.abs(sizes / flow - 1))),
            }
        )
        axis.plot(times, sizes, color=f"C{i}", label=f"w = {decay:g}")
        axis.plot(times, flow, ":", color="black")
    axis.set_xlabel("time")
    axis.set_ylabel("size of the encoder, per direction")
    axis.legend()
    lab.table(
        "A linear network and the flow",
        rows,
        f"{steps} steps of rate {LINEAR_RATE} on 256 fresh pairs each, augmentation variance "
        f"{AUGMENTATION}; sizes are $\\|W\\|_F / \\sqrt 3$ for three equal modes. The deviation is "
        "relative, the largest along the way.",
    )
    lab.figure(
        "linear",
        figure,
        "Trained networks (lines) and the flow (dotted). Above the threshold decay wins.",
    )
    lab.claim(
        "largest relative deviation of $\\|W\\|$ from the flow",
        max(r["largest deviation"] for r in rows), "<=", 0.02,
    )  # fmt: skip


def linear_network(lab: Lab, decay: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Train three equal modes; return moments and sizes of the encoder."""
    width, dim = 3, 4
    encoder, predictor = nn.Linear(dim, width, bias=False), nn.Linear(width, width, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(0.6 * torch.eye(width, dim))
        predictor.weight.copy_(0.6 * torch.eye(width))
    model = SimSiam(encoder, predictor=predictor, loss="mse").to(lab.device)
    # The optimiser adds decay·W to a gradient that is twice that of the flow.
    optimizer = torch.optim.SGD(model.parameters(), lr=LINEAR_RATE, weight_decay=2 * decay)
    generator = lab.generator()
    at, sizes = [], []
    for step in range(steps + 1):
        if step % (steps // 50) == 0:
            at.append(step)
            sizes.append(torch.linalg.norm(encoder.weight.detach()).item() / math.sqrt(width))
        x, *noise = torch.randn(3, 256, dim, generator=generator).to(lab.device)
        one, two = (x + math.sqrt(AUGMENTATION) * n for n in noise)
        optimizer.zero_grad()
        model(one, two).loss.backward()
        optimizer.step()
    return np.array(at), np.array(sizes)
