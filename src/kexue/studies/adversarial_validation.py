r"""Validation data that resemble the test data.

Labelled rows were collected yesterday, and tomorrow's rows look different: other customers, other
topics, other proportions of easy and hard. A random validation split then measures the wrong thing,
and whatever is chosen by it is chosen for yesterday. But tomorrow's *inputs* are often at hand,
just without labels. Can they tell us which validation rows to look at?

## What can be repaired and what cannot

Training rows come from $p(x)\,p(y|x)$, test rows from $q(x)\,q(y|x)$. If the labels follow another
rule in the test set, $q(y|x) \neq p(y|x)$, nothing in the inputs can say so, and no split will
help. If the rule is the same and only the inputs drift, then everything that is needed is one
function of $x$, the density ratio $w(x) = q(x)/p(x)$:

$$\mathbb{E}_q[f(x,y)] = \iint q(x)\,p(y|x)\,f\,dx\,dy = \mathbb{E}_p[w(x)\,f(x,y)].$$

For $f$ the loss of a model, the right side is a mean over validation rows, which have labels.

## A classifier knows the density ratio

Call training rows 0 and test rows 1, show both equally often, and train a classifier $D$ to tell
them apart. It minimises

$$-\mathbb{E}_p[\log(1 - D(x))] - \mathbb{E}_q[\log D(x)].$$

At each $x$ this is $-p\log(1-D) - q\log D$, whose derivative vanishes where $p/(1-D) = q/D$:

$$D(x) = \frac{q(x)}{p(x) + q(x)}, \qquad w(x) = \frac{q(x)}{p(x)} = \frac{D(x)}{1 - D(x)}.$$

It is the discriminator of a GAN, with the training set as its forger. There are two ways to use it.

- *Weights.* Split at random, and weight each validation row by $w$.
- *Sampling.* Draw the validation rows themselves with probability $p_i = w_i/\sum_j w_j$, with
  replacement. Then they are a sample of $q$, and any metric will do.

## Two ways to get it wrong

*Weighting by $D$.* It is bounded and it looks natural, being the probability of a test row. But
$p\,D = pq/(p+q)$ lies half way between $p$ and $q$. For $p = \mathcal{N}(0,1)$ and $q =
\mathcal{N}(\mu,1)$ it is symmetric about $\mu/2$, and that is its mean exactly.

*Removing duplicates.* Of $n$ rows, $n$ are drawn, some of them several times. If each is kept once
only, a row is in the sample with probability

$$1 - (1 - p_i)^n \approx 1 - e^{-w_i}$$

for weights of mean 1. Like $D = w/(1+w)$ this saturates, where it should grow with $w$. The two are
never more than 30 percent apart: who removes duplicates weights by $D$, or nearly.

## What makes it work in practice

A classifier that is rich enough tells the training rows from the test rows by heart. So every row
is scored by one that has not seen it: five folds, five classifiers. What remains wrong with their
log-odds $\ell$ is mostly their scale, because a classifier may be too sure of itself, or too shy.
Two numbers take that back: a logistic regression of the domain on the out-of-fold $\ell$,

$$\log w(x) = \alpha\,\ell(x) + \beta,$$

with both domains of equal total weight. If nothing can be told apart then $\alpha = 0$, and all
weights are equal. Finally $w$ is cut at 10, before anything is normalised: the mean of $w$ over $p$
is 1, so that this is a statement about densities. It bounds the variance and costs a little bias.
How much is left to average over is the effective sample size

$$n_{\mathrm{eff}} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \qquad
\frac{n_{\mathrm{eff}}}{n} \to \frac{1}{\mathbb{E}_p[w^2]}.$$

## What is measured

*Gaussians.* Everything is known: the AUC of the best discriminator is $\Phi(\mu/\sqrt 2)$, the
effective share of the sample $e^{-\mu^2}$, the $w$-weighted mean $\mu$ and the $D$-weighted one
$\mu/2$. For $\mu \le 1$ the two means must be met to 0.06 and 0.03.

*Digits.* Handwritten digits go to the test set with probability 0.8 if they show 1, 2, 3, 8 or 9,
and else with 0.2. The first five are the harder ones for naive Bayes, so that its error is much
larger on the test set than a random validation split says. The discriminator sees pixels only.
Five estimates of the test error are compared with the true one, over many random splits. The bias
of the $w$-weighted estimate must be at most 0.6 of that of the $D$-weighted one, which must be
below that of the plain one; its root mean square error at most 0.65 of the plain one; and removing
duplicates must at least double the bias of sampling.

*Diabetes.* A small table of 442 patients, with the heavy ones in the test set. Here the bias falls
too, but the variance eats much of the gain. It decides nothing and is shown for that reason.

*Which part does what.* The digits once more, without calibration and clipping, and with
discriminators that are regularised too much and too little.

The reader should see a cloud of plain estimates far below the line of truth, and one of weighted
estimates that touches it, wider.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kexue.lab import DataError, Lab
from kexue.stats.validation import TrainTestDiscriminator, drift_report

PLAIN, WEIGHT, SCORE = "plain", "weights $w$", "weights $D$"
RESAMPLED, DEDUPLICATED = "resampled", "deduplicated"
ESTIMATES = (PLAIN, WEIGHT, SCORE, RESAMPLED, DEDUPLICATED)
HARDER_DIGITS = (1, 2, 3, 8, 9)
VALIDATION_SHARE = 0.3


class Problem(NamedTuple):
    """Rows, their labels, the chance of each to be a test row, a model and its loss."""

    features: np.ndarray
    target: np.ndarray
    test_chance: np.ndarray
    model: Any
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray]


class Trial(NamedTuple):
    """One random shift: the true test loss, and what the validation rows say of it."""

    truth: float
    estimates: dict[str, float]
    discriminator: TrainTestDiscriminator
    is_test: np.ndarray


def run(lab: Lab) -> None:
    """Gaussians with known answers, two real tables, the parts one by one."""
    gaussians = _gaussians(lab)
    digits = _digits_problem(lab)
    trials = _digits(lab, digits)
    lab.figure(
        "densities",
        _densities(gaussians, digits, trials[0]),
        "Left: the gaussians with $\\mu = 1$. Right: the digits, projected on the direction that "
        "tells training from test rows best. Weighted by $w$, the training rows look like the test "
        "rows; weighted by $D$, they stop half way.",
    )
    diabetes = _diabetes(lab)
    lab.figure(
        "errors",
        _error_bars({"digits, error rate": trials, "diabetes, squared error": diabetes}),
        "Bias and root mean square error of the estimates of the test loss.",
    )
    _parts(lab, digits)
    if lab.data.path is not None:
        _look_at_your_table(lab)


def _gaussians(lab: Lab) -> dict[float, tuple[np.ndarray, np.ndarray, TrainTestDiscriminator]]:
    n = lab.pick(smoke=500, quick=20_000, full=20_000)
    rng = np.random.default_rng(lab.seed)
    fitted, rows = {}, []
    misses: dict[str, list[float]] = {WEIGHT: [], SCORE: []}
    for shift in (0.5, 1.0, 2.0):
        train, test = rng.normal(0, 1, (n, 1)), rng.normal(shift, 1, (n, 1))
        found = _fit(TrainTestDiscriminator(clip=None, random_state=lab.seed), train, test)
        fitted[shift] = train, test, found
        by_weight = float(np.average(train[:, 0], weights=found.weights_))
        by_score = float(np.average(train[:, 0], weights=found.train_scores_))
        rows += [
            {
                r"$\mu$": shift,
                "": "measured",
                "AUC": found.auc_,
                r"$n_{\mathrm{eff}}/n$": found.effective_sample_size_ / n,
                "$w$-mean": by_weight,
                "$D$-mean": by_score,
                r"$\alpha$": found.calibration_[0],
            },
            {
                r"$\mu$": shift,
                "": "exact",
                "AUC": norm.cdf(shift / math.sqrt(2)),
                r"$n_{\mathrm{eff}}/n$": math.exp(-(shift**2)),
                "$w$-mean": shift,
                "$D$-mean": shift / 2,
                r"$\alpha$": 1.0,
            },
        ]
        if shift <= 1:
            misses[WEIGHT].append(abs(by_weight - shift))
            misses[SCORE].append(abs(by_score - shift / 2))
    lab.table(
        "Gaussians",
        rows,
        f"{n} training rows of $\\mathcal{{N}}(0, 1)$ and as many test rows of $\\mathcal{{N}}"
        r"(\mu, 1)$, weights not clipped. At $\mu = 2$ one row in fifty counts.",
    )
    lab.claim(
        r"gaussians, $\mu \le 1$: largest miss of the $w$-mean", max(misses[WEIGHT]), "<=", 0.06
    )
    lab.claim(
        r"gaussians, $\mu \le 1$: largest miss of $\mu/2$ by the $D$-mean",
        max(misses[SCORE]),
        "<=",
        0.03,
    )
    return fitted


def _fit(
    discriminator: TrainTestDiscriminator, train: np.ndarray, test: np.ndarray
) -> TrainTestDiscriminator:
    """Separation is part of what is measured here, and needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train and test are almost separable")
        return discriminator.fit(train, test)


