r"""Rotary position embedding in one, two and N dimensions, in both feature layouts.

Queries and keys are rotated plane by plane, plane k at position :math:`p \in \mathbb{R}^N` by the
angle :math:`F_k \cdot p`; their inner products then depend on differences of positions only:

.. math::
    R_a^\top R_b = R_{b-a}, \qquad R_p = \exp\Bigl(\sum_a p_a B_a\Bigr).

:class:`RotaryEmbedding` is what attention uses: any number of axes, ``interleaved`` or ``half``
layout, angles in double precision. :func:`convert_rotary_projection` moves a checkpoint from one
layout to the other. :func:`rotary_generators`, :func:`rotary_matrix` and
:func:`decompose_rotary_generators` are the theory: every encoding of this family is a table F of
frequencies, up to one orthogonal matrix.

References
----------
Su Jianlin, "Transformer升级之路:4、二维位置的旋转式位置编码": two dimensions. Su et al., RoFormer,
arXiv 2104.09864: one. Heo et al., arXiv 2403.13298: mixed frequencies for vision.

Examples
--------
>>> import torch
>>> rope = RotaryEmbedding(8, axes=2)
>>> query, key = torch.randn(2, 6, 8).unbind()
>>> query, key = rope(query, key, positions=grid_positions(2, 3))
"""

from kexue.nn.rotary.embedding import RotaryEmbedding, grid_positions, rotary_frequencies
from kexue.nn.rotary.generators import (
    RotaryDecomposition,
    decompose_rotary_generators,
    rotary_generators,
    rotary_matrix,
)
from kexue.nn.rotary.layout import convert_rotary_projection, rotary_permutation
from kexue.nn.rotary.rotation import apply_rotary

__all__ = [
    "RotaryDecomposition",
    "RotaryEmbedding",
    "apply_rotary",
    "convert_rotary_projection",
    "decompose_rotary_generators",
    "grid_positions",
    "rotary_frequencies",
    "rotary_generators",
    "rotary_matrix",
    "rotary_permutation",
]
