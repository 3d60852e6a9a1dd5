"""Noise, and what it is to second order: the Laplacian of the loss, the gradient of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.training.regularization.arguments import (
    REDUCTIONS,
    Reduction,
    choice,
    count,
    number,
    random_source,
    real_inputs,
    reduced,
    sample_losses,
)
from kexue.training.regularization.divergence import METRICS, Metric, diagonal_form, outputs_of
from kexue.training.regularization.samplewise import (
    at_least_float32,
    differentiable,
    gradients,
    normal,
    pulled_back,
    rows,
    signs,
    squared_norm,
)

__all__ = ["gradient_penalty", "laplacian", "noisy_loss"]


def noisy_loss(
    loss_function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, " batch *features"],
    *,
    standard_deviation: float,
    samples: int = 1,
    antithetic: bool = False,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    r"""Return the loss averaged over Gaussian noise on the inputs.

    Its mean is :math:`l + \frac{s^2}{2} \Delta_x l + O(s^4)`, with the Laplacian of
    :func:`laplacian`.

    Parameters
    ----------
    loss_function : callable
        From inputs to per-sample losses (batch,); it holds model and targets.
    inputs : Tensor, shape (batch, *features)
        Images, tables or embedding outputs.
    standard_deviation : float
        Of each component of the noise, s.
    samples : int
        Draws to average over, one evaluation each.
    antithetic : bool
        Whether to draw in pairs of opposite sign, which removes all odd orders of the noise; then
        ``samples`` is even.
    generator : torch.Generator, optional
        Source of randomness, on the device of the inputs.
    reduction : {"mean", "sum", "none"}
        Over the batch.

    Returns
    -------
    Tensor
        The loss, with the graph that ``loss_function`` gives it.

    Raises
    ------
    ValueError
        Where a number is out of range, ``samples`` is odd with ``antithetic``, or
        ``loss_function`` returns something else than per-sample losses.
    TypeError
        For inputs that are no real floating-point numbers.

    Examples
    --------
    The Laplacian of the squared length in three dimensions is 6, and there is no higher order:

    >>> loss = noisy_loss(lambda x: x.square().sum(1), torch.zeros(1000, 3),
    ...                   standard_deviation=0.5, generator=torch.Generator().manual_seed(0))
    >>> round(loss.item(), 1)  # 0.5² / 2 · 6 = 0.75
    0.8
    """
    inputs = real_inputs(inputs)
    standard_deviation = number("standard_deviation", standard_deviation)
    samples = count("samples", samples)
    choice("reduction", reduction, REDUCTIONS)
    random_source(generator, inputs)
    if antithetic and samples % 2:
        raise ValueError(f"samples must be even with antithetic=True, got {samples}")

    def noisy(noise: Tensor) -> Tensor:
        return sample_losses(loss_function, inputs + noise)

    losses = []
    for _ in range(samples // 2 if antithetic else samples):
        noise = standard_deviation * normal(inputs, generator)
        losses.append(noisy(noise))
        if antithetic:
            losses.append(noisy(-noise))
    return reduced(torch.stack(losses).mean(0), reduction)


def laplacian(
    loss_function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, " batch *features"],
    *,
    estimator: Literal["exact", "hutchinson"] = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> Float[Tensor, " batch"]:
    r"""Return the Laplacian of each sample's loss in its input.

    :math:`\frac{s^2}{2} \Delta_x l` is what noise of standard deviation s adds to a loss. A
    diagnosis rather than a penalty: it may be negative, and a network of ReLUs hides it in its
    kinks, where no derivative finds it.

    Parameters
    ----------
    loss_function : callable
        From inputs to per-sample losses (batch,), twice differentiable.
    inputs : Tensor, shape (batch, *features)
        Where to look.
    estimator : {"exact", "hutchinson"}
        One product with the Hessian for each feature, or for each probe: the mean of
        :math:`v^T H v` over random signs v, exact for a diagonal Hessian.
    probes : int
        Number of random vectors of "hutchinson".
    generator : torch.Generator, optional
        Source of randomness, on the device of the inputs.
    create_graph : bool
        Whether the result can be differentiated, in parameters and inputs.

    Returns
    -------
    Tensor, shape (batch,)
        Trace of each sample's Hessian, at least in float32.

    Raises
    ------
    ValueError
        For an unknown estimator, ``probes`` below 1, or a ``loss_function`` that returns something
        else than per-sample losses or no function of its inputs.
    TypeError
        For inputs that are no real floating-point numbers.

    Examples
    --------
    >>> laplacian(lambda x: x[:, 0] ** 3 + x[:, 1] ** 2, torch.tensor([[2.0, 5.0]]))
    tensor([14.])
    """
    inputs = real_inputs(inputs)
    choice("estimator", estimator, ("exact", "hutchinson"))
    probes = count("probes", probes)
    random_source(generator, inputs)
    create_graph = create_graph and torch.is_grad_enabled()
    with torch.enable_grad():
        x = differentiable(inputs)
        gradient = gradients(sample_losses(loss_function, x), x, create_graph=True)

        def times_hessian(vector: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a loss linear in everything
                return torch.zeros_like(x)
            (product,) = torch.autograd.grad(
                gradient,
                x,
                vector,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            return product

        trace = at_least_float32(torch.zeros_like(rows(x)[:, 0]))
        if estimator == "exact":
            for feature in range(rows(x).shape[1]):
                axis = torch.zeros_like(x, memory_format=torch.contiguous_format)
                rows(axis)[:, feature] = 1
                trace = trace + rows(times_hessian(axis))[:, feature]
        else:
            for _ in range(probes):
                v = signs(x, generator)
                trace = trace + at_least_float32(rows(v * times_hessian(v))).sum(1) / probes
    return trace if create_graph else trace.detach()


def gradient_penalty(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, " batch *features"],
    *,
    metric: Metric = "euclidean",
    estimator: Literal["exact", "rademacher"] = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    r"""Return the gradient penalty G that noise on the inputs amounts to.

    Whatever the metric, :math:`E\, l(f(x + \varepsilon), f(x)) = s^2 G + O(s^4)`: noise of standard
    deviation s is this penalty with coefficient :math:`s^2`.

    - euclidean: :math:`G = \sum_i |\nabla f_i|^2`;
    - categorical: :math:`G = \frac12 \sum_k p_k |\nabla \log p_k|^2`, half the trace of the Fisher
      information of the input;
    - bernoulli: :math:`G = \frac12 \sum_k p_k (1 - p_k) |\nabla z_k|^2`.

    Parameters
    ----------
    function : callable
        From inputs to outputs (batch, outputs), twice differentiable; logits z for "categorical"
        and "bernoulli".
    inputs : Tensor, shape (batch, *features)
        Where to look. If they require a gradient, the result has one in them, too.
    metric : {"euclidean", "categorical", "bernoulli"}
        What makes outputs far apart; see :func:`consistency_loss`.
    estimator : {"exact", "rademacher"}
        One vector-Jacobian product for each output, or for each probe: the mean of
        :math:`|\sum_i \eta_i \sqrt{\lambda_i} \nabla f_i|^2` over random signs
        :math:`\eta`, unbiased in value and gradient, exact for one output.
    probes : int
        Number of random vectors of "rademacher".
    generator : torch.Generator, optional
        Source of randomness, on the device of the inputs.
    create_graph : bool
        Whether the result can be differentiated; False for monitoring.
    reduction : {"mean", "sum", "none"}
        Over the batch.

    Returns
    -------
    Tensor
        G, at least in float32; one a sample with ``reduction="none"``.

    Raises
    ------
    ValueError
        For an unknown name, ``probes`` below 1, and a function whose result has a wrong shape or
        does not depend on its inputs.
    TypeError
        For inputs that are no real floating-point numbers, such as token indices.

    Notes
    -----
    Products for several outputs run one after the other, so without a graph the memory is that of
    one; the graph of the exact penalty holds them all. Attention needs a kernel that can be
    differentiated twice: ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> gradient_penalty(lambda x: x @ weight.T, torch.zeros(5, 2))  # 1 + 4 + 9
    tensor(14.)
    """
    inputs = real_inputs(inputs)
    choice("metric", metric, METRICS)
    choice("estimator", estimator, ("exact", "rademacher"))
    probes = count("probes", probes)
    choice("reduction", reduction, REDUCTIONS)
    random_source(generator, inputs)
    create_graph = create_graph and torch.is_grad_enabled()
    with torch.enable_grad():
        x = differentiable(inputs)
        # The roots of the weights are constants for the derivative in x, where they are cotangents;
        # their own graph carries what they contribute to the derivative in the parameters.
        h, root_weights = diagonal_form(outputs_of(function, x, metric), metric)

        def along(cotangent: Tensor) -> Tensor:
            return squared_norm(pulled_back(h, x, cotangent, create_graph=create_graph))

        if estimator == "exact":
            axes = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
            penalty = torch.stack([along(axis * root_weights) for axis in axes]).sum(0)
        else:
            drawn = [along(signs(h, generator) * root_weights) for _ in range(probes)]
            penalty = torch.stack(drawn).mean(0)
    return reduced(penalty if create_graph else penalty.detach(), reduction)
