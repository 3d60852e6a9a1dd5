"""Poisson flow: the exact field, its distributions, targets and losses.

Oracle numbers were computed with 30 digits; they are met to the rounding of float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kexue.generative.poisson_flow import (
    EmpiricalPoissonField,
    PoissonFlowLoss,
    PoissonFlowPlusLoss,
    drift_from_normalized,
    marginal_log_density,
    perturb,
    poisson_field,
    poisson_target,
    posterior_mean,
    prior_log_density,
    sample_prior,
    student_t_noise,
    unit_sphere_area,
)

# Sums of a few products: a few roundings of 1.1e-16.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 0.0}
CORNERS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]], dtype=torch.float64)


def doubles(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


@pytest.mark.parametrize(
    ("dim", "area"),
    [
        (1, 2),
        (2, 6.28318530717959),
        (3, 12.5663706143592),
        (4, 19.7392088021787),
        (65, 6.2015534922904e-19),
    ],
)
def test_area_of_the_unit_sphere(dim: int, area: float) -> None:
    # The numbers have 14 digits; lgamma at 32.5 costs another one.
    assert unit_sphere_area(dim) == pytest.approx(area, rel=1e-13)
    assert unit_sphere_area(dim, log=True) == pytest.approx(math.log(area), rel=1e-13)


@pytest.mark.parametrize(
    ("x", "z", "field"),
    [
        (0.5, 0.25, (0, 0.0172059397937184)),
        (0.0, 1.0, (0.00795774715459477, 0.0557042300821634)),
    ],
)
def test_field_of_two_charges_on_a_line(x: float, z: float, field: tuple[float, float]) -> None:
    along, up = poisson_field(doubles([x]), z, doubles([-1.0], [2.0])).value()
    # At x = 0.5 the two contributions of size 0.03 cancel.
    np.testing.assert_allclose([along.item(), up.item()], field, rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize(
    ("augmented_dim", "field"),
    [
        (1, (0.003197512698772, 0.003335676827731, 0.006533189526503, 0.003266594763252)),
        (
            8,
            (4.92099276606760e-5, 1.85941943820545e-4, 2.35151871481221e-4, 1.17575935740611e-4),
        ),
    ],
)
def test_field_of_three_charges_in_space(augmented_dim: float, field: tuple[float, ...]) -> None:
    along, up = poisson_field(doubles([1, 1, 1]), 0.5, CORNERS, augmented_dim=augmented_dim).value()
    # Numbers with 15 decimals, the smallest of the first row 3.2e-3.
    np.testing.assert_allclose([*along[0].tolist(), up.item()], field, rtol=1e-15 / 3e-3)


def test_field_on_the_axis_of_a_charged_disk() -> None:
    # Rings of equal charge at the midpoints of r²: an error of second order in their number.
    rings, spokes = 4000, 8
    radius = 1.5 * ((torch.arange(rings, dtype=torch.float64) + 0.5) / rings).sqrt()
    angle = torch.arange(spokes, dtype=torch.float64) * (2 * math.pi / spokes)
    disk = torch.stack([torch.outer(radius, angle.cos()), torch.outer(radius, angle.sin())], -1)
    along, up = poisson_field(doubles([0, 0]), 0.7, disk.reshape(-1, 2)).value()
    assert up.item() == pytest.approx(0.0408225026323247, rel=1e-6)
    assert along.abs().max() < 1e-12


@pytest.mark.parametrize("augmented_dim", [1, 2, 5])
def test_field_has_no_curl_and_no_divergence_off_the_data_plane(augmented_dim: int) -> None:
    """In all N + D coordinates: the Jacobian is symmetric and has trace 0."""
    dim, data = 3, normal(7, 3)

    def whole_field(point: Tensor) -> Tensor:
        x, extra = point[:dim], point[dim:]
        along, up = poisson_field(x[None], extra.norm(), data, augmented_dim=augmented_dim).value()
        return torch.cat([along[0], up * extra / extra.norm()])

    jacobian = torch.autograd.functional.jacobian(whole_field, normal(dim + augmented_dim, seed=1))
    scale = jacobian.abs().max()
    assert (jacobian - jacobian.T).abs().max() < 1e-13 * scale
    assert jacobian.trace().abs() < 1e-13 * scale


def test_field_without_extra_dimension_in_the_plane() -> None:
    """One charge in R²: E = x/(2π r²), and no part along z."""
    x = normal(5, 2)
    field = poisson_field(x, None, torch.zeros(1, 2, dtype=torch.float64), augmented_dim=0)
    along, up = field.value()
    expected = x / (2 * math.pi * x.square().sum(1, keepdim=True))
    torch.testing.assert_close(along, expected, **EXACT)
    assert (up == 0).all()


def test_field_without_extra_dimension_belongs_to_the_charge_below() -> None:
    data = normal(4, 3)
    mean = posterior_mean(data[2:3], None, data, augmented_dim=0)
    torch.testing.assert_close(mean, data[2:3], rtol=1e-12, atol=1e-12)


def test_point_on_a_charge_has_a_finite_field() -> None:
    data = normal(4, 3)
    field = poisson_field(data, 1e-3, data)
    assert field.displacement.isfinite().all()
    assert field.log_weight.isfinite().all()


def test_posterior_mean_against_the_definition_in_python() -> None:
    x, z, dim = [0.3, -0.4], 0.7, 2.5
    data, weights = [[0.0, 0.0], [1.0, 0.5], [-2.0, 1.0]], [0.2, 0.5, 0.3]
    kernels = [
        w * (math.dist(x, y) ** 2 + z * z) ** (-(2 + dim) / 2)
        for w, y in zip(weights, data, strict=True)
    ]
    expected = [
        sum(k * y[j] for k, y in zip(kernels, data, strict=True)) / sum(kernels) for j in (0, 1)
    ]
    mean = posterior_mean(
        doubles(x), z, doubles(*data), augmented_dim=dim, weights=doubles(*weights)
    )
    np.testing.assert_allclose(mean[0], expected, rtol=1e-13)


def test_scale_of_weights_and_charges_of_weight_zero_do_not_matter() -> None:
    x, data = normal(5, 3), normal(6, 3, seed=1)
    weights = doubles(1, 0, 2, 3, 0, 1)
    one = poisson_field(x, 0.5, data, weights=weights)
    other = poisson_field(x, 0.5, data[weights > 0], weights=5 * weights[weights > 0])
    torch.testing.assert_close(one.displacement, other.displacement, **EXACT)
    torch.testing.assert_close(one.log_weight, other.log_weight, **EXACT)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_give_the_same_field(chunk_size: int, weighted: bool) -> None:
    x, z, data = 3 * normal(5, 4), normal(5, seed=2).abs(), normal(20, 4, seed=1)
    weights = torch.arange(20, dtype=torch.float64) if weighted else None
    whole = poisson_field(x, z, data, weights=weights)
    chunked = poisson_field(x, z, data, weights=weights, chunk_size=chunk_size)
    torch.testing.assert_close(chunked.displacement, whole.displacement, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.log_weight, whole.log_weight, rtol=1e-12, atol=1e-12)


def test_image_shapes_are_flat_vectors() -> None:
    x, data = normal(3, 12), normal(5, 12, seed=1)
    image = poisson_field(x.reshape(3, 1, 3, 4), 0.5, data.reshape(5, 1, 3, 4))
    flat = poisson_field(x, 0.5, data)
    assert image.displacement.shape == (3, 1, 3, 4)
    torch.testing.assert_close(image.displacement.flatten(1), flat.displacement, rtol=0, atol=0)


def test_high_dimension_far_from_the_origin_in_single_precision() -> None:
    """The promise: 2e-4 relative at N = 3072, data around 8, z down to 1e-3."""
    data = (8 + normal(50, 3072)).float()
    z = torch.logspace(-3, 1.6, 8)
    x = data[:8] + (z[:, None] * 0.02 * normal(8, 3072, seed=1)).float()
    target = poisson_target(x, z, data)
    # Direct differences in float64 of the same float32 numbers.
    difference = x.double()[:, None] - data.double()
    squared = difference.square().sum(2) + z.double()[:, None].square()
    weights = (-(3072 + 1) / 2 * squared.log()).softmax(1)
    displacement = (weights[:, :, None] * difference).sum(1)
    norm = (displacement.square().sum(1) + z.double().square()).sqrt()
    expected = -math.sqrt(3072) * displacement / (norm + 5)[:, None]
    error = (target.x.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_more(dtype: torch.dtype) -> None:
    x, data = normal(4, 6).to(dtype), normal(9, 6, seed=1).to(dtype)
    low = poisson_target(x, 0.3, data)
    high = poisson_target(x.double(), 0.3, data.double())
    assert low.x.dtype == dtype
    torch.testing.assert_close(low.x, high.x.to(dtype), rtol=0, atol=0)


def test_gradients_of_field_and_density() -> None:
    x, z = normal(3, 2).requires_grad_(), doubles(0.3, 1.0, 2.0).requires_grad_()
    data = normal(4, 2, seed=1).requires_grad_()

    def everything(x: Tensor, z: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        field = poisson_field(x, z, data, augmented_dim=2.5, chunk_size=3)
        mean = posterior_mean(x, z, data, augmented_dim=math.inf)
        density = marginal_log_density(x, z, data, augmented_dim=2.5)
        return field.displacement, field.log_weight, mean, density

    assert torch.autograd.gradcheck(everything, (x, z, data))


def test_score_is_the_formula_and_not_parallel_to_the_drift() -> None:
    x, z, dim = normal(4, 3).requires_grad_(), 0.8, 3.0
    data = normal(6, 3, seed=1)
    (score,) = torch.autograd.grad(marginal_log_density(x, z, data, augmented_dim=dim).sum(), x)
    difference = x.detach()[:, None] - data
    squared = difference.square().sum(2) + z**2
    weights = (-(3 + dim) / 2 * squared.log()).softmax(1)
    expected = -(3 + dim) * ((weights / squared)[:, :, None] * difference).sum(1)
    torch.testing.assert_close(score, expected, rtol=1e-11, atol=1e-12)
    drift = x.detach() - posterior_mean(x.detach(), z, data, augmented_dim=dim)
    assert torch.cosine_similarity(-score, drift).min() < 0.999


@pytest.mark.parametrize("augmented_dim", [1, 3.5, 128])
def test_density_is_a_mixture_of_student_t(augmented_dim: float) -> None:
    x, z, data = normal(5, 3), 0.7, normal(4, 3, seed=1)
    shape = np.eye(3) * z**2 / augmented_dim
    expected = np.log(
        np.mean([stats.multivariate_t(y, shape, augmented_dim).pdf(x) for y in data.numpy()], 0)
    )
    density = marginal_log_density(x, z, data, augmented_dim=augmented_dim)
    np.testing.assert_allclose(density, expected, rtol=1e-11)


def test_density_and_field_agree() -> None:
    """log p_z = lgamma((N+D)/2) − lgamma(D/2) − (N/2) log π + D log z + log(W S(N+D))."""
    x, z, data, dim = normal(5, 3), 0.7, normal(4, 3, seed=1), 2.5
    log_weight = poisson_field(x, z, data, augmented_dim=dim).log_weight
    expected = (
        math.lgamma((3 + dim) / 2)
        - math.lgamma(dim / 2)
        - 1.5 * math.log(math.pi)
        + dim * math.log(z)
        + log_weight
        + unit_sphere_area(3 + dim, log=True)
    )
    torch.testing.assert_close(
        marginal_log_density(x, z, data, augmented_dim=dim), expected, **EXACT
    )


def test_infinite_dimension_is_gaussian_diffusion() -> None:
    x, sigma, data = normal(5, 3), 0.7, normal(4, 3, seed=1)
    squared = (x[:, None] - data).square().sum(2)
    weights = (-squared / (2 * sigma**2)).softmax(1)
    mean = posterior_mean(x, sigma, data, augmented_dim=math.inf)
    torch.testing.assert_close(mean, weights @ data, rtol=1e-12, atol=1e-14)
    log_normal = -squared / (2 * sigma**2) - 1.5 * math.log(2 * math.pi * sigma**2)
    density = marginal_log_density(x, sigma, data, augmented_dim=math.inf)
    torch.testing.assert_close(density, log_normal.logsumexp(1) - math.log(4), **EXACT)


@pytest.mark.parametrize("augmented_dim", [1.0, 128.0, 1e6, math.inf])
@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-5])
def test_densities_close_to_a_charge_keep_their_digits(scale: float, augmented_dim: float) -> None:
    """Rounding of the product is as large as the distances there; a charge may stand twice."""
    dim = 3072
    data = normal(4, dim) + 3
    data[1] = data[0]
    weights = torch.tensor([0.1, 0.2, 0.7, 1e-9], dtype=torch.float64)
    z = scale if math.isinf(augmented_dim) else scale * math.sqrt(augmented_dim)
    # On a charge, and as far from one as its noise.
    x = torch.cat([data, data + scale * normal(4, dim, seed=1)]).requires_grad_()

    def by_differences(x: Tensor) -> Tensor:
        squares = (x[:, None] - data).square().sum(2) / z**2
        if math.isinf(augmented_dim):
            kernel = -squares / 2 - dim / 2 * math.log(2 * math.pi)
        else:
            kernel = -(dim + augmented_dim) / 2 * squares.log1p() - dim / 2 * math.log(math.pi)
            kernel += math.lgamma((dim + augmented_dim) / 2) - math.lgamma(augmented_dim / 2)
        return (kernel + (weights / weights.sum()).log()).logsumexp(1) - dim * math.log(z)

    found = marginal_log_density(x, z, data, augmented_dim=augmented_dim, weights=weights)
    expected = by_differences(x)
    # The bound of the module's docstring, and the rounding of terms of some 1e4.
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), x)
    (score,) = torch.autograd.grad(expected.sum(), x)
    # The origin of the module is the charges' mean: moving points there rounds them to 2^-51.
    torch.testing.assert_close(slope * scale, score * scale, rtol=0, atol=1e-6 + 2.0**-50 / scale)


def test_chunks_keep_the_digits_close_to_a_charge() -> None:
    data = normal(7, 3072)
    whole = posterior_mean(data, 1e-5, data, augmented_dim=64.0)
    chunks = posterior_mean(data, 1e-5, data, augmented_dim=64.0, chunk_size=3)
    torch.testing.assert_close(chunks, whole, rtol=1e-12, atol=1e-12)
    fields = [poisson_field(data, 1e-5, data, chunk_size=size).log_weight for size in (None, 3)]
    torch.testing.assert_close(*fields, rtol=1e-13, atol=1e-9)


@pytest.mark.parametrize("augmented_dim", [1e12, 1e14, 1e16, 1e30])
def test_densities_of_very_large_dimension_are_normal(augmented_dim: float) -> None:
    x, data, sigma = normal(5, 3), normal(4, 3, seed=1), 0.7
    z = sigma * math.sqrt(augmented_dim)
    # They differ by r⁴/(4 D), for r up to 5 σ; kernel and constant are sums of some terms up to
    # 3/2 log D + 3 log z, each rounded.
    tolerance = 5**4 / 4 / augmented_dim + 20 * 2.0**-53 * 3 * math.log(augmented_dim)
    for density, *rest in ((marginal_log_density, data), (prior_log_density,)):
        found = density(x, z, *rest, augmented_dim=augmented_dim)
        limit = density(x, sigma, *rest, augmented_dim=math.inf)
        torch.testing.assert_close(found, limit, rtol=0, atol=tolerance)


def test_large_dimension_approaches_gaussian_diffusion_as_one_over_d() -> None:
    x, sigma, data = normal(5, 3), 0.7, normal(4, 3, seed=1)
    limit = posterior_mean(x, sigma, data, augmented_dim=math.inf)

    def error(dim: float) -> float:
        mean = posterior_mean(x, sigma * math.sqrt(dim), data, augmented_dim=dim)
        return (mean - limit).abs().max().item()

    # The next term is O(1/D²): a tenth of 1e-4 of the ratio.
    assert error(1e4) / error(1e5) == pytest.approx(10, rel=1e-2)
    assert error(1e8) < 1e-6


@pytest.mark.parametrize(
    ("augmented_dim", "expected"), [(1, -13.3735220152447), (128, -7.1102116402000)]
)
def test_prior_log_density(augmented_dim: float, expected: float) -> None:
    density = prior_log_density(doubles([1, 2, 3]), 40.0, augmented_dim=augmented_dim)
    assert density.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("dim", "median"), [(1, 1), (2, 1.7320508076), (64, 11.7934525243), (3072, 82.1644262927)]
)
def test_median_radius_of_the_prior(dim: int, median: float) -> None:
    count = 40_000 if dim < 1000 else 4000
    x = sample_prior((count, dim), 40.0, generator=generator(), dtype=torch.float64)
    below = (x.norm(dim=1) < 40 * median).double().mean().item()
    assert abs(below - 0.5) < 4 * 0.5 / math.sqrt(count)  # four standard errors


@pytest.mark.parametrize("augmented_dim", [1, 7.5, 128])
def test_radius_of_the_prior_is_beta_prime(augmented_dim: float) -> None:
    x = sample_prior((5000, 6), 3.0, augmented_dim=augmented_dim, generator=generator())
    odds = (x.double().norm(dim=1) / 3).square().numpy()
    assert stats.kstest(odds, stats.betaprime(3, augmented_dim / 2).cdf).pvalue > 1e-3


def test_direction_of_the_prior_is_uniform() -> None:
    x = sample_prior((5000, 2), 3.0, generator=generator()).double()
    angle = torch.atan2(x[:, 1], x[:, 0]).numpy() / (2 * math.pi) + 0.5
    assert stats.kstest(angle, "uniform").pvalue > 1e-3


def test_longest_norm_scales_and_keeps_the_direction() -> None:
    free = sample_prior((500, 3), 40.0, generator=generator(), dtype=torch.float64)
    kept = sample_prior((500, 3), 40.0, max_norm=60.0, generator=generator(), dtype=torch.float64)
    norms = free.norm(dim=1)
    long = norms > 60
    assert 0 < long.sum() < 500
    torch.testing.assert_close(kept[~long], free[~long], rtol=0, atol=0)
    torch.testing.assert_close(kept[long], free[long] * (60 / norms[long])[:, None], **EXACT)


def test_longest_norm_holds_where_squares_are_beyond_all_numbers() -> None:
    options = {"augmented_dim": 0.01, "dtype": torch.float64}
    free = sample_prior((2000, 3), 40.0, generator=generator(), **options)
    bounded = sample_prior((2000, 3), 40.0, max_norm=3000.0, generator=generator(), **options)
    longer = free.abs().amax(1) > 3000
    assert free.abs().max() > 1e154
    # A quotient, a norm and a product, each to within a few times 2^-53.
    np.testing.assert_allclose(bounded[longer].norm(dim=1), 3000.0, rtol=1e-15)
    assert bool((bounded.sign() == free.sign()).all())


def test_noise_follows_the_scale_of_its_sample() -> None:
    scale = torch.logspace(-2, 2, 4).repeat_interleave(4000)
    noise = student_t_noise((16_000, 5), scale, augmented_dim=12, generator=generator())
    squared = (noise.double() / scale[:, None]).square().sum(1) / 12
    for part in squared.reshape(4, 4000).numpy():
        assert stats.kstest(part, stats.betaprime(2.5, 6).cdf).pvalue > 1e-3


def test_noise_of_infinite_dimension_is_normal() -> None:
    noise = student_t_noise((5000, 1), 2.0, augmented_dim=math.inf, generator=generator())
    assert stats.kstest(noise.flatten().numpy() / 2, "norm").pvalue > 1e-3


def test_perturbation_follows_its_law() -> None:
    """log‖x' − x‖ and log z, where norm, height, exponent and direction are independent."""
    sigma, tau, largest, count, dim = 0.02, 0.05, 100.0, 20_000, 8
    clean = normal(count, dim)
    near = perturb(clean, sigma=sigma, tau=tau, max_exponent=largest, generator=generator(1))
    moved = near.x - clean
    # The same law once more, drawn with numpy from its definition.
    rng = np.random.default_rng(2)
    growth = (1 + tau) ** rng.uniform(0, largest, count)
    norms = sigma * np.linalg.norm(rng.standard_normal((count, dim)), axis=1) * growth
    heights = sigma * np.abs(rng.standard_normal(count)) * growth
    assert stats.ks_2samp(moved.norm(dim=1).numpy(), norms).pvalue > 1e-3
    assert stats.ks_2samp(near.z.numpy(), heights).pvalue > 1e-3
    # Both share the exponent, not the draw: their ratio is free of it.
    ratio = moved.norm(dim=1).numpy() / near.z.numpy()
    chi = np.linalg.norm(rng.standard_normal((count, dim)), axis=1)
    assert stats.ks_2samp(ratio, chi / np.abs(rng.standard_normal(count))).pvalue > 1e-3
    first = (moved / moved.norm(dim=1, keepdim=True))[:, 0].square().numpy()
    assert stats.kstest(first, stats.beta(0.5, (dim - 1) / 2).cdf).pvalue > 1e-3


