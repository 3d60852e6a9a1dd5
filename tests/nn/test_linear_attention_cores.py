"""kexue.nn.linear_attention: the cores, their caches, and their way into trained models."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.attention import DotProductAttention, MultiHeadAttention, TalkingHeadsAttention
from kexue.nn.linear_attention import (
    LinearAttention,
    LinearAttentionState,
    PerformerAttention,
    replace_attention,
    softmax_kernel_variance,
)
from kexue.nn.rotary import RotaryEmbedding


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def performer(key_dim: int = 4, num_features: int = 6, **options: Any) -> PerformerAttention:
    generator = torch.Generator().manual_seed(0)
    return PerformerAttention(
        key_dim, num_features, generator=generator, dtype=torch.float64, **options
    )


CORES: dict[str, Callable[..., nn.Module]] = {
    "performer": performer,
    "hyperbolic": lambda **options: performer(kind="hyperbolic", **options),
    "linear": LinearAttention,
}


def inputs(length: int = 11, *, batch: int = 2, heads: int = 3, seed: int = 0) -> list[Tensor]:
    return [normal(batch, heads, length, 4, seed=seed + i) for i in range(3)]


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


# What the cores compute.


@pytest.mark.parametrize("causal", [False, True])
def test_performer_is_normalised_attention_of_the_features_of_centred_keys(causal: bool) -> None:
    query, key, value = inputs()
    core = performer().calibrate_(query, key)
    shift = query.mean(2, keepdim=True) + key.mean(2, keepdim=True)
    if causal:
        shift = query.mean((0, 1, 2)) + key.mean((0, 1, 2))
        torch.testing.assert_close(core.key_shift.flatten(), shift)
    phi_query = core.features(query, scale=0.5)
    weights = phi_query @ core.features(key - shift, scale=0.5).mT
    weights = weights.tril() if causal else weights
    expected = weights @ value / weights.sum(-1, keepdim=True)
    output = core(query, key, value, is_causal=causal).output
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_normalised_attention_of_elu_plus_one(causal: bool) -> None:
    query, key, value = inputs()
    weights = (nn.functional.elu(query) + 1) @ (nn.functional.elu(key) + 1).mT
    weights = weights.tril() if causal else weights
    expected = weights @ value / weights.sum(-1, keepdim=True)
    output = LinearAttention(chunk_size=4)(query, key, value, is_causal=causal).output
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    scaled = LinearAttention()(0.5 * query, 0.5 * key, value, is_causal=causal).output
    torch.testing.assert_close(
        LinearAttention()(query, key, value, is_causal=causal, scale=0.25).output, scaled
    )


@pytest.mark.parametrize("causal", [False, True])
def test_error_against_softmax_is_what_the_kernel_variance_allows(causal: bool) -> None:
    """To first order the error of row i is the sum of w_ij ε_ij (v_j - o_i), with the relative
    errors ε of the kernel: by Minkowski at most the sum of the standard deviations, and 1/√m."""
    query, key, value = (normal(1, 1, 24, 4, seed=s) for s in range(3))
    # Scaled, |q| = |k| = 1: |z|² is 2 on average, 4 at most, where first order is good enough.
    query, key = (math.sqrt(2) * nn.functional.normalize(x, dim=-1) for x in (query, key))
    logits = 0.5 * query @ key.mT
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1 if causal else 24)
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
    exact, draws, errors = weights @ value, 30, {}
    for m in (1024, 16384):
        core = performer(4, m, center=False, orthogonal=False)
        squares = torch.zeros_like(exact)
        for _ in range(draws):
            squares += (core.redraw_()(query, key, value, is_causal=causal).output - exact) ** 2
        errors[m] = float((squares / draws).mean().sqrt())
        variance = softmax_kernel_variance(
            query[..., :, None, :], key[..., None, :, :], m, scale=0.5
        )
        relative = variance.sqrt() / logits.exp()
        spread = (value[..., None, :, :] - exact[..., :, None, :]).abs()
        bound = ((weights * relative)[..., None] * spread).sum(-2)
        # A mean square over 30 draws, all rows and columns.
        assert errors[m] < 1.1 * float(bound.square().mean().sqrt())
        assert errors[m] > float(bound.square().mean().sqrt()) / 10
    assert errors[1024] / errors[16384] == pytest.approx(4, rel=0.2)


def test_centring_leaves_softmax_alone_and_the_estimate_better() -> None:
    offset = torch.tensor([3.0, -2.0, 1.0, 2.0], dtype=torch.float64)
    query, key, value = (0.5 * x for x in inputs(64))
    query, key = query - offset, key - offset
    exact = softmax(query, key, value)
    shift = query.mean(2, keepdim=True) + key.mean(2, keepdim=True)
    torch.testing.assert_close(softmax(query, key - shift, value), exact)
    with_shift, without = (
        (performer(4, 64, center=center)(query, key, value).output - exact).square().mean()
        for center in (True, False)
    )
    assert with_shift < without / 10


def test_mean_of_queries_plus_mean_of_keys_is_the_best_centre() -> None:
    query, key, _ = (x[0, 0] for x in inputs(50))
    center = (query.mean(0) + key.mean(0)).requires_grad_()
    mean_square = (query[:, None] + key - center).square().sum(-1).mean()
    (gradient,) = torch.autograd.grad(mean_square, center)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("causal", [False, True])
def test_one_key_gives_its_value(name: str, causal: bool) -> None:
    query, key, value = inputs(1)
    output = CORES[name]()(1e3 * query, 1e3 * key, value, is_causal=causal).output
    torch.testing.assert_close(output, value, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", CORES)
def test_equal_keys_give_the_mean_of_the_values(name: str) -> None:
    query, key, value = inputs(9)
    key = key[:, :, :1].expand_as(key)
    output = CORES[name]()(query, key, value).output
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output))
    running = value.cumsum(2) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(CORES[name]()(query, key, value, is_causal=True).output, running)


@pytest.mark.parametrize("name", CORES)
def test_first_causal_output_is_the_first_value_whatever_the_keys_are(name: str) -> None:
    query, key, value = (x.float() for x in inputs(100))
    key[:, :, 1:] *= 1e6
    output = CORES[name]()(1e6 * query, key, value, is_causal=True).output
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output[:, :, 0], value[:, :, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-20, 1e18])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CORES)
def test_inputs_of_any_size_give_finite_outputs_and_gradients(
    name: str, causal: bool, size: float
) -> None:
    query, key, value = (x.float().requires_grad_() for x in inputs(20))
    output = CORES[name](chunk_size=8)(size * query, size * key, value, is_causal=causal).output
    assert torch.isfinite(output).all()
    assert (output.abs() <= value.abs().max() * (1 + 1e-5)).all()
    output.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


@pytest.mark.parametrize("name", CORES)
def test_causal_output_does_not_depend_on_later_tokens(name: str) -> None:
    query, key, value = inputs(40)
    core = CORES[name](chunk_size=16)
    before = core(query, key, value, is_causal=True).output
    for x in (query, key, value):
        x[:, :, 21:] *= 50
    after = core(query, key, value, is_causal=True).output
    torch.testing.assert_close(after[:, :, :21], before[:, :, :21], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(after[:, :, 21:], before[:, :, 21:])


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(name: str, causal: bool) -> None:
    given = tuple(x.requires_grad_() for x in inputs(5, batch=1, heads=2))
    core = CORES[name](chunk_size=2)
    assert torch.autograd.gradcheck(
        lambda *qkv: core(*qkv, is_causal=causal).output, given, atol=1e-6
    )


def test_gradient_flows_through_the_centre() -> None:
    """The value of few features depends on the centre, so leaving it out is another gradient."""
    query, key, value = inputs(6)
    core = performer(4, 3)
    shifted = key.clone().requires_grad_()
    center = query.mean(2, keepdim=True) + key.mean(2, keepdim=True)
    whole, parts = key.clone().requires_grad_(), []
    core(query, whole, value).output.sum().backward()
    core.center = False
    core(query, shifted - center, value).output.sum().backward()
    parts = shifted.grad - shifted.grad.mean(2, keepdim=True)
    torch.testing.assert_close(whole.grad, parts, rtol=1e-9, atol=1e-9)


# Masks.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CORES)
def test_padding_makes_no_difference_to_real_tokens(name: str, causal: bool) -> None:
    query, key, value = inputs(12)
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[..., 7:] = False
    for x in (query, key, value):
        x[:, :, 7:] = 1e3
    core = CORES[name]()
    padded = core(query, key, value, mask=mask, is_causal=causal).output
    short = core(*(x[:, :, :7] for x in (query, key, value)), is_causal=causal).output
    torch.testing.assert_close(padded[:, :, :7], short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CORES)
def test_nothing_to_attend_to_gives_zeros_with_finite_gradients(name: str, causal: bool) -> None:
    given = [x.requires_grad_() for x in inputs(5)]
    mask = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 5)
    output = CORES[name]()(*given, mask=mask, is_causal=causal).output
    assert (output[0] == 0).all()
    output.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in given)


def test_masks_of_any_rank_are_broadcast() -> None:
    query, key, value = inputs(5, batch=1, heads=1)
    keep = torch.tensor([True, True, False, True, False])
    expected = performer()(query, key, value, mask=keep[None, None, None]).output
    for mask in (keep, keep[None], keep[None, None]):
        assert torch.equal(performer()(query, key, value, mask=mask).output, expected)


def test_cross_attention_of_other_lengths() -> None:
    query, (_, key, value) = normal(2, 3, 5, 4, seed=9), inputs(8)
    core = performer(4, 4000)
    output = core(0.3 * query, 0.3 * key, value).output
    assert output.shape == (2, 3, 5, 4)
    assert (output - softmax(0.3 * query, 0.3 * key, value)).abs().max() < 0.02


# Decoding.


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [11], [0, 11]])
def test_tokens_in_pieces_give_the_same_output(name: str, pieces: list[int]) -> None:
    given, core = inputs(11), CORES[name](chunk_size=3)
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[0, ..., :3] = False
    state = core.new_cache()
    outputs = [
        core(*qkv, mask=m, is_causal=True, cache=state).output
        for *qkv, m in zip(*(x.split(pieces, 2) for x in given), mask.split(pieces, 3), strict=True)
    ]
    whole = core(*given, mask=mask, is_causal=True).output
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-12, atol=1e-12)
    assert state.length == 11


def test_state_is_as_large_after_many_tokens_as_after_one() -> None:
    core, state = performer(), LinearAttentionState()
    sizes = []
    for length in (1, 500):
        core(*inputs(length), is_causal=True, cache=state)
        sizes.append((state.maximum.shape, state.key_sum.shape, state.key_value_sum.shape))
    assert sizes == [((2, 3, 6), (2, 3, 6), (2, 3, 6, 4))] * 2
    state.reset()
    assert (state.length, state.maximum, state.key_sum, state.key_value_sum) == (
        0,
        None,
        None,
        None,
    )


@pytest.mark.parametrize("name", CORES)
def test_state_holds_the_sums_over_keys(name: str) -> None:
    query, key, value = inputs(11)
    core, state = CORES[name](), LinearAttentionState()
    core(query, key, value, is_causal=True, cache=state)
    one, two = LinearAttentionState(), CORES[name](chunk_size=2)
    two(query, key, value, is_causal=True, cache=one)
    for attribute in ("maximum", "key_sum", "key_value_sum"):
        torch.testing.assert_close(getattr(one, attribute), getattr(state, attribute))
    assert (state.key_sum >= 1).all()


# Redrawing.


def test_projection_is_redrawn_in_training_after_so_many_calls() -> None:
    core = performer(redraw_interval=2)
    seen = []
    for _ in range(5):
        core(*inputs())
        seen.append(core.features.projection.clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3], seen[4])
    core.eval()
    for _ in range(5):
        core(*inputs())
    assert torch.equal(core.features.projection, seen[4])


def test_redrawing_is_reproducible_from_the_global_seed() -> None:
    projections = []
    for _ in range(2):
        torch.manual_seed(3)
        core = PerformerAttention(4, 6, redraw_interval=1)
        torch.rand(3)
        core(*inputs()), core(*inputs())
        projections.append(core.features.projection)
    assert torch.equal(*projections)


def test_redrawing_between_two_forward_passes_keeps_both_gradients() -> None:
    core, given = performer(redraw_interval=1), [x.requires_grad_() for x in inputs()]
    loss = sum(core(*given).output.sum() for _ in range(3))
    loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in given)


def test_copies_go_on_with_the_same_draws() -> None:
    core = performer()
    other = copy.deepcopy(core)
    assert torch.equal(core.redraw_().features.projection, other.redraw_().features.projection)


def test_calibration_per_head_and_for_all_heads() -> None:
    query, key, _ = inputs(30)
    mask = torch.ones(2, 1, 30, dtype=torch.bool)
    mask[:, :, 20:] = False
    one = performer().calibrate_(query, key, key_mask=mask)
    each = performer(num_heads=3).calibrate_(query, key, key_mask=mask)
    query, key = query[:, :, :20], key[:, :, :20]
    torch.testing.assert_close(one.key_shift[0, 0], query.mean((0, 1, 2)) + key.mean((0, 1, 2)))
    torch.testing.assert_close(each.key_shift[:, 0], query.mean((0, 2)) + key.mean((0, 2)))
    assert each.key_shift.shape == (3, 1, 4)


# In half precision, under autocast and under compilation.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, causal: bool) -> None:
    given = [x.to(dtype) for x in inputs(200)]
    core = performer().float()
    core.calibrate_(*given[:2])
    output = core(*given, is_causal=causal).output
    assert output.dtype == dtype
    exact = core(*(x.float() for x in given), is_causal=causal).output
    torch.testing.assert_close(output, exact.to(dtype), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = core(*(x.float() for x in given), is_causal=causal).output
    torch.testing.assert_close(auto, exact, rtol=0, atol=0)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    """Forwards and backwards, with rows that are recomputed and without, where no shape checks
    stand in the way of the graph."""
    program = """
