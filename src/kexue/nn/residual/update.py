r"""How much one step of the optimiser moves the loss, and which parameters move it.

.. math::
    L(\theta + \Delta\theta) - L(\theta) \approx \langle \nabla L, \Delta\theta \rangle =
    \begin{cases}
        -\eta \lVert g \rVert_2^2 & \text{SGD} \\
        -\eta \lVert g \rVert_1 & \text{Adam, whose step is } -\eta \operatorname{sign} g \\
        -\eta \sum_W \operatorname{rms}(W) \lVert g_W \rVert_1 & \text{LAMB}
    \end{cases}

Over all N layers the sum grows like N where no residual scales the gradients: the increment
explodes although no gradient does.

Source: https://kexue.fm/archives/8994, https://arxiv.org/abs/2203.00555.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from kexue.nn.diagnosis import Diagnosis, Finding, untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ParameterUpdate", "PowerLawFit", "UpdateReport", "fit_power_law", "measure_update"]

_OPTIMIZERS = ("sgd", "adam", "lamb")
# A step that wants to change the loss by this share of it leaves the region of its own gradient.
_LARGE_STEP = 0.5


@dataclass(frozen=True)
class ParameterUpdate:
    """What one parameter contributes to a step.

    Parameters
    ----------
    gradient_norm_squared : float
        Sum of squares of its gradient.
    gradient_norm_one : float
        Sum of absolute values of its gradient.
    predicted_change : float
        Its part of the change of the loss, to first order.
    numel, ndim : int
        Number of its entries, and of its dimensions.

    Examples
    --------
    >>> ParameterUpdate(4.0, 2.0, -0.04, numel=1, ndim=1).predicted_change
    -0.04
    """

    gradient_norm_squared: float
    gradient_norm_one: float
    predicted_change: float
    numel: int
    ndim: int


@dataclass(frozen=True)
class UpdateReport(Diagnosis):
    """One step of an optimiser: what it should do to the loss, and what it did.

    Parameters
    ----------
    loss : float
        Before the step.
    learning_rate : float
        Of the step.
    optimizer : str
        Its kind.
    predicted_change : float
        Of the loss, to first order.
    measured_change : float
        Loss after the step minus the loss before it.
    gradient_norm_squared, gradient_norm_one : float
        Of all selected parameters.
    by_name : mapping of str to ParameterUpdate
        What each of them contributes.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> report = measure_update(model, lambda m: m.weight.square().sum() / 2, learning_rate=0.1)
    >>> round(report.measured_change / report.loss, 4)
    -0.19
    """

    loss: float
    learning_rate: float
    optimizer: str
    predicted_change: float
    measured_change: float
    gradient_norm_squared: float
    gradient_norm_one: float
    by_name: Mapping[str, ParameterUpdate]

    def rows(self) -> list[dict[str, Any]]:
        """Return the parameters, those that move the loss most first."""
        total = self.predicted_change or 1.0
        moving = sorted(self.by_name.items(), key=lambda item: item[1].predicted_change)
        return [
            {
                "parameter": name,
                "entries": update.numel,
                "gradient": math.sqrt(update.gradient_norm_squared),
                "change of the loss": update.predicted_change,
                "share": f"{update.predicted_change / total:.1%}",
            }
            for name, update in moving
        ]

    def findings(self) -> tuple[Finding, ...]:
        """Return whether the step is too large, and whether vectors make it so."""
        found = []
        step = f"one {self.optimizer} step at rate {self.learning_rate:g}"
        if not math.isfinite(self.measured_change) or self.measured_change > 0:
            found.append(
                Finding(
                    "error", "(model)",
                    f"{step} changes the loss of {self.loss:.4g} by {self.measured_change:+.3g}",
                    "lower the rate, or scale the residual branches with depth (depth_scaling)",
                )
            )  # fmt: skip
        elif -self.predicted_change > _LARGE_STEP * abs(self.loss):
            found.append(
                Finding(
                    "warning", "(model)",
                    f"{step} aims at a change of {self.predicted_change:+.3g} of a loss of "
                    f"{self.loss:.4g}",
                    "warm up, lower the rate, or scale the residual branches (depth_scaling)",
                )
            )  # fmt: skip
        vectors = sum(u.predicted_change for u in self.by_name.values() if u.ndim <= 1)
        if vectors < 0.5 * self.predicted_change:
            found.append(
                Finding(
                    "note", "(vectors)",
                    f"gains and biases bring {vectors / self.predicted_change:.0%} of the step",
                    "in a deep model divide their rate by its depth (depth_parameter_groups)",
                )
            )  # fmt: skip
        return tuple(sorted(found))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the change of the loss that each of the twenty largest parameters brings."""
        from matplotlib import pyplot as plt

        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        rows = self.rows()[:20][::-1]
        ax.barh([row["parameter"] for row in rows], [-row["change of the loss"] for row in rows])
        ax.set_xlabel("predicted decrease of the loss in one step")
        return ax


