"""Training an energy: real examples down, the ends of its own chains up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from kexue.generative.energy.buffer import ReplayBuffer
from kexue.generative.energy.chain import (
    EnergyFunction,
    _check_energies,
    _check_options,
    _check_states,
    _working_dtype,
    langevin_sample,
)

__all__ = [
    "ContrastiveDivergenceOutput",
    "EnergyModelTrainer",
    "apply_spectral_norm",
    "contrastive_divergence_loss",
]

_PENALTIES = ("sum", "difference")
_NORMED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True)
class ContrastiveDivergenceOutput:
    """A loss and its parts.

    Attributes
    ----------
    loss : Tensor, shape ()
        ``contrast + regularization``.
    contrast : Tensor, shape ()
        Mean energy of positives minus that of negatives.
    regularization : Tensor, shape ()
        The penalty on the size of energies, with its weight.
    positive_energy : Tensor, shape (batch,)
        Energies of the positives, detached.
    negative_energy : Tensor, shape (negatives,)
        Energies of the negatives, detached.

    Examples
    --------
    >>> output = contrastive_divergence_loss(
    ...     lambda x: x[:, 0], torch.tensor([[1.0]]), torch.tensor([[3.0]]), energy_penalty=0.1)
    >>> output.loss, output.contrast, output.regularization
    (tensor(-1.), tensor(-2.), tensor(1.))
    """

    loss: Float[Tensor, ""]
    contrast: Float[Tensor, ""]
    regularization: Float[Tensor, ""]
    positive_energy: Float[Tensor, " batch"]
    negative_energy: Float[Tensor, " negatives"]


def contrastive_divergence_loss(
    energy: EnergyFunction,
    positive: Float[Tensor, " batch *sample"],
    negative: Float[Tensor, " negatives *sample"],
    *,
    energy_penalty: float = 1.0,
    penalty: str = "sum",
) -> ContrastiveDivergenceOutput:
    r"""Return the loss whose gradient is that of the likelihood, plus a penalty on large energies.

    .. math:: \overline{U(x_+)} - \overline{U(x_-)}
        + \lambda \big(\overline{U^2(x_+)} \pm \overline{U^2(x_-)}\big).

    The plus of the paper keeps energies near 0, which the likelihood leaves open. The article has a
    minus, which is the likelihood of U + λU² and has no lower bound in U(x₋).

    Parameters
    ----------
    energy : callable
        (batch, *sample) -> (batch,).
    positive : Tensor, shape (batch, *sample)
        Real examples.
    negative : Tensor, shape (negatives, *sample)
        Samples of the model; they are detached.
    energy_penalty : float
        λ, at least 0.
    penalty : {"sum", "difference"}
        The sign.

    Returns
    -------
    ContrastiveDivergenceOutput
        Loss, its two parts, and the energies.

    Raises
    ------
    ValueError
        For an unknown penalty, a negative weight, an empty batch, or an energy of another shape.

    Examples
    --------
    >>> energy = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0))
    >>> output = contrastive_divergence_loss(energy, torch.ones(4, 2), torch.zeros(3, 2))
    >>> output.loss.backward()
    >>> output.negative_energy.shape
    torch.Size([3])
    """
    if penalty not in _PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(_PENALTIES)}, got {penalty!r}")
    if not energy_penalty >= 0:
        raise ValueError(f"energy_penalty must not be negative, got {energy_penalty}")
    energies = []
    for name, x in (("positive", positive), ("negative", negative.detach())):
        _check_states(x, name)
        if not len(x):
            raise ValueError(f"{name} must hold at least one example, got none")
        value = energy(x)
        _check_energies(value, x)
        energies.append(value.to(_working_dtype(value.dtype)))
    real, drawn = energies
    sign = 1.0 if penalty == "sum" else -1.0
    contrast = real.mean() - drawn.mean()
    size = real.square().mean() + sign * drawn.square().mean()
    regularization = energy_penalty * size
    return ContrastiveDivergenceOutput(
        loss=contrast + regularization,
        contrast=contrast,
        regularization=regularization,
        positive_energy=real.detach(),
        negative_energy=drawn.detach(),
    )


class EnergyModelTrainer:
    """Train an energy on the ends of its own chains.

    Parameters
    ----------
    energy : nn.Module
        (batch, *sample) -> (batch,). Batch norm in it would couple the chains.
    optimizer : torch.optim.Optimizer
        Of its parameters.
    buffer : ReplayBuffer
        Where chains start and end; several trainers may share one.
    step_size, num_steps, temperature, noise_std, clamp, max_grad_norm
        Of the chains, see `langevin_sample`. With a ``noise_std`` of its own the chain has the
        temperature ``noise_std² / step_size``, and the energy is no negative log-density at 1.
    energy_penalty, penalty
        Of the loss, see `contrastive_divergence_loss`.
    generator : torch.Generator, optional
        Source of the chains' randomness.

    Raises
    ------
    ValueError
        As `langevin_sample` and `contrastive_divergence_loss`, already here.

    Examples
    --------
    >>> energy = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1),
    ...                              torch.nn.Flatten(0))
    >>> trainer = EnergyModelTrainer(
    ...     energy, torch.optim.Adam(energy.parameters()), ReplayBuffer(100, (2,)), num_steps=3)
    >>> output = trainer.step(torch.randn(16, 2))
    >>> len(trainer.buffer), trainer.generate(5, num_steps=2).shape
    (16, torch.Size([5, 2]))
    """

    def __init__(
        self,
        energy: nn.Module,
        optimizer: torch.optim.Optimizer,
        buffer: ReplayBuffer,
        *,
        step_size: float = 1 / 200,
        num_steps: int = 20,
        temperature: float = 1.0,
        noise_std: float | None = None,
        clamp: tuple[float, float] | None = None,
        max_grad_norm: float | None = None,
        energy_penalty: float = 1.0,
        penalty: str = "sum",
        generator: torch.Generator | None = None,
    ) -> None:
        _check_options(step_size, num_steps, temperature, noise_std, clamp, max_grad_norm)
        if penalty not in _PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(_PENALTIES)}, got {penalty!r}")
        if not energy_penalty >= 0:
            raise ValueError(f"energy_penalty must not be negative, got {energy_penalty}")
        self.energy = energy
        self.optimizer = optimizer
        self.buffer = buffer
        self.step_size = step_size
        self.num_steps = num_steps
        self.temperature = temperature
        self.noise_std = noise_std
        self.clamp = clamp
        self.max_grad_norm = max_grad_norm
        self.energy_penalty = energy_penalty
        self.penalty = penalty
        self.generator = generator

    def step(self, x: Float[Tensor, " batch *sample"]) -> ContrastiveDivergenceOutput:
        """Run as many chains as there are examples, store their ends, take one step.

        Raises
        ------
        ValueError
            Where an example is not finite.
        FloatingPointError
            Where a chain diverges; nothing is stored and no step taken then.
        """
        _check_states(x, "x")
        if not bool(x.isfinite().all()):
            raise ValueError("x must be finite, got NaN or infinity among the examples")
        negative = self._chains(self.buffer.draw(len(x)), self.num_steps)
        self.buffer.add(negative)
        output = contrastive_divergence_loss(
            self.energy, x, negative, energy_penalty=self.energy_penalty, penalty=self.penalty
        )
        self.optimizer.zero_grad()
        output.loss.backward()
        self.optimizer.step()
        return output

    def generate(
        self, n: int, *, num_steps: int, from_buffer: bool = True
    ) -> Float[Tensor, " n *sample"]:
        """Run chains from stored states, or from fresh ones; the buffer stays as it is.

        Starts are drawn with the trainer's generator, where it has one.
        """
        stored = from_buffer and len(self.buffer) > 0
        draw = self.buffer.stored if stored else self.buffer.fresh
        return self._chains(draw(n, generator=self.generator), num_steps)

    def _chains(self, start: Tensor, num_steps: int) -> Tensor:
        return langevin_sample(
            self.energy,
            start,
            step_size=self.step_size,
            num_steps=num_steps,
            temperature=self.temperature,
            noise_std=self.noise_std,
            clamp=self.clamp,
            max_grad_norm=self.max_grad_norm,
            generator=self.generator,
        ).samples


def apply_spectral_norm(module: nn.Module) -> nn.Module:
    """Bound the spectral norm of every linear and convolution weight by 1, in place.

    With activations of slope at most 1 the energy is then 1-Lipschitz: at temperature 1 it has no
    feature narrower than about 1, unless a scale stands in front of it.

    Parameters
    ----------
    module : nn.Module
        Its layers get torch's spectral norm; those that have it stay as they are.

    Returns
    -------
    nn.Module
        The module itself.

    Examples
    --------
    >>> layer = apply_spectral_norm(torch.nn.Linear(3, 3))
    >>> for _ in range(50):
    ...     weight = layer.weight
    >>> bool((torch.linalg.matrix_norm(weight, 2) - 1).abs() < 1e-3)
    True
    """
    for part in list(module.modules()):
        if not isinstance(part, _NORMED):
            continue
        present = parametrize.is_parametrized(part, "weight") and any(
            isinstance(one, _SpectralNorm)
            for one in part.parametrizations["weight"]  # type: ignore[index]
        )
        present = present or hasattr(part, "weight_orig")  # torch's older one
        if not present:
            spectral_norm(part)
    return module
