"""Conversion between the layouts, and the packages that use one or the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kexue.nn.rotary import (
    RotaryEmbedding,
    convert_rotary_projection,
    grid_positions,
    rotary_permutation,
)

EPS = torch.finfo(torch.float64).eps


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_permutation_from_half_to_interleaved() -> None:
    to_pairs = rotary_permutation(6, from_layout="half", to_layout="interleaved")
    assert to_pairs.tolist() == [0, 3, 1, 4, 2, 5]
    to_halves = rotary_permutation(6, from_layout="interleaved", to_layout="half")
    assert to_halves.tolist() == [0, 2, 4, 1, 3, 5]
    assert to_pairs[to_halves].tolist() == list(range(6))


def test_permutation_within_a_layout_is_the_identity() -> None:
    for layout in ("half", "interleaved"):
        same = rotary_permutation(8, from_layout=layout, to_layout=layout)
        assert same.tolist() == list(range(8))


def test_rotating_in_either_layout_is_the_same_up_to_the_permutation() -> None:
    x, positions = rand(5, 8), torch.tensor([0, 3, 1, -4, 9])
    p = rotary_permutation(8, from_layout="interleaved", to_layout="half")
    pairs = RotaryEmbedding(8, layout="interleaved").rotate(x, positions=positions)
    halves = RotaryEmbedding(8, layout="half").rotate(x[..., p], positions=positions)
    torch.testing.assert_close(halves, pairs[..., p], rtol=0, atol=16 * EPS)
    assert not torch.allclose(halves, pairs)


def test_conversion_is_the_permutation_of_metas_checkpoints() -> None:
    heads, head_dim, width = 3, 8, 5
    weight = rand(heads * head_dim, width)
    expected = (
        weight.view(heads, head_dim // 2, 2, width).transpose(1, 2).reshape(heads * head_dim, width)
    )
    converted = convert_rotary_projection(
        weight, heads, from_layout="interleaved", to_layout="half"
    )
    assert torch.equal(converted, expected)
    back = convert_rotary_projection(converted, heads, from_layout="half", to_layout="interleaved")
    assert torch.equal(back, weight)


def test_conversion_of_a_partial_rotation_leaves_the_other_rows() -> None:
    bias = torch.arange(12)
    converted = convert_rotary_projection(
        bias, 2, from_layout="half", to_layout="interleaved", rotary_dim=4
    )
    assert converted.tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_converted_projections_give_the_same_logits(rotary_dim: int) -> None:
    heads, head_dim = 2, 8
    x, places = rand(7, 10), torch.arange(7) * 3
    projections = {
        name: (rand(16, 10, seed=seed), rand(16, seed=seed + 1))
        for name, seed in (("query", 1), ("key", 3))
    }

    def logits(layout: str, convert: bool) -> Tensor:
        rope = RotaryEmbedding(rotary_dim, layout=layout)
        rotated = []
        for weight, bias in projections.values():
            if convert:
                weight, bias = (
                    convert_rotary_projection(
                        tensor,
                        heads,
                        from_layout="interleaved",
                        to_layout="half",
                        rotary_dim=rotary_dim,
                    )
                    for tensor in (weight, bias)
                )
            projected = (x @ weight.T + bias).unflatten(-1, (heads, head_dim)).transpose(0, 1)
            rotated.append(rope.rotate(projected, positions=places))
        return rotated[0] @ rotated[1].mT

    before, after = logits("interleaved", False), logits("half", True)
    # Sums of 10 and 8 products of numbers up to 50, in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert (logits("half", False) - before).abs().max() > 1.0


@pytest.mark.bad_input
def test_wrong_conversions_are_refused() -> None:
    layouts = {"from_layout": "interleaved", "to_layout": "half"}
    with pytest.raises(ValueError, match=r"rows \(10\).*divisible by num_heads \(3\)"):
        convert_rotary_projection(torch.ones(10, 4), 3, **layouts)
    with pytest.raises(ValueError, match=r"rotary_dim \(8\) must not exceed the head size \(4\)"):
        convert_rotary_projection(torch.ones(8, 4), 2, rotary_dim=8, **layouts)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        convert_rotary_projection(torch.ones(6, 4), 2, **layouts)
    with pytest.raises(ValueError, match="num_heads"):
        convert_rotary_projection(torch.ones(8, 4), 0, **layouts)
    with pytest.raises(ValueError, match="must be a tensor"):
        convert_rotary_projection(torch.tensor(1.0), 1, **layouts)
    with pytest.raises(ValueError, match="interleaved, half, got 'neox'"):
        rotary_permutation(8, from_layout="neox", to_layout="half")
    with pytest.raises(ValueError, match="interleaved, half, got 'gptj'"):
        rotary_permutation(8, from_layout="half", to_layout="gptj")
    with pytest.raises(ValueError, match="dim must be even"):
        rotary_permutation(5, from_layout="half", to_layout="half")


# A peer rounds angles to float32, relatively by 6e-8, so numbers up to 4 at angles up to 16
# differ by 4e-6 at worst; the specified agreement is what holds at positions this small.
PEER = 2e-6


def test_one_axis_agrees_with_rotary_embedding_torch() -> None:
    peer = pytest.importorskip("rotary_embedding_torch").RotaryEmbedding(dim=32)
    x = rand(1, 2, 12, 64, dtype=torch.float32)
    ours = RotaryEmbedding(32).rotate(x)
    assert (ours - peer.rotate_queries_or_keys(x)).abs().max() < PEER


def test_axial_rotation_agrees_with_rotary_embedding_torch() -> None:
    package = pytest.importorskip("rotary_embedding_torch")
    peer = package.RotaryEmbedding(dim=32)
    x = rand(1, 2, 5 * 7, 64, dtype=torch.float32)
    theirs = package.apply_rotary_emb(
        peer.get_axial_freqs(5, 7), x.unflatten(-2, (5, 7)), seq_dim=-2
    )
    ours = RotaryEmbedding(64, axes=2).rotate(x, positions=grid_positions(5, 7))
    assert (ours - theirs.flatten(-3, -2)).abs().max() < PEER


def test_half_layout_agrees_with_hugging_face() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64
    )
    q, k = rand(1, 2, 12, 64, dtype=torch.float32), rand(1, 2, 12, 64, seed=1, dtype=torch.float32)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(12)[None])
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    ours = RotaryEmbedding(64, layout="half")(q, k)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < PEER
