"""Rows of `kexue.nn.growth`."""

from typing import Any

import numpy as np
import torch

from contract.row import Arguments, Row
from kexue.nn.growth import (
    ExpandedLinear,
    Expansion,
    GrowthReport,
    GrowthResult,
    ParameterRule,
    expand_linear,
    expand_state_dict,
    grow_transformer,
)

STREAM, HIDDEN = Expansion.repeat(4, 2, scale=0.5), Expansion.cycle(3, 5)
REPORT = GrowthReport(True, True, (), 10, 40)
CONFIG = {"model_type": "kexue", "dim": 4, "num_heads": 2, "num_layers": 1}
CONFIG |= {"feedforward_dim": 3, "vocab_size": 5}


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """A generator that has drawn nothing yet, for checks that call twice."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def layer(rng: np.random.Generator) -> Arguments:
    return {
        "weight": rng.standard_normal((3, 4)),
        "bias": rng.standard_normal(3),
        "inputs": STREAM,
        "outputs": HIDDEN,
        "noise": 0.5,
        "generator": None,
    }


def model(rng: np.random.Generator) -> Arguments:
    given = layer(rng)
    del given["inputs"], given["outputs"]
    return given


def grown_layer(weight: Any, bias: Any, generator: Any, **given: Any) -> Any:
    return expand_linear(weight, bias, generator=seeded(generator), **given)


def grown_parameters(weight: Any, bias: Any, generator: Any, **given: Any) -> Any:
    rules = [ParameterRule("weight", ("+hidden", "-stream")), ParameterRule("bias", ("+hidden",))]
    expansions = {"stream": STREAM, "hidden": HIDDEN}
    return expand_state_dict(
        {"weight": weight, "bias": bias}, rules, expansions, generator=seeded(generator), **given
    )


def grown_transformer(weight: Any, bias: Any, generator: Any, **given: Any) -> Any:
    """Grow a model that has one layer of its own, and otherwise ones."""
    wide = {"query_projection", "key_projection", "value_projection", "output_projection"}
    attention, feedforward = "layers.0.attention.", "layers.0.feedforward."
    like = torch.ones(5, 4, dtype=weight.dtype)
    state = {"token_embeddings.weight": like}
    for name in wide:
        state[f"{attention}sublayer.{name}.weight"] = like[:4]
        state[f"{attention}sublayer.{name}.bias"] = like[0]
    for name in (attention, feedforward, ""):
        state[f"{name}norm.weight"] = state[f"{name}norm.bias"] = like[0]
    state[f"{feedforward}sublayer.fc1.weight"] = weight
    state[f"{feedforward}sublayer.fc1.bias"] = bias
    state[f"{feedforward}sublayer.fc2.weight"] = like[:4, :3]
    state[f"{feedforward}sublayer.fc2.bias"] = like[0]
    config = given.pop("config", CONFIG)
    return grow_transformer(
        state, config, hidden_size=8, generator=seeded(generator), **given
    ).state_dict


WRONG = {
    "negative noise": lambda given: {**given, "noise": -1.0},
    "another size": lambda given: {**given, "weight": given["weight"][:, :2]},
    "a bias of another size": lambda given: {**given, "bias": given["bias"][:2]},
}

ROWS = [
    Row(
        name="kexue.nn.growth.expansion.Expansion",
        make=lambda rng: {"tensor": rng.standard_normal((2, 4)), "scale": 0.5},
        call=lambda tensor, scale: [
            Expansion.repeat(4, 2, scale=scale).write(tensor),
            Expansion.cycle(4, 7, scale=scale).read(tensor),
            Expansion.repeat(2, 2).null_noise(tensor),
        ],
        arrays=("tensor",),
        backends=("torch",),
        batched=("tensor",),
        wrong={
            "no scale": lambda given: {**given, "scale": 0.0},
            "another size": lambda given: {**given, "tensor": given["tensor"][:, :3]},
        },
        instance=lambda: Expansion.rotary(2, 4, 2),
        without={"not_finite_is_refused": "a linear map; NaN at one unit is NaN at its copies"},
    ),
    Row(
        name="kexue.nn.growth.expansion.ExpandedLinear",
        make=lambda rng: {"weight": torch.ones(1, 2), "bias": None},
        instance=lambda: ExpandedLinear(torch.ones(1, 2), None),
    ),
    Row(
        name="kexue.nn.growth.expansion.expand_linear",
        make=layer,
        call=grown_layer,
        arrays=("weight", "bias"),
        backends=("torch",),
        seeded="generator",
        wrong=WRONG,
    ),
    Row(
        name="kexue.nn.growth.rules.ParameterRule",
        make=lambda rng: {"pattern": r"w\d", "axes": ("+stream", None)},
        wrong={
            "no expression": lambda given: {**given, "pattern": "("},
            "an axis without a sign": lambda given: {**given, "axes": ("stream",)},
            "axes in one word": lambda given: {**given, "axes": "+stream"},
            "an infinite multiplier": lambda given: {**given, "multiplier": float("inf")},
        },
        instance=lambda: ParameterRule("w", ("-stream",), 0.5),
    ),
    Row(
        name="kexue.nn.growth.rules.expand_state_dict",
        make=model,
        call=grown_parameters,
        arrays=("weight", "bias"),
        backends=("torch",),
        seeded="generator",
        wrong=WRONG,
    ),
    Row(
        name="kexue.nn.growth.transformer.GrowthReport",
        make=lambda rng: {
            "exact": True,
            "symmetric": True,
            "reasons": (),
            "old_parameters": 1,
            "new_parameters": 4,
        },
        instance=lambda: REPORT,
    ),
    Row(
        name="kexue.nn.growth.transformer.GrowthResult",
        make=lambda rng: {"state_dict": {}, "config": {}, "report": REPORT},
        instance=lambda: GrowthResult({"w": torch.ones(2)}, {"n_embd": 2}, REPORT),
    ),
    Row(
        name="kexue.nn.growth.transformer.grow_transformer",
        make=model,
        call=grown_transformer,
        arrays=("weight", "bias"),
        backends=("torch",),
        seeded="generator",
        wrong=WRONG
        | {
            "a smaller feed-forward": lambda given: {**given, "intermediate_size": 2},
            "fewer layers": lambda given: {**given, "num_layers": 0},
            "an unknown family": lambda given: {**given, "config": {"model_type": "gpt"}},
            "no configuration": lambda given: {**given, "config": 3},
            "unknown attention": lambda given: {**given, "attention": "both"},
            "unknown scaling": lambda given: {**given, "scaling": "none"},
            "empty units beside LayerNorm": lambda given: {**given, "fill": "zero"},
        },
    ),
]
