r"""Why residuals.

Networks of hundreds of layers fail to train although no gradient vanishes and none explodes. All
layers move at once; each step changes the loss a little through each of them, and the changes add
up. Why does a shortcut help, and how strong should the branch beside it be?

## The increment

To first order a step $\Delta\theta$ changes the loss by $\langle \nabla L, \Delta\theta \rangle$.
For gradient descent that is

$$\Delta L \approx -\eta \, \|\nabla L\|^2 = -\eta \sum_{l=1}^{N} \|\nabla_l L\|^2 .$$

If each of $N$ layers has a gradient of order one, the sum is of order $N$: a step that suits
ten layers throws a thousand out of their good start. Warm-up treats the symptom. The cure is a
gradient of order $1/\sqrt N$ in each layer, so that the sum stays of order one.

A plain stack has no knob for it. To keep the signal, the variance of its weights must be one over
the number of inputs, and then the gradients are what they are. With a shortcut,

$$y = x + \varepsilon f(x; \theta), \qquad
\frac{\partial L}{\partial \theta} = \varepsilon \, \frac{\partial L}{\partial y}
\frac{\partial f}{\partial \theta},$$

both directions become stable as $\varepsilon \to 0$, and the gradient carries $\varepsilon$. So
$\varepsilon = 1/\sqrt N$ does it: the residual stabilises signal and gradient *and* lets the update
be scaled with depth. A plain network can have two of the three.

## Is that small enough?

In one dimension $N$ aligned layers multiply a vector by $(1 + \varepsilon)^N$, about
$e^{\sqrt N}$. In many dimensions the Jacobian of a random branch is nearly orthogonal to the
identity, and the factor is $(1 + \varepsilon^2)^{N/2} \to \sqrt e = 1.65$.

## DeepNorm and its relatives

After a post-norm only the ratio counts: $\mathrm{LN}(\alpha x + F(x))$ is
$\mathrm{LN}(x + F(x)/\alpha)$. With a gain $\beta$ on the weights of a branch of two matrices,
the gradient of each is of order $\beta/\alpha$. Over $s$ sublayers the step is

$$s\,(\beta/\alpha)^2 \ \text{(SGD)}, \qquad s\,\beta/\alpha \ \text{(Adam)}, \qquad
s\,\beta^2/\alpha \ \text{(LAMB)},$$

and $\beta = 1/\alpha$ with a step of one gives $\alpha = s^{1/4}$ for gradient descent and
$s^{1/2}$ for Adam. DeepNet takes $\alpha = (2N)^{1/4}$ and $\beta = (8N)^{-1/4}$ for $N$ layers of
two sublayers. The symmetric choice is a warm-up in disguise: small weights alone would be left
behind after a few steps, small steps alone would be slow.

## What the matrices do not show

The derivation speaks of matrices. The gains and biases of a post-norm stand outside of the branch;
nothing scales their gradients, and their share of the sum keeps growing like $N$. It is what makes
DeepNorm fail at several hundred layers with plain gradient descent. Dividing the rate of these
vectors by $N$ repairs it (`depth_parameter_groups`).

## What decides it

First measurement: the sum of squared gradients over the matrices of all branches against the
number of blocks, at initialisation, as a power of depth. Order one means an exponent of 0; a
branch of $1/N$ means $-1$; what does not scale its branch grows. Second measurement: a hundred
blocks, plain gradient descent, sixty steps, no warm-up, no clipping. Accuracy on held-out digits
says who trains.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab
from kexue.models import Transformer, TransformerConfig
from kexue.nn.residual import (
    ParameterUpdate,
    Residual,
    deepnorm_coefficients,
    deepnorm_init_,
    depth_parameter_groups,
    fit_power_law,
    measure_update,
)

RATE = 0.05
MEASURED = 128
"""Examples on which gradients are measured."""
DEPTH = 100
TABLES = (".csv", ".tsv", ".npz")

PLAIN, ONE, ROOT, INVERSE = "no shortcut", "ε = 1", "ε = 1/√N", "ε = 1/N"
PRE, POST, DEEPNORM, SLOW = "pre-norm", "post-norm", "DeepNorm", "DeepNorm, slow vectors"
MEASURED_VARIANTS = (ROOT, INVERSE, POST, DEEPNORM, PLAIN)
TRAINED_VARIANTS = (PLAIN, ONE, ROOT, PRE, POST, DEEPNORM, SLOW)


Wrap = Callable[[nn.Module, int], nn.Module]


@dataclass(frozen=True)
class Problem:
    """Data, and how a network of some depth is built for them."""

    name: str
    build: Callable[[Wrap, int, bool], nn.Module]
    """From the wrap of a sublayer, the number of blocks, and whether a last norm is needed."""
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    chance: float


class Plain(nn.Module):
    """A sublayer and a norm without a shortcut."""

    def __init__(self, sublayer: nn.Module, dim: int) -> None:
        super().__init__()
        self.sublayer, self.norm = sublayer, nn.LayerNorm(dim)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        branch = self.sublayer(x, **given)
        return self.norm(branch[0] if isinstance(branch, tuple) else branch)


def run(lab: Lab) -> None:
    problem = read_problem(lab)
    # The thresholds are those of the digits; on a user's data the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe

    exponents = measure_depth(lab, problem)
    matrices = {name: fit["matrices"] for name, fit in exponents.items()}
    judge(f"exponent of the matrices, {ROOT}: distance from 0", abs(matrices[ROOT]), "<=", 0.25)
    judge(
        "exponent of the matrices, DeepNorm: distance from 0", abs(matrices[DEEPNORM]), "<=", 0.25
    )
    judge(f"exponent of the matrices, {INVERSE}", matrices[INVERSE], ">=", -1.2)
    judge(f"exponent of the matrices, {INVERSE}", matrices[INVERSE], "<=", -0.8)
    judge("exponent of the matrices, post-norm", matrices[POST], ">=", 0.5)
    lab.observe("exponent of the vectors, DeepNorm", exponents[DEEPNORM]["vectors"], ">=", 0.6)

    accuracy = train_deep(lab, problem)
    for name in (ROOT, DEEPNORM):
        judge(f"accuracy at {DEPTH} blocks, {name}", accuracy[name], ">=", 0.70)
    for name in (PLAIN, POST):
        judge(f"accuracy at {DEPTH} blocks, {name}", accuracy[name], "<=", 0.30)

    if lab.budget == "full" and lab.data.path is None:
        very_deep(lab, problem)


def measure_depth(lab: Lab, problem: Problem) -> dict[str, dict[str, float]]:
    """Fit powers of depth to the squared gradients of branch matrices and of vectors."""
    depths = lab.pick(smoke=(4, 8), quick=(8, 32, 128), full=(8, 32, 128, 512))
    seeds = lab.pick(smoke=1, quick=8, full=8)
    inputs, targets = (part[:MEASURED] for part in problem.train)
    squares: dict[tuple[str, str], list[float]] = {}
    for variant in lab.progress(MEASURED_VARIANTS, "gradients at the start"):
        for depth in depths:
            means = {"matrices": 0.0, "vectors": 0.0}
            for seed in range(seeds):
                model = network(problem, variant, depth, seed=1000 * lab.seed + seed)
                report = measure_update(
                    model, lambda m: loss_of(m, inputs, targets), learning_rate=1e-4
                )
                parts = {
                    "matrices": [u for name, u in report.by_name.items() if in_branch(name, u)],
                    "vectors": [u for u in report.by_name.values() if u.ndim == 1],
                }
                for kind, updates in parts.items():
                    total = math.fsum(update.gradient_norm_squared for update in updates)
                    means[kind] += total / seeds
            for kind, mean in means.items():
                squares.setdefault((variant, kind), []).append(mean)
    fits = {key: fit_power_law(depths, values) for key, values in squares.items()}
    lab.table(
        "Squared gradient as a power of the number of blocks",
        [
            {
                "variant": variant,
                **{
                    f"$N = {depth}$": square
                    for depth, square in zip(depths, squares[variant, "matrices"], strict=True)
                },
                "exponent": fits[variant, "matrices"].exponent,
                "exponent of the vectors": fits[variant, "vectors"].exponent,
            }
            for variant in MEASURED_VARIANTS
        ],
        f"Sums over all branches at initialisation on {MEASURED} examples, means of {seeds} "
        "initialisations. The derivation speaks of the expected step: without a shortcut "
        "and after a post-norm single networks lie far apart, and few carry the mean.",
    )
    lab.figure(
        "depth",
        depth_figure(depths, squares),
        "A flat line is a step whose size does not depend on depth. DeepNorm's matrices are flat, "
        "its gains and biases are not.",
    )
    return {
        variant: {kind: fits[variant, kind].exponent for kind in ("matrices", "vectors")}
        for variant in MEASURED_VARIANTS
    }


def train_deep(lab: Lab, problem: Problem) -> dict[str, float]:
    """Train each variant with plain gradient descent and report its held-out accuracy."""
    steps, seeds = lab.pick(smoke=2, quick=60, full=60), lab.pick(smoke=1, quick=1, full=3)
    depth = lab.pick(smoke=10, quick=DEPTH, full=DEPTH)
    curves, scores = {}, {}
    for variant in lab.progress(TRAINED_VARIANTS, f"training {depth} blocks"):
        runs = [
            train(problem, variant, depth, steps, seed=1000 * lab.seed + seed)
            for seed in range(seeds)
        ]
        curves[variant] = runs[0][0]
        scores[variant] = sum(score for _, score in runs) / seeds
    lab.table(
        f"Held-out accuracy of {depth} blocks after {steps} steps",
        [
            {"variant": variant, "accuracy": scores[variant], "last loss": curves[variant][-1]}
            for variant in TRAINED_VARIANTS
        ],
        f"{problem.name}, gradient descent at rate {RATE}, no warm-up, no clipping; "
        f"mean of {seeds} seed{'s' * (seeds > 1)}. Chance is {problem.chance:.2f}.",
    )
    lab.figure(
        "training",
        training_figure(curves, scores, problem.chance),
        f"Left: training loss of {depth} blocks. Right: accuracy on held-out data; the line is "
        "chance.",
    )
    return scores


def very_deep(lab: Lab, problem: Problem) -> None:
    """Show where DeepNorm needs slower vectors: 400 blocks, and 1000 narrow ones."""
    rows = []
    for depth, width, steps in lab.progress(((400, 64, 40), (1000, 32, 30)), "very deep"):
        narrow = table_problem(lab, width=width)
        for variant in (ROOT, DEEPNORM, SLOW):
            curve, score = train(narrow, variant, depth, steps, seed=1000 * lab.seed)
            rows.append(
                {"blocks $N$": depth, "width": width, "steps": steps, "variant": variant,
                 "accuracy": score, "last loss": curve[-1]}
            )  # fmt: skip
    lab.table("Hundreds of blocks", rows, f"{problem.name}, gradient descent at rate {RATE}.")
    by_variant = {row["variant"]: row["accuracy"] for row in rows if row["blocks $N$"] == 400}
    lab.observe(
        "accuracy at 400 blocks that slower vectors add to DeepNorm",
        by_variant[SLOW] - by_variant[DEEPNORM], ">=", 0.3,
    )  # fmt: skip


def network(problem: Problem, variant: str, depth: int, *, seed: int) -> nn.Module:
    """Build one variant: how its sublayers are wrapped, and the gain of its branches."""
    torch.manual_seed(seed)
    deepnorm = deepnorm_coefficients(encoder_layers=depth // 2).encoder
    assert deepnorm is not None
    wraps: dict[str, Callable[[nn.Module, int], nn.Module]] = {
        PLAIN: Plain,
        ONE: partial(Residual, style="none"),
        ROOT: partial(Residual, style="none", branch_scale=depth**-0.5),
        INVERSE: partial(Residual, style="none", branch_scale=1 / depth),
        PRE: Residual,
        POST: partial(Residual, style="post"),
        DEEPNORM: partial(Residual, style="post", alpha=deepnorm.alpha),
        SLOW: partial(Residual, style="post", alpha=deepnorm.alpha),
    }
    model = problem.build(wraps[variant], depth, variant in (ONE, ROOT, INVERSE, PRE))
    gain = deepnorm.beta if variant in (DEEPNORM, SLOW) else 1.0
    deepnorm_init_(model, gain, generator=torch.Generator().manual_seed(seed))
    return model


def train(
    problem: Problem, variant: str, depth: int, steps: int, *, seed: int
) -> tuple[list[float], float]:
    """Return the losses and the held-out accuracy; a run that is no number any more stops."""
    model = network(problem, variant, depth, seed=seed)
    parameters: Any = model.parameters()
    if variant == SLOW:
        parameters = depth_parameter_groups(model, lr=RATE, num_layers=depth)
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = problem.train
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(inputs), (64,), generator=generator)
        loss = loss_of(model, inputs[batch], targets[batch])
        losses.append(loss.item())
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = problem.test
        correct = model(inputs).argmax(-1) == targets
    return losses, correct.float().mean().item()


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def in_branch(name: str, update: ParameterUpdate) -> bool:
    return update.ndim == 2 and ".sublayer." in name


def read_problem(lab: Lab) -> Problem:
    path = lab.data.path
    is_table = path is not None and path.suffix.lower() in TABLES
    return text_problem(lab) if lab.data.holds_text and not is_table else table_problem(lab)


def table_problem(lab: Lab, *, width: int = 64) -> Problem:
    """Digits as vectors, or the user's table or images."""
    if lab.data.path is None:
        table = lab.data.tabular("digits")
        features, labels, trained_on = table.features / 16, table.target, 1400
        name = "digits"
    elif lab.data.path.suffix.lower() in TABLES:
        table = lab.data.tabular()
        features = (table.features - table.features.mean(0)) / (table.features.std(0) + 1e-12)
        labels, name, trained_on = table.target, table.name, int(0.8 * len(table.features))
    else:
        images = lab.data.images()
        if images.train.labels is None:
            raise DataError(f"{lab.data.path}: these images have no labels to learn")
        features, labels = images.train.images.flatten(1).numpy(), images.train.labels.numpy()
        name, trained_on = images.name, int(0.8 * len(features))
    inputs, targets = torch.as_tensor(features).float(), torch.as_tensor(labels).long()
    classes = int(targets.max()) + 1

    def build(wrap: Wrap, depth: int, last_norm: bool) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs.shape[1], width),
            nn.LayerNorm(width),
            *[wrap(two_layers(width), width) for _ in range(depth)],
            nn.LayerNorm(width) if last_norm else nn.Identity(),
            nn.Linear(width, classes),
        )

    counts = torch.bincount(targets).double()
    return Problem(
        name=name,
        build=build,
        train=(inputs[:trained_on], targets[:trained_on]),
        test=(inputs[trained_on:], targets[trained_on:]),
        chance=(counts.max() / counts.sum()).item(),
    )


