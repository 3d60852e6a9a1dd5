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

*Diabetes and texts.* A small table of 442 patients, with the heavy ones in the test set, where the
variance eats much of the gain. And paragraphs of the standard library, whose packages come in other
proportions; naive Bayes guesses the package, and the discriminator looks at words. Both are shown
and decide nothing.

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
from scipy.special import expit
from scipy.stats import norm
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kexue.lab import DataError, Lab
from kexue.stats.validation import TrainTestDiscriminator, drift_report

PLAIN, WEIGHT, SCORE = "plain", "weights $w$", "weights $D$"
RESAMPLED, DEDUPLICATED = "resampled", "deduplicated"
ESTIMATES = (PLAIN, WEIGHT, SCORE, RESAMPLED, DEDUPLICATED)
HARDER_DIGITS = (1, 2, 3, 8, 9)
VALIDATION_SHARE = 0.3


class Sets(NamedTuple):
    """Training rows, test rows, and what tells them apart."""

    train: np.ndarray
    test: np.ndarray
    found: TrainTestDiscriminator


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

    @property
    def effective_fraction(self) -> float:
        """Share of the training rows that the weights leave."""
        return self.discriminator.effective_sample_size_ / int((~self.is_test).sum())


def run(lab: Lab) -> None:
    """Gaussians with known answers, two tables and texts, the parts one by one."""
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
    n_diabetes, n_texts = lab.pick(smoke=(3, 1), quick=(30, 4), full=(300, 40))
    diabetes = _supporting(lab, "Diabetes", _diabetes_problem(lab), n_diabetes)
    words = make_pipeline(TfidfVectorizer(max_features=3000), LogisticRegression())
    texts = _supporting(lab, "Texts", _text_problem(lab), n_texts, words)
    lab.figure(
        "errors",
        _error_bars({"digits": trials, "diabetes": diabetes, "texts": texts}),
        "Bias and root mean square error of the estimates of the test loss: error rate, squared "
        "error, error rate.",
    )
    _parts(lab, digits)
    if lab.data.path is not None:
        _look_at_your_table(lab)


def _gaussians(lab: Lab) -> Sets:
    n = lab.pick(smoke=500, quick=20_000, full=20_000)
    rng = np.random.default_rng(lab.seed)
    rows = []
    misses: dict[str, list[float]] = {WEIGHT: [], SCORE: []}
    for shift in (0.5, 1.0, 2.0):
        train, test = rng.normal(0, 1, (n, 1)), rng.normal(shift, 1, (n, 1))
        sets = _fit(TrainTestDiscriminator(clip=None, random_state=lab.seed), train, test)
        found = sets.found
        by_weight = float(np.average(train[:, 0], weights=found.weights_))
        by_score = float(np.average(train[:, 0], weights=found.train_scores_))
        share, exact_auc = found.effective_sample_size_ / n, norm.cdf(shift / math.sqrt(2))
        for name, *numbers in (
            ("measured", found.auc_, share, by_weight, by_score, found.calibration_[0]),
            ("exact", exact_auc, math.exp(-(shift**2)), shift, shift / 2, 1.0),
        ):
            columns = ("AUC", r"$n_{\mathrm{eff}}/n$", "$w$-mean", "$D$-mean", r"$\alpha$")
            rows.append({r"$\mu$": shift, "": name, **dict(zip(columns, numbers, strict=True))})
        if shift <= 1:
            misses[WEIGHT].append(abs(by_weight - shift))
            misses[SCORE].append(abs(by_score - shift / 2))
            shown = sets
    lab.table(
        "Gaussians",
        rows,
        f"{n} training rows of $\\mathcal{{N}}(0, 1)$ and as many test rows of $\\mathcal{{N}}"
        r"(\mu, 1)$, weights not clipped. At $\mu = 2$ one row in fifty counts.",
    )
    largest = r"gaussians, $\mu \le 1$: largest miss of"
    lab.claim(rf"{largest} $\mu$ by the $w$-mean", max(misses[WEIGHT]), "<=", 0.06)
    lab.claim(rf"{largest} $\mu/2$ by the $D$-mean", max(misses[SCORE]), "<=", 0.03)
    return shown


