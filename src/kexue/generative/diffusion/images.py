"""A denoiser of images: the network that suits their size, its training, and a file for both.

    E ‖v − v̂(ᾱ_t x_0 + β̄_t ε, t)‖²,    v = ᾱ_t ε − β̄_t x_0

A fully connected network sees all pixels of a small image at once and is a hundred times cheaper
than a convolution. It must be wider than the image, though: what does not fit through its narrowest
layer is noise that it cannot take away. Larger images get a U-Net. The weights that are kept are an
average over training.

Source: https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2202.00512 (v-prediction),
https://arxiv.org/abs/2207.12598 (labels dropped in training).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kexue._files import write_whole
from kexue.generative.diffusion.denoiser.network import NetworkDenoiser
from kexue.generative.diffusion.guidance.classifier_free import drop_condition
from kexue.generative.diffusion.schedule.discrete import DiscreteSchedule
from kexue.generative.diffusion.training import denoising_loss
from kexue.models.mlp import MLPDenoiser
from kexue.models.unet import SmallUNet

__all__ = ["ImageDenoiser"]

_FORMAT = "kexue image denoiser 1"
_LARGEST_FLAT_IMAGE = 256
_SCHEDULES: dict[str, Callable[[], DiscreteSchedule]] = {
    "cosine": DiscreteSchedule.cosine,
    "linear": DiscreteSchedule.linear,
}


class ImageDenoiser(NetworkDenoiser):
    """A denoiser of images in [−1, 1] that can be trained, saved and loaded.

    Images of at most 256 numbers get an `MLPDenoiser`, larger ones a `SmallUNet` with as many
    levels, up to three, as their sides can be halved. The network predicts v. States have the shape
    of the images in either case.

    Parameters
    ----------
    event_shape : sequence of three int
        Channels, height and width.
    levels : int
        Number of values that a pixel can have, 256 for ordinary files: it is no property of the
        network, but of the data, and bits per pixel need it.
    num_classes : int, optional
        Number of classes; label ``num_classes`` means "no class".
    hidden, depth : int
        Width and number of blocks of the fully connected network.
    base : int
        Channels of the U-Net's first level.
    schedule : {"cosine", "linear"}
        With 1000 steps.

    Attributes
    ----------
    event_shape : tuple of int
    levels : int
    num_classes : int or None
    convolutional : bool
        Whether the network is a U-Net.

    Raises
    ------
    ValueError
        For shapes or sizes that are none, an unknown schedule, or fewer than two levels.

    Examples
    --------
    >>> images = torch.rand(50, 1, 8, 8) * 2 - 1
    >>> denoiser = ImageDenoiser((1, 8, 8), hidden=16).fit(images, steps=3, batch_size=10)
    >>> denoiser.predict(torch.randn(5, 1, 8, 8), 500).sample.shape
    torch.Size([5, 1, 8, 8])
    """

    network: nn.Module

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        levels: int = 256,
        num_classes: int | None = None,
        hidden: int = 256,
        depth: int = 3,
        base: int = 16,
        schedule: str = "cosine",
    ) -> None:
        shape = tuple(int(size) for size in event_shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"event_shape must be (channels, height, width), each at least 1, got {shape}"
            )
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        if schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")
        network: nn.Module
        self.convolutional = math.prod(shape) > _LARGEST_FLAT_IMAGE
        if not self.convolutional:
            flat = MLPDenoiser(
                math.prod(shape), hidden=hidden, depth=depth, num_classes=num_classes
            )
            network = _OnPixels(flat)
        else:
            channels, height, width = shape
            halvings = next(n for n in (2, 1, 0) if height % 2**n == width % 2**n == 0)
            multipliers = (1, 2, 2)[: halvings + 1]
            network = SmallUNet(
                channels, base=base, multipliers=multipliers, num_classes=num_classes
            )
        super().__init__(network, _SCHEDULES[schedule](), prediction_type="v_prediction")
        self.event_shape = shape
        self.levels = levels
        self.num_classes = num_classes
        self._configuration: dict[str, Any] = {
            "event_shape": shape,
            "levels": levels,
            "num_classes": num_classes,
            "hidden": hidden,
            "depth": depth,
            "base": base,
            "schedule": schedule,
        }

    @property
    def bin_width(self) -> float:
        """Distance of two neighbouring values of a pixel."""
        return 2 / (self.levels - 1)

    def fit(
        self,
        images: Float[Tensor, "examples channels height width"],
        labels: Int64[Tensor, " examples"] | None = None,
        *,
        steps: int,
        batch_size: int | None = None,
        learning_rate: float = 2e-3,
        average: float = 0.995,
        label_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        progress: Callable[[range], Iterable[int]] = iter,
    ) -> ImageDenoiser:
        """Train with Adam and a cosine decay, and keep the moving average of the weights.

        Parameters
        ----------
        images : Tensor, shape (examples, channels, height, width)
            In [−1, 1], on the device of the network.
        labels : Tensor, shape (examples,), optional
            Classes, where the network has any.
        steps, learning_rate : int, float
            Of the training.
        batch_size : int, optional
            Images in a step, drawn with replacement; 32 for a U-Net and 128 otherwise by default.
        average : float
            Decay of the moving average, in [0, 1).
        label_dropout : float
            Probability that an example is shown without its class, which classifier-free guidance
            needs.
        generator : torch.Generator, optional
            Source of randomness, on the device of ``images``.
        progress : callable, optional
            Wraps the range of steps, as tqdm does.

        Returns
        -------
        ImageDenoiser
            Itself, in evaluation mode.

        Raises
        ------
        ValueError
            For images of another shape, no images, labels without classes or of another length,
            and probabilities out of range.
        """
        self._check_images(images, labels)
        if batch_size is None:
            batch_size = 32 if self.convolutional else 128
        if not 0 <= average < 1 or not 0 <= label_dropout <= 1:
            raise ValueError(
                "average must be in [0, 1) and label_dropout in [0, 1], "
                f"got {average} and {label_dropout}"
            )
        if steps < 1 or batch_size < 1:
            raise ValueError(
                f"steps and batch_size must be at least 1, got {steps} and {batch_size}"
            )
        device = images.device
        optimizer = torch.optim.Adam(self.network.parameters(), learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        averaged = torch.optim.swa_utils.AveragedModel(
            self.network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average)
        )
        self.train()
        for _ in progress(range(steps)):
            rows = torch.randint(len(images), (batch_size,), generator=generator, device=device)
            condition = None
            if labels is not None and self.num_classes is not None:
                condition = drop_condition(
                    labels[rows], self.num_classes, probability=label_dropout, generator=generator
                )
            loss = denoising_loss(
                self, images[rows], condition=condition, target="v_prediction", generator=generator
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            averaged.update_parameters(self.network)
        self.network.load_state_dict(averaged.module.state_dict())
        return self.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to one safetensors file, whole or not at all."""
        state = {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}
        about = {"format": _FORMAT, "configuration": json.dumps(self._configuration)}
        write_whole(path, save({k: v.contiguous() for k, v in state.items()}, metadata=about))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImageDenoiser:
        """Read what `save` wrote; in evaluation mode, on the CPU.

        Raises
        ------
        ValueError
            Where the file is damaged or something else.
        """
        try:
            with safe_open(Path(path), framework="pt") as file:
                about = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != _FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}")
            with torch.random.fork_rng(devices=[]):
                denoiser = cls(**json.loads(about["configuration"]))
            denoiser.network.load_state_dict(state)
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} must be a saved ImageDenoiser ({error})") from error
        return denoiser.eval()

    def _check_images(self, images: Tensor, labels: Tensor | None) -> None:
        if not images.is_floating_point() or tuple(images.shape[1:]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            raise ValueError(
                f"images must be real and have shape (examples, {shape}), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if not len(images):
            raise ValueError("images must hold at least one example, got none")
        if labels is None:
            return
        if self.num_classes is None:
            raise ValueError("labels need a denoiser with num_classes, got one without classes")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must have shape ({len(images)},), got {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"labels must lie in [0, {self.num_classes - 1}], "
                f"got {labels.min().item()} to {labels.max().item()}"
            )


class _OnPixels(nn.Module):
    """A network for vectors that takes and gives images."""

    def __init__(self, network: MLPDenoiser) -> None:
        super().__init__()
        self.network = network

    def trunk(self, x: Tensor, time: float | Tensor, condition: Tensor | None = None) -> Tensor:
        return self.network.trunk(x.flatten(1), time, condition)

    def forward(self, x: Tensor, time: float | Tensor, condition: Tensor | None = None) -> Tensor:
        return self.network(x.flatten(1), time, condition).reshape(x.shape)
