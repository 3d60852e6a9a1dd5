"""Adversarial validation against closed forms, brute force and scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    RepeatedStratifiedKFold,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from kexue.stats.validation import (
    AdversarialShuffleSplit,
    DriftReport,
    TrainTestDiscriminator,
    drift_report,
    importance_weighted_cross_val_score,
)

EPS = np.finfo(float).eps
ROWS = 20_000

# Closed forms and quadrature for p = N(0, 1), q = N(shift, 1):
# shift, AUC, n_eff/n, E_p[D], E_p[min(w, 10)], w-mean clipped at 10.
GAUSSIAN = [
    (0.5, 0.6381631951, 0.7788007831, 0.4705270122, 0.9999993660, 0.4999969929),
    (1.0, 0.7602499389, 0.3678794412, 0.3979728672, 0.9896207206, 0.9743867322),
    (2.0, 0.9213503965, 0.0183156389, 0.2247997546, 0.7173931067, 1.5615637241),
]


class ExactDiscriminator(ClassifierMixin, BaseEstimator):
    """Knows p = N(0, 1) and q = N(shift, 1); its log-odds are off by a factor and an offset."""

    def __init__(self, shift: float = 1.0, factor: float = 1.0, offset: float = 0.0) -> None:
        self.shift = shift
        self.factor = factor
        self.offset = offset

    def fit(self, X: np.ndarray, y: np.ndarray) -> ExactDiscriminator:
        self.classes_ = np.array([0, 1])
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        log_ratio = self.shift * X[:, 0] - self.shift**2 / 2
        odds = np.exp(self.factor * log_ratio + self.offset)
        return np.column_stack([1 / (1 + odds), odds / (1 + odds)])


class FirstColumn(ClassifierMixin, BaseEstimator):
    """Takes the first column for the probability of a test row; may list its classes backwards."""

    def __init__(self, backwards: bool = False) -> None:
        self.backwards = backwards

    def fit(self, X: np.ndarray, y: np.ndarray) -> FirstColumn:
        self.classes_ = np.array([1, 0] if self.backwards else [0, 1])
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        both = np.column_stack([1 - X[:, 0], X[:, 0]])
        return both[:, ::-1] if self.backwards else both


class Memory(ClassifierMixin, BaseEstimator):
    """Certain of every row it has seen, and of no other."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Memory:
        self.classes_ = np.unique(y)
        self.seen_ = dict(zip(X[:, 0], y, strict=True))
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        test = np.array([self.seen_.get(x, 0.5) for x in X[:, 0]])
        return np.column_stack([1 - test, test])


def gaussian_grid(shift: float, n: int = ROWS) -> np.ndarray:
    """Quantiles: a mean over them is an integral by the midpoint rule."""
    return (shift + norm.ppf((np.arange(n) + 0.5) / n))[:, None]


def gaussian_sample(shift: float, n: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (n, 1)), rng.normal(shift, 1, (n, 1))


def exact(shift: float, **parameters: Any) -> TrainTestDiscriminator:
    parameters = {"calibrate": False, "random_state": 0, **parameters}
    found = TrainTestDiscriminator(ExactDiscriminator(shift), **parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found.fit(gaussian_grid(0.0), gaussian_grid(shift))


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values[:, 0], weights=weights))


# The midpoint rule on n quantiles: what is bounded by 10 and lives within |x| < z_n, where one of
# n rows lies beyond, is off by no more than a few times 10 |z_n| / n.
BOUNDED = 2 * 10 * norm.isf(1 / ROWS) / ROWS


@pytest.mark.parametrize("row", GAUSSIAN)
def test_auc_of_the_optimal_discriminator_is_phi_of_shift_over_root_two(row: Any) -> None:
    shift, auc = row[:2]
    assert auc == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=1e-9)
    # The variance of an AUC is at most A (1 - A) over the smaller number of rows.
    assert exact(shift).auc_ == pytest.approx(auc, abs=5 * math.sqrt(auc * (1 - auc) / ROWS))


@pytest.mark.parametrize("row", GAUSSIAN[:2])
def test_effective_sample_size_of_the_gaussian_shift(row: Any) -> None:
    shift, _, fraction = row[:3]
    # The part of E_p[w²] beyond the last quantile is a gaussian tail at a mean of 2 shift.
    lost = norm.sf(norm.isf(1 / ROWS) - 2 * shift)
    found = exact(shift, clip=None).effective_sample_size_ / ROWS
    assert found == pytest.approx(fraction, rel=2 * lost)


@pytest.mark.parametrize("row", GAUSSIAN)
def test_mean_score_of_training_rows(row: Any) -> None:
    assert exact(row[0]).train_scores_.mean() == pytest.approx(row[3], abs=BOUNDED)


@pytest.mark.parametrize("row", GAUSSIAN)
def test_scores_of_test_rows_mirror_those_of_training_rows(row: Any) -> None:
    found = exact(row[0])
    assert found.test_scores_.mean() == pytest.approx(1 - row[3], abs=BOUNDED)


@pytest.mark.parametrize("row", GAUSSIAN)
def test_mean_of_the_clipped_density_ratio(row: Any) -> None:
    ratio = exact(row[0], clip=10.0).density_ratio(gaussian_grid(0.0))
    assert ratio.mean() == pytest.approx(row[4], abs=BOUNDED)
    assert ratio.max() <= 10 * (1 + 4 * EPS)


