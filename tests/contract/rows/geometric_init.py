"""Contract rows of the geometric part of kexue.nn.init."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from contract.row import Row
from kexue.nn import init


def _filled(initialiser: str, shape: tuple[int, ...], **given: Any) -> torch.Tensor:
    given = {"generator": torch.Generator().manual_seed(0), **given}
    return getattr(init, initialiser)(torch.empty(shape, dtype=torch.float64), **given)


_WRONG_WEIGHTS = {
    "a vector": lambda given: {**given, "shape": (4,)},
    "a gain that is not finite": lambda given: {**given, "gain": math.inf},
    "a gain in words": lambda given: {**given, "gain": "relu"},
}
_WRONG_KERNELS = {
    **_WRONG_WEIGHTS,
    "no kernel": lambda given: {**given, "shape": (4, 4)},
    "four axes": lambda given: {**given, "shape": (4, 4, 1, 1, 1, 1)},
    "more inputs than outputs": lambda given: {**given, "shape": (2, 3, 3)},
}
_WRONG_ACTIVATIONS = {
    "an unknown name": lambda given: {**given, "activation": "swiglu"},
    "no callable": lambda given: {**given, "activation": 3},
    "softmax": lambda given: {**given, "activation": lambda x: x.softmax(-1)},
    "a logarithm": lambda given: {**given, "activation": torch.log},
    "no spread": lambda given: {**given, "std": 0.0},
}
_WRONG_SHAPES = {
    "no row": lambda given: {**given, "rows": 0},
    "half a column": lambda given: {**given, "columns": 2.5},
}

ROWS = [
    Row(
        name="kexue.nn.init.orthogonal.orthogonal_",
        make=lambda rng: {"shape": (5, 3), "gain": 2.0, "preserve": "second_moment"},
        call=lambda **given: _filled("orthogonal_", **given),
        backends=("torch",),
        seeded="generator",
        wrong={
            **_WRONG_WEIGHTS,
            "another way to preserve": lambda given: {**given, "preserve": "variance"},
        },
    ),
    Row(
        name="kexue.nn.init.orthogonal.delta_orthogonal_",
        make=lambda rng: {"shape": (5, 3, 3, 2), "gain": 2.0},
        call=lambda **given: _filled("delta_orthogonal_", **given),
        backends=("torch",),
        seeded="generator",
        wrong=_WRONG_KERNELS,
    ),
    Row(
        name="kexue.nn.init.orthogonal.convolution_orthogonal_",
        make=lambda rng: {"shape": (5, 3, 3, 2), "gain": 2.0},
        call=lambda **given: _filled("convolution_orthogonal_", **given),
        backends=("torch",),
        seeded="generator",
        wrong=_WRONG_KERNELS,
    ),
    Row(
        name="kexue.nn.init.moments.activation_moments",
        make=lambda rng: {"activation": "gelu", "mean": 0.3, "std": 2.0, "breakpoints": (0.1,)},
        backends=("torch",),
        wrong={
            **_WRONG_ACTIVATIONS,
            "a mean that is not finite": lambda given: {**given, "mean": np.nan},
            "a breakpoint that is not finite": lambda given: {**given, "breakpoints": [np.inf]},
        },
    ),
    Row(
        name="kexue.nn.init.moments.activation_gain",
        make=lambda rng: {"activation": "silu", "direction": "backward", "std": 2.0},
        backends=("torch",),
        wrong={
            **_WRONG_ACTIVATIONS,
            "another direction": lambda given: {**given, "direction": "sideways"},
            "nothing comes through": lambda given: {**given, "activation": torch.zeros_like},
        },
    ),
    Row(
        name="kexue.nn.init.moments.layer_growth",
        make=lambda rng: {"activation": "tanh", "gain": 1.5, "std": 2.0},
        backends=("torch",),
        wrong={
            **_WRONG_ACTIVATIONS,
            "a gain that is not finite": lambda given: {**given, "gain": np.inf},
        },
    ),
    Row(
        name="kexue.nn.init.moments.ActivationMoments",
        make=lambda rng: {
            "mean": 0.0, "second_moment": 1.0, "variance": 1.0, "derivative_second_moment": 1.0,
        },
        backends=("torch",),
        instance=lambda: init.activation_moments("relu"),
    ),
    Row(
        name="kexue.nn.init.moments.LayerGrowth",
        make=lambda rng: {"forward": 1.0, "backward": 1.2},
        backends=("torch",),
        instance=lambda: init.layer_growth("tanh"),
    ),
    Row(
        name="kexue.nn.init.gram.gram_error",
        make=lambda rng: {"weight": rng.normal(size=(3, 4, 5))},
        arrays=("weight",),
        backends=("torch",),
        batched=("weight",),
        differentiable=("weight",),
        compiles=True,
        wrong={
            "a vector": lambda given: {"weight": given["weight"][0, 0]},
            "no column": lambda given: {"weight": given["weight"][..., :0]},
        },
    ),
    Row(
        name="kexue.nn.init.gram.expected_gram_error",
        make=lambda rng: {"rows": 300, "columns": 60, "kurtosis": 1.8},
        backends=("torch",),
        wrong={
            **_WRONG_SHAPES,
            "a kurtosis below 1": lambda given: {**given, "kurtosis": 0.5},
        },
    ),
    Row(
        name="kexue.nn.init.gram.singular_value_range",
        make=lambda rng: {"rows": 300, "columns": 60},
        backends=("torch",),
        wrong=_WRONG_SHAPES,
    ),
    Row(
        name="kexue.nn.init.gram.SingularValueRange",
        make=lambda rng: {"smallest": 0.5, "largest": 1.5},
        backends=("torch",),
        instance=lambda: init.singular_value_range(400, 100),
    ),
]  # fmt: skip
