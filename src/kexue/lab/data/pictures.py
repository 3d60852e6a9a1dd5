"""Images in [-1, 1] from the embedded digits and from what a user hands in.

Doors: IDX files (plain or gzipped), CIFAR-10's binary files, ``.npy`` and ``.npz`` arrays, folders
of PNG or JPEG files. All of them hold 8-bit images, so neighbouring values are 2/255 apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.arrays import first_of, read_arrays
from kexue.lab.data.cifar import read_cifar, read_class_names
from kexue.lab.data.files import as_path, file_bytes, reading
from kexue.lab.data.folder import SUFFIXES, read_folder, read_pictures, splits_of
from kexue.lab.data.idx import is_idx_images, labels_beside, read_idx
from kexue.lab.errors import DataError, NotRun

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int64
    from torch import Tensor

__all__ = ["Images", "Split", "digits", "images", "photographs", "pictures"]

_LEVELS = 256
_CHANNELS = (1, 3)


@dataclass(frozen=True, eq=False)
class Split:
    """Images in [-1, 1], and where they are known their classes."""

    images: Float32[Tensor, "n channels height width"]
    labels: Int64[Tensor, " n"] | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of images that take ``levels`` equidistant values from -1 to 1."""

    name: str
    levels: int
    train: Split
    test: Split
    class_names: tuple[str, ...] | None = None

    @property
    def bin_width(self) -> float:
        """Distance between two neighbouring values."""
        return 2 / (self.levels - 1)


@dataclass(frozen=True, eq=False)
class _Pixels:
    """What a door read: bytes (n, channels, height, width) and labels (n,)."""

    values: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None = None


def digits(*, held_out: int = 200) -> Images:
    """Return scikit-learn's 1797 handwritten digits, 8 x 8 pixels with 17 levels.

    They stand in one fixed random order, whatever the seed; the first ``held_out`` of it are for
    testing.
    """
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    if not 1 <= held_out < len(values):
        raise ValueError(f"held_out must be between 1 and {len(values) - 1}, got {held_out}")
    pixels = _Pixels(values.reshape(-1, 1, 8, 8), labels, tuple("0123456789"))
    return _split_at_random("digits", pixels, levels=17, held_out=held_out, seed=0)


def photographs() -> list[Float32[Tensor, "3 height width"]]:
    """Return scikit-learn's two sample photographs, a Chinese pagoda and a flower, in [-1, 1]."""
    from sklearn.datasets import load_sample_images

    try:
        pixels = load_sample_images().images
    except ImportError as error:
        raise NotRun("photographs need Pillow: pip install 'kexue[images]'") from error
    return [_in_unit_range(image.transpose(2, 0, 1), levels=_LEVELS) for image in pixels]


def images(path: str | Path, *, seed: int = 0) -> Images:
    """Return the 8-bit images in a file or folder.

    Parameters
    ----------
    path : str or Path
        One of

        - an IDX file of images, plain or gzipped, whose labels lie beside it under the usual name
          (``train-images-idx3-ubyte.gz`` and ``train-labels-idx1-ubyte.gz``), or a folder of these;
        - a CIFAR-10 ``.bin`` file, or a folder of ``data_batch_*.bin`` and ``test_batch.bin``;
        - a ``.npy`` file, or a ``.npz`` file with ``images`` or ``x`` and perhaps ``labels`` or
          ``y``, or with ``x_train``, ``x_test`` and perhaps ``y_train``, ``y_test``; of type uint8
          and shape (n, height, width), (n, height, width, channels) or
          (n, channels, height, width) with 1 or 3 channels;
        - a folder of PNG or JPEG files of one size, in subfolders where they have classes, and
          above these in ``train`` and ``test`` where they have a split.
    seed : int
        Where the data have no split of their own, they are put into a random order and a tenth is
        held out; the seed decides both.

    Returns
    -------
    Images
        With 256 levels.

    Raises
    ------
    DataError
        Where a file is not what it should be.
    NotRun
        Where reading it needs Pillow, which is absent.
    """
    path = as_path(path)
    with reading(path):
        train, test = _read_folder(path) if path.is_dir() else _read_file(path)
    if test is None:
        count = len(train.values)
        if count < 2:
            raise DataError(f"{path}: expected at least two images, to hold one out, got {count}")
        return _split_at_random(
            path.name, train, levels=_LEVELS, held_out=max(1, count // 10), seed=seed
        )
    if train.values.shape[1:] != test.values.shape[1:]:
        raise DataError(
            f"{path}: expected test images of the training images' channels, height and width "
            f"{train.values.shape[1:]}, got {test.values.shape[1:]}"
        )
    if train.class_names != test.class_names:
        raise DataError(
            f"{path}: expected the same classes for training and testing, got {train.class_names} "
            f"and {test.class_names}"
        )
    return Images(
        path.name, _LEVELS, _as_split(train, _LEVELS), _as_split(test, _LEVELS), train.class_names
    )


def pictures(paths: Sequence[str | Path]) -> Float32[Tensor, "n channels height width"]:
    """Return PNG or JPEG files of one size, in [-1, 1]: grey where all are, else in colour.

    Raises
    ------
    DataError
        Where one is no such file, or has another size than the first.
    NotRun
        Where Pillow is absent.
    """
    files = [as_path(path) for path in paths]
    for file in files:
        if file.is_dir() or file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{file}: expected a PNG or JPEG file")
    return _in_unit_range(read_pictures(files), levels=_LEVELS)


def _read_file(path: Path) -> tuple[_Pixels, _Pixels | None]:
    if path.suffix.lower() in (".npy", ".npz"):
        return _read_numpy(path)
    if path.suffix.lower() == ".bin":
        return _Pixels(*read_cifar([path]), read_class_names(path.parent)), None
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path}: expected a folder of images, got a single one")
    if not is_idx_images(path) and not (begin := file_bytes(path)[:4]).startswith(b"\0\0"):
        raise DataError(
            f"{path}: expected an IDX, CIFAR-10 .bin, .npy or .npz file or a folder of images, got "
            f"a file that begins with {begin.hex(' ') or 'nothing'}"
        )
    return _read_idx(path), None


