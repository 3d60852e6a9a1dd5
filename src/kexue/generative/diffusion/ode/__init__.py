"""The deterministic flow of a diffusion model: few-step sampling, encoding and exact likelihoods.

    dy/dσ = ε̂ = (y − x̂_0)/σ,    y = x/ᾱ,  σ = β̄/ᾱ
    dr/dφ = cos φ ε̂ − sin φ x̂_0,    r = y cos φ,  φ = arctan σ
    log p(x_start) = log N(x_T; 0, prior_scale² I) + d (log ᾱ_T − log ᾱ_start) + ∫ ∇_y·ε̂ dσ

Every schedule has the same flow in y and σ. σ is unbounded, φ is not: at equal steps a likelihood
along the angle is tens of times more accurate. What is computed is the density of the data *noised
to the start*, up to two errors: that of the solver, which repeating with doubled steps shows, and
that of taking N(0, prior_scale² I) for the law of x_T, which is of first order in the mean of the
data times ᾱ_T/β̄_T and of second order where that is 0.

Source: https://spaces.ac.cn (生成扩散模型漫谈, 12), https://arxiv.org/abs/2011.13456,
https://arxiv.org/abs/1810.01367 (log-density along a flow), https://arxiv.org/abs/2206.00364
(Heun, grids), https://arxiv.org/abs/2211.01095 (DPM-Solver++).
"""

from kexue.generative.diffusion.ode.flow import (
    angle_velocity,
    continuity_residual,
    divergence,
    heat_velocity,
)
from kexue.generative.diffusion.ode.latents import interpolate_latents
from kexue.generative.diffusion.ode.likelihood import LogLikelihood, log_likelihood
from kexue.generative.diffusion.ode.solve import decode, encode, solve_ode

__all__ = [
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
]
