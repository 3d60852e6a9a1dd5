"""The two orders in which a head's features form planes, and the way from one to the other.

``interleaved``: plane k is made of features 2k and 2k + 1 (RoFormer, GPT-J, Meta's LLaMA).
``half``: plane k is made of features k and k + dim/2 (GPT-NeoX, LLaMA at Hugging Face). They differ
by a permutation of features. Queries and keys come from linear maps, so a checkpoint changes its
layout by a permutation of the rows of these, and every logit stays what it was.
"""

from __future__ import annotations

import operator
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

__all__ = ["convert_rotary_projection", "rotary_permutation"]

Layout: TypeAlias = Literal["interleaved", "half"]


def rotary_permutation(
    dim: int, *, from_layout: Layout, to_layout: Layout
) -> Int64[Tensor, " dim"]:
    """Return the index that brings features from one layout into another.

    Parameters
    ----------
    dim : int
        Number of features of one head that are rotated, even.
    from_layout, to_layout : {"interleaved", "half"}
        Where the features are, and where they shall be.

    Returns
    -------
    Tensor, shape (dim,)
        Index p with ``x_to = x_from[..., p]``.

    Raises
    ------
    ValueError
        For an odd dim or one below 2, or a layout of another name.

    Examples
    --------
    >>> rotary_permutation(6, from_layout="half", to_layout="interleaved")
    tensor([0, 3, 1, 4, 2, 5])
    """
    dim = _even_dim(dim)
    source, target = _pair_axis(from_layout), _pair_axis(to_layout)
    features = torch.arange(dim)
    if source == target:
        return features
    return _as_pairs(features, source).mT.flatten()


def convert_rotary_projection(
    weight_or_bias: Shaped[Tensor, "rows ..."],
    num_heads: int,
    *,
    from_layout: Layout,
    to_layout: Layout,
    rotary_dim: int | None = None,
) -> Shaped[Tensor, "rows ..."]:
    """Return the weight or bias of a query or key projection for another layout.

    Convert the projections of queries and of keys, weights and biases, and norms of queries and
    keys where there are any; values are not rotated and stay as they are.

    Parameters
    ----------
    weight_or_bias : Tensor, shape (num_heads * head_dim, ...)
        Weight or bias of a linear map, head after head.
    num_heads : int
        Number of heads in it: for keys that several query heads share, the number of key heads.
    from_layout, to_layout : {"interleaved", "half"}
        Where the features are, and where they shall be.
    rotary_dim : int, optional
        Leading features of each head that are rotated; all of them by default.

    Returns
    -------
    Tensor, shape (num_heads * head_dim, ...)
        A new tensor of the same dtype, on the same device.

    Raises
    ------
    ValueError
        If the rows are not divisible by the number of heads, ``rotary_dim`` is odd, below 2 or
        above the size of a head, or a layout has another name.

    Examples
    --------
    >>> query_projection = torch.nn.Linear(16, 2 * 8)
    >>> weight = convert_rotary_projection(
    ...     query_projection.weight, 2, from_layout="interleaved", to_layout="half"
    ... )
    >>> bool((weight[8 + 4] == query_projection.weight[8 + 1]).all())
    True
    """
    if not isinstance(weight_or_bias, Tensor) or weight_or_bias.ndim < 1:
        raise ValueError(
            "weight_or_bias must be a tensor of shape (num_heads * head_dim, ...), got "
            f"{_kind(weight_or_bias)}"
        )
    rows, num_heads = len(weight_or_bias), operator.index(num_heads)
    if num_heads < 1 or rows % num_heads:
        raise ValueError(
            f"the rows ({rows}) of a projection must be divisible by num_heads ({num_heads})"
        )
    head_dim = rows // num_heads
    rotary_dim = _even_dim(head_dim if rotary_dim is None else rotary_dim, "rotary_dim")
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim ({rotary_dim}) must not exceed the head size ({head_dim})")
    rotated = rotary_permutation(rotary_dim, from_layout=from_layout, to_layout=to_layout)
    order = torch.cat([rotated, torch.arange(rotary_dim, head_dim)]).to(weight_or_bias.device)
    return weight_or_bias.unflatten(0, (num_heads, head_dim))[:, order].flatten(0, 1)


_PAIR_AXIS: dict[str, int] = {"interleaved": -1, "half": -2}


def _pair_axis(layout: str) -> int:
    """Axis that runs over the two features of a plane, once features are seen as planes."""
    if layout not in _PAIR_AXIS:
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    return _PAIR_AXIS[layout]


def _as_pairs(x: Tensor, pair_axis: int) -> Tensor:
    """See features (..., dim) as planes: (..., dim/2, 2) interleaved, (..., 2, dim/2) half."""
    half = x.shape[-1] // 2
    return x.unflatten(-1, (half, 2) if pair_axis == -1 else (2, half))


def _even_dim(dim: int, name: str = "dim") -> int:
    dim = operator.index(dim)
    if dim < 2 or dim % 2:
        raise ValueError(f"{name} must be even and at least 2, got {dim}")
    return dim


def _kind(thing: object) -> str:
    """What came, for the message of an error."""
    if isinstance(thing, Tensor):
        return f"{thing.dtype} {tuple(thing.shape)}"
    return type(thing).__name__
