r"""The exact Jacobian of the state at every step, in closed form, for torch's own modules.

With the carry k, sides :math:`s^g`, output slope e and output side :math:`s^q` of each cell, and
:math:`C_h = \sum_g \operatorname{diag}(s^g) U_g`,

.. math::
    J = \operatorname{diag}(k) + C_h \quad \text{(state h)}, \qquad
    J = \begin{pmatrix}
        \operatorname{diag}(s^q) U_q + \operatorname{diag}(e) C_h
        & \operatorname{diag}(e \circ k) \\
        C_h & \operatorname{diag}(k)
    \end{pmatrix} \quad \text{(state h, c)}.

For torch's GRU z keeps, and r acts after the matrix and its bias:
:math:`n = \tanh(W x + b_{in} + r \circ (U h + b_{hn}))`.

Source: https://kexue.fm/archives/7888.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.nn.recurrent.cell import OutputGatedGRU
from kexue.nn.recurrent.linearization import _Linearization, _linearized

__all__ = ["RecurrentJacobians", "recurrent_jacobians"]

# As many numbers of a block as stay in a core's cache while all gates are added to them.
_CACHED = 2**16


@dataclass(frozen=True)
class RecurrentJacobians:
    """The states along a sequence, and the derivative of each with respect to the one before.

    Parameters
    ----------
    kind : {"rnn_tanh", "rnn_relu", "lstm", "gru", "output_gated_gru"}
        Of the cell.
    state_names : tuple of str
        ("h",) or ("h", "c"): what a state is made of, in this order.
    states : Tensor, shape (length + 1, batch, S)
        From the initial state on; S is H, or 2H where there is a c.
    jacobians : Tensor, shape (length, batch, S, S)
        Entry t is the derivative of state t + 1 with respect to state t, the inputs held.

    Examples
    --------
    >>> found = recurrent_jacobians(nn.LSTM(3, 5), torch.randn(7, 2, 3))
    >>> found.state_names, found.jacobians.shape
    (('h', 'c'), torch.Size([7, 2, 10, 10]))
    """

    kind: str
    state_names: tuple[str, ...]
    states: Float[Tensor, "states batch size"]
    jacobians: Float[Tensor, "length batch size size"]


def recurrent_jacobians(
    module: nn.RNN | nn.LSTM | nn.GRU | OutputGatedGRU,
    input: Float[Tensor, "*sequence features"],
    state: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    layer: int = 0,
    direction: int = 0,
) -> RecurrentJacobians:
    """Return the Jacobian of the state at every step of a sequence.

    Parameters
    ----------
    module : nn.RNN, nn.LSTM, nn.GRU or OutputGatedGRU
        Any number of layers and directions.
    input : Tensor
        As the module takes it: (length, batch, features), (batch, length, features) with
        ``batch_first``, or (length, features), which is a batch of one here.
    state : Tensor or pair of Tensor, optional
        As the module takes it; zeros by default.
    layer, direction : int
        Which recurrence. A higher layer sees the output of the layers below, without dropout, and
        that is held. Direction 1 counts its steps as it goes, the last input first.

    Returns
    -------
    RecurrentJacobians
        In the dtype of input and module, at least float32; without a graph.

    Raises
    ------
    TypeError
        For another module, or an input that is not real floating-point.
    ValueError
        For a projected LSTM, a layer or direction that the module does not have, an input with
        another number of features or dimensions, without a step or not finite, a state of another
        shape, or states that overflow.

    Examples
    --------
    With all weights zero the update gate of a GRU stands at one half, and so does its Jacobian:

    >>> module = nn.GRU(3, 2)
    >>> for parameter in module.parameters():
    ...     _ = nn.init.zeros_(parameter)
    >>> recurrent_jacobians(module, torch.randn(7, 1, 3)).jacobians[0, 0]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    found = _linearized(module, input, state, layer=layer, direction=direction)
    with torch.no_grad():
        jacobians = _jacobians(found, 0, len(found.hidden) - 1)
    return RecurrentJacobians(found.kind, found.state_names, found.states, jacobians)


def _jacobians(found: _Linearization, start: int, stop: int) -> Tensor:
    """Write the Jacobians of the steps from ``start`` to ``stop``, block by block."""
    _, batch, hidden = found.hidden.shape
    size = hidden if found.cell is None else 2 * hidden
    out = found.hidden.new_empty(stop - start, batch, size, size)
    several = max(1, _CACHED // max(1, batch * hidden * hidden))
    for first in range(start, stop, several):
        steps = slice(first, min(first + several, stop))
        _write(found, steps, out[first - start : steps.stop - start])
    return out


def _write(found: _Linearization, steps: slice, out: Tensor) -> None:
    hidden = found.hidden.shape[-1]
    by_hidden = out if found.cell is None else out[..., hidden:, :hidden]
    sides = [(side[steps].unsqueeze(-1), found.blocks[name]) for name, side in found.sides.items()]
    torch.mul(*sides[0], out=by_hidden)
    for side, block in sides[1:]:
        by_hidden.addcmul_(side, block)
    if found.cell is None:
        if found.carry is not None:
            out.diagonal(dim1=-2, dim2=-1).add_(found.carry[steps])
        return

    assert found.carry is not None
    assert found.output_slope is not None
    assert found.output_side is not None
    slope, carry = found.output_slope[steps], found.carry[steps]
    shown = out[..., :hidden, :hidden]
    torch.mul(slope.unsqueeze(-1), by_hidden, out=shown)
    shown.addcmul_(found.output_side[steps].unsqueeze(-1), found.blocks[str(found.output_gate)])
    out[..., hidden:].zero_()
    out[..., :hidden, hidden:].diagonal(dim1=-2, dim2=-1).copy_(slope * carry)
    out[..., hidden:, hidden:].diagonal(dim1=-2, dim2=-1).copy_(carry)
