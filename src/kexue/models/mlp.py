"""Fully connected networks: a denoiser for vectors, and the plain one.

`MLPDenoiser` predicts from a noisy vector and a time; `MLP` is what classifiers and energies use.

Source: https://arxiv.org/abs/2006.11239 (denoiser with a time embedding).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from kexue.models.embedding import TimeEmbedding

__all__ = ["MLP", "MLPDenoiser"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
}
_NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class MLPDenoiser(nn.Module):
    """Residual blocks with layer norm, told the time and, where there are classes, the class.

    Parameters
    ----------
    features : int
        Entries of an example.
    hidden : int
        Width, even.
    depth : int
        Number of residual blocks.
    num_classes : int, optional
        Number of classes; label ``num_classes``, a negative label and no condition all mean "no
        class".
    output_features : int, optional
        Entries of the output, ``features`` by default.
    dropout : float
        Probability inside the blocks.

    Raises
    ------
    ValueError
        For sizes below 1, an input of another width, times or labels of another length.

    Examples
    --------
    >>> import torch
    >>> network = MLPDenoiser(64, hidden=32, num_classes=10)
    >>> network(torch.randn(5, 64), torch.rand(5), torch.arange(5)).shape
    torch.Size([5, 64])
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 256,
        depth: int = 3,
        num_classes: int | None = None,
        output_features: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        output_features = features if output_features is None else output_features
        if min(features, output_features) < 1 or depth < 0:
            raise ValueError(
                "features and output_features must be at least 1 and depth at least 0, "
                f"got {features}, {output_features} and {depth}"
            )
        self.features = features
        self.embedding = TimeEmbedding(hidden, num_classes=num_classes)
        self.input = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList([_Block(hidden, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, output_features)

    def trunk(
        self,
        x: Float[Tensor, "batch features"],
        time: float | Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "batch hidden"]:
        """Return the last hidden activation, which further heads may share."""
        _check_width(x, self.features, rank=2)
        embedded = self.embedding(time, condition, batch=len(x))
        hidden = self.input(x)
        for block in self.blocks:
            hidden = block(hidden, embedded)
        return nn.functional.silu(self.norm(hidden))

    def forward(
        self,
        x: Float[Tensor, "batch features"],
        time: float | Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "batch output_features"]:
        """Return the output for noisy x at a time, one for all or one per example."""
        return self.output(self.trunk(x, time, condition))


class _Block(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.first = nn.Linear(hidden, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.activation = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        inner = self.activation(self.first(self.norm(hidden)) + embedded)
        return hidden + self.second(self.dropout(inner))


class MLP(nn.Sequential):
    """Linear layers with an activation, and if wanted a norm, between them.

    Parameters
    ----------
    in_features : int
        Entries of an example.
    hidden : sequence of int
        Widths of the hidden layers; empty for a linear map.
    out_features : int
        Entries of the output.
    activation : {"silu", "relu", "gelu", "tanh", "softplus", "leaky_relu"}
        Between layers.
    norm : {"layer", "batch"}, optional
        Before each activation; none by default.

    Raises
    ------
    ValueError
        For an unknown activation or norm, sizes below 1, or an input of another width.

    Examples
    --------
    >>> import torch
    >>> classifier = MLP(64, [128, 128], 10, activation="relu")
    >>> classifier(torch.randn(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str = "silu",
        norm: str | None = None,
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
            )
        if norm is not None and norm not in _NORMS:
            raise ValueError(f"norm must be None or one of {', '.join(_NORMS)}, got {norm!r}")
        widths = [in_features, *hidden, out_features]
        if min(widths) < 1:
            raise ValueError(f"every width must be at least 1, got {widths}")
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers.append(nn.Linear(before, after))
            if norm is not None:
                layers.append(_NORMS[norm](after))
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers, nn.Linear(widths[-2], out_features))
        self.in_features = in_features

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out"]:
        """Return the output for x."""
        _check_width(x, self.in_features, rank=None)
        return super().forward(x)


def _check_width(x: Tensor, features: int, *, rank: int | None) -> None:
    shape = "(batch, features)" if rank == 2 else "(..., features)"
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < (rank or 1):
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a real tensor of shape {shape}, got {kind}")
    if x.shape[-1] != features or (rank is not None and x.ndim != rank):
        raise ValueError(
            f"x must have shape {shape} with {features} features, got {tuple(x.shape)}"
        )
