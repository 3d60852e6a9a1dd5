r"""Poisson flow: the field of the data's own charges turns far points into data.

Every data point y_i is a charge in the plane z = 0 of a space with D further dimensions, at
distance z from that plane. The field is

    E(x, z) = 1/S(N+D) Σ_i w_i (x − y_i, z) / R_i^{N+D},    R_i² = ‖x − y_i‖² + z²,

and its lines obey dx/dz = (x − m(x, z))/z, where m is the mean of the charges weighted by
w_i R_i^{−(N+D)}: the ideal denoiser. Followed from a far plane down to z = 0, they carry a
multivariate Student t distribution to the data. D = 1 is PFGM; D need not be an integer; for
D = ∞ it is diffusion with Gaussian noise, and z stands for the noise level σ itself (for finite D
it is σ √D).

`field` holds the exact field of finitely many charges, `noise` what is drawn, `training` targets
and losses, `drift` the right-hand sides dx/dz, `solve` sampler and likelihood.

Source: https://arxiv.org/abs/2209.11178 (PFGM), https://arxiv.org/abs/2302.04265 (PFGM++),
https://arxiv.org/abs/2206.00364 (time grids, Heun); Su Jianlin, 生成扩散模型漫谈（十三）.

Examples
--------
>>> import torch
>>> data = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
>>> exact = EmpiricalPoissonField(data)
>>> x = sample(exact, (5, 2), generator=torch.Generator().manual_seed(0))
>>> bool(torch.cdist(x, data).min(dim=1).values.max() < 1e-3)
True
"""

from kexue.generative.poisson_flow.drift import (
    DenoiserDrift,
    EmpiricalPoissonField,
    NormalizedFieldDrift,
    drift_from_normalized,
)
from kexue.generative.poisson_flow.field import (
    PoissonField,
    marginal_log_density,
    poisson_field,
    posterior_mean,
    unit_sphere_area,
)
from kexue.generative.poisson_flow.noise import (
    PerturbedSample,
    perturb,
    prior_log_density,
    sample_prior,
    student_t_noise,
)
from kexue.generative.poisson_flow.solve import LogLikelihood, integrate, log_likelihood, sample
from kexue.generative.poisson_flow.training import (
    FieldTarget,
    PoissonFlowLoss,
    PoissonFlowPlusLoss,
    poisson_target,
)

__all__ = [
    "DenoiserDrift",
    "EmpiricalPoissonField",
    "FieldTarget",
    "LogLikelihood",
    "NormalizedFieldDrift",
    "PerturbedSample",
    "PoissonField",
    "PoissonFlowLoss",
    "PoissonFlowPlusLoss",
    "drift_from_normalized",
    "integrate",
    "log_likelihood",
    "marginal_log_density",
    "perturb",
    "poisson_field",
    "poisson_target",
    "posterior_mean",
    "prior_log_density",
    "sample",
    "sample_prior",
    "student_t_noise",
    "unit_sphere_area",
]
