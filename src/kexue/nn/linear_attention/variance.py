r"""How far an estimate of the kernel strays: exact variances.

With :math:`z = q + k`, :math:`D = |q - k|^2`, and queries and keys scaled already,

.. math::
    \text{positive: } & e^{2 q \cdot k} (e^{|z|^2} - 1) / m \\
    \text{hyperbolic: } & e^{2 q \cdot k} (e^{|z|^2} - 1)(1 - e^{-|z|^2}) / 2m \\
    \text{trigonometric: } & e^{|z|^2 - 2 q \cdot k} (1 - e^{-D})^2 / 2m .

Orthogonal rows subtract :math:`e^{2 q \cdot k}\, G(|z|^2)\, B / m^2` from the first, where
:math:`B` counts the ordered pairs of rows inside a block and

.. math::
    G(x) = 1 - e^{-x}\, {}_1F_1(d; \tfrac d2; \tfrac x2)
         = \sum_k \frac{e^{-x} x^k}{k!} \Big(1 - \prod_{j<k} \frac{d+j}{d+2j}\Big) .
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.nn.linear_attention.features import Kind, _one_of, _positive_scale, _real_floats

__all__ = ["softmax_kernel_variance"]


def softmax_kernel_variance(
    query: Float[Tensor, "*#batch dim"],
    key: Float[Tensor, "*#batch dim"],
    num_features: int,
    *,
    kind: Kind = "positive",
    orthogonal: bool = False,
    scale: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Return the variance of :math:`\phi(q) \cdot \phi(k)` around :math:`e^{s\,q \cdot k}`.

    It is exact, for rows with chi norms. The relative error of one kernel value under positive
    features, :math:`\sqrt{(e^{|z|^2} - 1)/m}` with :math:`z = \sqrt s (q + k)`, tells beforehand
    whether a trained softmax model survives conversion: at :math:`|z|^2 = 4` it takes
    :math:`54/\varepsilon^2` features, at 8 :math:`3000/\varepsilon^2`.

    Parameters
    ----------
    query, key : Tensor (..., dim)
        Vectors; leading dimensions are broadcast.
    num_features : int
        Rows m of the projection.
    kind : {"positive", "hyperbolic", "trigonometric"}
        Which features.
    orthogonal : bool
        Whether the rows come in orthogonal blocks; for positive features only.
    scale : float
        Factor s of the inner product.

    Returns
    -------
    Tensor (...)
        In float64, differentiable.

    Raises
    ------
    ValueError
        For vectors of different length or shapes that cannot be broadcast, ``num_features`` below
        1, a scale that is not positive, an unknown kind, or orthogonal rows with another kind than
        positive.
    TypeError
        For tensors that are no real floating point numbers.

    Examples
    --------
    Opposite vectors are exact under positive features, equal ones under trigonometric features:

    >>> q = torch.tensor([0.5, -1.0])
    >>> softmax_kernel_variance(q, -q, 16)
    tensor(0., dtype=torch.float64)
    >>> softmax_kernel_variance(q, q, 16, kind="trigonometric")
    tensor(0., dtype=torch.float64)
    """
    _check(query, key, num_features, kind, orthogonal)
    _positive_scale(scale)
    query, key = query.double() * math.sqrt(scale), key.double() * math.sqrt(scale)
    product = (query * key).sum(-1)
    norm = (query + key).square().sum(-1)
    # e^{2qk} (e^x - 1) / m as e^{2qk + x - log m} (1 - e^{-x}): one exponential, which overflows
    # where the variance does, instead of two whose product may be 0 times infinity.
    size = math.log(num_features)
    if kind == "positive":
        variance = torch.exp(2 * product + norm - size) * -torch.expm1(-norm)
        if orthogonal:
            dim = query.shape[-1]
            share = _pairs_in_blocks(num_features, dim) / num_features**2
            variance = variance - share * torch.exp(2 * product) * _orthogonality_gain(norm, dim)
        return variance
    if kind == "hyperbolic":
        return torch.exp(2 * product + norm - size) * torch.expm1(-norm) ** 2 / 2
    distance = (query - key).square().sum(-1)
    return torch.exp(norm - 2 * product - size) * torch.expm1(-distance) ** 2 / 2


def _pairs_in_blocks(num_features: int, dim: int) -> int:
    blocks, rest = divmod(num_features, dim)
    return blocks * dim * (dim - 1) + rest * (rest - 1)


def _orthogonality_gain(x: Float[Tensor, "*batch"], dim: int) -> Float[Tensor, "*batch"]:
    """G(x): all terms have one sign, so nothing is lost where x is small."""
    # At 4 dim + 100 the gain is 1 to double precision; 12 deviations hold the Poisson weights.
    x = x.clamp(1e-300, 4.0 * dim + 100)
    largest = float(x.detach().max()) if x.numel() else 0.0
    log_x, gain, ratio = x.log(), torch.zeros_like(x), 1.0
    for k in range(2, math.ceil(largest + 12 * math.sqrt(largest) + 40)):
        ratio *= (dim + k - 1) / (dim + 2 * (k - 1))
        gain = gain + (1 - ratio) * torch.exp(k * log_x - x - math.lgamma(k + 1))
    return gain


def _check(query: Tensor, key: Tensor, num_features: int, kind: str, orthogonal: bool) -> None:
    _one_of("kind", kind, get_args(Kind))
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    for name, x in (("query", query), ("key", key)):
        _real_floats(name, x)
        if x.ndim < 1:
            raise ValueError(f"{name} must have shape (..., dim), got a scalar")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query and key must have the same last dimension, "
            f"got {query.shape[-1]} and {key.shape[-1]}"
        )
    try:
        torch.broadcast_shapes(query.shape, key.shape)
    except RuntimeError:
        raise ValueError(
            "leading dimensions of query and key must broadcast, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        ) from None
    if orthogonal and kind != "positive":
        raise ValueError(
            f"the closed form for orthogonal rows is known for positive features only, got {kind!r}"
        )
