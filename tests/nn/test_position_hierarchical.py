"""Hierarchical positions against their definition, and models of `transformers` that use them."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.lab import DataError, Lab
from kexue.nn.position import (
    HierarchicalPositionEmbedding,
    extend_position_embeddings,
    hierarchical_position_embedding,
)
from kexue.studies import hierarchical_position as study

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SINES = torch.arange(8, dtype=torch.float64).sin().reshape(4, 2)


def two_steps(p: Tensor, alpha: float) -> Tensor:
    """All n² codes as the article defines them: u from q = p on the first block, then q from u."""
    u = (p - alpha * p[:1]) / (1 - alpha)
    q = alpha * u[:, None] + (1 - alpha) * u[None]
    return q.flatten(0, 1)


def trained(rows: int, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, dtype=torch.float64, generator=generator).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)


def table_of(
    weight: Tensor, *, alpha: float = 0.4, num_reserved: int = 0, padding_idx: int | None = None
) -> HierarchicalPositionEmbedding:
    embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=padding_idx)
    return HierarchicalPositionEmbedding.from_embedding(
        embedding, alpha=alpha, num_reserved=num_reserved
    )


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (0, [0.0, 0.8414709848]),
        (3, [-0.2794154982, 0.6569865987]),
        (4, [0.6061982846, 0.3745703336]),
        (6, [-0.1506042108, -1.4258249258]),
        (9, [0.4047624300, -1.0591434983]),
        (15, [-0.4656924970, 0.5339970080]),
    ],
)
def test_rows_of_sixteen_codes_from_four(row: int, code: list[float]) -> None:
    codes = hierarchical_position_embedding(SINES, 16, alpha=0.4)
    # Ten decimals are given.
    assert codes[row].tolist() == pytest.approx(code, abs=5e-11)


def test_sum_and_norm_of_sixteen_codes_from_four() -> None:
    codes = hierarchical_position_embedding(SINES, 16, alpha=0.4)
    assert codes.sum().item() == pytest.approx(-5.2841388363, abs=5e-11)
    assert codes.norm().item() == pytest.approx(4.5971378186, abs=5e-11)


def test_large_alpha_throws_codes_far_away() -> None:
    codes = hierarchical_position_embedding(SINES, 16, alpha=0.8)
    assert codes[9].tolist() == pytest.approx([-2.1179125544, -7.0604610298], abs=5e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.4, 0.85])
@pytest.mark.parametrize("n", range(1, 9))
def test_closed_form_is_the_two_step_definition(n: int, alpha: float) -> None:
    p = trained(n)
    assert torch.allclose(
        hierarchical_position_embedding(p, n * n, alpha=alpha),
        two_steps(p, alpha),
        rtol=1e-12,
        # At 0.85 the first step divides by 0.15 what the second one multiplies by 0.85.
        atol=1e-13,
    )


def test_map_applied_to_the_identity_has_the_stated_rows() -> None:
    matrix = hierarchical_position_embedding(torch.eye(4, dtype=torch.float64), 16)
    third = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) / 3
    expected = {
        4: [third[0], third[1], 0, 0],
        5: [-third[1], third[2], 0, 0],
        6: [-third[1], third[1], 1, 0],
    }
    for row, entries in expected.items():
        assert matrix[row].tolist() == pytest.approx([float(e) for e in entries], abs=4 * EPS)
    assert torch.allclose(matrix.sum(1), torch.ones(16, dtype=torch.float64), atol=4 * EPS)


def test_gradient_is_the_transposed_map() -> None:
    p = trained(5).requires_grad_()
    w = trained(25, seed=1)
    (w * hierarchical_position_embedding(p, 25)).sum().backward()
    matrix = hierarchical_position_embedding(torch.eye(5, dtype=torch.float64), 25)
    # 25 terms of order 1.
    assert torch.allclose(p.grad, matrix.T @ w, atol=25 * 8 * EPS)


def test_alpha_zero_repeats_the_table() -> None:
    p = trained(4)
    codes = hierarchical_position_embedding(p, 15, alpha=0.0)
    assert torch.equal(codes, p[torch.arange(15) % 4])


def test_near_one_half_blocks_and_places_weigh_the_same() -> None:
    p = trained(6)
    step = 1e-9
    codes = hierarchical_position_embedding(p, 36, alpha=0.5 - step)
    limit = (p[:, None] + p[None] - p[0]).flatten(0, 1)
    # The derivative of α/(1-α) at one half is 4.
    largest = (p - p[0]).abs().max().item()
    assert (codes - limit).abs().max().item() <= 4 * step * largest * 1.01


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 7),
    reserved=st.integers(0, 3),
    alpha=st.floats(0, 0.9).filter(lambda a: abs(a - 0.5) > 1e-3),
    data=st.data(),
)
def test_every_length_is_a_beginning_of_the_longest(
    n: int, reserved: int, alpha: float, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, n * n))
    weight = trained(reserved + n, dim=2)
    codes = hierarchical_position_embedding(weight, length, alpha=alpha, num_reserved=reserved)
    assert codes.shape == (reserved + length, 2)
    assert torch.equal(codes[:reserved], weight[:reserved])
    whole = hierarchical_position_embedding(weight[reserved:], n * n, alpha=alpha)
    assert torch.equal(codes[reserved:], whole[:length])


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 7),
    alpha=st.floats(0.01, 0.9).filter(lambda a: abs(a - 0.5) > 1e-3),
    seed=st.integers(0, 100),
)
def test_all_codes_differ_and_a_common_offset_passes_through(
    n: int, alpha: float, seed: int
) -> None:
    p = trained(n, seed=seed)
    codes = hierarchical_position_embedding(p, n * n, alpha=alpha)
    distances = torch.cdist(codes, codes) + torch.eye(n * n, dtype=torch.float64)
    assert distances.min().item() > 1e-6
    offset = torch.arange(5.0, dtype=torch.float64)
    moved = hierarchical_position_embedding(p + offset, n * n, alpha=alpha)
    ratio = alpha / (1 - alpha)
    # Each of three terms is at most 10 in size, two of them times c.
    assert torch.allclose(moved, codes + offset, rtol=0, atol=100 * (1 + 2 * ratio) * EPS)


def test_variance_of_codes_grows_with_alpha() -> None:
    rows, dim = 3, 40_000
    p = trained(rows, dim)
    for alpha, factor in ((0.4, 17 / 9), (0.8, 33.0)):
        # Block 1, place 2: three different rows.
        variance = hierarchical_position_embedding(p, 6, alpha=alpha)[5].var().item()
        assert variance == pytest.approx(factor, rel=5 * math.sqrt(2 / dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_rows_are_the_trained_ones_bit_for_bit(dtype: torch.dtype) -> None:
    weight = trained(11, 8, dtype=dtype)
    extremes = [0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max / 4]
    weight[3, :4] = torch.tensor(extremes, dtype=dtype)
    codes = hierarchical_position_embedding(weight, 81, num_reserved=2)
    assert codes.dtype == dtype
    assert torch.equal(bits(codes[:11]), bits(weight))
    table = table_of(weight, num_reserved=2)
    assert torch.equal(bits(table(torch.arange(11))), bits(weight))
    shuffled = torch.tensor([10, 3, 0, 2, 10, 1])
    assert torch.equal(bits(table(shuffled)), bits(weight[shuffled]))
    # Beside positions of later blocks as well.
    assert torch.equal(bits(table(torch.tensor([3, 82]))[0]), bits(weight[3]))
    assert torch.equal(bits(table.materialize(50).weight[:11]), bits(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_the_shift_and_the_sum_only(dtype: torch.dtype) -> None:
    weight = trained(8, 16, dtype=dtype)
    codes = hierarchical_position_embedding(weight, 64)
    exact = two_steps(weight.double(), 0.4)
    # Two roundings of numbers below 8.
    assert (codes.double() - exact).abs().max().item() <= 2 * 8 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("num_reserved", [0, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.8])
def test_three_ways_to_a_code_agree_bit_for_bit(alpha: float, num_reserved: int) -> None:
    weight = trained(num_reserved + 6, dtype=torch.float32)
    codes = hierarchical_position_embedding(weight, 36, alpha=alpha, num_reserved=num_reserved)
    table = table_of(weight, alpha=alpha, num_reserved=num_reserved)
    every_id = torch.arange(num_reserved + 36)
    shuffled = torch.randperm(
        len(every_id), generator=torch.Generator().manual_seed(0)
    )  # no range, so rows are gathered
    assert torch.equal(table(shuffled), codes[shuffled])
    for start, length in ((0, 6), (0, 36), (3, 17), (6, 12), (29, 7), (35, 1)):
        ids = every_id[num_reserved + start :][:length]
        assert torch.equal(table(ids), codes[ids])
    assert torch.equal(table.materialize(36).weight, codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 24), (2, 2, 6)], ids=str)
def test_ids_of_any_shape_and_integer_kind(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = trained(13)
    ids = (torch.arange(math.prod(shape)) % 24 + 100).reshape(shape).to(dtype)
    expected = hierarchical_position_embedding(weight, 169)[ids.long()]
    found = table_of(weight)(ids)
    assert found.shape == (*shape, 5)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ids", ["range", "rows", "shuffled"])
def test_gradient_reaches_the_same_rows_from_all_blocks(ids: str) -> None:
    weight = trained(7)
    wanted = {
        "range": torch.arange(2, 27),
        "rows": torch.arange(3, 25).expand(2, -1),
        "shuffled": torch.tensor([[26, 0, 1, 9, 9], [2, 3, 25, 14, 6]]),
    }[ids]
    table = table_of(weight, num_reserved=2)
    w = trained(wanted.numel(), seed=1).reshape(*wanted.shape, 5)
    (w * table(wanted)).sum().backward()
    free = weight.clone().requires_grad_()
    codes = hierarchical_position_embedding(free, 25, num_reserved=2)
    (w * codes[wanted]).sum().backward()
    assert not table.weight.grad.is_sparse
    assert torch.allclose(table.weight.grad, free.grad, atol=50 * 8 * EPS)


@pytest.mark.parametrize("ids", [range(3, 15), [15, 0, 9, 9]], ids=["range", "gathered"])
def test_lookup_passes_gradcheck(ids: Any) -> None:
    table = table_of(trained(5, dim=2), num_reserved=1)
    wanted = torch.tensor(list(ids))

    def lookup(weight: Tensor) -> Tensor:
        return torch.func.functional_call(table, {"weight": weight}, (wanted,))

    assert torch.autograd.gradcheck(lookup, (trained(5, dim=2, seed=3).requires_grad_(),))


@pytest.mark.parametrize("padding_idx", [0, 2])
def test_padding_row_has_no_gradient(padding_idx: int) -> None:
    table = table_of(trained(6), padding_idx=padding_idx)
    for ids in (torch.arange(36), torch.tensor([0, 2, 35, 14])):
        table.zero_grad()
        (table(ids) * trained(len(ids), seed=1)).sum().backward()
        assert not table.weight.grad[padding_idx].any()
        assert table.weight.grad.any()


def test_new_table_starts_like_bert_with_an_empty_padding_row() -> None:
    torch.manual_seed(0)
    table = HierarchicalPositionEmbedding(400, 100, padding_idx=-1, num_reserved=1)
    assert table.padding_idx == 399
    assert not table.weight[399].any()
    # Standard error of a standard deviation from N numbers: σ / √(2N).
    assert table.weight[:399].std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * 39_900))
    assert abs(table.weight[:399].mean().item()) < 5 * 0.02 / math.sqrt(39_900)


def test_from_embedding_shares_the_parameter_and_draws_nothing() -> None:
    embedding = nn.Embedding(9, 4, padding_idx=1).requires_grad_(False).eval()
    state = torch.get_rng_state()
    table = HierarchicalPositionEmbedding.from_embedding(embedding, alpha=0.3, num_reserved=2)
    assert torch.equal(state, torch.get_rng_state())
    assert table.weight is embedding.weight
    assert (table.padding_idx, table.alpha, table.num_reserved) == (1, 0.3, 2)
    assert (table.num_positions, table.num_embeddings, table.embedding_dim) == (49, 9, 4)
    assert not table.weight.requires_grad
    assert not table.training


def test_materialized_rows_are_independent_and_have_memory_of_their_own() -> None:
    table = table_of(trained(5), padding_idx=1, num_reserved=2).requires_grad_(False)
    longer = table.materialize(8)
    assert type(longer) is nn.Embedding
    assert (longer.num_embeddings, longer.padding_idx) == (10, 1)
    assert longer.weight.requires_grad
    assert longer.weight.untyped_storage().nbytes() == 10 * 5 * 8
    with torch.no_grad():
        longer.weight.zero_()
    assert table.weight.any()


def test_copies_pickles_and_state_dicts_keep_the_code() -> None:
    table = table_of(trained(6), num_reserved=2, padding_idx=1)
    ids = torch.arange(18)
    buffer = io.BytesIO()
    torch.save(table, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(table),
        pickle.loads(pickle.dumps(table)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(again(ids), table(ids))
        assert again.weight is not table.weight
    assert list(table.state_dict()) == ["weight"]
    plain = nn.Embedding(6, 5, dtype=torch.float64)
    plain.load_state_dict(table.state_dict())
    assert torch.equal(plain.weight, table.weight)


@pytest.mark.bad_input  # dynamo cannot trace through the shape checks
def test_compiled_without_graph_breaks() -> None:
    table = table_of(trained(6), num_reserved=2)
    ids = torch.tensor([[0, 17, 5], [2, 1, 9]])
    torch._dynamo.reset()
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), table(ids))
    compiled(ids).sum().backward()
    gradient = table.weight.grad.clone()
    table.weight.grad = None
    table(ids).sum().backward()
    assert torch.allclose(gradient, table.weight.grad, atol=50 * EPS)


@pytest.mark.bad_input  # nor can the tracer
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_tracing_keeps_no_branch_of_the_traced_ids() -> None:
    table = table_of(trained(6))
    traced = torch.jit.trace(table, torch.arange(12), check_trace=False)
    ids = torch.tensor([35, 0, 17, 3])
    assert torch.equal(traced(ids), table(ids))


def test_several_tables_at_once_under_vmap() -> None:
    weights = torch.stack([trained(6, seed=s) for s in range(3)])
    table = table_of(trained(6))
    for ids in (torch.tensor([35, 0, 17]), torch.arange(20)):
        together = torch.vmap(
            lambda w, ids=ids: torch.func.functional_call(table, {"weight": w}, (ids,))
        )(weights)
        alone = torch.stack([hierarchical_position_embedding(w, 36)[ids] for w in weights])
        assert torch.equal(together, alone)


class Encoder(nn.Module):
    """Two embeddings of positions at two depths, with what Hugging Face keeps beside them."""

    def __init__(self, *, rows: int = 6, padding_idx: int | None = None) -> None:
        super().__init__()
        self.config = type("Config", (), {"max_position_embeddings": rows})()
        self.inner = nn.Module()
        self.inner.position_embeddings = nn.Embedding(rows, 4, padding_idx=padding_idx)
        self.inner.register_buffer(
            "position_ids", torch.arange(rows, dtype=torch.int32)[None], persistent=True
        )
        self.inner.register_buffer(
            "token_type_ids", torch.zeros(1, rows, dtype=torch.long), persistent=False
        )
        self.position_embeddings = nn.Embedding(rows, 3)


def test_every_table_of_the_name_is_replaced_and_its_surroundings_follow() -> None:
    model = Encoder()
    keys = list(model.state_dict())
    old = model.inner.position_embeddings.weight
    assert extend_position_embeddings(model, 20) is model
    assert isinstance(model.position_embeddings, HierarchicalPositionEmbedding)
    assert model.inner.position_embeddings.weight is old
    assert torch.equal(model.inner.position_ids, torch.arange(20, dtype=torch.int32)[None])
    assert torch.equal(model.inner.token_type_ids, torch.zeros(1, 20, dtype=torch.long))
    assert model.config.max_position_embeddings == 20
    assert list(model.state_dict()) == keys


def test_second_call_only_refreshes_what_stands_beside_the_table() -> None:
    model = extend_position_embeddings(Encoder(), 20, alpha=0.3)
    table = model.inner.position_embeddings
    extend_position_embeddings(model, 30)
    assert model.inner.position_embeddings is table
    assert table.alpha == 0.3
    assert model.inner.position_ids.shape == (1, 30)
    assert model.config.max_position_embeddings == 30


def test_materialized_table_may_be_extended_again_from_its_longer_base() -> None:
    embedding = nn.Embedding(4, 3)
    longer = extend_position_embeddings(embedding, 8, factorized=False)
    longest = extend_position_embeddings(longer, 60, factorized=False)
    assert type(longest) is nn.Embedding
    assert torch.equal(longest.weight, hierarchical_position_embedding(longer.weight, 60))


@pytest.mark.parametrize("factorized", [True, False])
def test_frozen_half_precision_table_stays_frozen_and_half(factorized: bool) -> None:
    embedding = nn.Embedding(5, 4, padding_idx=1, dtype=torch.float16).requires_grad_(False)
    before = embedding.weight.clone()
    table = extend_position_embeddings(embedding, 9, factorized=factorized)
    assert table.weight.dtype == torch.float16
    assert not table.weight.requires_grad
    assert table.padding_idx == 1
    assert len(table.weight) == (5 if factorized else 2 + 9)
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("factorized", [True, False])
def test_tied_tables_stay_tied(factorized: bool) -> None:
    model = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
    model["a"].wpe = model["b"].wpe = nn.Embedding(5, 4)
    extend_position_embeddings(model, 25, factorized=factorized, name="wpe")
    assert model["a"].wpe is model["b"].wpe
    assert model["a"].wpe(torch.tensor([24])).shape == (1, 4)


def test_bare_tables_come_back_extended() -> None:
    table = extend_position_embeddings(nn.Embedding(5, 4), 25)
    assert isinstance(table, HierarchicalPositionEmbedding)
    assert extend_position_embeddings(table, 10) is table


def encoders() -> dict[str, Callable[[], nn.Module]]:
    """Small random encoders of `transformers`; those with padding have 12 places in 14 rows."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 32}
    plain = {**small, "max_position_embeddings": 12}
    padded = {**small, "max_position_embeddings": 14, "pad_token_id": 1}
    distil = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}

    def builder(model: str, config: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            torch.manual_seed(0)
            return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()

        return build

    return {
        "bert": builder("BertModel", "BertConfig", plain),
        "bert for masked words": builder("BertForMaskedLM", "BertConfig", plain),
        "electra": builder("ElectraModel", "ElectraConfig", {**plain, "embedding_size": 16}),
        "albert": builder("AlbertModel", "AlbertConfig", {**plain, "embedding_size": 8}),
        "distilbert": builder(
            "DistilBertModel", "DistilBertConfig", {**distil, "max_position_embeddings": 12}
        ),
        "roberta": builder("RobertaModel", "RobertaConfig", padded),
        "xlm-roberta": builder("XLMRobertaModel", "XLMRobertaConfig", padded),
        "camembert": builder("CamembertModel", "CamembertConfig", padded),
        "mpnet": builder("MPNetModel", "MPNetConfig", padded),
        "gpt2": builder(
            "GPT2Model",
            "GPT2Config",
            {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12},
        ),
    }


ENCODERS = (
    "bert", "bert for masked words", "electra", "albert", "distilbert", "roberta", "xlm-roberta",
    "camembert", "mpnet", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("kind", ENCODERS)
def test_transformers_model_reads_longer_and_short_inputs_as_before(
    kind: str, factorized: bool
) -> None:
    model = encoders()[kind]()
    generator = torch.Generator().manual_seed(0)
    # Not the pad token.
    short = torch.randint(2, 30, (2, 12), generator=generator)
    long = torch.randint(2, 30, (2, 40), generator=generator)
    keys = {name: value.shape for name, value in model.state_dict().items()}
    reserved = model.config.max_position_embeddings - 12
    with torch.no_grad():
        before = model(input_ids=short)[0]
        name = "wpe" if kind == "gpt2" else "position_embeddings"
        extend_position_embeddings(model, 40, factorized=factorized, name=name)
        after = model(input_ids=short)[0]
        longer = model(input_ids=long)[0]
    assert torch.equal(bits(after), bits(before))
    assert longer.shape[:2] == (2, 40)
    assert longer.isfinite().all()
    assert model.config.max_position_embeddings == reserved + 40
    if factorized:
        assert {name: value.shape for name, value in model.state_dict().items()} == keys


def test_roberta_table_keeps_its_reserved_rows_and_counts_from_two() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=11, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaModel(config).eval()
    old = model.embeddings.position_embeddings.weight.detach().clone()
    extend_position_embeddings(model, 81)
    table = model.embeddings.position_embeddings
    assert (table.num_positions, table.num_reserved, table.padding_idx) == (81, 2, 1)
    codes = table(torch.arange(83)).detach()
    assert torch.equal(codes[:2], old[:2])
    assert torch.allclose(codes[2:], two_steps(old[2:].double(), 0.4).float(), atol=1e-6)
    assert model.config.max_position_embeddings == 83
    assert model.embeddings.position_ids.shape == (1, 83)
    with torch.no_grad():
        padded = torch.randint(2, 30, (2, 81))
        padded[1, 60:] = 1
        outputs = model(input_ids=padded, attention_mask=(padded != 1).long())[0]
    assert outputs.isfinite().all()


def test_gpt2_continues_with_its_cache_beyond_its_old_end() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    extend_position_embeddings(model, 100, name="wpe")
    assert model.config.n_positions == 100
    start = torch.arange(1, 11)[None]
    length = {"min_new_tokens": 30, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(start, attention_mask=torch.ones_like(start), **length)
    without = model.generate(
        start, attention_mask=torch.ones_like(start), use_cache=False, **length
    )
    assert with_cache.shape == (1, 40)
    assert torch.equal(with_cache, without)


def test_checkpoint_from_before_the_extension_loads() -> None:
    build = encoders()["bert"]
    trained_model, fresh = build(), build()
    with torch.no_grad():
        for parameter in trained_model.parameters():
            parameter.add_(0.01)
    state = trained_model.state_dict()
    extend_position_embeddings(fresh, 40).load_state_dict(state)
    extend_position_embeddings(trained_model, 40)
    tokens = torch.randint(30, (1, 40))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=tokens)[0], trained_model(input_ids=tokens)[0])


@pytest.mark.bad_input
def test_tables_with_an_offset_of_their_own_are_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=12,
    )  # fmt: skip
    model = transformers.BartModel(config)
    with pytest.raises(ValueError, match="BartLearnedPositionalEmbedding"):
        extend_position_embeddings(model, 40, name="embed_positions")
    weight = model.encoder.embed_positions.weight
    assert hierarchical_position_embedding(weight, 40, num_reserved=2).shape == (42, 16)


