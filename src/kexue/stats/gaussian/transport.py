r"""Moving one law into the other: the Wasserstein distance, its map, the distance of samples.

The factors of one covariance differ by an orthogonal matrix, and W2 is the smallest distance
between any two factors: an orthogonal Procrustes problem,

.. math:: W_2^2 = \|\Delta\|^2 + \min_{U^\top U = 1} \|L_1 - L_2 U\|_F^2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.gaussian.laws import (
    Array,
    Numbers,
    _common_dtype,
    _compare,
    _Diagonal,
    _full_precision,
    _Law,
    _sample_factor,
    _tensors,
)
from kexue.stats.gaussian.stable import _deviation_gap, _sqrt, _square_norm, _symmetric

__all__ = [
    "OptimalTransportMap",
    "frechet_distance",
    "optimal_transport_map",
    "wasserstein_distance",
]


def wasserstein_distance(
    mean1: Real[Array, "*#batch d"] | Numbers,
    covariance1: Real[Array, "*shape1"] | Numbers,
    mean2: Real[Array, "*#batch d"] | Numbers,
    covariance2: Real[Array, "*shape2"] | Numbers,
    *,
    covariance_type: str = "full",
    squared: bool = False,
) -> Float[Array, "*broadcast"]:
    r"""Return the 2-Wasserstein distance W2, in the units of x.

    .. math:: W_2^2 = \min E\|x - y\|^2
        = \|\Delta\|^2 + \|L_1\|_F^2 + \|L_2\|_F^2 - 2\|L_2^\top L_1\|_*,

    the minimum over all joint laws of x and y with these marginals. "full" matrices may be
    singular; the covariance part then is known to about :math:`\sqrt{\epsilon}` of its size, and
    :func:`frechet_distance` does better from the samples.

    Differentiable once: a second derivative with respect to matrices raises. Where the distance
    is 0 its gradient is 0 here. Through a singular covariance there is no gradient.

    Parameters
    ----------
    mean1, mean2 : array (..., d)
        Means.
    covariance1, covariance2 : array
        Covariances, both of the kind that ``covariance_type`` says.
    covariance_type : {"full", "cholesky", "diag", "spherical"}
        See :func:`kl_divergence`; "full" matrices may be positive semi-definite.
    squared : bool
        Whether to return W2², the "Fréchet distance" of generative models.

    Returns
    -------
    array (...,)
        Distance of each pair.

    Raises
    ------
    ValueError
        Where shapes do not fit, a number is not finite, a matrix is not symmetric or has negative
        eigenvalues, a variance is not positive, or a gradient through a singular matrix is asked
        for.
    TypeError
        Where numpy and torch are mixed, or numbers are not in single or double precision.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(3)
    >>> wasserstein_distance(zero, np.diag([1.0, 0, 0]), zero, np.diag([0, 4.0, 0]), squared=True)
    np.float64(5.0)
    """
    return _compare(
        _wasserstein_squared if squared else _wasserstein,
        covariance_type,
        (True, True),
        mean1=mean1,
        covariance1=covariance1,
        mean2=mean2,
        covariance2=covariance2,
    )


class OptimalTransportMap(NamedTuple):
    """The affine map that moves one normal law to another at the least mean square distance.

    Attributes
    ----------
    matrix : array (..., d, d)
        Symmetric, positive semi-definite.
    shift : array (..., d)
        Mean 2 less the image of mean 1.

    Raises
    ------
    ValueError
        When called, where the points have another dimension.

    Examples
    --------
    >>> import numpy as np
    >>> double = OptimalTransportMap(matrix=2 * np.eye(2), shift=np.array([0.0, 1.0]))
    >>> double(np.array([[1.0, 1.0], [0.0, 3.0]]))
    array([[2., 3.],
           [0., 7.]])
    """

    matrix: Float[Array, "*batch d d"]
    shift: Float[Array, "*batch d"]

    def __call__(self, points: Array) -> Array:
        """Move points: (d,) or (..., n, d), where leading dimensions are those of the map."""
        d = self.shift.shape[-1]
        least = 1 if self.shift.ndim == 1 else 2
        if points.ndim < least or points.shape[-1] != d:
            wanted = f"(..., {d})" if least == 1 else f"(..., n, {d})"
            raise ValueError(f"points must have shape {wanted}, got {tuple(points.shape)}")
        shift = self.shift if least == 1 else self.shift[..., None, :]
        return points @ self.matrix.swapaxes(-1, -2) + shift


def optimal_transport_map(
    mean1: Real[Array, "*#batch d"] | Numbers,
    covariance1: Real[Array, "*shape1"] | Numbers,
    mean2: Real[Array, "*#batch d"] | Numbers,
    covariance2: Real[Array, "*shape2"] | Numbers,
    *,
    covariance_type: str = "full",
) -> OptimalTransportMap:
    r"""Return the map x → A x + shift that turns law 1 into law 2 and attains W2.

    .. math:: A = L_2 U L_1^{-1}
        = \Sigma_1^{-1/2} (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2} \Sigma_1^{-1/2},
        \qquad A \Sigma_1 A = \Sigma_2.

    The points (1 - t) x + t (A x + shift) have the laws on the shortest way from 1 to 2. Half the
    gradient of W2² with respect to mean 1 is :math:`\Delta`; with respect to covariance 1 the
    gradient is 1 - A. Differentiable once.

    Parameters
    ----------
    mean1, mean2 : array (..., d)
        Means.
    covariance1, covariance2 : array
        Covariances, both of the kind that ``covariance_type`` says. The first has to be positive
        definite, the second may be singular.
    covariance_type : {"full", "cholesky", "diag", "spherical"}
        See :func:`kl_divergence`.

    Returns
    -------
    OptimalTransportMap
        Matrix (..., d, d) and shift (..., d); a function of points.

    Raises
    ------
    ValueError
        Where covariance 1 is singular, or :func:`wasserstein_distance` refuses the arguments.
    TypeError
        Where numpy and torch are mixed, or numbers are not in single or double precision.

    Examples
    --------
    >>> import numpy as np
    >>> mean, identity = np.zeros(2), np.eye(2)
    >>> optimal_transport_map(mean, identity, mean + 1, np.diag([4.0, 9.0]))
    OptimalTransportMap(matrix=array([[2., 0.],
           [0., 3.]]), shift=array([1., 1.]))
    """
    return OptimalTransportMap(
        *_compare(
            _transport,
            covariance_type,
            (False, True),
            mean1=mean1,
            covariance1=covariance1,
            mean2=mean2,
            covariance2=covariance2,
        )
    )


def frechet_distance(
    samples1: Real[Array, "n d"] | Numbers,
    samples2: Real[Array, "m d"] | Numbers,
    *,
    ddof: int = 1,
) -> Float[Array, ""]:
    r"""Return the Fréchet distance of two sets of samples: W2² of the normal laws fitted to them.

    Of features of an image network this is the FID. The centred samples are factors of the
    covariances, so those are never formed: n and m samples in d dimensions cost O(n m d) where
    they are fewer than d. Differentiable once with respect to the samples.

    Parameters
    ----------
    samples1, samples2 : array (n, d) and (m, d)
        Samples, one a row.
    ddof : int
        Covariances are sums of squares over n - ddof. Published FIDs use 1.

    Returns
    -------
    array ()
        The distance, squared as its definition has it.

    Raises
    ------
    ValueError
        Where the dimensions differ, there are no more than ``ddof`` samples, or one is not finite.
    TypeError
        Where numpy and torch are mixed, or numbers are not in single or double precision.

    Examples
    --------
    >>> import numpy as np
    >>> square = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> frechet_distance(square, square + 3).round(12)
    np.float64(18.0)
    """
    (x, y), as_given = _tensors(samples1=samples1, samples2=samples2)
    for name, samples in (("samples1", x), ("samples2", y)):
        if samples.ndim != 2:
            raise ValueError(f"{name} must have shape (n, d), got {tuple(samples.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            "samples1 and samples2 must have the same dimension d, "
            f"got {x.shape[1]} and {y.shape[1]}"
        )
    dtype = _common_dtype([x, y])
    mean1, factor1 = _sample_factor("samples1", x.to(dtype), ddof)
    mean2, factor2 = _sample_factor("samples2", y.to(dtype), ddof)
    with _full_precision(x):
        return as_given(((mean1 - mean2) ** 2).sum(-1) + _procrustes(factor1, factor2))


def _wasserstein(first: _Law, second: Any) -> Tensor:
    return _sqrt(_wasserstein_squared(first, second))


def _wasserstein_squared(first: _Law, second: Any) -> Tensor:
    shift = ((first.mean - second.mean) ** 2).sum(-1)
    if isinstance(first, _Diagonal):
        return shift + (_deviation_gap(first.variance, second.variance) ** 2).sum(-1)
    return shift + _procrustes(first.factor, second.factor)


def _transport(first: _Law, second: Any) -> tuple[Tensor, Tensor]:
    if isinstance(first, _Diagonal):
        matrix = torch.diag_embed(torch.sqrt(second.variance / first.variance))
    else:
        turned = second.factor @ _Polar.apply(second.factor.mT @ first.factor)[0]
        matrix = torch.linalg.solve_triangular(first.factor, turned, upper=False, left=False)
        matrix = _symmetric(matrix)
    shift = second.mean - (matrix @ first.mean[..., None])[..., 0]
    whole = (*shift.shape, shift.shape[-1])
    return (matrix if matrix.shape == whole else matrix.expand(whole).clone()), shift


def _procrustes(factor1: Tensor, factor2: Tensor) -> Tensor:
    """Smallest ‖L1 - L2 U‖² over orthogonal U, for factors (..., d, r1) and (..., d, r2)."""
    batch = torch.broadcast_shapes(factor1.shape[:-2], factor2.shape[:-2])
    factor1 = factor1.expand(*batch, *factor1.shape[-2:])
    factor2 = factor2.expand(*batch, *factor2.shape[-2:])
    if torch.is_grad_enabled() and (factor1.requires_grad or factor2.requires_grad):
        return _Procrustes.apply(factor1, factor2)[0]
    left, right = _narrow(factor1)[0], _narrow(factor2)[0]
    if torch.compiler.is_compiling():
        return _square_norm(_misfit(left, right)[0])
    size = _square_norm(left) + _square_norm(right)
    distance = size - 2 * torch.linalg.svdvals(right.mT @ left).sum(-1)
    # Singular values alone cost a fraction, and lose digits only where the factors nearly agree.
    close = distance < 1e-3 * size
    if close.any():
        distance[close] = _square_norm(_misfit(left[close], right[close])[0])
    return distance


class _Procrustes(torch.autograd.Function):
    """The smallest ‖L1 - L2 U‖², and the misfits that are half its gradients.

    At the minimum the derivative with respect to U is zero, so U counts as constant: no division
    by gaps between singular values. That is true once.
    """

    @staticmethod
    def forward(factor1: Tensor, factor2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (left, basis1), (right, basis2) = _narrow(factor1), _narrow(factor2)
        misfit, rotation = _misfit(left, right)
        return (
            _square_norm(misfit),
            _widen(misfit, basis1, factor1.shape[-1]),
            _widen(-misfit @ rotation.mT, basis2, factor2.shape[-1]),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        factor1, factor2, misfit1, misfit2 = ctx.saved_tensors
        scale = 2 * gradients[0][..., None, None]
        return _Once.apply(scale * misfit1, factor1, factor2), _Once.apply(
            scale * misfit2, factor1, factor2
        )


class _Polar(torch.autograd.Function):
    """The orthogonal factor P Qᵀ of P S Qᵀ; its derivative divides by sums of singular values."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, s, qh = torch.linalg.svd(x)
        return p @ qh, p, s, qh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, p, s, qh = ctx.saved_tensors
        turned = p.mT @ gradients[0] @ qh.mT
        turned = (turned - turned.mT) / (s[..., None] + s[..., None, :])
        return _Once.apply(p @ turned @ qh, x)


