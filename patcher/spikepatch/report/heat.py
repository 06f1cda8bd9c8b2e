"""A heat map as SVG around a small image, one pixel a cell, beside a scale that says what a colour stands for."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from spikepatch.errors import visible
from spikepatch.report.document import HeatMap
from spikepatch.report.figures import (
    BOTTOM,
    HEIGHT,
    INK,
    TOP,
    WIDTH,
    Groups,
    drawn,
    inside,
    nothing,
    ticks,
    written,
)
from spikepatch.report.thinning import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Room for the scale at the right, and how wide it is.
_RIGHT, _SCALE = 84, 12

#: Columns that are drawn at most; of the measurements that share one, each row shows its largest value.
COLUMNS = 240

#: Colours of the scale.
_LEVELS = 255


def heat(chart: HeatMap) -> Markup:
    """The heat map with its scale; a text where it has nothing to draw."""
    columns, values = _thinned(chart)
    present = [value for row in values for value in row if value is not None]
    if not present:
        return nothing()
    low, high = chart.scale or (min(present), max(present))
    if low == high:
        low, high = low / 1.1, high * 1.1

    def draw(figure: Figure) -> Groups:
        inside(figure, right=_RIGHT)
        axes = figure.subplots()
        _draw_cells(axes, chart, columns, values, (low, high))
        left, bottom, tall = WIDTH - _RIGHT + 10, BOTTOM / HEIGHT, 1 - (TOP + BOTTOM) / HEIGHT
        _draw_scale(figure.add_axes((left / WIDTH, bottom, _SCALE / WIDTH, tall)), chart.value, low, high)
        return {}

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    root = Markup(f'<svg {size} role="img" aria-label="{escape(chart.title)}" class="chart">')
    whole = len(present) == sum(map(len, values))
    note = Markup("" if whole else '<p class="empty">no colour: no finite value</p>')
    return root + drawn(draw, WIDTH, HEIGHT, chart) + Markup("</svg>") + note


def _draw_cells(
    axes: Axes, chart: HeatMap, columns: Sequence[float], values: Sequence[Sequence[float | None]],
    scale: tuple[float, float],
) -> None:  # fmt: skip
    levels = [[_level(value, *scale) for value in row] for row in values]
    axes.imshow(levels, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto", interpolation="none")
    axes.set_xlabel(visible(chart.x))
    axes.set_ylabel(visible(chart.y))
    every = math.ceil(len(chart.rows) / 12)
    axes.set_yticks(range(0, len(chart.rows), every), [visible(row) for row in chart.rows[::every]])
    axes.tick_params(length=0)
    _step_ticks(axes, columns)
    for spine in axes.spines.values():
        spine.set_color(INK["rule"])


def _step_ticks(axes: Axes, columns: Sequence[float]) -> None:
    """Round numbers at their places between the columns' middles."""
    from matplotlib.ticker import MaxNLocator

    whole = MaxNLocator(6, integer=True).tick_values(columns[0], columns[-1]) if len(columns) > 1 else columns
    places = {}
    for x in (float(x) for x in whole if columns[0] <= x <= columns[-1]):
        i = max(bisect.bisect_right(columns, x) - 1, 0)
        part = (x - columns[i]) / (columns[i + 1] - columns[i]) if i + 1 < len(columns) else 0.0
        places[i + part] = written(x)
    axes.set_xticks([*places], [*places.values()])


def _draw_scale(axes: Axes, name: str, low: float, high: float) -> None:
    """The colours from the least to the most, with values beside them."""
    axes.imshow([[i / (_LEVELS - 1)] for i in range(_LEVELS)], cmap="viridis", vmin=0, vmax=1, origin="lower",
                aspect="auto", interpolation="none", extent=(0, 1, 0, 1))  # fmt: skip
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_xlabel(visible(name))
    axes.yaxis.tick_right()
    ticks(axes.yaxis, low, high, log=True)
    found = [float(value) for value in axes.yaxis.get_major_locator().tick_values(low, high)]
    margin = 10 ** (0.08 * (math.log10(high) - math.log10(low)))
    values = [low, *(v for v in found if low * margin < v < high / margin), high]
    axes.set_yticks([_level(value, low, high) for value in values], [f"{value:.3g}" for value in values])
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _thinned(chart: HeatMap) -> tuple[list[float], list[list[float | None]]]:
    """At most ``COLUMNS`` columns; the largest value of those that are joined, for a spike must not disappear."""
    per = math.ceil(len(chart.columns) / COLUMNS) or 1
    starts = range(0, len(chart.columns), per)
    joined = [[_largest(row[i : i + per]) for i in starts] for row in chart.values]
    return [chart.columns[i] for i in starts], joined


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None and drawable(value, log=True)), default=None)


def _level(value: float | None, low: float, high: float) -> float:
    """From 0 to 1, by its logarithm; NaN, which has no colour, for None."""
    if value is None:
        return math.nan
    return min(max((math.log(value) - math.log(low)) / (math.log(high) - math.log(low)), 0.0), 1.0)
