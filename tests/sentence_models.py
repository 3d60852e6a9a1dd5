"""Tiny models of sentence-transformers with random weights, written to a folder by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_cross_encoder(folder: Path, words: Sequence[str]) -> Any:
    """Write a BERT that reads two sentences at once and gives one number; return its scorer."""
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = _write_tokenizer(folder, words)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return sentence_transformers.CrossEncoder(str(folder), device="cpu")


def tiny_sentence_transformer(folder: Path, words: Sequence[str]) -> Any:
    """Write a BERT whose mean over tokens is a sentence's vector; return its encoder."""
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    bert = folder / "bert"
    config = _write_tokenizer(bert, words)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(bert)
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # before version 6
        from sentence_transformers import models as modules
    parts = [modules.Transformer(str(bert)), modules.Pooling(config.hidden_size)]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(folder / "model"))
    return model


def _write_tokenizer(folder: Path, words: Sequence[str]) -> Any:
    """A vocabulary of whole words; returns the configuration that fits it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    return transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=1, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
