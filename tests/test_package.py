"""The package as a whole: it is light, typed, documented and complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kexue
from kexue.lab.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[1]


def test_every_subpackage_is_reached_from_the_top() -> None:
    assert {"stats", "nn", "generative", "lab"} <= set(dir(kexue))
    assert kexue.stats.angles.RandomCosine(2).mean() == 0.0
    with pytest.raises(AttributeError, match="no_such_thing"):
        kexue.no_such_thing  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(kexue.__file__).parent / "py.typed").is_file()


def test_version_and_changelog_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kexue.__version__
    assert f"## {kexue.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readmes_and_method_pages_are_up_to_date() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_STUDIES"}
    done = subprocess.run(
        [sys.executable, "-m", "kexue.lab.readme", "--check"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_catalogue_is_complete() -> None:
    entries = Catalogue("kexue.studies").entries
    assert len(entries) == 40
    for entry in entries.values():
        assert entry.title_zh
        assert entry.claim.endswith(".")
        assert entry.modules
        assert all(module.startswith("kexue.") for module in entry.modules)


@pytest.mark.parametrize("entry", Catalogue("kexue.studies").built(), ids=lambda e: e.slug)
def test_every_part_of_a_method_stands(entry) -> None:
    rows = ROOT / "tests" / "contract" / "rows" / f"{entry.slug}.py"
    assert rows.is_file()
    assert (ROOT / "benchmarks" / f"{entry.slug}.py").is_file()
    assert len(entry.text) > 1000, "the article is the study's docstring"
    source = entry.path.read_text()
    assert "lab.claim" in source
    assert "lab.figure(" in source


def test_no_study_needs_another() -> None:
    for entry in Catalogue("kexue.studies").built():
        source = entry.path.read_text()
        for other in Catalogue("kexue.studies").entries:
            assert not re.search(rf"kexue\.studies(\.| import .*\b){other}\b", source), entry.slug
