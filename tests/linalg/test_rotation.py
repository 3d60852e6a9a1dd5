"""Maps between directions: oracles, identities, every angle, gradients, shapes, kinds, errors."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import jaxtyping
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.spatial.transform import Rotation

from kexue.linalg.rotation import Kind, align, alignment_matrix, angle_between

EPS = np.finfo(float).eps
KINDS: tuple[Kind, ...] = ("rotation", "reflection", "half_turn")

# The pair of the article, and its maps: computed in float64 from the direct formulas, which are
# harmless at this angle, and written down to eight decimals.
A = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
B = np.array([9.0, 8.0, 7.0, 6.0, 5.0])
WRITTEN = 0.5e-8


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def pair_at(angle: float, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors at an angle, or at the angle from opposite where it is negative."""
    a = unit(rng.standard_normal(d))
    across = rng.standard_normal(d)
    across = unit(across - (across @ a) * a)
    across = unit(across - (across @ a) * a)
    b = math.cos(angle) * a + math.sin(abs(angle)) * across
    return a, b if angle >= 0 else -b


def direct(a: np.ndarray, b: np.ndarray, kind: Kind) -> np.ndarray:
    """The closed formulas as the article writes them."""
    identity, c = np.eye(len(a), dtype=a.dtype), a @ b
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "rotation":
            return identity + 2 * np.outer(b, a) - np.outer(a + b, a + b) / (1 + c)
        if kind == "reflection":
            return identity - np.outer(a - b, a - b) / (1 - c)
        return np.outer(a + b, a + b) / (1 + c) - identity


def orthogonality_error(matrix: np.ndarray) -> float:
    wide = matrix.astype(float)
    return float(np.abs(wide @ wide.T - np.eye(len(wide))).max())


