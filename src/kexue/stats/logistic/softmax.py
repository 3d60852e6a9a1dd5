"""The formula: a softmax layer from class means, one covariance and class probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array, size
from jaxtyping import Float

__all__ = ["LinearSoftmax", "closed_form_softmax"]

# numpy or torch; jaxtyping checks shape and kind of number, the functions check the rest.
Array: TypeAlias = Any


@dataclass(frozen=True)
class LinearSoftmax:
    """A softmax over linear functions: ``logits = x @ weight.T + bias``.

    Attributes
    ----------
    weight : array, shape (..., classes, features)
        One row a class. Only differences between classes are identified.
    bias : array, shape (..., classes)
        One number a class, ``-inf`` for a class of prior 0.

    Examples
    --------
    >>> import numpy as np
    >>> layer = LinearSoftmax(weight=np.array([[0.0, 1.0], [1.0, 0.0]]), bias=np.zeros(2))
    >>> np.array([2.0, 3.0]) @ layer.weight.T + layer.bias
    array([3., 2.])
    """

    weight: Float[Array, "*batch classes features"]
    bias: Float[Array, "*batch classes"]


def closed_form_softmax(
    means: Float[Array, "*batch classes features"],
    covariance: Float[Array, "*batch features features"],
    priors: Float[Array, "*batch classes"],
) -> LinearSoftmax:
    r"""Return the softmax layer that is Bayes' rule for Gaussian classes with one covariance.

    .. math:: w_k = \mu_k \Sigma^{-1}, \qquad b_k = \ln p_k - \tfrac12 \mu_k \Sigma^{-1}\mu_k^\top.

    Differentiable in torch. Costs one factorisation of the covariance and one more to check it.

    Parameters
    ----------
    means : array, shape (..., classes, features)
        Class means.
    covariance : array, shape (..., features, features)
        Covariance within classes, symmetric and positive definite.
    priors : array, shape (..., classes)
        Class probabilities. A common factor only shifts all biases; 0 gives a bias of ``-inf``.

    Returns
    -------
    LinearSoftmax
        Weight and bias, of the kind and dtype of the input.

    Raises
    ------
    TypeError
        If the input is no numpy or torch array of floating-point numbers.
    ValueError
        If shapes do not match, a number is not finite, a prior is negative, all priors are 0, or
        the covariance is not symmetric positive definite.

    Examples
    --------
    >>> import numpy as np
    >>> means, covariance = np.array([[0.0, 0.0], [2.0, 1.0]]), np.diag([1.0, 0.5])
    >>> layer = closed_form_softmax(means, covariance, np.array([0.5, 0.5]))
    >>> layer.weight[1] - layer.weight[0], layer.bias[1] - layer.bias[0]
    (array([2., 2.]), np.float64(-3.0))
    """
    xp = _check_softmax_input(means, covariance, priors)
    weight = xp.linalg.matrix_transpose(
        xp.linalg.solve(covariance, xp.linalg.matrix_transpose(means))
    )
    bias = _log(xp, priors) - xp.sum(weight * means, axis=-1) / 2
    return LinearSoftmax(weight, bias)


def _log(xp: Any, prior: Array) -> Array:
    """Logarithm with ``-inf`` for 0, without a warning and with a finite gradient elsewhere."""
    return xp.where(prior > 0, xp.log(_nonzero(xp, prior)), xp.full_like(prior, -math.inf))


def _nonzero(xp: Any, x: Array) -> Array:
    return xp.where(x > 0, x, xp.ones_like(x))


def _check_kind(name: str, value: Any, *kinds: str) -> Any:
    if not (is_numpy_array(value) or is_torch_array(value)):
        raise TypeError(f"{name} must be a numpy or torch array, got {type(value).__name__}")
    xp = array_namespace(value)
    if not xp.isdtype(value.dtype, kinds):
        raise TypeError(f"{name} must hold numbers of kind {' or '.join(kinds)}, got {value.dtype}")
    return xp


def _check_softmax_input(means: Any, covariance: Any, priors: Any) -> Any:
    given = {"means": means, "covariance": covariance, "priors": priors}
    for name, value in given.items():
        _check_kind(name, value, "real floating")
    xp = array_namespace(means, covariance, priors)
    shapes = [tuple(value.shape) for value in given.values()]
    *batch, classes, features = shapes[0] if len(shapes[0]) >= 2 else (-1, -1)
    if shapes[1:] != [(*batch, features, features), (*batch, classes)]:
        raise ValueError(
            "means, covariance and priors must have shapes (..., classes, features), "
            "(..., features, features) and (..., classes), got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    for name, value in given.items():
        if not xp.all(xp.isfinite(value)):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if not (xp.all(priors >= 0) and xp.all(xp.sum(priors, axis=-1) > 0)):
        raise ValueError(f"priors must be non-negative and not all 0, got {priors}")
    _check_positive_definite(xp, covariance)
    return xp


def _check_positive_definite(xp: Any, covariance: Any) -> None:
    if covariance.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"covariance must be float32 or float64, got {covariance.dtype}")
    skew = xp.abs(covariance - xp.linalg.matrix_transpose(covariance))
    # Loose: rounding in low precision is forgiven, a matrix of another kind is not.
    largest = xp.max(xp.abs(covariance), axis=(-2, -1), keepdims=True) if size(skew) else 0.0
    symmetric = bool(xp.all(skew <= 1e-3 * largest))
    try:
        xp.linalg.cholesky(covariance)
    except (np.linalg.LinAlgError, RuntimeError):  # what numpy and torch raise
        symmetric = False
    if not symmetric:
        raise ValueError(
            "covariance must be symmetric and positive definite, got a matrix that is not; "
            "shrinkage makes a singular one so"
        )
