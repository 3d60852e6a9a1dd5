"""Schedules without steps: DDPM in continuous time, and the heat flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue.generative.diffusion.schedule.base import NoiseSchedule

__all__ = ["HeatSchedule", "VariancePreservingSchedule"]


class VariancePreservingSchedule(NoiseSchedule):
    """DDPM in continuous time: log ᾱ_t = −t²(beta_max − beta_min)/4 − t beta_min/2, t in [0, 1].

    Parameters
    ----------
    beta_min, beta_max : float
        Rates of noise at the clean and at the noisy end, 0 < beta_min <= beta_max.
    minimum_time : float
        Smallest time of training and sampling, in (0, 1).

    Raises
    ------
    ValueError
        Where a parameter is out of range.

    Examples
    --------
    >>> schedule = VariancePreservingSchedule()
    >>> schedule.signal_scale(1.0)
    tensor(0.0066, dtype=torch.float64)
    >>> schedule.time_from_sigma(schedule.sigma(0.25))
    tensor(0.2500, dtype=torch.float64)
    """

    _remembers = True

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, minimum_time: float = 1e-3
    ) -> None:
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(
                f"beta_min and beta_max must be positive and increasing, got {beta_min}, {beta_max}"
            )
        if not 0 < minimum_time < 1:
            raise ValueError(f"minimum_time must lie in (0, 1), got {minimum_time}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self.minimum_time, self.maximum_time = float(minimum_time), 1.0

    def time_from_sigma(self, sigma: float | Tensor) -> Tensor:
        """Return the time whose noise-to-signal ratio is ``sigma``."""
        # −2 log ᾱ = log(1 + σ²) is quadratic in t; this form of the root does not cancel.
        target = torch.log1p(self._check_sigma(sigma) ** 2)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * target)
        return (2 * target / (self.beta_min + root)).clamp(max=1.0)

    def __repr__(self) -> str:
        return (
            f"VariancePreservingSchedule({self.beta_min:g}, {self.beta_max:g}, "
            f"minimum_time={self.minimum_time:g})"
        )

    def _log_signal(self, time: Tensor) -> Tensor:
        return -(time**2) * (self.beta_max - self.beta_min) / 4 - time * self.beta_min / 2

    def _log_sigma(self, time: Tensor) -> Tensor:
        return torch.log(torch.expm1(-2 * self._log_signal(time))) / 2

    def _scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        log_signal = self._log_signal(time)
        return log_signal.exp(), torch.sqrt(-torch.expm1(2 * log_signal))


class HeatSchedule(NoiseSchedule):
    """The heat flow: ᾱ = 1, and time is the standard deviation of the noise.

    Parameters
    ----------
    maximum_sigma : float
        Largest time; sampling starts from N(0, maximum_sigma² I).
    minimum_sigma : float
        Smallest time of training and sampling, positive and below ``maximum_sigma``.

    Raises
    ------
    ValueError
        Where the two do not increase from above 0.

    Examples
    --------
    >>> schedule = HeatSchedule(maximum_sigma=80.0)
    >>> schedule.times(3, spacing="karras")
    tensor([8.0000e+01, 2.5152e+00, 2.0000e-03, 0.0000e+00], dtype=torch.float64)
    >>> schedule.prior_scale
    80.0
    """

    _remembers = True

    def __init__(self, maximum_sigma: float = 80.0, *, minimum_sigma: float = 0.002) -> None:
        if not 0 < minimum_sigma < maximum_sigma < math.inf:
            raise ValueError(
                "minimum_sigma and maximum_sigma must be positive and increasing, "
                f"got {minimum_sigma} and {maximum_sigma}"
            )
        self.minimum_time, self.maximum_time = float(minimum_sigma), float(maximum_sigma)
        self.prior_scale = float(maximum_sigma)

    def time_from_sigma(self, sigma: float | Tensor) -> Tensor:
        """Return ``sigma``, which is the time."""
        return self._check_sigma(sigma).clone()

    def __repr__(self) -> str:
        return f"HeatSchedule({self.maximum_time:g}, minimum_sigma={self.minimum_time:g})"

    def _log_sigma(self, time: Tensor) -> Tensor:
        return time.log()

    def _scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(time), time

    def _time_from_uniform(self, uniform: Tensor) -> Tensor:
        # Log-uniform: every octave of noise is seen equally often.
        low, high = math.log(self.minimum_time), math.log(self.maximum_time)
        return torch.exp(low + (high - low) * uniform).clamp(self.minimum_time, self.maximum_time)
