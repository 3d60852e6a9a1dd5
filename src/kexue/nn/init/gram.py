r"""How far a matrix is from orthogonal, and how far a random one is expected to be.

Independent entries of mean 0, variance 1/m and kurtosis κ make an m × n matrix nearly orthogonal,
entry by entry:

.. math::
    \frac{1}{n^2}\, \mathbb{E} \lVert W^\top W - I \rVert_F^2 = \frac{n + \kappa - 2}{m\,n}.

"Nearly" does not mean close as an operator. The singular values fill
:math:`[\,\lvert 1 - \sqrt{n/m} \rvert,\; 1 + \sqrt{n/m}\,]`, for a square matrix all of [0, 2]. One
fixed vector keeps its length in a layer up to a factor whose logarithm has mean -1/(2n) and
variance 1/(2n); over L layers this is a random walk of standard deviation :math:`\sqrt{L/(2n)}`,
and the singular values of the product spread exponentially. Exactly orthogonal matrices keep every
singular value at 1 at any depth.

The variance 1/m, over the number of *outputs*, preserves the length of a vector; LeCun's 1/n, over
the number of inputs, preserves the mean square of its components.

Source: https://kexue.fm/archives/7180 (从几何视角来理解模型参数的初始化策略).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.nn.init.arguments import count, finite_number
from kexue.nn.init.fans import _check_floating, _working_dtype

__all__ = ["SingularValueRange", "expected_gram_error", "gram_error", "singular_value_range"]


@dataclass(frozen=True)
class SingularValueRange:
    """Ends of the interval that the singular values of a large random matrix fill.

    Parameters
    ----------
    smallest, largest : float
        In multiples of the length of the vector that is multiplied.

    Examples
    --------
    >>> singular_value_range(100, 100).largest
    2.0
    """

    smallest: float
    largest: float


def gram_error(weight: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""Return the mean square of the entries of :math:`W^\top W - I`.

    0 for orthonormal columns, and compared with :func:`expected_gram_error` for random entries. It
    is differentiable, so it also serves as a penalty. A small value does not bound the singular
    values: a square Gaussian matrix of 100 columns has 0.01 and a norm of 2.

    Parameters
    ----------
    weight : Tensor, shape (..., rows, columns)
        Matrices W, as in :math:`y = Wx`. Half precision is computed in single precision.

    Returns
    -------
    Tensor, shape (...)
        In float64 for float64, else in float32.

    Raises
    ------
    TypeError
        For a weight that is not real and floating.
    ValueError
        For fewer than two dimensions, matrices without entries, and entries that are not finite
        (inside of a compiled graph these give NaN).

    Examples
    --------
    >>> gram_error(2 * torch.eye(3))
    tensor(3.)
    """
    _check_floating(weight, "weight")
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ValueError(
            "weight must have shape (..., rows, columns) with at least one of each, "
            f"got {tuple(weight.shape)}"
        )
    rows, columns = weight.shape[-2:]
    # Looking at values would break a graph in two.
    if not torch.compiler.is_compiling() and not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinite entries")
    size = min(rows, columns)
    identity = torch.eye(size, dtype=_working_dtype(weight), device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        wide = weight.to(identity.dtype)
        # The two Gram matrices share their eigenvalues but for columns - rows zeros.
        gram = wide @ wide.mT if rows < columns else wide.mT @ wide
        square = (gram - identity).square().sum((-2, -1)) + (columns - size)
        return square / columns**2


def expected_gram_error(rows: int, columns: int, *, kurtosis: float = 3.0) -> float:
    r"""Return the mean of :func:`gram_error` over matrices of independent entries.

    :math:`(n + \kappa - 2)/(mn)` for entries of mean 0, variance 1/m and kurtosis κ, in any number
    of dimensions. Off the diagonal the mean square is 1/m, on it (κ - 1)/m. With variance 1/n and
    m ≠ n the diagonal would not even be centred on 1.

    Parameters
    ----------
    rows, columns : int
        Shape m × n of the matrix, (out, in).
    kurtosis : float, optional
        Fourth moment over squared variance: 3 for normal entries, 1.8 for uniform ones, 1 for
        signs.

    Returns
    -------
    float
        The expected mean square of the entries of :math:`W^\top W - I`.

    Raises
    ------
    TypeError
        For a shape of other than integers, or a kurtosis that is no number.
    ValueError
        For a shape or a kurtosis below 1, which no distribution has.

    Examples
    --------
    >>> expected_gram_error(100, 100)
    0.0101
    """
    rows, columns = count("rows", rows), count("columns", columns)
    kurtosis = finite_number("kurtosis", kurtosis)
    if kurtosis < 1:
        raise ValueError(f"kurtosis must be at least 1, as that of every law is, got {kurtosis}")
    return (columns + kurtosis - 2) / (rows * columns)


def singular_value_range(rows: int, columns: int) -> SingularValueRange:
    r"""Return the interval that the singular values of a random matrix fill.

    The limit law (Marchenko–Pastur) for independent entries of variance 1/m in m rows and n
    columns: :math:`\lvert 1 - \sqrt{n/m} \rvert` to :math:`1 + \sqrt{n/m}`. With m < n these are
    the m singular values beside n - m directions that are lost.

    Parameters
    ----------
    rows, columns : int
        Shape m × n of the matrix, (out, in).

    Returns
    -------
    SingularValueRange
        Both ends.

    Raises
    ------
    TypeError
        For a shape of other than integers.
    ValueError
        For a shape below 1.

    Examples
    --------
    >>> singular_value_range(400, 100)
    SingularValueRange(smallest=0.5, largest=1.5)
    """
    root = math.sqrt(count("columns", columns) / count("rows", rows))
    return SingularValueRange(abs(1 - root), 1 + root)
