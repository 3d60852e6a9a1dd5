r"""Normalised linear attention, in a form that nothing can vanish or overflow in.

With logarithms of features, :math:`a_{jf}` of keys and :math:`b_{if}` of queries,

.. math::
    M_f = \max_j a_{jf}, \quad K'_{jf} = e^{a_{jf} - M_f}, \quad S = K'^\top V, \quad
    z = \textstyle\sum_j K'_j, \\
    r_i = \max_f (b_{if} + M_f), \quad p_{if} = e^{b_{if} + M_f - r_i}, \quad
    o_i = p_i S / (p_i \cdot z) .

Every :math:`z_f` is at least 1 and one :math:`p_{if}` is 1, so the denominator is at least 1. The
causal form keeps (M, S, z) as a running state over chunks of positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kexue.nn.linear_attention.features import _real_floats

__all__ = ["LinearAttentionState", "linear_attention"]

_UNDERFLOW = 1e-12
"""Denominators below this are of rows whose keys are dwarfed by later ones of their chunk."""

_EXACT_ROWS = 8
"""Rows at a time in the recomputation, which holds (rows, chunk, features) numbers."""


class LinearAttentionState:
    r"""What causal linear attention remembers of all earlier tokens; its size is constant.

    Attributes
    ----------
    length : int
        Number of tokens taken in.
    maximum : Tensor (batch, heads, features) or None
        :math:`M_f`, the largest logarithm of each feature so far; None before the first token.
    key_sum : Tensor (batch, heads, features) or None
        :math:`z_f = \sum_j e^{a_{jf} - M_f}`.
    key_value_sum : Tensor (batch, heads, features, value_dim) or None
        :math:`S_f = \sum_j e^{a_{jf} - M_f} v_j`.

    Examples
    --------
    >>> from kexue.nn.linear_attention import LinearAttention
    >>> core = LinearAttention()
    >>> state, tokens = core.new_cache(), torch.randn(1, 2, 5, 4)
    >>> _ = core(tokens, tokens, tokens, is_causal=True, cache=state)
    >>> state
    LinearAttentionState(length=5)
    """

    def __init__(self) -> None:
        self.reset()

    def __repr__(self) -> str:
        return f"LinearAttentionState(length={self.length})"

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.maximum: Tensor | None = None
        self.key_sum: Tensor | None = None
        self.key_value_sum: Tensor | None = None


class _Sums(NamedTuple):
    """Sums over keys, in units of exp(maximum)."""

    maximum: Float[Tensor, "batch heads features"]
    key_sum: Float[Tensor, "batch heads features"]
    key_value_sum: Float[Tensor, "batch heads features value_dim"]

    def in_units_that_include(self, log_key: Float[Tensor, "..."]) -> _Sums:
        """Raise the maximum to that of further keys. It cancels, so it carries no gradient."""
        maximum = torch.maximum(self.maximum, log_key.detach().amax(-2))
        decay = torch.exp(self.maximum - _finite(maximum))
        return _Sums(maximum, decay * self.key_sum, decay[..., None] * self.key_value_sum)

    def plus(self, key_weights: Float[Tensor, "..."], value: Float[Tensor, "..."]) -> _Sums:
        return _Sums(
            self.maximum,
            self.key_sum + key_weights.sum(-2),
            self.key_value_sum + key_weights.mT @ value,
        )

    def key_weights(self, log_key: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """K', at most 1 for keys that the maximum includes."""
        return torch.exp(log_key - _finite(self.maximum)[..., None, :])

    def query_weights(self, log_query: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """p, of which the largest in each row is 1."""
        exponent = log_query + _finite(self.maximum)[..., None, :]
        return torch.exp(exponent - _finite(exponent.detach().amax(-1, keepdim=True)))


def linear_attention(
    query_features: Float[Tensor, "batch heads query_length features"],
    key_features: Float[Tensor, "batch heads key_length features"],
    value: Float[Tensor, "batch heads key_length value_dim"],
    *,
    key_mask: Bool[Tensor, "..."] | None = None,
    is_causal: bool = False,
    log_features: bool = False,
    chunk_size: int = 64,
) -> Float[Tensor, "batch heads query_length value_dim"]:
    r"""Return averages of the values with weights :math:`\phi(q_i) \cdot \phi(k_j)`.

    Cost and memory are linear in the lengths. A query that may use no key gathers zeros.

    Parameters
    ----------
    query_features, key_features : Tensor (batch, heads, length, features)
        Features, or their logarithms.
    value : Tensor (batch, heads, key_length, value_dim)
        What is averaged.
    key_mask : Tensor, optional
        Bool, True for keys to use; broadcastable to (batch, heads, key_length).
    is_causal : bool
        Whether query i uses only keys up to i; the lengths must be equal.
    log_features : bool
        Whether the features are given as logarithms. That way no size of features can overflow or
        vanish, and the denominator needs no epsilon.
    chunk_size : int
        Positions at a time in the causal case. It does not change the result.

    Returns
    -------
    Tensor (batch, heads, query_length, value_dim)
        In the dtype of ``value``; half precision is computed in float32.

    Raises
    ------
    ValueError
        For shapes that do not fit together, different numbers of features, causal attention with
        different lengths, or ``chunk_size`` below 1.
    TypeError
        For features or values that are no real floating point numbers, or a mask that is not bool.

    Examples
    --------
    With equal features everywhere, causal attention is a running mean:

    >>> ones, value = torch.ones(1, 1, 4, 2), torch.tensor([4.0, 2.0, 0.0, 6.0]).reshape(1, 1, 4, 1)
    >>> linear_attention(ones, ones, value, is_causal=True).flatten()
    tensor([4., 3., 2., 3.])
    """
    _check(query_features, key_features, value, key_mask, is_causal, chunk_size)
    if log_features:
        return _attend(
            query_features, key_features, value, key_mask=key_mask, is_causal=is_causal,
            chunk_size=chunk_size,
        )  # fmt: skip
    dtype = value.dtype
    with torch.autocast(value.device.type, enabled=False):
        query, key, value = _in_working_dtype(query_features, key_features, value)
        if key_mask is not None:
            key, value = _masked(key, key_mask, 0.0), _masked(value, key_mask, 0.0)
        if is_causal:
            return _causal_sums(query, key, value, chunk_size).to(dtype)
        return _ratio(query @ (key.mT @ value), query @ key.sum(-2)[..., None]).to(dtype)


def _attend(
    log_query: Tensor,
    log_key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    chunk_size: int = 64,
    state: LinearAttentionState | None = None,
) -> Tensor:
    """The stable form, for logarithms of features; a state is read and carried on."""
    dtype = value.dtype
    with torch.autocast(value.device.type, enabled=False):
        log_query, log_key, value = _in_working_dtype(log_query, log_key, value)
        if key_mask is not None:
            log_key = _masked(log_key, key_mask, -math.inf)
            value = _masked(value, key_mask, 0.0)
        sums = _sums_of(state, log_key, value)
        if is_causal:
            output, sums = _causal(log_query, log_key, value, sums, chunk_size)
            if state is not None:
                state.length += log_key.shape[2]
                state.maximum, state.key_sum, state.key_value_sum = sums
            return output.to(dtype)
        if log_key.shape[2]:
            sums = sums.in_units_that_include(log_key)
            sums = sums.plus(sums.key_weights(log_key), value)
        weights = sums.query_weights(log_query)
        return _ratio(weights @ sums.key_value_sum, weights @ sums.key_sum[..., None]).to(dtype)


def _causal(
    log_query: Tensor, log_key: Tensor, value: Tensor, sums: _Sums, chunk_size: int
) -> tuple[Tensor, _Sums]:
    outputs = []
    for start in range(0, log_key.shape[2], chunk_size):
        rows = slice(start, start + chunk_size)
        b, a, v = log_query[:, :, rows], log_key[:, :, rows], value[:, :, rows]
        before, sums = sums, sums.in_units_that_include(a)
        p, key_weights = sums.query_weights(b), sums.key_weights(a)
        within = (p @ key_weights.mT).tril()
        numerator = p @ sums.key_value_sum + within @ v
        denominator = p @ sums.key_sum[..., None] + within.sum(-1, keepdim=True)
        outputs.append(_unless_underflow(numerator, denominator, b, a, v, before))
        sums = sums.plus(key_weights, v)
    return (torch.cat(outputs, 2) if outputs else value), sums


def _unless_underflow(
    numerator: Tensor, denominator: Tensor, b: Tensor, a: Tensor, v: Tensor, before: _Sums
) -> Tensor:
    """The quotient; where later keys of the chunk made a row vanish, the chunk's rows anew."""
    usable = (a.detach() > -math.inf).any(-1) | (before.maximum > -math.inf).any(-1, keepdim=True)
    alive = usable.cumsum(-1) > 0
    vanished = ((denominator.detach()[..., 0] < _UNDERFLOW) & alive).any()
    if not torch.compiler.is_compiling():
        return _exact_rows(b, a, v, *before) if vanished else _ratio(numerator, denominator)
    return torch.cond(
        vanished,
        lambda numerator, denominator, *chunk: _exact_rows(*chunk),
        lambda numerator, denominator, *chunk: _ratio(numerator, denominator),
        (numerator, denominator, b, a, v, *before),
    )


def _exact_rows(
    b: Tensor, a: Tensor, v: Tensor, maximum: Tensor, key_sum: Tensor, key_value_sum: Tensor
) -> Tensor:
    """A chunk's rows, each in a unit of its own: logsumexp_f(b_if + a_jf) is formed for pairs."""
    unusable = (a == -math.inf).all(-1)[..., None, :]
    # The logarithm of an empty sum has no gradient; such keys are masked after the sum instead.
    a = torch.where(unusable.mT, 0.0, a)
    length = a.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
    outputs = []
    for start in range(0, length, _EXACT_ROWS):
        rows = slice(start, start + _EXACT_ROWS)
        past = b[:, :, rows] + maximum[..., None, :]
        logits = torch.logsumexp(b[:, :, rows, None, :] + a[:, :, None, :, :], -1)
        logits = logits.masked_fill(unusable | future[rows], -math.inf)
        unit = torch.maximum(past.detach().amax(-1), logits.detach().amax(-1))[..., None]
        past, within = torch.exp(past - _finite(unit)), torch.exp(logits - _finite(unit))
        numerator = past @ key_value_sum + within @ v
        outputs.append(_ratio(numerator, past @ key_sum[..., None] + within.sum(-1, keepdim=True)))
    return torch.cat(outputs, 2)


def _causal_sums(query: Tensor, key: Tensor, value: Tensor, chunk_size: int) -> Tensor:
    """Causal attention with features as they are."""
    key_sum = key.new_zeros(*key.shape[:2], key.shape[3], 1)
    key_value_sum = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3])
    outputs = []
    for start in range(0, key.shape[2], chunk_size):
        rows = slice(start, start + chunk_size)
        q, k, v = query[:, :, rows], key[:, :, rows], value[:, :, rows]
        within = (q @ k.mT).tril()
        numerator = q @ key_value_sum + within @ v
        outputs.append(_ratio(numerator, q @ key_sum + within.sum(-1, keepdim=True)))
        key_sum = key_sum + k.sum(-2)[..., None]
        key_value_sum = key_value_sum + k.mT @ v
    return torch.cat(outputs, 2) if outputs else value