def two_layers(width: int) -> nn.Module:
    layers = {"fc1": nn.Linear(width, width), "relu": nn.ReLU(), "fc2": nn.Linear(width, width)}
    return nn.Sequential(OrderedDict(layers))


def text_problem(lab: Lab, *, length: int = 32) -> Problem:
    """Guessing the next character of the user's text with a Transformer of the same blocks."""
    characters = lab.data.Characters(lab.data.text(), size=64)
    ids = characters.tokens
    pieces = ids[: len(ids) // (length + 1) * (length + 1)].reshape(-1, length + 1)[:2000]
    trained_on = int(0.8 * len(pieces))
    inputs, targets = pieces[:, :-1], pieces[:, 1:]

    def build(wrap: Wrap, depth: int, last_norm: bool) -> nn.Module:
        config = TransformerConfig(
            vocab_size=64, dim=64, num_layers=depth // 2, num_heads=4, max_length=length
        )
        return Transformer(config, residual=wrap)

    counts = torch.bincount(targets.flatten()).double()
    return Problem(
        name="characters",
        build=build,
        train=(inputs[:trained_on], targets[:trained_on]),
        test=(inputs[trained_on:][:100], targets[trained_on:][:100]),
        chance=(counts.max() / counts.sum()).item(),
    )


def depth_figure(
    depths: Sequence[int], squares: Mapping[tuple[str, str], Sequence[float]]
) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for ax, kind in zip(axes, ("matrices", "vectors"), strict=True):
        for variant in MEASURED_VARIANTS:
            ax.loglog(depths, squares[variant, kind], "o-", label=variant)
        ax.set_xlabel("blocks $N$")
        ax.set_ylabel(f"squared gradient of the {kind}")
    axes[1].legend()
    return figure


def training_figure(
    curves: Mapping[str, Sequence[float]], scores: Mapping[str, float], chance: float
) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for variant, curve in curves.items():
        left.plot(range(1, len(curve) + 1), curve, label=variant)
    left.set_xlabel("step")
    left.set_ylabel("training loss")
    left.set_ylim(0, 4)
    for place, (variant, score) in enumerate(scores.items()):
        right.barh(place, score, label=variant)
    right.set_yticks(range(len(scores)), list(scores))
    right.invert_yaxis()
    right.axvline(chance, color="black", linestyle=":")
    right.set_xlabel("held-out accuracy")
    return figure
