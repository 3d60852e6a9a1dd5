r"""HSIC: dependence seen through kernels.

Are two things related? Correlation answers for straight lines only: of a parabola it sees nothing.
Mutual information answers for everything, and asks for densities, which nobody has. The
Hilbert–Schmidt independence criterion needs two kernel matrices and one trace. It works for
numbers, vectors and labels alike, its gradient is at hand, and with the right kernels it is zero at
independence and nowhere else.

## From one pair of functions to all of them

$x$ and $y$ are independent exactly if

$$\mathbb{E}[f(x)\,g(y)] = \mathbb{E}[f(x)]\;\mathbb{E}[g(y)]$$

for all bounded continuous $f$ and $g$. Correlation checks this for $f(x) = x$ and $g(y) = y$. One
could search for the worst $f$ and $g$, but that is a game of its own. The article's idea is to
search for nothing: take two whole systems of functions, $f_1, f_2, \dots$ and $g_1, g_2, \dots$,
and add up the squares of *all* covariances,

$$\mathrm{HSIC} = \sum_{i,j} \Big(\mathbb{E}[f_i(x)g_j(y)]
  - \mathbb{E}[f_i(x)]\,\mathbb{E}[g_j(y)]\Big)^2.$$

A square of a mean is a mean over two independent copies, $(\mathbb{E} u)^2 = \mathbb{E}[u\,u']$.
Every term of the expanded square therefore contains the functions only through the sums

$$k(x, x') = \sum_i f_i(x) f_i(x'), \qquad l(y, y') = \sum_j g_j(y) g_j(y'),$$

and these are kernels. So choose the kernels and forget the functions. Infinitely many test
functions cost as much as two kernels:

$$\begin{aligned}\mathrm{HSIC} = {}& \mathbb{E}[k(x,x')\,l(y,y')]
  + \mathbb{E}[k(x,x')]\;\mathbb{E}[l(y,y')] \\
  & - 2\,\mathbb{E}_{x,y}\big[\mathbb{E}_{x'}k(x,x')\;\mathbb{E}_{y'}l(y,y')\big].\end{aligned}$$

The systems behind the gaussian kernel $e^{-\|x-x'\|^2/(2\sigma^2)}$ and the laplacian kernel are
rich enough that nothing but independence gives zero. With $k = x^\top x'$ and $l = y^\top y'$ the
systems are the coordinates, and what comes out is the squared norm of the covariance matrix.

## From expectations to a trace

With the matrices $K$ and $L$ of $n$ samples and $H = I - \frac1n 11^\top$, which takes the means
away, all three expectations together are

$$\mathrm{HSIC}_b = \frac{1}{(n-1)^2}\operatorname{tr}(KHLH),$$

$$\operatorname{tr}(KHLH) = \sum_{ij}K_{ij}L_{ij} - \frac2n\,1^\top KL\,1
  + \frac1{n^2}\,1^\top K1\;1^\top L1.$$

The trace needs nothing of the matrices but sums and sums of rows, so they need never be held whole.
The estimate is never negative, so it cannot be right on average where the truth is zero: there it
is about $\frac1n\operatorname{tr}C_{xx}\operatorname{tr}C_{yy}$ too large, which at $n = 100$ is as
much as a weak dependence. Leaving out all pairs of equal indices cures that (Song et al.):

$$\begin{aligned}\mathrm{HSIC}_u = \frac{1}{n(n-3)}\Big[&\operatorname{tr}\tilde K\tilde L
+ \frac{1^\top\tilde K1\;1^\top\tilde L1}{(n-1)(n-2)} \\
& - \frac{2}{n-2}1^\top\tilde K\tilde L1\Big],\end{aligned}$$

with zeros on the diagonals of $\tilde K$ and $\tilde L$.

HSIC has no unit. Divided by what each side has with itself, it becomes the *centred kernel
alignment*, $\mathrm{HSIC}(x,y)/\sqrt{\mathrm{HSIC}(x,x)\,\mathrm{HSIC}(y,y)}$, between 0 and 1.

## When is it more than chance?

Pair $x$ with a shuffled $y$, and every dependence is gone, while all else stays. The share of
shuffles whose statistic $T = \frac1n\operatorname{tr}(KHLH)$ is at least the observed one is a
valid $p$-value, for any kernel and any $n$, if the observed pairing counts as one of the shuffles.
That takes a thousand statistics in place of one; but smooth kernels have low rank. With $HKH =
AA^\top$ and $HLH = BB^\top$ for thin $A$ and $B$, a shuffle costs one small product, $T_\pi =
\frac1n\|A^\top B_\pi\|_F^2$. The alternative is a gamma law with the mean and the variance that the
null law is known to have: one formula, good from about $n = 50$ on.

The bandwidths are the median distances of the samples, *one for each side*. They decide how fast
the test functions may vary, and so what can be seen. What oscillates faster than the bandwidth
hides.

## What is measured

*Level and power.* Pairs of $n = 200$ samples. Two kinds are independent; a test at $\alpha = 0.05$
may reject one in twenty of them, up to the chance of so many trials. Four kinds are dependent and
uncorrelated: a noisy circle; $t$ with $t^2$ and noise; $t$ with $t\,\varepsilon$, where only the
size of the noise depends on $t$; and the shape of a W. At least nine in ten must be found, and
correlation must find at most four in ten. A fifth kind, $\sin(4\pi t)$ and noise, is there to show
where the median bandwidth ends, and decides nothing.

*Features.* Which twelve of the 64 pixels of a handwritten digit would you keep? Half of the digits
rank the pixels by their alignment with the label, which is a category: 3 is no closer to 4 than to
9. Correlation has to take the label for a number. A 3-nearest-neighbour classifier on the other
half tells which choice was better. HSIC must be two points above correlation, and ten above pixels
chosen at random.

*Training.* A small network is trained on nothing but $-\mathrm{HSIC}_b(z, \text{label})$: no
cross-entropy, no classifier. Each digit of the other half then gets the class whose mean is
nearest. From pixels alone that rule gets nine in ten right; in the trained representation it must
reach 0.94, and gain four points.

The reader should see full bars beside short ones, a map of pixels that looks like the strokes that
tell digits apart, and ten clusters come out of a criterion that knows only *same* and *different*.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from kexue.lab import DataError, Lab, seeded
from kexue.stats.hsic import centered_kernel_alignment, hsic, hsic_test

ALPHA = 0.05
SAMPLES = 200
PIXELS = 12
GAMMA, PERMUTATION, PEARSON = "HSIC gamma", "HSIC permuted", "Pearson"
TESTS = (GAMMA, PERMUTATION, PEARSON)
INDEPENDENT = ("normal", "exponential")
DEPENDENT = ("circle", "t, t²", "t, tε", "W")
STRESS = "sin 4πt"

Pair = tuple[np.ndarray, np.ndarray]
Rng = np.random.Generator


class Halves(NamedTuple):
    """Digits to learn from, and digits to be judged by; pixels from 0 to 1."""

    train: np.ndarray
    train_label: np.ndarray
    test: np.ndarray
    test_label: np.ndarray


def run(lab: Lab) -> None:
    """Count rejections, choose pixels, train without cross-entropy."""
    _level_and_power(lab)
    digits = lab.data.tabular("digits")
    halves = _halves(digits.features / 16, digits.target, lab.seed)
    _choose_pixels(lab, halves)
    _train_networks(lab, halves)
    if lab.data.path is not None:
        _rank_your_columns(lab)


def _halves(features: np.ndarray, labels: np.ndarray, seed: int) -> Halves:
    train, test, train_label, test_label = train_test_split(
        features, labels, test_size=0.5, stratify=labels, random_state=seed
    )
    return Halves(train, train_label, test, test_label)


def _draw(kind: str, rng: Rng, n: int = SAMPLES) -> Pair:
    normal, noise = rng.standard_normal((2, n))
    t = rng.uniform(-1, 1, n)
    match kind:
        case "normal":
            return normal, noise
        case "exponential":
            return rng.exponential(size=n), rng.exponential(size=n)
        case "circle":
            return np.cos(np.pi * t) + 0.2 * normal, np.sin(np.pi * t) + 0.2 * noise
        case "t, t²":
            return normal, normal**2 + noise
        case "t, tε":
            return normal, normal * noise
        case "W":
            return t, 4 * (t**2 - 0.5) ** 2 + 0.2 * noise
        case _:
            return t, np.sin(4 * np.pi * t) + 0.3 * noise


def _level_and_power(lab: Lab) -> None:
    level_trials = lab.pick(smoke=4, quick=200, full=500)
    power_trials = lab.pick(smoke=4, quick=60, full=500)
    kinds = (*INDEPENDENT, *DEPENDENT, STRESS)
    rejected: dict[str, dict[str, float]] = {}
    progress = lab.progress(kinds, "level and power")
    for i, kind in enumerate(progress):
        trials = level_trials if kind in INDEPENDENT else power_trials
        rejected[kind] = _rejections(kind, trials, np.random.default_rng([lab.seed, i]))
        progress.metric(rejected=rejected[kind][PERMUTATION])
    lab.table(
        "Share of rejections",
        [{"pair": kind, **rejected[kind]} for kind in kinds],
        rf"At $\alpha = {ALPHA}$ and $n = {SAMPLES}$, by three tests. The first two kinds are "
        f"independent, {level_trials} trials each; the others have {power_trials}. The last is no "
        "part of the verdict: the median bandwidth is too wide for four waves.",
    )
    lab.figure(
        "power",
        _power_bars(rejected),
        "Above: one sample of each dependent kind. Below: how often each test finds it at "
        rf"$\alpha = {ALPHA}$ (dotted).",
    )
    levels = [rejected[kind][test] for kind in INDEPENDENT for test in (GAMMA, PERMUTATION)]
    low, high = _level_band(level_trials)
    lab.claim("smallest level of both HSIC tests on independent pairs", min(levels), ">=", low)
    lab.claim("largest level of both HSIC tests on independent pairs", max(levels), "<=", high)
    powers = [rejected[kind][test] for kind in DEPENDENT for test in (GAMMA, PERMUTATION)]
    lab.claim("smallest power of both HSIC tests on the four kinds", min(powers), ">=", 0.9)
    lab.claim(
        "largest power of Pearson's correlation on the four kinds",
        max(rejected[kind][PEARSON] for kind in DEPENDENT),
        "<=",
        0.4,
    )
    lab.observe(
        "power of HSIC on four waves, beyond the median bandwidth",
        rejected[STRESS][PERMUTATION],
        "<",
        0.9,
    )


def _level_band(trials: int) -> tuple[float, float]:
    """Where the share of rejections of a sound test lies in 999 of 1000 cases."""
    if trials > 200:
        return 0.01, 0.11
    low, high = stats.binom.ppf([0.0005, 0.9995], trials, ALPHA) / trials
    return float(low), float(high)


def _rejections(kind: str, trials: int, rng: Rng) -> dict[str, float]:
    counts = dict.fromkeys(TESTS, 0)
    for _ in range(trials):
        x, y = _draw(kind, rng)
        counts[GAMMA] += hsic_test(x, y, method="gamma").pvalue <= ALPHA
        permuted = hsic_test(x, y, n_permutations=199, random_state=rng)
        counts[PERMUTATION] += permuted.pvalue <= ALPHA
        counts[PEARSON] += stats.pearsonr(x, y).pvalue <= ALPHA
    return {test: count / trials for test, count in counts.items()}


def _choose_pixels(lab: Lab, halves: Halves) -> None:
    varying = halves.train.std(axis=0) > 0
    aligned, correlated = np.zeros(64), np.zeros(64)
    aligned[varying] = _alignments(halves.train[:, varying], halves.train_label, classes=True)
    correlated[varying] = _correlations(halves.train[:, varying], halves.train_label)
    best = np.argsort(-aligned, kind="stable")
    by_correlation = np.argsort(-correlated, kind="stable")
    rng = np.random.default_rng(lab.seed)
    draws = [rng.choice(64, PIXELS, replace=False) for _ in range(20)]

    by_hsic = _neighbour_accuracy(halves, best[:PIXELS])
    by_pearson = _neighbour_accuracy(halves, by_correlation[:PIXELS])
    at_random = float(np.mean([_neighbour_accuracy(halves, draw) for draw in draws]))
    lab.table(
        "Twelve pixels of sixty-four",
        [
            {"pixels": "best by HSIC", "accuracy": by_hsic},
            {"pixels": "best by |Pearson|", "accuracy": by_pearson},
            {"pixels": "random, mean of 20 draws", "accuracy": at_random},
            {"pixels": "worst by HSIC", "accuracy": _neighbour_accuracy(halves, best[-PIXELS:])},
            {"pixels": "all 64", "accuracy": _neighbour_accuracy(halves, np.arange(64))},
        ],
        "3 nearest neighbours, learned on the half that ranked the pixels, judged by the other.",
    )
    lab.figure(
        "pixels",
        _pixel_maps(
            {
                "HSIC with the label": (aligned, best[:PIXELS]),
                "|Pearson| with the digit's value": (correlated, by_correlation[:PIXELS]),
            }
        ),
        "How much each pixel tells of the digit, by two measures; the twelve best are marked. "
        "Correlation takes the label for a number.",
    )
    lab.claim("points by which HSIC's pixels beat Pearson's", 100 * (by_hsic - by_pearson), ">=", 2)
    lab.claim("points by which they beat random ones", 100 * (by_hsic - at_random), ">=", 10)


def _alignments(columns: np.ndarray, target: np.ndarray, *, classes: bool) -> np.ndarray:
    """Alignment of each column with the target."""
    return np.asarray(
        centered_kernel_alignment(
            _in_own_unit(columns).T[:, :, None],
            target if classes else _in_own_unit(target),
            kernel_x="gaussian",
            kernel_y="delta" if classes else "gaussian",
            bandwidth_x=1.0,
            bandwidth_y=1.0,
        )
    )


def _in_own_unit(columns: np.ndarray) -> np.ndarray:
    """Columns in units of their standard deviation, for a bandwidth of 1.

    Most pixels are 0 most of the time, so that their median distance is no unit.
    """
    return columns / columns.std(axis=0)


def _correlations(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.abs([stats.pearsonr(column, target).statistic for column in columns.T])


def _neighbour_accuracy(halves: Halves, pixels: np.ndarray) -> float:
    neighbours = KNeighborsClassifier(3).fit(halves.train[:, pixels], halves.train_label)
    return float(neighbours.score(halves.test[:, pixels], halves.test_label))


class Encoder(nn.Module):
    """Pixels to points on the unit sphere of ten dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(pixels), dim=-1)


