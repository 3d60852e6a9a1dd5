"""Tests of kexue.models.roformer: schedules, the multi-task trainer, and all parts together."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from kexue.models.roformer import (
    MaskedLanguageModelCollator,
    MultiTaskTrainer,
    PiecewiseLinearLR,
    ResidualWarmup,
    RoFormerV2Config,
    RoFormerV2ForMaskedLM,
    RoFormerV2ForSequenceClassification,
    RoFormerV2Model,
    RoFormerV2Tokenizer,
    Task,
)

CONFIG = RoFormerV2Config(
    30, 16, 2, 4, 24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_rates():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.76e-3)
    published = {32000: 1, 320000: 0.5, 1280000: 0.1, 2560000: 0.01}
    scheduler = PiecewiseLinearLR(optimizer, published)
    halfway = {0: 0.0, 16000: 0.5, 32000: 1.0, 176000: 0.75, 320000: 0.5, 800000: 0.3,
               2560000: 0.01, 10**7: 0.01}  # fmt: skip
    for step, factor in halfway.items():
        scheduler.last_epoch = step
        assert scheduler.get_lr()[0] == pytest.approx(1.76e-3 * factor, rel=1e-12)


def test_rate_follows_the_optimiser_for_each_group_and_survives_a_checkpoint():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 4.0}], 2.0)
    scheduler = PiecewiseLinearLR(optimizer, {4: 1.0, 2: 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.5, 3.0]
    saved = scheduler.state_dict()
    again = PiecewiseLinearLR(optimizer, {2: 0.5, 4: 1.0})
    again.load_state_dict(saved)
    again.step()
    assert again.get_last_lr() == [2.0, 4.0]


def test_a_milestone_at_step_zero_is_where_the_rate_begins():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    assert PiecewiseLinearLR(optimizer, {0: 0.5, 2: 1.0}).get_last_lr() == [1.0]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("milestones", "words"),
    [
        ({}, "at least one step"),
        ({-1: 1.0}, "integers from 0, got -1"),
        ({1.5: 1.0}, "integers from 0, got 1.5"),
        ({1: -1.0}, "not negative, got -1"),
        ({1: math.inf}, "finite.*inf"),
    ],
)
def test_milestones_are_checked(milestones, words):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with pytest.raises(ValueError, match=words):
        PiecewiseLinearLR(optimizer, milestones)


def test_warmup_reaches_models_with_heads_and_survives_a_checkpoint():
    model = RoFormerV2ForMaskedLM(CONFIG)
    warmup = ResidualWarmup(model, 10)
    for _ in range(3):
        warmup.step()
    assert model.roformer.residual_scale == 0.3
    other = RoFormerV2Model(CONFIG)
    resumed = ResidualWarmup(other, 5)
    resumed.load_state_dict(warmup.state_dict())
    assert other.residual_scale == 0.3
    for _ in range(9):
        resumed.step()
    assert other.residual_scale == 1.0


@pytest.mark.bad_input
def test_warmup_is_checked():
    with pytest.raises(ValueError, match="warmup_steps must be at least 1, got 0"):
        ResidualWarmup(RoFormerV2Model(CONFIG), 0)
    with pytest.raises(TypeError, match="residual_scale, got a Linear"):
        ResidualWarmup(nn.Linear(2, 2), 5)


class Shared(nn.Module):
    """An encoder of two numbers, whose gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def linear_task(shared: Shared, name: str, gradient: list[float], weight: float = 1.0) -> Task:
    direction = torch.tensor(gradient, dtype=torch.float64)
    return Task(name, [0], lambda batch: shared.w @ direction, weight)


def test_update_is_the_mean_of_gradients_of_length_one():
    shared = Shared()
    tasks = [linear_task(shared, "a", [3.0, 4.0]), linear_task(shared, "b", [0.0, 1000.0])]
    optimizer = torch.optim.SGD(shared.parameters(), lr=1.0)
    k = 7
    trainer = MultiTaskTrainer(
        shared, tasks, optimizer, gradient_accumulation_steps=k, generator=source()
    )
    history = trainer.train(1)
    share = history.task.count("a") / k
    assert 0 < share < 1
    expected = [-0.6 * share, -(0.8 * share + 1 - share)]
    assert shared.w.tolist() == pytest.approx(expected, rel=1e-14)
    assert set(history.gradient_norm) == {5.0, 1000.0}


