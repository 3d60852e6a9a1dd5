r"""A recurrence along a sequence, and its derivative at every step, for all kinds of cell at once.

Call m the part of the state that carries (c of an LSTM, h of a GRU). Each cell changes it by

.. math::
    dm_t = k_t \circ dm_{t-1} + \sum_g s^g_t \circ U_g\, dh_{t-1},

with the carry k and one side coefficient :math:`s^g` for each gate g whose preactivation holds
:math:`U_g h_{t-1}`. Where h is not m itself, it is shown through an output gate q,

.. math::
    dh_t = e_t \circ dm_t + s^q_t \circ U_q\, dh_{t-1}.

Jacobians, gate terms and the gradient of a loss are three ways to read these vectors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kexue.nn.recurrent.cell import OutputGatedGRU

__all__: list[str] = []

_Module = nn.RNN | nn.LSTM | nn.GRU | OutputGatedGRU
_State = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Linearization:
    """Vectors of (length, batch, H), matrices of (H, H); index t leads from state t to t + 1."""

    kind: str
    hidden: Tensor
    """(length + 1, batch, H), from the initial state on."""
    cell: Tensor | None
    """Likewise, where the carried part is not h."""
    carry: Tensor | None
    sides: dict[str, Tensor]
    output_slope: Tensor | None
    output_side: Tensor | None
    blocks: dict[str, Tensor]
    """U of each gate, in the order of the rows of the weight."""

    @property
    def output_gate(self) -> str | None:
        """The gate that shows h; None where h is carried itself."""
        return None if self.cell is None else next(n for n in self.blocks if n not in self.sides)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("h",) if self.cell is None else ("h", "c")

    @property
    def states(self) -> Tensor:
        return self.hidden if self.cell is None else torch.cat([self.hidden, self.cell], dim=-1)


def _linearized(
    module: _Module,
    input: Tensor,
    state: _State,
    *,
    layer: int = 0,
    direction: int = 0,
    dtype: torch.dtype | None = None,
) -> _Linearization:
    """Run one recurrence of a module over its input and keep the derivative of every step."""
    kind = _kind(module)
    layers, directions = _extent(module)
    layer = _within("layer", layer, layers)
    direction = _within("direction", direction, directions)
    x = _sequence(module, input)
    initial = _initial(module, state, input, x)
    dtype = dtype or _working_dtype(module, x)

    def recurrence(x: Tensor, layer: int, direction: int) -> _Linearization:
        start = [part[layer * directions + direction] for part in initial]
        weights = _weights(module, layer, direction, dtype)
        return _RUNS[kind](kind, x.flip(0) if direction else x, start, weights)

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, initial = x.to(dtype), [part.to(dtype) for part in initial]
        for below in range(layer):
            shown = [recurrence(x, below, side).hidden[1:] for side in range(directions)]
            x = torch.cat([h.flip(0) if side else h for side, h in enumerate(shown)], dim=-1)
        found = recurrence(x, layer, direction)
    broken = ~torch.isfinite(found.states).flatten(1).all(1)
    if broken.any():
        raise ValueError(
            f"the states must stay finite, but they overflow {found.states.dtype} at step "
            f"{int(broken.nonzero()[0])}: take a shorter sequence or smaller recurrent weights"
        )
    return found


@dataclass(frozen=True)
class _Weights:
    """Of one layer and direction; the biases are zeros where the module has none."""

    input: Tensor
    recurrent: Tensor
    input_bias: Tensor
    recurrent_bias: Tensor


def _rnn(kind: str, x: Tensor, start: list[Tensor], weights: _Weights) -> _Linearization:
    driven = nn.functional.linear(x, weights.input, weights.input_bias + weights.recurrent_bias)
    transition = weights.recurrent.t()
    (h,) = start
    hidden = [h]
    for step in driven:
        h = torch.addmm(step, h, transition)
        h = h.tanh() if kind == "rnn_tanh" else h.relu()
        hidden.append(h)
    states = torch.stack(hidden)
    shown = states[1:]
    slope = 1 - shown.square() if kind == "rnn_tanh" else (shown > 0).to(shown.dtype)
    return _Linearization(
        kind=kind,
        hidden=states,
        cell=None,
        carry=None,
        sides={"recurrent": slope},
        output_slope=None,
        output_side=None,
        blocks={"recurrent": weights.recurrent},
    )


def _lstm(kind: str, x: Tensor, start: list[Tensor], weights: _Weights) -> _Linearization:
    driven = nn.functional.linear(x, weights.input, weights.input_bias + weights.recurrent_bias)
    transition = weights.recurrent.t()
    h, c = start
    size = h.shape[-1]
    kept = []
    for step in driven:
        preactivations = torch.addmm(step, h, transition)
        gates = preactivations.sigmoid()
        i, f, _, o = gates.split(size, dim=-1)
        g = preactivations[:, 2 * size : 3 * size].tanh()
        c = f * c + i * g
        tanh_c = c.tanh()
        h = o * tanh_c
        kept.append((h, c, gates, g, tanh_c))
    hidden, cell, gates, g, tanh_c = _stacked(kept)
    i, f, _, o = gates.split(size, dim=-1)
    hidden, carried = torch.cat([start[0][None], hidden]), torch.cat([start[1][None], cell])
    return _Linearization(
        kind=kind,
        hidden=hidden,
        cell=carried,
        carry=f,
        sides={
            "forget_gate": carried[:-1] * f * (1 - f),
            "input_gate": g * i * (1 - i),
            "candidate": i * (1 - g.square()),
        },
        output_slope=o * (1 - tanh_c.square()),
        output_side=tanh_c * o * (1 - o),
        blocks=_named(weights, "input_gate", "forget_gate", "candidate", "output_gate"),
    )


def _gru(kind: str, x: Tensor, start: list[Tensor], weights: _Weights) -> _Linearization:
    driven = nn.functional.linear(x, weights.input, weights.input_bias)
    transition, bias = weights.recurrent.t(), weights.recurrent_bias
    (h,) = start
    size = h.shape[-1]
    kept = []
    for step in driven:
        recurrent = torch.addmm(bias, h, transition)
        gates = (step[:, : 2 * size] + recurrent[:, : 2 * size]).sigmoid()
        r, z = gates.chunk(2, dim=-1)
        m = recurrent[:, 2 * size :]
        n = torch.addcmul(step[:, 2 * size :], r, m).tanh()
        h = torch.lerp(n, h, z)
        kept.append((h, gates, n, m))
    hidden, gates, n, m = _stacked(kept)
    r, z = gates.chunk(2, dim=-1)
    states = torch.cat([start[0][None], hidden])
    through_candidate = (1 - z) * (1 - n.square())
    return _Linearization(
        kind=kind,
        hidden=states,
        cell=None,
        carry=z,
        sides={
            "update_gate": (states[:-1] - n) * z * (1 - z),
            "candidate": through_candidate * r,
            "reset_gate": through_candidate * m * r * (1 - r),
        },
        output_slope=None,
        output_side=None,
        blocks=_named(weights, "reset_gate", "update_gate", "candidate"),
    )


def _output_gated_gru(
    kind: str, x: Tensor, start: list[Tensor], weights: _Weights
) -> _Linearization:
    driven = nn.functional.linear(x, weights.input, weights.input_bias + weights.recurrent_bias)
    transition = weights.recurrent.t()
    h, c = start
    size = h.shape[-1]
    kept = []
    for step in driven:
        preactivations = torch.addmm(step, h, transition)
        gates = preactivations[:, : 2 * size].sigmoid()
        r, z = gates.chunk(2, dim=-1)
        candidate = preactivations[:, 2 * size :].tanh()
        c = torch.lerp(c, candidate, z)
        h = r * c
        kept.append((h, c, gates, candidate))
    hidden, cell, gates, candidate = _stacked(kept)
    r, z = gates.chunk(2, dim=-1)
    hidden, carried = torch.cat([start[0][None], hidden]), torch.cat([start[1][None], cell])
    return _Linearization(
        kind=kind,
        hidden=hidden,
        cell=carried,
        carry=1 - z,
        sides={
            "update_gate": (candidate - carried[:-1]) * z * (1 - z),
            "candidate": z * (1 - candidate.square()),
        },
        output_slope=r,
        output_side=carried[1:] * r * (1 - r),
        blocks=_named(weights, "reset_gate", "update_gate", "candidate"),
    )


_RUNS: dict[str, Callable[[str, Tensor, list[Tensor], _Weights], _Linearization]] = {
    "rnn_tanh": _rnn,
    "rnn_relu": _rnn,
    "lstm": _lstm,
    "gru": _gru,
    "output_gated_gru": _output_gated_gru,
}


def _stacked(kept: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return each of the tensors that were kept at every step with time in front."""
    return tuple(torch.stack(part) for part in zip(*kept, strict=True))


