r"""TeaForN: teacher forcing with n-grams, for decoders that look further than the next token.

A decoder is an embedding :math:`e_t = E(w_t)`, a causal body M and a projection to logits. It reads
:math:`w_0 \ldots w_{L-1}` and is asked for :math:`w_1 \ldots w_L`. Teacher forcing runs it once;
here it runs N times over the whole sequence, each time on what the pass before gave:

.. math::
    h^1 = M(e_0, e_1, \ldots, e_{L-1}), \qquad
    h^i = M(e_0, \varphi(h^{i-1}_1), \ldots, \varphi(h^{i-1}_{L-1})), \qquad
    \mathcal L = \sum_{i=1}^N \lambda_i \operatorname{mean}_t \bigl(-\log p^i_t[w_t]\bigr).

:math:`h^i_t` has seen the true tokens up to :math:`w_{t-i}` only, so that one vector must carry
what i predictions need. N = 1 is teacher forcing; from N = L on, the last pass is the roll-out that
feeds :math:`\varphi(h)` back step by step. Decoding remains what it was.

References
----------
Goodman, Ding and Soricut, "TeaForN: Teacher-Forcing with N-grams", arXiv 2010.03494. Su Jianlin,
"TeaForN：让Teacher Forcing更有“远见”一些", whose layout is the default here.

Examples
--------
>>> embedding, gru, head = nn.Embedding(10, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 10)
>>> tokens = torch.randint(10, (4, 7))
>>> out = teaforn_loss(
...     lambda e: gru(e)[0], head, embedding(tokens[:, :-1]), tokens[:, 1:], n_grams=3
... )
>>> out.step_losses.shape
torch.Size([3])
>>> out.loss.backward()
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["TeaForNOutput", "causal_lm_parts", "soft_embedding", "step_weights", "teaforn_loss"]

Approximation: TypeAlias = Literal["hidden", "expectation", "top_k", "hard", "gumbel"]
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
    targets: Int[Tensor, "batch length"],
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


def soft_embedding(
    hidden: Float[Tensor, "*batch features"],
    logits: Float[Tensor, "*batch vocabulary"],
    embedding_weight: Float[Tensor, "vocabulary dim"] | None,
    *,
    approximation: Approximation = "hidden",
    top_k: int = 4,
    temperature: float = 1.0,
    embedding_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch width"]:
    r"""Return input vectors that stand for the tokens that output vectors predict.

    With :math:`p = \operatorname{softmax}(z/\tau)` of the logits z and embeddings :math:`e_w`:

    - ``"hidden"``: the output vector itself; nothing makes it resemble an embedding, but a body
      that is trained on it learns to accept it;
    - ``"expectation"``: :math:`\sum_w p_w e_w`;
    - ``"top_k"``: the same over the k most probable tokens, divided by their probability;
    - ``"hard"``: :math:`e_w` of the most probable token, with the gradient of ``"expectation"``;
    - ``"gumbel"``: ``"expectation"`` with logits to which Gumbel noise was added.

    Parameters
    ----------
    hidden : Tensor, shape (..., features)
        Output vectors of a decoder.
    logits : Tensor, shape (..., vocabulary)
        Its predictions.
    embedding_weight : Tensor, shape (vocabulary, dim), or None
        Embeddings of all tokens; ``"hidden"`` does without.
    approximation : {"hidden", "expectation", "top_k", "hard", "gumbel"}
        One of the five above.
    top_k : int
        Tokens that ``"top_k"`` looks at, between 1 and the size of the vocabulary.
    temperature : float
        τ, above 0: towards 0 all but ``"hidden"`` become a choice of one token.
    embedding_scale : float
        Factor that the model applies to a vector from the table, such as the root of its width.
    generator : torch.Generator, optional
        Source of the noise of ``"gumbel"``.

    Returns
    -------
    Tensor, shape (..., dim)
        One vector for each position; of width ``features`` for ``"hidden"``.

    Raises
    ------
    ValueError
        For an unknown approximation, ``top_k`` or ``temperature`` outside their range, no table
        where one is needed, shapes that do not go together.
    TypeError
        For tensors that are not floating.

    Examples
    --------
    >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0]])
    >>> logits = torch.tensor([[0.0, 0.0, -9.0]])
    >>> soft_embedding(torch.zeros(1, 5), logits, table, approximation="top_k", top_k=2)
    tensor([[0.5000, 0.5000]])
    """
    for name, tensor in (("hidden", hidden), ("logits", logits)):
        _check_floating(name, tensor)
    if logits.ndim < 1 or hidden.ndim < 1 or logits.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "hidden and logits must have shapes (..., features) and (..., vocabulary) with equal "
            f"leading dimensions, got {tuple(hidden.shape)} and {tuple(logits.shape)}"
        )
    _check_approximation(approximation, top_k, temperature, embedding_scale, embedding_weight)
    if embedding_weight is not None:
        _check_vocabulary(logits, embedding_weight)
    return _approximate(
        hidden, logits, embedding_weight, approximation, top_k, temperature, embedding_scale,
        generator,
    )  # fmt: skip


def causal_lm_parts(model: Any) -> tuple[TensorMap, TensorMap, nn.Embedding]:
    """Return decoder, output projection and embedding of a Hugging Face causal language model.

    The decoder is the model's ``base_model``, called with ``inputs_embeds`` and without a cache.
    Models that do more between the last hidden state and their logits than one linear map (the
    soft cap of Gemma 2, the scale of Cohere and Granite, the transform in the head of BERT) need
    that around ``output_projection``: compare ``logits`` with the model's own, once.

    Parameters
    ----------
    model : object
        Anything with ``base_model``, which takes ``inputs_embeds`` and returns something with
        ``last_hidden_state``, ``get_output_embeddings()`` and ``get_input_embeddings()``.

    Returns
    -------
    decoder : callable
        Embeddings to the last hidden state.
    output_projection : callable
        The last hidden state to logits.
    embedding : nn.Embedding
        Call it for the ``embeddings`` of :func:`teaforn_loss`.

    Raises
    ------
    TypeError
        For a model without one of these.

    Examples
    --------
    With ``model = transformers.AutoModelForCausalLM.from_pretrained("gpt2")``:

    >>> decoder, output_projection, embedding = causal_lm_parts(model)  # doctest: +SKIP
    >>> out = teaforn_loss(
    ...     decoder, output_projection, embedding(tokens[:, :-1]), tokens[:, 1:]
    ... )  # doctest: +SKIP
    """
    body = getattr(model, "base_model", None)
    if not callable(body):
        raise TypeError(f"{type(model).__name__} has no base_model to call with inputs_embeds")
    embedding, projection = (_part(model, end) for end in ("input", "output"))
    taken = inspect.signature(getattr(body, "forward", body)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if "inputs_embeds" not in taken and not open_ended:
        raise TypeError(f"{type(body).__name__}, the base_model, does not take inputs_embeds")
    options = {"use_cache": False, "return_dict": True}
    options = {name: value for name, value in options.items() if name in taken or open_ended}

    def decoder(embeddings: Tensor) -> Tensor:
        output = body(inputs_embeds=embeddings, **options)
        if not hasattr(output, "last_hidden_state"):
            raise TypeError(
                f"the base_model must return a last_hidden_state, got {type(output).__name__}"
            )
        return output.last_hidden_state

    return decoder, projection, embedding


def _part(model: Any, end: str) -> Any:
    get = getattr(model, f"get_{end}_embeddings", None)
    part = get() if callable(get) else None
    if part is None:
        raise TypeError(f"{type(model).__name__} has no get_{end}_embeddings(), or it gives None")
    return part


def _approximate(
    hidden: Tensor,
    logits: Tensor,
    table: Tensor | None,
    approximation: str,
    top_k: int,
    temperature: float,
    scale: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The map φ of `soft_embedding`, whose input was checked."""
    if table is None or approximation == "hidden":
        return hidden
    if approximation == "top_k" and top_k < len(table):
        return scale * _top_k_mean(logits, table, top_k, temperature)
    if approximation == "gumbel":
        logits = logits + _gumbel_like(logits, generator)
    expected = scale * (_probabilities(logits, temperature).to(table.dtype) @ table)
    if approximation != "hard":
        return expected
    chosen = scale * nn.functional.embedding(logits.argmax(-1), table)
    # In this order the value is exactly the chosen embedding.
    return chosen.detach() + (expected - expected.detach())


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits/τ, in float32 at least, without overflow however small τ is."""
    logits = _single_precision(logits)
    return ((logits - logits.detach().amax(-1, keepdim=True)) / temperature).softmax(-1)


def _top_k_mean(logits: Tensor, table: Tensor, k: int, temperature: float) -> Tensor:
    values, tokens = logits.topk(k, dim=-1)
    # The softmax of the k largest logits is p over their sum.
    weights = _probabilities(values, temperature).to(table.dtype)
    if k * table.shape[1] <= len(table):
        return (weights.unsqueeze(-2) @ nn.functional.embedding(tokens, table)).squeeze(-2)
    # So many vectors would take more memory than the weights of all tokens.
    everywhere = weights.new_zeros(logits.shape).scatter(-1, tokens, weights)
    return everywhere @ table


def _gumbel_like(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return -log(-log U) in float32 at least, drawn where the generator lives."""
    dtype = _single_precision(logits.detach()).dtype
    device = logits.device if generator is None else generator.device
    exponential = torch.empty(logits.shape, dtype=dtype, device=device)
    exponential = exponential.exponential_(generator=generator).to(logits.device)
    return -exponential.clamp_min(torch.finfo(dtype).tiny).log()


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


