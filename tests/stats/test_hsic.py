"""HSIC against 40-digit values, enumeration, brute force, closed forms and simulation."""

from __future__ import annotations

import itertools
import math
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from kexue.stats.hsic import (
    centered_kernel_alignment,
    hsic,
    hsic_test,
    kernel_matrix,
    median_bandwidth,
)
from kexue.stats.hsic import estimators as estimators_module
from kexue.stats.hsic import independence as independence_module

EPS = np.finfo(float).eps
X = np.array([0.0, 1.0, 2.0, 4.0, 7.0, 11.0])
Y = np.array([1.0, 0.0, 3.0, 2.0, 5.0, 4.0])
# The oracles were computed with 40 digits and are written down to 14, so half a unit in the last
# place is at most 5e-14 of them; three terms that cancel to a third of their size add some EPS.
DIGITS = 2e-13

KERNELS = ("gaussian", "laplacian", "linear", "distance")
LINEAR: dict[str, Any] = {"kernel_x": "linear", "kernel_y": "linear"}
FIXED: dict[str, Any] = {"bandwidth_x": 1.0, "bandwidth_y": 1.0}


def centring(n: int) -> np.ndarray:
    return np.eye(n) - 1 / n


def centred_trace(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741 - as the theory writes it
    h = centring(len(k))
    return float(np.trace(k @ h @ l @ h))


def draw(n: int, dx: int, dy: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dependent samples, no coordinate of which is alone responsible."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dx))
    y = rng.standard_normal((n, dy)) + np.sin(x[:, :1]) + x.mean(axis=1, keepdims=True) ** 2
    return x, y


def test_medians_of_six_points() -> None:
    assert median_bandwidth(X) == 4.0
    assert median_bandwidth(Y) == 2.0


def test_gaussian_estimates_of_six_points() -> None:
    assert hsic(X, Y, estimator="biased") == pytest.approx(0.084428684243695, rel=DIGITS)
    assert hsic(X, Y) == pytest.approx(0.052203127525229, rel=DIGITS)


def test_gaussian_alignment_of_six_points() -> None:
    value = centered_kernel_alignment(X, Y, kernel_x="gaussian", kernel_y="gaussian")
    assert value == pytest.approx(0.66313224981963, rel=DIGITS)


def test_linear_criterion_is_the_squared_covariance() -> None:
    assert np.cov(X, Y)[0, 1] ** 2 == pytest.approx(37.21, rel=4 * EPS)
    assert hsic(X, Y, estimator="biased", **LINEAR) == pytest.approx(37.21, rel=16 * EPS)
    assert hsic(X, Y, **LINEAR) == pytest.approx(34.388888888889, rel=DIGITS)


def test_linear_criterion_is_the_squared_norm_of_the_covariance_matrix() -> None:
    x, y = draw(40, 3, 2)
    covariance = np.cov(x, y, rowvar=False)[:3, 3:]
    value = hsic(x, y, estimator="biased", **LINEAR)
    assert value == pytest.approx(np.sum(covariance**2), rel=64 * EPS)


def test_linear_alignment_in_one_dimension_is_the_squared_correlation() -> None:
    value = centered_kernel_alignment(X, Y)
    assert value == pytest.approx(0.61217438990951, rel=DIGITS)
    assert value == pytest.approx(np.corrcoef(X, Y)[0, 1] ** 2, rel=16 * EPS)


@pytest.mark.filterwarnings("ignore:the gamma law")
def test_statistic_of_six_points() -> None:
    for method in ("permutation", "gamma"):
        result = hsic_test(X, Y, method=method, random_state=0)
        assert result.statistic == pytest.approx(0.3517861843487, rel=DIGITS)
        assert (result.bandwidth_x, result.bandwidth_y) == (4.0, 2.0)


def all_statistics() -> np.ndarray:
    """tr(K H P L Pᵀ H) for all 720 pairings of the six points, by definition."""
    h = centring(6)
    k = h @ kernel_matrix(X, bandwidth=4.0) @ h
    l = h @ kernel_matrix(Y, bandwidth=2.0) @ h  # noqa: E741
    orders = itertools.permutations(range(6))
    return np.array([np.sum(k * l[np.ix_(order, order)]) for order in orders])


def test_mean_over_all_pairings_is_the_product_of_traces() -> None:
    h = centring(6)
    traces = [np.trace(h @ kernel_matrix(v, bandwidth=b) @ h) for v, b in ((X, 4.0), (Y, 2.0))]
    assert all_statistics().mean() == pytest.approx(1.1015604320123, rel=DIGITS)
    assert traces[0] * traces[1] / 5 == pytest.approx(1.1015604320123, rel=DIGITS)


def test_permutation_pvalue_approaches_exact_enumeration() -> None:
    statistics = all_statistics()
    reached = np.count_nonzero(statistics >= statistics[0] * (1 - 1e-12))
    assert reached == 40
    exact = reached / 720
    draws = 20_000
    result = hsic_test(X, Y, n_permutations=draws, random_state=3)
    # Four standard errors of a binomial share.
    assert abs(result.pvalue - exact) <= 4 * math.sqrt(exact * (1 - exact) / draws)


def test_permutations_reach_only_values_that_enumeration_reaches() -> None:
    null = hsic_test(X, Y, random_state=0).null_distribution
    assert null is not None
    assert null.shape == (999,)
    distance = np.abs(6 * null[:, None] - all_statistics()).min(axis=1)
    # Entries of at most 1, thirty-six of them, a few roundings each.
    assert distance.max() <= 100 * EPS


def test_pvalue_counts_ties_and_the_sample_itself() -> None:
    eight = np.arange(8) % 2
    draws = 20_000
    result = hsic_test(
        eight, eight, kernel_x="delta", kernel_y="delta", n_permutations=draws, random_state=0
    )
    # Two of the 70 halves of eight give the largest statistic, which the sample has.
    exact = 2 / 70
    assert abs(result.pvalue - exact) <= 4 * math.sqrt(exact * (1 - exact) / draws)
    many = np.arange(60) % 2
    alone = hsic_test(many, many, kernel_x="delta", kernel_y="delta", n_permutations=19)
    assert alone.pvalue == 1 / 20


def test_gamma_law_of_six_points_warns_and_is_wrong() -> None:
    with pytest.warns(UserWarning, match="n is 6"):
        result = hsic_test(X, Y, method="gamma")
    # The tail amplifies relative errors of shape and scale about ten times.
    assert result.pvalue == pytest.approx(0.0098299549320748, rel=10 * DIGITS)
    assert result.null_distribution is None


def null_moments(x: np.ndarray, y: np.ndarray, block_size: int | None = None) -> Any:
    gram_x, gram_y = estimators_module._pair(
        x, y, ("gaussian", "gaussian"), ("median", "median"), least=6
    )
    blocks = estimators_module._blocks(gram_x, gram_y, block_size)
    sums = estimators_module._sums(gram_x, gram_y, diagonal=True, block_size=block_size)
    return independence_module._null_moments(gram_x, gram_y, sums, blocks)


@pytest.mark.parametrize("block_size", [None, 4])
def test_null_moments_of_six_points(block_size: int | None) -> None:
    mean, variance = null_moments(X, Y, block_size)
    assert mean == pytest.approx(0.036718681067077, rel=DIGITS)
    assert variance == pytest.approx(6.7929296081722e-05, rel=DIGITS)


def test_null_moments_are_those_of_simulated_independent_samples() -> None:
    n, draws = 60, 3000
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((draws, n, 1)), rng.exponential(size=(draws, n, 1))
    biased = hsic(x, y, bandwidth_x=1.0, bandwidth_y=1.0, estimator="biased")
    simulated = biased * ((n - 1) / n) ** 2
    moments = np.array([
        _moments_at_bandwidth_one(x[i], y[i]) for i in range(100)
    ])  # fmt: skip
    mean, variance = moments.mean(axis=0)
    # Mean: exact to order 1/n of its size. Variance: relative standard error sqrt((κ - 1)/draws)
    # with a kurtosis κ of about 8 is 5 %, and the formula is asymptotic in n.
    assert simulated.mean() == pytest.approx(mean, rel=0.05)
    assert simulated.var() == pytest.approx(variance, rel=0.25)


def _moments_at_bandwidth_one(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    gram_x, gram_y = estimators_module._pair(x, y, ("gaussian", "gaussian"), (1.0, 1.0), least=6)
    sums = estimators_module._sums(gram_x, gram_y, diagonal=True, block_size=None)
    blocks = estimators_module._blocks(gram_x, gram_y, None)
    moments: tuple[float, float] = independence_module._null_moments(gram_x, gram_y, sums, blocks)
    return moments


def population(rho: float) -> float:
    return 1 / math.sqrt(9 - 4 * rho**2) + 1 / 3 - 1 / math.sqrt(9 / 4 - rho**2 / 4)


@pytest.mark.parametrize(
    ("rho", "value"),
    [(0.0, 0.0), (0.25, 0.0024014272190673), (0.5, 0.010763320143794), (0.9, 0.051143442185388)],
)
@pytest.mark.parametrize("n", [4, 10])
def test_unbiased_estimate_has_the_population_value_as_its_mean(
    rho: float, value: float, n: int
) -> None:
    assert population(rho) == pytest.approx(value, abs=1e-15)
    draws = 20_000
    rng = np.random.default_rng(n)
    x, noise = torch.from_numpy(rng.standard_normal((2, draws, n, 1)))
    y = rho * x + math.sqrt(1 - rho**2) * noise
    unbiased = hsic(x, y, **FIXED)
    biased = hsic(x, y, estimator="biased", **FIXED)
    # Four standard errors, eight tests: a sound estimator fails in one of two thousand suites.
    assert abs(unbiased.mean() - value) <= 4 * unbiased.std() / math.sqrt(draws)
    assert abs(biased.mean() - value) > 20 * biased.std() / math.sqrt(draws)


def test_unbiased_estimate_is_the_u_statistic_over_distinct_indices() -> None:
    x, y = draw(7, 2, 1)
    k, l = (kernel_matrix(v, bandwidth=1.0) for v in (x, y))  # noqa: E741
    terms = [
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
        for i, j, q, r in itertools.permutations(range(7), 4)
    ]
    assert hsic(x, y, **FIXED) == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_biased_estimate_is_the_trace_with_centring_matrices(kernel: str) -> None:
    x, y = draw(23, 2, 10)
    value = hsic(x, y, kernel_x=kernel, kernel_y=kernel, estimator="biased", **FIXED)
    k, l = (kernel_matrix(v, kernel=kernel, bandwidth=1.0) for v in (x, y))  # noqa: E741
    # The trace cancels all but about 1/n of its terms.
    assert value == pytest.approx(centred_trace(k, l) / 22**2, rel=1e-12)


def test_distance_kernel_gives_squared_distance_covariance() -> None:
    x, y = draw(30, 2, 3)
    h = centring(30)
    a, b = (h @ cdist(v, v) @ h for v in (x, y))
    value = hsic(x, y, kernel_x="distance", kernel_y="distance", estimator="biased")
    assert 4 * value * 29**2 / 30**2 == pytest.approx(np.mean(a * b), rel=1e-12)


def test_kernels_by_their_definitions() -> None:
    x, y = draw(5, 3, 3)
    sides = {
        "gaussian": lambda u, v: math.exp(-np.sum((u - v) ** 2) / (2 * 1.7**2)),
        "laplacian": lambda u, v: math.exp(-np.sum(np.abs(u - v)) / 1.7),
        "linear": lambda u, v: float(u @ v),
        "distance": lambda u, v: (
            (np.linalg.norm(u) + np.linalg.norm(v) - np.linalg.norm(u - v)) / 2
        ),
        "delta": lambda u, v: float((u == v).all()),
    }
    y[2] = x[1]
    for kernel, definition in sides.items():
        expected = [[definition(u, v) for v in y] for u in x]
        matrix = kernel_matrix(x, y, kernel=kernel, bandwidth=1.7)
        np.testing.assert_allclose(matrix, expected, atol=16 * EPS)


@pytest.mark.parametrize("features", [1, 8, 9, 300])
def test_gaussian_kernel_of_a_point_with_itself_is_exactly_one(features: int) -> None:
    x = 1e3 + np.random.default_rng(0).standard_normal((20, features))
    for kernel in ("gaussian", "laplacian"):
        assert (np.diag(kernel_matrix(x, kernel=kernel, bandwidth=0.1)) == 1).all()
        tensor = torch.from_numpy(x).float()
        assert (kernel_matrix(tensor, kernel=kernel, bandwidth=0.1).diagonal() == 1).all()


def test_offset_of_the_data_costs_few_digits() -> None:
    x, y = draw(50, 12, 9)
    for kernel in KERNELS:
        near = hsic(x, y, kernel_x=kernel, kernel_y=kernel, **FIXED)
        far = hsic(x + 2.0**20, y - 2.0**20, kernel_x=kernel, kernel_y=kernel, **FIXED)
        # The shift itself rounds the data to 2^20 EPS.
        assert far == pytest.approx(near, rel=1e-7, abs=2**24 * EPS)


def test_delta_kernel_tells_long_identifiers_apart() -> None:
    labels = 2**60 + np.arange(4)
    assert (kernel_matrix(labels, kernel="delta") == np.eye(4)).all()


def test_small_bandwidth_forgets_the_data_and_a_large_one_is_linear() -> None:
    x, y = draw(25, 2, 2)
    small = hsic(x, y, bandwidth_x=1e-6, bandwidth_y=1e-6, estimator="biased")
    assert small == pytest.approx(1 / 24, rel=1e-12)
    sigma = 300.0
    large = hsic(x, y, bandwidth_x=sigma, bandwidth_y=sigma, estimator="biased")
    linear = hsic(x, y, estimator="biased", **LINEAR)
    # exp(-z) = 1 - z (1 - O(z)) with z of about |x - x'|²/(2σ²), at most 5e-4.
    assert large * sigma**4 == pytest.approx(linear, rel=2e-3)


def test_scale_changes_nothing_at_the_median_bandwidth() -> None:
    x, y = draw(60, 2, 1)
    for estimator in ("biased", "unbiased"):
        value = hsic(x, y, estimator=estimator)
        # A power of two scales without rounding.
        assert hsic(x, 1024 * y, estimator=estimator) == value
        assert hsic(x / 3, 7 * y, estimator=estimator) == pytest.approx(value, rel=1e-11)


samples = st.integers(4, 40).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, 11), st.integers(1, 3), st.integers(0, 10**6))
)


