"""Longer inputs for a trained model: its table of positions replaced by a hierarchical one.

The table is the small part of it. Models keep position ids, token types and a greatest length
beside the table, and one that is forgotten fails, or truncates, only on long inputs.

Source: https://kexue.fm/archives/7947.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import nn

from kexue.nn.position.hierarchical import HierarchicalPositionEmbedding

__all__ = ["extend_position_embeddings"]

_Table: TypeAlias = nn.Embedding | HierarchicalPositionEmbedding


def extend_position_embeddings(
    model: nn.Module,
    max_length: int,
    *,
    alpha: float = 0.4,
    factorized: bool = True,
    num_reserved: int | None = None,
    name: str = "position_embeddings",
) -> nn.Module:
    """Let a trained model read up to ``max_length`` tokens, in place and without new parameters.

    Every ``nn.Embedding`` that is called ``name``, at any depth, is replaced, and what Hugging Face
    models keep beside it follows: buffers ``position_ids`` and ``token_type_ids``, and
    ``max_position_embeddings`` of the configuration. Outputs for inputs that the model could read
    before stay the same, bit for bit. The tokenizer's ``model_max_length`` is yours to raise.

    After that, train for some thousand steps on long inputs, or on mixed lengths where short ones
    must not suffer; with a large learning rate, train the table alone for the first few hundred.

    A factorised model has the parameters it had. It is loaded by loading what was there before the
    extension: build the model with its first configuration, extend it, load the ``state_dict``. A
    second call only refreshes buffers and configuration; ``alpha``, ``num_reserved`` and the kind
    of table stay. A materialised table, which any exporter understands, is an ordinary table, and a
    second call starts from its longer base, which is another code.

    Parameters
    ----------
    model : nn.Module
        BERT, ELECTRA, ALBERT, DistilBERT, RoBERTa, XLM-R, CamemBERT, MPNet, GPT-2 (``name="wpe"``),
        any other module, or a bare ``nn.Embedding``.
    max_length : int
        Positions to be usable, at most n² where n are trained; a RoBERTa table of 512 positions has
        514 rows, and 2 more than ``max_length`` afterwards.
    alpha : float
        As in :func:`hierarchical_position_embedding`.
    factorized : bool
        Whether the trained rows stay the parameters (:class:`HierarchicalPositionEmbedding`) or
        the longer table becomes an ``nn.Embedding`` with rows of its own.
    num_reserved : int, optional
        Rows before position 0. ``padding_idx + 1`` where the table has a ``padding_idx``, else 0.
    name : str
        Name of the attribute that holds the table.

    Returns
    -------
    nn.Module
        The model; for a bare embedding the new table.

    Raises
    ------
    ValueError
        Where there is no table of that name, or it is a sub-class of ``nn.Embedding`` (OPT and BART
        look up with an offset: use :func:`hierarchical_position_embedding` with
        ``num_reserved=2``), or a number is outside its range. The model is unchanged then.

    Examples
    --------
    >>> model = nn.ModuleDict({"position_embeddings": nn.Embedding(16, 8)})
    >>> extend_position_embeddings(model, 48)
    ModuleDict(
      (position_embeddings): HierarchicalPositionEmbedding(16, 8, alpha=0.4)
    )
    """

    def extend(table: _Table) -> tuple[nn.Module, int]:
        return _extended(table, max_length, alpha, factorized, num_reserved)

    if isinstance(model, _Table):
        return extend(model)[0]
    found = [
        (path, parent, table)
        for path, parent in model.named_modules()
        if isinstance(table := parent._modules.get(name), _Table)
    ]
    if not found:
        raise ValueError(
            f"no nn.Embedding named {name!r} was found in {type(model).__name__}; "
            "give the attribute's name as name="
        )
    # All tables are accepted before one is replaced; those that were tied stay tied.
    extended = {id(table): extend(table) for _, _, table in found}
    for path, parent, table in found:
        new, rows = extended[id(table)]
        setattr(parent, name, new)
        _refresh_buffers(parent, rows)
        for module in _from_root(model, path):
            _refresh_config(module, rows)
    return model


def _extended(
    table: _Table,
    max_length: int,
    alpha: float,
    factorized: bool,
    num_reserved: int | None,
) -> tuple[nn.Module, int]:
    """Return the longer table and the number of ids that it is meant for."""
    if isinstance(table, HierarchicalPositionEmbedding):
        extended = table
    else:
        if num_reserved is None:
            num_reserved = 0 if table.padding_idx is None else table.padding_idx + 1
        extended = HierarchicalPositionEmbedding.from_embedding(
            table, alpha=alpha, num_reserved=num_reserved
        )
    rows = extended.num_reserved + max_length
    n = extended.num_embeddings - extended.num_reserved
    if not n < max_length <= n * n:
        raise ValueError(
            f"max_length must be larger than the n = {n} positions that are trained and at most "
            f"n² = {n * n}, got {max_length}"
        )
    if extended is not table and not factorized:
        materialized = extended.materialize(max_length)
        materialized.weight.requires_grad_(table.weight.requires_grad)
        return materialized, rows
    return extended, rows


def _from_root(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the model and every module on the way down to ``path``."""
    yield model
    for name in path.split(".") if path else []:
        model = model.get_submodule(name)
        yield model


def _refresh_buffers(parent: nn.Module, rows: int) -> None:
    buffers = dict(parent.named_buffers(recurse=False))
    for name, fill in (("position_ids", torch.arange), ("token_type_ids", torch.zeros)):
        old = buffers.get(name)
        if old is not None and old.ndim == 2:
            # Assigned to the name of a buffer, a tensor takes its place and its persistence.
            new = fill(rows, dtype=old.dtype, device=old.device)
            setattr(parent, name, new.unsqueeze(0))


def _refresh_config(module: nn.Module, rows: int) -> None:
    config = getattr(module, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(config, name):
            setattr(config, name, rows)
