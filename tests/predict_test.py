"""The verbs predict and embed: the numbers of the API, files that are whole or absent, and mistakes that are named."""

import csv
import json

import jax
import numpy as np
import pytest
from convert_states import drawn_weights
from PIL import Image

import beitv2_jax
from beitv2_jax import api, embed, predict
from beitv2_jax.convert.writing import write


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images in two class folders, one of them damaged."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(5):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 25, 3), np.uint8)
        Image.fromarray(pixels).save(root / "ab"[number % 2] / f"{number}.png")
    damaged = root / "b" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for kind in ("classifier", "mim"):
        write(drawn_weights(kind), str(root / kind), "run")
    write(drawn_weights("classifier", position="relative"), str(root / "released.pth"), "official")
    write(drawn_weights("segmenter", position="relative", patch_size=8, grid=4), str(root / "segmenter"), "run")
    config = json.loads((root / "segmenter" / "config.json").read_text())
    config["evaluation"] = {"short_side": 40, "long_side": 80, "stride": 20}  # as published it takes many windows
    (root / "segmenter" / "config.json").write_text(json.dumps(config))
    return root


def test_predictions_are_those_of_the_api_in_json_and_csv(photos, runs, tmp_path, capsys):
    classifier = beitv2_jax.load_classifier(runs / "classifier")
    expected = {
        str(path): classifier.predict(path, top=2)[0] for path in sorted(photos.rglob("*.png")) if path.stem != "3"
    }
    for out in ("found.jsonl", "found.csv"):
        assert predict.main([str(runs / "classifier"), str(photos), f"--out={tmp_path / out}", "--top=2"]) == 0
        assert "1 of 5 images cannot be read" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == sorted(map(str, photos.rglob("*.png")))
    assert [line["file"] for line in lines if line["classes"] is None] == [str(photos / "b" / "3.png")]
    rows = list(csv.reader((tmp_path / "found.csv").open()))
    assert rows[0] == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    for line, row in zip(lines, rows[1:], strict=True):
        assert row[0] == line["file"]
        for place, (name, probability) in enumerate(expected.get(line["file"], ())):
            assert line["classes"][place]["name"] == row[1 + 2 * place] == name
            assert line["classes"][place]["probability"] == pytest.approx(probability, rel=1e-4)
            assert float(row[2 + 2 * place]) == pytest.approx(probability, rel=1e-4)


def ended_at(monkeypatch, owner, name, call):
    """Let call number `call` of a method act as Ctrl-C; return the list that grows with each other call."""
    method, calls = getattr(owner, name), []

    def ending(self, *arguments):
        if len(calls) + 1 == call:
            raise KeyboardInterrupt
        calls.append(arguments)
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, ending)
    return calls


