"""What grow_transformer knows of each kind of model: its sizes, and what its parameters mean.

The spaces: ``stream`` is what the layers add to, ``final`` what the output layer reads, ``context``
the values that attention has averaged, ``intermediate`` the inside of a feed-forward; ``query``,
``key`` and ``value`` are themselves; ``pooled`` and ``transform`` belong to BERT's heads.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kexue.nn.growth.rules import ParameterRule

__all__: list[str] = []

_LLAMA_LIKE = ("llama", "mistral", "qwen2")
# Frequencies that depend on base^(-2i / head_dim) only, whatever the number of planes.
_RESCALED_BY_FREQUENCY = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of a family of models: the keys of its configuration and parts of its state dict."""

    width: str
    heads: str
    layers: str
    intermediate: str
    epsilon: str
    key_value_heads: str | None = None
    head_dim: str | None = None
    tied: str = "tie_word_embeddings"
    tied_by_default: bool = True
    layer_pattern: str
    """Matches the name of a layer's parameter, in three groups: before, number, after."""
    branch_ends: str
    """Matches what comes after the number, for the last map of each residual branch."""
    embedding: str
    output: str
    """Names of the embedding and of the output layer that may be tied to it."""


FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        width="hidden_size",
        heads="num_attention_heads",
        layers="num_hidden_layers",
        intermediate="intermediate_size",
        epsilon="layer_norm_eps",
        layer_pattern=r"((?:bert\.)?encoder\.layer\.)(\d+)(\..+)",
        branch_ends=r"\.(attention\.)?output\.dense\.(weight|bias)",
        embedding=r"(bert\.)?embeddings\.word_embeddings\.weight",
        output=r"cls\.predictions\.decoder\.weight",
    ),
    "gpt2": Family(
        width="n_embd",
        heads="n_head",
        layers="n_layer",
        intermediate="n_inner",
        epsilon="layer_norm_epsilon",
        layer_pattern=r"((?:transformer\.)?h\.)(\d+)(\..+)",
        branch_ends=r"\.(attn|mlp)\.c_proj\.(weight|bias)",
        embedding=r"(transformer\.)?wte\.weight",
        output=r"lm_head\.weight",
    ),
    "kexue": Family(
        width="dim",
        heads="num_heads",
        layers="num_layers",
        intermediate="feedforward_dim",
        epsilon="norm_eps",
        head_dim="key_dim",
        tied="tie_embeddings",
        layer_pattern=r"(layers\.)(\d+)(\..+)",
        branch_ends=r"\.(attention\.sublayer\.output_projection|feedforward\.sublayer\.fc2)"
        r"\.(weight|bias)",
        embedding=r"token_embeddings\.weight",
        output=r"output\.weight",
    ),
} | dict.fromkeys(
    _LLAMA_LIKE,
    Family(
        width="hidden_size",
        heads="num_attention_heads",
        layers="num_hidden_layers",
        intermediate="intermediate_size",
        epsilon="rms_norm_eps",
        key_value_heads="num_key_value_heads",
        head_dim="head_dim",
        tied_by_default=False,
        layer_pattern=r"((?:model\.)?layers\.)(\d+)(\..+)",
        branch_ends=r"\.(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)",
        embedding=r"(model\.)?embed_tokens\.weight",
        output=r"lm_head\.weight",
    ),
)


