r"""Positions to train with, so that the model reads inputs longer than those it was trained on.

Training on the positions 0, 1, …, N - 1 leaves every later position unseen. Two ways to show the
model all of them beforehand, for any position code and at no cost at test time:

    gaps    random_positions        a sorted random subset of {0, …, L - 1} for every sequence;
            evenly_spaced_positions  at test, ⌊i L / n⌋
    scale   equal_mean_positions     i n'/N with a random n' of mean N for every sequence;
            arange                   at test, 0, 1, 2, …, which is the mean of those in training

Of a random subset of N out of L, the i-th position (i = 1, …, N) has

    mean i (L + 1)/(N + 1) - 1,    variance i (N + 1 - i) (L + 1) (L - N) / ((N + 1)² (N + 2)).

Attention, too, is spread over more tokens than in training; :func:`log_length_factor` is what its
logits are multiplied by against that (``MultiHeadAttention(..., log_length=N)`` does it).

References
----------
Su Jianlin, "Transformer升级之路：8、长度外推性与位置鲁棒性". Ruoss et al., "Randomized Positional
Encodings Boost Length Generalization of Transformers", https://arxiv.org/abs/2305.16843.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Float64, Int64, Real
from scipy.special import betaincinv
from torch import Tensor

__all__ = [
    "equal_mean_positions",
    "evenly_spaced_positions",
    "log_length_factor",
    "random_positions",
]

# Above so many positions for each that is taken, sorting costs less than marking.
_DENSE = 8

Lengths: TypeAlias = Callable[[int, torch.Generator | None], Tensor]
_Distribution: TypeAlias = Literal["exponential", "beta"]


def random_positions(
    length: int,
    max_length: int,
    *,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Int64[Tensor, "*batch length"]:
    """Draw increasing positions for a sequence, all subsets of {0, …, max_length - 1} alike.

    For training; at test use :func:`evenly_spaced_positions` with the same ``max_length``, or draw
    again. Every row is drawn for itself. The cost of a row is of order length·log(length), however
    large ``max_length`` is.

    Parameters
    ----------
    length : int
        Number of tokens.
    max_length : int
        Number of positions to draw from, larger than any length at test.
    batch_size : int, optional
        Number of sequences; one without a batch dimension by default. A batch is not a series of
        single draws from the same generator.
    generator : torch.Generator, optional
        Source of the draws, which are made on its device.
    device : torch.device or str, optional
        Where the positions go; they stay where they were drawn by default.

    Returns
    -------
    Tensor, shape (length,) or (batch_size, length)
        int64, sorted, distinct.

    Raises
    ------
    ValueError
        For a ``length`` below 1 or above ``max_length``, or a negative ``batch_size``.
    TypeError
        For sizes that are no integers.

    Examples
    --------
    >>> random_positions(5, 12, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([5])
    >>> random_positions(4, 4, batch_size=2)
    tensor([[0, 1, 2, 3],
            [0, 1, 2, 3]])
    """
    _check_lengths(length, max_length)
    rows = _checked_rows(batch_size)
    place = _place_of_draws(generator, device)
    draw = _distinct if max_length > _DENSE * length else _distinct_by_mask
    drawn = draw(length, max_length, rows, generator, place)
    return _without_batch(drawn, batch_size).to(device or place)


def evenly_spaced_positions(
    length: int,
    max_length: int,
    *,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> Real[Tensor, " length"]:
    """Return the positions i·max_length/length, which are nearly the mean of the random ones.

    Parameters
    ----------
    length : int
        Number of tokens.
    max_length : int
        As in training with :func:`random_positions`.
    dtype : torch.dtype
        Rounded down for an integer dtype, the real values for a floating one.
    device : torch.device or str, optional
        Where the positions go.

    Returns
    -------
    Tensor, shape (length,)

    Raises
    ------
    ValueError
        For a ``length`` below 1 or above ``max_length``, or a ``dtype`` in which positions merge.
    TypeError
        For sizes that are no integers.

    Examples
    --------
    >>> evenly_spaced_positions(5, 12)
    tensor([0, 2, 4, 7, 9])
    """
    _check_lengths(length, max_length)
    if dtype.is_floating_point:
        _check_fractional(dtype)
    elif dtype.is_complex or dtype == torch.bool or torch.iinfo(dtype).max < max_length - 1:
        raise ValueError(f"dtype must hold positions up to {max_length - 1}, got {dtype}")
    index = torch.arange(length, device=device)
    if dtype.is_floating_point:
        return (index.double() * max_length / length).to(dtype)
    # Whole steps apart, because index * max_length may not fit.
    step, rest = divmod(max_length, length)
    return (index * step + index * rest // length).to(dtype)


def equal_mean_positions(
    length: int,
    *,
    distribution: _Distribution | Lengths = "exponential",
    max_length: float | None = None,
    concentration: float = 2.0,
    endpoint: bool = False,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch length"]:
    """Draw positions of a random scale whose mean is 0, 1, 2, …, the positions at test.

    A real length n' with mean ``length`` is drawn for every sequence, and its tokens stand at
    i·n'/length. Positions are fractional: for codes that are functions (sinusoidal, rotary), not
    for tables.

    Parameters
    ----------
    length : int
        Number of tokens N.
    distribution : {"exponential", "beta"} or callable
        Of n'. Exponential: P(n' > c·N) = e^(-c). Beta: n' = M·Beta(κN/M, κ(1 - N/M)) lies below
        M = ``max_length``. A callable takes the number of sequences and the generator, and returns
        so many values of n'; that their mean is ``length`` is its own affair.
    max_length : float, optional
        M of the beta distribution, above ``length``; the others have no use for it.
    concentration : float
        κ of the beta distribution; the smaller, the more often n' comes close to 0 and to M.
    endpoint : bool
        Whether the last token stands at n' itself, as in the article. The spacing is then
        n'/(length - 1), and the mean of the i-th position i·length/(length - 1).
    batch_size : int, optional
        Number of sequences; one without a batch dimension by default. A batch is not a series of
        single draws from the same generator.
    generator : torch.Generator, optional
        Source of the draws, which are made on its device.
    device : torch.device or str, optional
        Where the positions go; they stay where they were drawn by default.
    dtype : torch.dtype
        float32 or float64. Positions are computed in float64 either way.

    Returns
    -------
    Tensor, shape (length,) or (batch_size, length)

    Raises
    ------
    ValueError
        For a ``length`` below 1, an unknown ``distribution``, beta without a ``max_length`` above
        ``length``, a ``concentration`` that is not positive, a ``dtype`` in which positions merge,
        and a callable that returns another number of values, or negative or infinite ones.
    TypeError
        For sizes that are no integers.

    Examples
    --------
    >>> equal_mean_positions(4, distribution=lambda count, generator: torch.full((count,), 6.0))
    tensor([0.0000, 1.5000, 3.0000, 4.5000])
    """
    _check_integer("length", length)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not (math.isfinite(concentration) and concentration > 0):
        raise ValueError(f"concentration must be positive and finite, got {concentration}")
    _check_fractional(dtype)
    rows = _checked_rows(batch_size)
    place = _place_of_draws(generator, device)
    if callable(distribution):
        scale = _checked_scale(distribution(rows, generator), rows).to(place, torch.float64)
    elif distribution not in get_args(_Distribution):
        raise ValueError(
            f"distribution must be 'exponential', 'beta' or a callable, got {distribution!r}"
        )
    else:
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64, device=place)
        if distribution == "exponential":
            scale = -length * torch.log1p(-uniform)
        else:
            scale = _beta_quantile(uniform, length, max_length, concentration)
    # One token stands at 0 whether or not it is the last.
    spacing = scale / (max(length - 1, 1) if endpoint else length)
    index = torch.arange(length, dtype=torch.float64, device=place)
    positions = spacing.unsqueeze(-1) * index
    return _without_batch(positions, batch_size).to(device or place, dtype)


def log_length_factor(length: int, train_length: int) -> float:
    """Return log(length)/log(train_length), which keeps the entropy of attention nearly constant.

    Parameters
    ----------
    length : int
        Number of keys now, at least 1.
    train_length : int
        Number of keys in training, at least 2.

    Returns
    -------
    float
        What logits are multiplied by: 1 at the length of training.

    Raises
    ------
    ValueError
        For a ``length`` below 1 or a ``train_length`` below 2.
    TypeError
        For lengths that are no integers.

    Examples
    --------
    >>> log_length_factor(512, 64)
    1.5
    """
    _check_integer("length", length)
    _check_integer("train_length", train_length)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if train_length < 2:
        raise ValueError(f"train_length must be at least 2, got {train_length}")
    return math.log(length) / math.log(train_length)


def _distinct(
    count: int,
    size: int,
    rows: int,
    generator: torch.Generator | None,
    place: torch.device,
) -> Int64[Tensor, "rows count"]:
    """Sorted rows of ``count`` distinct numbers below ``size``.

    Numbers that stand twice in a row are drawn again until there are none. No number is treated
    unlike another on the way, so every subset is as likely as every other one.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randint(size, shape, generator=generator, device=place)

    drawn = draw(rows, count).sort(-1).values
    unfinished = torch.arange(rows, device=place)
    some = drawn
    while True:
        repeated = some[:, 1:] == some[:, :-1]
        redo = repeated.any(-1)
        unfinished, some, repeated = unfinished[redo], some[redo], repeated[redo]
        if not len(unfinished):
            return drawn
        some[:, 1:][repeated] = draw(int(repeated.sum()))
        some = some.sort(-1).values
        drawn[unfinished] = some


