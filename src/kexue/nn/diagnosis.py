"""What diagnostics of a network have in common: a look inside without a trace, a kind of result.

A diagnostic hooks the modules it wants to see (:func:`observed`), leaves the model as it was
(:func:`untouched`), and returns a :class:`Diagnosis`: it prints as a table, becomes a dictionary,
draws itself, and says in findings what is wrong, how badly, and what to change.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Diagnosis", "Finding", "observed", "untouched"]

_SEVERITIES = ("error", "warning", "note")


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a network.

    Findings are ordered from the worst to the mildest.

    Parameters
    ----------
    severity : {"error", "warning", "note"}
        An error keeps the network from training, a warning may, a note is worth knowing.
    where : str
        Name of the module or parameter, as in ``named_modules``.
    message : str
        What is wrong, with its number.
    advice : str
        What to change.

    Raises
    ------
    ValueError
        For another severity.

    Examples
    --------
    >>> mild = Finding("note", "norm", "unused", "remove it")
    >>> bad = Finding("error", "fc1", "output second moment 2e+05", "divide the weight by 400")
    >>> print(sorted([mild, bad])[0])
    error: fc1: output second moment 2e+05; divide the weight by 400
    """

    severity: Literal["error", "warning", "note"]
    where: str
    message: str
    advice: str

    def __post_init__(self) -> None:
        if self.severity not in _SEVERITIES:
            raise ValueError(
                f"severity must be one of {', '.join(_SEVERITIES)}, got {self.severity!r}"
            )

    def __lt__(self, other: Finding) -> bool:
        return _SEVERITIES.index(self.severity) < _SEVERITIES.index(other.severity)

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}; {self.advice}"


class Diagnosis:
    """Base of the results of diagnostics, all of them frozen dataclasses.

    A subclass gives :meth:`rows` and :meth:`plot`, and :meth:`findings` where it can tell good from
    bad.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True)
    ... class Norms(Diagnosis):
    ...     norms: dict
    ...     def rows(self):
    ...         return [{"name": name, "norm": norm} for name, norm in self.norms.items()]
    >>> print(Norms({"fc1": 0.25, "fc2": 12345678.0}))
    name  norm
    fc1   0.25
    fc2   1.235e+07
    >>> Norms({"fc1": 0.25}).to_dict()
    {'norms': {'fc1': 0.25}}
    """

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows of the table, all with the same columns."""
        raise TypeError(f"{type(self).__name__} has no table")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result into ``ax``, a new one by default, and return it."""
        raise TypeError(f"{type(self).__name__} has no plot")

    def findings(self) -> tuple[Finding, ...]:
        """Return what is wrong, the worst first."""
        return ()

    def table(self) -> str:
        """Return the result as text, a line for each row."""
        return _table(self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as numbers, strings, lists and dictionaries, as JSON takes them."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    def __str__(self) -> str:
        return self.table()


@contextmanager
def observed(
    model: nn.Module,
    see: Callable[[str, nn.Module, tuple[Any, ...], Any], None],
    *,
    include: Callable[[str, nn.Module], bool] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Watch the calls of a model's modules while the block runs.

    Parameters
    ----------
    model : nn.Module
        What is watched.
    see : callable
        Called as ``see(name, module, inputs, output)`` after each call of a selected module.
    include : callable, optional
        ``include(name, module)`` selects modules; those without children by default. The model
        itself, which has no name, is never among them.

    Yields
    ------
    tuple of str
        Names of the selected modules, in the order of ``named_modules``.

    Raises
    ------
    ValueError
        If nothing is selected.

    Examples
    --------
    >>> model, shapes = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {}
    >>> def see(name, module, inputs, output):
    ...     shapes[name] = tuple(output.shape)
    >>> with observed(model, see):
    ...     _ = model(torch.zeros(2, 4))
    >>> shapes
    {'0': (2, 3), '1': (2, 3)}
    """
    wanted = include or (lambda name, module: next(module.children(), None) is None)
    chosen = {name: m for name, m in model.named_modules() if name and wanted(name, m)}
    if not chosen:
        raise ValueError(f"no module of {type(model).__name__} is selected")

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: see(name, module, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in chosen.items()]
    try:
        yield tuple(chosen)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def untouched(model: nn.Module, *, parameters: bool = True) -> Iterator[None]:
    """Put back what a pass through the model changes: parameters, gradients, buffers, random state.

    Values return bit for bit, also when the block raises. The random state is that of the CPU and
    of the devices of the model.

    Parameters
    ----------
    model : nn.Module
        What is used inside the block.
    parameters : bool
        False for a block that leaves the parameters alone: then they are not copied.

    Yields
    ------
    None

    Examples
    --------
    >>> model = nn.BatchNorm1d(3)
    >>> with untouched(model):
    ...     _ = model(torch.randn(5, 3))
    >>> model.running_mean
    tensor([0., 0., 0.])
    """
    weights, buffers = list(model.parameters()), list(model.buffers())
    kept = [*weights, *buffers] if parameters else buffers
    values = [tensor.detach().clone() for tensor in kept]
    gradients = [None if p.grad is None else (p.grad, p.grad.clone()) for p in weights]
    devices = {t.device for t in (*weights, *buffers) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices], device_type="cuda"):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(kept, values, strict=True):
                    tensor.copy_(value)
                for parameter, gradient in zip(weights, gradients, strict=True):
                    parameter.grad = None if gradient is None else gradient[0].copy_(gradient[1])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [list(rows[0]), *[[_cell(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.detach().cpu().tolist())
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no word for these; their names are read back by float().
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value
