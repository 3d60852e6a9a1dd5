"""Rows of the clean variances, optimal grids and the scheduler."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from contract.row import Row
from contract.rows.ddpm_as_vae import _DRAWS, _NOT_FINITE, _TIME_RANK, _linear, _mixture, _source


def _states(rng: np.random.Generator) -> dict[str, Any]:
    return {"x": rng.normal(size=(3, 2)), "time": np.array([5.0, 300.0, 900.0])}


def _table(values: Any = None) -> Any:
    from kexue.generative.diffusion import TabulatedVariance

    times = torch.tensor([1.0, 300.0, 900.0, 1000.0], dtype=torch.float64)
    if values is None:
        values = torch.rand(4, 2, dtype=torch.float64)
    return TabulatedVariance(times, values, schedule=_linear())


def _tabulated(times: Any, values: Any) -> Any:
    from kexue.generative.diffusion import TabulatedVariance

    table = TabulatedVariance(times, values, schedule=_linear())
    return table.at(torch.tensor([5.0, 100.0, 400.0]))


def _constant(name: str) -> Any:
    def call(x: Any, time: Any) -> Any:
        from kexue.generative import diffusion

        variance = getattr(diffusion, name)()(x, time, _mixture().predict(x, time))
        return torch.as_tensor(variance).expand_as(x)

    return call


def _clip(variance: Any, time: Any, data_range: Any = None) -> Any:
    from kexue.generative.diffusion import clip_clean_variance

    return clip_clean_variance(variance, _linear(), time, data_range=data_range)


def _estimate(data: Any, generator: Any = None, **options: Any) -> Any:
    from kexue.generative.diffusion import estimate_clean_variance

    options = {"times": [100.0, 500.0], "per_dimension": True, **options}
    table = estimate_clean_variance(_mixture(), data, generator=_source(generator), **options)
    return table.values, table.standard_error


class _Moment(torch.nn.Module):
    """A network that sees time, for heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(2, dtype=torch.float64))

    def forward(self, x: Any, time: Any, condition: Any = None) -> Any:
        from torch.nn.functional import softplus

        return softplus(self.weight.to(x.dtype) * torch.sin(x) + time[:, None] / 1000 - 1)


class _Head(torch.nn.Module):
    """A head together with the mean that it stands beside."""

    def __init__(self, name: str) -> None:
        from kexue.generative import diffusion

        super().__init__()
        self.head = getattr(diffusion, name)(_Moment(), schedule=_linear())

    def forward(self, x: Any, time: Any) -> Any:
        return self.head(x, time, _mixture().predict(x, time))


def _loss(clean: Any, generator: Any = None, objective: str = "moment") -> Any:
    from kexue.generative.diffusion import NoiseResidualVariance, variance_loss

    torch.manual_seed(0)
    variance = NoiseResidualVariance(_Moment(), schedule=_linear())
    return variance_loss(
        variance, _mixture(), clean, objective=objective, generator=_source(generator)
    )


def _jacobian(x: Any, time: Any, generator: Any = None, num_probes: Any = None) -> Any:
    from kexue.generative.diffusion import JacobianVariance

    variance = JacobianVariance(_mixture(), num_probes=num_probes, generator=_source(generator))
    return variance(x, time)


def _optimal(grid: Any, num_steps: int, eta: float = 1.0) -> Any:
    from kexue.generative.diffusion import optimal_times

    table = _table(torch.tensor([9e-5, 0.2, 0.25, 0.3], dtype=torch.float64))
    return optimal_times(table, num_steps, grid=grid, eta=eta)


def _steps(sample: Any, model_output: Any, generator: Any = None, timestep: int = 749) -> Any:
    from kexue.generative.diffusion import AnalyticVarianceScheduler

    scheduler = AnalyticVarianceScheduler(_linear(), _table(torch.full((4,), 0.1)))
    scheduler.set_timesteps(4)
    return scheduler.step(model_output, timestep, sample, generator=_source(generator))


def _outputs(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "sample": rng.normal(size=(3, 2)),
        "model_output": rng.normal(size=(3, 2)),
        "generator": None,
    }


_PACKAGE = "kexue.generative.diffusion.variance"