@pytest.mark.bad_input
@pytest.mark.parametrize("alpha", [-0.1, 0.5, 1.0, 1.5, math.nan, math.inf])
def test_alpha_is_checked(alpha: float) -> None:
    words = r"alpha must lie in \[0, 1\) and not be 0.5"
    with pytest.raises(ValueError, match=words):
        hierarchical_position_embedding(SINES, 8, alpha=alpha)
    with pytest.raises(ValueError, match=words):
        HierarchicalPositionEmbedding(4, 2, alpha=alpha)
    with pytest.raises(ValueError, match=words):
        extend_position_embeddings(nn.Embedding(4, 2), 8, alpha=alpha)


@pytest.mark.bad_input
@pytest.mark.parametrize("length", [0, -1, 17])
def test_length_is_checked(length: int) -> None:
    words = "length must lie in 1 … n² = 16 for a table of n = 4 positions, got "
    with pytest.raises(ValueError, match=words + str(length)):
        hierarchical_position_embedding(SINES, length)
    with pytest.raises(ValueError, match=words):
        table_of(SINES).materialize(length)


@pytest.mark.bad_input
@pytest.mark.parametrize("length", [-1, 0, 3, 4, 17])
def test_greatest_length_is_checked_and_the_model_left_alone(length: int) -> None:
    words = rf"larger than the n = 4 positions .* n² = 16, got {length}"
    for factorized in (True, False):
        with pytest.raises(ValueError, match=words):
            extend_position_embeddings(nn.Embedding(4, 2), length, factorized=factorized)
    model = nn.ModuleDict(
        {
            "long": nn.ModuleDict({"position_embeddings": nn.Embedding(40, 2)}),
            "short": nn.ModuleDict({"position_embeddings": nn.Embedding(4, 2)}),
        }
    )
    with pytest.raises(ValueError, match="n = 4 positions"):
        extend_position_embeddings(model, 41)
    assert type(model["long"]["position_embeddings"]) is nn.Embedding
    extended = extend_position_embeddings(Encoder(rows=4), 16)
    with pytest.raises(ValueError, match=words):
        extend_position_embeddings(extended, length)


