"""The authors' checkpoints without TensorFlow: a reader of the V2 bundle, and the names.

A bundle is an index, ``PREFIX.index``, and shards, ``PREFIX.data-SSSSS-of-NNNNN``, in which the
tensors lie raw. The index is a LevelDB table: blocks of prefix-compressed keys and values, and a
block of handles (offset and size) of these blocks, whose own handle stands in the last 48 bytes.
Values are protocol buffers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["convert_tensorflow_variables", "read_tensorflow_checkpoint"]

_FOOTER = 48
_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}
_STRING = 7
"""Keras stores the graph of its objects as a string beside the variables."""


def read_tensorflow_checkpoint(prefix: str | Path) -> dict[str, np.ndarray]:
    """Read all variables of a TensorFlow checkpoint, without TensorFlow.

    Parameters
    ----------
    prefix : str or Path
        Path of the files without ``.index`` and ``.data-SSSSS-of-NNNNN``.

    Returns
    -------
    dict of str to numpy.ndarray
        Float16, float32, float64, int32 and int64 variables by name. They are mapped into memory
        and read when they are used; writing to them does not change the file.

    Raises
    ------
    FileNotFoundError
        Where the index or a shard is missing.
    ValueError
        For a file that is no index, compressed blocks, truncated data, variables cut into slices,
        of another type or byte order.

    Examples
    --------
    >>> variables = read_tensorflow_checkpoint("bert_model.ckpt")  # doctest: +SKIP
    >>> variables["bert/embeddings/word_embeddings"].shape  # doctest: +SKIP
    (12000, 768)
    """
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise FileNotFoundError(f"there is no checkpoint index {index}")
    try:
        entries = dict(_table(index.read_bytes()))
    except _MalformedError as error:
        raise ValueError(f"{index} must be the index of a TensorFlow checkpoint: {error}") from None
    return _Bundle(str(prefix), entries).variables()


def convert_tensorflow_variables(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Turn the authors' variables into tensors under the names of the PyTorch files.

    Kernels, which TensorFlow lays out as (in, out), are transposed. Optimiser slots and counters
    are left out.

    Parameters
    ----------
    variables : mapping of str to numpy.ndarray
        What :func:`read_tensorflow_checkpoint` returns.

    Returns
    -------
    dict of str to Tensor
        Contiguous copies, for ``load_checkpoint_state``.

    Raises
    ------
    ValueError
        For variables that RoFormerV2 does not have: biases, ``beta``, ``gamma``, other matrices.

    Examples
    --------
    >>> variables = {"bert/encoder/layer_0/intermediate/dense/kernel": np.zeros((4, 6))}
    >>> [(name, tuple(t.shape)) for name, t in convert_tensorflow_variables(variables).items()]
    [('roformer.encoder.layer.0.intermediate.dense.weight', (6, 4))]
    """
    strange = sorted(name for name in variables if _is_strange(name))
    if strange:
        shown = ", ".join(strange[:8]) + (f" and {len(strange) - 8} more" * (len(strange) > 8))
        raise ValueError(
            "the checkpoint is not a RoFormerV2, which has no biases, no norm parameters and no "
            f"further matrices; unexpected: {shown}"
        )
    converted = {}
    for name, array in variables.items():
        kernel, embedding = _KERNEL.fullmatch(name), _EMBEDDING.fullmatch(name)
        if kernel:
            matrix = f"{kernel['matrix'].replace('/', '.')}.weight"
            converted[f"roformer.encoder.layer.{kernel['layer']}.{matrix}"] = _tensor(array).T
        elif embedding:
            converted[f"roformer.embeddings.{embedding['table']}.weight"] = _tensor(array)
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in converted.items()
    }


_KERNEL = re.compile(
    r"bert/encoder/layer_(?P<layer>\d+)/(?P<matrix>attention/self/(?:query|key|value)|"
    r"attention/output/dense|intermediate/dense|output/dense)/kernel"
)
_EMBEDDING = re.compile(r"bert/embeddings/(?P<table>word_embeddings|token_type_embeddings)")
_SLOT = re.compile(f"(?:{_KERNEL.pattern}|{_EMBEDDING.pattern})/.+")
_FOREIGN = re.compile(r"(?:.*/)?(?:output_)?(?:bias|beta|gamma)")


def _is_strange(name: str) -> bool:
    if _KERNEL.fullmatch(name) or _EMBEDDING.fullmatch(name) or _SLOT.fullmatch(name):
        return False
    return name.startswith("bert/") or _FOREIGN.fullmatch(name) is not None


def _tensor(array: np.ndarray) -> Tensor:
    # torch wants aligned memory that it could write to.
    return torch.from_numpy(np.require(array, requirements=["A", "W"]))


class _MalformedError(Exception):
    """The bytes are not what the format says; the message says what is wrong."""


