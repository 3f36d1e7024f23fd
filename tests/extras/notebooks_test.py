"""Needs ipykernel, matplotlib and nbclient (extra "notebooks"): the notebooks run, with outputs like the saved ones.

Their models are trained for a tenth of the steps.
"""

import os

import nbformat
import pytest
from nbclient import NotebookClient
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the current folder of all notebooks: the runs that one trains are there for the other."""
    return tmp_path_factory.mktemp("notebooks")


def kinds(cell):
    """Return what a cell shows: printed text, and pictures."""
    found = [output.get("name") or sorted(output["data"]) for output in cell.get("outputs", [])]
    return [kind if kind == "stdout" else "picture" for kind in found if kind == "stdout" or "image/png" in kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    # not the eight devices of the tests
    monkeypatch.delenv("XLA_FLAGS")
    saved = nbformat.read(path, 4)
    ran = nbformat.read(path, 4)
    shortened = 0
    for cell in (cell for cell in ran.cells if cell.cell_type == "code"):
        shortened += cell.source.count("0 steps")
        cell.source = cell.source.replace("0 steps", " steps")
    assert shortened == 3
    NotebookClient(ran, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    assert [kinds(cell) for cell in ran.cells] == [kinds(cell) for cell in saved.cells]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["tokenizer", "tour"]
