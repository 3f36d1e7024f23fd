"""Images of many archives through Beam: everything read is written or listed, and who worked on it leaves no trace."""

import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beitv2_jax.data.prepare import beam as prepare_beam
from beitv2_jax.data.prepare import beam_images
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError

TWO_PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


def _jpeg(seed):
    levels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).resize((29, 23)).save(buffer, "JPEG")
    return buffer.getvalue()


def _files():
    """Return {class: {file name: content}}: 3 classes, 19 files, of them 4 unreadable and 3 copies."""
    files = {name: {f"{i}.jpg": _jpeg(100 * k + i) for i in range(4)} for k, name in enumerate(("crow", "owl", "wren"))}
    files["owl"]["copy.jpg"] = files["owl"]["2.jpg"]
    files["wren"]["0copy.jpg"] = files["crow"]["3.jpg"]
    files["crow"]["99.jpg"] = files["owl"]["2.jpg"]
    files["crow"]["empty.jpg"] = b""
    files["owl"]["notes.txt"] = b"words"
    files["owl"]["cut.jpg"] = files["owl"]["1.jpg"][:-60]
    files["wren"]["page.html"] = b"<html></html>"
    return files


LEFT_OUT = {
    "crow/empty.jpg": None,
    "owl/notes.txt": None,
    "owl/cut.jpg": None,
    "wren/page.html": None,
    "wren/0copy.jpg": "crow/3.jpg",
    # of three with one content, the first by name stays
    "owl/2.jpg": "crow/99.jpg",
    "owl/copy.jpg": "crow/99.jpg",
}


