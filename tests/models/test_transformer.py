"""kexue.models.transformer: the parts compose, and at the defaults it is GPT-2."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.attention import DotProductAttention, TalkingHeadsAttention
from kexue.nn.linear_attention import LinearAttention, PerformerAttention
from kexue.nn.position import (
    HierarchicalPositionEmbedding,
    NoPosition,
    SinusoidalPositionEmbedding,
    random_positions,
)
from kexue.nn.residual import Residual
from kexue.nn.rotary import RotaryEmbedding

TINY = TransformerConfig(vocab_size=11, dim=8, num_layers=1, num_heads=2, max_length=16)


def tiny(**changes: object) -> TransformerConfig:
    return TransformerConfig(**{**TINY.__dict__, "feedforward_dim": 16, **changes})


def small_model(**parts: object) -> Transformer:
    torch.manual_seed(0)
    config = tiny(dim=16, num_layers=2, num_heads=4)
    return Transformer(config, **parts).double().eval()


CORES: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "softmax": lambda config: DotProductAttention(),
    "talking": lambda config: TalkingHeadsAttention(config.num_heads),
    "performer": lambda config: PerformerAttention(config.dim // config.num_heads, 8),
    "linear": lambda config: LinearAttention(),
}
POSITIONS: dict[str, Callable[[TransformerConfig], nn.Module | None]] = {
    "learned": lambda config: None,
    "hierarchical": lambda config: HierarchicalPositionEmbedding(4, config.dim),
    "sinusoidal": lambda config: SinusoidalPositionEmbedding(config.dim, scale=0.03),
    "rotary": lambda config: RotaryEmbedding(config.dim // config.num_heads),
    "none": lambda config: NoPosition(),
}
POSITION_IDS = {"in order": None, "random": partial(random_positions, max_length=16)}
RESIDUALS = {
    "pre": None,
    "post": partial(Residual, style="post", alpha=2**0.5),
    "bare": partial(Residual, style="none", branch_scale=0.5),
}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def orthogonal_(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.orthogonal_(parameter, gain=0.5)


INITIALIZERS = {"default": None, "orthogonal": orthogonal_}


def train(model: Transformer, steps: int = 20) -> tuple[float, float]:
    """Copying with a shift: each target is the token before (causal) or after (both directions)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (4, 9), generator=generator)
    given, wanted = tokens, tokens
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(given).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both directions"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("core", CORES)
def test_twenty_steps_lower_the_loss_of_every_combination(
    core: str, position: str, causal: bool
) -> None:
    config = tiny(causal=causal)
    rest = itertools.product(POSITION_IDS, RESIDUALS, NORMS, INITIALIZERS)
    for ids, residual, norm, initializer in rest:
        torch.manual_seed(0)
        model = Transformer(
            config,
            attention_core=CORES[core],
            position=POSITIONS[position](config),
            position_ids=POSITION_IDS[ids],
            residual=RESIDUALS[residual] and partial(RESIDUALS[residual], norm=NORMS[norm]),
            norm=NORMS[norm],
            initializer=INITIALIZERS[initializer],
        )
        first, last = train(model)
        assert last < first, (ids, residual, norm, initializer)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_default_is_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=4)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = Transformer(
        TransformerConfig(vocab_size=50, dim=24, num_layers=3, num_heads=4, max_length=32)
    ).eval()
    copy_gpt2(ours, theirs)
    tokens = torch.randint(50, (3, 32))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def copy_gpt2(ours: Transformer, theirs: nn.Module) -> None:
    """Their linear layers are stored as (in, out), with query, key and value side by side."""
    body = theirs.transformer

    def copy(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
        module.load_state_dict({"weight": weight, "bias": bias})

    ours.token_embeddings.weight.data.copy_(body.wte.weight)
    ours.position_embeddings.weight.data.copy_(body.wpe.weight)
    copy(ours.norm, body.ln_f.weight, body.ln_f.bias)
    for layer, block in zip(ours.layers, body.h, strict=True):
        attention, feedforward = layer.attention.sublayer, layer.feedforward.sublayer
        copy(layer.attention.norm, block.ln_1.weight, block.ln_1.bias)
        copy(layer.feedforward.norm, block.ln_2.weight, block.ln_2.bias)
        names = ("query_projection", "key_projection", "value_projection")
        weights, biases = block.attn.c_attn.weight.T.chunk(3), block.attn.c_attn.bias.chunk(3)
        for name, weight, bias in zip(names, weights, biases, strict=True):
            copy(getattr(attention, name), weight, bias)
        copy(attention.output_projection, block.attn.c_proj.weight.T, block.attn.c_proj.bias)
        copy(feedforward.fc1, block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)
        copy(feedforward.fc2, block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("core", CORES)
def test_tokens_in_pieces_give_the_same_logits(core: str, position: str) -> None:
    config = tiny(dim=16, num_layers=2, num_heads=4)
    model = small_model(attention_core=CORES[core], position=POSITIONS[position](config))
    tokens = torch.randint(11, (2, 9))
    cache = model.new_cache()
    pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("position", POSITIONS)
def test_generate_equals_decoding_without_a_cache(position: str) -> None:
    config = tiny(dim=16, num_layers=2, num_heads=4)
    model = small_model(position=POSITIONS[position](config))
    start = torch.randint(11, (3, 4))
    expected = start
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    torch.testing.assert_close(model.generate(start, max_new_tokens=8, temperature=0), expected)
    drawn = model.generate(start, max_new_tokens=8, generator=torch.Generator().manual_seed(3))
    generator, expected = torch.Generator().manual_seed(3), start
    for _ in range(8):
        probabilities, ids = model(expected)[:, -1].float().softmax(-1).sort(-1, descending=True)
        new = ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
        expected = torch.cat([expected, new], 1)
    torch.testing.assert_close(drawn, expected)


def test_generate_goes_on_without_a_cache_where_positions_are_drawn() -> None:
    model = small_model(position_ids=lambda length: torch.arange(length) + 2)
    start = torch.randint(11, (2, 3))
    expected = start
    for _ in range(4):
        ids = torch.arange(expected.shape[1]) + 2
        logits = model(expected, positions=ids)[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    torch.testing.assert_close(model.generate(start, max_new_tokens=4, temperature=0), expected)


def test_draws_follow_the_probabilities() -> None:
    """1e5 draws: five standard errors of a frequency, at most 0.5/sqrt(1e5) each."""
    model = small_model(initializer=orthogonal_)
    start = torch.full((100_000, 1), 3)
    drawn = model.generate(start, max_new_tokens=1, generator=torch.Generator().manual_seed(0))
    wanted = model(start[:1])[0, -1].softmax(-1)
    measured = torch.bincount(drawn[:, 1], minlength=11) / len(drawn)
    assert (measured - wanted).abs().max() < 5 * 0.5 / len(drawn) ** 0.5


def test_top_k_and_top_p_leave_the_most_probable_tokens() -> None:
    model = small_model(initializer=orthogonal_)
    start = torch.full((2000, 1), 3)
    probabilities, ids = model(start[:1])[0, -1].detach().softmax(-1).sort(descending=True)

    def drawn(**limits: float) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        made = model.generate(start, max_new_tokens=1, generator=generator, **limits)
        return set(made[:, 1].tolist())

    assert drawn(top_k=2) == set(ids[:2].tolist())
    enough = probabilities[:3].sum().item() - 1e-6
    assert drawn(top_p=enough) == set(ids[:3].tolist())
    assert drawn(top_p=1e-9) == {int(ids[0])}
    assert drawn(top_p=1.0) == set(range(11))


def test_padding_does_not_change_the_tokens_before_it() -> None:
    """In both directions, because a causal model would not look at what follows anyway."""
    torch.manual_seed(0)
    config = tiny(dim=16, num_layers=2, num_heads=4, causal=False)
    model = Transformer(config, initializer=orthogonal_).double().eval()
    tokens = torch.randint(11, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    padded = model(tokens, key_mask=mask)
    torch.testing.assert_close(padded[0, :6], model(tokens[:1, :6])[0], rtol=1e-10, atol=1e-10)
    assert (padded[0, :6] - model(tokens)[0, :6]).abs().max() > 1e-3


def test_causal_model_does_not_see_the_future() -> None:
    model = small_model()
    tokens = torch.randint(11, (1, 9))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])


def test_embeddings_in_place_of_tokens() -> None:
    model = small_model()
    tokens = torch.randint(11, (2, 5))
    embeds = model.token_embeddings(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds), model(tokens))
    hidden = model(tokens, return_hidden=True)
    assert hidden.shape == (2, 5, 16)
    torch.testing.assert_close(hidden @ model.token_embeddings.weight.T, model(tokens))


def test_untied_output_is_a_matrix_of_its_own() -> None:
    tied, untied = (Transformer(tiny(tie_embeddings=tie)) for tie in (True, False))
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 11 * 8
    assert untied(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)


def test_key_size_of_its_own() -> None:
    model = Transformer(tiny(key_dim=16))
    assert model.layers[0].attention.sublayer.query_projection.weight.shape == (32, 8)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)


