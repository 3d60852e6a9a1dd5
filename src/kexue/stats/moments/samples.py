"""What comes in at the public doors: arrays, axes, weights, counts; and how results go out."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__: list[str] = []

# numpy or torch; the functions say what they refuse.
Array: TypeAlias = Any
Numbers: TypeAlias = Sequence[Any] | float
Axis: TypeAlias = int | tuple[int, ...] | None

MAX_ORDER = 6
WEIGHT_TYPES = ("frequency", "reliability")
CORRECTIONS = ("c4", "bessel", "none")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _as_tensor(x: Any, name: str = "x") -> Tensor:
    """A tensor of real numbers, in the memory of x where that is possible."""
    if isinstance(x, Tensor):
        if x.is_complex():
            raise TypeError(f"{name} must hold real numbers, got a tensor of {x.dtype}")
        return x
    array = np.asarray(x)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} must hold real numbers of at most 64 bits, got an array of {array.dtype}"
        )
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _is_torch(x: Any) -> bool:
    return isinstance(x, Tensor)


def _given_back(result: Tensor, x: Any, dtype: torch.dtype) -> Any:
    """The result as the kind of array that x is, in the precision that x has."""
    result = result.to(_float_like(dtype))
    return result if _is_torch(x) else result.numpy()[()]


def _float_like(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _FLOATS else torch.float64


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The reduced dimensions, each in 0, …, ndim - 1."""
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, tuple | list) else (axis,)
    dims = []
    for one in given:
        try:
            dim = operator.index(one)
        except TypeError:
            raise TypeError(
                f"axis must be None, an integer or a tuple of them, got {axis!r}"
            ) from None
        if not -ndim <= dim < ndim:
            raise ValueError(
                f"axis must be in {-ndim}, …, {ndim - 1} for {ndim} dimensions, got {dim}"
            )
        dims.append(dim % ndim)
    if len(set(dims)) < len(dims):
        raise ValueError(f"axis must name every dimension once, got {axis!r}")
    return tuple(dims)


def _weights_for(x: Tensor, dims: tuple[int, ...], weights: Any, x_given: Any) -> Tensor:
    """The weights, broadcast to x without taking memory."""
    w = _weight_tensor(weights, x_given)
    if w.shape == x.shape:
        shaped = w
    elif len(dims) == 1 and w.shape == (x.shape[dims[0]],):
        shape = [1] * x.ndim
        shape[dims[0]] = -1
        shaped = w.reshape(shape)
    else:
        accepted = f"the shape of x, {tuple(x.shape)}"
        if len(dims) == 1:
            accepted += f", or ({x.shape[dims[0]]},) along the axis"
        raise ValueError(f"weights must have {accepted}, got {tuple(w.shape)}")
    _check_weights(shaped, dims)
    return shaped.expand(x.shape)


def _weight_tensor(weights: Any, x_given: Any) -> Tensor:
    for kind, other in ((Tensor, np.ndarray), (np.ndarray, Tensor)):
        if isinstance(x_given, kind) and isinstance(weights, other):
            raise TypeError(
                f"x and weights must be arrays of one library, got {type(x_given).__name__} "
                f"and {type(weights).__name__}"
            )
    w = _as_tensor(weights, "weights")
    return w.to(x_given.device) if isinstance(x_given, Tensor) else w


def _check_weights(w: Tensor, dims: tuple[int, ...]) -> None:
    if torch.compiler.is_compiling():  # a graph has no values to look at
        return
    if not bool(((w >= 0) & (w < math.inf)).all()):
        raise ValueError(
            f"weights must be finite and at least 0, got {float(w.min()):.6g} as least"
        )
    if not bool((w.sum(dims) > 0).all()):
        raise ValueError("weights must not all be zero, got only zeros for some result")


def _correction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"correction must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"correction must be finite, got {value!r}")
    return float(value)


def _check_divisor(n: float, correction: float) -> None:
    if n <= correction:
        raise ValueError(
            f"n - correction must be positive: correction {correction:g} needs more than "
            f"{correction:g} samples, got {n:g}"
        )


def _choice(value: Any, choices: Sequence[str], name: str) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _integer(value: Any, name: str, least: int) -> int:
    """An integer of at least ``least``; a float that is one counts."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


def _order(value: Any, most: int = MAX_ORDER, *, least: int = 1, name: str = "order") -> int:
    if isinstance(value, bool | float) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer in {least}, …, {most}, got {value!r}")
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be an integer in {least}, …, {most}, got {number}")
    return number


def _check_count(n: int, least: int, what: str) -> None:
    if n < least:
        raise ValueError(f"{what} needs at least {least} samples, got {n}")
