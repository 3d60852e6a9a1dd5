"""Poisson flow along its lines: drifts, integration, samples and likelihoods."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from kexue.generative.poisson_flow import (
    DenoiserDrift,
    EmpiricalPoissonField,
    NormalizedFieldDrift,
    drift_from_normalized,
    integrate,
    log_likelihood,
    marginal_log_density,
    poisson_target,
    posterior_mean,
    prior_log_density,
    sample,
    sample_prior,
)

PAIR = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


@pytest.mark.parametrize(
    ("augmented_dim", "start", "end"),
    [
        (1, 10.0, 1.37328387112078),
        (1, -7.0, -0.251226123455749),
        (4, 10.0, 1.88867376669540),
        (4, -7.0, -0.834948839364029),
    ],
)
def test_lines_in_one_dimension_end_where_the_invariant_says(
    augmented_dim: float, start: float, end: float
) -> None:
    drift = EmpiricalPoissonField(PAIR, augmented_dim=augmented_dim)
    x = torch.tensor([[start]], dtype=torch.float64)
    found = integrate(drift, x, 40.0, 0.5, num_steps=400, method="rk4")
    assert found.item() == pytest.approx(end, abs=1e-10)


@pytest.mark.parametrize("method", ["heun", "rk4", "rk45"])
def test_flux_between_lines_is_constant_in_one_dimension(method: str) -> None:
    """Σ w_i T_D((x − y_i) √D/z) keeps its value along every line."""
    data, dim = normal(5, 1), 2.0
    weights = torch.tensor([1.0, 2, 3, 2, 1], dtype=torch.float64)
    drift = EmpiricalPoissonField(data, augmented_dim=dim, weights=weights)
    x = 30 * normal(20, 1, seed=1)

    def flux(x: Tensor, z: float) -> np.ndarray:
        parts = stats.t(dim).cdf((x - data.T).numpy() * math.sqrt(dim) / z)
        return parts @ (weights / weights.sum()).numpy()

    end = integrate(drift, x, 40.0, 0.1, num_steps=200, method=method, rtol=1e-9, atol=1e-9)
    # 200 Heun steps of 3 % each: an error of a few 1e-5 in x, and a slope of flux below 1/z.
    tolerance = {"heun": 1e-3, "rk4": 1e-6, "rk45": 1e-6}[method]
    np.testing.assert_allclose(flux(end, 0.1), flux(x, 40.0), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("spacing", ["log", "rho"])
def test_order_of_the_methods(method: str, order: int, spacing: str) -> None:
    drift = EmpiricalPoissonField(PAIR)
    x = torch.tensor([[3.0], [-4.0]], dtype=torch.float64)
    exact = integrate(drift, x, 5.0, 0.5, method="rk4", num_steps=800)

    def error(num_steps: int) -> float:
        end = integrate(drift, x, 5.0, 0.5, method=method, num_steps=num_steps, spacing=spacing)
        return (end - exact).norm().item()

    # The slope between 40 and 80 steps misses the order by O(1/steps).
    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
@pytest.mark.parametrize("augmented_dim", [1, 8, math.inf])
def test_line_to_one_charge_is_straight(method: str, augmented_dim: float) -> None:
    charge = normal(1, 3)
    drift = EmpiricalPoissonField(charge, augmented_dim=augmented_dim)
    x = 20 * normal(4, 3, seed=1)
    # In z every method is exact on a straight line: a few roundings of numbers of size 20.
    end = integrate(drift, x, 40.0, 0.5, num_steps=5, method=method, spacing="rho")
    torch.testing.assert_close(end, charge + (x - charge) * 0.5 / 40, rtol=0, atol=1e-13)
    # In log z a step multiplies x − y by the first terms of the series of exp(−h).
    end = integrate(drift, x, 40.0, 0.5, num_steps=5, method=method)
    terms, h = {"euler": 1, "heun": 2, "rk4": 4}[method], math.log(80) / 5
    factor = sum((-h) ** k / math.factorial(k) for k in range(terms + 1)) ** 5
    torch.testing.assert_close(end, charge + (x - charge) * factor, rtol=0, atol=1e-12)


def test_there_and_back_again() -> None:
    drift = EmpiricalPoissonField(normal(6, 3), augmented_dim=3)
    x = normal(4, 3, seed=1)
    up = integrate(drift, x, 0.5, 40.0, method="rk4", num_steps=300)
    down = integrate(drift, up, 40.0, 0.5, method="rk4", num_steps=300)
    torch.testing.assert_close(down, x, rtol=0, atol=1e-7)


def test_last_step_gives_the_posterior_mean() -> None:
    data = normal(8, 2)
    drift = EmpiricalPoissonField(data)
    options: dict[str, Any] = {"z_min": 0.3, "generator": None, "dtype": torch.float64}
    before = sample(drift, (50, 2), **{**options, "generator": generator()}, final_denoise=False)
    after = sample(drift, (50, 2), **{**options, "generator": generator()})
    torch.testing.assert_close(after, posterior_mean(before, 0.3, data), rtol=0, atol=1e-12)


def test_samples_of_the_exact_field_are_the_data_in_equal_shares() -> None:
    data = normal(12, 4)
    data = data - data.mean(0)
    x = sample(
        EmpiricalPoissonField(data), (2400, 4), z_max=400, num_steps=60,
        generator=generator(), dtype=torch.float64,
    )  # fmt: skip
    distance, nearest = torch.cdist(x, data).min(1)
    # A line that ends between two charges is at distance z_min from the boundary: a few of them.
    assert (distance < 1e-2).double().mean() > 0.99
    assert stats.chisquare(nearest.bincount(minlength=12).numpy()).pvalue > 1e-3


def test_flow_carries_the_density() -> None:
    """One plane's samples of the mixture become the other plane's: a two-sample test."""
    data, dim = normal(3, 1), 3.0
    drift = EmpiricalPoissonField(data, augmented_dim=dim)

    def draw(z: float, seed: int) -> Tensor:
        noise = sample_prior(
            (4000, 1), z, augmented_dim=dim, generator=generator(seed), dtype=torch.float64
        )
        return noise + data[torch.randint(3, (4000,), generator=generator(seed + 10))]

    moved = integrate(drift, draw(5.0, 1), 5.0, 0.2, num_steps=100)
    assert stats.ks_2samp(moved[:, 0].numpy(), draw(0.2, 2)[:, 0].numpy()).pvalue > 1e-3


def test_flux_is_conserved() -> None:
    """∂_z p + div(p dx/dz) = 0, by autograd, for a fractional dimension too."""
    data, dim = normal(4, 2), 2.5
    drift = EmpiricalPoissonField(data, augmented_dim=dim)

    def density(x: Tensor, z: Tensor) -> Tensor:
        return marginal_log_density(x[None], z, data, augmented_dim=dim).exp()[0]

    x, z = normal(2, seed=1), torch.tensor(0.7, dtype=torch.float64)
    flux = torch.autograd.functional.jacobian(lambda x: density(x, z) * drift(x[None], z)[0], x)
    change = torch.autograd.functional.jacobian(lambda z: density(x, z), z)
    assert (flux.trace() + change).abs() < 1e-13


def test_single_precision_follows_double() -> None:
    data, x = normal(6, 3), 20 * normal(5, 3, seed=1)
    double = integrate(EmpiricalPoissonField(data), x, 40.0, 0.3)
    single = integrate(EmpiricalPoissonField(data.float()), x.float(), 40.0, 0.3)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_predicted_z", [False, True])
def test_network_of_the_field_gives_the_exact_drift(use_predicted_z: bool) -> None:
    data, x = normal(6, 3), 3 * normal(5, 3, seed=1)
    z = normal(5, seed=2).abs() + 0.1

    def network(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        target = poisson_target(x, z, data)
        return target.x, target.z

    drift = NormalizedFieldDrift(network, use_predicted_z=use_predicted_z)
    torch.testing.assert_close(drift(x, z), EmpiricalPoissonField(data)(x, z), rtol=1e-10, atol=0)


def test_estimates_longer_than_any_field_are_clamped() -> None:
    v_x = 10 * normal(3, 4)
    drift = NormalizedFieldDrift(lambda x, z: (v_x, -z))(torch.zeros_like(v_x), 0.5)
    clamped = 0.999 * 2 * v_x / v_x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(drift, drift_from_normalized(clamped, 0.5), rtol=1e-10, atol=0)


def test_drift_of_a_network_that_says_zero_has_a_gradient() -> None:
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    NormalizedFieldDrift(lambda x, z: (scale * x, -z))(normal(3, 4), 0.5).sum().backward()
    assert scale.grad is not None
    assert scale.grad.isfinite()


@pytest.mark.parametrize("augmented_dim", [1, 64, math.inf])
def test_denoiser_gives_the_exact_drift(augmented_dim: float) -> None:
    data, x, z = normal(6, 3), normal(5, 3, seed=1), normal(5, seed=2).abs() + 0.5

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        height = sigma if math.isinf(augmented_dim) else sigma * math.sqrt(augmented_dim)
        return posterior_mean(x, height, data, augmented_dim=augmented_dim)

    drift = DenoiserDrift(denoiser, augmented_dim=augmented_dim)
    expected = EmpiricalPoissonField(data, augmented_dim=augmented_dim)(x, z)
    torch.testing.assert_close(drift(x, z), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("augmented_dim", [1, 6.5, math.inf])
def test_likelihood_of_the_exact_flow_is_the_mixture(augmented_dim: float) -> None:
    data = normal(5, 2)
    data = data - data.mean(0)
    x = data[:3] + 0.3 * normal(3, 2, seed=1)
    found = log_likelihood(
        EmpiricalPoissonField(data, augmented_dim=augmented_dim),
        x, z_min=0.2, z_max=4000.0, augmented_dim=augmented_dim, num_steps=300,
    )  # fmt: skip
    expected = marginal_log_density(x, 0.2, data, augmented_dim=augmented_dim)
    # The prior is centred at one point: an error of second order in size over height, 1e-6; and
    # 300 steps of 3 % of order four.
    torch.testing.assert_close(found.log_density, expected, rtol=0, atol=2e-5)
    prior = prior_log_density(found.latent, 4000.0, augmented_dim=augmented_dim)
    torch.testing.assert_close(found.log_density - prior, found.divergence_integral)


def test_latent_of_the_likelihood_is_where_the_line_goes() -> None:
    drift = EmpiricalPoissonField(normal(5, 2))
    x = normal(3, 2, seed=1)
    latent = log_likelihood(drift, x, z_min=0.2, num_steps=300).latent
    along = integrate(drift, x, 0.2, 40.0, num_steps=300, method="rk4")
    torch.testing.assert_close(latent, along, rtol=1e-6, atol=0)


def test_estimated_divergence_has_the_exact_mean() -> None:
    data, x = normal(5, 3), normal(1, 3, seed=1)
    drift = EmpiricalPoissonField(data)
    options: dict[str, Any] = {"z_min": 0.5, "num_steps": 20}
    exact = log_likelihood(drift, x, **options).divergence_integral.item()
    estimates = log_likelihood(
        drift, x.repeat(400, 1), divergence="hutchinson", generator=generator(), **options
    ).divergence_integral
    error = estimates.std().item() / math.sqrt(400)
    assert error > 0
    assert abs(estimates.mean().item() - exact) < 4 * error


def test_many_probes_narrow_the_estimate() -> None:
    drift = EmpiricalPoissonField(normal(5, 3))
    x = normal(1, 3, seed=1).repeat(200, 1)
    spreads = [
        log_likelihood(
            drift, x, z_min=0.5, num_steps=5, divergence="hutchinson",
            num_probes=probes, generator=generator(),
        ).divergence_integral.std().item()
        for probes in (1, 16)
    ]  # fmt: skip
    # A quarter, and each spread is known to 1/√400 = 5 %.
    assert spreads[1] / spreads[0] == pytest.approx(0.25, abs=4 * 0.25 * 0.07)


def test_likelihood_follows_the_gradient_of_its_input_only_where_asked() -> None:
    data, x = normal(4, 2), normal(3, 2, seed=1)
    drift = EmpiricalPoissonField(data)
    with torch.no_grad():
        assert not log_likelihood(drift, x, z_min=0.5, num_steps=5).log_density.requires_grad
    wanted = x.clone().requires_grad_()
    density = log_likelihood(drift, wanted, z_min=0.5, z_max=4000, num_steps=60).log_density
    (score,) = torch.autograd.grad(density.sum(), wanted)
    again = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(marginal_log_density(again, 0.5, data).sum(), again)
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-2)


def test_integration_reaches_the_parameters_of_a_network() -> None:
    network = nn.Linear(2, 2).double()
    drift = DenoiserDrift(lambda x, sigma: network(x), augmented_dim=1)
    integrate(drift, normal(3, 2), 2.0, 0.5, num_steps=3).sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.abs().max() > 0


def test_heights_lie_between_the_ends_and_meet_them() -> None:
    """A denoiser with a bounded schedule refuses heights that rounding has put above it."""
    for z_max in (10.0, 40.0, 80.0, 0.3):
        for method in ("euler", "heun", "rk4", "rk45"):
            for spacing in ("log", "rho"):
                asked: list[float] = []

                def drift(x: Tensor, z: Tensor, asked: list[float] = asked) -> Tensor:
                    asked.append(z[0].item())
                    return x / z[:, None]

                options = {"num_steps": 7, "method": method, "spacing": spacing}
                sample(drift, (2, 3), z_max=z_max, dtype=torch.float64, **options)
                assert (min(asked), max(asked)) == (1e-3, z_max)
                asked.clear()
                integrate(drift, normal(2, 3), 1e-3, z_max, **options)
                assert asked[0] == 1e-3
                assert max(asked) <= z_max
                asked.clear()
                log_likelihood(drift, normal(2, 3), z_max=z_max, num_steps=7)
                assert (min(asked), max(asked)) == (1e-3, z_max)


def test_adaptive_lines_start_on_a_charge() -> None:
    data = normal(5, 3)
    asked: list[float] = []
    exact = EmpiricalPoissonField(data)

    def drift(x: Tensor, z: Tensor) -> Tensor:
        asked.append(z[0].item())
        return exact(x, z)

    up = integrate(drift, data.float(), 1e-3, 40.0, method="rk45", rtol=1e-8, atol=1e-8)
    assert min(asked) >= 1e-3
    assert max(asked) <= 40.0
    same = integrate(exact, data.float().double(), 1e-3, 40.0, method="rk4", num_steps=1000)
    # Nearby lines part by the factor 40/0.001 at most: of rounding to 2^-24 that leaves 2.4e-3,
    # beside which the steps do not count.
    torch.testing.assert_close(up.double(), same, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_drift_that_is_not_finite_is_an_error_in_words(value: float) -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        integrate(lambda x, z: x + value, PAIR, 1.0, 0.5, method="rk45")


# Relative error of one rounding.
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", ["euler", "rk4", "rk45"])
def test_half_precision_goes_through_the_drift_only(dtype: torch.dtype, method: str) -> None:
    """A state in half precision loses small steps altogether."""
    dtypes = set()

    def drift(x: Tensor, z: Tensor) -> Tensor:
        dtypes.add(x.dtype)
        return x / z.to(x.dtype)[:, None]

    x = normal(4, 3).to(dtype)
    options = {"method": method, "num_steps": 2000, "rtol": 1e-2, "atol": 1e-2}
    found = integrate(drift, x, 0.5, 20.0, **options)
    assert found.dtype == dtype
    assert dtypes == {dtype}
    exact = integrate(drift, x.double(), 0.5, 20.0, **options)
    # x, z and their ratio are rounded to nearest, in a rate that is integrated over log 40; the
    # result is rounded once more. The adaptive steps may differ by their tolerance each.
    bound = (3 * math.log(40.0) + 1) / 2 * HALF[dtype] + 0.1 * (method == "rk45")
    torch.testing.assert_close(found.double(), exact, rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_likelihood_of_half_precision_is_integrated_in_more(dtype: torch.dtype) -> None:
    dim = 64
    data = normal(20, dim)
    x = (data[:4] + normal(4, dim, seed=1)).to(dtype)
    drift = EmpiricalPoissonField(data, augmented_dim=dim)
    options = {"z_min": 1.0, "z_max": 400.0, "augmented_dim": dim, "num_steps": 10}
    found, exact = (log_likelihood(drift, values, **options) for values in (x, x.double()))
    assert found.latent.dtype == dtype
    assert found.log_density.dtype == found.divergence_integral.dtype == torch.float32
    # Each of the 64 terms of the divergence is rounded to nearest, and so are the points where
    # they are asked for: 64 log 400 nats in all, by half the spacing twice.
    bound = dim * math.log(400.0) * HALF[dtype]
    torch.testing.assert_close(found.log_density.double(), exact.log_density, rtol=0, atol=bound)


def test_samples_in_half_precision_start_within_its_range() -> None:
    data = normal(5, 3).half().double()
    drift = EmpiricalPoissonField(data)

    def draw(dtype: torch.dtype) -> Tensor:
        return sample(drift, (20_000, 3), num_steps=20, dtype=dtype, generator=generator())

    # Some twenty entries of the Cauchy prior are beyond the largest half.
    start = sample_prior((20_000, 3), 40.0, dtype=torch.float64, generator=generator())
    assert start.abs().max() > torch.finfo(torch.float16).max
    found, exact = draw(torch.float16), draw(torch.float64)
    assert found.dtype == torch.float16
    # Lines that part decide otherwise for few samples.
    assert ((found - exact).abs().amax(1) < 1e-2).double().mean() > 0.98


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("outside", [False, True])
def test_inference_mode_changes_no_likelihood(divergence: str, outside: bool) -> None:
    drift = EmpiricalPoissonField(normal(5, 3))

    def likelihood(x: Tensor) -> Any:
        options = {"z_min": 0.5, "num_steps": 4, "divergence": divergence}
        return log_likelihood(drift, x, generator=generator(), **options)

    expected = likelihood(normal(4, 3))
    assert bool((expected.divergence_integral != 0).all())
    with torch.inference_mode():
        x = normal(4, 3)
        found = None if outside else likelihood(x)
    found = likelihood(x) if found is None else found
    torch.testing.assert_close(found.log_density, expected.log_density, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_drift_of_parameters_alone_has_no_divergence(divergence: str) -> None:
    shift = nn.Parameter(torch.ones(3))
    likelihood = log_likelihood(
        lambda x, z: shift.expand(x.shape), torch.zeros(4, 3), z_max=1.0, divergence=divergence
    )
    assert likelihood.divergence_integral.tolist() == [0.0] * 4


_COMPILED = """
import torch
from kexue.generative.poisson_flow import (
    DenoiserDrift, EmpiricalPoissonField, NormalizedFieldDrift
)