def transport_error(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    wide = matrix.astype(float)
    return float(np.linalg.norm(wide @ unit(a.astype(float)) - unit(b.astype(float))))


@pytest.mark.parametrize(
    ("kind", "first_row", "trace"),
    [
        ("rotation", [0.88130838, 0.00531232, 0.12931626, 0.2533202, 0.37732414], 4.60436125749885),
        ("reflection", [0.07068374, -0.50132808, -0.0733399, 0.35464828, 0.78263646], 3.0),
        ("half_turn", [-0.72931626, 0.29867192, 0.3266601, 0.35464828, 0.38263646], -3.0),
    ],
)
def test_maps_of_the_article_s_pair(kind: Kind, first_row: list[float], trace: float) -> None:
    matrix = alignment_matrix(A, B, kind=kind)
    np.testing.assert_allclose(matrix[0], first_row, rtol=0, atol=WRITTEN)
    # A diagonal entry is good to a few EPS, and there are five.
    assert np.trace(matrix) == pytest.approx(trace, abs=32 * EPS)
    np.testing.assert_allclose(matrix, direct(unit(A), unit(B), kind), rtol=0, atol=16 * EPS)


def test_first_column_of_the_article_s_rotation() -> None:
    column = [0.88130838, -0.16356781, -0.20844401, -0.2533202, -0.29819639]
    np.testing.assert_allclose(alignment_matrix(A, B)[:, 0], column, rtol=0, atol=WRITTEN)


def test_half_of_the_article_s_rotation() -> None:
    row = [0.96955466, 0.02418, 0.07880533, 0.13343067, 0.188056]
    half = alignment_matrix(A, B, fraction=0.5)
    np.testing.assert_allclose(half[0], row, rtol=0, atol=WRITTEN)


def test_angle_of_the_article_s_pair() -> None:
    assert angle_between(A, B) == pytest.approx(0.6398578707053, abs=0.5e-13)
    assert math.cos(angle_between(A, B)) == pytest.approx(0.80218062874942, abs=0.5e-14)


def test_axes_are_turned_exactly() -> None:
    quarter = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(alignment_matrix([1, 0, 0], [0, 1, 0]), quarter)
    half = np.diag([-1.0, -1.0, 1.0])
    np.testing.assert_array_equal(alignment_matrix([1, 0, 0], [-1, 0, 0]), half)


def test_undetermined_plane_is_spanned_with_the_axis_most_orthogonal() -> None:
    a = np.array([1.0, 2.0, 2.0])
    half = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
    np.testing.assert_allclose(alignment_matrix(a, -a), half, rtol=0, atol=4 * EPS)
    mirror = np.array([[-7, 4, 4], [4, 8, -1], [4, -1, 8]]) / 9
    np.testing.assert_allclose(
        alignment_matrix(a, a, kind="reflection"), mirror, rtol=0, atol=4 * EPS
    )
    # The first axis is the first of the smallest entries: e = (1, 0, 0) - a/3, up to its length.
    e = unit(np.array([8.0, -2.0, -2.0]))
    bisector = 2 * np.outer(e, e) - np.eye(3)
    np.testing.assert_allclose(
        alignment_matrix(a, -a, kind="half_turn"), bisector, rtol=0, atol=4 * EPS
    )


def test_ties_between_axes_go_to_the_first() -> None:
    a = np.ones(4)
    e = unit(np.eye(4)[0] - 0.25)
    expected = np.eye(4) - np.outer(a, a) / 2 - 2 * np.outer(e, e)
    for vectors in (a, torch.from_numpy(a)):
        turned = np.asarray(alignment_matrix(vectors, -vectors))
        np.testing.assert_allclose(turned, expected, rtol=0, atol=4 * EPS)


@pytest.mark.parametrize("d", [2, 3, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_any_completion_of_the_basis_gives_the_closed_formula(kind: Kind, d: int) -> None:
    rng = np.random.default_rng(d)
    a, b = pair_at(2.0, d, rng)
    c, s = math.cos(2.0), math.sin(2.0)
    in_plane = {"rotation": [[c, -s], [s, c]], "reflection": [[c, s], [s, -c]]}
    in_plane["half_turn"] = in_plane["reflection"]
    for _ in range(3):
        basis = np.linalg.qr(np.column_stack([a, b, rng.standard_normal((d, d - 2))]))[0]
        basis[:, 0], basis[:, 1] = a, (b - c * a) / s
        whole = np.eye(d) if kind != "half_turn" else -np.eye(d)
        whole[:2, :2] = in_plane[kind]
        # The product of three matrices of norm 1 in dimension d adds 2 d roundings.
        np.testing.assert_allclose(
            alignment_matrix(a, b, kind=kind),
            basis @ whole @ basis.T,
            rtol=0,
            atol=(32 + 4 * d) * EPS,
        )


@pytest.mark.parametrize("angle", [1e-3, 0.4, 2.9, math.pi - 1e-3])
def test_scipy_agrees_in_space(angle: float) -> None:
    a, b = pair_at(angle, 3, np.random.default_rng(1))
    theirs = Rotation.align_vectors(b[None], a[None])[0].as_matrix()
    # They divide by the sine.
    np.testing.assert_allclose(alignment_matrix(a, b), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [2, 9])
@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.01, 0.5, 3.1])
@pytest.mark.parametrize("t", [-1.3, 0.0, 1e-3, 0.25, 1.0, 3.0])
def test_fraction_is_the_power_of_the_rotation(d: int, angle: float, t: float) -> None:
    a, b = pair_at(angle, d, np.random.default_rng(2))
    e = b - (a @ b) * a
    e = unit(e - (a @ e) * a)
    theta = math.atan2(e @ b, a @ b)
    power = expm(t * theta * (np.outer(e, a) - np.outer(a, e)))
    # expm scales, squares and solves: some tens of roundings of the angle.
    np.testing.assert_allclose(alignment_matrix(a, b, fraction=t), power, rtol=0, atol=200 * EPS)


@pytest.mark.parametrize("order", [0.3, 0.99, 1.01, 3.0])
@pytest.mark.parametrize("t", [-2.5, 0.4, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_series_of_small_fractions_meets_the_closed_form(
    order: float, t: float, dtype: Any
) -> None:
    # The series serves while (tθ)² is below eps^(1/3); compare on both sides of that in 40 digits.
    eps = float(np.finfo(dtype).eps)
    theta = math.sqrt(order * eps ** (1 / 3)) / max(1.0, abs(t))
    a, b = np.array([1, 0], dtype), np.array([math.cos(theta), math.sin(theta)], dtype)
    with mpmath.workdps(40):
        angle = t * mpmath.atan2(mpmath.mpf(float(b[1])), mpmath.mpf(float(b[0])))
        exact = np.array([[mpmath.cos(angle), -mpmath.sin(angle)],
                          [mpmath.sin(angle), mpmath.cos(angle)]]).astype(float)  # fmt: skip
    matrix = alignment_matrix(a, b, fraction=t)
    np.testing.assert_allclose(matrix, exact, rtol=0, atol=8 * eps * max(1.0, abs(t)))


def test_direct_formula_loses_orthogonality_near_opposite_vectors() -> None:
    def worst(delta: float, dtype: Any, rotation: Any) -> float:
        pairs = [pair_at(-delta, 64, np.random.default_rng(seed)) for seed in range(20)]
        return float(
            np.max(
                [orthogonality_error(rotation(a.astype(dtype), b.astype(dtype))) for a, b in pairs]
            )
        )

    def naive(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return direct(a, b, "rotation")

    # Measured elsewhere with other pairs; all of them are eps/δ² up to a factor that is random.
    for delta, dtype, measured in (
        (1e-3, np.float64, 3.1e-10),
        (1e-6, np.float64, 2.4e-4),
        (1e-2, np.float32, 6.7e-4),
        (1e-3, np.float32, 0.18),
    ):
        assert measured / 10 < worst(delta, dtype, naive) < measured * 10
        assert worst(delta, dtype, alignment_matrix) < 30 * np.finfo(dtype).eps
    for delta, dtype in ((1e-8, np.float64), (1e-4, np.float32)):
        assert not np.isfinite(worst(delta, dtype, naive))
        assert worst(delta, dtype, alignment_matrix) < 30 * np.finfo(dtype).eps


exponents = st.floats(-20, 0.19)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, 0.3, -2.0, 1e5]),
    exponent=exponents,
    opposite=st.booleans(),
    d=st.sampled_from([2, 3, 5, 64, 257]),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([np.float32, np.float64]),
    torch_too=st.booleans(),
)
def test_map_is_orthogonal_and_exact_at_every_angle(
    kind: Any, exponent: float, opposite: bool, d: int, seed: int, dtype: Any, torch_too: bool
) -> None:
    angle = 10.0**exponent
    a, b = pair_at(-angle if opposite else angle, d, np.random.default_rng(seed))
    a, b = a.astype(dtype), (3 * b).astype(dtype)
    options = {"kind": kind} if isinstance(kind, str) else {"fraction": kind}
    if torch_too:
        matrix = alignment_matrix(torch.from_numpy(a), torch.from_numpy(b), **options).numpy()
    else:
        matrix = alignment_matrix(a, b, **options)
    # The guarantee of the docstring's "few rounding errors", as the specification puts it.
    assert orthogonality_error(matrix) <= 30 * np.finfo(dtype).eps
    if isinstance(kind, str):
        assert transport_error(matrix, a, b) <= 30 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-3, 1.5, -1.5, -1e-3, -1e-12, -0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_guarantee_holds_in_a_thousand_dimensions(kind: Kind, angle: float, dtype: Any) -> None:
    a, b = pair_at(angle, 1000, np.random.default_rng(5))
    b = -a if math.copysign(1, angle) < 0 and angle == 0 else b
    a, b = a.astype(dtype), b.astype(dtype)
    matrix = alignment_matrix(a, b, kind=kind)
    assert orthogonality_error(matrix) <= 30 * np.finfo(dtype).eps
    assert transport_error(matrix, a, b) <= 30 * np.finfo(dtype).eps


@pytest.mark.parametrize("angle", [0.0, 1e-10, 0.7, 2.4, math.pi])
@pytest.mark.parametrize("d", [2, 3, 6])
def test_determinant_trace_and_what_stays_outside_the_plane(angle: float, d: int) -> None:
    rng = np.random.default_rng(d)
    a, b = pair_at(angle, d, rng)
    c = math.cos(angle)
    traces = {"rotation": d - 2 + 2 * c, "reflection": d - 2, "half_turn": 2 - d}
    signs = {"rotation": 1, "reflection": -1, "half_turn": (-1) ** (d - 1)}
    outside = {"rotation": 1, "reflection": 1, "half_turn": -1}
    tolerance = 16 * d * EPS
    for kind in KINDS:
        matrix = alignment_matrix(a, b, kind=kind)
        assert np.trace(matrix) == pytest.approx(traces[kind], abs=tolerance)
        assert np.linalg.det(matrix) == pytest.approx(signs[kind], abs=tolerance)
        if d > 2 and 0.1 < angle < 3:
            x = rng.standard_normal(d)
            basis = np.linalg.qr(np.column_stack([a, b]))[0]
            x = unit(x - basis @ (basis.T @ x))
            np.testing.assert_allclose(matrix @ x, outside[kind] * x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["reflection", "half_turn"])
def test_symmetric_kinds_exchange_the_two_vectors(kind: Kind) -> None:
    for angle in (1e-9, 1.0, 3.0):
        a, b = pair_at(angle, 12, np.random.default_rng(3))
        matrix = alignment_matrix(a, b, kind=kind)
        np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=2 * EPS)
        assert transport_error(matrix, b, a) <= 30 * EPS


