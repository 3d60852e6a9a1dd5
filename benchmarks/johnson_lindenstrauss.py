"""Random projections against scikit-learn's, the Hadamard transform against a butterfly loop."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import torch
from sklearn import random_projection as sklearn

from benchmarks.timing import compare
from kexue.stats.projection import (
    HadamardRandomProjection,
    SparseRandomProjection,
    distortion,
    hadamard_transform,
)

X = np.random.default_rng(0).standard_normal((2000, 4096), dtype=np.float32)


def main() -> None:
    hadamard()
    fast_map()
    sparse_map()
    streaming()


def hadamard() -> None:
    x = torch.from_numpy(X)

    def butterfly() -> torch.Tensor:
        y, d, half = x, x.shape[-1], 1
        while half < d:
            pairs = y.reshape(-1, d // (2 * half), 2, half)
            up, down = pairs[:, :, 0], pairs[:, :, 1]
            y = torch.stack([up + down, up - down], dim=2)
            half *= 2
        return y.reshape(x.shape) / math.sqrt(d)

    # Sums of 4096 terms in single precision, in different orders.
    compare(
        "hadamard_transform of a 2000 x 4096 float32 tensor, against a butterfly loop in torch",
        lambda: hadamard_transform(x),
        butterfly,
        agree=1e-5,
        target=3.0,
        repeats=3,
    )
    compare(
        "the same of a numpy array",
        lambda: hadamard_transform(X),
        butterfly,
        agree=1e-5,
        target=3.0,
        repeats=3,
    )


def fast_map() -> None:
    for n, target in ((512, 2.0), (2048, 6.0)):
        ours = HadamardRandomProjection(n, random_state=0)
        theirs = sklearn.GaussianRandomProjection(n, random_state=0)
        errors = [distortion(X[:300], p.fit_transform(X[:300])) for p in (ours, theirs)]
        print(
            "mean error of squared distances: ours {:.4f}, theirs {:.4f}".format(
                *(e.mean_distance_error for e in errors)
            )
        )
        compare(
            f"SRHT 4096 -> {n} of 2000 rows, fit and transform, against normal entries",
            lambda ours=ours: ours.fit_transform(X),
            lambda theirs=theirs: theirs.fit_transform(X),
            agree=None,
            target=target,
            repeats=3,
        )


def sparse_map() -> None:
    n = 512
    for what, x in (("float32", X), ("float64", X.astype(np.float64))):
        ours = SparseRandomProjection(n, random_state=0).fit(x)
        theirs = sklearn.SparseRandomProjection(n, random_state=0).fit(x)
        # The same matrix for both, so that the results can be compared.
        theirs.components_ = type(theirs.components_)(ours.components_.astype(x.dtype).tocsr())
        compare(
            f"very sparse transform 4096 -> {n} of 2000 dense {what} rows",
            lambda ours=ours, x=x: ours.transform(x),
            lambda theirs=theirs, x=x: theirs.transform(x),
            agree=1e-5,
            target=1.0,
            repeats=3,
        )
    compare(
        f"very sparse fit 4096 -> {n}",
        lambda: SparseRandomProjection(n, random_state=0).fit(X[:2]),
        lambda: sklearn.SparseRandomProjection(n, random_state=0).fit(X[:2]),
        agree=None,
        repeats=3,
    )


def streaming() -> None:
    from kexue.stats.projection import GaussianRandomProjection

    projection = GaussianRandomProjection(1000, random_state=0).fit_shape(10, 100_000)
    chunk = X[:64, :1024]
    tracemalloc.start()
    projection.transform_columns(chunk, 50 * 1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"extra memory of a chunk of 1024 among 100000 columns: {peak / 2**20:.1f} MB of 32 MB")


if __name__ == "__main__":
    main()
