"""What initialisers ask of a tensor: real floating numbers, and how many inputs and outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__: list[str] = []

_MODES = ("fan_in", "fan_out", "fan_avg")


def _check_floating(tensor: Tensor, name: str = "tensor") -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a real floating tensor, got {kind}")


def _fans(tensor: Tensor, name: str = "tensor") -> tuple[int, int]:
    """Number of inputs and of outputs of a weight (out, in, *kernel), as in torch."""
    if tensor.ndim < 2:
        raise ValueError(
            f"{name} must have at least two dimensions (out, in, ...), got {tuple(tensor.shape)}"
        )
    taps = math.prod(tensor.shape[2:])
    return tensor.shape[1] * taps, tensor.shape[0] * taps


def _fan(tensor: Tensor, mode: str, name: str = "tensor") -> float:
    fan_in, fan_out = _fans(tensor, name)
    fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    if mode not in fans:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    # A weight without entries has nothing to scale.
    return max(fans[mode], 1)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    """Half precision is drawn in single precision."""
    return tensor.dtype if tensor.itemsize >= 4 else torch.float32
