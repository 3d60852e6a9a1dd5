"""Rewards of token sequences: accuracy, F1 of the tokens, BLEU of one sentence.

All compare by equality of positions, (candidate length) x (reference length) bits a pair, so they
run where the tokens are, without a loop over sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from kexue.losses.policy_gradient.sequences import check_mask, check_tokens

__all__ = ["sentence_bleu", "token_accuracy", "token_f1"]

SMOOTHINGS = ("none", "add_one")
# Positions compared at once: 16 MB of bits, whatever the number of sentences.
_BLOCK = 1 << 24


def token_accuracy(
    actions: Int[Tensor, "*samples_and_batch length"],
    targets: Int[Tensor, "*batch length"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float64[Tensor, "*samples_and_batch"]:
    """Return the share of positions at which the tokens are equal.

    Parameters
    ----------
    actions : Tensor of int, shape (samples, batch, length)
        Samples may be absent, or several dimensions.
    targets : Tensor of int, shape (batch, length)
        What should stand there.
    mask : Tensor of bool, shape of actions or of targets, optional
        Positions that count.

    Returns
    -------
    Tensor of float64, shape (samples, batch)
        1 where no position counts.

    Raises
    ------
    TypeError
        For tokens that are no integers, or a mask that is not Boolean.
    ValueError
        For shapes that do not belong together.

    Examples
    --------
    >>> token_accuracy(torch.tensor([[[1, 2, 3]], [[3, 2, 1]]]), torch.tensor([[1, 2, 4]]))
    tensor([[0.6667],
            [0.3333]], dtype=torch.float64)
    """
    targets = _targets_for_all_samples(actions, targets)
    if targets.shape != actions.shape:
        raise ValueError(
            f"targets must have the length of actions, {actions.shape[-1]}, got shape "
            f"{tuple(targets.shape)}"
        )
    counted = torch.ones_like(actions, dtype=torch.bool)
    if mask is not None:
        fits = mask.ndim <= actions.ndim and mask.shape == actions.shape[actions.ndim - mask.ndim :]
        counted = mask.expand(actions.shape) if fits else mask
        check_mask(counted, actions)
    right = ((actions == targets) & counted).sum(-1).double()
    total = counted.sum(-1)
    return torch.where(total > 0, right / total.clamp(min=1), 1.0)


def token_f1(
    actions: Int[Tensor, "*samples_and_batch length"],
    targets: Int[Tensor, "*batch target_length"],
    *,
    end_token: int | None = None,
    padding: int | None = None,
) -> Float64[Tensor, "*samples_and_batch"]:
    r"""Return the F1 of the tokens as multisets, :math:`2 |a \cap b| / (|a| + |b|)`.

    Parameters
    ----------
    actions : Tensor of int, shape (samples, batch, length)
        Samples may be absent, or several dimensions.
    targets : Tensor of int, shape (batch, target_length)
        References.
    end_token : int, optional
        Sequences are cut before the first one.
    padding : int, optional
        A token that is dropped wherever it stands.

    Returns
    -------
    Tensor of float64, shape (samples, batch)
        1 for two empty sequences.

    Raises
    ------
    TypeError
        For tokens that are no integers.
    ValueError
        For shapes that do not belong together.

    Examples
    --------
    >>> token_f1(torch.tensor([[2, 1, 1, 5]]), torch.tensor([[1, 2, 3]]))
    tensor([0.5714], dtype=torch.float64)
    """

    def score(pair: _Pair) -> Tensor:
        overlap = next(pair.clipped_matches())
        total = pair.length + pair.reference_length
        return torch.where(total > 0, 2 * overlap.double() / total.clamp(min=1), 1.0)

    return _score(score, actions, targets, end_token, padding)


def sentence_bleu(
    actions: Int[Tensor, "*samples_and_batch length"],
    targets: Int[Tensor, "*batch target_length"],
    *,
    max_order: int = 4,
    smoothing: Literal["none", "add_one"] = "add_one",
    end_token: int | None = None,
    padding: int | None = None,
) -> Float64[Tensor, "*samples_and_batch"]:
    r"""Return the BLEU of each sequence against one reference.

    .. math::
        \min\bigl(1, e^{1 - |b| / |a|}\bigr) \Bigl(\prod_{n=1}^{N} \pi_n \Bigr)^{1/N}

    with the share :math:`\pi_n` of n-grams of a that are in b, each as often as it is there.

    Parameters
    ----------
    actions : Tensor of int, shape (samples, batch, length)
        Samples may be absent, or several dimensions.
    targets : Tensor of int, shape (batch, target_length)
        References.
    max_order : int, optional
        Length N of the longest n-grams.
    smoothing : {"add_one", "none"}, optional
        "add_one" adds 1 to numerator and denominator of :math:`\pi_n` for n of at least 2, so that
        a short sequence without a common 4-gram is not worth nothing.
    end_token : int, optional
        Sequences are cut before the first one.
    padding : int, optional
        A token that is dropped wherever it stands.

    Returns
    -------
    Tensor of float64, shape (samples, batch)
        0 for an empty candidate.

    Raises
    ------
    TypeError
        For tokens that are no integers.
    ValueError
        For shapes that do not belong together, another smoothing, or an order below 1.

    Examples
    --------
    >>> sentence_bleu(torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 2, 3, 5, 4, 6]]))
    tensor([0.4729], dtype=torch.float64)
    """
    if max_order < 1:
        raise ValueError(f"max_order must be at least 1, got {max_order}")
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing must be one of {', '.join(SMOOTHINGS)}, got {smoothing!r}")

    def score(pair: _Pair) -> Tensor:
        log_precision = torch.zeros(
            len(pair.length), dtype=torch.float64, device=pair.length.device
        )
        for n, matches in zip(range(1, max_order + 1), pair.clipped_matches(), strict=False):
            added = 1 if smoothing == "add_one" and n > 1 else 0
            possible = (pair.length - n + 1).clamp(min=0)
            # Nothing possible is nothing right.
            precision = (matches + added).double() / (possible + added).clamp(min=1)
            log_precision += precision.log() / max_order
        missing = pair.reference_length.double() / pair.length.clamp(min=1) - 1
        bleu = (log_precision - missing.clamp(min=0)).exp()
        return torch.where(pair.length > 0, bleu, 0.0)

    return _score(score, actions, targets, end_token, padding)


class _Pair(NamedTuple):
    """Candidates and references, what counts standing first, and how much of it there is."""

    tokens: Tensor
    length: Tensor
    reference: Tensor
    reference_length: Tensor

    def clipped_matches(self) -> Iterator[Tensor]:
        """Yield for n = 1, 2, … how many n-grams of each candidate the reference has too.

        The k-th occurrence of an n-gram counts if the reference has at least k of it.
        """
        within = self.tokens[:, :, None] == self.tokens[:, None, :]
        across = self.tokens[:, :, None] == self.reference[:, None, :]
        here = _before(self.length, self.tokens.shape[1])
        there = _before(self.reference_length, self.reference.shape[1])
        within = within & here[:, :, None] & here[:, None, :]
        across = across & here[:, :, None] & there[:, None, :]
        longer_within, longer_across = within, across
        while True:
            occurrence = longer_within.tril().sum(-1)
            matches = (occurrence > 0) & (occurrence <= longer_across.sum(-1))
            yield matches.sum(-1)
            longer_within = _extended(longer_within, within)
            longer_across = _extended(longer_across, across)


def _extended(grams: Tensor, tokens: Tensor) -> Tensor:
    """Equality of (n+1)-grams from that of n-grams and of the token n further on."""
    rows, columns = max(grams.shape[1] - 1, 0), max(grams.shape[2] - 1, 0)
    n = (tokens.shape[1] - rows, tokens.shape[2] - columns)
    return grams[:, :rows, :columns] & tokens[:, n[0] :, n[1] :]


def _before(length: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=length.device) < length[:, None]


def _score(
    score: Callable[[_Pair], Tensor],
    actions: Tensor,
    targets: Tensor,
    end_token: int | None,
    padding: int | None,
) -> Tensor:
    targets = _targets_for_all_samples(actions, targets)
    pair = _Pair(
        *_cut(_rows(actions), end_token, padding), *_cut(_rows(targets), end_token, padding)
    )
    size = max(1, actions.shape[-1] * (actions.shape[-1] + targets.shape[-1]))
    blocks = zip(*(part.split(max(1, _BLOCK // size)) for part in pair), strict=True)
    return torch.cat([score(_Pair(*block)) for block in blocks]).reshape(actions.shape[:-1])


def _rows(tokens: Tensor) -> Tensor:
    return tokens.reshape(math.prod(tokens.shape[:-1]), tokens.shape[-1])


def _cut(tokens: Tensor, end_token: int | None, padding: int | None) -> tuple[Tensor, Tensor]:
    """What counts of each row, moved to its front in order, and how much that is."""
    counts = torch.ones_like(tokens, dtype=torch.bool)
    if end_token is not None:
        counts &= (tokens == end_token).cumsum(-1) == 0
    if padding is not None:
        counts &= tokens != padding
        order = (~counts).int().argsort(dim=-1, stable=True)
        tokens = tokens.gather(-1, order)
    return tokens, counts.sum(-1)


def _targets_for_all_samples(actions: Tensor, targets: Tensor) -> Tensor:
    check_tokens("actions", actions)
    check_tokens("targets", targets)
    batch = targets.shape[:-1]
    if len(batch) >= actions.ndim or actions.shape[actions.ndim - 1 - len(batch) : -1] != batch:
        raise ValueError(
            "targets must have the batch shape of actions, samples in front left out: got actions "
            f"of shape {tuple(actions.shape)} and targets of shape {tuple(targets.shape)}"
        )
    return targets.expand(*actions.shape[:-1], targets.shape[-1])
