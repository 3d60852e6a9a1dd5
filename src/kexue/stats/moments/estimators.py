"""Moments of an array along any of its axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.moments.samples import (
    CORRECTIONS,
    WEIGHT_TYPES,
    Array,
    Axis,
    Numbers,
    _as_tensor,
    _axes,
    _check_count,
    _check_divisor,
    _check_weights,
    _choice,
    _correction,
    _given_back,
    _integer,
    _order,
    _weight_tensor,
    _weights_for,
)
from kexue.stats.moments.sums import (
    _central_sums,
    _comoments,
    _cumulant_of,
    _moment_of,
    _or_one,
    _reference,
    _root,
    _Sums,
)

__all__ = [
    "c4",
    "central_moment",
    "covariance",
    "cumulant",
    "mean",
    "standard_deviation",
    "variance",
]


def mean(
    x: Real[Array, "..."] | Numbers,
    *,
    axis: Axis = None,
    weights: Real[Array, "..."] | Numbers | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Return the mean, which is unbiased whatever the law, summed in double precision.

    Parameters
    ----------
    x : array
        Samples. NaN propagates, as in numpy.
    axis : int, tuple of int or None
        Axes along which the samples lie; all by default.
    weights : array, optional
        Weights, in the shape of x or (n,) along a single axis.
    keepdims : bool
        Whether reduced axes stay, with length 1.

    Returns
    -------
    array
        The mean, in the precision of x; float64 for integers.

    Raises
    ------
    ValueError
        Where there are no samples, or weights are negative, all zero or of another shape.
    TypeError
        Where x is complex or no array of numbers, or x and weights are of two libraries.

    Examples
    --------
    >>> import numpy as np
    >>> mean(np.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
    array([2., 4.])
    >>> mean(np.array([1.0, 4.0]), weights=np.array([2, 1]))
    np.float64(2.0)
    """
    if weights is None:
        values, dims = _values(x, axis)
        return _result(torch.mean(values, dims, True, dtype=torch.float64), x, axis, keepdims)
    sums, reference, _ = _sums(x, axis, 1, weights)
    return _result(reference + sums.mean, x, axis, keepdims)


def variance(
    x: Real[Array, "..."] | Numbers,
    *,
    axis: Axis = None,
    correction: float = 1,
    weights: Real[Array, "..."] | Numbers | None = None,
    weight_type: str = "frequency",
    keepdims: bool = False,
) -> Float[Array, "..."]:
    r"""Return the variance, unbiased by default.

    The sum of squared deviations over :math:`n - \text{correction}`. 1 is unbiased where the mean
    is estimated from the same samples, 0 is the variance of the sample itself, and -1 has the least
    mean squared error for normal data.

    Parameters
    ----------
    x : array
        Samples. NaN propagates, as in numpy.
    axis : int, tuple of int or None
        Axes along which the samples lie; all by default.
    correction : float
        What is subtracted from n.
    weights : array, optional
        Weights w, in the shape of x or (n,) along a single axis.
    weight_type : {"frequency", "reliability"}
        Frequency: w copies of a sample, divisor :math:`\sum w - \text{correction}`. Reliability:
        variance in proportion to 1/w, divisor :math:`\sum w - \text{correction} \sum w^2/\sum w`;
        the scale of w does not matter.
    keepdims : bool
        Whether reduced axes stay, with length 1.

    Returns
    -------
    array
        The variance, in the precision of x; float64 for integers. Its gradient is 0 for constant
        data.

    Raises
    ------
    ValueError
        Where n is at most ``correction``, weights are negative, all zero or of another shape, or
        ``weight_type`` is unknown.
    TypeError
        Where x is complex or no array of numbers, or x and weights are of two libraries.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([2.0, 3, 5, 7, 11, 13, 17, 19])
    >>> variance(x, weights=np.array([1, 2, 3, 4, 4, 3, 2, 1])).round(12)
    np.float64(24.976315789474)
    """
    correction = _correction(correction)
    weight_type = _choice(weight_type, WEIGHT_TYPES, "weight_type")
    sums, _, n = _sums(x, axis, 2, weights, least=1)
    if weights is None:
        _check_divisor(n, correction)
        return _result(sums.powers[0] / (n - correction), x, axis, keepdims)
    values, dims = _values(x, axis)
    squares = _sum_of_squares(_weights_for(values, dims, weights, x), dims)
    divisor = _weighted_divisor(sums.n, squares, correction, weight_type)
    return _result(sums.powers[0] / divisor, x, axis, keepdims)


