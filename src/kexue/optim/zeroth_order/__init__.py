r"""Training with function values alone: gradients from random directions, and seeds for memory.

.. math::
    \tilde g = \mathbb{E}_u \Bigl[ \frac{f(x + \varepsilon u) - f(x - \varepsilon u)}{2\varepsilon}
    \, u \Bigr], \qquad \mathbb{E}\,u = 0, \quad \mathbb{E}\,u u^\top = I .

For normal u this is exactly the gradient of the smoothed function
:math:`f_\varepsilon(x) = \mathbb{E} f(x + \varepsilon u)`, at any ε and also where f is a
staircase: accuracy, BLEU, the answer of a service. :func:`zeroth_order_gradient` estimates it, with
a standard error. :class:`ZerothOrderSGD` descends along it in the memory of inference: a direction
is a seed, drawn again whenever it is needed. Hence a run is a list of seeds and coefficients, which
:func:`replay` repeats bit for bit, and replicas stay identical by exchanging a few scalars.

References
----------
Su Jianlin, "殊途同归的策略梯度与零阶优化", https://kexue.fm/archives/7737. Salimans et al.,
arXiv 1703.03864: evolution strategies. Malladi et al., arXiv 2305.17333: MeZO.

Examples
--------
>>> import torch
>>> weight = torch.nn.Parameter(torch.zeros(3))
>>> optimizer = ZerothOrderSGD([weight], lr=0.3, epsilon=0.5, directions=20)
>>> for _ in range(50):
...     loss = optimizer.step(lambda: (weight.round() - 2).abs().sum())
>>> weight.detach().round()
tensor([2., 2., 2.])
"""

from kexue.optim.zeroth_order.estimate import ZerothOrderEstimate, zeroth_order_gradient
from kexue.optim.zeroth_order.optimizer import ZerothOrderSGD
from kexue.optim.zeroth_order.trajectory import StepRecord, replay

__all__ = [
    "StepRecord",
    "ZerothOrderEstimate",
    "ZerothOrderSGD",
    "replay",
    "zeroth_order_gradient",
]