def test_rotation_does_not_exchange_the_two_vectors() -> None:
    a, b = pair_at(1.0, 12, np.random.default_rng(3))
    # T b lies at the double angle from a.
    assert transport_error(alignment_matrix(a, b), b, a) == pytest.approx(
        2 * math.sin(1), abs=1e-14
    )


def test_half_turn_is_the_reflection_in_the_plane_and_another_map_in_space() -> None:
    for d, same in ((2, True), (3, False)):
        a, b = pair_at(1.2, d, np.random.default_rng(4))
        reflection = alignment_matrix(a, b, kind="reflection")
        half_turn = alignment_matrix(a, b, kind="half_turn")
        assert np.allclose(reflection, half_turn, rtol=0, atol=16 * EPS) is same


def test_distance_to_the_identity() -> None:
    for angle in (0.0, 1e-5, 1.0, 2.5):
        a, b = pair_at(angle, 20, np.random.default_rng(5))
        turned = np.linalg.norm(alignment_matrix(a, b) - np.eye(20))
        # ‖T - I‖² = 4 (1 - c) = 8 sin²(θ/2)
        assert turned == pytest.approx(math.sqrt(8) * math.sin(angle / 2), abs=64 * EPS)
        mirrored = np.linalg.norm(alignment_matrix(a, b, kind="reflection") - np.eye(20))
        assert mirrored == pytest.approx(2.0, abs=64 * EPS)


