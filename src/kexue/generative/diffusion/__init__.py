"""Diffusion models: schedules, denoisers, samplers, losses and bounds that all fit together.

Every denoiser works with every schedule, variance, guidance and solver, because they meet in one
protocol (`Denoiser`), one result (`Prediction`) and one object for time (`NoiseSchedule`).

Letters, throughout: x_t = ᾱ_t x_0 + β̄_t ε with ε ~ N(0, I). `signal_scale` is ᾱ_t, `noise_scale` is
β̄_t, `sigma` their ratio β̄_t/ᾱ_t. The literature writes alphas_cumprod for ᾱ_t² and betas for
β_t² = 1 − α_t². Time t = 1…T is noisy and t = 0 is clean data; libraries that count timesteps from
0 mean t − 1.
"""

import pkgutil as _pkgutil

import lazy_loader as _lazy

_NAMES = {
    "schedule": [
        "DiscreteSchedule",
        "HeatSchedule",
        "NoiseSchedule",
        "VariancePreservingSchedule",
    ],
    "denoiser": ["Denoiser", "GaussianMixtureDenoiser", "NetworkDenoiser", "Prediction"],
    "sampling": [
        "Transition",
        "TransitionWeights",
        "reverse_transition",
        "sample",
        "transition_weights",
    ],
    "training": ["denoising_loss", "sample_times"],
    "bound": ["VariationalBound", "variational_bound"],
    "images": ["ImageDenoiser"],
    "variance": [
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
    ],
    "guidance": [
        "ClassifierFreeGuidance",
        "ClassifierGuidance",
        "MeanShiftGuidance",
        "class_log_probability",
        "cosine_similarity",
        "drop_condition",
        "gram_similarity",
    ],
    "ode": [
        "LogLikelihood",
        "angle_velocity",
        "continuity_residual",
        "decode",
        "divergence",
        "encode",
        "heat_velocity",
        "interpolate_latents",
        "log_likelihood",
        "solve_ode",
    ],
}

_present = {m.name for m in _pkgutil.iter_modules(__path__)}

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=sorted(_present),
    submod_attrs={module: names for module, names in _NAMES.items() if module in _present},
)
