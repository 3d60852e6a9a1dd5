"""Learned and differentiated clean variances against exact conditional ones."""

import math

import pytest
import torch
from torch import nn

from generative.diffusion.mixtures import SCHEDULES, TIMES, double, gaussian, mixture
from kexue.generative.diffusion import (
    DiscreteSchedule,
    JacobianVariance,
    NetworkDenoiser,
    NoiseResidualVariance,
    SquaredNoiseVariance,
    clip_clean_variance,
    sample,
    variance_loss,
)
from kexue.models import MLPDenoiser

LINEAR = DiscreteSchedule.linear()
HEADS = (NoiseResidualVariance, SquaredNoiseVariance)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def states(count=6):
    return torch.randn(count, 2, dtype=torch.float64, generator=source())


class Biased:
    """An exact denoiser whose noise is off by a constant."""

    def __init__(self, denoiser, bias):
        self.denoiser, self.bias, self.schedule = denoiser, bias, denoiser.schedule

    def predict(self, x, time, *, condition=None):
        prediction = self.denoiser.predict(x, time, condition=condition)
        return prediction.with_epsilon(prediction.epsilon + self.bias, x)


def exact_moments(denoiser, x, time, bias=0.0):
    """E[(ε − ε̂)² | x_t] and E[ε² | x_t] of a mixture, from its conditional variance."""
    sigma = denoiser.schedule.sigma(time)
    of_noise = denoiser.clean_variance(x, time) / sigma**2
    epsilon = denoiser.predict(x, time).epsilon
    return of_noise + bias**2, of_noise + epsilon**2


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_moments_give_the_exact_variance_with_either_head(name):
    schedule = SCHEDULES[name]
    denoiser, x, time = mixture(schedule), states(), TIMES[name]
    residual, square = exact_moments(denoiser, x, time)
    prediction, exact = denoiser.predict(x, time), denoiser.clean_variance(x, time)
    npr = NoiseResidualVariance(lambda x, time: residual, schedule=schedule)
    sn = SquaredNoiseVariance(lambda x, time: square, schedule=schedule)
    bounded = torch.minimum(exact, schedule.sigma(time) ** 2)
    torch.testing.assert_close(npr(x, time, prediction), bounded, rtol=1e-12, atol=0)
    torch.testing.assert_close(sn(x, time, prediction), bounded, rtol=1e-9, atol=1e-13)


def test_heads_differ_by_the_product_of_estimate_and_bias():
    """NPR − SN = σ² 2ε̂(ε̂ − m) entrywise, where m = E[ε | x_t]."""
    exact, bias, time = mixture(LINEAR), 0.05, 300
    denoiser, x = Biased(exact, bias), states()
    prediction = denoiser.predict(x, time)
    residual, square = exact_moments(exact, x, time, bias)
    npr = NoiseResidualVariance(lambda x, time: residual, schedule=LINEAR)
    sn = SquaredNoiseVariance(lambda x, time: square, schedule=LINEAR)
    ratio = LINEAR.sigma(time) ** 2
    difference = npr._unbounded(x, time, prediction, None) - sn._unbounded(
        x, time, prediction, None
    )
    m = exact.predict(x, time).epsilon
    expected = ratio * 2 * prediction.epsilon * (prediction.epsilon - m)
    torch.testing.assert_close(difference, expected, rtol=1e-9, atol=1e-13)


def test_negative_differences_are_clipped_and_not_mirrored():
    x = torch.ones(2, 3)
    denoiser = NetworkDenoiser(lambda x, time: torch.full_like(x, 0.9), LINEAR)
    sn = SquaredNoiseVariance(lambda x, time: torch.zeros_like(x), schedule=LINEAR)
    assert bool((sn(x, 500, denoiser.predict(x, 500)) == 0).all())


@pytest.mark.parametrize("head", HEADS)
def test_variances_stay_within_their_bounds(head):
    x = torch.ones(2, 3)
    denoiser = NetworkDenoiser(lambda x, time: torch.zeros_like(x), LINEAR)
    variance = head(lambda x, time: torch.full_like(x, 9.0), schedule=LINEAR, data_range=(-1, 1))
    low, high = (variance(x, t, denoiser.predict(x, t)) for t in (100, 900))
    torch.testing.assert_close(low, torch.full_like(x, LINEAR.sigma(100).item() ** 2))
    torch.testing.assert_close(high, torch.ones_like(x))


