"""Closed-form logistic regression against scikit-learn's discriminants and logistic regression."""

from __future__ import annotations

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from benchmarks.timing import compare
from kexue.lab import Data
from kexue.stats.logistic import AnalyticLogisticRegression
from kexue.studies.analytic_logistic import text_features

CLASSES = 10
BATCHES = 100


def samples(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(CLASSES, size=n)
    # Classes overlap, as features of real data do: iterations have something to do.
    return rng.normal(size=(n, d)) + 2 * rng.normal(size=(CLASSES, d))[y] / np.sqrt(d), y


def ours(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    coef = AnalyticLogisticRegression().fit(X, y).coef_
    return coef - coef[0]


def streamed(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    model = AnalyticLogisticRegression()
    for part, labels in zip(np.array_split(X, BATCHES), np.array_split(y, BATCHES), strict=True):
        model.partial_fit(part, labels, classes=range(CLASSES))
    return model.coef_ - model.coef_[0]


def discriminant(X: np.ndarray, y: np.ndarray, solver: str) -> np.ndarray:
    coef = LinearDiscriminantAnalysis(solver=solver).fit(X, y).coef_
    return coef - coef[0]


def main() -> None:
    X, y = samples(100_000, 256)
    shape = f"{len(X)} x {X.shape[1]}"
    for solver, target in (("lsqr", 1.0), ("svd", 5.0)):
        compare(
            f"fit {shape}, theirs LDA({solver})",
            lambda: ours(X, y),
            lambda solver=solver: discriminant(X, y, solver),
            # Older releases give the svd solver the divisor N - K.
            agree=2 * CLASSES / len(X) if solver == "svd" else 1e-9,
            target=target,
            repeats=5,
        )
    compare(
        f"{BATCHES} calls of partial_fit on {shape}, theirs one fit",
        lambda: streamed(X, y),
        lambda: ours(X, y),
        agree=1e-9,
        target=1 / 1.5,
        repeats=5,
    )

    X, y = samples(20_000, 100)
    against_logistic_regression("fit 20000 x 100", X, y, X, y, C=1.0, target=4.0)
    text = text_features(Data().python_source(), seed=0)
    X, _, y, _ = train_test_split(
        text["pool"],
        text["pool_label"],
        train_size=3000,
        stratify=text["pool_label"],
        random_state=0,
    )
    against_logistic_regression(
        "fit text 3000 x 128", X, y, text["test"], text["test_label"], C=1e6, target=50.0
    )


def against_logistic_regression(
    what: str,
    X: np.ndarray,
    y: np.ndarray,
    test: np.ndarray,
    test_y: np.ndarray,
    *,
    C: float,
    target: float,
) -> None:
    """Another estimate of the same model, so accuracies are compared and not coefficients."""
    models = [AnalyticLogisticRegression(), LogisticRegression(C=C, max_iter=10_000)]
    accuracy = [model.fit(X, y).score(test, test_y) for model in models]
    compare(
        f"{what}, theirs LogisticRegression(C={C:g})",
        lambda: models[0].fit(X, y),
        lambda: models[1].fit(X, y),
        agree=None,
        target=target,
        repeats=5,
    )
    print(f"  accuracy: ours {accuracy[0]:.4f}, theirs {accuracy[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
