"""What does not change under invertible linear maps: KL, Bhattacharyya and Hellinger."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.gaussian.laws import Array, Numbers, _compare, _Dense, _Diagonal, _Law
from kexue.stats.gaussian.stable import (
    _deviation_gap,
    _diagonal,
    _excess,
    _LogDetOfSquare,
    _solve_difference,
    _sqrt,
    _square_norm,
    _symmetric,
)

__all__ = ["bhattacharyya_distance", "hellinger_distance", "kl_divergence"]


def kl_divergence(
    mean1: Real[Array, "*#batch d"] | Numbers,
    covariance1: Real[Array, "*shape1"] | Numbers,
    mean2: Real[Array, "*#batch d"] | Numbers,
    covariance2: Real[Array, "*shape2"] | Numbers,
    *,
    covariance_type: str = "full",
) -> Float[Array, "*broadcast"]:
    r"""Return the Kullback-Leibler divergence KL(1 || 2) in nats.

    With :math:`N = L_2^{-1} L_1 - 1` and :math:`r_i` the diagonal of this triangular matrix,

    .. math::
        \mathrm{KL}(p_1 \| p_2) = \tfrac12 \|N\|_F^2 + \sum_i \bigl(r_i - \log(1 + r_i)\bigr)
            + \tfrac12 \|L_2^{-1} \Delta\|^2,

    all terms non-negative: so is the result, and it is 0 for equal laws. Leading dimensions
    broadcast; covariances that are shared by many means are used once.

    Parameters
    ----------
    mean1, mean2 : array (..., d)
        Means.
    covariance1, covariance2 : array
        Covariances, both of the kind that ``covariance_type`` says.
    covariance_type : {"full", "cholesky", "diag", "spherical"}
        "full": symmetric positive definite matrices (..., d, d). "cholesky": their lower
        triangular factors (..., d, d), with a positive diagonal; what stands above the diagonal is
        ignored. "diag": variances (..., d). "spherical": one variance (...).

    Returns
    -------
    array (...,)
        Divergence of each pair.

    Raises
    ------
    ValueError
        Where shapes do not fit, a number is not finite, a matrix is not symmetric or not positive
        definite (also where only rounding makes it so), or a variance is not positive.
    TypeError
        Where numpy and torch are mixed, or numbers are not in single or double precision.

    Examples
    --------
    The term of a variational autoencoder, the divergence from the standard normal law:

    >>> import torch
    >>> mean = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    >>> variance = torch.tensor([[1.0, 1.0], [1.0, 4.0]])
    >>> kl_divergence(mean, variance, torch.zeros(2), torch.ones(2), covariance_type="diag")
    tensor([0.5000, 2.8069])
    """
    return _compare(
        _kl,
        covariance_type,
        mean1=mean1,
        covariance1=covariance1,
        mean2=mean2,
        covariance2=covariance2,
    )


def bhattacharyya_distance(
    mean1: Real[Array, "*#batch d"] | Numbers,
    covariance1: Real[Array, "*shape1"] | Numbers,
    mean2: Real[Array, "*#batch d"] | Numbers,
    covariance2: Real[Array, "*shape2"] | Numbers,
    *,
    covariance_type: str = "full",
) -> Float[Array, "*broadcast"]:
    r"""Return the Bhattacharyya distance :math:`D_B = -\log\int\sqrt{p_1 p_2}`.

    It bounds the error of the best classifier between two classes of frequencies
    :math:`\pi_1, \pi_2` by :math:`\sqrt{\pi_1\pi_2}\,e^{-D_B}`. With :math:`x_i` the eigenvalues
    of :math:`\bar\Sigma^{-1}(\Sigma_1 - \Sigma_2)/2`,

    .. math:: D_B = \tfrac18 \Delta^\top \bar\Sigma^{-1} \Delta - \tfrac14 \sum_i \log(1 - x_i^2).

    Symmetric, 0 for equal laws, no metric (see :func:`hellinger_distance`).

    Parameters
    ----------
    mean1, mean2 : array (..., d)
        Means.
    covariance1, covariance2 : array
        Covariances, both of the kind that ``covariance_type`` says.
    covariance_type : {"full", "cholesky", "diag", "spherical"}
        See :func:`kl_divergence`.

    Returns
    -------
    array (...,)
        Distance of each pair.

    Raises
    ------
    ValueError, TypeError
        As :func:`kl_divergence`.

    Examples
    --------
    >>> import numpy as np
    >>> bhattacharyya_distance(np.zeros(1), 4.0, np.full(1, 3.0), 25.0, covariance_type="spherical")
    np.float64(0.26336798511279...)
    """
    return _compare(
        _bhattacharyya,
        covariance_type,
        mean1=mean1,
        covariance1=covariance1,
        mean2=mean2,
        covariance2=covariance2,
    )


def hellinger_distance(
    mean1: Real[Array, "*#batch d"] | Numbers,
    covariance1: Real[Array, "*shape1"] | Numbers,
    mean2: Real[Array, "*#batch d"] | Numbers,
    covariance2: Real[Array, "*shape2"] | Numbers,
    *,
    covariance_type: str = "full",
) -> Float[Array, "*broadcast"]:
    r"""Return the Hellinger distance, a metric between 0 and 1.

    .. math:: H^2 = \tfrac12 \int (\sqrt{p_1} - \sqrt{p_2})^2 = 1 - e^{-D_B}.

    Where the laws are equal it has a kink, and gradient 0 here.

    Parameters
    ----------
    mean1, mean2 : array (..., d)
        Means.
    covariance1, covariance2 : array
        Covariances, both of the kind that ``covariance_type`` says.
    covariance_type : {"full", "cholesky", "diag", "spherical"}
        See :func:`kl_divergence`.

    Returns
    -------
    array (...,)
        Distance of each pair, in [0, 1].

    Raises
    ------
    ValueError, TypeError
        As :func:`kl_divergence`.

    Examples
    --------
    >>> import numpy as np
    >>> hellinger_distance(np.zeros(3), np.eye(3), np.full(3, 100.0), np.eye(3))
    np.float64(1.0)
    """
    return _compare(
        _hellinger,
        covariance_type,
        mean1=mean1,
        covariance1=covariance1,
        mean2=mean2,
        covariance2=covariance2,
    )


def _kl(first: _Law, second: Any) -> Tensor:
    if isinstance(first, _Diagonal):
        shift = first.mean - second.mean
        change = (first.variance - second.variance) / second.variance
        excess = _excess(change, torch.log(first.variance / second.variance))
        # A square of the shift alone may leave the range of numbers.
        return (excess.sum(-1) + ((shift / second.variance.sqrt()) ** 2).sum(-1)) / 2
    relative = _solve_difference(second.factor, first.factor, second.factor)
    logs = torch.log(_diagonal(first.factor) / _diagonal(second.factor))
    spread = _square_norm(relative) / 2 + _excess(_diagonal(relative), logs).sum(-1)
    return spread + _mahalanobis(second.factor, first.mean, second.mean) / 2


def _bhattacharyya(first: _Law, second: Any) -> Tensor:
    if isinstance(first, _Diagonal):
        shift = first.mean - second.mean
        product = torch.sqrt(first.variance) * torch.sqrt(second.variance)
        average = first.variance / 2 + second.variance / 2
        gap = _deviation_gap(first.variance, second.variance)
        spread = torch.log1p(gap**2 / (2 * product)).sum(-1) / 2
        return spread + ((shift / average.sqrt()) ** 2).sum(-1) / 8
    factor = _average_factor(first, second)
    spread = _log_det_gap(first, second, factor)
    return spread + _mahalanobis(factor, first.mean, second.mean) / 8


def _hellinger(first: _Law, second: Any) -> Tensor:
    return _sqrt(-torch.expm1(-_bhattacharyya(first, second)))


def _mahalanobis(factor: Tensor, mean1: Tensor, mean2: Tensor) -> Tensor:
    """Squared distance of the means in units of factor @ factor.mT."""
    shift = _solve_difference(factor, mean1[..., None], mean2[..., None])
    return (shift**2).sum((-2, -1))


def _average_factor(first: _Dense, second: _Dense) -> Tensor:
    """The Cholesky factor of the average covariance."""
    factor, info = torch.linalg.cholesky_ex((_covariance(first) + _covariance(second)) / 2)
    if not torch.compiler.is_compiling() and (info > 0).any():
        raise ValueError(
            "the average of covariance1 and covariance2 must be positive definite, "
            f"got one that is singular to rounding in {int((info > 0).sum())} pairs"
        )
    return factor


def _log_det_gap(first: _Dense, second: _Dense, factor: Tensor) -> Tensor:
    """Half the logarithm of det(average) / sqrt(det 1 · det 2)."""
    mid = _diagonal(factor)
    ratios = (mid / _diagonal(first.factor)) * (mid / _diagonal(second.factor))
    gap = torch.log(ratios).sum(-1) / 2
    # Below this all eigenvalues x of the relative difference are less than 1/2, and the logarithms
    # of the diagonals cancel; above, what cancels does not count.
    small = gap.detach() < -math.log(1 - 0.5**2) / 4
    if torch.compiler.is_compiling():
        relative = _relative_difference(factor, _half_difference(first, second))
        keep = small[..., None, None]
        exact = _LogDetOfSquare.apply(torch.where(keep, relative, torch.zeros_like(relative)))
        return torch.where(small, exact, gap)
    if not small.any():
        return gap
    half = _half_difference(first, second).expand(*small.shape, *factor.shape[-2:])
    relative = _relative_difference(factor[small], half[small])
    gap = gap.clone()
    gap[small] = _LogDetOfSquare.apply(relative)
    return gap


def _covariance(law: _Dense) -> Tensor:
    return law.factor @ law.factor.mT if law.covariance is None else law.covariance


def _half_difference(first: _Dense, second: _Dense) -> Tensor:
    if first.covariance is not None and second.covariance is not None:
        return (first.covariance - second.covariance) / 2
    # Products of factors that nearly agree would have to be subtracted.
    return _symmetric((first.factor - second.factor) @ (first.factor + second.factor).mT) / 2


def _relative_difference(factor: Tensor, half_difference: Tensor) -> Tensor:
    left = torch.linalg.solve_triangular(factor, half_difference, upper=False)
    return _symmetric(torch.linalg.solve_triangular(factor, left.mT, upper=False))
