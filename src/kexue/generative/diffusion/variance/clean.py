"""Clean variances that need no network: the two fixed ones, a table, and the bounds of any."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _as_number, _over_event

__all__ = [
    "PointDataVariance",
    "StandardNormalDataVariance",
    "TabulatedVariance",
    "clip_clean_variance",
]

D = TypeVar("D")


class PointDataVariance:
    """The clean variance of data at one point: zero, which gives DDPM's "small" variance.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.zeros(1), schedule=DiscreteSchedule.linear()
    ... )
    >>> x = torch.ones(2, 1)
    >>> PointDataVariance()(x, 500, denoiser.predict(x, 500))
    tensor(0.)
    """

    def __call__(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        prediction: Prediction | None = None,
        condition: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Return zero in the dtype of x, on the CPU: there a sampler sees that it need not draw."""
        return torch.zeros((), dtype=x.dtype, device="cpu")


class StandardNormalDataVariance:
    """The clean variance of standard normal data, which gives DDPM's "large" variance.

    β̄²/(ᾱ² + β̄²), that is β̄² for a variance preserving schedule: the transition then has the
    variance β² of the forward step.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.ones(1), schedule=DiscreteSchedule.linear()
    ... )
    >>> x = torch.ones(2, 1)
    >>> StandardNormalDataVariance()(x, 500, denoiser.predict(x, 500))
    tensor(0.9214, dtype=torch.float64)
    """

    def __call__(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        prediction: Prediction,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """Return the variance at the scales of the prediction, broadcastable to x."""
        noise = prediction.noise_scale**2
        return noise / (prediction.signal_scale**2 + noise)


class TabulatedVariance(nn.Module):
    """A clean variance that depends on time only, scalar or per entry, from a table.

    Between its times the ratio of the variance to its upper bound σ² = β̄²/ᾱ² is linear in log σ.
    The table stays in float64 whatever dtype the module is converted to; what it returns has the
    dtype of x.

    Parameters
    ----------
    times : Tensor, shape (n,)
        Positive and increasing.
    values : Tensor, shape (n,) or (n, *event)
        Clean variance at these times.
    schedule : NoiseSchedule
        What time means.
    standard_error : Tensor, shape (n,), optional
        Of the values; infinite where one example cannot tell.

    Raises
    ------
    ValueError
        For times that are not positive and increasing, values that are negative or not finite,
        lengths that differ, and when asked for a time outside the range of the table.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule
    >>> table = TabulatedVariance(
    ...     torch.tensor([100.0, 900.0]), torch.tensor([0.05, 0.3]),
    ...     schedule=DiscreteSchedule.linear(),
    ... )
    >>> table.at(torch.tensor([100.0, 900.0]))
    tensor([0.0500, 0.3000], dtype=torch.float64)
    """

    times: Tensor
    values: Tensor
    standard_error: Tensor | None

    def __init__(
        self,
        times: Float[Tensor, " n"],
        values: Float[Tensor, " n *event"],
        *,
        schedule: NoiseSchedule,
        standard_error: Float[Tensor, " n"] | None = None,
    ) -> None:
        super().__init__()
        times, values = _real(times, "times"), _real(values, "values")
        if times.ndim != 1 or not len(times) or not bool((times.diff() > 0).all() & (times[0] > 0)):
            raise ValueError(
                f"times must be a list of positive and increasing numbers, got {times.tolist()}"
            )
        schedule._check_time(times, positive=True)
        if values.shape[:1] != times.shape:
            raise ValueError(
                f"values must have one row for each of the {len(times)} times, "
                f"got shape {tuple(values.shape)}"
            )
        _check_non_negative("values", values, torch.isfinite(values))
        if standard_error is not None:
            standard_error = _real(standard_error, "standard_error")
            if standard_error.shape != times.shape:
                raise ValueError(
                    f"standard_error must have shape ({len(times)},), "
                    f"got {tuple(standard_error.shape)}"
                )
            _check_non_negative("standard_error", standard_error, ~torch.isnan(standard_error))
        self.schedule = schedule
        self.register_buffer("times", times)
        self.register_buffer("values", values)
        self.register_buffer("standard_error", standard_error)
        self._read_nodes()

    def at(self, time: float | Tensor) -> Float[Tensor, "..."]:
        """Return the variance at a time or a tensor of times, shape time.shape + event."""
        time = torch.as_tensor(time, dtype=torch.float64)
        lower, upper, below, above = self._weights(time)
        shape = (*time.shape, *(1,) * (self.values.ndim - 1))
        device = self.values.device
        below, above = (weight.to(device).reshape(shape) for weight in (below, above))
        return below * self.values[lower.to(device)] + above * self.values[upper.to(device)]

    def forward(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        prediction: Prediction | None = None,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """Return the variance at one time or one per example, broadcastable to x.

        ``prediction`` and ``condition`` are not needed.
        """
        number = _as_number(time)
        if number is not None:
            value = self._at_number(float(number))
        else:
            value = self.at(time)
            if isinstance(time, Tensor) and time.ndim and value.ndim == 1:
                return _over_event(value, x)
        # A single number may stay on the CPU: there it costs an accelerator nothing.
        return value.to(x.dtype) if value.ndim == 0 else value.to(x)

    def extra_repr(self) -> str:
        first, last = self._node_times[[0, -1]].tolist()
        return f"{len(self.times)} times in [{first:g}, {last:g}], schedule={self.schedule}"

    def _at_number(self, time: float) -> Tensor:
        """Return the variance at one time, without a question to the device."""
        weights = self._known_weights.get(time)
        if weights is None:
            if len(self._known_weights) >= 4096:
                self._known_weights.clear()
            lower, upper, below, above = self._weights(torch.tensor(time, dtype=torch.float64))
            weights = (int(lower), int(upper), below.item(), above.item())
            self._known_weights[time] = weights
        i, j, before, after = weights
        value = self.values[i]
        # A copy: the caller may change it.
        return value.clone() if after == 0 else before * value + after * self.values[j]

    def _weights(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the rows on both sides of each time and their weights."""
        nodes, log_sigma = self._node_times.to(time.device), self._node_log_sigma.to(time.device)
        allowed = (time >= nodes[0]) & (time <= nodes[-1])
        if not bool(allowed.all()):
            raise ValueError(
                f"time must lie in the range of the table, [{self._node_times[0].item():g}, "
                f"{self._node_times[-1].item():g}], got {time[~allowed].reshape(-1)[0].item():g}"
            )
        lower = torch.searchsorted(nodes, time.contiguous(), right=True) - 1
        upper = (lower + 1).clamp(max=len(nodes) - 1)
        here = self.schedule._log_sigma(time)
        width = (log_sigma[upper] - log_sigma[lower]).clamp(min=torch.finfo(torch.float64).tiny)
        share = (here - log_sigma[lower]) / width
        # Ratios to σ² are mixed; in this form of it a node has the weights 1 and 0 exactly.
        below = (1 - share) * torch.exp(2 * (here - log_sigma[lower]))
        above = share * torch.exp(2 * (here - log_sigma[upper]))
        at_node = time == nodes[lower]
        return lower, upper, below.masked_fill(at_node, 1.0), above.masked_fill(at_node, 0.0)

    def _read_nodes(self) -> None:
        # On the CPU, so that a sampler on an accelerator need not wait to know where it is.
        self._node_times = self.times.cpu()
        self._node_log_sigma = self.schedule._log_sigma(self._node_times)
        self._known_weights: dict[float, tuple[int, int, float, float]] = {}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._read_nodes()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TabulatedVariance:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def clip_clean_variance(
    variance: Float[Tensor, "..."],
    schedule: NoiseSchedule,
    time: float | Tensor,
    *,
    data_range: tuple[float, float] | None = None,
) -> Float[Tensor, "..."]:
    """Return the variance clipped to what is possible.

    0 ≤ Var[x_0 | x_t] ≤ β̄²/ᾱ², and at most ((b − a)/2)² for data in [a, b].

    Parameters
    ----------
    variance : Tensor
        Estimates at ``time``.
    schedule : NoiseSchedule
        What time means.
    time : float or Tensor
        One for all, or one for each entry of the leading dimension.
    data_range : (float, float), optional
        Bounds of the data.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``variance``.

    Raises
    ------
    ValueError
        For a time out of range, and a ``data_range`` that does not increase.

    Examples
    --------
    >>> from kexue.generative.diffusion import HeatSchedule
    >>> estimates = torch.tensor([-0.1, 0.2, 3.0, 50.0])
    >>> clip_clean_variance(estimates, HeatSchedule(), 2.0)
    tensor([0.0000, 0.2000, 3.0000, 4.0000])
    >>> clip_clean_variance(estimates, HeatSchedule(), 2.0, data_range=(-1, 1))
    tensor([0.0000, 0.2000, 1.0000, 1.0000])
    """
    _check_data_range(data_range)
    if variance.is_complex():
        raise ValueError(f"variance must be real, got {variance.dtype}")
    largest = math.inf if data_range is None else ((data_range[1] - data_range[0]) / 2) ** 2
    signal, noise = schedule._scales_for(_wide(variance), time)
    bound = ((noise / signal) ** 2).clamp(max=largest)
    return torch.minimum(variance.clamp(min=0), bound.to(variance))


def _unclipped(denoiser: D) -> D:
    """Return the denoiser without clipping of x̂_0, its own or that of a denoiser inside it.

    Errors of ε̂ are then those of the network.
    """
    # The wrapper of torch.compile passes on what is set, past a copy to the original.
    bare: Any = getattr(denoiser, "_orig_mod", denoiser)
    changes: dict[str, Any] = {}
    if getattr(bare, "clip_sample", None) is not None:
        changes["clip_sample"] = None
    inner = getattr(bare, "denoiser", None)
    if isinstance(inner, Denoiser) and (unclipped := _unclipped(inner)) is not inner:
        changes["denoiser"] = unclipped
    if not changes:
        return denoiser
    bare = copy.copy(bare)
    if isinstance(bare, nn.Module):
        # A copy shares the table of its modules with the original.
        bare._modules = dict(bare._modules)
    for name, value in changes.items():
        setattr(bare, name, value)
    return bare


def _wide(values: Tensor) -> Tensor:
    """Return values in float32 at least, where squares of small errors do not vanish."""
    return values if values.dtype.itemsize >= 4 else values.float()


def _check_data_range(data_range: tuple[float, float] | None) -> None:
    if data_range is not None and not data_range[0] < data_range[1]:
        raise ValueError(f"data_range must be an increasing pair, got {data_range}")


def _real(values: Tensor, name: str) -> Tensor:
    values = torch.as_tensor(values)
    if values.is_complex():
        raise ValueError(f"{name} must be real, got {values.dtype}")
    return values.detach().to(torch.float64, copy=True)


def _check_non_negative(name: str, values: Tensor, valid: Tensor) -> None:
    allowed = valid & (values >= 0)
    if not bool(allowed.all()):
        raise ValueError(
            f"{name} must be non-negative and finite, got {values[~allowed].reshape(-1)[0].item()}"
        )