import torch
from kexue.nn.linear_attention import PerformerAttention
torch.manual_seed(0)
core = PerformerAttention(4, 6, chunk_size=2, dtype=torch.float64)
for causal in (False, True):
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    for size in (1, 30):
        query, key, value = torch.randn(3, 1, 2, 4, 4, dtype=torch.float64).unbind()
        results = []
        for run in (core, compiled):
            given = [x.clone().requires_grad_() for x in (query, size * key, value)]
            output = run(*given, is_causal=causal).output
            output.square().sum().backward()
            results.append([output, *(x.grad for x in given)])
        for one, two in zip(*results):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# In models.


def test_replacement_changes_every_layer_and_keeps_the_weights() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2, causal=False)
    model = Transformer(config).double().eval()
    tokens = torch.randint(11, (2, 30))
    before, weights = model(tokens), copy.deepcopy(model.state_dict())
    count = replace_attention(model, lambda layer: PerformerAttention(layer.key_dim, 4096))
    assert count == 2
    cores = [m for m in model.modules() if isinstance(m, PerformerAttention)]
    assert len(cores) == 2
    assert not any(core.training for core in cores)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    # Untrained logits are small: the estimate is good, and 16 features are much worse.
    error = (model(tokens) - before).abs().max()
    replace_attention(model, lambda layer: PerformerAttention(layer.key_dim, 16))
    assert error < 1e-3
    assert error < (model(tokens) - before).abs().max() / 4


