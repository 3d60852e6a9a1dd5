r"""Self-supervision by the heat equation: is it heat that does the work?

Masked autoencoders hide random patches, which only a network that can drop tokens exploits. QB-Heat
keeps one contiguous block, a quarter of the image. Any convolutional network can encode it; the
features of the rest are predicted by linear extrapolation, and a decoder completes the image. The
derivation goes by way of the heat equation. Does the equation matter, or is the name a guise?

## From heat to extrapolation

Heat spreads by $u_t = u_{xx} + u_{yy}$; an image stands still, $u_t = 0$. For feature vectors $z$
and directions that are not alike, this leaves

$$z_{xx} + S z_{yy} = 0 .$$

The method replaces the second order by a first-order system, of which it is a consequence:

$$z_x = A z, \qquad z_y = B z \qquad\Longrightarrow\qquad S = -A^2 (B^2)^{-1} .$$

One step on the grid is $e^{A}$ to the right and $e^{B}$ downwards, $e^{-A}$ and $e^{-B}$ back.
Euler steps $I \pm A$ do nearly the same, but $(I - A)(I + A) = I - A^2$ is not the identity.

One condition is easily overlooked. A solution has one mixed derivative, $z_{xy} = z_{yx}$, so
$AB z = BA z$. If $A$ and $B$ do not commute, the corners of the image, which are reached by steps
in both directions, depend on the path. Two ways out: shared eigenvectors,
$A = V \operatorname{diag}(a) V^{-1}$ and $B = V \operatorname{diag}(b) V^{-1}$, so that $n$ steps
right and $m$ down are the factor $e^{n a + m b}$ on each coefficient; or free matrices and the mean
of both orders.

## What would show that it is only a guise

What is used of all this is that neighbouring features are alike (*continuity*) and differ by one
linear map (*linearity*). Each part gets a control that shares everything else with the method:

- **One learned vector** for all that is masked, as in the masked autoencoder: no extrapolation.
- **Copy**, $A = B = 0$: the nearest visible feature. Continuity is left, linearity is gone.

And the equation itself can be asked for. With second differences of the features,

$$\rho = \frac{\sum |z_{xx} + z_{yy}|^2}{\sum (|z_{xx}|^2 + |z_{yy}|^2)}$$

is 0 for a harmonic map, 1 if the two second differences are uncorrelated, and more if they have the
same sign where they are large. White noise has $\rho = 5/3$: in units of the variance,
$z_{xx}$ and $z_{yy}$ have mean squares 6 each and, through the centre that they share, the mean
product 4, so $\rho = (6 + 6 + 2 \cdot 4)/(6 + 6)$. The best matrix $S$ leaves $1 - (4/6)^2 = 5/9$
of it. The first-order fit of $z(x+1) - z(x)$ by $A z(x)$ has a null too: with independent values it
explains exactly half, by predicting 0 for the next one. A gain must be read beside $R^2$ of
the value itself, which then is 0.

## Sequences, and filling between known values

The article proposes the same for text: that the vectors of neighbouring sentences differ by one
linear map. Where both neighbours are known, it would interpolate. Linear interpolation *is* the
one-dimensional Laplace equation with the known values as boundary; in two dimensions the same
question is the Dirichlet problem of the grid,

$$z_m = -L_{mm}^{-1} L_{mv} z_v .$$

So one function, `harmonic_fill`, serves both. The flow of the heat equation has a use of its own:
`heat_diffuse` smooths a saliency map and loses nothing at its border.

## What is measured, and why it decides

Digits of 8 by 8 pixels; the encoder has three convolutions of 24 channels and sees the centre block
of 4 by 4 only; the decoder is an MLP on the whole predicted map. Every condition gets the same
starts, batches and number of updates. The error is that of the masked pixels of held-out digits.

1. *Prediction beats a constant vector*: the error of the method is at most 0.98 of the mask
   token's. This is the article's comparison.
2. *It is continuity*: method and copy differ by at most 3 per cent. Were linearity at work, the
   copy would be worse.
3. *The maps are not harmonic*: $\rho \ge 1$ for the features of the trained encoder.
4. *Weak continuity of text*: the $R^2$ of the next sentence's vector by one linear map, on held-out
   text, is higher by at least 0.05 in the true order than in shuffled order.

The first comparison has a flaw that the article's has too. To the MLP a copied feature is the same
input several times over, and learns as if its rate were higher; a constant is no input at all. The
shorter the training, the larger the advantage. A decoder of convolutions, blocks that move, and the
long training of the full budget are therefore reported beside it. So is what pre-training is for: a
linear classifier on the encoder's features of whole digits, each channel pooled to 2 by 2. A better
completion need not come from a better encoder.

The reader should see the errors of method and copy on top of each other, residuals $\rho$ near
those of noise in every feature map, and a probe that hardly cares. And the token? After 150 updates
its error is a fifth above the method's; after the 3000 of the full budget the two differ by less
than seeds do, and the first claim no longer holds. What prediction buys here is speed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import Lab, seeded
from kexue.training.heat import (
    Block,
    LinearPropagation,
    MaskToken,
    QBHeat,
    block_mask,
    fit_first_order,
    fit_laplace,
    harmonic_fill,
    heat_diffuse,
    quarter_block,
)

CHANNELS, BATCH, RATE = 24, 64, 2e-3
HEAT, FREE, COPY, TOKEN = "heat", "heat, free matrices", "copy", "mask token"
GLOBAL, LOCAL, MOVING = "MLP, centre", "convolutions, centre", "MLP, random blocks"
FITS = ("gain", "$R^2$", "anisotropic", "isotropic")
Results: TypeAlias = dict[tuple[str, str], list[dict[str, Any]]]
"""What was measured on each model, by setting and condition."""
DIRECTIONS = 32
"""Singular directions of the sentences' vectors."""


