"""What the public functions of Poisson flow refuse, in one place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def check_points(points: Any, name: str) -> None:
    """Refuse what is no finite floating point tensor of shape (batch, *sample)."""
    check_floating(points, name)
    if points.ndim < 2:
        raise ValueError(
            f"{name} must have a batch dimension and at least one more, "
            f"got shape {tuple(points.shape)}"
        )
    # Compiled code does not look at values: that would break its graph.
    if not torch.compiler.is_compiling() and not bool(points.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def check_floating(tensor: Any, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a floating point tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")


def check_same_sample(x: Tensor, data: Tensor, name: str = "data") -> None:
    if x.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"x and {name} must have samples of one shape, "
            f"got {tuple(x.shape[1:])} and {tuple(data.shape[1:])}"
        )


def check_data(data: Any, name: str = "data") -> None:
    check_points(data, name)
    if not data.numel():
        raise ValueError(f"{name} must hold at least one charge, got none: {tuple(data.shape)}")


def check_augmented_dim(augmented_dim: float, *, zero: bool = False, infinite: bool = True) -> None:
    lowest = "at least 0" if zero else "positive"
    low_enough = augmented_dim >= 0 if zero else augmented_dim > 0
    if not low_enough:
        raise ValueError(f"augmented_dim must be {lowest}, got {augmented_dim}")
    if not infinite and math.isinf(augmented_dim):
        raise ValueError(
            "augmented_dim must be finite here: the field itself has no limit, only the flow has"
        )


def check_positive(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_gamma(gamma: float) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0 and finite, got {gamma}")


def heights(z: float | Tensor | None, batch: int, device: torch.device, name: str = "z") -> Tensor:
    """Return positive distances to the data plane as float64 of shape (batch,)."""
    if z is None:
        raise ValueError(f"{name} must be positive, got None")
    if isinstance(z, Tensor):
        check_floating(z, name)
        if z.ndim > 1 or (z.ndim == 1 and len(z) != batch):
            raise ValueError(
                f"{name} must be one number or have shape ({batch},), got shape {tuple(z.shape)}"
            )
    values = torch.as_tensor(z, dtype=torch.float64, device=device)
    if not torch.compiler.is_compiling():
        wrong = ~((values > 0) & values.isfinite())
        if bool(wrong.any()):
            raise ValueError(f"{name} must be positive and finite, got {values[wrong][0].item()}")
    return values.expand(batch)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return (batch,) values with as many dimensions as `like`, so that they multiply it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which heights are handed to networks: never half precision."""
    return dtype if dtype.itemsize >= 4 else torch.float32
