r"""Initialisation seen geometrically.

Recipes for initial weights are usually derived from means and variances, layer type by layer type.
Geometry needs one idea: a layer should not change the length of the vector that passes through it.

## Random is nearly orthogonal

A linear map $y = Wx$ keeps every length exactly if it keeps every inner product, which is
$W^\top W = I$. Now take the columns of an $m \times n$ matrix at random. Two random directions in
high dimension are nearly perpendicular (their cosine has variance $1/m$), and a vector of $m$
independent entries of variance $1/m$ has a length near 1. So *any* independent entries of mean 0
and variance $1/m$ give a nearly orthogonal matrix: normal, uniform, even signs. With kurtosis
$\kappa$ the entries of $W^\top W - I$ have variance $1/m$ off the diagonal and $(\kappa - 1)/m$ on
it, together

$$\frac{1}{n^2}\, \mathbb{E}\, \lVert W^\top W - I \rVert_F^2 = \frac{n + \kappa - 2}{m\,n}.$$

The variance is one over the number of *outputs*. LeCun's $1/n$, over the inputs, keeps the mean
square of the components instead of the length; Xavier's is in between.

## Activations

With bias 0 and $\tanh x \approx x$ the argument survives a tanh network as it is. ReLU kills half
of the energy, which a factor $\sqrt 2$ returns: He's variance $2/m$. For any other $\varphi$, of
inputs of size $s$, signal and gradient change per layer by

$$g^2\, \frac{\mathbb{E}[\varphi(sz)^2]}{s^2} \quad \text{and} \quad
g^2\, \mathbb{E}[\varphi'(sz)^2], \qquad z \sim N(0, 1).$$

Both are 1 for the same gain $g$ only if $\varphi$ is positively homogeneous. For tanh at $s = 1$
the gain 1.5925 that keeps the signal makes the gradient grow by 1.178 per layer, by $10^7$ in a
hundred layers. With gain 1 both factors tend to 1 as $s \to 0$.

## What "nearly" does not mean

Entries close to those of $I$ are not an operator close to $I$. The singular values of a square
Gaussian matrix fill $[0, 2]$. A fixed vector changes its length in each layer by a factor whose
logarithm has variance $\tfrac14 \psi'(n/2) \approx 1/(2n)$; over $L$ layers this is a random walk
of standard deviation $\sqrt{L/(2n)}$. That is little. But different directions walk apart: the
$i$-th largest singular value of the product grows like $e^{\lambda_i L}$ with

$$\lambda_i = \tfrac12 \Bigl( \ln \tfrac2n + \psi\bigl(\tfrac{n - i + 1}{2}\bigr) \Bigr),$$

and after a hundred layers of width 128 half of all directions have lost fourteen digits against
the first. Such a stack passes on a few directions and forgets the rest. An orthogonal matrix keeps
all singular values at 1 at every depth.

## What decides it

First, the measured mean square of $W^\top W - I$ against the formula, for four laws and several
sizes. Second, the spread of the log-length against $\sqrt{L/(2n)}$. Third, plain tanh networks
without norms and shortcuts, a hundred layers deep, after 80 steps of gradient descent: if the
argument is right, exactly orthogonal weights of gain 1 train, nearly orthogonal ones do not, and
neither do those whose gain keeps the signal and lets gradients explode. In ten layers "nearly"
should be good enough.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab
from kexue.nn.init import (
    activation_gain,
    expected_gram_error,
    gram_error,
    layer_growth,
    orthogonal_,
    singular_value_range,
)

WIDTH = 128
"""Of the linear stacks."""
HIDDEN, STEPS, RATE, TRAINED_ON = 64, 80, 0.02, 1400
TABLES = (".csv", ".tsv", ".npz")

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Entries of mean 0 and variance 1, of some shape."""


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return math.sqrt(12) * (torch.rand(shape, generator=generator) - 0.5)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def laplace(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    size = torch.empty(shape).exponential_(math.sqrt(2), generator=generator)
    return size * signs(shape, generator)


LAWS: dict[str, tuple[Draw, float]] = {
    "signs": (signs, 1.0),
    "uniform": (uniform, 1.8),
    "normal": (normal, 3.0),
    "Laplace": (laplace, 6.0),
}

ORTHOGONAL, GAUSSIAN = "orthogonal, gain 1", "Gaussian, variance 1/n"
XAVIER, FORWARD = "Xavier, gain 5/3", "Gaussian, forward gain 1.59"
ARMS = (ORTHOGONAL, GAUSSIAN, XAVIER, FORWARD)


def run(lab: Lab) -> None:
    worst = entrywise(lab)
    lab.claim("measured over expected gram error: largest distance from 1", worst, "<=", 0.05)
    deviation = random_walk(lab)
    lab.claim(
        r"spread of the log-length over $\sqrt{L/(2n)}$, mean over depths: distance from 1",
        abs(deviation - 1), "<=", 0.3,
    )  # fmt: skip
    spectra(lab)
    gains(lab)

    accuracy = train_deep(lab)
    # The thresholds are those of the digits; on a user's data the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe
    deepest = max(depth for depth, _ in accuracy)
    exact, near = accuracy[deepest, ORTHOGONAL], accuracy[deepest, GAUSSIAN]
    judge(f"accuracy of the orthogonal network at depth {deepest}", exact, ">=", 0.75)
    judge(f"what it is above the Gaussian one at depth {deepest}", exact - near, ">=", 0.3)
    shallow = accuracy[10, ORTHOGONAL] - accuracy[10, GAUSSIAN]
    lab.observe("the same difference at depth 10", shallow, "<", 0.1)


def entrywise(lab: Lab) -> float:
    """Compare gram errors with their expectation; return the largest relative difference."""
    sizes = lab.pick(smoke=(16, 64), quick=(16, 32, 64, 128, 256, 512), full=(16, 64, 256, 512))
    entries = lab.pick(smoke=50_000, quick=2_000_000, full=20_000_000)
    shapes = [(size, size) for size in sizes] + [(300, 60)]
    generator = lab.generator()
    rows, ratios = [], []
    for rows_, columns in lab.progress(shapes, "gram errors"):
        draws = max(1, entries // (rows_ * columns))
        row: dict[str, str | float] = {"shape": f"{rows_} × {columns}"}
        for name, (draw, kurtosis) in LAWS.items():
            weight = draw((draws, rows_, columns), generator) / math.sqrt(rows_)
            measured = gram_error(weight).mean().item()
            expected = expected_gram_error(rows_, columns, kurtosis=kurtosis)
            ratios.append(measured / expected)
            if name == "normal":
                row["normal, exact"], row["normal, measured"] = expected, measured
            row[f"{name}, ratio"] = measured / expected
        rows.append(row)
    lab.table(
        "Mean square of the entries of $W^\\top W - I$",
        rows,
        f"Entries of variance $1/m$; means over matrices of {entries:,} entries in all. "
        f"The ratio of measured and exact lies between {min(ratios):.3f} and {max(ratios):.3f}.",
    )
    return max(abs(ratio - 1) for ratio in ratios)


def random_walk(lab: Lab) -> float:
    """Follow the length of one vector in each of many stacks; return its mean relative spread."""
    stacks = lab.pick(smoke=10, quick=100, full=400)
    depth = lab.pick(smoke=20, quick=100, full=100)
    generator = lab.generator()
    x = torch.randn(stacks, WIDTH, 1, generator=generator)
    kept = x[:5]
    lengths, kept_lengths = [x.norm(dim=(1, 2))], [kept.norm(dim=(1, 2))]
    for _ in lab.progress(range(depth), "log-lengths"):
        weight = torch.randn(stacks, WIDTH, WIDTH, generator=generator)
        x = (weight @ x) / math.sqrt(WIDTH)
        kept = orthogonal_(torch.empty(WIDTH, WIDTH), generator=generator) @ kept
        lengths.append(x.norm(dim=(1, 2)))
        kept_lengths.append(kept.norm(dim=(1, 2)))
    walks = (torch.stack(lengths) / lengths[0]).log()
    straight = (torch.stack(kept_lengths) / kept_lengths[0]).log()
    layers = torch.arange(1, depth + 1)
    expected = (layers / (2 * WIDTH)).sqrt()
    spread = walks[1:].std(1)
    lab.figure(
        "walk",
        walk_figure(walks, straight, WIDTH),
        f"Log-length of a vector in {min(stacks, 12)} Gaussian stacks of width {WIDTH}, within "
        r"one and two $\sqrt{L/(2n)}$; the orthogonal stacks are the horizontal line.",
    )
    half = torch.tensor(WIDTH / 2, dtype=torch.float64)
    lab.table(
        "Spread of the log-length",
        [
            {
                "layers $L$": L,
                "measured": spread[L - 1].item(),
                r"$\sqrt{L/(2n)}$": expected[L - 1].item(),
                r"exact, $\tfrac12\sqrt{L\,\psi'(n/2)}$": math.sqrt(
                    L * torch.polygamma(1, half).item()
                )
                / 2,
                "orthogonal, largest change": straight[L].abs().max().item(),
            }
            for L in (1, 10, 20, 50, 100)
            if depth >= L
        ],
        f"Standard deviation over {stacks} stacks of width {WIDTH}.",
    )
    return (spread / expected).mean().item()


def spectra(lab: Lab) -> None:
    """Show singular values of products of Gaussian and of orthogonal matrices."""
    depths = lab.pick(smoke=(1, 5), quick=(1, 10, 50, 100), full=(1, 10, 50, 100))
    generator = lab.generator()
    log_values, rows = {}, []
    product = torch.eye(WIDTH, dtype=torch.float64)
    basis, triangle = product, product
    for layer in lab.progress(range(1, max(depths) + 1), "products"):
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        # Multiplied out, the small singular values would drown in the rounding errors of the
        # large ones; the rows of the triangle are each as accurate as they are small.
        basis, step = torch.linalg.qr(weight / math.sqrt(WIDTH) @ basis)
        triangle = step @ triangle
        product = orthogonal_(torch.empty_like(weight), generator=generator) @ product
        if layer in depths:
            values = log_values[layer] = graded_log_singular_values(triangle) / math.log(10)
            exact = torch.linalg.svdvals(product)
            middle = WIDTH // 2
            rows.append(
                {
                    "layers $L$": layer,
                    rf"$\log_{{10}} \sigma_1/\sigma_{{{middle}}}$, Gaussian": (
                        values[0] - values[middle - 1]
                    ).item(),
                    "limit law": layer * lyapunov_gap(WIDTH, middle) / math.log(10),
                    r"$\sigma_1$, Gaussian": 10 ** values[0].item(),
                    r"orthogonal, largest $|\sigma_i - 1|$": (exact - 1).abs().max().item(),
                }
            )
    ends = singular_value_range(WIDTH, WIDTH)
    lab.figure(
        "spectra",
        spectrum_figure(log_values),
        f"Singular values of products of $L$ Gaussian matrices of width {WIDTH}. A single one "
        f"fills [{ends.smallest:g}, {ends.largest:g}]; those of orthogonal matrices are all 1.",
    )
    lab.table(
        "Singular values of a product",
        rows,
        r"Limit law: $L(\lambda_1 - \lambda_{64})$ for many layers; the gaps of a single matrix "
        "come on top.",
    )


def graded_log_singular_values(triangle: Tensor) -> Tensor:
    """Logarithms of the singular values, descending, of a triangle with rows of falling size.

    Each step transposes and triangulates once more, which is an iteration of QR on the Gram
    matrix without forming it: the diagonal tends to the singular values, small ones included.
    """
    for _ in range(60):
        triangle = torch.linalg.qr(triangle.mT).R
    return triangle.diagonal().abs().log().sort(descending=True).values


def lyapunov_gap(n: int, index: int) -> float:
    """How much faster the first singular value grows than the one of this index, per layer."""
    first, other = torch.digamma(torch.tensor([n / 2, (n - index + 1) / 2], dtype=torch.float64))
    return (first - other).item() / 2


def gains(lab: Lab) -> None:
    """Tabulate gains, and what the forward one does to gradients."""
    names = ("relu", "gelu", "silu", "mish", "elu", "selu", "tanh", "sigmoid", "softplus")
    rows = []
    for name in names:
        forward = activation_gain(name)
        growth = layer_growth(name, forward).backward
        rows.append(
            {
                "activation": name,
                "forward gain": forward,
                "backward gain": activation_gain(name, direction="backward"),
                "gradient per layer at the forward gain": growth,
                "in 100 layers": growth**100,
            }
        )
    lab.table(
        "Gains for inputs of size 1",
        rows,
        "Second moments; only ReLU has one gain for both directions.",
    )


def train_deep(lab: Lab) -> dict[tuple[int, str], float]:
    """Train plain tanh networks from four kinds of weights; return held-out accuracies."""
    depths = lab.pick(smoke=(10,), quick=(10, 50, 100), full=(10, 50, 100))
    seeds = lab.pick(smoke=1, quick=1, full=3)
    steps = lab.pick(smoke=2, quick=STEPS, full=STEPS)
    name, train, test = read_data(lab)
    scores: dict[tuple[int, str], float] = {}
    cells = [(depth, arm) for depth in depths for arm in ARMS]
    bar = lab.progress(cells, "training")
    for depth, arm in bar:
        # The small difference of shallow networks needs more than one of them.
        several = 4 if depth == 10 and steps == STEPS else seeds
        runs = [
            accuracy_after(train, test, depth, arm, steps, seed=1000 * lab.seed + seed)
            for seed in range(several)
        ]
        scores[depth, arm] = sum(runs) / several
        bar.metric(depth=depth, accuracy=scores[depth, arm])
    lab.table(
        f"Held-out accuracy after {steps} steps",
        [
            {"weights": arm, **{f"depth {depth}": scores[depth, arm] for depth in depths}}
            for arm in ARMS
        ],
        f"{name}, plain tanh networks of width {HIDDEN}, gradient descent at rate {RATE} with "
        f"momentum 0.9 and clipping at 1, batches of 64; {seeds} network"
        f"{'s' * (seeds > 1)} each, and 4 at depth 10.",
    )
    lab.figure(
        "training",
        training_figure(depths, scores),
        "Accuracy on held-out data by depth. Exactly orthogonal weights train at every depth.",
    )
    return scores


def accuracy_after(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    depth: int,
    arm: str,
    steps: int,
    *,
    seed: int,
) -> float:
    generator = torch.Generator().manual_seed(seed)
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    model = tanh_network(train[0].shape[1], classes, depth, arm, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    inputs, targets = train
    for _ in range(steps):
        batch = torch.randint(len(inputs), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return (model(test[0]).argmax(-1) == test[1]).float().mean().item()


def tanh_network(
    inputs: int, classes: int, depth: int, arm: str, generator: torch.Generator
) -> nn.Sequential:
    widths = [inputs, *[HIDDEN] * depth, classes]
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layer = nn.Linear(n, m)
        nn.init.zeros_(layer.bias)
        draw_weight(layer.weight, arm, generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def draw_weight(weight: Tensor, arm: str, generator: torch.Generator) -> None:
    deviation = weight.shape[1] ** -0.5
    if arm == ORTHOGONAL:
        orthogonal_(weight, generator=generator)
    elif arm == GAUSSIAN:
        nn.init.normal_(weight, std=deviation, generator=generator)
    elif arm == XAVIER:
        gain = nn.init.calculate_gain("tanh")
        nn.init.xavier_normal_(weight, gain=gain, generator=generator)
    else:
        nn.init.normal_(weight, std=deviation * activation_gain("tanh"), generator=generator)


def read_data(lab: Lab) -> tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits as vectors, or the user's table or images: name, training part, held-out part."""
    path = lab.data.path
    if path is None or path.suffix.lower() in TABLES:
        table = lab.data.tabular("digits") if path is None else lab.data.tabular()
        features, name = torch.as_tensor(table.features).float(), table.name
        labels = torch.as_tensor(table.target).long()
        if path is None:
            features = features / 16
        else:
            features = (features - features.mean(0)) / (features.std(0) + 1e-12)
    else:
        images = lab.data.images()
        if images.train.labels is None:
            raise DataError(f"{path}: these images have no labels to learn")
        features, labels, name = images.train.images.flatten(1), images.train.labels, images.name
    trained_on = TRAINED_ON if path is None else int(0.8 * len(features))
    order = torch.arange(len(features))
    if path is not None:  # which may be sorted by class
        order = torch.randperm(len(features), generator=lab.generator())
    train, test = order[:trained_on], order[trained_on:]
    return name, (features[train], labels[train]), (features[test], labels[test])


def walk_figure(walks: Tensor, straight: Tensor, width: int) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    layers = torch.arange(len(walks))
    deviation = (layers / (2 * width)).sqrt()
    drift = -layers / (2 * width)
    for factor in (2, 1):
        ax.fill_between(
            layers, drift - factor * deviation, drift + factor * deviation, color="C0", alpha=0.15,
            linewidth=0,
        )  # fmt: skip
    ax.plot(layers, walks[:, :12], color="C0", linewidth=0.8)
    ax.plot(layers, straight, color="C1", linewidth=2)
    ax.plot([], [], color="C0", label="Gaussian")
    ax.plot([], [], color="C1", label="orthogonal")
    ax.set_xlabel("layers $L$")
    ax.set_ylabel("log-length")
    ax.legend(loc="upper left")
    return figure


def spectrum_figure(log_values: Mapping[int, Tensor]) -> Figure:
    figure, axes = plt.subplots(
        1, len(log_values), figsize=(9, 3), layout="constrained", sharey=True, squeeze=False
    )
    for ax, (depth, values) in zip(axes[0], log_values.items(), strict=True):
        values = 10**values if depth == 1 else values
        ax.hist(values, bins=24, color="C0")
        ax.axvline(1 if depth == 1 else 0, color="C1", linewidth=2)
        ax.set_xlabel(r"$\sigma$" if depth == 1 else r"$\log_{10} \sigma$")
        ax.set_title(f"$L = {depth}$", fontsize="medium")
    axes[0, 0].set_ylabel("singular values")
    return figure


def training_figure(depths: Sequence[int], scores: Mapping[tuple[int, str], float]) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for arm, marker in zip(ARMS, "os^D", strict=True):
        ax.plot(depths, [scores[depth, arm] for depth in depths], marker=marker, label=arm)
    ax.set_xlabel("depth")
    ax.set_ylabel("held-out accuracy")
    ax.set_ylim(0, 1)
    ax.legend()
    return figure
