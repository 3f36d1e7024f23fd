"""The verb evaluate: arithmetic on the numbers of the API, whole folders or none, and mistakes that are named."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from convert_states import drawn_weights
from flax import linen as nn
from paths import ROOT
from PIL import Image

import beitv2_jax
from beitv2_jax import evaluate
from beitv2_jax.convert.writing import write
from beitv2_jax.data.masking import block_mask
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.quantizer import codebook_health
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.rng import host_rng
from beitv2_jax.tasks import mim
from beitv2_jax.training.writer import read_metrics

NAMES = [f"class{number:02d}" for number in range(17)]
PRESENT = ["class03", "class11", "class16"]
NUM_READABLE = 19


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty images in three class folders, one of them damaged; their label maps have the numbers 0 to 17."""
    root = tmp_path_factory.mktemp("data")
    for number in range(20):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (20 + number % 3, 25, 3), np.uint8)
        maps = rng.integers(0, 18, pixels.shape[:2]).astype(np.uint8)
        for path, array in (
            (f"photos/{PRESENT[number % 3]}/{number:02d}.png", pixels),
            (f"maps/images/validation/{number:02d}.png", pixels),
            (f"maps/annotations/validation/{number:02d}.png", maps),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / path)
    (root / "one").mkdir()
    Image.fromarray(pixels).save(root / "one" / "0.png")
    for damaged in (root / "photos/class16/11.png", root / "maps/images/validation/11.png"):
        damaged.write_bytes(damaged.read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of every kind; the one of a classifier names its classes."""
    root = tmp_path_factory.mktemp("runs")
    for kind in ("classifier", "vqkd", "mim", "regressor"):
        write(drawn_weights(kind), str(root / kind), "run")
    write(drawn_weights("segmenter", position="relative", patch_size=8, grid=4), str(root / "segmenter"), "run")
    (root / "classifier" / "inputs.json").write_text(json.dumps({"train": {"classes": NAMES}}))
    # one window an image, which is not enlarged to 512 pixels as published
    config = json.loads((root / "segmenter" / "config.json").read_text())
    evaluation = {"stride": 20, "long_side": 32, "short_side": 32}
    (root / "segmenter" / "config.json").write_text(json.dumps({**config, "evaluation": evaluation}))
    return root


def run(out, *arguments, code=0):
    assert evaluate.main([*map(str, arguments), f"--out={out}", "--max_bad_fraction=0.1"]) == code
    return json.loads((out / "metrics.json").read_text())


def rows_of(path):
    with path.open() as file:
        return list(csv.reader(file))


def test_a_classifier_against_scikit_learn(photos, runs, tmp_path, capsys):
    found = run(tmp_path / "out", runs / "classifier", f"folder:{photos}/photos", "--split=train", "--batch_size=5")
    printed = capsys.readouterr()
    assert f"on {NUM_READABLE} images" in printed.out and "among the 17 of the weights" in printed.out
    assert "1 of 20 images cannot be read" in printed.err and "11.png" in printed.err
    assert (found["examples"], found["unreadable"]) == (NUM_READABLE, 1)
    paths = [path for path in sorted((photos / "photos").rglob("*.png")) if path.stem != "11"]
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    logits = beitv2_jax.load_classifier(runs / "classifier").logits(paths).astype(np.float64)
    for start, kept in (("", np.arange(17)), ("among_", np.array([3, 11, 16]))):
        places, scores = np.searchsorted(kept, labels), logits[:, kept]
        probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        everyone = np.arange(len(kept))
        expected = {
            "top1": sklearn.metrics.accuracy_score(places, probabilities.argmax(axis=1)),
            "nll": sklearn.metrics.log_loss(places, probabilities, labels=everyone),
            "top5": np.mean([np.sum(row > row[place]) < 5 for row, place in zip(scores, places, strict=True)]),
        }
        for name, value in expected.items():
            assert found["metrics"][start + name] == pytest.approx(value, abs=1e-6), start + name
    predicted = logits.argmax(axis=1)
    accuracy = {name: np.mean(predicted[labels == NAMES.index(name)] == NAMES.index(name)) for name in PRESENT}
    assert found["class_accuracy"] == pytest.approx(accuracy)
    assert found["metrics"]["mean_class_accuracy"] == pytest.approx(np.mean(list(accuracy.values())))
    confusion = np.array([row[1:] for row in rows_of(tmp_path / "out" / "confusion.csv")[1:]], int)
    whole = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(17))
    np.testing.assert_array_equal(confusion[:, :3], whole[np.ix_([3, 11, 16], [3, 11, 16])])
    assert confusion.sum() == NUM_READABLE
    mistakes = rows_of(tmp_path / "out" / "mistakes.csv")[1:]
    assert len(mistakes) == (predicted != labels).sum()
    confidence = np.exp(logits).max(axis=1) / np.exp(logits).sum(axis=1)
    worst = max(np.flatnonzero(predicted != labels), key=lambda row: confidence[row])
    assert mistakes[0][1:4] == [str(paths[worst]), paths[worst].parent.name, NAMES[predicted[worst]]]
    assert float(mistakes[0][4]) == pytest.approx(confidence[worst], rel=1e-5)
    assert Image.open(tmp_path / "out" / "mistakes.png").width == 6 * 192
    assert Image.open(tmp_path / "out" / "confusion.png").width > 300
    (record,) = map(json.loads, (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines())
    assert record["where"].startswith(str(photos / "photos/class16/11.png"))


def test_a_tokenizer_against_its_teacher(photos, runs, tmp_path, capsys):
    arguments = (runs / "vqkd", f"folder:{photos}/photos", "--split=train", "--batch_size=3")
    write(drawn_weights("classifier", heads=1, head_width=23), str(tmp_path / "teacher"), "run")
    found = run(tmp_path / "out", *arguments, f"--teacher={tmp_path / 'teacher'}")
    paths = [path for path in sorted((photos / "photos").rglob("*.png")) if path.stem != "11"]
    tokenizer = beitv2_jax.load_tokenizer(runs / "vqkd")
    ids = tokenizer.encode(paths)
    counts = np.bincount(ids.reshape(-1), minlength=19)
    shares = counts[counts > 0] / counts.sum()

    def squared_distances(variables, images):
        projections = tokenizer._model.apply(variables, to_unit_range(images), method=VQKD.project)
        unit = projections / jnp.linalg.norm(projections, axis=-1, keepdims=True)
        codebook = variables["codebook"]["quantizer"]["codebook"]
        return jnp.min(jnp.sum((unit[:, :, None] - codebook) ** 2, axis=-1), axis=-1)

    distances = tokenizer._run(squared_distances, paths)
    features = beitv2_jax.load_backbone(tmp_path / "teacher")(paths, norm=True).patches
    decoded = tokenizer.decode(ids)
    cosine = np.sum(features * decoded, axis=-1) / (
        np.linalg.norm(features, axis=-1) * np.linalg.norm(decoded, axis=-1)
    )
    expected = {
        "reconstruction_loss": 1.0 - cosine.mean(dtype=np.float64),
        "codebook_usage": np.mean(counts > 0),
        "codebook_entropy": -np.sum(shares * np.log(shares)),
        "codebook_perplexity": np.exp(-np.sum(shares * np.log(shares))),
        "codebook_top_share": counts.max() / counts.sum(),
        "codebook_dead": np.sum(counts < counts.sum() / 1900),
        "codebook_tokens": counts.sum(),
        "quantization_distance": np.mean(distances),
    }
    # the label of a patch is the class of its image
    labels = np.repeat([NAMES.index(path.parent.name) for path in paths], 9)
    table = sklearn.metrics.cluster.contingency_matrix(ids.reshape(-1), labels)
    expected |= {
        "nmi_class": sklearn.metrics.normalized_mutual_info_score(labels, ids.reshape(-1)),
        "purity_class": table.max(axis=1).sum() / table.sum(),
        "majority_class": table.sum(axis=0).max() / table.sum(),
    }
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert [int(row[1]) for row in rows_of(tmp_path / "out" / "codes.csv")[1:]] == counts.tolist()
    # without a teacher there is the rest
    capsys.readouterr()
    del expected["reconstruction_loss"]
    assert run(tmp_path / "alone", *arguments)["metrics"] == pytest.approx(expected, rel=1e-4)
    assert "no reconstruction loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("used", "quantizer", "meant"),
    [
        (3, "ema", "with --config.model.codebook_size=8, or with --config=configs/vqkd.py:own_data."),
        (
            3,
            "fsq",
            "with --config.model.fsq_levels=LEVELS with a product of 8, or with --config=configs/vqkd.py:own_data.",
        ),
        (28, "ema", "train a tokenizer with --config=configs/vqkd.py:own_data."),  # twice as many would be the same
        (40, "ema", None),
    ],
)
def test_few_codes_in_use_are_answered_with_what_to_write(used, quantizer, meant):
    health = codebook_health(jnp.full(64, 100.0).at[used:].set(0.0))
    lines = evaluate._collapse({name: float(value) for name, value in health.items()}, 64, quantizer)
    assert [meant in line for line in lines] == [True] * (meant is not None)


def test_codes_against_label_maps(photos, runs, tmp_path):
    """Patches of 3 x 3 pixels, of 9 x 9 in the middle of maps whose shorter side has 10 = int(9 / 0.875)."""
    arguments = (runs / "vqkd", f"folder:{photos}/maps", "--batch_size=8", "--compare_pixels")
    found = run(tmp_path / "out", *arguments)["metrics"]
    paths = [path for path in sorted((photos / "maps/images/validation").iterdir()) if path.stem != "11"]
    labels = []
    for path in paths:
        with Image.open(photos / "maps/annotations/validation" / path.name) as file:
            width, left = {20: (12, 2), 21: (11, 1), 22: (11, 1)}[file.height]
            numbers = np.asarray(file.resize((width, 10), Image.Resampling.NEAREST))[:9, left : left + 9]
        patches = numbers.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
        labels += [max(sorted(set(patch)), key=list(patch).count) for patch in patches.tolist()]
    ids = beitv2_jax.load_tokenizer(runs / "vqkd").encode(paths).reshape(-1)
    table = sklearn.metrics.cluster.contingency_matrix(ids, labels)
    assert found["nmi_mask"] == pytest.approx(sklearn.metrics.normalized_mutual_info_score(labels, ids), abs=1e-6)
    assert found["purity_mask"] == pytest.approx(table.max(axis=1).sum() / table.sum())
    assert "nmi_class" not in found
    # clusters of the pixels of random patches say more than these two codes: there are 19
    assert found["pixels_nmi_mask"] > found["nmi_mask"] and found["pixels_purity_mask"] > found["purity_mask"]


def test_a_masked_model_on_the_codes_of_its_tokenizer(photos, runs, tmp_path):
    found = run(
        tmp_path / "out", runs / "mim", f"folder:{photos}/photos", "--split=train", f"--tokenizer={runs / 'vqkd'}"
    )["metrics"]
    paths = sorted((photos / "photos").rglob("*.png"))
    readable = [number for number, path in enumerate(paths) if path.stem != "11"]
    images = [paths[number] for number in readable]
    codes = beitv2_jax.load_tokenizer(runs / "vqkd").encode(images).reshape(NUM_READABLE, 9)
    # 9 patches, of which 75/196 are hidden
    drawn = dict(num_masked=3, min_patches=3, max_patches=None)
    masks = np.stack([block_mask(host_rng(0, "eval_mask", number), (3, 3), **drawn).reshape(-1) for number in readable])
    weights = drawn_weights("mim")
    pixels = beitv2_jax.api._pixels(images, 9, 0.875) / 255.0
    normalised = np.float32((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    model = mim.MaskedImageModel.from_arguments(weights.arguments, Compute())
    logits = model.apply({"params": weights.variables["params"]}, normalised, masks, method="logits_everywhere")
    for branch, values in (("final", logits.logits), ("aggregation", logits.aggregation_logits)):
        values = np.asarray(values, np.float64)[masks]
        shifted = values - values.max(axis=1, keepdims=True)
        nll = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(values)), codes[masks]]
        assert found[f"{branch}_loss"] == pytest.approx(nll.mean(), rel=1e-4)
        assert found[f"{branch}_accuracy"] == pytest.approx(np.mean(values.argmax(axis=1) == codes[masks]))
    assert found["loss"] == pytest.approx(found["final_loss"] + found["aggregation_loss"])
    assert found["masked_patches"] == 3 * NUM_READABLE
    assert found["majority_accuracy"] == pytest.approx(np.bincount(codes[masks]).max() / len(codes[masks]))


@pytest.mark.long
def test_a_segmenter_against_its_label_maps(photos, runs, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    found = run(
        tmp_path / "out",
        runs / "segmenter",
        f"folder:{photos}/maps",
        f"--classes={tmp_path / 'names.txt'}",
        "--batch_size=2",
    )
    segmenter = beitv2_jax.load_segmenter(runs / "segmenter")
    confusion = np.zeros((17, 17))
    for path in sorted((photos / "maps/images/validation").iterdir()):
        if path.stem != "11":
            # as ADE20K numbers its maps, 0 is no class
            true = np.asarray(Image.open(photos / "maps/annotations/validation" / path.name)).astype(int) - 1
            (predicted,) = segmenter.predict(path)
            confusion += sklearn.metrics.confusion_matrix(true[true >= 0], predicted[true >= 0], labels=range(17))
    hits, there, said = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    iou = hits / (there + said - hits)
    expected = {
        "mean_iou": iou.mean(),
        "mean_accuracy": np.mean(hits / there),
        "pixel_accuracy": hits.sum() / confusion.sum(),
    }
    assert found["metrics"] == pytest.approx(expected) and found["examples"] == NUM_READABLE
    assert found["class_iou"] == pytest.approx(dict(zip(NAMES, iou, strict=True)))
    assert f"class16: IoU {iou[16]:.1%}" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out" / "classes.csv")
    assert rows[0] == ["number", "class", "iou", "accuracy", "pixels", "predicted_pixels"]
    assert [(row[1], int(row[4]), int(row[5])) for row in rows[1:]] == list(zip(NAMES, there, said, strict=True))
    assert Image.open(tmp_path / "out" / "segmentation.png").height > 100


@pytest.mark.long
def test_batches_and_devices_move_no_count(photos, runs, tmp_path):
    arguments = (runs / "classifier", f"folder:{photos}/photos", "--split=train")
    reports = [run(tmp_path / str(size), *arguments, f"--batch_size={size}") for size in (1, 64)]
    for name, value in reports[0]["metrics"].items():
        assert reports[1]["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert reports[0]["class_accuracy"] == reports[1]["class_accuracy"]


def test_published_figures_stand_beside_the_measured_ones(photos, runs, tmp_path, capsys, monkeypatch):
    name = "beitv2_base_patch16_224_pt1k_ft1k"
    shutil.copytree(runs / "classifier", tmp_path / name)
    found = run(tmp_path / "out", tmp_path / name, f"folder:{photos}/photos", "--split=train")
    assert found["published"]["metrics"] == {"top1": 0.855, "top5": 0.975}
    printed = capsys.readouterr().out
    assert "| published |" in printed and "| 85.50%    |" in printed and f"published: {name}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUNS/classifier"], "command line is not valid"),
        (["RUNS/classifier", "folder:DATA/photos", "--out=nowhere/x"], "does not exist"),
        (["RUNS/classifier", "folder:DATA/photos", "--out=DATA"], "exists already"),
        (["RUNS/classifier", "folder:DATA/photos", "--crop_fraction=88"], "out of range"),
        (["RUNS/classifier", "folder:DATA/photos", "--batch_size=0"], "'0' is not a whole number from 1 on"),
        (["RUNS/classifier", "folder:DATA/photos"], "no split 'validation'"),
        (["RUNS/classifier", "folder:DATA/photos/class03", "--split=train"], "has no classes"),
        (["RUNS/classifier", "folder:DATA/photos", "--split=train", "--classes=x.txt"], "no file x.txt"),
        (["RUNS/mim", "folder:DATA/photos", "--split=train"], "does not say which tokenizer"),
        (["RUNS/mim", "folder:DATA/photos", "--split=train", "--tokenizer=RUNS/classifier"], "are no tokenizer"),
        (["RUNS/regressor", "folder:DATA/photos", "--split=train"], "--config=configs/probe.py"),
        (["RUNS/vqkd", "folder:DATA/photos", "--split=train", "--teacher=x"], "no teacher weights at x"),
        (["RUNS/vqkd", "folder:DATA/photos", "--split=train", "--teacher=RUNS/mim"], "features of 10 numbers"),
        (["RUNS/vqkd", "folder:DATA/one", "--split=train", "--compare_pixels"], "leave out --compare_pixels"),
        (["RUNS/segmenter", "folder:DATA/photos"], "no folders images and annotations"),
        (["RUNS/classifier", "folder:DATA/photos", "--split=train"], "--max_bad_fraction=0.05"),
        (["nowhere", "folder:DATA/photos"], "no weights file at nowhere"),
    ],
)
def test_mistakes_end_with_2_and_write_nothing(arguments, message, photos, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("RUNS", str(runs)).replace("DATA", str(photos)) for a in arguments]
    arguments += [] if any(a.startswith("--out") for a in arguments) else ["--out=out"]
    assert evaluate.main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed[printed.index("Error: ") :].splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def test_the_picture_of_confusions_needs_its_library(photos, runs, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    arguments = [str(runs / "classifier"), f"folder:{photos}/photos", "--split=train", "--max_bad_fraction=0.1"]
    assert evaluate.main([*arguments, f"--out={tmp_path / 'out'}"]) == 2
    assert 'pip install "beitv2_jax[evaluate]"' in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert evaluate.main(arguments) == 0


@pytest.mark.long
@pytest.mark.parametrize("stage", ["finetune", "vqkd", "mim", "segment"])
def test_the_numbers_are_those_of_the_last_evaluation_of_the_run(equality_runs, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(nn, "relu", nn.softplus)  # as in the equality runs
    workdir = equality_runs.workdir(stage)
    data = equality_runs.root / ("maps" if stage == "segment" else "classes")
    found = run(tmp_path / "out", workdir, f"folder:{data}")
    logged = {name: value for line in read_metrics(workdir) for name, value in line.items() if name.startswith("eval/")}
    assert found["examples"] == logged.pop("eval/examples")
    ours = {"accuracy": "top1", "loss": "nll"} if stage == "finetune" else {}
    compared = [name for name in logged if "/iou/" not in name]
    assert compared
    for name in compared:
        name = name.removeprefix("eval/")
        assert found["metrics"][ours.get(name, name)] == pytest.approx(logged[f"eval/{name}"], rel=1e-6), name


@pytest.mark.long
def test_several_processes_write_what_one_does(photos, runs, tmp_path):
    arguments = [str(runs / "classifier"), f"folder:{photos}/photos", "--split=train"]
    alone = run(tmp_path / "alone", *arguments)
    command = [sys.executable, str(ROOT / "launch" / "processes.py"), "2", "0", "-m", "beitv2_jax.evaluate", *arguments]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, f"--out={tmp_path / 'both'}", "--max_bad_fraction=0.1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("top-1 accuracy ") == 1
    together = json.loads((tmp_path / "both" / "metrics.json").read_text())
    for name, value in together.pop("metrics").items():
        assert alone["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert {**alone, "metrics": None} == {**together, "metrics": None}
    for name in ("confusion.csv", "classes.csv", "bad_records.jsonl"):
        assert (tmp_path / "both" / name).read_text() == (tmp_path / "alone" / name).read_text()
