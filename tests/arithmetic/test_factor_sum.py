"""The smallest a + b + c with N = ab + c: exhaustive enumeration, closed forms, large numbers."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import pairwise
from math import gamma, isqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kexue.arithmetic.factor_sum import (
    FactorSum,
    FactorSumBatch,
    factor_sum,
    factor_sum_batch,
    factor_sum_bounds,
    factor_sum_minimizers,
    factor_sum_table,
)
from kexue.arithmetic.factor_sum.blocks import _MARGIN, _BlockScan, _coefficients, _powers
from kexue.arithmetic.factor_sum.search import _Search

PI = "314159265358979323846264338327950288419716939937510582097494"
E = "271828182845904523536028747135266249775724709369995957496696"
SIXTY = [
    *(0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 8, 7, 8, 9, 8, 8, 9, 9, 10, 9, 10, 11, 12, 10, 10, 11, 12),
    *(11, 12, 11, 12, 12, 13, 14, 12, 12, 13, 14, 15, 13, 14, 13, 14, 15, 14, 15, 16, 14, 14, 15),
    *(16, 17, 18, 15, 16, 15, 16, 17, 18),
]


def layouts_by_brute_force(n: int) -> list[tuple[int, int, int]]:
    """All optimal layouts, by ascending c, from all pairs a <= b with ab <= n."""
    every = [
        (a + b + n - a * b, n - a * b, a, b)
        for a in range(n + 1)
        for b in range(a, n + 1)
        if a * b <= n
    ]
    smallest = min(every)[0]
    return [(a, b, c) for total, c, a, b in sorted(every) if total == smallest]


def sums_by_all_divisors(limit: int) -> np.ndarray:
    """S(k) = min(S(k-1) + 1, smallest a + b over all divisors), one k after the other."""
    smallest = np.arange(limit + 1) + 1
    for a in range(1, isqrt(limit) + 1):
        b = np.arange(a, limit // a + 1)
        smallest[a * b] = np.minimum(smallest[a * b], a + b)
    sums = [0]
    for pair in smallest[1:].tolist():
        sums.append(min(sums[-1] + 1, pair))
    return np.array(sums)


def triple(best: FactorSum) -> tuple[int, int, int]:
    return best.a, best.b, best.c


def triples(batch: FactorSumBatch) -> list[tuple[int, ...]]:
    return list(zip(batch.a.tolist(), batch.b.tolist(), batch.c.tolist(), strict=True))


def assert_is_layout(best: FactorSum) -> None:
    assert best.n == best.a * best.b + best.c
    assert 0 <= best.a <= best.b
    assert best.c >= 0
    assert best.total == best.a + best.b + best.c
    assert best.candidates >= 1


@pytest.fixture(scope="module")
def million() -> np.ndarray:
    return factor_sum_table(10**6)


def test_sums_of_the_first_sixty_numbers() -> None:
    assert [factor_sum(n).total for n in range(60)] == SIXTY
    assert factor_sum_table(59).tolist() == SIXTY


def test_every_minimiser_is_that_of_exhaustive_enumeration() -> None:
    for n in range(150):
        expected = layouts_by_brute_force(n)
        assert [triple(best) for best in factor_sum_minimizers(n)] == expected
        assert triple(factor_sum(n)) == triple(factor_sum(n, method="fourth_root")) == expected[0]


def test_table_is_the_divisor_recurrence(million: np.ndarray) -> None:
    np.testing.assert_array_equal(million[: 10**5 + 1], sums_by_all_divisors(10**5))


def test_cumulated_sums(million: np.ndarray) -> None:
    cumulated = [int(million[: 10**k + 1].sum()) for k in range(2, 7)]
    assert cumulated == [1450, 44391, 1370430, 42756118, 1342460891]
    assert [int(million[10**k]) for k in range(2, 7)] == [20, 65, 200, 641, 2000]


def test_how_many_numbers_reach_the_lower_bound(million: np.ndarray) -> None:
    reached = [total == isqrt(4 * n - 1) + 1 for n, total in enumerate(million.tolist()) if n > 5]
    assert sum(reached) == 44570


def test_largest_excess_over_the_lower_bound(million: np.ndarray) -> None:
    n = np.arange(2, 10**6 + 1)
    excess = (million[2:] - 2 * np.sqrt(n)) / n**0.25
    assert n[excess.argmax()] == 89743
    assert excess.max() == pytest.approx(1.89837257, abs=5e-9)  # the digits that are given
    late = excess[n > 10**5]
    assert n[n > 10**5][late.argmax()] == 956649
    assert late.max() == pytest.approx(1.84916118, abs=5e-9)


def test_scan_of_smaller_factors_finds_every_sum_where_its_proof_needs_enumeration(
    million: np.ndarray,
) -> None:
    # The same range of a as "square_root", for all n at once.
    n = np.arange(4, 115_000)
    root = np.sqrt(n).astype(int)
    least = np.sqrt(n // 2).astype(int)
    smallest = n.copy()
    for a in range(1, root.max() + 1):
        allowed = (least <= a) & (a <= root)
        total = a + n[allowed] // a + n[allowed] % a
        smallest[allowed] = np.minimum(smallest[allowed], total)
    np.testing.assert_array_equal(smallest, million[4:115_000])


def test_three_methods_have_the_same_sum(million: np.ndarray) -> None:
    for n in [*range(3000), *range(10**6 - 50, 10**6 + 1)]:
        for method in ("adaptive", "fourth_root", "square_root"):
            best = factor_sum(n, method=method)
            assert_is_layout(best)
            assert best.optimal
            assert best.total == million[n]


def test_smallest_remainder_among_ties() -> None:
    assert triple(factor_sum(10)) == (2, 5, 0)
    assert triple(factor_sum(4)) == (2, 2, 0)
    assert [triple(factor_sum(n)) for n in range(4)] == [(0, 0, n) for n in range(4)]


def test_scan_of_smaller_factors_first_finds_another_layout_at_52() -> None:
    def same(n: int) -> bool:
        return triple(factor_sum(n)) == triple(factor_sum(n, method="square_root"))

    assert next(n for n in range(100) if not same(n)) == 52


def test_number_of_minimisers() -> None:
    counts = Counter(len(factor_sum_minimizers(n)) for n in range(6, 2000))
    assert counts == {1: 1665, 2: 274, 3: 52, 4: 3}


def test_first_number_with_five_minimisers() -> None:
    assert max(len(factor_sum_minimizers(n)) for n in range(2628)) == 4
    best = factor_sum_minimizers(2628)
    expected = [(36, 73, 0), (37, 71, 1), (41, 64, 4), (43, 61, 5), (46, 57, 6)]
    assert [triple(layout) for layout in best] == expected
    assert {layout.total for layout in best} == {109}


def test_counterexample_of_the_article() -> None:
    best = factor_sum(130)
    assert (*triple(best), best.total) == (10, 13, 0, 23)


@pytest.mark.parametrize(
    ("digits", "length", "expected", "candidates"),
    [
        (PI, 10, (176779, 177713, 108, 354600), 111),
        (PI, 15, (55998789, 56101082, 95, 112099966), 143),
        (PI, 20, (17723775011, 17725302040, 1406, 35449078457), 1440),
        (PI, 25, (5604868835808, 5605113599660, 1153, 11209982436621), 3827),
        (PI, 30, (1772450087220576, 1772457614598448, 117231, 3544907701936255), 231073),
        (
            PI,
            35,
            (560499081475211936, 560499161804376682, 1473936, 1120998243281062554),
            None,
        ),
        (E, 10, (163033, 166732, 128, 329893), None),
        (E, 20, (16485903321, 16488522197, 7299, 32974432817), None),
        (E, 30, (1648716208535393, 1648726332880406, 261794, 3297442541677593), None),
        (
            E,
            38,
            (16487206554265304385, 16487218859739554645, 631450, 32974425414005490480),
            None,
        ),
    ],
)
def test_digits_of_pi_and_e(
    digits: str, length: int, expected: tuple[int, ...], candidates: int | None
) -> None:
    best = factor_sum(int(digits[: length + 1]))
    assert (*triple(best), best.total) == expected
    assert best.optimal
    if candidates is not None:
        assert best.candidates == candidates


@pytest.mark.parametrize(
    ("n", "c", "total"),
    [
        (10**9 + 7, 7, 63257),
        (2**61 - 1, 2794, 3037003296),
        (10**36 + 67, 3, 2 * 10**18 + 19),
    ],
)
def test_primes(n: int, c: int, total: int) -> None:
    best = factor_sum(n)
    assert_is_layout(best)
    assert (best.c, best.total) == (c, total)


@pytest.mark.parametrize("m", [3, 10, 12345, 10**9 + 9, 10**30 + 57, 7**350])
def test_certificates_of_any_size(m: int) -> None:
    assert triple(factor_sum(m * m)) == (m, m, 0)
    assert triple(factor_sum(m * m + m)) == (m, m + 1, 0)
    assert factor_sum(m * m + 1).total == 2 * m + 1
    for y in (1, isqrt(m - 1)):
        best = factor_sum(m * m - y * y)
        assert (triple(best), best.total) == ((m - y, m + y, 0), 2 * m)


def test_bounds_are_exact_integers_at_any_size() -> None:
    for n in [0, 1, 2, 3, 130, 10**12 + 1, 2**62 - 1, 10**80 - 1, 10**80, 10**80 + 1]:
        lower = factor_sum_bounds(n).lower
        assert lower == n < 4 or (lower - 1) ** 2 < 4 * n <= lower**2


@settings(deadline=None)
@given(n=st.integers(0, 10**18))
@example(n=2)
@example(n=5)
def test_bounds_enclose_the_smallest_sum(n: int) -> None:
    bounds, total = factor_sum_bounds(n), factor_sum(n).total
    assert bounds.lower <= total <= bounds.upper <= n
    # 2√n + 2 + √(1 + 4√n), each root taken down and two added for what that loses.
    assert bounds.upper <= isqrt(4 * n) + isqrt(1 + isqrt(16 * n)) + 4


def test_upper_bound_is_the_first_candidate_where_that_has_no_remainder() -> None:
    assert factor_sum_bounds(6).upper == 5
    assert factor_sum_bounds(10**12 - 10**6).upper == 2 * 10**6 - 1


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 10**14))
@example(n=144)
@example(n=5)
def test_early_stop_loses_nothing(n: int) -> None:
    quick, whole = factor_sum(n), factor_sum(n, method="fourth_root")
    assert_is_layout(quick)
    assert (triple(quick), quick.total) == (triple(whole), whole.total)
    assert quick.candidates <= whole.candidates


@settings(deadline=None)
@given(n=st.integers(0, 10**15))
def test_one_more_costs_at_most_one_more(n: int) -> None:
    assert factor_sum(n + 1).total <= factor_sum(n).total + 1


@pytest.mark.parametrize("n", [10**6 + 3, 10**10 + 19, 10**14 + 31])
def test_candidates_of_the_reference_methods(n: int) -> None:
    assert factor_sum(n, method="fourth_root").candidates == pytest.approx(2 * n**0.25 + 4, abs=6)
    if n < 10**12:
        whole = factor_sum(n, method="square_root")
        assert whole.candidates == isqrt(n) - isqrt(n // 2) + 1


@pytest.mark.parametrize("method", ["adaptive", "fourth_root", "square_root"])
def test_small_numbers_and_squares_need_one_candidate(method: str) -> None:
    for n in [0, 1, 2, 3, 4, 9, 144, 10**40]:
        assert factor_sum(n, method=method).candidates == 1


def test_candidates_follow_the_sixth_root() -> None:
    rng = np.random.default_rng(0)
    numbers = [int(n) for n in rng.integers(10**15, 2 * 10**15, size=400)]
    ratio = np.array([factor_sum(n).candidates / n ** (1 / 6) for n in numbers])
    # Weibull's law with shape 3/2 and scale (3/2)^(2/3); counts are rounded up and start at
    # ⌊2√n⌋, which adds up to two candidates to some four hundred.
    mean = 1.5 ** (2 / 3) * gamma(5 / 3)
    deviation = 1.5 ** (2 / 3) * (gamma(7 / 3) - gamma(5 / 3) ** 2) ** 0.5
    assert ratio.mean() == pytest.approx(mean, abs=5 * deviation / 400**0.5 + 2 / 316)


@pytest.mark.parametrize("n", [2**61 - 1, int(PI[:31])])
def test_any_time_answer_improves_with_the_budget(n: int) -> None:
    best = factor_sum(n)
    budgets = [1, 2, 10, 1000, 2798, 99_999, 100_001, 100_002, 150_000, 231_073, 10**6]
    answers = [factor_sum(n, max_candidates=budget) for budget in budgets]
    for budget, answer in zip(budgets, answers, strict=True):
        assert_is_layout(answer)
        assert answer.candidates <= budget
        assert answer.lower_bound <= best.total <= answer.total
        assert answer.optimal == (answer.lower_bound == answer.total)
    for less, more in pairwise(answers):
        assert less.total >= more.total
        assert less.lower_bound <= more.lower_bound
    assert answers[-1] == best
    assert not answers[0].optimal


def test_lower_bound_of_an_unfinished_search_is_the_next_candidate() -> None:
    n = int(PI[:26])
    answer = factor_sum(n, max_candidates=500)
    assert answer.lower_bound == isqrt(4 * n) + 500
    assert answer.candidates == 500


def test_budget_bounds_the_work_for_numbers_of_a_thousand_digits() -> None:
    answer = factor_sum(10**999 + 7**1001, max_candidates=2000)
    assert_is_layout(answer)
    assert answer.candidates == 2000
    assert not answer.optimal


def exact_fraction(n: int, p: int) -> Fraction:
    """The fractional part of (p - √(p² - 4n))/2, to 2**-200."""
    w = Fraction(isqrt((p * p - 4 * n) << 400), 1 << 200)
    return ((p - w) / 2) % 1


@pytest.mark.parametrize("digits", [25, 30, 36, 48, 60, 75, 90, 120])
def test_polynomials_err_by_less_than_the_margin(digits: int) -> None:
    rng = np.random.default_rng(digits)
    seen = 0
    for _ in range(60):
        n = int(PI[:20]) * 10 ** (digits - 20) + int(rng.integers(10**18))
        largest = 2 * isqrt(isqrt(n))
        distance = int(10 ** rng.uniform(5, np.log10(float(max(largest, 10**6)))))
        start = isqrt(4 * n) + distance
        length = _BlockScan(n).length(start)
        if length == 0:
            continue
        seen += 1
        centre = start + length // 2
        values = np.array(_coefficients(n, centre)) @ _powers(length)
        for i in [0, 1, length // 4, length // 2, length - 2, length - 1]:
            error = (Fraction(float(values[i])) - exact_fraction(n, start + i)) % 1
            # Truncation 1e-7, rounding 1.2e-7 and 0.6e-7: see the module.
            assert min(error, 1 - error) < 2.8e-7 < _MARGIN
    assert seen > 10


@pytest.mark.parametrize("digits", [30, 36, 45, 60])
def test_blocks_miss_no_small_remainder(digits: int) -> None:
    n = int(E[:digits])
    blocks = _BlockScan(n)
    for distance in (10**6, 10**7):
        start, stop = isqrt(4 * n) + distance, isqrt(4 * n) + distance + 40_000
        assert blocks.length(start) > 0
        # A hundredth of all p: with so large a reach, a shifted polynomial loses some.
        total = start + isqrt(start**2 - 4 * n) // 100
        suspects = set(blocks.suspects(start, stop, total, blocks.length(start)))
        small = set()
        for p in range(start, stop):
            gap = p * p - 4 * n
            q = isqrt(gap - 1) + 1
            q += (p - q) % 2
            if p + (q * q - gap) // 4 <= total:
                small.add(p)
        assert 300 < len(small) < 500
        assert small <= suspects
        assert len(suspects) <= len(small) + 10


@pytest.mark.parametrize("digits", [25, 30, 36, 45, 60])
def test_blocks_find_products_whose_fraction_errs_to_just_below_one(digits: int) -> None:
    # Where n = ab the fraction is 0. Toward the ends of a block the neglected sixth power, which is
    # positive, leaves the polynomial a little lower.
    rng = np.random.default_rng(digits)
    below = 0
    for _ in range(30):
        p = 2 * isqrt(10 ** (digits - 1)) + int(rng.integers(10**9))
        t = int(rng.integers(10**6, 10**7))
        q = isqrt(2 * t * p)  # then p exceeds 2√(ab) by about t
        q += (p - q) % 2
        n = (p * p - q * q) // 4
        start = p - int(rng.integers(64))
        scan = _BlockScan(n)
        length = scan.length(start)
        assert p in scan.suspects(start, start + 1000, p, length)
        value = np.array(_coefficients(n, start + length // 2)) @ _powers(length)[:, p - start]
        below += value < np.rint(value)
    assert below > 0


def test_blocks_stop_where_they_are_told() -> None:
    n = int(PI[:31])
    start = isqrt(4 * n) + 200_000
    every = list(_BlockScan(n).suspects(start, start + 10_001, 2 * start, 2048))
    assert every == list(range(start, start + 10_001))


@pytest.mark.slow
def test_whole_search_in_blocks_is_that_one_by_one() -> None:
    for n in (int(PI[:36]), int(E[:36]), 10**35 + 3):
        one_by_one = _Search(n)
        one_by_one.scan(one_by_one.next, 4 * one_by_one.total, adaptive=True)
        blocks = _Search(n)
        blocks.run(None)
        assert blocks.ties == one_by_one.ties


def test_numbers_with_an_index_are_accepted() -> None:
    for n in (np.int64(130), np.uint8(130), np.array(130), torch.tensor(130)):
        best = factor_sum(n, max_candidates=np.int32(50))
        assert triple(best) == (10, 13, 0)
        assert all(type(x) is int for x in (best.n, *triple(best), best.total))
    assert type(factor_sum_bounds(np.int64(130)).lower) is int


def test_results_do_not_change() -> None:
    with pytest.raises(AttributeError):
        factor_sum(130).total = 0  # type: ignore[misc]


def test_batch_of_all_numbers_up_to_a_limit_is_the_table(million: np.ndarray) -> None:
    n = np.arange(200_001)
    batch = factor_sum_batch(n)
    np.testing.assert_array_equal(batch.total, million[:200_001])
    np.testing.assert_array_equal(batch.a * batch.b + batch.c, n)
    assert (batch.a <= batch.b).all()
    assert min(batch.a.min(), batch.c.min()) == 0


def hard_numbers() -> Iterable[int]:
    """Numbers at the edges of what 64-bit integers and 53-bit floats hold."""
    yield from range(8)
    for m in (2**26, 2**26 + 1, 94906266, 2**31 - 1):
        yield from (m * m - 1, m * m, m * m + 1, m * m + m, m * m + m - 1, m * m - m)
    yield from (2**52 - 1, 2**53 + 1, 2**60 + 1, 2**61 - 1, 2**61, 2**62 - 2, 2**62 - 1)


def test_batch_is_the_scalar_search_on_hard_numbers() -> None:
    numbers = [n for n in hard_numbers() if n < 2**62]
    batch = factor_sum_batch(numbers)
    best = [factor_sum(n) for n in numbers]
    assert triples(batch) == [triple(layout) for layout in best]
    assert batch.total.tolist() == [layout.total for layout in best]


@settings(deadline=None, max_examples=40)
@given(numbers=st.lists(st.integers(0, 2**62 - 1) | st.integers(0, 10**6), max_size=6))
def test_batch_is_the_scalar_search(numbers: list[int]) -> None:
    assert triples(factor_sum_batch(numbers)) == [triple(factor_sum(n)) for n in numbers]


def test_batch_is_the_scalar_search_for_a_slab_and_more() -> None:
    n = np.random.default_rng(0).integers(10**11, 2 * 10**12, size=2500)
    assert triples(factor_sum_batch(n)) == [triple(factor_sum(int(x))) for x in n]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_batch_keeps_the_shape(shape: tuple[int, ...]) -> None:
    n = np.full(shape, 130)
    batch = factor_sum_batch(n)
    for array in (batch.a, batch.b, batch.c, batch.total):
        assert array.shape == shape
        assert array.dtype == np.int64
    assert (batch.total == 23).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tensors_in_tensors_out(dtype: torch.dtype) -> None:
    n = torch.tensor([[10, 130, 3], [0, 52, 255]], dtype=dtype)
    batch, plain = factor_sum_batch(n), factor_sum_batch(n.numpy())
    for name in ("a", "b", "c", "total"):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64
        assert tensor.device == n.device
        np.testing.assert_array_equal(tensor.numpy(), getattr(plain, name))


@pytest.mark.gpu
def test_tensors_stay_on_their_device() -> None:
    assert factor_sum_batch(torch.tensor([10, 130]).cuda()).total.is_cuda


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64, ">i8"])
def test_every_integer_dtype_is_accepted(dtype: Any) -> None:
    assert factor_sum_batch(np.array([10, 120], dtype)).total.tolist() == [7, 22]


def test_empty_list_is_an_empty_batch() -> None:
    assert factor_sum_batch([]).total.shape == (0,)


def test_table_of_the_smallest_limits() -> None:
    assert factor_sum_table(0).tolist() == [0]
    assert factor_sum_table(1).tolist() == [0, 1]
    assert factor_sum_table(np.int16(6)).dtype == np.int64


def test_torch_is_not_imported_for_integers() -> None:
    code = (
        "import sys; from kexue.arithmetic.factor_sum import factor_sum_batch;"
        "factor_sum_batch([130]); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


SCALAR_DOORS: list[Callable[..., Any]] = [
    factor_sum,
    factor_sum_minimizers,
    factor_sum_bounds,
]


@pytest.mark.bad_input
@pytest.mark.parametrize("door", SCALAR_DOORS)
@pytest.mark.parametrize(
    ("n", "kind"), [(1.0, "float"), (True, "bool"), ("12", "str"), (None, "NoneType")]
)
def test_only_integers_are_accepted(door: Callable[..., Any], n: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"^n must be an integer, got {kind}$"):
        door(n)


@pytest.mark.bad_input
@pytest.mark.parametrize("door", SCALAR_DOORS)
def test_negative_numbers_are_refused(door: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^n must be non-negative, got -1$"):
        door(-1)


@pytest.mark.bad_input
def test_limit_is_checked() -> None:
    with pytest.raises(TypeError, match=r"^limit must be an integer, got float$"):
        factor_sum_table(1e6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^limit must be non-negative, got -3$"):
        factor_sum_table(-3)


@pytest.mark.bad_input
def test_method_choices_are_listed() -> None:
    words = "one of adaptive, fourth_root, square_root, got 'greedy'"
    with pytest.raises(ValueError, match=words):
        factor_sum(130, method="greedy")  # type: ignore[arg-type]


@pytest.mark.bad_input
def test_budget_is_checked() -> None:
    for budget in (0, -5):
        with pytest.raises(ValueError, match=f"max_candidates must be at least 1, got {budget}"):
            factor_sum(130, max_candidates=budget)
    for wrong in (1.5, "9", True):
        with pytest.raises(TypeError, match="max_candidates must be an integer, got "):
            factor_sum(130, max_candidates=wrong)  # type: ignore[arg-type]
    for method in ("fourth_root", "square_root"):
        with pytest.raises(ValueError, match=f"needs the method 'adaptive', got '{method}'"):
            factor_sum(130, method=method, max_candidates=9)  # type: ignore[arg-type]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (np.ones(3), "float64"),
        (np.ones(3, bool), "bool"),
        (torch.ones(3), "float32"),
        (torch.ones(3, dtype=torch.bfloat16), "bfloat16"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        ([1, 2.5], "float64"),
        ([True, False], "bool"),
        (2.0, "float64"),
        (np.array([1, 2], object), "object"),
    ],
)
def test_batch_needs_an_integer_dtype(n: Any, dtype: str) -> None:
    with pytest.raises(TypeError, match=f"^n must have an integer dtype, got {dtype}$"):
        factor_sum_batch(n)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("n", "words"),
    [
        ([5, -1], "non-negative, got -1"),
        (np.array([[-(2**63)]]), f"non-negative, got -{2**63}"),
        ([2**62], f"below 2\\*\\*62, got {2**62}"),
        (np.array([2**64 - 1], np.uint64), f"below 2\\*\\*62, got {2**64 - 1}"),
        ([[1, 10**30]], f"below 2\\*\\*62, got {10**30}"),
        (torch.tensor([3, -7]), "non-negative, got -7"),
    ],
)
def test_batch_names_the_number_that_is_out_of_range(n: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^n must be {words}$"):
        factor_sum_batch(n)
