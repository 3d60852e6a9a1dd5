r"""Starts of a recurrent network from which gradients survive.

Orthogonal matrices keep norms where the gates are neutral; the bias b of a gate that keeps sets how
long it keeps: :math:`1/(1 - \sigma(b)) = 1 + e^b` steps. Chrono initialisation spreads these times,
:math:`b \sim \log U[1, T_{max} - 1]`, uniformly over :math:`[2, T_{max}]`.

Source: https://kexue.fm/archives/7888; Tallec and Ollivier, https://arxiv.org/abs/1804.11188;
Jozefowicz et al. 2015; Le, Jaitly and Hinton, https://arxiv.org/abs/1504.00941.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from kexue.nn.init import orthogonal_
from kexue.nn.recurrent.cell import OutputGatedGRU
from kexue.nn.recurrent.linearization import _extent, _kind

__all__ = ["recurrent_init_"]

Recurrent = Literal["orthogonal", "identity", "xavier"]
_Module = TypeVar("_Module", nn.RNN, nn.LSTM, nn.GRU, OutputGatedGRU)
# Number of gates, and the sign that the preactivation of the second has where it keeps.
_GATES = {
    "rnn_tanh": (1, 0),
    "rnn_relu": (1, 0),
    "lstm": (4, 1),
    "gru": (3, 1),
    "output_gated_gru": (3, -1),
}
_LSTM_INPUT, _KEEPING = 0, 1


def recurrent_init_(
    module: _Module,
    *,
    recurrent: Recurrent = "orthogonal",
    gain: float = 1.0,
    forget_bias: float | None = None,
    max_timescale: float | None = None,
    generator: torch.Generator | None = None,
) -> _Module:
    r"""Initialise a recurrent module so that its gradients survive many steps.

    Every layer and direction: each gate has a recurrent block of its own, input blocks are
    Xavier-uniform, biases zero. Of the two biases that torch adds only ``bias_ih`` gets a value, so
    what is asked for is the sum.

    Parameters
    ----------
    module : nn.RNN, nn.LSTM, nn.GRU or OutputGatedGRU
        Changed in place.
    recurrent : {"orthogonal", "identity", "xavier"}
        Kind of the recurrent blocks. "identity" with a ReLU makes an IRNN.
    gain : float
        Factor on the recurrent blocks.
    forget_bias : float, optional
        Bias of the gate that keeps: f of an LSTM, z of a GRU; its negative for z of an
        OutputGatedGRU, which lets the new in.
    max_timescale : float, optional
        Chrono initialisation instead, for memories of up to so many steps, above 2. The input gate
        of an LSTM gets the negative of the forget bias.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    nn.Module
        The module itself.

    Raises
    ------
    TypeError
        For another module.
    ValueError
        For a projected LSTM, another kind of recurrent block, a gain or bias that is not finite, a
        timescale of two or less, both a bias and a timescale, or either of them for a module
        without gates or without biases.

    Examples
    --------
    >>> module = recurrent_init_(nn.LSTM(3, 2), forget_bias=1.0)
    >>> (module.bias_ih_l0 + module.bias_hh_l0).detach()
    tensor([0., 0., 1., 1., 0., 0., 0., 0.])
    """
    kind = _kind(module)
    gates, sign = _GATES[kind]
    if recurrent not in get_args(Recurrent):
        raise ValueError(
            f"recurrent must be one of {', '.join(get_args(Recurrent))}, got {recurrent!r}"
        )
    if not math.isfinite(gain):
        raise ValueError(f"gain must be finite, got {gain}")
    _check_bias(module, kind, forget_bias, max_timescale)

    layers, directions = _extent(module)
    reverses = ("", "_reverse")[:directions]
    with torch.no_grad():
        for suffix in (f"_l{layer}{reverse}" for layer in range(layers) for reverse in reverses):
            for block in getattr(module, f"weight_ih{suffix}").chunk(gates):
                _draw(block, nn.init.xavier_uniform_, generator)
            for block in getattr(module, f"weight_hh{suffix}").chunk(gates):
                _draw(block, _RECURRENT[recurrent], generator)
                block.mul_(gain)
            if not module.bias:
                continue
            getattr(module, f"bias_hh{suffix}").zero_()
            biases = getattr(module, f"bias_ih{suffix}").zero_().chunk(gates)
            if forget_bias is not None:
                biases[_KEEPING].fill_(sign * forget_bias)
            if max_timescale is not None:
                kept = biases[_KEEPING]
                _draw(kept, nn.init.uniform_, generator)
                kept.mul_(max_timescale - 2).add_(1).log_().mul_(sign)
                if kind == "lstm":
                    biases[_LSTM_INPUT].copy_(-kept)
    return module


def _check_bias(
    module: nn.Module, kind: str, forget_bias: float | None, max_timescale: float | None
) -> None:
    given = {"forget_bias": forget_bias, "max_timescale": max_timescale}
    asked = [name for name, value in given.items() if value is not None]
    if not asked:
        return
    if len(asked) == 2:
        raise ValueError("give forget_bias or max_timescale, not both: each sets the same bias")
    if kind.startswith("rnn"):
        raise ValueError(f"{asked[0]} must be None for a plain RNN, which has no gate")
    if not module.bias:
        raise ValueError(f"{asked[0]} must be None for a module with bias=False")
    if forget_bias is not None and not math.isfinite(forget_bias):
        raise ValueError(f"forget_bias must be finite, got {forget_bias}")
    if max_timescale is not None and not 2 < max_timescale < math.inf:
        raise ValueError(f"max_timescale must be finite and above 2, got {max_timescale}")


def _orthogonal(block: Tensor, generator: torch.Generator | None) -> Tensor:
    return orthogonal_(block, generator=generator)


def _identity(block: Tensor, generator: torch.Generator | None) -> Tensor:
    return nn.init.eye_(block)


def _xavier(block: Tensor, generator: torch.Generator | None) -> Tensor:
    return nn.init.xavier_uniform_(block, generator=generator)


_RECURRENT = {"orthogonal": _orthogonal, "identity": _identity, "xavier": _xavier}


def _draw(block: Tensor, fill_: Callable[..., Tensor], generator: torch.Generator | None) -> None:
    """Fill a block with numbers drawn where the generator is, in a dtype that has a QR."""
    device = block.device if generator is None else generator.device
    dtype = torch.promote_types(block.dtype, torch.float32)
    block.copy_(fill_(torch.empty_like(block, device=device, dtype=dtype), generator=generator))
