"""Rows of any kind that a scikit-learn pipeline may take: arrays, frames, sparse matrices, text."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse

__all__: list[str] = []

Rows: TypeAlias = Any
"""2-D array, pandas DataFrame, scipy sparse matrix, or texts (list, 1-D array or Series)."""


class _Joined(NamedTuple):
    """Training rows, then test rows; the domain is 0 for the former and 1 for the latter."""

    rows: Rows
    domain: np.ndarray


def _join(X_train: Rows, X_test: Rows) -> _Joined:
    """One copy of both sets, in the kind they came in."""
    train, test = _as_rows(X_train, "X_train"), _as_rows(X_test, "X_test")
    if type(train) is not type(test) and not _are_both_sparse(train, test):
        raise TypeError(
            "X_train and X_test must be of the same kind, "
            f"got {type(train).__name__} and {type(test).__name__}"
        )
    _check_same_features(train, test)
    rows: Rows
    if isinstance(train, list):
        rows = train + test
    elif _is_frame(train):
        rows = sys.modules["pandas"].concat([train, test], ignore_index=True)
    elif scipy.sparse.issparse(train):
        rows = scipy.sparse.vstack([train, test], format="csr")
    else:
        rows = np.concatenate([train, test])
    return _Joined(rows, np.repeat([0, 1], [_n_rows(train), _n_rows(test)]))


def _as_rows(X: Rows, name: str) -> Rows:
    if scipy.sparse.issparse(X):
        return X.tocsr()
    if isinstance(X, list) and X and all(isinstance(text, str) for text in X):
        return X
    rows = X if _is_frame(X) else np.asarray(X)
    is_text = rows.ndim == 1 and getattr(rows.dtype, "kind", "O") in "OUT"
    if rows.ndim != 2 and not is_text:
        raise ValueError(
            f"{name} must have rows and columns, or be a list of texts; got shape {rows.shape}"
        )
    return rows


def _check_same_features(train: Rows, test: Rows) -> None:
    if isinstance(train, list):
        return
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            "X_train and X_test have different features: their rows have shapes "
            f"{train.shape[1:]} and {test.shape[1:]}"
        )
    if _is_frame(train) and train.ndim == 2 and list(train.columns) != list(test.columns):
        first = next(
            pair for pair in zip(train.columns, test.columns, strict=True) if pair[0] != pair[1]
        )
        raise ValueError(
            "X_train and X_test have different features, or in another order: where one has "
            f"column {first[0]!r}, the other has {first[1]!r}"
        )


def _is_frame(X: Rows) -> bool:
    """Whether this is a pandas DataFrame or Series."""
    return hasattr(X, "iloc")


def _are_both_sparse(train: Rows, test: Rows) -> bool:
    return scipy.sparse.issparse(train) and scipy.sparse.issparse(test)


def _n_rows(X: Rows) -> int:
    return len(X) if isinstance(X, list) else X.shape[0]


def _has_columns(X: Rows) -> bool:
    """Whether columns can be looked at one by one: a dense table."""
    return not isinstance(X, list) and not scipy.sparse.issparse(X) and X.ndim == 2