def _train_networks(lab: Lab, halves: Halves) -> None:
    seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=1, full=3))]
    steps = lab.pick(smoke=20, quick=300, full=300)
    accuracies: dict[str, list[float]] = {"untrained": [], "biased": [], "unbiased": []}
    for seed in seeds:
        untrained = _new_encoder(seed)
        accuracies["untrained"].append(_encoder_accuracy(halves, untrained))
        for estimator in ("biased", "unbiased"):
            trained = _new_encoder(seed)
            trained.load_state_dict(
                lab.cache(
                    f"encoder-{estimator}-{seed}",
                    lambda e=estimator, s=seed: _trained_weights(lab, halves, e, steps, s),
                )
            )
            accuracies[estimator].append(_encoder_accuracy(halves, trained))
            if seed == lab.seed and estimator == "biased":
                lab.figure(
                    "encoder",
                    _planes(halves, untrained, trained),
                    "Held-out digits in the two directions of largest variance of $z$, before "
                    "training and after it. Numbers stand at the means of their classes.",
                )
    raw = _nearest_mean_accuracy(halves.train, halves.test, halves)
    reached = {name: float(np.mean(values)) for name, values in accuracies.items()}
    lab.table(
        "Nearest class mean, held-out half",
        [
            {"representation": "raw pixels", "accuracy": raw},
            {"representation": "untrained network", "accuracy": reached["untrained"]},
            {"representation": "trained, biased HSIC", "accuracy": reached["biased"]},
            {"representation": "trained, unbiased HSIC", "accuracy": reached["unbiased"]},
        ],
        rf"{steps} steps of Adam on $-\mathrm{{HSIC}}(z, \text{{label}})$, batches of 128, mean of "
        f"{len(seeds)} initialisation{'s' if len(seeds) > 1 else ''}.",
    )
    lab.claim("accuracy of the trained encoder", reached["biased"], ">=", 0.94)
    lab.claim("points that it gains on raw pixels", 100 * (reached["biased"] - raw), ">=", 4.0)
    lab.observe("accuracy when trained on the unbiased estimate", reached["unbiased"], ">=", 0.94)


