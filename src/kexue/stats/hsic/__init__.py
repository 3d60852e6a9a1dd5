r"""Dependence of any kind between two samples: its size, its gradient, and a test.

The Hilbert-Schmidt independence criterion is the sum of squared covariances over two whole systems
of functions, one of x and one of y. Two kernels stand for the systems, so that it takes two kernel
matrices and one trace,

.. math::
    \mathrm{HSIC} = \|C_{xy}\|_{HS}^2 \approx \frac{1}{(n-1)^2}\operatorname{tr}(KHLH),
    \qquad H = I - \tfrac1n 11^\top,

and with characteristic kernels (gaussian, laplacian) it is zero exactly at independence.
:func:`hsic` estimates it, with or without bias, with gradients, in bounded memory;
:func:`centered_kernel_alignment` puts it on a scale from 0 to 1; :func:`hsic_test` gives a p-value.

References
----------
Su Jianlin, "HSIC简介：一个有意思的判断相关性的思路". Gretton et al., ALT 2005 (the criterion) and
NeurIPS 2007 (the test). Song et al., arXiv 0704.2668: the unbiased estimator. Kornblith et al.,
arXiv 1905.00414: the alignment.

Examples
--------
A parabola has no correlation, and is not independent:

>>> import numpy as np
>>> x = np.linspace(-1, 1, 101)
>>> abs(np.corrcoef(x, x**2)[0, 1]) < 1e-12, hsic_test(x, x**2, random_state=0).pvalue
(np.True_, 0.001)
"""

from kexue.stats.hsic.estimators import centered_kernel_alignment, hsic
from kexue.stats.hsic.independence import HSICTestResult, hsic_test
from kexue.stats.hsic.kernels import kernel_matrix, median_bandwidth

__all__ = [
    "HSICTestResult",
    "centered_kernel_alignment",
    "hsic",
    "hsic_test",
    "kernel_matrix",
    "median_bandwidth",
]
