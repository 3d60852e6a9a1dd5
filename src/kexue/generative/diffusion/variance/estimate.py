"""A table of clean variances from one pass over data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction, _check_state
from kexue.generative.diffusion.variance.clean import (
    TabulatedVariance,
    _check_data_range,
    _unclipped,
    _wide,
    clip_clean_variance,
)

__all__ = ["estimate_clean_variance"]

_ESTIMATORS = ("residual", "epsilon_norm", "mean_spread")


@torch.no_grad()
def estimate_clean_variance(
    denoiser: Denoiser,
    data: Float[Tensor, " examples *event"],
    *,
    times: Float[Tensor, " n"] | Sequence[float],
    estimator: str = "residual",
    per_dimension: bool = False,
    num_noise: int = 1,
    data_range: tuple[float, float] | None = None,
    batch_size: int = 256,
    condition: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> TabulatedVariance:
    """Return the average variance of clean data around a denoiser's estimate, at each time.

    With σ² = β̄²/ᾱ²:

    - residual: σ² E‖ε − ε̂‖²/d, the best variance for x̂_0 as it is, right or wrong;
    - epsilon_norm: σ² (1 − E‖ε̂‖²/d), right for a perfect x̂_0;
    - mean_spread: Var[x_0] − E‖x̂_0 − E x_0‖²/d, right for a perfect x̂_0.

    For Gaussian data one draw of "residual" has a relative standard deviation of √2 at every
    noise level. "epsilon_norm" is better than that at low noise and useless at high noise, where
    it multiplies a tiny difference by σ²; "mean_spread" is good at high noise. See
    ``standard_error`` of the result.

    Any clipping of x̂_0 by the denoiser is set aside. Costs examples × times × num_noise
    evaluations of the denoiser, and the memory of one batch. Noise is drawn batch by batch in the
    order of the data, for each batch from the smallest time on.

    Parameters
    ----------
    denoiser : Denoiser
        A trained one; what it learned from may be used here again.
    data : Tensor, shape (examples, *event)
        Clean data.
    times : Tensor or sequence, shape (n,)
        Positive times, in any order.
    estimator : {"residual", "epsilon_norm", "mean_spread"}
        Which of the three.
    per_dimension : bool
        A variance for each entry of an example instead of their mean.
    num_noise : int
        Draws of noise for each example.
    data_range : (float, float), optional
        Bounds of the data, which bound the variance too.
    batch_size : int
        Examples at a time.
    condition : Tensor, shape (examples, ...), optional
        Passed to the denoiser.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``data``.

    Returns
    -------
    TabulatedVariance
        Clipped to what is possible. Its ``standard_error`` is that of the mean over entries,
        before clipping: the standard deviation over examples divided by √examples. Draws for the
        same example are averaged first, because they are not independent. For "mean_spread" it
        counts Var[x_0] as known: the error of the data's own variance, Var[x_0] √(2/(examples d))
        for d independent normal entries, comes on top, and is most of it at high noise.

    Raises
    ------
    ValueError
        For an unknown estimator, numbers below 1, no data, repeated times or times that are out
        of range, and a ``data_range`` that does not increase.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.tensor([0.3]), schedule=DiscreteSchedule.linear()
    ... )
    >>> generator = torch.Generator().manual_seed(0)
    >>> data = denoiser.sample(20_000, generator=generator)
    >>> table = estimate_clean_variance(denoiser, data, times=[500, 100], generator=generator)
    >>> table.values  # exactly 0.0830 and 0.2925
    tensor([0.08..., 0.29...], dtype=torch.float64)
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(_ESTIMATORS)}, got {estimator!r}")
    for name, count in (("num_noise", num_noise), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    _check_data_range(data_range)
    _check_state(data, "data")
    if not data.numel():
        raise ValueError(f"data must hold at least one example, got shape {tuple(data.shape)}")
    if condition is not None:
        condition = torch.as_tensor(condition)
    if condition is not None and condition.ndim and len(condition) != len(data):
        raise ValueError(
            f"condition must have one entry for each of the {len(data)} examples, "
            f"got shape {tuple(condition.shape)}"
        )
    schedule = denoiser.schedule
    nodes = torch.as_tensor(times, dtype=torch.float64, device="cpu").reshape(-1).sort().values
    if bool((nodes.diff() == 0).any()):
        raise ValueError(f"times must differ from each other, got {nodes.tolist()}")
    schedule._check_time(nodes, positive=True)

    denoiser = _unclipped(denoiser)
    total, dimensions = len(data), math.prod(data.shape[1:])
    centre, spread = _moments(data, batch_size) if estimator == "mean_spread" else (None, None)
    shape = data.shape[1:] if per_dimension else ()
    sums = torch.zeros(len(nodes), *shape, dtype=torch.float64, device=data.device)
    # Over examples, of the mean over entries: sum and sum of squares.
    first, second = sums.new_zeros(len(nodes)), sums.new_zeros(len(nodes))
    for start in range(0, total, batch_size):
        clean = data[start : start + batch_size]
        given = condition
        if condition is not None and condition.ndim:
            given = condition[start : start + batch_size]
        for row, time in enumerate(nodes.tolist()):
            example = sums.new_zeros(len(clean))
            for _ in range(num_noise):
                noise = torch.randn(
                    clean.shape, dtype=clean.dtype, device=clean.device, generator=generator
                )
                x = schedule.add_noise(clean, noise, time)
                squared = _squared(estimator, denoiser.predict(x, time, condition=given), noise,
                                   centre)  # fmt: skip
                entries = squared.reshape(len(clean), dimensions)
                example += entries.mean(1, dtype=torch.float64) / num_noise
                if per_dimension:
                    sums[row] += squared.sum(0, dtype=torch.float64) / num_noise
            first[row] += example.sum()
            second[row] += example.square().sum()

    mean = (sums if per_dimension else first) / total
    ratio = schedule.sigma(nodes).to(mean) ** 2
    over_entries = ratio.reshape(-1, *(1,) * (mean.ndim - 1))
    if estimator == "residual":
        values, scale = over_entries * mean, ratio
    elif estimator == "epsilon_norm":
        values, scale = over_entries * (1 - mean), ratio
    else:
        assert spread is not None
        values, scale = (spread if per_dimension else spread.mean()) - mean, torch.ones_like(ratio)
    if total > 1:
        variance = (second - first**2 / total).clamp(min=0) / (total - 1)
        error = scale * torch.sqrt(variance / total)
    else:
        error = torch.full_like(scale, math.inf)
    values = clip_clean_variance(values, schedule, nodes.to(values), data_range=data_range)
    return TabulatedVariance(nodes.to(values), values, schedule=schedule, standard_error=error)


def _squared(
    estimator: str, prediction: Prediction, noise: Tensor, centre: Tensor | None
) -> Tensor:
    """What the estimator averages, per entry.

    The residual is formed between noises: x̂_0 of a noise prediction has been divided by ᾱ ≈ 0.
    """
    if estimator == "residual":
        return (_wide(prediction.epsilon) - noise).square()
    if estimator == "epsilon_norm":
        return _wide(prediction.epsilon).square()
    sample = _wide(prediction.sample)
    assert centre is not None
    return (sample - centre.to(sample)).square()


def _moments(data: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each entry."""
    batches = data.split(batch_size)
    centre = torch.stack([b.sum(0, dtype=torch.float64) for b in batches]).sum(0) / len(data)
    squares = [(b.double() - centre).square().sum(0) for b in batches]
    return centre, torch.stack(squares).sum(0) / len(data)