def test_targets_are_the_articles():
    denoiser = mixture(LINEAR)
    prediction, noise = denoiser.predict(states(), 300), states().flip(0)
    network = nn.Identity()
    residual = NoiseResidualVariance(network, schedule=LINEAR).target(noise, prediction)
    square = SquaredNoiseVariance(network, schedule=LINEAR).target(noise, prediction)
    torch.testing.assert_close(residual, (noise - prediction.epsilon) ** 2)
    torch.testing.assert_close(square, noise**2)


@pytest.mark.parametrize("head", HEADS)
def test_networks_are_called_as_a_denoiser_calls_them(head):
    calls = []

    def network(*given):
        calls.append(given)
        return torch.zeros_like(given[0])

    variance = head(network, schedule=LINEAR, time_scale=2.0, time_offset=-1.0)
    condition = torch.tensor([1, 2])
    for dtype in (torch.float32, torch.float64, torch.float16):
        variance.moment(torch.zeros(2, 3, dtype=dtype), 50)
        assert calls[-1][1].dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert calls[-1][1].tolist() == [99.0, 99.0]
    x = torch.zeros(2, 3)
    variance.moment(x, double([50, 60]), condition)
    assert calls[-1][1].tolist() == [99.0, 119.0]
    assert calls[-1][2] is condition


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("head", HEADS)
def test_heads_speak_the_dtype_of_the_state(head, dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    denoiser = NetworkDenoiser(lambda x, time: torch.zeros_like(x), LINEAR)
    variance = head(lambda x, time: torch.full_like(x, 2.0**-12), schedule=LINEAR)
    value = variance(x, double([500, 1000]), denoiser.predict(x, double([500, 1000])))
    assert value.dtype == dtype
    expected = (LINEAR.sigma(double([500, 1000])) ** 2 * 2.0**-12).to(dtype)
    torch.testing.assert_close(value[:, 0], expected)


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_finite_in_half_precision_where_sigma_squared_is_not(head):
    """σ² is 4e8 at the last step of the cosine schedule; float16 ends at 65504."""
    cosine, times = DiscreteSchedule.cosine(), double([500, 999, 1000])
    x = torch.zeros(3, 2, dtype=torch.float16)
    denoiser = NetworkDenoiser(lambda x, time: torch.zeros_like(x), cosine)
    for share in (0.0, 2.0**-12):
        variance = head(
            lambda x, time, s=share: torch.full_like(x, s), schedule=cosine, data_range=(-1, 1)
        )
        together = variance(x, times, denoiser.predict(x, times))
        alone = [variance(x[:1], t, denoiser.predict(x[:1], t)) for t in times]
        assert torch.equal(together, torch.cat(alone))


def test_variances_in_half_precision_are_clipped_at_the_bound_of_each_time():
    cosine, times = DiscreteSchedule.cosine(), double([1, 1000])
    variance = torch.full((2, 1), 3.0, dtype=torch.float16)
    clipped = clip_clean_variance(variance, cosine, times)
    assert torch.equal(clipped, torch.stack([cosine.sigma(1) ** 2, double(3)]).half()[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_likelihood_losses_in_half_precision_are_those_of_float32(dtype):
    cosine, times = DiscreteSchedule.cosine(), double([1, 500, 999, 1000])
    clean, noise = torch.randn(2, 4, 2, generator=source()).to(dtype)
    denoiser = NetworkDenoiser(lambda x, time: torch.zeros_like(x), cosine)
    head = NoiseResidualVariance(lambda x, time: torch.full_like(x, 0.5), schedule=cosine)
    half, single = (
        variance_loss(
            head, denoiser, clean.to(kind), objective="likelihood", times=times,
            noise=noise.to(kind),
        )
        for kind in (dtype, torch.float32)
    )  # fmt: skip
    # Neither network sees x, so that only the arithmetic of the loss may differ.
    torch.testing.assert_close(half, single)


def test_moment_loss_is_least_at_the_conditional_moment():
    """The regression of (ε − ε̂)² on x_t: any constant added to the exact moment costs its square.

    E‖g + c − target‖² − E‖g − target‖² = d c², exactly in expectation; the same noise on both
    sides leaves the fluctuation of 2c(g − target).
    """
    denoiser, count, shift = mixture(LINEAR), 40_000, 0.2
    clean = denoiser.sample(count, generator=source())

    def loss(constant):
        def network(x, time):
            return exact_moments(denoiser, x, 300)[0] + constant

        head = NoiseResidualVariance(network, schedule=LINEAR)
        return variance_loss(head, denoiser, clean, times=300.0, generator=source(1)).item()

    # Targets are at most a few: their sum over two entries deviates by less than 2.
    error = 5 * 2 * shift * 2 / math.sqrt(count)
    assert abs(loss(shift) - loss(0.0) - 2 * shift**2) < error


def test_likelihood_loss_is_the_articles_formula():
    denoiser = mixture(LINEAR)
    clean, noise = states(), states().flip(0)
    head = NoiseResidualVariance(lambda x, time: torch.full_like(x, 0.4), schedule=LINEAR)
    times = double([5, 30, 100, 300, 600, 900])
    loss = variance_loss(head, denoiser, clean, objective="likelihood", times=times, noise=noise)
    x = LINEAR.add_noise(clean, noise, times)
    prediction = denoiser.predict(x, times)
    v = head(x, times, prediction)
    expected = (((clean - prediction.sample) ** 2 / v + v.log()) / 2).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("objective", ["moment", "likelihood"])
def test_losses_of_hopeless_networks_are_finite(objective):
    """No variance at all, everywhere, and a difference below zero."""
    denoiser = NetworkDenoiser(lambda x, time: torch.full_like(x, 0.5), LINEAR)
    for head in HEADS:
        weight = torch.zeros((), requires_grad=True)
        variance = head(lambda x, time, w=weight: w * torch.ones_like(x), schedule=LINEAR)
        loss = variance_loss(
            variance, denoiser, torch.randn(50, 3, generator=source()), objective=objective,
            generator=source(),
        )  # fmt: skip
        loss.backward()
        assert math.isfinite(loss.item())
        assert math.isfinite(weight.grad.item())


@pytest.mark.parametrize("objective", ["moment", "likelihood"])
def test_the_loss_does_not_flow_into_the_denoiser(objective):
    torch.manual_seed(0)
    mean, spread = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Softplus())
    denoiser = NetworkDenoiser(lambda x, time: mean(x), LINEAR)
    variance = SquaredNoiseVariance(lambda x, time: spread(x), schedule=LINEAR)
    variance_loss(
        variance, denoiser, torch.randn(5, 2), objective=objective, generator=source()
    ).backward()
    assert all(p.grad is None for p in mean.parameters())
    assert all(p.grad is not None for p in spread.parameters())


def test_the_loss_sets_clipping_aside():
    clean = torch.randn(5, 2, generator=source())
    losses = []
    for clip in (None, (-0.1, 0.1)):
        denoiser = NetworkDenoiser(lambda x, time: 0.3 * x, LINEAR, clip_sample=clip)
        head = NoiseResidualVariance(lambda x, time: 0 * x, schedule=LINEAR)
        losses.append(variance_loss(head, denoiser, clean, generator=source(1)))
    assert torch.equal(*losses)


@pytest.mark.parametrize("objective", ["moment", "likelihood"])
def test_a_trained_head_finds_the_conditional_variance(objective):
    """On two points at one time the variance goes from σ² tanh-wise to 0 along x.

    Its average over x_t is that of the table; per state it must be better than the table.
    """
    from kexue.generative.diffusion import GaussianMixtureDenoiser

    denoiser = GaussianMixtureDenoiser(
        torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.01), schedule=LINEAR
    )
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 1), nn.Softplus())
    head = NoiseResidualVariance(lambda x, time: layers(x), schedule=LINEAR)
    optimizer = torch.optim.Adam(layers.parameters(), 0.02)
    generator = source()
    for _ in range(400):
        clean = denoiser.sample(256, generator=generator)
        loss = variance_loss(
            head, denoiser, clean, times=300.0, objective=objective, generator=generator
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean = denoiser.sample(4000, generator=generator)
    noise = torch.randn(4000, 1, generator=generator)
    x = LINEAR.add_noise(clean, noise, 300)
    exact = denoiser.clean_variance(x, 300)
    error = (head(x, 300, denoiser.predict(x, 300)) - exact).square().mean()
    assert error < 0.1 * (exact - exact.mean()).square().mean()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_jacobian_of_an_exact_denoiser_is_its_conditional_variance(name):
    """Second-order Tweedie, to rounding at every noise level."""
    schedule = SCHEDULES[name]
    denoiser, x = mixture(schedule), states()
    middle = TIMES[name]
    for time in (0.1 * middle, middle, schedule.maximum_time):
        exact = denoiser.clean_variance(x, time)
        exact = torch.minimum(exact, schedule.sigma(time) ** 2)
        measured = JacobianVariance(denoiser)(x, time, None)
        torch.testing.assert_close(measured, exact, rtol=1e-10, atol=1e-15)


def test_a_time_per_example_gives_its_own_jacobian():
    denoiser, x = mixture(LINEAR), states(3)
    times = double([10, 300, 900])
    together = JacobianVariance(denoiser)(x, times, None)
    for i in range(3):
        alone = JacobianVariance(denoiser)(x[i : i + 1], times[i], None)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-12, atol=1e-16)


