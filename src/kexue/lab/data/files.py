"""Reading a file that a user handed in, plain or gzipped, and refusing one that is damaged."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kexue.lab.errors import DataError

__all__ = ["as_path", "digest", "file_bytes", "file_text", "is_text", "reading"]

_GZIP_MAGIC = b"\x1f\x8b"


def as_path(path: str | Path) -> Path:
    """Return ``path`` with ``~`` expanded; refuse one where there is nothing."""
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: expected a file or a folder, there is nothing of this name")
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the file system inside the block into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: expected to read it, got the error {error.strerror}"
        ) from error


def file_bytes(path: str | Path) -> bytes:
    """Return a file's contents, unpacked where it is a gzip file, whatever it is called."""
    path = as_path(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a folder")
    with reading(path):
        packed = path.read_bytes()
    if not packed.startswith(_GZIP_MAGIC):
        return packed
    try:
        return gzip.decompress(packed)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a whole gzip file, got a truncated or damaged one ({error})"
        ) from error


def file_text(path: str | Path) -> str:
    """Return a UTF-8 file's text, with ``\\n`` at the end of each line and no byte-order mark."""
    contents = file_bytes(path)
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, got the byte 0x{contents[error.start]:02x} "
            f"at position {error.start}"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: expected text, got an empty file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_text(path: Path) -> bool:
    """Whether a file, plain or gzipped, begins as UTF-8 text does."""
    if path.is_dir():
        return False
    begin = file_bytes(path)[:4096]
    # A character of up to four bytes may be cut at the end.
    readable = codecs.getincrementaldecoder("utf-8")()
    try:
        return "\0" not in readable.decode(begin) and bool(begin)
    except UnicodeDecodeError:
        return False


def digest(path: Path, *beside: Path) -> str:
    """Return the SHA-256 of a file's contents, or of the names and contents below a folder.

    Files ``beside`` the first one, which are read along with it, count with it.
    """
    total = hashlib.sha256()
    with reading(path):
        if path.is_dir():
            for file in sorted(file for file in path.rglob("*") if file.is_file()):
                total.update(file.relative_to(path).as_posix().encode() + b"\0")
                total.update(_contents_digest(file))
        else:
            for file in (path, *beside):
                total.update(_contents_digest(file))
    return total.hexdigest()


def _contents_digest(file: Path) -> bytes:
    # A digest of digests keeps the end of one file apart from the beginning of the next.
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
