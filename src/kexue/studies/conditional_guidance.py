r"""Conditional control of diffusion sampling.

A finished diffusion model draws digits, but not the digit one wants. There are two ways to ask
for one: change the sampling with the gradient of a classifier, which needs no new training of the
model, or train with the label and amplify it. Both are one line of a formula, and both are easy to
get subtly wrong. Which form works for which sampler, what does the scale do, and what
distribution do the samples come from?

## Bayes for one step

A step back goes from $x_t$ to $x_s$, $s < t$. With a condition $y$,

$$p(x_s \mid x_t, y) = p(x_s \mid x_t)\, \exp\big(\log p(y \mid x_s) - \log p(y \mid x_t)\big),$$

because noise does not help to classify: $p(y \mid x_s, x_t) = p(y \mid x_s)$. The step is a
Gaussian $\mathcal N(\mu, \sigma^2 I)$, and $x_s$ is close to $x_t$, so the exponent is nearly
$(x_s - x_t) \cdot \nabla_{x_t} \log p(y \mid x_t)$. Completing the square moves the mean:

$$x_s = \mu + \sigma^2 \gamma\, \nabla_{x_t} \log p(y \mid x_t) + \sigma \varepsilon .$$

This **mean shift** is in proportion to the variance of the step. A sampler without noise, DDIM for
instance, has $\sigma = 0$ and is not steered at all.

## The general form

Every reverse process of the same marginals, noisy or not, depends on the data through the score
only. So it is the score that has to change,
$\nabla \log p(x \mid y) = \nabla \log p(x) + \nabla \log p(y \mid x)$, or in terms of the noise

$$\tilde\varepsilon = \hat\varepsilon(x_t)
- \bar\beta_t\, \gamma\, \nabla_{x_t} \log p(y \mid x_t).$$

For $\eta = 1$ the two forms agree to first order: the ratio of the shifts is
$\bar\alpha_s / \bar\alpha_t$ for the larger of DDPM's two variances. Near $\bar\alpha_t = 0$ the
second form multiplies an error of the gradient by $\bar\beta_t^2 / \bar\alpha_t$ on its way to
$\hat x_0$, which on the cosine schedule is $2 \cdot 10^4$; hence $\hat x_0$ is clamped to the
range of the data *after* guidance.

A classifier that has only seen clean images can be asked about $\hat x_0(x_t)$ instead of $x_t$,
with the gradient taken through the denoiser.

## What the scale is not

$\gamma \nabla \log p(y \mid x)$ is often read as the gradient of a sharpened classifier
$p^\gamma / Z$. But $Z(x_t) = \sum_y p^\gamma(y \mid x_t)$ depends on $x_t$, so that gradient is
$\gamma \nabla \log p - \nabla \log Z$. The article's way out is not to insist on Bayes: *define*

$$p(x_s \mid x_t, y) \propto p(x_s \mid x_t)\, \exp\big(\gamma\, \mathrm{sim}(x_s, y)\big)$$

for any similarity, of which $\log p(y \mid x)$ is one; the same expansion gives the same shift.

**Without a classifier**, train $\hat\varepsilon(x, y)$ with $y$ replaced by a null condition
$\varnothing$ now and then; the two predictions imply a classifier, and

$$\tilde\varepsilon = \hat\varepsilon(x_t, \varnothing)
+ \gamma \big(\hat\varepsilon(x_t, y) - \hat\varepsilon(x_t, \varnothing)\big).$$

Papers often count from the other end, $w = \gamma - 1$.

## What guided samplers sample

Take Gaussians: conditional variance $v$, unconditional variance $V$, means zero. The density
$p(x \mid y)^\gamma p(x)^{1-\gamma}$ that one may have in mind has variance
$1/\big((1-\gamma)/V + \gamma/v\big)$. The deterministic flow ends with another one,

$$V^{1-\gamma} v^{\gamma},$$

and the noisy chain with a third,
$P(0) \int_0^\infty \mathrm du / P(u)$, where $P(u) = (V+u)^{2(1-\gamma)} (v+u)^{2\gamma}$. They
agree at $\gamma = 1$ only. An amplified condition has no sampler-free meaning.

## What decides it

On images, a judge that took no part in the guidance, a support vector machine with an RBF kernel
trained on clean images, says how many samples are of the class that was asked for, and the
variance within classes says how diverse they are. A larger scale should buy accuracy with
diversity, for noisy and for deterministic sampling. At $\eta = 0$ the mean shift must do no better
than chance while the other form works. The clean classifier must do better through the denoiser
than on noisy images. And the flow of Gaussians must end with $V^{1-\gamma} v^\gamma$.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.svm import SVC
from torch import Tensor, nn

from kexue.generative.diffusion import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    GaussianMixtureDenoiser,
    HeatSchedule,
    ImageDenoiser,
    MeanShiftGuidance,
    class_log_probability,
    sample,
    sample_times,
)
from kexue.lab import Lab, NotRun, seeded
from kexue.lab.data import Images
from kexue.lab.sheets import sheet_figure
from kexue.models import MLP, MLPDenoiser
from kexue.studies._diffusion import trained_denoiser

UNCONDITIONAL, CONDITIONAL = 0, 1
VARIANCES = {UNCONDITIONAL: 1.25, CONDITIONAL: 0.25}
SCALES = (1.0, 3.0, 10.0)
CLIP = (-1.0, 1.0)
LEAST_ACCURACY = 0.5

# The names of the forms, as they stand in the tables.
NOISY = "noisy classifier"
SHARPENED = "noisy classifier, sharpened p^γ/Z"
SHIFT = "noisy classifier, mean shift"
CLEAN_THROUGH = "clean classifier, through the denoiser"
CLEAN_ON_NOISY = "clean classifier, on noisy images"
FREE = "classifier-free"
UNCLIPPED = "noisy classifier, not clipped"

Row = dict[str, Any]


def run(lab: Lab) -> None:
    error = gaussians(lab)
    lab.claim(
        r"relative error of the flow's variance against $V^{1-\gamma} v^\gamma$ at γ = 2",
        error,
        "<=",
        0.03,
    )

    images = lab.data.images()
    if images.train.labels is None:
        raise NotRun("conditional control needs images with labels, got none beside them")
    rows = controlled(lab, images)
    accuracy = {(row["form"], row["η"], row["γ"]): row["accuracy"] for row in rows}
    variance = {(row["form"], row["η"], row["γ"]): row["variance within classes"] for row in rows}
    # The criterion is about digits; the user's own images are reported.
    judge = lab.claim if lab.data.path is None else lab.observe
    trend = judge if lab.budget == "full" else lab.observe

    def steps(of: dict[tuple[str, int, float], float]) -> list[float]:
        return [
            of[NOISY, eta, after] - of[NOISY, eta, before]
            for eta in (0, 1)
            for before, after in pairwise(SCALES)
        ]

    trend("smallest increase of accuracy along γ, η = 0 and 1", min(steps(accuracy)), ">", 0.0)
    trend("largest change of variance along γ, η = 0 and 1", max(steps(variance)), "<", 0.0)
    reached = min(accuracy[NOISY, eta, 10.0] for eta in (0, 1))
    trend("smaller accuracy at γ = 10, η = 0 and 1", reached, ">=", 0.95)

    chance = 1 / num_classes(images)
    dead = abs(accuracy[SHIFT, 0, 3.0] - chance)
    judge(f"distance of the mean shift at η = 0 from chance, {chance:.2g}", dead, "<=", 0.05)
    judge("accuracy of the noise form at η = 0, γ = 3", accuracy[NOISY, 0, 3.0], ">", 0.9)

    gain = min(
        accuracy[CLEAN_THROUGH, eta, 1.0] - accuracy[CLEAN_ON_NOISY, eta, 1.0] for eta in (0, 1)
    )
    trend("accuracy that a clean classifier gains through the denoiser", gain, ">=", 0.1)
    lost = accuracy[NOISY, 1, 3.0] - accuracy[SHARPENED, 1, 3.0]
    lab.observe("accuracy of scaling by 3 above exact sharpening by 3", lost, ">", 0.0)


def gaussians(lab: Lab) -> float:
    """Compare three variances that are all called guided; return the flow's error at γ = 2."""
    schedule = HeatSchedule(80.0)
    pair = GaussianMixtureDenoiser(
        torch.zeros(2, 1, dtype=torch.float64),
        torch.tensor([VARIANCES[UNCONDITIONAL], VARIANCES[CONDITIONAL]]),
        schedule=schedule,
        labels=torch.tensor([UNCONDITIONAL, CONDITIONAL]),
    )
    particles = lab.pick(smoke=200, quick=2_000, full=20_000)
    times = schedule.times(lab.pick(smoke=30, quick=600, full=2000), spacing="karras")
    # Midpoints of equal shares of the normal law: the start has no sampling error to speak of.
    share = (np.arange(particles) + 0.5) / particles
    start = torch.from_numpy(norm.ppf(share)).unsqueeze(1)
    start = schedule.prior_scale * start / start.std()
    rows = []
    for gamma in lab.progress((1.0, 2.0, 4.0), "Gaussians"):
        guided = ClassifierFreeGuidance(pair, scale=gamma, null_condition=UNCONDITIONAL)
        flow, chain = (
            sample(
                guided,
                initial=start,
                times=times,
                eta=eta,
                condition=torch.tensor(CONDITIONAL),
                generator=lab.generator(),
            )
            for eta in (0.0, 1.0)
        )
        exact = guided_variances(gamma)
        rows.append(
            {
                "γ": gamma,
                "flow": flow.var().item(),
                "flow, exact": exact[0],
                "chain": chain.var().item(),
                "chain, exact": exact[1],
                "tempered": exact[2],
            }
        )
    lab.table(
        "Variance of guided Gaussians",
        rows,
        "$V = 1.25$, $v = 0.25$; the flow is deterministic ($\\eta = 0$), the chain noisy "
        f"($\\eta = 1$), {particles} particles, {len(times) - 1} steps.",
    )
    lab.figure(
        "gaussians",
        gaussian_figure(rows),
        "Three meanings of the same scale. No guided sampler draws from the tempered density, and "
        "the two samplers do not agree with each other, except at γ = 1.",
    )
    at_two = next(row for row in rows if row["γ"] == 2)
    return abs(at_two["flow"] / at_two["flow, exact"] - 1)


