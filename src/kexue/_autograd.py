"""Following gradients where the caller has switched them off for good."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["outside_inference_mode"]

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that needs gradients leave `torch.inference_mode`, with copies of tensors.

    `torch.enable_grad` has no effect in that mode, nor on tensors made in it: what is
    differentiated would be a constant.
    """

    @functools.wraps(function)
    def called(*args: P.args, **options: P.kwargs) -> R:
        given = (*args, *options.values())
        made_there = any(isinstance(one, Tensor) and one.is_inference() for one in given)
        if not made_there and not torch.is_inference_mode_enabled():
            return function(*args, **options)
        with torch.inference_mode(False):
            copies: Any = [_copied(one) for one in args]
            named: Any = {name: _copied(one) for name, one in options.items()}
            return function(*copies, **named)

    return called


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
