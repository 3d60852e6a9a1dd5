r"""How the identity and the branch are weighted, so that one step of N layers stays of order one.

With identity weight :math:`\alpha` and gain :math:`\beta` on the weights of the branches, a step
changes the loss by

.. math::
    \text{SGD: } s\,(\beta/\alpha)^2, \qquad \text{Adam: } s\,\beta/\alpha, \qquad
    \text{LAMB: } s\,\beta^2/\alpha, \qquad s = \text{number of sublayers},

times a number that does not depend on depth. Setting it to 1, with :math:`\beta = 1/\alpha` after a
post-norm and :math:`\alpha = 1` after a pre-norm, gives the table of :func:`depth_scaling`.

Source: https://kexue.fm/archives/8994, https://arxiv.org/abs/2203.00555,
https://arxiv.org/abs/2210.02414 (the row of Adam).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "DeepNormCoefficients",
    "DepthScaling",
    "deepnorm_coefficients",
    "depth_scaling",
    "residual_gain",
]

# Exponents of the number of sublayers: (alpha and beta after a post-norm, beta after a pre-norm).
_EXPONENTS = {
    "sgd": (1 / 4, -1 / 4, -1 / 2),
    "adam": (1 / 2, -1 / 2, -1.0),
    "lamb": (0.0, -1 / 2, -1 / 2),
}


@dataclass(frozen=True)
class DepthScaling:
    """Weights of a residual block of some depth.

    Parameters
    ----------
    alpha : float
        Weight of the identity.
    beta : float
        Gain on the Xavier initialisation of the branch's weights.

    Examples
    --------
    >>> DepthScaling(alpha=2.0, beta=0.5).alpha
    2.0
    """

    alpha: float
    beta: float


@dataclass(frozen=True)
class DeepNormCoefficients:
    """Weights of an encoder and a decoder; None for a stack that is absent.

    Parameters
    ----------
    encoder, decoder : DepthScaling or None
        Weights of the blocks of each stack.

    Examples
    --------
    >>> DeepNormCoefficients(encoder=DepthScaling(2.0, 0.5), decoder=None).decoder is None
    True
    """

    encoder: DepthScaling | None
    decoder: DepthScaling | None


def deepnorm_coefficients(
    *, encoder_layers: int = 0, decoder_layers: int = 0
) -> DeepNormCoefficients:
    r"""Return the coefficients of DeepNet.

    A single stack of N layers has :math:`\alpha = (2N)^{1/4}, \beta = (8N)^{-1/4}`. With an encoder
    of N and a decoder of M layers, the encoder has :math:`\alpha = 0.81 (N^4 M)^{1/16}, \beta =
    0.87 (N^4 M)^{-1/16}` and the decoder :math:`\alpha = (3M)^{1/4}, \beta = (12M)^{-1/4}`.

    Parameters
    ----------
    encoder_layers, decoder_layers : int
        Layers of each stack, 0 for none. A layer is attention and feed-forward together.

    Returns
    -------
    DeepNormCoefficients

    Raises
    ------
    TypeError
        For a number of layers that is no integer.
    ValueError
        For a negative number, or none of both.

    Examples
    --------
    >>> deepnorm_coefficients(encoder_layers=6).encoder
    DepthScaling(alpha=1.86120971..., beta=0.37991784...)
    """
    n = _count("encoder_layers", encoder_layers, least=0)
    m = _count("decoder_layers", decoder_layers, least=0)
    if n and m:
        shared = (n**4 * m) ** (1 / 16)
        return DeepNormCoefficients(
            encoder=DepthScaling(0.81 * shared, 0.87 / shared),
            decoder=DepthScaling((3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)),
        )
    if not n and not m:
        raise ValueError("encoder_layers or decoder_layers must be at least 1, got 0 and 0")
    single = DepthScaling((2 * (n + m)) ** (1 / 4), (8 * (n + m)) ** (-1 / 4))
    return DeepNormCoefficients(single if n else None, single if m else None)


def depth_scaling(
    num_layers: int,
    *,
    optimizer: Literal["sgd", "adam", "lamb"] = "sgd",
    norm: Literal["post", "pre"] = "post",
    sublayers_per_layer: int = 2,
) -> DepthScaling:
    r"""Return the weights that keep the size of one step independent of depth.

    With s sublayers: post-norm :math:`(\alpha, \beta)` is :math:`(s^{1/4}, s^{-1/4})` for SGD,
    :math:`(s^{1/2}, s^{-1/2})` for Adam, :math:`(1, s^{-1/2})` for LAMB; pre-norm has
    :math:`\alpha = 1` and :math:`\beta = s^{-1/2}, s^{-1}, s^{-1/2}`.

    Parameters
    ----------
    num_layers : int
        Layers N of the stack.
    optimizer : {"sgd", "adam", "lamb"}
        Whose step it is: proportional to the gradient, to its sign, to its sign and the weight.
    norm : {"post", "pre"}
        Where the blocks have their norm.
    sublayers_per_layer : int
        Branches of a layer: 2 for attention and feed-forward.

    Returns
    -------
    DepthScaling

    Raises
    ------
    TypeError
        For numbers that are no integers.
    ValueError
        For numbers below 1, or another optimiser or norm.

    Examples
    --------
    >>> depth_scaling(8, optimizer="adam")
    DepthScaling(alpha=4.0, beta=0.25)
    """
    sublayers = _count("num_layers", num_layers) * _count(
        "sublayers_per_layer", sublayers_per_layer
    )
    if optimizer not in _EXPONENTS:
        raise ValueError(f"optimizer must be one of {', '.join(_EXPONENTS)}, got {optimizer!r}")
    post_alpha, post_beta, pre_beta = _EXPONENTS[optimizer]
    if norm == "post":
        return DepthScaling(sublayers**post_alpha, sublayers**post_beta)
    if norm == "pre":
        return DepthScaling(1.0, sublayers**pre_beta)
    raise ValueError(f"norm must be one of post, pre, got {norm!r}")


def residual_gain(num_layers: int, epsilon: float, *, aligned: bool = False) -> float:
    r"""Return by how much N layers :math:`y = x + \varepsilon f(x)` lengthen a vector.

    In high dimension the Jacobian of a random f is nearly orthogonal to the identity, and the
    factor is :math:`(1 + \varepsilon^2)^{N/2}`; where all Jacobians are aligned, as in one
    dimension, it is :math:`(1 + \varepsilon)^N`.

    Parameters
    ----------
    num_layers : int
        Layers N.
    epsilon : float
        Weight of the branch.
    aligned : bool
        The worst case.

    Returns
    -------
    float
        ``inf`` where it exceeds the floating-point range.

    Raises
    ------
    TypeError
        For a number of layers that is no integer.
    ValueError
        For a number of layers below 1, or an epsilon that is negative or not finite.

    Examples
    --------
    At :math:`\varepsilon = N^{-1/2}` a thousand layers lengthen by no more than the root of e:

    >>> round(residual_gain(1000, 1000**-0.5), 4)
    1.6483
    """
    num_layers = _count("num_layers", num_layers)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and not negative, got {epsilon}")
    if aligned:
        log_gain = num_layers * math.log1p(epsilon)
    elif epsilon > 1:
        # The square of a large epsilon may not be a number any more, its logarithm is.
        log_gain = num_layers * (math.log(epsilon) + 0.5 * math.log1p(epsilon**-2))
    else:
        log_gain = 0.5 * num_layers * math.log1p(epsilon**2)
    try:
        return math.exp(log_gain)
    except OverflowError:
        return math.inf


def _count(name: str, value: int, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
