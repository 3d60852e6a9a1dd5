r"""A known piece of a map or sequence, extended by one linear map per step.

The Euler step of :math:`z_x = A z` multiplies by :math:`I + A` forwards and :math:`I - A`
backwards, which are not inverse to each other: there and back again is :math:`I - A^2`. The
exponential step, :math:`e^A` and :math:`e^{-A}`, is the exact solution, and consistent.

In the basis of shared eigenvectors a path of n steps right and m steps down is the factor
:math:`e^{n a + m b}` on each coefficient, so that no matrix is ever raised to a power. Only its
difference to 1 is sent through the change of basis: a rate of 0 copies, and the known piece stays
what it is, to the last digit.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.training.heat.blocks import Block, _fitting, _integers, _pair

__all__ = ["LinearPropagation", "MaskToken", "SequencePropagation"]

Parametrization: TypeAlias = Literal["shared_eigenvectors", "free"]
Step: TypeAlias = Literal["euler", "exponential"]
Map: TypeAlias = Float[Tensor, "batch channels height width"]
Extended: TypeAlias = Float[Tensor, "batch channels full_height full_width"]
Matrix: TypeAlias = Float[Tensor, "channels channels"]


class LinearPropagation(nn.Module):
    r"""Extends a feature map linearly from the edges of a block: QB-Heat's prediction.

    A position n columns to the right of the block and m rows below gets the nearest feature of the
    block, multiplied by :math:`M_x^n M_y^m`; with free matrices, which need not commute, by the
    mean of :math:`M_x^n M_y^m` and :math:`M_y^m M_x^n`. The two differ in the corners only.

    Nothing bounds the growth: over n steps a component of rate a is multiplied by
    :math:`e^{n |\mathrm{Re}\, a|}`, so rates below 1/n keep it within a factor of e. Weight decay
    on the rates is the way to hold them there.

    Half precision is computed in single, also under autocast; the output has the features' dtype.

    Parameters
    ----------
    channels : int
        Channels C of the features.
    parametrization : {"shared_eigenvectors", "free"}
        Parameters ``eigenvectors`` (C, C), ``horizontal_rates`` and ``vertical_rates`` (C,), with
        :math:`A = V \operatorname{diag}(a) V^{-1}` and likewise B, which commute; or
        ``horizontal`` and ``vertical`` (C, C).
    step : {"euler", "exponential"}
        :math:`I \pm A`, as in the article, or :math:`e^{\pm A}`.
    initial_scale : float
        Standard deviation of the rates; free matrices have entries of this divided by the root of
        C. At 0, A = B = 0 and the nearest feature is copied. Eigenvectors start orthogonal.
    generator : torch.Generator, optional
        Source of the initial values; torch's global one by default.

    Raises
    ------
    ValueError
        For an unknown parametrization or step, a bad size or scale; in ``forward``, for features
        that are no batch of maps with C channels, or a block that does not fit.

    Examples
    --------
    >>> copy = LinearPropagation(1, initial_scale=0.0)
    >>> copy(torch.tensor([[[[1.0, 2.0]]]]), size=(2, 4), offset=(0, 1))
    tensor([[[[1., 1., 2., 2.],
              [1., 1., 2., 2.]]]], grad_fn=...)
    """

    def __init__(
        self,
        channels: int,
        *,
        parametrization: Parametrization = "shared_eigenvectors",
        step: Step = "exponential",
        initial_scale: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if parametrization not in get_args(Parametrization):
            raise ValueError(
                f"parametrization must be one of {get_args(Parametrization)}, "
                f"got {parametrization!r}"
            )
        self.channels = _channel_count(channels)
        self.parametrization = parametrization
        self.step = _known_step(step)
        scale = _initial_scale(initial_scale)
        if parametrization == "shared_eigenvectors":
            basis = torch.empty(self.channels, self.channels)
            self.eigenvectors = nn.Parameter(nn.init.orthogonal_(basis, generator=generator))
            self.horizontal_rates = nn.Parameter(scale * _normal(self.channels, None, generator))
            self.vertical_rates = nn.Parameter(scale * _normal(self.channels, None, generator))
        else:
            scale /= math.sqrt(self.channels)
            square = self.channels, self.channels
            self.horizontal = nn.Parameter(scale * _normal(*square, generator))
            self.vertical = nn.Parameter(scale * _normal(*square, generator))

    def extra_repr(self) -> str:
        return f"{self.channels}, parametrization={self.parametrization!r}, step={self.step!r}"

    def matrices(self) -> tuple[Matrix, Matrix]:
        """Return A (horizontal) and B (vertical), which act on channel vectors from the left."""
        if self.parametrization == "free":
            return self.horizontal.clone(), self.vertical.clone()
        with torch.autocast(self.eigenvectors.device.type, enabled=False):
            basis = self.eigenvectors.to(_working_dtype(self.eigenvectors))
            inverse = torch.linalg.inv(basis)
            return (
                (basis * self.horizontal_rates) @ inverse,
                (basis * self.vertical_rates) @ inverse,
            )

    def forward(
        self, features: Map, *, size: tuple[int, int], offset: tuple[int, int] = (0, 0)
    ) -> Extended:
        """Return the map of ``size`` (height, width) that holds the features at ``offset``."""
        block = _placed(features, self.channels, size, offset)
        margins = _margins(block, size)
        extended = (
            self._in_shared_basis if self.parametrization == "shared_eigenvectors" else self._freely
        )
        with torch.autocast(features.device.type, enabled=False):
            return extended(features.to(_working_dtype(features)), margins).to(features.dtype)

    def _in_shared_basis(self, features: Map, margins: Margins) -> Extended:
        dtype = features.dtype
        basis = self.eigenvectors.to(dtype)
        coefficients = (torch.linalg.inv(basis) @ features.flatten(2)).unflatten(
            2, features.shape[2:]
        )
        growth = self._growth(margins, features.shape[2:], dtype)
        departure = growth * _nearest(coefficients, margins)
        nearest = _nearest(features, margins)
        extended = torch.baddbmm(
            nearest.flatten(2), basis.expand(len(features), -1, -1), departure.flatten(2)
        )
        return extended.view(nearest.shape)

    def _growth(self, margins: Margins, block: torch.Size, dtype: torch.dtype) -> Tensor:
        """Factor of each coefficient on its way to each position, minus 1; (C, height, width)."""
        a, b = (rates.to(dtype)[:, None] for rates in (self.horizontal_rates, self.vertical_rates))
        (rows, columns), (height, width) = margins, block
        down, right = _distances(*rows, height, b), _distances(*columns, width, a)
        if self.step == "exponential":
            return torch.expm1((right * a)[:, None, :] + (down * b)[:, :, None])
        horizontal = (1 + right.sign() * a) ** right.abs()
        vertical = (1 + down.sign() * b) ** down.abs()
        return horizontal[:, None, :] * vertical[:, :, None] - 1

    def _freely(self, features: Map, margins: Margins) -> Extended:
        dtype = features.dtype
        across = _one_step(self.horizontal.to(dtype), self.step)
        along = _one_step(self.vertical.to(dtype), self.step)
        rows, columns = margins
        # Channels come before all positions, so that a step is one matrix product.
        z = features.movedim(1, 0)
        horizontal_first = _chain(_chain(z, 3, across, columns), 2, along, rows)
        vertical_first = _chain(_chain(z, 2, along, rows), 3, across, columns)
        return ((horizontal_first + vertical_first) / 2).movedim(0, 1)


class MaskToken(nn.Module):
    """One learned vector everywhere outside the block: the masked autoencoder, as a control.

    Parameters
    ----------
    channels : int
        Channels of the features. The parameter ``token`` has this length and starts at 0.

    Raises
    ------
    ValueError
        As in :class:`LinearPropagation`.

    Examples
    --------
    >>> MaskToken(1)(torch.tensor([[[[1.0, 2.0]]]]), size=(1, 4), offset=(0, 1))
    tensor([[[[0., 1., 2., 0.]]]], grad_fn=...)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = _channel_count(channels)
        self.token = nn.Parameter(torch.zeros(self.channels))

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def forward(
        self, features: Map, *, size: tuple[int, int], offset: tuple[int, int] = (0, 0)
    ) -> Extended:
        """Return the map of ``size`` (height, width) that holds the features at ``offset``."""
        block = _placed(features, self.channels, size, offset)
        (above, below), (left, right) = _margins(block, size)
        token = self.token.to(features.dtype)[None, :, None, None]
        count, height, width = len(features), block.height, size[1]
        middle = [
            token.expand(count, -1, height, left),
            features,
            token.expand(count, -1, height, right),
        ]
        return torch.cat(
            [
                token.expand(count, -1, above, width),
                torch.cat(middle, -1),
                token.expand(count, -1, below, width),
            ],
            -2,
        )


