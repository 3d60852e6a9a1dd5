"""What the text commands know of words: documents, embeddings and a pair scorer of their own.

The defaults need no model and no download: embeddings are TF-IDF folded by an SVD (latent semantic
analysis), and the scorer aligns the words of two texts. A path names models of
sentence-transformers instead.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kexue.lab.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Float32

__all__ = [
    "Encoder",
    "LatentSemanticEncoder",
    "LexicalScorer",
    "SentenceEncoder",
    "read_lines",
    "scorer",
]

_WORD = re.compile(r"[^\W\u3400-\u9fff\u3040-\u30ff]+|[\u3400-\u9fff\u3040-\u30ff]+")


class Encoder(Protocol):
    """What turns texts into unit vectors."""

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]: ...


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, plain or gzipped, that are not empty."""
    from kexue.lab.data import text

    lines = [" ".join(line.split()) for line in text(path).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path}: expected one document a line, got empty lines only")
    return lines


@lru_cache(maxsize=100_000)
def words(text: str) -> tuple[str, ...]:
    """Words in lower case; Chinese and Japanese, which have no spaces, as pairs of characters."""
    found: list[str] = []
    for run in _WORD.findall(text.lower()):
        if "\u3040" <= run[0] <= "\u9fff" and len(run) > 1:
            found += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            found.append(run)
    return tuple(found)


