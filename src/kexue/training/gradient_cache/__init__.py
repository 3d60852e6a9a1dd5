r"""Exact gradients of a large contrastive batch with the activations of one chunk in memory.

A contrastive loss is no sum over samples, so gradients of small batches do not add up to that of a
large one. But by the chain rule

.. math::
    \nabla_\theta L = \nabla_\theta \sum_i \langle h_i, \tilde h_i \rangle, \qquad
    \tilde h_i = \frac{\partial L}{\partial h_i} \text{ held constant},

which is a sum over samples. So: encode all chunks without a graph, differentiate the loss with
respect to the representations h, encode each chunk once more and send its part of
:math:`\tilde h` back through it. That costs one forward pass more than a plain step.

:class:`GradientCache` does this for any encoders and any loss; :func:`chunked_encode` is one line
for losses written by hand. Layers that mix the samples of a batch, batch normalisation above all,
are outside of the theorem.

References
----------
Su Jianlin, "对比学习可以使用梯度累积吗？". Gao, Zhang, Han and Callan, arXiv 2101.06983: GradCache.
"""

from kexue.losses.contrastive import info_nce, label_vectors, nt_xent
from kexue.training.gradient_cache.batches import split_batch
from kexue.training.gradient_cache.step import GradientCache, GradientCacheOutput, chunked_encode

__all__ = [
    "GradientCache",
    "GradientCacheOutput",
    "chunked_encode",
    "info_nce",
    "label_vectors",
    "nt_xent",
    "split_batch",
]