def _new_encoder(seed: int) -> Encoder:
    with seeded(seed):
        return Encoder()


def _trained_weights(
    lab: Lab, halves: Halves, estimator: str, steps: int, seed: int
) -> dict[str, Tensor]:
    encoder = _new_encoder(seed).to(lab.device)
    pixels = torch.from_numpy(halves.train).float().to(lab.device)
    labels = torch.from_numpy(halves.train_label).to(lab.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    progress = lab.progress(range(steps), f"training on {estimator} HSIC")
    for step in progress:
        batch = torch.randperm(len(labels), generator=generator)[:128].to(lab.device)
        # A fixed bandwidth: under a median the network could gain by shrinking its distances.
        value = hsic(
            encoder(pixels[batch]), labels[batch],
            kernel_y="delta", bandwidth_x=0.5, estimator=estimator,
        )  # fmt: skip
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
        if step % 20 == 0:
            progress.metric(hsic=value.item())
    return encoder.state_dict()


def _encode(encoder: Encoder, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels).float()).numpy()


def _encoder_accuracy(halves: Halves, encoder: Encoder) -> float:
    train, test = (_encode(encoder, pixels) for pixels in (halves.train, halves.test))
    return _nearest_mean_accuracy(train, test, halves)


def _nearest_mean_accuracy(train: np.ndarray, test: np.ndarray, halves: Halves) -> float:
    classes = np.unique(halves.train_label)
    means = np.stack([train[halves.train_label == label].mean(axis=0) for label in classes])
    nearest = classes[np.argmin(cdist(test, means), axis=1)]
    return float(np.mean(nearest == halves.test_label))


