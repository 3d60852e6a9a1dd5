"""Noise schedules in float64: how much signal and how much noise there is at a time.

    x_t = ᾱ_t x_0 + β̄_t ε,    ε ~ N(0, I)

`signal_scale` is ᾱ_t, `noise_scale` is β̄_t and `sigma` their ratio. All scales come from the
logarithm of that ratio, which neither rounds β̄_1 to nothing nor loses ᾱ_T. A discrete schedule is
defined at real times too: log sigma is linear between the steps, and sigma(t) = t sigma(1) below 1.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2102.09672 (cosine),
https://arxiv.org/abs/2206.00364 (spacing in σ^{1/ρ}).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["DiscreteSchedule", "HeatSchedule", "NoiseSchedule", "VariancePreservingSchedule"]


class NoiseSchedule(ABC):
    """What a diffusion model needs to know of time: signal and noise scales, in float64.

    A time is a number, a 0-d tensor or one entry per example, in the schedule's own unit. Scales
    of a tensor live on its device and are differentiable in it. A schedule of your own defines
    the three attributes, `time_from_sigma`, ``_scales`` (signal and noise scale) and
    ``_log_sigma``, all of a float64 tensor that has been checked.

    Attributes
    ----------
    minimum_time : float
        Smallest time at which a network is trained.
    maximum_time : float
        Largest time there is.
    prior_scale : float
        Sampling starts from N(0, prior_scale² I).

    Raises
    ------
    ValueError
        Every method refuses a time outside [0, maximum_time].

    Examples
    --------
    >>> schedule = DiscreteSchedule.linear()
    >>> isinstance(schedule, NoiseSchedule), schedule.minimum_time, schedule.maximum_time
    (True, 1.0, 1000.0)
    >>> schedule.noise_scale(1)
    tensor(0.0100, dtype=torch.float64)
    """

    minimum_time: float
    maximum_time: float
    prior_scale: float = 1.0

    @abstractmethod
    def _scales(self, time: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _log_sigma(self, time: Tensor) -> Tensor: ...

    @abstractmethod
    def time_from_sigma(self, sigma: float | Tensor) -> Tensor:
        """Return the time whose noise-to-signal ratio is ``sigma``."""

    def signal_scale(self, time: float | Tensor) -> Tensor:
        """Return ᾱ_t, the factor of the clean data."""
        return self._scales(self._check_time(time))[0]

    def noise_scale(self, time: float | Tensor) -> Tensor:
        """Return β̄_t, the factor of the noise."""
        return self._scales(self._check_time(time))[1]

    def sigma(self, time: float | Tensor) -> Tensor:
        """Return the noise-to-signal ratio β̄_t/ᾱ_t."""
        signal, noise = self._scales(self._check_time(time))
        return noise / signal

    def log_sigma(self, time: float | Tensor) -> Tensor:
        """Return log(β̄_t/ᾱ_t); minus infinity at time 0."""
        return self._log_sigma(self._check_time(time))

    def log_signal_to_noise(self, time: float | Tensor) -> Tensor:
        """Return log(ᾱ_t²/β̄_t²); infinity at time 0."""
        return -2 * self.log_sigma(time)

    def add_noise(
        self,
        clean: Float[Tensor, " batch *event"],
        noise: Float[Tensor, " batch *event"],
        time: float | Tensor,
    ) -> Float[Tensor, " batch *event"]:
        """Return ᾱ_t clean + β̄_t noise, for one time or one per example."""
        if clean.shape != noise.shape:
            raise ValueError(
                "clean and noise must have the same shape, "
                f"got {tuple(clean.shape)} and {tuple(noise.shape)}"
            )
        signal, noise_scale = self._scales_for(clean, time)
        return _add_multiple(_plain(signal) * clean, _plain(noise_scale), noise)

    def times(self, num_steps: int, *, spacing: str = "uniform", rho: float = 7.0) -> Tensor:
        """Return a decreasing grid of ``num_steps`` times and a final 0.

        Parameters
        ----------
        num_steps : int
            Number of steps, that is of positive times.
        spacing : {"uniform", "karras"}
            Equal steps in time, or in sigma^{1/rho}, from ``maximum_time`` to ``minimum_time``.
        rho : float
            Exponent of "karras"; larger values put more steps at low noise.

        Returns
        -------
        Tensor, shape (num_steps + 1,), float64
        """
        _check_spacing(spacing, ("uniform", "karras"))
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if spacing == "karras":
            return self._karras_times(num_steps, rho)
        positive = torch.linspace(
            self.maximum_time, self.minimum_time, num_steps, dtype=torch.float64
        )
        return _with_zero(positive)

    def _karras_times(self, num_steps: int, rho: float) -> Tensor:
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"rho must be positive, got {rho}")
        ends = torch.tensor([self.maximum_time, self.minimum_time], dtype=torch.float64)
        first, last = self.sigma(ends) ** (1 / rho)
        fraction = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        times = self.time_from_sigma((first + fraction * (last - first)) ** rho)
        # The way through sigma and back rounds; the ends are known.
        times[-1], times[0] = ends[1], ends[0]
        return _with_zero(times)

    def _time_from_uniform(self, uniform: Tensor) -> Tensor:
        """Map U(0, 1) to the distribution of training times."""
        return self.minimum_time + (self.maximum_time - self.minimum_time) * uniform

    def _check_time(self, time: float | Tensor, *, positive: bool = False) -> Tensor:
        if isinstance(time, Tensor) and time.is_complex():
            raise ValueError(f"time must be real, got dtype {time.dtype}")
        time = torch.as_tensor(time, dtype=torch.float64)
        allowed = (time >= 0) & (time <= self.maximum_time)
        if positive and bool((time <= 0).any()):
            raise ValueError(
                f"time must be positive, there is no noise at time 0, got {_first(time, time <= 0)}"
            )
        if not bool(allowed.all()):
            raise ValueError(
                f"time must lie in [0, {self.maximum_time:g}], got {_first(time, ~allowed)}"
            )
        return time

    def _scales_for(
        self, x: Tensor, time: float | Tensor, *, positive: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Check a time and return its ᾱ_t and β̄_t, shaped to multiply x."""
        number = _as_number(time)
        if number is not None:
            signal, noise = _scales_of_number(self, number, positive)
            return (
                torch.scalar_tensor(signal, dtype=torch.float64),
                torch.scalar_tensor(noise, dtype=torch.float64),
            )
        signals, noises = self._scales(self._check_time(time, positive=positive))
        return _over_event(signals, x), _over_event(noises, x)

    def _check_sigma(self, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        largest = float(self.sigma(self.maximum_time))
        # A sigma that was computed from the largest time may have been rounded up.
        allowed = (sigma >= 0) & (sigma <= largest * (1 + 1e-9))
        if not bool(allowed.all()):
            raise ValueError(
                f"sigma must lie in [0, {largest:g}], the range of the schedule, "
                f"got {_first(sigma, ~allowed)}"
            )
        return sigma.clamp(max=largest)


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
            diffusers plus one.
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
            table[step - 1], table[step.clamp(max=self.num_steps - 1)], time - floor
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


@lru_cache(maxsize=4096)
def _scales_of_number(schedule: NoiseSchedule, time: float, positive: bool) -> tuple[float, float]:
    """Return ᾱ_t and β̄_t of one time; a sampler comes back to its grid at every call."""
    signal, noise = schedule._scales(schedule._check_time(time, positive=positive))
    return signal.item(), noise.item()


def _as_number(time: float | Tensor) -> float | None:
    """Return one time that is known to the host as a number; None for any other tensor."""
    if not isinstance(time, Tensor):
        return time
    known = time.ndim == 0 and time.device.type == "cpu" and not time.requires_grad
    return None if time.is_complex() or not known else time.item()


def _plain(value: Tensor) -> float | Tensor:
    """Return a value that the host knows as a number, which costs no operation to compute with."""
    number = _as_number(value)
    return value if number is None else number


def _add_multiple(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """x + factor · y, in one pass where the factor is a number."""
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _over_event(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value, or one per example, to multiply x.

    A single value stays float64: torch applies it without rounding it to the dtype of x first.
    """
    if values.ndim == 0:
        return values
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"time must be a number or one per example, of shape ({len(x)},), "
            f"got {tuple(values.shape)}"
        )
    return values.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def _with_zero(positive: Tensor) -> Tensor:
    return torch.cat([positive, positive.new_zeros(1)])


def _first(values: Tensor, wrong: Tensor) -> float:
    return values.detach()[wrong].reshape(-1)[0].item()


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


def _check_spacing(spacing: str, allowed: tuple[str, ...]) -> None:
    if spacing not in allowed:
        raise ValueError(f"spacing must be one of {', '.join(allowed)}, got {spacing!r}")
