r"""Training on the number that is reported: accuracy, F1, BLEU, any reward of sampled outputs.

.. math::
    \nabla \, \mathbb{E}_{y \sim p} [r(y)] = \mathbb{E}_{y \sim p} [(r(y) - b)\, \nabla \log p(y)]

for any baseline b that does not depend on y; a good one takes most of the variance away.
:func:`policy_gradient_loss` is the loss with this gradient; :class:`PolicyGradientLoss` samples for
models that emit all tokens at once. An autoregressive model samples with its own decoder and hands
over the :func:`sequence_log_probability`. Start from a model that was trained with cross-entropy:
rewards only say which of the model's own outputs was better.

Metrics here give one float64 number a sequence, on the device of the tokens. For the BLEU of a
corpus use sacrebleu.

References
----------
Su Jianlin, "殊途同归的策略梯度与零阶优化", https://kexue.fm/archives/7737. Williams, "Simple
statistical gradient-following algorithms" (1992). Rennie et al., arXiv 1612.00563: self-critical
training. Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019).

Examples
--------
>>> import torch
>>> logits = torch.zeros(2, 3, 5, requires_grad=True)
>>> targets = torch.tensor([[1, 2, 3], [4, 0, 0]])
>>> loss = PolicyGradientLoss(token_accuracy, samples=8)(logits, targets)
>>> loss.backward()
>>> logits.grad.shape
torch.Size([2, 3, 5])
"""

from kexue.losses.policy_gradient.loss import (
    PolicyGradientLoss,
    expected_reward,
    optimal_baseline,
    policy_gradient_loss,
)
from kexue.losses.policy_gradient.metrics import sentence_bleu, token_accuracy, token_f1
from kexue.losses.policy_gradient.sequences import (
    end_mask,
    sample_actions,
    sequence_log_probability,
)

__all__ = [
    "PolicyGradientLoss",
    "end_mask",
    "expected_reward",
    "optimal_baseline",
    "policy_gradient_loss",
    "sample_actions",
    "sentence_bleu",
    "sequence_log_probability",
    "token_accuracy",
    "token_f1",
]
