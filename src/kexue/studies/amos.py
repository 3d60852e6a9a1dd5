r"""Amos.

Whoever trains with AdamW still guesses: how the learning rate must differ between parameters of
different size, how much weight decay, which schedule and how long. Can all of it follow from one
number per parameter, the scale $\eta$ that its entries will have in the end?

## Decay that pays for the step

Write a step of any optimiser as

$$\theta_{t+1} = \theta_t - (\alpha_t u_t + \rho_t \theta_t),$$

and let $\varepsilon_t = \theta_t - \theta^*$ be the error. Weight decay must never dominate, so
$\rho_t = O(\alpha_t^2)$, and to that order

$$\|\varepsilon_{t+1}\|^2 \approx \|\varepsilon_t\|^2 - 2\alpha_t\, u_t \cdot \varepsilon_t
+ \left( \alpha_t^2 \|u_t\|^2 - 2\rho_t\, \theta_t \cdot \varepsilon_t \right).$$

The first term in brackets is the price of a finite step. Choose $\rho_t$ so that decay pays it:
$\alpha_t^2 \|u_t\|^2 = 2\rho_t\, \theta_t \cdot \varepsilon_t$. It can, because
$\theta_t \cdot \varepsilon_t = \|\varepsilon_t\|^2 + \theta^* \cdot \varepsilon_t
\approx q \|\varepsilon_t\|^2$ with $q \approx 1$: independent directions are nearly orthogonal.

With $\cos(u_t, \varepsilon_t) \approx p$, what remains shrinks the error by
$\exp(-2p\sqrt{2\rho_t q})$ in its square, in each step. Let step and decay fade together,
$2\rho_t q = \lambda^2 \|\varepsilon_t\|^2$, and let the first step be the share $\alpha_0$ of the
parameter's whole travel, $\lambda \|\varepsilon_0\| = \alpha_0$. Then, with
$S_t = \sum_{i<t} p\sqrt{2\rho_i q}$,

$$\alpha_t = \alpha_0\, \frac{\|\varepsilon_0\|}{\|u_t\|}\, e^{-2S_t}, \qquad
\rho_t = \frac{\alpha_0^2}{2q}\, e^{-2S_t}.$$

$\alpha_0$ is a *relative* rate and the same for the whole model. The travel
$\|\varepsilon_0\| \approx \sqrt k\, \sigma$ of $k$ entries is known before training: $\sigma$ is
the standard deviation of the initial values of a kernel, and about ½ for biases and gains. LAMB has
$\|\theta_t\|$ in its place, and must make exceptions for parameters that do not start around zero.

## A schedule without an end

By definition $S_{t+1} - S_t = \alpha_0\, p\, e^{-S_t}$. If $p$ stays what it is, then
$e^{-2S_t} = 1/(\alpha_0 p\, t + 1)^2$. If it falls like $p_0 e^{-S_t}$, because convergence slows
down with the error, then

$$e^{-2S_t} = \frac{1}{2\alpha_0 p_0\, t + 1} = \frac{1}{1 + t/T} .$$

One unknown is left, and it is the half-life $T$. The number of steps does not occur.

## AdamW by these rules

Adam's update has entries of size rms, near 1 early in training, so that the $\sqrt k$ cancels:

$$\text{lr}_t = \frac{\alpha_0 \sigma}{\text{rms}} \cdot \frac{1}{1 + t/T}, \qquad
\text{weight decay} = \frac{\rho_t}{\text{lr}_t} = \frac{\alpha_0\, \text{rms}}{2 q \sigma} .$$

torch multiplies weight decay by the rate, so one constant is right at every step. With
$\alpha_0 = 10^{-3}$ and $\sigma = 0.05$ it is 0.01: the value that everybody uses appears by
itself. `relative_scale_groups` and `ScaleDecayLR` are these two formulas.

## Amos

The optimiser of Tian and Parikh does the same with measured quantities. $M(g^2)$ is the mean of the
squared gradient over a row of a kernel or over a whole vector, $\xi$ the global rate, $\zeta = ¼$:

$$\begin{aligned}
v &\leftarrow \beta v + (1-\beta) M(g^2), \qquad w = (1-\beta^t)/v \\
c &= (1 + \zeta\sqrt\xi\, b)^{-1/2}, \qquad d = (1 + \zeta\sqrt{\xi\eta}\, b)^{-1} \\
\gamma &= c\, \xi^2 w\, M(g^2) \\
\theta &\leftarrow \theta - d\left( \xi\eta\sqrt w\, g + \tfrac12 \gamma\theta \right) \\
b &\leftarrow b + \gamma(1 + b) .
\end{aligned}$$

The first step has size $\xi\eta$, decay is of second order in $\xi$, and both fade as $b$ grows.
$v$ and $b$ hold a number a row, not a number an entry.

## What decides it

**One relative rate serves every parametrisation.** Each layer of a network computes
$x \cdot (\mu W)^\top + b$ with $W \sim N(0, 1/(\text{fan in} \cdot \mu^2))$. For
$\mu = 0.1, 1, 10$ the function at the start is the same and only what is stored differs. If
the scale is all that matters, then training must not see $\mu$: the worst test cross entropy may
exceed the best by 5 %. Plain AdamW with its usual settings must differ by a factor of 2.

**The derived decay needs no horizon.** With one relative rate and one half-life, networks are
trained to three horizons. At the last the inverse-time decay must be better than a constant rate,
and not worse than at the second. Cosine decay is told the horizon beforehand, and trained anew for
each; what it gains by that is reported.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from kexue.lab import DataError, Lab
from kexue.lab.data import Split
from kexue.optim import Amos, ScaleDecayLR, amos_parameter_groups, relative_scale_groups

MULTIPLIERS = (0.1, 1.0, 10.0)
ADAMW, RULE, AMOS = "AdamW", "AdamW, relative rate", "Amos"
CONSTANT, TIME, SQUARE, COSINE = "constant", "inverse time", "inverse square", "cosine"


class Perceptrons(nn.Module):
    """A multilayer perceptron for each seed, side by side; one alone stores plain matrices.

    A layer computes x·(mult·W)ᵀ + b with W of standard deviation 1/(mult·√fan_in).
    """

    def __init__(self, widths: Sequence[int], seeds: Sequence[int], *, mult: float = 1.0) -> None:
        super().__init__()
        self.mult = mult
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            starts = torch.stack([torch.randn(fan_out, fan_in, generator=g) for g in generators])
            biases = torch.zeros(len(seeds), 1, fan_out)
            if len(seeds) == 1:
                starts, biases = starts[0], biases[0, 0]
            self.weights.append(nn.Parameter(starts / (mult * math.sqrt(fan_in))))
            self.biases.append(nn.Parameter(biases))

    def forward(self, x: Tensor) -> Tensor:
        """From inputs (..., batch, features) to logits (..., batch, classes)."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (nn.functional.relu(x) if i else x) @ (self.mult * weight).mT + bias
        return x


