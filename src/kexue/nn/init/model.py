r"""Initialisation of whole Transformers by known schemes.

With fan n of inputs: LeCun :math:`n^{-1/2}` (truncated normal); T5 the same (normal), and
:math:`(n\,d_\text{head})^{-1/2}` for queries, in place of the division of logits by
:math:`\sqrt{d_\text{head}}`; GPT-2 0.02 (normal), divided by :math:`\sqrt{2N}` where a matrix
writes into the residual stream of N layers; BERT 0.02 (truncated normal).

Source: https://kexue.fm/archives/8620, https://arxiv.org/abs/1910.10683 (T5),
https://arxiv.org/abs/1810.04805 (BERT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kexue.nn.init.fans import _working_dtype
from kexue.nn.init.sampling import truncated_normal_

__all__ = ["transformer_init_"]

Scheme = Literal["lecun", "t5", "gpt2", "bert"]
Role = Literal["query", "input", "output", "skip"]

_SMALL = 0.02
_QUERY = frozenset(["q_proj", "query", "wq", "q", "query_projection"])
_OUTPUT = frozenset(
    [
        "out_proj", "o_proj", "wo", "o", "fc2", "linear2", "down_proj", "c_proj", "w2",
        "output_projection",
    ]
)  # fmt: skip


def transformer_init_(
    model: nn.Module,
    *,
    scheme: Scheme = "lecun",
    head_dim: int | None = None,
    num_layers: int | None = None,
    embedding_std: float | None = None,
    role: Callable[[str, nn.Module], Role] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, str]:
    """Draw all matrices and embeddings of a model, in place.

    Biases become 0, gains of layer and root-mean-square norms 1. The packed matrix of a
    ``nn.MultiheadAttention`` counts as three. Matrices of GPT-2's ``Conv1D``, stored as (in, out),
    are understood.

    Parameters
    ----------
    model : nn.Module
        Model, or a part of one.
    scheme : {"lecun", "t5", "gpt2", "bert"}
        Which scheme.
    head_dim : int, optional
        Size of a head; T5's scheme needs it.
    num_layers : int, optional
        Layers of two sublayers; GPT-2's scheme needs it.
    embedding_std : float, optional
        Standard deviation of embeddings: 1 for LeCun and T5, 0.02 for GPT-2 and BERT by default.
        Rows of a ``padding_idx`` become 0.
    role : callable, optional
        ``role(name, module)`` says of each linear layer whether it makes queries, writes into the
        residual stream ("output"), does anything else ("input"), or stays as it is ("skip"). By
        default the last part of its name does.
    generator : torch.Generator, optional
        Source of the draws, in the order of ``named_modules``.

    Returns
    -------
    dict of str to str
        Name of each weight that was drawn, and its role.

    Raises
    ------
    ValueError
        For another scheme or role, a scheme without what it needs, sizes below 1, a negative or
        infinite standard deviation, or a model with nothing to draw.
    TypeError
        For a model that is none.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(64, 4)
    >>> transformer_init_(layer, scheme="gpt2", num_layers=12)["linear2.weight"]
    'output'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_scheme(scheme, head_dim, num_layers, embedding_std)
    if embedding_std is None:
        embedding_std = 1.0 if scheme in ("lecun", "t5") else _SMALL
    choose = _role_by_name if role is None else role

    def draw(weight: Tensor, kind: str, fan_in: int) -> None:
        std = _std(scheme, kind, fan_in, head_dim or 1, num_layers or 1)
        _draw(weight, std, truncated=scheme in ("lecun", "bert"), generator=generator)

    drawn: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)
            for own, blocks in _attention_blocks(module):
                for block, kind in blocks:
                    draw(block, kind, block.shape[1])
                drawn[f"{prefix}{own}"] = "+".join(kind for _, kind in blocks)
            _zero(module.in_proj_bias, module.bias_k, module.bias_v, module.out_proj.bias)
        elif _is_linear(module) and module not in inside:
            kind = choose(name, module)
            if kind not in get_args(Role):
                raise ValueError(
                    f"role must return one of {', '.join(get_args(Role))}, "
                    f"got {kind!r} for {name!r}"
                )
            if kind == "skip":
                continue
            weight: Tensor = module.weight
            # A Conv1D keeps its inputs first.
            draw(weight, kind, weight.shape[1 if isinstance(module, nn.Linear) else 0])
            _zero(module.bias)
            drawn[f"{prefix}weight"] = kind
        elif isinstance(module, nn.Embedding):
            _draw(module.weight, embedding_std, truncated=scheme == "bert", generator=generator)
            if module.padding_idx is not None:
                _zero(module.weight[module.padding_idx])
            drawn[f"{prefix}weight"] = "embedding"
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            _zero(getattr(module, "bias", None))
    if not drawn:
        raise ValueError(f"{type(model).__name__} has no linear layer and no embedding to draw")
    return drawn


def _check_scheme(
    scheme: str, head_dim: int | None, num_layers: int | None, embedding_std: float | None
) -> None:
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}, got {scheme!r}")
    needed = {"t5": ("head_dim", head_dim), "gpt2": ("num_layers", num_layers)}.get(scheme)
    if needed is not None and needed[1] is None:
        raise ValueError(f"scheme {scheme!r} needs {needed[0]}, got None")
    for name, value in (("head_dim", head_dim), ("num_layers", num_layers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if embedding_std is not None and not 0 <= embedding_std < math.inf:
        raise ValueError(f"embedding_std must be finite and not negative, got {embedding_std}")


def _std(scheme: str, kind: str, fan_in: int, head_dim: int, num_layers: int) -> float:
    if scheme in ("gpt2", "bert"):
        is_small = scheme == "gpt2" and kind == "output"
        return _SMALL / math.sqrt(2 * num_layers) if is_small else _SMALL
    shared = head_dim if scheme == "t5" and kind == "query" else 1
    return 1 / math.sqrt(fan_in * shared)


@torch.no_grad()
def _draw(
    weight: Tensor, std: float, *, truncated: bool, generator: torch.Generator | None
) -> None:
    if truncated:
        truncated_normal_(weight, std=std, generator=generator)
    else:
        drawn = torch.empty(weight.shape, dtype=_working_dtype(weight), device=weight.device)
        weight.copy_(drawn.normal_(0.0, std, generator=generator))


@torch.no_grad()
def _zero(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


def _role_by_name(name: str, module: nn.Module) -> Role:
    last = name.rpartition(".")[2]
    if last in _QUERY:
        return "query"
    return "output" if last in _OUTPUT else "input"


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, or the (in, out) kind that GPT-2 is written with."""
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return isinstance(module, nn.Linear) or is_conv1d


def _attention_blocks(
    attention: nn.MultiheadAttention,
) -> list[tuple[str, list[tuple[Tensor, str]]]]:
    """Weights of torch's attention, each with its blocks and their roles."""
    out = ("out_proj.weight", [(attention.out_proj.weight, "output")])
    if attention.in_proj_weight is not None:
        query, key, value = attention.in_proj_weight.chunk(3)
        return [("in_proj_weight", [(query, "query"), (key, "input"), (value, "input")]), out]
    return [
        ("q_proj_weight", [(attention.q_proj_weight, "query")]),
        ("k_proj_weight", [(attention.k_proj_weight, "input")]),
        ("v_proj_weight", [(attention.v_proj_weight, "input")]),
        out,
    ]
