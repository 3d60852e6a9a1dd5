r"""Gradients through samples: the normal distribution, Gumbel-softmax, and what it costs.

The gradient of :math:`\mathbb E_{z \sim p_\theta}[f(z)]` moves inside the expectation once the
sample is a function of parameter-free noise. For categories with logits :math:`o`,

.. math::
    \operatorname{argmax}_i (o_i + G_i) \sim \operatorname{softmax}(o), \qquad
    z = \operatorname{softmax}\big((o + G)/\tau\big), \qquad G_i = -\log(-\log u_i).

The left side is an exact sample without a gradient, the right side has a gradient and is a biased
relaxation. :func:`categorical_expectation` puts eight estimators of the gradient, exact enumeration
among them, behind one call; :func:`gradient_moments` measures what each of them does to your own
problem. Noise is added in float32 at least, so bfloat16 logits are sampled as they should be.

References
----------
Su Jianlin, "漫谈重参数:从正态分布到Gumbel Softmax". Jang et al., arXiv 1611.01144, and Maddison et
al., arXiv 1611.00712: Gumbel-softmax. Tucker et al., arXiv 1703.07370: REBAR. Grathwohl et al.,
arXiv 1711.00123: RELAX. Paulus et al., arXiv 2010.04838: Gumbel-Rao. Liu et al., arXiv 2304.08612:
ReinMax. Kool et al., arXiv 1903.06059, and Xie and Ermon, arXiv 1901.10517: top-k.

Examples
--------
>>> import torch
>>> logits = torch.tensor([[[0.5, 0.0, -0.5]]], requires_grad=True)
>>> value = torch.tensor([1.0, 2.0, 4.0])
>>> cost = categorical_expectation(lambda z: (z @ value).sum(-1), logits, estimator="exact")
>>> cost.backward()
>>> logits.grad
tensor([[[-0.4387,  0.0411,  0.3976]]])
"""

from kexue.generative.reparameterization.expectation import categorical_expectation
from kexue.generative.reparameterization.gradients import (
    GradientMoments,
    RelaxGradient,
    gradient_moments,
    relax_gradient,
)
from kexue.generative.reparameterization.sampling import (
    ExponentialTemperature,
    conditional_gumbel,
    gumbel_max,
    gumbel_noise,
    gumbel_softmax,
    reparameterize_normal,
)
from kexue.generative.reparameterization.subsets import (
    TopKSample,
    gumbel_top_k,
    relaxed_top_k,
)

__all__ = [
    "ExponentialTemperature",
    "GradientMoments",
    "RelaxGradient",
    "TopKSample",
    "categorical_expectation",
    "conditional_gumbel",
    "gradient_moments",
    "gumbel_max",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_top_k",
    "relax_gradient",
    "relaxed_top_k",
    "reparameterize_normal",
]