def run(lab: Lab) -> None:
    train, test = problem(lab)
    # The criterion is one of the digits; on a user's images the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe

    spread = parametrisations(lab, train, test)
    judge("worst over best cross entropy, AdamW by the rule", spread[RULE], "<=", 1.05)
    judge("worst over best cross entropy, Amos", spread[AMOS], "<=", 1.05)
    judge("worst over best cross entropy, plain AdamW", spread[ADAMW], ">=", 2.0)

    loss, horizons = schedules(lab, train, test)
    _, second, last = horizons
    behind = loss[TIME][last] - loss[CONSTANT][last]
    judge(
        "cross entropy of inverse time minus that of a constant rate, at the last horizon",
        behind.mean(), "<", 0.0,
    )  # fmt: skip
    judge(
        "rise of the cross entropy of inverse time from the second to the last horizon",
        (loss[TIME][last] - loss[TIME][second]).mean(), "<=", 0.0,
    )  # fmt: skip
    lab.observe(
        "difference of inverse time and constant, in standard errors of the pairs",
        behind.mean() / (behind.std() / math.sqrt(len(behind))), "<=", -2.0,
    )  # fmt: skip
    informed = loss[COSINE][last]
    lab.observe(
        "what cosine gains over inverse time by knowing the last horizon",
        (loss[TIME][last][: len(informed)] - informed).mean(), ">", 0.0,
    )  # fmt: skip

    amos_rates(lab, train, test)
    state_bytes(lab)


def parametrisations(lab: Lab, train: Split, test: Split) -> dict[str, float]:
    """Train one function in three parametrisations; return worst over best test loss."""
    steps = lab.pick(smoke=3, quick=150, full=400)
    seeds = seeds_of(lab, lab.pick(smoke=1, quick=1, full=3))
    loss: dict[str, list[float]] = {}
    for method in lab.progress((ADAMW, RULE, AMOS), "parametrisations"):
        for mult in MULTIPLIERS:
            ends = []
            for seed in seeds:
                network = Perceptrons(widths(train, 128, 128), [seed], mult=mult)
                optimizer, schedule = prepared(network, method)
                training = Training(train, test, [seed], batch=64, steps=steps)
                ends.append(training.fit(network, optimizer, schedule)[steps].item())
            loss.setdefault(method, []).append(float(np.mean(ends)))
    spread = {method: max(values) / min(values) for method, values in loss.items()}
    lab.table(
        "One function, stored in three ways",
        [
            {
                "optimiser": method,
                **{f"μ = {m:g}": v for m, v in zip(MULTIPLIERS, loss[method], strict=True)},
                "worst / best": spread[method],
            }
            for method in loss
        ],
        f"Test cross entropy after {steps} steps of 64 examples, mean of {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}. AdamW: rate 0.001, weight decay 0.01. By the rule: "
        "relative rate 0.01, half-life 200. Amos: $\\xi = 0.01$.",
    )
    lab.figure(
        "parametrisations",
        parametrisation_figure(loss),
        "A flat line does not see how the weights are stored. Plain AdamW wants another rate for "
        "each $\\mu$.",
    )
    return spread


