"""Batches of any structure: into chunks, through an encoder, and its outputs apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["split_batch"]


def split_batch(inputs: Any, chunk_size: int) -> list[Any]:
    """Return the chunks of a batch: the same structure, with parts of the tensors.

    Parameters
    ----------
    inputs : tensor, dict, tuple or list
        Nested or not. Tensors with a dimension are split along the first, which must have the same
        size for all; everything else goes to every chunk as it is.
    chunk_size : int
        Samples in a chunk; the last may have fewer.

    Returns
    -------
    list
        Chunks in the order of the batch. Their tensors are views.

    Raises
    ------
    ValueError
        For a chunk size that is no positive integer, an empty batch, tensors of different batch
        sizes, or no tensor to split.

    Examples
    --------
    >>> import torch
    >>> batch = {"ids": torch.arange(5), "kind": "query"}
    >>> split_batch(batch, 3)
    [{'ids': tensor([0, 1, 2]), 'kind': 'query'}, {'ids': tensor([3, 4]), 'kind': 'query'}]
    """
    check_chunk_size(chunk_size)
    leaves, spec = tree_flatten(open_mappings(inputs))
    sizes = [len(leaf) for leaf in leaves if _has_batch(leaf)]
    if not sizes:
        raise ValueError(
            "inputs must hold a tensor with a batch dimension, "
            f"got {', '.join(type(leaf).__name__ for leaf in leaves) or 'nothing'}"
        )
    if len(set(sizes)) > 1:
        raise ValueError(f"all tensors of one input must have the same batch size, got {sizes}")
    if sizes[0] == 0:
        raise ValueError("inputs must hold at least one sample, got an empty batch")
    count = -(-sizes[0] // chunk_size)
    parts = [leaf.split(chunk_size) if _has_batch(leaf) else (leaf,) * count for leaf in leaves]
    return [tree_unflatten(list(chunk), spec) for chunk in zip(*parts, strict=True)]


def apply(encoder: Callable[..., Any], chunk: Any) -> Any:
    # Dicts of their own: what an encoder writes into its input, the second pass must not see.
    chunk = tree_map(lambda value: value, chunk)
    if isinstance(chunk, Mapping):
        return encoder(**chunk)
    if isinstance(chunk, list | tuple):
        return encoder(*chunk)
    return encoder(chunk)


def flat_output(output: Any) -> tuple[list[Tensor], Any]:
    outputs, structure = tree_flatten(output)
    if not outputs or not all(_has_batch(leaf) for leaf in outputs):
        kinds = [
            f"{type(leaf).__name__} with {getattr(leaf, 'ndim', 0)} dimensions" for leaf in outputs
        ]
        raise TypeError(
            "an encoder must return a tensor, or a dict or tuple of tensors, whose first dimension "
            f"is the batch, got {', '.join(kinds) or 'nothing'}"
        )
    return outputs, structure


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def open_mappings(inputs: Any) -> Any:
    """Turn mappings that PyTorch's trees do not open, as tokenizers return them, into dicts."""
    return tree_map(lambda v: open_mappings(dict(v)) if isinstance(v, Mapping) else v, inputs)


def with_leaves(inputs: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Put leaves in the place of tensors that want a gradient; return both in pairs.

    What such a tensor was computed from can be walked through only once, not once for each chunk.
    """
    pairs: list[tuple[Tensor, Tensor]] = []

    def stand_in(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        pairs.append((value, value.detach().requires_grad_()))
        return pairs[-1][1]

    return tree_map(stand_in, inputs), pairs


def check_chunk_size(size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {size!r}")
