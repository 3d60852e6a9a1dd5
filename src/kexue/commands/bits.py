"""`kexue bits`: how many bits per dimension a model needs for images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kexue.commands._models import kept_denoiser, seeded_generator
from kexue.lab.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kexue.generative.diffusion import ImageDenoiser

__all__ = ["bits", "rates"]

# Noise of about half a bin: below it the network has little to say, and the bin says it all.
_SIGMA_IN_BINS = 0.59
_EXACT_UP_TO = 256
_PROBES = 8
_SUFFIXES = (".png", ".jpg", ".jpeg")


def bits(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or a slug.")],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="PNG or JPEG files, or data sets as for --data."),
    ],
    steps: Annotated[int, typer.Option(help="Heun steps of the integral, at least 2.")] = 32,
    draws: Annotated[int, typer.Option(help="Draws of the noise within a bin.")] = 4,
    most: Annotated[int, typer.Option(help="Held-out images of a data set, at most.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    runs: Annotated[Path, typer.Option(help="Where the runs of a slug are.")] = Path("runs"),
) -> None:
    """Measure bits per dimension of images under a diffusion model that a run trained.

    RUN is the folder of a run, or a slug, of which the newest run in --runs is taken. The rate is
    the negative log-likelihood of the images, dequantised uniformly, along the probability flow
    from the level of noise of about half a bin: an upper bound on the rate of the pixels. Pixels
    are first rounded to the values that the model's data had. A data set counts with its held-out
    part. The last column says how much half as many steps would change.
    """
    if steps < 2 or draws < 1 or most < 1:
        raise UsageError(
            "--steps must be at least 2, --draws and --most at least 1, "
            f"got {steps}, {draws} and {most}"
        )
    generator = seeded_generator(device, seed)
    denoiser = kept_denoiser(run, runs).to(device)
    from kexue.lab.bars import progress_bars

    found = []
    with progress_bars() as bars:
        task = None if bars is None else bars.add_task("bits", total=len(files), metric="")
        for file in files:
            images = _images(file, denoiser, most).to(device)
            rate, halved = rates(denoiser, images, steps=steps, draws=draws, generator=generator)
            # Over the draws of one image, or over the images of a set.
            spread = rate.mean(0) if len(images) > 1 else rate[:, 0]
            count = len(spread)
            found.append(
                {
                    "file": str(file),
                    "images": len(images),
                    "bits_per_dimension": rate.mean().item(),
                    "standard_error": spread.std().item() / count**0.5 if count > 1 else None,
                    "half_the_steps": halved.mean().item() - rate.mean().item(),
                }
            )
            if bars is not None and task is not None:
                bars.advance(task)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for row in found:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        typer.echo(
            f"{row['bits_per_dimension']:.4f}{error} bits per dimension  {row['file']}"
            f"  ({row['images']} image{'s' * (row['images'] != 1)}, "
            f"{row['half_the_steps']:+.4f} at half the steps)"
        )


def rates(
    denoiser: ImageDenoiser,
    images: Tensor,
    *,
    steps: int = 32,
    draws: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return bits per dimension, (draws, images), with ``steps`` and with half of them."""
    import torch

    from kexue.generative.diffusion import log_likelihood
    from kexue.generative.vae import uniform_dequantize

    dimensions = images[0].numel()
    start = denoiser.schedule.time_from_sigma(_SIGMA_IN_BINS * denoiser.bin_width)
    start = max(float(start), denoiser.schedule.minimum_time)
    repeated = images.repeat(draws, *[1] * (images.ndim - 1))
    noisy = uniform_dequantize(repeated, bin_width=denoiser.bin_width, generator=generator)
    # The same probes for both numbers of steps, and others than the noise within a bin.
    seed = 1 if generator is None else (generator.initial_seed() + 1) % 2**64

    def rate(num_steps: int) -> Tensor:
        result = log_likelihood(
            denoiser,
            noisy,
            start=start,
            divergence_method="exact" if dimensions <= _EXACT_UP_TO else "hutchinson",
            num_probes=_PROBES,
            method="heun",
            coordinate="angle",
            num_steps=num_steps,
            generator=torch.Generator(images.device).manual_seed(seed),
        )
        bits = result.bits_per_dimension(dimensions, bin_width=denoiser.bin_width)
        return bits.reshape(draws, len(images))

    return rate(steps), rate(steps // 2)


def _images(file: Path, denoiser: ImageDenoiser, most: int) -> Tensor:
    """Read a file as the model's data were: its shape, and its values of a pixel."""
    from kexue.lab.data import images as data_set
    from kexue.lab.data import pictures

    if file.suffix.lower() in _SUFFIXES:
        images = pictures([file])
    else:
        images = data_set(file).test.images[:most]
    if tuple(images.shape[1:]) != denoiser.event_shape:
        expected, got = (
            f"{c} channel{'s' * (c != 1)} of {h} x {w}"
            for c, h, w in (denoiser.event_shape, images.shape[1:])
        )
        raise UsageError(f"{file}: the model knows images of {expected}, this is {got}")
    width = denoiser.bin_width
    return ((images + 1) / width).round() * width - 1