def standard_deviation(
    x: Real[Array, "..."] | Numbers,
    *,
    axis: Axis = None,
    correction: str = "c4",
    keepdims: bool = False,
) -> Float[Array, "..."]:
    r"""Return the standard deviation, unbiased for normal data by default.

    The root of an unbiased variance is biased low. For normal data
    :math:`E s = c_4(n)\,\sigma`, which ``"c4"`` divides out; for other laws that removes too
    much or too little: no estimator of the standard deviation is unbiased for all laws.

    Parameters
    ----------
    x : array
        Samples. NaN propagates, as in numpy.
    axis : int, tuple of int or None
        Axes along which the samples lie; all by default.
    correction : {"c4", "bessel", "none"}
        ``"bessel"`` is the root of the unbiased variance s², ``"c4"`` is s / c4(n), and ``"none"``
        has the divisor n.
    keepdims : bool
        Whether reduced axes stay, with length 1.

    Returns
    -------
    array
        The standard deviation, in the precision of x; float64 for integers. Its gradient is defined
        as 0 for constant data.

    Raises
    ------
    ValueError
        Where ``correction`` is unknown, or n is below 2 (below 1 for ``"none"``).
    TypeError
        Where x is complex or no array of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([2.0, 3, 5, 7, 11, 13, 17, 19])
    >>> [float(standard_deviation(x, correction=c).round(6)) for c in ("none", "bessel", "c4")]
    [5.977824, 6.390562, 6.622135]
    """
    correction = _choice(correction, CORRECTIONS, "correction")
    least = 1 if correction == "none" else 2
    sums, _, n = _sums(x, axis, 2, least=least, what=f"correction {correction!r}")
    return _result(_deviation_of(sums, n, correction), x, axis, keepdims)


def covariance(
    x: Real[Array, "*batch n d"] | Numbers,
    *,
    correction: float = 1,
    weights: Real[Array, "..."] | Numbers | None = None,
    weight_type: str = "frequency",
) -> Float[Array, "*batch d d"]:
    """Return the covariance matrix, unbiased by default.

    Parameters
    ----------
    x : array (..., n, d)
        Samples, one a row. NaN propagates, as in numpy.
    correction : float
        What is subtracted from n, as in :func:`variance`.
    weights : array (n,) or (..., n), optional
        Weights of the samples.
    weight_type : {"frequency", "reliability"}
        See :func:`variance`; these are numpy's ``fweights`` and ``aweights``.

    Returns
    -------
    array (..., d, d)
        The covariance, in the precision of x; float64 for integers.

    Raises
    ------
    ValueError
        Where x has fewer than two dimensions, n is at most ``correction``, weights are negative,
        all zero or of another shape, or ``weight_type`` is unknown.
    TypeError
        Where x is complex or no array of numbers, or x and weights are of two libraries.

    Examples
    --------
    >>> import numpy as np
    >>> covariance(np.array([[0.0, 0.0], [2.0, 4.0]]))
    array([[2., 4.],
           [4., 8.]])
    """
    correction = _correction(correction)
    weight_type = _choice(weight_type, WEIGHT_TYPES, "weight_type")
    values = _as_tensor(x)
    if values.ndim < 2:
        raise ValueError(f"x must be a matrix (..., n, d), got shape {tuple(values.shape)}")
    n = values.shape[-2]
    _check_count(n, 1, "a covariance")
    w = None
    if weights is None:
        _check_divisor(n, correction)
        divisor: Any = n - correction
    else:
        w = _weight_tensor(weights, x)
        if w.shape not in ((n,), values.shape[:-1]):
            raise ValueError(
                f"weights must have the shape ({n},) or {tuple(values.shape[:-1])}, "
                f"got {tuple(w.shape)}"
            )
        w = w[..., None].to(torch.float64)
        _check_weights(w, (-2,))
        total, squares = w.sum(-2, keepdim=True), _sum_of_squares(w, (-2,))
        divisor = _weighted_divisor(total, squares, correction, weight_type)
        w = w.expand(*values.shape[:-1], 1)
    wide = None if w is None else w.expand(values.shape)
    reference = _reference(values, (values.ndim - 2,), wide)
    sums = _central_sums(values, (values.ndim - 2,), 1, reference=reference, weights=wide)
    products = _comoments(values, sums.mean, reference, w)
    return _given_back(products / divisor, x, values.dtype)


