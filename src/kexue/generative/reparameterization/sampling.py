"""Samples that are functions of noise: normal, Gumbel-max, Gumbel-softmax and its posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue.generative.reparameterization.perturbation import (
    _check_count,
    _check_floating,
    _check_logits,
    _check_temperature,
    _conditional,
    _gumbel,
    _hardened,
    _holds,
    _perturbed,
    _tempered,
    _working,
)

__all__ = [
    "ExponentialTemperature",
    "conditional_gumbel",
    "gumbel_max",
    "gumbel_noise",
    "gumbel_softmax",
    "reparameterize_normal",
]


def gumbel_noise(
    shape: int | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Draw standard Gumbel noise, -log E with E exponential; always finite.

    In float32 on a CPU the largest value is 25 (of one draw in 7e10), in float64 it is 36.7.

    Parameters
    ----------
    shape : int or sequence of int
        Shape of the result.
    dtype : torch.dtype
        Half precision is drawn in float32 and rounded.
    device : torch.device, optional
        Where the noise is drawn.
    generator : torch.Generator, optional
        Source of randomness on that device; the global one by default.

    Returns
    -------
    Tensor
        Noise of mean 0.5772 and variance π²/6.

    Raises
    ------
    TypeError
        For a dtype that is not floating-point.
    ValueError
        For a negative length in ``shape``.

    Examples
    --------
    >>> noise = gumbel_noise((1000, 100), generator=torch.Generator().manual_seed(0))
    >>> bool((noise.mean() - 0.5772).abs() < 0.02)
    True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating-point, got {dtype}")
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape must have lengths of at least 0, got {lengths}")
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    return _gumbel(lengths, drawn, device, generator).to(dtype)


def reparameterize_normal(
    mean: Float[Tensor, "*shape"],
    log_variance: Float[Tensor, "*shape"],
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Draw from a normal distribution, differentiably: mean + exp(log_variance/2) ε.

    Parameters
    ----------
    mean, log_variance : Tensor
        Parameters of independent normal variables, of one shape. A log-variance of -inf means no
        spread.
    samples : int, optional
        Number of draws, as a new leading dimension; one draw without it by default.
    generator : torch.Generator, optional
        Source of randomness on the device of ``mean``; the global one by default.

    Returns
    -------
    Tensor
        Shape ``(*mean.shape)`` or ``(samples, *mean.shape)``, dtype of ``mean``.

    Raises
    ------
    TypeError
        For parameters that are not floating-point.
    ValueError
        For shapes that differ, NaN, an infinite mean, a log-variance of +inf, or ``samples``
        below 1.

    Examples
    --------
    >>> mean, log_variance = torch.zeros(3), torch.full((3,), -torch.inf)
    >>> reparameterize_normal(mean, log_variance, samples=2)
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    _check_floating(mean, "mean")
    _check_floating(log_variance, "log_variance")
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"mean and log_variance must have one shape, got {tuple(mean.shape)} "
            f"and {tuple(log_variance.shape)}"
        )
    if not _holds((mean.isfinite() & (log_variance < math.inf)).all()):
        raise ValueError("mean must be finite and log_variance below +inf, got nan or infinity")
    if samples is not None:
        _check_count(samples, "samples")
    lead = () if samples is None else (samples,)
    centre = _working(mean)
    epsilon = torch.randn(
        (*lead, *mean.shape), dtype=centre.dtype, device=mean.device, generator=generator
    )
    return (centre + (_working(log_variance) / 2).exp() * epsilon).to(mean.dtype)


def gumbel_max(
    logits: Float[Tensor, "*shape"],
    *,
    dim: int = -1,
    noise: Float[Tensor, "*shape"] | None = None,
    generator: torch.Generator | None = None,
    validate_args: bool = True,
) -> Int[Tensor, "..."]:
    """Draw categories with probabilities softmax(logits): argmax(logits + noise).

    Parameters
    ----------
    logits : Tensor
        Logits or log-probabilities; -inf masks a category.
    dim : int
        Dimension of the categories.
    noise : Tensor, optional
        Gumbel noise of the same shape, to be used instead of a new draw.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.
    validate_args : bool
        Whether values are checked, which waits for the device.

    Returns
    -------
    Tensor
        Indices (int64), of the logits' shape without ``dim``.

    Raises
    ------
    TypeError
        For logits that are not floating-point.
    ValueError
        For NaN, +inf, a row without a finite logit, or noise of another shape.

    Examples
    --------
    >>> gumbel_max(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]))
    tensor([0, 1])
    """
    working = _check_logits(logits, noise, dim, validate_args)
    return _perturbed(working.detach(), noise, generator).argmax(dim)


def gumbel_softmax(
    logits: Float[Tensor, "*shape"],
    *,
    temperature: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    noise: Float[Tensor, "*shape"] | None = None,
    generator: torch.Generator | None = None,
    validate_args: bool = True,
) -> Float[Tensor, "*shape"]:
    r"""Draw relaxed one-hot vectors with a gradient, :math:`\mathrm{softmax}((o + G)/\tau)`.

    Only its argmax has probabilities softmax(o). The relaxed vector is biased at every temperature:
    a lower one is less biased and has a gradient of more variance, growing like 1/τ.

    Parameters
    ----------
    logits : Tensor
        Logits or log-probabilities, not probabilities; -inf masks a category.
    temperature : float or Tensor
        τ, positive; a tensor broadcasts against the logits and receives a gradient. Its values
        are checked where ``validate_args`` is true.
    hard : bool
        Straight-through: exact zeros and ones forward, the relaxed vector's gradient backward.
    dim : int
        Dimension of the categories.
    noise : Tensor, optional
        Gumbel noise of the same shape, to be used instead of a new draw.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.
    validate_args : bool
        Whether values are checked, which waits for the device. Values are not checked inside
        ``torch.compile`` and ``torch.func.vmap``, where they cannot be seen.

    Returns
    -------
    Tensor
        Shape and dtype of the logits, rows that sum to one. The computation is in float32 at
        least.

    Raises
    ------
    TypeError
        For logits or a temperature that are not floating-point.
    ValueError
        For a temperature that is not positive and finite, NaN, +inf, a row without a finite logit,
        or noise of another shape.

    Examples
    --------
    >>> logits = torch.tensor([0.0, 1.0, -torch.inf], requires_grad=True)
    >>> sample = gumbel_softmax(logits, temperature=0.5, noise=torch.tensor([1.0, 0.0, 0.0]))
    >>> sample
    tensor([0.5000, 0.5000, 0.0000], grad_fn=<SoftmaxBackward0>)
    """
    working = _check_logits(logits, noise, dim, validate_args)
    temperature = _check_temperature(temperature, logits, validate_args)
    perturbed = _perturbed(working, noise, generator)
    if not hard:
        top = perturbed.detach().amax(dim, keepdim=True)
        return _tempered(perturbed, top, temperature, dim).to(logits.dtype)
    # Of the perturbed logits: the soft sample may saturate and tie.
    top, index = perturbed.detach().max(dim, keepdim=True)
    soft = _tempered(perturbed, top, temperature, dim)
    del perturbed  # overwritten by now, and as large as the logits
    return _hardened(soft, index, dim).to(logits.dtype)


def conditional_gumbel(
    logits: Float[Tensor, "*batch categories"],
    index: Int[Tensor, "*batch"],
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    r"""Draw perturbed logits given which category is the largest, differentiably.

    With exponential E: :math:`z_k = \log\sum_i e^{o_i} - \log E_k` at the index k, and
    :math:`z_i = -\log(E_i e^{-o_i} + e^{-z_k})` elsewhere.

    Parameters
    ----------
    logits : Tensor
        Logits of categories in the last dimension; -inf masks a category.
    index : Tensor
        The largest category of each row, of shape ``logits.shape[:-1]``.
    samples : int, optional
        Number of draws, as a new leading dimension; one draw without it by default.
    generator : torch.Generator, optional
        Source of randomness; the global one by default.

    Returns
    -------
    Tensor
        Shape ``(*logits.shape)`` or ``(samples, *logits.shape)``. At least float32: rounded to
        half precision the largest would tie with others.

    Raises
    ------
    TypeError
        For logits that are not floating-point or an index that is not an integer.
    ValueError
        For NaN, +inf, an index out of range, of wrong shape, or at a masked category, and
        ``samples`` below 1.

    Examples
    --------
    >>> index = torch.tensor([2, 0])
    >>> conditional_gumbel(torch.zeros(2, 3), index).argmax(-1)
    tensor([2, 0])
    """
    working = _check_logits(logits, None, -1, True)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor, got {got}")
    if index.shape != logits.shape[:-1]:
        raise ValueError(
            f"index must have shape {tuple(logits.shape[:-1])}, got {tuple(index.shape)}"
        )
    categories = logits.shape[-1]
    if not _holds(((index >= 0) & (index < categories)).all()):
        raise ValueError(f"index must lie between 0 and {categories - 1}")
    if not _holds(logits.detach().gather(-1, index.unsqueeze(-1)).isfinite().all()):
        raise ValueError("the logit at index must be finite: a masked category is never drawn")
    if samples is not None:
        _check_count(samples, "samples")
    return _conditional(working, index, () if samples is None else (samples,), generator)


class ExponentialTemperature:
    """A temperature that falls exponentially: max(minimum, initial exp(-rate · steps)).

    Parameters
    ----------
    initial : float
        Temperature before the first step.
    minimum : float
        Where it stops.
    rate : float
        Decay per step, at least 0.

    Raises
    ------
    ValueError
        For temperatures that are not positive, an ``initial`` below ``minimum``, or a negative
        rate.

    Examples
    --------
    >>> temperature = ExponentialTemperature(initial=1.0, minimum=0.1, rate=0.5)
    >>> [round(temperature.step(), 3) for _ in range(5)]
    [0.607, 0.368, 0.223, 0.135, 0.1]
    """

    def __init__(self, *, initial: float = 1.0, minimum: float = 0.01, rate: float) -> None:
        if not 0 < minimum <= initial < math.inf:
            raise ValueError(
                "temperatures must satisfy 0 < minimum <= initial < inf, "
                f"got minimum {minimum} and initial {initial}"
            )
        if not 0 <= rate < math.inf:
            raise ValueError(f"rate must be at least 0 and finite, got {rate}")
        self.initial, self.minimum, self.rate = float(initial), float(minimum), float(rate)
        self.step_count = 0

    @property
    def value(self) -> float:
        """The temperature after the steps so far."""
        return max(self.minimum, self.initial * math.exp(-self.rate * self.step_count))

    def step(self) -> float:
        """Take a step and return the new temperature."""
        self.step_count += 1
        return self.value

    def state_dict(self) -> dict[str, float | int]:
        """Return everything that a checkpoint needs."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from a checkpoint."""
        if set(state) != set(vars(self)):
            raise ValueError(
                f"the state must have the keys {sorted(vars(self))}, got {sorted(state)}"
            )
        count = state["step_count"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"step_count must be an integer of at least 0, got {count!r}")
        restored = ExponentialTemperature(
            initial=state["initial"], minimum=state["minimum"], rate=state["rate"]
        )
        vars(self).update(vars(restored), step_count=count)
