"""SimSiam and BYOL against loops by hand, and collapse metrics against their definitions."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.training.siamese import (
    BYOL,
    SimSiam,
    collapse_metrics,
    cosine_momentum,
    negative_cosine_similarity,
    prediction_head,
    projection_head,
)

# Of the arithmetic in float64: a few dozen operations.
ROUNDING = 1e-13
ROWS = torch.tensor(
    [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [2.0, 0.0, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64
)
HALVES = (torch.float16, torch.bfloat16)


def views(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return one, two


def network(kind: type[SimSiam] = SimSiam, **settings: object) -> SimSiam:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    return kind(
        encoder, projector=projection_head(8, 8, 4), predictor=prediction_head(4, 2), **settings
    ).double()


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_cosine_is_that_of_the_definition() -> None:
    p, t = views(5, 3)
    by_hand = [-(a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(p, t, strict=True)]
    each = negative_cosine_similarity(p, t, reduction="none")
    torch.testing.assert_close(each, torch.stack(by_hand), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(negative_cosine_similarity(p, t), each.mean(), rtol=0, atol=0)
    total = negative_cosine_similarity(p, t, reduction="sum")
    torch.testing.assert_close(total, each.sum(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_zero_vectors_have_cosine_zero_and_finite_gradients(dtype: torch.dtype) -> None:
    p = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    cosine = negative_cosine_similarity(p, t, reduction="none")
    assert cosine.tolist() == [0.0, 0.0, 0.0]
    for gradient in torch.autograd.grad(cosine.sum(), (p, t)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_normalised_in_single(dtype: torch.dtype) -> None:
    # The squares of 300 overflow float16; those of 1e-4 vanish.
    p = torch.tensor([[300.0, 400.0], [3e-4, 4e-4]], dtype=dtype)
    cosine = negative_cosine_similarity(p, p, reduction="none")
    assert cosine.dtype == torch.float32
    torch.testing.assert_close(cosine, torch.full((2,), -1.0), rtol=0, atol=1e-6)


def test_the_length_of_a_vector_does_not_matter() -> None:
    p, t = views(4, 3)
    torch.testing.assert_close(
        negative_cosine_similarity(1e-9 * p, 1e9 * t),
        negative_cosine_similarity(p, t),
        rtol=0,
        atol=ROUNDING,
    )


@pytest.mark.bad_input
def test_the_loss_refuses_what_it_cannot_compare() -> None:
    p, t = views(4, 3)
    with pytest.raises(ValueError, match=r"batch, dim.*\(4, 3\) and \(4, 2\)"):
        negative_cosine_similarity(p, t[:, :2])
    with pytest.raises(ValueError, match=r"batch, dim.*\(4,\)"):
        negative_cosine_similarity(p[:, 0], t[:, 0])
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'median'"):
        negative_cosine_similarity(p, t, reduction="median")
    with pytest.raises(ValueError, match="empty batch"):
        negative_cosine_similarity(p[:0], t[:0])


def kinds(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head]


def test_projector_of_simsiam() -> None:
    head = projection_head(8, 16, 4)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(16, 8), (16, 16), (4, 16)]
    assert all(layer.bias is None for layer in linears)
    assert head[1].affine
    assert not head[-1].affine


def test_projector_of_byol_ends_in_a_biased_layer() -> None:
    head = projection_head(8, 16, 4, layers=2, last_norm=False)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None
    assert head[-1].bias is not None


def test_projector_of_one_layer_goes_straight_through() -> None:
    assert tuple(projection_head(8, 16, 4, layers=1)[0].weight.shape) == (4, 8)


def test_predictor_has_a_bottleneck_and_nothing_after_it() -> None:
    head = prediction_head(8, 2)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(head[i].weight.shape) for i in (0, 3)] == [(2, 8), (8, 2)]
    assert head[0].bias is None
    assert head[3].bias is not None


@pytest.mark.bad_input
def test_heads_refuse_widths_below_one() -> None:
    with pytest.raises(ValueError, match="hidden_features must be an integer of at least 1, got 0"):
        prediction_head(4, 0)
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        projection_head(4, 4, 4, layers=0)


def test_simsiam_is_the_loop_of_the_paper() -> None:
    model, (x_1, x_2) = network(), views(7, 6)
    loop = copy.deepcopy(model)
    output = model(x_1, x_2)
    output.loss.backward()

    z_1, z_2 = loop.projector(loop.encoder(x_1)), loop.projector(loop.encoder(x_2))
    p_1, p_2 = loop.predictor(z_1), loop.predictor(z_2)
    cosine = nn.functional.cosine_similarity
    loss = -(cosine(p_1, z_2.detach()).mean() + cosine(p_2, z_1.detach()).mean()) / 2
    loss.backward()

    torch.testing.assert_close(output.loss, loss, rtol=0, atol=ROUNDING)
    for ours, theirs in zip(model.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=ROUNDING)
    for ours, theirs in zip(model.buffers(), loop.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for pair, expected in (
        (output.projections, (z_1, z_2)),
        (output.predictions, (p_1, p_2)),
        (output.targets, (z_1, z_2)),
    ):
        torch.testing.assert_close(pair, expected, rtol=0, atol=ROUNDING)
    assert not any(target.requires_grad for target in output.targets)


def test_squared_distance_is_summed_over_dim_and_averaged_over_the_batch() -> None:
    x_1, x_2 = views(5, 3)
    output = SimSiam(nn.Identity(), predictor=nn.Linear(3, 3).double(), loss="mse")(x_1, x_2)
    (p_1, p_2), (t_1, t_2) = output.predictions, output.targets
    by_hand = (((p_1 - t_2) ** 2).sum() + ((p_2 - t_1) ** 2).sum()) / 2 / 5
    torch.testing.assert_close(output.loss, by_hand, rtol=1e-14, atol=0)


def test_without_stop_gradient_the_target_is_followed_too() -> None:
    # In one dimension without noise, l = (φθ - θ)² has ∂l/∂θ = 2(1-φ)²θ, and 2(φ-1)φθ without
    # the target's part; both directions together have the loss of one.
    x, phi, theta = torch.ones(1, 1), 0.6, 0.1
    expected = {True: 2 * (phi - 1) * phi * theta, False: 2 * (1 - phi) ** 2 * theta}
    for stop_gradient, gradient in expected.items():
        encoder, predictor = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(encoder.weight, theta)
        nn.init.constant_(predictor.weight, phi)
        model = SimSiam(encoder, predictor=predictor, stop_gradient=stop_gradient, loss="mse")
        model(x, x).loss.backward()
        assert encoder.weight.grad.item() == pytest.approx(gradient, rel=1e-6)
        assert predictor.weight.grad.item() == pytest.approx(2 * (phi - 1) * theta**2, rel=1e-5)


def test_embed_is_the_encoder_alone() -> None:
    model, (x, _) = network().eval(), views(7, 6)
    torch.testing.assert_close(model.embed(x), model.encoder(x), rtol=0, atol=0)


def test_any_encoder_that_ends_in_a_matrix_will_do() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    encoder = nn.Sequential(nn.Embedding(9, 4), nn.Flatten())
    assert torch.isfinite(SimSiam(encoder)(tokens, tokens.flip(1)).loss)
    images = torch.randn(2, 1, 6, 6)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert torch.isfinite(BYOL(encoder)(images, images.flip(3)).loss)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", [SimSiam, BYOL])
def test_what_cannot_be_trained_is_refused(kind: type[SimSiam]) -> None:
    x, _ = views(7, 6)
    with pytest.raises(ValueError, match=r"same shape.*\(7, 6\) and \(6, 6\)"):
        network(kind)(x, x[1:])
    with pytest.raises(ValueError, match=r"\(batch, dim\), got \(7, 3, 2\)"):
        kind(nn.Unflatten(1, (3, 2)))(x, x)
    with pytest.raises(ValueError, match=r"\(batch, dim\).*\(7, 5\) and \(7, 6\)"):
        kind(nn.Identity(), predictor=nn.Linear(6, 5).double())(x, x)
    with pytest.raises(ValueError, match="loss must be one of cosine, mse, got 'l1'"):
        kind(nn.Identity(), loss="l1")
    with pytest.raises(TypeError, match=r"encoder must be an nn\.Module, got function"):
        kind(lambda x: x)
    with pytest.raises(ValueError, match="empty batch"):
        kind(nn.Identity())(x[:0], x[:0])


@pytest.mark.parametrize("kind", [SimSiam, BYOL])
def test_autocast_computes_the_loss_in_single_precision(kind: type[SimSiam]) -> None:
    model, (x_1, x_2) = network(kind).float().eval(), views(7, 6, dtype=torch.float32)
    plain = model(x_1, x_2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x_1, x_2)
    assert output.predictions[0].dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    # bfloat16 keeps 8 bits, and four layers with a gain of about one stand behind each other.
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0.05)


COMPILED = """
import torch
from torch import nn
from kexue.training.siamese import BYOL, SimSiam, prediction_head
torch.manual_seed(0)
for kind in (SimSiam, BYOL):
    model = kind(nn.Linear(6, 4), predictor=prediction_head(4, 2))
    x = torch.randn(2, 8, 6)
    loss = model(*x).loss
    gradient = torch.autograd.grad(loss, model.encoder.weight)
    traced = torch.compile(model, fullgraph=True, backend="eager")(*x).loss
    torch.testing.assert_close(traced, loss)
    torch.testing.assert_close(torch.autograd.grad(traced, model.encoder.weight), gradient)
