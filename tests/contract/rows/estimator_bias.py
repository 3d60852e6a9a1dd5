"""Rows of `kexue.stats.moments`."""

from functools import partial
from typing import Any

import numpy as np

from contract.row import Row
from kexue.stats.moments import (
    BiasEstimate,
    BiasMeasurement,
    MomentAccumulator,
    bootstrap_bias,
    jackknife,
    measure_bias,
)

NAN_IS_DATA = "NaN propagates as in numpy: it is data, not an error of the computation"
ANY_ESTIMATOR = "what becomes of NaN is the estimator's business"
SAMPLE = (2.0, 3.0, 5.0, 7.0)


def samples(**more: Any) -> Any:
    return lambda rng: {"x": rng.standard_normal((3, 9)), "axis": -1, **more}


def of_order(order: int) -> Any:
    return samples(order=order)


def stream(x: Any) -> list[Any]:
    accumulator = MomentAccumulator(max_order=6, covariance=True)
    accumulator.update(x).merge(MomentAccumulator(max_order=6, covariance=True).update(x[5:]))
    cumulants = [accumulator.cumulant(order) for order in range(1, 7)]
    return [
        accumulator.count,
        accumulator.mean,
        accumulator.covariance(),
        accumulator.standard_deviation(),
        *cumulants,
        *(accumulator.central_moment(order) for order in (4, 5, 6)),
    ]


def own_variance(x: Any) -> Any:
    return ((x - x.mean(0)) ** 2).mean(0)


def measured(x: Any, n_repeats: int = 20, n_samples: int = 3, random_state: Any = 0) -> Any:
    return measure_bias(
        lambda sample: (sample**2).mean(),
        lambda n, generator: x[generator.integers(0, len(x), size=n)],
        1.0,
        n_samples=n_samples,
        n_repeats=n_repeats,
        random_state=random_state,
    )


def with_values(**values: Any) -> Any:
    return lambda given: {**given, **values}


EMPTY = {"no samples": lambda given: {**given, "x": given["x"][:, :0]}}
AXES = {
    "no such axis": with_values(axis=2),
    "an axis twice": with_values(axis=(1, -1)),
    "an axis in words": with_values(axis="rows"),
}
ORDERS = {
    "order 0": with_values(order=0),
    "order 7": with_values(order=7),
    "half an order": with_values(order=2.5),
    "fewer samples than the order": lambda given: {**given, "x": given["x"][:, :3]},
}
WEIGHTS = {
    "negative weights": with_values(weights=[1.0] * 8 + [-1.0]),
    "no weight": with_values(weights=[0.0] * 9),
    "too few weights": with_values(weights=[1.0] * 8),
    "weights of infinity": with_values(weights=[1.0] * 8 + [np.inf]),
}
PLAIN = {"not_finite_is_refused": NAN_IS_DATA}

ROWS = [
    Row(
        name="kexue.stats.moments.estimators.mean",
        make=samples(weights=np.arange(1.0, 10.0)),
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={**EMPTY, **AXES, **WEIGHTS},
        without=PLAIN,
    ),
    Row(
        name="kexue.stats.moments.estimators.variance",
        make=samples(weights=np.arange(1.0, 10.0), weight_type="reliability"),
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            **EMPTY,
            **AXES,
            **WEIGHTS,
            "no more samples than the correction": with_values(weights=None, correction=9),
            "correction that is no number": with_values(correction=np.nan),
            "correction in words": with_values(correction="bessel"),
            "unknown weights": with_values(weight_type="importance"),
        },
        without=PLAIN,
    ),
    Row(
        name="kexue.stats.moments.estimators.standard_deviation",
        make=samples(),
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            **EMPTY,
            **AXES,
            "one sample": lambda given: {**given, "x": given["x"][:, :1]},
            "unknown correction": with_values(correction="normal"),
        },
        without=PLAIN,
    ),
    Row(
        name="kexue.stats.moments.estimators.covariance",
        make=lambda rng: {"x": rng.standard_normal((3, 9, 2)), "weights": np.arange(1.0, 10.0)},
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            **WEIGHTS,
            "a vector": lambda given: {**given, "x": given["x"][0, 0]},
            "one sample": lambda given: {**given, "x": given["x"][:, :1], "weights": None},
        },
        without=PLAIN,
    ),
    Row(
        name="kexue.stats.moments.estimators.central_moment",
        make=of_order(6),
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={**EMPTY, **AXES, **ORDERS},
        without=PLAIN,
    ),
    Row(
        name="kexue.stats.moments.estimators.cumulant",
        make=of_order(4),
        arrays=("x",),
        batched=("x",),
        differentiable=("x",),
        wrong={**EMPTY, **AXES, **ORDERS},
        without=PLAIN,
    ),
    Row(
        name="kexue.stats.moments.estimators.c4",
        make=lambda rng: {"n": 10},
        wrong={
            "one sample": with_values(n=1),
            "half a sample": with_values(n=2.5),
            "a number in words": with_values(n="ten"),
        },
    ),
    Row(
        name="kexue.stats.moments.accumulator.MomentAccumulator",
        make=lambda rng: {"x": rng.standard_normal((12, 3))},
        call=stream,
        arrays=("x",),
        wrong={
            "no samples": lambda given: {"x": given["x"][:0]},
            "words": with_values(x=[["a"] * 3] * 12),
        },
        instance=lambda: MomentAccumulator(max_order=4).update(np.array(SAMPLE)),
    ),
    Row(
        name="kexue.stats.moments.resampling.jackknife",
        make=lambda rng: {"estimator": own_variance, "x": rng.standard_normal((9, 2))},
        arrays=("x",),
        wrong={
            "one sample": lambda given: {**given, "x": given["x"][:1]},
            "no such axis": with_values(axis=2),
            "no estimator": with_values(estimator="variance"),
        },
        without={"not_finite_is_refused": ANY_ESTIMATOR},
    ),
    Row(
        name="kexue.stats.moments.resampling.bootstrap_bias",
        make=lambda rng: {
            "estimator": own_variance,
            "x": rng.standard_normal((9, 2)),
            "n_resamples": 20,
            "random_state": 0,
        },
        arrays=("x",),
        seeded="random_state",
        wrong={
            "one sample": lambda given: {**given, "x": given["x"][:1]},
            "one resample": with_values(n_resamples=1),
            "no such axis": with_values(axis=-3),
        },
        without={"not_finite_is_refused": ANY_ESTIMATOR},
    ),
    Row(
        name="kexue.stats.moments.resampling.measure_bias",
        make=lambda rng: {"x": rng.standard_normal(9), "random_state": 0},
        call=measured,
        seeded="random_state",
        wrong={
            "one repeat": with_values(n_repeats=1),
            "no sample": with_values(n_samples=0),
        },
    ),
    Row(
        name="kexue.stats.moments.resampling.BiasEstimate",
        make=lambda rng: vars(jackknife(np.var, np.array(SAMPLE))),
        call=BiasEstimate,
        instance=lambda: bootstrap_bias(partial(np.var, axis=0), np.array(SAMPLE), random_state=0),
    ),
    Row(
        name="kexue.stats.moments.resampling.BiasMeasurement",
        make=lambda rng: vars(measured(np.array(SAMPLE))),
        call=BiasMeasurement,
        instance=lambda: measured(np.array(SAMPLE)),
    ),
]
