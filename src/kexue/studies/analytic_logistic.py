r"""Logistic regression in closed form.

Least squares has a formula; logistic regression, which differs from it by one nonlinearity, is
trained by iterations. Must it be? Under maximum likelihood, yes. But the likelihood is a choice,
and so is the model of the data. Assume a little more about the data, and the weights of a softmax
layer follow from class means, one covariance and class frequencies.

## What a normal distribution costs a linear model

Take linear regression first. Let $(x, y)$ be jointly normal; rows are vectors. Then

$$\mathbb{E}[y \mid x] = \mu_y + (x - \mu_x)\,\Sigma_{xx}^{-1}\Sigma_{xy},$$

which is least squares, exactly, although least squares needs no such assumption. The squared error
sees nothing but moments up to order two, and a normal distribution can have any of those. So a
linear model loses little when its data are taken for normal.

## Two classes, then many

Logistic regression says $\ln\frac{p(1|x)}{p(0|x)} = x w^\top + b$. Bayes' rule says that this is
$\ln\frac{p(x|1)\,p_1}{p(x|0)\,p_0}$. With $p(x|k) = N(\mu_k, \Sigma)$ the terms quadratic in $x$
cancel, and what is left is linear:

$$w = (\mu_1 - \mu_0)\,\Sigma^{-1}, \qquad
b = \tfrac12\big(\mu_0\Sigma^{-1}\mu_0^\top - \mu_1\Sigma^{-1}\mu_1^\top\big)
  + \ln\frac{p_1}{p_0}.$$

The converse is worth a thought: if classes are normal and the log-odds are linear, the quadratic
terms *must* cancel, so the covariances are equal. Whoever chose logistic regression has already
assumed that. For any number of classes the softmax of

$$w_k = \mu_k\Sigma^{-1}, \qquad b_k = \ln p_k - \tfrac12\,\mu_k\Sigma^{-1}\mu_k^\top$$

is the posterior; a vector common to all $w_k$ changes nothing.

## The covariance is that within classes

$\Sigma$ is the covariance of $x$ around the mean *of its own class*. With the mean $\tilde\mu$ and
covariance $\tilde\Sigma$ of all data, both with divisor $N$,

$$\Sigma = \tilde\Sigma + \tilde\mu^\top\tilde\mu - \sum_k p_k\,\mu_k^\top\mu_k .$$

Putting the total covariance in its place is an easy slip, and a quiet one: for two classes, with
$\delta = \mu_1 - \mu_0$, the Sherman–Morrison formula gives

$$\delta\,\tilde\Sigma^{-1}
= \frac{\delta\,\Sigma^{-1}}{1 + p_0 p_1\,\delta\Sigma^{-1}\delta^\top},$$

the same direction with a smaller length. Accuracy hardly suffers; the probabilities are too timid,
and the threshold is wrong unless both classes are equally frequent.

Counts, means and scatter are sums. They stream, they merge, and the merged model is *the* model of
all data: what takes gradient descent many passes takes one, on shards that may never meet. The
model itself is old: it is linear discriminant analysis with the covariance of divisor $N$.

## Few samples, and too few

The normal distribution acts as a prior: it fills in the samples that were not drawn. Maximum
likelihood has nothing of the kind. It separates a few points perfectly, which makes the likelihood
grow without bound along a direction that the accidents of those points have chosen. The article
reports that on four Chinese text sets: with 1000 training samples the closed form is ahead on all
four (72.67 against 66.08 percent, 15.70 against 15.43, 26.74 against 22.47, 65.49 against 49.82),
with all data on two, and its training accuracy is nearer to its validation accuracy.

With $d$ features and $n < 2d$ samples, though, $\Sigma$ itself is mostly noise, and its inverse
worse. Then the correlations are shrunk towards 0 by as much as the oracle approximating estimator
(OAS) says; of all ways to choose that amount it is one that needs second moments only, so that it
works on merged sums as well.

## What is measured

*Text*: paragraphs of the source code of twelve packages of the standard library; the class is the
package. TF-IDF of words, 128 singular vectors, fitted without labels on the pool from which the
training samples are drawn: frozen features under a linear head, as one uses them. *Pixels and
tables*: digits, breast cancer, wine, standardised by the training samples. On both, the accuracy on
samples not seen, for training sets of different size drawn with different seeds.

Maximum likelihood is scikit-learn's logistic regression with $C = 10^6$, a penalty in name only; it
gets as many iterations as it asks for at the default tolerance. Two more arms stand there for
honesty: logistic regression with its default penalty, $C = 1$, and discriminant analysis with
Ledoit–Wolf shrinkage.

The claim holds if the closed form is at least two points above maximum likelihood on text with 500
and 1000 samples, if its shrunk form is at most one point below it on digits from 100 samples on,
and if its train–test gap is the smaller one wherever there are 400 samples or more.

The reader should see the closed form lead on text, lose badly where samples are fewer than twice
the features, and get that back from shrinkage; and see a modest penalty do better than either on
pixels, and on text once there are thousands of samples. The comparison is with *maximum
likelihood*, not with every way to train a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from kexue.lab import DataError, Lab
from kexue.stats.logistic import AnalyticLogisticRegression

PLAIN, OAS, LIKELIHOOD = "closed form", "closed form, OAS", "maximum likelihood"
PENALISED, LEDOIT_WOLF = "logistic, $C = 1$", "LDA, Ledoit–Wolf"
TEXT, DIGITS, CANCER, WINE, YOURS = "text", "digits", "breast cancer", "wine", "your table"
MARKERS = {PLAIN: "o", OAS: "s", LIKELIHOOD: "^", PENALISED: "v", LEDOIT_WOLF: "D"}

Sample = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Scores = dict[tuple[str, int, str], "Score"]


class Score(NamedTuple):
    """Accuracies of one arm, one entry a seed."""

    train: np.ndarray
    test: np.ndarray

    @property
    def gap(self) -> float:
        return float(np.mean(self.train - self.test))


@dataclass(frozen=True)
class Task:
    """A data set and the sizes of training sets; `pool` is where training sets are drawn from."""

    name: str
    sizes: tuple[int, ...]
    pool: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray] | None = None

    def draw(self, n: int, seed: int) -> Sample:
        """Training and test samples; without a test set of its own, the rest of the pool."""
        X, rest, y, rest_y = train_test_split(
            *self.pool, train_size=n, stratify=self.pool[1], random_state=seed
        )
        if self.test is not None:
            return X, y, *self.test
        scaler = StandardScaler().fit(X)
        return scaler.transform(X), y, scaler.transform(rest), rest_y


def run(lab: Lab) -> None:
    """Score all arms on all training sets, then look at lines and probabilities."""
    # Thousands of products of small matrices, which threads only slow down.
    with threadpool_limits(1):
        tasks = _tasks(lab)
        seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=2, full=5))]
        scores = _scores(lab, tasks, seeds)
        _report_accuracy(lab, tasks, scores, len(seeds))
        _judge(lab, scores)
        _report_yours(lab, tasks, scores)
        _report_calibration(lab, tasks[0])
        _report_lines(lab)


def _arms() -> dict[str, Any]:
    return {
        PLAIN: AnalyticLogisticRegression(),
        OAS: AnalyticLogisticRegression(shrinkage="oas"),
        LIKELIHOOD: LogisticRegression(C=1e6, max_iter=10_000),
        PENALISED: LogisticRegression(C=1.0, max_iter=10_000),
        LEDOIT_WOLF: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    }


def _tasks(lab: Lab) -> list[Task]:
    modules = lab.pick(smoke=["email", "unittest", "xml"], quick=None, full=None)
    text = lab.cache(
        "text-features",
        lambda: text_features(lab.data.python_source(modules), seed=lab.seed),
    )
    tasks = [
        Task(
            TEXT,
            lab.pick(smoke=(500, 1000), quick=(200, 500, 1000), full=(200, 500, 1000, 3000)),
            (text["pool"], text["pool_label"]),
            (text["test"], text["test_label"]),
        ),
        _table(
            lab, DIGITS, lab.pick(smoke=(100, 400), quick=(30, 100, 400), full=(30, 100, 400, 1200))
        ),
    ]
    if lab.budget == "full":
        tasks += [_table(lab, CANCER, (40, 100, 400)), _table(lab, WINE, (20, 60, 120))]
    if lab.data.path is not None:
        tasks.append(_yours(lab))
    return tasks


def _table(lab: Lab, name: str, sizes: tuple[int, ...]) -> Task:
    table = lab.data.tabular(name.replace(" ", "_"))
    return Task(name, sizes, (table.features, table.target))


def _yours(lab: Lab) -> Task:
    """The user's table, of which one half is for training."""
    table = lab.data.tabular()
    kind = type_of_target(table.target)
    if kind not in ("binary", "multiclass"):
        raise DataError(f"{table.name}: expected classes as the target, got {kind} numbers")
    count = np.unique(table.target, return_counts=True)[1]
    if len(count) < 2 or count.min() < 2:
        raise DataError(
            f"{table.name}: expected at least two classes of at least two rows each, "
            f"got {len(count)} classes, the smallest with {count.min()} row"
        )
    return Task(YOURS, (len(table.target) // 2,), (table.features, table.target))


def text_features(packages: Mapping[str, str], *, seed: int) -> dict[str, np.ndarray]:
    """Return latent semantic features of paragraphs of source code, fitted on the pool."""
    paragraphs, labels = [], []
    for label, source in enumerate(packages.values()):
        long = [text for text in re.split(r"\n\s*\n", source) if len(text) > 120][:600]
        paragraphs += long
        labels += [label] * len(long)
    pool, test, pool_label, test_label = train_test_split(
        paragraphs, np.array(labels), test_size=1 / 3, stratify=labels, random_state=seed
    )
    words = TfidfVectorizer(token_pattern=r"[A-Za-z_]{2,}", max_features=5000, sublinear_tf=True)
    directions = TruncatedSVD(128, random_state=0)
    pool = directions.fit_transform(words.fit_transform(pool))
    test = directions.transform(words.transform(test))
    centre, scale = pool.mean(axis=0), pool.std()
    return {
        "pool": (pool - centre) / scale,
        "pool_label": pool_label,
        "test": (test - centre) / scale,
        "test_label": test_label,
    }


def _scores(lab: Lab, tasks: list[Task], seeds: list[int]) -> Scores:
    draws = [(task, n) for task in tasks for n in task.sizes]
    found = {}
    bar = lab.progress(draws, "training sets")
    for task, n in bar:
        samples = [task.draw(n, seed) for seed in seeds]
        for arm, model in _arms().items():
            accuracies = [_accuracies(model, *sample) for sample in samples]
            found[task.name, n, arm] = Score(*np.transpose(accuracies))
            bar.metric(accuracy=found[task.name, n, arm].test.mean())
    return found


def _accuracies(
    model: Any, X: np.ndarray, y: np.ndarray, test: np.ndarray, test_y: np.ndarray
) -> tuple[float, float]:
    model.fit(X, y)
    return model.score(X, y), model.score(test, test_y)


def _report_accuracy(lab: Lab, tasks: list[Task], scores: Scores, n_seeds: int) -> None:
    for name, measure, caption in (
        ("Test accuracy", lambda score: score.test.mean(), "Accuracy on samples not seen"),
        ("Train–test gap", lambda score: score.gap, "Training accuracy minus test accuracy"),
    ):
        rows = [
            {
                "data": task.name,
                "$d$": task.pool[0].shape[1],
                "$n$": n,
                **{arm: f"{measure(scores[task.name, n, arm]):.3f}" for arm in _arms()},
            }
            for task in tasks
            for n in task.sizes
        ]
        lab.table(name, rows, f"{caption}, mean of {n_seeds} training sets of size $n$.")
    lab.figure(
        "accuracy",
        _curves(tasks, scores, lambda score: score.test, "test accuracy"),
        "Test accuracy against the number of training samples; bars are standard errors over "
        "training sets. The dotted line is $n = 2d$: left of it the plain closed form breaks down.",
    )
    lab.figure(
        "gap",
        _curves(tasks, scores, lambda score: score.train - score.test, "train–test gap"),
        "Training accuracy minus test accuracy. Maximum likelihood fits its samples perfectly "
        "wherever it can.",
    )


def _judge(lab: Lab, scores: Scores) -> None:
    def lead(arm: str, rival: str, task: str, n: int) -> float:
        return float(np.mean(scores[task, n, arm].test - scores[task, n, rival].test))

    for n in (500, 1000):
        lab.claim(
            f"text, $n = {n}$: test accuracy of the closed form minus that of maximum likelihood",
            lead(PLAIN, LIKELIHOOD, TEXT, n),
            ">=",
            0.02,
        )
    digits = [n for task, n, arm in scores if task == DIGITS and arm == OAS]
    lab.claim(
        r"digits, smallest over $n \ge 100$: test accuracy of the closed form with OAS minus that "
        "of maximum likelihood",
        min(lead(OAS, LIKELIHOOD, DIGITS, n) for n in digits if n >= 100),
        ">=",
        -0.01,
    )

    def widest(arm: str) -> float:
        return max(
            score.gap - scores[task, n, LIKELIHOOD].gap
            for (task, n, this), score in scores.items()
            if this == arm and n >= 400 and task != YOURS
        )

    statement = (
        r"largest over all data and $n \ge 400$: train–test gap of the {} minus that of "
        + ("maximum likelihood")
    )
    lab.claim(statement.format(PLAIN), widest(PLAIN), "<", 0.0)
    lab.observe(statement.format(OAS), widest(OAS), "<", 0.0)
    lab.observe(
        "digits, $n = 100 < 2d$: test accuracy of the closed form without shrinkage minus that of "
        "maximum likelihood",
        lead(PLAIN, LIKELIHOOD, DIGITS, 100),
        ">=",
        -0.01,
    )
    for task, n in ((TEXT, 1000), (DIGITS, 400)):
        best = max(lead(arm, PENALISED, task, n) for arm in (PLAIN, OAS))
        lab.observe(
            f"{task}, $n = {n}$: better closed form minus logistic regression with $C = 1$",
            best,
            ">=",
            0.0,
        )


def _report_yours(lab: Lab, tasks: list[Task], scores: Scores) -> None:
    for task in (task for task in tasks if task.name == YOURS):
        (n,) = task.sizes
        for arm in (PLAIN, OAS):
            difference = scores[YOURS, n, arm].test - scores[YOURS, n, LIKELIHOOD].test
            lab.observe(
                f"your table, $n = {n}$: test accuracy of the {arm} minus that of maximum "
                "likelihood",
                float(difference.mean()),
                ">=",
                0.0,
            )


def _report_calibration(lab: Lab, text: Task) -> None:
    X, y, test, test_y = text.draw(1000, lab.seed)
    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    error = {}
    arms = _arms()
    for arm in (PLAIN, OAS, LIKELIHOOD, PENALISED):
        probability = arms[arm].fit(X, y).predict_proba(test)
        confidence = probability.max(axis=1)
        right = arms[arm].classes_[probability.argmax(axis=1)] == test_y
        bins = list(_reliability(confidence, right))
        error[arm] = sum(share * abs(said - true) for share, said, true in bins)
        # The share of a handful of samples says nothing.
        shown = np.array([(said, true) for share, said, true in bins if share * len(right) >= 10])
        axes.plot(*shown.T, marker=MARKERS[arm], label=arm)
    axes.set(xlabel="probability of the predicted class", ylabel="share of right predictions")
    axes.legend()
    lab.figure(
        "reliability",
        figure,
        "Text, 1000 training samples: what the models say and how often they are right. On the "
        "dotted line both agree; below it a model is too sure of itself. Tenths with at least ten "
        "samples.",
    )
    lab.observe(
        "text, $n = 1000$: expected calibration error of the closed form minus that of maximum "
        "likelihood",
        error[PLAIN] - error[LIKELIHOOD],
        "<",
        0.0,
    )


def _reliability(
    confidence: np.ndarray, right: np.ndarray, n_bins: int = 10
) -> Iterator[tuple[float, float, float]]:
    """Share of samples, mean confidence and accuracy of each bin of confidence that has any."""
    index = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    for k in np.unique(index):
        here = index == k
        yield float(here.mean()), float(confidence[here].mean()), float(right[here].mean())


def _curves(tasks: list[Task], scores: Scores, measure: Any, label: str) -> Figure:
    shown = [task for task in tasks if len(task.sizes) > 1]
    figure = Figure(figsize=(3.6 * min(len(shown), 2), 3.1 * -(-len(shown) // 2) + 0.5))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(-(-len(shown) // 2), min(len(shown), 2), squeeze=False).ravel()
    for axes, task in zip(panels, shown, strict=False):
        for arm, marker in MARKERS.items():
            values = [measure(scores[task.name, n, arm]) for n in task.sizes]
            axes.errorbar(
                task.sizes,
                [value.mean() for value in values],
                # With one seed there is no spread to show.
                [value.std(ddof=min(1, len(value) - 1)) / len(value) ** 0.5 for value in values],
                marker=marker,
                capsize=2,
                label=arm,
            )
        d = task.pool[0].shape[1]
        axes.axvline(2 * d, color="black", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel=f"training samples $n$, {task.name}", ylabel=label)
        axes.set_xticks(task.sizes, [str(n) for n in task.sizes])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _report_lines(lab: Lab, n_sets: int = 40, n: int = 12) -> None:
    """Decision lines of many small training sets from the same two normal classes."""
    rng = np.random.default_rng(lab.seed)
    root = np.linalg.cholesky(np.array([[1.0, 0.7], [0.7, 1.5]]))
    means = np.array([[-0.9, 0.4], [0.9, -0.4]])
    y = np.repeat([0, 1], n // 2)
    sets = [rng.normal(size=(n, 2)) @ root.T + means[y] for _ in range(n_sets)]

    def error(w: np.ndarray, b: float) -> float:
        distance = (means @ w + b) / np.linalg.norm(w @ root)
        return float(norm.cdf([distance[0], -distance[1]]).mean())

    across = np.array([-4.0, 4.0])
    best = (means[1] - means[0]) @ np.linalg.inv(root @ root.T)
    errors = {}
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    for axes, arm in zip(figure.subplots(1, 2, sharey=True), (PLAIN, LIKELIHOOD), strict=True):
        models = [_arms()[arm].fit(X, y) for X in sets]
        lines = [(model.coef_[0], model.intercept_[0]) for model in models]
        errors[arm] = np.mean([error(w, b) for w, b in lines])
        for w, b in lines:
            axes.plot(across, -(w[0] * across + b) / w[1], color="C0", alpha=0.3, linewidth=0.8)
        for k, marker in ((0, "o"), (1, "^")):
            axes.plot(*sets[0][y == k].T, marker, color=f"C{k + 1}", label=f"class {k}, first set")
        axes.plot(across, -best[0] * across / best[1], color="black", label="best line")
        axes.set(xlabel=f"$x_1$, {arm}", xlim=across, ylim=across)
    figure.axes[0].set_ylabel("$x_2$")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    lab.figure(
        "lines",
        figure,
        f"The lines that {n_sets} training sets of {n} points give, and the best one. Exact error "
        f"rates, mean of all sets: closed form {errors[PLAIN]:.1%}, maximum likelihood "
        f"{errors[LIKELIHOOD]:.1%}, best line {error(best, 0.0):.1%}.",
    )
