r"""Where a signal or a gradient dies: a model runs once and each layer is asked.

Second moments are what initialisation keeps: :math:`E[y^2]` of every output, :math:`E[g^2]` of the
gradient that comes back to it. A softmax of logits of size :math:`\pm 3\sqrt d` is nearly one-hot;
its entropy and the norm of its Jacobian,

.. math::
    \lVert \operatorname{diag}(p) - pp^\top \rVert_F = \sqrt{S_2 - 2 S_3 + S_2^2}, \qquad
    S_k = \sum_i p_i^k,

say how nearly.

Source: https://kexue.fm/archives/8620.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.nn.diagnosis import Diagnosis, Finding, observed, untouched
from kexue.nn.init.fans import _check_floating

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "SignalRecord",
    "SignalReport",
    "SoftmaxSaturation",
    "audit_signal",
    "softmax_saturation",
]

_ADVICE = {
    "non-finite": ("error", "find what overflows before this layer: scale its weight down"),
    "exploding": ("error", "scale its weight down to variance 1/fan_in, or put a norm before it"),
    "vanishing": ("error", "scale its weight up to variance 1/fan_in, twice that before a ReLU"),
    "dead": ("warning", "shift its input or its bias: nearly all of its outputs are zero"),
}
# A gradient that differs by this factor between layers leaves one of them untrained.
_UNEVEN = 1e8


@dataclass(frozen=True)
class SoftmaxSaturation:
    """How close a softmax is to picking one entry, as means over its rows.

    Parameters
    ----------
    logit_second_moment : float
        Of the logits that are not masked.
    normalized_entropy : float
        Entropy over its largest possible value: 1 when uniform, 0 when one-hot.
    largest_probability : float
        Mean of the largest probability of each row.
    jacobian_norm : float
        Frobenius norm of the Jacobian.

    Examples
    --------
    >>> SoftmaxSaturation(1.0, 0.9, 0.1, 0.2).normalized_entropy
    0.9
    """

    logit_second_moment: float
    normalized_entropy: float
    largest_probability: float
    jacobian_norm: float


def softmax_saturation(logits: Float[Tensor, "..."], *, dim: int = -1) -> SoftmaxSaturation:
    """Measure how saturated the softmax of some logits is.

    Parameters
    ----------
    logits : Tensor
        With -inf where an entry is masked.
    dim : int
        Dimension over which the softmax is taken; the other ones are averaged.

    Returns
    -------
    SoftmaxSaturation

    Raises
    ------
    TypeError
        For logits that are not real and floating.
    ValueError
        For fewer than two entries, no rows, NaN or +inf, or a row that is masked throughout.

    Examples
    --------
    >>> round(softmax_saturation(torch.zeros(3, 64)).jacobian_norm, 7)
    0.1240196
    """
    _check_floating(logits, "logits")
    if logits.ndim < 1 or logits.shape[dim] < 2 or logits.numel() == 0:
        raise ValueError(
            f"logits must have at least two entries along dim {dim} and at least one row, "
            f"got {tuple(logits.shape)}"
        )
    rows = logits.detach().double().movedim(dim, -1)
    if bool((rows.isnan() | (rows == math.inf)).any()):
        raise ValueError("logits must be finite or -inf, got NaN or inf")
    seen = rows > -math.inf
    if not bool(seen.any(-1).all()):
        raise ValueError("logits must have an entry that is not masked in every row")
    p = rows.softmax(-1)
    second, third = p.square().sum(-1), p.pow(3).sum(-1)
    entropy = torch.special.entr(p).sum(-1) / math.log(rows.shape[-1])
    # Rounding may leave a one-hot row a hair below zero.
    jacobian = (second - 2 * third + second.square()).clamp(min=0).sqrt()
    return SoftmaxSaturation(
        logit_second_moment=rows[seen].square().mean().item(),
        normalized_entropy=entropy.mean().item(),
        largest_probability=p.amax(-1).mean().item(),
        jacobian_norm=jacobian.mean().item(),
    )


@dataclass(frozen=True)
class SignalRecord:
    """What went through one module.

    Parameters
    ----------
    name, kind : str
        Its name in the model, and its class.
    calls : int
        How often it was called; the numbers are means over the calls.
    input_second_moment, output_second_moment, output_mean : float
        Over all elements of its first floating input and output.
    zero_fraction : float
        Share of outputs that are exactly zero.
    gradient_second_moment : float or None
        Of the loss by the output; None without a loss, or where no gradient comes by.
    flags : tuple of str
        Among "non-finite", "exploding", "vanishing" and "dead".

    Examples
    --------
    >>> SignalRecord("fc1", "Linear", 1, 1.0, 1.0, 0.0, 0.0, None, ()).flags
    ()
    """

    name: str
    kind: str
    calls: int
    input_second_moment: float
    output_second_moment: float
    output_mean: float
    zero_fraction: float
    gradient_second_moment: float | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class SignalReport(Diagnosis):
    """The records of a model, in the order of its modules.

    ``report["name"]`` is the record of a module; a KeyError says that it was never called.

    Parameters
    ----------
    records : tuple of SignalRecord
        One for each module that was called.
    loss : float or None
        The loss, where one was computed.

    Examples
    --------
    >>> report = audit_signal(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(5, 4))
    >>> [record.kind for record in report.records]
    ['Linear', 'ReLU']
    """

    records: tuple[SignalRecord, ...]
    loss: float | None

    def __getitem__(self, name: str) -> SignalRecord:
        for record in self.records:
            if record.name == name:
                return record
        raise KeyError(f"{name!r} was not called, or is no module that was looked at")

    def flagged(self) -> tuple[SignalRecord, ...]:
        """Return the records with a flag."""
        return tuple(record for record in self.records if record.flags)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each module."""
        return [
            {
                "module": record.name,
                "kind": record.kind,
                "calls": record.calls,
                "input": record.input_second_moment,
                "output": record.output_second_moment,
                "mean": record.output_mean,
                "zeros": record.zero_fraction,
                "gradient": record.gradient_second_moment,
                "flags": record.flags,
            }
            for record in self.records
        ]

    def findings(self) -> tuple[Finding, ...]:
        """Name the first module with each flag, and gradients that are far apart."""
        found, told = [], set()
        for record in self.flagged():
            for flag in record.flags:
                if flag not in told:
                    told.add(flag)
                    severity, advice = _ADVICE[flag]
                    number = f"zero fraction {record.zero_fraction:.3g}"
                    if flag != "dead":
                        number = f"output second moment {record.output_second_moment:.3g}"
                    found.append(
                        Finding(severity, record.name, f"first {flag} module, {number}", advice)  # type: ignore[arg-type]
                    )
        gradients = {
            record.name: record.gradient_second_moment
            for record in self.records
            if record.gradient_second_moment is not None
            and math.isfinite(record.gradient_second_moment)
        }
        if gradients:
            least, most = min(gradients, key=gradients.get), max(gradients, key=gradients.get)  # type: ignore[arg-type]
            if gradients[most] > _UNEVEN * gradients[least]:
                found.append(
                    Finding(
                        "warning", least,
                        f"gradient second moment {gradients[least]:.3g}, in {most} it is "
                        f"{gradients[most]:.3g}",
                        "keep the gain of each layer near 1 (layer_growth), or add a residual",
                    )
                )  # fmt: skip
        return tuple(sorted(found))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the second moments of outputs and gradients from the first module to the last."""
        from matplotlib import pyplot as plt

        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        places = range(len(self.records))
        ax.semilogy(places, [r.output_second_moment for r in self.records], ".-", label="output")
        if any(r.gradient_second_moment is not None for r in self.records):
            gradients = [r.gradient_second_moment or math.nan for r in self.records]
            ax.semilogy(places, gradients, ".-", label="gradient")
        for place in places:
            if self.records[place].flags:
                ax.axvline(place, color="black", linestyle=":", linewidth=0.5)
        ax.set_xlabel("module")
        ax.set_ylabel("second moment")
        ax.legend()
        return ax


@dataclass
class _Sums:
    kind: str
    calls: int = 0
    input: float = 0.0
    output: float = 0.0
    mean: float = 0.0
    zeros: float = 0.0
    gradients: list[float] = field(default_factory=list)


def audit_signal(
    model: nn.Module,
    *inputs: Any,
    compute_loss: Callable[[Any], Tensor] | None = None,
    include: Callable[[str, nn.Module], bool] | None = None,
    low: float = 1e-3,
    high: float = 1e3,
    dead: float = 0.99,
    **kwargs: Any,
) -> SignalReport:
    """Run a model once and measure what comes out of each module, and what gradient comes back.

    The model runs in the mode in which it is and is left without a trace: no hook, no gradient, no
    changed buffer, the same random state, also when it raises.

    Parameters
    ----------
    model : nn.Module
        Any model.
    *inputs, **kwargs
        What it is called with.
    compute_loss : callable, optional
        ``compute_loss(output)`` returns a loss of one element; then gradients are measured, too.
    include : callable, optional
        ``include(name, module)`` selects modules; those without children by default.
    low, high : float
        Output second moments that count as vanishing and exploding.
    dead : float
        Share of exact zeros that counts as dead.

    Returns
    -------
    SignalReport

    Raises
    ------
    ValueError
        If no module is selected, the loss is not one element, or bounds are not in order.
    TypeError
        For a model that is none.

    Examples
    --------
    >>> loud = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> audit_signal(loud, 1e6 * torch.ones(2, 4)).findings()[0].where
    '0'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not 0 <= low < high or not 0 <= dead <= 1:
        raise ValueError(f"low must be below high and dead a share, got {low}, {high} and {dead}")
    sums: dict[str, _Sums] = {}
    # What one module gives the next one takes: it is measured once, while it is unchanged.
    last: list[tuple[Tensor, int, float]] = []

    def moment(x: Tensor) -> float:
        if last and last[0][0] is x and last[0][1] == x._version:
            return last[0][2]
        return _second_moment(x)

    def see(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        mine = sums.setdefault(name, _Sums(type(module).__name__))
        mine.calls += 1
        x, y = _first_floating(given), _first_floating(output)
        mine.input += math.nan if x is None else moment(x)
        if y is None:
            mine.output = mine.mean = mine.zeros = math.nan
            return
        second_moment = _second_moment(y)
        # Tensors of the inference mode do not say whether they have changed.
        last[:] = [] if y.is_inference() else [(y, y._version, second_moment)]
        mine.output += second_moment
        mine.mean += y.detach().mean(dtype=torch.float64).item()
        mine.zeros += 1 - torch.count_nonzero(y).item() / max(y.numel(), 1)
        if compute_loss is not None and y.requires_grad:
            # A hook on the tensor as it is now: an operation in place afterwards leaves it valid.
            y.register_hook(lambda gradient: mine.gradients.append(_second_moment(gradient)))

    loss_value = None
    with untouched(model, parameters=False), observed(model, see, include=include) as names:
        output = model(*inputs, **kwargs)
        if compute_loss is not None:
            loss = compute_loss(output)
            loss_value = _backward(loss, model, inputs, kwargs)
    return SignalReport(
        tuple(_record(name, sums[name], low, high, dead) for name in names if name in sums),
        loss_value,
    )


def _record(name: str, sums: _Sums, low: float, high: float, dead: float) -> SignalRecord:
    calls = sums.calls
    output, zeros = sums.output / calls, sums.zeros / calls
    flags = []
    if not math.isfinite(output):
        flags.append("non-finite")
    elif output > high:
        flags.append("exploding")
    elif output < low:
        flags.append("vanishing")
    if zeros > dead:
        flags.append("dead")
    gradients = sums.gradients
    return SignalRecord(
        name=name,
        kind=sums.kind,
        calls=calls,
        input_second_moment=sums.input / calls,
        output_second_moment=output,
        output_mean=sums.mean / calls,
        zero_fraction=zeros,
        gradient_second_moment=math.fsum(gradients) / len(gradients) if gradients else None,
        flags=tuple(flags),
    )


def _backward(loss: Any, model: nn.Module, inputs: tuple[Any, ...], kwargs: Any) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"compute_loss must return a tensor of one element, got {kind}")
    leaves: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    given = (*inputs, *kwargs.values())
    leaves += [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    if leaves and loss.requires_grad:
        torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return loss.detach().double().item()


def _first_floating(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, tuple | list | dict):
        return next((found for item in items if (found := _first_floating(item)) is not None), None)
    return None


def _second_moment(x: Tensor) -> float:
    norm = torch.linalg.vector_norm(x.detach(), dtype=torch.float64).item()
    return norm**2 / max(x.numel(), 1)
