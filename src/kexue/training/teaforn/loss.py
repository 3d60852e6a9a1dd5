"""The loss: as many passes as steps to predict, each on the output of the one before.

Source: https://arxiv.org/abs/2010.03494; Su Jianlin's article for the layout that is the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kexue.training.teaforn.approximation import (
    Approximation,
    _approximate,
    _at_least_one,
    _check_approximation,
    _check_floating,
    _check_vocabulary,
    _single_precision,
)

__all__ = ["TeaForNOutput", "step_weights", "teaforn_loss"]

Layout: TypeAlias = Literal["prepend_start", "stacked"]
TensorMap: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TeaForNOutput:
    """What :func:`teaforn_loss` returns.

    Attributes
    ----------
    loss : Tensor, shape ()
        Sum of the step losses times their weights, differentiable.
    step_losses : Tensor, shape (n_grams,)
        Mean cross entropy of each pass, without weights, detached.
    logits : Tensor, shape (batch, length, vocabulary)
        Of the first pass, which is the model as it decodes.
    hidden : tuple of Tensor, each of shape (batch, length, dim)
        Output vectors of the decoder, one for each pass.

    Examples
    --------
    >>> out = TeaForNOutput(torch.tensor(1.5), torch.ones(2), torch.ones(1, 3, 5), ())
    >>> out.loss
    tensor(1.5000)
    """

    loss: Float[Tensor, ""]
    step_losses: Float[Tensor, " n_grams"]
    logits: Float[Tensor, "batch length vocabulary"]
    hidden: tuple[Float[Tensor, "batch length features"], ...]


def teaforn_loss(
    decoder: TensorMap | Sequence[TensorMap],
    output_projection: TensorMap,
    embeddings: Float[Tensor, "batch length dim"],
    targets: Integer[Tensor, "batch length"],
    *,
    embedding: nn.Embedding | Float[Tensor, "vocabulary dim"] | None = None,
    n_grams: int = 2,
    discount: float | Sequence[float] = 0.5,
    approximation: Approximation = "hidden",
    top_k: int = 4,
    temperature: float = 1.0,
    embedding_scale: float = 1.0,
    layout: Layout = "prepend_start",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backpropagate_through_steps: bool = True,
    activation_checkpointing: bool = False,
    generator: torch.Generator | None = None,
) -> TeaForNOutput:
    r"""Return the loss of a decoder that predicts several steps from its own outputs.

    N passes cost N times the time and the activations of teacher forcing. The loss is not divided
    by the number of passes or the sum of the weights: the first pass keeps its usual gradient.

    Parameters
    ----------
    decoder : callable, or sequence of n_grams callables
        The causal body: (batch, length, dim) to (batch, length, features). One for all passes, or
        one for each. It adds positions itself, in every pass; all else that it needs (encoder
        memory, masks, ``use_cache=False``) is bound by a closure or ``functools.partial``.
    output_projection : callable
        Output vectors to logits (batch, length, vocabulary).
    embeddings : Tensor, shape (batch, length, dim)
        What the body normally receives for :math:`w_0 \ldots w_{L-1}`, scaled if the model scales.
    targets : Tensor, shape (batch, length)
        :math:`w_1 \ldots w_L`.
    embedding : nn.Embedding or Tensor of shape (vocabulary, dim), optional
        The table in which all approximations but ``"hidden"`` look vectors up.
    n_grams : int
        Number of passes N, at least 1.
    discount : float or sequence of n_grams floats
        Weights of the passes, see :func:`step_weights`. With 0 the loss and its gradient are those
        of teacher forcing.
    approximation : {"hidden", "expectation", "top_k", "hard", "gumbel"}
        How an output vector becomes an input vector, see :func:`soft_embedding`. ``"hidden"`` needs
        equal widths and costs nothing; ``"expectation"``, ``"hard"`` and ``"gumbel"`` keep
        probabilities (batch, length, vocabulary) for each pass beside the logits.
    top_k, temperature, embedding_scale
        See :func:`soft_embedding`.
    layout : {"prepend_start", "stacked"}
        ``"prepend_start"``: every pass begins with :math:`e_0`, so that positions and targets are
        those of decoding. ``"stacked"``, as in the paper: pass i reads the outputs of pass i - 1
        where they stand, and is asked for :math:`w_i, w_{i+1}, \ldots`; targets past the end are
        ignored.
    ignore_index : int
        Targets with this value do not count; the mean of each pass is over the others. Pad at the
        end: a causal body then keeps padding out of all positions that count. Without any target
        the loss is 0, with zero gradient.
    label_smoothing : float
        As in ``torch.nn.functional.cross_entropy``.
    backpropagate_through_steps : bool
        False cuts the gradient between passes, which is scheduled sampling, parallel and soft.
    activation_checkpointing : bool
        Run each pass again in the backward pass instead of keeping its activations and logits. What
        ``approximation`` keeps is kept all the same.
    generator : torch.Generator, optional
        Source of the noise of ``"gumbel"``. ``torch.compile`` takes no generator; without one the
        whole loss is a single graph.

    Returns
    -------
    TeaForNOutput
        Loss, step losses, logits of the first pass, output vectors of all passes. The losses are
        float32 where the logits are in half precision, as under autocast.

    Raises
    ------
    ValueError
        For options outside their range, shapes that do not go together, another number of decoders
        than ``n_grams``, an approximation without the table that it needs, or one whose vectors do
        not have the width of ``embeddings``.
    TypeError
        For embeddings that are not floating, targets that are not integers, an ``embedding`` that
        is neither a module nor a tensor.

    Examples
    --------
    A model of one's own, whose body takes embeddings:

    >>> from kexue.models.transformer import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=20, dim=16, num_layers=1))
    >>> tokens = torch.randint(20, (2, 9))
    >>> out = teaforn_loss(
    ...     lambda e: model(inputs_embeds=e, return_hidden=True),
    ...     lambda h: h @ model.token_embeddings.weight.T,
    ...     model.token_embeddings(tokens[:, :-1]),
    ...     tokens[:, 1:],
    ... )
    >>> out.logits.shape
    torch.Size([2, 8, 20])
    """
    weights = step_weights(n_grams, discount)
    decoders = _decoders(decoder, len(weights))
    _check_sequences(embeddings, targets)
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    table = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
    _check_approximation(approximation, top_k, temperature, embedding_scale, table)

    def one_pass(decode: TensorMap, inputs: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        hidden = _of_every_position("decoder", decode(inputs), wanted)
        logits = _of_every_position("output_projection", output_projection(hidden), wanted)
        return hidden, logits, _cross_entropy(logits, wanted, ignore_index, label_smoothing)

    run = (
        partial(checkpoint, one_pass, use_reentrant=False) if activation_checkpointing else one_pass
    )
    hidden, logits, step_loss = run(decoders[0], embeddings, targets)
    first_logits, vectors, step_losses = logits, [hidden], [step_loss]
    for step in range(1, len(weights)):
        if table is not None and approximation != "hidden":
            _check_vocabulary(logits, table)
        fed = _approximate(
            hidden, logits, table, approximation, top_k, temperature, embedding_scale, generator
        )
        if fed.shape[-1] != embeddings.shape[-1]:
            raise ValueError(
                f"approximation {approximation!r} gives vectors of {fed.shape[-1]} features and "
                f"embeddings have {embeddings.shape[-1]}: use another approximation, or add a "
                "projection"
            )
        fed = fed.to(embeddings.dtype)
        if not backpropagate_through_steps:
            fed = fed.detach()
        if layout == "prepend_start":
            inputs, wanted = torch.cat([embeddings[:, :1], fed[:, :-1]], 1), targets
        else:
            inputs, wanted = fed, _shifted(targets, step, ignore_index)
        hidden, logits, step_loss = run(decoders[step], inputs, wanted)
        vectors.append(hidden)
        step_losses.append(step_loss)

    # A weight of zero leaves its pass out, rather than multiplying what may have overflowed by it.
    later = [w * loss for w, loss in zip(weights[1:], step_losses[1:], strict=True) if w]
    loss = torch.stack([weights[0] * step_losses[0], *later]).sum()
    return TeaForNOutput(loss, torch.stack(step_losses).detach(), first_logits, tuple(vectors))


def step_weights(n_grams: int, discount: float | Sequence[float]) -> list[float]:
    r"""Return the weights :math:`\lambda_1 \ldots \lambda_N` of the passes.

    Parameters
    ----------
    n_grams : int
        Number of passes N, at least 1.
    discount : float or sequence of n_grams floats
        A number d in [0, 1] stands for :math:`1, d, d^2, \ldots`; a sequence of non-negative
        numbers is used as it is.

    Returns
    -------
    list of float
        One weight for each pass.

    Raises
    ------
    ValueError
        For ``n_grams`` below 1 or no integer, a ``discount`` outside [0, 1], a sequence of another
        length or with negative entries.
    TypeError
        For a ``discount`` that is neither a number nor numbers.

    Examples
    --------
    >>> step_weights(3, 0.5)
    [1.0, 0.5, 0.25]
    >>> step_weights(2, [0.3, 0.7])
    [0.3, 0.7]
    """
    n_grams = _at_least_one("n_grams", n_grams)
    if isinstance(discount, int | float):
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {discount}")
        return [float(discount) ** step for step in range(n_grams)]
    try:
        weights = [float(weight) for weight in discount]
    except (TypeError, ValueError):
        raise TypeError(f"discount must be a number or numbers, got {discount!r}") from None
    if len(weights) != n_grams:
        raise ValueError(
            f"discount must be a number or {n_grams} weights, one for each pass, "
            f"got {len(weights)} weights"
        )
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"the weights in discount must be finite and not negative, got {weights}")
    return weights


def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Mean over the targets that count; 0 rather than NaN where there are none."""
    total = nn.functional.cross_entropy(
        _single_precision(logits).flatten(0, 1),
        targets.flatten().long(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (targets != ignore_index).sum().clamp(min=1)


def _shifted(targets: Tensor, steps: int, ignore_index: int) -> Tensor:
    """What lies ``steps`` further on, with nothing to predict past the end."""
    past = min(steps, targets.shape[1])
    return nn.functional.pad(targets[:, past:].long(), (0, past), value=ignore_index)


def _of_every_position(name: str, result: Any, targets: Tensor) -> Tensor:
    batch, length = targets.shape
    if not isinstance(result, Tensor):
        raise ValueError(
            f"{name} must return a tensor of shape ({batch}, {length}, features), "
            f"got {type(result).__name__}"
        )
    if result.ndim != 3 or result.shape[:2] != targets.shape:
        raise ValueError(
            f"{name} must return shape ({batch}, {length}, features), got {tuple(result.shape)}"
        )
    return result


def _decoders(decoder: Any, n_grams: int) -> list[TensorMap]:
    if not isinstance(decoder, Sequence | nn.ModuleList):
        decoder = [decoder] * n_grams
    if len(decoder) != n_grams:
        raise ValueError(
            f"decoder must be one callable or {n_grams}, one for each of n_grams passes, "
            f"got {len(decoder)}"
        )
    for one in decoder:
        if not callable(one):
            raise TypeError(f"decoder must be callable, got {type(one).__name__}")
    return list(decoder)


def _check_sequences(embeddings: Tensor, targets: Tensor) -> None:
    _check_floating("embeddings", embeddings)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if embeddings.ndim != 3 or targets.ndim != 2 or embeddings.shape[:2] != targets.shape:
        raise ValueError(
            "embeddings and targets must have shapes (batch, length, dim) and (batch, length), "
            f"got {tuple(embeddings.shape)} and {tuple(targets.shape)}"
        )
