"""Weights, bounds, gradients and estimates against the linear model, where all is known."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mpmath import mp
from torch import nn
from torch.distributions import (
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from kexue.generative.vae import (
    LinearGaussianModel,
    VariationalAutoencoder,
    estimate_log_likelihood,
    importance_weighted_bound,
    log_importance_weights,
    reparameterized_sample,
    vae_loss,
)

WEIGHT = torch.tensor([[1.0, 0.5], [0.6, 0.9], [-0.4, 0.2]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
POINT = torch.tensor([[0.5, -1.0, 0.75]], dtype=torch.float64)
LOG_DENSITY = -3.98280432028555
EVIDENCE_BOUND = -4.22642998581307
LOG_WEIGHTS = torch.tensor([-1.0, -2.0, -4.0, 0.5], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def linear(**options):
    return LinearGaussianModel(WEIGHT, BIAS, 0.25, **options)


def autoencoder(dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = 5 if "scale" in options or options.get("likelihood") == "bernoulli" else 10
        encoder = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 4))
        decoder = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, width))
    return VariationalAutoencoder(encoder, decoder, 2, **options).to(dtype)


def numerical(weights, value, error=5.0):
    """The mean of draws lies within five standard errors of the value."""
    weights = np.asarray(weights.double())
    assert abs(weights.mean() - value) < error * weights.std() / math.sqrt(weights.size)


@pytest.mark.parametrize(
    ("options", "second_moment"),
    [
        ({"proposal_scale": 1.25}, 1.73279052545131),
        ({"proposal_scale": 1.5}, 1.47594874564762),
        ({"proposal": "prior"}, 3.02534210515848),
    ],
)
def test_weights_have_the_closed_form_moments(options, second_moment):
    """E w = q(x), and E (w/q)² where it exists."""
    weights = log_importance_weights(
        linear(proposal="diagonal"), POINT, 200_000, generator=seeded(), **options
    )
    ratio = (weights[:, 0] - LOG_DENSITY).exp()
    numerical(ratio, 1.0)
    # (w/q)² may have no variance of its own, so only a coarse agreement can be asked for.
    assert ratio.square().mean().item() == pytest.approx(second_moment, rel=0.1)


@pytest.mark.parametrize(
    ("scale", "divergence"),
    [(1.0, 0.243625665527513), (1.25, 0.359838562899093), (1.5, 0.682695449311184)],
)
def test_gap_of_the_bound_is_the_divergence_to_the_posterior(scale, divergence):
    model = linear(proposal="diagonal")
    weights = log_importance_weights(
        model, POINT, 100_000, proposal_scale=scale, generator=seeded()
    )
    numerical(weights[:, 0], LOG_DENSITY - divergence)
    # The numbers themselves, once more in closed form.
    normal = model.proposal(POINT)
    proposal = MultivariateNormal(normal.mean, torch.diag_embed((scale**2) * normal.variance))
    exact = kl_divergence(proposal, model.posterior(POINT)).item()
    assert exact == pytest.approx(divergence, rel=1e-12)


def test_evidence_lower_bound_is_the_mean_log_weight():
    estimate = estimate_log_likelihood(
        linear(proposal="diagonal"), POINT, num_samples=100_000, generator=seeded()
    )
    # Variance of log w of order 1: 5/√100 000.
    assert estimate.evidence_lower_bound.item() == pytest.approx(EVIDENCE_BOUND, abs=0.016)
    assert estimate.log_likelihood.item() == pytest.approx(LOG_DENSITY, abs=0.05)


@pytest.mark.parametrize("latent", [2, 16, 70])
def test_every_weight_of_the_exact_proposal_is_the_density(latent):
    model = LinearGaussianModel(random(64, latent) / 4, random(64, seed=1), 0.1)
    x = random(3, 64, seed=2)
    weights = log_importance_weights(model, x, 20, generator=seeded())
    # Sums of some hundred terms of size 10 to 100, each rounded at 1e-16.
    expected = model.log_prob(x).expand(20, 3)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


def test_bound_of_four_weights():
    assert importance_weighted_bound(LOG_WEIGHTS).item() == pytest.approx(-0.611451239923163)
    both = torch.stack([LOG_WEIGHTS, 2 * LOG_WEIGHTS])
    assert importance_weighted_bound(both, dim=1)[0].item() == pytest.approx(-0.611451239923163)


class Scripted:
    """A model whose weights are what the test says: the k-th draw gets the k-th of them."""

    def __init__(self, log_weights):
        self.log_weights = log_weights

    def prior(self):
        return Independent(Normal(torch.zeros(1).double(), torch.ones(1).double()), 1)

    def proposal(self, x):
        return Independent(Normal(x.new_zeros(len(x), 1), x.new_ones(len(x), 1)), 1)

    def likelihood(self, latent):
        # A density at x = 0 that is the wanted weight.
        scale = (-self.log_weights - 0.5 * math.log(2 * math.pi)).exp()
        scale = scale.reshape(-1, 1, 1).expand(*latent.shape[:-1], 1)
        return Independent(Normal(torch.zeros_like(scale), scale), 1)


def scripted_estimate(log_weights=LOG_WEIGHTS, **options):
    x = torch.zeros(1, 1, dtype=torch.float64)
    return estimate_log_likelihood(
        Scripted(log_weights), x, num_samples=len(log_weights), generator=seeded(), **options
    )


def test_estimate_of_four_weights():
    estimate = scripted_estimate()
    assert estimate.log_likelihood.item() == pytest.approx(-0.611451239923163, rel=1e-13)
    assert estimate.evidence_lower_bound.item() == pytest.approx(-1.625, rel=1e-13)
    assert estimate.effective_sample_size.item() == pytest.approx(1.63981627244996, rel=1e-13)
    assert estimate.standard_error.item() == pytest.approx(0.692651346231012, rel=1e-13)
    assert estimate.num_samples == 4


def test_jackknife_of_four_weights():
    estimate = scripted_estimate(bias_correction="jackknife")
    assert estimate.log_likelihood.item() == pytest.approx(-0.211171977316786, rel=1e-12)


def test_jackknife_survives_one_weight_that_is_nearly_all():
    """1 − w̃ is lost to rounding there; high precision says what the rest amounts to."""
    logs = [0.0, -45.0, -50.0]
    with mp.workdps(60):
        weights = [mp.exp(v) for v in logs]
        total = sum(weights)
        left_out = sum(mp.log((total - w) / 2) for w in weights) / 3
        expected = float(3 * mp.log(total / 3) - 2 * left_out)
    estimate = scripted_estimate(
        torch.tensor(logs, dtype=torch.float64), bias_correction="jackknife"
    )
    assert estimate.log_likelihood.item() == pytest.approx(expected, rel=1e-12)


def test_jackknife_removes_most_of_the_bias():
    """A prior proposal has E(w/q)² = 3.03: bias −2.03/2M without, O(1/M²) with it."""
    x = POINT.expand(40_000, 3)  # the mean's standard error is then √(2.03/32/40 000) = 0.0013
    gaps = {}
    for correction in ("none", "jackknife"):
        estimate = estimate_log_likelihood(
            linear(),
            x,
            num_samples=32,
            proposal="prior",
            bias_correction=correction,
            generator=seeded(),
        )
        gaps[correction] = estimate.log_likelihood.mean().item() - LOG_DENSITY
    assert gaps["none"] == pytest.approx(-2.02534210515848 / 64, rel=0.25)
    assert abs(gaps["jackknife"]) < abs(gaps["none"]) / 3


def test_bound_grows_with_samples_and_stays_below_the_density():
    x = POINT.expand(3000, 3)
    model = linear(proposal="diagonal")
    means = [
        estimate_log_likelihood(model, x, num_samples=m, proposal_scale=1.5, generator=seeded(m))
        .log_likelihood.mean()
        .item()
        for m in (1, 4, 16, 64)
    ]
    assert means == sorted(means)
    assert means[-1] < LOG_DENSITY + 0.01
    # To first order the gap is Var(w/q)/2M.
    assert LOG_DENSITY - means[-1] == pytest.approx(0.47594874564762 / 128, abs=0.002)


def test_standard_error_covers_the_density():
    x = POINT.expand(400, 3)
    estimate = estimate_log_likelihood(
        linear(proposal="diagonal"), x, num_samples=400, proposal_scale=1.5, generator=seeded()
    )
    standardised = (estimate.log_likelihood - LOG_DENSITY) / estimate.standard_error
    # A standard normal's deviation from 400 draws: 1 ± 5/√800.
    assert standardised.std().item() == pytest.approx(1, abs=0.18)


def test_one_sample_has_no_standard_error():
    estimate = estimate_log_likelihood(linear(), POINT, num_samples=1, generator=seeded())
    assert math.isnan(estimate.standard_error.item())
    assert estimate.effective_sample_size.item() == 1


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.rows = inner, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize("chunk_size", [1, 3, 50, None])
def test_chunks_bound_what_is_decoded_at_once(chunk_size):
    model = autoencoder()
    model.encoder, model.decoder = Counted(model.encoder), Counted(model.decoder)
    estimate_log_likelihood(
        model, torch.zeros(2, 5), num_samples=50, chunk_size=chunk_size, generator=seeded()
    )
    assert model.encoder.rows == [2]
    assert sum(model.decoder.rows) == 100
    assert max(model.decoder.rows) <= 2 * (chunk_size or 50)


def test_chunks_do_not_change_the_law_of_the_estimate():
    x = POINT.expand(500, 3)
    means = [
        estimate_log_likelihood(
            linear(proposal="diagonal"),
            x,
            num_samples=20,
            proposal_scale=1.5,
            chunk_size=chunk_size,
            generator=seeded(i),
        ).log_likelihood
        for i, chunk_size in enumerate((7, 20))
    ]
    error = math.hypot(*(float(m.std()) / math.sqrt(500) for m in means))
    assert abs((means[0].mean() - means[1].mean()).item()) < 5 * error


@pytest.mark.parametrize("gradient", ["reparameterized", "doubly_reparameterized"])
@pytest.mark.parametrize("num_samples", [1, 6])
@pytest.mark.parametrize("objective", ["importance_weighted", "elbo"])
def test_loss_is_the_negative_mean_bound(gradient, num_samples, objective):
    model, x = autoencoder(torch.float64), random(4, 5)
    weights = log_importance_weights(model, x, num_samples, generator=seeded(3))
    expected = -(weights.mean(0) if objective == "elbo" else weights.exp().mean(0).log()).mean()
    loss = vae_loss(
        model,
        x,
        num_samples=num_samples,
        objective=objective,
        gradient=gradient,
        generator=seeded(3),
    )
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def gradients(model, x, **options):
    named = dict(model.named_parameters())
    values = torch.autograd.grad(vae_loss(model, x, **options), list(named.values()))
    return {
        part: torch.cat([v.flatten() for n, v in zip(named, values, strict=True) if part in n])
        for part in ("encoder", "decoder")
    }


def test_doubly_reparameterised_gradient_has_the_same_mean_and_less_variance():
    model, x = autoencoder(torch.float64, scale=0.7), random(3, 5)
    draws = {
        kind: [
            gradients(model, x, num_samples=5, gradient=kind, generator=seeded(i))
            for i in range(400)
        ]
        for kind in ("reparameterized", "doubly_reparameterized")
    }
    plain, double = (torch.stack([d["encoder"] for d in draws[kind]]) for kind in draws)
    error = ((plain.var(0) + double.var(0)) / 400).sqrt()
    # 36 + 36 + 4 entries, each within five standard errors.
    assert bool(((plain.mean(0) - double.mean(0)).abs() < 5 * error + 1e-12).all())
    assert double.var(0).sum() < plain.var(0).sum()
    # The decoder's is the same draw by draw, not just in the mean.
    for one, two in zip(*draws.values(), strict=True):
        torch.testing.assert_close(one["decoder"], two["decoder"], rtol=1e-9, atol=1e-12)


def test_encoder_gradient_is_weighted_with_squared_weights():
    """Σ w̃² ∂log w/∂z ∂z/∂φ, put together by hand for one example."""
    model, x = autoencoder(torch.float64, scale=0.7), random(1, 5)
    proposal = model.proposal(x)
    mean, scale = proposal.base_dist.loc, proposal.base_dist.scale
    noise = torch.randn((4, 1, 2), dtype=torch.float64, generator=seeded(5))
    leaf = (mean + scale * noise).detach().requires_grad_()
    constant = Independent(Normal(mean.detach(), scale.detach()), 1)
    log_w = (
        model.likelihood(leaf).log_prob(x) + model.prior().log_prob(leaf) - constant.log_prob(leaf)
    )
    (path,) = torch.autograd.grad(log_w.sum(), leaf)
    weights = log_w.detach().softmax(0).unsqueeze(-1)
    surrogate = -(weights.square() * path * (mean + scale * noise)).sum()
    expected = torch.autograd.grad(surrogate, list(model.encoder.parameters()))
    result = gradients(
        model, x, num_samples=4, gradient="doubly_reparameterized", generator=seeded(5)
    )
    torch.testing.assert_close(
        result["encoder"], torch.cat([g.flatten() for g in expected]), rtol=1e-10, atol=1e-14
    )


class TrainablePosterior(nn.Module):
    """The linear model whose exact proposal has parameters of its own."""

    def __init__(self, model, x):
        super().__init__()
        self.model = model
        posterior = model.posterior(x)
        self.mean = nn.Parameter(posterior.mean)
        self.root = nn.Parameter(posterior.scale_tril.detach().clone())

    def prior(self):
        return self.model.prior()

    def likelihood(self, latent):
        return self.model.likelihood(latent)

    def proposal(self, x):
        return MultivariateNormal(self.mean, scale_tril=self.root)


@pytest.mark.parametrize("objective", ["importance_weighted", "elbo"])
def test_doubly_reparameterised_gradient_vanishes_at_the_posterior(objective):
    model = TrainablePosterior(linear(), POINT)
    for gradient, zero in (("doubly_reparameterized", True), ("reparameterized", False)):
        loss = vae_loss(
            model,
            POINT,
            num_samples=5,
            objective=objective,
            gradient=gradient,
            generator=seeded(),
        )
        values = torch.autograd.grad(loss, [model.mean, model.root])
        size = max(v.abs().max().item() for v in values)
        assert (size < 1e-13) == zero


def test_weights_are_differentiable_in_all_parameters():
    model, x = autoencoder(torch.float64), random(2, 5)
    parameters = tuple(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def weights(*values):
        return torch.func.functional_call(
            _Weights(model),
            {f"model.{n}": v for n, v in zip(names, values, strict=True)},
            (x,),
        )

    assert torch.autograd.gradcheck(weights, parameters)


class _Weights(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return log_importance_weights(self.model, x, 3, generator=seeded())


def test_training_on_the_bound_finds_the_linear_optimum():
    """The best any linear decoder with this noise can do is the closed-form maximum."""
    x = random(300, 4) @ torch.diag(torch.tensor([2.0, 1.0, 0.3, 0.3], dtype=torch.float64))
    best = LinearGaussianModel.fit(x, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VariationalAutoencoder(
            nn.Linear(4, 4), nn.Linear(2, 4), 2, scale=math.sqrt(best.noise_variance)
        ).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    generator = seeded()
    for _ in range(300):
        optimizer.zero_grad()
        vae_loss(model, x, num_samples=2, generator=generator).backward()
        optimizer.step()
    reached = estimate_log_likelihood(model, x, num_samples=50, generator=generator)
    optimum = best.log_prob(x).mean().item()
    assert optimum - 0.05 < reached.log_likelihood.mean().item() < optimum + 0.01


@pytest.mark.parametrize(
    "likelihood", ["normal", "bernoulli", "discretized_normal", "discretized_logistic"]
)
def test_every_likelihood_trains_and_estimates(likelihood):
    grid = {"bin_width": 1.0, "low": 0.0, "high": 1.0} if "discretized" in likelihood else {}
    model = autoencoder(likelihood=likelihood, **grid)
    x = (random(6, 5) > 0).float()
    loss = vae_loss(model, x, num_samples=3, generator=seeded())
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    estimate = estimate_log_likelihood(model, x, num_samples=100, generator=seeded())
    assert bool(torch.isfinite(estimate.log_likelihood).all())
    assert estimate.log_likelihood.dtype == torch.float64


def test_discrete_probabilities_sum_to_one_over_all_data():
    """Every value of two binary entries, by quadrature of the importance weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VariationalAutoencoder(
            nn.Linear(2, 2), nn.Linear(1, 2), 1, likelihood="bernoulli"
        ).double()
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    estimate = estimate_log_likelihood(
        model, x, num_samples=20_000, proposal="prior", generator=seeded()
    )
    probability = estimate.log_likelihood.exp()
    error = (probability * estimate.standard_error).norm().item()
    assert probability.sum().item() == pytest.approx(1, abs=5 * error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_weighed_in_single_precision(dtype):
    model = autoencoder(dtype)
    x = random(4, 5).to(dtype)
    reference = autoencoder()
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    given, expected = (
        estimate_log_likelihood(m, v, num_samples=200, generator=seeded()).log_likelihood
        for m, v in ((model, x), (reference, x.float()))
    )
    # Networks round at 2^-8 (bfloat16); the sum of five entries stays near that.
    torch.testing.assert_close(given, expected, rtol=0.03, atol=0.1)


def test_sums_over_many_entries_keep_their_digits():
    """The result, near 400 000, has an ulp of 0.03 in float32; entries err by 1e-7 at random."""
    model = LinearGaussianModel(torch.full((300_000, 1), 1e-3), torch.zeros(300_000), 1.0)
    x = random(1, 300_000).float()
    weights = log_importance_weights(_AtZero(model), x, 1, generator=seeded())
    expected = Normal(double(0.0), double(1.0)).log_prob(x.double()).sum()
    assert weights.item() == pytest.approx(expected.item(), abs=1e-3)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (3, 4, 5), (2, 1, 3, 4, 5)])
