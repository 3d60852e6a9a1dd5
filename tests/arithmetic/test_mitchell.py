"""Oracles and properties of `kexue.arithmetic.mitchell`.

The reference is exact: rational numbers, from the definition of Mitchell's logarithm, with no bit
pattern in it. Errors are those of the original's worked example, of Mitchell's analysis, and of
sums over all pairs of small integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.arithmetic.mitchell import (
    MINIMAX_CONSTANT,
    UNBIASED_CONSTANT,
    MitchellLinear,
    blocks,
    divide,
    exp2,
    linear,
    log2,
    matmul,
    multiply,
    multiply_integers,
    relative_error_bounds,
    sqrt,
)
from kexue.arithmetic.mitchell.corrections import Options

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CORRECTIONS: list[dict[str, Any]] = [
    {},
    {"correction": "constant"},
    {"correction": "constant", "constant": UNBIASED_CONSTANT},
    {"correction": "table", "table_bits": 0},
    {"correction": "table"},
    {"correction": "mitchell"},
    {"correction": "mitchell", "terms": 3},
]
INF, NAN = math.inf, math.nan


def split(p: Fraction) -> tuple[Fraction, Fraction]:
    """The power of two below a positive number, and the fraction x of 2^n (1 + x)."""
    n = p.numerator.bit_length() - p.denominator.bit_length()
    n -= Fraction(2) ** n > p
    return Fraction(2) ** n, p / Fraction(2) ** n - 1


def exact_product(p: Fraction, q: Fraction, terms: int = 0) -> Fraction:
    """Mitchell's product by its definition: n + x added, and taken back."""
    if not p or not q:
        return Fraction(0)
    if p < 0 or q < 0:
        return exact_product(abs(p), abs(q), terms) * (1 if (p < 0) == (q < 0) else -1)
    (power_p, x), (power_q, y) = split(p), split(q)
    power = power_p * power_q
    if x + y < 1:
        plain, residues = power * (1 + x + y), (x * power_p, y * power_q)
    else:
        plain, residues = 2 * power * (x + y), ((1 - x) * power_p, (1 - y) * power_q)
    return plain + (exact_product(*residues, terms - 1) if terms else 0)


def exact_quotient(p: Fraction, q: Fraction) -> Fraction:
    (power_p, x), (power_q, y) = split(p), split(q)
    power = power_p / power_q
    return power * (1 + x - y) if x >= y else power * (2 + x - y) / 2


def sample(dtype: torch.dtype, count: int, seed: int = 0) -> Tensor:
    """Numbers of either sign and thirteen exponents, with every bit of the mantissa in use."""
    generator = torch.Generator().manual_seed(seed)
    sign, mantissa = torch.rand(2, count, generator=generator, dtype=torch.float64)
    exponent = torch.randint(-6, 7, (count,), generator=generator)
    # Half precision holds the products of any two; the largest mantissa must not round to 2.
    x = torch.ldexp(1 + 0.99 * mantissa, exponent)
    return torch.where(sign < 0.5, -x, x).to(dtype)


def fractions(x: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in x.double().tolist()]


def as_bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize(
    ("options", "pair", "product"),
    [
        ({}, (12.3, 4.56), 53.68),
        ({"correction": "constant"}, (12.3, 4.56), 55.88344115988684),
        ({"correction": "table"}, (12.3, 4.56), 56.33625),
        ({"correction": "mitchell"}, (12.3, 4.56), 56.07),
        ({}, (math.pi, math.e), 7.719748964097676),
        ({"correction": "constant"}, (math.pi, math.e), 7.995179109083532),
        (CORRECTIONS[2], (math.pi, math.e), 7.946242046852154),
        ({"correction": "table", "table_bits": 4}, (math.pi, math.e), 8.505904178195353),
        ({"correction": "mitchell", "terms": 1}, (math.pi, math.e), 8.508827119351619),
        ({"correction": "mitchell", "terms": 2}, (math.pi, math.e), 8.538186429607723),
        ({}, (0.1, 0.7), 0.0625),
        ({}, (3, 3), 8.0),
        ({}, (-1.5, 1.5), -2.0),
        ({}, (1e10, 3e-7), 2913.166168615625),
    ],
)
def test_products_of_the_worked_examples(
    options: dict[str, Any], pair: tuple[float, float], product: float
) -> None:
    assert multiply(*pair, **options) == product


def test_the_single_precision_product_of_the_article() -> None:
    product = multiply(np.float32(12.3), np.float32(4.56))
    assert isinstance(product, np.float32)
    assert float(product) == 53.68000030517578


def test_quotients_logarithms_powers_and_roots_of_the_worked_examples() -> None:
    assert divide(12.3, 4.56) == 2.7950000000000004
    assert divide(math.pi, math.e) == 1.211655412565374
    assert divide(1.0, 1.5) == 0.75
    assert log2(10.0) == 3.25
    assert exp2(3.3) == 10.399999999999999
    assert [sqrt(x) for x in (2.0, 3.0, 10.0)] == [1.5, 1.75, 3.25]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_product_is_exactly_that_of_the_definition(dtype: torch.dtype) -> None:
    a, b = sample(dtype, 400, 1), sample(dtype, 400, 2)
    exact = [exact_product(p, q) for p, q in zip(fractions(a), fractions(b), strict=True)]
    assert fractions(multiply(a, b)) == exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quotient_is_exactly_that_of_the_definition(dtype: torch.dtype) -> None:
    a, b = sample(dtype, 400, 1).abs(), sample(dtype, 400, 2).abs()
    exact = [exact_quotient(p, q) for p, q in zip(fractions(a), fractions(b), strict=True)]
    assert fractions(divide(a, b)) == exact
    torch.testing.assert_close(divide(-a, b), -divide(a, b), rtol=0, atol=0)


