r"""Unbiased and biased estimators.

A mean over many mini-batches, layers, groups or processes looks like a safe thing: whatever noise
there is, it averages out. Noise does. Bias does not: the mean of a million batch variances
converges, to the wrong number. How wrong, which statistics are concerned, and what can be done?

## What averaging removes

An estimator $\hat\theta(x_1, \dots, x_n)$ is unbiased if its mean over all samples of size $n$ is
the truth, for every $n$ that it accepts. Draw many batches, estimate in each, average: an unbiased
estimator gets there as the number of batches grows, although $n$ stays small. The divisor-$n$
variance does not:

$$E\,\frac1n\sum_i (x_i - \bar x)^2 = E[x^2] - E[\bar x^2]
= (\sigma^2 + \mu^2) - \Big(\frac{\sigma^2}{n} + \mu^2\Big) = \Big(1 - \frac1n\Big)\sigma^2.$$

The sample's mean lies closer to its own sample than $\mu$ does. At $n = 1$ the failure is obvious:
the estimate is always 0. Dividing by $n - 1$ repairs it; where $\mu$ is known there is nothing to
repair, and $n$ is the right divisor.

## Which statistics are biased

Averages of $h(x)$ are unbiased for $E\,h$. A nonlinear function of an average is not:

$$E f(\bar x) \approx f(\mu) + \frac{f''(\mu)\,\sigma^2}{2n}.$$

So the root of an unbiased variance is biased low, and so are logarithms of means, normalisers of
softmax, ratios, entropies. Training on mini-batches is right where the loss is an average over
samples, and biased where it is a function of a batch's average.

Polynomials in moments can be corrected exactly. Of the fourth central moment, with
$m_p = \frac1n\sum_i(x_i - \bar x)^p$, the unbiased estimator is

$$h_4 = \frac{n\,[(n^2 - 2n + 3)\,m_4 - 3(2n - 3)\,m_2^2]}{(n-1)(n-2)(n-3)},$$

and of the fourth cumulant

$$k_4 = \frac{n^2\,[(n + 1)\,m_4 - 3(n - 1)\,m_2^2]}{(n-1)(n-2)(n-3)}.$$

For the logarithm and
the root there is no such formula that holds for every law. For normal data $E s = c_4(n)\,\sigma$,
and for those alone. What always helps is the jackknife: from the values $\hat\theta_{(i)}$
without the $i$-th sample,

$$\hat b = (n-1)\Big(\frac1n\sum_i \hat\theta_{(i)} - \hat\theta\Big)$$

estimates the bias, and $\hat\theta - \hat b$ lacks its term in $1/n$.

Unbiased is not best: for normal data the divisor $n + 1$ has the least mean squared error. Bias is
what counts where estimates are averaged.

## What is measured

The population is known to the last pixel: the grey values of scikit-learn's two photographs, or any
table of numbers given with `--data`. Batches are drawn from it with replacement, so that the truth
is exact, and the mean of all batches is compared with it in units of its standard error. The
divisor $n$ must miss by $-1/n$; the unbiased moments must not miss, within four standard errors.
Pixels are not normal, so $c_4$ is expected to miss, and is reported only.

Then a function of an expectation, $\log E\,e^{3x}$: the jackknife must remove nine tenths of its
bias. To see a tenth of a small bias, the known part of the noise is taken off each estimate: with
$y = e^{3x}$, the term $\bar y/E y - 1$, whose expectation is 0. And finally the arithmetic. A
formula made of power sums is unbiased on paper and loses all digits in a computer as soon as the
data have an offset. The truth there is that of the numbers as they are stored, computed after the
offset is taken off again, which is exact.

The reader should see one mean settle a good way below the truth and another upon it, and a straight
line of slope $-1$ that no number of batches bends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from kexue.lab import DataError, Lab
from kexue.stats.moments import (
    MomentAccumulator,
    central_moment,
    cumulant,
    jackknife,
    standard_deviation,
    variance,
)

SIZES = (2, 3, 4, 8, 16, 32, 64)
MEAN_EXP_SIZES = (4, 8, 16, 32, 64)
RATE = 3.0
OFFSETS = (0.0, 1e2, 1e4, 1e6, 1e8)
N_RANKS = 4
UNBIASED = {
    "variance, $n-1$": (2, lambda x: variance(x, axis=0)),
    "$h_3$": (3, lambda x: central_moment(x, 3, axis=0)),
    "$h_4$": (4, lambda x: central_moment(x, 4, axis=0)),
    "$k_4$": (4, lambda x: cumulant(x, 4, axis=0)),
}
BIASED = {
    "variance, $n$": (2, lambda x: variance(x, axis=0, correction=0)),
    "$s$ (Bessel)": (2, lambda x: standard_deviation(x, axis=0, correction="bessel")),
    "$s/c_4$": (2, lambda x: standard_deviation(x, axis=0)),
    "$m_4$": (4, lambda x: central_moment(x, 4, axis=0, unbiased=False)),
}


def run(lab: Lab) -> None:
    """Measure biases over batches, of moments and of a logarithm; then count digits."""
    population = _population(lab)
    n_batches = lab.pick(smoke=1000, quick=20_000, full=100_000)
    batches = _Batches(population, n_batches, np.random.default_rng(lab.seed))
    _moments(lab, batches)
    _two_limits(lab, batches)
    _log_mean_exp(lab, batches)
    _digits_lost(lab, population)


class _Batches:
    """Draws batches of a population with replacement; its own moments are the truth."""

    def __init__(self, population: np.ndarray, n_batches: int, rng: np.random.Generator) -> None:
        self.population = population
        self.n_batches = n_batches
        self.rng = rng

    def draw(self, n: int) -> np.ndarray:
        """Batches of size n, one a column."""
        return self.population[self.rng.integers(len(self.population), size=(n, self.n_batches))]

    def truths(self) -> dict[str, float]:
        """The number that each estimator is after."""
        moment = {p: float(central_moment(self.population, p, unbiased=False)) for p in (2, 3, 4)}
        deviation = math.sqrt(moment[2])
        return {
            "variance, $n$": moment[2],
            "variance, $n-1$": moment[2],
            "$s$ (Bessel)": deviation,
            "$s/c_4$": deviation,
            "$h_3$": moment[3],
            "$m_4$": moment[4],
            "$h_4$": moment[4],
            "$k_4$": float(cumulant(self.population, 4, unbiased=False)),
        }


def _population(lab: Lab) -> np.ndarray:
    if lab.data.path is None:
        # Back to the integers of the file, so that no rounding of the photographs is left.
        photographs = [((image.double() + 1) * 127.5).round() for image in lab.data.photographs()]
        return np.concatenate([(image.mean(0) / 255).numpy().ravel() for image in photographs])
    values = np.asarray(lab.data.matrix(), dtype=np.float64).ravel()
    if len(values) < 2 or not np.isfinite(values).all() or values.min() == values.max():
        raise DataError(f"{lab.data.path}: expected finite numbers of at least two values")
    # Units that are neither too small nor too large for the exponentials below.
    return (values - values.min()) / (values.max() - values.min())


def _moments(lab: Lab, batches: _Batches) -> None:
    truths = batches.truths()
    estimators = BIASED | UNBIASED
    measured: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in estimators}
    for n in lab.progress(SIZES, "batch sizes"):
        x = batches.draw(n)
        for name, (least, estimate) in estimators.items():
            if n >= least:
                values = estimate(x)
                scale = abs(truths[name])
                measured[name][n] = (
                    float(values.mean() - truths[name]) / scale,
                    float(values.std(ddof=1)) / math.sqrt(values.size) / scale,
                )
    rows = []
    for n in SIZES:
        row: dict[str, Any] = {"$n$": n}
        for name in estimators:
            row[name] = _with_error(*measured[name][n]) if n in measured[name] else None
        rows.append(row)
    lab.table(
        "Relative bias",
        rows,
        rf"Mean over {batches.n_batches} batches of size $n$, relative to the truth, ± one "
        rf"standard error. Population: {len(batches.population)} values, $\sigma^2 = "
        rf"{truths['variance, $n$']:.14g}$, skewness "
        rf"{stats.skew(batches.population):.4f}, excess kurtosis "
        rf"{stats.kurtosis(batches.population):.4f}.",
    )
    lab.figure(
        "bias",
        _bias_figure(measured),
        "Relative bias against the size of a batch, with bars of two standard errors. Line: the "
        "theory of the divisor $n$, $1/n$. The grey points, unbiased, are noise without a sign.",
    )
    lab.claim(
        "largest distance of the divisor-$n$ bias from $-1/n$, in standard errors",
        max(abs(bias + 1 / n) / error for n, (bias, error) in measured["variance, $n$"].items()),
        "<=",
        4.0,
    )
    for name in UNBIASED:
        lab.claim(
            f"largest bias of {name} over all batch sizes, in standard errors",
            max(abs(bias) / error for bias, error in measured[name].values()),
            "<=",
            4.0,
        )
    bias, error = measured["$s/c_4$"][8]
    lab.observe(
        "relative bias of $s/c_4$ at $n = 8$, in standard errors: pixels are not normal",
        abs(bias) / error,
        ">",
        4.0,
    )


def _two_limits(lab: Lab, batches: _Batches) -> None:
    n = 4
    x = batches.draw(n)
    counts = np.arange(1, batches.n_batches + 1)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, correction in (("divisor $n$", 0), ("divisor $n-1$", 1)):
        values = variance(x, axis=0, correction=correction)
        axes.semilogx(counts, values.cumsum() / counts, label=name)
    truth = batches.truths()["variance, $n$"]
    axes.axhline(truth, color="black", linewidth=1.0, linestyle=":", label=r"truth, $\sigma^2$")
    axes.set(xlabel="number of batches", ylabel="mean of their variances", ylim=(0, 2 * truth))
    axes.legend()
    lab.figure(
        "two-limits",
        figure,
        f"The mean of the variances of more and more batches of size {n}. Both converge; one of "
        "them to three quarters of the truth.",
    )


def _log_mean_exp(lab: Lab, batches: _Batches) -> None:
    exponentials = np.exp(RATE * batches.population)
    truth = math.log(exponentials.mean())
    spread = exponentials.var() / exponentials.mean() ** 2
    rows, plain_bias, removed = [], {}, {}
    for n in lab.progress(MEAN_EXP_SIZES, "log mean exp"):
        x = np.exp(RATE * batches.draw(n))
        result = jackknife(_log_mean, x)
        plain, corrected = np.asarray(result.estimate), np.asarray(result.corrected)
        # Of known expectation 0, and most of the noise of both.
        control = x.mean(axis=0) / exponentials.mean() - 1
        biases = plain - control - truth, corrected - control - truth
        plain_bias[n], left = (bias.mean() for bias in biases)
        plain_error, left_error = (bias.std(ddof=1) / math.sqrt(bias.size) for bias in biases)
        removed[n] = 1 - abs(left) / abs(plain_bias[n])
        rows.append({
            "$n$": n,
            "plain": _with_error(plain_bias[n], plain_error),
            "theory": f"{-spread / (2 * n):+.4f}",
            "jackknife": _with_error(left, left_error),
            "removed": f"{removed[n]:.1%}",
            "variance ratio": corrected.var() / plain.var(),
        })  # fmt: skip
    lab.table(
        "Bias of log mean exp(3x)",
        rows,
        r"Plain: the logarithm of the batch's mean. Theory: $-\mathrm{Var}(e^{3x})\,/\,(2n\,"
        r"E[e^{3x}]^2)$. Variance ratio: that of the corrected estimate to that of the plain one.",
    )
    lab.claim(
        r"share of the bias of log mean exp that the jackknife removes, least over $n \ge 8$",
        min(share for n, share in removed.items() if n >= 8),
        ">=",
        0.9,
    )


def _log_mean(x: np.ndarray) -> np.ndarray:
    return np.log(x.mean(axis=0))


def _digits_lost(lab: Lab, population: np.ndarray) -> None:
    sample = population[:: max(1, len(population) // 100_000)]
    rows, digits = [], {}
    for offset in OFFSETS:
        stored = sample + offset
        # Exact by Sterbenz where the offset is large, so that the truth is that of `stored`.
        centred = stored - offset
        exact = _exact_moments(centred)
        for name, (method, quantities) in _METHODS.items():
            for quantity in quantities:
                value = method(stored, quantity)
                digits[name, quantity, offset] = _correct_digits(value, exact[quantity])
        rows.append({
            "offset": f"{offset:g}",
            **{
                f"{name}, ${'k_4' if quantity == 'k4' else 's^2'}$":
                    f"{digits[name, quantity, offset]:.1f}"
                for name, (_, quantities) in _METHODS.items()
                for quantity in quantities
            },
        })  # fmt: skip
    lab.table(
        "Correct digits against the offset",
        rows,
        f"Of the unbiased variance and of $k_4$, {len(sample)} values plus an offset. Power sums: "
        r"$\sum x^2, \sum x^3, \sum x^4$ as they stand in the textbook. Ranks: four accumulators, "
        "merged.",
    )
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, (_, quantities) in _METHODS.items():
        for quantity in quantities:
            label = f"{name}, {'$k_4$' if quantity == 'k4' else '$s^2$'}"
            values = [digits[name, quantity, offset] for offset in OFFSETS]
            axes.plot([max(o, 1.0) for o in OFFSETS], values, marker="o", label=label)
    axes.set(xscale="log", xlabel="offset (the first point has none)", ylabel="correct digits")
    axes.legend(fontsize="small")
    lab.figure(
        "digits",
        figure,
        "Formulas of power sums lose two digits of the variance, and four of $k_4$, for each two "
        "of the offset. Deviations lose none.",
    )
    last = OFFSETS[-1]
    for name in ("ours", f"{N_RANKS} ranks"):
        lab.claim(
            f"least digits of variance and $k_4$ at offset $10^8$, {name}",
            min(digits[name, "variance", last], digits[name, "k4", last]),
            ">=",
            6.0,
        )
    lab.claim(
        "most digits of variance and $k_4$ at offset $10^8$, raw power sums",
        max(digits["power sums", "variance", last], digits["power sums", "k4", last]),
        "<",
        1.0,
    )


def _exact_moments(x: np.ndarray) -> dict[str, float]:
    """Unbiased variance and k_4 of data around 0, with sums in extended precision."""
    n = len(x)
    mean = math.fsum(x) / n
    c = x - mean
    # The mean is rounded; what is left of it is taken off once more.
    c = c - math.fsum(c) / n
    m2, m4 = (math.fsum(c**p) / n for p in (2, 4))
    k4 = n**2 * ((n + 1) * m4 - 3 * (n - 1) * m2**2) / ((n - 1) * (n - 2) * (n - 3))
    return {"variance": n * m2 / (n - 1), "k4": k4}


def _power_sums(x: np.ndarray, quantity: str) -> float:
    """The textbook's formulas in sums of powers of the data."""
    n = len(x)
    s1, s2, s3, s4 = (float((x**p).sum()) for p in (1, 2, 3, 4))
    if quantity == "variance":
        return (n * s2 - s1**2) / (n * (n - 1))
    numerator = (
        -6 * s1**4
        + 12 * n * s1**2 * s2
        - 3 * n * (n - 1) * s2**2
        - 4 * n * (n + 1) * s1 * s3
        + n**2 * (n + 1) * s4
    )
    return numerator / (n * (n - 1.0) * (n - 2.0) * (n - 3.0))


