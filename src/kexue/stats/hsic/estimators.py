"""The criterion and the alignment: sums over two kernel matrices, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array
from jaxtyping import Shaped

from kexue._precision import without_autocast
from kexue.stats.hsic.kernels import (
    Array,
    Kernel,
    _check_same_kind,
    _constant,
    _Gram,
    _gram,
    _integer,
    _result_dtype,
)

__all__ = ["centered_kernel_alignment", "hsic"]

_LEAST = {"unbiased": 4, "biased": 2}


@without_autocast
def hsic(
    x: Shaped[Array, "*#batch n dx"] | Shaped[Array, " n"] | Sequence[Any],
    y: Shaped[Array, "*#batch n dy"] | Shaped[Array, " n"] | Sequence[Any],
    *,
    kernel_x: Kernel = "gaussian",
    kernel_y: Kernel = "gaussian",
    bandwidth_x: float | str = "median",
    bandwidth_y: float | str = "median",
    estimator: str = "unbiased",
    block_size: int | None = None,
) -> Shaped[Array, "*#batch"]:
    r"""Return the Hilbert-Schmidt independence criterion of paired samples.

    With kernel matrices K, L and the centring matrix H, the biased estimate is
    :math:`\operatorname{tr}(KHLH)/(n-1)^2`, never negative, and about
    :math:`\operatorname{tr}C_{xx}\operatorname{tr}C_{yy}/n` too large under independence. The
    unbiased one, with zero diagonals in :math:`\tilde K, \tilde L`, is

    .. math::
        \frac{1}{n(n-3)}\Big[\operatorname{tr}\tilde K\tilde L
        + \frac{1^\top\tilde K1\;1^\top\tilde L1}{(n-1)(n-2)}
        - \frac{2}{n-2}1^\top\tilde K\tilde L1\Big].

    Sums are float64 whatever the input. For torch the result is differentiable in both samples;
    a median bandwidth is a constant then, which lets a network change its distances unnoticed, so
    give a fixed one in training. Kernels are computed again in the backward pass where there are
    several blocks, so that memory stays O(n · block_size) there as well.

    Parameters
    ----------
    x : array, shape (n,) or (..., n, dx)
        Samples, numpy or torch; one-dimensional input is n scalars. Batch dimensions broadcast.
    y : array, shape (n,) or (..., n, dy)
        As many samples, paired with those of ``x``.
    kernel_x, kernel_y : str or callable
        See :func:`kernel_matrix`. Take ``"delta"`` for categories. For ``"precomputed"`` the
        argument is the symmetric kernel matrix (..., n, n).
    bandwidth_x, bandwidth_y : float or "median"
        See :func:`median_bandwidth`; one for the whole batch.
    estimator : {"unbiased", "biased"}
        They need at least 4 and 2 samples.
    block_size : int, optional
        Rows and columns of the kernel matrices that are evaluated at a time. By default what suits
        the device, with at most 256 MB of temporaries (512 MB for two whole matrices).

    Returns
    -------
    array, shape (...)
        In the dtype of floating input, float64 for integers.

    Raises
    ------
    ValueError
        If the numbers of samples differ or are too small, a number is not finite, a bandwidth is
        not positive or a median 0, a kernel or estimator is unknown, or a precomputed matrix is not
        symmetric.
    TypeError
        If an array is complex or no array of numbers, or numpy and torch are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([0.0, 1.0, 2.0, 4.0, 7.0, 11.0])
    >>> y = np.array([1.0, 0.0, 3.0, 2.0, 5.0, 4.0])
    >>> hsic(x, y).round(6), hsic(x, y, estimator="biased").round(6)
    (np.float64(0.052203), np.float64(0.084429))
    """
    _check_estimator(estimator)
    gram_x, gram_y = _pair(
        x, y, (kernel_x, kernel_y), (bandwidth_x, bandwidth_y), least=_LEAST[estimator]
    )
    sums = _sums(gram_x, gram_y, diagonal=estimator == "biased", block_size=block_size)
    value = _ESTIMATES[estimator](gram_x.n, sums.xy, sums.rows_x, sums.rows_y)
    xp = gram_x.xp
    return xp.astype(value, _result_dtype(xp, x, y), copy=False)[()]


@without_autocast
def centered_kernel_alignment(
    x: Shaped[Array, "*#batch n dx"] | Shaped[Array, " n"] | Sequence[Any],
    y: Shaped[Array, "*#batch n dy"] | Shaped[Array, " n"] | Sequence[Any],
    *,
    kernel_x: Kernel = "linear",
    kernel_y: Kernel = "linear",
    bandwidth_x: float | str = "median",
    bandwidth_y: float | str = "median",
    estimator: str = "biased",
    block_size: int | None = None,
) -> Shaped[Array, "*#batch"]:
    r"""Return the alignment of two representations of the same samples, 1 for equal geometry.

    :math:`\mathrm{HSIC}(x, y)/\sqrt{\mathrm{HSIC}(x, x)\,\mathrm{HSIC}(y, y)}`, in [0, 1] for the
    biased estimator. With linear kernels it does not change under rotations and isotropic scale of
    either side; in one dimension it is the squared correlation. The biased alignment of unrelated
    representations is far from 0 where there are few samples for many features; the unbiased one is
    around 0.

    Parameters
    ----------
    x : array, shape (n,) or (..., n, dx)
        One representation, numpy or torch. Batch dimensions broadcast.
    y : array, shape (n,) or (..., n, dy)
        The other one, of the same samples.
    kernel_x, kernel_y : str or callable
        See :func:`kernel_matrix`.
    bandwidth_x, bandwidth_y : float or "median"
        See :func:`median_bandwidth`.
    estimator : {"biased", "unbiased"}
        See :func:`hsic`.
    block_size : int, optional
        See :func:`hsic`.

    Returns
    -------
    array, shape (...)
        In the dtype of floating input, float64 for integers.

    Raises
    ------
    ValueError
        Where :func:`hsic` refuses the input, or one side is constant, so that there is nothing to
        align.
    TypeError
        If an array is complex or no array of numbers, or numpy and torch are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 5.0]])
    >>> rotated = x @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    >>> centered_kernel_alignment(x, 3 * rotated).round(12)
    np.float64(1.0)
    """
    _check_estimator(estimator)
    gram_x, gram_y = _pair(
        x, y, (kernel_x, kernel_y), (bandwidth_x, bandwidth_y), least=_LEAST[estimator]
    )
    sums = _sums(
        gram_x, gram_y, diagonal=estimator == "biased", block_size=block_size, squares=True
    )
    n, estimate = gram_x.n, _ESTIMATES[estimator]
    own_x = estimate(n, sums.xx, sums.rows_x, sums.rows_x)
    own_y = estimate(n, sums.yy, sums.rows_y, sums.rows_y)
    for name, own, squares in (("x", own_x, sums.xx), ("y", own_y, sums.yy)):
        _check_not_constant(name, own, squares / n**2)
    xp = gram_x.xp
    value = estimate(n, sums.xy, sums.rows_x, sums.rows_y) / xp.sqrt(own_x * own_y)
    return xp.astype(value, _result_dtype(xp, x, y), copy=False)[()]


class _Sums(NamedTuple):
    """What the estimates need of K and L, in float64."""

    rows_x: Array
    """K1, shape (..., n)."""
    rows_y: Array
    xy: Array
    """Σ K_ij L_ij."""
    xx: Array = None
    yy: Array = None


def _biased(n: int, product: Array, rows_x: Array, rows_y: Array) -> Array:
    return _centred_trace(n, product, rows_x, rows_y) / (n - 1) ** 2


def _centred_trace(n: int, product: Array, rows_x: Array, rows_y: Array) -> Array:
    """tr(KHLH)."""
    xp = array_namespace(product)
    of_rows = xp.sum(rows_x * rows_y, axis=-1)
    return product - 2 / n * of_rows + xp.sum(rows_x, axis=-1) * xp.sum(rows_y, axis=-1) / n**2


def _unbiased(n: int, product: Array, rows_x: Array, rows_y: Array) -> Array:
    xp = array_namespace(product)
    of_rows = xp.sum(rows_x * rows_y, axis=-1)
    of_totals = xp.sum(rows_x, axis=-1) * xp.sum(rows_y, axis=-1)
    return (product + of_totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * of_rows) / (n * (n - 3))


_ESTIMATES = {"unbiased": _unbiased, "biased": _biased}


def _sums(
    gram_x: _Gram,
    gram_y: _Gram,
    *,
    diagonal: bool,
    block_size: int | None,
    squares: bool = False,
) -> _Sums:
    """Sums over the blocks on and above the diagonal; those below are their mirror images."""
    xp = gram_x.xp
    blocks = _blocks(gram_x, gram_y, block_size)
    trained = any(_may_need_gradient(gram) for gram in (gram_x, gram_y))
    part = _recomputed if trained and len(blocks) > 1 else _block_sums
    products: list[Any] = [0.0] * (3 if squares else 1)
    rows_x: list[Any] = [0.0] * len(blocks)
    rows_y: list[Any] = [0.0] * len(blocks)
    for i, j in _upper(len(blocks)):
        sums = part(gram_x, gram_y, blocks[i], blocks[j], diagonal, squares)
        weight = 1 if i == j else 2
        for p, product in enumerate(sums.products):
            products[p] = products[p] + weight * product
        rows_x[i], rows_y[i] = rows_x[i] + sums.rows_x, rows_y[i] + sums.rows_y
        if i != j:
            rows_x[j], rows_y[j] = rows_x[j] + sums.columns_x, rows_y[j] + sums.columns_y
    return _Sums(xp.concat(rows_x, axis=-1), xp.concat(rows_y, axis=-1), *products)


class _BlockSums(NamedTuple):
    products: tuple[Array, ...]
    rows_x: Array
    rows_y: Array
    columns_x: Array
    columns_y: Array


def _block_sums(
    gram_x: _Gram, gram_y: _Gram, rows: slice, columns: slice, diagonal: bool, squares: bool
) -> _BlockSums:
    xp = gram_x.xp
    in_x, in_y = (
        xp.astype(gram.block(rows, columns), xp.float64, copy=False) for gram in (gram_x, gram_y)
    )
    if rows is columns and not diagonal:
        off = 1 - xp.eye(in_x.shape[-1], dtype=xp.float64, device=device(in_x))
        in_x, in_y = in_x * off, in_y * off
    pairs = ((in_x, in_y), (in_x, in_x), (in_y, in_y)) if squares else ((in_x, in_y),)
    products = tuple(xp.sum(xp.linalg.vecdot(a, b), axis=-1) for a, b in pairs)
    return _BlockSums(
        products, *(xp.sum(values, axis=axis) for axis in (-1, -2) for values in (in_x, in_y))
    )


def _recomputed(*arguments: Any) -> _BlockSums:
    """`_block_sums`, of which autograd keeps nothing but the samples."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(_block_sums, *arguments, use_reentrant=False, preserve_rng_state=False)