@pytest.mark.parametrize("row", GAUSSIAN)
def test_weighted_mean_with_clipped_weights(row: Any) -> None:
    found = mean(gaussian_grid(0.0), exact(row[0], clip=10.0).weights_)
    assert found == pytest.approx(row[5], abs=4 * BOUNDED)


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_weighted_mean_is_the_mean_of_the_test_rows(shift: float) -> None:
    # What q has beyond the last quantile z of p: ∫ x q = shift Q(z - shift) + φ(z - shift).
    z = norm.isf(1 / ROWS) - shift
    lost = shift * norm.sf(z) + norm.pdf(z)
    found = mean(gaussian_grid(0.0), exact(shift, clip=None).weights_)
    assert found == pytest.approx(shift, abs=2 * lost)


@pytest.mark.parametrize("row", GAUSSIAN)
def test_the_score_itself_leads_half_way_only(row: Any) -> None:
    shift = row[0]
    found = mean(gaussian_grid(0.0), exact(shift).train_scores_)
    # Numerator and denominator are bounded by |z_n| and 1; the denominator is E_p[D].
    assert found == pytest.approx(shift / 2, abs=BOUNDED / row[3])


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_default_discriminator_finds_the_gaussian_weights(shift: float) -> None:
    train, test = gaussian_sample(shift)
    found = TrainTestDiscriminator(clip=None, random_state=0).fit(train, test)
    # E_p[w² (x - shift)²] = e^{shift²} (1 + shift²); an error of the log-odds' slope moves the mean
    # by itself, and its variance is that of a logistic regression: 1 / Σ D (1 - D) (x - mean)².
    rows = np.concatenate([train, test])[:, 0]
    density = 1 / (1 + np.exp(-shift * rows + shift**2 / 2))
    information = density * (1 - density) * (rows - shift / 2) ** 2
    variance = math.exp(shift**2) * (1 + shift**2) / ROWS + 1 / information.sum()
    assert mean(train, found.weights_) == pytest.approx(shift, abs=5 * math.sqrt(variance))
    assert mean(train, found.train_scores_) == pytest.approx(shift / 2, abs=0.03)
    auc = norm.cdf(shift / math.sqrt(2))
    assert found.auc_ == pytest.approx(auc, abs=5 * math.sqrt(auc * (1 - auc) / ROWS))


def test_calibrated_slope_is_one_for_exact_odds() -> None:
    found = exact(1.0, calibrate=True)
    # The quantile grids have the moments of the laws, so that no sampling error is left.
    assert found.calibration_ == pytest.approx((1.0, 0.0), abs=0.01)


@pytest.mark.parametrize("factor", [0.05, 0.5, 4.0])
def test_calibration_takes_back_factor_and_offset(factor: float) -> None:
    train, test = gaussian_sample(1.0, 2000)
    plain, bent = (
        TrainTestDiscriminator(estimator, random_state=0).fit(train, test)
        for estimator in (ExactDiscriminator(1.0), ExactDiscriminator(1.0, factor, 0.7))
    )
    # The minimum is found to a gradient of 1e-9 and its curvature is about 0.1.
    np.testing.assert_allclose(bent.weights_, plain.weights_, rtol=1e-6)
    alpha, beta = bent.calibration_
    assert alpha * factor == pytest.approx(plain.calibration_[0], rel=1e-6)
    assert beta == pytest.approx(plain.calibration_[1] - 0.7 * alpha, abs=1e-6)


def test_calibration_is_a_logistic_regression_with_equal_domains() -> None:
    train = gaussian_grid(0.0, 300)
    test = np.concatenate([gaussian_grid(0.8, 700), gaussian_grid(3.0, 100)])
    found = TrainTestDiscriminator(ExactDiscriminator(1.0), balance="none").fit(train, test)
    rows, domain = np.concatenate([train, test]), np.repeat([0, 1], [300, 800])
    reference = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000).fit(
        rows - 0.5, domain, sample_weight=np.where(domain == 1, 1 / 800, 1 / 300)
    )
    # Both minimise a loss with curvature of about 0.1 to gradients below 1e-7.
    assert found.calibration_[0] == pytest.approx(reference.coef_[0, 0], abs=1e-4)
    assert found.calibration_[1] == pytest.approx(reference.intercept_[0], abs=1e-4)


def test_a_discriminator_that_points_backwards_gives_equal_weights() -> None:
    train, test = gaussian_sample(1.0, 500)
    found = TrainTestDiscriminator(ExactDiscriminator(-1.0)).fit(train, test)
    assert found.calibration_ == (0.0, 0.0)
    assert (found.weights_ == 1).all()
    assert (found.train_scores_ == 0.5).all()
    assert found.effective_sample_size_ == 500


