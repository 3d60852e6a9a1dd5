"""What counts as a pair scorer, and what it may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from kexue.retrieval.cur.storage import Block

__all__ = ["Scorer"]


@runtime_checkable
class _Predictor(Protocol):
    def predict(self, pairs: list[tuple[Any, Any]], /) -> Any: ...


Scorer: TypeAlias = Callable[[list[tuple[Any, Any]]], Any] | _Predictor
"""Takes a list of (query, item) pairs, returns one number for each, the better the larger."""


def scoring_function(scorer: Any) -> Callable[[list[tuple[Any, Any]]], Any]:
    # Before the call, because a CrossEncoder is also a module, whose call takes tokens.
    if callable(getattr(scorer, "predict", None)):
        return scorer.predict
    if callable(scorer):
        return scorer
    raise TypeError(
        f"scorer must be callable or have a method predict, got a {type(scorer).__name__}"
    )


def checked_scores(
    found: Any, n: int, name: str, items: Int64[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    """What a scorer returned, as n finite numbers in double precision."""
    if hasattr(found, "detach"):  # a torch tensor, perhaps of a type that numpy does not have
        found = found.detach().cpu().double()
    try:
        numbers = np.asarray(found)
        if numbers.dtype.kind == "c":
            raise TypeError("complex")
        numbers = numbers.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {n} real numbers, got {found!r:.200}") from error
    if numbers.shape == (n, 1):
        numbers = numbers[:, 0]
    if numbers.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one a pair, got {numbers.shape}")
    finite = np.isfinite(numbers)
    if not finite.all():
        bad = int(np.argmin(finite))
        where = "" if items is None else f", the one with item {items[bad]}"
        raise ValueError(f"{name} must be finite, got {numbers[bad]} for pair {bad}{where}")
    return numbers


def in_single_precision(scores: Float[np.ndarray, " n"], block: Block) -> Float[np.ndarray, " n"]:
    with np.errstate(over="ignore"):
        single = scores.astype(np.float32)
    fits = np.isfinite(single)
    if not fits.all():
        bad = int(np.argmin(fits))
        raise ValueError(
            f"scores must fit single precision, got {scores[bad]} for anchor query {block.row} and "
            f"item {block.start + bad}"
        )
    return single
