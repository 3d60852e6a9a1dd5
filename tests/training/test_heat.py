"""Blocks, propagation and pre-training of `kexue.training.heat`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from kexue.training.heat import (
    Block,
    LinearPropagation,
    MaskToken,
    QBHeat,
    SequencePropagation,
    block_mask,
    quarter_block,
)

EPS = torch.finfo(torch.float64).eps
PARAMETRIZATIONS, STEPS = ("shared_eigenvectors", "free"), ("exponential", "euler")
A = [[0.1, 0.2], [0.0, -0.3]]
B = [[0.05, -0.1], [0.2, 0.1]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def propagation(channels: int = 3, scale: float = 0.3, **options: Any) -> LinearPropagation:
    return LinearPropagation(
        channels, initial_scale=scale, generator=seeded(), **options
    ).double()  # fmt: skip


def prescribed(horizontal: Any, vertical: Any, step: str) -> LinearPropagation:
    given = LinearPropagation(len(horizontal), parametrization="free", step=step).double()
    given.horizontal.data = torch.tensor(horizontal, dtype=torch.float64)
    given.vertical.data = torch.tensor(vertical, dtype=torch.float64)
    return given


def one_step(matrix: Tensor, step: str, sign: int) -> Tensor:
    if step == "exponential":
        return torch.linalg.matrix_exp(sign * matrix)
    return torch.eye(len(matrix), dtype=matrix.dtype) + sign * matrix


def by_definition(module: LinearPropagation, z: Tensor, size: Any, offset: Any) -> Tensor:
    """Each position from its nearest feature, by powers of the one-step maps."""
    a, b = module.matrices()
    out = z.new_zeros(*z.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max(i - offset[0], 0), z.shape[2] - 1)
            x = min(max(j - offset[1], 0), z.shape[3] - 1)
            m, n = i - offset[0] - y, j - offset[1] - x
            right = one_step(a, module.step, 1 if n > 0 else -1).matrix_power(abs(n))
            down = one_step(b, module.step, 1 if m > 0 else -1).matrix_power(abs(m))
            path = (right @ down + down @ right) / 2
            out[:, :, i, j] = z[:, :, y, x] @ path.T
    return out


def test_quarter_blocks_at_fixed_positions() -> None:
    found = {
        position: quarter_block(8, 12, position=position)[:2]
        for position in ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    }
    assert found == {
        "top_left": (0, 0),
        "top_right": (0, 6),
        "bottom_left": (4, 0),
        "bottom_right": (4, 6),
        "center": (2, 3),
    }
    assert quarter_block(8, 12)[2:] == (4, 6)
    assert quarter_block(6, 2, position="center") == Block(1, 0, 3, 1)


def test_random_blocks_are_uniform_over_all_positions() -> None:
    generator, draws = seeded(), 3000
    counts = torch.zeros(3, 4)
    for _ in range(draws):
        block = quarter_block(4, 6, generator=generator)
        counts[block.top, block.left] += 1
    expected = draws / 12
    # Chi-square with 11 degrees of freedom: mean 11, standard deviation sqrt(22); five of them.
    assert ((counts - expected) ** 2 / expected).sum() < 11 + 5 * 22**0.5


def test_random_blocks_follow_the_generator() -> None:
    def draw(seed: int) -> list[Block]:
        generator = seeded(seed)
        return [quarter_block(20, 20, generator=generator) for _ in range(5)]

    assert draw(1) == draw(1) != draw(2)


def test_mask_is_true_outside_the_block() -> None:
    mask = block_mask((4, 5), Block(1, 2, 2, 3))
    expected = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert mask.dtype == torch.bool
    assert torch.equal(mask.int(), expected.int())


@pytest.mark.parametrize(
    ("step", "place", "value"),
    [
        ("exponential", (1, 2), (1.469523615470, 1.481636441363)),
        ("exponential", (0, 2), (1.529566271720, 1.122628728661)),
        ("exponential", (0, 0), (0.672463958409, 2.250656916863)),
        ("euler", (1, 2), (1.5, 1.4)),
        ("euler", (1, 0), (0.5, 2.6)),
        ("euler", (0, 2), (1.575, 1.04)),
    ],
)
def test_free_matrices_that_do_not_commute(step: str, place: Any, value: Any) -> None:
    z = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1)
    extended = prescribed(A, B, step)(z, size=(3, 3), offset=(1, 1))
    # The numbers are given to twelve decimals.
    assert extended[0, :, *place].tolist() == pytest.approx(value, abs=6e-13)
    assert torch.equal(extended[..., 1, 1], z[..., 0, 0])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize(("size", "offset"), [((7, 6), (2, 1)), ((3, 8), (0, 5)), ((4, 3), (1, 0))])
def test_every_position_is_the_nearest_feature_times_powers(
    parametrization: str, step: str, size: tuple[int, int], offset: tuple[int, int]
) -> None:
    module = propagation(parametrization=parametrization, step=step)
    if parametrization == "shared_eigenvectors":
        module.eigenvectors.data += 0.3 * normal(3, 3, seed=4)  # no longer orthogonal
    z = normal(2, 3, 3, 3, seed=1)
    extended = module(z, size=size, offset=offset)
    expected = by_definition(module, z, size, offset)
    # Five steps of norm below 3 and a basis of condition below 100: far below 1e5 roundings.
    assert (extended - expected).abs().max() <= 1e3 * EPS * expected.abs().max()
    top, left = offset
    assert torch.equal(extended[:, :, top : top + 3, left : left + 3], z)


def test_shared_eigenvectors_commute_and_have_the_given_rates() -> None:
    module = propagation(5)
    a, b = module.matrices()
    assert (a @ b - b @ a).norm() <= 100 * EPS * a.norm() * b.norm()
    eigenvalues = torch.linalg.eigvals(a).real.sort().values
    torch.testing.assert_close(
        eigenvalues, module.horizontal_rates.sort().values, rtol=0, atol=100 * EPS
    )


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_scale_zero_copies_the_nearest_feature(
    parametrization: str, step: str, dtype: torch.dtype
) -> None:
    module = LinearPropagation(
        4, parametrization=parametrization, step=step, initial_scale=0.0, generator=seeded()
    )
    assert all(not matrix.any() for matrix in module.matrices())
    z = normal(2, 4, 2, 3).to(dtype)
    copied = nn.functional.pad(z, (2, 1, 1, 2), mode="replicate")
    assert torch.equal(module(z, size=(5, 6), offset=(1, 2)), copied)


def test_initial_values() -> None:
    channels, scale = 400, 0.07
    shared = LinearPropagation(channels, initial_scale=scale, generator=seeded())
    basis = shared.eigenvectors.detach().double()
    identity = torch.eye(channels, dtype=torch.float64)
    assert (basis @ basis.T - identity).abs().max() < 1e-5
    # A sample standard deviation of n normals has relative standard error 1 / sqrt(2 n).
    for rates in (shared.horizontal_rates, shared.vertical_rates):
        assert float(rates.detach().std()) == pytest.approx(scale, rel=5 / (2 * channels) ** 0.5)
    free = LinearPropagation(
        channels, parametrization="free", initial_scale=scale, generator=seeded()
    )
    sequence = SequencePropagation(channels, initial_scale=scale, generator=seeded())
    for matrix in (free.horizontal, free.vertical, sequence.rate):
        assert float(matrix.detach().std()) == pytest.approx(
            scale / channels**0.5, rel=5 / (2 * channels**2) ** 0.5
        )


def test_parameters_follow_the_generator_and_no_global_state() -> None:
    for kind in (LinearPropagation, SequencePropagation):
        before = torch.get_rng_state()
        one, two = (kind(4, generator=seeded(3)).state_dict() for _ in range(2))
        other = kind(4, generator=seeded(4)).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_exact_solutions_are_continued_exactly() -> None:
    """z = V exp(a x + b y) c solves the system: its block determines the rest."""
    module = propagation(3, 0.4)
    basis = module.eigenvectors.detach()
    x, y = torch.arange(6.0).double(), torch.arange(5.0).double()
    a, b = module.horizontal_rates.detach(), module.vertical_rates.detach()
    modes = torch.exp(a[:, None, None] * x + b[:, None, None] * y[:, None])
    z = torch.einsum("ck,kyx->cyx", basis, modes * normal(3, seed=2)[:, None, None])[None]
    extended = module(z[:, :, 2:4, 1:4], size=(5, 6), offset=(2, 1))
    assert (extended - z).abs().max() <= 100 * EPS * z.abs().max()


def test_exponential_steps_return_where_euler_does_not() -> None:
    z = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1)

    def there_and_back(step: str) -> Tensor:
        module = prescribed(A, B, step)
        right = module(z, size=(1, 2), offset=(0, 0))[..., 1:]
        return module(right, size=(1, 2), offset=(0, 1))[..., :1]

    a = torch.tensor(A, dtype=torch.float64)
    assert (there_and_back("exponential") - z).abs().max() <= 20 * EPS
    lost = a @ a @ z[0, :, 0, 0]
    assert (there_and_back("euler") - z)[0, :, 0, 0].tolist() == pytest.approx(
        (-lost).tolist(), abs=20 * EPS
    )


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("step", STEPS)
def test_gradients_of_features_and_parameters(parametrization: str, step: str) -> None:
    module = propagation(2, parametrization=parametrization, step=step)
    names, values = zip(*module.named_parameters(), strict=True)

    def extended(z: Tensor, *parameters: Tensor) -> Tensor:
        options = {"size": (4, 5), "offset": (1, 2)}
        return functional_call(module, dict(zip(names, parameters, strict=True)), (z,), options)

    z = normal(2, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(extended, (z, *values))


@pytest.mark.parametrize("step", STEPS)
def test_gradients_of_sequences(step: str) -> None:
    module = SequencePropagation(2, step=step, generator=seeded()).double()

    def extended(z: Tensor, rate: Tensor) -> Tensor:
        return functional_call(module, {"rate": rate}, (z,), {"length": 6, "offset": 2})

    assert torch.autograd.gradcheck(extended, (normal(2, 2, 2).requires_grad_(), module.rate))


@pytest.mark.bad_input  # dynamo cannot trace through the shape checks
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_propagation_compiles_without_a_break(parametrization: str, step: str) -> None:
    module = propagation(parametrization=parametrization, step=step)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for run in (module, compiled):
        z = normal(2, 3, 2, 2).requires_grad_()
        out = run(z, size=(4, 5), offset=(1, 2))
        out.square().sum().backward()
        results.append((out.detach(), z.grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=float(100 * EPS * one.abs().max()))


@pytest.mark.slow
def test_the_whole_model_compiles_without_a_break() -> None:
    """Forwards and backwards, in a process where no shape checks stand in the way of the graph."""
    program = """
