"""The catalogue: what methods there are, and which of them have a study.

It is read from ``catalogue.toml`` and from the source of the studies; no study is imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from kexue.lab.errors import UsageError

__all__ = ["STUDIES", "Catalogue", "Entry"]

STUDIES = "kexue.studies"
_KNOWN = "does not hold: "
_BUDGETS = ("smoke", "quick", "full")


@dataclass(frozen=True)
class Entry:
    """One method: its titles, its field, its claim, and whether its study is there."""

    slug: str
    title: str
    title_zh: str
    field: str
    modules: tuple[str, ...]
    claim: str
    data: str
    known: str
    known_budgets: tuple[str, ...]
    package: str
    path: Path

    def expected(self, budget: str) -> str:
        """The verdict that a run in this budget is expected to find."""
        return "does not hold" if self.known and budget in self.known_budgets else "holds"

    @property
    def built(self) -> bool:
        """Whether the method has a study."""
        return self.path.is_file()

    @property
    def text(self) -> str:
        """The article: the docstring of the study."""
        if not self.built:
            raise UsageError(f"{self.slug!r} has no study yet: `kexue list` shows which ones have")
        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""

    def load(self) -> ModuleType:
        """Import the study."""
        if not self.built:
            raise UsageError(f"{self.slug!r} has no study yet: `kexue list` shows which ones have")
        return importlib.import_module(f"{self.package}.{self.slug}")


class Catalogue:
    """All methods of a package of studies, in the order of its ``catalogue.toml``.

    Parameters
    ----------
    package : str, optional
        The package that holds ``catalogue.toml`` and the studies. By default the one that the
        environment variable ``KEXUE_STUDIES`` names, else kexue's own.
    """

    def __init__(self, package: str | None = None) -> None:
        self.package = package or os.environ.get("KEXUE_STUDIES") or STUDIES

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Slug -> entry."""
        try:
            spec = importlib.util.find_spec(self.package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"expected a package of studies, got {self.package!r}: not importable")
        folder = Path(next(iter(spec.submodule_search_locations)))
        path = folder / "catalogue.toml"
        try:
            with open(path, "rb") as file:
                rows = tomllib.load(file)
        except FileNotFoundError:
            raise UsageError(f"the package {self.package} has no catalogue.toml") from None
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path} is no TOML file: {error}") from None
        return {slug: self._entry(slug, row, folder, path) for slug, row in rows.items()}

    def _entry(self, slug: str, row: dict[str, object], folder: Path, path: Path) -> Entry:
        known = str(row.get("known", ""))
        if known and not known.startswith(_KNOWN):
            raise UsageError(f"{path}: known of {slug!r} must start with {_KNOWN!r}, got {known!r}")
        try:
            return Entry(
                slug=slug,
                title=str(row["title"]),
                title_zh=str(row.get("title_zh", "")),
                field=str(row["field"]),
                modules=tuple(row.get("modules", ())),  # type: ignore[arg-type]
                claim=str(row.get("claim", "")),
                data=str(row.get("data", "")),
                known=known.removeprefix(_KNOWN),
                known_budgets=tuple(row.get("known_budgets", _BUDGETS)),  # type: ignore[arg-type]
                package=self.package,
                path=folder / f"{slug}.py",
            )
        except KeyError as error:
            raise UsageError(f"{path}: {slug!r} lacks {error}") from None

    def __getitem__(self, slug: str) -> Entry:
        entry = self.entries.get(slug)
        if entry is None:
            import difflib

            near = difflib.get_close_matches(slug, self.entries, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "`kexue list` shows all of them."
            raise UsageError(f"expected the slug of a method, got {slug!r}: {hint}")
        return entry

    def built(self) -> list[Entry]:
        """The methods that have a study."""
        return [entry for entry in self.entries.values() if entry.built]
