"""Three random maps as scikit-learn transformers: normal entries, sparse signs, fast Hadamard."""

from __future__ import annotations

import math
import numbers
from typing import Any, no_type_check

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted

from kexue.stats.projection.base import _BLOCK, _precisions, _RandomProjection
from kexue.stats.projection.hadamard import _transform

__all__ = ["GaussianRandomProjection", "HadamardRandomProjection", "SparseRandomProjection"]

_KEPT_BYTES = 64 * 2**20
# Rows that are transformed together: few enough to stay in a cache, which is faster, too.
_ROW_BLOCK_BYTES = 4 * 2**20
# The stream of what belongs to no block of columns.
_NO_BLOCK = 2**64 - 1


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

    density: Any

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
        flat = X.reshape(math.prod(X.shape[:-1]), X.shape[-1])
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


def _next_power_of_two(m: int) -> int:
    return 1 << (m - 1).bit_length()
