r"""How much gradient survives k steps: the norm of the product of k Jacobians, and its exponents.

.. math::
    G_k = J_T J_{T-1} \cdots J_{T-k+1} = \frac{\partial s_T}{\partial s_{T-k}}, \qquad
    Q_t R_t = J_t Q_{t-1}, \quad \lambda = \frac1T \sum_t \log |\operatorname{diag} R_t| .

Norms reach :math:`e^{\pm 10000}`, so every product is rescaled and only logarithms are summed.

Source: https://kexue.fm/archives/7888; Vogt et al., https://arxiv.org/abs/2006.14123.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kexue.nn.diagnosis import Diagnosis, Finding
from kexue.nn.recurrent.cell import OutputGatedGRU
from kexue.nn.recurrent.jacobians import _jacobians
from kexue.nn.recurrent.linearization import _Linearization, _linearized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GradientFlow", "gradient_flow", "plot_gradient_flow"]

# Jacobians of a long sequence do not fit into memory together: a piece is at most 64 MiB.
_PIECE = 2**23
_DEAD = 15.0
_WEAK = 4.0
"""Powers of ten: a factor of 1e-15 is lost in float32 beside the recent terms whatever the task."""


@dataclass(frozen=True)
class GradientFlow(Diagnosis):
    r"""How the last state of a sequence depends on those before it.

    Parameters
    ----------
    kind : str
        Of the cell.
    lags : Tensor, shape (length,)
        Numbers of steps back: 1 to the length of the sequence.
    log_norm : Tensor, shape (length, batch)
        Natural logarithm of the spectral norm :math:`\|\partial s_T / \partial s_{T-k}\|_2` for
        each lag k, float64; minus infinity where it is exactly zero.
    lyapunov_exponents : Tensor, shape (batch, S)
        Per step, descending. Their sum is the mean of :math:`\log |\det J_t|`.

    Examples
    --------
    >>> module = nn.RNN(3, 4)
    >>> _ = nn.init.orthogonal_(module.weight_hh_l0)
    >>> flow = gradient_flow(module, torch.zeros(7, 1, 3))
    >>> flow.lags
    tensor([1, 2, 3, 4, 5, 6, 7])
    """

    kind: str
    lags: Int64[Tensor, " length"]
    log_norm: Float[Tensor, "length batch"]
    lyapunov_exponents: Float[Tensor, "batch size"]

    @property
    def rate(self) -> Float[Tensor, " batch"]:
        """Growth of the logarithm per step over the whole sequence."""
        return self.log_norm[-1] / self.lags[-1]

    def rows(self) -> list[dict[str, Any]]:
        """Return the norm at lags 1, 2, 4, ... and at the last one."""
        length = len(self.lags)
        lags = sorted({2**k for k in range(length.bit_length())} | {length})
        powers = self._powers_of_ten()
        return [
            {"lag": lag, "log10 norm": powers[lag - 1].item(), "rate": rate}
            for lag, rate in ((k, self.log_norm[k - 1].mean().item() / k) for k in lags)
        ]

    def findings(self) -> tuple[Finding, ...]:
        """Return whether the gradient vanishes or explodes over the sequence."""
        steps, power = len(self.lags), self._powers_of_ten()[-1].item()
        if abs(power) <= _WEAK:
            return ()
        over = f"to 1e{power:+.0f}" if math.isfinite(power) else "to zero"
        gated = self.kind in ("lstm", "gru", "output_gated_gru")
        if power < 0:
            message = f"the gradient falls {over} over {steps} steps"
            advice = f"max_timescale={max(steps, 3)}" if gated else 'recurrent="orthogonal"'
            advice = f"recurrent_init_(module, {advice})"
        else:
            message = f"the gradient grows {over} over {steps} steps"
            advice = 'clip it, or recurrent_init_(module, recurrent="orthogonal") for a calm start'
        severity = "error" if abs(power) > _DEAD else "warning"
        return (Finding(severity, self.kind, message, advice),)  # type: ignore[arg-type]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the norm against the lag."""
        return plot_gradient_flow({self.kind: self}, ax=ax)

    def _powers_of_ten(self) -> Tensor:
        """Mean over the batch of the logarithm to base ten, for each lag."""
        return self.log_norm.mean(1) / math.log(10)


