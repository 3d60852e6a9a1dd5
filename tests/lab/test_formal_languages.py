"""Fifteen tasks against plain Python, and a score against models whose accuracy is known."""

from __future__ import annotations

import itertools
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kexue.lab.formal_languages import (
    TASKS,
    ExtrapolationResult,
    FormalLanguageTask,
    evaluate_length_extrapolation,
)

END = ["end"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Each task once more, one string at a time, in plain Python


def yes_or_no(truth: bool) -> list[str]:
    return ["yes" if truth else "no"]


def modulo_5(expression: str) -> list[str]:
    return [str(eval(expression) % 5)]


def unknown(equation: str) -> list[str]:
    left, right = equation.split("=")
    (solution,) = [z for z in range(5) if (eval(left.replace("z", str(z))) - int(right)) % 5 == 0]
    return [str(solution)]


def stack(symbols: list[str]) -> list[str]:
    pile: list[str] = []
    for symbol in symbols:
        if symbol != "pop":
            pile.append(symbol[-1])
        elif pile:
            pile.pop()
    return pile + END


def binary(text: str, operator: str) -> list[str]:
    one, two = (int(number, 2) for number in text.split(operator))
    return [*bin(one + two if operator == "+" else one * two)[2:], *END]


def root(text: str) -> list[str]:
    number, low = int(text, 2), 0
    for bit in reversed(range(math.ceil(len(text) / 2))):
        if (low + 2**bit) ** 2 <= number:
            low += 2**bit
    return list(bin(low)[2:].zfill(math.ceil(len(text) / 2)))


def missing(text: str) -> list[str]:
    half = len(text) // 2
    return [text[(text.index("_") + half) % len(text)]]


PLAIN: dict[str, Callable[[list[str]], list[str]]] = {
    "even_pairs": lambda s: yes_or_no(sum(a != b for a, b in itertools.pairwise(s)) % 2 == 0),
    "modular_arithmetic_simple": lambda s: modulo_5("".join(s)),
    "parity_check": lambda s: yes_or_no(s.count("b") % 2 == 0),
    "cycle_navigation": lambda s: [str((s.count("1") - s.count("2")) % 5)],
    "modular_arithmetic": lambda s: modulo_5("".join(s)),
    "reverse_string": lambda s: s[::-1],
    "solve_equation": lambda s: unknown("".join(s)),
    "stack_manipulation": stack,
    "binary_addition": lambda s: binary("".join(s), "+"),
    "binary_multiplication": lambda s: binary("".join(s), "*"),
    "compute_sqrt": lambda s: root("".join(s)),
    "duplicate_string": lambda s: s + s,
    "missing_duplicate": lambda s: missing("".join(s)),
    "odds_first": lambda s: (
        [x for i, x in enumerate(s, 1) if i % 2] + [x for i, x in enumerate(s, 1) if not i % 2]
    ),
    "bucket_sort": sorted,
}


def strings(task: FormalLanguageTask, inputs: Tensor) -> list[list[str]]:
    return [[task.input_vocabulary[i] for i in row] for row in inputs.tolist()]


def answers(task: FormalLanguageTask, targets: Tensor, mask: Tensor) -> list[list[str]]:
    return [
        [task.output_vocabulary[i] for i in row[scored].tolist()]
        for row, scored in zip(targets, mask, strict=True)
    ]


def test_there_are_fifteen_tasks_in_three_levels() -> None:
    levels = Counter(task.level for task in TASKS.values())
    assert levels == {"regular": 4, "deterministic context-free": 4, "context-sensitive": 7}
    assert list(TASKS) == list(PLAIN)
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize(
    ("name", "string", "answer"),
    [
        ("even_pairs", "aabba", "yes"),
        ("modular_arithmetic_simple", "1+2-4", "4"),
        ("parity_check", "aaabba", "yes"),
        ("cycle_navigation", "010211", "2"),
        ("modular_arithmetic", "-(1-2)*(4-3*(-2))", "0"),
        ("reverse_string", "aabba", "abbaa"),
        ("solve_equation", "-(1-2)*(4-z*(-2))=0", "3"),
        ("binary_addition", "10010+101", "10111end"),
        ("binary_multiplication", "100*10110", "1011000end"),
        ("duplicate_string", "abaab", "abaababaab"),
        ("missing_duplicate", "ab_aba", "a"),
        ("odds_first", "aaabaa", "aaaaba"),
        ("bucket_sort", "421302214", "011222344"),
    ],
)
def test_examples_of_the_article(name: str, string: str, answer: str) -> None:
    assert "".join(TASKS[name].solve(string)) == answer


def test_stack_of_the_article() -> None:
    actions = [*"abbaa", "pop", "push a", "pop"]
    assert TASKS["stack_manipulation"].solve(actions) == [*"abba", "end"]


def test_root_of_forty_one_is_six() -> None:
    """The article answers 101001 by 101; but 101 is 5, 41 < 49, and so the root is 110."""
    assert TASKS["compute_sqrt"].solve("101001") == list("110")
    assert TASKS["compute_sqrt"].solve("0001") == list("01")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13, 60, 501])