@settings(max_examples=40, deadline=None)
@given(sample=samples, kernel=st.sampled_from(KERNELS))
def test_order_of_samples_and_sides_does_not_matter(
    sample: tuple[int, int, int, int], kernel: str
) -> None:
    n, dx, dy, seed = sample
    x, y = draw(n, dx, dy, seed)
    order = np.random.default_rng(seed).permutation(n)
    for estimator in ("biased", "unbiased"):
        given_: dict[str, Any] = {"estimator": estimator, **FIXED}
        value = hsic(x, y, kernel_x=kernel, **given_)
        # Sums of n² terms of about the mean square of the kernels.
        atol = 64 * EPS * n * math.sqrt(hsic(x, x, kernel_x=kernel, kernel_y=kernel,
                                             estimator="biased", **FIXED) + 1)  # fmt: skip
        permuted = hsic(x[order], y[order], kernel_x=kernel, **given_)
        assert permuted == pytest.approx(value, rel=1e-10, abs=atol)
        turned = hsic(y, x, kernel_y=kernel, **given_)
        assert turned == pytest.approx(value, rel=1e-10, abs=atol)


@settings(max_examples=40, deadline=None)
@given(sample=samples, kernel=st.sampled_from(KERNELS))
def test_biased_estimate_is_not_negative_and_alignment_is_at_most_one(
    sample: tuple[int, int, int, int], kernel: str
) -> None:
    n, dx, dy, seed = sample
    x, y = draw(n, dx, dy, seed)
    assert hsic(x, y, kernel_x=kernel, estimator="biased", **FIXED) >= -64 * EPS
    value = centered_kernel_alignment(x, y, kernel_x=kernel, kernel_y=kernel, **FIXED)
    assert -1e-9 <= value <= 1 + 1e-9


