r"""Vanishing and exploding gradients.

Everyone knows the slogans: the gradients of a recurrent network vanish, and the LSTM solves that.
How much gradient does survive a hundred steps, through which gate, and what repairs it? For torch's
own modules the answer can be computed exactly.

## The gradient of an RNN is an RNN

A recurrence $h_t = f(x_t, h_{t-1}; \theta)$ has the derivative

$$\frac{dh_t}{d\theta} = \frac{\partial h_t}{\partial \theta}
+ \frac{\partial h_t}{\partial h_{t-1}} \frac{dh_{t-1}}{d\theta},$$

so what a step $k$ back contributes carries a product of $k$ Jacobians. Factors below one let it
die, factors above one let it blow up, and only design keeps them at one. *Vanishing does not mean
that the gradient is zero*: its recent terms remain. It means that the early terms no longer count,
so that nothing can be learned from what happened then. Hence not the norm of the gradient is to be
looked at, but the contribution of each step.

## Simple networks

For $h_t = \tanh(W x_t + U h_{t-1} + b)$ the Jacobian is $\operatorname{diag}(1 - h_t^2)\, U$. As a
function of $U$ it is bounded, because large weights saturate the tanh: with nothing else inside,
$|U| \operatorname{sech}^2(U h) \le 0.4477/|h|$. With a ReLU it is $U$ on the active half and has no
bound. That is why recurrent networks use tanh.

## Gates

The LSTM carries $c_t = f c_{t-1} + i g$ and shows $h_t = o \tanh c_t$. Following $c$,

$$\frac{\partial c_t}{\partial c_{t-1}} = f + o_{t-1} (1 - \tanh^2 c_{t-1})
\left[\, c_{t-1} f (1 - f)\, U_f + g\, i (1 - i)\, U_i + i (1 - g^2)\, U_g \right].$$

Every term but the first passes several factors below one, so $f$ should decide: it lies in $(0, 1)$
and rules out most explosions, and where history is needed it is near one. A gate with bias $b$ and
nothing else forgets in $1/(1 - \sigma(b)) = 1 + e^b$ steps. At $b = 0$, where most networks start,
that is two steps. A forget bias of one makes it 3.7; drawing $b \sim \log U[1, T_{max} - 1]$
spreads the times evenly up to $T_{max}$ (chrono initialisation).

How far does $f$ outweigh the rest before training? With $f = i = o = 1/2$ and weights of norm one
the candidate term is about $1/4$: half of $f$, not little. Chrono also gives the input gate the
opposite bias, $i = 1/\text{time}$, but the norm of a matrix belongs to its largest row, the fastest
of all units: the candidate term is about $\tfrac12 \max i$. That leaves four to one where a unit
has the least time, two steps, and more by luck of the draw, the less the more units there are.

A GRU has fewer gates on its side terms and one more factor, and depends more on its start. Moving
the reset gate to the output, $c_t = (1 - z) c_{t-1} + z \hat c_t$, $h_t = r c_t$, puts one more
gate on every side term.

## Where the formula stops

The gate $o_{t-1}$ was held: it depends on $h_{t-2}$, not on $c_{t-1}$. So the formula is exact for
one step, but the *product* of such factors misses the way
$c_{t-2} \to h_{t-2} \to o_{t-1} \to h_{t-1} \to c_t$. The full
state $(h, c)$ has an exact Jacobian $J_t$ of twice the size, and with
$D = \operatorname{diag}(o (1 - \tanh^2 c))$ of the first state, the $c$ rows of
$J_t \cdots J_{t-k+1} [D; I]$ are the true derivative over $k$ steps. This is what the article's
product is compared with.

## What decides it

Handwritten digits are read pixel by pixel, 64 steps, and then 64 blank steps pass before the
answer is due: it depends on what was seen at least 64 steps ago. Before training,
$\log_{10} \|\partial s_T / \partial s_0\|$ is computed for each network; then all are trained
alike. The theory stands if those without gradient stay at chance, and one of every kind with
gradient learns (a gradient is necessary, not sufficient); if the forget gate outweighs the side
terms; and if the article's product is close to the exact derivative.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab
from kexue.nn.recurrent import (
    GateTerms,
    GradientContributions,
    GradientFlow,
    OutputGatedGRU,
    adding_problem,
    gate_terms,
    gradient_contributions,
    gradient_flow,
    plot_gradient_flow,
    recurrent_init_,
    recurrent_jacobians,
)

HIDDEN = 48
BLANKS = 64
TIMESCALE = 128
RATE, BATCH, CLIP = 3e-3, 64, 1.0
LOOKED_AT = 4
"""Sequences on which gradients are measured."""

VANISHED, ALIVE = -15.0, -4.0
CHANCE, LEARNED, LEARNED_LONG = 0.15, 0.18, 0.35


@dataclass(frozen=True)
class Arm:
    """One cell with one start."""

    kind: str
    start: str
    build: Callable[[int], Any]
    """From the number of input features."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.start}"