class _Once(torch.autograd.Function):
    """A gradient that depends on ``sources`` in a way that is not recorded, and says so.

    torch's own ``once_differentiable`` refuses only where the incoming gradient requires one.
    """

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError(
            "Wasserstein distances and transport maps of matrices can be differentiated once only; "
            'covariance_type="diag" has all derivatives'
        )


def _misfit(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L1 - L2 U at the best orthogonal U, and this U; zero columns make both equally wide."""
    width = max(left.shape[-1], right.shape[-1])
    left = torch.nn.functional.pad(left, (0, width - left.shape[-1]))
    right = torch.nn.functional.pad(right, (0, width - right.shape[-1]))
    p, _, qh = torch.linalg.svd(right.mT @ left)
    rotation = p @ qh
    misfit, straight = left - right @ rotation, left - right
    # Equal factors need no turning, and then nothing is rounded: equal laws have distance 0.
    keep = (_square_norm(straight) <= _square_norm(misfit))[..., None, None]
    one = torch.eye(width, dtype=left.dtype, device=left.device)
    return torch.where(keep, straight, misfit), torch.where(keep, one, rotation)


def _narrow(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A factor of the same covariance with at most d columns, and the basis that was left out."""
    if factor.shape[-1] <= factor.shape[-2]:
        return factor, None
    basis, triangle = torch.linalg.qr(factor.mT)
    return triangle.mT, basis


def _widen(misfit: Tensor, basis: Tensor | None, width: int) -> Tensor:
    return (
        misfit[..., :width].clone() if basis is None else misfit[..., : basis.shape[-1]] @ basis.mT
    )