def test_alignment_of_equal_geometry_is_one() -> None:
    x, y = draw(30, 4, 4)
    rotation, _ = np.linalg.qr(y[:4])
    for estimator in ("biased", "unbiased"):
        value = centered_kernel_alignment(x, 3 * x @ rotation + 1, estimator=estimator)
        assert value == pytest.approx(1.0, abs=1e-12)


def test_unbiased_alignment_of_unrelated_wide_representations_is_around_zero() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50, 20, 300))
    biased = centered_kernel_alignment(x, y)
    unbiased = centered_kernel_alignment(x, y, estimator="unbiased")
    assert biased.min() > 0.8
    assert abs(unbiased.mean()) <= 4 * unbiased.std() / math.sqrt(50)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_blocks_give_what_whole_matrices_give(kernel: str, estimator: str) -> None:
    x, y = draw(101, 9, 2)
    given_: dict[str, Any] = {"kernel_x": kernel, "estimator": estimator, **FIXED}
    whole = hsic(x, y, block_size=101, **given_)
    for block_size in (1, 7, 64, 100, 1000):
        assert hsic(x, y, block_size=block_size, **given_) == pytest.approx(whole, rel=1e-9)
    whole = centered_kernel_alignment(x, y, block_size=101, **given_)
    blocks = centered_kernel_alignment(x, y, block_size=13, **given_)
    assert blocks == pytest.approx(whole, rel=1e-9)


