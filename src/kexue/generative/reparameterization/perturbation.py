"""Logits plus Gumbel noise: what is let in, drawn, and divided by the temperature.

Everything happens in float32 at least: noise added in bfloat16 makes ties, and ties go to the first
category.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__: list[str] = []

Temperature = float | Tensor


def _gumbel(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Standard Gumbel noise, -log of exponential draws; float32 or float64."""
    return _exponential(shape, dtype, device, generator).log_().neg_()


def _exponential(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    draws = torch.empty(shape, dtype=dtype, device=device)
    if draws.device.type == "cpu":
        torch.rand(shape, generator=generator, out=draws)
        if dtype == torch.float32:
            _refine(draws, generator)
        draws.neg_().log1p_().neg_()
    else:
        draws.exponential_(generator=generator)
    # A draw of zero would be infinite noise.
    return draws.clamp_(min=torch.finfo(dtype).tiny)


def _refine(uniform: Tensor, generator: torch.Generator | None) -> None:
    """Give small uniform numbers the digits that a float32 has there.

    They come as multiples of 2^-24, which would cap the noise at 16.6. Below 2^-12 a uniform number
    is uniform still, so it may be drawn again at that scale; the cap moves to 25. All of this is a
    third of the price of exponential draws on a CPU.
    """
    scale = 2.0**-12
    flat = uniform.view(-1)
    (small,) = (flat < scale).nonzero(as_tuple=True)
    flat[small] = scale * torch.rand(
        len(small), dtype=uniform.dtype, device=uniform.device, generator=generator
    )


def _perturbed(logits: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Logits plus noise, in an array of its own that the caller may overwrite."""
    if noise is not None:
        return logits + noise.to(logits.dtype)
    return _gumbel(logits.shape, logits.dtype, logits.device, generator).add_(logits)


def _tempered(perturbed: Tensor, top: Tensor, temperature: Temperature, dim: int) -> Tensor:
    """softmax(perturbed / temperature); overwrites its first argument.

    The row maximum goes first, so that nothing overflows at any temperature.
    """
    shifted = perturbed.sub_(top.detach())
    if isinstance(temperature, Tensor):
        return _quotient(shifted, temperature).softmax(dim)
    # Below the smallest normal number the reciprocal of a temperature is infinite.
    return shifted.div_(max(temperature, torch.finfo(shifted.dtype).tiny)).softmax(dim)


def _quotient(shifted: Tensor, temperature: Temperature) -> Tensor:
    """shifted / temperature for shifted <= 0, finite, and finite gradients in both.

    What is so far below the maximum that its weight is zero many times over is cut off: there
    the quotient, or its derivative in the temperature, would be infinite.
    """
    limits = torch.finfo(shifted.dtype)
    floor = -(limits.max**0.25)
    if not isinstance(temperature, Tensor):
        return (shifted / max(temperature, limits.tiny)).clamp(min=floor)
    temperature = temperature.to(shifted.dtype).clamp(min=limits.tiny)
    far = shifted < floor * temperature
    return (shifted.masked_fill(far, 0.0) / temperature).masked_fill(far, floor)


def _conditional(
    logits: Tensor, index: Tensor, lead: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """Perturbed logits, given which of them is the largest."""
    noise = _gumbel((*lead, *logits.shape), logits.dtype, logits.device, generator)
    winner = index.unsqueeze(-1).expand(*lead, *index.shape, 1)
    largest = logits.logsumexp(-1, keepdim=True) + noise.gather(-1, winner)
    own = noise.add_(logits)
    # -log(exp(-own) + exp(-largest)), also where own is -inf; softplus would turn linear at 20.
    below = own - functional.softplus(own - largest, threshold=40)
    categories = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(categories == winner, largest, below)


def _gaps(
    logits: Tensor, index: Tensor, lead: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """Perturbed logits minus their largest, given which that is; a constant.

    In terms of the exponential draws, -log(1 + E_i / (E_k p_i)). Where no gradient is wanted this
    saves two logarithms and an exponential for each category.
    """
    draws = _exponential((*lead, *logits.shape), logits.dtype, logits.device, generator)
    winner = index.unsqueeze(-1).expand(*lead, *index.shape, 1)
    draws = draws.div_(draws.gather(-1, winner)).div_(logits.detach().softmax(-1))
    return draws.scatter_(-1, winner, 0.0).log1p_().neg_()


def _one_hot(index: Tensor, like: Tensor, dim: int = -1) -> Tensor:
    """Ones at `index`, which has `dim` with one or more entries, zeros elsewhere."""
    return torch.zeros_like(like, requires_grad=False).scatter_(dim, index, 1.0)


def _hardened(soft: Tensor, index: Tensor, dim: int) -> Tensor:
    """Ones at `index`, exact zeros elsewhere, and the gradient of `soft`."""
    hard = soft - soft.detach()
    with torch.no_grad():  # in place of another array's worth of zeros, and of a sum
        return hard.scatter_(dim, index, 1.0)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard`, exactly, with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def _working(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_logits(logits: Tensor, noise: Tensor | None, dim: int, validate: bool) -> Tensor:
    """Refuse what cannot be sampled from; return the logits in the dtype of the computation."""
    _check_floating(logits, "logits")
    if logits.ndim < 1:
        raise ValueError("logits must have at least one dimension, got a scalar")
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"dim must be between {-logits.ndim} and {logits.ndim - 1}, got {dim}")
    if logits.shape[dim] < 1:
        raise ValueError(f"logits must have a category at least, got shape {tuple(logits.shape)}")
    if noise is not None:
        _check_floating(noise, "noise")
        if noise.shape != logits.shape:
            raise ValueError(
                f"noise must have the shape of the logits, {tuple(logits.shape)}, "
                f"got {tuple(noise.shape)}"
            )
    if validate:
        _check_rows(logits, dim)
        if noise is not None and not _holds(noise.isfinite().all()):
            raise ValueError("noise must be finite, got nan or infinity")
    return _working(logits)


def _check_rows(logits: Tensor, dim: int) -> None:
    # One pass: the maximum of a row is NaN or +inf where one entry is, -inf where all are.
    largest = logits.detach().amax(dim)
    if _holds(largest.isfinite().all()):
        return
    if not _holds((largest < math.inf).all()):
        raise ValueError("logits must be free of nan and +inf (-inf masks a category)")
    raise ValueError("every row of logits needs a finite entry, got a row of -inf")


def _check_temperature(temperature: Temperature, logits: Tensor, validate: bool) -> Temperature:
    if isinstance(temperature, Tensor):
        _check_floating(temperature, "temperature")
        try:
            fits = torch.broadcast_shapes(temperature.shape, logits.shape) == logits.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"temperature must broadcast to the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(temperature.shape)}"
            )
        detached = temperature.detach()
        if validate and not _holds(((detached > 0) & detached.isfinite()).all()):
            raise ValueError("temperature must be positive and finite everywhere")
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(
            f"temperature must be a number or a tensor, got {type(temperature).__name__}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return float(temperature)


def _check_floating(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def _check_count(count: int, name: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")


def _holds(condition: Tensor) -> bool:
    """Whether a condition on values holds; True where values cannot be looked at."""
    if torch.compiler.is_compiling():
        return True
    try:
        return bool(condition)
    except RuntimeError as error:
        if "vmap" in str(error):
            return True
        raise
