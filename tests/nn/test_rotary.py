"""Rotary embeddings against fixed numbers, matrix exponentials and the formula plane by plane."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.nn.attention import MultiHeadAttention
from kexue.nn.rotary import (
    RotaryEmbedding,
    apply_rotary,
    grid_positions,
    rotary_frequencies,
    rotary_generators,
    rotary_matrix,
)

LAYOUTS = ("interleaved", "half")
# The oracles are written down to ten decimals.
WRITTEN = 6e-11
EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
COUNT = torch.arange(1, 9, dtype=torch.float64)[None]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plane_by_plane(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """The definition, one number at a time, for x (length, dim) and angles (length, planes)."""
    out = x.clone()
    planes = angles.shape[1]
    for n in range(len(x)):
        for k in range(planes):
            a, b = (2 * k, 2 * k + 1) if layout == "interleaved" else (k, k + planes)
            u, v, phi = float(x[n, a]), float(x[n, b]), float(angles[n, k])
            out[n, a] = u * math.cos(phi) - v * math.sin(phi)
            out[n, b] = v * math.cos(phi) + u * math.sin(phi)
    return out


@pytest.mark.parametrize(
    ("layout", "rotated"),
    [
        (
            "interleaved",
            [
                [-1.2722325127, -1.8388649851, 1.6839286407, 4.7079065765],
                [4.8177771675, 6.1472777035, 6.9759685360, 8.0209639685],
            ],
        ),
        (
            "half",
            [
                [-1.6955925369, 0.1375517383, 2.7886815998, 3.9759820360],
                [-4.8088424749, 6.3230593481, 7.0868367369, 8.0119639820],
            ],
        ),
    ],
)
def test_one_axis_at_position_three(layout: str, rotated: list[list[float]]) -> None:
    rope = RotaryEmbedding(8, layout=layout)
    out = rope.rotate(COUNT, positions=torch.tensor([3]))
    expected = torch.tensor(rotated, dtype=torch.float64).reshape(1, 8)
    assert (out - expected).abs().max() < WRITTEN


@pytest.mark.parametrize(
    ("layout", "rotated"),
    [
        (
            "interleaved",
            [
                [-2.2347416902, 0.0770037537, 2.9194053532, 4.0591960267],
                [7.1718565753, -3.0926482605, 6.5914184686, 8.3398562681],
            ],
        ),
        (
            "half",
            [
                [-4.9626339707, 1.8796080132, 7.5634564790, 3.5951676874],
                [-1.1714367559, 6.0387973734, -0.8911375257, 8.1899187602],
            ],
        ),
    ],
)
def test_two_axes_at_position_two_five(layout: str, rotated: list[list[float]]) -> None:
    rope = RotaryEmbedding(8, axes=2, layout=layout)
    out = rope.rotate(COUNT, positions=torch.tensor([[2, 5]]))
    expected = torch.tensor(rotated, dtype=torch.float64).reshape(1, 8)
    assert (out - expected).abs().max() < WRITTEN


def test_each_axis_has_the_schedule_of_its_own_dimension() -> None:
    axial = torch.tensor([[1, 0], [0.01, 0], [0, 1], [0, 0.01]], dtype=torch.float64)
    torch.testing.assert_close(RotaryEmbedding(8, axes=2).frequencies, axial, rtol=2 * EPS, atol=0)
    uneven = RotaryEmbedding(10, axes=3, axis_dims=(4, 4, 2), base=(10_000.0, 100.0, 7.0))
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[:2, 0] = rotary_frequencies(4)
    expected[2:4, 1] = rotary_frequencies(4, base=100.0)
    expected[4, 2] = 1.0
    assert torch.equal(uneven.frequencies, expected)


def test_average_kernel_decays_with_distance() -> None:
    # (1/32) sum_i cos(n θ_i) is the logit of equal queries and keys of length one.
    n = torch.tensor([0, 1, 10, 100, 1000])
    ones = torch.full((5, 64), 1 / math.sqrt(64), dtype=torch.float64)
    query, key = RotaryEmbedding(64)(ones, ones, positions=torch.zeros(5), key_positions=n)
    kernel = (query * key).sum(-1)
    expected = [1.0, 0.9661509894, 0.6578634008, 0.5585833995, 0.2789364609]
    assert (kernel - torch.tensor(expected, dtype=torch.float64)).abs().max() < WRITTEN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotation_is_the_matrix_exponential_of_the_generators(axes: int, layout: str) -> None:
    rope = RotaryEmbedding(12, axes=axes, layout=layout)
    positions = 5 * rand(7, axes, seed=1)
    x = rand(7, 12)
    matrices = rotary_matrix(positions, rope.generators())
    out = rope.rotate(x, positions=positions.squeeze(-1) if axes == 1 else positions)
    expected = (matrices @ x[..., None]).squeeze(-1)
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_inner_products_depend_on_differences_of_positions_only(axes: int, layout: str) -> None:
    rope = RotaryEmbedding(12, axes=axes, layout=layout)
    # Each axis moves by another distance: equal shifts would forgive axes that are mixed up.
    a, b = torch.tensor([[3, -1, 7]])[:, :axes], torch.tensor([[-2, 4, 11]])[:, :axes]
    a, b = (p.squeeze(-1) if axes == 1 else p for p in (a, b))
    q, k = rand(1, 12), rand(1, 12, seed=1)
    both = (rope.rotate(q, positions=a) * rope.rotate(k, positions=b)).sum()
    relative = (q * rope.rotate(k, positions=b - a)).sum()
    absolute = (q * rope.rotate(k, positions=b)).sum()
    assert abs(both - relative) < 1e-13
    assert abs(absolute - relative) > 0.1


@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    axes=st.integers(1, 3),
    planes=st.integers(1, 4),
    passing=st.integers(0, 3),
    length=st.integers(0, 5),
    inverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rotation_turns_each_plane_and_keeps_norms(
    layout: str, axes: int, planes: int, passing: int, length: int, inverse: bool, seed: int
) -> None:
    rope = RotaryEmbedding(
        2 * planes, axes=axes, layout=layout, frequencies=rand(planes, axes, seed=seed)
    )
    x = rand(length, 2 * planes + passing, seed=seed + 1)
    positions = 10 * rand(length, axes, seed=seed + 2)
    if axes == 1:
        positions = positions.squeeze(-1)
    out = rope.rotate(x, positions=positions, inverse=inverse)
    angles = rope.angles(positions)
    # Two products and a sum, each rounded to half a unit; entries are below 5.
    tolerance = 4 * EPS * 5
    expected = plane_by_plane(x, -angles if inverse else angles, layout)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=8 * EPS, atol=0)
    back = rope.rotate(out, positions=positions, inverse=not inverse)
    torch.testing.assert_close(back, x, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_doubling_x_doubles_every_bit_of_the_result(layout: str) -> None:
    rope = RotaryEmbedding(8, layout=layout)
    x = rand(3, 8, dtype=torch.float32)
    assert torch.equal(rope.rotate(2 * x), 2 * rope.rotate(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_rotary_with_inverse_undoes_itself(layout: str) -> None:
    x, angles = rand(2, 3, 4, 10), rand(4, 4, seed=1)
    there = apply_rotary(x, angles, layout=layout)
    assert not torch.allclose(there[..., :8], x[..., :8])
    assert torch.equal(there[..., 8:], x[..., 8:])
    back = apply_rotary(there, angles, layout=layout, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=40 * EPS)


def test_batched_positions_belong_to_the_batch_even_where_there_are_as_many_heads() -> None:
    rope = RotaryEmbedding(6, axes=2, axis_dims=(2, 4))
    x, positions = rand(3, 3, 5, 6), torch.arange(30).reshape(3, 5, 2)
    together = rope.rotate(x, positions=positions)
    for i in range(3):
        for head in range(3):
            alone = rope.rotate(x[i, head], positions=positions[i])
            assert torch.equal(together[i, head], alone)


def test_one_row_of_positions_serves_the_whole_batch() -> None:
    rope = RotaryEmbedding(4)
    x, positions = rand(2, 3, 5, 4), torch.tensor([[4, 3, 2, 1, 0]])
    assert torch.equal(rope.rotate(x, positions=positions), rope.rotate(x, positions=positions[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_default_positions_count_from_zero_and_the_table_grows(layout: str) -> None:
    rope = RotaryEmbedding(8, layout=layout)
    for length in (3, 1, 17, 5, 0):
        x = rand(2, length, 8)
        assert torch.equal(rope.rotate(x), rope.rotate(x, positions=torch.arange(length)))


def test_the_kept_table_follows_a_change_of_the_frequencies() -> None:
    rope, x = RotaryEmbedding(8), rand(5, 8)
    rope.rotate(x)
    rope.frequencies *= 0.5
    assert torch.equal(rope.rotate(x), rope.rotate(x, positions=torch.arange(5)))
    rope.frequencies = rope.frequencies * 0.5
    assert torch.equal(rope.rotate(x), rope.rotate(x, positions=torch.arange(5)))


def test_a_table_made_in_inference_mode_serves_training() -> None:
    rope, x = RotaryEmbedding(8), rand(5, 8).requires_grad_()
    with torch.inference_mode():
        rope.rotate(x)
    rope.rotate(x).sum().backward()
    assert x.grad is not None


def test_keys_have_the_positions_of_queries_unless_they_have_their_own() -> None:
    rope = RotaryEmbedding(8)
    q, k = rand(2, 4, 8), rand(2, 4, 8, seed=1)
    places, others = torch.tensor([5, 6, 7, 8]), torch.tensor([0, 2, 4, 6])
    query, key = rope(q, k, positions=places)
    assert torch.equal(query, rope.rotate(q, positions=places))
    assert torch.equal(key, rope.rotate(k, positions=places))
    _, key = rope(q, k, positions=places, key_positions=others)
    assert torch.equal(key, rope.rotate(k, positions=others))
    _, key = rope(q, k.float(), positions=places)
    assert torch.equal(key, rope.rotate(k.float(), positions=places))


def test_default_positions_of_queries_and_keys_of_other_lengths() -> None:
    rope = RotaryEmbedding(8)
    query, key = rope(rand(3, 8), rand(6, 8, seed=1))
    assert torch.equal(query, rope.rotate(rand(3, 8)))
    assert torch.equal(key, rope.rotate(rand(6, 8, seed=1)))


def test_precision_at_a_position_of_a_million() -> None:
    position = 1_000_003
    with mpmath.workdps(30):
        exact = [
            mpmath.cos(position * mpmath.mpf(10_000) ** (mpmath.mpf(-2 * i) / 64))
            for i in range(32)
        ]
    for value, written in zip(exact, (-0.877986491585, -0.136176048805, -0.481163895656)):  # noqa: B905
        assert abs(float(value) - written) < 6e-13
    # A unit vector along u in each plane: the rotated u is the cosine.
    x = torch.tensor([1.0, 0.0]).repeat(1, 32)
    cosine = RotaryEmbedding(64).rotate(x, positions=torch.tensor([position]))[0, ::2]
    error = (cosine.double() - torch.tensor([float(c) for c in exact]).double()).abs().max()
    # Half a unit in the last place of float32 below 1; the angle's error of 1e-10 adds nothing.
    assert error < 3.1e-8
    single = (position * rotary_frequencies(64).float()).cos()
    assert (single - torch.tensor([float(c) for c in exact])).abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_single_and_rounded_once(dtype: torch.dtype) -> None:
    rope, x = RotaryEmbedding(16), rand(300, 16).to(dtype)
    out = rope.rotate(x)
    assert out.dtype == dtype
    assert torch.equal(out, rope.rotate(x.float()).to(dtype))


@pytest.mark.parametrize("convert", ["bfloat16", "half", "float"])
@pytest.mark.parametrize("learnable", [False, True])
def test_frequencies_keep_their_precision_when_a_model_is_converted(
    convert: str, learnable: bool
) -> None:
    model = torch.nn.ModuleDict({"rope": RotaryEmbedding(64, learnable=learnable)})
    before = model["rope"].frequencies.detach().clone()
    getattr(model, convert)()
    model.to(torch.bfloat16)
    assert torch.equal(model["rope"].frequencies, before)
    assert model["rope"].frequencies.dtype == torch.float64


def test_frequencies_move_to_another_device() -> None:
    rope = RotaryEmbedding(8).to("meta", torch.bfloat16)
    assert rope.frequencies.device.type == "meta"
    assert rope.frequencies.dtype == torch.float64


def test_frequencies_stay_behind_where_a_device_has_no_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "kexue.nn.rotary.embedding._has_float64", lambda device: device.type != "meta"
    )
    assert RotaryEmbedding(8).to("meta").frequencies.device.type == "cpu"


def test_autocast_does_not_reach_the_rotation() -> None:
    rope, x = RotaryEmbedding(16), rand(300, 16, dtype=torch.float32)
    places = torch.arange(300) + 1000
    with torch.autocast("cpu", torch.bfloat16):
        kept, given = rope.rotate(x), rope.rotate(x, positions=places)
    assert torch.equal(kept, rope.rotate(x))
    assert torch.equal(given, rope.rotate(x, positions=places))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_features_frequencies_and_positions(layout: str, inverse: bool) -> None:
    rope = RotaryEmbedding(4, axes=2, layout=layout, frequencies=rand(2, 2, seed=3), learnable=True)

    def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Rotate(rope, inverse), {"rope.frequencies": frequencies}, (x, positions)
        )

    inputs = (rand(2, 2, 2, 5), rand(2, 2, 2, seed=1), rand(2, 2, seed=2))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(rotate, inputs)
    assert torch.autograd.gradgradcheck(rotate, inputs)


class _Rotate(torch.nn.Module):
    def __init__(self, rope: RotaryEmbedding, inverse: bool) -> None:
        super().__init__()
        self.rope = rope
        self.inverse = inverse

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.rotate(x, positions=positions, inverse=self.inverse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_inverse_rotation_and_nothing_of_x_is_saved(layout: str) -> None:
    rope, gradient = RotaryEmbedding(8, layout=layout), rand(2, 5, 8, seed=1)
    x = rand(2, 5, 8).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = rope.rotate(x)
    out.backward(gradient)
    assert torch.equal(x.grad, rope.rotate(gradient, inverse=True))
    assert sum(tensor.numel() for tensor in saved) == 5 * 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_over_features_positions_or_both_is_a_loop(layout: str) -> None:
    x, angles = rand(3, 4, 8), rand(3, 4, 4, seed=1)

    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary(x, angles, layout=layout)

    for dims in ((0, 0), (0, None), (None, 0)):
        one, two = x if dims[0] == 0 else x[0], angles if dims[1] == 0 else angles[0]
        out = torch.func.vmap(rotate, in_dims=dims)(one, two)
        loop = [rotate(one[i] if dims[0] == 0 else one, two[i] if dims[1] == 0 else two)
                for i in range(3)]  # fmt: skip
        assert torch.equal(out, torch.stack(loop))
    gradient = torch.func.vmap(torch.func.grad(lambda x, a: rotate(x, a).pow(3).sum()))(x, angles)
    one = torch.func.grad(lambda x, a: rotate(x, a).pow(3).sum())(x[1], angles[1])
    torch.testing.assert_close(gradient[1], one, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", ["transposed", "odd stride", "odd offset", "expanded"])
def test_any_strides_of_x_give_the_same(layout: str, make: str) -> None:
    plain = rand(2, 5, 3, 8)
    if make == "transposed":
        x = plain.transpose(1, 2)
    elif make == "odd stride":
        x = torch.cat([plain, plain[..., :1]], -1)[..., :8].transpose(1, 2)
    elif make == "odd offset":
        x = torch.cat([plain[..., :1], plain, plain[..., :1]], -1)[..., 1:9].transpose(1, 2)
    else:
        x = plain[:1].expand(2, -1, -1, -1).transpose(1, 2)
    rope = RotaryEmbedding(8, layout=layout)
    before = x.clone()
    assert torch.equal(rope.rotate(x), rope.rotate(x.contiguous()))
    assert torch.equal(x, before)


def test_length_zero_gives_an_empty_tensor() -> None:
    for layout in LAYOUTS:
        rope = RotaryEmbedding(8, axes=2, layout=layout)
        out = rope.rotate(torch.empty(2, 0, 9), positions=torch.empty(0, 2))
        assert out.shape == (2, 0, 9)
        assert RotaryEmbedding(8, layout=layout).rotate(torch.empty(0, 8)).shape == (0, 8)


def test_grid_is_row_major_and_rows_drive_the_first_planes() -> None:
    assert torch.equal(grid_positions(2, 3, 2), torch.cartesian_prod(*map(torch.arange, (2, 3, 2))))
    assert grid_positions(4).shape == (4, 1)
    assert grid_positions(2, 2).dtype == torch.int64
    x = rand(6, 8)
    out = RotaryEmbedding(8, axes=2).rotate(x, positions=grid_positions(2, 3))
    assert torch.equal(out[:3, :4], x[:3, :4])  # the first row: nothing turns along rows
    assert torch.equal(out[::3, 4:], x[::3, 4:])  # the first column


def test_shifting_a_crop_on_the_grid_changes_no_logit() -> None:
    rope = RotaryEmbedding(16, axes=2)
    q, k, grid = rand(2, 12, 16), rand(2, 12, 16, seed=1), grid_positions(3, 4)
    logits = []
    for shift in ((0, 0), (17, -5)):
        query, key = rope(q, k, positions=grid + torch.tensor(shift))
        logits.append(query @ key.mT)
    assert (logits[0] - logits[1]).abs().max() < 1e-12


def test_attention_on_a_shifted_grid_is_the_same_and_on_a_transposed_one_is_not() -> None:
    rope = RotaryEmbedding(8, axes=2, base=100.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = MultiHeadAttention(16, 2, rotary=rope).double()
    x, grid = rand(2, 12, 16), grid_positions(3, 4)
    output = attention(x, positions=grid).output
    shifted = attention(x, positions=grid + torch.tensor([5, -3])).output
    # Logits agree to rounding of sums of 8 products; softmax and averages keep that.
    assert (shifted - output).abs().max() < 1e-13
    assert (attention(x, positions=grid.flip(-1)).output - output).abs().max() > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_holds_learnt_frequencies_only(layout: str) -> None:
    fixed = RotaryEmbedding(8, layout=layout)
    fixed.rotate(rand(5, 8))
    assert fixed.state_dict() == {}
    assert list(RotaryEmbedding(8, learnable=True).state_dict()) == ["frequencies"]


def test_copies_and_pickles_leave_the_kept_tables_behind() -> None:
    rope = RotaryEmbedding(8)
    size = len(pickle.dumps(rope))
    x = rand(4096, 8)
    out = rope.rotate(x)
    assert len(pickle.dumps(rope)) == size
    for again in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert torch.equal(again.rotate(x), out)


def test_given_frequencies_are_copied() -> None:
    table = rand(4, 2)
    rope = RotaryEmbedding(8, axes=2, frequencies=table)
    table.zero_()
    assert rope.frequencies.abs().min() > 0


def test_learnable_frequencies_learn() -> None:
    rope = RotaryEmbedding(4, frequencies=torch.tensor([[1.0], [0.1]]), learnable=True)
    target = RotaryEmbedding(4, frequencies=torch.tensor([[0.9], [0.15]]))
    optimizer = torch.optim.Adam(rope.parameters(), lr=0.01)
    x = rand(6, 4, dtype=torch.float32)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (rope.rotate(x) - target.rotate(x)).pow(2).mean()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(rope.frequencies, target.frequencies, rtol=0, atol=5e-3)


@pytest.mark.bad_input  # dynamo cannot trace through the shape checks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotate_compiles_without_a_graph_break(layout: str) -> None:
    torch._dynamo.reset()
    rope = RotaryEmbedding(8, axes=2, layout=layout)
    compiled = torch.compile(
        lambda x, p: rope.rotate(x, positions=p), fullgraph=True, backend="aot_eager"
    )
    x, positions = rand(2, 3, 6, 10).requires_grad_(), grid_positions(2, 3)
    out = compiled(x, positions)
    torch.testing.assert_close(out, rope.rotate(x, positions=positions), rtol=0, atol=20 * EPS)
    out.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=0, atol=80 * EPS)


@pytest.mark.bad_input
def test_default_positions_compile_without_a_graph_break() -> None:
    torch._dynamo.reset()
    rope, x = RotaryEmbedding(8), rand(5, 8)
    compiled = torch.compile(rope.rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), rope.rotate(x), rtol=0, atol=20 * EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_agrees_with_the_cpu(layout: str) -> None:
    rope, x = RotaryEmbedding(64, layout=layout), rand(2, 3, 50, 64, dtype=torch.float32)
    expected = rope.rotate(x)
    on_cuda = copy.deepcopy(rope).cuda().rotate(x.cuda())
    assert on_cuda.is_cuda
    torch.testing.assert_close(on_cuda.cpu(), expected, rtol=0, atol=4 * EPS32 * 5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 7}, "dim must be even and at least 2, got 7"),
        ({"dim": 0}, "dim must be even and at least 2, got 0"),
        ({"dim": 8, "axes": 0}, "axes must be at least 1, got 0"),
        ({"dim": 8, "axes": 3}, r"dim \(8\) must be divisible by twice the number of axes \(6\)"),
        ({"dim": 8, "axes": 2, "axis_dims": (3, 5)}, "even numbers"),
        ({"dim": 8, "axes": 2, "axis_dims": (4, 2)}, "sum 8"),
        ({"dim": 8, "axes": 2, "axis_dims": (8,)}, "axis_dims must be 2"),
        ({"dim": 8, "layout": "neox"}, "interleaved, half, got 'neox'"),
        ({"dim": 8, "base": 0.0}, "base must be positive"),
        ({"dim": 8, "base": float("nan")}, "base must be positive"),
        ({"dim": 8, "axes": 2, "base": (1e4,)}, "one for each of 2 axes"),
        ({"dim": 8, "frequencies": torch.ones(4)}, r"shape \(4, 1\)"),
        ({"dim": 8, "frequencies": torch.full((4, 1), torch.nan)}, "finite"),
    ],
)
def test_wrong_configurations_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RotaryEmbedding(**arguments)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("axes", "x", "positions", "words"),
    [
        (1, torch.ones(5, 6), None, "at least the 8 features that are rotated, got 6"),
        (1, torch.ones(5, 8), torch.arange(4), r"positions \(4\) must equal the length \(5\)"),
        (1, torch.ones(5, 8), torch.zeros(2, 5), "from the left"),
        (1, torch.ones(2, 3, 5, 8), torch.zeros(3, 5), "from the left"),
        (1, torch.ones(5, 8), torch.tensor(1), "positions must be"),
        (1, torch.ones(5, 8), torch.ones(5).bool(), "positions must be"),
        (1, torch.ones(5, 8), [0, 1, 2, 3, 4], "positions must be"),
        (2, torch.ones(5, 8), torch.zeros(5, 3), r"number of axes \(2\)"),
        (2, torch.ones(5, 8), torch.arange(5), "positions must be"),
        (2, torch.ones(5, 8), None, "positions must be given for 2 axes"),
        (1, torch.ones(5, 8).long(), None, "x must be a floating-point tensor"),
        (1, torch.ones(8), None, "x must be a floating-point tensor"),
    ],
)
def test_wrong_input_is_refused(axes: int, x: Tensor, positions: Any, words: str) -> None:
    rope = RotaryEmbedding(8, axes=axes)
    with pytest.raises(ValueError, match=words):
        rope.rotate(x, positions=positions)
    with pytest.raises(ValueError, match=words):
        rope(x, x, positions=positions)


@pytest.mark.bad_input
def test_wrong_angles_grids_and_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match="angles must be a floating-point tensor"):
        apply_rotary(torch.ones(3, 8), torch.ones(4))
    with pytest.raises(ValueError, match="at least the 10 features"):
        apply_rotary(torch.ones(3, 8), torch.ones(3, 5))
    with pytest.raises(ValueError, match="length"):
        apply_rotary(torch.ones(3, 8), torch.ones(4, 4))
    with pytest.raises(ValueError, match="interleaved, half"):
        apply_rotary(torch.ones(3, 8), torch.ones(3, 4), layout="pairs")
    with pytest.raises(ValueError, match="at least one size"):
        grid_positions()
    with pytest.raises(ValueError, match="at least 1, got"):
        grid_positions(3, 0)
    with pytest.raises(ValueError, match="dim must be even"):
        rotary_frequencies(5)
    with pytest.raises(ValueError, match="base must be positive"):
        rotary_frequencies(4, base=-1.0)


def test_generators_of_a_module_are_those_of_its_table() -> None:
    rope = RotaryEmbedding(8, axes=2, layout="half")
    generators = rope.generators()
    assert torch.equal(generators, rotary_generators(rope.frequencies, layout="half"))
    assert generators[1, 6, 2] == 1.0
    assert generators[1, 2, 6] == -1.0