@pytest.mark.bad_input
@pytest.mark.parametrize("num_reserved", [-1, 4, 9])
def test_reserved_rows_are_checked(num_reserved: int) -> None:
    words = rf"num_reserved must lie in \[0, rows\), got {num_reserved} of a table of 4 rows"
    with pytest.raises(ValueError, match=words):
        hierarchical_position_embedding(SINES, 8, num_reserved=num_reserved)
    with pytest.raises(ValueError, match=words):
        HierarchicalPositionEmbedding(4, 2, num_reserved=num_reserved)
    with pytest.raises(ValueError, match=words):
        extend_position_embeddings(nn.Embedding(4, 2), 8, num_reserved=num_reserved)


@pytest.mark.bad_input
def test_table_is_looked_for_by_name() -> None:
    words = "no nn.Embedding named 'position_embeddings' was found in Linear"
    with pytest.raises(ValueError, match=words):
        extend_position_embeddings(nn.Linear(2, 2), 8)


@pytest.mark.bad_input
def test_tables_that_change_at_lookup_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not have max_norm.*got max_norm=1"):
        extend_position_embeddings(nn.Embedding(4, 2, max_norm=1.0), 8)
    with pytest.raises(TypeError, match=r"must be an nn.Embedding, got Linear"):
        HierarchicalPositionEmbedding.from_embedding(nn.Linear(2, 2))


