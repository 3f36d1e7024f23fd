"""The wheel and the sdist, each installed into an empty environment, and used there in a folder away from the clone."""

import json
import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

pytestmark = pytest.mark.long


def run(*command, cwd, **environment):
    """Run a command without what this process has in its environment for Python and jax; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX", "XLA"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with the wheel and the sdist of the tracked files, built in an environment of their own."""
    root = tmp_path_factory.mktemp("built")
    (root / "clone").mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (root / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "clone" / name).write_bytes((ROOT / name).read_bytes())
    python = environment_in(root / "environment")
    run(python, "-m", "pip", "install", "--quiet", "setuptools>=68", cwd=root)
    for kind in ("wheel", "sdist"):
        build = f"from setuptools import build_meta; build_meta.build_{kind}({str(root / kind)!r})"
        run(python, "-c", build, cwd=root / "clone")
    return root


def environment_in(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_works_away_from_the_clone(built, kind, tmp_path):
    (package,) = (built / kind).iterdir()
    python = environment_in(tmp_path / "environment")
    run(python, "-m", "pip", "install", "--quiet", package, cwd=tmp_path)
    beitv2, work = python.with_name("beitv2"), tmp_path / "work"
    (work / "photos").mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(work / "photos" / f"{number}.png")

    assert "usage: beitv2 VERB" in run(beitv2, "--help", cwd=work)
    resolved = run(beitv2, "train", "--config=configs/mim.py:tiny", "--workdir=x", "--print_config", cwd=work)
    assert json.loads(resolved)["model"]["width"] == 192
    run(beitv2, "train", "--config=configs/quickstart.py:smoke", "--workdir=smoke", cwd=work)
    assert json.loads((work / "smoke" / "probe" / "summary.json").read_text())["metrics"]
    assert json.loads((work / "smoke" / "teacher" / "config.json").read_text())["stage"] == "finetune"
    run(beitv2, "predict", "smoke/teacher", "photos", "--out=classes.jsonl", "--top=2", cwd=work)
    lines = [json.loads(line) for line in (work / "classes.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"photos/{number}.png" for number in range(3)]
    run(beitv2, "atlas", "smoke/vqkd", "folder:photos", "--split=train", "--out=atlas", cwd=work)
    assert (work / "atlas" / "atlas.html").stat().st_size > 10_000
    run(beitv2, "embed", "smoke/mim", "folder:photos", "--out=features.npz", cwd=work)
    assert np.load(work / "features.npz")["cls"].shape[0] == 3
    run(beitv2, "convert", "smoke/mim", "larger", "--image_size=96", cwd=work)
    assert json.loads((work / "larger" / "config.json").read_text())["views"]["image_size"] == 96
    place = run(python, "-c", "import beitv2_jax; print(beitv2_jax.__file__)", cwd=work)
    assert place.startswith(str(tmp_path / "environment"))
