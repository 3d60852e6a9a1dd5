"""Noise schedules in float64: how much signal and how much noise there is at a time.

    x_t = ᾱ_t x_0 + β̄_t ε,    ε ~ N(0, I)

`signal_scale` is ᾱ_t, `noise_scale` is β̄_t and `sigma` their ratio. All scales come from the
logarithm of that ratio, which neither rounds β̄_1 to nothing nor loses ᾱ_T. A discrete schedule is
defined at real times too: log sigma is linear between the steps, and sigma(t) = t sigma(1) below 1.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2102.09672 (cosine),
https://arxiv.org/abs/2206.00364 (spacing in σ^{1/ρ}).
"""

from kexue.generative.diffusion.schedule.base import NoiseSchedule
from kexue.generative.diffusion.schedule.continuous import HeatSchedule, VariancePreservingSchedule
from kexue.generative.diffusion.schedule.discrete import DiscreteSchedule

__all__ = ["DiscreteSchedule", "HeatSchedule", "NoiseSchedule", "VariancePreservingSchedule"]
