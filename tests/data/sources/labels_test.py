"""The labels of a source: draws of a few images of each class, counts, and what is logged of them."""

import logging
import pickle

import numpy as np
import pytest

from beitv2_jax.data.sources import LabelledSource, open_source, open_splits
from beitv2_jax.data.sources.labels import class_counts, few_labels, labels_of, log_classes


class Records:
    """Records of a data set that does not list its labels."""

    name, split, class_names, num_classes = "records", "train", ("a", "b", "c", "d"), 4

    def __init__(self, labels, faults=()):
        self._labels, self._faults = labels, faults

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        fault = "damaged" if index in self._faults else ""
        return {"image": b"", "label": self._labels[index], "example_id": index, "fault": fault}


def folder(root, **counts):
    for path, count in counts.items():
        directory = root / path.replace("_", "/")
        directory.mkdir(parents=True)
        for number in range(count):
            (directory / f"{number:03d}.png").write_bytes(b"not decoded here")
    return f"folder:{root}"


def ids(source):
    return [source[index]["example_id"] for index in range(len(source))]


def test_a_draw_has_as_many_images_of_each_class_as_asked_for(tmp_path, caplog):
    source = open_source(folder(tmp_path, train_ant=3, train_bee=40, train_cat=101), "train")
    for amount, expected in (
        ({"shots": 5}, [3, 5, 5]),
        ({"shots": 1}, [1, 1, 1]),
        ({"fraction": 0.1}, [1, 4, 10]),
        ({"fraction": 0.01}, [1, 1, 1]),
        ({"fraction": 1.0}, [3, 40, 101]),
    ):
        chosen = few_labels(source, seed=0, **amount)
        assert class_counts(chosen).tolist() == expected and len(chosen) == sum(expected)
        assert len(set(ids(chosen))) == len(chosen)
        assert [chosen[index]["label"] for index in range(len(chosen))] == chosen.labels.tolist()
        assert all(source[number]["label"] == label for number, label in zip(ids(chosen), chosen.labels, strict=True))
    assert caplog.text.count("split train: classes with fewer than 5 images, all of which are used: ant") == 1


def test_a_draw_is_a_function_of_the_seed_and_a_larger_one_holds_a_smaller(tmp_path):
    source = open_source(folder(tmp_path, train_ant=50, train_bee=60), "train")
    five = few_labels(source, seed=1, shots=5)
    assert ids(five) == ids(few_labels(source, seed=1, shots=5)) == ids(pickle.loads(pickle.dumps(five)))
    assert set(ids(few_labels(source, seed=1, shots=2))) < set(ids(five))
    assert set(ids(five)) < set(ids(few_labels(source, seed=1, fraction=0.5)))
    other = few_labels(source, seed=2, shots=5)
    assert set(ids(other)) != set(ids(five)) and other.name != five.name
    # images of one class do not move the draw of another
    (tmp_path / "train/ant/050.png").write_bytes(b"")
    again = few_labels(open_source(f"folder:{tmp_path}", "train"), seed=1, shots=5)
    assert [number - 1 for number in ids(again)[5:]] == ids(five)[5:]


def test_draws_are_spread_over_a_class(tmp_path):
    """Over 300 seeds each of ten images is among two in a fifth of the draws, with a standard deviation of 7."""
    source, counts = open_source(folder(tmp_path, train_ant=10), "train"), np.zeros(10)
    for seed in range(300):
        counts[ids(few_labels(source, seed=seed, shots=2))] += 1
    assert counts.sum() == 600 and abs(counts - 60).max() < 35


def test_records_are_read_for_their_labels_and_those_without_are_left_out():
    source = LabelledSource(Records([2, 0, -1, 2, 2, 0, 2] * 400, faults=(0, 1)))
    labels = labels_of(source)
    assert labels[:8].tolist() == [-1, -1, -1, 2, 2, 0, 2, 2]
    assert class_counts(source).tolist() == [799, 0, 1599, 0]
    chosen = few_labels(source, seed=0, fraction=0.25)
    assert class_counts(chosen).tolist() == [200, 0, 400, 0]
    assert not {0, 1, 2} & set(ids(chosen)) and chosen.empty_classes == ("b", "d")
    assert chosen.split == "train" and chosen.class_names == source.class_names


def messages(caplog, train, evaluation):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="absl"):
        log_classes(train, evaluation)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_the_classes_of_both_splits_are_logged(tmp_path, caplog):
    spec = folder(tmp_path, train_ant=2, train_bee=93, train_cat=0, train_dog=5, val_ant=1, val_cat=1, val_dog=3)
    found = messages(caplog, *open_splits(spec, "train", "validation"))
    assert found == [
        ("INFO", "split train: 100 images in 4 classes; smallest class cat with 0, median 3.5, largest bee with 93"),
        ("WARNING", "split train: 93% of the images are of the class bee, so always answering bee is right as often"),
        ("INFO", "split val: 5 images in 4 classes; smallest class bee with 0, median 1, largest dog with 3"),
        ("WARNING", "split val: classes without training images, which are never predicted: cat"),
    ]


@pytest.mark.parametrize("evaluation", [Records([0, 1]), None])
def test_nothing_is_read_to_log_the_classes(tmp_path, caplog, evaluation):
    train = Records([0] * 10)
    assert messages(caplog, train, evaluation or train) == []