def _named(weights: _Weights, *gates: str) -> dict[str, Tensor]:
    return dict(zip(gates, weights.recurrent.chunk(len(gates)), strict=True))


def _weights(module: _Module, layer: int, direction: int, dtype: torch.dtype) -> _Weights:
    suffix = f"_l{layer}" + ("_reverse" if direction else "")
    found = [
        getattr(module, f"{name}{suffix}").detach().to(dtype) for name in ("weight_ih", "weight_hh")
    ]
    for name in ("bias_ih", "bias_hh"):
        bias = getattr(module, f"{name}{suffix}", None)
        found.append(found[0].new_zeros(len(found[0])) if bias is None else bias.detach().to(dtype))
    return _Weights(*found)


def _working_dtype(module: _Module, x: Tensor) -> torch.dtype:
    """At least float32: products of hundreds of half-precision factors say nothing."""
    weight: Any = module.weight_hh_l0
    given = torch.promote_types(x.dtype, weight.dtype)
    return torch.promote_types(given, torch.float32)


def _kind(module: _Module) -> str:
    match module:
        case OutputGatedGRU():
            return "output_gated_gru"
        case nn.LSTM():
            if module.proj_size > 0:
                raise ValueError(f"an LSTM must have proj_size=0, got {module.proj_size}")
            return "lstm"
        case nn.GRU():
            return "gru"
        case nn.RNN():
            return "rnn_relu" if module.nonlinearity == "relu" else "rnn_tanh"
    raise TypeError(
        "module must be an nn.RNN, nn.LSTM, nn.GRU or kexue.nn.recurrent.OutputGatedGRU, got "
        f"{type(module).__name__}"
    )


