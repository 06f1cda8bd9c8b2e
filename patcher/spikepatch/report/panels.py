"""Small charts in rows as one SVG picture, to be read at 420 pixels: the charts of a column share their axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from markupsafe import Markup, escape

from spikepatch.report.axes import Axis, vertical
from spikepatch.report.document import Chart, Line, number

#: Pixels: of the picture, of a chart, of what is above a row, left of a chart and below the last one.
WIDTH, _HIGH, _ABOVE, _LEFT, _BELOW = 440, 84, 30, 34, 40

#: Values beside an axis at most.
_TICKS = 4


def height(rows: Sequence[Sequence[Chart]]) -> int:
    return len(rows) * (_ABOVE + _HIGH) + _BELOW


def panels(rows: Sequence[Sequence[Chart]]) -> Markup:
    """Rows of as many charts each. A row has the title of its first chart; the lines of a chart are all alike."""
    if not rows:
        return Markup(_text(8, 20, "nothing to draw: no values"))
    columns = list(zip(*rows, strict=True))
    wide = WIDTH / len(columns)
    parts: list[str] = []
    for i, column in enumerate(columns):
        left, right = i * wide + _LEFT, (i + 1) * wide - 8
        x_axis = Axis(0, max(_values(column, 0), default=1), left, right, False, ())
        heights = [v for v in _values(column, 1) if v > 0 or not column[0].log] or [1.0]
        for j, chart in enumerate(column):
            top = j * (_ABOVE + _HIGH) + _ABOVE
            y_axis = vertical(heights, log=chart.log, begin=top + _HIGH, end=top)
            parts += _grid(x_axis, y_axis)
            for line in chart.series:
                parts += _drawn(line, x_axis, y_axis)
        parts.append(_text(right, height(rows) - _BELOW + 16, f"{x_axis.high:,.0f}", "end"))
        parts.append(_text(left, height(rows) - _BELOW + 16, "0"))
        parts.append(_text((left + right) / 2, height(rows) - _BELOW + 16, column[0].x, "middle"))
        parts.append(_text((left + right) / 2, height(rows) - 8, column[0].y, "middle"))
    for j, row in enumerate(rows):
        parts.append(f'<text class="title" x="8" y="{j * (_ABOVE + _HIGH) + 20}">{escape(row[0].title)}</text>')
    return Markup("".join(parts))


def _values(column: Iterable[Chart], place: int) -> Iterator[float]:
    for chart in column:
        for point in (point for line in chart.series for point in line.points):
            value = point[place]
            if value is not None and math.isfinite(value):
                yield value


def _drawn(line: Line, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """The lowest and the highest point of each column of pixels, and a dot on each event."""
    for there, points in groupby(line.points, key=lambda p: _there(p[1], y_axis)):
        if not there:
            continue
        path = []
        for x, column in groupby(points, key=lambda p: round(x_axis(p[0]))):
            heights = [y_axis(y) for _, y in column if y is not None]
            path += [f"{x},{y:.0f}" for y in dict.fromkeys((max(heights), min(heights)))]
        yield f'<polyline class="run" points="{" ".join(path)}"/>'
    for event in line.events:
        y = y_axis(event.y) if event.y is not None and _there(event.y, y_axis) else y_axis.end
        yield f'<circle class="event" cx="{x_axis(event.x):.0f}" cy="{y:.0f}" r="2.5"/>'


def _there(value: float | None, axis: Axis) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


def _grid(x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    for value in y_axis.ticks[:: math.ceil(len(y_axis.ticks) / _TICKS)]:
        at = y_axis(value)
        yield f'<line class="grid" x1="{x_axis.begin}" x2="{x_axis.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield _text(x_axis.begin - 4, at + 4, number(value), "end")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
