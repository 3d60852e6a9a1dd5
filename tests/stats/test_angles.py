"""The law of the angle against 50-digit values, second derivations and simulation."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from kexue.stats.angles import (
    RandomAngle,
    RandomCosine,
    cosine_summary,
    max_cosine_quantile,
    max_vectors,
    orthogonality_test,
)

# The oracles below were computed with 50 digits and are written down to 14: half a unit in the
# last place is at most 5e-14 of the value, and the arithmetic adds less.
DIGITS = 1e-13
EPS = np.finfo(float).eps

VARIANCES = {
    2: 0.82246703342411,
    3: 0.46740110027234,
    10: 0.11066147786856,
    20: 0.052583167840843,
    50: 0.020405331628613,
    100: 0.010100666613349,
    200: 0.0050250833316668,
    1000: 0.0010010006666661,
    10**6: 1.0000010000007e-6,
    10**9: 1.000000001e-9,
}


def log_tail(n: int, t: float) -> float:
    """log P(η > t) for t >= 0 by quadrature of the density of the angle, in 30 digits."""
    with mpmath.workdps(30):
        order, start = mpmath.mpf(n), mpmath.acos(mpmath.mpf(t))
        width = 1 / (order * max(mpmath.mpf(t), 1 / mpmath.sqrt(order)))
        steps = [0, *(2**k for k in range(11))]
        ends = sorted({max(mpmath.mpf(0), start - k * width) for k in steps})
        sine = mpmath.sin(start)
        constant = mpmath.loggamma(order / 2) - mpmath.loggamma((order - 1) / 2)
        integral = mpmath.quad(lambda x: (mpmath.sin(x) / sine) ** (n - 2), ends)
        power = constant - mpmath.log(mpmath.pi) / 2 + (n - 2) * mpmath.log(sine)
        return float(power + mpmath.log(integral))


@pytest.mark.parametrize(("n", "variance"), VARIANCES.items())
def test_variance_of_the_angle_is_half_a_trigamma(n: int, variance: float) -> None:
    assert RandomAngle(n).var() == pytest.approx(variance, rel=DIGITS)
    assert RandomAngle(n).std() == pytest.approx(math.sqrt(variance), rel=DIGITS)


def test_variance_in_the_plane_and_in_space_has_a_closed_form() -> None:
    assert RandomAngle(2).var() == pytest.approx(math.pi**2 / 12, rel=4 * EPS)
    assert RandomAngle(3).var() == pytest.approx(math.pi**2 / 4 - 2, rel=8 * EPS)


@pytest.mark.parametrize(
    ("n", "kurtosis"),
    [
        (2, -1.2),
        (3, -0.80624976995419),
        (10, -0.21872339424832),
        (100, -0.020199272973124),
        (10**6, -2.0000019999993e-6),
    ],
)
def test_excess_kurtosis_of_the_angle(n: int, kurtosis: float) -> None:
    assert RandomAngle(n).kurtosis() == pytest.approx(kurtosis, rel=DIGITS)


def test_moments_of_the_cosine() -> None:
    law = RandomCosine(7)
    assert [law.moment(k) for k in (0, 1, 3)] == [1.0, 0.0, 0.0]
    for order, moment in ((2, 1 / 7), (4, 3 / 63), (6, 15 / 693)):
        assert law.moment(order) == pytest.approx(moment, rel=4 * EPS)
    assert law.var() == pytest.approx(law.moment(2), rel=2 * EPS)
    excess = law.moment(4) / law.moment(2) ** 2 - 3
    assert law.kurtosis() == pytest.approx(excess, rel=16 * EPS / abs(excess))


def test_mean_and_median_are_in_the_middle() -> None:
    assert RandomAngle(5).mean() == RandomAngle(5).median() == math.pi / 2
    assert RandomCosine(5).mean() == RandomCosine(5).median() == 0.0
    assert RandomAngle(5).ppf(0.5) == math.pi / 2
    assert RandomCosine(5).ppf(0.5) == 0.0


@pytest.mark.parametrize(
    ("n", "t", "tail"),
    [
        (4, 0.5, 0.19550110947789),
        (10, 0.5, 0.058653401507119),
        (128, 0.25, 0.0021360770445634),
        (768, 0.15, 1.4800629950217e-5),
        (10**9, 3 / math.sqrt(10**9), 0.0013498980116868),
    ],
)
def test_tail_of_the_cosine(n: int, t: float, tail: float) -> None:
    law = RandomCosine(n)
    assert law.sf(t) == pytest.approx(tail, rel=DIGITS)
    assert law.cdf(-t) == law.sf(t)
    assert law.cdf(t) == pytest.approx(1 - tail, rel=2 * EPS)


def test_tail_in_four_dimensions_is_that_of_the_semicircle() -> None:
    semicircle = 1 / 3 - math.sqrt(3) / (4 * math.pi)
    assert RandomCosine(4).sf(0.5) == pytest.approx(semicircle, rel=8 * EPS)


def test_share_of_angles_below_sixty_degrees() -> None:
    sixty = math.pi / 3
    assert RandomAngle(10).cdf(sixty) == pytest.approx(0.058653401507119, rel=DIGITS)
    assert RandomAngle(3).cdf(sixty) == pytest.approx(0.25, rel=4 * EPS)


@pytest.mark.parametrize(
    ("n", "t", "log_probability"),
    [
        (10**4, 0.5, -1443.0977575067),
        (10**6, 0.1, -5030.6871090274),
        (10**9, 0.001, -504.37406318386),
    ],
)
def test_log_tails_stay_finite(n: int, t: float, log_probability: float) -> None:
    assert RandomCosine(n).logsf(t) == pytest.approx(log_probability, rel=DIGITS)
    assert RandomCosine(n).logcdf(-t) == pytest.approx(log_probability, rel=DIGITS)


@pytest.mark.parametrize(
    ("n", "deviations"),
    [
        (n, deviations)
        for n in (3, 10, 768, 10**6, 10**6 + 1, 10**9)
        for deviations in (0.5, 2.5, 6.0, 30.0, 60.0)
        if deviations < math.sqrt(n)
    ],
)
def test_both_tails_agree_with_quadrature_in_thirty_digits(n: int, deviations: float) -> None:
    t = deviations / math.sqrt(n)
    law, exact = RandomCosine(n), log_tail(n, t)
    # d log P / d log t is at most n t² + 1, and 1 - t has a rounding error of half an EPS, which
    # the symmetric form turns into n t EPS.
    conditioning = 32 + 2 * n * t
    tolerance = (conditioning + abs(exact)) * EPS
    assert law.logsf(t) == pytest.approx(exact, abs=tolerance)
    if exact > -600:
        assert law.sf(t) == pytest.approx(math.exp(exact), rel=tolerance)
    assert law.logcdf(-t) == law.logsf(t)


@pytest.mark.parametrize("n", [50, 768, 10**6, 10**9])
def test_continued_fraction_agrees_with_incomplete_beta_where_both_hold(n: int) -> None:
    law = RandomCosine(n)
    t = law.isf(np.logspace(-300, -262, 20))
    tail = law.sf(t)
    assert (tail < math.exp(-600)).all()
    # The relative error of the tail, n t EPS from the rounding of 1 - t, is absolute in its log.
    np.testing.assert_allclose(
        law.logsf(t), np.log(tail), rtol=4 * EPS, atol=(32 + 2 * n * t.max()) * EPS
    )


def test_small_angles_keep_their_relative_accuracy() -> None:
    for angle in (1e-3, 1e-10, 1e-100):
        # In the plane θ/π, in space sin²(θ/2), in four dimensions (θ - sin θ cos θ)/π ≈ 2θ³/(3π).
        assert RandomAngle(2).cdf(angle) == pytest.approx(angle / math.pi, rel=4 * EPS)
        assert RandomAngle(3).cdf(angle) == pytest.approx(math.sin(angle / 2) ** 2, rel=8 * EPS)
    assert RandomAngle(4).cdf(1e-10) == pytest.approx(2e-30 / (3 * math.pi), rel=16 * EPS)
    assert RandomAngle(2).cdf(1e-200) == pytest.approx(1e-200 / math.pi, rel=4 * EPS, abs=0)
    # log P = (n - 1) log sin θ + log C_n - log(n - 1) + O(θ²)
    constant = math.lgamma(5) - math.lgamma(4.5) - math.log(math.pi) / 2
    expected = 9 * math.log(1e-100) + constant - math.log(9)
    assert RandomAngle(10).logcdf(1e-100) == pytest.approx(expected, rel=8 * EPS)


@pytest.mark.parametrize(
    ("n", "angle", "cosine"),
    [
        (2, math.log(math.pi), 0.45158270528945),
        (3, 1.0, math.log(2)),
        (10, 0.31703465170828, 0.25841128067215),
        (10**9, -8.9426943847685, -8.9426943852685),
    ],
)
def test_entropy(n: int, angle: float, cosine: float) -> None:
    assert RandomAngle(n).entropy() == pytest.approx(angle, rel=DIGITS)
    assert RandomCosine(n).entropy() == pytest.approx(cosine, rel=DIGITS)


def test_quantiles() -> None:
    assert RandomCosine(100).ppf(0.999) == pytest.approx(0.30396301052081, rel=DIGITS)
    degrees = np.degrees(RandomAngle(100).ppf(0.001))
    assert degrees == pytest.approx(72.30421298177, rel=DIGITS)


def test_densities() -> None:
    assert RandomAngle(5).pdf(1.0) == pytest.approx(0.4468674274432, rel=DIGITS)
    assert RandomCosine(5).pdf(0.3) == pytest.approx(0.6825, rel=4 * EPS)
    assert RandomCosine(10**9).logpdf(0.0) == pytest.approx(9.4426943845185, rel=DIGITS)


@pytest.mark.parametrize("n", [61, 64, 100, 10**4])
def test_constant_is_good_to_the_last_digits_where_its_series_begins(n: int) -> None:
    with mpmath.workdps(30):
        ratio = mpmath.gammaprod([mpmath.mpf(n) / 2], [mpmath.mpf(n - 1) / 2, mpmath.mpf(0.5)])
        exact = float(mpmath.log(ratio))
    # A logarithm, a log1p and two sums, each rounded once.
    assert RandomAngle(n).logpdf(math.pi / 2) == pytest.approx(exact, abs=4 * EPS * abs(exact))


def test_two_dimensions_are_uniform_in_the_angle_and_three_in_the_cosine() -> None:
    angles, cosines = np.linspace(0, math.pi, 9), np.linspace(-1, 1, 9)
    np.testing.assert_allclose(RandomAngle(2).pdf(angles), 1 / math.pi, rtol=4 * EPS)
    np.testing.assert_allclose(RandomCosine(3).pdf(cosines), 0.5, rtol=4 * EPS)
    assert (RandomCosine(2).pdf([-1.0, 1.0]) == np.inf).all()
    assert (RandomAngle(3).pdf([0.0, math.pi]) == 0.0).all()


@pytest.mark.parametrize("n", [2, 3, 4, 17, 400])
def test_densities_integrate_to_the_distribution(n: int) -> None:
    for law, x in ((RandomAngle(n), 1.7), (RandomCosine(n), -0.05)):
        area, error = integrate.quad(
            law.pdf, law.support()[0], x, epsabs=0, epsrel=1e-10, limit=200
        )
        assert area == pytest.approx(law.cdf(x), rel=1e-8), error


@pytest.mark.parametrize("n", [2, 3, 8, 768, 10**5])
def test_cosine_is_a_stretched_symmetric_beta_variable(n: int) -> None:
    law, beta = RandomCosine(n), stats.beta((n - 1) / 2, (n - 1) / 2)
    t = np.linspace(-0.99, 0.99, 21) * min(1, 5 / math.sqrt(n))
    # scipy forms (1 + t)/2 and 1 - x as we do, and differences of lgamma where we have a series.
    np.testing.assert_allclose(law.cdf(t), beta.cdf((1 + t) / 2), rtol=1e-11)
    np.testing.assert_allclose(law.logpdf(t), beta.logpdf((1 + t) / 2) - math.log(2), atol=1e-9)


dimensions = st.one_of(st.integers(2, 50), st.integers(51, 10**9))


@settings(max_examples=60, deadline=None)
@given(n=dimensions, z=st.floats(-30, 30))
def test_laws_are_symmetric(n: int, z: float) -> None:
    t = min(max(z / math.sqrt(n), -1.0), 1.0)
    cosine, angle = RandomCosine(n), RandomAngle(n)
    assert cosine.cdf(-t) == cosine.sf(t)
    assert cosine.logcdf(-t) == cosine.logsf(t)
    assert cosine.pdf(-t) == cosine.pdf(t)
    # The incomplete beta function is good to some twenty EPS.
    assert cosine.cdf(t) + cosine.sf(t) == pytest.approx(1.0, abs=64 * EPS)
    assert angle.ppf(0.2) + angle.isf(0.2) == pytest.approx(math.pi, rel=2 * EPS)


@settings(max_examples=60, deadline=None)
@given(n=dimensions, z=st.floats(-8, 8))
def test_small_angles_are_large_cosines(n: int, z: float) -> None:
    theta = min(max(math.pi / 2 - z / math.sqrt(n), 1e-3), math.pi - 1e-3)
    t = math.cos(theta)
    # cos θ is rounded to EPS/2, the hazard at it is at most about |z| √n + n/|1 - |t||.
    hazard = n * (abs(t) + 1e-16) / (math.sin(theta) ** 2) + 2 * math.sqrt(n)
    tolerance = (64 + 2 * hazard) * EPS
    assert RandomAngle(n).cdf(theta) == pytest.approx(RandomCosine(n).sf(t), rel=tolerance)
    assert RandomAngle(n).sf(theta) == pytest.approx(RandomCosine(n).cdf(t), rel=tolerance)


@settings(max_examples=100, deadline=None)
@given(n=dimensions, exponent=st.floats(-250, -0.3011))
def test_quantiles_invert_the_distribution(n: int, exponent: float) -> None:
    q = 10.0**exponent
    angle, cosine = RandomAngle(n), RandomCosine(n)
    # Moving x by a rounding error moves log q by the hazard pdf/q times that; the incomplete beta
    # function adds some EPS for each unit of -log q.
    roundings = 256 + 8 * abs(math.log(q))
    for law, x in ((angle, angle.ppf(q)), (cosine, cosine.ppf(q))):
        hazard = math.exp(law.logpdf(x) - math.log(q)) * abs(x)
        if hazard * EPS < 1e-6:  # beyond that no double holds the quantile, next to -1
            assert law.cdf(x) == pytest.approx(q, rel=(roundings + 4 * hazard) * EPS)
    assert angle.isf(q) == pytest.approx(math.pi - angle.ppf(q), rel=2 * EPS)
    assert cosine.isf(q) == -cosine.ppf(q)


def test_quantiles_of_the_plane_and_of_space_are_elementary() -> None:
    q = np.array([1e-300, 1e-20, 1e-3, 0.25, 0.4999])
    np.testing.assert_allclose(RandomAngle(2).ppf(q), math.pi * q, rtol=4 * EPS)
    np.testing.assert_allclose(RandomAngle(3).ppf(q), 2 * np.arcsin(np.sqrt(q)), rtol=64 * EPS)
    np.testing.assert_allclose(RandomCosine(3).ppf(q), 2 * q - 1, atol=4 * EPS)
    assert RandomAngle(9).ppf([0.0, 1.0]).tolist() == [0.0, math.pi]
    assert RandomCosine(9).isf([0.0, 1.0]).tolist() == [1.0, -1.0]


def test_interval_holds_its_probability() -> None:
    for law in (RandomAngle(30), RandomCosine(30)):
        low, high = law.interval(0.95)
        assert law.cdf(high) - law.cdf(low) == pytest.approx(0.95, rel=64 * EPS)
        assert law.cdf(low) == pytest.approx(law.sf(high), rel=64 * EPS)


def test_outside_the_support_and_at_nan() -> None:
    for law, below, above in (
        (RandomAngle(5), -0.1, 3.2),
        (RandomCosine(5), -1.5, np.inf),
    ):
        assert law.pdf([below, above]).tolist() == [0.0, 0.0]
        assert law.cdf([below, above]).tolist() == [0.0, 1.0]
        assert law.sf([below, above]).tolist() == [1.0, 0.0]
        assert law.logsf(above) == law.logcdf(below) == -np.inf
        for method in (law.pdf, law.logpdf, law.cdf, law.sf, law.logcdf, law.logsf):
            assert np.isnan(method(np.nan))
        for method in (law.ppf, law.isf):
            assert np.isnan(method([-0.1, 1.1, np.nan])).all()
    assert np.isnan(RandomCosine(10**9).sf(np.nan))


def test_dimension_and_points_broadcast() -> None:
    law = RandomCosine([[2], [768], [10**9]])
    table = law.sf([0.0, 0.1, 0.9, -0.9])
    assert table.shape == (3, 4)
    for row, n in zip(table, (2, 768, 10**9), strict=True):
        assert row.tolist() == [RandomCosine(n).sf(t) for t in (0.0, 0.1, 0.9, -0.9)]
    assert law.var().shape == law.moment(4).shape == law.entropy().shape == (3, 1)
    assert isinstance(RandomCosine(5).cdf(0.3), np.float64)
    assert isinstance(RandomAngle(5).rvs(), float)
    assert RandomCosine(768).dimension == 768
    assert RandomCosine(5).cdf([]).shape == (0,)


@pytest.mark.parametrize("n", [2, 3, 10, 768, 10**9])
def test_draws_follow_the_law(n: int) -> None:
    draws = 20_000
    for law in (RandomAngle(n), RandomCosine(n)):
        sample = law.rvs(draws, random_state=1)
        # The chance of a sound sampler failing is 1e-4 for each of ten samples, once and for all.
        assert stats.kstest(sample, law.cdf).pvalue > 1e-4


def test_draws_of_angle_and_cosine_are_the_same_draws() -> None:
    angles = RandomAngle([2, 100]).rvs((50, 2), random_state=np.random.default_rng(3))
    cosines = RandomCosine([2, 100]).rvs((50, 2), random_state=3)
    np.testing.assert_allclose(np.cos(angles), cosines, atol=4 * EPS)
    assert RandomCosine([2, 100]).rvs(random_state=3).shape == (2,)


def unit_rows(n_vectors: int, dimension: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n_vectors, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pair_cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(rows), 1)]


@pytest.mark.parametrize("block_size", [1, 7, 23, 1000])
def test_summary_matches_all_pairs_by_brute_force(block_size: int) -> None:
    rows = np.random.default_rng(0).standard_normal((23, 6)) * np.logspace(-3, 3, 23)[:, None]
    cosines = pair_cosines(rows)
    summary = cosine_summary(rows, block_size=block_size)
    assert (summary.n_vectors, summary.dimension, summary.n_pairs) == (23, 6, 253)
    assert summary.mean == pytest.approx(cosines.mean(), abs=64 * EPS)
    assert summary.mean_square == pytest.approx((cosines**2).mean(), rel=64 * EPS)
    assert summary.max_abs == pytest.approx(np.abs(cosines).max(), rel=8 * EPS)
    assert summary.effective_dimension == 1 / summary.mean_square


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float32),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).float().requires_grad_(),
        lambda x: x.astype(np.float16),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: (1000 * x).astype(np.int16),
        lambda x: x.tolist(),
    ],
    ids=["float32", "torch", "torch with gradient", "half", "bfloat16", "integers", "lists"],
)
def test_summary_takes_every_kind_of_matrix(convert: Callable[[np.ndarray], Any]) -> None:
    rows = np.random.default_rng(1).standard_normal((300, 40))
    given = convert(rows)
    kept = given.detach().double().numpy() if torch.is_tensor(given) else np.asarray(given, float)
    exact, summary = pair_cosines(kept), cosine_summary(given, block_size=64)
    assert summary.mean_square == pytest.approx((exact**2).mean(), abs=1e-6)
    assert summary.mean == pytest.approx(exact.mean(), abs=1e-6)
    assert summary.max_abs == pytest.approx(np.abs(exact).max(), abs=1e-6)
    assert isinstance(summary.mean_square, float)


def test_summary_survives_very_long_and_very_short_vectors() -> None:
    rows = np.array([[3e200, 4e200], [1e-200, 0.0], [-5e-324, 0.0]])
    summary = cosine_summary(rows)
    assert summary.mean == pytest.approx((0.6 - 0.6 - 1) / 3, rel=16 * EPS)
    assert summary.mean_square == pytest.approx((0.36 + 0.36 + 1) / 3, rel=16 * EPS)


def test_summary_of_duplicates_is_clipped_and_of_orthogonal_vectors_unbounded() -> None:
    assert cosine_summary(np.tile(np.arange(1.0, 8.0), (5, 1))).max_abs == 1.0
    axes = cosine_summary(np.eye(4))
    assert (axes.mean_square, axes.max_abs, axes.effective_dimension) == (0.0, 0.0, math.inf)


def test_summary_holds_a_few_blocks_only() -> None:
    rows = unit_rows(4000, 32)
    tracemalloc.start()
    cosine_summary(rows, block_size=256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A block is 0.5 MB; the whole Gram matrix would be 128 MB.
    assert peak < 5e6


@pytest.mark.gpu
def test_summary_on_a_gpu_agrees_with_the_host() -> None:
    rows = torch.from_numpy(unit_rows(3000, 64))
    assert cosine_summary(rows.cuda()).mean_square == pytest.approx(
        cosine_summary(rows).mean_square, rel=1e-12
    )


def test_statistics_of_three_vectors_in_the_plane() -> None:
    # Cosines 1, 0, 0: mean 1/3, mean square 1/3; d = 2, N = 3, M = 3; variance per pair 1/8.
    rows = [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]
    z = (1 / 3 - 1 / 2) * math.sqrt(3 * 8)
    bingham = orthogonality_test(rows, method="mean_square")
    assert bingham.statistic == pytest.approx(z, rel=16 * EPS)
    assert bingham.pvalue == pytest.approx(math.exp(-(2 + 2 * z) / 2), rel=64 * EPS)
    rayleigh = orthogonality_test(rows, method="rayleigh")
    s = 2 * (1 + 2 / 3)
    corrected = (5 / 6) * s + s**2 / 24
    assert rayleigh.statistic == pytest.approx(corrected, rel=16 * EPS)
    assert rayleigh.pvalue == pytest.approx(math.exp(-corrected / 2), rel=64 * EPS)
    largest = orthogonality_test(rows, method="max")
    assert (largest.statistic, largest.pvalue) == (1.0, 0.0)
    assert largest.method == "max"
    assert largest.summary == cosine_summary(rows)


def test_max_of_a_single_pair_is_exact() -> None:
    result = orthogonality_test([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]], method="max")
    assert result.pvalue == pytest.approx(0.4, rel=8 * EPS)  # cosines are uniform in space


def test_tiny_p_values_do_not_vanish() -> None:
    rows = np.eye(768)[:6]
    rows[0, 1] = 0.55
    pvalue = orthogonality_test(rows, method="max").pvalue
    t = 0.55 / math.hypot(1, 0.55)
    assert pvalue == pytest.approx(15 * 2 * RandomCosine(768).sf(t), rel=1e-9)
    assert 0 < pvalue < 1e-30


def test_mean_square_statistic_has_mean_zero_and_variance_one() -> None:
    n_sets, dimension = 600, 5
    z = np.array(
        [orthogonality_test(unit_rows(12, dimension, seed)).statistic for seed in range(n_sets)]
    )
    assert abs(z.mean()) < 5 / math.sqrt(n_sets)
    spread = math.sqrt(np.mean((z - z.mean()) ** 4) - 1)
    assert abs(z.var() - 1) < 5 * spread / math.sqrt(n_sets)


@pytest.mark.parametrize("method", ["mean_square", "max", "rayleigh"])
def test_tests_keep_their_level(method: str) -> None:
    n_sets, level = 600, 0.05
    pvalues = np.array(
        [orthogonality_test(unit_rows(40, 8, seed), method=method).pvalue for seed in range(n_sets)]
    )
    # Five standard errors of a share, and a quarter of the level for the limits in N.
    tolerance = 5 * math.sqrt(level * (1 - level) / n_sets) + level / 4
    assert np.mean(pvalues < level) == pytest.approx(level, abs=tolerance)
    assert 0.4 < np.median(pvalues) < 0.6


def test_each_test_sees_its_own_departure() -> None:
    rows = unit_rows(400, 20)
    axis = rows * np.array([1.7] + [1.0] * 19)
    shifted = rows + np.array([0.15] + [0.0] * 19)
    doubled = np.vstack([rows, rows[:1] + 1e-3 * rows[1:2]])

    def pvalue(x: np.ndarray, method: str) -> float:
        return orthogonality_test(x, method=method).pvalue

    assert pvalue(axis, "mean_square") < 1e-6 < pvalue(axis, "rayleigh")
    assert pvalue(shifted, "rayleigh") < 1e-6 < pvalue(shifted, "max")
    assert (
        pvalue(doubled, "max")
        < 1e-6
        < min(pvalue(doubled, "mean_square"), pvalue(doubled, "rayleigh"))
    )


@pytest.mark.parametrize(
    ("dimension", "cosine", "failure", "count"),
    [
        (128, 0.3, 0.5, 43),
        (768, 0.2, 0.5, 6708),
        (300, 0.5, 0.5, 7226001970),
        (768, 0.2, 0.01, 949),
        (10_000, 0.5, 0.5, math.inf),
    ],
)
def test_capacity(dimension: int, cosine: float, failure: float, count: float) -> None:
    assert max_vectors(dimension, max_cosine=cosine, failure_probability=failure) == count


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 2000), t=st.floats(0.01, 0.5), delta=st.floats(1e-6, 0.999))
def test_capacity_is_the_largest_that_the_union_bound_allows(
    n: int, t: float, delta: float
) -> None:
    count = max_vectors(n, max_cosine=t, failure_probability=delta)
    exceeds = 2 * RandomCosine(n).sf(t)
    if count < 1e6:
        assert count * (count - 1) / 2 * exceeds <= delta * (1 + 1e-12)
        assert (count + 1) * count / 2 * exceeds > delta * (1 - 1e-12)


def test_quantile_of_the_largest_cosine() -> None:
    assert max_cosine_quantile(768, 10_000, 0.5) == pytest.approx(0.20284651148998, rel=DIGITS)
    assert max_cosine_quantile(64, 1797, 0.99) == pytest.approx(0.64594224321517, rel=DIGITS)
    # Of two vectors there is one pair; its cosine is uniform in space.
    assert max_cosine_quantile(3, 2, 0.25) == pytest.approx(0.25, rel=16 * EPS)


def test_quantile_of_the_largest_cosine_in_simulation() -> None:
    n_sets = 400
    median = max_cosine_quantile(20, 60, 0.5)
    below = np.mean([cosine_summary(unit_rows(60, 20, s)).max_abs < median for s in range(n_sets)])
    assert below == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(n_sets))


@pytest.mark.bad_input
@pytest.mark.parametrize("dimension", [1, 0, -3, 2.5, np.nan, np.inf, [3, 1]])
@pytest.mark.parametrize("law", [RandomAngle, RandomCosine])
def test_dimension_is_checked(law: type, dimension: Any) -> None:
    with pytest.raises(ValueError, match="dimension must be an integer of at least 2, got "):
        law(dimension)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.ones(3), r"must be a matrix .* got shape \(3,\)"),
        (np.ones((2, 2, 2)), r"got shape \(2, 2, 2\)"),
        (np.ones((1, 3)), "at least 2 rows"),
        (np.ones((3, 1)), "2 columns"),
        (np.array([[1.0, np.nan], [1.0, 2.0], [np.inf, 0.0]]), "finite.* in 2 rows"),
        (np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), "2 rows of zeros"),
    ],
)
def test_vectors_are_checked(x: np.ndarray, words: str) -> None:
    for matrix in (x, torch.from_numpy(x)):
        with pytest.raises(ValueError, match=words):
            cosine_summary(matrix)
        with pytest.raises(ValueError, match=words):
            orthogonality_test(matrix)


@pytest.mark.bad_input
def test_complex_numbers_and_objects_are_refused() -> None:
    for x in (np.ones((3, 3)) + 1j, np.array([["a", 1], [2, None]], object), [["a"], ["b"]]):
        with pytest.raises(TypeError, match="real numbers"):
            cosine_summary(x)
    with pytest.raises(TypeError, match="real numbers"):
        cosine_summary(torch.ones(3, 3) + 1j)
    for argument in (1j, "half", None, [object()]):
        with pytest.raises(TypeError, match="real numbers"):
            RandomCosine(3).sf(argument)
        with pytest.raises(TypeError, match="real numbers"):
            RandomAngle(argument)


@pytest.mark.bad_input
def test_method_choices_are_listed() -> None:
    with pytest.raises(ValueError, match="one of mean_square, max, rayleigh, got 'bingham'"):
        orthogonality_test(np.eye(3), method="bingham")


@pytest.mark.bad_input
@pytest.mark.parametrize("order", [-1, 1.5, np.nan])
def test_order_is_checked(order: float) -> None:
    with pytest.raises(ValueError, match="order must be an integer of at least 0"):
        RandomCosine(3).moment(order)


@pytest.mark.bad_input
@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0, np.nan])
def test_probabilities_and_cosines_are_checked(share: float) -> None:
    with pytest.raises(ValueError, match="max_cosine must be a number between 0 and 1"):
        max_vectors(10, max_cosine=share)
    with pytest.raises(ValueError, match="failure_probability must be"):
        max_vectors(10, max_cosine=0.5, failure_probability=share)
    with pytest.raises(ValueError, match="probability must be"):
        max_cosine_quantile(10, 5, share)


@pytest.mark.bad_input
def test_number_of_vectors_is_checked() -> None:
    for count in (1, 0, 2.5, np.nan):
        with pytest.raises(ValueError, match="n_vectors must be an integer of at least 2"):
            max_cosine_quantile(10, count, 0.5)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        RandomCosine(3).interval(1.5)
