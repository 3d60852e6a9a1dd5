"""Rows of `kexue.training.teaforn`."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.row import Arguments, Row
from kexue.training.teaforn import (
    TeaForNOutput,
    causal_lm_parts,
    step_weights,
    teaforn_loss,
)

NOT_LOOKED_AT = "looking at values would make the host wait for an accelerator in every step"


def sequences(rng: np.random.Generator) -> Arguments:
    return {
        "embeddings": rng.standard_normal((3, 5, 4)),
        "targets": rng.integers(0, 6, (3, 5)),
        "embedding": rng.standard_normal((6, 4)),
        "approximation": "gumbel",
        "temperature": 0.8,
        "generator": None,
    }


def predictions(rng: np.random.Generator) -> Arguments:
    return {
        "hidden": rng.standard_normal((3, 5, 4)),
        "logits": rng.standard_normal((3, 5, 6)),
        "embedding_weight": rng.standard_normal((6, 4)),
        "approximation": "expectation",
        "temperature": 0.8,
    }


def body(embeddings: Tensor) -> Tensor:
    return torch.tanh(embeddings.cumsum(1))


def loss(embedding: Tensor, generator: Any, **given: Any) -> TeaForNOutput:
    if given["approximation"] == "gumbel" and generator is None:
        # Noise without a source differs from call to call; only the check of seeds gives one.
        given["approximation"] = "expectation"
    return teaforn_loss(
        decoder=body,
        output_projection=lambda hidden: hidden @ embedding.T,
        embedding=embedding,
        generator=generator,
        **given,
    )


def causal_model(weight: Tensor) -> SimpleNamespace:
    """The little of a Hugging Face model that is asked for."""
    table = nn.Embedding.from_pretrained(weight)
    return SimpleNamespace(
        base_model=lambda inputs_embeds: SimpleNamespace(last_hidden_state=body(inputs_embeds)),
        get_input_embeddings=lambda: table,
        get_output_embeddings=lambda: lambda hidden: hidden @ weight.T,
    )


def logits_of_parts(weight: Tensor, tokens: Tensor, model: Any = causal_model) -> Tensor:
    decoder, output_projection, embedding = causal_lm_parts(model(weight))
    return output_projection(decoder(embedding(tokens)))


ROWS = [
    Row(
        name="kexue.training.teaforn.loss.TeaForNOutput",
        make=lambda rng: {},
        instance=lambda: TeaForNOutput(
            torch.tensor(1.5), torch.ones(2), torch.ones(1, 3, 5), (torch.zeros(1, 3, 4),) * 2
        ),
    ),
    Row(
        name="kexue.training.teaforn.loss.teaforn_loss",
        make=sequences,
        call=loss,
        arrays=("embeddings", "embedding"),
        backends=("torch",),
        batched=("embeddings", "targets"),
        differentiable=("embeddings", "embedding"),
        seeded="generator",
        compiles=True,
        wrong={
            "no pass": lambda given: {**given, "n_grams": 0},
            "half a pass": lambda given: {**given, "n_grams": 1.5},
            "weights that grow": lambda given: {**given, "discount": 2.0},
            "one weight for two passes": lambda given: {**given, "discount": [1.0]},
            "a negative weight": lambda given: {**given, "discount": [1.0, -0.5]},
            "an unknown approximation": lambda given: {**given, "approximation": "soft"},
            "an unknown layout": lambda given: {**given, "layout": "shifted"},
            "no temperature": lambda given: {**given, "temperature": 0.0},
            "more tokens than there are": lambda given: {
                **given, "approximation": "top_k", "top_k": 7,
            },
            "fewer targets": lambda given: {**given, "targets": given["targets"][:, :4]},
            "targets in floating point": lambda given: {
                **given, "targets": given["targets"].double(),
            },
        },
        without={"not_finite_is_refused": NOT_LOOKED_AT},
    ),
    Row(
        name="kexue.training.teaforn.loss.step_weights",
        make=lambda rng: {"n_grams": 3, "discount": 0.5},
        call=step_weights,
        wrong={
            "no pass": lambda given: {**given, "n_grams": 0},
            "a weight above one": lambda given: {**given, "discount": 1.1},
            "too few weights": lambda given: {**given, "discount": [1.0, 0.5]},
            "a weight that is no number": lambda given: {**given, "discount": [1.0, 0.5, np.nan]},
            "words": lambda given: {**given, "discount": "half"},
        },
    ),
    Row(
        name="kexue.training.teaforn.approximation.soft_embedding",
        make=predictions,
        arrays=("hidden", "logits", "embedding_weight"),
        backends=("torch",),
        batched=("hidden", "logits"),
        differentiable=("logits", "embedding_weight"),
        compiles=True,
        wrong={
            "an unknown approximation": lambda given: {**given, "approximation": "soft"},
            "no table": lambda given: {**given, "embedding_weight": None},
            "another vocabulary": lambda given: {**given, "logits": given["logits"][..., :5]},
            "no temperature": lambda given: {**given, "temperature": 0.0},
            "no token": lambda given: {**given, "approximation": "top_k", "top_k": 0},
        },
        without={"not_finite_is_refused": NOT_LOOKED_AT},
    ),
    Row(
        name="kexue.training.teaforn.causal_lm.causal_lm_parts",
        make=lambda rng: {
            "weight": rng.standard_normal((6, 4)), "tokens": rng.integers(0, 6, (3, 5)),
        },
        call=logits_of_parts,
        arrays=("weight",),
        backends=("torch",),
        batched=("tokens",),
        wrong={"no model": lambda given: {**given, "model": lambda weight: weight}},
        without={
            "not_finite_is_refused": "it takes a model apart and looks at no number",
            "wrong_rank_is_refused": "it takes a model apart and looks at no number",
            "wrong_dtype_is_refused": "it takes a model apart and looks at no number",
        },
    ),
]  # fmt: skip
