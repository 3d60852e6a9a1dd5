"""Distances of normal laws against 50-digit values, quadrature, and their own invariances."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.linalg import hilbert

from kexue.stats.gaussian import (
    GaussianParameters,
    bhattacharyya_distance,
    entropy,
    fit_gaussian,
    frechet_distance,
    hellinger_distance,
    kl_divergence,
    optimal_transport_map,
    pairs,
    pairwise_distance,
    stable,
    wasserstein_distance,
)

EPS = np.finfo(float).eps
# Jacobians are compared along random directions: entry by entry takes ten times as long.
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
gradgradcheck = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)
# The oracles were computed with 50 digits and are written down to 14: half a unit of the last is at
# most 5e-14 of the value; factors of well-conditioned 3 x 3 matrices add some eps.
DIGITS = 1e-13

DISTANCES: dict[str, Callable[..., Any]] = {
    "wasserstein": wasserstein_distance,
    "kl": kl_divergence,
    "bhattacharyya": bhattacharyya_distance,
    "hellinger": hellinger_distance,
}
every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)

A = (
    np.array([0.0, 0.0]),
    np.array([[2.0, 1.0], [1.0, 2.0]]),
    np.array([1.0, -1.0]),
    np.diag([1.0, 3.0]),
)
B = (
    np.array([1.0, 2.0, 3.0]),
    np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]]),
    np.array([0.0, 1.0, 1.0]),
    np.array([[1.0, 0.5, 0.0], [0.5, 2.0, -0.25], [0.0, -0.25, 1.0]]),
)
C = (np.array([0.0]), np.array([[4.0]]), np.array([3.0]), np.array([[25.0]]))
HILBERT = (np.zeros(6), hilbert(6), np.zeros(6), np.eye(6))


def swapped(laws: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*laws[2:], *laws[:2])


def random_laws(
    d: int, batch: tuple[int, ...] = (), seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances with condition numbers of about e^(2 spread)."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((*batch, d, d)))
    variances = np.exp(rng.uniform(-spread, spread, (*batch, d)))
    covariance = (axes * variances[..., None, :]) @ axes.swapaxes(-1, -2)
    return rng.standard_normal((*batch, d)), (covariance + covariance.swapaxes(-1, -2)) / 2


def tensors(*arrays: Any, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(np.asarray(array), dtype=dtype) for array in arrays]


class Exact:
    """The formulas of the theory, as they stand there, in 50 digits."""

    def __init__(self, *laws: np.ndarray) -> None:
        mean1, covariance1, mean2, covariance2 = (mpmath.matrix(array.tolist()) for array in laws)
        self.one, self.two, self.shift = covariance1, covariance2, mean1 - mean2

    def kl(self) -> mpmath.mpf:
        relative = mpmath.inverse(self.two) * self.one
        trace = sum(relative[i, i] for i in range(relative.rows))
        maha = (self.shift.T * mpmath.inverse(self.two) * self.shift)[0]
        return (trace - relative.rows - mpmath.log(mpmath.det(relative)) + maha) / 2

    def bhattacharyya(self) -> mpmath.mpf:
        average = (self.one + self.two) / 2
        maha = (self.shift.T * mpmath.inverse(average) * self.shift)[0]
        det1, det2 = mpmath.det(self.one), mpmath.det(self.two)
        return maha / 8 + mpmath.log(mpmath.det(average) / mpmath.sqrt(det1 * det2)) / 2

    def hellinger(self) -> mpmath.mpf:
        return mpmath.sqrt(-mpmath.expm1(-self.bhattacharyya()))

    def wasserstein(self) -> mpmath.mpf:
        # Eigenvalues of the product of both covariances, another way than singular values.
        product = self.one * self.two
        values = mpmath.eig(product, right=False) if product.rows > 1 else [product[0]]
        traces = sum(self.one[i, i] + self.two[i, i] for i in range(self.one.rows))
        cross = sum(mpmath.sqrt(mpmath.re(value)) for value in values)
        return mpmath.sqrt((self.shift.T * self.shift)[0] + traces - 2 * cross)


def exact(name: str, *laws: np.ndarray) -> float:
    with mpmath.workdps(50):
        return float(getattr(Exact(*laws), name)())


@pytest.mark.parametrize(
    ("laws", "kl", "reverse_kl", "bhattacharyya", "wasserstein_squared"),
    [
        (A, 1.0, 4 / 3, 0.25564676848506, 2.5166852264521),
        (B, 4.1868085633046, 1.7113395848436, 0.58304759500393, 7.6074563195616),
        (C, 0.67629073187416, None, 0.26336798511279, 18.0),
    ],
    ids="ABC",
)
def test_oracles(
    laws: tuple[np.ndarray, ...],
    kl: float,
    reverse_kl: float | None,
    bhattacharyya: float,
    wasserstein_squared: float,
) -> None:
    assert kl_divergence(*laws) == pytest.approx(kl, rel=DIGITS)
    if reverse_kl is not None:
        assert kl_divergence(*swapped(laws)) == pytest.approx(reverse_kl, rel=DIGITS)
    assert bhattacharyya_distance(*laws) == pytest.approx(bhattacharyya, rel=DIGITS)
    squared = wasserstein_distance(*laws, squared=True)
    assert squared == pytest.approx(wasserstein_squared, rel=DIGITS)
    assert wasserstein_distance(*laws) == pytest.approx(math.sqrt(wasserstein_squared), rel=DIGITS)


def test_oracle_of_hellinger_entropy_and_map() -> None:
    assert hellinger_distance(*A) == pytest.approx(0.47495739973795, rel=DIGITS)
    assert entropy(A[1]) == pytest.approx(3.3871832107434, rel=DIGITS)
    matrix = [[0.80178372573727, -0.26726124191242], [-0.26726124191242, 1.3363062095621]]
    np.testing.assert_allclose(optimal_transport_map(*A).matrix, matrix, rtol=DIGITS)


def test_nearly_equal_laws_keep_their_digits() -> None:
    mean, covariance = A[:2]
    laws = mean, covariance, mean, covariance + 1e-8 * np.diag([1.0, -1.0])
    # A perturbation of 1e-8 on numbers of size 2 is itself rounded: by 2.2e-16 / 1e-8 = 2.2e-8,
    # and both sides of it count; distances squared, twice that.
    assert kl_divergence(*laws) == pytest.approx(1.6666666666667e-17, rel=1e-7)
    assert bhattacharyya_distance(*laws) == pytest.approx(4.1666666666667e-18, rel=1e-7)
    assert wasserstein_distance(*laws) == pytest.approx(5.0e-9, rel=1e-7)


def test_ill_conditioned_hilbert_matrix() -> None:
    # Condition 1.5e7, times eps, is 3.3e-9.
    assert kl_divergence(*HILBERT) == pytest.approx(17.822208692154, rel=1e-8)
    assert bhattacharyya_distance(*HILBERT) == pytest.approx(8.4604030451674, rel=1e-8)
    squared = wasserstein_distance(*HILBERT, squared=True)
    assert squared == pytest.approx(4.0359984099986, rel=1e-8)
    assert kl_divergence(*swapped(HILBERT)) == pytest.approx(4658257.1168966, rel=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("name", DISTANCES)
def test_relative_accuracy_at_any_distance(name: str, size: float) -> None:
    mean, covariance = random_laws(5, spread=math.log(39) / 2)
    rng = np.random.default_rng(1)
    change = rng.standard_normal((5, 5))
    other = covariance + size * 0.01 * (change + change.T)
    laws = mean, covariance, mean, other
    reference = exact(name, *laws)
    # The rounding of a Cholesky factor, a few eps times the condition 39, beside a relative change
    # of 0.01 size: the difference of factors keeps that, a square twice that.
    tolerance = 8 * EPS * (10 + 39 / (0.01 * size))
    assert DISTANCES[name](*laws) == pytest.approx(reference, rel=tolerance, abs=0)


@pytest.mark.parametrize("size", [1e-4, 1e-8])
def test_factors_keep_all_digits_of_their_difference(size: float) -> None:
    mean, covariance = random_laws(4)
    factor = np.linalg.cholesky(covariance)
    other = factor + size * np.tril(np.random.default_rng(2).standard_normal((4, 4)))
    laws = mean, factor, mean, other
    for name in ("kl", "bhattacharyya"):
        with mpmath.workdps(50):
            one, two = (mpmath.matrix(array.tolist()) for array in (factor, other))
            reference = Exact(mean, np.eye(4), mean, np.eye(4))
            reference.one, reference.two = one * one.T, two * two.T
            value = float(getattr(reference, name)())
        # No rounding of the inputs: what remains is eps times the condition, e².
        result = DISTANCES[name](*laws, covariance_type="cholesky")
        assert result == pytest.approx(value, rel=64 * EPS * math.exp(2), abs=0)


@pytest.mark.parametrize("ratio", [1e-40, 1e-12, 0.3, 1.05, 1 + 1e-9, 3.0, 1e12, 1e40])
@pytest.mark.parametrize("covariance_type", ["full", "cholesky", "diag", "spherical"])
@pytest.mark.parametrize("name", DISTANCES)
def test_one_dimension_at_any_ratio_of_variances(
    name: str, covariance_type: str, ratio: float
) -> None:
    shape = {"full": (1, 1), "cholesky": (1, 1), "diag": (1,), "spherical": ()}[covariance_type]
    power = 0.5 if covariance_type == "cholesky" else 1.0
    variances = [np.full(shape, v**power) for v in (1.0, ratio)]
    mean = np.zeros(1)
    result = DISTANCES[name](
        mean, variances[0], mean, variances[1], covariance_type=covariance_type
    )
    given = [float(v.reshape(-1)[0]) for v in variances]
    with mpmath.workdps(120):
        exactly = [mpmath.mpf(v) ** (2 if covariance_type == "cholesky" else 1) for v in given]
        law = Exact(mean, np.eye(1), mean, np.eye(1))
        law.one, law.two = mpmath.matrix([[exactly[0]]]), mpmath.matrix([[exactly[1]]])
        reference = float(getattr(law, name)())
    # Factors are square roots, so a change of 1e-9 is known to eps / 1e-9 of itself, twice.
    near = abs(ratio - 1) < 1e-3 and covariance_type == "full"
    assert result == pytest.approx(reference, rel=4 * EPS / 1e-9 if near else 64 * EPS, abs=0)


def test_bhattacharyya_is_the_overlap_of_densities() -> None:
    one, two = stats.norm(0.3, 0.8), stats.norm(-1.0, 1.7)

    def overlap(x: float) -> float:
        return math.sqrt(one.pdf(x) * two.pdf(x))

    area, error = integrate.quad(overlap, -30, 30, epsabs=0, epsrel=1e-11, points=[-1, 0, 1])
    laws = [np.array([v]) for v in (0.3, 0.8**2, -1.0, 1.7**2)]
    distance = bhattacharyya_distance(*laws, covariance_type="diag")
    assert distance == pytest.approx(-math.log(area), abs=2 * error / area + 1e-12)
    hellinger = hellinger_distance(*laws, covariance_type="diag")
    assert hellinger**2 == pytest.approx(1 - area, abs=2 * error + 1e-12)


def test_wasserstein_in_one_dimension_is_the_distance_of_quantiles() -> None:
    one, two = stats.norm(0.3, 0.8), stats.norm(-1.0, 1.7)
    square, error = integrate.quad(
        lambda q: (one.ppf(q) - two.ppf(q)) ** 2, 0, 1, epsabs=0, epsrel=1e-8, limit=200
    )
    laws = [np.array([v]) for v in (0.3, 0.8**2, -1.0, 1.7**2)]
    assert wasserstein_distance(*laws, covariance_type="diag", squared=True) == pytest.approx(
        square, abs=2 * error + 1e-8
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 7), single=st.booleans())
def test_distances_are_zero_between_equal_laws_and_never_negative(
    seed: int, d: int, single: bool
) -> None:
    dtype = np.float32 if single else np.float64
    mean, covariance = (array.astype(dtype) for array in random_laws(d, seed=seed, spread=2.0))
    covariance = (covariance + covariance.T) / 2
    one_up = covariance * (1 + np.finfo(dtype).eps)
    for distance in DISTANCES.values():
        same, near = (
            distance(mean, covariance, mean, covariance),
            distance(mean, covariance, mean, one_up),
        )
        assert same == 0.0
        assert same.dtype == dtype
        assert near >= 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6))
def test_kl_and_bhattacharyya_do_not_change_under_affine_maps(seed: int, d: int) -> None:
    mean, covariance = random_laws(d, (2,), seed=seed)
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0]
    linear = axes * np.exp(rng.uniform(-1, 1, d))
    moved_mean = mean @ linear.T + rng.standard_normal(d)
    moved = linear @ covariance @ linear.T
    moved = (moved + moved.swapaxes(1, 2)) / 2
    for distance in (kl_divergence, bhattacharyya_distance):
        before = distance(mean[0], covariance[0], mean[1], covariance[1])
        after = distance(moved_mean[0], moved[0], moved_mean[1], moved[1])
        # Conditions of covariance and map multiply: e² e⁴ eps, for d terms.
        assert after == pytest.approx(before, rel=8 * d * math.exp(6) * EPS)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6), scale=st.floats(-100, 100))
def test_wasserstein_changes_like_a_length(seed: int, d: int, scale: float) -> None:
    mean, covariance = random_laws(d, (2,), seed=seed)
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    turned = turn @ covariance @ turn.T
    turned = (turned + turned.swapaxes(1, 2)) / 2
    before = wasserstein_distance(mean[0], covariance[0], mean[1], covariance[1])
    shifted = mean @ turn.T + rng.standard_normal(d)
    after = wasserstein_distance(shifted[0], turned[0], shifted[1], turned[1])
    assert after == pytest.approx(before, rel=256 * d * EPS)
    if abs(scale) > 1e-3:
        scaled = wasserstein_distance(
            scale * mean[0], scale**2 * covariance[0], scale * mean[1], scale**2 * covariance[1]
        )
        assert scaled == pytest.approx(abs(scale) * before, rel=256 * d * EPS)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 5))
def test_wasserstein_and_hellinger_are_metrics(seed: int, d: int) -> None:
    mean, covariance = random_laws(d, (3,), seed=seed)
    for metric in ("wasserstein", "hellinger"):
        table = pairwise_distance(0.3 * mean, covariance, metric=metric)
        assert table[0, 2] <= (table[0, 1] + table[1, 2]) * (1 + 64 * EPS)
        assert (table == table.T).all()


def test_small_changes_are_the_fisher_metric() -> None:
    mean, covariance = random_laws(4)
    change = np.random.default_rng(3).standard_normal((4, 4))
    change = 1e-5 * (change + change.T)
    whitened = np.linalg.solve(covariance, change)
    fisher = np.trace(whitened @ whitened) / 4
    laws = mean, covariance, mean, covariance + change
    size = np.linalg.norm(whitened)
    # The next term is of third order, a relative change of about the size of the change itself.
    assert kl_divergence(*laws) == pytest.approx(fisher, rel=4 * size)
    assert bhattacharyya_distance(*laws) == pytest.approx(fisher / 4, rel=4 * size)


def test_commuting_covariances() -> None:
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    one, two = np.array([0.5, 1.0, 1.0, 2.0, 7.0]), np.array([0.5, 3.0, 1.0, 0.2, 1.0])
    covariances = [(axes * variance) @ axes.T for variance in (one, two)]
    zero = np.zeros(5)
    expected = ((np.sqrt(one) - np.sqrt(two)) ** 2).sum()
    squared = wasserstein_distance(zero, covariances[0], zero, covariances[1], squared=True)
    assert squared == pytest.approx(expected, rel=1e3 * EPS)


def test_singular_covariances_have_a_wasserstein_distance() -> None:
    zero = np.zeros(3)
    one, two = np.diag([1.0, 0.0, 0.0]), np.diag([0.0, 4.0, 0.0])
    assert wasserstein_distance(zero, one, zero, two) == pytest.approx(math.sqrt(5), rel=4 * EPS)
    assert wasserstein_distance(zero, one, zero, one) == 0.0
    assert wasserstein_distance(zero, 0 * one, zero, two) == pytest.approx(2.0, rel=4 * EPS)
    batch = wasserstein_distance(zero, np.stack([one, np.eye(3)]), zero, two, squared=True)
    np.testing.assert_allclose(batch, [5.0, 3.0], rtol=8 * EPS)


def test_singular_sample_covariance_agrees_with_the_samples() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 10)), rng.standard_normal((8, 10)) + 1
    one, two = fit_gaussian(x), fit_gaussian(y)
    squared = wasserstein_distance(*one, *two, squared=True)
    # Eigenvalues of size eps that should be 0 enter by their square roots, on each side.
    size = np.trace(one.covariance) + np.trace(two.covariance)
    assert squared == pytest.approx(frechet_distance(x, y), abs=10 * math.sqrt(EPS) * size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_singular_covariances_are_refused_even_where_cholesky_succeeds(dtype: type) -> None:
    rng = np.random.default_rng(0)
    passed = 0
    for d in (3, 10, 40):
        for _ in range(10):
            # d samples leave one direction without variance; units must not matter.
            x = (rng.standard_normal((d, d)) * np.logspace(-1, 1, d)).astype(dtype)
            mean, covariance = fit_gaussian(x)
            passed += int(torch.linalg.cholesky_ex(torch.from_numpy(covariance)).info == 0)
            for distance in (kl_divergence, bhattacharyya_distance):
                with pytest.raises(
                    ValueError, match="covariance2 must be positive definite, small"
                ):
                    distance(mean, np.eye(d, dtype=dtype), mean, covariance)
            assert np.isfinite(wasserstein_distance(mean, np.eye(d), mean, covariance))
    assert passed >= 5, "the check was not needed"


def test_units_do_not_make_a_covariance_singular() -> None:
    mean, covariance = random_laws(4)
    units = np.array([1e-30, 1e-9, 1.0, 1e20])
    scaled = covariance * units * units[:, None]
    assert entropy(scaled) == pytest.approx(entropy(covariance) + np.log(units).sum(), rel=32 * EPS)
    assert kl_divergence(mean, scaled, mean, 2 * scaled) == pytest.approx(
        kl_divergence(mean, covariance, mean, 2 * covariance), rel=1e-13
    )


@pytest.mark.parametrize("d", [1, 2, 7, 20])
def test_map_turns_the_first_covariance_into_the_second(d: int) -> None:
    (mean1, mean2), (one, two) = random_laws(d, (2,), seed=d)
    moved = optimal_transport_map(mean1, one, mean2, two)
    assert (moved.matrix == moved.matrix.T).all()
    assert np.linalg.eigvalsh(moved.matrix).min() > 0
    tolerance = 32 * d * math.exp(2) * EPS
    np.testing.assert_allclose(
        moved.matrix @ one @ moved.matrix, two, atol=tolerance * np.abs(two).max()
    )
    np.testing.assert_allclose(moved(mean1), mean2, atol=tolerance * np.abs(mean2).max())
    away = moved.matrix - np.eye(d)
    cost = ((mean1 - mean2) ** 2).sum() + np.trace(away @ one @ away)
    squared = wasserstein_distance(mean1, one, mean2, two, squared=True)
    assert squared == pytest.approx(cost, rel=tolerance)


def test_map_moves_samples_at_the_cost_of_the_distance() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 3)) @ np.diag([1.0, 2.0, 0.1])
    law1, law2 = fit_gaussian(x, ddof=0), GaussianParameters(*random_laws(3))
    moved = optimal_transport_map(*law1, *law2)(x)
    fitted = fit_gaussian(moved, ddof=0)
    np.testing.assert_allclose(fitted.mean, law2.mean, atol=1e-12)
    np.testing.assert_allclose(fitted.covariance, law2.covariance, atol=1e-12)
    cost = ((moved - x) ** 2).sum(1).mean()
    squared = wasserstein_distance(*law1, *law2, squared=True)
    assert cost == pytest.approx(squared, rel=1e-12)


def test_batched_map_moves_batches_of_points() -> None:
    mean, covariance = random_laws(3, (4,))
    moved = optimal_transport_map(mean, covariance, np.zeros(3), np.eye(3))
    points = np.random.default_rng(0).standard_normal((4, 7, 3))
    images = moved(points)
    for k in range(4):
        alone = optimal_transport_map(mean[k], covariance[k], np.zeros(3), np.eye(3))
        np.testing.assert_allclose(images[k], alone(points[k]), rtol=1e-12, atol=1e-12)
    shared = optimal_transport_map(mean, covariance[0], np.zeros(3), np.eye(3))
    assert shared.matrix.shape == (4, 3, 3)
    shared.matrix[0] = 0.0
    assert (shared.matrix[1] != 0).any()


def test_map_to_a_singular_law() -> None:
    (mean, other), (covariance, _) = random_laws(3, (2,))
    flat = np.diag([4.0, 1.0, 0.0])
    moved = optimal_transport_map(mean, covariance, other, flat)
    np.testing.assert_allclose(moved.matrix @ covariance @ moved.matrix, flat, atol=1e-7)
    with pytest.raises(ValueError, match="covariance1 must be positive definite"):
        optimal_transport_map(other, flat, mean, covariance)


@pytest.mark.parametrize("covariance_type", ["cholesky", "diag", "spherical"])
@pytest.mark.parametrize("name", [*DISTANCES, "map"])
def test_covariance_types_agree(name: str, covariance_type: str) -> None:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((2, 5, 3))
    if covariance_type == "cholesky":
        given = np.linalg.cholesky(random_laws(3, (2, 5))[1])
        full = given @ given.swapaxes(-1, -2)
        given = given + np.triu(np.full((3, 3), np.nan), 1)
    else:
        given = np.exp(rng.standard_normal((2, 5, 3) if covariance_type == "diag" else (2, 5)))
        full = (given if covariance_type == "diag" else given[..., None])[..., None] * np.eye(3)
    function = optimal_transport_map if name == "map" else DISTANCES[name]
    narrow = function(mean[0], given[0], mean[1], given[1], covariance_type=covariance_type)
    wide = function(mean[0], full[0], mean[1], full[1])
    if name != "map":
        narrow, wide = [narrow], [wide]
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_entropy_of_every_type() -> None:
    variances = np.array([[0.5, 2.0, 3.0], [1.0, 1.0, 1.0]])
    factors = np.sqrt(variances)[..., None] * np.eye(3)
    expected = [stats.multivariate_normal(cov=np.diag(v)).entropy() for v in variances]
    np.testing.assert_allclose(entropy(variances, covariance_type="diag"), expected, rtol=8 * EPS)
    np.testing.assert_allclose(entropy(factors, covariance_type="cholesky"), expected, rtol=8 * EPS)
    np.testing.assert_allclose(entropy(factors**2), expected, rtol=8 * EPS)


def test_high_dimensions_do_not_overflow() -> None:
    d = 400
    small, large = 1e-3 * np.eye(d), 1e3 * np.eye(d)
    zero = np.zeros(d)
    assert entropy(small) == pytest.approx(
        d / 2 * (math.log(1e-3) + 1 + math.log(2 * math.pi)), rel=64 * EPS
    )
    assert kl_divergence(zero, small, zero, large) == pytest.approx(
        d / 2 * (1e-6 - 1 + math.log(1e6)), rel=64 * EPS
    )
    assert bhattacharyya_distance(zero, small, zero, large) == pytest.approx(
        d / 2 * math.log((1e3 + 1e-3) / 2), rel=64 * EPS
    )
    assert hellinger_distance(zero, small, zero, large) == 1.0


@every_distance
def test_leading_dimensions_broadcast(distance: Callable[..., Any]) -> None:
    mean1, covariance1 = random_laws(3, (2, 1, 4))[0], random_laws(3, (2, 1, 1), seed=1)[1]
    mean2, covariance2 = random_laws(3, (5, 1), seed=2)[0], random_laws(3, (5, 4), seed=3)[1]
    result = distance(mean1, covariance1, mean2, covariance2)
    assert result.shape == (2, 5, 4)
    for i, j, k in np.ndindex(2, 5, 4):
        alone = distance(mean1[i, 0, k], covariance1[i, 0, 0], mean2[j, 0], covariance2[j, k])
        assert result[i, j, k] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("factors", [(), (1,), (3, 1), (1, 4), (3, 4), (5, 1, 1), (5, 3, 1)])
def test_shared_factors_solve_like_repeated_ones(factors: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    factor = torch.from_numpy(np.linalg.cholesky(random_laws(2, factors)[1]))
    for lead in ((), (4,), (3, 4), (1, 4), (5, 3, 4), (5, 0, 4)):
        try:
            whole = torch.broadcast_shapes(factors, lead)
        except RuntimeError:
            continue
        one, two = (torch.from_numpy(rng.standard_normal((*b, 2, 3))) for b in (lead, lead[1:]))
        expected = torch.linalg.inv(factor) @ (one - two)
        solution = stable._solve_difference(factor, one, two)
        assert solution.shape == (*whole, 2, 3)
        torch.testing.assert_close(solution, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("covariance_type", ["full", "cholesky", "diag", "spherical"])
def test_pairwise_is_every_pair(metric: str, covariance_type: str) -> None:
    mean, covariance = random_laws(2, (17,))
    other_mean, other = random_laws(2, (5,), seed=1)
    reduced = {
        "full": lambda c: c,
        "cholesky": np.linalg.cholesky,
        "diag": lambda c: c[:, [0, 1], [0, 1]],
        "spherical": lambda c: c[:, 0, 0],
    }[covariance_type]
    covariance, other = reduced(covariance), reduced(other)
    kind = {"covariance_type": covariance_type}
    alone = pairwise_distance(mean, covariance, metric=metric, **kind)
    expected = DISTANCES[metric](mean[:, None], covariance[:, None], mean, covariance, **kind)
    np.testing.assert_allclose(alone, expected, rtol=1e-12, atol=1e-15)
    assert (np.diagonal(alone) == 0).all()
    across = pairwise_distance(mean, covariance, other_mean, other, metric=metric, **kind)
    expected = DISTANCES[metric](mean[:, None], covariance[:, None], other_mean, other, **kind)
    np.testing.assert_allclose(across, expected, rtol=1e-12)


def test_pairwise_kl_goes_from_row_to_column_and_squares_act_on_wasserstein_only() -> None:
    mean, covariance = random_laws(3, (4,))
    table = pairwise_distance(mean, covariance, metric="kl", squared=True)
    one_two = kl_divergence(mean[1], covariance[1], mean[2], covariance[2])
    assert table[1, 2] == pytest.approx(one_two, rel=1e-13)
    lengths = pairwise_distance(mean, covariance)
    squares = pairwise_distance(mean, covariance, squared=True)
    np.testing.assert_allclose(lengths**2, squares, rtol=4 * EPS)


def test_pairwise_does_not_depend_on_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, covariance = random_laws(3, (7,))
    other_mean, other = random_laws(3, (5,), seed=1)
    for metric in DISTANCES:
        whole = pairwise_distance(mean, covariance, other_mean, other, metric=metric)
        itself = pairwise_distance(mean, covariance, metric=metric)
        with monkeypatch.context() as smaller:
            smaller.setitem(pairs._WORKING_BYTES, "cpu", 4 * 12 * 9 * 8)
            tiled = pairwise_distance(mean, covariance, other_mean, other, metric=metric)
            np.testing.assert_allclose(tiled, whole, rtol=1e-13)
            tiled = pairwise_distance(mean, covariance, metric=metric)
            np.testing.assert_allclose(tiled, itself, rtol=1e-13)


def test_pairwise_factors_every_covariance_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factored = []
    cholesky = torch.linalg.cholesky_ex

    def counting(x: torch.Tensor) -> Any:
        factored.append(math.prod(x.shape[:-2]))
        return cholesky(x)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    mean, covariance = random_laws(3, (9,))
    for metric in ("wasserstein", "kl"):
        factored.clear()
        pairwise_distance(mean, covariance, mean[:4], covariance[:4], metric=metric)
        assert sum(factored) == 13


@pytest.mark.parametrize("metric", ["kl", "bhattacharyya"])
def test_pairwise_memory_is_bounded(metric: str) -> None:
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("needs Linux to watch its own memory")

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024

    # One copy of the matrices of all pairs is 164 MB, and every metric needs several.
    mean, covariance = (array.astype(np.float32) for array in random_laws(8, (800,)))
    pairwise_distance(mean[:40], covariance[:40], metric=metric)
    peak.write_text("5")
    before = resident("VmRSS")
    pairwise_distance(mean, covariance, mean, covariance, metric=metric)
    result = 4 * len(mean) ** 2
    assert resident("VmHWM") - before - result < 256 * 2**20


def test_shared_covariance_is_not_repeated() -> None:
    means = np.random.default_rng(0).standard_normal((20_000, 30))
    _, covariance = random_laws(30)
    # Repeated for every mean it would take 144 MB, and 20 000 solutions.
    far = kl_divergence(means, covariance, np.zeros(30), covariance)
    expected = np.einsum("ni,ij,nj->n", means, np.linalg.inv(covariance), means) / 2
    np.testing.assert_allclose(far, expected, rtol=1e-11)


def test_frechet_distance_is_that_of_the_fits() -> None:
    rng = np.random.default_rng(0)
    for n, m, d in ((50, 40, 5), (6, 40, 10), (40, 6, 10), (9, 10, 10), (7, 5, 12)):
        x, y = rng.standard_normal((n, d)), 2 * rng.standard_normal((m, d)) + 1
        for ddof in (0, 1):
            one, two = fit_gaussian(x, ddof=ddof), fit_gaussian(y, ddof=ddof)
            squared = wasserstein_distance(*one, *two, squared=True)
            size = np.trace(one.covariance) + np.trace(two.covariance)
            # Fits of few samples are singular, which costs half of the digits of their W2.
            tolerance = 1e-13 if min(n, m) > d else 10 * math.sqrt(EPS)
            assert frechet_distance(x, y, ddof=ddof) == pytest.approx(squared, abs=tolerance * size)


def test_frechet_distance_near_zero() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 20), (50, 20)):
        x = rng.standard_normal(shape)
        assert frechet_distance(x, x) == 0.0
        # Moving all samples by v moves the mean only; scaling by 1 + s stretches factors by 1 + s.
        moved = frechet_distance(x, x + 1e-6)
        assert moved == pytest.approx(20e-12, rel=1e-9)
        variance = fit_gaussian(x).covariance.trace()
        centred = x - x.mean(0)
        stretched = frechet_distance(centred, centred * (1 + 1e-6))
        # The factors differ by 1e-6 of themselves, known to eps each.
        assert stretched == pytest.approx(1e-12 * variance, rel=1e-8)


def test_frechet_distance_of_few_samples_forms_no_covariance() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4, 200_000))
    # One covariance would be 320 GB.
    gram = np.concatenate([x - x.mean(0), y - y.mean(0)])
    gram = gram @ gram.T / 3
    cross = np.linalg.svd(gram[:4, 4:], compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(gram) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(4, 4, 9), (4, 6, 9), (20, 5, 6), (20, 30, 4)])
def test_frechet_distance_has_the_gradient_of_its_samples(n: int, m: int, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(k, d, generator=generator, dtype=torch.float64, requires_grad=True)
        for k in (n, m)
    )
    assert gradcheck(frechet_distance, (x, y))


def test_frechet_gradient_stands_pixels_without_variance() -> None:
    rng = np.random.default_rng(0)
    x, y = tensors(*rng.standard_normal((2, 40, 6)))
    x[:, 2] = y[:, 2] = 0.5
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(frechet_distance(x, y), x)
    assert gradient.isfinite().all()
    keep = [0, 1, 3, 4, 5]
    narrow = x.detach()[:, keep].requires_grad_()
    (expected,) = torch.autograd.grad(frechet_distance(narrow, y[:, keep]), narrow)
    torch.testing.assert_close(gradient[:, keep], expected, rtol=1e-9, atol=1e-9)


def test_fit_is_numpys() -> None:
    x = np.random.default_rng(0).standard_normal((3, 8, 4))
    for ddof in (0, 1):
        fitted = fit_gaussian(x, ddof=ddof)
        expected = [np.cov(part, rowvar=False, ddof=ddof) for part in x]
        np.testing.assert_allclose(fitted.mean, x.mean(1), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(fitted.covariance, expected, rtol=1e-13, atol=1e-15)
        assert (fitted.covariance == fitted.covariance.swapaxes(1, 2)).all()


def symmetrised(distance: Callable[..., Any], **options: Any) -> Callable[..., torch.Tensor]:
    def function(mean1: Any, x: Any, mean2: Any, y: Any) -> torch.Tensor:
        return distance(mean1, (x + x.mT) / 2, mean2, (y + y.mT) / 2, **options)

    return function


def gradient_laws(case: str) -> list[torch.Tensor]:
    (mean1, mean2), (one, two) = random_laws(3, (2,))
    if case == "repeated singular values":
        one, two = np.eye(3), 4 * np.eye(3)
    if case == "nearly equal":
        two = one + 1e-3 * two
    if case == "far apart":
        two = 30 * two
    if case == "batch":
        (mean1, mean2), (one, two) = random_laws(3, (2, 2))
        mean2 = mean2[0]
    return [x.requires_grad_() for x in tensors(mean1, one, mean2, two)]


@pytest.mark.parametrize(
    "case", ["generic", "repeated singular values", "nearly equal", "far apart", "batch"]
)
@every_distance
def test_gradients(distance: Callable[..., Any], case: str) -> None:
    assert gradcheck(symmetrised(distance), gradient_laws(case))


@pytest.mark.parametrize("covariance_type", ["cholesky", "diag", "spherical"])
@every_distance
def test_gradients_of_other_types(distance: Callable[..., Any], covariance_type: str) -> None:
    mean1, one, mean2, two = (x.detach() for x in gradient_laws("generic"))
    if covariance_type == "cholesky":
        one, two = torch.linalg.cholesky(one), torch.linalg.cholesky(two)
    else:
        pick = (lambda x: x.diagonal()) if covariance_type == "diag" else (lambda x: x[0, 0])
        one, two = pick(one), pick(two)
    laws = [x.clone().requires_grad_() for x in (mean1, one, mean2, two)]
    assert gradcheck(lambda *given: distance(*given, covariance_type=covariance_type), laws)


@pytest.mark.parametrize("case", ["generic", "repeated singular values", "batch"])
def test_gradient_of_the_map(case: str) -> None:
    assert gradcheck(symmetrised(optimal_transport_map), gradient_laws(case))


def test_gradients_of_pairwise_distances() -> None:
    mean, covariance = tensors(*random_laws(2, (9,)))
    laws = [mean.requires_grad_(), covariance.requires_grad_()]
    for metric in DISTANCES:
        table = pairwise_distance(*laws, metric=metric)
        gradients = torch.autograd.grad((table * torch.arange(81).reshape(9, 9)).sum(), laws)
        weights = torch.arange(81).reshape(9, 9).double().fill_diagonal_(0)
        broadcast = DISTANCES[metric](mean[:, None], covariance[:, None], mean, covariance)
        expected = torch.autograd.grad((broadcast * weights).sum(), laws)
        for gradient, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_gradient_of_wasserstein_is_identity_less_map() -> None:
    mean1, one, mean2, two = laws = gradient_laws("generic")
    gradients = torch.autograd.grad(wasserstein_distance(*laws, squared=True), laws)
    forth = optimal_transport_map(*laws).matrix
    back = optimal_transport_map(mean2, two, mean1, one).matrix
    identity = torch.eye(3, dtype=torch.float64)
    expected = 2 * (mean1 - mean2), identity - forth, 2 * (mean2 - mean1), identity - back
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@every_distance
def test_gradient_goes_to_the_symmetric_part(distance: Callable[..., Any]) -> None:
    laws = gradient_laws("generic")
    for gradient in torch.autograd.grad(distance(*laws), (laws[1], laws[3])):
        torch.testing.assert_close(gradient, gradient.mT, rtol=0, atol=0)


@pytest.mark.parametrize("covariance_type", ["full", "cholesky", "diag", "spherical"])
@every_distance
def test_gradient_at_distance_zero_is_zero(
    distance: Callable[..., Any], covariance_type: str
) -> None:
    full = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    covariance = {
        "full": full,
        "cholesky": full.tril(),
        "diag": full.diagonal(),
        "spherical": full[0, 0],
    }[covariance_type]
    laws = [torch.zeros(2), covariance, torch.zeros(2), covariance]
    laws = [x.clone().requires_grad_() for x in laws]
    value = distance(*laws, covariance_type=covariance_type)
    assert value == 0
    for gradient in torch.autograd.grad(value, laws):
        assert (gradient == 0).all()


@pytest.mark.parametrize("covariance_type", ["full", "cholesky"])
def test_second_derivative_of_wasserstein_raises(covariance_type: str) -> None:
    laws = gradient_laws("generic")
    if covariance_type == "cholesky":
        laws = [*laws[:3], torch.linalg.cholesky(laws[3].detach())]
        laws[1] = torch.linalg.cholesky(laws[1].detach()).requires_grad_()
    for squared in (True, False):
        value = wasserstein_distance(*laws, covariance_type=covariance_type, squared=squared)
        (gradient,) = torch.autograd.grad(value, laws[1], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(gradient.sum(), laws[1])
    matrix = optimal_transport_map(*laws, covariance_type=covariance_type).matrix
    (gradient,) = torch.autograd.grad(matrix.sum(), laws[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.sum(), laws[1])


def test_second_derivative_of_wasserstein_in_the_means_alone() -> None:
    mean1, one, mean2, two = (x.detach() for x in gradient_laws("generic"))
    hessian = torch.autograd.functional.hessian(
        lambda mean: wasserstein_distance(mean, one, mean2, two, squared=True), mean1
    )
    torch.testing.assert_close(hessian, 2 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "case", ["generic", "nearly equal", "repeated singular values", "far apart"]
)
@pytest.mark.parametrize("name", ["kl", "bhattacharyya"])
def test_second_derivatives_of_kl_and_bhattacharyya(name: str, case: str) -> None:
    assert gradgradcheck(symmetrised(DISTANCES[name]), gradient_laws(case))


@pytest.mark.parametrize(("name", "factor"), [("kl", 1.0), ("bhattacharyya", 0.25)])
def test_second_derivative_at_equal_laws_is_fisher_information(name: str, factor: float) -> None:
    mean, covariance = tensors(*random_laws(3))
    change = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = change + change.mT

    def along(step: torch.Tensor) -> torch.Tensor:
        return DISTANCES[name](mean + step[0], covariance + step[1] * change, mean, covariance)

    hessian = torch.autograd.functional.hessian(along, torch.zeros(2, dtype=torch.float64))
    whitened = torch.linalg.solve(covariance, change)
    precision = torch.linalg.inv(covariance).sum()
    expected = factor * torch.diag(torch.stack([precision, (whitened @ whitened).trace() / 2]))
    torch.testing.assert_close(hessian, expected, rtol=1e-11, atol=1e-11)


def test_gradient_through_a_singular_covariance_raises() -> None:
    zero, flat = torch.zeros(2), torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="positive definite where a gradient is asked for"):
        wasserstein_distance(zero, flat.clone().requires_grad_(), zero, torch.eye(2))
    regular = torch.eye(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        wasserstein_distance(zero, regular, zero, flat, squared=True), regular
    )
    torch.testing.assert_close(gradient, torch.diag(torch.tensor([0.0, 1.0])))


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    laws = gradient_laws("generic")
    with torch.no_grad():
        assert not wasserstein_distance(*laws).requires_grad
    assert wasserstein_distance(*laws).requires_grad


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("covariance_type", ["cholesky", "diag", "spherical"])
@pytest.mark.bad_input  # not bad, but shape checks are no code that dynamo traces
def test_values_compile_into_one_graph(name: str, covariance_type: str) -> None:
    mean, covariance = random_laws(3, (4,))
    given = {
        "cholesky": np.linalg.cholesky(covariance),
        "diag": covariance[:, [0, 1, 2], [0, 1, 2]],
        "spherical": covariance[:, 0, 0],
    }[covariance_type]
    laws = tensors(
        mean,
        given,
        mean[::-1].copy(),
        given * np.array([1.0, 1.01, 2.0, 9.0])[(slice(None),) + (None,) * (given.ndim - 1)],
    )
    laws[2][0], laws[3][0] = laws[0][0], laws[1][0]

    def function(*laws: torch.Tensor) -> torch.Tensor:
        return DISTANCES[name](*laws, covariance_type=covariance_type)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*laws), function(*laws), rtol=1e-9, atol=1e-9)
    assert compiled(*laws)[0] == 0


@every_distance
def test_autocast_does_not_round_to_half(distance: Callable[..., Any]) -> None:
    laws = tensors(*random_laws(4), *random_laws(4, seed=1), dtype=torch.float32)
    expected = distance(*laws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distance(*laws)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_precision_follows_the_arguments() -> None:
    mean, covariance = random_laws(2)
    single = mean.astype(np.float32), covariance.astype(np.float32)
    single = single[0], (single[1] + single[1].T) / 2
    assert kl_divergence(*single, *single).dtype == np.float32
    # Symmetric to single precision is symmetric enough, whatever stands beside it.
    skew = single[1] + np.array([[0, 1e-6], [0, 0]], np.float32)
    assert kl_divergence(mean, skew, mean, covariance).dtype == np.float64
    assert kl_divergence([0, 0], np.eye(2, dtype=int), [1, 1], np.eye(2, dtype=int)) == 1.0
    assert isinstance(kl_divergence(*A), np.float64)
    half = kl_divergence(torch.zeros(3), 2.0, torch.zeros(3), 2.0, covariance_type="spherical")
    assert half.dtype == torch.float32
    with_lists = kl_divergence([0.0], [[4.0]], [3.0], [[25.0]])
    assert with_lists == pytest.approx(0.67629073187416, rel=DIGITS)


def test_arrays_of_any_layout() -> None:
    _, covariance = random_laws(3)
    frozen = covariance.copy()
    frozen.setflags(write=False)
    foreign = covariance.astype(covariance.dtype.newbyteorder())
    backwards = covariance[::-1, ::-1]
    expected = entropy(covariance)
    assert entropy(frozen) == entropy(foreign) == expected
    assert entropy(backwards) == pytest.approx(expected, rel=32 * EPS)


WRONG = {
    "mean1 and mean2 must have the same dimension d, got 2 and 3": {"mean2": np.zeros(3)},
    r"covariance2 must have shape \(..., 2, 2\) for covariance_type='full', got \(2, 3\)": {
        "covariance2": np.ones((2, 3))
    },
    r"covariance1 must have shape \(..., 2\) for covariance_type='diag', got \(3,\)": {
        "covariance1": np.ones(3),
        "covariance_type": "diag",
    },
    r"mean1 must have shape \(..., d\)": {"mean1": np.array(1.0)},
    "leading dimensions must broadcast": {"mean1": np.zeros((3, 2)), "mean2": np.zeros((4, 2))},
    "covariance1 must be symmetric, largest asymmetry 0.5": {
        "covariance1": np.array([[2.0, 0.5], [0.0, 2.0]])
    },
    "covariance2 must be positive definite, smallest eigenvalue -1": {
        "covariance2": np.array([[1.0, 2.0], [2.0, 1.0]])
    },
    "covariance1 must be positive definite, smallest eigenvalue 0": {
        "covariance1": np.diag([1.0, 0.0])
    },
    "covariance1 must hold positive variances, smallest entry 0": {
        "covariance1": np.array([1.0, 0.0]),
        "covariance2": np.ones(2),
        "covariance_type": "diag",
    },
    "covariance2 must have a positive diagonal, smallest entry -1": {
        "covariance1": np.eye(2),
        "covariance2": -np.eye(2),
        "covariance_type": "cholesky",
    },
    "mean2 must be finite": {"mean2": np.array([0.0, np.nan])},
    "covariance1 must be finite": {"covariance1": np.array([[np.inf, 0.0], [0.0, 1.0]])},
    "covariance_type must be one of full, cholesky, diag, spherical, got 'tied'": {
        "covariance_type": "tied"
    },
}


@pytest.mark.bad_input
@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("name", ["kl", "bhattacharyya", "hellinger"])
def test_wrong_arguments_are_named(name: str, message: str) -> None:
    names = ("mean1", "covariance1", "mean2", "covariance2")
    given = {**dict(zip(names, A, strict=True)), **WRONG[message]}
    with pytest.raises(ValueError, match=message):
        DISTANCES[name](**given)


@pytest.mark.bad_input
def test_wasserstein_refuses_negative_eigenvalues_beyond_rounding() -> None:
    mean, covariance = A[:2]
    for lowest, refused in ((-1e-6, True), (-1e-15, False)):
        law = mean, np.diag([1.0, lowest])
        if refused:
            with pytest.raises(ValueError, match="semi-definite, smallest eigenvalue -1e-06"):
                wasserstein_distance(mean, covariance, *law)
        else:
            assert np.isfinite(wasserstein_distance(mean, covariance, *law))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float16),
        lambda x: x.astype(complex),
        lambda x: x.astype(np.longdouble),
        lambda x: x > 0,
        lambda x: torch.from_numpy(x).half(),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: torch.from_numpy(x).long(),
        lambda x: torch.from_numpy(x) + 1j,
    ],
    ids=[
        "half",
        "complex",
        "long double",
        "boolean",
        "torch half",
        "bfloat16",
        "long",
        "torch complex",
    ],
)
@every_distance
def test_other_kinds_of_number_are_refused(
    distance: Callable[..., Any], convert: Callable[[np.ndarray], Any]
) -> None:
    with pytest.raises(TypeError, match="expected float32 or float64"):
        distance(*map(convert, A))


@pytest.mark.bad_input
def test_numpy_and_torch_do_not_mix() -> None:
    with pytest.raises(TypeError, match="all numpy or all torch, got mean2, covariance2"):
        kl_divergence(*tensors(*A[:2]), *A[2:])


@pytest.mark.bad_input
def test_wrong_collections_and_samples_are_named() -> None:
    mean, covariance = random_laws(2, (3,))
    with pytest.raises(ValueError, match="got means2 without covariances2"):
        pairwise_distance(mean, covariance, mean)
    with pytest.raises(ValueError, match="got covariances2 without means2"):
        pairwise_distance(mean, covariance, None, covariance)
    with pytest.raises(ValueError, match=r"metric must be one of wasserstein, kl, .*got 'cosine'"):
        pairwise_distance(mean, covariance, metric="cosine")
    with pytest.raises(ValueError, match=r"means1 must have shape \(n, d\)"):
        pairwise_distance(mean, covariance[:2])
    with pytest.raises(ValueError, match="covariances2 must be positive definite"):
        pairwise_distance(mean, covariance, mean, 0 * covariance, metric="kl")
    with pytest.raises(ValueError, match="samples must have more than ddof = 1 rows, got 1"):
        fit_gaussian(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="samples2 must have more than ddof = 2 rows, got 2"):
        frechet_distance(np.eye(3), np.zeros((2, 3)), ddof=2)
    with pytest.raises(ValueError, match="same dimension d, got 3 and 2"):
        frechet_distance(np.eye(3), np.eye(2))
    with pytest.raises(
        ValueError, match="covariance_type must be one of full, cholesky, diag, got"
    ):
        entropy(np.ones(2), covariance_type="spherical")
    with pytest.raises(ValueError, match=r"points must have shape \(..., 2\), got \(3,\)"):
        optimal_transport_map(*A)(np.zeros(3))


def test_empty_batches() -> None:
    mean, covariance = np.zeros((0, 3)), np.zeros((0, 3, 3))
    for name, distance in DISTANCES.items():
        assert distance(mean, covariance, np.zeros(3), np.eye(3)).shape == (0,)
        assert pairwise_distance(mean, covariance, metric=name).shape == (0, 0)
        across = pairwise_distance(mean, covariance, np.zeros((2, 3)), np.stack([np.eye(3)] * 2))
        assert across.shape == (0, 2)
    assert optimal_transport_map(mean, covariance, mean, covariance).matrix.shape == (0, 3, 3)


def test_kl_is_that_of_torch_distributions() -> None:
    (mean1, mean2), (one, two) = (tensors(x)[0] for x in random_laws(6, (2, 10)))
    peers = [torch.distributions.MultivariateNormal(m, c) for m, c in ((mean1, one), (mean2, two))]
    expected = torch.distributions.kl_divergence(*peers)
    torch.testing.assert_close(
        kl_divergence(mean1, one, mean2, two), expected, rtol=1e-10, atol=1e-10
    )


def test_wasserstein_is_that_of_pot() -> None:
    peer = pytest.importorskip("ot.gaussian").bures_wasserstein_distance
    (mean1, mean2), (one, two) = random_laws(6, (2, 5))
    for k in range(5):
        expected = peer(mean1[k], mean2[k], one[k], two[k])
        result = wasserstein_distance(mean1[k], one[k], mean2[k], two[k])
        assert result == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.gpu
def test_results_on_a_gpu_are_those_of_the_cpu() -> None:
    mean, covariance = tensors(*random_laws(5, (30,)))
    for metric in DISTANCES:
        here = pairwise_distance(mean, covariance, metric=metric)
        there = pairwise_distance(mean.cuda(), covariance.cuda(), metric=metric)
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)
        laws = [mean.cuda().requires_grad_(), covariance.cuda().requires_grad_()]
        gradients = torch.autograd.grad(pairwise_distance(*laws, metric=metric).sum(), laws)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_squares_of_distant_means_stay_in_range() -> None:
    """Float32: the shift squared, or the sum of the variances, is no number."""
    f = np.float32
    given = {"covariance_type": "diag"}
    assert kl_divergence(f([1e20]), f([1e38]), f([0]), f([1e38]), **given) == pytest.approx(50)
    assert kl_divergence(f([1e-24]), f([1e-38]), f([0]), f([1e-38]), **given) == pytest.approx(
        5e-11, rel=1e-5
    )
    assert bhattacharyya_distance(
        f([3e19]), f([2e38]), f([0]), f([2e38]), **given
    ) == pytest.approx(0.5625, rel=1e-6)