def test_restricted_exponent_looks_at_the_absolute_height() -> None:
    """38 % of the samples have |e_z| < σ/2; these alone grow by less."""
    clean = torch.zeros(20_000, 1, dtype=torch.float64)
    options: dict[str, Any] = {"sigma": 1.0, "tau": 1.0, "max_exponent": 10.0}
    free = perturb(clean, generator=generator(), **options)
    held = perturb(clean, generator=generator(), restrict_exponent=0.0, **options)
    changed = held.z != free.z
    share = stats.norm.cdf(0.5) - stats.norm.cdf(-0.5)
    assert abs(changed.double().mean() - share) < 4 * math.sqrt(share * (1 - share) / 20_000)
    assert held.z[changed].max() < 0.5
    assert held.z[~changed].min() >= 0.5


@pytest.mark.parametrize(("a", "n"), [(3.0, 0.374688106076206), (0.05, None)])
def test_drift_from_the_normalised_field_is_exact(a: float, n: float | None) -> None:
    gamma, z = 5.0, 0.2
    length = a / (math.hypot(a, z) + gamma)
    if n is not None:
        assert length == pytest.approx(n, rel=1e-14)
    v_x = -math.sqrt(2) * length * doubles([0.6, 0.8])
    drift = drift_from_normalized(v_x, z, gamma=gamma)
    torch.testing.assert_close(drift, a / z * doubles([0.6, 0.8]), **EXACT)


