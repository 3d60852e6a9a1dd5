"""Expansions, linear layers and rules: what E and R must satisfy, exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.nn.growth import (
    Expansion,
    ParameterRule,
    expand_linear,
    expand_state_dict,
)

# Sums of tens of products of order one in float64: some tens of roundings of 1e-16.
ROUNDING = 1e-13


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


@st.composite
def index_maps(draw: st.DrawFn) -> Expansion:
    """Any map: each unit at least once, further copies and empty units anywhere between."""
    old = draw(st.integers(1, 6))
    further = draw(st.lists(st.integers(-1, old - 1), max_size=8))
    source = draw(st.permutations([*range(old), *further]))
    scale = draw(st.sampled_from([1.0, -0.5, 1.7]))
    return Expansion(torch.tensor(source), old, scale)


def test_repeat_keeps_blocks_together() -> None:
    assert Expansion.repeat(4, 2, block=2).source.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert Expansion.repeat(2, 3).source.tolist() == [0, 0, 0, 1, 1, 1]


def test_cycle_and_zero_pad_reach_any_size() -> None:
    assert Expansion.cycle(3, 5).source.tolist() == [0, 1, 2, 0, 1]
    assert Expansion.cycle(3, 5).multiplicity.tolist() == [2, 2, 1]
    assert Expansion.zero_pad(2, 4).source.tolist() == [0, 1, -1, -1]


def test_identity_is_written_and_read_as_it_is() -> None:
    x = normal(3, 4)
    assert torch.equal(Expansion.identity(4).write(x), x)
    assert torch.equal(Expansion.identity(4).read(x), x)


def test_rotary_puts_plane_i_of_a_half_layout_at_k_i() -> None:
    source = Expansion.rotary(1, 4, 2, layout="half").source
    assert source.tolist() == [0, -1, 1, -1, 2, -1, 3, -1]


def test_rotary_puts_plane_i_of_an_interleaved_layout_at_k_i() -> None:
    source = Expansion.rotary(1, 4, 2, layout="interleaved").source
    assert source.tolist() == [0, 1, -1, -1, 2, 3, -1, -1]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_stays_within_its_head(layout: str) -> None:
    one = Expansion.rotary(1, 6, 3, layout=layout)
    two = Expansion.rotary(2, 6, 3, layout=layout)
    second = torch.where(one.source < 0, one.source, one.source + 6)
    assert torch.equal(two.source, torch.cat([one.source, second]))
    assert two.scale == 3**0.25


@given(index_maps())
@settings(max_examples=50, deadline=None)
def test_reading_inverts_writing_for_any_map(expansion: Expansion) -> None:
    x, weight = normal(5, expansion.old_size), normal(7, expansion.old_size, seed=1)
    read = expansion.write(x) @ expansion.read(weight).T
    torch.testing.assert_close(read, x @ weight.T, rtol=0, atol=ROUNDING)


@given(index_maps(), st.integers(0, 1))
@settings(max_examples=50, deadline=None)
def test_null_noise_reads_zero_for_any_map(expansion: Expansion, dim: int) -> None:
    size = expansion.new_size
    noise = normal(size, size, seed=2)
    free = expansion.null_noise(noise, dim)
    seen = free.movedim(dim, -1) @ expansion.write(normal(expansion.old_size, 3), 0)
    torch.testing.assert_close(seen, torch.zeros_like(seen), rtol=0, atol=ROUNDING)
    # What reads zero already stays: it is a projection.
    torch.testing.assert_close(expansion.null_noise(free, dim), free, rtol=0, atol=ROUNDING)


def test_null_noise_leaves_empty_units_alone() -> None:
    expansion, noise = Expansion.zero_pad(2, 5), normal(3, 5)
    assert torch.equal(expansion.null_noise(noise)[:, 2:], noise[:, 2:])
    assert torch.count_nonzero(expansion.null_noise(noise)[:, :2]) == 0


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_axes_may_be_counted_from_either_end(dim: int) -> None:
    expansion, x = Expansion.cycle(4, 6), normal(4, 4)
    expected = x.index_select(dim, expansion.source)
    assert torch.equal(expansion.write(x, dim), expected)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_grown_layer_writes_the_grown_output(noise: float) -> None:
    weight, bias, x = normal(5, 4), normal(5, seed=1), normal(9, 4, seed=2)
    inputs, outputs = Expansion.cycle(4, 7, scale=0.3), Expansion.zero_pad(5, 8, scale=-2.0)
    grown = expand_linear(
        weight, bias, inputs=inputs, outputs=outputs, noise=noise, generator=seeded()
    )
    output = torch.nn.functional.linear(inputs.write(x), grown.weight, grown.bias)
    expected = outputs.write(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(output, expected, rtol=0, atol=ROUNDING)


def test_noise_has_the_size_that_was_asked_for() -> None:
    weight, twice = normal(200, 200), Expansion.repeat(200, 2)
    still = expand_linear(weight, None, inputs=twice, outputs=twice).weight
    noisy = expand_linear(
        weight, None, inputs=twice, outputs=twice, noise=0.3, generator=seeded()
    ).weight
    ratio = (noisy - still).square().mean().sqrt() / still.square().mean().sqrt()
    # 80,000 independent entries: the root mean square has a standard error of 0.3 / 400.
    assert abs(ratio - 0.3) < 4 * 0.3 / 400


def test_noise_comes_from_the_generator_alone() -> None:
    weight, twice = normal(3, 4), Expansion.repeat(4, 2)
    given = {"inputs": twice, "outputs": Expansion.identity(3)}
    state = torch.get_rng_state()
    one = expand_linear(weight, None, **given, noise=0.5, generator=seeded(1)).weight
    two = expand_linear(weight, None, **given, noise=0.5, generator=seeded(1)).weight
    expand_linear(weight, None, **given)
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_factors_of_the_article_for_the_feedforward() -> None:
    stream, inside = Expansion.repeat(3, 2, scale=2**-0.5), Expansion.repeat(5, 2)
    one = torch.ones(5, 3, dtype=torch.float64)
    first = expand_linear(one, one[:, 0], inputs=stream, outputs=inside)
    second = expand_linear(one.T, one[0], inputs=inside, outputs=stream)
    assert first.weight[0, 0].item() == pytest.approx(2**-0.5, abs=1e-15)
    assert first.bias[0].item() == 1.0
    assert second.weight[0, 0].item() == pytest.approx(0.3535533906, abs=1e-10)
    # Not 1/2, which the article's table says: the stream is the old one divided by root 2.
    assert second.bias[0].item() == pytest.approx(2**-0.5, abs=1e-15)


def test_factors_of_the_article_for_query_and_key() -> None:
    stream, query = Expansion.repeat(3, 2, scale=2**-0.5), Expansion.repeat(3, 2, scale=2**-0.25)
    one = torch.ones(3, 3, dtype=torch.float64)
    grown = expand_linear(one, one[0], inputs=stream, outputs=query)
    assert grown.weight[0, 0].item() == pytest.approx(0.5946035575, abs=1e-10)
    assert grown.bias[0].item() == pytest.approx(0.8408964153, abs=1e-10)


def network(width: int) -> torch.nn.Module:
    parts = torch.nn.Linear(3, width), torch.nn.GELU(), torch.nn.Linear(width, 2)
    return torch.nn.Sequential(*parts).double()


RULES = [
    ParameterRule("0.weight", ("+hidden", None)),
    ParameterRule("0.bias", ("+hidden",)),
    ParameterRule("2.weight", (None, "-hidden")),
    ParameterRule("2.bias", "copy"),
]


def gradients_of_copies(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    small, large = network(4), network(8)
    large.load_state_dict(
        expand_state_dict(
            small.state_dict(),
            RULES,
            {"hidden": Expansion.repeat(4, 2)},
            noise=noise,
            generator=seeded(),
        )
    )
    x = normal(20, 3)
    torch.testing.assert_close(large(x), small(x), rtol=0, atol=ROUNDING)
    large(x).square().sum().backward()
    gradient = large[0].weight.grad
    return gradient[0::2], gradient[1::2]


def test_copies_receive_equal_gradients_without_noise() -> None:
    one, two = gradients_of_copies(0.0)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_noise_makes_the_gradients_of_copies_differ() -> None:
    one, two = gradients_of_copies(0.3)
    assert (one - two).norm() / one.norm() > 1e-3


def test_chunks_of_an_axis_grow_each_in_its_own_way() -> None:
    weight = normal(2, 6)
    expansions = {
        "query": Expansion.zero_pad(2, 3),
        "key": Expansion.repeat(2, 2, scale=3.0),
        "value": Expansion.cycle(2, 3),
    }
    rule = ParameterRule("w", (None, "+query/key/value"))
    grown = expand_state_dict({"w": weight}, [rule], expansions)["w"]
    parts = zip(weight.chunk(3, 1), expansions.values(), strict=True)
    assert torch.equal(grown, torch.cat([e.write(part) for part, e in parts], 1))


def test_empty_queries_start_at_random_only_where_their_keys_are_empty() -> None:
    state = {"q": normal(4, 3)}
    rules = [ParameterRule("q", ("+query", None))]
    rotary = Expansion.rotary(2, 2, 2)
    both = {"query": rotary, "key": Expansion.rotary(1, 2, 2)}
    grown = expand_state_dict(state, rules, both, noise=0.1, generator=seeded())["q"]
    assert (grown != 0).all()
    alone = expand_state_dict(state, rules, {"query": rotary}, noise=0.1, generator=seeded())["q"]
    assert torch.equal(alone, rotary.write(state["q"], 0))
    other = {"query": rotary, "key": Expansion.repeat(2, 2)}
    assert torch.equal(
        expand_state_dict(state, rules, other, noise=0.1, generator=seeded())["q"], alone
    )


def test_the_multiplier_multiplies() -> None:
    rule = ParameterRule("g", ("+s",), 0.25)
    grown = expand_state_dict({"g": torch.ones(2)}, [rule], {"s": Expansion.repeat(2, 2)})
    assert torch.equal(grown["g"], torch.full((4,), 0.25))


def test_the_first_rule_that_matches_the_whole_name_counts() -> None:
    rules = [ParameterRule("a", "copy"), ParameterRule("a.*", ("+s",))]
    expansions = {"s": Expansion.repeat(1, 2)}
    grown = expand_state_dict({"a": torch.ones(1), "ab": torch.ones(1)}, rules, expansions)
    assert (len(grown["a"]), len(grown["ab"])) == (1, 2)


def test_buffers_of_any_kind_are_copied() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    grown = expand_state_dict({"mask": mask}, [ParameterRule("mask", "copy")], {})
    assert torch.equal(grown["mask"], mask)
    assert grown["mask"].data_ptr() != mask.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_keep_the_dtype_and_carry_no_graph(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(normal(4, 6, dtype=dtype)).T
    rule = ParameterRule("w", ("-s", "+t"))
    expansions = {"s": Expansion.repeat(6, 2), "t": Expansion.cycle(4, 5)}
    grown = expand_state_dict({"w": weight}, [rule], expansions, noise=0.1, generator=seeded())["w"]
    assert grown.dtype == dtype
    assert grown.is_contiguous()
    assert not grown.requires_grad


def test_factors_are_rounded_once() -> None:
    """1 / (3 s) and the multiplier act in float64; in float32 each would round."""
    weight = normal(1, 50, dtype=torch.float32)
    rule = ParameterRule("w", (None, "-s"), 0.1)
    thrice = Expansion.repeat(50, 3, scale=0.7)
    grown = expand_state_dict({"w": weight}, [rule], {"s": thrice})["w"]
    exact = weight.double() * 0.1 / (3 * 0.7)
    assert torch.equal(grown[:, ::3], exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_entries_are_no_infinite_ones(dtype: torch.dtype) -> None:
    large = torch.full((3,), torch.finfo(dtype).max / 2, dtype=dtype)
    grown = expand_state_dict({"w": large}, [ParameterRule("w", (None,))], {})["w"]
    assert torch.equal(grown, large)


def test_an_unchanged_parameter_is_a_new_tensor() -> None:
    weight = normal(3)
    grown = expand_state_dict({"w": weight}, [ParameterRule("w", (None,))], {})["w"]
    assert torch.equal(grown, weight)
    assert grown.data_ptr() != weight.data_ptr()


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    weight, thrice = normal(5, 4), Expansion.repeat(4, 3, scale=0.7)
    given = {"inputs": thrice, "outputs": Expansion.zero_pad(5, 9)}
    on_cpu = expand_linear(weight, None, **given, noise=0.5, generator=seeded()).weight
    on_gpu = expand_linear(weight.cuda(), None, **given, noise=0.5, generator=seeded()).weight
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=ROUNDING)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Expansion(torch.tensor([0, 2]), 2), "from -1 to 1, got 2"),
        (lambda: Expansion(torch.tensor([0, -2]), 1), "got -2"),
        (lambda: Expansion(torch.tensor([0, 0]), 2), "unit 1 has none"),
        (lambda: Expansion(torch.tensor([0.0]), 1), "integers"),
        (lambda: Expansion(torch.tensor([[0]]), 1), "vector"),
        (lambda: Expansion(torch.tensor([0]), 1, 0.0), "scale"),
        (lambda: Expansion(torch.tensor([0]), 1, math.nan), "scale"),
        (lambda: Expansion.repeat(4, 0), "factor must be at least 1"),
        (lambda: Expansion.repeat(4, 2, block=3), "block must divide"),
        (lambda: Expansion.cycle(4, 3), "at least the old size 4, got 3"),
        (lambda: Expansion.zero_pad(4, 3), "at least the old size 4, got 3"),
        (lambda: Expansion.rotary(2, 3, 2), "head_dim must be even, got 3"),
        (lambda: Expansion.rotary(2, 4, 0), "factor must be at least 1"),
        (lambda: Expansion.rotary(2, 4, 2, layout="pairs"), "layout"),
        (lambda: Expansion.identity(3).write(torch.ones(2, 4)), "length 4, .* expects 3"),
        (lambda: Expansion.repeat(3, 2).read(torch.ones(6)), "length 6, .* expects 3"),
        (lambda: Expansion.repeat(3, 2).null_noise(torch.ones(3)), "length 3, .* expects 6"),
        (lambda: Expansion.identity(3).write(torch.tensor(1.0)), "no axis -1"),
    ],
)
def test_expansions_refuse(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state_dict": {"x": torch.ones(1), "y": torch.ones(1)}}, "x, y"),
        ({"rules": [ParameterRule("w", ("+s",))]}, r"\(2, 3\).* 1 axes"),
        ({"rules": [ParameterRule("w", (None, "-t"))]}, "'t', which w needs"),
        ({"rules": [ParameterRule("w", ("-s", None))]}, "axis 0 of w has length 2, .* expects 3"),
        ({"noise": -0.1}, "noise"),
        ({"noise": math.nan}, "noise"),
        ({"state_dict": {"w": torch.full((2, 3), math.inf)}}, "w must be finite"),
    ],
)
def test_state_dicts_are_refused_with_both_numbers(given: dict, words: str) -> None:
    whole = {
        "state_dict": {"w": torch.ones(2, 3)},
        "rules": [ParameterRule("w", (None, "-s"))],
        "expansions": {"s": Expansion.repeat(3, 2)},
    }
    with pytest.raises(ValueError, match=words):
        expand_state_dict(**{**whole, **given})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments", [("(", "copy"), ("w", "stream"), ("w", ("stream",)), ("w", (), math.inf)]
)
def test_rules_that_mean_nothing_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"pattern|axes|axis|multiplier"):
        ParameterRule(*arguments)
