r"""Residual blocks whose updates stay of one size at any depth, and the measurement that shows it.

N layers that all move at once change the loss N times as much as one does, however tame each
gradient is. A residual branch of scale :math:`\varepsilon` scales its gradients, too:

.. math::
    y = x + \varepsilon F(x;\theta), \qquad
    \frac{\partial L}{\partial \theta} = \varepsilon\, \frac{\partial L}{\partial y}
    \frac{\partial F}{\partial \theta}, \qquad \varepsilon = N^{-1/2}.

:class:`Residual` is the block, :func:`deepnorm_coefficients` and :func:`depth_scaling` give its
weights, :func:`deepnorm_init_` the start. :func:`measure_update` says of any model how far one step
moves its loss and which parameters move it.

Source: https://kexue.fm/archives/8994 (为什么需要残差？一个来自DeepNet的视角),
https://arxiv.org/abs/2203.00555 (DeepNet).
"""

from kexue.nn.residual.block import Residual
from kexue.nn.residual.initialization import deepnorm_init_, depth_parameter_groups
from kexue.nn.residual.magnitude import magnitude, magnitude_gradient
from kexue.nn.residual.scaling import (
    DeepNormCoefficients,
    DepthScaling,
    deepnorm_coefficients,
    depth_scaling,
    residual_gain,
)
from kexue.nn.residual.update import (
    ParameterUpdate,
    PowerLawFit,
    UpdateReport,
    fit_power_law,
    measure_update,
)

__all__ = [
    "DeepNormCoefficients",
    "DepthScaling",
    "ParameterUpdate",
    "PowerLawFit",
    "Residual",
    "UpdateReport",
    "deepnorm_coefficients",
    "deepnorm_init_",
    "depth_parameter_groups",
    "depth_scaling",
    "fit_power_law",
    "magnitude",
    "magnitude_gradient",
    "measure_update",
    "residual_gain",
]