def test_replacement_of_a_layer_itself_and_back() -> None:
    layer, x = MultiHeadAttention(8, 2).eval(), torch.randn(1, 5, 8)
    before = layer(x).output
    assert replace_attention(layer, lambda layer: LinearAttention()) == 1
    assert not torch.allclose(layer(x).output, before)
    replace_attention(layer, lambda layer: DotProductAttention())
    assert torch.equal(layer(x).output, before)


@pytest.mark.parametrize("core", [lambda: PerformerAttention(4, 16), LinearAttention])
def test_layer_decodes_step_by_step_with_rotary_positions_and_padding(
    core: Callable[[], nn.Module],
) -> None:
    layer = MultiHeadAttention(8, 2, core=core(), rotary=RotaryEmbedding(4)).double()
    x, mask = normal(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = False
    whole = layer(x, key_mask=mask, is_causal=True).output
    cache = layer.new_cache()
    assert isinstance(cache, LinearAttentionState)
    steps = [
        layer(x[:, i : i + 1], key_mask=mask[:, : i + 1], is_causal=True, cache=cache).output
        for i in range(9)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-10)


def test_rotary_layer_comes_close_to_softmax() -> None:
    layer = MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8)).double()
    x = normal(1, 60, 16)
    exact = layer(x).output
    replace_attention(layer, lambda layer: performer(layer.key_dim, 20_000))
    torch.testing.assert_close(layer(x).output, exact, rtol=0, atol=0.02)


