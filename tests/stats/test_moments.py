"""Moments against exact rationals, exhaustive enumeration, brute force and real processes."""

from __future__ import annotations

import io
import itertools
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats.moments import (
    MomentAccumulator,
    bootstrap_bias,
    c4,
    central_moment,
    covariance,
    cumulant,
    jackknife,
    mean,
    measure_bias,
    standard_deviation,
    variance,
)

EPS = np.finfo(float).eps
PRIMES = np.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0])
WEIGHTS = np.array([1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0])

# order: (m_p, h_p, k_p), exact rationals of the eight primes.
EXACT = {
    2: (Fraction(2287, 64), Fraction(2287, 56), Fraction(2287, 56)),
    3: (Fraction(13281, 256), Fraction(4427, 56), Fraction(4427, 56)),
    4: (Fraction(8513629, 4096), Fraction(599507, 280), Fraction(-691981, 280)),
    5: (Fraction(55195665, 8192), Fraction(502835, 56), Fraction(-205675, 8)),
    6: (Fraction(37110558667, 262144), Fraction(5302799, 56), Fraction(4650313, 8)),
}
# Eight terms and up to four products of sums: at most some hundred roundings of terms that are
# at most a hundred times the result.
ROUNDING = 1e-12


@pytest.mark.parametrize("order", EXACT)
def test_moments_and_cumulants_of_eight_primes_are_the_exact_rationals(order: int) -> None:
    m, h, k = map(float, EXACT[order])
    assert central_moment(PRIMES, order, unbiased=False) == pytest.approx(m, rel=ROUNDING)
    assert central_moment(PRIMES, order) == pytest.approx(h, rel=ROUNDING)
    assert cumulant(PRIMES, order) == pytest.approx(k, rel=ROUNDING)


def test_order_one_is_zero_and_the_mean() -> None:
    assert central_moment(PRIMES, 1) == 0.0
    assert central_moment(PRIMES, 1, unbiased=False) == 0.0
    assert cumulant(PRIMES, 1) == mean(PRIMES) == 77 / 8


def population_values(values: np.ndarray) -> dict[str, dict[int, float]]:
    """Central moments and cumulants of the uniform law on a few values."""
    c = values - values.mean()
    mu = {p: float((c**p).mean()) for p in range(2, 7)}
    kappa = {
        2: mu[2],
        3: mu[3],
        4: mu[4] - 3 * mu[2] ** 2,
        5: mu[5] - 10 * mu[3] * mu[2],
        6: mu[6] - 15 * mu[4] * mu[2] - 10 * mu[3] ** 2 + 30 * mu[2] ** 3,
    }
    return {"moment": mu, "cumulant": kappa}


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("order", [2, 3, 4, 5, 6])
def test_the_average_over_all_samples_of_a_population_is_the_truth(order: int, n: int) -> None:
    values = np.array([0.0, 1.0, 4.0, 5.5])
    truth = population_values(values)
    samples = np.array(list(itertools.product(values, repeat=n)))
    scale = 6.0**order  # the range to the power of the order bounds every term
    average = central_moment(samples, order, axis=1).mean()
    assert average == pytest.approx(truth["moment"][order], abs=1e3 * EPS * scale)
    average = cumulant(samples, order, axis=1).mean()
    assert average == pytest.approx(truth["cumulant"][order], abs=1e4 * EPS * scale)
    own = cumulant(values, order, unbiased=False)
    assert own == pytest.approx(truth["cumulant"][order], abs=1e3 * EPS * scale)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_divisor_n_variance_misses_one_nth(n: int) -> None:
    values = np.array([0.0, 1.0, 4.0, 5.5])
    samples = np.array(list(itertools.product(values, repeat=n)))
    average = variance(samples, axis=1, correction=0).mean()
    assert average == pytest.approx((1 - 1 / n) * np.var(values), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        (2, 0.79788456080287),
        (3, 0.88622692545276),
        (4, 0.92131773192356),
        (10, 0.97265927412159),
        (100, 0.99747797607126),
        (10**6, 0.99999974999978),
        (10**9, 0.99999999975),
    ],
)
def test_c4(n: int, value: float) -> None:
    assert c4(n) == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("n", [2, 5, 59, 60, 99, 100, 101, 1000, 123_457, 10**9])