@dataclass(frozen=True)
class Pictures:
    """Images from 0 to 1, of even height and width, and where they are known their classes."""

    train: Tensor
    test: Tensor
    classes: tuple[Tensor, Tensor] | None

    @property
    def size(self) -> tuple[int, int]:
        return self.train.shape[2], self.train.shape[3]

    def blocks(self, setting: str = "") -> list[Block]:
        """Where a trained model is tested: the centre, or positions all over the image."""
        height, width = self.size
        if setting != MOVING:
            return [quarter_block(height, width, position="center")]
        tops = range(0, height // 2 + 1, max(2, height // 8))
        lefts = range(0, width // 2 + 1, max(2, width // 8))
        return [Block(top, left, height // 2, width // 2) for top in tops for left in lefts]


@dataclass(frozen=True)
class Task:
    """One model to train."""

    condition: str
    setting: str
    seed: int
    steps: int


def run(lab: Lab) -> None:
    pictures = read(lab)
    results: Results = {}
    models: dict[str, QBHeat] = {}
    progress = lab.progress(tasks(lab), "training")
    for task in progress:
        model = trained(lab, pictures, task)
        result = measured(pictures, model, task)
        progress.metric(error=result["error"])
        results.setdefault((task.setting, task.condition), []).append(result)
        if task.setting == GLOBAL:
            models.setdefault(task.condition, model)
    residuals = tables(lab, pictures, results)
    judge(lab, results, residuals, sentences(lab))
    draw(lab, pictures, models)


def steps(lab: Lab) -> tuple[int, int]:
    """Updates of the comparison that is judged, and of those that are reported."""
    return lab.pick(smoke=(3, 3), quick=(150, 150), full=(3000, 1000))


def tasks(lab: Lab) -> list[Task]:
    """The comparison that is judged over seeds, those that are reported once."""
    first, seeds = 1000 * lab.seed, lab.pick(smoke=1, quick=2, full=5)
    many, few = steps(lab)
    three = (HEAT, COPY, TOKEN)
    judged = [Task(name, GLOBAL, first + n, many) for n in range(seeds) for name in three]
    reported = [Task(name, setting, first, few) for setting in (LOCAL, MOVING) for name in three]
    return [*judged, Task(FREE, GLOBAL, first, many), *reported]


def read(lab: Lab) -> Pictures:
    """The digits, or the user's images, cut to even sizes."""
    images = lab.data.images()
    most = lab.pick(smoke=500, quick=2000, full=20_000)
    height, width = (n // 2 * 2 for n in images.train.images.shape[2:])
    train, test = (
        (part.images[:most, :, :height, :width] + 1) / 2 for part in (images.train, images.test)
    )
    labels = images.train.labels, images.test.labels
    classes = None if None in labels else (labels[0][:most], labels[1][:most])
    return Pictures(train, test, classes)


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def encoder(colours: int) -> nn.Sequential:
    first, second, third = (convolution(n, CHANNELS) for n in (colours, CHANNELS, CHANNELS))
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)


def decoder(setting: str, colours: int, size: tuple[int, int]) -> nn.Sequential:
    if setting == LOCAL:
        first, second = (convolution(CHANNELS, n) for n in (CHANNELS, colours))
        return nn.Sequential(first, nn.GELU(), second)
    pixels = math.prod(size)
    first, second = nn.Linear(CHANNELS * pixels, 64), nn.Linear(64, 64)
    third, shape = nn.Linear(64, colours * pixels), nn.Unflatten(1, (colours, *size))
    return nn.Sequential(nn.Flatten(), first, nn.GELU(), second, nn.GELU(), third, shape)


def propagation(condition: str, seed: int) -> nn.Module:
    if condition == TOKEN:
        return MaskToken(CHANNELS)
    module = LinearPropagation(
        CHANNELS,
        parametrization="free" if condition == FREE else "shared_eigenvectors",
        initial_scale=0.0 if condition == COPY else 0.05,
        generator=torch.Generator().manual_seed(seed),
    )
    return module.requires_grad_(condition != COPY)


def trained(lab: Lab, pictures: Pictures, task: Task) -> QBHeat:
    """The same encoder, decoder and batches for every condition of a seed."""
    colours = pictures.train.shape[1]
    with seeded(task.seed):
        model = QBHeat(
            encoder(colours),
            propagation(task.condition, task.seed),
            decoder(task.setting, colours, pictures.size),
        )

    def fit() -> None:
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=RATE, fused=True)
        for images, block in batches(pictures, task):
            optimizer.zero_grad()
            model(images, block).loss.backward()
            optimizer.step()

    name = "-".join(f"{task.setting} {task.condition}".lower().replace(",", "").split())
    return lab.trained(name, model, fit, inputs={"steps": task.steps, "run": task.seed})


def batches(pictures: Pictures, task: Task) -> Iterator[tuple[Tensor, Block]]:
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(task.steps):
        chosen = torch.randint(len(pictures.train), (BATCH,), generator=generator)
        block = quarter_block(
            *pictures.size,
            position="random" if task.setting == MOVING else "center",
            generator=generator,
        )
        yield pictures.train[chosen], block


@torch.no_grad()
def measured(pictures: Pictures, model: QBHeat, task: Task) -> dict[str, Any]:
    """Masked error, the probe, and whether the encoder's maps are linear or harmonic."""
    errors = [model(pictures.test, block).loss.item() for block in pictures.blocks(task.setting)]
    accuracy = probe(pictures, model.encoder)
    fits = linear_and_harmonic(model.encoder(pictures.test))
    return {"error": statistics.mean(errors), "probe": accuracy} | fits


def linear_and_harmonic(maps: Tensor) -> dict[str, float]:
    """Columns of the table: first-order fits, mean of both directions, and Laplace residuals."""
    first, second = fit_first_order(maps), fit_laplace(maps)
    return {
        "gain": (first.horizontal_gain + first.vertical_gain) / 2,
        "$R^2$": (first.horizontal_r2 + first.vertical_r2) / 2,
        "anisotropic": second.anisotropic_residual,
        "isotropic": second.isotropic_residual,
    }


@torch.no_grad()
def probe(pictures: Pictures, encode: nn.Module) -> float | None:
    """Held-out accuracy of logistic regression on pooled features of whole images."""
    if pictures.classes is None:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, test = (
        nn.functional.adaptive_avg_pool2d(encode(images), 2).flatten(1).numpy()
        for images in (pictures.train, pictures.test)
    )
    scaler, (known, asked) = StandardScaler().fit(train), pictures.classes
    classifier = LogisticRegression(max_iter=200).fit(scaler.transform(train), known.numpy())
    return float(classifier.score(scaler.transform(test), asked.numpy()))


def mean(results: list[dict[str, Any]], value: str) -> float:
    """Mean over seeds; NaN of what was not measured."""
    found = [result[value] for result in results]
    return math.nan if None in found else statistics.mean(found)


def with_error(results: list[dict[str, Any]], value: str) -> str:
    found = [result[value] for result in results]
    if len(found) < 2:
        return f"{found[0]:.4f}"
    error = statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.mean(found):.4f} ± {error:.4f}"


def tables(lab: Lab, pictures: Pictures, results: Results) -> dict[str, float]:
    """The tables of errors, probes and fits; returns isotropic residuals by name."""
    mask = block_mask(pictures.size, pictures.blocks()[0])
    rest = (pictures.test - pictures.train.mean(0))[..., mask].square().mean()
    torch.manual_seed(lab.seed)
    untrained = encoder(pictures.train.shape[1])
    rows: list[dict[str, Any]] = [
        {
            "decoder, block": setting,
            "outside the block": condition,
            "seeds": len(found),
            "masked error": with_error(found, "error"),
            "probe": mean(found, "probe"),
        }
        for (setting, condition), found in results.items()
    ]
    nothing: dict[str, Any] = dict.fromkeys(rows[0]) | {"outside the block": "untrained encoder"}
    lab.table(
        "Completion and what it is worth",
        [*rows, nothing | {"probe": probe(pictures, untrained)}],
        "Mean squared error over masked pixels of held-out images, from 0 to 1, with its standard "
        f"error over seeds; the mean image has {rest:.4f} around the centre. Probe: held-out "
        f"accuracy of a linear classifier. {steps(lab)[0]} updates for the MLP at the centre, "
        f"{steps(lab)[1]} for the others.",
    )
    fits = {
        f"{condition}, trained": {name: mean(found, name) for name in FITS}
        for (setting, condition), found in results.items()
        if setting == GLOBAL
    }
    maps = {"untrained encoder": untrained(pictures.test).detach(), "the images": pictures.test}
    for number, photograph in enumerate(lab.data.photographs(), start=1):
        maps[f"photograph {number}"] = (photograph[None] + 1) / 2
    maps["white noise"] = torch.randn(300, 3, 24, 24, generator=lab.generator())
    fits |= {name: linear_and_harmonic(values) for name, values in maps.items()}
    lab.table(
        "Linear? Harmonic?",
        [{"maps": name} | values for name, values in fits.items()],
        "First-order fits (mean of both directions) and Laplace residuals. The nulls of white "
        "noise are 1/2, 0, 5/9 and 5/3. The gain of an untrained encoder says how much of it is "
        "zero padding and architecture.",
    )
    residuals = {name: values["isotropic"] for name, values in fits.items()}
    lab.figure(
        "residuals",
        residual_figure(residuals),
        r"Isotropic residual $\rho$. Dotted: harmonic maps (0), uncorrelated second differences "
        "(1), white noise (5/3). Nothing here is near harmonic.",
    )
    return residuals


def sentences(lab: Lab) -> dict[str, tuple[float, float]]:
    """Held-out R² of a sentence's vector from its neighbours, in true and in shuffled order."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    text = lab.data.sentences(lab.data.prose())[: lab.pick(smoke=400, quick=None, full=None)]
    words = TfidfVectorizer().fit_transform(text)
    vectors = TruncatedSVD(DIRECTIONS, random_state=lab.seed).fit_transform(words)
    z = torch.from_numpy((vectors - vectors.mean(0)) / vectors.std(0))
    in_order = explained(z)
    generator = lab.generator()
    repeats = lab.pick(smoke=1, quick=5, full=20)
    shuffled = [explained(z[torch.randperm(len(z), generator=generator)]) for _ in range(repeats)]
    found = {
        name: (in_order[name], statistics.mean(one[name] for one in shuffled)) for name in in_order
    }
    lab.table(
        "A sentence from its neighbours",
        [
            {"prediction": name, "in order": true, "shuffled": random}
            for name, (true, random) in found.items()
        ],
        f"$R^2$ on the last quarter of {len(z)} sentences: TF-IDF, {DIRECTIONS} singular "
        f"directions, standardised. Shuffled: mean of {repeats} random order"
        f"{'s' * (repeats > 1)}.",
    )
    return found


def explained(z: Tensor) -> dict[str, float]:
    """Fit on the first three quarters, R² on the last."""
    cut = len(z) * 3 // 4
    train, test = z[:cut], z[cut:]

    def r2(prediction: Tensor, truth: Tensor) -> float:
        return 1 - float(
            (truth - prediction).square().sum() / (truth - truth.mean(0)).square().sum()
        )

    # A sequence is a map of one row.
    change = fit_first_order(train.T[None, :, None]).horizontal
    between, truth = middle(test), test[1:-1]
    seen, target = middle(train), train[1:-1]
    share = float((seen * target).sum() / seen.square().sum())
    both = torch.linalg.lstsq(torch.cat([train[:-2], train[2:]], 1), target).solution
    return {
        "one linear map of the previous one": r2(test[:-1] + test[:-1] @ change.T, test[1:]),
        "linear interpolation between both": r2(between, truth),
        "the same, scaled to fit": r2(share * between, truth),
        "two free matrices": r2(torch.cat([test[:-2], test[2:]], 1) @ both, truth),
    }


def middle(z: Tensor) -> Tensor:
    """Each inner vector as the harmonic filling between its neighbours: even ones, then odd."""
    filled = z.clone()
    for first in (0, 1):
        hidden = torch.zeros(len(z), dtype=torch.bool)
        hidden[first + 1 : -1 : 2] = True
        filled[hidden] = harmonic_fill(z[None], hidden)[0, hidden]
    return filled[1:-1]


def judge(
    lab: Lab,
    results: Results,
    residuals: dict[str, float],
    sequence: dict[str, tuple[float, float]],
) -> None:
    heat, copy, token = (mean(results[GLOBAL, name], "error") for name in (HEAT, COPY, TOKEN))
    # The thresholds are those of the embedded digits; a user's images are reported.
    judged = lab.claim if lab.data.path is None else lab.observe
    judged("masked error of the method, relative to the mask token's", heat / token, "<=", 0.98)
    judged(
        "difference of the method's and the copy's masked error, relative to the copy's",
        abs(heat - copy) / copy, "<=", 0.03,
    )  # fmt: skip
    rho = residuals[f"{HEAT}, trained"]
    judged(r"isotropic residual $\rho$ of the trained features", rho, ">=", 1.0)
    true, random = sequence["one linear map of the previous one"]
    lab.claim(
        "$R^2$ of the next sentence by one linear map, in order minus shuffled",
        true - random, ">=", 0.05,
    )  # fmt: skip
    for setting in (LOCAL, MOVING):
        one, other = (mean(results[setting, name], "error") for name in (HEAT, TOKEN))
        lab.observe(
            f"masked error of the method, relative to the mask token's ({setting})",
            one / other, "<=", 0.98,
        )  # fmt: skip
    better, worse = (mean(results[GLOBAL, name], "probe") for name in (HEAT, TOKEN))
    lab.observe(
        "accuracy of the probe on the encoder of the method minus that on the mask token's",
        better - worse, "<=", 0.0,
    )  # fmt: skip


def draw(lab: Lab, pictures: Pictures, models: dict[str, QBHeat]) -> None:
    lab.figure(
        "reconstructions",
        reconstruction_figure(pictures, models),
        "Held-out images, what the encoder sees of them, and the completions; the visible block "
        "is copied into these, since the loss does not ask for it.",
    )
    lab.figure(
        "distance",
        distance_figure(pictures, models),
        "Mean squared error by the distance from the block, in steps.",
    )
    lab.figure(
        "saliency",
        saliency_figure(pictures, models[HEAT]),
        "Which visible pixels the completion depends on: the size of the gradient of the summed "
        "completion, before and after $e^{-tL}$ with $t = 0.5$, which keeps its sum, and after a "
        "Gaussian blur of the same width that takes the outside for 0 and pales at the border.",
    )


def residual_figure(residuals: dict[str, float]) -> Figure:
    figure, axes = plt.subplots(figsize=(6.4, 0.36 * len(residuals) + 0.9))
    names = list(residuals)[::-1]
    axes.plot([residuals[name] for name in names], range(len(names)), "o")
    for null in (0, 1, 5 / 3):
        axes.axvline(null, color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(-0.1, 2.1)
    axes.set_xlabel(r"isotropic residual $\rho$")
    return figure


@torch.no_grad()
def completions(model: QBHeat, images: Tensor, block: Block) -> Tensor:
    output = model(images, block)
    return torch.where(output.mask, output.reconstruction, images)


def reconstruction_figure(pictures: Pictures, models: dict[str, QBHeat]) -> Figure:
    images, (block,) = pictures.test[:6], pictures.blocks()
    visible = images.masked_fill(block_mask(pictures.size, block), 0.5)
    rows = {"image": images, "visible": visible}
    rows |= {name: completions(model, images, block) for name, model in models.items()}
    labels = {FREE: "heat, free"}
    figure, grid = plt.subplots(len(rows), 6, figsize=(6.4, 1.05 * len(rows)))
    for line, (name, shown) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, shown, strict=True):
            show(axes, image)
        line[0].set_ylabel(labels.get(name, name), rotation=0, ha="right", va="center")
    return figure


def show(axes: Any, image: Tensor, largest: float = 1.0) -> None:
    shown = image.clamp(0, largest).movedim(0, -1)
    shown = shown.expand(-1, -1, 3) if shown.shape[-1] == 1 else shown
    axes.imshow(shown.numpy() / largest)
    axes.set_xticks([])
    axes.set_yticks([])


@torch.no_grad()
def distance_figure(pictures: Pictures, models: dict[str, QBHeat]) -> Figure:
    (block,) = pictures.blocks()
    height, width = pictures.size
    rows, columns = np.arange(height), np.arange(width)
    down = np.maximum(block.top - rows, rows - block.top - block.height + 1).clip(0)
    right = np.maximum(block.left - columns, columns - block.left - block.width + 1).clip(0)
    away = torch.from_numpy(down[:, None] + right[None, :])
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    distances = range(1, int(away.max()) + 1)
    for (name, model), marker in zip(models.items(), "osx^", strict=True):
        error = (completions(model, pictures.test, block) - pictures.test).square().mean((0, 1))
        axes.plot(
            distances, [error[away == n].mean().item() for n in distances],
            marker=marker, fillstyle="none", label=name,
        )  # fmt: skip
    axes.set_xticks(list(distances))
    axes.set_xlabel("steps from the block")
    axes.set_ylabel("mean squared error")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def saliency_figure(pictures: Pictures, model: QBHeat) -> Figure:
    from scipy.ndimage import gaussian_filter

    time, (block,) = 0.5, pictures.blocks()
    top, left, height, width = block
    images = pictures.test[:4].clone().requires_grad_()
    output = model(images, block)
    (gradient,) = torch.autograd.grad((output.reconstruction * output.mask).sum(), images)
    visible, gradient = (
        maps[..., top : top + height, left : left + width] for maps in (images.detach(), gradient)
    )
    saliency = gradient.norm(dim=1, keepdim=True)
    width_in_pixels = (0, 0, math.sqrt(2 * time), math.sqrt(2 * time))
    blurred = gaussian_filter(saliency.numpy(), width_in_pixels, mode="constant")
    rows = {"visible": visible, "saliency": saliency, "diffused": heat_diffuse(saliency, time)}
    rows["Gaussian,\nzeros outside"] = torch.from_numpy(blurred)
    figure, grid = plt.subplots(len(rows), 4, figsize=(5.6, 1.3 * len(rows)))
    largest = saliency.amax((1, 2, 3)).tolist()
    for line, (name, shown) in zip(grid, rows.items(), strict=True):
        for axes, image, scale in zip(line, shown, largest, strict=True):
            show(axes, image, 1.0 if name == "visible" else scale)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure
