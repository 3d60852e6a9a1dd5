"""Runs on disk: each one whole or not there at all.

A run is a folder ``<root>/<slug>/<time>-<id>/`` with ``result.json``, ``figures/`` and
``page.html``. It is written under a temporary name beside its place and renamed at the end. The
writer holds a lock for as long as it lives, so what a killed process left behind is recognised and
swept by the next one, and two living ones never disturb each other.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from kexue.lab.errors import StoreError

try:
    import fcntl
except ImportError:  # a system without flock: nothing is swept there, nothing else changes
    fcntl = None  # type: ignore[assignment]

__all__ = ["SCHEMA", "Run", "newest_runs", "read_run", "sweep", "write_whole", "writing_run"]

SCHEMA = 1
_PARTIAL = ".partial-"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "slug": str,
    "title": str,
    "verdict": str,
    "budget": str,
    "seed": int,
    "started": str,
    "seconds": (int, float),
    "claims": list,
    "tables": list,
    "figures": list,
    "versions": dict,
    "machine": dict,
}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what ``result.json`` says."""

    folder: Path
    result: dict[str, Any]

    @property
    def slug(self) -> str:
        return str(self.result["slug"])


@contextmanager
def writing_run(root: Path, slug: str) -> Iterator[tuple[Path, Path]]:
    """Yield the folder to write in and the folder that it becomes when the block ends well.

    Raises
    ------
    StoreError
        When the folder cannot be made, written or renamed; any OSError inside the block counts.
    """
    home = root / slug
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    final = home / f"{moment}-{secrets.token_hex(3)}"
    partial = home / f"{_PARTIAL}{final.name}"
    with _as_store_error(home):
        home.mkdir(parents=True, exist_ok=True)
        sweep(home)
        lock = _hold(partial.with_name(partial.name + ".lock"))
    try:
        with _as_store_error(home):
            partial.mkdir()
            yield partial, final
            _flush_folder(partial)
            os.rename(partial, final)
            _flush_folder(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            os.unlink(lock.name)
        lock.close()


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or all of the new one.

    Raises
    ------
    StoreError
        When it cannot be written; what was there before stays.
    """
    data = content.encode() if isinstance(content, str) else content
    with _as_store_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{_PARTIAL}{secrets.token_hex(6)}-{path.name}")
        held = _hold(partial)
        try:
            os.write(held.fileno(), b"") if not data else _write_all(held.fileno(), data)
            os.fsync(held.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        finally:
            held.close()


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; never what a living one is writing."""
    if fcntl is None:
        return
    for left in folder.glob(f"{_PARTIAL}*"):
        if left.is_dir():
            continue
        try:
            with open(left, "rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.name.endswith(".lock"):
                    shutil.rmtree(left.with_name(left.name.removesuffix(".lock")), True)
                left.unlink(missing_ok=True)
        except OSError:
            continue  # held by a living writer, or already gone


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises
    ------
    StoreError
        When there is no result, or it is damaged, or of a newer schema; the message names it.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"expected a run, a folder with a result.json, got {folder}: give the path that "
            "`kexue run` printed"
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged and cannot be read: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("schema"), int):
        raise StoreError(f"{path} is damaged: expected an object with a schema version")
    if result["schema"] > SCHEMA:
        raise StoreError(
            f"{path} has schema {result['schema']}, this version reads up to {SCHEMA}: "
            "install a newer kexue to read it"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(result.get(key), kind):
            raise StoreError(f"{path} is damaged: {key!r} is missing or of another kind")
    try:
        for claim in result["claims"]:
            claim["measured"] = float(claim["measured"])
            claim["expected"] = float(claim["expected"])
            claim["statement"], claim["relation"], claim["holds"], claim["judged"]
        for table in result["tables"]:
            table["name"], table["columns"], table["rows"]
        for figure in result["figures"]:
            figure["name"], figure["caption"], float(figure["width"])
    except (TypeError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is damaged: a claim, table or figure lacks {error}") from None
    return Run(folder, result)


def newest_runs(root: Path) -> tuple[dict[str, Run], list[str]]:
    """Return the newest readable run of each study below ``root``, and why others were skipped."""
    newest: dict[str, Run] = {}
    skipped: list[str] = []
    if not root.is_dir():
        return newest, skipped
    for home in sorted(path for path in root.iterdir() if path.is_dir()):
        if home.name.startswith((".", "_")):
            continue
        for folder in sorted((p for p in home.iterdir() if p.is_dir()), reverse=True):
            if folder.name.startswith("."):
                continue
            try:
                newest[home.name] = read_run(folder)
                break
            except StoreError as error:
                skipped.append(str(error))
    return newest, skipped


def result_json(result: dict[str, Any]) -> str:
    """Return the text of a result; numbers that JSON lacks become strings that float() reads."""
    return json.dumps(_finite(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _hold(path: Path) -> IO[bytes]:
    handle = open(path, "xb")  # noqa: SIM115 - the caller keeps it open for as long as it writes
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _flush_folder(folder: Path) -> None:
    """Make names and content durable before the rename says that the run is there."""
    for path in [*folder.rglob("*"), folder] if folder.name.startswith(_PARTIAL) else [folder]:
        with suppress(OSError):  # some file systems refuse to sync a folder
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _as_store_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"the disk that holds {folder} is full: free some space there or choose another "
                "folder with --out"
            ) from error
        raise StoreError(
            f"{folder} cannot be written ({error.strerror}): choose another folder with --out"
        ) from error