def test_weights_count_every_entry_of_an_expanded_scale(shape):
    """Whatever was broadcast, the density is that of torch's own distribution."""
    scale = random(*shape, seed=3).exp()
    mean = random(2, 1, 3, 4, 5, seed=1)
    x = random(1, 3, 4, 5, seed=2)

    class Model:
        def prior(self):
            return Independent(Normal(double([0.0]), double([1.0])), 1)

        def proposal(self, x):
            return self.prior().expand((len(x),))

        def likelihood(self, latent):
            return Independent(Normal(mean, scale), 3)

    weights = log_importance_weights(Model(), x, 2, generator=seeded())
    expected = Normal(mean, scale).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


class _AtZero:
    """Prior and proposal so narrow that z = 0 for every purpose."""

    def __init__(self, model):
        self.likelihood = model.likelihood

    def prior(self):
        return Independent(Normal(torch.zeros(1), torch.full((1,), 1e-20)), 1)

    def proposal(self, x):
        return Independent(Normal(torch.zeros(len(x), 1), torch.full((len(x), 1), 1e-20)), 1)


def test_not_a_number_reaches_its_own_row_only():
    model = autoencoder()
    x = random(3, 5).float()
    x[1, 2] = math.nan
    estimate = estimate_log_likelihood(model, x, num_samples=10, generator=seeded())
    assert estimate.log_likelihood.isnan().tolist() == [False, True, False]
    exact = estimate_log_likelihood(linear(), POINT.repeat(2, 1) * torch.tensor([[1], [math.nan]]))
    assert exact.log_likelihood.isnan().tolist() == [False, True]


