"""The exact field of finitely many charges, and what belongs to it: posterior mean and density.

    E = W (x − m, z),    log W = logsumexp_i(log w_i − (N+D)/2 log R_i²) − log S(N+D)

All weights are a softmax of logarithms: R^{−(N+D)} itself leaves the range of any float in high
dimension. Squared distances are one matrix product, in float64 and with the charges' mean as
origin. Where the subtraction in ‖x‖² − 2xy + ‖y‖² would cost digits that matter, close to a charge
and to the data plane, the distances to the few charges concerned are computed once more from the
differences, so that logarithms of weights and densities are good to 1e-6 nats. Compiled code does
not look at values, and keeps the product.

Source: https://arxiv.org/abs/2209.11178, https://arxiv.org/abs/2302.04265.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import betaln
from torch import Tensor

from kexue.generative.poisson_flow.inputs import (
    check_augmented_dim,
    check_data,
    check_floating,
    check_points,
    check_same_sample,
    heights,
    per_sample,
)

# Rounding of the product that a log kernel may show, and where a kernel counts no more, in nats.
_SHOWN = 1e-6
_LOST = 40.0
# Entries of the differences that are held at once.
_DIFFERENCES = 2**22

__all__ = [
    "PoissonField",
    "marginal_log_density",
    "poisson_field",
    "posterior_mean",
    "unit_sphere_area",
]


def unit_sphere_area(dim: float, *, log: bool = False) -> float:
    """Return the area of the unit sphere in R^n, S(n) = 2 π^{n/2} / Γ(n/2).

    Parameters
    ----------
    dim : float
        Dimension n of the space around the sphere, positive, not necessarily an integer.
    log : bool
        Whether to return log S(n), which stays finite in any dimension.

    Returns
    -------
    float
        The area, or its logarithm.

    Raises
    ------
    ValueError
        Where ``dim`` is not positive and finite.

    Examples
    --------
    >>> round(unit_sphere_area(3), 6)
    12.566371
    >>> round(unit_sphere_area(3073, log=True), 3)
    -7974.883
    """
    if not 0 < dim < math.inf:
        raise ValueError(f"dim must be positive and finite, got {dim}")
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    return log_area if log else math.exp(log_area)


@dataclass(frozen=True)
class PoissonField:
    """The field E = exp(log_weight) · (displacement, z), which neither over- nor underflows.

    It points away from the data.

    Attributes
    ----------
    displacement : Tensor, shape (batch, *sample)
        x − m.
    z : Tensor, shape (batch,)
        Distance to the data plane; zeros without an extra dimension.
    log_weight : Tensor, shape (batch,)
        log W.

    Examples
    --------
    >>> data = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    >>> field = poisson_field(torch.tensor([[0.0]], dtype=torch.float64), 1.0, data)
    >>> field.value()
    (tensor([[0.0080]], dtype=torch.float64), tensor([0.0557], dtype=torch.float64))
    """

    displacement: Float[Tensor, " batch *sample"]
    z: Float[Tensor, " batch"]
    log_weight: Float[Tensor, " batch"]

    def value(self) -> tuple[Float[Tensor, " batch *sample"], Float[Tensor, " batch"]]:
        """Return (E_x, E_z); may over- or underflow in high dimension."""
        weight = self.log_weight.exp()
        return per_sample(weight, self.displacement) * self.displacement, weight * self.z


def poisson_field(
    x: Float[Tensor, " batch *sample"],
    z: Float[Tensor, " batch"] | Float[Tensor, ""] | float | None,
    data: Float[Tensor, " charges *sample"],
    *,
    augmented_dim: float = 1.0,
    weights: Float[Tensor, " charges"] | None = None,
    chunk_size: int | None = None,
) -> PoissonField:
    """Return the field of the charges at the points (x, z).

    Differentiable in x, z, data and weights. A point on a charge is fine: there the displacement
    is finite at any z > 0.

    Parameters
    ----------
    x : Tensor, shape (batch, *sample)
        Points, of any shape beyond the batch.
    z : float or Tensor, shape () or (batch,)
        Distance to the data plane, positive; None where ``augmented_dim`` is 0.
    data : Tensor, shape (charges, *sample)
        Positions of the charges.
    augmented_dim : float
        Number D of extra dimensions, any real number from 0.
    weights : Tensor, shape (charges,), optional
        Charges, at least 0, scaled to the sum 1; equal by default.
    chunk_size : int, optional
        Charges looked at together. The result is the same; memory is batch × chunk_size.

    Returns
    -------
    PoissonField
        In the dtype of x, computed in float64.

    Raises
    ------
    TypeError
        For anything but floating point tensors.
    ValueError
        For NaN or infinity, z that is not positive or should not be there, samples of different
        shapes, no data, and weights that are negative or all zero.

    Examples
    --------
    >>> data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> poisson_field(torch.tensor([[0.5, 2.0]]), 0.1, data).displacement
    tensor([[0., 2.]])
    """
    displacement, height, log_weight = exact_field(
        x, z, data, augmented_dim=augmented_dim, weights=weights, chunk_size=chunk_size
    )
    return PoissonField(displacement.to(x.dtype), height.to(x.dtype), log_weight.to(x.dtype))


def exact_field(
    x: Tensor,
    z: float | Tensor | None,
    data: Tensor,
    *,
    augmented_dim: float,
    weights: Tensor | None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return displacement, height and log W in float64, not yet rounded to the dtype of x."""
    check_augmented_dim(augmented_dim, zero=True, infinite=False)
    charges = Charges(data, weights)
    _check_query(x, data, chunk_size)
    height = _heights(x, z, augmented_dim)
    displacement, log_kernel = charges.displacement(
        x, height, augmented_dim=augmented_dim, chunk_size=chunk_size
    )
    total_dim = data[0].numel() + augmented_dim
    log_weight = log_kernel - unit_sphere_area(total_dim, log=True)
    if height is None:
        return displacement, torch.zeros_like(log_weight), log_weight
    return displacement, height, log_weight - total_dim * height.log()