def _read_folder(path: Path) -> tuple[_Pixels, _Pixels | None]:
    idx = _by_split(sorted(file for file in path.iterdir() if is_idx_images(file)))
    if idx:
        if not all(len(files) == 1 for files in idx.values()):
            names = ", ".join(file.name for files in idx.values() for file in files)
            raise DataError(
                f"{path}: expected one IDX file of images for training and one for testing, got "
                f"{names}"
            )
        return _train_and_test({split: _read_idx(files[0]) for split, files in idx.items()})
    records = sorted(path.glob("*.bin"))
    if records:
        classes = read_class_names(path)
        return _train_and_test(
            {
                split: _Pixels(*read_cifar(files), classes)
                for split, files in _by_split(records).items()
            }
        )
    own_split = splits_of(path)
    if own_split is not None:
        train, test = own_split
        return _Pixels(*read_folder(train)), _Pixels(*read_folder(test))
    return _Pixels(*read_folder(path)), None


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Tell files for testing by their names, and count a file once that also lies there gzipped."""
    split: dict[str, list[Path]] = {}
    plain = {file.name for file in files}
    for file in files:
        if file.name.removesuffix(".gz") in plain and file.suffix == ".gz":
            continue
        testing = file.name.startswith(("t10k", "test")) or "-test-" in file.name
        split.setdefault("test" if testing else "train", []).append(file)
    return split


def _train_and_test(read: dict[str, _Pixels]) -> tuple[_Pixels, _Pixels | None]:
    if len(read) == 1:
        return next(iter(read.values())), None
    return read["train"], read["test"]


def _read_idx(path: Path) -> _Pixels:
    labels = labels_beside(path)
    if labels is None:
        return _as_pixels(path, read_idx(path), None)
    return _as_pixels(path, read_idx(path), read_idx(labels), where_labels=labels)


def _read_numpy(path: Path) -> tuple[_Pixels, _Pixels | None]:
    arrays = read_arrays(path)
    train, test = first_of(arrays, "x_train"), first_of(arrays, "x_test")
    if train is not None and test is not None:
        return (
            _as_pixels(path, train, first_of(arrays, "y_train")),
            _as_pixels(path, test, first_of(arrays, "y_test")),
        )
    values = first_of(arrays, "", "images", "x")
    if values is None:
        raise DataError(
            f"{path}: expected an array called images or x, or x_train and x_test, got "
            f"{', '.join(arrays) or 'no array'}"
        )
    return _as_pixels(path, values, first_of(arrays, "labels", "y")), None


def _as_pixels(
    path: Path,
    values: np.ndarray,
    labels: np.ndarray | None,
    *,
    where_labels: Path | None = None,
) -> _Pixels:
    """Bring images into the order (n, channels, height, width), and check that labels fit them."""
    if values.dtype.name != "uint8":
        raise DataError(f"{path}: expected images of type uint8, got {values.dtype.name}")
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and values.shape[-1] in _CHANNELS:
        values = values.transpose(0, 3, 1, 2)
    elif values.ndim != 4 or values.shape[1] not in _CHANNELS:
        raise DataError(
            f"{path}: expected images of shape (n, height, width), (n, height, width, channels) or "
            f"(n, channels, height, width) with 1 or 3 channels, got {values.shape}"
        )
    if 0 in values.shape:
        raise DataError(f"{path}: expected images, got an empty array of shape {values.shape}")
    if labels is None:
        return _Pixels(values, None)
    where = where_labels or path
    if labels.shape not in ((len(values),), (len(values), 1)):
        raise DataError(
            f"{where}: expected {len(values)} labels, one an image, got labels of shape "
            f"{labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: expected labels that are integers, got {labels.dtype.name}")
    return _Pixels(values, labels.reshape(-1))


def _split_at_random(
    name: str, pixels: _Pixels, *, levels: int, held_out: int, seed: int
) -> Images:
    import numpy as np

    # The stream of RandomState is frozen, so a split is the same with every version of numpy.
    order = np.random.RandomState(seed).permutation(len(pixels.values))

    def part(chosen: np.ndarray) -> Split:
        labels = None if pixels.labels is None else pixels.labels[chosen]
        return _as_split(_Pixels(pixels.values[chosen], labels), levels)

    return Images(name, levels, part(order[held_out:]), part(order[:held_out]), pixels.class_names)


def _as_split(pixels: _Pixels, levels: int) -> Split:
    import torch

    labels = None if pixels.labels is None else torch.from_numpy(pixels.labels.astype("int64"))
    return Split(_in_unit_range(pixels.values, levels), labels)


def _in_unit_range(values: np.ndarray, levels: int) -> Float32[Tensor, "..."]:
    import numpy as np
    import torch

    scaled = np.array(values, dtype=np.float32, order="C")
    scaled *= np.float32(2 / (levels - 1))
    scaled -= np.float32(1)
    return torch.from_numpy(scaled)
