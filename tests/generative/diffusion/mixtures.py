"""Data whose denoiser is known exactly, for tests."""

from __future__ import annotations

import torch

from kexue.generative.diffusion import (
    DiscreteSchedule,
    GaussianMixtureDenoiser,
    HeatSchedule,
    VariancePreservingSchedule,
)

SCHEDULES = {
    "linear": DiscreteSchedule.linear(),
    "cosine": DiscreteSchedule.cosine(),
    "variance_preserving": VariancePreservingSchedule(),
    "heat": HeatSchedule(),
}
# One time of middling noise for each.
TIMES = {"linear": 300.0, "cosine": 420.5, "variance_preserving": 0.4, "heat": 0.8}


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture(schedule: object, **options: object) -> GaussianMixtureDenoiser:
    """Return the three Gaussians of the study."""
    return GaussianMixtureDenoiser(
        double([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]]),
        double(
            [[[0.05, 0.02], [0.02, 0.04]], [[0.02, 0.0], [0.0, 0.1]], [[0.1, -0.03], [-0.03, 0.05]]]
        ),
        double([0.2, 0.5, 0.3]),
        schedule=schedule,
        **options,
    )


def gaussian(mean: float, variance: float, schedule: object) -> GaussianMixtureDenoiser:
    """Return one Gaussian in one dimension."""
    return GaussianMixtureDenoiser(double([[mean]]), double([variance]), schedule=schedule)