def _single_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _shifted(targets: Tensor, steps: int, ignore_index: int) -> Tensor:
    """What lies ``steps`` further on, with nothing to predict past the end."""
    past = min(steps, targets.shape[1])
    return nn.functional.pad(targets[:, past:], (0, past), value=ignore_index)


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


def _check_approximation(
    approximation: str, top_k: int, temperature: float, scale: float, table: Tensor | None
) -> None:
    names = get_args(Approximation)
    if approximation not in names:
        raise ValueError(f"approximation must be one of {', '.join(names)}, got {approximation!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not math.isfinite(scale):
        raise ValueError(f"embedding_scale must be finite, got {scale}")
    top_k = _at_least_one("top_k", top_k)
    if table is None:
        if approximation != "hidden":
            raise ValueError(f"approximation {approximation!r} needs the embedding table, got None")
        return
    _check_floating("the embedding table", table)
    if table.ndim != 2:
        raise ValueError(
            f"the embedding table must have shape (vocabulary, dim), got {tuple(table.shape)}"
        )
    if approximation == "top_k" and top_k > len(table):
        raise ValueError(f"top_k must lie between 1 and {len(table)} tokens, got {top_k}")


def _check_vocabulary(logits: Tensor, table: Tensor) -> None:
    if logits.shape[-1] != len(table):
        raise ValueError(
            f"logits and the embedding table must have equally many tokens, "
            f"got {logits.shape[-1]} and {len(table)}"
        )


def _check_floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")


def _at_least_one(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number