def test_drawn_strings_have_the_answers_of_plain_python(name: str, length: int) -> None:
    task = TASKS[name]
    if length < task.minimum_length:
        pytest.skip("no strings of this length")
    batch = task.sample(20, length, generator=seeded(length))
    given = strings(task, batch.inputs)
    assert answers(task, batch.targets, batch.mask) == [PLAIN[name](string) for string in given]


@pytest.mark.parametrize("name", TASKS)
def test_solve_agrees_with_plain_python(name: str) -> None:
    task = TASKS[name]
    for length in (task.minimum_length, 7, 40):
        for string in strings(task, task.sample(5, length, generator=seeded(1)).inputs):
            assert task.solve(string) == PLAIN[name](string)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [3, 4, 31])
def test_shape_of_a_batch(name: str, length: int) -> None:
    task = TASKS[name]
    batch = task.sample(6, length, generator=seeded())
    shortened = {"modular_arithmetic_simple": 1 - length % 2, "missing_duplicate": length % 2}
    assert batch.inputs.shape == (6, length - shortened.get(name, 0))
    assert batch.targets.shape == batch.mask.shape == (6, task.output_length(length))
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert bool(((batch.inputs >= 0) & (batch.inputs < len(task.input_vocabulary))).all())
    assert bool(((batch.targets >= 0) & (batch.targets < len(task.output_vocabulary))).all())
    assert not batch.targets[~batch.mask].any()
    # Padding comes last, and behind an end.
    assert bool((batch.mask[:, :-1] >= batch.mask[:, 1:]).all())
    if "end" in task.output_vocabulary:
        assert all(answer[-1:] == END for answer in answers(task, batch.targets, batch.mask))
    else:
        assert bool(batch.mask.all())


@pytest.mark.parametrize("name", TASKS)
def test_every_symbol_of_both_vocabularies_is_drawn(name: str) -> None:
    task = TASKS[name]
    batch = task.sample(300, 12, generator=seeded())
    assert batch.inputs.unique().tolist() == list(range(len(task.input_vocabulary)))
    assert batch.targets[batch.mask].unique().tolist() == list(range(len(task.output_vocabulary)))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("modular_arithmetic_simple", r"[0-4]([-+*][0-4])*"),
        ("solve_equation", r"[-+()0-4]*z[-+()0-4]*=[0-4]"),
        ("binary_addition", r"1[01]*\+1[01]*"),
        ("binary_multiplication", r"1[01]*\*1[01]*"),
        ("compute_sqrt", r"1[01]*"),
        ("missing_duplicate", r"[ab]*_[ab]*"),
    ],
)
def test_drawn_strings_are_of_the_kind_that_is_described(name: str, pattern: str) -> None:
    task = TASKS[name]
    for length in range(task.minimum_length, 12):
        for string in strings(task, task.sample(10, length, generator=seeded(length)).inputs):
            assert re.fullmatch(pattern, "".join(string))


def test_a_stack_comes_before_its_actions() -> None:
    task = TASKS["stack_manipulation"]
    heights = Counter()
    for string in strings(task, task.sample(4000, 5, generator=seeded()).inputs):
        kinds = "".join("s" if symbol in "ab" else "t" for symbol in string)
        assert re.fullmatch("s+t+", kinds)
        heights[kinds.count("s")] += 1
    assert stats.chisquare([heights[k] for k in (1, 2, 3, 4)]).pvalue > 1e-4


# Expressions


