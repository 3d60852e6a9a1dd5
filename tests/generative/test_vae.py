"""Discretised likelihoods and code lengths against high-precision arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch.distributions import Normal

from kexue.generative.vae import (
    DiscretizedLogistic,
    DiscretizedNormal,
    bits_per_dimension,
    uniform_dequantize,
)

BYTE = {"bin_width": 2 / 255, "low": -1.0, "high": 1.0}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


KINDS = pytest.mark.parametrize("kind", [DiscretizedNormal, DiscretizedLogistic])


def logistic_reference(loc, scale, value, width):
    """log(F(b) − F(a)) = log(e^(−a) − e^(−b)) − log(1 + e^(−a)) − log(1 + e^(−b))."""
    # The width in scales is down to 1e-4, and e^(−a) up to e^30: 60 digits are plenty.
    with mp.workdps(60):
        upper = (mpf(value) + mpf(width) / 2 - mpf(loc)) / mpf(scale)
        lower = (mpf(value) - mpf(width) / 2 - mpf(loc)) / mpf(scale)
        if lower + upper > 0:
            lower, upper = -upper, -lower
        share = (1 - mp.exp(lower - upper)) / (1 + mp.exp(lower)) / (1 + mp.exp(upper))
        return float(upper + mp.log(share))


def reference(loc, scale, value, width):
    """log(Φ(b) − Φ(a)) with 60 digits beyond the size of the tail."""
    with mp.workdps(60 + int(0.5 * (abs(value - loc) / scale + 1) ** 2 / 2)):
        upper = (mpf(value) + mpf(width) / 2 - mpf(loc)) / mpf(scale)
        lower = (mpf(value) - mpf(width) / 2 - mpf(loc)) / mpf(scale)
        if lower + upper > 0:
            lower, upper = -upper, -lower
        return float(mp.log((mp.erfc(-upper / mp.sqrt(2)) - mp.erfc(-lower / mp.sqrt(2))) / 2))


@pytest.mark.parametrize(
    ("kind", "loc", "scale", "value", "expected"),
    [
        (DiscretizedNormal, -0.2, 0.05, -1 + 100 * 2 / 255, -2.82145846839429),
        (DiscretizedNormal, -0.9, 0.1, -1.0, -1.78182707718307),
        (DiscretizedNormal, -0.5, 0.05, 1.0, -451.968766517801),
        (DiscretizedLogistic, -0.2, 0.05, -1 + 100 * 2 / 255, -3.26365937002846),
        (DiscretizedLogistic, -0.9, 0.1, -1.0, -1.28474481512641),
        (DiscretizedLogistic, -0.5, 0.05, 1.0, -29.9215686274511),
    ],
)
def test_log_probabilities_match_thirty_digit_arithmetic(kind, loc, scale, value, expected):
    distribution = kind(double(loc), double(scale), **BYTE)
    # Fifteen printed digits.
    assert distribution.log_prob(double(value)).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    level=st.integers(1, 15),
    log_ratio=st.floats(-4, 4),
    distance=st.floats(0, 1000),
    sign=st.sampled_from([-1, 1]),
)
def test_logistic_interior_bins_match_high_precision_in_float32(level, log_ratio, distance, sign):
    """Specified: relative error at most 2e-5, up to 1e3 scales from the mean."""
    width = 1 / 8
    value = -1 + level * width
    scale = torch.tensor(width / 10**log_ratio)
    loc = torch.tensor(value) - sign * distance * scale
    result = DiscretizedLogistic(loc, scale, bin_width=width, low=-1.0, high=1.0).log_prob(
        torch.tensor(value)
    )
    expected = logistic_reference(loc.item(), scale.item(), value, width)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=2e-5, abs=1e-30)


@settings(max_examples=40, deadline=None)
@given(
    level=st.integers(1, 15),
    log_ratio=st.floats(-4, 4),
    distance=st.floats(0, 30),
    sign=st.sampled_from([-1, 1]),
)
def test_interior_bins_match_high_precision_in_float32(level, log_ratio, distance, sign):
    """Specified: relative error at most 2e-5 for widths of 1e-4 to 1e4 standard deviations."""
    width = 1 / 8
    value = -1 + level * width
    scale = torch.tensor(width / 10**log_ratio)
    loc = torch.tensor(value) - sign * distance * scale
    result = DiscretizedNormal(loc, scale, bin_width=width, low=-1.0, high=1.0).log_prob(
        torch.tensor(value)
    )
    expected = reference(loc.item(), scale.item(), value, width)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=2e-5, abs=1e-30)


def test_a_bin_that_holds_nearly_everything_keeps_both_of_its_tails():
    """log(1 − 2Φ(−u)) ≈ −2Φ(−u), far below the rounding of 1."""
    distribution = DiscretizedNormal(double(0.0), double(1 / 36), bin_width=0.5, low=-1.0, high=1.0)
    with mp.workdps(30):
        expected = float(mp.log1p(-mp.erfc(9 / mp.sqrt(2))))
    assert distribution.log_prob(double(0.0)).item() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("ratio", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("distance", [100.0, 1000.0])
def test_far_tails_keep_their_digits(ratio, distance):
    """A narrow bin at u standard deviations: log φ(u) + log(2 sinh(u h/2)/u) up to O(h/u)."""
    width = 1 / 8
    scale = width / ratio
    loc = -distance * scale
    distribution = DiscretizedNormal(
        double(loc), double(scale), bin_width=width, low=-1.0, high=1.0
    )
    result = distribution.log_prob(double(0.0)).item()
    # The ratio of tails: Φ(−a) = φ(a)/a (1 − 1/a² + …), to two terms.
    near, far = distance - ratio / 2, distance + ratio / 2

    def log_tail(a):
        return -(a**2) / 2 - math.log(a * math.sqrt(2 * math.pi)) + math.log1p(-1 / a**2 + 3 / a**4)

    expected = log_tail(near) + math.log(-math.expm1(log_tail(far) - log_tail(near)))
    assert result == pytest.approx(expected, rel=1e-6)


@KINDS
@settings(max_examples=40, deadline=None)
@given(loc=st.floats(-3, 3), log_scale=st.floats(-5, 3))
def test_probabilities_sum_to_one(kind, loc, log_scale):
    distribution = kind(
        double(loc), double(math.exp(log_scale)), bin_width=0.25, low=-1.0, high=1.0
    )
    total = torch.logsumexp(distribution.log_prob(distribution.support_values), 0)
    # Nine probabilities, each good to a few ulp.
    assert total.item() == pytest.approx(0, abs=1e-14)


def test_logistic_edges_reach_to_infinity():
    distribution = DiscretizedLogistic(double(0.1), double(0.7), bin_width=0.5, low=-1.0, high=1.0)
    ends = distribution.log_prob(double([-1.0, 1.0])).exp()
    expected = torch.sigmoid(double([(-0.75 - 0.1) / 0.7, -(0.75 - 0.1) / 0.7]))
    torch.testing.assert_close(ends, expected, rtol=1e-13, atol=0)


def test_edges_reach_to_infinity():
    distribution = DiscretizedNormal(double(0.1), double(0.7), bin_width=0.5, low=-1.0, high=1.0)
    normal = Normal(double(0.1), double(0.7))
    ends = distribution.log_prob(double([-1.0, 1.0])).exp()
    expected = torch.stack([normal.cdf(double(-0.75)), 1 - normal.cdf(double(0.75))])
    torch.testing.assert_close(ends, expected, rtol=1e-13, atol=0)


@KINDS
def test_gradcheck_in_loc_and_scale(kind):
    values = double([-1.0, -0.5, 0.0, 1.0])

    def log_prob(loc, scale):
        return kind(loc, scale, bin_width=0.5, low=-1.0, high=1.0).log_prob(values)

    loc = double([0.2, 0.3, -0.4, 5.0]).requires_grad_()
    scale = double([0.3, 0.1, 2.0, 0.2]).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (loc, scale))


@KINDS
def test_gradients_far_from_the_data_are_finite_and_point_back(kind):
    loc = double([-40.0, 40.0]).requires_grad_()
    distribution = kind(loc, 0.1, bin_width=0.5, low=-1.0, high=1.0)
    distribution.log_prob(double(0.5)).sum().backward()
    assert bool(torch.isfinite(loc.grad).all())
    assert loc.grad[0] > 0 > loc.grad[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_give_float32_weights(dtype):
    loc, scale = torch.tensor(0.25, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    options = {"bin_width": 1 / 8, "low": -1.0, "high": 1.0}
    result = DiscretizedNormal(loc, scale, **options).log_prob(torch.tensor(0.5, dtype=dtype))
    expected = DiscretizedNormal(loc.double(), scale.double(), **options).log_prob(double(0.5))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)


@KINDS
def test_samples_have_the_stated_probabilities(kind):
    distribution = kind(double([0.1, -2.0]), double([0.4, 1.0]), bin_width=0.5, low=-1.0, high=1.0)
    draws = distribution.sample((40_000,), generator=torch.Generator().manual_seed(0))
    assert draws.shape == (40_000, 2)
    for value in distribution.support_values:
        probability = distribution.log_prob(value).exp()
        share = (draws == value).double().mean(0)
        error = 5 * (probability * (1 - probability) / 40_000).sqrt() + 1e-12
        assert bool(((share - probability).abs() < error).all())


@KINDS
def test_expand_keeps_the_grid(kind):
    distribution = kind(double(0.1), double(0.4), bin_width=0.5, low=-1.0, high=1.0)
    wide = distribution.expand((3,))
    assert type(wide) is kind
    assert wide.batch_shape == (3,)
    value = double([-1.0, 0.0, 0.5])
    assert torch.equal(wide.log_prob(value), distribution.log_prob(value))


@KINDS
def test_not_a_number_reaches_its_own_entry_only(kind):
    distribution = kind(torch.zeros(2), torch.ones(2), bin_width=0.5, low=-1.0, high=1.0)
    result = distribution.log_prob(torch.tensor([float("nan"), 0.5]))
    assert result.isnan().tolist() == [True, False]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bin_width": 0.0}, "bin_width.*0.0"),
        ({"bin_width": -0.5}, "bin_width.*-0.5"),
        ({"high": -1.0}, "high.*-1.0"),
        ({"bin_width": 0.3}, "whole number of bins"),
        ({"scale": torch.tensor(0.0)}, "scale"),
    ],
)
def test_bad_parameters_are_refused(options, words):
    given = {"loc": torch.tensor(0.0), "scale": torch.tensor(1.0), "bin_width": 0.5, "low": -1.0,
             "high": 1.0, **options}  # fmt: skip
    with pytest.raises(ValueError, match=words):
        DiscretizedNormal(**given)


def test_checks_outlive_torch_compile(monkeypatch):
    """Dynamo switches the checks of all torch distributions off."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    distribution = DiscretizedNormal(0.0, 1.0, bin_width=0.5, low=-1.0, high=1.0)
    with pytest.raises(ValueError, match="grid"):
        distribution.log_prob(torch.tensor(0.1))