def test_update_of_two_tasks_never_points_against_either():
    generator = source(3)
    for _ in range(50):
        shared = Shared()
        gradients = [torch.randn(2, generator=generator).tolist() for _ in range(2)]
        u = torch.zeros(2, dtype=torch.float64)
        for name, gradient in zip("ab", gradients, strict=True):
            shared.w.data.zero_()
            task = linear_task(shared, name, gradient)
            optimizer = torch.optim.SGD(shared.parameters(), lr=0.5)
            MultiTaskTrainer(shared, [task], optimizer).train(1)
            u -= shared.w.detach()
        for gradient in gradients:
            assert u @ torch.tensor(gradient, dtype=torch.float64) >= -1e-12


def test_heads_move_by_the_encoders_norm_and_do_not_count_in_it():
    shared, head = Shared(), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    direction = torch.tensor([3.0, 4.0], dtype=torch.float64)
    task = Task("a", [0], lambda batch: shared.w @ direction + 100 * head.sum())
    optimizer = torch.optim.SGD([*shared.parameters(), head], lr=1.0)
    history = MultiTaskTrainer(shared, [task], optimizer, gradient_accumulation_steps=2).train(1)
    assert history.gradient_norm == (5.0, 5.0)
    assert shared.w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-14)
    assert head.item() == pytest.approx(-20.0, rel=1e-14)


def test_without_normalisation_it_is_plain_gradient_accumulation():
    shared = Shared()
    optimizer = torch.optim.SGD(shared.parameters(), lr=1.0)
    MultiTaskTrainer(
        shared,
        [linear_task(shared, "a", [3.0, 4.0])],
        optimizer,
        gradient_accumulation_steps=3,
        normalize_gradients=False,
    ).train(2)
    assert shared.w.tolist() == pytest.approx([-6.0, -8.0], rel=1e-14)


def test_a_batch_without_gradient_changes_nothing():
    shared = Shared()
    task = Task("a", [0], lambda batch: (0 * shared.w).sum())
    optimizer = torch.optim.SGD(shared.parameters(), lr=1.0)
    history = MultiTaskTrainer(shared, [task], optimizer).train(1)
    assert history.gradient_norm == (0.0,)
    assert shared.w.tolist() == [0.0, 0.0]


