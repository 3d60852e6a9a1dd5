"""The linear model against closed forms; the networks' model against its own description."""

import math

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from kexue.generative.vae import (
    DiscretizedLogistic,
    LatentVariableModel,
    LinearGaussianModel,
    VariationalAutoencoder,
)

WEIGHT = torch.tensor([[1.0, 0.5], [0.6, 0.9], [-0.4, 0.2]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
POINT = torch.tensor([[0.5, -1.0, 0.75]], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(**options):
    return LinearGaussianModel(WEIGHT, BIAS, 0.25, **options)


def test_log_density_matches_thirty_digit_arithmetic():
    assert linear().log_prob(POINT).item() == pytest.approx(-3.98280432028555, rel=1e-14)


def test_posterior_matches_thirty_digit_arithmetic():
    posterior = linear().posterior(POINT)
    mean = torch.tensor([[0.0421009605558962, -0.348456979358267]], dtype=torch.float64)
    covariance = torch.tensor(
        [[0.229920294297977, -0.163498875945228], [-0.163498875945228, 0.301451052524014]],
        dtype=torch.float64,
    )
    # Fifteen printed digits.
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(posterior.covariance_matrix[0], covariance, rtol=1e-13, atol=0)


@pytest.mark.parametrize("latent", [1, 3, 4, 6])
def test_log_density_is_that_of_the_marginal_normal(latent):
    """Both branches: fewer and more latent than observed entries."""
    weight, x = random(4, latent), random(5, 4, seed=1)
    model = LinearGaussianModel(weight, random(4, seed=2), 0.3)
    covariance = weight @ weight.T + 0.3 * torch.eye(4, dtype=torch.float64)
    expected = MultivariateNormal(model.bias, covariance).log_prob(x)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_log_density_keeps_its_digits_where_the_noise_is_tiny():
    """A point on the plane: the quadratic form is the latent norm, whatever 1/s² multiplies."""
    weight = random(6, 2)
    latent = random(1, 2, seed=1)
    for variance in (1e-2, 1e-8):
        model = LinearGaussianModel(weight, torch.zeros(6, dtype=torch.float64), variance)
        gram = weight.T @ weight
        # s² → 0: quadratic form → |z|² − s² zᵀ G⁻¹ z + O(s⁴), determinant in closed form.
        precision = torch.eye(2, dtype=torch.float64) + gram / variance
        quadratic = (
            latent
            @ gram
            @ torch.linalg.solve(variance * torch.eye(2, dtype=torch.float64) + gram, latent.T)
        )
        expected = -0.5 * (
            6 * math.log(2 * math.pi * variance) + torch.logdet(precision) + quadratic.squeeze()
        )
        result = model.log_prob(latent @ weight.T)
        # The residual is rounding, 1e-16, squared over s².
        torch.testing.assert_close(result, expected.reshape(1), rtol=1e-12, atol=0)


def test_diagonal_proposal_has_the_inverse_diagonal_of_the_precision():
    proposal = linear(proposal="diagonal").proposal(POINT)
    precision = torch.eye(2, dtype=torch.float64) + WEIGHT.T @ WEIGHT / 0.25
    torch.testing.assert_close(proposal.variance[0], 1 / precision.diagonal(), rtol=1e-14, atol=0)
    torch.testing.assert_close(proposal.mean, linear().posterior(POINT).mean)


def test_fit_reaches_the_closed_form_maximum():
    """Mean log-likelihood −½(d ln 2π + Σ ln λ + (d−k) ln s² + d)."""
    x = random(200, 6) @ random(6, 6, seed=1) + random(6, seed=2)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    for k in (1, 3, 5):
        left = eigenvalues[k:].mean()
        expected = -0.5 * (
            6 * math.log(2 * math.pi) + eigenvalues[:k].log().sum() + (6 - k) * left.log() + 6
        )
        model = LinearGaussianModel.fit(x, k)
        assert model.log_prob(x).mean().item() == pytest.approx(expected.item(), rel=1e-12)
        assert model.noise_variance == pytest.approx(left.item(), rel=1e-12)


def test_sklearn_scores_slightly_below_the_maximum():
    """Its covariance has the factor 1/(n−1), which is no maximum of the likelihood."""
    x = random(40, 5) @ random(5, 5, seed=1)
    ours = LinearGaussianModel.fit(x, 2).log_prob(x).mean().item()
    theirs = PCA(2).fit(x.numpy()).score(x.numpy())
    assert theirs < ours < theirs + 0.01


def test_fit_of_fewer_samples_than_entries_spreads_the_remaining_variance():
    x = random(5, 10)
    model = LinearGaussianModel.fit(x, 2)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    assert model.noise_variance == pytest.approx(eigenvalues[2:].mean().item(), rel=1e-12)


def test_fit_keeps_dtype_and_passes_options_on():
    model = LinearGaussianModel.fit(random(20, 4).float(), 2, proposal="diagonal")
    assert model.weight.dtype == torch.float32
    assert model.proposal(torch.zeros(1, 4)).variance.shape == (1, 2)


def test_linear_model_follows_its_buffers():
    model = linear().float()
    assert model.log_prob(POINT.float()).item() == pytest.approx(-3.98280432028555, rel=1e-6)
    assert {"weight", "bias"} <= set(model.state_dict())


def test_the_state_of_a_linear_model_is_all_of_it():
    fitted = LinearGaussianModel.fit(random(50, 4), 2)
    other = LinearGaussianModel(torch.zeros(4, 2).double(), torch.zeros(4).double(), 1.0)
    other.load_state_dict(fitted.state_dict())
    assert other.noise_variance == fitted.noise_variance
    x = random(3, 4, seed=1)
    assert torch.equal(other.log_prob(x), fitted.log_prob(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_linear_model_in_half_precision_computes_in_single(dtype):
    model = LinearGaussianModel(WEIGHT.to(dtype), BIAS.to(dtype), 0.25)
    exact = LinearGaussianModel(WEIGHT.to(dtype).double(), BIAS.to(dtype).double(), 0.25)
    x = POINT.to(dtype)
    assert model.log_prob(x).dtype == torch.float32
    torch.testing.assert_close(
        model.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-5, atol=0
    )
    latent = random(2, 2).to(dtype)
    torch.testing.assert_close(
        model.likelihood(latent).mean.double(), exact.likelihood(latent.double()).mean,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_a_model_lives_where_its_networks_are():
    """On "meta" nothing may come from another device."""
    encoder, decoder = nn.Linear(6, 4, device="meta"), nn.Linear(2, 6, device="meta")
    model = VariationalAutoencoder(encoder, decoder, 2, scale=0.1)
    assert model.prior().mean.device.type == "meta"
    assert model.likelihood(torch.zeros(3, 2, device="meta")).stddev.device.type == "meta"


def test_a_model_of_double_networks_is_double():
    encoder, decoder = nn.Linear(6, 4).double(), nn.Linear(2, 6).double()
    model = VariationalAutoencoder(encoder, decoder, 2, scale=0.1)
    assert model.prior().sample().dtype == torch.float64
    assert model.likelihood(torch.zeros(1, 2).double()).stddev[0, 0].item() == 0.1


def test_examples_of_another_precision_are_encoded():
    model = VariationalAutoencoder(nn.Linear(6, 4), nn.Linear(2, 6), 2, scale=1.0)
    assert model.proposal(torch.zeros(3, 6).half()).mean.dtype == torch.float32


def test_both_models_are_latent_variable_models():
    assert isinstance(linear(), LatentVariableModel)
    assert isinstance(VariationalAutoencoder(nn.Identity(), nn.Identity(), 1), LatentVariableModel)
    assert not isinstance(nn.Linear(1, 1), LatentVariableModel)


def image_model(**options):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    channels = 1 if "scale" in options or options.get("likelihood") == "bernoulli" else 2
    decoder = nn.Sequential(nn.Linear(2, 12 * channels), nn.Unflatten(1, (channels, 3, 4)))
    return VariationalAutoencoder(encoder, decoder, 2, **options)


def test_encoder_output_is_mean_and_log_deviation_in_this_order():
    model = VariationalAutoencoder(nn.Identity(), nn.Identity(), 2)
    proposal = model.proposal(torch.tensor([[1.0, 2.0, 0.0, math.log(3)]]))
    torch.testing.assert_close(proposal.mean, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(proposal.stddev, torch.tensor([[1.0, 3.0]]))
    assert proposal.batch_shape == (1,)
    assert proposal.event_shape == (2,)


def test_decoder_output_halves_into_location_and_log_scale():
    model = image_model()
    latent = random(5, 3, 2).float()
    likelihood = model.likelihood(latent)
    assert likelihood.batch_shape == (5, 3)
    assert likelihood.event_shape == (1, 3, 4)
    output = model.decoder(latent[4, 2].unsqueeze(0))
    torch.testing.assert_close(likelihood.mean[4, 2], output[0, :1])
    torch.testing.assert_close(likelihood.stddev[4, 2], output[0, 1:].exp())


def test_a_given_scale_leaves_the_whole_output_to_the_location():
    per_row = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1)
    likelihood = image_model(scale=per_row).likelihood(torch.zeros(7, 2))
    assert likelihood.event_shape == (1, 3, 4)
    torch.testing.assert_close(likelihood.stddev, per_row.expand(7, 1, 3, 4))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("normal", {"scale": 0.5}, Normal),
        ("bernoulli", {}, Bernoulli),
        (
            "discretized_logistic",
            {"bin_width": 0.5, "low": -1.0, "high": 1.0},
            DiscretizedLogistic,
        ),
    ],
)
def test_likelihood_is_of_the_kind_that_was_asked_for(kind, options, expected):
    likelihood = image_model(likelihood=kind, **options).likelihood(torch.zeros(2, 2))
    assert type(likelihood.base_dist) is expected
    assert likelihood.batch_shape == (2,)


def test_a_single_latent_point_has_no_batch():
    likelihood = image_model().likelihood(torch.zeros(2))
    assert likelihood.batch_shape == ()
    assert likelihood.event_shape == (1, 3, 4)


def test_half_precision_networks_give_single_precision_distributions():
    model = image_model().to(torch.bfloat16)
    x = torch.zeros(2, 1, 3, 4, dtype=torch.bfloat16)
    assert model.proposal(x).mean.dtype == torch.float32
    assert model.prior().mean.dtype == torch.float32
    assert model.likelihood(torch.zeros(2, 2)).mean.dtype == torch.float32


def test_the_state_holds_the_networks_and_a_fixed_scale():
    names = set(image_model().state_dict())
    assert names == {"encoder.1.weight", "encoder.1.bias", "decoder.0.weight", "decoder.0.bias"}
    assert set(image_model(scale=0.5).state_dict()) == names | {"scale"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearGaussianModel(WEIGHT, BIAS, 0.0), "noise_variance.*0.0"),
        (lambda: LinearGaussianModel(WEIGHT, BIAS, -1.0), "noise_variance.*-1.0"),
        (lambda: LinearGaussianModel(WEIGHT, BIAS[:2], 1.0), r"weight and bias.*\(3, 2\).*\(2,\)"),
        (lambda: LinearGaussianModel(WEIGHT[0], BIAS, 1.0), "weight and bias"),
        (lambda: linear(proposal="full"), "proposal.*exact, diagonal.*'full'"),
        (lambda: linear().log_prob(POINT[:, :2]), r"x must have shape.*3.*\(1, 2\)"),
        (lambda: LinearGaussianModel.fit(random(9, 3), 3), "latent_dim.*3"),
        (lambda: LinearGaussianModel.fit(random(9, 3), 0), "latent_dim.*0"),
        (lambda: LinearGaussianModel.fit(random(9, 1) @ random(1, 3), 2), "vary"),
        (lambda: image_model(likelihood="gaussian"), "likelihood.*normal.*'gaussian'"),
        (lambda: image_model(scale=-1.0), "scale.*-1"),
        (lambda: image_model(scale=1.0, likelihood="bernoulli"), "scale.*bernoulli"),
        (lambda: image_model(likelihood="discretized_normal"), "bin_width, low and high"),
        (
            lambda: image_model(likelihood="discretized_normal", bin_width=0.3, low=-1.0, high=1.0),
            "whole number of bins",
        ),
        (
            lambda: image_model(likelihood="discretized_normal", bin_width=0.5, low=1.0, high=1.0),
            "high",
        ),
        (
            lambda: VariationalAutoencoder(nn.Linear(3, 5), nn.Identity(), 2).proposal(
                torch.zeros(1, 3)
            ),
            r"2\*latent_dim.*4.*5",
        ),
        (
            lambda: VariationalAutoencoder(nn.Identity(), nn.Linear(2, 3), 2).likelihood(
                torch.zeros(1, 2)
            ),
            "halve.*3",
        ),
        (lambda: image_model().likelihood(torch.zeros(4, 3)), r"latent.*2.*\(4, 3\)"),
        (lambda: VariationalAutoencoder(nn.Identity(), nn.Identity(), 0), "latent_dim.*0"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
