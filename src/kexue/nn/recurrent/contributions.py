r"""Which time steps the gradient of a loss really comes from.

The gradient of a recurrent weight is a sum over the steps at which it was used,

.. math::
    \frac{dL}{dU} = \sum_t a_t h_{t-1}^\top, \qquad
    a_t = \frac{\partial L}{\partial (U h_{t-1})},

and vanishing means that the terms of early steps no longer count in it, not that the sum is zero.

Source: https://kexue.fm/archives/7888; Pascanu et al., https://arxiv.org/abs/1211.5063.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.nn.diagnosis import Diagnosis, Finding
from kexue.nn.recurrent.cell import OutputGatedGRU
from kexue.nn.recurrent.linearization import _extent, _kind, _Linearization, _linearized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GradientContributions", "gradient_contributions"]

# Below this share of the gradient the earlier half of a sequence teaches nothing in float32.
_FORGOTTEN = 1e-4


@dataclass(frozen=True)
class GradientContributions(Diagnosis):
    """What each time step brings to the gradient of a loss.

    Parameters
    ----------
    state_gradient_norm : Tensor, shape (length, batch)
        Norm of the derivative of the loss with respect to h after each step.
    recurrent_weight : Tensor, shape (length, gates * H, H)
        Part of the gradient of ``weight_hh_l0`` that enters at each step, summed over the batch;
        the sum over the steps is the gradient. With a zero initial state the first is zero.

    Examples
    --------
    >>> module = nn.GRU(3, 4)
    >>> parts = gradient_contributions(module, torch.randn(7, 2, 3), lambda out: out[-1].sum())
    >>> parts.recurrent_weight.shape
    torch.Size([7, 12, 4])
    """

    state_gradient_norm: Float[Tensor, "length batch"]
    recurrent_weight: Float[Tensor, "length rows hidden"]

    @property
    def norms(self) -> Float[Tensor, " length"]:
        """Frobenius norm of the part of each step."""
        # Squares of parts that vanish underflow in float32, at 1e-23 already.
        found = torch.linalg.matrix_norm(self.recurrent_weight, dtype=torch.float64)
        return found.to(self.recurrent_weight.dtype)

    def rows(self) -> list[dict[str, Any]]:
        """Return the norms step by step, with their share of the sum."""
        norms = self.norms
        shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
        state = self.state_gradient_norm.mean(1)
        return [
            {"step": t, "state gradient": at.item(), "weight gradient": norm.item(),
             "share": share.item()}
            for t, (at, norm, share) in enumerate(zip(state, norms, shares, strict=True), start=1)
        ]  # fmt: skip

    def findings(self) -> tuple[Finding, ...]:
        """Return whether the earlier half of the sequence is lost to the gradient."""
        norms = self.norms.double()
        half = len(norms) // 2
        total = norms.sum().item()
        # The first step uses the initial state, zero as a rule: two more are needed to tell.
        if half < 2 or not total > 0:
            return ()
        share = norms[:half].sum().item() / total
        if share >= _FORGOTTEN:
            return ()
        return (
            Finding(
                "warning", "weight_hh_l0",
                f"the first {half} of {len(norms)} steps bring {share:.0e} of the gradient",
                "if the answer lies there: recurrent_init_(module, max_timescale="
                f"{len(norms)}), or recurrent=\"orthogonal\" for a plain RNN",
            ),
        )  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the norm of each step's part of the gradient in logarithmic scale."""
        from matplotlib import pyplot as plt

        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        norms = self.norms.cpu()
        # Zero has no place on a logarithmic axis.
        shown = norms.masked_fill(norms == 0, float("nan"))
        ax.plot(range(1, len(norms) + 1), shown.numpy())
        if bool((norms > 0).any()):
            ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel("part of the gradient")
        return ax