def test_a_category_of_half_the_training_and_nine_tenths_of_the_test_rows() -> None:
    train = np.repeat(["x", "y"], 1000)[:, None].astype(object)
    test = np.repeat(["x", "y"], [1800, 200])[:, None].astype(object)
    estimator = make_pipeline(OneHotEncoder(), LogisticRegression(C=1e6))
    found = TrainTestDiscriminator(estimator, random_state=0, clip=None).fit(train, test)
    x, y = found.density_ratio(np.array([["x"], ["y"]], dtype=object))
    # Stratified folds keep the counts of the domains, not of the categories: the folds' log-odds
    # ratios scatter like those of samples, with a variance of Σ 1/count.
    assert math.log(x / y) == pytest.approx(math.log(9), abs=5 * math.sqrt(1 / 200 + 3 / 1000))
    assert x == pytest.approx(1.8, rel=0.02)
    assert found.weights_[0] / found.weights_[-1] == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("balance", ["prior", "oversample"])
@pytest.mark.parametrize("sizes", [(3000, 500), (500, 3000), (700, 1000)])
def test_unequal_numbers_of_rows_do_not_change_the_ratio(
    balance: str, sizes: tuple[int, int]
) -> None:
    train, test = gaussian_grid(0.0, sizes[0]), gaussian_grid(1.0, sizes[1])
    found = TrainTestDiscriminator(
        LogisticRegression(C=1e6), balance=balance, calibrate=False, random_state=0
    ).fit(train, test)
    # At the middle both densities agree. The intercept's standard error is at most that of a mean
    # of the smaller set over D (1 - D) >= 0.2.
    assert math.log(found.density_ratio(np.array([[0.5]]))[0]) == pytest.approx(
        0.0, abs=5 / math.sqrt(0.2 * min(sizes))
    )
    assert abs(math.log(sizes[1] / sizes[0])) > 0.3


def test_balance_none_leaves_the_odds_as_they_are() -> None:
    train, test = gaussian_grid(0.0, 4000), gaussian_grid(1.0, 400)
    balanced = LogisticRegression(C=1e6, class_weight="balanced")
    for estimator, expected in ((balanced, 0.0), (LogisticRegression(C=1e6), math.log(0.1))):
        found = TrainTestDiscriminator(
            estimator, balance="none", calibrate=False, random_state=0
        ).fit(train, test)
        log_ratio = math.log(found.density_ratio(np.array([[0.5]]))[0])
        assert log_ratio == pytest.approx(expected, abs=5 / math.sqrt(0.2 * 400))


def test_oversampling_shows_as_many_rows_of_both_sets() -> None:
    class Counting(FirstColumn):
        def fit(self, X: np.ndarray, y: np.ndarray) -> FirstColumn:
            self.seen_ = Counter(y.tolist())
            self.rows_ = Counter(X[y == 1, 0].tolist())
            return super().fit(X, y)

    rng = np.random.default_rng(0)
    found = TrainTestDiscriminator(Counting(), balance="oversample", cv=2).fit(
        rng.uniform(size=(70, 1)), rng.uniform(size=(20, 1))
    )
    for model in found.estimators_:
        assert model.seen_ == {0: 35, 1: 35}
        assert set(model.rows_.values()) == {3, 4}


def test_the_column_of_the_test_class_is_found_by_its_name() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.beta(2, 3, (200, 1)), rng.beta(3, 2, (200, 1))
    one, two = (
        TrainTestDiscriminator(FirstColumn(backwards), random_state=0).fit(train, test)
        for backwards in (False, True)
    )
    np.testing.assert_array_equal(one.weights_, two.weights_)
    assert one.auc_ > 0.5


def test_no_row_is_scored_by_a_model_that_saw_it() -> None:
    rows = np.arange(300.0)[:, None]
    found = TrainTestDiscriminator(Memory(), calibrate=False).fit(rows[:100], rows[100:])
    assert found.auc_ == 0.5
    assert (found.weights_ == 1).all()


def test_scores_are_those_of_the_folds_models() -> None:
    train, test = gaussian_sample(1.0, 200)
    found = TrainTestDiscriminator(
        LogisticRegression(), calibrate=False, random_state=3, clip=None
    ).fit(train, test)
    rows, domain = np.concatenate([train, test]), np.repeat([0, 1], 200)
    scores = np.empty(400)
    folds = StratifiedKFold(5, shuffle=True, random_state=3).split(rows, domain)
    for k, (fitted, held_out) in enumerate(folds):
        model = LogisticRegression().fit(rows[fitted], domain[fitted])
        scores[held_out] = model.predict_proba(rows[held_out])[:, 1]
        assert found.fold_auc_[k] == pytest.approx(
            roc_auc_score(domain[held_out], scores[held_out]), abs=8 * EPS
        )
    np.testing.assert_allclose(found.train_scores_, scores[:200], rtol=64 * EPS)
    np.testing.assert_allclose(found.test_scores_, scores[200:], rtol=64 * EPS)
    ratio = scores[:200] / (1 - scores[:200])
    np.testing.assert_allclose(found.weights_, ratio / ratio.mean(), rtol=256 * EPS)