@pytest.mark.bad_input
@KINDS
@pytest.mark.parametrize("value", [0.1, 1.5, -1.5])
def test_values_off_the_grid_are_refused(kind, value):
    distribution = kind(0.0, 1.0, bin_width=0.5, low=-1.0, high=1.0)
    with pytest.raises(ValueError, match=f"grid.*{value}"):
        distribution.log_prob(torch.tensor(value))


def test_bits_match_thirty_digit_arithmetic():
    nats = double(-1000.0)
    assert bits_per_dimension(nats, 64).item() == pytest.approx(22.5421100138900532, rel=1e-14)
    assert bits_per_dimension(nats, 64, bin_width=1 / 8).item() == pytest.approx(
        25.5421100138900532, rel=1e-14
    )


def test_a_uniform_density_costs_log_of_the_levels():
    """A density 1/2 on [−1, 1] with 16 bins of 1/8: four bits."""
    assert bits_per_dimension(double(-math.log(2)), 1, bin_width=1 / 8).item() == pytest.approx(4)


def test_dequantised_values_fill_their_bins():
    value = torch.linspace(-1, 1, 17, dtype=torch.float64).repeat(2000)
    noisy = uniform_dequantize(value, bin_width=1 / 8, generator=torch.Generator().manual_seed(0))
    noise = (noisy - value) * 8
    assert noise.abs().max() <= 0.5 + 1e-14
    # U(−½, ½): variance 1/12, that of its square 1/180.
    count = len(value)
    assert abs(noise.mean().item()) < 5 / math.sqrt(12 * count)
    assert noise.square().mean().item() == pytest.approx(1 / 12, abs=5 / math.sqrt(180 * count))


