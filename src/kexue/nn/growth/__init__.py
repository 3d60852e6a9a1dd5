r"""A trained Transformer made wider and deeper without a change of its function.

Every activation :math:`x` of the small model becomes :math:`\tilde x = E x` in the large one, where
:math:`E` copies units, scales them, or leaves some empty. A matrix that writes into a space takes
:math:`E` on its output axis; one that reads from it takes a left inverse, :math:`R E = I`:

.. math::
    \tilde W = E_{out} W R_{in}, \qquad \tilde b = E_{out} b
    \qquad\Longrightarrow\qquad \tilde W \tilde x + \tilde b = E_{out}(W x + b) .

:func:`grow_transformer` does this for BERT, GPT-2, Llama, Mistral, Qwen2 and
:class:`~kexue.models.transformer.Transformer`; :func:`expand_state_dict` for any other model, given
a rule for each parameter; :func:`expand_linear` for one layer. Copies receive equal gradients and
stay copies for ever, so :math:`\tilde W` may carry noise :math:`Z` with :math:`Z E_{in} = 0`, which
changes nothing at first and everything later.

References
----------
Su Jianlin, "我们可以无损放大一个Transformer模型吗（一）". Chen, Goodfellow and Shlens, arXiv
1511.05641 (Net2Net). Gesmundo and Maile, arXiv 2308.06103: expansions that preserve the function.
Wang et al., arXiv 2310.07999 (LEMON). Samragh et al., arXiv 2409.12903 (HyperCloning).

Examples
--------
>>> import torch
>>> heads = Expansion.repeat(6, 2, block=3)
>>> heads.source.tolist()
[0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
"""

from kexue.nn.growth.expansion import ExpandedLinear, Expansion, expand_linear
from kexue.nn.growth.rules import ParameterRule, expand_state_dict
from kexue.nn.growth.transformer import GrowthReport, GrowthResult, grow_transformer

__all__ = [
    "ExpandedLinear",
    "Expansion",
    "GrowthReport",
    "GrowthResult",
    "ParameterRule",
    "expand_linear",
    "expand_state_dict",
    "grow_transformer",
]
