"""Which key size attention weights need: oracles, properties, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.nn.attention import factor_attention_weights, minimum_key_dim


def near_the_diagonal(n: int = 16) -> Tensor:
    place = torch.arange(n, dtype=torch.float64)
    return torch.softmax(-(place[:, None] - place).abs(), -1)


def divergence(weights: Tensor, key_dim: int) -> float:
    query, key = factor_attention_weights(weights, key_dim)
    log_ratio = weights.log() - torch.log_softmax(query @ key.mT, -1)
    return float((weights * log_ratio).sum(-1).mean())


def test_key_sizes_known_in_closed_form() -> None:
    place = torch.arange(8, dtype=torch.float64)
    circle = torch.cos(2 * math.pi * (place[:, None] - place) / 8)
    assert int(minimum_key_dim(near_the_diagonal())) == 15
    assert int(minimum_key_dim(torch.softmax(3 * torch.eye(8), -1))) == 7
    assert int(minimum_key_dim(torch.softmax(2 * circle, -1))) == 2
    assert int(minimum_key_dim(torch.full((5, 7), 1 / 7))) == 0
    assert int(minimum_key_dim(torch.ones(4, 1))) == 0


@pytest.mark.parametrize(
    ("key_dim", "nats"),
    [(1, 0.8308143491), (2, 0.2008633228), (4, 0.0810024637), (8, 0.0223228239),
     (12, 0.0045212954), (15, 0.0)],
)  # fmt: skip
def test_divergence_of_the_best_factors(key_dim: int, nats: float) -> None:
    assert divergence(near_the_diagonal(), key_dim) == pytest.approx(nats, abs=6e-11)


def test_factors_beyond_the_rank_are_zero() -> None:
    weights = torch.softmax(torch.randn(3, 5, dtype=torch.float64), -1)
    query, key = factor_attention_weights(weights, 9)
    assert (query.shape, key.shape) == ((3, 9), (5, 9))
    assert float(query[:, 3:].abs().max()) == float(key[:, 3:].abs().max()) == 0.0
    torch.testing.assert_close(torch.softmax(query @ key.mT, -1), weights, rtol=0, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 8), m=st.integers(2, 8), rank=st.integers(1, 8), seed=st.integers(0, 999),
    single=st.booleans(),
)  # fmt: skip
def test_random_queries_and_keys_need_their_own_size(
    n: int, m: int, rank: int, seed: int, single: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, n, rank, dtype=torch.float64, generator=generator)
    key = torch.randn(2, m, rank, dtype=torch.float64, generator=generator)
    weights = torch.softmax(query @ key.mT, -1)
    weights = weights.float() if single else weights
    least = min(n, m - 1, rank)
    # A factor of a random matrix may be nearly singular: what is asked of the rank is an upper
    # bound, and of a generic one (condition below 1000) equality.
    needed = minimum_key_dim(weights)
    assert needed.shape == (2,)
    assert needed.dtype == torch.int64
    assert bool((needed <= least).all())
    centred = weights.double().log()
    values = torch.linalg.svdvals(centred - centred.mean(-1, keepdim=True))
    generic = values[:, least - 1] > 1e-3 * values[:, 0]
    assert bool((needed[generic] == least).all())


def test_a_factor_of_a_row_makes_no_difference() -> None:
    weights = near_the_diagonal() * torch.linspace(0.5, 2, 16, dtype=torch.float64)[:, None]
    assert int(minimum_key_dim(weights)) == 15
    query, key = factor_attention_weights(weights, 15)
    torch.testing.assert_close(
        torch.softmax(query @ key.mT, -1), near_the_diagonal(), rtol=0, atol=1e-14
    )


def test_rtol_cuts_small_singular_values() -> None:
    weights = torch.softmax(torch.diag(torch.tensor([9.0, 3.0, 0.01, 0.0])), -1)
    assert int(minimum_key_dim(weights)) == 3
    assert int(minimum_key_dim(weights, rtol=0.01)) == 2
    assert int(minimum_key_dim(weights, rtol=1.0)) == 0


def test_rank_ignores_what_single_precision_rounds_away() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(200, 3, generator=generator) for _ in range(2))
    weights = torch.softmax(query.double() @ key.double().mT, -1)
    assert int(minimum_key_dim(weights.float())) == int(minimum_key_dim(weights)) == 3


def test_factors_keep_dtype_and_batch() -> None:
    weights = torch.softmax(torch.randn(2, 3, 5, 6), -1)
    query, key = factor_attention_weights(weights, 5)
    assert (query.shape, key.shape, query.dtype) == ((2, 3, 5, 5), (2, 3, 6, 5), torch.float32)
    torch.testing.assert_close(torch.softmax(query @ key.mT, -1), weights)
    empty = torch.ones(0, 5, 6)
    assert minimum_key_dim(empty).shape == (0,)
    assert factor_attention_weights(empty, 2)[1].shape == (0, 6, 2)
    assert minimum_key_dim(torch.ones(2, 0, 4)).tolist() == [0, 0]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (torch.eye(3), ValueError, "must be positive.*got 0"),
        (torch.tensor([[0.5, -0.5]]), ValueError, "must be positive.*got -0.5"),
        (torch.tensor([[0.5, math.nan]]), ValueError, "must be finite, got 1 entries"),
        (torch.tensor([[0.5, math.inf]]), ValueError, "must be finite"),
        (torch.ones(3), ValueError, r"\(\.\.\., queries, keys\), got \(3,\)"),
        (torch.ones(3, 3).long(), TypeError, "real floating point numbers, got torch.int64"),
        ([[0.5, 0.5]], TypeError, "got list"),
    ],
)
def test_weights_are_checked(weights: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        minimum_key_dim(weights)
    with pytest.raises(error, match=words):
        factor_attention_weights(weights, 2)


@pytest.mark.bad_input
def test_key_dim_and_rtol_are_checked() -> None:
    with pytest.raises(ValueError, match="key_dim must be at least 1, got 0"):
        factor_attention_weights(torch.ones(2, 2), 0)
    for rtol in (-1e-3, math.nan):
        with pytest.raises(ValueError, match="rtol must not be negative"):
            minimum_key_dim(torch.ones(2, 2), rtol=rtol)