"""


def test_one_graph_when_compiled() -> None:
    # Dynamo cannot trace through the shape checks, so this runs without them.
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=environment)


@pytest.mark.slow
def test_gradients_are_averaged_in_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).parent / "processes" / "siamese.py"
    port = str(20_000 + os.getpid() % 20_000)
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "found.pt")],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                               "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert (tmp_path / "found.pt").read_text() == "same"


def moved(model: nn.Module) -> None:
    """A step of an optimiser, which also moves running statistics."""
    x_1, x_2 = views(7, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x_1, x_2).loss.backward()
    optimizer.step()


def test_teacher_starts_as_a_copy_without_gradient() -> None:
    model = network(BYOL)
    pairs = zip(tensors(model.teacher_encoder), tensors(model.encoder), strict=True)
    assert all(t is not s and torch.equal(t, s) for t, s in pairs)
    teacher = [*model.teacher_encoder.parameters(), *model.teacher_projector.parameters()]
    assert teacher
    assert not any(parameter.requires_grad for parameter in teacher)
    moved(model)
    assert all(parameter.grad is None for parameter in teacher)


def test_teacher_is_an_exponential_average_and_its_buffers_are_copies() -> None:
    model = network(BYOL, momentum=0.9)
    before = copy.deepcopy(model)
    moved(model)
    model.update_teacher()
    for teacher, student, start in (
        (model.teacher_encoder, model.encoder, before.teacher_encoder),
        (model.teacher_projector, model.projector, before.teacher_projector),
    ):
        for t, s, t_0 in zip(
            teacher.parameters(), student.parameters(), start.parameters(), strict=True
        ):
            assert not torch.equal(s, t_0)
            torch.testing.assert_close(t, 0.9 * t_0 + 0.1 * s, rtol=0, atol=ROUNDING)
        for t, s in zip(teacher.buffers(), student.buffers(), strict=True):
            torch.testing.assert_close(t, s, rtol=0, atol=0)


def test_momentum_zero_is_simsiam() -> None:
    byol, simsiam = network(BYOL, momentum=0.0), network()
    for _ in range(3):
        moved(byol)
        byol.update_teacher()
        moved(simsiam)
    x_1, x_2 = views(7, 6)
    assert byol.eval()(x_1, x_2).loss.item() == simsiam.eval()(x_1, x_2).loss.item()


def test_momentum_one_freezes_the_teacher() -> None:
    model = network(BYOL, momentum=1.0)
    before = [p.clone() for p in model.teacher_encoder.parameters()]
    moved(model)
    model.update_teacher()
    pairs = zip(before, model.teacher_encoder.parameters(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)


def test_momentum_of_one_step_overrides_that_of_the_module() -> None:
    model = network(BYOL, momentum=1.0)
    moved(model)
    model.update_teacher(0.0)
    pairs = zip(model.teacher_encoder.parameters(), model.encoder.parameters(), strict=True)
    assert all(torch.equal(t, s) for t, s in pairs)


def test_targets_are_the_teachers_projections_of_the_other_view() -> None:
    model, (x_1, x_2) = network(BYOL, momentum=0.5), views(7, 6)
    moved(model)
    model.eval()
    output = model(x_1, x_2)
    t_1, t_2 = (model.teacher_projector(model.teacher_encoder(x)) for x in (x_1, x_2))
    torch.testing.assert_close(output.targets, (t_1, t_2), rtol=0, atol=0)
    p_1, p_2 = output.predictions
    loss = (negative_cosine_similarity(p_1, t_2) + negative_cosine_similarity(p_2, t_1)) / 2
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=0)


def test_a_bfloat16_student_has_a_float32_teacher_that_moves() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(6, 4, bias=False).bfloat16()
    nn.init.constant_(encoder.weight, 1.0)
    model = BYOL(encoder, predictor=nn.Linear(4, 4).bfloat16(), momentum=0.999)
    assert model.teacher_encoder.weight.dtype == torch.float32
    with torch.no_grad():
        encoder.weight.add_(1.0)
    model.update_teacher()
    moved_by = (model.teacher_encoder.weight - 1).mean().item()
    # One unit in the last place of a float32 at 1 is 1.2e-7; bfloat16 has 7.8e-3 and stays.
    assert moved_by == pytest.approx(1e-3, abs=1.2e-7)
    x_1, x_2 = views(5, 6, dtype=torch.bfloat16)
    output = model(x_1, x_2)
    assert output.targets[0].dtype == torch.float32
    output.loss.backward()
    assert encoder.weight.grad.isfinite().all()


def test_half_precision_behind_an_encoder_without_parameters() -> None:
    model = BYOL(nn.Identity(), projector=nn.Linear(6, 4).bfloat16())
    assert model(*views(5, 6, dtype=torch.bfloat16)).targets[0].dtype == torch.float32


def test_a_shared_parameter_is_averaged_once() -> None:
    layer = nn.Linear(4, 4).double()
    model = BYOL(nn.Sequential(layer, nn.Tanh(), layer), projector=layer, momentum=0.5)
    assert model.teacher_encoder[0].weight is model.teacher_projector.weight
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    model.update_teacher()
    torch.testing.assert_close(
        model.teacher_encoder[0].weight.detach(), start + 0.5, rtol=0, atol=ROUNDING
    )


def replaced(model: BYOL, how: str) -> BYOL:
    if how == "assigned":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    elif how == "synchronised":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model).float().double()
    elif how == "copied":
        model = copy.deepcopy(model)
    else:
        model = pickle.loads(pickle.dumps(model))
    return model


@pytest.mark.parametrize("how", ["assigned", "synchronised", "copied", "pickled"])
def test_the_teacher_follows_tensors_that_have_taken_others_places(how: str) -> None:
    model = replaced(network(BYOL), how)
    with torch.no_grad():
        for tensor in tensors(model.encoder):
            tensor.add_(1)
    model.update_teacher(0.0)
    pairs = zip(tensors(model.teacher_encoder), tensors(model.encoder), strict=True)
    assert all(torch.equal(t, s) for t, s in pairs)


def test_teacher_is_in_the_state_dict_and_in_the_mode_of_the_module() -> None:
    model = network(BYOL)
    assert "teacher_encoder.0.weight" in model.state_dict()
    assert "teacher_projector.1.running_mean" in model.state_dict()
    assert model.teacher_encoder[1].training
    assert not model.eval().teacher_encoder[1].training


@pytest.mark.bad_input
def test_momentum_outside_the_unit_interval_is_refused() -> None:
    for momentum in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="momentum"):
            network(BYOL, momentum=momentum)
        with pytest.raises(ValueError, match="momentum"):
            network(BYOL).update_teacher(momentum)
        with pytest.raises(ValueError, match="momentum"):
            cosine_momentum(1, 10, base=momentum)


@pytest.mark.bad_input
def test_a_teacher_needs_a_finished_student() -> None:
    with pytest.raises(ValueError, match="initialised"):
        BYOL(nn.LazyLinear(4))
    model = network(BYOL)
    model.encoder = nn.Linear(6, 8, bias=False).double()
    with pytest.raises(ValueError, match="structure of the teacher"):
        model.update_teacher()


def test_momentum_rises_along_half_a_cosine() -> None:
    assert cosine_momentum(0, 100) == pytest.approx(0.996, abs=1e-15)
    assert cosine_momentum(100, 100) == 1.0
    # A quarter of the way, (1 - cos 45°)/2 of the rise.
    quarter = 0.9 + 0.1 * (1 - math.sqrt(0.5)) / 2
    assert cosine_momentum(25, 100, base=0.9) == pytest.approx(quarter, abs=1e-15)
    assert cosine_momentum(5, 10, base=0.5, final=0.7) == pytest.approx(0.6, abs=1e-15)


@pytest.mark.bad_input
@pytest.mark.parametrize(("step", "total"), [(-1, 10), (11, 10), (0, 0), (math.nan, 10)])
def test_a_step_outside_the_training_is_refused(step: float, total: float) -> None:
    with pytest.raises(ValueError, match="step"):
        cosine_momentum(step, total)


def test_metrics_of_four_rows() -> None:
    metrics = collapse_metrics(ROWS, ROWS.flip(1))
    # The oracle's numbers have 12 decimals.
    assert metrics.relative_std == pytest.approx(0.7456393932916, abs=1e-12)
    assert metrics.mean_cosine == pytest.approx(0.427586650989, abs=1e-12)
    assert metrics.effective_rank == pytest.approx(2.545718253741, abs=1e-12)
    assert metrics.participation_ratio == pytest.approx(1.457004708003, abs=1e-12)
    assert metrics.uniformity == pytest.approx(-1.558180769698, abs=1e-12)
    assert metrics.alignment == pytest.approx(1.25, abs=1e-12)
    assert not metrics.is_collapsed()


def by_definition(x: np.ndarray) -> list[float]:
    """The same numbers pair by pair, and from the singular values themselves."""
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    n, dim = u.shape
    cosines = [u[i] @ u[j] for i, j in itertools.permutations(range(n), 2)]
    kernels = [math.exp(-2 * np.sum((a - b) ** 2)) for a, b in itertools.combinations(u, 2)]
    singular = np.linalg.svd(u - u.mean(0), compute_uv=False)
    share = singular[singular > 1e-7 * singular[0]] / singular.sum()
    return [
        math.sqrt(dim) * u.std(0, ddof=1).mean(),
        float(np.mean(cosines)),
        math.exp(-np.sum(share * np.log(share))),
        np.sum(singular**2) ** 2 / np.sum(singular**4),
        math.log(np.mean(kernels)),
    ]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 12), dim=st.integers(2, 9), seed=st.integers(0, 999))
def test_metrics_are_those_of_the_definition(n: int, dim: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((n, dim))
    metrics = collapse_metrics(torch.from_numpy(x))
    found = [
        metrics.relative_std,
        metrics.mean_cosine,
        metrics.effective_rank,
        metrics.participation_ratio,
        metrics.uniformity,
    ]
    # Squared singular values carry 1e-15 of the largest: √ of that where one is just resolved.
    np.testing.assert_allclose(found, by_definition(x), rtol=1e-6, atol=1e-9)


def test_uniformity_in_blocks_is_that_of_all_pairs() -> None:
    x = np.random.default_rng(0).standard_normal((1100, 3))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = np.exp(-2 * ((u[:, None] - u) ** 2).sum(2))
    for rows in (511, 512, 513, 1024, 1100):
        pairs = kernel[:rows, :rows][np.triu_indices(rows, 1)]
        metrics = collapse_metrics(torch.from_numpy(x), max_pairs=rows)
        assert metrics.uniformity == pytest.approx(math.log(pairs.mean()), abs=1e-11)


def test_isotropic_vectors_have_relative_deviation_one_and_full_rank() -> None:
    dim = 16
    x = torch.randn(20_000, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metrics = collapse_metrics(x, max_pairs=2)
    # Σ_j var_j = 1 - |mean|², |mean|² ≈ 1/n; a variance has relative error √(2/n) = 0.01, the mean
    # of sixteen less, and the root half of it.
    assert metrics.relative_std == pytest.approx(1, abs=0.01)
    # Singular values differ by a relative √(dim/n) = 0.03 at most: ranks lose its square.
    assert metrics.effective_rank == pytest.approx(dim, rel=0.002)
    assert metrics.participation_ratio == pytest.approx(dim, rel=0.005)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_embeddings_have_collapsed(dtype: torch.dtype) -> None:
    x = torch.tensor([0.3, -1.7, 2.2], dtype=dtype).expand(50, 3)
    metrics = collapse_metrics(x, x)
    assert metrics.relative_std < 1e-15
    assert metrics.mean_cosine == pytest.approx(1, abs=ROUNDING)
    assert (metrics.effective_rank, metrics.participation_ratio) == (0.0, 0.0)
    assert metrics.uniformity == pytest.approx(0, abs=ROUNDING)
    assert metrics.alignment == 0.0
    assert metrics.is_collapsed()


@pytest.mark.parametrize("shape", [(60, 8), (6, 80)])
def test_one_line_is_a_dimensional_collapse(shape: tuple[int, int]) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(shape[0] // 2)[:, None]
    x = signs * torch.linspace(1, 2, shape[1])
    metrics = collapse_metrics(x)
    assert metrics.relative_std > 0.9
    assert metrics.effective_rank == pytest.approx(1, abs=1e-12)
    assert metrics.participation_ratio == pytest.approx(1, abs=1e-12)
    assert metrics.is_collapsed()
    assert not metrics.is_collapsed(rank=0.5)


def test_complete_collapse_hides_from_the_centred_rank() -> None:
    noise = torch.randn(500, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metrics = collapse_metrics(1 + 0.01 * noise)
    assert metrics.effective_rank > 25
    assert metrics.relative_std < 0.02
    assert metrics.is_collapsed()


def test_alignment_is_not_a_number_without_a_second_view() -> None:
    assert math.isnan(collapse_metrics(ROWS).alignment)


def test_lengths_and_rotations_do_not_matter() -> None:
    rotation, _ = torch.linalg.qr(views(3, 3)[0])
    lengths = torch.tensor([1e-300, 1e-5, 1e5, 1e300], dtype=torch.float64)[:, None]
    scaled, plain = collapse_metrics(lengths * ROWS), collapse_metrics(ROWS)
    turned = collapse_metrics(ROWS @ rotation)
    for name in ("mean_cosine", "effective_rank", "participation_ratio", "uniformity"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), abs=1e-12)
        assert getattr(turned, name) == pytest.approx(getattr(plain, name), abs=1e-12)


@pytest.mark.bad_input
def test_metrics_refuse_what_has_no_spread_to_measure() -> None:
    with pytest.raises(ValueError, match="embeddings"):
        collapse_metrics(ROWS[:1])
    with pytest.raises(ValueError, match=r"embeddings.*\(2, 2, 3\)"):
        collapse_metrics(ROWS.view(2, 2, 3))
    with pytest.raises(ValueError, match="finite"):
        collapse_metrics(torch.where(ROWS == 2, math.nan, ROWS))
    with pytest.raises(ValueError, match="finite"):
        collapse_metrics(ROWS, torch.where(ROWS == 2, math.inf, ROWS))
    with pytest.raises(ValueError, match=r"other.*\(4, 3\), got \(3, 3\)"):
        collapse_metrics(ROWS, ROWS[1:])
    with pytest.raises(ValueError, match="max_pairs must be at least 2, got 1"):
        collapse_metrics(ROWS, max_pairs=1)


def test_nan_is_no_cosine() -> None:
    p, t = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    p[0, 0] = math.nan
    assert negative_cosine_similarity(p, t).isnan()
