"""The flow against closed forms and other people's samplers, and the ways between latent codes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative.diffusion.mixtures import SCHEDULES, double, mixture
from kexue.generative.diffusion import (
    GaussianMixtureDenoiser,
    HeatSchedule,
    NetworkDenoiser,
    angle_velocity,
    continuity_residual,
    decode,
    divergence,
    encode,
    heat_velocity,
    interpolate_latents,
    sample,
    solve_ode,
)
from kexue.generative.diffusion.ode import flow
from kexue.generative.diffusion.ode.integrate import dopri5, euler, heun

HEAT = HeatSchedule()
# Where the sigma of each schedule is about 0.05 and 5.
SPANS = {
    name: tuple(schedule.time_from_sigma(sigma).item() for sigma in (0.05, 5.0))
    for name, schedule in SCHEDULES.items()
}
COVARIANCE = double([[0.5, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 2.0]])


def line(schedule=HEAT):
    """The mixture on the line whose flow is known to thirty digits."""
    return GaussianMixtureDenoiser(
        double([[-1.2], [0.514285714285714]]),
        double([0.04, 0.25]),
        double([0.3, 0.7]),
        schedule=schedule,
    )


def centred(schedule):
    return GaussianMixtureDenoiser(double([[0.0] * 3]), COVARIANCE[None], schedule=schedule)


def states(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_centred_gaussian_data_are_rescaled_along_every_axis(name, coordinate):
    schedule, (start, end) = SCHEDULES[name], SPANS[name]
    values, axes = torch.linalg.eigh(COVARIANCE)

    def deviation(time):
        signal, noise = schedule.signal_scale(time), schedule.noise_scale(time)
        return (signal**2 * values + noise**2).sqrt()

    x = states(5, 3)
    expected = (x @ axes * deviation(end) / deviation(start)) @ axes.T
    options = {"method": "dopri5", "coordinate": coordinate, "rtol": 1e-10, "atol": 1e-10}
    reached = solve_ode(centred(schedule), x, start=start, end=end, **options)
    # Some fifty steps of 1e-10 each, and 1/cos φ = 5 times growth by 12 for errors made early.
    torch.testing.assert_close(reached, expected, rtol=0, atol=3e-7)


def test_flow_on_the_line_matches_quantiles():
    x = double([[-1.1], [0.0], [0.9]])
    expected = double([[-1.12940670952262], [-0.301106714917485], [1.38570454616682]])
    options = {"method": "dopri5", "rtol": 1e-10, "atol": 1e-10}
    for coordinate in ("sigma", "angle"):
        reached = solve_ode(line(), x, start=0.01, end=1.0, coordinate=coordinate, **options)
        # Some fifty steps of 1e-10 each, and growth by at most 10 of errors made early.
        torch.testing.assert_close(reached, expected, rtol=0, atol=5e-8)
        back = solve_ode(line(), expected, start=1.0, end=0.01, coordinate=coordinate, **options)
        torch.testing.assert_close(back, x, rtol=0, atol=5e-8)


@settings(max_examples=25, deadline=None)
@given(
    start=st.floats(0.05, 5.0),
    end=st.floats(0.05, 5.0),
    shift=st.floats(-1.0, 1.0),
)
def test_flow_on_the_line_keeps_the_order_of_points(start, end, shift):
    if abs(start - end) < 1e-3:
        return
    x = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None] + shift
    reached = solve_ode(line(), x, start=start, end=end, coordinate="angle", num_steps=60)
    assert bool((reached.diff(dim=0) > 0).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_in_sigma_is_ddim_on_every_grid(name):
    schedule = SCHEDULES[name]
    denoiser = mixture(schedule)
    x = schedule.prior_scale * states(6, 2)
    for spacing in ("uniform" if name in ("heat", "variance_preserving") else "trailing", "karras"):
        times = schedule.times(9, spacing=spacing)
        for grid in (times, times[:-1]):
            ours = solve_ode(denoiser, x, times=grid, method="euler")
            theirs = sample(denoiser, initial=x, times=grid, eta=0.0)
            # The same numbers in another order: some ten roundings, x/ᾱ as large as 2e4.
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_heun_on_the_default_grid_is_the_deterministic_sampler_of_edm():
    denoiser, num_steps = mixture(HEAT), 12
    x = 80 * states(6, 2)
    index = torch.arange(num_steps, dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = [*((high + index / (num_steps - 1) * (low - high)) ** 7).tolist(), 0.0]
    expected = x
    for here, there in pairwise(sigmas):
        slope = (expected - denoiser.predict(expected, here).sample) / here
        ahead = expected + (there - here) * slope
        if there > 0:
            slope_ahead = (ahead - denoiser.predict(ahead, there).sample) / there
            ahead = expected + (there - here) * (slope + slope_ahead) / 2
        expected = ahead
    # (x − x̂_0)/σ loses digits at σ = 0.002 that ε̂ keeps.
    torch.testing.assert_close(
        decode(denoiser, x, num_steps=num_steps), expected, atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "heat"])
def test_dpm_solver_is_the_second_order_multistep_formula_of_the_paper(name):
    """Algorithm 2 of arXiv 2211.01095, in x and half the log signal-to-noise ratio λ."""
    schedule = SCHEDULES[name]
    denoiser = mixture(schedule)
    times = schedule.times(8, spacing="karras")[:-1]
    x = schedule.prior_scale * states(6, 2)
    expected, before = x, None
    for here, there in pairwise(times):
        step = schedule.log_sigma(here) - schedule.log_sigma(there)
        clean = denoiser.predict(expected, here).sample
        target = clean
        if before is not None:
            ratio = before[1] / step
            target = (1 + 1 / (2 * ratio)) * clean - before[0] / (2 * ratio)
        factor = schedule.noise_scale(there) / schedule.noise_scale(here)
        expected = factor * expected - schedule.signal_scale(there) * torch.expm1(-step) * target
        before = clean, step
    reached = solve_ode(denoiser, x, times=times, method="dpm_solver_2m")
    torch.testing.assert_close(reached, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "coordinate", "order"),
    [
        ("euler", "sigma", 1),
        ("euler", "angle", 1),
        ("heun", "sigma", 2),
        ("heun", "angle", 2),
        ("dpm_solver_2m", "sigma", 2),
    ],
)
def test_error_falls_with_the_order_of_the_method(method, coordinate, order):
    start, end = SPANS["linear"]
    denoiser = mixture(SCHEDULES["linear"])
    x = states(32, 2)
    exact = solve_ode(denoiser, x, start=end, end=start, method="dopri5", rtol=1e-10, atol=1e-10)
    errors = []
    for num_steps in (40, 160):
        options = {"method": method, "coordinate": coordinate, "num_steps": num_steps}
        reached = solve_ode(denoiser, x, start=end, end=start, **options)
        errors.append((reached - exact).square().mean().sqrt().item())
    # The next term of the error is a step, some 1/40 of the span, smaller.
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.25)


def test_default_grids_are_spaced_as_documented():
    schedule, seen = SCHEDULES["linear"], []

    def network(x, time):
        seen.append(time[0].item())
        return 0.5 * x

    denoiser = NetworkDenoiser(network, schedule)
    decode(denoiser, torch.ones(1, 2), method="euler", num_steps=6)
    torch.testing.assert_close(
        double(seen), schedule.times(6, spacing="karras")[:-1], rtol=1e-6, atol=0
    )
    seen.clear()
    decode(denoiser, torch.ones(1, 2), method="euler", coordinate="angle", num_steps=6)
    roots = torch.atan(schedule.sigma(double(seen))).sqrt()
    spacing = math.sqrt(math.atan(schedule.sigma(1000.0))) / 6
    # Network times are float32.
    torch.testing.assert_close(
        roots, spacing * torch.arange(6.0, 0.0, -1.0).double(), rtol=1e-5, atol=0
    )
    seen.clear()
    solve_ode(denoiser, torch.ones(1, 2), start=0.5, end=0.0, num_steps=6)
    assert seen == [0.5]


@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
def test_step_into_zero_is_the_clean_estimate(coordinate):
    denoiser, x = mixture(SCHEDULES["cosine"]), states(4, 2)
    reached = solve_ode(denoiser, x, times=double([300.0, 0.0]), coordinate=coordinate)
    torch.testing.assert_close(reached, denoiser.predict(x, 300.0).sample, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
def test_decoding_undoes_encoding(name, coordinate):
    schedule = SCHEDULES[name]
    denoiser = mixture(schedule)
    start = schedule.time_from_sigma(0.05).item()
    data = denoiser.sample(8, generator=torch.Generator().manual_seed(0))
    options = {"method": "dopri5", "coordinate": coordinate, "rtol": 1e-7, "atol": 1e-7}
    latent = encode(denoiser, data, start=start, **options)
    again = decode(denoiser, latent, end=start, **options)
    # A hundred steps of 1e-7 each, twice; between components the flow expands, less than tenfold.
    torch.testing.assert_close(again, data, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocities_are_the_score_and_the_v_prediction(name):
    schedule, denoiser = SCHEDULES[name], mixture(SCHEDULES[name])
    time = sum(SPANS[name]) / 2
    x = states(5, 2)
    prediction, sigma = denoiser.predict(x, time), schedule.sigma(time).item()
    signal = schedule.signal_scale(time)
    scaled = heat_velocity(denoiser, x / signal, sigma)
    torch.testing.assert_close(scaled, prediction.epsilon, rtol=1e-9, atol=1e-9)
    angle = math.atan(sigma)
    expected = math.cos(angle) * prediction.epsilon - math.sin(angle) * prediction.sample
    for phi in (angle, torch.full((5,), angle, dtype=torch.float64)):
        rotated = angle_velocity(denoiser, x * math.cos(angle) / signal, phi)
        torch.testing.assert_close(rotated, expected, rtol=1e-9, atol=1e-9)


def test_angle_velocity_reaches_the_end_of_the_schedule():
    schedule = HeatSchedule(1e8)
    end = torch.atan(schedule.sigma(1e8))
    assert bool(torch.isfinite(angle_velocity(mixture(schedule), states(2, 2), end)).all())


@pytest.mark.parametrize("coordinate", ["sigma", "angle"])
def test_adaptive_solver_stays_between_the_ends(coordinate):
    times = []

    def network(x, time):
        times.append(time[0].item())
        return 0.5 * x

    x = torch.ones(2, 3, dtype=torch.float64)
    solve_ode(
        NetworkDenoiser(network, HEAT), x, start=0.01, end=80.0, method="dopri5",
        coordinate=coordinate,
    )  # fmt: skip
    assert min(times) >= 0.01 * (1 - 1e-12)
    assert max(times) <= 80.0


def test_condition_reaches_the_denoiser():
    denoiser = GaussianMixtureDenoiser(
        double([[-1.0], [2.0]]), double([1e-4, 1e-4]), schedule=HEAT, labels=torch.tensor([0, 1])
    )
    x = 80 * states(4, 1)
    for label, centre in ((0, -1.0), (1, 2.0)):
        reached = decode(denoiser, x, condition=torch.full((4,), label), num_steps=40)
        # Five standard deviations of the component.
        torch.testing.assert_close(reached, torch.full_like(x, centre), rtol=0, atol=0.05)


@pytest.mark.parametrize("method", ["euler", "heun", "dpm_solver_2m", "dopri5"])
def test_half_precision_goes_through_the_network_only(method):
    dtypes = set()

    def network(x, time):
        dtypes.add(x.dtype)
        return 0.5 * x

    x = states(3, 4)
    start, end = SPANS["cosine"]
    schedule = SCHEDULES["cosine"]
    half = solve_ode(
        NetworkDenoiser(network, schedule), x.half(), start=end, end=start, method=method
    )
    assert dtypes == {torch.float16}
    assert half.dtype == torch.float16
    wide = solve_ode(
        NetworkDenoiser(network, schedule), x.half().double(), start=end, end=start, method=method
    )
    # x and ε̂ are rounded to 2^-11 at each step; the flow of this network contracts x.
    torch.testing.assert_close(half.double(), wide, rtol=0, atol=0.01 * wide.abs().max().item())


def test_result_carries_no_gradient_and_keeps_the_dtype():
    denoiser = mixture(SCHEDULES["cosine"])
    x = torch.randn(3, 2, requires_grad=True)
    for method in ("euler", "heun", "dpm_solver_2m", "dopri5"):
        reached = solve_ode(denoiser, x, start=900.0, end=100.0, method=method)
        assert not reached.requires_grad
        assert reached.dtype == torch.float32


@pytest.mark.parametrize("method", ["euler", "heun", "dpm_solver_2m", "dopri5"])
def test_no_examples_are_no_problem(method):
    x = torch.zeros(0, 2)
    assert solve_ode(mixture(HEAT), x, start=1.0, end=0.1, method=method).shape == (0, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_network_that_says_no_number_is_an_error_in_words(value):
    denoiser = NetworkDenoiser(lambda x, time: x + value, HEAT)
    with pytest.raises(RuntimeError, match="the velocity is not finite"):
        solve_ode(denoiser, states(3, 4), start=1.0, end=0.1, method="dopri5")


@pytest.mark.parametrize("end", [5 + 1e-12, 5 - 1e-15])
def test_steps_between_times_that_almost_agree_do_not_move(end):
    options = {"method": "dpm_solver_2m", "num_steps": 100}
    reached = solve_ode(line(), states(3, 1), start=5.0, end=end, **options)
    torch.testing.assert_close(reached, states(3, 1), rtol=0, atol=1e-10)


def test_integrators_take_tuples_and_numbers():
    def spiral(state, position):
        return (-state[1], state[0])

    grid = [2 * math.pi * i / 400 for i in range(401)]
    state = (torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    for walk, tolerance in ((euler, 0.06), (heun, 3e-4)):
        # One turn; Euler's radius grows by h/2 per unit, Heun's phase lags by h²/6.
        cosine, sine = walk(spiral, state, grid)
        assert abs(cosine.item() - 1) < tolerance
        assert abs(sine.item()) < tolerance
    cosine, _ = dopri5(spiral, state, 0.0, 2 * math.pi, rtol=1e-10, atol=1e-10)
    assert cosine.item() == pytest.approx(1, abs=1e-8)


def test_continuity_holds_for_the_flow_and_fails_for_twice_the_velocity():
    """In heat coordinates and with time = σ, the velocity is −σ ∇log p."""
    denoiser = mixture(HEAT)
    x, time = 1.5 * states(50, 2), torch.linspace(0.2, 3, 50, dtype=torch.float64)

    def velocity(x, sigma):
        return heat_velocity(denoiser, x, sigma)

    residual = continuity_residual(denoiser.log_prob, velocity, x, time)
    # Terms of size up to |score|²σ ~ 1e2, each a sum of a few roundings.
    assert residual.abs().max() < 1e-12
    doubled = continuity_residual(denoiser.log_prob, lambda x, s: 2 * velocity(x, s), x, time)
    assert doubled.abs().median() > 0.1


@pytest.mark.parametrize("name", ["linear", "cosine", "variance_preserving"])
def test_continuity_holds_along_the_angle(name):
    denoiser = mixture(SCHEDULES[name])

    def log_density(x, angle):
        return denoiser.log_prob(x, denoiser.schedule.time_from_sigma(torch.tan(angle)))

    residual = continuity_residual(
        log_density, lambda x, angle: angle_velocity(denoiser, x, angle), states(20, 2), 0.7
    )
    assert residual.abs().max() < 1e-9


def test_rotation_of_an_isotropic_density_is_consistent():
    denoiser = GaussianMixtureDenoiser(double([[0.0, 0.0]]), double([0.7]), schedule=HEAT)
    turn = double([[0.0, -3.0], [3.0, 0.0]])

    def velocity(x, sigma):
        return heat_velocity(denoiser, x, sigma) + x @ turn

    residual = continuity_residual(denoiser.log_prob, velocity, states(20, 2), 0.8)
    assert residual.abs().max() < 1e-14
    stretched = continuity_residual(
        mixture(HEAT).log_prob, lambda x, s: heat_velocity(mixture(HEAT), x, s) + x @ turn,
        states(20, 2), 0.8,
    )  # fmt: skip
    assert stretched.abs().median() > 0.01


def coupled(x):
    """A function whose Jacobian is neither diagonal nor symmetric."""
    return torch.sin(x.roll(1, -1)) * x + x.sum(-1, keepdim=True) ** 2


def jacobians(x):
    return torch.stack(
        [torch.autograd.functional.jacobian(coupled, row[None])[0, :, 0] for row in x]
    )


@pytest.mark.parametrize("entries", [1, 7, 40, 2**18])
def test_exact_divergence_is_the_trace_of_the_jacobian_however_it_is_chunked(entries, monkeypatch):
    monkeypatch.setattr(flow, "_PRODUCT_ENTRIES", entries)
    x = states(5, 4)
    value, trace = divergence(coupled, x)
    expected = jacobians(x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(value, coupled(x), rtol=0, atol=0)
    torch.testing.assert_close(trace, expected, rtol=1e-13, atol=1e-13)


def test_mean_over_all_sign_vectors_is_the_exact_divergence():
    x = states(3, 4)
    signs = torch.cartesian_prod(*[double([-1.0, 1.0])] * 4)
    probes = signs[:, None].expand(-1, 3, -1)
    _, trace = divergence(coupled, x, method="hutchinson", probes=probes)
    torch.testing.assert_close(trace, divergence(coupled, x)[1], rtol=1e-13, atol=1e-13)


def test_signs_are_exact_for_a_diagonal_jacobian_and_normal_probes_are_not():
    x = states(3, 4)
    signs = states(1, 3, 4).sign()
    _, exact = divergence(torch.sin, x)
    _, trace = divergence(torch.sin, x, method="hutchinson", probes=signs)
    torch.testing.assert_close(trace, exact, rtol=1e-14, atol=1e-14)
    _, normal = divergence(torch.sin, x, method="hutchinson", probes=states(1, 3, 4, seed=1))
    assert (normal - exact).abs().max() > 0.1


def test_divergence_works_without_grad_and_for_constant_functions():
    x = states(3, 4)
    with torch.no_grad():
        value, trace = divergence(coupled, x)
        assert not value.requires_grad
        assert bool((trace != 0).all())
        _, zero = divergence(torch.zeros_like, x)
    assert zero.tolist() == [0.0] * 3


@pytest.mark.parametrize("outside", [False, True])
def test_inference_mode_changes_no_divergence(outside):
    """Neither inside the mode nor for a tensor that was made there."""
    given, probes = states(3, 4), states(2, 3, 4, seed=1)
    exact = divergence(coupled, given)[1]
    estimate = divergence(coupled, given, method="hutchinson", probes=probes)[1]
    with torch.inference_mode():
        x, probes = given.clone(), probes.clone()
        found = [divergence(coupled, x)[1]]
        found.append(divergence(coupled, x, method="hutchinson", probes=probes)[1])
    if outside:
        found = [divergence(coupled, x)[1]]
        found.append(divergence(coupled, x, method="hutchinson", probes=probes)[1])
    torch.testing.assert_close(found, [exact, estimate], rtol=0, atol=0)


def test_inference_mode_changes_no_residual():
    denoiser = mixture(HEAT)

    def residual():
        return continuity_residual(
            denoiser.log_prob, lambda x, s: 2 * heat_velocity(denoiser, x, s), states(5, 2), 0.8
        )

    expected = residual()
    with torch.inference_mode():
        found = residual()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_exact_divergence_holds_only_the_rows_it_needs():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // result.itemsize)
            return result

    dimensions, entries = 600, 3000
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(flow, "_PRODUCT_ENTRIES", entries)
        _, trace = divergence(lambda x: 2 * x, torch.ones(1, dimensions))
    assert trace.item() == 2 * dimensions
    assert largest <= entries


def test_states_without_event_dimensions_are_numbers():
    x = states(4)
    _, trace = divergence(lambda x: x**3, x)
    torch.testing.assert_close(trace, 3 * x**2, rtol=1e-15, atol=0)
    _, estimate = divergence(lambda x: x**3, x, method="hutchinson", probes=states(2, 4).sign())
    torch.testing.assert_close(estimate, 3 * x**2, rtol=1e-15, atol=0)
    residual = continuity_residual(
        lambda x, time: -x.square() / 2, lambda x, time: torch.ones_like(x), x, 1.0
    )
    torch.testing.assert_close(residual, -x, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 5), (1,), ()])
def test_velocity_of_parameters_alone_has_no_divergence(shape):
    shift = torch.nn.Parameter(torch.ones(shape))
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    value, trace = divergence(lambda x: shift.expand(x.shape), x)
    assert bool((value == 1).all())
    assert trace.tolist() == [0.0] * 6


@pytest.mark.parametrize("level", [torch.zeros(()), torch.nn.Parameter(torch.zeros(()))])
def test_constant_density_changes_by_the_divergence_alone(level):
    residual = continuity_residual(
        lambda x, time: level.expand(len(x)), lambda x, time: 3 * x, torch.ones(4, 2), 1.0
    )
    assert residual.tolist() == [6.0] * 4


def test_trigonometric_interpolation_keeps_the_norm_of_independent_codes():
    first, second = states(2, 20_000, seed=3)
    between = interpolate_latents(first, second, [0.0, 0.3, 1.0])
    torch.testing.assert_close(between[[0, 2]], torch.stack([first, second]), rtol=0, atol=1e-15)
    # |z|²/d has standard deviation sqrt(2/d) = 0.01: five of them.
    assert between[1].square().mean().item() == pytest.approx(1, abs=0.05)


def test_slerp_turns_each_example_by_its_own_angle_at_constant_speed():
    first, second = double([[1.0, 0.0], [0.0, 2.0]]), double([[0.0, 1.0], [math.sqrt(3), 1.0]])
    between = interpolate_latents(first, second, torch.tensor([0.0, 1 / 3, 1.0]), method="slerp")
    torch.testing.assert_close(between[0], first, rtol=0, atol=1e-15)
    torch.testing.assert_close(between[2], second, rtol=0, atol=1e-15)
    third, sixth = math.pi / 2 / 3, math.pi / 9
    expected = double(
        [[math.cos(third), math.sin(third)], [2 * math.sin(sixth), 2 * math.cos(sixth)]]
    )
    # 1/3 is a float32 here.
    torch.testing.assert_close(between[1], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_slerp_goes_straight_between_parallel_codes(factor):
    code = states(1, 6)
    between = interpolate_latents(code, factor * code, [0.25], method="slerp")
    torch.testing.assert_close(between[0], (0.75 + 0.25 * factor) * code, rtol=1e-12, atol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rk4"}, "euler, heun, dpm_solver_2m, dopri5"),
        ({"coordinate": "time"}, "sigma, angle"),
        ({"method": "dpm_solver_2m", "coordinate": "angle"}, "dpm_solver_2m"),
        ({"start": 0.0}, "positive"),
        ({"start": -1.0}, "positive"),
        ({"end": 0.0, "method": "dopri5"}, "positive"),
        ({"times": double([80.0, 1.0, 2.0])}, "monotone"),
        ({"times": double([1.0, 1.0])}, "monotone"),
        ({"times": double([0.0, 1.0])}, "positive"),
        ({"times": double([90.0, 1.0])}, "80"),
        ({"times": double(3.0)}, "at least two"),
        ({"start": 2.0, "end": 2.0}, "monotone"),
        ({"start": 90.0}, "80"),
        ({"start": None}, "start and end"),
        ({"num_steps": 0}, "num_steps"),
        ({"method": "dopri5", "rtol": 0.0}, "rtol"),
    ],
)
def test_wrong_arguments_of_the_solver_are_refused(options, words):
    given = {"start": 80.0, "end": 1.0, **options}
    with pytest.raises(ValueError, match=words):
        solve_ode(mixture(HEAT), states(2, 2), **given)


@pytest.mark.bad_input
def test_wrong_arguments_of_the_rest_are_refused():
    x = states(2, 3)
    with pytest.raises(ValueError, match="exact, hutchinson"):
        divergence(coupled, x, method="finite")
    with pytest.raises(ValueError, match="probes"):
        divergence(coupled, x, method="hutchinson")
    with pytest.raises(ValueError, match="probes"):
        divergence(coupled, x, method="hutchinson", probes=x)
    with pytest.raises(ValueError, match="shape"):
        divergence(lambda x: x[:, :1], x)
    with pytest.raises(ValueError, match="same shape"):
        interpolate_latents(x, x[:1], [0.5])
    with pytest.raises(ValueError, match="trigonometric, slerp"):
        interpolate_latents(x, x, [0.5], method="linear")
    with pytest.raises(ValueError, match="finite"):
        interpolate_latents(x, x, [math.nan])
    with pytest.raises(ValueError, match="positive"):
        encode(mixture(HEAT), states(2, 2), start=0.0)
    with pytest.raises(ValueError, match="positive"):
        decode(mixture(HEAT), states(2, 2), method="dopri5")
    with pytest.raises(ValueError, match="positive"):
        heat_velocity(mixture(HEAT), states(2, 2), 0.0)
    with pytest.raises(ValueError, match="range of the schedule"):
        angle_velocity(mixture(HEAT), states(2, 2), math.pi / 2)
    with pytest.raises(ValueError, match="one per example"):
        continuity_residual(mixture(HEAT).log_prob, lambda x, s: x, states(2, 2), torch.ones(3))
    with pytest.raises(ValueError, match="one value per example"):
        continuity_residual(lambda x, s: x, lambda x, s: x, states(2, 2), 1.0)