ROWS = [
    *(
        Row(
            name=f"{_PACKAGE}.clean.{name}",
            make=_states,
            call=_constant(name),
            arrays=("x", "time"),
            backends=("torch",),
            batched=("x", "time"),
            without={"not_finite_is_refused": _NOT_FINITE, "wrong_rank_is_refused": _TIME_RANK},
        )
        for name in ("PointDataVariance", "StandardNormalDataVariance")
    ),
    Row(
        name=f"{_PACKAGE}.clean.TabulatedVariance",
        make=lambda rng: {
            "times": np.array([1.0, 300.0, 900.0]),
            "values": rng.uniform(size=(3, 2)),
        },
        call=_tabulated,
        arrays=("times", "values"),
        backends=("torch",),
        wrong={
            "times that decrease": lambda given: {**given, "times": given["times"].flip(0)},
            "a negative variance": lambda given: {**given, "values": -given["values"]},
            "another number of values": lambda given: {**given, "values": given["values"][:2]},
        },
    ),
    Row(
        name=f"{_PACKAGE}.clean.TabulatedVariance",
        make=_states,
        module=_table,
        arrays=("x",),
        backends=("torch",),
        batched=("x", "time"),
        wrong={"a time beyond the table": lambda given: {**given, "time": given["time"] + 500}},
        without={
            "not_finite_is_refused": "the values of x are not looked at, only its shape and dtype",
            "wrong_rank_is_refused": "a state of any rank that fits the entries is right",
            "wrong_dtype_is_refused": "the values of x are not looked at, only its shape and dtype",
            "docstring": "checked in the row above",
        },
    ),
    Row(
        name=f"{_PACKAGE}.clean.clip_clean_variance",
        make=lambda rng: {
            "variance": rng.normal(size=(3, 2)),
            "time": np.array([5.0, 300.0, 900.0]),
        },
        call=_clip,
        arrays=("variance",),
        backends=("torch",),
        batched=("variance", "time"),
        differentiable=("variance",),
        wrong={"a range that decreases": lambda given: {**given, "data_range": (1.0, -1.0)}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name=f"{_PACKAGE}.estimate.estimate_clean_variance",
        make=lambda rng: {"data": rng.normal(size=(6, 2)), "generator": None},
        call=_estimate,
        arrays=("data",),
        backends=("torch",),
        seeded="generator",
        wrong={
            "an unknown estimator": lambda given: {**given, "estimator": "guess"},
            "no draws": lambda given: {**given, "num_noise": 0},
            "no data": lambda given: {**given, "data": given["data"][:0]},
            "time zero": lambda given: {**given, "times": [0.0]},
        },
        without=_DRAWS,
    ),
    Row(
        name=f"{_PACKAGE}.grid.optimal_times",
        make=lambda rng: {
            "grid": np.array([1.0, 30.0, 200.0, 500.0, 900.0]),
            "num_steps": 3,
        },
        call=_optimal,
        arrays=("grid",),
        backends=("torch",),
        wrong={
            "too many steps": lambda given: {**given, "num_steps": 6},
            "no noise": lambda given: {**given, "eta": 0.0},
        },
    ),
    Row(
        name=f"{_PACKAGE}.grid.OptimalTimes",
        make=lambda rng: {"grid": np.array([1.0, 30.0, 900.0]), "num_steps": 2},
        call=_optimal,
        arrays=("grid",),
        backends=("torch",),
    ),
    *(
        Row(
            name=f"{_PACKAGE}.heads.{name}",
            make=_states,
            module=partial(_Head, name),
            arrays=("x",),
            backends=("torch",),
            batched=("x", "time"),
            wrong={"time zero": lambda given: {**given, "time": 0 * given["time"]}},
            without={"not_finite_is_refused": _NOT_FINITE},
        )
        for name in ("NoiseResidualVariance", "SquaredNoiseVariance")
    ),
    Row(
        name=f"{_PACKAGE}.heads.variance_loss",
        make=lambda rng: {"clean": rng.normal(size=(4, 2)), "generator": None},
        call=_loss,
        arrays=("clean",),
        backends=("torch",),
        seeded="generator",
        wrong={"an unknown objective": lambda given: {**given, "objective": "best"}},
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
    Row(
        name=f"{_PACKAGE}.jacobian.JacobianVariance",
        make=_states,
        call=_jacobian,
        arrays=("x", "time"),
        backends=("torch",),
        batched=("x", "time"),
        wrong={
            "no probes": lambda given: {**given, "num_probes": 0},
            "time zero": lambda given: {**given, "time": 0 * given["time"]},
        },
        without={"not_finite_is_refused": _NOT_FINITE, "wrong_rank_is_refused": _TIME_RANK},
    ),
    Row(
        name=f"{_PACKAGE}.scheduler.AnalyticVarianceScheduler",
        make=_outputs,
        call=_steps,
        arrays=("sample", "model_output"),
        backends=("torch",),
        seeded="generator",
        wrong={"a timestep that is not in the list": lambda given: {**given, "timestep": 5}},
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
    Row(
        name=f"{_PACKAGE}.scheduler.SchedulerOutput",
        make=_outputs,
        call=_steps,
        arrays=("sample", "model_output"),
        backends=("torch",),
        without={"not_finite_is_refused": _NOT_FINITE, **_DRAWS},
    ),
]