def posterior_mean(
    x: Float[Tensor, " batch *sample"],
    z: Float[Tensor, " batch"] | Float[Tensor, ""] | float | None,
    data: Float[Tensor, " charges *sample"],
    *,
    augmented_dim: float = 1.0,
    weights: Float[Tensor, " charges"] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, " batch *sample"]:
    """Return the mean m of the charges given a point: the ideal denoiser.

        m(x, z) = Σ_i w_i R_i^{−(N+D)} y_i / Σ_i w_i R_i^{−(N+D)}

    Parameters
    ----------
    x : Tensor, shape (batch, *sample)
        Points.
    z : float or Tensor, shape () or (batch,)
        Distance to the data plane, positive; None where ``augmented_dim`` is 0, and the noise
        level σ where it is infinite.
    data : Tensor, shape (charges, *sample)
        Positions of the charges.
    augmented_dim : float
        Number of extra dimensions, from 0 to ``math.inf`` (Gaussian noise).
    weights : Tensor, shape (charges,), optional
        Charges, at least 0; equal by default.
    chunk_size : int, optional
        Charges looked at together.

    Returns
    -------
    Tensor, shape (batch, *sample)
        In the dtype of x, in the convex hull of the data.

    Raises
    ------
    TypeError, ValueError
        As `poisson_field`.

    Examples
    --------
    >>> data = torch.tensor([[0.0], [1.0]])
    >>> posterior_mean(torch.tensor([[0.0], [0.5]]), 0.1, data)
    tensor([[0.0098],
            [0.5000]])
    """
    check_augmented_dim(augmented_dim, zero=True)
    charges = Charges(data, weights)
    _check_query(x, data, chunk_size)
    height = _heights(x, z, augmented_dim)
    mean, _ = charges.mean(x, height, augmented_dim=augmented_dim, chunk_size=chunk_size)
    return mean.to(x.dtype)


