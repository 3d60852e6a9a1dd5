"""Random positions against exact moments and counts of subsets; the sinusoidal code by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.attention import MultiHeadAttention
from kexue.nn.position import (
    NoPosition,
    SinusoidalPositionEmbedding,
    equal_mean_positions,
    evenly_spaced_positions,
    log_length_factor,
    random_positions,
    sinusoidal_position_embedding,
)
from kexue.nn.rotary import RotaryEmbedding

# Sample means are compared within this many standard errors: a chance of 6e-7 for each, and the
# seeds are fixed.
SIGMAS = 5
EPS = torch.finfo(torch.float64).eps
# Oracles are written down to ten decimals.
DECIMALS = 5.1e-11


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Random subsets


def moments(length: int, max_length: int) -> tuple[list[float], list[float]]:
    """Mean and variance of the order statistics of a random subset."""
    n, size = length, max_length
    mean = [i * (size + 1) / (n + 1) - 1 for i in range(1, n + 1)]
    variance = [
        i * (n + 1 - i) * (size + 1) * (size - n) / ((n + 1) ** 2 * (n + 2))
        for i in range(1, n + 1)
    ]
    return mean, variance


def test_moments_of_a_small_subset_by_enumeration() -> None:
    subsets = torch.tensor(list(itertools.combinations(range(12), 5)), dtype=torch.float64)
    mean, variance = moments(5, 12)
    assert mean == pytest.approx([7 / 6, 10 / 3, 5.5, 23 / 3, 59 / 6], rel=4 * EPS)
    assert subsets.mean(0).tolist() == pytest.approx(mean, rel=100 * EPS)
    assert variance == pytest.approx(
        [1.8055555556, 2.8888888889, 3.25, 2.8888888889, 1.8055555556], abs=DECIMALS
    )
    assert subsets.var(0, correction=0).tolist() == pytest.approx(variance, rel=1000 * EPS)


def test_moments_of_the_articles_subset() -> None:
    mean, variance = moments(64, 2048)
    for i, expected in ((1, 30.5230769231), (2, 62.0461538462), (32, 1007.7384615385),
                        (64, 2016.4769230769)):  # fmt: skip
        assert mean[i - 1] == pytest.approx(expected, abs=DECIMALS)
    assert math.sqrt(variance[0]) == pytest.approx(30.5454463485, abs=DECIMALS)
    assert math.sqrt(variance[31]) == pytest.approx(124.0761896111, abs=DECIMALS)


@pytest.mark.parametrize(("length", "max_length"), [(64, 2048), (5, 12), (40, 200), (90, 100)])
def test_draws_have_the_moments_of_order_statistics(length: int, max_length: int) -> None:
    draws = 20_000
    positions = random_positions(length, max_length, batch_size=draws, generator=seeded())
    positions = positions.double()
    mean, variance = (torch.tensor(m, dtype=torch.float64) for m in moments(length, max_length))
    error = (positions.mean(0) - mean).abs() / (variance / draws).sqrt()
    assert error.max() < SIGMAS
    # The error of a variance follows from the fourth moment, here from the draws themselves.
    centred = (positions - mean) ** 2
    assert ((centred.mean(0) - variance).abs() / (centred.std(0) / draws**0.5)).max() < SIGMAS


@pytest.mark.parametrize(
    ("length", "max_length"),
    [(3, 6), (2, 6), (4, 6), (1, 5), (2, 30), (28, 30)],
    ids=["half", "few", "most", "one", "sparse", "nearly all"],
)
def test_every_subset_is_equally_likely(length: int, max_length: int) -> None:
    cells = math.comb(max_length, length)
    draws = 500 * cells
    positions = random_positions(length, max_length, batch_size=draws, generator=seeded(1))
    powers = max_length ** torch.arange(length)
    counts = (positions * powers).sum(-1).unique(return_counts=True)[1]
    assert len(counts) == cells
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_rows_are_independent() -> None:
    """All pairs of subsets of two neighbouring rows are equally likely, too."""
    positions = random_positions(2, 4, batch_size=40_000, generator=seeded(2))
    pairs = (positions.view(-1, 4) * 4 ** torch.arange(4)).sum(-1)
    counts = pairs.unique(return_counts=True)[1]
    assert len(counts) == 36
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 3000), st.integers(0, 4), st.integers(0, 2**32))
def test_positions_are_sorted_distinct_and_in_range(
    length: int, more: int, batch_size: int, seed: int
) -> None:
    positions = random_positions(
        length, length + more, batch_size=batch_size, generator=seeded(seed)
    )
    assert positions.shape == (batch_size, length)
    assert positions.dtype == torch.int64
    assert bool((positions.diff() > 0).all())
    assert bool(((positions >= 0) & (positions < length + more)).all())


def test_all_positions_are_taken_where_there_are_no_more() -> None:
    assert random_positions(7, 7).tolist() == list(range(7))


def test_positions_among_a_billion_take_no_memory_for_the_billion() -> None:
    positions = random_positions(256, 10**12, batch_size=4, generator=seeded())
    assert bool((positions.diff() > 0).all())
    assert positions.max() > 10**11


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: random_positions(5, 12, generator=g),
        lambda g: random_positions(5, 800, generator=g),
        lambda g: equal_mean_positions(5, generator=g),
        lambda g: equal_mean_positions(5, distribution="beta", max_length=40, generator=g),
    ],
    ids=["dense", "sparse", "exponential", "beta"],
)
def test_a_generator_decides_alone(draw: Callable[[torch.Generator], Tensor]) -> None:
    before = torch.get_rng_state()
    assert torch.equal(draw(seeded(3)), draw(seeded(3)))
    assert not torch.equal(draw(seeded(3)), draw(seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_torch_seeds_the_draws() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = random_positions(5, 100), equal_mean_positions(5)
        torch.manual_seed(5)
        again = random_positions(5, 100), equal_mean_positions(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_draws_are_made_where_the_generator_is() -> None:
    on_gpu = random_positions(40, 2048, generator=torch.Generator("cuda").manual_seed(0))
    assert on_gpu.device.type == "cuda"
    there = random_positions(40, 2048, generator=seeded(), device="cuda")
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), random_positions(40, 2048, generator=seeded()))
    back = random_positions(
        40, 2048, generator=torch.Generator("cuda").manual_seed(0), device="cpu"
    )
    assert torch.equal(back, on_gpu.cpu())


# Even spacing


def test_even_spacing_rounds_down() -> None:
    assert evenly_spaced_positions(5, 12).tolist() == [0, 2, 4, 7, 9]
    assert evenly_spaced_positions(512, 2048).tolist() == list(range(0, 2048, 4))
    assert evenly_spaced_positions(3, 3, dtype=torch.int32).tolist() == [0, 1, 2]


def test_even_spacing_keeps_fractions_in_a_floating_dtype() -> None:
    positions = evenly_spaced_positions(5, 12, dtype=torch.float64)
    assert positions.tolist() == pytest.approx([0, 2.4, 4.8, 7.2, 9.6], rel=2 * EPS)


@given(st.integers(1, 500), st.integers(0, 2**62))
def test_even_spacing_is_exact_however_large(length: int, more: int) -> None:
    positions = evenly_spaced_positions(length, length + more)
    assert positions.tolist() == [i * (length + more) // length for i in range(length)]


# Equal means


@pytest.mark.parametrize(
    "options",
    [{}, {"distribution": "beta", "max_length": 512}],
    ids=["exponential", "beta"],
)
@pytest.mark.parametrize("endpoint", [False, True])
def test_mean_positions_count_from_zero(options: dict[str, Any], endpoint: bool) -> None:
    length, draws = 64, 20_000
    positions = equal_mean_positions(
        length, endpoint=endpoint, batch_size=draws, generator=seeded(), dtype=torch.float64,
        **options,
    )  # fmt: skip
    expected = torch.arange(length).double() * (length / (length - 1) if endpoint else 1)
    error = (positions.mean(0) - expected).abs()
    assert error[0] == 0
    assert (error / (positions.std(0) / draws**0.5))[1:].max() < SIGMAS


def test_tokens_of_one_sequence_share_one_scale() -> None:
    positions = equal_mean_positions(9, batch_size=3, generator=seeded(), dtype=torch.float64)
    steps = positions.diff()
    # A step is a difference of two products that are rounded once each.
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), rtol=0, atol=16 * EPS * 9 * 10)
    assert len(steps[:, 0].unique()) == 3


def test_a_given_length_is_divided_among_the_tokens() -> None:
    def twelve(count: int, generator: torch.Generator | None) -> Tensor:
        return torch.full((count,), 12.0)

    exact = equal_mean_positions(4, distribution=twelve, batch_size=2)
    assert exact.tolist() == [[0, 3, 6, 9]] * 2
    article = equal_mean_positions(4, distribution=twelve, endpoint=True)
    assert article.tolist() == [0, 4, 8, 12]
    assert equal_mean_positions(1, distribution=twelve, endpoint=True).tolist() == [0]


def test_a_callable_is_given_the_generator() -> None:
    def uniform(count: int, generator: torch.Generator | None) -> Tensor:
        return 10 * torch.rand(count, generator=generator)

    one = equal_mean_positions(5, distribution=uniform, batch_size=3, generator=seeded())
    two = equal_mean_positions(5, distribution=uniform, batch_size=3, generator=seeded())
    assert torch.equal(one, two)


def lengths_drawn(draws: int, **options: Any) -> Tensor:
    """The random n' behind the positions: with the end point, the last position is n' itself."""
    positions = equal_mean_positions(
        64, endpoint=True, batch_size=draws, generator=seeded(), dtype=torch.float64, **options
    )
    return positions[:, -1]


@pytest.mark.parametrize(
    ("multiple", "tail"),
    [(1, 0.3678794412), (2, 0.1353352832), (4, 0.0183156389), (8, 0.0003354626)],
)
def test_tail_of_the_exponential_length(multiple: int, tail: float) -> None:
    draws = 200_000
    share = (lengths_drawn(draws) > multiple * 64).double().mean().item()
    assert tail == pytest.approx(math.exp(-multiple), abs=DECIMALS)
    assert abs(share - tail) < SIGMAS * math.sqrt(tail / draws)


def test_the_exponential_length_passes_a_kolmogorov_smirnov_test() -> None:
    drawn = lengths_drawn(20_000).numpy()
    assert stats.kstest(drawn, stats.expon(scale=64).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("concentration", "tail"), [(0.5, 0.0486253885), (2.0, 0.0032051692), (8.0, 1.0e-7)]
)
def test_the_beta_length_has_its_variance_and_tail(concentration: float, tail: float) -> None:
    draws, max_length, mean = 200_000, 512, 1 / 8
    drawn = lengths_drawn(
        draws, distribution="beta", max_length=max_length, concentration=concentration
    )
    law = stats.beta(concentration * mean, concentration * (1 - mean))
    # The last of the three is given with two digits only.
    assert law.sf(0.9) == pytest.approx(tail, abs=DECIMALS if tail > 1e-6 else 5e-9)
    share = (drawn > 0.9 * max_length).double().mean().item()
    assert abs(share - tail) < SIGMAS * math.sqrt(tail / draws) + 1 / draws
    variance = max_length**2 * mean * (1 - mean) / (concentration + 1)
    squares = (drawn - mean * max_length) ** 2
    assert abs(squares.mean() - variance) < SIGMAS * squares.std() / draws**0.5
    assert drawn.min() >= 0
    assert drawn.max() <= max_length


def test_concentration_two_at_half_the_length_is_uniform() -> None:
    drawn = lengths_drawn(20_000, distribution="beta", max_length=128, concentration=2.0)
    assert stats.kstest(drawn.numpy(), stats.uniform(0, 128).cdf).pvalue > 1e-3


def test_positions_in_single_precision_are_those_in_double_rounded() -> None:
    single = equal_mean_positions(9, batch_size=3, generator=seeded())
    double = equal_mean_positions(9, batch_size=3, generator=seeded(), dtype=torch.float64)
    assert torch.equal(single, double.float())


# Logarithm of the length


def test_log_length_factor() -> None:
    assert log_length_factor(512, 64) == pytest.approx(1.5, rel=2 * EPS)
    assert log_length_factor(32, 64) == pytest.approx(0.8333333333, abs=DECIMALS)
    assert log_length_factor(64, 64) == 1
    assert log_length_factor(1, 64) == 0


def test_a_factor_of_two_squares_the_attention_weights() -> None:
    logits = torch.randn(3, 9, generator=seeded(), dtype=torch.float64)
    scaled = (log_length_factor(64, 8) * logits).softmax(-1)
    squares = logits.softmax(-1) ** 2
    assert torch.allclose(scaled, squares / squares.sum(-1, keepdim=True), rtol=20 * EPS, atol=0)


def test_attention_multiplies_its_logits_by_the_factor() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = MultiHeadAttention(8, 2, dtype=torch.float64)
        scaled = MultiHeadAttention(8, 2, log_length=8, dtype=torch.float64)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 64, 8, generator=seeded(), dtype=torch.float64)
    weights = plain(x, need_weights=True).weights
    squares = weights**2
    expected = squares / squares.sum(-1, keepdim=True)
    assert torch.allclose(scaled(x, need_weights=True).weights, expected, rtol=1e-12, atol=0)


# Sinusoidal code


def test_sinusoidal_code_by_hand() -> None:
    code = sinusoidal_position_embedding(torch.tensor([0, 1, 2.5]), 4, dtype=torch.float64)
    expected = [
        [0, 1, 0, 1],
        [0.8414709848, 0.5403023059, 0.0099998333, 0.9999500004],
        [0.5984721441, -0.8011436155, 0.0249973959, 0.9996875163],
    ]
    assert torch.allclose(code, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=DECIMALS)


def test_inner_products_depend_on_the_difference_alone() -> None:
    positions = torch.tensor([0.0, 0.7, 13.0, 400.25], dtype=torch.float64)
    code, shifted = (
        sinusoidal_position_embedding(positions + shift, 32, dtype=torch.float64)
        for shift in (0, 1000.5)
    )
    # An angle of size 1400 is known to 1400 eps, and 32 of them are summed.
    assert torch.allclose(code @ code.T, shifted @ shifted.T, rtol=0, atol=32 * 1500 * EPS)
    difference = positions[:, None] - positions
    frequency = 10_000 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    expected = (difference[..., None] * frequency).cos().sum(-1)
    assert torch.allclose(code @ code.T, expected, rtol=0, atol=32 * 500 * EPS)


def test_sinusoidal_code_keeps_whole_positions_apart_however_large() -> None:
    code = sinusoidal_position_embedding(torch.tensor([2**24, 2**24 + 1]), 4)
    assert abs(code[1, 0].item() - math.sin(2**24 + 1)) < 1e-7


def test_module_is_the_function_times_a_scale() -> None:
    positions = torch.tensor([[0.5, 3.0], [7.0, 1e4]])
    module = SinusoidalPositionEmbedding(6, base=100.0, scale=0.5).double()
    code = sinusoidal_position_embedding(positions, 6, base=100.0, dtype=torch.float64)
    assert torch.equal(module(positions), 0.5 * code)
    assert module.bfloat16()(positions).dtype == torch.bfloat16
    assert not list(module.parameters())
    assert not module.state_dict()


def test_no_position_is_zero_in_the_dtype_of_the_model() -> None:
    module = NoPosition().double()
    assert module(torch.arange(3)).dtype == torch.float64
    hidden = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64)
    assert torch.equal(hidden + module(torch.arange(3)), hidden)


# In a Transformer


@pytest.mark.parametrize("code", ["table", "sinusoidal", "rotary"])
def test_a_transformer_draws_positions_for_itself(code: str) -> None:
    position = {
        "table": torch.nn.Embedding(50, 8),
        "sinusoidal": SinusoidalPositionEmbedding(8),
        "rotary": RotaryEmbedding(4),
    }[code]
    given: list[Tensor] = []

    def drawn(length: int, *, batch_size: int) -> Tensor:
        generator = seeded(len(given))
        given.append(random_positions(length, 50, batch_size=batch_size, generator=generator))
        return given[-1]

    config = TransformerConfig(
        vocab_size=5, dim=8, num_layers=1, num_heads=2, causal=False, max_length=20
    )
    model = Transformer(config, position=position, position_ids=drawn)
    tokens = torch.randint(5, (3, 20), generator=seeded())
    one, two = model(tokens), model(tokens)
    assert [tuple(positions.shape) for positions in given] == [(3, 20)] * 2
    assert not torch.allclose(one, two)
    # Each sequence was read at its own positions, and they can be handed in as well.
    assert torch.allclose(model(tokens, positions=given[0]), one)
    alone = model(tokens[1:2], positions=given[0][1:2])
    assert torch.allclose(alone, one[1:2], atol=1e-5)


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_positions(0, 5), ValueError, "between 1 and max_length = 5, got 0"),
        (lambda: random_positions(6, 5), ValueError, "between 1 and max_length = 5, got 6"),
        (lambda: random_positions(2.0, 5), TypeError, "length must be an integer"),  # type: ignore[arg-type]
        (lambda: random_positions(2, 5, batch_size=-1), ValueError, "batch_size"),
        (lambda: evenly_spaced_positions(0, 5), ValueError, "between 1 and max_length"),
        (lambda: evenly_spaced_positions(6, 5), ValueError, "between 1 and max_length"),
        (lambda: evenly_spaced_positions(5, 500, dtype=torch.int8), ValueError, "up to 499"),
        (lambda: evenly_spaced_positions(5, 9, dtype=torch.float16), ValueError, "merge"),
        (lambda: equal_mean_positions(0), ValueError, "length must be at least 1"),
        (lambda: equal_mean_positions(4, distribution="poisson"), ValueError, "'poisson'"),  # type: ignore[arg-type]
        (lambda: equal_mean_positions(4, distribution="beta"), ValueError, "max_length above"),
        (
            lambda: equal_mean_positions(4, distribution="beta", max_length=4),
            ValueError,
            "max_length above length = 4",
        ),
        (lambda: equal_mean_positions(4, concentration=0.0), ValueError, "concentration"),
        (lambda: equal_mean_positions(4, concentration=math.nan), ValueError, "concentration"),
        (lambda: equal_mean_positions(4, dtype=torch.bfloat16), ValueError, "merge"),
        (lambda: equal_mean_positions(4, dtype=torch.int64), ValueError, "merge"),
        (
            lambda: equal_mean_positions(4, distribution=lambda n, g: torch.tensor([-1.0])),
            ValueError,
            "not negative",
        ),
        (
            lambda: equal_mean_positions(4, distribution=lambda n, g: torch.tensor([math.inf])),
            ValueError,
            "finite",
        ),
        (
            lambda: equal_mean_positions(4, distribution=lambda n, g: torch.ones(n + 1)),
            ValueError,
            r"shape \(1,\), got \(2,\)",
        ),
        (lambda: log_length_factor(0, 64), ValueError, "length must be at least 1"),
        (lambda: log_length_factor(64, 1), ValueError, "train_length must be at least 2"),
        (
            lambda: sinusoidal_position_embedding(torch.zeros(3), 5),
            ValueError,
            "dim must be even",
        ),
        (lambda: SinusoidalPositionEmbedding(5), ValueError, "dim must be even"),
        (lambda: SinusoidalPositionEmbedding(4, scale=math.inf), ValueError, "scale"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
