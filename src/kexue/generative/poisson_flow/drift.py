"""Right-hand sides dx/dz of the flow: the exact field, a network of the field, a denoiser.

    dx/dz = E_x/E_z = (x − m(x, z))/z

Each is called as ``drift(x, z)`` with z of shape (batch,), and runs in `sample`, `integrate` and
`log_likelihood`.

Source: https://arxiv.org/abs/2209.11178, https://arxiv.org/abs/2302.04265; the inversion of the
normalisation in `drift_from_normalized` is derived in the study.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.generative.poisson_flow.field import Charges
from kexue.generative.poisson_flow.inputs import (
    check_augmented_dim,
    check_gamma,
    check_points,
    check_same_sample,
    heights,
    per_sample,
    working_dtype,
)
from kexue.generative.poisson_flow.training import check_output

__all__ = [
    "DenoiserDrift",
    "EmpiricalPoissonField",
    "NormalizedFieldDrift",
    "drift_from_normalized",
]

_LARGEST_NORMALIZED_NORM = 0.999


class EmpiricalPoissonField:
    """The exact drift of finitely many charges.

    Its sampler reproduces the data: it is an oracle for other code, not a model.

    Parameters
    ----------
    data : Tensor, shape (charges, *sample)
        Positions of the charges.
    augmented_dim : float
        Number of extra dimensions, positive; ``math.inf`` for the flow of Gaussian diffusion, with
        σ for z.
    weights : Tensor, shape (charges,), optional
        Charges, at least 0; equal by default.
    chunk_size : int, optional
        Charges looked at together; memory is batch × chunk_size.

    Raises
    ------
    TypeError, ValueError
        As `poisson_field`; also for D = 0, where lines never reach the data plane.

    Examples
    --------
    >>> drift = EmpiricalPoissonField(torch.tensor([[0.0, 0.0]]))
    >>> drift(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    tensor([[2., 4.]])
    """

    def __init__(
        self,
        data: Float[Tensor, " charges *sample"],
        *,
        augmented_dim: float = 1.0,
        weights: Float[Tensor, " charges"] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_augmented_dim(augmented_dim)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self._charges = Charges(data, weights)
        self.data = data
        self.augmented_dim = augmented_dim
        self.chunk_size = chunk_size

    def __repr__(self) -> str:
        return (
            f"EmpiricalPoissonField({len(self.data)} charges, augmented_dim={self.augmented_dim})"
        )

    def __call__(
        self,
        x: Float[Tensor, " batch *sample"],
        z: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    ) -> Float[Tensor, " batch *sample"]:
        """Return dx/dz at the points (x, z)."""
        check_points(x, "x")
        check_same_sample(x, self.data)
        height = heights(z, len(x), x.device)
        displacement, _ = self._charges.displacement(
            x, height, augmented_dim=self.augmented_dim, chunk_size=self.chunk_size
        )
        return (displacement / per_sample(height, x)).to(x.dtype)


def drift_from_normalized(
    v_x: Float[Tensor, " batch *sample"],
    z: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    *,
    gamma: float = 5.0,
) -> Float[Tensor, " batch *sample"]:
    """Return the drift dx/dz from the x part of the normalised field alone, exactly.

    With n = ‖v_x‖/√N the distance a = ‖x − m‖ is

        a = n (γ + √(n² γ² + (1 − n²) z²)) / (1 − n²),    dx/dz = −(a/z) v_x/‖v_x‖

    so that the z part of a network is redundant.

    Parameters
    ----------
    v_x : Tensor, shape (batch, *sample)
        The x part of the normalised field, shorter than √N.
    z : float or Tensor, shape () or (batch,)
        Distance to the data plane, positive.
    gamma : float
        That of the target, at least 0.

    Returns
    -------
    Tensor, shape (batch, *sample)
        In the dtype of ``v_x``.

    Raises
    ------
    TypeError
        For anything but floating point tensors.
    ValueError
        For a ``v_x`` as long as √N, which no field has, z that is not positive, negative gamma.

    Examples
    --------
    >>> from kexue.generative.poisson_flow import poisson_target
    >>> x, z = torch.tensor([[3.0, 4.0]]), 0.2
    >>> target = poisson_target(x, z, torch.zeros(1, 2))
    >>> drift_from_normalized(target.x, z)
    tensor([[15.0000, 20.0000]])
    """
    check_gamma(gamma)
    check_points(v_x, "v_x")
    height = heights(z, len(v_x), v_x.device)
    length = _normalized_length(v_x)
    if not torch.compiler.is_compiling() and bool((length >= 1).any()):
        dim = v_x[0].numel()
        raise ValueError(
            f"v_x must be shorter than the square root of its dimension, {math.sqrt(dim):.6g}, "
            f"got a norm of {length.max().item() * math.sqrt(dim):.6g}"
        )
    return _drift(v_x, length, height, gamma)


def _normalized_length(v_x: Tensor) -> Tensor:
    flat = v_x.flatten(1)
    return torch.linalg.vector_norm(flat.double(), dim=1) / math.sqrt(flat.shape[1])


def _drift(v_x: Tensor, length: Tensor, height: Tensor, gamma: float) -> Tensor:
    below_one = (1 - length) * (1 + length)
    root = ((gamma * length).square() + below_one * height.square()).sqrt()
    # a/(z ‖v_x‖), in which the norm cancels: nothing is divided by it where it is 0.
    factor = (gamma + root) / (below_one * height * math.sqrt(v_x[0:1].flatten(1).shape[1]))
    return (-per_sample(factor, v_x) * v_x).to(v_x.dtype)


class NormalizedFieldDrift(nn.Module):
    """The drift of a network that was trained with `PoissonFlowLoss`.

    Parameters
    ----------
    model : Module or callable
        ``model(x, z)`` gives (v_x, v_z) of shapes (batch, *sample) and (batch,).
    gamma : float
        That of the loss, at least 0.
    use_predicted_z : bool
        Whether to divide by the network's own z part, v_x/v_z, instead of the exact inversion from
        v_x. The inversion clamps ‖v_x‖ to 0.999 √N: no field is longer than √N, but a network's
        estimate may be.

    Raises
    ------
    ValueError
        For a negative gamma, outputs of other shapes, z that is not positive.
    TypeError
        For x that is not floating point.

    Examples
    --------
    >>> from kexue.generative.poisson_flow import poisson_target
    >>> data = torch.tensor([[0.0, 0.0]])
    >>> def network(x, z):
    ...     target = poisson_target(x, z, data)
    ...     return target.x, target.z
    >>> drift = NormalizedFieldDrift(network)
    >>> drift(torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[6., 8.]])
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        gamma: float = 5.0,
        use_predicted_z: bool = False,
    ) -> None:
        super().__init__()
        check_gamma(gamma)
        self.model = model
        self.gamma = gamma
        self.use_predicted_z = use_predicted_z

    def forward(
        self,
        x: Float[Tensor, " batch *sample"],
        z: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    ) -> Float[Tensor, " batch *sample"]:
        """Return dx/dz at the points (x, z)."""
        check_points(x, "x")
        height = heights(z, len(x), x.device)
        v_x, v_z = self.model(x, height.to(working_dtype(x.dtype)))
        check_output(v_x, x, "v_x")
        check_output(v_z, height, "v_z")
        if self.use_predicted_z:
            return (v_x / per_sample(v_z, v_x)).to(x.dtype)
        length = _normalized_length(v_x)
        allowed = _LARGEST_NORMALIZED_NORM / length.clamp_min(_LARGEST_NORMALIZED_NORM)
        clamped = per_sample(allowed, v_x) * v_x
        return _drift(clamped, allowed * length, height, self.gamma).to(x.dtype)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, use_predicted_z={self.use_predicted_z}"


