"""What the functions of this package ask of numbers and of choices."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

__all__: list[str] = []


def finite_number(name: str, value: Any) -> float:
    """Return a real number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Return a number above 0 as a float."""
    value = finite_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def count(name: str, value: Any) -> int:
    """Return an integer of at least 1."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if isinstance(value, bool) or integer < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")
    return integer


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Refuse what is not among the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
