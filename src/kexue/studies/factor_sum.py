r"""The smallest $a + b + c$ with $N = ab + c$.

Lay out $N$ tiles in a grid of $a \times b$ and leave $c$ over: how small can $a + b + c$ be? For
$N = 130$ the grid nearest to a square, $11 \times 11 + 9$, costs $31$, while $10 \times 13$ costs
$23$. If $N$ is a product of two near factors, the answer is their sum, and so the problem smells of
factoring. Is it that hard? Or does the freedom to leave something over make it easy?

## The square root

Fix $a \le b$. The best $b$ is $\lfloor N/a \rfloor$, and with the fractional part of $N/a$

$$S = (a - 1)\Big\{\frac Na\Big\} + a + \frac Na .$$

Were that part constantly $0$, the smallest sum would sit at $a = \sqrt N$; were it constantly $1$,
at $a = \sqrt{N/2}$. It is enough to try the $0.29\sqrt N$ integers between the two.

## The fourth root

Sum and difference are better coordinates than the factors. With $p = a + b$ and $q = b - a$, two
integers of the same parity, $4ab = p^2 - q^2$, and

$$4S = 4N + q^2 + 4 - (p - 2)^2 ,$$

$$4c = q^2 - D(p) \ge 0, \qquad D(p) = p^2 - 4N .$$

For each $p$ only the smallest $q \ge \sqrt{D}$ of its parity counts. Where $p \le 2\sqrt N$ that
$q$ is $0$ or $1$, and a step of $p$ gains more than it costs: of all these only
$p = \lfloor 2\sqrt N \rfloor$ can win. Where $p > 2\sqrt N$, $q < \sqrt D + 2$, which leaves
$c < 1 + \sqrt D$. The first of them, $p_1 = \lceil 2\sqrt N \rceil$, has $D < 1 + 4\sqrt N$, so

$$2\sqrt N \le S(N) \le 2\sqrt N + 2 + \sqrt{1 + 4\sqrt N} .$$

Since $S \ge p$, some $2 N^{1/4}$ values of $p$ remain. That is where the article ends.

## The sixth root

$S \ge p$ says more: *in ascending order, the search is complete as soon as $p$ passes the best sum
found so far*. How soon is that? At the excess $t = p - 2\sqrt N$ the root is
$\sqrt D \approx 2 N^{1/4}\sqrt t$, and $c$ is about as good as a uniform random number between $0$
and $\sqrt D$. The expected number of $p$ whose sum exceeds $2\sqrt N$ by at most $s$ is then

$$\int_0^s \frac{s - t}{2 N^{1/4}\sqrt t}\, dt = \frac23\, \frac{s^{3/2}}{N^{1/4}} ,$$

and if rare hits are independent, there is none with probability

$$P\Big(\frac{S - 2\sqrt N}{N^{1/6}} > x\Big) \to e^{-\frac23 x^{3/2}} ,$$

a Weibull law with shape $\frac32$, scale $(\frac32)^{2/3} = 1.3104$ and mean
$(\frac32)^{2/3}\,\Gamma(\frac53) = 1.1829$. The same number times $N^{1/6}$ is what the search
examines. This is no theorem: a random $N$ is only expected to behave so, and an $N$ made for it may
lie anywhere between the two bounds. It fits what T. H. Chan found about almost squares. For an
interval at $x$ to hold an integer with both factors within $x^\theta$ of $\sqrt x$, it needs a
length of order $x^{1/2 - \theta}$ at least; here the factors lie some $N^{1/3}$ from the root, and
$c$ is of order $N^{1/6}$.

Beyond some thirty digits one more idea carries on: $c = w\delta + \delta^2$ with $w = \sqrt D$ and
$\delta$ the fractional part of $\frac{p - w}2$, a smooth function of $p$. Its Taylor polynomial
modulo 1 finds the few $p$ with small $\delta$ among millions, a few nanoseconds each, and integers
verify them. Sixty digits take a minute or two, where the fourth root would take decades.

## What is measured

1. The number of candidates of the three methods for random $N$ from $10^4$ on, and the slopes of
   its logarithm. They must be $\frac12$, $\frac14$ and visibly less than $\frac14$. Beyond $10^8$
   the square root is counted and not run: its count is known.
2. The excess $E = (S - 2\sqrt N)/N^{1/6}$ of 2000 random numbers of each size against the Weibull
   law, by a Kolmogorov–Smirnov test and by its mean. A search that misses candidates would find
   larger sums and shift both.
3. Whether the methods agree: every number is solved twice at least, one by one with integers and in
   a batch with floats, and many of them also by the fourth and the square root.
4. How good the obvious guess is: $a = \lfloor\sqrt N\rfloor$ and $b = a$ or $a + 1$. The article
   began with it as a closed form.

The reader should see three straight lines of different slope, a histogram under a curve that was
never fitted, and no pattern whatever in $S(N)$ itself.
"""

