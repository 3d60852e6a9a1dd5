"""kexue._files: written whole or not at all."""

from __future__ import annotations

import os

import pytest

from kexue._files import replacing, write_whole


def test_a_file_is_written_and_written_again(tmp_path) -> None:
    path = tmp_path / "state"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["state"]


def test_a_failure_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "state"
    write_whole(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new" * 1000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("")
    write_whole(ours, "")
    assert ours.stat().st_mode == plain.stat().st_mode
    ours.chmod(0o640)
    write_whole(ours, "again")
    assert ours.stat().st_mode & 0o777 == 0o640


def test_a_missing_folder_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "state", "")


def test_a_writer_that_raises_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "state"
    write_whole(path, "old")

    def halfway() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]
