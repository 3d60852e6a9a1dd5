"""The loss of a linear layer's logits, without ever holding all of them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from kexue.losses.tailr.curve import _check_real, _loss_of, _weight_at, _working_dtype
from kexue.losses.tailr.loss import _check_options, _mean, _result_dtype

__all__ = ["linear_tailr_loss"]

_LOGITS_AT_A_TIME = 2**24


def linear_tailr_loss(
    hidden: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "classes dim"],
    target: Integer[Tensor, "*batch"],
    *,
    bias: Float[Tensor, " classes"] | None = None,
    gamma: float = 0.1,
    min_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Return ``tailr_loss(hidden @ weight.T + bias, target)`` in the memory of a few rows.

    Logits are computed and turned into their gradient ``chunk_size`` rows at a time, in one buffer;
    the forward pass leaves the gradients behind and the backward pass scales them. The products are
    the three of the plain form, nothing is computed twice. A second backward pass through the
    gradients is not possible and raises RuntimeError.

    Parameters
    ----------
    hidden : Tensor (..., D)
        Hidden states.
    weight : Tensor (V, D)
        Weight of the layer, in the dtype of hidden unless under autocast.
    target : Tensor (...)
        Class indices.
    bias : Tensor (V), optional
        Bias of the layer.
    gamma, min_weight : float
        As in :func:`tailr_loss`.
    ignore_index : int
        Class index that contributes neither loss nor gradient nor to the mean.
    reduction : {"mean", "sum"}
        The mean is over the positions that are not ignored, and 0 where there are none.
    chunk_size : int, optional
        Rows of logits at a time; by default as many as make 2^24 logits.

    Returns
    -------
    Tensor
        A scalar of the dtype of hidden, float32 under autocast.

    Raises
    ------
    ValueError
        For gamma or min_weight outside [0, 1], another reduction, shapes that do not fit, or a
        chunk_size below 1.
    TypeError
        For hidden states, weight or bias of no floating dtype or of different ones, or a target
        that holds no integers.
    IndexError
        On the CPU, for a class index that is neither in 0...V-1 nor ignore_index.

    Examples
    --------
    >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(1000, 8)
    >>> target = torch.randint(1000, (2, 5))
    >>> loss = linear_tailr_loss(hidden, weight, target, gamma=0.1, chunk_size=4)
    >>> logits = (hidden @ weight.T).flatten(0, 1)
    >>> from kexue.losses.tailr import tailr_loss
    >>> torch.allclose(loss, tailr_loss(logits, target.flatten(), gamma=0.1))
    True
    """
    _check_options(gamma, min_weight, reduction)
    if reduction == "none":
        raise ValueError("reduction must be mean or sum: the fused form returns one number")
    _check_layer(hidden, weight, target, bias, chunk_size)
    classes, dim = weight.shape
    task = _Task(
        gamma=gamma,
        min_weight=min_weight,
        ignore_index=ignore_index,
        chunk_size=chunk_size or max(1, _LOGITS_AT_A_TIME // classes),
        product_dtype=_product_dtype(hidden),
    )
    rows, labels = hidden.reshape(-1, dim), target.reshape(-1).long()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad
                                       for x in (hidden, weight, bias)):  # fmt: skip
        total = _LinearLoss.apply(rows, weight, bias, labels, task)
    else:
        total = _evaluate(rows, weight, bias, labels, task, (False, False, False)).total
    loss = total if reduction == "sum" else _mean(total, (labels != ignore_index).sum())
    return loss.to(_result_dtype(hidden))


class _Task(NamedTuple):
    gamma: float
    min_weight: float
    ignore_index: int
    chunk_size: int
    product_dtype: torch.dtype
    """Of the operands of the matrix products."""


