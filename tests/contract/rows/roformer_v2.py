"""Contract rows of RoFormerV2: kexue.models.roformer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from contract.row import Row
from kexue.models.roformer import (
    ClassifierOutput,
    EncoderOutput,
    MaskedBatch,
    MaskedLanguageModelCollator,
    MaskedLanguageModelOutput,
    MultiTaskTrainer,
    PiecewiseLinearLR,
    ResidualWarmup,
    RoFormerV2Config,
    RoFormerV2ForMaskedLM,
    RoFormerV2ForSequenceClassification,
    RoFormerV2Model,
    RoFormerV2Tokenizer,
    Task,
    TokenizedBatch,
    TrainingHistory,
    initialize_weights,
    read_tensorflow_checkpoint,
)

CONFIG = RoFormerV2Config(20, 8, 1, 2, 12, num_labels=3)
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "or", "not", "##s"]
KERNEL = "bert/encoder/layer_0/intermediate/dense/kernel"


def _tokens(rng: np.random.Generator) -> dict[str, Any]:
    ids = rng.integers(1, 20, (3, 5))
    ids[1, 3:] = 0
    return {"input_ids": ids}


def _labelled(rng: np.random.Generator) -> dict[str, Any]:
    return {**_tokens(rng), "labels": rng.integers(0, 20, (3, 5))}


def _classes(rng: np.random.Generator) -> dict[str, Any]:
    return {**_tokens(rng), "labels": np.array([0, 2, 1])}


def _initialized(num_hidden_layers: int, generator: Any = None) -> Any:
    linear = nn.Linear(6, 4)
    generator = generator or torch.Generator().manual_seed(0)
    initialize_weights(linear, num_hidden_layers, generator=generator)
    return linear.weight


def _encoded(texts: list[str], max_length: int) -> Any:
    return vars(RoFormerV2Tokenizer(TOKENS)(texts, max_length=max_length))


def _masked(texts: list[str], mask_probability: float, generator: Any = None) -> Any:
    collate = MaskedLanguageModelCollator(
        RoFormerV2Tokenizer(TOKENS),
        mask_probability=mask_probability,
        generator=generator or torch.Generator().manual_seed(0),
    )
    return vars(collate(texts))


def _warmed(warmup_steps: int) -> float:
    encoder = RoFormerV2Model(CONFIG)
    ResidualWarmup(encoder, warmup_steps).step()
    return encoder.residual_scale


def _rates(milestones: dict[int, float]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    return PiecewiseLinearLR(optimizer, milestones).get_last_lr()


def _trained(steps: int, weight: float = 1.0, generator: Any = None) -> Any:
    shared = nn.Linear(2, 1, bias=False)
    nn.init.ones_(shared.weight)
    tasks = [
        Task("one", [torch.eye(2)], lambda x: shared(x).square().sum(), weight),
        Task("two", [torch.ones(1, 2)], lambda x: shared(x).sum()),
    ]
    generator = generator or torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    history = MultiTaskTrainer(shared, tasks, optimizer, generator=generator).train(steps)
    return [shared.weight, history.gradient_norm]


def _read_a_file_that_is_no_index(content: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.ckpt.index").write_bytes(content)
        return read_tensorflow_checkpoint(Path(folder, "model.ckpt"))


_WRONG_TOKENS = {
    "one row": lambda given: {**given, "input_ids": given["input_ids"][0]},
    "no position": lambda given: {**given, "input_ids": given["input_ids"][:, :0]},
    "real numbers": lambda given: {**given, "input_ids": given["input_ids"].double()},
    "a mask of another shape": lambda given: {
        **given,
        "attention_mask": given["input_ids"][:, :2],
    },
    "real token types": lambda given: {**given, "token_type_ids": given["input_ids"].double()},
}
_WRONG_LABELS = {"too few labels": lambda given: {**given, "labels": given["labels"][:2]}}

_MODELS = [
    Row(
        name=f"kexue.models.roformer.{where}.{kind.__name__}",
        make=make,
        module=lambda kind=kind: kind(CONFIG),
        backends=("torch",),
        batched=batched,
        compiles=True,
        wrong={**_WRONG_TOKENS, **({} if make is _tokens else _WRONG_LABELS)},
        without=without,
    )
    for where, kind, make, batched, without in (
        ("encoder", RoFormerV2Model, _tokens, ("input_ids",), {}),
        ("heads", RoFormerV2ForMaskedLM, _labelled, ("input_ids", "labels"), {}),
        (
            "heads",
            RoFormerV2ForSequenceClassification,
            _classes,
            ("input_ids", "labels"),
            {"empty_batch": "the mean loss over no texts is torch's NaN"},
        ),
    )
]

ROWS = [
    *_MODELS,
    Row(
        name="kexue.models.roformer.configuration.RoFormerV2Config",
        make=lambda rng: CONFIG.to_dict(),
        instance=lambda: CONFIG,
        wrong={
            "no layers": lambda given: {**given, "num_hidden_layers": 0},
            "odd heads": lambda given: {**given, "num_attention_heads": 8},
            "unknown activation": lambda given: {**given, "hidden_act": "sine"},
            "certain dropout": lambda given: {**given, "hidden_dropout_prob": 1.0},
        },
    ),
    Row(
        name="kexue.models.roformer.initialization.initialize_weights",
        make=lambda rng: {"num_hidden_layers": 3},
        call=_initialized,
        seeded="generator",
        wrong={"no layers": lambda given: {"num_hidden_layers": 0}},
    ),
    Row(
        name="kexue.models.roformer.tensorflow.convert_tensorflow_variables",
        make=lambda rng: {"variables": {KERNEL: rng.normal(size=(8, 12))}},
        wrong={
            "a bias": lambda given: {"variables": {KERNEL.replace("kernel", "bias"): np.zeros(12)}},
            "gamma": lambda given: {"variables": {"bert/embeddings/LayerNorm/gamma": np.ones(8)}},
            "positions": lambda given: {
                "variables": {"bert/embeddings/position_embeddings": np.ones((9, 8))}
            },
        },
    ),
    Row(
        name="kexue.models.roformer.tensorflow.read_tensorflow_checkpoint",
        make=lambda rng: {"content": b"no index"},
        call=_read_a_file_that_is_no_index,
        wrong={
            "no index": lambda given: given,
            "an empty file": lambda given: {"content": b""},
            "a footer of nonsense": lambda given: {
                "content": b"\xff" * 40 + (0xDB4775248B80FB57).to_bytes(8, "little")
            },
        },
    ),
    Row(
        name="kexue.models.roformer.tokenizer.RoFormerV2Tokenizer",
        make=lambda rng: {"texts": ["to be", "or not"], "max_length": 8},
        call=_encoded,
        wrong={
            "no texts": lambda given: {**given, "texts": []},
            "one string": lambda given: {**given, "texts": "to be"},
            "no room": lambda given: {**given, "max_length": 2},
        },
    ),
    Row(
        name="kexue.models.roformer.pretraining.MaskedLanguageModelCollator",
        make=lambda rng: {"texts": ["to be or not to be"] * 4, "mask_probability": 0.5},
        call=_masked,
        seeded="generator",
        wrong={
            "more than certain": lambda given: {**given, "mask_probability": 1.5},
            "NaN": lambda given: {**given, "mask_probability": np.nan},
            "no texts": lambda given: {**given, "texts": []},
        },
    ),
    Row(
        name="kexue.models.roformer.schedules.ResidualWarmup",
        make=lambda rng: {"warmup_steps": 4},
        call=_warmed,
        wrong={"no steps": lambda given: {"warmup_steps": 0}},
    ),
    Row(
        name="kexue.models.roformer.schedules.PiecewiseLinearLR",
        make=lambda rng: {"milestones": {0: 0.5, 10: 1.0}},
        call=_rates,
        wrong={
            "none": lambda given: {"milestones": {}},
            "before the beginning": lambda given: {"milestones": {-1: 1.0}},
            "NaN": lambda given: {"milestones": {1: np.nan}},
        },
    ),
    Row(
        name="kexue.models.roformer.multitask.MultiTaskTrainer",
        make=lambda rng: {"steps": 6},
        call=_trained,
        seeded="generator",
        wrong={"no steps": lambda given: {"steps": 0}},
    ),
    Row(
        name="kexue.models.roformer.multitask.Task",
        make=lambda rng: {"name": "sum", "batches": [0], "loss": torch.sum, "weight": 2.0},
        instance=lambda: Task("sum", [0], torch.sum, 2.0),
        wrong={"no weight": lambda given: {**given, "weight": 0.0}},
    ),
    *(
        Row(
            name=f"kexue.models.roformer.{where}.{kind.__name__}",
            make=lambda rng, fields=fields: fields,
            instance=lambda kind=kind, fields=fields: kind(**fields),
        )
        for where, kind, fields in (
            ("encoder", EncoderOutput, {"last_hidden_state": torch.ones(1, 2, 4)}),
            (
                "heads",
                MaskedLanguageModelOutput,
                {
                    "logits": torch.ones(1, 2, 9),
                    "loss": torch.tensor(1.0),
                    "last_hidden_state": torch.ones(1, 2, 4),
                },
            ),
            (
                "heads",
                ClassifierOutput,
                {
                    "logits": torch.ones(1, 3),
                    "loss": None,
                    "last_hidden_state": torch.ones(1, 2, 4),
                },
            ),
            (
                "tokenizer",
                TokenizedBatch,
                dict.fromkeys(
                    ("input_ids", "attention_mask", "token_type_ids"),
                    torch.ones(1, 2, dtype=torch.int64),
                ),
            ),
            (
                "pretraining",
                MaskedBatch,
                dict.fromkeys(
                    ("input_ids", "attention_mask", "token_type_ids", "labels"),
                    torch.ones(1, 2, dtype=torch.int64),
                ),
            ),
            (
                "multitask",
                TrainingHistory,
                {"task": ("a",), "loss": (1.0,), "gradient_norm": (2.0,)},
            ),
        )
    ),
]
