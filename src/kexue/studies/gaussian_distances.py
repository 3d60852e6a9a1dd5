r"""Distances between two normal distributions.

A normal distribution is a mean and a covariance, and so every distance between two of them is a
formula. Autoencoders use one of these formulas as their loss, generative models are ranked by
another, classifiers are bounded by a third. Which of them tells what? And can the formulas be
trusted where they are needed most, between two laws that are nearly the same?

## Three formulas

Let $p_i = N(\mu_i, \Sigma_i)$ on $\mathbb{R}^d$, $\Delta = \mu_1 - \mu_2$ and
$\bar\Sigma = (\Sigma_1 + \Sigma_2)/2$. The quadratic form of $p_2$ has a mean under $p_1$,

$$E_{p_1}\big[(x-\mu_2)^\top \Sigma_2^{-1}(x-\mu_2)\big] = \Delta^\top\Sigma_2^{-1}\Delta +
\operatorname{tr}\Sigma_2^{-1}\Sigma_1,$$

and the normalisers bring logarithms of determinants:

$$\mathrm{KL}(p_1\|p_2) = \tfrac12\Big[\operatorname{tr}\Sigma_2^{-1}\Sigma_1 - d
- \log\det\Sigma_2^{-1}\Sigma_1 + \Delta^\top\Sigma_2^{-1}\Delta\Big].$$

The product $\sqrt{p_1p_2}$ is a normal density but for its constant, with the precision
$(\Sigma_1^{-1}+\Sigma_2^{-1})/2$. Completing the square, with
$\Sigma_1(\Sigma_1+\Sigma_2)^{-1}\Sigma_2$ as half of the matching covariance, leaves the
Bhattacharyya distance

$$D_B = -\log\int\!\sqrt{p_1p_2} = \tfrac18\Delta^\top\bar\Sigma^{-1}\Delta
+ \tfrac12\log\frac{\det\bar\Sigma}{\sqrt{\det\Sigma_1\det\Sigma_2}}.$$

For the third, couple the two: with a cross-covariance $C$,
$E\|x-y\|^2 = \|\Delta\|^2 + \operatorname{tr}\Sigma_1 + \operatorname{tr}\Sigma_2 -
2\operatorname{tr}C$. All $C$ that make a joint covariance are $L_1KL_2^\top$ with $\|K\|\le1$,
where $L_iL_i^\top=\Sigma_i$, and the largest trace is a sum of singular values, the nuclear norm:

$$W_2^2 = \|\Delta\|^2 + \|L_1\|_F^2 + \|L_2\|_F^2 - 2\|L_2^\top L_1\|_*.$$

The best coupling is a linear map $T(x) = A(x-\mu_1)+\mu_2$ with a symmetric $A$ and
$A\Sigma_1A=\Sigma_2$.

## What each of them sees

KL and $D_B$ do not change when both laws pass through an invertible linear map; they ask how well
samples can be told apart, and become infinite where one law is flat and the other is not. $D_B$
bounds what any classifier can do: with the frequencies $\pi_1, \pi_2$ its error is
$\int\min(\pi_1p_1,\pi_2p_2) \le \sqrt{\pi_1\pi_2}\,e^{-D_B}$, because the smaller of two numbers is
at most their geometric mean. $W_2$ asks how far mass has to travel. It is measured in the units of
$x$, finite for flat laws too, and knows nothing of how easily directions are told apart.

## Formulas that do not cancel

Each of the three is a difference of large numbers where the laws nearly agree. Subtracting
them costs twice as many digits as the laws have in common: at a relative change of $10^{-8}$
nothing is left of a double. But each is also a sum of terms that are never negative. With the
Cholesky factors $L_i$, $N = L_2^{-1}L_1 - 1$ and $r_i = N_{ii}$,

$$\mathrm{KL} = \tfrac12\|N\|_F^2 + \sum_i\big(r_i - \log(1+r_i)\big)
+ \tfrac12\|L_2^{-1}\Delta\|^2,$$

$$D_B = \tfrac18\Delta^\top\bar\Sigma^{-1}\Delta - \tfrac14\sum_i\log(1-x_i^2), \qquad
W_2^2 = \|\Delta\|^2 + \min_{U^\top U=1}\|L_1 - L_2U\|_F^2,$$

where $x_i$ are the eigenvalues of $\bar\Sigma^{-1}(\Sigma_1-\Sigma_2)/2$. The last is orthogonal
Procrustes, and its $U$ comes from one singular value decomposition. As $U$ is at a minimum it
counts as constant for the gradient, $\partial W_2^2/\partial\Sigma_1 = 1 - A$. The digits that
remain are those of $L_1 - L_2$, or, for $D_B$, of $\Sigma_1 - \Sigma_2$ itself: all of them.

## What is measured

The ten classes of handwritten digits, in eight principal components, give ten normal laws and 45
pairs of them.

Draws from the laws must reproduce the closed forms. KL is the mean of $\log p_1 - \log p_2$
under $p_1$. Under the equal mixture, $e^{-D_B}$ is the mean of
$\operatorname{sech}\big(\tfrac12\log\tfrac{p_1}{p_2}\big)$; beyond $D_B = 5$ it rests on draws that
are too rare for a standard error to mean anything. At least 95 of 100 values must lie
within three standard errors.

Then each pair of classes is handed to a classifier that fits two normal laws (quadratic
discriminant analysis, five folds). Its error must fall with $D_B$, no worse than with $W_2$, and
stay within the bound but for three standard errors. Real digits are not normal, so this could fail:
where two classes are so far apart that the bound is $10^{-5}$, a single error in 360 samples is
more than normal tails allow. One error is also within its own standard error of none; a stricter
reading takes the standard error at the bound, and is reported beside the claim.

The map must move the digits of one class, as they are, to mean and covariance of the other, at the
cost $W_2^2$. Finally all 64 pixels: a class then has more dimensions than its covariance has rank,
so KL and $D_B$ have to be refused, and $W_2$ has to stay finite.

The reader should see that $W_2$, by which generative models are ranked, is the worst guide of the
three to whether two classes can be told apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import scale

from kexue.lab import DataError, Lab
from kexue.stats.gaussian import (
    GaussianParameters,
    bhattacharyya_distance,
    fit_gaussian,
    kl_divergence,
    optimal_transport_map,
    pairwise_distance,
    wasserstein_distance,
)

COMPONENTS = 8
FOLDS = 5
RARE = 5.0
"""Bhattacharyya distance beyond which simulation rests on a handful of draws."""
MOST_CLASSES = 10


@dataclass(frozen=True)
class Classes:
    """Samples of each class, in principal components and as they came."""

    names: list[str]
    samples: list[np.ndarray]
    raw: list[np.ndarray]
    laws: list[GaussianParameters]
    pca: PCA
    pairs: list[tuple[int, int]]

    @property
    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        means = np.stack([law.mean for law in self.laws])
        return means, np.stack([law.covariance for law in self.laws])


def run(lab: Lab) -> None:
    """Closed forms against simulation, classifiers, moved digits, and flat laws."""
    classes = _classes(lab)
    distances = {
        "KL": pairwise_distance(*classes.parameters, metric="kl"),
        "$D_B$": pairwise_distance(*classes.parameters, metric="bhattacharyya"),
        "$W_2$": pairwise_distance(*classes.parameters),
    }
    lab.figure(
        "distances",
        _heat_maps(classes, distances),
        r"The three distances between all classes. KL is read from row to column and is not "
        r"symmetric; a Wasserstein distance has the units of the features.",
    )
    _simulation(lab, classes, distances)
    _classifiers(lab, classes, distances)
    _moved(lab, classes)
    _flat(lab, classes)
    _nearly_equal(lab)


def _classes(lab: Lab) -> Classes:
    table = lab.data.tabular("digits") if lab.data.path is None else lab.data.tabular()
    labels, counts = np.unique(table.target, return_counts=True)
    labels = labels[counts > COMPONENTS * 2][:MOST_CLASSES]
    if len(labels) < 3 or table.features.shape[1] < 2:
        raise DataError(
            f"{table.name}: expected at least 2 features and 3 classes of more than "
            f"{2 * COMPONENTS} samples, got {table.features.shape[1]} and {len(labels)}"
        )
    names = [table.target_names[int(k)] if table.target_names else str(k) for k in labels]
    # Pixels have one unit; the columns of a user's table have each their own.
    features = table.features / 10 if lab.data.path is None else scale(table.features)
    pca = PCA(min(COMPONENTS, features.shape[1]), svd_solver="full").fit(features)
    raw = [features[table.target == label] for label in labels]
    samples = [pca.transform(x) for x in raw]
    laws = [fit_gaussian(x, ddof=0) for x in samples]
    pairs = list(itertools.combinations(range(len(names)), 2))
    pairs = pairs[: lab.pick(smoke=4, quick=len(pairs), full=len(pairs))]
    return Classes(names, samples, raw, laws, pca, pairs)


def _simulation(lab: Lab, classes: Classes, distances: dict[str, np.ndarray]) -> None:
    n_draws = lab.pick(smoke=500, quick=10_000, full=50_000)
    log_ratio = _log_ratios(lab, classes, n_draws)
    usual, rare = f"Bhattacharyya up to {RARE:g}", f"Bhattacharyya above {RARE:g}"
    scores: dict[str, list[float]] = {"KL": [], usual: [], rare: []}
    rows = []
    for i, j in lab.progress(classes.pairs, "simulation"):
        forth, back = log_ratio(i, j), log_ratio(j, i)
        for (a, b), sample in (((i, j), forth), ((j, i), back)):
            scores["KL"].append((sample.mean() - distances["KL"][a, b]) / _standard_error(sample))
        overlap = [1 / np.cosh(sample / 2) for sample in (forth, back)]
        mean = (overlap[0].mean() + overlap[1].mean()) / 2
        error = math.hypot(*(_standard_error(sample) for sample in overlap)) / 2
        distance = distances["$D_B$"][i, j]
        scores[usual if distance <= RARE else rare].append((mean - math.exp(-distance)) / error)
        if j - i == 1:
            rows.append({
                "classes": f"{classes.names[i]}, {classes.names[j]}",
                "KL": distances["KL"][i, j],
                "KL, simulated": forth.mean(),
                "$e^{-D_B}$": math.exp(-distance),
                "$e^{-D_B}$, simulated": mean,
            })  # fmt: skip
    caption = f"Neighbouring classes, {n_draws} draws from each law."
    lab.table("Closed forms and simulation", rows, caption)
    lab.table(
        "Differences in standard errors",
        [
            {
                "quantity": name,
                "values": len(z),
                r"$|z| \le 3$": sum(abs(v) <= 3 for v in z),
                r"largest $|z|$": max(map(abs, z)) if z else None,
            }
            for name, z in scores.items()
        ],
        rf"Where $D_B > {RARE:g}$ a few draws carry the mean, so these values decide nothing.",
    )
    for name, z in ((name, scores[name]) for name in ("KL", usual) if scores[name]):
        within = sum(abs(v) <= 3 for v in z) / len(z)
        lab.claim(f"share of simulations within three standard errors, {name}", within, ">=", 0.95)


def _log_ratios(lab: Lab, classes: Classes, n_draws: int) -> Callable[[int, int], np.ndarray]:
    """Draw from every law; the function gives log p_i - log p_j at the draws of i."""
    generator = lab.generator()
    means, covariances = classes.parameters
    factors = np.linalg.cholesky(covariances)
    log_dets = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    normal = torch.randn(*means.shape[:1], n_draws, means.shape[1], generator=generator).double()
    draws = means[:, None] + normal.numpy() @ factors.swapaxes(1, 2)

    def log_density(x: np.ndarray, k: int) -> np.ndarray:
        white = np.linalg.solve(factors[k], (x - means[k]).T)
        return -(white**2).sum(0) / 2 - log_dets[k]

    own = [log_density(x, k) for k, x in enumerate(draws)]
    return lambda i, j: own[i] - log_density(draws[i], j)


def _standard_error(sample: np.ndarray) -> float:
    return float(sample.std(ddof=1)) / math.sqrt(len(sample))


def _classifiers(lab: Lab, classes: Classes, distances: dict[str, np.ndarray]) -> None:
    kl = distances["KL"]
    measures = {
        "Bhattacharyya": distances["$D_B$"],
        "KL, both ways": (kl + kl.T) / 2,
        "Wasserstein": distances["$W_2$"],
    }
    errors, bounds, sizes = [], [], []
    for i, j in lab.progress(classes.pairs, "classifiers"):
        x = np.concatenate([classes.samples[i], classes.samples[j]])
        second = np.repeat([0, 1], [len(classes.samples[i]), len(classes.samples[j])])
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=lab.seed)
        rule = QuadraticDiscriminantAnalysis(tol=1e-12)
        guess = cross_val_predict(rule, x, second, cv=folds)
        share = second.mean()
        errors.append(float((guess != second).mean()))
        bounds.append(math.sqrt(share * (1 - share)) * math.exp(-distances["$D_B$"][i, j]))
        sizes.append(len(x))
    ranks = {
        name: float(spearmanr(errors, [table[pair] for pair in classes.pairs]).statistic)
        for name, table in measures.items()
    }
    lab.table(
        "How well distances rank pairs of classes",
        [{"distance": name, "Spearman correlation with the error": r} for name, r in ranks.items()],
        f"Error of quadratic discriminant analysis in {FOLDS} folds, {len(errors)} pairs.",
    )
    lab.figure(
        "errors",
        _errors_and_bound(classes, measures, errors),
        "Error of a classifier for each pair of classes against three distances; no error at all "
        r"is drawn at the bottom. Left: the bound $\frac12 e^{-D_B}$ (line).",
    )
    lab.claim("Spearman correlation of error and $D_B$", ranks["Bhattacharyya"], "<=", -0.6)
    lead = ranks["Bhattacharyya"] - ranks["Wasserstein"]
    lab.claim("correlation of $D_B$ less that of $W_2$: ranks at least as well", lead, "<=", 0.0)
    error, bound, n = np.array(errors), np.array(bounds), np.array(sizes)
    lab.claim(
        "pairs whose error is within the bound and three binomial standard errors of the error",
        int((error <= bound + 3 * np.sqrt(error * (1 - error) / n)).sum()),
        "==",
        len(errors),
    )
    lab.observe(
        "the same with the standard error that a classifier at the bound would have",
        int((error <= bound + 3 * np.sqrt(bound * (1 - bound) / n)).sum()),
        "==",
        len(errors),
    )


def _moved(lab: Lab, classes: Classes) -> None:
    moments, costs = [], []
    for i, j in classes.pairs:
        law, target = classes.laws[i], classes.laws[j]
        moved = optimal_transport_map(*law, *target)(classes.samples[i])
        fitted = fit_gaussian(moved, ddof=0)
        moments += [
            np.abs(got - wanted).max() / np.abs(wanted).max()
            for got, wanted in zip(fitted, target, strict=True)
        ]
        cost = ((moved - classes.samples[i]) ** 2).sum(1).mean()
        costs.append(abs(cost / wasserstein_distance(*law, *target, squared=True) - 1))
    journey = "Samples of one class on their way to another along $(1-t)x + tT(x)$"
    if lab.data.path is None:
        caption = f"{journey}, decoded from eight components: each step has a law between the two."
        lab.figure("moved", _moved_images(classes), caption)
    else:
        caption = f"{journey} (last panel), in two principal components."
        lab.figure("moved", _moved_clouds(classes), caption)
    lab.claim(
        "largest relative difference of moved mean or covariance from those of the target",
        max(moments),
        "<=",
        1e-8,
    )
    lab.observe("largest relative difference of its cost from $W_2^2$", max(costs), "<=", 1e-8)


def _flat(lab: Lab, classes: Classes) -> None:
    laws = [fit_gaussian(x) for x in classes.raw]
    ranks = [int(np.linalg.matrix_rank(law.covariance)) for law in laws]
    d = classes.raw[0].shape[1]
    lab.table(
        f"Rank of the covariances in all {d} features",
        [
            {"class": name, "samples": len(x), "rank": rank}
            for name, x, rank in zip(classes.names, classes.raw, ranks, strict=True)
        ],
        "Where the rank is below the number of features the law is flat in some direction.",
    )
    flat = sum(min(ranks[i], ranks[j]) < d for i, j in classes.pairs)
    for name, distance in (("KL", kl_divergence), ("$D_B$", bhattacharyya_distance)):
        refused = sum(_is_refused(distance, laws[i], laws[j]) for i, j in classes.pairs)
        lab.claim(f"pairs with a flat law whose {name} is refused", refused, "==", flat)
    finite = sum(math.isfinite(wasserstein_distance(*laws[i], *laws[j])) for i, j in classes.pairs)
    lab.claim("pairs with a finite $W_2$ all the same", finite, "==", len(classes.pairs))


def _is_refused(
    distance: Callable[..., Any], one: GaussianParameters, two: GaussianParameters
) -> bool:
    try:
        distance(*one, *two)
    except ValueError:
        return True
    return False


def _nearly_equal(lab: Lab) -> None:
    """Two laws that differ by less and less, in exact arithmetic and in doubles."""
    zero, one = np.zeros(2), np.array([[2.0, 1.0], [1.0, 2.0]])
    changes = [2.0**-k for k in range(2, 29, 2)]
    # In the order of the reference below.
    ours: list[Callable[..., Any]] = [kl_divergence, bhattacharyya_distance, wasserstein_distance]
    names = ["KL", "$D_B$", "$W_2$"]
    errors: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for change in changes:
        # Powers of two: no entry is rounded, so the reference has the very same laws.
        two = one + change * np.array([[1.0, 0.5], [0.5, -1.0]])
        exact = _exact_distances(one, two)
        textbook = _textbook_distances(one, two)
        for name, distance, reference, plain in zip(names, ours, exact, textbook, strict=True):
            errors[name][0].append(abs(distance(zero, one, zero, two) / reference - 1))
            errors[name][1].append(abs(plain / reference - 1))
    lab.figure(
        "cancellation",
        _error_lines(changes, errors),
        "Relative error of the distance between two laws against the size of the change that "
        "separates them, by exact arithmetic with 60 digits. Dashed: the textbook formulas, which "
        "end without a correct digit. Solid: the same distances as sums of positive terms.",
    )
    lab.observe(
        "largest relative error at any change", max(max(a) for a, _ in errors.values()), "<=", 1e-6
    )


def _exact_distances(one: np.ndarray, two: np.ndarray) -> list[float]:
    """KL, Bhattacharyya and W2 of two laws with equal means in the plane, with 60 digits."""
    with localcontext(prec=60):
        (a, b), (_, c) = ([Decimal(float(x)) for x in row] for row in one)
        (p, q), (_, r) = ([Decimal(float(x)) for x in row] for row in two)
        det1, det2 = a * c - b * b, p * r - q * q
        average = (a + p) * (c + r) / 4 - (b + q) ** 2 / 4
        trace = (r * a - 2 * q * b + p * c) / det2
        kl = (trace - 2 - (det1 / det2).ln()) / 2
        bhattacharyya = (average / (det1 * det2).sqrt()).ln() / 2
        # The trace of the root of a 2 x 2 matrix M is the root of tr M + 2 sqrt(det M).
        cross = (a * p + 2 * b * q + c * r + 2 * (det1 * det2).sqrt()).sqrt()
        w2 = (a + c + p + r - 2 * cross).sqrt()
    return [float(kl), float(bhattacharyya), float(w2)]


def _textbook_distances(one: np.ndarray, two: np.ndarray) -> list[float]:
    """The same as the formulas stand in books, in doubles."""
    det1, det2 = np.linalg.det(one), np.linalg.det(two)
    kl = (np.trace(np.linalg.solve(two, one)) - 2 - math.log(det1 / det2)) / 2
    bhattacharyya = math.log(np.linalg.det((one + two) / 2) / math.sqrt(det1 * det2)) / 2
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ two @ root)).sum()
    w2 = math.sqrt(max(np.trace(one) + np.trace(two) - 2 * cross, 0.0))
    return [float(kl), bhattacharyya, w2]


def _heat_maps(classes: Classes, distances: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    places = range(len(classes.names))
    for axes, (name, table) in zip(figure.subplots(1, 3), distances.items(), strict=True):
        others = np.where(np.eye(len(table), dtype=bool), np.nan, table)
        image = axes.imshow(others, norm="log" if name != "$W_2$" else "linear")
        axes.set_title(name, fontsize="medium")
        axes.grid(visible=False)
        axes.set_xticks(places, classes.names, fontsize="small")
        axes.set_yticks(places, classes.names, fontsize="small")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _errors_and_bound(
    classes: Classes,
    measures: dict[str, np.ndarray],
    errors: list[float],
) -> Figure:
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    least = min((error for error in errors if error > 0), default=1e-3) / 2
    drawn = [max(error, least) for error in errors]
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (name, table) in zip(panels, measures.items(), strict=True):
        values = [table[pair] for pair in classes.pairs]
        axes.semilogy(values, drawn, "o", markersize=4)
        axes.set_xlabel(name)
        if name.startswith("KL"):
            axes.set_xscale("log")
    grid = np.linspace(0, max(measures["Bhattacharyya"][pair] for pair in classes.pairs), 200)
    bound = np.exp(-grid) / 2
    panels[0].plot(grid[bound > least / 2], bound[bound > least / 2], color="black", linewidth=1.2)
    panels[0].set_ylabel("error")
    return figure


def _moved_images(classes: Classes) -> Figure:
    """Rows of digits, decoded through the principal components."""
    times = np.linspace(0, 1, 7)
    journeys = [(0, 6), (4, 9), (3, 8), (7, 1)]
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    for row, (i, j) in zip(figure.subplots(len(journeys), len(times)), journeys, strict=True):
        # The sample nearest to the mean is a typical one.
        away = ((classes.samples[i] - classes.laws[i].mean) ** 2).sum(1)
        start = classes.samples[i][away.argmin()]
        end = optimal_transport_map(*classes.laws[i], *classes.laws[j])(start)
        for axes, t in zip(row, times, strict=True):
            place = (1 - t) * start + t * end
            pixels = classes.pca.inverse_transform(place[None])
            axes.imshow(pixels.reshape(8, 8), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            if (i, j) == journeys[0]:
                axes.set_title(f"$t = {t:.2g}$", fontsize="small")
        row[0].set_ylabel(f"{classes.names[i]} to {classes.names[j]}")
    return figure


def _moved_clouds(classes: Classes) -> Figure:
    times = (0.0, 0.5, 1.0)
    start = classes.samples[0]
    end = optimal_transport_map(*classes.laws[0], *classes.laws[1])(start)
    figure = Figure(figsize=(7.0, 2.4), layout="constrained")
    panels = figure.subplots(1, len(times) + 1, sharex=True, sharey=True)
    for axes, t in zip(panels, times, strict=False):
        place = (1 - t) * start + t * end
        axes.plot(place[:, 0], place[:, 1], ".", markersize=3)
        axes.set_title(f"$t = {t:.2g}$", fontsize="small")
    other = classes.samples[1]
    panels[-1].plot(other[:, 0], other[:, 1], ".", markersize=3, color="C1")
    panels[-1].set_title(f"class {classes.names[1]}", fontsize="small")
    return figure


def _error_lines(
    changes: list[float], errors: dict[str, tuple[list[float], list[float]]]
) -> Figure:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for k, (name, curves) in enumerate(errors.items()):
        ours, textbook = np.maximum(curves, np.finfo(float).eps / 2)
        axes.loglog(changes, ours, "-o", markersize=3, color=f"C{k}", label=name)
        axes.loglog(changes, textbook, "--", color=f"C{k}", linewidth=1)
    axes.set(xlabel="change of the covariance", ylabel="relative error of the distance")
    axes.legend()
    return figure
