r"""Random matrices and convolution kernels that keep the length of every vector.

:math:`\lVert Wx \rVert = \lVert x \rVert` for all x is the same as :math:`W^\top W = I`. A matrix
drawn uniformly among these is the Q of a Gaussian matrix with a positive diagonal of R. Of its
Householder reflections each is that of a Gaussian vector one shorter than the last, independent of
the others: so these are drawn and nothing is factorised. Their product is two matrix products and
a triangular solve,

.. math::
    Q = I - V T^{-1} V^\top, \qquad T = \operatorname{striu}(V^\top V) + I,
    \qquad \lVert v_k \rVert^2 = 2,

which run at full speed where QR does not, and are as exact as the floating-point numbers.

A convolution whose flattened weight is orthogonal keeps no length. It does so if its transfer
function :math:`H(z)` has orthonormal columns for all :math:`|z| = 1`, as the product of an
orthogonal matrix and of factors :math:`P + (I - P) z` with projectors P has.

Source: https://kexue.fm/archives/7180 (从几何视角来理解模型参数的初始化策略),
https://arxiv.org/abs/math-ph/0609050 (Haar measure by QR), https://doi.org/10.1137/0717034
(Stewart: by reflections), https://arxiv.org/abs/1806.05393 (delta-orthogonal convolutions).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.nn.init.arguments import choice, finite_number
from kexue.nn.init.fans import _check_floating, _fans, _working_dtype

__all__ = ["convolution_orthogonal_", "delta_orthogonal_", "orthogonal_"]

Preserve: TypeAlias = Literal["isometry", "norm", "second_moment"]


@torch.no_grad()
def orthogonal_(
    tensor: Float[Tensor, "outputs inputs *rest"],
    gain: float = 1.0,
    *,
    preserve: Preserve = "isometry",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "outputs inputs *rest"]:
    r"""Fill a weight with a random orthogonal matrix, in place.

    A weight of shape (out, \*rest) is a matrix of m = out rows and n = prod(rest) columns. With
    m >= n its columns are orthonormal and every vector keeps its length; with m < n, where that is
    impossible, its rows are. The matrix is uniform (Haar) among all of these. ``preserve`` says
    what to do about m ≠ n:

    ===============  =============================  ====================================
    preserve         factor                         what stays
    ===============  =============================  ====================================
    "isometry"       1                              the length where m >= n
    "norm"           :math:`\sqrt{n/m}` if m < n    the length; on average where m < n
    "second_moment"  :math:`\sqrt{m/n}` if m > n    the mean square of the components
    ===============  =============================  ====================================

    A weight that stacks several matrices (the gates of an LSTM, the packed projections of
    attention) wants one call per block. A convolution wants :func:`delta_orthogonal_` or
    :func:`convolution_orthogonal_`.

    Parameters
    ----------
    tensor : Tensor, shape (out, \*rest)
        Weight of at least two dimensions and of any floating dtype and device.
    gain : float, optional
        Factor of the matrix, such as :func:`activation_gain` gives.
    preserve : {"isometry", "norm", "second_moment"}, optional
        Scale of a matrix that is not square.
    generator : torch.Generator, optional
        Source of the draw, on the device of ``tensor``.

    Returns
    -------
    Tensor, shape (out, \*rest)
        The same tensor; without entries or on the meta device as it was.

    Raises
    ------
    TypeError
        For a tensor that is not real and floating, or a gain that is no number.
    ValueError
        For fewer than two dimensions, a gain that is not finite, or another ``preserve``.

    Examples
    --------
    >>> weight = orthogonal_(torch.empty(5, 3), generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(weight.T @ weight, torch.eye(3), atol=1e-6)
    True
    """
    _check_floating(tensor)
    columns, _ = _fans(tensor)
    gain = finite_number("gain", gain)
    choice("preserve", preserve, get_args(Preserve))
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    rows = len(tensor)
    matrix = _haar(max(rows, columns), min(rows, columns), tensor, generator)
    if rows < columns:
        matrix = matrix.mT
    if preserve == "norm" and rows < columns:
        gain *= math.sqrt(columns / rows)
    elif preserve == "second_moment" and rows > columns:
        gain *= math.sqrt(rows / columns)
    return tensor.copy_((matrix * gain).reshape(tensor.shape))


@torch.no_grad()
def delta_orthogonal_(
    tensor: Float[Tensor, "outputs inputs *kernel"],
    gain: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "outputs inputs *kernel"]:
    r"""Fill the kernel of a convolution with one orthogonal tap, in place.

    The tap at (k - 1)//2 of each axis has orthonormal columns, all others are 0: each pixel's
    vector of channels keeps its length. With odd k and padding (k - 1)/2 this is exact for every
    image, and neighbours are mixed only once training begins.

    Parameters
    ----------
    tensor : Tensor, shape (out, in, \*kernel)
        Weight of a convolution of one to three axes with stride 1 and out >= in. Transposed
        convolutions store (in, out, \*kernel): pass ``weight.transpose(0, 1)`` only if it is the
        layer's adjoint that must keep lengths.
    gain : float, optional
        Factor of the kernel.
    generator : torch.Generator, optional
        Source of the draw, on the device of ``tensor``.

    Returns
    -------
    Tensor, shape (out, in, \*kernel)
        The same tensor; without entries or on the meta device as it was.

    Raises
    ------
    TypeError
        For a tensor that is not real and floating, or a gain that is no number.
    ValueError
        For other than three to five dimensions, more inputs than outputs, or a gain that is not
        finite.

    Examples
    --------
    >>> kernel = delta_orthogonal_(torch.empty(4, 2, 3, 3))
    >>> int(kernel.count_nonzero()), torch.allclose(kernel.square().sum(), torch.tensor(2.0))
    (8, True)
    """
    gain = _check_kernel(tensor, gain)
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    tap = _haar(len(tensor), tensor.shape[1], tensor, generator)
    centre = tensor.zero_()
    for size in tensor.shape[2:]:
        centre = centre.select(2, (size - 1) // 2)
    centre.copy_(tap * gain)
    return tensor


@torch.no_grad()
def convolution_orthogonal_(
    tensor: Float[Tensor, "outputs inputs *kernel"],
    gain: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "outputs inputs *kernel"]:
    r"""Fill the kernel of a convolution with a random isometry that uses all its taps, in place.

    The transfer function is

    .. math::
        H(z) = \Bigl(\prod_{a} \prod_{j=1}^{k_a - 1} \bigl(P_{aj} + (I - P_{aj})\, z_a\bigr)\Bigr) Q

    with Q of orthonormal columns and random projectors of rank out // 2; every factor is unitary
    for :math:`|z_a| = 1`. So with stride 1 and circular padding, or zero padding of k - 1 on both
    sides, the convolution keeps the length of every image.

    Parameters
    ----------
    tensor : Tensor, shape (out, in, \*kernel)
        Weight of a convolution of one to three axes with stride 1 and out >= in. With one output
        the only such kernels are shifts. For transposed convolutions see
        :func:`delta_orthogonal_`.
    gain : float, optional
        Factor of the kernel.
    generator : torch.Generator, optional
        Source of the draws, on the device of ``tensor``.

    Returns
    -------
    Tensor, shape (out, in, \*kernel)
        The same tensor, computed in float64; without entries or on the meta device as it was.

    Raises
    ------
    TypeError
        For a tensor that is not real and floating, or a gain that is no number.
    ValueError
        For other than three to five dimensions, more inputs than outputs, or a gain that is not
        finite.

    Examples
    --------
    >>> kernel = convolution_orthogonal_(torch.empty(4, 2, 3, dtype=torch.float64))
    >>> signal = torch.randn(2, 20, dtype=torch.float64)
    >>> longer = torch.nn.functional.conv1d(signal, kernel, padding=2)
    >>> torch.allclose(longer.norm(), signal.norm())
    True
    """
    gain = _check_kernel(tensor, gain)
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    outputs, inputs, *sizes = tensor.shape
    double = tensor.new_empty(0, dtype=torch.float64)
    kernel = _haar(outputs, inputs, double, generator).reshape(outputs, inputs, *[1] * len(sizes))
    for axis, size in enumerate(sizes, start=2):
        for _ in range(size - 1):
            # P projects on the span of the first columns of a uniform orthogonal matrix.
            span = _haar(outputs, outputs // 2, double, generator)
            stay = torch.tensordot(span, torch.tensordot(span.mT, kernel, 1), 1)
            nothing = torch.zeros_like(kernel.narrow(axis, 0, 1))
            kernel = torch.cat([stay, nothing], axis) + torch.cat([nothing, kernel - stay], axis)
    return tensor.copy_(kernel * gain)


def _check_kernel(tensor: Tensor, gain: float) -> float:
    _check_floating(tensor)
    if not 3 <= tensor.ndim <= 5:
        raise ValueError(
            "tensor must have shape (out, in, *kernel) with one to three axes, "
            f"got {tuple(tensor.shape)}"
        )
    gain = finite_number("gain", gain)
    outputs, inputs = tensor.shape[:2]
    if tensor.numel() and inputs > outputs:
        raise ValueError(
            "an isometric convolution needs at least as many outputs as inputs, "
            f"got out = {outputs} and in = {inputs}"
        )
    return gain


def _haar(rows: int, columns: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform matrix with orthonormal columns, rows >= columns, precise to the dtype of `like`."""
    # Products under autocast would be rounded to half precision.
    with torch.autocast(like.device.type, enabled=False):
        gaussian = torch.randn(
            columns, rows, dtype=_working_dtype(like), device=like.device, generator=generator
        )
        basis = _reflect(gaussian.clone())
        if gaussian.dtype == torch.float64 or _keeps_lengths(basis):
            return basis
        # The user lets float32 products be rounded (TF32, bfloat16).
        return _reflect(gaussian.double())


def _reflect(gaussian: Tensor) -> Tensor:
    """Product of the reflections that the rows of a Gaussian matrix define; it is overwritten.

    Row k from its k-th entry on is a Gaussian vector x, and H_k = I - v v' sends it to a multiple
    of e_k. H_1 ... H_n is I - V' T^-1 V with T the upper triangle of V V' and ones on its diagonal.
    """
    columns, rows = gaussian.shape
    vectors = gaussian.triu_()
    # An exact 0, once in 10^7 draws of float32, would have no direction where it stands alone.
    first = vectors.diagonal() + 1e-15
    length = torch.linalg.vector_norm(vectors, dim=1)
    sign = first.sign()
    head = (1 + first.abs() / length).sqrt()
    vectors *= (sign / (length * head))[:, None]
    vectors.diagonal().copy_(head)
    # Blocks leave out what is known to be 0.
    blocks = [slice(start, start + _BLOCK) for start in range(0, columns, _BLOCK)]
    triangle = vectors.new_empty(columns, columns)
    for block in blocks:
        triangle[: block.stop, block] = (
            vectors[: block.stop, block.start :] @ vectors[block, block.start :].mT
        )
    # Columns take the sign that makes R positive.
    weights = sign * torch.linalg.solve_triangular(
        triangle, vectors[:, :columns], upper=True, unitriangular=True
    )
    basis = vectors.new_empty(rows, columns)
    for block in blocks:
        basis[:, block] = vectors[: block.stop].mT @ weights[: block.stop, block]
    basis.diagonal().sub_(sign)
    return basis


_BLOCK = 256


def _keeps_lengths(basis: Tensor) -> bool:
    """Whether one vector comes back from Q'Q as exactly as float32 can be expected to say."""
    ones = basis.new_ones(basis.shape[1])
    error = (basis.mT @ (basis @ ones) - ones).abs()
    # Rounding errors of the entries of Q'Q, at most 1e-7 each, add up like a random walk; those of
    # shorter formats are a thousand times larger.
    return bool((error <= 1e-5 + 1e-6 * math.sqrt(len(ones))).all())
