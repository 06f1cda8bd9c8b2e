"""A chart as inline SVG: no script, colours by CSS class, so that the page's light and dark themes apply."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby

from markupsafe import Markup, escape

from spikepatch.report.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    horizontal,
    names,
    nothing,
    opening,
    vertical,
)
from spikepatch.report.document import Chart, Mark, Shape

#: The page's style sheet has a colour and a dash pattern for so many lines.
STYLES = 8

#: A line of more points is drawn without a dot on each.
_DOTS = 60

#: Columns of pixels that share a median.
_MEDIAN = 4

_PATHS: dict[Shape, str] = {
    "triangle": "M0-6L5.5 4H-5.5Z",
    "diamond": "M0-6L5 0L0 6L-5 0Z",
    "cross": "M-4-4L4 4M-4 4L4-4",
    "square": "M-4-4H4V4H-4Z",
    "ring": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
}

_Point = tuple[float, float]


def svg(chart: Chart) -> Markup:
    """The chart; a text where it has nothing to draw."""
    lines = [_drawable(series.points, chart) for series in chart.series]
    points = [point for line in lines for run in line for point in run]
    if not points:
        return nothing()
    events = [[event for event in series.events if event.x > 0 or not chart.log_x] for series in chart.series]
    marks = [(label, y) for label, y in chart.marks if _fits(y, chart.log)]
    peaks = [e.y for own in events for e in own if e.y is not None and _fits(e.y, chart.log)]
    x_axis = horizontal([*(x for x, _ in points), *(e.x for own in events for e in own)], log=chart.log_x)
    y_axis = vertical([*(y for _, y in points), *(y for _, y in marks), *peaks], log=chart.log)
    parts = [opening(chart.title), *_shades(chart.spans, x_axis), *_grid(x_axis, y_axis), *names(chart.x, chart.y)]
    parts += [_mark(label, y, y_axis) for label, y in marks]
    for i, (series, line) in enumerate(zip(chart.series, lines, strict=True)):
        parts.append(f'<g class="series s{i % STYLES}" data-name="{escape(series.name)}">')
        parts += [polyline for run in line for polyline in _lines(run, x_axis, y_axis)]
        dotted = line if sum(map(len, line)) <= _DOTS else [run for run in line if len(run) == 1]
        parts += [f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.5"/>' for run in dotted for x, y in run]
        parts.append("</g>")
    parts += _events(events, x_axis, y_axis)
    return Markup("".join([*parts, "</svg>"]))


def shape_svg(shape: Shape) -> Markup:
    """The shape alone, for a legend."""
    return Markup(f'<svg viewBox="-8 -8 16 16" class="event {shape}"><path d="{_PATHS[shape]}"/></svg>')


def kinds(chart: Chart) -> dict[str, Shape]:
    """What the shapes in the chart stand for."""
    return {event.kind: event.shape for series in chart.series for event in series.events}


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _drawable(points: Iterable[tuple[float, float | None]], chart: Chart) -> list[list[_Point]]:
    """Runs of neighbouring points that can be drawn."""
    runs: list[list[_Point]] = [[]]
    for x, y in points:
        if y is None or not _fits(y, chart.log) or not _fits(x, chart.log_x):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _lines(run: Sequence[_Point], x_axis: Axis, y_axis: Axis) -> Iterable[str]:
    """The line; of one that is so long that it fills an area, this and the line of its medians."""
    thin = _thinned(run, x_axis)
    dense = len(thin) < len(run) / 2
    yield _polyline(thin, x_axis, y_axis, "area" if dense else "line")
    if dense:
        columns = [list(column) for _, column in groupby(run, key=lambda point: int(x_axis(point[0])) // _MEDIAN)]
        medians = [(column[len(column) // 2][0], statistics.median(y for _, y in column)) for column in columns]
        yield _polyline(medians, x_axis, y_axis, "line")


def _thinned(run: Sequence[_Point], axis: Axis) -> list[_Point]:
    """Of each column of pixels the first, the lowest, the highest and the last point: no spike is lost, and the line
    covers the same pixels (M4; Jugel et al. 2014, "M4: A Visualization-Oriented Time Series Data Aggregation")."""
    kept: list[_Point] = []
    for _, column in groupby(run, key=lambda point: int(axis(point[0]))):
        points = list(column)
        heights = [y for _, y in points]
        places = {0, heights.index(min(heights)), heights.index(max(heights)), len(points) - 1}
        kept += [points[i] for i in sorted(places)]
    return kept


def _polyline(run: Iterable[_Point], x_axis: Axis, y_axis: Axis, kind: str) -> str:
    points = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in run)
    return f'<polyline class="{kind}" points="{points}"/>'


def _events(events: Sequence[Sequence[Mark]], x_axis: Axis, y_axis: Axis) -> Iterable[str]:
    """Shapes on top of all lines; a label that would lie on another is left out."""
    labelled: list[_Point] = []
    for i, own in enumerate(events):
        for event in own:
            x = x_axis(event.x)
            y = y_axis(event.y) if event.y is not None and _fits(event.y, y_axis.log) else TOP
            yield f'<g class="event {event.shape} s{i % STYLES}" transform="translate({x:.1f} {y:.1f})">'
            yield f'<title>{escape(event.text or event.kind)}</title><path d="{_PATHS[event.shape]}"/></g>'
            reach = 8 + 7 * len(event.label)
            if event.label and all(abs(x - at) > reach or abs(y - height) > 12 for at, height in labelled):
                labelled.append((x, y))
                yield f'<text class="label" x="{x + 7:.1f}" y="{y + 4:.1f}">{escape(event.label)}</text>'


def _shades(spans: Iterable[tuple[float, float]], axis: Axis) -> Iterable[str]:
    """At least a pixel wide; what lies outside the axis is left out."""
    for begin, end in spans:
        left, right = axis(max(begin, axis.low)), axis(min(end, axis.high))
        if right >= left:
            size = f'width="{max(right - left, 1):.1f}" height="{HEIGHT - BOTTOM - TOP}"'
            yield f'<rect class="span" x="{left:.1f}" y="{TOP}" {size}/>'


def _mark(label: str, y: float, axis: Axis) -> str:
    at = axis(y)
    return (
        f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="mark" x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _grid(x_axis: Axis, y_axis: Axis) -> Iterable[str]:
    for y in y_axis.ticks:
        at = y_axis(y)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>'
    for x in x_axis.ticks:
        yield f'<text x="{x_axis(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
