"""The loss as a function of one log-probability, and the weight that is its gradient factor.

Everything is computed from log p, never from p: where a trained model's samples are, p is 1 up to
rounding, and only its logarithm still tells them apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["token_weight"]


def token_weight(
    log_probability: Float[Tensor, "*batch"], *, gamma: float, min_weight: float = 0.0
) -> Float[Tensor, "*batch"]:
    r"""Return how much a sample counts, against 1 in cross entropy.

    The gradient of the loss is that of cross entropy times

    .. math:: \max\big(b, w(p)\big), \qquad w(p) = \frac{p}{\gamma + (1-\gamma)\, p} \in [0, 1].

    It increases with p, from 0 to 1, and is at most p/γ. It is differentiable, so detach it where
    it is only a factor.

    Parameters
    ----------
    log_probability : Tensor, any shape
        log p of the labelled class, at most 0; -inf is p = 0. float16 and bfloat16 are computed in
        float32.
    gamma : float
        γ in [0, 1]; the weight is 1 everywhere at 0 and p at 1.
    min_weight : float
        The minimum b in [0, 1].

    Returns
    -------
    Tensor
        Weights, of the shape and dtype of the input.

    Raises
    ------
    ValueError
        For gamma or min_weight outside [0, 1].
    TypeError
        Where the log-probabilities are no real floating-point tensor.

    Examples
    --------
    >>> token_weight(torch.tensor([0.01, 0.5, 1.0]).log(), gamma=0.1)
    tensor([0.0917, 0.9091, 1.0000])
    >>> token_weight(torch.tensor([0.01, 0.5, 1.0]).log(), gamma=0.1, min_weight=0.2)
    tensor([0.2000, 0.9091, 1.0000])
    """
    _check_share("gamma", gamma)
    _check_share("min_weight", min_weight)
    _check_real("log_probability", log_probability)
    precise = log_probability.to(_working_dtype(log_probability.dtype))
    return _weight_at(precise, gamma, min_weight).to(log_probability.dtype)


def _loss_of(lp: Tensor, gamma: float, min_weight: float) -> Tensor:
    r"""The loss at log-probabilities in a working dtype; 0 at lp = 0 for every gamma.

    With a minimum weight b, the loss goes on below :math:`p_b = b\gamma/(1 - b(1-\gamma))` as a
    multiple of cross entropy, :math:`\ell_\gamma(p_b) - b \log(p/p_b)`, which has the weight b
    there and joins with its first derivative.
    """
    # Without a γ that bounds it, or with the full weight everywhere, the loss is cross entropy.
    if gamma == 0 or min_weight == 1:
        return -lp
    return _Loss.apply(lp, float(gamma), float(min_weight))


def _weight_at(lp: Tensor, gamma: float, min_weight: float) -> Tensor:
    """max(b, w) at log-probabilities in a working dtype."""
    if gamma == 0 or min_weight == 1:
        return torch.ones_like(lp)
    p = lp.exp()
    # γ + (1-γ)p, written so that it is p at p = 1 and never below p: no weight exceeds 1. A γ
    # that the dtype cannot hold would leave 0/0 at p = 0.
    weight = p / torch.sub(p, lp.expm1(), alpha=max(gamma, torch.finfo(lp.dtype).tiny))
    return weight.clamp_min(min_weight) if min_weight > 0 else weight


class _Loss(torch.autograd.Function):
    """The loss with its weight as the derivative, so that nothing but lp is kept for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lp: Tensor, gamma: float, min_weight: float) -> Tensor:
        loss = _bounded(lp, gamma)
        if min_weight > 0:
            log_pb, loss_pb = _join(gamma, min_weight)
            loss = torch.where(lp < log_pb, loss_pb - min_weight * (lp - log_pb), loss)
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        lp, ctx.gamma, ctx.min_weight = inputs
        ctx.save_for_backward(lp)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (lp,) = ctx.saved_tensors
        return -gradient * _weight_at(lp, ctx.gamma, ctx.min_weight), None, None


def _bounded(lp: Tensor, gamma: float) -> Tensor:
    """The loss without a minimum weight, with relative accuracy at both ends."""
    if gamma == 1:
        return -lp.expm1()
    s = lp.expm1().mul_(1 - gamma)
    # 1 + s = γ + (1-γ)p: near p = 1 all digits are in s, near p = 0 in the two logarithms.
    near = s.log1p()
    far = torch.logaddexp(lp.new_full((), math.log(gamma)), lp + math.log1p(-gamma))
    return torch.where(s > -0.5, near, far).div_(gamma - 1)


def _join(gamma: float, min_weight: float) -> tuple[float, float]:
    """Where the weight is b: the logarithm of that probability, and the loss there."""
    b, rest = min_weight, math.log1p(-min_weight * (1 - gamma))
    log_pb = math.log(b) + math.log(gamma) - rest
    if gamma == 1:
        return log_pb, 1 - b
    # γ + (1-γ)p_b = γ/(1 - b(1-γ)) = 1 + s.
    s = -(1 - gamma) * (1 - b) / (1 - b * (1 - gamma))
    log_of_it = math.log1p(s) if s > -0.5 else math.log(gamma) - rest
    return log_pb, log_of_it / (gamma - 1)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, in which γ = 1e-7 is subnormal."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _check_share(name: str, value: float) -> None:
    if isinstance(value, Tensor | str):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _check_real(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of floating dtype, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floating dtype, got {x.dtype}")