def test_float32_stays_close_to_float64() -> None:
    for dx in (1, 20):
        x, y = draw(400, dx, 2)
        exact = hsic(x, y)
        for convert in (np.asarray, torch.from_numpy):
            single = hsic(convert(x.astype(np.float32)), convert(y.astype(np.float32)))
            assert single.dtype in (np.float32, torch.float32)
            assert float(single) == pytest.approx(exact, abs=2e-8)


def test_results_have_the_dtype_of_floating_input() -> None:
    x, _ = draw(8, 2, 2)
    labels = np.arange(8) % 3
    assert hsic(labels, labels, kernel_x="delta", bandwidth_y=1.0).dtype == np.float64
    assert hsic(x.astype(np.float32), labels, kernel_y="delta").dtype == np.float32
    half = torch.from_numpy(x).half()
    value = hsic(half, torch.from_numpy(labels), kernel_y="delta")
    assert value.dtype == torch.float16
    # Data rounded to 11 bits, and the result once more.
    assert float(value) == pytest.approx(float(hsic(x, labels, kernel_y="delta")), rel=1e-2)
    assert kernel_matrix(np.arange(4)).dtype == np.float64


def test_batches_broadcast() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 4, 12, 3))
    together = hsic(x[:, None], y, **FIXED)
    assert together.shape == (4, 4)
    for i, j in itertools.product(range(4), range(4)):
        assert together[i, j] == pytest.approx(hsic(x[i], y[j], **FIXED), rel=1e-11)
    assert hsic(x, y[0], **FIXED) == pytest.approx(together[:, 0], rel=1e-11)


