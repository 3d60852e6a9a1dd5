r"""Contrastive losses of a batch of representations, and the closed form of one gradient.

A query :math:`q_i` has to find its positive :math:`k_{t(i)}` among all keys of the batch:

.. math::
    L_i = -\log \frac{e^{\langle q_i, k_{t(i)} \rangle / \tau}}
                     {\sum_j e^{\langle q_i, k_j \rangle / \tau}}.

Every sample is a negative of every other, so a loss of a batch is not a sum of losses of its parts.
:mod:`kexue.training.gradient_cache` computes its gradient in parts all the same.

References
----------
van den Oord et al., arXiv 1807.03748: InfoNCE. Chen et al., arXiv 2002.05709: NT-Xent. Su Jianlin,
"对比学习可以使用梯度累积吗？": the gradient with respect to the representations.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, normalize, one_hot

__all__ = ["info_nce", "label_vectors", "nt_xent"]

_REDUCTIONS = ("mean", "sum", "none")
_normalized = normalize  # the functions below have an argument of that name


def info_nce(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "m dim"],
    *,
    temperature: float | Float[Tensor, "..."] = 0.05,
    targets: Int[Tensor, " n"] | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    gather: bool = False,
) -> Float[Tensor, "..."]:
    r"""Return the cross entropy of finding each query's key among all keys.

    .. math::
        L_i = -s_{i,t(i)} + \log \sum_j e^{s_{ij}}, \qquad
        s_{ij} = \langle q_i, k_j \rangle / \tau

    Parameters
    ----------
    queries : Tensor of shape (n, dim)
    keys : Tensor of shape (m, dim)
        In the order of the queries; where m is a multiple of n: positive of the first query, its
        hard negatives, positive of the second query, and so on.
    temperature : float or Tensor of one number
        τ, positive; a tensor may be learned. On an accelerator a tensor is not looked at, because
        that would stop the host.
    targets : integer Tensor of shape (n,), optional
        Index of each query's positive among ``keys``; i·(m/n) by default.
    symmetric : bool
        Average the loss with that of finding each key's query; needs m = n.
    normalize : bool
        Divide queries and keys by their length first, so that s is a cosine over τ.
    reduction : {"mean", "sum", "none"}
        Over the queries.
    gather : bool
        Use the keys (and for ``symmetric`` the queries) of all processes, in the order of their
        ranks. Every process must have as many as the others. Queries and ``targets`` stay local,
        and so does the reduction. Gradients reach the process that a key came from, so that the
        average of the gradients over the processes, which DistributedDataParallel takes, is the
        gradient of the mean over all queries.

    Returns
    -------
    Tensor
        A scalar, or shape (n,) where ``reduction`` is "none"; in float32 for half precision.

    Raises
    ------
    ValueError
        For shapes that do not fit, an empty batch, a temperature that is not positive, targets that
        are no keys, ``symmetric`` with targets or with m ≠ n, an unknown reduction.
    TypeError
        For queries or keys that are not real, or targets that are not integers.
    RuntimeError
        Where ``gather`` is asked for and there is no process group.

    Examples
    --------
    >>> queries = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> keys = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [0.0, 1.0]])
    >>> info_nce(queries, keys, temperature=0.1)
    tensor(1.8288)
    """
    _check_pair(queries, keys, "queries", "keys")
    _check_temperature(temperature)
    n, m = len(queries), len(keys)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if symmetric and (targets is not None or m != n):
        given = f"{n} queries, {m} keys" + (" and targets" if targets is not None else "")
        raise ValueError(f"symmetric needs one key for each query and no targets, got {given}")
    if targets is None:
        if m % n:
            raise ValueError(
                f"the number of keys must be a multiple of the {n} queries, or targets must say "
                f"which are positive, got {m} keys"
            )
        targets = torch.arange(0, m, m // n, device=queries.device)
    _check_targets(targets, n, m)
    targets = targets.long()

    temperature = _single(temperature)
    queries, keys = _at_least_single(queries), _at_least_single(keys)
    if normalize:
        queries, keys = _normalized(queries, dim=1), _normalized(keys, dim=1)
    all_queries, all_keys = queries, keys
    if gather:
        all_keys = _gather(keys)
        targets = targets + dist.get_rank() * m
        all_queries = _gather(queries) if symmetric else queries
    # Scaling the smaller factor costs n·dim products instead of n·m.
    loss = cross_entropy(_products(queries / temperature, all_keys), targets, reduction=reduction)
    if not symmetric:
        return loss
    logits = _products(keys / temperature, all_queries)
    return (loss + cross_entropy(logits, targets, reduction=reduction)) / 2


def nt_xent(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float | Float[Tensor, "..."] = 0.5,
    normalize: bool = True,
) -> Float[Tensor, ""]:
    r"""Return SimCLR's loss: each of 2n views has to find the other view of its sample.

    .. math::
        L = -\frac1{2n} \sum_i \log \frac{e^{s_{i,t(i)}}}{\sum_{j \ne i} e^{s_{ij}}}, \qquad
        s_{ij} = \langle h_i, h_j \rangle / \tau

    Parameters
    ----------
    first, second : Tensor of shape (n, dim)
        Two views of the same n samples, in the same order.
    temperature : float or Tensor of one number
        τ, positive; a tensor may be learned. On an accelerator a tensor is not looked at.
    normalize : bool
        Divide the representations by their length first.

    Returns
    -------
    Tensor
        A scalar, the mean over the 2n views; in float32 for half precision.

    Raises
    ------
    ValueError
        For shapes that do not fit, an empty batch, or a temperature that is not positive.
    TypeError
        For representations that are not real.

    Examples
    --------
    >>> first = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> second = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [0.0, 1.0]])
    >>> nt_xent(first, second)
    tensor(1.2278)
    """
    _check_pair(first, second, "first", "second")
    _check_temperature(temperature)
    n = len(first)
    if len(second) != n:
        raise ValueError(f"first and second must hold the same samples, got {n} and {len(second)}")
    views = torch.cat([_at_least_single(first), _at_least_single(second)])
    if normalize:
        views = _normalized(views, dim=1)
    logits = _without_self(_products(views / _single(temperature), views))
    return cross_entropy(logits, torch.arange(2 * n, device=first.device).roll(n))


@torch.no_grad()
def label_vectors(
    representations: Float[Tensor, "n dim"],
    targets: Int[Tensor, " n"],
    *,
    temperature: float | Float[Tensor, "..."] = 1.0,
    exclude_self: bool = False,
) -> Float[Tensor, "n dim"]:
    r"""Return the vectors whose inner products with the representations have the loss's gradient.

    For :math:`L = \sum_i \mathrm{CE}(s_i, t(i))` with :math:`s = h h^\top / \tau`,

    .. math::
        \tilde h = \frac{\partial L}{\partial h} = (G + G^\top) h / \tau, \qquad
        G = \mathrm{softmax}(s) - T, \qquad T_{ij} = [j = t(i)]

    so that :math:`\nabla_\theta L = \nabla_\theta \sum_i \langle h_i, \tilde h_i \rangle` with the
    label vectors held constant: a sum over samples, which accumulates. Its value is not the loss.
    Where t is an involution (pairs that point at each other) T is symmetric, and this is the
    article's :math:`\sum_j (p_{ij} + p_{ji} - 2 t_{ij}) h_j`. Nothing here uses autograd.

    Parameters
    ----------
    representations : Tensor of shape (n, dim)
        h, normalised by the caller where that is wanted.
    targets : integer Tensor of shape (n,)
        t(i), the positive of each sample.
    temperature : float or Tensor of one number
        τ, positive.
    exclude_self : bool
        Leave each sample out of its own softmax.

    Returns
    -------
    Tensor of shape (n, dim)

    Raises
    ------
    ValueError
        For shapes that do not fit, an empty batch, a temperature that is not positive, targets that
        are no samples, or a sample that is its own target and excluded.
    TypeError
        For representations that are not real, or targets that are not integers.

    Examples
    --------
    >>> h = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    >>> label_vectors(h, torch.tensor([1, 0, 3, 2]), temperature=0.5)
    tensor([[ 0.6278, -2.1104],
            [-2.0185,  2.7924],
            [ 4.7290,  3.1098],
            [-3.2318, -3.5491]])
    """
    _check_matrix(representations, "representations")
    _check_temperature(temperature)
    n = len(representations)
    _check_targets(targets, n, n)
    if exclude_self and _can_look_at(targets):
        own = (targets == torch.arange(n)).nonzero()
        if len(own):
            raise ValueError(
                "with exclude_self no sample can be its own target, got targets"
                f"[{own[0].item()}] = {own[0].item()}"
            )
    h, temperature = _at_least_single(representations), _single(temperature)
    similarities = _products(h, h) / temperature
    if exclude_self:
        similarities = _without_self(similarities)
    gradient = similarities.softmax(dim=1) - one_hot(targets.long(), n)
    vectors = _products(gradient + gradient.mT, h.mT) / temperature
    return vectors.to(representations.dtype)


def _at_least_single(values: Tensor) -> Tensor:
    """Similarities over a small temperature need more digits than half precision has."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _single(temperature: Any) -> Any:
    return temperature.reshape(()) if isinstance(temperature, Tensor) else temperature


