"""Mitchell products against the broadcast that everybody writes, and against true products.

No maintained CPU library multiplies this way; the broadcast of bit patterns over all products is
the baseline of papers and their code. It knows no zeros, no signs beyond the wrap-around and no
range, and holds all products at once.
"""

from __future__ import annotations

import resource

import torch
from torch import Tensor

from benchmarks.timing import compare, measure
from kexue.arithmetic.mitchell import matmul, multiply

CORRECTIONS = ("none", "constant", "table", "mitchell")
ONE = 0x3F800000


def broadcast(a: Tensor, b: Tensor) -> Tensor:
    """All m k n products as one array of patterns, then their sums."""
    patterns = a.view(torch.int32)[:, :, None] + b.view(torch.int32)[None] - ONE
    return patterns.view(torch.float32).sum(1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    print(f"threads: {torch.get_num_threads()}")
    _memory(512, generator)
    for n in (64, 256, 512):
        _matrices(n, generator)
    _rectified(256, generator)
    _elementwise(10**7, generator)


def _memory(n: int, generator: torch.Generator) -> None:
    """By how much the largest resident size rises; so this comes before what needs more."""
    a, b = torch.randn(2, n, n, generator=generator)
    matmul(a[:64, :64], b[:64, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matmul(a, b)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    verdict = "met" if extra <= 16 else "MISSED"
    print(f"matmul {n}³: extra memory {extra:.1f} MB, the result included, target 16 {verdict}")


def _matrices(n: int, generator: torch.Generator) -> None:
    a, b = torch.randn(2, n, n, generator=generator)
    comparison = compare(
        f"matmul {n}³, no zeros, against the broadcast",
        lambda: matmul(a, b),
        lambda: broadcast(a, b),
        # Sums of n single-precision numbers in another order.
        agree=n * 2.0**-24,
        target=4.0 if n >= 256 else None,
        repeats=5,
    )
    speed = n**3 / comparison.ours / 1e9
    target = f", target 1 {'met' if speed >= 1 else 'MISSED'}" if n >= 256 else ""
    print(f"  ours: {speed:.2f} GMAC/s{target}")
    true = n**3 / measure(lambda: a @ b, repeats=5) / 1e9
    print(f"  torch.matmul, true products: {true:.1f} GMAC/s")
    if n == 256:
        for correction in CORRECTIONS[1:]:
            seconds = measure(lambda c=correction: matmul(a, b, correction=c), repeats=3)
            print(f"  correction {correction}: {n**3 / seconds / 1e9:.3f} GMAC/s")


def _rectified(n: int, generator: torch.Generator) -> None:
    a, b = torch.randn(2, n, n, generator=generator)
    for what, left, right in (("one", a.relu(), b), ("both", a.relu(), b.relu())):
        exact = multiply(left[:, :, None], right[None]).double().sum(1)
        difference = float((matmul(left, right).double() - exact).abs().max() / exact.abs().max())
        if not difference <= n * 2.0**-24:
            raise AssertionError(f"rectified matrices differ by {difference:.1e}")
        compare(
            f"matmul {n}³, zeros in {what}, against the broadcast (which gets zeros wrong)",
            lambda left=left, right=right: matmul(left, right),
            lambda left=left, right=right: broadcast(left, right),
            agree=None,
            target=2.0,
            repeats=5,
        )


def _elementwise(count: int, generator: torch.Generator) -> None:
    a, b = torch.randn(2, count, generator=generator)
    for correction in CORRECTIONS:
        compare(
            f"multiply of 10⁷ floats, correction {correction}, against torch.mul",
            lambda c=correction: multiply(a, b, correction=c),
            lambda: torch.mul(a, b),
            agree=None,
            # At most twelve times as slow.
            target=1 / 12 if correction == "none" else None,
            repeats=5,
        )


if __name__ == "__main__":
    main()