def marginal_log_density(
    x: Float[Tensor, " batch *sample"],
    z: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    data: Float[Tensor, " charges *sample"],
    *,
    augmented_dim: float = 1.0,
    weights: Float[Tensor, " charges"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return the log-density of the flow at height z, a mixture of Student t distributions.

        p_z(x) = Σ_i w_i t_D(x; y_i, (z²/D) I)

    Parameters
    ----------
    x : Tensor, shape (batch, *sample)
        Points.
    z : float or Tensor, shape () or (batch,)
        Distance to the data plane, positive; the noise level σ where D is infinite.
    data : Tensor, shape (charges, *sample)
        Positions of the charges.
    augmented_dim : float
        Degrees of freedom D, positive; ``math.inf`` for normal distributions.
    weights : Tensor, shape (charges,), optional
        Charges, at least 0; equal by default.

    Returns
    -------
    Tensor, shape (batch,)
        In nats.

    Raises
    ------
    TypeError, ValueError
        As `poisson_field`.

    Examples
    --------
    One charge in one dimension is a Cauchy distribution, 1/π at its centre:

    >>> marginal_log_density(torch.tensor([[0.0]]), 1.0, torch.tensor([[0.0]])).exp()
    tensor([0.3183])
    """
    check_augmented_dim(augmented_dim)
    charges = Charges(data, weights)
    _check_query(x, data, None)
    height = _heights(x, z, augmented_dim)
    assert height is not None
    _, log_kernel = charges.mean(x, height, augmented_dim=augmented_dim)
    density = log_kernel + log_student_constant(data[0].numel(), height, augmented_dim)
    return density.to(x.dtype)


def log_student_constant(dim: int, height: Tensor, augmented_dim: float) -> Tensor:
    """Return the log-density of the multivariate Student t distribution at its centre."""
    if math.isinf(augmented_dim):
        return -dim / 2 * (math.log(2 * math.pi) + 2 * height.log())
    # log Γ((N+D)/2) − log Γ(D/2), of which nothing would be left for large D.
    gammas = math.lgamma(dim / 2) - float(betaln(dim / 2, augmented_dim / 2))
    return gammas - dim / 2 * math.log(math.pi) - dim * height.log()


def log_student_kernel(relative: Tensor, dim: int, augmented_dim: float) -> Tensor:
    """Return the log of the t density at ‖x − y‖²/z², relative to that at the centre.

    Where D is 0 there is no height and no centre to compare with: it is the log of R^{−N}. A point
    on a charge belongs to that charge alone then, instead of to no one.
    """
    if augmented_dim == 0:
        return -dim / 2 * relative.clamp_min(torch.finfo(relative.dtype).tiny).log()
    if math.isinf(augmented_dim):
        return -relative / 2
    return -(dim + augmented_dim) / 2 * relative.log1p()


def _relative_at(relative: Tensor, loss: float, dim: int, augmented_dim: float) -> Tensor:
    """Return the ‖x − y‖²/z² at which the log kernel is smaller by `loss`."""
    if math.isinf(augmented_dim):
        return relative + 2 * loss
    growth = math.expm1(min(2 * loss / (dim + augmented_dim), 700.0))
    return relative + (relative + float(augmented_dim > 0)) * growth


def _doubtful_below(error: Tensor, dim: int, augmented_dim: float) -> Tensor:
    """Return the ‖x − y‖²/z² below which its error shows in the log kernel."""
    if math.isinf(augmented_dim):
        return torch.where(error / 2 > _SHOWN, math.inf, 0.0)
    return (dim + augmented_dim) / 2 * error / _SHOWN - float(augmented_dim > 0) + error


class Charges:
    """Charges prepared for many queries: float64, around their mean, without those of weight 0."""

    def __init__(self, data: Tensor, weights: Tensor | None) -> None:
        check_data(data)
        flat = data.flatten(1).double()
        self.log_weights: Tensor | None = None
        if weights is not None:
            log_weights = _log_weights(weights, len(data)).to(data.device)
            carrying = log_weights > -math.inf
            flat, self.log_weights = flat[carrying], log_weights[carrying]
        # Any origin gives the same result, so none of its gradient is needed.
        self.centre = flat.detach().mean(0)
        points = flat - self.centre
        squares = points.square().sum(1, keepdim=True)
        self.rows = torch.cat([points, squares, torch.ones_like(squares)], 1)
        self.radius = squares.detach().max().sqrt()
        self.spread = 0.0
        if self.log_weights is not None:
            self.spread = float(self.log_weights.max() - self.log_weights.min())

    def displacement(
        self,
        x: Tensor,
        height: Tensor | None,
        *,
        augmented_dim: float,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return x − m and the log of the sum of all kernels, in float64."""
        centred = x.flatten(1).double() - self.centre
        mean, log_kernel = self._mean(centred, height, augmented_dim, chunk_size)
        return (centred - mean).reshape(x.shape), log_kernel

    def mean(
        self,
        x: Tensor,
        height: Tensor | None,
        *,
        augmented_dim: float,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return m and the log of the sum of all kernels, in float64."""
        centred = x.flatten(1).double() - self.centre
        mean, log_kernel = self._mean(centred, height, augmented_dim, chunk_size)
        return (mean + self.centre).reshape(x.shape), log_kernel

    def _mean(
        self, x: Tensor, height: Tensor | None, augmented_dim: float, chunk_size: int | None
    ) -> tuple[Tensor, Tensor]:
        size = len(self.rows) if chunk_size is None else chunk_size
        squares = x.square().sum(1, keepdim=True)
        # A product with the rows (y, ‖y‖², 1) gives ‖x − y‖²/z² without a further pass over it.
        query = torch.cat([-2 * x, torch.ones_like(squares), squares], 1)
        if height is not None:
            query = query / height[:, None].square()
        mean, log_total = self._block(x, height, query, augmented_dim, slice(0, size))
        for start in range(size, len(self.rows), size):
            block = slice(start, start + size)
            block_mean, block_log = self._block(x, height, query, augmented_dim, block)
            new_total = torch.logaddexp(log_total, block_log)
            mean = (log_total - new_total).exp()[:, None] * mean
            mean = mean + (block_log - new_total).exp()[:, None] * block_mean
            log_total = new_total
        if self.log_weights is None:
            log_total = log_total - math.log(len(self.rows))
        return mean, log_total

    def _block(
        self,
        x: Tensor,
        height: Tensor | None,
        query: Tensor,
        augmented_dim: float,
        block: slice,
    ) -> tuple[Tensor, Tensor]:
        rows = self.rows[block]
        relative = (query @ rows.T).clamp_min(0)
        if not torch.compiler.is_compiling():
            near = self._near(relative.detach(), query.detach(), augmented_dim)
            if len(near[0]):
                relative.index_put_(near, _relative(x, height, rows[:, :-2], near))
        log_kernel = log_student_kernel(relative, rows.shape[1] - 2, augmented_dim)
        if self.log_weights is not None:
            log_kernel = log_kernel + self.log_weights[block]
        # Softmax and logsumexp with one exponential for both; the column of ones sums it up.
        largest = log_kernel.detach().amax(1, keepdim=True)
        weighted = (log_kernel - largest).exp() @ rows
        total = weighted[:, -1:]
        return weighted[:, :-2] / total, (largest + total.log()).squeeze(1)

    def _near(self, relative: Tensor, query: Tensor, augmented_dim: float) -> tuple[Tensor, Tensor]:
        """Return the pairs of query and charge for which the rounding of the product shows."""
        dim = query.shape[1] - 2
        # Terms up to (‖x‖ + ‖y‖)²/z², in eight or more partial sums: what vector units make of it.
        inverse, length = query[:, -2].sqrt(), query[:, -1].sqrt()
        unit = torch.finfo(query.dtype).eps * (length + self.radius * inverse).square()
        error = (1 + dim / 8) * unit
        below = _doubtful_below(error, dim, augmented_dim)
        if not bool((below > 0).any()):
            none = torch.empty(0, dtype=torch.long, device=query.device)
            return none, none
        nearest = relative.amin(1)
        doubtful = (nearest < below).nonzero().squeeze(1)
        nearest, error, below = nearest[doubtful], error[doubtful], below[doubtful]
        # Farther charges are lost beside the nearest, whatever their distance is exactly.
        lost = _relative_at(nearest + error, _LOST + self.spread, dim, augmented_dim) + error
        limit = torch.minimum(below, lost)[:, None]
        chosen, charge = (relative[doubtful] < limit).nonzero(as_tuple=True)
        return doubtful[chosen], charge


def _relative(
    x: Tensor, height: Tensor | None, points: Tensor, pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Return ‖x − y‖²/z² of these pairs, by differences."""
    size = max(1, _DIFFERENCES // x.shape[1])
    parts = zip(*(index.split(size) for index in pairs), strict=True)
    squares = torch.cat([(x[i] - points[j]).square().sum(1) for i, j in parts])
    return squares if height is None else squares / height[pairs[0]].square()


def _log_weights(weights: Tensor, count: int) -> Tensor:
    check_floating(weights, "weights")
    if weights.shape != (count,):
        raise ValueError(
            f"weights must have one entry for each charge, ({count},), got {tuple(weights.shape)}"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("weights must be finite and at least 0, got a negative weight, NaN or inf")
    total = weights.double().sum()
    if not bool(total > 0):
        raise ValueError("weights must have a positive sum, got only zeros")
    return (weights.double() / total).log()


def _check_query(x: Tensor, data: Tensor, chunk_size: int | None) -> None:
    check_points(x, "x")
    check_same_sample(x, data)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _heights(x: Tensor, z: float | Tensor | None, augmented_dim: float) -> Tensor | None:
    if augmented_dim > 0:
        return heights(z, len(x), x.device)
    if z is not None:
        raise ValueError("z must be None where augmented_dim is 0: there is no height, got a z")
    return None