@pytest.mark.parametrize("terms", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_series_is_the_exact_one_rounded_once(dtype: torch.dtype, terms: int) -> None:
    a, b = sample(dtype, 300, 3), sample(dtype, 300, 4)
    exact = [exact_product(p, q, terms) for p, q in zip(fractions(a), fractions(b), strict=True)]
    # All of the exact product's bits, 2 * 24 at most, fit into a float64.
    rounded = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(dtype)
    product = multiply(a, b, correction="mitchell", terms=terms)
    assert product.tolist() == rounded.tolist()


@pytest.mark.parametrize("terms", [1, 2, 5, 60])
def test_series_in_double_precision_rounds_each_term(terms: int) -> None:
    a, b = sample(torch.float64, 300, 5), sample(torch.float64, 300, 6)
    product = multiply(a, b, correction="mitchell", terms=terms)
    for p, q, value in zip(fractions(a), fractions(b), fractions(product), strict=True):
        exact = exact_product(p, q, terms)
        # Half a unit of the sum, and of each partial sum, which are four times smaller or more.
        assert abs(value - exact) <= abs(exact) * Fraction(2) ** -53 * (1 + Fraction(1, 3))


def test_a_long_series_is_the_true_product() -> None:
    a, b = sample(torch.float32, 2000, 7), sample(torch.float32, 2000, 8)
    product = multiply(a, b, correction="mitchell", terms=12)
    torch.testing.assert_close(product, a * b, rtol=0, atol=0)


@pytest.mark.parametrize("bits", range(7))
def test_table_adds_what_the_centre_of_the_cell_lacks(bits: int) -> None:
    a, b = (1 + sample(torch.float64, 200, seed).abs() % 1 for seed in (1, 2))
    product = multiply(a, b, correction="table", table_bits=bits)
    for p, q, value in zip(fractions(a), fractions(b), fractions(product), strict=True):
        u, v = (
            (math.floor((number - 1) * 2**bits) + Fraction(1, 2)) / 2**bits for number in (p, q)
        )
        true = (1 + u) * (1 + v)
        lacking = (true - 1 if true < 2 else true / 2) - u - v
        lacking = Fraction(round(lacking * 2**52), 2**52)
        total = p - 1 + q - 1 + lacking
        power = math.floor(total)
        assert value == 2**power * (1 + total - power)


def test_every_half_precision_pair_is_within_one_ninth() -> None:
    mantissas = (torch.arange(1024, dtype=torch.float64) / 1024 + 1).half()
    product = multiply(mantissas[:, None], mantissas).double()
    true = mantissas.double()[:, None] * mantissas.double()
    error = (product - true) / true
    assert float(error.max()) == 0.0
    assert float(error.min()) == -1 / 9
    assert (error == error.min()).nonzero().tolist() == [[512, 512]]


@pytest.mark.parametrize(
    ("terms", "total", "largest", "n_largest", "n_exact", "mean"),
    [
        (0, 1025628691, Fraction(1, 9), 49, 4016, 0.0378782838),
        (1, 1063921804, Fraction(1, 121), 25, 24401, 0.00126757508),
        (2, 1065332640, Fraction(1, 1849), 9, 55007, 2.53818e-5),
        (3, 1065369484, Fraction(1, 29241), 1, 64909, 4.94e-8),
        (4, 32640**2, Fraction(0), 65025, 65025, 0.0),
    ],
)
def test_all_pairs_of_bytes(
    terms: int, total: int, largest: Fraction, n_largest: int, n_exact: int, mean: float
) -> None:
    numbers = np.arange(1, 256)
    product = multiply_integers(numbers[:, None], numbers, terms=terms)
    true = numbers[:, None] * numbers
    assert product.dtype == np.int64
    assert int(product.sum()) == total
    assert int((product == true).sum()) == n_exact
    lacking = true - product
    assert (lacking >= 0).all()
    # In integers: lacking / true compared with the largest error.
    excess = lacking * largest.denominator - true * largest.numerator
    assert excess.max() == 0
    assert int((excess == 0).sum()) == n_largest
    # The means are given with these many digits.
    assert (lacking / true).mean() == pytest.approx(mean, rel=2e-3 if terms == 3 else 2e-6)


@pytest.mark.parametrize("terms", range(26))
def test_extremal_numbers_lack_one(terms: int) -> None:
    a = (2 * 4 ** (terms + 1) + 1) // 3
    assert multiply_integers(a, a, terms=terms) == a * a - 1
    assert multiply_integers(a, a, terms=terms + 1) == a * a


@settings(max_examples=200, deadline=None)
@given(a=st.integers(-(2**200), 2**200), b=st.integers(-(2**200), 2**200), k=st.integers(0, 6))
def test_integer_product_is_exactly_that_of_the_definition(a: int, b: int, k: int) -> None:
    product = multiply_integers(a, b, terms=k)
    assert product == exact_product(Fraction(a), Fraction(b), k)
    assert type(product) is int


@settings(max_examples=100, deadline=None)
@given(
    a=st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=3, max_size=3),
    b=st.integers(-(2**31) + 1, 2**31 - 1),
    k=st.integers(0, 40),
)
def test_arrays_of_integers_are_multiplied_like_integers(a: list[int], b: int, k: int) -> None:
    expected = [multiply_integers(value, b, terms=k) for value in a]
    arrays = np.array(a), torch.tensor(a), torch.tensor(a, dtype=torch.int32)
    for array in arrays:
        product = multiply_integers(array, b, terms=k)
        assert product.tolist() == expected
        assert str(product.dtype).removeprefix("torch.") == "int64"


