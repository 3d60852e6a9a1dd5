"""What a study says to the lab, and what the lab makes of it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TextColumn

from kexue.lab import study
from kexue.lab.errors import DataError
from kexue.lab.study import RELATIONS, Claim, Lab, seeded


@pytest.fixture(autouse=True)
def _source_that_nobody_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache depends on the package's source; it must not change while a test runs."""
    monkeypatch.setattr(study, "code_digest", lambda: "the same code")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab("study", tmp_path / "run", cache_folder=tmp_path / "cache")


@pytest.fixture
def another(tmp_path: Path) -> Callable[..., Lab]:
    """Build the lab of a later run over the same cache."""

    def build(slug: str = "study", **changes: Any) -> Lab:
        return Lab(slug, tmp_path / "later", **{"cache_folder": tmp_path / "cache", **changes})

    return build


def counted(arrays: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Return a ``build`` that counts, in its attribute ``calls``, how often it ran."""

    def build() -> dict[str, Any]:
        build.calls += 1  # type: ignore[attr-defined]
        return arrays

    build.calls = 0  # type: ignore[attr-defined]
    return build


# Budget, seed, device


@pytest.mark.parametrize(("budget", "value"), [("smoke", 1), ("quick", 2), ("full", 3)])
def test_pick_follows_the_budget(tmp_path: Path, budget: Any, value: int) -> None:
    assert Lab("study", tmp_path, budget=budget).pick(smoke=1, quick=2, full=3) == value


@pytest.mark.bad_input
def test_unknown_budget_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of smoke, quick, full, got 'huge'"):
        Lab("study", tmp_path, budget="huge")  # type: ignore[arg-type]


def test_generator_starts_anew_from_the_seed_each_time(tmp_path: Path) -> None:
    lab = Lab("study", tmp_path, seed=3)
    first, second = (torch.rand(4, generator=lab.generator()) for _ in range(2))
    other = torch.rand(4, generator=Lab("study", tmp_path, seed=4).generator())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_device_is_a_torch_device(tmp_path: Path) -> None:
    assert Lab("study", tmp_path, device="meta").device == torch.device("meta")


def test_data_take_the_runs_path_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some text")
    lab = Lab("study", tmp_path, seed=3, data_path=path)
    assert lab.data.text() == "some text"
    assert lab.data.seed == 3


def test_data_that_are_absent_are_refused_before_the_study_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        Lab("study", tmp_path, data_path=tmp_path / "absent")


# Claims


@pytest.mark.parametrize(
    ("relation", "below", "equal", "above"),
    [
        ("<", True, False, False),
        ("<=", True, True, False),
        (">", False, False, True),
        (">=", False, True, True),
        ("==", False, True, False),
    ],
)
def test_claim_holds_where_its_relation_is_true(
    lab: Lab, relation: str, below: bool, equal: bool, above: bool
) -> None:
    holds = [lab.claim("x", measured, relation, 1.0).holds for measured in (0.5, 1.0, 1.5)]
    assert holds == [below, equal, above]


@pytest.mark.parametrize("relation", RELATIONS)
def test_nan_never_holds(lab: Lab, relation: str) -> None:
    assert not lab.claim("x", math.nan, relation, 1.0).holds


def test_infinite_measurements_are_numbers(lab: Lab) -> None:
    assert lab.claim("x", math.inf, ">", 1.0).holds
    assert not lab.claim("x", math.inf, "<", 1.0).holds


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), np.int64(2), np.array(2.0), np.array([2.0]), torch.tensor(2)],
    ids=repr,
)
def test_claim_takes_any_one_number(lab: Lab, value: Any) -> None:
    claim = lab.claim("x", value, "==", 2.0)
    assert claim.holds
    assert type(claim.measured) is float


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), "2", None, 2j, [2.0]], ids=repr
)
def test_claim_refuses_what_is_no_number(lab: Lab, value: Any) -> None:
    with pytest.raises(TypeError, match="measured value of 'x' must be a number, got"):
        lab.claim("x", value, "==", 2.0)
    with pytest.raises(TypeError, match="expected value of 'x' must be a number, got"):
        lab.claim("x", 2.0, "==", value)
    assert lab.findings.claims == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3),
        np.zeros(0),
        torch.zeros(3),
        torch.zeros(0),
    ],
    ids=["numpy", "empty-numpy", "torch", "empty-torch"],
)
def test_claim_refuses_an_array(lab: Lab, value: Any) -> None:
    with pytest.raises(TypeError, match="must be one number, got an array of shape"):
        lab.claim("x", value, "<", 1.0)


@pytest.mark.parametrize("relation", ["=", "!=", "is", ""])
def test_unknown_relation_lists_the_known_ones(lab: Lab, relation: str) -> None:
    with pytest.raises(ValueError, match="one of <, <=, >, >=, ==, got"):
        lab.claim("x", 1.0, relation, 1.0)


def test_nothing_is_expected_to_be_nan(lab: Lab) -> None:
    with pytest.raises(ValueError, match="expected value of 'x' must be a number, got NaN"):
        lab.claim("x", 1.0, "==", math.nan)


def test_observations_are_recorded_but_not_judged(lab: Lab) -> None:
    lab.claim("a", 1.0, "<", 2.0)
    lab.observe("b", 3.0, "<", 2.0)
    assert lab.findings.claims == [
        Claim("a", 1.0, "<", 2.0, judged=True),
        Claim("b", 3.0, "<", 2.0, judged=False),
    ]
    assert [claim["holds"] for claim in lab.findings.as_dict()["claims"]] == [True, False]


# Tables


def test_kept_files_stay_in_the_runs_folder(lab: Lab) -> None:
    lab.folder.mkdir()
    path = lab.keep("denoiser.safetensors")
    path.write_bytes(b"weights")
    assert path == lab.folder / "files" / "denoiser.safetensors"
    assert lab.keep("another.json").parent.is_dir()


@pytest.mark.parametrize("name", ["../escape.json", "no-suffix", "Upper.json", ".hidden", "a/b.c"])
def test_a_kept_file_cannot_leave_the_folder(lab: Lab, name: str) -> None:
    with pytest.raises(ValueError, match="kept file's name"):
        lab.keep(name)


def test_table_keeps_columns_in_their_order_and_unpacks_numbers(lab: Lab) -> None:
    lab.table(
        "sizes",
        [
            {"$d$": 2, "error": np.float64(0.5), "note": "small"},
            {"$d$": np.int64(3), "error": torch.tensor(0.25), "note": None},
        ],
        caption="Errors.",
    )
    (table,) = lab.findings.tables
    assert table.columns == ["$d$", "error", "note"]
    assert table.rows == [[2, 0.5, "small"], [3, 0.25, None]]
    assert [type(cell) for cell in table.rows[1]] == [int, float, type(None)]
    assert table.caption == "Errors."


def test_table_without_rows_is_refused(lab: Lab) -> None:
    with pytest.raises(ValueError, match="table 'sizes' must have at least one row, got none"):
        lab.table("sizes", [])


@pytest.mark.parametrize("row", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"b": 2, "a": 1}])
def test_rows_of_other_columns_are_refused(lab: Lab, row: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must have the columns \['a', 'b'\], got"):
        lab.table("sizes", [{"a": 1, "b": 2}, row])


def test_two_tables_of_one_name_are_refused(lab: Lab) -> None:
    lab.table("sizes", [{"a": 1}])
    with pytest.raises(ValueError, match="table names must differ, got 'sizes' twice"):
        lab.table("sizes", [{"a": 2}])


@pytest.mark.parametrize(
    "cell",
    [
        [1],
        {"a": 1},
        object(),
        2j,
        np.zeros(2),
        torch.zeros(2),
    ],
    ids=["list", "dict", "object", "complex", "numpy", "torch"],
)
def test_cells_that_are_neither_text_nor_number_are_refused(lab: Lab, cell: Any) -> None:
    with pytest.raises(TypeError, match="cell must be text, a number or None, got"):
        lab.table("sizes", [{"a": cell}])
    assert lab.findings.tables == []


# Figures


def test_figure_is_saved_in_both_formats_and_closed(lab: Lab) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 3))
    axes.plot([0, 1], [1, 0])
    lab.figure("line-1", figure, "A line.")
    folder = lab.folder / "figures"
    assert (folder / "line-1.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert (folder / "line-1.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not plt.fignum_exists(figure.number)
    (kept,) = lab.findings.figures
    assert (kept.name, kept.caption, kept.width) == ("line-1", "A line.", 4.0)


@pytest.mark.parametrize("name", ["", "Line", "a b", "../a", "-a", "a.svg", "线"])
def test_figure_names_that_are_no_file_names_are_refused(lab: Lab, name: str) -> None:
    from matplotlib.figure import Figure

    with pytest.raises(ValueError, match="a figure's name is made of"):
        lab.figure(name, Figure(), "A line.")
    assert not lab.folder.exists()


def test_two_figures_of_one_name_are_refused(lab: Lab) -> None:
    from matplotlib.figure import Figure

    lab.figure("line", Figure(), "A line.")
    with pytest.raises(ValueError, match="figure names must differ, got 'line' twice"):
        lab.figure("line", Figure(), "Another.")


# The cache


@pytest.mark.parametrize(
    "arrays",
    [
        {"weight": torch.randn(3, 2), "scale": torch.tensor(2.0), "none": torch.zeros(0, 2)},
        {"half": torch.ones(2, dtype=torch.bfloat16), "count": torch.arange(3)},
        {"turned": torch.arange(6).reshape(2, 3).T, "mask": torch.tensor([True, False])},
        {"weight": np.ones((3, 2)), "single": np.ones(2, np.float32), "none": np.zeros((0, 2))},
        {"turned": np.arange(6).reshape(2, 3).T, "bytes": np.arange(3, dtype=np.uint8)},
        {},
    ],
    ids=["torch", "torch-types", "torch-strides", "numpy", "numpy-strides", "nothing"],
)
def test_cache_gives_back_what_was_built(
    lab: Lab, another: Callable[..., Lab], arrays: dict[str, Any]
) -> None:
    build = counted(arrays)
    first = lab.cache("model", build)
    second = another().cache("model", build)
    assert build.calls == 1  # type: ignore[attr-defined]
    for kept in (first, second):
        assert kept.keys() == arrays.keys()
        for name, array in arrays.items():
            assert type(kept[name]) is type(array)
            assert kept[name].dtype == array.dtype
            assert kept[name].shape == array.shape
            assert bool((kept[name] == array).all())


def test_cache_keeps_numpy_scalars_without_dimensions(lab: Lab) -> None:
    assert lab.cache("model", lambda: {"loss": np.array(0.5)})["loss"].shape == ()


def test_cache_keeps_a_model_with_tied_weights(lab: Lab) -> None:
    weight = torch.randn(4, 2)
    kept = lab.cache("model", lambda: {"embedding": weight, "readout": weight})
    assert torch.equal(kept["embedding"], weight)
    assert torch.equal(kept["readout"], weight)


def test_cache_takes_a_state_dict_that_loads_again(lab: Lab, another: Callable[..., Lab]) -> None:
    trained, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    lab.cache("model", trained.state_dict)
    fresh.load_state_dict(another().cache("model", fresh.state_dict))
    x = torch.randn(5, 3)
    assert torch.equal(trained(x), fresh(x))


def test_a_module_is_trained_once_and_taken_up_later(lab: Lab, another: Callable[..., Lab]) -> None:
    def train(module: torch.nn.Module) -> None:
        assert not later
        with torch.no_grad():
            module.weight.fill_(3.0)

    later = False
    first = torch.nn.Linear(3, 2)
    assert lab.trained("model", first, lambda: train(first), inputs={"steps": 5}) is first
    assert not first.training
    later = True
    second = torch.nn.Linear(3, 2)
    another().trained("model", second, lambda: train(second), inputs={"steps": 5})
    assert bool((second.weight == 3).all())
    assert torch.equal(second.bias, first.bias)


def test_seeded_draws_are_the_same_and_leave_the_source_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with seeded(5):
        one = torch.randn(3)
    with seeded(5):
        assert torch.equal(torch.randn(3), one)
        torch.randn(100)
    with seeded(6):
        assert not torch.equal(torch.randn(3), one)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_cache_forgets_gradients(lab: Lab) -> None:
    kept = lab.cache("model", lambda: {"weight": torch.ones(2, requires_grad=True)})
    assert not kept["weight"].requires_grad


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None], ids=["empty", "zeros", "truncated"])
def test_damaged_cache_is_built_again(
    tmp_path: Path, lab: Lab, another: Callable[..., Lab], damage: bytes | None
) -> None:
    build = counted({"weight": torch.arange(100.0)})
    lab.cache("model", build)
    (file,) = (tmp_path / "cache" / "study").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    kept = another().cache("model", build)
    assert build.calls == 2  # type: ignore[attr-defined]
    assert torch.equal(kept["weight"], torch.arange(100.0))
    assert file.read_bytes() == whole


def test_build_that_fails_leaves_no_cache(tmp_path: Path, lab: Lab) -> None:
    def build() -> dict[str, Any]:
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        lab.cache("model", build)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"budget": "full"},
        {"device": "meta"},
        {"slug": "other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_run_with_other_settings_builds_anew(
    lab: Lab, another: Callable[..., Lab], changes: dict[str, Any]
) -> None:
    build = counted({"weight": torch.ones(1)})
    lab.cache("model", build)
    another(**changes).cache("model", build)
    assert build.calls == 2  # type: ignore[attr-defined]
    another(**changes).cache("model", build)
    assert build.calls == 2  # type: ignore[attr-defined]


def test_another_name_or_other_inputs_build_anew(lab: Lab) -> None:
    build = counted({"weight": torch.ones(1)})
    lab.cache("model", build, inputs={"width": 3, "depth": 2})
    lab.cache("model", build, inputs={"depth": 2, "width": 3})
    assert build.calls == 1  # type: ignore[attr-defined]
    lab.cache("model", build, inputs={"width": 4, "depth": 2})
    lab.cache("other", build, inputs={"width": 3, "depth": 2})
    lab.cache("model", build)
    assert build.calls == 4  # type: ignore[attr-defined]


def test_other_data_build_anew_and_a_new_name_for_them_does_not(
    tmp_path: Path, another: Callable[..., Lab]
) -> None:
    build = counted({"weight": torch.ones(1)})
    for name, text in [("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")]:
        (tmp_path / name).write_text(text)
        another(data_path=tmp_path / name).cache("model", build)
    assert build.calls == 2  # type: ignore[attr-defined]


def test_other_code_builds_anew(
    lab: Lab, another: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = counted({"weight": torch.ones(1)})
    lab.cache("model", build)
    monkeypatch.setattr(study, "code_digest", lambda: "other code")
    another().cache("model", build)
    assert build.calls == 2  # type: ignore[attr-defined]


def test_without_a_cache_folder_nothing_is_kept(tmp_path: Path) -> None:
    build = counted({"weight": torch.ones(1)})
    lab = Lab("study", tmp_path)
    for _ in range(2):
        assert torch.equal(lab.cache("model", build)["weight"], torch.ones(1))
    assert build.calls == 2  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arrays",
    [{"a": torch.zeros(1), "b": np.zeros(1)}, {"a": [1.0]}, {"a": 1.0}],
    ids=["both", "list", "number"],
)
def test_cache_refuses_what_it_cannot_keep(
    tmp_path: Path, lab: Lab, arrays: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match="torch tensors or numpy arrays, not both, got"):
        lab.cache("model", lambda: arrays)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_cache_refuses_the_same_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="torch tensors or numpy arrays"):
        Lab("study", tmp_path).cache("model", lambda: {"a": [1.0]})


@pytest.mark.parametrize("name", ["", "Model", "a/b", "../a"])
def test_cache_names_that_are_no_file_names_are_refused(lab: Lab, name: str) -> None:
    with pytest.raises(ValueError, match="a cache's name is made of"):
        lab.cache(name, dict)


# Progress


def test_progress_without_bars_is_the_iterable_itself(
    lab: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = lab.progress(range(5), "training")
    seen = []
    for step in steps:
        steps.metric(loss=1.0 / (step + 1))
        seen.append(step)
    assert seen == list(range(5))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def bars() -> Iterator[tuple[Bars, io.StringIO]]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    columns = (TextColumn("{task.description}"), TextColumn("{task.fields[metric]}"))
    with Bars(*columns, console=console, auto_refresh=False) as shown:
        yield shown, output


def test_progress_shows_label_share_and_metrics(
    tmp_path: Path, bars: tuple[Bars, io.StringIO]
) -> None:
    shown, output = bars
    steps = Lab("study", tmp_path, bars=shown).progress(range(4), "training")
    for step in steps:
        steps.metric(loss=0.123456, rate=2)
        (task,) = shown.tasks
        assert (task.description, task.total, task.completed) == ("training", 4, step)
        shown.refresh()
    assert "loss 0.1235  rate 2" in output.getvalue()
    assert shown.tasks == []


def test_progress_over_an_iterator_has_no_total(
    tmp_path: Path, bars: tuple[Bars, io.StringIO]
) -> None:
    shown, _ = bars
    for _ in Lab("study", tmp_path, bars=shown).progress(iter("ab"), "reading"):
        (task,) = shown.tasks
        assert task.total is None


def test_progress_that_is_left_early_takes_its_bar_away(
    tmp_path: Path, bars: tuple[Bars, io.StringIO]
) -> None:
    shown, _ = bars
    steps = iter(Lab("study", tmp_path, bars=shown).progress(range(4), "training"))
    next(steps)
    assert len(shown.tasks) == 1
    steps.close()  # type: ignore[attr-defined]
    assert shown.tasks == []
