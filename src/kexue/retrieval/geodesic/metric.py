"""The local distance: which vectors are accepted, and how far two of them are apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Integer

__all__ = ["METRICS"]

METRICS = ("euclidean", "angular", "cosine")

CHUNK_BYTES = 64 * 2**20
"""What any intermediate array may take."""
_LARGEST = 1e140
"""Coordinates up to here have squares that can be added up."""


class Frame(NamedTuple):
    """Points as a matrix product takes them, in single or double precision."""

    centre: Float64[np.ndarray, " features"]
    scale: float
    points: Float[np.ndarray, "n features"]
    squares: Float[np.ndarray, " n"]

    @classmethod
    def around(
        cls,
        vectors: Float64[np.ndarray, "n features"],
        centre: Float64[np.ndarray, " features"],
        scale: float,
        dtype: type[np.floating],
    ) -> Frame:
        points = np.empty(vectors.shape, dtype)
        for part in chunks(len(vectors), 8 * vectors.shape[1]):
            points[part] = (vectors[part] - centre) / scale
        return cls(centre, scale, points, np.einsum("ij,ij->i", points, points))

    def rows(self, queries: Float64[np.ndarray, "m features"]) -> Float[np.ndarray, "m features"]:
        with np.errstate(over="ignore"):
            return ((queries - self.centre) / self.scale).astype(self.points.dtype)

    def error(self, rows: Float[np.ndarray, "m features"]) -> Float[np.ndarray, " m"]:
        """What |x|² - 2⟨q, x⟩ may be off by: inf where it may be out of range.

        A product of d terms is off by d ε |q| |x|, a square by d ε |x|², a rounded coordinate adds
        two ε to that.
        """
        unit = (rows.shape[1] + 32) * float(np.finfo(rows.dtype).eps)
        reach = _norms(rows.astype(np.float64)) + math.sqrt(self.squares.max(initial=0.0))
        with np.errstate(over="ignore"):
            return (unit * reach**2).astype(rows.dtype)


@dataclass(frozen=True)
class Corpus:
    """Points in double precision, of length 1 unless the metric is Euclidean."""

    vectors: Float64[np.ndarray, "n features"]
    metric: str

    @cached_property
    def single(self) -> Frame:
        """Centred and scaled, single precision keeps what tells points apart."""
        centre = self.vectors.mean(axis=0)
        parts = chunks(len(self), 8 * self.vectors.shape[1])
        spread = max((float(np.abs(self.vectors[p] - centre).max()) for p in parts), default=0.0)
        return Frame.around(self.vectors, centre, spread or 1.0, np.float32)

    @cached_property
    def double(self) -> Frame:
        """The points themselves."""
        squares = np.einsum("ij,ij->i", self.vectors, self.vectors)
        return Frame(np.zeros(self.vectors.shape[1]), 1.0, self.vectors, squares)

    def __getstate__(self) -> dict[str, Any]:
        """Frames are made again when needed."""
        return {"vectors": self.vectors, "metric": self.metric}

    def __len__(self) -> int:
        return len(self.vectors)

    def extended(self, vectors: Float64[np.ndarray, "m features"]) -> Corpus:
        return Corpus(np.concatenate([self.vectors, vectors]), self.metric)

    def lengths(
        self, i: Integer[np.ndarray, " pairs"], j: Integer[np.ndarray, " pairs"]
    ) -> Float64[np.ndarray, " pairs"]:
        """Distances of pairs of points."""
        return pair_lengths(self.vectors, i, self.vectors, j, self.metric)


def pair_lengths(
    one: Float64[np.ndarray, "n features"],
    i: Integer[np.ndarray, " pairs"],
    two: Float64[np.ndarray, "m features"],
    j: Integer[np.ndarray, " pairs"],
    metric: str,
) -> Float64[np.ndarray, " pairs"]:
    """Distances of ``one[i]`` and ``two[j]``, never negative and the same for (i, j) as (j, i)."""
    lengths = np.empty(len(i))
    for part in chunks(len(i), 4 * 8 * one.shape[1]):
        u, v = one[i[part]], two[j[part]]
        apart = _norms(u - v)
        if metric == "euclidean":
            lengths[part] = apart
        elif metric == "angular":
            # arccos of the cosine would lose half of the digits of a small angle.
            lengths[part] = 2 * np.arctan2(apart, _norms(u + v))
        else:
            lengths[part] = apart**2 / 2
    return lengths


def chunks(n: int, row_bytes: int) -> Iterator[slice]:
    """Cut n rows of so many bytes into slices of bounded memory."""
    size = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def as_vectors(
    x: Any, metric: str, *, features: int | None = None, name: str = "x"
) -> Float64[np.ndarray, "n features"]:
    """Return a checked copy in double precision, normalised where only directions count."""
    if torch.is_tensor(x):
        # numpy knows no bfloat16; a conversion to double is exact from every real type.
        x = x.detach().cpu()
        x = (x if x.is_complex() else x.double()).numpy()
    given = np.asarray(x)
    if given.dtype.kind not in "buif":
        raise TypeError(f"{name} must hold real numbers, got an array of {given.dtype}")
    if given.ndim != 2:
        raise ValueError(
            f"{name} must be 2-D (samples, features), got an array of shape {given.shape}"
        )
    if features is not None and given.shape[1] != features:
        raise ValueError(
            f"{name} must have {features} features, as the points that the index was fitted to, "
            f"got {given.shape[1]}"
        )
    if not given.shape[1]:
        raise ValueError(f"{name} must have at least one feature, got shape {given.shape}")
    vectors = np.array(given, np.float64, order="C")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {_first(~finite)}")
    peaks = np.abs(vectors).max(axis=1, initial=0.0)
    if metric == "euclidean":
        if np.any(peaks > _LARGEST):
            raise ValueError(
                f"coordinates of {name} must be at most {_LARGEST:g}, got {peaks.max():g} in row "
                f"{_first(peaks > _LARGEST)}"
            )
        return vectors
    if np.any(peaks == 0):
        raise ValueError(
            f"{name} must hold no zero vector under metric {metric!r}, got one in row "
            f"{_first(peaks == 0)}"
        )
    # By the peak first, so that no square overflows or vanishes.
    vectors /= peaks[:, None]
    vectors /= _norms(vectors)[:, None]
    return vectors


def check_metric(metric: Any) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def warn_of_cosine(metric: str, stacklevel: int) -> None:
    if metric == "cosine":
        warnings.warn(
            "1 - cos is no metric: a way of many small steps costs next to nothing, so lengths of "
            "paths tend to 0 as points get denser; use metric='angular'",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _norms(vectors: Float64[np.ndarray, "n features"]) -> Float64[np.ndarray, " n"]:
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def _first(rows: Any) -> int:
    return int(np.argmax(rows))