from __future__ import annotations

import math
from math import isqrt
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from kexue.arithmetic.factor_sum import FactorSum, factor_sum, factor_sum_batch, factor_sum_table
from kexue.lab import Lab

SHAPE = 3 / 2
SCALE = (3 / 2) ** (2 / 3)
MEAN = SCALE * math.gamma(5 / 3)
MEDIAN = (1.5 * math.log(2)) ** (2 / 3)
LAW = stats.weibull_min(SHAPE, scale=SCALE)

METHODS = ("square_root", "fourth_root", "adaptive")
EXPONENTS = {"square_root": 1 / 2, "fourth_root": 1 / 4, "adaptive": 1 / 6}
NAMES = {"square_root": "square root", "fourth_root": "fourth root", "adaptive": "adaptive"}
JUDGED = 15
SQUARE_ROOT_RUNS_UP_TO = 8
PI = "314159265358979323846264338327950288"


def run(lab: Lab) -> None:
    """Count candidates, test the law of the excess, compare the methods and the obvious guess."""
    rng = np.random.default_rng(lab.seed)
    disagreements = _complexity(lab, rng) + _excess(lab, rng)
    lab.claim("numbers on which two methods disagree", disagreements, "==", 0)
    _obvious_guess(lab)
    _large_numbers(lab, rng)


