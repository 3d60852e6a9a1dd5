"""Oracles, identities and refusals of kexue.losses.policy_gradient."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.losses import (
    PolicyGradientLoss,
    end_mask,
    expected_reward,
    optimal_baseline,
    policy_gradient_loss,
    sample_actions,
    sentence_bleu,
    sequence_log_probability,
    token_accuracy,
    token_f1,
)

LOGITS = torch.tensor([0.1, 1.2, -0.5, 0.3], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2], dtype=torch.float64)
# The oracles are printed with twelve digits.
DIGITS = 1e-12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def each_gradient(baseline: float) -> tuple[Tensor, Tensor]:
    """Probability of each output, and the one-sample gradient in the logits that it would give."""
    p = LOGITS.softmax(-1)
    return p, (REWARDS - baseline)[:, None] * (torch.eye(4, dtype=torch.float64) - p)


def total_variance(baseline: float) -> float:
    p, gradients = each_gradient(baseline)
    mean = p @ gradients
    return float(p @ (gradients - mean).square().sum(-1))


def test_expected_reward_and_its_gradient_match_the_oracle() -> None:
    logits = LOGITS.clone().requires_grad_()
    value = expected_reward(logits, REWARDS)
    value.backward()
    assert value.item() == pytest.approx(0.610083184426, abs=DIGITS)
    oracle = [-0.105653445087, 0.202857235699, -0.010462582680, -0.086741207932]
    np.testing.assert_allclose(logits.grad, oracle, atol=DIGITS)


def test_optimal_baseline_matches_the_oracle_and_minimises_the_variance() -> None:
    best = optimal_baseline(LOGITS, REWARDS).item()
    assert best == pytest.approx(0.399728085045, abs=DIGITS)
    assert total_variance(0.0) == pytest.approx(0.138916917799, abs=DIGITS)
    assert total_variance(0.610083184426) == pytest.approx(0.064332471430, abs=DIGITS)
    assert total_variance(best) == pytest.approx(0.035766613080, abs=DIGITS)
    assert total_variance(best) < min(total_variance(best + step) for step in (-1e-4, 1e-4))


def test_no_baseline_moves_the_mean_of_the_gradient() -> None:
    means = [p @ g for p, g in (each_gradient(b) for b in (0.0, 0.4, -3.0))]
    # Sums of four products of size three: a few units in the last place.
    torch.testing.assert_close(means[0], means[1], atol=1e-15, rtol=0)
    torch.testing.assert_close(means[0], means[2], atol=1e-14, rtol=0)


def test_optimal_baseline_near_certainty_is_the_mean_of_the_other_rewards() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    certain = torch.tensor([800.0, 0.0, 0.0], dtype=torch.float64)
    assert optimal_baseline(certain, rewards).item() == 1.0
    # With a rest of d, b* = (sum over the others of p r / d) + O(d); d = 2 exp(-20) = 4e-9.
    nearly = torch.tensor([20.0, 0.0, 0.0], dtype=torch.float64)
    assert optimal_baseline(nearly, rewards).item() == pytest.approx(4.0, abs=1e-7)


def test_temperature_may_differ_from_row_to_row() -> None:
    logits, rewards = LOGITS.expand(2, 4), REWARDS.expand(2, 4)
    temperature = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    together = expected_reward(logits, rewards, temperature=temperature)
    alone = [expected_reward(LOGITS, REWARDS, temperature=t).item() for t in (0.5, 2.0)]
    assert together.tolist() == alone


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "optimal", "self_critical"])
def test_loss_has_minus_the_policy_gradient_as_mean_over_all_pairs_of_samples(
    baseline: str,
) -> None:
    # All sixteen pairs of outputs with their probabilities: no randomness, rounding only.
    p = LOGITS.softmax(-1)
    total = torch.zeros(4, dtype=torch.float64)
    for pair in itertools.product(range(4), repeat=2):
        logits = LOGITS.clone().requires_grad_()
        actions = torch.tensor(pair)[:, None, None]
        log_probability = sequence_log_probability(logits[None, None], actions)
        kind = optimal_baseline(LOGITS, REWARDS) if baseline == "optimal" else baseline
        greedy = REWARDS[LOGITS.argmax()][None] if baseline == "self_critical" else None
        policy_gradient_loss(
            log_probability, REWARDS[actions[..., 0]], baseline=kind, greedy_rewards=greedy
        ).backward()
        total += p[list(pair)].prod() * logits.grad
    logits = LOGITS.clone().requires_grad_()
    expected_reward(logits, REWARDS).backward()
    torch.testing.assert_close(-total, logits.grad, atol=1e-15, rtol=1e-13)


def test_leave_one_out_does_not_shrink() -> None:
    log_probability = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0], [0.0]])
    policy_gradient_loss(log_probability, rewards, reduction="sum").backward()
    # With the own reward in the mean these would be 1/2.
    assert log_probability.grad.flatten().tolist() == [-1.0, 1.0]


def test_normalised_advantages_do_not_know_the_unit_of_the_reward() -> None:
    log_probability = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    rewards = torch.rand(4, 3, generator=seeded(1), dtype=torch.float64)
    one, two = (
        policy_gradient_loss(
            log_probability, unit * rewards, normalize_advantages=True, reduction="none"
        )
        for unit in (1.0, 1000.0)
    )
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        (one / log_probability).square().mean(), torch.ones((), dtype=torch.float64)
    )


def test_equal_rewards_leave_nothing_to_learn() -> None:
    log_probability = torch.randn(3, 2, generator=seeded())
    loss = policy_gradient_loss(log_probability, torch.ones(3, 2), normalize_advantages=True)
    assert loss.item() == 0.0


def test_reductions_belong_together() -> None:
    log_probability = torch.randn(3, 2, generator=seeded(), dtype=torch.float64)
    rewards = torch.rand(3, 2, generator=seeded(1))
    each, mean, total = (
        policy_gradient_loss(log_probability, rewards, reduction=kind)
        for kind in ("none", "mean", "sum")
    )
    assert each.shape == (3, 2)
    assert mean.item() == pytest.approx(each.mean().item(), rel=1e-14)
    assert total.item() == pytest.approx(each.sum().item(), rel=1e-14)


def test_rewards_carry_no_gradient() -> None:
    rewards = torch.rand(3, 2, requires_grad=True)
    log_probability = torch.randn(3, 2, requires_grad=True)
    policy_gradient_loss(log_probability, rewards).backward()
    expected_reward(torch.randn(3, 2, requires_grad=True), rewards).sum().backward()
    assert rewards.grad is None


def test_samples_follow_the_softmax() -> None:
    count = 20_000
    actions = sample_actions(LOGITS.expand(5, 4), samples=count, generator=seeded())
    p = LOGITS.softmax(-1)
    shares = torch.stack([(actions == y).double().mean(0) for y in range(4)], -1)
    # Twenty shares, each within four and a half standard errors.
    assert bool(((shares - p).abs() < 4.5 * (p * (1 - p) / count).sqrt()).all())
    assert actions.shape == (count, 5)
    assert actions.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_samples_in_half_precision_never_are_forbidden_ones(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 0.0, -torch.inf]], dtype=dtype)
    actions = sample_actions(logits, samples=500, generator=seeded())
    assert set(actions[:, 0].tolist()) == {0, 2}
    assert set(actions[:, 1].tolist()) == {1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 300, 7, generator=seeded()).to(dtype).requires_grad_()
    actions = torch.randint(0, 7, (2, 300), generator=seeded(1))
    value = sequence_log_probability(logits, actions)
    exact = sequence_log_probability(logits.double(), actions)
    assert value.dtype == torch.float32
    # 300 terms of size two, each and each partial sum rounded by half a unit.
    torch.testing.assert_close(value.double(), exact, rtol=300 * 1.2e-7, atol=0)
    value.sum().backward()
    assert logits.grad.dtype == dtype


def test_end_mask_includes_the_first_end_and_nothing_after() -> None:
    actions = torch.tensor([[2, 0, 5, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert end_mask(actions, 0).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, True],
    ]


def test_end_token_is_trained_and_what_follows_is_not() -> None:
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    actions = torch.tensor([[[1, 0, 2, 2]]])
    sequence_log_probability(logits, actions, mask=end_mask(actions, 0)).sum().backward()
    changed = (logits.grad != 0).any(-1)[0]
    assert changed.tolist() == [True, True, False, False]


def test_sequence_log_probability_is_that_of_the_product() -> None:
    logits = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64)
    actions = torch.randint(0, 4, (5, 2, 3), generator=seeded(1))
    p = logits.softmax(-1)
    by_hand = torch.tensor(
        [
            [math.prod(p[b, t, actions[s, b, t]].item() for t in range(3)) for b in range(2)]
            for s in range(5)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(sequence_log_probability(logits, actions).exp(), by_hand)
    # One sample with logits of its own, as an autoregressive decoder has them.
    own = sequence_log_probability(logits.expand(5, 2, 3, 4), actions)
    torch.testing.assert_close(own.exp(), by_hand)


@pytest.mark.parametrize("poison", [-torch.inf, torch.nan, torch.inf])
def test_nothing_after_the_end_reaches_value_or_gradient(poison: float) -> None:
    logits = torch.randn(2, 4, 3, generator=seeded(), dtype=torch.float64)
    actions = torch.tensor([[1, 0, 2, 1], [2, 2, 0, -100]])
    mask = end_mask(actions, 0)
    broken = torch.where(mask[..., None], logits, poison).requires_grad_()
    clean = logits.clone().requires_grad_()
    values = [sequence_log_probability(x, actions, mask=mask) for x in (broken, clean)]
    for value in values:
        value.sum().backward()
    assert torch.equal(values[0], values[1])
    assert torch.equal(broken.grad, clean.grad)


def test_forbidden_tokens_give_finite_gradients_elsewhere() -> None:
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]], dtype=torch.float64, requires_grad=True)
    sequence_log_probability(logits, torch.tensor([[1]])).sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_gradients_pass_gradcheck() -> None:
    logits = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, 4, (2, 2, 3), generator=seeded(1))
    rewards = torch.rand(2, 2, generator=seeded(2))

    def loss(x: Tensor) -> Tensor:
        log_probability = sequence_log_probability(x, actions, mask=end_mask(actions, 0))
        return policy_gradient_loss(log_probability, rewards)

    assert torch.autograd.gradcheck(loss, logits)


def test_module_learns_to_copy_and_to_stop() -> None:
    # Length 3 with an end token 0: rewards alone have to raise the probability of stopping.
    targets = torch.tensor([[1, 2, 0], [3, 0, 0]])
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    reward = partial(token_f1, end_token=0)
    loss = PolicyGradientLoss(reward, samples=16, end_token=0)
    for step in range(150):
        optimizer.zero_grad()
        loss(logits, targets, generator=seeded(step)).backward()
        optimizer.step()
    assert reward(logits.argmax(-1), targets).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "self_critical"])
def test_module_is_the_functions_in_a_row(baseline: str) -> None:
    logits = torch.randn(3, 4, 5, generator=seeded())
    targets = torch.randint(0, 5, (3, 4), generator=seeded(1))
    loss = PolicyGradientLoss(token_accuracy, samples=3, baseline=baseline, end_token=2)
    actions = sample_actions(logits, samples=3, generator=seeded(7))
    by_hand = policy_gradient_loss(
        sequence_log_probability(logits, actions, mask=end_mask(actions, 2)),
        token_accuracy(actions, targets),
        baseline=baseline,
        greedy_rewards=token_accuracy(logits.argmax(-1), targets),
    )
    assert loss(logits, targets, generator=seeded(7)).item() == by_hand.item()


def test_metrics_match_the_oracle() -> None:
    one, two = torch.tensor([[[1, 2, 3, 4, 5, 6]]]), torch.tensor([[1, 2, 3, 5, 4, 6]])
    assert sentence_bleu(one, two).item() == pytest.approx(0.472870804502, abs=DIGITS)
    assert sentence_bleu(one, two, smoothing="none").item() == 0.0
    assert token_f1(one, two).item() == 1.0
    assert token_accuracy(one, two).item() == pytest.approx(2 / 3, abs=1e-15)
    assert sentence_bleu(one, two).dtype == torch.float64


def bleu_by_counting(
    candidate: list[int], reference: list[int], order: int, smoothing: str
) -> float:
    """The definition, with multisets of n-grams."""
    if not candidate:
        return 0.0
    product = 1.0
    for n in range(1, order + 1):
        grams, known = (
            Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1))
            for s in (candidate, reference)
        )
        extra = 1 if smoothing == "add_one" and n > 1 else 0
        matches, possible = (grams & known).total() + extra, grams.total() + extra
        product *= matches / possible if possible else 0.0
    return min(1.0, math.exp(1 - len(reference) / len(candidate))) * product ** (1 / order)


SENTENCES = st.lists(st.integers(0, 4), min_size=0, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    candidate=SENTENCES,
    reference=SENTENCES,
    order=st.integers(1, 5),
    smoothing=st.sampled_from(["none", "add_one"]),
)
def test_metrics_equal_counting_multisets(
    candidate: list[int], reference: list[int], order: int, smoothing: str
) -> None:
    one = torch.tensor(candidate, dtype=torch.int64)
    two = torch.tensor(reference, dtype=torch.int64)
    bleu = sentence_bleu(one, two, max_order=order, smoothing=smoothing).item()
    assert bleu == pytest.approx(
        bleu_by_counting(candidate, reference, order, smoothing), abs=1e-14
    )
    overlap = (Counter(candidate) & Counter(reference)).total()
    total = len(candidate) + len(reference)
    assert token_f1(one, two).item() == (2 * overlap / total if total else 1.0)


def test_sequences_are_cut_before_the_end_and_padding_is_dropped() -> None:
    candidate = torch.tensor([[9, 1, 9, 2, 0, 3, 3]])
    reference = torch.tensor([[1, 2, 9, 9, 9]])
    assert token_f1(candidate, reference, end_token=0, padding=9).item() == 1.0
    # Padding between tokens is no token: 1 and 2 are a common bigram.
    assert sentence_bleu(candidate, reference, end_token=0, padding=9, max_order=2).item() == 1.0
    empty = torch.tensor([[0, 1, 2, 3, 4, 5, 6]])
    assert token_f1(empty, torch.tensor([[9, 9]]), end_token=0, padding=9).item() == 1.0
    assert sentence_bleu(empty, torch.tensor([[9, 9]]), end_token=0, padding=9).item() == 0.0


def test_metrics_of_many_sentences_are_those_of_each() -> None:
    actions = torch.randint(0, 6, (3, 40, 12), generator=seeded())
    targets = torch.randint(0, 6, (40, 10), generator=seeded(1))
    for metric in (token_f1, sentence_bleu):
        together = metric(actions, targets, end_token=5, padding=4)
        assert together.shape == (3, 40)
        alone = torch.stack(
            [metric(actions[:, i], targets[i], end_token=5, padding=4) for i in range(40)], 1
        )
        assert torch.equal(together, alone)


def test_long_batches_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from kexue.losses.policy_gradient import metrics

    actions = torch.randint(0, 6, (2, 7, 12), generator=seeded())
    targets = torch.randint(0, 6, (7, 9), generator=seeded(1))
    whole = sentence_bleu(actions, targets)
    monkeypatch.setattr(metrics, "_BLOCK", 3 * 12 * 21)
    assert torch.equal(sentence_bleu(actions, targets), whole)


def test_bleu_agrees_with_nltk() -> None:
    translate = pytest.importorskip("nltk.translate.bleu_score")
    smooth = translate.SmoothingFunction().method2
    rng = np.random.default_rng(0)
    for _ in range(50):
        candidate = rng.integers(0, 5, rng.integers(4, 12)).tolist()
        reference = rng.integers(0, 5, rng.integers(4, 12)).tolist()
        theirs = translate.sentence_bleu([reference], candidate, smoothing_function=smooth)
        ours = sentence_bleu(torch.tensor(candidate), torch.tensor(reference)).item()
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_bleu_agrees_with_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    metric = sacrebleu.BLEU(smooth_method="add-k", smooth_value=1, effective_order=False)
    candidate, reference = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 5, 4, 6, 7, 8]
    score = metric.sentence_score(" ".join(map(str, candidate)), [" ".join(map(str, reference))])
    ours = sentence_bleu(torch.tensor(candidate), torch.tensor(reference))
    assert ours.item() == pytest.approx(score.score / 100, abs=1e-12)


def test_accuracy_counts_what_the_mask_leaves() -> None:
    actions, targets = torch.tensor([[[1, 2, 3], [0, 0, 0]]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert token_accuracy(actions, targets, mask=mask).tolist() == [[0.5, 1.0]]
    assert token_accuracy(actions, targets, mask=mask[None]).tolist() == [[0.5, 1.0]]


@pytest.mark.bad_input
def test_refusals() -> None:
    log_probability, rewards = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="shape"):
        policy_gradient_loss(log_probability, torch.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        expected_reward(log_probability, torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        policy_gradient_loss(log_probability, rewards / 0)
    with pytest.raises(ValueError, match="greedy_rewards"):
        policy_gradient_loss(log_probability, rewards, baseline="self_critical")
    with pytest.raises(ValueError, match="leave_one_out"):
        policy_gradient_loss(log_probability[:1], rewards[:1])
    with pytest.raises(ValueError, match="leave_one_out"):
        PolicyGradientLoss(token_f1, samples=1)
    with pytest.raises(ValueError, match="baseline"):
        policy_gradient_loss(log_probability, rewards, baseline="mean")
    with pytest.raises(ValueError, match="shape"):
        policy_gradient_loss(log_probability, rewards, baseline=torch.zeros(2))
    with pytest.raises(ValueError, match="reduction"):
        policy_gradient_loss(log_probability, rewards, reduction="median")
    with pytest.raises(ValueError, match="samples"):
        sample_actions(log_probability, samples=0)
    with pytest.raises(ValueError, match="smoothing"):
        sentence_bleu(torch.tensor([1]), torch.tensor([1]), smoothing="floor")
    with pytest.raises(ValueError, match="temperature"):
        expected_reward(LOGITS, REWARDS, temperature=0.0)
    with pytest.raises(ValueError, match="shape"):
        PolicyGradientLoss(lambda a, t: torch.zeros(3))(
            torch.zeros(1, 2, 3), torch.zeros(1, 2).long()
        )


@pytest.mark.bad_input
def test_float_actions_are_refused() -> None:
    floats, tokens = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)
    for call in (
        lambda: end_mask(floats, 0),
        lambda: sequence_log_probability(torch.zeros(2, 3, 4), floats),
        lambda: token_accuracy(floats, tokens),
        lambda: token_f1(tokens, floats),
        lambda: sentence_bleu(floats, tokens),
    ):
        with pytest.raises(TypeError, match="integers"):
            call()
    with pytest.raises(ValueError, match="actions must be in 0"):
        sequence_log_probability(torch.zeros(2, 3, 1), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_small_temperature_leaves_the_best_output(dtype: torch.dtype) -> None:
    logits, rewards = torch.tensor([100.0, 99.0, -100.0]).to(dtype), torch.tensor([1.0, 0.0, 0.0])
    for temperature in (1e-3, 1e-38):
        assert expected_reward(logits, rewards, temperature=temperature).item() == 1.0
    near = expected_reward(logits, rewards, temperature=0.3).item()
    assert near == pytest.approx(1 / (1 + math.exp(-1 / 0.3)), rel=1e-6)


def test_what_is_forbidden_has_no_part_in_the_gradient_of_the_temperature() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0])

    def gradient(logits: list[float], rewards: Tensor) -> float:
        temperature = torch.tensor(0.5, requires_grad=True)
        expected_reward(torch.tensor(logits), rewards, temperature=temperature).backward()
        assert temperature.grad is not None
        return temperature.grad.item()

    assert gradient([1.0, -math.inf, 0.0], rewards) == gradient([1.0, 0.0], rewards[[0, 2]])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_a_positive_number(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        expected_reward(torch.zeros(2), torch.ones(2), temperature=temperature)


def test_an_impossible_sequence_without_an_advantage_counts_for_nothing() -> None:
    log_probability = torch.tensor([[-1.0], [-math.inf]], requires_grad=True)
    loss = policy_gradient_loss(log_probability, torch.ones(2, 1))
    loss.backward()
    assert loss.item() == 0
    assert log_probability.grad is not None
    assert log_probability.grad.tolist() == [[0.0], [0.0]]
    assert policy_gradient_loss(
        log_probability, torch.tensor([[1.0], [0.0]]), baseline="none"
    ).item() == pytest.approx(0.5)
