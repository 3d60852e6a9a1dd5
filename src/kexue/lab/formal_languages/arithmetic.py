"""Tasks with a grammar: expressions modulo 5, equations in one unknown, binary numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import add, mul, sub

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kexue.lab.formal_languages.task import TaskBatch, _integers, _integers_below

__all__ = [
    "EQUATION",
    "EXPRESSION",
    "MODULUS",
    "draw_binary",
    "draw_equations",
    "draw_expressions",
    "draw_roots",
    "draw_sums",
    "evaluate",
    "integer_root",
    "solve_binary",
    "solve_equations",
    "value_of_expressions",
    "value_of_sums",
]

MODULUS = 5
EXPRESSION = "01234+-*()"
# Equations are drawn without products, which come last: solving takes them.
EQUATION = "01234+-()z=*"

_PLUS, _MINUS, _TIMES, _OPEN, _CLOSE = (EXPRESSION.index(symbol) for symbol in "+-*()")
_AS_EQUATION = torch.tensor([EQUATION.index(symbol) for symbol in EXPRESSION])
_UNKNOWN, _EQUALS = EQUATION.index("z"), EQUATION.index("=")
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "negate": 3}
_APPLY: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul}

Strings = Int64[Tensor, "batch length"]


def value_of_sums(inputs: Strings) -> TaskBatch:
    """Evaluate digits and operators in turns, products before sums, from left to right."""
    digits, operators = inputs[:, ::2], inputs[:, 1::2]
    alternate = bool((digits < MODULUS).all()) and bool((operators >= MODULUS).all())
    if inputs.shape[1] % 2 == 0 or not alternate:
        raise ValueError("expected digits and operators in turns, from digit to digit")
    total, product = torch.zeros_like(digits[:, 0]), digits[:, 0]
    for operator, digit in zip(operators.T, digits[:, 1:].T, strict=True):
        times = operator == _TIMES
        total = torch.where(times, total, total + product)
        signed = torch.where(operator == _MINUS, -digit, digit)
        product = torch.where(times, product * digit % MODULUS, signed)
    return _scored(inputs, ((total + product) % MODULUS).unsqueeze(-1))


def draw_sums(batch_size: int, length: int, generator: torch.Generator | None) -> TaskBatch:
    """Draw (length + 1) // 2 digits and the operators between them."""
    inputs = _integers(MODULUS, (batch_size, length - (length % 2 == 0)), generator)
    operators = inputs[:, 1::2]
    inputs[:, 1::2] = _PLUS + _integers(3, tuple(operators.shape), generator)
    return value_of_sums(inputs)


def draw_expressions(batch_size: int, length: int, generator: torch.Generator | None) -> TaskBatch:
    """Draw expressions of the grammar below and evaluate them on the way.

    Up to four symbols: d, -d, (d), (-d); from five on: (E op E), divided at random.
    """
    symbols, values = _expressions(batch_size, length, 3, generator)
    return _scored(symbols, values.unsqueeze(-1))


def draw_equations(batch_size: int, length: int, generator: torch.Generator | None) -> TaskBatch:
    """Draw expressions without products, with their values, and hide one digit of each."""
    expression, values = _expressions(batch_size, length - 2, 2, generator)
    is_digit = expression < MODULUS
    chosen = _integers_below(is_digit.sum(-1, keepdim=True), generator)
    hidden = (is_digit & (is_digit.cumsum(-1) == chosen + 1)).long().argmax(-1, keepdim=True)
    digit = expression.gather(-1, hidden)
    left = _AS_EQUATION[expression].scatter(-1, hidden, _UNKNOWN)
    equals = torch.full((batch_size, 1), _EQUALS)
    return _scored(torch.cat([left, equals, values.unsqueeze(-1)], -1), digit)


def value_of_expressions(inputs: Strings) -> TaskBatch:
    """Parse and evaluate expressions, also those of a wider grammar than is drawn from."""
    values = [evaluate([EXPRESSION[i] for i in row]) for row in inputs.tolist()]
    return _scored(inputs, torch.tensor(values).unsqueeze(-1))


def solve_equations(inputs: Strings) -> TaskBatch:
    """Find the one value of z for which both sides agree."""
    unknowns = []
    for row in inputs.tolist():
        sides = "".join(EQUATION[i] for i in row).split("=")
        if len(sides) != 2:
            raise ValueError("expected one '='")
        solutions = [z for z in range(MODULUS) if len({evaluate(side, z) for side in sides}) == 1]
        if len(solutions) != 1:
            raise ValueError(f"expected one solution z, got {len(solutions)}")
        unknowns += solutions
    return _scored(inputs, torch.tensor(unknowns).unsqueeze(-1))


def evaluate(symbols: Sequence[str], unknown: int | None = None) -> int:
    """Return the value modulo 5, with ``unknown`` for z.

    Operators wait on a stack until one that binds less follows (Dijkstra's shunting yard), so that
    depth of brackets is no depth of recursion.
    """
    values: list[int] = []
    waiting: list[str] = []

    def apply_last() -> None:
        operator, right = waiting.pop(), values.pop()
        value = -right if operator == "negate" else _APPLY[operator](values.pop(), right)
        values.append(value % MODULUS)

    def refused(expected: str) -> ValueError:
        return ValueError(f"expected {expected} in {''.join(symbols)!r}")

    number = {str(digit): digit for digit in range(MODULUS)}
    if unknown is not None:
        number["z"] = unknown
    operand_follows = True
    for symbol in symbols:
        if operand_follows:
            if symbol in number:
                values.append(number[symbol])
                operand_follows = False
            elif symbol in ("(", "-"):
                waiting.append("(" if symbol == "(" else "negate")
            else:
                raise refused(f"a number before {symbol!r}")
        elif symbol == ")":
            while waiting and waiting[-1] != "(":
                apply_last()
            if not waiting:
                raise refused("an open bracket before ')'")
            waiting.pop()
        elif symbol in _APPLY:
            while waiting and _PRECEDENCE[waiting[-1]] >= _PRECEDENCE[symbol]:
                apply_last()
            waiting.append(symbol)
            operand_follows = True
        else:
            raise refused(f"an operator before {symbol!r}")
    if operand_follows:
        raise refused("a number at the end")
    while waiting:
        if waiting[-1] == "(":
            raise refused("a closing bracket")
        apply_last()
    return values[0] % MODULUS


