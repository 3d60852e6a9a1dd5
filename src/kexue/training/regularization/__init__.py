r"""Random noise, gradient penalties and adversarial training, with interchangeable strengths.

All of them are one thing at second order. With :math:`J = \partial f / \partial x`, metric
:math:`l` with second derivative :math:`\Lambda`, and the penalty
:math:`G = \frac12 \operatorname{tr} J^T \Lambda J` of :func:`gradient_penalty`,

.. math::
    E\, l(f(x + \varepsilon), f(x)) = s^2 G + O(s^4), \qquad
    l(f(x + r), f(x)) = \tfrac12 r^T J^T \Lambda J r + O(|r|^3),

so that, in d dimensions, the following weigh the same: :func:`consistency_loss` under noise of
standard deviation s, or of norm :math:`s \sqrt d` in a random direction; :func:`gradient_penalty`
with coefficient :math:`s^2`. :class:`VirtualAdversarialLoss` looks for the worst direction of a
norm; the eigenvalues of :math:`J^T \Lambda J` say what that gains. With labels, noise adds
:math:`\frac{s^2}{2}` times the :func:`laplacian` of the loss (:func:`noisy_loss`), and an
:func:`adversarial_perturbation` adds the norm of its gradient.

Inputs are floating-point tensors (batch, *features): images, tables, embedding outputs. Samples are
taken to be independent; batch normalisation in training mode couples them.

References
----------
Su Jianlin, "泛化性乱弹：从随机噪声、梯度惩罚到虚拟对抗训练". Bishop, *Training with noise is
equivalent to Tikhonov regularization*. Miyato et al., arXiv 1704.03976 (VAT) and 1605.07725 (FGM on
embeddings). Goodfellow et al., arXiv 1412.6572 (FGSM). Madry et al., arXiv 1706.06083 (PGD).

Examples
--------
The noise of a linear map is its penalty, exactly:

>>> import torch
>>> weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
>>> x = torch.zeros(1, 2)
>>> 0.1**2 * gradient_penalty(lambda x: x @ weight.T, x)
tensor(0.0625)
"""

from kexue.training.regularization.adversarial import (
    adversarial_perturbation,
    parameter_adversarial_perturbation,
)
from kexue.training.regularization.contexts import (
    freeze_running_statistics,
    parameter_noise,
    perturb_output,
    perturb_parameters,
)
from kexue.training.regularization.divergence import consistency_loss
from kexue.training.regularization.expansion import gradient_penalty, laplacian, noisy_loss
from kexue.training.regularization.virtual import (
    VirtualAdversarialLoss,
    virtual_adversarial_perturbation,
)

__all__ = [
    "VirtualAdversarialLoss",
    "adversarial_perturbation",
    "consistency_loss",
    "freeze_running_statistics",
    "gradient_penalty",
    "laplacian",
    "noisy_loss",
    "parameter_adversarial_perturbation",
    "parameter_noise",
    "perturb_output",
    "perturb_parameters",
    "virtual_adversarial_perturbation",
]
