r"""What an activation does to the second moment of a Gaussian, and the gain that undoes it.

For z ~ N(0, 1) and inputs of size s, a layer of gain g multiplies second moments per layer by

.. math::
    \text{forward: } g^2\, \frac{\mathbb{E}[\varphi(sz)^2]}{s^2}, \qquad
    \text{backward: } g^2\, \mathbb{E}[\varphi'(sz)^2].

Only for positively homogeneous activations (ReLU, leaky ReLU) can both be 1. The integrals are
computed for any activation by Gauss–Legendre quadrature on short panels between its kinks.

Source: https://kexue.fm/archives/7180 (从几何视角来理解模型参数的初始化策略),
https://arxiv.org/abs/1502.01852.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kexue.nn.init.arguments import choice, finite_number, positive_number

__all__ = [
    "ActivationMoments",
    "LayerGrowth",
    "activation_gain",
    "activation_moments",
    "layer_growth",
]

Activation: TypeAlias = str | Callable[..., Any]
Direction: TypeAlias = Literal["forward", "backward"]


def _softplus(x: Tensor) -> Tensor:
    # torch.nn.functional.softplus is linear above 20, where the derivative still lacks 2e-9.
    return torch.logaddexp(x, torch.zeros_like(x))


def _identity(x: Tensor) -> Tensor:
    return x


_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _identity,
    "identity": _identity,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
    "selu": functional.selu,
    "softplus": _softplus,
    "mish": functional.mish,
    "hardtanh": functional.hardtanh,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
}


@dataclass(frozen=True)
class ActivationMoments:
    r"""Moments of :math:`\varphi(x)` and :math:`\varphi'(x)` for Gaussian x.

    Parameters
    ----------
    mean : float
        :math:`\mathbb{E}[\varphi]`.
    second_moment : float
        :math:`\mathbb{E}[\varphi^2]`.
    variance : float
        :math:`\mathbb{E}[(\varphi - \mathbb{E}\varphi)^2]`.
    derivative_second_moment : float
        :math:`\mathbb{E}[\varphi'^2]`.

    Examples
    --------
    >>> round(activation_moments("tanh").second_moment, 12)
    0.394294490398
    """

    mean: float
    second_moment: float
    variance: float
    derivative_second_moment: float


@dataclass(frozen=True)
class LayerGrowth:
    """Factors of the second moment in one layer.

    Parameters
    ----------
    forward : float
        Of the signal.
    backward : float
        Of the gradient.

    Examples
    --------
    >>> layer_growth("relu", 2**0.5)
    LayerGrowth(forward=1.0..., backward=1.0...)
    """

    forward: float
    backward: float


def activation_moments(
    activation: Activation,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    breakpoints: Sequence[float] = (),
) -> ActivationMoments:
    """Return the moments of an activation of a Gaussian variable, to ten digits.

    Panels of the quadrature end at every multiple of 1/2 in [-8, 8], where the usual activations
    have their kinks, and at ``breakpoints``; kinks elsewhere cost digits unless they are named
    there. Beyond [-8, 8] panels are as wide as half a standard deviation, so that an activation
    must be smooth on that scale; and it may grow like a power or like exp(x), not like exp(x^2).

    Parameters
    ----------
    activation : str or callable
        linear, identity, relu, leaky_relu (slope 0.01), gelu (exact), silu, tanh, sigmoid, elu,
        selu, softplus, mish, hardtanh, relu6, hardswish; or a function or ``nn.Module`` that acts
        on each entry of a vector alone. It is evaluated in float64 (a module with copies of its
        parameters) and differentiated by autograd; without a graph its derivative is 0.
    mean, std : float, optional
        Of the Gaussian variable.
    breakpoints : sequence of float, optional
        Further places where the activation or a derivative of it jumps.

    Returns
    -------
    ActivationMoments
        Mean, second moment, variance, and second moment of the derivative.

    Raises
    ------
    TypeError
        For an activation that is neither name nor callable, or an argument that is no number.
    ValueError
        For an unknown name, ``std`` that is not positive, numbers that are not finite, and for an
        activation that is not finite within 14 standard deviations or not elementwise (softmax,
        layer norm, dropout).

    Examples
    --------
    >>> moments = activation_moments("relu")
    >>> round(moments.mean, 12), round(moments.second_moment, 12)
    (0.398942280401, 0.5)
    >>> round(activation_moments(torch.sin).second_moment, 12)  # (1 - exp(-2))/2
    0.432332358382
    """
    mean, std = finite_number("mean", mean), positive_number("std", std)
    places = [finite_number("each of breakpoints", place) for place in breakpoints]
    sampled = _sample(activation, mean, std, places)
    average = float(sampled.weights @ sampled.values)
    moments = ActivationMoments(
        mean=average,
        second_moment=_root_mean_square(sampled.values, sampled.weights) ** 2,
        variance=_root_mean_square(sampled.values - average, sampled.weights) ** 2,
        derivative_second_moment=_root_mean_square(sampled.slopes, sampled.weights) ** 2,
    )
    if not all(map(math.isfinite, vars(moments).values())):
        raise ValueError(f"moments of the activation must be finite, got {moments}")
    return moments


def activation_gain(
    activation: Activation, *, direction: Direction = "forward", std: float = 1.0
) -> float:
    r"""Return the factor of a weight that makes up for an activation.

    Forward :math:`s/\sqrt{\mathbb{E}\varphi(sz)^2}` keeps the size of the signal, backward
    :math:`1/\sqrt{\mathbb{E}\varphi'(sz)^2}` that of the gradient. The layer *after* the activation
    takes it: ``orthogonal_(layer.weight, activation_gain("gelu"))`` for :math:`W\varphi(x)`. With
    the activation last in each layer the same number applies, since they alternate.

    Use forward for shallow networks and for output scales. In deep ones without norms and
    shortcuts look at :func:`layer_growth` first: the forward gain of tanh, 1.59, makes gradients
    grow by 1.18 per layer. Take backward there, or for odd saturating activations gain 1, whose
    two factors both tend to 1 for small signals. ReLU has no such conflict.

    Parameters
    ----------
    activation : str or callable
        As in :func:`activation_moments`.
    direction : {"forward", "backward"}, optional
        What is to be preserved.
    std : float, optional
        Size s of the activation's input.

    Returns
    -------
    float
        The gain; 1 for "linear" in both directions and at every s.

    Raises
    ------
    TypeError
        As :func:`activation_moments`.
    ValueError
        As :func:`activation_moments`; for another direction; where the activation, or backward its
        derivative, is 0 almost everywhere, so that no factor helps.

    Examples
    --------
    >>> round(activation_gain("tanh"), 10), round(activation_gain("relu", direction="backward"), 10)
    (1.5925374197, 1.4142135624)
    """
    choice("direction", direction, get_args(Direction))
    std = positive_number("std", std)
    sampled = _sample(activation, 0.0, std, ())
    if direction == "forward":
        size, wanted, what = _root_mean_square(sampled.values, sampled.weights), std, "the output"
    else:
        size, wanted, what = _root_mean_square(sampled.slopes, sampled.weights), 1.0, "the slope"
    gain = wanted / size if size > 0 else math.inf
    if not 0 < gain < math.inf:
        raise ValueError(
            f"a {direction} gain needs an activation with finite moments, not all 0, "
            f"got {size} as the root mean square of {what}"
        )
    return gain


def layer_growth(activation: Activation, gain: float = 1.0, *, std: float = 1.0) -> LayerGrowth:
    r"""Return how much one layer multiplies the second moments of signal and gradient.

    Forward :math:`g^2\,\mathbb{E}[\varphi(sz)^2]/s^2`, backward
    :math:`g^2\,\mathbb{E}[\varphi'(sz)^2]`. After L layers the gradient has changed by the L-th
    power of the second: 1.18 is harmless at depth 5 and 1.3e7 at depth 100.

    Parameters
    ----------
    activation : str or callable
        As in :func:`activation_moments`.
    gain : float, optional
        Of an orthogonal weight; for a Gaussian one its standard deviation times the square root of
        the width.
    std : float, optional
        Size s of the activation's input.

    Returns
    -------
    LayerGrowth
        Both factors.

    Raises
    ------
    TypeError
        As :func:`activation_moments`.
    ValueError
        As :func:`activation_moments`; for a gain that is not finite.

    Examples
    --------
    >>> growth = layer_growth("tanh", activation_gain("tanh"))
    >>> round(growth.forward, 10), round(growth.backward, 10)
    (1.0, 1.1778072323)
    """
    gain, std = finite_number("gain", gain), positive_number("std", std)
    sampled = _sample(activation, 0.0, std, ())
    growth = LayerGrowth(
        forward=(gain * (_root_mean_square(sampled.values, sampled.weights) / std)) ** 2,
        backward=(gain * _root_mean_square(sampled.slopes, sampled.weights)) ** 2,
    )
    if not math.isfinite(growth.forward + growth.backward):
        raise ValueError(f"growth of the layer must be finite, got {growth}")
    return growth


class _Sampled(NamedTuple):
    """An activation and its derivative on the nodes of a quadrature, float64 vectors."""

    values: Tensor
    slopes: Tensor
    weights: Tensor


def _root_mean_square(values: Tensor, weights: Tensor) -> float:
    largest = float(values.abs().max())
    if not 0 < largest < math.inf:
        return largest
    # Divided first, so that squares of very small and very large activations stay within range.
    return largest * math.sqrt(float(weights @ (values / largest).square()))


def _sample(
    activation: Activation, mean: float, std: float, breakpoints: Sequence[float]
) -> _Sampled:
    function = _resolve(activation)
    nodes, weights = _quadrature(mean, std, breakpoints)
    # The caller may be building a model without gradients; the derivative needs them.
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.from_numpy(nodes).requires_grad_()
        values = _apply(function, x)
        _check_finite(values, x)
        _check_elementwise(function, x.detach(), values.detach())
        slopes = torch.zeros_like(x)
        if values.requires_grad:
            (slope,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
            slopes = slopes if slope is None else slope
        _check_finite(slopes, x)
        return _Sampled(values.detach(), slopes, torch.from_numpy(weights))


def _quadrature(
    mean: float, std: float, breakpoints: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in the activation's argument and weights of N(mean, std^2), from panel to panel."""
    # Kinks lie on multiples of 1/2. The last ones follow tails like exp(-x) where std is large.
    tail = [10.0, 12.0, 16.0, 24.0, 32.0]
    places = np.array([*np.arange(-8, 8.5, 0.5), *tail, *(-x for x in tail), *breakpoints])
    with np.errstate(over="ignore"):
        places = (places - mean) / std
    panels = np.linspace(-_REACH, _REACH, 4 * int(_REACH) + 1)
    edges = np.unique([*panels, *places[np.abs(places) < _REACH]])
    centres, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    unit_nodes, unit_weights = np.polynomial.legendre.leggauss(24)
    z = (centres[:, None] + halves[:, None] * unit_nodes).ravel()
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return mean + std * z, (halves[:, None] * unit_weights).ravel() * density