def test_dequantised_density_is_bounded_by_the_discrete_probability():
    """Jensen: −E log q(v + u) − log h is never below −log P(v)."""
    normal = Normal(double(0.1), double(0.3))
    discrete = DiscretizedNormal(double(0.1), double(0.3), bin_width=0.5, low=-10.0, high=10.0)
    value = double([-0.5, 0.0, 0.5, 1.0])
    nodes = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 - 0.5
    density = normal.log_prob(value + 0.5 * nodes.unsqueeze(1)).mean(0)
    assert bool((density + math.log(0.5) <= discrete.log_prob(value)).all())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bits_per_dimension(torch.tensor(-1.0), 0), "num_dimensions.*0"),
        (lambda: bits_per_dimension(torch.tensor(-1.0), 2, bin_width=0.0), "bin_width.*0.0"),
        (lambda: bits_per_dimension(torch.tensor(1), 2), "log_likelihood.*int64"),
        (lambda: uniform_dequantize(torch.zeros(2), bin_width=-1.0), "bin_width.*-1"),
        (lambda: uniform_dequantize(torch.zeros(2).int(), bin_width=1.0), "value.*int32"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_levels_may_be_integers():
    pixel = DiscretizedNormal(3.0, 1.0, bin_width=1.0, low=0.0, high=255.0)
    levels = torch.tensor([0, 3, 255])
    assert torch.equal(pixel.log_prob(levels), pixel.log_prob(levels.float()))
    with pytest.raises(ValueError, match="on the grid"):
        pixel.log_prob(torch.tensor([256]))


@pytest.mark.parametrize("ends", [(0.0, math.inf), (-math.inf, 0.0), (0.0, math.nan)])
def test_a_grid_has_two_ends(ends):
    with pytest.raises(ValueError, match="both finite"):
        DiscretizedNormal(0.0, 1.0, bin_width=1.0, low=ends[0], high=ends[1])


def test_a_generator_of_another_device_is_refused():
    values, generator = torch.zeros(3, device="meta"), torch.Generator()
    with pytest.raises(ValueError, match="the generator must be on the device of x"):
        uniform_dequantize(values, bin_width=1.0, generator=generator)
    pixel = DiscretizedNormal(
        values, torch.ones(3, device="meta"), bin_width=1.0, low=0.0, high=3.0, validate_args=False
    )
    with pytest.raises(ValueError, match="the generator must be on the device of x"):
        pixel.sample(generator=generator)
