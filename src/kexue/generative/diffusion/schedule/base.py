"""What all noise schedules have in common, and how their scales meet a batch of states."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["NoiseSchedule"]


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
        Every method refuses a time outside [0, maximum_time], but for one inside of
        `torch.compile`, where there are no values to look at.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> schedule = DiscreteSchedule.linear()
    >>> isinstance(schedule, NoiseSchedule), schedule.minimum_time, schedule.maximum_time
    (True, 1.0, 1000.0)
    >>> schedule.noise_scale(1)
    tensor(0.0100, dtype=torch.float64)
    """

    minimum_time: float
    maximum_time: float
    prior_scale: float = 1.0
    # A class that sets it promises that its scales change with its attributes only.
    _remembers: ClassVar[bool]

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
        if torch.compiler.is_compiling():
            return time
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
        if number is not None and not torch.compiler.is_compiling():
            signal, noise = self._scales_of_number(number, positive)
            return (
                torch.scalar_tensor(signal, dtype=torch.float64),
                torch.scalar_tensor(noise, dtype=torch.float64),
            )
        signals, noises = self._scales(self._check_time(time, positive=positive))
        return _over_event(signals, x), _over_event(noises, x)

    def _scales_of_number(self, time: float, positive: bool) -> tuple[float, float]:
        """Return ᾱ_t and β̄_t of one time; a sampler comes back to its grid at every call."""
        known = self.__dict__.get("_known_scales", {})
        scales = known.get((time, positive))
        if scales is None:
            signal, noise = self._scales(self._check_time(time, positive=positive))
            scales = signal.item(), noise.item()
            # Looked up in the class itself: what inherits from it may change in other ways.
            if "_remembers" in type(self).__dict__:
                if len(known) >= 4096:
                    known.clear()
                known[time, positive] = scales
                self.__dict__["_known_scales"] = known
        return scales

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_known_scales", None)
        super().__setattr__(name, value)

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


def _as_number(time: float | Tensor) -> float | None:
    """Return one time that is known to the host as a number; None for any other tensor."""
    if not isinstance(time, Tensor):
        return time
    # A graph that is compiled holds no values: a tensor stays one in it.
    known = time.ndim == 0 and time.device.type == "cpu" and not time.requires_grad
    known = known and not torch.compiler.is_compiling()
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
            f"time must be a number or one per example, of shape {tuple(x.shape[:1])}, "
            f"got {tuple(values.shape)}"
        )
    return values.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def _with_zero(positive: Tensor) -> Tensor:
    return torch.cat([positive, positive.new_zeros(1)])


def _first(values: Tensor, wrong: Tensor) -> float:
    return values.detach()[wrong].reshape(-1)[0].item()


def _check_spacing(spacing: str, allowed: tuple[str, ...]) -> None:
    if spacing not in allowed:
        raise ValueError(f"spacing must be one of {', '.join(allowed)}, got {spacing!r}")
