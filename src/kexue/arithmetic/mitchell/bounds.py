r"""How wrong each approximate operation can be.

With mantissas x and y, the plain product has the ratio :math:`(1+x+y)/((1+x)(1+y))` to the true one
where x + y < 1, and :math:`2(x+y)/((1+x)(1+y))` elsewhere; both have their minimum 8/9 at
x = y = 1/2. The other bounds are such extrema too.

Source: J. N. Mitchell (1962), "Error analysis".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kexue.arithmetic.mitchell.corrections import (
    MINIMAX_CONSTANT,
    Correction,
    Options,
    checked_options,
    one_of,
)

__all__ = ["RelativeErrorBounds", "relative_error_bounds"]

Operation = Literal["multiply", "divide", "sqrt", "exp2"]


@dataclass(frozen=True)
class RelativeErrorBounds:
    """Least and largest relative error, (approximate - true) / true.

    Attributes
    ----------
    lower : float
        At most 0 where the operation can be too small.
    upper : float
        At least 0 where it can be too large.

    Examples
    --------
    >>> RelativeErrorBounds(lower=-0.125, upper=0.0).lower
    -0.125
    """

    lower: float
    upper: float


def relative_error_bounds(
    operation: Operation,
    *,
    correction: Correction = "none",
    constant: float = MINIMAX_CONSTANT,
    table_bits: int = 4,
    terms: int = 1,
) -> RelativeErrorBounds:
    """Return the least and the largest relative error of an operation.

    These are bounds of the method, for results that neither overflow nor underflow. Plain products
    and quotients of floats obey them exactly. Where a correction, a root or a power is rounded to
    the mantissa of a dtype, its last bit comes on top.

    Parameters
    ----------
    operation : {"multiply", "divide", "sqrt", "exp2"}
        The operation.
    correction : {"none", "constant", "table", "mitchell"}
        The correction of the product; other operations have none.
    constant : float
        For ``"constant"``, in [0, 1).
    table_bits : int
        For ``"table"``, 0 to 6.
    terms : int
        For ``"mitchell"``, at least 0.

    Returns
    -------
    RelativeErrorBounds
        Both bounds; attained, except those of tables, which are rounded up.

    Raises
    ------
    ValueError
        Where an argument is unknown or out of its range, or an operation other than
        ``"multiply"`` is to be corrected.

    Examples
    --------
    >>> relative_error_bounds("divide")
    RelativeErrorBounds(lower=0.0, upper=0.125)
    >>> 1 / relative_error_bounds("multiply", correction="mitchell", terms=1).lower
    -121.0
    """
    one_of("operation", operation, get_args(Operation))
    options = checked_options(correction, constant, table_bits, terms)
    if operation == "multiply":
        return RelativeErrorBounds(*_product_bounds(options))
    if correction != "none":
        raise ValueError(f"correction of {operation!r} must be 'none', got {correction!r}")
    return RelativeErrorBounds(0.0, _UPPER[operation])


_UPPER = {
    "divide": 1 / 8,  # 1 / 1.5
    "sqrt": 3 / (2 * math.sqrt(2)) - 1,  # odd powers of two
    "exp2": 2 / (math.e * math.log(2)) - 1,  # fraction 1/ln 2 - 1
}

# Largest absolute errors for 1 to 6 leading bits, rounded up.
_TABLE = (0.0938, 0.0547, 0.0317, 0.0167, 0.00883, 0.00447)


def _product_bounds(options: Options) -> tuple[float, float]:
    if options.correction == "constant":
        return _constant_bounds(options.constant)
    if options.correction == "table":
        if options.table_bits == 0:
            return _constant_bounds(1 / 8)
        largest = _TABLE[options.table_bits - 1]
        return -largest, largest
    terms = options.terms if options.correction == "mitchell" else 0
    # Beyond 300 terms the bound is 0 in floats.
    a = (2 * 4 ** (min(terms, 300) + 1) + 1) // 3
    return -1 / a**2, 0.0


def _constant_bounds(c: float) -> tuple[float, float]:
    """For a given x + y the true product is smallest at an edge and largest where x = y.

    Between kinks the ratio is monotone or rises and falls, so its minimum lies where x + y + c
    carries once (x + y = 1 - c) or twice (x + y = 2 - c); its maximum is at x = y = 0.
    """
    return min(8 / (3 - c) ** 2, 16 / (4 - c) ** 2) - 1, c
