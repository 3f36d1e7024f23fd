"""The verb embed: the numbers of the API in every format, parts that outlive a kill, and processes that share them."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from convert_states import drawn_weights
from paths import ROOT
from PIL import Image
from pyarrow import parquet

import beitv2_jax
from beitv2_jax import embed
from beitv2_jax.convert.writing import write

NUM_IMAGES = 7
NAMES = ("cls_1", "cls_2", "mean_1", "mean_2", "patches_1", "patches_2")
OPTIONS = ("--tokens=cls,mean,patches", "--layers=1,2", "--batch_size=3")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images of different sizes in one folder, without classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 25, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write(drawn_weights("mim", seed=seed), str(root / f"mim{seed}"), "run")
    return root


@pytest.fixture(scope="module")
def expected(photos, runs):
    """What the API says of the images, by run."""
    found = {}
    for run in ("mim0", "mim1"):
        hidden = beitv2_jax.load_backbone(runs / run)(sorted(photos.iterdir()), layers=(1, 2)).hidden
        patches = {layer: hidden[layer][:, 1:] for layer in (1, 2)}
        found[run] = {f"cls_{layer}": hidden[layer][:, 0] for layer in (1, 2)}
        found[run] |= {f"mean_{layer}": patches[layer].mean(axis=1) for layer in (1, 2)}
        found[run] |= {f"patches_{layer}": patches[layer] for layer in (1, 2)}
    return found


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(embed, "PART_ROWS", 2)


def read(out):
    """Return all arrays that were written, by name, and the text on what they were made from."""
    if out.suffix == ".npz":
        with np.load(out) as file:
            arrays = dict(file)
        return arrays, json.loads(str(arrays["made_from"]))
    if out.suffix == ".parquet":
        table = parquet.read_table(out)
        arrays = {
            name: column.combine_chunks().to_numpy_ndarray() if name in NAMES else np.array(column.to_pylist())
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        about = {
            name.decode(): json.loads(value) for name, value in table.schema.metadata.items() if b"ARROW" not in name
        }
    else:
        source = ArrayRecordDataSource(sorted(map(str, out.glob("*.array_record"))))
        records = [np.load(io.BytesIO(record)) for record in map(source.__getitem__, range(len(source)))]
        arrays = {name: np.stack([record[name] for record in records]) for name in records[0].files}
        about = json.loads((out / "about.json").read_text())
    return arrays | {"class_names": np.array(about["class_names"])}, about["made_from"]


def check(out, photos, features):
    arrays, made_from = read(out)
    for name, feature in features.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_allclose(arrays[name], feature, rtol=1e-4, atol=1e-5)
    assert arrays["files"].tolist() == sorted(map(str, photos.iterdir()))
    assert arrays["labels"].tolist() == [-1] * NUM_IMAGES and arrays["readable"].tolist() == [True] * NUM_IMAGES
    assert arrays["example_ids"].tolist() == list(range(NUM_IMAGES)) and arrays["class_names"].tolist() == []
    assert made_from["layers"] == [1, 2] and made_from["data"]["examples"] == NUM_IMAGES


@pytest.mark.parametrize("name", ["features.npz", "features.parquet", "features"])
def test_every_format_holds_the_features_of_an_unlabelled_folder(name, photos, runs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "SHARD_BYTES", 1)  # one part in each ArrayRecord file
    assert embed.main([str(runs / "mim0"), f"folder:{photos}", f"--out={tmp_path / name}", *OPTIONS]) == 0
    check(tmp_path / name, photos, expected["mim0"])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "features":
        assert len(list((tmp_path / name).glob("*-of-00004.array_record"))) == 4


def test_a_command_goes_on_where_it_was_ended_and_never_with_parts_of_others(
    photos, runs, expected, tmp_path, monkeypatch, capsys
):
    save, saved = embed._save, []

    def end_at_third(source, path, part):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(source, path, part)

    command = [str(runs / "mim0"), f"folder:{photos}", f"--out={tmp_path / 'features.npz'}", *OPTIONS]
    monkeypatch.setattr(embed, "_save", end_at_third)
    assert embed.main(command) == 130
    assert [path.name for path in saved] == ["000000.npz", "000001.npz"]
    (left,) = tmp_path.iterdir()
    assert sorted(left.iterdir()) == saved

    others = [str(runs / "mim1"), *command[1:]]
    saved.clear()
    monkeypatch.setattr(embed, "_save", lambda source, path, part: (saved.append(path), save(source, path, part)))
    assert embed.main(others) == 0
    assert len(saved) == 4
    check(tmp_path / "features.npz", photos, expected["mim1"])

    (tmp_path / "features.npz").unlink()
    saved.clear()
    assert embed.main(command) == 0
    assert [path.name for path in saved] == ["000002.npz", "000003.npz"]
    check(tmp_path / "features.npz", photos, expected["mim0"])
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]
    capsys.readouterr()
    assert embed.main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_pyarrow_the_extra_is_named(photos, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    assert embed.main([str(runs / "mim0"), f"folder:{photos}", f"--out={tmp_path / 'x.parquet'}"]) == 2
    assert 'pip install "beitv2_jax[parquet]"' in capsys.readouterr().err


@pytest.mark.long
def test_processes_that_are_killed_again_and_again_finish_one_result(photos, runs, expected, tmp_path):
    program = (
        "import sys, time; from beitv2_jax import embed; embed.PART_ROWS = 1; save = embed._save\n"
        "embed._save = lambda *part: (time.sleep(0.5), save(*part))\n"
        "sys.exit(embed.main(sys.argv[1:]))"
    )
    out = tmp_path / "features.npz"
    command = [str(runs / "mim0"), f"folder:{photos}", f"--out={out}", *OPTIONS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    draw, kills, seen = random.Random(0), 0, set()
    while not out.exists() and kills < 30:
        launcher = [sys.executable, str(ROOT / "launch/processes.py"), "2", "0", "-c", program, *command]
        process = subprocess.Popen(launcher, env=environment, start_new_session=True, stderr=subprocess.PIPE)
        end = time.monotonic() + draw.uniform(4, 10)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        else:
            assert process.returncode == 0, process.stderr.read().decode()
        process.wait()
        seen.add(len(list(tmp_path.glob("*.parts/*.npz"))))
    assert len(seen) > 1  # parts were kept
    check(out, photos, expected["mim0"])
    shutil.rmtree(next(tmp_path.glob("*.parts"), tmp_path / "nothing"), ignore_errors=True)
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]
