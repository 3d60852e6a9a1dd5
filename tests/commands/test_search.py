"""`kexue search`: build, interrupt, go on, add, query."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kexue.commands._text import LexicalScorer
from kexue.commands.search import search
from kexue.lab.errors import DataError, UsageError
from sentence_models import tiny_cross_encoder, tiny_sentence_transformer

ANIMALS = ("cat", "dog", "horse", "sparrow", "whale", "ant", "tiger", "snail")
DEEDS = ("sleeps in the", "runs through the", "looks at the", "avoids the", "likes the")
PLACES = ("garden", "forest", "river", "house", "desert", "city")
DOCUMENTS = [f"the {a} {d} {p}" for a in ANIMALS for d in DEEDS for p in PLACES]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(DOCUMENTS))
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(search, [str(a) for a in arguments], catch_exceptions=False)
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.stdout


def test_a_query_finds_what_exhaustive_scoring_finds(tmp_path: Path, file: Path) -> None:
    index = tmp_path / "index"
    said = call("build", index, file, "--anchors", 30)
    assert said.startswith("240 documents, 7200 pairs scored")
    query = "a tiger near rivers"
    found = json.loads(call("query", index, query, "-k", 3, "--budget", 60, "--json"))
    assert found["pairs_scored"] == 60
    scores = LexicalScorer(DOCUMENTS).predict([(query, d) for d in DOCUMENTS])
    best = np.sort(scores)[::-1][:3]
    np.testing.assert_allclose([row["score"] for row in found["results"]], best, rtol=1e-12)
    for row in found["results"]:
        assert DOCUMENTS[row["line"] - 1] == row["document"]
        assert "tiger" in row["document"]


def test_more_budget_than_documents_scores_all_of_them_once(tmp_path: Path, file: Path) -> None:
    call("build", tmp_path / "index", file, "--anchors", 5)
    found = json.loads(call("query", tmp_path / "index", "dog", "--budget", 1000, "--json"))
    assert found["pairs_scored"] == 240


def test_a_query_without_a_known_word_still_gets_an_answer(tmp_path: Path, file: Path) -> None:
    call("build", tmp_path / "index", file, "--anchors", 5)
    lines = call("query", tmp_path / "index", "zzz", "-k", 2, "--budget", 20).splitlines()
    assert len(lines) == 2


def test_building_again_scores_nothing_twice(tmp_path: Path, file: Path) -> None:
    call("build", tmp_path / "index", file, "--anchors", 10)
    assert "240 documents, 0 pairs scored" in call("build", tmp_path / "index", file)


def test_added_lines_are_scored_alone_and_found(tmp_path: Path, file: Path) -> None:
    index = tmp_path / "index"
    call("build", index, file, "--anchors", 10)
    before = call("query", index, "the dog likes the city", "-k", 1)
    file.write_text("\n".join([*DOCUMENTS, "the walrus reads the newspaper", "an owl sings"]))
    assert "242 documents, 20 pairs scored" in call("build", index, file)
    found = call("query", index, "walrus newspapers", "-k", 1)
    assert "the walrus reads the newspaper" in found
    # Rarities were counted once: scores of old documents did not move.
    assert call("query", index, "the dog likes the city", "-k", 1) == before


@pytest.mark.slow
def test_a_build_killed_anywhere_goes_on_and_loses_nothing_counted(tmp_path: Path) -> None:
    """Ten kills at random moments; what the log says is scored is never scored again."""
    file, index = tmp_path / "documents.txt", tmp_path / "index"
    file.write_text("\n".join(DOCUMENTS))
    program = (
        "import sys, time\n"
        "from kexue.commands import _text\n"
        "plain = _text.LexicalScorer.predict\n"
        "def slow(self, pairs):\n"
        "    time.sleep(0.02)\n"
        "    return plain(self, pairs)\n"
        "_text.LexicalScorer.predict = slow\n"
        "sys.argv = ['kexue', 'search', 'build', *sys.argv[1:]]\n"
        "from kexue.lab.cli import main\n"
        "main()\n"
    )
    draw = random.Random(0)
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(index), str(file), "--anchors", "40"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        time.sleep(1.5 + draw.random())
        child.send_signal(signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL), child.stderr and child.stderr.read()
    kept = (index / "cur" / "progress.log").read_text().splitlines()
    said = call("build", index, file, "--anchors", 40)
    scored = int(said.split(", ")[1].split()[0])
    assert scored <= 40 * 240 - 240 * (len(kept) - 2)
    found = json.loads(call("query", index, "the snail avoids the desert", "-k", 1, "--json"))
    assert found["results"][0]["document"] == "the snail avoids the desert"


@pytest.mark.slow
def test_models_of_sentence_transformers_take_the_place_of_words(
    tmp_path: Path, file: Path
) -> None:
    vocabulary = sorted({word for document in DOCUMENTS for word in document.split()})
    model = tiny_cross_encoder(tmp_path / "scorer", vocabulary)
    tiny_sentence_transformer(tmp_path / "encoder", vocabulary)
    index, scorer, encoder = (
        tmp_path / "index", tmp_path / "scorer", tmp_path / "encoder" / "model",
    )  # fmt: skip
    arguments = ("--anchors", 8, "--scorer", scorer, "--encoder", encoder)
    assert "1920 pairs scored" in call("build", index, file, *arguments)
    query = "the dog sleeps in the house"
    found = json.loads(call("query", index, query, "-k", 2, "--budget", 240, "--json"))
    raw = model.predict([(query, d) for d in DOCUMENTS], activation_fn=torch.nn.Identity())
    best = np.sort(raw)[::-1][:2]
    np.testing.assert_allclose([row["score"] for row in found["results"]], best, rtol=1e-4)
    few = json.loads(call("query", index, query, "-k", 2, "--budget", 40, "--json"))
    assert few["pairs_scored"] == 40


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, file: Path) -> None:
    index = tmp_path / "index"
    with pytest.raises(UsageError, match="no index"):
        call("query", index, "dog")
    call("build", index, file, "--anchors", 3)
    (tmp_path / "other.txt").write_text("another\nfile\n")
    with pytest.raises(UsageError, match="must begin with the 240 documents"):
        call("build", index, tmp_path / "other.txt")
    with pytest.raises(UsageError, match="cannot change"):
        call("build", index, file, "--scorer", tmp_path)
    with pytest.raises(UsageError, match="--budget"):
        call("query", index, "dog", "-k", 20, "--budget", 10)
    with pytest.raises(UsageError, match="look for"):
        call("query", index, "  ")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("")
    with pytest.raises(UsageError, match="holds something that is no index"):
        call("build", mine, file)
    with pytest.raises(UsageError, match="--scorer must be the folder"):
        call("build", tmp_path / "new", file, "--scorer", "absent/model")
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError):
        call("build", tmp_path / "new", tmp_path / "absent.txt")
    (index / "index.json").write_text("{}")
    with pytest.raises(UsageError, match="settings of an index"):
        call("query", index, "dog")


def test_it_is_a_command_with_two_subcommands() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "kexue", "search", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "build" in shown
    assert "query" in shown
    listed = subprocess.run(
        [sys.executable, "-m", "kexue", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "Search text by a pair scorer" in listed