def _kstat(x: np.ndarray, quantity: str) -> float:
    return float(stats.kstat(x, 2 if quantity == "variance" else 4))


def _ours(x: np.ndarray, quantity: str) -> float:
    return float(cumulant(x, 2 if quantity == "variance" else 4))


def _over_ranks(x: np.ndarray, quantity: str) -> float:
    total = MomentAccumulator(max_order=4)
    for share in np.array_split(x, N_RANKS):
        total.merge(MomentAccumulator(max_order=4).update(share))
    return float(total.cumulant(2 if quantity == "variance" else 4))


_BOTH = ("variance", "k4")
_METHODS: dict[str, tuple[Callable[[np.ndarray, str], float], tuple[str, ...]]] = {
    "power sums": (_power_sums, _BOTH),
    "kstat": (_kstat, _BOTH),
    "ours": (_ours, _BOTH),
    f"{N_RANKS} ranks": (_over_ranks, _BOTH),
}


def _correct_digits(value: float, exact: float) -> float:
    if not math.isfinite(value):
        return 0.0
    error = abs(value - exact) / abs(exact)
    return -math.log10(error) if 1e-16 < error < 1 else 16.0 * (error < 1)


def _with_error(value: float, error: float) -> str:
    return f"{value:+.4f} ± {error:.4f}"


def _bias_figure(measured: dict[str, dict[int, tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name, of_sizes in measured.items():
        sizes = list(of_sizes)
        bias, error = (np.array(column) for column in zip(*of_sizes.values(), strict=True))
        if name in BIASED:
            axes.errorbar(
                sizes, np.abs(bias), 2 * error, marker="o", capsize=2, linestyle="none", label=name
            )
        else:
            axes.plot(
                sizes, np.abs(bias), ".", color="gray", alpha=0.7,
                label="unbiased" if name == next(iter(UNBIASED)) else None,
            )  # fmt: skip
    axes.plot(SIZES, [1 / n for n in SIZES], color="black", linewidth=1.0, label="$1/n$")
    axes.set(
        xscale="log", yscale="log", ylim=(1e-4, 1.5),
        xlabel="batch size $n$", ylabel="relative bias (absolute value)",
    )  # fmt: skip
    axes.set_xticks(SIZES, [str(n) for n in SIZES])
    axes.minorticks_off()
    axes.legend(fontsize="small", ncols=2)
    return figure
