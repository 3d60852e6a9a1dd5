"""What the closed form needs of the data: class counts, class means, one pooled scatter."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from numbers import Real as RealNumber
from typing import Any, Literal, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array
from jaxtyping import Float, Integer, Real
from scipy.sparse import csc_array

from kexue.stats.logistic.softmax import _check_kind, _nonzero

__all__ = ["ClassMoments"]

Array: TypeAlias = Any  # numpy or torch
Shrinkage: TypeAlias = float | Literal["oas"] | None

# Numbers in one block of rows: what is centred at a time should stay near the processor, or
# keep an accelerator busy; merging two blocks should cost little beside their rows.
_BLOCK_CPU = 1 << 21
_BLOCK_ACCELERATOR = 1 << 25
_LEAST_ROWS = 2048


@dataclass(frozen=True)
class ClassMoments:
    """Count, mean and pooled scatter of classes: all that the closed form needs of the data.

    Moments of two batches merge into those of both together, to rounding, in any order; the rows
    may then be forgotten. Sums are kept in float64 and around the class means, so that a large
    offset of the features costs no digits.

    Attributes
    ----------
    count : array, shape (classes,)
        Sum of the sample weights.
    mean : array, shape (classes, features)
        Class means, zero for a class without samples.
    scatter : array, shape (features, features)
        Sum over samples of weight times the outer product of the deviation from the class mean.

    Raises
    ------
    ValueError
        If the three shapes do not belong together.

    Examples
    --------
    Two shards, then a linear head on their features:

    >>> import numpy as np
    >>> from kexue.stats.logistic import closed_form_softmax
    >>> X = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 2.0], [2.0, 4.0]])
    >>> y = np.array([0, 0, 0, 1, 1, 1])
    >>> first = ClassMoments.from_data(X[:4], y[:4], n_classes=2)
    >>> moments = first.merge(ClassMoments.from_data(X[4:], y[4:], n_classes=2))
    >>> moments.covariance() * 9
    array([[ 2. , -1.5],
           [-1.5,  5. ]])
    >>> head = closed_form_softmax(moments.mean, moments.covariance(), moments.count / 6)
    >>> np.round((head.weight[1] - head.weight[0]) * 31)
    array([486., 276.])
    """

    count: Float[Array, " classes"]
    mean: Float[Array, "classes features"]
    scatter: Float[Array, "features features"]

    def __post_init__(self) -> None:
        shapes = tuple(self.count.shape), tuple(self.mean.shape), tuple(self.scatter.shape)
        classes, features = shapes[1] if len(shapes[1]) == 2 else (None, None)
        if shapes != ((classes,), (classes, features), (features, features)):
            raise ValueError(
                "count, mean and scatter must have shapes (classes,), (classes, features) and "
                f"(features, features), got {shapes[0]}, {shapes[1]} and {shapes[2]}"
            )

    @classmethod
    def from_data(
        cls,
        X: Real[Array, "samples features"],
        y: Integer[Array, " samples"],
        *,
        n_classes: int,
        sample_weight: Real[Array, " samples"] | None = None,
    ) -> ClassMoments:
        """Return the moments of one batch; differentiable in ``X`` for torch.

        Parameters
        ----------
        X : array, shape (samples, features)
            Features, numpy or torch on any device. Summed up in float64, whatever the dtype.
        y : array of integers, shape (samples,)
            Classes, 0 to ``n_classes - 1``.
        n_classes : int
            Number of classes, with those that do not occur in this batch.
        sample_weight : array, shape (samples,), optional
            Non-negative weights: weight ``w`` counts like ``w`` repetitions. All 1 by default.

        Returns
        -------
        ClassMoments
            float64, on the device of ``X``.

        Raises
        ------
        TypeError
            If an argument is of another kind.
        ValueError
            If shapes do not match, a number is not finite, a class is outside
            ``0..n_classes - 1`` or a weight is negative.

        Examples
        --------
        >>> import numpy as np
        >>> X, y = np.array([[1.0], [3.0], [5.0]]), np.array([0, 0, 2])
        >>> ClassMoments.from_data(X, y, n_classes=3)
        ClassMoments(count=array([2., 0., 1.]), mean=array([[2.], [0.], [5.]]),
            scatter=array([[2.]]))
        """
        _check_batch(X, y, n_classes, sample_weight)
        xp = array_namespace(X)
        return _moments(X, xp.astype(y, xp.int64, copy=False), sample_weight, n_classes)

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Return the moments of both sets of samples together.

        Parameters
        ----------
        other : ClassMoments
            Moments of further samples, with the same classes and features.

        Returns
        -------
        ClassMoments
            What `from_data` would give for all samples, to rounding.

        Raises
        ------
        TypeError
            If ``other`` is no `ClassMoments`, or of another kind of array.
        ValueError
            If numbers of classes or features differ.

        Examples
        --------
        >>> import numpy as np
        >>> one = ClassMoments.from_data(np.array([[1.0]]), np.array([0]), n_classes=1)
        >>> two = ClassMoments.from_data(np.array([[3.0]]), np.array([0]), n_classes=1)
        >>> one.merge(two)
        ClassMoments(count=array([2.]), mean=array([[2.]]), scatter=array([[2.]]))
        """
        if not isinstance(other, ClassMoments):
            raise TypeError(f"other must be ClassMoments, got {type(other).__name__}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                "merged moments must have the same (classes, features), "
                f"got {tuple(self.mean.shape)} and {tuple(other.mean.shape)}"
            )
        xp = array_namespace(self.mean, other.mean)
        count = self.count + other.count
        share = other.count / _nonzero(xp, count)
        delta = other.mean - self.mean
        between = self.count * share
        # A class that only one side has seen adds nothing between the two.
        shift = (xp.sqrt(between)[:, None] * delta)[between > 0]
        return ClassMoments(
            count,
            self.mean + share[:, None] * delta,
            self.scatter + other.scatter + shift.T @ shift,
        )

    def covariance(self, *, shrinkage: Shrinkage = None) -> Float[Array, "features features"]:
        r"""Return the covariance within classes, with divisor N, shrunk if asked for.

        Parameters
        ----------
        shrinkage : None, float or "oas"
            A float ``s`` gives :math:`(1-s)\Sigma + s\,\mathrm{tr}(\Sigma)/d\;I` in the units of
            the features. ``"oas"`` shrinks the correlations towards 0 instead, by as much as the
            oracle approximating estimator finds right, so that units do not matter; it needs
            second moments only.

        Returns
        -------
        array, shape (features, features)
            Symmetric, float64.

        Raises
        ------
        ValueError
            If ``shrinkage`` is anything else, or there are no samples.

        Examples
        --------
        >>> import numpy as np
        >>> X, y = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]), np.array([0, 0, 0])
        >>> ClassMoments.from_data(X, y, n_classes=1).covariance(shrinkage=1.0)
        array([[1.33333333, 0.        ], [0.        , 1.33333333]])
        """
        _check_shrinkage(shrinkage)
        xp = array_namespace(self.scatter)
        n = xp.sum(self.count)
        if not n > 0:
            raise ValueError("the covariance needs samples of positive weight, got none")
        sigma = self.scatter / n
        if shrinkage is None:
            return sigma
        if shrinkage == "oas":
            return _oas(xp, sigma, n, _live(xp, sigma, self.mean))
        d = sigma.shape[0]
        identity = xp.eye(d, dtype=sigma.dtype, device=sigma.device)
        return (1 - shrinkage) * sigma + shrinkage * xp.linalg.trace(sigma) / d * identity


