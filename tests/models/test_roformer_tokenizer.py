"""Tests of kexue.models.roformer: tokenizer and masking."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from kexue.models.roformer import MaskedLanguageModelCollator, RoFormerV2Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["play", "##ing", "##ed", "the", "cafe", "今", "天", "很", "好", ",", "，", "##s", "a"]
VOCABULARY = [*SPECIAL, *WORDS]


@pytest.fixture
def tokenizer() -> RoFormerV2Tokenizer:
    return RoFormerV2Tokenizer(VOCABULARY)


def test_words_become_pieces_and_chinese_becomes_characters(tokenizer):
    assert tokenizer.tokenize("The PLAYING plays") == ["the", "play", "##ing", "play", "##s"]
    assert tokenizer.tokenize("今天很好，played") == ["今", "天", "很", "好", "，", "play", "##ed"]


def test_accents_and_control_characters_are_dropped(tokenizer):
    assert tokenizer.tokenize("Caf\u00e9\u0000 th\u0007e") == ["cafe", "the"]
    cased = RoFormerV2Tokenizer(VOCABULARY, lowercase=False)
    assert cased.tokenize("The caf\u00e9 cafe") == ["[UNK]", "[UNK]", "cafe"]


def test_unknown_and_overlong_words_are_one_unknown_token(tokenizer):
    assert tokenizer.tokenize("zebra") == ["[UNK]"]
    assert tokenizer.tokenize("play" + "s" * 96) == ["play", *["##s"] * 96]
    assert tokenizer.tokenize("play" + "s" * 97) == ["[UNK]"]


def test_special_tokens_in_the_text_are_known(tokenizer):
    assert tokenizer.tokenize("今[MASK]很") == ["今", "[MASK]", "很"]


def test_single_texts_are_framed_and_padded_to_the_longest(tokenizer):
    batch = tokenizer(["the play", "a"])
    the, play, a = (tokenizer.vocab[word] for word in ("the", "play", "a"))
    assert batch.input_ids.tolist() == [[2, the, play, 3], [2, a, 3, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.token_type_ids.tolist() == [[0] * 4, [0] * 4]


def test_pairs_are_of_type_zero_unless_types_are_asked_for(tokenizer):
    the, play, a = (tokenizer.vocab[word] for word in ("the", "play", "a"))
    batch = tokenizer(["the"], ["play a"])
    assert batch.input_ids.tolist() == [[2, the, 3, play, a, 3]]
    assert not batch.token_type_ids.any()
    typed = tokenizer(["the"], ["play a"], pair_token_types=True)
    assert typed.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_the_longer_text_of_a_pair_is_cut_first(tokenizer):
    a, the = tokenizer.vocab["a"], tokenizer.vocab["the"]
    batch = tokenizer(["a a a a a a"], ["the the"], max_length=8)
    assert batch.input_ids.tolist() == [[2, a, a, a, 3, the, the, 3]]
    assert tokenizer(["a a a a"], max_length=4).input_ids.tolist() == [[2, a, a, 3]]
    # The limit is of the call, not of the tokenizer.
    assert tokenizer(["a a a a"]).input_ids.shape == (1, 6)
    assert len(tokenizer.tokenize("a " * 700)) == 700


def test_decoding_undoes_encoding(tokenizer):
    for text in ("the playing", "今天很好", "play今天", "今[MASK]很"):
        assert tokenizer.decode(tokenizer([text]).input_ids[0]) == text
    assert tokenizer.decode([2, 1, 3, 0, 0]) == "[UNK]"


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_tokenizers_come_back(tmp_path, lowercase):
    tokenizer = RoFormerV2Tokenizer(VOCABULARY, lowercase=lowercase)
    tokenizer(["a"], max_length=3)
    tokenizer.save_pretrained(tmp_path)
    text = "The Playing caf\u00e9 今天 " + "a " * 10
    readers = [RoFormerV2Tokenizer.from_pretrained(tmp_path)]
    (tmp_path / "vocab.txt").unlink()
    readers.append(RoFormerV2Tokenizer.from_pretrained(tmp_path))
    for again in readers:
        assert again.vocab == tokenizer.vocab
        assert again.tokenize(text) == tokenizer.tokenize(text)


def test_saved_files_are_what_transformers_reads(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "The Playing caf\u00e9 今天，[MASK]"
    assert theirs(text)["input_ids"] == tokenizer([text]).input_ids[0].tolist()


def test_vocabulary_files_may_end_their_lines_in_either_way(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(VOCABULARY).encode())
    assert RoFormerV2Tokenizer.from_vocab_file(tmp_path / "vocab.txt").vocab_size == 18
    mapping = {token: number for number, token in enumerate(VOCABULARY)}
    assert RoFormerV2Tokenizer(mapping).vocab == mapping


CORPUS = ["the players play plays while playing", "今天天气很好", "a b c d e f g h i j k l m"] * 3


def test_trained_vocabularies_hold_frequent_pieces_and_keep_to_their_size():
    tokenizer = RoFormerV2Tokenizer.train(CORPUS, vocab_size=60)
    assert tokenizer.vocab_size <= 60
    assert list(tokenizer.vocab)[:5] == SPECIAL
    assert tokenizer.tokenize("play") == ["play"]
    assert "[UNK]" not in tokenizer.tokenize("今天 jail")


def test_rare_characters_give_way_to_the_size():
    small = RoFormerV2Tokenizer.train(CORPUS, vocab_size=20)
    assert small.vocab_size <= 20
    # The letters of "play" come first; m is once in each copy of the texts.
    assert small.tokenize("a") == ["a"]
    assert small.tokenize("m") == ["[UNK]"]


def test_training_is_the_same_in_another_process():
    code = (
        "from kexue.models.roformer import RoFormerV2Tokenizer as T\n"
        f"print(ascii(list(T.train({CORPUS!r}, vocab_size=70).vocab)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = list(RoFormerV2Tokenizer.train(CORPUS, vocab_size=70).vocab)
    assert done.stdout.strip() == ascii(here)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: RoFormerV2Tokenizer(WORDS), ValueError, r"absent: \['\[PAD\]'"),
        (lambda t: RoFormerV2Tokenizer([*VOCABULARY, "a"]), ValueError, "'a' twice"),
        (
            lambda t: RoFormerV2Tokenizer({w: 2 * i for i, w in enumerate(VOCABULARY)}),
            ValueError,
            "0 to 17, each once",
        ),
        (lambda t: t(["a", "b"], ["a"]), ValueError, "equal number, got 2 and 1"),
        (lambda t: t(["a"], max_length=2), ValueError, "max_length must be at least 3.*got 2"),
        (lambda t: t([]), ValueError, "at least one text"),
        (lambda t: t("a"), TypeError, "a single string: wrap it"),
        (lambda t: t([3]), TypeError, "strings, got a int"),
        (lambda t: t.decode([18]), ValueError, "between 0 and 17, got 18"),
        (lambda t: RoFormerV2Tokenizer.train(CORPUS, vocab_size=5), ValueError, "above the 5"),
        (lambda t: RoFormerV2Tokenizer.train(["aa"], vocab_size=6), ValueError, "room for one"),
        (lambda t: RoFormerV2Tokenizer.train(["", " "], vocab_size=9), ValueError, "hold words"),
    ],
)
def test_what_a_tokenizer_cannot_take_is_refused(tokenizer, call, error, words):
    with pytest.raises(error, match=words):
        call(tokenizer)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt or tokenizer\.json"):
        RoFormerV2Tokenizer.from_pretrained(tmp_path)


def collator(tokenizer, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return MaskedLanguageModelCollator(tokenizer, generator=generator, **options)


def test_shares_of_chosen_kept_and_replaced_words(tokenizer):
    n = 20_000
    batch = collator(tokenizer, max_length=n + 2)(["the " * n])
    inner, labels = batch.input_ids[0, 1:-1], batch.labels[0, 1:-1]
    chosen = labels != -100
    the = tokenizer.vocab["the"]
    assert (labels[chosen] == the).all()
    other = chosen & (inner != the) & (inner != tokenizer.mask_token_id)
    # A random token is again "the", or [MASK], once in seventeen; five standard errors of a count.
    for count, share in (
        (chosen.sum(), 0.15),
        ((chosen & (inner == tokenizer.mask_token_id)).sum(), 0.15 * (0.8 + 0.1 / 17)),
        ((chosen & (inner == the)).sum(), 0.15 * (0.1 + 0.1 / 17)),
        (other.sum(), 0.15 * 0.1 * 15 / 17),
    ):
        assert abs(count.item() - n * share) < 5 * math.sqrt(n * share)
    assert (inner[~chosen] == the).all()
    assert inner.min() >= 1


def test_random_tokens_are_drawn_for_each_piece_and_never_padding(tokenizer):
    collate = collator(tokenizer, mask_probability=1.0, replace_share=0.0, keep_share=0.0)
    batch = collate(["playing " * 200])
    inner = batch.input_ids[0, 1:-1]
    assert set(inner.tolist()) == set(range(1, tokenizer.vocab_size))
    first, second = inner[0::2], inner[1::2]
    # Equal by chance once in seventeen.
    assert (first == second).double().mean() < 0.2


def test_pieces_of_a_word_are_chosen_together(tokenizer):
    batch = collator(tokenizer, mask_probability=0.5)(["playing " * 200])
    chosen = batch.labels[0, 1:-1] != -100
    assert torch.equal(chosen[0::2], chosen[1::2])
    assert 0 < chosen.sum() < 400
    single = collator(tokenizer, mask_probability=0.5, whole_word=False)(["playing " * 200])
    chosen = single.labels[0, 1:-1] != -100
    assert not torch.equal(chosen[0::2], chosen[1::2])


def test_segmenter_says_what_a_word_is(tokenizer):
    def pairs_of_characters(text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    collate = collator(tokenizer, mask_probability=0.5, segmenter=pairs_of_characters)
    chosen = collate(["今天" * 100]).labels[0, 1:-1] != -100
    assert torch.equal(chosen[0::2], chosen[1::2])
    alone = collator(tokenizer, mask_probability=0.5)(["今天" * 100]).labels[0, 1:-1] != -100
    assert not torch.equal(alone[0::2], alone[1::2])


def test_special_tokens_and_padding_are_never_chosen(tokenizer):
    batch = collator(tokenizer, mask_probability=1.0)(["the [MASK] play", "a"])
    labelled = batch.labels != -100
    assert labelled.tolist() == [[False, True, False, True, False], [False, True] + [False] * 3]
    assert batch.input_ids[:, 0].tolist() == [2, 2]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert not batch.token_type_ids.any()


def test_texts_are_cut_to_the_maximum_length(tokenizer):
    batch = collator(tokenizer, max_length=6, mask_probability=0.0)(["a " * 50, "a"])
    assert batch.input_ids.shape == (2, 6)
    assert batch.input_ids[0, -1] == tokenizer.sep_token_id
    assert (batch.labels == -100).all()


def test_empty_texts_are_framed(tokenizer):
    assert collator(tokenizer)([""]).input_ids.tolist() == [[2, 3]]


def test_masking_follows_its_generator(tokenizer):
    texts = ["the playing a " * 30] * 3
    one, two, other = (collator(tokenizer, seed)(texts) for seed in (0, 0, 1))
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.labels, other.labels)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_probability": 1.5}, "mask_probability must be between 0 and 1, got 1.5"),
        ({"replace_share": -0.1}, "replace_share.*-0.1"),
        ({"keep_share": math.nan}, "keep_share.*nan"),
        ({"replace_share": 0.8, "keep_share": 0.3}, r"at most 1, got 0.8 \+ 0.3"),
        ({"max_length": 2}, "max_length must be at least 3"),
    ],
)
def test_shares_and_lengths_are_checked(tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        MaskedLanguageModelCollator(tokenizer, **options)


@pytest.mark.bad_input
def test_texts_and_words_to_mask_are_checked(tokenizer):
    with pytest.raises(ValueError, match="at least one text"):
        collator(tokenizer)([])
    with pytest.raises(TypeError, match="single string"):
        collator(tokenizer)("the play")
    with pytest.raises(TypeError, match="segmenter must return a list of strings"):
        collator(tokenizer, segmenter=lambda text: text)(["the"])
