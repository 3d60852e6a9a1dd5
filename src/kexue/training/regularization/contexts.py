"""Context managers around a forward pass: what is changed inside is exactly as before outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.training.regularization.arguments import number, random_source, same_shape
from kexue.training.regularization.samplewise import normal

__all__ = [
    "freeze_running_statistics",
    "parameter_noise",
    "perturb_output",
    "perturb_parameters",
]


def freeze_running_statistics(module: nn.Module) -> AbstractContextManager[None]:
    """Keep the running statistics of batch and instance normalisation as they are.

    Perturbed samples belong to no data: their mean and variance should not enter the averages that
    are used in evaluation. Layers in training mode go on normalising with the batch's own
    statistics.

    Parameters
    ----------
    module : nn.Module
        Whose layers, at any depth, are concerned.

    Returns
    -------
    context manager
        Running mean, variance and counter are unchanged on its exit.

    Raises
    ------
    TypeError
        For anything else than a module.

    Examples
    --------
    >>> layer = nn.BatchNorm1d(2)
    >>> with freeze_running_statistics(layer):
    ...     output = layer(torch.randn(8, 2) + 5)
    >>> layer.running_mean
    tensor([0., 0.])
    """
    return _frozen(_module(module))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    # The layers write into copies, and the originals are put back. They were never written to, so
    # that no graph which holds them is invalidated.
    kept = [
        (layer, name, buffer)
        for layer in module.modules()
        for name, buffer in layer.named_buffers(recurse=False)
        if name in _RUNNING_STATISTICS
    ]
    try:
        for layer, name, buffer in kept:
            setattr(layer, name, buffer.clone())
        yield
    finally:
        for layer, name, buffer in kept:
            setattr(layer, name, buffer)


_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def perturb_parameters(
    parameters: Iterable[Tensor], perturbations: Iterable[Tensor]
) -> AbstractContextManager[None]:
    """Add perturbations to parameters in place, and restore them bit for bit on exit.

    Forward and backward pass both belong inside: autograd refuses to differentiate with weights
    that were put back since. What is restored is a copy, also after an exception.

    Parameters
    ----------
    parameters : iterable of Tensor
        Parameters, each of its own shape.
    perturbations : iterable of Tensor
        One for each, of the same shape; see :func:`parameter_adversarial_perturbation`.

    Returns
    -------
    context manager
        Within it the parameters are perturbed.

    Raises
    ------
    ValueError
        Where numbers or shapes differ; then nothing is changed.
    TypeError
        Where something is no tensor of real floating-point numbers.

    Examples
    --------
    >>> weight = torch.tensor([0.1, 0.2], requires_grad=True)
    >>> with perturb_parameters([weight], [torch.tensor([1.0, 0.0])]):
    ...     weight.sum().item()
    1.300000...
    >>> weight
    tensor([0.1000, 0.2000], requires_grad=True)
    """
    for name, given in (("parameters", parameters), ("perturbations", perturbations)):
        if isinstance(given, Tensor):
            raise TypeError(f"{name} must be an iterable of tensors, got one tensor")
    parameters, perturbations = list(parameters), list(perturbations)
    if len(parameters) != len(perturbations):
        raise ValueError(
            f"there must be one perturbation for each of the {len(parameters)} parameters, "
            f"got {len(perturbations)}"
        )
    for index, (parameter, perturbation) in enumerate(zip(parameters, perturbations, strict=True)):
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
            raise TypeError(f"parameter {index} must be a tensor of real floating-point numbers")
        if not isinstance(perturbation, Tensor) or not perturbation.is_floating_point():
            raise TypeError(f"perturbation {index} must be a tensor of real floating-point numbers")
        if parameter.shape != perturbation.shape:
            raise ValueError(
                f"perturbation {index} must have its parameter's shape {tuple(parameter.shape)}, "
                f"got {tuple(perturbation.shape)}"
            )
    return _perturbed(parameters, perturbations)


@contextmanager
def _perturbed(parameters: list[Tensor], perturbations: list[Tensor]) -> Iterator[None]:
    # All copies are taken before the first addition: two entries may be one tensor.
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, perturbation in zip(parameters, perturbations, strict=True):
                parameter.add_(perturbation)
        # Autocast keeps casts of parameters, and does not see that they change.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
        torch.clear_autocast_cache()


def parameter_noise(
    module: nn.Module,
    *,
    standard_deviation: float,
    generator: torch.Generator | None = None,
) -> AbstractContextManager[None]:
    """Add Gaussian noise to a module's trainable parameters, and restore them bit for bit on exit.

    Parameters
    ----------
    module : nn.Module
        Its parameters that require a gradient are perturbed.
    standard_deviation : float
        Of each component of the noise.
    generator : torch.Generator, optional
        Source of randomness, on the device of the parameters.

    Returns
    -------
    context manager
        Within it the parameters are noisy; see :func:`perturb_parameters`.

    Raises
    ------
    ValueError
        For a negative or non-finite ``standard_deviation``, or a generator on another device.
    TypeError
        Where ``module`` is none.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> before = layer.weight.detach().clone()
    >>> with parameter_noise(layer, standard_deviation=0.1):
    ...     bool((layer.weight == before).any())
    False
    >>> bool((layer.weight == before).all())
    True
    """
    standard_deviation = number("standard_deviation", standard_deviation)
    parameters = [p for p in _module(module).parameters() if p.requires_grad]
    for parameter in parameters:
        random_source(generator, parameter)
    noise = [standard_deviation * normal(parameter, generator) for parameter in parameters]
    return perturb_parameters(parameters, noise)


def perturb_output(
    module: nn.Module, perturbation: Float[Tensor, "..."]
) -> AbstractContextManager[None]:
    """Add a perturbation to what a module returns, an embedding layer for instance.

    For a model whose embeddings cannot be reached otherwise: its forward pass takes tokens as ever.

    Parameters
    ----------
    module : nn.Module
        A layer that returns one tensor.
    perturbation : Tensor
        Of the shape of the layer's output.

    Returns
    -------
    context manager
        Within it each call's output is perturbed.

    Raises
    ------
    ValueError
        Where, in a call, the output has another shape.
    TypeError
        Where ``module`` is none, or returns something else than a tensor.

    Examples
    --------
    >>> embedding = nn.Embedding.from_pretrained(torch.eye(3))
    >>> with perturb_output(embedding, torch.full((1, 3), 0.5)):
    ...     embedding(torch.tensor([2]))
    tensor([[0.5000, 0.5000, 1.5000]])
    >>> embedding(torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """
    if not isinstance(perturbation, Tensor):
        raise TypeError(f"perturbation must be a tensor, got {type(perturbation).__name__}")
    return _with_output(_module(module), perturbation)


@contextmanager
def _with_output(module: nn.Module, perturbation: Tensor) -> Iterator[None]:
    def add(layer: nn.Module, arguments: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"the module must return one tensor, got {type(output).__name__}")
        return output + same_shape("perturbation", perturbation, output)

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _module(module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    return module