@dataclass(frozen=True)
class Architecture:
    """A configuration, read."""

    family: Family
    model_type: str
    config: dict[str, Any]
    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    layers: int
    intermediate: int
    epsilon: float
    tied: bool
    norm: Literal["LayerNorm", "RMSNorm"]
    post_norm: bool
    rotary: Literal["half", "interleaved"] | None

    @staticmethod
    def read(config: Mapping[str, Any] | Any) -> Architecture:
        """Read a configuration of one of the families.

        Raises
        ------
        ValueError
            For an unknown model type or a key that is missing.
        TypeError
            For something that is no mapping and has no ``to_dict``.
        """
        if not isinstance(config, Mapping):
            if not hasattr(config, "to_dict"):
                raise TypeError(
                    "config must be a mapping or an object with to_dict(), "
                    f"got {type(config).__name__}"
                )
            config = config.to_dict()
        config = copy.deepcopy(dict(config))
        model_type = str(config.get("model_type"))
        if model_type not in FAMILIES:
            raise ValueError(
                f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {model_type!r}"
            )
        family = FAMILIES[model_type]
        kexue, llama_like = model_type == "kexue", model_type in _LLAMA_LIKE
        if kexue:
            config.setdefault("norm_eps", 1e-5)
        if config.get(family.intermediate) is None and model_type in ("gpt2", "kexue"):
            config[family.intermediate] = 4 * _required(config, family.width)
        width, heads = _required(config, family.width), _required(config, family.heads)
        head_dim = config.get(family.head_dim or "") or width // heads
        tied = config.get(family.tied)
        return Architecture(
            family,
            model_type,
            config,
            width,
            heads,
            config.get(family.key_value_heads or "") or heads,
            head_dim,
            _required(config, family.layers),
            _required(config, family.intermediate),
            _required(config, family.epsilon),
            family.tied_by_default if tied is None else bool(tied),
            "RMSNorm" if llama_like else config.get("norm", "LayerNorm"),
            model_type == "bert" or config.get("norm_style") == "post",
            "half" if llama_like else config.get("rotary") if kexue else None,
        )

    @property
    def rope_needs_old_head_dim(self) -> str | None:
        """Why the frequencies of a larger head would be others; None where they are the same."""
        if self.model_type == "kexue" and self.rotary is not None:
            return "kexue's frequencies are part of the state dict"
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _RESCALED_BY_FREQUENCY:
            return f"the frequencies of rope type {kind!r} depend on the index of the plane"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "only a part of each head is rotated"
        return None

    def rules(self, names: Collection[str], normalised: float) -> list[ParameterRule]:
        """Rules for the parameters of these names.

        ``normalised`` is the scale of the copies behind a norm whose own weights are 1.
        """
        if self.model_type == "bert":
            return _bert_rules(names, 1 / normalised)
        if self.model_type == "gpt2":
            return _gpt2_rules(1 / normalised)
        if self.model_type == "kexue":
            return _kexue_rules(1 / normalised)
        return _llama_rules(1 / normalised)


def _required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(
            f"the configuration of a {config['model_type']} model must have the key {key!r}"
        )
    return config[key]


def _linear(name: str, reads: str | None, writes: str | None) -> list[ParameterRule]:
    """Rules of a layer that is stored as (out, in), with its bias."""
    return [
        ParameterRule(rf"{name}\.weight", (writes, reads)),
        ParameterRule(rf"{name}\.bias", (writes,)),
    ]


def _norm(name: str, space: str, gain: float) -> list[ParameterRule]:
    """Rules of a norm that writes into ``space``; the normalised input brings its own scale."""
    return [
        ParameterRule(rf"{name}\.weight", (space,), gain),
        ParameterRule(rf"{name}\.bias", (space,)),
    ]


def _bert_rules(names: Collection[str], gain: float) -> list[ParameterRule]:
    layer = r"(bert\.)?encoder\.layer\.\d+\."
    # Without a pooler, as for tokens, the classifier reads the stream itself.
    has_pooler = any("pooler.dense" in name for name in names)
    return [
        ParameterRule(r"(bert\.)?embeddings\.\w+_embeddings\.weight", (None, "+stream")),
        ParameterRule(r"(bert\.)?embeddings\.(position_ids|token_type_ids)", "copy"),
        *_norm(r"(bert\.)?embeddings\.LayerNorm", "+stream", gain),
        *_linear(layer + r"attention\.self\.query", "-stream", "+query"),
        *_linear(layer + r"attention\.self\.key", "-stream", "+key"),
        *_linear(layer + r"attention\.self\.value", "-stream", "+value"),
        *_linear(layer + r"attention\.output\.dense", "-context", "+stream"),
        *_linear(layer + r"intermediate\.dense", "-stream", "+intermediate"),
        *_linear(layer + r"output\.dense", "-intermediate", "+stream"),
        *_norm(layer + r"(attention\.)?output\.LayerNorm", "+stream", gain),
        *_linear(r"(bert\.)?pooler\.dense", "-stream", "+pooled"),
        *_linear(r"cls\.seq_relationship", "-pooled", None),
        *_linear(r"classifier", "-pooled" if has_pooler else "-stream", None),
        *_linear(r"qa_outputs", "-stream", None),
        *_linear(r"cls\.predictions\.transform\.dense", "-stream", "+transform"),
        *_norm(r"cls\.predictions\.transform\.LayerNorm", "+final", 1.0),
        *_linear(r"cls\.predictions\.decoder", "-final", None),
        ParameterRule(r"cls\.predictions\.bias", (None,)),
    ]


