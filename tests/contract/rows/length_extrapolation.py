"""Rows of `kexue.nn.position`: random positions and the sinusoidal code."""

import numpy as np
import torch

from contract.row import Row
from kexue.nn.position import NoPosition, SinusoidalPositionEmbedding

NOT_FINITE = "a position code does not look at its numbers: NaN stays at its own position"
ANY_RANK = "positions may have any shape, a single one included"

ROWS = [
    Row(
        name="kexue.nn.position.randomized.random_positions",
        make=lambda rng: {"length": 5, "max_length": 100, "batch_size": 3},
        seeded="generator",
        wrong={
            "no token": lambda given: {**given, "length": 0},
            "more tokens than positions": lambda given: {**given, "length": 101},
            "half a token": lambda given: {**given, "length": 2.5},
            "half a position": lambda given: {**given, "max_length": 99.5},
            "a negative batch": lambda given: {**given, "batch_size": -1},
            "a batch in words": lambda given: {**given, "batch_size": "three"},
        },
    ),
    Row(
        name="kexue.nn.position.randomized.evenly_spaced_positions",
        make=lambda rng: {"length": 5, "max_length": 12},
        wrong={
            "no token": lambda given: {**given, "length": 0},
            "more tokens than positions": lambda given: {**given, "length": 13},
            "half a token": lambda given: {**given, "length": 2.5},
            "half precision": lambda given: {**given, "dtype": torch.float16},
            "complex positions": lambda given: {**given, "dtype": torch.complex64},
            "a dtype that is too small": lambda given: {
                **given,
                "max_length": 257,
                "dtype": torch.uint8,
            },
        },
    ),
    Row(
        name="kexue.nn.position.randomized.equal_mean_positions",
        make=lambda rng: {
            "length": 5,
            "distribution": "beta",
            "max_length": 20,
            "concentration": 0.5,
            "batch_size": 3,
        },
        seeded="generator",
        wrong={
            "no token": lambda given: {**given, "length": 0},
            "half a token": lambda given: {**given, "length": 2.5},
            "unknown distribution": lambda given: {**given, "distribution": "poisson"},
            "no largest length": lambda given: {**given, "max_length": None},
            "a largest length below the mean": lambda given: {**given, "max_length": 4},
            "concentration 0": lambda given: {**given, "concentration": 0.0},
            "infinite concentration": lambda given: {**given, "concentration": np.inf},
            "half precision": lambda given: {**given, "dtype": torch.bfloat16},
            "whole positions": lambda given: {**given, "dtype": torch.int64},
            "a distribution of NaN": lambda given: {
                **given,
                "distribution": lambda count, generator: torch.full((count,), torch.nan),
            },
            "a distribution of lists": lambda given: {
                **given,
                "distribution": lambda count, generator: [1.0] * count,
            },
        },
    ),
    Row(
        name="kexue.nn.position.randomized.log_length_factor",
        make=lambda rng: {"length": 512, "train_length": 64},
        wrong={
            "no key": lambda given: {**given, "length": 0},
            "half a key": lambda given: {**given, "length": 2.5},
            "one key in training": lambda given: {**given, "train_length": 1},
        },
    ),
    Row(
        name="kexue.nn.position.sinusoidal.sinusoidal_position_embedding",
        make=lambda rng: {
            "positions": rng.uniform(-20, 20, (3, 5)),
            "dim": 8,
            "dtype": torch.float64,
        },
        arrays=("positions",),
        backends=("torch",),
        batched=("positions",),
        differentiable=("positions",),
        compiles=True,
        wrong={
            "odd dim": lambda given: {**given, "dim": 7},
            "no dim": lambda given: {**given, "dim": 0},
            "base 0": lambda given: {**given, "base": 0.0},
            "infinite base": lambda given: {**given, "base": np.inf},
            "a code of integers": lambda given: {**given, "dtype": torch.int64},
            "a list": lambda given: {**given, "positions": given["positions"].tolist()},
        },
        without={"not_finite_is_refused": NOT_FINITE, "wrong_rank_is_refused": ANY_RANK},
    ),
    Row(
        name="kexue.nn.position.sinusoidal.SinusoidalPositionEmbedding",
        make=lambda rng: {"positions": rng.uniform(-20, 20, (3, 5))},
        module=lambda: SinusoidalPositionEmbedding(8, base=100.0, scale=0.5),
        arrays=("positions",),
        backends=("torch",),
        batched=("positions",),
        differentiable=("positions",),
        compiles=True,
        wrong={"truth values": lambda given: {"positions": given["positions"] > 0}},
        without={"not_finite_is_refused": NOT_FINITE, "wrong_rank_is_refused": ANY_RANK},
    ),
    Row(
        name="kexue.nn.position.sinusoidal.NoPosition",
        make=lambda rng: {"positions": rng.uniform(-20, 20, (3, 5))},
        module=NoPosition,
        arrays=("positions",),
        backends=("torch",),
        compiles=True,
        without={
            "not_finite_is_refused": "it does not read its input",
            "wrong_rank_is_refused": "it does not read its input",
            "wrong_dtype_is_refused": "it does not read its input",
        },
    ),
]
