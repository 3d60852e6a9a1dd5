r"""The heat equation on a grid, solved: its steady state with given values, and its flow in time.

Both use the 5-point Laplacian L of the grid (3-point for sequences) with a reflecting border, that
is the graph Laplacian, degree minus neighbours.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float
from scipy.sparse.linalg import splu
from torch import Tensor

__all__ = ["harmonic_fill", "heat_diffuse"]

_DENSE = 2048
"""Masked positions up to which a dense factor on the features' device is used."""


def harmonic_fill(
    features: Float[Tensor, "batch ..."], mask: Bool[Tensor, "..."]
) -> Float[Tensor, "batch ..."]:
    r"""Fill masked positions so that each is the mean of its neighbours.

    With the visible values as boundary this is the discrete Dirichlet problem

    .. math::
        z_m = -L_{mm}^{-1} L_{mv} z_v .

    In one dimension it is linear interpolation between the nearest visible values, and constant
    continuation at the ends. Values under the mask are never read: they may be NaN, and receive no
    gradient. Up to 2048 masked positions a dense Cholesky factor is used, beyond that a sparse one
    on the CPU; both in float64.

    Parameters
    ----------
    features : Tensor, shape (batch, length, channels) or (batch, channels, height, width)
        A batch of sequences or of maps.
    mask : Tensor of bool, shape (length,) or (height, width)
        True where to fill.

    Returns
    -------
    Tensor
        Shape and dtype of the features, linear in the visible ones and differentiable. Where
        nothing is masked, the features themselves.

    Raises
    ------
    ValueError
        Where features or mask have another shape, or no position is visible.
    TypeError
        Where the features are no tensor of floating-point numbers.

    Examples
    --------
    >>> ramp = torch.tensor([[[[0.0, torch.nan, 2.0], [1.0, 2.0, 3.0]]]])
    >>> harmonic_fill(ramp, ramp[0, 0].isnan())[0, 0, 0]
    tensor([0.0000, 1.3333, 2.0000])
    """
    _check_floating(features, "features")
    if features.ndim not in (3, 4):
        raise ValueError(
            "features must have shape (batch, length, channels) or (batch, channels, height, "
            f"width), got {tuple(features.shape)}"
        )
    positions = features.shape[1:2] if features.ndim == 3 else features.shape[2:]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != positions:
        kind = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"mask must be a bool tensor of the positions' shape {tuple(positions)}, got {kind}"
        )
    if bool(mask.all()):
        raise ValueError("some position must be visible, got a mask that is True everywhere")
    if not bool(mask.any()):
        return features
    columns = features.movedim(1, 0) if features.ndim == 3 else features.flatten(2).movedim(2, 0)
    filled = _filled(columns.flatten(1), mask.cpu().numpy()).view(columns.shape)
    if features.ndim == 3:
        return filled.movedim(0, 1)
    return filled.movedim(0, 2).unflatten(2, positions)


def heat_diffuse(
    maps: Float[Tensor, "*batch height width"], time: float
) -> Float[Tensor, "*batch height width"]:
    r"""Let maps diffuse for a time, exactly, within reflecting borders.

    The solution of :math:`\dot u = -L u` is :math:`e^{-tL_h} u \, e^{-tL_w}`; the orthonormal
    DCT-II diagonalises both factors, with eigenvalues :math:`l_k = 4 \sin^2(\pi k / 2n)`. The sum
    is kept, positive maps stay positive, and times add up. Away from the border this is a Gaussian
    blur of standard deviation :math:`\sqrt{2t}` pixels. The cost of a map is one matrix product
    along each axis.

    Parameters
    ----------
    maps : Tensor, shape (..., height, width)
        Saliency maps, images, feature maps. Half precision is computed in single.
    time : float
        At least 0, in units of a pixel squared.

    Returns
    -------
    Tensor
        Shape and dtype of the maps.

    Raises
    ------
    ValueError
        Where the maps have fewer than two dimensions, or the time is negative or not finite.
    TypeError
        Where the maps are no tensor of floating-point numbers, or the time no number.

    Examples
    --------
    >>> pulse = torch.zeros(3, 3)
    >>> pulse[0, 0] = 1.0
    >>> heat_diffuse(pulse, 0.5).round(decimals=3)
    tensor([[0.4540, 0.1740, 0.0450],
            [0.1740, 0.0670, 0.0170],
            [0.0450, 0.0170, 0.0050]])
    """
    _check_floating(maps, "maps")
    if maps.ndim < 2:
        raise ValueError(f"maps must have shape (..., height, width), got {tuple(maps.shape)}")
    if not isinstance(time, Real):
        raise TypeError(f"time must be a number, got {type(time).__name__}")
    if not 0 <= time < math.inf:
        raise ValueError(f"time must be finite and at least 0, got {time}")
    dtype = torch.promote_types(maps.dtype, torch.float32)
    rows, columns = (_heat_kernel(n, float(time), maps.device) for n in maps.shape[-2:])
    with torch.autocast(maps.device.type, enabled=False):
        diffused = rows.to(dtype) @ (maps.to(dtype) @ columns.to(dtype))
    return diffused.to(maps.dtype)


