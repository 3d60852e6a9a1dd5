r"""Densities from variational autoencoders: what a sample's log-likelihood is, and how exactly.

With a prior :math:`q(z)`, a decoder :math:`q(x|z)` and any proposal :math:`p(z|x)`,

.. math::
    q(x) = \mathbb E_{z \sim p(z|x)} w, \qquad w = \frac{q(x|z)\, q(z)}{p(z|x)}, \qquad
    \mathbb E \log \frac1M \sum_{i=1}^M w_i \le \log q(x).

:func:`vae_loss` trains on that bound, for :math:`M = 1` the usual one.
:func:`estimate_log_likelihood` gives the value for held-out examples with standard error and
effective sample size, and :func:`annealed_importance_sampling` tightens it, from both sides where a
posterior draw is known. :class:`LinearGaussianModel` has all of this in closed form. Code lengths
of quantised data come from :class:`DiscretizedNormal` and :class:`DiscretizedLogistic`.

References
----------
Su Jianlin, "变分自编码器(八):估计样本概率密度". Kingma and Welling, arXiv 1312.6114: the
autoencoder. Burda et al., arXiv 1509.00519: importance-weighted bound. Wu et al., arXiv 1611.04273:
annealed importance sampling. Tucker et al., arXiv 1810.04152: doubly reparameterised gradient.

Examples
--------
>>> import torch
>>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> model = LinearGaussianModel.fit(x @ x[:3], latent_dim=1, proposal="diagonal")
>>> estimate = estimate_log_likelihood(model, x[:4] @ x[:3], num_samples=100)
>>> bool(torch.allclose(estimate.log_likelihood, model.log_prob(x[:4] @ x[:3])))
True
"""

from kexue.generative.vae.annealed import annealed_importance_sampling
from kexue.generative.vae.bound import (
    importance_weighted_bound,
    log_importance_weights,
    reparameterized_sample,
    vae_loss,
)
from kexue.generative.vae.estimate import LogLikelihoodEstimate, estimate_log_likelihood
from kexue.generative.vae.likelihood import (
    DiscretizedLogistic,
    DiscretizedNormal,
    bits_per_dimension,
    uniform_dequantize,
)
from kexue.generative.vae.models import (
    LatentVariableModel,
    LinearGaussianModel,
    VariationalAutoencoder,
)

__all__ = [
    "DiscretizedLogistic",
    "DiscretizedNormal",
    "LatentVariableModel",
    "LinearGaussianModel",
    "LogLikelihoodEstimate",
    "VariationalAutoencoder",
    "annealed_importance_sampling",
    "bits_per_dimension",
    "estimate_log_likelihood",
    "importance_weighted_bound",
    "log_importance_weights",
    "reparameterized_sample",
    "uniform_dequantize",
    "vae_loss",
]
