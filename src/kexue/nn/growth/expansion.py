r"""Maps of a space of n units into one of N, their left inverses, and noise that they never see.

Source: https://arxiv.org/abs/1511.05641 (Net2Net), https://arxiv.org/abs/2310.07999 (LEMON).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ExpandedLinear", "Expansion", "expand_linear"]

_BLOCK = 2**19
"""Entries of noise that are drawn at once."""


@dataclass(frozen=True, eq=False)
class Expansion:
    r"""An index map of units with a scale: :math:`\tilde x_j = s\,x_{source(j)}`, 0 where empty.

    As a matrix :math:`E`, with the left inverse :math:`R` that shares the weight of a unit equally
    among its copies: column j of :math:`W R` is :math:`W_{\cdot,i} / (s\,m_i)`, where i is the
    source of j and :math:`m_i` the number of its copies.

    Parameters
    ----------
    source : Tensor, shape (new_size,)
        Integers; the old unit that each new one copies, -1 for an empty unit.
    old_size : int
        Number of old units, each of which must be copied at least once.
    scale : float
        Factor of the copies, finite and not 0.

    Attributes
    ----------
    new_size : int
        Number of new units.
    multiplicity : Tensor, shape (old_size,)
        Number of copies of each old unit.

    Raises
    ------
    ValueError
        For a source of another rank or kind, an index out of range, a unit without a copy, a scale
        of 0; in the methods for an axis of another length.
    TypeError
        For a source that is no tensor, or a tensor to expand that is not floating.

    Examples
    --------
    >>> expansion = Expansion.cycle(2, 3)
    >>> expansion.write(torch.tensor([1.0, 2.0]))
    tensor([1., 2., 1.])
    >>> expansion.read(torch.tensor([1.0, 2.0]))
    tensor([0.5000, 2.0000, 0.5000])
    """

    source: Int[Tensor, " new"]
    old_size: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        source = self.source
        if not isinstance(source, Tensor):
            raise TypeError(f"source must be a tensor, got {type(source).__name__}")
        if source.ndim != 1 or source.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "source must be a vector of integers, "
                f"got {source.dtype} of shape {tuple(source.shape)}"
            )
        object.__setattr__(self, "source", source.detach().long())
        size = _positive("old_size", self.old_size)
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        outside = source[(source < -1) | (source >= size)]
        if len(outside):
            raise ValueError(
                f"source must hold indices from -1 to {size - 1}, got {int(outside[0])}"
            )
        lost = (self.multiplicity == 0).nonzero().flatten()
        if len(lost):
            raise ValueError(
                f"every old unit needs at least one copy, unit {int(lost[0])} has none"
            )

    @property
    def new_size(self) -> int:
        """Number of new units."""
        return len(self.source)

    @cached_property
    def multiplicity(self) -> Int[Tensor, " old"]:
        """Number of copies of each old unit."""
        return torch.bincount(self.source[self.source >= 0], minlength=self.old_size)

    @staticmethod
    def identity(n: int) -> Expansion:
        """Return the expansion that leaves a space of ``n`` units as it is."""
        return Expansion(torch.arange(_positive("n", n)), n)

    @staticmethod
    def repeat(n: int, factor: int, *, block: int = 1, scale: float = 1.0) -> Expansion:
        """Return the expansion that repeats each block of units next to itself.

        Parameters
        ----------
        n : int
            Old units.
        factor : int
            Copies of each.
        block : int
            Consecutive units that stay together: 1 repeats [a, b] as [a, a, b, b], 2 as
            [a, b, a, b]. The size of a head repeats whole heads.
        scale : float
            Factor of the copies.
        """
        _positive("n", n), _positive("factor", factor), _positive("block", block)
        if n % block:
            raise ValueError(f"block must divide the number of units, got {block} and {n}")
        blocks = torch.arange(n).reshape(-1, 1, block)
        return Expansion(blocks.expand(-1, factor, -1).reshape(-1), n, scale)

    @staticmethod
    def cycle(n: int, new_size: int, *, scale: float = 1.0) -> Expansion:
        """Return the expansion that goes through the ``n`` units again and again."""
        _not_below(n, new_size)
        return Expansion(torch.arange(new_size) % n, n, scale)

    @staticmethod
    def zero_pad(n: int, new_size: int, *, scale: float = 1.0) -> Expansion:
        """Return the expansion that puts empty units behind the ``n`` old ones."""
        _not_below(n, new_size)
        units = torch.arange(new_size)
        return Expansion(torch.where(units < n, units, -1), n, scale)

    @staticmethod
    def rotary(
        num_heads: int,
        head_dim: int,
        factor: int,
        *,
        layout: Literal["half", "interleaved"] = "half",
    ) -> Expansion:
        """Return the expansion of queries or keys whose positions are rotations.

        Plane i of a head turns with frequency base^(-2i / head_dim), and so does plane factor * i
        of a head that is factor times as large: the old plane moves there, the others stay empty.
        The scale factor^(1/4), of query and key each, makes up for logits that are divided by the
        root of the new size.

        Parameters
        ----------
        num_heads : int
            Heads, those of the keys for the keys.
        head_dim : int
            Old size of a head, even.
        factor : int
            How many times larger a head becomes.
        layout : {"half", "interleaved"}
            Plane i is made of features i and i + head_dim / 2, or 2i and 2i + 1.
        """
        _positive("num_heads", num_heads), _positive("factor", factor)
        if _positive("head_dim", head_dim) % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        if layout not in ("half", "interleaved"):
            raise ValueError(f"layout must be 'half' or 'interleaved', got {layout!r}")
        planes = head_dim // 2
        axis = -1 if layout == "half" else -2
        shape = (num_heads, 2, planes) if layout == "half" else (num_heads, planes, 2)
        old = torch.arange(num_heads * head_dim).reshape(shape)
        wide = list(shape)
        wide[axis] *= factor
        source = torch.full(wide, -1)
        source.index_copy_(axis % 3, factor * torch.arange(planes), old)
        return Expansion(source.reshape(-1), num_heads * head_dim, factor**0.25)

    def write(self, tensor: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
        """Apply E along an axis: what writes into the space, or the activation itself."""
        return expand_axes(_floating(tensor), [AxisMap.of([self], dim, reads=False)])

    def read(self, tensor: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
        """Apply R along an axis: what reads from the space."""
        return expand_axes(_floating(tensor), [AxisMap.of([self], dim, reads=True)])

    def null_noise(self, noise: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
        """Project noise along an axis so that it reads zero from any expanded activation."""
        _floating(noise)
        _check_axis(noise, dim, self.new_size)
        return _without_group_means(noise, AxisMap.of([self], dim, reads=True))


@dataclass(frozen=True)
class AxisMap:
    """What happens to one axis of a parameter; several expansions when it holds several chunks."""

    dim: int
    source: Int[Tensor, " new"]
    factors: Float[Tensor, " old"]
    """In float64: s for what writes, 1 / (s m) for what reads."""
    multiplicity: Int[Tensor, " old"]
    reads: bool

    @staticmethod
    def of(expansions: Sequence[Expansion], dim: int, *, reads: bool) -> AxisMap:
        sources, factors, start = [], [], 0
        for expansion in expansions:
            source = expansion.source
            sources.append(torch.where(source < 0, source, source + start))
            start += expansion.old_size
            copies = expansion.multiplicity.double()
            scale = torch.full_like(copies, expansion.scale)
            factors.append(1 / (scale * copies) if reads else scale)
        multiplicity = torch.cat([expansion.multiplicity for expansion in expansions])
        return AxisMap(dim, torch.cat(sources), torch.cat(factors), multiplicity, reads)


def expand_axes(tensor: Tensor, maps: Sequence[AxisMap], multiplier: float = 1.0) -> Tensor:
    """Scale the old units, then copy them; the result is new and contiguous."""
    for axis in maps:
        _check_axis(tensor, axis.dim, len(axis.factors))
    # The factors act on the old units, of which there are fewer.
    expanded = _scaled(tensor.detach(), maps, multiplier)
    # The first axis last: it moves whole rows, and by far the most of them.
    for axis in sorted(maps, key=lambda axis: -(axis.dim % tensor.ndim)):
        source = axis.source.to(tensor.device)
        expanded = expanded.index_select(axis.dim, source.clamp(min=0))
        if (axis.source < 0).any():
            expanded.index_fill_(axis.dim, (source < 0).nonzero().flatten(), 0)
    if expanded.data_ptr() == tensor.data_ptr():
        return expanded.clone(memory_format=torch.contiguous_format)
    return expanded.contiguous()


def _scaled(tensor: Tensor, maps: Sequence[AxisMap], multiplier: float) -> Tensor:
    """Apply all factors with one rounding; the tensor itself where they are all 1."""
    common = multiplier
    for axis in maps:
        common *= float(axis.factors[0])
    if all(bool((axis.factors == axis.factors[0]).all()) for axis in maps):
        if common == 1:
            return tensor
        # A power of two needs no higher precision, and takes a fifth of the time.
        if abs(math.frexp(common)[0]) == 0.5:
            return tensor * common
    exact = tensor.to(work_dtype(tensor.dtype)) * multiplier
    for axis in maps:
        shape = [1] * tensor.ndim
        shape[axis.dim] = -1
        exact *= axis.factors.to(exact.device, exact.dtype).reshape(shape)
    return exact.to(tensor.dtype)


def add_null_noise_(
    weight: Tensor, inputs: AxisMap, noise: float, generator: torch.Generator | None
) -> None:
    """Add to a grown matrix what has no effect on anything that it reads now."""
    # Without its group's mean an entry keeps 1 - 1/m of its variance: nothing of a single copy's.
    left = 1 - 1 / inputs.multiplicity.double()
    wide = torch.where(left > 0, left.rsqrt(), 0.0)
    spread = torch.ones(len(inputs.source), dtype=torch.float64)
    spread[inputs.source >= 0] = wide[inputs.source[inputs.source >= 0]]
    shape = [1, 1]
    shape[inputs.dim] = -1
    size = (noise * root_mean_square(weight) * spread).to(weight.device).reshape(shape)
    # In blocks, so that the draws in high precision take no memory to speak of.
    lines = max(1, _BLOCK // len(inputs.source))
    for block in weight.split(lines, 1 - inputs.dim):
        free = _without_group_means(normal_like(block, generator), inputs)
        block += (free * size.to(free.dtype)).to(block.dtype)


def normal_like(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw on the generator's device, in the dtype of intermediate results."""
    device = weight.device if generator is None else generator.device
    draw = torch.randn(
        weight.shape, generator=generator, device=device, dtype=work_dtype(weight.dtype)
    )
    return draw.to(weight.device)