def gradient_contributions(
    module: nn.RNN | nn.LSTM | nn.GRU | OutputGatedGRU,
    input: Float[Tensor, "*sequence features"],
    compute_loss: Callable[[Tensor], Tensor],
    state: Tensor | tuple[Tensor, Tensor] | None = None,
) -> GradientContributions:
    """Return what each time step brings to the gradient of a loss.

    Only ``compute_loss`` is differentiated by autograd, with respect to the output; from there the
    gradient runs back through the sequence in closed form. No ``.grad`` is touched.

    Parameters
    ----------
    module : nn.RNN, nn.LSTM, nn.GRU or OutputGatedGRU
        With one layer and one direction.
    input : Tensor
        As the module takes it.
    compute_loss : callable
        ``compute_loss(output)`` takes the module's output, in the module's layout and dtype, and
        returns a loss of one element.
    state : Tensor or pair of Tensor, optional
        As the module takes it; zeros by default.

    Returns
    -------
    GradientContributions
        In the dtype of input and module, at least float32; without a graph.

    Raises
    ------
    TypeError, ValueError
        As :func:`~kexue.nn.recurrent.recurrent_jacobians`; ValueError for several layers or
        directions, and for a loss that is not one element or does not depend on the output.

    Examples
    --------
    >>> module = nn.LSTM(3, 4)
    >>> x = torch.randn(7, 2, 3)
    >>> parts = gradient_contributions(module, x, lambda output: output[-1].square().sum())
    >>> module(x)[0][-1].square().sum().backward()
    >>> torch.allclose(parts.recurrent_weight.sum(0), module.weight_hh_l0.grad, atol=1e-6)
    True
    """
    _kind(module)
    layers, directions = _extent(module)
    if (layers, directions) != (1, 1):
        raise ValueError(
            f"module must have one layer and one direction, got {layers} and {directions}"
        )
    found = _linearized(module, input, state)
    arriving = _output_gradient(module, input, found.hidden[1:], compute_loss)
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        return _contributions(found, arriving)


def _output_gradient(
    module: nn.Module, input: Tensor, shown: Tensor, compute_loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the direct derivative of the loss with respect to h of every step."""
    first, unbatched = bool(module.batch_first), input.ndim == 2
    output = shown.squeeze(1) if unbatched else shown.transpose(0, 1) if first else shown
    output = output.to(torch.promote_types(input.dtype, module.weight_hh_l0.dtype))  # type: ignore[arg-type]
    with torch.enable_grad():
        output = output.detach().clone().requires_grad_()
        loss = compute_loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"compute_loss must return a tensor of one element, got {kind}")
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss.sum(), output, allow_unused=True)
    if gradient is None:
        raise ValueError("compute_loss must depend on the output of the module, got a constant")
    gradient = gradient.to(shown.dtype)
    return gradient.unsqueeze(1) if unbatched else gradient.transpose(0, 1) if first else gradient


def _contributions(found: _Linearization, arriving: Tensor) -> GradientContributions:
    """Run the gradient back: dh is what reaches h of a step, dm what reaches the carried part."""
    length, batch, hidden = arriving.shape
    weight = torch.cat(list(found.blocks.values()))
    rows = {name: slice(n * hidden, (n + 1) * hidden) for n, name in enumerate(found.blocks)}
    at_gates = arriving.new_zeros(length, batch, len(weight))
    at_states = torch.empty_like(arriving)
    from_gates = arriving.new_zeros(batch, hidden)
    carried = arriving.new_zeros(batch, hidden)
    for t in reversed(range(length)):
        dh = arriving[t] + from_gates
        if found.cell is None:
            dh = dm = dh + carried
        else:
            assert found.output_slope is not None
            assert found.output_side is not None
            dm = found.output_slope[t] * dh + carried
            at_gates[t, :, rows[str(found.output_gate)]] = found.output_side[t] * dh
        for name, side in found.sides.items():
            torch.mul(side[t], dm, out=at_gates[t, :, rows[name]])
        at_states[t] = dh
        from_gates = at_gates[t] @ weight
        carried = found.carry[t] * dm if found.carry is not None else torch.zeros_like(dm)
    parts = at_gates.mT @ found.hidden[:-1]
    at_states = torch.linalg.vector_norm(at_states, dim=-1, dtype=torch.float64).to(parts.dtype)
    return GradientContributions(at_states, parts)
