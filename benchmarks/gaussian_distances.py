"""Distances of normal laws against torch.distributions, POT, and the routes of FID code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ot
import scipy.linalg
import torch

from benchmarks.timing import compare
from kexue.stats.gaussian import (
    fit_gaussian,
    frechet_distance,
    kl_divergence,
    pairwise_distance,
    wasserstein_distance,
)

# A time of at most 1.1 times theirs is a ratio of at least 1 / 1.1.
AT_MOST_1_1 = 1 / 1.1


def main() -> None:
    kl()
    wasserstein()
    pairs()
    frechet()
    digits_near_equality()


def laws(d: int, n: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = () if n is None else (n,)
    factor = rng.standard_normal((*batch, d, 2 * d)) / math.sqrt(2 * d)
    covariance = factor @ factor.swapaxes(-1, -2)
    return rng.standard_normal((*batch, d)), (covariance + covariance.swapaxes(-1, -2)) / 2


def kl() -> None:
    """The peer gets its laws with their factors computed in the timed call, as ours does."""
    peer = torch.distributions.MultivariateNormal

    def theirs(one: Any, two: Any) -> torch.Tensor:
        return torch.distributions.kl_divergence(peer(*one), peer(*two))

    one, two = ([torch.from_numpy(x) for x in laws(512, seed=seed)] for seed in (0, 1))
    compare(
        "KL at d = 512",
        lambda: kl_divergence(*one, *two),
        lambda: theirs(one, two),
        agree=1e-10,
        target=AT_MOST_1_1,
    )
    one, two = ([torch.from_numpy(x) for x in laws(16, 256, seed=seed)] for seed in (0, 1))
    rows = [x[:, None] for x in one]
    compare(
        "KL of (256, 256) pairs at d = 16",
        lambda: kl_divergence(*rows, *two),
        lambda: theirs(rows, two),
        agree=1e-10,
        target=AT_MOST_1_1,
    )
    compare(
        "the same through pairwise_distance",
        lambda: pairwise_distance(*one, *two, metric="kl"),
        lambda: theirs(rows, two),
        agree=1e-10,
    )


def root_of_product(mean1: Any, covariance1: Any, mean2: Any, covariance2: Any) -> float:
    """As pytorch-fid has it."""
    root = scipy.linalg.sqrtm(covariance1 @ covariance2)
    traces = np.trace(covariance1) + np.trace(covariance2) - 2 * np.trace(root.real)
    return float(((mean1 - mean2) ** 2).sum() + traces)


def eigenvalues_of_product(mean1: Any, covariance1: Any, mean2: Any, covariance2: Any) -> float:
    """As torchmetrics has it."""
    product = torch.from_numpy(covariance1 @ covariance2)
    root = float(torch.linalg.eigvals(product).sqrt().real.sum())
    return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1 + covariance2) - 2 * root)


def wasserstein() -> None:
    one, two = laws(1024), laws(1024, seed=1)
    for what, theirs, target in (
        ("scipy.linalg.sqrtm", root_of_product, 3.0),
        ("eigenvalues of the product", eigenvalues_of_product, 1.5),
    ):
        compare(
            f"W2 at d = 1024, against {what}",
            lambda: wasserstein_distance(*one, *two, squared=True),
            lambda theirs=theirs: theirs(*one, *two),
            agree=1e-8,
            target=target,
            repeats=3,
        )
    one, two = laws(512), laws(512, seed=1)
    compare(
        "W2 at d = 512, against POT",
        lambda: wasserstein_distance(*one, *two),
        lambda: ot.gaussian.bures_wasserstein_distance(one[0], two[0], one[1], two[1]),
        agree=1e-8,
        repeats=3,
    )


def pairs() -> None:
    means, covariances = laws(32, 64)

    def pot_by_pair() -> np.ndarray:
        table = np.zeros((64, 64))
        for i in range(64):
            for j in range(i):
                table[i, j] = table[j, i] = ot.gaussian.bures_wasserstein_distance(
                    means[i], means[j], covariances[i], covariances[j]
                )
        return table

    def pot_in_a_batch() -> np.ndarray:
        table = ot.gaussian.bures_wasserstein_distance(means, means, covariances, covariances)
        np.fill_diagonal(table, 0.0)  # trace formulas leave some 1e-7 there
        return table

    for what, theirs in (("pair by pair", pot_by_pair), ("in one batch", pot_in_a_batch)):
        compare(
            f"pairwise W2 of 64 laws at d = 32, against POT {what}",
            lambda: pairwise_distance(means, covariances),
            theirs,
            agree=1e-8,
            target=5.0,
            repeats=3,
        )


def frechet() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 2048)), rng.standard_normal((64, 2048)) + 0.1

    def from_covariances() -> float:
        one, two = fit_gaussian(x), fit_gaussian(y)
        return eigenvalues_of_product(*one, *two)

    compare(
        "Fréchet distance of 64 samples at d = 2048, against covariances and eigenvalues",
        lambda: frechet_distance(x, y),
        from_covariances,
        # Eigenvalues of rounding size enter the covariance route by their square roots.
        agree=1e-3,
        target=50.0,
        repeats=1,
    )


def digits_near_equality() -> None:
    """What the times above buy: the error of a distance between nearly equal laws."""
    zero, factor = np.zeros(2), np.array([[1.5, 0.0], [0.5, 1.0]])
    for change in (1e-2, 1e-5, 1e-8):
        # Laws c·c and (c + 2 e) c + e², with factors L and (1 + e) L: W2 is e ‖L‖.
        one, two = factor @ factor.T, (1 + change) ** 2 * (factor @ factor.T)
        exact = change * np.linalg.norm(factor)
        ours = wasserstein_distance(zero, one, zero, two)
        theirs = ot.gaussian.bures_wasserstein_distance(zero, zero, one, two)
        print(
            f"relative error of W2 at a change of {change:g}: ours {abs(ours / exact - 1):.1e}, "
            f"POT {abs(theirs / exact - 1):.1e}"
        )


if __name__ == "__main__":
    main()
