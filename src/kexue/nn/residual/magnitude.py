r"""The size of a matrix apart from its direction, and how strongly a loss depends on it.

A weight is :math:`W = \lambda U` with :math:`U` as nearly orthogonal as a factor can make it:

.. math::
    \lambda = \operatorname*{argmin}_{\kappa > 0} \lVert WW^\top/\kappa^2 - I \rVert_F
            = \frac{\lVert WW^\top \rVert_F}{\lVert W \rVert_F}, \qquad
    \frac{\partial L}{\partial \lambda}
            = \Bigl\langle \frac{\partial L}{\partial W}, U \Bigr\rangle .

Source: https://kexue.fm/archives/8994.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["magnitude", "magnitude_gradient"]


def magnitude(weight: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""Return the size :math:`\lambda = \lVert WW^\top \rVert_F / \lVert W \rVert_F` of a matrix.

    It is c for c times an orthogonal matrix. A Gaussian matrix of m rows, n columns and variance
    :math:`\sigma^2` has :math:`\lambda^2 \approx (m + n + 1)\,\sigma^2`: for a square one with
    :math:`\sigma^2 = 1/n` that is 2 and not 1, since such a matrix is orthogonal entry by entry
    only.

    Parameters
    ----------
    weight : Tensor, shape (..., rows, columns)
        Matrices. Half precision is computed in single precision.

    Returns
    -------
    Tensor, shape (...)
        In the dtype of ``weight``; differentiable.

    Raises
    ------
    TypeError
        For a weight that is not real and floating.
    ValueError
        For fewer than two dimensions, entries that are not finite, or a matrix of zeros, which has
        no direction.

    Examples
    --------
    >>> magnitude(torch.diag(torch.tensor([1.0, 2.0])))
    tensor(1.8439)
    """
    _check_matrix(weight, "weight")
    wide = weight.float() if weight.itemsize < 4 else weight
    # Of the two Gram matrices, whose norms are equal, the smaller one.
    wide = wide if wide.shape[-2] <= wide.shape[-1] else wide.mT
    # Dividing by the largest entry first keeps fourth powers within range.
    largest = wide.detach().abs().amax((-2, -1), keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinite entries")
    if not bool((largest > 0).all()):
        raise ValueError("weight must not be a matrix of zeros, which has no direction")
    scaled = wide / largest
    ratio = torch.linalg.matrix_norm(scaled @ scaled.mT) / torch.linalg.matrix_norm(scaled)
    return (ratio * largest[..., 0, 0]).to(weight.dtype)


def magnitude_gradient(
    weight: Float[Tensor, "*batch rows columns"], gradient: Float[Tensor, "*batch rows columns"]
) -> Float[Tensor, "*batch"]:
    r"""Return a loss's derivative by the size of a matrix, :math:`\langle G, W \rangle / \lambda`.

    Parameters
    ----------
    weight : Tensor, shape (..., rows, columns)
        Matrices W.
    gradient : Tensor, shape (..., rows, columns)
        Derivative G of the loss by W.

    Returns
    -------
    Tensor, shape (...)
        In the dtype of ``weight``.

    Raises
    ------
    TypeError
        For tensors that are not real and floating.
    ValueError
        For different shapes, fewer than two dimensions, entries that are not finite, or a matrix of
        zeros.

    Examples
    --------
    The loss of half the squared norm of c times the identity is :math:`\tfrac12 n c^2`:

    >>> weight = 3 * torch.eye(4)
    >>> magnitude_gradient(weight, gradient=weight)
    tensor(12.)
    """
    _check_matrix(gradient, "gradient")
    if weight.shape != gradient.shape:
        raise ValueError(
            "weight and gradient must have the same shape, "
            f"got {tuple(weight.shape)} and {tuple(gradient.shape)}"
        )
    if not bool(gradient.isfinite().all()):
        raise ValueError("gradient must be finite, got NaN or infinite entries")
    size = magnitude(weight)
    accumulate = torch.float32 if weight.itemsize < 4 else weight.dtype
    inner = (gradient.to(accumulate) * weight.to(accumulate)).sum((-2, -1))
    return (inner / size.to(accumulate)).to(weight.dtype)


def _check_matrix(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a real floating tensor, got {kind}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (..., rows, columns), got {tuple(x.shape)}")
