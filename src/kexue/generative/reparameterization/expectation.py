r"""Expected costs of categorical variables, whose backward pass is a chosen gradient estimator.

Every estimator returns the cost of each draw. What differs is what its backward pass gives to the
logits; parameters inside the cost function always receive the cost's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.reparameterization.perturbation import (
    Temperature,
    _check_count,
    _check_logits,
    _check_temperature,
    _conditional,
    _gaps,
    _one_hot,
    _perturbed,
    _quotient,
    _straight_through,
)

__all__ = ["categorical_expectation"]

Estimator = Literal[
    "exact",
    "score_function",
    "straight_through",
    "gumbel_softmax",
    "straight_through_gumbel",
    "gumbel_rao",
    "reinmax",
    "rebar",
]
Costs = Callable[[Tensor], Tensor]


def categorical_expectation(
    function: Costs,
    logits: Float[Tensor, "batch variables categories"],
    *,
    estimator: Estimator = "score_function",
    samples: int = 1,
    temperature: float | Tensor = 1.0,
    baseline: Literal["none", "leave_one_out"] | Tensor = "none",
    control_scale: float | Tensor = 1.0,
    conditional_samples: int = 16,
    generator: torch.Generator | None = None,
    max_states: int = 65536,
) -> Float[Tensor, " batch"]:
    r"""Estimate :math:`\mathbb E[f(z)]` of one-hot z, and its gradient in the logits.

    ============================ ======================= ==========================================
    estimator                    bias of the gradient    backward pass
    ============================ ======================= ==========================================
    ``exact``                    none                    sum over all states, no sampling
    ``score_function``           none                    (f(b) - baseline) ∇ log p(b)
    ``rebar``                    none                    the same, with the relaxed cost at z and
                                                         at z given b as control variate
    ``reinmax``                  third order             Heun's rule; none for one variable and a
                                                         quadratic f at temperature 1
    ``straight_through``         first order             Jacobian of softmax(o/τ)
    ``straight_through_gumbel``  falls with τ            Jacobian of softmax((o + G)/τ)
    ``gumbel_rao``               that of the line above  mean of that Jacobian over noise given b
    ``gumbel_softmax``           falls with τ            f itself at softmax((o + G)/τ)
    ============================ ======================= ==========================================

    Parameters
    ----------
    function : callable
        Maps one-hot or relaxed arrays ``(..., batch, variables, categories)`` to costs
        ``(..., batch)``; vectorised over leading dimensions, an example's cost depending on its
        own row. All but ``exact`` and ``score_function`` need it differentiable.
    logits : Tensor
        Logits of independent categorical variables; -inf masks a category.
    estimator : str
        A row of the table.
    samples : int
        Number of draws, averaged.
    temperature : float or Tensor
        τ of the relaxed estimators; a tensor broadcasts against the logits.
    baseline : {"none", "leave_one_out"} or Tensor
        For the score function: nothing, the mean cost of the other draws, or numbers that
        broadcast to ``(samples, batch)``, are taken as constants and must not depend on the draws.
    control_scale : float or Tensor
        η of REBAR, a constant; a tensor broadcasts to ``(samples, batch)``.
    conditional_samples : int
        Number of noises given b of ``gumbel_rao``.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.
    max_states : int
        Most states, ``categories ** variables``, that ``exact`` sums over.

    Returns
    -------
    Tensor
        Mean cost of the drawn states, per example; of relaxed samples for ``gumbel_softmax``, and
        the expectation itself for ``exact``.

    Raises
    ------
    TypeError
        For logits that are not floating-point, or a function that returns no real tensor.
    ValueError
        For an unknown estimator or baseline, logits that are not three-dimensional or hold NaN or
        +inf, a row without a finite logit, costs of another shape, a baseline for an estimator
        without one, ``leave_one_out`` of one sample, a temperature that is not positive, counts
        below 1, or more than ``max_states`` states.

    Examples
    --------
    >>> logits = torch.zeros(1, 2, 3, requires_grad=True)
    >>> matches = lambda z: (z[..., 0, :] * z[..., 1, :]).sum(-1)
    >>> categorical_expectation(matches, logits, estimator="exact")
    tensor([0.3333], grad_fn=<SumBackward1>)
    >>> cost = categorical_expectation(matches, logits, samples=8, baseline="leave_one_out")
    >>> cost.sum().backward()
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(_ESTIMATORS)}, got {estimator!r}")
    working = _check_variables(logits)
    for name, count in (
        ("samples", samples),
        ("conditional_samples", conditional_samples),
        ("max_states", max_states),
    ):
        _check_count(count, name)
    draws = _Draws(
        function,
        working,
        samples,
        _check_temperature(temperature, logits, True),
        conditional_samples,
        max_states,
        generator,
        logits.dtype,
    )
    control = _check_baseline(baseline, estimator, draws)
    if estimator == "exact":
        return _exact(draws)
    if estimator == "score_function":
        return _score_function(draws, control).mean(0)
    if estimator == "rebar":
        return _rebar(draws, _per_draw(control_scale, draws, "control_scale")).mean(0)
    return draws.costs(_RELAXED[estimator](draws)).mean(0)


