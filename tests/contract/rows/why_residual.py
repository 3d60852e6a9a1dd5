"""Contract rows of kexue.nn.residual."""

from __future__ import annotations

from typing import Any

import numpy as np

from contract.row import Row

_NOT_FINITE = (
    "a network is run in loops on accelerators, where looking at values costs a synchronisation; "
    "NaN stays in its own row"
)


def _block() -> Any:
    import torch

    from kexue.nn.residual import Residual

    return Residual(torch.nn.Linear(4, 4), 4, style="post", alpha=2.0, branch_scale=0.5)


def _network() -> Any:
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential()
    network.add_module("fc1", torch.nn.Linear(3, 8))
    network.add_module("block", _block())
    return network


def _init(beta: float, generator: Any = None, role: Any = None) -> Any:
    from kexue.nn.residual import deepnorm_init_

    network = _network()
    deepnorm_init_(network, beta, generator=generator, role=role)
    return network.fc1.weight


def _groups(lr: float, num_layers: int) -> Any:
    from kexue.nn.residual import depth_parameter_groups

    return [
        group["lr"] for group in depth_parameter_groups(_network(), lr=lr, num_layers=num_layers)
    ]


def _measure(learning_rate: float, optimizer: str) -> Any:
    import torch

    from kexue.nn.residual import measure_update

    model, x = _network().fc1, torch.ones(2, 3)
    return measure_update(
        model, lambda m: m(x).square().mean(), learning_rate=learning_rate, optimizer=optimizer
    )


def _report() -> Any:
    return _measure(0.1, "sgd")


def _scaling() -> Any:
    from kexue.nn.residual import DepthScaling

    return DepthScaling(2.0, 0.5)


def _coefficients() -> Any:
    from kexue.nn.residual import DeepNormCoefficients

    return DeepNormCoefficients(_scaling(), None)


def _part() -> Any:
    from kexue.nn.residual import ParameterUpdate

    return ParameterUpdate(4.0, 2.0, -0.04, numel=1, ndim=1)


def _fit() -> Any:
    from kexue.nn.residual import PowerLawFit

    return PowerLawFit(1.0, 0.0, 0.1)


def _matrices(rng: np.random.Generator) -> dict[str, Any]:
    return {"weight": rng.normal(size=(2, 3, 4))}


def _with_gradient(rng: np.random.Generator) -> dict[str, Any]:
    return {**_matrices(rng), "gradient": rng.normal(size=(2, 3, 4))}