def _pack(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in reversed(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tars")
    for name, files in _files().items():
        _pack(directory / f"{name}.tar", list(files.items()))
    return directory


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    return beam_images.prepare(f"{tars}/*.tar", "birds", str(tmp_path_factory.mktemp("tfds")), "train", 3)


def _records(directory):
    builder = tfds.builder_from_directory(str(directory))
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    names = builder.info.features["label"].names
    return {r["file_name"].decode(): (names[r["label"]], r["image"]) for r in source}


def _report(directory):
    entries = [json.loads(line) for line in (directory / beam_images.REPORT).read_text().splitlines()]
    assert [e["file"] for e in sorted(entries, key=lambda e: e["file"])] == sorted(e["file"] for e in entries)
    return {entry["file"]: entry for entry in entries}


def test_everything_is_written_or_listed(prepared):
    directory, summary = prepared
    assert summary == {"files": 19, "written": 12, "unreadable": 4, "duplicates": 3}
    wanted = {f"{name}/{file}": (name, content) for name, files in _files().items() for file, content in files.items()}
    records, report = _records(directory), _report(directory)
    assert set(report) == set(LEFT_OUT) and records == {key: wanted[key] for key in set(wanted) - set(LEFT_OUT)}
    for file, entry in report.items():
        assert entry["problem"] == ("duplicate" if LEFT_OUT[file] else "unreadable")
        assert entry.get("of") == LEFT_OUT[file] and bool(entry.get("cause")) == (not LEFT_OUT[file])
    assert "tensorflow" not in sys.modules


def test_order_and_features_are_those_of_tfds(prepared):
    directory, _ = prepared
    source = open_source("tfds:birds", "train", str(directory.parents[1]))
    assert (source.name, source.class_names) == ("tfds:birds/1.0.0", ("crow", "owl", "wren"))
    order = list(_records(directory))
    assert order == sorted(order, key=lambda key: hashlib.md5(f"train{key}".encode()).hexdigest())
    assert len(list(directory.glob("birds-train.array_record-*"))) > 1
    assert source[5]["image"] == _records(directory)[order[5]][1]


@pytest.mark.parametrize("kind", ["two processes", "class folders"])
def test_the_bytes_do_not_depend_on_who_reads_what(kind, tars, prepared, tmp_path):
    source, arguments = str(tars), TWO_PROCESSES
    if kind == "class folders":
        source, arguments = str(tmp_path / "in"), ()
        for name, files in _files().items():
            (tmp_path / "in" / name).mkdir(parents=True)
            for file, content in files.items():
                (tmp_path / "in" / name / file).write_bytes(content)
    directory, summary = beam_images.prepare(source, "birds", str(tmp_path / "out"), "train", 3, arguments)
    assert summary == prepared[1]
    paths = sorted(path.name for path in directory.iterdir())
    assert paths == sorted(path.name for path in prepared[0].iterdir())
    for name in paths:
        assert (directory / name).read_bytes() == (prepared[0] / name).read_bytes(), name


def test_class_folders_are_read_to_their_depth_and_system_folders_are_none(tmp_path):
    for path in ("owl/1.jpg", "owl/in/deep/2.txt", "owl/@eaDir/3.jpg", "@eaDir/4.jpg", "wren/.5.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    classes = beam_images.find_classes(str(tmp_path))
    assert list(classes) == ["owl", "wren"]
    files = [entry for named in classes.items() for entry in beam_images._read(named)]
    assert files == [("owl", "1.jpg", b"owl/1.jpg"), ("owl", "in/deep/2.txt", b"owl/in/deep/2.txt")]


def test_a_tar_that_breaks_off_and_a_name_that_comes_twice(tmp_path):
    same = [("x.jpg", _jpeg(1)), ("x.jpg", _jpeg(2)), ("./.hidden", b""), ("sub/y.jpg", _jpeg(3))]
    _pack(tmp_path / "twice.tar", same)
    _pack(tmp_path / "whole.tar", same[:1])
    content = (tmp_path / "twice.tar").read_bytes().rstrip(b"\0")
    end = 512 + -(-len(_jpeg(1)) // 512) * 512
    (tmp_path / "between.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:end])
    (tmp_path / "inside.tar").write_bytes(content[:-700])
    (tmp_path / "text.tar").write_bytes(b"no tar")
    (tmp_path / "whole.tar").unlink()
    directory, summary = beam_images.prepare(str(tmp_path), "birds", str(tmp_path / "out"))
    report = _report(directory)
    assert {"between/between.tar", "inside/inside.tar", "text/text.tar"} <= set(report)
    assert all("breaks off" in report[f"{name}/{name}.tar"]["cause"] for name in ("between", "inside", "text"))
    assert {"twice/x.jpg", "twice/x.jpg#2", "twice/sub/y.jpg"} <= set(report) | set(_records(directory))
    assert summary["files"] == summary["written"] + len(report)


def test_lost_files_stop_it_and_leave_nothing(tars, tmp_path, monkeypatch):
    class Losing(beam_images._KeepFirst):
        def process(self, group):
            yield from list(super().process(group))[:1]

    monkeypatch.setattr(beam_images, "_KeepFirst", Losing)
    with pytest.raises(Exception, match="files were lost"):
        beam_images.prepare(str(tars), "birds", str(tmp_path))
    assert not list(tmp_path.glob("birds/*"))


def test_the_command_and_its_mistakes(tars, tmp_path, capsys):
    arguments = ["--input", str(tars), "--name=birds", f"--data_dir={tmp_path}", "--direct_num_workers=1"]
    assert prepare_beam.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "19 files: 12 written, 4 unreadable, 3 duplicates" in printed
    assert f"--config.data.source=tfds:birds --config.data.data_dir={tmp_path}" in printed
    assert prepare_beam.main(["--input", str(tmp_path / "nothing"), "--name=birds", "--data_dir", str(tmp_path)]) == 2
    assert "neither tars nor class folders" in capsys.readouterr().err
    for place in ("a", "b"):
        (tmp_path / "both" / place).mkdir(parents=True)
        (tmp_path / "both" / place / "owl.tar").write_bytes((tars / "owl.tar").read_bytes())
    with pytest.raises(UserError, match="class owl is there twice"):
        beam_images.find_classes(f"{tmp_path}/both/*/owl.tar")
