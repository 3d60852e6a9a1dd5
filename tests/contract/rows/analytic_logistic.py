"""Closed-form logistic regression."""

import numpy as np

from contract.row import Arguments, Row
from kexue.stats.logistic import (
    AnalyticLogisticRegression,
    ClassMoments,
    LinearSoftmax,
)

CLASSES, FEATURES, SAMPLES = 3, 4, 30


def softmax_arguments(rng: np.random.Generator) -> Arguments:
    batch = 2
    root = rng.normal(size=(batch, FEATURES, 3 * FEATURES))
    return {
        "means": rng.normal(size=(batch, CLASSES, FEATURES)),
        "covariance": root @ np.swapaxes(root, -1, -2) / (3 * FEATURES),
        "priors": rng.dirichlet(np.full(CLASSES, 3.0), size=batch),
    }


def batch_arguments(rng: np.random.Generator) -> Arguments:
    y = rng.integers(CLASSES, size=SAMPLES)
    y[:CLASSES] = range(CLASSES)
    return {"X": rng.normal(size=(SAMPLES, FEATURES)) + y[:, None], "y": y}


def weighted_batch(rng: np.random.Generator) -> Arguments:
    weight = rng.uniform(0.5, 2.0, size=SAMPLES)
    return {**batch_arguments(rng), "n_classes": CLASSES, "sample_weight": weight}


def shrunk_moments(X, y, n_classes, sample_weight):
    moments = ClassMoments.from_data(X, y, n_classes=n_classes, sample_weight=sample_weight)
    merged = moments.merge(ClassMoments.from_data(X[:7], y[:7], n_classes=n_classes))
    return moments, merged, merged.covariance(shrinkage="oas")


def probabilities(X, y, sample_weight=None, **parameters):
    model = AnalyticLogisticRegression(**parameters).fit(X, y, sample_weight)
    return model.predict_proba(X), model.coef_, model.intercept_


ROWS = [
    Row(
        name="kexue.stats.logistic.softmax.closed_form_softmax",
        make=softmax_arguments,
        arrays=("means", "covariance", "priors"),
        batched=("means", "covariance", "priors"),
        differentiable=("means", "covariance", "priors"),
        wrong={
            "a class too many in the priors": lambda given: {
                **given,
                "priors": given["priors"][:, :1],
            },
            "a covariance of other features": lambda given: {
                **given,
                "covariance": given["covariance"][:, :2, :2],
            },
            "a negative prior": lambda given: {**given, "priors": -given["priors"]},
            "an indefinite covariance": lambda given: {
                **given,
                "covariance": -given["covariance"],
            },
        },
    ),
    Row(
        name="kexue.stats.logistic.softmax.LinearSoftmax",
        make=lambda rng: {"weight": rng.normal(size=(3, 2)), "bias": rng.normal(size=3)},
        instance=lambda: LinearSoftmax(weight=np.ones((3, 2)), bias=np.zeros(3)),
    ),
    Row(
        name="kexue.stats.logistic.moments.ClassMoments",
        make=weighted_batch,
        call=shrunk_moments,
        arrays=("X", "sample_weight"),
        differentiable=("X",),
        wrong={
            "a class out of range": lambda given: {**given, "n_classes": CLASSES - 1},
            "no class": lambda given: {**given, "n_classes": 0},
            "labels of another length": lambda given: {**given, "y": given["y"][1:]},
            "a negative weight": lambda given: {
                **given,
                "sample_weight": -given["sample_weight"],
            },
        },
        instance=lambda: ClassMoments(np.ones(3), np.zeros((3, 2)), np.eye(2)),
    ),
    Row(
        name="kexue.stats.logistic.classifier.AnalyticLogisticRegression",
        make=lambda rng: {**batch_arguments(rng), "sample_weight": rng.uniform(1, 2, SAMPLES)},
        call=probabilities,
        arrays=("X", "sample_weight"),
        backends=("numpy",),
        wrong={
            "shrinkage above 1": lambda given: {**given, "shrinkage": 1.5},
            "shrinkage of another name": lambda given: {**given, "shrinkage": "lw"},
            "shrinkage that is a bool": lambda given: {**given, "shrinkage": True},
            "priors of another length": lambda given: {**given, "priors": [0.5, 0.5]},
            "priors of another sum": lambda given: {**given, "priors": [0.5, 0.5, 0.5]},
            "a negative rcond": lambda given: {**given, "rcond": -1.0},
            "one class": lambda given: {**given, "y": 0 * given["y"]},
        },
        estimators=lambda: [
            AnalyticLogisticRegression(),
            AnalyticLogisticRegression(shrinkage="oas"),
        ],
    ),
]