def test_more_dimensions_than_one_batch_of_vectors():
    """A linear denoiser x̂_0 = A x has the Jacobian A; 130 entries take three batches."""
    matrix = torch.randn(130, 130, dtype=torch.float64, generator=source())
    matrix = 0.1 * matrix + torch.diag(torch.linspace(0.1, 0.5, 130, dtype=torch.float64))
    denoiser = NetworkDenoiser(lambda x, t: x @ matrix.T, LINEAR, prediction_type="sample")
    measured = JacobianVariance(denoiser)(torch.zeros(2, 130, dtype=torch.float64), 500, None)
    factor = LINEAR.noise_scale(500) ** 2 / LINEAR.signal_scale(500)
    expected = (factor * matrix.diagonal()).clamp(min=0).expand(2, -1)
    torch.testing.assert_close(measured, expected, rtol=1e-11, atol=1e-15)


def test_probes_are_unbiased_with_the_variance_of_hutchinson():
    """Rademacher probes: the mean is J_ii and one draw has variance Σ_{j≠i} J_ji².

    The Jacobian is symmetric with a large diagonal, so nothing is clipped away.
    """
    matrix = double([[0.5, 0.1, -0.2], [0.1, 0.4, 0.1], [-0.2, 0.1, 0.6]])
    denoiser = NetworkDenoiser(lambda x, t: x @ matrix.T, LINEAR, prediction_type="sample")
    count = 20_000
    x = torch.zeros(count, 3, dtype=torch.float64)
    measured = JacobianVariance(denoiser, num_probes=1, generator=source())(x, 500, None)
    factor = (LINEAR.noise_scale(500) ** 2 / LINEAR.signal_scale(500)).item()
    off_diagonal = (matrix**2).sum(0) - matrix.diagonal() ** 2
    error = 5 * factor * torch.sqrt(off_diagonal / count)
    assert bool(((measured.mean(0) - factor * matrix.diagonal()).abs() < error).all())
    # A fourth moment of ±1 sums: the variance has relative error below 2/√n.
    expected = factor**2 * off_diagonal
    assert bool(((measured.var(0) - expected).abs() < 5 * 2 / math.sqrt(count) * expected).all())


