r"""Distances measured along a graph of short steps, for vectors that are trusted only when close.

Vectors trained with positive and negative pairs are close where texts are alike; how far apart they
are where texts differ was never trained. So keep only the short distances, each point's k nearest
neighbours, and measure far ones as the shortest way through this graph:

.. math::
    G(i, j) = \min_{i = a_0, a_1, \dots, a_m = j} \sum_l d(a_l, a_{l+1}),
    \qquad
    G(q, j) = \min_{i \in \mathrm{kNN}(q)} [d(q, i) + G(i, j)]

for points of the graph and for a query, which enters through its own neighbours.
:class:`GeodesicIndex` answers both, takes new points, and finds the k geodesically nearest without
a search of the whole graph; :func:`summarize` picks the sentences that stand for a theme.

Neighbours beyond 5000 points are proposed by faiss (``pip install kexue[faiss]``) where it is
installed, else by scikit-learn; every length is computed from the vectors in double precision.

References
----------
Su Jianlin, "从局部到全局：语义相似度的测地线距离". Chowdhury et al., arXiv 2209.07496: opinion
summaries by approximate geodesics. Tenenbaum, de Silva and Langford (2000): Isomap.

Examples
--------
A hundred points on a circle: opposite ones are half the circumference apart, not a diameter.

>>> import numpy as np
>>> angle = 2 * np.pi * np.arange(100) / 100
>>> circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
>>> index = GeodesicIndex(2, metric="euclidean").fit(circle)
>>> index.distances(indices=[0])[0, 50].round(4)
np.float64(3.1411)
>>> index.path(0, 3)
GeodesicPath(distance=0.18846..., nodes=array([0, 1, 2, 3]))
"""

from kexue.retrieval.geodesic.graph import (
    DisconnectedGraphError,
    geodesic_distances,
    knn_graph,
)
from kexue.retrieval.geodesic.index import GeodesicIndex, summarize
from kexue.retrieval.geodesic.metric import METRICS
from kexue.retrieval.geodesic.search import GeodesicPath, NeighborResult

__all__ = [
    "METRICS",
    "DisconnectedGraphError",
    "GeodesicIndex",
    "GeodesicPath",
    "NeighborResult",
    "geodesic_distances",
    "knn_graph",
    "summarize",
]