def test_rotation_is_a_product_of_two_reflections() -> None:
    a, b = pair_at(2.0, 8, np.random.default_rng(6))
    u = unit(a + b)
    reflections = (np.eye(8) - 2 * np.outer(u, u)) @ (np.eye(8) - 2 * np.outer(a, a))
    np.testing.assert_allclose(alignment_matrix(a, b), reflections, rtol=0, atol=32 * EPS)


def test_rotation_of_tangent_vectors_is_parallel_transport() -> None:
    rng = np.random.default_rng(7)
    a, b = pair_at(2.2, 8, rng)
    v = rng.standard_normal((5, 8))
    v -= (v @ a)[:, None] * a
    transported = v - (v @ b)[:, None] / (1 + a @ b) * (a + b)
    np.testing.assert_allclose(align(v, a, b), transported, rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_turn_with_the_vectors(kind: Kind) -> None:
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((2, 6))
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    np.testing.assert_allclose(
        alignment_matrix(turn @ a, turn @ b, kind=kind),
        turn @ alignment_matrix(a, b, kind=kind) @ turn.T,
        rtol=0,
        atol=64 * EPS,
    )


def test_inverse_rotation_exchanges_the_vectors() -> None:
    a, b = pair_at(2.7, 9, np.random.default_rng(9))
    np.testing.assert_allclose(
        alignment_matrix(a, b).T, alignment_matrix(b, a), rtol=0, atol=32 * EPS
    )


@pytest.mark.parametrize("angle", [1e-6, 0.3, 2.8, math.pi])
def test_fractions_add_up(angle: float) -> None:
    a, b = pair_at(angle, 5, np.random.default_rng(10))

    def part(t: float) -> np.ndarray:
        return alignment_matrix(a, b, fraction=t)

    np.testing.assert_allclose(part(0.3) @ part(0.9), part(1.2), rtol=0, atol=32 * EPS)
    np.testing.assert_allclose(part(1.0), alignment_matrix(a, b), rtol=0, atol=16 * EPS)
    np.testing.assert_array_equal(part(0.0), np.eye(5))
    np.testing.assert_allclose(part(-0.7), part(0.7).T, rtol=0, atol=16 * EPS)


def test_fraction_moves_along_the_great_circle_even_between_opposite_vectors() -> None:
    a = np.array([1.0, 2.0, 2.0]) / 3
    path = align(a, a, -a, fraction=np.linspace(0, 1, 5))
    angles = angle_between(path, a)
    np.testing.assert_allclose(angles, np.linspace(0, math.pi, 5), rtol=0, atol=8 * EPS)
    # The plane is that of the whole rotation: the axis rule's, spanned by a and the first axis.
    normal = np.array([0.0, 1.0, -1.0])
    np.testing.assert_allclose(path @ normal, 0.0, atol=8 * EPS)


@pytest.mark.parametrize("exponent", [-300, -20, -12, -8, -3, -1, 0])
def test_angle_is_accurate_near_both_ends(exponent: int) -> None:
    small = 10.0**exponent
    with mpmath.workdps(60):
        exact = mpmath.atan(mpmath.mpf(small))
        near, far = float(exact), float(mpmath.pi - exact)
    assert angle_between([2.0, 0.0], [5.0, 5 * small]) == pytest.approx(near, rel=8 * EPS)
    assert angle_between([2.0, 0.0], [-5.0, 5 * small]) == pytest.approx(far, rel=4 * EPS)


def test_angle_at_the_ends_is_exact() -> None:
    v = np.random.default_rng(11).standard_normal((4, 9))
    np.testing.assert_array_equal(angle_between(v, v), 0.0)
    np.testing.assert_array_equal(angle_between(v, -v), math.pi)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 5e-324])
