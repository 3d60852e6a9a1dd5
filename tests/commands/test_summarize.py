"""`kexue summarize`: sentences near to the aspect, and no repetitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kexue.commands.summarize import summarize
from kexue.lab.errors import DataError, UsageError
from sentence_models import tiny_sentence_transformer

BATTERY = [
    "The battery lasts two days.",
    "Battery life is long and charging the battery is quick.",
    "I charge the battery twice a week.",
    "After a year the battery still lasts a whole day.",
    "Charging takes an hour and the battery stays cool.",
]
CAMERA = [
    "The camera takes sharp photos.",
    "Photos at night are noisy, the camera struggles.",
    "The camera app is slow but photos look good.",
    "Zoomed photos of the camera lack detail.",
    "I love the photos that this camera takes.",
]


@pytest.fixture
def review(tmp_path: Path) -> Path:
    path = tmp_path / "review.txt"
    mixed = [s for pair in zip(BATTERY, CAMERA, strict=True) for s in pair]
    path.write_text(" ".join([*mixed, BATTERY[0]]))
    return path


def call(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(summarize)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.stdout


@pytest.mark.parametrize(("about", "among"), [("battery charging", BATTERY), ("photos", CAMERA)])
def test_the_aspect_decides(review: Path, about: str, among: list[str]) -> None:
    rows = json.loads(call(review, "--about", about, "-n", 3, "--neighbors", 3, "--json"))
    assert len(rows) == 3
    assert all(row["sentence"] in among for row in rows)
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_a_repeated_sentence_is_chosen_once(review: Path) -> None:
    rows = json.loads(call(review, "-n", 20, "--apart", 0, "--json"))
    chosen = [row["sentence"] for row in rows]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= {*BATTERY, *CAMERA}


def test_chosen_sentences_are_apart(review: Path) -> None:
    near = json.loads(call(review, "-n", 10, "--apart", 0, "--json"))
    apart = json.loads(call(review, "-n", 10, "--apart", 1.4, "--json"))
    assert len(apart) < len(near)


@pytest.mark.slow
def test_a_sentence_transformer_takes_the_place_of_words(review: Path, tmp_path: Path) -> None:
    words = sorted({w.strip(".,") for s in (*BATTERY, *CAMERA) for w in s.split()})
    tiny_sentence_transformer(tmp_path / "encoder", words)
    options = ("--about", BATTERY[1], "-n", 3, "--apart", 0, "--json")
    rows = json.loads(call(review, "--encoder", tmp_path / "encoder" / "model", *options))
    # The sentence itself is at no distance.
    assert rows[0]["sentence"] == BATTERY[1]
    assert len(rows) == 3


def test_text_output_is_a_line_a_sentence(review: Path) -> None:
    lines = call(review, "-n", 2).splitlines()
    assert len(lines) == 2
    assert float(lines[0].split()[0]) >= float(lines[1].split()[0])


def test_what_cannot_be_is_refused_in_one_sentence(review: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="share a word"):
        call(review, "--about", "zyx")
    with pytest.raises(UsageError, match="at least 1"):
        call(review, "-n", 0)
    with pytest.raises(UsageError, match="--apart"):
        call(review, "--apart", 4)
    with pytest.raises(UsageError, match="--encoder must be the folder"):
        call(review, "--encoder", "absent/model")
    (tmp_path / "short.txt").write_text("One sentence only.")
    with pytest.raises(DataError, match="three sentences"):
        call(tmp_path / "short.txt")
    with pytest.raises(DataError):
        call(tmp_path / "absent.txt")
