"""Moments against torch.var, numpy and scipy's k-statistics."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from scipy import stats

from benchmarks.timing import compare, measure
from kexue.stats.moments import MomentAccumulator, cumulant, jackknife, variance

ROWS, COLUMNS, CHUNK = 1_000_000, 8, 65_536


def main() -> None:
    arrays()
    streams()
    merges()
    resampling()


def arrays() -> None:
    x = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    compare(
        f"cumulant(order=4) of {ROWS} x {COLUMNS}, against scipy.stats.kstat",
        lambda: cumulant(x, 4, axis=0),
        lambda: stats.kstat(x, 4, axis=0),
        # At offset 0 the power sums of kstat lose few digits; k_4 is the difference of terms of 3.
        agree=1e-9,
        target=3.0,
        repeats=3,
    )
    compare(
        f"variance of {ROWS} x {COLUMNS}, against np.var",
        lambda: variance(x, axis=0),
        lambda: x.var(axis=0, ddof=1),
        agree=1e-12,
        repeats=3,
    )


def streams() -> None:
    x = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def stream(max_order: int) -> torch.Tensor:
        accumulator = MomentAccumulator(max_order=max_order)
        for chunk in x.split(CHUNK):
            accumulator.update(chunk)
        return accumulator.variance()

    # At most twice, at most five times the time of theirs.
    for max_order, target in ((2, 1 / 2), (4, 1 / 5)):
        compare(
            f"accumulator of order {max_order} in chunks of {CHUNK} rows, against torch.var",
            partial(stream, max_order),
            lambda: torch.var(x, 0),
            agree=1e-12,
            target=target,
            repeats=3,
        )


def merges() -> None:
    x = np.random.default_rng(0).standard_normal((1000, 4, 1024))
    parts = [MomentAccumulator().update(chunk) for chunk in x]

    def merge() -> MomentAccumulator:
        total = MomentAccumulator()
        for part in parts:
            total.merge(part)
        return total

    np.testing.assert_allclose(merge().variance(), x.reshape(-1, 1024).var(0, ddof=1), rtol=1e-10)
    print(
        f"merge of 1000 accumulators of 1024 features: {measure(merge, repeats=3):.3f} s of 0.1 s"
    )


def resampling() -> None:
    x = np.random.default_rng(0).standard_normal(2000)
    start = time.perf_counter()
    result = jackknife(partial(np.var, axis=0), x)
    seconds = time.perf_counter() - start
    np.testing.assert_allclose(result.corrected, x.var(ddof=1), rtol=1e-10)
    print(f"jackknife of a vectorised estimator at n = 2000: {seconds:.3f} s of 0.5 s")


if __name__ == "__main__":
    main()