def test_length_of_the_vectors_does_not_matter(scale: float) -> None:
    a, b = np.array([3.0, 4.0, 0.0]), np.array([0.0, 5.0, 12.0])
    expected = alignment_matrix(a, b)
    np.testing.assert_allclose(alignment_matrix(a * scale, b), expected, rtol=0, atol=4 * EPS)
    np.testing.assert_allclose(alignment_matrix(a, b * scale), expected, rtol=0, atol=4 * EPS)
    assert angle_between(a * scale, b) == pytest.approx(angle_between(a, b), abs=4 * EPS)


def all_options() -> list[dict[str, Any]]:
    return [{"kind": kind} for kind in KINDS] + [{"fraction": 0.3}, {"fraction": -1.5}]


@pytest.mark.parametrize("options", all_options())
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("x_shape", "a_shape", "b_shape"),
    [
        ((6,), (6,), (6,)),
        ((7, 6), (6,), (6,)),
        ((2, 7, 6), (6,), (6,)),
        ((7, 6), (7, 6), (7, 6)),
        ((7, 6), (6,), (7, 6)),
        ((6,), (7, 6), (6,)),
        ((2, 7, 6), (2, 1, 6), (1, 6)),
        ((0, 6), (6,), (6,)),
        ((6,), (0, 6), (6,)),
    ],
)
def test_align_is_the_matrix_times_the_vector(
    x_shape: Any, a_shape: Any, b_shape: Any, inverse: bool, options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(12)
    x, a, b = (rng.standard_normal(shape) for shape in (x_shape, a_shape, b_shape))
    matrix = alignment_matrix(a, b, **options)
    matrix = np.swapaxes(matrix, -1, -2) if inverse else matrix
    expected = (matrix @ x[..., None])[..., 0]
    for convert in (np.asarray, torch.from_numpy):
        result = align(convert(x), convert(a), convert(b), inverse=inverse, **options)
        assert type(result) is type(convert(x))
        assert tuple(result.shape) == expected.shape
        # Six products a coordinate, of entries of x, which are below 4.
        np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=256 * EPS)


