r"""Poisson flow: from gravitation to a generative model.

Let every training example be a mass. Far away their joint pull is that of a single point, and its
lines cross a large sphere evenly. Follow such a line inwards and it ends at one of the masses. So
a sampler is: draw a point on a far sphere, follow the field, stop. There is no noising process in
it and no Gaussian. Does it work, and what is hidden in "stop"?

## The law

In $n$ dimensions the force that sends the same flux through every sphere around a point $y$ is

$$E(x) = \frac{1}{S(n)} \frac{x - y}{\|x - y\|^n}, \qquad
S(n) = \frac{2 \pi^{n/2}}{\Gamma(n/2)},$$

the inverse square law at $n = 3$. Here $E$ points away from the data; only its direction matters.
The charges $y_i$ carry weights $w_i$, and their fields add up.

## Why one more dimension

A uniform shell has no field inside. Any part of the data that is balanced around a point is
invisible from there: lines pass through it and end where the enclosed mass is zero. A uniform disk
in the plane has $E = x / 2\pi$ inside, and *all* lines end in its centre. That is mode collapse.

Lift the data into the plane $z = 0$ of a space with one more dimension, or $D$ of them, at
distance $z$. Nothing is balanced any more, and $z = 0$ is also the sign to stop:

$$E(x, z) = \frac{1}{S(N + D)} \sum_i w_i \frac{(x - y_i,\, z)}{R_i^{N+D}}$$

with $R_i^2 = \|x - y_i\|^2 + z^2$.

With $m(x, z)$ the mean of the charges under the weights $w_i R_i^{-(N+D)}$ the field is parallel
to $(x - m, z)$, and a line obeys

$$\frac{dx}{dz} = \frac{x - m(x, z)}{z}, \qquad \text{or} \qquad \frac{dx}{d \log z} = x - m.$$

$m$ is the ideal denoiser, and one Euler step from $z_{\min}$ to $0$ lands on it exactly.

## Where to start

Field lines cross a hemisphere of radius $\sqrt{\|x\|^2 + T^2}$ uniformly, with density
$(\|x\|^2 + T^2)^{-N/2}$. Projecting onto the plane $z = T$ divides an element of area by
$\sqrt{\|x\|^2 + T^2} / T$. Together

$$p(x) \propto (\|x\|^2 + T^2)^{-(N+1)/2},$$

a multivariate Cauchy distribution. With $D$ dimensions the exponent is $(N + D)/2$: Student's $t$
with $D$ degrees of freedom and scale $\sigma = T / \sqrt D$. As flux is conserved, this holds at
every height, around every charge: the flow transports $p_z = \sum_i w_i t_D(y_i, z^2 / D)$. For
$D \to \infty$ that is Gaussian noise, and Poisson flow is the ODE of a diffusion model.

## What a network learns

A network cannot learn numbers like $R^{-(N+D)}$, so the field is normalised,

$$v = -\sqrt N \, \frac{(x - m,\, z)}{\|(x - m,\, z)\| + \gamma}.$$

The mean $m$ is taken over a batch. A mean over a batch may be close to the true mean on average
and its *normalised* value is still biased: the norm is no linear function. So batches must be
large, thousands for 128 points. PFGM++ avoids it: regression of $y$ on $y + \text{noise}$ has
$m$ as its minimum, whatever the batch.

The division can be undone without the network's estimate of the $z$ part. With
$n = \|v_x\| / \sqrt N$ and $a = \|x - m\|$ the definition says
$n (\sqrt{a^2 + z^2} + \gamma) = a$. Squared, a quadratic equation with the positive root

$$a = n \, \frac{\gamma + \sqrt{n^2 \gamma^2 + (1 - n^2) z^2}}{1 - n^2}, \qquad
\frac{dx}{dz} = -\frac{a}{z} \frac{v_x}{\|v_x\|}.$$

## What decides it

*Collapse.* Points of the unit disk are charges. Without the extra dimension lines start on a circle
of radius 3 and follow $-E$, softened at distances below 0.2 so that they see the disk and not its
grains. With it they start from the prior. Half the area of the disk lies within radius
$\sqrt{1/2} = 0.707$: the median should be there, and the squared radius uniform.

*Prior.* Digits are charges. If lines share out the plane fairly, every digit is hit equally often:
a chi-square test of the counts. A start that is not the prior should fail it. How much of the
prior matters depends on the dimension: at $N = 64$ the *direction* of a start point decides and
its radius hardly does, so a normal distribution of the right scale passes too.

*Bias.* The target from random batches, averaged over many of them, against the target from all
data.

The field of these experiments is exact. Its samples are the charges themselves: that is what the
test asks for, and no generation. The sheet at the end comes from trained networks.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

from kexue.generative.poisson_flow import (
    DenoiserDrift,
    EmpiricalPoissonField,
    NormalizedFieldDrift,
    PerturbedSample,
    PoissonFlowLoss,
    PoissonFlowPlusLoss,
    integrate,
    perturb,
    poisson_target,
    sample,
    sample_prior,
)
from kexue.lab import Lab, seeded
from kexue.lab.data import Images
from kexue.lab.measures import energy_distance
from kexue.lab.sheets import sheet_figure
from kexue.models import MLPDenoiser, SmallUNet

STEPS = 60
SOFTENING = 0.2
GAMMA = 5.0


def run(lab: Lab) -> None:
    collapse(lab)
    # The numbers of the claim are those of the digits.
    judge = lab.claim if lab.data.path is None else lab.observe
    prior(lab, judge)
    bias(lab, judge)
    networks(lab)


def collapse(lab: Lab) -> None:
    """Follow lines to a uniform disk, with and without the extra dimension."""
    count = lab.pick(smoke=200, quick=500, full=1500)
    starts = lab.pick(smoke=50, quick=300, full=300)
    generator = lab.generator()
    charges = disk(count, generator)
    angle = torch.rand(starts, dtype=torch.float64, generator=generator) * 2 * math.pi
    circle = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    in_the_plane = follow_in_the_plane(circle, charges)

    field = EmpiricalPoissonField(charges)
    lifted = partial(sample, field, (starts, 2), num_steps=STEPS, dtype=torch.float64)
    ends = {
        "D = 0, softened": in_the_plane[-1],
        "D = 1, down to z = 0.01": lifted(z_min=0.01, generator=generator),
        "D = 1, down to z = 0.2": lifted(z_min=0.2, generator=generator),
    }
    rows = []
    for name, end in ends.items():
        radius = end.norm(dim=1)
        uniform = stats.kstest(radius.square().numpy(), "uniform").pvalue
        rows.append({"lines": name, "median radius": radius.median().item(), "p of $r^2$": uniform})
    lab.table(
        "Where lines to a uniform disk end",
        rows,
        f"{count} charges, one in each of {count} rings of equal area, {starts} lines. A uniform "
        "disk has median radius 0.707, and its squared radius passes a Kolmogorov-Smirnov test of "
        "uniformity. Stopping at z = 0.2, above the distance of neighbouring charges, gives their "
        "local mean and empties the rim.",
    )
    lab.claim("median radius of lines without extra dimension", rows[0]["median radius"], "<", 0.1)
    lab.claim(
        "p-value of a uniform $r^2$ with one extra dimension", rows[1]["p of $r^2$"], ">", 0.01
    )
    lab.observe("median radius with one extra dimension", rows[1]["median radius"], ">", 0.6)
    lab.observe(
        "p-value of a uniform $r^2$ where lines stop at z = 0.2", rows[2]["p of $r^2$"], "<", 1e-6
    )
    far = sample_prior((starts, 2), 40.0, generator=generator, dtype=torch.float64)
    lab.figure(
        "lines",
        line_figure(charges, in_the_plane, path(field, far, 40.0, 0.01)),
        "Lines to the same disk of charges (grey). Left: in the plane all of them run through the "
        "disk to its centre. Right: with one more dimension, seen from above, they spread over it; "
        "most of them come from far outside.",
    )


def disk(count: int, generator: torch.Generator) -> Tensor:
    """Return points uniform in the unit disk, one in each of `count` rings of equal area."""
    uniform = torch.rand(2, count, dtype=torch.float64, generator=generator)
    radius = ((torch.arange(count) + uniform[0]) / count).sqrt()
    angle = 2 * math.pi * uniform[1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def follow_in_the_plane(x: Tensor, charges: Tensor) -> list[Tensor]:
    """Return the points of lines of −E in the plane, where 1/R² is softened to 1/(R² + 0.2²).

    Only the direction of E matters; its length is chosen as the distance to the weighted mean.
    """

    def velocity(x: Tensor) -> Tensor:
        weights = 1 / (torch.cdist(x, charges).square() + SOFTENING**2)
        return weights @ charges / weights.sum(1, keepdim=True) - x

    points, step = [x], 0.25
    for _ in range(200):
        slope = velocity(x)
        x = x + step / 2 * (slope + velocity(x + step * slope))
        points.append(x)
    return points


def path(field: EmpiricalPoissonField, x: Tensor, z_start: float, z_end: float) -> list[Tensor]:
    """Return the points of lines at heights that are even in log z."""
    heights = torch.logspace(math.log10(z_start), math.log10(z_end), STEPS + 1).tolist()
    points = [x]
    for z, next_z in pairwise(heights):
        points.append(integrate(field, points[-1], z, next_z, num_steps=1))
    return points


def prior(lab: Lab, judge: Callable[..., Any]) -> None:
    """Count which image the lines end at, for the prior and for other starts."""
    images = lab.data.images()
    count = lab.pick(smoke=10, quick=30, full=100)
    starts = lab.pick(smoke=100, quick=1000, full=4000) // share(images)
    charges = images.train.images[:count].flatten(1).to(lab.device)
    dim, generator = charges.shape[1], lab.generator(lab.device)

    def hits(x: Tensor, z_max: float, data: Tensor) -> Tensor:
        end = integrate(EmpiricalPoissonField(data), x, z_max, 0.01, num_steps=STEPS)
        return torch.cdist(end, data).argmin(1).bincount(minlength=count).cpu()

    def cauchy(z_max: float) -> Tensor:
        return sample_prior((starts, dim), z_max, generator=generator, device=lab.device)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(starts, dim, generator=generator, device=lab.device)

    centred = charges - charges.mean(0)
    trials: list[tuple[str, float, Tensor, Tensor]] = [
        ("prior", 400.0, cauchy(400.0), charges),
        ("prior", 40.0, cauchy(40.0), charges),
        ("prior, centred images", 40.0, cauchy(40.0), centred),
        ("prior", 5.0, cauchy(5.0), charges),
        ("normal, standard deviation z", 40.0, normal(40.0), charges),
        ("normal, standard deviation 1", 40.0, normal(1.0), charges),
    ]
    rows, counts = [], []
    for name, z_max, x, data in lab.progress(trials, "prior"):
        hit = hits(x, z_max, data)
        counts.append(hit)
        rows.append(
            {
                "start": name,
                "$z_{\\max}$": z_max,
                "most hits": int(hit.max()),
                "never hit": int((hit == 0).sum()),
                "p of equal shares": stats.chisquare(hit.numpy()).pvalue,
            }
        )
    lab.table(
        f"Which of {count} images the lines end at, {images.name}",
        rows,
        f"{starts} lines of the exact field with D = 1, down to z = 0.01 in {STEPS} steps. "
        f"Equal shares are {starts / count:.4g} hits each. The prior is that of charges at 0, an "
        "error of the order of their mean over $z_{\\max}$; centring them removes its first order.",
    )
    judge(
        "p-value of equal shares from the prior at z = 400", rows[0]["p of equal shares"], ">", 0.01
    )
    judge("p-value of equal shares from N(0, 1)", rows[-1]["p of equal shares"], "<", 1e-6)
    lab.observe(
        "p-value of equal shares from the prior at z = 40", rows[1]["p of equal shares"], ">", 0.01
    )
    lab.observe(
        "p-value of equal shares from N(0, z²) at z = 40", rows[4]["p of equal shares"], ">", 0.01
    )
    lab.figure(
        "hits",
        hit_figure(counts[0], counts[-1], starts),
        "Hits on each image, sorted. Lines from the prior share out the images evenly; lines from "
        "the point where N(0, 1) is concentrated, seen from z = 40, go to a few of them.",
    )


def share(images: Images) -> int:
    """Return by how much to cut down experiments with images that are far larger than digits."""
    return 1 if images.train.images[0].numel() <= 256 else 2


def bias(lab: Lab, judge: Callable[..., Any]) -> None:
    """Measure bias and variance of the normalised target against the size of its batch."""
    images = lab.data.images()
    pool = torch.cat([images.train.images, images.test.images])[:1797].flatten(1).to(lab.device)
    sizes = lab.pick(smoke=(8, 32), quick=(8, 32, 128, 512), full=(8, 32, 128, 512, 1024))
    repeats = lab.pick(smoke=4, quick=24, full=64) // share(images)
    count, generator = 256, lab.generator(lab.device)
    owner = torch.randperm(len(pool), generator=generator, device=lab.device)[:count]
    points = perturb(pool[owner].double(), generator=generator)
    data = pool.double()
    exact = poisson_target(points.x, points.z, data, gamma=GAMMA)
    reference = torch.cat([exact.x, exact.z[:, None]], 1)

    def moments(size: int, *, own: bool) -> tuple[float, float]:
        """Return squared bias and variance as shares of the squared norm."""
        total, squares = torch.zeros_like(reference), torch.zeros_like(reference[:, 0])
        for _ in range(repeats):
            target = target_from_batches(points, data, owner, size, generator, own=own)
            total += target
            squares += target.square().sum(1)
        mean = total / repeats
        variance = (squares - repeats * mean.square().sum(1)) / (repeats - 1)
        # The mean of a finite number of batches strays by variance/repeats; that is no bias.
        squared_bias = (mean - reference).square().sum(1) - variance / repeats
        norm = reference.square().sum()
        return (squared_bias.sum() / norm).item(), (variance.sum() / norm).item()

    rows = []
    for size in lab.progress(sizes, "bias"):
        squared_bias, variance = moments(size, own=False)
        rows.append(
            {
                "batch $B$": size,
                "squared bias": squared_bias,
                "variance": variance,
                "squared bias, own image included": moments(size, own=True)[0],
            }
        )
    lab.table(
        f"Bias of the normalised target, {images.name}",
        rows,
        f"{count} perturbed images, gamma 5, {repeats} random batches of each size, as shares of "
        f"the squared norm of the target of all {len(pool)} images. A random batch rarely contains "
        "the image that a point came from. In training it always does (last column), which takes "
        "most of the bias away, but not all.",
    )
    biases = [row["squared bias"] for row in rows]
    between = f"at B = {sizes[0]} over that at B = {sizes[-1]}"
    judge(f"squared bias {between}", biases[0] / biases[-1], ">=", 3.0)
    growth = max(after / before for before, after in pairwise(biases))
    judge("largest ratio of a squared bias to that of the next smaller batch", growth, "<", 1.0)
    included = [row["squared bias, own image included"] for row in rows]
    lab.observe(
        f"squared bias {between}, own image included", included[0] / included[-1], ">=", 3.0
    )
    lab.figure(
        "bias",
        bias_figure(rows),
        "The bias of the target falls with the batch, but a batch of hundreds still has some, and "
        "more training does not average it away. With the point's own image in the batch, as in "
        "training, it is far smaller.",
    )


def target_from_batches(
    points: PerturbedSample,
    data: Tensor,
    owner: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    own: bool,
) -> Tensor:
    """Return the target of each point from a random batch, with its own source put in or not.

    As in training, points share a batch: as many as it has room for, with others to fill it.
    """
    x, z = points.x, points.z
    target = x.new_empty(len(x), x.shape[1] + 1)
    order = torch.randperm(len(x), generator=generator, device=x.device)
    for group in order.split(min(size, 64)):
        sources = owner[group]
        shuffled = torch.randperm(len(data), generator=generator, device=x.device)
        others = shuffled[~torch.isin(shuffled, sources)]
        batch = torch.cat([sources, others])[:size] if own else shuffled[:size]
        found = poisson_target(x[group], z[group], data[batch], gamma=GAMMA)
        target[group] = torch.cat([found.x, found.z[:, None]], 1)
    return target


class OnImages(nn.Module):
    """A U-Net of flat images; each further number is the mean of a further channel."""

    def __init__(self, event: torch.Size, further: int) -> None:
        super().__init__()
        self.event = event
        self.network = SmallUNet(event[0], base=16, output_channels=event[0] + further)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        output = self.network(x.unflatten(1, self.event), time)
        image, rest = output.tensor_split([self.event[0]], dim=1)
        return torch.cat([image.flatten(1), rest.mean((2, 3))], 1)


def new_network(event: torch.Size, *, further: int = 0) -> nn.Module:
    """Return a network from a flat image and a time to another image and further numbers."""
    if large(event):
        return OnImages(event, further)
    return MLPDenoiser(event.numel(), output_features=event.numel() + further)


def large(event: torch.Size) -> bool:
    """Whether a fully connected network would be narrower than the image."""
    return event.numel() > 256


class FieldNetwork(nn.Module):
    """A network of the normalised field: the field of one charge at 0, and a correction."""

    def __init__(self, event: torch.Size) -> None:
        super().__init__()
        self.network = new_network(event, further=1)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        dim = x.shape[1]
        norm = (x.square().sum(1) + z.square()).sqrt()
        far = -math.sqrt(dim) / (norm + GAMMA)
        # Inputs of order one at any distance.
        scaled = x / (1 + norm / math.sqrt(dim))[:, None]
        correction = self.network(scaled, 100 * z.log())
        return far[:, None] * x + correction[:, :-1], far * z + correction[:, -1]


class Preconditioned(nn.Module):
    """A denoiser whose network sees inputs, and learns outputs, of order one (EDM)."""

    def __init__(self, event: torch.Size, data_std: float) -> None:
        super().__init__()
        self.network = new_network(event)
        self.data_std = data_std

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        noise, total = sigma[:, None], (sigma[:, None].square() + self.data_std**2).sqrt()
        residual = self.network(x / total, 25 * sigma.log())
        return (self.data_std / total) ** 2 * x + noise * self.data_std / total * residual


def networks(lab: Lab) -> None:
    """Train on half of the images; compare samples with the other half."""
    images = lab.data.images()
    event = images.train.images.shape[1:]
    train, held_out = halves(lab, images.train.images.flatten(1))
    steps = lab.pick(smoke=10, quick=500, full=4000)
    dims = lab.pick(smoke=(64.0,), quick=(64.0,), full=(1.0, 64.0, math.inf))
    count = lab.pick(smoke=60, quick=300, full=700)
    if large(event):  # a step of a U-Net takes a hundred times longer
        steps, dims = lab.pick(smoke=3, quick=200, full=1000), dims[-2:]
        count = lab.pick(smoke=30, quick=60, full=200)
    floor = energy_distance(train[:count], held_out[:count])

    generator = lab.generator(lab.device)
    rows, sheets = [], {}
    for dim in (None, *dims):
        name = "normalised field, D = 1" if dim is None else f"denoiser, D = {number(dim)}"
        drift = trained(lab, train, event, dim, steps)
        augmented_dim = 1.0 if dim is None else dim
        scale = 1.0 if math.isinf(augmented_dim) else math.sqrt(augmented_dim)
        for num_steps in lab.pick(smoke=(2,), quick=(5, 25), full=(2, 5, 10, 25)):
            x = sample(
                drift,
                (count, train.shape[1]),
                z_max=40.0 * scale,
                z_min=0.01 * scale,
                augmented_dim=augmented_dim,
                num_steps=num_steps,
                spacing="rho",
                max_norm=largest_norm(train.shape[1]) if dim is None else None,
                generator=generator,
                device=lab.device,
            )
            rows.append(
                {
                    "network": name,
                    "evaluations": 2 * num_steps + 1,
                    "energy distance": energy_distance(x, held_out),
                }
            )
        sheets[name.replace(", ", "\n")] = x[:24].unflatten(1, event)
    lab.table(
        f"Samples of networks against held-out images, {images.name}",
        rows,
        f"{steps} steps of training each, {len(train)} images; energy distance of {count} samples "
        f"to {len(held_out)} images that training did not see. Real images are at {floor:.3g}. "
        "Lines of D = 1 come from very far, where few steps are too few.",
    )
    lab.figure(
        "samples",
        sheet_figure(sheets),
        "Samples of the trained networks, by field lines from the far plane.",
    )


def largest_norm(dim: int) -> float:
    """Return how far from the data `perturb` goes: a network of the field knows no more."""
    sigma, tau, largest_exponent = 0.01, 0.03, 291
    return sigma * math.sqrt(dim) * (1 + tau) ** largest_exponent


def halves(lab: Lab, images: Tensor) -> tuple[Tensor, Tensor]:
    limit = lab.pick(smoke=200, quick=1400, full=10_000)
    shuffled = images[torch.randperm(len(images), generator=lab.generator())][:limit]
    half = len(shuffled) // 2
    return shuffled[:half].to(lab.device), shuffled[half:].to(lab.device)


def trained(lab: Lab, train: Tensor, event: torch.Size, dim: float | None, steps: int) -> nn.Module:
    """Train a network of the field (no dim) or a denoiser of Student t noise."""
    data_std = train.std().item()
    with seeded(lab.seed):
        network: nn.Module
        if dim is None:
            network = FieldNetwork(event).to(lab.device)
        else:
            network = Preconditioned(event, data_std).to(lab.device)

    def train_network() -> None:
        generator = lab.generator(lab.device)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        loss_function: Any = PoissonFlowLoss(gamma=GAMMA)
        if dim is not None:
            loss_function = PoissonFlowPlusLoss(augmented_dim=dim, data_std=data_std)
        progress = lab.progress(range(steps), "train")
        for _ in progress:
            rows = torch.randperm(len(train), generator=generator, device=train.device)
            batch = train[rows[: 32 if large(event) else 128]]
            given = (batch, train[rows[:512]]) if dim is None else (batch,)
            loss = loss_function(network, *given, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            progress.metric(loss=loss.item())

    name = "field" if dim is None else f"denoiser-{number(dim)}".replace("∞", "inf")
    lab.trained(name, network, train_network, inputs={"steps": steps})
    if dim is None:
        return NormalizedFieldDrift(network, gamma=GAMMA)
    return DenoiserDrift(network, augmented_dim=dim)


def number(dim: float) -> str:
    return "∞" if math.isinf(dim) else f"{dim:g}"


def line_figure(charges: Tensor, plane: list[Tensor], lifted: list[Tensor]) -> Figure:
    figure = Figure(figsize=(6.5, 3.3), layout="constrained")
    for axis, lines, title in zip(
        figure.subplots(1, 2), (plane, lifted), ("no extra dimension", "one extra dimension"),
        strict=True,
    ):  # fmt: skip
        axis.scatter(*charges.T.numpy(), s=1, color="0.6")
        for line in torch.stack(lines, 1)[:40].numpy():
            axis.plot(*line.T, linewidth=0.7, color="C0", alpha=0.8)
        axis.scatter(*lines[-1].T.numpy(), s=4, color="C1", zorder=3)
        axis.set_aspect("equal")
        axis.set_xlim(-3.1, 3.1)
        axis.set_ylim(-3.1, 3.1)
        axis.set_xlabel(title)
    return figure


def hit_figure(fair: Tensor, unfair: Tensor, starts: int) -> Figure:
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, hits, title in (
        (left, fair, "from the prior at z = 400"),
        (right, unfair, "from N(0, 1) at z = 40"),
    ):
        axis.bar(range(len(hits)), hits.sort(descending=True).values.numpy())
        axis.axhline(starts / len(hits), linestyle="--", color="C1", label="equal shares")
        axis.set_xlabel(f"image, {title}")
        axis.set_ylabel("hits")
        axis.legend()
    return figure


def bias_figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    sizes = [row["batch $B$"] for row in rows]
    columns = ("squared bias", "variance", "squared bias, own image included")
    for column, marker in zip(columns, ("o", "s", "^"), strict=True):
        axis.plot(sizes, [row[column] for row in rows], marker=marker, label=column)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, labels=[str(size) for size in sizes])
    axis.set_xlabel("batch B")
    axis.set_ylabel("share of the target's squared norm")
    axis.legend()
    return figure
