"""The matrix of anchor scores, block by block, in memory or in a folder that survives a kill.

A block is a stretch of neighbouring items for one anchor query. In the folder:

``manifest.json``
    Version, items and anchor queries by SHA-256, and the item numbers at which blocks may not
    straddle. Always replaced as a whole; replacing it is what makes added items count.
``scores.bin``
    float32, one row an anchor query.
``progress.log``
    One line a finished block, ``row start stop checksum``, forced to disk after the block itself.
    A line counts if its checksum is that of what stands in ``scores.bin``.
``lock``
    Held by who writes; the system frees it when a process dies.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kexue._files import write_whole

__all__ = ["stored_shape"]

_VERSION = 1
_ITEM_SIZE = 4


class Block(NamedTuple):
    """Items start to stop of one anchor query."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Manifest:
    """What the matrix belongs to, and how it is cut into blocks."""

    n_anchor_queries: int
    n_items: int
    block_size: int
    anchor_queries: str
    items: str
    bounds: tuple[int, ...]
    """Item numbers where a call to add items began, 0 and the number of items among them."""
    version: int = _VERSION

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_anchor_queries, self.n_items

    @property
    def n_blocks(self) -> int:
        in_a_row = sum(math.ceil((high - low) / self.block_size) for low, high in self._stretches())
        return self.n_anchor_queries * in_a_row

    def blocks(self) -> Iterator[Block]:
        for row in range(self.n_anchor_queries):
            for low, high in self._stretches():
                for start in range(low, high, self.block_size):
                    yield Block(row, start, min(start + self.block_size, high))

    def _stretches(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.bounds)

    def extended(self, n_items: int, items: str) -> Manifest:
        return replace(self, n_items=n_items, items=items, bounds=(*self.bounds, n_items))


