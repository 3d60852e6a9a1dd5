"""The sizes of a model, and the configuration files in which they are published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

__all__ = ["RoFormerV2Config"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "tanh": functional.tanh,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)
_ALIASES = {"epsilon": "layer_norm_eps", "segment_vocab_size": "type_vocab_size"}


@dataclass(frozen=True)
class RoFormerV2Config:
    """Sizes of a RoFormerV2; the defaults are those of the published base model.

    Parameters
    ----------
    vocab_size : int
        Number V of tokens.
    hidden_size : int
        Width d, a multiple of twice the number of heads.
    num_hidden_layers : int
        Number L of layers.
    num_attention_heads : int
        Number A of heads.
    intermediate_size : int
        Width f between the two matrices of the feed-forward network.
    hidden_act : {"relu", "gelu", "gelu_new", "silu", "tanh"}
        Between these matrices.
    hidden_dropout_prob : float
        On the embedding, on each branch before its shortcut, and before the masked-LM head.
    attention_probs_dropout_prob : float
        On the attention weights.
    max_position_embeddings : int
        Kept for the file's sake; rotary positions have no limit.
    type_vocab_size : int
        Number of token types.
    layer_norm_eps : float
        The ε of the norm.
    pad_token_id : int
        Token that is masked when no attention mask is given.
    num_labels : int
        Classes of the classification head.

    Raises
    ------
    ValueError
        For sizes below 1, a hidden size that is no multiple of the heads, an odd head size, an
        unknown activation, dropout outside [0, 1), an ε that is not positive.

    Examples
    --------
    >>> config = RoFormerV2Config.small(num_labels=5)
    >>> config.hidden_size, config.num_hidden_layers, config.num_labels
    (384, 6, 5)
    >>> RoFormerV2Config.from_dict(config.to_dict()) == config
    True
    """

    vocab_size: int = 12000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "relu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-7
    pad_token_id: int = 0
    num_labels: int = 2

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not (_is_integer(getattr(self, name)) and getattr(self, name) >= 1):
                raise ValueError(
                    f"{name} must be an integer of at least 1, got {getattr(self, name)!r}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.head_size % 2:
            raise ValueError(
                "the head size hidden_size / num_attention_heads must be even, because rotary "
                f"positions turn pairs, got {self.head_size}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {self.hidden_act!r}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not (_is_real(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if not (_is_real(self.layer_norm_eps) and 0 < self.layer_norm_eps < math.inf):
            raise ValueError(f"layer_norm_eps must be positive, got {self.layer_norm_eps!r}")
        if not (_is_integer(self.pad_token_id) and 0 <= self.pad_token_id < self.vocab_size):
            raise ValueError(
                f"pad_token_id must be a token below vocab_size ({self.vocab_size}), got "
                f"{self.pad_token_id!r}"
            )

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def small(cls, **overrides: Any) -> RoFormerV2Config:
        """Return the published small model: d 384, 6 layers, 15 225 600 parameters."""
        return cls(
            **{
                "hidden_size": 384,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "intermediate_size": 1536,
                **overrides,
            }
        )

    @classmethod
    def base(cls, **overrides: Any) -> RoFormerV2Config:
        """Return the published base model: d 768, 12 layers, 94 152 192 parameters."""
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides: Any) -> RoFormerV2Config:
        """Return the published large model: d 1024, 24 layers, 314 279 936 parameters."""
        return cls(
            **{
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                **overrides,
            }
        )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> RoFormerV2Config:
        """Read a configuration as the authors or Hugging Face write it; unknown keys are ignored.

        ``epsilon`` is taken for ``layer_norm_eps``, ``segment_vocab_size`` for
        ``type_vocab_size``, and the length of ``id2label`` for ``num_labels``. A ValueError says
        so where the configuration is that of another model: a norm other than "rms_norm", biases,
        rotated values, or embeddings of another width.
        """
        _refuse_other_models(mapping)
        given = dict(mapping)
        for alias, name in _ALIASES.items():
            if alias in given:
                given.setdefault(name, given[alias])
        if given.get("id2label"):
            given.setdefault("num_labels", len(given["id2label"]))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in known})

    @classmethod
    def from_json_file(cls, path: str | Path) -> RoFormerV2Config:
        """Read ``config.json`` or ``bert_config.json``."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be a JSON file: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
        return cls.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def _refuse_other_models(mapping: Mapping[str, Any]) -> None:
    reasons = []
    if mapping.get("norm_type", "rms_norm") != "rms_norm":
        reasons.append(f"norm_type must be 'rms_norm', got {mapping['norm_type']!r}")
    reasons += [
        f"{switch} must be false, got {mapping[switch]!r}"
        for switch in ("use_bias", "rotary_value")
        if mapping.get(switch)
    ]
    width = mapping.get("hidden_size", RoFormerV2Config.hidden_size)
    embedding = mapping.get("embedding_size")
    if embedding is not None and embedding != width:
        reasons.append(f"embedding_size must equal hidden_size ({width}), got {embedding!r}")
    if reasons:
        raise ValueError(f"this is not a RoFormerV2 configuration: {'; '.join(reasons)}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
