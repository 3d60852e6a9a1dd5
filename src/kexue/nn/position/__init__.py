"""Absolute positions of a Transformer: codes of any length, and positions that train for it.

    sinusoidal    p_t = (sin ω_0 t, cos ω_0 t, sin ω_1 t, …),    ω_i = 10000^(-2i/d)
    hierarchical  q_{in + j} = p_j + α/(1-α) (p_i - p_0)    from a trained table p of n rows
    randomised    training on random positions that already cover the lengths at test

Source: https://arxiv.org/abs/1706.03762; the articles are named in the modules.
"""

from kexue.nn.position.extension import extend_position_embeddings
from kexue.nn.position.hierarchical import (
    HierarchicalPositionEmbedding,
    hierarchical_position_embedding,
)
from kexue.nn.position.randomized import (
    equal_mean_positions,
    evenly_spaced_positions,
    log_length_factor,
    random_positions,
)
from kexue.nn.position.sinusoidal import (
    NoPosition,
    SinusoidalPositionEmbedding,
    sinusoidal_position_embedding,
)

__all__ = [
    "HierarchicalPositionEmbedding",
    "NoPosition",
    "SinusoidalPositionEmbedding",
    "equal_mean_positions",
    "evenly_spaced_positions",
    "extend_position_embeddings",
    "hierarchical_position_embedding",
    "log_length_factor",
    "random_positions",
    "sinusoidal_position_embedding",
]