def stored_shape(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return how many anchor queries and items the index in a folder is about.

    An index that was killed while items were added knows them all or none: this tells which, so
    that it can be opened with the right items.

    Parameters
    ----------
    path : str or path
        A folder, as given to :class:`CURIndex`.

    Returns
    -------
    (int, int) or None
        Numbers of anchor queries and of items; None where no index has been created.

    Raises
    ------
    ValueError
        Where the folder holds a manifest that is none of this version.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from kexue.retrieval.cur import CURIndex
    >>> with TemporaryDirectory() as folder:
    ...     before = stored_shape(folder)
    ...     index = CURIndex(max, ["an item", "another"], ["a query"], path=folder)
    ...     before, stored_shape(folder)
    (None, (1, 2))
    """
    manifest = _read_manifest(Path(path))
    return None if manifest is None else manifest.shape


class MemoryScores:
    """Scores in an array; blocks are only remembered."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.matrix: Float[np.ndarray, "n_anchor_queries n_items"]
        self.matrix = np.zeros(manifest.shape, np.float32)
        self.done: set[Block] = set()

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def write(self, block: Block, scores: Float[np.ndarray, " size"]) -> None:
        self.matrix[block.row, block.start : block.stop] = scores
        self.done.add(block)

    def extend(self, manifest: Manifest) -> None:
        added = np.zeros((manifest.n_anchor_queries, manifest.n_items - self.manifest.n_items))
        self.matrix = np.concatenate([self.matrix, added.astype(np.float32)], axis=1)
        self.manifest = manifest


class StoredScores:
    """Scores in a folder."""

    def __init__(self, folder: Path, wanted: Manifest) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            found = _read_manifest(folder)
            if found is None:
                _create(folder, wanted)
            else:
                _check_same(folder, found, wanted)
                _finish_extension(folder, found)
            self._load(found or wanted)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer; takes over what another one has written since."""
        with _lock(self.folder):
            found = _read_manifest(self.folder)
            if found is None:
                raise RuntimeError(f"the index in {self.folder} was removed after it was opened")
            _check_same(self.folder, found, self.manifest)
            _finish_extension(self.folder, found)
            self._load(found)
            with (
                open(_scores(self.folder), "r+b") as self._data,
                open(_log(self.folder), "ab") as self._progress,
            ):
                self._complete_last_line()
                yield

    def write(self, block: Block, scores: Float[np.ndarray, " size"]) -> None:
        content = scores.tobytes()
        self._data.seek(_offset(block, self.manifest.n_items))
        self._data.write(content)
        _force(self._data)
        # Not before the data are safe: a line is a promise.
        self._progress.write(_line(block, content))
        _force(self._progress)
        self.done.add(block)

    def extend(self, manifest: Manifest) -> None:
        """Widen the rows in files beside the present ones, which the new manifest puts in force."""
        n_items = manifest.n_items
        with open(_scores(self.folder, n_items), "wb") as file:
            file.truncate(_size(manifest))
            for row, scores in enumerate(self.matrix):
                file.seek(_offset(Block(row, 0, 0), n_items))
                file.write(scores.tobytes())
            _force(file)
        with open(_log(self.folder, n_items), "wb") as file:
            for block in sorted(self.done):
                scores = self.matrix[block.row, block.start : block.stop]
                file.write(_line(block, scores.tobytes()))
            _force(file)
        _force_folder(self.folder)
        _write_manifest(self.folder, manifest)
        _finish_extension(self.folder, manifest)
        self._load(manifest)

    def _load(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.matrix = _mapped(self.folder, manifest)
        self.done = _finished_blocks(self.folder, manifest, self.matrix)

    def _complete_last_line(self) -> None:
        """A torn line ends here, so that the next one begins a line of its own."""
        path = _log(self.folder)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._progress.write(b"\n")


def digest(things: Iterable[Any], name: str) -> str:
    """SHA-256 of items or queries that consist of text, bytes, numbers and arrays.

    Raises
    ------
    TypeError
        For anything else, which has no bytes that would be the same tomorrow.
    """
    total = sha256()
    for thing in things:
        total.update(sha256(b"".join(_canonical(thing, name))).digest())
    return total.hexdigest()


def _canonical(thing: Any, name: str) -> Iterator[bytes]:
    """Bytes that tell different things apart: kind, length, content."""
    if type(thing).__module__.partition(".")[0] == "torch" and hasattr(thing, "detach"):
        thing = thing.detach().cpu().numpy()
    if isinstance(thing, str):
        kind, content = "text", thing.encode("utf-8", "surrogatepass")
    elif isinstance(thing, bytes | bytearray):
        kind, content = "bytes", bytes(thing)
    elif isinstance(thing, np.ndarray | np.generic) and not thing.dtype.hasobject:
        kind, content = f"{thing.dtype.str} {thing.shape}", thing.tobytes()
    elif thing is None or isinstance(thing, bool | int | float | complex):
        kind, content = type(thing).__name__, repr(thing).encode()
    elif isinstance(thing, list | tuple | dict):
        entries = thing.items() if isinstance(thing, dict) else thing
        kind = type(thing).__name__
        content = b"".join(part for entry in entries for part in _canonical(entry, name))
    else:
        raise TypeError(
            f"{name} of an index on disk must consist of text, bytes, numbers, arrays, lists, "
            f"tuples and dicts, got a {type(thing).__name__}"
        )
    yield f"{kind} {len(content)} ".encode()
    yield content


def _scores(folder: Path, n_items: int | None = None) -> Path:
    return folder / ("scores.bin" if n_items is None else f"scores.bin.{n_items}")


def _log(folder: Path, n_items: int | None = None) -> Path:
    return folder / ("progress.log" if n_items is None else f"progress.log.{n_items}")


def _size(manifest: Manifest) -> int:
    return _ITEM_SIZE * manifest.n_anchor_queries * manifest.n_items


def _offset(block: Block, n_items: int) -> int:
    return _ITEM_SIZE * (block.row * n_items + block.start)


def _line(block: Block, content: bytes) -> bytes:
    # The place is part of the checksum: equal scores elsewhere are not this block.
    place = f"{block.row} {block.start} {block.stop}"
    return f"{place} {zlib.crc32(content, zlib.crc32(place.encode())):08x}\n".encode()


def _create(folder: Path, manifest: Manifest) -> None:
    """Files first, manifest last: there is no index before the manifest."""
    with open(_scores(folder), "wb") as file:
        file.truncate(_size(manifest))
        _force(file)
    with open(_log(folder), "wb") as file:
        _force(file)
    _write_manifest(folder, manifest)


def _mapped(folder: Path, manifest: Manifest) -> np.ndarray:
    path = _scores(folder)
    # Blocks beyond the end of a file that was cut short are zeros, which no checksum confirms.
    if not path.exists() or path.stat().st_size < _size(manifest):
        with open(path, "ab") as file:
            file.truncate(_size(manifest))
    _log(folder).touch()
    return np.memmap(path, np.float32, mode="r", shape=manifest.shape)


def _finished_blocks(folder: Path, manifest: Manifest, matrix: np.ndarray) -> set[Block]:
    """Blocks whose line is complete and whose scores are those that it speaks of."""
    possible = set(manifest.blocks())
    finished = set()
    for line in _log(folder).read_bytes().splitlines(keepends=True):
        try:
            block = Block(*(int(word) for word in line.split()[:3]))
        except (TypeError, ValueError):
            continue
        if block in possible and block not in finished:
            scores = matrix[block.row, block.start : block.stop]
            if line == _line(block, scores.tobytes()):
                finished.add(block)
    return finished


def _finish_extension(folder: Path, manifest: Manifest) -> None:
    """Move widened files into place if the manifest counts their items, else drop them."""
    for name in ("scores.bin", "progress.log"):
        for path in folder.glob(f"{name}.*"):
            if not path.suffix[1:].isdigit():
                continue  # none of ours
            if path.name == f"{name}.{manifest.n_items}":
                os.replace(path, folder / name)
            else:
                path.unlink()
    _force_folder(folder)


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    if found.shape != wanted.shape:
        raise ValueError(
            f"the index in {folder} is about {found.shape[0]} anchor queries and {found.shape[1]} "
            f"items, got {wanted.shape[0]} and {wanted.shape[1]}"
        )
    for name in ("anchor_queries", "items"):
        if getattr(found, name) != getattr(wanted, name):
            what = name.replace("_", " ")
            raise ValueError(f"the index in {folder} is about other {what} than those given")


def _read_manifest(folder: Path) -> Manifest | None:
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, expected {_VERSION}")
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError("its checksum is that of other content")
        content["bounds"] = tuple(content["bounds"])
        return Manifest(**content)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no manifest of an index: {error}") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = json.loads(json.dumps(asdict(manifest)))
    content["checksum"] = _checksum(content)
    write_whole(folder / "manifest.json", json.dumps(content, indent=1))


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _force(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _force_folder(folder: Path) -> None:
    """Make renames last; not every system lets a folder be opened for this."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"the index in {folder} is being written by someone else; try again when it is done"
            ) from None
        yield