def test_median_of_a_batch_is_that_of_all_its_pairs() -> None:
    x = np.random.default_rng(0).standard_normal((3, 10, 2))
    distances = [np.linalg.norm(e[i] - e[j]) for e in x for i in range(10) for j in range(i)]
    assert median_bandwidth(x) == pytest.approx(np.median(distances), rel=4 * EPS)
    assert hsic(x, x) == pytest.approx(
        hsic(x, x, bandwidth_x=np.median(distances), bandwidth_y=np.median(distances)), rel=1e-12
    )


def test_median_of_absolute_differences_for_the_laplacian_kernel() -> None:
    x = np.array([[0.0, 0.0], [3.0, 4.0], [1.0, -1.0]])
    assert median_bandwidth(x) == 5.0
    assert median_bandwidth(x, kernel="laplacian") == 7.0


def test_median_of_a_draw_of_many_samples() -> None:
    x = np.random.default_rng(0).standard_normal(5000)
    drawn = median_bandwidth(x, random_state=0)
    chosen = np.random.default_rng(0).choice(5000, 1000, replace=False)
    assert drawn == median_bandwidth(x[chosen])
    assert drawn == median_bandwidth(torch.from_numpy(x), random_state=0)
    # The median distance of two standard normal numbers is sqrt 2 times their upper quartile.
    assert drawn == pytest.approx(math.sqrt(2) * 0.6744897501960817, rel=0.05)
    # Without a word about the source, the criterion always draws the same.
    assert hsic(x, x) == hsic(x, x, bandwidth_x=drawn, bandwidth_y=drawn)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("features", [2, 9])
def test_gradients_of_both_estimates_and_of_blocks(kernel: str, features: int) -> None:
    x, y = (torch.from_numpy(v).requires_grad_() for v in draw(6, features, 2))
    for estimator, block_size in itertools.product(("biased", "unbiased"), (None, 4)):
        assert torch.autograd.gradcheck(
            lambda x, y, e=estimator, b=block_size: hsic(
                x, y, kernel_x=kernel, kernel_y=kernel, estimator=e, block_size=b, **FIXED
            ),
            (x, y),
        )


def test_gradient_of_blocks_is_that_of_whole_matrices() -> None:
    x, y = (torch.from_numpy(v) for v in draw(70, 3, 2))
    gradients = []
    for block_size in (70, 16):
        leaf = x.clone().requires_grad_()
        value = centered_kernel_alignment(
            leaf, y, kernel_x="gaussian", estimator="unbiased", block_size=block_size
        )
        (gradient,) = torch.autograd.grad(value, leaf)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_training_keeps_no_kernel_matrix_for_the_backward_pass() -> None:
    n, block_size = 600, 50
    x, y = (torch.from_numpy(v).requires_grad_() for v in draw(n, 10, 2))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = hsic(x, y, block_size=block_size, **FIXED)
    assert sum(kept.values()) <= 8 * n * block_size
    value.backward()
    assert x.grad is not None


def test_memory_of_blocks_is_far_below_one_kernel_matrix() -> None:
    x, y = draw(3000, 2, 1)
    hsic(x[:100], y[:100])
    tracemalloc.start()
    hsic(x, y, block_size=200)
    _, with_blocks = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    hsic(x, y)
    _, by_default = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The median of a thousand samples holds half a million distances three times.
    assert with_blocks < 16 * 2**20
    assert by_default < 24 * 2**20 < 8 * 3000**2


def test_labels_have_no_gradient_and_hinder_none() -> None:
    x = torch.from_numpy(draw(12, 3, 1)[0]).requires_grad_()
    labels = torch.arange(12) % 3
    value = hsic(x, labels, kernel_y="delta", bandwidth_x=0.5, estimator="biased")
    value.backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert not hsic(labels, labels, kernel_x="delta", kernel_y="delta").requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("features", [1, 12])
