"""Expected rewards, baselines, and the loss whose gradient is the policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kexue.losses.policy_gradient.sequences import (
    at_least_float32,
    check_logits,
    end_mask,
    sample_actions,
    sequence_log_probability,
)

__all__ = ["PolicyGradientLoss", "expected_reward", "optimal_baseline", "policy_gradient_loss"]

BASELINES = ("none", "leave_one_out", "self_critical")
REDUCTIONS = ("none", "mean", "sum")

Baseline: TypeAlias = Literal["none", "leave_one_out", "self_critical"] | Tensor
Reward: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def expected_reward(
    logits: Float[Tensor, "*batch vocabulary"],
    rewards: Tensor,
    *,
    temperature: float | Tensor = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Return :math:`\sum_y p_y r_y` for :math:`p = \mathrm{softmax}(o / \tau)`, differentiable.

    Where all outputs can be listed this needs no sampling, and minus this is the loss to use.

    Parameters
    ----------
    logits : Tensor, shape (*batch, vocabulary)
        Scores o.
    rewards : Tensor, shape (*batch, vocabulary)
        Reward of each output; carries no gradient.
    temperature : float or Tensor, optional
        :math:`\tau`; a tensor is broadcast against the logits, (batch, 1) for one number a row.

    Returns
    -------
    Tensor, shape (*batch)
        In float32 for logits of half precision.

    Raises
    ------
    ValueError
        For rewards of another shape, numbers that are not finite (logits may be minus infinity), or
        a temperature that is not positive and finite.
    TypeError
        For logits that are no floating-point tensor.

    Examples
    --------
    >>> expected_reward(torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    tensor(0.5000)
    """
    check_logits(logits)
    rewards = _checked_rewards(rewards, logits, "logits")
    if not torch.compiler.is_compiling():
        given = torch.as_tensor(temperature)
        if not bool(((given > 0) & given.isfinite()).all()):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
    wide = logits.to(at_least_float32(logits.dtype))
    # What is forbidden for good stays so at every temperature, and has no part in its gradient.
    forbidden = wide == -torch.inf
    below = (wide - wide.detach().amax(-1, keepdim=True)).masked_fill(forbidden, 0.0)
    p = (below / temperature).masked_fill(forbidden, -torch.inf).softmax(-1)
    return (p * rewards.to(p.dtype)).sum(-1)


@torch.no_grad()
def optimal_baseline(
    logits: Float[Tensor, "*batch vocabulary"], rewards: Tensor
) -> Float[Tensor, "*batch"]:
    r"""Return the baseline with the least variance of the gradient in the logits.

    .. math::
        b^* = \frac{\sum_y p_y w_y r_y}{\sum_y p_y w_y}, \qquad
        w_y = |\nabla_o \log p_y|^2 = 1 - 2 p_y + |p|^2 .

    Parameters
    ----------
    logits : Tensor, shape (*batch, vocabulary)
        Of one softmax.
    rewards : Tensor, shape (*batch, vocabulary)
        Reward of each output.

    Returns
    -------
    Tensor, shape (*batch)
        Without gradient. Where one output has all the probability nothing varies, and it is the
        expected reward.

    Raises
    ------
    ValueError
        For rewards of another shape, or numbers that are not finite (logits may be minus infinity).
    TypeError
        For logits that are no floating-point tensor.

    Examples
    --------
    >>> optimal_baseline(torch.zeros(2), torch.tensor([1.0, 0.0]))
    tensor(0.5000)
    """
    check_logits(logits)
    rewards = _checked_rewards(rewards, logits, "logits")
    p = logits.double().softmax(-1)
    # (1 - p_y)^2 and the squares of the others: 1 - 2 p_y + |p|^2 without its cancellation.
    weights = p * ((1 - p).square() + p.square().sum(-1, keepdim=True) - p.square())
    total = weights.sum(-1)
    mean, optimal = (p * rewards).sum(-1), (weights * rewards).sum(-1)
    return torch.where(total > 0, optimal / torch.where(total > 0, total, 1.0), mean).to(
        logits.dtype
    )


