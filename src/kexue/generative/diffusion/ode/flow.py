"""The velocity of the flow in two coordinates, its divergence, and the continuity equation.

    ∂_t log p + f·∇log p + ∇·f = 0

holds exactly where the velocity f transports the density p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kexue._autograd import outside_inference_mode
from kexue.generative.diffusion.denoiser.prediction import Denoiser, _check_state
from kexue.generative.diffusion.schedule.base import NoiseSchedule, _over_event

__all__ = ["angle_velocity", "continuity_residual", "divergence", "heat_velocity"]

_COORDINATES = ("sigma", "angle")
_DIVERGENCES = ("exact", "hutchinson")
# Entries of the vectors of one batched product: enough to fill the machine, little memory.
_PRODUCT_ENTRIES = 2**18


def heat_velocity(
    denoiser: Denoiser,
    scaled: Float[Tensor, " batch *event"],
    sigma: float | Tensor,
    *,
    condition: Tensor | None = None,
) -> Float[Tensor, " batch *event"]:
    """Return dy/dσ = ε̂ = −σ ∇log p_σ(y), the flow of every schedule in heat coordinates.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    scaled : Tensor, shape (batch, *event)
        State y = x/ᾱ.
    sigma : float or Tensor
        Noise-to-signal ratio β̄/ᾱ, positive; one for all or one per example.
    condition : Tensor, optional
        Passed to the denoiser.

    Returns
    -------
    Tensor, shape (batch, *event)

    Raises
    ------
    ValueError
        For sigma that is not positive, or beyond the schedule.

    Examples
    --------
    Along the flow, standard normal data grow as sqrt(1 + σ²):

    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.ones(1), schedule=DiscreteSchedule.linear()
    ... )
    >>> heat_velocity(denoiser, torch.tensor([[1.0]]), 0.5)  # y σ/(1 + σ²)
    tensor([[0.4000]])
    """
    _check_state(scaled, "scaled")
    schedule = denoiser.schedule
    sigma = _check_positive(sigma, "sigma")
    return _velocity_at(denoiser, scaled, schedule.time_from_sigma(sigma), "sigma", condition)


def angle_velocity(
    denoiser: Denoiser,
    rotated: Float[Tensor, " batch *event"],
    angle: float | Tensor,
    *,
    condition: Tensor | None = None,
) -> Float[Tensor, " batch *event"]:
    """Return dr/dφ = cos φ ε̂ − sin φ x̂_0, the v-prediction, bounded for bounded data.

    Parameters
    ----------
    denoiser : Denoiser
        Estimates the clean data.
    rotated : Tensor, shape (batch, *event)
        State r = x cos φ/ᾱ; for schedules with ᾱ² + β̄² = 1 that is x.
    angle : float or Tensor
        φ = arctan(β̄/ᾱ), positive; one for all or one per example.
    condition : Tensor, optional
        Passed to the denoiser.

    Returns
    -------
    Tensor, shape (batch, *event)

    Raises
    ------
    ValueError
        For an angle that is not positive, or beyond the schedule.

    Examples
    --------
    Along the angle, standard normal data do not move at all:

    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.zeros(1, 1), torch.ones(1), schedule=DiscreteSchedule.linear()
    ... )
    >>> bool(angle_velocity(denoiser, torch.tensor([[1.0]]), 0.5).abs() < 1e-6)
    True
    """
    _check_state(rotated, "rotated")
    schedule = denoiser.schedule
    angle = _check_positive(angle, "angle")
    largest = schedule.sigma(schedule.maximum_time)
    beyond = angle > torch.atan(largest) * (1 + 1e-15)
    if bool(beyond.any()):
        raise ValueError(
            f"angle must lie in (0, {torch.atan(largest).item():.6g}], the range of the schedule, "
            f"got {angle.detach()[beyond].reshape(-1)[0].item()}"
        )
    # Near π/2 a rounded angle is a larger change of its tangent.
    sigma = torch.tan(angle).clamp(max=largest.to(angle.device))
    return _velocity_at(denoiser, rotated, schedule.time_from_sigma(sigma), "angle", condition)


@outside_inference_mode
def divergence(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, " batch *event"],
    *,
    method: Literal["exact", "hutchinson"] = "exact",
    probes: Float[Tensor, " probes batch *event"] | None = None,
) -> tuple[Float[Tensor, " batch *event"], Float[Tensor, " batch"]]:
    """Return a function's value and the trace of its Jacobian for each example.

    "exact" takes d vector–Jacobian products, as many at a time as hold 2^18 numbers (at least
    one), and never more of a Jacobian than that.
    "hutchinson" is the mean of vᵀJv over the probes, which for E[vvᵀ] = I has the right
    expectation; its variance is 2‖J − diag J‖²_F for probes of ±1 and symmetric J.

    Parameters
    ----------
    function : callable
        Maps (batch, *event) to the same shape, each example for itself.
    x : Tensor, shape (batch, *event)
        Where.
    method : {"exact", "hutchinson"}
    probes : Tensor, shape (num_probes, batch, *event), optional
        Vectors v of "hutchinson".

    Returns
    -------
    tuple of Tensor
        ``function(x)``, and its divergence of shape (batch,) in float64; both without gradient.

    Raises
    ------
    ValueError
        For an unknown method, probes that are missing or of another shape, or a function that
        changes the shape.

    Examples
    --------
    >>> value, trace = divergence(lambda x: x**3, torch.tensor([[1.0, 2.0]]))
    >>> value, trace
    (tensor([[1., 8.]]), tensor([15.], dtype=torch.float64))
    """
    _check_state(x)
    _check_choice("method", method, _DIVERGENCES)
    if method == "exact":
        probes = None
    elif probes is None or probes.shape[1:] != x.shape or not len(probes):
        got = "none" if probes is None else f"shape {tuple(probes.shape)}"
        raise ValueError(
            f"probes must have shape (num_probes, {', '.join(map(str, x.shape))}), got {got}"
        )
    with torch.enable_grad():
        value, trace = _divergence(function, x.detach().requires_grad_(), probes)
    return value.detach(), trace.detach()


@outside_inference_mode
def continuity_residual(
    log_density: Callable[[Tensor, Tensor], Tensor],
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, " batch *event"],
    time: float | Tensor,
) -> Float[Tensor, " batch"]:
    """Return ∂_t log p + f·∇log p + ∇·f: zero exactly where the velocity moves the density.

    Parameters
    ----------
    log_density : callable
        ``(x, time) -> (batch,)``, differentiable in both; time has shape (batch,) and the dtype
        of x.
    velocity : callable
        ``(x, time) -> (batch, *event)``, differentiable in x.
    x : Tensor, shape (batch, *event)
        Where.
    time : float or Tensor
        When; one for all or one per example.

    Returns
    -------
    Tensor, shape (batch,), float64
        Without gradient.

    Raises
    ------
    ValueError
        For a time of another shape, or a log-density or velocity that is not of the right shape.

    Examples
    --------
    The standard normal that spreads as sqrt(1 + t²), and twice the right velocity:

    >>> normal = torch.distributions.Normal
    >>> def log_density(x, time):
    ...     return normal(0.0, (1 + time**2).sqrt()).log_prob(x.squeeze(1))
    >>> def velocity(x, time):
    ...     return x * (time / (1 + time**2)).unsqueeze(1)
    >>> x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    >>> print(continuity_residual(log_density, velocity, x, 1.0).abs().max() < 1e-15)
    tensor(True)
    >>> continuity_residual(log_density, lambda x, time: 2 * velocity(x, time), x, 1.0)
    tensor([ 0.2500, -1.7500], dtype=torch.float64)
    """
    _check_state(x)
    time = torch.as_tensor(time, dtype=x.dtype, device=x.device).detach()
    if time.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"time must be a number or one per example, of shape ({len(x)},), "
            f"got {tuple(time.shape)}"
        )
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        time = time.expand(len(x)).clone().requires_grad_()
        log_prob = log_density(x, time)
        if log_prob.shape != x.shape[:1]:
            raise ValueError(
                f"log_density must give one value per example, of shape ({len(x)},), "
                f"got {tuple(log_prob.shape)}"
            )
        by_time, score = torch.zeros_like(time), torch.zeros_like(x)
        if log_prob.requires_grad:
            by_time, score = torch.autograd.grad(log_prob.sum(), (time, x), materialize_grads=True)
        value, trace = _divergence(lambda x: velocity(x, time), x, None)
    transport = _sum_event(value.detach() * score)
    return by_time.double() + transport + trace.detach()


class _Place(NamedTuple):
    """One time of a schedule as numbers on the host, so that no loop waits for a device."""

    time: float
    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        return self.noise / self.signal


def _places(schedule: NoiseSchedule, times: Tensor) -> list[_Place]:
    columns = (times, *schedule._scales(times))
    return [_Place(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _scale(place: _Place, coordinate: str) -> float:
    """Return the factor from the coordinate's state to the schedule's: x = scale · state."""
    return float(_scale_of(place.signal, place.noise, coordinate))


def _scale_of(signal: float | Tensor, noise: float | Tensor, coordinate: str) -> float | Tensor:
    return signal if coordinate == "sigma" else (signal**2 + noise**2) ** 0.5


def _velocity(
    denoiser: Denoiser,
    state: Tensor,
    time: float | Tensor,
    signal: float | Tensor,
    noise: float | Tensor,
    coordinate: str,
    condition: Tensor | None,
) -> Tensor:
    scale = _scale_of(signal, noise, coordinate)
    prediction = denoiser.predict(scale * state, time, condition=condition)
    if coordinate == "sigma":
        return prediction.epsilon
    return signal / scale * prediction.epsilon - noise / scale * prediction.sample


def _velocity_at(
    denoiser: Denoiser, state: Tensor, time: Tensor, coordinate: str, condition: Tensor | None
) -> Tensor:
    signal, noise = (_over_event(scale, state) for scale in denoiser.schedule._scales(time))
    return _velocity(denoiser, state, time, signal, noise, coordinate, condition)


def _divergence(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    probes: Tensor | None,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return value and trace of the Jacobian at x, which requires grad; exact without probes."""
    value = function(x)
    if value.shape != x.shape:
        raise ValueError(
            f"the function must keep the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if not value.requires_grad or not x.numel():
        return value, trace
    dimensions = x[0].numel()
    count = dimensions if probes is None else len(probes)
    size = min(count, max(1, _PRODUCT_ENTRIES // x.numel()))
    for first in range(0, count, size):
        last = min(first + size, count)
        if probes is None:
            # One unit vector for each of these entries, the same for all examples.
            vectors = value.new_zeros(last - first, dimensions)
            vectors.diagonal(first).fill_(1)
            vectors = vectors.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        else:
            vectors = probes[first:last].to(value)
        products = _products(value, x, vectors, differentiable, keep=last < count)
        if probes is None:
            entries = products.reshape(*products.shape[:2], -1)[..., first:last]
            entries = entries.diagonal(dim1=0, dim2=2)
            trace = trace + entries.sum(-1, dtype=torch.float64)
        else:
            forms = (
                (products * vectors).flatten(2) if x.ndim > 1 else (products * vectors)[..., None]
            )
            trace = trace + forms.sum((0, 2), dtype=torch.float64) / count
    return value, trace


def _products(
    value: Tensor, x: Tensor, vectors: Tensor, differentiable: bool, *, keep: bool
) -> Tensor:
    """Return Jᵀv for a stack of vectors v."""
    batched = len(vectors) > 1
    (products,) = torch.autograd.grad(
        value,
        x,
        vectors if batched else vectors[0],
        retain_graph=keep or differentiable,
        create_graph=differentiable,
        is_grads_batched=batched,
        allow_unused=True,
    )
    if products is None:  # the value depends on parameters alone
        return torch.zeros_like(vectors)
    return products if batched else products.unsqueeze(0)


def _sum_event(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, dtype=torch.float64) if values.ndim > 1 else values.double()


def _check_positive(value: float | Tensor, name: str) -> Tensor:
    if isinstance(value, Tensor) and value.is_complex():
        raise ValueError(f"{name} must be real, got dtype {value.dtype}")
    value = torch.as_tensor(value, dtype=torch.float64)
    wrong = ~((value > 0) & torch.isfinite(value))
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must be positive and finite, got {value.detach()[wrong].reshape(-1)[0].item()}"
        )
    return value


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
