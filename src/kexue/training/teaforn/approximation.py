"""How an output vector of a decoder becomes an input vector: the map φ.

Source: https://arxiv.org/abs/2010.03494, section 3; the Gumbel noise is the comparison that Su
Jianlin's article asks for.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["soft_embedding"]

Approximation: TypeAlias = Literal["hidden", "expectation", "top_k", "hard", "gumbel"]


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


def _single_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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