class LatentSemanticEncoder:
    """TF-IDF and its leading singular directions, as unit vectors.

    Parameters
    ----------
    terms : dict of str to int
        Column of each word.
    idf : array (terms,)
        Weight of each word.
    components : array (terms, dim)
        What folds the columns.
    """

    def __init__(
        self,
        terms: dict[str, int],
        idf: Float[np.ndarray, " terms"],
        components: Float[np.ndarray, "terms dim"],
    ) -> None:
        self.terms = terms
        self.idf = idf
        self.components = components

    @classmethod
    def fit(cls, documents: Sequence[str], dim: int = 128) -> LatentSemanticEncoder:
        """Learn words, weights and directions from documents; deterministic."""
        import numpy as np
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.utils.extmath import randomized_svd

        vectorizer = TfidfVectorizer(analyzer=words, sublinear_tf=True)
        try:
            weights = vectorizer.fit_transform(documents)
        except ValueError as error:
            raise DataError(f"expected documents with words in them, got none ({error})") from None
        rank = min(dim, min(weights.shape))
        _, _, directions = randomized_svd(weights, rank, random_state=0)
        return cls(
            {term: int(column) for term, column in vectorizer.vocabulary_.items()},
            vectorizer.idf_.astype(np.float32),
            np.ascontiguousarray(directions.T, dtype=np.float32),
        )

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]:
        """Return unit vectors; zero for a text without any known word."""
        import numpy as np

        vectors = np.zeros((len(texts), self.components.shape[1]), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            known = [self.terms[word] for word in words(text) if word in self.terms]
            columns, counts = np.unique(np.array(known, np.int64), return_counts=True)
            weights = (1 + np.log(counts)) * self.idf[columns]
            vector[:] = weights.astype(np.float32) @ self.components[columns]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return arrays and texts from which `from_state` makes the same encoder."""
        terms = sorted(self.terms, key=self.terms.__getitem__)
        return {"idf": self.idf, "components": self.components}, {"terms": json.dumps(terms)}

    @classmethod
    def from_state(
        cls, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]
    ) -> LatentSemanticEncoder:
        """Make the encoder whose `state` this is; a KeyError or ValueError where it is none."""
        terms = {term: column for column, term in enumerate(json.loads(texts["terms"]))}
        return cls(terms, arrays["idf"], arrays["components"])


class SentenceEncoder:
    """A SentenceTransformer in a folder."""

    def __init__(self, path: str) -> None:
        self._model = _sentence_transformers().SentenceTransformer(
            _existing(path, "--encoder"), local_files_only=True
        )

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]:
        import numpy as np

        vectors = self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)


class LexicalScorer:
    """Align each word of a query to the most similar word of a document, weighted by rarity.

    s(q, d) = Σ_{t ∈ q} idf(t) max_{u ∈ d} sim(t, u) / sqrt(Σ_q idf Σ_d idf)

    with sim the Dice coefficient of the words' character trigrams, 1 for equal words and cut off
    below a half.

    Parameters
    ----------
    documents : sequence of str
        Where the rarity of words is counted.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        counts: dict[str, int] = {}
        for document in documents:
            for word in set(words(document)):
                counts[word] = counts.get(word, 0) + 1
        total = len(documents)
        self._idf = {word: math.log((1 + total) / (1 + n)) + 1 for word, n in counts.items()}
        self._rarest = math.log(1 + total) + 1
        self._number: dict[str, int] = {}
        self._words: list[str] = []
        self._containing: dict[str, list[int]] = {}
        self._sizes: list[int] = []
        self._rarity: list[float] = []
        self._documents: dict[str, np.ndarray] = {}
        for word in counts:
            self._add(word)

    def predict(self, pairs: Sequence[tuple[str, str]]) -> Float[np.ndarray, " pairs"]:
        """Score (query, document) pairs."""
        import numpy as np

        scores = np.zeros(len(pairs))
        by_query: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(place)
        for query, places in by_query.items():
            scores[places] = self._of_query(query, [pairs[place][1] for place in places])
        return scores

    def _of_query(self, query: str, documents: Sequence[str]) -> Float[np.ndarray, " documents"]:
        import numpy as np

        numbers = [self._numbers(document) for document in documents]
        lengths = np.array([len(n) for n in numbers])
        total = np.zeros(len(documents))
        asked = [self._add(word) for word in words(query)]
        flat = np.concatenate(numbers) if lengths.any() else np.zeros(0, np.int64)
        if not asked or not len(flat):
            return total
        rarity = np.array(self._rarity)
        filled = lengths > 0
        starts = np.concatenate([[0], lengths[filled].cumsum()[:-1]])
        for number in asked:
            best = np.maximum.reduceat(self._similarities(number)[flat], starts)
            total[filled] += rarity[number] * best
        weight_of_documents = np.add.reduceat(rarity[flat], starts)
        total[filled] /= np.sqrt(rarity[asked].sum() * weight_of_documents)
        return total

    def _numbers(self, document: str) -> np.ndarray:
        import numpy as np

        if document not in self._documents:
            numbers = [self._add(word) for word in words(document)]
            self._documents[document] = np.array(numbers, np.int64)
        return self._documents[document]

    def _add(self, word: str) -> int:
        """Return the number of a word; words that nobody counted are the rarest."""
        number = self._number.setdefault(word, len(self._words))
        if number == len(self._words):
            self._words.append(word)
            grams = _trigrams(word)
            self._sizes.append(len(grams))
            self._rarity.append(self._idf.get(word, self._rarest))
            for gram in grams:
                self._containing.setdefault(gram, []).append(number)
        return number

    def _similarities(self, number: int) -> np.ndarray:
        """Dice coefficients of one word with all."""
        import numpy as np

        common = np.zeros(len(self._words))
        grams = _trigrams(self._words[number])
        for gram in grams:
            common[self._containing[gram]] += 1
        dice = 2 * common / (np.array(self._sizes) + len(grams))
        return np.where(dice >= 0.5, dice, 0.0)


def _trigrams(word: str) -> frozenset[str]:
    padded = f" {word} "
    return frozenset(padded[i : i + 3] for i in range(max(1, len(padded) - 2)))


def scorer(path: str | None, documents: Sequence[str]) -> Callable[[Any], Any]:
    """Return the scorer of pairs that a path names, or the embedded one."""
    if path is None:
        return LexicalScorer(documents).predict
    import torch

    model = _sentence_transformers().CrossEncoder(
        _existing(path, "--scorer"), local_files_only=True
    )
    # Raw logits: a sigmoid saturates, and destroys the low rank that predictions rest on.
    raw = torch.nn.Identity()
    return lambda pairs: model.predict(pairs, activation_fn=raw, show_progress_bar=False)


def _existing(path: str, option: str) -> str:
    if not Path(path).is_dir():
        raise UsageError(f"{option} must be the folder of a model, got {path!r}")
    return path


def _sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise UsageError(
            "models need sentence-transformers: pip install 'kexue[sentence-transformers]'"
        ) from error
    return sentence_transformers