def _trial(problem: Problem, discriminator: TrainTestDiscriminator, seed: list[int]) -> Trial:
    rng = np.random.default_rng(seed)
    is_test = rng.random(len(problem.target)) < problem.test_chance
    X, y = problem.features[~is_test], problem.target[~is_test]
    found = _fit(
        clone(discriminator).set_params(random_state=int(rng.integers(2**31))),
        X,
        problem.features[is_test],
    )
    shuffled = rng.permutation(len(y))
    validation, train = np.split(shuffled, [round(VALIDATION_SHARE * len(y))])
    model = clone(problem.model).fit(X[train], y[train])
    truth = problem.loss(model.predict(problem.features[is_test]), problem.target[is_test]).mean()

    losses = problem.loss(model.predict(X[validation]), y[validation])
    weight, score = found.weights_[validation], found.train_scores_[validation]
    drawn = rng.choice(len(losses), len(losses), p=weight / weight.sum())
    estimates = {
        PLAIN: losses.mean(),
        WEIGHT: np.average(losses, weights=weight),
        SCORE: np.average(losses, weights=score),
        RESAMPLED: losses[drawn].mean(),
        DEDUPLICATED: losses[np.unique(drawn)].mean(),
    }
    return Trial(float(truth), {k: float(v) for k, v in estimates.items()}, found, is_test)