def schedules(
    lab: Lab, train: Split, test: Split
) -> tuple[dict[str, dict[int, Tensor]], tuple[int, int, int]]:
    """Train to three horizons without retuning; return the test losses of all networks."""
    horizons = lab.pick(smoke=(2, 4, 8), quick=(120, 400, 1000), full=(300, 1000, 2500))
    # A constant rate scatters widely: what the verdict compares takes many networks.
    many = seeds_of(lab, lab.pick(smoke=4, quick=96, full=96))
    few = many[: lab.pick(smoke=2, quick=16, full=16)]
    last = horizons[-1]
    marks = {*horizons, *np.unique(np.geomspace(10, last, 40).astype(int)).tolist()}
    curves: dict[str, dict[int, Tensor]] = {}
    runs: list[tuple[str, int, Callable[[Any], Any] | None]] = [
        (CONSTANT, last, None),
        (TIME, last, partial(ScaleDecayLR, half_life=100)),
        (SQUARE, last, partial(ScaleDecayLR, half_life=100, kind="inverse_square")),
        *((COSINE, horizon, partial(CosineAnnealingLR, T_max=horizon)) for horizon in horizons),
    ]
    for name, steps, schedule in lab.progress(runs, "schedules"):
        seeds = many if name in (CONSTANT, TIME) else few
        network = Perceptrons(widths(train, 64, 64), seeds)
        groups = relative_scale_groups(network, relative_lr=0.03, scale_rules=scale_rules(network))
        optimizer = torch.optim.AdamW(groups, fused=True)
        training = Training(train, test, seeds, batch=16, steps=steps)
        at = {steps} if name == COSINE else marks
        curve = training.fit(network, optimizer, schedule and schedule(optimizer), at=at)
        curves.setdefault(name, {}).update(curve)
    lab.table(
        "Three horizons, nothing retuned",
        [
            {
                "schedule": name,
                "networks": len(curve[last]),
                **{f"{horizon} steps": curve[horizon].mean() for horizon in horizons},
            }
            for name, curve in curves.items()
        ],
        "Mean test cross entropy; batches of 16, relative rate 0.03, half-life 100. All schedules "
        "share starts and batches. Cosine is trained anew for each horizon and told it.",
    )
    lab.figure(
        "schedules",
        schedule_figure(curves),
        "The constant rate keeps its noise. Both derived decays go on without knowing when they "
        "will be stopped; the triangles were told.",
    )
    return curves, horizons


def amos_rates(lab: Lab, train: Split, test: Split) -> None:
    """Report what the rule of thumb for Amos' rate gives on so little data."""
    steps, batch = lab.pick(smoke=2, quick=300, full=300), 16
    seeds = seeds_of(lab, lab.pick(smoke=1, quick=1, full=3))
    batches = len(train.images) // batch
    rows = []
    for rate in (0.003, 0.01, 0.03, batches**-0.5):
        ends = []
        for seed in seeds:
            network = Perceptrons(widths(train, 64, 64), [seed])
            optimizer, _ = prepared(network, AMOS, rate=rate)
            training = Training(train, test, [seed], batch=batch, steps=steps)
            ends.append(training.fit(network, optimizer, None)[steps].item())
        rows.append({"$\\xi$": rate, "test cross entropy": float(np.mean(ends))})
    lab.table(
        "Amos at four rates",
        rows,
        f"After {steps} steps of {batch} examples, mean of {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}. The last rate is the rule of thumb, "
        f"$1/\\sqrt N$ for $N = {batches}$ batches: it was made for far more data.",
    )


