r"""Multi-head attention with a free key size, talking heads, and one interface for every core.

Head :math:`i` of ordinary attention is

.. math::
    P_i = \operatorname{softmax}(s\, Q_i K_i^\top + M), \qquad O_i = P_i V_i, \qquad
    O = [O_1, \dots, O_h]\, W_O .

Only queries and keys have to share a size, so the key size is free: a small one bounds the rank of
the logits and with it the distributions that a head can express. :class:`MultiHeadAttention` takes
all four sizes separately. :class:`TalkingHeadsAttention` mixes the logits of the heads before the
softmax and their weights after it,

.. math::
    J_i = \sum_g A_{ig}\, s\, Q_g K_g^\top, \qquad W_i = \operatorname{softmax}(J_i + M), \qquad
    O_v = \sum_i B_{vi} W_i V_v .

:func:`minimum_key_dim` tells which key size given attention weights need, and
:func:`factor_attention_weights` finds the queries and keys.

A *core* is what stands between the projections: a module with ``forward(query, key, value, *,
mask=None, is_causal=False, scale=None, need_weights=False)`` on split heads, with ``cache=`` where
it keeps a state of its own. Masks have one polarity everywhere: True may attend.

References
----------
Su Jianlin, "突破瓶颈，打造更强大的Transformer". Bhojanapalli et al., arXiv 2002.07028: the
bottleneck. Shazeer et al., arXiv 2003.02436: talking heads.

Examples
--------
>>> import torch
>>> attention = MultiHeadAttention(128, 8, key_dim=64)
>>> output, _ = attention(torch.randn(2, 10, 128), is_causal=True)
>>> output.shape
torch.Size([2, 10, 128])
"""

from kexue.nn.attention.cache import KeyValueCache
from kexue.nn.attention.cores import AttentionOutput, DotProductAttention, TalkingHeadsAttention
from kexue.nn.attention.multi_head import MultiHeadAttention
from kexue.nn.attention.rank import factor_attention_weights, minimum_key_dim

__all__ = [
    "AttentionOutput",
    "DotProductAttention",
    "KeyValueCache",
    "MultiHeadAttention",
    "TalkingHeadsAttention",
    "factor_attention_weights",
    "minimum_key_dim",
]