def root_mean_square(weight: Tensor) -> float:
    norm = torch.linalg.vector_norm(weight, dtype=work_dtype(weight.dtype))
    return norm.item() / math.sqrt(max(1, weight.numel()))


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of intermediate results: more than is kept of them."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _without_group_means(noise: Tensor, axis: AxisMap) -> Tensor:
    # Whole rows are moved many times faster than single entries.
    rows = noise.detach().to(work_dtype(noise.dtype)).movedim(axis.dim, 0).contiguous()
    shape = [-1] + [1] * (rows.ndim - 1)
    source = axis.source.to(rows.device)
    sums = rows.new_zeros(len(axis.factors), *rows.shape[1:])
    for positions in _positions_of_copies(axis).to(rows.device):
        present = (positions >= 0).to(rows.dtype).reshape(shape)
        sums += present * rows.index_select(0, positions.clamp(min=0))
    means = sums / axis.multiplicity.to(rows.device, rows.dtype).reshape(shape)
    copied = (source >= 0).to(rows.dtype).reshape(shape)
    free = rows - copied * means.index_select(0, source.clamp(min=0))
    return free.movedim(0, axis.dim).to(noise.dtype)


def _positions_of_copies(axis: AxisMap) -> Int[Tensor, "copies old"]:
    """Where the first copy of each old unit stands, where the second, ...; -1 for no copy."""
    source = axis.source.cpu()
    copied = (source >= 0).nonzero().flatten()
    order = copied[source[copied].argsort(stable=True)]
    multiplicity = axis.multiplicity.cpu()
    first = multiplicity.cumsum(0) - multiplicity
    number = torch.arange(len(order)) - first[source[order]]
    positions = torch.full((int(multiplicity.max()), len(multiplicity)), -1)
    positions[number, source[order]] = order
    return positions


