r"""The encoder: embeddings, rotary attention and feed-forward networks under post-norm.

Source: RoFormerV2 (ZhuiyiAI, 2022); https://arxiv.org/abs/2104.09864 (rotary positions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from kexue.models.roformer.configuration import _ACTIVATIONS, RoFormerV2Config
from kexue.models.roformer.initialization import initialize_weights
from kexue.nn.rotary import RotaryEmbedding

__all__ = ["EncoderOutput", "RoFormerV2Model"]


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder returns.

    Attributes
    ----------
    last_hidden_state : Tensor, shape (batch, length, hidden_size)
        Output of the last layer.
    hidden_states : tuple of Tensor, optional
        Output of the embedding and of each layer, where they were asked for.

    Examples
    --------
    >>> EncoderOutput(torch.zeros(1, 2, 4)).last_hidden_state.shape
    torch.Size([1, 2, 4])
    """

    last_hidden_state: Float[Tensor, "batch length hidden"]
    hidden_states: tuple[Tensor, ...] | None = None


class RoFormerV2Model(nn.Module):
    r"""A Transformer encoder without biases and without norm parameters, with rotary positions.

    .. math::
        x_0 &= N(E_\text{word}[\text{token}] + E_\text{type}[\text{type}]), \qquad
        N(x) = x / \sqrt{\operatorname{mean}(x^2) + \varepsilon} \\
        x &\leftarrow N(x + \alpha\, W_o \operatorname{attention}(x)), \qquad
        x \leftarrow N(x + \alpha\, W_2 \operatorname{act}(W_1 x))

    with dropout before the first norm and on each branch. Queries and keys are rotated in
    interleaved pairs. The first position is always attended, as the authors have it; so pad on the
    right. Any length is allowed. Under autocast and in half precision the norms are computed in
    single precision.

    Parameters
    ----------
    config : RoFormerV2Config
        The sizes.
    generator : torch.Generator, optional
        For the initial weights; torch's own by default.

    Attributes
    ----------
    residual_scale : float
        The α of the formula, 1 unless a :class:`ResidualWarmup` changes it. No part of the
        ``state_dict``.

    Raises
    ------
    ValueError
        For token ids that are no int64 tensor of shape (batch, length), and for masks or token
        types of another shape or dtype. Token ids out of range are torch's IndexError.

    Examples
    --------
    >>> config = RoFormerV2Config(20, 8, 2, 2, 16)
    >>> encoder = RoFormerV2Model(config, generator=torch.Generator().manual_seed(0)).eval()
    >>> encoder(torch.tensor([[2, 7, 5, 3], [2, 9, 3, 0]])).last_hidden_state.shape
    torch.Size([2, 4, 8])
    """

    def __init__(
        self, config: RoFormerV2Config, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._residual = _Residual()
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        initialize_weights(self, config.num_hidden_layers, generator=generator)

    @property
    def residual_scale(self) -> float:
        """The α of the branches."""
        return self._residual.scale

    @residual_scale.setter
    def residual_scale(self, scale: float) -> None:
        self._residual.scale = float(scale)

    def forward(
        self,
        input_ids: Int64[Tensor, "batch length"],
        *,
        attention_mask: Bool[Tensor, "batch length"] | Int64[Tensor, "batch length"] | None = None,
        token_type_ids: Int64[Tensor, "batch length"] | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode tokens.

        Without a mask (1 or true where there is a token) what is not ``pad_token_id`` is attended;
        without token types they are 0.
        """
        _check_tokens(input_ids, attention_mask, token_type_ids)
        x = self.embeddings(input_ids, token_type_ids)
        states: tuple[Tensor, ...] | None = (x,) if output_hidden_states else None
        attended = self._attended(input_ids, attention_mask)
        for layer in self.encoder.layer:
            x = layer(x, attended, self.encoder.rotary, self._residual.scale)
            states = None if states is None else (*states, x)
        return EncoderOutput(x, states)

    def _attended(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The keys that all queries may see, of shape (batch, 1, 1, length)."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        # A softmax over nothing would be NaN; the authors keep [CLS] for that.
        first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
        return (attention_mask.bool() | first)[:, None, None, :]


class _Residual:
    """Holds α outside of the module, whose own numbers torch.compile takes for constants."""

    def __init__(self) -> None:
        self.scale = 1.0


class _Embeddings(nn.Module):
    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.word_embeddings = _embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = _embedding(config.type_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.epsilon = config.layer_norm_eps

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        words = self.word_embeddings(input_ids)
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        return _normalize(self.dropout(words + types), self.epsilon)


class _Layers(nn.Module):
    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        # The frequencies are constants and must be numbers even where parameters are not yet.
        with torch.device("cpu"):
            self.rotary = RotaryEmbedding(config.head_size, layout="interleaved")


class _Layer(nn.Module):
    """Attention and feed-forward network; the nesting is that of the published names."""

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = _Attention(config)
        self.intermediate = _Dense(width, inner)
        self.output = _Dense(inner, width)
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.epsilon = config.layer_norm_eps

    def forward(
        self, x: Tensor, attended: Tensor, rotary: RotaryEmbedding, residual_scale: float
    ) -> Tensor:
        branch = self.dropout(self.attention(x, attended, rotary))
        x = _normalize(torch.add(x, branch, alpha=residual_scale), self.epsilon)
        branch = self.dropout(self.output(self.activation(self.intermediate(x))))
        return _normalize(torch.add(x, branch, alpha=residual_scale), self.epsilon)


class _Attention(nn.Module):
    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.self = _Projections(config.hidden_size)
        self.output = _Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, attended: Tensor, rotary: RotaryEmbedding) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in self.self(x)
        )
        query, key = rotary(query, key)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attended, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class _Projections(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = _linear(width, width)
        self.key = _linear(width, width)
        self.value = _linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)


class _Dense(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.dense = _linear(fan_in, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Return a matrix that `initialize_weights` is going to draw: once is enough."""
    return nn.utils.skip_init(
        nn.Linear, fan_in, fan_out, bias=False, device=torch.get_default_device()
    )


def _embedding(count: int, width: int) -> nn.Embedding:
    return nn.utils.skip_init(nn.Embedding, count, width, device=torch.get_default_device())


def _normalize(x: Tensor, epsilon: float) -> Tensor:
    """Divide by the root of the mean square, in single precision at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return functional.rms_norm(wide, x.shape[-1:], eps=epsilon).to(x.dtype)


def _check_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64 or input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must be an int64 tensor of shape (batch, length), got {_kind(input_ids)}"
        )
    if input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must hold at least one position, got {_kind(input_ids)}")
    _check_like("attention_mask", attention_mask, input_ids, (torch.bool, torch.int64))
    _check_like("token_type_ids", token_type_ids, input_ids, (torch.int64,))


def _check_like(
    name: str, value: Tensor | None, input_ids: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check that an optional companion of the tokens has their shape."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be a tensor of {kinds}, got {_kind(value)}")
    if value.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have the shape {tuple(input_ids.shape)} of input_ids, got "
            f"{tuple(value.shape)}"
        )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
