"""Ways between two latent codes that keep to the shell on which normal codes lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import _check_state
from kexue.generative.diffusion.ode.flow import _check_choice

__all__ = ["interpolate_latents"]

_METHODS = ("trigonometric", "slerp")


def interpolate_latents(
    first: Float[Tensor, "..."],
    second: Float[Tensor, "..."],
    weights: Float[Tensor, " count"] | Sequence[float],
    *,
    method: Literal["trigonometric", "slerp"] = "trigonometric",
) -> Float[Tensor, "count ..."]:
    """Return codes between two codes, without the shrinking norm of a straight line.

    "trigonometric", first · cos(λπ/2) + second · sin(λπ/2), is N(0, I) again for independent
    normal codes and any λ. "slerp" turns by the actual angle θ between the two,
    (first · sin((1 − λ)θ) + second · sin(λθ))/sin θ, and goes straight where they are parallel.

    Parameters
    ----------
    first, second : Tensor, shape (d,) or (batch, *event)
        Codes; beyond one dimension the first counts examples, each with an angle of its own.
    weights : Tensor or sequence of float, shape (count,)
        λ: 0 gives ``first``, 1 gives ``second``.
    method : {"trigonometric", "slerp"}

    Returns
    -------
    Tensor, shape (count, \\*first.shape)

    Raises
    ------
    ValueError
        For codes of different shape, an unknown method, or weights that are no list of finite
        numbers.

    Examples
    --------
    >>> interpolate_latents(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), [0.0, 0.5])
    tensor([[1.0000, 0.0000],
            [0.7071, 0.7071]])
    """
    _check_choice("method", method, _METHODS)
    _check_state(first, "first")
    _check_state(second, "second")
    if first.shape != second.shape:
        raise ValueError(
            "first and second must have the same shape, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    share = torch.as_tensor(weights, device=first.device)
    if share.is_complex() or share.ndim != 1 or not bool(torch.isfinite(share).all()):
        raise ValueError(
            "weights must be a list of finite numbers, "
            f"got {share.dtype} of shape {tuple(share.shape)}"
        )
    share = share.double().reshape(-1, *(1,) * first.ndim)
    if method == "trigonometric":
        of_first, of_second = torch.cos(share * math.pi / 2), torch.sin(share * math.pi / 2)
    else:
        of_first, of_second = _slerp_weights(first, second, share)
    return (of_first * first.double() + of_second * second.double()).to(first.dtype)


def _slerp_weights(first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    dims = tuple(range(min(1, first.ndim - 1), first.ndim))

    def norm(values: Tensor) -> Tensor:
        return values.square().sum(dims, keepdim=True).sqrt()

    one, other = first.double(), second.double()
    # With |u||v ± v|u|| no code has to be divided by its norm, which may be 0.
    scaled, other_scaled = one * norm(other), other * norm(one)
    angle = 2 * torch.atan2(norm(scaled - other_scaled), norm(scaled + other_scaled))
    sine = torch.sin(angle)
    # At angle 0 the formula is 0/0 with the straight line as its limit, at π there is no plane.
    parallel = sine.abs() < 1e-7
    sine = torch.where(parallel, 1.0, sine)
    return (
        torch.where(parallel, 1 - share, torch.sin((1 - share) * angle) / sine),
        torch.where(parallel, share, torch.sin(share * angle) / sine),
    )
