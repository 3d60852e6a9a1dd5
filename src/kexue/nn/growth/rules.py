"""Whole state dicts, grown by one rule for each kind of parameter.

Source: https://arxiv.org/abs/2308.06103 (composable expansions that preserve the function).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kexue.nn.growth.expansion import (
    AxisMap,
    Expansion,
    add_null_noise_,
    check_finite,
    check_noise,
    expand_axes,
    normal_like,
    root_mean_square,
)

__all__ = ["ParameterRule", "expand_state_dict"]

_AXIS = re.compile(r"[+-][^/+-]+(/[^/+-]+)*")


@dataclass(frozen=True)
class ParameterRule:
    r"""What the axes of a parameter mean: which space it writes into, and which it reads.

    Parameters
    ----------
    pattern : str
        Regular expression of the whole name.
    axes : tuple of str or None, or "copy"
        One entry a dimension: ``"+space"`` where the parameter writes into a space, ``"-space"``
        where it reads from one, None where the axis stays. ``"+query/key/value"`` are equal chunks
        of one axis. ``"copy"`` leaves the parameter as it is, whatever its kind and shape.
    multiplier : float
        A further factor.

    Raises
    ------
    ValueError
        For a pattern or an axis that is none of these, or a multiplier that is not finite.

    Examples
    --------
    The three projections of GPT-2's attention in one, stored as (in, out):

    >>> rule = ParameterRule(r"h\.\d+\.attn\.c_attn\.weight", ("-stream", "+query/key/value"))
    >>> rule.axes[0]
    '-stream'
    """

    pattern: str
    axes: tuple[str | None, ...] | Literal["copy"]
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression, got {self.pattern!r}: {error}"
            ) from None
        if not math.isfinite(self.multiplier):
            raise ValueError(f"multiplier must be finite, got {self.multiplier}")
        if self.axes == "copy":
            return
        if isinstance(self.axes, str):
            raise ValueError(f"axes must be a tuple or 'copy', got {self.axes!r}")
        for axis in self.axes:
            if axis is not None and not _AXIS.fullmatch(axis):
                raise ValueError(
                    f"an axis is None, '+space' or '-space', or chunks such as '+a/b', got {axis!r}"
                )

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """The compiled pattern."""
        return re.compile(self.pattern)


def expand_state_dict(
    state_dict: Mapping[str, Tensor],
    rules: Sequence[ParameterRule],
    expansions: Mapping[str, Expansion],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Grow every parameter of a model by the first rule that its whole name matches.

    A space called ``query`` is special in one way: with ``noise``, its empty units start at random
    where the ``key`` space has the same empty ones, whose zeros they meet. With both at zero,
    neither would ever receive a gradient.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        The small model; not changed.
    rules : sequence of ParameterRule
        The first one that matches counts.
    expansions : mapping of str to Expansion
        How each space grows.
    noise : float
        Size of the noise that every matrix gets along the axis that it reads, relative to the
        matrix's root mean square. It is projected so that it reads zero from the grown activations:
        exact up to the rounding of the weights' dtype, which is coarse for half types.
    generator : torch.Generator, optional
        Source of the noise, torch's global one by default; not touched when ``noise`` is 0.

    Returns
    -------
    dict of str to Tensor
        New contiguous tensors of the same dtype on the same device, outside any autograd graph. A
        tensor that stands under two names becomes two tensors.

    Raises
    ------
    ValueError
        For names without a rule, a rule of another number of axes, a space without an expansion, an
        axis of another length than its expansion, entries that are not finite, a negative noise.
    TypeError
        For values that are no floating tensors, unless their rule is to copy them.

    Examples
    --------
    >>> small = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> rules = [
    ...     ParameterRule("0.weight", ("+hidden", None)),
    ...     ParameterRule("0.bias", ("+hidden",)),
    ...     ParameterRule("2.weight", (None, "-hidden")),
    ...     ParameterRule("2.bias", "copy"),
    ... ]
    >>> large = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    >>> grown = expand_state_dict(small.state_dict(), rules, {"hidden": Expansion.cycle(3, 5)})
    >>> large.load_state_dict(grown)
    <All keys matched successfully>
    >>> x = torch.randn(4, 2)
    >>> torch.allclose(large(x), small(x), atol=1e-6)
    True
    """
    check_noise(noise)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    chosen = {name: matching_rule(name, rules) for name in state_dict}
    unmatched = [name for name, rule in chosen.items() if rule is None]
    if unmatched:
        raise ValueError(f"no rule matches the parameters {', '.join(unmatched)}")
    return {
        name: _expand_parameter(name, tensor, rule, expansions, noise, generator)
        for (name, tensor), rule in zip(state_dict.items(), chosen.values(), strict=True)
        if rule is not None
    }


def matching_rule(name: str, rules: Sequence[ParameterRule]) -> ParameterRule | None:
    """The first rule that matches the whole name."""
    return next((rule for rule in rules if rule.regex.fullmatch(name)), None)


def _expand_parameter(
    name: str,
    tensor: Tensor,
    rule: ParameterRule,
    expansions: Mapping[str, Expansion],
    noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if rule.axes == "copy":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    if tensor.ndim != len(rule.axes):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, its rule {rule.pattern!r} has "
            f"{len(rule.axes)} axes"
        )
    check_finite(name, tensor)
    maps = [
        _axis_map(name, tensor, dim, axis, expansions)
        for dim, axis in enumerate(rule.axes)
        if axis is not None
    ]
    grown = expand_axes(tensor, maps, rule.multiplier)
    if noise and grown.ndim == 2:
        _add_noise(grown, rule.axes, maps, expansions, noise, generator)
    return grown


def _axis_map(
    name: str, tensor: Tensor, dim: int, axis: str, expansions: Mapping[str, Expansion]
) -> AxisMap:
    chunks = []
    for space in axis[1:].split("/"):
        if space not in expansions:
            raise ValueError(f"no expansion is given for the space {space!r}, which {name} needs")
        chunks.append(expansions[space])
    expected = sum(chunk.old_size for chunk in chunks)
    if tensor.shape[dim] != expected:
        raise ValueError(
            f"axis {dim} of {name} has length {tensor.shape[dim]}, "
            f"the expansion of {axis[1:]!r} expects {expected}"
        )
    return AxisMap.of(chunks, dim, reads=axis[0] == "-")


def _add_noise(
    grown: Tensor,
    axes: Sequence[str | None],
    maps: Sequence[AxisMap],
    expansions: Mapping[str, Expansion],
    noise: float,
    generator: torch.Generator | None,
) -> None:
    reading = [axis for axis in maps if axis.reads]
    size = root_mean_square(grown)
    if len(reading) == 1:
        add_null_noise_(grown, reading[0], noise, generator)
    for dim, axis in enumerate(axes):
        spaces = axis[1:].split("/") if axis is not None and axis[0] == "+" else []
        if "query" not in spaces or not _keys_are_empty_too(expansions):
            continue
        start = sum(expansions[space].new_size for space in spaces[: spaces.index("query")])
        empty = start + (expansions["query"].source < 0).nonzero().flatten().to(grown.device)
        draw = normal_like(grown.index_select(dim, empty), generator)
        grown.index_copy_(dim, empty, (size * draw).to(grown.dtype))


def _keys_are_empty_too(expansions: Mapping[str, Expansion]) -> bool:
    """Whether each empty unit of a query head meets an empty unit of its key head."""
    query, key = (expansions.get(space) for space in ("query", "key"))
    if query is None or key is None or query.new_size % key.new_size:
        return False
    groups = query.new_size // key.new_size
    return torch.equal(query.source < 0, (key.source < 0).repeat(groups))