@pytest.mark.parametrize("make", [lambda: autoencoder(torch.float64), lambda: None])
def test_empty_batches_give_empty_results(make):
    model = make() or linear()
    width = 5 if isinstance(model, VariationalAutoencoder) else 3
    x = torch.zeros(0, width, dtype=torch.float64)
    assert log_importance_weights(model, x, 4).shape == (4, 0)
    estimate = estimate_log_likelihood(model, x, num_samples=4, bias_correction="jackknife")
    assert estimate.log_likelihood.shape == (0,)
    assert estimate.standard_error.shape == (0,)


def test_results_follow_the_generator_and_nothing_else():
    model, x = autoencoder(), random(2, 5).float()
    before = torch.get_rng_state()
    one, same = (
        estimate_log_likelihood(model, x, num_samples=5, generator=seeded(4)) for _ in range(2)
    )
    assert torch.equal(one.log_likelihood, same.log_likelihood)
    assert torch.equal(before, torch.get_rng_state())


def test_multivariate_draws_have_their_covariance():
    root = torch.tensor([[1.0, 0.0], [-0.7, 0.4]], dtype=torch.float64)
    normal = MultivariateNormal(random(3, 2), scale_tril=root)
    draws = reparameterized_sample(normal, (50_000,), generator=seeded())
    assert draws.shape == (50_000, 3, 2)
    covariance = torch.cov((draws - normal.mean).reshape(-1, 2).T)
    # Entries of order 1 from 150 000 draws: 5 √2/√150 000.
    torch.testing.assert_close(covariance, root @ root.T, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["normal", "multivariate"])
