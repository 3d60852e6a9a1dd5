"""Guidance against bare network calls, and its combination against the guider of diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import compare
from kexue.generative.diffusion import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscreteSchedule,
    NetworkDenoiser,
    Prediction,
    class_log_probability,
)
from kexue.models import MLPDenoiser

CLASSES = 10
SCALE = 2.5
TIME = 400.0


def main() -> None:
    torch.manual_seed(0)
    free_guidance()
    classifier_guidance()
    against_diffusers()


@torch.no_grad()
def free_guidance() -> None:
    """Time one doubled call against its floor, against two calls, and one branch alone."""
    denoiser = _denoiser(num_classes=CLASSES)
    x, labels = torch.randn(64, 64), torch.arange(64) % CLASSES
    null = torch.full_like(labels, CLASSES)
    doubled, both = torch.cat([x, x]), torch.cat([labels, null])
    guided = ClassifierFreeGuidance(denoiser, scale=SCALE, null_condition=CLASSES)
    what = "MLP of width 256, batch 64"
    compare(
        f"{what}: guided, over one call at the doubled batch",
        lambda: guided.predict(x, TIME, condition=labels),
        lambda: denoiser.predict(doubled, TIME, condition=both),
        agree=None,
        target=1 / 1.1,
        repeats=25,
    )

    def separate() -> Tensor:
        one = denoiser.predict(x, TIME, condition=labels).epsilon
        other = denoiser.predict(x, TIME, condition=null).epsilon
        return other + SCALE * (one - other)

    compare(
        f"{what}: guided, against two separate calls",
        lambda: guided.predict(x, TIME, condition=labels),
        separate,
        agree=1e-5,
        target=1.3,
        value=_epsilon,
        repeats=25,
    )
    for scale, condition in ((1.0, labels), (0.0, null)):
        alone = ClassifierFreeGuidance(denoiser, scale=scale, null_condition=CLASSES)
        compare(
            f"{what}: scale {scale:g}, over the one branch it needs",
            lambda alone=alone: alone.predict(x, TIME, condition=labels),
            lambda condition=condition: denoiser.predict(x, TIME, condition=condition),
            agree=1e-6,
            target=1 / 1.05,
            value=_epsilon,
            repeats=25,
        )


def classifier_guidance() -> None:
    """Time guidance over the bare forward and backward pass of denoiser and classifier."""
    denoiser = _denoiser()
    network = MLPDenoiser(64, hidden=128, output_features=CLASSES).eval().requires_grad_(False)
    x, labels = torch.randn(256, 64), torch.arange(256) % CLASSES
    times = torch.full((256,), TIME)
    objective = class_log_probability(network)

    def bare() -> Tensor:
        with torch.no_grad():
            prediction = denoiser.predict(x, TIME)
        at = x.detach().requires_grad_()
        chosen = torch.log_softmax(network(at, times), -1).gather(1, labels[:, None])
        (gradient,) = torch.autograd.grad(chosen.sum(), at)
        return prediction.epsilon - prediction.noise_scale * SCALE * gradient

    guided = ClassifierGuidance(denoiser, objective, scale=SCALE)
    compare(
        "256×64: classifier guidance, over a bare forward and backward pass",
        lambda: guided.predict(x, TIME, condition=labels),
        bare,
        agree=1e-5,
        value=_epsilon,
    )

    def bare_through() -> Tensor:
        at = x.detach().requires_grad_()
        prediction = denoiser.predict(at, TIME)
        chosen = torch.log_softmax(network(prediction.sample, 0 * times), -1)
        (gradient,) = torch.autograd.grad(chosen.gather(1, labels[:, None]).sum(), at)
        return prediction.epsilon.detach() - prediction.noise_scale * SCALE * gradient

    through = ClassifierGuidance(denoiser, objective, scale=SCALE, evaluate_at="denoised")
    compare(
        "256×64: the same through the denoiser",
        lambda: through.predict(x, TIME, condition=labels),
        bare_through,
        agree=1e-5,
        value=_epsilon,
    )


@torch.no_grad()
def against_diffusers() -> None:
    """Compare what is left when the network costs nothing: preparing and combining the branches.

    Ours hands out clean data and noise, the guider noise only: the scheduler behind it still has
    to turn one into the other.
    """
    try:
        from diffusers.guiders import ClassifierFreeGuidance as Guider
    except ImportError:
        print("diffusers.guiders is not installed: its combination is not compared")
        return
    timestep = torch.tensor(TIME)
    for shape in ((64, 64), (4, 4, 64, 64)):
        x = torch.randn(shape)
        branches = [torch.randn(shape) for _ in range(4)]
        known = _Known(*branches)
        batch = len(x)
        labels, null = torch.zeros(batch, dtype=torch.long), torch.ones(batch, dtype=torch.long)
        guided = ClassifierFreeGuidance(known, scale=SCALE, null_condition=1, batched=False)
        guider = Guider(guidance_scale=SCALE)

        def combined(
            guider: Guider = guider,
            known: _Known = known,
            x: Tensor = x,
            conditions: tuple[Tensor, Tensor] = (labels, null),
        ) -> Tensor:
            guider.set_state(step=0, num_inference_steps=50, timestep=timestep)
            states = guider.prepare_inputs({"condition": conditions})
            for state in states:
                state.noise_pred = known.predict(x, TIME, condition=state.condition).epsilon
            return guider(states).pred

        def read(combined: Callable[[], Tensor] = combined, x: Tensor = x) -> tuple[Tensor, Tensor]:
            epsilon = combined()
            return (x - 0.8 * epsilon) / 0.6, epsilon

        def ours(
            guided: ClassifierFreeGuidance = guided, x: Tensor = x, labels: Tensor = labels
        ) -> Prediction:
            return guided.predict(x, TIME, condition=labels)

        what = f"{'×'.join(map(str, shape))}: both branches prepared and combined"
        compare(
            f"{what}, against the guider of diffusers",
            ours,
            combined,
            agree=1e-5,
            target=2.0,
            value=_epsilon,
            repeats=25,
        )
        compare(
            f"{what}, against the guider and x̂_0 from its noise",
            ours,
            read,
            agree=1e-5,
            value=_epsilon,
            repeats=25,
        )


class _Known:
    """A denoiser whose two predictions are known beforehand."""

    def __init__(self, *parts: Tensor) -> None:
        self.schedule = DiscreteSchedule.cosine()
        one = torch.ones((), dtype=torch.float64)
        self.first = Prediction(parts[0], parts[1], one, one)
        self.second = Prediction(parts[2], parts[3], one, one)

    def predict(self, x: Tensor, time: float, *, condition: Tensor) -> Prediction:
        self.first, self.second = self.second, self.first
        return self.second


def _denoiser(num_classes: int | None = None) -> NetworkDenoiser:
    network = MLPDenoiser(64, hidden=256, depth=3, num_classes=num_classes)
    return NetworkDenoiser(
        network.eval().requires_grad_(False),
        DiscreteSchedule.cosine(),
        prediction_type="v_prediction",
    )


def _epsilon(result: Prediction | Tensor | tuple[Tensor, Tensor]) -> object:
    if isinstance(result, Prediction):
        result = result.epsilon
    return (result[1] if isinstance(result, tuple) else result).numpy()


if __name__ == "__main__":
    main()