_REACH = 14.0
"""The density at 14 standard deviations is 1e-43; squares of e^z have lost nothing there."""


def _resolve(activation: Any) -> Callable[[Tensor], Any]:
    if isinstance(activation, str):
        choice("activation", activation, tuple(_BY_NAME))
        return _BY_NAME[activation]
    if not callable(activation):
        raise TypeError(f"activation must be a name or a callable, got {type(activation).__name__}")
    if not isinstance(activation, nn.Module):
        return activation
    # Copies in float64, which also keep a module with running statistics as it was.
    state = {
        name: part.detach().cpu().double() if part.is_floating_point() else part.detach().cpu()
        for name, part in [*activation.named_parameters(), *activation.named_buffers()]
    }
    return lambda x: torch.func.functional_call(activation, state, (x,))


def _apply(function: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    try:
        values = function(x)
    except RuntimeError as error:  # of torch: such as a layer norm of another width
        raise ValueError(
            f"activation must take a float64 vector of any length, but failed at {len(x)}: {error}"
        ) from error
    if not isinstance(values, Tensor) or values.shape != x.shape or values.is_complex():
        got = type(values).__name__
        if isinstance(values, Tensor):
            got = f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(
            "activation must be elementwise: a real tensor of the shape of its input, "
            f"{tuple(x.shape)}, got {got}"
        )
    return values.double()


def _check_finite(values: Tensor, x: Tensor) -> None:
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"activation and its derivative must be finite on [{x.min():.4g}, {x.max():.4g}], "
            f"got {values[bad][0].item()} at {x[bad][0].item():.4g}"
        )


def _check_elementwise(function: Callable[[Tensor], Any], x: Tensor, values: Tensor) -> None:
    # Every second entry of the middle half: neither sum nor mean nor largest entry stays the same.
    middle = slice(len(x) // 4, 3 * len(x) // 4, 2)
    expected = values[middle]
    alone = _apply(function, x[middle]).detach()
    # An activation may compute in float32; whatever mixes or draws entries is far beyond that.
    scale = float(expected.abs().max())
    if not torch.allclose(alone, expected, rtol=1e-6, atol=1e-6 * scale):
        raise ValueError(
            "activation must be elementwise and deterministic: a part of a vector gave other "
            f"values than the same entries of the whole, by up to "
            f"{float((alone - expected).abs().max()):.3g}"
        )
