"""Masked language modelling: which words are hidden, and behind what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from kexue.models.roformer.tokenizer import (
    RoFormerV2Tokenizer,
    _check_max_length,
    _checked_texts,
)

__all__ = ["MaskedBatch", "MaskedLanguageModelCollator"]

_IGNORED = -100


@dataclass(frozen=True)
class MaskedBatch:
    """Texts with hidden words.

    Attributes
    ----------
    input_ids : Tensor, shape (batch, length)
        Tokens, some of them replaced.
    attention_mask : Tensor, shape (batch, length)
        1 for a token, 0 for padding.
    token_type_ids : Tensor, shape (batch, length)
        All 0.
    labels : Tensor, shape (batch, length)
        The original token where a word was chosen, −100 elsewhere.

    Examples
    --------
    >>> ids = torch.tensor([[2, 4, 3]])
    >>> labels = torch.tensor([[-100, 7, -100]])
    >>> batch = MaskedBatch(ids, torch.ones_like(ids), torch.zeros_like(ids), labels)
    >>> int((batch.labels != -100).sum())
    1
    """

    input_ids: Int64[Tensor, "batch length"]
    attention_mask: Int64[Tensor, "batch length"]
    token_type_ids: Int64[Tensor, "batch length"]
    labels: Int64[Tensor, "batch length"]


class MaskedLanguageModelCollator:
    """Turns texts into a batch for masked language modelling, hiding whole words.

    Each word is chosen independently with ``mask_probability``; all its pieces become labels.
    A share ``replace_share`` of the chosen words becomes [MASK], piece by piece, a share
    ``keep_share`` stays, and the pieces of the rest become random tokens other than token 0.

    Parameters
    ----------
    tokenizer : RoFormerV2Tokenizer
        Cuts words into pieces.
    mask_probability : float
        Probability that a word is chosen.
    replace_share : float
        Share of the chosen words that is replaced by [MASK].
    keep_share : float
        Share of the chosen words that stays.
    whole_word : bool
        Whether the pieces of a word are chosen together; otherwise each on its own.
    segmenter : callable, optional
        Cuts a text into words, for Chinese for instance ``jieba.lcut``; by default words are what
        the tokenizer takes for them, single characters in Chinese.
    max_length : int
        Tokens of a text with [CLS] and [SEP]; the rest is cut off.
    generator : torch.Generator, optional
        Draws on the CPU; torch's own by default.

    Raises
    ------
    ValueError
        For probabilities or shares outside [0, 1], shares of a sum above 1, a maximum length below
        3, or no texts.
    TypeError
        For texts, or words of the segmenter, that are no strings.

    Examples
    --------
    >>> tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "or", "not"]
    >>> collate = MaskedLanguageModelCollator(RoFormerV2Tokenizer(tokens), mask_probability=1.0,
    ...     replace_share=1.0, keep_share=0.0)
    >>> batch = collate(["to be or not to be"])
    >>> batch.input_ids
    tensor([[2, 4, 4, 4, 4, 4, 4, 3]])
    >>> batch.labels
    tensor([[-100,    5,    6,    7,    8,    5,    6, -100]])
    """

    def __init__(
        self,
        tokenizer: RoFormerV2Tokenizer,
        *,
        mask_probability: float = 0.15,
        replace_share: float = 0.8,
        keep_share: float = 0.1,
        whole_word: bool = True,
        segmenter: Callable[[str], list[str]] | None = None,
        max_length: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        shares = {
            "mask_probability": mask_probability,
            "replace_share": replace_share,
            "keep_share": keep_share,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        # Shares that are meant to fill the whole may exceed it by a rounding error.
        if replace_share + keep_share > 1 + 4 * math.ulp(1.0):
            raise ValueError(
                "replace_share and keep_share must have a sum of at most 1, got "
                f"{replace_share} + {keep_share}"
            )
        _check_max_length(max_length)
        self.tokenizer = tokenizer
        self.mask_probability = mask_probability
        self.replace_share = replace_share
        self.keep_share = keep_share
        self.whole_word = whole_word
        self.segmenter = segmenter
        self.max_length = max_length
        self.generator = generator

    def __call__(self, texts: Sequence[str]) -> MaskedBatch:
        """Return the batch, padded to the longest text."""
        rows = [self._masked(text) for text in _checked_texts("texts", texts)]
        tokenizer = self.tokenizer
        length = max(len(ids) for ids, _ in rows) + 2
        input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, _IGNORED)
        for row, (ids, targets) in enumerate(rows):
            end = len(ids) + 1
            input_ids[row, 0], input_ids[row, end] = tokenizer.cls_token_id, tokenizer.sep_token_id
            input_ids[row, 1:end], labels[row, 1:end] = ids, targets
            attention_mask[row, : end + 1] = 1
        return MaskedBatch(input_ids, attention_mask, torch.zeros_like(input_ids), labels)

    def _masked(self, text: str) -> tuple[Tensor, Tensor]:
        """Return the pieces of a text, some of them replaced, and their labels."""
        ids, words = self._pieces(text)
        n_words = int(words[-1]) + 1 if len(words) else 0
        u = torch.rand(n_words, generator=self.generator)[words]
        # A special token that stands in the text is no word to be guessed.
        u[torch.isin(ids, self._special)] = 1.0
        p = self.mask_probability
        masked = u < p * self.replace_share
        stays = u < p * (self.replace_share + self.keep_share)
        chosen = u < p
        labels = torch.where(chosen, ids, _IGNORED)
        replaced = torch.where(masked, self.tokenizer.mask_token_id, ids)
        other = chosen & ~stays & ~masked
        replaced[other] = torch.randint(
            1, self.tokenizer.vocab_size, (int(other.sum()),), generator=self.generator
        )
        return replaced, labels

    def _pieces(self, text: str) -> tuple[Tensor, Tensor]:
        """Return ids, cut to the maximum length, and for each the number of its word."""
        if self.segmenter is None:
            encoding = self.tokenizer._pieces([text])[0]
            ids, bounds = encoding.ids, encoding.word_ids
        else:
            ids, bounds = [], []
            segments = _checked_segments(self.segmenter(text))
            for number, pieces in enumerate(self.tokenizer._pieces(segments)):
                ids += pieces.ids
                bounds += [number] * len(pieces.ids)
        numbers = torch.tensor(ids[: self.max_length - 2], dtype=torch.int64)
        if not self.whole_word:
            return numbers, torch.arange(len(numbers))
        # Words that left no piece, and numbers that are missing, close up.
        bound = torch.tensor([-1 if b is None else b for b in bounds[: len(numbers)]])
        return numbers, torch.unique_consecutive(bound, return_inverse=True)[1]

    @property
    def _special(self) -> Tensor:
        of = self.tokenizer
        return torch.tensor([of.pad_token_id, of.cls_token_id, of.sep_token_id, of.mask_token_id])


def _checked_segments(segments: Sequence[str]) -> list[str]:
    if isinstance(segments, str) or not all(isinstance(s, str) for s in segments):
        raise TypeError("the segmenter must return a list of strings")
    return list(segments)
