"""The Walsh-Hadamard transform as a few small matrix products."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np
from jaxtyping import Shaped

from kexue._precision import without_autocast

__all__ = ["hadamard_transform"]

_LARGEST_FACTOR = 7  # as a power of two: matrices of at most 128 x 128


@without_autocast
def hadamard_transform(
    x: Shaped[Any, "*batch dim"], *, normalize: bool = True
) -> Shaped[Any, "*batch dim"]:
    r"""Multiply the last axis by the Hadamard matrix.

    :math:`H_{2d} = \begin{pmatrix} H_d & H_d \\ H_d & -H_d \end{pmatrix}`, :math:`H_1 = (1)`: the
    rows are in Sylvester's order. Because :math:`H_{ab} = H_a \otimes H_b`, a product with factors
    of at most 128 along reshaped axes does it, in :math:`O(d \log d)` for each row.

    Parameters
    ----------
    x : array or torch tensor (..., d)
        d is a power of two. Half precision is computed in single precision, integers in double.
    normalize : bool
        Whether to divide by √d, which makes the transform orthogonal and its own inverse.

    Returns
    -------
    array or torch tensor (..., d)
        Of the kind and floating type of ``x``; differentiable, and its own gradient.

    Raises
    ------
    ValueError
        Where d is no power of two, or a numpy array holds NaN or infinity. In a tensor these spread
        over their row.
    TypeError
        Where ``x`` is complex or no array of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> hadamard_transform(np.array([1.0, 0.0, 2.0, 0.0]), normalize=False)
    array([ 3.,  3., -1., -1.])
    """
    if not array_api_compat.is_torch_array(x):
        x = np.asarray(x)
        if x.dtype.kind not in "buif":
            raise TypeError(f"x must hold real numbers, got an array of {x.dtype}")
        if not np.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or infinity")
    xp = array_api_compat.array_namespace(x)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x must hold real numbers, got a tensor of {x.dtype}")
    if x.ndim < 1 or not _is_power_of_two(x.shape[-1]):
        raise ValueError(
            f"the last axis of x must be a power of two, got an array of shape {tuple(x.shape)}"
        )
    given = x.dtype if xp.isdtype(x.dtype, "real floating") else xp.float64
    precision = xp.float32 if xp.finfo(given).bits < 32 else given
    scale = 1 / math.sqrt(x.shape[-1]) if normalize else 1.0
    turned = _transform(xp.astype(x, precision, copy=False), scale)
    return xp.astype(turned, given, copy=False)


def _transform(x: Any, scale: float) -> Any:
    """``scale`` times the transform; it goes into the first factor, where it costs nothing."""
    xp, shape = array_api_compat.array_namespace(x), x.shape
    device = array_api_compat.device(x)
    right = 1
    for factor in _factors(shape[-1]):
        H = _matrix(factor) * (scale if right == 1 else 1.0)
        H = xp.asarray(H, dtype=x.dtype, device=device)
        before = math.prod(shape) // (factor * right)
        if right == 1:
            x = xp.reshape(x, (before, factor)) @ H
        else:
            x = H @ xp.reshape(x, (before, factor, right))
        right *= factor
    return xp.reshape(x, shape)


def _factors(d: int) -> list[int]:
    """Powers of two as equal as can be, each at most 128, with product d."""
    bits = d.bit_length() - 1
    count = max(1, -(-bits // _LARGEST_FACTOR))
    return [2 ** (bits // count + (i < bits % count)) for i in range(count)]


def _matrix(d: int) -> np.ndarray:
    H: np.ndarray = np.ones((1, 1))
    while len(H) < d:
        H = np.kron([[1.0, 1.0], [1.0, -1.0]], H)
    return H


def _is_power_of_two(d: int) -> bool:
    return d > 0 and d & (d - 1) == 0
