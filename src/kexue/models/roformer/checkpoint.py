"""Checkpoints on disk, in both published formats, and what may be in them.

Loading is exact: every tensor of the encoder is there, has its shape and its place, or nothing is
loaded. Current transformers load these files without a word and with wrong results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kexue._files import replacing, write_whole
from kexue.models.roformer.configuration import RoFormerV2Config
from kexue.models.roformer.tensorflow import (
    convert_tensorflow_variables,
    read_tensorflow_checkpoint,
)

__all__: list[str] = []

_CONFIGURATIONS = ("config.json", "bert_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "bert_model.ckpt.index")
_ENCODER = "roformer."
_HEAD = "classifier."
_WORDS = "roformer.embeddings.word_embeddings.weight"
_DECODER = "cls.predictions.decoder.weight"
_SINUSOIDS = "roformer.encoder.embed_positions.weight"
_SHOWN = 8
"""Names that an error lists before it only counts."""


def read_pretrained(
    directory: str | Path, overrides: Mapping[str, Any]
) -> tuple[RoFormerV2Config, dict[str, Tensor]]:
    """Return configuration and tensors of a published folder."""
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = RoFormerV2Config.from_json_file(_first(folder, _CONFIGURATIONS))
    unknown = sorted(set(overrides) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"overrides must be fields of RoFormerV2Config, got {', '.join(unknown)}")
    return replace(config, **overrides), _read_weights(_first(folder, _WEIGHTS))


def write_pretrained(model: nn.Module, config: RoFormerV2Config, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        **config.to_dict(),
        "architectures": [type(model).__name__],
        "model_type": "roformer",
        "norm_type": "rms_norm",
        "use_bias": False,
        "rotary_value": False,
        "embedding_size": config.hidden_size,
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    # A killed run must leave no file that looks finished.
    write_whole(folder / "config.json", text)
    with replacing(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, adopt: bool) -> None:
    """Check a published state dict against a model and copy it in, or adopt its very tensors."""
    own = dict(model.state_dict())
    found = {name: tensor for name, tensor in state.items() if name in own}
    _refuse_another_architecture(state, own)
    # A head that the checkpoint lacks altogether stays; half a head is an accident.
    head = {name for name in own if name.startswith(_HEAD)}
    wanted = set(own) if head & set(found) else set(own) - head
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f"the checkpoint lacks {_listed(missing)}")
    wrong = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint holds tensors of another shape: {_listed(wrong)}")
    decoder = state.get(_DECODER)
    if decoder is not None and not torch.equal(decoder.to(state[_WORDS].dtype), state[_WORDS]):
        raise ValueError(
            f"{_DECODER} {tuple(decoder.shape)} must be the word embedding, to which RoFormerV2 "
            f"ties it, but differs from {_WORDS} {tuple(state[_WORDS].shape)}"
        )
    if adopt:
        found = {name: tensor.to(own[name].dtype) for name, tensor in found.items()}
    model.load_state_dict(found, strict=False, assign=adopt)


def _refuse_another_architecture(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse what a V1 checkpoint has beyond these parameters, and heads of another form."""
    prefixes = (_ENCODER, "cls.predictions.") + (
        (_HEAD,) if any(name.startswith(_HEAD) for name in own) else ()
    )
    known = {*own, _DECODER, _SINUSOIDS}
    strange = sorted(name for name in state if name.startswith(prefixes) and name not in known)
    if strange:
        raise ValueError(
            "the checkpoint is not a RoFormerV2 of this configuration, which has no biases, no "
            f"norm parameters and no further matrices; unexpected: {_listed(strange)}"
        )


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} must hold one of {', '.join(names)}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
    if path.suffix == ".bin":
        return _read_torch(path)
    return convert_tensorflow_variables(read_tensorflow_checkpoint(path.with_suffix("")))


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a dozen kinds here; all of them mean that these are no weights.
        raise ValueError(f"{path} must hold tensors only: {_first_sentence(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, got a {type(state).__name__}")
    return state


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[.!])\s|\n", str(error).strip(), maxsplit=1)[0]


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
