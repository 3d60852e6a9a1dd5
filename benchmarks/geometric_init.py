"""Orthogonal matrices against torch's; what moments and isometric kernels cost."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.timing import compare, measure
from kexue.nn.init import activation_moments, convolution_orthogonal_, orthogonal_


def main() -> None:
    matrices("cpu", ((4096, 1024, 3.0), (1024, 1024, 1.5)))
    if torch.cuda.is_available():
        matrices("cuda", ((4096, 4096, 3.0), (16384, 4096, 3.0)))
    setup()


def matrices(device: str, shapes: tuple[tuple[int, int, float], ...]) -> None:
    """Two draws cannot agree; both have to be orthogonal."""
    for rows, columns, target in shapes:
        ours, theirs = torch.empty(2, rows, columns, device=device)

        def finished(fill: object, weight: Tensor) -> None:
            fill(weight)  # type: ignore[operator]
            if weight.is_cuda:
                torch.cuda.synchronize()

        compare(
            f"orthogonal_ of ({rows}, {columns}) on {device}, against torch.nn.init",
            lambda weight=ours: finished(orthogonal_, weight),
            lambda weight=theirs: finished(torch.nn.init.orthogonal_, weight),
            agree=None,
            target=target,
            repeats=5,
        )
        for name, weight in (("ours", ours), ("theirs", theirs)):
            error = defect(weight)
            print(f"  largest entry of W'W - I, {name}: {error:.1e}")
            if error > 1e-5:
                raise AssertionError(f"{name} is not orthogonal: {error:.1e}")


def setup() -> None:
    moments = measure(lambda: activation_moments("gelu"), repeats=5)
    print(f"activation_moments: {moments * 1e3:.2f} ms, target 10 ms")
    kernel = torch.empty(256, 256, 3, 3)
    seconds = measure(lambda: convolution_orthogonal_(kernel), repeats=3)
    print(f"convolution_orthogonal_ of (256, 256, 3, 3): {seconds * 1e3:.0f} ms, target 1000 ms")


def defect(weight: Tensor) -> float:
    wide = weight.double()
    identity = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    return float((wide.mT @ wide - identity).abs().max())


if __name__ == "__main__":
    main()
