"""kexue.nn.residual: coefficients, gains, magnitudes, initialisation and parameter groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.residual import (
    Residual,
    deepnorm_coefficients,
    deepnorm_init_,
    depth_parameter_groups,
    depth_scaling,
    magnitude,
    magnitude_gradient,
    residual_gain,
)


@pytest.mark.parametrize(
    ("layers", "alpha", "beta"),
    [
        (6, 1.8612097182, 0.3799178428),
        (12, 2.2133638394, 0.3194715521),
        (24, 2.6321480259, 0.2686424830),
        (100, 3.7606030931, 0.1880301547),
        (1000, 6.6874030498, 0.1057371263),
    ],
)
def test_single_stack_has_the_published_coefficients(
    layers: int, alpha: float, beta: float
) -> None:
    for stack in ("encoder", "decoder"):
        both = deepnorm_coefficients(**{f"{stack}_layers": layers})
        single = getattr(both, stack)
        assert single.alpha == pytest.approx(alpha, abs=5e-11)
        assert single.beta == pytest.approx(beta, abs=5e-11)
        assert single.alpha**4 == pytest.approx(2 * layers)
        assert single.beta**-4 == pytest.approx(8 * layers)
        assert getattr(both, "decoder" if stack == "encoder" else "encoder") is None


def test_encoder_and_decoder_have_the_published_coefficients() -> None:
    equal = deepnorm_coefficients(encoder_layers=6, decoder_layers=6)
    assert equal.encoder.alpha == pytest.approx(1.4179381407, abs=5e-11)
    assert equal.encoder.beta == pytest.approx(0.4969892408, abs=5e-11)
    assert equal.decoder.alpha == pytest.approx(2.0597671439, abs=5e-11)
    assert equal.decoder.beta == pytest.approx(0.3432945240, abs=5e-11)
    unequal = deepnorm_coefficients(encoder_layers=18, decoder_layers=6).encoder
    assert unequal.alpha == pytest.approx(1.866111538930, abs=5e-13)
    assert unequal.beta == pytest.approx(0.377630160523, abs=5e-13)
    assert unequal.alpha * unequal.beta == pytest.approx(0.7047, rel=1e-12)


def test_table_solves_the_condition_of_each_optimiser() -> None:
    for layers, sublayers in ((1, 2), (7, 2), (50, 1), (9, 3)):
        s = layers * sublayers
        for norm in ("post", "pre"):
            sgd, adam, lamb = (
                depth_scaling(layers, optimizer=name, norm=norm, sublayers_per_layer=sublayers)
                for name in ("sgd", "adam", "lamb")
            )
            assert s * (sgd.beta / sgd.alpha) ** 2 == pytest.approx(1)
            assert s * adam.beta / adam.alpha == pytest.approx(1)
            assert s * lamb.beta**2 / lamb.alpha == pytest.approx(1)
            if norm == "pre":
                assert sgd.alpha == adam.alpha == lamb.alpha == 1
            else:
                assert sgd.beta == pytest.approx(1 / sgd.alpha)
                assert adam.beta == pytest.approx(1 / adam.alpha)
    assert depth_scaling(70, optimizer="adam").alpha == pytest.approx(11.832159566199, abs=5e-13)


def test_gain_of_a_thousand_layers() -> None:
    assert residual_gain(1000, 1000**-0.5) == pytest.approx(1.6483094164130387, rel=1e-14)
    assert residual_gain(1000, 1000**-0.5, aligned=True) == pytest.approx(3.3183493667e13)
    assert residual_gain(1000, 1e-3, aligned=True) == pytest.approx(2.7169239322358925, rel=1e-13)


def test_gain_of_tiny_and_of_huge_branches() -> None:
    """log1p keeps what 1 + eps^2 would lose: N eps^2 / 2 = 5e-14 relative to the next term."""
    assert residual_gain(10**7, 1e-10) - 1 == pytest.approx(5e-14, rel=5e-3)
    assert residual_gain(1, 1e200) == pytest.approx(1e200)
    assert residual_gain(2, 1e200) == math.inf
    assert residual_gain(5, 0.0) == 1.0


def test_gain_is_that_of_a_stack_of_random_orthogonal_branches() -> None:
    """Relative spread of the squared norm over N layers of width d: sqrt(4 N eps^2 / d) = 0.03."""
    torch.manual_seed(0)
    width, layers = 2000, 40
    epsilon = layers**-0.5
    x = torch.randn(width)
    x /= x.norm()
    for _ in range(layers):
        step = torch.randn(width)
        x = x + epsilon * step / step.norm() * x.norm()
    assert x.norm().item() == pytest.approx(residual_gain(layers, epsilon), rel=5 * 0.015)


def orthogonal(n: int, columns: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return q[:, : columns or n]


def test_magnitude_of_scaled_orthogonal_matrices() -> None:
    for shape in ((6, 6), (9, 4)):
        weight = 2.5 * orthogonal(*shape)
        assert magnitude(weight).item() == pytest.approx(2.5, rel=1e-14)
        assert magnitude(weight.T).item() == pytest.approx(2.5, rel=1e-14)
    diagonal = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert magnitude(diagonal).item() == pytest.approx(1.8439088915, abs=5e-11)


def test_magnitude_is_the_best_factor() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = magnitude(weight).item()

    def distance(kappa: float) -> float:
        return (weight @ weight.T / kappa**2 - torch.eye(5)).norm().item()

    assert all(distance(best) < distance(best * factor) for factor in (0.999, 1.001))


def test_magnitude_of_a_gaussian_matrix() -> None:
    """lambda^2 / ((m + n + 1) sigma^2) concentrates; relative spread about 2/sqrt(mn) = 0.003."""
    weight = torch.randn(600, 800, generator=torch.Generator().manual_seed(0)) * 0.3
    assert magnitude(weight).item() ** 2 == pytest.approx(1401 * 0.09, rel=0.015)


def test_magnitude_is_batched_and_keeps_extreme_scales() -> None:
    weights = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(magnitude(weights)[1, 2], magnitude(weights[1, 2]))
    torch.testing.assert_close(magnitude(1e-30 * weights) * 1e30, magnitude(weights))
    torch.testing.assert_close(magnitude(1e30 * weights) * 1e-30, magnitude(weights))
    half = magnitude(weights.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), magnitude(weights.half().float()), rtol=1e-3, atol=0)


def test_derivative_by_the_magnitude() -> None:
    """L(t W) at t = 1, by central differences of step 1e-4: error 1e-8 of the third derivative."""
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight.requires_grad_()

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (w @ torch.arange(4.0, dtype=torch.float64)).sin().sum()

    gradient = torch.autograd.grad(loss(weight), weight)[0]
    with torch.no_grad():
        slope = (loss(weight * 1.0001) - loss(weight * 0.9999)) / 2e-4 / magnitude(weight)
    found = magnitude_gradient(weight.detach(), gradient)
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-7)


def deviation(weight: torch.Tensor, rows: int, columns: int, gain: float) -> float:
    """Standard deviation in units of Xavier's, and of its own standard error 1/sqrt(2n)."""
    expected = gain * math.sqrt(2 / (rows + columns))
    return abs(weight.std().item() / expected - 1) * math.sqrt(2 * weight.numel())