def _may_need_gradient(gram: _Gram) -> bool:
    if not is_torch_array(gram.points):
        return False
    import torch

    # A callable may have parameters of its own.
    learned = gram.points.requires_grad or not isinstance(gram.kernel, str)
    return torch.is_grad_enabled() and learned


def _blocks(gram_x: _Gram, gram_y: _Gram, block_size: int | None) -> list[slice]:
    n = gram_x.n
    if block_size is None:
        entries = max(1, math.prod(np.broadcast_shapes(gram_x.batch, gram_y.batch)))
        size = _default_block(n, entries, on_cpu=_is_on_cpu(gram_x.points))
    else:
        size = _integer(block_size, "block_size", 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _default_block(n: int, entries: int, *, on_cpu: bool) -> int:
    # A processor is fastest where blocks stay in its cache. An accelerator wants much at once: two
    # two whole matrices of 512 MB, or exponents, both kernels and their product in 256 MB.
    whole, part = (2**17, 2**17) if on_cpu else (2**25, 2**23)
    return n if entries * n**2 <= whole else max(1, math.isqrt(part // entries))


def _is_on_cpu(x: Array) -> bool:
    return not is_torch_array(x) or x.device.type == "cpu"


def _upper(count: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(count) for j in range(i, count))


def _pair(
    x: Any,
    y: Any,
    kernels: tuple[Kernel, Kernel],
    bandwidths: tuple[Any, Any],
    *,
    least: int,
) -> tuple[_Gram, _Gram]:
    """Check both samples, and that they belong together."""
    gram_x = _gram(x, "x", kernels[0], bandwidths[0])
    gram_y = _gram(y, "y", kernels[1], bandwidths[1])
    _check_same_kind(gram_x.points, gram_y.points)
    if gram_x.n != gram_y.n:
        raise ValueError(
            f"x and y must have the same number of samples, got {gram_x.n} and {gram_y.n}"
        )
    if gram_x.n < least:
        raise ValueError(f"there must be at least {least} samples, got {gram_x.n}")
    try:
        np.broadcast_shapes(gram_x.batch, gram_y.batch)
    except ValueError:
        raise ValueError(
            f"batch dimensions of x and y must broadcast, got {gram_x.batch} and {gram_y.batch}"
        ) from None
    return gram_x, gram_y


def _check_estimator(estimator: str) -> None:
    if estimator not in _ESTIMATES:
        raise ValueError(f"estimator must be one of {', '.join(_ESTIMATES)}, got {estimator!r}")


def _check_not_constant(name: str, own: Array, mean_square: Array) -> None:
    """Refuse a criterion of a sample with itself that is no more than rounding."""
    xp = array_namespace(own)
    own, mean_square = _constant(own), _constant(mean_square)
    if bool(xp.any(own <= _ROUNDING * mean_square)):
        raise ValueError(
            f"{name} must not be constant (nor all different, under the delta kernel): its HSIC "
            f"with itself is {float(xp.min(own)):.3g}, and nothing can be aligned with it"
        )


_ROUNDING = 1e-13
