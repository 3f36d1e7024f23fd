"""Draw the curves of metrics over the steps as one SVG picture, in which a pointer shows the values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Curve = Sequence[tuple[int, float]]
"""(finished steps, value), by increasing steps."""

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777")
WIDTH, HEIGHT, COLUMNS = 460, 250, 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 28, 30
MOST_POINTS = 400
"""Points that are drawn of a curve; of a longer one they are evenly spaced."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """The curves of one metric, by their labels."""

    title: str
    curves: Mapping[str, Curve]


def draw_curves(charts: Sequence[Chart]) -> str:
    """Return the SVG picture of one or more charts, two in a row; all have the same steps and colours."""
    labels = list(dict.fromkeys(label for chart in charts for label in chart.curves))
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)}
    last = max(step for chart in charts for curve in chart.curves.values() for step, _ in curve)
    width, (legend, top) = WIDTH * COLUMNS, _legend(colors)
    height = top + HEIGHT * -(-len(charts) // COLUMNS)
    drawn = [legend] + [
        f'<g transform="translate({number % COLUMNS * WIDTH},{top + number // COLUMNS * HEIGHT})">'
        f"{_chart(chart, colors, last)}</g>"
        for number, chart in enumerate(charts)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _chart(chart: Chart, colors: Mapping[str, str], last: int) -> str:
    """Return the drawing of a chart whose steps end at `last`."""
    curves = {label: _thinned([point for point in curve if _is_finite(point)]) for label, curve in chart.curves.items()}
    points = [point for curve in curves.values() for point in curve]
    parts = [f'<text x="{_LEFT}" y="16" font-size="13" font-weight="600" fill="#111827">{escape(chart.title)}</text>']
    if not points:
        return "".join([*parts, f'<text x="{_LEFT}" y="60" fill="#6b7280">no finite values</text>'])
    rows = _ticks(*_range([value for _, value in points]))
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def across(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / last

    def up(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - rows[0]) / (rows[-1] - rows[0])

    for value in rows:
        y = f"{up(value):.1f}"
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end" fill="#6b7280">{value:.5g}</text>')
    for step in (step for step in _ticks(0, last) if step <= last):
        parts.append(
            f'<text x="{across(step):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#6b7280">{step:.6g}</text>'
        )
    for label, curve in curves.items():
        line = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colors[label]}" stroke-width="1.6"/>')
        radius = 2.5 if len(curve) <= 30 else 1
        parts += [
            f'<circle cx="{across(step):.1f}" cy="{up(value):.1f}" r="{radius}" fill="{colors[label]}">'
            f"<title>{escape(label)}: {value:.5g} at step {step}</title></circle>"
            for step, value in curve
        ]
    return "".join(parts)


def _legend(colors: Mapping[str, str]) -> tuple[str, int]:
    """Return what the colours stand for, in rows, and the height of that; nothing for a single one."""
    if len(colors) < 2:
        return "", 0
    parts, left, top = [], _LEFT, 16
    for label, color in colors.items():
        width = 30 + 7 * len(label)
        if left > _LEFT and left + width > WIDTH * COLUMNS:
            left, top = _LEFT, top + 18
        parts.append(f'<rect x="{left}" y="{top - 5}" width="14" height="3" fill="{color}"/>')
        parts.append(f'<text x="{left + 19}" y="{top}" fill="#374151">{escape(label)}</text>')
        left += width
    return "".join(parts), top + 14


def _is_finite(point: tuple[int, float | None]) -> bool:
    return point[1] is not None and math.isfinite(point[1])


def _thinned(curve: Curve) -> Curve:
    if len(curve) <= MOST_POINTS:
        return curve
    last = len(curve) - 1
    return [curve[round(number * last / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        padding = abs(low) / 2 or 0.5
        return low - padding, high + padding
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers, the first at most `low` and the last at least `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * step) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]
