r"""Draws whose result has the mean and the variance that were asked for.

A normal variable that is cut to :math:`[l, h]` in units of its standard deviation keeps only a part
of its variance: with :math:`Z = \Phi(h) - \Phi(l)`,

.. math::
    m = \frac{\varphi(l) - \varphi(h)}{Z}, \qquad
    v = 1 + \frac{l\varphi(l) - h\varphi(h)}{Z} - m^2,

0.7737 of it at :math:`\pm 2`. So the draw is :math:`\mu + \sigma (t - m)/\sqrt v`.

Source: https://kexue.fm/archives/8620.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kexue.nn.init.fans import _check_floating, _fan, _working_dtype

__all__ = [
    "TruncatedNormalMoments",
    "truncated_normal_",
    "truncated_normal_moments",
    "variance_scaling_",
]

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Distribution = Literal["truncated_normal", "normal", "uniform"]
_DISTRIBUTIONS = ("truncated_normal", "normal", "uniform")

_LEAST_VARIANCE = 1e-12
# Within these bounds the error function has digits to spare in single precision.
_NEAR = 5.0
# e^-45 of the density at the mode: nothing that a double would notice lies beyond.
_NEGLIGIBLE = 45.0


@dataclass(frozen=True)
class TruncatedNormalMoments:
    """Mean and variance of a standard normal variable that is conditioned on an interval.

    Parameters
    ----------
    mean, variance : float
        In units of the parent's standard deviation.

    Examples
    --------
    >>> TruncatedNormalMoments(mean=0.0, variance=0.77).mean
    0.0
    """

    mean: float
    variance: float


def truncated_normal_moments(low: float = -2.0, high: float = 2.0) -> TruncatedNormalMoments:
    """Return mean and variance of the standard normal law on an interval.

    Parameters
    ----------
    low, high : float
        Bounds, possibly infinite.

    Returns
    -------
    TruncatedNormalMoments

    Raises
    ------
    ValueError
        If ``low`` is not below ``high``, or one of them is NaN.

    Examples
    --------
    >>> round(truncated_normal_moments(-2, 2).variance, 10)
    0.7737413035
    """
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    # The density relative to its mode, from there as far as it matters: no digits cancel, however
    # far out the interval lies.
    mode = min(max(0.0, low), high)
    reach = math.sqrt(mode**2 + 2 * _NEGLIGIBLE) - abs(mode)
    first = max(low - mode, -reach if mode <= 0 else 0.0)
    last = min(high - mode, reach if mode >= 0 else 0.0)
    offset, weight = _gauss_legendre(first, last)
    weight = weight * np.exp(-offset * (mode + offset / 2))
    weight /= weight.sum()
    mean = float(weight @ offset)
    return TruncatedNormalMoments(mode + mean, float(weight @ (offset - mean) ** 2))


def truncated_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    low: float = -2.0,
    high: float = 2.0,
    rescale: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill a tensor with normal numbers that are cut to an interval.

    Parameters
    ----------
    tensor : Tensor
        Any real floating dtype; half precision is drawn in single precision.
    mean, std : float
        Of the result with ``rescale``, of the law before the cut without it.
    low, high : float
        Bounds in units of the parent's standard deviation, possibly infinite. With ``rescale`` the
        largest distance from the mean is thus not 2 but 2.27 standard deviations at :math:`\pm 2`.
    rescale : bool
        Whether mean and standard deviation are those of the result, or the draw is
        ``mean + std * t`` as in TensorFlow.
    generator : torch.Generator, optional
        Source of the draws.

    Returns
    -------
    Tensor
        The same tensor.

    Raises
    ------
    TypeError
        For a tensor that is not real and floating.
    ValueError
        For a standard deviation that is negative or not finite, a mean that is not finite, ``low``
        not below ``high``, or an interval so narrow that nothing is left to rescale.

    Examples
    --------
    >>> weight = truncated_normal_(torch.empty(1000, 1000), std=0.02)
    >>> round(weight.std().item(), 4), weight.abs().max().item() < 2 * 0.02 * 1.13685
    (0.02, True)
    """
    _check_floating(tensor)
    if not math.isfinite(mean) or not 0 <= std < math.inf:
        raise ValueError(
            f"mean must be finite and std finite and not negative, got {mean} and {std}"
        )
    moments = truncated_normal_moments(low, high)
    shift, scale = 0.0, 1.0
    if rescale:
        if moments.variance < _LEAST_VARIANCE:
            raise ValueError(
                f"low and high leave a variance of {moments.variance:.3g}, too little to rescale"
            )
        shift, scale = moments.mean, 1 / math.sqrt(moments.variance)
    with torch.no_grad():
        draw = tensor
        if draw.dtype != _working_dtype(tensor) or not draw.is_contiguous():
            draw = torch.empty(tensor.shape, dtype=_working_dtype(tensor), device=tensor.device)
        _fill(draw, low, high, generator)
        draw.sub_(shift).mul_(std * scale).add_(mean)
        return tensor if draw is tensor else tensor.copy_(draw)