def test_a_splitter_that_repeats_averages_the_log_odds() -> None:
    train, test = gaussian_sample(1.0, 100)
    splitter = RepeatedStratifiedKFold(n_splits=4, n_repeats=3, random_state=0)
    found = TrainTestDiscriminator(
        LogisticRegression(), cv=splitter, calibrate=False, clip=None
    ).fit(train, test)
    rows, domain = np.concatenate([train, test]), np.repeat([0, 1], 100)
    log_odds = np.zeros(200)
    for fitted, held_out in splitter.split(rows, domain):
        model = LogisticRegression().fit(rows[fitted], domain[fitted])
        log_odds[held_out] += model.decision_function(rows[held_out]) / 3
    assert len(found.fold_auc_) == 12
    np.testing.assert_allclose(
        np.log(found.weights_[0] / found.weights_), log_odds[0] - log_odds[:100], atol=1e-12
    )


def test_density_ratio_is_the_geometric_mean_over_the_folds() -> None:
    train, test = gaussian_sample(1.0, 300)
    found = TrainTestDiscriminator(LogisticRegression(), clip=None).fit(train, test)
    new = np.linspace(-2, 3, 7)[:, None]
    alpha, beta = found.calibration_
    ratios = [np.exp(alpha * model.decision_function(new) + beta) for model in found.estimators_]
    ratio = found.density_ratio(new)
    np.testing.assert_allclose(ratio, np.prod(ratios, axis=0) ** (1 / 5), rtol=1e-12)
    np.testing.assert_allclose(
        found.predict_proba(new), np.stack([1 / (1 + ratio), ratio / (1 + ratio)], 1), rtol=1e-12
    )


def test_the_ratio_is_clipped_before_it_is_divided_by_its_mean() -> None:
    # Odds of 1, 3 and 1e6, a third of the rows each.
    odds = np.tile([1.0, 3.0, 1e6], 40)
    rows = (odds / (1 + odds))[:, None]
    found = TrainTestDiscriminator(FirstColumn(), calibrate=False, clip=10.0).fit(
        rows, np.full((120, 1), 0.5)
    )
    np.testing.assert_allclose(found.weights_[:3], np.array([1, 3, 10]) / (14 / 3), rtol=1e-9)
    assert found.weights_.mean() == pytest.approx(1, rel=8 * EPS)


@pytest.mark.parametrize("shift", [0.0, 40.0])
@pytest.mark.parametrize(
    "estimator",
    [KNeighborsClassifier(1), DecisionTreeClassifier(random_state=0), GaussianNB()],
    ids=["1-NN", "tree", "naive Bayes"],
)
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.filterwarnings("ignore:train and test are almost separable")
def test_certain_classifiers_give_finite_weights(
    estimator: Any, shift: float, calibrate: bool
) -> None:
    train, test = gaussian_sample(shift, 100)
    found = TrainTestDiscriminator(estimator, calibrate=calibrate, clip=None).fit(train, test)
    for numbers in (found.weights_, found.density_ratio(test), found.train_scores_):
        assert np.isfinite(numbers).all()
    assert found.weights_.mean() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(found.predict_proba(test).sum(axis=1), 1, rtol=4 * EPS)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    clip=st.none() | st.floats(0.01, 100),
    calibrate=st.booleans(),
    balance=st.sampled_from(["prior", "oversample", "none"]),
)
@pytest.mark.filterwarnings("ignore:train and test are almost separable")
def test_weights_are_finite_whatever_the_classifier_says(
    scores: list[float], clip: float | None, calibrate: bool, balance: Any
) -> None:
    rows = np.array(scores)[:, None]
    found = TrainTestDiscriminator(
        FirstColumn(), cv=2, clip=clip, calibrate=calibrate, balance=balance, random_state=0
    ).fit(rows[:5], rows[5:])
    assert np.isfinite(found.weights_).all()
    assert (found.weights_ >= 0).all()
    assert found.weights_.mean() == pytest.approx(1, rel=1e-12)
    assert 1 - 1e-12 <= found.effective_sample_size_ <= 5 + 1e-12
    assert np.isfinite(found.density_ratio(rows)).all()


@pytest.mark.parametrize(
    "estimator",
    [
        None,
        KNeighborsClassifier(1),
        DecisionTreeClassifier(random_state=0),
        RandomForestClassifier(20, random_state=0),
    ],
    ids=["default", "1-NN", "tree", "forest"],
)
def test_without_drift_weights_stay_equal(estimator: Any) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 800, 5))
    found = TrainTestDiscriminator(estimator, random_state=0).fit(train, test)
    # Mann–Whitney: five folds of 160 + 160 rows.
    deviation = math.sqrt(5 * 321 / (12 * 160**2)) / 5
    assert found.auc_ == pytest.approx(0.5, abs=4 * deviation)
    assert found.effective_sample_size_ > 0.95 * 800
    assert found.p_value_ > 1e-4


def test_p_values_without_drift_are_uniform() -> None:
    n_sets = 80
    pvalues = []
    for seed in range(n_sets):
        train, test = np.random.default_rng(seed).normal(size=(2, 60, 2))
        estimator = LogisticRegression()
        pvalues.append(
            TrainTestDiscriminator(estimator, random_state=seed).fit(train, test).p_value_
        )
    for level in (0.1, 0.5):
        share = float(np.mean(np.array(pvalues) < level))
        # Five standard errors of a share; the folds are not independent, which a tenth allows for.
        assert share == pytest.approx(level, abs=5 * math.sqrt(level * (1 - level) / n_sets) + 0.1)


