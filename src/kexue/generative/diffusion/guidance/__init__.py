"""Conditional control of diffusion: denoisers that are steered to what is asked for.

    classifier:       ε̃ = ε̂(x_t) − β̄_t γ ∇ log p(y | x_t)
    mean shift:       μ̃ = μ + σ² γ ∇ log p(y | x_t)
    classifier-free:  ε̃ = ε̂(x_t, ∅) + γ (ε̂(x_t, y) − ε̂(x_t, ∅))

`ClassifierGuidance` and `ClassifierFreeGuidance` are denoisers: every sampler, solver and bound
takes them, and they nest. `MeanShiftGuidance` is the first form of the literature, for chains with
noise. `class_log_probability`, `cosine_similarity` and `gram_similarity` are objectives to steer
by; any other function ``(x, time, condition) -> (batch,)`` will do. `drop_condition` prepares a
training for classifier-free guidance.

γ is `scale` everywhere: 0 is unconditional, 1 the condition as it is, more amplifies it. Papers
that write (1 + w) ε̂(x, y) − w ε̂(x, ∅) mean w = γ − 1.

Source: https://arxiv.org/abs/2105.05233 (classifier), https://arxiv.org/abs/2112.05744
(similarity), https://arxiv.org/abs/2207.12598 (classifier-free).
"""

from kexue.generative.diffusion.guidance.classifier import ClassifierGuidance, MeanShiftGuidance
from kexue.generative.diffusion.guidance.classifier_free import (
    ClassifierFreeGuidance,
    drop_condition,
)
from kexue.generative.diffusion.guidance.objectives import (
    class_log_probability,
    cosine_similarity,
    gram_similarity,
)

__all__ = [
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "MeanShiftGuidance",
    "class_log_probability",
    "cosine_similarity",
    "drop_condition",
    "gram_similarity",
]
