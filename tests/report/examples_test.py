"""The row of example images: evenly spread, with class names, without what cannot be read."""

import io

import numpy as np
from PIL import Image

from beitv2_jax.report.examples import TILE, draw_examples


class Source:
    """Images of one colour each, red as their number says; `unreadable` ones are damaged."""

    class_names = ("dark", "a very long name of a class that has no room below its image")

    def __init__(self, count, unreadable=(), labelled=True):
        self._count, self._unreadable, self._labelled = count, unreadable, labelled

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.new("RGB", (200, 150), (2 * index, 0, 0)).save(buffer, "PNG")
        image = b"damaged" if index in self._unreadable else buffer.getvalue()
        label = int(index > 50) if self._labelled else -1
        return {"image": image, "label": label, "example_id": index, "where": f"image {index}"}


def reds(path):
    """Return the red of the middle of each tile, halved: the number of its image."""
    pixels = np.asarray(Image.open(path))
    return [round(pixels[TILE // 2, left + TILE // 2, 0] / 2) for left in range(0, pixels.shape[1], TILE + 4)]


def test_images_are_spread_over_the_data_set(tmp_path):
    draw_examples(Source(101), tmp_path / "e.jpg", num_images=5)
    np.testing.assert_allclose(reds(tmp_path / "e.jpg"), [0, 25, 50, 75, 100], atol=1)
    with_names = Image.open(tmp_path / "e.jpg").height
    draw_examples(Source(101, {25, 100}, labelled=False), tmp_path / "e.jpg", num_images=5)
    np.testing.assert_allclose(reds(tmp_path / "e.jpg"), [0, 50, 75], atol=1)
    assert Image.open(tmp_path / "e.jpg").height == TILE < with_names


def test_nothing_is_written_where_nothing_can_be_read(tmp_path):
    draw_examples(Source(1, {0}), tmp_path / "e.jpg")
    assert list(tmp_path.iterdir()) == []