def test_a_head_of_zeros_learns_although_it_gives_the_encoder_no_gradient():
    shared, head = Shared(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    shared.w.data.fill_(1.0)
    optimizer = torch.optim.SGD([*shared.parameters(), head], lr=1.0)
    task = Task("a", [0], lambda batch: (head @ shared.w - 1) ** 2)
    history = MultiTaskTrainer(shared, [task], optimizer).train(1)
    assert history.gradient_norm == (0.0,)
    assert head.tolist() == [2.0, 2.0]


def test_tasks_are_drawn_in_proportion_to_their_weights_and_by_the_generator():
    shared = Shared()
    tasks = [
        linear_task(shared, name, [1.0, 0.0], weight)
        for name, weight in (("words", 60.0), ("b", 2.0), ("c", 5.0), ("d", 4.0))
    ]
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.0)
    drawn = [
        MultiTaskTrainer(shared, tasks, optimizer, generator=source(seed)).train(600).task
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for name, weight in (("words", 60.0), ("b", 2.0), ("c", 5.0), ("d", 4.0)):
        p = weight / 71
        # Five standard errors of a binomial count.
        error = 5 * math.sqrt(600 * p * (1 - p))
        assert abs(drawn[0].count(name) - 600 * p) < error


def test_batches_begin_again_and_go_on_between_calls():
    shared, seen = Shared(), []

    def loss(batch):
        seen.append(batch)
        return shared.w.sum()

    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    trainer = MultiTaskTrainer(shared, [Task("a", [1, 2, 3], loss)], optimizer)
    trainer.train(2)
    trainer.train(3)
    assert seen == [1, 2, 3, 1, 2]


def test_scheduler_and_warmup_step_once_per_update():
    model = RoFormerV2ForMaskedLM(CONFIG)
    ids = torch.randint(1, 30, (2, 5), generator=source())
    task = Task("words", [ids], lambda batch: model(batch, labels=batch).loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = PiecewiseLinearLR(optimizer, {10: 1.0})
    warmup = ResidualWarmup(model, 8)
    trainer = MultiTaskTrainer(
        model.roformer,
        [task],
        optimizer,
        gradient_accumulation_steps=3,
        scheduler=scheduler,
        residual_warmup=warmup,
    )
    history = trainer.train(4)
    assert len(history.task) == len(history.loss) == len(history.gradient_norm) == 12
    assert scheduler.get_last_lr() == [pytest.approx(0.4)]
    assert model.roformer.residual_scale == 0.5
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.bad_input
def test_trainers_are_checked():
    shared = Shared()
    optimizer = torch.optim.SGD(shared.parameters(), lr=1.0)
    good = linear_task(shared, "a", [1.0, 0.0])
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight of task 'a' must be positive"):
            linear_task(shared, "a", [1.0, 0.0], weight)
    with pytest.raises(ValueError, match="at least one task"):
        MultiTaskTrainer(shared, [], optimizer)
    with pytest.raises(ValueError, match="must differ, got 'a' twice"):
        MultiTaskTrainer(shared, [good, good], optimizer)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be at least 1, got 0"):
        MultiTaskTrainer(shared, [good], optimizer, gradient_accumulation_steps=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        MultiTaskTrainer(shared, [good], optimizer).train(0)
    for batches in ([], iter([])):
        with pytest.raises(ValueError, match="must have batches"):
            MultiTaskTrainer(
                shared, [Task("e", batches, lambda b: shared.w.sum())], optimizer
            ).train(1)
    with pytest.raises(ValueError, match=r"must be a scalar tensor, got \(2,\)"):
        MultiTaskTrainer(shared, [Task("v", [0], lambda b: shared.w)], optimizer).train(1)
    nan = Task("n", [0], lambda b: shared.w.sum() * math.nan)
    with pytest.raises(FloatingPointError, match="task 'n': loss nan"):
        MultiTaskTrainer(shared, [nan], optimizer).train(1)


def test_training_is_reproducible_from_its_generators():
    def losses(seed):
        tokenizer = RoFormerV2Tokenizer.train(["a b c d e f g"] * 4, vocab_size=30)
        config = RoFormerV2Config(tokenizer.vocab_size, 8, 1, 2, 8)
        model = RoFormerV2ForMaskedLM(config, generator=source(seed)).train()
        collate = MaskedLanguageModelCollator(
            tokenizer, mask_probability=0.5, generator=source(seed)
        )
        torch.manual_seed(seed)

        def loss(texts):
            batch = collate(texts)
            return model(batch.input_ids, labels=batch.labels).loss

        tasks = [Task("one", [["a b c d e f g"]], loss), Task("two", [["g f e d c b"]], loss)]
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return MultiTaskTrainer(model.roformer, tasks, optimizer, generator=source(seed)).train(8)

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_post_norm_network_of_twelve_layers_starts_near_the_identity():
    config = RoFormerV2Config(30, 32, 12, 4, 64, "relu", 0.0, 0.0)
    encoder = RoFormerV2Model(config, generator=source())
    ResidualWarmup(encoder, 100).step()
    states = encoder(torch.tensor([[2, 5, 9, 3]]), output_hidden_states=True).hidden_states
    # A share α = 0.01 of 24 branches, each of order 1/sqrt(12).
    assert (states[-1] - states[0]).abs().max() < 0.1


def chinese_pairs(real_data: Path) -> list[tuple[str, str, int]]:
    path = real_data / "chinese" / "lcqmc-dev.txt"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the real data")
    lines = path.read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines if line.strip()]
    return [(one, two, int(label)) for one, two, label in cells]


@pytest.mark.slow
def test_chinese_text_from_characters_to_a_fine_tuned_classifier(real_data, tmp_path):
    pairs = chinese_pairs(real_data)[:600]
    texts = [text for one, two, _ in pairs for text in (one, two)]
    tokenizer = RoFormerV2Tokenizer.train(texts, vocab_size=1200)
    assert tokenizer.vocab_size <= 1200
    assert tokenizer.tokenize("这是什么") == list("这是什么")
    config = RoFormerV2Config(
        tokenizer.vocab_size, 64, 2, 4, 128, "relu", 0.0, 0.0, pad_token_id=tokenizer.pad_token_id
    )
    model = RoFormerV2ForMaskedLM(config, generator=source())
    collate = MaskedLanguageModelCollator(tokenizer, max_length=24, generator=source())

    def masked_loss(start):
        batch = collate(texts[start : start + 32])
        return model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss

    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    task = Task("masked words", range(0, len(texts) - 32, 32), masked_loss)
    history = MultiTaskTrainer(model.roformer, [task], optimizer, generator=source()).train(30)
    # Chance is log V; that characters are not equally frequent is learnt within these steps.
    assert sum(history.loss[-10:]) / 10 < math.log(tokenizer.vocab_size) - 0.7

    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    classifier = RoFormerV2ForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    classifier.train()
    few = pairs[:32]
    batch = tokenizer([p[0] for p in few], [p[1] for p in few], max_length=48)
    labels = torch.tensor([p[2] for p in few])
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        loss = classifier(batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