def test_the_usual_approximation_of_the_distance_is_three_percent_off() -> None:
    """What the exact inversion replaces: a ≈ γ n/(1 − n)."""
    for a, expected in ((3.0, 2.99600974903149), (0.05, 0.0484857391528937)):
        n = a / (math.hypot(a, 0.2) + 5)
        assert 5 * n / (1 - n) == pytest.approx(expected, rel=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(1e-6, 1e3),
    z=st.floats(1e-3, 1e2),
    gamma=st.floats(0, 20),
    dim=st.integers(1, 6),
)
def test_drift_inverts_the_target(a: float, z: float, gamma: float, dim: int) -> None:
    direction = normal(1, dim)
    x = a * direction / direction.norm()
    data = torch.zeros(1, dim, dtype=torch.float64)
    target = poisson_target(x, z, data, gamma=gamma)
    drift = drift_from_normalized(target.x, z, gamma=gamma)
    # 1 − n² has lost the digits that n and 1 share: at worst a factor (R/z)² or R/γ.
    lost = min((a / z) ** 2 + 1, (a + z) / gamma if gamma > 0 else math.inf) + 1
    torch.testing.assert_close(drift, x / z, rtol=1e-14 * lost, atol=0)


def test_target_points_towards_the_data_and_is_shorter_than_the_root_of_the_dimension() -> None:
    x, z = 3 * normal(20, 4), normal(20, seed=1).abs()
    data = normal(10, 4, seed=2)
    target = poisson_target(x, z, data, gamma=1.0)
    field = poisson_field(x, z, data)
    assert (target.z < 0).all()
    assert ((target.x * field.displacement).sum(1) <= 0).all()
    length = (target.x.square().sum(1) + target.z.square()).sqrt()
    norm = (field.displacement.square().sum(1) + z.square()).sqrt()
    torch.testing.assert_close(length, 2 * norm / (norm + 1), **EXACT)


