"""A sublayer with its shortcut.

Source: https://arxiv.org/abs/1512.03385, https://arxiv.org/abs/2203.00555 (DeepNorm).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Residual"]

_STYLES = ("none", "pre", "post")


class Residual(nn.Module):
    """A sublayer beside the identity, normalised before it, after the sum, or not at all.

    ``none``: ``alpha x + branch_scale drop(f(x))``; ``pre``: ``alpha x + branch_scale
    drop(f(norm(x)))``; ``post``: ``norm(alpha x + branch_scale drop(f(x)))``, which with
    ``alpha`` above 1 is DeepNorm. ``alpha`` and ``branch_scale`` are numbers, not parameters.

    Parameters
    ----------
    sublayer : nn.Module
        Maps (..., dim) to (..., dim). Of a tuple that it returns, as attention does, the first
        item is the branch.
    dim : int
        Width of the stream.
    style : {"none", "pre", "post"}
        Where the norm stands.
    alpha : float
        Weight of the identity.
    branch_scale : float
        Weight of the branch.
    norm : callable
        Builds the norm from ``dim``.
    dropout : float
        Probability on the branch, drawn from torch's global generator.

    Raises
    ------
    ValueError
        For an unknown style, ``dim`` below 1, ``alpha`` not positive and finite, ``branch_scale``
        not finite, a dropout outside [0, 1], an input of another width, or a sublayer that changes
        the shape.
    TypeError
        For a sublayer that is no module, or an input that is not floating.

    Examples
    --------
    >>> import torch
    >>> block = Residual(torch.nn.Linear(4, 4), 4, style="post", alpha=2.0)
    >>> block(torch.randn(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        sublayer: nn.Module,
        dim: int,
        *,
        style: Literal["none", "pre", "post"] = "pre",
        alpha: float = 1.0,
        branch_scale: float = 1.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if style not in _STYLES:
            raise ValueError(f"style must be one of {', '.join(_STYLES)}, got {style!r}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not isinstance(sublayer, nn.Module):
            raise TypeError(f"sublayer must be an nn.Module, got {type(sublayer).__name__}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        if not math.isfinite(branch_scale):
            raise ValueError(f"branch_scale must be finite, got {branch_scale}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.dim = dim
        self.style = style
        self.alpha = float(alpha)
        self.branch_scale = float(branch_scale)
        self.sublayer = sublayer
        self.norm = nn.Identity() if style == "none" else norm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch dim"], *args: Any, **kwargs: Any) -> Tensor:
        """Return the stream after the sublayer, which is given the further arguments."""
        if not x.is_floating_point():
            raise TypeError(f"x must be real and floating, got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}), got {tuple(x.shape)}")
        given = self.norm(x) if self.style == "pre" else x
        branch = self.dropout(_branch(self.sublayer, given, *args, **kwargs))
        if self.branch_scale != 1:
            branch = self.branch_scale * branch
        stream = torch.add(branch, x, alpha=self.alpha)
        return self.norm(stream) if self.style == "post" else stream

    def extra_repr(self) -> str:
        """Return what the printed module says of its numbers."""
        return f"style={self.style!r}, alpha={self.alpha:g}, branch_scale={self.branch_scale:g}"


def _branch(sublayer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a sublayer; of a tuple the first item counts, and it keeps the shape of x."""
    branch = sublayer(x, *args, **kwargs)
    if isinstance(branch, tuple):
        branch = branch[0]
    if branch.shape != x.shape:
        raise ValueError(
            f"sublayer must keep the shape {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    return branch
