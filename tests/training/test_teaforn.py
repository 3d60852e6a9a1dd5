"""TeaForN against hand-sized numbers, a serial roll-out, and what its passes can know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kexue.models.transformer import Transformer, TransformerConfig
from kexue.training.teaforn import (
    TeaForNOutput,
    causal_lm_parts,
    soft_embedding,
    step_weights,
    teaforn_loss,
)

EPS = torch.finfo(torch.float64).eps
# A few dozen operations on numbers of order one, each off by half a unit in the last place.
ROUNDING = 64 * EPS

EMBEDDING = torch.tensor([[0.2, -0.1], [0.4, 0.3], [-0.5, 0.6]], dtype=torch.float64)
WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]], dtype=torch.float64)
INPUTS, TARGETS = torch.tensor([[0, 1, 2, 1]]), torch.tensor([[1, 2, 1, 0]])
LOOKED_UP = ("expectation", "top_k", "hard", "gumbel")


def body(embeddings: Tensor) -> Tensor:
    return torch.tanh(embeddings.cumsum(1))


def head(hidden: Tensor) -> Tensor:
    return hidden @ WEIGHT.to(hidden.dtype).T


def hand_sized(**options: Any) -> TeaForNOutput:
    return teaforn_loss(
        body, head, EMBEDDING[INPUTS], TARGETS, **{"embedding": EMBEDDING, **options}
    )


def random_problem(
    seed: int = 0, batch: int = 2, length: int = 5, vocabulary: int = 7, dim: int = 4
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    return {
        "tokens": tokens,
        "table": normal(vocabulary, dim).requires_grad_(),
        "weight": normal(vocabulary, dim).requires_grad_(),
        "mix": normal(dim, dim).requires_grad_(),
    }


def solve(problem: dict[str, Tensor], **options: Any) -> TeaForNOutput:
    """A body that mixes features and depends on the order of its input."""
    mix = problem["mix"]

    def decode(embeddings: Tensor) -> Tensor:
        place = torch.arange(1, embeddings.shape[1] + 1, dtype=embeddings.dtype)[:, None]
        return torch.tanh((embeddings * place.sqrt()).cumsum(1) @ mix / place)

    tokens = problem["tokens"]
    options = {"targets": tokens[:, 1:], "decoder": decode, **options}
    return teaforn_loss(
        output_projection=lambda h: h @ problem["weight"].T,
        embeddings=problem["table"][tokens[:, :-1]],
        embedding=problem["table"],
        **options,
    )


def gradients(out: TeaForNOutput, problem: dict[str, Tensor]) -> list[Tensor]:
    leaves = [problem[name] for name in ("table", "weight", "mix")]
    return list(torch.autograd.grad(out.loss, leaves))


def test_one_pass_is_teacher_forcing() -> None:
    out = hand_sized(n_grams=1)
    torch.testing.assert_close(out.loss.item(), 1.0440002480977337, rtol=ROUNDING, atol=0)
    expected = cross_entropy(head(body(EMBEDDING[INPUTS]))[0], TARGETS[0])
    torch.testing.assert_close(out.loss, expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(
    ("layout", "loss", "steps"),
    [
        (
            "prepend_start",
            1.8933037506378638,
            [1.0440002480977337, 1.0925985305383186, 1.212016949083884],
        ),
        (
            "stacked",
            1.7966019359245646,
            [1.0440002480977337, 1.009055971850187, 0.9922948076069499],
        ),
    ],
)
def test_three_passes_in_either_layout(layout: str, loss: float, steps: list[float]) -> None:
    out = hand_sized(n_grams=3, discount=0.5, layout=layout)
    torch.testing.assert_close(out.loss.item(), loss, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(out.step_losses.tolist(), steps, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({"approximation": "expectation"}, 1.093610219108707),
        ({"approximation": "top_k", "top_k": 2}, 1.1037317165269858),
        ({"approximation": "hard"}, 1.1457524948525335),
    ],
)
def test_second_step_loss_of_looked_up_embeddings(options: dict[str, Any], second: float) -> None:
    out = hand_sized(n_grams=2, discount=1, **options)
    torch.testing.assert_close(out.step_losses[1].item(), second, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(out.loss, out.step_losses.sum(), rtol=ROUNDING, atol=0)


def test_hidden_states_pass_by_pass() -> None:
    hidden = hand_sized(n_grams=6).hidden
    settled = [0.197375320224904, 0.3777009477810077, 0.6498715233660363, 0.890626570144837]
    expected = {
        0: [0.197375320224904, 0.5370495669980353, 0.0996679946249559, 0.46211715726000985],
        1: [0.197375320224904, 0.3777009477810077, 0.7326502613596196, 0.7755446629065497],
        **dict.fromkeys((3, 4, 5), settled),
    }
    for index, values in expected.items():
        torch.testing.assert_close(
            hidden[index][0, :, 0].tolist(), values, rtol=ROUNDING, atol=ROUNDING
        )


@pytest.mark.parametrize("approximation", ["hidden", "expectation", "top_k", "hard"])
def test_each_pass_settles_one_more_position(approximation: str) -> None:
    out = solve(random_problem(), n_grams=7, approximation=approximation, top_k=2)
    for step, hidden in enumerate(out.hidden):
        for t in range(hidden.shape[1]):
            settled = out.hidden[min(step, t)][:, t]
            torch.testing.assert_close(hidden[:, t], settled, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("approximation", ["hidden", "expectation", "top_k", "hard"])
def test_as_many_passes_as_positions_are_the_serial_roll_out(approximation: str) -> None:
    problem = random_problem()
    options = {"approximation": approximation, "top_k": 3, "temperature": 0.7}
    tokens, table, length = problem["tokens"], problem["table"], 5
    out = solve(problem, n_grams=length, **options)

    place = torch.arange(1, length + 1, dtype=torch.float64).sqrt()
    inputs, rolled = [table[tokens[:, 0]]], []
    for t in range(length):
        total = sum(place[s] * vector for s, vector in enumerate(inputs))
        hidden = torch.tanh(total @ problem["mix"] / (t + 1))
        rolled.append(hidden)
        inputs.append(soft_embedding(hidden, hidden @ problem["weight"].T, table, **options))
    serial = torch.stack(rolled, 1)
    torch.testing.assert_close(out.hidden[-1], serial, rtol=ROUNDING, atol=ROUNDING)
    logits = serial @ problem["weight"].T
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.step_losses[-1], expected.detach(), rtol=ROUNDING, atol=0)


@given(changed=st.integers(0, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_pass_knows_no_true_token_later_than_its_number_before(changed: int, seed: int) -> None:
    problem = random_problem(seed)
    out = solve(problem, n_grams=4)
    other = {**problem, "tokens": problem["tokens"].clone()}
    other["tokens"][:, changed] = (other["tokens"][:, changed] + 1) % 7
    out_other = solve(other, n_grams=4)
    for i, (one, two) in enumerate(zip(out.hidden, out_other.hidden, strict=True), start=1):
        # With t counted from 1, as in h_t, which predicts w_t; w_0 is fed to every pass.
        for t in range(1, 6):
            same = torch.equal(one[:, t - 1], two[:, t - 1])
            if changed > 0 and t < changed + i:
                assert same
        if changed + i <= 5:
            assert not torch.equal(one[:, changed + i - 1], two[:, changed + i - 1])


def test_top_k_of_the_whole_vocabulary_is_the_expectation() -> None:
    everything = hand_sized(approximation="top_k", top_k=3)
    expected = hand_sized(approximation="expectation")
    torch.testing.assert_close(everything.loss, expected.loss, rtol=ROUNDING, atol=0)


@given(k=st.integers(1, 40), dim=st.integers(1, 12), temperature=st.floats(0.05, 20))
@settings(max_examples=50, deadline=None)
def test_top_k_is_the_renormalised_sum(k: int, dim: int, temperature: float) -> None:
    """Both ways to compute it: few vectors are gathered, many weights are scattered."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    table = torch.randn(40, dim, generator=generator, dtype=torch.float64)
    p = (logits / temperature).softmax(-1)
    kept = p.argsort(-1, descending=True)[:, :k]
    weights = torch.zeros_like(p).scatter(-1, kept, p.gather(-1, kept))
    expected = weights @ table / weights.sum(-1, keepdim=True)
    found = soft_embedding(
        logits, logits, table, approximation="top_k", top_k=k, temperature=temperature
    )
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_expectation_becomes_the_hard_choice_as_the_temperature_falls() -> None:
    problem = random_problem()
    logits, table = torch.randn(2, 5, 7, dtype=torch.float64), problem["table"]
    hard = soft_embedding(logits, logits, table, approximation="hard")
    torch.testing.assert_close(hard, table[logits.argmax(-1)], rtol=0, atol=0)
    for temperature in (1e-8, 1e-300):
        cold = soft_embedding(
            logits, logits, table, approximation="expectation", temperature=temperature
        )
        torch.testing.assert_close(cold, hard, rtol=0, atol=0)