@dataclass(frozen=True, eq=False)
class ExpandedLinear:
    """Weight and bias of a grown linear layer.

    Attributes
    ----------
    weight : Tensor, shape (new_out, new_in)
        As `torch.nn.Linear` keeps it.
    bias : Tensor, shape (new_out,), or None
        None where the old layer had none.

    Examples
    --------
    >>> twice = Expansion.repeat(1, 2)
    >>> expand_linear(torch.ones(1, 1), None, inputs=twice, outputs=twice).weight
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """

    weight: Float[Tensor, "out inputs"]
    bias: Float[Tensor, " out"] | None


def expand_linear(
    weight: Float[Tensor, "out inputs"],
    bias: Float[Tensor, " out"] | None,
    *,
    inputs: Expansion,
    outputs: Expansion,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> ExpandedLinear:
    r"""Grow a linear layer between two spaces that grow.

    :math:`\tilde W = E_{out} W R_{in} + Z` and :math:`\tilde b = E_{out} b`, so that
    :math:`\tilde W E_{in} x + \tilde b = E_{out}(W x + b)` for every x.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
        As `torch.nn.Linear` keeps it.
    bias : Tensor, shape (out,), optional
        None for a layer without.
    inputs, outputs : Expansion
        How the two spaces grow.
    noise : float
        Size of Z, with :math:`Z E_{in} = 0`, relative to the root mean square of the grown weight.
        0 makes copies of a unit equal, and training keeps them equal.
    generator : torch.Generator, optional
        Source of the noise, torch's global one by default; not touched when ``noise`` is 0.

    Returns
    -------
    ExpandedLinear
        New tensors of the same dtype, on the same device.

    Raises
    ------
    ValueError
        For weights of another rank, that are not finite, or of sizes other than the expansions'; a
        negative noise.
    TypeError
        For weights that are not floating.

    Examples
    --------
    >>> weight, bias, x = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    >>> inputs, outputs = Expansion.repeat(4, 2), Expansion.cycle(3, 5)
    >>> grown = expand_linear(weight, bias, inputs=inputs, outputs=outputs, noise=0.5)
    >>> y = grown.weight @ inputs.write(x) + grown.bias
    >>> torch.allclose(y, outputs.write(weight @ x + bias), atol=1e-5)
    True
    """
    check_noise(noise)
    _check_layer("weight", weight, 2)
    reading = AxisMap.of([inputs], 1, reads=True)
    grown = expand_axes(weight, [reading, AxisMap.of([outputs], 0, reads=False)])
    if noise:
        add_null_noise_(grown, reading, noise, generator)
    if bias is None:
        return ExpandedLinear(grown, None)
    _check_layer("bias", bias, 1)
    return ExpandedLinear(grown, outputs.write(bias))


def check_noise(noise: float) -> None:
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and not negative, got {noise}")


def check_finite(name: str, tensor: Tensor) -> None:
    # A sum of squares costs one pass at the speed of memory. It may overflow where no entry does,
    # so what it finds suspicious is looked at again.
    flat = tensor.detach().reshape(-1)
    if torch.isfinite(flat.dot(flat)) or torch.isfinite(flat).all():
        return
    raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def _check_layer(name: str, tensor: Tensor, rank: int) -> None:
    _floating(tensor)
    if tensor.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")
    check_finite(name, tensor)


def _check_axis(tensor: Tensor, dim: int, size: int) -> None:
    shape = tuple(tensor.shape)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"there is no axis {dim} in a tensor of shape {shape}")
    if shape[dim] != size:
        raise ValueError(
            f"axis {dim} has length {shape[dim]}, the expansion expects {size} "
            f"(the tensor has shape {shape})"
        )


def _floating(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"expected a floating tensor, got {kind}")
    return tensor


def _positive(name: str, value: int) -> int:
    if operator.index(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _not_below(n: int, new_size: int) -> None:
    if _positive("new_size", new_size) < _positive("n", n):
        raise ValueError(f"new_size must be at least the old size {n}, got {new_size}")
