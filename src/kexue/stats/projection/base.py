"""What the three maps share: data at the door, a seed, and sums over blocks of columns.

Every map is a function of a seed and of the column: columns come in blocks of 1024, each drawn from
a Philox stream keyed by seed and block. So a chunk of columns, or a tensor on any device, meets the
same numbers as the whole array.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any

import array_api_compat
import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from kexue._precision import without_autocast
from kexue.stats.projection.bounds import (
    _components,
    _epsilon,
    _probability,
    johnson_lindenstrauss_min_dim,
)

__all__: list[str] = []

_BLOCK = 1024
_FLOATS = (np.float64, np.float32)
# From this density on, a dense product is faster than a sparse one in any precision.
_DENSE_FROM = 1 / 32
# A sparse product is faster where its result stays in a cache.
_ROWS_AT_ONCE = 256


class _RandomProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the maps share: dimension, seed, the doors for data, and sums over column blocks."""

    n_components: Any
    eps: Any
    failure_probability: Any
    random_state: Any
    n_components_: int
    n_features_in_: int
    _kept: Any

    def fit(self, X: Any, y: Any = None) -> Any:
        """Choose dimension and map for data of the shape of ``X``; its values play no part.

        Parameters
        ----------
        X : array, sparse matrix or torch tensor (n_samples, n_features)
            Data.
        y : None
            Ignored.

        Returns
        -------
        self
        """
        if array_api_compat.is_torch_array(X):
            _check_tensor(X)
            if X.ndim != 2:
                raise ValueError(f"X must be a matrix to fit, got shape {tuple(X.shape)}")
            self.__dict__.pop("feature_names_in_", None)
        else:
            X = validate_data(self, X, accept_sparse=("csr", "csc"), dtype=_FLOATS)
        return self._fit(*X.shape)

    def fit_shape(self, n_samples: int, n_features: int) -> Any:
        """Choose dimension and map for data of a given shape, without the data.

        Parameters
        ----------
        n_samples, n_features : int
            Shape of the data to come, both at least 1. ``n_samples`` matters only where the
            dimension is "auto".

        Returns
        -------
        self
        """
        for name, value in (("n_samples", n_samples), ("n_features", n_features)):
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.__dict__.pop("feature_names_in_", None)
        return self._fit(int(n_samples), int(n_features))

    @without_autocast
    def transform(self, X: Any) -> Any:
        """Project.

        Parameters
        ----------
        X : array, sparse matrix or torch tensor (n_samples, n_features)
            Data. A tensor may have any leading dimensions.

        Returns
        -------
        array or torch tensor (n_samples, n_components)
            Dense, of the floating type of ``X``; a tensor on the same device, differentiable.
        """
        check_is_fitted(self)
        if array_api_compat.is_torch_array(X):
            _check_tensor(X)
            if X.shape[-1] != self.n_features_in_:
                raise ValueError(
                    f"X has {X.shape[-1]} features, but {type(self).__name__} is expecting "
                    f"{self.n_features_in_} features as input."
                )
            return self._project_tensor(X, 0)
        X = validate_data(self, X, accept_sparse=("csr", "csc"), dtype=_FLOATS, reset=False)
        return self._project(X, 0)

    @without_autocast
    def transform_columns(self, X: Any, start: int) -> Any:
        """Project some of the columns: the sum over all chunks is `transform` of the whole.

        No more of the matrix than a block of 1024 columns is drawn at a time.

        Parameters
        ----------
        X : array, sparse matrix or torch tensor (n_samples, n_columns)
            Columns ``start`` to ``start + n_columns`` of the data.
        start : int
            Index of the first of them.

        Returns
        -------
        array or torch tensor (n_samples, n_components)
            Their contribution.
        """
        check_is_fitted(self)
        tensor = array_api_compat.is_torch_array(X)
        if tensor:
            _check_tensor(X)
        else:
            X = check_array(X, accept_sparse=("csr", "csc"), dtype=_FLOATS)
        if not _is_integer(start) or not 0 <= start <= self.n_features_in_ - X.shape[-1]:
            raise ValueError(
                f"columns start : start + {X.shape[-1]} must lie within 0 : "
                f"{self.n_features_in_}, got start = {start!r}"
            )
        return self._project_tensor(X, int(start)) if tensor else self._project(X, int(start))

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _fit(self, n_samples: int, n_features: int) -> Any:
        if _epsilon(self.eps).ndim:
            raise ValueError(f"eps must be a single number, got {self.eps!r}")
        if self.failure_probability is not None:
            _probability(self.failure_probability)
        automatic = isinstance(self.n_components, str) and self.n_components == "auto"
        if not automatic and not (_is_integer(self.n_components) and self.n_components >= 1):
            raise ValueError(
                f'n_components must be "auto" or an integer of at least 1, '
                f"got {self.n_components!r}"
            )
        n_components = (
            self._automatic_dimension(n_samples, n_features)
            if automatic
            else _components(self.n_components)
        )
        self._check(n_components, n_features)
        self.n_features_in_ = n_features
        self.n_components_ = n_components
        self._seed = int(check_random_state(self.random_state).randint(2**63 - 1, dtype=np.int64))
        self._prepare()
        return self

    def _automatic_dimension(self, n_samples: int, n_features: int) -> int:
        n_components = johnson_lindenstrauss_min_dim(
            n_samples, eps=self.eps, failure_probability=self.failure_probability
        )
        if n_components > n_features:
            raise ValueError(
                f"eps={self.eps} and n_samples={n_samples} lead to a target dimension of "
                f"{n_components} which is larger than the original space with "
                f"n_features={n_features}"
            )
        return int(n_components)

    def _check(self, n_components: int, n_features: int) -> None:
        """Refuse what this kind of map cannot be."""

    def _prepare(self) -> None:
        """Draw what is kept."""
        raise NotImplementedError

    def _stream(self, block: int) -> np.random.Generator:
        key = np.array([self._seed, block], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _block(self, block: int) -> Any:
        """Rows of the transposed matrix that belong to a block of columns."""
        raise NotImplementedError

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Any]]:
        """Transposed matrix for columns start : stop, block by block, and where each belongs."""
        for first in range(start - start % _BLOCK, stop, _BLOCK):
            low, high = max(first, start), min(first + _BLOCK, stop)
            if self._kept is None:
                rows = self._block(first // _BLOCK)[low - first : high - first]
            else:
                rows = self._kept[low:high]
            yield low - start, high - start, rows

    def _project(self, X: Any, start: int) -> np.ndarray:
        X = X.tocsc() if sp.issparse(X) else X
        Z = np.zeros((X.shape[0], self.n_components_), dtype=X.dtype)
        for low, high, rows in self._pieces(start, start + X.shape[1]):
            Z += _product(X[:, low:high], rows.astype(X.dtype, copy=False))
        return Z

    def _project_tensor(self, X: Any, start: int) -> Any:
        import torch

        working, given = _precisions(X)
        X = X.to(working)
        Z = X.new_zeros((*X.shape[:-1], self.n_components_))
        for low, high, rows in self._pieces(start, start + X.shape[-1]):
            dense = rows.toarray() if sp.issparse(rows) else rows
            Z = Z + X[..., low:high] @ torch.as_tensor(dense, dtype=working, device=X.device)
        return Z.to(given)


def _product(X: Any, rows: Any) -> np.ndarray:
    """The dense product of two matrices, each of them dense or sparse."""
    if sp.issparse(rows) and rows.nnz >= _DENSE_FROM * math.prod(rows.shape):
        rows = rows.toarray()
    if sp.issparse(X) and sp.issparse(rows):
        return (X @ rows).toarray()
    if sp.issparse(rows):
        starts = range(0, len(X), _ROWS_AT_ONCE)
        return np.concatenate([X[start : start + _ROWS_AT_ONCE] @ rows for start in starts])
    return X @ rows


def _check_tensor(X: Any) -> None:
    import torch

    if X.layout != torch.strided:
        raise TypeError(f"X must be a dense tensor, got one of layout {X.layout}")
    if X.is_complex():
        raise TypeError(f"X must hold real numbers, got a tensor of {X.dtype}")
    if X.ndim < 1:
        raise ValueError("X must have features along its last axis, got a scalar")


def _precisions(X: Any) -> tuple[Any, Any]:
    """Type to compute in, type of the result."""
    import torch

    given = X.dtype if X.is_floating_point() else torch.float64
    return (torch.float32 if given.itemsize < 4 else given), given


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
