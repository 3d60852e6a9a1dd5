r"""Which key size attention weights need, and the queries and keys that give them.

A softmax does not see a constant that is added to a row of its logits. So for positive weights
:math:`P` of shape (n, m), with :math:`L = \log P` and each row centred,
:math:`L_c = L (I - \mathbf{1}\mathbf{1}^\top/m)`,

.. math::
    P = \operatorname{softmax}(QK^\top) \text{ with key size } r \quad\Longleftrightarrow\quad
    \operatorname{rank} L_c \le r .

The rank is at most min(n, m - 1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["factor_attention_weights", "minimum_key_dim"]


def minimum_key_dim(
    weights: Float[Tensor, "*batch queries keys"], *, rtol: float | None = None
) -> Int64[Tensor, "*batch"]:
    r"""Return the smallest key size of a head that can express these attention weights.

    It is the rank of the centred log-weights :math:`L_c`, found in float64: the number of singular
    values above :math:`\text{rtol} \cdot \|\log P\|_F`. Rows need not sum to 1; a factor of a row
    makes no difference.

    Parameters
    ----------
    weights : Tensor (..., queries, keys)
        Positive numbers, a row for each query.
    rtol : float, optional
        What counts as zero, relative to the norm; by default max(queries, keys) times the machine
        precision of ``weights``. Weights that were rounded or averaged need more.

    Returns
    -------
    Tensor (...)
        Key sizes, between 0 for rows that are constant and min(queries, keys - 1).

    Raises
    ------
    ValueError
        For weights that are not positive or not finite, fewer than two dimensions, or a negative
        ``rtol``.
    TypeError
        For weights that are no real floating point numbers.

    Examples
    --------
    A softmax over eight points of a circle needs two dimensions, its identity matrix seven:

    >>> angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    >>> minimum_key_dim(torch.softmax(2 * torch.cos(angle[:, None] - angle), -1))
    tensor(2)
    >>> minimum_key_dim(torch.softmax(3 * torch.eye(8), -1))
    tensor(7)
    """
    log_weights = _log(weights)
    if rtol is None:
        rtol = max(weights.shape[-2:]) * torch.finfo(weights.dtype).eps
    elif not rtol >= 0:
        raise ValueError(f"rtol must not be negative, got {rtol}")
    singular_values = torch.linalg.svdvals(_centred(log_weights))
    threshold = rtol * torch.linalg.matrix_norm(log_weights)
    return (singular_values > threshold[..., None]).sum(-1)


def factor_attention_weights(
    weights: Float[Tensor, "*batch queries keys"], key_dim: int
) -> tuple[Float[Tensor, "*batch queries key_dim"], Float[Tensor, "*batch keys key_dim"]]:
    r"""Return queries and keys whose softmax comes closest to these attention weights.

    They are :math:`U\sqrt\Sigma` and :math:`V\sqrt\Sigma` of the singular value decomposition of
    the centred log-weights, cut off at ``key_dim``: the best approximation of that rank.
    ``softmax(query @ key.mT)`` reproduces the weights, with rows that sum to 1, if and only if
    ``key_dim`` is at least :func:`minimum_key_dim`.

    Parameters
    ----------
    weights : Tensor (..., queries, keys)
        Positive numbers, a row for each query.
    key_dim : int
        Key size. What goes beyond the rank is zero.

    Returns
    -------
    query : Tensor (..., queries, key_dim)
        In the dtype of ``weights``; the logits are not scaled any further.
    key : Tensor (..., keys, key_dim)
        Likewise.

    Raises
    ------
    ValueError
        For weights that are not positive or not finite, fewer than two dimensions, or ``key_dim``
        below 1.
    TypeError
        For weights that are no real floating point numbers.

    Examples
    --------
    >>> weights = torch.softmax(torch.randn(5, 5, dtype=torch.float64), -1)
    >>> query, key = factor_attention_weights(weights, 4)
    >>> torch.allclose(torch.softmax(query @ key.mT, -1), weights)
    True
    """
    if key_dim < 1:
        raise ValueError(f"key_dim must be at least 1, got {key_dim}")
    u, sigma, vh = torch.linalg.svd(_centred(_log(weights)), full_matrices=False)
    root = sigma.sqrt().unsqueeze(-2)
    query, key = (u * root)[..., :key_dim], (vh.mT * root)[..., :key_dim]
    missing = key_dim - query.shape[-1]
    return tuple(torch.nn.functional.pad(x, (0, missing)).to(weights.dtype) for x in (query, key))  # type: ignore[return-value]


def _log(weights: Tensor) -> Tensor:
    """Refuse what has no logarithm; return that of the rest in float64."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be real floating point numbers, got {kind}")
    if weights.ndim < 2:
        raise ValueError(
            f"weights must have shape (..., queries, keys), got {tuple(weights.shape)}"
        )
    if not bool(weights.isfinite().all()):
        count = int((~weights.isfinite()).sum())
        raise ValueError(f"weights must be finite, got {count} entries that are NaN or infinite")
    if not bool((weights > 0).all()):
        raise ValueError(
            "weights must be positive, because a weight of 0 needs an infinite logit, "
            f"got {float(weights.min()):g}"
        )
    return weights.double().log()


def _centred(log_weights: Tensor) -> Tensor:
    return log_weights - log_weights.mean(-1, keepdim=True)