def test_parts_handed_in_keep_their_values() -> None:
    table = nn.Embedding(16, 8)
    before = table.weight.detach().clone()
    model = Transformer(TINY, position=table, attention_core=CORES["talking"])
    torch.testing.assert_close(model.position_embeddings.weight, before)
    mixing = model.layers[0].attention.sublayer.core.logits_mixing
    torch.testing.assert_close(mixing, torch.eye(2))


def test_branches_start_smaller_with_depth() -> None:
    """The stream of GPT-2 grows by about the same amount whatever the number of layers."""
    torch.manual_seed(0)
    model = Transformer(tiny(dim=64, num_layers=8, feedforward_dim=256))
    end = model.layers[3].feedforward.sublayer.fc2.weight
    # Standard error of a standard deviation from n values: 1/sqrt(2n) of it.
    assert end.std().item() == pytest.approx(0.02 / 4, rel=5 / (2 * end.numel()) ** 0.5)


def test_extended_positions_keep_short_outputs() -> None:
    from kexue.nn.position import extend_position_embeddings

    model = small_model()
    tokens = torch.randint(11, (2, 16))
    before = model(tokens)
    extend_position_embeddings(model, 100)
    assert torch.equal(model(tokens), before)
    assert model(torch.randint(11, (1, 100))).shape == (1, 100, 11)


