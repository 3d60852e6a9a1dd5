"""One normal law: how it is given, what is refused, its entropy, and its fit to samples.

Both kinds of array are computed in torch: a numpy array is a torch tensor of the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.gaussian.stable import _diagonal, _symmetric

__all__ = ["GaussianParameters", "entropy", "fit_gaussian"]

# numpy or torch; jaxtyping checks the shape, the functions check the rest.
Array: TypeAlias = Any
Numbers: TypeAlias = Sequence[Any] | float

COVARIANCE_TYPES = ("full", "cholesky", "diag", "spherical")


class GaussianParameters(NamedTuple):
    """Mean and covariance of a normal law.

    Attributes
    ----------
    mean : array (..., d)
        Mean.
    covariance : array (..., d, d)
        Covariance.

    Examples
    --------
    >>> import numpy as np
    >>> GaussianParameters(mean=np.zeros(2), covariance=np.eye(2)).covariance.trace()
    np.float64(2.0)
    """

    mean: Float[Array, "*batch d"]
    covariance: Float[Array, "*batch d d"]


def fit_gaussian(
    samples: Real[Array, "*batch n d"] | Numbers, *, ddof: int = 1
) -> GaussianParameters:
    """Return mean and covariance of samples.

    Fewer than d + 1 samples have a singular covariance: :func:`wasserstein_distance` takes it,
    :func:`frechet_distance` takes the samples themselves and is more accurate then.

    Parameters
    ----------
    samples : array (..., n, d)
        Samples, one a row.
    ddof : int
        The covariance is the sum of squares over n - ddof: 1 is unbiased, 0 maximises likelihood.

    Returns
    -------
    GaussianParameters
        Mean (..., d) and covariance (..., d, d).

    Raises
    ------
    ValueError
        Where there are no more than ``ddof`` samples, or one is not finite.
    TypeError
        Where the samples are no real numbers in single or double precision.

    Examples
    --------
    >>> import numpy as np
    >>> fit_gaussian(np.array([[0.0, 0.0], [2.0, 4.0]]))
    GaussianParameters(mean=array([1., 2.]), covariance=array([[2., 4.], [4., 8.]]))
    """
    (x,), as_given = _tensors(samples=samples)
    mean, factor = _sample_factor("samples", x, ddof)
    with _full_precision(x):
        covariance = factor @ factor.mT
    return GaussianParameters(as_given(mean), as_given(_symmetric(covariance)))


def entropy(
    covariance: Real[Array, "*shape"] | Numbers, *, covariance_type: str = "full"
) -> Float[Array, "*batch"]:
    r"""Return the differential entropy in nats: no law of this covariance has more.

    .. math:: H = \tfrac12 \log\det\Sigma + \tfrac d2 (1 + \log 2\pi).

    Parameters
    ----------
    covariance : array (..., d, d), or (..., d) for "diag"
        Covariance.
    covariance_type : {"full", "cholesky", "diag"}
        What ``covariance`` holds, see :func:`kl_divergence`.

    Returns
    -------
    array (...,)
        Entropy of each law.

    Raises
    ------
    ValueError
        Where a covariance is not positive definite or not finite, or the type is unknown.
    TypeError
        Where it holds no real numbers in single or double precision.

    Examples
    --------
    >>> import numpy as np
    >>> entropy(np.array([[2.0, 1.0], [1.0, 2.0]])).round(12)
    np.float64(3.387183210743)
    """
    _check_choice("covariance_type", covariance_type, COVARIANCE_TYPES[:3])
    (given,), as_given = _tensors(covariance=covariance)
    least = 1 if covariance_type == "diag" else 2
    if given.ndim < least:
        raise ValueError(
            f"covariance must have at least {least} dimensions for "
            f"covariance_type={covariance_type!r}, got shape {tuple(given.shape)}"
        )
    mean = given.new_zeros(given.shape[-1])
    law = _law(("covariance", "covariance"), mean, given, covariance_type)
    if isinstance(law, _Diagonal):
        half_log_det = torch.log(law.variance).sum(-1) / 2
    else:
        half_log_det = torch.log(_diagonal(law.factor)).sum(-1)
    return as_given(half_log_det + mean.shape[-1] * (1 + math.log(2 * math.pi)) / 2)


class _Diagonal(NamedTuple):
    """A law with independent coordinates."""

    mean: Tensor
    variance: Tensor

    def at(self, index: Any) -> _Diagonal:
        return _Diagonal(self.mean[index], self.variance[index])


class _Dense(NamedTuple):
    """A law with factor @ factor.mT as covariance; the factor is triangular unless singular."""

    mean: Tensor
    factor: Tensor
    covariance: Tensor | None
    """None where the law was given by its factor."""

    def at(self, index: Any) -> _Dense:
        covariance = None if self.covariance is None else self.covariance[index]
        return _Dense(self.mean[index], self.factor[index], covariance)


def _covariance_batch(law: _Law) -> torch.Size:
    return law.variance.shape[:-1] if isinstance(law, _Diagonal) else law.factor.shape[:-2]


_Law: TypeAlias = _Diagonal | _Dense
_Back: TypeAlias = Callable[[Tensor], Any]


def _compare(
    formula: Callable[[Any, Any], Tensor | tuple[Tensor, ...]],
    covariance_type: str,
    semidefinite: tuple[bool, bool] = (False, False),
    **given: Any,
) -> Any:
    """The formula's value for two laws whose leading dimensions broadcast."""
    first, second, as_given = _two_laws(covariance_type, semidefinite, **given)
    shapes = [s for law in (first, second) for s in (law.mean.shape[:-1], _covariance_batch(law))]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        found = ", ".join(f"{n} {tuple(s)}" for n, s in zip(given, shapes, strict=True))
        raise ValueError(f"leading dimensions must broadcast, got {found}") from error
    with _full_precision(first.mean):
        result = formula(first, second)
    return tuple(map(as_given, result)) if isinstance(result, tuple) else as_given(result)


