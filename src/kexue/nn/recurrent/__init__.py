r"""How much gradient a recurrent network carries over k steps, and starts from which it does.

The gradient of a recurrent network is itself a recurrence,

.. math::
    \frac{dh_t}{d\theta} = \frac{\partial h_t}{\partial \theta}
    + \frac{\partial h_t}{\partial h_{t-1}} \frac{dh_{t-1}}{d\theta},

so what a step k back contributes is multiplied by a product of k Jacobians. For torch's own RNN,
LSTM and GRU, :func:`recurrent_jacobians` gives these in closed form, :func:`gradient_flow` the norm
of their products, :func:`gate_terms` the gates they pass, :func:`gradient_contributions` the share
of each step in the gradient of a loss; :func:`recurrent_init_` repairs what they show.

Vanishing does not mean that the gradient is zero: its recent terms remain. It means that the early
ones no longer count.

Source: 也来谈谈RNN的梯度消失/爆炸问题 (https://kexue.fm/archives/7888).
"""

from kexue.nn.recurrent.cell import OutputGatedGRU
from kexue.nn.recurrent.contributions import GradientContributions, gradient_contributions
from kexue.nn.recurrent.flow import GradientFlow, gradient_flow, plot_gradient_flow
from kexue.nn.recurrent.gates import GateTerms, gate_terms
from kexue.nn.recurrent.initialization import recurrent_init_
from kexue.nn.recurrent.jacobians import RecurrentJacobians, recurrent_jacobians
from kexue.nn.recurrent.tasks import SequenceTask, adding_problem, copy_memory

__all__ = [
    "GateTerms",
    "GradientContributions",
    "GradientFlow",
    "OutputGatedGRU",
    "RecurrentJacobians",
    "SequenceTask",
    "adding_problem",
    "copy_memory",
    "gate_terms",
    "gradient_contributions",
    "gradient_flow",
    "plot_gradient_flow",
    "recurrent_init_",
    "recurrent_jacobians",
]