def _digits_problem(lab: Lab) -> Problem:
    digits = lab.data.tabular("digits")
    chance = np.where(np.isin(digits.target, HARDER_DIGITS), 0.8, 0.2)
    return Problem(digits.features, digits.target, chance, GaussianNB(), np.not_equal)


def _digits(lab: Lab, problem: Problem) -> list[Trial]:
    n_trials = lab.pick(smoke=3, quick=100, full=300)
    trials = _trials(lab, "digits", problem, n_trials)
    _table_of_errors(lab, "Digits", trials)
    lab.figure(
        "seeds",
        _estimate_against_truth(trials),
        "Each dot is one random shift of the digits: the estimate of the test error, against the "
        "true one. On the dashed line they agree.",
    )
    lab.figure(
        "classes",
        _class_shares(problem, trials[0]),
        "Share of each digit in one split. The discriminator saw no labels, and still its weights "
        "bring the proportions of the training rows near those of the test rows.",
    )
    bias = {name: abs(_errors(trials, name).mean()) for name in ESTIMATES}
    lab.claim("digits: |bias| of $w$ over that of $D$", bias[WEIGHT] / bias[SCORE], "<=", 0.6)
    lab.claim("digits: |bias| of $D$ over that of plain", bias[SCORE] / bias[PLAIN], "<", 1)
    lab.claim(
        "digits: error (RMS) of $w$ over that of plain",
        _root_mean_square(trials, WEIGHT) / _root_mean_square(trials, PLAIN),
        "<=",
        0.65,
    )
    lab.claim(
        "digits: |bias| without duplicates over that of sampling with them",
        bias[DEDUPLICATED] / bias[RESAMPLED],
        ">=",
        2,
    )
    return trials


def _diabetes(lab: Lab) -> list[Trial]:
    table = lab.data.tabular("diabetes")
    weight = table.features[:, table.feature_names.index("bmi")]
    chance = 1 / (1 + np.exp(-(weight - weight.mean()) / weight.std()))
    problem = Problem(
        table.features, table.target, chance, Ridge(1.0), lambda a, b: np.square(a - b)
    )
    trials = _trials(lab, "diabetes", problem, lab.pick(smoke=3, quick=40, full=300))
    _table_of_errors(lab, "Diabetes", trials)
    bias = {name: abs(_errors(trials, name).mean()) for name in ESTIMATES}
    lab.observe("diabetes: |bias| of $w$ over that of plain", bias[WEIGHT] / bias[PLAIN], "<", 1)
    lab.observe(
        "diabetes: error (RMS) of $w$ over that of plain",
        _root_mean_square(trials, WEIGHT) / _root_mean_square(trials, PLAIN),
        "<",
        1,
    )
    return trials


