"""The parts of a Hugging Face causal language model that the loss asks for, by duck typing."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from kexue.training.teaforn.loss import TensorMap

__all__ = ["causal_lm_parts"]


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
