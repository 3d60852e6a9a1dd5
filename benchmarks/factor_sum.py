"""The adaptive search against the article's own algorithm, blocks and batch against the loop.

No maintained package solves the problem. The peer is the final algorithm of the article in plain
Python, written here as it stands there: p in an interval that is known beforehand, one candidate
each.
"""

import time
from math import isqrt

import numpy as np

from benchmarks.timing import compare
from kexue.arithmetic.factor_sum import factor_sum, factor_sum_batch, factor_sum_table


def article(n: int) -> int:
    """Return the smallest sum from all p up to 2√n + 2 + √(1 + 4√n)."""
    below = isqrt(4 * n)
    best = below + (4 * n - below * below + below % 2) // 4
    for p in range(below + 1, below + isqrt(1 + isqrt(16 * n)) + 5):
        gap = p * p - 4 * n
        q = isqrt(gap - 1) + 1
        q += (p - q) % 2
        best = min(best, p + (q * q - gap) // 4)
    return best


def sieve(limit: int) -> np.ndarray:
    """Return all smallest sums up to a limit from all divisors."""
    excess = np.zeros(limit + 1, dtype=np.int64)
    for a in range(1, isqrt(limit) + 1):
        b = np.arange(a, limit // a + 1)
        multiples = excess[a * a :: a]
        np.minimum(multiples, a + b - a * b, out=multiples)
    return np.minimum.accumulate(excess) + np.arange(limit + 1)


def main() -> None:
    """Print the comparisons and the time a candidate takes in large blocks."""
    rng = np.random.default_rng(0)
    numbers = [int(n) * 10**12 + 1 for n in rng.integers(10**11, 10**12, size=5)]
    compare(
        "5 random numbers of 24 digits: adaptive, the article's interval",
        lambda: np.array([factor_sum(n).total for n in numbers], dtype=object),
        lambda: np.array([article(n) for n in numbers], dtype=object),
        agree=0.0,
        target=50.0,
        repeats=3,
    )
    columns = rng.integers(10**14, 10**15, size=10_000)
    compare(
        "10,000 numbers of 15 digits: batch, scalar loop",
        lambda: factor_sum_batch(columns).total,
        lambda: np.array([factor_sum(int(n)).total for n in columns]),
        agree=0.0,
        target=5.0,
        repeats=3,
    )
    compare(
        "table to 10^6: near factors only, sieve over all divisors",
        lambda: factor_sum_table(10**6),
        lambda: sieve(10**6),
        agree=0.0,
        repeats=3,
    )

    start = time.perf_counter()
    factor_sum_table(10**7)
    seconds = time.perf_counter() - start
    print(f"table to 10^7: {seconds:.2f} s  target 5 s {'met' if seconds <= 5 else 'MISSED'}")

    for digits in (46, 48, 51):
        n = int("314159265358979323846264338327950288419716939937510582"[:digits])
        start = time.perf_counter()
        head = factor_sum(n, max_candidates=2_000_000).candidates
        early = time.perf_counter() - start
        start = time.perf_counter()
        best = factor_sum(n)
        seconds = time.perf_counter() - start
        each = (seconds - early) / (best.candidates - head) * 1e9
        print(
            f"{digits} digits: {seconds:.2f} s for {best.candidates:.2e} candidates; "
            f"beyond {head:.0e} of them {each:.1f} ns each"
            f"  target 10 ns {'met' if each <= 10 else 'MISSED'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