def grammar(text: str) -> bool:
    """Whether a string is d, -d, (d), (-d) or (E op E), by trying every operator."""
    if len(text) <= 4:
        return re.fullmatch(r"-?[0-4]|\(-?[0-4]\)", text) is not None
    if text[0] != "(" or text[-1] != ")":
        return False
    inside = text[1:-1]
    return any(
        c in "+-*" and grammar(inside[:i]) and grammar(inside[i + 1 :])
        for i, c in enumerate(inside)
        if inside[:i].count("(") == inside[:i].count(")")
    )


def test_drawn_expressions_follow_the_grammar() -> None:
    task = TASKS["modular_arithmetic"]
    for length in range(1, 25):
        for string in strings(task, task.sample(10, length, generator=seeded(length)).inputs):
            assert grammar("".join(string))


def test_expressions_are_divided_anywhere_alike() -> None:
    task = TASKS["modular_arithmetic"]
    # In (E op E) with eight symbols, the left one has 1 to 4 of five, the right one the others.
    left = Counter()
    for string in strings(task, task.sample(4000, 8, generator=seeded()).inputs):
        text = "".join(string)[1:-1]
        left[next(i for i in range(1, 5) if grammar(text[:i]) and grammar(text[i + 1 :]))] += 1
    assert stats.chisquare([left[k] for k in (1, 2, 3, 4)]).pvalue > 1e-4


def test_the_hidden_digit_is_any_one_of_the_expression() -> None:
    task = TASKS["solve_equation"]
    place = Counter()
    for string in strings(task, task.sample(12_000, 9, generator=seeded()).inputs):
        if re.fullmatch(r"\([0-4z][-+]\([0-4z]\)\)", text := "".join(string[:-2])):
            place[text.index("z")] += 1
    assert stats.chisquare([place[1], place[4]]).pvalue > 1e-4


expressions = st.recursive(
    st.sampled_from("01234"),
    lambda inner: st.one_of(
        inner.map(lambda e: f"({e})"),
        inner.map(lambda e: f"-{e}"),
        st.tuples(inner, st.sampled_from("+-*"), inner).map("".join),
    ),
    max_leaves=25,
)


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_the_parser_agrees_with_that_of_python(expression: str) -> None:
    assert TASKS["modular_arithmetic"].solve(expression) == modulo_5(expression)


def test_brackets_may_be_deeper_than_python_recurses() -> None:
    expression = "(" * 20_000 + "3" + ")" * 20_000
    assert TASKS["modular_arithmetic"].solve(expression) == ["3"]


# The score


def from_solver(task: FormalLanguageTask) -> Callable[[Tensor, int], Tensor]:
    """A model that is always right, and claims "padding" is the last symbol."""

    def predict(inputs: Tensor, output_length: int) -> Tensor:
        symbols = len(task.output_vocabulary)
        logits = torch.zeros(len(inputs), output_length, symbols)
        logits[..., -1] = 1
        for row, string in zip(logits, strings(task, inputs), strict=True):
            for place, symbol in enumerate(task.solve(string)):
                row[place, task.output_vocabulary.index(symbol)] = 2
        return logits

    return predict


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_is_right_scores_one(name: str) -> None:
    result = evaluate_length_extrapolation(
        from_solver(TASKS[name]), name, [3, 8], batch_size=5, generator=seeded()
    )
    assert result == ExtrapolationResult((3, 8), (1.0, 1.0), (1.0, 1.0), 1.0)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_guesses_scores_its_random_accuracy(name: str) -> None:
    task, guesses = TASKS[name], seeded(7)

    def guess(inputs: Tensor, output_length: int) -> Tensor:
        shape = len(inputs), output_length, len(task.output_vocabulary)
        return torch.rand(shape, generator=guesses)

    draws = 2000
    result = evaluate_length_extrapolation(
        guess, task, [10, 11], batch_size=draws, generator=seeded()
    )
    chance = task.random_accuracy
    # Guesses are independent; a string has one at least.
    error = math.sqrt(chance * (1 - chance) / (2 * draws))
    assert abs(result.score - chance) < 5 * error


