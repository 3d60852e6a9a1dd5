r"""Random projections with honest dimensions: Johnson and Lindenstrauss.

A random linear map :math:`A` of shape (n, m) with :math:`E\|Ax\|^2 = \|x\|^2` keeps the squared
distances of N points up to a factor :math:`1 \pm \varepsilon`, all at once and with probability
:math:`1 - \delta` or more, where

.. math::
    \frac{N(N-1)}{2}\, p_n(\varepsilon) \le \delta, \qquad
    p_n(\varepsilon) = P\big(|\chi^2_n / n - 1| > \varepsilon\big).

The dimension m of the points does not occur. :func:`johnson_lindenstrauss_min_dim` solves this for
n, :func:`johnson_lindenstrauss_eps` for ε. Three scikit-learn transformers project: with normal
entries, with sparse signs, and with signs, a fast Walsh-Hadamard transform and sampled coordinates
(SRHT). Their maps are functions of a seed and of the column, the same for numpy arrays, sparse
matrices and torch tensors, so that columns may also arrive in chunks. :func:`distortion` measures
what a projection did to the pairs.

References
----------
Su Jianlin, "让人惊叹的Johnson-Lindenstrauss引理：理论篇". Dasgupta and Gupta 2003. Achlioptas 2003.
Li, Hastie and Church 2006. Tropp, arXiv 1011.1595. Freksen, arXiv 2103.00564.

Examples
--------
>>> johnson_lindenstrauss_min_dim(1_000_000, eps=0.5, failure_probability=0.01)
602
"""

from kexue.stats.projection.bounds import (
    johnson_lindenstrauss_eps,
    johnson_lindenstrauss_min_dim,
    norm_failure_probability,
)
from kexue.stats.projection.hadamard import hadamard_transform
from kexue.stats.projection.maps import (
    GaussianRandomProjection,
    HadamardRandomProjection,
    SparseRandomProjection,
)
from kexue.stats.projection.pairs import DistortionSummary, distortion

__all__ = [
    "DistortionSummary",
    "GaussianRandomProjection",
    "HadamardRandomProjection",
    "SparseRandomProjection",
    "distortion",
    "hadamard_transform",
    "johnson_lindenstrauss_eps",
    "johnson_lindenstrauss_min_dim",
    "norm_failure_probability",
]
