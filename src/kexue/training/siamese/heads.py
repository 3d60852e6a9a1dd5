"""The two small networks behind an encoder: projector and predictor."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

from torch import nn

__all__ = ["prediction_head", "projection_head"]


def projection_head(
    in_features: int,
    hidden_features: int,
    out_features: int,
    *,
    layers: int = 3,
    last_norm: bool = True,
) -> nn.Sequential:
    """Return a projector: linear layers, batch norm and ReLU between them.

    SimSiam's is the default; BYOL's has ``layers=2, last_norm=False``. A linear layer before a
    batch norm has no bias, which the norm would remove. The last norm has no gain and no bias.

    Parameters
    ----------
    in_features, hidden_features, out_features : int
        Widths.
    layers : int
        Number of linear layers.
    last_norm : bool
        Whether a batch norm ends the projector; without it the last layer has a bias.

    Returns
    -------
    nn.Sequential
        From (batch, in_features) to (batch, out_features).

    Raises
    ------
    ValueError
        For a width or a number of layers below 1.

    Examples
    --------
    >>> [type(layer).__name__ for layer in projection_head(8, 16, 4, layers=2)]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear', 'BatchNorm1d']
    """
    depth = _positive("layers", layers)
    widths = [_positive("in_features", in_features)]
    widths += [_positive("hidden_features", hidden_features)] * (depth - 1)
    widths += [_positive("out_features", out_features)]
    head: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        head += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    head.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    if last_norm:
        head.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*head)


def prediction_head(features: int, hidden_features: int) -> nn.Sequential:
    """Return a predictor: a bottleneck with one batch norm inside and nothing after it.

    Parameters
    ----------
    features : int
        Width of projections, and of predictions.
    hidden_features : int
        Width of the hidden layer; a quarter of ``features`` in SimSiam.

    Returns
    -------
    nn.Sequential
        From (batch, features) to (batch, features).

    Raises
    ------
    ValueError
        For a width below 1.

    Examples
    --------
    >>> [type(layer).__name__ for layer in prediction_head(32, 8)]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    features = _positive("features", features)
    hidden = _positive("hidden_features", hidden_features)
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, features),
    )


def _positive(name: str, value: Any) -> int:
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if isinstance(value, bool) or integer < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")
    return integer
