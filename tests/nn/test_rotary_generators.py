"""Generators, their exponentials and their common planes: the theory, executed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.nn.rotary import (
    RotaryDecomposition,
    RotaryEmbedding,
    decompose_rotary_generators,
    rotary_frequencies,
    rotary_generators,
    rotary_matrix,
)

EPS = torch.finfo(torch.float64).eps
WRITTEN = 6e-11
# Left multiplication by the quaternions i and j, on (1, i, j, k).
I = [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]]  # noqa: E741
J = [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]]
QUATERNIONS = torch.tensor([I, J], dtype=torch.float64)


def article(b: float, c: float, f: float) -> Tensor:
    """The article's solutions of size 4: B_1 without the last coordinate, B_2 only with it."""
    first = torch.zeros(4, 4, dtype=torch.float64)
    first[0, 1], first[0, 2], first[1, 2] = 1.0, b, c
    second = torch.zeros(4, 4, dtype=torch.float64)
    second[0, 3], second[1, 3], second[2, 3] = c * f, -b * f, f
    return torch.stack([first - first.T, second - second.T])


def orthogonal(dim: int, seed: int) -> Tensor:
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(gaussian).Q


def at(x: float, y: float) -> Tensor:
    return torch.tensor([x, y], dtype=torch.float64)


def test_quaternion_rotations_are_not_relative() -> None:
    i, j = QUATERNIONS
    assert torch.equal(i @ j, -j @ i)
    assert (i @ j - j @ i).abs().max() == 2.0
    here, there, between = (
        rotary_matrix(p, QUATERNIONS, check=False) for p in (at(1, 2), at(3, 1), at(2, -1))
    )
    violation = here.T @ there - between
    assert abs(violation.abs().max() - 1.2229071293) < WRITTEN
    assert abs(violation.norm() - 3.3066465217) < WRITTEN


def test_a_quaternion_that_is_checked_is_told_its_commutator() -> None:
    with pytest.raises(ValueError, match=r"commute.*up to 2$"):
        rotary_matrix(at(1, 2), QUATERNIONS)
    with pytest.raises(ValueError, match=r"commute.*up to 2$"):
        decompose_rotary_generators(QUATERNIONS)


def test_the_articles_family_commutes_and_is_axial_in_another_basis() -> None:
    b, c, f = 0.3, -0.7, 1.9
    generators = article(b, c, f)
    commutator = generators[0] @ generators[1] - generators[1] @ generators[0]
    assert commutator.abs().max() < 4 * EPS
    basis, frequencies = decompose_rotary_generators(generators)
    speeds = frequencies.abs()
    along_x, along_y = speeds[speeds[:, 0].argmax()], speeds[speeds[:, 1].argmax()]
    assert abs(along_x[0] - 1.2569805090) < WRITTEN
    assert abs(along_y[1] - 2.3882629671) < WRITTEN
    assert along_x[1] < 8 * EPS
    assert along_y[0] < 8 * EPS
    length = math.sqrt(1 + b**2 + c**2)
    torch.testing.assert_close(
        torch.stack([along_x[0], along_y[1]]), at(length, f * length), rtol=16 * EPS, atol=0
    )
    again = rotary_generators(frequencies, basis=basis)
    torch.testing.assert_close(again, generators, rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("kind", ["axial", "mixed", "in another basis"])
def test_commuting_generators_are_relative(kind: str) -> None:
    basis = orthogonal(8, 1) if kind == "in another basis" else None
    table = RotaryEmbedding(8, axes=2).frequencies if kind == "axial" else orthogonal(4, 2)[:, :2]
    generators = rotary_generators(table, basis=basis)
    here, there, between = (
        rotary_matrix(p, generators) for p in (at(3.5, -2), at(1, 7), at(-2.5, 9))
    )
    # Three exponentials of norms up to 10 with relative rounding of a few units each.
    assert (here.T @ there - between).abs().max() < 1e-13
    assert (here.T @ here - torch.eye(8)).abs().max() < 1e-13


def test_frequencies_of_rank_one_lose_one_of_two_coordinates() -> None:
    lossy = rotary_generators(torch.tensor([[1.0, 1.0], [0.1, 0.1]], dtype=torch.float64))
    assert torch.linalg.matrix_rank(decompose_rotary_generators(lossy).frequencies) == 1
    assert torch.equal(rotary_matrix(at(1, 4), lossy), rotary_matrix(at(2, 3), lossy))
    axial = RotaryEmbedding(4, axes=2).generators()
    assert torch.linalg.matrix_rank(decompose_rotary_generators(axial).frequencies) == 2


@settings(deadline=None, max_examples=100)
@given(
    dim=st.integers(2, 9),
    axes=st.integers(1, 3),
    values=st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e-3, 1e-7]), min_size=12, max_size=12),
    seed=st.integers(0, 1000),
)
def test_decomposition_finds_planes_of_repeated_and_zero_frequencies(
    dim: int, axes: int, values: list[float], seed: int
) -> None:
    planes = dim // 2
    table = torch.tensor(values, dtype=torch.float64)[: planes * axes].reshape(planes, axes)
    generators = rotary_generators(table, basis=orthogonal(dim, seed))
    basis, frequencies = decompose_rotary_generators(generators)
    assert basis.shape == (dim, dim)
    assert frequencies.shape == (planes, axes)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=16 * dim * EPS)
    # An eigendecomposition is as exact as rounding of the matrix; mixing of planes whose weighted
    # sums are close (not their joint frequencies) costs a factor, here below 100.
    again = rotary_generators(frequencies, basis=basis)
    torch.testing.assert_close(again, generators, rtol=0, atol=100 * dim * EPS * 2)


