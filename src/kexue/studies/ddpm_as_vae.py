r"""Denoising diffusion as an autoregressive VAE.

A variational autoencoder models encoder, prior and decoder as Gaussians, and blurs: the true
posterior and the true decoder are no Gaussians. Denoising diffusion keeps the Gaussians and cuts
the way from data to noise into $T$ small steps. Each step of the way back has to model a tiny
change only, and a Gaussian can do that. How much does that help, in nats and in bits per pixel?

## One divergence between two chains

Write $p$ for encoding and $q$ for generating (the literature swaps the letters). The encoder is
fixed and has no parameters,

$$p(x_t \mid x_{t-1}) = \mathcal N(\alpha_t x_{t-1}, \beta_t^2 I), \qquad
\alpha_t^2 + \beta_t^2 = 1,$$

which keeps $\mathcal N(0, I)$ as it is, and jumps to any step at once:
$x_t = \bar\alpha_t x_0 + \bar\beta_t \varepsilon$ with $\bar\alpha_t = \alpha_1 \cdots \alpha_t$
and $\bar\beta_t^2 = 1 - \bar\alpha_t^2$. The generator starts from $q(x_T) = \mathcal N(0, I)$
and takes steps $q(x_{t-1} \mid x_t) = \mathcal N(\mu(x_t), \sigma_t^2 I)$. A VAE makes the two
joint distributions of $(x_0, \dots, x_T)$ agree; as $p$ has nothing to learn, what remains is

$$-\mathbb E_p \Big[\log q(x_T) + \sum_t \log q(x_{t-1} \mid x_t)\Big].$$

With $\mu(x_t) = \big(x_t - \tfrac{\beta_t^2}{\bar\beta_t} \hat\varepsilon(x_t, t)\big)/\alpha_t$
each term is the regression
$\|\varepsilon - \hat\varepsilon(\bar\alpha_t x_0 + \bar\beta_t \varepsilon, t)\|^2$, times a
weight that DDPM drops.

## Any two times

No step has to be small for the algebra. For $s < t$ and every $\sigma \le \bar\beta_s$ the
combination

$$x_s = \kappa x_t + \lambda x_0 + \sigma \varepsilon, \qquad
\kappa = \frac{\sqrt{\bar\beta_s^2 - \sigma^2}}{\bar\beta_t}, \qquad
\lambda = \bar\alpha_s - \bar\alpha_t \kappa,$$

has the right distribution of $x_s$ given $x_0$. The generator knows $\hat x_0(x_t)$ instead of
$x_0$, so its best Gaussian has the variance
$\sigma^2 + \lambda^2 \operatorname{Var}[x_0 \mid x_t]$. On a grid $t_n > \dots > t_1 > 0$ this
bounds the likelihood,

$$-\log q(x_0) \le \mathrm{KL}\big(p(x_{t_n} \mid x_0) \,\|\, \mathcal N(0, I)\big)
+ \sum_i \mathrm{KL}\big(p(x_{t_{i-1}} \mid x_{t_i}, x_0) \,\|\, q(x_{t_{i-1}} \mid x_{t_i})\big)
+ \mathbb E\big[-\log q(x_0 \mid x_{t_1})\big],$$

and the number of steps $n$ is free. At $n = 1$ it is the bound of a one-step Gaussian VAE.

## What decides it

For Gaussian data with the exact denoiser, every reverse transition *is* Gaussian: the bound
equals the entropy for every number of steps, even one. That is the control. For a mixture of
three Gaussians the exact denoiser is known too, nothing is learned, and all that is left of the
bound above the entropy is the price of Gaussian steps. If the article is right it is large at
$n = 1$ and vanishes as $n$ grows.

On real images the denoiser is a network, the clean variance a table of its squared errors on
training data, and the bound a rate in bits per pixel: the probability of the quantised pixels,
not a density. The grids are equally spaced and stop where the noise is about half a bin. Below
that level an imperfect network pays for every transition, while the discretised decoder gets the
same information for free; the last rows of the table show what happens to grids that go on.

## Norm, not mean

The article advises the squared Euclidean norm per example as the loss, not its mean over pixels.
The mean divides every gradient by width times height times channels, and half precision ends at
$6 \cdot 10^{-8}$. The last table counts the gradient entries of the first layer that are exactly
zero.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kexue.generative.diffusion import (
    Denoiser,
    DiscreteSchedule,
    GaussianMixtureDenoiser,
    ImageDenoiser,
    NetworkDenoiser,
    denoising_loss,
    sample,
    variational_bound,
)
from kexue.lab import Lab, seeded
from kexue.lab.data import Images
from kexue.lab.sheets import sheet_figure
from kexue.models import MLPDenoiser
from kexue.studies._diffusion import three_gaussians, trained_denoiser

MIXTURE_STEPS = (1, 2, 5, 10, 20, 100)
IMAGE_STEPS = (1, 2, 5, 10, 25, 50, 97)


def run(lab: Lab) -> None:
    gaps, control = mixture_gaps(lab)
    lab.claim("gap of one step to the entropy of the mixture, in nats", gaps[1], ">=", 1.0)
    lab.claim("gap of five steps", gaps[5], ">=", 0.5)
    lab.claim("gap of a hundred steps", gaps[100], "<=", 0.12)
    largest = max(abs(gap) for gap in control.values())
    lab.claim("largest gap of Gaussian data at any number of steps", largest, "<=", 0.05)

    rates = image_rates(lab)
    # A short training, or the user's own images, are reported; the claim is about digits.
    judge = lab.claim if lab.budget == "full" and lab.data.path is None else lab.observe
    saved = rates[1] - rates[IMAGE_STEPS[-1]]
    judge("bits per pixel saved by 97 steps against one", saved, ">=", 0.3)
    later = [rates[n] for n in IMAGE_STEPS[1:]]
    increase = max(after - before for before, after in pairwise(later))
    judge("largest increase of the rate from 2 steps on", increase, "<=", 0.02)

    underflow(lab)


def mixture_gaps(lab: Lab) -> tuple[dict[int, float], dict[int, float]]:
    """Measure the gap of the bound to the entropy for exact denoisers."""
    schedule = DiscreteSchedule.linear()
    mixture = three_gaussians(schedule)
    points = lab.pick(smoke=50, quick=500, full=2000)
    draws = lab.pick(smoke=1, quick=40, full=40)
    rows, gaps, control = [], {}, {}
    for num_steps in lab.progress(MIXTURE_STEPS, "mixture"):
        measured = [
            gap_to_entropy(denoiser, num_steps, points, draws, lab.generator())
            for denoiser in (mixture, matching_gaussian(mixture))
        ]
        (gaps[num_steps], error), (control[num_steps], control_error) = measured
        rows.append(
            {
                "steps $n$": num_steps,
                "mixture": gaps[num_steps],
                "standard error": error,
                "one Gaussian": control[num_steps],
                "its standard error": control_error,
            }
        )
    lab.table(
        "Bound minus entropy, in nats",
        rows,
        f"Exact denoiser and exact conditional variance, {points} points, {draws} noises each.",
    )
    lab.figure(
        "gaps",
        gap_figure(rows),
        "The price of Gaussian steps falls to nothing as they become many. For Gaussian data there "
        "is no price at any number: what is left there is sampling error.",
    )
    return gaps, control


def matching_gaussian(mixture: GaussianMixtureDenoiser) -> GaussianMixtureDenoiser:
    """Return the Gaussian of the mixture's mean and covariance, along its principal axes.

    Along these axes the conditional covariance is diagonal, so a variance per entry is exact.
    """
    weights, means = mixture.log_weights.exp(), mixture.means
    assert mixture.eigenvectors is not None
    within = mixture.eigenvectors @ torch.diag_embed(mixture.eigenvalues) @ mixture.eigenvectors.mT
    centre = weights @ means
    spread = means - centre
    covariance = torch.einsum("k,kij->ij", weights, within) + spread.T @ (weights[:, None] * spread)
    variances, axes = torch.linalg.eigh(covariance)
    return GaussianMixtureDenoiser(
        (centre @ axes).unsqueeze(0), variances.unsqueeze(0), schedule=mixture.schedule
    )


def gap_to_entropy(
    denoiser: GaussianMixtureDenoiser,
    num_steps: int,
    points: int,
    draws: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Return mean and standard error of the bound plus the log-density at the same points."""
    clean = denoiser.sample(points, generator=generator)
    bound = variational_bound(
        denoiser,
        clean.repeat_interleave(draws, 0),
        num_steps=num_steps,
        clean_variance=denoiser.clean_variance,
        generator=generator,
    )
    gap = bound.total.reshape(points, draws).mean(1) + denoiser.log_prob(clean)
    return gap.mean().item(), gap.std().item() / math.sqrt(points)


