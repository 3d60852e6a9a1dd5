"""Harmonic filling, diffusion and the fits of `kexue.training.heat`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.training.heat import (
    FirstOrderFit,
    fit_first_order,
    fit_laplace,
    harmonic_fill,
    heat_diffuse,
)

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_mask(*shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask.view(-1)[0] = False
    return mask


def path_laplacian(n: int) -> np.ndarray:
    laplacian = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    laplacian[0, 0] -= 1
    laplacian[-1, -1] -= 1
    return laplacian


def test_a_sequence_is_interpolated_and_continued() -> None:
    z = torch.tensor([1.0, 0, 0, 0, 9, 0, 0], dtype=torch.float64)[None, :, None]
    mask = torch.tensor([0, 1, 1, 1, 0, 1, 1]).bool()
    filled = harmonic_fill(z, mask)[0, :, 0]
    assert filled.tolist() == pytest.approx([1, 3, 5, 7, 9, 9, 9], abs=20 * 9 * EPS)


def test_sequences_agree_with_linear_interpolation() -> None:
    z, mask = normal(2, 40, 3), random_mask(40, share=0.7)
    filled = harmonic_fill(z, mask)
    visible = np.flatnonzero(~mask.numpy())
    for b in range(2):
        for c in range(3):
            expected = np.interp(np.arange(40), visible, z[b, visible, c])
            np.testing.assert_allclose(filled[b, :, c], expected, rtol=0, atol=1e3 * EPS)


def test_a_hole_is_restored_exactly_where_the_map_is_harmonic() -> None:
    i, j = torch.arange(5.0).double()[:, None], torch.arange(6.0).double()
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1:4, 1:5] = True
    maps = torch.stack([i * j, i**2 - j**2, i**2 + j**2])[None]
    error = (harmonic_fill(maps.masked_fill(mask, torch.nan), mask) - maps).abs().amax((0, 2, 3))
    assert error[0] <= 1e-14
    assert error[1] <= 1e-14
    assert float(error[2]) == pytest.approx(5.352112676056, abs=6e-13)


def test_filled_values_are_the_means_of_their_neighbours() -> None:
    maps, mask = normal(1, 1, 7, 9), random_mask(7, 9, share=0.6)
    filled = harmonic_fill(maps, mask)[0, 0]
    for i, j in mask.nonzero().tolist():
        around = [
            filled[y, x]
            for y, x in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
            if 0 <= y < 7 and 0 <= x < 9
        ]
        assert float(filled[i, j]) == pytest.approx(float(sum(around) / len(around)), abs=200 * EPS)
    assert torch.equal(filled[~mask], maps[0, 0][~mask])


def test_the_sparse_and_the_dense_route_agree() -> None:
    """Two maps side by side, cut by a visible column: together above 2048, each below."""
    maps, mask = normal(2, 2, 50, 81), random_mask(50, 81, share=0.75)
    mask[:, 40] = False
    whole = harmonic_fill(maps, mask)
    assert int(mask.sum()) > 2048
    halves = [
        harmonic_fill(maps[..., part], mask[:, part]) for part in (slice(0, 41), slice(40, 81))
    ]
    assert max(int(mask[:, :41].sum()), int(mask[:, 40:].sum())) <= 2048
    apart = torch.cat([halves[0], halves[1][..., 1:]], -1)
    # Conditions of holes of some dozens of positions stay below 1000.
    torch.testing.assert_close(whole, apart, rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("width", [6, 65], ids=["dense", "sparse"])
def test_masked_values_are_never_read(width: int) -> None:
    maps = normal(1, 2, 60, width).requires_grad_()
    mask = random_mask(60, width, share=0.8)
    filled = harmonic_fill(maps, mask)
    poisoned = harmonic_fill(maps.detach().masked_fill(mask, torch.nan), mask)
    assert torch.equal(filled, poisoned)
    filled.square().sum().backward()
    assert not maps.grad[..., mask].any()
    assert maps.grad[..., ~mask].any()


@pytest.mark.parametrize("width", [6, 65], ids=["dense", "sparse"])
def test_the_gradient_is_the_adjoint(width: int) -> None:
    """The map is linear: its product with a vector and that of its adjoint must agree."""
    mask = random_mask(60, width, share=0.8)
    maps, other = normal(1, 1, 60, width).requires_grad_(), normal(1, 1, 60, width, seed=1)
    filled = harmonic_fill(maps, mask)
    (adjoint,) = torch.autograd.grad(filled, maps, other)
    left, right = (filled.detach() * other).sum(), (maps.detach() * adjoint).sum()
    assert float(left) == pytest.approx(float(right), abs=1e3 * 60 * width * EPS)


def test_gradcheck_of_filling_and_diffusing() -> None:
    mask = random_mask(4, 5)
    maps = normal(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: harmonic_fill(z, mask), maps)
    assert torch.autograd.gradgradcheck(lambda z: harmonic_fill(z, mask).square(), maps)
    assert torch.autograd.gradcheck(lambda z: heat_diffuse(z, 0.7), maps)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_filling_is_linear_idempotent_and_within_the_visible_range(
    height: int, width: int, seed: int
) -> None:
    mask = random_mask(height, width, share=0.7, seed=seed)
    one, two = normal(1, 2, height, width, seed=seed), normal(1, 2, height, width, seed=seed + 1)
    filled = harmonic_fill(one, mask)
    together = harmonic_fill(3 * one - two, mask)
    torch.testing.assert_close(
        together, 3 * filled - harmonic_fill(two, mask), rtol=0, atol=1e4 * EPS
    )
    torch.testing.assert_close(harmonic_fill(filled, mask), filled, rtol=0, atol=1e4 * EPS)
    visible = one[..., ~mask]
    assert bool((filled.amax((2, 3)) <= visible.amax(-1) + 1e3 * EPS).all())
    assert bool((filled.amin((2, 3)) >= visible.amin(-1) - 1e3 * EPS).all())


def test_filling_without_a_mask_returns_the_input() -> None:
    maps = normal(1, 2, 3, 4)
    assert torch.equal(harmonic_fill(maps, torch.zeros(3, 4, dtype=torch.bool)), maps)


def test_filling_keeps_the_dtype() -> None:
    mask = random_mask(6, 6)
    maps = normal(1, 2, 6, 6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        filled = harmonic_fill(maps.to(dtype), mask)
        assert filled.dtype == dtype
        exact = harmonic_fill(maps.to(dtype).double(), mask)
        assert (filled.double() - exact).abs().max() <= torch.finfo(dtype).eps * maps.abs().max()


def test_a_pulse_in_the_middle() -> None:
    pulse = torch.zeros(5, 5, dtype=torch.float64)
    pulse[2, 2] = 1.0
    spread = heat_diffuse(pulse, 1.0)
    expected = {
        (2, 2): 0.09682547842169,
        (2, 3): 0.06918869570847,
        (3, 2): 0.06918869570847,
        (1, 3): 0.04944024746245,
        (0, 4): 0.01489971935288,
    }
    for place, value in expected.items():
        assert float(spread[place]) == pytest.approx(value, abs=6e-15)
    assert float(spread.sum()) == pytest.approx(1.0, abs=25 * EPS)


def test_a_pulse_at_the_border() -> None:
    pulse = torch.zeros(3, 4, dtype=torch.float64)
    pulse[0, 1] = 1.0
    spread = heat_diffuse(pulse, 0.5)
    expected = [0.173741411837, 0.319385057686, 0.141444650705, 0.039215902986]
    assert spread[0].tolist() == pytest.approx(expected, abs=6e-13)


@pytest.mark.parametrize("time", [0.0, 1e-6, 0.3, 20.0])
def test_diffusion_is_the_matrix_exponential(time: float) -> None:
    maps = normal(2, 3, 5, 8)
    rows, columns = (scipy.linalg.expm(-time * path_laplacian(n)) for n in (5, 8))
    expected = rows @ maps.numpy() @ columns.T
    np.testing.assert_allclose(heat_diffuse(maps, time), expected, rtol=0, atol=200 * EPS)


def test_no_time_changes_nothing_and_long_time_everything() -> None:
    maps = normal(2, 5, 4)
    assert torch.equal(heat_diffuse(maps, 0.0), maps)
    mean = maps.mean((1, 2), keepdim=True).expand_as(maps)
    torch.testing.assert_close(heat_diffuse(maps, 1e6), mean, rtol=0, atol=100 * EPS)
    assert torch.equal(heat_diffuse(maps[:, :1, :1], 3), maps[:, :1, :1])


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 9),
    first=st.floats(0, 50),
    second=st.floats(0, 5),
)
def test_diffusion_keeps_the_sum_and_the_sign_and_adds_times(
    height: int, width: int, first: float, second: float
) -> None:
    maps = normal(height, width).abs()
    once = heat_diffuse(maps, first)
    slack = 50 * height * width * EPS * float(maps.max())
    assert float(once.sum()) == pytest.approx(float(maps.sum()), abs=height * slack)
    assert bool((once >= 0).all())
    torch.testing.assert_close(
        heat_diffuse(once, second), heat_diffuse(maps, first + second), rtol=0, atol=slack
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_diffused_in_single(dtype: torch.dtype) -> None:
    maps = normal(3, 8, 8).to(dtype)
    spread = heat_diffuse(maps, 1.5)
    exact = heat_diffuse(maps.double(), 1.5)
    assert spread.dtype == dtype
    assert (spread.double() - exact).abs().max() <= torch.finfo(dtype).eps * maps.abs().max() * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heat_diffuse(maps, 1.5), spread)


V = torch.tensor([[1.0, 0.5], [-0.3, 1.0]], dtype=torch.float64)
RATES = torch.tensor([[0.3, -0.2], [0.1, 0.25]], dtype=torch.float64)


def exact_solution(basis: Tensor, rates: Tensor, size: tuple[int, int], batch: int = 2) -> Tensor:
    y, x = (torch.arange(n, dtype=torch.float64) for n in size)
    a, b = (rate[:, None, None] for rate in rates)
    modes = torch.exp(a * x + b * y[:, None])
    weights = normal(batch, len(basis), seed=5)
    return torch.einsum("ck,bk,kyx->bcyx", basis, weights, modes)


def power(basis: Tensor, eigenvalues: Tensor) -> Tensor:
    return basis @ torch.diag(eigenvalues) @ torch.linalg.inv(basis)


def test_first_order_fit_of_an_exact_solution() -> None:
    fit = fit_first_order(exact_solution(V, RATES, (5, 6)))
    expected = [[0.280581235250, -0.230925241086], [-0.138555144652, -0.111991674596]]
    np.testing.assert_allclose(fit.horizontal, expected, rtol=0, atol=6e-13)
    torch.testing.assert_close(fit.vertical, power(V, torch.expm1(RATES[1])), rtol=0, atol=1e-12)
    for share in (fit.horizontal_r2, fit.vertical_r2, fit.horizontal_gain, fit.vertical_gain):
        assert share == pytest.approx(1.0, abs=1e-14)
    assert fit.commutator < 1e-12


def test_laplace_fit_of_an_exact_solution() -> None:
    fit = fit_laplace(exact_solution(V, RATES, (5, 6)))
    expected = [[-7.961713482937, 3.661455668413], [2.196873401048, -1.737238846635]]
    # The second differences of growth exp(r) are small, which costs two digits.
    np.testing.assert_allclose(fit.matrix, expected, rtol=0, atol=1e-10)
    second = [torch.exp(rate) - 2 + torch.exp(-rate) for rate in RATES]
    torch.testing.assert_close(fit.matrix, -power(V, second[0] / second[1]), rtol=0, atol=1e-10)
    assert fit.anisotropic_residual < 1e-20


def test_commutator_of_fitted_matrices_that_do_not_commute() -> None:
    """Rows that follow A and columns that follow B, with weights that drown what contradicts."""
    a = torch.tensor([[0.1, 0.2], [0.0, -0.3]], dtype=torch.float64)
    b = torch.tensor([[0.05, -0.1], [0.2, 0.1]], dtype=torch.float64)
    assert float((a @ b - b @ a).norm() / (a.norm() * b.norm())) == pytest.approx(
        1.095445115010, abs=6e-13
    )
    fit = fit_first_order(normal(20, 2, 4, 4))
    one, two = fit.horizontal, fit.vertical
    expected = (one @ two - two @ one).norm() / (one.norm() * two.norm())
    assert fit.commutator == pytest.approx(float(expected), rel=10 * EPS)
    assert fit.commutator > 0


def test_white_noise_has_the_nulls() -> None:
    noise = normal(300, 3, 24, 24)
    first, second = fit_first_order(noise), fit_laplace(noise)
    # Ratios of sums of squares of some 300 * 3 * 24 * 24 values: relative errors of order
    # 1 / sqrt(n), times at most 5. Without an intercept, r2 is a chi-square of C^2 degrees of
    # freedom minus one of C, over n.
    n = noise.numel()
    slack = 5 / math.sqrt(n)
    assert abs(first.horizontal_r2) < 6 * 9 / n
    assert abs(first.vertical_r2) < 6 * 9 / n
    assert first.horizontal_gain == pytest.approx(1 / 2, abs=slack)
    assert first.vertical_gain == pytest.approx(1 / 2, abs=slack)
    assert second.anisotropic_residual == pytest.approx(5 / 9, abs=slack)
    assert second.isotropic_residual == pytest.approx(5 / 3, abs=slack)


def test_two_photographs() -> None:
    pytest.importorskip("PIL")
    from sklearn.datasets import load_sample_images

    for photograph, r2, gain, residuals in zip(
        load_sample_images().images,
        [(0.8954, 0.9012), (0.9753, 0.9756)],
        [(0.0097, 0.0119), (0.0064, 0.0065)],
        [(0.714, 1.533), (0.724, 1.525)],
        strict=True,
    ):
        maps = torch.from_numpy(photograph / 255).movedim(2, 0)[None]
        first, second = fit_first_order(maps), fit_laplace(maps)
        assert (first.horizontal_r2, first.vertical_r2) == pytest.approx(r2, abs=5e-5)
        assert (first.horizontal_gain, first.vertical_gain) == pytest.approx(gain, abs=5e-5)
        found = second.anisotropic_residual, second.isotropic_residual
        assert found == pytest.approx(residuals, abs=5e-4)


def test_a_harmonic_map_has_no_isotropic_residual() -> None:
    i, j = torch.arange(6.0).double()[:, None], torch.arange(7.0).double()
    assert fit_laplace((i**2 - j**2)[None, None]).isotropic_residual == 0.0
    assert fit_laplace((i**2 + j**2)[None, None]).isotropic_residual == 2.0


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("deficient", [False, True])
def test_fits_agree_with_least_squares(ridge: float, deficient: bool) -> None:
    maps = normal(4, 3, 5, 6)
    if deficient:
        maps[:, 2] = maps[:, 0] - 2 * maps[:, 1]
    fit = fit_first_order(maps, ridge=ridge)
    z = maps[..., :-1].movedim(1, -1).reshape(-1, 3).numpy()
    change = maps.diff(dim=-1).movedim(1, -1).reshape(-1, 3).numpy()
    penalty = ridge * (z**2).sum() / 3
    stacked = np.vstack([z, math.sqrt(penalty) * np.eye(3)])
    expected = np.linalg.lstsq(stacked, np.vstack([change, np.zeros((3, 3))]), rcond=1e-12)[0].T
    np.testing.assert_allclose(fit.horizontal, expected, rtol=0, atol=1e-12)
    error = ((change - z @ expected.T) ** 2).sum()
    assert fit.horizontal_gain == pytest.approx(1 - error / (change**2).sum(), abs=1e-12)
    following = z + change
    spread = ((following - following.mean(0)) ** 2).sum()
    assert fit.horizontal_r2 == pytest.approx(1 - error / spread, abs=1e-12)


def test_ratios_without_a_denominator_are_nan() -> None:
    constant = fit_first_order(torch.full((2, 2, 4, 4), 0.1))
    assert math.isnan(constant.horizontal_gain)
    assert math.isnan(constant.vertical_r2)
    assert constant.commutator == 0.0
    row = fit_first_order(normal(2, 2, 1, 5))
    assert math.isnan(row.vertical_r2)
    assert row.horizontal_r2 >= 0
    plane = fit_laplace(torch.arange(5.0).expand(1, 1, 5, 5))
    assert math.isnan(plane.isotropic_residual)
    assert math.isnan(plane.anisotropic_residual)


def test_fits_are_detached_and_in_double() -> None:
    maps = normal(2, 2, 4, 4).float().requires_grad_()
    fit = fit_first_order(maps)
    assert isinstance(fit, FirstOrderFit)
    assert fit.horizontal.dtype == fit_laplace(maps).matrix.dtype == torch.float64
    assert not fit.vertical.requires_grad
    assert torch.equal(fit.vertical, fit_first_order(maps).vertical)


NAN = torch.tensor([[[[1.0, torch.nan, 2.0]]]])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: harmonic_fill(torch.ones(3, 4), torch.ones(4).bool()), "features"),
        (lambda: harmonic_fill(torch.ones(1, 3, 4), torch.ones(4).bool()), "mask"),
        (lambda: harmonic_fill(torch.ones(1, 3, 4), torch.zeros(3)), "mask"),
        (lambda: harmonic_fill(torch.ones(1, 2, 3, 4), torch.zeros(3).bool()), "mask"),
        (lambda: harmonic_fill(torch.ones(1, 3, 4), [True, False, True]), "mask"),
        (lambda: harmonic_fill(torch.ones(1, 3, 4), torch.ones(3).bool()), "visible"),
        (lambda: heat_diffuse(torch.ones(3), 1.0), "maps"),
        (lambda: heat_diffuse(torch.ones(3, 3), -1.0), "time"),
        (lambda: heat_diffuse(torch.ones(3, 3), math.inf), "time"),
        (lambda: heat_diffuse(torch.ones(3, 3), math.nan), "time"),
        (lambda: fit_first_order(NAN), "finite"),
        (lambda: fit_laplace(NAN.expand(1, 1, 3, 3)), "finite"),
        (lambda: fit_first_order(torch.ones(3, 4, 4)), "features"),
        (lambda: fit_first_order(torch.ones(1, 1, 4, 4), ridge=-1.0), "ridge"),
        (lambda: fit_laplace(torch.ones(1, 1, 2, 4)), "at least 3"),
        (lambda: fit_laplace(torch.ones(1, 1, 4, 2)), "at least 3"),
    ],
)
def test_bad_input_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.gpu
def test_the_equation_on_a_gpu_agrees_with_the_host() -> None:
    maps, mask = normal(2, 2, 6, 7), random_mask(6, 7)
    for function in (lambda z, m: harmonic_fill(z, m), lambda z, m: heat_diffuse(z, 0.7)):
        device = function(maps.cuda(), mask.cuda())
        assert device.is_cuda
        torch.testing.assert_close(device.cpu(), function(maps, mask), rtol=0, atol=1e3 * EPS)
