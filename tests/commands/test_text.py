"""What the text commands know of words: the embedded encoder and scorer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from kexue.commands._text import LatentSemanticEncoder, LexicalScorer, read_lines, words
from kexue.lab.errors import DataError

DOCUMENTS = [
    "the cat sat on the mat",
    "a dog chased the cat",
    "stocks fell sharply on monday",
    "markets and stocks recovered on tuesday",
    "the dog slept on a mat",
]


def test_words_of_several_scripts() -> None:
    assert words("The CAT's 2 naps") == ("the", "cat", "s", "2", "naps")
    assert words("科学空间 is 好") == ("科学", "学空", "空间", "is", "好")
    assert words("!?") == ()


def test_without_folding_the_encoder_is_tf_idf() -> None:
    # As many directions as documents: all angles between documents are those of TF-IDF.
    encoder = LatentSemanticEncoder.fit(DOCUMENTS, dim=10)
    ours = encoder.encode(DOCUMENTS)
    plain = TfidfVectorizer(analyzer=words, sublinear_tf=True).fit_transform(DOCUMENTS)
    np.testing.assert_allclose(ours @ ours.T, (plain @ plain.T).toarray(), atol=1e-5)


def test_an_unknown_text_has_no_direction() -> None:
    encoder = LatentSemanticEncoder.fit(DOCUMENTS, dim=3)
    assert not encoder.encode(["zyx", ""]).any()
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(DOCUMENTS), axis=1), 1, rtol=1e-6)


def test_an_encoder_is_made_again_from_its_state() -> None:
    encoder = LatentSemanticEncoder.fit(DOCUMENTS, dim=3)
    again = LatentSemanticEncoder.from_state(*encoder.state())
    np.testing.assert_array_equal(again.encode(DOCUMENTS), encoder.encode(DOCUMENTS))


def test_documents_without_words_are_refused() -> None:
    with pytest.raises(DataError, match="words"):
        LatentSemanticEncoder.fit(["!", "?"])


def by_hand(query: str, document: str, documents: list[str]) -> float:
    def idf(word: str) -> float:
        return math.log((1 + len(documents)) / (1 + sum(word in words(d) for d in documents))) + 1

    def dice(one: str, other: str) -> float:
        a, b = ({f" {w} "[i : i + 3] for i in range(len(w))} for w in (one, other))
        value = 2 * len(a & b) / (len(a) + len(b))
        return value if value >= 0.5 else 0.0

    asked, there = words(query), words(document)
    if not asked or not there:
        return 0.0
    total = sum(idf(t) * max(dice(t, u) for u in there) for t in asked)
    return total / math.sqrt(sum(map(idf, asked)) * sum(map(idf, there)))


def test_scores_are_those_of_the_formula() -> None:
    queries = ["cats and dogs", "stock market", "unheard", "", "monday"]
    documents = [*DOCUMENTS, "", "dogged tuesdays"]
    pairs = [(q, d) for q in queries for d in documents]
    scorer = LexicalScorer(DOCUMENTS)
    expected = [by_hand(q, d, DOCUMENTS) for q, d in pairs]
    np.testing.assert_allclose(scorer.predict(pairs), expected, rtol=1e-12, atol=1e-15)
    # One at a time, and in another order, after words that nobody counted: the same.
    again = [scorer.predict([pair])[0] for pair in reversed(pairs)]
    np.testing.assert_allclose(again[::-1], expected, rtol=1e-12, atol=1e-15)


def test_similar_words_count_for_something() -> None:
    scorer = LexicalScorer(DOCUMENTS)
    stock, cat = scorer.predict([("stock", DOCUMENTS[2]), ("stock", DOCUMENTS[0])])
    assert stock > 0
    assert cat == 0


def test_lines_are_documents(tmp_path) -> None:
    path = tmp_path / "documents"
    path.write_text("one  document\n\n another\t one \n")
    assert read_lines(path) == ["one document", "another one"]
    path.write_text("\n \n")
    with pytest.raises(DataError):
        read_lines(path)
