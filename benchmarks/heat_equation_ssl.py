"""Propagation, filling, diffusion and fits against what one would otherwise take for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import cg
from torch import Tensor, nn

from benchmarks.timing import compare, measure
from kexue.training.heat import (
    LinearPropagation,
    fit_first_order,
    harmonic_fill,
    heat_diffuse,
)


def main() -> None:
    propagation()
    filling()
    diffusion()
    fits()


def tensors(value: Any) -> np.ndarray:
    return value.detach().numpy()


def propagation() -> None:
    """Forward and backward, from 7 x 7 to 14 x 14, against one 1x1 convolution of the full map.

    A propagation takes more arithmetic than that; the target is how many times its time.
    """
    for channels in (64, 256):
        for kind, times in (("shared_eigenvectors", 5), ("free", 25)):
            torch.manual_seed(0)
            module = LinearPropagation(channels, parametrization=kind)
            features = torch.randn(32, channels, 7, 7, requires_grad=True)
            gradient = torch.randn(32, channels, 14, 14)
            convolution = nn.Conv2d(channels, channels, 1, bias=False)
            full = torch.randn(32, channels, 14, 14, requires_grad=True)

            def ours(module: Any = module, z: Tensor = features, g: Tensor = gradient) -> Tensor:
                out = module(z, size=(14, 14), offset=(3, 3))
                out.backward(g)
                return out

            def naive(module: Any = module, z: Tensor = features, g: Tensor = gradient) -> Tensor:
                out = chained(module, z)
                out.backward(g)
                return out

            def theirs(module: Any = convolution, z: Tensor = full, g: Tensor = gradient) -> None:
                module(z).backward(g)

            compare(
                f"propagation, {kind}, {channels} channels, against one step at a time",
                ours,
                naive,
                agree=1e-5,
                value=tensors,
                repeats=3,
            )
            compare(
                f"propagation, {kind}, {channels} channels, against a 1x1 convolution",
                ours,
                theirs,
                agree=None,
                target=1 / times,
                repeats=5,
            )


def chained(module: LinearPropagation, z: Tensor) -> Tensor:
    """The definition, one column or row at a time, by products with the matrices."""
    a, b = module.matrices()
    steps = [torch.linalg.matrix_exp(sign * m) for m in (a, b) for sign in (-1, 1)]

    def across(z: Tensor) -> Tensor:
        for _ in range(3):
            z = torch.cat([torch.einsum("ij,bjyx->biyx", steps[0], z[..., :1]), z], -1)
        for _ in range(4):
            z = torch.cat([z, torch.einsum("ij,bjyx->biyx", steps[1], z[..., -1:])], -1)
        return z

    def along(z: Tensor) -> Tensor:
        for _ in range(3):
            z = torch.cat([torch.einsum("ij,bjyx->biyx", steps[2], z[..., :1, :]), z], -2)
        for _ in range(4):
            z = torch.cat([z, torch.einsum("ij,bjyx->biyx", steps[3], z[..., -1:, :])], -2)
        return z

    if module.parametrization == "free":
        return (along(across(z)) + across(along(z))) / 2
    return along(across(z))


def filling() -> None:
    """64 x 64 with 75 % masked and 128 channels times batch, against conjugate gradients."""
    torch.manual_seed(0)
    mask = torch.rand(64, 64) < 0.75
    maps = torch.randn(4, 32, 64, 64, dtype=torch.float64)
    compare(
        "harmonic_fill, 64 x 64, 75 % masked, 128 maps, against scipy's conjugate gradients",
        lambda: harmonic_fill(maps, mask),
        lambda: by_conjugate_gradients(maps, mask),
        agree=1e-6,
        value=tensors,
        repeats=3,
    )
    report("harmonic_fill, the same", lambda: harmonic_fill(maps, mask), 0.150)
    narrow, hidden = maps[..., :40], mask[:, :40]
    report(
        f"harmonic_fill, dense, {int(hidden.sum())} masked",
        lambda: harmonic_fill(narrow, hidden),
        None,
    )


def by_conjugate_gradients(maps: Tensor, mask: Tensor) -> Tensor:
    height, width = mask.shape
    place = np.arange(height * width).reshape(height, width)
    ends = [(place[1:], place[:-1]), (place[:, 1:], place[:, :-1])]
    one = np.concatenate([e.ravel() for pair in ends for e in pair])
    two = np.concatenate([e.ravel() for pair in ends for e in pair[::-1]])
    adjacency = csr_matrix((np.ones(len(one)), (one, two)))
    m, v = np.flatnonzero(mask), np.flatnonzero(~mask)
    degree = np.asarray(adjacency.sum(1)).ravel()
    system = csr_matrix((degree[m], (range(len(m)), range(len(m))))) - adjacency[m][:, m]
    out = maps.flatten(2).clone()
    rows = out.view(-1, height * width).numpy()
    for row in rows:
        row[m] = cg(system, adjacency[m][:, v] @ row[v], rtol=1e-9)[0]
    return out.view(maps.shape)


def diffusion() -> None:
    """Against a Gaussian filter of the same width, which it resembles and does not equal."""
    torch.manual_seed(0)
    time = 2.0
    maps = torch.randn(64, 64, 32, 32)
    widths = (0, 0, math.sqrt(2 * time), math.sqrt(2 * time))

    def blurred() -> np.ndarray:
        return gaussian_filter(maps.numpy(), widths, mode="reflect")

    smooth = heat_diffuse(maps, time).numpy()
    compare(
        "heat_diffuse of 64 x 64 maps of 32 x 32, against scipy's gaussian_filter",
        lambda: heat_diffuse(maps, time),
        blurred,
        agree=None,
        target=1 / 0.8,
        repeats=5,
    )
    difference = np.abs(smooth - blurred()).max() / np.abs(smooth).max()
    print(f"largest difference of the two, of the largest value: {difference:.2f}")


def fits() -> None:
    torch.manual_seed(0)
    maps = torch.randn(64, 64, 32, 32)

    def ours() -> Tensor:
        fit = fit_first_order(maps)
        return torch.stack([fit.horizontal, fit.vertical])

    def by_lstsq() -> Tensor:
        z = maps.double()
        found = []
        for here, axis in ((z[..., :-1], -1), (z[..., :-1, :], -2)):
            change = z.diff(dim=axis).movedim(1, -1).reshape(-1, 64)
            found.append(torch.linalg.lstsq(here.movedim(1, -1).reshape(-1, 64), change).solution.T)
        return torch.stack(found)

    compare(
        "fit_first_order of 64 x 64 x 32 x 32, against the matrices alone by torch's lstsq",
        ours,
        by_lstsq,
        agree=1e-9,
        value=tensors,
        repeats=3,
    )
    report("fit_first_order, the same", lambda: fit_first_order(maps), 0.300)


def report(what: str, function: Callable[[], Any], target: float | None) -> None:
    """Print a time beside a target in seconds."""
    seconds = measure(function, repeats=3)
    verdict = ""
    if target is not None:
        verdict = f"  target {target * 1e3:.0f} ms {'met' if seconds <= target else 'MISSED'}"
    print(f"{what}: {seconds * 1e3:.1f} ms{verdict}", flush=True)


if __name__ == "__main__":
    main()
