"""The model that a run trained and kept, for the commands that put it to work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.errors import UsageError

if TYPE_CHECKING:
    import torch

    from kexue.generative.diffusion import ImageDenoiser

__all__ = ["kept_denoiser", "seeded_generator"]

_FILE = Path("files") / "denoiser.safetensors"


def kept_denoiser(run: str, runs: Path) -> ImageDenoiser:
    """Load the denoiser of a run.

    Parameters
    ----------
    run : str
        The folder of a run, or a slug: then its newest run. A folder that has the name of a slug
        with runs, and no denoiser, is not meant.
    runs : Path
        Where the runs of a slug are looked for.

    Raises
    ------
    UsageError
        Where there is no such run, or it kept no denoiser.
    """
    from kexue.generative.diffusion import ImageDenoiser

    folder = _folder(run, runs)
    path = folder / _FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} kept no denoiser: a run of a study that trains one does, such as "
            "`kexue run conditional_guidance`"
        )
    try:
        return ImageDenoiser.load(path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def seeded_generator(device: str, seed: int) -> torch.Generator:
    """Return the source of randomness that --device and --seed ask for.

    Raises
    ------
    UsageError
        Where this machine has no such device, or torch no such seed.
    """
    import torch

    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed must be from 0 to {2**64 - 1}, got {seed}")
    try:
        torch.empty(0, device=device)
        return torch.Generator(device).manual_seed(seed)
    except (RuntimeError, AssertionError):
        raise UsageError(
            f"--device must be a torch device of this machine, got {device!r}: "
            f"there is cpu{' and cuda' if torch.cuda.is_available() else ' only'}"
        ) from None


def _folder(run: str, runs: Path) -> Path:
    from kexue.lab.store import newest_runs

    folder = Path(run)
    if (folder / _FILE).is_file():
        return folder
    newest, _ = newest_runs(runs)
    if folder.is_dir() and run not in newest:
        return folder
    if run not in newest:
        there = ", ".join(sorted(newest)) or "none"
        raise UsageError(
            f"expected the folder of a run, or a slug with a run in {runs} (there: {there}), "
            f"got {run!r}"
        )
    return newest[run].folder
