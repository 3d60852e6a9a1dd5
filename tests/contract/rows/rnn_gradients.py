"""Contract rows of kexue.nn.recurrent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from contract.row import Row

_NOT_FINITE = (
    "a network is run in loops on accelerators, where looking at values costs a synchronisation"
)


def _sequence(rng: np.random.Generator) -> dict[str, Any]:
    return {"input": rng.normal(size=(2, 5, 3))}


def _lstm(dtype: Any) -> Any:
    import torch

    torch.manual_seed(0)
    module = torch.nn.LSTM(3, 4, batch_first=True)
    return module.to(dtype) if dtype.is_floating_point else module


def _diagnosed(name: str) -> Callable[..., Any]:
    def call(input: Any, **options: Any) -> Any:
        import kexue.nn.recurrent as recurrent

        return getattr(recurrent, name)(_lstm(input.dtype), input, **options)

    return call


def _contributions(input: Any) -> Any:
    from kexue.nn.recurrent import gradient_contributions

    module = _lstm(input.dtype)
    return gradient_contributions(module, input, lambda output: output.square().sum())


def _initialised(max_timescale: float, recurrent: str = "orthogonal", generator: Any = None) -> Any:
    import torch

    from kexue.nn.recurrent import recurrent_init_

    module = recurrent_init_(
        torch.nn.GRU(3, 4), recurrent=recurrent, max_timescale=max_timescale, generator=generator
    )
    return list(module.parameters())


def _drawn(labels: list[str]) -> Any:
    from matplotlib import pyplot as plt

    from kexue.nn.recurrent import plot_gradient_flow

    flow = _result("gradient_flow")()
    ax = plot_gradient_flow(dict.fromkeys(labels, flow))
    heights = [line.get_ydata() for line in ax.get_lines()]
    plt.close(ax.figure)
    return heights


def _result(name: str) -> Callable[[], Any]:
    def build() -> Any:
        import torch

        call = _contributions if name == "gradient_contributions" else _diagnosed(name)
        return call(torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 5, 3))

    return build


def _task() -> Any:
    from kexue.nn.recurrent import copy_memory

    return copy_memory(2, 3)


def _cell() -> Any:
    from kexue.nn.recurrent import OutputGatedGRU

    return OutputGatedGRU(3, 4, batch_first=True)


def _diagnostic(module: str, name: str, call: Callable[..., Any], **more: Any) -> Row:
    return Row(
        name=f"kexue.nn.recurrent.{module}.{name}",
        make=_sequence,
        call=call,
        arrays=("input",),
        backends=("torch",),
        wrong={
            "another width": lambda given: {"input": given["input"][..., :2]},
            "no step": lambda given: {"input": given["input"][:, :0]},
        },
        **more,
    )


def _dataclass(module: str, name: str, instance: Callable[[], Any]) -> Row:
    return Row(
        name=f"kexue.nn.recurrent.{module}.{name}",
        make=lambda rng: vars(instance()),
        backends=("torch",),
        instance=instance,
    )


ROWS = [
    Row(
        name="kexue.nn.recurrent.cell.OutputGatedGRU",
        make=_sequence,
        module=_cell,
        arrays=("input",),
        backends=("torch",),
        batched=("input",),
        differentiable=("input",),
        compiles=True,
        wrong={
            "another width": lambda given: {"input": given["input"][..., :2]},
            "no step": lambda given: {"input": given["input"][:, :0]},
        },
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    _dataclass(
        "contributions", "GradientContributions", _result("gradient_contributions")
    ),
    _diagnostic("contributions", "gradient_contributions", _contributions),
    _dataclass("flow", "GradientFlow", _result("gradient_flow")),
    _diagnostic("flow", "gradient_flow", _diagnosed("gradient_flow")),
    Row(
        name="kexue.nn.recurrent.flow.plot_gradient_flow",
        make=lambda rng: {"labels": ["one", "two"]},
        call=_drawn,
        backends=("torch",),
        wrong={"nothing": lambda given: {"labels": []}},
    ),
    _dataclass("gates", "GateTerms", _result("gate_terms")),
    _diagnostic("gates", "gate_terms", _diagnosed("gate_terms")),
    Row(
        name="kexue.nn.recurrent.initialization.recurrent_init_",
        make=lambda rng: {"max_timescale": 20.0},
        call=_initialised,
        backends=("torch",),
        seeded="generator",
        wrong={
            "no time to forget": lambda given: {"max_timescale": 2.0},
            "another start": lambda given: {**given, "recurrent": "normal"},
        },
    ),
    _dataclass("jacobians", "RecurrentJacobians", _result("recurrent_jacobians")),
    _diagnostic("jacobians", "recurrent_jacobians", _diagnosed("recurrent_jacobians")),
    _dataclass("tasks", "SequenceTask", _task),
    Row(
        name="kexue.nn.recurrent.tasks.adding_problem",
        make=lambda rng: {"batch_size": 3, "length": 7},
        backends=("torch",),
        seeded="generator",
        wrong={
            "one step": lambda given: {**given, "length": 1},
            "no sequence": lambda given: {**given, "batch_size": 0},
        },
    ),
    Row(
        name="kexue.nn.recurrent.tasks.copy_memory",
        make=lambda rng: {"batch_size": 3, "delay": 7},
        backends=("torch",),
        seeded="generator",
        wrong={
            "no delay": lambda given: {**given, "delay": 0},
            "no sequence": lambda given: {**given, "batch_size": 0},
            "no symbol": lambda given: {**given, "symbols": 0},
        },
    ),
]  # fmt: skip