def _two_laws(
    covariance_type: str, semidefinite: tuple[bool, bool], **given: Any
) -> tuple[_Law, _Law, _Back]:
    """Two laws in one precision, and the way back to the kind of array that was given.

    ``given`` is a mean and its covariance, by the names that the caller knows them by, and the
    other mean and covariance unless the law is compared with itself.
    """
    _check_choice("covariance_type", covariance_type, COVARIANCE_TYPES)
    tensors, as_given = _tensors(**given)
    names = list(given)
    for name, mean in zip(names[::2], tensors[::2], strict=True):
        if mean.ndim < 1 or mean.shape[-1] < 1:
            raise ValueError(
                f"{name} must have shape (..., d) with d >= 1, got {tuple(mean.shape)}"
            )
    dimensions = [mean.shape[-1] for mean in tensors[::2]]
    if dimensions[0] != dimensions[-1]:
        raise ValueError(
            f"{names[0]} and {names[2]} must have the same dimension d, "
            f"got {dimensions[0]} and {dimensions[1]}"
        )
    dtype = _common_dtype(tensors)
    laws = [
        _law(
            (names[k], names[k + 1]),
            tensors[k],
            tensors[k + 1],
            covariance_type,
            dtype=dtype,
            semidefinite=semidefinite[k // 2],
        )
        for k in range(0, len(names), 2)
    ]
    return laws[0], laws[-1], as_given


def _law(
    names: tuple[str, str],
    mean: Tensor,
    covariance: Tensor,
    covariance_type: str,
    *,
    dtype: torch.dtype | None = None,
    semidefinite: bool = False,
) -> _Law:
    """A law from its checked parameters."""
    mean_name, name = names
    d = mean.shape[-1]
    trailing = {"full": (d, d), "cholesky": (d, d), "diag": (d,), "spherical": ()}[covariance_type]
    if covariance.shape[covariance.ndim - len(trailing) :] != trailing:
        wanted = ", ".join(["...", *map(str, trailing)])
        raise ValueError(
            f"{name} must have shape ({wanted}) for covariance_type={covariance_type!r}, "
            f"got {tuple(covariance.shape)}"
        )
    _check_finite(mean_name, mean)
    if covariance_type == "cholesky":
        covariance = covariance.tril()
    _check_finite(name, covariance)
    mean = mean.to(dtype or mean.dtype)
    exact = covariance.to(dtype or covariance.dtype)
    if covariance_type == "full":
        _check_symmetric(name, covariance)
        exact = _symmetric(exact)
        # Rounding is that of the numbers as they came, before any promotion.
        factor = _factor(name, exact, torch.finfo(covariance.dtype).eps, semidefinite=semidefinite)
        return _Dense(mean, factor, exact)
    if covariance_type == "cholesky":
        _check_positive(f"{name} must have a positive diagonal", _diagonal(exact))
        return _Dense(mean, exact, None)
    _check_positive(f"{name} must hold positive variances", exact)
    if covariance_type == "spherical":
        exact = exact[..., None].expand(*exact.shape, d)
    return _Diagonal(mean, exact)


def _factor(name: str, covariance: Tensor, eps: float, *, semidefinite: bool) -> Tensor:
    """The Cholesky factor; of singular matrices, where they are allowed, one from eigenvectors."""
    if torch.compiler.is_compiling():
        return torch.linalg.cholesky(covariance)
    factor, info = torch.linalg.cholesky_ex(covariance)
    singular = info > 0
    wants_gradient = covariance.requires_grad and torch.is_grad_enabled()
    if not semidefinite or wants_gradient:
        singular = singular | _near_singular(covariance.detach(), factor.detach(), info, eps)
    if not singular.any():
        return factor
    values, vectors = torch.linalg.eigh(covariance.detach()[singular])
    lowest = values[..., 0]
    if not semidefinite or wants_gradient:
        purpose = " where a gradient is asked for" if semidefinite else ""
        raise ValueError(
            f"{name} must be positive definite{purpose}, "
            f"smallest eigenvalue {float(lowest.min()):.3g} "
            f"beside a largest of {float(values[torch.argmin(lowest), -1]):.3g}"
        )
    d = covariance.shape[-1]
    floor = -100 * d * eps * covariance[singular].abs().amax((-2, -1))
    if (lowest < floor).any():
        raise ValueError(
            f"{name} must be positive semi-definite, smallest eigenvalue {float(lowest.min()):.3g}"
        )
    factor[singular] = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return factor


def _near_singular(covariance: Tensor, factor: Tensor, info: Tensor, eps: float) -> Tensor:
    """Whether Cholesky succeeded by rounding only, as it does on half of all singular matrices.

    Their smallest eigenvalue is then about eps beside the largest, once units are taken out. It is
    computed only where a pivot is small.
    """
    variance = _diagonal(covariance)
    pivots = _diagonal(factor) ** 2
    near = (info == 0) & (pivots < eps ** (1 / 3) * variance).any(-1)
    if near.any():
        scale = variance[near].rsqrt()
        correlation = covariance[near] * scale[..., None, :] * scale[..., None]
        values = torch.linalg.eigvalsh(correlation)
        near[near.clone()] = values[..., 0] <= 10 * eps * values[..., -1]
    return near


def _sample_factor(name: str, samples: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean, and the factor (..., d, n) whose columns are the scaled deviations from it."""
    if samples.ndim < 2 or samples.shape[-1] < 1:
        raise ValueError(
            f"{name} must have shape (..., n, d) with d >= 1, got {tuple(samples.shape)}"
        )
    n = samples.shape[-2]
    if isinstance(ddof, bool) or not isinstance(ddof, int | np.integer) or ddof < 0:
        raise ValueError(f"ddof must be an integer of at least 0, got {ddof!r}")
    if n <= ddof:
        raise ValueError(f"{name} must have more than ddof = {ddof} rows, got {n}")
    _check_finite(name, samples)
    mean = samples.mean(-2)
    return mean, (samples - mean[..., None, :]).mT / math.sqrt(n - ddof)


def _tensors(**given: Any) -> tuple[list[Tensor], _Back]:
    """The arguments as tensors, each in its own precision; the way back to the kind that came."""
    from_torch = [name for name, value in given.items() if isinstance(value, Tensor)]
    from_numpy = [
        name for name, value in given.items() if isinstance(value, (np.ndarray, np.generic))
    ]
    if from_torch and from_numpy:
        raise TypeError(
            f"arguments must be all numpy or all torch, got {', '.join(from_numpy)} from numpy "
            f"and {', '.join(from_torch)} from torch"
        )
    arrays = {n: _as_tensor(n, given[n]) for n in (from_torch or from_numpy)}
    if len({tensor.device for tensor in arrays.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in arrays.items())
        raise ValueError(f"arguments must be on one device, got {places}")
    # Python numbers and lists take the precision of the arrays beside them.
    like = next(iter(arrays.values()), torch.empty(0, dtype=torch.float64))
    dtype = _common_dtype(list(arrays.values())) if arrays else torch.float64
    tensors = [
        arrays[name]
        if name in arrays
        else _as_tensor(name, np.asarray(value)).to(like.device, dtype)
        for name, value in given.items()
    ]
    return tensors, (lambda x: x) if from_torch else _to_numpy


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")
        return value
    if value.dtype.kind in "iu":
        value = value.astype(np.float64)
    if value.dtype.kind != "f" or value.dtype.itemsize not in (4, 8):
        raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")
    native = np.float32 if value.dtype.itemsize == 4 else np.float64
    return torch.from_numpy(np.require(value, native, ["C", "W"]))


def _to_numpy(x: Tensor) -> Any:
    return x.numpy()[()]


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    single = all(tensor.dtype == torch.float32 for tensor in tensors)
    return torch.float32 if single else torch.float64


def _full_precision(x: Tensor) -> torch.autocast:
    """Under autocast, products of matrices would be rounded to half precision."""
    return torch.autocast(x.device.type, enabled=False)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_finite(name: str, x: Tensor) -> None:
    if not torch.compiler.is_compiling() and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} places")


def _check_positive(requirement: str, x: Tensor) -> None:
    if not torch.compiler.is_compiling() and not (x > 0).all():
        raise ValueError(f"{requirement}, smallest entry {float(x.min()):.3g}")


def _check_symmetric(name: str, x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    x = x.detach()
    asymmetry = (x - x.mT).abs().amax((-2, -1))
    allowed = 1e3 * torch.finfo(x.dtype).eps * x.abs().amax((-2, -1))
    if (asymmetry > allowed).any():
        raise ValueError(
            f"{name} must be symmetric, largest asymmetry {float(asymmetry.max()):.3g}"
        )
