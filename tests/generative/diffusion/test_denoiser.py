"""Predictions and denoisers against Tweedie, Bayes and brute force."""

import math
import pickle

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from generative.diffusion.mixtures import SCHEDULES, TIMES, double, gaussian, mixture
from kexue.generative.diffusion import (
    Denoiser,
    DiscreteSchedule,
    GaussianMixtureDenoiser,
    HeatSchedule,
    NetworkDenoiser,
    Prediction,
)

LINEAR = DiscreteSchedule.linear()
TYPES = ["epsilon", "sample", "v_prediction", "score"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_every_parametrisation_of_the_truth_gives_it_back(name, prediction_type, generator):
    schedule, time = SCHEDULES[name], TIMES[name]
    clean, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    x = schedule.add_noise(clean, noise, time)
    signal, scale = schedule.signal_scale(time), schedule.noise_scale(time)
    output = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": signal * noise - scale * clean,
        "score": -noise / scale,
    }[prediction_type]
    prediction = Prediction.from_output(output, x, time, schedule, prediction_type)
    torch.testing.assert_close(prediction.sample, clean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(prediction.epsilon, noise, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(prediction.score, -noise / scale, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        prediction.v_prediction, signal * noise - scale * clean, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_replacing_one_half_of_a_prediction_keeps_the_sum(name, generator):
    schedule, time = SCHEDULES[name], TIMES[name]
    x, output, other = torch.randn(3, 4, 2, dtype=torch.float64, generator=generator)
    prediction = Prediction.from_output(output, x, time, schedule, "epsilon")
    for changed in (prediction.with_sample(other, x), prediction.with_epsilon(other, x)):
        total = changed.signal_scale * changed.sample + changed.noise_scale * changed.epsilon
        torch.testing.assert_close(total, x, rtol=1e-13, atol=1e-13)
    assert torch.equal(prediction.with_sample(other, x).sample, other)
    assert torch.equal(prediction.with_epsilon(other, x).epsilon, other)


def test_the_articles_noise_of_the_last_step_gives_the_same_mean(generator):
    """μ = (x − β_t ε_step)/α_t with ε̂ = (β̄_t/β_t) ε_step is the η = 1 mean."""
    from kexue.generative.diffusion import reverse_transition

    denoiser = mixture(LINEAR)
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    time = 400
    beta = LINEAR.betas[time - 1].sqrt()
    step_noise = beta / LINEAR.noise_scale(time) * denoiser.predict(x, time).epsilon
    expected = (x - beta * step_noise) / (1 - beta**2).sqrt()
    mean = reverse_transition(denoiser, x, time, time - 1).mean
    # x̂_0 divides by ᾱ ~ 0.4 and is multiplied by λ ~ 0.01: no digits are lost.
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SCHEDULES)
def test_mixture_obeys_tweedie(name, generator):
    """ε̂ = −β̄ ∇log p_t(x), with the density's own autograd."""
    schedule, time = SCHEDULES[name], TIMES[name]
    denoiser = mixture(schedule)
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator).requires_grad_()
    (score,) = torch.autograd.grad(denoiser.log_prob(x, time).sum(), x)
    prediction = denoiser.predict(x, time)
    torch.testing.assert_close(prediction.score, score, rtol=1e-11, atol=1e-11)
    total = (
        prediction.signal_scale * prediction.sample + prediction.noise_scale * prediction.epsilon
    )
    torch.testing.assert_close(total, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SCHEDULES)
def test_mixture_variance_is_the_jacobian_of_its_mean(name, generator):
    """Cov[x_0 | x_t] = β̄²/ᾱ ∂x̂_0/∂x_t, the second Tweedie formula."""
    schedule, time = SCHEDULES[name], TIMES[name]
    denoiser = mixture(schedule)
    x = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    factor = schedule.noise_scale(time) ** 2 / schedule.signal_scale(time)

    def predict(row):
        return denoiser.predict(row.unsqueeze(0), time).sample.squeeze(0)

    expected = torch.stack(
        [factor * torch.autograd.functional.jacobian(predict, row).diagonal() for row in x]
    )
    torch.testing.assert_close(denoiser.clean_variance(x, time), expected, rtol=1e-11, atol=1e-13)


def test_mixture_density_is_torchs(generator):
    denoiser = mixture(LINEAR)
    signal, noise = LINEAR.signal_scale(300), LINEAR.noise_scale(300)
    covariances = signal**2 * double(
        [[[0.05, 0.02], [0.02, 0.04]], [[0.02, 0.0], [0.0, 0.1]], [[0.1, -0.03], [-0.03, 0.05]]]
    ) + noise**2 * torch.eye(2, dtype=torch.float64)
    expected = MixtureSameFamily(
        Categorical(double([0.2, 0.5, 0.3])),
        MultivariateNormal(signal * denoiser.means, covariances),
    )
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(denoiser.log_prob(x, 300), expected.log_prob(x), rtol=1e-12, atol=0)


def test_the_three_forms_of_covariance_agree(generator):
    means = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)
    variances = torch.rand(4, dtype=torch.float64, generator=generator) + 0.1
    x = torch.randn(5, 2, 3, dtype=torch.float64, generator=generator)
    forms = [
        variances,
        variances.reshape(4, 1, 1).expand(4, 2, 3),
        torch.diag_embed(variances.unsqueeze(-1).expand(4, 6)),
    ]
    one, two, three = (GaussianMixtureDenoiser(means, form, schedule=LINEAR) for form in forms)
    for other in (two, three):
        for name in ("sample", "epsilon"):
            torch.testing.assert_close(
                getattr(other.predict(x, 200), name),
                getattr(one.predict(x, 200), name),
                rtol=1e-12,
                atol=1e-13,
            )
        torch.testing.assert_close(
            other.clean_variance(x, 200), one.clean_variance(x, 200), rtol=1e-12, atol=1e-14
        )