def _trials(lab: Lab, name: str, problem: Problem, n: int) -> list[Trial]:
    trials = []
    progress = lab.progress(range(n), name)
    for i in progress:
        trials.append(_trial(problem, TrainTestDiscriminator(), [lab.seed, i]))
        progress.metric(
            weighted=_errors(trials, WEIGHT).mean(), plain=_errors(trials, PLAIN).mean()
        )
    return trials


def _errors(trials: list[Trial], name: str) -> np.ndarray:
    return np.array([trial.estimates[name] - trial.truth for trial in trials])


def _root_mean_square(trials: list[Trial], name: str) -> float:
    return float(np.sqrt(np.mean(_errors(trials, name) ** 2)))


def _table_of_errors(lab: Lab, name: str, trials: list[Trial]) -> None:
    n_train = [int((~trial.is_test).sum()) for trial in trials]
    fraction = [
        trial.discriminator.effective_sample_size_ / n
        for trial, n in zip(trials, n_train, strict=True)
    ]
    rows = []
    for estimate in ESTIMATES:
        errors = _errors(trials, estimate)
        rows.append({
            "estimate": estimate.replace("$", ""),
            "bias": float(errors.mean()),
            "deviation": float(errors.std()),
            "RMS error": _root_mean_square(trials, estimate),
        })  # fmt: skip
    lab.table(
        name,
        rows,
        f"Error of five estimates of the test loss over {len(trials)} random shifts. The test loss "
        f"is {np.mean([t.truth for t in trials]):.4g} on average, the AUC of the discriminator "
        f"{np.mean([t.discriminator.auc_ for t in trials]):.3f}, and the weights are worth "
        f"{np.mean(fraction):.2f} of the training rows.",
    )


def _logistic(inverse_penalty: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=2000))


def _parts(lab: Lab, problem: Problem) -> None:
    n_trials = lab.pick(smoke=2, quick=6, full=30)
    variants = [
        ("neither", 1.0, {"calibrate": False, "clip": None}),
        ("neither", 0.001, {"calibrate": False, "clip": None}),
        ("calibration", 1.0, {"clip": None}),
        ("calibration and clipping", 1.0, {}),
        ("calibration and clipping", 0.01, {}),
        ("calibration and clipping", 0.001, {}),
    ]
    rows = []
    progress = lab.progress(variants, "parts")
    for with_what, inverse_penalty, parameters in progress:
        discriminator = TrainTestDiscriminator(_logistic(inverse_penalty), **parameters)
        trials = [_trial(problem, discriminator, [lab.seed, i]) for i in range(n_trials)]
        fractions = [t.discriminator.effective_sample_size_ / (~t.is_test).sum() for t in trials]
        rows.append({
            "with": with_what,
            "$C$": inverse_penalty,
            r"mean $\alpha$": float(np.mean([t.discriminator.calibration_[0] for t in trials])),
            "bias": float(_errors(trials, WEIGHT).mean()),
            "RMS error": _root_mean_square(trials, WEIGHT),
            r"least $n_{\mathrm{eff}}/n$": float(min(fractions)),
        })  # fmt: skip
        progress.metric(rms=rows[-1]["RMS error"])
    lab.table(
        "Calibration and clipping",
        rows,
        f"The $w$-weighted estimate on {n_trials} shifts of the digits, by logistic regressions "
        "with little ($C = 1$) and much ($C = 0.001$) regularisation. Left alone, one is too sure "
        "and the other too shy. Calibration corrects the scale, clipping the few largest ratios; "
        "with both, the penalty hardly matters.",
    )


def _look_at_your_table(lab: Lab) -> None:
    """The user's table: whether its second half looks like its first, and which columns moved."""
    table = lab.data.tabular()
    middle = len(table.features) // 2
    if middle < 10:
        raise DataError(f"{table.name}: expected at least 20 rows, got {len(table.features)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train and test are almost separable")
        report = drift_report(
            table.features[:middle],
            table.features[middle:],
            feature_names=table.feature_names,
            n_repeats=1,
            random_state=lab.seed,
        )
    lab.table(
        "Your table",
        [
            {
                "column": report.feature_names[j],
                "AUC alone": float(report.feature_auc[j]),
                "AUC lost without": float(report.feature_importance[j]),
            }
            for j in np.argsort(-report.feature_importance)[:20]
        ],
        f"Second half of {table.name} against the first: AUC {report.auc:.3f}, "
        f"$p$ = {report.p_value:.2g}; weighted towards the second half, the first is worth "
        f"{report.effective_sample_fraction:.2f} of its rows.",
    )


