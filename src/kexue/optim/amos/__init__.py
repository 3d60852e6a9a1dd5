r"""Amos: one number per parameter sets learning rate, weight decay and their schedules.

The number is the scale :math:`\eta` at which the entries of a parameter are expected to end up.
:class:`Amos` takes it and a global rate :math:`\xi` and decays both its step and its weight decay
by itself; its state is a few numbers per row instead of two per entry. :func:`parameter_scale`
knows the scale of the usual layers, :func:`amos_parameter_groups` that of a whole model.

The same derivation gives rules for any optimiser. A parameter of scale :math:`\sigma` that may move
by the share :math:`\alpha_0` of its own travel in one step wants

.. math::
    \text{lr}_t = \frac{\alpha_0 \sigma}{\text{rms}} f(t), \qquad
    \text{weight decay} = \frac{\alpha_0^2}{2 q\,\text{lr}_0}, \qquad
    f(t) = \frac{1}{1 + t/T} \ \text{or}\ \frac{1}{(1 + (\sqrt2 - 1)\,t/T)^2},

where rms is that of the optimiser's update and weight decay is torch's, which is multiplied by the
rate once more. :func:`relative_scale_groups` sets both, :class:`ScaleDecayLR` is the decay f, which
needs a half-life and no number of steps.

References
----------
Ran Tian and Ankur Parikh, "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards
Model-Oriented Scale", arXiv 2210.11693. Su Jianlin, "基于Amos优化器思想推导出来的一些“炼丹策略”":
the short derivation and the rules for other optimisers.

Examples
--------
>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
>>> batches = 10_000
>>> optimizer = Amos(amos_parameter_groups(model), lr=batches**-0.5)
>>> loss = nn.functional.cross_entropy(model(torch.randn(8, 64)), torch.arange(8))
>>> loss.backward()
>>> optimizer.step()
>>> sum(state["second_moment"].numel() for state in optimizer.state.values())
44
"""

from kexue.optim.amos.optimizer import Amos
from kexue.optim.amos.scale import amos_parameter_groups, parameter_scale, relative_scale_groups
from kexue.optim.amos.schedule import ScaleDecayLR, scale_decay

__all__ = [
    "Amos",
    "ScaleDecayLR",
    "amos_parameter_groups",
    "parameter_scale",
    "relative_scale_groups",
    "scale_decay",
]