def test_probes_are_averaged_before_they_are_clipped():
    """A Jacobian with a zero diagonal: single probes are ±, their clipped mean would be positive.

    With off-diagonal 1 one probe gives v_1 v_2 = ±1; the mean of 400 is 0 within 5/20 of them.
    """
    matrix = double([[0.0, 1.0], [1.0, 0.0]])
    denoiser = NetworkDenoiser(lambda x, t: x @ matrix.T, LINEAR, prediction_type="sample")
    x = torch.zeros(50, 2, dtype=torch.float64)
    factor = (LINEAR.noise_scale(300) ** 2 / LINEAR.signal_scale(300)).item()
    measured = JacobianVariance(denoiser, num_probes=400, generator=source())(x, 300, None)
    assert measured.max().item() < 5 / 20 * factor
    # Half of the means are negative and clipped: what is left averages σ/√(2π).
    expected = factor / 20 / math.sqrt(2 * math.pi)
    assert measured.mean().item() == pytest.approx(expected, rel=0.5)


def test_probes_follow_their_generator():
    x = states()
    one, two, other = (
        JacobianVariance(mixture(LINEAR), num_probes=2, generator=source(seed))(x, 300, None)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_jacobian_works_without_gradients_and_returns_none():
    torch.manual_seed(0)
    network = MLPDenoiser(2, hidden=16, depth=1)
    denoiser = NetworkDenoiser(network, LINEAR, prediction_type="v_prediction")
    variance = JacobianVariance(denoiser)
    x = torch.randn(4, 2, requires_grad=True)
    outside = variance(x, 300, None)
    with torch.no_grad():
        inside = variance(x, 300, None)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    assert all(p.grad is None for p in network.parameters())
    draws = sample(denoiser, (3, 2), num_steps=3, clean_variance=variance, generator=source())
    assert bool(torch.isfinite(draws).all())


@pytest.mark.parametrize("num_probes", [None, 2])
def test_the_jacobian_is_the_same_in_inference_mode(num_probes):
    x, times = states().float(), double([1, 50, 300, 500, 700, 999])
    label = torch.tensor(1.0)
    denoiser = NetworkDenoiser(lambda x, time, label: label * (x + x.roll(1, 1)).tanh(), LINEAR)

    def measure(x, times, label):
        variance = JacobianVariance(denoiser, num_probes=num_probes, generator=source())
        return variance(x, times, None, label)

    outside = measure(x, times, label)
    with torch.inference_mode():
        made_inside = x.clone(), times.clone(), label.clone()
        inside = measure(x, times, label)
        assert torch.equal(measure(*made_inside), outside)
    assert torch.equal(inside, outside)
    assert torch.equal(measure(*made_inside), outside)
    assert outside.min() > 0


@pytest.mark.bad_input
def test_a_denoiser_that_switches_gradients_off_is_refused():
    class Frozen:
        schedule = LINEAR

        @torch.no_grad()
        def predict(self, x, time, *, condition=None):
            return gaussian(0.0, 1.0, LINEAR).predict(x, time)

    with pytest.raises(ValueError, match="differentiable in x"):
        JacobianVariance(Frozen())(torch.ones(2, 1), 300)


def test_the_jacobian_of_a_constant_is_zero_and_clipping_is_set_aside():
    x = torch.ones(2, 3)
    constant = NetworkDenoiser(lambda x, time: torch.ones(2, 3), LINEAR, prediction_type="sample")
    assert bool((JacobianVariance(constant)(x, 300, None) == 0).all())
    plain, clipped = (
        NetworkDenoiser(lambda x, t: 0.4 * x, LINEAR, prediction_type="sample", clip_sample=clip)
        for clip in (None, (-0.01, 0.01))
    )
    assert torch.equal(*(JacobianVariance(d)(x, 300, None) for d in (plain, clipped)))
    assert JacobianVariance(plain)(x, 300, None).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_jacobian_speaks_the_dtype_of_the_state(dtype):
    x = states().to(dtype)
    measured = JacobianVariance(mixture(LINEAR))(x, 300, None)
    assert measured.dtype == dtype
    exact = mixture(LINEAR).clean_variance(x, 300)
    torch.testing.assert_close(measured, exact, rtol=0.05, atol=1e-3)


@pytest.mark.bad_input
def test_bad_options_are_refused_by_name_and_value():
    denoiser = gaussian(0.0, 1.0, LINEAR)
    network = nn.Identity()
    for head in HEADS:
        with pytest.raises(ValueError, match=r"data_range.*increasing"):
            head(network, schedule=LINEAR, data_range=(1, 0))
        variance = head(lambda x, time: x[:, :1], schedule=LINEAR)
        with pytest.raises(ValueError, match=r"output.*\(2, 3\).*\(2, 1\)"):
            variance.moment(torch.zeros(2, 3), 5)
    head = NoiseResidualVariance(lambda x, time: x, schedule=LINEAR)
    with pytest.raises(ValueError, match=r"objective.*best"):
        variance_loss(head, denoiser, torch.zeros(2, 1), objective="best")
    with pytest.raises(ValueError, match=r"clean must hold.*\(0, 1\)"):
        variance_loss(head, denoiser, torch.zeros(0, 1))
    with pytest.raises(ValueError, match="same shape"):
        variance_loss(head, denoiser, torch.zeros(2, 1), noise=torch.zeros(1, 1))
    with pytest.raises(ValueError, match="positive"):
        variance_loss(head, denoiser, torch.zeros(2, 1), times=0.0)
    with pytest.raises(ValueError, match=r"num_probes.*0"):
        JacobianVariance(denoiser, num_probes=0)
    with pytest.raises(ValueError, match=r"data_range.*increasing"):
        JacobianVariance(denoiser, data_range=(1, 1))
    with pytest.raises(ValueError, match="positive"):
        JacobianVariance(denoiser)(torch.zeros(1, 1), 0, None)