def test_linear_layers_get_the_gain_of_their_role() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(64, 128), nn.Linear(64, 128)
            self.fc1, self.gate = nn.Linear(64, 256), nn.Linear(64, 64)
            self.norm, self.embed = nn.LayerNorm(64), nn.Embedding(10, 64)

    block = Block()
    kept = {name: p.clone() for name, p in block.named_parameters()}
    roles = deepnorm_init_(block, 0.25, generator=torch.Generator().manual_seed(0))
    assert roles == {
        "q_proj.weight": "query_key", "v_proj.weight": "branch", "fc1.weight": "branch",
    }  # fmt: skip
    assert deviation(block.q_proj.weight, 64, 128, 1.0) < 5
    assert deviation(block.v_proj.weight, 64, 128, 0.25) < 5
    assert deviation(block.fc1.weight, 64, 256, 0.25) < 5
    assert not block.fc1.bias.any()
    for name in ("gate.weight", "gate.bias", "norm.weight", "norm.bias", "embed.weight"):
        assert torch.equal(block.get_parameter(name), kept[name])
    again = Block()
    deepnorm_init_(again, 0.25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.fc1.weight, block.fc1.weight)


@pytest.mark.parametrize("key_size", [64, 48], ids=["packed", "unpacked"])
def test_torch_attention_is_three_blocks(key_size: int) -> None:
    attention = nn.MultiheadAttention(64, 4, kdim=key_size, vdim=key_size)
    nn.init.ones_(attention.in_proj_bias)
    roles = deepnorm_init_(attention, 0.25, generator=torch.Generator().manual_seed(0))
    if key_size == 64:
        assert roles == {"in_proj_weight": "query_key+branch", "out_proj.weight": "branch"}
        query, key, value = attention.in_proj_weight.chunk(3)
    else:
        assert roles == {
            "q_proj_weight": "query_key", "k_proj_weight": "query_key", "v_proj_weight": "branch",
            "out_proj.weight": "branch",
        }  # fmt: skip
        query, key = attention.q_proj_weight, attention.k_proj_weight
        value = attention.v_proj_weight
    assert deviation(query, 64, 64, 1.0) < 5
    assert deviation(key, 64, key_size, 1.0) < 5
    assert deviation(value, 64, key_size, 0.25) < 5
    assert deviation(attention.out_proj.weight, 64, 64, 0.25) < 5
    assert not attention.in_proj_bias.any()


