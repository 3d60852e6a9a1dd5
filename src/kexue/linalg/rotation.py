r"""Orthogonal maps that send one direction to another, in any dimension and at any angle.

For unit vectors a and b with :math:`c = a \cdot b`, three maps T with T a = b are closed formulas:

.. math::
    \text{rotation:}\quad & I + 2ba^\top - \frac{(a+b)(a+b)^\top}{1+c}, \\
    \text{reflection:}\quad & I - \frac{(a-b)(a-b)^\top}{1-c}, \\
    \text{half turn:}\quad & \frac{(a+b)(a+b)^\top}{1+c} - I.

Each is the identity, or its negative, plus a matrix of rank 1 or 2: :func:`align` applies it at the
price of two inner products, :func:`alignment_matrix` writes it out. Where a denominator vanishes
(b near -a, for the reflection b near a) the same maps are computed in an orthonormal basis (a, e)
of the plane of a and b, so that a few rounding errors are all that is lost at any angle.

References
----------
Su Jianlin, "从一个单位向量变换到另一个单位向量的正交矩阵": the three forms. W. Kahan, "How
Futile are Mindless Assessments of Roundoff in Floating-Point Computation?", section 12: the angle.

Examples
--------
>>> align([1.0, 2.0, 3.0], a=[1.0, 0.0, 0.0], b=[0.0, 1.0, 0.0])
array([-2.,  1.,  3.])
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, is_torch_array
from jaxtyping import Float, Real

__all__ = ["align", "alignment_matrix", "angle_between"]

Kind: TypeAlias = Literal["rotation", "reflection", "half_turn"]

# numpy or torch; jaxtyping checks shape and kind of number, the functions check the rest.
Array: TypeAlias = Any
Vectors: TypeAlias = Real[Array, "*#batch dim"] | Sequence[Any]
Fraction: TypeAlias = float | Real[Array, "..."] | Sequence[Any] | None


def alignment_matrix(
    a: Vectors, b: Vectors, *, kind: Kind = "rotation", fraction: Fraction = None
) -> Float[Array, "... dim dim"]:
    r"""Return the orthogonal matrix T that sends the direction of a to the direction of b.

    T is orthogonal within a few rounding errors at every angle. It acts on column vectors:
    ``T @ a`` points along b. What the three kinds do:

    ==============  =================  ============  =====================  ===============
    kind            orthogonal to a,b  determinant   trace                  undetermined at
    ==============  =================  ============  =====================  ===============
    ``rotation``    stays              1             :math:`d - 2 + 2c`     b = -a
    ``reflection``  stays              -1            :math:`d - 2`          b = a
    ``half_turn``   is negated         (-1)^(d-1)    :math:`2 - d`          b = -a
    ==============  =================  ============  =====================  ===============

    The last two are symmetric and exchange a and b. Where a and b do not determine a plane, it is
    spanned by a and the coordinate axis most orthogonal to a, the first one among equals. Gradients
    are finite there, but those of a choice and without meaning.

    Parameters
    ----------
    a, b : array, shape (..., d)
        Vectors of any length but 0; leading dimensions are broadcast. Lists and integers become the
        default floating-point type; half precision is computed in single.
    kind : {"rotation", "reflection", "half_turn"}
        Rotation in the plane of a and b; Householder reflection; half turn about the bisector.
    fraction : float or array, optional
        Share of the rotation's angle: 0 is the identity, 1 the whole rotation, values outside
        [0, 1] extrapolate. An array fits the batch shape, or this with a last axis of length 1; for
        a single pair its own shape becomes the batch shape.

    Returns
    -------
    array, shape (..., d, d)
        Of the kind and dtype of a and b, on their device, and differentiable in them.

    Raises
    ------
    TypeError
        If an argument holds no real numbers, or numpy arrays meet torch tensors.
    ValueError
        If a or b holds a zero vector, NaN or infinity, d is below 2, shapes do not fit, the kind is
        unknown, or a fraction of another kind than the rotation is asked for.

    Examples
    --------
    >>> import numpy as np
    >>> alignment_matrix([1, 0, 0], [0, 1, 0])
    array([[ 0., -1.,  0.],
           [ 1.,  0.,  0.],
           [ 0.,  0.,  1.]])
    >>> alignment_matrix([1.0, 0.0], [0.0, 1.0], fraction=0.5).round(4)
    array([[ 0.7071, -0.7071],
           [ 0.7071,  0.7071]])
    """
    xp, dtype, (a, b) = _vectors(a=a, b=b)
    batch = _batch_shape(a=a, b=b)
    sign, left, right = _map(xp, a, b, kind, _fraction(xp, fraction, kind, batch, like=a))
    matrix = sign * xp.eye(a.shape[-1], dtype=a.dtype, device=device(a))
    for column, row in zip(left, right, strict=True):
        matrix = matrix + column[..., :, None] * row[..., None, :]
    return xp.astype(matrix, dtype, copy=False)


def align(
    x: Vectors,
    a: Vectors,
    b: Vectors,
    *,
    kind: Kind = "rotation",
    fraction: Fraction = None,
    inverse: bool = False,
) -> Float[Array, "... dim"]:
    """Apply to x the orthogonal map that sends the direction of a to the direction of b.

    The same as :func:`alignment_matrix` times x, without the matrix: time and memory grow with the
    size of x.

    Parameters
    ----------
    x : array, shape (..., d)
        What is mapped. Its numbers are not checked: NaN and infinity come out as NaN.
    a, b : array, shape (..., d)
        Vectors of any length but 0. Leading dimensions of x, a and b are broadcast: n vectors and
        one pair have shapes (n, d), (d,) and (d,).
    kind : {"rotation", "reflection", "half_turn"}
        See :func:`alignment_matrix`.
    fraction : float or array, optional
        Share of the rotation's angle, see :func:`alignment_matrix`; the batch shape is that of x, a
        and b together.
    inverse : bool
        Apply the inverse instead, which is the transpose.

    Returns
    -------
    array, shape (..., d)
        Of the kind and dtype of the input, on its device, and differentiable in x, a and b.

    Raises
    ------
    TypeError
        If an argument holds no real numbers, or numpy arrays meet torch tensors.
    ValueError
        As for :func:`alignment_matrix`, and if the last dimension of x is another.

    Examples
    --------
    Turn the mean of some vectors onto the first axis; then back:

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(loc=1.0, size=(500, 8))
    >>> axis = np.eye(8)[0]
    >>> turned = align(x, x.mean(0), axis)
    >>> bool(np.allclose(turned.mean(0), np.linalg.norm(x.mean(0)) * axis))
    True
    >>> bool(np.allclose(align(turned, x.mean(0), axis, inverse=True), x))
    True
    """
    xp, dtype, (x, a, b) = _vectors(x=x, a=a, b=b)
    batch = _batch_shape(x=x, a=a, b=b)
    sign, left, right = _map(xp, a, b, kind, _fraction(xp, fraction, kind, batch, like=a))
    if inverse:
        left, right = right, left
    with _full_precision(x):
        # Sums in place: what takes the time is fresh memory of the size of x.
        if all(vector.ndim == 1 for vector in (*left, *right)):
            result = (x @ xp.stack(right).T) @ xp.stack(left)
        else:
            products = (xp.linalg.vecdot(x, row)[..., None] for row in right)
            terms = (column * product for column, product in zip(left, products, strict=True))
            result = reduce(operator.iadd, terms)
    result = operator.iadd(result, x) if sign > 0 else operator.isub(result, x)
    return xp.astype(result, dtype, copy=False)


def _full_precision(x: Array) -> AbstractContextManager[Any]:
    """Under autocast, products of matrices would be rounded to half precision."""
    if not is_torch_array(x):
        return nullcontext()
    import torch

    return torch.autocast(x.device.type, enabled=False)


def angle_between(a: Vectors, b: Vectors) -> Float[Array, "..."]:
    r"""Return the angle between two vectors, accurate at all angles.

    .. math::
        \theta = 2 \operatorname{atan2}\bigl(|\hat a - \hat b|, |\hat a + \hat b|\bigr).

    The arc cosine of the inner product loses half of the digits near 0 and π; this loses none.

    Parameters
    ----------
    a, b : array, shape (..., d)
        Vectors of any length but 0; leading dimensions are broadcast.

    Returns
    -------
    array, shape (...)
        Radians in [0, π]. At the ends, where the angle has a kink, its gradient is finite and
        without meaning.

    Raises
    ------
    TypeError
        If a or b holds no real numbers, or a numpy array meets a torch tensor.
    ValueError
        If a or b holds a zero vector, NaN or infinity, d is below 2, or shapes do not fit.

    Examples
    --------
    >>> float(angle_between([1.0, 0.0], [1.0, 1e-9]))
    1e-09
    """
    xp, dtype, (a, b) = _vectors(a=a, b=b)
    _batch_shape(a=a, b=b)
    a, b = _direction(xp, "a", a), _direction(xp, "b", b)
    difference, total = (xp.linalg.vector_norm(v, axis=-1) for v in (a - b, a + b))
    return xp.astype(2 * xp.atan2(difference, total), dtype, copy=False)


class _Map(NamedTuple):
    """The map x -> sign * x + Σ left (right · x)."""

    sign: int
    left: tuple[Array, ...]
    right: tuple[Array, ...]


def _map(xp: Any, a: Array, b: Array, kind: Kind, fraction: Array | None) -> _Map:
    a, b = _direction(xp, "a", a), _direction(xp, "b", b)
    if kind == "rotation":
        return _rotation(xp, a, b, fraction)
    if kind == "reflection":
        mirror = _mirror(xp, a, b)
        return _Map(1, (-2 * mirror,), (mirror,))
    # The half turn reflects a to -b and negates.
    axis = _mirror(xp, a, -b)
    return _Map(-1, (2 * axis,), (axis,))


def _rotation(xp: Any, a: Array, b: Array, fraction: Array | None) -> _Map:
    """Rotation by θ, or a fraction of θ, in the plane of a and b.

    With a vector w of the plane, orthogonal to a and of any length,

        T = I + g (|w|² a aᵀ + w wᵀ) + f (w aᵀ - a wᵀ),  f = sin θ / |w|,  g = (cos θ - 1) / |w|².

    For w = b - c a, of length sin θ, f is 1 and g is -1/(1 + c): nothing is divided by sin θ, and T
    is smooth in a and b, at a = b too. For w = e, of length 1, nothing is divided by 1 + c.
    """
    c, w, e = _plane(xp, a, b)
    s = _dot(xp, e, b)
    w_square = _dot(xp, w, w)
    if fraction is None:
        smooth = c >= 0
        near_f, near_g = xp.ones_like(c), -1 / (1 + xp.where(smooth, c, 0.0))
        far_f, far_g = s, c - 1
    else:
        order = xp.finfo(a.dtype).eps ** (1 / 3)
        smooth = (c > 0) & (w_square * xp.maximum(fraction**2, xp.ones_like(fraction)) < order)
        near_f, near_g = _fraction_near_zero(
            xp.where(smooth, fraction, 0.0), xp.where(smooth, w_square, 0.0)
        )
        angle = fraction * xp.atan2(s, c)
        far_f, far_g = xp.sin(angle), -2 * xp.sin(angle / 2) ** 2
    w = xp.where(smooth, w, e)
    f = xp.where(smooth, near_f, far_f)
    g = xp.where(smooth, near_g, far_g)
    g_square = g * xp.where(smooth, w_square, 1.0)
    return _Map(1, (g_square * a + f * w, g * w - f * a), (a, w))


def _fraction_near_zero(t: Array, q: Array) -> tuple[Array, Array]:
    """sin(tθ)/sin θ and (cos(tθ) - 1)/sin²θ by their series in q = sin²θ, cut after q²."""
    t2 = t**2
    f = t * (1 + (1 - t2) * q / 6 * (1 + (9 - t2) * q / 20))
    g = -t2 / 2 * (1 + (4 - t2) * q / 12 * (1 + (16 - t2) * q / 30))
    return f, g


def _mirror(xp: Any, a: Array, b: Array) -> Array:
    """The unit vector along a - b: the normal of the mirror between a and b."""
    c, _, e = _plane(xp, a, b)
    obtuse = c <= 0
    difference = xp.where(obtuse, a - b, a)
    half = xp.atan2(_dot(xp, e, b), c) / 2
    return xp.where(obtuse, _normalized(xp, difference), xp.sin(half) * a - xp.cos(half) * e)


def _plane(xp: Any, a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The cosine c, the part w = b - c a of b orthogonal to a, and the unit vector e along it."""
    c = _dot(xp, a, b)
    # Close to a or -a the difference is mostly a rounding error along a: one more step removes it.
    w = _orthogonal_to(xp, a, b - c * a)
    determined = _dot(xp, w, w) > (4 * xp.finfo(a.dtype).eps) ** 2
    steepest = xp.argmin(xp.abs(_constant(a)), axis=-1, keepdims=True)
    axis = xp.astype(xp.arange(a.shape[-1], device=device(a)) == steepest, a.dtype)
    return c, w, _normalized(xp, xp.where(determined, w, _orthogonal_to(xp, a, axis)))


