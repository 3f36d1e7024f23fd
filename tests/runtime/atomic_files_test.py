"""Files that are written again and again: whole at every moment, whoever dies."""

import json
import math

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