@pytest.mark.parametrize("options", all_options())
def test_batches_of_matrices_equal_single_ones(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(13)
    a, b = rng.standard_normal((4, 1, 5)), rng.standard_normal((3, 5))
    b[0], a[1, 0] = -2 * a[0, 0], 3 * b[1]
    together = alignment_matrix(a, b, **options)
    assert together.shape == (4, 3, 5, 5)
    for i in range(4):
        for j in range(3):
            alone = alignment_matrix(a[i, 0], b[j], **options)
            np.testing.assert_allclose(together[i, j], alone, rtol=0, atol=4 * EPS)


def test_fractions_fit_the_batch_or_its_column_or_make_one() -> None:
    rng = np.random.default_rng(14)
    x, a, b = rng.standard_normal((3, 4, 6))
    t = np.array([0.0, 0.5, 1.0, 2.0])
    one_by_one = np.stack([align(x[i], a[i], b[i], fraction=float(t[i])) for i in range(4)])
    for fraction in (t, t[:, None], t.tolist()):
        np.testing.assert_allclose(
            align(x, a, b, fraction=fraction), one_by_one, rtol=0, atol=16 * EPS
        )
    path = np.stack([alignment_matrix(a[0], b[0], fraction=float(s)) for s in t])
    np.testing.assert_allclose(alignment_matrix(a[0], b[0], fraction=t), path, atol=8 * EPS)
    assert alignment_matrix(a[0], b[0], fraction=[0.5]).shape == (6, 6)
    # Against one pair, a row of x has a fraction of its own.
    rows = np.stack([align(x[i], a[0], b[0], fraction=float(t[i])) for i in range(4)])
    np.testing.assert_allclose(align(x, a[0], b[0], fraction=t), rows, rtol=0, atol=16 * EPS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = torch.randn(3, 40, generator=generator).to(dtype)
    for kind in KINDS:
        for given_b in (b, -a, a):
            single = align(x.float(), a.float(), given_b.float(), kind=kind)
            assert torch.equal(align(x, a, given_b, kind=kind), single.to(dtype))
            matrix = alignment_matrix(a, given_b, kind=kind)
            assert torch.equal(
                matrix, alignment_matrix(a.float(), given_b.float(), kind=kind).to(dtype)
            )
    assert torch.equal(angle_between(a, b), angle_between(a.float(), b.float()).to(dtype))
    half = a.to(torch.float16).numpy()
    assert alignment_matrix(half, half).dtype == np.float16


def test_integers_and_lists_become_the_default_type() -> None:
    assert alignment_matrix([1, 2], [3, 4]).dtype == np.float64
    assert alignment_matrix(np.array([1, 2], np.int32), [3, 4]).dtype == np.float64
    assert alignment_matrix(torch.tensor([1, 2]), [3, 4]).dtype == torch.get_default_dtype()
    assert angle_between([[1, 0], [0, 2]], [0, 7]).tolist() == [math.pi / 2, 0.0]


def test_mixed_types_promote_and_lose_nothing() -> None:
    single, double = np.array([1.0, 2.0], np.float32), np.array([0.1, 0.7])
    assert alignment_matrix(single, double).dtype == np.float64
    assert align(single, single, single).dtype == np.float32
    assert align(double, single, single).dtype == np.float64
    halves = (torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16))
    assert alignment_matrix(*halves).dtype == torch.float32
    # A list beside doubles is read as doubles, not first as the default type of torch.
    there = alignment_matrix(torch.tensor([1.0, 2.0], dtype=torch.float64), [0.1, 0.7])
    np.testing.assert_allclose(there, alignment_matrix([1.0, 2.0], double), rtol=0, atol=4 * EPS)


def test_fraction_does_not_change_the_type() -> None:
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for fraction in (0.5, np.float64(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.float64)):
        assert alignment_matrix(a, b, fraction=fraction).dtype == torch.float32
    assert align(a.numpy(), a.numpy(), b.numpy(), fraction=np.array(0.5)).dtype == np.float32


def test_nan_in_x_comes_out_as_nan_and_leaves_other_rows_alone() -> None:
    rng = np.random.default_rng(15)
    x, a, b = rng.standard_normal((4, 6)), rng.standard_normal(6), rng.standard_normal(6)
    broken = x.copy()
    broken[2, 0] = np.nan
    result = align(broken, a, b)
    assert np.isnan(result[2]).all()
    np.testing.assert_allclose(result[[0, 1, 3]], align(x, a, b)[[0, 1, 3]], atol=16 * EPS)


def test_align_needs_a_few_times_the_memory_of_x() -> None:
    rng = np.random.default_rng(16)
    x, a, b = rng.standard_normal((50, 20_000)), *rng.standard_normal((2, 20_000))
    tracemalloc.start()
    align(x, a, b)
    _, one_pair = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    align(x, x + 1, b)
    _, pairs = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The matrix would take 400 times x, for each pair.
    assert one_pair < 2.5 * x.nbytes + 30 * a.nbytes
    assert pairs < 25 * x.nbytes


def test_three_hundred_thousand_dimensions() -> None:
    rng = np.random.default_rng(17)
    a, b = rng.standard_normal((2, 300_000))
    x = np.stack([a, b, rng.standard_normal(300_000)])
    y = align(x, a, -a + 1e-9 * b)
    # The guarantee, with the growth by the square root of the dimension over a thousand.
    growth = 30 * math.sqrt(300) * EPS
    np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=0, atol=growth * (x @ x.T).max())