def guided_variances(gamma: float) -> tuple[float, float, float]:
    """Return the exact variances of the flow, of the chain and of the tempered density."""
    wide, narrow = VARIANCES[UNCONDITIONAL], VARIANCES[CONDITIONAL]

    def log_weight(u: float) -> float:
        return 2 * (1 - gamma) * math.log(wide + u) + 2 * gamma * math.log(narrow + u)

    chain, _ = quad(lambda u: math.exp(log_weight(0) - log_weight(u)), 0, math.inf)
    flow = wide ** (1 - gamma) * narrow**gamma
    return flow, chain, 1 / ((1 - gamma) / wide + gamma / narrow)


def controlled(lab: Lab, images: Images) -> list[Row]:
    """Sample images under every form of control, and let the judge look at them."""
    classes = num_classes(images)
    denoiser = trained_denoiser(lab, images, num_classes=classes)
    per_class = lab.pick(smoke=2, quick=50, full=40) // (4 if denoiser.convolutional else 1) or 1
    num_steps = lab.pick(smoke=4, quick=10, full=25)
    labels = torch.arange(classes * per_class, device=lab.device) % classes
    shape = (len(labels), *denoiser.event_shape)
    measure = judged(lab, images)
    rows: list[Row] = []
    sheets: dict[str, Tensor] = {}

    def record(form: str, gamma: float, eta: int, guided: Any, **options: Any) -> None:
        drawn = sample(
            guided,
            shape,
            num_steps=num_steps,
            eta=eta,
            condition=labels,
            generator=lab.generator(lab.device),
            **options,
        )
        rows.append({"form": form, "η": eta, "γ": gamma, **measure(drawn.cpu(), labels.cpu())})
        sheets[f"{form}, η = {eta}, γ = {gamma:g}"] = drawn.cpu()

    noisy = noisy_classifier(lab, images, denoiser)
    clean = clean_classifier(lab, images)
    log_noisy, log_clean = class_log_probability(noisy), class_log_probability(clean)
    with_gradient = [
        (NOISY, gamma, log_noisy, {"scale": gamma, "clip_sample": CLIP}) for gamma in SCALES
    ]
    sharpened = class_log_probability(noisy, sharpness=3.0)
    with_gradient += [
        (SHARPENED, 3.0, sharpened, {"clip_sample": CLIP}),
        (CLEAN_THROUGH, 1.0, log_clean, {"evaluate_at": "denoised", "clip_sample": CLIP}),
        (CLEAN_ON_NOISY, 1.0, log_clean, {"clip_sample": CLIP}),
        (UNCLIPPED, 3.0, log_noisy, {"scale": 3.0}),
    ]
    for form, gamma, objective, options in lab.progress(with_gradient, "classifier"):
        guided = ClassifierGuidance(denoiser, objective, **options)
        for eta in (1, 0):
            record(form, gamma, eta, guided)

    # Guidance with scale 0 is the denoiser itself, clipped in the same way.
    plain = ClassifierGuidance(denoiser, log_noisy, scale=0.0, clip_sample=CLIP)
    for gamma in SCALES:
        for eta in (1, 0):
            shift = MeanShiftGuidance(log_noisy, scale=gamma)
            record(SHIFT, gamma, eta, plain, mean_shift=shift)

    for gamma in lab.progress((0.0, 1.0, 2.0, 4.0, 8.0), "classifier-free"):
        guided = ClassifierFreeGuidance(
            denoiser, scale=gamma, null_condition=classes, clip_sample=CLIP
        )
        for eta in (1, 0):
            record(FREE, gamma, eta, guided)

    real = measure(images.test.images, images.test.labels)
    lab.table(
        f"Control of {images.name}",
        side_by_side(rows),
        f"{len(labels)} samples, {num_steps} steps; distance is that to the nearest training "
        "image, at $\\eta = 1$. Held-out images themselves: accuracy "
        f"{real['accuracy']:.3f}, variance within classes {real['variance within classes']:.2f}, "
        f"distance {real['to the nearest image']:.2f}.",
    )
    lab.figure(
        "sheets",
        classes_figure(sheets, classes),
        "One column a class, from the same noise in every row. A larger scale makes the class "
        "clear and the samples alike; the mean shift without noise leaves them as they were.",
    )
    lab.figure(
        "trade",
        trade_figure(rows, real["variance within classes"]),
        "Accuracy is bought with variety. Along a line γ grows; the forms that lie lower pay more "
        "for the same accuracy. Without a classifier the largest scales drive pixels to the ends "
        "of their range, and the variance grows again. What is right less often than "
        f"{LEAST_ACCURACY:.0%} of the time is in the table only.",
    )
    return rows


