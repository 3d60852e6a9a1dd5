"""The law of the angle against the incomplete beta function alone, scipy's Beta and brute force."""

from __future__ import annotations

import tracemalloc

import numpy as np
from scipy import special, stats

from benchmarks.timing import compare
from kexue.stats.angles import RandomAngle, RandomCosine, cosine_summary

# A time of at most 1.3 times theirs is a ratio of at least 1 / 1.3.
AT_MOST_1_3 = 1 / 1.3


def main() -> None:
    tails()
    draws()
    pairs()


def tails() -> None:
    for n in (10, 768, 10**6):
        a = (n - 1) / 2
        x = np.random.default_rng(0).uniform(-4, 4, 100_000) / np.sqrt(n)
        x = np.clip(x, -0.999, 0.999)
        law = RandomCosine(n)
        compare(
            f"sf of 1e5 cosines at n = {n}, against betainc(a, a) alone",
            lambda law=law, x=x: law.sf(x),
            lambda a=a, x=x: special.betainc(a, a, (1 - x) / 2),
            agree=1e-10,
            target=AT_MOST_1_3,
        )
        theta = np.arccos(x)
        compare(
            f"cdf of 1e5 angles at n = {n}, against betainc(a, a) alone",
            lambda n=n, theta=theta: RandomAngle(n).cdf(theta),
            lambda a=a, theta=theta: special.betainc(a, a, np.sin(theta / 2) ** 2),
            agree=1e-10,
            target=AT_MOST_1_3,
        )
        compare(
            f"cdf of 1e5 cosines at n = {n}, against scipy.stats.beta",
            lambda law=law, x=x: law.cdf(x),
            lambda a=a, x=x: stats.beta.cdf(x, a, a, loc=-1, scale=2),
            agree=1e-10,
        )
    compare(
        "ppf of 1e4 probabilities at n = 768, against scipy.stats.beta",
        lambda: RandomCosine(768).ppf(PROBABILITIES),
        lambda: stats.beta.ppf(PROBABILITIES, 383.5, 383.5, loc=-1, scale=2),
        agree=1e-10,
    )


PROBABILITIES = np.random.default_rng(1).uniform(size=10_000)


def draws() -> None:
    def pairs_of_vectors() -> np.ndarray:
        rng = np.random.default_rng(0)
        u, v = rng.standard_normal((2, 10_000, 768))
        lengths = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        return np.einsum("ij,ij->i", u, v) / lengths

    ours = RandomCosine(768).rvs(10_000, random_state=0)
    agreement = stats.ks_2samp(ours, pairs_of_vectors()).pvalue
    print(f"same law of both kinds of draws: KS p-value {agreement:.2g}")
    compare(
        "1e4 draws of the cosine at n = 768, against pairs of normal vectors",
        lambda: RandomCosine(768).rvs(10_000, random_state=0),
        pairs_of_vectors,
        agree=None,
        target=100.0,
        repeats=3,
    )


def pairs() -> None:
    n_vectors, dimension, block_size = 20_000, 256, 1024
    x = np.random.default_rng(0).standard_normal((n_vectors, dimension)).astype(np.float32)

    def products_and_one_pass() -> float:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        total = 0.0
        for i in range(0, n_vectors, block_size):
            for j in range(i, n_vectors, block_size):
                block = unit[i : i + block_size] @ unit[j : j + block_size].T
                if i == j:
                    block = np.triu(block, k=1)
                total += float(np.vdot(block, block))
        return total / (n_vectors * (n_vectors - 1) / 2)

    compare(
        f"cosine_summary of {n_vectors} x {dimension} float32, against its GEMMs and one pass",
        lambda: cosine_summary(x, block_size=block_size).mean_square,
        products_and_one_pass,
        agree=1e-5,
        target=AT_MOST_1_3,
        repeats=3,
    )
    tracemalloc.start()
    cosine_summary(x, block_size=block_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"extra memory of that summary: {peak / 2**20:.1f} MB, allowed 64 MB")


if __name__ == "__main__":
    main()
