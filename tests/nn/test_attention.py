"""Cores, module and cache of kexue.nn.attention: oracles, masks, precision, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.nn.attention import (
    AttentionOutput,
    DotProductAttention,
    KeyValueCache,
    MultiHeadAttention,
    TalkingHeadsAttention,
)

EPS = torch.finfo(torch.float64).eps
DIGITS = 6e-11  # the oracles are printed with ten decimals

A = torch.tensor([[1.0, 0.5], [-0.25, 2.0]], dtype=torch.float64)
B = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)


def waves() -> tuple[Tensor, Tensor, Tensor]:
    """Two heads, three queries and keys of size 4, values of size 2."""
    grid = torch.arange(24, dtype=torch.float64)
    query, key = grid.sin().reshape(1, 2, 3, 4), grid.cos().reshape(1, 2, 3, 4)
    return query, key, (grid[:12] + 0.5).sin().reshape(1, 2, 3, 2)


def talking(a: Tensor | None = A, b: Tensor | None = B, **options: Any) -> TalkingHeadsAttention:
    core = TalkingHeadsAttention(
        len(b) if a is None else len(a),  # type: ignore[arg-type]
        num_key_heads=None if a is None else a.shape[1],
        num_value_heads=None if b is None else len(b),
        mix_logits=a is not None,
        mix_weights=b is not None,
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        for parameter, matrix in ((core.logits_mixing, a), (core.weights_mixing, b)):
            if parameter is not None:
                parameter.copy_(matrix)
    return core


def heads(
    batch: int = 2, h: int = 3, n: int = 4, m: int = 6, key_dim: int = 5, value_dim: int = 2,
    *, h_v: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return (
        draw(batch, h, n, key_dim),
        draw(batch, h, m, key_dim),
        draw(batch, h if h_v is None else h_v, m, value_dim),
    )


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, allowed: Any
) -> tuple[Tensor, Tensor]:
    """Talking heads as loops over heads, queries and keys."""
    batch, h_k, n, key_dim = query.shape
    m, h, h_v = key.shape[2], len(a), len(b)
    weights = torch.zeros(batch, h, n, m, dtype=torch.float64)
    for e, i, row in itertools.product(range(batch), range(h), range(n)):
        seen = [j for j in range(m) if allowed(e, i, row, j)]
        logits = [
            sum(
                float(a[i, g]) * float(query[e, g, row] @ key[e, g, j]) / math.sqrt(key_dim)
                for g in range(h_k)
            )
            for j in seen
        ]
        total = sum(math.exp(logit) for logit in logits)
        for j, logit in zip(seen, logits, strict=True):
            weights[e, i, row, j] = math.exp(logit) / total
    mixed = torch.zeros(batch, h_v, n, m, dtype=torch.float64)
    for v, i in itertools.product(range(h_v), range(h)):
        mixed[:, v] += b[v, i] * weights[:, i]
    return mixed @ value, mixed


def close(actual: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0.0, atol=atol
    )


def test_plain_attention_of_waves() -> None:
    output = DotProductAttention()(*waves()).output
    close(output.flatten()[:4], [0.3390669966, -0.0021784047, -0.2448945921, -0.3815389358], DIGITS)
    close(output.sum(), 0.8313704832, DIGITS)


def test_causal_plain_attention_of_waves() -> None:
    output = DotProductAttention()(*waves(), is_causal=True).output
    close(output[0, 1, 1], [0.6128818590, 0.2471950634], DIGITS)


def test_talking_heads_of_waves() -> None:
    output, weights = talking()(*waves(), need_weights=True)
    close(
        output[0, :, 0],
        [[0.4760604908, -0.1189302485], [0.6188234611, 0.0439070690]],
        DIGITS,
    )
    close(output.sum(), 0.9951372351, DIGITS)
    assert weights is not None
    close(weights.sum(), 6.0)  # six rows, and the rows of B sum to 1


def test_causal_talking_heads_of_waves() -> None:
    output = talking()(*waves(), is_causal=True).output
    close(
        output[0, :, 1],
        [[0.5753976600, -0.0894500786], [0.6778542827, 0.1343555158]],
        DIGITS,
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_talking_heads_with_unequal_counts_are_the_loop_over_heads(
    chunk: int | None, is_causal: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    b = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 3, 4, 6, generator=generator) < 0.7
    mask[0, 1, 2] = False
    query, key, value = heads(h=2, h_v=4)
    output, weights = talking(a, b, query_chunk_size=chunk)(
        query, key, value, mask=mask, is_causal=is_causal, need_weights=True
    )
    expected, expected_weights = by_hand(
        query, key, value, a, b,
        lambda e, i, row, j: bool(mask[e, i, row, j]) and (not is_causal or j <= row + 2),
    )  # fmt: skip
    # Sums of at most 12 terms below 10.
    close(output, expected, 1e-13)
    assert weights is not None
    close(weights, expected_weights, 1e-13)


def test_logits_mixing_is_a_larger_key_size_with_a_shared_key() -> None:
    query, key, value = heads(h=2, h_v=3, dtype=torch.float32)
    a = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    wide_query = torch.cat([a[None, :, g, None, None] * query[:, g : g + 1] for g in (0, 1)], -1)
    wide_key = torch.cat([key[:, 0:1], key[:, 1:2]], -1).expand(-1, 3, -1, -1)
    expected = DotProductAttention()(wide_query, wide_key, value, scale=5**-0.5).output
    output = talking(a.double(), None).float()(query, key, value).output
    close(output, expected, 1e-6)


def test_talking_heads_start_as_plain_attention() -> None:
    given = heads(n=6)
    for causal in (False, True):
        output, weights = TalkingHeadsAttention(3, dtype=torch.float64)(
            *given, is_causal=causal, need_weights=True
        )
        plain, plain_weights = DotProductAttention()(*given, is_causal=causal, need_weights=True)
        close(output, plain, 1e-14)
        close(weights, plain_weights, 1e-14)


def test_one_head_scales_logits_and_output() -> None:
    given = heads(h=1)
    a, b = torch.full((1, 1), 1.7), torch.full((1, 1), -0.3)
    plain = DotProductAttention()(*given, scale=1.7 * 5**-0.5).output
    close(talking(a, b)(*given).output, -0.3 * plain, 1e-7)  # 1.7 and -0.3 are float32 here


def test_zero_logits_mixing_attends_uniformly_to_what_is_allowed() -> None:
    query, key, value = heads(h=2)
    mask = torch.tensor([True, False, True, True, False, True])
    output = talking(torch.zeros(2, 2), torch.eye(2))(query, key, value, mask=mask).output
    close(output, value[:, :, mask].mean(2, keepdim=True).expand_as(output), 1e-14)


def test_mixing_without_a_square_starts_with_variance_one_over_fan_in() -> None:
    torch.manual_seed(0)
    core = TalkingHeadsAttention(64, num_key_heads=100)
    assert core.logits_mixing is not None
    # Five standard errors of a mean square of 6400 normal numbers.
    assert float(100 * core.logits_mixing.detach().square().mean()) == pytest.approx(
        1, abs=5 * math.sqrt(2 / 6400)
    )
    assert torch.equal(core.weights_mixing, torch.eye(64))
    core.weights_mixing.data.fill_(3)
    core.reset_parameters()
    assert torch.equal(core.weights_mixing, torch.eye(64))


def test_causal_mask_is_aligned_to_the_lower_right() -> None:
    query, key = torch.ones(1, 1, 2, 1), torch.arange(5.0).reshape(1, 1, 5, 1)
    upper_left = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, scale=1.0
    )
    close(upper_left.flatten(), [0.0, 0.7310585786], 1e-6)
    rows = [torch.softmax(torch.arange(float(c)), 0) @ torch.arange(float(c)) for c in (4, 5)]
    for core in (DotProductAttention(), TalkingHeadsAttention(1)):
        for need_weights in (False, True):
            output = core(
                query, key, key, is_causal=True, scale=1.0, need_weights=need_weights
            ).output
            close(output.flatten(), torch.stack(rows), 1e-6)


CORES = {
    "plain": lambda: DotProductAttention(),
    "talking": lambda: talking(A[:, [0, 1, 0]].repeat(2, 1)[:3], torch.eye(3).roll(1, 0)),
    "talking in chunks": lambda: talking(
        A[:, [0, 1, 0]].repeat(2, 1)[:3], B.repeat(2, 2)[:3, :3], query_chunk_size=2
    ),
}
every_core = pytest.mark.parametrize("core", [pytest.param(c(), id=n) for n, c in CORES.items()])
either_path = pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])


@every_core
@either_path
def test_floating_mask_of_minus_infinity_is_a_boolean_mask(
    core: nn.Module, need_weights: bool
) -> None:
    given = heads()
    mask = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    one = core(*given, mask=mask, need_weights=need_weights).output
    two = core(*given, mask=bias, need_weights=need_weights).output
    close(one, two, 1e-14)


@every_core
@either_path
def test_masked_keys_do_not_matter(core: nn.Module, need_weights: bool) -> None:
    query, key, value = heads()
    mask = torch.tensor([True, True, False, True, False, False])
    one = core(query, key, value, mask=mask, need_weights=need_weights).output
    two = core(query, key[:, :, mask], value[:, :, mask], need_weights=need_weights).output
    close(one, two, 1e-14)


@every_core
@either_path
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("value_dim", [2, 5])
def test_query_that_may_attend_nothing_gives_zeros_and_zero_gradients(
    core: nn.Module, need_weights: bool, kind: str, is_causal: bool, value_dim: int
) -> None:
    given = [x.requires_grad_() for x in heads(n=6, value_dim=value_dim)]
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2], mask[:, 0], mask[5, 1:] = False, False, False  # causal: row 0 sees nothing, either
    dead = [0, 2, 5] if is_causal else [2, 5]
    if kind == "float":
        mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, -math.inf)
    output, weights = core(*given, mask=mask, is_causal=is_causal, need_weights=need_weights)
    output.square().sum().backward()
    assert torch.equal(output[:, :, dead], torch.zeros_like(output[:, :, dead]))
    if need_weights:
        assert torch.equal(weights[:, :, dead], torch.zeros_like(weights[:, :, dead]))
    query = given[0]
    assert all(bool(x.grad.isfinite().all()) for x in given)
    assert torch.equal(query.grad[:, :, dead], torch.zeros_like(query.grad[:, :, dead]))
    assert bool((query.grad[:, :, 4] != 0).all())


@every_core
@either_path
def test_empty_keys_give_zeros_and_empty_queries_nothing(
    core: nn.Module, need_weights: bool
) -> None:
    output, weights = core(*heads(m=0), need_weights=need_weights)
    assert torch.equal(output, torch.zeros(2, 3, 4, 2, dtype=torch.float64))
    assert weights is None or weights.shape == (2, 3, 4, 0)
    mask = torch.ones(4, 0, dtype=torch.bool)
    assert torch.equal(core(*heads(m=0), mask=mask, need_weights=need_weights).output, output)
    assert core(*heads(n=0), need_weights=need_weights).output.shape == (2, 3, 0, 2)
    assert core(*heads(n=0, m=0), is_causal=True).output.shape == (2, 3, 0, 2)
    assert core(*heads(batch=0), need_weights=need_weights).output.shape == (0, 3, 4, 2)


@every_core
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_the_cores(core: nn.Module, is_causal: bool) -> None:
    given = tuple(x.requires_grad_() for x in heads(batch=1, n=3, m=4, key_dim=2))
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(core.parameters())

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        *given, bias = inputs[:4]
        names = [name for name, _ in core.named_parameters()]
        mixings = dict(zip(names, inputs[4:], strict=True))
        return tuple(
            torch.func.functional_call(
                core, mixings, tuple(given),
                {"mask": bias, "is_causal": is_causal, "need_weights": need_weights},
            ).output
            for need_weights in (False, True)
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (*given, bias, *parameters))


@every_core
@either_path
def test_tensor_scale_is_a_temperature_for_each_head(core: nn.Module, need_weights: bool) -> None:
    query, key, value = heads()
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    one = core(query, key, value, scale=temperature, need_weights=need_weights).output
    two = core(query * temperature, key, value, scale=1.0, need_weights=need_weights).output
    close(one, two, 1e-14)
    half = core(query, key, value, scale=torch.tensor(0.5), need_weights=need_weights).output
    close(half, core(query, key, value, scale=0.5, need_weights=need_weights).output, 1e-14)


@every_core
def test_later_tokens_change_nothing_before_them(core: nn.Module) -> None:
    query, key, value = heads(n=6)
    before = core(query, key, value, is_causal=True).output
    key[:, :, 4:], value[:, :, 4:] = 50.0, -7.0
    after = core(query, key, value, is_causal=True).output
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 9), chunk=st.integers(1, 10), seed=st.integers(0, 99),
    is_causal=st.booleans(), kind=st.sampled_from(["none", "rows", "keys", "bias"]),
)  # fmt: skip
def test_chunks_change_nothing_but_rounding(
    n: int, m: int, chunk: int, seed: int, is_causal: bool, kind: str
) -> None:
    m = max(m, n) if is_causal else m
    given = heads(h=2, n=n, m=m, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = {
        "none": None,
        "rows": torch.rand(n, 1, generator=generator) < 0.5,
        "keys": torch.rand(2, 1, 1, m, generator=generator) < 0.5,
        "bias": torch.randn(2, n, m, dtype=torch.float64, generator=generator),
    }[kind]
    options = {"mask": mask, "is_causal": is_causal, "need_weights": True}
    whole, parts = talking()(*given, **options), talking(query_chunk_size=chunk)(*given, **options)
    close(parts.output, whole.output, 1e-13)
    close(parts.weights, whole.weights, 1e-13)


def test_automatic_chunks_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = heads(h=2, n=300, m=300)
    whole = talking(query_chunk_size=300)(*given, is_causal=True).output
    sizes = []
    weights_of = TalkingHeadsAttention._weights

    def watched(self: Any, query: Tensor, *rest: Any) -> Any:
        sizes.append(query.shape[2])
        return weights_of(self, query, *rest)

    monkeypatch.setattr(TalkingHeadsAttention, "_weights", watched)
    monkeypatch.setattr("kexue.nn.attention.cores._CHUNK_ELEMENTS", 2**15)
    close(talking()(*given, is_causal=True).output, whole, 1e-13)
    with torch.no_grad():
        close(talking()(*given, is_causal=True).output, whole, 1e-13)
    assert len(sizes) > 2
    assert max(sizes) * 2 * 2 * 300 <= 2**15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_core
@either_path
def test_half_precision_rounds_once(
    core: nn.Module, need_weights: bool, dtype: torch.dtype
) -> None:
    given = heads(dtype=dtype)
    output = core.to(dtype)(*given, need_weights=need_weights).output
    assert output.dtype == dtype
    # The mixings are 1, 0.5, 0.25 and 2 or rounded tenths; entries stay below 8.
    exact = core.double()(*(x.double() for x in given)).output
    close(output.double(), exact, 16 * torch.finfo(dtype).eps)


def test_large_logits_of_half_precision_are_mixed_without_overflow() -> None:
    query = torch.full((1, 2, 1, 4), 200.0, dtype=torch.float16)
    key = torch.stack([torch.full((3, 4), 200.0), torch.full((3, 4), -200.0)]).half()[None]
    value = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float16).reshape(1, 1, 3, 1)
    core = talking(torch.ones(1, 2), torch.ones(1, 1)).half()
    # Each logit, 2e5 / 2, is beyond 65504; their sum is 0.
    assert float(core(query, key, value).output.detach()) == pytest.approx(3.0, rel=2e-3)


def test_autocast_keeps_the_softmax_in_single_precision() -> None:
    given = heads(h=2, dtype=torch.float32)
    core = talking().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = core(*given, need_weights=True)
    exact = core(*given, need_weights=True)
    # Products of entries below 8 in an arithmetic with 8 bits.
    close(output.float(), exact.output, 0.15)
    close(weights.float(), exact.weights, 0.05)


def test_dropout_acts_on_the_final_weights_in_training_only() -> None:
    query, key, value = heads(n=40, m=50)
    value = torch.ones_like(value)
    for core in (
        DotProductAttention(dropout=0.25),
        TalkingHeadsAttention(3, dropout=0.25, dtype=torch.float64),
    ):
        for need_weights in (False, True):
            torch.manual_seed(0)
            output = core(query, key, value, need_weights=need_weights).output
            torch.manual_seed(0)
            again = core(query, key, value, need_weights=need_weights).output
            assert torch.equal(output, again)
            # Of 240 rows with weights on some ten keys: the mean stays 1, rows vary.
            assert float(output.detach().mean()) == pytest.approx(1, abs=0.1)
            assert float(output[..., 0].detach().std()) > 0.05
        core.eval()
        close(core(query, key, value).output, torch.ones_like(output), 1e-14)


def test_the_cores_compile_without_a_break() -> None:
    given = heads(n=6)
    mask = torch.ones(6, 6, dtype=torch.bool).triu()
    for core in (DotProductAttention(), talking(torch.eye(3), torch.eye(3))):
        for options in ({}, {"mask": mask}, {"is_causal": True}, {"need_weights": True}):
            torch._dynamo.reset()
            compiled = torch.compile(core, backend="aot_eager", fullgraph=True)
            close(compiled(*given, **options).output, core(*given, **options).output, 1e-14)


test_the_cores_compile_without_a_break = pytest.mark.bad_input(
    test_the_cores_compile_without_a_break  # dynamo cannot trace through the shape checks
)


def pair(dim: int = 32, num_heads: int = 4) -> tuple[nn.MultiheadAttention, MultiHeadAttention]:
    """Torch's module and ours with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(dim, num_heads, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = MultiHeadAttention(dim, num_heads)
    with torch.no_grad():
        projections = (ours.query_projection, ours.key_projection, ours.value_projection)
        for part, weight, bias in zip(
            projections, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        ours.output_projection.load_state_dict(theirs.out_proj.state_dict())
    return theirs, ours


def test_module_equals_that_of_torch() -> None:
    theirs, ours = pair()
    query, context = torch.randn(3, 5, 32), torch.randn(3, 7, 32)
    mask = torch.rand(5, 7) < 0.7
    mask[:, 0] = True
    key_mask = torch.ones(3, 7, dtype=torch.bool)
    key_mask[1, 4:] = False
    # The kernel is the same; a product may be split in another order, worth a few roundings.
    atol = 4e-6
    expected, weights = theirs(query, query, query, average_attn_weights=False)
    result = ours(query, need_weights=True)
    close(result.output, expected, atol)
    close(result.weights, weights, atol)
    plain = theirs(query, query, query, need_weights=False)[0]
    close(ours(query).output, plain, atol)
    expected = theirs(
        query, context, context, attn_mask=~mask, key_padding_mask=~key_mask, need_weights=False
    )[0]
    close(ours(query, context, mask=mask, key_mask=key_mask).output, expected, atol)
    causal = theirs(
        query, query, query, need_weights=False, is_causal=True,
        attn_mask=nn.Transformer.generate_square_subsequent_mask(5),
    )[0]  # fmt: skip
    close(ours(query, is_causal=True).output, causal, atol)


def test_all_sizes_are_free() -> None:
    attention = MultiHeadAttention(
        10, 3, key_dim=7, value_dim=5, context_dim=6, output_dim=9, bias=False
    )
    output, weights = attention(torch.randn(2, 4, 10), torch.randn(2, 8, 6), need_weights=True)
    assert output.shape == (2, 4, 9)
    assert weights is not None
    assert weights.shape == (2, 3, 4, 8)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "query_projection.weight": (21, 10),
        "key_projection.weight": (21, 6),
        "value_projection.weight": (15, 6),
        "output_projection.weight": (9, 15),
    }