class DenoiserDrift(nn.Module):
    """The drift of a denoiser, trained with `PoissonFlowPlusLoss` or any EDM denoiser (D = ∞).

    Parameters
    ----------
    denoiser : Module or callable
        ``denoiser(x, sigma)`` gives the estimate of the clean sample, in the shape of x; sigma has
        shape (batch,).
    augmented_dim : float
        Number D of extra dimensions, positive: sigma = z/√D, and z itself where D is infinite.

    Raises
    ------
    ValueError
        For D or z that is not positive, and an output of another shape.
    TypeError
        For x that is not floating point.

    Examples
    --------
    >>> drift = DenoiserDrift(lambda x, sigma: torch.zeros_like(x), augmented_dim=128)
    >>> drift(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    tensor([[2., 4.]])
    """

    def __init__(
        self, denoiser: Callable[[Tensor, Tensor], Tensor], *, augmented_dim: float
    ) -> None:
        super().__init__()
        check_augmented_dim(augmented_dim)
        self.denoiser = denoiser
        self.augmented_dim = augmented_dim

    def forward(
        self,
        x: Float[Tensor, " batch *sample"],
        z: Float[Tensor, " batch"] | Float[Tensor, ""] | float,
    ) -> Float[Tensor, " batch *sample"]:
        """Return dx/dz at the points (x, z)."""
        check_points(x, "x")
        height = heights(z, len(x), x.device)
        sigma = height if math.isinf(self.augmented_dim) else height / math.sqrt(self.augmented_dim)
        clean = self.denoiser(x, sigma.to(working_dtype(x.dtype)))
        check_output(clean, x, "the denoiser's output")
        return ((x - clean) / per_sample(height, x)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"augmented_dim={self.augmented_dim}"
