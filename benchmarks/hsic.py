"""HSIC against hyppo, causal-learn and dcor; memory and gradient of large samples."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Callable

import dcor
import numpy as np
import torch
from causallearn.utils.KCI.KCI import KCI_UInd
from hyppo.independence import Hsic

from benchmarks.timing import Comparison, compare, measure
from kexue.stats.hsic import centered_kernel_alignment, hsic, hsic_test, kernel_matrix

PERMUTATIONS = 999


def main() -> None:
    for dimension, target in ((1, 100.0), (50, 5.0)):
        permutations(dimension, target)
    gamma()
    distance_covariance()
    large_sample()
    gradient()


def draw(n: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    x, noise = np.random.default_rng(0).standard_normal((2, n, dimension))
    return x, 0.05 * x + noise


def permutations(dimension: int, target: float) -> None:
    """hyppo takes minutes for 999 of them; each costs the same, so a few tell the rest."""
    n = 1000
    x, y = draw(n, dimension)
    matrices = kernel_matrix(x), kernel_matrix(y)
    theirs = Hsic(compute_kernel="precomputed").statistic(*(m.copy() for m in matrices))
    ours = centered_kernel_alignment(
        *matrices, kernel_x="precomputed", kernel_y="precomputed", estimator="unbiased"
    )
    difference = abs(ours - theirs) / abs(theirs)
    if difference > 1e-9:
        raise AssertionError(f"alignments differ by {difference:.2e}: {ours}, {theirs}")

    few, more = (_seconds_of_hyppo(x, y, repetitions) for repetitions in (4, 24))
    extrapolated = more + (PERMUTATIONS - 24) * (more - few) / 20
    print(
        Comparison(
            f"{PERMUTATIONS} permutations, n = {n}, d = {dimension}, against hyppo "
            "(extrapolated from 24)",
            measure(lambda: hsic_test(x, y, random_state=0), repeats=3),
            extrapolated,
            difference,
            target,
        ),
        flush=True,
    )


def _seconds_of_hyppo(x: np.ndarray, y: np.ndarray, repetitions: int) -> float:
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Hsic().test(x, y, reps=repetitions, workers=1, auto=False)
    return time.perf_counter() - start


def gamma() -> None:
    # KCI standardises its input, and takes other moments for the same law.
    x, y = (v / v.std(axis=0, ddof=1) for v in draw(1000, 1))
    kci = KCI_UInd(est_width="manual", kwidthx=1.0, kwidthy=1.0)
    result = hsic_test(x, y, method="gamma", bandwidth_x=1.0, bandwidth_y=1.0)
    pvalue, statistic = kci.compute_pvalue(x.copy(), y.copy())
    print(f"p-values of two gamma laws: {result.pvalue:.4f} and {pvalue:.4f}")
    if abs(result.statistic * 1000 / statistic - 1) > 1e-9 or abs(result.pvalue - pvalue) > 0.03:
        raise AssertionError(f"tests differ: {result}, {statistic}, {pvalue}")
    compare(
        "gamma test, n = 1000, d = 1, against causal-learn",
        lambda: hsic_test(x, y, method="gamma", bandwidth_x=1.0, bandwidth_y=1.0),
        lambda: kci.compute_pvalue(x.copy(), y.copy()),
        agree=None,
        repeats=5,
    )


def distance_covariance() -> None:
    n = 2000
    x, y = draw(n, 5)
    compare(
        f"squared distance covariance, n = {n}, d = 5, against dcor",
        lambda: 4 * ((n - 1) / n) ** 2 * hsic(
            x, y, kernel_x="distance", kernel_y="distance", estimator="biased"
        ),
        lambda: dcor.distance_covariance_sqr(x, y),
        agree=1e-9,
        repeats=5,
    )  # fmt: skip


def large_sample() -> None:
    x, y = draw(20_000, 10)
    hsic(x[:100], y[:100])
    start = time.perf_counter()
    hsic(x, y)
    print(f"value, n = 20000, d = 10: {time.perf_counter() - start:.2f} s, allowed 20 s")
    tracemalloc.start()
    hsic(x[:8000], y[:8000])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"extra memory, n = 8000, d = 10: {peak / 2**20:.1f} MB, allowed 300 MB")
    x, y = draw(8000, 10)
    compare(
        "value, n = 8000, d = 10, in blocks, against whole matrices",
        lambda: hsic(x, y, bandwidth_x=3.0, bandwidth_y=3.0),
        lambda: hsic(x, y, bandwidth_x=3.0, bandwidth_y=3.0, block_size=8000),
        agree=1e-9,
        repeats=3,
    )


def gradient() -> None:
    for dimension in (1, 10, 64):
        x, y = (torch.from_numpy(v) for v in draw(2048, dimension))
        bandwidth = dimension**0.5

        def value(x: torch.Tensor, y: torch.Tensor = y, sigma: float = bandwidth) -> torch.Tensor:
            return hsic(x, y, bandwidth_x=sigma, bandwidth_y=sigma)

        def value_and_gradient(
            x: torch.Tensor = x, value: Callable[..., torch.Tensor] = value
        ) -> None:
            value(x.clone().requires_grad_()).backward()

        forward = measure(lambda x=x, value=value: value(x))
        both = measure(value_and_gradient)
        print(
            f"gradient, n = 2048, d = {dimension}: {both * 1e3:.1f} ms with the value, "
            f"{both / forward:.2f} times the value alone, allowed 4",
            flush=True,
        )


if __name__ == "__main__":
    main()
