r"""Central power sums of a block, the pooling of blocks, and what estimators make of them.

With deviations :math:`\delta_i = \bar x_i - \bar x` of the blocks' means from the pooled one,

.. math::
    M_p = \sum_i \Bigl[ M_{p,i} + \sum_{k=1}^{p-2} \binom pk \delta_i^k M_{p-k,i}
        + n_i \delta_i^p \Bigr], \qquad \bar x = \frac1n \sum_i n_i \bar x_i.

For two blocks this is Pébay's formula; for one value each, the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__: list[str] = []

# Half a megabyte of doubles and a few temporaries of it stay in a core's cache. A GPU wants large
# launches instead; three temporaries of this size take 48 MB.
_CACHE_BLOCK = 2**16
_DEVICE_BLOCK = 2**21
_FAN_OUT = 32


class _Sums(NamedTuple):
    """Count, mean and M_2, M_3, … of a sample; all of the same rank."""

    n: Float[Tensor, "..."]
    """Number of samples, or sum of weights."""
    mean: Float[Tensor, "..."]
    """From the reference point."""
    powers: tuple[Float[Tensor, "..."], ...]
    """M_2, M_3, …"""

    def central_moments(self, n: int) -> dict[int, Tensor]:
        """The m_p by their order."""
        return {order: power / n for order, power in enumerate(self.powers, start=2)}


def _reference(x: Tensor, dims: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
    """The first sample, or the heaviest: deviations of constant data from it are exactly 0."""
    first = x.detach()
    if weights is None:
        for dim in dims:
            first = first.narrow(dim, 0, 1)
    else:  # what has no weight may be anything, and be anywhere
        kept = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        last = tuple(range(-len(dims), 0))
        samples, w = (t.movedim(dims, last).flatten(-len(dims)) for t in (first, weights.detach()))
        first = samples.gather(-1, w.argmax(-1, keepdim=True)).reshape(kept)
    first = first.to(torch.float64)
    # An infinite mean is infinite, not NaN.
    return torch.where(torch.isfinite(first), first, 0.0)


def _central_sums(
    x: Tensor,
    dims: tuple[int, ...],
    order: int,
    *,
    reference: Tensor,
    weights: Tensor | None = None,
) -> _Sums:
    """Sums over ``dims``, which are kept with length 1; ``weights`` have the shape of x."""
    size = _block_size(x)
    if x.numel() <= size:
        return _sums_of_block(x, dims, order, reference, weights)
    longest = max(range(x.ndim), key=lambda dim: x.shape[dim])
    n_parts = min(x.shape[longest], math.ceil(x.numel() / size), _FAN_OUT)

    def split(whole: Tensor) -> Sequence[Tensor]:
        return whole.tensor_split(n_parts, dim=longest)

    references = [reference] * n_parts if longest in dims else split(reference)
    parts = [
        _central_sums(part, dims, order, reference=point, weights=w)
        for part, point, w in zip(
            split(x), references, [None] * n_parts if weights is None else split(weights),
            strict=True,
        )
    ]  # fmt: skip
    if longest in dims:
        return _pool(parts)
    count = parts[0].n if weights is None else _joined([s.n for s in parts], longest)
    return _Sums(
        count,
        _joined([s.mean for s in parts], longest),
        tuple(_joined(powers, longest) for powers in zip(*(s.powers for s in parts), strict=True)),
    )


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(parts), dim=dim)


def _block_size(x: Tensor) -> float:
    # A graph of many small blocks is slower than one of a single block, and keeps as much memory.
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return math.inf
    return _CACHE_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK


def _sums_of_block(
    x: Tensor, dims: tuple[int, ...], order: int, reference: Tensor, weights: Tensor | None
) -> _Sums:
    deviation = x.to(torch.float64) - reference
    if weights is None:
        n = math.prod([x.shape[dim] for dim in dims])
        count = deviation.new_full((1,) * x.ndim, n)
        mean = deviation.mean(dims, keepdim=True)
    else:
        weights = weights.to(torch.float64)
        count = weights.sum(dims, keepdim=True)
        mean = (weights * deviation).sum(dims, keepdim=True) / _or_one(count)
    powers = []
    if order >= 2:
        # In place, in a fresh array, where no gradient needs it: that of the weights would.
        learned = weights is not None and weights.requires_grad
        centred = deviation - mean if learned else deviation.sub_(mean)
        power = centred if weights is None else weights * centred
        for _ in range(2, order + 1):
            power = power * centred
            powers.append(power.sum(dims, keepdim=True))
    return _Sums(count, mean, tuple(powers))


def _or_one(count: Tensor) -> Tensor:
    """A divisor for sums that are 0 where the count is."""
    return torch.where(count > 0, count, 1.0)


def _pool(parts: Sequence[_Sums]) -> _Sums:
    """Sums of all parts together; their means count from the same reference."""
    counts = torch.stack([part.n for part in parts])
    means = torch.stack([part.mean for part in parts])
    count = counts.sum(0)
    # Deviations from one of the means, so that the mean of equal means is that mean.
    mean = means[0] + (counts * (means - means[0])).sum(0) / _or_one(count)
    delta = means - mean
    of_parts = {
        p: torch.stack(powers)
        for p, powers in enumerate(zip(*(part.powers for part in parts), strict=True), start=2)
    }
    pooled = []
    for p in of_parts:
        total = of_parts[p] + counts * delta**p
        for k in range(1, p - 1):
            total = total + math.comb(p, k) * delta**k * of_parts[p - k]
        pooled.append(total.sum(0))
    return _Sums(count, mean, tuple(pooled))


def _comoments(
    x: Tensor, mean: Tensor, reference: Tensor, weights: Tensor | None = None
) -> Float[Tensor, "*batch d d"]:
    """Sum of outer products of the deviations of x (..., n, d) from ``reference + mean``."""
    n_parts = max(1, min(x.shape[-2], math.ceil(x.numel() / _block_size(x))))
    total = x.new_zeros((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=torch.float64)
    in_parts = [None] * n_parts if weights is None else weights.tensor_split(n_parts, dim=-2)
    for part, w in zip(x.tensor_split(n_parts, dim=-2), in_parts, strict=True):
        centred = part.to(torch.float64) - reference - mean
        total = total + (centred if w is None else w * centred).mT @ centred
    return total


# What E[m_a m_b …] for samples of size n says about products of moments, solved for the moments:
# order -> the factors of each product of m_p -> its coefficient times (n-1)(n-2)…(n-order+1).
_Coefficients = dict[tuple[int, ...], Callable[[int], int]]

_H_STATISTICS: dict[int, _Coefficients] = {
    2: {(2,): lambda n: n},
    3: {(3,): lambda n: n**2},
    4: {
        (4,): lambda n: n * (n**2 - 2 * n + 3),
        (2, 2): lambda n: -3 * n * (2 * n - 3),
    },
    5: {
        (5,): lambda n: n**2 * (n**2 - 5 * n + 10),
        (2, 3): lambda n: -10 * n**2 * (n - 2),
    },
    6: {
        (6,): lambda n: n * (n**4 - 9 * n**3 + 31 * n**2 - 39 * n + 40),
        (2, 4): lambda n: -15 * n * (n**3 - 8 * n**2 + 29 * n - 40),
        (3, 3): lambda n: -40 * n * (n**2 - 6 * n + 10),
        (2, 2, 2): lambda n: 15 * n * (3 * n**2 - 10 * n),
    },
}
_K_STATISTICS: dict[int, _Coefficients] = {
    2: _H_STATISTICS[2],
    3: _H_STATISTICS[3],
    4: {
        (4,): lambda n: n**2 * (n + 1),
        (2, 2): lambda n: -3 * n**2 * (n - 1),
    },
    5: {
        (5,): lambda n: n**3 * (n + 5),
        (2, 3): lambda n: -10 * n**3 * (n - 1),
    },
    6: {
        (6,): lambda n: n**2 * (n**3 + 16 * n**2 + 11 * n - 4),
        (2, 4): lambda n: -15 * n**2 * (n**3 + 2 * n**2 - 7 * n + 4),
        (3, 3): lambda n: -10 * n**2 * (n**3 - 2 * n**2 + 5 * n - 4),
        (2, 2, 2): lambda n: 30 * n**2 * (n**3 - 3 * n**2 + 2 * n),
    },
}
_CUMULANTS_OF_MOMENTS: dict[int, dict[tuple[int, ...], int]] = {
    2: {(2,): 1},
    3: {(3,): 1},
    4: {(4,): 1, (2, 2): -3},
    5: {(5,): 1, (2, 3): -10},
    6: {(6,): 1, (2, 4): -15, (3, 3): -10, (2, 2, 2): 30},
}


def _moment_of(sums: _Sums, n: int, order: int, unbiased: bool) -> Tensor:
    """Central moment of order 2 to 6."""
    if not unbiased:
        return sums.powers[order - 2] / n
    return _combined(sums.central_moments(n), _exact(_H_STATISTICS[order], n, order))


def _cumulant_of(sums: _Sums, n: int, order: int, unbiased: bool) -> Tensor:
    """Cumulant of order 2 to 6."""
    if unbiased:
        coefficients = _exact(_K_STATISTICS[order], n, order)
    else:
        coefficients = {parts: float(c) for parts, c in _CUMULANTS_OF_MOMENTS[order].items()}
    return _combined(sums.central_moments(n), coefficients)


def _exact(coefficients: _Coefficients, n: int, order: int) -> dict[tuple[int, ...], float]:
    """Coefficients at n, each a quotient of integers that is rounded once."""
    falling = math.prod([n - k for k in range(1, order)])
    return {parts: coefficient(n) / falling for parts, coefficient in coefficients.items()}


def _combined(m: dict[int, Tensor], coefficients: dict[tuple[int, ...], float]) -> Tensor:
    terms = []
    for parts, coefficient in coefficients.items():
        term = coefficient * m[parts[0]]
        for order in parts[1:]:
            term = term * m[order]
        terms.append(term)
    return sum(terms[1:], start=terms[0])


def _root(variance: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = variance != 0
    root = torch.sqrt(torch.where(positive, variance, 1.0))
    return torch.where(positive, root, 0.0)