def test_hard_has_the_gradient_of_the_expectation() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    table, direction = random_problem()["table"], torch.randn(4, 4, dtype=torch.float64)
    grads = {}
    for approximation in ("hard", "expectation"):
        found = soft_embedding(
            logits, logits, table, approximation=approximation, temperature=0.5, embedding_scale=3.0
        )
        grads[approximation] = torch.autograd.grad((found * direction).sum(), [logits, table])
    for one, two in zip(grads["hard"], grads["expectation"], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_gumbel_noise_samples_from_the_softmax() -> None:
    """The largest of logits plus Gumbel noise falls on token w with probability p_w."""
    draws, p = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    logits = p.log().expand(draws, 4)
    identity = torch.eye(4, dtype=torch.float64)
    chosen = soft_embedding(
        logits, logits, identity, approximation="gumbel", temperature=1e-6,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    share = chosen.mean(0)
    # Five standard errors, which a correct sampler leaves once in 400 000 draws of this test.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()


@pytest.mark.parametrize("approximation", LOOKED_UP)
def test_looked_up_embeddings_are_scaled_as_the_model_scales_them(approximation: str) -> None:
    table, logits = EMBEDDING, torch.randn(2, 4, 3, dtype=torch.float64)
    one, three = (
        soft_embedding(
            logits, logits, table, approximation=approximation, embedding_scale=scale, top_k=2,
            generator=torch.Generator().manual_seed(0),
        )
        for scale in (1.0, 3.0)
    )  # fmt: skip
    torch.testing.assert_close(three, 3 * one, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("approximation", ["hidden", *LOOKED_UP])
@pytest.mark.parametrize("layout", ["prepend_start", "stacked"])
def test_discount_zero_has_exactly_the_gradient_of_teacher_forcing(
    approximation: str, layout: str
) -> None:
    problem = random_problem()
    plain = solve(problem, n_grams=1)
    out = solve(
        problem, n_grams=3, discount=0.0, approximation=approximation, layout=layout, top_k=2
    )
    assert out.loss == plain.loss
    for one, two in zip(gradients(out, problem), gradients(plain, problem), strict=True):
        assert torch.equal(one, two)


def test_a_pass_of_weight_zero_cannot_spoil_the_loss() -> None:
    def overflowing(embeddings: Tensor) -> Tensor:
        return body(embeddings) * torch.inf

    out = teaforn_loss([body, overflowing], head, EMBEDDING[INPUTS], TARGETS, discount=0.0)
    assert out.step_losses[1].isnan()
    torch.testing.assert_close(out.loss.item(), 1.0440002480977337, rtol=ROUNDING, atol=0)


def test_all_passes_count_by_their_weight() -> None:
    out = hand_sized(n_grams=3, discount=[0.3, 0.0, 2.0])
    expected = 0.3 * out.step_losses[0] + 2.0 * out.step_losses[2]
    torch.testing.assert_close(out.loss, expected, rtol=ROUNDING, atol=0)
    assert step_weights(4, 0.5) == [1.0, 0.5, 0.25, 0.125]
    assert step_weights(3, 0) == [1.0, 0.0, 0.0]
    assert step_weights(2, (0.3, 3)) == [0.3, 3.0]


@pytest.mark.parametrize("layout", ["prepend_start", "stacked"])
@pytest.mark.parametrize("approximation", ["hidden", "expectation", "top_k"])
def test_gradcheck_through_all_passes(approximation: str, layout: str) -> None:
    problem = random_problem(batch=1, length=3, vocabulary=4, dim=2)
    names = ("table", "weight", "mix")

    def loss(*leaves: Tensor) -> Tensor:
        changed = {**problem, **dict(zip(names, leaves, strict=True))}
        return solve(
            changed, n_grams=3, approximation=approximation, layout=layout, top_k=2, temperature=0.6
        ).loss

    assert torch.autograd.gradcheck(loss, [problem[name] for name in names])


def test_cutting_the_gradient_between_passes_leaves_the_values() -> None:
    problem = random_problem()
    whole = solve(problem, n_grams=3)
    cut = solve(problem, n_grams=3, backpropagate_through_steps=False)
    assert torch.equal(cut.loss, whole.loss)
    assert not torch.equal(gradients(cut, problem)[2], gradients(whole, problem)[2])


def test_without_gradient_between_passes_each_pass_teaches_on_fixed_inputs() -> None:
    problem = random_problem()
    cut = gradients(solve(problem, backpropagate_through_steps=False, discount=[0.0, 1.0]), problem)
    frozen = {**problem, "mix": problem["mix"].detach().clone().requires_grad_()}
    hidden = solve(frozen, n_grams=1).hidden[0].detach()
    tokens, table = problem["tokens"], problem["table"]
    place = torch.arange(1, 6, dtype=torch.float64)[:, None]
    inputs = torch.cat([table[tokens[:, :1]], hidden[:, :-1]], 1)
    second = torch.tanh((inputs * place.sqrt()).cumsum(1) @ problem["mix"] / place)
    loss = cross_entropy((second @ problem["weight"].T).flatten(0, 1), tokens[:, 1:].flatten())
    expected = torch.autograd.grad(loss, [problem[n] for n in ("table", "weight", "mix")])
    for one, two in zip(cut, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("approximation", ["hidden", "expectation", "gumbel"])
def test_checkpointing_changes_neither_loss_nor_gradient(approximation: str) -> None:
    """With dropout, whose masks must be the same when the pass is run again."""
    problem = random_problem()
    calls = 0

    def decode(embeddings: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.dropout(torch.tanh(embeddings.cumsum(1) @ problem["mix"]), 0.5)

    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        out = solve(
            problem, decoder=decode, n_grams=3, approximation=approximation,
            activation_checkpointing=checkpointing, generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert calls == (6 if checkpointing else 3)
        found.append([out.loss, *gradients(out, problem)])
    assert calls == 9
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=ROUNDING, atol=ROUNDING)


def test_each_pass_drops_units_of_its_own() -> None:
    out = hand_sized(n_grams=1)
    torch.manual_seed(0)
    dropped = teaforn_loss(
        lambda e: nn.functional.dropout(torch.ones_like(e), 0.5), head, EMBEDDING[INPUTS], TARGETS
    )
    assert not torch.equal(dropped.hidden[0], dropped.hidden[1])
    assert torch.equal(out.hidden[0], hand_sized(n_grams=1).hidden[0])


def test_separate_decoders_serve_one_pass_each() -> None:
    def other(embeddings: Tensor) -> Tensor:
        return torch.sin(embeddings.cumsum(1))

    embeddings = EMBEDDING[INPUTS]
    out = teaforn_loss([body, other], head, embeddings, TARGETS)
    first = body(embeddings)
    second = other(torch.cat([embeddings[:, :1], first[:, :-1]], 1))
    assert torch.equal(out.hidden[0], first)
    assert torch.equal(out.hidden[1], second)
    modules = nn.ModuleList([nn.Linear(2, 2, dtype=torch.float64) for _ in range(2)])
    out = teaforn_loss(modules, head, embeddings, TARGETS)
    assert torch.equal(out.hidden[0], modules[0](embeddings))


@pytest.mark.parametrize("layout", ["prepend_start", "stacked"])
def test_without_targets_the_loss_is_zero_and_so_is_its_gradient(layout: str) -> None:
    problem = random_problem()
    targets = torch.full((2, 5), -1)
    out = solve(problem, targets=targets, ignore_index=-1, n_grams=3, layout=layout)
    assert out.loss == 0
    assert out.step_losses.tolist() == [0, 0, 0]
    assert all(not gradient.any() for gradient in gradients(out, problem))


def test_stacked_passes_beyond_the_end_contribute_nothing() -> None:
    out = hand_sized(n_grams=7, layout="stacked", discount=1)
    assert out.step_losses[4:].tolist() == [0, 0, 0]
    four = hand_sized(n_grams=4, layout="stacked", discount=1)
    torch.testing.assert_close(out.loss, four.loss, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("layout", ["prepend_start", "stacked"])
@pytest.mark.parametrize("approximation", ["hidden", "expectation"])
def test_padding_at_the_end_does_not_count(approximation: str, layout: str) -> None:
    problem = random_problem()
    options = {"approximation": approximation, "layout": layout, "n_grams": 3}
    padded = dict(problem)
    padded["tokens"] = torch.cat([problem["tokens"], torch.tensor([[3, 1], [0, 5]])], 1)
    targets = padded["tokens"][:, 1:].clone()
    targets[:, -2:] = -100
    one, two = solve(padded, targets=targets, **options), solve(problem, **options)
    torch.testing.assert_close(one.step_losses, two.step_losses, rtol=ROUNDING, atol=0)
    for a, b in zip(gradients(one, padded), gradients(two, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    out = hand_sized(n_grams=2, label_smoothing=0.1, ignore_index=2)
    for step, hidden in enumerate(out.hidden):
        expected = cross_entropy(head(hidden)[0], TARGETS[0], label_smoothing=0.1, ignore_index=2)
        torch.testing.assert_close(out.step_losses[step], expected, rtol=ROUNDING, atol=0)


def test_an_empty_batch_and_a_single_token() -> None:
    problem = random_problem()
    empty = {**problem, "tokens": problem["tokens"][:0]}
    out = solve(empty, n_grams=3)
    assert out.loss == 0
    assert out.logits.shape == (0, 5, 7)
    single = {**problem, "tokens": problem["tokens"][:, :2]}
    out = solve(single, n_grams=3)
    assert out.step_losses[0] == out.step_losses[1] == out.step_losses[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximation", ["hidden", *LOOKED_UP])
def test_half_precision_is_kept_and_its_loss_is_single(
    dtype: torch.dtype, approximation: str
) -> None:
    options = {"approximation": approximation, "top_k": 2, "temperature": 1e-3}
    out = teaforn_loss(
        body, head, EMBEDDING[INPUTS].to(dtype), TARGETS, embedding=EMBEDDING.to(dtype), **options
    )
    assert {h.dtype for h in out.hidden} == {out.logits.dtype} == {dtype}
    assert out.loss.dtype == torch.float32
    if approximation != "gumbel":
        full = hand_sized(**options)
        # Some ten roundings of values up to 1, in the precision of the type.
        torch.testing.assert_close(
            out.loss.double(), full.loss, rtol=0, atol=10 * torch.finfo(dtype).eps
        )


def test_the_loss_is_single_under_autocast_and_inputs_keep_their_type() -> None:
    torch.manual_seed(0)
    linear, head_, table = nn.Linear(4, 4), nn.Linear(4, 9), nn.Embedding(9, 4)
    seen = []

    def decode(embeddings: Tensor) -> Tensor:
        seen.append(embeddings.dtype)
        return linear(embeddings)

    tokens = torch.randint(9, (2, 6))
    for approximation in ("hidden", *LOOKED_UP):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = teaforn_loss(
                decode, head_, table(tokens[:, :-1]), tokens[:, 1:], embedding=table,
                approximation=approximation,
            )  # fmt: skip
        assert out.logits.dtype == torch.bfloat16
        assert out.loss.dtype == out.step_losses.dtype == torch.float32
        out.loss.backward()
    assert set(seen) == {torch.float32}


def test_gumbel_noise_comes_from_the_generator_alone() -> None:
    def loss(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return hand_sized(approximation="gumbel", generator=generator).loss

    before = torch.get_rng_state()
    assert loss(0) == loss(0) != loss(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_our_transformer_takes_part() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=11, dim=8, num_layers=2, num_heads=2))
    tokens = torch.randint(11, (3, 7))
    out = teaforn_loss(
        lambda e: model(inputs_embeds=e, return_hidden=True),
        lambda h: h @ model.token_embeddings.weight.T,
        model.token_embeddings(tokens[:, :-1]),
        tokens[:, 1:],
        n_grams=3,
    )
    torch.testing.assert_close(out.logits, model(tokens[:, :-1]))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


LLAMA = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
}
TINY = {
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gemma": LLAMA,
    "gemma3_text": LLAMA,
    "gpt_neox": LLAMA,
    "opt": {**LLAMA, "ffn_dim": 16, "word_embed_proj_dim": 4},
    "bloom": {"hidden_size": 8, "n_layer": 2, "n_head": 2},
}


def tiny_model(kind: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    ends = {"vocab_size": 13, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **ends, **settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", TINY)
def test_parts_of_a_hugging_face_model_give_its_own_logits(kind: str) -> None:
    model = tiny_model(kind, **TINY[kind])
    decoder, projection, embedding = causal_lm_parts(model)
    tokens = torch.randint(13, (2, 7))
    out = teaforn_loss(decoder, projection, embedding(tokens[:, :-1]), tokens[:, 1:], n_grams=2)
    theirs = model(tokens[:, :-1])
    torch.testing.assert_close(out.logits, theirs.logits)
    expected = cross_entropy(theirs.logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.step_losses[0], expected.detach())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "settings", "finish"),
    [
        ("gemma2", {"final_logit_softcapping": 0.1}, lambda z: 0.1 * torch.tanh(z / 0.1)),
        ("cohere", {"logit_scale": 0.5}, lambda z: 0.5 * z),
        ("granite", {"logits_scaling": 4.0}, lambda z: z / 4),
    ],
)
def test_models_that_change_their_logits_need_the_change_around_the_projection(
    kind: str, settings: dict[str, Any], finish: Callable[[Tensor], Tensor]
) -> None:
    model = tiny_model(kind, **LLAMA, **settings)
    decoder, projection, embedding = causal_lm_parts(model)
    tokens = torch.randint(13, (2, 6))
    out = teaforn_loss(decoder, lambda h: finish(projection(h)), embedding(tokens), tokens)
    torch.testing.assert_close(out.logits, model(tokens).logits)


def test_looked_up_embeddings_of_a_model_that_scales_them() -> None:
    """Gemma 3 multiplies by the root of its width when it looks a token up."""
    model = tiny_model("gemma3_text", **LLAMA)
    decoder, projection, embedding = causal_lm_parts(model)
    tokens = torch.randint(13, (2, 6))
    out = teaforn_loss(
        decoder, projection, embedding(tokens), tokens, embedding=embedding, approximation="hard",
        embedding_scale=8**0.5,
    )  # fmt: skip
    fed = torch.cat([tokens[:, :1], out.logits.argmax(-1)[:, :-1]], 1)
    torch.testing.assert_close(out.hidden[1], decoder(embedding(fed)))


def test_parts_call_the_base_model_with_what_it_takes() -> None:
    class Base(nn.Module):
        def forward(self, inputs_embeds: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=body(inputs_embeds))

    table, head_ = nn.Embedding(3, 2), nn.Linear(2, 3)
    model = SimpleNamespace(
        base_model=Base(),
        get_input_embeddings=lambda: table,
        get_output_embeddings=lambda: head_,
    )
    decoder, projection, embedding = causal_lm_parts(model)
    assert projection is head_
    assert embedding is table
    assert torch.equal(decoder(table(INPUTS)), body(table(INPUTS)))


@pytest.mark.bad_input
def test_models_without_the_parts_are_refused() -> None:
    class Base(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    whole = {
        "base_model": lambda inputs_embeds: inputs_embeds,
        "get_input_embeddings": lambda: nn.Embedding(3, 2),
        "get_output_embeddings": lambda: nn.Linear(2, 3),
    }
    for name in whole:
        parts = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(TypeError, match=name):
            causal_lm_parts(SimpleNamespace(**parts))
    with pytest.raises(TypeError, match="get_output_embeddings"):
        causal_lm_parts(SimpleNamespace(**{**whole, "get_output_embeddings": lambda: None}))
    with pytest.raises(TypeError, match="inputs_embeds"):
        causal_lm_parts(SimpleNamespace(**{**whole, "base_model": Base()}))
    decoder, _, _ = causal_lm_parts(SimpleNamespace(**whole))
    with pytest.raises(TypeError, match="last_hidden_state"):
        decoder(torch.zeros(1, 2, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_grams": 0}, "n_grams.*0"),
        ({"n_grams": 2.5}, r"n_grams.*2\.5"),
        ({"n_grams": True}, "n_grams.*True"),
        ({"discount": -0.1}, r"discount.*-0\.1"),
        ({"discount": 1.5}, r"discount.*1\.5"),
        ({"discount": float("nan")}, "discount.*nan"),
        ({"discount": [1.0]}, "discount.*2 weights.*1"),
        ({"discount": [1.0, -1.0]}, r"discount.*-1\.0"),
        ({"approximation": "soft"}, "approximation.*soft"),
        ({"layout": "diagonal"}, "layout.*diagonal"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"temperature": -1.0}, r"temperature.*-1\.0"),
        ({"embedding_scale": float("inf")}, "embedding_scale.*inf"),
        ({"label_smoothing": 1.5}, r"label_smoothing.*1\.5"),
        ({"approximation": "top_k", "top_k": 0}, "top_k.*0"),
        ({"approximation": "top_k", "top_k": 4}, "top_k.*3.*4"),
        ({"approximation": "expectation", "embedding": None}, "expectation.*embedding"),
        ({"approximation": "hard", "embedding": EMBEDDING[0]}, r"embedding.*\(2,\)"),
        ({"approximation": "hard", "embedding": EMBEDDING[:2]}, "3 and 2"),
        ({"approximation": "hard", "embedding": EMBEDDING[:, :1]}, "another approximation.*proj"),
        ({"embeddings": EMBEDDING}, r"embeddings.*\(3, 2\)"),
        ({"targets": TARGETS[:, :3]}, r"targets.*\(1, 3\)"),
        ({"targets": TARGETS[0]}, r"targets.*\(4,\)"),
        ({"decoder": lambda e: e[:, 1:]}, r"decoder.*\(1, 4, features\).*\(1, 3, 2\)"),
        ({"decoder": lambda e: (e, e)}, r"decoder.*\(1, 4, features\).*tuple"),
        ({"decoder": [body]}, "decoder.*2.*1"),
        ({"output_projection": lambda h: h[0]}, r"output_projection.*\(4, 2\)"),
        (
            {"decoder": lambda e: torch.cat([e, e], -1), "output_projection": lambda h: h},
            "4 features.*2.*another approximation.*projection",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    usual = {
        "decoder": body,
        "output_projection": head,
        "embeddings": EMBEDDING[INPUTS],
        "targets": TARGETS,
        "embedding": EMBEDDING,
    }
    with pytest.raises(ValueError, match=message):
        teaforn_loss(**{**usual, **options})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options",
    [
        {"targets": TARGETS.double()},
        {"embeddings": INPUTS},
        {"decoder": None},
        {"embedding": "table"},
        {"discount": "much"},
        {"discount": None},
    ],
)
def test_what_is_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    usual = {
        "decoder": body,
        "output_projection": head,
        "embeddings": EMBEDDING[INPUTS],
        "targets": TARGETS,
    }
    with pytest.raises(TypeError):
        teaforn_loss(**{**usual, **options})


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    """In a process of its own, where no shape checks stand in the way of the graph."""
    program = """
import torch
from torch import nn
from kexue.training.teaforn import teaforn_loss

torch.manual_seed(0)
body, head, table = nn.Linear(4, 4), nn.Linear(4, 9), nn.Embedding(9, 4)
tokens = torch.randint(9, (2, 6))

def loss(tokens, **options):
    return teaforn_loss(
        lambda e: torch.tanh(body(e).cumsum(1)), head, table(tokens[:, :-1]), tokens[:, 1:],
        embedding=table, n_grams=3, **options,
    )

for options in [
    {"approximation": "hidden", "activation_checkpointing": True},
    {"approximation": "expectation", "layout": "stacked"},
    {"approximation": "top_k", "discount": [1.0, 0.0, 0.3]},
    {"approximation": "hard", "backpropagate_through_steps": False},
    {"approximation": "gumbel", "temperature": 0.5},
]:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    one = compiled(tokens, **options)
    torch.manual_seed(1)
    two = loss(tokens, **options)
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.hidden, two.hidden)
    of = list(body.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(one.loss, of), torch.autograd.grad(two.loss, of)
    )
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("layout", ["prepend_start", "stacked"])
def test_targets_may_be_bytes(layout: str) -> None:
    problem = random_problem()
    options: dict[str, Any] = {"layout": layout, "n_grams": 3}
    expected = solve(problem, **options)
    found = solve(problem, targets=problem["tokens"][:, 1:].to(torch.uint8), **options)
    assert torch.equal(found.loss, expected.loss)