@pytest.mark.bad_input
def test_what_a_linear_core_cannot_do_is_refused() -> None:
    query, key, value = inputs()
    for core in (performer(), LinearAttention()):
        with pytest.raises(ValueError, match="need_weights must be False"):
            core(query, key, value, need_weights=True)
        with pytest.raises(ValueError, match="same for all queries"):
            core(query, key, value, mask=torch.ones(11, 11, dtype=torch.bool))
        with pytest.raises(ValueError, match="bool"):
            core(query, key, value, mask=torch.zeros(1, 1, 1, 11))
        with pytest.raises(ValueError, match=r"\(2, 3, 11\), got shape \(2, 1, 7\)"):
            core(query, key, value, mask=torch.ones(2, 1, 1, 7, dtype=torch.bool))
        with pytest.raises(ValueError, match="got 4 and 11"):
            core(query[:, :, :4], key, value, is_causal=True)
        with pytest.raises(ValueError, match="a cache needs is_causal=True"):
            core(query, key, value, cache=core.new_cache())
        with pytest.raises(TypeError, match="LinearAttentionState, got dict"):
            core(query, key, value, is_causal=True, cache={})
        for scale in (0.0, -1.0):
            with pytest.raises(ValueError, match="scale must be a positive number"):
                core(query, key, value, scale=scale)
        state = core.new_cache()
        core(query, key, value, is_causal=True, cache=state)
        with pytest.raises(ValueError, match="the cache was filled with"):
            core(query[:1], key[:1], value[:1], is_causal=True, cache=state)
        with pytest.raises(ValueError, match="got 4 and 3"):
            core(query, key[..., :3], value)
    with pytest.raises(ValueError, match="key_dim = 4, got 3"):
        performer()(query[..., :3], key[..., :3], value)
    with pytest.raises(ValueError, match="num_heads = 2, got 3"):
        performer(num_heads=2)(query, key, value)
    with pytest.raises(ValueError, match="key_dim = 4, got 3"):
        performer().calibrate_(query[..., :3], key[..., :3])


