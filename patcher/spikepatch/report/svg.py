"""A chart as inline SVG: no script, colours by CSS class, so that the page's light and dark themes apply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from spikepatch.report.document import Chart, Series

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
#: The page's style sheet has a colour and a dash pattern for so many lines.
STYLES = 8


@dataclass(frozen=True)
class _Axis:
    """Values to pixels: ``low`` lies at ``begin``, ``high`` at ``end``."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)


def svg(chart: Chart) -> Markup:
    """The chart; a text where it has nothing to draw."""
    lines = [_drawable(series, chart.log) for series in chart.series]
    points = [point for line in lines for run in line for point in run]
    if not points:
        return Markup('<p class="empty">nothing to draw: no values</p>')
    marks = [(label, y) for label, y in chart.marks if y > 0 or not chart.log]
    x_axis = _Axis(*_padded([x for x, _ in points]), LEFT, WIDTH - RIGHT)
    ys = [*(y for _, y in points), *(y for _, y in marks)]
    low, high = _decades(ys) if chart.log else _rounded(ys)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, chart.log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" class="chart">',
        *_grid(x_axis, y_axis, chart),
        *(_mark(label, y, y_axis) for label, y in marks),
    ]
    for i, (series, line) in enumerate(zip(chart.series, lines, strict=True)):
        parts.append(f'<g class="series s{i % STYLES}" data-name="{escape(series.name)}">')
        parts += [_line(run, x_axis, y_axis) for run in line]
        parts += [f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.5"/>' for run in line for x, y in run]
        parts.append("</g>")
    return Markup("".join([*parts, "</svg>"]))


def _drawable(series: Series, log: bool) -> list[list[tuple[float, float]]]:
    """Runs of neighbouring points that can be drawn."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in series.points:
        if y is None or not math.isfinite(y) or (log and y <= 0):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _line(run: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    points = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in run)
    return f'<polyline points="{points}"/>'


def _mark(label: str, y: float, axis: _Axis) -> str:
    at = axis(y)
    return (
        f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="mark" x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _grid(x_axis: _Axis, y_axis: _Axis, chart: Chart) -> Iterable[str]:
    for y in _log_ticks(y_axis.low, y_axis.high) if chart.log else _ticks(y_axis.low, y_axis.high):
        at = y_axis(y)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>'
    for x in _ticks(x_axis.low, x_axis.high, whole=True):
        yield f'<text x="{x_axis(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x)}</text>'
    yield f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{escape(chart.y)}</text>'


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rounded(values: Sequence[float]) -> tuple[float, float]:
    low, high = _padded(values)
    step = _step(high - low)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The nearest 1, 2 or 5 times a power of ten below and above."""
    steps = [m * 10.0**e for e in range(-45, 45) for m in (1, 2, 5)]
    low = max((s for s in steps if s <= min(values)), default=min(values))
    high = min((s for s in steps if s >= max(values)), default=max(values))
    return (low, high) if high > low else (low / 2, high * 2)


def _step(span: float) -> float:
    """A round number that divides ``span`` into about five."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= span / 5)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    step = max(_step(high - low), 1.0) if whole else _step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    span = math.log10(high / low)
    multiples: Sequence[int] = range(1, 10) if span <= 0.8 else (1, 2, 5) if span <= 2.5 else (1,)
    every = max(1, math.ceil(span / 8))
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents if e % every == 0 for m in multiples]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
