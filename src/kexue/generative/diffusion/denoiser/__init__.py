"""Denoisers: whatever estimates the clean data from a noisy state.

    x_t = ᾱ_t x̂_0 + β̄_t ε̂

A denoiser has a `schedule` and a `predict`; its `Prediction` holds x̂_0 and ε̂, so that no sampler,
loss or bound has to know how a network is parametrised. `NetworkDenoiser` makes one of a network,
`GaussianMixtureDenoiser` is exact for a mixture of Gaussians.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2202.00512 (v-prediction).
"""

from kexue.generative.diffusion.denoiser.mixture import GaussianMixtureDenoiser
from kexue.generative.diffusion.denoiser.network import NetworkDenoiser
from kexue.generative.diffusion.denoiser.prediction import Denoiser, Prediction

__all__ = ["Denoiser", "GaussianMixtureDenoiser", "NetworkDenoiser", "Prediction"]
