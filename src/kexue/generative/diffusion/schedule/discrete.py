"""The schedules of DDPM and its successors: T steps, and real times between them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.schedule.base import (
    NoiseSchedule,
    _check_spacing,
    _first,
    _with_zero,
)

__all__ = ["DiscreteSchedule"]


class DiscreteSchedule(NoiseSchedule):
    """The schedule of DDPM: T steps, with ᾱ_t² + β̄_t² = 1.

    Parameters
    ----------
    signal_scale : Tensor, shape (num_steps,)
        ᾱ_1 … ᾱ_T, strictly decreasing in (0, 1). The classmethods start from what the literature
        gives instead, and keep small noise scales to full precision.

    Raises
    ------
    ValueError
        Where the scales are out of range or do not decrease, or a beta lies outside (0, 1).

    Examples
    --------
    >>> schedule = DiscreteSchedule.cosine(num_steps=1000)
    >>> schedule.signal_scale(torch.tensor([0.0, 500.0, 1000.0]))
    tensor([1.0000e+00, 7.0274e-01, 4.9283e-05], dtype=torch.float64)
    >>> schedule.times(4)
    tensor([1000.,  750.,  500.,  250.,    0.], dtype=torch.float64)
    """

    _remembers = True

    def __init__(self, signal_scale: Float[Tensor, " num_steps"]) -> None:
        signal_scale = _check_vector(signal_scale, "signal_scale")
        if not bool(((signal_scale > 0) & (signal_scale < 1)).all()):
            wrong = _first(signal_scale, ~((signal_scale > 0) & (signal_scale < 1)))
            raise ValueError(f"signal_scale must lie in (0, 1), got {wrong}")
        self._set_log_signal(signal_scale.log())

    @classmethod
    def from_betas(cls, betas: Float[Tensor, " num_steps"]) -> DiscreteSchedule:
        """Build from the literature's betas, β_t² here: the noise variance of each step."""
        betas = _check_vector(betas, "betas")
        allowed = (betas > 0) & (betas < 1)
        if not bool(allowed.all()):
            raise ValueError(f"betas must lie in (0, 1), got {_first(betas, ~allowed)}")
        return cls._from_log_signal(torch.log1p(-betas).cumsum(0) / 2)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Float[Tensor, " num_steps"]) -> DiscreteSchedule:
        """Build from the literature's alphas_cumprod, ᾱ_t² here."""
        alphas_cumprod = _check_vector(alphas_cumprod, "alphas_cumprod")
        allowed = (alphas_cumprod > 0) & (alphas_cumprod < 1)
        if not bool(allowed.all()):
            wrong = _first(alphas_cumprod, ~allowed)
            raise ValueError(f"alphas_cumprod must lie in (0, 1), got {wrong}")
        return cls._from_log_signal(alphas_cumprod.log() / 2)

    @classmethod
    def linear(
        cls, num_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> DiscreteSchedule:
        """Build DDPM's schedule: betas equally spaced between two values."""
        _check_count(num_steps)
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))

    @classmethod
    def proportional(cls, num_steps: int = 1000, *, beta_end: float = 0.02) -> DiscreteSchedule:
        """Build the article's schedule: α_t = sqrt(1 − beta_end t/T)."""
        _check_count(num_steps)
        step = torch.arange(1, num_steps + 1, dtype=torch.float64)
        return cls.from_betas(beta_end * step / num_steps)

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> DiscreteSchedule:
        """Build the schedule of latent diffusion: square roots of betas equally spaced."""
        _check_count(num_steps)
        if not (beta_start > 0 and beta_end > 0):
            raise ValueError(f"betas must lie in (0, 1), got {beta_start} and {beta_end}")
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def cosine(
        cls, num_steps: int = 1000, *, offset: float = 0.008, maximum_beta: float = 0.999
    ) -> DiscreteSchedule:
        """Build the cosine schedule: ᾱ_t ∝ cos(π/2 (t/T + offset)/(1 + offset)), betas clipped."""
        _check_count(num_steps)
        if not (math.isfinite(offset) and offset >= 0):
            raise ValueError(f"offset must not be negative, got {offset}")
        step = torch.arange(num_steps + 1, dtype=torch.float64)
        angle = math.pi / 2 * (step / num_steps + offset) / (1 + offset)
        before, after = angle[:-1], angle[1:]
        # 1 − cos²b/cos²a without the cancellation: cos²a − cos²b = sin(b − a) sin(b + a).
        betas = torch.sin(after - before) * torch.sin(after + before) / torch.cos(before) ** 2
        return cls.from_betas(betas.clamp(max=maximum_beta))

    @property
    def num_steps(self) -> int:
        """Number of steps T."""
        return len(self._log_sigma_at_steps)

    @property
    def betas(self) -> Float[Tensor, " num_steps"]:
        """The literature's betas, β_t² = 1 − ᾱ_t²/ᾱ_{t−1}²."""
        return -torch.expm1(2 * self._log_signal.diff(prepend=torch.zeros(1, dtype=torch.float64)))

    @property
    def alphas_cumprod(self) -> Float[Tensor, " num_steps"]:
        """The literature's alphas_cumprod, ᾱ_t²."""
        return torch.exp(2 * self._log_signal)

    def time_from_sigma(self, sigma: float | Tensor) -> Tensor:
        """Return the real time at which the noise-to-signal ratio is ``sigma``."""
        sigma = self._check_sigma(sigma)
        table = self._table(sigma.device)
        log_sigma = sigma.log()
        upper = torch.searchsorted(table, log_sigma.detach()).clamp(1, max(self.num_steps - 1, 1))
        lower = upper - 1
        upper = upper.clamp(max=self.num_steps - 1)
        width = (table[upper] - table[lower]).clamp(min=torch.finfo(torch.float64).tiny)
        between = 1 + lower + (log_sigma - table[lower]) / width
        below = sigma / table[0].exp()
        return torch.where(log_sigma <= table[0], below, between).clamp(max=self.maximum_time)

    def times(self, num_steps: int, *, spacing: str = "trailing", rho: float = 7.0) -> Tensor:
        """Return a decreasing grid of ``num_steps`` times and a final 0.

        Parameters
        ----------
        num_steps : int
            Number n of steps, 1…T.
        spacing : {"trailing", "leading", "linspace", "quadratic", "karras"}
            trailing: round(T − i T/n), starts at T. leading: 1 + i (T // n), reaches 1. linspace:
            equally spaced integers from 1 to T. quadratic: equally spaced square roots. karras:
            real times, equally spaced in sigma^{1/rho}. The first three are the timesteps of
            diffusers plus one, but where its arithmetic rounds before it should: of T = 1000 a
            half falls to the other side for trailing at n = 48 and linspace at n = 27, and
            trailing at n = 61 gains a timestep −1.
        rho : float
            Exponent of "karras".

        Returns
        -------
        Tensor, shape (num_steps + 1,), float64
        """
        _check_spacing(spacing, ("trailing", "leading", "linspace", "quadratic", "karras"))
        total = self.num_steps
        if not 1 <= num_steps <= total:
            raise ValueError(f"num_steps must lie in 1…{total}, got {num_steps}")
        index = torch.arange(num_steps, dtype=torch.float64)
        if spacing == "karras":
            return self._karras_times(num_steps, rho)
        if spacing == "trailing":
            return _with_zero(torch.round(total * (num_steps - index) / num_steps))
        if spacing == "leading":
            return _with_zero((1 + index * (total // num_steps)).flip(0))
        fraction = index / max(num_steps - 1, 1)
        if spacing == "linspace":
            # Halves are rounded as numpy rounds timesteps that start at 0.
            return _with_zero((1 + torch.round((total - 1) * fraction)).flip(0))
        grid = torch.round((1 + (math.sqrt(total) - 1) * fraction) ** 2)
        distinct = (grid - index).cummax(0).values + index
        return _with_zero(distinct.flip(0))

    def __repr__(self) -> str:
        first, last = self._table(torch.device("cpu"))[[0, -1]].exp().tolist()
        return f"DiscreteSchedule(num_steps={self.num_steps}, sigma={first:.4g}…{last:.4g})"

    @classmethod
    def _from_log_signal(cls, log_signal: Tensor) -> DiscreteSchedule:
        schedule = cls.__new__(cls)
        schedule._set_log_signal(log_signal)
        return schedule

    def _set_log_signal(self, log_signal: Tensor) -> None:
        if not bool((log_signal.diff() < 0).all()):
            step = int((log_signal.diff() >= 0).nonzero()[0]) + 1
            before, after = log_signal[step - 1 : step + 1].exp().tolist()
            raise ValueError(
                f"signal_scale must strictly decrease, got {before} at step {step} "
                f"and {after} at step {step + 1}"
            )
        self.minimum_time, self.maximum_time = 1.0, float(len(log_signal))
        self._log_signal = log_signal
        self._log_sigma_at_steps = torch.log(-torch.expm1(2 * log_signal)) / 2 - log_signal
        self._copies: dict[torch.device, Tensor] = {}

    def _table(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self._log_sigma_at_steps
        if device not in self._copies:
            self._copies[device] = self._log_sigma_at_steps.to(device)
        return self._copies[device]

    def _log_sigma(self, time: Tensor) -> Tensor:
        table = self._table(time.device)
        floor = time.detach().floor().clamp(1, self.num_steps)
        step = floor.long()
        between = torch.lerp(
            table.take(step - 1), table.take(step.clamp(max=self.num_steps - 1)), time - floor
        )
        return torch.where(time < 1, time.log() + table[0], between)

    def _scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        # ᾱ² = 1/(1 + σ²) and β̄² = 1/(1 + 1/σ²).
        log_variance = 2 * self._log_sigma(time)
        zero = torch.zeros_like(log_variance)
        signal = torch.exp(-torch.logaddexp(zero, log_variance) / 2)
        return signal, torch.exp(-torch.logaddexp(zero, -log_variance) / 2)

    def _time_from_uniform(self, uniform: Tensor) -> Tensor:
        return (1 + torch.floor(uniform * self.num_steps)).clamp(max=self.maximum_time)


def _check_vector(values: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1:
        kind = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else values
        raise ValueError(f"{name} must be a real tensor with one entry a step, got {kind}")
    if len(values) == 0:
        raise ValueError(f"{name} must have at least one step, got none")
    return values.detach().to("cpu", torch.float64)


def _check_count(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
