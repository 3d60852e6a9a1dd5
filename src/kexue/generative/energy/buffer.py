"""A buffer of the states in which chains ended, from which the next ones start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["ReplayBuffer"]

InitSampler = Callable[[int, torch.Generator | None], Tensor]


class ReplayBuffer:
    """Keep the last states of chains; draw starts from them, and some afresh.

    Chains that always start from noise are too short to get anywhere; chains that go on from where
    earlier ones ended are long ones, and the fresh starts keep them from staying in a few places.

    Parameters
    ----------
    capacity : int
        Number of states; when it is reached, the oldest make place.
    sample_shape : sequence of int
        Shape of a state.
    reinit_probability : float
        Probability of a fresh start, in [0, 1].
    init_sampler : callable, optional
        ``(n, generator) -> (n, *sample_shape)`` draws fresh starts; uniform in [0, 1) by default.
    dtype, device
        Of the states.
    generator : torch.Generator, optional
        Source of randomness, on that device.

    Raises
    ------
    ValueError
        For a capacity below 1, a probability outside [0, 1], states of another shape.

    Examples
    --------
    >>> buffer = ReplayBuffer(3, (2,), reinit_probability=0.0)
    >>> buffer.add(torch.arange(8.0).reshape(4, 2))
    >>> len(buffer), sorted(set(buffer.draw(100)[:, 0].tolist()))
    (3, [2.0, 4.0, 6.0])
    """

    def __init__(
        self,
        capacity: int,
        sample_shape: Sequence[int],
        *,
        reinit_probability: float = 0.05,
        init_sampler: InitSampler | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        if not 0 <= reinit_probability <= 1:
            raise ValueError(f"reinit_probability must be in [0, 1], got {reinit_probability}")
        self.capacity = capacity
        self.sample_shape = tuple(sample_shape)
        self.reinit_probability = reinit_probability
        self.init_sampler = init_sampler
        self.generator = generator
        self._states = torch.zeros((capacity, *self.sample_shape), dtype=dtype, device=device)
        self._size = 0
        self._next = 0

    def __len__(self) -> int:
        return self._size

    def draw(self, n: int) -> Float[Tensor, " n *sample"]:
        """Return copies of ``n`` states, each with some probability a fresh one instead."""
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        if not self._size:
            return self.fresh(n)
        uniform = torch.rand(n, device=self._states.device, generator=self.generator)
        starts = self.stored(n)
        anew = (uniform < self.reinit_probability).nonzero().squeeze(1)
        if len(anew):
            starts.index_copy_(0, anew, self.fresh(len(anew)))
        return starts

    def stored(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " n *sample"]:
        """Return copies of ``n`` stored states, drawn with replacement.

        The buffer's own generator is used where none is given.
        """
        if not self._size:
            raise ValueError("the buffer must hold some states to draw stored ones, got none")
        device = self._states.device
        rows = torch.randint(self._size, (n,), device=device, generator=generator or self.generator)
        return self._states.index_select(0, rows)

    def fresh(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " n *sample"]:
        """Return ``n`` fresh starts; the buffer's own generator is used where none is given."""
        shape = (n, *self.sample_shape)
        like, generator = self._states, generator or self.generator
        if self.init_sampler is None:
            return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
        drawn = self.init_sampler(n, generator)
        if tuple(drawn.shape) != shape:
            raise ValueError(f"init_sampler must give shape {shape}, got {tuple(drawn.shape)}")
        return drawn.detach().to(like, copy=True)

    def add(self, samples: Float[Tensor, " n *sample"]) -> None:
        """Store copies of states; the oldest ones make place when there is none."""
        if tuple(samples.shape[1:]) != self.sample_shape or samples.ndim == 0:
            raise ValueError(
                f"samples must have shape (n, {', '.join(map(str, self.sample_shape))}), "
                f"got {tuple(samples.shape)}"
            )
        kept = samples.detach()[-self.capacity :].to(self._states)
        # As if all had been stored, one after the other.
        first = self._next + len(samples) - len(kept)
        places = torch.arange(first, first + len(kept), device=self._states.device) % self.capacity
        self._states.index_copy_(0, places, kept)
        self._next = (self._next + len(samples)) % self.capacity
        self._size = min(self._size + len(samples), self.capacity)

    def state_dict(self) -> dict[str, Any]:
        """Return the states, the place of the next one, and the state of the generator."""
        return {
            "states": self._states[: self._size].clone(),
            "next": self._next,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, into a buffer of the same capacity and shape."""
        states = state["states"]
        if tuple(states.shape[1:]) != self.sample_shape or len(states) > self.capacity:
            raise ValueError(
                f"states must fit a buffer of {self.capacity} of shape {self.sample_shape}, "
                f"got {tuple(states.shape)}"
            )
        # A buffer that is full goes round; one that is not has its next place after the last.
        full = len(states) == self.capacity
        if not (0 <= state["next"] < self.capacity and (full or state["next"] == len(states))):
            raise ValueError(
                f"the state must be that of a buffer of capacity {self.capacity}, got "
                f"{len(states)} states and the next place {state['next']}"
            )
        self._size, self._next = len(states), int(state["next"])
        self._states[: self._size] = states.to(self._states)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