def side_by_side(rows: list[Row]) -> list[Row]:
    """Set the noisy and the deterministic sampler of a form beside each other."""
    by_eta = {(row["form"], row["γ"], row["η"]): row for row in rows}
    table = []
    for form, gamma in dict.fromkeys((row["form"], row["γ"]) for row in rows):
        noisy, flow = by_eta[form, gamma, 1], by_eta[form, gamma, 0]
        table.append(
            {
                "form": form,
                "γ": gamma,
                "accuracy, η = 1": noisy["accuracy"],
                "η = 0": flow["accuracy"],
                "variance within classes, η = 1": noisy["variance within classes"],
                "η = 0 ": flow["variance within classes"],
                "distance": noisy["to the nearest image"],
            }
        )
    return table


def num_classes(images: Images) -> int:
    assert images.train.labels is not None
    return int(images.train.labels.max()) + 1


def noisy_classifier(
    lab: Lab, images: Images, denoiser: ImageDenoiser
) -> Callable[[Tensor, Tensor], Tensor]:
    """Train a classifier on images at every level of noise."""
    schedule = denoiser.schedule
    features = math.prod(denoiser.event_shape)
    with seeded(lab.seed):
        network = MLPDenoiser(features, hidden=128, output_features=num_classes(images))
    network.to(lab.device)

    def logits(clean: Tensor, generator: torch.Generator) -> Tensor:
        times = sample_times(schedule, len(clean), generator=generator, device=clean.device)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        return network(schedule.add_noise(clean, noise, times).flatten(1), times)

    train(lab, images, network, logits, "noisy classifier")
    return lambda x, time: network(x.flatten(1), time)