def doubles(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("options", all_options())
def test_gradients_at_generic_pairs(options: dict[str, Any]) -> None:
    x, a, b = doubles(0, 2, 4), doubles(1, 2, 4), doubles(2, 2, 4)
    for other in (b, -b):
        assert torch.autograd.gradcheck(lambda x, a, b: align(x, a, b, **options), (x, a, other))
        assert torch.autograd.gradcheck(lambda a, b: alignment_matrix(a, b, **options), (a, other))


def test_gradient_of_one_map_for_many_vectors() -> None:
    for kind in KINDS:
        assert torch.autograd.gradcheck(
            lambda x, a, b, kind=kind: align(x, a, b, kind=kind, inverse=True),
            (doubles(0, 3, 4), doubles(1, 4), doubles(2, 4)),
        )


@pytest.mark.parametrize("options", [{}, {"kind": "half_turn"}, {"fraction": 0.3}])
def test_gradients_at_equal_vectors(options: dict[str, Any]) -> None:
    a = doubles(3, 5)
    b = (2 * a).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: alignment_matrix(a, b, **options), (a, b))


def test_gradient_with_respect_to_the_fraction() -> None:
    a, t = doubles(4, 2, 5), torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    for b in (doubles(5, 2, 5), a.detach() * 2):
        assert torch.autograd.gradcheck(
            lambda a, b, t: alignment_matrix(a, b, fraction=t), (a, b.detach(), t)
        )


def test_second_derivatives_of_the_rotation() -> None:
    a = doubles(6, 3)
    for b in (doubles(7, 3), a.detach().clone().requires_grad_()):
        assert torch.autograd.gradgradcheck(alignment_matrix, (a, b))


def test_gradient_of_the_angle() -> None:
    assert torch.autograd.gradcheck(angle_between, (doubles(8, 3, 4), doubles(9, 3, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", all_options())
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("offset", [0.0, 1e-15, 1e-7])
def test_gradients_are_finite_where_the_map_is_undetermined(
    options: dict[str, Any], sign: int, offset: float, dtype: torch.dtype
) -> None:
    a = doubles(10, 6).detach().to(dtype).requires_grad_()
    b = (sign * a.detach() + offset * doubles(11, 6).detach().to(dtype)).requires_grad_()
    weight = doubles(12, 6, 6).detach().to(dtype)
    (alignment_matrix(a, b, **options) * weight).sum().backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()
    a.grad = b.grad = None
    angle_between(a, b).backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switches the checks of shapes off, which no compiler can trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("options", [{}, {"kind": "half_turn"}, {"fraction": 0.3}])
def test_compiled_to_one_graph(options: dict[str, Any]) -> None:
    def loss(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = align(x, a, b, **options) @ alignment_matrix(a, b, **options)
        return y * angle_between(a, b)

    torch._dynamo.reset()
    inputs = (doubles(13, 3, 4), doubles(14, 4), doubles(15, 4))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_on_a_gpu_it_agrees_with_the_host() -> None:
    x, a, b = doubles(16, 9, 64), doubles(17, 9, 64), doubles(18, 9, 64)
    for options in all_options():
        there = align(x.cuda(), a.cuda(), b.cuda(), **options)
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), align(x, a, b, **options), rtol=0, atol=1e-13)


@pytest.mark.bad_input
def test_vectors_without_a_direction_are_refused() -> None:
    for zeros in (np.zeros(3), torch.zeros(3), np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])):
        other = np.ones(3) if isinstance(zeros, np.ndarray) else torch.ones(3)
        for call in (alignment_matrix, angle_between, lambda a, b: align(a, a, b)):
            with pytest.raises(ValueError, match=r"^a contains a zero vector, which has no dir"):
                call(zeros, other)
        with pytest.raises(ValueError, match=r"^b contains a zero vector, which has no direction$"):
            alignment_matrix(other, zeros)