def test_safetensors_round_trip(tmp_path) -> None:
    from safetensors.torch import load_model, save_model

    model = small_model(position=RotaryEmbedding(4))
    save_model(model, tmp_path / "model.safetensors")
    other = small_model(position=RotaryEmbedding(4))
    nn.init.zeros_(other.token_embeddings.weight)
    load_model(other, tmp_path / "model.safetensors")
    tokens = torch.randint(11, (1, 5))
    torch.testing.assert_close(other(tokens), model(tokens))


def test_compiles_without_a_graph_break() -> None:
    """In a process of its own, where no shape checks stand in the way of the graph."""
    program = """
import torch
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.rotary import RotaryEmbedding
for position in (None, RotaryEmbedding(4)):
    model = Transformer(TransformerConfig(vocab_size=11, dim=16, num_layers=2), position=position)
    tokens, ids = torch.randint(11, (2, 7)), torch.arange(7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, positions=ids), model(tokens, positions=ids))
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"position": nn.Embedding(8, 8)}, "8 rows and max_length asks for 16"),
        ({"position": HierarchicalPositionEmbedding(3, 8)}, "9 rows and max_length asks for 16"),
        ({"position": nn.Embedding(16, 9)}, "width 8, got 9"),
        ({"position": RotaryEmbedding(6)}, "rotates 6 features, a key has only 4"),
        ({"attention_core": lambda c: _BothDirections()}, "_BothDirections attends in both"),
        ({"attention_core": lambda c: TalkingHeadsAttention(3)}, "3"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_construction(
    parts: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(TINY, **parts)


class _BothDirections(DotProductAttention):
    bidirectional_only = True


def test_core_for_both_directions_serves_where_both_are_seen() -> None:
    model = Transformer(tiny(causal=False), attention_core=lambda config: _BothDirections())
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)


@pytest.mark.bad_input
def test_positions_without_an_end_need_no_table() -> None:
    endless = tiny(max_length=None)
    with pytest.raises(ValueError, match="max_length must be given"):
        Transformer(endless)
    with pytest.raises(ValueError, match="any length"):
        Transformer(endless, position=nn.Embedding(16, 8))
    model = Transformer(endless, position=SinusoidalPositionEmbedding(8))
    assert model(torch.zeros(1, 600, dtype=torch.int64)).shape == (1, 600, 11)


@pytest.mark.bad_input
def test_wrong_calls_are_refused() -> None:
    model = Transformer(TINY)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="position 16 is beyond the table of 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(TypeError, match="whole positions"):
        model(tokens, positions=torch.rand(5))
    with pytest.raises(ValueError, match=r"\(5,\) or \(2, 5\), got \(4,\)"):
        model(tokens, positions=torch.arange(4))
    with pytest.raises(ValueError, match="tokens or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="tokens or inputs_embeds"):
        model(tokens, inputs_embeds=torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=r"\(batch, length, 8\), got \(2, 5, 9\)"):
        model(inputs_embeds=torch.zeros(2, 5, 9))
    with pytest.raises(TypeError, match="integers"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"got \(10,\)"):
        model(tokens.flatten())
    with pytest.raises(ValueError, match="1 layers, got 0"):
        model(tokens, cache=[])
    with pytest.raises(ValueError, match="17 positions, the table has 16"):
        model.generate(tokens, max_new_tokens=13)
    for wrong in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(tokens, max_new_tokens=1, **wrong)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens, max_new_tokens=-1)
    both = Transformer(tiny(causal=False))
    with pytest.raises(ValueError, match="causal=False"):
        both.generate(tokens, max_new_tokens=1)
    with pytest.raises(ValueError, match="causal=False"):
        both.new_cache()
    with pytest.raises(ValueError, match="position_ids"):
        Transformer(TINY, position_ids=lambda length: torch.arange(length)).new_cache()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"dim": 0}, "dim"),
        ({"key_dim": 0}, "key_dim"),
        ({"max_length": 0}, "max_length"),
        ({"num_layers": -1}, "num_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation": "step"}, "gelu, gelu_exact, relu, silu, got 'step'"),
        ({"dim": 10, "num_heads": 3}, "divisible"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(tiny(**changes))


@pytest.mark.parametrize("core", CORES)
def test_length_scaled_attention_decodes_from_the_first_token_on(core: str) -> None:
    model = small_model(attention_core=CORES[core])
    for layer in model.layers:
        layer.attention.sublayer.log_length = 8
    assert model.generate(torch.ones(1, 1, dtype=torch.int64), max_new_tokens=3).shape == (1, 4)