def test_c4_agrees_with_fifty_digits_of_the_gamma_function(n: int) -> None:
    with mpmath.workdps(50):
        exact = mpmath.sqrt(mpmath.mpf(2) / (n - 1)) * mpmath.gammaprod(
            [mpmath.mpf(n) / 2], [mpmath.mpf(n - 1) / 2]
        )
    # Two gamma functions of a few units each below n = 100, a truncated series above.
    assert c4(n) == pytest.approx(float(exact), rel=8 * EPS)


def test_standard_deviation_has_three_corrections() -> None:
    s = math.sqrt(2287 / 56)
    assert standard_deviation(PRIMES, correction="bessel") == pytest.approx(s, rel=4 * EPS)
    assert standard_deviation(PRIMES, correction="c4") == pytest.approx(s / c4(8), rel=8 * EPS)
    assert standard_deviation(PRIMES, correction="none") == pytest.approx(PRIMES.std(), rel=4 * EPS)


def test_c4_makes_the_deviation_of_normal_data_unbiased() -> None:
    x = np.random.default_rng(0).standard_normal((5, 200_000))
    s = standard_deviation(x, axis=0)
    assert abs(s.mean() - 1) < 4 * s.std() / math.sqrt(200_000)


def test_weights_of_both_kinds_are_numpys() -> None:
    frequency = variance(PRIMES, weights=WEIGHTS)
    reliability = variance(PRIMES, weights=WEIGHTS, weight_type="reliability")
    assert frequency == pytest.approx(24.976315789474, abs=5e-13)
    assert reliability == pytest.approx(27.914705882353, abs=5e-13)
    x = np.stack([PRIMES, PRIMES**2], axis=1)
    np.testing.assert_allclose(
        covariance(x, weights=WEIGHTS), np.cov(x.T, fweights=WEIGHTS.astype(int)), rtol=1e-13
    )
    np.testing.assert_allclose(
        covariance(x, weights=WEIGHTS, weight_type="reliability"),
        np.cov(x.T, aweights=WEIGHTS),
        rtol=1e-13,
    )


def test_frequency_weights_are_copies() -> None:
    copies = np.repeat(PRIMES, WEIGHTS.astype(int))
    assert variance(PRIMES, weights=WEIGHTS) == pytest.approx(variance(copies), rel=1e-14)
    assert mean(PRIMES, weights=WEIGHTS) == pytest.approx(copies.mean(), rel=1e-14)


def test_the_scale_of_reliability_weights_does_not_matter() -> None:
    one = variance(PRIMES, weights=WEIGHTS, weight_type="reliability")
    other = variance(PRIMES, weights=WEIGHTS * 1e-3, weight_type="reliability")
    assert one == pytest.approx(other, rel=1e-14)


