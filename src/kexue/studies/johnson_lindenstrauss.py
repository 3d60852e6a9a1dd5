r"""The Johnson–Lindenstrauss lemma.

Take $N$ vectors of any dimension, a million if you like. A random linear map into some hundred
dimensions, drawn without a look at the vectors, keeps all their distances at once, up to a few
parts in ten. How many dimensions does that take? The lemma says $O(\log N)$. Whoever wants to use
it needs the constant, the probability that it goes wrong, and a map that is quick to apply. And a
warning: not every quick map keeps the promise.

## The length of one vector

Let $u \in \mathbb{R}^n$ have independent entries $N(0, 1/n)$, so that $E\|u\|^2 = 1$. For any
$\lambda > 0$, Markov's inequality for $e^{\lambda\|u\|^2}$ gives

$$\begin{aligned}P(\|u\|^2 \ge 1+\varepsilon)
&\le e^{-\lambda(1+\varepsilon)}\, E e^{\lambda\|u\|^2} \\
&= e^{-\lambda(1+\varepsilon)} \Big(\frac{n}{n-2\lambda}\Big)^{n/2},\end{aligned}$$

and the best choice, $\lambda = \frac{n\varepsilon}{2(1+\varepsilon)}$, turns the right side into
$e^{\frac n2(\log(1+\varepsilon)-\varepsilon)}$. The lower tail yields
$e^{\frac n2(\log(1-\varepsilon)+\varepsilon)}$, which is smaller. As
$\log(1+\varepsilon) \le \varepsilon - \varepsilon^2/4$ on $(0,1)$, both together are

$$P\big(|\|u\|^2 - 1| \ge \varepsilon\big) \le 2 e^{-\varepsilon^2 n/8}.$$

Three steps down from the truth, for $n\|u\|^2$ simply has the $\chi^2_n$ law. We write
$p_n(\varepsilon)$ for whichever is used: the exact tail, Chernoff's bound, that of Dasgupta and
Gupta, $2e^{-\frac n2(\varepsilon^2/2-\varepsilon^3/3)}$, or the article's.

## All distances at once

Let $A$ be $n \times m$ with entries $N(0, 1/n)$. For a pair of points,
$A(x_i-x_j)/\|x_i-x_j\|$ is such a $u$, whatever $m$ is and whatever the points are. There are
$N(N-1)/2$ pairs, and the chance that one of them fails is at most the sum of their chances:

$$P(\text{some pair fails}) \le \frac{N(N-1)}{2}\, p_n(\varepsilon).$$

With the article's $p_n$, any $n > \frac{24\log N}{\varepsilon^2}$ keeps

$$(1-\varepsilon)\|x_i-x_j\|^2 \le \|Ax_i-Ax_j\|^2 \le (1+\varepsilon)\|x_i-x_j\|^2$$

for all pairs with a probability above $1 - 1/N$. Inner products follow from
$4\langle Ax, Ay\rangle = \|A(x+y)\|^2 - \|A(x-y)\|^2$, at twice as many events and with an error of
$\varepsilon\|x\|\|y\|$: an absolute one, so that a small inner product may change its sign.

## Maps that are quick

A dense normal matrix costs $nm$ random numbers and $Nnm$ multiplications. Signs $\pm 1/\sqrt{ns}$
with a share $s$ of non-zeros cost $s$ times that; at $s \ge \frac13$ they obey the same Chernoff
bound, and $s = 1/\sqrt m$ is known as very sparse. The subsampled randomised Hadamard transform
(SRHT), $A = \sqrt{m'/n}\,SHD$, changes signs at random ($D$), mixes all coordinates ($H$, in
$O(m'\log m')$), and keeps $n$ of the $m'$ coordinates ($S$). It stores no matrix at all.

Nothing protects a sparse map on peaked data. The image of a one-hot vector is a single column of
$A$, whose squared length is a binomial count over $ns$: with $ns = 10$ non-zeros expected, errors
of one half are common, and $\varepsilon$ does not care about the average.

## What is measured

First the logarithm. For $N$ one-hot points we look for the smallest $n$ at which at least half of
the seeds keep all distances within $\varepsilon = 0.5$, and lay a line through it against
$\log N$; if the lemma is the whole story, then $R^2 \ge 0.97$. The union bound with the exact tail
at $\delta = \frac12$ must be close from above (a factor between 0.9 and 1.5), and the article's
dimension 2.5 to 6 times too large. Then the claim that the dimension $m$ of the points does not
matter: the largest error at $m = 300$, $3000$ and $30\,000$ must vary by less than 35 percent.
Finally real vectors, the TF-IDF vectors of paragraphs of English prose: at the dimension of the
exact bound, normal entries and the SRHT must keep every distance in each of five seeds.

Very sparse maps, on the same text and on one-hot vectors, are reported beside the verdict. We
expect them to fail; the default density of the usual library is exactly this one, and so is its
dimension, which holds for normal entries.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from matplotlib.figure import Figure
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.feature_extraction.text import TfidfVectorizer

from kexue.lab import Lab
from kexue.stats.projection import (
    GaussianRandomProjection,
    HadamardRandomProjection,
    SparseRandomProjection,
    distortion,
    johnson_lindenstrauss_min_dim,
)

EPS = 0.5
NORMAL, SRHT, VERY_SPARSE = "normal entries", "SRHT", "very sparse"
THIRD, SIGNS = "density 1/3", "density 1"
MAPS: dict[str, Callable[..., Any]] = {
    NORMAL: GaussianRandomProjection,
    SRHT: HadamardRandomProjection,
    VERY_SPARSE: SparseRandomProjection,
    THIRD: lambda n, random_state: SparseRandomProjection(
        n, density=1 / 3, random_state=random_state
    ),
    SIGNS: lambda n, random_state: SparseRandomProjection(n, density=1, random_state=random_state),
}


def run(lab: Lab) -> None:
    _needed_dimension(lab)
    _original_dimension(lab)
    _text(lab)
    _one_hot(lab)
    _users_data(lab)
    _times(lab)


def _needed_dimension(lab: Lab) -> None:
    powers = lab.pick(smoke=range(4, 7), quick=range(4, 10), full=range(4, 11))
    seeds = lab.pick(smoke=3, quick=12, full=12)
    samples = np.array([2**power for power in powers])
    needed = np.array([_smallest(N, seeds, lab.seed) for N in lab.progress(samples, "needed n")])
    exact = _dimensions(samples, failure_probability=0.5)
    article = 24 * np.log(samples) / EPS**2
    slope, intercept, correlation, *_ = stats.linregress(np.log(samples), needed)

    lab.table(
        "How many dimensions N points need",
        [
            {
                "$N$": int(N),
                "needed $n$": int(n),
                r"exact, $\delta = \frac12$": int(bound),
                "exact / needed": bound / n,
                r"$24\log N/\varepsilon^2$": math.ceil(theirs),
                "article / needed": theirs / n,
            }
            for N, n, bound, theirs in zip(samples, needed, exact, article, strict=True)
        ],
        rf"One-hot points, $\varepsilon = {EPS}$: the smallest $n$ at which at least half of "
        f"{seeds} seeds keep all distances.",
    )
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for bound in ("article", "dasgupta-gupta", "chernoff", "exact"):
        n = _dimensions(samples, failure_probability=0.5, bound=bound)
        axes.semilogx(samples, n, label=f"{bound} bound")
    axes.semilogx(samples, needed, "o", color="black", label="needed")
    axes.semilogx(
        samples, intercept + slope * np.log(samples), ":", color="black", label="line through it"
    )
    axes.set_xticks([], minor=True)
    axes.set_xticks(samples, [str(N) for N in samples])
    axes.set(xlabel="number of points $N$", ylabel="dimension $n$", ylim=(0, None))
    axes.legend()
    lab.figure(
        "needed-dimension",
        figure,
        r"Needed dimension against $\log N$, and four bounds at the same $\delta = \frac12$. A "
        f"line with slope {slope:.1f} goes through the points; the exact bound stays just above.",
    )
    lab.claim(r"$R^2$ of the needed $n$ on $\log N$", correlation**2, ">=", 0.97)
    lab.claim("exact bound over needed $n$, largest", (exact / needed).max(), "<=", 1.5)
    lab.claim("exact bound over needed $n$, smallest", (exact / needed).min(), ">=", 0.9)
    lab.claim(r"$24\log N/\varepsilon^2$ over needed $n$, smallest",
              (article / needed).min(), ">=", 2.5)  # fmt: skip
    lab.claim(r"$24\log N/\varepsilon^2$ over needed $n$, largest",
              (article / needed).max(), "<=", 6.0)  # fmt: skip


def _original_dimension(lab: Lab) -> None:
    n, N = 200, 256
    dimensions = lab.pick(smoke=(300, 1000), quick=(300, 3000, 30_000), full=(300, 3000, 30_000))
    seeds = lab.pick(smoke=1, quick=3, full=12)
    names = (NORMAL, VERY_SPARSE, SRHT)
    largest: dict[str, list[float]] = {name: [] for name in names}
    for m in lab.progress(dimensions, "original dimension"):
        X = np.random.default_rng([lab.seed, m]).standard_normal((N, m), dtype=np.float32)
        for name in names:
            errors = [
                distortion(X, MAPS[name](n, random_state=lab.seed + seed).fit_transform(X))
                for seed in range(seeds)
            ]
            largest[name].append(float(np.mean([e.max_distance_error for e in errors])))
    lab.table(
        "The dimension of the points does not matter",
        [
            {"$m$": m, **{name: largest[name][i] for name in names}}
            for i, m in enumerate(dimensions)
        ],
        f"Largest error of a squared distance among {N} normal points in $m$ dimensions, projected "
        f"to $n = {n}$; mean over {seeds} seeds. At $m = 300$ the SRHT keeps most of its 512 "
        "coordinates and is better than the others for that reason.",
    )
    for name in (NORMAL, VERY_SPARSE):
        lab.claim(
            f"{name}: by what share the largest error varies with $m$",
            max(largest[name]) / min(largest[name]) - 1,
            "<",
            0.35,
        )


def _text(lab: Lab) -> None:
    paragraphs = re.split(r"\n\s*\n", lab.data.prose())
    long = [paragraph for paragraph in paragraphs if len(paragraph) > 200]
    X = TfidfVectorizer(min_df=2).fit_transform(long)
    X = X[np.diff(X.indptr) > 0]
    seeds = lab.pick(smoke=1, quick=5, full=5)
    results = _compare(lab, X, (NORMAL, SRHT, VERY_SPARSE, THIRD), seeds, "text")
    n = int(_dimensions(X.shape[0], failure_probability=0.01))
    article = int(_dimensions(X.shape[0], failure_probability=0.01, bound="article"))
    lab.table(
        "Text",
        _rows(results),
        f"TF-IDF vectors of {X.shape[0]} paragraphs, {X.shape[1]} words, projected to $n = {n}$, "
        rf"the exact dimension for $\varepsilon = {EPS}$ and $\delta = 0.01$ (the article's bound: "
        f"{article}). Smallest and largest maximum among {seeds} seeds; inner products in units of "
        "the lengths.",
    )
    lab.figure(
        "pair-errors",
        _histograms(X, n, lab.seed),
        r"Squared distances after the projection over those before, all pairs of paragraphs. "
        r"The line is the density of $\chi^2_n/n$; the dotted lines are $1 \pm \varepsilon$.",
    )
    for name in (NORMAL, SRHT):
        kept = sum(error <= EPS for error, _ in results[name])
        lab.claim(rf"{name}: seeds that keep $\varepsilon = {EPS}$ on text", kept, "==", seeds)
    lab.observe(
        "very sparse: largest error of a squared distance on text",
        max(error for error, _ in results[VERY_SPARSE]),
        ">",
        EPS,
    )


def _one_hot(lab: Lab) -> None:
    n, m = 300, 1000
    seeds = lab.pick(smoke=1, quick=3, full=12)
    X = sp.csr_array(np.eye(256, m))
    results = _compare(lab, X, tuple(MAPS), seeds, "one-hot", n)
    lab.table(
        "One-hot vectors",
        _rows(results),
        f"256 one-hot vectors in $m = {m}$ dimensions, projected to $n = {n}$; smallest and "
        f"largest maximum among {seeds} seeds. A very sparse column has about "
        f"{n / math.sqrt(m):.1f} non-zeros.",
    )
    lab.observe(
        "very sparse: largest error of a squared distance on one-hot vectors",
        max(error for error, _ in results[VERY_SPARSE]),
        ">",
        EPS,
    )


def _users_data(lab: Lab) -> None:
    X = lab.data.matrix()
    if X is None or len(X) < 2:
        return
    rng = np.random.default_rng(lab.seed)
    X = X[np.sort(rng.permutation(len(X))[:2000])]
    n = int(_dimensions(len(X), failure_probability=0.01))
    if n > X.shape[1]:
        n = max(1, X.shape[1] // 2)
    results = _compare(lab, X, (NORMAL, SRHT, VERY_SPARSE, THIRD), 3, "your data", n)
    lab.table(
        "Your data",
        _rows(results),
        f"{len(X)} rows of {X.shape[1]} columns, projected to $n = {n}$: the exact dimension for "
        rf"$\varepsilon = {EPS}$ and $\delta = 0.01$, or half of the columns where that is more "
        "than there are.",
    )


def _times(lab: Lab) -> None:
    N, n = 256, 200
    largest = lab.pick(smoke=10, quick=14, full=16)
    dimensions = [2**power for power in range(8, largest + 1)]
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    names = (NORMAL, THIRD, VERY_SPARSE, SRHT)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for m in lab.progress(dimensions, "times"):
        X = np.random.default_rng([lab.seed, m]).standard_normal((N, m), dtype=np.float32)
        for name in names:
            seconds[name].append(min(_seconds(name, n, X) for _ in range(3)))
    for name in names:
        axes.loglog(dimensions, [1e3 * s for s in seconds[name]], label=name)
    axes.set(xlabel="dimension of the points $m$", ylabel="fit and transform, ms")
    axes.legend()
    lab.figure(
        "times",
        figure,
        f"Time to draw a map and project {N} points to {n} dimensions, single precision, on this "
        "machine.",
    )


def _smallest(N: int, seeds: int, first_seed: int) -> int:
    """The smallest n, by bisection, at which half of the seeds keep all distances."""
    points = np.eye(N)

    def enough(n: int) -> bool:
        kept = 0
        for seed in range(first_seed, first_seed + seeds):
            Z = GaussianRandomProjection(n, random_state=seed).fit_transform(points)
            kept += distortion(points, Z).max_distance_error <= EPS
        return 2 * kept >= seeds

    low, high = 1, 2 * int(_dimensions(N, failure_probability=0.5))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _dimensions(samples: Any, **options: Any) -> Any:
    return johnson_lindenstrauss_min_dim(samples, eps=EPS, **options)


def _compare(
    lab: Lab, X: Any, names: tuple[str, ...], seeds: int, label: str, n: int | None = None
) -> dict[str, list[tuple[float, float]]]:
    """For each map and seed the largest errors of distances and of inner products."""
    if n is None:
        n = int(_dimensions(X.shape[0], failure_probability=0.01))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in lab.progress(names, label):
        for seed in range(lab.seed, lab.seed + seeds):
            errors = distortion(X, MAPS[name](n, random_state=seed).fit_transform(X))
            results[name].append((errors.max_distance_error, errors.max_inner_product_error))
    return results


def _rows(results: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "map": name,
            "distance, best seed": min(distance for distance, _ in errors),
            "distance, worst seed": max(distance for distance, _ in errors),
            "inner product, best": min(inner for _, inner in errors),
            "inner product, worst": max(inner for _, inner in errors),
        }
        for name, errors in results.items()
    ]


def _histograms(X: Any, n: int, seed: int) -> Figure:
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    before = pdist(X.toarray(), "sqeuclidean")
    # Duplicate paragraphs have no ratio.
    different = before > 1e-12
    grid = np.linspace(0.3, 1.8, 300)
    for axes, name in zip(panels, (NORMAL, SRHT, VERY_SPARSE), strict=True):
        Z = MAPS[name](n, random_state=seed).fit_transform(X)
        ratio = pdist(Z, "sqeuclidean")[different] / before[different]
        counts, edges = np.histogram(ratio, bins=80, range=(0.3, 1.8))
        density = counts / (len(ratio) * np.diff(edges))
        axes.stairs(density, edges, fill=True, alpha=0.5)
        axes.plot(grid, n * stats.chi2.pdf(n * grid, n), color="black", linewidth=1.2)
        for end in (1 - EPS, 1 + EPS):
            axes.axvline(end, color="black", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("after / before")
        axes.set_yticks([])
    return figure


def _seconds(name: str, n: int, X: np.ndarray) -> float:
    start = time.perf_counter()
    MAPS[name](n, random_state=0).fit_transform(X)
    return time.perf_counter() - start
