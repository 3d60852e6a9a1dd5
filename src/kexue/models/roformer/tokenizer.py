"""Text to tokens: BERT's normalisation and WordPiece, which for Chinese means characters."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from tokenizers import (
    Encoding,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

__all__ = ["RoFormerV2Tokenizer", "TokenizedBatch"]

_PAD, _UNK, _CLS, _SEP, _MASK = _SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LONGEST_WORD = 100
_CHINESE = "\u2e80-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_SPACE_IN_CHINESE = re.compile(rf"(?<=[{_CHINESE}]) | (?=[{_CHINESE}])")


@dataclass(frozen=True)
class TokenizedBatch:
    """Texts as token ids, padded to the longest.

    Attributes
    ----------
    input_ids : Tensor, shape (batch, length)
        Tokens.
    attention_mask : Tensor, shape (batch, length)
        1 for a token, 0 for padding.
    token_type_ids : Tensor, shape (batch, length)
        0, or 1 for a second text where that was asked for.

    Examples
    --------
    >>> ids = torch.tensor([[2, 5, 3]])
    >>> TokenizedBatch(ids, torch.ones_like(ids), torch.zeros_like(ids)).input_ids.shape
    torch.Size([1, 3])
    """

    input_ids: Int64[Tensor, "batch length"]
    attention_mask: Int64[Tensor, "batch length"]
    token_type_ids: Int64[Tensor, "batch length"]


class RoFormerV2Tokenizer:
    """WordPiece with BERT's normalisation: [CLS] A [SEP], or [CLS] A [SEP] B [SEP].

    Control characters are dropped, Chinese characters are words of their own, and with
    ``lowercase`` letters lose case and accents. Words of more than 100 characters are [UNK].

    Parameters
    ----------
    vocab : sequence of str or mapping of str to int
        The tokens in the order of their ids, or their ids. Pieces that continue a word begin with
        ``##``.
    lowercase : bool
        Whether to drop case and accents.

    Raises
    ------
    ValueError
        For a vocabulary without [PAD], [UNK], [CLS], [SEP] or [MASK], with a token twice or with
        gaps between ids; for texts and pairs of different number, no texts, a maximum length
        below 3.
    TypeError
        For a single string in place of several, or texts that are none.

    Examples
    --------
    >>> tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "今", "天", "play", "##ing"]
    >>> tokenizer = RoFormerV2Tokenizer(tokens)
    >>> tokenizer.tokenize("今天 Playing")
    ['今', '天', 'play', '##ing']
    >>> tokenizer(["今天", "天"]).input_ids
    tensor([[2, 5, 6, 3],
            [2, 6, 3, 0]])
    """

    def __init__(self, vocab: Sequence[str] | Mapping[str, int], *, lowercase: bool = True) -> None:
        self._vocab = _checked_vocabulary(vocab)
        self.lowercase = lowercase
        model = models.WordPiece(
            self._vocab, unk_token=_UNK, max_input_chars_per_word=_LONGEST_WORD
        )
        self._tokenizer = _pipeline(model, lowercase)
        self._tokenizer.add_special_tokens(list(_SPECIAL))
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_CLS} $A {_SEP}",
            pair=f"{_CLS} $A {_SEP} $B:1 {_SEP}:1",
            special_tokens=[(token, self._vocab[token]) for token in (_CLS, _SEP)],
        )
        self._tokenizer.enable_padding(pad_id=self.pad_token_id, pad_token=_PAD)

    @classmethod
    def from_vocab_file(cls, path: str | Path, *, lowercase: bool = True) -> RoFormerV2Tokenizer:
        """Read ``vocab.txt``, one token a line."""
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        if lines[-1] == "":
            lines.pop()
        return cls([line.rstrip("\r") for line in lines], lowercase=lowercase)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RoFormerV2Tokenizer:
        """Read a folder with ``vocab.txt`` or ``tokenizer.json``, as published or saved."""
        folder = Path(directory)
        settings = {}
        if (folder / "tokenizer_config.json").is_file():
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        lowercase = bool(settings.get("do_lower_case", True))
        if (folder / "vocab.txt").is_file():
            return cls.from_vocab_file(folder / "vocab.txt", lowercase=lowercase)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} must hold vocab.txt or tokenizer.json")
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        lowercase = bool((content.get("normalizer") or {}).get("lowercase", lowercase))
        return cls(content["model"]["vocab"], lowercase=lowercase)

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, lowercase: bool = True
    ) -> RoFormerV2Tokenizer:
        """Learn a vocabulary of at most ``vocab_size`` tokens; rare characters give way.

        The same texts give the same vocabulary. A ValueError where the texts hold no word, or the
        size leaves no room for a character beside the special tokens.
        """
        texts = list(texts)
        if isinstance(vocab_size, bool) or vocab_size <= len(_SPECIAL):
            raise ValueError(
                f"vocab_size must be above the {len(_SPECIAL)} special tokens, got {vocab_size}"
            )
        tokenizer = _pipeline(models.WordPiece(unk_token=_UNK), lowercase)
        alphabet, continuing = _alphabet(tokenizer, texts, vocab_size - len(_SPECIAL))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            # Pieces that the trainer meets first get the lower number, and numbers break ties; it
            # meets them in an order that differs from process to process.
            special_tokens=[*_SPECIAL, *continuing],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.get_vocab(), lowercase=lowercase)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``vocab.txt``, ``tokenizer.json`` and ``tokenizer_config.json``."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{token}\n" for token in self._vocab)
        (folder / "vocab.txt").write_text(lines, encoding="utf-8")
        self._tokenizer.no_truncation()
        self._tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "tokenize_chinese_chars": True,
            "strip_accents": None,
            **{f"{token[1:-1].lower()}_token": token for token in _SPECIAL},
        }
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def __call__(
        self,
        texts: Sequence[str],
        text_pairs: Sequence[str] | None = None,
        *,
        max_length: int = 512,
        pair_token_types: bool = False,
    ) -> TokenizedBatch:
        """Encode texts, or pairs of texts, of which the longer is cut first.

        The published models know token type 0 only, for pairs too; ``pair_token_types`` gives the
        second text type 1.
        """
        texts = _checked_texts("texts", texts)
        _check_max_length(max_length)
        inputs: list[str] | list[tuple[str, str]] = texts
        if text_pairs is not None:
            seconds = _checked_texts("text_pairs", text_pairs)
            if len(seconds) != len(texts):
                raise ValueError(
                    f"texts and text_pairs must be of equal number, got {len(texts)} and "
                    f"{len(seconds)}"
                )
            inputs = list(zip(texts, seconds, strict=True))
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        encodings = self._tokenizer.encode_batch(inputs)
        input_ids = torch.tensor([encoding.ids for encoding in encodings])
        types = torch.tensor([encoding.type_ids for encoding in encodings])
        return TokenizedBatch(
            input_ids=input_ids,
            attention_mask=torch.tensor([encoding.attention_mask for encoding in encodings]),
            token_type_ids=types if pair_token_types else torch.zeros_like(input_ids),
        )

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text, without special tokens around it."""
        return self._pieces([text])[0].tokens

    def decode(self, ids: Iterable[int] | Int64[Tensor, " length"]) -> str:
        """Return the text of tokens without [PAD], [CLS] and [SEP], and Chinese without spaces."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        around = {self.pad_token_id, self.cls_token_id, self.sep_token_id}
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"ids must be between 0 and {self.vocab_size - 1}, got {number}")
        text = self._tokenizer.decode(
            [number for number in numbers if number not in around], skip_special_tokens=False
        )
        return _SPACE_IN_CHINESE.sub("", text)

    @property
    def vocab(self) -> dict[str, int]:
        """The id of each token."""
        return dict(self._vocab)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._vocab)

    @property
    def pad_token_id(self) -> int:
        """Id of [PAD]."""
        return self._vocab[_PAD]

    @property
    def unk_token_id(self) -> int:
        """Id of [UNK]."""
        return self._vocab[_UNK]

    @property
    def cls_token_id(self) -> int:
        """Id of [CLS]."""
        return self._vocab[_CLS]

    @property
    def sep_token_id(self) -> int:
        """Id of [SEP]."""
        return self._vocab[_SEP]

    @property
    def mask_token_id(self) -> int:
        """Id of [MASK]."""
        return self._vocab[_MASK]

    def _pieces(self, texts: list[str]) -> list[Encoding]:
        """Encode each text without truncation, padding and special tokens."""
        self._tokenizer.no_truncation()
        return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _pipeline(model: models.Model, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _alphabet(tokenizer: Tokenizer, texts: list[str], room: int) -> tuple[list[str], list[str]]:
    """Return the most frequent characters, and their pieces that continue words, for this room."""
    counts: Counter[str] = Counter()
    continues: set[str] = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(text)
        ):
            counts.update(word)
            continues.update(word[1:])
    alphabet: list[str] = []
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        room -= 1 + (character in continues)
        if room < 0:
            break
        alphabet.append(character)
    if not alphabet:
        raise ValueError(
            "the texts must hold words, and vocab_size must leave room for one character, got "
            f"{len(texts)} texts with {len(counts)} different characters"
        )
    return sorted(alphabet), [f"##{c}" for c in sorted(alphabet) if c in continues]


def _checked_vocabulary(vocab: Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    """Return the ids by token, in the order of the ids."""
    if isinstance(vocab, Mapping):
        tokens = sorted(vocab, key=lambda token: vocab[token])
        if sorted(vocab.values()) != list(range(len(tokens))):
            raise ValueError(
                f"the ids of a vocabulary must be 0 to {len(tokens) - 1}, each once, got "
                f"{sorted(vocab.values())[:8]}…"
            )
    else:
        tokens = list(vocab)
    numbers = {token: number for number, token in enumerate(tokens)}
    if len(numbers) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if numbers[token] != number)
        raise ValueError(f"the tokens of a vocabulary must differ, got {twice!r} twice")
    absent = [token for token in _SPECIAL if token not in numbers]
    if absent:
        raise ValueError(f"a vocabulary must hold {', '.join(_SPECIAL)}; absent: {absent}")
    return numbers


def _checked_texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a sequence of strings, got a single string: wrap it")
    texts = list(texts)
    if not texts:
        raise ValueError(f"{name} must hold at least one text, got none")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, got a {type(text).__name__}")
    return texts


def _check_max_length(max_length: int) -> None:
    if max_length < 3:
        raise ValueError(
            f"max_length must be at least 3, for [CLS], a token and [SEP], got {max_length}"
        )
