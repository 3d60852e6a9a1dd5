"""What the studies of diffusion share: a mixture whose score is known, and a trained denoiser."""

from __future__ import annotations

import torch

from kexue.generative.diffusion import GaussianMixtureDenoiser, ImageDenoiser, NoiseSchedule
from kexue.lab import Lab, seeded
from kexue.lab.data import Images


def three_gaussians(schedule: NoiseSchedule) -> GaussianMixtureDenoiser:
    """Return the exact denoiser of three Gaussians in the plane, in float64."""
    return GaussianMixtureDenoiser(
        torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]], dtype=torch.float64),
        torch.tensor(
            [
                [[0.05, 0.02], [0.02, 0.04]],
                [[0.02, 0.0], [0.0, 0.1]],
                [[0.1, -0.03], [-0.03, 0.05]],
            ],
            dtype=torch.float64,
        ),
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        schedule=schedule,
    )


def trained_denoiser(lab: Lab, images: Images, *, num_classes: int | None = None) -> ImageDenoiser:
    """Train on the cosine schedule, or take up what an earlier run trained; keep it with the run.

    With classes, a label is dropped with probability 0.2, as guidance without a classifier needs.
    """
    clean, labels = images.train.images.to(lab.device), images.train.labels
    with seeded(lab.seed):
        denoiser = ImageDenoiser(clean.shape[1:], levels=images.levels, num_classes=num_classes)
    denoiser.to(lab.device)
    # A step of a U-Net takes so much longer that it gets fewer.
    steps = lab.pick(smoke=20, quick=600, full=2500)
    if denoiser.convolutional:
        steps = lab.pick(smoke=5, quick=300, full=1500)

    def train() -> None:
        denoiser.fit(
            clean,
            None if num_classes is None or labels is None else labels.to(lab.device),
            steps=steps,
            label_dropout=0.2,
            generator=lab.generator(lab.device),
            progress=lambda steps: lab.progress(steps, "train"),
        )

    lab.trained("denoiser", denoiser.network, train, inputs={"steps": steps})
    denoiser.save(lab.keep("denoiser.safetensors"))
    return denoiser.eval()
