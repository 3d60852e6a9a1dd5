"""Rows of `kexue.stats.validation`."""

from typing import Any

import numpy as np
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from contract.row import Arguments, Row
from kexue.stats.validation import (
    AdversarialShuffleSplit,
    DriftReport,
    TrainTestDiscriminator,
    drift_report,
)

# Solved to the end, so that float32 and float64 stop at the same minimum.
LOGISTIC = LogisticRegression(tol=1e-8, solver="newton-cholesky")


def two_sets(rng: np.random.Generator) -> Arguments:
    return {
        "X_train": rng.normal(size=(60, 3)),
        "X_test": rng.normal(0.5, 1.0, size=(40, 3)),
        "estimator": LOGISTIC,
        "random_state": 0,
    }


def ratios(X_train: Any, X_test: Any, **parameters: Any) -> list[Any]:
    found = TrainTestDiscriminator(**parameters).fit(X_train, X_test)
    return [found.weights_, found.test_scores_, found.density_ratio(X_test), found.p_value_]


def splits(X: Any, **parameters: Any) -> list[Any]:
    return list(AdversarialShuffleSplit(**parameters).split(X))


WRONG_SETS = {
    "a feature too few": lambda given: {**given, "X_test": given["X_test"][:, :2]},
    "three test rows": lambda given: {**given, "X_test": given["X_test"][:3]},
    "one fold": lambda given: {**given, "cv": 1},
    "a classifier without probabilities": lambda given: {**given, "estimator": Ridge()},
    "texts and numbers": lambda given: {**given, "X_test": ["sea", "city"] * 20},
}
WRONG_WEIGHTS = {
    "a weight too few": lambda given: {**given, "weights": given["weights"][:-1]},
    "a negative weight": lambda given: {**given, "weights": given["weights"] - 1},
    "no weight": lambda given: {**given, "weights": given["weights"] * 0},
    "words": lambda given: {**given, "weights": ["heavy"] * len(given["weights"])},
}

ROWS = [
    Row(
        name="kexue.stats.validation.discriminator.TrainTestDiscriminator",
        make=two_sets,
        call=ratios,
        arrays=("X_train", "X_test"),
        backends=("numpy",),
        seeded="random_state",
        wrong={
            **WRONG_SETS,
            "no clip": lambda given: {**given, "clip": 0.0},
            "unknown balance": lambda given: {**given, "balance": "weights"},
        },
        instance=lambda: TrainTestDiscriminator(random_state=0).fit(
            np.linspace(0, 1, 40)[:, None], np.linspace(0.2, 1.2, 40)[:, None]
        ),
    ),
    Row(
        name="kexue.stats.validation.drift.drift_report",
        make=two_sets,
        arrays=("X_train", "X_test"),
        backends=("numpy",),
        seeded="random_state",
        wrong={
            **WRONG_SETS,
            "a name too few": lambda given: {**given, "feature_names": ["age", "income"]},
            "no shuffle": lambda given: {**given, "n_repeats": 0},
        },
    ),
    Row(
        name="kexue.stats.validation.drift.DriftReport",
        make=lambda rng: vars(drift_report(**two_sets(rng))),
        call=DriftReport,
        instance=lambda: drift_report(**two_sets(np.random.default_rng(0))),
    ),
    Row(
        name="kexue.stats.validation.scoring.AdversarialShuffleSplit",
        make=lambda rng: {
            "X": np.zeros((30, 2)),
            "weights": rng.uniform(size=30),
            "n_splits": 3,
            "random_state": 0,
        },
        call=splits,
        arrays=("weights",),
        backends=("numpy",),
        seeded="random_state",
        wrong={
            **WRONG_WEIGHTS,
            "no draw": lambda given: {**given, "test_size": 0.01},
            "no split": lambda given: {**given, "n_splits": 0},
            "more than all": lambda given: {**given, "test_size": 1.5},
        },
        instance=lambda: AdversarialShuffleSplit(np.arange(9), random_state=0),
    ),
    Row(
        name="kexue.stats.validation.scoring.importance_weighted_cross_val_score",
        make=lambda rng: {
            "estimator": LinearRegression(),
            "X": rng.normal(size=(40, 2)),
            "y": rng.normal(size=40),
            "weights": rng.uniform(size=40),
            "scoring": "neg_mean_squared_error",
            "fit_weights": True,
        },
        arrays=("X", "y", "weights"),
        backends=("numpy",),
        wrong=WRONG_WEIGHTS,
    ),
]
