r"""Rotary position embedding for any number of coordinates, from one table of frequencies.

Plane k of a query or key at position :math:`p \in \mathbb{R}^N` turns by the angle
:math:`F_k \cdot p`. In one dimension :math:`F_k = \text{base}^{-2k/d}`; in more, each axis has
planes and a schedule of its own (axial), or F is learnt (mixed).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64, Real
from torch import Tensor, nn

from kexue.nn.rotary.generators import rotary_generators
from kexue.nn.rotary.layout import Layout, _even_dim, _kind, _pair_axis
from kexue.nn.rotary.rotation import (
    _check_features,
    _has_float64,
    _rotate,
    _rotation_table,
    _working_dtype,
)

__all__ = ["RotaryEmbedding", "grid_positions", "rotary_frequencies"]


def rotary_frequencies(dim: int, *, base: float = 10000.0) -> Float64[Tensor, " planes"]:
    r"""Return the frequencies :math:`\text{base}^{-2i/d}` of one axis, in radians per position.

    Parameters
    ----------
    dim : int
        Number of features d that the axis rotates, even.
    base : float
        The slowest plane has a period of almost :math:`2\pi` times this.

    Returns
    -------
    Tensor, shape (dim / 2,)
        float64, from 1 downwards.

    Raises
    ------
    ValueError
        For an odd dim or one below 2, or a base that is not positive and finite.

    Examples
    --------
    >>> rotary_frequencies(8)
    tensor([1.0000, 0.1000, 0.0100, 0.0010], dtype=torch.float64)
    """
    dim, base = _even_dim(dim), float(base)
    if not 0 < base < math.inf:
        raise ValueError(f"base must be positive and finite, got {base}")
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def grid_positions(
    *sizes: int, device: torch.device | str | None = None
) -> Int64[Tensor, "cells axes"]:
    """Return the coordinates of all cells of a grid, in the order of ``flatten``.

    Parameters
    ----------
    *sizes : int
        Number of cells along each axis: rows and columns of an image.
    device : torch.device, optional
        Where to put them.

    Returns
    -------
    Tensor, shape (prod(sizes), len(sizes))
        int64, row-major: the last axis is the fastest.

    Raises
    ------
    ValueError
        Without a size, or with one below 1.

    Examples
    --------
    >>> grid_positions(2, 3).T
    tensor([[0, 0, 0, 1, 1, 1],
            [0, 1, 2, 0, 1, 2]])
    """
    if not sizes or any(operator.index(size) < 1 for size in sizes):
        raise ValueError(f"a grid needs at least one size, all at least 1, got {sizes}")
    axes = [torch.arange(size, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(sizes))


class RotaryEmbedding(nn.Module):
    """Rotation of queries and keys after which their inner products know relative positions only.

    Positions are integers or floating-point numbers of any sign, fractional ones too: a picture of
    another resolution is a grid times a factor. One axis takes positions of shape (length,) or
    (batch, length), more axes take a trailing dimension of that size. Positions with a batch
    dimension are those of x from the left and are broadcast over heads.

    Angles are computed in float64. ``frequencies`` stays in float64, buffer or parameter, when the
    module is converted to another dtype; it follows the module to another device. Tables for the
    default positions are kept, and are no part of the ``state_dict``.

    Parameters
    ----------
    dim : int
        Features of a head that are rotated, even. Features beyond these pass through.
    axes : int
        Number of coordinates.
    axis_dims : sequence of int, optional
        Features that each axis rotates, even numbers of sum ``dim``; ``dim // axes`` each by
        default. The first coordinate drives the first planes.
    base : float or sequence of float
        Base of the frequencies, for all axes or for each.
    layout : {"interleaved", "half"}
        Plane k is made of features 2k and 2k + 1, or k and k + dim/2.
    frequencies : Tensor, shape (dim / 2, axes), optional
        The angle of plane k at position p is ``frequencies[k] @ p``; overrides the axial table of
        ``axis_dims`` and ``base``.
    learnable : bool
        Whether the frequencies are a parameter.

    Raises
    ------
    ValueError
        For sizes, bases, frequencies or a layout that are none of these; for positions of another
        number, rank or kind, or none where there are several axes.

    Examples
    --------
    A head of 64 features on a grid of 14 x 14 patches:

    >>> rope = RotaryEmbedding(64, axes=2)
    >>> query, key = torch.randn(2, 8, 196, 64), torch.randn(2, 8, 196, 64)
    >>> query, key = rope(query, key, positions=grid_positions(14, 14))
    >>> query.shape
    torch.Size([2, 8, 196, 64])

    Learnt frequencies for images ("mixed"):

    >>> mixed = RotaryEmbedding(64, axes=2, frequencies=torch.randn(32, 2), learnable=True)
    >>> [name for name, _ in mixed.named_parameters()]
    ['frequencies']
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        *,
        axes: int = 1,
        axis_dims: Sequence[int] | None = None,
        base: float | Sequence[float] = 10000.0,
        layout: Layout = "interleaved",
        frequencies: Float[Tensor, "planes axes"] | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        self.dim = _even_dim(dim)
        self.axes = operator.index(axes)
        if self.axes < 1:
            raise ValueError(f"axes must be at least 1, got {axes}")
        self._pair_axis = _pair_axis(layout)
        self.layout = layout
        if frequencies is None:
            table = _axial_frequencies(self.dim, self.axes, axis_dims, base)
        else:
            table = _given_frequencies(frequencies, self.dim // 2, self.axes)
        if learnable:
            self.frequencies = nn.Parameter(table)
        else:
            self.register_buffer("frequencies", table, persistent=False)
        self._kept: dict[tuple[torch.device, torch.dtype], _KeptTable] = {}

    def angles(self, positions: Real[Tensor, "..."]) -> Float64[Tensor, "... planes"]:
        """Return the angles in radians, of shape (..., length, dim / 2), of positions."""
        positions = self._coordinates(positions)
        if not _has_float64(positions.device):
            positions = positions.cpu()
        positions = positions.to(self.frequencies.device, torch.float64)
        return (positions.unsqueeze(-2) * self.frequencies).sum(-1)

    def rotate(
        self,
        x: Float[Tensor, "*batch length features"],
        *,
        positions: Real[Tensor, "..."] | None = None,
        inverse: bool = False,
    ) -> Float[Tensor, "*batch length features"]:
        """Return x of shape (..., length, features), rotated to its positions (or back).

        Without positions, these are 0, 1, 2, … along the one axis.
        """
        _check_features(x, self.dim)
        return _rotate(x, self._table(x, positions), self._pair_axis, inverse)

    def forward(
        self,
        query: Float[Tensor, "*query_batch query_length features"],
        key: Float[Tensor, "*key_batch key_length features"],
        *,
        positions: Real[Tensor, "..."] | None = None,
        key_positions: Real[Tensor, "..."] | None = None,
    ) -> tuple[
        Float[Tensor, "*query_batch query_length features"],
        Float[Tensor, "*key_batch key_length features"],
    ]:
        """Return query and key, rotated to their positions; those of the key are the query's."""
        for x in (query, key):
            _check_features(x, self.dim)
        table = self._table(query, positions)
        alike = positions is not None and (query.dtype, query.device) == (key.dtype, key.device)
        if key_positions is None and alike:
            key_table = table
        else:
            key_table = self._table(key, positions if key_positions is None else key_positions)
        return (
            _rotate(query, table, self._pair_axis, False),
            _rotate(key, key_table, self._pair_axis, False),
        )

    def generators(self) -> Float64[Tensor, "axes dim dim"]:
        """Return the skew matrices B with ``rotate(x) = matrix_exp(sum_a p_a B_a) x``."""
        return rotary_generators(self.frequencies, layout=self.layout)

    def extra_repr(self) -> str:
        """Describe the module in its ``repr``."""
        learnable = ", learnable=True" if isinstance(self.frequencies, nn.Parameter) else ""
        return f"{self.dim}, axes={self.axes}, layout={self.layout!r}{learnable}"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: everything but the tables, which can be rebuilt."""
        return {**self.__dict__, "_kept": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        def move_only(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            if not _has_float64(device):
                return tensor
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(device)

        self._kept = {}
        return super()._apply(move_only, recurse)

    def _coordinates(self, positions: Tensor) -> Tensor:
        """Positions as (..., length, axes), checked."""
        real = isinstance(positions, Tensor) and not (
            positions.is_complex() or positions.dtype == torch.bool
        )
        if not real or positions.ndim < (1 if self.axes == 1 else 2):
            shape = "(..., length)" if self.axes == 1 else f"(..., length, {self.axes})"
            raise ValueError(
                f"positions must be a tensor of real numbers of shape {shape}, got "
                f"{_kind(positions)}"
            )
        if self.axes == 1:
            return positions.unsqueeze(-1)
        if positions.shape[-1] != self.axes:
            raise ValueError(
                f"the last dimension of positions must be the number of axes ({self.axes}), got "
                f"{tuple(positions.shape)}"
            )
        return positions

    def _table(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            return _rotation_table(self.angles(positions), x, self._pair_axis)
        if self.axes > 1:
            raise ValueError(
                f"positions must be given for {self.axes} axes: a length does not say what grid "
                "it is"
            )
        length, frequencies = x.shape[-2], self.frequencies
        if frequencies.requires_grad or torch.compiler.is_compiling():
            places = torch.arange(length, device=frequencies.device)
            return _rotation_table(self.angles(places), x, self._pair_axis)
        kept = self._kept.get((x.device, _working_dtype(x)))
        if kept is None or len(kept.table) < length or not kept.is_of(frequencies):
            kept = self._kept[x.device, _working_dtype(x)] = self._keep(x)
        return kept.table[:length]

    def _keep(self, x: Tensor) -> _KeptTable:
        """Build the default table of a power of two of positions, enough for x."""
        length = 1 << max(x.shape[-2] - 1, 0).bit_length()
        # A table that was born in inference mode could not serve a training step later.
        with torch.inference_mode(False), torch.no_grad():
            places = torch.arange(length, device=self.frequencies.device)
            table = _rotation_table(self.angles(places), x, self._pair_axis)
        return _KeptTable(table, self.frequencies, _version(self.frequencies))


class _KeptTable(NamedTuple):
    """Cosines and sines of the first positions, and the frequencies that they are of."""

    table: Tensor
    frequencies: Tensor
    version: int

    def is_of(self, frequencies: Tensor) -> bool:
        return self.frequencies is frequencies and self.version == _version(frequencies)


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _axial_frequencies(
    dim: int, axes: int, axis_dims: Sequence[int] | None, base: float | Sequence[float]
) -> Tensor:
    """Frequencies (dim/2, axes) with one entry a row: the planes of the first axis, and so on."""
    if axis_dims is None:
        if dim % (2 * axes):
            raise ValueError(
                f"dim ({dim}) must be divisible by twice the number of axes ({2 * axes}), unless "
                "axis_dims say how to divide it"
            )
        axis_dims = [dim // axes] * axes
    if len(axis_dims) != axes or sum(axis_dims) != dim or any(d < 2 or d % 2 for d in axis_dims):
        raise ValueError(
            f"axis_dims must be {axes} even numbers from 2 on with the sum {dim}, got "
            f"{list(axis_dims)}"
        )
    bases = list(base) if isinstance(base, Sequence) else [base] * axes
    if len(bases) != axes:
        raise ValueError(f"base must be one number or one for each of {axes} axes, got {bases}")
    schedules = [rotary_frequencies(d, base=b) for d, b in zip(axis_dims, bases, strict=True)]
    return torch.block_diag(*[schedule.unsqueeze(-1) for schedule in schedules])


def _given_frequencies(frequencies: Tensor, planes: int, axes: int) -> Tensor:
    table = torch.as_tensor(frequencies)
    if table.shape != (planes, axes) or table.is_complex() or not table.isfinite().all():
        raise ValueError(
            f"frequencies must be finite real numbers of shape ({planes}, {axes}), got "
            f"{_kind(table)}"
        )
    return table.detach().to(torch.float64, copy=True)
