"""The layer around a core: projections, positions, masks and cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kexue.nn.attention.cache import KeyValueCache
from kexue.nn.attention.cores import AttentionOutput, DotProductAttention
from kexue.nn.attention.masks import _checked, _restricted

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention with free sizes and an exchangeable core.

    With the defaults it computes what ``torch.nn.MultiheadAttention(dim, num_heads,
    batch_first=True)`` computes, except that True in a mask means "may attend". A query that may
    attend nothing gathers exactly zero: its output is the bias of the output projection.

    Parameters
    ----------
    dim : int
        Features of the query input.
    num_heads : int
        Number of heads.
    key_dim, value_dim : int, optional
        Size of the keys and of the values, each per head; ``dim // num_heads`` by default. A key
        size of 64 or 128 lifts the low-rank bottleneck of many small heads and leaves ``dim``
        alone.
    context_dim : int, optional
        Features of the key and value inputs, ``dim`` by default.
    output_dim : int, optional
        Features of the output, ``dim`` by default.
    bias : bool
        Whether the four projections have a bias.
    dropout : float
        Probability that a weight is dropped in training; with a ``core``, which drops its own, 0.
    core : nn.Module, optional
        What combines the heads, ``DotProductAttention`` by default. Its ``num_heads``, if it has
        any, must be ``num_heads``; its ``num_key_heads`` and ``num_value_heads`` are the numbers of
        projected heads.
    rotary : nn.Module, optional
        Something with ``rotate(x, *, positions)``, applied to projected queries and keys.
    log_length : int, optional
        Length in training. Logits are multiplied by log(key_length) / log(log_length), which keeps
        the entropy of attention steady at other lengths.
    device, dtype : optional
        Of the projections.

    Attributes
    ----------
    query_projection, key_projection, value_projection, output_projection : nn.Linear
        The weights; their rows are heads after heads.
    num_key_heads, num_value_heads : int
        Projected heads.

    Raises
    ------
    ValueError
        For sizes below 1, a ``dim`` that ``num_heads`` does not divide where that is needed, a core
        of another number of heads, and in a call for inputs that do not fit.
    TypeError
        For a rotary without ``rotate``, and in a call for a mask of another kind or a cache that
        the core cannot use.

    Examples
    --------
    Decoding step by step, with a key size of its own:

    >>> attention = MultiHeadAttention(32, 8, key_dim=16)
    >>> cache, tokens = attention.new_cache(), torch.randn(1, 6, 32)
    >>> steps = [attention(x, is_causal=True, cache=cache).output for x in tokens.split(1, 1)]
    >>> whole = attention(tokens, is_causal=True).output
    >>> torch.allclose(torch.cat(steps, 1), whole, atol=1e-6)
    True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        output_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        core: nn.Module | None = None,
        rotary: nn.Module | None = None,
        log_length: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "dim": dim, "num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim,
            "context_dim": context_dim, "output_dim": output_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if (key_dim is None or value_dim is None) and dim % num_heads:
            raise ValueError(
                f"dim ({dim}) must be divisible by num_heads ({num_heads}) "
                "when key_dim or value_dim is not given"
            )
        if log_length is not None and log_length < 2:
            raise ValueError(f"log_length must be at least 2, got {log_length}")
        if core is not None and dropout:
            raise ValueError(
                f"dropout must be 0 with a core, which has its own dropout, got {dropout}"
            )
        if rotary is not None and not hasattr(rotary, "rotate"):
            raise TypeError(
                f"rotary must have a method rotate(x, *, positions), got {type(rotary).__name__}"
            )
        self.core = DotProductAttention(dropout=dropout) if core is None else core
        core_heads = getattr(self.core, "num_heads", num_heads)
        if core_heads != num_heads:
            raise ValueError(f"the core must have num_heads = {num_heads} heads, got {core_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_key_heads: int = getattr(self.core, "num_key_heads", num_heads)
        self.num_value_heads: int = getattr(self.core, "num_value_heads", num_heads)
        self.key_dim = dim // num_heads if key_dim is None else key_dim
        self.value_dim = dim // num_heads if value_dim is None else value_dim
        self.context_dim = dim if context_dim is None else context_dim
        self.output_dim = dim if output_dim is None else output_dim
        self.rotary = rotary
        self.log_length = log_length

        def linear(before: int, after: int) -> nn.Linear:
            return nn.Linear(before, after, bias=bias, device=device, dtype=dtype)

        self.query_projection = linear(dim, self.num_key_heads * self.key_dim)
        self.key_projection = linear(self.context_dim, self.num_key_heads * self.key_dim)
        self.value_projection = linear(self.context_dim, self.num_value_heads * self.value_dim)
        self.output_projection = linear(self.num_value_heads * self.value_dim, self.output_dim)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}, "
            f"context_dim={self.context_dim}, output_dim={self.output_dim}, "
            f"log_length={self.log_length}"
        )

    def new_cache(self) -> Any:
        """Return an empty cache: the core's own kind if it has one, else a ``KeyValueCache``."""
        return getattr(self.core, "new_cache", KeyValueCache)()

    def forward(
        self,
        query: Float[Tensor, "batch query_length dim"],
        key: Float[Tensor, "batch key_length context_dim"] | None = None,
        value: Float[Tensor, "batch key_length context_dim"] | None = None,
        *,
        mask: Tensor | None = None,
        key_mask: Bool[Tensor, "batch total_length"] | None = None,
        is_causal: bool = False,
        cache: Any = None,
        positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        need_weights: bool = False,
    ) -> AttentionOutput:
        """Attend from ``query`` to ``key``, and to what is cached.

        Parameters
        ----------
        query : Tensor (batch, query_length, dim)
            What asks.
        key, value : Tensor (batch, key_length, context_dim), optional
            What is attended to; ``key`` is the query by default, ``value`` the key.
        mask : Tensor, optional
            Bool, True where a query may attend, or floating point, added to the logits;
            broadcastable to (batch, heads, query_length, key_length), cached keys included.
        key_mask : Tensor (batch, key_length), optional
            Bool, True for real tokens, cached ones included.
        is_causal : bool
            Whether a query sees only keys up to its own place, counted from the end of the keys.
        cache : KeyValueCache or cache of the core, optional
            What is remembered of earlier tokens; the new ones are appended.
        positions, key_positions : Tensor, optional
            For ``rotary``, without which they do nothing. By default positions go on counting after
            the cached tokens; keys that are the query have its positions.
        need_weights : bool
            Whether to return the weights, too.

        Returns
        -------
        AttentionOutput
            Output (batch, query_length, output_dim), and the weights of each value head or None.
        """
        is_self = key is None
        key = query if key is None else key
        value = key if value is None else value
        self._check_inputs(query, key, value)
        cached = 0 if cache is None else cache.length
        total = cached + key.shape[1]
        if mask is not None:
            mask = _checked(mask, (len(query), self.num_heads, query.shape[1], total))
        if key_mask is not None:
            mask = _restricted(mask, _checked_key_mask(key_mask, (len(query), total)))

        queries = _split(self.query_projection(query), self.num_key_heads, self.key_dim)
        keys = _split(self.key_projection(key), self.num_key_heads, self.key_dim)
        values = _split(self.value_projection(value), self.num_value_heads, self.value_dim)
        if self.rotary is not None:
            if key_positions is None:
                key_positions = positions if is_self else None
            queries = self._rotated(queries, positions, cached)
            keys = self._rotated(keys, key_positions, cached)

        options: dict[str, Any] = {}
        if isinstance(cache, KeyValueCache):
            keys, values = cache.append(keys, values)
        elif cache is not None:
            if not hasattr(self.core, "new_cache"):
                raise TypeError(
                    f"cache must be a KeyValueCache for {type(self.core).__name__}, "
                    f"got {type(cache).__name__}"
                )
            options["cache"] = cache
            # A recurrent state has taken in the masks of earlier keys already.
            if mask is not None and mask.shape[-1] == total:
                mask = mask[..., cached:]
        if self.log_length is not None:
            # A single key has weight 1 whatever the scale, which cores want to be positive.
            factor = math.log(max(total, 2)) / math.log(self.log_length)
            options["scale"] = self.key_dim**-0.5 * factor
        output, weights = self.core(
            queries, keys, values, mask=mask, is_causal=is_causal, need_weights=need_weights,
            **options,
        )  # fmt: skip
        return AttentionOutput(self.output_projection(output.transpose(1, 2).flatten(2)), weights)

    def _rotated(self, x: Tensor, positions: Tensor | None, start: int) -> Tensor:
        if positions is None:
            positions = torch.arange(start, start + x.shape[2], device=x.device)
        return self.rotary.rotate(x, positions=positions)  # type: ignore[union-attr, operator]

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = {"query": self.dim, "key": self.context_dim, "value": self.context_dim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(
                    f"{name} must be a tensor of real floating point numbers, got {kind}"
                )
            if x.ndim != 3:
                raise ValueError(
                    f"{name} must have shape (batch, length, features), got {tuple(x.shape)}"
                )
            if x.shape[2] != width:
                raise ValueError(f"{name} must have {width} features, got {x.shape[2]}")
        if not len(query) == len(key) == len(value) or key.shape[1] != value.shape[1]:
            raise ValueError(
                "query, key and value must have one batch, key and value one length, "
                f"got {tuple(query.shape[:2])}, {tuple(key.shape[:2])}, {tuple(value.shape[:2])}"
            )


def _split(x: Tensor, heads: int, size: int) -> Tensor:
    """Split features into heads: (batch, length, heads * size) -> (batch, heads, length, size)."""
    return x.unflatten(-1, (heads, size)).transpose(1, 2)


def _checked_key_mask(key_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be bool (True = a real token), got {kind}")
    if key_mask.shape != shape:
        raise ValueError(
            f"key_mask must have shape (batch, key_length) = {shape}, cached tokens included, "
            f"got {tuple(key_mask.shape)}"
        )
    return key_mask[:, None, None]