def test_bits_by_half_terms_make_integers_exact() -> None:
    rng = np.random.default_rng(0)
    for bits in (1, 2, 5, 8, 16, 31):
        a, b = rng.integers(0, 2**bits, (2, 500))
        product = multiply_integers(a, b, terms=(bits + 1) // 2)
        assert (product == a * b).all()


def test_integer_results_keep_the_kind_and_the_shape() -> None:
    assert type(multiply_integers(np.int8(7), 9)) is np.int64
    assert multiply_integers(np.uint64(7), np.int8(-1)) == -7
    assert multiply_integers(torch.tensor([7], dtype=torch.uint8), 9).tolist() == [60]
    assert multiply_integers(np.zeros((0, 3), int), np.ones(3, int)).shape == (0, 3)
    assert multiply_integers(torch.ones(4, 1, dtype=int), torch.ones(5, dtype=int)).shape == (4, 5)
    assert multiply_integers(0, -5) == 0


@settings(max_examples=150, deadline=None)
@given(
    a=st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3),
    b=st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3),
    n=st.integers(-20, 20),
    index=st.integers(0, len(CORRECTIONS) - 1),
    single=st.booleans(),
)
def test_products_commute_also_with_powers_of_two_and_signs(
    a: float, b: float, n: int, index: int, single: bool
) -> None:
    options = CORRECTIONS[index]
    x, y = torch.tensor([a, b], dtype=torch.float32 if single else torch.float64)
    product = multiply(x, y, **options)
    assert multiply(y, x, **options) == product
    assert multiply(x * 2.0**n, y, **options) == product * 2.0**n
    assert multiply(-x, y, **options) == multiply(x, -y, **options) == -product


