"""What decoding remembers: keys and values of the tokens so far."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """Keys and values of one attention layer, in the order in which they came.

    Appending makes new tensors, so a gradient may flow through earlier steps, and tensors that were
    handed out before stay as they are.

    Attributes
    ----------
    length : int
        Number of cached tokens.
    key : Tensor (batch, key_heads, length, key_dim) or None
        Cached keys; None while there are none.
    value : Tensor (batch, value_heads, length, value_dim) or None
        Cached values.

    Raises
    ------
    ValueError
        When what is appended has another batch, other heads or other sizes than what is there, or
        for a ``crop`` to more than there is.

    Examples
    --------
    >>> cache = KeyValueCache()
    >>> key, value = cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5))
    >>> key, value = cache.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 5))
    >>> cache.length, key.shape, value.shape
    (4, torch.Size([1, 2, 4, 4]), torch.Size([1, 2, 4, 5]))
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return 0 if self.key is None else self.key.shape[2]

    def __repr__(self) -> str:
        return f"KeyValueCache(length={self.length})"

    def append(
        self,
        key: Float[Tensor, "batch key_heads new key_dim"],
        value: Float[Tensor, "batch value_heads new value_dim"],
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of further tokens; return all there are now."""
        for name, new, old in (("key", key, self.key), ("value", value, self.value)):
            if new.ndim != 4:
                raise ValueError(
                    f"{name} must have shape (batch, heads, length, size), got {tuple(new.shape)}"
                )
            if old is not None and _but_length(new) != _but_length(old):
                raise ValueError(
                    f"{name} must have the batch, heads and size of the cache, "
                    f"{_but_length(old)}, got {_but_length(new)}"
                )
        if (len(key), key.shape[2]) != (len(value), value.shape[2]):
            raise ValueError(
                "key and value must have the same batch and length, "
                f"got {(len(key), key.shape[2])} and {(len(value), value.shape[2])}"
            )
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        return key, value

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens only."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and {self.length}, got {length}")
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]

    def reorder(self, batch_indices: Integer[Tensor, " batch"]) -> None:
        """Take the examples with these indices as the new batch, as beam search does."""
        if batch_indices.ndim != 1 or batch_indices.is_floating_point():
            raise ValueError(
                "batch_indices must be one-dimensional integers, "
                f"got {batch_indices.dtype} {tuple(batch_indices.shape)}"
            )
        if self.key is not None and self.value is not None:
            self.key = self.key.index_select(0, batch_indices.to(self.key.device))
            self.value = self.value.index_select(0, batch_indices.to(self.value.device))

    def reset(self) -> None:
        """Forget everything."""
        self.key = self.value = None


def _but_length(x: Tensor) -> tuple[int, int, int]:
    batch, heads, _, size = x.shape
    return batch, heads, size
