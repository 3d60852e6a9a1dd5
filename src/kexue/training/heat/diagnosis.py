r"""Is a feature map continuous, linear, harmonic? Least-squares fits with their nulls.

=========================  ===========  =============  ======================
measure                    white noise  smooth images  exact linear solution
=========================  ===========  =============  ======================
``r2`` of the next value   0            near 1         1
``gain`` over copying      1/2          near 0         1
anisotropic residual       5/9          about 0.7      0
isotropic residual         5/3          about 1.5      depends on the system
=========================  ===========  =============  ======================

A gain is no merit by itself: half of the difference of two independent values is known from the
first of them. An isotropic residual of 1 is that of uncorrelated second differences, 0 that of a
harmonic map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["FirstOrderFit", "LaplaceFit", "fit_first_order", "fit_laplace"]

Matrix = Float[Tensor, "channels channels"]

_WORST_CONDITION = 1e10
"""Of a Gram matrix, beyond which the least squares are solved without it."""


@dataclass(frozen=True, eq=False)
class FirstOrderFit:
    """What :func:`fit_first_order` returns.

    Attributes
    ----------
    horizontal, vertical : Tensor, shape (channels, channels)
        A and B, acting on channel vectors from the left; float64.
    horizontal_r2, vertical_r2 : float
        Explained share of the next value's variance: continuity and linearity together.
    horizontal_gain, vertical_gain : float
        Explained share of the difference to it: what the linear map adds over copying.
    commutator : float
        Norm of AB - BA relative to the norms of A and B; 0 if one of these is.

    Examples
    --------
    >>> maps = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    >>> fit_first_order(maps).horizontal_gain
    1.0
    """

    horizontal: Matrix
    vertical: Matrix
    horizontal_r2: float
    vertical_r2: float
    horizontal_gain: float
    vertical_gain: float
    commutator: float


@dataclass(frozen=True, eq=False)
class LaplaceFit:
    """What :func:`fit_laplace` returns.

    Attributes
    ----------
    matrix : Tensor, shape (channels, channels)
        S, acting on channel vectors from the left; float64.
    anisotropic_residual : float
        Share of the horizontal second differences that the best S leaves.
    isotropic_residual : float
        Energy of the Laplacian relative to that of its two parts, from 0 (harmonic) to 2.

    Examples
    --------
    >>> x = torch.arange(4.0)
    >>> fit_laplace((x**2 - x[:, None] ** 2)[None, None]).isotropic_residual
    0.0
    """

    matrix: Matrix
    anisotropic_residual: float
    isotropic_residual: float


def fit_first_order(
    features: Float[Tensor, "batch channels height width"], *, ridge: float = 0.0
) -> FirstOrderFit:
    r"""Fit :math:`z(x+1) - z(x) = A z(x)` along rows, and B along columns.

    Least squares over batch and positions without an intercept, computed in float64 on the CPU. Of
    several solutions the one of least norm is taken.

    Parameters
    ----------
    features : Tensor, shape (batch, channels, height, width)
        Feature maps, images, or sequences as maps of one row.
    ridge : float
        Penalty on the squared entries, relative to the mean diagonal of the Gram matrix.

    Returns
    -------
    FirstOrderFit
        Ratios with a zero denominator are NaN.

    Raises
    ------
    ValueError
        Where the features are no batch of finite maps, or the ridge is negative.
    TypeError
        Where the features are no tensor of floating-point numbers.

    Examples
    --------
    White noise: nothing is predictable, yet half of the difference is.

    >>> noise = torch.randn(50, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    >>> fit = fit_first_order(noise)
    >>> round(fit.horizontal_r2, 2), round(fit.horizontal_gain, 2)
    (0.0, 0.5)
    """
    z = _maps(features)
    ridge = _penalty(ridge)
    horizontal, horizontal_r2, horizontal_gain = _next_value(z[..., :-1], z[..., 1:], ridge)
    vertical, vertical_r2, vertical_gain = _next_value(z[..., :-1, :], z[..., 1:, :], ridge)
    norms = float(horizontal.norm() * vertical.norm())
    difference = float((horizontal @ vertical - vertical @ horizontal).norm())
    return FirstOrderFit(
        horizontal,
        vertical,
        horizontal_r2,
        vertical_r2,
        horizontal_gain,
        vertical_gain,
        difference / norms if norms > 0 else 0.0,
    )


def fit_laplace(
    features: Float[Tensor, "batch channels height width"], *, ridge: float = 0.0
) -> LaplaceFit:
    r"""Fit :math:`z_{xx} + S z_{yy} = 0` to the second differences at interior positions.

    Computed like :func:`fit_first_order`. The isotropic residual is that of Laplace's equation,

    .. math::
        \frac{\sum |z_{xx} + z_{yy}|^2}{\sum (|z_{xx}|^2 + |z_{yy}|^2)} .

    Parameters
    ----------
    features : Tensor, shape (batch, channels, height, width)
        Feature maps or images of at least 3 rows and columns.
    ridge : float
        Penalty on the squared entries of S, relative to the mean diagonal of the Gram matrix.

    Returns
    -------
    LaplaceFit
        Ratios with a zero denominator are NaN.

    Raises
    ------
    ValueError
        Where the features are no batch of finite maps, or too small, or the ridge is negative.
    TypeError
        Where the features are no tensor of floating-point numbers.

    Examples
    --------
    >>> noise = torch.randn(50, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    >>> fit = fit_laplace(noise)
    >>> round(fit.anisotropic_residual, 2), round(fit.isotropic_residual, 2)
    (0.56, 1.67)
    """
    z = _maps(features)
    ridge = _penalty(ridge)
    if min(z.shape[-2:]) < 3:
        raise ValueError(
            f"features must have at least 3 rows and columns, got {z.shape[-2]} x {z.shape[-1]}"
        )
    inner = z[..., 1:-1, 1:-1]
    z_xx = (z[..., 1:-1, 2:] - 2 * inner + z[..., 1:-1, :-2]).flatten(1)
    z_yy = (z[..., 2:, 1:-1] - 2 * inner + z[..., :-2, 1:-1]).flatten(1)
    minus_s = _least_squares(z_yy, z_xx, ridge)
    left = _energy(z_xx - minus_s @ z_yy)
    horizontal, vertical = _energy(z_xx), _energy(z_yy)
    return LaplaceFit(
        -minus_s, _ratio(left, horizontal), _ratio(_energy(z_xx + z_yy), horizontal + vertical)
    )


def _next_value(here: Tensor, there: Tensor, ridge: float) -> tuple[Matrix, float, float]:
    """The matrix of one direction, its r2 and its gain."""
    z, following = here.flatten(1), there.flatten(1)
    change = following - z
    matrix = _least_squares(z, change, ridge)
    error = _energy(torch.addmm(change, matrix, z, alpha=-1))
    # Relative to one of the values first, so that a constant has no variance at all.
    level = following - following[:, :1]
    variation = _energy(level - level.mean(1, keepdim=True))
    return matrix, 1 - _ratio(error, variation), 1 - _ratio(error, _energy(change))


def _least_squares(
    inputs: Float[Tensor, "channels count"], outputs: Float[Tensor, "channels count"], ridge: float
) -> Matrix:
    """Return the matrix M of least norm that minimises |outputs - M inputs|² + penalty |M|²."""
    gram = inputs @ inputs.T
    penalty = ridge * gram.diagonal().mean()
    gram.diagonal().add_(penalty)
    eigenvalues = torch.linalg.eigvalsh(gram)
    if eigenvalues[0] * _WORST_CONDITION > eigenvalues[-1]:
        return torch.cholesky_solve(inputs @ outputs.T, torch.linalg.cholesky(gram)).T
    penalties = penalty.sqrt() * torch.eye(len(gram), dtype=gram.dtype)
    rows = torch.cat([inputs, penalties], 1).T
    targets = torch.cat([outputs, torch.zeros_like(penalties)], 1).T
    return torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x).square())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _maps(features: Tensor) -> Float[Tensor, "channels batch height width"]:
    """The features in float64 on the CPU, channels first."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"features must be a tensor of floating-point numbers, got {kind}")
    if features.ndim != 4 or features.shape[1] < 1:
        raise ValueError(
            "features must have shape (batch, channels, height, width), "
            f"got {tuple(features.shape)}"
        )
    z = features.detach().cpu().double().movedim(1, 0)
    if not bool(z.isfinite().all()):
        raise ValueError(f"features must be finite, got {int((~z.isfinite()).sum())} that are not")
    return z


def _penalty(ridge: float) -> float:
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    return float(ridge)
