"""Pages: one for each run, and a site of all of them, readable from the file system.

The assets (style sheet, fonts, MathJax, ``mathfit.js``) are packaged; a page needs no network.
"""

from __future__ import annotations

from pathlib import Path

from kexue.lab.report.pages import run_page
from kexue.lab.report.site import build_site, check_site_folder, ensure_assets

__all__ = ["asset_path", "build_site", "check_site_folder", "ensure_assets", "run_page"]


def asset_path(name: str) -> Path:
    """Return the path of a packaged asset, such as ``"mathfit.js"``.

    Parameters
    ----------
    name : str
        File name below the folder of assets, with ``/`` between folders.

    Returns
    -------
    pathlib.Path
        Path of an existing file.

    Raises
    ------
    FileNotFoundError
        When there is no such asset; the message names it and those that there are.

    Examples
    --------
    >>> asset_path("mathfit.js").name
    'mathfit.js'
    """
    folder = Path(__file__).resolve().parent / "assets"
    path = (folder / name).resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        known = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        raise FileNotFoundError(f"no asset {name!r}; there are {', '.join(known)}")
    return path
