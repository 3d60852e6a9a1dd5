"""The scikit-learn classifier: fit, stream, merge, predict."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve, eigh, lapack
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

from kexue.stats.logistic.moments import (
    ClassMoments,
    Shrinkage,
    _check_shrinkage,
    _check_weight,
    _live,
    _moments,
)
from kexue.stats.logistic.softmax import _log

__all__ = ["AnalyticLogisticRegression"]


class _Solution(NamedTuple):
    coef: np.ndarray
    intercept: np.ndarray
    covariance: np.ndarray
    prior: np.ndarray


class AnalyticLogisticRegression(ClassifierMixin, BaseEstimator):
    """Logistic regression in closed form: one pass over the data, exact streaming and merging.

    The model is linear discriminant analysis with the pooled covariance of divisor N. A feature
    that is constant within every class gets weight 0, even if it separates the classes: no
    covariance can say how much it should count. A singular covariance is inverted on its range
    after scaling to unit variance, so results do not depend on units.

    Without shrinkage it needs clearly more samples than features (twice as many, say);
    ``shrinkage="oas"`` does well with fewer.

    Parameters
    ----------
    shrinkage : None, float or "oas", default None
        Shrinkage of the covariance, see `ClassMoments.covariance`.
    priors : array-like, shape (classes,), optional
        Class probabilities that replace the observed frequencies in the intercept. They do not
        enter the covariance.
    rcond : float, optional
        Directions with a variance of at most ``rcond`` times the largest, on the correlation
        scale, are discarded. ``10 * eps * features`` by default.

    Attributes
    ----------
    classes_ : array, shape (classes,)
        Labels, sorted.
    coef_, intercept_ : array, shapes (1, features) and (1,), or (classes, features) and (classes,)
        Class 1 minus class 0 for two classes. Otherwise the weights of all classes, whose mean,
        weighted by the observed frequencies, is zero.
    class_prior_, class_count_ : array, shape (classes,)
        Probabilities in the intercept; sums of sample weights.
    means_ : array, shape (classes, features)
        Class means, zero for classes not yet seen.
    covariance_ : array, shape (features, features)
        Covariance within classes, after shrinkage.
    moments_ : ClassMoments
        All that was kept of the data.
    n_features_in_, feature_names_in_ : int, array
        Number of features; their names if ``X`` had any.

    Raises
    ------
    ValueError
        On fitting, if a parameter or the data is not as described.
    sklearn.exceptions.NotFittedError
        On use before fitting.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> AnalyticLogisticRegression().fit(X, y).score(X, y)
    0.98

    Site by site, without moving rows:

    >>> one = AnalyticLogisticRegression().partial_fit(X[:75], y[:75], classes=[0, 1, 2])
    >>> two = AnalyticLogisticRegression().partial_fit(X[75:], y[75:], classes=[0, 1, 2])
    >>> one.merge(two).score(X, y)
    0.98
    """

    shrinkage: Shrinkage
    priors: ArrayLike | None
    rcond: float | None
    classes_: np.ndarray
    moments_: ClassMoments
    _solution: _Solution | None

    # Checked in `fit`, as scikit-learn wants it: a constructor takes and keeps anything.
    @no_type_check
    def __init__(
        self,
        *,
        shrinkage: Shrinkage = None,
        priors: ArrayLike | None = None,
        rcond: float | None = None,
    ) -> None:
        self.shrinkage = shrinkage
        self.priors = priors
        self.rcond = rcond

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> AnalyticLogisticRegression:
        """Fit from scratch.

        Parameters
        ----------
        X : array-like, shape (samples, features)
            Features.
        y : array-like, shape (samples,)
            Labels of at least two classes.
        sample_weight : array-like, shape (samples,), optional
            Non-negative weights; weight 0 removes the row.

        Returns
        -------
        AnalyticLogisticRegression
            Itself.
        """
        X, y, weight = self._validate(X, y, sample_weight, reset=True)
        classes = unique_labels(y if weight is None else y[weight > 0])
        self._start(classes)
        self._add(X, y, weight)
        self._solution = self._solve()
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> AnalyticLogisticRegression:
        """Add a batch: the result is that of `fit` on all batches so far.

        Coefficients are computed when they are first asked for, not after each batch.

        Parameters
        ----------
        X : array-like, shape (samples, features)
            Features.
        y : array-like, shape (samples,)
            Labels, all among the classes.
        classes : array-like, shape (classes,)
            All labels that may occur; needed on the first call. A class has probability 0 until
            its first sample.
        sample_weight : array-like, shape (samples,), optional
            Non-negative weights.

        Returns
        -------
        AnalyticLogisticRegression
            Itself.
        """
        first = not hasattr(self, "moments_")
        if first and classes is None:
            raise ValueError("classes must be given on the first call to partial_fit")
        X, y, weight = self._validate(X, y, sample_weight, reset=first)
        if first:
            self._start(unique_labels(classes))
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(
                f"classes must be those of the first call, {self.classes_}, got {classes}"
            )
        self._add(X, y, weight)
        self._solution = None
        return self

    def merge(self, other: AnalyticLogisticRegression) -> AnalyticLogisticRegression:
        """Add what another classifier has seen, as if its samples had been given to this one.

        Parameters
        ----------
        other : AnalyticLogisticRegression
            Fitted, with the same classes and features; it stays as it is.

        Returns
        -------
        AnalyticLogisticRegression
            Itself.
        """
        if not isinstance(other, AnalyticLogisticRegression):
            raise TypeError(
                f"other must be an AnalyticLogisticRegression, got {type(other).__name__}"
            )
        check_is_fitted(self)
        check_is_fitted(other)
        if not np.array_equal(self.classes_, other.classes_):
            raise ValueError(
                f"merged classifiers must have the same classes, "
                f"got {self.classes_} and {other.classes_}"
            )
        ours, theirs = (getattr(one, "feature_names_in_", None) for one in (self, other))
        if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
            raise ValueError(
                f"merged classifiers must have the same features, got {ours} and {theirs}"
            )
        self.moments_ = self.moments_.merge(other.moments_)
        self._solution = None
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, " samples *classes"]:
        """Return the logits; for two classes their difference.

        Parameters
        ----------
        X : array-like, shape (samples, features)
            Features.

        Returns
        -------
        array, shape (samples,) or (samples, classes)
            ``-inf`` for a class that has not been seen.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        logits = X @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: Any) -> Any:
        """Return the most probable label of each row of ``X``."""
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)]

    def predict_proba(self, X: Any) -> Float[np.ndarray, "samples classes"]:
        """Return the probability of each class for each row of ``X``."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return np.stack([expit(-logits), expit(logits)], axis=1)
        return softmax(logits, axis=1)

    def predict_log_proba(self, X: Any) -> Float[np.ndarray, "samples classes"]:
        """Return the logarithm of `predict_proba`, without underflow."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return np.stack([log_expit(-logits), log_expit(logits)], axis=1)
        return log_softmax(logits, axis=1)

    @property
    def coef_(self) -> Float[np.ndarray, "rows features"]:
        return self._solved.coef

    @property
    def intercept_(self) -> Float[np.ndarray, " rows"]:
        return self._solved.intercept

    @property
    def covariance_(self) -> Float[np.ndarray, "features features"]:
        return self._solved.covariance

    @property
    def class_prior_(self) -> Float[np.ndarray, " classes"]:
        return self._solved.prior

    @property
    def class_count_(self) -> Float[np.ndarray, " classes"]:
        check_is_fitted(self)
        return self.moments_.count

    @property
    def means_(self) -> Float[np.ndarray, "classes features"]:
        check_is_fitted(self)
        return self.moments_.mean

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "moments_")

    def _validate(self, X: Any, y: Any, sample_weight: Any, *, reset: bool) -> tuple[Any, Any, Any]:
        """Refuse bad parameters and bad data; on the first batch also weights that are all zero."""
        _check_shrinkage(self.shrinkage)
        if self.rcond is not None and not (
            isinstance(self.rcond, numbers.Real) and 0 <= self.rcond < 1
        ):
            raise ValueError(f"rcond must be None or a float in [0, 1), got {self.rcond!r}")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), reset=reset)
        if reset:
            check_classification_targets(y)
        if sample_weight is None:
            return X, y, None
        weight = check_array(
            sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
        )
        _check_weight(np, weight, len(y))
        if reset and not weight.any():
            raise ValueError("sample_weight must not be zero for all samples, got only zeros")
        return X, y, weight

    def _start(self, classes: np.ndarray) -> None:
        if len(classes) < 2:
            raise ValueError(f"at least 2 classes are needed, got {len(classes)} class: {classes}")
        self.classes_ = classes
        if hasattr(self, "moments_"):
            del self.moments_

    def _add(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray | None) -> None:
        _check_priors(self.priors, len(self.classes_))
        if weight is not None:
            X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
        index = np.searchsorted(self.classes_, y)
        known = self.classes_.take(index, mode="clip") == y
        if not np.all(known):
            unknown = np.unique(y[~known])
            raise ValueError(f"labels must be among the classes {self.classes_}, got {unknown}")
        moments = _moments(X, index, weight, len(self.classes_))
        self.moments_ = self.moments_.merge(moments) if hasattr(self, "moments_") else moments

    @property
    def _solved(self) -> _Solution:
        check_is_fitted(self)
        if self._solution is None:
            self._solution = self._solve()
        return self._solution

    def _solve(self) -> _Solution:
        count, mean = self.moments_.count, self.moments_.mean
        covariance = self.moments_.covariance(shrinkage=self.shrinkage)
        frequency = count / count.sum()
        prior = frequency if self.priors is None else np.asarray(self.priors, dtype=np.float64)
        centre = frequency @ mean
        seen = count > 0
        if not prior[seen].sum() > 0:
            raise ValueError(
                "priors must give some probability to a class that has samples, got 0 for all of "
                f"{self.classes_[seen].tolist()}"
            )
        deviation = np.where(seen[:, None], mean - centre, 0.0)
        weight = _divide(deviation, covariance, _live(np, covariance, mean), self.rcond)
        quadratic = np.sum(weight * deviation, axis=1)
        bias = _log(np, np.where(seen, prior, 0.0)) - quadratic / 2 - weight @ centre
        if len(self.classes_) == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        return _Solution(weight, bias, covariance, prior)


