"""What the functions of this package ask of numbers, choices, tensors and callables."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__: list[str] = []

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """Return a finite number, not negative (or above 0), as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name} must be a finite number {kind}, got {value}")
    return float(value)


def count(name: str, value: Any, *, least: int = 1) -> int:
    """Return an integer of at least ``least``."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if isinstance(value, bool) or integer < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value}")
    return integer


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Refuse what is not among the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def real_inputs(inputs: Any) -> Tensor:
    """Return a tensor of real numbers with a batch dimension and at least one feature."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch tensor, got {type(inputs).__name__}")
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs must be real floating-point numbers, got {inputs.dtype}; token indices cannot "
            "be perturbed: perturb the embedding output instead"
        )
    if inputs.ndim == 0 or 0 in inputs.shape[1:]:
        raise ValueError(
            "inputs must have a batch dimension and at least one feature, "
            f"got shape {tuple(inputs.shape)}"
        )
    return inputs


def same_shape(name: str, tensor: Any, inputs: Tensor) -> Tensor:
    """Return a tensor of real numbers of the inputs' shape."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of real floating-point numbers, got {kind}")
    if tensor.shape != inputs.shape:
        raise ValueError(
            f"{name} must have the shape of the inputs, {tuple(inputs.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    return tensor


def mask_of(mask: Any, inputs: Tensor) -> Tensor | None:
    """Return the mask in the inputs' shape (no copy); None stays None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = may be perturbed), got {kind}")
    try:
        return mask.expand(inputs.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must be broadcastable to the inputs' shape {tuple(inputs.shape)}, "
            f"got shape {tuple(mask.shape)}"
        ) from None


def random_source(generator: torch.Generator | None, like: Tensor) -> None:
    """Refuse a generator of another kind of device than the tensor's."""
    if generator is not None and generator.device.type != like.device.type:
        raise ValueError(
            f"generator must be on the device of the inputs, {like.device}, "
            f"got one on {generator.device}"
        )


def sample_losses(loss_function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return one loss a sample, refusing everything else."""
    losses = loss_function(inputs)
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"loss_function must return a tensor of real per-sample losses, got {kind}")
    if losses.shape != inputs.shape[:1]:
        raise ValueError(
            f"loss_function must return per-sample losses of shape {tuple(inputs.shape[:1])}, "
            f"got shape {tuple(losses.shape)}; a reduced loss wants reduction='none'"
        )
    return losses


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduce over the batch."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if len(values) == 0:
        raise ValueError("reduction 'mean' needs at least one sample, got an empty batch")
    return values.mean()


REDUCTIONS = ("mean", "sum", "none")
