r"""TaiLr, a bounded cross entropy for labels that cannot all be trusted, and calibration.

With :math:`p` the probability of the labelled class and one knob :math:`\gamma \in [0, 1]`,

.. math::
    \ell_\gamma(p) = -\frac{\log\big(\gamma + (1-\gamma)\, p\big)}{1-\gamma}, \qquad
    \ell_0(p) = -\log p, \qquad \ell_1(p) = 1 - p, \qquad
    \frac{\partial \ell_\gamma}{\partial z_k} = \frac{p}{\gamma + (1-\gamma)\, p}\,
    (p_k - 1_{k=y}).

It is cross entropy whose samples are weighted by how far the model believes them already, from
cross entropy at 0 to a smooth error rate at 1. :func:`tailr_loss` and :class:`TaiLrLoss` stand in
for :func:`torch.nn.functional.cross_entropy`; :func:`linear_tailr_loss` takes hidden states instead
of logits, for vocabularies whose logits do not fit; :func:`token_weight` is the weight, for
logging. :func:`reliability_diagram` and :func:`expected_calibration_error` say how far predicted
probabilities can be taken at their word.

References
----------
Su Jianlin, "缓解交叉熵过度自信的一个简明方案". Ji, Ke, Hu, Zhang, Huang, "Tailoring Language
Generation Models under Total Variation Distance", arXiv 2302.13344.

Examples
--------
>>> import torch
>>> logits, target = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]), torch.tensor([0, 1])
>>> tailr_loss(logits, target, gamma=0.1)
tensor(1.8172)

In a Trainer of transformers, which counts the labels of all accumulated batches:

>>> def compute_loss(outputs, labels, num_items_in_batch=None):
...     loss = tailr_loss(outputs.logits, labels, gamma=0.1, reduction="sum")
...     return loss / (num_items_in_batch or labels.ne(-100).sum())
>>> # Trainer(model, arguments, train_dataset=data, compute_loss_func=compute_loss)
"""

from kexue.losses.tailr.calibration import (
    ReliabilityDiagram,
    expected_calibration_error,
    reliability_diagram,
)
from kexue.losses.tailr.curve import token_weight
from kexue.losses.tailr.linear import linear_tailr_loss
from kexue.losses.tailr.loss import TaiLrLoss, tailr_loss

__all__ = [
    "ReliabilityDiagram",
    "TaiLrLoss",
    "expected_calibration_error",
    "linear_tailr_loss",
    "reliability_diagram",
    "tailr_loss",
    "token_weight",
]
