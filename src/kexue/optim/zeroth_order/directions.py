"""Random directions from seeds, added to parameters in place and never stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__: list[str] = []

DISTRIBUTIONS = ("normal", "rademacher", "sphere")

# Part of what a seed means: a tensor is drawn in pieces of this many elements. A trajectory that
# was stored with one size cannot be replayed with another.
CHUNK = 1 << 20

_WORD = (1 << 64) - 1


def hashed(*counters: int) -> int:
    """Return 63 bits that depend on all counters: splitmix64, folded over them.

    A hash in place of a generator with a state: any direction of any step can be drawn at once, and
    whoever resumes needs nothing but the number of the step. 63 bits, so that a seed is an int64.
    """
    state = 0
    for counter in counters:
        state = _splitmix64((state + counter) & _WORD)
    return state >> 1


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


class Directions:
    """Adds multiples of seeded directions to parameters, holding one chunk at a time.

    Every parameter has a seed of its own, made of the direction's and of its position, so that
    freezing one changes nothing for the others.
    """

    def __init__(self, parameters: Sequence[Tensor | None], distribution: str) -> None:
        self._parameters = [(i, p) for i, p in enumerate(parameters) if p is not None]
        self._distribution = distribution
        self._generators: dict[torch.device, torch.Generator] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def add_(self, seed: int, scales: Sequence[float]) -> None:
        """Add ``scales[i]`` times the direction to the i-th parameter."""
        for position, parameter in self._parameters:
            generator = self._generator(parameter.device).manual_seed(hashed(seed, position))
            # What is no plain memory is put in order first: its direction is that of a copy.
            plain = parameter if parameter.is_contiguous() else parameter.contiguous()
            for chunk in plain.view(-1).split(CHUNK):
                # Drawn in float32 and rounded once, when the sum is.
                chunk.add_(self._draw(chunk, generator), alpha=scales[position])
            if plain is not parameter:
                parameter.copy_(plain)

    def _draw(self, chunk: Tensor, generator: torch.Generator) -> Tensor:
        dtype = torch.float64 if chunk.dtype == torch.float64 else torch.float32
        key = chunk.device, dtype
        whole_words = -(-chunk.numel() // 64) * 64
        if key not in self._buffers or self._buffers[key].numel() < whole_words:
            self._buffers[key] = torch.empty(whole_words, dtype=dtype, device=chunk.device)
        buffer = self._buffers[key]
        if self._distribution == "normal":
            return buffer[: chunk.numel()].normal_(generator=generator)
        return fill_with_signs_(buffer[:whole_words], generator)[: chunk.numel()]

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device]


def fill_with_signs_(out: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fill a vector, its length a multiple of 64, with random signs: 64 to a random word."""
    words = torch.empty(out.numel() // 64, dtype=torch.int64, device=out.device)
    words.random_(-(2**63), None, generator=generator)
    octets = words.view(torch.uint8).int()
    torch.index_select(_signs_of_octets(out.dtype, out.device), 0, octets, out=out.view(-1, 8))
    return out


@functools.cache
def _signs_of_octets(dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (2 * bits - 1).to(device, dtype)