def _distinct_by_mask(
    count: int,
    size: int,
    rows: int,
    generator: torch.Generator | None,
    place: torch.device,
) -> Int64[Tensor, "rows count"]:
    """The same where the numbers are dense, without sorting: what was drawn is marked."""
    # The fewer are drawn, the fewer are drawn twice; the rest of a random subset is one, too.
    fewer = min(count, size - count)
    marked = torch.zeros(rows, size, dtype=torch.bool, device=place)
    row = torch.arange(rows, device=place)
    missing = torch.full((rows,), fewer, device=place)
    while len(row := row.repeat_interleave(missing)):
        marked[row, torch.randint(size, row.shape, generator=generator, device=place)] = True
        row = row.unique_consecutive()
        missing = fewer - marked[row].sum(-1)
    return (marked if fewer == count else ~marked).nonzero()[:, 1].view(rows, count)


def _beta_quantile(
    probability: Float64[Tensor, " rows"],
    length: int,
    max_length: float | None,
    concentration: float,
) -> Float64[Tensor, " rows"]:
    if max_length is None or not (math.isfinite(max_length) and max_length > length):
        raise ValueError(
            f"'beta' needs a finite max_length above length = {length}, got {max_length}"
        )
    mean = length / max_length
    quantile = betaincinv(
        concentration * mean, concentration * (1 - mean), probability.cpu().numpy()
    )
    return max_length * torch.from_numpy(quantile).to(probability.device)


