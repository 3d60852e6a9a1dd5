"""The encoder with a masked language model's head, and with a classifier's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from kexue.models.roformer.checkpoint import load_state, read_pretrained, write_pretrained
from kexue.models.roformer.configuration import RoFormerV2Config
from kexue.models.roformer.encoder import RoFormerV2Model, _check_like, _kind
from kexue.models.roformer.initialization import initialize_weights

__all__ = [
    "ClassifierOutput",
    "MaskedLanguageModelOutput",
    "RoFormerV2ForMaskedLM",
    "RoFormerV2ForSequenceClassification",
]

_IGNORED = -100
_Model = TypeVar("_Model", bound="_Pretrained")


@dataclass(frozen=True)
class MaskedLanguageModelOutput:
    """What the masked language model returns.

    Attributes
    ----------
    logits : Tensor, shape (batch, length, vocab_size)
        Unnormalised log-probabilities of the tokens.
    loss : Tensor, shape (), optional
        Mean cross-entropy in nats over the labelled positions, where labels were given.
    last_hidden_state : Tensor, shape (batch, length, hidden_size)
        Output of the encoder.

    Examples
    --------
    >>> output = MaskedLanguageModelOutput(torch.zeros(1, 2, 9), None, torch.zeros(1, 2, 4))
    >>> output.loss is None
    True
    """

    logits: Float[Tensor, "batch length vocabulary"]
    loss: Float[Tensor, ""] | None
    last_hidden_state: Float[Tensor, "batch length hidden"]


@dataclass(frozen=True)
class ClassifierOutput:
    """What the classifier returns.

    Attributes
    ----------
    logits : Tensor, shape (batch, num_labels)
        Unnormalised log-probabilities of the classes.
    loss : Tensor, shape (), optional
        Mean cross-entropy in nats, where labels were given.
    last_hidden_state : Tensor, shape (batch, length, hidden_size)
        Output of the encoder.

    Examples
    --------
    >>> ClassifierOutput(torch.zeros(1, 3), None, torch.zeros(1, 2, 4)).logits.shape
    torch.Size([1, 3])
    """

    logits: Float[Tensor, "batch classes"]
    loss: Float[Tensor, ""] | None
    last_hidden_state: Float[Tensor, "batch length hidden"]


class _Pretrained(nn.Module):
    """What models with a head share: an encoder named `roformer`, and files."""

    roformer: RoFormerV2Model

    def __init__(
        self, config: RoFormerV2Config, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.roformer = RoFormerV2Model(config, generator=generator)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, as Hugging Face lays them out."""
        write_pretrained(self, self.config, directory)

    @classmethod
    def from_pretrained(
        cls: type[_Model], directory: str | Path, **config_overrides: Any
    ) -> _Model:
        """Read a published folder, in either file format, and return the model in eval mode.

        The configuration is ``config.json`` or ``bert_config.json``, with these fields replaced;
        the weights are the first of ``model.safetensors``, ``pytorch_model.bin`` and
        ``bert_model.ckpt.index``. They are checked as by ``load_checkpoint_state``. A
        FileNotFoundError says what is missing.
        """
        config, state = read_pretrained(directory, config_overrides)
        # On no device at first: what the file holds need be neither drawn nor copied.
        with torch.device("meta"):
            model = cls(config)
        load_state(model, state, adopt=True)
        model._draw_what_is_absent()
        return model.eval()

    def load_checkpoint_state(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a checkpoint into this model, all of them or none.

        Heads of other models in it are ignored, and a head that it lacks stays as it is. A
        ValueError lists tensors of the encoder that RoFormerV2 does not have, such as biases and
        norms, and those that are missing, of a wrong shape, or not tied to the embedding.
        """
        load_state(self, state_dict, adopt=False)

    def _draw_what_is_absent(self) -> None:
        """Initialise a head that the checkpoint did not hold."""


class RoFormerV2ForMaskedLM(_Pretrained):
    """The encoder with a head that is the word embedding itself: no bias and no transform.

    Parameters
    ----------
    config : RoFormerV2Config
        The sizes.
    generator : torch.Generator, optional
        For the initial weights; torch's own by default.

    Attributes
    ----------
    roformer : RoFormerV2Model
        The encoder, which holds all parameters.

    Raises
    ------
    ValueError
        For inputs that the encoder refuses, and labels of another shape or dtype than input_ids.

    Examples
    --------
    >>> config = RoFormerV2Config(20, 8, 2, 2, 16)
    >>> model = RoFormerV2ForMaskedLM(config, generator=torch.Generator().manual_seed(0)).eval()
    >>> output = model(torch.tensor([[2, 4, 5, 3]]), labels=torch.tensor([[-100, 9, -100, -100]]))
    >>> output.logits.shape, output.loss.shape
    (torch.Size([1, 4, 20]), torch.Size([]))
    """

    def __init__(
        self, config: RoFormerV2Config, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, generator=generator)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Int64[Tensor, "batch length"],
        *,
        attention_mask: Bool[Tensor, "batch length"] | Int64[Tensor, "batch length"] | None = None,
        token_type_ids: Int64[Tensor, "batch length"] | None = None,
        labels: Int64[Tensor, "batch length"] | None = None,
    ) -> MaskedLanguageModelOutput:
        """Return logits and, with labels (−100 where there is none), the loss.

        The loss is the sum over labels divided by their number; it is 0 where there are none.
        """
        encoded = self.roformer(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        _check_like("labels", labels, input_ids, (torch.int64,))
        states = self.dropout(encoded)
        words = self.roformer.embeddings.word_embeddings.weight
        loss = None if labels is None else _masked_loss(states, words, labels)
        return MaskedLanguageModelOutput(functional.linear(states, words), loss, encoded)


class RoFormerV2ForSequenceClassification(_Pretrained):
    """The encoder with a linear classifier on the final state of the first token.

    Parameters
    ----------
    config : RoFormerV2Config
        The sizes; ``num_labels`` is the number of classes.
    generator : torch.Generator, optional
        For the initial weights; torch's own by default.

    Attributes
    ----------
    roformer : RoFormerV2Model
        The encoder.
    classifier : nn.Linear
        From the state of [CLS] to the logits, with a bias.

    Raises
    ------
    ValueError
        For inputs that the encoder refuses, and labels that are no int64 tensor of shape (batch,).

    Examples
    --------
    >>> config = RoFormerV2Config(20, 8, 2, 2, 16, num_labels=3)
    >>> model = RoFormerV2ForSequenceClassification(config).eval()
    >>> model(torch.tensor([[2, 7, 5, 3]]), labels=torch.tensor([1])).logits.shape
    torch.Size([1, 3])
    """

    def __init__(
        self, config: RoFormerV2Config, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, generator=generator)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialize_weights(self.classifier, config.num_hidden_layers, generator=generator)

    def forward(
        self,
        input_ids: Int64[Tensor, "batch length"],
        *,
        attention_mask: Bool[Tensor, "batch length"] | Int64[Tensor, "batch length"] | None = None,
        token_type_ids: Int64[Tensor, "batch length"] | None = None,
        labels: Int64[Tensor, " batch"] | None = None,
    ) -> ClassifierOutput:
        """Return logits and, with a class for each text, the mean loss."""
        encoded = self.roformer(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        logits = self.classifier(encoded[:, 0])
        loss = None
        if labels is not None:
            if labels.dtype != torch.int64 or labels.shape != input_ids.shape[:1]:
                raise ValueError(
                    f"labels must be int64 of shape {tuple(input_ids.shape[:1])}, one class for "
                    f"each row of input_ids {tuple(input_ids.shape)}, got {_kind(labels)}"
                )
            loss = functional.cross_entropy(_single(logits), labels)
        return ClassifierOutput(logits, loss, encoded)

    def _draw_what_is_absent(self) -> None:
        if self.classifier.weight.is_meta:
            self.classifier = self.classifier.to_empty(device="cpu")
            initialize_weights(self.classifier, self.config.num_hidden_layers)


def _masked_loss(states: Tensor, words: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy over the labels, divided by their number."""
    chosen = labels != _IGNORED
    if not torch.compiler.is_compiling():
        # Most positions have no label, and the vocabulary is by far the widest layer: logits of
        # the others, which have no part in the loss, are spared their gradient and their softmax.
        states, labels = states[chosen], labels[chosen]
    total = functional.cross_entropy(
        _single(functional.linear(states, words)).flatten(0, -2),
        labels.flatten(),
        ignore_index=_IGNORED,
        reduction="sum",
    )
    return total / chosen.sum().clamp(min=1)


def _single(logits: Tensor) -> Tensor:
    """Return logits in single precision at least: a loss in half precision loses its digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
