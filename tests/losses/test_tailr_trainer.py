"""TaiLr as the loss of a Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kexue.losses import tailr_loss

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

GAMMA = 0.1


def classifier_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    loss = tailr_loss(outputs.logits, labels, gamma=GAMMA, reduction="sum")
    return loss / (num_items_in_batch or labels.ne(-100).sum())


def language_model_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = tailr_loss(logits, labels, gamma=GAMMA, reduction="sum")
    return loss / (num_items_in_batch or labels.ne(-100).sum())


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", seed=0, **options,
    )  # fmt: skip


def language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sentences() -> list[dict[str, torch.Tensor]]:
    """Counting upwards; the first labels of some are ignored, of each another number."""
    rows = []
    for start in range(8):
        tokens = (torch.arange(8) + start) % 12
        labels = tokens.clone()
        labels[: start % 5] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def test_classifier_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    # The class is the first token.
    rows = [
        {"input_ids": torch.tensor([k, *range(3, 9)]), "labels": torch.tensor(k)} for k in range(3)
    ] * 4
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=40, learning_rate=1e-2, per_device_train_batch_size=12),
        train_dataset=rows,
        eval_dataset=rows,
        compute_loss_func=classifier_loss,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    # 0 is certainty; a third is what guessing gets: -log(0.1 + 0.9/3)/0.9 = 1.02.
    assert before == pytest.approx(1.02, abs=0.2)
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_language_model_trains(tmp_path: Path) -> None:
    trainer = transformers.Trainer(
        model=language_model(),
        args=arguments(tmp_path, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=8),
        train_dataset=sentences(),
        eval_dataset=sentences(),
        compute_loss_func=language_model_loss,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Batches of unequal numbers of labels: only a sum over the counted labels adds up."""
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = transformers.Trainer(
            model=language_model(),
            args=arguments(
                tmp_path, max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
                max_grad_norm=0.0, per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
            ),
            train_dataset=sentences(),
            compute_loss_func=language_model_loss,
        )  # fmt: skip
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    start = list(language_model().parameters())
    for one, other, initial in zip(*weights, start, strict=True):
        # float32 sums of 44 gradients of size below 1 in another order.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert not torch.equal(one, initial)
