"""The gradient of a smoothed function, estimated from values of the function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.optim.zeroth_order.directions import DISTRIBUTIONS, fill_with_signs_

__all__ = ["ZerothOrderEstimate", "zeroth_order_gradient"]

BASELINES = ("none", "current", "leave_one_out", "optimal")


class ZerothOrderEstimate(NamedTuple):
    r"""A zeroth-order gradient and how far it can be trusted.

    Parameters
    ----------
    gradient : Tensor
        Estimate of :math:`\nabla f_\varepsilon(x)`, of the shape of x.
    standard_error : Tensor
        Of each entry of the gradient; NaN for one sample, which does not say.
    value : Tensor, 0-dim
        Mean of f over the perturbed points: an unbiased estimate of :math:`f_\varepsilon(x)`. In
        float32 for half inputs.

    Examples
    --------
    >>> estimate = zeroth_order_gradient(lambda x: x.sum(-1), torch.zeros(2), epsilon=0.1)
    >>> estimate.gradient.shape, bool(estimate.standard_error.isnan().all())
    (torch.Size([2]), True)
    """

    gradient: Tensor
    standard_error: Tensor
    value: Tensor


@torch.no_grad()
def zeroth_order_gradient(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "*shape"],
    *,
    epsilon: float,
    samples: int = 1,
    antithetic: bool = True,
    baseline: Literal["none", "current", "leave_one_out", "optimal"] = "current",
    distribution: Literal["normal", "rademacher", "sphere"] = "normal",
    generator: torch.Generator | None = None,
) -> ZerothOrderEstimate:
    r"""Estimate the gradient of a function that can only be evaluated.

    .. math::
        g_j = \frac{f(x + \varepsilon u_j) - f(x - \varepsilon u_j)}{2\varepsilon} \, u_j
        \quad\text{or}\quad
        g_j = \frac{f(x + \varepsilon u_j) - b_j}{\varepsilon} \, u_j

    averaged over the samples. The mean is the gradient of
    :math:`f_\varepsilon(x) = \mathbb{E} f(x + \varepsilon u)` for normal u and any f, and the
    gradient of f itself for quadratic f and any of the distributions. For linear f in d dimensions
    with gradient a the trace of the covariance of one sample is :math:`(d + 1) |a|^2` for normal
    directions and :math:`(d - 1) |a|^2` for the others.

    Parameters
    ----------
    function : callable
        Vectorised: takes ``(n, *shape)``, returns ``(n,)``. It is called without gradients: once
        with all samples, for antithetic pairs twice, for the baseline "current" once more with
        n = 1.
    inputs : Tensor, shape (*shape)
        The point x. Directions are drawn in float64 where it is float64, in float32 otherwise.
    epsilon : float
        Standard deviation of the perturbation.
    samples : int, optional
        Number of directions.
    antithetic : bool, optional
        Evaluate at both ends of each direction. All even terms of f cancel, and no baseline is
        used.
    baseline : {"current", "leave_one_out", "optimal", "none"}, optional
        b of the one-sided form: f(x); the mean of the other samples; their mean weighted by
        :math:`|u|^2`, which estimates the baseline of least variance; 0. None of them changes the
        mean of the estimate.
    distribution : {"normal", "rademacher", "sphere"}, optional
        Of the directions: independent normal numbers, random signs, or the sphere of radius
        :math:`\sqrt d`.
    generator : torch.Generator, optional
        Source of the directions, on the device of ``inputs``; torch's global one by default.

    Returns
    -------
    ZerothOrderEstimate
        The standard error takes samples for independent; those that share a baseline nearly are.

    Raises
    ------
    ValueError
        For an epsilon that is not positive and finite, less than one sample, another baseline or
        distribution, a baseline from other samples where there is one sample only, inputs or
        function values that are not finite, or function values of another shape.
    TypeError
        For inputs that are no floating-point tensor.

    Examples
    --------
    The gradient of a step, smoothed over half a unit, at 0.3 (exactly 0.6664):

    >>> step = lambda x: (x > 0).double().squeeze(-1)
    >>> x = torch.tensor([0.3], dtype=torch.float64)
    >>> estimate = zeroth_order_gradient(
    ...     step, x, epsilon=0.5, samples=10_000, generator=torch.Generator().manual_seed(0)
    ... )
    >>> bool((estimate.gradient - 0.666449).abs() < 4 * estimate.standard_error)
    True
    """
    _check(inputs, epsilon, samples, antithetic, baseline, distribution)
    u = _draw(inputs, samples, distribution, generator)
    x = inputs.detach()
    ahead = _values(function, x + (epsilon * u).to(x.dtype))
    if antithetic:
        behind = _values(function, x - (epsilon * u).to(x.dtype))
        quotients = (ahead - behind) / (2 * epsilon)
        value = (ahead.mean() + behind.mean()) / 2
    else:
        quotients = (ahead - _baseline(baseline, function, x, ahead, u)) / epsilon
        value = ahead.mean()

    each = quotients.to(u.dtype).view(-1, *[1] * x.ndim) * u
    gradient = each.mean(0)
    if samples == 1:
        error = torch.full_like(gradient, math.nan)
    else:
        error = each.std(0) / math.sqrt(samples)
    return ZerothOrderEstimate(gradient.to(x.dtype), error.to(x.dtype), value.to(u.dtype))


def _baseline(
    kind: str, function: Callable[[Tensor], Tensor], x: Tensor, values: Tensor, u: Tensor
) -> Tensor | float:
    """b for each sample; never of the sample's own value, which would shrink the gradient."""
    if kind == "none":
        return 0.0
    if kind == "current":
        return _values(function, x.unsqueeze(0))
    weights = torch.ones_like(values)
    if kind == "optimal":
        weights = u.view(len(u), x.numel()).double().square().sum(1)
    return _means_of_others(values, weights)