def test_draws_are_those_of_rsample(kind):
    if kind == "normal":
        distribution = Independent(Normal(random(3, 2), random(3, 2, seed=1).exp()), 1)
    else:
        root = torch.tensor([[1.0, 0.0], [-0.7, 0.4]], dtype=torch.float64)
        distribution = MultivariateNormal(random(3, 2), scale_tril=root)
    ours = reparameterized_sample(distribution, (4,), generator=seeded(7))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = distribution.rsample((4,))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Wrong:
    def __init__(self, **parts):
        self.parts = parts

    def prior(self):
        return linear().prior()

    def proposal(self, x):
        return self.parts.get("proposal", lambda x: linear().proposal(x))(x)

    def likelihood(self, latent):
        return self.parts.get("likelihood", lambda z: linear().likelihood(z))(latent)


@pytest.mark.bad_input
@pytest.mark.parametrize("call", [log_importance_weights, estimate_log_likelihood, vae_loss])
@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            Wrong(proposal=lambda x: Independent(Laplace(x[:, :2], torch.ones_like(x[:, :2])), 1)),
            TypeError,
            "Normal or MultivariateNormal.*Laplace",
        ),
        (
            Wrong(proposal=lambda x: Normal(x[:, :2], torch.ones_like(x[:, :2]))),
            ValueError,
            "batch shape",
        ),
        (
            Wrong(likelihood=lambda z: Independent(Normal(z[..., :1], 1.0), 1)),
            ValueError,
            "event shape of x",
        ),
        (nn.Linear(3, 3), TypeError, "prior, proposal and likelihood.*Linear"),
    ],
)
def test_models_that_do_not_fit_are_refused(call, model, error, words):
    with pytest.raises(error, match=words):
        call(model, POINT, num_samples=2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: log_importance_weights(linear(), POINT, 0), "num_samples.*0"),
        (lambda: vae_loss(linear(), POINT, num_samples=0), "num_samples.*0"),
        (
            lambda: vae_loss(linear(), POINT, num_samples=0, gradient="doubly_reparameterized"),
            "num_samples.*0",
        ),
        (lambda: estimate_log_likelihood(linear(), POINT, num_samples=0), "num_samples.*0"),
        (
            lambda: estimate_log_likelihood(
                linear(), POINT, num_samples=1, bias_correction="jackknife"
            ),
            "num_samples.*jackknife.*1",
        ),
        (lambda: estimate_log_likelihood(linear(), POINT, chunk_size=0), "chunk_size.*0"),
        (
            lambda: estimate_log_likelihood(linear(), POINT, proposal="posterior"),
            "proposal.*encoder, prior.*'posterior'",
        ),
        (
            lambda: log_importance_weights(linear(), POINT, 2, proposal="posterior"),
            "proposal.*encoder, prior.*'posterior'",
        ),
        (
            lambda: log_importance_weights(linear(), POINT, 2, proposal_scale=0.0),
            "proposal_scale.*0.0",
        ),
        (
            lambda: estimate_log_likelihood(linear(), POINT, bias_correction="bootstrap"),
            "bias_correction.*none, jackknife.*'bootstrap'",
        ),
        (
            lambda: vae_loss(linear(), POINT, objective="iwae"),
            "objective.*importance_weighted, elbo.*'iwae'",
        ),
        (
            lambda: vae_loss(linear(), POINT, gradient="score"),
            "gradient.*reparameterized, doubly_reparameterized.*'score'",
        ),
        (lambda: log_importance_weights(linear(), POINT.long(), 2), "x.*int64"),
        (lambda: importance_weighted_bound(torch.zeros(0)), "samples along dimension 0"),
        (lambda: importance_weighted_bound(torch.tensor(1.0)), "samples along dimension 0"),
        (
            lambda: vae_loss(autoencoder(likelihood="bernoulli"), torch.full((1, 5), 0.5)),
            "0 or 1.*0.5",
        ),
        (
            lambda: estimate_log_likelihood(
                autoencoder(likelihood="discretized_logistic", bin_width=0.5, low=-1.0, high=1.0),
                torch.full((1, 5), 0.3),
            ),
            "grid.*0.3",
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_other_distributions_cannot_be_drawn():
    with pytest.raises(TypeError, match=r"Normal or MultivariateNormal.*Laplace"):
        reparameterized_sample(Laplace(torch.zeros(2), torch.ones(2)))


@pytest.mark.gpu
def test_a_generator_on_another_device_is_refused():
    model = linear().cuda()
    with pytest.raises(ValueError, match=r"generator.*cuda.*cpu"):
        log_importance_weights(model, POINT.cuda(), 2, generator=seeded())


COMPILED = """
import torch
from torch import nn
from kexue.generative.vae import VariationalAutoencoder, vae_loss

torch.manual_seed(0)
for options, width in (({"scale": 0.5}, 6), ({}, 12)):
    encoder = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4))
    model = VariationalAutoencoder(encoder, nn.Linear(2, width), 2, **options)
    x = torch.randn(7, 6)
    for settings, whole in (
        ({"num_samples": 4}, True),
        ({"num_samples": 4, "objective": "elbo"}, True),
        ({"num_samples": 4, "gradient": "doubly_reparameterized"}, False),
    ):
        def loss():
            return vae_loss(model, x, **settings)

        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=whole)
        results = []
        for run in (compiled, loss):
            torch.manual_seed(3)
            value = run()
            results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_loss_compiles_without_a_graph_break():
    # In a process of its own: dynamo cannot trace through the shape checks of this one.
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=environment)
