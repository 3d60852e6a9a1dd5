"""Adversarial validation against densratio; overhead over the classifier; splits of many rows."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.timing import Comparison, measure
from kexue.stats.validation import AdversarialShuffleSplit, TrainTestDiscriminator, drift_report


def main() -> None:
    for n, dimension, target in ((1000, 1, None), (1000, 5, 20.0)):
        density_ratio(n, dimension, target)
    for n, dimension in ((20_000, 1), (3000, 64)):
        overhead(n, dimension)
    splits()
    report()


def draw(n: int, dimension: int, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Two gaussian sets; only the first column moves."""
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((2, n, dimension))
    test[:, 0] += shift
    return train, test


def density_ratio(n: int, dimension: int, target: float | None) -> None:
    """densratio takes many seconds, so that one run of it tells enough."""
    try:
        from densratio import densratio
    except ImportError:
        print("densratio is not installed: pip install densratio")
        return
    train, test = draw(n, dimension)
    truth = np.exp(train[:, 0] - 0.5)

    def ours() -> np.ndarray:
        return TrainTestDiscriminator(clip=None, random_state=0).fit(train, test).weights_

    seconds = measure(ours, repeats=3)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = densratio(test, train, verbose=False)
        theirs = fitted.compute_density_ratio(train)
    their_seconds = time.perf_counter() - start
    what = f"weights, n = {n} + {n}, d = {dimension}, against densratio"
    print(Comparison(what, seconds, their_seconds, float("nan"), target), flush=True)
    for name, weights in (("ours", ours()), ("densratio", np.ravel(theirs))):
        correlation = np.corrcoef(weights, truth)[0, 1]
        mean = np.average(train[:, 0], weights=weights)
        print(f"  {name}: correlation with the true ratio {correlation:.3f}, "
              f"weighted mean {mean:.3f} (true 1)", flush=True)  # fmt: skip


def overhead(n: int, dimension: int) -> None:
    """What we add to the fits and predictions themselves."""
    train, test = draw(n, dimension)
    rows, domain = np.concatenate([train, test]), np.repeat([0, 1], n)
    estimator = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(rows, domain))
    parts = [(rows[a], domain[a], rows[b]) for a, b in folds]

    def bare() -> list[Any]:
        return [clone(estimator).fit(x, y).predict_proba(z) for x, y, z in parts]

    def ours() -> TrainTestDiscriminator:
        return TrainTestDiscriminator(estimator, random_state=0).fit(train, test)

    # In turns, because the machine may slow down between two measurements.
    times = np.array([
        [measure(function, repeats=1) for function in (bare, ours)] for _ in range(9)
    ])  # fmt: skip
    bare_time, our_time = np.median(times, axis=0)
    print(
        f"fit, n = {n} + {n}, d = {dimension}: {our_time * 1e3:.1f} ms, of which fits and "
        f"predictions {bare_time * 1e3:.1f} ms; overhead {100 * (our_time / bare_time - 1):.0f} %, "
        "allowed 20 %",
        flush=True,
    )


def splits() -> None:
    weights = np.random.default_rng(0).exponential(size=100_000)
    splitter = AdversarialShuffleSplit(weights, n_splits=100, random_state=0)
    seconds = measure(lambda: sum(len(train) for train, _ in splitter.split(weights)), repeats=3)
    print(f"100 splits of 100000 rows: {seconds:.2f} s, allowed 3 s", flush=True)


def report() -> None:
    train, test = draw(3000, 10)
    seconds = measure(lambda: drift_report(train, test, random_state=0), repeats=3)
    print(f"drift report of 3000 + 3000 rows, 10 columns: {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
