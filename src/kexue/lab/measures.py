"""What several studies measure and no method of the library is about."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["energy_distance"]


def energy_distance(x: Float[Tensor, "m ..."], y: Float[Tensor, "n ..."]) -> float:
    """Return the unbiased estimate of 2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖.

    It is 0 in expectation where both samples have one distribution, and may be negative there.

    Parameters
    ----------
    x, y : Tensor, shape (m, *event) and (n, *event)
        At least two samples each.

    Source: https://doi.org/10.1016/j.jspi.2013.03.018
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return (2 * torch.cdist(x, y).mean() - within(x) - within(y)).item()