def _dot(xp: Any, u: Array, v: Array) -> Array:
    # A pairwise sum keeps its accuracy in high dimension, and its precision under autocast.
    return xp.sum(u * v, axis=-1, keepdims=True)


def _orthogonal_to(xp: Any, a: Array, v: Array) -> Array:
    return v - _dot(xp, a, v) * a


def _normalized(xp: Any, v: Array) -> Array:
    return v / xp.sqrt(_dot(xp, v, v))


def _direction(xp: Any, name: str, v: Array) -> Array:
    """v at unit length."""
    # Dividing by the largest entry first keeps squares in range. The direction does not depend on
    # the divisor, so it may count as a constant.
    peak = xp.max(xp.abs(_constant(v)), axis=-1, keepdims=True)
    if not _is_compiling(v):
        if not bool(xp.all(xp.isfinite(peak))):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        if bool(xp.any(peak == 0)):
            raise ValueError(f"{name} contains a zero vector, which has no direction")
    return _normalized(xp, v / peak)


def _constant(v: Array) -> Array:
    return v.detach() if is_torch_array(v) else v


def _is_compiling(v: Array) -> bool:
    """Whether a check of values would break a graph that torch is about to compile."""
    if not is_torch_array(v):
        return False
    from torch.compiler import is_compiling

    return is_compiling()