def test_p_value_by_hand() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.uniform(0, 1, (60, 1)), rng.uniform(0.1, 1, (40, 1))
    found = TrainTestDiscriminator(FirstColumn(), random_state=0).fit(train, test)
    z = (found.auc_ - 0.5) / (math.sqrt(5 * 21 / (12 * 12 * 8)) / 5)
    assert found.p_value_ == pytest.approx(norm.sf(z), rel=1e-12)
    assert found.auc_ == pytest.approx(found.fold_auc_.mean(), rel=4 * EPS)


def test_a_clear_drift_has_a_tiny_p_value() -> None:
    assert TrainTestDiscriminator().fit(*gaussian_sample(1.0, 2000)).p_value_ < 1e-30


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    train, test = gaussian_sample(1.0, 200)
    for balance in ("prior", "oversample"):
        one, again, other = (
            TrainTestDiscriminator(balance=balance, random_state=seed).fit(train, test[:90])
            for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(one.weights_, again.weights_)
        assert (one.weights_ != other.weights_).any()


def test_frames_arrays_objects_and_sparse_matrices_give_the_same_weights() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 4, (120, 3)), rng.integers(1, 5, (80, 3))
    estimator = LogisticRegression(max_iter=1000)
    kinds = {
        "array": lambda x: x,
        "float": lambda x: x.astype(float),
        "object": lambda x: x.astype(object),
        "lists": lambda x: x.tolist(),
        "frame": lambda x: pd.DataFrame(x, columns=["a", "b", "c"]),
        "csr": scipy.sparse.csr_matrix,
        "csc array": lambda x: scipy.sparse.csc_array(x),
        "coo": scipy.sparse.coo_matrix,
    }
    found = {
        name: TrainTestDiscriminator(estimator, random_state=0).fit(kind(train), kind(test))
        for name, kind in kinds.items()
    }
    for name, kind in kinds.items():
        np.testing.assert_allclose(
            found[name].weights_, found["array"].weights_, rtol=1e-4, err_msg=name
        )
        assert found[name].density_ratio(kind(test)).shape == (80,)


def test_frames_with_words_reach_the_pipeline_as_frames() -> None:
    age = np.arange(200) % 7
    train = pd.DataFrame({"town": ["a", "b"] * 100, "age": age}, index=range(500, 700))
    test = pd.DataFrame({"town": ["a", "a", "a", "b"] * 50, "age": age})
    estimator = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    found = TrainTestDiscriminator(estimator, random_state=0).fit(train, test)
    weight = pd.Series(found.weights_).groupby(train["town"].to_numpy()).mean()
    assert weight["a"] > weight["b"]


@pytest.mark.parametrize("kind", [list, np.array, lambda x: np.array(x, dtype=object), pd.Series])
def test_texts_go_through_a_pipeline(kind: Any) -> None:
    rng = np.random.default_rng(0)
    topics = {"sea": "ship wave storm salt", "city": "street tram noise light"}

    def texts(share: float, n: int) -> list[str]:
        chosen = np.where(rng.uniform(size=n) < share, "sea", "city")
        return [" ".join(rng.choice(topics[topic].split(), 5)) for topic in chosen]

    train, test = texts(0.5, 200), texts(0.9, 200)
    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression())
    found = TrainTestDiscriminator(estimator, random_state=0).fit(kind(train), kind(test))
    at_sea, in_town = found.density_ratio(kind(["ship storm", "tram street"]))
    assert at_sea > 1 > in_town
    report = drift_report(kind(train), kind(test), estimator=estimator, random_state=0)
    assert (report.feature_names, report.feature_auc.size, report.feature_importance.size) == (
        (), 0, 0,
    )  # fmt: skip
    assert report.p_value < 1e-3


def test_the_estimator_is_cloned_and_parameters_are_kept() -> None:
    estimator = LogisticRegression()
    found = TrainTestDiscriminator(estimator, cv=3, balance="none", clip=None, random_state=7)
    found.fit(*gaussian_sample(1.0, 60))
    assert not hasattr(estimator, "coef_")
    assert len(found.estimators_) == len(found.folds_) == len(found.fold_auc_) == 3
    copy = clone(found)
    assert not hasattr(copy, "weights_")
    assert (copy.cv, copy.balance, copy.clip, copy.random_state) == (3, "none", None, 7)
    assert "cv=3" in repr(found)
    assert found.set_params(clip=5.0).clip == 5.0


def test_separable_sets_are_warned_of() -> None:
    with pytest.warns(
        UserWarning, match="train and test are almost separable; weights rest on few"
    ):
        TrainTestDiscriminator().fit(*gaussian_sample(6.0, 200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainTestDiscriminator().fit(*gaussian_sample(0.5, 200))


@pytest.mark.bad_input
def test_use_before_fitting_is_refused() -> None:
    for method in ("density_ratio", "predict_proba"):
        with pytest.raises(NotFittedError):
            getattr(TrainTestDiscriminator(), method)(np.zeros((3, 1)))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"cv": 1}, "at least 2 folds, got 1"),
        (
            {"cv": 31},
            "cv = 31 folds need at least 31 rows in each set, got 40 training and 30 test",
        ),
        ({"cv": None}, "a number of folds or a splitter, got None"),
        ({"cv": KFold(7)}, "into both parts of every fold.*shuffle"),
        ({"cv": [([0, 1, 40, 41], [2, 42])]}, "hold out every row at least once, got 2 of 70"),
        ({"clip": 0}, "clip must be a positive number or None, got 0"),
        ({"clip": -1.0}, "got -1.0"),
        ({"clip": math.nan}, "got nan"),
        ({"clip": "ten"}, "got 'ten'"),
        ({"balance": "weights"}, "one of prior, oversample, none, got 'weights'"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], words: str) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=words):
        TrainTestDiscriminator(**parameters).fit(rng.normal(size=(40, 2)), rng.normal(size=(30, 2)))


