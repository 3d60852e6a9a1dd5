r"""Energy-based models: a scalar network as a density, sampled by its own Langevin chains.

Any network U is an unnormalised density :math:`q(x) = e^{-U(x)}/Z`. Its likelihood has the gradient

.. math:: \nabla_\theta E_p[-\log q] = E_p[\nabla_\theta U] - E_q[\nabla_\theta U],

and the second expectation is taken over the ends of Langevin chains,

.. math:: x' = x - \tfrac{\varepsilon}{2} \nabla U(x) + \sqrt{\varepsilon T}\, n .

:func:`langevin_sample` runs them, with the temperature T explicit and a Metropolis correction where
it is wanted; :class:`ReplayBuffer` keeps where they ended; :class:`EnergyModelTrainer` and
:func:`contrastive_divergence_loss` train U; :func:`ais_log_partition` gives log Z, from below and,
with exact samples, from above, with an error bar; :func:`energy_score` and
:func:`typicality_score` judge what does not belong.

References
----------
Su Jianlin, "能量视角下的GAN模型（三）：生成模型=能量模型". Du and Mordatch,
"Implicit Generation and Generalization in Energy-Based Models", arXiv 1903.08689. Neal,
"Annealed Importance Sampling", arXiv physics/9803008.
"""

from kexue.generative.energy.buffer import ReplayBuffer
from kexue.generative.energy.chain import ChainResult, energy_and_grad, langevin_sample
from kexue.generative.energy.chain import EnergyFunction as EnergyFunction
from kexue.generative.energy.partition import (
    DiagonalNormal,
    LogPartitionEstimate,
    UniformBox,
    ais_log_partition,
)
from kexue.generative.energy.scores import energy_score, typicality_score
from kexue.generative.energy.training import (
    ContrastiveDivergenceOutput,
    EnergyModelTrainer,
    apply_spectral_norm,
    contrastive_divergence_loss,
)

__all__ = [
    "ChainResult",
    "ContrastiveDivergenceOutput",
    "DiagonalNormal",
    "EnergyModelTrainer",
    "LogPartitionEstimate",
    "ReplayBuffer",
    "UniformBox",
    "ais_log_partition",
    "apply_spectral_norm",
    "contrastive_divergence_loss",
    "energy_and_grad",
    "energy_score",
    "langevin_sample",
    "typicality_score",
]