import torch
from torch import nn
from kexue.training.heat import Block, LinearPropagation, QBHeat
torch.manual_seed(0)
model = QBHeat(nn.Conv2d(1, 4, 2, 2), LinearPropagation(4), nn.ConvTranspose2d(4, 1, 2, 2)).double()
images, gradients = torch.randn(2, 1, 8, 8, dtype=torch.float64), []
for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
    model.zero_grad()
    run(images, Block(2, 4, 4, 4)).loss.backward()
    gradients.append([p.grad for p in model.parameters()])
for one, two in zip(*gradients):
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
"""
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_follows_the_features(parametrization: str, dtype: torch.dtype) -> None:
    module = LinearPropagation(3, parametrization=parametrization, generator=seeded())
    z = normal(2, 3, 2, 2).to(dtype)
    out = module(z, size=(4, 4), offset=(1, 1))
    exact = module.double()(z.double(), size=(4, 4), offset=(1, 1))
    assert out.dtype == dtype
    # Computed in single at least, then rounded once.
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (out.double() - exact).abs().max() <= 20 * rounding * exact.abs().max()
    assert MaskToken(3)(z, size=(4, 4)).dtype == dtype
    sequence = SequencePropagation(3, generator=seeded())
    assert sequence(z[:, :, 0].mT, length=4).dtype == dtype


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_autocast_does_not_reach_the_matrices(parametrization: str) -> None:
    module = LinearPropagation(8, parametrization=parametrization, generator=seeded())
    z = normal(2, 8, 2, 2).float()
    plain = module(z, size=(4, 4), offset=(1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(z, size=(4, 4), offset=(1, 1)), plain)
        assert all(matrix.dtype == torch.float32 for matrix in module.matrices())


@pytest.mark.parametrize("step", STEPS)
def test_sequences_are_extended_at_both_ends(step: str) -> None:
    module = SequencePropagation(3, step=step, initial_scale=0.8, generator=seeded()).double()
    z = normal(2, 2, 3)
    out = module(z, length=7, offset=2)
    rate = module.rate.detach()
    forwards, backwards = one_step(rate, step, 1), one_step(rate, step, -1)
    assert torch.equal(out[:, 2:4], z)
    for n in range(1, 4):
        expected = z[:, 1] @ forwards.matrix_power(n).T
        torch.testing.assert_close(out[:, 3 + n], expected, rtol=0, atol=1e3 * EPS)
    for n in range(1, 3):
        expected = z[:, 0] @ backwards.matrix_power(n).T
        torch.testing.assert_close(out[:, 2 - n], expected, rtol=0, atol=1e3 * EPS)


def test_a_row_of_a_map_is_a_sequence() -> None:
    sequence = SequencePropagation(3, initial_scale=0.5, generator=seeded()).double()
    maps = prescribed(sequence.rate.detach().tolist(), torch.zeros(3, 3).tolist(), "exponential")
    z = normal(2, 4, 3)
    row = maps(z.mT[:, :, None], size=(1, 9), offset=(0, 2))
    extended = sequence(z, length=9, offset=2)
    torch.testing.assert_close(row[:, :, 0].mT, extended, rtol=0, atol=100 * EPS)


def test_mask_token_stands_outside_the_block() -> None:
    module = MaskToken(3).double()
    module.token.data = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    z = normal(2, 3, 2, 2)
    out = module(z, size=(4, 5), offset=(1, 3))
    assert torch.equal(out[:, :, 1:3, 3:], z)
    outside = out[:, :, block_mask((4, 5), Block(1, 3, 2, 2))]
    assert torch.equal(outside, module.token.data[None, :, None].expand_as(outside))
    out.sum().backward()
    assert module.token.grad.tolist() == [2 * 16.0] * 3


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_propagation_is_linear_in_the_features(data: st.DataObject) -> None:
    parametrization = data.draw(st.sampled_from(PARAMETRIZATIONS))
    step = data.draw(st.sampled_from(STEPS))
    h, w = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    top, left = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    size = top + h + data.draw(st.integers(0, 3)), left + w + data.draw(st.integers(0, 3))
    module = propagation(2, parametrization=parametrization, step=step)
    one, two = normal(2, 2, h, w), normal(2, 2, h, w, seed=1)
    options = {"size": size, "offset": (top, left)}
    together = module(2 * one - two, **options)
    apart = 2 * module(one, **options) - module(two, **options)
    assert together.shape == (2, 2, *size)
    assert (together - apart).abs().max() <= 1e3 * EPS * max(1.0, float(apart.detach().abs().max()))


def small_model(stride: int = 2, **options: Any) -> QBHeat:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 6, stride, stride)
    )
    decoder = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1), nn.GELU(), nn.ConvTranspose2d(6, 1, stride, stride)
    )
    return QBHeat(encoder, LinearPropagation(6, generator=seeded()), decoder, **options)


def test_masked_pixels_do_not_leak_into_the_reconstruction() -> None:
    model, block = small_model(), Block(2, 4, 4, 4)
    images = normal(3, 1, 8, 8).float()
    mask = block_mask((8, 8), block)
    changed = torch.where(mask, 100 * normal(3, 1, 8, 8, seed=1).float(), images)
    one, two = model(images, block), model(changed, block)
    assert torch.equal(one.reconstruction, two.reconstruction)
    assert torch.equal(one.features, two.features)
    assert not torch.equal(one.loss, two.loss)


def test_loss_is_the_mean_over_masked_pixels() -> None:
    block = Block(2, 4, 4, 4)
    images = normal(3, 1, 8, 8).float()
    output = small_model()(images, block)
    error = (output.reconstruction - images).square()
    masked = error[..., output.mask].mean()
    visible = error[..., ~output.mask].mean()
    torch.testing.assert_close(output.loss, masked)
    weighted = small_model(visible_weight=0.25)(images, block).loss
    torch.testing.assert_close(weighted, masked + 0.25 * visible)
    assert torch.equal(output.mask, block_mask((8, 8), block))


def test_features_are_the_encoded_crop_and_its_continuation() -> None:
    model, images = small_model(), normal(2, 1, 8, 12).float()
    output = model(images, Block(2, 4, 4, 6))
    assert output.features.shape == (2, 6, 4, 6)
    crop = model.encoder(images[..., 2:6, 4:10])
    assert torch.equal(output.features[:, :, 1:3, 2:5], crop)
    assert torch.equal(model.propagation(crop, size=(4, 6), offset=(1, 2)), output.features)


def test_a_mask_token_takes_the_place_of_propagation() -> None:
    model = small_model()
    model.propagation = MaskToken(6)
    images = normal(2, 1, 8, 8).float()
    output = model(images, Block(0, 0, 4, 4))
    assert not output.features[:, :, 2:].any()
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_lowers_the_loss() -> None:
    """A plane wave is a linear system: its continuation can be learnt."""
    model = small_model()
    phase = torch.rand(32, 1, 1, 1, generator=seeded())
    y, x = torch.arange(8.0)[:, None], torch.arange(8.0)
    images = torch.cos(0.6 * x + 0.4 * y + 6.2832 * phase)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    block, losses = Block(2, 2, 4, 4), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(images, block).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # The variance of a cosine is 1/2: that is what a constant answer leaves.
    assert losses[0] > 0.4
    assert losses[-1] < 0.05


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quarter_block(7, 8), "even"),
        (lambda: quarter_block(8, 0), "even"),
        (lambda: quarter_block(8, 8, position="middle"), "position"),
        (lambda: block_mask((4, 4), Block(2, 0, 3, 1)), "does not fit"),
        (lambda: block_mask((4, 4), Block(-1, 0, 3, 1)), "does not fit"),
        (lambda: block_mask((4, 4), Block(0, 0, 0, 1)), "does not fit"),
        (lambda: LinearPropagation(3, parametrization="both"), "parametrization"),
        (lambda: LinearPropagation(3, step="midpoint"), "step"),
        (lambda: SequencePropagation(3, step="midpoint"), "step"),
        (lambda: LinearPropagation(0), "channels"),
        (lambda: LinearPropagation(3, initial_scale=-1.0), "initial_scale"),
        (lambda: LinearPropagation(3, initial_scale=float("nan")), "initial_scale"),
        (lambda: LinearPropagation(3)(torch.ones(1, 4, 2, 2), size=(4, 4)), "features"),
        (lambda: LinearPropagation(3)(torch.ones(3, 2, 2), size=(4, 4)), "features"),
        (lambda: LinearPropagation(3)(torch.ones(1, 3, 2, 2), size=(4, 1)), "does not fit"),
        (
            lambda: MaskToken(3)(torch.ones(1, 3, 2, 2), size=(4, 4), offset=(3, 0)),
            "does not fit",
        ),
        (lambda: MaskToken(3)(torch.ones(1, 2, 2, 2), size=(4, 4)), "features"),
        (lambda: SequencePropagation(3)(torch.ones(1, 2, 3), length=1), "does not fit"),
        (lambda: SequencePropagation(3)(torch.ones(1, 2, 3), length=4, offset=3), "does not fit"),
        (lambda: SequencePropagation(3)(torch.ones(2, 3), length=4), "features"),
        (lambda: small_model(visible_weight=-0.1), "visible_weight"),
        (lambda: small_model()(torch.ones(1, 1, 8, 8), Block(1, 0, 4, 4)), "aligned"),
        (lambda: small_model()(torch.ones(1, 1, 8, 9), Block(0, 0, 4, 4)), "aligned"),
        (lambda: small_model()(torch.ones(1, 1, 8, 8), Block(0, 0, 5, 4)), "aligned"),
        (lambda: small_model()(torch.ones(1, 1, 8, 8), Block(6, 0, 4, 4)), "does not fit"),
        (lambda: small_model()(torch.ones(1, 1, 8, 8), Block(0, 0, 8, 8)), "block must leave"),
        (lambda: small_model()(torch.ones(1, 8, 8), Block(0, 0, 4, 4)), "images"),
    ],
)
def test_bad_input_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.bad_input
def test_a_decoder_of_another_shape_is_refused() -> None:
    model = small_model()
    model.decoder = nn.Identity()
    with pytest.raises(ValueError, match="decoder must return the images' shape"):
        model(torch.ones(1, 1, 8, 8), Block(0, 0, 4, 4))


@pytest.mark.bad_input
def test_numbers_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="integers"):
        quarter_block(8.0, 8)
    with pytest.raises(TypeError, match="features must be a tensor of floating-point"):
        LinearPropagation(3)(torch.ones(1, 3, 2, 2, dtype=torch.long), size=(4, 4))
    with pytest.raises(TypeError, match="images must be a tensor of floating-point"):
        small_model()(torch.ones(1, 1, 8, 8, dtype=torch.uint8), Block(0, 0, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_propagation_on_a_gpu_agrees_with_the_host(parametrization: str) -> None:
    module, z = propagation(parametrization=parametrization), normal(2, 3, 2, 2)
    host = module(z, size=(4, 5), offset=(1, 2))
    device = module.cuda()(z.cuda(), size=(4, 5), offset=(1, 2))
    assert device.is_cuda
    torch.testing.assert_close(device.cpu(), host, rtol=0, atol=1e3 * EPS)