def test_own_transformer_is_understood_and_roles_can_be_given() -> None:
    model = Transformer(TransformerConfig(vocab_size=5, dim=8, num_layers=1, num_heads=2))
    roles = deepnorm_init_(model, 0.5)
    ends = {name.split(".")[-2]: kind for name, kind in roles.items()}
    assert ends == {
        "query_projection": "query_key", "key_projection": "query_key",
        "value_projection": "branch", "output_projection": "branch", "fc1": "branch",
        "fc2": "branch",
    }  # fmt: skip
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert deepnorm_init_(
        plain, 0.5, role=lambda name, module: "branch" if name == "1" else "other"
    )


def test_vectors_of_residual_blocks_are_slower() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), Residual(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 4, style="post")
    )
    others, vectors = depth_parameter_groups(model, lr=0.3, num_layers=6)
    assert (others["lr"], vectors["lr"]) == (0.3, pytest.approx(0.05))
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (*model[0].parameters(), *[p for p in model[1].parameters() if p.ndim == 2])
    }
    assert len(vectors["params"]) == 4
    torch.optim.SGD([others, vectors])


@pytest.mark.bad_input
def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder_layers must be at least 0, got -1"):
        deepnorm_coefficients(encoder_layers=-1)
    with pytest.raises(ValueError, match="got 0 and 0"):
        deepnorm_coefficients()
    for wrong in (True, 3.0):
        with pytest.raises(TypeError, match="num_layers must be an integer"):
            depth_scaling(wrong)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        residual_gain(0, 0.1)
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            residual_gain(3, wrong)
    with pytest.raises(ValueError, match="sgd, adam, lamb, got 'adagrad'"):
        depth_scaling(3, optimizer="adagrad")
    with pytest.raises(ValueError, match="post, pre, got 'sandwich'"):
        depth_scaling(3, norm="sandwich")
    with pytest.raises(ValueError, match="zeros"):
        magnitude(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        magnitude(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        magnitude_gradient(torch.ones(3, 4), torch.ones(4, 3))
    with pytest.raises(ValueError, match="beta"):
        deepnorm_init_(nn.Linear(3, 3), 0.0)
    with pytest.raises(ValueError, match="no branch weight"):
        deepnorm_init_(nn.Sequential(nn.Linear(3, 3)), 1.0)
    with pytest.raises(ValueError, match="got 'value' for '0'"):
        deepnorm_init_(nn.Sequential(nn.Linear(3, 3)), 1.0, role=lambda name, module: "value")
    with pytest.raises(ValueError, match="no Residual block"):
        depth_parameter_groups(nn.Linear(3, 3), lr=0.1, num_layers=3)
    with pytest.raises(ValueError, match="lr"):
        depth_parameter_groups(Residual(nn.Linear(3, 3), 3), lr=0.0, num_layers=3)
