"""The picture of the curves: where points lie, what is left out, and round numbers at the axes."""

import math
from xml.etree import ElementTree

import pytest

from beitv2_jax.report.curves import COLORS, HEIGHT, MOST_POINTS, WIDTH, Chart, _ticks, draw_curves

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*charts):
    return ElementTree.fromstring(draw_curves(charts))


def test_points_lie_where_the_axes_say():
    """Steps go from 0 to the largest of all charts; values 1 to 3 have ticks 1, 1.5, 2, 2.5 and 3."""
    svg = drawn(Chart("a < b", {"x": [(0, 1.0), (50, 2.0), (100, 3.0)]}), Chart("other", {"x": [(50, 7.0)]}))
    first, other = svg.findall(f"{SVG}g")
    assert first.find(f"{SVG}text").text == "a < b"
    places = [(float(point.get("cx")), float(point.get("cy"))) for point in first.iter(f"{SVG}circle")]
    (left, bottom), (middle, centre), (right, top) = places
    assert middle == pytest.approx((left + right) / 2) and centre == pytest.approx((bottom + top) / 2)
    assert 0 < left < right < WIDTH and 0 < top < bottom < HEIGHT
    rows = [text.text for text in first.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert rows == ["1", "1.5", "2", "2.5", "3"]
    (alone,) = other.iter(f"{SVG}circle")
    assert float(alone.get("cx")) == middle
    assert alone.find(f"{SVG}title").text == "x: 7 at step 50"


def test_a_label_has_one_colour_in_all_charts():
    svg = drawn(Chart("loss", {"b": [(1, 1.0)]}), Chart("accuracy", {"a": [(1, 1.0)], "b": [(1, 2.0)]}))
    colors = [[line.get("stroke") for line in chart.iter(f"{SVG}polyline")] for chart in svg.findall(f"{SVG}g")]
    assert colors == [[COLORS[0]], [COLORS[1], COLORS[0]]]
    assert [text.text for text in svg.findall(f"{SVG}text")] == ["b", "a"]


def test_what_is_not_finite_is_left_out_and_long_curves_keep_their_ends():
    steps = 5 * MOST_POINTS
    curve = [(step, float(step)) for step in range(1, steps + 1)]
    svg = drawn(Chart("long", {"x": curve}), Chart("none", {"x": [(1, None), (2, math.nan)]}))
    long, none = svg.findall(f"{SVG}g")
    titles = [title.text for title in long.iter(f"{SVG}title")]
    assert len(titles) == MOST_POINTS
    assert (titles[0], titles[-1]) == ("x: 1 at step 1", f"x: {steps} at step {steps}")
    assert [text.text for text in none.iter(f"{SVG}text")] == ["none", "no finite values"]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1300, [0, 500, 1000, 1500]),
        (0.12, 0.49, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (-3e-5, 4e-5, [-4e-5, -2e-5, 0, 2e-5, 4e-5]),
        (0, 4, [0, 1, 2, 3, 4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert _ticks(low, high) == pytest.approx(expected)
