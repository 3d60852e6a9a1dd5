"""Six numbers that see complete and dimensional collapse in a batch of embeddings."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CollapseMetrics", "collapse_metrics"]

# Rows of the matrix of pairs that are looked at together.
_BLOCK = 512
# Share of the energy below which what is left after centring is rounding error.
_NO_SPREAD = 1e-14


@dataclass(frozen=True)
class CollapseMetrics:
    r"""How far unit vectors :math:`u_i` in d dimensions are spread.

    In complete collapse all vectors are one: ``relative_std`` goes to 0 and ``mean_cosine`` to 1.
    In dimensional collapse they fill few directions: ``effective_rank`` and
    ``participation_ratio`` are small. These two look at centred vectors, of any size, so that they
    may stay high in complete collapse: read them together with ``relative_std``.

    Attributes
    ----------
    relative_std : float
        √d times the mean standard deviation of a coordinate: 1 for isotropic vectors, 0 for
        constant ones.
    mean_cosine : float
        Of two different vectors.
    effective_rank : float
        Exponential of the entropy of the normalised singular values of the centred vectors.
    participation_ratio : float
        :math:`(\sum \lambda)^2 / \sum \lambda^2` of their squares.
    uniformity : float
        :math:`\log E \exp(-2 |u_i - u_j|^2)` over pairs: 0 when constant, less is better.
    alignment : float
        Mean of :math:`|u_i - u'_i|^2` over positive pairs; NaN without a second view.

    Examples
    --------
    >>> constant = collapse_metrics(torch.ones(5, 3))
    >>> constant.relative_std, constant.effective_rank, constant.is_collapsed()
    (0.0, 0.0, True)
    """

    relative_std: float
    mean_cosine: float
    effective_rank: float
    participation_ratio: float
    uniformity: float
    alignment: float

    def is_collapsed(self, *, std: float = 0.1, rank: float = 1.5) -> bool:
        """Say whether the relative deviation is below ``std`` or the rank below ``rank``."""
        return self.relative_std < std or self.effective_rank < rank


@torch.no_grad()
def collapse_metrics(
    embeddings: Float[Tensor, "n dim"],
    other: Float[Tensor, "n dim"] | None = None,
    *,
    max_pairs: int = 4096,
) -> CollapseMetrics:
    """Measure whether embeddings have collapsed to a point or to few dimensions.

    Rows are divided by their length; a row of zeros stays zero. Everything is computed in float64.
    On an accelerator the host waits once. In a distributed run the numbers are those of the local
    rows: gather first for all.

    Parameters
    ----------
    embeddings : Tensor (n, dim)
        Of different samples, at least two.
    other : Tensor (n, dim), optional
        Embeddings of other views of the same samples, for the alignment.
    max_pairs : int
        Number of first rows whose pairs the uniformity looks at.

    Returns
    -------
    CollapseMetrics
        Plain floats.

    Raises
    ------
    ValueError
        For embeddings of another rank, fewer than two rows or no dimension, that are not finite, or
        an ``other`` of another shape; for fewer than two rows of pairs.
    TypeError
        For what is no tensor of real floating-point numbers.

    Examples
    --------
    >>> rows = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [2.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    >>> metrics = collapse_metrics(rows)
    >>> round(metrics.relative_std, 4), round(metrics.effective_rank, 4), metrics.is_collapsed()
    (0.7456, 2.5457, False)
    """
    _check("embeddings", embeddings)
    n, dim = embeddings.shape
    if n < 2 or dim < 1:
        raise ValueError(f"embeddings must have at least two rows and a dimension, got {n, dim}")
    if other is not None:
        _check("other", other)
        if other.shape != embeddings.shape:
            raise ValueError(
                f"other must have the shape of the embeddings, {n, dim}, got {tuple(other.shape)}"
            )
    if operator.index(max_pairs) < 2:
        raise ValueError(f"max_pairs must be at least 2, got {max_pairs}")

    finite = embeddings.isfinite().all()
    u = _unit(embeddings)
    total = u.sum(0)
    energy = u.square().sum()
    centred = u - total / n
    spread = centred.square().sum(0)
    gram = centred.mT @ centred if n > dim else centred @ centred.mT
    alignment = total.new_tensor(math.nan)
    if other is not None:
        finite = finite & other.isfinite().all()
        alignment = (u - _unit(other)).square().sum(1).mean()
    numbers = torch.stack(
        [
            finite.to(u.dtype),
            math.sqrt(dim) * (spread / (n - 1)).sqrt().mean(),
            (total.square().sum() - energy) / (n * (n - 1)),
            (spread.sum() > _NO_SPREAD * energy).to(u.dtype),
            _uniformity(u[:max_pairs]),
            alignment,
        ]
    )
    # One copy to the host: decompositions would each wait for their own success.
    host = torch.cat([numbers, gram.flatten()]).cpu()
    is_finite, relative_std, mean_cosine, has_spread, uniformity, aligned = host[:6].tolist()
    if not is_finite:
        raise ValueError("embeddings must be finite, got NaN or infinity")
    rank, participation = _ranks(host[6:].view(gram.shape), max(n, dim)) if has_spread else (0, 0)
    return CollapseMetrics(
        relative_std=relative_std,
        mean_cosine=mean_cosine,
        effective_rank=float(rank),
        participation_ratio=float(participation),
        uniformity=uniformity,
        alignment=aligned,
    )


def _unit(x: Tensor) -> Tensor:
    # Values that are not finite are refused after the one copy; until then they must do no harm.
    x = x.detach().double().nan_to_num(0.0, 0.0, 0.0)
    # The largest entry first, so that squares neither overflow nor vanish.
    x = x / x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def _uniformity(u: Tensor) -> Tensor:
    """Logarithm of the mean of exp(-2|u_i - u_j|²) = w_i w_j exp(4 u_i·u_j) over i < j."""
    weight = (-2 * u.square().sum(1)).exp()
    pairs = len(u) * (len(u) - 1) / 2
    sum_of_pairs = u.new_zeros(())
    for start in range(0, len(u), _BLOCK):
        rows = slice(start, start + _BLOCK)
        # The block on the diagonal has every pair twice, and each vector with itself.
        kernel = (4 * u[rows] @ u[start:].mT).exp_()
        size = len(kernel)
        square = kernel[:, :size].clone()
        square.fill_diagonal_(0.0)
        sum_of_pairs = sum_of_pairs + weight[rows] @ square @ weight[rows] / 2
        sum_of_pairs = sum_of_pairs + weight[rows] @ kernel[:, size:] @ weight[start + size :]
    return (sum_of_pairs / pairs).log()


def _ranks(gram: Tensor, largest_side: int) -> tuple[float, float]:
    """Effective rank and participation ratio from the squared singular values."""
    squares = torch.linalg.eigvalsh(gram)
    # Squaring has lost what lies below; as singular values such errors would look large.
    resolution = largest_side * torch.finfo(gram.dtype).eps * squares[-1]
    squares = squares[squares > resolution]
    share = squares.sqrt() / squares.sqrt().sum()
    entropy = -(share * share.log()).sum()
    participation = squares.sum().square() / squares.square().sum()
    return entropy.exp().item(), participation.item()


def _check(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of real floating-point numbers, got {kind}")
    if x.ndim != 2:
        raise ValueError(f"{name} must be embeddings of shape (n, dim), got {tuple(x.shape)}")
