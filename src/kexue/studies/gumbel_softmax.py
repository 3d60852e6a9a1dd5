r"""Reparameterisation and Gumbel-softmax.

Many objectives are averages over samples: $L(\theta) = \mathbb E_{z \sim p_\theta}[f(z)]$, with $f$
the loss of a decoder, a reward, or the next layer behind a hard choice. Drawing $z$ cuts the
gradient. There are ways around the cut, for continuous and for discrete $z$; each is wrong by some
amount, or noisy by some amount. How wrong, and how noisy? On a problem small enough to sum over all
states, both can be measured against the truth.

## Normal variables

If $z = g_\theta(\varepsilon)$ with noise that has no parameters, the gradient moves inside the
average. For a normal variable, $z = m + s\,\varepsilon$,

$$\nabla_m \mathbb E[f(z)] = \mathbb E[f'(m + s\varepsilon)].$$

The other way works for every $f$, differentiable or not. It needs the density only:

$$\nabla_m \mathbb E[f(z)] = \mathbb E[f(z)\, \nabla_m \log p(z)]
= \mathbb E\Big[f(z)\, \frac{z - m}{s^2}\Big].$$

Both are unbiased. The first usually has far less variance, and "usually" can be made exact. For
$f(z) = \sin wz$ both variances have a closed form; the second moments are

$$\tfrac12 w^2 \big(1 + e^{-2w^2s^2} \cos 2wm\big) \quad\text{and}\quad
\tfrac1{2s^2} \big(1 - (1 - 4w^2s^2)\, e^{-2w^2s^2} \cos 2wm\big).$$

The first grows with the square of the frequency, the second is bounded. A function that swings
faster than the noise is wide is better left to the score function.

## Categories

Let $u_i$ be uniform, $G_i = -\log(-\log u_i)$, and $p = \mathrm{softmax}(o)$. Then
$\operatorname{argmax}_i (o_i + G_i)$ has the probabilities $p$. Indeed category 1 wins, given
$u_1$, with probability $\prod_{j > 1} u_1^{p_j/p_1} = u_1^{1/p_1 - 1}$, and the integral of that
over $u_1$ is $p_1$. This puts all parameters into a sum, and leaves one step without a gradient:
the argmax. Gumbel-softmax replaces it,

$$z = \mathrm{softmax}\Big(\frac{o + G}{\tau}\Big).$$

That is no categorical sample at any temperature $\tau > 0$; only its argmax is one. As $\tau$ falls
the bias of the gradient vanishes and its variance grows, about like $1/\tau$. Hence the advice to
anneal $\tau$ from about 1 downwards. An annealed softmax without noise would end in the most
probable category; with the noise all categories go on being visited.

What else is there? *Straight-through* estimators pass an exact one-hot $b$ forward and some
relaxation's Jacobian backward. *Gumbel-Rao* averages that Jacobian over noise given $b$: same mean,
less variance. *ReinMax* corrects straight-through to second order. And the *score function*
$f(b) \nabla \log p(b)$ remains unbiased; its noise is fought by subtracting a baseline that does
not depend on $b$, such as the mean cost of the other draws, or, in *REBAR*, by the relaxed cost as
a control variate with its expectation added back.

## What decides it

A variational autoencoder for binarised images has three categorical variables of four values: 64
states. The evidence lower bound and its gradient are therefore sums, and every estimator can be
held against the true gradient. The table of *gradients* takes an autoencoder that was trained with
the exact gradient, and draws each estimator thousands of times at the logits of eight images.
Squared bias and variance are relative to the squared norm of the true gradient; what an optimiser
feels is their sum. As the squared distance of a sample mean from the truth contains noise, that
share is taken off, and a standard error says what is left. Unbiased estimators must agree with
enumeration along the true gradient of every image. The table of *bounds* trains with each estimator
from the same start on the same batches, and compares the exact bound.

## What to expect

The plain score function should be noisier than Gumbel-softmax by orders of magnitude, and should
learn less in the same number of steps. Lower temperatures trade bias for variance. But do not take
from this that the score function is hopeless: with two draws and a leave-one-out baseline it loses
most of its handicap, stays unbiased, and asks nothing of $f$.

One practical trap is in the last table. Noise that is *added* in bfloat16 makes ties, and a tie
goes to the first category.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional

from kexue.generative.reparameterization import (
    ExponentialTemperature,
    categorical_expectation,
    gumbel_max,
    reparameterize_normal,
)
from kexue.lab import Lab, seeded
from kexue.models import MLP

MEAN, DEVIATION = 0.3, 1.0
VARIABLES, CATEGORIES = 3, 4
HIDDEN = 128
BATCH = 64
COLDEST = 0.05
STANDARD_ERRORS = 5.0

Options = dict[str, Any]
ESTIMATORS: dict[str, Options] = {
    "exact": {"estimator": "exact"},
    "score function": {"estimator": "score_function"},
    "leave-one-out, 2 draws": {
        "estimator": "score_function",
        "samples": 2,
        "baseline": "leave_one_out",
    },
    "REBAR, τ = 0.5": {"estimator": "rebar", "temperature": 0.5},
    "straight-through": {"estimator": "straight_through"},
    "straight-through Gumbel, τ = 1": {"estimator": "straight_through_gumbel"},
    "Gumbel-Rao, τ = 1": {"estimator": "gumbel_rao"},
    "ReinMax": {"estimator": "reinmax"},
    "Gumbel-softmax, τ = 3": {"estimator": "gumbel_softmax", "temperature": 3.0},
    "Gumbel-softmax, τ = 1": {"estimator": "gumbel_softmax", "temperature": 1.0},
    "Gumbel-softmax, τ = 0.3": {"estimator": "gumbel_softmax", "temperature": 0.3},
    "Gumbel-softmax, τ = 0.1": {"estimator": "gumbel_softmax", "temperature": 0.1},
}
UNBIASED = ("score function", "leave-one-out, 2 draws", "REBAR, τ = 0.5")
WARM, COLD = "Gumbel-softmax, τ = 1", "Gumbel-softmax, τ = 0.3"
ANNEALED = "Gumbel-softmax, τ from 1 to 0.05"
TRAINED = (*(name for name in ESTIMATORS if not name.endswith(("= 3", "= 0.1"))), ANNEALED)


def run(lab: Lab) -> None:
    pathwise, score = sine_variances(lab)
    bounds = trained_bounds(lab)
    moments = estimator_moments(lab)
    half_precision(lab)

    judge = lab.claim if lab.data.path is None else lab.observe
    ratio = moments["score function"]["variance"] / moments[WARM]["variance"]
    judge("variance of the score function over that of Gumbel-softmax, τ = 1", ratio, ">=", 20)
    lost = bounds["score function"] - bounds[WARM]
    judge("nats that the score function's bound stays behind Gumbel-softmax's", lost, ">=", 1.0)
    fall = moments[WARM]["bias"] - moments[COLD]["bias"]
    judge("fall of the relative squared bias from τ = 1 to 0.3", fall, ">", 0.0)
    rise = moments[COLD]["variance"] - moments[WARM]["variance"]
    judge("rise of the relative variance from τ = 1 to 0.3", rise, ">", 0.0)
    distance = max(moments[name]["distance"] for name in UNBIASED)
    judge(
        "largest distance of an unbiased estimator's mean from enumeration, in standard errors",
        distance,
        "<=",
        STANDARD_ERRORS,
    )
    lab.claim(
        "at $w = 2$, variance of the reparameterised gradient minus the score function's",
        pathwise - score,
        ">",
        0.0,
    )
    regained = bounds["score function"] - bounds["leave-one-out, 2 draws"]
    lab.observe(
        "share of that lag which a leave-one-out baseline of two draws makes up",
        regained / lost,
        ">",
        0.5,
    )


def sine_moments(w: float, m: float, s: float) -> tuple[float, float, float]:
    """Return the gradient of E[sin wz] in m, and the variance of both its estimators."""
    gradient = w * math.exp(-((w * s) ** 2) / 2) * math.cos(w * m)
    wave = math.exp(-2 * (w * s) ** 2) * math.cos(2 * w * m)
    pathwise = w**2 * (1 + wave) / 2
    score = (1 - (1 - 4 * (w * s) ** 2) * wave) / (2 * s**2)
    return gradient, pathwise - gradient**2, score - gradient**2


def sine_crossing(m: float, s: float) -> float:
    """Return the frequency, near 1/s, at which both variances are equal."""

    def difference(w: float) -> float:
        _, pathwise, score = sine_moments(w, m, s)
        return pathwise - score

    return float(brentq(difference, 0.5 / s, 2.0 / s, xtol=1e-14))


def sine_variances(lab: Lab) -> tuple[float, float]:
    """Measure both variances against the closed forms; return those at w = 2."""
    draws = lab.pick(smoke=2_000, quick=100_000, full=1_000_000)
    generator = lab.generator()
    rows, measured = [], {}
    for w in (0.25, 0.5, 1.0, 2.0, 4.0):
        mean = torch.full((draws,), MEAN, dtype=torch.float64, requires_grad=True)
        log_variance = torch.full_like(mean, 2 * math.log(DEVIATION), requires_grad=False)
        z = reparameterize_normal(mean, log_variance, generator=generator)
        (pathwise,) = torch.autograd.grad(torch.sin(w * z).sum(), mean)
        z = z.detach()
        score = torch.sin(w * z) * (z - MEAN) / DEVIATION**2
        measured[w] = pathwise.var().item(), score.var().item()
        gradient, *exact = sine_moments(w, MEAN, DEVIATION)
        rows.append(
            {
                "$w$": w,
                "gradient": gradient,
                "reparameterised": measured[w][0],
                "closed form": exact[0],
                "score function": measured[w][1],
                "its closed form": exact[1],
            }
        )
    lab.table(
        "Variance of the gradient of $\\mathbb E[\\sin wz]$",
        rows,
        f"$z \\sim \\mathcal N({MEAN:g}, {DEVIATION:g})$, {draws} draws.",
    )
    lab.figure(
        "sine",
        sine_figure(measured),
        "Lines are closed forms, marks are measured. Slow functions favour reparameterisation by "
        f"orders of magnitude; the lines cross at w = {sine_crossing(MEAN, DEVIATION):.4f}.",
    )
    return measured[2.0]


class Autoencoder(nn.Module):
    """Categorical latent variables, Bernoulli pixels."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.encoder = MLP(pixels, [HIDDEN], VARIABLES * CATEGORIES, activation="relu")
        self.decoder = MLP(VARIABLES * CATEGORIES, [HIDDEN], pixels, activation="relu")

    def logits(self, images: Tensor) -> Tensor:
        return self.encoder(images).unflatten(-1, (VARIABLES, CATEGORIES))

    def distortion(self, states: Tensor, images: Tensor) -> Tensor:
        """-log p(images | states), summed over pixels."""
        pixels = self.decoder(states.flatten(-2))
        return functional.binary_cross_entropy_with_logits(
            pixels, images.expand_as(pixels), reduction="none"
        ).sum(-1)

    def negative_bound(self, images: Tensor, **options: Any) -> Tensor:
        logits = self.logits(images)
        log_q = logits.log_softmax(-1)
        # To the uniform prior, exact for every estimator.
        divergence = (log_q.exp() * (log_q + math.log(CATEGORIES))).sum((-2, -1))
        return divergence + categorical_expectation(
            lambda states: self.distortion(states, images), logits, **options
        )