def _vectors(**given: Any) -> tuple[Any, Any, list[Array]]:
    """The array library, the dtype of the result, and the vectors in the dtype of the work."""
    xp = _namespace(given)
    place = next((device(value) for value in given.values() if is_array_api_obj(value)), None)
    arrays = {name: _real(name, value) for name, value in given.items()}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"{name} must have shape (..., d), got a single number")
    dimension = arrays["a"].shape[-1]
    for name, array in arrays.items():
        if array.shape[-1] != dimension:
            raise ValueError(
                f"{name} and a must have the same last dimension, got {array.shape[-1]} and "
                f"{dimension}"
            )
    if dimension < 2:
        raise ValueError(f"the dimension must be at least 2, got {dimension}")
    dtype = xp.result_type(*(_float_type(xp, given[name], arrays[name]) for name in given))
    work = dtype if xp.finfo(dtype).bits >= 32 else xp.float32
    return xp, dtype, [_converted(xp, array, work, place) for array in arrays.values()]


def _namespace(given: dict[str, Any]) -> Any:
    known = [value for value in given.values() if is_array_api_obj(value)]
    try:
        return array_namespace(*known or [np.empty(0)])
    except TypeError:
        kinds = ", ".join(f"{name} a {type(value).__name__}" for name, value in given.items())
        raise TypeError(f"all arrays must be of one library, got {kinds}") from None


