"""Runs are whole or not there."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kexue.lab.report
from kexue.lab.errors import StoreError
from kexue.lab.store import (
    SCHEMA,
    newest_runs,
    read_run,
    result_json,
    sweep,
    write_whole,
    writing_run,
)

RESULT = {
    "schema": SCHEMA,
    "slug": "pendulum",
    "title": "The period of a pendulum",
    "verdict": "holds",
    "budget": "quick",
    "seed": 0,
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "claims": [
        {
            "statement": "s",
            "measured": float("nan"),
            "relation": "<",
            "expected": 1.0,
            "judged": True,
            "holds": False,
        }
    ],
    "tables": [],
    "figures": [],
    "versions": {},
    "machine": {},
}


def keep(root: Path, slug: str = "pendulum", **changes: object) -> Path:
    with writing_run(root, slug) as (folder, final):
        (folder / "result.json").write_text(result_json({**RESULT, **changes}))
    return final


def test_a_run_appears_under_its_name_only_at_the_end(tmp_path: Path) -> None:
    with writing_run(tmp_path, "pendulum") as (folder, final):
        assert folder.is_dir()
        assert not final.exists()
    assert final.is_dir()
    assert list((tmp_path / "pendulum").iterdir()) == [final]


def test_an_interrupted_block_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing_run(tmp_path, "pendulum") as (folder, _):
            (folder / "result.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "pendulum").iterdir()) == []


def test_numbers_that_json_lacks_survive(tmp_path: Path) -> None:
    claim = read_run(keep(tmp_path)).result["claims"][0]
    assert claim["measured"] != claim["measured"]
    json.loads((keep(tmp_path) / "result.json").read_text(), parse_constant=pytest.fail)


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    for name in ("dead", "living"):
        (tmp_path / f".partial-{name}").mkdir()
        (tmp_path / f".partial-{name}.lock").touch()
    with open(tmp_path / ".partial-living.lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".partial-living",
        ".partial-living.lock",
    ]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_whole(path, b"old")
    write_whole(path, b"new" * 100_000)
    assert path.read_bytes() == b"new" * 100_000
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        write_whole(target, b"x")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["kept", "target"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("I am a file")
    with (
        pytest.raises(StoreError, match=r"runs.* cannot be written .* --out"),
        writing_run(tmp_path / "runs", "pendulum"),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "schema version"),
        (json.dumps({**RESULT, "schema": SCHEMA + 1, "claims": []}), "install a newer kexue"),
        (json.dumps({"schema": 1, "slug": "pendulum"}), "'title' is missing"),
        (json.dumps({**RESULT, "claims": [{"statement": "no numbers"}]}), "lacks"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_damaged_or_newer_result_is_named(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "result.json").write_bytes(data)
    with pytest.raises(StoreError, match=words) as refusal:
        read_run(tmp_path)
    assert str(tmp_path / "result.json") in str(refusal.value)


def test_the_newest_readable_run_counts_and_the_others_are_named(tmp_path: Path) -> None:
    good = tmp_path / "pendulum" / "20260101T000000-aaaaaa"
    bad = tmp_path / "pendulum" / "20260102T000000-bbbbbb"
    for folder in (good, bad):
        folder.mkdir(parents=True)
    (good / "result.json").write_text(result_json(RESULT))
    (bad / "result.json").write_text("half a fi")
    newest, skipped = newest_runs(tmp_path)
    assert newest["pendulum"].folder == good
    assert len(skipped) == 1
    assert str(bad) in skipped[0]


FULL_DISK = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size="$2" tmpfs "$1"
exec "$3" -m kexue run pendulum --out "$1/runs"
"""


def _room_for_the_assets() -> int:
    """Bytes that the assets fill in pages of 4 KiB: what comes after them does not fit."""
    assets = Path(kexue.lab.report.__file__).parent / "assets"
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in assets.rglob("*") if p.is_file())


@pytest.mark.parametrize("when", ["at the start", "in the middle of the study"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, when: str) -> None:
    probe = ["unshare", "-rm", "true"]
    if (
        sys.platform != "linux"
        or subprocess.run(probe, check=False, capture_output=True).returncode != 0
    ):
        pytest.skip("no private mounts on this machine")
    size = 16_384 if when == "at the start" else _room_for_the_assets() + 32_768
    environment = {
        **os.environ,
        "KEXUE_STUDIES": "demo_studies",
        "PYTHONPATH": str(Path(__file__).parent),
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
    }
    script = ["sh", str(tmp_path / "small"), str(size), sys.executable]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK, *script],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("\n") == 1
    assert "is full: free some space" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