class _Bundle:
    """Entries of an index, and the shards that hold their data."""

    def __init__(self, prefix: str, entries: dict[str, bytes]) -> None:
        self._prefix = prefix
        self._entries = entries
        self._shards: dict[int, np.ndarray] = {}
        header = self._fields("")
        self._count = _integer(header.get(1, [1]))
        if _integer(header.get(2, [0])) != 0:
            raise ValueError(f"{prefix} must be a little-endian checkpoint, got a big-endian one")

    def variables(self) -> dict[str, np.ndarray]:
        names = [name for name in self._entries if name]
        found = {name: self._variable(name) for name in names}
        return {name: array for name, array in found.items() if array is not None}

    def _fields(self, name: str) -> _Fields:
        if name not in self._entries:
            raise ValueError(f"{self._prefix}.index must begin with a header, got none")
        try:
            return _message(self._entries[name])
        except _MalformedError as error:
            raise ValueError(f"{self._prefix}.index, entry {name!r}: {error}") from None

    def _variable(self, name: str) -> np.ndarray | None:
        fields = self._fields(name)
        where = f"variable {name!r} of {self._prefix}"
        kind = _integer(fields.get(1, [0]))
        if kind == _STRING:
            return None
        if kind not in _DTYPES:
            raise ValueError(
                f"{where} must be of type float16, float32, float64, int32 or int64, got "
                f"TensorFlow's type {kind}"
            )
        if 7 in fields:
            raise ValueError(f"{where} must be stored whole, got a variable in slices")
        try:
            shape = tuple(_dimensions(fields))
        except _MalformedError as error:
            raise ValueError(f"{where}: {error}") from None
        dtype = np.dtype(_DTYPES[kind])
        offset, size = _integer(fields.get(4, [0])), _integer(fields.get(5, [0]))
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{where} has shape {shape} of {dtype}, but {size} bytes")
        shard = self._shard(_integer(fields.get(3, [0])))
        if offset + size > len(shard):
            raise ValueError(
                f"{where} ends at byte {offset + size}, but its file is truncated to {len(shard)}"
            )
        return shard[offset : offset + size].view(dtype).reshape(shape)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            path = Path(f"{self._prefix}.data-{number:05d}-of-{self._count:05d}")
            if not path.is_file():
                raise FileNotFoundError(f"there is no checkpoint data {path}")
            # Copy on write; and an empty file cannot be mapped.
            self._shards[number] = (
                np.memmap(path, np.uint8, "c").view(np.ndarray)
                if path.stat().st_size
                else np.zeros(0, np.uint8)
            )
        return self._shards[number]


def _table(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield keys and values of a LevelDB table."""
    if len(content) < _FOOTER or content[-len(_MAGIC) :] != _MAGIC:
        raise _MalformedError("it does not end with the magic number of a LevelDB table")
    footer = _Reader(content[-_FOOTER:])
    footer.handle()  # of the metaindex, which is empty here
    for _, handle in _block(content, footer.handle()):
        for key, value in _block(content, _Reader(handle).handle()):
            yield key.decode("utf-8", "replace"), value


class _Handle(NamedTuple):
    offset: int
    size: int


def _block(content: bytes, handle: _Handle) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of one block; a key begins with a share of the one before."""
    end = handle.offset + handle.size
    if end >= len(content):
        raise _MalformedError(f"a block ends at byte {end}, the file at {len(content)}")
    if content[end] != 0:
        raise _MalformedError(
            f"its blocks must not be compressed, got compression type {content[end]}"
        )
    block = content[handle.offset : end]
    restarts = int.from_bytes(block[-4:], "little")
    entries = _Reader(block[: len(block) - 4 * (restarts + 1)])
    if len(block) < 4 * (restarts + 1):
        raise _MalformedError(f"a block of {len(block)} bytes has {restarts} restart points")
    key = b""
    while not entries.exhausted:
        shared, unshared, length = entries.varint(), entries.varint(), entries.varint()
        if shared > len(key):
            raise _MalformedError(f"a key of {len(key)} bytes lends {shared} of them")
        key = key[:shared] + entries.take(unshared)
        yield key, entries.take(length)


class _Reader:
    """Bytes that are read from the front."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._place = 0

    @property
    def exhausted(self) -> bool:
        return self._place >= len(self._content)

    def take(self, count: int) -> bytes:
        end = self._place + count
        if end > len(self._content):
            raise _MalformedError("it ends in the middle of an entry")
        taken, self._place = self._content[self._place : end], end
        return taken

    def varint(self) -> int:
        value = shift = 0
        while shift < 64:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise _MalformedError("an integer has more than 64 bits")

    def handle(self) -> _Handle:
        return _Handle(self.varint(), self.varint())


_Fields = dict[int, list[int | bytes]]


def _message(content: bytes) -> _Fields:
    """Return the fields of a protocol buffer by number: integers, and bytes of all else."""
    fields: _Fields = {}
    reader = _Reader(content)
    while not reader.exhausted:
        number, wire = divmod(reader.varint(), 8)
        if wire == 0:
            value: int | bytes = reader.varint()
        elif wire == 2:
            value = reader.take(reader.varint())
        elif wire in (1, 5):
            value = reader.take(8 if wire == 1 else 4)
        else:
            raise _MalformedError(f"field {number} has the wire type {wire}")
        fields.setdefault(number, []).append(value)
    return fields


def _integer(values: list[int | bytes]) -> int:
    """Return the last value of a field, which is the one that counts."""
    return values[-1] if isinstance(values[-1], int) else 0


def _dimensions(fields: _Fields) -> Iterator[int]:
    for shape in fields.get(2, []):
        if isinstance(shape, bytes):
            for dimension in _message(shape).get(2, []):
                if isinstance(dimension, bytes):
                    yield _integer(_message(dimension).get(1, [0]))