def state_bytes(lab: Lab) -> None:
    """Count what each optimiser remembers of a small Transformer."""
    torch.manual_seed(lab.seed)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model(torch.randn(1, 4, 256, generator=lab.generator())).square().mean().backward()
    sizes = {}
    for name, optimizer in {
        "AdamW": torch.optim.AdamW(model.parameters()),
        "Amos, momentum": Amos(amos_parameter_groups(model), momentum=0.9),
        "Amos": Amos(amos_parameter_groups(model)),
    }.items():
        optimizer.step()
        sizes[name] = sum(
            slot.numel() * slot.element_size()
            for slots in optimizer.state.values()
            for slot in slots.values()
        )
    lab.table(
        "Bytes of state",
        [
            {"optimiser": name, "bytes": size, "share of AdamW": size / sizes["AdamW"]}
            for name, size in sizes.items()
        ],
        f"Two blocks of a Transformer of width 256, "
        f"{sum(p.numel() for p in model.parameters())} parameters in single precision.",
    )
    lab.observe("state of Amos over that of AdamW", sizes["Amos"] / sizes["AdamW"], "<", 0.02)
    lab.observe(
        "state of Amos with momentum over that of AdamW",
        sizes["Amos, momentum"] / sizes["AdamW"], "<=", 0.51,
    )  # fmt: skip


def prepared(network: Perceptrons, method: str, *, rate: float = 0.01) -> tuple[Any, Any]:
    """Return the optimiser, and the schedule where it has one."""
    if method == ADAMW:
        return torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01), None
    rules = scale_rules(network)
    if method == RULE:
        optimizer = torch.optim.AdamW(
            relative_scale_groups(network, relative_lr=rate, scale_rules=rules)
        )
        return optimizer, ScaleDecayLR(optimizer, half_life=200)
    return Amos(amos_parameter_groups(network, scale_rules=rules), lr=rate), None


def scale_rules(network: Perceptrons) -> dict[str, float | Callable[[Tensor], float]]:
    """Kernels travel about the standard deviation they start with, biases about a half."""
    mult = network.mult
    return {"weights": lambda weight: 1 / (mult * math.sqrt(weight.shape[-1])), "biases": 0.5}


@dataclass(frozen=True)
class Training:
    """How long, on what, and which draws; nothing about the optimiser."""

    train: Split
    test: Split
    seeds: Sequence[int]
    batch: int
    steps: int

    def fit(
        self, network: nn.Module, optimizer: Any, schedule: Any, at: Iterable[int] = ()
    ) -> dict[int, Tensor]:
        """Train; return the test cross entropy of each network at the end and on the way."""
        assert self.train.labels is not None
        inputs, labels = self.train.images.flatten(1), self.train.labels
        # Another stream than that of the weights.
        generators = [torch.Generator().manual_seed(seed + 500) for seed in self.seeds]
        marks = {*at, self.steps}
        curve = {}
        for step in range(1, self.steps + 1):
            drawn = [torch.randint(len(inputs), (self.batch,), generator=g) for g in generators]
            batch = torch.stack(drawn) if len(drawn) > 1 else drawn[0]
            logits = network(inputs[batch])
            # A sum over networks: each gets the gradient of its own mean.
            loss = cross_entropy(logits.flatten(0, -2), labels[batch].flatten()) * len(drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if step in marks:
                curve[step] = self.test_loss(network)
        return curve

    @torch.no_grad()
    def test_loss(self, network: nn.Module) -> Tensor:
        """Return the cross entropy of each network on held-out examples."""
        assert self.test.labels is not None
        logits = network(self.test.images.flatten(1))
        labels = self.test.labels.expand(logits.shape[:-1])
        loss = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return loss.view(-1, len(self.test)).mean(dim=-1)


def problem(lab: Lab) -> tuple[Split, Split]:
    """Return digits, or the user's images with labels."""
    images = lab.data.images()
    if images.train.labels is None or images.test.labels is None:
        raise DataError(f"{lab.data.path}: these images have no labels to learn")
    return images.train, images.test


def widths(train: Split, *hidden: int) -> list[int]:
    assert train.labels is not None
    return [train.images[0].numel(), *hidden, int(train.labels.max()) + 1]


def seeds_of(lab: Lab, count: int) -> list[int]:
    return [1000 * lab.seed + seed for seed in range(count)]


def parametrisation_figure(loss: dict[str, list[float]]) -> Figure:
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for method, values in loss.items():
        axes.plot(MULTIPLIERS, values, marker="o", label=method)
    axes.set(xscale="log", yscale="log", xlabel=r"multiplier $\mu$", ylabel="test cross entropy")
    axes.legend(frameon=False)
    return figure


def schedule_figure(curves: dict[str, dict[int, Tensor]]) -> Figure:
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for name, curve in curves.items():
        look: dict[str, Any] = {"marker": "^", "linestyle": "none"} if name == COSINE else {}
        axes.plot(list(curve), [loss.mean().item() for loss in curve.values()], label=name, **look)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="test cross entropy")
    axes.legend(frameon=False)
    return figure
