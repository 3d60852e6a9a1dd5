r"""TeaForN: teacher forcing with n-grams, for decoders that look further than the next token.

A decoder is an embedding :math:`e_t = E(w_t)`, a causal body M and a projection to logits. It reads
:math:`w_0 \ldots w_{L-1}` and is asked for :math:`w_1 \ldots w_L`. Teacher forcing runs it once;
here it runs N times over the whole sequence, each time on what the pass before gave:

.. math::
    h^1 = M(e_0, e_1, \ldots, e_{L-1}), \qquad
    h^i = M(e_0, \varphi(h^{i-1}_1), \ldots, \varphi(h^{i-1}_{L-1})), \qquad
    \mathcal L = \sum_{i=1}^N \lambda_i \operatorname{mean}_t \bigl(-\log p^i_t[w_t]\bigr).

:math:`h^i_t` has seen the true tokens up to :math:`w_{t-i}` only, so that one vector must carry
what i predictions need. N = 1 is teacher forcing; from N = L on, the last pass is the roll-out that
feeds :math:`\varphi(h)` back step by step. Decoding remains what it was.

References
----------
Goodman, Ding and Soricut, "TeaForN: Teacher-Forcing with N-grams", arXiv 2010.03494. Su Jianlin,
"TeaForN：让Teacher Forcing更有“远见”一些", whose layout is the default here.

Examples
--------
>>> import torch
>>> from torch import nn
>>> embedding, gru, head = nn.Embedding(10, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 10)
>>> tokens = torch.randint(10, (4, 7))
>>> out = teaforn_loss(
...     lambda e: gru(e)[0], head, embedding(tokens[:, :-1]), tokens[:, 1:], n_grams=3
... )
>>> out.step_losses.shape
torch.Size([3])
>>> out.loss.backward()
"""

from kexue.training.teaforn.approximation import soft_embedding
from kexue.training.teaforn.causal_lm import causal_lm_parts
from kexue.training.teaforn.loss import TeaForNOutput, step_weights, teaforn_loss

__all__ = ["TeaForNOutput", "causal_lm_parts", "soft_embedding", "step_weights", "teaforn_loss"]