def _heat_kernel(n: int, time: float, device: torch.device) -> Float[Tensor, "n n"]:
    """Exponential of -time times the Laplacian of a path, symmetric, in float64."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    cosines = torch.cos(math.pi / max(n, 1) * torch.outer(k, k + 0.5)) * math.sqrt(2 / max(n, 1))
    cosines[:1] /= math.sqrt(2)
    eigenvalues = 4 * torch.sin(math.pi / (2 * max(n, 1)) * k) ** 2
    identity = torch.eye(n, dtype=torch.float64, device=device)
    # By the difference to the identity, which is exact at time 0. All entries of the true kernel
    # are positive; far from the diagonal they are below rounding, which must not turn them.
    return (identity + (cosines.T * torch.expm1(-time * eigenvalues)) @ cosines).clamp(min=0.0)


def _filled(
    columns: Float[Tensor, "positions count"], mask: Bool[np.ndarray, "*grid"]
) -> Float[Tensor, "positions count"]:
    """Return the positions in order, the masked ones computed in float64."""
    masked = np.flatnonzero(mask)
    inside, source = _boundary(mask)
    device = columns.device
    flux = columns.new_zeros((len(masked), columns.shape[1]), dtype=torch.float64).index_add(
        0,
        torch.from_numpy(np.searchsorted(masked, inside)).to(device),
        columns.index_select(0, torch.from_numpy(source).to(device)).double(),
    )
    laplacian = _laplacian(mask.shape)[masked][:, masked]
    if len(masked) <= _DENSE:
        factor = torch.linalg.cholesky(torch.from_numpy(laplacian.toarray()).to(device))
        values = torch.cholesky_solve(flux, factor)
    else:
        values = _SparseSolve.apply(flux, splu(laplacian.tocsc()))
    return columns.index_copy(0, torch.from_numpy(masked).to(device), values.to(columns.dtype))


class _SparseSolve(torch.autograd.Function):
    """Solution of a symmetric sparse system: its own adjoint."""

    @staticmethod
    def forward(ctx: Any, right: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        solution = factor.solve(np.ascontiguousarray(right.detach().cpu().numpy()))
        return torch.from_numpy(solution).to(right.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SparseSolve.apply(gradient, ctx.factor), None


def _neighbours(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All edges of the grid, once each, as positions in row-major order."""
    place = np.arange(math.prod(shape)).reshape(shape)
    before, after = [], []
    for axis, n in enumerate(shape):
        before.append(place.take(np.arange(n - 1), axis).ravel())
        after.append(place.take(np.arange(1, n), axis).ravel())
    return np.concatenate(before), np.concatenate(after)


def _laplacian(shape: tuple[int, ...]) -> scipy.sparse.csr_array:
    one, two = _neighbours(shape)
    n = math.prod(shape)
    ones = np.ones(2 * len(one))
    adjacency = scipy.sparse.csr_array((ones, (np.r_[one, two], np.r_[two, one])), shape=(n, n))
    return (scipy.sparse.diags_array(adjacency.sum(axis=1)) - adjacency).tocsr()


def _boundary(mask: Bool[np.ndarray, "*grid"]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a masked position and a visible neighbour."""
    one, two = _neighbours(mask.shape)
    inside, outside = np.r_[one, two], np.r_[two, one]
    crossing = mask.ravel()[inside] & ~mask.ravel()[outside]
    return inside[crossing], outside[crossing]


def _check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be a tensor of floating-point numbers, got {kind}")
