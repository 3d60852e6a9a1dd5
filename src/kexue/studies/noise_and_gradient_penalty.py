r"""Random noise, gradient penalties and virtual adversaries.

A network that reacts strongly to small changes of its input generalises badly. Against that people
add noise to inputs or weights, penalise gradients, train on adversarial examples, or on *virtual*
adversarial examples, which need no labels. These look like four ideas. To second order they are
one, and the constants by which one turns into another are known.

## Noise on the loss

Let $f(x) \in \mathbb{R}^K$ be the output, $l(F, y) \ge 0$ the loss, and $\varepsilon$ noise with
independent components of mean 0 and variance $s^2$. Taylor's formula gives

$$E\, l(f(x + \varepsilon), y) = l(f(x), y) + \frac{s^2}{2} \Delta_x\, l(f(x), y) + O(s^4).$$

A Laplacian is no friendly regulariser: it takes second derivatives, it may be negative, and a
network of ReLUs has none almost everywhere. For the squared error it is
$2 \sum_i |\nabla f_i|^2 + 2 \sum_i (f_i - y_i) \Delta f_i$, and the second part should vanish on
average where $f$ is right. That much is Bishop's theorem.

## Noise on the outputs

The key move is to change the target: instead of $l(f(x + \varepsilon), y)$ take
$l(f(x), y) + l(f(x + \varepsilon), f(x))$. For a metric that is an upper bound, by the triangle
inequality; for the squared error half of it is,

$$|f(x+\varepsilon) - y|^2 \le 2\, |f(x+\varepsilon) - f(x)|^2 + 2\, |f(x) - y|^2.$$

The new term contains no label, so that unlabelled samples serve as well. And where $l(F, y)$ has
its minimum 0 at $F = y$, all second derivatives of $f$ drop out:

$$E\, l(f(x + \varepsilon), f(x)) = s^2 G(x) + O(s^4), \qquad
G = \tfrac12 \operatorname{tr} J^\top \Lambda J,$$

with the Jacobian $J$ of $f$ and $\Lambda = \partial^2 l / \partial F^2$ at $F = y$. So
$G = \sum_i |\nabla f_i|^2$ for the squared distance, $G = \frac12 \sum_k p_k |\nabla \log p_k|^2$
for the divergence of softmax distributions $p$, which is half the trace of the Fisher information
of the input, and $G = \frac12 \sum_k p_k (1 - p_k) |\nabla z_k|^2$ for independent logits $z$.

One step is easily missed. The derivative of $\sum_k p_k \log (p_k / F_k)$ in $F_k$ is $-1$ at
$F = p$, not 0. The term vanishes all the same, because $\sum_k F_k = 1$ makes the gradients and the
Hessians of the $F_k$ sum to zero; with unnormalised outputs it would not.

**Noise of standard deviation $s$ is the gradient penalty with coefficient $s^2$.**

## The worst direction instead of the mean

Adversarial training moves along the gradient $g$ of the labelled loss. A step of length
$\epsilon$ adds $\epsilon |g|$: this, too, is a gradient penalty, on the loss and not on the
outputs. Virtual adversarial training (VAT) looks for the direction in which the *outputs* move
most. The first-order term is zero there, so

$$l(f(x + r), f(x)) \approx \tfrac12 r^\top H r, \qquad H = J^\top \Lambda J,$$

and the worst $r$ is the principal eigenvector of $H$, found by power iteration
$u \leftarrow H u / |H u|$ from a random start. At a norm of $\epsilon$ in $d$ dimensions a random
direction is worth $\epsilon^2 G / d$ on average and the worst one
$\epsilon^2 \lambda_{max} / 2$: by targeting one gains the factor $d \lambda_{max} / (2 G)$,
between $d / \operatorname{rank} H$ and $d$. What a random direction does at norm $\epsilon$, VAT
does at a norm smaller by the root of that factor.

## Is the clean output a constant?

VAT treats $f(x)$ in $l(f(x + r), f(x))$ as a constant, and the article's footnote takes that for a
change of higher order. The loss does not change, but its gradient in the parameters does: averaged
over noise, attached it is $s^2 \nabla_\theta |J|_F^2$, and detached it has the additional term
$s^2 \sum_i (\Delta f_i) \nabla_\theta f_i$, of the same order. For $f = t x^2$ the two are
$2 t s^2 (4 x^2 + 3 s^2)$ and $2 t s^2 (5 x^2 + 3 s^2)$, exactly.

## What decides it

*The expansion.* On a trained network with softplus activations, $E\, l / (s^2 G)$ is measured for
all three metrics. It must go to one, and its distance from one must fall with the square of $s$.

*The strengths.* Handwritten digits with five labels a class, and the rest of the training set
without labels. Noise of norm 2 in 64 dimensions has $s^2 = 4 / 64$; it must do as much for the test
accuracy as the gradient penalty with coefficient 0.0625, and both must help.

*The targeting.* At the same small norm, 0.25, VAT must clearly beat noise, and a second power
iteration must hardly matter.

The reader should also see what VAT is not: noise of eight times its norm is as good. The gain is a
better aim, not a better place to arrive at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.functional import cross_entropy

from kexue.lab import DataError, Lab, seeded
from kexue.models.mlp import MLP
from kexue.training.regularization import (
    VirtualAdversarialLoss,
    adversarial_perturbation,
    consistency_loss,
    gradient_penalty,
    noisy_loss,
    virtual_adversarial_perturbation,
)
from kexue.training.regularization.divergence import Metric

LABELS_A_CLASS = 5
TEST_SAMPLES = 500
UNLABELLED_BATCH = 128
LEARNING_RATE = 1e-3
HIDDEN = (128, 128)
METRICS: tuple[Metric, ...] = ("euclidean", "categorical", "bernoulli")

SMALL, LARGE = 0.25, 2.0
"""Norms at which targeting and the equivalence of strengths are decided."""

Regularizer = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Task:
    """Few labelled samples, many without labels, and a test set."""

    labelled: tuple[Tensor, Tensor]
    unlabelled: Tensor
    test: tuple[Tensor, Tensor]
    classes: int

    @property
    def features(self) -> int:
        return self.unlabelled.shape[1]


@dataclass(frozen=True)
class Arm:
    """A way to train: the supervised loss, and what is added on unlabelled samples."""

    name: str
    added: Regularizer | None = None
    supervised: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor] = (
        lambda model, x, y, generator: cross_entropy(model(x), y)
    )


def run(lab: Lab) -> None:
    features, labels = read_samples(lab)
    seeds = lab.pick(smoke=range(1), quick=range(3), full=range(10))
    steps = lab.pick(smoke=4, quick=300, full=400)
    tasks = [split(features, labels, lab.seed + seed, lab.device) for seed in seeds]
    # The thresholds are those of the digits; on a user's data the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe

    expansion(lab, tasks[0], steps, judge)
    detached_targets(lab)

    arms = arms_of(lab, tasks[0].features)
    accuracy = {
        arm.name: lab.cache(
            f"arm-{number}",
            partial(train_all, lab, arm, tasks, steps),
            inputs={"name": arm.name, "steps": steps},
        )["accuracy"]
        for number, arm in enumerate(lab.progress(arms, "training"))
    }
    report(lab, accuracy, steps)
    equivalent = penalty_name(LARGE**2 / tasks[0].features)
    judge_training(lab, accuracy, equivalent, judge)


def judge_training(lab: Lab, accuracy: dict[str, Tensor], equivalent: str, judge: Callable) -> None:
    mean = {name: values.mean().item() for name, values in accuracy.items()}
    supervised, penalised = mean["supervised only"], mean[equivalent]
    large, small = mean[noise_name(LARGE)], mean[noise_name(SMALL)]
    once, twice = mean[vat_name(SMALL)], mean["VAT, norm 0.25, 2 iterations"]
    judge(
        "noise of norm 2 and the penalty with coefficient $2^2/d$ differ in accuracy by",
        abs(large - penalised), "<=", 0.02,
    )  # fmt: skip
    judge("noise of norm 2 beats the supervised loss by", large - supervised, ">=", 0.03)
    judge("the gradient penalty beats the supervised loss by", penalised - supervised, ">=", 0.03)
    judge("at norm 0.25 VAT beats noise by", once - small, ">=", 0.02)
    judge("at norm 0.25 VAT beats the supervised loss by", once - supervised, ">=", 0.03)
    judge("a second power iteration changes the accuracy by", abs(twice - once), "<=", 0.02)
    lab.observe("noise of norm 2 comes as far as VAT of norm 0.25", large - once, ">=", -0.02)


# Samples.


def read_samples(lab: Lab) -> tuple[Tensor, Tensor]:
    """Return features in [0, 1] and classes: the digits, the user's images, or their table."""
    path = lab.data.path
    if path is not None and path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        images = lab.data.images()
        if images.train.labels is None:
            raise DataError(f"{path}: expected images with labels, there are none")
        return (images.train.images.flatten(1) + 1) / 2, images.train.labels
    table = lab.data.tabular("digits" if path is None else None)
    if not table.target_names:
        raise DataError(f"{path}: expected names of classes in the last column, got numbers")
    features = torch.from_numpy(table.features).float()
    low, high = features.amin(), features.amax()
    return (features - low) / (high - low), torch.from_numpy(table.target).long()


