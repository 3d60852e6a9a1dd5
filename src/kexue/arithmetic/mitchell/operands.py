"""What the functions of this package accept, and how a result goes back to the caller's kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kexue.arithmetic.mitchell.patterns import LAYOUTS

__all__: list[str] = []

Array: TypeAlias = Float[Tensor, "..."] | Float[np.ndarray, "..."] | np.floating | float
"""A torch tensor, a numpy array or scalar, or a Python number."""

Result: TypeAlias = Float[Any, "..."]
"""A torch tensor, or a numpy array or scalar: never a Python number."""

_NUMPY = {np.dtype(name): getattr(torch, name) for name in ("float16", "float32", "float64")}


def operands(*values: Any) -> tuple[list[Tensor], Callable[[Tensor], Any]]:
    """Tensors of one dtype, and the function that turns a result into the caller's kind."""
    arrays = [value for value in values if not _is_number(value)]
    if any(isinstance(array, Tensor) for array in arrays):
        return _of_torch(values), lambda result: result
    return _of_numpy(values, arrays), lambda result: result.numpy()[()]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool | np.generic)


def _of_torch(values: tuple[Any, ...]) -> list[Tensor]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    for value in values:
        if not isinstance(value, Tensor) and not _is_number(value):
            raise TypeError(f"expected two tensors or two arrays, got Tensor and {_kind(value)}")
    for tensor in tensors:
        if tensor.dtype not in LAYOUTS:
            raise _wrong_type(str(tensor.dtype).removeprefix("torch."))
    # As in torch, a tensor without dimensions decides only among its like.
    deciding = [tensor for tensor in tensors if tensor.ndim] or tensors
    dtype, device = reduce(torch.promote_types, (t.dtype for t in deciding)), deciding[0].device
    return [
        value.to(dtype)
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=dtype, device=device)
        for value in values
    ]


def _of_numpy(values: tuple[Any, ...], arrays: list[Any]) -> list[Tensor]:
    for array in arrays:
        if not isinstance(array, np.ndarray | np.generic):
            raise _wrong_type(_kind(array))
        # newbyteorder: files keep numbers in the byte order of other machines.
        if array.dtype.newbyteorder("=") not in _NUMPY:
            raise _wrong_type(str(array.dtype))
    dtype = np.result_type(*(array.dtype for array in arrays)) if arrays else np.dtype(float)
    natives = [np.asarray(value, dtype=dtype.newbyteorder("="), order="C") for value in values]
    # torch warns of arrays that it must not write to, although nobody does here.
    return [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in natives]


def _kind(value: Any) -> str:
    return type(value).__name__


def _wrong_type(got: str) -> TypeError:
    return TypeError(f"expected float16, bfloat16, float32 or float64, got {got}")
