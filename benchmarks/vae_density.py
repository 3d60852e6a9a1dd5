"""Likelihood estimation against pythae's, a training step against Pyro's, and our own overhead.

One thread. Needs the packages pythae and pyro-ppl; what is absent is left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import compare
from kexue.generative.vae import (
    VariationalAutoencoder,
    estimate_log_likelihood,
    vae_loss,
)

PIXELS, HIDDEN, LATENT = 784, 512, 16
POINTS, SAMPLES = 64, 1000
PARTICLES = 8


def main() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        against_pythae()
        against_pyro()
        overhead()
    finally:
        torch.set_num_threads(before)


def new_model() -> VariationalAutoencoder:
    """A hidden layer of 512 units on either side, unit variance: pythae's default."""
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
    decoder = nn.Sequential(
        nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS), nn.Sigmoid()
    )
    return VariationalAutoencoder(encoder, decoder, LATENT, scale=1.0)


def against_pythae() -> None:
    try:
        from pythae.models import VAE, VAEConfig
    except ImportError:
        print("pythae is not installed: its estimate of the log-likelihood is left out")
        return
    ours = new_model()
    theirs = VAE(VAEConfig(input_dim=(PIXELS,), latent_dim=LATENT)).eval()
    with torch.no_grad():
        copy(theirs.encoder.layers[0][0], ours.encoder[0])
        mean, half_log_variance = ours.encoder[2].weight.chunk(2)
        theirs.encoder.embedding.weight.copy_(mean)
        theirs.encoder.log_var.weight.copy_(2 * half_log_variance)
        mean, half_log_variance = ours.encoder[2].bias.chunk(2)
        theirs.encoder.embedding.bias.copy_(mean)
        theirs.encoder.log_var.bias.copy_(2 * half_log_variance)
        copy(theirs.decoder.layers[0][0], ours.decoder[0])
        copy(theirs.decoder.layers[1][0], ours.decoder[2])
    x = torch.rand(POINTS, PIXELS)

    def their_estimate() -> float:
        with torch.no_grad():
            return float(theirs.get_nll(x, n_samples=SAMPLES))

    estimate = estimate_log_likelihood(ours, x, num_samples=SAMPLES)
    error = estimate.standard_error.square().sum().sqrt().item() / POINTS
    difference = their_estimate() - estimate.log_likelihood.mean().item()
    # Both are random; the difference of two such means has √2 times the error of one.
    if not abs(difference) < 6 * math.sqrt(2) * error:
        raise AssertionError(f"estimates differ by {difference:.1e}, their error is {error:.1e}")
    print(f"pythae's mean estimate minus ours: {difference:.1e} nats, standard error {error:.1e}")
    compare(
        f"{POINTS} points × {SAMPLES} samples, against pythae's get_nll",
        lambda: estimate_log_likelihood(ours, x, num_samples=SAMPLES),
        their_estimate,
        agree=None,
        target=2.0,
        repeats=5,
    )


def copy(target: nn.Linear, source: nn.Linear) -> None:
    target.load_state_dict(source.state_dict())


def against_pyro() -> None:
    try:
        import pyro
        from pyro.distributions import Normal
        from pyro.infer import RenyiELBO
    except ImportError:
        print("pyro-ppl is not installed: its training step is left out")
        return
    ours = new_model()
    x = torch.rand(POINTS, PIXELS)

    def model(x: Tensor) -> None:
        pyro.module("decoder", ours.decoder)
        with pyro.plate("data", len(x)):
            prior = Normal(x.new_zeros(len(x), LATENT), x.new_ones(len(x), LATENT))
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", Normal(ours.decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", ours.encoder)
        with pyro.plate("data", len(x)):
            mean, log_deviation = ours.encoder(x).chunk(2, 1)
            pyro.sample("z", Normal(mean, log_deviation.exp()).to_event(1))

    bound = RenyiELBO(alpha=0, num_particles=PARTICLES, vectorize_particles=True)
    parameters = list(ours.parameters())

    def step(theirs: bool) -> np.ndarray:
        # The same draws for both: one normal number for each particle, point and dimension.
        torch.manual_seed(1)
        for parameter in parameters:
            parameter.grad = None
        if theirs:
            loss = bound.loss_and_grads(model, guide, x) / POINTS
            scale = 1 / POINTS
        else:
            value = vae_loss(ours, x, num_samples=PARTICLES)
            value.backward()
            loss, scale = value.item(), 1.0
        # A few entries show whether the gradients agree, and cost nothing.
        samples = [scale * parameter.grad.flatten()[:50].numpy() for parameter in parameters]
        return np.concatenate([[loss / PIXELS], *samples])

    step(True)  # Pyro's first call also counts plates, and draws for it.
    compare(
        f"training step, {POINTS} points × {PARTICLES} samples, against Pyro's RenyiELBO",
        lambda: step(False),
        lambda: step(True),
        agree=1e-4,
        target=1.2,
    )


def overhead() -> None:
    """What the estimate costs beyond the decoder, in the same portions."""
    ours = new_model()
    x = torch.rand(POINTS, PIXELS)
    latent = torch.randn(SAMPLES * POINTS, LATENT)

    @torch.no_grad()
    def bare() -> None:
        for portion in latent.split(1024):
            ours.decoder(portion)

    compare(
        "the whole estimate, against its decoder calls alone",
        lambda: estimate_log_likelihood(ours, x, num_samples=SAMPLES),
        bare,
        agree=None,
        target=1 / 1.25,
        repeats=5,
    )


if __name__ == "__main__":
    main()