def image_rates(lab: Lab) -> dict[int, float]:
    """Measure bits per pixel on held-out images against the number of steps."""
    images = lab.data.images()
    device = lab.device
    denoiser = trained_denoiser(lab, images)
    schedule = denoiser.schedule
    share = 8 if denoiser.convolutional else 1
    train = images.train.images[: lab.pick(smoke=64, quick=512, full=2048) // share].to(device)
    held_out = images.test.images[: lab.pick(smoke=32, quick=200, full=200) // share].to(device)
    draws = 1 if denoiser.convolutional else lab.pick(smoke=1, quick=2, full=8)
    repeated = held_out.repeat_interleave(draws, 0)

    # Where the noise is a little above half a bin: t = 40 for the digits.
    last = max(1.0, schedule.time_from_sigma(0.59 * images.bin_width).round().item())
    grids = {f"to t = {last:g}": {n: equally_spaced(schedule, n, last) for n in IMAGE_STEPS}}
    below_the_bin = lab.pick(smoke=(), quick=(100,), full=(100, 250))
    if below_the_bin and not denoiser.convolutional:
        grids["trailing, to 0"] = {n: schedule.times(n) for n in below_the_bin}
    times = sorted(
        {t for family in grids.values() for grid in family.values() for t in grid[:-1].tolist()}
    )
    generator = lab.generator(device)
    learned = residual_variance(lab, denoiser, train, times, generator)

    def rate(grid: Tensor, clean_variance: Callable[..., Tensor] | None) -> float:
        bound = variational_bound(
            denoiser,
            repeated,
            times=grid,
            clean_variance=clean_variance,
            decoder="discretized_normal",
            bin_width=images.bin_width,
            generator=generator,
        )
        return bound.bits_per_dimension().mean().item()

    rows, rates = [], {}
    for family, members in grids.items():
        for num_steps, grid in lab.progress(list(members.items()), "bits per pixel"):
            row = {
                "grid": family,
                "steps $n$": num_steps,
                "learned variance": rate(grid, learned),
                "posterior variance": rate(grid, None) if num_steps > 1 else None,
            }
            rows.append(row)
            if family.startswith("to"):
                rates[num_steps] = row["learned variance"]
    lab.table(
        f"Bits per pixel, {images.name}",
        rows,
        f"{len(held_out)} held-out images, bins of width {images.bin_width:.4g}, discretised "
        "normal decoder. The claim is about steps, not about beating models of another kind.",
    )
    lab.figure(
        "rates",
        rate_figure(rows),
        "More steps, fewer bits, as long as the grid ends at the width of a bin. With the "
        "posterior variance alone few steps are overconfident. Grids that go on below the bin "
        "cost more again.",
    )
    sheets(lab, denoiser, images)
    return rates


def equally_spaced(schedule: DiscreteSchedule, num_steps: int, last: float) -> Tensor:
    times = torch.linspace(schedule.maximum_time, last, num_steps, dtype=torch.float64).round()
    return torch.cat([times, times.new_zeros(1)])


@torch.no_grad()
def residual_variance(
    lab: Lab, denoiser: Denoiser, clean: Tensor, times: list[float], generator: torch.Generator
) -> Callable[..., Tensor]:
    """Return the mean squared error of x̂_0 at each of these times, as a clean variance.

    It is the best variance of a Gaussian around x̂_0, for any x̂_0, right or wrong.
    """
    table = {}
    for time in lab.progress(times, "variances"):
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        x = denoiser.schedule.add_noise(clean, noise, time)
        table[time] = (denoiser.predict(x, time).sample - clean).double().square().mean()

    def variance(
        x: Tensor, time: float | Tensor, prediction: object, condition: object = None
    ) -> Tensor:
        return table[float(time)]

    return variance


def sheets(lab: Lab, denoiser: ImageDenoiser, images: Images) -> None:
    """Show samples for one, ten and a thousand steps."""
    counts = lab.pick(smoke=(1, 5, 10), quick=(1, 10, 1000), full=(1, 10, 1000))
    event = images.train.images.shape[1:]
    drawn = {
        f"n = {n}": sample(denoiser, (24, *event), num_steps=n, generator=lab.generator(lab.device))
        for n in counts
    }
    lab.figure(
        "samples",
        sheet_figure(drawn),
        "From the same noise: one step gives the mean image, that is the blur of a one-step "
        f"Gaussian VAE; {counts[1]} and {counts[2]} steps give digits.",
    )


def underflow(lab: Lab) -> None:
    """Count gradient entries that half precision loses, for sum and mean over pixels."""
    small = lab.data.digits().train.images[:16].flatten(1)
    large = photograph_crops(lab, 16, 128).flatten(1)
    rows = []
    for name, clean in (("8×8", small), ("128×128×3", large)):
        for reduction in ("sum", "mean"):
            gradient = half_precision_gradient(lab, clean, reduction)
            rows.append(
                {
                    "image": name,
                    "loss of an example": reduction,
                    "exactly zero": (gradient == 0).double().mean().item(),
                    "with digits lost": (gradient.abs() < 2**-14).double().mean().item(),
                }
            )
    lab.table(
        "Share of gradient entries that float16 loses",
        rows,
        "First layer of an untrained network, batch of 16. Below $2^{-14}$ a number keeps fewer "
        "than its eleven bits, below $2^{-25}$ it is zero.",
    )
    lab.observe(
        "share of zero gradients at 128×128×3, mean",
        rows[-1]["exactly zero"],
        ">",
        rows[-2]["exactly zero"],
    )


def photograph_crops(lab: Lab, count: int, size: int) -> Tensor:
    photographs = lab.data.photographs()
    generator = lab.generator()
    crops = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top, left = (
            int(torch.randint(side - size + 1, (), generator=generator))
            for side in photograph.shape[1:]
        )
        crops.append(photograph[:, top : top + size, left : left + size])
    return torch.stack(crops)


def half_precision_gradient(lab: Lab, clean: Tensor, event_reduction: str) -> Tensor:
    with seeded(lab.seed):
        network = MLPDenoiser(clean.shape[1], hidden=256, depth=3).half()
    loss = denoising_loss(
        NetworkDenoiser(network, DiscreteSchedule.cosine()),
        clean.half(),
        event_reduction=event_reduction,
        generator=lab.generator(),
    )
    (gradient,) = torch.autograd.grad(loss, [network.input.weight])
    return gradient


def gap_figure(rows: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    steps = [row["steps $n$"] for row in rows]
    for column, error, marker in (
        ("mixture", "standard error", "o"),
        ("one Gaussian", "its standard error", "s"),
    ):
        axis.errorbar(
            steps,
            [abs(row[column]) for row in rows],
            yerr=[row[error] for row in rows],
            marker=marker,
            linestyle="-" if column == "mixture" else ":",
            label=column,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("steps n")
    axis.set_ylabel("|bound − entropy|, nats")
    axis.legend()
    return figure


def rate_figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for family, style in ((True, "-"), (False, "--")):
        members = [row for row in rows if str(row["grid"]).startswith("to") == family]
        for column, marker in (("learned variance", "o"), ("posterior variance", "s")):
            shown = [row for row in members if row[column] is not None]
            if shown:
                axis.plot(
                    [row["steps $n$"] for row in shown],
                    [row[column] for row in shown],
                    marker=marker,
                    linestyle=style,
                    label=f"{column}, {'ends at the bin' if family else 'trailing'}",
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_yticks([2, 3, 5, 10, 20, 40], labels=["2", "3", "5", "10", "20", "40"])
    axis.minorticks_off()
    axis.set_xlabel("steps n")
    axis.set_ylabel("bits per pixel")
    axis.legend()
    return figure
