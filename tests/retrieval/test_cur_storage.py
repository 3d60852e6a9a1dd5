"""The index in a folder: nothing that was reported is lost, nothing broken is believed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kexue
from kexue.retrieval.cur import CURIndex, stored_shape
from kexue.retrieval.cur import storage as storage_module

ITEMS = [f"item {i}" for i in range(50)]
ANCHORS = [f"query {i}" for i in range(4)]
BLOCK = 20
N_PAIRS = len(ITEMS) * len(ANCHORS)


def score(pair: tuple[str, str]) -> float:
    """Never 0, so that what is missing can be seen."""
    query, item = (int(text.split()[1]) for text in pair)
    return 1.5 + np.sin(query + 0.1 * item)


class Counting:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: list[tuple[str, str]]) -> list[float]:
        self.asked += pairs
        return [score(pair) for pair in pairs]


def opened(path: Path, items: list[str] = ITEMS, **options: Any) -> tuple[CURIndex, Counting]:
    scorer = Counting()
    return CURIndex(scorer, items, ANCHORS, path=path, block_size=BLOCK, **options), scorer


def truth(items: list[str] = ITEMS) -> np.ndarray:
    return np.array([[score((q, i)) for i in items] for q in ANCHORS], np.float32)


def test_complete_index_is_opened_without_a_call(tmp_path: Path) -> None:
    opened(tmp_path / "deep" / "folder")[0].build()
    index, scorer = opened(tmp_path / "deep" / "folder")
    assert index.complete
    assert index.n_calls == len(scorer.asked) == 0
    np.testing.assert_array_equal(index.anchor_scores_, truth())
    first, second = (i.search("query 9", 3, budget=10) for i in (index, opened(index.path)[0]))
    assert first.scored_indices.tolist() == second.scored_indices.tolist()


def test_partial_index_goes_on_where_it_stopped(tmp_path: Path) -> None:
    opened(tmp_path)[0].build(max_calls=60)
    index, scorer = opened(tmp_path)
    assert not index.complete
    index.build()
    # Blocks of a row are 20, 20 and 10 items; 60 calls are reached after the fourth block.
    assert len(scorer.asked) == N_PAIRS - 70
    np.testing.assert_array_equal(index.anchor_scores_, truth())


def test_files_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    opened(tmp_path)[0].build()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["n_anchor_queries"], manifest["n_items"], manifest["block_size"]) == (
        4,
        50,
        20,
    )
    assert len(manifest["items"]) == len(manifest["anchor_queries"]) == 64
    stored = np.fromfile(tmp_path / "scores.bin", np.float32).reshape(4, 50)
    np.testing.assert_array_equal(stored, truth())
    assert (tmp_path / "progress.log").read_text().count("\n") == 4 * 3


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "scores.bin").read_bytes())
    content[4 * (50 + 25)] ^= 1  # query 1, item 25
    (folder / "scores.bin").write_bytes(content)


def tear_the_last_line(folder: Path) -> None:
    log = (folder / "progress.log").read_bytes()
    (folder / "progress.log").write_bytes(log[:-4])


def lose_the_last_newline(folder: Path) -> None:
    log = (folder / "progress.log").read_bytes()
    (folder / "progress.log").write_bytes(log[:-1])


def write_nonsense_between(folder: Path) -> None:
    lines = (folder / "progress.log").read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\x00 nonsense\n"
    (folder / "progress.log").write_bytes(b"".join(lines))


def exchange_two_places(folder: Path) -> None:
    log = (folder / "progress.log").read_text().splitlines(keepends=True)
    log[0], log[1] = log[0].replace("0 0 20", "0 20 40"), log[1].replace("0 20 40", "0 0 20")
    (folder / "progress.log").write_text("".join(log))


def cut_the_scores_short(folder: Path) -> None:
    os.truncate(folder / "scores.bin", 4 * 3 * 50 + 4 * 45)


def lose_the_log(folder: Path) -> None:
    (folder / "progress.log").unlink()


@pytest.mark.parametrize(
    ("damage", "n_lost"),
    [
        (flip_a_byte, 20),
        (tear_the_last_line, 10),
        (lose_the_last_newline, 10),
        (write_nonsense_between, 10),
        (exchange_two_places, 40),
        (cut_the_scores_short, 10),
        (lose_the_log, N_PAIRS),
    ],
)
def test_damage_costs_the_blocks_it_struck_and_no_more(
    damage: Callable[[Path], None], n_lost: int, tmp_path: Path
) -> None:
    opened(tmp_path)[0].build()
    damage(tmp_path)
    index, scorer = opened(tmp_path)
    assert not index.complete
    assert len(index.build().anchor_scores_) == 4
    assert len(scorer.asked) == n_lost
    np.testing.assert_array_equal(index.anchor_scores_, truth())
    again, scorer = opened(tmp_path)
    assert again.complete, "what was mended is not kept"


def test_line_with_another_place_vouches_for_nothing(tmp_path: Path) -> None:
    """Scores of 0 look like those that are missing: the place must be part of the checksum."""
    asked: list[tuple[str, str]] = []

    def scorer(pairs: list[tuple[str, str]]) -> list[float]:
        asked.extend(pairs)
        return [0.0] * len(pairs)

    CURIndex(scorer, ITEMS, ANCHORS, path=tmp_path, block_size=BLOCK).build(max_calls=1)
    log = tmp_path / "progress.log"
    log.write_text(log.read_text().replace("0 0 20 ", "1 0 20 "))
    asked.clear()
    CURIndex(scorer, ITEMS, ANCHORS, path=tmp_path, block_size=BLOCK).build()
    assert len(asked) == N_PAIRS


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("items", "anchors", "message"),
    [
        (ITEMS[:-1], ANCHORS, "4 anchor queries and 50 items, got 4 and 49"),
        (ITEMS, ANCHORS[1:], "4 anchor queries and 50 items, got 3 and 50"),
        ([*ITEMS[:-1], "another"], ANCHORS, "about other items than those given"),
        (ITEMS[::-1], ANCHORS, "about other items than those given"),
        (ITEMS, [*ANCHORS[:-1], "?"], "about other anchor queries than those given"),
    ],
)
def test_folder_about_something_else_is_refused(
    items: list[str], anchors: list[str], message: str, tmp_path: Path
) -> None:
    opened(tmp_path)[0].build()
    with pytest.raises(ValueError, match=message):
        CURIndex(Counting(), items, anchors, path=tmp_path)
    assert opened(tmp_path)[0].complete


@pytest.mark.parametrize(
    "content", ["", "{}", "[1, 2]", '{"version": 2}', '{"version": 1, "x": 3}']
)
def test_unreadable_manifest_is_refused(content: str, tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="no manifest of an index"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="no manifest of an index"):
        stored_shape(tmp_path)


def test_second_writer_is_turned_away(tmp_path: Path) -> None:
    other, counting = opened(tmp_path)
    refused = []

    def scorer(pairs: list[tuple[str, str]]) -> list[float]:
        for action in (lambda: opened(tmp_path), other.build, lambda: other.add_items(["item 50"])):
            with pytest.raises(RuntimeError, match="being written by someone else"):
                action()
            refused.append(action)
        return [score(pair) for pair in pairs]

    CURIndex(scorer, ITEMS, ANCHORS, path=tmp_path).build(max_calls=1)
    assert len(refused) == 3
    # The lock is free again, and the other one takes over what has been written.
    other.build()
    assert len(counting.asked) == N_PAIRS - BLOCK
    assert other.complete


def test_writer_that_missed_added_items_is_told(tmp_path: Path) -> None:
    one, _ = opened(tmp_path)
    other, _ = opened(tmp_path)
    one.add_items(["item 50"])
    with pytest.raises(ValueError, match="4 anchor queries and 51 items, got 4 and 50"):
        other.build()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(RuntimeError, match="was removed after it was opened"):
        other.build()


def test_added_items_stay_and_old_scores_are_kept(tmp_path: Path) -> None:
    index, _ = opened(tmp_path, ITEMS[:30])
    index.build(max_calls=45)
    index.add_items(ITEMS[30:35]).add_items(ITEMS[35:])
    again, scorer = opened(tmp_path)
    again.build()
    # Rows of 30 in blocks of 20 and 10: three blocks were scored.
    assert len(scorer.asked) == N_PAIRS - 50
    np.testing.assert_array_equal(again.anchor_scores_, truth())
    assert opened(tmp_path)[0].complete


STEPS_OF_AN_EXTENSION = 12


@pytest.mark.parametrize("step", range(STEPS_OF_AN_EXTENSION))
def test_extension_that_stops_anywhere_happened_or_did_not(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops before the n-th call to the system that makes something durable or visible."""
    index, _ = opened(tmp_path, ITEMS[:30])
    index.build()
    calls = 0

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == step:
                raise InterruptedError
            calls += 1
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, "replace", stopping(os.replace))
        patch.setattr(storage_module.os, "fsync", stopping(os.fsync))
        stopped = False
        try:
            index.add_items(ITEMS[30:])
        except InterruptedError:
            stopped = True
    assert stopped or step >= calls
    shape = stored_shape(tmp_path)
    assert shape in {(4, 30), (4, 50)}
    again, scorer = opened(tmp_path, ITEMS[: shape[1]])
    again.build()
    assert len(scorer.asked) == 4 * (shape[1] - 30)
    np.testing.assert_array_equal(again.anchor_scores_, truth(ITEMS[: shape[1]]))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".new") == [
        "lock", "manifest.json", "progress.log", "scores.bin",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["a", "b"], ["ab"]),
        (["a"], [b"a"]),
        (["1"], [1]),
        ([1], [1.0]),
        ([True], [1]),
        ([("a", "bc")], [("ab", "c")]),
        ([("a",)], [["a"]]),
        ([{"x": 1}], [{"x": 2}]),
        ([None], ["None"]),
        ([np.zeros(2)], [np.zeros(2, np.float32)]),
        ([np.zeros((2, 3))], [np.zeros((3, 2))]),
        ([torch.zeros(2)], [torch.ones(2)]),
    ],
)
def test_items_are_told_apart_by_kind_and_content(one: list[Any], other: list[Any]) -> None:
    def of(items: list[Any]) -> str:
        return storage_module.digest(items, "items")

    assert of(one) != of(other)


