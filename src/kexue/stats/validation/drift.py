"""Whether train and test differ, by how much, and in which columns."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.utils import _safe_indexing, check_random_state

from kexue.stats.validation.discriminator import TrainTestDiscriminator, _auc, _log_odds
from kexue.stats.validation.rows import Rows, _as_rows, _has_columns, _is_frame, _join

__all__ = ["DriftReport", "drift_report"]


# Arrays have no single answer to "equal", so reports are compared by identity.
@dataclass(frozen=True, eq=False)
class DriftReport:
    """What tells the test rows from the training rows.

    Attributes
    ----------
    auc : float
        Mean out-of-fold AUC of the discriminator; 1/2 without drift.
    p_value : float
        One-sided, approximate: how often such an AUC comes from equal distributions.
    effective_sample_fraction : float
        Share of the training rows that weighting leaves, (Σw)²/(n Σw²).
    feature_names : tuple of str
        Names of the columns.
    feature_auc : array, shape (features,)
        Of each column alone: how often a test row has the larger value. NaN where not numeric.
    feature_importance : array, shape (features,)
        Of each column among the others: what the AUC loses when the held-out column is shuffled.
    discriminator : TrainTestDiscriminator
        Fitted; its ``weights_`` make up for the drift.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> report = drift_report(rng.normal(size=(200, 2)), rng.normal(size=(200, 2)), random_state=0)
    >>> report.feature_names
    ('x0', 'x1')
    """

    auc: float
    p_value: float
    effective_sample_fraction: float
    feature_names: tuple[str, ...]
    feature_auc: Float[np.ndarray, " features"]
    feature_importance: Float[np.ndarray, " features"]
    discriminator: TrainTestDiscriminator


def drift_report(
    X_train: Rows,
    X_test: Rows,
    *,
    estimator: Any = None,
    cv: Any = 5,
    feature_names: Sequence[str] | None = None,
    n_repeats: int = 3,
    random_state: Any = None,
) -> DriftReport:
    """Say whether train and test differ, and which columns give it away.

    Parameters
    ----------
    X_train, X_test : arrays, shapes (n_train, features) and (n_test, features)
        Or DataFrames with the same columns. Sparse matrices and texts have no columns to look at:
        their reports have no features.
    estimator, cv : optional
        As in `TrainTestDiscriminator`.
    feature_names : sequence of str, optional
        By default the DataFrame's columns, or x0, x1, …
    n_repeats : int, default 3
        Shuffles of each column in each fold; the cost is that of ``cv * features * n_repeats``
        predictions of a fold.
    random_state : int, RandomState or None, default None
        Decides folds and shuffles.

    Returns
    -------
    DriftReport
        AUC, p-value, and both measures of each column.

    Raises
    ------
    ValueError
        Where `TrainTestDiscriminator` raises it, or names are not one for each column, or
        ``n_repeats`` is below 1.
    TypeError
        Where `TrainTestDiscriminator` raises it.

    Examples
    --------
    The second column moved, the first did not:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> train, test = rng.normal(0, 1, (500, 2)), rng.normal([0, 1], 1, (500, 2))
    >>> report = drift_report(train, test, feature_names=["age", "income"], random_state=0)
    >>> report.feature_names[report.feature_importance.argmax()], report.p_value < 0.001
    ('income', True)
    """
    if not isinstance(n_repeats, numbers.Integral) or n_repeats < 1:
        raise ValueError(f"n_repeats must be an integer of at least 1, got {n_repeats!r}")
    names = _names(_as_rows(X_train, "X_train"), feature_names)
    discriminator = TrainTestDiscriminator(estimator, cv=cv, random_state=random_state)
    discriminator.fit(X_train, X_test)
    rows, domain = _join(X_train, X_test)
    shuffled = _importance(
        discriminator, rows, domain, len(names), n_repeats, check_random_state(random_state)
    )
    return DriftReport(
        auc=discriminator.auc_,
        p_value=discriminator.p_value_,
        effective_sample_fraction=discriminator.effective_sample_size_ / int((domain == 0).sum()),
        feature_names=names,
        feature_auc=np.array([_column_auc(rows, j, domain) for j in range(len(names))]),
        feature_importance=shuffled,
        discriminator=discriminator,
    )


def _names(rows: Rows, given: Sequence[str] | None) -> tuple[str, ...]:
    if not _has_columns(rows):
        if given is not None:
            raise ValueError(
                "feature_names must be None for texts and sparse matrices, whose columns are not "
                f"looked at; got {len(given)} names"
            )
        return ()
    n_columns = rows.shape[1]
    if given is None:
        return tuple(map(str, rows.columns if _is_frame(rows) else _numbered(n_columns)))
    if isinstance(given, str) or len(given) != n_columns:
        raise ValueError(
            f"feature_names must be one for each of the {n_columns} columns, got {given!r}"
        )
    return tuple(map(str, given))


def _numbered(n_columns: int) -> list[str]:
    return [f"x{j}" for j in range(n_columns)]


def _column_auc(rows: Rows, j: int, domain: np.ndarray) -> float:
    """AUC of one column where it is known; NaN for words, and where a set has no number."""
    column = _numeric(rows.iloc[:, j] if _is_frame(rows) else rows[:, j])
    if column is None:
        return float("nan")
    known = ~np.isnan(column)
    if len(np.unique(domain[known])) < 2:
        return float("nan")
    return _auc(column[known], domain[known])


def _numeric(column: Any) -> np.ndarray | None:
    if column.dtype.kind == "O" and not all(
        value is None or isinstance(value, numbers.Real) for value in column
    ):
        return None
    if column.dtype.kind not in "biufO":
        return None
    if _is_frame(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return column.astype(np.float64)


def _importance(
    discriminator: TrainTestDiscriminator,
    rows: Rows,
    domain: np.ndarray,
    n_columns: int,
    n_repeats: int,
    random: np.random.RandomState,
) -> Float[np.ndarray, " features"]:
    """Mean loss of held-out AUC per shuffled column, over folds and shuffles."""
    loss = np.zeros(n_columns)
    if n_columns == 0:
        return loss
    folds = zip(
        discriminator.folds_, discriminator.estimators_, discriminator.fold_auc_, strict=True
    )
    for (_, held_out), model, fold_auc in folds:
        shown, is_test = _safe_indexing(rows, held_out), domain[held_out]
        for j in range(n_columns):
            for _ in range(n_repeats):
                order = random.permutation(len(held_out))
                loss[j] += fold_auc - _auc(_log_odds(model, _shuffled(shown, j, order)), is_test)
    return loss / (len(discriminator.folds_) * n_repeats)


def _shuffled(rows: Rows, j: int, order: np.ndarray) -> Rows:
    """The same table with one column in another order."""
    if _is_frame(rows):
        changed = rows.copy(deep=False)
        changed.isetitem(j, rows.iloc[order, j].array)
    else:
        changed = rows.copy()
        changed[:, j] = rows[order, j]
    return changed
