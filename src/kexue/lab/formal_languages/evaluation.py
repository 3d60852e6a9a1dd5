"""How well a model answers strings of lengths that it has not been trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kexue.lab.formal_languages.task import FormalLanguageTask
from kexue.lab.formal_languages.tasks import TASKS

__all__ = ["ExtrapolationResult", "evaluate_length_extrapolation"]


@dataclass(frozen=True)
class ExtrapolationResult:
    """Accuracy at each length.

    Parameters
    ----------
    lengths : tuple of int
        Lengths of the strings.
    token_accuracy : tuple of float
        Share of scored symbols that were right, for each length.
    sequence_accuracy : tuple of float
        Share of strings whose scored symbols were all right, for each length.
    score : float
        Mean of ``token_accuracy``.

    Examples
    --------
    >>> result = ExtrapolationResult((16, 32), (1.0, 0.75), (1.0, 0.0), 0.875)
    >>> dict(zip(result.lengths, result.token_accuracy))
    {16: 1.0, 32: 0.75}
    """

    lengths: tuple[int, ...]
    token_accuracy: tuple[float, ...]
    sequence_accuracy: tuple[float, ...]
    score: float


def evaluate_length_extrapolation(
    predict: Callable[[Tensor, int], Tensor],
    task: str | FormalLanguageTask,
    lengths: Sequence[int],
    *,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> ExtrapolationResult:
    """Score a model on one task at several lengths, one batch of strings each.

    Parameters
    ----------
    predict : callable
        ``predict(inputs, output_length)`` takes strings (batch, length) and returns logits
        (batch, output_length, output symbols), on any device. It is called without gradients.
    task : str or FormalLanguageTask
        What is asked; a name of ``TASKS``.
    lengths : sequence of int
        Lengths of the strings.
    batch_size : int
        Strings of each length.
    generator : torch.Generator, optional
        Source of the strings, and of nothing else: with the same seed, two models are given the
        same strings.

    Returns
    -------
    ExtrapolationResult
        Padding behind an answer is not scored.

    Raises
    ------
    ValueError
        For an unknown task, no lengths or one that is too short, and logits of another shape.

    Examples
    --------
    A model that always answers 0 is right at one symbol in five:

    >>> zeros = lambda inputs, output_length: torch.eye(5)[torch.zeros(64, output_length).long()]
    >>> seeded = torch.Generator().manual_seed(0)
    >>> result = evaluate_length_extrapolation(zeros, "bucket_sort", [50, 400], generator=seeded)
    >>> [round(accuracy, 1) for accuracy in result.token_accuracy]
    [0.2, 0.2]
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        task = TASKS[task]
    if not len(lengths):
        raise ValueError("lengths must have at least one length, got none")
    token_accuracy, sequence_accuracy = [], []
    for length in lengths:
        batch = task.sample(batch_size, length, generator=generator)
        shape = (*batch.targets.shape, len(task.output_vocabulary))
        with torch.no_grad():
            logits = predict(batch.inputs, batch.targets.shape[1])
        if logits.shape != shape:
            raise ValueError(
                f"predict must return logits of shape {shape}, got {tuple(logits.shape)}"
            )
        right = logits.argmax(-1).cpu() == batch.targets
        token_accuracy.append(right[batch.mask].double().mean().item())
        sequence_accuracy.append((right | ~batch.mask).all(-1).double().mean().item())
    score = sum(token_accuracy) / len(token_accuracy)
    return ExtrapolationResult(
        tuple(lengths), tuple(token_accuracy), tuple(sequence_accuracy), score
    )