def split(features: Tensor, labels: Tensor, seed: int, device: torch.device) -> Task:
    """Hold out a test set, and keep five labels a class of the rest."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held_out = min(TEST_SAMPLES, len(order) // 3)
    test, train = order[:held_out], order[held_out:]
    classes = int(labels.max()) + 1
    chosen = [train[labels[train] == label][:LABELS_A_CLASS] for label in range(classes)]
    if min(len(members) for members in chosen) < LABELS_A_CLASS:
        raise DataError(f"expected at least {LABELS_A_CLASS} training samples of every class")
    known = torch.cat(chosen)
    x, y = features.to(device), labels.to(device)
    return Task((x[known], y[known]), x[train], (x[test], y[test]), classes)


# Training.


def noise_name(norm: float) -> str:
    return f"noise, norm {norm:g}"


def vat_name(norm: float) -> str:
    return f"VAT, norm {norm:g}"


def penalty_name(coefficient: float) -> str:
    return f"penalty, coefficient {coefficient:g}"


def arms_of(lab: Lab, features: int) -> list[Arm]:
    """Return what is compared; the full budget adds what only rounds off the picture."""

    def virtual(epsilon: float, iterations: int = 1, detach_target: bool = True) -> Regularizer:
        loss = VirtualAdversarialLoss(
            epsilon=epsilon, iterations=iterations, detach_target=detach_target
        )
        return lambda model, x, generator: loss(model, x, generator=generator)

    def penalty(coefficient: float) -> Regularizer:
        return lambda model, x, generator: (
            coefficient
            * gradient_penalty(
                model, x, metric="categorical", estimator="rademacher", generator=generator
            )
        )

    def fast_gradient(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        r = adversarial_perturbation(
            lambda v: cross_entropy(model(v), y, reduction="none"), x, epsilon=0.5
        )
        return cross_entropy(model(x), y) + cross_entropy(model(x + r), y)

    def supervised_noise(
        model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> Tensor:
        return noisy_loss(
            lambda v: cross_entropy(model(v), y, reduction="none"),
            x,
            standard_deviation=1 / 8,
            generator=generator,
        )

    norms = (SMALL, 0.5, LARGE)
    arms = [
        Arm("supervised only"),
        *(Arm(noise_name(norm), virtual(norm, iterations=0)) for norm in norms),
        *(Arm(vat_name(norm), virtual(norm)) for norm in (SMALL, 0.5)),
        Arm("VAT, norm 0.25, 2 iterations", virtual(SMALL, iterations=2)),
        Arm("VAT, norm 0.25, attached target", virtual(SMALL, detach_target=False)),
        Arm(penalty_name(LARGE**2 / features), penalty(LARGE**2 / features)),
    ]
    if lab.budget != "full":
        return arms
    return [
        *arms,
        Arm(noise_name(1.0), virtual(1.0, iterations=0)),
        *(Arm(vat_name(norm), virtual(norm)) for norm in (1.0, LARGE)),
        Arm("VAT, norm 0.5, 2 iterations", virtual(0.5, iterations=2)),
        *(Arm(penalty_name(c), penalty(c)) for c in (1 / features, 16 / features, 64 / features)),
        Arm("FGM on the labelled samples, norm 0.5", supervised=fast_gradient),
        Arm("noise on the labelled samples, s = 1/8", supervised=supervised_noise),
    ]


def new_model(task: Task, seed: int, activation: str = "relu") -> MLP:
    with seeded(seed):
        return MLP(task.features, HIDDEN, task.classes, activation=activation)


def train(
    lab: Lab, arm: Arm, task: Task, steps: int, seed: int, activation: str = "relu"
) -> nn.Module:
    """All arms of a seed share their start and the order of their samples."""
    model = new_model(task, seed, activation).to(lab.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    batches = torch.Generator().manual_seed(seed)
    noise = torch.Generator(lab.device).manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(task.unlabelled), (UNLABELLED_BATCH,), generator=batches)
        loss = arm.supervised(model, *task.labelled, noise)
        if arm.added is not None:
            loss = loss + arm.added(model, task.unlabelled[chosen.to(lab.device)], noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def train_all(lab: Lab, arm: Arm, tasks: list[Task], steps: int) -> dict[str, Tensor]:
    accuracies = []
    for seed, task in enumerate(tasks):
        model = train(lab, arm, task, steps, lab.seed + seed)
        x, y = task.test
        with torch.no_grad():
            accuracies.append((model(x).argmax(1) == y).double().mean())
    return {"accuracy": torch.stack(accuracies)}


def report(lab: Lab, accuracy: dict[str, Tensor], steps: int) -> None:
    supervised = accuracy["supervised only"]
    rows = []
    for name, values in accuracy.items():
        gain = values - supervised
        error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else None
        rows.append(
            {
                "training": name,
                "test accuracy": round(values.mean().item(), 4),
                "gain": round(gain.mean().item(), 4),
                "standard error of the gain": None if error is None else round(error, 4),
            }
        )
    lab.table(
        "Test accuracy with five labels a class",
        rows,
        f"Means over {len(supervised)} seeds, {steps} steps; each seed has its own split and "
        "start, shared by all rows. Noise has a fixed norm and a random direction.",
    )

    figure, axes = plt.subplots(figsize=(6, 3.8))
    for kind, marker in (("noise", "o"), ("VAT", "s")):
        norms = [n for n in (SMALL, 0.5, 1.0, LARGE) if f"{kind}, norm {n:g}" in accuracy]
        means = [accuracy[f"{kind}, norm {n:g}"].mean().item() for n in norms]
        axes.plot(norms, means, marker=marker, label=kind)
    axes.axhline(supervised.mean().item(), color="0.5", linestyle="--", label="supervised only")
    axes.set_xscale("log", base=2)
    axes.set_xticks([SMALL, 0.5, 1.0, LARGE], ["0.25", "0.5", "1", "2"])
    axes.set_xlabel("norm of the perturbation")
    axes.set_ylabel("test accuracy")
    axes.legend()
    lab.figure(
        "accuracy",
        figure,
        "A random direction needs several times the norm of the targeted one to do the same, and "
        "then does the same.",
    )


# The expansion.


def expansion(lab: Lab, task: Task, steps: int, judge: Callable) -> None:
    """Measure E l / (s² G) on a smooth network, trained like the others."""
    state = lab.cache(
        "smooth-network",
        lambda: train(lab, Arm("smooth"), task, steps, lab.seed, "softplus").state_dict(),
        inputs={"steps": steps},
    )
    model = new_model(task, lab.seed, "softplus")
    model.load_state_dict(state)
    model = model.double().to(lab.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    samples, draws = lab.pick(smoke=(2, 50), quick=(8, 400), full=(16, 2000))
    x = task.test[0][:samples].double()

    deviations = [0.02 * 2**k for k in range(-3, 7)]
    rows, slopes, at_small, figure_lines = [], {}, {}, {}
    for metric in METRICS:
        ratios = [ratio(model, x, metric, s, draws, lab.generator(lab.device)) for s in deviations]
        excess = [abs(value - 1) for value in ratios]
        # Up to s = 0.04 the next order is small; what follows shows where the expansion ends.
        slopes[metric] = slope(deviations[:5], excess[:5])
        at_small[metric] = excess[deviations.index(0.02)]
        figure_lines[metric] = excess
        rows.append(
            {
                "metric": metric,
                **{f"s = {deviations[k]:g}": round(ratios[k], 5) for k in range(1, 10, 2)},
                "slope": round(slopes[metric], 3),
            }
        )
    lab.table(
        "Mean divergence under noise, divided by $s^2 G$",
        rows,
        f"Means over {samples} test samples and {draws} pairs of opposite noise each. The slope is "
        "that of the distance from one in logarithms, up to $s = 0.04$.",
    )
    judge(
        "at $s = 0.02$ the ratio $E\\,l/(s^2 G)$ of every metric is off one by at most",
        max(at_small.values()), "<=", 0.02,
    )  # fmt: skip
    judge(
        "the slope of $|E\\,l/(s^2 G) - 1|$ against $s$ is two for every metric, up to",
        max(abs(value - 2) for value in slopes.values()), "<=", 0.2,
    )  # fmt: skip
    targeting(lab, model, x)

    figure, axes = plt.subplots(figsize=(6, 3.8))
    for metric, marker in zip(METRICS, "os^", strict=True):
        axes.loglog(deviations, figure_lines[metric], marker=marker, label=metric)
    reference = [figure_lines["euclidean"][0] * (s / deviations[0]) ** 2 for s in deviations]
    axes.loglog(deviations, reference, color="0.5", linestyle="--", label="slope 2")
    axes.set_xlabel(r"standard deviation $s$ of the noise")
    axes.set_ylabel(r"$|E\,l/(s^2G) - 1|$")
    axes.legend()
    lab.figure(
        "expansion",
        figure,
        "The distance of $E\\,l/(s^2 G)$ from one falls with the square of $s$, until the noise is "
        "so strong that no expansion holds. A dip is a change of sign.",
    )


def ratio(
    model: nn.Module, x: Tensor, metric: Metric, s: float, draws: int, generator: torch.Generator
) -> float:
    """Return E l / (s² G), from pairs of opposite noise and with the quadratic form as control.

    The form rᵀHr/2 is nearly all that varies in l. Its mean is known from a Jacobian that is
    computed by other means than G, so that a wrong G would show.
    """
    jacobian = vmap(jacrev(lambda one: model(one[None])[0]))(x)
    root = curvature_root(model(x), metric)
    # rᵀHr = |root J r|² with Λ = rootᵀ root.
    half = root @ jacobian
    known = s**2 * half.square().sum((1, 2)) / 2
    many = x.expand(draws, *x.shape)
    r = s * torch.randn(many.shape, generator=generator, dtype=x.dtype, device=x.device)
    form = (half @ r[..., None]).square().sum((2, 3)) / 2
    losses = [
        consistency_loss(
            model, many.flatten(0, 1), signed.flatten(0, 1), metric=metric, reduction="none"
        )
        for signed in (r, -r)
    ]
    mean = known.mean() + (torch.stack(losses).mean(0) - form.flatten()).mean()
    penalty = gradient_penalty(model, x, metric=metric, create_graph=False)
    return (mean / (s**2 * penalty)).item()


def curvature_root(outputs: Tensor, metric: Metric) -> Tensor:
    """Return a matrix a sample whose square is the second derivative of the divergence."""
    if metric == "euclidean":
        return math.sqrt(2) * torch.eye(outputs.shape[1], dtype=outputs.dtype).expand(
            len(outputs), -1, -1
        ).to(outputs.device)
    if metric == "bernoulli":
        p = outputs.sigmoid()
        return torch.diag_embed((p * (1 - p)).sqrt())
    p = outputs.softmax(1)
    # diag p - p pᵀ = rootᵀ root for root = diag √p (1 - 1 pᵀ).
    centred = torch.eye(p.shape[1], dtype=p.dtype, device=p.device) - p[:, None, :]
    return p.sqrt()[:, :, None] * centred


def slope(x: list[float], y: list[float]) -> float:
    """Slope of the line of least squares through logarithms."""
    a, b = torch.tensor(x).double().log(), torch.tensor(y).double().log()
    return ((a - a.mean()) @ (b - b.mean()) / (a - a.mean()).square().sum()).item()


def targeting(lab: Lab, model: nn.Module, x: Tensor) -> None:
    """Set the loss along targeted directions beside that along random ones."""
    dimension, norm = x.shape[1], 0.02
    jacobian = vmap(jacrev(lambda one: model(one[None])[0]))(x)
    half = curvature_root(model(x), "categorical") @ jacobian
    largest = torch.linalg.matrix_norm(half, 2).square()
    penalty = gradient_penalty(model, x, metric="categorical", reduction="none")
    random = norm**2 * penalty / dimension
    rows = []
    for iterations in (0, 1, 2, 8):
        r = virtual_adversarial_perturbation(
            model, x, epsilon=norm, iterations=iterations, generator=lab.generator(lab.device)
        )
        gain = consistency_loss(model, x, r, reduction="none") / random
        rows.append(
            {"power iterations": str(iterations), "median gain": round(gain.median().item(), 2)}
        )
    bound = (dimension * largest / (2 * penalty)).median().item()
    rows.append({"power iterations": "eigenvector, d λ/(2G)", "median gain": round(bound, 2)})
    lab.table(
        "What targeting gains",
        rows,
        f"Divergence at norm {norm:g}, divided by its mean over random directions, "
        "$\\epsilon^2 G/d$.",
    )


def detached_targets(lab: Lab) -> None:
    """Gradients of f = t x² in t, by quadrature, attached and detached."""
    x, s = 0.9, 0.1
    # Three points integrate polynomials of fifth degree against a normal density, and |r|⁴ is all
    # that occurs.
    node = math.sqrt(3) * s
    perturbation = torch.tensor([[-node], [0.0], [node]], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    rows = []
    for name, detach, factor in (("attached", False, 4), ("detached", True, 5)):
        t = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        losses = consistency_loss(
            partial(parabola, t),
            torch.full_like(perturbation, x),
            perturbation,
            metric="euclidean",
            detach_target=detach,
            reduction="none",
        )
        loss = weights @ losses
        (gradient,) = torch.autograd.grad(loss, t)
        rows.append(
            {
                "target": name,
                "loss": round(loss.item(), 10),
                "gradient in t": round(gradient.item(), 10),
                "closed form": round(2 * t.item() * s**2 * (factor * x**2 + 3 * s**2), 10),
            }
        )
    lab.table(
        "Attached and detached targets",
        rows,
        f"$f = t x^2$ at $t = 0.8$, $x = {x}$, averaged over noise with $s = {s}$: one loss, two "
        "gradients.",
    )


def parabola(t: Tensor, x: Tensor) -> Tensor:
    return t * x**2