def gradient_flow(
    module: nn.RNN | nn.LSTM | nn.GRU | OutputGatedGRU,
    input: Float[Tensor, "*sequence features"],
    state: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    layer: int = 0,
    direction: int = 0,
) -> GradientFlow:
    """Return how much of a change of an early state arrives at the last, for every distance.

    Everything is computed in float64; memory does not grow with the number of Jacobians.

    Parameters
    ----------
    module : nn.RNN, nn.LSTM, nn.GRU or OutputGatedGRU
        Any number of layers and directions.
    input : Tensor
        As the module takes it.
    state : Tensor or pair of Tensor, optional
        As the module takes it; zeros by default.
    layer, direction : int
        Which recurrence. The inputs of that layer are held.

    Returns
    -------
    GradientFlow
        One product, one spectral norm and one QR decomposition a step.

    Raises
    ------
    TypeError, ValueError
        As :func:`~kexue.nn.recurrent.recurrent_jacobians`.

    Examples
    --------
    With zero weights a forget gate stands at one half, and halves the gradient at each step:

    >>> module = nn.LSTM(3, 2)
    >>> for parameter in module.parameters():
    ...     _ = nn.init.zeros_(parameter)
    >>> flow = gradient_flow(module, torch.randn(3000, 1, 3))
    >>> round(flow.rate.item() / math.log(2), 3)
    -1.0
    """
    found = _linearized(module, input, state, layer=layer, direction=direction, dtype=torch.float64)
    with torch.no_grad():
        log_norm = _log_norms(found)
        exponents = _lyapunov_exponents(found)
    lags = torch.arange(1, len(log_norm) + 1, device=log_norm.device)
    return GradientFlow(found.kind, lags, log_norm, exponents)


def plot_gradient_flow(flows: Mapping[str, GradientFlow], *, ax: Axes | None = None) -> Axes:
    r"""Draw :math:`\log_{10} \|\partial s_T / \partial s_{T-k}\|` against k, a line for each flow.

    Parameters
    ----------
    flows : mapping of str to GradientFlow
        What to draw, by label; at least one.
    ax : matplotlib.axes.Axes, optional
        Where; a new one by default.

    Returns
    -------
    matplotlib.axes.Axes
        Means over the batch, with a legend.

    Raises
    ------
    ValueError
        If there is nothing to draw.

    Examples
    --------
    >>> flow = gradient_flow(nn.GRU(3, 4), torch.randn(9, 1, 3))
    >>> len(plot_gradient_flow({"GRU": flow}).get_lines())
    1
    """
    from matplotlib import pyplot as plt

    if not flows:
        raise ValueError("flows must hold at least one GradientFlow, got none")
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    for label, flow in flows.items():
        powers = flow._powers_of_ten()
        shown = powers.masked_fill(~powers.isfinite(), math.nan)
        ax.plot(flow.lags.cpu().numpy(), shown.cpu().numpy(), label=label)
    ax.set_xlabel("steps back $k$")
    ax.set_ylabel(r"$\log_{10} \|\partial s_T / \partial s_{T-k}\|$")
    ax.legend()
    return ax


def _log_norms(found: _Linearization) -> Tensor:
    """Multiply from the last step to the first, the newest factor on the left."""
    length, batch, size = len(found.hidden) - 1, *found.states.shape[1:]
    norms = found.hidden.new_empty(length, batch)
    product = torch.eye(size, dtype=norms.dtype, device=norms.device).expand(batch, size, size)
    log_scale = norms.new_zeros(batch)
    for steps in reversed(list(_pieces(found))):
        jacobians = _jacobians(found, steps.start, steps.stop)
        for t in reversed(range(len(jacobians))):
            product = product @ jacobians[t]
            scale = product.abs().amax((-2, -1))
            # A product that is zero stays zero; its logarithm stays at minus infinity.
            product = product / torch.where(scale > 0, scale, 1)[:, None, None]
            log_scale = log_scale + scale.log()
            norms[length - 1 - steps.start - t] = log_scale + _spectral_norm(product).log()
    return norms


def _spectral_norm(matrix: Tensor) -> Tensor:
    """Return the largest singular value, with entries of order one: the square is harmless."""
    return torch.linalg.eigvalsh(matrix @ matrix.mT)[..., -1].clamp_min(0).sqrt()


def _lyapunov_exponents(found: _Linearization) -> Tensor:
    length, batch, size = len(found.hidden) - 1, *found.states.shape[1:]
    frame = torch.eye(size, dtype=found.hidden.dtype, device=found.hidden.device)
    frame = frame.expand(batch, size, size)
    total = found.hidden.new_zeros(batch, size)
    for steps in _pieces(found):
        for jacobian in _jacobians(found, steps.start, steps.stop):
            frame, stretch = torch.linalg.qr(jacobian @ frame)
            total += stretch.diagonal(dim1=-2, dim2=-1).abs().log()
    return (total / length).sort(dim=-1, descending=True).values


def _pieces(found: _Linearization) -> Iterator[slice]:
    length, batch, size = len(found.hidden) - 1, *found.states.shape[1:]
    several = max(1, _PIECE // max(1, batch * size * size))
    for start in range(0, length, several):
        yield slice(start, min(start + several, length))
