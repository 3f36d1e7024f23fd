"""The rows of codes: which codes are drawn, and what their tiles show."""

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.report import codes


def test_half_of_the_rows_are_the_most_used_codes_and_the_others_reach_the_rarest():
    counts = np.array([3, 0, 50, 7, 1, 90, 40, 2, 0, 30, 4])
    # by decreasing use: 5 2 6 9 3 10 0 7 4
    assert codes.frequent_and_rare(counts, 4) == [5, 2, 6, 4]
    assert codes.frequent_and_rare(counts, 6) == [5, 2, 6, 9, 10, 4]
    assert codes.frequent_and_rare(counts, 9) == [5, 2, 6, 9, 3, 10, 0, 7, 4]
    assert codes.frequent_and_rare(counts, 20) == [5, 2, 6, 9, 3, 10, 0, 7, 4]


@pytest.mark.parametrize(
    ("patch", "rows", "columns", "outlined"),
    [
        (0, slice(0, 3), slice(0, 3), (0, 0)),  # a corner: the context lies below and to the right
        (6, slice(0, 3), slice(1, 4), (1, 1)),
        (15, slice(1, 4), slice(1, 4), (2, 2)),
    ],
)
def test_a_tile_shows_nothing_but_the_image_and_outlines_the_patch(patch, rows, columns, outlined, tmp_path):
    grid, side = (4, 4), 40
    image = np.zeros((grid[0] * side, grid[1] * side, 3), np.uint8)
    for number in range(16):
        row, column = divmod(number, 4)
        image[row * side : (row + 1) * side, column * side : (column + 1) * side] = 10 * number
    code_ids = np.full((1, 16), 1)
    code_ids[0, patch] = 0
    codes.draw_rows(code_ids, lambda index: image, grid, [0], str(tmp_path / "rows.png"), num_tiles=1)
    picture = np.asarray(Image.open(tmp_path / "rows.png"))
    assert picture.shape == (codes.TILE, codes.LABEL_WIDTH + codes.TILE, 3)
    tile = picture[2 : codes.TILE - 2, codes.LABEL_WIDTH + 2 : -2].astype(int)
    third = len(tile) / 3
    centres = [int(third * (number + 0.5)) for number in range(3)]
    expected = 10 * np.arange(16).reshape(4, 4)[rows, columns]
    np.testing.assert_array_equal(tile[np.ix_(centres, centres)][..., 0], expected)
    red = (tile[..., 0] > 200) & (tile[..., 1] < 60)
    y, x = np.nonzero(red)
    assert (int(y.min() / third + 0.1), int(x.min() / third + 0.1)) == outlined
    assert y.max() - y.min() == pytest.approx(third, abs=2)


def test_the_patches_of_a_row_come_from_different_images(tmp_path):
    code_ids = np.array([[0, 0, 0, 0], [0, 1, 1, 1], [-1, -1, -1, -1], [1, 1, 1, 1], [1, 1, 1, 0]])
    asked = []

    def crop(index):
        asked.append(index)
        return np.zeros((20, 20, 3), np.uint8)

    codes.draw_rows(code_ids, crop, (2, 2), [0], str(tmp_path / "rows.png"), num_tiles=5)
    assert sorted(asked) == [0, 1, 4]
