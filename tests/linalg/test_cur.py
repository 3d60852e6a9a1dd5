"""CUR decomposition against closed forms, linear algebra done another way, and LAPACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.linalg.cur import cur_decomposition, leverage_scores, select_columns

# Oracles are written down to ten or more digits: half a unit of the last place.
DIGITS = 5.1e-13
EPS = np.finfo(float).eps
SELECTIONS = ("qr", "leverage", "norm", "uniform", "deim")

HILBERT = 1 / (np.arange(6)[:, None] + np.arange(8) + 1.0)
LEVERAGE = [
    0.9231172966, 0.2085318891, 0.1896334665, 0.1737757055,
    0.1535241345, 0.1337586531, 0.1162797381, 0.1013791166,
]  # fmt: skip


def low_rank(rank: int, m: int, n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*batch, m, rank)) @ rng.standard_normal((*batch, rank, n))


@pytest.fixture(params=[np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def kind(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param


def test_core_of_the_hilbert_matrix_is_the_inverse_of_its_intersection(kind: Any) -> None:
    cur = cur_decomposition(kind(HILBERT), column_indices=[0, 3], row_indices=[1, 4])
    exact = sympy.Matrix(2, 2, lambda r, c: 1 / sympy.Integer([1, 4][r] + [0, 3][c] + 1)).inv()
    assert exact == sympy.Matrix([[sympy.Rational(50, 9), sympy.Rational(-80, 9)],
                                  [sympy.Rational(-80, 9), sympy.Rational(200, 9)]])  # fmt: skip
    # The condition number is below 20: a few of its roundings.
    np.testing.assert_allclose(np.asarray(cur.core), np.array(exact, float), rtol=100 * EPS)
    assert float(abs(cur.core[0, 0] - 5.555555555556)) < DIGITS
    assert float(abs(cur.core[1, 1] - 22.222222222222)) < DIGITS
    np.testing.assert_array_equal(np.asarray(cur.columns), HILBERT[:, [0, 3]])
    np.testing.assert_array_equal(np.asarray(cur.rows), HILBERT[[1, 4]])


@pytest.mark.parametrize(
    ("core", "error"), [("intersection", 0.079953588882), ("optimal", 0.073206037423)]
)
def test_error_for_given_columns_and_rows(kind: Any, core: Any, error: float) -> None:
    cur = cur_decomposition(kind(HILBERT), column_indices=[0, 3], row_indices=[1, 4], core=core)
    measured = np.linalg.norm(np.asarray(cur.reconstruct()) - HILBERT)
    assert measured == pytest.approx(error, abs=DIGITS)
    best_of_rank_two = np.linalg.norm(np.linalg.svd(HILBERT)[1][2:])
    assert best_of_rank_two == pytest.approx(0.020578810541, abs=DIGITS)
    assert measured > best_of_rank_two


def test_optimal_core_is_least_squares_on_the_kronecker_product() -> None:
    matrix = np.random.default_rng(1).standard_normal((7, 9))
    cur = cur_decomposition(matrix, n_columns=3, n_rows=4, core="optimal")
    # vec(C G R) = (C kron R^T) vec(G) with rows stacked.
    design = np.kron(cur.columns, cur.rows.T)
    expected = np.linalg.lstsq(design, matrix.ravel(), rcond=None)[0].reshape(3, 4)
    condition = np.linalg.cond(design)
    np.testing.assert_allclose(cur.core, expected, atol=50 * EPS * condition * abs(expected).max())


def test_leverage_scores_of_the_hilbert_matrix(kind: Any) -> None:
    scores = leverage_scores(kind(HILBERT), 2)
    np.testing.assert_allclose(np.asarray(scores), LEVERAGE, atol=5.1e-11)
    assert float(scores.sum()) == pytest.approx(2, abs=20 * EPS)
    of_rows = leverage_scores(kind(HILBERT), 2, axis=-2)
    of_columns_of_the_transpose = leverage_scores(kind(HILBERT.T.copy()), 2)
    np.testing.assert_allclose(of_rows, of_columns_of_the_transpose, atol=100 * EPS)
    assert of_rows.shape == (6,)


def test_leverage_scores_are_the_diagonal_of_a_projection() -> None:
    matrix = low_rank(3, 10, 6)
    projection = np.linalg.pinv(matrix, rcond=1e-10) @ matrix
    np.testing.assert_allclose(leverage_scores(matrix, 3), np.diag(projection), atol=1e3 * EPS)


def test_pivoted_columns_and_rows_of_the_hilbert_matrix(kind: Any) -> None:
    cur = cur_decomposition(kind(HILBERT), n_columns=3, n_rows=3)
    assert cur.column_indices.tolist() == [0, 2, 7]
    assert cur.row_indices.tolist() == [0, 2, 5]
    assert select_columns(kind(HILBERT), 3, selection="deim").tolist() == [0, 2, 7]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6))
def test_qr_selection_is_lapacks_column_pivoting(m: int, n: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((m, n))
    count = min(m, n)
    _, r, pivots = scipy.linalg.qr(matrix, pivoting=True)
    chosen = select_columns(matrix, count)
    # Of the last column's length only rounding may be left, and then the order is arbitrary.
    clear = int((abs(np.diag(r)) > 1e-9).sum()) - (n > m)
    assert chosen[:clear].tolist() == pivots[:clear].tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 10**6))
def test_deim_follows_its_definition(m: int, n: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((m, n))
    count = min(m, n) - 1
    v = np.linalg.svd(matrix)[2].T
    points = [int(np.argmax(abs(v[:, 0])))]
    for k in range(1, count):
        weights = np.linalg.solve(v[points, :k], v[points, k])
        points.append(int(np.argmax(abs(v[:, k] - v[:, :k] @ weights))))
    assert select_columns(matrix, count, selection="deim").tolist() == points


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("core", ["intersection", "optimal"])
def test_matrix_of_the_rank_of_the_intersection_is_reconstructed(
    kind: Any, selection: Any, core: Any
) -> None:
    matrix = low_rank(4, 30, 50, batch=(2,))
    cur = cur_decomposition(
        kind(matrix), n_columns=6, n_rows=4, selection=selection, core=core, random_state=0,
        rcond=1e-10,
    )  # fmt: skip
    # Errors of the intersection grow with its condition number, squared by the two products.
    at = np.take_along_axis(matrix, np.asarray(cur.row_indices)[..., :, None], axis=-2)
    w = np.take_along_axis(at, np.asarray(cur.column_indices)[..., None, :], axis=-1)
    values = np.linalg.svd(w, compute_uv=False)
    condition = float((values[:, 0] / values[:, 3]).max())
    allowed = 100 * EPS * condition**2 * abs(matrix).max()
    np.testing.assert_allclose(np.asarray(cur.reconstruct()), matrix, atol=allowed)


def test_repeated_columns_and_rows_are_harmless() -> None:
    matrix = low_rank(2, 5, 6)
    cur = cur_decomposition(matrix, column_indices=[0, 1, 1, 0], row_indices=[2, 2, 4, 3, 3])
    np.testing.assert_allclose(cur.reconstruct(), matrix, atol=1e4 * EPS)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_column_is_chosen_twice_even_beyond_the_rank(kind: Any, selection: Any) -> None:
    matrix = low_rank(2, 9, 7)
    matrix[:, 3] = 0.0
    chosen = select_columns(kind(matrix), 7, selection=selection, random_state=0)
    assert sorted(chosen.tolist()) == list(range(7))
    if selection == "norm":
        assert int(chosen[-1]) == 3


def test_qr_selection_goes_on_in_order_where_nothing_is_left() -> None:
    assert select_columns(np.ones((4, 5)), 5).tolist() == [0, 1, 2, 3, 4]
    assert select_columns(np.zeros((4, 3)), 3).tolist() == [0, 1, 2]
    # Of rank 2, where rounding leaves residuals that must not decide.
    chosen = select_columns(low_rank(2, 9, 12), 12).tolist()
    assert chosen[2:] == sorted(chosen[2:])


@pytest.mark.parametrize("selection", ["leverage", "norm", "uniform"])
def test_first_draw_has_the_probabilities_that_are_promised(selection: Any) -> None:
    matrix = np.random.default_rng(0).standard_normal((3, 5)) * [1, 2, 1, 0.5, 0]
    weights = {
        "leverage": leverage_scores(matrix, 1),
        "norm": (matrix**2).sum(0),
        "uniform": np.ones(5),
    }[selection]
    rng = np.random.default_rng(1)
    n = 4000
    draws = [
        int(select_columns(matrix, 1, selection=selection, random_state=rng)[0]) for _ in range(n)
    ]
    expected = weights / weights.sum()
    measured = np.bincount(draws, minlength=5) / n
    # Four standard errors of a proportion.
    assert (abs(measured - expected) <= 4 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()


def test_every_matrix_of_a_batch_may_have_its_own_indices(kind: Any) -> None:
    matrix = low_rank(3, 8, 9, batch=(2,))
    columns, rows = [[0, 1, 2], [5, 7, 8]], [0, 3, 7]
    cur = cur_decomposition(kind(matrix), column_indices=kind(columns), row_indices=rows)
    assert cur.columns.shape == (2, 8, 3)
    for k in range(2):
        np.testing.assert_array_equal(np.asarray(cur.columns[k]), matrix[k][:, columns[k]])
        np.testing.assert_array_equal(np.asarray(cur.rows[k]), matrix[k][rows])
        alone = cur_decomposition(matrix[k], column_indices=columns[k], row_indices=rows)
        np.testing.assert_allclose(np.asarray(cur.core[k]), alone.core, rtol=1e-9)


def test_singular_values_up_to_rcond_times_the_largest_are_cut_off() -> None:
    matrix = np.diag([1.0, 0.5, 0.25])
    given_all = {"column_indices": [0, 1, 2], "row_indices": [0, 1, 2]}
    cut = cur_decomposition(matrix, rcond=0.5, **given_all)
    np.testing.assert_array_equal(np.diag(cut.core), [1, 0, 0])
    kept = cur_decomposition(matrix, rcond=0.499, **given_all)
    np.testing.assert_allclose(np.diag(kept.core), [1, 2, 0], rtol=4 * EPS)


def test_gradient_passes_through_the_values_but_not_the_choice() -> None:
    matrix = torch.as_tensor(low_rank(5, 5, 6)).requires_grad_()
    assert not select_columns(matrix, 2, selection="deim").requires_grad

    def reconstruct(a: torch.Tensor) -> torch.Tensor:
        return cur_decomposition(a, n_columns=2, n_rows=3).reconstruct()

    assert torch.autograd.gradcheck(reconstruct, (matrix,))
    assert torch.autograd.gradcheck(lambda a: leverage_scores(a, 2), (matrix,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    matrix = torch.as_tensor(HILBERT, dtype=dtype)
    cur = cur_decomposition(matrix, n_columns=2, n_rows=3)
    assert {cur.columns.dtype, cur.core.dtype, cur.rows.dtype} == {dtype}
    assert cur.column_indices.dtype == cur.row_indices.dtype == torch.int64
    assert leverage_scores(matrix, 2).dtype == dtype
    assert leverage_scores(np.ones((2, 2), np.int32), 1).dtype == np.float64


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_selection_does_not_depend_on_the_scale(scale: float) -> None:
    for selection in SELECTIONS:
        one, other = (
            select_columns(matrix, 4, selection=selection, random_state=3)
            for matrix in (HILBERT, HILBERT * scale)
        )
        assert one.tolist() == other.tolist()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_columns": 2}, "n_rows and row_indices, got none"),
        ({"n_columns": 2, "n_rows": 2, "row_indices": [0]}, "n_rows and row_indices, got both"),
        ({"n_columns": 9, "n_rows": 2}, r"n_columns must be in \[1, 8\], got 9"),
        ({"n_columns": 2, "n_rows": 0}, r"n_rows must be in \[1, 6\], got 0"),
        ({"column_indices": [8], "n_rows": 2}, r"column_indices must lie in \[0, 7\]"),
        ({"column_indices": [-1], "n_rows": 2}, r"column_indices must lie in \[0, 7\]"),
        ({"column_indices": [], "n_rows": 2}, "column_indices must"),
        ({"column_indices": [[0], [1]], "n_rows": 2}, "column_indices must fit"),
        ({"n_columns": 2, "n_rows": 2, "selection": "best"}, "selection must be one of qr"),
        ({"column_indices": [0], "row_indices": [0], "selection": "best"}, "selection must"),
        ({"n_columns": 2, "n_rows": 2, "core": "best"}, "core must be one of intersection"),
        ({"n_columns": 2, "n_rows": 2, "rcond": 1.0}, "rcond must be in"),
        ({"n_columns": 2, "n_rows": 2, "rcond": np.nan}, "rcond must be in"),
        ({"n_columns": 7, "n_rows": 2, "selection": "deim"}, r"deim' must be in \[1, 6\]"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        cur_decomposition(HILBERT, **options)


@pytest.mark.bad_input
@pytest.mark.parametrize("rank", [0, 7])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[1, 6\]"):
        leverage_scores(HILBERT, rank)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 6\]"):
        select_columns(HILBERT, 2, selection="leverage", rank=rank)