def test_logits_are_scaled_by_the_key_size() -> None:
    attention = MultiHeadAttention(8, 2, key_dim=9).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    query = attention.query_projection(x).reshape(4, 2, 9)
    key = attention.key_projection(x).reshape(4, 2, 9)
    expected = torch.softmax(torch.einsum("ihd,jhd->hij", query, key) / 3, -1)
    close(attention(x, need_weights=True).weights[0], expected, 1e-14)


def test_core_sizes_the_projections() -> None:
    core = TalkingHeadsAttention(4, num_key_heads=2, num_value_heads=6)
    attention = MultiHeadAttention(8, 4, core=core)
    assert attention.query_projection.out_features == 2 * 2
    assert attention.value_projection.out_features == 6 * 2
    output, weights = attention(torch.randn(3, 5, 8), need_weights=True)
    assert output.shape == (3, 5, 8)
    assert weights.shape == (3, 6, 5, 5)
    assert "core.logits_mixing" in attention.state_dict()


@pytest.mark.parametrize("make_core", [lambda: None, lambda: talking(A, B)])
@pytest.mark.parametrize("pieces", [[1] * 6, [2, 3, 1], [6]])
def test_decoding_with_a_cache_equals_one_call(make_core: Any, pieces: list[int]) -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2, core=make_core()).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    key_mask = torch.ones(3, 6, dtype=torch.bool)
    key_mask[1, 2] = key_mask[2, 0] = False
    cache, outputs, seen = attention.new_cache(), [], 0
    for piece in x.split(pieces, 1):
        seen += piece.shape[1]
        outputs.append(
            attention(piece, is_causal=True, cache=cache, key_mask=key_mask[:, :seen]).output
        )
    assert cache.length == 6
    whole = attention(x, is_causal=True, key_mask=key_mask).output
    close(torch.cat(outputs, 1), whole, 1e-13)