def test_padding_is_not_scored_and_one_wrong_symbol_spoils_a_sequence() -> None:
    task = TASKS["binary_addition"]
    right = from_solver(task)

    def wrong_at_first(inputs: Tensor, output_length: int) -> Tensor:
        logits = right(inputs, output_length)
        # The leading bit of every sum is 1; half of the strings get a 0.
        logits[: len(inputs) // 2, 0, 0] = 3
        return logits

    scored = task.sample(8, 9, generator=seeded()).mask
    result = evaluate_length_extrapolation(
        wrong_at_first, task, [9], batch_size=8, generator=seeded()
    )
    assert result.token_accuracy == (pytest.approx(1 - 4 / int(scored.sum()), rel=1e-12),)
    assert result.sequence_accuracy == (0.5,)
    assert result.score == result.token_accuracy[0]


def test_models_see_the_strings_of_the_generator_whatever_they_draw_themselves() -> None:
    seen: list[list[Tensor]] = [[], []]

    def model(number: int) -> Callable[[Tensor, int], Tensor]:
        def predict(inputs: Tensor, output_length: int) -> Tensor:
            assert not torch.is_grad_enabled()
            seen[number].append(inputs)
            torch.rand(number + 1)
            return torch.zeros(len(inputs), output_length, 5)

        return predict

    for number in (0, 1):
        evaluate_length_extrapolation(model(number), "bucket_sort", [4, 9], generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert [tuple(batch.shape) for batch in seen[0]] == [(64, 4), (64, 9)]


@pytest.mark.parametrize("name", TASKS)
def test_a_generator_decides_alone(name: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (TASKS[name].sample(8, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.inputs, same.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_tasks_and_results_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(TASKS))
    for name, task in TASKS.items():
        one, two = (t.sample(3, 9, generator=seeded()) for t in (task, again[name]))
        assert torch.equal(one.targets, two.targets)
    result = ExtrapolationResult((3,), (0.5,), (0.0,), 0.5)
    assert pickle.loads(pickle.dumps(result)) == result


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "string", "message"),
    [
        ("even_pairs", "", "at least 1 symbols, got 0"),
        ("even_pairs", "abc", "even_pairs knows the symbols"),
        ("modular_arithmetic_simple", "1+", "in turns"),
        ("modular_arithmetic_simple", "123", "in turns"),
        ("modular_arithmetic", "1+", "a number at the end"),
        ("modular_arithmetic", "(1+2", "a closing bracket"),
        ("modular_arithmetic", "1)", "an open bracket before"),
        ("modular_arithmetic", "1+*2", "a number before '\\*'"),
        ("modular_arithmetic", "(1)2", "an operator before '2'"),
        ("modular_arithmetic", "()", "a number before '\\)'"),
        ("solve_equation", "z+1", "expected one '='"),
        ("solve_equation", "z-z=0", "one solution z, got 5"),
        ("solve_equation", "1+1=3", "one solution z, got 0"),
        ("solve_equation", "z=", "at least 3 symbols"),
        ("solve_equation", "z+1=", "a number at the end"),
        ("stack_manipulation", ["a", "pop", "b"], "after an action"),
        ("binary_addition", "101", "one operator"),
        ("binary_addition", "1+1+1", "one operator"),
        ("binary_multiplication", "11*", "one operator"),
        ("missing_duplicate", "abab", "one of them a blank"),
        ("missing_duplicate", "ab_", "even number"),
        ("missing_duplicate", "bbba_b", "halves differ"),
    ],
)
def test_strings_of_another_kind_are_refused(name: str, string: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name].solve(string)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", TASKS)
def test_lengths_below_the_minimum_are_refused_by_name(name: str) -> None:
    task = TASKS[name]
    for call in (lambda n: task.sample(2, n), task.output_length):
        with pytest.raises(ValueError, match=f"{name} needs strings of at least"):
            call(task.minimum_length - 1)


@pytest.mark.bad_input
def test_bad_requests_are_refused() -> None:
    def narrow(inputs: Tensor, output_length: int) -> Tensor:
        return torch.zeros(len(inputs), output_length, 4)

    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TASKS["odds_first"].sample(0, 5)
    with pytest.raises(ValueError, match=r"task must be one of even_pairs, .*, got 'sorting'"):
        evaluate_length_extrapolation(narrow, "sorting", [5])
    with pytest.raises(ValueError, match="at least one length"):
        evaluate_length_extrapolation(narrow, "bucket_sort", [])
    with pytest.raises(ValueError, match=r"shape \(64, 7, 5\), got \(64, 7, 4\)"):
        evaluate_length_extrapolation(narrow, "bucket_sort", [7])
