"""What weights are for: validation rows drawn by them, and scores weighted by them."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.base import clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.validation import _num_samples

__all__ = ["AdversarialShuffleSplit", "importance_weighted_cross_val_score"]

Split = tuple[Int[np.ndarray, " n_train"], Int[np.ndarray, " n_validation"]]


class AdversarialShuffleSplit:
    """Splitter whose validation rows are drawn with replacement, in proportion to weights.

    With weights q/p the validation rows are a sample of q. A row may be drawn several times, and
    has to stay as often as it was: without its copies the sample is one of another distribution.
    Rows that were never drawn are the training part. Works wherever scikit-learn takes ``cv=``.

    Parameters
    ----------
    weights : array, shape (n,)
        Not negative, not all zero; `TrainTestDiscriminator.weights_`, say.
    n_splits : int, default 5
        Number of splits, each drawn afresh.
    test_size : float or int, default 0.2
        Number of draws, or as a share of n between 0 and 1.
    random_state : int, RandomState or None, default None
        An int gives the same splits on every call.

    Raises
    ------
    ValueError
        Where weights are no such weights, or not one for each row; where no row would be drawn, or
        none is left to train on.

    Examples
    --------
    >>> import numpy as np
    >>> splitter = AdversarialShuffleSplit([0, 1, 1, 8], n_splits=2, test_size=3, random_state=0)
    >>> for train, validation in splitter.split(np.zeros((4, 1))):
    ...     print(train, validation)
    [0 1 2] [3 3 3]
    [0 1 2] [3 3 3]
    """

    weights: Float[np.ndarray, " n"]
    n_splits: int
    test_size: float | int
    random_state: Any
    _n_draws: int

    # Checked inside, in words of its own.
    @no_type_check
    def __init__(
        self,
        weights: ArrayLike,
        *,
        n_splits: int = 5,
        test_size: float | int = 0.2,
        random_state: Any = None,
    ) -> None:
        self.weights = _checked_weights(weights)
        if not _is_integer(n_splits) or n_splits < 1:
            raise ValueError(f"n_splits must be an integer of at least 1, got {n_splits!r}")
        self.n_splits = n_splits
        self.test_size = test_size
        self.random_state = random_state
        self._n_draws = _number_of_draws(test_size, len(self.weights))

    def __repr__(self) -> str:
        return (
            f"AdversarialShuffleSplit(<{len(self.weights)} weights>, n_splits={self.n_splits}, "
            f"test_size={self.test_size}, random_state={self.random_state})"
        )

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[Split]:
        """Yield the training rows, in order, and the validation rows, as drawn.

        Parameters
        ----------
        X : array, shape (n, features)
            Only its number of rows matters.
        y, groups : optional
            Not used; here because scikit-learn passes them.

        Yields
        ------
        tuple of two int arrays
            Places of the training rows, each once, and of the validation rows, with repetitions.
        """
        n = _num_samples(X)
        if n != len(self.weights):
            raise ValueError(
                f"weights must be one for each of the {n} rows, got {len(self.weights)}"
            )
        return self._splits()

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Return the number of splits.

        Parameters
        ----------
        X, y, groups : optional
            Not used; here because scikit-learn passes them.

        Returns
        -------
        int
            ``n_splits``.
        """
        return self.n_splits

    def _splits(self) -> Iterator[Split]:
        random = check_random_state(self.random_state)
        cumulated = np.cumsum(self.weights / self.weights.max())
        last = np.flatnonzero(self.weights)[-1]
        for _ in range(self.n_splits):
            places = random.random_sample(self._n_draws) * cumulated[-1]
            # From the right, so that a row of weight 0 is never hit; rounding may hit the very end.
            validation = np.minimum(np.searchsorted(cumulated, places, side="right"), last)
            is_left = np.ones(len(cumulated), dtype=bool)
            is_left[validation] = False
            train = np.flatnonzero(is_left)
            if len(train) == 0:
                raise ValueError(
                    f"no training rows are left: {self._n_draws} draws took all of "
                    f"{len(cumulated)} rows; make test_size smaller"
                )
            yield train, validation


