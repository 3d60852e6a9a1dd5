"""The site: an index of all methods and a page for the newest run of each."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from kexue.lab.catalogue import Catalogue
from kexue.lab.errors import StoreError
from kexue.lab.report.pages import ASSETS_OF_RUNS, environment, run_page
from kexue.lab.store import newest_runs

__all__ = ["build_site", "check_site_folder", "ensure_assets"]

_MARK = ".kexue-site"


def check_site_folder(out: Path) -> None:
    """Refuse a folder that holds something that is no site."""
    if out.exists() and not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} holds something that is no site: name another folder")


def build_site(runs: Path, out: Path, *, studies: str | None = None) -> tuple[Path, list[str]]:
    """Write the site of the newest run of every study, whole or not at all.

    Parameters
    ----------
    runs : Path
        The folder of runs.
    out : Path
        The folder of the site. An older site there is replaced; anything else is refused.
    studies : str, optional
        Package of the studies.

    Returns
    -------
    (Path, list of str)
        The index page, and a sentence for each run that was skipped as unreadable.

    Raises
    ------
    StoreError
        When there is no readable run, when ``out`` holds something else, or cannot be written.
    """
    found, skipped = newest_runs(runs)
    if not found:
        raise StoreError(f"expected at least one run in {runs}, found none: `kexue run all` first")
    check_site_folder(out)
    entries = Catalogue(studies).entries
    shown = [found[slug] for slug in entries if slug in found]
    shown += [run for slug, run in found.items() if slug not in entries]
    partial = out.with_name(f".partial-{secrets.token_hex(4)}-{out.name}")
    try:
        partial.mkdir(parents=True)
        (partial / _MARK).touch()
        _copy_assets(partial / "assets")
        neighbours = [{"href": f"../{r.slug}/", "title": r.result["title"]} for r in shown]
        for i, run in enumerate(shown):
            folder = partial / run.slug
            folder.mkdir()
            for figure in (run.folder / "figures").glob("*.*"):
                (folder / "figures").mkdir(exist_ok=True)
                shutil.copyfile(figure, folder / "figures" / figure.name)
            shutil.copy2(run.folder / "result.json", folder)
            page = run_page(
                run.result,
                assets="../assets",
                home="../index.html",
                previous=_with_index(neighbours[i - 1]) if i else None,
                next=_with_index(neighbours[i + 1]) if i + 1 < len(shown) else None,
            )
            (folder / "index.html").write_text(page, encoding="utf-8")
        coming = [entry for slug, entry in entries.items() if slug not in found]
        index = (
            environment()
            .get_template("index.html.j2")
            .render(cards=_cards(shown), coming=coming, assets="assets")
        )
        (partial / "index.html").write_text(index, encoding="utf-8")
        _swap(partial, out)
    except OSError as error:
        raise StoreError(
            f"the site cannot be written to {out} ({error.strerror}): give --out another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / "index.html", skipped


def ensure_assets(runs: Path) -> None:
    """Put the assets that the pages of runs use beside them, unless they are there already."""
    place = runs / ASSETS_OF_RUNS
    if _up_to_date(place):
        return
    partial = runs / f".partial-{secrets.token_hex(4)}-assets"
    try:
        _copy_assets(partial)
        _swap(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cards(shown: list[Any]) -> list[dict[str, Any]]:
    """Group the runs by field, in the order in which the fields first appear."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in shown:
        claims = [claim for claim in run.result["claims"] if claim["judged"]]
        figures = run.result["figures"]
        card = {
            **run.result,
            "first": claims[0] if claims else None,
            "picture": f"{run.slug}/figures/{figures[0]['name']}.svg" if figures else None,
            "alternative": figures[0]["caption"] if figures else "",
            "held": sum(bool(claim["holds"]) for claim in claims),
            "judged": len(claims),
        }
        groups.setdefault(str(run.result.get("field", "")), []).append(card)
    return [{"field": field, "cards": cards} for field, cards in groups.items()]


def _with_index(neighbour: dict[str, str]) -> dict[str, str]:
    # From the file system a folder shows a listing, so the file is named.
    return {**neighbour, "href": neighbour["href"] + "index.html"}


def _assets() -> Path:
    return Path(__file__).resolve().parent / "assets"


def _copy_assets(to: Path) -> None:
    # shutil.copytree would hide a full disk in an error without a number.
    for source in _assets().rglob("*"):
        if source.is_file():
            copy = to / source.relative_to(_assets())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def _up_to_date(place: Path) -> bool:
    for source in _assets().rglob("*"):
        if not source.is_file():
            continue
        copy = place / source.relative_to(_assets())
        if not copy.is_file() or copy.stat().st_size != source.stat().st_size:
            return False
        # Of our own scripts and styles an edit may keep the size; the large ones are vendored.
        ours = source.parent == _assets()
        if ours and copy.read_bytes() != source.read_bytes():
            return False
    return True


def _swap(new: Path, place: Path) -> None:
    """Put ``new`` where ``place`` is; another process that does the same at once is no harm."""
    old = place.with_name(f".partial-{secrets.token_hex(4)}-old")
    with suppress(FileNotFoundError):
        os.rename(place, old)
    try:
        os.rename(new, place)
    except OSError:
        if not place.is_dir():
            raise
    shutil.rmtree(old, ignore_errors=True)