def test_ratio_of_the_target_is_the_drift() -> None:
    x, z, data = normal(6, 3), normal(6, seed=1).abs() + 0.1, normal(5, 3, seed=2)
    target = poisson_target(x, z, data, augmented_dim=4)
    drift = EmpiricalPoissonField(data, augmented_dim=4)(x, z)
    torch.testing.assert_close(target.x / target.z[:, None], drift, **EXACT)


def test_loss_is_zero_for_the_field_itself_and_counts_every_component() -> None:
    x, data = normal(16, 3), normal(64, 3, seed=1)
    big = torch.cat([x, data])
    loss = PoissonFlowLoss(max_exponent=100)

    def exact(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        target = poisson_target(x, z, big)
        return target.x, target.z

    assert loss(exact, x, big, generator=generator()) < 1e-28
    # One off in each of the 3 + 1 components: a sum over them of 4, and the mean over the batch.
    shifted = loss(
        lambda x, z: tuple(part + 1 for part in exact(x, z)), x, big, generator=generator()
    )
    assert shifted.item() == pytest.approx(4, rel=1e-12)


def test_loss_uses_the_batch_itself_as_field() -> None:
    x, loss = normal(16, 3), PoissonFlowLoss()
    network = lambda x, z: (-x, -z)  # noqa: E731
    assert loss(network, x, generator=generator()) == loss(network, x, x, generator=generator())


def test_losses_reach_the_network_and_not_the_data() -> None:
    x = normal(16, 3).requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    PoissonFlowLoss()(lambda x, z: (-scale * x, -scale * z), x, generator=generator()).backward()
    assert scale.grad is not None
    assert scale.grad.isfinite()
    assert x.grad is None


@pytest.mark.parametrize("augmented_dim", [2.0, math.inf])
def test_denoising_loss_against_its_formula(augmented_dim: float) -> None:
    """A denoiser that returns 0 pays λ(σ)‖x‖², whose mean over log-normal σ is known."""
    x = normal(8, 3).repeat(5000, 1)
    loss = PoissonFlowPlusLoss(
        augmented_dim=augmented_dim, log_scale_mean=-0.5, log_scale_std=0.3, data_std=0.7
    )
    measured = loss(lambda x, sigma: torch.zeros_like(x), x, generator=generator())
    # λ = 1/s² + 1/σ², and E σ^(−2) = exp(−2 mean + 2 std²).
    weight = 1 / 0.49 + math.exp(1 + 2 * 0.09)
    expected = weight * x.square().sum(1).mean().item()
    # Standard error of the mean: σ^(−2) spreads by exp(1 + 0.18) √(e^0.36 − 1) at most.
    spread = math.exp(1.18) * math.sqrt(math.expm1(0.36)) * x.square().sum(1).max().item()
    assert measured.item() == pytest.approx(expected, abs=4 * spread / math.sqrt(len(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_summed_in_more(dtype: torch.dtype) -> None:
    """A sum of some thousand squares is beyond the largest half."""
    x = (8 * normal(4, 3, 160, 160)).to(dtype)

    def losses(x: Tensor) -> list[Tensor]:
        field = PoissonFlowLoss()(
            lambda x, z: (10 * x.tanh(), z.to(x.dtype)), x, generator=generator()
        )
        denoiser = PoissonFlowPlusLoss(augmented_dim=128)(
            lambda x, sigma: x / 2, x, generator=generator()
        )
        return [field, denoiser]

    found, exact = losses(x), losses(x.float())
    assert all(loss.dtype == torch.float32 for loss in found)
    # Point, z and output are rounded by 2^-8 at most, and the square doubles that.
    torch.testing.assert_close(found, exact, rtol=6 * 2.0**-8, atol=0)


@pytest.mark.bad_input
def test_losses_of_no_sample_are_refused() -> None:
    none, words = torch.zeros(0, 2), "x must hold at least one sample, got none"
    with pytest.raises(ValueError, match=words):
        PoissonFlowPlusLoss(augmented_dim=2)(lambda x, sigma: x, none)
    with pytest.raises(ValueError, match=words):
        PoissonFlowLoss()(lambda x, z: (x, z), none, torch.zeros(3, 2))


def test_denoising_loss_is_least_at_the_posterior_mean() -> None:
    data, dim = normal(6, 2), 4.0
    x = data.repeat(2000, 1)
    loss = PoissonFlowPlusLoss(augmented_dim=dim)

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        return posterior_mean(x, sigma * math.sqrt(dim), data, augmented_dim=dim)

    best = loss(exact, x, generator=generator())
    for other in (
        lambda x, sigma: exact(x, 1.2 * sigma),
        lambda x, sigma: exact(x, sigma / 1.2),
        lambda x, sigma: 0.95 * exact(x, sigma),
    ):
        # The same noise for both: the difference is far above what is left of sampling error.
        assert loss(other, x, generator=generator()) > best


# ruff: noqa: E501
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "integers": (lambda: poisson_field(torch.ones(2, 2).int(), 1.0, CORNERS), TypeError, "floating point"),
    "NaN": (lambda: poisson_field(torch.full((2, 3), math.nan), 1.0, CORNERS), ValueError, "finite"),
    "no z": (lambda: poisson_field(CORNERS, None, CORNERS), ValueError, "z must be positive"),
    "z = 0": (lambda: poisson_field(CORNERS, 0.0, CORNERS), ValueError, "z must be positive"),
    "one z below 0": (lambda: posterior_mean(CORNERS, doubles(1, -1, 1), CORNERS), ValueError, "z must be positive"),
    "z without extra dimension": (lambda: poisson_field(CORNERS, 1.0, CORNERS, augmented_dim=0), ValueError, "augmented_dim is 0"),
    "other sample": (lambda: poisson_field(torch.ones(2, 4), 1.0, CORNERS), ValueError, r"\(4,\) and \(3,\)"),
    "no data": (lambda: poisson_field(CORNERS, 1.0, CORNERS[:0]), ValueError, "at least one charge"),
    "negative weight": (lambda: poisson_field(CORNERS, 1.0, CORNERS, weights=doubles(1, -1, 1)), ValueError, "negative"),
    "weights of zero": (lambda: poisson_field(CORNERS, 1.0, CORNERS, weights=doubles(0, 0, 0)), ValueError, "zeros"),
    "too few weights": (lambda: poisson_field(CORNERS, 1.0, CORNERS, weights=doubles(1, 1)), ValueError, "one entry for each"),
    "negative dimension": (lambda: poisson_field(CORNERS, 1.0, CORNERS, augmented_dim=-1), ValueError, "augmented_dim"),
    "field in infinite dimension": (lambda: poisson_field(CORNERS, 1.0, CORNERS, augmented_dim=math.inf), ValueError, "finite"),
    "density without extra dimension": (lambda: marginal_log_density(CORNERS, 1.0, CORNERS, augmented_dim=0), ValueError, "augmented_dim"),
    "negative gamma": (lambda: poisson_target(CORNERS, 1.0, CORNERS, gamma=-1.0), ValueError, "gamma"),
    "v_x of length √N": (lambda: drift_from_normalized(torch.ones(1, 3), 1.0), ValueError, "square root of its dimension"),
    "loss with other field batch": (lambda: PoissonFlowLoss()(lambda x, z: (x, z), CORNERS, torch.ones(2, 4)), ValueError, "field_batch"),
    "network of another shape": (lambda: PoissonFlowLoss()(lambda x, z: (x, x), CORNERS), ValueError, "v_z must have shape"),
    "noise of integers": (lambda: student_t_noise((2, 3), 1.0, augmented_dim=1, dtype=torch.int64), TypeError, "floating point"),
    "no scale": (lambda: student_t_noise((2, 3), 0.0, augmented_dim=1), ValueError, "scale must be positive"),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case: str) -> None:
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call()