@pytest.mark.bad_input
def test_items_without_lasting_bytes_are_refused_on_disk_only(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"items of an index on disk .* got a object"):
        CURIndex(max, [object()], ["a"], path=tmp_path)
    CURIndex(max, [object()], ["a"])


def test_text_in_an_array_is_text() -> None:
    items = np.array(["a", "bc"])
    assert storage_module.digest(items, "items") == storage_module.digest(["a", "bc"], "items")


def test_there_is_no_shape_where_there_is_no_index(tmp_path: Path) -> None:
    assert stored_shape(tmp_path / "nowhere") is None
    opened(tmp_path)
    assert stored_shape(tmp_path) == (4, 50)


WRITER = """
import math, os, sys, time
from kexue.retrieval.cur import CURIndex, stored_shape

folder, log = sys.argv[1:]
log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def say(text):
    os.write(log, text.encode())

def scorer(pairs):
    say("".join(f"{q} {i}\\n" for q, i in pairs))
    time.sleep(0.002)
    return [1.5 + math.sin(q + 0.1 * i) for q, i in pairs]

n_items = (stored_shape(folder) or (0, 30))[1]
index = CURIndex(scorer, range(n_items), range(5), path=folder, block_size=8)
say("open\\n")
while True:
    index.build(progress=lambda done, total: say(f"kept {done}\\n"))
    index.add_items(range(n_items, n_items + 10))
    n_items += 10
    say(f"items {n_items}\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_ten_kills_lose_nothing_that_was_reported_as_written(tmp_path: Path) -> None:
    folder, log = tmp_path / "index", tmp_path / "log"
    log.touch()
    search_path = [str(Path(kexue.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    rng = np.random.default_rng(0)
    for kill in range(10):
        n_before = log.read_text().count("open\n")
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(log)], env=environment
        )
        try:
            deadline = time.monotonic() + 60
            while log.read_text().count("open\n") == n_before:
                assert process.poll() is None, "the writer ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.2)))
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, f"kill {kill} came too late"

    written: set[str] = set()
    pending: list[str] = []
    n_items = n_asked = 0
    for line in log.read_text().splitlines():
        word, _, number = line.partition(" ")
        if word == "open":
            pending = []
        elif word == "kept":
            written.update(pending)
            pending = []
        elif word == "items":
            n_items = int(number)
        else:
            n_asked += 1
            assert line not in written, f"{line} was scored again after it was reported"
            pending.append(line)
    shape = stored_shape(folder)
    assert shape is not None
    assert shape[1] >= n_items > 30, "items that were reported as added are gone"

    asked: list[tuple[int, int]] = []

    def scorer(pairs: list[tuple[int, int]]) -> list[float]:
        asked.extend(pairs)
        return [1.5 + np.sin(q + 0.1 * i) for q, i in pairs]

    index = CURIndex(scorer, range(shape[1]), range(5), path=folder).build()
    assert not {f"{q} {i}" for q, i in asked} & written
    # At most one block is on its way at each kill.
    assert n_asked + len(asked) <= shape[0] * shape[1] + 10 * 8
    q, i = np.indices(shape)
    np.testing.assert_array_equal(
        index.anchor_scores_, (1.5 + np.sin(q + 0.1 * i)).astype(np.float32)
    )


@pytest.mark.parametrize("name", ["bounds", "block_size"])
def test_a_manifest_of_other_content_is_refused(tmp_path: Path, name: str) -> None:
    def score(pairs):
        return [float(a + b) for a, b in pairs]

    CURIndex(score, list(range(500)), [1, 2], path=tmp_path, block_size=100).build()
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    content[name] = [0, 100] if name == "bounds" else 300
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no manifest of an index"):
        CURIndex(score, list(range(500)), [1, 2], path=tmp_path, block_size=100)


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    backups = [tmp_path / "scores.bin.bak", tmp_path / "progress.log.bak"]
    for backup in backups:
        backup.write_text("mine")
    for _ in range(2):
        CURIndex(lambda pairs: [0.0] * len(pairs), [1, 2, 3], [1], path=tmp_path).build()
    assert all(backup.exists() for backup in backups)
