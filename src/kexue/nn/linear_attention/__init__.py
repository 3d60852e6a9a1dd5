r"""Attention in linear time: positive random features of the softmax kernel, and their machinery.

Linear attention replaces :math:`e^{q_i \cdot k_j}` by :math:`\phi(q_i) \cdot \phi(k_j)` with
:math:`\phi > 0`, so that sums over keys are computed once for all queries,

.. math::
    o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)} .

Performer takes random features whose inner product is the softmax kernel in expectation,

.. math::
    e^{q \cdot k} = \mathbb E_{w \sim N(0, I)}\big[
        e^{w \cdot q - |q|^2/2}\, e^{w \cdot k - |k|^2/2} \big].

:class:`PerformerAttention` and :class:`LinearAttention` are cores of
:class:`~kexue.nn.attention.MultiHeadAttention`; :func:`replace_attention` puts them into a trained
model, and :func:`softmax_kernel_variance` tells beforehand how many features that needs. There is
no attention matrix: weights, additive biases and masks that depend on the query are impossible.
Rotary positions work, since they act on queries and keys.

The number of features has to exceed the key size, usually several times, so short sequences get
slower; the crossing with softmax attention lies at some thousand tokens. Trained weights reproduce
their results only after some fine-tuning.

References
----------
Su Jianlin, "Performer：用随机投影将Attention的复杂度线性化". Choromanski et al., arXiv 2009.14794.
Choromanski et al., arXiv 1703.00864: orthogonal rows. Katharopoulos et al., arXiv 2006.16236.

Examples
--------
>>> import torch
>>> core = PerformerAttention(16, 64)
>>> query, key, value = torch.randn(3, 2, 4, 1000, 16).unbind()
>>> core(query, key, value).output.shape
torch.Size([2, 4, 1000, 16])
"""

from kexue.nn.linear_attention.attention import LinearAttentionState, linear_attention
from kexue.nn.linear_attention.features import RandomFeatures, random_projection
from kexue.nn.linear_attention.performer import LinearAttention, PerformerAttention
from kexue.nn.linear_attention.replace import replace_attention
from kexue.nn.linear_attention.variance import softmax_kernel_variance

__all__ = [
    "LinearAttention",
    "LinearAttentionState",
    "PerformerAttention",
    "RandomFeatures",
    "linear_attention",
    "random_projection",
    "replace_attention",
    "softmax_kernel_variance",
]
