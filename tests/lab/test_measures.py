"""The energy distance against its closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from kexue.lab.measures import energy_distance


def test_three_points_by_hand() -> None:
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    # Between: 1, 4, 1, 2, mean 2; within: 2 and 3.
    assert energy_distance(x, y) == pytest.approx(2 * 2 - 2 - 3)


def test_shape_of_an_example_does_not_matter() -> None:
    x, y = torch.randn(20, 2, 3), torch.randn(30, 2, 3)
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.flatten(1), y.flatten(1)))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_two_gaussians(shift: float) -> None:
    """E|N(m, 2)| = 2 exp(-m²/4)/√π + m erf(m/2), and twice that at 0 is what is taken away."""
    n = 2000
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)

    def mean(m: float) -> float:
        return 2 * math.exp(-(m**2) / 4) / math.sqrt(math.pi) + m * math.erf(m / 2)

    expected = 2 * (mean(shift) - mean(0.0))
    # The deviation of each of the three means is below 2/√n.
    assert energy_distance(x + shift, y) == pytest.approx(expected, abs=4 * 2 / math.sqrt(n))
