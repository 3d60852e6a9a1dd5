r"""Unbiased moments to order six, of arrays, streams and many processes; and the bias of the rest.

An estimator is unbiased if its average over all samples of size n is the truth. With the central
moments :math:`m_p = \frac1n \sum_i (x_i - \bar x)^p` of the sample,

.. math::
    E\,m_2 = \Bigl(1 - \frac1n\Bigr)\sigma^2, \qquad h_2 = \frac{n\,m_2}{n-1}, \qquad
    h_3 = \frac{n^2 m_3}{(n-1)(n-2)}, \qquad
    h_4 = \frac{n\,[(n^2-2n+3)\,m_4 - 3(2n-3)\,m_2^2]}{(n-1)(n-2)(n-3)}, \ \dots

:func:`central_moment` gives these h-statistics and :func:`cumulant` the k-statistics;
:class:`MomentAccumulator` gives both for data that arrive in pieces or lie on many machines.
:func:`jackknife` and :func:`bootstrap_bias` estimate the bias of any other statistic from one
sample, :func:`measure_bias` measures it where samples can be drawn at will.

Unbiased is not best: for normal data the sum of squares over n + 1 (``correction=-1``) has the
least mean squared error of all divisors. It matters where estimates are averaged, because averaging
removes variance and never bias.

All sums are of powers of deviations, in double precision: of blocks that fit into the cache, from
a reference point among the data, and pooled exactly. Digits do not depend on an offset of the data.

References
----------
Su Jianlin, "简述无偏估计和有偏估计". Fisher, 1930: k-statistics. Halmos, 1946: unbiasedness. Chan,
Golub and LeVeque, 1983, and Pébay, SAND2008-6212: pooled moments. Quenouille, 1956, and Efron,
1979: jackknife and bootstrap.

Examples
--------
>>> import numpy as np
>>> x = np.array([2.0, 3, 5, 7, 11, 13, 17, 19])
>>> variance(x).round(12), variance(x, correction=0)
(np.float64(40.839285714286), np.float64(35.734375))
>>> cumulant(x, 4).round(10)
np.float64(-2471.3607142857)
"""

from kexue.stats.moments.accumulator import MomentAccumulator
from kexue.stats.moments.estimators import (
    c4,
    central_moment,
    covariance,
    cumulant,
    mean,
    standard_deviation,
    variance,
)
from kexue.stats.moments.resampling import (
    BiasEstimate,
    BiasMeasurement,
    bootstrap_bias,
    jackknife,
    measure_bias,
)

__all__ = [
    "BiasEstimate",
    "BiasMeasurement",
    "MomentAccumulator",
    "bootstrap_bias",
    "c4",
    "central_moment",
    "covariance",
    "cumulant",
    "jackknife",
    "mean",
    "measure_bias",
    "standard_deviation",
    "variance",
]
