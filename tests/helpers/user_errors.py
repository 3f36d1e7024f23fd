"""Every error of a user needs a case that provokes it and follows its advice: which there are, and which were met."""

import ast
import contextlib
import re
import sys
import traceback

import pytest
from paths import ROOT

from beitv2_jax.errors import UserError

PACKAGE = ROOT / "beitv2_jax"
SEEN: set[tuple[str, int]] = set()
"""File and line of every frame beneath which an error of a user was made."""


def note_errors(monkeypatch) -> None:
    """Let `SEEN` grow with every error that is made."""
    made = UserError.__init__

    def noted(error, *args):
        SEEN.update((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe(1)))
        made(error, *args)

    monkeypatch.setattr(UserError, "__init__", noted)


@contextlib.contextmanager
def provoked(advice: str = ""):
    """Expect an error of three whole sentences, whose advice holds the text `advice`."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert all(text.endswith((".", "?")) for text in caught.value.args), caught.value
    assert advice in caught.value.instead, caught.value.instead


def sites(*parts: str) -> list[tuple[str, str, range]]:
    """Return where parts of the package raise errors of users: place and text, file, lines."""
    found = []
    for part in parts:
        files = (PACKAGE / part).rglob("*.py") if (PACKAGE / part).is_dir() else [PACKAGE / part]
        for path in sorted(files):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)):
                called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                if called in ("UserError", "refuse"):
                    text = " ".join(ast.get_source_segment(source, node).split())[:100]
                    place = f"{path.relative_to(PACKAGE)}: {text}"
                    found.append((place, str(path), range(node.lineno, node.end_lineno + 1)))
    return found


def check_all_provoked(request, *parts: str, except_for: tuple[str, ...] = ()) -> None:
    """Fail if an error in these parts of the package was not met; the calling test stands last in its file.

    `except_for` are beginnings of entries of `sites` for which there can be no case.
    """
    options = request.config.option
    chosen = options.keyword or any("::" in argument for argument in request.config.args)
    if chosen or getattr(options, "lf", False):
        pytest.skip("only some of the cases were chosen")
    known = sites(*parts)
    unused = [start for start in except_for if not any(place.startswith(start) for place, *_ in known)]
    assert not unused, f"there is no such error: {unused}"
    missed = [
        place
        for place, file, lines in known
        if not any(seen == file and line in lines for seen, line in SEEN) and not place.startswith(except_for)
    ]
    assert not missed, "\n".join(missed)


def flag(advice: str, key: str) -> str:
    """Return the value that an advice gives for --config.KEY or --KEY, without its quotes."""
    found = re.search(rf"--(?:config\.)?{re.escape(key)}=('[^']*'|[^\s,;]*[^\s,;.])", advice)
    assert found, f"{advice!r} does not name {key}"
    return found[1].strip("'")
