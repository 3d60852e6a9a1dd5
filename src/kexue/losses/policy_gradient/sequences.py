"""Sampled sequences: drawing them, where they end, and how probable they are."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["end_mask", "sample_actions", "sequence_log_probability"]


@torch.no_grad()
def sample_actions(
    logits: Float[Tensor, "*batch vocabulary"],
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "samples ..."]:
    """Draw from the softmax of logits.

    Parameters
    ----------
    logits : Tensor, shape (*batch, vocabulary)
        Minus infinity forbids an action.
    samples : int, optional
        Number of independent draws.
    generator : torch.Generator, optional
        On the device of ``logits``.

    Returns
    -------
    Tensor of int64, shape (samples, *batch)

    Raises
    ------
    ValueError
        For less than one sample, NaN or plus infinity among the logits, or a row with nothing to
        draw.
    TypeError
        For logits that are no floating-point tensor.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]])
    >>> actions = sample_actions(logits, samples=4)
    >>> actions.shape, actions[:, 1].tolist()
    (torch.Size([4, 2]), [2, 2, 2, 2])
    """
    check_logits(logits)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    # Half precision would round small probabilities to zero.
    wide = rows.to(at_least_float32(rows.dtype))
    if not len(rows):
        return torch.empty((samples, *logits.shape[:-1]), dtype=torch.int64, device=logits.device)
    if bool((wide.amax(-1) == -torch.inf).any()):
        raise ValueError("logits must leave something to draw, got a row of minus infinity")
    drawn = torch.multinomial(wide.softmax(-1), samples, replacement=True, generator=generator)
    return drawn.T.reshape(samples, *logits.shape[:-1])


def end_mask(
    actions: Int[Tensor, "*batch length"], end_token: int
) -> Bool[Tensor, "*batch length"]:
    """Mark what belongs to each sequence: all up to the first end token, that one included.

    The end token belongs to the sequence because its probability has to be trained: a model that is
    never rewarded for stopping does not learn to stop.

    Parameters
    ----------
    actions : Tensor of int, shape (*batch, length)
        Tokens.
    end_token : int
        The token after which nothing counts.

    Returns
    -------
    Tensor of bool, shape (*batch, length)

    Raises
    ------
    TypeError
        For actions that are no integers.
    ValueError
        For actions without a length.

    Examples
    --------
    >>> end_mask(torch.tensor([[3, 0, 3, 0], [3, 3, 3, 3]]), end_token=0)
    tensor([[ True,  True, False, False],
            [ True,  True,  True,  True]])
    """
    check_tokens("actions", actions)
    is_end = (actions == end_token).int()
    return is_end.cumsum(-1) - is_end == 0


def sequence_log_probability(
    logits: Float[Tensor, "*batch length vocabulary"],
    actions: Int[Tensor, "..."],
    *,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    r"""Return :math:`\sum_t \log p(y_t)`, differentiable in the logits.

    Parameters
    ----------
    logits : Tensor, shape (*batch, length, vocabulary)
        Scores of the tokens.
    actions : Tensor of int, shape (*samples, *batch, length)
        Tokens. Where they have more dimensions than the logits, several samples share the logits.
    mask : Tensor of bool, shape of actions, optional
        What counts, as from :func:`end_mask`. Neither value nor gradient depends on logits or
        actions elsewhere, whatever stands there.

    Returns
    -------
    Tensor, shape (*samples, *batch)
        In float32 for logits of half precision, which would round the sum away.

    Raises
    ------
    TypeError
        For logits that are no floating-point tensor, actions that are no integers, a mask that is
        not Boolean.
    ValueError
        For shapes that do not belong together, NaN or plus infinity among logits that count, or
        actions outside of the vocabulary.

    Examples
    --------
    >>> sequence_log_probability(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 3]])).exp()
    tensor([0.0156])
    """
    check_tokens("actions", actions)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {_kind(logits)}")
    shape = logits.shape[:-1]
    extra = actions.ndim - len(shape)
    if logits.ndim < 2 or extra < 0 or actions.shape[extra:] != shape:
        raise ValueError(
            "actions must have the shape of logits without the vocabulary, samples may precede: "
            f"got logits of shape {tuple(logits.shape)} and actions of shape {tuple(actions.shape)}"
        )
    samples = math.prod(actions.shape[:extra])
    if mask is not None:
        check_mask(mask, actions)
        # Before the logarithm as well: the gradient of what is masked would be 0 times NaN.
        counted = mask.reshape(samples, *shape).any(0)
        logits = torch.where(counted.unsqueeze(-1), logits, 0.0)
        actions = torch.where(mask, actions, 0)
    check_logits(logits)
    if not torch.compiler.is_compiling() and actions.numel():
        low, high = int(actions.min()), int(actions.max())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"actions must be in 0, …, {logits.shape[-1] - 1}, got {low}, …, {high}"
            )
    # Samples last, so that they share one logarithm and one gradient of the logits' size.
    chosen = actions.reshape(samples, *shape).movedim(0, -1).long()
    log_p = logits.log_softmax(-1, dtype=at_least_float32(logits.dtype))
    each = log_p.gather(-1, chosen).movedim(-1, 0).reshape(actions.shape)
    return (each if mask is None else torch.where(mask, each, 0.0)).sum(-1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {_kind(logits)}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must have the vocabulary as last dimension, got shape {tuple(logits.shape)}"
        )
    # A graph has no values to look at.
    if not torch.compiler.is_compiling() and not bool((logits < torch.inf).all()):
        raise ValueError("logits must be finite or minus infinity, got NaN or infinity among them")


def check_tokens(name: str, tokens: Tensor) -> None:
    is_integer = isinstance(tokens, Tensor) and not (
        tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    )
    if not is_integer:
        raise TypeError(f"{name} must be a tensor of integers, got {_kind(tokens)}")
    if tokens.ndim < 1:
        raise ValueError(f"{name} must have a length as last dimension, got a single token")


def check_mask(mask: Tensor, actions: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a Boolean tensor, got {_kind(mask)}")
    if mask.shape != actions.shape:
        raise ValueError(
            f"mask must have the shape of actions, {tuple(actions.shape)}, got {tuple(mask.shape)}"
        )


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
