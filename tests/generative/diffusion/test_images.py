"""kexue.generative.diffusion.images: the denoiser that studies train and commands load."""

from __future__ import annotations

import os

import pytest
import torch

from kexue.generative.diffusion import DiscreteSchedule, ImageDenoiser, denoising_loss
from kexue.models import SmallUNet


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_size_decides_on_the_network() -> None:
    flat = ImageDenoiser((1, 16, 16), hidden=16)
    assert not flat.convolutional
    assert not isinstance(flat.network, SmallUNet)
    for side, levels in ((28, 3), (34, 2), (33, 1)):
        denoiser = ImageDenoiser((1, side, side), base=4)
        assert denoiser.convolutional
        assert isinstance(denoiser.network, SmallUNet)
        assert denoiser.network.divisor == 2 ** (levels - 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 20)])
def test_predictions_have_the_shape_of_the_images(shape) -> None:
    denoiser = ImageDenoiser(shape, hidden=16, base=4, num_classes=3)
    x = torch.randn(2, *shape)
    assert denoiser.predict(x, 500).sample.shape == x.shape
    assert denoiser.predict(x, 500, condition=torch.tensor([0, 3])).sample.shape == x.shape
    assert denoiser.network.trunk(x, 500.0).shape[0] == 2


def test_training_learns_a_point() -> None:
    # Data at one point: x̂_0 must tend to it, whatever the noise.
    point = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = ImageDenoiser((1, 4, 4), hidden=32, depth=1)

    def error() -> torch.Tensor:
        clean = point.expand(256, 1, 4, 4)
        return denoising_loss(denoiser, clean, target="sample", generator=generator())

    before = error()
    denoiser.fit(
        point.expand(10, 1, 4, 4), steps=300, batch_size=64, learning_rate=1e-2, average=0.9,
        generator=generator(),
    )  # fmt: skip
    assert error() < 0.1 * before
    assert not denoiser.training


def test_the_average_is_kept_and_not_the_last_step() -> None:
    images = torch.rand(20, 1, 4, 4, generator=generator()) * 2 - 1
    weights = []
    for average in (0.0, 0.999):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = ImageDenoiser((1, 4, 4), hidden=16, depth=1)
        start = denoiser.network.network.input.weight.detach().clone()
        denoiser.fit(images, steps=5, batch_size=4, average=average, generator=generator())
        weights.append((denoiser.network.network.input.weight.detach() - start).norm())
    # The first step initialises the average; after that 0.999 moves a thousandth of the way.
    assert weights[1] < weights[0]


def test_dropped_labels_train_the_empty_class() -> None:
    images = torch.rand(20, 1, 4, 4, generator=generator()) * 2 - 1
    labels = torch.arange(20) % 2

    def embedding_moves(label_dropout: float) -> list[bool]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = ImageDenoiser((1, 4, 4), hidden=16, depth=1, num_classes=2)
        before = {k: v.clone() for k, v in denoiser.network.state_dict().items()}
        (name,) = [k for k in before if before[k].shape == (3, 16)]
        denoiser.fit(
            images, labels, steps=3, batch_size=16, label_dropout=label_dropout,
            generator=generator(),
        )  # fmt: skip
        return (denoiser.network.state_dict()[name] != before[name]).any(1).tolist()

    assert embedding_moves(0.0) == [True, True, False]
    assert embedding_moves(0.5) == [True, True, True]
    assert embedding_moves(1.0) == [False, False, True]


def test_same_seed_same_weights() -> None:
    def weights() -> torch.Tensor:
        images = torch.rand(20, 1, 4, 4, generator=generator()) * 2 - 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = ImageDenoiser((1, 4, 4), hidden=16)
        denoiser.fit(images, steps=2, batch_size=4, generator=generator(5))
        return torch.cat([p.flatten() for p in denoiser.network.parameters()])

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 20, 20)])
def test_a_saved_denoiser_predicts_the_same(tmp_path, shape) -> None:
    denoiser = ImageDenoiser(
        shape, levels=17, num_classes=4, hidden=16, base=4, schedule="linear"
    ).eval()
    denoiser.save(tmp_path / "denoiser.safetensors")
    state = torch.random.get_rng_state()
    loaded = ImageDenoiser.load(tmp_path / "denoiser.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state), "loading must draw nothing"
    x = torch.randn(2, *shape)
    assert torch.equal(loaded.predict(x, 300).sample, denoiser.predict(x, 300).sample)
    assert (loaded.event_shape, loaded.levels, loaded.num_classes) == (shape, 17, 4)
    assert loaded.bin_width == 1 / 8
    linear = DiscreteSchedule.linear()
    assert loaded.schedule.sigma(10) == linear.sigma(10)
    assert os.listdir(tmp_path) == ["denoiser.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "denoiser.safetensors"
    ImageDenoiser((1, 4, 4), hidden=16).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="saved ImageDenoiser"):
        ImageDenoiser.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="saved ImageDenoiser"):
        ImageDenoiser.load(path)
    with pytest.raises(FileNotFoundError):
        ImageDenoiser.load(tmp_path / "absent.safetensors")


@pytest.mark.bad_input
def test_what_cannot_be_trained_on_is_refused() -> None:
    plain = ImageDenoiser((1, 4, 4), hidden=16)
    classes = ImageDenoiser((1, 4, 4), hidden=16, num_classes=2)
    images = torch.zeros(3, 1, 4, 4)
    for denoiser, arguments, options, message in (
        (plain, (images[:0],), {}, "at least one example"),
        (plain, (images[:, 0],), {}, "shape"),
        (plain, (images, torch.zeros(3, dtype=torch.long)), {}, "num_classes"),
        (classes, (images, torch.zeros(2, dtype=torch.long)), {}, "labels must have shape"),
        (classes, (images, torch.full((3,), 2)), {}, "labels must lie"),
        (plain, (images,), {"average": 1.0}, "average"),
        (plain, (images,), {"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            denoiser.fit(*arguments, **{"steps": 1, **options})
    for options, message in (
        ({"event_shape": (4, 4)}, "event_shape"),
        ({"event_shape": (1, 4, 4), "levels": 1}, "levels"),
        ({"event_shape": (1, 4, 4), "schedule": "other"}, "schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageDenoiser(**options)