def policy_gradient_loss(
    log_probability: Float[Tensor, "*shape"],
    rewards: Tensor,
    *,
    baseline: Baseline = "leave_one_out",
    greedy_rewards: Tensor | None = None,
    normalize_advantages: bool = False,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Float[Tensor, "..."]:
    r"""Return :math:`-(r - b) \log p(y)`, whose gradient is minus that of the expected reward.

    Its value means nothing: watch the rewards.

    Parameters
    ----------
    log_probability : Tensor, shape (samples, batch)
        Of the sampled sequences. Other shapes will do; with "leave_one_out" the first dimension is
        that of the samples.
    rewards : Tensor, shape of log_probability
        One number a sequence. They carry no gradient.
    baseline : {"leave_one_out", "self_critical", "none"} or Tensor, optional
        b: the mean reward of the other samples; ``greedy_rewards``; 0; or numbers of your own, of
        the shape of the rewards, of that without the samples, or one. To leave the gradient as it
        is they must not depend on the sample they are subtracted from.
    greedy_rewards : Tensor, shape (batch,) or (1, batch), optional
        Rewards of the greedy outputs, for "self_critical".
    normalize_advantages : bool, optional
        Divide all r - b by their root mean square: the step does not depend on the reward's unit.
    reduction : {"mean", "sum", "none"}, optional
        Over all entries.

    Returns
    -------
    Tensor
        Of the dtype of ``log_probability``.

    Raises
    ------
    ValueError
        For rewards of another shape or not finite, a log-probability that is NaN or plus infinity,
        another baseline or reduction, "leave_one_out" without at least two samples,
        "self_critical" without greedy rewards.
    TypeError
        For a log-probability that is no floating-point tensor.

    Examples
    --------
    >>> log_probability = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    >>> policy_gradient_loss(log_probability, torch.tensor([[1.0], [0.0]])).backward()
    >>> log_probability.grad.tolist()
    [[-0.5], [0.5]]
    """
    if not isinstance(log_probability, Tensor) or not log_probability.is_floating_point():
        raise TypeError(
            "log_probability must be a floating-point tensor, got "
            f"{getattr(log_probability, 'dtype', type(log_probability).__name__)}"
        )
    if not torch.compiler.is_compiling() and bool(
        (log_probability.isnan() | (log_probability == torch.inf)).any()
    ):
        raise ValueError("log_probability must be finite or minus infinity, got NaN or infinity")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    rewards = _checked_rewards(rewards, log_probability, "log_probability")
    advantages = rewards - _baseline(baseline, rewards, greedy_rewards)
    if normalize_advantages:
        scale = advantages.square().mean().sqrt()
        advantages = advantages / torch.where(scale > 0, scale, 1.0)
    # An impossible sequence without an advantage has no part in the loss: 0 · ∞ is no number.
    concerned = log_probability.masked_fill(advantages == 0, 0.0)
    loss = -advantages.to(log_probability.dtype) * concerned
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


class PolicyGradientLoss(nn.Module):
    r"""Sample sequences from logits, reward them, and return the loss of the policy gradient.

    For models that emit the logits of all positions at once.

    Parameters
    ----------
    reward : callable
        ``reward(actions, targets)`` with actions of shape (samples, batch, length) returns rewards
        of shape (samples, batch): a metric of this module, ``functools.partial`` of one, or yours.
    samples : int, optional
        Sequences drawn for each target.
    baseline : {"leave_one_out", "self_critical", "none"} or Tensor, optional
        As in :func:`policy_gradient_loss`; "self_critical" rewards the greedy output as well.
    end_token : int, optional
        What comes after the first one counts for nothing, and is not trained. The reward sees the
        whole sequences and has to be told of the token itself.
    normalize_advantages : bool, optional
        As in :func:`policy_gradient_loss`.

    Raises
    ------
    ValueError
        For less than one sample, another baseline, "leave_one_out" with one sample; in ``forward``
        for rewards of another shape or not finite.
    TypeError
        For a reward that cannot be called.

    Examples
    --------
    >>> from kexue.losses import token_f1
    >>> loss = PolicyGradientLoss(token_f1, samples=2)
    >>> loss(torch.zeros(3, 4, 6), torch.zeros(3, 4, dtype=torch.int64)).shape
    torch.Size([])
    """

    def __init__(
        self,
        reward: Reward,
        *,
        samples: int = 4,
        baseline: Baseline = "leave_one_out",
        end_token: int | None = None,
        normalize_advantages: bool = False,
    ) -> None:
        super().__init__()
        if not callable(reward):
            raise TypeError(f"reward must be callable, got {type(reward).__name__}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        _check_baseline(baseline)
        if isinstance(baseline, str) and baseline == "leave_one_out" and samples < 2:
            raise ValueError(f"leave_one_out needs at least two samples, got {samples}")
        self.reward = reward
        self.samples = samples
        self.baseline = baseline
        self.end_token = end_token
        self.normalize_advantages = normalize_advantages

    def forward(
        self,
        logits: Float[Tensor, "batch length vocabulary"],
        targets: Int[Tensor, "batch target_length"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss, a mean over samples and batch.

        Parameters
        ----------
        logits : Tensor, shape (batch, length, vocabulary)
            Of the positions, independent of each other.
        targets : Tensor of int, shape (batch, target_length)
            What the reward compares with.
        generator : torch.Generator, optional
            Source of the samples, on the device of ``logits``.
        """
        actions = sample_actions(logits, samples=self.samples, generator=generator)
        mask = None if self.end_token is None else end_mask(actions, self.end_token)
        greedy = None
        if isinstance(self.baseline, str) and self.baseline == "self_critical":
            greedy = self._rewards(logits.detach().argmax(-1).unsqueeze(0), targets)
        return policy_gradient_loss(
            sequence_log_probability(logits, actions, mask=mask),
            self._rewards(actions, targets),
            baseline=self.baseline,
            greedy_rewards=greedy,
            normalize_advantages=self.normalize_advantages,
        )

    def _rewards(self, actions: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            rewards = torch.as_tensor(self.reward(actions, targets))
        if rewards.shape != actions.shape[:2]:
            raise ValueError(
                "reward must return one number a sequence, of shape (samples, batch) = "
                f"{tuple(actions.shape[:2])}, got {tuple(rewards.shape)}"
            )
        return rewards.to(actions.device, torch.float64)

    def extra_repr(self) -> str:
        return f"samples={self.samples}, baseline={self.baseline!r}, end_token={self.end_token}"


def _baseline(baseline: Baseline, rewards: Tensor, greedy_rewards: Tensor | None) -> Tensor | float:
    _check_baseline(baseline)
    if isinstance(baseline, Tensor):
        return _shaped_like_rewards("baseline", baseline, rewards)
    if baseline == "none":
        return 0.0
    if baseline == "self_critical":
        if greedy_rewards is None:
            raise ValueError("baseline 'self_critical' needs greedy_rewards, got None")
        return _shaped_like_rewards("greedy_rewards", greedy_rewards, rewards)
    if rewards.ndim < 1 or len(rewards) < 2:
        raise ValueError(
            "baseline 'leave_one_out' needs a sample dimension of at least two in front, got "
            f"rewards of shape {tuple(rewards.shape)}"
        )
    # The others' mean: with the sample's own reward in it the gradient would shrink by 1 - 1/n.
    # About the mean of all, which keeps the digits of small differences.
    samples = len(rewards)
    mean = rewards.mean(0)
    return mean - (rewards - mean) / (samples - 1)


def _shaped_like_rewards(name: str, numbers: Tensor, rewards: Tensor) -> Tensor:
    numbers = torch.as_tensor(numbers, device=rewards.device).detach().double()
    one_for_all_samples = (rewards.shape[1:], (1, *rewards.shape[1:]))
    if numbers.ndim and numbers.shape != rewards.shape and numbers.shape not in one_for_all_samples:
        raise ValueError(
            f"{name} must have the shape of the rewards {tuple(rewards.shape)}, or that without "
            f"the samples {tuple(rewards.shape[1:])}, got {tuple(numbers.shape)}"
        )
    if not torch.compiler.is_compiling() and not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity among them")
    return numbers


def _check_baseline(baseline: Baseline) -> None:
    if not isinstance(baseline, Tensor) and baseline not in BASELINES:
        raise ValueError(
            f"baseline must be a tensor or one of {', '.join(BASELINES)}, got {baseline!r}"
        )


def _checked_rewards(rewards: Tensor, like: Tensor, name: str) -> Tensor:
    rewards = torch.as_tensor(rewards, device=like.device).detach()
    if rewards.is_complex():
        raise TypeError("rewards must be real numbers, got complex ones")
    if rewards.shape != like.shape:
        raise ValueError(
            f"rewards must have the shape of {name}, {tuple(like.shape)}, got "
            f"{tuple(rewards.shape)}"
        )
    if not torch.compiler.is_compiling() and not bool(rewards.isfinite().all()):
        raise ValueError("rewards must be finite, got NaN or infinity among them")
    return rewards.double()