@pytest.mark.bad_input
@pytest.mark.parametrize("estimator", [LinearSVC(), Ridge(), LogisticRegression, "forest"])
def test_an_estimator_without_probabilities_is_refused(estimator: Any) -> None:
    with pytest.raises(TypeError, match="estimator must have predict_proba"):
        TrainTestDiscriminator(estimator).fit(*gaussian_sample(1.0, 20))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("train", "test", "error", "words"),
    [
        (np.ones((9, 2)), np.ones((9, 3)), ValueError, "different features"),
        (pd.DataFrame({"a": [1], "b": [2]}), pd.DataFrame({"b": [1], "a": [2]}), ValueError,
         "different features, or in another order.*'a'.*'b'"),
        (scipy.sparse.eye(9, 4), scipy.sparse.eye(9, 5), ValueError, "different features"),
        (np.ones(9), np.ones(9), ValueError, r"X_train must have rows and columns.*\(9,\)"),
        (np.ones((9, 2)), np.ones((9, 2, 2)), ValueError, "X_test must have rows and columns"),
        (np.ones((9, 2)), ["a"] * 9, TypeError, "of the same kind, got ndarray and list"),
        (np.ones((0, 2)), np.ones((9, 2)), ValueError, "got 0 training and 9 test rows"),
    ],
)  # fmt: skip
def test_sets_are_checked(train: Any, test: Any, error: type[Exception], words: str) -> None:
    for fit in (TrainTestDiscriminator().fit, drift_report):
        with pytest.raises(error, match=words):
            fit(train, test)


@pytest.mark.bad_input
def test_a_classifier_whose_probabilities_are_none_is_refused() -> None:
    rows = np.full((20, 1), np.nan)
    with pytest.raises(ValueError, match="predict_proba of the estimator must be between 0 and 1"):
        TrainTestDiscriminator(FirstColumn()).fit(rows, rows)


def test_rows_are_drawn_in_proportion_to_their_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 3.0, 0.5, 0.0, 10.0, 0.0])
    splitter = AdversarialShuffleSplit(weights, n_splits=4000, test_size=5, random_state=0)
    counts = np.zeros(len(weights))
    for _, validation in splitter.split(np.zeros((8, 1))):
        np.add.at(counts, validation, 1)
    share = weights / weights.sum()
    draws = 4000 * 5
    assert counts.sum() == draws
    assert (counts[weights == 0] == 0).all()
    assert (np.abs(counts - draws * share) <= 5 * np.sqrt(draws * share * (1 - share))).all()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.just(0.0) | st.floats(1e-300, 1e300), min_size=3, max_size=30).filter(any),
    size=st.floats(0.05, 0.6) | st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_training_rows_are_those_never_drawn(
    weights: list[float], size: float | int, seed: int
) -> None:
    n = len(weights)
    draws = size if isinstance(size, int) else round(size * n)
    if draws < 1:
        return
    splitter = AdversarialShuffleSplit(weights, n_splits=2, test_size=size, random_state=seed)
    try:
        splits = list(splitter.split(np.zeros((n, 2))))
    except ValueError as error:
        assert draws >= n and "no training rows are left" in str(error)  # noqa: PT017, PT018
        return
    for train, validation in splits:
        assert len(validation) == draws
        assert (np.array(weights)[validation] > 0).all()
        assert sorted({*train} | {*validation}) == list(range(n))
        assert not {*train} & {*validation}
        assert len({*train}) == len(train)


