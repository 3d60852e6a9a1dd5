r"""Multiplication as addition.

What does it cost to give up multiplication? In hardware a multiplier takes many times the area and
energy of an adder. Mitchell found in 1962 that one addition does most of its work, with an error
that is never above one ninth. The article finds that hard to believe and easy to prove, and passes
on a claim that is harder to believe still: that a neural network does not mind.

## A logarithm that costs nothing

Write a positive number as $p = 2^n(1 + x)$ with $0 \le x < 1$. Its logarithm is
$n + \log_2(1 + x)$, and since $\log_2(1+x)$ agrees with $x$ at both ends of the interval,

$$\log_2 p \approx n + x, \qquad 2^{n + x} \approx 2^n (1 + x).$$

In binary both directions are a matter of counting and shifting. A float has done it already: its
bits hold $n$ and then $x$. Read as an integer, the pattern of $p$ is

$$I(p) = 2^m (n + \text{bias} + x)$$

with $m$ bits for the mantissa, and so a product is a sum of integers,

$$I(p \otimes q) = I(p) + I(q) - I(1),$$

a quotient a difference, and a square root a shift: $I(\sqrt p) = \tfrac12(I(p) + I(1))$. Nothing is
rounded on the way. For instance $3 \otimes 3 = 8$, and $12.3 \otimes 4.56 = 53.68$ where the true
product is $56.088$, which is 4.3 percent too little.

## Never more than one ninth

Let $x$ and $y$ be the two fractions. The true product is $(1+x)(1+y)$ times a power of two. If
$x + y < 1$, the sum stays in its place and means $1 + x + y$; otherwise it carries into the
exponent and means $2(x + y)$. What is missing is

$$xy \quad\text{if } x + y < 1, \qquad (1-x)(1-y) \quad\text{otherwise.}$$

Neither is negative, so the product is never too large. In the first case put $s = x + y$; then
$xy \le s^2/4$, and as the relative deficit $xy/(1 + s + xy)$ increases with $xy$, it is at most
$(s/2)^2/(1 + s/2)^2$, which increases with $s$ up to

$$\frac{(1/2)^2}{(3/2)^2} = \frac19 .$$

In the second case the same argument with $u = 1 - x$, $v = 1 - y$ and $u + v \le 1$ gives
$uv/((2-u)(2-v))$, again at most $1/9$ at $u = v = \frac12$. Equality holds where both mantissas are
$1.5$, and only there; the mean over uniform mantissas is $-3.85$ percent. A quotient is too large
by at most $1/8$, a root by at most $6.07$ percent.

The article adds a remark. That $\log_2(1+x)$ should be close to $x$ is a coincidence of base two;
$x$ is really the start of the series of $\ln(1+x)$, and $e$ is nearer to three than to two. A
machine that counts in threes would err less on average.

## Getting closer without multiplying

*A constant.* The error has one sign. Adding a fixed $c$ to the sum of the patterns centres it: the
error then lies between $8/(3-c)^2 - 1$ and $c$, and both ends are equally far, $6.89$ percent,
where $(1-c)(3-c)^2 = 8$. A slightly smaller $c = 0.0566$ makes the mean error zero.

*A table.* Let the leading $t$ bits of both mantissas choose a constant out of $4^t$.

*Mitchell's own.* The deficit is a product, $xy$ or $(1-x)(1-y)$. Take it by the same method and add
it; the deficit of that is a product again. After $k$ rounds the error is at most

$$\frac1{A_k^2}, \qquad A_k = \frac{2\cdot 4^{k+1} + 1}{3} = 3,\ 11,\ 43,\ 171,\ \dots$$

and it is reached by $A_k$ times itself, whose approximate product is $A_k^2 - 1$. Integers of $b$
bits are exact after $b/2$ rounds.

## What is measured

All $2^{20}$ pairs of mantissas of half precision, for the bound. Then a network with layers of
$64 - 64 - 64 - 10$ units learns the digits of scikit-learn, from 70 percent of them; stochastic
gradient descent, rate $0.1$, momentum $0.9$, batches of 64, 5 seeds, 30 epochs (10 in a quick run).
In every linear layer *all* products are replaced: those of the forward pass, and in the backward
pass those of both gradients, $g W$ and $g^\top x$. The derivative of $p \otimes q$ is a step
function; what is propagated is the derivative of the true product, taken with $\otimes$.

The claim holds if the smallest error of all pairs is exactly $-1/9$ and the largest $0$; if the
mean accuracy with plain Mitchell products is at most one percentage point below that with floats;
and if it is at most half a point below with the constant that removes the mean error. A network
can well fail this. Zero has no logarithm; if it is added like any other pattern, its products with
small numbers wrap around to huge ones, and the network learns nothing.

The reader should see that the arms can hardly be told apart, and that weights trained with true
products may be used with approximate ones right away. This is the arithmetic, not its speed: a
processor that has a multiplier gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from kexue.arithmetic.mitchell import (
    MINIMAX_CONSTANT,
    UNBIASED_CONSTANT,
    MitchellLinear,
    multiply,
    relative_error_bounds,
)
from kexue.lab import Lab, seeded

FLOAT, PLAIN, UNBIASED = "true products", "Mitchell", "Mitchell, unbiased"
EXACT_BACKWARD, AFTERWARDS = "Mitchell, true gradients", "Mitchell afterwards"

# 30 percent of the digits.
N_TEST = 540

Sample = tuple[Tensor, Tensor, Tensor, Tensor]


# How the layers of a network multiply: options of `MitchellLinear`, None for true products.
Products = dict[str, Any] | None
ARMS: dict[str, Products] = {
    FLOAT: None,
    PLAIN: {},
    UNBIASED: {"correction": "constant", "constant": UNBIASED_CONSTANT},
    EXACT_BACKWARD: {"backward": "exact"},
}


def run(lab: Lab) -> None:
    """Check the bound on all pairs, then train."""
    _judge_bound(lab)
    _report_corrections(lab)
    _train_all(lab)


def _judge_bound(lab: Lab) -> None:
    mantissas = (1 + torch.arange(1024, dtype=torch.float64) / 1024).half()
    true = mantissas.double()[:, None] * mantissas.double()
    error = (multiply(mantissas[:, None], mantissas).double() - true) / true
    pairs = "relative error over all pairs of half-precision mantissas"
    lab.claim(f"smallest {pairs}", error.min(), "==", -1 / 9)
    lab.claim(f"largest {pairs}", error.max(), "==", 0.0)
    lab.figure(
        "error",
        _map(error),
        "Relative error of the product, in percent, over the fractions of both factors. It is zero "
        r"at the edges and $-1/9$ at the centre; the crease is where $x + y = 1$ begins to carry.",
    )


def _map(error: Tensor) -> Figure:
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    x = np.arange(0, 1024, 8) / 1024
    z = 100 * error[::8, ::8].numpy()
    levels = np.linspace(-12, 0, 13)
    filled = axes.contourf(x, x, z, levels=levels, cmap="cividis")
    axes.plot(0.5, 0.5, marker="x", color="white")
    axes.set(xlabel="$x$", ylabel="$y$", aspect="equal")
    figure.colorbar(filled, ax=axes, label="relative error in percent")
    return figure


def _report_corrections(lab: Lab) -> None:
    n = lab.pick(smoke=100, quick=500, full=2000)
    # Midpoints of an even grid: uniform mantissas.
    mantissas = 1 + (torch.arange(n, dtype=torch.float64) + 0.5) / n
    constants = {
        "minimax": MINIMAX_CONSTANT,
        "1/16": 1 / 16,
        "unbiased": UNBIASED_CONSTANT,
    }
    kinds: list[tuple[str, dict[str, Any]]] = [("none", {})]
    kinds += [
        (f"constant, {name}", {"correction": "constant", "constant": c})
        for name, c in constants.items()
    ]
    kinds += [
        (f"table, t = {bits}", {"correction": "table", "table_bits": bits}) for bits in range(1, 7)
    ]
    kinds += [
        (f"series, k = {terms}", {"correction": "mitchell", "terms": terms})
        for terms in range(1, 5)
    ]
    true = mantissas[:, None] * mantissas
    rows, spreads = [], {}
    for name, options in kinds:
        error = multiply(mantissas[:, None], mantissas, **options) / true - 1
        bounds = relative_error_bounds("multiply", **options)
        spread = float(error.square().mean().sqrt())
        spreads[name] = spread, max(-bounds.lower, bounds.upper)
        rows.append(
            {
                "correction": name,
                "at most": _percent(spreads[name][1]),
                "mean": _percent(float(error.mean())),
                "r.m.s.": _percent(spread),
            }
        )
    lab.table(
        "Corrections",
        rows,
        "Relative errors of corrected products in percent: the bound on their magnitude, mean and "
        f"root mean square over ${n} \\times {n}$ uniform mantissas. The table goes by $t$ leading "
        "bits, the series has $k$ terms.",
    )
    lab.figure(
        "corrections",
        _decay(spreads),
        "Root mean square (solid) and largest (dashed) relative error against the number $k$ of "
        "terms of the series and the number $t$ of leading bits in the table. Each term is worth "
        "four bits, each bit of the table one.",
    )


def _percent(value: float) -> float:
    """In percent, with three digits."""
    return float(f"{100 * value:.3g}")


def _decay(spreads: dict[str, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for kind, marker in (("table", "s"), ("series", "o")):
        found = [spreads["none"]] if kind == "series" else []
        found += [value for name, value in spreads.items() if name.startswith(kind)]
        steps = range(1 if kind == "table" else 0, len(found) + (kind == "table"))
        (line,) = axes.plot(steps, [rms for rms, _ in found], marker=marker, label=kind)
        axes.plot(steps, [most for _, most in found], linestyle="--", color=line.get_color())
    axes.set_yscale("log")
    axes.set(xlabel="terms, or leading bits", ylabel="relative error")
    axes.legend()
    return figure


def _train_all(lab: Lab) -> None:
    names = lab.pick(smoke=list(ARMS)[:3], quick=list(ARMS)[:3], full=list(ARMS))
    seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=5, full=5))]
    epochs = lab.pick(smoke=1, quick=10, full=30)
    counts: dict[str, list[int]] = {name: [] for name in [*names, AFTERWARDS]}
    bar = lab.progress([(seed, name) for seed in seeds for name in names], "networks")
    with _one_thread():
        for seed, name in bar:
            data = _digits(lab, seed)
            network = _train(ARMS[name], data, seed, epochs)
            counts[name].append(_right(network, data))
            bar.metric(accuracy=counts[name][-1] / N_TEST)
            if name == FLOAT:
                exchanged = _network(ARMS[PLAIN])
                exchanged.load_state_dict(network.state_dict())
                counts[AFTERWARDS].append(_right(exchanged, data))
    _judge_training(lab, counts)
    _report_training(lab, counts, epochs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of 64 rows are faster on one thread than on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _judge_training(lab: Lab, counts: dict[str, list[int]]) -> None:
    def lead(name: str) -> float:
        more = sum(counts[name]) - sum(counts[FLOAT])
        return more / (N_TEST * len(counts[FLOAT]))

    statement = "mean test accuracy {} minus that with true products"
    lab.claim(statement.format("with Mitchell products"), lead(PLAIN), ">=", -0.010)
    lab.claim(
        statement.format("with Mitchell products of mean error zero"), lead(UNBIASED), ">=", -0.005
    )
    lab.observe(
        statement.format("of weights trained with true products and used with Mitchell's"),
        lead(AFTERWARDS),
        ">=",
        -0.010,
    )
    if EXACT_BACKWARD in counts:
        lab.observe(
            statement.format("with Mitchell products and true gradients"),
            lead(EXACT_BACKWARD),
            ">=",
            -0.010,
        )


def _report_training(lab: Lab, counts: dict[str, list[int]], epochs: int) -> None:
    n_seeds = len(counts[FLOAT])
    lab.table(
        "Test accuracy",
        [
            {
                "products": name,
                "mean": f"{np.mean(right) / N_TEST:.4f}",
                "standard deviation": (
                    f"{np.std(right, ddof=1) / N_TEST:.4f}" if n_seeds > 1 else None
                ),
            }
            for name, right in counts.items()
        ],
        f"On {N_TEST} digits that were not trained on; {n_seeds} seeds, {epochs} epochs each. "
        f"“{AFTERWARDS}” is the network of the first row, with its products exchanged and no "
        "further training.",
    )
    lab.figure(
        "accuracy",
        _bars(counts),
        "Share of the test digits that are misread: means as bars, single seeds as dots.",
    )


def _bars(counts: dict[str, list[int]]) -> Figure:
    figure = Figure(figsize=(5.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for position, (name, right) in enumerate(counts.items()):
        errors = 100 * (1 - np.array(right) / N_TEST)
        axes.barh(position, errors.mean(), height=0.6, color=f"C{int(name != FLOAT)}")
        axes.plot(errors, np.full(len(errors), position), ".", color="black")
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.set(xlabel="test error in percent", xlim=(0, None))
    return figure


def _digits(lab: Lab, seed: int) -> Sample:
    """Training images and labels, then those for the test."""
    table = lab.data.tabular("digits")
    split = train_test_split(
        table.features / 16,
        table.target,
        test_size=N_TEST,
        stratify=table.target,
        random_state=seed,
    )
    train, test, train_label, test_label = map(torch.from_numpy, split)
    return train.float(), train_label.long(), test.float(), test_label.long()


def _network(products: Products) -> nn.Sequential:
    def layer(inputs: int, outputs: int) -> nn.Linear:
        if products is None:
            return nn.Linear(inputs, outputs)
        return MitchellLinear(inputs, outputs, **products)

    return nn.Sequential(layer(64, 64), nn.ReLU(), layer(64, 64), nn.ReLU(), layer(64, 10))


def _train(products: Products, data: Sample, seed: int, epochs: int) -> nn.Sequential:
    """Train from the seed's weights with the seed's batches, the same for all ways to multiply."""
    x, labels, _, _ = data
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        network = _network(products)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            loss = nn.functional.cross_entropy(network(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


@torch.no_grad()
def _right(network: nn.Sequential, data: Sample) -> int:
    """How many of the test digits are read right."""
    _, _, x, labels = data
    return int((network(x).argmax(1) == labels).sum())
