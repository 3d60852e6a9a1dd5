"""Images in [-1, 1] from the embedded digits and from what a user hands in.

Doors: IDX files (plain or gzipped), CIFAR-10's binary files, ``.npy`` and ``.npz`` arrays, folders
of PNG or JPEG files. All of them hold 8-bit images, so their values are multiples of 2/255.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.errors import DataError, NotRun

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int64
    from torch import Tensor

__all__ = ["Images", "Split", "digits", "images", "photographs"]


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

    @property
    def bin_width(self) -> float:
        """Distance between two neighbouring values."""
        return 2 / (self.levels - 1)


def digits(*, held_out: int = 200) -> Images:
    """Return scikit-learn's 1797 handwritten digits, 8 x 8 pixels with 17 levels.

    They stand in one fixed random order, whatever the seed; the first ``held_out`` of it are for
    testing.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    if not 1 <= held_out < len(pixels):
        raise ValueError(f"held_out must be between 1 and {len(pixels) - 1}, got {held_out}")
    return _split(
        "digits", pixels.reshape(-1, 1, 8, 8), labels, levels=17, held_out=held_out, seed=0
    )


def photographs() -> list[Float32[Tensor, "3 height width"]]:
    """Return scikit-learn's two sample photographs, a Chinese pagoda and a flower, in [-1, 1]."""
    try:
        from sklearn.datasets import load_sample_images

        pixels = load_sample_images().images
    except ImportError as error:
        raise NotRun("photographs need Pillow: pip install 'kexue[images]'") from error
    return [_in_unit_range(image.transpose(2, 0, 1), levels=256) for image in pixels]


def _split(
    name: str,
    pixels: np.ndarray,
    labels: np.ndarray | None,
    *,
    levels: int,
    held_out: int,
    seed: int,
) -> Images:
    import numpy as np

    # The stream of RandomState is frozen, so a split is the same with every version of numpy.
    order = np.random.RandomState(seed).permutation(len(pixels))
    test, train = order[:held_out], order[held_out:]

    def part(chosen: np.ndarray) -> Split:
        return _as_split(pixels[chosen], None if labels is None else labels[chosen], levels)

    return Images(name, levels, part(train), part(test))


def _as_split(pixels: np.ndarray, labels: np.ndarray | None, levels: int) -> Split:
    import torch

    classes = None if labels is None else torch.from_numpy(labels.astype("int64"))
    return Split(_in_unit_range(pixels, levels), classes)


def _in_unit_range(pixels: np.ndarray, levels: int) -> Float32[Tensor, "..."]:
    import numpy as np
    import torch

    # In float32 all through: 2k/(levels-1) - 1 is rounded twice, to within 1e-7.
    scaled = np.ascontiguousarray(pixels, dtype=np.float32) * np.float32(
        2 / (levels - 1)
    ) - np.float32(1)
    return torch.from_numpy(scaled)


def images(path: str | Path, *, seed: int = 0) -> Images:
    """Return the images in a file or folder."""
    raise DataError(f"{path}: expected images")
