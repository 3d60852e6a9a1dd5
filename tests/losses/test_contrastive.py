"""Contrastive losses against exact values, and the closed-form gradient against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from kexue.losses.contrastive import info_nce, label_vectors, nt_xent

H = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
PAIRS = torch.tensor([1, 0, 3, 2])
Q = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
K = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)

# The oracles were computed in float64 themselves. Entries below 5 come from sums of at most four
# products with exponentials: some ten roundings of 1.1e-16 each, of the largest term.
ROUNDING = 2e-15

INCLUDED = [
    [0.6277816896490029, -2.1104290776715806],
    [-2.0185075158930967, 2.7924469721850587],
    [4.728989252513664, 3.1098013538840137],
    [-3.2318099511867597, -3.5491441341597314],
]
EXCLUDED = [
    [-1.2902950224414966, -0.6516339454585653],
    [-2.2247987345228735, 2.5800261056906586],
    [4.604659582138772, 2.064020884552527],
    [0.5429245995389945, -1.928438876564643],
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def summed_loss(h: Tensor, targets: Tensor, temperature: float, exclude_self: bool) -> Tensor:
    similarities = h @ h.mT / temperature
    if exclude_self:
        similarities = similarities.masked_fill(torch.eye(len(h), dtype=torch.bool), -math.inf)
    return cross_entropy(similarities, targets, reduction="sum")


@pytest.mark.parametrize(
    ("exclude_self", "loss", "vectors"),
    [(False, 7.68301633110902, INCLUDED), (True, 3.544311014628934, EXCLUDED)],
)
def test_label_vectors_of_four_points(exclude_self: bool, loss: float, vectors: list) -> None:
    found = label_vectors(H, PAIRS, temperature=0.5, exclude_self=exclude_self)
    torch.testing.assert_close(
        found, torch.tensor(vectors, dtype=torch.float64), rtol=0.0, atol=5 * ROUNDING
    )
    assert summed_loss(H, PAIRS, 0.5, exclude_self).item() == pytest.approx(loss, rel=ROUNDING)


def test_surrogate_has_the_gradient_but_not_the_value_of_the_loss() -> None:
    surrogate = (H * label_vectors(H, PAIRS, temperature=0.5)).sum().item()
    assert surrogate == pytest.approx(7.992246062931965, rel=2 * ROUNDING)
    assert surrogate != pytest.approx(7.68301633110902, rel=0.01)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 12),
    dim=st.integers(1, 5),
    temperature=st.floats(0.05, 10.0),
    exclude_self=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_label_vectors_are_the_gradient_for_any_targets(
    n: int, dim: int, temperature: float, exclude_self: bool, seed: int
) -> None:
    """Targets that are no involution included."""
    h = draw(n, dim, seed=seed).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, n, (n,), generator=generator)
    targets = (torch.arange(n) + shift) % n
    loss = summed_loss(h, targets, temperature, exclude_self)
    (exact,) = torch.autograd.grad(loss, h)
    found = label_vectors(h, targets, temperature=temperature, exclude_self=exclude_self)
    # 2n products of numbers up to max|h|/τ, and exponents with an error of about |s| roundings.
    largest = h.detach().abs().max().item()
    scale = n * largest / temperature * (1 + dim * largest**2 / temperature)
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-15 * scale)
    assert not found.requires_grad


def test_info_nce_of_three_points() -> None:
    # At temperature 0.1 the logits reach 10, so that one rounding of them is 1e-15 of the loss.
    assert info_nce(Q, K, temperature=0.1).item() == pytest.approx(1.8287573303539706, rel=5e-15)
    both = info_nce(Q, K, temperature=0.1, symmetric=True).item()
    assert both == pytest.approx(1.5788571866051822, rel=5e-15)
    plain = info_nce(Q, K, temperature=1.0, normalize=False).item()
    assert plain == pytest.approx(1.1461014425935603, rel=ROUNDING)


def test_nt_xent_of_three_points() -> None:
    assert nt_xent(Q, K, temperature=0.5).item() == pytest.approx(1.2278045992126507, rel=ROUNDING)


def test_nt_xent_is_the_loss_of_label_vectors_over_2n() -> None:
    views = torch.nn.functional.normalize(torch.cat([Q, K]))
    targets = torch.tensor([3, 4, 5, 0, 1, 2])
    summed = summed_loss(views, targets, 0.5, exclude_self=True)
    torch.testing.assert_close(nt_xent(Q, K), summed / 6, rtol=ROUNDING, atol=0.0)


def test_hard_negatives_follow_their_positive() -> None:
    queries, keys = draw(4, 3), draw(12, 3, seed=1)
    by_default = info_nce(queries, keys)
    named = info_nce(queries, keys, targets=torch.tensor([0, 3, 6, 9]))
    assert by_default.item() == named.item()
    other = info_nce(queries, keys, targets=torch.tensor([1, 3, 6, 9], dtype=torch.int32))
    assert other.item() != named.item()


def test_reductions_belong_together() -> None:
    each = info_nce(Q, K, symmetric=True, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(info_nce(Q, K, symmetric=True), each.mean())
    torch.testing.assert_close(info_nce(Q, K, symmetric=True, reduction="sum"), each.sum())


def test_symmetric_is_the_mean_of_both_directions() -> None:
    both = (info_nce(Q, K) + info_nce(K, Q)) / 2
    torch.testing.assert_close(info_nce(Q, K, symmetric=True), both, rtol=ROUNDING, atol=0.0)


def test_gradient_reaches_a_learnable_temperature() -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for loss in (info_nce, nt_xent):
        assert torch.autograd.gradcheck(
            lambda t, loss=loss: loss(Q, K, temperature=t), (temperature,)
        )
    assert torch.autograd.gradcheck(lambda t: info_nce(Q, K, temperature=t), temperature[None])


def test_gather_without_processes_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="process group"):
        info_nce(Q, K, gather=True)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"temperature": torch.tensor(-1.0)}, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, "temperature must be one number"),
        ({"keys": K[:, :1]}, "same dimension"),
        ({"keys": K[:2]}, "multiple of the 3 queries"),
        ({"queries": Q[:0], "keys": K[:0]}, "at least one sample"),
        ({"queries": Q[0]}, "shape"),
        ({"symmetric": True, "keys": torch.cat([K, K])}, "symmetric needs one key"),
        ({"symmetric": True, "targets": torch.arange(3)}, "symmetric needs one key"),
        ({"targets": torch.tensor([0, 1, 3])}, "from 0 to 2"),
        ({"targets": torch.tensor([0, 1, -100])}, "from 0 to 2"),
        ({"targets": torch.arange(2)}, "shape"),
        ({"reduction": "median"}, "reduction must be one of mean, sum, none"),
    ],
)
def test_info_nce_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        info_nce(**{"queries": Q, "keys": K, **arguments})


@pytest.mark.bad_input
def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="real floating-point"):
        info_nce(Q.to(torch.complex128), K)
    with pytest.raises(TypeError, match="integers"):
        info_nce(Q, K, targets=torch.zeros(3))
    with pytest.raises(TypeError, match="truth values"):
        info_nce(Q, K, targets=torch.zeros(3, dtype=torch.bool))


@pytest.mark.bad_input
def test_nt_xent_and_label_vectors_refuse() -> None:
    with pytest.raises(ValueError, match="same samples"):
        nt_xent(Q, K[:2])
    with pytest.raises(ValueError, match="temperature"):
        nt_xent(Q, K, temperature=-0.5)
    with pytest.raises(ValueError, match="its own target"):
        label_vectors(H, torch.tensor([1, 1, 3, 2]), exclude_self=True)
    with pytest.raises(ValueError, match="from 0 to 3"):
        label_vectors(H, torch.tensor([1, 0, 3, 4]))


# Half precision: the similarities need more digits than the representations have.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_of_half_representations_are_those_of_their_values(
    dtype: torch.dtype, autocast: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    first = normalize(torch.randn(64, 128, generator=generator), dim=1)
    second = normalize(first + 0.08 * torch.randn(64, 128, generator=generator), dim=1)
    first, second = first.to(dtype), second.to(dtype)
    exact = info_nce(first.double(), second.double(), temperature=0.05)
    pairs = nt_xent(first.double(), second.double(), temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = info_nce(first, second, temperature=0.05)
        of_views = nt_xent(first, second, temperature=0.05)
    assert found.dtype == of_views.dtype == torch.float32
    # Similarities of 20, to the rounding of float32 in a sum of 128.
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(of_views.double(), pairs, rtol=1e-4, atol=0)


def test_long_half_vectors_and_a_row_of_zeros_give_numbers() -> None:
    h = (30 * torch.randn(4, 256, generator=torch.Generator().manual_seed(0))).half()
    assert info_nce(h, h, normalize=False).isfinite()
    assert label_vectors(h, torch.tensor([1, 0, 3, 2])).dtype == torch.float16
    h[0] = 0
    assert info_nce(h, h.flip(0)).isfinite()
    assert nt_xent(h, h.flip(0)).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_may_be_a_vector_of_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 8, generator=generator).to(dtype)
    one = torch.full((1,), 0.5)
    assert torch.equal(
        info_nce(first, second, temperature=one), info_nce(first, second, temperature=0.5)
    )
    assert torch.equal(
        nt_xent(first, second, temperature=one), nt_xent(first, second, temperature=0.5)
    )
    targets = torch.tensor([1, 0, 3, 2, 0])
    assert label_vectors(first, targets, temperature=one).shape == first.shape
    assert label_vectors(first, targets, temperature=one).dtype == dtype
