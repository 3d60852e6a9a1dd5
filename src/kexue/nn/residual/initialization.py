r"""Start and train a model whose residual branches are scaled with depth.

DeepNorm's gain :math:`\beta` belongs to the matrices of a branch whose size the output is
proportional to: feed-forward, value and output. The softmax keeps gradients of queries and keys
small as they are. Vectors (gains of norms, biases) lie outside of the branch's scale: their share
of the squared gradient grows like the number of layers, unless their rate falls with it.

Source: https://kexue.fm/archives/8994, https://arxiv.org/abs/2203.00555.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kexue.nn.residual.block import Residual
from kexue.nn.residual.scaling import _count

__all__ = ["deepnorm_init_", "depth_parameter_groups"]

Role = Literal["branch", "query_key", "other"]

_QUERY_KEY = frozenset(
    ["q_proj", "k_proj", "query", "key", "wq", "wk", "q", "k", "query_projection", "key_projection"]
)
_BRANCH = frozenset(
    [
        "v_proj", "value", "wv", "v", "out_proj", "o_proj", "wo", "o", "fc1", "fc2", "linear1",
        "linear2", "up_proj", "gate_proj", "down_proj", "c_fc", "c_proj", "w1", "w2", "w3",
        "value_projection", "output_projection",
    ]
)  # fmt: skip


def deepnorm_init_(
    module: nn.Module,
    beta: float,
    *,
    role: Callable[[str, nn.Module], Role] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, str]:
    r"""Draw the linear layers of a model as DeepNorm does, in place.

    Xavier normal, of standard deviation :math:`g\sqrt{2/(n_\text{in} + n_\text{out})}` with gain
    :math:`g = \beta` in branches and 1 for queries and keys; their biases become 0. Norms,
    embeddings and everything else stay as they are. The packed matrix of a
    ``nn.MultiheadAttention`` is three square blocks, each with fans of its own.

    Parameters
    ----------
    module : nn.Module
        Model, or a part of one.
    beta : float
        Gain of the branches, from :func:`deepnorm_coefficients` or :func:`depth_scaling`.
    role : callable, optional
        ``role(name, module)`` says of each linear layer which one it is. By default the last part
        of its name does: ``q_proj``, ``key``, …; ``v_proj``, ``out_proj``, ``fc1``, ….
    generator : torch.Generator, optional
        Source of the draws, in the order of ``named_modules``.

    Returns
    -------
    dict of str to str
        Name of each weight that was drawn, and its role.

    Raises
    ------
    TypeError
        For a module that is none.
    ValueError
        For a beta that is not positive and finite, a role of another name, or a model without a
        branch.

    Examples
    --------
    >>> block = nn.Sequential()
    >>> _ = block.add_module("fc1", nn.Linear(64, 256)), block.add_module("fc2", nn.Linear(256, 64))
    >>> deepnorm_init_(block, 0.5)
    {'fc1.weight': 'branch', 'fc2.weight': 'branch'}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    choose = _role_by_name if role is None else role
    planned: dict[str, tuple[str, Callable[[], None]]] = {}

    def plan(name: str, kind: str, weight: Tensor, bias: Tensor | None) -> None:
        gains = [beta if part == "branch" else 1.0 for part in _expand(kind)]
        planned[name] = (kind, lambda: _draw(weight, bias, gains, generator))

    inside: set[nn.Module] = set()
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, nn.MultiheadAttention):
            inside.add(part.out_proj)
            for own, kind in _packed(part):
                plan(f"{prefix}{own}", kind, getattr(part, own), part.in_proj_bias)
            plan(f"{prefix}out_proj.weight", "branch", part.out_proj.weight, part.out_proj.bias)
        elif isinstance(part, nn.Linear) and part not in inside:
            kind = choose(name, part)
            if kind not in ("branch", "query_key", "other"):
                raise ValueError(
                    f"role must return one of branch, query_key, other, got {kind!r} for {name!r}"
                )
            if kind != "other":
                plan(f"{prefix}weight", kind, part.weight, part.bias)
    if not any("branch" in kind for kind, _ in planned.values()):
        raise ValueError(f"no branch weight was found in {type(module).__name__}; pass role=")
    for _, draw in planned.values():
        draw()
    return {name: kind for name, (kind, _) in planned.items()}


def depth_parameter_groups(model: nn.Module, *, lr: float, num_layers: int) -> list[dict[str, Any]]:
    """Return groups for an optimiser in which vectors of residual blocks are slower.

    Parameters
    ----------
    model : nn.Module
        Model with :class:`~kexue.nn.residual.Residual` blocks.
    lr : float
        Learning rate of everything else.
    num_layers : int
        The rate of parameters with at most one dimension inside of the blocks is divided by it.

    Returns
    -------
    list of dict
        Two groups with ``params`` and ``lr``: everything else, then the vectors.

    Raises
    ------
    TypeError
        For a number of layers that is no integer.
    ValueError
        For a rate that is not positive and finite, a number of layers below 1, or a model without
        such blocks.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4), 4))
    >>> [(len(g["params"]), g["lr"]) for g in depth_parameter_groups(model, lr=0.1, num_layers=10)]
    [(3, 0.1), (3, 0.01)]
    """
    num_layers = _count("num_layers", num_layers)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no Residual block")
    vectors = {p: None for block in blocks for p in block.parameters() if p.ndim <= 1}
    others = [p for p in model.parameters() if p not in vectors]
    return [{"params": others, "lr": lr}, {"params": list(vectors), "lr": lr / num_layers}]


def _role_by_name(name: str, module: nn.Module) -> Role:
    last = name.rpartition(".")[2]
    if last in _QUERY_KEY:
        return "query_key"
    return "branch" if last in _BRANCH else "other"


def _packed(attention: nn.MultiheadAttention) -> list[tuple[str, str]]:
    if attention.in_proj_weight is not None:
        return [("in_proj_weight", "query_key+branch")]
    return [
        ("q_proj_weight", "query_key"),
        ("k_proj_weight", "query_key"),
        ("v_proj_weight", "branch"),
    ]


def _expand(kind: str) -> tuple[str, ...]:
    """Roles of the blocks that lie one below the other in a weight."""
    return ("query_key", "query_key", "branch") if kind == "query_key+branch" else (kind,)


@torch.no_grad()
def _draw(
    weight: Tensor, bias: Tensor | None, gains: list[float], generator: torch.Generator | None
) -> None:
    for block, gain in zip(weight.chunk(len(gains)), gains, strict=True):
        std = gain * math.sqrt(2 / sum(block.shape))
        # Half precision is drawn in single precision, as the other initialisers do.
        wide = torch.float32 if weight.itemsize < 4 else weight.dtype
        drawn = torch.empty(block.shape, dtype=wide, device=weight.device)
        block.copy_(drawn.normal_(0.0, std, generator=generator))
    if bias is not None:
        bias.zero_()