def test_a_finite_training_set_is_a_softmax_over_its_points(generator):
    data = torch.randn(30, 4, dtype=torch.float64, generator=generator)
    denoiser = GaussianMixtureDenoiser(data, torch.zeros(30), schedule=LINEAR)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    signal, noise = LINEAR.signal_scale(400), LINEAR.noise_scale(400)
    distance = ((x[:, None] - signal * data) ** 2).sum(-1)
    expected = torch.softmax(-distance / (2 * noise**2), 1) @ data
    torch.testing.assert_close(denoiser.predict(x, 400).sample, expected, rtol=1e-12, atol=1e-13)


def test_mixture_mean_and_variance_match_monte_carlo(generator):
    """Importance weights of prior draws; 5 standard errors."""
    denoiser = mixture(HeatSchedule())
    x = double([[0.3, -0.2]])
    draws = denoiser.sample(200_000, generator=generator)
    weight = torch.softmax(-((x - draws) ** 2).sum(1) / 2 / 0.5**2, 0).unsqueeze(1)
    mean = (weight * draws).sum(0)
    error = 5 * (weight**2 * (draws - mean) ** 2).sum(0).sqrt()
    assert bool(((denoiser.predict(x, 0.5).sample[0] - mean).abs() < error).all())
    variance = (weight * (draws - mean) ** 2).sum(0)
    spread = 5 * (weight**2 * ((draws - mean) ** 2 - variance) ** 2).sum(0).sqrt()
    assert bool(((denoiser.clean_variance(x, 0.5)[0] - variance).abs() < spread).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_may_differ_per_example(name, generator):
    schedule = SCHEDULES[name]
    denoiser = mixture(schedule)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    times = double([0.1, 0.5, 0.9]) * schedule.maximum_time
    together = denoiser.predict(x, times)
    density, variance = denoiser.log_prob(x, times), denoiser.clean_variance(x, times)
    for i, time in enumerate(times):
        alone = denoiser.predict(x[i : i + 1], time)
        torch.testing.assert_close(together.sample[i], alone.sample[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together.epsilon[i], alone.epsilon[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            density[i], denoiser.log_prob(x[i : i + 1], time)[0], rtol=1e-12, atol=0
        )
        torch.testing.assert_close(
            variance[i], denoiser.clean_variance(x[i : i + 1], time)[0], rtol=1e-12, atol=0
        )


def test_condition_selects_the_components_of_a_class(generator):
    denoiser = mixture(LINEAR, labels=torch.tensor([0, 1, 1]))
    only = GaussianMixtureDenoiser(
        denoiser.means[1:],
        double([[[0.02, 0.0], [0.0, 0.1]], [[0.1, -0.03], [-0.03, 0.05]]]),
        double([0.5, 0.3]),
        schedule=LINEAR,
    )
    x = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    chosen = denoiser.predict(x, 300, condition=1)
    torch.testing.assert_close(chosen.sample, only.predict(x, 300).sample, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        denoiser.log_prob(x, 300, condition=1), only.log_prob(x, 300), rtol=1e-12, atol=0
    )
    mixed = denoiser.predict(x, 300, condition=torch.tensor([1, -1, 0, -1]))
    everything = denoiser.predict(x, 300)
    torch.testing.assert_close(mixed.sample[0], chosen.sample[0])
    torch.testing.assert_close(mixed.sample[1], everything.sample[1])


def test_class_probabilities_are_bayes_rule(generator):
    denoiser = mixture(LINEAR, labels=torch.tensor([0, 1, 2]))
    x = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    logs = torch.stack([denoiser.class_log_prob(x, 300, label) for label in range(3)], 1)
    expected = torch.stack(
        [
            denoiser.log_prob(x, 300, condition=label)
            + math.log([0.2, 0.5, 0.3][label])
            - denoiser.log_prob(x, 300)
            for label in range(3)
        ],
        1,
    )
    torch.testing.assert_close(logs, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(4, dtype=torch.float64))
    per_example = denoiser.class_log_prob(x, 300, torch.tensor([2, 0, 1, 1]))
    assert torch.equal(per_example, logs[range(4), [2, 0, 1, 1]])


def test_bayes_for_scores_conditional_is_marginal_plus_classifier(generator):
    denoiser = mixture(LINEAR, labels=torch.tensor([0, 1, 2]))
    x = torch.randn(4, 2, dtype=torch.float64, generator=generator).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.class_log_prob(x, 300, 2).sum(), x)
    shifted = denoiser.predict(x, 300).epsilon - LINEAR.noise_scale(300) * gradient
    torch.testing.assert_close(
        denoiser.predict(x, 300, condition=2).epsilon, shifted, rtol=1e-12, atol=1e-13
    )


def test_mixture_samples_have_its_moments(generator):
    denoiser = mixture(LINEAR, labels=torch.tensor([0, 1, 1]))
    draws = denoiser.sample(100_000, generator=generator)
    mean = double([0.2, 0.5, 0.3]) @ denoiser.means
    error = 5 * draws.std(0) / math.sqrt(100_000)
    assert bool(((draws.mean(0) - mean).abs() < error).all())
    first = denoiser.sample(50_000, condition=0, generator=generator)
    covariance = double([[0.05, 0.02], [0.02, 0.04]])
    # The standard error of a covariance of normals is below 0.05 sqrt(2/n).
    assert bool(((first.T.cov() - covariance).abs() < 5 * 0.05 * math.sqrt(2 / 50_000)).all())
    assert denoiser.sample(0).shape == (0, 2)


def test_per_example_conditions_reach_samples(generator):
    denoiser = mixture(LINEAR, labels=torch.tensor([0, 1, 2]))
    labels = torch.arange(3).repeat(500)
    draws = denoiser.sample(1500, condition=labels, generator=generator)
    for label in range(3):
        # 5 standard errors of a mean whose entries have variance at most 0.1.
        distance = draws[labels == label].mean(0) - denoiser.means[label]
        assert bool((distance.abs() < 5 * math.sqrt(0.1 / 500)).all())


def test_single_numbers_can_be_events(generator):
    denoiser = GaussianMixtureDenoiser(double([0.7]), double([0.3]), schedule=LINEAR)
    x = torch.randn(5, dtype=torch.float64, generator=generator)
    expected = gaussian(0.7, 0.3, LINEAR).predict(x.unsqueeze(1), 100).sample.squeeze(1)
    torch.testing.assert_close(denoiser.predict(x, 100).sample, expected)
    normal = Normal(double(0.7), double(0.3).sqrt())
    torch.testing.assert_close(denoiser.log_prob(x), normal.log_prob(x), rtol=1e-12, atol=0)


def test_data_density_is_that_at_time_zero(generator):
    denoiser = GaussianMixtureDenoiser(
        torch.zeros(1, 3, dtype=torch.float64), double([[1.0, 4.0, 9.0]]), schedule=HeatSchedule()
    )
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    expected = Independent(Normal(torch.zeros(3), double([1.0, 2.0, 3.0])), 1).log_prob(x)
    torch.testing.assert_close(denoiser.log_prob(x), expected, rtol=1e-12, atol=0)


def test_float32_states_keep_their_dtype_and_nearly_all_digits(generator):
    denoiser = mixture(LINEAR)
    x = torch.randn(20, 2, dtype=torch.float64, generator=generator).float()
    single, exact = denoiser.predict(x, 300), denoiser.predict(x.double(), 300)
    assert single.sample.dtype == torch.float32
    torch.testing.assert_close(single.sample.double(), exact.sample, rtol=1e-7, atol=1e-7)


class Recorder(torch.nn.Module):
    """A network that halves its input and remembers what it was given."""

    def forward(self, *given):
        self.given = given
        return given[0] / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_network_is_given_time_per_example_in_a_safe_dtype(dtype):
    network = Recorder()
    denoiser = NetworkDenoiser(network, LINEAR, time_scale=0.5, time_offset=-1.0)
    denoiser.predict(torch.zeros(3, 2, dtype=dtype), 7)
    x, time = network.given
    expected = torch.float32 if dtype.itemsize == 2 else dtype
    assert x.dtype == dtype
    assert torch.equal(time, torch.full((3,), 2.5, dtype=expected))
    denoiser.predict(torch.zeros(3, 2, dtype=dtype), torch.tensor([2.0, 4.0, 6.0]))
    assert torch.equal(network.given[1], torch.tensor([0.0, 1.0, 2.0], dtype=expected))


def test_condition_is_passed_on_untouched():
    network = Recorder()
    denoiser = NetworkDenoiser(network, LINEAR)
    label = torch.tensor([1, 2])
    denoiser.predict(torch.zeros(2, 2), 7, condition=label)
    assert network.given[2] is label


def test_output_of_diffusers_models_is_unwrapped():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    x = torch.randn(3, 2)
    plain = NetworkDenoiser(lambda x, time: x / 2, LINEAR).predict(x, 9)
    wrapped = NetworkDenoiser(lambda x, time: Output(x / 2), LINEAR).predict(x, 9)
    assert torch.equal(plain.epsilon, wrapped.epsilon)


def test_clipping_the_sample_recomputes_the_noise():
    x = torch.full((1, 2), 3.0, dtype=torch.float64)
    denoiser = NetworkDenoiser(
        lambda x, time: x, LINEAR, prediction_type="sample", clip_sample=(-1.0, 1.0)
    )
    prediction = denoiser.predict(x, 500)
    assert torch.equal(prediction.sample, torch.ones(1, 2, dtype=torch.float64))
    total = (
        prediction.signal_scale * prediction.sample + prediction.noise_scale * prediction.epsilon
    )
    torch.testing.assert_close(total, x, rtol=1e-15, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_network_denoiser_matches_the_exact_one_in_every_parametrisation(
    prediction_type, generator
):
    exact = mixture(LINEAR)

    def network(x, time):
        prediction = exact.predict(x, time)
        outputs = {
            name: getattr(prediction, name)
            for name in ("epsilon", "sample", "v_prediction", "score")
        }
        return outputs[prediction_type]

    denoiser = NetworkDenoiser(network, LINEAR, prediction_type=prediction_type)
    x = torch.randn(10, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        denoiser.predict(x, 250).sample, exact.predict(x, 250).sample, rtol=1e-11, atol=1e-12
    )


def test_predict_is_differentiable_in_x_and_the_network():
    network = torch.nn.Linear(2, 2).double()
    denoiser = NetworkDenoiser(lambda x, time: network(x), LINEAR, prediction_type="v_prediction")
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: denoiser.predict(x, 200).sample, (x,))
    denoiser.predict(x, 200).epsilon.sum().backward()
    assert network.weight.grad is not None


def test_compiled_network_is_compiled_once_for_all_times():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network = torch.compile(TimeAware(), backend=count, fullgraph=True)
    denoiser = NetworkDenoiser(network, LINEAR)
    x = torch.randn(4, 2)
    for time in (1000, 500.0, torch.tensor(3.5), torch.tensor([1.0, 2.0, 3.0, 4.0])):
        denoiser.predict(x, time)
    denoiser.predict(x, 17)
    assert len(graphs) == 1


class TimeAware(torch.nn.Module):
    def forward(self, x, time):
        return x * torch.cos(time).unsqueeze(-1)


def test_state_dict_and_pickle_round_trip():
    denoiser = NetworkDenoiser(torch.nn.Bilinear(2, 1, 2), LINEAR)
    denoiser.network = torch.nn.Linear(2, 2)
    assert set(denoiser.state_dict()) == {"network.weight", "network.bias"}
    exact = mixture(LINEAR)
    again = pickle.loads(pickle.dumps(exact))
    x = torch.randn(3, 2)
    assert torch.equal(again.predict(x, 10).sample, exact.predict(x, 10).sample)


def test_both_are_denoisers_and_a_schedule_is_not():
    assert isinstance(mixture(LINEAR), Denoiser)
    assert isinstance(NetworkDenoiser(torch.nn.Identity(), LINEAR), Denoiser)
    assert not isinstance(LINEAR, Denoiser)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mixture(LINEAR).predict(torch.zeros(2, 2), 0), "positive"),
        (lambda: mixture(LINEAR).predict(torch.zeros(2, 2), torch.tensor([5.0, 0.0])), "positive"),
        (lambda: NetworkDenoiser(Recorder(), LINEAR).predict(torch.zeros(2, 2), -1), "positive"),
        (
            lambda: NetworkDenoiser(Recorder(), LINEAR).predict(torch.zeros(2, 2), 1001),
            "time.*1001",
        ),
        (
            lambda: NetworkDenoiser(Recorder(), LINEAR).predict(torch.zeros(2, 2), torch.ones(3)),
            r"time.*\(3,\)",
        ),
        (
            lambda: NetworkDenoiser(lambda x, t: x[:, :1], LINEAR).predict(torch.zeros(2, 2), 5),
            r"shape.*\(2, 2\).*\(2, 1\)",
        ),
        (
            lambda: NetworkDenoiser(lambda x, t: "x", LINEAR).predict(torch.zeros(2, 2), 5),
            "shape.*str",
        ),
        (lambda: NetworkDenoiser(Recorder(), LINEAR).predict(torch.zeros(2, 2).int(), 5), "int32"),
        (
            lambda: NetworkDenoiser(Recorder(), LINEAR, prediction_type="noise"),
            "prediction_type.*epsilon, sample",
        ),
        (lambda: NetworkDenoiser(Recorder(), LINEAR, clip_sample=(1.0, -1.0)), "clip_sample"),
        (
            lambda: Prediction.from_output(
                torch.zeros(2, 3), torch.zeros(2, 2), 5, LINEAR, "epsilon"
            ),
            "shape",
        ),
        (
            lambda: Prediction.from_output(torch.zeros(2, 2), torch.zeros(2, 2), 5, LINEAR, "x0"),
            "prediction_type.*'x0'",
        ),
        (
            lambda: Prediction.from_output(
                torch.zeros(2, 2), torch.zeros(2, 2), 0, LINEAR, "epsilon"
            ),
            "positive",
        ),
        (lambda: mixture(LINEAR).predict(torch.zeros(2, 3), 5), r"event shape \(2,\)"),
        (lambda: mixture(LINEAR).predict(torch.zeros(2, 2), 5, condition=0), "labels"),
        (
            lambda: mixture(LINEAR, labels=torch.arange(3)).predict(
                torch.zeros(2, 2), 5, condition=7
            ),
            "condition.*7",
        ),
        (
            lambda: mixture(LINEAR, labels=torch.arange(3)).predict(
                torch.zeros(2, 2), 5, condition=torch.zeros(3, dtype=torch.long)
            ),
            r"condition.*\(3,\)",
        ),
        (lambda: mixture(LINEAR, labels=torch.arange(2)), "labels"),
        (
            lambda: GaussianMixtureDenoiser(torch.zeros(2, 2), torch.ones(3), schedule=LINEAR),
            r"covariances.*\(3,\)",
        ),
        (
            lambda: GaussianMixtureDenoiser(torch.zeros(2, 2), -torch.ones(2), schedule=LINEAR),
            "semi-definite",
        ),
        (
            lambda: GaussianMixtureDenoiser(
                torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), schedule=LINEAR
            ),
            "symmetric",
        ),
        (
            lambda: GaussianMixtureDenoiser(
                torch.zeros(2, 2), torch.ones(2), torch.tensor([1.0, -1.0]), schedule=LINEAR
            ),
            "weights",
        ),
        (
            lambda: GaussianMixtureDenoiser(
                torch.zeros(2, 2), torch.zeros(2), schedule=LINEAR
            ).log_prob(torch.zeros(1, 2)),
            "positive.*singular",
        ),
        (lambda: mixture(LINEAR).sample(-1), "num_samples"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