def test_coincident_points_have_a_finite_gradient(kernel: str, features: int) -> None:
    x = torch.zeros(8, features, dtype=torch.float64)
    x[4:] = torch.from_numpy(draw(4, features, 1)[0])
    y = torch.arange(8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    hsic(leaf, y, kernel_x=kernel, **FIXED).backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    zeros = torch.zeros(8, features, dtype=torch.float64, requires_grad=True)
    hsic(zeros, y, kernel_x=kernel, **FIXED).backward()
    assert zeros.grad is not None
    if kernel != "linear":
        assert (zeros.grad == 0).all()


def test_median_bandwidth_is_a_constant_for_autograd() -> None:
    x, y = (torch.from_numpy(v) for v in draw(20, 2, 1))
    gradients = []
    for bandwidth in ("median", median_bandwidth(x)):
        leaf = x.clone().requires_grad_()
        hsic(leaf, y, bandwidth_x=bandwidth).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_parameters_of_a_callable_kernel_get_their_gradient() -> None:
    x, y = (torch.from_numpy(v) for v in draw(20, 2, 1))
    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)

    def deep(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ weight) @ (b @ weight).T

    for block_size in (None, 6):
        value = hsic(x, y, kernel_x=deep, kernel_y="linear", block_size=block_size)
        (gradient,) = torch.autograd.grad(value, weight)
        # Homogeneous of degree two in the weight.
        assert (gradient * weight).sum().item() == pytest.approx(2 * value.item(), rel=1e-10)


def test_constant_sample_has_no_dependence() -> None:
    y = draw(10, 1, 1)[1]
    assert hsic(np.full(10, 0.1), y, kernel_x="linear", estimator="biased") == pytest.approx(
        0.0, abs=EPS
    )
    ones = np.ones(10)
    assert hsic(ones, y, kernel_x="delta", estimator="biased") == pytest.approx(0.0, abs=8 * EPS)
    for method in ("permutation", "gamma"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert hsic_test(ones, y, kernel_x="delta", method=method).pvalue == 1.0
            assert hsic_test(0 * ones, y, kernel_x="linear", method=method).pvalue == 1.0


DEPENDENCE = {
    "smooth": (draw(80, 1, 2), {}),
    "categories": ((np.arange(80) % 4, np.arange(80) % 6), {"kernel": "delta"}),
    "linear": (draw(80, 5, 3), {"kernel": "linear"}),
}


@pytest.mark.parametrize("which", DEPENDENCE)
def test_factors_and_matrices_give_the_same_null_distribution(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), options = DEPENDENCE[which]
    kernels = {f"kernel_{side}": options.get("kernel", "gaussian") for side in "xy"}
    by_factors = hsic_test(x, y, random_state=1, **kernels)
    monkeypatch.setattr(independence_module, "_factors", lambda *given: None)
    by_matrices = hsic_test(x, y, random_state=1, **kernels)
    blocks = hsic_test(x, y, random_state=1, block_size=11, **kernels)
    # Factors miss 1e-13 of the traces, which are about n times the statistic.
    assert by_factors.statistic == pytest.approx(by_matrices.statistic, rel=1e-10)
    np.testing.assert_allclose(
        by_factors.null_distribution, by_matrices.null_distribution, rtol=1e-10
    )
    assert by_factors.pvalue == by_matrices.pvalue == blocks.pvalue


def test_smooth_kernels_are_factored_and_rough_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    for name in ("_statistics_of_factors", "_statistics_of_matrices"):
        original = getattr(independence_module, name)
        monkeypatch.setattr(
            independence_module,
            name,
            lambda *given, n=name, f=original: used.append(n) or f(*given),
        )
    x, y = draw(300, 40, 40)
    hsic_test(x[:, 0], y[:, 0], n_permutations=5)
    hsic_test(x, y, n_permutations=5)
    # One thin side is enough: 10 categories against a full rank of 300.
    hsic_test(x, np.arange(300) % 10, kernel_y="delta", n_permutations=5)
    assert used == [
        "_statistics_of_factors", "_statistics_of_matrices", "_statistics_of_factors"
    ]  # fmt: skip


def test_large_samples_look_up_no_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(150, 30, 30)
    whole = hsic_test(x, y, n_permutations=20, random_state=0)
    monkeypatch.setattr(independence_module, "_LOOKED_UP", 0)
    evaluated = hsic_test(x, y, n_permutations=20, random_state=0)
    np.testing.assert_allclose(evaluated.null_distribution, whole.null_distribution, rtol=1e-10)
    assert evaluated.pvalue == whole.pvalue


def test_indefinite_kernels_are_not_factored_by_their_diagonal() -> None:
    rng = np.random.default_rng(0)
    k = rng.standard_normal((30, 30))
    k = k + k.T
    np.fill_diagonal(k, 0.0)
    y = rng.standard_normal(30)
    h = centring(30)
    expected = np.trace(h @ k @ h @ kernel_matrix(y)) / 30
    given_matrix = hsic_test(k, y, kernel_x="precomputed", n_permutations=9, random_state=0)
    assert given_matrix.statistic == pytest.approx(expected, rel=1e-10)
    called = hsic_test(
        np.arange(30), y, n_permutations=9, random_state=0,
        kernel_x=lambda a, b: k[np.ix_(a[:, 0].astype(int), b[:, 0].astype(int))],
    )  # fmt: skip
    assert called.statistic == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(called.null_distribution, given_matrix.null_distribution)


def test_precomputed_and_callable_kernels_equal_the_built_in_one() -> None:
    x, y = draw(60, 2, 1)
    matrices = kernel_matrix(x), kernel_matrix(y)

    def gaussian(a: Any, b: Any) -> Any:
        xp = torch if isinstance(a, torch.Tensor) else np
        return xp.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 2)

    for estimator in ("biased", "unbiased"):
        given_matrices = hsic(
            *matrices, kernel_x="precomputed", kernel_y="precomputed", estimator=estimator
        )
        assert given_matrices == pytest.approx(hsic(x, y, estimator=estimator), rel=1e-11)
        for convert in (np.asarray, torch.from_numpy):
            called = hsic(convert(x), convert(y), kernel_x=gaussian, kernel_y=gaussian,
                          estimator=estimator, block_size=25)  # fmt: skip
            built_in = hsic(x, y, estimator=estimator, **FIXED)
            assert float(called) == pytest.approx(built_in, rel=1e-11)
    for method in ("permutation", "gamma"):
        exact = hsic_test(x, y, method=method, random_state=0, **FIXED)
        for convert in (np.asarray, torch.from_numpy):
            called = hsic_test(convert(x), convert(y), kernel_x=gaussian, kernel_y=gaussian,
                               method=method, random_state=0)  # fmt: skip
            assert called.statistic == pytest.approx(exact.statistic, rel=1e-10)
            assert called.pvalue == pytest.approx(exact.pvalue, rel=1e-8)
            assert called.bandwidth_x is None
    assert (kernel_matrix(matrices[0], kernel="precomputed") == matrices[0]).all()


