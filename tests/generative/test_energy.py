"""kexue.generative.energy: chains against exact laws, buffers, training, partition functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor, nn

from kexue.generative.energy import (
    DiagonalNormal,
    EnergyModelTrainer,
    ReplayBuffer,
    UniformBox,
    ais_log_partition,
    apply_spectral_norm,
    contrastive_divergence_loss,
    energy_and_grad,
    energy_score,
    langevin_sample,
    typicality_score,
)
from kexue.generative.energy.chain import Point, metropolis_choice
from kexue.models import MLP


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_normal(x: Tensor) -> Tensor:
    return x.square().sum(1) / 2


def quartic(x: Tensor) -> Tensor:
    return x[:, 0] ** 4 / 4


def double_well(x: Tensor) -> Tensor:
    return (x[:, 0] ** 2 - 1) ** 2


def draws(count: int, dim: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=generator(seed))


def small_energy(seed: int = 0, features: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(MLP(features, [8, 8], 1), nn.Flatten(0))


# Chains: laws that are known exactly.


@pytest.mark.parametrize(
    ("step_size", "variance"), [(0.1, 1.02564103), (0.5, 1.14285714), (1.0, 1.33333333)]
)
def test_variance_of_the_plain_chain_on_a_unit_normal(step_size: float, variance: float) -> None:
    assert variance == pytest.approx(1 / (1 - step_size / 4), abs=1e-8)
    count = 40_000
    # From the stationary law itself: it must stay, whatever the number of steps.
    start = draws(count) * math.sqrt(variance)
    end = langevin_sample(
        unit_normal, start, step_size=step_size, num_steps=6, generator=generator()
    ).samples
    # Four standard errors of a variance.
    assert abs(end.var().item() - variance) < 4 * variance * math.sqrt(2 / count)
    # And it is approached from elsewhere: the factor per step is 1 - ε/2.
    steps = 80
    far = langevin_sample(
        unit_normal, torch.zeros(count, 1, dtype=torch.float64), step_size=step_size,
        num_steps=steps, generator=generator(),
    ).samples  # fmt: skip
    expected = variance * (1 - (1 - step_size / 2) ** (2 * steps))
    assert abs(far.var().item() - expected) < 4 * variance * math.sqrt(2 / count)


def test_covariance_of_the_plain_chain_for_a_quadratic_energy() -> None:
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    step_size, temperature, count = 0.5, 0.7, 60_000

    def energy(x: Tensor) -> Tensor:
        return ((x @ precision) * x).sum(1) / 2

    eye = torch.eye(2, dtype=torch.float64)
    expected = temperature * torch.linalg.inv(precision @ (eye - step_size * precision / 4))
    start = draws(count, 2) @ torch.linalg.cholesky(expected).T
    end = langevin_sample(
        energy, start, step_size=step_size, num_steps=5, temperature=temperature,
        generator=generator(),
    ).samples  # fmt: skip
    spread = expected.diagonal().sqrt()
    error = 4 * torch.outer(spread, spread) * math.sqrt(2 / count)
    assert bool(((end.T.cov() - expected).abs() < error).all())


def test_noise_of_ones_own_has_its_own_temperature() -> None:
    deviation, step_size, count = 0.3, 0.4, 40_000
    factor = step_size / 2
    variance = deviation**2 / (1 - (1 - factor) ** 2)
    end = langevin_sample(
        unit_normal, draws(count) * math.sqrt(variance), step_size=step_size, num_steps=5,
        noise_std=deviation, generator=generator(),
    ).samples  # fmt: skip
    assert abs(end.var().item() - variance) < 4 * variance * math.sqrt(2 / count)


def test_at_temperature_zero_it_is_gradient_descent() -> None:
    start = draws(3, 2)
    chains = langevin_sample(
        unit_normal, start, step_size=0.2, num_steps=7, temperature=0.0, return_trajectory=True
    )
    assert chains.trajectory is not None
    powers = 0.9 ** torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(chains.trajectory, powers[:, None, None] * start, rtol=1e-14, atol=0)


def test_log_acceptance_on_a_unit_normal() -> None:
    x, y = draws(50), draws(50, seed=2)
    step_size = 0.7
    here, there = (Point(z, *energy_and_grad(unit_normal, z)) for z in (x, y))
    # Accepted exactly where log u < (ε/8)(x² - y²).
    accepted = torch.zeros(50)
    for seed in range(200):
        uniform = torch.rand(50, dtype=torch.float64, generator=generator(seed))
        _, moves = metropolis_choice(here, there, step_size, generator=generator(seed))
        expected = uniform.log() < step_size / 8 * (x[:, 0] ** 2 - y[:, 0] ** 2)
        assert torch.equal(moves, expected)
        accepted += moves
    assert 0 < accepted.min() < 200


@pytest.mark.parametrize(
    ("step_size", "acceptance"),
    [(0.25, 0.990054), (0.5, 0.971884), (1.0, 0.920833), (1.5, 0.856298)],
)
def test_acceptance_rate_on_a_unit_normal(step_size: float, acceptance: float) -> None:
    count, steps = 20_000, 10
    chains = langevin_sample(
        unit_normal, draws(count), step_size=step_size, num_steps=steps, metropolis=True,
        generator=generator(),
    )  # fmt: skip
    # Proposals of one chain are correlated: an error as of one proposal a chain is an upper bound.
    error = 4 * math.sqrt(acceptance * (1 - acceptance) / count)
    assert abs(chains.acceptance_rate.mean().item() - acceptance) < error
    assert abs(chains.samples.var().item() - 1) < 4 * math.sqrt(2 / count)


def test_metropolis_is_exact_where_the_plain_chain_explodes() -> None:
    expected = 2 * special.gamma(0.75) / special.gamma(0.25)
    assert expected == pytest.approx(0.675978240067285, abs=1e-14)
    count = 20_000
    start = torch.full((count, 1), 4.0, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="reduce step_size"):
        langevin_sample(quartic, start, step_size=0.5, num_steps=50, generator=generator())
    stays = langevin_sample(
        quartic, start, step_size=0.5, num_steps=50, metropolis=True, generator=generator()
    )
    # It does not explode there, but it does not move either: every proposal overshoots.
    assert stays.samples.abs().max() <= 4.0
    for temperature in (1.0, 0.25):
        end = langevin_sample(
            quartic, torch.zeros(count, 1, dtype=torch.float64),
            step_size=0.5 * math.sqrt(temperature), num_steps=150, metropolis=True,
            temperature=temperature, generator=generator(),
        ).samples  # fmt: skip
        second = end.square()
        error = 4 * second.std().item() / math.sqrt(count)
        assert abs(second.mean().item() - expected * math.sqrt(temperature)) < error


def test_the_double_well_is_sampled() -> None:
    start = draws(20_000).clamp(-2, 2)  # from farther away every proposal overshoots
    end = langevin_sample(
        double_well, start, step_size=0.1, num_steps=300, metropolis=True,
        generator=generator(),
    ).samples.square()  # fmt: skip
    assert abs(end.mean().item() - 0.83274548712838) < 4 * end.std().item() / math.sqrt(20_000)


def test_the_energy_is_called_once_a_step_and_once_more() -> None:
    calls = []

    def counting(x: Tensor) -> Tensor:
        calls.append(len(x))
        return unit_normal(x)

    for metropolis in (False, True):
        calls.clear()
        langevin_sample(counting, draws(3), step_size=0.1, num_steps=9, metropolis=metropolis)
        assert calls == [3] * 10


def test_options_of_the_plain_chain() -> None:
    start = draws(100, 2)
    held = langevin_sample(
        unit_normal, start.clamp(-0.5, 0.5), step_size=1.0, num_steps=5, clamp=(-0.5, 0.5),
        generator=generator(), return_trajectory=True,
    )  # fmt: skip
    assert held.trajectory is not None
    assert held.trajectory.abs().max() <= 0.5
    # A bounded gradient moves each state by at most ε/2 times the bound.
    slow = langevin_sample(
        lambda x: 100 * unit_normal(x), start, step_size=0.2, num_steps=1, temperature=0.0,
        max_grad_norm=3.0,
    )  # fmt: skip
    torch.testing.assert_close(
        (slow.samples - start).norm(dim=1), torch.full((100,), 0.3, dtype=torch.float64)
    )
    none = langevin_sample(unit_normal, start, step_size=0.1, num_steps=0)
    assert torch.equal(none.samples, start)
    assert torch.equal(none.energies, unit_normal(start))


def test_states_of_any_shape_and_half_precision() -> None:
    def energy(x: Tensor) -> Tensor:
        return x.flatten(1).square().sum(1) / 2

    images = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    chains = langevin_sample(
        energy, images, step_size=0.1, num_steps=3, metropolis=True, generator=generator()
    )
    assert chains.samples.dtype == torch.bfloat16
    assert chains.energies.dtype == torch.float32
    # The state in between is float32: a thousand steps of 2⁻¹⁰ are not rounded away near 1.
    drift = langevin_sample(
        lambda x: -x.sum(1), torch.ones(1, 1, dtype=torch.bfloat16), step_size=2.0**-9,
        num_steps=1000, temperature=0.0,
    )  # fmt: skip
    assert drift.samples.item() == pytest.approx(1 + 1000 / 1024, abs=0.01)
    scalars = langevin_sample(lambda x: x.square() / 2, torch.zeros(5), step_size=0.1, num_steps=2)
    assert scalars.samples.shape == (5,)
    empty = langevin_sample(unit_normal, torch.zeros(0, 2), step_size=0.1, num_steps=2)
    assert empty.samples.shape == (0, 2)


def test_nothing_of_the_caller_changes() -> None:
    energy = small_energy().train()
    x = torch.randn(4, 2, requires_grad=True)
    before = x.detach().clone()
    with torch.no_grad():
        value, gradient = energy_and_grad(energy, x)
    langevin_sample(energy, x, step_size=0.1, num_steps=3, metropolis=True)
    assert energy.training
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())
    assert torch.equal(x.detach(), before)
    assert not value.requires_grad
    assert not gradient.requires_grad
    exact = torch.autograd.grad(energy(x).sum(), x)[0]
    torch.testing.assert_close(gradient, exact)


def test_an_energy_without_x_has_no_gradient() -> None:
    value, gradient = energy_and_grad(lambda x: torch.ones(len(x)), torch.zeros(3, 2))
    assert torch.equal(value, torch.ones(3))
    assert not gradient.any()


def test_same_seed_same_chain_and_the_order_of_draws() -> None:
    start = draws(4, 2)

    def end(metropolis: bool) -> Tensor:
        return langevin_sample(
            unit_normal, start, step_size=0.5, num_steps=1, metropolis=metropolis,
            generator=generator(3),
        ).samples  # fmt: skip

    assert torch.equal(end(True), end(True))
    source = generator(3)
    normal = torch.randn(4, 2, dtype=torch.float64, generator=source)
    proposal = start - 0.25 * start + math.sqrt(0.5) * normal
    torch.testing.assert_close(end(False), proposal)
    uniform = torch.rand(4, dtype=torch.float64, generator=source)
    moves = uniform.log() < 0.5 / 8 * (start.square().sum(1) - proposal.square().sum(1))
    torch.testing.assert_close(end(True), torch.where(moves[:, None], proposal, start))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"num_steps": -1}, "num_steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"clamp": (1.0, 1.0)}, "clamp"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"metropolis": True, "clamp": (0.0, 1.0)}, "plain kernel"),
        ({"metropolis": True, "max_grad_norm": 1.0}, "plain kernel"),
        ({"metropolis": True, "noise_std": 0.1}, "plain kernel"),
        ({"metropolis": True, "temperature": 0.0}, "plain kernel"),
        ({"x": torch.tensor([[math.nan]])}, "finite"),
        ({"x": torch.zeros(2, 1, dtype=torch.int64)}, "real tensor"),
        ({"energy": lambda x: x}, r"shape \(2,\) for x of shape \(2, 1\), got \(2, 1\)"),
        ({"energy": lambda x: x.sum()}, r"got \(\)"),
    ],
)
def test_what_is_no_chain_is_refused(options: dict, message: str) -> None:
    given = {
        "energy": unit_normal, "x": torch.zeros(2, 1), "step_size": 0.1, "num_steps": 2, **options,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        langevin_sample(given.pop("energy"), given.pop("x"), **given)


# The buffer.


def test_the_buffer_is_first_in_first_out() -> None:
    buffer = ReplayBuffer(5, (1,), reinit_probability=0.0)
    for start in (0, 3, 6):
        buffer.add(torch.arange(start, start + 3.0)[:, None])
    assert len(buffer) == 5
    assert set(buffer.draw(500)[:, 0].tolist()) == {4.0, 5.0, 6.0, 7.0, 8.0}
    # More than it holds, and no multiple of it: the oldest of what is left goes next.
    buffer.add(torch.arange(100.0, 118.0)[:, None])
    assert set(buffer.draw(500)[:, 0].tolist()) == {113.0, 114.0, 115.0, 116.0, 117.0}
    buffer.add(torch.tensor([[200.0]]))
    assert set(buffer.draw(500)[:, 0].tolist()) == {114.0, 115.0, 116.0, 117.0, 200.0}


def test_fresh_starts_come_with_their_probability() -> None:
    buffer = ReplayBuffer(10, (2,), reinit_probability=0.3, generator=generator())
    assert len(buffer) == 0
    assert bool(((buffer.draw(50) >= 0) & (buffer.draw(50) < 1)).all())
    buffer.add(torch.full((10, 2), -1.0))
    share = (buffer.draw(20_000)[:, 0] >= 0).double().mean().item()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    own = ReplayBuffer(
        3, (2,), reinit_probability=1.0, init_sampler=lambda n, g: torch.full((n, 2), 7.0)
    )
    own.add(torch.zeros(3, 2))
    assert bool((own.draw(5) == 7).all())


def test_draws_and_stores_are_copies() -> None:
    buffer = ReplayBuffer(2, (1,), reinit_probability=0.0)
    given = torch.ones(2, 1, requires_grad=True)
    buffer.add(given)
    buffer.draw(2).fill_(5.0)
    with torch.no_grad():
        given.fill_(9.0)
    drawn = buffer.draw(2)
    assert bool((drawn == 1).all())
    assert not drawn.requires_grad


def test_a_buffer_goes_on_from_its_state() -> None:
    buffer = ReplayBuffer(4, (1,), generator=generator())
    buffer.add(torch.arange(6.0)[:, None])
    state = buffer.state_dict()
    other = ReplayBuffer(4, (1,), generator=generator(9))
    other.load_state_dict(state)
    assert torch.equal(other.draw(20), buffer.draw(20))
    for each in (buffer, other):
        each.add(torch.tensor([[10.0]]))
    assert torch.equal(other.draw(20), buffer.draw(20))
    with pytest.raises(ValueError, match="fit a buffer"):
        ReplayBuffer(3, (1,)).load_state_dict(state)


@pytest.mark.bad_input
def test_what_is_no_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(0, (1,))
    with pytest.raises(ValueError, match="reinit_probability"):
        ReplayBuffer(1, (1,), reinit_probability=1.5)
    buffer = ReplayBuffer(3, (2,))
    with pytest.raises(ValueError, match=r"shape \(n, 2\), got \(4, 3\)"):
        buffer.add(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="some states"):
        buffer.stored(1)
    with pytest.raises(ValueError, match="init_sampler"):
        ReplayBuffer(3, (2,), init_sampler=lambda n, g: torch.zeros(n, 3)).draw(2)


# Training.


def test_gradient_of_an_exponential_family_is_the_difference_of_its_statistics() -> None:
    theta = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)

    def statistics(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 0] ** 2, x[:, 0] ** 3], 1)

    positive, negative = draws(20), draws(30, seed=5)
    output = contrastive_divergence_loss(
        lambda x: statistics(x) @ theta, positive, negative, energy_penalty=0.0
    )
    (gradient,) = torch.autograd.grad(output.loss, theta)
    expected = statistics(positive).mean(0) - statistics(negative).mean(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("penalty", "sign"), [("sum", 1.0), ("difference", -1.0)])
def test_parts_of_the_loss(penalty: str, sign: float) -> None:
    positive, negative = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0]]).requires_grad_()
    output = contrastive_divergence_loss(
        lambda x: 2 * x[:, 0], positive, negative, energy_penalty=0.5, penalty=penalty
    )
    assert output.contrast.item() == 0.0
    assert output.regularization.item() == pytest.approx(0.5 * (20 + sign * 16))
    assert output.loss.item() == pytest.approx(output.regularization.item())
    assert output.positive_energy.tolist() == [2.0, 6.0]
    assert not output.loss.requires_grad  # negatives are detached, and nothing else asks


def test_the_trainer_fits_a_normal_distribution() -> None:
    """U = (x - m)²/(2 e^s): maximum likelihood is the sample mean and variance."""

    class Normal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(()))
            self.log_variance = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, 0] - self.mean) ** 2 / (2 * self.log_variance.exp())

    data = 1.5 + 0.6 * torch.randn(2000, 1, generator=generator())
    energy = Normal()
    optimizer = torch.optim.Adam(energy.parameters(), 0.02)
    trainer = EnergyModelTrainer(
        energy, optimizer, ReplayBuffer(2000, (1,), generator=generator()), step_size=0.05,
        num_steps=20, energy_penalty=0.0, generator=generator(1),
    )  # fmt: skip
    values = []
    for step in range(400):
        output = trainer.step(data[torch.randint(2000, (500,), generator=generator(step))])
        if step >= 200:
            values.append([energy.mean.item(), energy.log_variance.exp().item()])
    mean, variance = np.mean(values, axis=0)
    # The chain of step ε has the variance v/(1 - ε/(4v)): so much smaller is the v that fits.
    assert abs(mean - data.mean().item()) < 0.05
    assert abs(variance / (1 - 0.05 / (4 * variance)) - data.var().item()) < 0.05
    assert output.negative_energy.shape == (500,)


def test_the_buffer_gets_the_ends_of_chains_and_generation_leaves_it_alone() -> None:
    buffer = ReplayBuffer(64, (2,), generator=generator())
    energy = small_energy()
    trainer = EnergyModelTrainer(
        energy, torch.optim.SGD(energy.parameters(), 0.0), buffer, num_steps=4, step_size=0.1,
        generator=generator(1),
    )  # fmt: skip
    output = trainer.step(torch.zeros(16, 2))
    assert len(buffer) == 16
    stored = buffer.state_dict()["states"]
    torch.testing.assert_close(energy(stored).detach(), output.negative_energy)
    trainer.generate(8, num_steps=3)
    trainer.generate(8, num_steps=3, from_buffer=False)
    assert torch.equal(buffer.state_dict()["states"], stored)
    fresh = trainer.generate(200, num_steps=0, from_buffer=False)
    assert bool(((fresh >= 0) & (fresh < 1)).all())


def test_a_diverging_chain_changes_nothing() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x[:, 0] ** 4

    energy = Steep()
    trainer = EnergyModelTrainer(
        energy, torch.optim.SGD(energy.parameters(), 0.1),
        ReplayBuffer(8, (1,), init_sampler=lambda n, g: torch.full((n, 1), 10.0)),
        step_size=1.0, num_steps=20,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="diverged"):
        trainer.step(torch.zeros(4, 1))
    assert len(trainer.buffer) == 0
    assert energy.weight.item() == 1.0


@pytest.mark.bad_input
def test_what_is_no_training_is_refused() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="penalty must be one of"):
        contrastive_divergence_loss(unit_normal, x, x, penalty="product")
    with pytest.raises(ValueError, match="energy_penalty"):
        contrastive_divergence_loss(unit_normal, x, x, energy_penalty=-1.0)
    with pytest.raises(ValueError, match="negative must hold"):
        contrastive_divergence_loss(unit_normal, x, x[:0])
    energy = small_energy()
    optimizer = torch.optim.SGD(energy.parameters(), 0.1)
    for options, message in (
        ({"penalty": "product"}, "penalty must be one of"),
        ({"energy_penalty": -1.0}, "energy_penalty"),
        ({"step_size": 0.0}, "step_size"),
    ):
        with pytest.raises(ValueError, match=message):
            EnergyModelTrainer(energy, optimizer, ReplayBuffer(2, (2,)), **options)


def test_spectral_norm_bounds_every_layer_once() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 1)
        )
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(5)
    assert apply_spectral_norm(network) is network
    names = sorted(network.state_dict())
    assert apply_spectral_norm(network) is network
    assert sorted(network.state_dict()) == names
    network.train()
    # Power iteration errs by (σ₂/σ₁)^2k: two close singular values need many steps k.
    for _ in range(1000):
        network(torch.zeros(1, 1, 4, 4))
    for layer in (network[0], network[3], network[4]):
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1.0, abs=1e-3)


# Partition functions.


def test_log_partition_of_a_normal_from_itself_is_exact() -> None:
    base = DiagonalNormal(torch.zeros(3, dtype=torch.float64), 1.0)
    estimate = ais_log_partition(
        unit_normal, base, num_chains=5, num_temperatures=3, generator=generator()
    )
    assert estimate.log_z.item() == pytest.approx(1.5 * math.log(2 * math.pi), abs=1e-12)
    assert estimate.standard_error.item() < 1e-12
    assert estimate.effective_sample_size.item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("energy", "log_z"), [(quartic, 0.941448934418105), (double_well, 0.679926242893787)]
)
def test_log_partition_in_one_dimension(energy, log_z: float) -> None:
    by_quadrature = integrate.quad(
        lambda t: math.exp(-energy(torch.tensor([[t]], dtype=torch.float64)).item()), -8, 8
    )[0]
    assert math.log(by_quadrature) == pytest.approx(log_z, abs=1e-9)
    base = DiagonalNormal(torch.zeros(1, dtype=torch.float64), 2.0)
    estimate = ais_log_partition(
        energy, base, num_chains=4000, num_temperatures=60, step_size=0.2, generator=generator()
    )
    assert abs(estimate.log_z.item() - log_z) < 4 * estimate.standard_error.item()
    assert estimate.standard_error.item() < 0.02
    # The weighted ends of the chains are samples of the model.
    weights = estimate.log_weights.softmax(0)
    second = estimate.samples.square()[:, 0]
    moment = {quartic: 0.675978240067285, double_well: 0.83274548712838}[energy]
    error = second.std().item() / math.sqrt(estimate.effective_sample_size.item())
    assert abs((weights @ second).item() - moment) < 4 * error


MEANS = 2.5 * torch.eye(3, 10, dtype=torch.float64)


def mixture(x: Tensor) -> Tensor:
    return -torch.logsumexp(-torch.cdist(x, MEANS).square() / 2, 1)


def test_forward_is_below_and_reverse_above_on_a_mixture() -> None:
    log_z = math.log(3) + 5 * math.log(2 * math.pi)
    assert log_z == pytest.approx(10.2879976206, abs=1e-9)
    base = DiagonalNormal(torch.zeros(10, dtype=torch.float64), 2.0)
    options = {"num_chains": 500, "num_temperatures": 200, "step_size": 0.3}
    forward = ais_log_partition(mixture, base, generator=generator(), **options)
    assert abs(forward.log_z.item() - log_z) < 4 * forward.standard_error.item()
    # Exact samples: a component, and a unit normal around it.
    rows = torch.randint(3, (500,), generator=generator(1))
    exact = MEANS[rows] + draws(500, 10)
    reverse = ais_log_partition(
        mixture, base, direction="reverse", samples=exact, generator=generator(2), **options
    )
    assert abs(reverse.log_z.item() - log_z) < 4 * reverse.standard_error.item()
    # With few chains and temperatures the two come apart, on the right sides: the mean logarithm of
    # 400 small estimates.
    few = {"num_chains": 2000, "num_temperatures": 8, "step_size": 0.3}
    rows = torch.randint(3, (2000,), generator=generator(3))
    low = ais_log_partition(mixture, base, generator=generator(), **few).log_weights
    high = ais_log_partition(
        mixture, base, direction="reverse", samples=MEANS[rows] + draws(2000, 10, seed=4),
        generator=generator(), **few,
    ).log_weights  # fmt: skip
    for weights, sign in ((low, 1), (high, -1)):
        estimates = sign * (weights.reshape(400, 5).logsumexp(1) - math.log(5))
        error = 4 * estimates.std().item() / 20
        assert sign * (log_z - estimates.mean().item()) > error


def test_without_moves_and_with_one_temperature_it_is_importance_sampling() -> None:
    base = DiagonalNormal(torch.zeros(1, dtype=torch.float64), 1.5)
    estimate = ais_log_partition(
        quartic, base, num_chains=1000, num_temperatures=1, num_mcmc_steps=0, generator=generator()
    )
    x = base.sample((1000,), generator())
    weights = -quartic(x) - base.log_prob(x)
    torch.testing.assert_close(estimate.log_weights, weights)
    scaled = weights.exp()
    assert estimate.log_z.item() == pytest.approx(scaled.mean().log().item(), abs=1e-12)
    assert estimate.standard_error.item() == pytest.approx(
        (scaled.std() / (math.sqrt(1000) * scaled.mean())).item(), rel=1e-12
    )
    assert torch.equal(estimate.samples, x)


def test_in_a_box_it_is_the_integral_over_the_box() -> None:
    box = UniformBox(torch.tensor([-1.0]).double(), torch.tensor([2.0]).double())
    expected = math.log(integrate.quad(lambda t: math.exp(-(t**4) / 4), -1, 2, epsabs=1e-12)[0])
    estimate = ais_log_partition(
        quartic, box, num_chains=3000, num_temperatures=20, step_size=0.2, generator=generator()
    )
    assert abs(estimate.log_z.item() - expected) < 4 * estimate.standard_error.item()
    assert bool(((estimate.samples >= -1) & (estimate.samples <= 2)).all())


def test_temperatures_of_ones_own() -> None:
    base = DiagonalNormal(torch.zeros(1, dtype=torch.float64), 2.0)
    even = ais_log_partition(
        quartic, base, num_chains=10, num_temperatures=4, generator=generator()
    )
    same = ais_log_partition(
        quartic, base, num_chains=10, num_temperatures=99, betas=[0, 0.25, 0.5, 0.75, 1],
        generator=generator(),
    )  # fmt: skip
    torch.testing.assert_close(even.log_weights, same.log_weights)


def test_base_densities_integrate_to_one_and_are_sampled() -> None:
    normal = DiagonalNormal(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double())
    reference = torch.distributions.Normal(normal.mean, normal.std)
    x = draws(7, 2)
    torch.testing.assert_close(normal.log_prob(x), reference.log_prob(x).sum(1))
    sampled = normal.sample((40_000,), generator())
    assert bool(((sampled.mean(0) - normal.mean).abs() < 4 * normal.std / 200).all())
    image = DiagonalNormal(torch.zeros(1, 2, 2), torch.tensor(2.0))
    assert image.log_prob(image.sample((3,), generator())).shape == (3,)
    box = UniformBox(torch.zeros(2), torch.tensor([2.0, 0.5]))
    assert box.log_prob(torch.tensor([[1.0, 0.1]])).item() == pytest.approx(0.0)
    inside = box.sample((1000,), generator())
    assert bool((box.log_prob(inside) == box.log_prob(inside[:1])).all())


@pytest.mark.bad_input
def test_what_is_no_estimate_is_refused() -> None:
    base = DiagonalNormal(torch.zeros(1), 1.0)
    given = {"num_chains": 3, "num_temperatures": 2}
    for options, message in (
        ({"num_chains": 0}, "num_chains"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"num_mcmc_steps": -1}, "num_mcmc_steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"direction": "sideways"}, "direction must be one of"),
        ({"direction": "reverse"}, "exact samples"),
        ({"direction": "reverse", "samples": torch.zeros(2, 1)}, "num_chains = 3"),
        ({"betas": [0.0, 0.5, 0.5, 1.0]}, "strictly"),
        ({"betas": [0.1, 1.0]}, "strictly"),
    ):
        with pytest.raises(ValueError, match=message):
            ais_log_partition(unit_normal, base, **{**given, **options})
    with pytest.raises(ValueError, match="std"):
        DiagonalNormal(torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="below high"):
        UniformBox(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="x must have shape"):
        base.log_prob(torch.zeros(3, 2))


# Scores.


def test_scores_order_what_does_not_belong() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    assert energy_score(unit_normal, x).tolist() == [0.0, 0.5, 12.5]
    reference = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7])
    scores = typicality_score(unit_normal, x, reference)
    # Median ½, MAD 0.2: the mode is as odd as 1, far away is odder.
    torch.testing.assert_close(scores, torch.tensor([2.5, 0.0, 60.0]))
    for wrong, message in (
        (torch.ones(4), "vary"),
        (torch.zeros(0), "some energies"),
        (torch.tensor([math.nan, 1.0]), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            typicality_score(unit_normal, x, wrong)


@pytest.mark.gpu
def test_chains_run_on_the_gpu_without_waiting_for_it() -> None:
    energy = small_energy().cuda()
    x = torch.zeros(8, 2, device="cuda")
    source = torch.Generator("cuda").manual_seed(0)
    chains = langevin_sample(
        energy, x, step_size=0.1, num_steps=10, metropolis=True, generator=source
    )
    assert chains.samples.is_cuda


# Corners: inference mode, half precision, what is not finite, what is shared.


def test_inference_mode_changes_no_gradient() -> None:
    x = torch.randn(3, 2, generator=generator())
    with torch.inference_mode():
        energies, gradient = energy_and_grad(unit_normal, x)
        inside = x + 0
        torch.testing.assert_close(gradient, x)
        chain = langevin_sample(
            unit_normal, inside, step_size=0.1, num_steps=20, generator=generator()
        )
    expected = langevin_sample(unit_normal, x, step_size=0.1, num_steps=20, generator=generator())
    assert torch.equal(chain.samples, expected.samples)
    assert torch.equal(energies, unit_normal(x))
    # An inference tensor outside of the mode is a state like any other.
    torch.testing.assert_close(energy_and_grad(unit_normal, inside)[1], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_annealing_keeps_half_precision_wide_between_calls(dtype: torch.dtype) -> None:
    """The base is the model here: each weight is Z, but for the rounding of U alone."""
    dim, chains = 64, 200
    base = DiagonalNormal(torch.zeros(dim, dtype=dtype), 1.0)
    estimate = ais_log_partition(
        lambda x: x.float().square().sum(1) / 2, base, num_chains=chains, num_temperatures=10,
        generator=generator(),
    )  # fmt: skip
    assert estimate.samples.dtype == dtype
    # At each temperature U is seen at x rounded: an error of eps |x|² / √d at most in one weight.
    error = torch.finfo(dtype).eps * math.sqrt(dim) / math.sqrt(chains)
    assert estimate.log_z.item() == pytest.approx(dim / 2 * math.log(2 * math.pi), abs=4 * error)


def test_half_precision_energies_are_averaged_in_single() -> None:
    x = torch.full((4, 1), 300.0).half()
    output = contrastive_divergence_loss(lambda x: x[:, 0], x, -x)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == 600 + 2 * 90_000


@pytest.mark.parametrize(
    ("reference", "x", "expected"),
    [([1.0, 2.0, 3.0, 4.0], 2.5, 0.0), ([1.0, 2.0, 3.0, 4.0], 3.0, 0.5), ([0.0, 10.0], 5.0, 0.0)],
)
def test_typicality_takes_the_middle_of_an_even_number(
    reference: list[float], x: float, expected: float
) -> None:
    score = typicality_score(lambda x: x[:, 0], torch.tensor([[x]]), torch.tensor(reference))
    assert score.item() == expected


def test_a_buffer_gives_copies_of_fresh_starts() -> None:
    source = torch.full((4, 2), 0.5)
    buffer = ReplayBuffer(5, (2,), init_sampler=lambda n, g: source[:n])
    buffer.draw(4).fill_(9)
    assert bool((source == 0.5).all())


def test_a_full_buffer_does_not_load_into_a_larger_one() -> None:
    full = ReplayBuffer(3, (1,))
    full.add(torch.arange(4.0)[:, None])
    with pytest.raises(ValueError, match="capacity 10, got 3 states and the next place 1"):
        ReplayBuffer(10, (1,)).load_state_dict(full.state_dict())
    part = ReplayBuffer(10, (1,), reinit_probability=0.0)
    part.add(torch.arange(4.0)[:, None])
    again = ReplayBuffer(10, (1,), reinit_probability=0.0)
    again.load_state_dict(part.state_dict())
    again.add(torch.tensor([[7.0]]))
    assert set(again.draw(500)[:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0, 7.0}


def test_generating_leaves_the_buffers_generator_alone() -> None:
    energy = small_energy()
    buffer = ReplayBuffer(50, (2,), generator=generator(1))
    trainer = EnergyModelTrainer(
        energy, torch.optim.SGD(energy.parameters(), 0.1), buffer, generator=generator(2)
    )
    trainer.step(torch.randn(8, 2, generator=generator()))
    before = buffer.state_dict()
    trainer.generate(4, num_steps=2)
    trainer.generate(4, num_steps=2, from_buffer=False)
    after = buffer.state_dict()
    assert torch.equal(before["generator"], after["generator"])
    assert torch.equal(before["states"], after["states"])


def test_examples_that_are_not_finite_harm_nothing() -> None:
    energy = small_energy()
    weights = [p.clone() for p in energy.parameters()]
    buffer = ReplayBuffer(50, (2,))
    trainer = EnergyModelTrainer(energy, torch.optim.SGD(energy.parameters(), 0.1), buffer)
    x = torch.zeros(8, 2)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="x must be finite"):
        trainer.step(x)
    assert len(buffer) == 0
    assert all(torch.equal(p, w) for p, w in zip(energy.parameters(), weights, strict=True))


def test_annealing_refuses_what_is_not_a_number() -> None:
    base = DiagonalNormal(torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match="samples must be finite"):
        ais_log_partition(
            quartic, base, num_chains=2, num_temperatures=3, direction="reverse",
            samples=torch.full((2, 1), math.nan),
        )  # fmt: skip
    with pytest.raises(FloatingPointError, match="must be a number"):
        ais_log_partition(
            lambda x: x[:, 0] * math.nan, base, num_chains=2, num_temperatures=3
        )  # fmt: skip


def test_densities_of_no_examples_and_of_single_numbers() -> None:
    for base in (
        DiagonalNormal(torch.zeros(2), 1.0),
        UniformBox(torch.zeros(2), torch.ones(2)),
    ):
        assert base.log_prob(torch.zeros(0, 2)).shape == (0,)
    box = UniformBox(torch.tensor(0.0).double(), torch.tensor(2.0).double())
    assert box.log_prob(torch.tensor([1.0, 3.0])).tolist() == [-math.log(2.0), -math.inf]


@pytest.mark.parametrize("std", [torch.ones(3), torch.ones(3, 2)])
def test_a_deviation_of_another_shape_is_refused(std: Tensor) -> None:
    with pytest.raises(ValueError, match=r"std must be a number or have the shape of mean, \(2,\)"):
        DiagonalNormal(torch.zeros(2), std)


@pytest.mark.parametrize("slope", [0.5, 3.0, 1e18, 1e20, 1e38])
def test_a_bounded_gradient_keeps_its_direction_at_any_size(slope: float) -> None:
    chain = langevin_sample(
        lambda x: slope * x.sum(1), torch.zeros(1, 2), step_size=2.0, num_steps=1,
        temperature=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    expected = -min(slope, 1 / math.sqrt(2))
    torch.testing.assert_close(chain.samples, torch.full((1, 2), expected))


def test_a_proposal_of_energy_minus_infinity_is_rejected() -> None:
    x = torch.zeros(1000, 1)
    chain = langevin_sample(
        lambda x: torch.where(x[:, 0] > 0.5, -math.inf, x[:, 0] ** 2 / 2), x,
        step_size=1.0, num_steps=1, metropolis=True, generator=generator(),
    )  # fmt: skip
    assert chain.samples.max() <= 0.5
    assert chain.acceptance_rate.mean() < 0.8


def test_no_steps_give_a_copy() -> None:
    x = torch.zeros(3, 2)
    langevin_sample(unit_normal, x, step_size=0.1, num_steps=0).samples.fill_(5)
    assert bool((x == 0).all())


def test_older_spectral_norm_stays() -> None:
    layer = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
    assert apply_spectral_norm(nn.Sequential(layer))[0] is layer
    assert hasattr(layer, "weight_orig")