@pytest.mark.bad_input
def test_ids_are_checked() -> None:
    table = table_of(trained(6), num_reserved=2)
    assert table(torch.tensor([0, 17])).shape == (2, 5)
    for wrong in (-1, 18):
        with pytest.raises(IndexError, match=rf"must lie in \[0, 18\), got {wrong}"):
            table(torch.tensor([3, wrong]))
    for kind in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"integer tensor, got {kind}"):
            table(torch.ones(3, dtype=kind))
    with pytest.raises(TypeError, match="got list"):
        table([0, 1])


@pytest.mark.bad_input
def test_tables_are_checked() -> None:
    with pytest.raises(TypeError, match=r"floating tensor, got torch.int64"):
        hierarchical_position_embedding(torch.ones(4, 2, dtype=torch.int64), 8)
    with pytest.raises(TypeError, match="got ndarray"):
        hierarchical_position_embedding(np.ones((4, 2)), 8)
    with pytest.raises(ValueError, match=r"shape \(rows, dim\), got \(4,\)"):
        hierarchical_position_embedding(torch.ones(4), 8)
    with pytest.raises(ValueError, match="finite"):
        hierarchical_position_embedding(torch.full((4, 2), math.nan), 8)
    with pytest.raises(ValueError, match="embedding_dim must be at least 1, got 0"):
        HierarchicalPositionEmbedding(4, 0)
    with pytest.raises(ValueError, match="padding_idx must be one of the 4 rows, got 4"):
        HierarchicalPositionEmbedding(4, 2, padding_idx=4)


