r"""The exact law of the angle between two random vectors, and tests of near-orthogonality.

Two vectors in :math:`\mathbb{R}^n`, one of them without a preferred direction, enclose an angle
:math:`\theta` with cosine :math:`\eta = \cos\theta` distributed as

.. math::
    p_n(\theta) = C_n \sin^{n-2}\theta, \qquad
    p_n(\eta) = C_n (1 - \eta^2)^{(n-3)/2}, \qquad
    C_n = \frac{\Gamma(n/2)}{\Gamma((n-1)/2)\sqrt{\pi}}.

:class:`RandomAngle` and :class:`RandomCosine` give these laws for any dimension from 2 to 1e9, with
relative accuracy in both tails. :func:`max_cosine_quantile` and :func:`max_vectors` say what is
still chance among many directions; :func:`cosine_summary` and :func:`orthogonality_test` look at
the directions at hand.

References
----------
Su Jianlin, "n维空间下两个随机向量的夹角分布": the law of the angle. Cai, Fan and Jiang, arXiv
1306.0256: all pairs and their extremes. Mardia and Jupp, *Directional Statistics*, sections 10.4
and 10.7: the modified Rayleigh statistic and Bingham's test.

Examples
--------
>>> round(RandomCosine(768).isf(0.001), 3)
np.float64(0.111)
"""

from kexue.stats.angles.law import RandomAngle, RandomCosine
from kexue.stats.angles.pairs import (
    CosineSummary,
    OrthogonalityTestResult,
    cosine_summary,
    max_cosine_quantile,
    max_vectors,
    orthogonality_test,
)

__all__ = [
    "CosineSummary",
    "OrthogonalityTestResult",
    "RandomAngle",
    "RandomCosine",
    "cosine_summary",
    "max_cosine_quantile",
    "max_vectors",
    "orthogonality_test",
]
