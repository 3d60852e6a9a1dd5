r"""Mitchell's multiplication: products of floats and integers by one addition, and layers of them.

A positive number :math:`p = 2^n (1 + x)` with :math:`0 \le x < 1` has Mitchell's logarithm
:math:`n + x`. The bit pattern of a float, read as an integer :math:`I(p)`, is that logarithm up to
shift and scale, so adding patterns multiplies and subtracting them divides:

.. math::
    I(p \otimes q) = I(p) + I(q) - I(1), \qquad
    I(p \oslash q) = I(p) - I(q) + I(1), \qquad
    I(\sqrt p) = \tfrac12 (I(p) + I(1)).

The product is never too large and at most one ninth too small. :func:`multiply`, :func:`divide`,
:func:`matmul` and :class:`MitchellLinear` are bit-exact and differentiable, with corrections that
need no multiplication either; :func:`multiply_integers` works on integers of any size, and
:func:`relative_error_bounds` says what each can be wrong by. This is emulation: a processor that
multiplies in hardware is faster without it.

References
----------
Su Jianlin, "Mitchell近似：乘法变为加法，误差不超过1/9". J. N. Mitchell, *Computer Multiplication
and Division Using Binary Logarithms*, IRE Trans. Electronic Computers EC-11 (1962). T. Mogami,
arXiv 2012.03458, and A. Kosson and M. Jaggi, arXiv 2305.17190: networks trained this way.

Examples
--------
>>> multiply(12.3, 4.56), multiply(12.3, 4.56, correction="mitchell")
(np.float64(53.68), np.float64(56.07))
"""

from kexue.arithmetic.mitchell.bounds import RelativeErrorBounds, relative_error_bounds
from kexue.arithmetic.mitchell.corrections import (
    MINIMAX_CONSTANT,
    UNBIASED_CONSTANT,
    Backward,
    Correction,
)
from kexue.arithmetic.mitchell.elementwise import divide, exp2, log2, multiply, sqrt
from kexue.arithmetic.mitchell.integers import multiply_integers
from kexue.arithmetic.mitchell.matrices import MitchellLinear, linear, matmul

__all__ = [
    "MINIMAX_CONSTANT",
    "UNBIASED_CONSTANT",
    "Backward",
    "Correction",
    "MitchellLinear",
    "RelativeErrorBounds",
    "divide",
    "exp2",
    "linear",
    "log2",
    "matmul",
    "multiply",
    "multiply_integers",
    "relative_error_bounds",
    "sqrt",
]
