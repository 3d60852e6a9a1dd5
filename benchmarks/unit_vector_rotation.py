"""Maps between directions against the matrix written out, one elementwise pass, and scipy."""

from __future__ import annotations

import operator
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from benchmarks.timing import compare
from kexue.linalg.rotation import align, alignment_matrix


def main() -> None:
    matrix_and_product()
    elementwise_passes()
    pairs_in_space()
    many_dimensions()


def matrix_and_product() -> None:
    for dimension, target in ((1024, None), (4096, 15)):
        x, a, b = _vectors(dimension)
        compare(
            f"align 1000 vectors at d = {dimension}, against matrix and product",
            lambda x=x, a=a, b=b: align(x, a, b),
            lambda x=x, a=a, b=b: x @ alignment_matrix(a, b).T,
            # Products of a thousand terms in single precision.
            agree=1e-5,
            target=target,
        )


def elementwise_passes() -> None:
    # Ten passes or less: the target is the time of one, ten times over.
    for dimension in (1024, 4096):
        x, a, b = _vectors(dimension)
        for kind, given, numbers in (
            ("torch", (x, a, b), "tensors"),
            ("numpy", (x.numpy(), a.numpy(), b.numpy()), "arrays"),
        ):
            compare(
                f"align 1000 {kind} {numbers} at d = {dimension}, against ten times x + 1",
                lambda given=given: align(*given),
                lambda given=given: _ten_passes(given[0]),
                agree=None,
                target=1 if dimension == 4096 else None,
            )


def pairs_in_space() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 100_000, 3))
    few = 1000  # the loop takes half a minute for all of them
    factor = len(a) // few

    def loop() -> np.ndarray:
        return np.stack(
            [Rotation.align_vectors(b[i : i + 1], a[i : i + 1])[0].as_matrix() for i in range(few)]
        )

    # scipy divides by the sine of the angle, which a pair in a thousand has below 1/20.
    compare(
        f"{few} matrices in space, against a loop of scipy's align_vectors",
        lambda: alignment_matrix(a[:few], b[:few]),
        loop,
        agree=1e-10,
        repeats=3,
    )
    ours = min(_seconds(lambda: alignment_matrix(a, b)) for _ in range(5))
    theirs = factor * min(_seconds(loop) for _ in range(2))
    ratio = theirs / ours
    print(
        f"{len(a)} matrices in space: ours {ours * 1e3:.1f} ms, scipy's loop {theirs * 1e3:.0f} ms "
        f"({few} of them, times {factor}), ratio {ratio:.0f}x  target 100x "
        f"{'met' if ratio >= 100 else 'MISSED'}",
        flush=True,
    )


def many_dimensions() -> None:
    rng = np.random.default_rng(1)
    x, a, b = rng.standard_normal((3, 300_000))
    seconds = min(_seconds(lambda: align(x, a, b)) for _ in range(5))
    tracemalloc.start()
    align(x, a, b)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(
        f"one vector at d = 300000: {seconds * 1e3:.1f} ms  target 1000 ms "
        f"{'met' if seconds < 1 else 'MISSED'}; memory {peak / x.nbytes:.1f} times that of x",
        flush=True,
    )


def _vectors(dimension: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1000, dimension, generator=generator),
        torch.randn(dimension, generator=generator),
        torch.randn(dimension, generator=generator),
    )


def _ten_passes(x: Any) -> None:
    for _ in range(10):
        operator.add(x, 1.0)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
