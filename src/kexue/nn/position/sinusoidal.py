"""The position code without parameters, for whole, fractional and negative positions.

    p_t[2i] = sin(t ω_i),    p_t[2i + 1] = cos(t ω_i),    ω_i = base^(-2i/dim)

Source: https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["NoPosition", "SinusoidalPositionEmbedding", "sinusoidal_position_embedding"]


def sinusoidal_position_embedding(
    positions: Tensor,
    dim: int,
    *,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch dim"]:
    """Return sines and cosines of the positions, side by side.

    Parameters
    ----------
    positions : Tensor, shape (...)
        Integer or floating.
    dim : int
        Features, even; sines at the even ones, cosines at the odd ones.
    base : float
        Ratio of the longest to the shortest period, nearly.
    dtype : torch.dtype
        Of the result. Angles are computed in float64 whatever it is.

    Returns
    -------
    Tensor, shape (..., dim)
        Inner products of two codes depend on the difference of their positions alone.

    Raises
    ------
    ValueError
        For an odd ``dim``, ``base`` not positive and finite, or a ``dtype`` that is not floating.
    TypeError
        For positions that are boolean or complex.

    Examples
    --------
    >>> sinusoidal_position_embedding(torch.tensor([0.0, 2.5]), 4)
    tensor([[ 0.0000,  1.0000,  0.0000,  1.0000],
            [ 0.5985, -0.8011,  0.0250,  0.9997]])
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    if not (math.isfinite(base) and base > 0):
        raise ValueError(f"base must be positive and finite, got {base}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    if not isinstance(positions, Tensor) or positions.is_complex() or positions.dtype == torch.bool:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an integer or floating tensor, got {kind}")
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angle = positions.double().unsqueeze(-1) * base**-exponent
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).to(dtype)


class SinusoidalPositionEmbedding(nn.Module):
    """The code as a module that a Transformer adds to its token embedding.

    Parameters
    ----------
    dim : int
        Width of the embedding, even.
    base : float
        As in :func:`sinusoidal_position_embedding`.
    scale : float
        Factor of the code. Token embeddings that start at standard deviation 0.02 drown in a code
        of root mean square 0.71 times a ``scale`` of 1.

    Raises
    ------
    ValueError
        For an odd ``dim``, or ``base`` or ``scale`` that is not finite.

    Examples
    --------
    >>> SinusoidalPositionEmbedding(8)(torch.arange(5)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, *, base: float = 10_000.0, scale: float = 1.0) -> None:
        super().__init__()
        sinusoidal_position_embedding(torch.zeros(0), dim, base=base)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        self.embedding_dim = dim
        self.base = base
        self.scale = scale
        # It has no values: it only knows the dtype that the model was moved to.
        self._like: Tensor
        self.register_buffer("_like", torch.zeros(0), persistent=False)

    def forward(self, positions: Tensor) -> Float[Tensor, "*batch dim"]:
        """Return (..., dim) for positions (...)."""
        code = sinusoidal_position_embedding(
            positions, self.embedding_dim, base=self.base, dtype=self._like.dtype
        )
        return self.scale * code

    def extra_repr(self) -> str:
        """Return what the printed module says of its numbers."""
        return f"{self.embedding_dim}, base={self.base:g}, scale={self.scale:g}"


class NoPosition(nn.Module):
    """Tells a Transformer nothing about positions.

    Examples
    --------
    >>> NoPosition()(torch.arange(5))
    tensor(0.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._zero: Tensor
        self.register_buffer("_zero", torch.zeros(()), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Return 0, whatever the positions."""
        return self._zero
