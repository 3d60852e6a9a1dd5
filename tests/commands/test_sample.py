"""`kexue sample` and `kexue bits`: a kept model put to work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from matplotlib.image import imread, imsave
from typer.testing import CliRunner

from kexue.commands.bits import bits, rates
from kexue.commands.sample import SOLVERS, draw, sample
from kexue.generative.diffusion import ImageDenoiser
from kexue.lab.errors import LabError, UsageError

SIDE = 4
RESULT = {
    "schema": 1, "slug": "study", "title": "t", "verdict": "holds", "budget": "quick", "seed": 0,
    "started": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "claims": [], "tables": [],
    "figures": [], "versions": {}, "machine": {},
}  # fmt: skip


def point_images(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 is dark, class 1 is bright, with a pixel of noise among 17 values."""
    labels = torch.arange(count) % 2
    noise = torch.randint(-2, 3, (count, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return (labels.float() * 1.25 - 0.625)[:, None, None, None] + noise / 8, labels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a denoiser that knows two classes."""
    folder = tmp_path_factory.mktemp("runs") / "study" / "run"
    (folder / "files").mkdir(parents=True)
    images, labels = point_images()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = ImageDenoiser((1, SIDE, SIDE), levels=17, num_classes=2, hidden=64, depth=2)
    denoiser.fit(
        images, labels, steps=500, batch_size=64, average=0.98, label_dropout=0.2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    denoiser.save(folder / "files" / "denoiser.safetensors")
    return folder


@pytest.fixture
def denoiser(run: Path) -> ImageDenoiser:
    return ImageDenoiser.load(run / "files" / "denoiser.safetensors")


def call(command: Any, *arguments: object) -> str:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("label", [0, 1])
def test_every_solver_draws_the_class_that_is_asked_for(
    denoiser: ImageDenoiser, solver: str, guidance: float, label: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    images = draw(
        denoiser, 20, steps=10, solver=solver, guidance=guidance, label=label, generator=generator
    )
    assert images.shape == (20, 1, SIDE, SIDE)
    assert images.abs().max() <= 1
    bright = images.mean((1, 2, 3)) > 0
    assert (bright == bool(label)).float().mean() >= 0.95


def test_without_a_label_both_classes_come(denoiser: ImageDenoiser) -> None:
    images = draw(denoiser, 60, solver="ddpm", generator=torch.Generator().manual_seed(0))
    share = (images.mean((1, 2, 3)) > 0).double().mean()
    # Half of them, within four standard errors of 60 draws.
    assert abs(share - 0.5) < 4 * 0.5 / 60**0.5


def test_one_png_and_the_same_seed_the_same_bytes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    assert call(sample, run, "--out", out, "--count", 5, "--scale", 2).strip() == str(out)
    first = out.read_bytes()
    # 3 × 2 frames of 4 + 2 pixels, twice as large.
    assert imread(out).shape[:2] == (2 * 6 * 2, 3 * 6 * 2)
    call(sample, run, "--out", out, "--count", 5, "--scale", 2)
    assert out.read_bytes() == first
    call(sample, run, "--out", out, "--count", 5, "--scale", 2, "--seed", 1)
    assert out.read_bytes() != first


def test_a_slug_means_its_newest_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="slug with a run in"):
        call(sample, "no_study", "--runs", tmp_path, "--out", tmp_path / "x.png")


def test_a_folder_with_the_name_of_a_slug_does_not_hide_its_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    kept = runs / "study" / "2026"
    shutil.copytree(run, kept)
    (kept / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call(sample, "study", "--count", 1, "--steps", 1).strip() == "samples.png"
    # A folder with a model of its own is meant itself.
    (tmp_path / "study" / "files").mkdir()
    (tmp_path / "study" / "files" / "denoiser.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="saved ImageDenoiser"):
        call(sample, "study")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "ddpm", "--steps", 1001), "at most 1000 for --solver ddpm, got 1001"),
        (("--solver", "ddim", "--steps", 1001), "at most 1000 for --solver ddim, got 1001"),
        (("--scale", 100_000), "268435456 pixels at most"),
        (("--count", 10**12), "268435456 pixels at most"),
        (("--solver", "magic"), "--solver must be one of"),
        (("--steps", 0), "--steps"),
        (("--count", 0), "--count"),
        (("--label", 2), "from 0 to 1"),
        (("--guidance", 2), "needs a --label"),
        (("--guidance", "nan", "--label", 1), "must be a number"),
        (("--out", "x.jpg"), "PNG"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    run: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        call(sample, run, "--out", tmp_path / "x.png", *options)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kept no denoiser"):
        call(sample, tmp_path, "--out", tmp_path / "x.png")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "denoiser.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="saved ImageDenoiser"):
        call(sample, tmp_path, "--out", tmp_path / "x.png")


@pytest.mark.parametrize("command", [sample, bits])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo"), "--device must be a torch device of this machine, got 'foo'"),
        (("--device", "cuda:99"), "--device must be a torch device"),
        (("--device", "meta"), "--device must be a torch device"),
        (("--seed", 2**64), "--seed must be from 0 to 18446744073709551615"),
        (("--seed", -1), "--seed must be from 0"),
    ],
)
def test_devices_and_seeds_that_do_not_exist_are_refused(
    run: Path, tmp_path: Path, command: Any, options: tuple[object, ...], message: str
) -> None:
    rest = ("--out", tmp_path / "x.png") if command is sample else (tmp_path / "x.npy",)
    with pytest.raises(UsageError, match=message):
        call(command, run, *rest, *options)
    assert not list(tmp_path.iterdir())


def png(path: Path, image: torch.Tensor) -> Path:
    values = ((image[0] + 1) / 2 * 255).round().byte().numpy()
    from PIL import Image

    Image.fromarray(values, "L").save(path)
    return path


def test_bits_of_the_models_own_data_are_few_and_of_others_many(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    images, _ = point_images()
    checkers = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 2.0 - 1
    files = [png(tmp_path / "own.png", images[0]), png(tmp_path / "other.png", checkers[None])]
    own, other = json.loads(call(bits, run, *files, "--json"))
    # Pixels take five values with equal probability: log2 5 = 2.32 bits at least, and one bit of
    # the class over 16 pixels.
    assert 2.0 < own["bits_per_dimension"] < 3.6
    assert other["bits_per_dimension"] > own["bits_per_dimension"] + 1
    assert abs(own["half_the_steps"]) < 0.1
    lines = call(bits, run, files[0]).splitlines()
    assert len(lines) == 1
    assert "bits per dimension" in lines[0]


def test_a_data_set_counts_with_its_held_out_images(run: Path, tmp_path: Path) -> None:
    images, _ = point_images(40)
    array = ((images[:, 0] + 1) / 2 * 255).round().byte().numpy()
    np.save(tmp_path / "images.npy", array)
    (row,) = json.loads(call(bits, run, tmp_path / "images.npy", "--json", "--draws", 1))
    assert row["images"] == 4
    assert row["standard_error"] > 0


def test_rates_of_images_do_not_depend_on_their_neighbours(denoiser: ImageDenoiser) -> None:
    images, _ = point_images(6)
    generator = torch.Generator().manual_seed(0)
    together, _ = rates(denoiser, images, steps=8, draws=1, generator=generator)
    assert together.shape == (1, 6)
    assert bool(together.isfinite().all())


def test_the_largest_seed_is_one(run: Path, tmp_path: Path) -> None:
    images, _ = point_images(2)
    np.save(tmp_path / "images.npy", ((images[:, 0] + 1) / 2 * 255).round().byte().numpy())
    options = ("--json", "--draws", 1, "--steps", 2, "--seed", 2**64 - 1)
    (row,) = json.loads(call(bits, run, tmp_path / "images.npy", *options))
    assert row["bits_per_dimension"] > 0


def test_images_of_another_shape_are_refused(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    imsave(tmp_path / "colour.png", np.zeros((SIDE, SIDE, 3)))
    with pytest.raises(UsageError, match="the model knows images of 1 channel of 4 x 4"):
        call(bits, run, tmp_path / "colour.png")
    with pytest.raises(LabError):
        call(bits, run, tmp_path / "absent.png")
    with pytest.raises(UsageError, match="--steps"):
        call(bits, run, tmp_path / "colour.png", "--steps", 1)
