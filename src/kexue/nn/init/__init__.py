"""Initialisation that keeps the signal: samplers, whole models, parametrisations, and an audit.

Source: https://kexue.fm/archives/8620 (浅谈Transformer的初始化、参数化与标准化),
https://kexue.fm/archives/7180 (从几何视角来理解模型参数的初始化策略).
"""

from kexue.nn.init.model import transformer_init_
from kexue.nn.init.ntk import NTKParametrization, ntk_parametrize
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
    "GradualResidual",
    "NTKParametrization",
    "SignalRecord",
    "SignalReport",
    "SoftmaxSaturation",
    "TruncatedNormalMoments",
    "advance_ramps",
    "audit_signal",
    "ntk_parametrize",
    "softmax_saturation",
    "transformer_init_",
    "truncated_normal_",
    "truncated_normal_moments",
    "variance_scaling_",
]