def _expressions(
    batch_size: int, length: int, operators: int, generator: torch.Generator | None
) -> tuple[Strings, Int64[Tensor, " batch"]]:
    """Expressions with the first ``operators`` of + - *, and their values.

    All brackets of one depth, in all strings, are opened in one step; values then come from the
    innermost brackets outwards. In numpy, which takes less time to start where arrays are short.
    """
    symbols = np.empty(batch_size * length, np.int64)
    start = np.arange(batch_size) * length
    size = np.full(batch_size, length)
    depths: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(start):
        composite = size >= 5
        digit = _write_terminals(symbols, start[~composite], size[~composite], generator)
        start, size = start[composite], size[composite]
        left = 1 + _integers_below(torch.from_numpy(size - 4), generator).numpy()
        operator = _PLUS + _integers(operators, left.shape, generator).numpy()
        symbols[start], symbols[start + size - 1] = _OPEN, _CLOSE
        symbols[start + 1 + left] = operator
        depths.append((composite, digit, operator))
        start = np.concatenate([start + 1, start + 2 + left])
        size = np.concatenate([left, size - 3 - left])
    values = start
    for composite, digit, operator in reversed(depths):
        one, two = values.reshape(2, -1)
        signed = np.where(operator == _MINUS, -two, two)
        values = np.empty(composite.shape, np.int64)
        values[~composite] = digit
        values[composite] = np.where(operator == _TIMES, one * two, one + signed) % MODULUS
    return torch.from_numpy(symbols.reshape(batch_size, length)), torch.from_numpy(values)


def _write_terminals(
    symbols: np.ndarray, start: np.ndarray, size: np.ndarray, generator: torch.Generator | None
) -> Int64[np.ndarray, " terminals"]:
    """Write d, -d, (d) or (-d), by size, and return the values."""
    digit = _integers(MODULUS, start.shape, generator).numpy()
    bracketed, negative = size >= 3, size % 2 == 0
    symbols[start[bracketed]] = _OPEN
    symbols[(start + size - 1)[bracketed]] = _CLOSE
    symbols[(start + bracketed)[negative]] = _MINUS
    symbols[start + bracketed + negative] = digit
    return np.where(negative, -digit, digit) % MODULUS


def solve_binary(operate: Callable[[int, int], int], inputs: Strings) -> TaskBatch:
    """Answer two numbers with an operator between them by a number, then "end"."""
    results = []
    for text in _digits(inputs):
        numbers = text.split("2")
        if len(numbers) != 2 or not all(numbers):
            raise ValueError("expected two binary numbers with one operator between them")
        results.append(f"{operate(int(numbers[0], 2), int(numbers[1], 2)):b}2")
    return _padded(inputs, results, inputs.shape[1] + 1)


def draw_binary(
    operate: Callable[[int, int], int],
    batch_size: int,
    length: int,
    generator: torch.Generator | None,
) -> TaskBatch:
    """Draw the place of the operator, and numbers without leading zeros on both sides."""
    inputs = _integers(2, (batch_size, length), generator)
    place = 1 + _integers(length - 2, (batch_size, 1), generator)
    inputs[:, 0] = 1
    inputs.scatter_(-1, place, 2).scatter_(-1, place + 1, 1)
    return solve_binary(operate, inputs)


def integer_root(inputs: Strings) -> TaskBatch:
    """Answer numbers by the integer part of the square root, in half as many digits, rounded up."""
    width = (inputs.shape[1] + 1) // 2
    roots = [f"{math.isqrt(int(text, 2)):b}".zfill(width) for text in _digits(inputs)]
    return _padded(inputs, roots, width)


def draw_roots(batch_size: int, length: int, generator: torch.Generator | None) -> TaskBatch:
    """Draw numbers without leading zeros."""
    inputs = _integers(2, (batch_size, length), generator)
    inputs[:, 0] = 1
    return integer_root(inputs)


def _digits(inputs: Strings) -> list[str]:
    """Write each row as text, its symbols as digits."""
    return [row.tobytes().decode() for row in (inputs + ord("0")).numpy().astype(np.uint8)]


def _padded(inputs: Strings, answers: list[str], width: int) -> TaskBatch:
    padded = "".join(answer.ljust(width, " ") for answer in answers).encode()
    symbols = np.frombuffer(padded, np.uint8).reshape(len(answers), width)
    mask = torch.from_numpy(symbols != ord(" "))
    return TaskBatch(inputs, torch.from_numpy(symbols.astype(np.int64) - ord("0")) * mask, mask)


def _scored(inputs: Strings, targets: Tensor) -> TaskBatch:
    return TaskBatch(inputs, targets, torch.ones_like(targets, dtype=torch.bool))
