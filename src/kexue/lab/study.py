"""What a study sees of the outside: budget, seed, device, data, and the page that it writes.

A study is a module with a docstring (the article), and ``def run(lab: Lab) -> None``. It hands the
lab numbers, tables and figures; the lab decides where they are kept and how they are shown.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

from kexue.lab.data import Data
from kexue.lab.store import write_whole

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from rich.progress import Progress as RichProgress

__all__ = [
    "BUDGETS",
    "RELATIONS",
    "Budget",
    "Claim",
    "FigureFile",
    "Findings",
    "Lab",
    "Progress",
    "Table",
    "seeded",
]

Budget = Literal["smoke", "quick", "full"]
BUDGETS: tuple[str, ...] = get_args(Budget)
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}

T = TypeVar("T")
Module = TypeVar("Module", bound="torch.nn.Module")
Number = Any
"""A Python number, a numpy scalar or a tensor with one entry."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\.[a-z0-9]+")


@dataclass(frozen=True)
class Claim:
    """A measured number against an expected one; if ``judged``, the verdict rests on it."""

    statement: str
    measured: float
    relation: str
    expected: float
    judged: bool = True

    @property
    def holds(self) -> bool:
        """Whether the relation is true; never for NaN."""
        return bool(RELATIONS[self.relation](self.measured, self.expected))


@dataclass(frozen=True)
class Table:
    """Rows of equal columns, as they stand on the page."""

    name: str
    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass(frozen=True)
class FigureFile:
    """A figure that was saved as ``figures/<name>.svg`` and ``figures/<name>.png``."""

    name: str
    caption: str
    width: float
    """Width in inches, from which the page knows how large its letters are."""


@dataclass
class Findings:
    """What a study has handed to the lab so far."""

    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[FigureFile] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "claims": [{**asdict(claim), "holds": claim.holds} for claim in self.claims],
            "tables": [asdict(table) for table in self.tables],
            "figures": [asdict(figure) for figure in self.figures],
        }


class Progress(Generic[T]):
    """An iterable that shows how far it is, the time left, and the metrics of the moment."""

    def __init__(self, iterable: Iterable[T], label: str, bars: RichProgress | None) -> None:
        self._iterable = iterable
        self._label = label
        self._bars = bars
        self._task: Any = None

    def __iter__(self) -> Iterator[T]:
        if self._bars is None:
            yield from self._iterable
            return
        total = len(self._iterable) if isinstance(self._iterable, Sized) else None
        self._task = self._bars.add_task(self._label, total=total, metric="")
        try:
            for item in self._iterable:
                yield item
                self._bars.advance(self._task)
        finally:
            self._bars.remove_task(self._task)
            self._task = None

    def metric(self, **values: Number) -> None:
        """Show named numbers beside the bar; costs nothing where no bar is shown."""
        if self._bars is not None and self._task is not None:
            text = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
            self._bars.update(self._task, metric=text)


