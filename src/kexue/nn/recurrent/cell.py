r"""The gated cell of the article: a GRU whose reset gate stands at the output.

.. math::
    r_t &= \sigma(W_r x_t + U_r h_{t-1} + b_r), \qquad
    z_t = \sigma(W_z x_t + U_z h_{t-1} + b_z), \qquad
    \hat c_t = \tanh(W x_t + U h_{t-1} + b), \\
    c_t &= (1 - z_t) \circ c_{t-1} + z_t \circ \hat c_t, \qquad h_t = r_t \circ c_t .

Every way from :math:`c_{t-1}` to :math:`c_t` but the carry passes :math:`r_{t-1}` and one more
gate, so the carry, a factor in (0, 1), decides.

Source: 也来谈谈RNN的梯度消失/爆炸问题 (https://kexue.fm/archives/7888).
"""

from __future__ import annotations

import math
import operator

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["OutputGatedGRU"]


class OutputGatedGRU(nn.Module):
    r"""A GRU that resets what it shows, not what it reads.

    Parameters, state and output have the names and shapes of a one-layer :class:`torch.nn.LSTM`,
    with three gates in the order reset, update, candidate. The update gate z lets the new in: to
    remember, its bias has to be negative. Entries start uniform on
    :math:`[-H^{-1/2}, H^{-1/2}]`; :func:`~kexue.nn.recurrent.recurrent_init_` knows better ways.

    Parameters
    ----------
    input_size : int
        Features of the input.
    hidden_size : int
        Features H of the state.
    bias : bool
        Whether there are ``bias_ih_l0`` and ``bias_hh_l0``, which are added.
    batch_first : bool
        Whether input and output are (batch, length, features).

    Raises
    ------
    TypeError
        From the call, for an input that is not real floating-point.
    ValueError
        For sizes below one; from the call, for an empty sequence, another number of features or
        dimensions, or a state of another shape.

    Examples
    --------
    >>> cell = OutputGatedGRU(3, 5)
    >>> output, (h, c) = cell(torch.randn(7, 2, 3))
    >>> output.shape, h.shape, c.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, bias: bool = True, batch_first: bool = False
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if operator.index(size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.batch_first = batch_first
        rows = 3 * hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, hidden_size))
        if bias:
            self.bias_ih_l0 = nn.Parameter(torch.empty(rows))
            self.bias_hh_l0 = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all entries anew, as torch.nn.GRU does."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        input: Float[Tensor, "*sequence features"],
        state: tuple[Float[Tensor, "*state hidden"], Float[Tensor, "*state hidden"]] | None = None,
    ) -> tuple[
        Float[Tensor, "*sequence hidden"],
        tuple[Float[Tensor, "*state hidden"], Float[Tensor, "*state hidden"]],
    ]:
        """Return the outputs h of all steps, and the last h and c.

        Parameters
        ----------
        input : Tensor, shape (length, batch, features)
            (batch, length, features) with ``batch_first``; (length, features) without a batch.
        state : pair of Tensor, each of shape (1, batch, hidden)
            Initial h and c, zeros by default; (1, hidden) without a batch.

        Returns
        -------
        output : Tensor
            As the input, with ``hidden_size`` features.
        state : pair of Tensor
            As the initial state.

        Raises
        ------
        TypeError
            For an input that is not real floating-point.
        ValueError
            For another number of dimensions or features, an empty sequence, or another state.
        """
        batched = input.ndim == 3
        if not input.is_floating_point():
            raise TypeError(f"input must be real floating-point, got {input.dtype}")
        if input.ndim not in (2, 3):
            raise ValueError(f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input must have {self.input_size} features, got {input.shape[-1]} in shape "
                f"{tuple(input.shape)}"
            )
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if x.shape[0] < 1:
            raise ValueError(f"input must have at least one step, got shape {tuple(input.shape)}")

        bias = self.bias_ih_l0 + self.bias_hh_l0 if self.bias else None
        driven = nn.functional.linear(x, self.weight_ih_l0, bias)
        h, c = self._initial(state, driven, batched)
        size, recurrent = self.hidden_size, self.weight_hh_l0.t()
        outputs = []
        for step in driven.unbind(0):
            preactivations = torch.addmm(step, h, recurrent)
            r, z = preactivations[:, : 2 * size].sigmoid().chunk(2, dim=1)
            candidate = preactivations[:, 2 * size :].tanh()
            c = torch.lerp(c, candidate, z)
            h = r * c
            outputs.append(h)
        if not batched:
            return torch.cat(outputs), (h, c)
        return torch.stack(outputs, dim=1 if self.batch_first else 0), (h[None], c[None])

    def extra_repr(self) -> str:
        """Return the sizes for the representation."""
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias}" + (
            ", batch_first=True" if self.batch_first else ""
        )

    def _initial(
        self, state: tuple[Tensor, Tensor] | None, driven: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor]:
        batch, size = driven.shape[1], self.hidden_size
        if state is None:
            zeros = driven.new_zeros(batch, size)
            return zeros, zeros
        expected = (1, batch, size) if batched else (1, size)
        for name, part in zip(("h", "c"), state, strict=True):
            if tuple(part.shape) != expected:
                raise ValueError(
                    f"initial {name} must have shape {expected}, got {tuple(part.shape)}"
                )
        h, c = (part.reshape(batch, size).to(driven.dtype) for part in state)
        return h, c
