"""What a step does to a parameter.

`advance` is the method: the slots after the step, and the two factors of the update. Around it
stand two ways to run it: one parameter after another, which keeps each in the cache of a CPU, and
many small parameters joined to one matrix, which spares a GPU the launches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__: list[str] = []

_JOINED_PARAMETER = 1 << 20
"""Entries above which a parameter is stepped alone: its kernels outweigh their launches."""
_JOINED_TOTAL = 1 << 24
"""Entries of one joined matrix, which exists beside parameters and gradients."""


class Entry(NamedTuple):
    """One parameter in one step."""

    parameter: Tensor
    gradient: Tensor
    second_moment: Tensor
    decay: Tensor
    average: Tensor | None
    bias_correction: float | Tensor
    scale: float


def advance(
    mean_square: Tensor,
    second_moment: Tensor,
    decay: Tensor,
    bias_correction: float | Tensor,
    scale: float,
    group: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the new v and b, and the factors of g and θ in Δ."""
    # The square of a finite gradient may be too large for a number, and ∞ would never leave v.
    mean_square = mean_square.clamp(max=torch.finfo(mean_square.dtype).max)
    xi, zeta, rate = group["lr"], group["decay_coefficient"], group["finetune_rate"]
    if isinstance(xi, Tensor):
        xi = xi.reshape(()).to(decay)
    # lerp and not β v + (1-β) M: in float32, 1 minus the rounded β is off by 1e-5 of itself.
    second_moment = torch.lerp(second_moment, mean_square, 1 - group["beta"])
    reciprocal = bias_correction / second_moment.clamp(min=group["eps"])
    c = (1 + zeta * xi**0.5 * decay).rsqrt()
    d = (1 + zeta * (xi * scale) ** 0.5 * decay).reciprocal()
    gamma = rate**0.5 * xi**2 * c * (reciprocal * mean_square)
    of_gradient = -rate * xi * scale * d * reciprocal.sqrt()
    of_parameter = -rate / 2 * d * gamma
    return second_moment, decay + gamma * (rate + decay), of_gradient, of_parameter


def step_alone(entry: Entry, group: dict[str, Any]) -> None:
    parameter, gradient, average = entry.parameter, entry.gradient, entry.average
    old_moment, old_decay = entry.second_moment, entry.decay
    if group["differentiable"]:
        # What the graph remembers must not be written over.
        old_moment, old_decay = old_moment.clone(), old_decay.clone()
    second_moment, decay, of_gradient, of_parameter = advance(
        _mean_square(gradient, old_decay),
        old_moment,
        old_decay,
        entry.bias_correction,
        entry.scale,
        group,
    )
    entry.second_moment.copy_(second_moment)
    entry.decay.copy_(decay)
    if group["maximize"]:
        of_gradient = -of_gradient
    # To add up in the type of the slots and round once; the same tensors where that is theirs.
    theta, gradient = parameter.to(decay.dtype), gradient.to(decay.dtype)
    if group["differentiable"]:
        theta = theta.clone()
    update = (gradient * of_gradient).addcmul_(theta, of_parameter)
    if average is not None:
        update = average.to(decay.dtype).lerp(update, 1 - group["momentum"])
        average.copy_(update)
    if parameter.dtype == decay.dtype:
        parameter.add_(update)
    else:
        parameter.copy_(theta + update)


def step_joined(entries: list[Entry], group: dict[str, Any]) -> None:
    """Step parameters of one layout: all groups of entries are rows of one matrix."""
    dtype = entries[0].decay.dtype
    slots = group["slots"]
    heights = [entry.decay.numel() for entry in entries]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([_as_rows(tensor, slots) for tensor in tensors]).to(dtype)

    def column(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1, 1) for tensor in tensors])

    bias_correction = entries[0].bias_correction
    if isinstance(bias_correction, Tensor):
        each = torch.stack([torch.as_tensor(entry.bias_correction) for entry in entries])
        bias_correction = torch.cat(
            [one.expand(height, 1) for one, height in zip(each, heights, strict=True)]
        )
    gradient = joined([entry.gradient for entry in entries])
    theta = joined([entry.parameter for entry in entries])
    mean_square = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square()
    second_moment, decay, of_gradient, of_parameter = advance(
        mean_square / gradient.shape[1],
        column([entry.second_moment for entry in entries]),
        column([entry.decay for entry in entries]),
        bias_correction,
        entries[0].scale,
        group,
    )
    for old, new in (("second_moment", second_moment), ("decay", decay)):
        kept = [getattr(entry, old) for entry in entries]
        parts = zip(new.split(heights), kept, strict=True)
        torch._foreach_copy_(kept, [part.reshape(slot.shape) for part, slot in parts])
    if group["maximize"]:
        of_gradient = -of_gradient
    update = (gradient * of_gradient).addcmul_(theta, of_parameter)

    parameters = [entry.parameter for entry in entries]

    def apart(rows: Tensor) -> list[Tensor]:
        return [
            _from_rows(part, parameter, slots)
            for part, parameter in zip(rows.split(heights), parameters, strict=True)
        ]

    averages = [entry.average for entry in entries if entry.average is not None]
    if averages:
        update = joined(averages).lerp_(update, 1 - group["momentum"])
        torch._foreach_copy_(averages, apart(update))
    if parameters[0].dtype == dtype:
        torch._foreach_add_(parameters, apart(update))
    else:
        torch._foreach_copy_(parameters, apart(theta + update))


