"""kexue.nn.linear_attention: features, their variance, and the stable evaluation."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor

from kexue.nn.linear_attention import (
    RandomFeatures,
    linear_attention,
    random_projection,
    softmax_kernel_variance,
)

EPS = float(np.finfo(np.float64).eps)
DIGITS = 6e-10
"""The oracles are given to ten digits after the point, the smallest of them 0.07."""
Q = torch.tensor([0.5, -0.25, 0.75, 0.1], dtype=torch.float64)
K = torch.tensor([0.2, 0.4, 0.3, -0.6], dtype=torch.float64)
SM = math.exp(float(Q @ K))
W = torch.tensor(
    [[1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1]],
    dtype=torch.float64,
)


def fixed(kind: str) -> RandomFeatures:
    features = RandomFeatures(4, 3, kind=kind, dtype=torch.float64)
    features.load_state_dict({"projection": W})
    return features


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def quadratic(log_query: Tensor, log_key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """The n × n matrix of logsumexp_f(b_if + a_jf), and an ordinary softmax."""
    logits = torch.logsumexp(log_query[..., :, None, :] + log_key[..., None, :, :], -1)
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    return logits.softmax(-1) @ value


# What the features are.


def test_features_of_a_fixed_projection() -> None:
    features = fixed("positive")
    expected = [0.6115209011, 0.2249659674, 0.8677894661]
    assert features(Q).tolist() == pytest.approx(expected, abs=DIGITS)
    assert float(features(Q) @ features(K)) == pytest.approx(0.7886073514, abs=DIGITS)
    scaled = [0.6590191052, 0.3249416878, 0.8440737723]
    assert features(Q, scale=0.5).tolist() == pytest.approx(scaled, abs=DIGITS)


@pytest.mark.parametrize(
    ("kind", "product"), [("hyperbolic", 0.5346656932), ("trigonometric", 1.1714928849)]
)
def test_features_in_pairs(kind: str, product: float) -> None:
    features = fixed(kind)
    assert features(Q).shape == (6,)
    assert float(features(Q) @ features(K)) == pytest.approx(product, abs=DIGITS)


@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
def test_log_features_are_the_logarithms(kind: str) -> None:
    features, x = fixed(kind), normal(2, 5, 4)
    for scale in (1.0, 0.3):
        torch.testing.assert_close(
            features.log_features(x, scale=scale), features(x, scale=scale).log()
        )


def test_log_features_stay_finite_where_features_overflow() -> None:
    x = torch.full((1, 4), 1e4)
    assert torch.isfinite(fixed("positive").log_features(x)).all()


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
@pytest.mark.parametrize("norm", ["chi", "stratified"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_products_of_features_are_unbiased(kind: str, norm: str, orthogonal: bool) -> None:
    generator, draws = torch.Generator().manual_seed(0), 400
    options = {"orthogonal": orthogonal, "norm": norm, "generator": generator}
    features = RandomFeatures(4, 6, kind=kind, dtype=torch.float64, **options)
    products = []
    for _ in range(draws):
        features.redraw_(generator)
        products.append(float(features(Q) @ features(K)))
    # Five standard errors of the mean.
    assert np.mean(products) == pytest.approx(SM, abs=5 * np.std(products) / math.sqrt(draws))


def test_default_number_of_features_is_d_log_d() -> None:
    assert RandomFeatures(64).projection.shape == (267, 64)
    assert RandomFeatures(1).projection.shape == (1, 1)


def test_half_precision_is_computed_in_float32() -> None:
    features, x = RandomFeatures(16, 32), normal(5, 16).bfloat16()
    torch.testing.assert_close(features(x), features(x.float()).bfloat16(), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(features(x.float()), features.float()(x.float()).float())
    torch.testing.assert_close(features.log_features(x.float()).exp(), features(x.float()))


def test_arithmetic_is_in_the_dtype_of_the_vectors() -> None:
    features, x = RandomFeatures(16, 32), normal(5, 16)
    assert features(x).dtype == torch.float64
    torch.testing.assert_close(features(x), features.double()(x), rtol=1e-14, atol=0)


# Where the projection comes from.


def test_directions_have_no_preferred_sign() -> None:
    # Each coordinate of a unit direction in d dimensions has mean 0 and variance 1/d.
    d, draws = 8, 300
    generator = torch.Generator().manual_seed(0)
    projections = torch.stack(
        [random_projection(d, d, generator=generator, dtype=torch.float64) for _ in range(draws)]
    )
    directions = projections / projections.norm(dim=-1, keepdim=True)
    assert directions.mean(0).abs().max() < 5 / math.sqrt(draws * d)


def test_exponential_moment_at_64_dimensions() -> None:
    # Uncorrected, every row of QR leans to one side, and this mean is 7 % too low.
    generator, blocks = torch.Generator().manual_seed(0), 300
    z = torch.full((64,), 0.125, dtype=torch.float64)
    means = torch.stack(
        [
            (random_projection(64, 64, generator=generator, dtype=torch.float64) @ z).exp().mean()
            for _ in range(blocks)
        ]
    )
    error = 5 * float(means.std()) / math.sqrt(blocks)
    assert float(means.mean()) == pytest.approx(math.exp(0.5), abs=error)


def test_rows_are_orthogonal_in_blocks() -> None:
    rows = random_projection(10, 4, dtype=torch.float64)
    for block in (rows[:4], rows[4:8], rows[8:]):
        directions = block / block.norm(dim=1, keepdim=True)
        assert (directions @ directions.T - torch.eye(len(block))).abs().max() < 32 * EPS


@pytest.mark.parametrize(
    ("dim", "radii"),
    [
        (4, [1.3865632067, 1.8321282652, 2.3206182490]),
        (64, [7.3713294608, 7.7799953218, 8.1379569981, 8.5601453674]),
    ],
)
def test_quantile_norms(dim: int, radii: list[float]) -> None:
    rows = random_projection(len(radii), dim, norm="quantile", dtype=torch.float64)
    assert rows.norm(dim=1).sort().values.tolist() == pytest.approx(radii, abs=DIGITS)


def test_stratified_norms_lie_one_in_each_range() -> None:
    m, d = 50, 6
    rows = random_projection(m, d, norm="stratified", dtype=torch.float64)
    share = stats.chi2.cdf(rows.norm(dim=1).square().sort().values.numpy(), d)
    assert np.all((np.arange(m) <= share * m) & (share * m <= np.arange(1, m + 1)))


def test_lengths_are_assigned_to_rows_at_random() -> None:
    rows = torch.stack([random_projection(4, 4, norm="quantile") for _ in range(200)])
    first_is_longest = (rows.norm(dim=2).argmax(1) == 0).double().mean()
    assert float(first_is_longest) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 200))


@pytest.mark.parametrize(("orthogonal", "dim"), [(True, 3), (False, 3), (True, 1)])
def test_chi_norms_follow_the_chi_law(orthogonal: bool, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = random_projection(900, dim, orthogonal=orthogonal, generator=generator)
    # Kolmogorov's statistic of 900 draws exceeds 0.066 with a probability below 0.001.
    assert stats.kstest(rows.norm(dim=1).double().numpy(), stats.chi(dim).cdf).statistic < 0.066


def test_same_generator_state_gives_the_same_projection_bit_for_bit() -> None:
    for norm in ("chi", "stratified", "quantile", "sqrt_dim"):
        one, two = (
            random_projection(9, 4, norm=norm, generator=torch.Generator().manual_seed(7))
            for _ in range(2)
        )
        assert torch.equal(one, two)
        # Drawn in float64 and then rounded, so that a dtype is a matter of rounding only.
        double = random_projection(
            9, 4, norm=norm, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        )
        assert torch.equal(double.float(), one)


def test_redraw_keeps_graphs_that_hold_the_old_projection() -> None:
    features, x = RandomFeatures(4, 8), normal(3, 4).requires_grad_()
    product = features(x).sum()
    assert features.redraw_() is features
    product.backward()
    assert torch.isfinite(x.grad).all()


# How far the estimate strays.


@pytest.mark.parametrize(
    ("kind", "variance"),
    [("positive", 0.4743145580), ("hyperbolic", 0.2004225153), ("trigonometric", 0.0711328529)],
)
def test_variance_of_independent_rows(kind: str, variance: float) -> None:
    assert float(softmax_kernel_variance(Q, K, 16, kind=kind)) == pytest.approx(
        variance, abs=DIGITS
    )


@pytest.mark.parametrize(
    ("num_features", "variance"),
    [(1, 7.5890329284), (4, 1.7069837775), (6, 1.1661779931), (16, 0.4267459444)],
)
def test_variance_of_orthogonal_rows(num_features: int, variance: float) -> None:
    computed = softmax_kernel_variance(Q, K, num_features, orthogonal=True)
    assert float(computed) == pytest.approx(variance, abs=DIGITS)


@pytest.mark.parametrize(
    ("norm", "error"),
    [(1, 0.0819270309), (2, 0.1579786390), (4, 0.4575672339), (8, 3.4118119653), (16, 186.31)],
)
def test_relative_error_of_a_kernel_value(norm: float, error: float) -> None:
    # q = 0, so that the kernel value is 1 and its relative error the standard deviation.
    key = torch.tensor([math.sqrt(norm), 0.0], dtype=torch.float64)
    deviation = softmax_kernel_variance(torch.zeros_like(key), key, 256).sqrt()
    assert float(deviation) == pytest.approx(error, abs=DIGITS if norm < 16 else 0.005)


@pytest.mark.parametrize(
    ("dim", "norm", "num_features", "expectations"),
    [
        (64, "sqrt_dim", 64, [0.9962913471, 0.9452478483, 0.4706483092]),
        (64, "quantile", 64, [0.9990237616, 0.9909078870, 0.8616993586]),
        (16, "sqrt_dim", 16, [0.9870481699, 0.8370552939, 0.1521639298]),
    ],
)
def test_bias_of_fixed_norms(
    dim: int, norm: str, num_features: int, expectations: list[float]
) -> None:
    """Of the norms drawn, by averaging e^{w·z} over the sphere in closed form: 0F1."""
    rows = random_projection(num_features, dim, norm=norm, dtype=torch.float64)
    for z2, expected in zip((1, 4, 16), expectations, strict=True):
        moments = special.hyp0f1(dim / 2, rows.square().sum(1).numpy() * z2 / 4)
        assert np.mean(moments) * math.exp(-z2 / 2) == pytest.approx(expected, abs=DIGITS)


@pytest.mark.parametrize(
    ("kind", "orthogonal"),
    [("positive", True), ("positive", False), ("hyperbolic", False), ("trigonometric", False)],
)
def test_variance_in_simulation(kind: str, orthogonal: bool) -> None:
    generator, draws, d, m = torch.Generator().manual_seed(1), 2000, 8, 12
    q, k = 0.3 * normal(d, seed=2), 0.3 * normal(d, seed=3)
    # All draws as the rows of one projection: a block of d after the other, m of 16 rows used.
    rows = torch.stack(
        [
            random_projection(m, d, orthogonal=orthogonal, generator=generator, dtype=torch.float64)
            for _ in range(draws)
        ]
    )
    features = RandomFeatures(d, m * draws, kind=kind, dtype=torch.float64)
    features.projection = rows.flatten(0, 1)
    products = features(q) * features(k) * draws
    pairs = 1 if kind == "positive" else 2
    values = products.unflatten(-1, (pairs, draws, m)).sum((0, 2)).numpy()
    exact = float(softmax_kernel_variance(q, k, m, kind=kind, orthogonal=orthogonal))
    spread = np.std((values - values.mean()) ** 2) / math.sqrt(draws)
    assert np.var(values) == pytest.approx(exact, abs=5 * spread)


@settings(max_examples=40, deadline=None)
@given(dim=st.integers(1, 300), x=st.floats(1e-9, 800), m=st.integers(1, 400))
def test_orthogonal_variance_against_a_hypergeometric_function_in_high_precision(
    dim: int, x: float, m: int
) -> None:
    z = torch.zeros(dim, dtype=torch.float64)
    z[0] = math.sqrt(x)
    computed = float(softmax_kernel_variance(torch.zeros_like(z), z, m, orthogonal=True))
    x = float(z[0] ** 2)
    blocks, rest = divmod(m, dim)
    pairs = blocks * dim * (dim - 1) + rest * (rest - 1)
    with mpmath.workdps(60):
        gain = mpmath.exp(x) - mpmath.hyp1f1(dim, mpmath.mpf(dim) / 2, mpmath.mpf(x) / 2)
        exact = mpmath.expm1(x) / m - mpmath.mpf(pairs) / m**2 * mpmath.exp(-x) * gain
    if math.isfinite(computed) or exact < 1e307:
        # e^x loses x ulp of its argument; the Poisson weights add about as much.
        assert computed == pytest.approx(float(exact), rel=(8 + 4 * x) * EPS + 1e-13)


def test_variance_is_finite_where_its_factors_are_not() -> None:
    q, k = torch.tensor([40.0]), torch.tensor([-20.0])
    expected = math.exp(2 * -800 + 400)
    for orthogonal in (False, True):
        variance = softmax_kernel_variance(q, k, 1, orthogonal=orthogonal)
        assert float(variance) == pytest.approx(expected, rel=1e-12)
    assert float(softmax_kernel_variance(q, -q, 4, orthogonal=True)) == 0.0


def test_variance_broadcasts_scales_and_has_gradients() -> None:
    q, k = normal(3, 1, 5, scale=0.4), normal(4, 5, seed=1, scale=0.4)
    together = softmax_kernel_variance(q, k, 7, orthogonal=True, scale=0.5)
    assert together.shape == (3, 4)
    alone = softmax_kernel_variance(q[2, 0] * 0.5**0.5, k[3] * 0.5**0.5, 7, orthogonal=True)
    assert float(together[2, 3]) == pytest.approx(float(alone), rel=1e-12)
    q.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: softmax_kernel_variance(q, k, 7, orthogonal=True), (q,)
    )


def test_gradient_of_the_variance_at_opposite_vectors_is_zero() -> None:
    q = normal(5).requires_grad_()
    softmax_kernel_variance(q, -q.detach(), 7, orthogonal=True).backward()
    assert torch.equal(q.grad, torch.zeros(5, dtype=torch.float64))


# The sums.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_stable_form_equals_the_quadratic_one(causal: bool, chunk_size: int, spread: float) -> None:
    # With the wide spread later keys of a chunk dwarf earlier ones: rows are recomputed.
    b, a = normal(2, 3, 100, 16, scale=2), normal(2, 3, 100, 16, seed=1, scale=spread)
    value = normal(2, 3, 100, 5, seed=2)
    output = linear_attention(
        b, a, value, is_causal=causal, log_features=True, chunk_size=chunk_size
    )
    assert (output - quadratic(b, a, value, causal=causal)).abs().max() < 1e-9


@pytest.mark.parametrize("causal", [False, True])
def test_features_and_their_logarithms_give_the_same(causal: bool) -> None:
    b, a, value = normal(2, 2, 20, 6), normal(2, 2, 20, 6, seed=1), normal(2, 2, 20, 3, seed=2)
    mask = torch.rand(2, 1, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    options: dict[str, Any] = {"key_mask": mask, "is_causal": causal, "chunk_size": 8}
    torch.testing.assert_close(
        linear_attention(b.exp(), a.exp(), value, **options),
        linear_attention(b, a, value, log_features=True, **options),
        rtol=1e-10,
        atol=1e-12,
    )


def test_features_that_change_sign_are_summed_as_they_are() -> None:
    q, k, value = normal(1, 1, 9, 4), normal(1, 1, 9, 4, seed=1), normal(1, 1, 9, 2, seed=2)
    weights = q @ k.mT
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(linear_attention(q, k, value), expected)
    weights = weights.tril()
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(
        linear_attention(q, k, value, is_causal=True, chunk_size=4), expected
    )


@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_are_as_good_as_absent(causal: bool) -> None:
    b, a, value = normal(1, 2, 12, 5), normal(1, 2, 12, 5, seed=1), normal(1, 2, 12, 3, seed=2)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 1, 5, 11]] = False
    spoilt, broken = a.clone(), value.clone()
    spoilt[:, :, ~keep], broken[:, :, ~keep] = 1e9, math.nan
    options: dict[str, Any] = {"is_causal": causal, "log_features": True, "chunk_size": 4}
    masked = linear_attention(b, spoilt, broken, key_mask=keep, **options)
    absent = linear_attention(
        b[:, :, keep], a[:, :, keep], value[:, :, keep], is_causal=causal, log_features=True
    )
    torch.testing.assert_close(masked[:, :, keep], absent, rtol=1e-12, atol=1e-12)
    if causal:
        assert (masked[:, :, :2] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("log_features", [False, True])
def test_rows_without_keys_are_zero_with_finite_gradients(causal: bool, log_features: bool) -> None:
    features = normal(2, 1, 4, 3).abs().requires_grad_()
    value = normal(2, 1, 4, 2).requires_grad_()
    mask = torch.tensor([[False] * 4, [True] * 4])[:, None]
    output = linear_attention(
        features, features, value, key_mask=mask, is_causal=causal, log_features=log_features
    )
    assert (output[0] == 0).all()
    output.sum().backward()
    assert torch.isfinite(features.grad).all()
    assert (features.grad[0] == 0).all()
    assert (value.grad[0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 30),
    chunk_size=st.integers(1, 12),
    spread=st.floats(0, 1e4),
    seed=st.integers(0, 1000),
)
def test_causal_rows_are_averages_of_earlier_values(
    length: int, chunk_size: int, spread: float, seed: int
) -> None:
    """In single precision, whatever the size of the features; the first row is its value."""
    b, a = (normal(1, 1, length, 4, seed=seed + i, scale=spread).float() for i in (0, 1))
    value = normal(1, 1, length, 2, seed=seed + 2).float()
    output = linear_attention(b, a, value, is_causal=True, log_features=True, chunk_size=chunk_size)
    torch.testing.assert_close(output[:, :, 0], value[:, :, 0])
    tolerance = 1e-5 * float(value.abs().max())
    assert (output <= value.cummax(2).values + tolerance).all()
    assert (output >= value.cummin(2).values - tolerance).all()


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_causal_gradients_are_those_of_the_quadratic_form(spread: float) -> None:
    """Where rows are recomputed, too, and with keys that are masked."""
    inputs = [normal(1, 2, 20, 4, seed=s, scale=c) for s, c in ((0, 1), (1, spread), (2, 1))]
    mask = torch.ones(20, dtype=torch.bool)
    mask[[0, 7]] = False
    weight = normal(1, 2, 20, 4, seed=5)
    weight[:, :, 0] = 0
    gradients = []
    for linear in (True, False):
        b, a, value = (x.clone().requires_grad_() for x in inputs)
        if linear:
            output = linear_attention(
                b, a, value, key_mask=mask, is_causal=True, log_features=True, chunk_size=8
            )
        else:
            kept = quadratic(b[:, :, mask], a[:, :, mask], value[:, :, mask], causal=True)
            rows = quadratic_row_of_a_masked_key(b, a, value, mask, 7)
            output = torch.zeros_like(value)
            output[:, :, mask] = kept
            output[:, :, 7] = rows
        gradients.append(torch.autograd.grad((output * weight).sum(), (b, a, value)))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def quadratic_row_of_a_masked_key(
    b: Tensor, a: Tensor, value: Tensor, mask: Tensor, row: int
) -> Tensor:
    """A query whose own key is masked still gathers what came before it."""
    before = mask.clone()
    before[row:] = False
    return quadratic(b[:, :, row : row + 1], a[:, :, before], value[:, :, before], causal=False)[
        :, :, 0
    ]


def test_half_precision_values_come_back_in_half_precision() -> None:
    b, value = normal(1, 1, 300, 4), normal(1, 1, 300, 2, seed=1).half()
    output = linear_attention(b.half(), b.half(), value, log_features=True)
    assert output.dtype == torch.float16
    exact = linear_attention(
        b.half().double(), b.half().double(), value.double(), log_features=True
    )
    # Half an ulp of the result, and float32 rounding of 300 terms.
    torch.testing.assert_close(output.double(), exact, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_empty_inputs(causal: bool) -> None:
    for batch, length in ((0, 3), (2, 0)):
        x = torch.zeros(batch, 1, length, 4)
        for log_features in (False, True):
            output = linear_attention(x, x, x, is_causal=causal, log_features=log_features)
            assert output.shape == (batch, 1, length, 4)
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 0, 4)
    assert (linear_attention(query, key, key, log_features=True) == torch.zeros(1, 1, 3, 4)).all()


@pytest.mark.bad_input
def test_wrong_arguments_of_features() -> None:
    features = RandomFeatures(4, 3)
    with pytest.raises(ValueError, match=r"dim = 4, got shape \(2, 5\)"):
        features(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="chi, stratified, quantile, sqrt_dim, got 'unit'"):
        random_projection(3, 4, norm="unit")
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        random_projection(0, 4)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        RandomFeatures(0)
    with pytest.raises(ValueError, match="positive, hyperbolic, trigonometric, got 'cosine'"):
        RandomFeatures(4, 3, kind="cosine")
    with pytest.raises(ValueError, match="change sign"):
        fixed("trigonometric").log_features(Q)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be a positive number"):
            features(torch.zeros(4), scale=scale)
    with pytest.raises(TypeError, match=r"real floating point numbers, got torch\.int64"):
        features(torch.zeros(4, dtype=torch.int64))


@pytest.mark.bad_input
def test_wrong_arguments_of_the_variance() -> None:
    for kind in ("hyperbolic", "trigonometric"):
        with pytest.raises(ValueError, match=f"positive features only, got '{kind}'"):
            softmax_kernel_variance(Q, K, 4, kind=kind, orthogonal=True)
    with pytest.raises(ValueError, match="got 4 and 3"):
        softmax_kernel_variance(Q, K[:3], 4)
    with pytest.raises(ValueError, match="must broadcast"):
        softmax_kernel_variance(torch.zeros(2, 4), torch.zeros(3, 4), 4)
    with pytest.raises(ValueError, match="got 0"):
        softmax_kernel_variance(Q, K, 0)
    with pytest.raises(ValueError, match="scale"):
        softmax_kernel_variance(Q, K, 4, scale=0.0)


@pytest.mark.bad_input
def test_wrong_arguments_of_the_sums() -> None:
    x = torch.zeros(2, 3, 5, 4)
    with pytest.raises(ValueError, match="number of features, got 4 and 3"):
        linear_attention(x, x[..., :3], x)
    with pytest.raises(ValueError, match="as many queries as keys, got 4 and 5"):
        linear_attention(x[:, :, :4], x, x, is_causal=True)
    with pytest.raises(ValueError, match="same length"):
        linear_attention(x, x, x[:, :, :4])
    with pytest.raises(ValueError, match="same batch and heads"):
        linear_attention(x[:, :1], x, x)
    with pytest.raises(ValueError, match=r"\(batch, heads, length, size\), got \(3, 5, 4\)"):
        linear_attention(x[0], x, x)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\), got shape \(4,\)"):
        linear_attention(x, x, x, key_mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        linear_attention(x, x, x, key_mask=torch.ones(5))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        linear_attention(x, x, x, chunk_size=0)
