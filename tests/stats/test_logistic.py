"""Closed-form logistic regression: oracles, identities, streaming, degenerate data, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss

from kexue.stats.logistic import (
    AnalyticLogisticRegression,
    ClassMoments,
    LinearSoftmax,
    closed_form_softmax,
)

EPS = np.finfo(np.float64).eps

TINY_X = np.array([[0, 0], [1, 0], [0, 1], [2, 2], [3, 2], [2, 4]], dtype=float)
TINY_Y = np.array([0, 0, 0, 1, 1, 1])


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    return getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)


def blobs(
    seed: int, n: int = 60, d: int = 4, classes: int = 3, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    mixing = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mixing + rng.normal(size=(classes, d))[y] + offset, y


def exact_moments(
    X: np.ndarray, y: np.ndarray, classes: int
) -> tuple[list[int], list[list[Fraction]], list[list[Fraction]]]:
    """Count, mean and scatter of the same floating-point numbers in rational arithmetic."""
    rows = [[Fraction(float(value)) for value in row] for row in X]
    d = X.shape[1]
    count = [int((y == k).sum()) for k in range(classes)]
    mean = [
        [sum((row[j] for row, c in zip(rows, y, strict=True) if c == k), Fraction()) / count[k]
         for j in range(d)]
        for k in range(classes)
    ]  # fmt: skip
    residual = [[row[j] - mean[c][j] for j in range(d)] for row, c in zip(rows, y, strict=True)]
    scatter = [[sum(r[i] * r[j] for r in residual) for j in range(d)] for i in range(d)]
    return count, mean, scatter


def assert_same_moments(one: ClassMoments, two: ClassMoments, *, ulps: float) -> None:
    np.testing.assert_allclose(one.count, two.count, rtol=ulps * EPS)
    scale = np.abs(two.mean).max()
    np.testing.assert_allclose(one.mean, two.mean, rtol=0, atol=ulps * EPS * scale)
    np.testing.assert_allclose(
        one.scatter, two.scatter, rtol=0, atol=ulps * EPS * np.abs(two.scatter).max()
    )


def test_tiny_set_has_the_rational_solution() -> None:
    model = AnalyticLogisticRegression().fit(TINY_X, TINY_Y)
    # Six small integers: a few roundings of numbers below 40, and a condition number of 4.
    np.testing.assert_allclose(model.covariance_ * 9, [[2, -1.5], [-1.5, 5]], rtol=20 * EPS)
    np.testing.assert_allclose(model.coef_, [[486 / 31, 276 / 31]], rtol=50 * EPS)
    np.testing.assert_allclose(model.intercept_, [-1062 / 31], rtol=50 * EPS)
    # The logit 486/31 + 276/31 - 1062/31 = -300/31 loses the digits of its largest term.
    np.testing.assert_allclose(
        model.predict_proba([[1, 1]])[0, 1], 1 / (1 + np.exp(300 / 31)), rtol=1e-13
    )
    np.testing.assert_allclose(model.predict_proba([[1, 1]])[0, 1], 6.26791290e-05, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "shrinkage", "accuracy", "loss"),
    [
        ("iris", None, 0.98, 0.0437170601),
        ("wine", None, 1.0, 0.0045626450),
        ("breast_cancer", None, 0.9648506151, 0.0912574362),
        ("digits", None, 0.9638286032, 0.1639928981),
        ("iris", "oas", 0.98, 0.0435755394),
        ("wine", "oas", 0.9943820225, 0.0094955125),
        ("breast_cancer", "oas", 0.9683655536, 0.0882224808),
        ("digits", "oas", 0.9654980523, 0.1614127049),
    ],
)
def test_raw_data_sets_give_the_known_accuracy_and_loss(
    name: str, shrinkage: str | None, accuracy: float, loss: float
) -> None:
    X, y = load(name)
    model = AnalyticLogisticRegression(shrinkage=shrinkage).fit(X, y)
    # The oracle has ten decimals.
    assert model.score(X, y) == pytest.approx(accuracy, abs=5e-11)
    assert log_loss(y, model.predict_proba(X)) == pytest.approx(loss, abs=1e-10)


def test_iris_coefficients_to_all_digits() -> None:
    model = AnalyticLogisticRegression().fit(*load("iris"))
    coef = model.coef_[1:] - model.coef_[0]
    intercept = model.intercept_[1:] - model.intercept_[0]
    # Condition number of the correlations below 100, coefficients of some tens: 1e-12 is ample
    # for a sum in another order, and no digit of another formula would survive it.
    np.testing.assert_allclose(
        coef,
        [
            [-8.006079231512615, -16.852408834994026, 22.083765262355126, 24.319020389766266],
            [-11.324814009330215, -20.308766207667805, 29.793044894365977, 39.26277938263557],
        ],
        rtol=1e-12,
    )
    np.testing.assert_allclose(intercept, [13.73047201329771, -18.428418380383583], rtol=1e-11)


def test_breast_cancer_intercept() -> None:
    model = AnalyticLogisticRegression().fit(*load("breast_cancer"))
    assert model.intercept_[0] == pytest.approx(47.7784097, abs=5e-8)


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
def test_decision_equals_linear_discriminant_analysis_lsqr(name: str) -> None:
    X, y = load(name)
    ours = AnalyticLogisticRegression().fit(X, y).predict_log_proba(X)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y).predict_log_proba(X)
    # They solve in raw units: wine's condition number of 1e7 costs them seven of sixteen digits.
    np.testing.assert_allclose(ours, theirs, atol=1e-7 * np.abs(theirs).max())


def test_oas_equals_scikit_learns_on_standardised_residuals() -> None:
    X, y = load("wine")
    residual = X - np.stack([X[y == k].mean(0) for k in range(3)])[y]
    deviation = residual.std(0)
    expected, _ = oas(residual / deviation, assume_centered=True)
    ours = ClassMoments.from_data(X, y, n_classes=3).covariance(shrinkage="oas")
    # Entries are O(1) on this scale, sums of 178 terms.
    np.testing.assert_allclose(ours / np.outer(deviation, deviation), expected, atol=200 * EPS)


def test_float_shrinkage_moves_raw_units_towards_the_mean_variance() -> None:
    X, y = blobs(0)
    moments = ClassMoments.from_data(X, y, n_classes=3)
    sigma = moments.covariance()
    expected = 0.7 * sigma + 0.3 * np.trace(sigma) / 4 * np.eye(4)
    np.testing.assert_allclose(moments.covariance(shrinkage=0.3), expected, rtol=4 * EPS)


def test_posterior_is_bayes_rule_with_gaussian_densities() -> None:
    X, y = blobs(1)
    model = AnalyticLogisticRegression(priors=[0.2, 0.5, 0.3]).fit(X, y)
    joint = np.stack(
        [
            p * multivariate_normal(mean, model.covariance_).pdf(X)
            for p, mean in zip([0.2, 0.5, 0.3], model.means_, strict=True)
        ],
        axis=1,
    )
    # Densities carry the rounding of their exponents, which are of order 100.
    np.testing.assert_allclose(
        model.predict_proba(X), joint / joint.sum(1, keepdims=True), rtol=1e-10, atol=1e-14
    )


def test_total_covariance_would_shrink_the_binary_direction_as_sherman_morrison_says() -> None:
    X, y = blobs(2, classes=2)
    model = AnalyticLogisticRegression().fit(X, y)
    delta = model.means_[1] - model.means_[0]
    p0, p1 = model.class_prior_
    total = np.linalg.solve(np.cov(X.T, bias=True), delta)
    factor = 1 + p0 * p1 * delta @ model.coef_[0]
    np.testing.assert_allclose(total * factor, model.coef_[0], rtol=1e-11)


def test_binary_direction_is_that_of_least_squares_on_labels() -> None:
    X, y = blobs(3, classes=2)
    design = np.column_stack([X, np.ones(len(X))])
    least_squares = np.linalg.lstsq(design, y.astype(float))[0][:-1]
    ours = AnalyticLogisticRegression().fit(X, y).coef_[0]
    cosine = ours @ least_squares / np.linalg.norm(ours) / np.linalg.norm(least_squares)
    assert cosine == pytest.approx(1, abs=1e-13)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_affine_maps_leave_probabilities_unchanged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, y = blobs(seed, n=80)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    A = rotation * 10.0 ** rng.uniform(-6, 6, size=4)
    before = AnalyticLogisticRegression().fit(X, y).predict_proba(X)
    mapped = X @ A + rng.normal(size=4) * np.linalg.norm(A, axis=0)
    after = AnalyticLogisticRegression().fit(mapped, y).predict_proba(mapped)
    # The map mixes features, so it costs the digits of the condition number of X, here < 1e5.
    np.testing.assert_allclose(after, before, atol=1e-8)


def test_units_from_1e_minus_150_to_1e150_change_nothing() -> None:
    X, y = blobs(4)
    scale = np.array([1e-150, 1e-8, 1.0, 1e150])
    before = AnalyticLogisticRegression().fit(X, y).predict_proba(X)
    for shrinkage, expected in ((None, before), ("oas", None)):
        model = AnalyticLogisticRegression(shrinkage=shrinkage)
        expected = model.fit(X, y).predict_proba(X) if expected is None else expected
        found = model.fit(X * scale, y).predict_proba(X * scale)
        np.testing.assert_allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e10])
def test_moments_keep_their_digits_under_an_offset(offset: float) -> None:
    X, y = blobs(5, n=200, offset=offset)
    count, mean, scatter = exact_moments(X, y, 3)
    ours = ClassMoments.from_data(X[:50], y[:50], n_classes=3)
    ours = ours.merge(ClassMoments.from_data(X[50:], y[50:], n_classes=3))
    np.testing.assert_array_equal(ours.count, count)
    np.testing.assert_allclose(ours.mean, np.array(mean, dtype=float), rtol=4 * EPS)
    expected = np.array(scatter, dtype=float)
    # Within a batch the rounding of the mean is corrected, and a few ulps are left. Between the two
    # batches the means differ by less than sigma, but are known to one ulp of the offset only.
    sigma = np.sqrt(np.diag(expected).min() / 200)
    slack = 50 * EPS + 2 * EPS * abs(offset) / sigma
    np.testing.assert_allclose(ours.scatter, expected, rtol=0, atol=slack * np.abs(expected).max())


def test_difference_of_raw_moments_would_have_no_digit_left() -> None:
    X, y = blobs(5, n=200, classes=1, offset=1e8)
    naive = X.T @ X - 200 * np.outer(X.mean(0), X.mean(0))
    ours = ClassMoments.from_data(X, y, n_classes=1).scatter
    assert np.abs(naive - ours).max() > 0.1 * np.abs(ours).max()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_any_partition_merged_in_any_order_gives_the_whole(seed: int, cuts: list[int]) -> None:
    X, y = blobs(seed)
    edges = [0, *sorted(cuts), 60]
    parts = [
        ClassMoments.from_data(X[a:b], y[a:b], n_classes=3) for a, b in itertools.pairwise(edges)
    ]
    np.random.default_rng(seed).shuffle(parts)
    together = parts[0]
    for part in parts[1:]:
        together = together.merge(part)
    # 60 rows, at most seven merges: a hundred roundings of the largest entry.
    assert_same_moments(together, ClassMoments.from_data(X, y, n_classes=3), ulps=100)


def test_blocks_inside_a_batch_equal_one_sum_over_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kexue.stats.logistic.moments._BLOCK_CPU", 1)
    monkeypatch.setattr("kexue.stats.logistic.moments._LEAST_ROWS", 100)
    X, y = blobs(6, n=3050, offset=100.0)
    ours = ClassMoments.from_data(X, y, n_classes=3)
    mean = np.stack([X[y == k].mean(0) for k in range(3)])
    residual = X - mean[y]
    expected = residual.T @ residual
    np.testing.assert_allclose(ours.mean, mean, rtol=100 * EPS)
    # The means of the 31 blocks are known to an ulp of the offset, 100 times that of a deviation,
    # and their squares add up to a few percent of the scatter; a sum of n terms adds its own
    # sqrt(n) roundings.
    np.testing.assert_allclose(
        ours.scatter, expected, atol=1000 * EPS * np.abs(expected).max(), rtol=0
    )


def test_partial_fit_and_merge_equal_one_fit() -> None:
    X, y = blobs(7, n=90)
    labels = np.array(["a", "b", "c"])[y]
    whole = AnalyticLogisticRegression(shrinkage="oas").fit(X, labels)
    one = AnalyticLogisticRegression(shrinkage="oas")
    one.partial_fit(X[:20], labels[:20], classes=["c", "a", "b"]).partial_fit(
        X[20:50], labels[20:50]
    )
    two = AnalyticLogisticRegression(shrinkage="oas").fit(X[50:], labels[50:])
    kept = copy.deepcopy(two.moments_)
    one.merge(two)
    np.testing.assert_allclose(one.coef_, whole.coef_, rtol=1e-11)
    np.testing.assert_allclose(one.intercept_, whole.intercept_, rtol=1e-11)
    np.testing.assert_array_equal(one.class_count_, whole.class_count_)
    assert_same_moments(two.moments_, kept, ulps=0)


def test_fit_starts_again() -> None:
    X, y = blobs(8)
    model = AnalyticLogisticRegression().fit(X + 5, y)
    model.fit(X[:, :2], y)
    np.testing.assert_array_equal(model.coef_, AnalyticLogisticRegression().fit(X[:, :2], y).coef_)


def test_fitted_attributes_exist_after_every_call() -> None:
    X, y = blobs(9, classes=2)
    model = AnalyticLogisticRegression().partial_fit(X, y, classes=[0, 1])
    for _ in range(2):
        assert model.coef_.shape == (1, 4)
        assert model.intercept_.shape == (1,)
        assert model.means_.shape == (2, 4)
        assert model.covariance_.shape == (4, 4)
        assert model.class_prior_.shape == model.class_count_.shape == (2,)
        before = model.coef_
        model.partial_fit(X[:10] + 1, y[:10])
        assert not np.array_equal(model.coef_, before)


def test_weights_of_three_classes_have_mean_zero_under_observed_frequencies() -> None:
    X, y = load("wine")
    model = AnalyticLogisticRegression(priors=[0.8, 0.1, 0.1]).fit(X, y)
    frequency = model.class_count_ / model.class_count_.sum()
    np.testing.assert_allclose(frequency @ model.coef_, 0, atol=1e-11 * np.abs(model.coef_).max())


def test_priors_move_intercepts_only() -> None:
    X, y = blobs(10)
    plain = AnalyticLogisticRegression().fit(X, y)
    other = AnalyticLogisticRegression(priors=[0.2, 0.2, 0.6]).fit(X, y)
    np.testing.assert_array_equal(other.coef_, plain.coef_)
    np.testing.assert_array_equal(other.covariance_, plain.covariance_)
    shift = np.log([0.2, 0.2, 0.6]) - np.log(plain.class_prior_)
    np.testing.assert_allclose(other.intercept_ - plain.intercept_, shift, rtol=1e-10)


def test_integer_weights_are_repetitions() -> None:
    X, y = blobs(11)
    weight = np.random.default_rng(0).integers(0, 4, size=60)
    weighted = AnalyticLogisticRegression(shrinkage="oas").fit(X, y, sample_weight=weight)
    repeated = AnalyticLogisticRegression(shrinkage="oas").fit(
        X.repeat(weight, 0), y.repeat(weight)
    )
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-11)
    np.testing.assert_allclose(weighted.intercept_, repeated.intercept_, rtol=1e-11)


def test_zero_weight_removes_the_row_even_a_whole_class() -> None:
    X, y = blobs(12)
    model = AnalyticLogisticRegression().fit(X, y, sample_weight=(y != 1).astype(float))
    np.testing.assert_array_equal(model.classes_, [0, 2])
    np.testing.assert_allclose(
        model.coef_, AnalyticLogisticRegression().fit(X[y != 1], y[y != 1]).coef_, rtol=1e-12
    )


def test_class_without_samples_has_probability_zero_until_its_first() -> None:
    X, y = blobs(13)
    seen = y != 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AnalyticLogisticRegression().partial_fit(X[seen], y[seen], classes=[0, 1, 2])
        probability = model.predict_proba(X)
        assert np.isneginf(model.intercept_[1])
        assert np.isneginf(model.predict_log_proba(X)[:, 1]).all()
    np.testing.assert_array_equal(probability[:, 1], 0)
    alone = AnalyticLogisticRegression().fit(X[seen], y[seen])
    np.testing.assert_allclose(probability[:, [0, 2]], alone.predict_proba(X), atol=1e-12)
    model.partial_fit(X[~seen], y[~seen])
    np.testing.assert_allclose(
        model.predict_proba(X), AnalyticLogisticRegression().fit(X, y).predict_proba(X), atol=1e-12
    )


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_class_of_two_is_impossible(missing: int) -> None:
    X, _ = blobs(14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AnalyticLogisticRegression().partial_fit(
            X, np.full(60, 1 - missing), classes=[0, 1]
        )
        probability = model.predict_proba(X)
        log_probability = model.predict_log_proba(X)
    np.testing.assert_array_equal(probability[:, missing], 0)
    np.testing.assert_array_equal(probability[:, 1 - missing], 1)
    assert np.isneginf(log_probability[:, missing]).all()
    assert (model.predict(X) == 1 - missing).all()


def test_feature_constant_within_classes_gets_no_weight() -> None:
    X, y = blobs(15, n=5000)
    # 0.1 and 0.3 are no binary fractions: sums of them round, and must not look like variance.
    X = np.column_stack([X, np.array([0.1, 0.3, 1e7 / 3])[y], np.full(5000, 0.1)])
    for shrinkage in (None, "oas"):
        model = AnalyticLogisticRegression(shrinkage=shrinkage).fit(X[:3000], y[:3000])
        model = model.partial_fit(X[3000:], y[3000:])
        np.testing.assert_array_equal(model.coef_[:, 4:], 0)
        without = AnalyticLogisticRegression(shrinkage=shrinkage).fit(X[:, :4], y)
        np.testing.assert_allclose(model.coef_[:, :4], without.coef_, rtol=1e-10, atol=1e-12)
    resurrected = AnalyticLogisticRegression(shrinkage=0.1).fit(X, y)
    assert (resurrected.coef_[:, 4] != 0).all()


def test_only_constant_features_leave_the_priors() -> None:
    y = np.array([0, 0, 1])
    for shrinkage in (None, "oas"):
        model = AnalyticLogisticRegression(shrinkage=shrinkage).fit(np.full((3, 2), 0.1), y)
        np.testing.assert_allclose(model.predict_proba(np.zeros((1, 2))), [[2 / 3, 1 / 3]])


@pytest.mark.parametrize("shrinkage", [None, "oas"])
def test_duplicated_feature_shares_the_weight(shrinkage: str | None) -> None:
    X, y = blobs(16)
    twice = np.column_stack([X, 1e5 * X[:, 0]])
    model = AnalyticLogisticRegression(shrinkage=shrinkage).fit(twice, y)
    assert np.isfinite(model.coef_).all()
    # On the correlation scale both copies are the same, so they get the same weight.
    np.testing.assert_allclose(model.coef_[:, 4] * 1e5, model.coef_[:, 0], rtol=1e-7, atol=1e-9)
    if shrinkage is None:
        np.testing.assert_allclose(
            model.predict_proba(twice),
            AnalyticLogisticRegression().fit(X, y).predict_proba(X),
            atol=1e-8,
        )


def test_fewer_samples_than_features_is_the_pseudo_inverse_of_the_correlations() -> None:
    X, y = blobs(17, n=12, d=30, classes=2)
    model = AnalyticLogisticRegression().fit(X, y)
    deviation = np.sqrt(np.diag(model.covariance_))
    inverse = np.linalg.pinv(
        model.covariance_ / np.outer(deviation, deviation), rcond=1e-12, hermitian=True
    )
    delta = (model.means_[1] - model.means_[0]) / deviation
    np.testing.assert_allclose(model.coef_[0], inverse @ delta / deviation, rtol=1e-9)


def test_rcond_discards_weak_directions() -> None:
    X, y = blobs(18, classes=2)
    X = np.column_stack([X, X[:, 0] + 1e-3 * np.random.default_rng(0).normal(size=60)])
    kept = AnalyticLogisticRegression().fit(X, y).coef_
    cut = AnalyticLogisticRegression(rcond=1e-3).fit(X, y).coef_
    assert np.abs(kept[0, [0, 4]]).max() > 10 * np.abs(cut[0, [0, 4]]).max()


def test_single_live_feature_is_not_shrunk_by_oas() -> None:
    X, y = blobs(19, d=1)
    moments = ClassMoments.from_data(X, y, n_classes=3)
    np.testing.assert_allclose(
        moments.covariance(shrinkage="oas"), moments.covariance(), rtol=4 * EPS
    )


def test_one_sample_a_class_works() -> None:
    model = AnalyticLogisticRegression(shrinkage="oas").fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    assert np.isfinite(model.predict_proba([[0.3, 0.4]])).all()


def test_float32_features_are_summed_in_float64() -> None:
    X, y = blobs(20, n=3000, offset=1e3)
    single = X.astype(np.float32)
    ours = ClassMoments.from_data(single, y, n_classes=3)
    exact = ClassMoments.from_data(single.astype(np.float64), y, n_classes=3)
    assert ours.scatter.dtype == np.float64
    assert_same_moments(ours, exact, ulps=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int16])
def test_torch_moments_are_those_of_numpy(dtype: torch.dtype) -> None:
    X, y = blobs(21)
    X = torch.from_numpy(X).to(dtype)
    weight = torch.linspace(0, 2, 60)
    ours = ClassMoments.from_data(
        X, torch.from_numpy(y).to(torch.uint8), n_classes=3, sample_weight=weight
    )
    plain = ClassMoments.from_data(X.double().numpy(), y, n_classes=3, sample_weight=weight.numpy())
    assert isinstance(ours.scatter, torch.Tensor)
    assert ours.scatter.dtype == torch.float64
    assert_same_moments(
        ClassMoments(ours.count.numpy(), ours.mean.numpy(), ours.scatter.numpy()), plain, ulps=60
    )


@pytest.mark.gpu
def test_moments_on_a_gpu_are_those_of_the_cpu() -> None:
    X, y = blobs(22, n=70_000, d=16, offset=1e3)
    here = ClassMoments.from_data(X, y, n_classes=3)
    there = ClassMoments.from_data(
        torch.from_numpy(X).cuda(), torch.from_numpy(y).cuda(), n_classes=3
    )
    assert there.mean.device.type == "cuda"
    moved = ClassMoments(*(v.cpu().numpy() for v in (there.count, there.mean, there.scatter)))
    # 70 000 terms in another order.
    assert_same_moments(moved, here, ulps=300)


def test_torch_layer_trains_features_through_the_closed_form() -> None:
    X, y = blobs(23)
    target = torch.from_numpy(y)
    features = torch.from_numpy(X).requires_grad_()
    moments = ClassMoments.from_data(features, target, n_classes=3)
    layer = closed_form_softmax(
        moments.mean, moments.covariance(shrinkage=0.1), moments.count / moments.count.sum()
    )
    logits = features @ layer.weight.T + layer.bias
    loss = torch.nn.functional.cross_entropy(logits, target)
    loss.backward()
    assert features.grad is not None
    step = 1e-6 * features.grad
    again = ClassMoments.from_data(features.detach() - step, target, n_classes=3)
    layer = closed_form_softmax(
        again.mean, again.covariance(shrinkage=0.1), again.count / again.count.sum()
    )
    moved = torch.nn.functional.cross_entropy(
        (features.detach() - step) @ layer.weight.T + layer.bias, target
    )
    # First order of a step down the gradient; the second order is 1e-6 of it.
    assert float(loss.detach() - moved) == pytest.approx(
        1e-6 * float(features.grad.square().sum()), rel=1e-3
    )


def test_gradcheck_in_means_and_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    root = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    covariance = (root @ root.mT / 9).requires_grad_()
    priors = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.4, 0.6]], dtype=torch.float64)

    def function(means: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer = closed_form_softmax(means, covariance, priors)
        return layer.weight, layer.bias[priors > 0]

    assert torch.autograd.gradcheck(function, (means, covariance))


def test_formula_and_classifier_agree_up_to_the_gauge() -> None:
    X, y = load("iris")
    model = AnalyticLogisticRegression().fit(X, y)
    layer = closed_form_softmax(model.means_, model.covariance_, model.class_prior_)
    for ours, gauge in ((model.coef_, layer.weight), (model.intercept_, layer.bias)):
        np.testing.assert_allclose(ours - ours[0], gauge - gauge[0], rtol=1e-10, atol=1e-11)


def test_zero_prior_gives_minus_infinity_without_a_warning_or_nan_gradient() -> None:
    priors = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    layer = closed_form_softmax(
        torch.ones(2, 1, dtype=torch.float64), torch.eye(1, dtype=torch.float64), priors
    )
    layer.bias[1].backward()
    assert torch.isneginf(layer.bias[0])
    assert priors.grad is not None
    assert torch.isfinite(priors.grad).all()


def test_softmax_keeps_float32() -> None:
    layer = closed_form_softmax(
        np.ones((2, 3), np.float32), np.eye(3, dtype=np.float32), np.full(2, 0.5, np.float32)
    )
    assert isinstance(layer, LinearSoftmax)
    assert layer.weight.dtype == layer.bias.dtype == np.float32


def test_feature_names_are_kept_and_checked() -> None:
    import pandas as pd

    X, y = blobs(24)
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = AnalyticLogisticRegression().fit(frame, y)
    np.testing.assert_array_equal(model.feature_names_in_, list("abcd"))
    other = AnalyticLogisticRegression().fit(frame.rename(columns={"a": "z"}), y)
    with pytest.raises(ValueError, match="same features"):
        model.merge(other)


def test_pickled_classifier_goes_on_streaming() -> None:
    X, y = blobs(25)
    model = AnalyticLogisticRegression().partial_fit(X[:30], y[:30], classes=[0, 1, 2])
    again = pickle.loads(pickle.dumps(model)).partial_fit(X[30:], y[30:])
    np.testing.assert_array_equal(again.coef_, model.partial_fit(X[30:], y[30:]).coef_)


@pytest.mark.bad_input
@pytest.mark.parametrize("shrinkage", [True, -0.1, 1.1, "OAS", np.nan, [0.5]])
def test_shrinkage_is_refused_in_the_specified_words(shrinkage: object) -> None:
    expected = r"shrinkage must be None, 'oas' or a float in \[0, 1\], got "
    with pytest.raises(ValueError, match=expected):
        AnalyticLogisticRegression(shrinkage=shrinkage).fit(TINY_X, TINY_Y)
    with pytest.raises(ValueError, match=expected):
        ClassMoments.from_data(TINY_X, TINY_Y, n_classes=2).covariance(shrinkage=shrinkage)


@pytest.mark.bad_input
def test_fitting_refuses_what_it_cannot_use() -> None:
    model = AnalyticLogisticRegression()
    with pytest.raises(ValueError, match="class"):
        model.fit(TINY_X, np.zeros(6))
    with pytest.raises(ValueError, match="class"):
        model.partial_fit(TINY_X, np.zeros(6), classes=[0])
    with pytest.raises(ValueError, match="first call"):
        model.partial_fit(TINY_X, TINY_Y)
    with pytest.raises(ValueError, match=r"among the classes .* got \[1\]"):
        model.partial_fit(TINY_X, TINY_Y, classes=[0, 2])
    with pytest.raises(ValueError, match="non-negative"):
        model.fit(TINY_X, TINY_Y, sample_weight=[1, 1, 1, 1, 1, -1])
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.where(TINY_X == 4, np.nan, TINY_X), TINY_Y)
    for priors in ([0.5, 0.2, 0.3], [1.5, -0.5], [0.5, 0.6], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="priors must be 2"):
            AnalyticLogisticRegression(priors=priors).fit(TINY_X, TINY_Y)
    with pytest.raises(NotFittedError):
        model.predict(TINY_X)
    assert not hasattr(model, "coef_")


@pytest.mark.bad_input
def test_later_batches_must_fit_the_first() -> None:
    model = AnalyticLogisticRegression().fit(TINY_X, TINY_Y)
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        model.partial_fit(TINY_X, TINY_Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="among the classes"):
        model.partial_fit(TINY_X, TINY_Y + 1)
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(TINY_X[:, :1], TINY_Y)
    with pytest.raises(ValueError, match="same classes"):
        model.merge(AnalyticLogisticRegression().fit(TINY_X, TINY_Y + 1))
    with pytest.raises(ValueError, match="same"):
        model.merge(AnalyticLogisticRegression().fit(TINY_X[:, :1], TINY_Y))
    with pytest.raises(NotFittedError):
        model.merge(AnalyticLogisticRegression())
    with pytest.raises(TypeError, match="AnalyticLogisticRegression"):
        model.merge("model")


@pytest.mark.bad_input
def test_moments_refuse_what_does_not_belong_together() -> None:
    moments = ClassMoments.from_data(TINY_X, TINY_Y, n_classes=2)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 2\)"):
        moments.merge(ClassMoments.from_data(TINY_X, TINY_Y, n_classes=3))
    with pytest.raises(ValueError, match=r"\(2,\), \(2, 2\) and \(3, 3\)"):
        ClassMoments(moments.count, moments.mean, np.eye(3))
    with pytest.raises(ValueError, match="positive weight"):
        ClassMoments.from_data(TINY_X[:0], TINY_Y[:0], n_classes=2).covariance()
    with pytest.raises(TypeError, match="list"):
        ClassMoments.from_data(TINY_X.tolist(), TINY_Y, n_classes=2)
    with pytest.raises(TypeError, match="float64"):
        ClassMoments.from_data(TINY_X, TINY_Y.astype(float), n_classes=2)


@pytest.mark.bad_input
def test_softmax_names_the_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(4, 4\) and \(2,\)"):
        closed_form_softmax(np.ones((2, 3)), np.eye(4), np.full(2, 0.5))
    with pytest.raises(ValueError, match="priors must be non-negative"):
        closed_form_softmax(np.ones((2, 3)), np.eye(3), np.array([1.5, -0.5]))
    for kind in (np.asarray, torch.from_numpy):
        with pytest.raises(ValueError, match="positive definite"):
            closed_form_softmax(kind(np.ones((2, 3))), kind(np.ones((3, 3))), kind(np.ones(2) / 2))


def test_each_matrix_of_a_batch_is_symmetric_by_its_own_size() -> None:
    means, priors = np.stack([np.eye(2)] * 2), np.ones((2, 2)) / 2
    covariance = np.stack([1e6 * np.eye(2), [[1, 0.9], [0, 1]]])
    with pytest.raises(ValueError, match="symmetric"):
        closed_form_softmax(means, covariance, priors)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_half_precision_is_refused_by_name(kind) -> None:
    half = kind(np.eye(2, dtype=np.float16))
    with pytest.raises(TypeError, match="float32 or float64"):
        closed_form_softmax(half, half, half[0])


def test_priors_on_classes_without_samples_alone_are_refused() -> None:
    X = np.random.default_rng(0).normal(size=(3, 2))
    model = AnalyticLogisticRegression(priors=[0.0, 1.0])
    with pytest.raises(ValueError, match="priors must give some probability"):
        model.partial_fit(X, [0, 0, 0], classes=[0, 1]).predict_proba(X)
