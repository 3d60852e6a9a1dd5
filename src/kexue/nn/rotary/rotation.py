r"""The rotation itself: each plane (u, v) of a feature vector turns by its own angle φ.

.. math::
    (u, v) \mapsto (u\cos\varphi - v\sin\varphi,\; v\cos\varphi + u\sin\varphi)

Angles are taken in double precision and only their cosines and sines are rounded: the product of a
position of a million and a frequency needs more digits than single precision has.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.nn.rotary.layout import Layout, _as_pairs, _kind, _pair_axis

__all__ = ["apply_rotary"]


def apply_rotary(
    x: Float[Tensor, "*batch length dim"],
    angles: Float[Tensor, "*angle_batch length planes"],
    *,
    layout: Layout = "interleaved",
    inverse: bool = False,
) -> Float[Tensor, "*batch length dim"]:
    """Turn the planes of x by given angles.

    Parameters
    ----------
    x : Tensor, shape (..., length, dim)
        Queries or keys. Half precision is rotated in single precision and rounded once.
    angles : Tensor, shape (..., length, r / 2)
        Angles in radians, best in float64; they rotate the first r features of x, the rest passes
        through. Leading dimensions are those of x from the left, of equal size or 1; those that are
        missing (the heads, in x of shape (batch, heads, length, dim)) are broadcast.
    layout : {"interleaved", "half"}
        Plane k is made of features 2k and 2k + 1, or k and k + r/2.
    inverse : bool
        Rotate back.

    Returns
    -------
    Tensor, shape (..., length, dim)
        Of the shape and dtype of x. Gradients flow to x and to the angles.

    Raises
    ------
    ValueError
        If x or the angles are no real tensors of these shapes, x is narrower than what is rotated,
        the lengths differ, or the layout has another name.

    Examples
    --------
    >>> quarter = torch.tensor([[torch.pi / 2, 0.0]], dtype=torch.float64)
    >>> apply_rotary(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), quarter).round(decimals=6)
    tensor([[-2.,  1.,  3.,  4.]])
    """
    pair_axis = _pair_axis(layout)
    if not isinstance(angles, Tensor) or not angles.is_floating_point() or angles.ndim < 2:
        raise ValueError(
            "angles must be a floating-point tensor of shape (..., length, planes), got "
            f"{_kind(angles)}"
        )
    _check_features(x, 2 * angles.shape[-1])
    return _rotate(x, _rotation_table(angles, x, pair_axis), pair_axis, inverse)


def _check_features(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise ValueError(
            f"x must be a floating-point tensor of shape (..., length, dim), got {_kind(x)}"
        )
    if x.shape[-1] < dim:
        raise ValueError(
            f"x must have at least the {dim} features that are rotated, got {x.shape[-1]}"
        )


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rotation_table(angles: Tensor, like: Tensor, pair_axis: int) -> Tensor:
    """Cosines and sines of angles (..., length, planes), paired as the features are."""
    if _has_float64(angles.device):
        angles = angles.double()
    table = torch.stack([angles.cos(), angles.sin()], pair_axis)
    # Without the intermediate dtype, a device that lacks float64 would be sent one.
    return table.to(_working_dtype(like)).to(like.device)


def _has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def _rotate(x: Tensor, table: Tensor, pair_axis: int, inverse: bool) -> Tensor:
    """Rotate the leading features of x by a table (..., length, planes and pairs)."""
    planes = table.shape[-2 if pair_axis == -1 else -1]
    table = _aligned(table, x)
    rotated = x[..., : 2 * planes]
    pairs = _as_pairs(rotated.to(table.dtype), pair_axis)
    if torch.compiler.is_compiling():
        # The formula itself: one fused kernel, whose gradient the compiler derives.
        turned = _turn(pairs, table, pair_axis, inverse)
    else:
        turned = _Turn.apply(pairs, table, pair_axis, inverse)
    turned = turned.flatten(-2).to(x.dtype)
    if 2 * planes == x.shape[-1]:
        return turned
    return torch.cat([turned, x[..., 2 * planes :]], -1)


def _aligned(table: Tensor, x: Tensor) -> Tensor:
    """Give the table the rank of x: its batch dimensions are the first ones of x."""
    *batch, length = table.shape[:-2]
    *leading, x_length = x.shape[:-1]
    if length != x_length:
        raise ValueError(f"the number of positions ({length}) must equal the length ({x_length})")
    missing = len(leading) - len(batch)
    fits = all(own in (1, of_x) for own, of_x in zip(batch, leading, strict=False))
    if missing < 0 or not fits:
        raise ValueError(
            f"the leading dimensions of the positions {tuple(batch)} must be those of x "
            f"{tuple(leading)} from the left, of equal size or 1"
        )
    return table.reshape(*batch, *[1] * missing, *table.shape[-3:])


def _turn(pairs: Tensor, table: Tensor, pair_axis: int, inverse: bool) -> Tensor:
    u, v = pairs.unbind(pair_axis)
    cos, sin = table.unbind(pair_axis)
    sin = -sin if inverse else sin
    return torch.stack([u * cos - v * sin, v * cos + u * sin], pair_axis)


class _Turn(torch.autograd.Function):
    """The same in as few passes over memory as there can be, and nothing saved but the table.

    The rotation is linear in the features and in the table alike: its derivative in the one is a
    rotation back of the gradient, in the other a product of complex numbers once more.
    """

    @staticmethod
    def forward(pairs: Tensor, table: Tensor, pair_axis: int, inverse: bool) -> Tensor:
        if pair_axis == -1:
            turn = torch.view_as_complex(table)
            turn = turn.conj() if inverse else turn
            return torch.view_as_real(_view_as_complex(pairs) * turn)
        u, v = pairs.unbind(pair_axis)
        cos, sin = table.unbind(pair_axis)
        sign = -1.0 if inverse else 1.0
        # Cosines for u and v side by side: one product over whole rows beats two over their halves.
        turned = pairs * torch.stack([cos, cos], pair_axis)
        turned_u, turned_v = turned.unbind(pair_axis)
        turned_u.addcmul_(v, sin, value=-sign)
        turned_v.addcmul_(u, sin, value=sign)
        return turned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
        pairs, table, ctx.pair_axis, ctx.inverse = inputs
        ctx.save_for_backward(pairs if ctx.needs_input_grad[1] else None, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        pairs, table = ctx.saved_tensors
        to_pairs = to_table = None
        if ctx.needs_input_grad[0]:
            to_pairs = _Turn.apply(gradient, table, ctx.pair_axis, not ctx.inverse)
        if ctx.needs_input_grad[1]:
            u, v = pairs.unbind(ctx.pair_axis)
            to_u, to_v = gradient.unbind(ctx.pair_axis)
            to_sin = to_v * u - to_u * v
            to_table = torch.stack(
                [to_u * u + to_v * v, -to_sin if ctx.inverse else to_sin], ctx.pair_axis
            ).sum_to_size(table.shape)
        return to_pairs, to_table, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, int | None, None, None],
        pairs: Tensor,
        table: Tensor,
        pair_axis: int,
        inverse: bool,
    ) -> tuple[Tensor, int]:
        pairs, table = (
            tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((pairs, table), in_dims, strict=False)
        )
        pairs = pairs.expand(info.batch_size, *pairs.shape[1:])
        return _Turn.apply(pairs, table, pair_axis, inverse), 0


def _view_as_complex(pairs: Tensor) -> Tensor:
    *outer, inner = pairs.stride()
    aligned = inner == 1 and not any(step % 2 for step in (*outer, pairs.storage_offset()))
    if not aligned:
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)