def _means_of_others(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over all samples but each one, in the order of the samples."""
    # About a common point, so that a large level of the function costs no digits.
    level = values.mean()
    parts = weights * (values - level)
    others = weights.sum() - weights
    # No entry, hence no direction: any baseline will do.
    return level + (parts.sum() - parts) / torch.where(others > 0, others, 1.0)


def _values(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    values = function(points)
    expected = (len(points),)
    if not isinstance(values, Tensor) or tuple(values.shape) != expected:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            "function must map (samples, *shape) to a tensor of shape (samples,), here "
            f"{expected}, got {got}"
        )
    if values.is_complex():
        raise TypeError("function must return real numbers, got complex ones")
    values = values.detach().double()
    if not bool(values.isfinite().all()):
        raise ValueError("function must return finite values, got non-finite ones")
    return values


def _draw(
    inputs: Tensor, samples: int, distribution: str, generator: torch.Generator | None
) -> Tensor:
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    u = torch.empty((samples, *inputs.shape), dtype=dtype, device=inputs.device)
    if distribution == "rademacher":
        words = torch.empty(-(-u.numel() // 64) * 64, dtype=dtype, device=inputs.device)
        return fill_with_signs_(words, generator)[: u.numel()].view_as(u)
    u.normal_(generator=generator)
    if distribution == "sphere":
        flat = u.view(samples, inputs.numel())
        flat.mul_(math.sqrt(inputs.numel()) / torch.linalg.vector_norm(flat, dim=1, keepdim=True))
    return u


def _check(
    inputs: Tensor,
    epsilon: float,
    samples: int,
    antithetic: bool,
    baseline: str,
    distribution: str,
) -> None:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {got}")
    if not bool(inputs.isfinite().all()):
        raise ValueError("inputs must be finite, got NaN or infinity among them")
    check_epsilon(epsilon)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    check_choice("baseline", baseline, BASELINES)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if not antithetic:
        check_baseline_has_others(baseline, samples, "samples")


def check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_baseline_has_others(baseline: str, samples: int, name: str) -> None:
    if baseline in ("leave_one_out", "optimal") and samples < 2:
        raise ValueError(
            f"baseline {baseline!r} comes from the other samples: without antithetic pairs it "
            f"needs at least two {name}, got {samples}"
        )
