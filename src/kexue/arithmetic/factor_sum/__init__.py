r"""The smallest a + b + c with N = ab + c: how to lay out N things in a grid and a remainder.

With :math:`p = a + b` and :math:`q = b - a` the sum is

.. math:: 4S = 4N + q^2 + 4 - (p - 2)^2, \qquad 4c = q^2 - (p^2 - 4N) \ge 0,

so that each p has one candidate, the smallest q of p's parity with :math:`c \ge 0`. As S is at
least p, a search over ascending :math:`p \ge \lfloor 2\sqrt N \rfloor` is complete as soon as p
passes the best S: after :math:`2 N^{1/4} + O(1)` candidates at worst, and after about
:math:`1.18\, N^{1/6}` for a random N.

:func:`factor_sum` solves and proves one N of any size, :func:`factor_sum_minimizers` lists every
optimal layout, :func:`factor_sum_bounds` says in closed form where the minimum lies,
:func:`factor_sum_batch` takes arrays of 64-bit integers and :func:`factor_sum_table` all N up to a
limit.

References
----------
Su Jianlin, "自然数集中N = ab + c时a + b + c的最小值", https://kexue.fm/archives/9775: the
parametrisation and the fourth root. T. H. Chan, *Finding almost squares II* and *III*,
arXiv math/0503438 and 0709.2723: how near an integer ab with a and b near its root must lie.

Examples
--------
>>> best = factor_sum(130)
>>> best.a, best.b, best.c, best.total
(10, 13, 0, 23)
"""

from kexue.arithmetic.factor_sum.arrays import (
    FactorSumBatch,
    factor_sum_batch,
    factor_sum_table,
)
from kexue.arithmetic.factor_sum.search import (
    FactorSum,
    FactorSumBounds,
    factor_sum,
    factor_sum_bounds,
    factor_sum_minimizers,
)

__all__ = [
    "FactorSum",
    "FactorSumBatch",
    "FactorSumBounds",
    "factor_sum",
    "factor_sum_batch",
    "factor_sum_bounds",
    "factor_sum_minimizers",
    "factor_sum_table",
]