def importance_weighted_cross_val_score(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    weights: ArrayLike,
    cv: Any = 5,
    scoring: str | Callable[..., float] | None = "accuracy",
    fit_weights: bool = False,
) -> Float[np.ndarray, " folds"]:
    r"""Cross-validation whose scores estimate those on the test distribution.

    Each fold's score is a mean of its rows weighted by w = q/p,
    :math:`\sum_i w_i f(x_i, y_i) / \sum_i w_i \approx \mathbb{E}_q[f]`.

    Parameters
    ----------
    estimator : estimator
        What is to be judged; it is cloned for each fold.
    X : array, shape (n, features)
        Training rows.
    y : array, shape (n,)
        Their labels.
    weights : array, shape (n,)
        One for each row; `TrainTestDiscriminator.weights_`, say.
    cv : int or splitter, default 5
        As in scikit-learn's ``cross_val_score``. Rows must not be drawn by weight already.
    scoring : str or callable, default "accuracy"
        A scorer that takes ``sample_weight``; None for the estimator's own score.
    fit_weights : bool, default False
        Whether to fit with the weights too; in a pipeline the last step gets them.

    Returns
    -------
    array, shape (folds,)
        One score for each fold.

    Raises
    ------
    ValueError
        Where weights are negative, not finite or not one for each row, or all 0 in a fold.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(300, 1))
    >>> y = X[:, 0] + rng.normal(size=300) > 0
    >>> far = np.abs(X[:, 0])
    >>> plain, weighted = (
    ...     importance_weighted_cross_val_score(LogisticRegression(), X, y, weights=w).mean()
    ...     for w in (np.ones(300), far)
    ... )
    >>> bool(weighted > plain)
    True
    """
    weights = _checked_weights(weights)
    if len(weights) != _num_samples(X):
        raise ValueError(
            f"weights must be one for each of the {_num_samples(X)} rows, got {len(weights)}"
        )
    score = check_scoring(estimator, scoring=scoring)
    weight_name = "sample_weight"
    if isinstance(estimator, Pipeline):
        weight_name = f"{estimator.steps[-1][0]}__sample_weight"
    splitter = check_cv(cv, y, classifier=is_classifier(estimator))
    scores = []
    for train, validation in splitter.split(X, y):
        if not weights[validation].any():
            raise ValueError(f"weights of the {len(validation)} rows of a fold are all 0")
        fit_parameters = {weight_name: weights[train]} if fit_weights else {}
        model = clone(estimator)
        model.fit(_safe_indexing(X, train), _safe_indexing(y, train), **fit_parameters)
        scores.append(
            score(
                model,
                _safe_indexing(X, validation),
                _safe_indexing(y, validation),
                sample_weight=weights[validation],
            )
        )
    return np.array(scores, dtype=np.float64)


def _checked_weights(weights: ArrayLike) -> Float[np.ndarray, " n"]:
    given = np.asarray(weights)
    if given.ndim != 1 or given.dtype.kind not in "biuf":
        raise ValueError(
            "weights must be a list of numbers, one for each row, "
            f"got shape {given.shape} of type {given.dtype}"
        )
    checked = given.astype(np.float64)
    n_bad = int((~(np.isfinite(checked) & (checked >= 0))).sum())
    if n_bad:
        raise ValueError(
            f"weights must be finite and not negative, {n_bad} of {len(given)} are not"
        )
    if not checked.any():
        raise ValueError(f"weights must not be all zero, got {len(given)} zeros")
    return checked


def _number_of_draws(test_size: Any, n: int) -> int:
    if _is_integer(test_size):
        draws = int(test_size)
    elif isinstance(test_size, float | np.floating) and 0 < test_size < 1:
        draws = round(float(test_size) * n)
    else:
        raise ValueError(
            "test_size must be a number of draws, or a share between 0 and 1 of the rows, "
            f"got {test_size!r}"
        )
    if draws < 1:
        raise ValueError(f"test_size must give at least 1 of {n} rows, got {test_size!r}")
    if n == 1:
        raise ValueError("no training rows are left of a single row")
    return draws


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
