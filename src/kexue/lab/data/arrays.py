"""Arrays from NumPy, PyTorch and safetensors files, none of them unpickled."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.files import as_path, reading
from kexue.lab.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["ARRAY_SUFFIXES", "first_of", "read_arrays"]

_NUMPY_MAGIC = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")
_SINGLE = ""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in a file by name; a file of one array without a name has it under ``""``.

    Half-precision floats come back as float32, which numpy can compute with.
    """
    path = as_path(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a folder")
    return _READERS[path.suffix.lower()](path)


def first_of(arrays: dict[str, np.ndarray], *names: str) -> np.ndarray | None:
    """Return the array under the first of ``names`` that there is; None where there is none."""
    return next((arrays[name] for name in names if name in arrays), None)


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    with reading(path), path.open("rb") as stream:
        begin = stream.read(8)
    if not begin.startswith(_NUMPY_MAGIC):
        raise DataError(
            f"{path}: expected a NumPy file, which begins with 93 4e 55 4d 50 59 (.npy) or "
            f"50 4b 03 04 (.npz), got {begin[:6].hex(' ') or 'an empty file'}"
        )
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {_SINGLE: _plain(loaded)}
        with loaded:
            return {name: _plain(loaded[name]) for name in loaded.files}
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            raise DataError(
                f"{path}: expected arrays of numbers, got Python objects, which are never unpickled"
            ) from error
        raise DataError(
            f"{path}: expected a whole NumPy file, got a truncated or damaged one"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: expected a tensor or a state dict, got Python objects, which are never "
            "unpickled, or no PyTorch file at all"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: expected a whole PyTorch file, got a truncated or damaged one"
        ) from error
    named = {_SINGLE: loaded} if isinstance(loaded, torch.Tensor) else loaded
    if not isinstance(named, dict) or not all(isinstance(a, torch.Tensor) for a in named.values()):
        raise DataError(
            f"{path}: expected a tensor or a state dict, got a {type(loaded).__name__}"
            + (" that holds more than tensors" if isinstance(loaded, dict) else "")
        )
    return {str(name): _as_numpy(tensor) for name, tensor in named.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as kept:
            return {name: _as_numpy(kept.get_tensor(name)) for name in kept.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: expected a safetensors file, got a damaged or other one"
        ) from error


def _as_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().to_dense()
    # numpy has no bfloat16 and no 8-bit floats.
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return (tensor.float() if narrow else tensor).numpy()


def _plain(array: np.ndarray) -> np.ndarray:
    import numpy as np

    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


_READERS = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}
ARRAY_SUFFIXES = tuple(_READERS)
