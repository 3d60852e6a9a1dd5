"""The IDX format of MNIST and its relatives: arrays of numbers behind a header of a few bytes.

A file begins with two zero bytes, one that names the type of the numbers and one that counts the
dimensions; then the size of each dimension as a big-endian 32-bit integer; then the numbers.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.files import as_path, file_bytes
from kexue.lab.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["is_idx_images", "labels_beside", "read_idx"]

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGES_NAME = re.compile(r"images?(?P<dot>[-.])idx[34](?P<kind>[-.]ubyte)?(?:\.gz)?$")


def is_idx_images(path: Path) -> bool:
    """Whether a file is called as IDX files of images are."""
    return _IMAGES_NAME.search(path.name) is not None


def labels_beside(images: Path) -> Path | None:
    """Return the file of labels that belongs to a file of images, gzipped or not; None without."""
    match = _IMAGES_NAME.search(images.name)
    if match is None:
        return None
    name = f"{images.name[: match.start()]}labels{match['dot']}idx1{match['kind'] or ''}"
    candidates = (images.with_name(name), images.with_name(f"{name}.gz"))
    return next((labels for labels in candidates if labels.is_file()), None)


def read_idx(path: str | Path) -> np.ndarray:
    """Return the array in an IDX file, plain or gzipped, in the byte order of this machine.

    Raises
    ------
    DataError
        For a wrong magic number, and for a file that is shorter or longer than its header says.
    """
    import numpy as np

    path = as_path(path)
    contents = file_bytes(path)
    zeros, code, ndim = contents[:2], *contents[2:4].ljust(2, b"\0")
    if len(contents) < 4 or zeros != b"\0\0" or code not in _TYPES or ndim == 0:
        raise DataError(
            f"{path}: expected an IDX file, which begins with the bytes 00 00, a type "
            f"(08, 09, 0b to 0e) and a number of dimensions, got {contents[:4].hex(' ') or 'none'}"
        )
    begin = 4 + 4 * ndim
    if len(contents) < begin:
        raise DataError(
            f"{path}: expected an IDX header of {begin} bytes, got a file of {len(contents)}"
        )
    shape = struct.unpack(f">{ndim}I", contents[4:begin])
    dtype = np.dtype(_TYPES[code])
    size = begin + dtype.itemsize * math.prod(shape)
    if len(contents) != size:
        raise DataError(
            f"{path}: expected {size} bytes, for {' x '.join(map(str, shape))} values of type "
            f"{dtype.newbyteorder('=').name}, got {len(contents)}"
        )
    values = np.frombuffer(contents, dtype, offset=begin).reshape(shape)
    return values.astype(dtype.newbyteorder("="))
