"""Rows of `kexue.nn.rotary`."""

import numpy as np
import torch

from contract.row import Arguments, Row
from kexue.nn.rotary import RotaryDecomposition, RotaryEmbedding, grid_positions, rotary_generators

NOT_FINITE = "a layer does not look at its numbers: NaN and infinity stay in their own plane"
ANY_RANK = "the parameter of a linear map may have any number of columns, or be a bias"
ANY_NUMBERS = "rows are permuted, whatever numbers they hold"

WRONG_LAYOUT = {"unknown layout": lambda given: {**given, "layout": "neox"}}


def features(rng: np.random.Generator, *, length: int = 6) -> Arguments:
    return {"x": rng.standard_normal((2, 3, length, 10))}


def queries_and_keys(rng: np.random.Generator) -> Arguments:
    return {
        "query": rng.standard_normal((2, 3, 6, 10)),
        "key": rng.standard_normal((2, 3, 6, 10)),
        "positions": grid_positions(2, 3),
    }


def generators(rng: np.random.Generator) -> np.ndarray:
    """Commuting and skew-symmetric, in a basis that is nobody's."""
    basis, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    table = torch.tensor([[1.0, 0.5], [0.25, -2.0]], dtype=torch.float64)
    return rotary_generators(table, basis=torch.from_numpy(basis)).numpy()


def permutation(dim: int = 8, **given: object) -> Arguments:
    return {"dim": dim, "from_layout": "half", "to_layout": "interleaved", **given}


WRONG_GENERATORS = {
    "not skew-symmetric": lambda given: {**given, "generators": given["generators"].abs()},
    "not commuting": lambda given: {
        **given,
        "generators": torch.stack(
            [given["generators"][0], given["generators"][1].roll((1, 1), (0, 1))]
        ),
    },
    "one matrix": lambda given: {**given, "generators": given["generators"][0]},
    "not square": lambda given: {**given, "generators": given["generators"][:, :3]},
    "a list": lambda given: {**given, "generators": given["generators"].tolist()},
}

ROWS = [
    Row(
        name="kexue.nn.rotary.embedding.rotary_frequencies",
        make=lambda rng: {"dim": 8, "base": 100.0},
        wrong={
            "odd dim": lambda given: {**given, "dim": 7},
            "no dim": lambda given: {**given, "dim": 0},
            "base 0": lambda given: {**given, "base": 0.0},
            "infinite base": lambda given: {**given, "base": np.inf},
        },
    ),
    Row(
        name="kexue.nn.rotary.embedding.grid_positions",
        make=lambda rng: {"rows": 2, "columns": 3},
        call=lambda rows, columns: grid_positions(rows, columns),
        wrong={
            "no row": lambda given: {**given, "rows": 0},
            "half a column": lambda given: {**given, "columns": 2.5},
        },
    ),
    Row(
        name="kexue.nn.rotary.embedding.RotaryEmbedding",
        make=queries_and_keys,
        module=lambda: RotaryEmbedding(
            8, axes=2, frequencies=torch.tensor([[1, 0], [2, 1], [0, 1], [0.1, 3]]), learnable=True
        ),
        arrays=("query", "key"),
        backends=("torch",),
        batched=("query", "key"),
        differentiable=("query", "key"),
        compiles=True,
        wrong={
            "another number of positions": lambda given: {**given, "positions": grid_positions(7)},
            "one coordinate": lambda given: {**given, "positions": torch.arange(6)},
            "no positions": lambda given: {**given, "positions": None},
            "three coordinates": lambda given: {**given, "positions": grid_positions(1, 2, 3)},
            "a narrow key": lambda given: {**given, "key": given["key"][..., :6]},
            "integers": lambda given: {**given, "query": given["query"].long()},
        },
        without={"not_finite_is_refused": NOT_FINITE},
    ),
    Row(
        name="kexue.nn.rotary.rotation.apply_rotary",
        make=lambda rng: {
            **features(rng),
            "angles": rng.uniform(-3, 3, (2, 6, 4)),
            "layout": "half",
            "inverse": True,
        },
        arrays=("x", "angles"),
        backends=("torch",),
        batched=("x", "angles"),
        differentiable=("x", "angles"),
        compiles=True,
        wrong={
            **WRONG_LAYOUT,
            "another length": lambda given: {**given, "angles": given["angles"][:, 1:]},
            "another batch": lambda given: {**given, "angles": given["angles"].repeat(2, 1, 1)},
            "more planes than features": lambda given: {**given, "x": given["x"][..., :6]},
            "integer angles": lambda given: {**given, "angles": given["angles"].long()},
        },
        without={"not_finite_is_refused": NOT_FINITE},
    ),
    Row(
        name="kexue.nn.rotary.layout.rotary_permutation",
        make=lambda rng: permutation(),
        wrong={
            "odd dim": lambda given: {**given, "dim": 7},
            "unknown layout": lambda given: {**given, "to_layout": "neox"},
        },
    ),
    Row(
        name="kexue.nn.rotary.layout.convert_rotary_projection",
        make=lambda rng: {
            "weight_or_bias": rng.standard_normal((16, 5)),
            "num_heads": 2,
            "from_layout": "interleaved",
            "to_layout": "half",
            "rotary_dim": 6,
        },
        arrays=("weight_or_bias",),
        backends=("torch",),
        differentiable=("weight_or_bias",),
        compiles=True,
        wrong={
            "three heads": lambda given: {**given, "num_heads": 3},
            "no head": lambda given: {**given, "num_heads": 0},
            "rotary_dim above the head's size": lambda given: {**given, "rotary_dim": 10},
            "odd rotary_dim": lambda given: {**given, "rotary_dim": 5},
            "unknown layout": lambda given: {**given, "from_layout": "neox"},
        },
        without={
            "not_finite_is_refused": ANY_NUMBERS,
            "wrong_dtype_is_refused": ANY_NUMBERS,
        },
    ),
    Row(
        name="kexue.nn.rotary.generators.rotary_generators",
        make=lambda rng: {
            "frequencies": rng.standard_normal((4, 2)),
            "layout": "half",
            "basis": np.linalg.qr(rng.standard_normal((9, 9)))[0],
        },
        arrays=("frequencies", "basis"),
        backends=("torch",),
        differentiable=("frequencies",),
        wrong={
            **WRONG_LAYOUT,
            "a narrow basis": lambda given: {**given, "basis": given["basis"][:7, :7]},
            "a basis that stretches": lambda given: {**given, "basis": 2 * given["basis"]},
        },
    ),
    Row(
        name="kexue.nn.rotary.generators.rotary_matrix",
        make=lambda rng: {
            "positions": rng.uniform(-3, 3, (4, 2)),
            "generators": generators(rng),
        },
        arrays=("positions", "generators"),
        backends=("torch",),
        batched=("positions",),
        differentiable=("positions",),
        wrong={
            **WRONG_GENERATORS,
            "three coordinates": lambda given: {**given, "positions": torch.ones(4, 3)},
        },
    ),
    Row(
        name="kexue.nn.rotary.generators.decompose_rotary_generators",
        make=lambda rng: {"generators": generators(rng)},
        arrays=("generators",),
        backends=("torch",),
        wrong=WRONG_GENERATORS,
    ),
    Row(
        name="kexue.nn.rotary.generators.RotaryDecomposition",
        make=lambda rng: {"basis": torch.eye(4), "frequencies": torch.ones(2, 1)},
        call=RotaryDecomposition,
    ),
]
