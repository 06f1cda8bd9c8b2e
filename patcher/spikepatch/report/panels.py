"""Pictures: charts below each other with one legend, and small charts in rows, whose columns share their axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from spikepatch.errors import visible
from spikepatch.report.document import Chart
from spikepatch.report.figures import HEIGHT, INK, LARGE, LEFT, RIGHT, Groups, drawn, inside, plain, ticks
from spikepatch.report.svg import is_empty, place, plot, style
from spikepatch.report.thinning import Pixels, runs_of, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Pixels: of a picture of charts, above each of them, a line of its legend, a letter of it, and what is beside a name.
WIDE, _TITLE, _LINE, _LETTER, _SWATCH = 560, 34, 22, 7, 58

#: Pixels: of a picture of panels, a panel, what is above a row, left of a panel and below the last one.
NARROW, _HIGH, _ABOVE, _LEFT, _BELOW = 440, 84, 30, 36, 44


def stacked(charts: Sequence[Chart]) -> tuple[Markup, int, int]:
    """The charts, one below the other, which have the same series; the SVG's inside, its width and height."""
    names = [visible(series.name) for series in charts[0].series] if charts else []
    beside = max(1, WIDE // (_SWATCH + _LETTER * max(map(len, names), default=0)))
    legend = _LINE * -(-len(names) // beside) + 12
    height = len(charts) * (_TITLE + HEIGHT) + legend

    def draw(figure: Figure) -> Groups:
        from matplotlib.lines import Line2D

        groups: Groups = {}
        every = figure.subplots(len(charts), squeeze=False)[:, 0]
        inside(figure, top=_TITLE, bottom=legend + 42)
        figure.subplots_adjust(hspace=(_TITLE + 42) / (HEIGHT - 42))
        for i, (axes, chart) in enumerate(zip(every, charts, strict=True)):
            axes.set_title(visible(chart.title), loc="left", x=-(LEFT - 12) / (WIDE - LEFT - RIGHT), color=INK["text"],
                           fontsize=LARGE + 2, fontweight="semibold")  # fmt: skip
            groups |= plot(axes, chart, WIDE - LEFT - RIGHT, f"{i}-")
        lines = [Line2D([], [], color=style(i)[0], linestyle=style(i)[1], linewidth=1.5) for i in range(len(names))]
        figure.legend(lines, names, loc="lower left", bbox_to_anchor=(0.01, 0), ncols=beside, frameon=False,
                      handlelength=2.4, columnspacing=1.2)  # fmt: skip
        return groups

    if not charts or any(map(is_empty, charts)):
        return Markup('<text x="16" y="24">nothing to draw: no values</text>'), WIDE, 40
    return drawn(draw, WIDE, height, charts), WIDE, height


def panels(rows: Sequence[Sequence[Chart]]) -> tuple[Markup, int, int]:
    """Rows of as many charts each, to be read at 420 pixels; as ``stacked``. A row has the title of its first chart;
    the lines of a chart are all alike.
    """
    if not rows:
        return Markup('<text x="8" y="20">nothing to draw: no values</text>'), NARROW, _BELOW
    height = len(rows) * (_ABOVE + _HIGH) + _BELOW

    def draw(figure: Figure) -> Groups:
        count = len(rows[0])
        every = figure.subplots(len(rows), count, sharex="col", sharey="col", squeeze=False)
        inside(figure, left=_LEFT, right=10, top=_ABOVE, bottom=_BELOW)
        figure.subplots_adjust(hspace=_ABOVE / _HIGH, wspace=_LEFT * count / (NARROW - _LEFT - 10 - _LEFT))
        groups: Groups = {}
        for i, row in enumerate(rows):
            figure.text(8 / NARROW, 1 - (i * (_ABOVE + _HIGH) + 20) / height, visible(row[0].title), color=INK["text"],
                        fontsize=LARGE, fontweight="semibold", gid=f"title-{i}")  # fmt: skip
            groups[f"title-{i}"] = '<g class="title">'
            for axes, chart in zip(every[i], row, strict=True):
                _small(axes, chart, NARROW // count - _LEFT)
        groups |= {"run": '<g class="run">', "event": '<g class="event">'}
        for j, chart in enumerate(rows[-1]):
            plain(every[-1, j], f"{chart.x}; {chart.y}", "")
            low, high = every[-1, j].get_ylim()
            ticks(every[-1, j].yaxis, low, high, log=chart.log, most=4)
            ticks(every[-1, j].xaxis, *every[-1, j].get_xlim(), log=False, whole=True, most=4)
        return groups

    return drawn(draw, NARROW, height, rows), NARROW, height


def _small(axes: Axes, chart: Chart, pixels: int) -> None:
    """The lowest and the highest point of each column of pixels, and a dot on each event."""
    plain(axes, "", "")
    axes.set_yscale("log" if chart.log else "linear")
    runs = [run for line in chart.series for run in runs_of(line, log=chart.log)]
    last = max((run[-1][0] for run in runs), default=1.0)
    for run in runs:
        xs, ys = zip(*thinned(run, Pixels(0, last, pixels), ends=False), strict=True)
        axes.plot(xs, ys, color=INK["s1"], alpha=0.75, linewidth=1, gid="run")
    for event in (event for line in chart.series for event in line.events):
        y, transform = place(axes, event, chart.log)
        axes.plot([event.x], [y], color=INK["bad"], marker="o", markersize=5, linestyle="none", clip_on=False,
                  transform=transform, zorder=5, gid="event")  # fmt: skip
    if runs:
        axes.set_xlim(0, max(last, *axes.get_xlim()))