class Lab:
    """All that a study knows of the outside.

    Parameters
    ----------
    slug : str
        The study's name.
    folder : Path
        Where figures go; the caller turns the folder into a run.
    budget : {"smoke", "quick", "full"}
        A few seconds, at most 45 seconds on two cores, at most 8 minutes.
    seed : int
        The same seed gives the same numbers on the same machine.
    device : str
        A torch device.
    data_path : Path, optional
        The user's own data, for studies that take any.
    cache_folder : Path, optional
        Where expensive intermediates are kept between runs; none are kept without it.
    bars : rich.progress.Progress, optional
        Where progress is shown; nothing is shown without it.
    """

    def __init__(
        self,
        slug: str,
        folder: Path,
        *,
        budget: Budget = "quick",
        seed: int = 0,
        device: str = "cpu",
        data_path: Path | None = None,
        cache_folder: Path | None = None,
        bars: RichProgress | None = None,
    ) -> None:
        if budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
        self.slug = slug
        self.folder = folder
        self.budget = budget
        self.seed = seed
        self.data = Data(data_path, seed=seed)
        self.findings = Findings()
        self._device = device
        self._cache_folder = cache_folder
        self._bars = bars

    @property
    def device(self) -> torch.device:
        """The device that the user asked for."""
        import torch

        return torch.device(self._device)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a new torch generator on ``device``, seeded with the run's seed."""
        import torch

        return torch.Generator(device).manual_seed(self.seed)

    def pick(self, *, smoke: T, quick: T, full: T) -> T:
        """Return the value that belongs to the run's budget."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.budget]

    def progress(self, iterable: Iterable[T], label: str) -> Progress[T]:
        """Iterate with a progress bar, time left and, through ``metric``, the current numbers."""
        return Progress(iterable, label, self._bars)

    def claim(self, statement: str, measured: Number, relation: str, expected: Number) -> Claim:
        """Record a claim that the verdict rests on: a number against a number."""
        return self._record(statement, measured, relation, expected, judged=True)

    def observe(self, statement: str, measured: Number, relation: str, expected: Number) -> Claim:
        """Record what is reported beside the claims, but decides nothing."""
        return self._record(statement, measured, relation, expected, judged=False)

    def table(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        caption: str = "",
    ) -> None:
        """Put a table on the page; the keys of the first row are its columns.

        Parameters
        ----------
        name : str
            Heading of the table, unique in the study.
        rows : sequence of mappings
            One mapping a row, all with the same keys. Cells are text, numbers or None.
        caption : str, optional
            A sentence below the table.
        """
        if not rows:
            raise ValueError(f"table {name!r} must have at least one row, got none")
        if any(table.name == name for table in self.findings.tables):
            raise ValueError(f"table names must differ, got {name!r} twice")
        columns = list(rows[0])
        for row in rows:
            if list(row) != columns:
                raise ValueError(
                    f"every row of table {name!r} must have the columns {columns}, got {list(row)}"
                )
        cells = [[_cell(row[column]) for column in columns] for row in rows]
        self.findings.tables.append(Table(name, columns, cells, caption))

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Save a matplotlib figure as SVG and PNG and put it on the page.

        The SVG follows the reader's light or dark scheme; colours of the default cycle and black
        change with it, so leave text, axes and series at their defaults.

        Parameters
        ----------
        name : str
            File name without suffix: lower-case letters, digits, ``-`` and ``_``.
        figure : matplotlib.figure.Figure
            Closed afterwards.
        caption : str
            What to see in it, in a sentence or two; ``$TeX$`` is typeset.
        """
        from kexue.lab.report.figures import save_figure

        if not _NAME.fullmatch(name):
            raise ValueError(f"a figure's name is made of a-z, 0-9, '-' and '_', got {name!r}")
        if any(known.name == name for known in self.findings.figures):
            raise ValueError(f"figure names must differ, got {name!r} twice")
        width = float(figure.get_figwidth())
        save_figure(figure, self.folder / "figures", name)
        self.findings.figures.append(FigureFile(name, caption, width))

    def cache(
        self,
        name: str,
        build: Callable[[], Mapping[str, Any]],
        *,
        inputs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return ``build()``, or what an earlier run with the same inputs built.

        Parameters
        ----------
        name : str
            Name of the intermediate; with the inputs, unique in the study.
        build : callable
            Returns named torch tensors or numpy arrays (a ``state_dict``, say). What it draws must
            come from generators of its own, so that nothing after it depends on whether it ran.
        inputs : mapping, optional
            Further JSON values that the result depends on. The study, budget, seed, device, data
            file, code of the package and version of torch are always among the inputs.

        Returns
        -------
        dict
            The arrays, on the CPU, of the kind that ``build`` gave.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"a cache's name is made of a-z, 0-9, '-' and '_', got {name!r}")
        if self._cache_folder is None:
            return _read_arrays(_array_bytes(build()))
        key = self._cache_key(name, inputs)
        path = self._cache_folder / self.slug / f"{name}-{key}.safetensors"
        kept = _kept_arrays(path)
        if kept is not None:
            return kept
        content = _array_bytes(build())
        write_whole(path, content)
        # The round trip: a first run must see exactly what a second one will.
        return _read_arrays(content)

    def trained(
        self,
        name: str,
        module: Module,
        train: Callable[[], object],
        *,
        inputs: Mapping[str, Any] | None = None,
    ) -> Module:
        """Return ``module`` as ``train()`` leaves it, or with the weights of an earlier run.

        Parameters
        ----------
        name, inputs
            As in `cache`.
        module : torch.nn.Module
            With the weights that training starts from.
        train : callable
            Trains ``module`` in place. What it draws must come from generators of its own.

        Returns
        -------
        torch.nn.Module
            The same module, in evaluation mode.
        """

        def build() -> Mapping[str, Any]:
            train()
            return module.state_dict()

        module.load_state_dict(self.cache(name, build, inputs=inputs))
        return module.eval()

    def keep(self, name: str) -> Path:
        """Return where to write a file that stays with the run, a trained model for instance.

        Parameters
        ----------
        name : str
            File name: lower-case letters, digits, ``-``, ``_`` and a suffix.
        """
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(
                f"a kept file's name is made of a-z, 0-9, '-', '_' and a suffix, got {name!r}"
            )
        path = self.folder / "files" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def _record(
        self, statement: str, measured: Number, relation: str, expected: Number, *, judged: bool
    ) -> Claim:
        if relation not in RELATIONS:
            raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
        claim = Claim(
            statement,
            _number(measured, f"measured value of {statement!r}"),
            relation,
            _number(expected, f"expected value of {statement!r}"),
            judged,
        )
        if math.isnan(claim.expected):
            raise ValueError(f"the expected value of {statement!r} must be a number, got NaN")
        self.findings.claims.append(claim)
        return claim

    def _cache_key(self, name: str, inputs: Mapping[str, Any] | None) -> str:
        import torch

        facts = {
            "study": self.slug,
            "name": name,
            "budget": self.budget,
            "seed": self.seed,
            "device": self._device,
            "data": self.data.fingerprint(),
            "code": code_digest(),
            "torch": torch.__version__,
            "inputs": dict(inputs or {}),
        }
        try:
            text = json.dumps(facts, sort_keys=True)
        except TypeError as error:
            raise TypeError(f"inputs of cache {name!r} must be JSON values: {error}") from None
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's own source of randomness start from ``seed`` inside the block.

    Layers draw their weights from it. After the block it goes on as if nothing had been drawn, so
    that what comes later does not depend on the size of a network.
    """
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def code_digest() -> str:
    """Return a digest of all Python source of the package: a cache must not outlive the code."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _number(value: Any, what: str) -> float:
    value = _scalar(value)
    if hasattr(value, "shape"):
        raise TypeError(
            f"the {what} must be one number, got an array of shape {tuple(value.shape)}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"the {what} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"the {what} must be in the range of a float, got {value:.3e}") from None


