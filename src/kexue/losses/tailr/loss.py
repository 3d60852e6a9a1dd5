"""TaiLr on logits, with the interface of torch's cross entropy."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.losses.tailr.curve import _check_real, _check_share, _loss_of, _working_dtype

__all__ = ["TaiLrLoss", "tailr_loss"]

Reduction = Literal["none", "mean", "sum"]


def tailr_loss(
    input: Float[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    *,
    gamma: float = 0.1,
    min_weight: float = 0.0,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "..."]:
    r"""Return the bounded cross entropy :math:`-\log(\gamma + (1-\gamma)\,p)/(1-\gamma)`.

    Shapes, kinds of target, class weights and reductions are those of
    :func:`torch.nn.functional.cross_entropy`, which it is at γ = 0; at γ = 1 it is 1 - p. The loss
    of a sample lies between 0, at p = 1, and log(1/γ)/(1-γ). Soft and smoothed labels give the
    expected loss over labels drawn from them.

    Published choices of γ are 1e-7 for language models from scratch, 0.1 for translation and 0.8
    for fine-tuned summarisation. With K classes and random weights a sample counts about 1/(γK), so
    a γ far above 1/K stalls training from scratch unless there is a ``min_weight``, or a schedule
    that starts near 0. Under torch.compile every new γ compiles again: a schedule there has a
    handful of values, or the loss stays outside of the compiled region.

    Parameters
    ----------
    input : Tensor (C), (N, C) or (N, C, d1, ...)
        Logits. float16 and bfloat16 are computed in float32; logits of -inf forbid a class.
    target : Tensor
        Class indices, of the shape of input without its class axis; or probabilities, of the shape
        of input and a floating dtype.
    gamma : float
        γ in [0, 1]: how much a sample that the model does not believe is held back.
    min_weight : float
        Minimum b in [0, 1] of a sample's weight, for early training; the loss is then unbounded.
    weight : Tensor (C), optional
        Factor of each class's term.
    ignore_index : int
        Class index that contributes neither loss nor gradient nor to the mean.
    reduction : {"none", "mean", "sum"}
        With class indices the mean is over the class weights of the positions that are not ignored,
        and 0 where there are none (torch gives NaN); with probabilities, over all positions.
    label_smoothing : float
        Share ε in [0, 1] of the label that is spread evenly over all classes.

    Returns
    -------
    Tensor
        A scalar, or with "none" the losses in the shape of class indices; of the dtype of input,
        and float32 where autocast would run cross entropy in it.

    Raises
    ------
    ValueError
        For gamma, min_weight or label_smoothing outside [0, 1], an unknown reduction, a shape of
        target or weight that does not fit, or probabilities with an ignore_index of a class.
    TypeError
        For an input that is no floating-point tensor, or a target of another kind.
    IndexError
        On the CPU, for a class index that is neither in 0...C-1 nor ignore_index.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0], [9.0, 0.0]])
    >>> tailr_loss(logits, torch.tensor([0, 1]), gamma=0.1, reduction="none")
    tensor([0.1261, 2.5572])
    >>> F.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.1269, 9.0001])
    """
    _check_options(gamma, min_weight, reduction, label_smoothing)
    soft = _check_tensors(input, target, weight, ignore_index)
    class_axis = 0 if input.ndim == 1 else 1
    log_probability = F.log_softmax(input.to(_working_dtype(input.dtype)), class_axis)
    if weight is not None:
        weight = weight.to(log_probability.dtype)

    if soft:
        loss = _expected_loss(
            log_probability, target, gamma, min_weight, weight, label_smoothing, class_axis
        )
        normaliser = torch.as_tensor(loss.numel(), device=loss.device)
    else:
        loss, normaliser = _labelled_loss(
            log_probability, target.long(), gamma, min_weight, weight, label_smoothing, class_axis,
            ignore_index,
        )  # fmt: skip
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = _mean(loss.sum(), normaliser)
    return loss.to(_result_dtype(input))


class TaiLrLoss(nn.Module):
    """Bounded cross entropy as a module, whose ``gamma`` may be set during training.

    Parameters
    ----------
    gamma : float
        γ in [0, 1]; a plain attribute, which a schedule may set.
    min_weight : float
        Minimum weight of a sample in [0, 1].
    weight : Tensor (C), optional
        Factor of each class's term; a buffer.
    ignore_index : int
        Class index that does not count.
    reduction : {"none", "mean", "sum"}
        What is returned of the losses.
    label_smoothing : float
        Share of the label that is spread over all classes, in [0, 1].

    Raises
    ------
    ValueError
        As :func:`tailr_loss`, for gamma, min_weight, reduction and label_smoothing already here.
    TypeError
        As :func:`tailr_loss`.

    Examples
    --------
    >>> loss = TaiLrLoss(gamma=0.0)
    >>> logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    >>> loss(logits, target)
    tensor(2.1269)
    >>> loss.gamma = 0.5
    >>> loss(logits, target)
    tensor(1.1611)
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        gamma: float = 0.1,
        min_weight: float = 0.0,
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_options(gamma, min_weight, reduction, label_smoothing)
        if weight is not None:
            _check_real("weight", weight)
        self.gamma = gamma
        self.min_weight = min_weight
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(
        self, input: Float[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Return the loss of logits and their target, see :func:`tailr_loss`."""
        return tailr_loss(
            input,
            target,
            gamma=self.gamma,
            min_weight=self.min_weight,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, min_weight={self.min_weight}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )


def _labelled_loss(
    log_probability: Tensor,
    target: Tensor,
    gamma: float,
    min_weight: float,
    weight: Tensor | None,
    label_smoothing: float,
    class_axis: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the losses of class indices, and what their mean divides by."""
    # At ignored positions this is log 1, where the loss is 0 for every γ.
    lp = -F.nll_loss(log_probability, target, ignore_index=ignore_index, reduction="none")
    loss = _loss_of(lp, gamma, min_weight)
    counted = target != ignore_index
    label_weight = counted if weight is None else weight[target * counted] * counted
    loss = loss * label_weight
    if label_smoothing > 0:
        classes = log_probability.shape[class_axis]
        of_all = _weighted(_loss_of(log_probability, gamma, min_weight), weight, class_axis)
        spread = torch.where(counted, of_all.sum(class_axis), 0)
        loss = (1 - label_smoothing) * loss + label_smoothing / classes * spread
    return loss, label_weight.sum()


def _expected_loss(
    log_probability: Tensor,
    target: Tensor,
    gamma: float,
    min_weight: float,
    weight: Tensor | None,
    label_smoothing: float,
    class_axis: int,
) -> Tensor:
    """Return the losses of labels drawn from the probabilities in target."""
    q = target.to(log_probability.dtype)
    if label_smoothing > 0:
        q = (1 - label_smoothing) * q + label_smoothing / q.shape[class_axis]
    # A class that is forbidden, and never the label, has a part of 0, not 0 · ∞.
    lp = log_probability.masked_fill((q == 0) & log_probability.isneginf(), 0.0)
    return _weighted(q * _loss_of(lp, gamma, min_weight), weight, class_axis).sum(class_axis)


def _weighted(x: Tensor, weight: Tensor | None, class_axis: int) -> Tensor:
    if weight is None:
        return x
    return x * weight.reshape([-1 if axis == class_axis else 1 for axis in range(x.ndim)])


def _mean(total: Tensor, normaliser: Tensor) -> Tensor:
    """Divide, but keep a total of nothing at 0."""
    return total / torch.where(normaliser == 0, 1, normaliser)


def _result_dtype(input: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(input.device.type):
        return _working_dtype(input.dtype)
    return input.dtype


def _check_options(
    gamma: float, min_weight: float, reduction: str, label_smoothing: float = 0.0
) -> None:
    _check_share("gamma", gamma)
    _check_share("min_weight", min_weight)
    _check_share("label_smoothing", label_smoothing)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be one of none, mean, sum, got {reduction!r}")


def _check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Check what shapes and dtypes tell; return whether the target holds probabilities."""
    _check_real("input", input)
    if input.ndim == 0:
        raise ValueError("input must have shape (C), (N, C) or (N, C, d1, ...), got shape ()")
    shape = tuple(input.shape)
    soft = _is_probabilities(target)
    expected = shape if soft else shape[:1] * (len(shape) > 1) + shape[2:]
    if tuple(target.shape) != expected:
        kind = "probabilities" if soft else "class indices"
        raise ValueError(
            f"a target of {kind} must have shape {expected} for input of shape {shape}, "
            f"got {tuple(target.shape)}"
        )
    if soft and ignore_index >= 0:
        raise ValueError(
            "ignore_index has no meaning for a target of probabilities; it must be negative, "
            f"got {ignore_index}"
        )
    classes = shape[0 if len(shape) == 1 else 1]
    if weight is not None:
        _check_real("weight", weight)
        if tuple(weight.shape) != (classes,):
            raise ValueError(
                f"weight must have shape ({classes},) for input of shape {shape}, "
                f"got {tuple(weight.shape)}"
            )
    return soft


def _is_probabilities(target: Tensor) -> bool:
    if not isinstance(target, Tensor) or target.is_complex() or target.dtype == torch.bool:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must hold class indices or probabilities, got {kind}")
    return target.is_floating_point()
