r"""Initialisation that keeps the signal: matrices, gains, samplers, whole models, and an audit.

One idea: a layer should not change the length of what passes through it. :func:`orthogonal_` draws
matrices that do this exactly, :func:`delta_orthogonal_` and :func:`convolution_orthogonal_`
kernels. :func:`activation_gain` makes up for any activation, and :func:`layer_growth` says what
becomes of signal and gradient. :func:`gram_error` and :func:`expected_gram_error` say how near to
orthogonal a random matrix is, :func:`singular_value_range` how far it still is as an operator.
:func:`variance_scaling_` and :func:`transformer_init_` draw weights by the usual schemes,
:func:`ntk_parametrize` and :class:`GradualResidual` change what is trained, and
:func:`audit_signal` says where a model loses its signal.

Source: https://kexue.fm/archives/7180 (从几何视角来理解模型参数的初始化策略),
https://kexue.fm/archives/8620 (浅谈Transformer的初始化、参数化与标准化).

Examples
--------
>>> from torch import nn
>>> layer = nn.Linear(64, 256)
>>> _ = orthogonal_(layer.weight, activation_gain("gelu"))
"""

from kexue.nn.init.activation import StandardizedActivation
from kexue.nn.init.gram import (
    SingularValueRange,
    expected_gram_error,
    gram_error,
    singular_value_range,
)
from kexue.nn.init.model import transformer_init_
from kexue.nn.init.moments import (
    ActivationMoments,
    LayerGrowth,
    activation_gain,
    activation_moments,
    layer_growth,
)
from kexue.nn.init.ntk import NTKParametrization, ntk_parametrize
from kexue.nn.init.orthogonal import convolution_orthogonal_, delta_orthogonal_, orthogonal_
from kexue.nn.init.ramp import GradualResidual, advance_ramps
from kexue.nn.init.sampling import (
    TruncatedNormalMoments,
    truncated_normal_,
    truncated_normal_moments,
    variance_scaling_,
)
from kexue.nn.init.signal import (
    SignalRecord,
    SignalReport,
    SoftmaxSaturation,
    audit_signal,
    softmax_saturation,
)

__all__ = [
    "ActivationMoments",
    "GradualResidual",
    "LayerGrowth",
    "NTKParametrization",
    "SignalRecord",
    "SignalReport",
    "SingularValueRange",
    "SoftmaxSaturation",
    "StandardizedActivation",
    "TruncatedNormalMoments",
    "activation_gain",
    "activation_moments",
    "advance_ramps",
    "audit_signal",
    "convolution_orthogonal_",
    "delta_orthogonal_",
    "expected_gram_error",
    "gram_error",
    "layer_growth",
    "ntk_parametrize",
    "orthogonal_",
    "singular_value_range",
    "softmax_saturation",
    "transformer_init_",
    "truncated_normal_",
    "truncated_normal_moments",
    "variance_scaling_",
]