torch.manual_seed(0)
data, x = torch.randn(6, 3).double(), torch.randn(4, 3).double()
z = torch.rand(4).double() + 0.1
weights = torch.tensor([1.0, 0, 2, 1, 1, 1])
for drift in (
    EmpiricalPoissonField(data, augmented_dim=2.5, chunk_size=4),
    EmpiricalPoissonField(data, weights=weights),
    NormalizedFieldDrift(lambda x, z: (-x / 10, -z)),
    DenoiserDrift(lambda x, sigma: x / (1 + sigma[:, None]), augmented_dim=8),
):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, z: drift(x, z), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, z), drift(x, z), rtol=1e-12, atol=1e-12)
print("compiled")
"""


def test_drifts_compile_without_a_graph_break() -> None:
    # In a process of its own: dynamo cannot trace through the shape checks of the tests.
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr


@pytest.mark.gpu
def test_samples_on_an_accelerator() -> None:
    data = normal(6, 3).cuda()
    x = sample(
        EmpiricalPoissonField(data), (32, 3), device="cuda", dtype=torch.float64,
        generator=torch.Generator("cuda").manual_seed(0),
    )  # fmt: skip
    assert x.device.type == "cuda"
    assert (torch.cdist(x, data).min(1).values < 1e-2).double().mean() > 0.9


# ruff: noqa: E501
BAD: dict[str, tuple[Any, str]] = {
    "no step": (lambda: integrate(_identity, PAIR, 1.0, 0.5, num_steps=0), "num_steps"),
    "unknown method": (lambda: integrate(_identity, PAIR, 1.0, 0.5, method="ab2"), "euler, heun, rk4, rk45"),
    "unknown spacing": (lambda: integrate(_identity, PAIR, 1.0, 0.5, spacing="even"), "log, rho"),
    "tolerance below 0": (lambda: integrate(_identity, PAIR, 1.0, 0.5, method="rk45", rtol=-1), "rtol must be positive"),
    "end at 0": (lambda: integrate(_identity, PAIR, 1.0, 0.0), "z_end must be positive"),
    "NaN": (lambda: integrate(_identity, PAIR * math.nan, 1.0, 0.5), "finite"),
    "drift of another shape": (lambda: integrate(lambda x, z: x[:1], PAIR, 1.0, 0.5), "the drift must have shape"),
    "z_max below 0": (lambda: sample(_identity, (2, 2), z_max=-1.0), "z_max must be positive"),
    "z_min above z_max": (lambda: sample(_identity, (2, 2), z_min=50.0), "z_min must be below z_max"),
    "no sample in the shape": (lambda: sample(_identity, (2,)), "shape must be"),
    "unknown divergence": (lambda: log_likelihood(_identity, PAIR, divergence="skilling"), "exact, hutchinson"),
    "no probe": (lambda: log_likelihood(_identity, PAIR, num_probes=0), "num_probes"),
    "empirical field without extra dimension": (lambda: EmpiricalPoissonField(PAIR, augmented_dim=0), "augmented_dim"),
    "denoiser without extra dimension": (lambda: DenoiserDrift(_identity, augmented_dim=0), "augmented_dim"),
    "negative gamma": (lambda: NormalizedFieldDrift(_identity, gamma=-1), "gamma"),
    "denoiser of another shape": (lambda: DenoiserDrift(lambda x, s: x[:1], augmented_dim=1)(PAIR, 1.0), "denoiser's output"),
}  # fmt: skip


def _identity(x: Tensor, z: Tensor) -> Tensor:
    return x


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
