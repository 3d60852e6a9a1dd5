"""The U-Net: sizes, scales, and what it is told."""

import pytest
import torch

from kexue.models import SmallUNet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(**options):
    """Return a network whose last convolution is no longer zero."""
    network = SmallUNet(1, **{"base": 8, "multipliers": (1, 2), **options}).eval()
    torch.nn.init.normal_(network.output.weight, std=0.1)
    return network


@pytest.mark.parametrize(
    ("multipliers", "size"),
    [
        ((1, 2), (8, 8)),
        ((1, 2, 2), (28, 28)),
        ((1, 2, 2), (32, 32)),
        ((1,), (5, 3)),
        ((1, 2), (6, 10)),
    ],
)
def test_output_has_the_size_of_the_input(multipliers, size):
    network = SmallUNet(3, base=8, multipliers=multipliers, output_channels=6)
    assert network(torch.randn(2, 3, *size), torch.rand(2)).shape == (2, 6, *size)


def test_it_starts_at_zero():
    network = SmallUNet(1, base=8)
    assert bool((network(torch.randn(2, 1, 8, 8), torch.rand(2)) == 0).all())


def test_output_is_a_convolution_of_the_trunk():
    network = trained()
    x, time = torch.randn(2, 1, 8, 8), torch.rand(2)
    hidden = network.trunk(x, time)
    assert hidden.shape == (2, 8, 8, 8)
    assert torch.equal(network(x, time), network.output(hidden))


@pytest.mark.parametrize("attention_at", [(), (1,), (2,), (1, 2)])
def test_attention_stands_where_it_is_asked_for(attention_at):
    network = trained(attention_at=attention_at)
    names = {
        name.split(".attention")[0]
        for name, _ in network.named_parameters()
        if ".attention" in name
    }
    scales = {"down.0": 1, "down.1": 2, "middle": 2, "up.0": 2, "up.1": 1}
    assert names == {name for name, scale in scales.items() if scale in attention_at}
    assert network(torch.randn(2, 1, 8, 8), torch.rand(2)).shape == (2, 1, 8, 8)


def test_attention_carries_information_across_the_image():
    """Three 3×3 convolutions at one level reach six pixels; attention reaches all."""
    x = torch.randn(1, 1, 32, 32)
    changed = x.clone()
    changed[..., -1, -1] += 1
    for attention_at, reaches in (((), False), ((1,), True)):
        network = trained(multipliers=(1,), attention_at=attention_at)
        for module in network.modules():
            # Statistics of group norm see the whole image; take them out of the comparison.
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x
        far = (network(changed, torch.ones(1)) - network(x, torch.ones(1)))[..., 0, 0]
        assert bool(far != 0) == reaches


def test_time_and_class_matter_per_example():
    network = trained(num_classes=3)
    x = torch.randn(1, 1, 8, 8).expand(4, 1, 8, 8)
    time, label = torch.tensor([1.0, 1.0, 2.0, 1.0]), torch.tensor([0, 1, 0, -1])
    one, other_class, other_time, no_class = network(x, time, label)
    assert not torch.allclose(one, other_class)
    assert not torch.allclose(one, other_time)
    torch.testing.assert_close(no_class, network(x[:1], time[:1])[0])


def test_examples_do_not_see_one_another():
    network = trained(attention_at=(2,))
    x, time = torch.randn(3, 1, 8, 8), torch.rand(3)
    torch.testing.assert_close(
        network(x, time)[1:2], network(x[1:2], time[1:2]), atol=1e-6, rtol=1e-5
    )


def test_shifting_a_periodic_image_by_the_divisor_shifts_the_middle_of_the_output():
    """All layers between input and output commute with shifts by the coarsest pixel."""
    network = trained()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    x, time = torch.randn(1, 1, 16, 16), torch.ones(1)
    shifted = network(x.roll((2, 4), (2, 3)), time)
    torch.testing.assert_close(shifted, network(x, time).roll((2, 4), (2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: SmallUNet(1, base=8)(torch.zeros(1, 1, 10, 8), torch.ones(1)),
            "multiples of 4.*10×8; 12×8",
        ),
        (
            lambda: SmallUNet(1, base=8)(torch.zeros(1, 1, 0, 8), torch.ones(1)),
            "multiples of 4.*4×8",
        ),
        (lambda: SmallUNet(1, base=8)(torch.zeros(1, 3, 8, 8), torch.ones(1)), "1 channels, got 3"),
        (
            lambda: SmallUNet(1, base=8)(torch.zeros(1, 8, 8), torch.ones(1)),
            "batch, channels, height",
        ),
        (lambda: SmallUNet(1, base=8)(torch.zeros(1, 1, 8, 8).int(), torch.ones(1)), "int32"),
        (lambda: SmallUNet(0), "channels"),
        (lambda: SmallUNet(1, multipliers=()), "multipliers"),
        (lambda: SmallUNet(1, attention_at=(8, 16)), r"attention_at.*\[1, 2, 4\].*\[8, 16\]"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