def variance_scaling_(
    tensor: Tensor,
    *,
    scale: float = 1.0,
    mode: Mode = "fan_in",
    distribution: Distribution = "truncated_normal",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with numbers of variance scale / fan.

    ``scale=1`` with ``fan_in`` is LeCun's initialisation, ``scale=2`` He's, ``fan_avg`` Xavier's.

    Parameters
    ----------
    tensor : Tensor, shape (out, in, ...)
        Weight of a linear map or a convolution.
    scale : float
        Factor of the variance.
    mode : {"fan_in", "fan_out", "fan_avg"}
        Number of inputs, of outputs, or the mean of both, times the size of the kernel.
    distribution : {"truncated_normal", "normal", "uniform"}
        Law; the truncated one is cut at two standard deviations of its parent, and rescaled.
    generator : torch.Generator, optional
        Source of the draws.

    Returns
    -------
    Tensor
        The same tensor.

    Raises
    ------
    TypeError
        For a tensor that is not real and floating.
    ValueError
        For fewer than two dimensions, a scale that is not positive and finite, another mode or
        distribution.

    Examples
    --------
    >>> weight = variance_scaling_(torch.empty(400, 1600), scale=2.0)
    >>> round(weight.var().item() * 1600, 1)
    2.0
    """
    _check_floating(tensor)
    fan = _fan(tensor, mode)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    std = math.sqrt(scale / fan)
    if distribution == "truncated_normal":
        return truncated_normal_(tensor, std=std, generator=generator)
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {', '.join(_DISTRIBUTIONS)}, got {distribution!r}"
        )
    with torch.no_grad():
        draw = torch.empty(tensor.shape, dtype=_working_dtype(tensor), device=tensor.device)
        if distribution == "normal":
            draw.normal_(0.0, std, generator=generator)
        else:
            draw.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
        return tensor.copy_(draw)


def _fill(draw: Tensor, low: float, high: float, generator: torch.Generator | None) -> None:
    """Standard normal numbers within bounds, by whichever way has all digits there."""
    if high <= -1:
        _fill(draw, -high, -low, generator)
        draw.neg_()
    elif low >= 1:
        _fill_tail(draw, low, high, generator)
    elif max(-low, high) <= _NEAR:
        root = math.sqrt(0.5)
        draw.uniform_(math.erf(low * root), math.erf(high * root), generator=generator)
        draw.erfinv_().mul_(1 / root).clamp_(low, high)
    else:
        # At least a sixth of all draws falls inside.
        draw.normal_(generator=generator)
        _redraw(draw, lambda x: (x < low) | (x > high), lambda x: x.normal_(generator=generator))


def _fill_tail(draw: Tensor, low: float, high: float, generator: torch.Generator | None) -> None:
    """Beyond one standard deviation: exponential steps s from low, kept with chance e^(-s²/2)."""
    kept = -math.expm1(-low * (high - low))

    def propose(x: Tensor) -> Tensor:
        return x.uniform_(generator=generator).mul_(-kept).log1p_().div_(-low)

    def refused(x: Tensor) -> Tensor:
        chance = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return chance > torch.exp(-(x**2) / 2)

    propose(draw)
    _redraw(draw, refused, propose)
    draw.add_(low).clamp_(low, high)


def _redraw(
    draw: Tensor, refused: Callable[[Tensor], Tensor], propose: Callable[[Tensor], Tensor]
) -> None:
    """Propose anew, until nothing is refused. What was accepted once is not looked at again."""
    flat = draw.view(-1)
    places = refused(flat).nonzero()[:, 0]
    while len(places):
        again = propose(flat.new_empty(len(places)))
        flat[places] = again
        places = places[refused(again)]


def _gauss_legendre(first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on 64 panels of 16 nodes."""
    node, weight = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(first, last, 65)
    half = np.diff(edges)[:, None] / 2
    return ((edges[:-1, None] + half) + half * node).ravel(), (half * weight).ravel()
