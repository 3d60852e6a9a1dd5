"""Contract rows of conditional control: kexue.generative.diffusion.guidance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from contract.row import Row

_NOT_FINITE = (
    "states of a sampler are not inspected: it would synchronise the device at every step; "
    "NaN stays in its own row"
)


def _mixture() -> Any:
    from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser

    return GaussianMixtureDenoiser(
        torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.05, 0.1], dtype=torch.float64),
        schedule=DiscreteSchedule.linear(),
        labels=torch.tensor([0, 1]),
    )


def _states(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "x": rng.normal(size=(3, 2)),
        "time": np.array([5.0, 300.0, 900.0]),
        "condition": np.array([0, 1, 1]),
    }


def _both(prediction: Any) -> Any:
    return prediction.sample, prediction.epsilon


def _by_classifier(x: Any, time: Any, condition: Any, evaluate_at: Any = "noisy") -> Any:
    from kexue.generative.diffusion import ClassifierGuidance

    exact = _mixture()
    guided = ClassifierGuidance(exact, exact.class_log_prob, scale=2.7, evaluate_at=evaluate_at)
    return _both(guided.predict(x, time, condition=condition))


def _free(x: Any, time: Any, condition: Any, rescale: float = 0.3) -> Any:
    from kexue.generative.diffusion import ClassifierFreeGuidance

    guided = ClassifierFreeGuidance(_mixture(), scale=2.7, null_condition=-1, rescale=rescale)
    return _both(guided.predict(x, time, condition=condition))


def _free_instance() -> Any:
    from kexue.generative.diffusion import ClassifierFreeGuidance

    return ClassifierFreeGuidance.from_weight(_mixture(), 1.5, null_condition=-1)


def _by_classifier_instance() -> Any:
    from kexue.generative.diffusion import ClassifierGuidance

    exact = _mixture()
    return ClassifierGuidance(exact, exact.class_log_prob)


def _mean_shift(
    x: Any, time: Any, previous_time: Any, mean: Any, condition: Any, expand_at: Any = "mean"
) -> Any:
    from kexue.generative.diffusion import MeanShiftGuidance

    shift = MeanShiftGuidance(_mixture().class_log_prob, scale=2.7, expand_at=expand_at)
    return shift(x, time, previous_time, mean, torch.full_like(x, 0.3), condition)


def _class_log_probability(x: Any, condition: Any, sharpness: float = 1.5) -> Any:
    from kexue.generative.diffusion import class_log_probability

    return class_log_probability(lambda x, time: torch.sin(x), sharpness=sharpness)(
        x, 300.0, condition
    )


def _cosine(x: Any, condition: Any) -> Any:
    from kexue.generative.diffusion import cosine_similarity

    return cosine_similarity(lambda x, time: torch.sin(x))(x, 300.0, condition)


def _gram(x: Any, condition: Any) -> Any:
    from kexue.generative.diffusion import gram_similarity

    return gram_similarity(lambda x, time: torch.sin(x))(x, 300.0, condition)


def _drop(condition: Any, null_condition: Any, probability: float, generator: Any = None) -> Any:
    from kexue.generative.diffusion import drop_condition

    source = torch.Generator().manual_seed(0) if generator is None else generator
    return drop_condition(condition, null_condition, probability=probability, generator=source)


ROWS = [
    Row(
        name="kexue.generative.diffusion.guidance.classifier.ClassifierGuidance",
        make=_states,
        call=_by_classifier,
        arrays=("x",),
        backends=("torch",),
        batched=("x", "time", "condition"),
        differentiable=("x",),
        wrong={
            "an unknown place": lambda given: {**given, "evaluate_at": "clean"},
            "time zero": lambda given: {**given, "time": 0 * given["time"]},
        },
        instance=_by_classifier_instance,
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.guidance.classifier.MeanShiftGuidance",
        make=lambda rng: {
            **_states(rng),
            "previous_time": np.array([0.0, 200.0, 700.0]),
            "mean": rng.normal(size=(3, 2)),
        },
        call=_mean_shift,
        arrays=("x", "mean"),
        backends=("torch",),
        batched=("x", "mean", "time", "previous_time", "condition"),
        differentiable=("x", "mean"),
        wrong={"an unknown place": lambda given: {**given, "expand_at": "clean"}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.guidance.classifier_free.ClassifierFreeGuidance",
        make=_states,
        call=_free,
        arrays=("x",),
        backends=("torch",),
        batched=("x", "time", "condition"),
        differentiable=("x",),
        compiles=True,
        wrong={
            "too much rescaling": lambda given: {**given, "rescale": 1.5},
            "no condition": lambda given: {**given, "condition": None},
            "conditions of another length": lambda g: {**g, "condition": g["condition"][:2]},
        },
        instance=_free_instance,
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.guidance.classifier_free.drop_condition",
        make=lambda rng: {
            "condition": rng.normal(size=(20, 2)),
            "null_condition": 0.0 * rng.normal(size=2),
            "probability": 0.5,
            "generator": None,
        },
        call=_drop,
        arrays=("condition",),
        backends=("torch",),
        batched=("condition",),
        differentiable=("condition",),
        seeded="generator",
        wrong={
            "no probability": lambda given: {**given, "probability": 1.5},
            "another shape": lambda given: {**given, "null_condition": torch.zeros(3)},
        },
        without={
            "batch_equals_loop": "an example alone meets other draws",
            "not_finite_is_refused": "conditions are passed through untouched",
            "wrong_dtype_is_refused": "conditions of any kind can be dropped",
        },
    ),
    Row(
        name="kexue.generative.diffusion.guidance.objectives.class_log_probability",
        make=lambda rng: {"x": rng.normal(size=(3, 4)), "condition": np.array([0, 3, 1])},
        call=_class_log_probability,
        arrays=("x",),
        backends=("torch",),
        batched=("x", "condition"),
        differentiable=("x",),
        wrong={
            "no sharpness": lambda given: {**given, "sharpness": 0.0},
            "an unknown class": lambda given: {**given, "condition": given["condition"] + 2},
            "no labels": lambda given: {**given, "condition": given["x"][:, 0]},
        },
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.guidance.objectives.cosine_similarity",
        make=lambda rng: {"x": rng.normal(size=(3, 4)), "condition": rng.normal(size=(3, 4))},
        call=_cosine,
        arrays=("x", "condition"),
        backends=("torch",),
        batched=("x", "condition"),
        differentiable=("x", "condition"),
        wrong={"another width": lambda given: {**given, "condition": given["condition"][:, :2]}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_dtype_is_refused": "a target is cast to the features; x is refused by hand",
        },
    ),
    Row(
        name="kexue.generative.diffusion.guidance.objectives.gram_similarity",
        make=lambda rng: {"x": rng.normal(size=(3, 4, 5)), "condition": rng.normal(size=(3, 4, 6))},
        call=_gram,
        arrays=("x", "condition"),
        backends=("torch",),
        batched=("x", "condition"),
        differentiable=("x", "condition"),
        wrong={"other channels": lambda given: {**given, "condition": given["condition"][:, :2]}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_dtype_is_refused": "a target is cast to the features; x is refused by hand",
        },
    ),
]
