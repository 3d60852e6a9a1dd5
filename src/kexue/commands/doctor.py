"""`kexue doctor`: what is wrong with my network?"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kexue.lab.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kexue.nn.diagnosis import Diagnosis

__all__ = ["diagnose", "doctor"]

Sections = dict[str, "Diagnosis"]


def doctor(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE",
            help="What returns (model, batch) or (model, batch, loss), such as mynet:build.",
        ),
    ],
    rate: Annotated[float, typer.Option(help="Learning rate of the step that is measured.")] = 1e-3,
    optimizer: Annotated[str, typer.Option(help="Its kind: sgd, adam or lamb.")] = "adam",
    tables: Annotated[bool, typer.Option(help="Print the tables behind the findings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Examine a network of yours: signal, size of a step, gradient through time.

    MODULE:CALLABLE is called without arguments and returns the model, a batch, and, if wanted, a
    loss. The batch is a tensor, a tuple of arguments or a dictionary of keyword arguments; the loss
    takes the model's output and returns one element. Without it, an output of one element, or its
    attribute ``loss``, is the loss. Exit status 1 says that something keeps the network from
    training.
    """
    model, batch, loss = _load(source)
    try:
        sections = diagnose(model, batch, loss, learning_rate=rate, optimizer=optimizer)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{source}: {error}") from error
    findings = sorted(finding for section in sections.values() for finding in section.findings())
    if as_json:
        found = [vars(finding) for finding in findings]
        everything = {name: section.to_dict() for name, section in sections.items()}
        print(json.dumps({"findings": found, **everything}, indent=2, allow_nan=False))
        return int(any(finding.severity == "error" for finding in findings))
    if tables:
        for name, section in sections.items():
            print(f"{name}\n{section.table()}\n")
    for finding in findings:
        print(f"{finding.severity:8} {finding.where}: {finding.message}")
        print(f"{'':8} {finding.advice}")
    looked_at = ", ".join(sections)
    print(f"{len(findings)} finding{'s' * (len(findings) != 1)} ({looked_at})")
    return int(any(finding.severity == "error" for finding in findings))


def diagnose(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    learning_rate: float = 1e-3,
    optimizer: Any = "adam",
) -> Sections:
    """Run every diagnostic that applies to a model and a batch.

    Parameters
    ----------
    model : nn.Module
        What is examined, in the mode in which it is; nothing of it changes.
    batch : Tensor, tuple or dict
        What it is called with: one argument, several, or by keyword.
    loss : callable, optional
        ``loss(output)`` returns one element. By default an output of one element, or its attribute
        ``loss``, is the loss; without any, gradients are not looked at.
    learning_rate : float
        Of the step that is measured.
    optimizer : {"sgd", "adam", "lamb"}
        Kind of the step.

    Returns
    -------
    dict of str to Diagnosis
        "signal" always; "step" where there is a loss; "gradient through time of NAME" for each
        recurrent module.

    Raises
    ------
    ValueError, TypeError
        Where the model, the batch or the loss does not fit.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> list(diagnose(model, torch.randn(3, 4), lambda y: y.square().mean()))
    ['signal', 'step']
    """
    import torch

    from kexue.nn.diagnosis import observed, untouched
    from kexue.nn.init import audit_signal
    from kexue.nn.recurrent import gradient_flow
    from kexue.nn.residual import measure_update

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    given, named = _arguments(batch)
    recurrent: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, torch.nn.RNN | torch.nn.LSTM | torch.nn.GRU):
            recurrent.setdefault(name, (module, inputs))

    # A model without parts is its own only part.
    whole = torch.nn.Sequential(model) if next(model.children(), None) is None else model
    with untouched(whole, parameters=False), torch.no_grad(), observed(whole, see):
        output = whole(*given, **named)
    if loss is None:
        loss = _own_loss(output)

    sections: Sections = {}
    sections["signal"] = audit_signal(whole, *given, compute_loss=loss, **named)
    if loss is not None and any(p.requires_grad for p in model.parameters()):
        sections["step"] = measure_update(
            model,
            lambda m: loss(m(*given, **named)),
            learning_rate=learning_rate,
            optimizer=optimizer,
        )
    for name, (module, inputs) in recurrent.items():
        # Packed sequences, of many lengths at once, have no single gradient through time.
        if isinstance(inputs[0], torch.Tensor):
            sections[f"gradient through time of {name}"] = gradient_flow(module, *inputs)
    return sections


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _own_loss(output: Any) -> Callable[[Any], Tensor] | None:
    """What a model says its loss is: its output, or the attribute of that name."""
    import torch

    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return lambda output: output
    if isinstance(getattr(output, "loss", None), torch.Tensor):
        return lambda output: output.loss
    return None


def _load(source: str) -> tuple[Any, Any, Any]:
    """Import a module from the path or the working directory, and call what builds the model."""
    module_name, _, name = source.partition(":")
    if not module_name or not name:
        raise UsageError(f"expected MODULE:CALLABLE, such as mynet:build, got {source!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise UsageError(
            f"there is no module {module_name!r} on the path or in this folder"
        ) from None
    build: Any = module
    for part in name.split("."):
        build = getattr(build, part, None)
        if build is None:
            raise UsageError(f"module {module_name!r} has no {name!r}")
    if not callable(build):
        raise UsageError(f"{source} must be callable, got {type(build).__name__}")
    built = build()
    if not isinstance(built, tuple) or len(built) not in (2, 3):
        kind = f"a tuple of {len(built)}" if isinstance(built, tuple) else type(built).__name__
        raise UsageError(f"{source} must return (model, batch) or (model, batch, loss), got {kind}")
    return built if len(built) == 3 else (*built, None)