def test_gamma_and_permutation_pvalues_agree_at_a_hundred_samples() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(100)
        y = rng.exponential(size=100) + 0.12 * seed * x
        gamma = hsic_test(x, y, method="gamma").pvalue
        permuted = hsic_test(x, y, n_permutations=4000, random_state=0).pvalue
        # Half a standard error of 4000 permutations is 0.008; the law itself is good to 0.02.
        assert gamma == pytest.approx(permuted, abs=0.03)


def test_permutation_test_holds_its_level_for_few_samples() -> None:
    trials, alpha = 400, 0.05
    rng = np.random.default_rng(0)
    pvalues = [
        hsic_test(*rng.standard_normal((2, 8)), n_permutations=39, random_state=rng).pvalue
        for _ in range(trials)
    ]
    rejected = np.mean(np.array(pvalues) <= alpha)
    # Exact: at most alpha. Four standard errors above, and below, where 39 makes it exactly alpha.
    assert abs(rejected - alpha) <= 4 * math.sqrt(alpha * (1 - alpha) / trials)


def test_a_parabola_is_found_where_correlation_sees_nothing() -> None:
    t = np.linspace(-1, 1, 101)
    for method in ("permutation", "gamma"):
        assert hsic_test(t, t**2, method=method, random_state=0).pvalue <= 0.001


def test_same_seed_same_pvalue_and_a_generator_moves_on() -> None:
    x, y = draw(30, 1, 1, seed=2)
    first, again = (hsic_test(x, y, random_state=5).null_distribution for _ in range(2))
    assert (first == again).all()
    generator = np.random.default_rng(5)
    assert (hsic_test(x, y, random_state=generator).null_distribution == first).all()
    assert (hsic_test(x, y, random_state=generator).null_distribution != first).any()


def test_test_of_tensors_is_the_test_of_their_numbers() -> None:
    x, y = draw(40, 3, 1)
    leaf = torch.from_numpy(x).requires_grad_()
    of_tensors = hsic_test(leaf, torch.from_numpy(y), random_state=0)
    of_numbers = hsic_test(x, y, random_state=0)
    assert of_tensors.pvalue == of_numbers.pvalue
    assert isinstance(of_tensors.statistic, float)
    assert isinstance(of_tensors.null_distribution, np.ndarray)


def test_digits_depend_on_their_labels_and_not_on_shuffled_ones() -> None:
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:300], labels[:300]
    shuffled = np.random.default_rng(0).permutation(labels)
    for method in ("permutation", "gamma"):
        given_: dict[str, Any] = {"kernel_y": "delta", "method": method, "random_state": 0}
        assert hsic_test(images, labels, **given_).pvalue <= 0.001
        assert hsic_test(images, shuffled, **given_).pvalue > 0.01