@pytest.mark.bad_input
def test_a_single_sample_with_weight_has_no_unbiased_variance() -> None:
    for weight_type, w in (("reliability", [0.1, 0, 0]), ("frequency", [1, 0, 0])):
        with pytest.raises(ValueError, match="more than 1 samples, got 1"):
            variance(PRIMES[:3], weights=np.array(w), weight_type=weight_type)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (1, 2), (2, 0, 1)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_axes_are_numpys(axis: Any, keepdims: bool) -> None:
    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    ours = variance(x, axis=axis, keepdims=keepdims)
    theirs = x.var(axis=axis, ddof=1, keepdims=keepdims)
    assert np.shape(ours) == np.shape(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    means = x.mean(axis=axis, keepdims=keepdims)
    # Means near 0 keep the absolute error of their terms.
    np.testing.assert_allclose(mean(x, axis=axis, keepdims=keepdims), means, atol=1e-14)


@pytest.mark.parametrize("shape", [(300_000, 3), (3, 300_000), (2, 200_000, 2), (7, 60_000)])
@pytest.mark.parametrize("axis", [0, -1, None])
def test_large_arrays_are_computed_in_blocks_with_the_same_result(shape: Any, axis: Any) -> None:
    x = np.random.default_rng(0).exponential(size=shape)
    c = x - x.mean(axis=axis, keepdims=True)
    np.testing.assert_allclose(
        central_moment(x, 3, axis=axis, unbiased=False), (c**3).mean(axis=axis),
        rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    weights = np.random.default_rng(1).uniform(size=shape)
    expected = np.average((x - np.average(x, axis, weights, keepdims=True)) ** 2, axis, weights)
    np.testing.assert_allclose(
        variance(x, axis=axis, correction=0, weights=weights), expected, rtol=1e-10
    )


def test_covariance_of_many_rows_is_computed_in_blocks() -> None:
    x = np.random.default_rng(0).standard_normal((200_000, 3)) + 1e6
    np.testing.assert_allclose(covariance(x), np.cov(x.T), rtol=1e-10, atol=1e-12)


def test_an_offset_takes_no_digits() -> None:
    # The sums are representable, so that their cumulants are those of the primes.
    for order in range(2, 7):
        exact = float(EXACT[order][2])
        assert cumulant(PRIMES + 2.0**26, order) == pytest.approx(exact, rel=1e-9)
        stream = MomentAccumulator(max_order=6)
        for value in PRIMES + 2.0**40:
            stream.update(np.array([value]))
        assert stream.cumulant(order) == pytest.approx(exact, rel=1e-9)


def test_float32_and_half_precision_accumulate_in_double() -> None:
    x = (torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 1000).float()
    exact = float(x.double().var())
    assert float(variance(x)) == pytest.approx(exact, rel=1e-6)
    assert variance(x).dtype == torch.float32
    half = (torch.arange(5000) % 7).half()
    assert float(mean(half)) == pytest.approx(float(half.double().mean()), rel=1e-3)
    assert variance(half).dtype == torch.float16


def test_integers_give_doubles() -> None:
    assert variance(PRIMES.astype(int)).dtype == np.float64
    assert variance(torch.tensor([1, 2, 4])).dtype == torch.float64
    assert variance([1, 2, 4]) == pytest.approx(7 / 3, rel=4 * EPS)


def test_nan_is_data() -> None:
    x = np.array([[1.0, 2.0], [np.nan, 3.0], [2.0, 5.0]])
    np.testing.assert_array_equal(np.isnan(variance(x, axis=0)), [True, False])
    np.testing.assert_array_equal(np.isnan(cumulant(x, 3, axis=0)), [True, False])
    assert mean(np.array([np.inf, 1.0])) == np.inf


def test_constant_data_have_variance_and_gradients_of_exactly_zero() -> None:
    x = torch.full((10,), 0.1, dtype=torch.float64, requires_grad=True)
    for statistic in (variance, standard_deviation, partial(central_moment, order=4)):
        value = statistic(x)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.item() == 0.0
        assert torch.equal(gradient, torch.zeros_like(x))


ONE_GRAPH = """
import torch
from kexue.stats.moments import (
    central_moment, covariance, cumulant, mean, standard_deviation, variance,
)

def all_of_them(x):
    return (
        mean(x, axis=1), variance(x, axis=0), standard_deviation(x), covariance(x),
        central_moment(x, 4), cumulant(x, 6, axis=1),
    )

x = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
for one, other in zip(compiled(x), all_of_them(x), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
"""


@pytest.mark.slow
def test_array_functions_compile_into_one_graph() -> None:
    # In a process of its own, where no shape checks wrap the functions: dynamo cannot trace those.
    done = subprocess.run(
        [sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_one_element_accumulators_merge_to_half_the_squared_distance() -> None:
    a, b = 3.25, -1.5
    one, two = (MomentAccumulator(max_order=3).update(np.array([value])) for value in (a, b))
    one.merge(two)
    assert one.variance(correction=0) * 2 == (a - b) ** 2 / 2
    assert one.central_moment(3, unbiased=False) == 0.0
    assert one.mean == (a + b) / 2


def standardised(accumulator: MomentAccumulator) -> np.ndarray:
    scale = accumulator.variance(correction=0) ** 0.5
    return np.array([accumulator.central_moment(p, unbiased=False) / scale**p for p in range(2, 7)])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_any_tree_of_chunks_gives_the_moments_of_the_whole(sizes: list[int], rnd: Any) -> None:
    sizes = [*sizes, 3]
    x = np.random.default_rng(sum(sizes)).exponential(size=(sum(sizes), 2)) * 100 + 7
    whole = MomentAccumulator(max_order=6).update(x)
    chunks = np.split(x, np.cumsum(sizes)[:-1])
    forest = [MomentAccumulator(max_order=6).update(chunk) for chunk in chunks]
    while len(forest) > 1:
        one = forest.pop(rnd.randrange(len(forest)))
        forest[rnd.randrange(len(forest))].merge(one)
    assert forest[0].count == whole.count
    np.testing.assert_allclose(forest[0].mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(standardised(forest[0]), standardised(whole), rtol=1e-9, atol=1e-9)
    c = x - x.mean(0)
    direct = np.array([(c**p).mean(0) / c.std(0) ** p for p in range(2, 7)])
    np.testing.assert_allclose(standardised(whole), direct, rtol=1e-9, atol=1e-9)


def test_covariance_of_a_stream_is_numpys() -> None:
    x = np.random.default_rng(0).standard_normal((50, 3)) @ np.triu(np.ones((3, 3))) + 1e4
    stream = MomentAccumulator(covariance=True)
    for chunk in np.split(x, [1, 1, 20, 33]):
        stream.update(chunk)
    np.testing.assert_allclose(stream.covariance(), np.cov(x.T), rtol=1e-10)
    np.testing.assert_allclose(stream.covariance(correction=0), np.cov(x.T, ddof=0), rtol=1e-10)


def test_merging_with_an_empty_one_changes_nothing() -> None:
    full = MomentAccumulator(max_order=4).update(PRIMES)
    before = full.state_dict()
    full.merge(MomentAccumulator(max_order=4))
    full.merge(MomentAccumulator(max_order=4).update(PRIMES[:0]))
    from_empty = MomentAccumulator(max_order=4).merge(full)
    for state in (full.state_dict(), from_empty.state_dict()):
        assert state.keys() == before.keys()
        assert all(
            torch.equal(state[k], v) if torch.is_tensor(v) else state[k] == v
            for k, v in before.items()
        )


def test_merge_leaves_the_other_as_it_was() -> None:
    one, other = (MomentAccumulator(max_order=4).update(PRIMES * f) for f in (1, 2))
    before = other.cumulant(4)
    one.merge(other)
    one.update(PRIMES)
    assert (other.count, other.cumulant(4)) == (8, before)
    adopted = MomentAccumulator(max_order=4).merge(other)
    adopted.update(PRIMES)
    assert (other.count, other.cumulant(4)) == (8, before)


def test_state_survives_a_file_that_is_not_unpickled() -> None:
    one = MomentAccumulator(max_order=4, covariance=True)
    one.update(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = MomentAccumulator(max_order=4, covariance=True)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert two.count == 20
    assert torch.equal(one.cumulant(4), two.cumulant(4))
    assert torch.equal(one.covariance(), two.covariance())
    assert two.mean.dtype == torch.float32


def test_reset_forgets_shape_and_kind() -> None:
    stream = MomentAccumulator().update(PRIMES).reset()
    assert stream.count == 0
    assert stream.update(torch.ones(3, 2)).count == 3


def test_an_accumulator_is_detached() -> None:
    x = torch.randn(5, 2, requires_grad=True)
    assert not MomentAccumulator().update(x).variance().requires_grad


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("refused", "error", "words"),
    [
        (lambda: MomentAccumulator(max_order=7), ValueError, "2, …, 6, got 7"),
        (lambda: MomentAccumulator().central_moment(3), ValueError, "1, …, 2, got 3"),
        (lambda: MomentAccumulator().mean, ValueError, "at least 1 samples, got 0"),
        (lambda: MomentAccumulator().update(PRIMES[:1]).variance(), ValueError, "got 1"),
        (lambda: MomentAccumulator().update(PRIMES).covariance(), ValueError, "covariance=True"),
        (lambda: MomentAccumulator().update([1.0, np.nan]), ValueError, "1 of 2"),
        (lambda: MomentAccumulator().update(PRIMES).update(np.ones((2, 2))), ValueError, "shape"),
        (lambda: MomentAccumulator().update(PRIMES).update(torch.ones(2)), TypeError, "torch"),
        (lambda: MomentAccumulator().merge(MomentAccumulator(max_order=3)), ValueError, "kind"),
        (lambda: MomentAccumulator().merge(PRIMES), TypeError, "ndarray"),
        (lambda: MomentAccumulator().all_reduce(), RuntimeError, "init_process_group"),
        (lambda: variance(PRIMES, weights=torch.ones(8)), TypeError, "one library"),
        (lambda: variance(PRIMES[:3], correction=3), ValueError, "3 samples, got 3"),
        (lambda: cumulant(PRIMES[:3], 4), ValueError, "at least 4 samples, got 3"),
        (lambda: cumulant(PRIMES, 2.0), ValueError, "got 2.0"),
        (lambda: standard_deviation(PRIMES, correction="ddof"), ValueError, "c4, bessel, none"),
        (lambda: variance(np.array([object(), 1])), TypeError, "object"),
        (lambda: jackknife(np.var, PRIMES[:1]), ValueError, "at least 2 samples, got 1"),
    ],
)
def test_what_cannot_be_is_refused(
    refused: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        refused()


def test_a_refused_chunk_leaves_the_stream_as_it_was() -> None:
    stream = MomentAccumulator().update(PRIMES)
    with pytest.raises(ValueError, match="finite"):
        stream.update(np.array([1.0, np.inf]))
    assert (stream.count, stream.mean) == (8, 77 / 8)


RANK = """
import os
import sys
import torch
import torch.distributed as dist
from kexue.stats.moments import MomentAccumulator

rank, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
rows = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
shares = rows.split([31, 9])
both = MomentAccumulator(max_order=4, covariance=True).update(shares[rank]).all_reduce()
one_empty = MomentAccumulator(max_order=4).update(rows[: 40 * rank])
never_fed = MomentAccumulator(max_order=4)
if rank == 1:
    never_fed.update(rows)
twice = MomentAccumulator().update(shares[rank]).all_reduce().all_reduce()
unlike = MomentAccumulator().update(torch.ones(2, 3 + rank))
try:
    refused = str(unlike.all_reduce())
except ValueError as error:
    refused = str(error)
states = [both, one_empty.all_reduce(), never_fed.all_reduce(), MomentAccumulator().all_reduce()]
torch.save([*(state.state_dict() for state in states), twice.count, refused], file)
dist.barrier()
dist.destroy_process_group()
# All is written. An interpreter that shuts down while gloo's threads still run may be aborted.
os._exit(0)
"""


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k]
        for k in one
    )


@pytest.mark.slow
def test_two_processes_hold_the_same_bits_and_the_moments_of_all_data(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [tmp_path / f"{rank}.pt" for rank in (0, 1)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(port), str(file)])
        for rank, file in enumerate(files)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert all(same_bits(*states) for states in zip(first[:4], second[:4], strict=True))
    rows = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    total = MomentAccumulator(max_order=4, covariance=True)
    total.load_state_dict(first[0])
    # Forty samples of size one: some hundred roundings of terms of the size of the result.
    torch.testing.assert_close(total.cumulant(4), cumulant(rows, 4, axis=0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total.covariance(), covariance(rows), rtol=1e-12, atol=1e-12)
    assert [state["count"] for state in first[:4]] == [40, 40, 40, 0]
    assert first[4] == second[4] == 80
    assert "one shape" in first[5]
    assert "one shape" in second[5]


def divisor_n_variance(x: np.ndarray) -> np.ndarray:
    return ((x - x.mean()) ** 2).mean()


def test_jackknife_corrects_the_divisor_n_variance_exactly() -> None:
    result = jackknife(divisor_n_variance, PRIMES)
    assert result.estimate == 35.734375
    assert result.bias == pytest.approx(-5.1049107142857, abs=5e-13)
    assert result.corrected == pytest.approx(2287 / 56, rel=1e-13)
    assert result.standard_error == pytest.approx(12.229694004835, abs=5e-12)


def test_jackknife_of_what_is_not_quadratic_is_not_exact() -> None:
    deviation = jackknife(np.std, PRIMES)
    assert deviation.bias == pytest.approx(-0.52318910406268, abs=5e-14)
    assert deviation.corrected == pytest.approx(6.5010127046718, abs=5e-13)
    fourth = jackknife(lambda x: ((x - x.mean()) ** 4).mean(), PRIMES)
    assert fourth.corrected == pytest.approx(2288.0570050565, abs=5e-10)


def with_axis(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    with_axis.calls += 1
    return np.var(x, axis=axis)


with_axis.vectorized = True
with_axis.calls = 0


@pytest.mark.parametrize(
    "estimator",
    [
        partial(np.var, axis=0),
        partial(np.var, axis=-1),
        partial(variance, axis=None, correction=0),
        with_axis,
    ],
)
def test_estimators_of_stacks_give_the_same_results(estimator: Any) -> None:
    with_axis.calls = 0
    plain = jackknife(np.var, PRIMES)
    stacked = jackknife(estimator, PRIMES)
    assert vars(stacked) == pytest.approx(vars(plain), rel=1e-12)
    # The estimate, one value, two stacks to compare, and all others at once: not one a sample.
    assert with_axis.calls in (0, 5)
    one, other = (
        bootstrap_bias(f, PRIMES, n_resamples=50, random_state=1) for f in (np.var, estimator)
    )
    assert vars(one) == pytest.approx(vars(other), rel=1e-12)


def test_an_estimator_that_mixes_a_stack_is_called_one_by_one() -> None:
    def centred_by_all(x: np.ndarray, axis: int = 0) -> np.ndarray:
        return ((x - x.mean()) ** 2).mean(axis=axis)

    plain = jackknife(np.var, PRIMES)
    assert vars(jackknife(partial(centred_by_all, axis=0), PRIMES)) == pytest.approx(vars(plain))


def test_jackknife_keeps_kind_and_axis() -> None:
    x = torch.tensor(np.stack([PRIMES, 2 * PRIMES]))
    result = jackknife(lambda rows: rows.var(1, correction=0), x, axis=1)
    torch.testing.assert_close(result.corrected, x.var(1), rtol=1e-12, atol=0)


def test_bootstrap_bias_of_the_divisor_n_variance_is_its_share() -> None:
    result = bootstrap_bias(partial(np.var, axis=0), PRIMES, n_resamples=20_000, random_state=0)
    error = result.standard_error / math.sqrt(20_000)
    assert abs(result.bias + np.var(PRIMES) / 8) < 4 * error
    assert result.corrected == result.estimate - result.bias


def normal(n: int, generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal(n)


def test_measured_bias_of_the_variance_is_one_nth() -> None:
    result = measure_bias(partial(np.var, axis=0), normal, 1.0, n_samples=5, random_state=0)
    assert abs(result.bias + 1 / 5) < 4 * result.standard_error
    # Var of m_2 for normal data is 2(n-1)/n²; a sample's own standard error is within 10 %.
    exact = math.sqrt(2 * 4 / 25 / 10_000)
    assert result.standard_error == pytest.approx(exact, rel=0.1)
    assert result.mean_estimate - 1.0 == result.bias
    assert (result.n_samples, result.n_repeats) == (5, 10_000)


def test_every_repeat_sees_a_fresh_sample() -> None:
    seen: list[float] = []
    measure_bias(lambda x: seen.append(x[0]) or x[0], normal, 0.0, n_samples=1, n_repeats=50)
    assert len(set(seen)) == 50


def test_torch_samples_are_measured_too() -> None:
    result = measure_bias(
        lambda x: x.var(),
        lambda n, generator: torch.from_numpy(generator.standard_normal(n)),
        1.0,
        n_samples=4,
        n_repeats=500,
        random_state=0,
    )
    assert abs(float(result.bias)) < 4 * float(result.standard_error)


@pytest.mark.parametrize("fill", [1e17, -1e12, 1e300])
def test_a_sample_without_weight_is_absent_wherever_it_stands(fill: float) -> None:
    weights = np.array([0.0, 1, 1, 1])
    for order in (slice(None), slice(None, None, -1)):
        x, w = np.array([fill, 0.1, 0.2, 0.3])[order], weights[order]
        assert mean(x, weights=w) == pytest.approx(0.2, rel=1e-15)
        assert variance(x, weights=w) == pytest.approx(0.01, rel=1e-14)
        both = np.stack([x, np.arange(4.0)[order]], axis=1)
        expected = np.cov(both[w > 0].T)
        np.testing.assert_allclose(covariance(both, weights=w), expected, rtol=1e-13)


def test_along_two_axes_the_heaviest_sample_is_the_reference() -> None:
    x = np.array([[1e17, 1.0], [2.0, 3.0]])
    w = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert variance(x, axis=(0, 1), weights=w) == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("weight_type", ["frequency", "reliability"])
def test_a_variance_has_a_gradient_in_its_weights(weight_type: str) -> None:
    x = torch.tensor([1.0, 5, 2, 3], dtype=torch.float64)
    weights = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: variance(x, weights=w, weight_type=weight_type), weights
    )


def test_statistics_of_integers_are_resampled_as_numbers() -> None:
    theirs = jackknife(lambda v: v.max(), np.array([1, 2, 5]))
    ours = jackknife(lambda v: v.max(), torch.tensor([1, 2, 5]))
    assert float(ours.bias) == float(theirs.bias) == -2.0
