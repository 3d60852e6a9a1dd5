"""The variance of clean data given a noisy state, which decides how good few steps can be.

    x_s | x_t ~ N(κ x_t + λ x̂_0, σ² + λ² Var[x_0 | x_t])

x̂_0 is an estimate, and what is left of x_0 around it has a variance of its own, even for η = 0.
`estimate_clean_variance` reads a table of it off any trained denoiser; `NoiseResidualVariance` and
`SquaredNoiseVariance` learn it per sample and entry; `JacobianVariance` differentiates the denoiser
instead. All of them are callables ``(x, time, prediction, condition=None) -> Tensor`` for
`sample`, `reverse_transition` and `variational_bound`. `optimal_times` spends a table on a better
grid, `AnalyticVarianceScheduler` on an existing diffusers pipeline.

Source: https://arxiv.org/abs/2201.06503 (Analytic-DPM), https://arxiv.org/abs/2206.07309 (SN, NPR),
https://arxiv.org/abs/2106.03802 (optimal grids), https://arxiv.org/abs/2406.10808 (Jacobian).
"""

from kexue.generative.diffusion.variance.clean import (
    PointDataVariance,
    StandardNormalDataVariance,
    TabulatedVariance,
    clip_clean_variance,
)
from kexue.generative.diffusion.variance.estimate import estimate_clean_variance
from kexue.generative.diffusion.variance.grid import OptimalTimes, optimal_times
from kexue.generative.diffusion.variance.heads import (
    NoiseResidualVariance,
    SquaredNoiseVariance,
    variance_loss,
)
from kexue.generative.diffusion.variance.jacobian import JacobianVariance
from kexue.generative.diffusion.variance.scheduler import (
    AnalyticVarianceScheduler,
    SchedulerOutput,
)

__all__ = [
    "AnalyticVarianceScheduler",
    "JacobianVariance",
    "NoiseResidualVariance",
    "OptimalTimes",
    "PointDataVariance",
    "SchedulerOutput",
    "SquaredNoiseVariance",
    "StandardNormalDataVariance",
    "TabulatedVariance",
    "clip_clean_variance",
    "estimate_clean_variance",
    "optimal_times",
    "variance_loss",
]
