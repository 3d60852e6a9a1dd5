"""kexue's own Transformer, grown: the same logits in float64."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.growth import GrowthResult, grow_transformer
from kexue.nn.residual import Residual
from kexue.nn.rotary import RotaryEmbedding

EXACT = 1e-11  # as for the other families: hundreds of roundings of logits of order ten
FIELDS = TransformerConfig.__dataclass_fields__
SMALL = {"vocab_size": 17, "dim": 12, "num_layers": 2, "num_heads": 3, "max_length": 16}


def settings(**changes: Any) -> dict[str, Any]:
    sizes = asdict(TransformerConfig(**SMALL))
    return {"model_type": "kexue", **sizes, "norm_eps": 1e-2, **changes}


def build(config: dict[str, Any]) -> nn.Module:
    kind = nn.RMSNorm if config.get("norm") == "RMSNorm" else nn.LayerNorm
    norm = partial(kind, eps=config["norm_eps"])
    head = config["key_dim"] or config["dim"] // config["num_heads"]
    layout = config.get("rotary")
    style = config.get("norm_style", "pre")
    model = Transformer(
        TransformerConfig(**{name: config[name] for name in FIELDS}),
        position=None if layout is None else RotaryEmbedding(head, layout=layout),
        residual=lambda sublayer, dim: Residual(sublayer, dim, style=style, norm=norm),
        norm=norm,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def grow(config: dict[str, Any], **options: Any) -> tuple[GrowthResult, float]:
    small = build(config)
    generator = torch.Generator().manual_seed(1)
    result = grow_transformer(small.state_dict(), config, generator=generator, **options)
    large = build(result.config)
    large.load_state_dict(result.state_dict, strict=True)
    return result, (logits(large) - logits(small)).abs().max().item()


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("style", ["pre", "post"])
@pytest.mark.parametrize("scaling", ["copy", "orthogonal"])
@pytest.mark.parametrize("attention", ["heads", "head_dim"])
def test_learned_positions(attention: str, scaling: str, style: str) -> None:
    # Without a last norm, a tied output layer would read the stream itself.
    config = settings(norm_style=style, tie_embeddings=style == "pre")
    options = {"hidden_size": 36, "attention": attention, "scaling": scaling, "noise": 0.5}
    assert grow(config, **options)[1] < EXACT


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotations_with_more_heads(layout: str) -> None:
    config = settings(rotary=layout)
    assert grow(config, hidden_size=24, noise=0.5)[1] < EXACT


@pytest.mark.parametrize("scaling", ["copy", "orthogonal"])
def test_rms_norm(scaling: str) -> None:
    config = settings(norm="RMSNorm")
    assert grow(config, hidden_size=36, scaling=scaling, noise=0.5)[1] < EXACT


def test_an_orthogonal_post_norm_model_may_be_tied() -> None:
    config = settings(norm_style="post")
    assert grow(config, hidden_size=24, scaling="orthogonal", noise=0.5)[1] < EXACT


def test_depth() -> None:
    assert grow(settings(), num_layers=5)[1] == 0


@pytest.mark.bad_input
def test_larger_heads_of_a_rotation_are_refused() -> None:
    with pytest.raises(ValueError, match="frequencies"):
        grow(settings(rotary="half"), hidden_size=24, attention="head_dim")


@pytest.mark.bad_input
def test_post_norm_with_a_tied_output_is_not_lossless() -> None:
    with pytest.raises(ValueError, match=r"^not lossless: .*tied"):
        grow(settings(norm_style="post"), hidden_size=24)


@pytest.mark.bad_input
@pytest.mark.parametrize("options", [{"hidden_size": 16}, {"hidden_size": 24, "fill": "zero"}])
def test_widths_that_the_values_could_not_follow_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dim // num_heads"):
        grow(settings(norm="RMSNorm"), **options)
