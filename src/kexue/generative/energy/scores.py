"""How little an example belongs to the data that a model was trained on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.generative.energy.chain import EnergyFunction, _check_energies, _check_states

__all__ = ["energy_score", "typicality_score"]


def energy_score(
    energy: EnergyFunction, x: Float[Tensor, " batch *sample"]
) -> Float[Tensor, " batch"]:
    """Return the energy itself, without gradient: the larger, the less probable.

    Parameters
    ----------
    energy : callable
        (batch, *sample) -> (batch,).
    x : Tensor, shape (batch, *sample)
        What is judged.

    Returns
    -------
    Tensor, shape (batch,)
        U(x) = -log q(x) - log Z.

    Raises
    ------
    ValueError
        Where x is no real tensor, or the energy gives another shape.

    Examples
    --------
    >>> energy_score(lambda x: x.square().sum(1) / 2, torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([ 0.0000, 12.5000])
    """
    _check_states(x, "x")
    with torch.no_grad():
        value = energy(x)
    _check_energies(value, x)
    return value


def typicality_score(
    energy: EnergyFunction,
    x: Float[Tensor, " batch *sample"],
    reference_energies: Float[Tensor, " reference"],
) -> Float[Tensor, " batch"]:
    """Return |U(x) - median| / MAD of in-distribution energies: too probable is odd as well.

    In high dimensions typical examples are not the most probable ones. The median absolute
    deviation (MAD) sets the scale.

    Parameters
    ----------
    energy : callable
        (batch, *sample) -> (batch,).
    x : Tensor, shape (batch, *sample)
        What is judged.
    reference_energies : Tensor, shape (reference,)
        Energies of held-out data from the distribution.

    Returns
    -------
    Tensor, shape (batch,)

    Raises
    ------
    ValueError
        Where the reference is empty, not finite, or half of it is one number.

    Examples
    --------
    >>> reference = torch.tensor([1.0, 2.0, 3.0])
    >>> typicality_score(lambda x: x[:, 0], torch.tensor([[2.0], [0.0]]), reference)
    tensor([0., 2.])
    """
    if reference_energies.ndim != 1 or not len(reference_energies):
        raise ValueError(
            "reference_energies must be a vector with some energies, "
            f"got shape {tuple(reference_energies.shape)}"
        )
    if not reference_energies.is_floating_point():
        raise ValueError(
            f"reference_energies must be a real tensor, got {reference_energies.dtype}"
        )
    if not bool(reference_energies.isfinite().all()):
        raise ValueError("reference_energies must be finite, got NaN or infinity")
    median = _median(reference_energies)
    deviation = _median((reference_energies - median).abs())
    if deviation == 0:
        raise ValueError("reference_energies must vary, got one number in half of them")
    return (energy_score(energy, x) - median).abs() / deviation


def _median(values: Tensor) -> Tensor:
    """Return the median; torch's own is the lower of the two in the middle."""
    ordered, count = values.sort().values, len(values)
    return torch.lerp(ordered[(count - 1) // 2], ordered[count // 2], 0.5)
