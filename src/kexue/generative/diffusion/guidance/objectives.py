"""Objectives to steer by: what a network says about a state, compared with what is asked for.

    log p(y | x_t),    cos(E(x_t), E(y)),    −‖G(x_t) − G(y)‖²

An objective is a function ``(x, time, condition) -> (batch,)``, differentiable in x. Those made
here are modules that hold their network, so that they move between devices with whatever they
guide. The network sees time as denoising networks do: one entry per example. It may work in
another precision than the chain.

Source: https://arxiv.org/abs/2105.05233, https://arxiv.org/abs/2112.05744 (similarity as
objective), https://arxiv.org/abs/1508.06576 (Gram matrices as style).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.network import _per_example
from kexue.generative.diffusion.denoiser.prediction import _check_state

__all__ = ["class_log_probability", "cosine_similarity", "gram_similarity"]

Network = Callable[[Tensor, Tensor], Tensor]


def class_log_probability(classifier: Network, *, sharpness: float = 1.0) -> nn.Module:
    """Return log p(y | x_t) of a classifier as an objective, sharpened if wanted.

    With ``sharpness`` γ it is the logarithm of p^γ/Z, normalised over the classes. That is not
    the same as scaling the gradient by γ: Z(x_t) = Σ_y p^γ(y | x_t) depends on x_t.

    Parameters
    ----------
    classifier : Module or callable
        ``classifier(x, time)`` gives logits of shape (batch, classes); time has shape (batch,).
    sharpness : float
        Positive exponent γ.

    Returns
    -------
    Module
        Called as ``(x, time, condition)``; the condition holds labels, (batch,) integers or one.

    Raises
    ------
    ValueError
        For a sharpness that is not positive; when called, for labels that are missing, no
        integers, of another length or (on the CPU) out of range, and logits of another shape.

    Examples
    --------
    >>> objective = class_log_probability(lambda x, time: torch.stack([x[:, 0], -x[:, 0]], 1))
    >>> objective(torch.zeros(2, 3), 0.5, torch.tensor([0, 1])).exp()
    tensor([0.5000, 0.5000])
    """
    if not (math.isfinite(sharpness) and sharpness > 0):
        raise ValueError(f"sharpness must be positive, got {sharpness}")
    return _Objective(classifier, partial(_log_probability_of_label, sharpness=sharpness))


def cosine_similarity(encoder: Network) -> nn.Module:
    """Return the cosine between the features of a state and a target as an objective.

    The target may come from another encoder of the same space: of text, for example.

    Parameters
    ----------
    encoder : Module or callable
        ``encoder(x, time)`` gives features of shape (batch, features); time has shape (batch,).
        One that has seen noise in training steers better than one that has not.

    Returns
    -------
    Module
        Called as ``(x, time, condition)``; the condition is the target, (1 or batch, features).

    Raises
    ------
    ValueError
        When called, for a target that is missing or of another shape than the features.

    Examples
    --------
    >>> objective = cosine_similarity(lambda x, time: x)
    >>> objective(torch.tensor([[3.0, 4.0]]), 0.5, torch.tensor([[1.0, 0.0]]))
    tensor([0.6000])
    """
    return _Objective(encoder, _cosine)


def gram_similarity(encoder: Network) -> nn.Module:
    """Return minus the squared distance of Gram matrices as an objective: style without place.

    G = F Fᵀ/positions, for features F of shape (channels, positions).

    Parameters
    ----------
    encoder : Module or callable
        ``encoder(x, time)`` gives features of shape (batch, channels, ...); time has shape
        (batch,).

    Returns
    -------
    Module
        Called as ``(x, time, condition)``; the condition holds the features of the target, of
        shape (1 or batch, channels, ...), at any number of positions.

    Raises
    ------
    ValueError
        When called, for a target that is missing or has other channels than the features.

    Examples
    --------
    Order does not matter, only what occurs together:

    >>> objective = gram_similarity(lambda x, time: x)
    >>> x = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    >>> bool(objective(x, 0.5, x.flip(-1)) == 0), objective(x, 0.5, 0 * x)
    (True, tensor([-8.5000]))
    """
    return _Objective(encoder, _minus_gram_distance)


class _Objective(nn.Module):
    """A network, and how its output is compared with the condition."""

    def __init__(self, network: Network, compare: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(
                f"a network must be a function of x and time, got {type(network).__name__}"
            )
        self.network = network
        self.compare = compare

    def forward(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        condition: int | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the value of the objective for every example."""
        _check_state(x)
        if condition is None:
            raise ValueError("condition must be given: it says what to steer to, got None")
        x = _as_seen_by(self.network, x)
        output = self.network(x, _per_example(time, x, 1.0, 0.0))
        return self.compare(output, torch.as_tensor(condition, device=x.device))


def _as_seen_by(network: Network, x: Tensor) -> Tensor:
    """Cast x to the network's precision: a float32 classifier may guide a chain in float16."""
    weights = network.parameters() if isinstance(network, nn.Module) else iter(())
    # A quantised network holds integers beside the parameters that meet x.
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), x.dtype)
    return x.to(dtype)


def _log_probability_of_label(logits: Tensor, labels: Tensor, sharpness: float) -> Tensor:
    if logits.ndim != 2:
        raise ValueError(
            f"a classifier must give logits of shape (batch, classes), got {tuple(logits.shape)}"
        )
    batch, classes = logits.shape
    if labels.is_floating_point() or labels.is_complex() or labels.shape not in ((), (batch,)):
        raise ValueError(
            f"condition must be integer labels of shape ({batch},), or one for all, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    # On an accelerator the look would halt the chain at every step; there the index is checked.
    if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"condition must be labels in [0, {classes - 1}], got {labels.tolist()}")
    log_probability = torch.log_softmax(sharpness * logits, -1)
    return log_probability.gather(1, labels.long().expand(batch).unsqueeze(1)).squeeze(1)


def _cosine(features: Tensor, target: Tensor) -> Tensor:
    if features.ndim != 2 or target.shape not in (features.shape, (1, *features.shape[1:])):
        raise ValueError(
            "condition must be target features of shape (1 or batch, features) for features of "
            f"shape {tuple(features.shape)}, got {tuple(target.shape)}"
        )
    return nn.functional.cosine_similarity(features, target.to(features), -1)


def _minus_gram_distance(features: Tensor, target: Tensor) -> Tensor:
    if (
        features.ndim < 2
        or target.ndim < 2
        or target.shape[1] != features.shape[1]
        or target.shape[0] not in (1, features.shape[0])
    ):
        raise ValueError(
            "condition must be target features of shape (1 or batch, channels, ...) for features "
            f"of shape {tuple(features.shape)}, got {tuple(target.shape)}"
        )
    return -(_gram(features) - _gram(target.to(features))).square().sum((1, 2))


def _gram(features: Tensor) -> Tensor:
    """Return F Fᵀ/positions; a vector of features counts as one position."""
    flat = features.reshape(*features.shape[:2], math.prod(features.shape[2:]))
    return flat @ flat.mT / flat.shape[-1]
