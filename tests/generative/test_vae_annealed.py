"""Annealed importance sampling from both sides of a likelihood that is known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Laplace
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.generative.vae import (
    LinearGaussianModel,
    VariationalAutoencoder,
    annealed_importance_sampling,
    importance_weighted_bound,
    log_importance_weights,
)
from kexue.generative.vae.annealed import _Densities, _temperatures, _transition

WEIGHT = torch.tensor([[1.0, 0.5], [0.6, 0.9], [-0.4, 0.2]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
POINT = torch.tensor([[0.5, -1.0, 0.75]], dtype=torch.float64)
LOG_DENSITY = -3.98280432028555


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def linear(**options):
    return LinearGaussianModel(WEIGHT, BIAS, 0.25, **{"proposal": "diagonal", **options})


def wide_linear():
    """Sixteen latent variables that a diagonal proposal gets wrong."""
    return LinearGaussianModel(
        random(40, 16) / 2, torch.zeros(40, dtype=torch.float64), 0.1, proposal="diagonal"
    )


def test_temperatures_are_sigmoid_spaced_from_zero_to_one():
    betas = _temperatures(9)
    assert betas[0] == 0
    assert betas[-1] == 1
    raw = [1 / (1 + math.exp(4 - i)) for i in range(9)]
    for beta, value in zip(betas, raw, strict=True):
        assert beta == pytest.approx((value - raw[0]) / (raw[-1] - raw[0]), abs=1e-15)


@pytest.mark.parametrize("initial", ["encoder", "prior"])
def test_two_temperatures_are_plain_importance_sampling(initial):
    """One step from 0 to 1: its weight is q(x, z)/p(z|x), and there is no transition."""
    annealed = annealed_importance_sampling(
        linear(), POINT, num_chains=50, num_temperatures=2, initial=initial, generator=seeded(1)
    )
    weights = log_importance_weights(linear(), POINT, 50, proposal=initial, generator=seeded(1))
    torch.testing.assert_close(
        annealed.log_likelihood, importance_weighted_bound(weights), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(annealed.evidence_lower_bound, weights.mean(0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("initial", ["encoder", "prior"])
@pytest.mark.parametrize("num_temperatures", [3, 6])
def test_weights_are_unbiased_with_few_and_bad_temperatures(direction, initial, num_temperatures):
    """E w = q(x), and backwards E 1/w = 1/q(x), however coarse the path is."""
    model = linear()
    x = POINT.expand(20_000, 3)
    latent = None
    if direction == "reverse":
        noise = torch.randn((20_000, 2), dtype=torch.float64, generator=seeded(9))
        posterior = model.posterior(x)
        latent = posterior.mean + noise @ posterior.scale_tril[0].T
    result = annealed_importance_sampling(
        model,
        x,
        num_chains=1,
        num_temperatures=num_temperatures,
        num_leapfrog_steps=3,
        step_size=0.4,
        initial=initial,
        direction=direction,
        latent=latent,
        generator=seeded(2),
    )
    sign = 1 if direction == "forward" else -1
    ratio = (sign * (result.log_likelihood - LOG_DENSITY)).exp()
    error = ratio.std().item() / math.sqrt(20_000)
    assert abs(ratio.mean().item() - 1) < 5 * error
    # Forward log w lies below on average, backward log w above.
    assert sign * (result.log_likelihood.mean().item() - LOG_DENSITY) < 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("step_size", [0.2, 0.55])
def test_transitions_leave_each_temperature_invariant(beta, step_size):
    """Gaussian f_β: exact draws before, exact moments after, also where many are rejected."""
    model, x = linear(), POINT.expand(40_000, 3)
    proposal, posterior = model.proposal(POINT), model.posterior(POINT)
    precision = (1 - beta) * torch.diag(1 / proposal.variance[0]) + beta * (
        posterior.precision_matrix[0]
    )
    covariance = torch.linalg.inv(precision)
    # Both ends have the same mean.
    mean = posterior.mean[0]
    root = torch.linalg.cholesky(covariance)
    noise = torch.randn((1, 40_000, 2), dtype=torch.float64, generator=seeded(3))
    densities = _Densities(model, x, model.proposal(x))
    with torch.no_grad():
        state = densities.at(mean + noise @ root.T)
        moved = _transition(densities, state, beta, 3, step_size, seeded(4))
    change = (moved.z - state.z).norm(dim=-1)
    assert change.mean() > 0.1
    if step_size > 0.5:
        assert 0.02 < (change == 0).double().mean() < 0.98
    # Five standard errors of a mean and of a covariance entry with 40 000 draws.
    error = 5 * covariance.diagonal().max().sqrt().item() / 200
    torch.testing.assert_close(moved.z.mean((0, 1)), mean, rtol=0, atol=error)
    torch.testing.assert_close(
        torch.cov(moved.z[0].T),
        covariance,
        rtol=0,
        atol=5 * math.sqrt(2) * covariance.max().item() / 200,
    )


def test_state_carries_densities_and_their_gradients():
    model = linear()
    densities = _Densities(model, POINT, model.proposal(POINT))
    z = random(4, 1, 2)
    state = densities.at(z)
    posterior = model.posterior(POINT)
    # log q(x, z) = log q(x) + log q(z|x).
    torch.testing.assert_close(
        state.log_joint, posterior.log_prob(z) + LOG_DENSITY, rtol=1e-12, atol=1e-12
    )
    gradient = -(z - posterior.mean) @ posterior.precision_matrix[0]
    torch.testing.assert_close(state.joint_gradient, gradient, rtol=1e-11, atol=1e-11)
    proposal = model.proposal(POINT)
    torch.testing.assert_close(
        state.start_gradient, -(z - proposal.mean) / proposal.variance, rtol=1e-12, atol=1e-12
    )


def test_both_directions_close_in_on_the_likelihood():
    model = wide_linear()
    latent = random(30, 16, seed=1)
    x = model.likelihood(latent).mean + math.sqrt(0.1) * random(30, 40, seed=2)
    exact = model.log_prob(x)
    options = {"num_temperatures": 60, "step_size": 0.08, "generator": seeded(3)}
    lower = annealed_importance_sampling(model, x, **options)
    # The z that x was made from is a draw of its posterior.
    upper = annealed_importance_sampling(model, x, direction="reverse", latent=latent, **options)
    plain = importance_weighted_bound(log_importance_weights(model, x, 16, generator=seeded(4)))
    gap = (exact - lower.log_likelihood).mean().item()
    assert -0.05 < gap < 0.3
    assert gap < (exact - plain).mean().item() / 2
    assert -0.05 < (upper.log_likelihood - exact).mean().item() < 0.3
    assert bool((lower.effective_sample_size > 1).all())
    assert lower.num_samples == 16


def test_the_exact_proposal_needs_no_annealing():
    """f_β is then q(z|x) q(x)^β for every β, and every weight is q(x)."""
    for direction, latent in (("forward", None), ("reverse", torch.zeros(1, 2).double())):
        result = annealed_importance_sampling(
            linear(proposal="exact"),
            POINT,
            direction=direction,
            latent=latent,
            generator=seeded(),
        )
        assert result.log_likelihood.item() == pytest.approx(LOG_DENSITY, rel=1e-12)
        assert result.standard_error.item() < 1e-12


def autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 4))
        decoder = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 10))
    grid = {"bin_width": 0.5, "low": -1.0, "high": 1.0}
    return VariationalAutoencoder(encoder, decoder, 2, likelihood="discretized_logistic", **grid)


def test_a_nonlinear_decoder_gets_the_value_of_brute_force():
    model = autoencoder()
    x = torch.tensor([[0.5, -1.0, 0.0, 1.0, -0.5], [0.0, 0.0, 0.5, 0.5, -1.0]])
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).float().unsqueeze(1)
    with torch.no_grad():
        log_joint = (
            model.likelihood(grid.expand(-1, 2, -1)).log_prob(x).double()
            + model.prior().log_prob(grid).double()
        )
    # A smooth integrand with Gaussian tails: the rectangle rule is good to rounding.
    expected = torch.logsumexp(log_joint, 0) + 2 * math.log(16 / 400)
    result = annealed_importance_sampling(
        model, x, num_chains=400, num_temperatures=20, generator=seeded()
    )
    error = result.standard_error
    assert bool((error < 0.1).all())
    assert bool(((result.log_likelihood - expected).abs() < 5 * error).all())


def test_parameters_get_no_gradient():
    model = autoencoder()
    result = annealed_importance_sampling(
        model, torch.zeros(1, 5), num_temperatures=3, generator=seeded()
    )
    assert not result.log_likelihood.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_not_a_number_reaches_its_own_row_only():
    x = POINT.repeat(2, 1)
    x[1, 0] = math.nan
    result = annealed_importance_sampling(linear(), x, num_temperatures=4, generator=seeded())
    assert result.log_likelihood.isnan().tolist() == [False, True]


def test_an_empty_batch_gives_an_empty_result():
    result = annealed_importance_sampling(linear(), POINT[:0], num_temperatures=4)
    assert result.log_likelihood.shape == (0,)


def test_results_follow_the_generator_and_nothing_else():
    before = torch.get_rng_state()
    one, same = (
        annealed_importance_sampling(linear(), POINT, num_temperatures=5, generator=seeded(4))
        for _ in range(2)
    )
    assert torch.equal(one.log_likelihood, same.log_likelihood)
    assert torch.equal(before, torch.get_rng_state())


def test_more_temperatures_read_no_more_numbers_back():
    """A Python number out of a tensor inside the loop would make a GPU wait."""
    reads = []
    for num_temperatures in (3, 12):
        with Reads() as seen:
            annealed_importance_sampling(
                autoencoder(), torch.zeros(2, 5), num_temperatures=num_temperatures
            )
        reads.append(seen.count)
    assert reads[0] == reads[1]


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_chains": 0}, "num_chains.*0"),
        ({"num_temperatures": 1}, "num_temperatures.*2.*1"),
        ({"num_leapfrog_steps": 0}, "num_leapfrog_steps.*0"),
        ({"step_size": 0.0}, "step_size.*0.0"),
        ({"initial": "posterior"}, "initial.*encoder, prior.*'posterior'"),
        ({"direction": "backward"}, "direction.*forward, reverse.*'backward'"),
        ({"direction": "reverse"}, "reverse.*latent"),
        ({"latent": torch.zeros(1, 2).double()}, "latent.*reverse"),
        (
            {"direction": "reverse", "latent": torch.zeros(2, 2).double()},
            r"latent.*\(1, 2\).*\(2, 2\)",
        ),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        annealed_importance_sampling(linear(), POINT, **options)


@pytest.mark.bad_input
def test_a_proposal_that_is_not_normal_is_refused():
    class Wrong:
        prior = staticmethod(lambda: linear().prior())
        likelihood = staticmethod(lambda z: linear().likelihood(z))
        proposal = staticmethod(lambda x: Independent(Laplace(x[:, :2], 1 + 0 * x[:, :2]), 1))

    with pytest.raises(TypeError, match=r"Normal or MultivariateNormal.*Laplace"):
        annealed_importance_sampling(Wrong(), POINT)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_inference_mode_changes_nothing(direction):
    latent = linear().posterior(POINT).mean if direction == "reverse" else None

    def estimate():
        return annealed_importance_sampling(
            linear(), POINT, num_chains=4, num_temperatures=5, direction=direction, latent=latent,
            generator=seeded(),
        ).log_likelihood  # fmt: skip

    expected = estimate()
    with torch.inference_mode():
        assert torch.equal(estimate(), expected)