def _products(rows: Float[Tensor, "n dim"], others: Float[Tensor, "m dim"]) -> Tensor:
    """Return all inner products, in full precision under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ others.mT.to(rows.dtype)


def _without_self(similarities: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    diagonal = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    return similarities.masked_fill(diagonal, -math.inf)


class _AllGather(torch.autograd.Function):
    """Rows of all processes; backward returns to each what all of them ask of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.count, ctx.count)


def _gather(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "all dim"]:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "gather needs a process group: call torch.distributed.init_process_group first, "
            "or leave gather out where there is one process"
        )
    return _AllGather.apply(rows)


def _check_pair(one: Tensor, other: Tensor, name: str, other_name: str) -> None:
    _check_matrix(one, name)
    _check_matrix(other, other_name)
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} and {other_name} must have the same dimension, "
            f"got {one.shape[1]} and {other.shape[1]}"
        )


def _check_matrix(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of real floating-point numbers, got {kind}")
    if value.ndim != 2 or len(value) == 0:
        raise ValueError(
            f"{name} must have shape (samples, dim) with at least one sample, "
            f"got {tuple(value.shape)}"
        )


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}"
            )
        if not _can_look_at(temperature):
            return
        temperature = temperature.item()
    # Written so that NaN fails it.
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _check_targets(targets: Tensor, n: int, m: int) -> None:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be a tensor of integers, got {kind}")
    if targets.dtype == torch.bool:
        raise TypeError("targets must be indices, got a tensor of truth values")
    if targets.shape != (n,):
        raise ValueError(f"targets must have shape ({n},), got {tuple(targets.shape)}")
    if _can_look_at(targets) and not bool(((targets >= 0) & (targets < m)).all()):
        raise ValueError(
            f"targets must be from 0 to {m - 1}, "
            f"got values from {targets.min().item()} to {targets.max().item()}"
        )


def _can_look_at(value: Tensor) -> bool:
    """Whether its numbers can be read without stopping an accelerator or a compiler."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()