class _Evaluation(NamedTuple):
    """The summed loss and its gradients, in the working dtype; None where not wanted."""

    total: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, task: _Task
    ) -> Tensor:
        found = _evaluate(hidden, weight, bias, target, task, ctx.needs_input_grad[:3])
        # Neither is divided by the number of rows: in half precision that is left to the factor
        # that comes back, which a gradient scaler has made large.
        ctx.save_for_backward(hidden, weight, bias, found.hidden, found.weight, found.bias)
        return found.total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        scaled = [
            None if found is None else (gradient * found).to(x.dtype)
            for x, found in zip(inputs, saved, strict=True)
        ]
        if torch.is_grad_enabled():  # a graph of this backward pass is being made
            scaled = [None if x is None else _NotTwice.apply(x, *inputs) for x in scaled]
        return *scaled, None, None


class _NotTwice(torch.autograd.Function):
    """A gradient that depends on the inputs in a way that was not kept.

    Without it the second derivative would silently be that of a constant.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "linear_tailr_loss keeps no second derivative; take tailr_loss of the logits for it"
        )


def _evaluate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: _Task,
    needs: tuple[bool, ...],
) -> _Evaluation:
    """Return the loss of all rows, and the gradients that are needed, chunk by chunk."""
    accumulator = _working_dtype(hidden.dtype)
    found = _Evaluation(
        hidden.new_zeros((), dtype=accumulator),
        torch.empty_like(hidden, dtype=accumulator) if needs[0] else None,
        torch.zeros_like(weight, dtype=accumulator) if needs[1] else None,
        bias.new_zeros(bias.shape, dtype=accumulator) if needs[2] and bias is not None else None,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(task.product_dtype)
        bias = None if bias is None else bias.to(task.product_dtype)
        for start in range(0, len(hidden), task.chunk_size):
            chunk = slice(start, start + task.chunk_size)
            part = hidden[chunk].to(task.product_dtype)
            _add_chunk(found, chunk, part, weight, bias, target[chunk], task)
    return found


def _add_chunk(
    found: _Evaluation,
    chunk: slice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: _Task,
) -> None:
    """Add the loss and gradients of some rows; one buffer is logits, softmax and gradient."""
    accumulator = found.total.dtype
    logits = F.linear(hidden, weight, bias).to(accumulator)
    logits -= logits.amax(1, keepdim=True)
    label_logit = -F.nll_loss(logits, target, ignore_index=task.ignore_index, reduction="none")
    exponentials = logits.exp_()
    normaliser = exponentials.sum(1)
    counted = target != task.ignore_index
    lp = torch.where(counted, label_logit - normaliser.log(), 0)
    found.total.add_(_loss_of(lp, task.gamma, task.min_weight).sum())
    if found.hidden is None and found.weight is None and found.bias is None:
        return

    # w (softmax - onehot), where nothing is ignored.
    w = _weight_at(lp, task.gamma, task.min_weight) * counted
    gradient = exponentials.mul_((w / normaliser)[:, None])
    gradient.scatter_add_(1, (target * counted)[:, None], -w[:, None])
    if found.bias is not None:
        found.bias.add_(gradient.sum(0))
    # Sums over many rows overflow float16.
    if task.product_dtype == torch.float16:
        hidden, weight = hidden.to(accumulator), weight.to(accumulator)
    gradient = gradient.to(hidden.dtype)
    if found.hidden is not None:
        found.hidden[chunk] = gradient @ weight
    if found.weight is not None and hidden.dtype == accumulator:
        found.weight.addmm_(gradient.mT, hidden)
    elif found.weight is not None:
        found.weight.add_(gradient.mT @ hidden)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _check_layer(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, chunk_size: int | None
) -> None:
    layer = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in layer.items():
        _check_real(name, x)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must hold class indices, got {kind}")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in layer.items())
    if hidden.ndim < 1 or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"hidden must have shape (..., D) and weight (V, D), got {shapes}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden (..., D) and weight (V, D) must share D, got {shapes}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(hidden.shape[:-1])} for hidden of shape "
            f"{tuple(hidden.shape)}, got {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape (V,) for weight (V, D), got {shapes}")
    dtypes = {x.dtype for x in layer.values()}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            "hidden, weight and bias must have one dtype outside of autocast, got "
            + ", ".join(f"{name} {x.dtype}" for name, x in layer.items())
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