def test_key_mask_and_mask_are_combined() -> None:
    attention = MultiHeadAttention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    key_mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    both = mask & key_mask[:, None, None]
    expected = attention(x, mask=both & torch.ones(5, 5, dtype=torch.bool).tril()).output
    close(attention(x, mask=mask, key_mask=key_mask, is_causal=True).output, expected, 1e-14)
    bias = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, -math.inf)
    close(attention(x, mask=bias, key_mask=key_mask, is_causal=True).output, expected, 1e-14)


def test_padding_of_a_whole_example_leaves_the_output_bias_and_finite_gradients() -> None:
    attention = MultiHeadAttention(8, 2)
    x = torch.randn(2, 5, 8, requires_grad=True)
    key_mask = torch.tensor([[True] * 5, [False] * 5])
    for need_weights in (False, True):
        output = attention(x, key_mask=key_mask, need_weights=need_weights).output
        assert torch.equal(output[1], attention.output_projection.bias.expand(5, 8))
        x.grad = None
        output.square().sum().backward()
        assert torch.equal(x.grad[1], torch.zeros(5, 8))
        assert bool(x.grad.isfinite().all())


class Turned(nn.Module):
    """Rotates pairs of features by the position, and remembers which positions it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def rotate(self, x: Tensor, *, positions: Tensor) -> Tensor:
        self.seen.append(positions.tolist())
        angle = positions.to(x.dtype)[..., :, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def test_rotary_positions_go_on_after_the_cache() -> None:
    torch.manual_seed(0)
    rotary = Turned()
    attention = MultiHeadAttention(8, 2, rotary=rotary).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    whole = attention(x, is_causal=True).output
    shifted = attention(x, is_causal=True, positions=torch.arange(5) + 7).output
    close(shifted, whole, 1e-13)  # only distances matter
    assert rotary.seen == [[0, 1, 2, 3, 4]] * 2 + [[7, 8, 9, 10, 11]] * 2
    rotary.seen.clear()
    cache = attention.new_cache()
    parts = [attention(part, is_causal=True, cache=cache).output for part in x.split([3, 2], 1)]
    close(torch.cat(parts, 1), whole, 1e-13)
    assert rotary.seen == [[0, 1, 2]] * 2 + [[3, 4]] * 2
    assert not torch.allclose(whole, attention(x, is_causal=True, positions=torch.zeros(5)).output)


def test_keys_of_another_input_have_positions_of_their_own() -> None:
    rotary = Turned()
    attention = MultiHeadAttention(8, 2, rotary=rotary)
    x, context = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    attention(x, context, positions=torch.tensor([5, 6]))
    attention(x, context, positions=torch.tensor([5, 6]), key_positions=torch.tensor([1, 2, 4]))
    assert rotary.seen == [[5, 6], [0, 1, 2], [5, 6], [1, 2, 4]]


def test_log_length_scales_the_logits() -> None:
    x = torch.randn(1, 2048, 4, dtype=torch.float64)
    attention = MultiHeadAttention(4, 1, log_length=512).double()
    plain = MultiHeadAttention(4, 1).double()
    plain.load_state_dict(attention.state_dict())
    with torch.no_grad():
        plain.query_projection.weight.mul_(11 / 9)  # log 2048 / log 512
        plain.query_projection.bias.mul_(11 / 9)
    close(attention(x[:, :1], x).output, plain(x[:, :1], x).output, 1e-13)


def test_log_length_counts_cached_keys() -> None:
    attention = MultiHeadAttention(4, 1, log_length=3).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    cache = attention.new_cache()
    attention(x[:, :4], is_causal=True, cache=cache)
    last = attention(x[:, 4:], is_causal=True, cache=cache).output
    close(last, attention(x, is_causal=True).output[:, 4:], 1e-13)


class Running(nn.Module):
    """A core with a state of its own: the mean of all values that were not masked."""

    class State:
        def __init__(self) -> None:
            self.length, self.count, self.sum = 0, 0.0, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def new_cache(self) -> Running.State:
        return Running.State()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None,
        is_causal: bool = False, scale: Any = None, need_weights: bool = False, cache: Any = None,
    ) -> AttentionOutput:  # fmt: skip
        self.calls.append({"mask": mask, "is_causal": is_causal, "scale": scale})
        use = torch.ones(len(value), 1, 1, value.shape[2]) if mask is None else mask.to(value.dtype)
        cache = self.new_cache() if cache is None else cache
        cache.length += value.shape[2]
        cache.count = cache.count + use.mT.sum(2, keepdim=True)
        cache.sum = cache.sum + (use.mT * value).sum(2, keepdim=True)
        return AttentionOutput((cache.sum / cache.count).expand(-1, -1, query.shape[2], -1))


def test_cache_of_a_core_is_handed_through_with_the_masks_of_new_tokens() -> None:
    core, rotary = Running(), Turned()
    attention = MultiHeadAttention(8, 2, core=core, rotary=rotary)
    cache = attention.new_cache()
    assert isinstance(cache, Running.State)
    x = torch.randn(2, 5, 8)
    key_mask = torch.tensor([[True] * 5, [True, False, True, False, True]])
    attention(x[:, :3], is_causal=True, cache=cache, key_mask=key_mask[:, :3])
    last = attention(x[:, 3:], is_causal=True, cache=cache, key_mask=key_mask).output
    assert cache.length == 5
    close(last, attention(x, is_causal=True, key_mask=key_mask).output[:, 3:], 1e-6)
    assert [call["mask"].shape for call in core.calls] == [(2, 1, 1, 3), (2, 1, 1, 2), (2, 1, 1, 5)]
    assert all(call["is_causal"] and call["scale"] is None for call in core.calls)
    assert rotary.seen[2] == [3, 4]


def test_cache_crops_reorders_and_forgets() -> None:
    cache = KeyValueCache()
    assert (cache.length, cache.key, cache.value) == (0, None, None)
    cache.crop(0)
    key, value = torch.randn(3, 2, 4, 5), torch.randn(3, 6, 4, 7)
    cache.append(key, value)
    returned = cache.append(key[:, :, :1], value[:, :, :1])
    assert cache.length == 5
    assert torch.equal(returned[0], torch.cat([key, key[:, :, :1]], 2))
    cache.crop(2)
    assert cache.length == 2
    cache.append(key[:, :, 3:], value[:, :, 3:])
    cache.reorder(torch.tensor([2, 0]))
    assert torch.equal(cache.key, key[[2, 0]][:, :, [0, 1, 3]])
    assert torch.equal(cache.value, value[[2, 0]][:, :, [0, 1, 3]])
    # What was handed out before is as it was.
    assert torch.equal(returned[1][:, :, :4], value)
    cache.reset()
    assert (cache.length, cache.key, cache.value) == (0, None, None)


def test_gradient_flows_through_the_cache() -> None:
    attention = MultiHeadAttention(8, 2).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    cache = attention.new_cache()
    parts = [attention(part, is_causal=True, cache=cache).output for part in x.split(1, 1)]
    (stepwise,) = torch.autograd.grad(torch.cat(parts, 1).square().sum(), x)
    (whole,) = torch.autograd.grad(attention(x, is_causal=True).output.square().sum(), x)
    close(stepwise, whole, 1e-12)


@pytest.mark.bad_input
def test_the_module_compiles_without_a_break() -> None:
    for core in (None, TalkingHeadsAttention(2)):
        attention = MultiHeadAttention(8, 2, key_dim=5, core=core, log_length=8).double()
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        key_mask = torch.tensor([[True] * 5, [True, False, True, False, True]])
        torch._dynamo.reset()
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        expected = attention(x, key_mask=key_mask, is_causal=True).output
        close(compiled(x, key_mask=key_mask, is_causal=True).output, expected, 1e-14)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((10, 3), {}, r"dim \(10\) must be divisible by num_heads \(3\) when key_dim or value_dim"),
        ((10, 3), {"key_dim": 4}, "must be divisible by num_heads"),
        ((8, 2), {"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ((8, 2), {"output_dim": -1}, "output_dim must be at least 1, got -1"),
        ((8, 0), {}, "num_heads must be at least 1, got 0"),
        ((8, 2), {"log_length": 1}, "log_length must be at least 2, got 1"),
        ((8, 2), {"dropout": 1.5}, "between 0 and 1, got 1.5"),
        ((8, 2), {"core": TalkingHeadsAttention(2), "dropout": 0.1}, "dropout must be 0"),
        ((8, 2), {"core": TalkingHeadsAttention(4)}, "num_heads = 2 heads, got 4"),
    ],
)
def test_module_refuses_sizes(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiHeadAttention(*arguments, **options)


@pytest.mark.bad_input
def test_module_refuses_a_rotary_that_cannot_rotate() -> None:
    with pytest.raises(TypeError, match=r"rotate\(x, \*, positions\), got Identity"):
        MultiHeadAttention(8, 2, rotary=nn.Identity())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 0}, "at least 1, got 0, 0 and 0"),
        ({"num_heads": 2, "num_key_heads": -1}, "at least 1"),
        ({"num_heads": 2, "num_key_heads": 3, "mix_logits": False},
         r"num_key_heads \(3\) must equal num_heads \(2\) without mix_logits"),
        ({"num_heads": 2, "num_value_heads": 3, "mix_weights": False},
         r"num_value_heads \(3\) must equal num_heads \(2\) without mix_weights"),
        ({"num_heads": 2, "query_chunk_size": 0}, "query_chunk_size must be at least 1, got 0"),
        ({"num_heads": 2, "dropout": -0.1}, "between 0 and 1, got -0.1"),
    ],
)  # fmt: skip
def test_talking_heads_refuse_counts(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TalkingHeadsAttention(**options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mask": torch.ones(4, 5).bool()}, ValueError, r"\(2, 3, 4, 6\), got shape \(4, 5\)"),
        ({"mask": torch.ones(1, 2, 3, 4, 6).bool()}, ValueError, "broadcastable"),
        ({"mask": torch.ones(4, 6).int()}, TypeError, r"bool \(True = attend\) or floating point"),
        ({"mask": [[True] * 6] * 4}, TypeError, "got list"),
        ({"query": heads(n=7)[0], "is_causal": True}, ValueError, "got 7 queries and 6 keys"),
        ({"query": heads(h=2)[0]}, ValueError, "batch, heads and key size"),
        ({"key": heads(key_dim=4)[1]}, ValueError, r"\(2, 3, 5\), got \(2, 3, 4\)"),
        ({"value": heads(m=5)[2]}, ValueError, r"\(2, 6\), got \(2, 5\)"),
        ({"value": heads(h=4)[2]}, ValueError, "3 heads, got 4"),
        ({"query": heads()[0][0]}, ValueError, r"\(batch, heads, length, size\), got \(3, 4, 5\)"),
        ({"query": heads()[0].long()}, TypeError, "real floating point numbers, got torch.int64"),
        ({"scale": torch.ones(6)}, ValueError, r"\(batch, heads, query_length, 1\)"),
    ],
)  # fmt: skip
def test_cores_refuse_what_does_not_fit(options: Any, error: type, words: str) -> None:
    query, key, value = heads()
    given = {"query": query, "key": key, "value": value, **options}
    for core in (DotProductAttention(), TalkingHeadsAttention(3, dtype=torch.float64)):
        with pytest.raises(error, match=words):
            core(**given)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query": torch.ones(2, 4, 7)}, ValueError, "query must have 8 features, got 7"),
        ({"key": torch.ones(2, 4, 8)}, ValueError, "key must have 6 features, got 8"),
        ({"key": None}, ValueError, "key must have 6 features, got 8"),
        ({"value": torch.ones(2, 4, 6)}, ValueError, "one batch, key and value one length"),
        ({"key": torch.ones(3, 5, 6)}, ValueError, "one batch"),
        ({"query": torch.ones(4, 8)}, ValueError, r"\(batch, length, features\), got \(4, 8\)"),
        ({"query": torch.ones(2, 4, 8).long()}, TypeError, "floating point"),
        ({"mask": torch.ones(5, 4).bool()}, ValueError, r"\(2, 2, 4, 5\), got shape \(5, 4\)"),
        ({"mask": torch.ones(4, 5).long()}, TypeError, r"bool \(True = attend\)"),
        ({"key_mask": torch.ones(2, 4).bool()}, ValueError, r"\(2, 5\).*got \(2, 4\)"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be bool"),
        ({"cache": Running.State()}, TypeError, "KeyValueCache for DotProductAttention, got State"),
    ],
)  # fmt: skip
def test_module_refuses_what_does_not_fit(options: Any, error: type, words: str) -> None:
    attention = MultiHeadAttention(8, 2, context_dim=6)
    given = {"query": torch.ones(2, 4, 8), "key": torch.ones(2, 5, 6), **options}
    with pytest.raises(error, match=words):
        attention(**given)


@pytest.mark.bad_input
def test_cache_refuses_another_batch_or_other_heads() -> None:
    cache = KeyValueCache()
    key, value = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 6)
    cache.append(key, value)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\), got \(1, 3, 5\)"):
        cache.append(key[:1], value[:1])
    with pytest.raises(ValueError, match=r"\(2, 3, 6\), got \(2, 2, 6\)"):
        cache.append(key, value[:, :2])
    with pytest.raises(ValueError, match="same batch and length"):
        cache.append(key, value[:, :, :2])
    with pytest.raises(ValueError, match="must have shape"):
        cache.append(key[0], value[0])
    with pytest.raises(ValueError, match="between 0 and 4, got 5"):
        cache.crop(5)
    with pytest.raises(ValueError, match="one-dimensional integers"):
        cache.reorder(torch.tensor([0.0]))
    assert cache.length == 4
