"""Whether predicted probabilities come true: reliability diagrams and the calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor

from kexue.losses.tailr.curve import _check_real, _working_dtype

__all__ = ["ReliabilityDiagram", "expected_calibration_error", "reliability_diagram"]


@dataclass(frozen=True, eq=False)
class ReliabilityDiagram:
    """How often predictions are right, by how sure they are.

    Attributes
    ----------
    confidence : Tensor (n_bins,) of float64
        Mean confidence of the samples in each bin; NaN where there are none.
    accuracy : Tensor (n_bins,) of float64
        Share of them whose prediction is right; NaN where there are none.
    count : Tensor (n_bins,) of int64
        Their number.
    expected_calibration_error : float
        Mean over samples of the distance of accuracy and confidence in their bin.
    maximum_calibration_error : float
        The largest of these differences.

    Examples
    --------
    >>> sure = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]])
    >>> diagram = reliability_diagram(sure, torch.tensor([0, 1, 1]), n_bins=2)
    >>> diagram.accuracy, diagram.count
    (tensor([   nan, 0.6667], dtype=torch.float64), tensor([0, 3]))
    """

    confidence: Float64[Tensor, " n_bins"]
    accuracy: Float64[Tensor, " n_bins"]
    count: Int64[Tensor, " n_bins"]
    expected_calibration_error: float
    maximum_calibration_error: float


def reliability_diagram(
    probabilities: Float[Tensor, "samples classes"],
    labels: Integer[Tensor, " samples"],
    *,
    n_bins: int = 15,
) -> ReliabilityDiagram:
    r"""Compare confidence and accuracy in bins of equal width.

    The confidence of a sample is its largest probability, its prediction that class, its bin
    :math:`\min(\lfloor n_\text{bins}\cdot\text{confidence}\rfloor, n_\text{bins} - 1)`.

    Parameters
    ----------
    probabilities : Tensor (samples, classes)
        Predicted probabilities.
    labels : Tensor (samples,)
        True classes.
    n_bins : int
        Number of bins.

    Returns
    -------
    ReliabilityDiagram
        The bins, and their expected and largest calibration error.

    Raises
    ------
    ValueError
        For shapes that do not fit, no samples, probabilities outside [0, 1], labels of no class, or
        n_bins below 1.
    TypeError
        For probabilities of no floating dtype, or labels that are no integers.

    Examples
    --------
    >>> probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    >>> reliability_diagram(probabilities, torch.tensor([0, 1])).expected_calibration_error
    0.25
    """
    _check_predictions(probabilities, labels, n_bins)
    confidence, predicted = probabilities.to(_working_dtype(probabilities.dtype)).max(1)
    bins = (confidence * n_bins).long().clamp_max(n_bins - 1)
    count = torch.bincount(bins, minlength=n_bins)
    # An empty bin is 0/0 = NaN.
    mean_confidence = torch.bincount(bins, confidence.double(), n_bins) / count
    accuracy = torch.bincount(bins, (predicted == labels).double(), n_bins) / count
    gap = (accuracy - mean_confidence).abs().nan_to_num(0.0)
    return ReliabilityDiagram(
        confidence=mean_confidence,
        accuracy=accuracy,
        count=count,
        expected_calibration_error=float((gap * count).sum() / len(labels)),
        maximum_calibration_error=float(gap.max()),
    )


def expected_calibration_error(
    probabilities: Float[Tensor, "samples classes"],
    labels: Integer[Tensor, " samples"],
    *,
    n_bins: int = 15,
) -> float:
    r"""Return :math:`\sum_\text{bins} \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|`.

    Parameters
    ----------
    probabilities : Tensor (samples, classes)
        Predicted probabilities.
    labels : Tensor (samples,)
        True classes.
    n_bins : int
        Number of bins.

    Returns
    -------
    float
        0 where confidence tells in every bin how often the prediction is right; at most 1.

    Raises
    ------
    ValueError, TypeError
        As :func:`reliability_diagram`.

    Examples
    --------
    >>> certain = torch.eye(4)
    >>> expected_calibration_error(certain, torch.tensor([0, 1, 2, 0]))
    0.25
    """
    return reliability_diagram(probabilities, labels, n_bins=n_bins).expected_calibration_error


def _check_predictions(probabilities: Tensor, labels: Tensor, n_bins: int) -> None:
    _check_real("probabilities", probabilities)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must hold class indices, got {kind}")
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            "probabilities must have shape (samples, classes) and labels (samples,), got "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    if 0 in probabilities.shape:
        raise ValueError(
            "there must be at least one sample and one class, got probabilities of shape "
            f"{tuple(probabilities.shape)}"
        )
    # The mean of several models' probabilities may end a rounding error above 1.
    one = 1 + 4 * torch.finfo(probabilities.dtype).eps
    if not bool(((probabilities >= 0) & (probabilities <= one)).all()):
        raise ValueError(
            "probabilities must be between 0 and 1, got values from "
            f"{float(probabilities.min())} to {float(probabilities.max())}"
        )
    if not bool(((labels >= 0) & (labels < probabilities.shape[1])).all()):
        raise ValueError(
            f"labels must be in 0...{probabilities.shape[1] - 1}, got values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
