"""RELAX's gradient with a learned control variate, and the moments of any gradient estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue._autograd import outside_inference_mode
from kexue.generative.reparameterization.expectation import Costs, _check_variables, _costs
from kexue.generative.reparameterization.perturbation import (
    _check_count,
    _conditional,
    _one_hot,
    _perturbed,
)

__all__ = ["GradientMoments", "RelaxGradient", "gradient_moments", "relax_gradient"]


class RelaxGradient(NamedTuple):
    """One draw's cost, and RELAX's unbiased gradient.

    Attributes
    ----------
    value : Tensor
        Cost of the drawn states, shape ``(batch,)``, with the graph of the function's parameters.
    gradient : Tensor
        Gradient of each example's expected cost in its logits, shape ``(batch, variables,
        categories)``, with a graph to the parameters of the control variate.

    Examples
    --------
    >>> RelaxGradient(torch.zeros(2), torch.zeros(2, 1, 3)).gradient.shape
    torch.Size([2, 1, 3])
    """

    value: Float[Tensor, " batch"]
    gradient: Float[Tensor, "batch variables categories"]


@dataclass(frozen=True)
class GradientMoments:
    """Mean and variance of a stochastic gradient, entry by entry.

    Attributes
    ----------
    mean : Tensor
        Of the estimates, of the parameter's shape, in float64.
    variance : Tensor
        Of one estimate, in the same shape.
    standard_error : Tensor
        Of the mean: sqrt(variance / repeats).
    repeats : int
        Number of estimates.

    Examples
    --------
    >>> parameter = torch.zeros(2, requires_grad=True)
    >>> gradient_moments(lambda: 3 * parameter.sum(), parameter, repeats=5).mean
    tensor([3., 3.], dtype=torch.float64)
    """

    mean: Float[Tensor, "*shape"]
    variance: Float[Tensor, "*shape"]
    standard_error: Float[Tensor, "*shape"]
    repeats: int


@outside_inference_mode
def relax_gradient(
    function: Costs,
    logits: Float[Tensor, "batch variables categories"],
    *,
    control_variate: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> RelaxGradient:
    r"""Estimate a gradient in the logits without bias, for any cost and any control variate c.

    .. math::
        g = [f(b) - c(\tilde z)] \nabla_o \log p(b) + \nabla_o c(z) - \nabla_o c(\tilde z)

    with :math:`z = o + G`, :math:`b` its argmax and :math:`\tilde z` drawn given b. The function
    need not be differentiable. Train c by ``gradient.square().sum().backward()``, which lowers the
    variance; hand the gradient to the logits by ``logits.backward(gradient.detach())``.

    Parameters
    ----------
    function : callable
        Maps one-hot arrays ``(batch, variables, categories)`` to costs ``(batch,)``.
    logits : Tensor
        Logits of independent categorical variables; -inf masks a category, and c sees -inf there.
    control_variate : callable
        Maps perturbed logits ``(batch, variables, categories)`` to ``(batch,)``, differentiably.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.

    Returns
    -------
    RelaxGradient
        ``value`` and ``gradient``.

    Raises
    ------
    TypeError
        For logits that are not floating-point, or functions that return no real tensor.
    ValueError
        For logits that are not three-dimensional or hold NaN or +inf, a row without a finite
        logit, or costs of another shape.

    Examples
    --------
    >>> logits = torch.zeros(4, 2, 3)
    >>> scale = torch.ones((), requires_grad=True)
    >>> control = lambda z: scale * z.softmax(-1)[..., 0].sum(-1)
    >>> estimate = relax_gradient(lambda b: b[..., 0].sum(-1), logits, control_variate=control)
    >>> estimate.gradient.square().sum().backward()
    >>> scale.grad is not None
    True
    """
    working = _check_variables(logits)
    with torch.enable_grad():
        leaf = working.detach().requires_grad_()
        perturbed = _perturbed(leaf, None, generator)
        index = perturbed.detach().argmax(-1)
        given = _conditional(leaf, index, (), generator)
        one_hot = _one_hot(index.unsqueeze(-1), leaf)
        control_given = _costs(control_variate, given)
        difference = _costs(control_variate, perturbed) - control_given
        pathwise = torch.zeros_like(leaf)
        if difference.requires_grad:
            (pathwise,) = torch.autograd.grad(
                difference.sum(), leaf, create_graph=True, materialize_grads=True
            )
    value = _costs(function, one_hot.to(logits.dtype))
    advantage = value.detach() - control_given
    score = one_hot - working.detach().softmax(-1)
    return RelaxGradient(value, advantage[:, None, None] * score + pathwise)


def gradient_moments(
    estimate: Callable[[], Tensor], parameter: Tensor, *, repeats: int
) -> GradientMoments:
    """Measure mean and variance of a stochastic gradient by drawing it again and again.

    Parameters
    ----------
    estimate : callable
        Draws a cost that depends on the parameter; its entries are summed before differentiation.
    parameter : Tensor
        With respect to which the gradient is taken; requires grad, and is left as it is.
    repeats : int
        Number of draws, at least 2.

    Returns
    -------
    GradientMoments
        Moments of one draw's gradient, and the standard error of their mean.

    Raises
    ------
    TypeError
        Where the parameter, or the estimate, is no floating-point tensor.
    ValueError
        For fewer than 2 repeats, a parameter that does not require grad, or an estimate that does
        not depend on it.

    Examples
    --------
    >>> logits = torch.zeros(1, 1, 2, requires_grad=True)
    >>> source = torch.Generator().manual_seed(0)
    >>> def estimate():
    ...     noise = torch.rand(1, 1, 2, generator=source)
    ...     return (noise * logits).sum()
    >>> moments = gradient_moments(estimate, logits, repeats=1000)
    >>> bool((moments.mean - 0.5).abs().max() < 5 * moments.standard_error.max())
    True
    """
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        got = parameter.dtype if isinstance(parameter, Tensor) else type(parameter).__name__
        raise TypeError(f"parameter must be a floating-point tensor, got {got}")
    if not parameter.requires_grad:
        raise ValueError("parameter must require grad, got one that does not")
    _check_count(repeats, "repeats")
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2 for a variance, got {repeats}")
    # Welford: a sum of squares would lose the variance of a gradient with a large mean.
    mean = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
    squares = torch.zeros_like(mean)
    for count in range(1, repeats + 1):
        gradient = _gradient(estimate, parameter)
        deviation = gradient - mean
        mean += deviation / count
        squares += deviation * (gradient - mean)
    variance = squares / (repeats - 1)
    return GradientMoments(mean, variance, (variance / repeats).sqrt(), repeats)


def _gradient(estimate: Callable[[], Tensor], parameter: Tensor) -> Tensor:
    with torch.enable_grad():
        cost = estimate()
        if not isinstance(cost, Tensor) or not cost.is_floating_point():
            got = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
            raise TypeError(f"estimate must return a floating-point tensor, got {got}")
        gradient = None
        if cost.requires_grad:
            (gradient,) = torch.autograd.grad(cost.sum(), parameter, allow_unused=True)
    if gradient is None:
        raise ValueError("estimate must return a cost that depends on the parameter")
    return gradient.double()
