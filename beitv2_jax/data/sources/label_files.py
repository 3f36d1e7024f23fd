"""`labels.csv` and `labels.jsonl`: files beside the images of a folder that name any number of classes for each."""

import csv
import hashlib
import io
import json
import pathlib
import posixpath
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from beitv2_jax.errors import UserError

CSV, JSON_LINES = "labels.csv", "labels.jsonl"
_CELLS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_INSTEAD = {
    CSV: "Write the first line as file_name,CLASS,CLASS,... and for each image a line with its path below the folder "
    "of the file and 1 or 0 for each class, or move the file away where folders name the classes.",
    JSON_LINES: 'Write a line {"file_name": "PATH", "labels": ["CLASS", "CLASS"]} for each image, with its path below '
    "the folder of the file and the names of its classes, or [] for none, or move the file away where folders name the "
    "classes.",
}

Row = tuple[int, str, list[str]]
"""Number of a line, the file that it names, and the classes of that file."""


class LabelFile(NamedTuple):
    """What a label file says.

    Attributes:
        path: where it is.
        class_names: the columns of a table in their order, or all names in JSON lines, sorted.
        classes: names of the classes of each image, by its path below the folder of the file.
        digest: of its content.
    """

    path: pathlib.Path
    class_names: tuple[str, ...]
    classes: dict[str, list[str]]
    digest: str


def read_label_file(directory: pathlib.Path) -> LabelFile | None:
    """Return what the label file in `directory` says; None if there is none.

    Raises:
      UserError: there are two, or a line of it is written otherwise.
    """
    paths = [directory / name for name in (CSV, JSON_LINES) if (directory / name).is_file()]
    if not paths:
        return None
    if len(paths) > 1:
        raise UserError(
            f"{directory} has both {CSV} and {JSON_LINES}.",
            "Did you write the labels anew in the other form?",
            "Move one of the two files away.",
        )
    (path,) = paths
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refusal(path, 1 + content.count(b"\n", 0, error.start), "it is no text in UTF-8") from error
    names, rows = _table(path, text) if path.name == CSV else ((), _json_lines(path, text))
    classes: dict[str, list[str]] = {}
    for line, file, of_file in rows:
        if (name := comparable(file)) in classes:
            raise _refusal(path, line, f"the image {file} has a line already")
        classes[name] = of_file
    found = sorted({name for of_file in classes.values() for name in of_file})
    return LabelFile(path, tuple(names or found), classes, hashlib.blake2b(content, digest_size=6).hexdigest())


def comparable(file: str) -> str:
    """Return the path of a file as it is compared: without './', accents as one letter each."""
    return unicodedata.normalize("NFC", posixpath.normpath(file))


def _table(path: pathlib.Path, text: str) -> tuple[list[str], Iterator[Row]]:
    """Return the classes and the rows of a table with a column for each class."""
    table = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    first, *names = next(table, [""])
    names = [unicodedata.normalize("NFC", name.strip()) for name in names]
    if first.strip() != "file_name" or not names or len({*names, ""}) <= len(names):
        raise _refusal(path, 1, "it is not file_name and the names of the classes, each once")

    def rows() -> Iterator[Row]:
        for file, *cells in filter(None, table):
            if len(cells) != len(names):
                raise _refusal(path, table.line_num, f"it has {len(cells)} values for {len(names)} classes")
            unknown = [cell for cell in cells if cell.strip().lower() not in _CELLS]
            if unknown:
                raise _refusal(path, table.line_num, f"the value {unknown[0]!r} is neither 0 nor 1")
            chosen = zip(names, cells, strict=True)
            yield table.line_num, file, [name for name, cell in chosen if _CELLS[cell.strip().lower()]]

    return names, rows()


def _json_lines(path: pathlib.Path, text: str) -> Iterator[Row]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            entry = json.loads(row)
            file, names = entry["file_name"], entry["labels"]
        except (ValueError, TypeError, KeyError) as error:
            raise _refusal(path, line, "it is no JSON object with file_name and labels") from error
        if not isinstance(file, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _refusal(path, line, "file_name is not a text, or labels not a list of texts")
        yield line, file, sorted({unicodedata.normalize("NFC", name) for name in names})


def _refusal(path: pathlib.Path, line: int, problem: str) -> UserError:
    return UserError(
        f"Line {line} of {path} cannot be used: {problem}.",
        "Did another program write the file in a form of its own?",
        _INSTEAD[path.name],
    )
