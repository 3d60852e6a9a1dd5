"""Matrix products and linear layers in which every product is Mitchell's.

Source: T. Mogami, arXiv 2012.03458; A. Kosson and M. Jaggi, arXiv 2305.17190.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.arithmetic.mitchell.blocks import sums_of_products
from kexue.arithmetic.mitchell.corrections import (
    MINIMAX_CONSTANT,
    Backward,
    Correction,
    Options,
    checked_options,
    one_of,
)
from kexue.arithmetic.mitchell.operands import Array, Result, operands

__all__ = ["MitchellLinear", "linear", "matmul"]


def matmul(
    a: Array,
    b: Array,
    *,
    correction: Correction = "none",
    constant: float = MINIMAX_CONSTANT,
    table_bits: int = 4,
    terms: int = 1,
    backward: Backward = "mitchell",
) -> Result:
    r"""Return the matrix product with Mitchell products, :math:`\sum_k a_{ik} \otimes b_{kj}`.

    Half precision is widened to float32 first; products and sums are then those of float32, or of
    float64 for float64, and the result is rounded to the operands' dtype. Extra memory is a few
    megabytes whatever the shapes, beside the result and, for broadcast batches, the operands.

    Parameters
    ----------
    a : array or torch tensor (..., m, k)
        Left matrices.
    b : array or torch tensor (..., k, n)
        Right matrices; batch dimensions broadcast.
    correction, constant, table_bits, terms
        How products are corrected, see :func:`multiply`.
    backward : {"mitchell", "exact"}
        Whether the gradients, g bᵀ and aᵀ g, use the same approximate products or exact ones.

    Returns
    -------
    array or torch tensor (..., m, n)
        Of the kind and common dtype of the operands.

    Raises
    ------
    TypeError
        Where an operand is none of float16, bfloat16, float32 and float64.
    ValueError
        Where the shapes do not match, or an option is unknown or out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> matmul(np.array([[3.0, 1.0]]), np.array([[3.0], [4.0]]))
    array([[12.]])
    """
    options = checked_options(correction, constant, table_bits, terms)
    one_of("backward", backward, get_args(Backward))
    (a, b), give_back = operands(a, b)
    _check_shapes(tuple(a.shape), tuple(b.shape))
    return give_back(_product(a, b, backward, options))


def linear(
    input: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
    *,
    correction: Correction = "none",
    constant: float = MINIMAX_CONSTANT,
    table_bits: int = 4,
    terms: int = 1,
    backward: Backward = "mitchell",
) -> Float[Tensor, "*batch out_features"]:
    r"""Return :func:`matmul` of the input and the transposed weight, plus the bias.

    Parameters
    ----------
    input : torch tensor (..., in_features)
        Rows to be mapped.
    weight : torch tensor (out_features, in_features)
        As in ``torch.nn.functional.linear``.
    bias : torch tensor (out_features,), optional
        Added in ordinary arithmetic.
    correction, constant, table_bits, terms
        How products are corrected, see :func:`multiply`.
    backward : {"mitchell", "exact"}
        How products of the gradients are taken, see :func:`matmul`.

    Returns
    -------
    torch tensor (..., out_features)
        Of the common dtype of the arguments.

    Raises
    ------
    TypeError
        Where an argument is no tensor of float16, bfloat16, float32 or float64.
    ValueError
        Where the shapes do not match, or an option is unknown or out of its range.

    Examples
    --------
    >>> linear(torch.tensor([3.0, 2.0]), torch.tensor([[3.0, 0.5], [1.0, 1.0]]))
    tensor([9., 5.])
    """
    options = checked_options(correction, constant, table_bits, terms)
    one_of("backward", backward, get_args(Backward))
    given = [input, weight] if bias is None else [input, weight, bias]
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected torch tensors, got {type(tensor).__name__}")
    (input, weight), _ = operands(input, weight)
    if weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            "expected input (..., in_features) and weight (out_features, in_features), got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    rows = input if input.ndim > 1 else input[None]
    out = _product(rows, weight.mT, backward, options)
    if bias is not None:
        (out, bias), _ = operands(out, bias)
        out = out + bias
    return out if input.ndim > 1 else out[0]


class MitchellLinear(nn.Linear):
    """A linear layer that multiplies by adding, in place of ``torch.nn.Linear``.

    Parameters, their start values and ``state_dict`` are those of ``torch.nn.Linear``, so weights
    can be exchanged with it in both directions.

    Parameters
    ----------
    in_features : int
        Entries of an input.
    out_features : int
        Entries of an output.
    bias : bool
        Whether a bias is added, in ordinary arithmetic.
    correction, constant, table_bits, terms
        How products are corrected, see :func:`multiply`.
    backward : {"mitchell", "exact"}
        How products of the gradients are taken, see :func:`matmul`.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError
        Where the input is no tensor of float16, bfloat16, float32 or float64.
    ValueError
        Where an option is unknown or out of its range, or the input has another width.

    Examples
    --------
    >>> layer = MitchellLinear(64, 10, correction="constant")
    >>> layer(torch.randn(5, 64)).shape
    torch.Size([5, 10])
    >>> layer.load_state_dict(nn.Linear(64, 10).state_dict())
    <All keys matched successfully>
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        correction: Correction = "none",
        constant: float = MINIMAX_CONSTANT,
        table_bits: int = 4,
        terms: int = 1,
        backward: Backward = "mitchell",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        checked_options(correction, constant, table_bits, terms)
        one_of("backward", backward, get_args(Backward))
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.correction: Correction = correction
        self.constant = constant
        self.table_bits = table_bits
        self.terms = terms
        self.backward_mode: Backward = backward

    def forward(
        self, input: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the output for rows of ``in_features`` numbers."""
        return linear(
            input,
            self.weight,
            self.bias,
            correction=self.correction,
            constant=self.constant,
            table_bits=self.table_bits,
            terms=self.terms,
            backward=self.backward_mode,
        )

    def extra_repr(self) -> str:
        """Return sizes and the way of multiplying, for ``repr``."""
        of_correction = {
            "constant": f", constant={self.constant}",
            "table": f", table_bits={self.table_bits}",
            "mitchell": f", terms={self.terms}",
        }.get(self.correction, "")
        return (
            f"{super().extra_repr()}, correction={self.correction!r}{of_correction}, "
            f"backward={self.backward_mode!r}"
        )


def _check_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    match = len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2]
    if match:
        batches = zip(reversed(a[:-2]), reversed(b[:-2]), strict=False)
        match = all(one == other or 1 in (one, other) for one, other in batches)
    if not match:
        raise ValueError(
            f"expected matrices (..., m, k) and (..., k, n), got shapes {tuple(a)} and {tuple(b)}"
        )


def _product(a: Tensor, b: Tensor, backward: str, options: Options) -> Tensor:
    result = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(result, torch.float32)
    if a.ndim > 2 and b.ndim == 2:
        # One matrix for the whole batch: its rows are rows of one product.
        flat = _product(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]), b, backward, options)
        return flat.reshape(*a.shape[:-1], b.shape[-1])
    return sums_of_products(a.to(wide), b.to(wide), backward, *options).to(result)