def _densities(
    gaussians: dict[float, tuple[np.ndarray, np.ndarray, TrainTestDiscriminator]],
    problem: Problem,
    trial: Trial,
) -> Figure:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    train, test, found = gaussians[1.0]
    _four_densities(left, train[:, 0], test[:, 0], found)
    left.set(xlabel="$x$", ylabel="density", xlim=(-3.5, 4.5))
    direction = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(
        problem.features, trial.is_test
    )
    projected = problem.features @ direction.coef_[0]
    projected = (projected - projected.mean()) / projected.std()
    _four_densities(right, projected[~trial.is_test], projected[trial.is_test], trial.discriminator)
    right.set(xlabel="projection")
    left.legend(frameon=False, fontsize="small", loc="upper left")
    left.set_ylim(top=1.45 * left.get_ylim()[1])
    return figure


def _four_densities(
    axes: Axes, train: np.ndarray, test: np.ndarray, found: TrainTestDiscriminator
) -> None:
    low, high = np.quantile(np.concatenate([train, test]), [0.0005, 0.9995])
    grid = np.linspace(low, high, 200)
    for rows, weights, label, style in (
        (train, np.ones(len(train)), "train, $p$", ":"),
        (test, np.ones(len(test)), "test, $q$", "-"),
        (train, found.weights_, "train, weights $w$", "--"),
        (train, found.train_scores_, "train, weights $D$", "-."),
    ):
        axes.plot(grid, _density(grid, rows, weights), style, label=label)


def _density(grid: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Kernel density with one bandwidth for all, so that only the weights make a difference."""
    bandwidth = 0.2
    kernel = norm.pdf((grid[:, None] - rows[None, :4000]) / bandwidth) / bandwidth
    return np.average(kernel, axis=1, weights=weights[:4000])


def _estimate_against_truth(trials: list[Trial]) -> Figure:
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    truth = [trial.truth for trial in trials]
    shown = (PLAIN, SCORE, WEIGHT)
    low = min(*truth, *(trial.estimates[name] for trial in trials for name in shown))
    high = max(*truth, *(trial.estimates[name] for trial in trials for name in shown))
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True)
    for i, (axes, name) in enumerate(zip(panels, shown, strict=True)):
        axes.plot([low, high], [low, high], "--", color="black", linewidth=1)
        estimates = [trial.estimates[name] for trial in trials]
        axes.scatter(truth, estimates, s=10, alpha=0.7, color=f"C{i}")
        axes.set(xlabel=f"test error\n{name}", aspect="equal")
    panels[0].set_ylabel("estimate")
    return figure


def _class_shares(problem: Problem, trial: Trial) -> Figure:
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.subplots()
    train, test = problem.target[~trial.is_test], problem.target[trial.is_test]
    found = trial.discriminator
    for i, (labels, weights, name) in enumerate((
        (train, np.ones(len(train)), "train"),
        (train, found.train_scores_, "train, weights $D$"),
        (train, found.weights_, "train, weights $w$"),
        (test, np.ones(len(test)), "test"),
    )):  # fmt: skip
        shares = np.bincount(labels.astype(int), weights=weights, minlength=10) / weights.sum()
        axes.bar(np.arange(10) + 0.2 * (i - 1.5), shares, width=0.18, label=name)
    axes.set(xticks=range(10), xlabel="digit", ylabel="share")
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="upper center")
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])
    return figure


def _error_bars(problems: dict[str, list[Trial]]) -> Figure:
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    places = np.arange(len(ESTIMATES))
    panels = figure.subplots(1, len(problems))
    for axes, (name, trials) in zip(panels, problems.items(), strict=True):
        bias = [_errors(trials, estimate).mean() for estimate in ESTIMATES]
        spread = [_root_mean_square(trials, estimate) for estimate in ESTIMATES]
        axes.bar(places - 0.2, bias, width=0.38, label="bias")
        axes.bar(places + 0.2, spread, width=0.38, label="RMS error")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(places, ESTIMATES, rotation=30, ha="right")
        axes.set_xlabel(name)
    panels[0].legend(frameon=False)
    return figure
