"""`kexue sample`: draw images from a diffusion model that a run trained."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kexue.commands._models import kept_denoiser, seeded_generator
from kexue.lab.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kexue.generative.diffusion import Denoiser, ImageDenoiser

__all__ = ["SOLVERS", "draw", "sample"]

SOLVERS = ("ddpm", "ddim", "heun", "dpm_solver_2m", "dopri5")
# These go from one of the model's noise levels to another.
_DISCRETE = ("ddpm", "ddim")
_MOST_PIXELS = 2**28


def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or a slug.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(help="How many images.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps from noise to image.")] = 20,
    solver: Annotated[str, typer.Option(help=f"One of {', '.join(SOLVERS)}.")] = "heun",
    guidance: Annotated[
        float, typer.Option(help="Scale of classifier-free guidance; 1 is none.")
    ] = 1.0,
    label: Annotated[int | None, typer.Option(help="The class to draw.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    scale: Annotated[int, typer.Option(help="Screen pixels a side of each pixel.")] = 4,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    runs: Annotated[Path, typer.Option(help="Where the runs of a slug are.")] = Path("runs"),
) -> None:
    """Draw images from a diffusion model that a run trained.

    RUN is the folder of a run, or a slug, of which the newest run in --runs is taken. Without
    --label a model with classes draws from all of them. The images stand in one PNG file.
    """
    if count < 1 or scale < 1:
        raise UsageError(f"--count and --scale must be at least 1, got {count} and {scale}")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out must be the name of a PNG file, got {out}")
    generator = seeded_generator(device, seed)
    denoiser = kept_denoiser(run, runs).to(device)
    _check_size(count, scale, denoiser.event_shape)
    from kexue.lab.sheets import sheet

    images = draw(
        denoiser,
        count,
        steps=steps,
        solver=solver,
        guidance=guidance,
        label=label,
        generator=generator,
    )
    _write_png(out, sheet(images), scale)
    typer.echo(out)


def draw(
    denoiser: ImageDenoiser,
    count: int,
    *,
    steps: int = 20,
    solver: str = "heun",
    guidance: float = 1.0,
    label: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images (count, channels, height, width) in [−1, 1], on the denoiser's device.

    Raises
    ------
    UsageError
        For an unknown solver, fewer than one step or more than the solver can take, a class that
        the model does not have, and guidance without a class.
    """
    import torch

    from kexue.generative.diffusion import ClassifierFreeGuidance, solve_ode
    from kexue.generative.diffusion import sample as walk

    if solver not in SOLVERS:
        raise UsageError(f"--solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if steps < 1:
        raise UsageError(f"--steps must be at least 1, got {steps}")
    if not math.isfinite(guidance):
        raise UsageError(f"--guidance must be a number, got {guidance}")
    device = next(denoiser.parameters()).device
    condition = None
    guided: Denoiser = denoiser
    denoiser.clip_sample = (-1.0, 1.0)
    if label is not None:
        if denoiser.num_classes is None:
            raise UsageError("--label needs a model with classes, and this run's has none")
        if not 0 <= label < denoiser.num_classes:
            raise UsageError(f"--label must be from 0 to {denoiser.num_classes - 1}, got {label}")
        condition = torch.full((count,), label, device=device)
        if guidance != 1:
            denoiser.clip_sample = None
            guided = ClassifierFreeGuidance(
                denoiser,
                scale=guidance,
                null_condition=torch.tensor(denoiser.num_classes, device=device),
                clip_sample=(-1.0, 1.0),
            )
    elif guidance != 1:
        raise UsageError("--guidance needs a --label to guide to")
    schedule = denoiser.schedule
    most = int(schedule.maximum_time)
    if solver in _DISCRETE and steps > most:
        raise UsageError(f"--steps must be at most {most} for --solver {solver}, got {steps}")
    noise = schedule.prior_scale * torch.randn(
        (count, *denoiser.event_shape), generator=generator, device=device
    )
    with torch.no_grad():
        if solver in _DISCRETE:
            images = walk(
                guided,
                initial=noise,
                num_steps=steps,
                eta=float(solver == "ddpm"),
                condition=condition,
                generator=generator,
            )
        else:
            # The adaptive solver ends where the network was trained last: there is no noise to see.
            end = schedule.minimum_time if solver == "dopri5" else 0.0
            images = solve_ode(
                guided,
                noise,
                start=schedule.maximum_time,
                end=end,
                method=solver,
                coordinate="sigma" if solver == "dpm_solver_2m" else "angle",
                num_steps=steps,
                condition=condition,
            )
    return images.clamp(-1, 1)


def _check_size(count: int, scale: int, shape: Sequence[int]) -> None:
    """Refuse a picture that would not fit the memory, before it is drawn."""
    height, width = shape[1:]
    columns = math.ceil(math.sqrt(count))
    frames = columns * math.ceil(count / columns)
    pixels = frames * (height + 2) * (width + 2) * scale**2
    if pixels > _MOST_PIXELS:
        raise UsageError(
            f"the picture may have {_MOST_PIXELS} pixels at most, and --count {count} images of "
            f"{height} x {width} at --scale {scale} make {pixels}"
        )


def _write_png(path: Path, pixels: Tensor, scale: int) -> None:
    from matplotlib.image import imsave

    from kexue._files import write_whole

    large = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    colours = large.expand(-1, -1, 3).numpy()
    content = io.BytesIO()
    imsave(content, colours, format="png")
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written ({error.strerror})") from None