def _extent(module: _Module) -> tuple[int, int]:
    """Number of layers and of directions."""
    if isinstance(module, OutputGatedGRU):
        return 1, 1
    return module.num_layers, 2 if module.bidirectional else 1


def _within(name: str, index: int, count: int) -> int:
    if not 0 <= operator.index(index) < count:
        allowed = "0" if count == 1 else f"between 0 and {count - 1}"
        raise ValueError(f"{name} must be {allowed} for this module, got {index}")
    return index


def _sequence(module: _Module, input: Tensor) -> Tensor:
    """Return the checked input as (length, batch, features)."""
    if not isinstance(input, Tensor) or not input.dtype.is_floating_point:
        kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"input must be a tensor of real floating-point numbers, got {kind}")
    shape = tuple(input.shape)
    if input.ndim not in (2, 3):
        raise ValueError(f"input must have 2 or 3 dimensions, got shape {shape}")
    if shape[-1] != module.input_size:
        raise ValueError(f"input must have {module.input_size} features, got {shape[-1]}: {shape}")
    x = input.detach()
    if input.ndim == 2:
        x = x.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    if x.shape[0] < 1:
        raise ValueError(f"input must have at least one step, got shape {shape}")
    if not torch.isfinite(x).all():
        raise ValueError("input must be finite, got NaN or infinity")
    return x


def _initial(module: _Module, state: _State, input: Tensor, x: Tensor) -> list[Tensor]:
    """Return h, or h and c, of all layers as (layers * directions, batch, H)."""
    names = ("h", "c") if isinstance(module, nn.LSTM | OutputGatedGRU) else ("h",)
    layers, directions = _extent(module)
    full = (layers * directions, x.shape[1], module.hidden_size)
    if state is None:
        return [x.new_zeros(full) for _ in names]
    parts = (state,) if isinstance(state, Tensor) else tuple(state)
    if len(parts) != len(names):
        raise ValueError(f"state must hold {' and '.join(names)}, got {len(parts)} tensor(s)")
    expected = full if input.ndim == 3 else (full[0], full[2])
    for name, part in zip(names, parts, strict=True):
        if tuple(part.shape) != expected:
            raise ValueError(f"initial {name} must have shape {expected}, got {tuple(part.shape)}")
        if not torch.isfinite(part).all():
            raise ValueError(f"initial {name} must be finite, got NaN or infinity")
    return [part.detach().reshape(full) for part in parts]