def _rank_your_columns(lab: Lab) -> None:
    """The user's table: which columns have to do with the target, in any way."""
    table = lab.data.tabular()
    kept = np.random.default_rng(lab.seed).permutation(len(table.target))[:1000]
    varying = np.flatnonzero(table.features[kept].std(axis=0) > 0)
    target = table.target[kept]
    if len(kept) < 6 or len(varying) == 0 or np.ptp(target) == 0:
        raise DataError(
            f"{table.name}: expected at least 6 rows with a target and a column that are not "
            f"constant, got {len(kept)} rows, {len(varying)} such columns and "
            f"{len(np.unique(target))} values of the target"
        )
    columns, classes = table.features[np.ix_(kept, varying)], bool(table.target_names)
    aligned = _alignments(columns, target, classes=classes)
    correlated = _correlations(columns, target)
    rows = []
    for i in np.argsort(-aligned)[:20]:
        test = hsic_test(
            _in_own_unit(columns[:, i]), target if classes else _in_own_unit(target),
            kernel_y="delta" if classes else "gaussian", bandwidth_x=1.0, bandwidth_y=1.0,
            random_state=lab.seed,
        )  # fmt: skip
        rows.append({
            "column": table.feature_names[varying[i]],
            "alignment": aligned[i],
            "$p$": test.pvalue,
            "|Pearson|": correlated[i],
        })  # fmt: skip
    lab.table(
        "Your table",
        rows,
        f"The columns of {table.name} that depend most on its target, from {len(kept)} rows. Each "
        "$p$ is that of its own column, whatever the number of columns.",
    )