def test_splits_are_drawn_afresh_and_again_alike() -> None:
    rows = np.zeros((50, 1))
    splitter = AdversarialShuffleSplit(np.arange(50), n_splits=3, random_state=0)
    first, again = (list(splitter.split(rows)) for _ in range(2))
    for (train, validation), (train_again, validation_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(train, train_again)
        np.testing.assert_array_equal(validation, validation_again)
    assert (first[0][1] != first[1][1]).any()
    assert splitter.get_n_splits() == splitter.get_n_splits(rows) == 3
    assert len(first[0][1]) == 10


def test_validation_rows_come_in_the_order_of_drawing() -> None:
    splitter = AdversarialShuffleSplit(np.ones(100), n_splits=1, test_size=0.5, random_state=0)
    _, validation = next(splitter.split(np.zeros((100, 1))))
    assert (np.diff(validation) < 0).any()
    assert len(np.unique(validation)) < len(validation)


def test_splitter_serves_the_model_selection_of_scikit_learn() -> None:
    X, y = load_diabetes(return_X_y=True)
    weights = 1 / (1 + np.exp(-40 * X[:, 2]))
    splitter = AdversarialShuffleSplit(weights, n_splits=4, random_state=0)
    assert cross_val_score(Ridge(), X, y, cv=splitter).shape == (4,)
    search = GridSearchCV(Ridge(), {"alpha": [0.1, 1.0]}, cv=splitter).fit(X, y)
    assert search.n_splits_ == 4
    by_hand = [
        Ridge().fit(X[train], y[train]).score(X[drawn], y[drawn])
        for train, drawn in splitter.split(X)
    ]
    np.testing.assert_allclose(cross_validate(Ridge(), X, y, cv=splitter)["test_score"], by_hand)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("weights", "parameters", "words"),
    [
        ([1.0, -1.0], {}, "finite and not negative, 1 of 2 are not"),
        ([1.0, math.nan, math.inf], {}, "2 of 3 are not"),
        ([0.0, 0.0], {}, "must not be all zero, got 2 zeros"),
        ([], {}, "must not be all zero"),
        ([[1.0, 2.0]], {}, r"got shape \(1, 2\)"),
        (["a", "b"], {}, "a list of numbers"),
        ([1.0] * 10, {"test_size": 0.01}, "at least 1 of 10 rows, got 0.01"),
        ([1.0] * 10, {"test_size": 0}, "at least 1 of 10 rows, got 0"),
        ([1.0] * 10, {"test_size": 1.0}, "a share between 0 and 1 of the rows, got 1.0"),
        ([1.0] * 10, {"test_size": -0.5}, "got -0.5"),
        ([1.0] * 3, {"test_size": 1000}, "no training rows are left"),
        ([1.0], {"test_size": 1}, "no training rows are left"),
        ([1.0] * 10, {"n_splits": 0}, "n_splits must be an integer of at least 1, got 0"),
    ],
)
def test_splitter_checks_its_weights(weights: Any, parameters: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(AdversarialShuffleSplit(weights, **parameters).split(np.zeros((len(weights), 1))))


@pytest.mark.bad_input
def test_splitter_refuses_another_number_of_rows_at_once() -> None:
    with pytest.raises(ValueError, match="one for each of the 4 rows, got 3"):
        AdversarialShuffleSplit(np.ones(3)).split(np.zeros((4, 1)))


def test_equal_weights_give_the_scores_of_scikit_learn() -> None:
    X, y = load_digits(return_X_y=True)
    for scoring in ("accuracy", "f1_macro", None):
        np.testing.assert_allclose(
            importance_weighted_cross_val_score(
                GaussianNB(), X, y, weights=np.full(len(y), 3.0), cv=4, scoring=scoring
            ),
            cross_val_score(GaussianNB(), X, y, cv=4, scoring=scoring),
            rtol=1e-12,
        )


def test_integer_weights_count_rows() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 2)), rng.normal(size=60)
    weights = rng.integers(0, 4, 60)
    scores = importance_weighted_cross_val_score(
        Ridge(), X, y, weights=weights, cv=KFold(3), scoring="neg_mean_squared_error",
        fit_weights=True,
    )  # fmt: skip
    for score, (train, validation) in zip(scores, KFold(3).split(X), strict=True):
        shown, judged = (np.repeat(part, weights[part]) for part in (train, validation))
        model = Ridge().fit(X[shown], y[shown])
        loss = np.mean((model.predict(X[judged]) - y[judged]) ** 2)
        assert score == pytest.approx(-loss, rel=1e-10)


def test_weights_in_fitting_reach_the_last_step_of_a_pipeline() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 2)), rng.integers(0, 2, 90)
    weights = rng.uniform(0, 5, 90)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    plain, weighted = (
        importance_weighted_cross_val_score(
            pipeline, X, y, weights=weights, scoring="neg_log_loss", fit_weights=fit_weights
        )
        for fit_weights in (False, True)
    )
    assert plain.shape == weighted.shape == (5,)
    assert (plain != weighted).all()


def test_scores_of_frames_texts_and_lists() -> None:
    texts = ["ship wave storm", "street tram noise"] * 20
    labels = ["sea", "city"] * 20
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression())
    weights = np.arange(40)
    np.testing.assert_array_equal(
        importance_weighted_cross_val_score(pipeline, texts, labels, weights=weights), np.ones(5)
    )
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    scores = importance_weighted_cross_val_score(
        Ridge(), X, y, weights=np.ones(len(y)), scoring="r2", fit_weights=True
    )
    np.testing.assert_allclose(scores, cross_val_score(Ridge(), X, y, cv=5), rtol=1e-9)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(29), "one for each of the 30 rows, got 29"),
        (-np.ones(30), "finite and not negative, 30 of 30 are not"),
        (np.r_[np.zeros(10), np.ones(20)], "weights of the 10 rows of a fold are all 0"),
    ],
)
def test_scoring_checks_its_weights(weights: np.ndarray, words: str) -> None:
    X, y = np.arange(60.0).reshape(30, 2), np.tile([0, 1], 15)
    with pytest.raises(ValueError, match=words):
        importance_weighted_cross_val_score(GaussianNB(), X, y, weights=weights, cv=KFold(3))


