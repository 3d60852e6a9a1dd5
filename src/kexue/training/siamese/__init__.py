r"""SimSiam and BYOL around any encoder, numbers that see a collapse, and the theory behind both.

Positive pairs alone have a trivial optimum, the constant encoder, at which the loss is as good as
it gets. :class:`SimSiam` and :class:`BYOL` train on

.. math::
    \tfrac12 \left( D(h(f(x_1)), f(x_2)) + D(h(f(x_2)), f(x_1)) \right)

with a predictor h and a target f without gradient, or a slow copy of f; :func:`collapse_metrics`
says whether it worked, which the loss cannot. Why it works is seen in one mode of a linear network,
predictor p and encoder s, views of unit covariance and augmentation variance v:

.. math::
    p' = a\,(t - (1+v)\,p s)\,s - w p, \qquad s' = (t - (1+v)\,p s)\,p - w s, \qquad t = s.

:func:`mode_trajectory` follows it, :func:`mode_limit` says where it ends, and
:func:`linear_siamese_flow` does the same for matrices.

References
----------
Su Jianlin, "从动力学角度看优化算法(六)：为什么SimSiam不退化？". Chen and He, arXiv 2011.10566
(SimSiam). Grill et al., arXiv 2006.07733 (BYOL). Tian, Chen and Ganguli, arXiv 2102.06810 (linear
dynamics). Wang and Isola, arXiv 2005.10242 (alignment and uniformity). Roy and Vetterli, *The
effective rank*; Garrido et al., arXiv 2210.02885.

Examples
--------
>>> import torch
>>> _ = torch.manual_seed(0)
>>> model = SimSiam(torch.nn.Linear(8, 4), predictor=prediction_head(4, 2))
>>> x = torch.randn(32, 8)
>>> model(x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)).loss.backward()
>>> collapse_metrics(model.embed(x)).is_collapsed()
False
"""

from kexue.training.siamese.dynamics import (
    ModeLimit,
    ModeTrajectory,
    mode_limit,
    mode_trajectory,
    weight_decay_threshold,
)
from kexue.training.siamese.flow import LinearTrajectory, linear_siamese_flow
from kexue.training.siamese.heads import prediction_head, projection_head
from kexue.training.siamese.loss import negative_cosine_similarity
from kexue.training.siamese.metrics import CollapseMetrics, collapse_metrics
from kexue.training.siamese.model import BYOL, SiameseOutput, SimSiam, cosine_momentum

__all__ = [
    "BYOL",
    "CollapseMetrics",
    "LinearTrajectory",
    "ModeLimit",
    "ModeTrajectory",
    "SiameseOutput",
    "SimSiam",
    "collapse_metrics",
    "cosine_momentum",
    "linear_siamese_flow",
    "mode_limit",
    "mode_trajectory",
    "negative_cosine_similarity",
    "prediction_head",
    "projection_head",
    "weight_decay_threshold",
]