def test_decomposition_of_a_head_returns_its_own_frequencies() -> None:
    rope = RotaryEmbedding(64, axes=2)
    basis = orthogonal(64, 3)
    found = decompose_rotary_generators(rotary_generators(rope.frequencies, basis=basis))
    speeds = found.frequencies.norm(dim=1).sort(descending=True).values
    expected = rotary_frequencies(32).repeat_interleave(2)
    # Eigenvalues are exact to rounding of the largest, times a small multiple of the size.
    torch.testing.assert_close(speeds, expected, rtol=0, atol=64 * EPS)


def test_decomposition_of_nothing_is_at_rest() -> None:
    found = decompose_rotary_generators(torch.zeros(2, 5, 5, dtype=torch.float64))
    assert isinstance(found, RotaryDecomposition)
    assert torch.equal(found.frequencies, torch.zeros(2, 2, dtype=torch.float64))
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found.basis.T @ found.basis, identity, rtol=0, atol=4 * EPS)


def test_single_precision_generators_pass_their_own_rounding() -> None:
    table = RotaryEmbedding(16, axes=2).frequencies.float()
    generators = rotary_generators(table, basis=orthogonal(16, 4).float())
    basis, frequencies = decompose_rotary_generators(generators)
    assert basis.dtype == frequencies.dtype == torch.float32
    again = rotary_generators(frequencies, basis=basis)
    torch.testing.assert_close(again, generators, rtol=0, atol=1e-5)
    assert rotary_matrix(torch.tensor([1, 2]), generators).dtype == torch.float32


def test_generators_in_the_half_layout_pair_k_with_k_plus_planes() -> None:
    generators = rotary_generators(torch.tensor([[2.0], [3.0]]), layout="half")[0]
    expected = torch.zeros(4, 4)
    expected[2, 0], expected[0, 2], expected[3, 1], expected[1, 3] = 2.0, -2.0, 3.0, -3.0
    assert torch.equal(generators, expected)


def test_rotary_matrix_in_the_plane_is_the_rotation() -> None:
    generators = rotary_generators(torch.tensor([[1.0]], dtype=torch.float64))
    matrices = rotary_matrix(torch.tensor([[0.5], [-2.0]]), generators)
    for phi, matrix in zip((0.5, -2.0), matrices, strict=True):
        cos, sin = math.cos(phi), math.sin(phi)
        expected = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        torch.testing.assert_close(matrix, expected, rtol=0, atol=8 * EPS)


def test_gradients_flow_through_generators_and_positions() -> None:
    table = orthogonal(3, 5)[:, :2].clone().requires_grad_()
    positions = at(0.3, -0.8).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, p: rotary_matrix(p, rotary_generators(t)), (table, positions)
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("generators", "words"),
    [
        (torch.ones(1, 4, 4), "skew"),
        (torch.ones(4, 4), r"shape \(axes, dim, dim\)"),
        (torch.ones(2, 4, 3), "square"),
        (torch.ones(0, 4, 4), r"shape \(axes, dim, dim\)"),
        (torch.full((1, 2, 2), torch.nan), "finite"),
        (torch.zeros(1, 2, 2).long(), "floating-point"),
    ],
)
def test_wrong_generators_are_refused(generators: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decompose_rotary_generators(generators)
    with pytest.raises(ValueError, match=words):
        rotary_matrix(torch.ones(len(generators)), generators)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("frequencies", "options", "words"),
    [
        (torch.ones(4), {}, r"shape \(planes, axes\)"),
        (torch.ones(2, 1), {"layout": "neox"}, "interleaved, half"),
        (torch.ones(2, 1), {"basis": torch.eye(3)}, "4 or 5 rows"),
        (torch.ones(2, 1), {"basis": torch.ones(4, 4)}, "orthogonal"),
    ],
)
def test_wrong_frequencies_and_bases_are_refused(
    frequencies: Tensor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        rotary_generators(frequencies, **options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "positions", [torch.ones(3), torch.tensor(1.0), torch.tensor([1.0, torch.inf]), [1.0, 2.0]]
)
def test_wrong_positions_of_a_matrix_are_refused(positions: Any) -> None:
    with pytest.raises(ValueError, match="positions must be"):
        rotary_matrix(positions, RotaryEmbedding(4, axes=2).generators())