@dataclass(frozen=True)
class _Draws:
    """What all estimators share: the variables, how to draw them, and what they cost."""

    function: Costs
    logits: Tensor
    samples: int
    temperature: Temperature
    conditional_samples: int
    max_states: int
    generator: torch.Generator | None
    dtype: torch.dtype

    def perturbed(self) -> Tensor:
        """Logits plus noise, (samples, batch, variables, categories)."""
        return _perturbed(
            self.logits.expand(self.samples, *self.logits.shape), None, self.generator
        )

    def states(self, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """The drawn categories, and the same one-hot."""
        index = perturbed.detach().argmax(-1)
        return index, _one_hot(index.unsqueeze(-1), perturbed)

    def relaxed(self, perturbed: Tensor) -> Tensor:
        top = perturbed.detach().amax(-1, keepdim=True)
        return _quotient(perturbed - top, self.temperature).softmax(-1)

    def log_probability(self, index: Tensor) -> Tensor:
        log_p = self.logits.log_softmax(-1).expand(*index.shape, -1)
        return log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)

    def costs(self, states: Tensor) -> Tensor:
        return _costs(self.function, states.to(self.dtype))

    @property
    def unmasked(self) -> Tensor:
        """The logits with 0 for -inf, from which differences may be taken."""
        return self.logits.masked_fill(self.logits.isneginf(), 0.0)


def _exact(draws: _Draws) -> Tensor:
    batch, variables, categories = draws.logits.shape
    count = categories**variables
    if count > draws.max_states:
        raise ValueError(
            f"estimator 'exact' sums over categories ** variables = {count} states, "
            f"more than max_states = {draws.max_states}"
        )
    device = draws.logits.device
    place = categories ** torch.arange(variables, device=device)
    digits = torch.arange(count, device=device)[:, None] // place % categories
    index = digits[:, None, :].expand(count, batch, variables)
    one_hot = _one_hot(index.unsqueeze(-1), draws.logits.new_empty(*index.shape, categories))
    return (draws.log_probability(index).exp() * draws.costs(one_hot)).sum(0)


def _score_function(draws: _Draws, baseline: Tensor | str) -> Tensor:
    index, one_hot = draws.states(draws.perturbed())
    costs = draws.costs(one_hot)
    fixed = costs.detach()
    if isinstance(baseline, Tensor):
        advantage = fixed - baseline
    elif baseline == "leave_one_out":
        # The draw's own cost is left out: a baseline that depends on the draw is biased.
        advantage = fixed - (fixed.sum(0) - fixed) / (draws.samples - 1)
    else:
        advantage = fixed
    return costs + _without_value(advantage, draws.log_probability(index))


def _rebar(draws: _Draws, scale: Tensor) -> Tensor:
    perturbed = draws.perturbed()
    index, one_hot = draws.states(perturbed)
    given = _conditional_draws(draws, index)
    costs = draws.costs(one_hot)
    relaxed, relaxed_given = draws.relaxed(perturbed), draws.relaxed(given)
    _, slope = _value_and_slope(draws, relaxed)
    control, slope_given = _value_and_slope(draws, relaxed_given)
    advantage = costs.detach() - scale * control
    # The control variate's slopes reach the logits only: parameters inside the cost get the
    # gradient of the cost, with no noise added.
    pathwise = (slope * _without_own_value(relaxed)).sum((-2, -1)) - (
        slope_given * _without_own_value(relaxed_given)
    ).sum((-2, -1))
    return costs + _without_value(advantage, draws.log_probability(index)) + scale * pathwise


def _conditional_draws(draws: _Draws, index: Tensor) -> Tensor:
    """Perturbed logits given the drawn categories; they depend on the logits."""
    return _conditional(draws.logits.expand(*index.shape, -1), index, (), draws.generator)


def _straight_through_estimate(draws: _Draws) -> Tensor:
    _, one_hot = draws.states(draws.perturbed())
    return _straight_through(one_hot, draws.relaxed(draws.logits))


def _gumbel_softmax(draws: _Draws) -> Tensor:
    return draws.relaxed(draws.perturbed())


