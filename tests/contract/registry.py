"""All rows of `rows/`, and all public names that need one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import contract.rows
import kexue
from contract.row import Row

METHOD_PACKAGES = (
    "arithmetic", "linalg", "stats", "nn", "losses", "optim", "models", "training", "generative",
    "retrieval",
)  # fmt: skip


def rows() -> list[Row]:
    """Every row, in the order of the slugs."""
    found: list[Row] = []
    for info in pkgutil.iter_modules(contract.rows.__path__):
        found += importlib.import_module(f"contract.rows.{info.name}").ROWS
    return found


def modules() -> Iterator[ModuleType]:
    """Every module of the library proper."""
    for info in pkgutil.walk_packages(kexue.__path__, "kexue."):
        if info.name.split(".")[1] in METHOD_PACKAGES:
            yield importlib.import_module(info.name)


def public_names() -> list[str]:
    """Every callable that a module lists in `__all__`, under the module that defines it."""
    names = set()
    for module in modules():
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            # A type alias is no name of ours, although some are callable.
            if callable(thing) and str(getattr(thing, "__module__", "")).startswith("kexue."):
                names.add(f"{thing.__module__}.{name}")
    return sorted(names)
