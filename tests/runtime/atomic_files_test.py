"""Files that are written again and again: whole at every moment, whoever dies."""

import json
import math
import os

import pytest

from beitv2_jax.runtime import atomic_files


class Killed(BaseException):
    """Stands for a kill at one exact place."""


def test_a_page_is_never_empty_while_it_is_written_over(tmp_path, monkeypatch):
    path = tmp_path / "page"
    atomic_files.write_over(path, "the old text")
    assert path.read_text() == "the old text"

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(atomic_files.os, "write", killed)
        atomic_files.write_over(path, "a new text that is longer")
    assert path.read_text() == "the old text"
    for text in ("a new text that is longer", "short", ""):
        atomic_files.write_over(path, text)
        assert path.read_text().rstrip() == text


def test_a_page_is_written_in_one_piece(tmp_path, monkeypatch):
    write, written = atomic_files.os.write, []
    monkeypatch.setattr(atomic_files.os, "write", lambda *given: written.append(given) or write(*given))
    atomic_files.write_over(tmp_path / "page", "a longer text")
    atomic_files.write_over(tmp_path / "page", "short")
    assert [text for _, text in written] == [b"a longer text", b"short        "]


def test_json_has_no_number_that_is_not_finite(tmp_path):
    value = {"accuracy": math.nan, "losses": [1.5, math.inf, -math.inf], "steps": 3, "of": {"loss": (math.nan, 0.25)}}
    atomic_files.write_json(tmp_path / "summary.json", value)

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert found == {"accuracy": None, "losses": [1.5, None, None], "steps": 3, "of": {"loss": [None, 0.25]}}


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, happened = tmp_path / "summary.json", []
    monkeypatch.setattr(
        atomic_files.os, "fsync", lambda descriptor: happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    replace = os.replace
    monkeypatch.setattr(atomic_files.os, "replace", lambda old, new: happened.append("renamed") or replace(old, new))
    atomic_files.write_text(path, "text")
    assert happened[1:] == ["renamed", str(tmp_path)]
    assert happened[0].startswith(f"{path}.") and path.read_text() == "text"


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_files.write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"] and path.read_text() == "old"
