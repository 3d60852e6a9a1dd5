"""Time two functions in turns, check that they agree, print both and the ratio."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Comparison", "compare", "measure"]


@dataclass(frozen=True)
class Comparison:
    """Two times in seconds (medians), the largest difference of the results, and a target."""

    what: str
    ours: float
    theirs: float
    difference: float
    target: float | None

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target; None where there is no target."""
        return None if self.target is None else self.ratio >= self.target

    def __str__(self) -> str:
        verdict = ""
        if self.target is not None:
            verdict = f"  target {self.target:g}x {'met' if self.met else 'MISSED'}"
        return (
            f"{self.what}: ours {self.ours * 1e3:.3f} ms, theirs {self.theirs * 1e3:.3f} ms, "
            f"ratio {self.ratio:.2f}x, difference {self.difference:.1e}{verdict}"
        )


def measure(function: Callable[[], Any], *, repeats: int = 7, least_seconds: float = 0.02) -> float:
    """Return the median time of one call, each sample long enough for the clock."""
    return _samples([function], repeats, least_seconds)[0]


def compare(
    what: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    agree: float | None,
    target: float | None = None,
    value: Callable[[Any], Any] = np.asarray,
    repeats: int = 7,
) -> Comparison:
    """Time `ours` and `theirs` in turns, print the comparison and return it.

    `agree` is the largest allowed difference, relative to the largest value, of `value(result)`:
    a comparison of different results raises. None where results are random or of another kind;
    then the caller has to compare what can be compared. `target` is the ratio theirs / ours to
    reach.
    """
    difference = float("nan")
    if agree is not None:
        a, b = value(ours()), value(theirs())
        difference = float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-300))
        if not difference <= agree:
            raise AssertionError(f"{what}: results differ by {difference:.2e}, allowed {agree:.2e}")
    our_time, their_time = _samples([ours, theirs], repeats, 0.02)
    comparison = Comparison(what, our_time, their_time, difference, target)
    print(comparison, flush=True)
    return comparison


def _samples(functions: list[Callable[[], Any]], repeats: int, least: float) -> list[float]:
    counts = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        counts.append(max(1, int(least / max(time.perf_counter() - start, 1e-9))))
    times: list[list[float]] = [[] for _ in functions]
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for function, count, samples in zip(functions, counts, times, strict=True):
                start = time.perf_counter()
                for _ in range(count):
                    function()
                samples.append((time.perf_counter() - start) / count)
    finally:
        gc.enable()
    return [statistics.median(samples) for samples in times]