def central_moment(
    x: Real[Array, "..."] | Numbers,
    order: int,
    *,
    axis: Axis = None,
    unbiased: bool = True,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    r"""Return a central moment: the h-statistic, unbiased for every law, or the sample's own.

    From order 4 on the unbiased one is no multiple of the sample's :math:`m_p`, see the module's
    formula. Ratios of unbiased moments, as skewness and kurtosis are, are biased.

    Parameters
    ----------
    x : array
        Samples. NaN propagates, as in numpy.
    order : int
        1 to 6; the moment of order 1 is 0.
    axis : int, tuple of int or None
        Axes along which the samples lie; all by default.
    unbiased : bool
        Whether to return the h-statistic, which takes at least ``order`` samples.
    keepdims : bool
        Whether reduced axes stay, with length 1.

    Returns
    -------
    array
        The moment, in the precision of x; float64 for integers.

    Raises
    ------
    ValueError
        Where ``order`` is no integer in 1, …, 6, or samples are too few.
    TypeError
        Where x is complex or no array of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> central_moment(np.array([2.0, 3, 5, 7, 11, 13, 17, 19]), 4).round(10)
    np.float64(2141.0964285714)
    """
    order = _order(order)
    least = order if unbiased else 1
    sums, _, n = _sums(x, axis, order, least=least, what=f"a moment of order {order}")
    if order == 1:
        return _result(sums.mean - sums.mean, x, axis, keepdims)
    return _result(_moment_of(sums, n, order, unbiased), x, axis, keepdims)


def cumulant(
    x: Real[Array, "..."] | Numbers,
    order: int,
    *,
    axis: Axis = None,
    unbiased: bool = True,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    r"""Return a cumulant: Fisher's k-statistic, unbiased for every law, or the sample's own.

    Cumulants of sums of independent variables add up; those of normal data vanish from order 3 on.
    :math:`k_4` is not :math:`h_4 - 3 h_2^2`, which is biased.

    Parameters
    ----------
    x : array
        Samples. NaN propagates, as in numpy.
    order : int
        1 to 6; the cumulant of order 1 is the mean.
    axis : int, tuple of int or None
        Axes along which the samples lie; all by default.
    unbiased : bool
        Whether to return the k-statistic, which takes at least ``order`` samples.
    keepdims : bool
        Whether reduced axes stay, with length 1.

    Returns
    -------
    array
        The cumulant, in the precision of x; float64 for integers.

    Raises
    ------
    ValueError
        Where ``order`` is no integer in 1, …, 6, or samples are too few.
    TypeError
        Where x is complex or no array of numbers.

    Examples
    --------
    An offset takes no digits:

    >>> import numpy as np
    >>> x = np.array([2.0, 3, 5, 7, 11, 13, 17, 19])
    >>> cumulant(x, 6), cumulant(x + 2**26, 6)
    (np.float64(581289.125), np.float64(581289.125))
    """
    order = _order(order)
    if order == 1:
        return mean(x, axis=axis, keepdims=keepdims)
    least = order if unbiased else 1
    sums, _, n = _sums(x, axis, order, least=least, what=f"a cumulant of order {order}")
    return _result(_cumulant_of(sums, n, order, unbiased), x, axis, keepdims)


def c4(n: float) -> float:
    r"""Return c4(n), by which s underestimates the standard deviation of normal data.

    .. math:: c_4(n) = \sqrt{\frac{2}{n-1}}\, \frac{\Gamma(n/2)}{\Gamma((n-1)/2)}

    Parameters
    ----------
    n : int
        Number of samples, at least 2.

    Returns
    -------
    float
        c4(n), between 0.79 and 1, to a few units of the last place.

    Raises
    ------
    ValueError
        Where n is no integer of at least 2.

    Examples
    --------
    >>> round(c4(10), 12)
    0.972659274122
    """
    n = _integer(n, "n", 2)
    half = (n - 1) / 2
    if n < 100:
        return math.gamma(n / 2) / math.gamma(half) / math.sqrt(half)
    # Differences of logarithms would lose digits that the series keeps: at half = 49.5 the first
    # term left out is below 1e-15.
    u = 1 / half
    series = (1 / 128, 5 / 1024, -21 / 32768, -399 / 262144, 869 / 4194304, 39325 / 33554432)
    tail = 0.0
    for coefficient in reversed(series):
        tail = (tail + coefficient) * u
    return 1 - u / 8 + tail * u


def _values(x: Any, axis: Axis) -> tuple[Tensor, tuple[int, ...]]:
    """The samples, and the dimensions along which they lie: never none."""
    values = _as_tensor(x)
    dims = _axes(axis, values.ndim)
    if not dims:
        values, dims = values[..., None], (values.ndim,)
    _check_count(math.prod([values.shape[dim] for dim in dims]), 1, "a moment")
    return values, dims


def _sums(
    x: Any,
    axis: Axis,
    order: int,
    weights: Any = None,
    *,
    least: int = 1,
    what: str = "a moment",
) -> tuple[_Sums, Tensor, int]:
    """Central sums, the reference of their mean, and the number of samples."""
    values, dims = _values(x, axis)
    n = math.prod([values.shape[dim] for dim in dims])
    _check_count(n, least, what)
    w = None if weights is None else _weights_for(values, dims, weights, x)
    reference = _reference(values, dims, w)
    return _central_sums(values, dims, order, reference=reference, weights=w), reference, n


def _result(value: Tensor, x: Any, axis: Axis, keepdims: bool) -> Any:
    """The value, whose reduced dimensions have length 1, as it goes out."""
    given = _as_tensor(x)
    dims = _axes(axis, given.ndim)
    if not dims:
        value = value[..., 0]
    elif not keepdims:
        value = value.squeeze(dims)
    return _given_back(value, x, given.dtype)


def _deviation_of(sums: _Sums, n: int, correction: str) -> Tensor:
    if correction == "none":
        return _root(sums.powers[0] / n)
    root = _root(sums.powers[0] / (n - 1))
    return root / c4(n) if correction == "c4" else root


def _sum_of_squares(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (w.to(torch.float64) ** 2).sum(dims, keepdim=True)


def _weighted_divisor(
    total: Tensor, squares: Tensor, correction: float, weight_type: str
) -> Tensor:
    n = total if weight_type == "frequency" else total**2 / _or_one(squares)
    if not torch.compiler.is_compiling() and n.numel():
        _check_divisor(float(n.detach().min()), correction)
    return total * (1 - correction / n)