def _straight_through_gumbel(draws: _Draws) -> Tensor:
    perturbed = draws.perturbed()
    _, one_hot = draws.states(perturbed)
    return _straight_through(one_hot, draws.relaxed(perturbed))


def _gumbel_rao(draws: _Draws) -> Tensor:
    index, one_hot = draws.states(draws.perturbed())
    gaps = _gaps(
        draws.logits.expand(*index.shape, -1), index, (draws.conditional_samples,), draws.generator
    )
    # The noise is a constant here; were it to depend on the logits, the mean would be another.
    motion = _without_own_value(draws.unmasked) / draws.temperature
    if isinstance(draws.temperature, Tensor):
        scaled = _quotient(gaps, draws.temperature)
    else:
        scaled = gaps.div_(max(draws.temperature, torch.finfo(gaps.dtype).tiny))
    relaxed = (scaled + motion).softmax(-1)
    return _straight_through(one_hot, relaxed.mean(0))


def _reinmax(draws: _Draws) -> Tensor:
    _, one_hot = draws.states(draws.perturbed())
    unmasked = draws.unmasked
    start = draws.logits.softmax(-1)
    middle = (one_hot + draws.relaxed(draws.logits).detach()) / 2
    end = ((middle.log() - unmasked).detach() + unmasked).softmax(-1)
    return _straight_through(one_hot, 2 * end - start / 2)


_RELAXED: dict[str, Callable[[_Draws], Tensor]] = {
    "straight_through": _straight_through_estimate,
    "gumbel_softmax": _gumbel_softmax,
    "straight_through_gumbel": _straight_through_gumbel,
    "gumbel_rao": _gumbel_rao,
    "reinmax": _reinmax,
}
_ESTIMATORS = ("exact", "score_function", "rebar", *_RELAXED)


def _without_value(weight: Tensor, variable: Tensor) -> Tensor:
    """Zero forward, weight times the variable's gradient backward."""
    return weight * _without_own_value(variable)


def _without_own_value(variable: Tensor) -> Tensor:
    return variable - variable.detach()


def _value_and_slope(draws: _Draws, states: Tensor) -> tuple[Tensor, Tensor]:
    """The cost of relaxed states and its gradient there, both as constants."""
    with torch.enable_grad():
        leaf = states.detach().requires_grad_()
        costs = draws.costs(leaf)
        if not costs.requires_grad:
            return costs, torch.zeros_like(leaf)
        (slope,) = torch.autograd.grad(costs.sum(), leaf, materialize_grads=True)
    return costs.detach(), slope


def _costs(function: Costs, states: Tensor) -> Tensor:
    costs = function(states)
    if not isinstance(costs, Tensor) or not costs.is_floating_point():
        got = costs.dtype if isinstance(costs, Tensor) else type(costs).__name__
        raise TypeError(f"function must return a floating-point tensor of costs, got {got}")
    if costs.shape != states.shape[:-2]:
        raise ValueError(
            f"function must return costs of shape {tuple(states.shape[:-2])} "
            f"for states of shape {tuple(states.shape)}, got {tuple(costs.shape)}"
        )
    return costs


def _check_variables(logits: Tensor) -> Tensor:
    if isinstance(logits, Tensor) and logits.ndim != 3:
        raise ValueError(
            f"logits must have shape (batch, variables, categories), got {tuple(logits.shape)}"
        )
    return _check_logits(logits, None, -1, True)


def _check_baseline(baseline: Tensor | str, estimator: str, draws: _Draws) -> Tensor | str:
    if not isinstance(baseline, Tensor) and baseline not in ("none", "leave_one_out"):
        raise ValueError(f"baseline must be 'none', 'leave_one_out' or a tensor, got {baseline!r}")
    if isinstance(baseline, str) and baseline == "none":
        return baseline
    if estimator != "score_function":
        raise ValueError(f"only estimator 'score_function' has a baseline, not {estimator!r}")
    if isinstance(baseline, Tensor):
        return _per_draw(baseline, draws, "baseline")
    if draws.samples < 2:
        raise ValueError(f"leave_one_out needs samples >= 2, got {draws.samples}")
    return baseline


def _per_draw(value: float | Tensor, draws: _Draws, name: str) -> Tensor:
    """A constant that broadcasts to (samples, batch)."""
    tensor = torch.as_tensor(value, dtype=draws.logits.dtype, device=draws.logits.device).detach()
    target = (draws.samples, len(draws.logits))
    try:
        fits = torch.broadcast_shapes(tensor.shape, target) == target
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to (samples, batch) = {target}, got {tuple(tensor.shape)}"
        )
    return tensor
