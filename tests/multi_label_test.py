"""What is done with a trained classifier of several classes an image: predict, evaluate, embed, convert."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import sklearn.metrics
from convert_states import drawn_weights
from PIL import Image

import beitv2_jax
from beitv2_jax import api, embed, evaluate, predict
from beitv2_jax.convert.class_names import is_multi_label
from beitv2_jax.convert.functions import _manifest
from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.data.sources import open_source
from beitv2_jax.report.examples import draw_examples
from beitv2_jax.runners.provenance import describe_data

NAMES = tuple(f"class{number:02d}" for number in range(17))
USED = [3, 11, 16, 5]
"""Classes of the weights that the data have, by class of the data; no image has the last one."""


@pytest.fixture(scope="module")
def weights():
    weights = drawn_weights("classifier", position="relative")
    kernel = weights.variables["params"]["head"]
    kernel["bias"] = kernel["bias"] - np.float32(1)
    return dataclasses.replace(weights, class_names=NAMES, multi_label=True)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "multi_label"
    write(weights, str(path), "run")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine images, the seventh of which is damaged, and their labels."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(2)
    labels = rng.integers(0, 2, (9, 4)) * np.array([1, 1, 1, 0])
    rows = [("file_name", *(NAMES[number] for number in USED))]
    for number, row in enumerate(labels):
        pixels = rng.integers(0, 256, (20 + number, 25, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        rows.append((f"{number}.png", *row))
    (root / "6.png").write_bytes((root / "6.png").read_bytes()[:60])
    (root / "labels.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return root, labels


@pytest.fixture(scope="module")
def probabilities(run, photos):
    """Probabilities of the images that can be read, by arithmetic on the logits."""
    root, _ = photos
    paths = [root / f"{number}.png" for number in range(9) if number != 6]
    logits = beitv2_jax.load_classifier(run).logits(paths).astype(np.float64)
    return 1 / (1 + np.exp(-logits))


def test_predictions_are_all_classes_that_are_probable_enough(run, photos, probabilities, tmp_path, capsys):
    root, _ = photos
    classifier = beitv2_jax.load_classifier(run)
    path = root / "0.png"
    np.testing.assert_allclose(classifier.probabilities(path), probabilities[:1], rtol=1e-6)
    order = np.argsort(-probabilities[0])
    for arguments, count in (
        ({}, (probabilities[0] >= 0.5).sum()),
        ({"threshold": 0.2}, (probabilities[0] >= 0.2).sum()),
        ({"top": 2}, 2),
        ({"top": 17, "threshold": 0}, 17),
    ):
        (found,) = classifier.predict(path, **arguments)
        assert [prediction.name for prediction in found] == [NAMES[k] for k in order[:count]]
        np.testing.assert_allclose([prediction.probability for prediction in found], probabilities[0][order[:count]])
    out = tmp_path / "found.csv"
    assert predict.main([str(run), str(root), f"--out={out}", "--threshold=0.4"]) == 0
    assert "1 of 9 images cannot be read" in capsys.readouterr().err
    with out.open() as file:
        header, *rows = csv.reader(file)
    most = (probabilities >= 0.4).sum(axis=1).max()
    assert len(header) == 1 + 2 * most and header[-1] == f"probability_{most}"
    assert [len(row) for row in rows] == [1 + 2 * (row >= 0.4).sum() for row in np.insert(probabilities, 6, 0, axis=0)]
    assert predict.main([str(run), str(root), "--threshold=1.5"]) == 2
    assert "'1.5' is not a number from 0 to 1" in capsys.readouterr().err


def test_a_threshold_of_a_classifier_of_one_class(weights):
    classifier = api.Classifier(dataclasses.replace(weights, multi_label=False), "", "float32")
    logits = np.random.default_rng(0).normal(size=(1, 17))
    expected = np.exp(logits) / np.exp(logits).sum()
    assert len(classifier.best(logits)[0]) == 5
    (found,) = classifier.best(logits, top=17, threshold=0.05)
    np.testing.assert_allclose([p.probability for p in found], -np.sort(-expected[expected >= 0.05]), rtol=1e-6)


@pytest.mark.parametrize("is_stated", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_evaluation_against_scikit_learn(is_stated, weights, run, photos, probabilities, tmp_path, capsys):
    root, labels = photos
    if not is_stated:  # as in the released layout
        write(weights, str(tmp_path / "x.pth"), "official")
        (tmp_path / "names.txt").write_text("\n".join(NAMES))
        run, more = tmp_path / "x.pth", [f"--classes={tmp_path / 'names.txt'}", "--normalization=imagenet"]
    arguments = [str(run), f"folder:{root}", "--split=train", "--batch_size=4", "--max_bad_fraction=0.2"]
    arguments += [] if is_stated else more
    assert evaluate.main([*arguments, f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "on 8 images" in printed and "mAP (mean average precision)" in printed
    assert f"the means are over 3 of 4 classes; no image has: {NAMES[5]}" in printed
    assert ("the weights do not say that an image may have several classes" in printed) != is_stated
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    labels, p = np.delete(labels, 6, axis=0), probabilities[:, USED]
    has = labels.any(axis=0)
    assert has.tolist() == [True, True, True, False]
    precision = [sklearn.metrics.average_precision_score(labels[:, k], p[:, k]) for k in range(3)]
    assert found["average_precision"] == pytest.approx(
        dict(zip([NAMES[k] for k in USED], [*precision, None], strict=True))
    )
    arguments = labels[:, has], p[:, has] >= 0.5
    expected = {
        "mean_average_precision": np.mean(precision),
        "macro_f1": sklearn.metrics.f1_score(*arguments, average="macro", zero_division=0),
        "micro_f1": sklearn.metrics.f1_score(labels, p >= 0.5, average="micro", zero_division=0),
        "loss": np.mean([sklearn.metrics.log_loss(labels[:, k], p[:, k], labels=[0, 1]) for k in range(4)]),
    }
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    with (tmp_path / "out" / "classes.csv").open() as file:
        rows = list(csv.reader(file))
    counts = labels.sum(axis=0)
    assert [row[:3] for row in rows[1:]] == [[NAMES[k], str(k), str(n)] for k, n in zip(USED, counts, strict=True)]
    assert rows[0][3:] == ["average_precision", "precision", "recall", "f1"] and rows[4][3:] == [""] * 4
    with (tmp_path / "out" / "mistakes.csv").open() as file:
        mistakes = list(csv.DictReader(file))
    wrong = np.where(labels == 1, 0, p)
    np.testing.assert_allclose(
        [float(row["probability"]) for row in mistakes], -np.sort(-wrong[wrong >= 0.5])[:24], rtol=1e-5
    )
    image, label = np.unravel_index(wrong.argmax(), wrong.shape)
    names = ", ".join(NAMES[USED[k]] for k in np.flatnonzero(labels[image]))
    assert (mistakes[0]["true"], mistakes[0]["predicted"]) == (names or "none", NAMES[USED[label]])


def test_images_of_one_class_are_refused(run, photos, tmp_path, capsys):
    (tmp_path / NAMES[3]).mkdir()
    (tmp_path / NAMES[3] / "0.png").write_bytes((photos[0] / "0.png").read_bytes())
    assert evaluate.main([str(run), f"folder:{tmp_path}", "--split=train"]) == 2
    assert "folder:PATH with a labels.csv in every split" in capsys.readouterr().err


def test_labels_of_features_and_pictures_of_the_data(run, photos, tmp_path):
    root, labels = photos
    out = tmp_path / "features.npz"
    assert embed.main([str(run), f"folder:{root}", f"--out={out}"]) == 0
    found = np.load(out)
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["class_names"].tolist() == [NAMES[k] for k in USED]
    source = open_source(f"folder:{root}", "train")
    assert describe_data((source,))["train"]["multi_label"] is True
    draw_examples(source, str(tmp_path / "examples.jpg"))
    assert Image.open(tmp_path / "examples.jpg").height == 140


@pytest.mark.parametrize("layout", ["huggingface", "timm", "run", "official"])
def test_folders_say_that_an_image_may_have_several_classes(layout, weights, tmp_path):
    path = tmp_path / ("x.pth" if layout == "official" else "x")
    not_written = write(weights, str(path), layout)
    assert read(str(path)).multi_label == is_multi_label(str(path)) == (layout != "official")
    assert ("multi_label" in not_written) == (layout == "official")
    if layout in ("huggingface", "timm"):
        config, card = json.loads((path / "config.json").read_text()), (path / "README.md").read_text()
        assert config["problem_type"] == "multi_label_classification"
        assert "A multi-label image classifier" in card and "the sigmoid of its logit" in card
        assert ".softmax" not in card
    if layout == "run":  # and an ordinary classifier does not
        write(dataclasses.replace(weights, multi_label=False), str(tmp_path / "other"), "huggingface")
        assert "problem_type" not in (tmp_path / "other" / "config.json").read_text()
        assert not read(str(tmp_path / "other")).multi_label
        meaning = _manifest(weights, "stablehlo", 1, {})["outputs"]["logits"]["meaning"]
        assert meaning == "one number for each class; their sigmoids are the probabilities"