def test_large_real_images_depend_on_their_labels(real_data: Path) -> None:
    from kexue.lab.data import Data

    folder = real_data / "mnist"
    train = Data(folder, seed=0).images().train
    images, labels = train.images[:1000].flatten(1), train.labels[:1000]
    result = hsic_test(images, labels, kernel_y="delta", n_permutations=199, random_state=0)
    assert result.pvalue == 1 / 200
    aligned = centered_kernel_alignment(images, labels, kernel_y="delta")
    assert 0.05 < float(aligned) < 1


BAD_CALLS: dict[str, tuple[str, Any]] = {
    "different n": ("same number of samples, got 6 and 5", lambda: hsic(X, Y[:5])),
    "three samples": ("at least 4 samples, got 3", lambda: hsic(X[:3], Y[:3])),
    "one sample": (
        "at least 2 samples, got 1",
        lambda: hsic(X[:1], Y[:1], estimator="biased", **LINEAR),
    ),
    "five in a test": ("at least 6 samples, got 5", lambda: hsic_test(X[:5], Y[:5])),
    "bandwidth": ("bandwidth_y must be", lambda: hsic(X, Y, bandwidth_y=-1.0)),
    "nan bandwidth": ("bandwidth_x must be", lambda: hsic(X, Y, bandwidth_x=math.nan)),
    "kernel": ("kernel_x must be one of gaussian, laplacian", lambda: hsic(X, Y, kernel_x="rbf")),
    "estimator": (
        "one of unbiased, biased, got 'best'",
        lambda: centered_kernel_alignment(X, Y, estimator="best"),
    ),
    "method": ("one of permutation, gamma", lambda: hsic_test(X, Y, method="chi2")),
    "nan": ("x must be finite", lambda: hsic(X * math.nan, Y)),
    "not square": ("shape \\(n, n\\)", lambda: hsic(X[:, None], Y, kernel_x="precomputed")),
    "not symmetric": (
        "must be symmetric",
        lambda: hsic(np.triu(np.ones((6, 6))), Y, kernel_x="precomputed"),
    ),
    "coincident pairs": (
        "more than half of the pairs coincide; give a bandwidth",
        lambda: hsic(np.array([0.0, 0, 0, 0, 0, 1]), Y),
    ),
    "no permutation": ("n_permutations must be", lambda: hsic_test(X, Y, n_permutations=0)),
    "constant": (
        "y must not be constant",
        lambda: centered_kernel_alignment(X, np.full(6, 0.1)),
    ),
    "wrong kernel": (
        "a kernel must return an array",
        lambda: hsic(X, Y, kernel_x=lambda a, b: a @ b.T @ np.ones(b.shape)),
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("which", BAD_CALLS)
def test_bad_input_is_refused_with_its_reason(which: str) -> None:
    words, call = BAD_CALLS[which]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.bad_input
def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="numpy and torch"):
        hsic(X, torch.from_numpy(Y))
    with pytest.raises(TypeError, match="numpy and torch"):
        hsic_test(X, torch.from_numpy(Y))
    for bad in (X * 1j, X.astype(object)):
        with pytest.raises(TypeError, match="real numbers"):
            hsic(bad, Y)
        with pytest.raises(TypeError, match="real numbers"):
            median_bandwidth(bad)
    with pytest.raises(TypeError, match="real numbers"):
        hsic_test(torch.from_numpy(X * 1j), torch.from_numpy(Y))


@pytest.mark.gpu
def test_accelerator_gives_what_the_processor_gives() -> None:
    x, y = (torch.from_numpy(v) for v in draw(300, 10, 2))
    for block_size in (None, 64):
        leaf = x.cuda().requires_grad_()
        value = hsic(leaf, y.cuda(), block_size=block_size)
        value.backward()
        assert value.device.type == "cuda"
        assert value.item() == pytest.approx(hsic(x, y).item(), rel=1e-9)
    assert hsic_test(x.cuda(), y.cuda(), random_state=0).pvalue == hsic_test(
        x, y, random_state=0
    ).pvalue  # fmt: skip


@pytest.mark.parametrize("scale", [1e-200, 1e-150, 1e150, 1e200])
def test_the_median_bandwidth_follows_any_scale(scale: float) -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert median_bandwidth(x * scale) == pytest.approx(scale * median_bandwidth(x), rel=1e-12)


def test_kernels_of_two_precisions_are_of_the_wider() -> None:
    x, y = np.random.default_rng(0).random((3, 1)), np.random.default_rng(1).random((2, 1))
    for kernel in ("gaussian", "linear"):
        found = kernel_matrix(
            torch.from_numpy(x).float(), torch.from_numpy(y), kernel=kernel, bandwidth=1.0
        )
        expected = kernel_matrix(x.astype(np.float32), y, kernel=kernel, bandwidth=1.0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_precomputed_matrix_is_copied(kind: Any) -> None:
    given = kind(np.eye(3))
    kernel_matrix(given, kernel="precomputed")[0, 0] = 7
    assert given[0, 0] == 1
