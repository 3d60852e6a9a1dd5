"""Three random maps as scikit-learn transformers, for arrays, sparse matrices and tensors.

Every map is a function of a seed and of the column: columns come in blocks of 1024, each drawn from
a Philox stream keyed by seed and block. So a chunk of columns, or a tensor on any device, meets the
same numbers as the whole array.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any, no_type_check

import array_api_compat
import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from kexue.stats.projection.bounds import (
    _components,
    _epsilon,
    _probability,
    johnson_lindenstrauss_min_dim,
)
from kexue.stats.projection.hadamard import _transform

__all__ = ["GaussianRandomProjection", "HadamardRandomProjection", "SparseRandomProjection"]

_BLOCK = 1024
_KEPT_BYTES = 64 * 2**20
# Rows that are transformed together: few enough to stay in a cache, which is faster, too.
_ROW_BLOCK_BYTES = 4 * 2**20
# The stream of what belongs to no block of columns.
_NO_BLOCK = 2**64 - 1


class _RandomProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the maps share: dimension, seed, the doors for data, and sums over column blocks."""

    n_components: Any
    eps: Any
    failure_probability: Any
    random_state: Any
    n_components_: int
    n_features_in_: int

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
        """Transposed matrix for columns start : stop, piece by piece, and where each belongs."""
        kept = getattr(self, "_kept", None)
        if kept is not None:
            yield 0, stop - start, kept[start:stop]
            return
        for first in range(start - start % _BLOCK, stop, _BLOCK):
            low, high = max(first, start), min(first + _BLOCK, stop)
            yield (
                low - start,
                high - start,
                self._block(first // _BLOCK)[low - first : high - first],
            )

    def _project(self, X: Any, start: int) -> np.ndarray:
        X = X.tocsc() if sp.issparse(X) and getattr(self, "_kept", None) is None else X
        Z = np.zeros((X.shape[0], self.n_components_), dtype=X.dtype)
        for low, high, rows in self._pieces(start, start + X.shape[1]):
            piece = X[:, low:high] @ rows.astype(X.dtype, copy=False)
            Z += piece.toarray() if sp.issparse(piece) else piece
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


class GaussianRandomProjection(_RandomProjection):
    """Projection with independent normal entries of variance 1/n: the map of the exact bound.

    Parameters
    ----------
    n_components : int or "auto"
        Dimension n after the projection; "auto" is `johnson_lindenstrauss_min_dim` of the number
        of samples, for distances.
    eps : float
        Allowed error of squared distances, in (0, 1); for "auto".
    failure_probability : float, optional
        Chance that some distance exceeds it, in (0, 1); for "auto".
    random_state : int, RandomState or None
        Decides the map; None draws another one in each fit.

    Attributes
    ----------
    n_components_, n_features_in_ : int
        Dimensions after and before.
    components_ : array (n_components, n_features)
        The matrix. Beyond 64 MB it is drawn anew whenever it is used.
    feature_names_in_ : array
        Names of the features, if the data had any.

    Raises
    ------
    ValueError
        On fitting, if a parameter is not as described, or "auto" leads to more dimensions than
        there are features. On use, if the data does not match.
    sklearn.exceptions.NotFittedError
        On use before fitting.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((100, 5000))
    >>> projection = GaussianRandomProjection(eps=0.5, random_state=0)
    >>> projection.fit_transform(X).shape
    (100, 222)
    """

    # Checked in `fit`, as scikit-learn wants it: a constructor takes and keeps anything.
    @no_type_check
    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        eps: float = 0.1,
        failure_probability: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.eps = eps
        self.failure_probability = failure_probability
        self.random_state = random_state

    @property
    def components_(self) -> Float[np.ndarray, "n_components n_features"]:
        check_is_fitted(self)
        return np.concatenate([rows for _, _, rows in self._pieces(0, self.n_features_in_)]).T

    def _prepare(self) -> None:
        self._kept = None
        if 8 * self.n_features_in_ * self.n_components_ <= _KEPT_BYTES:
            self._kept = self.components_.T

    def _block(self, block: int) -> np.ndarray:
        # Columns follow each other in the stream, so that the last block may be cut short.
        width = min(_BLOCK, self.n_features_in_ - block * _BLOCK)
        rows = self._stream(block).standard_normal((width, self.n_components_))
        rows /= math.sqrt(self.n_components_)
        return rows


class SparseRandomProjection(_RandomProjection):
    r"""Projection with independent entries :math:`\pm 1/\sqrt{ns}`, of which a share s is not zero.

    From s = 1/3 on, the bounds for normal entries (all but "exact") hold as well. Much sparser maps
    are fast and fail on peaked data, such as one-hot rows and text: "auto" is for dense data.

    Parameters
    ----------
    n_components : int or "auto"
        Dimension n after the projection; "auto" is `johnson_lindenstrauss_min_dim` of the number
        of samples, for distances.
    density : float or "auto"
        s in (0, 1]; "auto" is 1/√n_features.
    eps : float
        Allowed error of squared distances, in (0, 1); for "auto".
    failure_probability : float, optional
        Chance that some distance exceeds it, in (0, 1); for "auto".
    random_state : int, RandomState or None
        Decides the map; None draws another one in each fit.

    Attributes
    ----------
    n_components_, n_features_in_ : int
        Dimensions after and before.
    density_ : float
        s.
    components_ : scipy.sparse.csc_array (n_components, n_features)
        The matrix. Beyond 64 MB it is drawn anew whenever it is used.
    feature_names_in_ : array
        Names of the features, if the data had any.

    Raises
    ------
    ValueError
        On fitting, if a parameter is not as described, or "auto" leads to more dimensions than
        there are features. On use, if the data does not match.
    sklearn.exceptions.NotFittedError
        On use before fitting.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((10, 400))
    >>> projection = SparseRandomProjection(50, random_state=0).fit(X)
    >>> projection.transform(X).shape, projection.density_
    ((10, 50), 0.05)
    """

    @no_type_check
    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        density: float | str = "auto",
        eps: float = 0.1,
        failure_probability: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.density = density
        self.eps = eps
        self.failure_probability = failure_probability
        self.random_state = random_state

    @property
    def components_(self) -> sp.csc_array:
        check_is_fitted(self)
        return sp.vstack([rows for _, _, rows in self._pieces(0, self.n_features_in_)]).T.tocsc()

    def _check(self, n_components: int, n_features: int) -> None:
        density = self.density
        if isinstance(density, str) and density == "auto":
            return
        number = isinstance(density, numbers.Real) and not isinstance(density, bool)
        if not number or not 0 < density <= 1:
            raise ValueError(f'density must be "auto" or a number in (0, 1], got {density!r}')

    def _prepare(self) -> None:
        automatic = isinstance(self.density, str)
        self.density_ = 1 / math.sqrt(self.n_features_in_) if automatic else float(self.density)
        self._kept = None
        if 12 * self.density_ * self.n_features_in_ * self.n_components_ <= _KEPT_BYTES:
            self._kept = self.components_.T.tocsr()

    def _block(self, block: int) -> sp.csr_array:
        n, stream = self.n_components_, self._stream(block)
        size = _BLOCK * n
        # Gaps between the non-zeros of independent entries are geometric.
        places = np.zeros(0, dtype=np.int64)
        last = -1
        while last < size:
            missing = (size - last) * self.density_
            gaps = stream.geometric(self.density_, int(missing + 4 * math.sqrt(missing)) + 16)
            places = np.concatenate([places, last + np.cumsum(gaps)])
            last = int(places[-1])
        places = places[places < size]
        signs = 1.0 - 2.0 * stream.integers(0, 2, len(places), dtype=np.int8)
        signs /= math.sqrt(n * self.density_)
        pointers = np.searchsorted(places, n * np.arange(_BLOCK + 1))
        width = min(_BLOCK, self.n_features_in_ - block * _BLOCK)
        return sp.csr_array(
            (signs, (places % n).astype(np.int32), pointers.astype(np.int32)), shape=(_BLOCK, n)
        )[:width]


class HadamardRandomProjection(_RandomProjection):
    r"""Subsampled randomised Hadamard transform :math:`\sqrt{m'/n}\,SHD`: no matrix, O(log m) each.

    D are random signs, H the orthonormal Walsh-Hadamard matrix of size :math:`m'`, the next power
    of two (columns are padded by zeros), S samples n coordinates without replacement; with
    :math:`n = m'` it keeps all distances.

    Parameters
    ----------
    n_components : int or "auto"
        Dimension n after the projection, at most m'; "auto" is `johnson_lindenstrauss_min_dim` of
        the number of samples, for distances. That is the law of normal entries, which this map
        follows in practice and not by a theorem.
    eps : float
        Allowed error of squared distances, in (0, 1); for "auto".
    failure_probability : float, optional
        Chance that some distance exceeds it, in (0, 1); for "auto".
    random_state : int, RandomState or None
        Decides the map; None draws another one in each fit.

    Attributes
    ----------
    n_components_, n_features_in_ : int
        Dimensions after and before.
    components_ : array (n_components, n_features)
        The matrix, computed when asked for.
    feature_names_in_ : array
        Names of the features, if the data had any.

    Raises
    ------
    ValueError
        On fitting, if a parameter is not as described, or "auto" leads to more dimensions than
        there are features. On use, if the data does not match.
    sklearn.exceptions.NotFittedError
        On use before fitting.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((10, 400))
    >>> Z = HadamardRandomProjection(512, random_state=0).fit_transform(X)
    >>> np.allclose(Z @ Z.T, X @ X.T)
    True
    """

    @no_type_check
    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        eps: float = 0.1,
        failure_probability: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.eps = eps
        self.failure_probability = failure_probability
        self.random_state = random_state

    @property
    def components_(self) -> Float[np.ndarray, "n_components n_features"]:
        check_is_fitted(self)
        spikes = np.zeros((self.n_components_, self._padded))
        spikes[np.arange(self.n_components_), self._rows] = 1 / math.sqrt(self.n_components_)
        return _transform(spikes, 1.0)[:, : self.n_features_in_] * self._signs

    def _check(self, n_components: int, n_features: int) -> None:
        padded = _next_power_of_two(n_features)
        if n_components > padded:
            raise ValueError(
                f"n_components must be at most {padded}, the power of two at or above "
                f"n_features={n_features}, got {n_components}"
            )

    def _prepare(self) -> None:
        blocks = range(-(-self.n_features_in_ // _BLOCK))
        signs = [self._stream(b).integers(0, 2, _BLOCK, dtype=np.int8) for b in blocks]
        self._signs = 1 - 2 * np.concatenate(signs)[: self.n_features_in_]
        self._padded = _next_power_of_two(self.n_features_in_)
        chosen = self._stream(_NO_BLOCK).choice(self._padded, self.n_components_, replace=False)
        self._rows = np.sort(chosen)

    def _project(self, X: Any, start: int) -> np.ndarray:
        X = X.tocsr() if sp.issparse(X) else X
        stop = start + X.shape[1]
        signs = self._signs[start:stop].astype(X.dtype)
        Z = np.empty((X.shape[0], self.n_components_), dtype=X.dtype)
        step = self._row_step(X.dtype.itemsize)
        padded = np.zeros((min(step, X.shape[0]), self._padded), dtype=X.dtype)
        for first in range(0, X.shape[0], step):
            rows = X[first : first + step]
            rows = rows.toarray() if sp.issparse(rows) else rows
            here = padded[: len(rows)]
            np.multiply(rows, signs, out=here[:, start:stop])
            # The orthonormal H has 1/√m', which √(m'/n) turns into 1/√n.
            turned = _transform(here, 1 / math.sqrt(self.n_components_))
            np.take(turned, self._rows, axis=1, out=Z[first : first + step])
        return Z

    def _project_tensor(self, X: Any, start: int) -> Any:
        import torch

        working, given = _precisions(X)
        signs = torch.as_tensor(
            self._signs[start : start + X.shape[-1]], dtype=working, device=X.device
        )
        chosen = torch.as_tensor(self._rows, device=X.device)
        flat = X.reshape(-1, X.shape[-1])
        padding = (start, self._padded - start - X.shape[-1])
        step = self._row_step(working.itemsize) if X.device.type == "cpu" else 2**14
        parts = [
            _transform(
                torch.nn.functional.pad(rows.to(working) * signs, padding),
                1 / math.sqrt(self.n_components_),
            ).index_select(-1, chosen)
            for rows in flat.split(step)
        ]
        return torch.cat(parts).reshape(*X.shape[:-1], self.n_components_).to(given)

    def _row_step(self, itemsize: int) -> int:
        return max(1, _ROW_BLOCK_BYTES // (itemsize * self._padded))


_FLOATS = (np.float64, np.float32)


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


def _next_power_of_two(m: int) -> int:
    return 1 << (m - 1).bit_length()