def _fit(found: TrainTestDiscriminator, train: np.ndarray, test: np.ndarray) -> Sets:
    """Separation is part of what is measured here, and needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train and test are almost separable")
        return Sets(train, test, found.fit(train, test))


def _trial(problem: Problem, discriminator: TrainTestDiscriminator, seed: list[int]) -> Trial:
    rng = np.random.default_rng(seed)
    is_test = rng.random(len(problem.target)) < problem.test_chance
    X, y = problem.features[~is_test], problem.target[~is_test]
    seeded = clone(discriminator).set_params(random_state=int(rng.integers(2**31)))
    _, X_test, found = _fit(seeded, X, problem.features[is_test])
    shuffled = rng.permutation(len(y))
    validation, train = np.split(shuffled, [round(VALIDATION_SHARE * len(y))])
    model = clone(problem.model).fit(X[train], y[train])
    truth = problem.loss(model.predict(X_test), problem.target[is_test]).mean()

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
    n_trials = lab.pick(smoke=3, quick=80, full=300)
    trials = _trials(lab, "Digits", problem, n_trials)
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
    bias, spread = _bias_and_spread(trials)
    lab.claim("digits: |bias| of $w$ over that of $D$", bias[WEIGHT] / bias[SCORE], "<=", 0.6)
    lab.claim("digits: |bias| of $D$ over that of plain", bias[SCORE] / bias[PLAIN], "<", 1)
    rms_ratio = spread[WEIGHT] / spread[PLAIN]
    lab.claim("digits: error (RMS) of $w$ over that of plain", rms_ratio, "<=", 0.65)
    without = bias[DEDUPLICATED] / bias[RESAMPLED]
    lab.claim("digits: |bias| without duplicates over that with them", without, ">=", 2)
    return trials


def _diabetes_problem(lab: Lab) -> Problem:
    table = lab.data.tabular("diabetes")
    weight = table.features[:, table.feature_names.index("bmi")]
    chance = expit((weight - weight.mean()) / weight.std())
    return Problem(table.features, table.target, chance, Ridge(1.0), lambda a, b: (a - b) ** 2)


def _text_problem(lab: Lab) -> Problem:
    """Which package of the standard library is a paragraph from?"""
    texts: list[str] = []
    packages: list[int] = []
    for k, source in enumerate(lab.data.python_source().values()):
        paragraphs = [p for p in source.split("\n\n") if len(p) > 200]
        chosen = np.random.default_rng(k).permutation(len(paragraphs))[:150]
        texts += [paragraphs[i] for i in chosen]
        packages += [k] * len(chosen)
    target = np.array(packages)
    chance = np.where(target % 2 == 0, 0.8, 0.2)
    model = make_pipeline(CountVectorizer(max_features=3000), MultinomialNB())
    return Problem(np.array(texts, dtype=object), target, chance, model, np.not_equal)


def _supporting(
    lab: Lab, name: str, problem: Problem, n: int, estimator: Any = None
) -> list[Trial]:
    """The same estimates elsewhere, reported and not judged."""
    trials = _trials(lab, name, problem, n, estimator)
    _table_of_errors(lab, name, trials)
    for what, error in zip(("|bias|", "error (RMS)"), _bias_and_spread(trials), strict=True):
        statement = f"{name.lower()}: {what} of $w$ over that of plain"
        lab.observe(statement, error[WEIGHT] / error[PLAIN], "<", 1)
    return trials


def _trials(lab: Lab, name: str, problem: Problem, n: int, estimator: Any = None) -> list[Trial]:
    trials = []
    progress = lab.progress(range(n), name)
    for i in progress:
        trials.append(_trial(problem, TrainTestDiscriminator(estimator), [lab.seed, i]))
        progress.metric(bias=_errors(trials, WEIGHT).mean(), plain=_errors(trials, PLAIN).mean())
    return trials


def _errors(trials: list[Trial], name: str) -> np.ndarray:
    return np.array([trial.estimates[name] - trial.truth for trial in trials])


def _bias_and_spread(trials: list[Trial]) -> tuple[dict[str, float], dict[str, float]]:
    """Size of the mean error and root mean square error of each estimate."""
    errors = {name: _errors(trials, name) for name in ESTIMATES}
    bias = {name: abs(float(error.mean())) for name, error in errors.items()}
    return bias, {name: float(np.sqrt(np.mean(error**2))) for name, error in errors.items()}


def _table_of_errors(lab: Lab, name: str, trials: list[Trial]) -> None:
    rows = []
    _, spread = _bias_and_spread(trials)
    for estimate in ESTIMATES:
        errors = _errors(trials, estimate)
        rows.append({
            "estimate": estimate.replace("$", ""),
            "bias": float(errors.mean()),
            "deviation": float(errors.std()),
            "RMS error": spread[estimate],
        })  # fmt: skip
    lab.table(
        name,
        rows,
        f"Error of five estimates of the test loss over {len(trials)} random shifts. The test loss "
        f"is {np.mean([t.truth for t in trials]):.4g} on average, the AUC of the discriminator "
        f"{np.mean([t.discriminator.auc_ for t in trials]):.3f}, and the weights are worth "
        f"{np.mean([t.effective_fraction for t in trials]):.2f} of the training rows.",
    )


def _parts(lab: Lab, problem: Problem) -> None:
    n_trials = lab.pick(smoke=2, quick=8, full=30)
    neither, both = {"calibrate": False, "clip": None}, "calibration and clipping"
    variants = [("neither", 1.0, neither), ("neither", 0.001, neither)]
    variants += [("calibration", 1.0, {"clip": None})]
    variants += [(both, inverse_penalty, {}) for inverse_penalty in (1.0, 0.01, 0.001)]
    rows = []
    progress = lab.progress(variants, "parts")
    for with_what, inverse_penalty, parameters in progress:
        logistic = LogisticRegression(C=inverse_penalty, max_iter=2000)
        discriminator = TrainTestDiscriminator(
            make_pipeline(StandardScaler(), logistic), **parameters
        )
        trials = [_trial(problem, discriminator, [lab.seed, i]) for i in range(n_trials)]
        rows.append({
            "with": with_what,
            "$C$": inverse_penalty,
            r"mean $\alpha$": float(np.mean([t.discriminator.calibration_[0] for t in trials])),
            "bias": float(_errors(trials, WEIGHT).mean()),
            "RMS error": _bias_and_spread(trials)[1][WEIGHT],
            r"least $n_{\mathrm{eff}}/n$": min(t.effective_fraction for t in trials),
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
    halves = table.features[:middle], table.features[middle:]
    report = drift_report(
        *halves, feature_names=table.feature_names, n_repeats=1, random_state=lab.seed
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


def _densities(gaussians: Sets, problem: Problem, trial: Trial) -> Figure:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _four_densities(left, Sets(gaussians.train[:, 0], gaussians.test[:, 0], gaussians.found))
    left.set(xlabel="$x$", ylabel="density", xlim=(-3.5, 4.5))
    direction = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(
        problem.features, trial.is_test
    )
    projected = problem.features @ direction.coef_[0]
    projected = (projected - projected.mean()) / projected.std()
    train, test = projected[~trial.is_test], projected[trial.is_test]
    _four_densities(right, Sets(train, test, trial.discriminator))
    right.set(xlabel="projection")
    left.legend(frameon=False, fontsize="small", loc="upper left")
    left.set_ylim(top=1.45 * left.get_ylim()[1])
    return figure


def _four_densities(axes: Axes, sets: Sets) -> None:
    train, test, found = sets
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
        _, spread = _bias_and_spread(trials)
        axes.bar(places - 0.2, bias, width=0.38, label="bias")
        axes.bar(places + 0.2, list(spread.values()), width=0.38, label="RMS error")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(places, ESTIMATES, rotation=50, ha="right", fontsize="small")
        axes.set_xlabel(name)
    panels[0].set_ylim(top=1.5 * panels[0].get_ylim()[1])
    panels[0].legend(frameon=False, fontsize="small")
    return figure
