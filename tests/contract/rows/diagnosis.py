"""Contract rows of kexue.nn.diagnosis, which the diagnostics share."""

from __future__ import annotations

from typing import Any

from contract.row import Row


def _model() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())


def _observe(model: Any, include: Any) -> int:
    from kexue.nn.diagnosis import observed

    with observed(model, print, include=include) as names:
        return len(names)


def _untouch(model: Any) -> Any:
    from kexue.nn.diagnosis import untouched

    with untouched(model):
        model[0].weight.data.zero_()
    return model[0].weight != 0


def _finding() -> Any:
    from kexue.nn.diagnosis import Finding

    return Finding("error", "fc1", "output second moment 2e+05", "divide the weight by 400")


ROWS = [
    Row(
        name="kexue.nn.diagnosis.Diagnosis",
        make=lambda rng: {},
        call=lambda: len(_finding().__class__.__mro__),
        backends=("torch",),
    ),
    Row(
        name="kexue.nn.diagnosis.Finding",
        make=lambda rng: {
            "severity": "note", "where": "norm", "message": "unused", "advice": "remove it",
        },
        instance=_finding,
        wrong={"a severity of its own": lambda given: {**given, "severity": "fatal"}},
    ),
    Row(
        name="kexue.nn.diagnosis.observed",
        make=lambda rng: {"model": _model(), "include": None},
        call=_observe,
        backends=("torch",),
        wrong={"nothing selected": lambda given: {**given, "include": lambda name, module: False}},
    ),
    Row(
        name="kexue.nn.diagnosis.untouched",
        make=lambda rng: {"model": _model()},
        call=_untouch,
        backends=("torch",),
    ),
]  # fmt: skip
