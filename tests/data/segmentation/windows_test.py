"""Which windows there are: the published arithmetic, the size of a batch, the order of an evaluation."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beitv2_jax.data.segmentation import windows

PUBLISHED = windows.Sliding(crop=512, stride=341, long_side=2048, short_side=512)


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (512, [0]),
        (400, [0]),
        (513, [0, 1]),
        (683, [0, 171]),
        (853, [0, 341]),
        (854, [0, 341, 342]),
        (1024, [0, 341, 512]),
    ],
)
def test_published_windows(length, starts):
    assert windows.window_starts(length, 512, 341) == starts
    assert len(starts) == max(length - 512 + 340, 0) // 341 + 1  # the grid of the released test


@given(length=st.integers(1, 300), crop=st.integers(1, 90), stride=st.integers(1, 90))
def test_windows_cover_a_side_once_or_more(length, crop, stride):
    stride = min(stride, crop)
    starts = windows.window_starts(length, crop, stride)
    seen = {pixel for start in starts for pixel in range(start, start + crop)}
    assert seen >= set(range(length)) and len(set(starts)) == len(starts)
    assert max(seen) < max(length, crop)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((683, 512), (683, 512)),
        ((1366, 1024), (683, 512)),
        ((256, 300), (512, 600)),
        ((100, 1000), (205, 2048)),
        ((3, 1), (1536, 512)),
    ],
)
def test_an_image_fits_into_both_sides(size, fitted):
    assert windows.fitted_size(*size, 2048, 512) == fitted
    assert windows.fitted_size(*size[::-1], 2048, 512) == fitted[::-1]


def test_views_of_an_image():
    (view,) = PUBLISHED.views(512, 900)
    assert view == ((512, 900), ((0, 0), (0, 341), (0, 388)), False)
    several = windows.Sliding(crop=512, stride=341, long_side=2048, short_side=512, scales=(0.5, 1.75), flip=True)
    views = several.views(512, 900)
    assert [view.size for view in views] == [(256, 450)] * 2 + [(896, 1575)] * 2
    assert [view.mirrored for view in views] == [False, True] * 2 == list(several.mirrored)
    assert len(views[0].corners) == 1 and len(views[2].corners) == 3 * 5
    whole = windows.Sliding(crop=512, stride=341, long_side=512, short_side=512)
    assert whole.views(512, 900)[0] == ((291, 512), ((0, 0),), False)


def test_the_room_is_that_of_the_largest_and_few_windows_come_first():
    def png(height, width):
        file = io.BytesIO()
        Image.new("L", (width, height)).save(file, "PNG")
        return {"label_map": file.getvalue()}

    source = [png(100, 390), png(129, 129), {"label_map": b"corrupt"}, png(257, 140)]
    sliding = windows.Sliding(crop=64, stride=40, long_side=400, short_side=100)
    canvas, order = windows.plan_windows(source, sliding)
    # 100 x 390 has 2 x 10 windows, squares have 2 x 2, 184 x 100 has 4 x 2
    assert canvas == (384, 512, 20)
    assert order == [1, 2, 3, 0]
    assert windows.plan_windows([png(20, 80)], sliding)[0] == (128, 128, 20)
    assert windows.plan_windows([png(20, 800)], windows.Sliding(crop=64, stride=40, long_side=100, short_side=100))[
        0
    ] == (128, 896, 4)  # an unreadable image would be a square