ROWS = [
    Row(
        name="kexue.nn.residual.block.Residual",
        make=lambda rng: {"x": rng.normal(size=(3, 4))},
        module=_block,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        compiles=True,
        wrong={"another width": lambda given: {"x": given["x"][:, :3]}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.nn.residual.initialization.deepnorm_init_",
        make=lambda rng: {"beta": 0.5},
        call=_init,
        backends=("torch",),
        seeded="generator",
        wrong={
            "no gain": lambda given: {"beta": 0.0},
            "a role of its own": lambda given: {**given, "role": lambda name, module: "value"},
            "no branch": lambda given: {**given, "role": lambda name, module: "other"},
        },
    ),
    Row(
        name="kexue.nn.residual.initialization.depth_parameter_groups",
        make=lambda rng: {"lr": 0.1, "num_layers": 6},
        call=_groups,
        backends=("torch",),
        wrong={
            "no rate": lambda given: {**given, "lr": 0.0},
            "no layer": lambda given: {**given, "num_layers": 0},
            "half a layer": lambda given: {**given, "num_layers": 0.5},
        },
    ),
    Row(
        name="kexue.nn.residual.magnitude.magnitude",
        make=_matrices,
        arrays=("weight",),
        backends=("torch",),
        batched=("weight",),
        differentiable=("weight",),
        wrong={"zeros": lambda given: {"weight": 0 * given["weight"]}},
        without={"wrong_rank_is_refused": "leading dimensions are a batch; a vector is tested"},
    ),
    Row(
        name="kexue.nn.residual.magnitude.magnitude_gradient",
        make=_with_gradient,
        arrays=("weight", "gradient"),
        backends=("torch",),
        batched=("weight", "gradient"),
        differentiable=("weight", "gradient"),
        wrong={"another shape": lambda given: {**given, "gradient": given["gradient"][:, :2]}},
        without={
            "wrong_rank_is_refused": "leading dimensions are a batch; a vector is tested",
        },
    ),
    Row(
        name="kexue.nn.residual.scaling.DeepNormCoefficients",
        make=lambda rng: {"encoder": _scaling(), "decoder": None},
        backends=("torch",),
        instance=_coefficients,
    ),
    Row(
        name="kexue.nn.residual.scaling.DepthScaling",
        make=lambda rng: {"alpha": 2.0, "beta": 0.5},
        backends=("torch",),
        instance=_scaling,
    ),
    Row(
        name="kexue.nn.residual.scaling.deepnorm_coefficients",
        make=lambda rng: {"encoder_layers": 6, "decoder_layers": 4},
        backends=("torch",),
        wrong={
            "a negative number": lambda given: {**given, "decoder_layers": -1},
            "no layer": lambda given: {"encoder_layers": 0},
            "a truth value": lambda given: {"encoder_layers": True},
        },
    ),
    Row(
        name="kexue.nn.residual.scaling.depth_scaling",
        make=lambda rng: {"num_layers": 6, "optimizer": "adam"},
        backends=("torch",),
        wrong={
            "no layer": lambda given: {**given, "num_layers": 0},
            "another optimiser": lambda given: {**given, "optimizer": "adagrad"},
            "another norm": lambda given: {**given, "norm": "sandwich"},
        },
    ),
    Row(
        name="kexue.nn.residual.scaling.residual_gain",
        make=lambda rng: {"num_layers": 100, "epsilon": 0.1},
        backends=("torch",),
        wrong={
            "no layer": lambda given: {**given, "num_layers": 0},
            "a negative branch": lambda given: {**given, "epsilon": -0.1},
            "a branch that is no number": lambda given: {**given, "epsilon": float("nan")},
        },
    ),
    Row(
        name="kexue.nn.residual.update.ParameterUpdate",
        make=lambda rng: {
            "gradient_norm_squared": 4.0, "gradient_norm_one": 2.0, "predicted_change": -0.04,
            "numel": 1, "ndim": 1,
        },
        backends=("torch",),
        instance=_part,
    ),
    Row(
        name="kexue.nn.residual.update.PowerLawFit",
        make=lambda rng: {"exponent": 1.0, "log_intercept": 0.0, "standard_error": 0.1},
        backends=("torch",),
        instance=_fit,
    ),
    Row(
        name="kexue.nn.residual.update.UpdateReport",
        make=lambda rng: {
            "loss": 1.0, "learning_rate": 0.1, "optimizer": "sgd", "predicted_change": -0.1,
            "measured_change": -0.1, "gradient_norm_squared": 1.0, "gradient_norm_one": 1.0,
            "by_name": {},
        },
        backends=("torch",),
        instance=_report,
    ),
    Row(
        name="kexue.nn.residual.update.fit_power_law",
        make=lambda rng: {"x": rng.uniform(1, 2, size=5), "y": rng.uniform(1, 2, size=5)},
        arrays=("x", "y"),
        backends=("numpy",),
        wrong={
            "another length": lambda given: {**given, "y": given["y"][:3]},
            "a zero": lambda given: {**given, "x": 0 * given["x"]},
        },
    ),
    Row(
        name="kexue.nn.residual.update.measure_update",
        make=lambda rng: {"learning_rate": 0.1, "optimizer": "adam"},
        call=_measure,
        backends=("torch",),
        wrong={
            "no rate": lambda given: {**given, "learning_rate": 0.0},
            "another optimiser": lambda given: {**given, "optimizer": "adagrad"},
        },
    ),
]  # fmt: skip