def _sums_of(state: LinearAttentionState | None, log_key: Tensor, value: Tensor) -> _Sums:
    batch, heads, _, features = log_key.shape
    if state is None or state.maximum is None or state.key_sum is None:
        return _Sums(
            log_key.new_full((batch, heads, features), -math.inf),
            log_key.new_zeros(batch, heads, features),
            log_key.new_zeros(batch, heads, features, value.shape[3]),
        )
    tokens = (batch, heads, features, value.shape[3])
    if state.key_value_sum is None or state.key_value_sum.shape != tokens:
        held = None if state.key_value_sum is None else tuple(state.key_value_sum.shape)
        raise ValueError(
            "tokens must have the (batch, heads, features, value_dim) that the cache was filled "
            f"with, {held}, got {tokens}"
        )
    return _Sums(state.maximum, state.key_sum, state.key_value_sum)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 for a query without keys, where both are 0."""
    return numerator / torch.where(denominator == 0, 1.0, denominator)


def _finite(x: Tensor) -> Tensor:
    """Any unit will do for an empty sum, whose maximum is -inf."""
    return torch.where(x == -math.inf, 0.0, x)


def _masked(x: Tensor, key_mask: Tensor, fill: float) -> Tensor:
    return x.masked_fill(~key_mask[..., None], fill)


def _in_working_dtype(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    chunk_size: int,
    what: str = "features",
) -> None:
    """Refuse what does not fit together; ``what`` is the last dimension of queries and keys."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        _real_floats(name, x)
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, size), got {tuple(x.shape)}"
            )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must have the same number of {what}, "
            f"got {query.shape[3]} and {key.shape[3]}"
        )
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "query, key and value must have the same batch and heads, key and value the same "
            f"length, got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            "causal linear attention needs as many queries as keys, "
            f"got {query.shape[2]} and {key.shape[2]}; earlier keys belong into a cache"
        )
    if key_mask is not None:
        _check_key_mask(key_mask, tuple(key.shape[:3]))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_key_mask(key_mask: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be bool (True = use this key), got {kind}")
    fits = key_mask.ndim <= 3 and all(
        size in (1, whole) for size, whole in zip(key_mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"key_mask must be broadcastable to (batch, heads, key_length) = {shape}, "
            f"got shape {tuple(key_mask.shape)}"
        )
