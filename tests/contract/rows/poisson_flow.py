"""Rows of `kexue.generative.poisson_flow`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from contract.row import Arguments, Row

PACKAGE = "kexue.generative.poisson_flow"
ONE_HEIGHT = "one z for the whole batch is right; the rank of x is tested by hand"


def field(rng: np.random.Generator) -> Arguments:
    return {
        "x": rng.normal(size=(3, 2)),
        "z": rng.uniform(0.3, 2.0, size=3),
        "data": rng.normal(size=(5, 2)),
        "weights": rng.uniform(0.5, 1.0, size=5),
    }


def points(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(3, 2)), "z": rng.uniform(0.3, 2.0, size=3)}


def normalized(rng: np.random.Generator) -> Arguments:
    given = points(rng)
    return {"v_x": 0.3 * given["x"] / (1 + np.abs(given["x"]).max()), "z": given["z"]}


def clean(rng: np.random.Generator) -> Arguments:
    return {"x": rng.normal(size=(4, 2)), "generator": None}


def source(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def charges() -> torch.Tensor:
    return torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]], dtype=torch.float64)


def use(name: str, *arguments: Any, **options: Any) -> Any:
    from kexue.generative import poisson_flow

    return getattr(poisson_flow, name)(*arguments, **options)


def exact(augmented_dim: float = 1.0) -> Any:
    return use("EmpiricalPoissonField", charges(), augmented_dim=augmented_dim)


def empirical(x: Any, z: Any, data: Any, augmented_dim: float = 2.5, chunk_size: int = 2) -> Any:
    drift = use("EmpiricalPoissonField", data, augmented_dim=augmented_dim, chunk_size=chunk_size)
    return drift(x, z)


def zero_model(x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tanh(x) / 4, -z


def shrink(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x / (1 + sigma[:, None].square())


def flow_loss(x: Any, generator: Any = None, **options: Any) -> Any:
    return use("PoissonFlowLoss", **options)(zero_model, x, generator=source(generator))


def plus_loss(x: Any, generator: Any = None, augmented_dim: float = 3.0, **options: Any) -> Any:
    loss = use("PoissonFlowPlusLoss", augmented_dim=augmented_dim, **options)
    return loss(shrink, x, generator=source(generator))


def perturbed(x: Any, generator: Any = None, **options: Any) -> Any:
    return use("perturb", x, generator=source(generator), **options)


def noise(scale: Any, generator: Any = None, augmented_dim: float = 3.0) -> Any:
    options = {"augmented_dim": augmented_dim, "generator": source(generator)}
    return use("student_t_noise", (len(scale), 2), scale, dtype=scale.dtype, **options)


def prior(shape: Any, z_max: float, generator: Any = None, **options: Any) -> Any:
    return use("sample_prior", shape, z_max, generator=source(generator), **options)


def drawn(shape: Any, generator: Any = None, **options: Any) -> Any:
    return use("sample", exact(), shape, num_steps=4, generator=source(generator), **options)


def moved(x: Any, z_start: float = 5.0, z_end: float = 0.5, **options: Any) -> Any:
    return use("integrate", exact(), x, z_start, z_end, **{"num_steps": 4, **options})


def likelihood(x: Any, **options: Any) -> Any:
    return use("log_likelihood", exact(), x, **{"z_min": 0.5, "num_steps": 3, **options})


def point_set(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 2, dtype=dtype), torch.ones(2, dtype=dtype)


WRONG_FIELD = {
    "z of zero": lambda given: {**given, "z": 0 * given["z"]},
    "no z": lambda given: {**given, "z": None},
    "too many heights": lambda given: {**given, "z": torch.ones(4, dtype=given["x"].dtype)},
    "samples of another shape": lambda given: {**given, "x": given["x"][:, :1]},
    "no data": lambda given: {**given, "data": given["data"][:0]},
    "integers": lambda given: {**given, "x": given["x"].int()},
    "negative weights": lambda given: {**given, "weights": -given["weights"]},
    "weights of zero": lambda given: {**given, "weights": 0 * given["weights"]},
    "negative dimension": lambda given: {**given, "augmented_dim": -1.0},
    "lists": lambda given: {**given, "x": given["x"].tolist()},
}
WRONG_CHUNK = {"empty chunks": lambda given: {**given, "chunk_size": 0}}
WRONG_POINTS = {
    "z of zero": lambda given: {**given, "z": 0 * given["z"]},
    "integers": lambda given: {**given, "x": given["x"].int()},
}
WRONG_DRAW = {
    "dimension of zero": lambda given: {**given, "augmented_dim": 0.0},
}
WRONG_SAMPLE = {
    "no batch": lambda given: {**given, "shape": (3,)},
    "height below zero": lambda given: {**given, "z_max": -1.0},
    "norm of zero": lambda given: {**given, "max_norm": 0.0},
    "integers": lambda given: {**given, "dtype": torch.int64},
}


def field_row(name: str, **options: Any) -> Row:
    return Row(
        **{
            "name": f"{PACKAGE}.{name}",
            "make": field,
            "arrays": ("x", "z", "data", "weights"),
            "backends": ("torch",),
            "batched": ("x", "z"),
            "differentiable": ("x", "z", "data"),
            "wrong": WRONG_FIELD,
            "without": {"wrong_rank_is_refused": ONE_HEIGHT},
            **options,
        }
    )


ROWS = [
    Row(
        name=f"{PACKAGE}.field.unit_sphere_area",
        make=lambda rng: {"dim": 3.5},
        wrong={
            "dimension zero": lambda given: {"dim": 0},
            "infinite dimension": lambda given: {"dim": float("inf")},
        },
    ),
    Row(
        name=f"{PACKAGE}.field.PoissonField",
        make=lambda rng: {**points(rng), "log_weight": rng.normal(size=3)},
        call=lambda x, z, log_weight: use("PoissonField", x, z, log_weight).value(),
        arrays=("x", "z", "log_weight"),
        backends=("torch",),
        batched=("x", "z", "log_weight"),
        differentiable=("x", "z", "log_weight"),
        instance=lambda: use("poisson_field", charges(), 1.0, charges()),
        without={
            "not_finite_is_refused": "a result that the library built; its parts were checked",
            "wrong_rank_is_refused": "a result that the library built; its parts were checked",
            "wrong_dtype_is_refused": "a result that the library built; its parts were checked",
        },
    ),
    field_row("field.poisson_field", wrong={**WRONG_FIELD, **WRONG_CHUNK}, compiles=True),
    field_row("field.posterior_mean", wrong={**WRONG_FIELD, **WRONG_CHUNK}, compiles=True),
    field_row("field.marginal_log_density"),
    field_row(
        "training.poisson_target",
        wrong={**WRONG_FIELD, "negative gamma": lambda given: {**given, "gamma": -1.0}},
    ),
    Row(
        name=f"{PACKAGE}.training.FieldTarget",
        make=points,
        call=lambda x, z: use("FieldTarget", x, z),
        instance=lambda: use("FieldTarget", *point_set()),
    ),
    Row(
        name=f"{PACKAGE}.noise.PerturbedSample",
        make=points,
        call=lambda x, z: use("PerturbedSample", x, z),
        instance=lambda: use("PerturbedSample", *point_set()),
    ),
    Row(
        name=f"{PACKAGE}.solve.LogLikelihood",
        make=points,
        call=lambda x, z: use("LogLikelihood", z, x, z),
        instance=lambda: likelihood(charges()),
    ),
    Row(
        name=f"{PACKAGE}.noise.student_t_noise",
        make=lambda rng: {"scale": rng.uniform(0.5, 2.0, size=3)},
        call=noise,
        arrays=("scale",),
        backends=("torch",),
        seeded="generator",
        wrong={**WRONG_DRAW, "scale of zero": lambda given: {"scale": 0 * given["scale"]}},
        without={"wrong_rank_is_refused": "one scale for the whole batch is right"},
    ),
    Row(
        name=f"{PACKAGE}.noise.sample_prior",
        make=lambda rng: {"shape": (3, 2), "z_max": 4.0},
        call=prior,
        seeded="generator",
        wrong={**WRONG_DRAW, **WRONG_SAMPLE},
    ),
    Row(
        name=f"{PACKAGE}.noise.prior_log_density",
        make=points,
        arrays=("x", "z"),
        backends=("torch",),
        batched=("x", "z"),
        differentiable=("x", "z"),
        wrong={**WRONG_POINTS, **WRONG_DRAW},
        without={"wrong_rank_is_refused": ONE_HEIGHT},
        compiles=True,
    ),
    Row(
        name=f"{PACKAGE}.noise.perturb",
        make=clean,
        call=perturbed,
        arrays=("x",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "sigma of zero": lambda given: {**given, "sigma": 0.0},
            "tau of minus one": lambda given: {**given, "tau": -1.0},
            "negative exponent": lambda given: {**given, "max_exponent": -1.0},
            "more than all": lambda given: {**given, "restrict_exponent": 1.5},
            "integers": lambda given: {**given, "x": given["x"].int()},
        },
    ),
    Row(
        name=f"{PACKAGE}.drift.EmpiricalPoissonField",
        make=lambda rng: {k: v for k, v in field(rng).items() if k != "weights"},
        call=empirical,
        arrays=("x", "z", "data"),
        backends=("torch",),
        batched=("x", "z"),
        differentiable=("x", "z", "data"),
        wrong={
            **{k: v for k, v in WRONG_FIELD.items() if "weights" not in k},
            **WRONG_CHUNK,
            **WRONG_DRAW,
        },
        compiles=True,
        without={"wrong_rank_is_refused": ONE_HEIGHT},
    ),
    Row(
        name=f"{PACKAGE}.drift.drift_from_normalized",
        make=normalized,
        arrays=("v_x", "z"),
        backends=("torch",),
        batched=("v_x", "z"),
        differentiable=("v_x", "z"),
        wrong={
            "too long": lambda given: {**given, "v_x": 100 * given["v_x"]},
            "z of zero": lambda given: {**given, "z": 0 * given["z"]},
            "negative gamma": lambda given: {**given, "gamma": -1.0},
        },
        compiles=True,
        without={"wrong_rank_is_refused": ONE_HEIGHT},
    ),
    Row(
        name=f"{PACKAGE}.drift.NormalizedFieldDrift",
        make=points,
        module=lambda: use("NormalizedFieldDrift", zero_model),
        arrays=("x", "z"),
        backends=("torch",),
        batched=("x", "z"),
        differentiable=("x", "z"),
        wrong=WRONG_POINTS,
        compiles=True,
        without={"wrong_rank_is_refused": ONE_HEIGHT},
    ),
    Row(
        name=f"{PACKAGE}.drift.DenoiserDrift",
        make=points,
        module=lambda: use("DenoiserDrift", shrink, augmented_dim=3.0),
        arrays=("x", "z"),
        backends=("torch",),
        batched=("x", "z"),
        differentiable=("x", "z"),
        wrong=WRONG_POINTS,
        compiles=True,
        without={"wrong_rank_is_refused": ONE_HEIGHT},
    ),
    Row(
        name=f"{PACKAGE}.solve.integrate",
        make=lambda rng: {"x": rng.normal(size=(3, 2))},
        call=moved,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            "no step": lambda given: {**given, "num_steps": 0},
            "unknown method": lambda given: {**given, "method": "leapfrog"},
            "unknown spacing": lambda given: {**given, "spacing": "even"},
            "end in the plane": lambda given: {**given, "z_end": 0.0},
        },
    ),
    Row(
        name=f"{PACKAGE}.solve.sample",
        make=lambda rng: {"shape": (3, 2)},
        call=drawn,
        seeded="generator",
        wrong={
            **WRONG_SAMPLE,
            "upside down": lambda given: {**given, "z_min": 50.0},
            "unknown method": lambda given: {**given, "method": "leapfrog"},
        },
    ),
    Row(
        name=f"{PACKAGE}.solve.log_likelihood",
        make=lambda rng: {"x": rng.normal(size=(3, 2))},
        call=likelihood,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        wrong={
            "no step": lambda given: {**given, "num_steps": 0},
            "no probe": lambda given: {**given, "num_probes": 0},
            "unknown divergence": lambda given: {**given, "divergence": "none"},
            "upside down": lambda given: {**given, "z_min": 50.0},
        },
    ),
    Row(
        name=f"{PACKAGE}.training.PoissonFlowLoss",
        make=clean,
        call=flow_loss,
        arrays=("x",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "negative gamma": lambda given: {**given, "gamma": -1.0},
            "sigma of zero": lambda given: {**given, "sigma": 0.0},
        },
    ),
    Row(
        name=f"{PACKAGE}.training.PoissonFlowPlusLoss",
        make=clean,
        call=plus_loss,
        arrays=("x",),
        backends=("torch",),
        seeded="generator",
        wrong={
            **WRONG_DRAW,
            "data without spread": lambda given: {**given, "data_std": 0.0},
            "negative spread": lambda given: {**given, "log_scale_std": -1.0},
        },
    ),
]