@pytest.mark.gpu
def test_table_on_a_gpu_agrees_with_the_host() -> None:
    table = table_of(trained(6), num_reserved=2)
    for ids in (torch.arange(38), torch.tensor([[37, 0], [9, 4]])):
        there = copy.deepcopy(table).cuda()(ids.cuda() % 18)
        assert torch.allclose(there.cpu(), table(ids % 18), rtol=4 * EPS)


def save_checkpoint(folder: Path, *, padded: bool) -> None:
    """A random encoder of 12 positions, its tokenizer of ten words, and a text, as users have."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [f"word{i}" for i in range(10)]
    vocabulary = {word: i for i, word in enumerate(special + words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
        unk_token="<unk>", mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip
    kind = "Roberta" if padded else "Bert"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=15, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=14 if padded else 12, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(words[i * i % 10] for i in range(700)))


@pytest.mark.parametrize("padded", [False, True], ids=["bert", "roberta"])
def test_study_repeats_the_experiment_on_a_saved_checkpoint(tmp_path: Path, padded: bool) -> None:
    save_checkpoint(tmp_path / "model", padded=padded)
    lab = Lab("hierarchical_position", tmp_path, budget="smoke", data_path=tmp_path / "model")
    study.checkpoint_experiment(lab, tmp_path / "model")
    (table,) = lab.findings.tables
    assert table.columns[1:] == ["12 tokens, before", "36 tokens, at once", "after 2 steps"]
    assert [row[0] for row in table.rows] == [0.4, 0.0]
    # The same model before, and a share of tokens everywhere.
    assert table.rows[0][1] == table.rows[1][1]
    assert all(0 <= number <= 1 for row in table.rows for number in row[1:])


@pytest.mark.bad_input
def test_study_says_what_a_checkpoint_folder_lacks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    lab = Lab("hierarchical_position", tmp_path, budget="smoke", data_path=tmp_path)
    with pytest.raises(DataError, match=r"must hold a checkpoint .* and a text in text.txt"):
        study.checkpoint_experiment(lab, tmp_path)
    folder = tmp_path / "model"
    save_checkpoint(folder, padded=False)
    (folder / "text.txt").write_text("word1 word2")
    with pytest.raises(DataError, match=r"text.txt must have at least 300 tokens"):
        study.checkpoint_experiment(lab, folder)


@pytest.mark.parametrize(
    ("make", "keeps_the_first"),
    [
        (study.tiled, True),
        (study.random_rows(None), True),
        (study.random_rows(0.02), True),
        (study.interpolated, False),
    ],
    ids=["tiled", "random", "small random", "interpolated"],
)
def test_baselines_of_the_study(make: Callable[..., Tensor], keeps_the_first: bool) -> None:
    p = trained(16, 64, dtype=torch.float32)
    rows = make(p, 48, torch.Generator().manual_seed(0))
    assert rows.shape == (48, 64)
    assert torch.equal(rows[:16], p) == keeps_the_first
    # Stretching keeps both ends.
    assert keeps_the_first or torch.allclose(rows[[0, -1]], p[[0, -1]], atol=1e-6)
