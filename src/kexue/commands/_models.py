"""The model that a run trained and kept, for the commands that put it to work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.errors import UsageError

if TYPE_CHECKING:
    from kexue.generative.diffusion import ImageDenoiser

__all__ = ["kept_denoiser"]

_FILE = Path("files") / "denoiser.safetensors"


def kept_denoiser(run: str, runs: Path) -> ImageDenoiser:
    """Load the denoiser of a run.

    Parameters
    ----------
    run : str
        The folder of a run, or a slug: then its newest run.
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


def _folder(run: str, runs: Path) -> Path:
    from kexue.lab.store import newest_runs

    if Path(run).is_dir():
        return Path(run)
    newest, _ = newest_runs(runs)
    if run not in newest:
        there = ", ".join(sorted(newest)) or "none"
        raise UsageError(
            f"expected the folder of a run, or a slug with a run in {runs} (there: {there}), "
            f"got {run!r}"
        )
    return newest[run].folder