def _mean_square(gradient: Tensor, slot: Tensor) -> Tensor:
    """M(g²), formed in the type of the slot: the square of a half may be out of its range."""
    if slot.numel() == gradient.numel():
        return gradient.to(slot.dtype).square().reshape(slot.shape)
    if slot.ndim == 0:
        norm = torch.linalg.vector_norm(gradient, dtype=slot.dtype)
    else:
        sizes = zip(slot.shape, gradient.shape, strict=True)
        axes = [axis for axis, (kept, size) in enumerate(sizes) if kept < size]
        norm = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True, dtype=slot.dtype)
    return norm.square() * (slot.numel() / gradient.numel())


def bias_correction(step: Tensor, group: dict[str, Any], dtype: torch.dtype) -> float | Tensor:
    """1 - β^t; as a tensor where nothing may be read back."""
    beta = group["beta"]
    if not group["capturable"]:
        return 1 - beta ** step.item()
    if beta == 0:
        return torch.ones_like(step, dtype=dtype)
    return -torch.expm1(step.to(dtype) * math.log(beta))


def is_joined(parameter: Tensor, group: dict[str, Any]) -> bool:
    foreach = group["foreach"]
    if foreach is None:
        foreach = parameter.is_cuda and not group["differentiable"]
    return foreach and parameter.numel() <= _JOINED_PARAMETER


def layout(entry: Entry) -> tuple[Any, ...]:
    """What parameters must have in common to be joined."""
    correction = entry.bias_correction
    return (
        entry.parameter.device,
        entry.parameter.dtype,
        entry.gradient.dtype,
        entry.parameter.numel() // entry.decay.numel(),
        entry.scale,
        None if isinstance(correction, Tensor) else correction,
    )


def portions(entries: list[Entry]) -> list[list[Entry]]:
    """Cut a list so that no portion holds more entries than a joined matrix may."""
    cut: list[list[Entry]] = [[]]
    total = 0
    for entry in entries:
        total += entry.parameter.numel()
        if total > _JOINED_TOTAL and cut[-1]:
            cut.append([])
            total = entry.parameter.numel()
        cut[-1].append(entry)
    return cut


def _resolved(slots: str, ndim: int) -> str:
    if slots == "auto":
        return "per_row" if ndim >= 2 else "per_tensor"
    # A single number is its own row, column and tensor.
    return slots if ndim else "per_tensor"


def slot_shape(parameter: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    match _resolved(group["slots"], parameter.ndim):
        case "per_row":
            return (shape[0],) + (1,) * (len(shape) - 1)
        case "per_column":
            return (1,) * (len(shape) - 1) + (shape[-1],)
        case "per_tensor":
            return ()
    return shape


def _as_rows(tensor: Tensor, slots: str) -> Tensor:
    """The matrix whose rows are the groups of entries that share a slot."""
    match _resolved(slots, tensor.ndim):
        case "per_row":
            return tensor.reshape(tensor.shape[0], -1)
        case "per_column":
            return tensor.reshape(-1, tensor.shape[-1]).T
        case "per_tensor":
            return tensor.reshape(1, -1)
    return tensor.reshape(-1, 1)


def _from_rows(rows: Tensor, like: Tensor, slots: str) -> Tensor:
    if _resolved(slots, like.ndim) == "per_column":
        rows = rows.T
    return rows.reshape(like.shape)


def slot_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
