"""Dimensions against 40-digit tails, maps against their laws and against dense products."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.exceptions import NotFittedError

from kexue.stats.projection import (
    GaussianRandomProjection,
    HadamardRandomProjection,
    SparseRandomProjection,
    distortion,
    hadamard_transform,
    johnson_lindenstrauss_eps,
    johnson_lindenstrauss_min_dim,
    norm_failure_probability,
)

EPS = np.finfo(float).eps
BOUNDS = ("exact", "chernoff", "dasgupta-gupta", "article")
MAPS = (GaussianRandomProjection, SparseRandomProjection, HadamardRandomProjection)
every_map = pytest.mark.parametrize("kind", MAPS)


def dense(matrix: object) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else matrix


@pytest.mark.parametrize(
    ("n", "eps", "probability"),
    [
        (10, 0.5, 0.24088383737357),
        (100, 0.3, 0.033357900286217),
        (1000, 0.1, 0.025331646217585),
        (5000, 0.1, 7.371008680361e-7),
    ],
)
def test_exact_failure_probability(n: int, eps: float, probability: float) -> None:
    # The oracles are written down to 13 or 14 digits.
    assert norm_failure_probability(n, eps) == pytest.approx(probability, rel=2e-13)


def test_the_other_bounds_on_the_failure_probability() -> None:
    values = (0.16440129825804, 0.19394393572881, 2 * math.exp(-1.25))
    for bound, value in zip(BOUNDS[1:], values, strict=True):
        assert norm_failure_probability(1000, 0.1, bound=bound) == pytest.approx(value, rel=5e-14)


def log_tail(a: float, e: float) -> float:
    """Log of the tail of a Gamma(a) variable beyond a(1 + e), in 40 digits."""
    with mpmath.workdps(40):
        order, e = mpmath.mpf(a), mpmath.mpf(e)
        end = order * (1 + e)
        below, above = (0, end) if e < 0 else (end, mpmath.inf)
        return float(mpmath.log(mpmath.gammainc(order, below, above, regularized=True)))


@pytest.mark.parametrize(
    ("n", "deviations"),
    [
        (n, deviations)
        for n in (41, 100, 1000, 10_000)
        for deviations in (1.0, 4.4, 4.6, 10.0, 30.0)
        if deviations * math.sqrt(2 / n) < 1
    ],
)
def test_exact_failure_probability_agrees_with_forty_digits(n: int, deviations: float) -> None:
    eps = deviations * math.sqrt(2 / n)
    exact = np.logaddexp(log_tail(n / 2, eps), log_tail(n / 2, -eps))
    # ε enters log p as nε²/4, rounded a few times; the incomplete gamma functions are good to a
    # hundred EPS within the deviations at which they are asked.
    tolerance = (200 + 8 * abs(exact)) * EPS
    assert norm_failure_probability(n, eps) == pytest.approx(math.exp(exact), rel=tolerance)


@pytest.mark.parametrize("n", [10**6, 10**9, 10**12])
@pytest.mark.parametrize("deviations", [4.6, 8.0, 30.0])
def test_far_tails_at_large_dimension_agree_with_the_normal_law_to_second_order(
    n: int, deviations: float
) -> None:
    # Saddle point: both tails are exp(n/2 (log(1±ε) ∓ ε)) times a factor which, against that of
    # the normal law, is 1 + O(1/√n).
    eps = deviations * math.sqrt(2 / n)
    with mpmath.workdps(40):
        errors = [sign * mpmath.mpf(eps) for sign in (1, -1)]
        rates = [float(mpmath.mpf(n) / 2 * (mpmath.log1p(e) - e)) for e in errors]
    mills = stats.norm.logsf(deviations) + deviations**2 / 2
    expected = np.logaddexp(*rates) + mills
    # First-order terms of the two tails have opposite signs; each is at most 1/(s√n) + s/√n.
    tolerance = 4 * (deviations + 1) / math.sqrt(n) + 1e-11
    assert math.log(norm_failure_probability(n, eps)) == pytest.approx(expected, abs=tolerance)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 10**7), eps=st.floats(1e-6, 0.999999))
def test_bounds_are_above_the_law(n: int, eps: float) -> None:
    p = {bound: norm_failure_probability(n, eps, bound=bound) for bound in BOUNDS}
    slack = 1 + 1e-9
    assert p["exact"] <= slack * p["chernoff"]
    assert p["chernoff"] <= slack * p["dasgupta-gupta"]
    assert p["chernoff"] <= slack * p["article"]
    # ε²/2 - ε³/3 > ε²/4 exactly below 3/4.
    if abs(eps - 0.75) > 1e-6 and p["article"] > 0:
        assert (p["dasgupta-gupta"] <= p["article"] * slack) or eps > 0.75


DIMENSIONS = {
    (100, 0.5): ((222, 278, 332, 443), (222, 278, 332, 442)),
    (1000, 0.1): ((7403, 8566, 8882, 16579), (6460, 7592, 7895, 14736)),
    (1000, 0.5): ((364, 424, 498, 664), (316, 376, 443, 590)),
    (10**4, 0.1): ((10262, 11497, 11842, 22105), (8351, 9541, 9869, 18421)),
    (10**6, 0.1): ((16049, 17381, 17763, 33158), (12184, 13457, 13816, 25789)),
    (10**6, 0.5): ((794, 863, 995, 1327), (602, 668, 774, 1032)),
}


@pytest.mark.parametrize(("case", "dimensions"), DIMENSIONS.items())
def test_dimension_for_distances(case: tuple, dimensions: tuple) -> None:
    N, eps = case
    for delta, expected in zip((None, 0.01), dimensions, strict=True):
        found = tuple(
            johnson_lindenstrauss_min_dim(N, eps=eps, failure_probability=delta, bound=bound)
            for bound in BOUNDS
        )
        assert found == expected


def test_dimension_for_inner_products_and_norms() -> None:
    for preserve, expected in (("inner_product", [6743, 12474]), ("norm", [3962, 6744])):
        found = johnson_lindenstrauss_min_dim(
            [1000, 10**6], eps=0.1, failure_probability=0.01, preserve=preserve
        )
        assert found.tolist() == expected
        assert found.dtype == np.int64


@pytest.mark.parametrize("preserve", ["distance", "inner_product", "norm"])
def test_article_bound_at_the_default_is_24_log_n_over_eps_squared(preserve: str) -> None:
    for N in (2, 10, 777, 10**5, 10**12):
        for eps in (0.01, 0.3, 0.9):
            n = johnson_lindenstrauss_min_dim(N, eps=eps, bound="article", preserve=preserve)
            assert n == math.ceil(24 * math.log(N) / eps**2)


def test_default_failure_probability_is_two_events_over_n_cubed() -> None:
    N = 50
    for preserve, events in (("distance", N * (N - 1) / 2), ("norm", N)):
        explicit = johnson_lindenstrauss_min_dim(
            N, eps=0.2, preserve=preserve, failure_probability=2 * events / N**3
        )
        assert johnson_lindenstrauss_min_dim(N, eps=0.2, preserve=preserve) == explicit


@pytest.mark.parametrize("eps", [0.1, 0.5, 0.9])
def test_scikit_learn_promises_success_with_probability_one_in_n(eps: float) -> None:
    from sklearn.random_projection import johnson_lindenstrauss_min_dim as theirs

    for N in (10, 1000, 10**6):
        ours = johnson_lindenstrauss_min_dim(
            N, eps=eps, failure_probability=(N - 1) / N, bound="dasgupta-gupta"
        )
        assert ours - theirs(N, eps=eps) in (0, 1)  # theirs is cut off, not rounded up


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(2, 10**12),
    eps=st.floats(0.01, 0.99),
    bound=st.sampled_from(BOUNDS),
    preserve=st.sampled_from(["distance", "inner_product", "norm"]),
)
def test_dimension_is_the_smallest_that_suffices(
    N: int, eps: float, bound: str, preserve: str
) -> None:
    n = johnson_lindenstrauss_min_dim(
        N, eps=eps, bound=bound, preserve=preserve, failure_probability=0.05
    )
    events = {"distance": N * (N - 1) / 2, "inner_product": N * (N - 1), "norm": N}[preserve]
    allowed = 0.05 / events
    assert norm_failure_probability(n, eps, bound=bound) <= allowed * (1 + 1e-9)
    if n > 1:
        assert norm_failure_probability(n - 1, eps, bound=bound) > allowed * (1 - 1e-9)


def test_dimension_of_a_trillion_points_at_one_percent() -> None:
    n = johnson_lindenstrauss_min_dim(10**12, eps=0.01)
    p = norm_failure_probability(n, 0.01)
    assert p <= 2e-36 < norm_failure_probability(n - 1, 0.01)


def test_samples_and_errors_broadcast() -> None:
    table = johnson_lindenstrauss_min_dim([[100], [1000]], eps=[0.1, 0.5])
    assert table.shape == (2, 2)
    assert table[1].tolist() == [7403, 364]
    assert isinstance(johnson_lindenstrauss_min_dim(100), int)


@pytest.mark.parametrize(
    ("N", "n", "eps"), [(1000, 500, 0.38696211972519), (10**6, 768, 0.43592084770598)]
)
def test_guaranteed_error(N: int, n: int, eps: float) -> None:
    found = johnson_lindenstrauss_eps(N, n, failure_probability=0.01)
    assert found == pytest.approx(eps, rel=5e-14)


@pytest.mark.parametrize("bound", BOUNDS)
def test_guaranteed_error_inverts_the_dimension(bound: str) -> None:
    eps = johnson_lindenstrauss_eps(1000, 700, bound=bound)
    assert johnson_lindenstrauss_min_dim(1000, eps=eps * (1 + 1e-9), bound=bound) == 700
    assert johnson_lindenstrauss_min_dim(1000, eps=eps * (1 - 1e-9), bound=bound) == 701


def test_no_error_below_one_can_be_guaranteed_in_few_dimensions() -> None:
    assert johnson_lindenstrauss_eps(1000, 2) == math.inf
    assert johnson_lindenstrauss_eps(1000, 100, bound="article") == math.inf


@pytest.mark.parametrize("d", [1, 2, 4, 64, 128, 256, 2048, 2**15])
def test_hadamard_transform_is_the_product_with_the_matrix(d: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, d))
    if d <= 2048:
        H = scipy.linalg.hadamard(d).astype(float)
        # A sum of d terms of size 1, its error a few √d EPS.
        atol = 16 * math.sqrt(d) * EPS
        np.testing.assert_allclose(hadamard_transform(x, normalize=False), x @ H, atol=atol)
    twice = hadamard_transform(hadamard_transform(x))
    np.testing.assert_allclose(twice, x, atol=1e-12)


def test_hadamard_transform_is_its_own_gradient() -> None:
    x, y = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    (hadamard_transform(x) * y).sum().backward()
    torch.testing.assert_close(x.grad, hadamard_transform(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_single(dtype: torch.dtype) -> None:
    # The partial sums exceed float16's range, the normalised result does not.
    x = torch.full((2, 4096), 60.0, dtype=dtype)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    assert float(y[0, 0]) == 60.0 * 64
    assert not y[:, 1:].any()


def test_hadamard_transform_of_integers_is_double() -> None:
    assert hadamard_transform(np.arange(4)).dtype == np.float64
    assert hadamard_transform(torch.arange(4), normalize=False).tolist() == [6, -2, -4, 0]


@every_map
def test_projection_is_the_product_with_its_components(kind: type) -> None:
    X = np.random.default_rng(0).standard_normal((7, 2500))
    projection = kind(60, random_state=1).fit(X)
    components = dense(projection.components_)
    assert components.shape == (60, 2500)
    # Sums of 2500 products of size about 1/√60: some hundred EPS at most.
    np.testing.assert_allclose(projection.transform(X), X @ components.T, atol=1e-12)


@every_map
def test_sparse_rows_and_tensors_meet_the_same_map(kind: type) -> None:
    X = sp.random(9, 1500, density=0.05, random_state=0, format="csr")
    projection = kind(40, random_state=1).fit(X)
    Z = projection.transform(X)
    assert isinstance(Z, np.ndarray)
    for other in (X.toarray(), X.tocsc(), torch.from_numpy(X.toarray())):
        np.testing.assert_allclose(np.asarray(projection.transform(other)), Z, atol=1e-13)
    assert projection.fit(torch.from_numpy(X.toarray())).transform(X).tolist() == Z.tolist()


@every_map
def test_column_chunks_add_up(kind: type) -> None:
    X = np.random.default_rng(0).standard_normal((5, 3000))
    projection = kind(50, random_state=2).fit_shape(5, 3000)
    whole = projection.transform(X)
    ends = [0, 1, 900, 1100, 2600, 3000]
    for convert in (np.asarray, sp.csr_array, torch.from_numpy):
        parts = [
            projection.transform_columns(convert(X[:, a:b]), a) for a, b in itertools.pairwise(ends)
        ]
        np.testing.assert_allclose(np.asarray(sum(parts)), whole, atol=1e-12)


@pytest.mark.parametrize("kind", [GaussianRandomProjection, SparseRandomProjection])
def test_a_map_too_large_to_keep_is_drawn_again_with_the_same_numbers(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = np.random.default_rng(0).standard_normal((4, 2100))
    kept = kind(30, random_state=5).fit(X)
    monkeypatch.setattr("kexue.stats.projection.maps._KEPT_BYTES", 0)
    drawn = kind(30, random_state=5).fit(X)
    assert drawn._kept is None
    assert kept._kept is not None
    assert (dense(drawn.components_) == dense(kept.components_)).all()
    np.testing.assert_allclose(drawn.transform(X), kept.transform(X), atol=1e-12)
    sparse = sp.csr_matrix(X)
    np.testing.assert_allclose(drawn.transform(sparse), kept.transform(sparse), atol=1e-12)


@every_map
def test_column_blocks_are_not_alike(kind: type) -> None:
    components = dense(kind(64, random_state=0).fit_shape(2, 4096).components_)
    first, second = components[:, :1024], components[:, 1024:2048]
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("x", ["spike", "constant", "normal"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GaussianRandomProjection, {}),
        (SparseRandomProjection, {"density": 1 / 3}),
        (SparseRandomProjection, {}),
        (HadamardRandomProjection, {}),
    ],
)
def test_squared_length_is_kept_on_average(kind: type, options: dict, x: str) -> None:
    m, n, seeds = 50, 20, 80
    vector = {
        "spike": np.eye(m)[7],
        "constant": np.ones(m),
        "normal": np.random.default_rng(0).standard_normal(m),
    }[x]
    vector = vector / np.linalg.norm(vector)
    squares = [
        float((kind(n, random_state=s, **options).fit_shape(2, m).transform(vector[None])**2).sum())
        for s in range(seeds)
    ]  # fmt: skip
    # Five standard errors: one false alarm in a million.
    tolerance = 5 * np.std(squares) / math.sqrt(seeds) + 8 * EPS
    assert np.mean(squares) == pytest.approx(1.0, abs=tolerance)


def test_squared_length_under_normal_entries_has_the_chi_square_law() -> None:
    n, x = 12, np.random.default_rng(1).standard_normal((1, 30))
    projections = (GaussianRandomProjection(n, random_state=s).fit(x) for s in range(300))
    squares = [n * float((p.transform(x) ** 2).sum() / (x**2).sum()) for p in projections]
    assert stats.kstest(squares, stats.chi2(n).cdf).pvalue > 1e-4


def test_normal_entries_are_independent_normal_and_of_variance_one_over_n() -> None:
    n = 64
    components = GaussianRandomProjection(n, random_state=0).fit_shape(2, 3000).components_
    assert stats.kstest(math.sqrt(n) * components.ravel(), stats.norm.cdf).pvalue > 1e-4
    # Squared cosines of independent columns have mean 1/n, and 3e6 pairs make that sharp: their
    # standard deviation is below √2/n, and columns repeated among blocks would add 3e3 ones.
    unit = components / np.linalg.norm(components, axis=0)
    gram = (unit.T @ unit)[np.triu_indices(3000, 1)]
    assert np.mean(gram**2) == pytest.approx(1 / n, abs=5 * math.sqrt(2) / n / math.sqrt(gram.size))
    assert np.abs(gram).max() < 0.9


@pytest.mark.parametrize("density", [1.0, 1 / 3, 0.02])
def test_sparse_entries_are_independent_signs(density: float) -> None:
    n, m = 100, 5000
    projection = SparseRandomProjection(n, density=density, random_state=0).fit_shape(2, m)
    components = projection.components_
    assert components.format == "csc"
    assert projection.density_ == density
    np.testing.assert_allclose(np.abs(components.data), 1 / math.sqrt(n * density), rtol=4 * EPS)
    nonzero = components.toarray() != 0
    deviation = math.sqrt(n * m * density * (1 - density))
    assert nonzero.sum() == pytest.approx(n * m * density, abs=5 * deviation)
    positive = (components.data > 0).sum()
    assert positive == pytest.approx(components.nnz / 2, abs=5 * math.sqrt(components.nnz) / 2)
    if density < 1:
        # Non-zeros of a column, and of a row, are binomial: their variance has a relative
        # standard error of √(2/count) and a little more where the law is skewed.
        for axis, length in ((0, n), (1, m)):
            counts = nonzero.sum(axis=axis)
            variance = length * density * (1 - density)
            error = math.sqrt((2 + 1 / variance) / len(counts))
            assert counts.var() == pytest.approx(variance, rel=5 * error)


def test_default_density_is_one_over_the_root_of_the_features() -> None:
    assert SparseRandomProjection(5).fit_shape(2, 400).density_ == 1 / 20


def test_hadamard_map_spreads_a_spike_evenly() -> None:
    projection = HadamardRandomProjection(20, random_state=0).fit_shape(2, 100)
    z = projection.transform(np.eye(100)[[3, 70]])
    np.testing.assert_allclose(np.abs(z), 1 / math.sqrt(20), rtol=8 * EPS)


@pytest.mark.parametrize("m", [64, 50])
def test_hadamard_map_with_all_coordinates_is_an_isometry(m: int) -> None:
    X = np.random.default_rng(0).standard_normal((10, m))
    Z = HadamardRandomProjection(64, random_state=0).fit_transform(X)
    np.testing.assert_allclose(Z @ Z.T, X @ X.T, atol=64 * m * EPS)


def test_hadamard_map_does_not_collapse_smooth_data() -> None:
    # Without signs, a constant vector would go into a single coordinate, chosen or not.
    x = np.ones((1, 4096))
    for seed in range(5):
        z = HadamardRandomProjection(256, random_state=seed).fit_transform(x)
        assert 0.5 < float((z**2).sum()) / 4096 < 2


@every_map
def test_tensors_keep_device_type_gradient_and_leading_dimensions(kind: type) -> None:
    projection = kind(6, random_state=0).fit_shape(2, 40)
    X = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    Z = projection.transform(X)
    assert (Z.shape, Z.dtype, Z.device) == ((2, 3, 6), X.dtype, X.device)
    Z.sum().backward()
    expected = dense(projection.components_).sum(axis=0)
    np.testing.assert_allclose(X.grad[1, 2], expected, atol=1e-6)
    flat = projection.transform(X.detach().reshape(6, 40))
    torch.testing.assert_close(flat.reshape(2, 3, 6), Z.detach())
    assert projection.transform(X[:0]).shape == (0, 3, 6)


@every_map
def test_floating_types(kind: type) -> None:
    X = np.random.default_rng(0).standard_normal((3, 40))
    projection = kind(6, random_state=0).fit(X)
    Z = projection.transform(X)
    assert projection.transform(X.astype(np.float32)).dtype == np.float32
    assert projection.transform(np.arange(40)[None]).dtype == np.float64
    assert projection.transform(torch.arange(40)[None]).dtype == torch.float64
    half = projection.transform(torch.from_numpy(X).half())
    assert half.dtype == torch.float16
    # Input and output are rounded to 11 bits, what is between to 24.
    np.testing.assert_allclose(half.double(), Z, atol=4 * 2**-11 * np.abs(Z).max())


@every_map
def test_one_seed_one_map(kind: type) -> None:
    X = np.random.default_rng(0).standard_normal((3, 40))
    one, two = (kind(6, random_state=8).fit(X) for _ in range(2))
    assert one.transform(X).tobytes() == two.transform(X).tobytes()
    assert one.fit(X).transform(X).tobytes() == two.transform(X).tobytes()
    free = kind(6)
    assert not np.array_equal(free.fit(X).transform(X), free.fit(X).transform(X))


@every_map
def test_names_of_features_that_come_out(kind: type) -> None:
    projection = kind(2).fit_shape(2, 5)
    prefix = kind.__name__.lower()
    assert projection.get_feature_names_out().tolist() == [f"{prefix}0", f"{prefix}1"]


@every_map
def test_automatic_dimension_is_the_exact_one(kind: type) -> None:
    projection = kind(eps=0.5, failure_probability=0.01).fit_shape(1000, 4096)
    assert projection.n_components_ == 316


@every_map
@pytest.mark.bad_input
def test_refusals(kind: type) -> None:
    X = np.ones((4, 10))
    with pytest.raises(NotFittedError):
        kind(2).transform(X)
    with pytest.raises(NotFittedError):
        kind(2).transform_columns(X, 0)
    with pytest.raises(ValueError, match=r"lead to a target dimension of 7403 which is larger"):
        kind().fit(np.ones((1000, 10)))
    fitted = kind(2).fit(X)
    wording = f"X has 9 features, but {kind.__name__} is expecting 10 features as input"
    for wrong in (X[:, :9], torch.ones(4, 9)):
        with pytest.raises(ValueError, match=wording):
            fitted.transform(wrong)
    for start in (-1, 7, 2.0):
        for wrong in (X[:, :4], torch.ones(4, 4)):
            with pytest.raises(ValueError, match="columns"):
                fitted.transform_columns(wrong, start)
    with pytest.raises(TypeError, match="dense"):
        fitted.transform(torch.ones(4, 10).to_sparse())
    with pytest.raises(ValueError, match="n_features"):
        kind(2).fit_shape(3, 0)
    with pytest.raises(ValueError, match="NaN"):
        fitted.transform(np.full((2, 10), np.nan))


def brute_force(X: np.ndarray, Z: np.ndarray) -> tuple[int, float, float, float]:
    distances, inner = [], []
    for i in range(len(X)):
        for j in range(i):
            before = float(((X[i] - X[j]) ** 2).sum())
            if before > 0:
                distances.append(abs(float(((Z[i] - Z[j]) ** 2).sum()) / before - 1))
            lengths = float(np.linalg.norm(X[i]) * np.linalg.norm(X[j]))
            if lengths > 0:
                inner.append(abs(float(Z[i] @ Z[j] - X[i] @ X[j])) / lengths)
    return len(distances), max(distances), float(np.mean(distances)), max(inner)


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_distortion_agrees_with_all_pairs_one_by_one(block_size: int) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((15, 8))
    X[3] = X[9]  # a pair of equal points
    X[5] = X[6] + 1e-9  # and a pair so close that products lose their distance
    X[7] = 0
    Z = X @ rng.standard_normal((8, 3))
    expected = brute_force(X, Z)
    for convert in (np.asarray, sp.csr_array, torch.from_numpy):
        found = distortion(convert(X), convert(Z), block_size=block_size)
        assert found.n_pairs == expected[0] == 104
        # Above the threshold, a squared distance has lost at most seven digits.
        values = (found.max_distance_error, found.mean_distance_error,
                  found.max_inner_product_error)  # fmt: skip
        assert values == pytest.approx(expected[1:], rel=1e-8)


def test_distortion_of_numbers_whose_squares_overflow() -> None:
    X = np.random.default_rng(0).standard_normal((6, 4))
    Z = X[:, :3]
    plain = distortion(X, Z)
    large = distortion(1e200 * X, 1e200 * Z)
    assert large.max_distance_error == pytest.approx(plain.max_distance_error, rel=1e-12)


def test_distortion_without_pairs_is_nothing() -> None:
    assert distortion(np.ones((3, 2)), np.ones((3, 1))).n_pairs == 0
    assert distortion(np.ones((1, 2)), np.ones((1, 1))).max_inner_product_error == 0


def test_columns_stream_in_little_memory() -> None:
    n, m = 1000, 100_000
    X = np.ones((4, 1024), dtype=np.float32)
    for kind in MAPS:
        projection = kind(n, random_state=0).fit_shape(100, m)
        if hasattr(projection, "_kept"):
            projection._kept = None
        tracemalloc.start()
        projection.transform_columns(X, 50_000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 32 * 2**20, kind.__name__
