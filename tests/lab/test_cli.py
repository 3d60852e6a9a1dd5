"""The command line: what it prints, and with which status it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def imports(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(shown.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imports("import kexue") & {"torch", "numpy", "scipy", "matplotlib", "sklearn"}


def test_list_and_help_do_not_import_torch() -> None:
    for argument in ("list", "--help"):
        code = (
            f"sys.argv = ['kexue', '{argument}']; from kexue.lab import cli\n"
            "try: cli.main()\nexcept SystemExit: pass\nprint(*sys.modules)"
        )
        shown = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert not set(shown.stdout.splitlines()[-1].split()) & {"torch", "numpy", "matplotlib"}


def test_list_shows_methods_by_field_and_what_is_coming(kexue: Call) -> None:
    done = kexue("list")
    assert done.returncode == 0
    assert "  pendulum     The period of a pendulum\n" in done.stdout
    assert "Not built  (coming)" in done.stdout
    assert "pendulum" not in kexue("list", "--field", "nn").stdout


def test_show_prints_the_article(kexue: Call) -> None:
    done = kexue("show", "pendulum")
    assert done.returncode == 0
    assert "Energy gives the exact period" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("show", "pendulm"), 2, "did you mean 'pendulum'"),
        (("run", "coming_soon"), 2, "has no study yet"),
        (("run",), 2, "kexue run --help"),
        (("frobnicate",), 2, "frobnicate"),
        (("list", "--field", "botany"), 2, "--field must be one of stats, nn, optim"),
        (("run", "pendulum", "--budget", "tiny"), 2, "--budget must be smoke, quick or full"),
        (("run", "pendulum", "--seed", "x"), 2, "--seed"),
        (("run", "pendulum", "--device", "toaster"), 2, "--device must be a torch device"),
        (("run", "pendulum", "--data", "nowhere.txt"), 2, "existing file or folder"),
        (("run", "raises", "--data", "."), 2, "raises takes none"),
        (("run", "pendulum", "--jobs", "0"), 2, "--jobs must be at least 1"),
        (("run", "pendulum", "--backend", "slurm"), 2, "loky, dask, ray"),
        (("site",), 1, "kexue run all"),
        (("compare", ".", "."), 1, "expected a run"),
    ],
)
def test_errors_are_one_sentence(
    kexue: Call, arguments: tuple[str, ...], status: int, words: str
) -> None:
    done = kexue(*arguments)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("kexue: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback(kexue: Call) -> None:
    done = kexue("--debug", "show", "pendulm")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_run_prints_a_verdict_line_a_study_and_exits_with_the_worst(kexue: Call) -> None:
    done = kexue("run", "pendulum", "false_claim", "absent")
    assert done.returncode == 0, done.stderr
    verdicts = [re.split(r"  +| ·", line)[0] for line in done.stdout.splitlines()]
    assert verdicts == ["holds", "does not hold false_claim", "not run"]
    assert "runs/pendulum/" in done.stdout
    assert done.stderr == ""
    assert kexue("run", "raises", "pendulum").returncode == 1


def test_an_unwritable_folder_is_one_sentence(kexue: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = kexue("run", "pendulum", "--out", "file/runs")
    assert done.returncode == 1
    assert "cannot be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_the_site_grows_with_each_study(kexue: Call, tmp_path: Path) -> None:
    done = kexue("run", "pendulum", "training", "--budget", "smoke", "--site", "site")
    assert done.returncode == 0, done.stderr
    first, hint, second = done.stdout.splitlines()
    assert "pendulum" in first
    assert hint.startswith("open site/index.html now")
    assert "training" in second
    assert (tmp_path / "site" / "training" / "index.html").is_file()


def test_a_site_in_the_way_is_said_before_any_study_runs(kexue: Call, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("")
    done = kexue("run", "pendulum", "--site", "mine")
    assert done.returncode == 1
    assert "holds something that is no site" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_compare_shows_what_changed(kexue: Call, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert kexue("run", "training", "--seed", seed, "--out", seed).returncode == 0
    folders = [str(next((tmp_path / seed / "training").glob("2*"))) for seed in ("0", "1")]
    done = kexue("compare", *folders)
    assert done.returncode == 0
    assert "seed: 0 | 1" in done.stdout
    assert re.search(r"differs .*the first slope is found", done.stdout)
    same = kexue("compare", folders[0], folders[0]).stdout
    assert re.search(r"same .*the first slope is found", same)
    assert "differs" not in same


def test_serve_serves_the_site(kexue: Call, tmp_path: Path) -> None:
    import os
    import urllib.request

    assert kexue("run", "pendulum", "--budget", "smoke").returncode == 0
    server = subprocess.Popen(
        [sys.executable, "-m", "kexue", "serve", "--port", "0"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "KEXUE_STUDIES": "demo_studies", "PYTHONUNBUFFERED": "1",
             "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        with urllib.request.urlopen(address) as page:
            assert "The period of a pendulum" in page.read().decode()
    finally:
        server.terminate()
        server.wait()
