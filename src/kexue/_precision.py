"""Computing in the precision of the numbers given, whatever surrounds the call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

__all__ = ["without_autocast"]

_KINDS = ("cpu", "cuda")

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run as if `torch.autocast` were off: it would round products of matrices."""

    @functools.wraps(function)
    def called(*args: P.args, **options: P.kwargs) -> R:
        torch = sys.modules.get("torch")
        if torch is None:
            return function(*args, **options)
        with ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, _KINDS):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **options)

    return called