def _power_bars(rejected: dict[str, dict[str, float]]) -> Figure:
    shown = [*DEPENDENT, STRESS]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=[1, 1.6])
    for i, kind in enumerate(shown):
        axes = figure.add_subplot(grid[0, i])
        x, y = _draw(kind, np.random.default_rng(1))
        axes.scatter(x, y, s=2)
        axes.set(xticks=[], yticks=[], box_aspect=1)
    bars = figure.add_subplot(grid[1, :])
    places = np.arange(len(shown))
    for i, test in enumerate(TESTS):
        heights = [rejected[kind][test] for kind in shown]
        bars.bar(places + 0.27 * (i - 1), heights, width=0.25, label=test)
    bars.axhline(ALPHA, linestyle=":", color="black", linewidth=1)
    bars.set_xticks(places, shown)
    bars.set(ylim=(0, 1.18), yticks=[0, 0.5, 1], ylabel="share found")
    bars.legend(ncols=len(TESTS), loc="upper center", frameon=False)
    return figure


def _pixel_maps(scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(scores))
    for axes, (name, (score, chosen)) in zip(panels, scores.items(), strict=True):
        image = axes.imshow(score.reshape(8, 8), cmap="viridis", vmin=0)
        rows, columns = np.divmod(chosen, 8)
        axes.scatter(columns, rows, marker="s", s=150, facecolors="none", edgecolors="white", lw=2)
        axes.set(xlabel=name, xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _planes(halves: Halves, *encoders: Encoder) -> Figure:
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    for axes, name, encoder in zip(
        figure.subplots(1, 2), ("before", "after"), encoders, strict=True
    ):
        plane = PCA(2).fit(_encode(encoder, halves.train))
        _scatter_of_classes(axes, plane.transform(_encode(encoder, halves.test)), halves.test_label)
        axes.set_xlabel(name)
    return figure


def _scatter_of_classes(axes: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab10", s=4, alpha=0.6)
    for digit in np.unique(labels):
        x, y = points[labels == digit].mean(axis=0)
        axes.annotate(
            str(digit), (x, y), ha="center", va="center", fontsize="large", fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "alpha": 0.8, "lw": 0},
            color="#222222",
        )  # fmt: skip
    axes.set(xticks=[], yticks=[])
