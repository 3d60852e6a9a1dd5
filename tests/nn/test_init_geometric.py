"""Oracles of the geometric initialisation: moments, gains, orthogonality, and its absence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn
from torch.nn import functional

from kexue.nn.init import (
    activation_gain,
    activation_moments,
    convolution_orthogonal_,
    delta_orthogonal_,
    expected_gram_error,
    gram_error,
    layer_growth,
    orthogonal_,
    singular_value_range,
)

KERNELS = (delta_orthogonal_, convolution_orthogonal_)
# Two thousand products of numbers of order one, each off by a few units in the last place.
QUADRATURE = 1e-13


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def named(name: str) -> Callable[[Tensor], Tensor]:
    return getattr(torch, name) if hasattr(torch, name) else getattr(functional, name)


def defect(weight: Tensor) -> float:
    """Largest entry of W^T W - I, or of W W^T - I for a wide matrix."""
    matrix = weight.double().flatten(1)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return float((tall.mT @ tall - torch.eye(tall.shape[1])).abs().max())


# Quadrature with 30 digits: mean, E[f^2], E[f'^2], forward gain, backward gain.
@pytest.mark.parametrize(
    ("name", "mean", "second", "slope", "forward", "backward"),
    [
        ("relu", 1 / math.sqrt(2 * math.pi), 0.5, 0.5, math.sqrt(2), math.sqrt(2)),
        ("gelu", 0.5 / math.sqrt(math.pi), 0.425221482570299, 0.455850865649287,
         1.53353044119554, 1.48111441270835),
        ("silu", 0.206620964142, 0.355775519817352, 0.379482351632829,
         1.67653247033109, 1.62332025795250),
        ("tanh", 0.0, 0.394294490397841, 0.464402902448268, 1.59253741972283, 1.46741359163080),
        ("sigmoid", 0.5, 0.293379035858093, 0.0448362413501944,
         1.84622854533861, 4.72264608593797),
        ("elu", 0.160520572267, 0.644945417492924, 0.668102001223171,
         1.24519830070071, 1.22342855755262),
        ("softplus", 0.806059183347, 0.921245908859, 0.293379035858093,
         1.04186683553530, 1.84622854533861),
        ("mish", 0.240403888375, 0.452342192375883, 0.479083758374,
         1.48684758127321, 1.44475523255),
    ],
)  # fmt: skip
def test_moments_and_gains_agree_with_thirty_digit_quadrature(
    name: str, mean: float, second: float, slope: float, forward: float, backward: float
) -> None:
    moments = activation_moments(name)
    # The oracles are printed with eleven digits or more.
    assert moments.mean == pytest.approx(mean, rel=2e-11, abs=1e-15)
    assert moments.second_moment == pytest.approx(second, rel=1e-11)
    assert moments.derivative_second_moment == pytest.approx(slope, rel=1e-11)
    assert moments.variance == pytest.approx(second - mean**2, rel=1e-10)
    assert activation_gain(name) == pytest.approx(forward, rel=1e-11)
    assert activation_gain(name, direction="backward") == pytest.approx(backward, rel=1e-11)


def test_selu_keeps_mean_zero_and_second_moment_one() -> None:
    moments = activation_moments("selu")
    assert moments.mean == pytest.approx(0, abs=1e-15)
    assert moments.second_moment == pytest.approx(1, rel=QUADRATURE)
    assert moments.derivative_second_moment == pytest.approx(1.07157499246, rel=1e-11)


def test_piecewise_activations() -> None:
    hardtanh = activation_moments("hardtanh")
    assert hardtanh.second_moment == pytest.approx(0.516058550962, rel=2e-12)
    assert hardtanh.derivative_second_moment == pytest.approx(
        math.erf(1 / math.sqrt(2)), rel=QUADRATURE
    )
    assert activation_moments("hardswish").second_moment == pytest.approx(0.331567375138, rel=2e-12)
    assert activation_moments("leaky_relu").second_moment == pytest.approx(
        (1 + 0.01**2) / 2, rel=QUADRATURE
    )


@pytest.mark.parametrize(
    ("activation", "second"),
    [
        (torch.sin, (1 - math.exp(-2)) / 2),
        (lambda x: x.relu() ** 2, 1.5),
        (torch.exp, math.exp(2)),
        (lambda x: functional.leaky_relu(x, 0.3), (1 + 0.3**2) / 2),
    ],
)
def test_closed_second_moments(activation: Callable[[Tensor], Tensor], second: float) -> None:
    assert activation_moments(activation).second_moment == pytest.approx(second, rel=QUADRATURE)


@pytest.mark.parametrize("mean", [-1.3, 0.37, 5.0])
@pytest.mark.parametrize("std", [0.01, 0.7, 30.0, 1000.0])
def test_relu_of_a_shifted_gaussian(mean: float, std: float) -> None:
    a = mean / std
    below = 0.5 * math.erfc(a / math.sqrt(2))
    density = math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    expected = std**2 * ((1 + a * a) * (1 - below) + a * density)
    moments = activation_moments("relu", mean=mean, std=std)
    # Where all of the law lies below 0 the moments vanish; the closed form cancels there.
    assert moments.second_moment == pytest.approx(expected, rel=1e-10, abs=1e-15 * std**2)
    assert moments.derivative_second_moment == pytest.approx(1 - below, rel=1e-10, abs=1e-15)


def test_sigmoid_of_a_very_wide_gaussian() -> None:
    # E[s'(sz)^2] -> integral of s'^2 times the density at 0, 1/(6 s sqrt(2 pi)); the next term
    # is smaller by the variance of the density s'^2 over 2 s^2, (pi^2/3 - 2)/(2 s^2).
    wide = 1000.0
    leading = 1 / (6 * wide * math.sqrt(2 * math.pi))
    expected = leading * (1 - (math.pi**2 / 3 - 2) / (2 * wide**2))
    moments = activation_moments("sigmoid", std=wide)
    assert moments.derivative_second_moment == pytest.approx(expected, rel=1e-10)


def test_softplus_is_exact_where_torch_takes_the_line() -> None:
    moments = activation_moments("softplus", mean=25.0)
    # 1 - E[(1 - s(x))(1 + s(x))], with 1 - s(x) = exp(-x) up to exp(-2x).
    assert 1 - moments.derivative_second_moment == pytest.approx(2 * math.exp(-24.5), rel=1e-4)


def test_breakpoints_restore_the_digits_at_an_unlisted_kink() -> None:
    def kinked(x: Tensor) -> Tensor:
        return (x - 0.3).relu()

    moved = activation_moments("relu", mean=-0.3)
    named = activation_moments(kinked, breakpoints=[0.3])
    assert named.second_moment == pytest.approx(moved.second_moment, rel=QUADRATURE)
    assert named.derivative_second_moment == pytest.approx(
        moved.derivative_second_moment, rel=QUADRATURE
    )
    # A node's weight in the panel that the kink divides: half a width times 0.06.
    plain = activation_moments(kinked).derivative_second_moment
    assert 1e-8 < abs(plain - named.derivative_second_moment) < 0.02


@settings(max_examples=30, deadline=None)
@given(mean=st.floats(-3, 3), std=st.floats(0.05, 5), scale=st.floats(0.1, 10))
def test_moments_scale_and_stay_consistent(mean: float, std: float, scale: float) -> None:
    one = activation_moments(torch.tanh, mean=mean, std=std)
    many = activation_moments(lambda x: scale * x.tanh(), mean=mean, std=std)
    assert many.mean == pytest.approx(scale * one.mean, rel=1e-11, abs=1e-13)
    assert many.variance == pytest.approx(scale**2 * one.variance, rel=1e-11)
    assert one.second_moment == pytest.approx(one.variance + one.mean**2, rel=1e-11)


def test_variance_does_not_cancel() -> None:
    # A constant of 1e8 in front of a small wave: a difference of moments would lose all digits.
    moments = activation_moments(lambda x: 1e8 + x.sin())
    assert moments.variance == pytest.approx((1 - math.exp(-2)) / 2, rel=1e-6)


def test_modules_are_evaluated_in_double_precision_and_left_alone() -> None:
    module = nn.PReLU(init=0.3)
    before = copy.deepcopy(module.state_dict())
    slope = module.weight.item()
    with torch.no_grad():
        moments = activation_moments(module)
    assert moments.second_moment == pytest.approx((1 + slope**2) / 2, rel=QUADRATURE)
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None
    assert all(bool((before[name] == part).all()) for name, part in module.state_dict().items())
    with torch.inference_mode():
        assert activation_moments(nn.GELU()) == activation_moments("gelu")


def test_piecewise_constant_activation_has_no_slope() -> None:
    moments = activation_moments(torch.sign)
    assert moments.second_moment == pytest.approx(1, rel=QUADRATURE)
    assert moments.derivative_second_moment == 0
    assert activation_moments(lambda x: x > 0).second_moment == pytest.approx(0.5, rel=QUADRATURE)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("std", [1e-200, 1e-3, 1.0, 1e3, 1e200])
def test_linear_layers_need_no_gain(direction: Any, std: float) -> None:
    assert activation_gain("linear", direction=direction, std=std) == pytest.approx(1, rel=1e-12)


def test_growth_at_the_forward_gain() -> None:
    for name, backward in [
        ("tanh", 1.17780723230), ("gelu", 1.07203159844), ("silu", 1.06663424124),
    ]:  # fmt: skip
        growth = layer_growth(name, activation_gain(name))
        assert growth.forward == pytest.approx(1, rel=QUADRATURE)
        assert growth.backward == pytest.approx(backward, rel=1e-11)


def test_gain_one_suits_tanh_for_small_signals() -> None:
    # tanh(x)^2 = x^2 - 2x^4/3 + ..., tanh'(x)^2 = 1 - 2x^2 + ...; E[x^4] = 3 s^4.
    growth = layer_growth("tanh", std=1e-3)
    assert 1 - growth.forward == pytest.approx(2e-6, rel=1e-4)
    assert 1 - growth.backward == pytest.approx(2e-6, rel=1e-4)


def test_both_directions_agree_for_relu_at_every_scale() -> None:
    for std in (0.1, 1.0, 7.0):
        growth = layer_growth("relu", math.sqrt(2), std=std)
        assert (growth.forward, growth.backward) == pytest.approx((1, 1), rel=QUADRATURE)


def test_gain_keeps_the_second_moment_through_a_layer() -> None:
    inputs, width = 500, 200
    x = torch.randn(inputs, width, dtype=torch.float64, generator=generator())
    for name in ("gelu", "tanh", "sigmoid", "relu"):
        gain, second = activation_gain(name), activation_moments(name).second_moment
        weight = orthogonal_(torch.empty(width, width, dtype=torch.float64), gain)
        y = named(name)(x) @ weight.T
        # An orthogonal matrix leaves a mean of squares of independent activations.
        fourth = activation_moments(lambda z, f=name: named(f)(z) ** 2).second_moment
        error = math.sqrt((fourth / second**2 - 1) / (inputs * width))
        assert y.square().mean().item() == pytest.approx(1, abs=5 * error)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (9, 4), (4, 9), (64, 1), (5, 2, 3), (40, 20)])
def test_orthogonal_in_double_precision(shape: tuple[int, ...]) -> None:
    weight = orthogonal_(torch.empty(shape, dtype=torch.float64), generator=generator())
    assert defect(weight) < 1e-13
    x = torch.randn(weight[0].numel(), dtype=torch.float64, generator=generator(1))
    image = weight.flatten(1) @ x
    if shape[0] >= len(x):
        assert image.norm().item() == pytest.approx(x.norm().item(), rel=1e-13)
    else:
        # The rows are orthonormal: what is lost is orthogonal to what stays.
        kept = weight.flatten(1).mT @ image
        assert image.norm().item() == pytest.approx(kept.norm().item(), rel=1e-13)


@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [
        ((1024, 1024), torch.float32, 2e-6),
        ((1024, 256), torch.float32, 2e-6),
        ((512, 512), torch.float64, 1e-12),
    ],
)
def test_orthogonal_at_the_promised_precision(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    weight = orthogonal_(torch.empty(shape, dtype=dtype), generator=generator())
    assert defect(weight) <= bound
    singular = torch.linalg.svdvals(weight.double())
    assert (singular - 1).abs().max().item() <= 10 * bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    single = orthogonal_(torch.empty(32, 16), generator=generator())
    half = orthogonal_(torch.empty(32, 16, dtype=dtype), generator=generator())
    assert torch.equal(half.float(), single.to(dtype).float())
    for fill in KERNELS:
        kernel = fill(torch.empty(8, 4, 3, dtype=dtype), generator=generator())
        assert kernel.dtype == dtype
        assert bool(kernel.float().isfinite().all())


@pytest.mark.parametrize(
    ("shape", "preserve", "factor"),
    [
        ((6, 6), "norm", 1.0), ((6, 6), "second_moment", 1.0), ((8, 2), "isometry", 1.0),
        ((8, 2), "norm", 1.0), ((8, 2), "second_moment", 2.0), ((2, 8), "isometry", 1.0),
        ((2, 8), "norm", 2.0), ((2, 8), "second_moment", 1.0),
    ],
)  # fmt: skip
def test_scale_of_matrices_that_are_not_square(
    shape: tuple[int, int], preserve: Any, factor: float
) -> None:
    plain = orthogonal_(torch.empty(shape, dtype=torch.float64), generator=generator())
    scaled = orthogonal_(
        torch.empty(shape, dtype=torch.float64), -3.0, preserve=preserve, generator=generator()
    )
    torch.testing.assert_close(scaled, -3 * factor * plain, rtol=1e-14, atol=0)


def test_preserved_mean_square_and_mean_length() -> None:
    x = torch.randn(20_000, 30, dtype=torch.float64, generator=generator(1))
    for rows in (10, 90):
        weight = torch.empty(rows, 30, dtype=torch.float64)
        y = x @ orthogonal_(weight, preserve="norm", generator=generator()).T
        # A mean of squares of 20000 vectors with at least 10 components.
        tolerance = 5 * math.sqrt(2 / (20_000 * 10))
        ratio = (y.square().sum() / x.square().sum()).item()
        assert ratio == pytest.approx(1, abs=tolerance)
        y = x @ orthogonal_(weight, preserve="second_moment", generator=generator()).T
        assert (y.square().mean() / x.square().mean()).item() == pytest.approx(1, abs=tolerance)


def test_orthogonal_matrices_are_uniform() -> None:
    draws, n = 4000, 5
    source = generator()
    matrices = torch.stack(
        [orthogonal_(torch.empty(n, n, dtype=torch.float64), generator=source)
         for _ in range(draws)]
    )  # fmt: skip
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Moments of the trace are those of a normal variable: 1, 3, 15, 105 at even powers.
    assert abs(trace.mean().item()) < 5 / math.sqrt(draws)
    assert trace.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / draws))
    assert trace.pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / draws))
    # Entries of one matrix are dependent, so that the standard error is that of the draws.
    fourth = matrices.pow(4).mean((-2, -1))
    error = 5 * fourth.std().item() / math.sqrt(draws)
    assert fourth.mean().item() == pytest.approx(3 / (n * (n + 2)), abs=error)
    # Each entry alone: (q + 1)/2 is Beta((n-1)/2, (n-1)/2). The diagonal betrays a missing sign.
    for i, j in ((0, 0), (n - 1, n - 1), (0, n - 1), (n - 1, 0)):
        shares = (matrices[:, i, j].numpy() + 1) / 2
        assert kstest(shares, "beta", args=((n - 1) / 2, (n - 1) / 2)).pvalue > 1e-4
    assert torch.linalg.det(matrices).mean().abs().item() < 5 / math.sqrt(draws)


def test_tall_matrices_are_uniform() -> None:
    draws = 3000
    source = generator()
    tall = torch.stack(
        [orthogonal_(torch.empty(6, 2), generator=source).double() for _ in range(draws)]
    )
    for i, j in ((0, 0), (1, 1), (5, 0), (0, 1)):
        assert kstest((tall[:, i, j].numpy() + 1) / 2, "beta", args=(2.5, 2.5)).pvalue > 1e-4
    # A uniform frame does not know a rotation: the same law along a mixed direction.
    mixed = (tall[:, 0, 0] + tall[:, 1, 1]) / math.sqrt(2)
    assert mixed.square().mean().item() == pytest.approx(1 / 6, abs=5 * 0.21 / math.sqrt(draws))


@pytest.mark.parametrize("fill", [orthogonal_, *KERNELS])
def test_initialisers_work_in_place_and_follow_the_generator(fill: Callable[..., Tensor]) -> None:
    parameter = nn.Parameter(torch.empty(6, 4, 3))
    returned = fill(parameter, generator=generator(3))
    assert returned is parameter
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    again = fill(torch.empty(6, 4, 3), generator=generator(3))
    other = fill(torch.empty(6, 4, 3), generator=generator(4))
    assert torch.equal(parameter.detach(), again)
    assert not torch.equal(again, other)
    strided = torch.empty(3, 4, 6).permute(2, 1, 0)
    assert torch.equal(fill(strided, generator=generator(3)), again)
    torch.manual_seed(3)
    assert torch.equal(fill(torch.empty(6, 4, 3)), again)


@pytest.mark.parametrize("fill", [orthogonal_, *KERNELS])
def test_empty_and_meta_tensors_come_back_unchanged(fill: Callable[..., Tensor]) -> None:
    for empty in (torch.empty(0, 4, 3), torch.empty(4, 0, 3), torch.empty(4, 3, 0)):
        assert fill(empty) is empty
    meta = torch.empty(4, 3, 3, device="meta")
    assert fill(meta) is meta


def test_recurrent_gates_are_orthogonal_block_by_block() -> None:
    cell = nn.LSTMCell(3, 8)
    for block in cell.weight_hh.detach().chunk(4):
        orthogonal_(block)
    assert all(defect(block) < 1e-6 for block in cell.weight_hh.detach().chunk(4))


def convolve(kernel: Tensor, image: Tensor) -> Tensor:
    """Circular convolution of one image (in, *sizes) by Fourier transform."""
    axes = list(range(-(kernel.ndim - 2), 0))
    spectrum = torch.fft.fftn(kernel, s=image.shape[1:], dim=axes)
    return torch.fft.ifftn(
        torch.einsum("oi...,i...->o...", spectrum, torch.fft.fftn(image, dim=axes)), dim=axes
    ).real


@pytest.mark.parametrize("fill", KERNELS)
@pytest.mark.parametrize(
    "shape",
    [(6, 6, 3), (5, 2, 4), (1, 1, 3), (6, 4, 3, 3), (7, 7, 2, 5), (3, 1, 1, 4), (4, 3, 3, 2, 3)],
)
def test_convolutions_keep_the_length_of_every_image(
    fill: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    kernel = fill(torch.empty(shape, dtype=torch.float64), generator=generator())
    image = torch.randn(shape[1], *[8] * (len(shape) - 2), dtype=torch.float64)
    length = image.norm().item()
    assert convolve(kernel, image).norm().item() == pytest.approx(length, rel=1e-13)
    functions = (functional.conv1d, functional.conv2d, functional.conv3d)
    padding = [size - 1 for size in shape[2:]]
    padded = functions[len(padding) - 1](image[None], kernel, padding=padding)
    assert padded.norm().item() == pytest.approx(length, rel=1e-13)


def test_circular_layers_of_torch_keep_lengths() -> None:
    layer = nn.Conv2d(4, 9, 3, padding=1, padding_mode="circular", bias=False)
    image = torch.randn(5, 4, 12, 10, generator=generator())
    for fill in KERNELS:
        fill(layer.weight, 0.5, generator=generator(1))
        out = layer(image)
        # The norm of each image apart, in float32.
        torch.testing.assert_close(
            out.flatten(1).norm(dim=1), 0.5 * image.flatten(1).norm(dim=1), rtol=1e-5, atol=0
        )


def test_transfer_function_is_an_isometry_at_every_frequency() -> None:
    kernel = convolution_orthogonal_(torch.empty(6, 4, 3, 4, dtype=torch.float64), 1.0)
    frequencies = torch.fft.fftn(kernel, s=(7, 9), dim=(2, 3)).permute(2, 3, 0, 1)
    gram = frequencies.mH @ frequencies
    torch.testing.assert_close(gram, torch.eye(4).expand(7, 9, 4, 4).to(gram), rtol=0, atol=1e-13)


def test_paraunitary_kernels_use_every_tap_and_delta_kernels_one() -> None:
    for shape in ((8, 8, 3, 3), (4, 4, 4), (6, 3, 2, 3, 2)):
        full = convolution_orthogonal_(torch.empty(shape), generator=generator())
        taps = full.square().sum((0, 1))
        assert bool((taps > 1e-4).all())
        delta = delta_orthogonal_(torch.empty(shape), generator=generator())
        where = delta.square().sum((0, 1)).nonzero().tolist()
        assert where == [[(size - 1) // 2 for size in shape[2:]]]


def test_one_output_channel_gives_a_shift() -> None:
    kernel = convolution_orthogonal_(torch.empty(1, 1, 3, 2))
    assert kernel.abs().sum().item() == 1
    assert abs(kernel[0, 0, 2, 1].item()) == 1


def test_a_flattened_orthogonal_weight_is_no_isometric_convolution() -> None:
    weight = orthogonal_(torch.empty(27, 3, 3, 3, dtype=torch.float64), generator=generator())
    assert defect(weight) < 1e-13
    spectrum = torch.fft.fftn(weight, s=(8, 8), dim=(2, 3)).permute(2, 3, 0, 1)
    singular = torch.linalg.svdvals(spectrum)
    assert singular.max() > 1.5


def test_expected_gram_error() -> None:
    assert expected_gram_error(100, 100) == pytest.approx(0.0101, rel=1e-15)
    assert expected_gram_error(300, 60) == pytest.approx(61 / 18000, rel=1e-15)
    assert expected_gram_error(100, 100, kurtosis=1) == pytest.approx(0.0099, rel=1e-15)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (60, 20), (20, 60)])
@pytest.mark.parametrize(
    ("law", "kurtosis"),
    [
        (lambda rng, size: rng.normal(size=size), 3.0),
        (lambda rng, size: rng.uniform(-math.sqrt(3), math.sqrt(3), size), 1.8),
        (lambda rng, size: rng.choice([-1.0, 1.0], size), 1.0),
        (lambda rng, size: rng.laplace(scale=math.sqrt(0.5), size=size), 6.0),
    ],
    ids=["normal", "uniform", "signs", "laplace"],
)
def test_random_entries_have_the_expected_gram_error(
    law: Callable[..., np.ndarray], kurtosis: float, rows: int, columns: int
) -> None:
    draws = 300
    weight = torch.from_numpy(law(np.random.default_rng(0), (draws, rows, columns)))
    errors = gram_error(weight / math.sqrt(rows))
    standard_error = errors.std().item() / math.sqrt(draws)
    expected = expected_gram_error(rows, columns, kurtosis=kurtosis)
    assert errors.mean().item() == pytest.approx(expected, abs=5 * standard_error)
    # The test has power: the kurtosis is visible in the narrow matrices.
    assert 5 * standard_error < 0.06 * expected


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 3, 5, 4), (1, 6)])
def test_gram_error_is_the_mean_over_all_columns(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=generator())
    difference = weight.mT @ weight - torch.eye(shape[-1], dtype=torch.float64)
    torch.testing.assert_close(
        gram_error(weight), difference.square().mean((-2, -1)), rtol=1e-13, atol=0
    )


def test_gram_error_of_half_precision_is_computed_in_single() -> None:
    weight = orthogonal_(torch.empty(300, 200)).bfloat16()
    error = gram_error(weight)
    assert error.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_error(weight.float())
    assert error.item() == inside.item() == gram_error(weight.float()).item()


@pytest.mark.bad_input  # dynamo cannot trace through the shape checks
def test_gram_error_is_traced_as_one_graph() -> None:
    torch._dynamo.reset()
    weight = torch.randn(3, 6, 4, generator=generator())
    traced = torch.compile(gram_error, backend="aot_eager", fullgraph=True)(weight)
    torch.testing.assert_close(traced, gram_error(weight))


def test_gram_error_as_a_penalty_makes_a_matrix_orthogonal() -> None:
    weight = torch.randn(8, 5, dtype=torch.float64, generator=generator()) / 4
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-14, tolerance_change=0)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = gram_error(weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert gram_error(weight).item() < 1e-12


def test_singular_value_range() -> None:
    wide = singular_value_range(400, 100)
    assert (wide.smallest, wide.largest) == (0.5, 1.5)
    square = singular_value_range(100, 100)
    assert (square.smallest, square.largest) == (0.0, 2.0)
    flat = singular_value_range(100, 400)
    assert (flat.smallest, flat.largest) == (1.0, 3.0)


@pytest.mark.parametrize(("rows", "columns"), [(400, 100), (100, 400), (200, 200)])
def test_singular_values_fill_their_range(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=generator(), dtype=torch.float64)
    singular = torch.linalg.svdvals(weight / math.sqrt(rows))
    ends = singular_value_range(rows, columns)
    # The extremes fluctuate on the scale n^(-2/3): 0.03 to 0.05 here, in units of about 1.
    assert singular.max().item() == pytest.approx(ends.largest, abs=0.12)
    assert singular.min().item() == pytest.approx(ends.smallest, abs=0.12)


def test_length_in_a_gaussian_stack_is_a_random_walk_and_stays_in_an_orthogonal_one() -> None:
    width, depth, stacks = 64, 30, 400
    source = generator()
    x = torch.randn(stacks, width, 1, generator=source)
    x = start = x / x.norm(dim=1, keepdim=True)
    for _ in range(depth):
        x = torch.randn(stacks, width, width, generator=source) @ x / math.sqrt(width)
    logs = x.norm(dim=1).log().double().flatten()
    half = torch.tensor(width / 2, dtype=torch.float64)
    mean = depth / 2 * (torch.digamma(half) - half.log()).item()
    deviation = math.sqrt(depth * torch.polygamma(1, half).item()) / 2
    assert logs.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(stacks))
    assert logs.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * stacks))
    assert deviation == pytest.approx(math.sqrt(depth / (2 * width)), rel=0.02)
    for _ in range(depth):
        start = orthogonal_(torch.empty(width, width)) @ start
    # Rounding errors of float32, added up over the layers.
    assert (start.norm(dim=1) - 1).abs().max() < depth * 1e-6


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "activation",
    [
        lambda x: x.softmax(-1),
        lambda x: functional.layer_norm(x, x.shape),
        nn.LayerNorm(5),
        nn.Dropout(0.5),
        lambda x: x / x.abs().max(),
        lambda x: x - x.mean(),
        lambda x: x.cumsum(0),
        lambda x: x[::2],
        lambda x: x.sum(),
        lambda x: x + 1j,
        lambda x: "no tensor",
        nn.GELU,
        torch.log,
        torch.rsqrt,
        lambda x: torch.exp(x**4),
    ],
)
def test_activations_that_are_not_elementwise_and_finite_are_refused(activation: Any) -> None:
    for function in (activation_moments, activation_gain, layer_growth):
        with pytest.raises(ValueError, match="activation"):
            function(activation)


@pytest.mark.bad_input
def test_what_no_gain_can_mend_is_refused() -> None:
    with pytest.raises(ValueError, match="forward gain needs an activation"):
        activation_gain(torch.zeros_like)
    with pytest.raises(ValueError, match="backward gain needs an activation"):
        activation_gain(torch.sign, direction="backward")


@pytest.mark.bad_input
def test_arguments_of_the_moments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of linear.*got 'swish'"):
        activation_gain("swish")
    for wrong in (None, 3, torch.ones(3)):
        with pytest.raises(TypeError, match="must be a name or a callable"):
            activation_moments(wrong)
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="std must be"):
            activation_moments("relu", std=std)
    with pytest.raises(TypeError, match="std must be a real number, got str"):
        activation_gain("relu", std="1")
    with pytest.raises(ValueError, match="direction must be one of forward, backward"):
        activation_gain("relu", direction="both")
    with pytest.raises(ValueError, match="gain must be finite"):
        layer_growth("relu", math.nan)


@pytest.mark.bad_input
@pytest.mark.parametrize("fill", [orthogonal_, *KERNELS])
def test_weights_are_checked(fill: Callable[..., Tensor]) -> None:
    for wrong in (torch.ones(4, 4, 3, dtype=torch.int64), torch.ones(4, 4, 3) + 1j, [[1.0]], None):
        with pytest.raises(TypeError, match="tensor must be a real floating tensor"):
            fill(wrong)
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        fill(torch.ones(4))
    for gain in (math.nan, math.inf):
        with pytest.raises(ValueError, match="gain must be finite"):
            fill(torch.ones(4, 4, 3), gain)
    with pytest.raises(TypeError, match="gain must be a real number, got str"):
        fill(torch.ones(4, 4, 3), "relu")


@pytest.mark.bad_input
@pytest.mark.parametrize("fill", KERNELS)
def test_kernels_are_checked(fill: Callable[..., Tensor]) -> None:
    for shape in ((4, 4), (4, 4, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="one to three axes"):
            fill(torch.ones(shape))
    with pytest.raises(ValueError, match="out = 3 and in = 5"):
        fill(torch.ones(3, 5, 3))


@pytest.mark.bad_input
def test_other_choices_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="preserve must be one of isometry, norm, second_moment"):
        orthogonal_(torch.ones(3, 3), preserve="length")
    for function in (expected_gram_error, singular_value_range):
        with pytest.raises(ValueError, match="rows must be an integer of at least 1"):
            function(0, 3)
        with pytest.raises(ValueError, match="columns must be an integer of at least 1"):
            function(3, -1)
        with pytest.raises(TypeError, match="rows must be an integer"):
            function(2.5, 3)
    with pytest.raises(ValueError, match="kurtosis must be at least 1"):
        expected_gram_error(3, 3, kurtosis=0.5)
    with pytest.raises(ValueError, match="finite"):
        gram_error(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(TypeError, match="weight must be a real floating tensor"):
        gram_error(torch.ones(3, 3, dtype=torch.int64))


@pytest.mark.gpu
def test_initialisers_on_a_gpu() -> None:
    source = torch.Generator("cuda").manual_seed(0)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        weight = orthogonal_(torch.empty(512, 512, dtype=dtype, device="cuda"), generator=source)
        assert defect(weight.cpu()) <= bound
    kernel = convolution_orthogonal_(torch.empty(8, 4, 3, 3, device="cuda"), generator=source)
    image = torch.randn(4, 9, 9)
    assert convolve(kernel.cpu(), image).norm().item() == pytest.approx(
        image.norm().item(), rel=1e-5
    )
