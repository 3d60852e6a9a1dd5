"""CIFAR-10's binary format: records of one label and 3 x 32 x 32 bytes, and nothing around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.files import file_bytes
from kexue.lab.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CLASSES", "read_cifar", "read_class_names"]

CLASSES = 10
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32


def read_cifar(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 3, 32, 32) and labels of one or more files, in the order of the files."""
    import numpy as np

    records = np.concatenate([_records(path) for path in paths])
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0]


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names in ``batches.meta.txt``; None where it is absent."""
    path = folder / "batches.meta.txt"
    if not path.is_file():
        return None
    names = tuple(file_bytes(path).decode("utf-8", "replace").split())
    if len(names) != CLASSES:
        raise DataError(f"{path}: expected {CLASSES} names of classes, got {len(names)}")
    return names


def _records(path: Path) -> np.ndarray:
    import numpy as np

    contents = file_bytes(path)
    if not contents or len(contents) % _RECORD:
        raise DataError(
            f"{path}: expected CIFAR-10 records of {_RECORD} bytes each, got {len(contents)} bytes"
        )
    records = np.frombuffer(contents, np.uint8).reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 0] >= CLASSES)
    if wrong.size:
        raise DataError(
            f"{path}: expected CIFAR-10 labels from 0 to {CLASSES - 1}, "
            f"got {records[wrong[0], 0]} in record {wrong[0]}"
        )
    return records
