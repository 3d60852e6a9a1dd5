r"""The angle between two random vectors.

"In high dimension, random vectors are almost orthogonal" is used everywhere: in initialisation,
random features, hashing, contrastive learning, in the hope that a network may store more features
than it has coordinates. The slogan does not say how large a cosine is still chance at $d = 768$,
how many directions fit below a cosine of 0.2, or whether a table of embeddings is as isotropic as
one would like. The exact law does.

## One vector may stand still

Let one of the two directions be uniform on the unit sphere of $\mathbb{R}^n$. Then the other may be
turned to the north pole, whatever it was, and the angle $\theta$ between them is the first
hyperspherical coordinate. The points of the sphere at angle $\theta$ form a sphere of one dimension
less and of radius $\sin\theta$, so

$$p_n(\theta) = C_n \sin^{n-2}\theta, \qquad
C_n = \frac{\Gamma(n/2)}{\Gamma\big(\tfrac{n-1}{2}\big)\sqrt{\pi}}, \qquad 0 \le \theta \le \pi.$$

With $\eta = \cos\theta$ and $d\eta = -\sin\theta\, d\theta$ one power of the sine is lost:

$$p_n(\eta) = C_n (1 - \eta^2)^{(n-3)/2}, \qquad -1 \le \eta \le 1,$$

which says that $(1+\eta)/2$ is a $\mathrm{Beta}\big(\tfrac{n-1}{2}, \tfrac{n-1}{2}\big)$ variable.
In the plane the angle is uniform; in space it is the cosine, as Archimedes knew of the sphere and
its cylinder; in four dimensions the cosine has Wigner's semicircle.

## How narrow it is

The characteristic function of $\theta - \pi/2$ is a ratio of gamma functions, because the Fourier
transform of a power of the cosine is one. Its logarithm gives all cumulants; the odd ones vanish,
and the even ones are polygammas:

$$\operatorname{Var}\theta = \tfrac12\psi'\!\big(\tfrac n2\big)
= \frac1n + \frac1{n^2} + O(n^{-3}), \qquad \kappa_4 = -\tfrac18\psi'''\!\big(\tfrac n2\big).$$

The article integrates the variance numerically; the closed form must give the same digits. Near the
right angle $\log\sin^{n-2}\theta \approx -\tfrac{n-2}{2}(\theta - \tfrac\pi2)^2$, so that
$N\big(\tfrac\pi2, \tfrac1{n-2}\big)$ is a fair picture of the bulk from $n \approx 10$ on. In the
tails, where one asks whether a cosine is chance, it is wrong at every $n$; there

$$P(|\eta| \ge t) = I_{1-t^2}\big(\tfrac{n-1}{2}, \tfrac12\big).$$

## Many vectors

The cosines of $N$ random directions are independent in pairs, though not all together, so the mean
square of all $N(N-1)/2$ of them has mean $1/n$ and a known variance, and its inverse may be called
the effective dimension. The largest is below $t$ with a probability close to
$P(|\eta|\le t)^{N(N-1)/2}$. A tail that falls like $e^{-nt^2/2}$ leaves room for exponentially many
directions: that is the superposition of features in one formula.

Three tests look at three departures from chance: the mean square (Bingham's test) at alignment with
some axes, the modified Rayleigh statistic at a preferred direction, the maximum at single pairs.
Passing one says nothing about the others.

## What is measured

First the law itself. Pairs of normal vectors must pass a Kolmogorov–Smirnov test against it in all
dimensions, and the normal approximation must fail where it should (at $d = 2$ its variance would be
infinite, so 1 is used there as at $d = 3$). Isotropy is all that the derivation used, so vectors
without it must fail: for coordinates uniform on $[0,1]$ the cosine tends to
$E[u]^2/E[u^2] = 3/4$, an angle of $41.41°$ and not of $90°$.

Then real vectors: the handwritten digits as they are, centred, and whitened; the rows of two layers
as PyTorch initialises them; and 128-dimensional word vectors made from the English prose at hand.
Fresh layers must pass all three tests, raw digits fail all three, and centring, the cheapest cure,
must raise the effective dimension of the digits at least fourfold.

The reader should see word vectors whose effective dimension is nearly the full 128 and which are
nevertheless rejected: close to orthogonal on average, and provably not isotropic.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import integrate, stats
from scipy.sparse.linalg import svds

from kexue.lab import DataError, Lab, seeded
from kexue.stats.angles import RandomAngle, max_vectors, orthogonality_test

DIMENSIONS = (2, 3, 10, 100, 1000)
ARTICLE_VARIANCES = {
    3: 0.467401,
    10: 0.110661,
    20: 0.0525832,
    50: 0.0204053,
    100: 0.0101007,
    200: 0.00502508,
    1000: 0.001001,
}
CUBE_ANGLE = 41.41
METHODS = ("mean_square", "max", "rayleigh")
WORDS, WORDS_CENTRED = "word vectors", "word vectors, centred"
DIGITS, CENTRED, WHITENED = "digits, raw", "digits, centred", "digits, whitened"
LINEAR, EMBEDDING = "Linear(512, 512)", "Embedding(2000, 256)"


def run(lab: Lab) -> None:
    """Measure the law on random pairs, then what real vectors make of it."""
    _variances(lab)
    _random_pairs(lab)
    _real_vectors(lab)
    _capacity(lab)


def _variances(lab: Lab) -> None:
    rows = []
    for n, article in ARTICLE_VARIANCES.items():
        law = RandomAngle(n)
        # The integrand of a narrow peak must be found before it can be integrated.
        ends = math.pi / 2 + np.array([-12, 12]) * min(law.std(), math.pi / 24)
        integral, _ = integrate.quad(
            lambda x, law=law: (x - math.pi / 2) ** 2 * law.pdf(x), *ends, epsabs=0, epsrel=1e-11
        )
        rows.append({
            "$n$": n,
            "article": f"{article:.6g}",
            r"$\frac12\psi'(n/2)$": f"{law.var():.10g}",
            "by integration": f"{integral:.10g}",
            r"$1/(n-2)$": f"{1 / (n - 2):.6g}",
        })  # fmt: skip
    lab.table("Variance of the angle", rows, "In square radians.")
    agreeing = sum(
        float(f"{RandomAngle(n).var():.6g}") == article for n, article in ARTICLE_VARIANCES.items()
    )
    lab.claim(
        "entries of the article's variance table that the closed form gives to six digits",
        agreeing,
        "==",
        len(ARTICLE_VARIANCES),
    )


def _random_pairs(lab: Lab) -> None:
    n_pairs = lab.pick(smoke=200, quick=5000, full=50_000)
    generator = lab.generator()
    normal_p, approximate_p, cube_p = {}, {}, {}
    rows = []
    angles = {}
    for d in lab.progress(DIMENSIONS, "random pairs"):
        normal = _pair_angles(torch.randn, n_pairs, d, generator)
        cube = _pair_angles(torch.rand, n_pairs, d, generator)
        angles[d] = normal
        law = RandomAngle(d)
        bell = stats.norm(math.pi / 2, 1 / math.sqrt(max(d - 2, 1)))
        normal_p[d] = stats.kstest(normal, law.cdf).pvalue
        approximate_p[d] = stats.kstest(normal, bell.cdf).pvalue
        cube_p[d] = stats.kstest(cube, law.cdf).pvalue
        cube_mean = math.degrees(cube.mean())
        rows.append({
            "$d$": d,
            "mean": math.degrees(normal.mean()),
            "$p$, exact law": normal_p[d],
            "$p$, bell curve": approximate_p[d],
            "cube: mean": cube_mean,
            "cube: $p$": cube_p[d],
        })  # fmt: skip
    lab.table(
        "Random pairs against the law",
        rows,
        f"{n_pairs} normal pairs in each dimension: mean angle in degrees, $p$-values of "
        "Kolmogorov–Smirnov tests against the exact law and the normal approximation. Cube: "
        "coordinates uniform on $[0, 1]$, tested against the exact law.",
    )
    lab.figure(
        "densities",
        _densities(angles, cube),
        "Histograms of the angles of normal pairs, and the exact density (line). In the last panel "
        "pairs from the cube $[0,1]^{1000}$: a narrow peak, far from the right angle.",
    )
    lab.claim(
        "smallest KS p-value of normal pairs against the exact law, five dimensions",
        min(normal_p.values()),
        ">=",
        0.001,
    )
    lab.claim(
        "largest KS p-value of the normal approximation at $d = 2, 3$",
        max(approximate_p[2], approximate_p[3]),
        "<",
        1e-6,
    )
    lab.claim(
        r"largest KS p-value of pairs from the cube at $d \ge 3$",
        max(p for d, p in cube_p.items() if d >= 3),
        "<",
        1e-6,
    )
    lab.claim(
        rf"distance of the cube's mean angle at $d = 1000$ from {CUBE_ANGLE}°, in degrees",
        abs(cube_mean - CUBE_ANGLE),
        "<=",
        0.2,
    )


def _real_vectors(lab: Lab) -> None:
    sets = _vector_sets(lab)
    summaries, pvalues, rows = {}, {}, []
    for name in lab.progress(sets, "real vectors"):
        results = {method: orthogonality_test(sets[name], method=method) for method in METHODS}
        summary = summaries[name] = results["mean_square"].summary
        pvalues[name] = {method: result.pvalue for method, result in results.items()}
        rows.append({
            "vectors": name,
            "$N$": summary.n_vectors,
            "$d$": summary.dimension,
            "rms cosine": math.sqrt(summary.mean_square),
            r"$1/\sqrt d$": 1 / math.sqrt(summary.dimension),
            "effective $d$": summary.effective_dimension,
            r"max $|\cos|$": summary.max_abs,
        })  # fmt: skip
    lab.table(
        "Real vectors",
        rows,
        "All pairs of $N$ vectors in $d$ dimensions. Pixels that never change are left out.",
    )
    lab.table(
        "Are they random directions?",
        [
            {
                "vectors": name,
                "$p$, mean square": p["mean_square"],
                "$p$, Rayleigh": p["rayleigh"],
                "$p$, maximum": p["max"],
            }
            for name, p in pvalues.items()
        ],
        "One-sided: small where vectors share axes, a direction, or a close pair.",
    )
    lab.figure(
        "real-vectors",
        # Centred word vectors look like word vectors.
        _angle_histograms({name: sets[name] for name in sets if name != WORDS_CENTRED}),
        "Angles of all pairs, and the law of random directions (line). Raw digits share a "
        "direction; centring takes it away, whitening most of what is left.",
    )
    lab.claim(
        "smallest p-value of both default layers in three tests",
        min(p for name in (LINEAR, EMBEDDING) for p in pvalues[name].values()),
        ">=",
        0.001,
    )
    lab.claim(
        "largest p-value of raw digits in three tests", max(pvalues[DIGITS].values()), "<", 0.001
    )
    lab.claim(
        "centring multiplies the effective dimension of the digits by",
        summaries[CENTRED].effective_dimension / summaries[DIGITS].effective_dimension,
        ">=",
        4.0,
    )
    words = summaries[WORDS]
    lab.observe(
        "share of their dimension that word vectors use",
        words.effective_dimension / words.dimension,
        ">",
        0.9,
    )
    lab.observe(
        "p-value of word vectors, mean square: not isotropic all the same",
        pvalues[WORDS]["mean_square"],
        "<",
        1e-10,
    )


def _capacity(lab: Lab) -> None:
    cosines = (0.1, 0.2, 0.3)
    dimensions = np.unique(np.geomspace(8, 4096, 60).astype(int))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for t in cosines:
        axes.loglog(
            dimensions,
            [max_vectors(int(d), max_cosine=t) for d in dimensions],
            label=f"cosine below {t}",
        )
    axes.loglog(dimensions, dimensions, linestyle=":", color="black", label="$N = d$")
    axes.set(xlabel="dimension $d$", ylabel="number of random directions $N$", ylim=(1, 1e12))
    axes.legend()
    lab.figure(
        "capacity",
        figure,
        "How many random directions fit below a cosine, all pairs at once, with probability one "
        "half. Above the dotted line there are more of them than dimensions.",
    )
    lab.table(
        "Random directions that fit",
        [
            {"$d$": d, **{rf"$|\cos| \le {t}$": max_vectors(d, max_cosine=t) for t in cosines}}
            for d in (64, 128, 256, 768, 1024, 4096)
        ],
        r"Largest $N$ with $\frac{N(N-1)}2 P(|\eta| > t) \le \frac12$.",
    )


def _pair_angles(
    draw: Callable[..., torch.Tensor], n_pairs: int, d: int, generator: torch.Generator
) -> np.ndarray:
    """Angles of independent pairs, a few thousand at a time."""
    angles = []
    for start in range(0, n_pairs, 5000):
        shape = (min(5000, n_pairs - start), d)
        u, v = (draw(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        cosine = torch.cosine_similarity(u, v, dim=1, eps=0.0).clamp(-1, 1)
        angles.append(torch.arccos(cosine))
    return torch.cat(angles).numpy()


def _vector_sets(lab: Lab) -> dict[str, np.ndarray]:
    """The sets by name, in the order of the table."""
    digits = lab.data.tabular("digits").features
    digits = digits[:, digits.std(axis=0) > 0]
    centred = digits - digits.mean(axis=0)
    left, _, right = np.linalg.svd(centred, full_matrices=False)
    with seeded(lab.seed):
        linear = torch.nn.Linear(512, 512).weight.detach().numpy()
        embedding = torch.nn.Embedding(2000, 256).weight.detach().numpy()
    words = _word_vectors(lab.data.prose(), n_words=lab.pick(smoke=500, quick=2000, full=2000))
    sets = {
        DIGITS: digits,
        CENTRED: centred,
        WHITENED: left @ right,
        LINEAR: linear,
        EMBEDDING: embedding,
        WORDS: words,
        WORDS_CENTRED: words - words.mean(axis=0),
    }
    matrix = lab.data.matrix()
    if matrix is not None:
        matrix = _with_a_direction(matrix)
        if min(matrix.shape) < 2:
            raise DataError(
                "expected a matrix with at least two columns and two rows that are not zero, "
                f"got {matrix.shape[0]} such rows and {matrix.shape[1]} columns"
            )
        sets["your vectors"] = matrix
        sets["your vectors, centred"] = _with_a_direction(matrix - matrix.mean(axis=0))
    return sets


def _with_a_direction(rows: np.ndarray) -> np.ndarray:
    return rows[np.any(rows != 0, axis=1)]


def _word_vectors(text: str, *, n_words: int, size: int = 128, window: int = 4) -> np.ndarray:
    """Vectors of the commonest words: positive PMI of neighbours, truncated SVD."""
    tokens = re.findall("[a-z]+", text.lower())
    commonest = [word for word, _ in collections.Counter(tokens).most_common(n_words)]
    number = {word: i for i, word in enumerate(commonest)}
    ids = np.array([number.get(token, -1) for token in tokens])
    together = np.zeros((len(commonest), len(commonest)))
    for distance in range(1, window + 1):
        here, there = ids[:-distance], ids[distance:]
        known = (here >= 0) & (there >= 0)
        np.add.at(together, (here[known], there[known]), 1.0)
    together += together.T
    count = together.sum(axis=1)
    by_chance = np.outer(count, count) / count.sum()
    information = np.log(np.maximum(together / np.maximum(by_chance, 1e-300), 1.0))
    left, strength, _ = svds(information, k=size, v0=np.ones(len(commonest)))
    vectors = left * np.sqrt(strength)
    return vectors[np.linalg.norm(vectors, axis=1) > 1e-9]


def _densities(angles: dict[int, np.ndarray], cube: np.ndarray) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (d, sample) in zip(panels, angles.items(), strict=False):
        _histogram_and_law(axes, sample, d, f"$d = {d}$")
    _histogram_and_law(panels[-1], cube, max(angles), f"cube, $d = {max(angles)}$")
    return figure


def _angle_histograms(sets: dict[str, np.ndarray]) -> Figure:
    n_rows = math.ceil(len(sets) / 3)
    figure = Figure(figsize=(7.2, 2.1 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, 3).ravel()
    for axes in panels[len(sets) :]:
        axes.set_axis_off()
    for axes, (name, vectors) in zip(panels, sets.items(), strict=False):
        vectors = vectors[:: math.ceil(len(vectors) / 2000)]
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = np.clip((unit @ unit.T)[np.triu_indices(len(unit), 1)], -1, 1)
        _histogram_and_law(axes, np.arccos(cosines), vectors.shape[1], name)
    return figure


def _histogram_and_law(axes: Axes, angles: np.ndarray, d: int, name: str) -> None:
    law = RandomAngle(d)
    # A few pairs in a far tail would squeeze everything else into a line.
    low, high = np.quantile(angles, [1e-3, 1 - 1e-3])
    ends = min(law.ppf(1e-5), low), max(law.isf(1e-5), high)
    grid = np.linspace(*ends, 400)
    counts, edges = np.histogram(angles, bins=60, range=ends)
    density = counts / (len(angles) * np.degrees(np.diff(edges)))
    axes.stairs(density, np.degrees(edges), fill=True, alpha=0.5)
    axes.plot(np.degrees(grid), law.pdf(grid) * math.pi / 180, color="black", linewidth=1.2)
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel("angle in degrees")
    axes.set_yticks([])
