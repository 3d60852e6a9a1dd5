"""The rules that every public name obeys, run for all rows at once."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch

from contract.registry import modules, public_names, rows
from contract.row import Arguments, Row

ROWS = rows()
REFUSALS = (ValueError, TypeError)


def of(check: str, *, needs: str | None = None) -> pytest.MarkDecorator:
    """Parametrise over the rows that the check concerns."""
    concerned = [
        row for row in ROWS if check not in row.without and (needs is None or getattr(row, needs))
    ]
    return pytest.mark.parametrize("row", concerned, ids=lambda row: row.name)


def arguments(row: Row, seed: int = 0) -> Arguments:
    return row.make(np.random.default_rng(seed))


def convert(row: Row, given: Arguments, backend: str, dtype: str = "float64") -> Arguments:
    """The same values as arrays of another kind; numpy arrays that are no real input follow."""
    out = {}
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            value = value.astype(dtype) if name in row.arrays else value
            value = torch.from_numpy(value.copy()) if backend == "torch" else value
        out[name] = value
    return out


def usual(row: Row, given: Arguments, dtype: str = "float64") -> Arguments:
    return convert(row, given, row.backends[0], dtype)


def run(row: Row, given: Arguments) -> Any:
    if row.module is None:
        return row.run(given)
    torch.manual_seed(0)
    module = row.module().eval()
    dtype = next((v.dtype for n, v in given.items() if n in row.arrays), torch.float64)
    return module.to(dtype)(**given)


def numbers(result: Any) -> list[np.ndarray]:
    """All numbers of a result, whatever its kind."""
    if result is None or isinstance(result, str):
        return []
    if isinstance(result, torch.Tensor):
        return [result.detach().cpu().double().numpy() if result.dtype.is_floating_point
                else result.detach().cpu().numpy()]  # fmt: skip
    if isinstance(result, np.ndarray | np.generic | int | float):
        return [np.asarray(result)]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = [getattr(result, field.name) for field in dataclasses.fields(result)]
        return [number for field in fields for number in numbers(field)]
    if isinstance(result, dict):
        return [number for value in result.values() for number in numbers(value)]
    if isinstance(result, list | tuple):
        return [number for value in result for number in numbers(value)]
    return []


def assert_close(one: Any, two: Any, *, rtol: float, atol: float | None = None) -> None:
    left, right = numbers(one), numbers(two)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        scale = float(np.max(np.abs(b[np.isfinite(b)]), initial=0.0)) if b.size else 0.0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale if atol is None else atol)


def changed(given: Arguments, **values: Any) -> Arguments:
    return {**given, **values}


def test_every_public_name_has_a_row() -> None:
    missing = sorted(set(public_names()) - {row.name for row in ROWS})
    assert not missing, f"add these to tests/contract/rows: {missing}"


def test_every_row_names_something_public() -> None:
    for row in ROWS:
        assert row.public is not None


def test_every_reason_to_leave_a_check_out_names_a_check() -> None:
    checks = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for row in ROWS:
        assert set(row.without) <= checks, f"{row.name}: {set(row.without) - checks}"
        assert all(len(reason) > 10 for reason in row.without.values()), row.name


def test_every_module_lists_its_public_names_and_its_source() -> None:
    for module in modules():
        if hasattr(module, "__path__") and not getattr(module, "__all__", None):
            continue
        assert module.__doc__, module.__name__
        assert hasattr(module, "__all__"), module.__name__


@of("docstring")
def test_docstring(row: Row) -> None:
    """Summary line, every parameter, what comes back, what is refused, an example."""
    text = inspect.getdoc(row.public) or ""
    summary = text.split("\n", 1)[0]
    assert summary.endswith((".", ":")), f"the first line is no sentence: {summary!r}"
    is_protocol = getattr(row.public, "_is_protocol", False)
    signature = inspect.signature(row.public)
    names = [
        p.name for p in signature.parameters.values()
        if p.name not in ("self", "args", "kwargs") and not is_protocol
    ]  # fmt: skip
    for name in names:
        assert re.search(rf"(^|[\s,*]){name}([\s,:]|$)", text, re.M), f"{name} is not explained"
    if names:
        assert "Parameters\n" in text or "Attributes\n" in text
    returns = signature.return_annotation
    if inspect.isfunction(row.public) and returns not in (None, "None"):
        assert "Returns\n" in text or "Yields\n" in text
    if row.wrong or (row.arrays and inspect.isfunction(row.public)):
        assert "Raises\n" in text
    assert ">>>" in text or is_protocol, "no example"


@of("nothing_happens_to_the_input", needs="arrays")
def test_nothing_happens_to_the_input(row: Row) -> None:
    for backend in row.backends:
        given = convert(row, arguments(row), backend)
        before = copy.deepcopy({name: given[name] for name in row.arrays})
        run(row, given)
        for name, value in before.items():
            assert bool((given[name] == value).all()), f"{name} was changed"


@of("same_input_same_result", needs="arrays")
def test_same_input_same_result(row: Row) -> None:
    first = run(row, usual(row, arguments(row)))
    torch.rand(3), np.random.rand(3)  # noqa: NPY002 - the global state is what must not matter
    second = run(row, usual(row, arguments(row)))
    assert_close(first, second, rtol=0.0, atol=0.0)


@of("same_seed_same_result", needs="seeded")
def test_same_seed_same_result(row: Row) -> None:
    def source(seed: int) -> Any:
        if row.seeded == "generator":
            return torch.Generator().manual_seed(seed)
        return seed

    def result(seed: int) -> Any:
        return run(row, changed(usual(row, arguments(row)), **{str(row.seeded): source(seed)}))

    first, again, other = result(1), result(1), result(2)
    assert_close(first, again, rtol=0.0, atol=0.0)
    assert any(
        a.shape != b.shape or not np.array_equal(a, b)
        for a, b in zip(numbers(first), numbers(other), strict=True)
    ), "another seed changes nothing"


@of("numpy_equals_torch", needs="arrays")
def test_numpy_equals_torch(row: Row) -> None:
    if set(row.backends) < {"numpy", "torch"}:
        pytest.skip(f"takes {row.backends[0]} only")
    plain = run(row, convert(row, arguments(row), "numpy"))
    tensors = run(row, convert(row, arguments(row), "torch"))
    assert_close(plain, tensors, rtol=1e-9)


@of("float32_agrees_with_float64", needs="arrays")
def test_float32_agrees_with_float64(row: Row) -> None:
    for backend in row.backends:
        double = run(row, convert(row, arguments(row), backend))
        single = run(row, convert(row, arguments(row), backend, "float32"))
        assert_close(single, double, rtol=row.float32_rtol)


@of("non_contiguous_input", needs="arrays")
def test_non_contiguous_input(row: Row) -> None:
    for backend in row.backends:
        given = convert(row, arguments(row), backend)
        strided = {}
        for name in row.arrays:
            value = given[name]
            if value.ndim == 0:
                continue
            doubled = np.repeat(np.asarray(value), 2, axis=-1)
            doubled = torch.from_numpy(doubled) if backend == "torch" else doubled
            strided[name] = doubled[..., ::2]
        assert_close(run(row, changed(given, **strided)), run(row, given), rtol=1e-9)


@of("batch_equals_loop", needs="batched")
def test_batch_equals_loop(row: Row) -> None:
    given = usual(row, arguments(row))
    together = numbers(run(row, given))
    size = len(given[row.batched[0]])
    assert size >= 2, "a batch of one shows nothing"
    for i in range(size):
        alone = numbers(run(row, changed(given, **{n: given[n][i : i + 1] for n in row.batched})))
        for whole, part in zip(together, alone, strict=True):
            if whole.ndim and whole.shape[0] == size:
                np.testing.assert_allclose(part[0], whole[i], rtol=1e-9, atol=1e-12)


@of("empty_batch", needs="batched")
def test_empty_batch(row: Row) -> None:
    given = usual(row, arguments(row))
    size = len(given[row.batched[0]])
    whole = numbers(run(row, given))
    empty = numbers(run(row, changed(given, **{n: given[n][:0] for n in row.batched})))
    for a, b in zip(whole, empty, strict=True):
        if a.ndim and a.shape[0] == size:
            assert b.shape == (0, *a.shape[1:])


@pytest.mark.bad_input
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
@of("not_finite_is_refused", needs="arrays")
def test_not_finite_is_refused(row: Row, bad: float) -> None:
    for backend in row.backends:
        for name in row.arrays:
            value = arguments(row)[name].copy()
            value.reshape(-1)[value.size // 2] = bad
            given = convert(row, changed(arguments(row), **{name: value}), backend)
            with pytest.raises(REFUSALS) as refusal:
                run(row, given)
            assert len(str(refusal.value)) > 15


@pytest.mark.bad_input
@of("wrong_rank_is_refused", needs="arrays")
def test_wrong_rank_is_refused(row: Row) -> None:
    for backend in row.backends:
        for name in row.arrays:
            value = arguments(row)[name].reshape(-1)[0]
            given = convert(row, changed(arguments(row), **{name: np.asarray(value)}), backend)
            with pytest.raises(REFUSALS) as refusal:
                run(row, given)
            assert len(str(refusal.value)) > 15


@pytest.mark.bad_input
@of("wrong_dtype_is_refused", needs="arrays")
def test_wrong_dtype_is_refused(row: Row) -> None:
    for backend in row.backends:
        for name in row.arrays:
            value = arguments(row)[name].astype(np.complex128) + 1j
            given = convert(row, arguments(row), backend)
            given[name] = torch.from_numpy(value) if backend == "torch" else value
            with pytest.raises(REFUSALS) as refusal:
                run(row, given)
            assert len(str(refusal.value)) > 15


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("row", "what"),
    [pytest.param(row, what, id=f"{row.name}-{what}") for row in ROWS for what in row.wrong],
)
def test_wrong_arguments_are_refused(row: Row, what: str) -> None:
    given = row.wrong[what](usual(row, arguments(row)))
    with pytest.raises(REFUSALS) as refusal:
        run(row, given)
    assert len(str(refusal.value)) > 15


@of("gradcheck", needs="differentiable")
def test_gradcheck(row: Row) -> None:
    given = convert(row, arguments(row), "torch")
    names = row.differentiable

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = run(row, changed(given, **dict(zip(names, values, strict=True))))
        return tuple(t for t in tensors(result) if t.requires_grad)

    assert torch.autograd.gradcheck(
        function, tuple(given[name].requires_grad_() for name in names), atol=1e-5, rtol=1e-4
    )


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    if isinstance(result, list | tuple):
        return [tensor for value in result for tensor in tensors(value)]
    return []


@pytest.mark.bad_input  # dynamo cannot trace through the shape checks
@of("compiled_equals_eager", needs="compiles")
def test_compiled_equals_eager(row: Row) -> None:
    given = convert(row, arguments(row), "torch")
    torch._dynamo.reset()
    torch.manual_seed(0)
    call = row.call or row.public if row.module is None else row.module().eval().double()
    # Tracing is what can fail; generating code would only cost a minute and ask for a compiler.
    compiled = torch.compile(call, backend="aot_eager")
    assert_close(compiled(**given), call(**given), rtol=1e-7)


@of("state_dict_round_trip", needs="module")
def test_state_dict_round_trip(row: Row) -> None:
    from safetensors.torch import load, save

    given = convert(row, arguments(row), "torch")
    torch.manual_seed(0)
    one = row.module().eval().double()
    torch.manual_seed(1)
    two = row.module().eval().double()
    two.load_state_dict(load(save({k: v.contiguous() for k, v in one.state_dict().items()})))
    assert_close(two(**given), one(**given), rtol=0.0, atol=0.0)


@of("module_pickles", needs="module")
def test_module_pickles(row: Row) -> None:
    given = convert(row, arguments(row), "torch")
    module = row.module().eval().double()
    again = pickle.loads(pickle.dumps(module))
    assert_close(again(**given), module(**given), rtol=0.0, atol=0.0)


@of("instance_pickles", needs="instance")
def test_instance_pickles(row: Row) -> None:
    instance = row.instance()
    again = pickle.loads(pickle.dumps(instance))
    assert type(again) is type(instance)
    if numbers(_state(instance)):
        assert_close(_state(again), _state(instance), rtol=0.0, atol=0.0)
    else:
        assert again == instance


def _state(instance: Any) -> Any:
    return instance if dataclasses.is_dataclass(instance) else vars(instance)


@pytest.mark.bad_input
@of("sklearn_accepts_it", needs="estimators")
def test_sklearn_accepts_it(row: Row) -> None:
    from sklearn.utils.estimator_checks import check_estimator

    for estimator in row.estimators():
        check_estimator(estimator)