class SequencePropagation(nn.Module):
    r"""Extends a sequence of vectors by one linear map, forwards and backwards.

    Neighbouring vectors (of sentences, say) differ by one matrix, :math:`z_{t+1} = M z_t`, with
    :math:`M = e^R` or, by Euler, :math:`I + R` (backwards :math:`I - R`). Growth and dtypes are as
    in :class:`LinearPropagation`.

    Parameters
    ----------
    channels : int
        Length C of the vectors; the parameter ``rate`` is R, of shape (C, C).
    step : {"euler", "exponential"}
        How a step is taken.
    initial_scale : float
        R starts with normal entries of this standard deviation divided by the root of C.
    generator : torch.Generator, optional
        Source of the initial values; torch's global one by default.

    Raises
    ------
    ValueError
        For an unknown step, a bad size or scale; in ``forward``, for features that are no batch of
        sequences of C numbers, or a span that does not fit.

    Examples
    --------
    >>> copy = SequencePropagation(1, initial_scale=0.0)
    >>> copy(torch.tensor([[[3.0], [4.0]]]), length=5, offset=1)[0, :, 0]
    tensor([3., 3., 4., 4., 4.], grad_fn=...)
    """

    def __init__(
        self,
        channels: int,
        *,
        step: Step = "exponential",
        initial_scale: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels = _channel_count(channels)
        self.step = _known_step(step)
        scale = _initial_scale(initial_scale) / math.sqrt(self.channels)
        self.rate = nn.Parameter(scale * _normal(self.channels, self.channels, generator))

    def extra_repr(self) -> str:
        return f"{self.channels}, step={self.step!r}"

    def forward(
        self, features: Float[Tensor, "batch length channels"], *, length: int, offset: int = 0
    ) -> Float[Tensor, "batch full_length channels"]:
        """Return the sequence of ``length`` that holds the features from ``offset`` on."""
        _check_features(features, 3, -1, self.channels)
        length, offset = _integers((length, offset), "length and offset")
        end = offset + features.shape[1]
        if offset < 0 or end > length:
            raise ValueError(
                f"a span of {features.shape[1]} from {offset} on does not fit into {length}"
            )
        dtype = _working_dtype(features)
        with torch.autocast(features.device.type, enabled=False):
            step = _one_step(self.rate.to(dtype), self.step)
            z = features.to(dtype).movedim(2, 0)
            return _chain(z, 2, step, (offset, length - end)).movedim(0, 2).to(features.dtype)


Margins: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""Numbers of rows above and below the block, and of columns left and right of it."""


def _margins(block: Block, size: tuple[int, int]) -> Margins:
    return (
        (block.top, size[0] - block.top - block.height),
        (block.left, size[1] - block.left - block.width),
    )


def _nearest(maps: Map, margins: Margins) -> Extended:
    """Continue the edges of a map."""
    for dim, (before, after) in zip((2, 3), margins, strict=True):
        ends = ((0, before), (-1, after))
        first, last = (
            maps.narrow(dim, end, 1).expand(
                *(count if axis == dim else -1 for axis in range(maps.ndim))
            )
            for end, count in ends
        )
        maps = torch.cat([first, maps, last], dim)
    return maps


def _distances(before: int, after: int, length: int, like: Tensor) -> Tensor:
    """Signed steps from the nearest position inside, for each position of one axis."""
    place = torch.arange(before + length + after, device=like.device) - before
    return (place - place.clamp(0, length - 1)).to(like.dtype)


def _one_step(rate: Matrix, step: Step) -> tuple[Matrix, Matrix]:
    """The map to the previous position, and that to the next."""
    if step == "exponential":
        return torch.linalg.matrix_exp(-rate), torch.linalg.matrix_exp(rate)
    identity = torch.eye(len(rate), dtype=rate.dtype, device=rate.device)
    return identity - rate, identity + rate


def _chain(z: Tensor, dim: int, step: tuple[Matrix, Matrix], margin: tuple[int, int]) -> Tensor:
    """Extend z, whose channels come first, step by step at both ends of one axis."""
    slices = list(z.unbind(dim))
    for backwards, count in zip((True, False), margin, strict=True):
        matrix = step[0] if backwards else step[1]
        edge = slices[0] if backwards else slices[-1]
        state, beyond = edge.flatten(1), []
        for _ in range(count):
            state = matrix @ state
            beyond.append(state.view(edge.shape))
        slices = beyond[::-1] + slices if backwards else slices + beyond
    return torch.stack(slices, dim)


def _placed(
    features: Tensor, channels: int, size: tuple[int, int], offset: tuple[int, int]
) -> Block:
    _check_features(features, 4, 1, channels)
    top, left = _pair(offset, "offset")
    return _fitting(_pair(size, "size"), Block(top, left, *features.shape[2:]))


def _check_features(features: Tensor, rank: int, channel_dim: int, channels: int) -> None:
    layout = "(batch, channels, height, width)" if rank == 4 else "(batch, length, channels)"
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"features must be a tensor of floating-point numbers, got {kind}")
    shape = tuple(features.shape)
    if len(shape) != rank or shape[channel_dim] != channels or 0 in shape[1:]:
        raise ValueError(f"features must have shape {layout} with {channels} channels, got {shape}")


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _normal(rows: int, columns: int | None, generator: torch.Generator | None) -> Tensor:
    return torch.randn((rows,) if columns is None else (rows, columns), generator=generator)


def _channel_count(channels: int) -> int:
    (count,) = _integers((channels,), "channels")
    if count < 1:
        raise ValueError(f"channels must be at least 1, got {count}")
    return count


def _known_step(step: Step) -> Step:
    if step not in get_args(Step):
        raise ValueError(f"step must be one of {get_args(Step)}, got {step!r}")
    return step


def _initial_scale(scale: float) -> float:
    if not 0 <= scale < math.inf:
        raise ValueError(f"initial_scale must be finite and at least 0, got {scale}")
    return float(scale)