def _complexity(lab: Lab, rng: np.random.Generator) -> int:
    """Return the number of disagreements."""
    powers = lab.pick(smoke=(4, 6), quick=(4, 6, 8, 10), full=(4, 6, 8, 10, 12))
    n_numbers = lab.pick(smoke=10, quick=100, full=100)
    disagreements = 0
    candidates: dict[str, list[float]] = {method: [] for method in METHODS}
    for power in lab.progress(powers, "candidates"):
        numbers = _random(rng, power, n_numbers)
        whole = [factor_sum(n, method="fourth_root") for n in numbers]
        quick = [factor_sum(n) for n in numbers]
        disagreements += _disagreements(numbers, quick, whole)
        if power <= SQUARE_ROOT_RUNS_UP_TO:
            roots = [factor_sum(n, method="square_root") for n in numbers]
            disagreements += sum(r.total != f.total for r, f in zip(roots, quick, strict=True))
            counts = [best.candidates for best in roots]
        else:
            counts = [isqrt(n) - isqrt(n // 2) + 1 for n in numbers]
        candidates["square_root"].append(float(np.mean(counts)))
        candidates["fourth_root"].append(float(np.mean([best.candidates for best in whole])))
        candidates["adaptive"].append(float(np.mean([best.candidates for best in quick])))

    slopes = {m: float(np.polyfit(powers, np.log10(candidates[m]), 1)[0]) for m in METHODS}
    lab.table(
        "Candidates",
        [
            {
                "method": NAMES[method],
                **{f"$10^{{{p}}}$": v for p, v in zip(powers, candidates[method], strict=True)},
                "slope": slopes[method],
                "limit": EXPONENTS[method],
            }
            for method in METHODS
        ],
        f"Mean number of candidates for {n_numbers} random numbers between $10^d$ and "
        r"$2\cdot10^d$, and the slope of its logarithm.",
    )
    lab.figure(
        "candidates",
        _candidates_figure(powers, candidates),
        r"Mean number of candidates. Dashed: the theory, $(1 - \frac1{\sqrt2})\sqrt N$, "
        r"$2N^{1/4} + 5$ and $1.183\,N^{1/6}$, with no free constant.",
    )
    lab.claim("slope of the fourth root", slopes["fourth_root"], ">=", 0.20)
    lab.claim("slope of the fourth root", slopes["fourth_root"], "<=", 0.28)
    lab.claim("slope of the square root", slopes["square_root"], ">=", 0.48)
    lab.claim("slope of the square root", slopes["square_root"], "<=", 0.52)
    lab.claim(
        "slope of the adaptive search, against that of the fourth root less 0.04",
        slopes["adaptive"],
        "<",
        slopes["fourth_root"] - 0.04,
    )
    return disagreements


def _excess(lab: Lab, rng: np.random.Generator) -> int:
    """Return the number of disagreements."""
    powers = lab.pick(smoke=(JUDGED,), quick=(12, JUDGED), full=(12, JUDGED, 18))
    n_numbers = lab.pick(smoke=50, quick=2000, full=2000)
    n_whole = lab.pick(smoke=5, quick=500, full=2000)
    disagreements = 0
    excesses: dict[int, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for power in powers:
        numbers = _random(rng, power, n_numbers)
        whole, quick = [], []
        for i, n in enumerate(lab.progress(numbers, f"excess at 10^{power}")):
            quick.append(factor_sum(n))
            if i < n_whole:
                whole.append(factor_sum(n, method="fourth_root"))
        disagreements += _disagreements(numbers, quick, whole)

        sixth = np.array(numbers, dtype=float) ** (1 / 6)
        totals = np.array([best.total for best in quick])
        excess = (totals - 2 * np.sqrt(np.array(numbers, dtype=float))) / sixth
        excesses[power] = excess
        candidates = np.array([best.candidates for best in quick])
        rows.append(
            {
                "$N$ from": f"1e{power}",
                "mean $E$": float(excess.mean()),
                "median $E$": float(np.median(excess)),
                "largest $E$": float(excess.max()),
                "KS $p$": float(stats.kstest(excess, LAW.cdf).pvalue),
                "candidates $/ N^{1/6}$": float((candidates / sixth).mean()),
            }
        )
    largest = float(LAW.isf(1 / n_numbers))
    law = ("Weibull", MEAN, MEDIAN, largest, None, MEAN)
    rows.append(dict(zip(rows[0], law, strict=True)))
    lab.table(
        "Excess over twice the root",
        rows,
        f"$E = (S - 2\\sqrt N)/N^{{1/6}}$ of {n_numbers} random numbers each, and what the law "
        f"says; as the largest, what one in {n_numbers} exceeds.",
    )
    lab.figure(
        "excess",
        _excess_figure(excesses),
        "Left: the excess of random numbers and the density of the Weibull law. Right: the share "
        "of numbers above it, on a logarithmic scale; the curve has no free constant.",
    )
    judged = rows[powers.index(JUDGED)]
    lab.claim(f"KS test of the Weibull law at $10^{{{JUDGED}}}$", judged["KS $p$"], ">", 0.001)
    lab.claim(
        f"relative error of the mean of $E$ at $10^{{{JUDGED}}}$",
        abs(judged["mean $E$"] / MEAN - 1),
        "<=",
        0.05,
    )
    return disagreements


def _obvious_guess(lab: Lab) -> None:
    limit = lab.pick(smoke=10**4, quick=10**6, full=10**6)
    smallest = factor_sum_table(limit)
    n = np.arange(limit + 1)
    root = np.sqrt(n).astype(int)
    rest = n - root * root
    guess = 2 * root + rest
    oblong = rest >= root
    guess[oblong] = np.minimum(guess[oblong], (2 * root + 1 + rest - root)[oblong])

    counted = n >= 6
    right = (guess == smallest)[counted]
    first_failure = int(n[counted][~right][0])
    lab.table(
        "The obvious guess",
        [
            {
                "numbers": f"{n[counted][0]} to {limit}",
                "right": f"{right.mean():.2%}",
                "first failure": first_failure,
                "mean excess": float((guess - smallest)[counted].mean()),
                "largest excess": int((guess - smallest).max()),
            }
        ],
        r"$a = \lfloor\sqrt N\rfloor$ and $b = a$, or $b = a + 1$ where that is allowed.",
    )
    lab.figure(
        "sums",
        _sums_figure(smallest[:401], guess[:401]),
        r"The smallest sum for $N \le 400$, the bound $\lceil 2\sqrt N\rceil$ below it and the "
        "obvious guess above.",
    )
    lab.observe("share of numbers for which the obvious guess is right", right.mean(), "<", 0.05)


def _large_numbers(lab: Lab, rng: np.random.Generator) -> None:
    digits = lab.pick(smoke=(11,), quick=(11, 21, 31), full=(11, 21, 31, 36))
    numbers = {f"π, {count} digits": int(PI[:count]) for count in digits}
    if lab.budget == "full":
        numbers["random, 48 digits"] = int("1" + "".join(map(str, rng.integers(10, size=47))))
    rows, unproven = [], 0
    for name in lab.progress(list(numbers), "large numbers"):
        best = factor_sum(numbers[name])
        unproven += not best.optimal
        rows.append(
            {
                "number": name,
                "$a$": str(best.a),
                "$c$": str(best.c),
                "candidates": best.candidates,
                "$/ N^{1/6}$": best.candidates / best.n ** (1 / 6),
                "$2N^{1/4}$": 2 * best.n**0.25,
            }
        )
    lab.table(
        "Large numbers",
        rows,
        "Each with a proof that no sum is smaller; $b = (N - c)/a$. The last column is what the "
        "fourth root would examine. Blocks are examined whole, so the number of candidates may run "
        "past the last one needed.",
    )
    lab.observe("large numbers without a proof", unproven, "==", 0)


def _random(rng: np.random.Generator, power: int, count: int) -> list[int]:
    return [int(n) for n in rng.integers(10**power, 2 * 10**power, size=count, endpoint=True)]


def _disagreements(numbers: list[int], quick: list[FactorSum], whole: list[FactorSum]) -> int:
    """Count the numbers where the batch, or a whole search, has not the layout of the quick one."""
    batch = factor_sum_batch(numbers)
    batched = zip(batch.a.tolist(), batch.b.tolist(), batch.c.tolist(), strict=True)
    layouts = [(best.a, best.b, best.c) for best in quick]
    searched = [(best.a, best.b, best.c) for best in whole]
    wrong = [one != two for one, two in zip(layouts, batched, strict=True)]
    for i, layout in enumerate(searched):
        wrong[i] |= layout != layouts[i]
    return sum(wrong)


def _candidates_figure(powers: tuple[int, ...], candidates: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    n = np.logspace(powers[0], powers[-1] + 0.3, 50)
    theory = {
        "square_root": (1 - 0.5**0.5) * n**0.5,
        "fourth_root": 2 * n**0.25 + 5,
        "adaptive": MEAN * n ** (1 / 6),
    }
    # The numbers at 10^d are uniform up to twice that; their middle stands for them.
    middle = 1.5 * 10.0 ** np.array(powers)
    for method, marker in zip(METHODS, "os^", strict=True):
        (line,) = axes.plot(middle, candidates[method], marker, label=NAMES[method])
        axes.plot(n, theory[method], "--", color=line.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="$N$", ylabel="candidates")
    axes.legend(frameon=False)
    return figure


def _excess_figure(excesses: dict[int, np.ndarray]) -> Figure:
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    density, tail = figure.subplots(1, 2)
    x = np.linspace(0, 5.5, 300)
    bins = np.linspace(0, 5, 31).tolist()
    for power, excess in excesses.items():
        label = f"$10^{{{power}}}$"
        density.hist(excess, bins, density=True, histtype="step", label=label)
        above = 1 - np.arange(excess.size) / excess.size
        tail.step(np.sort(excess), above, where="pre", label=label)
    density.plot(x, LAW.pdf(x), color="black", label="Weibull")
    tail.plot(x, LAW.sf(x), color="black", label="Weibull")
    density.set(xlabel="$E$", ylabel="density", xlim=(0, 5))
    least = 0.5 / max(excess.size for excess in excesses.values())
    tail.set(xlabel="$x$", ylabel="share with $E > x$", yscale="log", ylim=(least, 1.2))
    density.legend(frameon=False)
    return figure


def _sums_figure(smallest: np.ndarray, guess: np.ndarray) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    n = np.arange(len(smallest))
    lower = [0, *(isqrt(4 * int(k) - 1) + 1 for k in n[1:])]
    axes.plot(n, guess, linewidth=1, label="obvious guess")
    axes.plot(n, smallest, ".", markersize=3, label="$S(N)$")
    axes.plot(
        n, np.minimum(lower, n), color="black", linewidth=1, label=r"$\lceil 2\sqrt{N}\rceil$"
    )
    axes.set(xlabel="$N$", ylabel="sum")
    axes.legend(frameon=False)
    return figure