def _real(name: str, value: Any) -> Array:
    """The value as an array of real numbers."""
    array = value if is_array_api_obj(value) else np.asarray(value)
    if not array_namespace(array).isdtype(array.dtype, ("integral", "real floating")):
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return array


def _converted(xp: Any, value: Any, dtype: Any, place: Any) -> Array:
    if is_torch_array(value):  # of which asarray might drop the graph
        return xp.astype(value, dtype, copy=False)
    return xp.asarray(value, dtype=dtype, device=place)


def _float_type(xp: Any, value: Any, array: Array) -> Any:
    """The dtype that a value brings: its own, or the default one for integers and lists."""
    if is_array_api_obj(value) and xp.isdtype(array.dtype, "real floating"):
        return array.dtype
    return xp.asarray(0.0).dtype


def _batch_shape(**arrays: Array) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(tuple(array.shape[:-1]) for array in arrays.values()))
    except ValueError:
        raise ValueError(
            f"leading dimensions of {' and '.join(arrays)} must be broadcastable, got shapes "
            f"{' and '.join(str(tuple(array.shape)) for array in arrays.values())}"
        ) from None


def _fraction(
    xp: Any, fraction: Any, kind: str, batch: tuple[int, ...], like: Array
) -> Array | None:
    """The fraction with a last axis of length 1, in the dtype of the work."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if fraction is None:
        return None
    if kind != "rotation":
        raise ValueError(f"only a rotation has fractions, got kind {kind!r} and a fraction")
    if is_torch_array(fraction):
        _namespace({"vectors": like, "fraction": fraction})
    if type(fraction) not in (int, float):  # a plain number stays traceable by torch.compile
        fraction = _real("fraction", fraction)
    t = _converted(xp, fraction, like.dtype, device(like))
    if not _is_compiling(t) and not bool(xp.all(xp.isfinite(t))):
        raise ValueError("fraction must be finite, got NaN or infinity")
    shape = tuple(t.shape)
    if _fits(shape, batch):
        return t[..., None]
    if _fits(shape, (*batch, 1)):
        return t
    if batch == ():
        return t[..., None]
    raise ValueError(f"fraction must fit the batch shape {batch}, got shape {shape}")


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of the shape can be broadcast to the target, and no further."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
