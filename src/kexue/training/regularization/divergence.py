r"""Distances of outputs, their curvature, and the consistency of a network with itself.

Each metric is a divergence :math:`l(F, y)` with its minimum at :math:`F = y`, and all that the rest
of the package needs of it is its second derivative :math:`\Lambda` there, in the outputs:

========== ============================== ======================= ==========================
metric     divergence                     :math:`\Lambda`         a diagonal form of G
========== ============================== ======================= ==========================
euclidean  squared distance               2                       outputs, weights 1
categorical KL of softmax distributions   diag p - p pᵀ           log-probabilities, p/2
bernoulli  sum of binary KLs              diag p(1 - p)           logits, p(1 - p)/2
========== ============================== ======================= ==========================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from kexue.training.regularization.arguments import (
    REDUCTIONS,
    Reduction,
    choice,
    real_inputs,
    reduced,
    same_shape,
)
from kexue.training.regularization.samplewise import at_least_float32

__all__ = ["Metric", "consistency_loss"]

Metric: TypeAlias = Literal["euclidean", "categorical", "bernoulli"]

METRICS = ("euclidean", "categorical", "bernoulli")


def consistency_loss(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, " batch *features"],
    perturbation: Float[Tensor, " batch *features"],
    *,
    metric: Metric = "categorical",
    detach_target: bool = True,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    r"""Return how far the outputs move under a perturbation, :math:`l(f(x + r), f(x))`.

    No label occurs: unlabelled samples are as good. Averaged over noise of standard deviation s it
    is :math:`s^2 G + O(s^4)` with the G of :func:`gradient_penalty`.

    Parameters
    ----------
    function : callable
        From inputs to outputs (batch, outputs); a result (batch,) is one output. Logits for
        "categorical" and "bernoulli". It should be deterministic: with other dropout masks in the
        two passes the divergence measures dropout.
    inputs : Tensor, shape (batch, *features)
        Images, tables or embedding outputs.
    perturbation : Tensor, shape (batch, *features)
        What is added to the inputs.
    metric : {"categorical", "euclidean", "bernoulli"}
        Kullback-Leibler divergence of softmax distributions, clean one first; squared distance; sum
        of binary divergences.
    detach_target : bool
        Whether the clean outputs are constants, as in virtual adversarial training. The value is
        the same, the parameters' gradient is not, and the difference is of the order of the
        gradient itself: attached it is that of :math:`s^2 G`, detached it gains
        :math:`s^2 \sum_i \Delta f_i \nabla_\theta f_i`.
    reduction : {"mean", "sum", "none"}
        Over the batch.

    Returns
    -------
    Tensor
        The loss, at least in float32; one a sample with ``reduction="none"``.

    Raises
    ------
    ValueError
        For an unknown name, and where a shape does not fit.
    TypeError
        For inputs that are no real floating-point numbers, such as token indices.

    Examples
    --------
    >>> x, r = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.1, 0.0]])
    >>> consistency_loss(lambda x: 3 * x, x, r, metric="euclidean")
    tensor(0.0900)
    """
    inputs = real_inputs(inputs)
    perturbation = same_shape("perturbation", perturbation, inputs)
    choice("metric", metric, METRICS)
    choice("reduction", reduction, REDUCTIONS)
    target = outputs_of(function, inputs, metric, graph=not detach_target)
    moved = outputs_of(function, inputs + perturbation, metric)
    return reduced(divergence(moved, target, metric), reduction)


def outputs_of(
    function: Callable[[Tensor], Tensor], inputs: Tensor, metric: Metric, *, graph: bool = True
) -> Tensor:
    """Return the function's outputs, (batch, outputs), at least in float32."""
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        outputs = function(inputs)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"function must return a tensor of real outputs, got {kind}")
    if outputs.ndim == 0 or len(outputs) != len(inputs) or 0 in outputs.shape[1:]:
        raise ValueError(
            f"function must return outputs of shape (batch, outputs) with a batch of "
            f"{len(inputs)} and at least one output, got shape {tuple(outputs.shape)}"
        )
    if metric == "categorical" and outputs.ndim > 2:
        raise ValueError(
            "function must return logits of shape (batch, outputs) for the categorical metric, "
            f"got shape {tuple(outputs.shape)}"
        )
    return at_least_float32(outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None])


def divergence(outputs: Tensor, target: Tensor, metric: Metric) -> Tensor:
    """Return each sample's l(outputs, target); the target is the first argument of a KL."""
    if metric == "euclidean":
        return (outputs - target).square().sum(1)
    if metric == "categorical":
        return _relative_entropy(log_softmax(target, 1), log_softmax(outputs, 1))
    ones = _relative_entropy(logsigmoid(target), logsigmoid(outputs))
    return ones + _relative_entropy(logsigmoid(-target), logsigmoid(-outputs))


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    # An impossible class (a logit of -inf) contributes nothing, rather than 0 times NaN.
    log_ratio = torch.where(log_p == -torch.inf, 0, log_p - log_q)
    return (log_p.exp() * log_ratio).sum(1)


def times_curvature(vector: Tensor, outputs: Tensor, metric: Metric) -> Tensor:
    """Multiply a vector of output space by the second derivative of the divergence."""
    if metric == "euclidean":
        return 2 * vector
    if metric == "categorical":
        weighted = outputs.softmax(1) * vector
        return weighted - outputs.softmax(1) * weighted.sum(1, keepdim=True)
    return outputs.sigmoid() * (-outputs).sigmoid() * vector


def diagonal_form(outputs: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return h and the square roots of weights such that G is the sum of weights |grad h|².

    As exponentials of logarithms: a square root has no derivative where a probability is 0.
    """
    if metric == "euclidean":
        return outputs, torch.ones_like(outputs)
    if metric == "categorical":
        log_p = log_softmax(outputs, 1)
        return log_p, (log_p / 2).exp() / 2**0.5
    log_weight = logsigmoid(outputs) + logsigmoid(-outputs)
    return outputs, (log_weight / 2).exp() / 2**0.5