def _gpt2_rules(gain: float) -> list[ParameterRule]:
    layer = r"(transformer\.)?h\.\d+\."

    def convolution(name: str, reads: str, writes: str) -> list[ParameterRule]:
        """Rules of a layer that is stored as (in, out)."""
        return [
            ParameterRule(rf"{name}\.weight", (reads, writes)),
            ParameterRule(rf"{name}\.bias", (writes,)),
        ]

    return [
        ParameterRule(r"(transformer\.)?w[tp]e\.weight", (None, "+stream")),
        ParameterRule(layer + r"attn\.(bias|masked_bias)", "copy"),
        *_norm(layer + r"ln_[12]", "+stream", gain),
        *convolution(layer + r"attn\.c_attn", "-stream", "+query/key/value"),
        *convolution(layer + r"attn\.c_proj", "-context", "+stream"),
        *convolution(layer + r"mlp\.c_fc", "-stream", "+intermediate"),
        *convolution(layer + r"mlp\.c_proj", "-intermediate", "+stream"),
        *_norm(r"(transformer\.)?ln_f", "+final", gain),
        *_linear(r"(lm_head|score)", "-final", None),
    ]


def _llama_rules(gain: float) -> list[ParameterRule]:
    layer = r"(model\.)?layers\.\d+\."
    return [
        ParameterRule(r"(model\.)?embed_tokens\.weight", (None, "+stream")),
        ParameterRule(r"(.+\.)?rotary_emb\.inv_freq", "copy"),
        *_norm(layer + r"(input|post_attention)_layernorm", "+stream", gain),
        *_linear(layer + r"self_attn\.q_proj", "-stream", "+query"),
        *_linear(layer + r"self_attn\.k_proj", "-stream", "+key"),
        *_linear(layer + r"self_attn\.v_proj", "-stream", "+value"),
        *_linear(layer + r"self_attn\.o_proj", "-context", "+stream"),
        *_linear(layer + r"mlp\.(gate|up)_proj", "-stream", "+intermediate"),
        *_linear(layer + r"mlp\.down_proj", "-intermediate", "+stream"),
        *_norm(r"(model\.)?norm", "+final", gain),
        *_linear(r"(lm_head|score)", "-final", None),
    ]


def _kexue_rules(gain: float) -> list[ParameterRule]:
    attention = r"layers\.\d+\.attention\.sublayer\."
    feedforward = r"layers\.\d+\.feedforward\.sublayer\."
    return [
        ParameterRule(r"(token|position)_embeddings\.weight", (None, "+stream")),
        ParameterRule(attention + r"rotary\.frequencies", "copy"),
        *_norm(r"layers\.\d+\.(attention|feedforward)\.norm", "+stream", gain),
        *_linear(attention + "query_projection", "-stream", "+query"),
        *_linear(attention + "key_projection", "-stream", "+key"),
        *_linear(attention + "value_projection", "-stream", "+value"),
        *_linear(attention + "output_projection", "-context", "+stream"),
        *_linear(feedforward + "fc1", "-stream", "+intermediate"),
        *_linear(feedforward + "fc2", "-intermediate", "+stream"),
        *_norm("norm", "+final", gain),
        *_linear("output", "-final", None),
    ]
