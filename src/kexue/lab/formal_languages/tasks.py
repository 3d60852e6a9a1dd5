"""The fifteen tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import add, mul

import torch
from torch import Tensor

from kexue.lab.formal_languages import arithmetic, strings
from kexue.lab.formal_languages.strings import answered, draw_strings
from kexue.lab.formal_languages.task import FormalLanguageTask, TaskBatch

__all__ = ["TASKS"]

_NO_OR_YES = ("no", "yes")
_DIGITS = tuple("01234")
_END = ("end",)


def _one(length: int) -> int:
    return 1


def _same(length: int) -> int:
    return length


def _one_more(length: int) -> int:
    return length + 1


def _twice(length: int) -> int:
    return 2 * length


def _half(length: int) -> int:
    return (length + 1) // 2


def _on_any_string(
    level: str,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    targets: Callable[[Tensor], Tensor],
    answer_length: Callable[[int], int],
) -> FormalLanguageTask:
    answer = partial(answered, targets)
    draw = partial(draw_strings, len(inputs), targets)
    return _task(level, name, inputs, outputs, draw, answer, answer_length)


def _task(
    level: str,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    draw: Callable[[int, int, torch.Generator | None], TaskBatch],
    answer: Callable[[Tensor], TaskBatch],
    answer_length: Callable[[int], int],
    *,
    minimum_length: int = 1,
    further_symbols: str = "",
) -> FormalLanguageTask:
    return FormalLanguageTask(
        name=name,
        level=level,
        input_vocabulary=tuple(inputs),
        output_vocabulary=tuple(outputs),
        minimum_length=minimum_length,
        random_accuracy=1 / len(outputs),
        draw=draw,
        answer=answer,
        answer_length=answer_length,
        further_symbols=tuple(further_symbols),
    )


_REGULAR = (
    _on_any_string("regular", "even_pairs", "ab", _NO_OR_YES, strings.even_pairs, _one),
    _task(
        "regular",
        "modular_arithmetic_simple",
        "01234+-*",
        _DIGITS,
        arithmetic.draw_sums,
        arithmetic.value_of_sums,
        _one,
    ),
    _on_any_string("regular", "parity_check", "ab", _NO_OR_YES, strings.parity_check, _one),
    _on_any_string("regular", "cycle_navigation", "012", _DIGITS, strings.cycle_navigation, _one),
)

_CONTEXT_FREE = (
    _task(
        "deterministic context-free",
        "modular_arithmetic",
        arithmetic.EXPRESSION,
        _DIGITS,
        arithmetic.draw_expressions,
        arithmetic.value_of_expressions,
        _one,
    ),
    _on_any_string(
        "deterministic context-free", "reverse_string", "ab", "ab", strings.reverse_string, _same
    ),
    _task(
        "deterministic context-free",
        "solve_equation",
        arithmetic.EQUATION.removesuffix("*"),
        _DIGITS,
        arithmetic.draw_equations,
        arithmetic.solve_equations,
        _one,
        minimum_length=3,
        further_symbols="*",
    ),
    _task(
        "deterministic context-free",
        "stack_manipulation",
        ("a", "b", "pop", "push a", "push b"),
        ("a", "b", *_END),
        strings.draw_stacks,
        strings.final_stack,
        _one_more,
    ),
)

_CONTEXT_SENSITIVE = (
    _task(
        "context-sensitive",
        "binary_addition",
        "01+",
        ("0", "1", *_END),
        partial(arithmetic.draw_binary, add),
        partial(arithmetic.solve_binary, add),
        _one_more,
        minimum_length=3,
    ),
    _task(
        "context-sensitive",
        "binary_multiplication",
        "01*",
        ("0", "1", *_END),
        partial(arithmetic.draw_binary, mul),
        partial(arithmetic.solve_binary, mul),
        _one_more,
        minimum_length=3,
    ),
    _task(
        "context-sensitive",
        "compute_sqrt",
        "01",
        "01",
        arithmetic.draw_roots,
        arithmetic.integer_root,
        _half,
    ),
    _on_any_string(
        "context-sensitive", "duplicate_string", "ab", "ab", strings.duplicate_string, _twice
    ),
    _task(
        "context-sensitive",
        "missing_duplicate",
        "ab_",
        "ab",
        strings.draw_doubles,
        partial(answered, strings.missing_duplicate),
        _one,
        minimum_length=2,
    ),
    _on_any_string("context-sensitive", "odds_first", "ab", "ab", strings.odds_first, _same),
    _on_any_string(
        "context-sensitive", "bucket_sort", _DIGITS, _DIGITS, strings.bucket_sort, _same
    ),
)

TASKS: dict[str, FormalLanguageTask] = {
    task.name: task for task in (*_REGULAR, *_CONTEXT_FREE, *_CONTEXT_SENSITIVE)
}
"""By name, level after level."""
