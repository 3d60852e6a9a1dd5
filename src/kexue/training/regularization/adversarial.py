"""The worst perturbation of inputs or weights for a given loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kexue.training.regularization.arguments import (
    choice,
    count,
    mask_of,
    number,
    random_source,
    real_inputs,
    sample_losses,
)
from kexue.training.regularization.samplewise import (
    at_least_float32,
    beside,
    gradients,
    masked,
    normal,
    rows,
    uniform,
    unit,
)

__all__ = ["adversarial_perturbation", "parameter_adversarial_perturbation"]


def adversarial_perturbation(
    loss_function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, " batch *features"],
    *,
    epsilon: float,
    norm: Literal["l2", "linf"] = "l2",
    steps: int = 1,
    step_size: float | None = None,
    random_start: bool = False,
    mask: Bool[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch *features"]:
    r"""Return a perturbation within a ball that raises each sample's loss.

    One step is the fast gradient method: :math:`r = \epsilon g / |g|` ("l2", FGM) or
    :math:`r = \epsilon \operatorname{sign} g` ("linf", FGSM), with :math:`g = \nabla_x l`. To first
    order it adds :math:`\epsilon |g|_2` or :math:`\epsilon |g|_1` to the loss: a gradient penalty
    on the loss. Several steps are projected gradient ascent (PGD).

    Parameters
    ----------
    loss_function : callable
        From inputs to per-sample losses (batch,); it holds model and targets.
    inputs : Tensor, shape (batch, *features)
        Images, tables or embedding outputs.
    epsilon : float
        Radius of the ball, a sample's norm over all of its features.
    norm : {"l2", "linf"}
        Which ball.
    steps : int
        Gradients to follow.
    step_size : float, optional
        Length of a step; ``epsilon`` for one step, else ``2.5 * epsilon / steps``.
    random_start : bool
        Whether to start at a point uniform in the ball rather than at the inputs.
    mask : bool Tensor, broadcastable to inputs, optional
        True where a component may be perturbed. The rest, padding for instance, neither moves nor
        counts in the norm.
    generator : torch.Generator, optional
        Source of randomness, on the device of the inputs.

    Returns
    -------
    Tensor, shape (batch, *features)
        The perturbation, detached. A zero gradient gives zeros. No parameter's ``.grad`` changes.

    Raises
    ------
    ValueError
        For an unknown norm, a number out of range, a mask that does not fit, and a
        ``loss_function`` that returns something else than per-sample losses.
    TypeError
        For inputs that are no real floating-point numbers, and a mask that is not bool.

    Examples
    --------
    >>> loss = lambda x: x @ torch.tensor([3.0, -4.0])
    >>> adversarial_perturbation(loss, torch.zeros(1, 2), epsilon=0.5)
    tensor([[ 0.3000, -0.4000]])
    >>> adversarial_perturbation(loss, torch.zeros(1, 2), epsilon=0.5, norm="linf")
    tensor([[ 0.5000, -0.5000]])
    """
    inputs = real_inputs(inputs)
    epsilon = number("epsilon", epsilon)
    choice("norm", norm, ("l2", "linf"))
    steps = count("steps", steps)
    if step_size is None:
        step_size = epsilon if steps == 1 else 2.5 * epsilon / steps
    step_size = number("step_size", step_size)
    mask = mask_of(mask, inputs)
    random_source(generator, inputs)

    x = inputs.detach()
    perturbation = torch.zeros_like(x)
    if random_start:
        perturbation = masked(_uniform_in_ball(x, epsilon, norm, mask, generator), mask)
    for _ in range(steps):
        with torch.enable_grad():
            moved = (x + perturbation).requires_grad_()
            gradient = gradients(sample_losses(loss_function, moved), moved)
        gradient = masked(gradient, mask)
        ascent = unit(gradient) if norm == "l2" else gradient.sign()
        perturbation = _projected(perturbation + step_size * ascent, epsilon, norm)
    return perturbation


def _projected(perturbation: Tensor, epsilon: float, norm: str) -> Tensor:
    if norm == "linf":
        return perturbation.clamp(-epsilon, epsilon)
    if epsilon == 0:
        return torch.zeros_like(perturbation)
    # In units of the radius, where no square underflows.
    flat = at_least_float32(rows(perturbation))
    relative = flat / max(epsilon, torch.finfo(flat.dtype).tiny)
    shrink = 1 / torch.linalg.vector_norm(relative, dim=1).clamp_min(1)
    return perturbation * beside(shrink.to(perturbation.dtype), perturbation)


def _uniform_in_ball(
    like: Tensor,
    epsilon: float,
    norm: str,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    if norm == "linf":
        return epsilon * (2 * uniform(like, generator) - 1)
    direction = unit(masked(normal(like, generator), mask))
    # The share of the volume within a radius is its power of the dimension that may move.
    share = uniform(rows(like)[:, 0], generator)
    dimension = like.new_full((), rows(like).shape[1]) if mask is None else rows(mask).sum(1)
    radius = epsilon * share ** (1 / dimension.clamp_min(1))
    return beside(radius.to(like.dtype), like) * direction


def parameter_adversarial_perturbation(
    parameters: Iterable[Tensor], *, epsilon: float
) -> list[Tensor]:
    r"""Return the perturbation of weights that raises the loss, from their gradients.

    :math:`\epsilon\, g / |g|` for each tensor, with the gradient g that the last backward pass left
    in ``.grad``. On an embedding matrix alone this is the adversarial training of texts by weights;
    :func:`perturb_parameters` adds it and takes it back.

    Parameters
    ----------
    parameters : iterable of Tensor
        Parameters after a backward pass.
    epsilon : float
        Norm of each tensor's perturbation.

    Returns
    -------
    list of Tensor
        One perturbation a parameter, detached; zeros where the gradient is zero.

    Raises
    ------
    ValueError
        Where a parameter has no gradient, and for a negative or non-finite ``epsilon``.
    TypeError
        Where ``parameters`` is no iterable of tensors of real numbers.

    Examples
    --------
    >>> weight = torch.tensor([3.0, -4.0], requires_grad=True)
    >>> (weight ** 2 / 2).sum().backward()
    >>> parameter_adversarial_perturbation([weight], epsilon=0.5)
    [tensor([ 0.3000, -0.4000])]
    """
    epsilon = number("epsilon", epsilon)
    if isinstance(parameters, Tensor):
        raise TypeError("parameters must be an iterable of tensors, got one tensor")
    perturbations = []
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
            raise TypeError(f"parameter {index} must be a tensor of real floating-point numbers")
        gradient = parameter.grad
        if gradient is None:
            raise ValueError(
                f"every parameter must have a gradient, got None for number {index} of shape "
                f"{tuple(parameter.shape)}: call backward() first, or leave it out"
            )
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        whole = gradient.detach().reshape(1, -1)
        perturbations.append(epsilon * unit(whole).reshape(parameter.shape))
    return perturbations
