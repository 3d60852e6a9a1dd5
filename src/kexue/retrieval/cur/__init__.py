r"""Top-k retrieval by an expensive pair scorer, with a fixed number of calls a query.

A scorer s(query, item) that reads both together, such as a cross-encoder, allows no cached vectors:
exact search scores every item anew. :class:`CURIndex` scores a few *anchor queries* V against all
items once, H = s(V, items). A new query is scored against a few *anchor items* U only, and the rest
is predicted by a CUR decomposition of the matrix of all scores (:mod:`kexue.linalg.cur`),

.. math::
    s(q, \cdot) \approx e\, W^+ H, \qquad e = s(q, U), \quad W = H_{:, U},

the combination of anchor queries that scores the anchor items as q does. The items predicted best
are scored exactly, and become anchor items themselves if there are several rounds. Nothing is
trained, and any callable will do as scorer.

References
----------
Su Jianlin, "利用CUR分解加速交互式相似度模型的检索". Yadav et al., arXiv 2210.12579: one round
(ANNCUR). Yadav et al., arXiv 2305.02996: several rounds (ADACUR).

Examples
--------
A hundred numbers, a scorer that prefers close ones, and 20 calls instead of a hundred:

>>> def closeness(pairs):
...     return [-((query - item) ** 2) for query, item in pairs]
>>> index = CURIndex(closeness, [float(i) for i in range(100)], anchor_queries=[5.0, 30.0, 80.0])
>>> found = index.build().search(41.3, k=3, budget=20)
>>> found.indices, found.n_calls
(array([41, 42, 40]), 20)
"""

from kexue.retrieval.cur.index import CURIndex, SearchResult
from kexue.retrieval.cur.scoring import Scorer
from kexue.retrieval.cur.storage import stored_shape

__all__ = ["CURIndex", "Scorer", "SearchResult", "stored_shape"]