def clean_classifier(lab: Lab, images: Images) -> Callable[[Tensor, Tensor], Tensor]:
    """Train a classifier that never sees noise."""
    features = math.prod(images.train.images.shape[1:])
    with seeded(lab.seed):
        network = MLP(features, [128], num_classes(images)).to(lab.device)
    train(lab, images, network, lambda clean, _: network(clean.flatten(1)), "clean classifier")
    return lambda x, time: network(x.flatten(1))


def train(
    lab: Lab,
    images: Images,
    network: nn.Module,
    logits: Callable[[Tensor, torch.Generator], Tensor],
    label: str,
) -> None:
    """Minimise the cross entropy over 600 batches of 128."""
    assert images.train.labels is not None
    clean, labels = images.train.images.to(lab.device), images.train.labels.to(lab.device)
    generator = lab.generator(lab.device)
    steps = lab.pick(smoke=20, quick=600, full=600)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in lab.progress(range(steps), label):
        batch = torch.randint(len(clean), (128,), generator=generator, device=clean.device)
        loss = nn.functional.cross_entropy(logits(clean[batch], generator), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    network.eval().requires_grad_(False)


def judged(lab: Lab, images: Images) -> Callable[[Tensor, Tensor | None], dict[str, float]]:
    """Train the judge, and return what it and two distances say about samples."""
    known = images.train.images[: lab.pick(smoke=300, quick=2_000, full=4_000)].flatten(1)
    assert images.train.labels is not None
    judge = SVC(kernel="rbf", C=10.0).fit(known.numpy(), images.train.labels[: len(known)].numpy())

    def measure(drawn: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert labels is not None
        flat = drawn.flatten(1)[:1000]
        labels = labels[:1000]
        nearest = torch.cdist(flat, known).amin(1)
        return {
            "accuracy": float((judge.predict(flat.numpy()) == labels.numpy()).mean()),
            "variance within classes": variance_within(flat.double(), labels),
            "to the nearest image": nearest.mean().item(),
        }

    return measure


def variance_within(flat: Tensor, labels: Tensor) -> float:
    """Return the variance within a class, summed over pixels and averaged over classes."""
    members = [flat[labels == label] for label in labels.unique()]
    return float(np.mean([m.var(0).sum().item() for m in members if len(m) > 1]))


def gaussian_figure(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    grid = np.linspace(1, 4, 61)
    exact = np.array([guided_variances(gamma) for gamma in grid])
    for column, name, style in ((0, "flow", "-"), (1, "chain", "--"), (2, "tempered", ":")):
        (line,) = axis.plot(grid, exact[:, column], style, label=f"{name}, exact")
        if name != "tempered":
            axis.plot(
                [row["γ"] for row in rows],
                [row[name] for row in rows],
                "o" if name == "flow" else "s",
                color=line.get_color(),
                label=f"{name}, sampled",
            )
    axis.set_yscale("log")
    axis.set_xlabel("scale γ")
    axis.set_ylabel("variance")
    axis.legend()
    return figure


def classes_figure(sheets: dict[str, Tensor], classes: int) -> Figure:
    """Show the first two samples of up to ten classes for some of the forms."""
    shown = [
        *((f"{NOISY}, η = 1, γ = {gamma:g}", f"classifier\nγ = {gamma:g}") for gamma in SCALES),
        (f"{SHIFT}, η = 0, γ = 3", "mean shift\nη = 0, γ = 3"),
        *((f"{FREE}, η = 1, γ = {gamma}", f"free\nγ = {gamma}") for gamma in (0, 1, 4, 8)),
    ]
    columns = min(classes, 10)
    drawn = {
        label: sheets[name].unflatten(0, (-1, classes))[:2, :columns].flatten(0, 1)
        for name, label in shown
    }
    return sheet_figure(drawn, columns)


def trade_figure(rows: list[Row], real_variance: float) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for form, marker in ((NOISY, "o"), (SHIFT, "s"), (FREE, "^")):
        for eta, style in ((1, "-"), (0, "--")):
            members = [row for row in rows if row["form"] == form and row["η"] == eta]
            members = [row for row in members if row["accuracy"] >= LEAST_ACCURACY]
            if not members:
                continue
            axis.plot(
                [row["accuracy"] for row in members],
                [row["variance within classes"] for row in members],
                marker=marker,
                linestyle=style,
                label=f"{form.removeprefix(NOISY + ', ')}, η = {eta}",
            )
    for form, marker in ((CLEAN_THROUGH, "D"), (CLEAN_ON_NOISY, "X"), (SHARPENED, "P")):
        members = [row for row in rows if row["form"] == form]
        axis.plot(
            [row["accuracy"] for row in members],
            [row["variance within classes"] for row in members],
            marker=marker,
            linestyle="",
            label=form,
        )
    axis.axhline(real_variance, linestyle=":", color="gray", label="held-out images")
    axis.set_xlim(left=LEAST_ACCURACY)
    axis.set_xlabel("accuracy, by the judge")
    axis.set_ylabel("variance within classes")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure
