"""Likelihoods of quantised data, and code lengths in bits.

    P(v) = F((v + h/2 − μ)/s) − F((v − h/2 − μ)/s),    F normal or logistic

is the probability of the value v on a grid of spacing h, the outermost bins extended to infinity:
a code length needs a probability, or a density on data to which uniform noise was added.

Source: https://arxiv.org/abs/1312.6114, https://arxiv.org/abs/1701.05517 (discretised likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Real
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

__all__ = [
    "DiscretizedLogistic",
    "DiscretizedNormal",
    "bits_per_dimension",
    "uniform_dequantize",
]


class _Discretized(Distribution):
    """A distribution of location and scale, rounded to a grid of values.

    What a kind of distribution adds is the logarithm of its standard cumulative distribution, that
    of an interval, and standard draws.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self,
        loc: Float[Tensor, "..."] | float,
        scale: Float[Tensor, "..."] | float,
        *,
        bin_width: float,
        low: float,
        high: float,
        validate_args: bool | None = None,
    ) -> None:
        self._last_level = _last_level(bin_width, low, high)
        self.loc, self.scale = broadcast_all(loc, scale)
        _check_real(self.loc, "loc")
        _check_real(self.scale, "scale")
        self.bin_width, self.low, self.high = bin_width, low, high
        super().__init__(self.loc.shape, validate_args=False)
        # torch's default is switched off for a whole process by its first torch.compile.
        self._validate_args = validate_args is not False
        if self._validate_args and bool((self.scale <= 0).any()):
            raise ValueError(f"scale must be positive, got {self.scale.min().item()}")

    @staticmethod
    def _log_cdf(at: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _log_interval(lower: Tensor, upper: Tensor, width: Tensor) -> Tensor:
        """Log-probability of the interval; its width carries digits that the ends have lost."""
        raise NotImplementedError

    @staticmethod
    def _standard_draws(
        shape: torch.Size, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        raise NotImplementedError

    @property
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.low, self.high)

    @property
    def support_values(self) -> Float[Tensor, " levels"]:
        """All values that have a probability."""
        level = torch.arange(self._last_level + 1, dtype=torch.float64, device=self.loc.device)
        return (self.low + self.bin_width * level).to(self.loc.dtype)

    def expand(self, batch_shape: Sequence[int], _instance: object | None = None) -> _Discretized:
        """Return the distribution with parameters expanded to another batch shape."""
        shape = torch.Size(batch_shape)
        return type(self)(
            self.loc.expand(shape),
            self.scale.expand(shape),
            bin_width=self.bin_width,
            low=self.low,
            high=self.high,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: Real[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log-probability of values on the grid, real or integer; float32 at least."""
        level = self._level(value)
        if self._validate_args:
            self._check_on_grid(value, level)
        on_grid = self.low + self.bin_width * level
        # In float64: a bin may be far narrower than the distance from the mean.
        distance, scale = on_grid - self.loc.double(), self.scale.double()
        lower = (distance - self.bin_width / 2) / scale
        upper = (distance + self.bin_width / 2) / scale
        log_prob = torch.where(
            level <= 0,
            self._log_cdf(upper),
            torch.where(
                level >= self._last_level,
                self._log_cdf(-lower),
                self._log_interval(lower, upper, self.bin_width / scale),
            ),
        )
        exact = torch.float64 in (value.dtype, self.loc.dtype)
        return log_prob if exact else log_prob.float()

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """Draw values of the grid; without gradient."""
        _check_generator(generator, self.loc)
        shape = torch.Size(sample_shape) + self.batch_shape
        value = self.loc + self.scale * self._standard_draws(shape, self.loc.device, generator)
        level = self._level(value).clamp(0, self._last_level)
        return (self.low + self.bin_width * level).to(self.loc.dtype)

    def _level(self, value: Tensor) -> Tensor:
        return torch.round((value.double() - self.low) / self.bin_width)

    def _check_on_grid(self, value: Tensor, level: Tensor) -> None:
        # A value of the grid is rounded to its own dtype; NaN passes, and stays what it is.
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        rounding = eps * max(abs(self.low), abs(self.high))
        tolerance = 1e-3 * self.bin_width + 2 * rounding
        distance = (value.double() - self.low - self.bin_width * level).abs()
        off = (distance > tolerance) | (level < 0) | (level > self._last_level)
        if bool(off.any()):
            raise ValueError(
                f"value must lie on the grid from {self.low} to {self.high} in steps of "
                f"{self.bin_width}, got {value[off.expand_as(value)][0].item()}"
            )


class DiscretizedNormal(_Discretized):
    """A normal distribution, rounded to a grid of values.

    Parameters
    ----------
    loc, scale : Tensor or float
        Mean and standard deviation before rounding; they broadcast.
    bin_width : float
        Spacing of the grid.
    low, high : float
        Its first and last value; their bins reach to infinity.
    validate_args : bool, optional
        Whether parameters and values are checked; they are unless this is False.

    Raises
    ------
    ValueError
        For a scale or bin width that is not positive, a grid that is not a whole number of bins
        wide, or a value that lies off the grid.

    Examples
    --------
    >>> pixel = DiscretizedNormal(torch.tensor(0.1), 0.2, bin_width=0.5, low=-1.0, high=1.0)
    >>> pixel.support_values
    tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    >>> pixel.log_prob(pixel.support_values).exp().sum()
    tensor(1.)
    """

    @staticmethod
    def _log_cdf(at: Tensor) -> Tensor:
        return torch.special.log_ndtr(at)

    @staticmethod
    def _log_interval(lower: Tensor, upper: Tensor, width: Tensor) -> Tensor:
        # Reflected into the left tail, where logarithms are exact.
        reflect = lower + upper > 0
        lower, upper = (
            torch.where(reflect, -upper, lower),
            torch.where(reflect, -lower, upper),
        )
        log_upper = torch.special.log_ndtr(upper)
        difference = torch.special.log_ndtr(lower) - log_upper
        # log(1 − e^d): either form loses all digits where the other is exact.
        apart = difference < -math.log(2)
        share = torch.where(
            apart,
            torch.log1p(-torch.exp(difference.clamp(max=-math.log(2)))),
            torch.log(-torch.expm1(difference)),
        )
        return log_upper + share

    @staticmethod
    def _standard_draws(
        shape: torch.Size, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device, generator=generator)


class DiscretizedLogistic(_Discretized):
    """A logistic distribution, rounded to a grid of values: tails that forgive an outlier.

    Parameters
    ----------
    loc, scale : Tensor or float
        Mean and scale before rounding; they broadcast. The standard deviation is π/√3 scales.
    bin_width : float
        Spacing of the grid.
    low, high : float
        Its first and last value; their bins reach to infinity.
    validate_args : bool, optional
        Whether parameters and values are checked; they are unless this is False.

    Raises
    ------
    ValueError
        For a scale or bin width that is not positive, a grid that is not a whole number of bins
        wide, or a value that lies off the grid.

    Examples
    --------
    >>> pixel = DiscretizedLogistic(torch.tensor(0.1), 0.2, bin_width=0.5, low=-1.0, high=1.0)
    >>> pixel.log_prob(pixel.support_values).exp()
    tensor([0.0141, 0.1340, 0.5311, 0.2835, 0.0373])
    """

    @staticmethod
    def _log_cdf(at: Tensor) -> Tensor:
        return logsigmoid(at)

    @staticmethod
    def _log_interval(lower: Tensor, upper: Tensor, width: Tensor) -> Tensor:
        # σ(b) − σ(a) = σ(b) σ(−a) (1 − e^(a−b))
        return logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-width))

    @staticmethod
    def _standard_draws(
        shape: torch.Size, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        uniform = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
        return torch.logit(uniform)


def bits_per_dimension(
    log_likelihood: Float[Tensor, "..."], num_dimensions: int, *, bin_width: float = 1.0
) -> Float[Tensor, "..."]:
    """Return a log-likelihood in nats as a code length: −ll/(d ln 2) − log2(bin_width).

    Parameters
    ----------
    log_likelihood : Tensor
        Log-density or log-probability of whole examples, in nats.
    num_dimensions : int
        Entries d of one example.
    bin_width : float
        Spacing of the original values where the likelihood is a density of dequantised data; 1
        for a probability.

    Returns
    -------
    Tensor
        Bits per entry.

    Raises
    ------
    ValueError
        Where ``num_dimensions`` is below 1 or ``bin_width`` is not positive.

    Examples
    --------
    >>> bits_per_dimension(torch.tensor(-1000.0), 64, bin_width=1 / 8)
    tensor(25.5421)
    """
    _check_real(log_likelihood, "log_likelihood")
    if num_dimensions < 1:
        raise ValueError(f"num_dimensions must be at least 1, got {num_dimensions}")
    if not 0 < bin_width < math.inf:
        raise ValueError(f"bin_width must be positive, got {bin_width}")
    return -log_likelihood / (num_dimensions * math.log(2)) - math.log2(bin_width)


def uniform_dequantize(
    value: Float[Tensor, "*shape"],
    *,
    bin_width: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Return quantised values plus U(−bin_width/2, bin_width/2).

    A density of the result, in bits with this bin width, bounds the code length of the original.

    Parameters
    ----------
    value : Tensor
        Values of any shape.
    bin_width : float
        Spacing of their grid.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``value``.

    Returns
    -------
    Tensor
        Of the same shape and dtype.

    Raises
    ------
    ValueError
        Where ``bin_width`` is not positive or ``value`` is not real.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> noisy = uniform_dequantize(torch.zeros(1000), bin_width=0.5, generator=generator)
    >>> bool((noisy.abs() <= 0.25).all())
    True
    """
    _check_real(value, "value")
    if not 0 < bin_width < math.inf:
        raise ValueError(f"bin_width must be positive, got {bin_width}")
    _check_generator(generator, value)
    uniform = torch.rand(value.shape, dtype=value.dtype, device=value.device, generator=generator)
    return value + bin_width * (uniform - 0.5)


def _check_generator(generator: torch.Generator | None, x: Tensor) -> None:
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(
            f"the generator must be on the device of x, {x.device}, got {generator.device}"
        )


def _last_level(bin_width: float, low: float, high: float) -> int:
    """Return the number of the highest level, from 0, of a grid that is one."""
    if not 0 < bin_width < math.inf:
        raise ValueError(f"bin_width must be positive, got {bin_width}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"high must be larger than low and both finite, got low {low} and high {high}"
        )
    bins = (high - low) / bin_width
    if abs(bins - round(bins)) > 1e-6 * bins:
        raise ValueError(
            "low and high must be a whole number of bins apart, "
            f"got ({high} - {low}) / {bin_width} = {bins}"
        )
    return round(bins)


def _check_real(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a real tensor, got {got}")
