"""One Transformer whose ideas are parts: attention core, positions, residual, norm, initialiser.

    h = E[token] + p(position);   h <- R(h; attention), h <- R(h; feed-forward);   logits = N(h) Eᵀ

At its defaults it is the pre-norm decoder of GPT-2; every part is an object that can be replaced by
another one with the same small protocol.

Source: https://arxiv.org/abs/1706.03762; Radford et al., Language Models are Unsupervised Multitask
Learners, 2019.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kexue.nn.attention import MultiHeadAttention
from kexue.nn.residual import Residual

__all__ = ["Transformer", "TransformerConfig"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # "gelu" is the form with tanh, which GPT-2 was trained with.
    "gelu": partial(nn.functional.gelu, approximate="tanh"),
    "gelu_exact": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}

_GPT2_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a :class:`Transformer`.

    Parameters
    ----------
    vocab_size : int
        Number of tokens.
    dim : int
        Width of the stream.
    num_layers : int
        Pairs of attention and feed-forward.
    num_heads : int
        Attention heads.
    key_dim : int, optional
        Size of the queries and keys of a head, ``dim // num_heads`` by default.
    feedforward_dim : int, optional
        Hidden width of the feed-forward, ``4 * dim`` by default.
    max_length : int, optional
        Rows of the default position table, and the length that any other table of positions must
        have. None for positions without an end.
    causal : bool
        Whether a token sees only itself and those before it.
    dropout : float
        Probability on the embedding, the attention weights and the branches.
    tie_embeddings : bool
        Whether the output matrix is the token embedding.
    activation : {"gelu", "gelu_exact", "relu", "silu"}
        Of the feed-forward; "gelu" is the form with tanh, as in GPT-2.

    Raises
    ------
    ValueError
        For sizes below 1, a dropout outside [0, 1), an unknown activation.

    Examples
    --------
    >>> TransformerConfig(vocab_size=64, dim=32).feedforward_dim
    128
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    key_dim: int | None = None
    feedforward_dim: int | None = None
    max_length: int | None = 512
    causal: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.feedforward_dim is None:
            object.__setattr__(self, "feedforward_dim", 4 * self.dim)
        for name in ("vocab_size", "dim", "num_heads", "key_dim", "feedforward_dim", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_layers < 0:
            raise ValueError(f"num_layers must not be negative, got {self.num_layers}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}"
            )


class Transformer(nn.Module):
    """Tokens to logits, through parts of your choice.

    Parameters
    ----------
    config : TransformerConfig
        Sizes.
    attention_core : callable, optional
        ``attention_core(config)`` builds the core of one layer: softmax attention by default, or
        ``TalkingHeadsAttention``, ``PerformerAttention``, …. A core that cannot be causal says so
        by an attribute ``bidirectional_only = True``.
    position : nn.Module, optional
        What tells positions. With a method ``rotate`` it is given to every attention layer
        (``RotaryEmbedding``); otherwise it is called with the positions and added to the token
        embedding (``nn.Embedding``, ``HierarchicalPositionEmbedding``,
        ``SinusoidalPositionEmbedding``, ``NoPosition``). A table of ``max_length`` rows by default.
    position_ids : callable, optional
        Positions of a forward pass that is not told any: ``position_ids(length)``, with
        ``batch_size=`` and ``device=`` where it takes them, such as
        ``functools.partial(random_positions, max_length=2048)``. 0, 1, 2, … by default.
    residual : callable, optional
        ``residual(sublayer, dim)`` wraps each sublayer: pre-norm
        :class:`~kexue.nn.residual.Residual` with ``norm`` and the dropout by default.
    norm : callable
        ``norm(dim)`` builds a norm: those of the default residual, and the last one. With residuals
        of ``style="post"`` there is no last norm, since the stream is normalised already.
    initializer : callable, optional
        Called with the finished model. By default linear layers and the embeddings that the model
        itself made start as in GPT-2: normal with standard deviation 0.02, divided by the root of
        the number of branches where a branch ends, biases 0. Parts that were handed in keep their
        values.

    Raises
    ------
    ValueError
        For parts that do not go together, at construction: a core for both directions in a causal
        model, a position table shorter than ``max_length``, a rotation wider than a key, no
        positions at all where ``max_length`` is None.

    Examples
    --------
    >>> model = Transformer(TransformerConfig(vocab_size=50, dim=32, num_layers=2))
    >>> model(torch.randint(50, (2, 10))).shape
    torch.Size([2, 10, 50])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_core: Callable[[TransformerConfig], nn.Module] | None = None,
        position: nn.Module | None = None,
        position_ids: Callable[..., Tensor] | None = None,
        residual: Callable[[nn.Module, int], nn.Module] | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        initializer: Callable[[nn.Module], object] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.position_ids = position_ids
        self.token_embeddings = nn.Embedding(config.vocab_size, config.dim)
        own: list[nn.Module] = [self.token_embeddings]
        if position is None:
            position = _position_table(config)
            own.append(position)
        rotary = position if hasattr(position, "rotate") else None
        self.position_embeddings = position if rotary is None else None
        self._check_position(position)
        self.dropout = nn.Dropout(config.dropout)

        wrap = residual or partial(Residual, norm=norm, dropout=config.dropout)
        self.layers = nn.ModuleList()
        ends: list[nn.Module] = []
        for _ in range(config.num_layers):
            attention, feedforward = (
                _attention(config, attention_core, rotary),
                _FeedForward(config),
            )
            own += [*attention.children(), *feedforward.children()]
            ends += [attention.output_projection, feedforward.fc2]
            self.layers.append(_Layer(wrap(attention, config.dim), wrap(feedforward, config.dim)))
        normalised = any(getattr(layer.feedforward, "style", "") == "post" for layer in self.layers)
        self.norm = nn.Identity() if normalised else norm(config.dim)
        self.output = None
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
            own.append(self.output)
        if initializer is None:
            _initialize(own, ends)
        else:
            initializer(self)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"] | None = None,
        *,
        key_mask: Bool[Tensor, "batch keys"] | None = None,
        cache: list[Any] | None = None,
        positions: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch length dim"] | None = None,
        return_hidden: bool = False,
    ) -> Float[Tensor, "batch length features"]:
        """Return the logits of the tokens, (batch, length, vocab_size).

        Parameters
        ----------
        tokens : Tensor, shape (batch, length), optional
            Token ids.
        key_mask : Tensor, shape (batch, key_length), optional
            True for real tokens; with a cache, the tokens in it come first.
        cache : list, optional
            From :meth:`new_cache`; the tokens are read as the continuation of those in it.
        positions : Tensor, shape (length,) or (batch, length), optional
            With one more dimension for a rotation of several axes. 0, 1, 2, … after the tokens in
            the cache by default, or what ``position_ids`` gives.
        inputs_embeds : Tensor, shape (batch, length, dim), optional
            In place of tokens.
        return_hidden : bool
            Whether to return the stream after the last norm, (batch, length, dim), not logits.

        Raises
        ------
        ValueError
            For tokens and ``inputs_embeds`` both or neither given, other shapes, positions beyond
            the table, a cache in a model for both directions or with ``position_ids``.
        TypeError
            For tokens that are not integers, or fractional positions with a table.
        """
        hidden = self._embed(tokens, inputs_embeds)
        batch, length = hidden.shape[:2]
        start = 0
        if cache is not None:
            self._check_cache(len(cache))
            start = cache[0].length if cache else 0
        if positions is None:
            positions = self._default_positions(start, length, batch, hidden.device)
        if self.position_embeddings is not None:
            self._check_table_positions(positions, batch, length)
            hidden = hidden + self.position_embeddings(positions)
        hidden = self.dropout(hidden)
        for index, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                key_mask=key_mask,
                is_causal=self.config.causal,
                cache=None if cache is None else cache[index],
                positions=positions if self.position_embeddings is None else None,
            )
        hidden = self.norm(hidden)
        if return_hidden:
            return hidden
        if self.output is not None:
            return self.output(hidden)
        return nn.functional.linear(hidden, self.token_embeddings.weight)

    def new_cache(self) -> list[Any]:
        """Return empty caches, one for each layer, for tokens that come in pieces.

        Raises
        ------
        ValueError
            For a model for both directions, or one whose ``position_ids`` draws positions anew.
        """
        self._check_cache(len(self.layers))
        attentions = [m for m in self.layers.modules() if isinstance(m, MultiHeadAttention)]
        return [attention.new_cache() for attention in attentions]

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue the tokens, one drawn after the other: (batch, length + max_new_tokens).

        Parameters
        ----------
        tokens : Tensor, shape (batch, length)
            What is continued, at least one token.
        max_new_tokens : int
            How many tokens follow.
        temperature : float
            Logits are divided by it; 0 takes the most probable token.
        top_k : int, optional
            Draw among the ``top_k`` most probable tokens.
        top_p : float, optional
            Draw among the fewest tokens that together have at least this probability.
        generator : torch.Generator, optional
            Source of the draws.

        Raises
        ------
        ValueError
            For a model for both directions, no tokens to continue, numbers outside their range, or
            more tokens than there are positions.
        """
        if not self.config.causal:
            raise ValueError("generate needs a causal model; this one has causal=False")
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(
                "tokens must have shape (batch, length) with at least one token each, "
                f"got {tuple(tokens.shape)}"
            )
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        end = tokens.shape[1] + max_new_tokens
        limit = self._table_length
        if limit is not None and end - 1 > limit:
            raise ValueError(f"{end} tokens need {end - 1} positions, the table has {limit}")
        # Positions that are drawn anew for every call leave a cache behind.
        cache = self.new_cache() if self.position_ids is None else None
        new = tokens
        for _ in range(max_new_tokens):
            logits = self(new, cache=cache)[:, -1]
            chosen = _choose(logits, temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, chosen], 1)
            new = tokens if cache is None else chosen
        return tokens

    @property
    def _table_length(self) -> int | None:
        """Number of positions in the table, where there is one."""
        for name in ("num_positions", "num_embeddings"):
            length = getattr(self.position_embeddings, name, None)
            if length is not None:
                return length
        return None

    def _check_position(self, position: nn.Module) -> None:
        config, limit = self.config, self._table_length
        if limit is not None and (config.max_length is None or config.max_length > limit):
            wanted = "any length" if config.max_length is None else f"{config.max_length} positions"
            raise ValueError(
                f"the position table has {limit} rows and max_length asks for {wanted}: "
                f"set max_length to at most {limit}"
            )
        width = getattr(position, "embedding_dim", config.dim)
        if width != config.dim:
            raise ValueError(f"position must have the model's width {config.dim}, got {width}")
        key_dim = config.key_dim or config.dim // config.num_heads
        if self.position_embeddings is None and getattr(position, "dim", 0) > key_dim:
            raise ValueError(f"position rotates {position.dim} features, a key has only {key_dim}")

    def _check_cache(self, layers: int) -> None:
        if not self.config.causal:
            raise ValueError("a cache needs a causal model; this one has causal=False")
        if self.position_ids is not None:
            raise ValueError(
                "a cache keeps positions that position_ids would give anew; build the model "
                "without position_ids and pass positions= to forward"
            )
        if layers != len(self.layers):
            raise ValueError(f"cache must have {len(self.layers)} layers, got {layers}")

    def _check_table_positions(self, positions: Tensor, batch: int, length: int) -> None:
        if positions.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(
                f"positions must have shape ({length},) or ({batch}, {length}), "
                f"got {tuple(positions.shape)}"
            )
        limit = self._table_length
        if limit is None:
            return
        if positions.is_floating_point():
            raise TypeError(f"a position table needs whole positions, got {positions.dtype}")
        # Looking at values would break a compiled graph and synchronise an accelerator.
        looks = not torch.compiler.is_compiling() and positions.device.type == "cpu"
        if looks and positions.numel() and int(positions.max()) >= limit:
            raise ValueError(
                f"position {int(positions.max())} is beyond the table of {limit} positions"
            )

    def _default_positions(self, start: int, length: int, batch: int, device: Any) -> Tensor:
        if self.position_ids is None:
            return torch.arange(start, start + length, device=device)
        taken = inspect.signature(self.position_ids).parameters
        given = {"batch_size": batch, "device": device}
        return self.position_ids(length, **{k: v for k, v in given.items() if k in taken})

    def _embed(self, tokens: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if tokens is not None and inputs_embeds is None:
            if tokens.is_floating_point() or tokens.dtype == torch.bool:
                raise TypeError(f"tokens must be integers, got {tokens.dtype}")
            if tokens.ndim != 2:
                raise ValueError(
                    f"tokens must have shape (batch, length), got {tuple(tokens.shape)}"
                )
            return self.token_embeddings(tokens)
        if inputs_embeds is None or tokens is not None:
            raise ValueError("give either tokens or inputs_embeds, and not both")
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds must be floating, got {inputs_embeds.dtype}")
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.dim:
            raise ValueError(
                f"inputs_embeds must have shape (batch, length, {self.config.dim}), "
                f"got {tuple(inputs_embeds.shape)}"
            )
        return inputs_embeds


class _Layer(nn.Module):
    def __init__(self, attention: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.feedforward = feedforward

    def forward(self, hidden: Tensor, **given: Any) -> Tensor:
        return self.feedforward(self.attention(hidden, **given))


class _FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.feedforward_dim or 4 * config.dim
        self.fc1 = nn.Linear(config.dim, width)
        self.fc2 = nn.Linear(width, config.dim)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


def _attention(
    config: TransformerConfig,
    make_core: Callable[[TransformerConfig], nn.Module] | None,
    rotary: nn.Module | None,
) -> MultiHeadAttention:
    core = None if make_core is None else make_core(config)
    if config.causal and getattr(core, "bidirectional_only", False):
        raise ValueError(
            f"{type(core).__name__} attends in both directions only; the model is causal"
        )
    return MultiHeadAttention(
        config.dim,
        config.num_heads,
        key_dim=config.key_dim,
        value_dim=None,
        dropout=config.dropout if core is None else 0.0,
        core=core,
        rotary=rotary,
    )


def _position_table(config: TransformerConfig) -> nn.Embedding:
    if config.max_length is None:
        raise ValueError("max_length must be given for the default table of positions")
    return nn.Embedding(config.max_length, config.dim)


def _initialize(modules: list[nn.Module], ends: list[nn.Module]) -> None:
    """Start as GPT-2 does, with smaller ends of branches, so that their sum is not larger."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=_GPT2_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in ends:
        nn.init.normal_(module.weight, std=_GPT2_STD / math.sqrt(len(ends)))  # type: ignore[arg-type]


def _choose(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch 1"]:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    scores, ids = (logits.float() / temperature).sort(-1, descending=True)
    probabilities = scores.softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        # A token stays while those before it have not reached top_p; the first one always does.
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p * probabilities.sum(-1, keepdim=True)] = 0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
