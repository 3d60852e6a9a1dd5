"""The cores: Performer, which estimates softmax attention, and its plainer relative."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kexue.nn.attention import AttentionOutput
from kexue.nn.linear_attention.attention import (
    LinearAttentionState,
    _attend,
    _check,
    _check_key_mask,
)
from kexue.nn.linear_attention.features import (
    Norm,
    RandomFeatures,
    _one_of,
    _positive_scale,
    _working,
)

__all__ = ["LinearAttention", "PerformerAttention"]

PositiveKind = Literal["positive", "hyperbolic"]


class PerformerAttention(nn.Module):
    r"""Softmax attention, estimated with positive random features in linear time.

    Softmax does not see a constant that is subtracted from all keys, while the variance of the
    estimate depends on :math:`|q + k - c|^2` exponentially. It is least on average at
    :math:`c = \operatorname{mean} q + \operatorname{mean} k`, so keys are centred there. In
    bidirectional attention the means are those of the present tokens, for each example and head. In
    causal attention that would let the future in, so c is the buffer ``key_shift``, which
    :meth:`calibrate_` sets from some hundred tokens.

    Parameters
    ----------
    key_dim : int
        Size of the queries and keys of a head.
    num_features : int, optional
        Rows of the projection, ``ceil(key_dim * ln(key_dim))`` by default.
    kind : {"positive", "hyperbolic"}
        Which features, as in :class:`RandomFeatures`.
    orthogonal, norm
        As in :func:`random_projection`.
    center : bool
        Whether keys are centred.
    num_heads : int
        Number of shifts: 1 for a common one, or one for each head.
    redraw_interval : int, optional
        Calls in training after which a new projection is drawn; never by default, and never in
        evaluation.
    chunk_size : int
        Positions at a time in causal attention. It does not change the result.
    generator : torch.Generator, optional
        Source of all projections. By default one of its own, seeded from torch's global one here.
    device, dtype : optional
        Of the buffers. Arithmetic is in the dtype of the inputs, in float32 at least.

    Attributes
    ----------
    features : RandomFeatures
        The projection, the same for all heads.
    key_shift : Tensor (num_heads, 1, key_dim)
        What causal attention subtracts from the keys; zero until :meth:`calibrate_`.
    calls_since_redraw : Tensor
        Counts calls in training, where there is a ``redraw_interval``.

    Raises
    ------
    ValueError
        For sizes below 1, an unknown kind or norm, and in a call for ``need_weights``, a mask that
        is not bool or depends on the query, causal attention of different lengths, a cache without
        ``is_causal``, a scale that is not positive, or shapes that do not fit together.
    TypeError
        In a call, for inputs that are no real floating point numbers, or another kind of cache.

    Examples
    --------
    >>> core = PerformerAttention(8, 16384, generator=torch.Generator().manual_seed(0))
    >>> draws = torch.randn(3, 1, 1, 20, 8, generator=torch.Generator().manual_seed(1))
    >>> query, key, value = 0.5 * draws
    >>> softmax = torch.softmax(query @ key.mT / 8**0.5, -1) @ value
    >>> bool((core(query, key, value).output - softmax).abs().max() < 0.05)
    True
    """

    key_shift: Tensor
    calls_since_redraw: Tensor

    def __init__(
        self,
        key_dim: int,
        num_features: int | None = None,
        *,
        kind: PositiveKind = "positive",
        orthogonal: bool = True,
        norm: Norm = "chi",
        center: bool = True,
        num_heads: int = 1,
        redraw_interval: int | None = None,
        chunk_size: int = 64,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _one_of("kind of attention features", kind, get_args(PositiveKind))
        sizes = {
            "key_dim": key_dim, "num_heads": num_heads, "redraw_interval": redraw_interval,
            "chunk_size": chunk_size,
        }  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if generator is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
            generator = torch.Generator().manual_seed(seed)
        self._generator = generator
        self.key_dim = key_dim
        self.center = center
        self.redraw_interval = redraw_interval
        self.chunk_size = chunk_size
        self.features = RandomFeatures(
            key_dim, num_features, kind=kind, orthogonal=orthogonal, norm=norm,
            generator=generator, device=device, dtype=dtype,
        )  # fmt: skip
        shift = torch.zeros(num_heads, 1, key_dim, device=device, dtype=dtype)
        self.register_buffer("key_shift", shift)
        self.register_buffer(
            "calls_since_redraw", torch.zeros((), dtype=torch.int64, device=device)
        )

    def extra_repr(self) -> str:
        return (
            f"{self.key_dim}, center={self.center}, num_shifts={len(self.key_shift)}, "
            f"redraw_interval={self.redraw_interval}, chunk_size={self.chunk_size}"
        )

    def new_cache(self) -> LinearAttentionState:
        """Return an empty state for causal attention over tokens that come in pieces."""
        return LinearAttentionState()

    def redraw_(self, generator: torch.Generator | None = None) -> PerformerAttention:
        """Draw a new projection, from the generator of the construction by default."""
        self.features.redraw_(self._generator if generator is None else generator)
        self.calls_since_redraw.zero_()
        return self

    @torch.no_grad()
    def calibrate_(
        self,
        query: Float[Tensor, "batch heads query_length key_dim"],
        key: Float[Tensor, "batch heads key_length key_dim"],
        *,
        key_mask: Bool[Tensor, "..."] | None = None,
    ) -> PerformerAttention:
        """Set ``key_shift`` to the mean of these queries plus that of these keys.

        Parameters
        ----------
        query, key : Tensor (batch, heads, length, key_dim)
            As the core gets them, not scaled.
        key_mask : Tensor, optional
            Bool, True for real tokens, broadcastable to (batch, heads, key_length). It counts for
            the queries, too, where these are as many.
        """
        _check(query, key, key, key_mask, False, self.chunk_size, "coordinates")
        self._check_sizes(query)
        over = (0, 1, 2) if len(self.key_shift) == 1 else (0, 2)
        center = _center(query, key, key_mask, over)
        self.key_shift.copy_(center.reshape(self.key_shift.shape))
        return self

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length key_dim"],
        key: Float[Tensor, "batch heads key_length key_dim"],
        value: Float[Tensor, "batch heads key_length value_dim"],
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        need_weights: bool = False,
        cache: LinearAttentionState | None = None,
    ) -> AttentionOutput:
        """Return what each query gathers from the values.

        Parameters
        ----------
        query, key, value : Tensor
            Split heads, (batch, heads, length, size).
        mask : Tensor, optional
            Bool, True for keys to use; broadcastable to (batch, heads, 1, key_length).
        is_causal : bool
            Whether a query uses only keys up to its own place, and what is in the cache.
        scale : float, optional
            Factor of the logits, ``key_dim ** -0.5`` by default.
        need_weights : bool
            There are no weights: True is refused.
        cache : LinearAttentionState, optional
            From :meth:`new_cache`, filled with the same projection and scale; the new tokens are
            taken in.
        """
        key_mask = _checked_call(
            query, key, value, mask, is_causal, need_weights, cache, self.chunk_size
        )
        self._check_sizes(query)
        scale = self.key_dim**-0.5 if scale is None else scale
        _positive_scale(scale)
        if self.training and self.redraw_interval is not None:
            self._count_call(self.redraw_interval)
        if self.center:
            # In the working dtype: the means of many tokens do not fit into half precision.
            shift = self.key_shift if is_causal else _center(query, key, key_mask, (2,))
            key = _working(key) - shift.to(_working(key).dtype)
        output = _attend(
            self.features._logarithms(query, scale, norm_term=False),
            self.features._logarithms(key, scale, norm_term=True),
            value, key_mask=key_mask, is_causal=is_causal, chunk_size=self.chunk_size, state=cache,
        )  # fmt: skip
        return AttentionOutput(output)

    @torch.compiler.disable
    def _count_call(self, interval: int) -> None:
        if int(self.calls_since_redraw) >= interval:
            self.redraw_()
        self.calls_since_redraw += 1

    def _check_sizes(self, query: Tensor) -> None:
        if query.shape[3] != self.key_dim:
            raise ValueError(
                f"the last dimension of query and key must be key_dim = {self.key_dim}, "
                f"got {query.shape[3]}"
            )
        if len(self.key_shift) not in (1, query.shape[1]):
            raise ValueError(
                f"the core was made for num_heads = {len(self.key_shift)}, got {query.shape[1]}"
            )


class LinearAttention(nn.Module):
    r"""Linear attention with :math:`\phi = \operatorname{elu} + 1`.

    It imitates nothing: the plain choice for training from scratch. A ``scale`` s in a call
    multiplies queries and keys by :math:`\sqrt s`; by default there is none.

    Parameters
    ----------
    chunk_size : int
        Positions at a time in causal attention. It does not change the result.

    Raises
    ------
    ValueError
        For ``chunk_size`` below 1, and in a call as for :class:`PerformerAttention`.
    TypeError
        In a call, for inputs that are no real floating point numbers, or another kind of cache.

    Examples
    --------
    >>> query, key, value = torch.randn(3, 1, 2, 6, 4).unbind()
    >>> LinearAttention()(query, key, value, is_causal=True).output.shape
    torch.Size([1, 2, 6, 4])
    """

    def __init__(self, *, chunk_size: int = 64) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"

    def new_cache(self) -> LinearAttentionState:
        """Return an empty state for causal attention over tokens that come in pieces."""
        return LinearAttentionState()

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length key_dim"],
        key: Float[Tensor, "batch heads key_length key_dim"],
        value: Float[Tensor, "batch heads key_length value_dim"],
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        need_weights: bool = False,
        cache: LinearAttentionState | None = None,
    ) -> AttentionOutput:
        """Return what each query gathers; the arguments are those of PerformerAttention."""
        key_mask = _checked_call(
            query, key, value, mask, is_causal, need_weights, cache, self.chunk_size
        )
        if scale is not None:
            _positive_scale(scale)
        factor = 1.0 if scale is None else math.sqrt(scale)
        output = _attend(
            _log_elu_plus_one(factor * _working(query)),
            _log_elu_plus_one(factor * _working(key)),
            value, key_mask=key_mask, is_causal=is_causal, chunk_size=self.chunk_size, state=cache,
        )  # fmt: skip
        return AttentionOutput(output)


def _log_elu_plus_one(x: Tensor) -> Tensor:
    """log(1 + x) above zero; below, where elu(x) + 1 = e^x could vanish, x itself."""
    return torch.where(x > 0, torch.log1p(x.clamp(min=0)), x)


def _center(
    query: Tensor, key: Tensor, key_mask: Tensor | None, over: tuple[int, ...]
) -> Float[Tensor, "..."]:
    """mean(query) + mean(key), without keys that are masked; see ``calibrate_`` for queries."""
    queries_are_keys = query.shape[2] == key.shape[2]
    return _mean(query, key_mask if queries_are_keys else None, over) + _mean(key, key_mask, over)


def _mean(x: Tensor, mask: Tensor | None, over: tuple[int, ...]) -> Tensor:
    x = _working(x)
    if mask is None:
        total = x.sum(over, keepdim=True)
        return total * (total.numel() / max(x.numel(), 1))
    used = mask.expand(x.shape[:3])[..., None]
    return torch.where(used, x, 0.0).sum(over, keepdim=True) / used.sum(over, keepdim=True).clamp(1)


def _checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    cache: LinearAttentionState | None,
    chunk_size: int,
) -> Tensor | None:
    """Refuse what no linear attention can do; return the mask of the keys."""
    if need_weights:
        raise ValueError("linear attention forms no attention weights: need_weights must be False")
    _check(query, key, value, None, is_causal, chunk_size, "coordinates")
    if cache is not None:
        if not isinstance(cache, LinearAttentionState):
            raise TypeError(f"cache must be a LinearAttentionState, got {type(cache).__name__}")
        if not is_causal:
            raise ValueError("a cache needs is_causal=True")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be bool (True = use this key), got {kind}: without an attention matrix "
            "there is nothing to add to"
        )
    if mask.ndim >= 2 and mask.shape[-2] != 1:
        raise ValueError(
            "mask must be the same for all queries, (batch, heads, 1, key_length), "
            f"got shape {tuple(mask.shape)}"
        )
    key_mask = mask[..., 0, :] if mask.ndim >= 2 else mask
    _check_key_mask(key_mask, tuple(key.shape[:3]))
    return key_mask