def _checked_scale(scale: Any, rows: int) -> Tensor:
    if not isinstance(scale, Tensor) or scale.shape != (rows,):
        got = tuple(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"distribution must return a tensor of shape ({rows},), got {got}")
    if not bool(((scale >= 0) & scale.isfinite()).all()):
        raise ValueError("distribution must return finite values that are not negative")
    return scale


def _check_lengths(length: int, max_length: int) -> None:
    _check_integer("length", length)
    _check_integer("max_length", max_length)
    if not 1 <= length <= max_length:
        raise ValueError(f"length must lie between 1 and max_length = {max_length}, got {length}")


def _check_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _check_fractional(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype must be torch.float32 or torch.float64, got {dtype}: "
            "neighbouring positions would merge"
        )


def _checked_rows(batch_size: int | None) -> int:
    if batch_size is None:
        return 1
    _check_integer("batch_size", batch_size)
    if batch_size < 0:
        raise ValueError(f"batch_size must not be negative, got {batch_size}")
    return batch_size


def _place_of_draws(
    generator: torch.Generator | None, device: torch.device | str | None
) -> torch.device:
    if generator is not None:
        return generator.device
    return torch.get_default_device() if device is None else torch.device(device)


def _without_batch(rows: Tensor, batch_size: int | None) -> Tensor:
    return rows[0] if batch_size is None else rows