@dataclass(frozen=True)
class Task:
    """Sequences, and classes to be told at their end."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    @property
    def looked_at(self) -> Tensor:
        return self.test[0][:LOOKED_AT]


@dataclass(frozen=True)
class Run:
    """One arm before and after training."""

    flow: GradientFlow
    trained_flow: GradientFlow
    contributions: GradientContributions
    accuracy: float
    loss: float

    @property
    def power(self) -> float:
        """Mean of the logarithm to base ten of the norm over the whole sequence."""
        return self.flow.log_norm[-1].mean().item() / math.log(10)


def default(build: Callable[..., Any], features: int) -> Any:
    return build(features, HIDDEN, batch_first=True)


def started(build: Callable[..., Any], features: int, **how: Any) -> Any:
    return recurrent_init_(build(features, HIDDEN, batch_first=True), **how)


RELU = partial(nn.RNN, nonlinearity="relu")
CHRONO = {"max_timescale": TIMESCALE}
QUICK = (
    Arm("RNN", "default", partial(default, nn.RNN)),
    Arm("RNN", "orthogonal", partial(started, nn.RNN)),
    Arm("LSTM", "default", partial(default, nn.LSTM)),
    Arm("LSTM", "forget bias 1", partial(started, nn.LSTM, forget_bias=1.0)),
    Arm("LSTM", "chrono", partial(started, nn.LSTM, **CHRONO)),
    Arm("GRU", "chrono", partial(started, nn.GRU, **CHRONO)),
)
FULL = (
    *QUICK[:2],
    Arm("RNN", "identity, ReLU", partial(started, RELU, recurrent="identity")),
    *QUICK[2:5],
    Arm("GRU", "default", partial(default, nn.GRU)),
    QUICK[5],
    Arm("output-gated GRU", "default", partial(default, OutputGatedGRU)),
    Arm("output-gated GRU", "chrono", partial(started, OutputGatedGRU, **CHRONO)),
)


def run(lab: Lab) -> None:
    task = read_task(lab)
    # The thresholds are those of the digits; on a user's data the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe

    looking_at_gates(lab, task, judge)
    product_of_gates(lab, task, judge)

    arms = lab.pick(smoke=(QUICK[1], QUICK[3]), quick=QUICK, full=FULL)
    steps = lab.pick(smoke=2, quick=150, full=400)
    seeds = lab.pick(smoke=1, quick=1, full=3)
    runs = {
        arm.name: [train(lab, task, arm, steps, 1000 * lab.seed + seed) for seed in range(seeds)]
        for arm in lab.progress(arms, "training")
    }
    report(lab, arms, runs, steps)
    judge_training(lab, arms, runs, judge)
    if lab.budget == "full" and lab.data.path is None:
        adding(lab)


def judge_training(
    lab: Lab, arms: tuple[Arm, ...], runs: Mapping[str, list[Run]], judge: Callable[..., Any]
) -> None:
    every = [(arm, mean_power(runs[arm.name]), accuracy(runs[arm.name])) for arm in arms]
    dead = [score for _, power, score in every if power < VANISHED]
    judge(
        f"best accuracy of a network whose $\\log_{{10}}$ norm starts below {VANISHED:g}",
        max(dead, default=math.nan), "<=", CHANCE,
    )  # fmt: skip
    for kind in dict.fromkeys(arm.kind for arm in arms):
        alive = [score for arm, power, score in every if arm.kind == kind and power > ALIVE]
        judge(
            f"best accuracy of any {kind} whose $\\log_{{10}}$ norm starts above {ALIVE:g}",
            max(alive, default=math.nan), ">",
            LEARNED_LONG if kind == "LSTM" and lab.budget == "full" else LEARNED,
        )  # fmt: skip


def looking_at_gates(lab: Lab, task: Task, judge: Callable[..., Any]) -> None:
    """Compare the forget term of an LSTM with its side terms, before any training."""
    starts = lab.pick(smoke=1, quick=8, full=16)
    one = task.looked_at[:1]
    rows, ratios, smallest, shown = [], {}, math.inf, {}
    for name, arm in lab.progress(lstm_arms().items(), "gates"):
        found = [gate_terms(built(1000 * lab.seed + n, arm, task), one) for n in range(starts)]
        norms = [{term: v.mean().item() for term, v in terms.norms().items()} for terms in found]
        means = {term: sum(norm[term] for norm in norms) / starts for term in norms[0]}
        each = [norm["forget"] / largest_side(norm) for norm in norms]
        ratios[name] = means["forget"] / largest_side(means)
        smallest = min(each)
        rows.append(
            {"start": name, **{term.replace("_", " "): value for term, value in means.items()},
             "forget / largest side": ratios[name], "from": min(each), "to": max(each)}
        )  # fmt: skip
        shown[name] = found[0]
    lab.table(
        "Gate by gate",
        rows,
        "Mean spectral norms of the terms of $\\partial c_t / \\partial c_{t-1}$ of an LSTM before "
        f"training, over {starts} starts. The candidate term is the largest rival: by architecture "
        "alone the forget gate is only about twice as strong, the bias makes it dominate.",
    )
    lab.figure(
        "gates",
        gates_figure(shown),
        "Spectral norms of the four terms along the sequence, stacked. The digit is read in steps "
        "1 to 64, blank steps follow.",
    )
    for name, factor in (("default", 1.5), ("chrono", 8.0)):
        judge(f"forget term over the largest side term, {name} LSTM", ratios[name], ">=", factor)
    lab.observe("the same for the least lucky of the chrono LSTMs", smallest, ">=", 4.0)


def largest_side(norms: Mapping[str, float]) -> float:
    return max(norm for term, norm in norms.items() if term != "forget")


def product_of_gates(lab: Lab, task: Task, judge: Callable[..., Any]) -> None:
    """Compare the article's product of one-step derivatives with the exact derivative."""
    lags = (1, 2, 4, 8, 16, 32)
    starts = lab.pick(smoke=1, quick=4, full=8)
    x = task.looked_at.double()
    x = x[:, : x.shape[1] - BLANKS]
    rows, gaps = [], {}
    for name, arm in lstm_arms().items():
        modules = [built(1000 * lab.seed + n, arm, task).double() for n in range(starts)]
        each = [product_gaps(module, x, max(lags)) for module in modules]
        gaps[name] = [sum(column) / starts for column in zip(*each, strict=True)]
        rows.append({"start": name, **{f"$k = {lag}$": gaps[name][lag - 1] for lag in lags}})
    lab.table(
        "The product of one-step derivatives against the derivative over $k$ steps",
        rows,
        "Relative difference in the Frobenius norm of $\\partial c_t / \\partial c_{t-k}$, mean of "
        f"{LOOKED_AT} sequences and {starts} starts; zero at one step by theory.",
    )
    for lag, limit in ((2, 0.05), (32, 0.25)):
        worst = max(gap[lag - 1] for gap in gaps.values())
        judge(f"largest gap of the product at {lag} steps", worst, "<=", limit)


