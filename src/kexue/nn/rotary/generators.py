r"""Rotary position embeddings as matrix exponentials, and what they all come down to.

Matrices :math:`R_p = \exp(\sum_a p_a B_a)` with skew-symmetric generators that commute satisfy
:math:`R_a^\top R_b = R_{b-a}`. Such generators have planes in common:

.. math::
    B_a = Q \Bigl(\bigoplus_k F_{ka} J\Bigr) Q^\top, \qquad
    J = \begin{pmatrix} 0 & -1 \\ 1 & 0 \end{pmatrix},

with one orthogonal Q for all axes, which the projections of queries and keys can absorb. What is
left is the table F of frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.nn.rotary.layout import Layout, _as_pairs, _kind, _pair_axis

__all__ = [
    "RotaryDecomposition",
    "decompose_rotary_generators",
    "rotary_generators",
    "rotary_matrix",
]


class RotaryDecomposition(NamedTuple):
    """Common planes of commuting skew-symmetric matrices, and how fast each one turns.

    Attributes
    ----------
    basis : Tensor, shape (dim, dim)
        Orthogonal Q with plane k in its columns 2k and 2k + 1; for odd dim the last column is at
        rest.
    frequencies : Tensor, shape (dim // 2, axes)
        F: the frequency of each plane along each axis.

    Examples
    --------
    >>> plane = RotaryDecomposition(basis=torch.eye(2), frequencies=torch.ones(1, 1))
    >>> rotary_generators(plane.frequencies, basis=plane.basis)
    tensor([[[ 0., -1.],
             [ 1.,  0.]]])
    """

    basis: Tensor
    frequencies: Tensor


def rotary_generators(
    frequencies: Float[Tensor, "planes axes"],
    *,
    layout: Layout = "interleaved",
    basis: Float[Tensor, "dim dim"] | None = None,
) -> Float[Tensor, "axes dim dim"]:
    r"""Return the skew-symmetric matrices that generate a rotary position embedding.

    Parameters
    ----------
    frequencies : Tensor, shape (planes, axes)
        Radians by which each plane turns per unit of each coordinate.
    layout : {"interleaved", "half"}
        Plane k is made of features 2k and 2k + 1, or k and k + planes.
    basis : Tensor, shape (dim, dim), optional
        Orthogonal Q, whose columns are the features that ``layout`` speaks of: the result is
        :math:`Q B Q^\top`. With dim = 2 planes + 1 the last column is at rest.

    Returns
    -------
    Tensor, shape (axes, dim, dim)
        For a plane of features (a, b): B[b, a] = F and B[a, b] = -F.

    Raises
    ------
    ValueError
        If an argument is no finite real matrix of these shapes, the basis is not orthogonal, or the
        layout has another name.

    Examples
    --------
    >>> rotary_generators(torch.tensor([[3.0], [0.5]]))[0]
    tensor([[ 0.0000, -3.0000,  0.0000,  0.0000],
            [ 3.0000,  0.0000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000, -0.5000],
            [ 0.0000,  0.0000,  0.5000,  0.0000]])
    """
    pair_axis = _pair_axis(layout)
    if not _is_finite_real(frequencies) or frequencies.ndim != 2 or 0 in frequencies.shape:
        raise ValueError(
            "frequencies must be finite floating-point numbers of shape (planes, axes), got "
            f"{_kind(frequencies)}"
        )
    planes, axes = frequencies.shape
    dim = 2 * planes
    if basis is not None:
        _check_basis(basis, dim)
        dim = len(basis)
    pairs = _as_pairs(torch.arange(2 * planes, device=frequencies.device), pair_axis)
    a, b = pairs.unbind(pair_axis)
    upper = frequencies.new_zeros(axes, dim, dim).index_put(
        (torch.arange(axes, device=a.device)[:, None], a, b), -frequencies.T
    )
    generators = upper - upper.mT
    if basis is None:
        return generators
    basis = basis.to(generators)
    return basis @ generators @ basis.mT


def rotary_matrix(
    positions: Real[Tensor, "*batch axes"],
    generators: Float[Tensor, "axes dim dim"],
    *,
    atol: float = 1e-8,
    check: bool = True,
) -> Float[Tensor, "*batch dim dim"]:
    r"""Return the matrices :math:`R_p = \exp(\sum_a p_a B_a)`.

    With B skew-symmetric and commuting they are rotations with :math:`R_a^\top R_b = R_{b-a}`. This
    is the definition, for proofs and experiments: :class:`RotaryEmbedding` does the same in linear
    time.

    Parameters
    ----------
    positions : Tensor, shape (..., axes)
        Coordinates, integer or floating-point.
    generators : Tensor, shape (axes, dim, dim)
        One matrix for each coordinate.
    atol : float
        Largest entry of :math:`B + B^\top` and of commutators that passes, besides the rounding of
        the generators' dtype.
    check : bool
        False skips these two checks, to look at matrices that are no rotary embedding.

    Returns
    -------
    Tensor, shape (..., dim, dim)
        In the dtype of the generators, and differentiable.

    Raises
    ------
    ValueError
        If an argument is no finite real tensor of these shapes, or, where that is checked, a
        generator is not skew-symmetric or two of them do not commute.

    Examples
    --------
    >>> generators = rotary_generators(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> rotary_matrix(torch.tensor([torch.pi, 0.0]), generators).round(decimals=4).diagonal()
    tensor([-1., -1.,  1.,  1.])
    """
    _check_generators(generators, atol if check else None)
    axes = len(generators)
    if not isinstance(positions, Tensor) or positions.is_complex():
        raise ValueError(f"positions must be real, of shape (..., {axes}), got {_kind(positions)}")
    if positions.ndim < 1 or positions.shape[-1] != axes or not positions.isfinite().all():
        raise ValueError(
            f"positions must be finite, one number for each of {axes} generators, of shape "
            f"(..., {axes}), got {_kind(positions)}"
        )
    exponents = torch.einsum("...a,aij->...ij", positions.to(generators), generators)
    return torch.matrix_exp(exponents)


def decompose_rotary_generators(
    generators: Float[Tensor, "axes dim dim"], *, atol: float = 1e-8
) -> RotaryDecomposition:
    r"""Return the planes and frequencies of commuting skew-symmetric matrices.

    Every rotary position embedding is a table of frequencies F in some orthogonal basis Q: this
    finds both. Where joint frequencies repeat, the planes are one choice among many; their order
    and the signs of rows of F are free in any case.

    Parameters
    ----------
    generators : Tensor, shape (axes, dim, dim)
        Matrices B, one for each coordinate.
    atol : float
        Largest entry of :math:`B + B^\top` and of commutators that passes, besides the rounding of
        the generators' dtype.

    Returns
    -------
    RotaryDecomposition
        ``basis`` (dim, dim) and ``frequencies`` (dim // 2, axes), with
        ``rotary_generators(frequencies, basis=basis)`` equal to the input.

    Raises
    ------
    ValueError
        If the generators are no finite real tensor of this shape, not skew-symmetric, or do not
        commute.

    Examples
    --------
    >>> turned = rotary_generators(torch.tensor([[0.0], [2.0]]), basis=torch.eye(4).flip(0))
    >>> decompose_rotary_generators(turned).frequencies.abs()
    tensor([[2.],
            [0.]])
    """
    _check_generators(generators, atol)
    exact = generators.detach().double()
    exact = (exact - exact.mT) / 2
    # Planes that differ along some axis must differ in the combination: weights without a pattern.
    generic = torch.rand(len(exact), generator=torch.Generator().manual_seed(0), dtype=exact.dtype)
    combination = torch.einsum("a,aij->ij", 1 + generic.to(exact.device), exact)
    # i·B is Hermitian. B (x + iy) = -iλ (x + iy) says B x = λ y and B y = -λ x.
    eigenvalues, eigenvectors = torch.linalg.eigh(1j * combination)
    rounding = 8 * exact.shape[-1] * torch.finfo(exact.dtype).eps * eigenvalues[-1]
    turning = eigenvectors[:, eigenvalues > rounding].flip(-1)
    planes = torch.view_as_real(turning).flatten(-2)
    # From the fastest plane on, orthonormalisation takes out what rounding mixed into the slow
    # ones; its complement is what stands still.
    basis = torch.linalg.qr(planes, mode="complete").Q
    paired = basis[:, : basis.shape[-1] // 2 * 2]
    x, y = paired[:, 0::2], paired[:, 1::2]
    frequencies = torch.einsum("ik,aij,jk->ka", y, exact, x)
    return RotaryDecomposition(basis.to(generators), frequencies.to(generators))


def _is_finite_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and bool(x.isfinite().all())


def _check_basis(basis: Tensor, dim: int) -> None:
    square = isinstance(basis, Tensor) and basis.shape in ((dim, dim), (dim + 1, dim + 1))
    if not square or not _is_finite_real(basis):
        raise ValueError(
            f"basis must be a finite real matrix with {dim} or {dim + 1} rows and columns, got "
            f"{_kind(basis)}"
        )
    error = (basis.mT @ basis - torch.eye(len(basis)).to(basis)).detach().abs().max()
    if error > 100 * dim * torch.finfo(basis.dtype).eps:
        raise ValueError(f"basis must be orthogonal, got a product Q^T Q that is {error:.2g} off")


def _check_generators(generators: Tensor, atol: float | None) -> None:
    """Check the shape, and within ``atol`` that generators are skew-symmetric and commute."""
    if not _is_finite_real(generators) or generators.ndim != 3 or 0 in generators.shape:
        raise ValueError(
            "generators must be finite floating-point numbers of shape (axes, dim, dim), got "
            f"{_kind(generators)}"
        )
    if generators.shape[1] != generators.shape[2]:
        raise ValueError(f"generators must be square matrices, got {tuple(generators.shape)}")
    if atol is None:
        return
    exact = generators.detach().double()
    # A generator Q B Q^T is a product of rounded matrices, so its rounding grows with their size.
    rounding = 8 * exact.shape[-1] * torch.finfo(generators.dtype).eps
    scale = exact.abs().max()
    asymmetry = (exact + exact.mT).abs().max()
    if asymmetry > atol + rounding * scale:
        raise ValueError(
            f"generators must be skew-symmetric, got one with B + B^T up to {asymmetry:.4g}"
        )
    products = exact[:, None] @ exact[None, :]
    commutator = (products - products.transpose(0, 1)).abs().max()
    if commutator > atol + rounding * scale**2 * exact.shape[-1]:
        raise ValueError(
            f"generators must commute, got a commutator with entries up to {commutator:.10g}"
        )
