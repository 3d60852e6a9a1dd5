r"""The one-step derivative of the carried state, gate by gate, as the article takes it apart.

With :math:`h_{t-1} = o_{t-1} \circ \tanh c_{t-1}` and
:math:`D = \operatorname{diag}(o_{t-1} (1 - \tanh^2 c_{t-1}))`, an LSTM has

.. math::
    \frac{\partial c_t}{\partial c_{t-1}} = \operatorname{diag}(f)
    + \operatorname{diag}(c_{t-1} f (1 - f))\, U_f D
    + \operatorname{diag}(g\, i (1 - i))\, U_i D
    + \operatorname{diag}(i (1 - g^2))\, U_g D .

The output gate is held: it depends on :math:`h_{t-2}`, not on :math:`c_{t-1}`. So each factor is
exact, and equals the c rows of :math:`J_t [D; I]` of the full state (h, c); the *product* of
factors leaves out the way from :math:`c_{t-2}` through :math:`o_{t-1}` and is an approximation.
What is exact over several steps is the c rows of :math:`J_t \cdots J_{t-k+1} [D; I]`.

Source: https://kexue.fm/archives/7888.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.nn.diagnosis import Diagnosis
from kexue.nn.recurrent.cell import OutputGatedGRU
from kexue.nn.recurrent.linearization import _linearized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GateTerms", "gate_terms"]


@dataclass(frozen=True)
class GateTerms(Diagnosis):
    """The derivative of the carried state at every step, as a sum over the gates it passes.

    Parameters
    ----------
    kind : str
        Of the cell.
    terms : mapping of str to Tensor, each of shape (steps, batch, H, H)
        The carry ("forget" of an LSTM, "carry" of the gated units) first, then one for each gate.

    Examples
    --------
    >>> terms = gate_terms(nn.LSTM(3, 5), torch.randn(7, 2, 3))
    >>> list(terms.terms), terms.total.shape
    (['forget', 'forget_gate', 'input_gate', 'candidate'], torch.Size([6, 2, 5, 5]))
    """

    kind: str
    terms: Mapping[str, Float[Tensor, "steps batch hidden hidden"]]

    @property
    def total(self) -> Float[Tensor, "steps batch hidden hidden"]:
        """Sum of the terms: the derivative itself."""
        first, *others = self.terms.values()
        total = first.clone()
        for term in others:
            total += term
        return total

    def norms(self) -> dict[str, Float[Tensor, "steps batch"]]:
        """Return the spectral norm of each term at every step."""
        return {name: torch.linalg.matrix_norm(term, 2) for name, term in self.terms.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return the mean and the largest spectral norm of each term."""
        return [
            {"term": name, "mean norm": norm.mean().item(), "largest": norm.max().item()}
            for name, norm in self.norms().items()
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Stack the spectral norms of the terms, means over the batch, along the sequence."""
        from matplotlib import pyplot as plt

        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        norms = {name: norm.mean(1).cpu().numpy() for name, norm in self.norms().items()}
        steps = range(1, len(next(iter(norms.values()))) + 1)
        names = [name.replace("_", " ") for name in norms]
        ax.stackplot(steps, list(norms.values()), labels=names)
        ax.set_xlabel("step")
        ax.set_ylabel("spectral norm")
        ax.legend()
        return ax


def gate_terms(
    module: nn.RNN | nn.LSTM | nn.GRU | OutputGatedGRU,
    input: Float[Tensor, "*sequence features"],
    state: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    layer: int = 0,
    direction: int = 0,
) -> GateTerms:
    r"""Return the terms of the one-step derivative of what a cell carries.

    Where the carried c is shown through an output gate (LSTM, OutputGatedGRU) that gate is held,
    and the terms make up :math:`\partial c_t / \partial c_{t-1}` from the second step on. A
    product of these is close to the derivative over several steps, not equal to it;
    :func:`~kexue.nn.recurrent.recurrent_jacobians` is exact. For a GRU or a plain RNN the sum is
    the Jacobian of every step.

    Parameters
    ----------
    module : nn.RNN, nn.LSTM, nn.GRU or OutputGatedGRU
        Any number of layers and directions.
    input : Tensor
        As the module takes it.
    state : Tensor or pair of Tensor, optional
        As the module takes it; zeros by default.
    layer, direction : int
        Which recurrence.

    Returns
    -------
    GateTerms
        "forget", "forget_gate", "input_gate" and "candidate" of an LSTM, "carry", "update_gate" and
        "candidate" of an OutputGatedGRU, of length - 1 steps; "carry", "update_gate", "candidate"
        and "reset_gate" of a GRU and "recurrent" of a plain RNN, of all steps.

    Raises
    ------
    TypeError, ValueError
        As :func:`~kexue.nn.recurrent.recurrent_jacobians`; ValueError for an LSTM or OutputGatedGRU
        with fewer than two steps.

    Examples
    --------
    >>> from kexue.nn.recurrent import recurrent_init_
    >>> module = recurrent_init_(nn.LSTM(3, 5), max_timescale=100)
    >>> norms = gate_terms(module, torch.randn(20, 4, 3)).norms()
    >>> bool(norms["forget"].mean() > norms["candidate"].mean())
    True
    """
    found = _linearized(module, input, state, layer=layer, direction=direction)
    steps = len(found.hidden) - 1
    if found.output_slope is not None and steps < 2:
        raise ValueError(
            f"gate terms of {found.kind} need at least 2 steps, got {steps}: the first has no "
            "output gate before it"
        )
    with torch.no_grad():
        slope = None if found.output_slope is None else found.output_slope[:-1].unsqueeze(-2)
        first = 0 if slope is None else 1
        terms = {}
        if found.carry is not None:
            name = "forget" if found.kind == "lstm" else "carry"
            terms[name] = torch.diag_embed(found.carry[first:])
        for name, side in found.sides.items():
            terms[name] = side[first:].unsqueeze(-1) * found.blocks[name]
            if slope is not None:
                terms[name] *= slope
    return GateTerms(found.kind, terms)
