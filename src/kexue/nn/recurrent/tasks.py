"""Two tasks that cannot be solved without a long memory.

Source: Hochreiter and Schmidhuber 1997; Le, Jaitly and Hinton, https://arxiv.org/abs/1504.00941.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["SequenceTask", "adding_problem", "copy_memory"]


@dataclass(frozen=True)
class SequenceTask:
    """Sequences and what is to be said about them.

    Parameters
    ----------
    inputs : Tensor, shape (batch, length) or (batch, length, features)
        Symbols, or features.
    targets : Tensor
        (batch, 1) real numbers, or (batch, length) symbols.

    Examples
    --------
    >>> adding_problem(4, 10).inputs.shape
    torch.Size([4, 10, 2])
    """

    inputs: Shaped[Tensor, "batch length *features"]
    targets: Shaped[Tensor, "batch ..."]


def adding_problem(
    batch_size: int,
    length: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SequenceTask:
    """Return sequences of numbers, two of them marked, whose sum is asked for.

    The first feature is uniform on (0, 1), the second is one at one place of either half and zero
    elsewhere. Who always says 1 is wrong by the variance of the sum, 1/6.

    Parameters
    ----------
    batch_size : int
        Number of sequences.
    length : int
        Steps of each, at least 2.
    generator : torch.Generator, optional
        Source of randomness.
    dtype : torch.dtype
        Of inputs and targets.
    device : torch.device, optional
        Where they are; that of the generator by default.

    Returns
    -------
    SequenceTask
        Inputs (batch, length, 2), targets (batch, 1).

    Raises
    ------
    ValueError
        For a batch below one or a length below two.

    Examples
    --------
    >>> task = adding_problem(1000, 20, generator=torch.Generator().manual_seed(0))
    >>> round(task.targets.var().item(), 2)
    0.17
    """
    batch_size = _at_least("batch_size", batch_size, 1)
    length = _at_least("length", length, 2)
    source = _source(generator, device)
    values = torch.rand(batch_size, length, generator=generator, device=source, dtype=dtype)
    half = length // 2
    first = torch.randint(half, (batch_size, 1), generator=generator, device=source)
    second = torch.randint(half, length, (batch_size, 1), generator=generator, device=source)
    marked = torch.cat([first, second], dim=1)
    markers = torch.zeros_like(values).scatter_(1, marked, 1)
    total = values.gather(1, marked).sum(1, keepdim=True)
    inputs = torch.stack([values, markers], dim=-1)
    return SequenceTask(inputs.to(device or source), total.to(device or source))


def copy_memory(
    batch_size: int,
    delay: int,
    *,
    symbols: int = 8,
    copy_length: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> SequenceTask:
    r"""Return sequences that begin with symbols, to be repeated after a delay.

    The input is ``copy_length`` symbols out of 1 … ``symbols``, ``delay - 1`` blanks (0), the sign
    to go (``symbols + 1``), and ``copy_length`` blanks; the target is blanks and then the symbols.
    Without a memory the best mean cross entropy is
    :math:`\ell \log s / (d + 2 \ell)` for length :math:`\ell`, delay d and s symbols.

    Parameters
    ----------
    batch_size : int
        Number of sequences.
    delay : int
        Steps from the last symbol to the sign, at least one.
    symbols : int
        Kinds of symbols.
    copy_length : int
        How many are to be repeated.
    generator : torch.Generator, optional
        Source of randomness.
    device : torch.device, optional
        Where the result is; that of the generator by default.

    Returns
    -------
    SequenceTask
        Inputs and targets, int64, of shape (batch, delay + 2 copy_length).

    Raises
    ------
    ValueError
        For any size below one.

    Examples
    --------
    >>> task = copy_memory(1, 3, copy_length=2, generator=torch.Generator().manual_seed(0))
    >>> task.inputs
    tensor([[5, 8, 0, 0, 9, 0, 0]])
    >>> task.targets
    tensor([[0, 0, 0, 0, 0, 5, 8]])
    """
    batch_size = _at_least("batch_size", batch_size, 1)
    delay = _at_least("delay", delay, 1)
    symbols = _at_least("symbols", symbols, 1)
    copy_length = _at_least("copy_length", copy_length, 1)
    source = _source(generator, device)
    told = torch.randint(
        1, symbols + 1, (batch_size, copy_length), generator=generator, device=source
    )
    inputs = told.new_zeros(batch_size, delay + 2 * copy_length)
    targets = torch.zeros_like(inputs)
    inputs[:, :copy_length] = told
    inputs[:, copy_length + delay - 1] = symbols + 1
    targets[:, -copy_length:] = told
    return SequenceTask(inputs.to(device or source), targets.to(device or source))


def _source(
    generator: torch.Generator | None, device: torch.device | str | None
) -> torch.device | str | None:
    """Where numbers are drawn: a generator draws on its own device only."""
    return device if generator is None else generator.device


def _at_least(name: str, value: int, least: int) -> int:
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
