"""A bound on the negative log-likelihood of a denoiser, on any grid of times.

    −log q(x_0) ≤ KL(p(x_T | x_0) ‖ N(0, I)) + Σ KL(p(x_s | x_t, x_0) ‖ q(x_s | x_t))
                  + E[−log q(x_0 | x_{t_1})]

The transitions are normal, so each divergence is in closed form and only x_t is drawn.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.diffusion.denoiser.prediction import Denoiser, _check_state
from kexue.generative.diffusion.sampling import CleanVariance, _grid, transition_weights
from kexue.generative.vae import DiscretizedNormal, bits_per_dimension

__all__ = ["VariationalBound", "variational_bound"]

_DECODERS = ("normal", "discretized_normal")


@dataclass(frozen=True)
class VariationalBound:
    """The three parts of the bound, in nats per example.

    Attributes
    ----------
    prior : Tensor, shape (batch,)
        Divergence of the noisiest state from the start of sampling.
    transitions : Tensor, shape (batch, num_steps - 1)
        Divergence of each transition, from the noisiest to the last before the data.
    reconstruction : Tensor, shape (batch,)
        Negative log-likelihood of the data given the least noisy state.
    num_dimensions : int
        Entries of one example.

    Examples
    --------
    >>> parts = [torch.tensor([1.0]), torch.tensor([[2.0, 3.0]]), torch.tensor([4.0])]
    >>> bound = VariationalBound(*parts, num_dimensions=10)
    >>> bound.total, bound.bits_per_dimension()
    (tensor([10.]), tensor([1.4427]))
    """

    prior: Float[Tensor, " batch"]
    transitions: Float[Tensor, "batch transitions"]
    reconstruction: Float[Tensor, " batch"]
    num_dimensions: int

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Upper bound on the negative log-likelihood, in nats."""
        return self.prior + self.transitions.sum(1) + self.reconstruction

    def bits_per_dimension(self, *, bin_width: float = 1.0) -> Float[Tensor, " batch"]:
        """Return the bound in bits per entry.

        Parameters
        ----------
        bin_width : float
            Spacing of the values that a density stands for; leave it at 1 for a discretised
            decoder, whose probabilities need no correction.

        Returns
        -------
        Tensor, shape (batch,)
        """
        return bits_per_dimension(-self.total, self.num_dimensions, bin_width=bin_width)


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    clean: Float[Tensor, " batch *event"],
    *,
    times: Float[Tensor, " length"] | None = None,
    num_steps: int | None = None,
    eta: float = 1.0,
    clean_variance: CleanVariance | None = None,
    decoder: str = "normal",
    decoder_variance: float | None = None,
    bin_width: float | None = None,
    low: float = -1.0,
    high: float = 1.0,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> VariationalBound:
    """Return an upper bound on −log q(x) for each example, with one draw per term.

    Draws one noise per transition, from the noisiest on, and one for the last term. Cost: one
    call of the denoiser a step. On quantised data end the grid where the noise is about half a
    bin: a network pays for its errors at every level below, a discretised decoder does not.

    Parameters
    ----------
    denoiser : Denoiser
        The model.
    clean : Tensor, shape (batch, *event)
        Data to score; held-out data for a likelihood that means anything.
    times : Tensor, shape (length,), optional
        Strictly decreasing times that end at 0.
    num_steps : int, optional
        Use ``schedule.times(num_steps)`` instead of ``times``.
    eta : float
        Share of the posterior noise, in (0, 1].
    clean_variance : callable, optional
        Estimate of Var[x_0 | x_t], see `reverse_transition`.
    decoder : {"normal", "discretized_normal"}
        Density, or probability of values on a grid.
    decoder_variance : float, optional
        Variance of the decoder. By default the clean variance at the last positive time, or
        without one the posterior variance of the transition into it.
    bin_width, low, high : float
        Grid of the discretised decoder.
    condition : Tensor, optional
        Passed to the denoiser and to ``clean_variance``.
    generator : torch.Generator, optional
        Source of randomness, on the device of ``clean``.

    Returns
    -------
    VariationalBound
        In float64.

    Raises
    ------
    ValueError
        For a grid that does not end at 0, an unknown decoder, a discretised one without
        ``bin_width``, no decoder variance to be had, or ``eta`` outside (0, 1].

    Examples
    --------
    Gaussian data and its exact denoiser: the bound is the entropy, for any number of steps.

    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.tensor([[0.7]]), torch.tensor([0.3]), schedule=DiscreteSchedule.linear()
    ... )
    >>> generator = torch.Generator().manual_seed(0)
    >>> data = denoiser.sample(20_000, generator=generator)
    >>> for steps in (1, 10):
    ...     bound = variational_bound(
    ...         denoiser, data, num_steps=steps, clean_variance=denoiser.clean_variance,
    ...         generator=generator,
    ...     )
    ...     print(round(bound.total.mean().item(), 2))
    0.82
    0.82
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must lie in (0, 1], got {eta}")
    if decoder not in _DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(_DECODERS)}, got {decoder!r}")
    if decoder == "discretized_normal" and bin_width is None:
        raise ValueError("bin_width must be given for the decoder 'discretized_normal', got None")
    if decoder_variance is not None and not 0 < decoder_variance < math.inf:
        raise ValueError(f"decoder_variance must be positive, got {decoder_variance}")
    _check_state(clean, "clean")
    schedule = denoiser.schedule
    grid = _grid(schedule, times, num_steps, to_zero=True)
    if decoder_variance is None and clean_variance is None and len(grid) == 2:
        raise ValueError(
            "decoder_variance must be given for one step without clean_variance: "
            "there is no transition to take it from"
        )

    def noisy(time: Tensor) -> Tensor:
        noise = torch.randn(
            clean.shape, dtype=clean.dtype, device=clean.device, generator=generator
        )
        return schedule.add_noise(clean, noise, time)

    # Differences are formed in float32 at least, and added up in float64.
    wide = clean if clean.dtype.itemsize >= 4 else clean.float()
    exact = clean.double()
    transitions = []
    weights = transition_weights(schedule, grid[:-1], grid[1:], eta=eta)
    ratios = ((weights.clean / weights.noise) ** 2).tolist()
    for time, ratio in zip(grid[:-2].unbind(), ratios, strict=False):
        x = noisy(time)
        prediction = denoiser.predict(x, time, condition=condition)
        # In units of the noise σ²: the squared error of the mean and the further variance.
        squared = (wide - prediction.sample) ** 2
        if clean_variance is None:
            transitions.append(_sum_event(squared) * (ratio / 2))
        else:
            further = ratio * clean_variance(x, time, prediction._unclamped, condition).double()
            error = (ratio * squared.double() - further) / (1 + further) + torch.log1p(further)
            transitions.append(_sum_event(error) / 2)

    last = grid[-2]
    x = noisy(last)
    prediction = denoiser.predict(x, last, condition=condition)
    variance: Tensor
    if decoder_variance is not None:
        variance = exact.new_tensor(decoder_variance)
    elif clean_variance is not None:
        variance = clean_variance(x, last, prediction._unclamped, condition).to(exact)
    else:
        variance = (weights.noise[-2] / eta).to(exact) ** 2
    mean = prediction.sample.to(exact)
    if bin_width is None or decoder == "normal":
        log_prob = -((exact - mean) ** 2 / variance + torch.log(2 * math.pi * variance)) / 2
    else:
        likelihood = DiscretizedNormal(
            mean, variance.sqrt().expand_as(mean), bin_width=bin_width, low=low, high=high
        )
        log_prob = likelihood.log_prob(exact)

    empty = exact.new_zeros(len(exact), 0)
    return VariationalBound(
        prior=_prior_divergence(exact, *schedule._scales(grid[0]), schedule.prior_scale),
        transitions=torch.stack(transitions, 1) if transitions else empty,
        reconstruction=-_sum_event(log_prob),
        num_dimensions=math.prod(clean.shape[1:]),
    )


def _prior_divergence(clean: Tensor, signal: Tensor, noise: Tensor, prior_scale: float) -> Tensor:
    """KL(N(ᾱ x_0, β̄²) ‖ N(0, prior_scale²))."""
    excess = (noise / prior_scale) ** 2 - 1
    entries = math.prod(clean.shape[1:])
    squares = (signal / prior_scale) ** 2 * _sum_event(clean**2)
    return (squares + entries * (excess - torch.log1p(excess))) / 2


def _sum_event(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, dtype=torch.float64) if values.ndim > 1 else values.double()
