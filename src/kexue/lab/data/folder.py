"""A folder of PNG or JPEG files; subfolders, where there are any, are classes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.errors import DataError, NotRun

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = ["SUFFIXES", "read_folder", "read_pictures", "splits_of"]

SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = ("1", "L")
_COLOUR = ("RGB", "RGBA", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")
# What Pillow lets through of its own and its decoders' errors.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)


def splits_of(folder: Path) -> tuple[Path, Path] | None:
    """Return the subfolders ``train`` and ``test`` where a folder has these and no other."""
    names = {entry.name: entry for entry in _subfolders(folder)}
    return (names["train"], names["test"]) if set(names) == {"train", "test"} else None


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """Return the images (n, channels, height, width) of a folder, their labels and class names.

    Images stand in the order of their names. They are grey where all files are, else red, green and
    blue; transparency is dropped.
    """
    import numpy as np

    classes = _subfolders(folder)
    loose = _image_files(folder)
    if loose and classes:
        raise DataError(
            f"{folder}: expected images or one subfolder a class, got {len(loose)} images beside "
            f"{len(classes)} subfolders"
        )
    by_class = [_image_files(subfolder) for subfolder in classes]
    for subfolder, files in zip(classes, by_class, strict=True):
        if not files:
            raise DataError(f"{subfolder}: expected PNG or JPEG images of one class, got none")
    files = loose or [file for group in by_class for file in group]
    if not files:
        raise DataError(
            f"{folder}: expected IDX files, CIFAR-10 .bin files or PNG or JPEG images, got none"
        )
    pixels = read_pictures(files)
    if loose:
        return pixels, None, None
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in by_class])
    return pixels, labels, tuple(subfolder.name for subfolder in classes)


def read_pictures(files: list[Path]) -> np.ndarray:
    """Return PNG or JPEG files of one size as bytes (n, channels, height, width)."""
    import numpy as np

    modes, sizes = zip(*(_mode_and_size(file) for file in files), strict=True)
    width, height = sizes[0]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{file}: expected {width} x {height} pixels as in {files[0].name}, "
                f"got {size[0]} x {size[1]}"
            )
    grey = all(mode in _GREY for mode in modes)
    pixels = np.empty((len(files), 1 if grey else 3, height, width), np.uint8)
    for image, file in zip(pixels, files, strict=True):
        values = _values(file, "L" if grey else "RGB")
        image[:] = values if grey else values.transpose(2, 0, 1)
    return pixels


def _mode_and_size(file: Path) -> tuple[str, tuple[int, int]]:
    with _opened(file) as image:
        if image.mode not in (*_GREY, *_COLOUR):
            raise DataError(
                f"{file}: expected an image with 8 bits a channel, got the mode {image.mode}"
            )
        return image.mode, image.size


def _values(file: Path, mode: str) -> np.ndarray:
    import numpy as np

    with _opened(file) as image:
        try:
            return np.asarray(image.convert(mode))
        except _DAMAGED as error:
            raise DataError(
                f"{file}: expected a whole image, got a truncated or damaged one"
            ) from error


def _opened(file: Path) -> Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise NotRun(f"{file}: images need Pillow: pip install 'kexue[images]'") from error
    try:
        return Image.open(file)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: expected a PNG or JPEG image, got something else") from error


def _subfolders(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")
    )
