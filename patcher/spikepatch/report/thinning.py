"""Lines of any length as no more points than there are pixels, with every peak."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from spikepatch.report.document import Line

Vertex = tuple[float, float]

#: Columns of pixels that share a median.
_MEDIAN = 4


def drawable(value: float | None, log: bool) -> bool:
    """Whether a value has a place on an axis."""
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def runs_of(line: Line, *, log: bool, log_x: bool = False) -> list[list[Vertex]]:
    """Neighbouring points that can be drawn."""
    runs: list[list[Vertex]] = [[]]
    for x, y in line.points:
        if y is None or not drawable(y, log) or not drawable(x, log_x):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


@dataclass(frozen=True)
class Pixels:
    """So many columns of pixels, from the first to the last x."""

    first: float
    last: float
    count: int

    def column(self, x: float) -> int:
        return int((x - self.first) / (self.last - self.first) * self.count) if self.last > self.first else 0


def thinned(run: Sequence[Vertex], pixels: Pixels, *, ends: bool = True) -> list[Vertex]:
    """Of each column of pixels the first, the lowest, the highest and the last point: no spike is lost, and the line
    covers the same pixels (M4; Jugel et al. 2014, "M4: A Visualization-Oriented Time Series Data Aggregation"). Without
    ``ends``, the lowest and the highest alone.
    """
    kept: list[Vertex] = []
    for points in _columns(run, pixels, 1):
        heights = [y for _, y in points]
        places = {heights.index(min(heights)), heights.index(max(heights)), *((0, len(points) - 1) if ends else ())}
        kept += [points[i] for i in sorted(places)]
    return kept


def medians(run: Sequence[Vertex], pixels: Pixels) -> list[Vertex]:
    """The median of each few columns of pixels."""
    columns = _columns(run, pixels, _MEDIAN)
    return [(column[len(column) // 2][0], statistics.median(y for _, y in column)) for column in columns]


def _columns(run: Sequence[Vertex], pixels: Pixels, wide: int) -> Iterator[list[Vertex]]:
    for _, column in groupby(run, key=lambda point: pixels.column(point[0]) // wide):
        yield list(column)