SPECIAL = [0.0, -0.0, 1.0, -2.5, INF, -INF, NAN]


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_follow_the_true_product(dtype: torch.dtype, options: Any) -> None:
    a, b = torch.cartesian_prod(*2 * [torch.tensor(SPECIAL, dtype=dtype)]).unbind(1)
    product, true = multiply(a, b, **options), a * b
    special = ~(a.isfinite() & b.isfinite() & (a != 0) & (b != 0))
    assert torch.equal(product.isnan(), true.isnan())
    known = special & ~true.isnan()
    assert torch.equal(as_bits(product[known]), as_bits(true[known]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_follow_the_true_quotient(dtype: torch.dtype) -> None:
    a, b = torch.cartesian_prod(*2 * [torch.tensor(SPECIAL, dtype=dtype)]).unbind(1)
    quotient, true = divide(a, b), a / b
    special = ~(a.isfinite() & b.isfinite() & (a != 0) & (b != 0))
    assert torch.equal(quotient.isnan(), true.isnan())
    known = special & ~true.isnan()
    assert torch.equal(as_bits(quotient[known]), as_bits(true[known]))


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_range_is_left_towards_infinity_and_zero(dtype: torch.dtype, options: Any) -> None:
    info = torch.finfo(dtype)
    big, tiny = (torch.tensor(x, dtype=dtype) for x in (info.max, info.tiny))
    assert multiply(big, -big, **options) == -INF
    assert multiply(big, torch.tensor(2.0, dtype=dtype), **options) == INF
    assert multiply(big, torch.tensor(0.5, dtype=dtype), **options) < INF
    for factor in (0.5, -tiny.item()):
        product = multiply(tiny, torch.tensor(factor, dtype=dtype), **options)
        # Corrections may lift 2^-1 (1 + 0) by less than a power of two, never to a normal number.
        assert product == 0
        assert math.copysign(1, product) == math.copysign(1, factor)
    assert divide(big, tiny) == INF
    assert divide(tiny, big) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_numbers_count_as_zero(dtype: torch.dtype) -> None:
    subnormal = torch.tensor(-torch.finfo(dtype).tiny, dtype=dtype) * 0.5
    assert subnormal != 0
    one = torch.ones((), dtype=dtype)
    assert as_bits(multiply(subnormal, one)) == as_bits(-0.0 * one)
    assert divide(one, subnormal) == -INF
    assert log2(-subnormal) == log2(subnormal) == -INF
    assert as_bits(sqrt(subnormal)) == as_bits(-0.0 * one)


def test_logarithm_of_every_half_is_rounded_once() -> None:
    every = torch.arange(1024, 31744, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        layout_bits, bias = (10, 15) if dtype == torch.float16 else (7, 127)
        x = every.view(dtype)
        exact = every.double() / 2**layout_bits - bias
        assert torch.equal(log2(x), exact.to(dtype))


def test_logarithm_in_double_precision_is_rounded_once() -> None:
    for x in sample(torch.float64, 300).abs().tolist():
        power, fraction = split(Fraction(x))
        n = power.numerator.bit_length() - power.denominator.bit_length()
        assert log2(x) == float(n + fraction)


def test_logarithm_is_short_of_the_true_one_by_less_than_0_0861() -> None:
    x = torch.linspace(1, 2, 200_001, dtype=torch.float64)
    error = torch.log2(x) - log2(x)
    worst = 1 / math.log(2) - 1
    assert float(error.min()) >= -2e-16
    # The step of the grid changes a maximum by its square.
    assert float(error.max()) == pytest.approx(0.0860713320559342, abs=1e-10)
    assert float(x[error.argmax()]) - 1 == pytest.approx(worst, abs=1e-5)
    assert log2(1 + worst) == pytest.approx(worst, abs=1e-15)
    midpoints = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 + 1
    mean = float((torch.log2(midpoints) - log2(midpoints)).mean())
    assert mean == pytest.approx(1.5 - 1 / math.log(2), abs=1e-9)
    assert mean == pytest.approx(0.0573049591110366, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_of_two_is_exact_but_for_the_last_bit(dtype: torch.dtype) -> None:
    bits = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}[dtype]
    x = torch.cat([sample(dtype, 300).clamp(-13, 13), torch.tensor([-1e-7, 1e-7], dtype=dtype)])
    for given_x, power in zip(fractions(x), fractions(exp2(x)), strict=True):
        n = math.floor(given_x)
        mantissa = round((given_x - n) * 2**bits)
        assert power == Fraction(2) ** n * (1 + Fraction(mantissa, 2**bits))


def test_power_undoes_the_logarithm() -> None:
    x = sample(torch.float32, 1000).abs().double()
    assert torch.equal(exp2(log2(x)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_logarithm_power_and_root(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, -1.0, INF, -INF, NAN], dtype=dtype)
    expected = torch.tensor([-INF, -INF, NAN, INF, NAN, NAN], dtype=dtype)
    torch.testing.assert_close(log2(x), expected, equal_nan=True)
    expected = torch.tensor([0.0, -0.0, NAN, INF, NAN, NAN], dtype=dtype)
    torch.testing.assert_close(sqrt(x), expected, equal_nan=True)
    assert as_bits(sqrt(x))[1] == as_bits(x)[1]
    bias = 15 if dtype == torch.float16 else 1023 if dtype == torch.float64 else 127
    ends = torch.tensor([INF, -INF, NAN, bias + 1, bias, 1 - bias, -bias, 3e4, -3e4], dtype=dtype)
    expected = [INF, 0.0, NAN, INF, 2.0**bias, 2.0 ** (1 - bias), 0.0, INF, 0.0]
    torch.testing.assert_close(
        exp2(ends), torch.tensor(expected, dtype=torch.float64).to(dtype), equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_root_halves_the_logarithm_and_cuts_the_last_bit(dtype: torch.dtype) -> None:
    bits = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}[dtype]
    x = sample(dtype, 300).abs()
    for given_x, root in zip(fractions(x), fractions(sqrt(x)), strict=True):
        power, fraction = split(given_x)
        n = power.numerator.bit_length() - power.denominator.bit_length()
        half, odd = divmod(n, 2)
        mantissa = math.floor((odd + fraction) / 2 * 2**bits)
        assert root == Fraction(2) ** half * (1 + Fraction(mantissa, 2**bits))


def grid(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 1 + (torch.arange(n, dtype=torch.float64) + 0.5).to(dtype) / n


def error_on_grid(mantissas: Tensor, **options: Any) -> Tensor:
    true = mantissas[:, None] * mantissas
    return multiply(mantissas[:, None], mantissas, **options) / true - 1


def test_mean_errors_for_uniform_mantissas() -> None:
    # Midpoints: the integrand is piecewise smooth with a kink, so the error is of order n^-2.
    x = grid(1000)
    plain = error_on_grid(x)
    assert float(plain.mean()) == pytest.approx(-0.038487994, abs=1e-7)
    assert float(plain.square().mean().sqrt()) == pytest.approx(0.048419595, abs=1e-7)
    quotient = divide(x[:, None], x) / (x[:, None] / x) - 1
    assert float(quotient.mean()) == pytest.approx(0.041018035, abs=1e-6)
    unbiased = error_on_grid(x, **CORRECTIONS[2])
    assert float(unbiased.mean()) == pytest.approx(0, abs=1e-7)
    assert float(unbiased.square().mean().sqrt()) == pytest.approx(0.03055, abs=1e-5)
    benford = torch.exp2((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert float(error_on_grid(benford).mean()) == pytest.approx(-0.038203306, abs=1e-6)


@pytest.mark.parametrize(
    ("terms", "deficit"), [(0, 0.0384880), (1, 0.0014468), (2, 5.331e-5), (3, 1.972e-6)]
)
def test_mean_deficits_of_the_series(terms: int, deficit: float) -> None:
    # 1000 is no power of two: numbers of few bits would be exact too early.
    error = error_on_grid(grid(1000), correction="mitchell", terms=terms)
    assert float(-error.mean()) == pytest.approx(deficit, rel=5e-3)
    # The same from integers of 30 bits, without a float in the product.
    a, b = np.random.default_rng(0).integers(2**29, 2**30, (2, 200_000))
    lacking = (a * b - multiply_integers(a, b, terms=terms)) / (a * b)
    standard_error = lacking.std() / math.sqrt(a.size)
    assert lacking.mean() == pytest.approx(deficit, abs=5 * standard_error)


def test_constants_solve_their_equations() -> None:
    assert pytest.approx(8, rel=1e-15) == (1 - MINIMAX_CONSTANT) * (3 - MINIMAX_CONSTANT) ** 2
    bounds = relative_error_bounds("multiply", correction="constant")
    assert bounds.lower == pytest.approx(-MINIMAX_CONSTANT, rel=1e-14)
    assert bounds.upper == MINIMAX_CONSTANT


@pytest.mark.parametrize("terms", range(5))
def test_series_reaches_its_bound_at_the_extremal_mantissa_and_nowhere_passes_it(
    terms: int,
) -> None:
    bound = relative_error_bounds("multiply", correction="mitchell", terms=terms)
    a = (2 * 4 ** (terms + 1) + 1) // 3
    assert (bound.lower, bound.upper) == (-1 / a**2, 0.0)
    worst = Fraction(a, 2 ** (2 * terms + 1))
    product = multiply(float(worst), float(worst), correction="mitchell", terms=terms)
    assert Fraction(float(product)) / worst**2 - 1 == Fraction(-1, a**2)
    error = error_on_grid(1 + torch.arange(512, dtype=torch.float64) / 512, correction="mitchell",
                          terms=terms)  # fmt: skip
    assert float(error.min()) >= bound.lower - 2e-16
    assert float(error.max()) <= 2e-16


@pytest.mark.parametrize(
    "c", [0.0, 1 / 16, UNBIASED_CONSTANT, MINIMAX_CONSTANT, 0.2, 0.4, 0.7, 0.99]
)
def test_constant_correction_reaches_its_bounds(c: float) -> None:
    bounds = relative_error_bounds("multiply", correction="constant", constant=c)
    n = 512
    mantissas = 1 + torch.arange(n, dtype=torch.float64) / n
    error = error_on_grid(mantissas, correction="constant", constant=c)
    # c is rounded to 2^-52; on the grid a minimum is missed by at most a step times the slope.
    assert bounds.lower - 1e-15 <= float(error.min()) <= bounds.lower + 4 / n
    assert float(error.max()) <= bounds.upper + 1e-15
    assert multiply(1.0, 1.0, correction="constant", constant=c) == pytest.approx(1 + c, rel=1e-15)
    if c <= 0.2:
        low = min(8 / (3 - c) ** 2, 8 * (1 + c) / 9) - 1
        assert bounds.lower == pytest.approx(low, abs=1e-15)


@pytest.mark.parametrize(
    ("bits", "rms"),
    [(1, 0.0331), (2, 0.0183), (3, 0.00979), (4, 0.00496), (5, 0.00252), (6, 0.00127)],
)
def test_table_errors_stay_within_and_come_close_to_their_bounds(bits: int, rms: float) -> None:
    bounds = relative_error_bounds("multiply", correction="table", table_bits=bits)
    assert bounds.lower == -bounds.upper
    # Extremes lie at corners and carry lines of cells: a grid, and the last number of each cell.
    last = torch.nextafter(
        1 + torch.arange(1, 2**bits + 1, dtype=torch.float64) / 2**bits,
        torch.zeros((), dtype=torch.float64),
    )
    mantissas = torch.cat([1 + torch.arange(1024, dtype=torch.float64) / 1024, last])
    largest = float(error_on_grid(mantissas, correction="table", table_bits=bits).abs().max())
    assert largest <= bounds.upper
    # Rounded up to three digits, and the grid misses at most a step of it.
    assert largest >= bounds.upper * 0.99
    spread = error_on_grid(grid(1000), correction="table", table_bits=bits).square().mean().sqrt()
    # Given with three digits.
    assert float(spread) == pytest.approx(rms, rel=1e-2)


def test_table_without_bits_is_a_constant_of_one_eighth() -> None:
    bounds = relative_error_bounds("multiply", correction="table", table_bits=0)
    assert bounds.upper == 0.125
    assert bounds.lower == pytest.approx(-0.0322, abs=1e-4)
    assert multiply(1.0, 1.0, correction="table", table_bits=0) == 1.125


@pytest.mark.parametrize(
    ("operation", "upper", "call", "true", "x"),
    [
        ("sqrt", 0.0606601717798212, sqrt, math.sqrt, 2.0),
        ("exp2", 0.0614756908460861, exp2, lambda x: 2**x, 1 / math.log(2) - 1),
        ("divide", 0.125, lambda y: divide(1.0, y), lambda y: 1 / y, 1.5),
    ],
)
def test_other_operations_reach_their_bounds(
    operation: Any, upper: float, call: Callable[..., Any], true: Callable[..., Any], x: float
) -> None:
    bounds = relative_error_bounds(operation)
    assert bounds.lower == 0.0
    assert bounds.upper == pytest.approx(upper, rel=1e-13)
    assert call(x) / true(x) - 1 == pytest.approx(upper, rel=1e-13)
    for y in torch.linspace(1, 4, 301, dtype=torch.float64).tolist():
        # The last bit of the result is cut off, or rounded.
        assert -3e-16 <= call(y) / true(y) - 1 <= upper + 3e-16


@pytest.mark.parametrize(
    ("options", "slope", "relative_rms"),
    [
        (CORRECTIONS[0], 0.962, 0.0477),
        (CORRECTIONS[1], 1.009, 0.0326),
        (CORRECTIONS[2], 1.0007, 0.0309),
        (CORRECTIONS[4], 1.0001, 0.0051),
        (CORRECTIONS[5], 0.9986, 0.0022),
    ],
    ids=["none", "minimax", "unbiased", "table", "series"],
)
def test_products_of_normal_numbers_are_proportional_to_the_true_ones(
    options: dict[str, Any], slope: float, relative_rms: float
) -> None:
    a, b = torch.randn(2, 4096, 64, generator=torch.Generator().manual_seed(0))
    true, product = (a * b).double(), multiply(a, b, **options).double()
    fitted = float((product * true).sum() / true.square().sum())
    error = product / true - 1
    # The slope is a mean of 1 + error weighted by true², E[true⁴]/E[true²]² = 9 times fewer pairs
    # count; three digits are given.
    standard_error = float(error.std()) * math.sqrt(9 / true.numel())
    assert fitted == pytest.approx(slope, abs=5 * standard_error + 5e-4)
    assert float(error.square().mean().sqrt()) == pytest.approx(relative_rms, rel=0.02)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_kind_shape_and_dtype_of_results(convert: Callable[..., Any]) -> None:
    for name in ("float16", "float32", "float64"):
        x = convert(np.ones((3, 1), name))
        for result in (multiply(x, x), divide(x, 2), multiply(3.0, x), log2(x), exp2(x), sqrt(x)):
            assert type(result) is type(x)
            assert result.dtype == x.dtype
        assert multiply(x, convert(np.ones((2, 1, 4), name))).shape == (2, 3, 4)
    single, double = convert(np.ones(2, "float32")), convert(np.ones(2, "float64"))
    assert multiply(single, double).dtype == double.dtype
    assert matmul(single[None], double[:, None]).dtype == double.dtype


def test_scalars_and_odd_arrays_of_numpy() -> None:
    assert type(multiply(3, 3)) is np.float64
    assert type(multiply(np.float16(3), 3)) is np.float16
    assert type(sqrt(np.array(4.0))) is np.float64
    x = np.linspace(1, 9, 12).reshape(3, 4)
    fixed = x.copy()
    fixed.flags.writeable = False
    for odd in (x[::-1, ::2], x.astype(">f8")[::-1, ::2], fixed[::-1, ::2]):
        assert (multiply(odd, 3.0) == multiply(x[::-1, ::2].copy(), 3.0)).all()
    assert multiply(np.ones((0, 3)), np.ones(3)).shape == (0, 3)


def test_tensors_promote_like_torch() -> None:
    half, brain = torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.bfloat16)
    assert multiply(half, brain).dtype == torch.float32
    assert multiply(half, torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float16


def test_large_arrays_are_multiplied_like_small_ones() -> None:
    a, b = sample(torch.float32, 200_000, 1), sample(torch.float32, 200_000, 2)
    together = multiply(a, b)
    apart = torch.cat([multiply(a[i : i + 999], b[i : i + 999]) for i in range(0, 200_000, 999)])
    assert torch.equal(together, apart)
    wide = multiply(a[:400, None], b[:500])
    assert torch.equal(wide[7], multiply(a[7], b[:500]))
    assert torch.equal(wide, multiply(b[:500, None], a[:400]).T)


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
def test_gradients_are_products_again(options: dict[str, Any]) -> None:
    a = sample(torch.float32, 40, 1).reshape(8, 5).requires_grad_()
    b = sample(torch.float32, 5, 2).requires_grad_()
    g = sample(torch.float32, 40, 3).reshape(8, 5)
    grad_a, grad_b = torch.autograd.grad(multiply(a, b, **options), (a, b), g)
    assert torch.equal(grad_a, multiply(g, b, **options))
    assert torch.equal(grad_b, multiply(g, a, **options).sum(0))
    grad_a, grad_b = torch.autograd.grad(multiply(a, b, **options, backward="exact"), (a, b), g)
    assert torch.equal(grad_a, g * b)
    assert torch.equal(grad_b, (g * a).sum(0))


def test_gradients_of_a_quotient() -> None:
    a, b, g = (sample(torch.float64, 30, seed) for seed in (1, 2, 3))
    a.requires_grad_()
    b.requires_grad_()
    out = divide(a, b)
    grad_a, grad_b = torch.autograd.grad(out, (a, b), g)
    assert torch.equal(grad_a, divide(g, b))
    assert torch.equal(grad_b, -divide(multiply(g, out), b))
    out = divide(a, b, backward="exact")
    grad_a, grad_b = torch.autograd.grad(out, (a, b), g)
    assert torch.equal(grad_a, g / b)
    assert torch.equal(grad_b, -(g * out) / b)


def test_gradients_of_logarithm_power_and_root_are_the_true_ones() -> None:
    x = (sample(torch.float64, 30).abs() + 0.1).requires_grad_()
    for ours, true in ((log2, torch.log2), (exp2, torch.exp2), (sqrt, torch.sqrt)):
        (grad,) = torch.autograd.grad(ours(x).sum(), x)
        (expected,) = torch.autograd.grad(true(x).sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-14, atol=0)


def test_second_derivatives_see_the_product_as_bilinear() -> None:
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.75, 3.0))
    (grad_a,) = torch.autograd.grad(multiply(a, b), a, create_graph=True)
    (mixed,) = torch.autograd.grad(grad_a, b)
    assert mixed == 1.0


def test_gradients_can_be_mapped_over_a_batch() -> None:
    a, b = sample(torch.float64, 12, 1).reshape(4, 3), sample(torch.float64, 3, 2)
    gradient = torch.func.grad(lambda x, y: multiply(x, y).sum())
    together = torch.func.vmap(gradient, in_dims=(0, None))(a, b)
    assert torch.equal(together, torch.stack([gradient(row, b) for row in a]))


def reference_matmul(a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Sums in double precision of products in the working precision, and of their magnitudes."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    products = multiply(a.to(wide).unsqueeze(-1), b.to(wide).unsqueeze(-3), **options).double()
    return products.sum(-2), products.abs().sum(-2)


def assert_sums(a: Tensor, b: Tensor, **options: Any) -> None:
    exact, magnitude = reference_matmul(a, b, **options)
    ours = matmul(a, b, **options)
    # A sum of k numbers in any order: at most k roundings, and the last one to the result's dtype.
    wide = torch.promote_types(ours.dtype, torch.float32)
    tolerance = a.shape[-1] * torch.finfo(wide).eps * magnitude
    tolerance = tolerance + torch.finfo(ours.dtype).eps * exact.abs()
    assert ours.shape == exact.shape
    assert ((ours.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix_product_sums_products(dtype: torch.dtype, options: dict[str, Any]) -> None:
    a, b = sample(dtype, 37 * 23, 1).reshape(37, 23), sample(dtype, 23 * 41, 2).reshape(23, 41)
    assert_sums(a, b, **options)
    assert_sums(b.T, a.T, **options)
    assert_sums(a.relu(), b.relu(), **options)
    assert_sums(a[:1], b[:, :1], **options)


@pytest.mark.parametrize("shape", [(300, 1100, 5), (5, 1100, 700), (1, 3000, 1), (600, 2, 600)])
def test_matrix_product_of_several_blocks(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = sample(torch.float32, m * k, 1).reshape(m, k), sample(torch.float32, k * n, 2)
    assert_sums(a.relu(), b.reshape(k, n))


@pytest.mark.parametrize("options", CORRECTIONS[:5], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_short_way_and_the_careful_way_give_the_same_bits(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = sample(dtype, 150 * 70, 1).reshape(150, 70), sample(dtype, 70 * 210, 2)
    b = b.reshape(70, 210)
    pairs = [(a, b), (a.relu(), b), (a, b.relu()), (a.relu(), b.relu()), (a, 0 * b)]
    short = [matmul(x, y, **options) for x, y in pairs]
    monkeypatch.setattr(blocks, "_masks", lambda *_: None)
    for (x, y), result in zip(pairs, short, strict=True):
        assert torch.equal(as_bits(matmul(x, y, **options)), as_bits(result))


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
def test_special_values_pass_through_matrix_products(options: dict[str, Any]) -> None:
    a, b = sample(torch.float32, 6 * 4).reshape(6, 4), sample(torch.float32, 4 * 5, 1).reshape(4, 5)
    a[0, 0], a[1, 1], a[2, 2], a[3, 3] = NAN, INF, 1e38, 1e-30
    b[1, 2], b[2, 3], b[3, 4] = 0.0, 1e38, 1e-30
    expected = multiply(a[:, :, None], b[None], **options).sum(1)
    ours = matmul(a, b, **options)
    assert torch.equal(ours.isnan(), expected.isnan())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours[1, 2].isnan()
    assert ours[2, 3] == INF


def test_products_below_the_range_vanish_instead_of_changing_sign() -> None:
    a, b = torch.full((3, 4), 1e-25), torch.full((4, 2), -1e-25)
    assert torch.equal(matmul(a, b), torch.zeros(3, 2))
    assert torch.equal(matmul(torch.zeros(3, 4), torch.zeros(4, 2)), torch.zeros(3, 2))


def test_half_precision_is_summed_in_single_precision() -> None:
    a, b = torch.full((1, 4), 300.0).half(), torch.tensor([[300.0], [300], [-300], [-300]]).half()
    assert matmul(a, b).tolist() == [[0.0]]
    assert matmul(a, b).dtype == torch.float16


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 3), (3, 4)),
        ((5, 2, 3), (3, 4)),
        ((2, 3), (5, 3, 4)),
        ((5, 1, 2, 3), (7, 3, 4)),
        ((1, 2, 3), (6, 3, 4)),
        ((0, 2, 3), (3, 4)),
        ((2, 0), (0, 4)),
        ((0, 3), (3, 4)),
        ((2, 3), (3, 0)),
        ((4, 2, 0), (4, 0, 3)),
    ],
)
def test_batches_and_empty_matrices(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = (
        sample(torch.float64, math.prod(shape), seed).reshape(shape)
        for seed, shape in enumerate((left, right))
    )
    exact, _ = reference_matmul(a, b)
    a.requires_grad_()
    b.requires_grad_()
    out = matmul(a, b)
    assert out.shape == torch.matmul(a, b).shape
    torch.testing.assert_close(out.detach(), exact, rtol=1e-13, atol=1e-13)
    grads = torch.autograd.grad(out, (a, b), torch.ones_like(out))
    assert [grad.shape for grad in grads] == [a.shape, b.shape]


def test_gradients_of_a_matrix_product() -> None:
    a = sample(torch.float64, 6 * 5, 1).reshape(6, 5).relu().requires_grad_()
    b = sample(torch.float64, 2 * 5 * 4, 2).reshape(2, 5, 4).requires_grad_()
    g = sample(torch.float64, 2 * 6 * 4, 3).reshape(2, 6, 4).relu()
    options = {"correction": "constant", "constant": UNBIASED_CONSTANT}
    ours = torch.autograd.grad(matmul(a, b, **options), (a, b), g)
    torch.testing.assert_close(ours[0], matmul(g, b.detach().mT, **options).sum(0))
    torch.testing.assert_close(ours[1], matmul(a.detach().mT, g, **options))
    ours = torch.autograd.grad(matmul(a, b, **options, backward="exact"), (a, b), g)
    expected = torch.autograd.grad(torch.matmul(a, b), (a, b), g)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_of_a_matrix_product_are_products_again() -> None:
    a, b, g, h = (sample(torch.float64, 9, seed).reshape(3, 3) for seed in range(4))
    a.requires_grad_()
    b.requires_grad_()
    (grad_a,) = torch.autograd.grad(matmul(a, b), a, g, create_graph=True)
    (second,) = torch.autograd.grad(grad_a, b, h)
    # grad_a = g bᵀ, so that along h its derivative by b is hᵀ g.
    assert torch.equal(second, matmul(h.T, g))


def test_gradients_of_half_precision_keep_their_dtype() -> None:
    a = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(4, 2, requires_grad=True)
    matmul(a, b).sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("options", [CORRECTIONS[0], CORRECTIONS[4], CORRECTIONS[5]], ids=str)
def test_matrix_product_never_holds_all_products(options: dict[str, Any]) -> None:
    a, b = torch.randn(1, 300, 100), torch.randn(1, 100, 700)
    with LargestTensor() as seen:
        blocks.blocked(a, b, Options(**options))
    # The result has 0.8 MB; all products would be 84 MB. A block's indices are twice as wide.
    assert seen.bytes <= 300 * 700 * 4


def test_layer_is_a_linear_layer_with_other_products() -> None:
    layer = MitchellLinear(7, 3, correction="mitchell", terms=12, backward="exact")
    plain = nn.Linear(7, 3)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 7, requires_grad=True)
    # Twelve terms are the true product of floats, so only the order of sums differs.
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    plain(x.detach()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-5)
    assert "terms=12" in repr(layer)


def test_layer_starts_like_a_linear_layer() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 4)
    torch.manual_seed(0)
    layer = MitchellLinear(5, 4)
    assert torch.equal(layer.weight, plain.weight)
    assert MitchellLinear(5, 4, False, dtype=torch.float64).bias is None


def test_linear_takes_vectors_matrices_and_batches() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    x = torch.randn(2, 5, 4)
    together = linear(x, weight, bias, correction="table")
    assert together.shape == (2, 5, 3)
    assert torch.equal(linear(x[1, 2], weight, bias, correction="table"), together[1, 2])
    assert torch.equal(linear(x[1], weight, correction="table") + bias, together[1])
    assert linear(x[:0], weight, bias).shape == (0, 5, 3)


def test_layer_trains_on_rectified_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator).relu()
    labels = (x @ torch.randn(8, 3, generator=generator)).argmax(1)
    torch.manual_seed(0)
    network = nn.Sequential(MitchellLinear(8, 16), nn.ReLU(), MitchellLinear(16, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    for _ in range(80):
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = float((network(x).argmax(1) == labels).float().mean())
    # One class in three by chance: a product with zero that is not zero leaves it there.
    assert accuracy > 0.9


@pytest.mark.bad_input  # runtime shape checks are no code that can be compiled
@pytest.mark.slow
@pytest.mark.parametrize("options", [CORRECTIONS[4], CORRECTIONS[5]], ids=str)
def test_compiled_product_and_layer_are_whole_graphs(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    a, b = sample(torch.float32, 1000, 1), sample(torch.float32, 1000, 2)
    a[:4] = torch.tensor([0.0, INF, NAN, 1e38])
    b[:4] = torch.tensor([INF, 0.0, 1.0, 1e38])
    compiled = torch.compile(lambda x, y: multiply(x, y, **options), fullgraph=True)
    torch.testing.assert_close(
        compiled(a, b), multiply(a, b, **options), rtol=0, atol=0, equal_nan=True
    )
    layer = MitchellLinear(20, 10, **options)
    x = a[20:220].reshape(10, 20)
    out = torch.compile(layer, fullgraph=True)(x)
    out.sum().backward()
    compiled_grad, layer.weight.grad = layer.weight.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(out, layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled_grad, layer.weight.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
def test_results_on_a_gpu_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    a, b = sample(torch.float32, 70 * 90, 1).reshape(70, 90), sample(torch.float32, 90 * 50, 2)
    b = b.reshape(90, 50).relu()
    assert torch.equal(multiply(a, 3.7, **options), multiply(a.cuda(), 3.7, **options).cpu())
    torch.testing.assert_close(matmul(a, b, **options), matmul(a.cuda(), b.cuda(), **options).cpu())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "call", [log2, exp2, sqrt, lambda x: multiply(x, 1.5), lambda x: divide(1.5, x)]
)
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (np.arange(3), "int64"),
        (torch.arange(3), "int64"),
        (np.ones(2, bool), "bool"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (np.ones(2, complex), "complex128"),
        ([1.0, 2.0], "list"),
        (True, "bool"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_than_floats_are_refused(call: Callable[..., Any], x: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"^expected .*float64, got {got}$|tensors or two arrays"):
        call(x)


@pytest.mark.bad_input
def test_the_words_of_a_refused_dtype() -> None:
    with pytest.raises(
        TypeError, match=r"^expected float16, bfloat16, float32 or float64, got int64$"
    ):
        multiply(torch.ones(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="two tensors or two arrays, got Tensor and ndarray"):
        multiply(torch.ones(2), np.ones(2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"correction": "best"}, "correction must be one of none, constant, table, mitchell, got"),
        ({"backward": "none"}, "backward must be one of mitchell, exact, got 'none'"),
        ({"table_bits": 7}, "table_bits must be an integer from 0 to 6, got 7"),
        ({"table_bits": 2.5}, "table_bits must be an integer"),
        ({"terms": -1}, "terms must be an integer of at least 0, got -1"),
        ({"constant": 1.0}, r"constant must be a number in \[0, 1\), got 1.0"),
        ({"constant": -0.1}, "constant must be"),
        ({"constant": NAN}, "constant must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    x = torch.ones(2, 2)
    for call in (multiply, matmul, linear):
        with pytest.raises(ValueError, match=words):
            call(x, x, **options)
    with pytest.raises(ValueError, match=words):
        MitchellLinear(2, 2, **options)
    if "backward" not in options:
        with pytest.raises(ValueError, match=words):
            relative_error_bounds("multiply", **options)


@pytest.mark.bad_input
def test_bounds_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="operation must be one of multiply, divide, sqrt, exp2"):
        relative_error_bounds("log2")
    for operation in ("divide", "sqrt", "exp2"):
        with pytest.raises(ValueError, match="must be 'none', got 'table'"):
            relative_error_bounds(operation, correction="table")


@pytest.mark.bad_input
@pytest.mark.parametrize("bad", [1.5, np.ones(2), torch.ones(2), True, np.ones(2, bool), "7", None])
def test_integers_are_wanted(bad: Any) -> None:
    with pytest.raises(TypeError, match="expected integers, got "):
        multiply_integers(bad, 3)


@pytest.mark.bad_input
def test_large_integers_in_arrays_are_refused() -> None:
    unsigned = torch.tensor([2**64 - 5], dtype=torch.uint64)
    for bad in (np.array([2**31]), np.array([-(2**31)]), torch.tensor([-(2**63)]), unsigned,
                np.array([2**64 - 5], np.uint64)):  # fmt: skip
        with pytest.raises(ValueError, match=r"below 2\*\*31 in arrays"):
            multiply_integers(bad, 1)
    with pytest.raises(ValueError, match=r"below 2\*\*31 in arrays"):
        multiply_integers(np.ones(2, int), 2**31)
    with pytest.raises(ValueError, match="terms must be an integer of at least 0"):
        multiply_integers(3, 3, terms=-1)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("left", "right"), [((3,), (3, 2)), ((2, 3), (3,)), ((2, 3), (4, 2)), ((2, 2, 3), (3, 3, 2))]
)
def test_shapes_of_matrices_are_checked(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    words = f"(..., m, k) and (..., k, n), got shapes {left} and {right}"
    for make in (np.ones, torch.ones):
        with pytest.raises(ValueError, match=r"expected matrices") as refusal:
            matmul(make(left), make(right))
        assert words in str(refusal.value)


@pytest.mark.bad_input
def test_shapes_of_layers_and_broadcasts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(5, 4\)"):
        linear(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"bias of shape \(5,\), got \(4,\)"):
        linear(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4))
    with pytest.raises(TypeError, match="expected torch tensors, got ndarray"):
        linear(np.ones((2, 3)), torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"shapes that broadcast, got \(2,\) and \(3,\)"):
        multiply(np.ones(2), np.ones(3))


def test_products_over_nothing_are_zeros_for_batches_too() -> None:
    assert matmul(np.zeros((2, 3, 0)), np.zeros((0, 4))).tolist() == np.zeros((2, 3, 4)).tolist()


def test_a_lazily_negated_tensor_is_read_as_its_values() -> None:
    x = torch.tensor([1 - 2j, 3 - 4j]).conj().imag
    assert torch.equal(multiply(x, x), multiply(x.clone(), x.clone()))