def binarised(lab: Lab) -> tuple[Tensor, Tensor]:
    images = lab.data.images()
    most = 5000
    train, test = (
        (split.images[:most].flatten(1) > 0).float().to(lab.device)
        for split in (images.train, images.test)
    )
    return train, test


def new_autoencoder(lab: Lab, pixels: int, seed: int) -> Autoencoder:
    with seeded(seed):
        return Autoencoder(pixels).to(lab.device)


def temperatures(name: str, steps: int) -> Iterator[Options]:
    """The options of every training step; only the annealed estimator's change."""
    if name != ANNEALED:
        for _ in range(steps):
            yield ESTIMATORS[name]
        return
    schedule = ExponentialTemperature(
        initial=1.0, minimum=COLDEST, rate=math.log(1 / COLDEST) / steps
    )
    for _ in range(steps):
        yield {"estimator": "gumbel_softmax", "temperature": schedule.value}
        schedule.step()


def trained(lab: Lab, name: str, seed: int) -> Autoencoder:
    """Train with an estimator's gradient, or take up what an earlier run trained."""
    steps = lab.pick(smoke=8, quick=400, full=3000)
    train, _ = binarised(lab)
    model = new_autoencoder(lab, train.shape[1], seed)

    def train_model() -> None:
        batches = torch.Generator(lab.device).manual_seed(seed)
        noise = torch.Generator(lab.device).manual_seed(seed + 1_000_000)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3, fused=True)
        bar = lab.progress(list(temperatures(name, steps)), f"{name}, seed {seed}")
        for step, options in enumerate(bar):
            rows = torch.randint(len(train), (BATCH,), generator=batches, device=lab.device)
            loss = model.negative_bound(train[rows], generator=noise, **options).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                bar.metric(loss=loss.item())

    key = f"autoencoder-{TRAINED.index(name)}-{seed}"
    return lab.trained(key, model, train_model, inputs={"name": name, "steps": steps})


