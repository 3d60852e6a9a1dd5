"""Fully connected networks: what they are told, and what they refuse."""

import pytest
import torch
from torch import nn

from kexue.models import MLP, MLPDenoiser, TimeEmbedding


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_embedding_of_time_is_sines_of_a_geometric_scale():
    embedding = TimeEmbedding(4)
    seen = []
    embedding.first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    embedding(torch.tensor([0.5, 200.0]), batch=2)
    time = torch.tensor([[0.5], [200.0]])
    angle = time * torch.tensor([1.0, 1e-4])
    torch.testing.assert_close(seen[0], torch.cat([angle.cos(), angle.sin()], 1))


def test_nearby_real_times_are_told_apart():
    network = MLPDenoiser(3, hidden=32)
    x = torch.ones(2, 3)
    one, two = network(x, torch.tensor([3.0, 3.25]))
    assert not torch.allclose(one, two)


def test_one_time_for_all_equals_one_per_example():
    network = MLPDenoiser(3, hidden=16).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    many = network(x, torch.full((5,), 7.5, dtype=torch.float64))
    assert torch.equal(network(x, torch.tensor(7.5, dtype=torch.float64)), many)


def test_no_condition_negative_label_and_last_label_all_mean_no_class():
    network = MLPDenoiser(3, hidden=16, num_classes=4)
    x, time = torch.randn(2, 3), torch.tensor(1.0)
    without = network(x, time)
    for label in (-1, 4):
        assert torch.equal(network(x, time, torch.full((2,), label)), without)
    assert not torch.allclose(network(x, time, torch.tensor([0, 1])), without)


def test_labels_act_per_example():
    network = MLPDenoiser(3, hidden=16, num_classes=4)
    x, time = torch.randn(2, 3), torch.tensor(1.0)
    both = network(x, time, torch.tensor([2, 3]))
    alone = network(x[1:], time, torch.tensor([3]))
    torch.testing.assert_close(both[1:], alone)


def test_output_is_a_linear_map_of_the_trunk():
    network = MLPDenoiser(3, hidden=16, output_features=7)
    x, time = torch.randn(5, 3), torch.rand(5)
    hidden = network.trunk(x, time)
    assert hidden.shape == (5, 16)
    assert torch.equal(network(x, time), network.output(hidden))


def test_examples_do_not_see_one_another():
    network = MLPDenoiser(3, hidden=16)
    x, time = torch.randn(5, 3), torch.rand(5)
    torch.testing.assert_close(network(x, time)[2:3], network(x[2:3], time[2:3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_take_float32_times(dtype):
    network = MLPDenoiser(3, hidden=16)
    x, time = torch.randn(5, 3), torch.linspace(990, 1000, 5)
    half = network.to(dtype)(x.to(dtype), time)
    assert half.dtype == dtype
    single = network.float()(x, time)
    # Eight bits of bfloat16 through four layers.
    assert (half.float() - single).abs().max() < 0.05


def test_dropout_acts_in_training_only():
    network = MLPDenoiser(3, hidden=64, dropout=0.5)
    x, time = torch.randn(5, 3), torch.rand(5)
    assert not torch.allclose(network(x, time), network(x, time))
    network.eval()
    assert torch.equal(network(x, time), network(x, time))


def test_the_denoiser_learns_a_linear_map():
    """Predicting x from x is within reach of any residual network."""
    network = MLPDenoiser(2, hidden=32, depth=1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    source = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = torch.randn(64, 2, generator=source)
        loss = ((network(x, torch.rand(64, generator=source)) - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_plain_network_is_its_layers_in_order():
    network = MLP(3, [5, 4], 2, activation="tanh", norm="layer")
    kinds = [type(layer) for layer in network]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.Tanh, nn.Linear, nn.LayerNorm, nn.Tanh, nn.Linear]
    x = torch.randn(6, 3)
    expected = x
    for layer in network:
        expected = layer(expected)
    assert torch.equal(network(x), expected)


def test_plain_network_without_hidden_layers_is_linear():
    network = MLP(3, [], 2)
    x = torch.randn(4, 6, 3)
    assert torch.equal(network(x), nn.functional.linear(x, network[0].weight, network[0].bias))


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "tanh", "softplus", "leaky_relu"])
def test_every_activation_is_torchs(activation):
    x = torch.linspace(-3, 3, 7)
    layer = MLP(1, [1], 1, activation=activation)[1]
    torch.testing.assert_close(layer(x), getattr(nn.functional, activation)(x))


def test_batch_norm_normalises_over_the_batch():
    network = MLP(3, [5], 2, norm="batch")
    hidden = network[1](network[0](torch.randn(64, 3)))
    torch.testing.assert_close(hidden.mean(0), torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MLPDenoiser(3, hidden=7), "width.*even.*7"),
        (lambda: MLPDenoiser(0), "features.*0"),
        (lambda: MLPDenoiser(3, depth=-1), "depth.*-1"),
        (lambda: MLPDenoiser(3, num_classes=0), "num_classes.*0"),
        (
            lambda: MLPDenoiser(3, hidden=8)(torch.zeros(2, 4), torch.tensor(1.0)),
            r"3 features.*\(2, 4\)",
        ),
        (
            lambda: MLPDenoiser(3, hidden=8)(torch.zeros(3), torch.tensor(1.0)),
            r"\(batch, features\)",
        ),
        (
            lambda: MLPDenoiser(3, hidden=8)(torch.zeros(2, 3), torch.ones(3)),
            r"time.*\(2,\).*\(3,\)",
        ),
        (
            lambda: MLPDenoiser(3, hidden=8)(
                torch.zeros(2, 3), torch.tensor(1.0), torch.zeros(2).long()
            ),
            "condition must be None",
        ),
        (
            lambda: MLPDenoiser(3, hidden=8, num_classes=2)(
                torch.zeros(2, 3), torch.tensor(1.0), torch.zeros(3).long()
            ),
            r"condition.*\(3,\)",
        ),
        (
            lambda: MLPDenoiser(3, hidden=8, num_classes=2)(
                torch.zeros(2, 3), torch.tensor(1.0), torch.zeros(2)
            ),
            "condition.*float32",
        ),
        (lambda: MLP(3, [4], 2, activation="sine"), "activation.*silu.*'sine'"),
        (lambda: MLP(3, [4], 2, norm="group"), "norm.*layer, batch.*'group'"),
        (lambda: MLP(3, [0], 2), r"width.*\[3, 0, 2\]"),
        (lambda: MLP(3, [4], 2)(torch.zeros(2, 4)), "3 features"),
        (lambda: MLP(3, [4], 2)(torch.zeros(2, 3).long()), "int64"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
