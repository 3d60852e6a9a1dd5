"""Tasks without grammar: what is asked of a string can be asked of all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from kexue.lab.formal_languages.task import TaskBatch, _integers

__all__ = [
    "answered",
    "bucket_sort",
    "cycle_navigation",
    "draw_doubles",
    "draw_stacks",
    "draw_strings",
    "duplicate_string",
    "even_pairs",
    "final_stack",
    "missing_duplicate",
    "odds_first",
    "parity_check",
    "reverse_string",
]

Strings = Int64[Tensor, "batch length"]

_BLANK = 2
_POP, _PUSH, _END = 2, 3, 2


def answered(targets: Callable[[Tensor], Tensor], inputs: Strings) -> TaskBatch:
    """Answer by a function that gives equally many symbols for every string."""
    symbols = targets(inputs)
    return TaskBatch(inputs, symbols, torch.ones_like(symbols, dtype=torch.bool))


def draw_strings(
    symbols: int,
    targets: Callable[[Tensor], Tensor],
    batch_size: int,
    length: int,
    generator: torch.Generator | None,
) -> TaskBatch:
    """Draw every symbol for itself, one like the other."""
    return answered(targets, _integers(symbols, (batch_size, length), generator))


def even_pairs(inputs: Strings) -> Tensor:
    """Changes between a and b are even in number just when the string ends as it starts."""
    return (inputs[:, :1] == inputs[:, -1:]).long()


def parity_check(inputs: Strings) -> Tensor:
    return 1 - inputs.sum(-1, keepdim=True) % 2


def cycle_navigation(inputs: Strings) -> Tensor:
    """Symbols 0, 1, 2 are steps of 0, +1, -1 on a cycle of five places."""
    steps = torch.tensor([0, 1, -1])
    return steps[inputs].sum(-1, keepdim=True) % 5


def reverse_string(inputs: Strings) -> Tensor:
    return inputs.flip(-1)


def duplicate_string(inputs: Strings) -> Tensor:
    return inputs.repeat(1, 2)


def odds_first(inputs: Strings) -> Tensor:
    """The first, third, fifth, … symbol, then the second, fourth, sixth, …."""
    return torch.cat([inputs[:, ::2], inputs[:, 1::2]], -1)


def bucket_sort(inputs: Strings) -> Tensor:
    """Count each of five symbols; the place i is then in the bucket that it falls into."""
    counts = torch.stack([(inputs == symbol).sum(-1) for symbol in range(5)], -1)
    places = torch.arange(inputs.shape[1]).expand_as(inputs).contiguous()
    return torch.searchsorted(counts.cumsum(-1), places, right=True)


def missing_duplicate(inputs: Strings) -> Tensor:
    """In a word ww with one blank, the blank hides what stands in the same place of the other w."""
    half, odd = divmod(inputs.shape[1], 2)
    blank = inputs == _BLANK
    if odd or bool((blank.sum(-1) != 1).any()):
        raise ValueError("expected an even number of symbols, one of them a blank '_'")
    other = inputs.roll(half, -1)
    if bool(((inputs != other) & ~blank & ~blank.roll(half, -1)).any()):
        raise ValueError("expected a word twice, but its halves differ beside the blank")
    return other[blank].unsqueeze(-1)


def draw_doubles(batch_size: int, length: int, generator: torch.Generator | None) -> TaskBatch:
    """Draw a word, write it twice, and blank one symbol."""
    half = length // 2
    inputs = duplicate_string(_integers(2, (batch_size, half), generator))
    blank = _integers(2 * half, (batch_size, 1), generator)
    return answered(missing_duplicate, inputs.scatter(-1, blank, _BLANK))


def final_stack(inputs: Strings) -> TaskBatch:
    """Carry out the actions; the stack from bottom to top, then "end".

    What stands on the stack at first has been pushed there, too, so that all symbols are actions.
    """
    rows, length = inputs.shape
    is_action = inputs >= _POP
    if bool((is_action[:, :-1] & ~is_action[:, 1:]).any()):
        raise ValueError("expected a stack and then actions, got 'a' or 'b' after an action")
    pushed = torch.where(inputs >= _PUSH, inputs - _PUSH, inputs)
    row = torch.arange(rows)
    stack = torch.zeros(rows, length + 1, dtype=torch.int64)
    height = torch.zeros(rows, dtype=torch.int64)
    for symbol, pops in zip(pushed.T, (inputs == _POP).T, strict=True):
        # What a pop writes lies above the stack.
        stack[row, height] = symbol
        height = torch.where(pops, (height - 1).clamp(min=0), height + 1)
    stack[row, height] = _END
    mask = torch.arange(length + 1) <= height[:, None]
    return TaskBatch(inputs, stack * mask, mask)


def draw_stacks(batch_size: int, length: int, generator: torch.Generator | None) -> TaskBatch:
    """Draw the height of the stack, at least 1, its symbols, and as many actions as fit."""
    height = 1 + _integers(max(length - 1, 1), (batch_size, 1), generator)
    symbols = _integers(2, (batch_size, length), generator)
    actions = _POP + _integers(3, (batch_size, length), generator)
    return final_stack(torch.where(torch.arange(length) < height, symbols, actions))