def trained_bounds(lab: Lab) -> dict[str, float]:
    """Train with every estimator; return the exact negative bound on the training images."""
    seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=2, full=5))]
    train, test = binarised(lab)
    rows, bounds = [], {}
    for name in TRAINED:
        with torch.no_grad():
            models = [trained_with_grad(lab, name, seed) for seed in seeds]
            on_train, on_test = (
                torch.stack(
                    [model.negative_bound(images, estimator="exact").mean() for model in models]
                )
                for images in (train, test)
            )
        bounds[name] = on_train.mean().item()
        rows.append(
            {
                "gradient": name,
                "negative bound": bounds[name],
                "spread over seeds": (on_train.max() - on_train.min()).item(),
                "held-out images": on_test.mean().item(),
            }
        )
    steps = lab.pick(smoke=8, quick=400, full=3000)
    lab.table(
        "Exact negative bound after training, in nats",
        rows,
        f"{steps} steps of Adam, batches of {BATCH}, {len(seeds)} seeds; every estimator starts "
        "from the same weights and sees the same batches.",
    )
    return bounds


def trained_with_grad(lab: Lab, name: str, seed: int) -> Autoencoder:
    with torch.enable_grad():
        return trained(lab, name, seed)


def estimator_moments(lab: Lab) -> dict[str, dict[str, float]]:
    """Bias and variance of every estimator at a trained encoder, against enumeration."""
    repeats = lab.pick(smoke=100, quick=4000, full=20_000)
    train, _ = binarised(lab)
    images = train[:8]
    model = trained(lab, "exact", lab.seed).requires_grad_(False)
    logits = model.logits(images).detach()
    truth = logit_gradients(lab, model, images, logits, 1, ESTIMATORS["exact"])[0]
    norm = truth.square().sum().item()
    rows, moments = [], {}
    for name in lab.progress([n for n in ESTIMATORS if n != "exact"], "bias and variance"):
        estimates = logit_gradients(lab, model, images, logits, repeats, ESTIMATORS[name])
        bias, error, variance = squared_bias(estimates.flatten(1), truth.flatten())
        moments[name] = {
            "bias": bias / norm,
            "variance": variance / norm,
            "distance": distance_along(estimates, truth),
        }
        rows.append(
            {
                "gradient": name,
                "squared bias": bias / norm,
                "its standard error": error / norm,
                "variance": variance / norm,
                "mean squared error": (bias + variance) / norm,
                "distance": moments[name]["distance"],
            }
        )
    lab.table(
        "Gradients in the logits, relative to the squared norm of the true one",
        rows,
        f"Eight images, {repeats} draws of each estimator. The last column is the largest distance "
        "of a mean from enumeration along an image's true gradient, in standard errors.",
    )
    lab.figure(
        "bias-variance",
        moments_figure(moments),
        "Squared bias against variance, relative to the true gradient; unbiased estimators at the "
        "left edge. Cooling moves Gumbel-softmax along the line, from biased to noisy.",
    )
    return moments


