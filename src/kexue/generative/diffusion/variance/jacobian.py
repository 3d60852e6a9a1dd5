"""The clean variance that any differentiable denoiser knows already: its own Jacobian."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction, _check_state
from kexue.generative.diffusion.variance.clean import (
    _check_data_range,
    _unclipped,
    _wide,
    clip_clean_variance,
)

__all__ = ["JacobianVariance"]

_CHUNK = 64


class JacobianVariance(nn.Module):
    """The clean variance by Tweedie's second formula, without any training.

    Cov[x_0 | x_t] = (β̄²/ᾱ) ∂x̂_0/∂x_t = (β̄²/ᾱ²)(I − β̄ ∂ε̂/∂x_t); its diagonal is returned. This
    form of it does not cancel at high noise. With ``num_probes`` the diagonal is estimated by
    Hutchinson's mean of v ∘ (Jᵀ v), v = ±1: unbiased before it is clipped to what is possible,
    biased after. Exact only for an exact denoiser, and examples must not influence each other.

    Parameters
    ----------
    denoiser : Denoiser
        Differentiable in x: nothing in it may switch gradients off. Clipping of x̂_0 is set aside.
    num_probes : int, optional
        Backward passes; None computes the diagonal exactly with one for each entry of an example.
    data_range : (float, float), optional
        Bounds of the data, which bound the variance too.
    generator : torch.Generator, optional
        Source of the probes, on the device of x.

    Raises
    ------
    ValueError
        For less than one probe, a ``data_range`` that does not increase, a time out of range, and
        a prediction that carries no gradient.

    Examples
    --------
    >>> from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser
    >>> denoiser = GaussianMixtureDenoiser(
    ...     torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.1),
    ...     schedule=DiscreteSchedule.linear(),
    ... )
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> JacobianVariance(denoiser)(x, 300)
    tensor([[0.9744],
            [0.1613]])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        num_probes: int | None = None,
        data_range: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_probes is not None and num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {num_probes}")
        _check_data_range(data_range)
        self.denoiser = denoiser
        self.num_probes = num_probes
        self.data_range = data_range
        self.generator = generator

    def forward(
        self,
        x: Float[Tensor, " batch *event"],
        time: float | Tensor,
        prediction: Prediction | None = None,
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch *event"]:
        """Return the variance of each entry, detached; ``prediction`` is not needed.

        Works under ``torch.no_grad`` and ``torch.inference_mode``.
        """
        _check_state(x)
        schedule = self.denoiser.schedule
        with torch.inference_mode(False), torch.enable_grad():
            x, time, condition = _usable(x), _usable(time), _usable(condition)
            x = x.detach().requires_grad_()
            found = _unclipped(self.denoiser).predict(x, time, condition=condition)
            clean = found.sample
            # x is a sum of both: where x̂_0 is a constant, ε̂ is none.
            if not (clean.requires_grad or found.epsilon.requires_grad):
                raise ValueError(
                    "denoiser must be differentiable in x, got a prediction without gradient"
                )
            if not clean.requires_grad:
                diagonal = torch.zeros_like(clean)
            elif self.num_probes is None:
                diagonal = self._exact(x, clean)
            else:
                diagonal = self._probed(x, clean)
        signal, noise = schedule._scales_for(_wide(x), time, positive=True)
        variance = _wide(diagonal.detach()) * (noise**2 / signal)
        return clip_clean_variance(variance, schedule, time, data_range=self.data_range).to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_probes={self.num_probes}, data_range={self.data_range}"

    def _exact(self, x: Tensor, clean: Tensor) -> Tensor:
        dimensions = math.prod(x.shape[1:])
        flat = torch.empty(len(x), dimensions, dtype=x.dtype, device=x.device)
        for start in range(0, dimensions, _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, dimensions), device=x.device)
            # One unit vector for all examples at once: they do not influence each other.
            units = nn.functional.one_hot(rows, dimensions).to(clean).unsqueeze(1)
            vectors = units.expand(-1, len(x), -1).reshape(len(rows), *clean.shape)
            product = self._vector_jacobian(x, clean, vectors, batched=True)
            product = product.reshape(len(rows), len(x), dimensions)
            flat[:, rows] = product.gather(2, rows.view(-1, 1, 1).expand(-1, len(x), 1))[..., 0].T
        return flat.reshape(x.shape)

    def _probed(self, x: Tensor, clean: Tensor) -> Tensor:
        total = torch.zeros_like(clean)
        for _ in range(self.num_probes or 0):
            coins = torch.randint(0, 2, x.shape, device=x.device, generator=self.generator)
            probe = (2 * coins - 1).to(clean)
            total = total + probe * self._vector_jacobian(x, clean, probe)
        return total / (self.num_probes or 1)

    def _vector_jacobian(
        self, x: Tensor, clean: Tensor, vectors: Tensor, *, batched: bool = False
    ) -> Tensor:
        (product,) = torch.autograd.grad(
            clean, [x], [vectors], retain_graph=True, is_grads_batched=batched
        )
        return product


def _usable(value: Any) -> Any:
    """Return what a gradient may depend on: a copy, where it was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
