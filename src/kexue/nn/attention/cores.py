"""The cores of softmax attention: plain, and with heads that talk.

Both take heads that are split already, and return what each head gathered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from kexue.nn.attention.masks import (
    _causal,
    _checked,
    _masked,
    _restricted,
    _without_dead_rows,
)

__all__ = ["AttentionOutput", "DotProductAttention", "TalkingHeadsAttention"]

_CHUNK_ELEMENTS = 2**19
"""Logits at a time, over batch and heads; a few such blocks stay in the cache of a processor."""
_LEAST_CHUNK = 16
"""Queries at a time at least, for products of fewer rows are slow."""


class AttentionOutput(NamedTuple):
    """Result of attention; it unpacks like that of ``torch.nn.MultiheadAttention``.

    Parameters
    ----------
    output : Tensor
        Of a core (batch, value_heads, query_length, value_dim), of a module
        (batch, query_length, output_dim).
    weights : Tensor or None
        (batch, value_heads, query_length, key_length), before dropout; None unless asked for.

    Examples
    --------
    >>> query = torch.randn(1, 2, 3, 4)
    >>> output, weights = DotProductAttention()(query, query, query, need_weights=True)
    >>> output.shape, weights.shape
    (torch.Size([1, 2, 3, 4]), torch.Size([1, 2, 3, 3]))
    """

    output: Tensor
    weights: Tensor | None = None


class DotProductAttention(nn.Module):
    r"""Ordinary attention, :math:`\operatorname{softmax}(s\,QK^\top + M)\,V` for each head.

    A wrapper of ``torch.nn.functional.scaled_dot_product_attention``, so it runs in fused kernels;
    only ``need_weights`` computes the weights one after the other. Unlike there, ``is_causal`` is
    aligned to the lower right, and a query that may attend nothing gives zeros with zero gradients
    in every kernel. A NaN in a masked value still reaches the output, as 0 times NaN.

    Parameters
    ----------
    dropout : float
        Probability that a weight is dropped in training, drawn from torch's global generator.

    Raises
    ------
    ValueError
        For a probability outside [0, 1], and in a call for shapes that do not fit together or a
        causal query longer than its keys.
    TypeError
        In a call, for a mask that is neither bool nor floating point.

    Examples
    --------
    Two queries at the end of five tokens, the way cached decoding asks:

    >>> core = DotProductAttention()
    >>> query, key, value = torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 5, 1), torch.arange(5.0)
    >>> core(query, key, value.reshape(1, 1, 5, 1), is_causal=True).output.flatten()
    tensor([1.5000, 2.0000])
    """

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = _probability(dropout)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length key_dim"],
        key: Float[Tensor, "batch heads key_length key_dim"],
        value: Float[Tensor, "batch heads key_length value_dim"],
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
        need_weights: bool = False,
    ) -> AttentionOutput:
        """Return what each query gathers from the values.

        Parameters
        ----------
        query, key, value : Tensor
            Split heads, (batch, heads, length, size).
        mask : Tensor, optional
            Bool, True where a query may attend, or floating point, added to the logits;
            broadcastable to (batch, heads, query_length, key_length).
        is_causal : bool
            Whether query i sees only the keys j <= i + key_length - query_length.
        scale : float or Tensor, optional
            Factor of the logits, ``key_dim ** -0.5`` by default; a tensor is broadcast against
            (batch, heads, query_length, 1).
        need_weights : bool
            Whether to return the weights, too.
        """
        shape = _checked_heads(query, key, value, is_causal=is_causal)
        heads = query.shape[1]
        if value.shape[1] != heads:
            raise ValueError(f"value must have the query's {heads} heads, got {value.shape[1]}")
        query_length, key_length = shape
        mask = None if mask is None else _checked(mask, (len(query), heads, *shape))
        # The kernels' own causal mask is aligned to the upper left: right for a square only.
        fused_causal = (
            is_causal and mask is None and query_length == key_length and not need_weights
        )
        if is_causal and not fused_causal and query_length > 1:
            mask = _restricted(mask, _causal(query_length, key_length, query.device)[None, None])
        if isinstance(scale, Tensor):
            query, scale = query * _checked_scale(scale, query), 1.0
        alive = None
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
            mask, alive = _without_dead_rows(mask)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (query * _number(scale, query)) @ key.mT
            logits = logits if mask is None else _masked(logits, mask)
            weights = _softmax(logits).to(value.dtype)
            weights = weights if alive is None else torch.where(alive, weights, 0.0)
            output = dropout(weights, rate) @ value
        else:
            output = _fused(
                query, key, value, mask=mask, is_causal=fused_causal, scale=_number(scale, query),
                rate=rate,
            )  # fmt: skip
            output = output if alive is None else torch.where(alive, output, 0.0)
        return AttentionOutput(output, weights)


class TalkingHeadsAttention(nn.Module):
    r"""Attention whose heads exchange logits before the softmax and weights after it.

    .. math::
        J_i = \sum_g A_{ig}\, s\, Q_g K_g^\top, \qquad W_i = \operatorname{softmax}(J_i + M),
        \qquad O_v = \sum_i B_{vi} W_i V_v .

    The first mixing makes each head one of key size ``num_key_heads * key_dim`` with a shared key
    matrix; the second gives each value a linear mixture of distributions, whose entries may be
    negative and need not sum to 1. Where both mixings are the identity, as they are at first when
    the counts are equal, this is ordinary attention.

    Logits are held for a chunk of the queries at a time; the result depends on the size of the
    chunk only by rounding. Half precision is computed in float32 and rounded at the end; under
    autocast, products run in its dtype and the softmax in float32.

    Parameters
    ----------
    num_heads : int
        Number of softmax distributions.
    num_key_heads, num_value_heads : int, optional
        Number of query–key pairs and of values, ``num_heads`` by default.
    mix_logits, mix_weights : bool
        Which of the two mixings there are; without one, its counts must be equal.
    dropout : float
        Probability that a mixed weight is dropped in training, drawn from torch's global generator.
    query_chunk_size : int, optional
        Queries at a time; by default as many as keep the logits of a chunk, over batch and heads,
        near 2^19, and no fewer than 16.
    device, dtype : optional
        Of the mixing matrices.

    Attributes
    ----------
    logits_mixing : Parameter (num_heads, num_key_heads) or None
        A, rows for heads after mixing, as in ``nn.Linear``.
    weights_mixing : Parameter (num_value_heads, num_heads) or None
        B.

    Raises
    ------
    ValueError
        For counts or a chunk below 1, different counts without the mixing between them, and in a
        call for shapes that do not fit together or a causal query longer than its keys.
    TypeError
        In a call, for a mask that is neither bool nor floating point.

    Examples
    --------
    >>> core = TalkingHeadsAttention(4, num_key_heads=2, num_value_heads=3)
    >>> query, value = torch.randn(1, 2, 5, 8), torch.randn(1, 3, 5, 6)
    >>> core(query, query, value).output.shape
    torch.Size([1, 3, 5, 6])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        num_value_heads: int | None = None,
        mix_logits: bool = True,
        mix_weights: bool = True,
        dropout: float = 0.0,
        query_chunk_size: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        if min(num_heads, num_key_heads, num_value_heads) < 1:
            raise ValueError(
                "num_heads, num_key_heads and num_value_heads must be at least 1, "
                f"got {num_heads}, {num_key_heads} and {num_value_heads}"
            )
        if not mix_logits and num_key_heads != num_heads:
            raise ValueError(
                f"num_key_heads ({num_key_heads}) must equal num_heads ({num_heads}) "
                "without mix_logits"
            )
        if not mix_weights and num_value_heads != num_heads:
            raise ValueError(
                f"num_value_heads ({num_value_heads}) must equal num_heads ({num_heads}) "
                "without mix_weights"
            )
        if query_chunk_size is not None and query_chunk_size < 1:
            raise ValueError(f"query_chunk_size must be at least 1, got {query_chunk_size}")
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads
        self.num_value_heads = num_value_heads
        self.dropout = _probability(dropout)
        self.query_chunk_size = query_chunk_size

        def mixing(after: int, before: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(after, before, device=device, dtype=dtype))

        self.logits_mixing = mixing(num_heads, num_key_heads) if mix_logits else None
        self.weights_mixing = mixing(num_value_heads, num_heads) if mix_weights else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set square mixings to the identity, others to normal entries of variance 1/fan_in."""
        for mixing in (self.logits_mixing, self.weights_mixing):
            if mixing is None:
                continue
            if mixing.shape[0] == mixing.shape[1]:
                nn.init.eye_(mixing)
            else:
                nn.init.normal_(mixing, std=mixing.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_key_heads={self.num_key_heads}, "
            f"num_value_heads={self.num_value_heads}, "
            f"mix_logits={self.logits_mixing is not None}, "
            f"mix_weights={self.weights_mixing is not None}, dropout={self.dropout}"
        )

    def forward(
        self,
        query: Float[Tensor, "batch key_heads query_length key_dim"],
        key: Float[Tensor, "batch key_heads key_length key_dim"],
        value: Float[Tensor, "batch value_heads key_length value_dim"],
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
        need_weights: bool = False,
    ) -> AttentionOutput:
        """Return what each value head gathers; the arguments are those of DotProductAttention.

        A mask acts between the two mixings; its heads are the ``num_heads`` distributions.
        """
        query_length, key_length = _checked_heads(query, key, value, is_causal=is_causal)
        for name, x, heads in (("query", query, self.num_key_heads),
                               ("value", value, self.num_value_heads)):  # fmt: skip
            if x.shape[1] != heads:
                raise ValueError(f"{name} must have {heads} heads, got {x.shape[1]}")
        if mask is not None:
            mask = _checked(mask, (len(query), self.num_heads, query_length, key_length))
        dtype = value.dtype
        working = torch.promote_types(dtype, torch.float32)
        scale = _checked_scale(scale, query) if isinstance(scale, Tensor) else _number(scale, query)
        query, key, value = query.to(working) * scale, key.to(working), value.to(working)

        size = self.query_chunk_size or self._chunk_size(len(query), key_length)
        starts = range(0, max(query_length, 1), size)
        weights: list[Tensor] = []
        if len(starts) == 1 or need_weights or torch.is_grad_enabled():
            outputs = []
            for start in starts:
                part, mixed = self._chunk(query, key, value, mask, is_causal, start, start + size)
                outputs.append(part)
                if need_weights:
                    weights.append(pad(mixed, (0, key_length - mixed.shape[-1])))
            output = torch.cat(outputs, -2)
        else:
            # Small results, kept between large blocks that come and go, would scatter the heap.
            output = value.new_empty(*value.shape[:2], query_length, value.shape[-1])
            for start in starts:
                output[:, :, start : start + size] = self._chunk(
                    query, key, value, mask, is_causal, start, start + size
                )[0]
        return AttentionOutput(
            output.to(dtype), torch.cat(weights, -2).to(dtype) if need_weights else None
        )

    def _chunk(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        is_causal: bool, start: int, stop: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return output and weights of the queries from ``start`` to ``stop``."""
        query_length, key_length = query.shape[2], key.shape[2]
        stop = min(stop, query_length)
        # Later keys are masked for the whole chunk: they need not be computed.
        visible = stop + key_length - query_length if is_causal else key_length
        mask = None if mask is None else _part(mask, start, stop, visible)
        if is_causal and stop - start > 1:
            mask = _restricted(mask, _causal(stop - start, visible, query.device)[None, None])
        weights = self._weights(query[:, :, start:stop], key[:, :, :visible], mask)
        dropped = dropout(weights, self.dropout) if self.training else weights
        return dropped @ value[:, :, :visible], weights

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mixed weights of scaled queries."""
        logits = _mixed(self.logits_mixing, query @ key.mT)
        if mask is None:
            weights = _softmax(logits)
        else:
            # Only after the mixing: before it, a masked key would leak, or turn to NaN.
            mask, alive = _without_dead_rows(mask)
            weights = torch.where(alive, _softmax(_masked(logits, mask)), 0.0)
        return _mixed(self.weights_mixing, weights)

    def _chunk_size(self, batch: int, key_length: int) -> int:
        heads = max(self.num_heads, self.num_key_heads, self.num_value_heads)
        return max(_CHUNK_ELEMENTS // max(batch * heads * key_length, 1), _LEAST_CHUNK)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool,
    scale: float, rate: float,
) -> Tensor:  # fmt: skip
    """Call the fused kernels of torch."""
    key_dim, value_dim = query.shape[-1], value.shape[-1]
    if query.device.type == "cpu" and key_dim != value_dim and rate == 0:
        # On processors only equal widths are fused. Zeros cost less than a matrix of logits.
        width = max(key_dim, value_dim)
        query, key = pad(query, (0, width - key_dim)), pad(key, (0, width - key_dim))
        value = pad(value, (0, width - value_dim))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=rate, is_causal=is_causal, scale=scale
    )
    return output[..., :value_dim]


def _mixed(mixing: Tensor | None, x: Tensor) -> Tensor:
    """Mix along the heads, in one product."""
    if mixing is None:
        return x
    batch, _, rows, columns = x.shape
    # Not mixing @ x, which would transpose all of x for the sake of a larger product.
    mixed = torch.bmm(mixing.to(x.dtype).expand(batch, -1, -1), x.flatten(2))
    return mixed.view(batch, len(mixing), rows, columns)


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _part(mask: Tensor, start: int, stop: int, visible: int) -> Tensor:
    mask = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
    return mask if mask.shape[-1] == 1 else mask[..., :visible]


def _number(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _checked_scale(scale: Tensor, query: Tensor) -> Tensor:
    batch, heads, query_length, _ = query.shape
    fits = scale.ndim <= 4 and all(
        size in (1, whole)
        for size, whole in zip(scale.shape[::-1], (1, query_length, heads, batch), strict=False)
    )
    if not fits or scale.is_complex():
        raise ValueError(
            "scale must be a real tensor, broadcastable to (batch, heads, query_length, 1) = "
            f"{(batch, heads, query_length, 1)}, got {scale.dtype} {tuple(scale.shape)}"
        )
    return scale.to(query.dtype)


def _probability(dropout: float) -> float:
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability between 0 and 1, got {dropout}")
    return float(dropout)


def _checked_heads(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool
) -> tuple[int, int]:
    """Refuse heads that do not fit together; return the lengths of queries and keys."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of real floating point numbers, got {kind}")
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, size), got {tuple(x.shape)}"
            )
    (batch, heads, query_length, key_dim), key_length = query.shape, key.shape[2]
    if key.shape[:2] != (batch, heads) or key.shape[3] != key_dim:
        raise ValueError(
            "key must have the query's batch, heads and key size "
            f"{(batch, heads, key_dim)}, got {(*key.shape[:2], key.shape[3])}"
        )
    if value.shape[0] != batch or value.shape[2] != key_length:
        raise ValueError(
            f"value must have the key's batch and length {(batch, key_length)}, "
            f"got {(value.shape[0], value.shape[2])}"
        )
    if is_causal and query_length > key_length:
        raise ValueError(
            f"causal attention needs at least as many keys as queries, got {query_length} queries "
            f"and {key_length} keys"
        )
    return query_length, key_length
