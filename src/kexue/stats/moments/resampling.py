r"""The bias of any statistic: estimated from one sample, or measured over many.

With the values :math:`\hat\theta_{(i)}` of the statistic without the i-th sample, and
:math:`\theta^*` of samples drawn from the sample with replacement,

.. math::
    b_{\text{jackknife}} = (n-1)\Bigl(\tfrac1n \sum_i \hat\theta_{(i)} - \hat\theta\Bigr), \qquad
    b_{\text{bootstrap}} = \overline{\theta^*} - \hat\theta.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.moments.samples import Array, Numbers, _as_tensor, _axes, _integer

__all__ = ["BiasEstimate", "BiasMeasurement", "bootstrap_bias", "jackknife", "measure_bias"]

_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class BiasEstimate:
    """A statistic of one sample, and what resampling says about its bias.

    Attributes
    ----------
    estimate : array
        The statistic of the whole sample.
    bias : array
        Its estimated bias.
    corrected : array
        ``estimate - bias``.
    standard_error : array
        Standard error of the estimate.

    Examples
    --------
    >>> BiasEstimate(estimate=1.0, bias=-0.25, corrected=1.25, standard_error=0.5).corrected
    1.25
    """

    estimate: Any
    bias: Any
    corrected: Any
    standard_error: Any


@dataclass(frozen=True)
class BiasMeasurement:
    """A bias that was measured over many samples of a known law.

    Attributes
    ----------
    bias : array
        ``mean_estimate - true_value``.
    standard_error : array
        Standard error of the bias: what is within a few of these is no evidence of any.
    mean_estimate : array
        Mean of the estimates.
    true_value : array
        The truth, as given.
    n_samples, n_repeats : int
        Size of a sample, and number of samples.

    Examples
    --------
    >>> BiasMeasurement(-0.5, 0.01, 0.5, 1.0, n_samples=2, n_repeats=1000).bias
    -0.5
    """

    bias: Any
    standard_error: Any
    mean_estimate: Any
    true_value: Any
    n_samples: int
    n_repeats: int


def jackknife(
    estimator: Callable[..., Any], x: Real[Array, "..."] | Numbers, *, axis: int = 0
) -> BiasEstimate:
    r"""Estimate the bias of a statistic from its values without each one sample.

    Removes the term in 1/n of a bias, and all of it for statistics that are quadratic in the
    empirical law, such as the variance. Meant for smooth functions of means: for the median, the
    maximum and other statistics that are not smooth it is inconsistent.

    Parameters
    ----------
    estimator : callable
        Takes samples of the kind of x, returns a scalar or an array. Where it is a
        ``functools.partial`` with an ``axis`` (or torch's ``dim``), or has an attribute
        ``vectorized = True`` and a parameter ``axis``, it is called on stacks of samples, if that
        gives the same values.
    x : array
        One sample.
    axis : int
        The axis along which its members lie.

    Returns
    -------
    BiasEstimate
        Estimate, bias, corrected estimate, and the jackknife's standard error
        :math:`\sqrt{\frac{n-1}n \sum_i (\hat\theta_{(i)} - \overline{\hat\theta_{(i)}})^2}`.

    Raises
    ------
    ValueError
        Where n is below 2, or x has no such axis.
    TypeError
        Where x is complex or no array of numbers, or the estimator is not callable.

    Examples
    --------
    The sample's variance is corrected exactly:

    >>> import numpy as np
    >>> result = jackknife(np.var, np.array([2.0, 3, 5, 7, 11, 13, 17, 19]))
    >>> result.estimate, result.corrected.round(12)
    (np.float64(35.734375), np.float64(40.839285714286))
    """
    sample, axis, n = _sample(estimator, x, axis, "the jackknife")
    members = np.arange(n)
    without_one = (np.delete(members, i) for i in range(n))
    estimate = _scalar(estimator(sample))
    values = _values_of(estimator, _drawn(sample, without_one, axis), _bytes(sample))
    mean = values.mean(0)
    bias = (n - 1) * (mean - estimate)
    error = (((values - mean) ** 2).sum(0) * ((n - 1) / n)) ** 0.5
    return BiasEstimate(estimate, bias, estimate - bias, error)


def bootstrap_bias(
    estimator: Callable[..., Any],
    x: Real[Array, "..."] | Numbers,
    *,
    n_resamples: int = 999,
    axis: int = 0,
    random_state: Any = None,
) -> BiasEstimate:
    """Estimate the bias of a statistic from samples drawn from the sample.

    For the divisor-n variance the expected result is -m_2/n: the sample's own bias, where the
    sample takes the place of the law. The result is random, with an error of
    ``standard_error / sqrt(n_resamples)``.

    Parameters
    ----------
    estimator : callable
        As for :func:`jackknife`.
    x : array
        One sample.
    n_resamples : int
        Number of samples drawn with replacement.
    axis : int
        The axis along which the members of x lie.
    random_state : int, numpy.random.Generator or None
        Where randomness comes from; the same seed gives the same bits.

    Returns
    -------
    BiasEstimate
        Estimate, bias, corrected estimate, and the standard deviation of the resampled estimates.

    Raises
    ------
    ValueError
        Where n or ``n_resamples`` is below 2, or x has no such axis.
    TypeError
        Where x is complex or no array of numbers, or the estimator is not callable.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([2.0, 3, 5, 7, 11, 13, 17, 19])
    >>> result = bootstrap_bias(np.var, x, random_state=0)
    >>> bool(abs(result.bias + np.var(x) / 8) < result.standard_error / 10)
    True
    """
    n_resamples = _integer(n_resamples, "n_resamples", 2)
    sample, axis, n = _sample(estimator, x, axis, "the bootstrap")
    draws = _index_draws(np.random.default_rng(random_state), n_resamples, n)
    estimate = _scalar(estimator(sample))
    values = _values_of(estimator, _drawn(sample, draws, axis), _bytes(sample))
    bias = values.mean(0) - estimate
    return BiasEstimate(estimate, bias, estimate - bias, _spread(values))


def measure_bias(
    estimator: Callable[..., Any],
    sampler: Callable[[int, np.random.Generator], Any],
    true_value: Float[Array, "..."] | float,
    *,
    n_samples: int,
    n_repeats: int = 10_000,
    random_state: Any = None,
) -> BiasMeasurement:
    """Measure the bias of an estimator over many samples of a law whose truth is known.

    Parameters
    ----------
    estimator : callable
        As for :func:`jackknife`.
    sampler : callable
        ``sampler(n_samples, generator)`` returns a fresh sample; the generator is one numpy
        Generator that goes on from sample to sample.
    true_value : float or array
        What the estimator is meant to give.
    n_samples : int
        Size of a sample.
    n_repeats : int
        Number of samples.
    random_state : int, numpy.random.Generator or None
        Where randomness comes from; the same seed gives the same bits.

    Returns
    -------
    BiasMeasurement
        The bias with its standard error.

    Raises
    ------
    ValueError
        Where ``n_samples`` is below 1 or ``n_repeats`` below 2.
    TypeError
        Where the estimator or the sampler is not callable.

    Examples
    --------
    With two samples, half of the variance is missing:

    >>> import numpy as np
    >>> normal = lambda n, generator: generator.standard_normal(n)
    >>> result = measure_bias(np.var, normal, 1.0, n_samples=2, random_state=0)
    >>> bool(abs(result.bias + 0.5) < 4 * result.standard_error < 0.05)
    True
    """
    _check_callable(estimator, "estimator")
    _check_callable(sampler, "sampler")
    n_samples = _integer(n_samples, "n_samples", 1)
    n_repeats = _integer(n_repeats, "n_repeats", 2)
    generator = np.random.default_rng(random_state)
    first = sampler(n_samples, generator)
    samples = (first if i == 0 else sampler(n_samples, generator) for i in range(n_repeats))
    values = _values_of(estimator, samples, _bytes(first))
    mean = values.mean(0)
    return BiasMeasurement(
        bias=mean - true_value,
        standard_error=_spread(values) / math.sqrt(n_repeats),
        mean_estimate=mean,
        true_value=true_value,
        n_samples=n_samples,
        n_repeats=n_repeats,
    )


def _check_callable(thing: Any, name: str) -> None:
    if not callable(thing):
        raise TypeError(f"{name} must be callable, got {type(thing).__name__}")


def _sample(estimator: Any, x: Any, axis: Any, what: str) -> tuple[Any, int, int]:
    """The sample as an array, its axis and its size."""
    _check_callable(estimator, "estimator")
    ndim = _as_tensor(x).ndim  # refuses what is no array of real numbers
    sample = x if isinstance(x, Tensor) else np.asarray(x)
    if ndim == 0:
        raise ValueError("x must have an axis along which its members lie, got a scalar")
    try:
        (dim,) = _axes(operator.index(axis), ndim)
    except TypeError:
        raise ValueError(f"axis must be an integer, got {axis!r}") from None
    n = sample.shape[dim]
    if n < 2:
        raise ValueError(f"{what} needs at least 2 samples, got {n}")
    return sample, dim, n


def _index_draws(generator: np.random.Generator, n_resamples: int, n: int) -> Iterator[np.ndarray]:
    rows = max(1, _CHUNK_BYTES // (8 * n))
    for start in range(0, n_resamples, rows):
        yield from generator.integers(0, n, size=(min(rows, n_resamples - start), n))


def _drawn(sample: Any, indices: Iterable[np.ndarray], axis: int) -> Iterator[Any]:
    for index in indices:
        if isinstance(sample, Tensor):
            yield sample.index_select(axis, torch.from_numpy(index).to(sample.device))
        else:
            yield sample.take(index, axis=axis)


def _values_of(estimator: Callable[..., Any], samples: Iterable[Any], n_bytes: int) -> Any:
    """The estimates of all samples along a new first axis; stacked samples at once."""
    samples = iter(samples)
    first = next(samples)
    value = _scalar(estimator(first))
    of_stack = _on_stacks(estimator, np.ndim(first))
    if of_stack is not None and not _gives(of_stack, first, value):
        of_stack = None
    per_chunk = max(1, _CHUNK_BYTES // max(n_bytes, 1))
    pieces = [_stack([value])]
    while chunk := list(islice(samples, per_chunk)):
        if of_stack is not None and len({np.shape(one) for one in chunk}) == 1:
            pieces.append(of_stack(_stack(chunk)))
        else:
            pieces.append(_stack([_scalar(estimator(one)) for one in chunk]))
    if isinstance(value, Tensor):
        values = torch.cat([piece.to(pieces[-1].dtype) for piece in pieces])
        return values if values.is_floating_point() else values.double()
    return np.concatenate(pieces)


def _on_stacks(estimator: Callable[..., Any], ndim: int) -> Callable[[Any], Any] | None:
    """The estimator for samples of ``ndim`` axes that are stacked along a first one, if any."""
    keyword, axis = "axis", None
    if isinstance(estimator, functools.partial):
        given = [name for name in ("axis", "dim") if name in estimator.keywords]
        if not given:
            return None
        keyword, axis = given[0], estimator.keywords[given[0]]
    elif getattr(estimator, "vectorized", False):
        try:
            parameter = inspect.signature(estimator).parameters["axis"]
        except (KeyError, ValueError):
            return None
        axis = None if parameter.default is inspect.Parameter.empty else parameter.default
    else:
        return None
    if axis is None:
        axis = tuple(range(ndim)) if ndim > 1 else 0
    try:
        shifted: Any = (
            tuple(_behind(a) for a in axis) if isinstance(axis, tuple | list) else _behind(axis)
        )
    except TypeError:
        return None
    return functools.partial(estimator, **{keyword: shifted})


def _behind(axis: Any) -> int:
    """The same axis of a stack of samples."""
    number = operator.index(axis)
    return number if number < 0 else number + 1


def _gives(of_stack: Callable[[Any], Any], sample: Any, value: Any) -> bool:
    """Whether a stack of two gives the value of the sample, and another for another sample."""
    try:
        stacked = of_stack(_stack([sample, sample + sample]))
        alone = of_stack(_stack([sample + sample]))
    except Exception:
        # Whatever an estimator raises on a stack that it was not written for, one by one it works.
        return False
    shape = (2, *np.shape(value))
    if np.shape(stacked) != shape or np.shape(alone) != (1, *shape[1:]):
        return False
    pairs = ((stacked[0], value), (stacked[1], alone[0]))
    return all(_same(one, other) for one, other in pairs)


def _same(one: Any, other: Any) -> bool:
    a, b = (
        v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for v in (one, other)
    )
    # Sums of a stack may be taken in another order.
    return bool(
        np.allclose(a, b, rtol=1e-6, atol=1e-12 * np.max(np.abs(b), initial=1e-300), equal_nan=True)
    )


def _scalar(value: Any) -> Any:
    return value if isinstance(value, Tensor) else np.asarray(value)[()]


def _stack(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else np.stack(values)


def _bytes(sample: Any) -> int:
    if isinstance(sample, Tensor):
        return sample.numel() * sample.element_size()
    return int(np.asarray(sample).nbytes)


def _spread(values: Any) -> Any:
    """Standard deviation of the estimates, with the divisor n - 1."""
    deviation = values - values.mean(0)
    return ((deviation**2).sum(0) / (len(values) - 1)) ** 0.5