def logit_gradients(
    lab: Lab, model: Autoencoder, images: Tensor, logits: Tensor, repeats: int, options: Options
) -> Tensor:
    """One gradient per repeat: repeats are rows of a batch, whose costs do not mix."""
    chunk = 500
    generator = lab.generator(lab.device)
    pieces = []
    for start in range(0, repeats, chunk):
        count = min(chunk, repeats - start)
        leaf = logits.repeat(count, 1, 1).requires_grad_()
        copies = images.repeat(count, 1)

        def distortion(states: Tensor, copies: Tensor = copies) -> Tensor:
            return model.distortion(states, copies)

        cost = categorical_expectation(distortion, leaf, generator=generator, **options)
        (gradient,) = torch.autograd.grad(cost.sum(), leaf)
        pieces.append(gradient.double().cpu().unflatten(0, (count, len(images))))
    return torch.cat(pieces)


def squared_bias(estimates: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Squared bias without the share of sampling noise, its standard error, total variance."""
    repeats = len(estimates)
    offset = estimates.mean(0) - truth
    covariance = estimates.T.cov()
    variance = covariance.trace().item()
    bias = offset.square().sum().item() - variance / repeats
    spread = 4 * (offset @ covariance @ offset) / repeats
    spread = spread + 2 * covariance.square().sum() / repeats**2
    return bias, math.sqrt(spread.item()), variance


def distance_along(estimates: Tensor, truth: Tensor) -> float:
    """Largest distance of the mean from the truth along an image's gradient, in standard errors.

    Entry by entry the standard error itself could not be trusted: a category that was never drawn
    shows no variance.
    """
    along = (estimates * truth).sum((-2, -1))
    error = along.std(0) / math.sqrt(len(along))
    return ((along.mean(0) - truth.square().sum((-2, -1))) / error).abs().max().item()


def half_precision(lab: Lab) -> None:
    """Draw from 512 equal bfloat16 logits, with torch's function and with ours."""
    draws = lab.pick(smoke=200, quick=4000, full=20_000)
    logits = torch.full((draws, 512), 100.0, dtype=torch.bfloat16, device=lab.device)
    with seeded(lab.seed):
        theirs = functional.gumbel_softmax(logits, hard=True).argmax(-1)
    ours = gumbel_max(logits, generator=lab.generator(lab.device))
    shares = {
        "added in bfloat16": (theirs < 256).double().mean().item(),
        "added in float32": (ours < 256).double().mean().item(),
    }
    lab.table(
        "Share of draws in the first half of 512 equal categories",
        [{"noise": noise, "share": share} for noise, share in shares.items()],
        f"bfloat16 logits of 100, {draws} draws: a share of 1/2 is right, with a standard error of "
        f"{0.5 / math.sqrt(draws):.2g}.",
    )
    lab.observe(
        "distance of our share from 1/2, in standard errors",
        abs(shares["added in float32"] - 0.5) * 2 * math.sqrt(draws),
        "<=",
        STANDARD_ERRORS,
    )


def sine_figure(measured: dict[float, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    frequencies = torch.logspace(math.log10(0.2), math.log10(5), 200).tolist()
    for i, (label, marker) in enumerate((("reparameterised", "o"), ("score function", "s"))):
        exact = [sine_moments(w, MEAN, DEVIATION)[1 + i] for w in frequencies]
        (line,) = axis.plot(frequencies, exact, linestyle=("-", "--")[i], label=label)
        axis.plot(
            list(measured),
            [pair[i] for pair in measured.values()],
            marker,
            color=line.get_color(),
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    axis.minorticks_off()
    axis.set_xlabel("frequency w")
    axis.set_ylabel("variance of the gradient")
    axis.legend()
    return figure


def moments_figure(moments: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    edge = 0.01
    relaxed = [name for name in moments if name.startswith("Gumbel-softmax")]
    axis.plot(
        [max(moments[name]["bias"], edge) for name in relaxed],
        [moments[name]["variance"] for name in relaxed],
        marker="o",
        label="Gumbel-softmax",
    )
    for name in relaxed:
        axis.annotate(
            name.removeprefix("Gumbel-softmax, "),
            (max(moments[name]["bias"], edge), moments[name]["variance"]),
            xytext=(6, 4),
            textcoords="offset points",
        )
    markers = iter("sDv^<>P")
    for name, numbers in moments.items():
        if name not in relaxed:
            bias = edge if name in UNBIASED else max(numbers["bias"], edge)
            axis.plot([bias], [numbers["variance"]], next(markers), label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("squared bias (left edge: 0.01 and below)")
    axis.set_ylabel("variance")
    axis.legend(fontsize="small", loc="upper right")
    return figure