def measure_update(
    model: nn.Module,
    compute_loss: Callable[[nn.Module], Tensor],
    *,
    learning_rate: float,
    optimizer: Literal["sgd", "adam", "lamb"] = "sgd",
    parameters: Callable[[str, nn.Parameter], bool] | None = None,
) -> UpdateReport:
    r"""Take one step, look at what it does to the loss, and take it back.

    The step is :math:`-\eta g` ("sgd"), :math:`-\eta \operatorname{sign} g` ("adam"), or
    :math:`-\eta \operatorname{rms}(W) \operatorname{sign} g` with the root mean square of each
    tensor ("lamb"). Parameters, buffers and random state are as before afterwards, bit for bit, and
    gradients are not touched; both evaluations see the same random numbers, hence the same dropout.

    Parameters
    ----------
    model : nn.Module
        In the mode, training or not, in which it is.
    compute_loss : callable
        ``compute_loss(model)`` runs the model on a batch and returns a loss of one element.
    learning_rate : float
        Rate :math:`\eta`.
    optimizer : {"sgd", "adam", "lamb"}
        Kind of the step.
    parameters : callable, optional
        ``parameters(name, parameter)`` selects among the trainable parameters; all by default.

    Returns
    -------
    UpdateReport
        Sums are accumulated in float64.

    Raises
    ------
    TypeError
        For a model that is none.
    ValueError
        For a rate that is not positive and finite, another optimiser, no selected parameter, or a
        loss that is not one finite element, or depends on none of the parameters.

    Examples
    --------
    >>> model = nn.Linear(3, 1)
    >>> x = torch.randn(8, 3)
    >>> report = measure_update(model, lambda m: m(x).square().mean(), learning_rate=1e-3)
    >>> report.measured_change < 0
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}, got {optimizer!r}")
    accept = parameters or (lambda name, parameter: True)
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad and accept(n, p)}
    if not chosen:
        raise ValueError(f"no trainable parameter of {type(model).__name__} is selected")

    by_name, before = {}, math.nan
    with untouched(model):
        # The second evaluation starts from the same buffers and the same random state.
        with untouched(model, parameters=False):
            loss = compute_loss(model)
            before = _loss_value(loss)
            gradients = _gradients(loss, chosen)
        with torch.no_grad():
            for (name, parameter), gradient in zip(chosen.items(), gradients, strict=True):
                rate = learning_rate * (_rms(parameter) if optimizer == "lamb" else 1.0)
                by_name[name] = _update(parameter, gradient, rate, by_square=optimizer == "sgd")
                parameter.sub_(gradient if optimizer == "sgd" else gradient.sign(), alpha=rate)
        del gradients, loss
        after = compute_loss(model).detach().double().item()
    return UpdateReport(
        loss=before,
        learning_rate=learning_rate,
        optimizer=optimizer,
        predicted_change=math.fsum(update.predicted_change for update in by_name.values()),
        measured_change=after - before,
        gradient_norm_squared=math.fsum(u.gradient_norm_squared for u in by_name.values()),
        gradient_norm_one=math.fsum(update.gradient_norm_one for update in by_name.values()),
        by_name=by_name,
    )


@dataclass(frozen=True)
class PowerLawFit:
    """A line in logarithmic axes: y = exp(log_intercept) x^exponent.

    Parameters
    ----------
    exponent : float
        Slope.
    log_intercept : float
        Logarithm of y at x = 1.
    standard_error : float
        Of the exponent; NaN for two points, which leave nothing to estimate it from.

    Examples
    --------
    >>> PowerLawFit(exponent=1.0, log_intercept=0.0, standard_error=0.1).exponent
    1.0
    """

    exponent: float
    log_intercept: float
    standard_error: float


def fit_power_law(x: ArrayLike, y: ArrayLike) -> PowerLawFit:
    """Fit a power of x to y by least squares of the logarithms.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        Positive numbers, at least two of them, not all x equal.

    Returns
    -------
    PowerLawFit

    Raises
    ------
    ValueError
        For numbers that are not real, positive and finite, different lengths, fewer than two
        points, or all x equal.

    Examples
    --------
    >>> round(fit_power_law([1, 2, 4], [3, 12, 48]).exponent, 12)
    2.0
    """
    if np.iscomplexobj(x) or np.iscomplexobj(y):
        raise ValueError("x and y must be real, got complex numbers")
    numbers = [np.asarray(values, dtype=np.float64) for values in (x, y)]
    if any(values.ndim != 1 for values in numbers) or len(numbers[0]) != len(numbers[1]):
        raise ValueError(
            "x and y must have the same length, one dimension each, "
            f"got shapes {numbers[0].shape} and {numbers[1].shape}"
        )
    if len(numbers[0]) < 2:
        raise ValueError(f"x and y must have at least two points, got {len(numbers[0])}")
    if not all(np.all((values > 0) & np.isfinite(values)) for values in numbers):
        raise ValueError("x and y must be positive and finite")
    log_x, log_y = np.log(numbers[0]), np.log(numbers[1])
    centred = log_x - log_x.mean()
    spread = centred @ centred
    if not spread > 0:
        raise ValueError(f"x must not be all equal, got {numbers[0][0]:g} only")
    exponent = float(centred @ log_y / spread)
    log_intercept = float(log_y.mean() - exponent * log_x.mean())
    free = len(log_x) - 2
    residual = log_y - log_intercept - exponent * log_x
    error = math.sqrt(residual @ residual / free / spread) if free else math.nan
    return PowerLawFit(exponent, log_intercept, error)


def _loss_value(loss: object) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"compute_loss must return a tensor of one element, got {kind}")
    value = loss.detach().double().item()
    if not math.isfinite(value):
        raise ValueError(f"compute_loss must return a finite loss, got {value}")
    if not loss.requires_grad:
        raise ValueError("compute_loss must depend on the selected parameters, got a constant")
    return value


def _gradients(loss: Tensor, chosen: Mapping[str, nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss.sum(), list(chosen.values()), allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
        for parameter, gradient in zip(chosen.values(), found, strict=True)
    ]


def _update(
    parameter: Tensor, gradient: Tensor, rate: float, *, by_square: bool
) -> ParameterUpdate:
    squares = torch.linalg.vector_norm(gradient, 2, dtype=torch.float64).item() ** 2
    absolute = torch.linalg.vector_norm(gradient, 1, dtype=torch.float64).item()
    change = -rate * (squares if by_square else absolute)
    return ParameterUpdate(squares, absolute, change, parameter.numel(), parameter.ndim)


def _rms(parameter: Tensor) -> float:
    norm = torch.linalg.vector_norm(parameter, dtype=torch.float64).item()
    return norm / math.sqrt(max(parameter.numel(), 1))
