"""The embedded data set: reproducible bytes, balanced classes, masks that fit, colours that give nothing away."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beitv2_jax import rng as streams
from beitv2_jax.data import embedded
from beitv2_jax.data.embedded import drawing, scene_objects, scenes
from beitv2_jax.data.embedded.parts import PART_NAMES
from beitv2_jax.errors import UserError

NUM_CLASSES = len(scenes.CLASS_NAMES)
SKIP = tfds.decode.SkipDecoding()


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return embedded.prepare(tmp_path_factory.mktemp("tfds"), "tiny")


@pytest.fixture(scope="module")
def examples(tiny):
    """Return the training images of embedded/tiny as they are stored, encoded; their order is not that of drawing."""
    decoders = dict.fromkeys(("image", "segmentation_mask", "part_map"), SKIP)
    return list(tfds.builder_from_directory(tiny).as_data_source("train", decoders=decoders))


@pytest.fixture(scope="module")
def drawn():
    """Return the first training images in the order of drawing, more than a process draws at once."""
    return list(embedded.generate(0, "train", 53))


def test_same_bytes_again_and_for_any_number_of_processes(drawn):
    assert list(embedded.generate(0, "train", 13)) == drawn[:13]
    assert list(embedded.generate(0, "train", 53, processes=2)) == drawn


def test_seed_split_and_index_all_count():
    base = embedded.encode_example(0, "train", 3)["image"]
    others = [(1, "train", 3), (0, "test", 3), (0, "train", 3 + NUM_CLASSES)]
    assert all(embedded.encode_example(*other)["image"] != base for other in others)


def test_sizes_labels_and_masks_agree(examples):
    visible, seen = np.zeros((NUM_CLASSES, 0)).tolist(), set()
    for example in examples:
        image, mask = pixels(example["image"]), pixels(example["segmentation_mask"])
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert mask.shape == (96, 96) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, example["label"] + 1}
        part_map = pixels(example["part_map"])
        assert ((part_map > 0) == (mask > 0)).all()
        named = {PART_NAMES[number] for number in np.unique(part_map)} - {"surroundings"}
        assert {name.split()[0] for name in named} == {scenes.CLASS_NAMES[example["label"]]}
        seen |= named
        visible[example["label"]].append((mask > 0).mean())
    assert seen == set(PART_NAMES[1:])
    # each class is seen well and leaves room for its surroundings
    assert all(0.1 < np.mean(shares) < 0.5 for shares in visible)


@pytest.mark.parametrize("index", [3, 17, 29])
def test_mask_marks_the_visible_object(index, monkeypatch):
    """Two scenes that differ only in the colour of the object differ inside the mask and nowhere else."""
    # tones are evened out over the whole picture, which would carry the difference to its surroundings
    monkeypatch.setattr(scenes, "_develop", lambda image, rng: image)
    pictures = []
    for tone in (20, 230):
        fill = lambda pen, rng, palette, tone=tone: pen.fill([[-1, -1], [1, -1], [1, 1], [-1, 1]], (tone,) * 3)  # noqa: E731
        monkeypatch.setattr(scene_objects, "OBJECTS", {name: (fill, 20.0) for name in scenes.CLASS_NAMES})
        pictures.append(scenes.draw_scene(streams.host_rng(0, "scene train", index), 5))
    dark, light = pictures
    assert np.array_equal(dark.segmentation_mask, light.segmentation_mask)
    inside = dark.segmentation_mask == 6
    differs = np.abs(light.image.astype(int) - dark.image).max(-1)
    assert 0.2 < inside.mean() < 0.9
    # the outermost pixels of the object are blended with what lies behind
    assert (differs[inside] > 30).all() and (differs[~inside] > 30).mean() < 0.05
    assert np.median(differs[~inside]) == 0


def test_every_object_can_be_drawn_within_its_frame():
    """An unoccluded object stays near [-1, 1]: its drawing on a frame twice as wide leaves the border empty."""
    for index, (draw, _) in enumerate(scene_objects.OBJECTS.values()):
        for number in range(5):
            rng = streams.host_rng(1, "object", index, number)
            canvas = Image.new("RGBA", (120, 120))
            pen = drawing.Pen(canvas, 30.0 * np.eye(2), (60, 60), visible=255)
            draw(pen, rng, drawing.random_palette(rng, (128, 128, 128)))
            alpha = np.asarray(canvas)[..., 3] > 0
            assert alpha[25:95, 25:95].mean() > 0.15
            assert alpha.sum() - alpha[15:105, 15:105].sum() == 0


def test_tfds_opens_it(tiny):
    builder = tfds.builder_from_directory(tiny)
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {"train": 400, "test": 100}
    assert tuple(builder.info.features["label"].names) == scenes.CLASS_NAMES
    for split, count in (("train", 40), ("test", 10)):
        records = builder.as_data_source(split)
        labels = [record["label"] for record in records]
        assert np.array_equal(np.bincount(labels), [count] * NUM_CLASSES)
        assert records[0]["image"].shape == (96, 96, 3) and records[0]["segmentation_mask"].shape == (96, 96, 1)
        assert set(np.unique(records[0]["segmentation_mask"])) == {0, labels[0] + 1}


def test_the_set_holds_the_generated_bytes(examples, drawn):
    def contents(example):
        return example["image"], example["segmentation_mask"], example["part_map"], int(example["label"])

    stored = set(map(contents, examples))
    assert len(stored) == 400
    assert [example["label"] for example in drawn] == [index % NUM_CLASSES for index in range(53)]
    assert set(map(contents, drawn)) <= stored


def test_prepare_again_draws_nothing(tiny, monkeypatch):
    monkeypatch.setattr(embedded, "encode_example", None)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tiny.iterdir())
    assert embedded.prepare(tiny.parents[2], "tiny") == tiny
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tiny.iterdir()) == before


def test_a_broken_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    draw = scenes.draw_scene

    def breaks_at_once(rng, label):
        if label == 7:
            raise KeyboardInterrupt
        return draw(rng, label)

    monkeypatch.setattr(scenes, "draw_scene", breaks_at_once)
    with pytest.raises(KeyboardInterrupt):
        embedded.prepare(tmp_path, "tiny")
    assert not list(tmp_path.rglob("*.array_record*"))
    assert not list(tmp_path.glob("*/tiny/1.2.0"))


def test_unknown_config_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"embedded/scenes or embedded/tiny\."):
        embedded.prepare(tmp_path, "huge")


def test_a_place_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "home").write_text("a file, which the superuser cannot write into either")
    with pytest.raises(UserError, match=f"cannot be drawn into {tmp_path}/home/.*: Not a directory") as caught:
        embedded.prepare(tmp_path / "home", "tiny")
    assert "home directory" in caught.value.meant and "--config.data.data_dir=DIR" in caught.value.instead


def color_moments(image: np.ndarray) -> np.ndarray:
    flat = image.reshape(-1, 3) / 255.0
    centered = flat - flat.mean(0)
    cross = (centered.T @ centered)[np.triu_indices(3, 1)] / len(flat)
    return np.concatenate([flat.mean(0), centered.std(0), np.cbrt((centered**3).mean(0)), cross])


def test_color_moments_do_not_tell_the_class(examples):
    """Nearest class mean on colour moments, each picture left out of its own class mean, stays near chance.

    With 400 pictures and chance 0.1 the standard deviation is 0.015; the bound is 0.1 + 4 deviations
    (0.16). Without `scenes._develop` 300 such pictures reach 0.22.
    """
    features = np.stack([color_moments(pixels(example["image"])) for example in examples])
    labels = np.array([example["label"] for example in examples])
    features = (features - features.mean(0)) / features.std(0)
    hits = 0
    for index, (feature, label) in enumerate(zip(features, labels, strict=True)):
        others = np.arange(len(features)) != index
        means = np.stack([features[others & (labels == c)].mean(0) for c in range(NUM_CLASSES)])
        hits += np.argmin(((means - feature) ** 2).sum(1)) == label
    assert hits / len(features) < 0.1 + 4 * np.sqrt(0.1 * 0.9 / len(features))
