"""One row of the contract: what a public name takes, and which promises it makes.

A row is data. `test_contract.py` turns it into checks; a method adds a file `rows/<slug>.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Valid input for one public name.

    Every check that can run on the row does. A check that has no meaning for it is named in
    `without`, with the reason; the checks are the functions of `test_contract.py`.
    """

    name: str
    """Full name below the module that defines it: ``kexue.stats.angles.cosine_summary``."""

    make: Callable[[np.random.Generator], Arguments]
    """Valid keyword arguments for `call`; arrays are numpy float64, whatever the backend."""

    call: Callable[..., Any] | None = None
    """What is run with them; the public object itself by default. For a class: build and use it."""

    arrays: tuple[str, ...] = ()
    """Arguments that are real arrays: they are converted, strided, poisoned and watched."""

    backends: tuple[str, ...] = ("numpy", "torch")
    """Kinds of array that are accepted."""

    batched: tuple[str, ...] = ()
    """Arguments with a leading batch dimension over which the call is a loop."""

    differentiable: tuple[str, ...] = ()
    """Arguments with respect to which torch.autograd.gradcheck must pass."""

    float32_rtol: float = 1e-4
    """Agreement of float32 with float64 input."""

    seeded: str | None = None
    """Name of the argument that takes a random source: ``generator`` or ``random_state``."""

    wrong: Mapping[str, Callable[[Arguments], Arguments]] = field(default_factory=dict)
    """Further input that must be refused: what is wrong about it -> the changed arguments."""

    estimators: Callable[[], list[Any]] | None = None
    """Instances that scikit-learn's check_estimator must accept."""

    module: Callable[[], Any] | None = None
    """Builds the nn.Module whose forward takes `make`'s arguments (then `call` is not needed)."""

    instance: Callable[[], Any] | None = None
    """Builds an object that must survive pickling (a dataclass, a schedule, a fitted thing)."""

    compiles: bool = False
    """Whether torch.compile of the call is promised."""

    without: Mapping[str, str] = field(default_factory=dict)
    """Checks that have no meaning here -> why."""

    @property
    def public(self) -> Any:
        """The public object itself."""
        module, _, attribute = self.name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    def run(self, arguments: Arguments) -> Any:
        """Call with these arguments."""
        if self.module is not None:
            raise TypeError("a module's row is run by the checks, which build it first")
        return (self.call or self.public)(**arguments)