def product_gaps(module: nn.LSTM, x: Tensor, most: int) -> list[float]:
    """Relative gaps at lags 1 to ``most``, for derivatives that end at the last step."""
    full, total = recurrent_jacobians(module, x), gate_terms(module, x).total
    eye = torch.eye(HIDDEN, dtype=x.dtype)
    exact: Any = torch.eye(2 * HIDDEN, dtype=x.dtype)
    product: Any = eye
    gaps = []
    for lag in range(1, most + 1):
        exact, product = exact @ full.jacobians[-lag], product @ total[-lag]
        h, c = full.states[-lag - 1].chunk(2, dim=-1)
        tanh_c = c.tanh()
        slope = h / tanh_c * (1 - tanh_c.square())
        truth = exact[:, HIDDEN:, :HIDDEN] * slope.unsqueeze(-2) + exact[:, HIDDEN:, HIDDEN:]
        gap = torch.linalg.matrix_norm(product - truth) / torch.linalg.matrix_norm(truth)
        gaps.append(gap.mean().item())
    return gaps


def train(lab: Lab, task: Task, arm: Arm, steps: int, seed: int) -> Run:
    """Train one arm and look at its gradients before and after."""
    module = built(seed, arm, task)
    readout = nn.Linear(HIDDEN, task.classes)

    def fit() -> dict[str, Tensor]:
        inputs, targets = task.train
        generator = torch.Generator().manual_seed(seed)
        parameters = [*module.parameters(), *readout.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        for _ in range(steps):
            batch = torch.randint(len(inputs), (BATCH,), generator=generator)
            loss = nn.functional.cross_entropy(
                readout(module(inputs[batch])[0][:, -1]), targets[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        inside = {f"cell.{name}": value for name, value in module.state_dict().items()}
        return {**inside, **{f"readout.{n}": value for n, value in readout.state_dict().items()}}

    watched = task.looked_at[: lab.pick(smoke=1, quick=LOOKED_AT, full=LOOKED_AT)]
    flow = gradient_flow(module, watched)
    targets = task.test[1][: len(watched)]

    def loss_at_the_end(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(readout(output[:, -1]), targets)

    contributions = gradient_contributions(module, watched, loss_at_the_end)
    name = "".join(c if c.isalnum() else "-" for c in arm.name.lower())
    weights = lab.cache(name, fit, inputs={"steps": steps, "run": seed})
    for owner, part in (("cell.", module), ("readout.", readout)):
        part.load_state_dict(
            {n.removeprefix(owner): w for n, w in weights.items() if n.startswith(owner)}
        )
    with torch.no_grad():
        logits = readout(module(task.test[0])[0][:, -1])
        correct = (logits.argmax(-1) == task.test[1]).float().mean().item()
        loss = nn.functional.cross_entropy(logits, task.test[1]).item()
    return Run(flow, gradient_flow(module, watched), contributions, correct, loss)


def report(lab: Lab, arms: tuple[Arm, ...], runs: Mapping[str, list[Run]], steps: int) -> None:
    seeds = len(next(iter(runs.values())))
    lab.table(
        f"Accuracy after {steps} steps",
        [
            {
                "cell": arm.kind,
                "start": arm.start,
                "$\\log_{10}$ norm at the start": mean_power(runs[arm.name]),
                "largest exponent": runs[arm.name][0].flow.lyapunov_exponents[:, 0].mean().item(),
                "accuracy": accuracy(runs[arm.name]),
                "held-out loss": sum(r.loss for r in runs[arm.name]) / seeds,
            }
            for arm in arms
        ],
        f"The norm is that of $\\partial s_T / \\partial s_0$ before training. Adam at {RATE:g}, "
        f"batches of {BATCH}, mean of {seeds} seed{'s' * (seeds > 1)}. Chance is 0.1.",
    )
    lab.figure(
        "flow",
        flow_figure({name: found[0] for name, found in runs.items()}),
        "How much of a change $k$ steps back arrives at the last state. Left: before training. "
        "Right: after it.",
    )
    lab.figure(
        "contributions",
        contribution_figure({name: found[0] for name, found in runs.items()}),
        "Left: what each step brings to the gradient of the recurrent weights before training. The "
        "digit is over at step 64. Right: accuracy after training against the norm over the whole "
        "sequence before it.",
    )


def adding(lab: Lab) -> None:
    """The adding problem at growing lengths, with the starts of an LSTM."""
    steps, rate = 400, 1e-2
    rows = []
    for length in lab.progress((100, 400), "adding problem"):
        row: dict[str, Any] = {"length": length}
        for name, arm in lstm_arms().items():
            torch.manual_seed(lab.seed)
            module, readout = arm.build(2), nn.Linear(HIDDEN, 1)
            generator = torch.Generator().manual_seed(lab.seed)
            parameters = [*module.parameters(), *readout.parameters()]
            optimizer = torch.optim.Adam(parameters, lr=rate)
            for _ in range(steps):
                task = adding_problem(BATCH, length, generator=generator)
                loss = (readout(module(task.inputs)[0][:, -1]) - task.targets).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
            test = adding_problem(500, length, generator=generator)
            with torch.no_grad():
                answer = readout(module(test.inputs)[0][:, -1])
            row[f"error, {name}"] = (answer - test.targets).square().mean().item()
        rows.append(row)
    lab.table(
        "The adding problem",
        rows,
        f"Mean squared error of an LSTM after {steps} steps of Adam at {rate:g}; who always says 1 "
        "is wrong by 0.167.",
    )
    lab.observe(
        "error of the chrono LSTM on the longest adding problem",
        rows[-1]["error, chrono"], "<", 0.0167,
    )  # fmt: skip


def lstm_arms() -> dict[str, Arm]:
    return {arm.start: arm for arm in FULL if arm.kind == "LSTM"}


def built(seed: int, arm: Arm, task: Task) -> Any:
    torch.manual_seed(seed)
    return arm.build(task.train[0].shape[-1])


def mean_power(runs: list[Run]) -> float:
    return sum(run.power for run in runs) / len(runs)


def accuracy(runs: list[Run]) -> float:
    return sum(run.accuracy for run in runs) / len(runs)


def read_task(lab: Lab) -> Task:
    """Images pixel by pixel, blank steps behind them."""
    images = lab.data.images() if lab.data.path is not None else lab.data.digits()
    if images.train.labels is None or images.test.labels is None:
        raise DataError(f"{lab.data.path}: these images have no labels to learn")

    def sequences(pixels: Tensor) -> Tensor:
        # At most 64 pixels: the question is the blanks, not the patience of the reader.
        if pixels.shape[-1] * pixels.shape[-2] > 64:
            pixels = nn.functional.adaptive_avg_pool2d(pixels, 8)
        seen = (pixels.mean(1).flatten(1) + 1) / 2 - 0.3
        read = torch.stack([seen, torch.ones_like(seen)], dim=-1)
        return torch.cat([read, read.new_zeros(len(read), BLANKS, 2)], dim=1)

    train, test = images.train, images.test
    return Task(
        train=(sequences(train.images), train.labels),
        test=(sequences(test.images), test.labels),
        classes=int(max(train.labels.max(), test.labels.max())) + 1,
    )


def gates_figure(shown: Mapping[str, GateTerms]) -> Figure:
    figure, axes = plt.subplots(1, len(shown), figsize=(9, 3.2), layout="constrained", sharey=True)
    for ax, (name, terms) in zip(axes, shown.items(), strict=True):
        terms.plot(ax)
        ax.set_title(name)
        ax.get_legend().remove()
        ax.label_outer()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def flow_figure(runs: Mapping[str, Run]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    plot_gradient_flow({name: run.flow for name, run in runs.items()}, ax=left)
    plot_gradient_flow({name: run.trained_flow for name, run in runs.items()}, ax=right)
    right.set_ylabel("")
    right.get_legend().remove()
    return figure


def contribution_figure(runs: Mapping[str, Run]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, found in runs.items():
        found.contributions.plot(left)
        left.get_lines()[-1].set_label(name)
        right.plot(found.power, found.accuracy, "o", label=name)
    right.axhline(0.1, color="black", linestyle=":")
    right.set_xlabel(r"$\log_{10} \|\partial s_T / \partial s_0\|$ before training")
    right.set_ylabel("accuracy after training")
    right.legend()
    return figure