@pytest.mark.bad_input
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused(bad: float) -> None:
    broken, whole = np.array([1.0, bad, 2.0]), np.ones(3)
    for name, a, b in (("a", broken, whole), ("b", whole, broken)):
        for call in (alignment_matrix, angle_between, lambda a, b: align(np.ones(3), a, b)):
            with pytest.raises(ValueError, match=f"^{name} must be finite, got NaN or infinity"):
                call(a, b)


@pytest.mark.bad_input
def test_dimensions_must_agree_and_be_two_at_least() -> None:
    with pytest.raises(ValueError, match="same last dimension, got 4 and 3"):
        alignment_matrix(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="x and a must have the same last dimension, got 5 and 3"):
        align(np.ones(5), np.ones(3), np.ones(3))
    for call in (alignment_matrix, angle_between, lambda a, b: align(a, a, b)):
        with pytest.raises(ValueError, match="the dimension must be at least 2, got 1"):
            call([1.0], [1.0])
        with pytest.raises(ValueError, match="single number"):
            call(1.0, 2.0)
    with pytest.raises(ValueError, match=r"broadcastable, got shapes \(2, 3\) and \(4, 3\)"):
        alignment_matrix(np.ones((2, 3)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="leading dimensions of x and a and b"):
        align(np.ones((2, 3)), np.ones((4, 3)), np.ones(3))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "bad",
    [
        np.ones(3) + 1j,
        np.ones(3, bool),
        np.array(["a", "b", "c"]),
        np.array([1, None, 2], object),
        [True, False, True],
        ["a", "b", "c"],
        None,
    ],
)
def test_what_holds_no_real_numbers_is_refused(bad: Any) -> None:
    good = np.ones(3)
    for call in (
        lambda: alignment_matrix(bad, good),
        lambda: alignment_matrix(good, bad),
        lambda: align(bad, good, good),
        lambda: angle_between(good, bad),
    ):
        with pytest.raises(TypeError, match="must hold real numbers"):
            call()


@pytest.mark.bad_input
def test_tensors_are_refused_for_the_same_reasons() -> None:
    good = torch.ones(3)
    for bad in (good + 1j, good > 0):
        with pytest.raises(TypeError, match="b must hold real numbers"):
            alignment_matrix(good, bad)
    with pytest.raises(TypeError, match="all arrays must be of one library, got a a Tensor, b a "):
        alignment_matrix(good, np.ones(3))
    with pytest.raises(TypeError, match="one library"):
        alignment_matrix(np.ones(3), np.ones(3), fraction=torch.tensor(0.5))


@pytest.mark.bad_input
def test_kind_and_fraction_are_checked() -> None:
    with pytest.raises(ValueError, match="rotation, reflection, half_turn, got 'mirror'"):
        alignment_matrix(A, B, kind="mirror")
    for kind in ("reflection", "half_turn"):
        with pytest.raises(ValueError, match=f"only a rotation has fractions, got kind '{kind}'"):
            align(A, A, B, kind=kind, fraction=0.5)
    for fraction in (math.nan, math.inf, [0.5, math.nan]):
        with pytest.raises(ValueError, match="fraction must be finite"):
            alignment_matrix(A, B, fraction=fraction)
    for fraction in (1j, True, "half", [True]):
        with pytest.raises(TypeError, match="fraction must hold real numbers"):
            alignment_matrix(A, B, fraction=fraction)
    for fraction in (np.ones(2), np.ones((3, 2)), np.ones((1, 1, 3, 1))):
        with pytest.raises(ValueError, match=r"fraction must fit the batch shape \(3,\), got shap"):
            align(np.ones((3, 5)), A, B, fraction=fraction)