def _moments(X: Array, y: Array, weight: Array | None, n_classes: int) -> ClassMoments:
    """Merge the moments of blocks of rows: the data are read once, only a block is centred."""
    n, d = X.shape
    on_cpu = is_numpy_array(X) or X.device.type == "cpu"
    numbers = _BLOCK_CPU if on_cpu else _BLOCK_ACCELERATOR
    rows = max(numbers // max(d, 1), _LEAST_ROWS, 2 * n_classes)
    blocks = [slice(start, start + rows) for start in range(0, max(n, 1), rows)]
    return functools.reduce(
        ClassMoments.merge,
        (_block(X[b], y[b], None if weight is None else weight[b], n_classes) for b in blocks),
    )


def _block(X: Array, y: Array, weight: Array | None, n_classes: int) -> ClassMoments:
    xp = array_namespace(X)
    x = xp.astype(X, xp.float64, copy=False)
    w = None if weight is None else xp.astype(weight, xp.float64, copy=False)
    ones = xp.ones((x.shape[0], 1), dtype=x.dtype, device=x.device)
    count = _class_sums(ones, y, w, n_classes)[:, 0]
    divisor = _nonzero(xp, count)[:, None]
    mean = _class_sums(x, y, w, n_classes) / divisor
    residual = x - mean[y]
    # What rounding left in the mean is found in the residuals, where it is no longer hidden.
    slip = _class_sums(residual, y, w, n_classes) / divisor
    if w is not None:
        residual = xp.sqrt(w)[:, None] * residual
    excess = xp.sqrt(count)[:, None] * slip
    return ClassMoments(count, mean + slip, residual.T @ residual - excess.T @ excess)


def _class_sums(x: Array, y: Array, weight: Array | None, n_classes: int) -> Array:
    if is_torch_array(x):
        x = x if weight is None else weight[:, None] * x
        return x.new_zeros((n_classes, x.shape[1])).index_add(0, y, x)
    n = len(y)
    weight = np.ones(n) if weight is None else weight
    return csc_array((weight, y, np.arange(n + 1)), shape=(n_classes, n)) @ x


def _live(xp: Any, sigma: Array, mean: Array) -> Array:
    """Which features vary within classes by more than the rounding of their means."""
    noise = 10 * xp.finfo(sigma.dtype).eps * xp.max(xp.abs(mean), axis=0)
    return xp.linalg.diagonal(sigma) > noise**2


def _oas(xp: Any, sigma: Array, n: Array, live: Array) -> Array:
    variance = xp.where(live, xp.linalg.diagonal(sigma), xp.ones_like(sigma[0]))
    deviation = xp.sqrt(variance)
    both = live[:, None] & live[None, :]
    scale = deviation[:, None] * deviation[None, :]
    R = xp.where(both, sigma / scale, xp.zeros_like(sigma))
    p = max(int(xp.count_nonzero(live)), 1)
    alpha = xp.sum(R**2) / p**2
    excess = (n + 1) * (alpha - 1 / p)
    # Uncorrelated features leave nothing to shrink: alpha = 1/p, and R = I already.
    s = xp.clip((alpha + 1) / excess, 0, 1) if excess > 0 else 1.0
    identity = xp.eye(sigma.shape[0], dtype=sigma.dtype, device=sigma.device)
    return ((1 - s) * R + s * xp.where(both, identity, R)) * scale


def _check_shrinkage(shrinkage: Any) -> None:
    if shrinkage is None or (isinstance(shrinkage, str) and shrinkage == "oas"):
        return
    number = isinstance(shrinkage, RealNumber) and not isinstance(shrinkage, bool | np.bool_)
    if not (number and 0 <= shrinkage <= 1):
        raise ValueError(f"shrinkage must be None, 'oas' or a float in [0, 1], got {shrinkage!r}")


def _check_batch(X: Any, y: Any, n_classes: Any, sample_weight: Any) -> None:
    xp = _check_kind("X", X, "real floating", "integral")
    _check_kind("y", y, "integral")
    if not isinstance(n_classes, int | np.integer) or n_classes < 1:
        raise ValueError(f"n_classes must be a positive integer, got {n_classes!r}")
    if X.ndim != 2 or tuple(y.shape) != (X.shape[0],):
        raise ValueError(
            "X and y must have shapes (samples, features) and (samples,), "
            f"got {tuple(X.shape)} and {tuple(y.shape)}"
        )
    if not xp.all(xp.isfinite(X)):
        raise ValueError("X must be finite, got NaN or infinity")
    if y.shape[0] and not 0 <= int(xp.min(y)) <= int(xp.max(y)) < n_classes:
        raise ValueError(
            f"y must hold classes 0 to {n_classes - 1}, got {int(xp.min(y))} to {int(xp.max(y))}"
        )
    if sample_weight is not None:
        _check_kind("sample_weight", sample_weight, "real floating", "integral")
        _check_weight(xp, sample_weight, X.shape[0])


def _check_weight(xp: Any, weight: Any, n: int) -> None:
    if tuple(weight.shape) != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), got {tuple(weight.shape)}")
    if not xp.all((weight >= 0) & xp.isfinite(weight)):
        raise ValueError("sample_weight must be finite and non-negative, got negative or NaN")
