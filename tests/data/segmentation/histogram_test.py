"""Numbers in label maps that a config makes nothing of: refused with what they are and what to write, or logged."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.data.segmentation.histogram import check_numbers, count_numbers
from beitv2_jax.data.segmentation.label_maps import LabelIds
from beitv2_jax.errors import UserError


class Maps:
    """A source of label maps alone, each one row of numbers; None is one that cannot be read."""

    name, split = "rows", "train"

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        file = io.BytesIO()
        if self.rows[index] is not None:
            Image.fromarray(np.array([self.rows[index]], np.uint8)).save(file, "PNG")
        return {"label_map": file.getvalue(), "where": f"row {index}"}


def check(ids, *rows, max_bad_fraction=0.0, is_training=True):
    check_numbers(Maps(*rows), ids, max_bad_fraction=max_bad_fraction, is_training=is_training)


def followed(error):
    """Return the ids of a config that does what the error advises about numbers and their classes."""
    mapping = eval(re.search(r"--config.labels.mapping='(.*?)'", error.instead)[1])
    num_classes = int(re.search(r"--config.model.num_classes=(\d+)", error.instead)[1])
    return LabelIds(num_classes, ignored=(), mapping=mapping)


@pytest.fixture
def warnings(monkeypatch):
    shown = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *values: shown.append(text % values))
    return shown


def test_numbers_are_counted_by_pixels_and_by_maps():
    histogram = count_numbers(Maps([0, 0, 3], None, [3, 255, 255]))
    assert {n: histogram.pixels[n] for n in np.flatnonzero(histogram.pixels)} == {0: 2, 3: 2, 255: 2}
    assert [np.flatnonzero(row).tolist() for row in histogram.occurs] == [[0, 3], [3, 255]]
    assert histogram.fault == "row 1: its label map is none of PNG, TIFF, BMP, GIF, PPM"
    assert count_numbers(Maps([1, 1, 1, 2])).listed() == "1: 75.0%, 2: 25.0%"
    # of many maps some, from the first to the last
    assert count_numbers(Maps([1], [2], [3], [4], [5]), max_maps=3).pixels[[1, 3, 5]].tolist() == [1, 1, 1]


def test_maps_in_which_no_pixel_has_a_class_are_refused():
    """Masks of 0 and 255 with the numbers of ADE20K, where both are ignored."""
    rows = [0, 0, 255], [255, 255, 0]
    for is_training in (True, False):
        with pytest.raises(UserError, match=r"0 of 2 classes occur .*numbers 0: 50.0%, 255: 50.0%") as caught:
            check(LabelIds(2, offset=1, ignored=(0, 255)), *rows, is_training=is_training)
    ids = followed(caught.value)
    check(ids, *rows)
    np.testing.assert_array_equal(ids.classes(np.array([0, 255], np.uint8), ""), [0, 1])


def test_numbers_without_a_class_are_refused_or_logged(warnings):
    ids, rows = LabelIds(2, ignored=(9,)), ([0, 1, 9], [0, 1, 8], [0, 7, 1], [1, 1, 0])
    with pytest.raises(UserError, match=r"numbers 7, 8 are neither a class nor ignored.*7: 8.3%, 8: 8.3%") as caught:
        check(ids, *rows, max_bad_fraction=0.4)
    assert "--config.labels.ignored='(7, 8, 9)' to leave them out" in caught.value.instead
    check(LabelIds(2, ignored=(7, 8, 9)), *rows)
    check(followed(caught.value), *rows)
    assert not warnings
    check(ids, *rows, max_bad_fraction=0.5)
    assert len(warnings) == 1 and "numbers 7, 8 are neither" in warnings[0] and "count as unreadable" in warnings[0]


def test_leaving_numbers_out_is_not_advised_where_nothing_would_be_left():
    ids = LabelIds(150, offset=1, ignored=(0,))
    with pytest.raises(UserError, match="0 of 150 classes occur") as caught:
        check(ids, [255, 255], [255, 255])
    assert "--config.data.source" in caught.value.instead and "--config.labels" not in caught.value.instead
    with pytest.raises(UserError, match="0 of 150 classes occur") as caught:
        check(ids, [254, 255], [255, 255])
    check(followed(caught.value), [254, 255], [255, 255])


def test_classes_that_never_occur_are_logged(warnings):
    check(LabelIds(4), [0, 2, 2])
    assert len(warnings) == 1 and "2 of 4 classes never occur in" in warnings[0] and warnings[0].endswith(": 1, 3")


def test_one_class_alone_is_nothing_to_learn(warnings):
    with pytest.raises(UserError, match="1 of 2 classes occur"):
        check(LabelIds(2), [0, 0])
    check(LabelIds(2), [0, 0], is_training=False)
    assert "1 of 2 classes never occur" in warnings[0]


def test_maps_none_of_which_can_be_read_are_refused():
    with pytest.raises(UserError, match=r"None of the label maps .* the first one is row 0: its label map is none of"):
        check(LabelIds(2), None, None)