def _check_priors(priors: Any, n_classes: int) -> None:
    if priors is None:
        return
    p = np.asarray(priors, dtype=np.float64)
    if p.shape != (n_classes,) or not (p >= 0).all() or not math.isclose(p.sum(), 1, rel_tol=1e-6):
        raise ValueError(f"priors must be {n_classes} non-negative numbers of sum 1, got {priors}")


def _divide(
    rows: np.ndarray, covariance: np.ndarray, live: np.ndarray, rcond: float | None
) -> np.ndarray:
    """Return ``rows`` times the pseudo-inverse of the covariance, on the correlation scale."""
    weight = np.zeros_like(rows)
    if not live.any():
        return weight
    deviation = np.sqrt(covariance.diagonal()[live])
    R = covariance[np.ix_(live, live)] / np.outer(deviation, deviation)
    scaled = rows[:, live] / deviation
    cutoff = 10 * np.finfo(R.dtype).eps * covariance.shape[0] if rcond is None else rcond
    factor, failed = lapack.dpotrf(R, lower=1)
    # The condition number of the 1-norm bounds that of the eigenvalues; LAPACK estimates it to
    # a small factor. So far from the cut-off, no eigenvalue would be discarded.
    if not failed and lapack.dpocon(factor, np.abs(R).sum(0).max(), uplo="L")[0] > 100 * cutoff:
        weight[:, live] = cho_solve((factor, True), scaled.T).T / deviation
        return weight
    eigenvalue, vector = eigh(R)
    kept = eigenvalue > cutoff * eigenvalue[-1]
    basis = vector[:, kept]
    weight[:, live] = (scaled @ basis / eigenvalue[kept]) @ basis.T / deviation
    return weight