def _cell(value: Any) -> Any:
    value = _scalar(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a table's cell must be text, a number or None, got {type(value).__name__}")


def _scalar(value: Any) -> Any:
    """Return the one Python value of a numpy scalar or of a tensor with one entry."""
    if hasattr(value, "item") and hasattr(value, "shape") and math.prod(value.shape) == 1:
        return value.item()
    return value


def _array_bytes(arrays: Mapping[str, Any]) -> bytes:
    """Return named arrays in the format of safetensors, which remembers their kind."""
    import numpy as np
    import torch
    from safetensors.torch import save

    if all(isinstance(array, torch.Tensor) for array in arrays.values()):
        kind = "torch"
        tensors = {name: array.detach().cpu() for name, array in arrays.items()}
    elif all(isinstance(array, np.ndarray) for array in arrays.values()):
        kind = "numpy"
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    else:
        kinds = sorted({type(array).__name__ for array in arrays.values()})
        raise TypeError(f"a cache holds torch tensors or numpy arrays, not both, got {kinds}")
    # Copies, because two names of one tensor (tied weights) are no reason to refuse it.
    plain = {name: array.clone().contiguous() for name, array in tensors.items()}
    return save(plain, metadata={"kind": kind})


def _kept_arrays(path: Path) -> dict[str, Any] | None:
    """Return what is kept at ``path``; None where nothing is, or nothing that can be read."""
    from safetensors import SafetensorError

    try:
        return _read_arrays(path.read_bytes())
    except (SafetensorError, OSError, ValueError):
        return None


def _read_arrays(content: bytes) -> dict[str, Any]:
    from safetensors.torch import load

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    arrays = load(content)
    if header["__metadata__"]["kind"] == "numpy":
        return {name: array.numpy() for name, array in arrays.items()}
    return arrays