def test_predictions_go_on_where_they_were_ended(photos, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PART_ROWS", 2)
    command = [str(runs / "classifier"), str(photos), f"--out={tmp_path / 'found.jsonl'}", "--top=1"]
    with monkeypatch.context() as patch:
        calls = ended_at(patch, api.Classifier, "best", 2)
        assert predict.main(command) == 130 and len(calls) == 1
    assert predict.main([*command[:-1], "--top=2"]) == 0  # which does not use the part that is there
    assert "probability" in (tmp_path / "found.jsonl").read_text()
    (tmp_path / "found.jsonl").unlink()
    calls = ended_at(monkeypatch, api.Classifier, "best", 9)
    assert predict.main(command) == 0 and len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["found.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == sorted(map(str, photos.rglob("*.png")))
    classifier = beitv2_jax.load_classifier(runs / "classifier")
    for line in lines[:4]:
        (expected,) = classifier.predict(line["file"], top=1)
        assert [prediction["name"] for prediction in line["classes"]] == [expected[0].name]


def test_one_image_is_predicted_on_the_terminal_with_released_weights(photos, runs, capsys):
    image = photos / "a" / "0.png"
    assert predict.main([str(runs / "released.pth"), str(image), "--top=1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    logits = beitv2_jax.load_classifier(runs / "released.pth").logits(image)
    assert [prediction["name"] for prediction in json.loads(line)["classes"]] == [str(logits.argmax())]


def test_a_segmenter_writes_a_map_and_an_overlay_of_every_image_and_goes_on_where_it_was_ended(
    photos, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)  # images at once
    command = [str(runs / "segmenter"), str(photos / "a"), f"--out={tmp_path / 'maps'}"]
    with monkeypatch.context() as patch:
        ended_at(patch, api.Segmenter, "predict", 2)
        assert predict.main(command) == 130
    (left,) = tmp_path.iterdir()
    assert sorted(path.name for path in left.glob("*[024].png")) == ["000000_0.png", "000001_2.png"]
    calls = ended_at(monkeypatch, api.Segmenter, "predict", 9)
    assert predict.main(command) == 0 and len(calls) == 1 and not left.exists()
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == sorted(f"{k:06d}_{n}{end}.png" for k, n in enumerate("024") for end in ("", ".overlay"))
    (expected,) = beitv2_jax.load_segmenter(runs / "segmenter").predict(photos / "a" / "2.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "maps" / "000001_2.png")), expected)
    assert Image.open(tmp_path / "maps" / "000001_2.overlay.png").size == (25, 22)


def test_embedded_features_are_those_of_the_api(photos, runs, tmp_path, capsys):
    out = tmp_path / "features.npz"
    arguments = [str(runs / "mim"), f"folder:{photos}", f"--out={out}", "--tokens=cls,mean,patches", "--layers=1"]
    assert embed.main(arguments) == 0
    assert "1 of 5 images cannot be read" in capsys.readouterr().err
    found = np.load(out)
    assert found["labels"].tolist() == [0, 0, 0, 1, 1] and found["example_ids"].tolist() == [0, 1, 2, 3, 4]
    assert found["class_names"].tolist() == ["a", "b"]
    assert found["readable"].tolist() == [True, True, True, True, False]
    backbone = beitv2_jax.load_backbone(runs / "mim")
    tokens = backbone(list(map(str, found["files"][:4])), layers=(1,)).hidden[1]
    np.testing.assert_allclose(found["cls"][:4], tokens[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["patches"][:4], tokens[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["mean"], found["patches"].mean(axis=1), rtol=1e-4, atol=1e-5)


def test_labels_of_a_split_are_numbered_by_the_training_split(photos, runs, tmp_path):
    for split, names in (("Train", "ab"), ("Valid", "b")):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "0.png").write_bytes((photos / "a" / "0.png").read_bytes())
    out = tmp_path / "features.npz"
    arguments = [
        str(runs / "mim"),
        f"folder:{tmp_path / 'data'}",
        f"--out={out}",
        "--split=Valid",
        "--train_split=Train",
    ]
    assert embed.main(arguments) == 0
    assert np.load(out)["labels"].tolist() == [1] and np.load(out)["class_names"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (predict, ["RUNS/classifier"], "command line is not valid"),
        (predict, ["RUNS/classifier", "nowhere"], "no file or folder nowhere"),
        (predict, ["RUNS/classifier", "PHOTOS", "--out=nowhere/x.csv"], "does not exist"),
        (predict, ["RUNS/classifier", "PHOTOS", "--out=PHOTOS"], "exists already"),
        (predict, ["RUNS/mim", "PHOTOS"], "predict no classes"),
        (predict, ["RUNS/segmenter", "PHOTOS"], "--out is missing"),
        (embed, ["RUNS/mim", "folder:PHOTOS", "--out=x.npz", "--tokens=all"], "no tokens 'all'"),
        (embed, ["RUNS/mim", "folder:PHOTOS", "--out=x.csv"], "neither an .npz nor"),
        (embed, ["RUNS/mim", "folder:PHOTOS", "--out=x.npz", "--split=nope"], "no split 'nope'"),
        (embed, ["RUNS/mim", "folder:PHOTOS/a", "--out=x.npz", "--layers=9"], "no layer 9"),
    ],
)
def test_mistakes_end_with_2_and_write_nothing(
    program, arguments, message, photos, runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert program.main([a.replace("RUNS", str(runs)).replace("PHOTOS", str(photos)) for a in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ") and message in printed and len(printed.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []
