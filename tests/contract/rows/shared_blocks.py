"""Contract rows of the shared networks: kexue.models embedding, mlp, unet, transformer."""

from __future__ import annotations

from typing import Any

import numpy as np

from contract.row import Row

_NOT_FINITE = (
    "a network is run in loops on accelerators, where looking at values costs a synchronisation; "
    "NaN stays in its own row"
)


def _vectors(rng: np.random.Generator) -> dict[str, Any]:
    return {"x": rng.normal(size=(3, 4)), "time": rng.uniform(1, 1000, size=3)}


def _labelled(rng: np.random.Generator) -> dict[str, Any]:
    return {**_vectors(rng), "condition": np.array([0, 2, 1])}


def _images(rng: np.random.Generator) -> dict[str, Any]:
    return {"x": rng.normal(size=(2, 1, 4, 4)), "time": rng.uniform(1, 1000, size=2)}


def _denoiser() -> Any:
    from kexue.models import MLPDenoiser

    return MLPDenoiser(4, hidden=8, depth=2, num_classes=3)


def _plain() -> Any:
    from kexue.models import MLP

    return MLP(4, [8], 2)


def _unet() -> Any:
    import torch

    from kexue.models import SmallUNet

    network = SmallUNet(1, base=8, multipliers=(1, 2), attention_at=(2,))
    torch.nn.init.normal_(network.output.weight)
    return network


def _transformer() -> Any:
    from kexue.models.transformer import Transformer, TransformerConfig

    config = TransformerConfig(vocab_size=7, dim=8, num_layers=2, num_heads=2, max_length=12)
    return Transformer(config)


def _config() -> Any:
    from kexue.models.transformer import TransformerConfig

    return TransformerConfig(vocab_size=7, dim=8)


def _embed(time: Any) -> Any:
    import torch

    from kexue.models import TimeEmbedding

    torch.manual_seed(0)
    return TimeEmbedding(8).to(time.dtype if time.is_floating_point() else None)(
        time, batch=len(time) if time.ndim else 2
    )


ROWS = [
    Row(
        name="kexue.models.embedding.TimeEmbedding",
        make=lambda rng: {"time": rng.uniform(0, 20, size=4)},
        call=_embed,
        arrays=("time",),
        backends=("torch",),
        batched=("time",),
        differentiable=("time",),
        wrong={"a matrix of times": lambda given: {"time": given["time"].reshape(2, 2)}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "one time for the whole batch is right",
        },
    ),
    Row(
        name="kexue.models.mlp.MLPDenoiser",
        make=_labelled,
        module=_denoiser,
        arrays=("x", "time"),
        backends=("torch",),
        batched=("x", "time", "condition"),
        differentiable=("x",),
        compiles=True,
        wrong={"another width": lambda given: {**given, "x": given["x"][:, :3]}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "one time for the whole batch is right; x is tested by hand",
            "float32_agrees_with_float64": "sines of times near 1000 keep 4 digits in float32",
        },
    ),
    Row(
        name="kexue.models.mlp.MLP",
        make=lambda rng: {"x": rng.normal(size=(3, 4))},
        module=_plain,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        compiles=True,
        wrong={"another width": lambda given: {"x": given["x"][:, :3]}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.models.unet.SmallUNet",
        make=_images,
        module=_unet,
        arrays=("x", "time"),
        backends=("torch",),
        batched=("x", "time"),
        differentiable=("x",),
        compiles=True,
        wrong={"a size that cannot be halved": lambda given: {**given, "x": given["x"][..., :3]}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "one time for the whole batch is right; x is tested by hand",
            "float32_agrees_with_float64": "sines of times near 1000 keep 4 digits in float32",
        },
    ),
    Row(
        name="kexue.models.transformer.Transformer",
        make=lambda rng: {"inputs_embeds": rng.normal(size=(2, 5, 8))},
        module=_transformer,
        arrays=("inputs_embeds",),
        backends=("torch",),
        batched=("inputs_embeds",),
        differentiable=("inputs_embeds",),
        compiles=True,
        wrong={"another width": lambda given: {"inputs_embeds": given["inputs_embeds"][..., :3]}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.models.transformer.TransformerConfig",
        make=lambda rng: {"vocab_size": 7, "dim": 8},
        instance=_config,
        wrong={
            "no tokens": lambda given: {**given, "vocab_size": 0},
            "no width": lambda given: {**given, "dim": 0},
            "an unknown activation": lambda given: {**given, "activation": "step"},
        },
    ),
]
