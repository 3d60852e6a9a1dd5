"""A task on strings: its symbols, strings drawn at random, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

__all__ = ["FormalLanguageTask", "TaskBatch"]


@dataclass(frozen=True)
class TaskBatch:
    """Strings with their answers; symbols are numbers of the task's vocabularies.

    Parameters
    ----------
    inputs : Tensor, shape (batch, length)
        int64, symbols of the input vocabulary.
    targets : Tensor, shape (batch, output_length)
        int64, symbols of the output vocabulary; 0 where nothing is scored.
    mask : Tensor, shape (batch, output_length)
        bool, True where the answer has a symbol, False on the padding behind it.

    Examples
    --------
    >>> from kexue.lab.formal_languages import TASKS
    >>> batch = TASKS["binary_addition"].sample(4, 9)
    >>> batch.inputs.shape, batch.targets.shape
    (torch.Size([4, 9]), torch.Size([4, 10]))
    """

    inputs: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch output_length"]
    mask: Bool[Tensor, "batch output_length"]


@dataclass(frozen=True)
class FormalLanguageTask:
    """One task; ``TASKS`` has fifteen of them.

    Parameters
    ----------
    name : str
        As in ``TASKS``.
    level : str
        "regular", "deterministic context-free" or "context-sensitive".
    input_vocabulary, output_vocabulary : tuple of str
        Symbols; a symbol's number is its place.
    minimum_length : int
        Length of the shortest string.
    random_accuracy : float
        Share of symbols that a uniform guess among the output symbols gets right. (For tasks that
        write "end" the paper says 0.5, the guess of someone who knows where the end is.)
    draw : callable
        ``draw(batch_size, length, generator)`` draws strings and answers them.
    answer : callable
        ``answer(inputs)`` answers given strings, or refuses them by a ValueError.
    answer_length : callable
        ``answer_length(length)`` is the number of output symbols, padding included.
    further_symbols : tuple of str
        Symbols that are never drawn, but that ``solve`` takes, numbered after the vocabulary.

    Examples
    --------
    >>> from kexue.lab.formal_languages import TASKS
    >>> "".join(TASKS["reverse_string"].solve("aabba"))
    'abbaa'
    >>> TASKS["binary_addition"].solve("10010+101")
    ['1', '0', '1', '1', '1', 'end']
    """

    name: str
    level: str
    input_vocabulary: tuple[str, ...]
    output_vocabulary: tuple[str, ...]
    minimum_length: int
    random_accuracy: float
    draw: Callable[[int, int, torch.Generator | None], TaskBatch] = field(repr=False)
    answer: Callable[[Tensor], TaskBatch] = field(repr=False)
    answer_length: Callable[[int], int] = field(repr=False)
    further_symbols: tuple[str, ...] = field(default=(), repr=False)

    def output_length(self, length: int) -> int:
        """Return the number of output symbols, padding included, for strings of this length.

        Raises
        ------
        ValueError
            For a length below ``minimum_length``.
        """
        self._check_length(length)
        return self.answer_length(length)

    def solve(self, symbols: Sequence[str]) -> list[str]:
        """Return the answer to one string, whether or not ``sample`` could have drawn it.

        Parameters
        ----------
        symbols : sequence of str
            Of the input vocabulary; a plain string where all symbols have one letter.

        Returns
        -------
        list of str
            Symbols of the output vocabulary, as they are scored: with "end" where the task has it,
            and a square root with leading zeros.

        Raises
        ------
        ValueError
            For unknown symbols, too few of them, or a string that is none of the task's.
        """
        known = self.input_vocabulary + self.further_symbols
        number = {symbol: i for i, symbol in enumerate(known)}
        for symbol in symbols:
            if symbol not in number:
                raise ValueError(f"{self.name} knows the symbols {known}, got {symbol!r}")
        self._check_length(len(symbols))
        try:
            batch = self.answer(torch.tensor([[number[symbol] for symbol in symbols]]))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return [self.output_vocabulary[i] for i in batch.targets[batch.mask].tolist()]

    def sample(
        self, batch_size: int, length: int, *, generator: torch.Generator | None = None
    ) -> TaskBatch:
        """Draw strings, with their answers.

        Parameters
        ----------
        batch_size : int
            Number of strings.
        length : int
            Symbols of a string. Tasks that have strings of odd or of even length only take one
            symbol less where needed.
        generator : torch.Generator, optional
            Source of the draws; the batch is on the CPU wherever it is.

        Returns
        -------
        TaskBatch

        Raises
        ------
        ValueError
            For a length below ``minimum_length`` or a ``batch_size`` below 1.
        """
        self._check_length(length)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return self.draw(batch_size, length, generator)

    def _check_length(self, length: int) -> None:
        if length < self.minimum_length:
            raise ValueError(
                f"{self.name} needs strings of at least {self.minimum_length} symbols, got {length}"
            )


def _integers(
    high: int, shape: tuple[int, ...], generator: torch.Generator | None
) -> Int64[Tensor, "..."]:
    """Draw numbers below ``high``, where the generator is, and bring them here."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(high, shape, generator=generator, device=device).cpu()


def _integers_below(
    high: Int64[Tensor, "*shape"], generator: torch.Generator | None
) -> Int64[Tensor, "*shape"]:
    """The same with a bound for each number."""
    device = torch.device("cpu") if generator is None else generator.device
    uniform = torch.rand(high.shape, generator=generator, device=device, dtype=torch.float64)
    return (uniform.cpu() * high).long()
