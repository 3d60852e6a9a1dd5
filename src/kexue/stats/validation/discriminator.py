"""The classifier that tells training rows from test rows, and the weights that follow from it."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, Literal, no_type_check

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import norm, rankdata
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, check_cv
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.validation import check_is_fitted

from kexue.stats.validation.rows import Rows, _join

__all__ = ["TrainTestDiscriminator"]

Balance = Literal["prior", "oversample", "none"]
_BALANCES = ("prior", "oversample", "none")

# Trees and nearest neighbours are certain; certainty has no log-odds.
_LEAST_PROBABILITY = 1e-12
# Far beyond any meaning, but a ratio of such a logarithm is still a float.
_LARGEST_LOG_RATIO = 700.0
_SEPARABLE_AUC = 0.95
_FEW_ROWS = 30


class TrainTestDiscriminator(BaseEstimator):
    r"""Weights that turn training rows into a sample of the test distribution.

    Each row is judged by a classifier that has not seen it: with the folds' out-of-fold log-odds
    :math:`\ell`, corrected for unequal numbers of rows,

    .. math::
        \log\frac{q(x)}{p(x)} = \alpha\,\ell(x) + \beta, \qquad
        w_i \propto \min\Big(\frac{q(x_i)}{p(x_i)},\ \mathrm{clip}\Big).

    :math:`\alpha` and :math:`\beta` are a logistic regression of the domain on :math:`\ell`, both
    domains with equal total weight: they take back what the classifier is too sure of, or too shy.
    Without detectable drift :math:`\alpha = 0`, and all weights are equal.

    The cost is that of ``cv`` fits of the classifier. It is cloned, never modified.

    Parameters
    ----------
    estimator : classifier, optional
        Any scikit-learn classifier or pipeline with ``predict_proba``. By default a logistic
        regression with ``C=0.01`` on standardised columns.
    cv : int or splitter, default 5
        Number of stratified, shuffled folds over all rows, training rows first; or a splitter that
        holds out every row at least once, and rows of both sets in each fold.
    balance : {"prior", "oversample", "none"}, default "prior"
        What makes up for unequal numbers of rows: a factor on the odds, copies of rows of the
        smaller set, or nothing, where the estimator balances the classes itself.
    calibrate : bool, default True
        Whether to fit α and β; otherwise they are 1 and 0.
    clip : float or None, default 10
        Largest density ratio. It bounds the variance of what is weighted, and pulls it towards the
        training distribution.
    random_state : int, RandomState or None, default None
        Decides the folds and the copies. The estimator keeps its own.

    Attributes
    ----------
    weights_ : array, shape (n_train,)
        Out-of-fold density ratios of the training rows, clipped, then divided by their mean.
    train_scores_, test_scores_ : arrays, shapes (n_train,) and (n_test,)
        Out-of-fold probabilities q/(p+q) of being a test row, calibrated and not clipped.
    fold_auc_ : array, shape (folds,)
        Area under the ROC curve of each held-out fold.
    auc_ : float
        Mean of ``fold_auc_``; 1/2 where train and test look the same.
    p_value_ : float
        One-sided, approximate: how often such an AUC comes from equal distributions.
    effective_sample_size_ : float
        (Σw)²/Σw²: as many rows without weights say as much.
    calibration_ : tuple of float
        α and β.
    estimators_ : list of classifiers
        One for each fold.
    folds_ : list of (int array, int array)
        Rows fitted on and rows held out, by their place among all rows.

    Raises
    ------
    ValueError
        On fitting, where sets have different features, fewer rows than folds, or a parameter is
        not as described; where a fold lacks rows of a set.
    TypeError
        On fitting, where the estimator has no ``predict_proba`` or the sets are of two kinds.
    sklearn.exceptions.NotFittedError
        On use before fitting.

    Warns
    -----
    UserWarning
        Where the AUC is above 0.95 or the weights are worth fewer than 30 rows.

    Examples
    --------
    A category that makes up half of the training rows and nine tenths of the test rows weighs nine
    times as much as the other:

    >>> import numpy as np
    >>> train, test = np.repeat([0.0, 1.0], [500, 500]), np.repeat([0.0, 1.0], [100, 900])
    >>> found = TrainTestDiscriminator(random_state=0).fit(train[:, None], test[:, None])
    >>> rare, common = found.density_ratio(np.array([[0.0], [1.0]]))
    >>> round(float(common / rare), 1)
    9.0
    """

    estimator: Any
    cv: Any
    balance: Balance
    calibrate: bool
    clip: float | None
    random_state: Any
    weights_: np.ndarray
    train_scores_: np.ndarray
    test_scores_: np.ndarray
    fold_auc_: np.ndarray
    auc_: float
    p_value_: float
    effective_sample_size_: float
    calibration_: tuple[float, float]
    estimators_: list[Any]
    folds_: list[tuple[np.ndarray, np.ndarray]]
    _log_priors: list[float]

    # Checked in `fit`, as scikit-learn wants it: a constructor takes and keeps anything.
    @no_type_check
    def __init__(
        self,
        estimator: Any = None,
        *,
        cv: Any = 5,
        balance: Balance = "prior",
        calibrate: bool = True,
        clip: float | None = 10.0,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.cv = cv
        self.balance = balance
        self.calibrate = calibrate
        self.clip = clip
        self.random_state = random_state

    def fit(self, X_train: Rows, X_test: Rows) -> TrainTestDiscriminator:
        """Learn to tell the sets apart, and weight the training rows.

        Parameters
        ----------
        X_train, X_test : arrays, shapes (n_train, features) and (n_test, features)
            Or DataFrames with the same columns, sparse matrices, lists of texts: whatever the
            estimator takes.

        Returns
        -------
        TrainTestDiscriminator
            The estimator itself.
        """
        estimator = _checked_estimator(self.estimator)
        log_clip = _checked_log_clip(self.clip)
        if self.balance not in _BALANCES:
            raise ValueError(f"balance must be one of {', '.join(_BALANCES)}, got {self.balance!r}")
        rows, domain = _join(X_train, X_test)
        random = check_random_state(self.random_state)
        self.folds_ = _folds(self.cv, rows, domain, random)

        self.estimators_, self._log_priors, fold_auc = [], [], []
        total, times_held_out = np.zeros(len(domain)), np.zeros(len(domain))
        for train, held_out in self.folds_:
            shown = _oversampled(train, domain, random) if self.balance == "oversample" else train
            model = clone(estimator).fit(_safe_indexing(rows, shown), domain[shown])
            prior = _log_prior(domain[train]) if self.balance == "prior" else 0.0
            log_odds = _log_odds(model, _safe_indexing(rows, held_out)) - prior
            total[held_out] += log_odds
            times_held_out[held_out] += 1
            fold_auc.append(_auc(log_odds, domain[held_out]))
            self.estimators_.append(model)
            self._log_priors.append(prior)
        log_odds = total / times_held_out

        self.calibration_ = _calibration(log_odds, domain) if self.calibrate else (1.0, 0.0)
        log_ratio = self._calibrated(log_odds)
        is_test = domain == 1
        self.train_scores_, self.test_scores_ = (expit(log_ratio[s]) for s in (~is_test, is_test))
        self.weights_ = _weights(np.minimum(log_ratio[~is_test], log_clip))
        self.effective_sample_size_ = float(self.weights_.sum() ** 2 / (self.weights_**2).sum())
        self.fold_auc_ = np.array(fold_auc)
        self.auc_ = float(self.fold_auc_.mean())
        self.p_value_ = _p_value(self.auc_, [domain[held_out] for _, held_out in self.folds_])
        self._warn_of_separation()
        return self

    def density_ratio(self, X: Rows) -> Float[np.ndarray, " n"]:
        """Return q/p of any rows, calibrated and clipped: the geometric mean over fold models.

        For the training rows themselves ``weights_`` is the better choice: these models saw them.

        Parameters
        ----------
        X : array, shape (n, features)
            Rows of the kind that `fit` took.

        Returns
        -------
        array, shape (n,)
            Density ratios, at most ``clip``.
        """
        return np.exp(self._log_density_ratio(X))

    def predict_proba(self, X: Rows) -> Float[np.ndarray, "n 2"]:
        """Return the probabilities p/(p+q) and q/(p+q) of any rows, from `density_ratio`.

        Parameters
        ----------
        X : array, shape (n, features)
            Rows of the kind that `fit` took.

        Returns
        -------
        array, shape (n, 2)
            Of a training row and of a test row, if both were equally frequent.
        """
        log_ratio = self._log_density_ratio(X)
        return np.column_stack([expit(-log_ratio), expit(log_ratio)])

    def _log_density_ratio(self, X: Rows) -> np.ndarray:
        check_is_fitted(self, "estimators_")
        log_odds = [
            _log_odds(model, X) - prior
            for model, prior in zip(self.estimators_, self._log_priors, strict=True)
        ]
        return np.minimum(self._calibrated(np.mean(log_odds, axis=0)), _checked_log_clip(self.clip))

    def _calibrated(self, log_odds: np.ndarray) -> np.ndarray:
        alpha, beta = self.calibration_
        return np.clip(alpha * log_odds + beta, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)

    def _warn_of_separation(self) -> None:
        if self.effective_sample_size_ < _FEW_ROWS or self.auc_ > _SEPARABLE_AUC:
            warnings.warn(
                "train and test are almost separable; weights rest on few rows "
                f"(AUC {self.auc_:.3f}, effective sample size {self.effective_sample_size_:.1f})",
                UserWarning,
                stacklevel=3,
            )


def _checked_estimator(estimator: Any) -> Any:
    if estimator is None:
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    if isinstance(estimator, type) or not hasattr(estimator, "predict_proba"):
        raise TypeError(f"estimator must have predict_proba, got {estimator!r}")
    return estimator


def _checked_log_clip(clip: Any) -> float:
    if clip is None:
        return math.inf
    if not isinstance(clip, int | float | np.number) or not clip > 0:
        raise ValueError(f"clip must be a positive number or None, got {clip!r}")
    return math.log(clip)


def _folds(
    cv: Any, rows: Rows, domain: Int[np.ndarray, " n"], random: np.random.RandomState
) -> list[tuple[np.ndarray, np.ndarray]]:
    if cv is None or isinstance(cv, bool):
        raise ValueError(f"cv must be a number of folds or a splitter, got {cv!r}")
    if isinstance(cv, numbers.Integral):
        if cv < 2:
            raise ValueError(f"cv must be at least 2 folds, got {cv}")
        fewest = np.bincount(domain, minlength=2)
        if fewest.min() < cv:
            raise ValueError(
                f"cv = {cv} folds need at least {cv} rows in each set, "
                f"got {fewest[0]} training and {fewest[1]} test rows"
            )
        cv = StratifiedKFold(int(cv), shuffle=True, random_state=random)
    folds = [(np.asarray(a), np.asarray(b)) for a, b in check_cv(cv).split(rows, domain)]
    for part in (part for fold in folds for part in fold):
        if not 0 < np.count_nonzero(domain[part]) < len(part):
            raise ValueError(
                "cv must put training rows and test rows into both parts of every fold, "
                f"got a part of {len(part)} rows of one set; X_train comes first, so shuffle"
            )
    is_held_out = np.zeros(len(domain), dtype=bool)
    for _, held_out in folds:
        is_held_out[held_out] = True
    n_held_out = np.count_nonzero(is_held_out)
    if n_held_out < len(domain):
        raise ValueError(
            f"cv must hold out every row at least once, got {n_held_out} of {len(domain)} rows"
        )
    return folds


def _oversampled(
    train: Int[np.ndarray, " n"], domain: np.ndarray, random: np.random.RandomState
) -> np.ndarray:
    """As many rows of both sets: whole copies of the smaller one, and a part of it."""
    small, large = sorted((train[domain[train] == z] for z in (0, 1)), key=len)
    copies, rest = divmod(len(large), len(small))
    part = random.choice(small, rest, replace=False)
    return np.concatenate([large, np.tile(small, copies), part])


def _log_prior(domain: np.ndarray) -> float:
    """Log-odds of a test row among rows of such numbers."""
    n_train, n_test = np.bincount(domain, minlength=2)
    return math.log(n_test / n_train)


def _log_odds(model: Any, rows: Rows) -> np.ndarray:
    """Log-odds of the class 1, the test rows, wherever the model keeps it."""
    probabilities = np.asarray(model.predict_proba(rows), dtype=np.float64)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("predict_proba of the estimator must be between 0 and 1, got other values")
    # Both columns, because 1 - D has no digits left where D is close to 1.
    bounded = np.clip(probabilities, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    place = list(model.classes_)
    return np.log(bounded[:, place.index(1)]) - np.log(bounded[:, place.index(0)])


def _calibration(log_odds: np.ndarray, domain: np.ndarray) -> tuple[float, float]:
    """Logistic regression of the domain on the log-odds, each domain of total weight 1/2.

    A negative slope would say that the classifier is worse than none. The best slope that is not
    negative is 0 then, and with equal weights the best intercept beside it is 0 too.
    """
    weight = 0.5 / np.bincount(domain)[domain]
    centre = weight @ log_odds
    deviation = log_odds - centre
    scale = math.sqrt(weight @ deviation**2)
    if scale <= 1e-10 * (1 + abs(centre)):
        return 0.0, 0.0
    standard = deviation / scale
    sign = 2.0 * domain - 1
    # Keeps the slope finite where the domains are perfectly separated, and is no more than
    # rounding elsewhere.
    ridge = 1e-10

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        slope, intercept = theta
        margin = sign * (slope * standard + intercept)
        push = weight * sign * expit(-margin)
        gradient = np.array([ridge * slope - push @ standard, -push.sum()])
        return ridge * slope**2 / 2 - weight @ log_expit(margin), gradient

    def hessian(theta: np.ndarray) -> np.ndarray:
        probability = expit(theta[0] * standard + theta[1])
        curvature = weight * probability * (1 - probability)
        mixed = curvature @ standard
        return np.array([
            [ridge + (curvature * standard) @ standard, mixed],
            [mixed, curvature.sum()],
        ])  # fmt: skip

    # The odds as they are, where they are worth something; certain odds are a bad place to start.
    as_they_are = np.array([scale, centre])
    start = as_they_are if loss(as_they_are)[0] < math.log(2) else np.zeros(2)
    found = minimize(
        loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9}
    )
    slope, intercept = found.x
    if slope <= 0:
        return 0.0, 0.0
    alpha = float(slope / scale)
    return alpha, float(intercept - alpha * centre)


def _weights(log_ratio: np.ndarray) -> Float[np.ndarray, " n"]:
    """Ratios divided by their mean; none overflows."""
    ratio = np.exp(log_ratio - log_ratio.max())
    return ratio / ratio.mean()


def _auc(scores: np.ndarray, domain: np.ndarray) -> float:
    """Mann–Whitney: how often a test row scores above a training row, ties counted half."""
    n_train, n_test = np.bincount(domain, minlength=2)
    ranks = rankdata(scores)[domain == 1]
    return float((ranks.sum() - n_test * (n_test + 1) / 2) / (n_train * n_test))


def _p_value(auc: float, held_out: list[np.ndarray]) -> float:
    """Chance of such a mean AUC over folds if both distributions were one, by the normal law."""
    counts = np.array([np.bincount(domain, minlength=2) for domain in held_out], dtype=float)
    variances = (counts.sum(axis=1) + 1) / (12 * counts.prod(axis=1))
    deviation = math.sqrt(variances.sum()) / len(counts)
    return float(norm.sf((auc - 0.5) / deviation))