def digits_under_shift(seeds: range) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Test loss of naive Bayes, validation losses and weights, with shifted digit classes."""
    X, y = load_digits(return_X_y=True)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        is_test = rng.random(len(y)) < np.where(np.isin(y, [1, 2, 3, 8, 9]), 0.8, 0.2)
        X_train, y_train = X[~is_test], y[~is_test]
        found = TrainTestDiscriminator(random_state=seed).fit(X_train, X[is_test])
        held_out = rng.random(len(y_train)) < 0.3
        model = GaussianNB().fit(X_train[~held_out], y_train[~held_out])
        losses = (model.predict(X_train[held_out]) != y_train[held_out]).astype(float)
        yield 1 - model.score(X[is_test], y[is_test]), losses, found.weights_[held_out]


def test_weighted_validation_is_closer_to_the_test_loss_than_plain() -> None:
    plain, weighted = [], []
    for truth, losses, weights in digits_under_shift(range(20)):
        plain.append(losses.mean() - truth)
        weighted.append(np.average(losses, weights=weights) - truth)
    # Single estimates scatter by 0.04, so that the means of 20 are known to 0.01: a bias of -0.03
    # stays five standard errors below 0.6 of one of -0.125.
    assert abs(np.mean(weighted)) < 0.6 * abs(np.mean(plain))
    assert np.mean(np.square(weighted)) < 0.65**2 * np.mean(np.square(plain))


def drifting(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, n, 3))
    test[:, 1] += 1
    return train, test


def test_report_names_the_column_that_moved() -> None:
    train, test = drifting()
    report = drift_report(train, test, random_state=0)
    assert isinstance(report, DriftReport)
    assert report.feature_names == ("x0", "x1", "x2")
    assert report.feature_importance.argmax() == 1
    # Without the column nothing is left of the AUC but 1/2; the others are worth their noise.
    deviation = math.sqrt(801 / (12 * 400**2))
    assert report.feature_importance[1] == pytest.approx(report.auc - 0.5, abs=5 * deviation)
    assert np.abs(report.feature_importance[[0, 2]]).max() < deviation
    found = TrainTestDiscriminator(random_state=0).fit(train, test)
    assert (report.auc, report.p_value) == (found.auc_, found.p_value_)
    assert report.effective_sample_fraction == found.effective_sample_size_ / 400
    np.testing.assert_array_equal(report.discriminator.weights_, found.weights_)


def test_auc_of_a_column_is_that_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 5, (70, 2)), rng.integers(1, 6, (50, 2))
    report = drift_report(train, test, random_state=0)
    for j in range(2):
        statistic = mannwhitneyu(test[:, j], train[:, j]).statistic
        assert report.feature_auc[j] == pytest.approx(statistic / (70 * 50), rel=8 * EPS)


def test_report_of_a_frame_with_words_and_gaps() -> None:
    rng = np.random.default_rng(0)

    def frame(n: int, shift: float) -> pd.DataFrame:
        age = rng.normal(shift, 1, n)
        return pd.DataFrame({
            "town": pd.Categorical(rng.choice(["a", "b"], n)),
            "age": np.where(np.arange(n) % 10 == 0, np.nan, age),
            "children": pd.array(rng.integers(0, 3, n), dtype="Int64"),
            "married": rng.uniform(size=n) < 0.5,
        })  # fmt: skip

    train, test = frame(300, 0.0), frame(200, 1.0)
    before = train.copy()
    estimator = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    report = drift_report(train, test, estimator=estimator, random_state=0)
    assert report.feature_names == ("town", "age", "children", "married")
    assert math.isnan(report.feature_auc[0])
    assert np.isfinite(report.feature_auc[1:]).all()
    known = [column["age"].dropna() for column in (test, train)]
    expected = mannwhitneyu(*known).statistic / (len(known[0]) * len(known[1]))
    assert report.feature_auc[1] == pytest.approx(expected, rel=8 * EPS)
    pd.testing.assert_frame_equal(train, before)


@pytest.mark.filterwarnings("ignore:train and test are almost separable")  # of 20 rows
def test_columns_of_objects_are_numeric_where_their_values_are() -> None:
    train = np.array([[1, "a"], [2, "b"], [3, "a"], [4, "b"]] * 5, dtype=object)
    estimator = make_pipeline(OneHotEncoder(), LogisticRegression())
    report = drift_report(train, train, estimator=estimator, feature_names=["n", "w"], cv=2)
    assert report.feature_auc[0] == 0.5
    assert math.isnan(report.feature_auc[1])


def test_report_of_a_sparse_matrix_has_no_columns() -> None:
    train, test = (scipy.sparse.csr_matrix(x) for x in drifting(100))
    report = drift_report(train, test, estimator=LogisticRegression(), random_state=0)
    assert report.feature_names == ()
    assert report.feature_auc.shape == report.feature_importance.shape == (0,)
    assert report.auc > 0.6


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"feature_names": ["a", "b"]}, "one for each of the 3 columns, got"),
        ({"feature_names": "abc"}, "one for each of the 3 columns, got 'abc'"),
        ({"n_repeats": 0}, "n_repeats must be an integer of at least 1, got 0"),
    ],
)
def test_report_checks_its_parameters(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drift_report(*drifting(50), **parameters)
