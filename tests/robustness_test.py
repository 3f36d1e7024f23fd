"""The verb robustness on small sets in each published layout: the numbers of the network itself, counted by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_states import drawn_weights
from PIL import Image

import beitv2_jax
from beitv2_jax import robustness
from beitv2_jax.convert.writing import write
from beitv2_jax.evaluation.classes import imagenet_ids
from beitv2_jax.evaluation.robustness import ALEXNET_ERRORS
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.runners import robustness as runner

SIDE = 9
IDS = imagenet_ids()


def put(path, seed, size=(25, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture(scope="module")
def weights():
    """A classifier of 1000 classes without names, which predicts one of a few."""
    arguments = {"image_size": SIDE, "patch_size": 3, "width": 10, "depth": 1, "num_heads": 2, "mlp_dim": 13}
    arguments |= {"position": "relative", "num_classes": 1000, "pooling": "mean"}
    weights = drawn_weights("classifier", arguments=arguments)
    weights.variables["params"]["head"]["bias"][[2, 3, 11, 500, 700]] += 100.0
    return weights


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "run"
    write(weights, str(path), "run")
    return path


def measured(out, run, *arguments):
    assert robustness.main([str(run), *arguments, f"--out={out}"]) == 0
    return json.loads(out.read_text())["benchmarks"]


def test_each_layout_gives_the_numbers_of_the_network(run, weights, tmp_path, capsys):
    classifier = beitv2_jax.load_classifier(run)
    predicted, masked, labels = {}, {}, {}
    present = (3, 11, 500)
    for name, folders in (
        ("imagenet", IDS),
        ("imagenet_a", IDS),
        ("imagenet_v2", [str(number) for number in range(1000)]),
    ):
        paths, labels[name] = [], []
        for number, label in enumerate(present * 3):
            paths.append(tmp_path / name / folders[label] / f"ILSVRC2012_val_{number + 1:08d}.png")
            put(paths[-1], [len(name), number])
            labels[name].append(label)
        logits = classifier.logits(paths)
        predicted[name] = logits.argmax(axis=1)
        masked[name] = np.array(present)[logits[:, list(present)].argmax(axis=1)]
    assert (masked["imagenet_a"] != predicted["imagenet_a"]).any()
    # of two images the guess is among the labels, of one there are none, of the others something else
    real = [[int(guess), 7] if number < 2 else [] if number == 2 else [(int(guess) + 1) % 1000]
            for number, guess in enumerate(predicted["imagenet"])]  # fmt: skip
    (tmp_path / "real.json").write_text(json.dumps(real))
    found = measured(
        tmp_path / "out.json",
        run,
        *(f"--{name}=folder:{tmp_path / name}" for name in labels),
        f"--imagenet_real={tmp_path / 'real.json'}",
    )
    assert found["imagenet"] == {"value": np.mean(predicted["imagenet"] == labels["imagenet"]), "images": 9}
    assert found["imagenet_real"] == {"value": 2 / 8, "images": 8}
    assert found["imagenet_v2"]["value"] == np.mean(predicted["imagenet_v2"] == labels["imagenet_v2"])
    assert found["imagenet_a"]["value"] == np.mean(masked["imagenet_a"] == labels["imagenet_a"])
    assert found["imagenet_a"]["classes"] == 3
    printed = capsys.readouterr().out
    assert "| ImageNet-ReaL  | 8      | 25.00%   | 89.27%   |" in printed


def test_the_corruptions_are_one_pass_over_whole_images(run, weights, tmp_path):
    """Seventy-five folders of two images of the size that the network sees, which are neither resized nor cropped."""
    model, pixels = Classifier.from_arguments(weights.arguments), []
    for number, (name, severity) in enumerate(runner.CORRUPTIONS):
        archive = "noise" if name.endswith("noise") else "other"
        for label in (2, 700):
            path = tmp_path / archive / name / str(severity) / IDS[label] / "1.png"
            pixels.append(put(path, [number, label], (SIDE, SIDE)))
    images = jnp.asarray((np.stack(pixels) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], jnp.float32)
    logits = np.asarray(jax.jit(model.apply)({"params": weights.variables["params"]}, images))
    wrong = (logits.argmax(axis=1) != np.array([2, 700] * 75)).reshape(15, 5, 2).mean(axis=2)
    assert 0 < wrong.mean() < 1
    relative = wrong.sum(axis=1) / (5 * np.array(list(ALEXNET_ERRORS.values())))
    found = measured(tmp_path / "out.json", run, f"--imagenet_c=folder:{tmp_path}")["imagenet_c"]
    assert found["images"] == 150
    assert found["value"] == pytest.approx(relative.mean())
    assert list(found["corruption_errors"].values()) == pytest.approx(relative.tolist())
    np.testing.assert_allclose(list(found["errors"].values()), wrong)


class Labels:
    """A data set of which only the labels are asked for, with classes that no example has."""

    class_names, num_classes, name = IDS, 1000, "tfds:imagenet_a"

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {"label": self.labels[number], "where": str(number)}


def test_of_other_data_sets_the_labels_are_read():
    source = Labels([500, 3, -1, 500])
    present = runner._present(source)
    assert present == [3, 500]
    relabelled = runner._Relabelled(source, present)
    assert [relabelled[number]["label"] for number in range(4)] == [1, 0, -1, 1]
    assert relabelled.class_names == (IDS[3], IDS[500]) and relabelled.name == "tfds:imagenet_a"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "There is no benchmark to go over"),
        (["--imagenet_real=real.json"], "its images are the validation images"),
        (["--imagenet_a=folder:x", "--crop_fraction=90"], "out of range"),
        (["--imagenet_a=folder:/nowhere"], "/nowhere does not exist"),
        (["--imagenet_a=folder:x", "--out=/nowhere/found.json"], "Write --out in a folder that exists"),
    ],
)
def test_mistakes_are_named(run, arguments, message, capsys):
    assert robustness.main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
