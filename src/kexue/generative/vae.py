"""Likelihoods of quantised data, and code lengths in bits.

    P(v) = Φ((v + h/2 − μ)/s) − Φ((v − h/2 − μ)/s)

is the probability of the value v on a grid of spacing h, the outermost bins extended to infinity:
a code length needs a probability, or a density on data to which uniform noise was added.

Source: https://arxiv.org/abs/1312.6114, https://arxiv.org/abs/1701.05517 (discretised likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

__all__ = ["DiscretizedNormal", "bits_per_dimension", "uniform_dequantize"]


class DiscretizedNormal(Distribution):
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
        if not 0 < bin_width < math.inf:
            raise ValueError(f"bin_width must be positive, got {bin_width}")
        if not low < high:
            raise ValueError(f"high must be larger than low, got low {low} and high {high}")
        bins = (high - low) / bin_width
        if abs(bins - round(bins)) > 1e-6 * bins:
            raise ValueError(
                "low and high must be a whole number of bins apart, "
                f"got ({high} - {low}) / {bin_width} = {bins}"
            )
        self.loc, self.scale = broadcast_all(loc, scale)
        _check_real(self.loc, "loc")
        _check_real(self.scale, "scale")
        self.bin_width, self.low, self.high = bin_width, low, high
        self._last_level = round(bins)
        super().__init__(self.loc.shape, validate_args=False)
        # torch's default is switched off for a whole process by its first torch.compile.
        self._validate_args = validate_args is not False
        if self._validate_args and bool((self.scale <= 0).any()):
            raise ValueError(f"scale must be positive, got {self.scale.min().item()}")

    @property
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.low, self.high)

    @property
    def support_values(self) -> Float[Tensor, " levels"]:
        """All values that have a probability."""
        level = torch.arange(self._last_level + 1, dtype=torch.float64, device=self.loc.device)
        return (self.low + self.bin_width * level).to(self.loc.dtype)

    def expand(
        self, batch_shape: Sequence[int], _instance: object | None = None
    ) -> DiscretizedNormal:
        """Return the distribution with parameters expanded to another batch shape."""
        shape = torch.Size(batch_shape)
        return DiscretizedNormal(
            self.loc.expand(shape),
            self.scale.expand(shape),
            bin_width=self.bin_width,
            low=self.low,
            high=self.high,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log-probability of values on the grid; float32 at least."""
        level = torch.round((value.double() - self.low) / self.bin_width)
        if self._validate_args:
            self._check_on_grid(value, level)
        on_grid = self.low + self.bin_width * level
        # In float64: a bin may be far narrower than the distance from the mean.
        loc, scale = self.loc.double(), self.scale.double()
        lower = (on_grid - self.bin_width / 2 - loc) / scale
        upper = (on_grid + self.bin_width / 2 - loc) / scale
        log_prob = torch.where(
            level <= 0,
            torch.special.log_ndtr(upper),
            torch.where(
                level >= self._last_level,
                torch.special.log_ndtr(-lower),
                _log_interval(lower, upper),
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
        normal = torch.randn(
            torch.Size(sample_shape) + self.batch_shape,
            dtype=torch.float64,
            device=self.loc.device,
            generator=generator,
        )
        value = self.loc + self.scale * normal
        level = torch.round((value - self.low) / self.bin_width).clamp(0, self._last_level)
        return (self.low + self.bin_width * level).to(self.loc.dtype)

    def _check_on_grid(self, value: Tensor, level: Tensor) -> None:
        # A value of the grid is rounded to its own dtype; NaN passes, and stays what it is.
        rounding = torch.finfo(value.dtype).eps * max(abs(self.low), abs(self.high))
        tolerance = 1e-3 * self.bin_width + 2 * rounding
        distance = (value.double() - self.low - self.bin_width * level).abs()
        off = (distance > tolerance) | (level < 0) | (level > self._last_level)
        if bool(off.any()):
            raise ValueError(
                f"value must lie on the grid from {self.low} to {self.high} in steps of "
                f"{self.bin_width}, got {value[off.expand_as(value)][0].item()}"
            )


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
    uniform = torch.rand(value.shape, dtype=value.dtype, device=value.device, generator=generator)
    return value + bin_width * (uniform - 0.5)


def _log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Φ(upper) − Φ(lower)); reflected into the left tail, where logarithms are exact."""
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


def _check_real(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a real tensor, got {got}")