@pytest.mark.bad_input
def test_impossible_cores_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="positive, hyperbolic, got 'trigonometric'"):
        PerformerAttention(4, 8, kind="trigonometric")
    with pytest.raises(ValueError, match="got 'unit'"):
        PerformerAttention(4, 8, norm="unit")
    for option in ("num_features", "num_heads", "redraw_interval", "chunk_size"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            PerformerAttention(4, **{option: 0})
    with pytest.raises(ValueError, match="key_dim must be at least 1, got 0"):
        PerformerAttention(0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        LinearAttention(chunk_size=0)


@pytest.mark.bad_input
def test_replacements_that_cannot_be_are_refused_and_change_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"no kexue\.nn\.attention\.MultiHeadAttention: got Linear"
    ):
        replace_attention(nn.Linear(2, 2), lambda layer: LinearAttention())
    model = nn.ModuleList([MultiHeadAttention(8, 2), MultiHeadAttention(8, 4)])
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) of the layer, got \(2, 2, 2\)"):
        replace_attention(model, lambda layer: TalkingHeadsAttention(2))
    with pytest.raises(TypeError, match=r"nn\.Module, got NoneType"):
        replace_attention(model, lambda layer: None)
    assert all(isinstance(layer.core, DotProductAttention) for layer in model)
    assert math.prod(layer.num_heads for layer in model) == 8


@pytest.mark.gpu
def test_gpu_agrees_with_the_host() -> None:
    query, key, value = inputs(100)
    for core in (performer(), LinearAttention()):
        for causal in (False, True):
            host = core.cpu()(query, key, value, is_causal=causal).output
            device = core.cuda()(query.cuda(), key.cuda(), value.cuda(), is_causal=causal).output
            torch.testing.assert_close(device.cpu(), host, rtol=1e-9, atol=1e-9)
