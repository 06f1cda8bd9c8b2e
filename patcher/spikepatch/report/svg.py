"""Charts as SVG: lines of any length with all their peaks, events on top, colours by the page's style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup, escape

from spikepatch.errors import visible
from spikepatch.report.document import Chart, Mark, Shape
from spikepatch.report.figures import (
    HEIGHT,
    INK,
    LEFT,
    RIGHT,
    STYLES,
    WIDTH,
    Groups,
    drawn,
    inside,
    nothing,
    plain,
    ticks,
)
from spikepatch.report.thinning import Pixels, Vertex, drawable, medians, runs_of, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

#: A line of more points is drawn without a dot on each.
_DOTS = 60

Dashes = Literal["-"] | tuple[float, Sequence[float]]

#: How each line is drawn, beside its colour.
DASHES: tuple[Dashes, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

_MARKERS: dict[Shape, str] = {"triangle": "^", "diamond": "D", "cross": "x", "square": "s", "ring": "o"}

#: The same in a legend.
SIGNS: dict[Shape, str] = {"triangle": "▲", "diamond": "◆", "cross": "✕", "square": "■", "ring": "○"}


def svg(chart: Chart) -> Markup:
    """The chart; a text where it has nothing to draw."""
    if is_empty(chart):
        return nothing()

    def draw(figure: Figure) -> Groups:
        inside(figure)
        return plot(figure.subplots(), chart, WIDTH - LEFT - RIGHT)

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    root = f'<svg {size} role="img" aria-label="{escape(chart.title)}" class="chart">'
    return Markup(root) + drawn(draw, WIDTH, HEIGHT, chart) + Markup("</svg>")


def is_empty(chart: Chart) -> bool:
    return not any(runs_of(line, log=chart.log, log_x=chart.log_x) for line in chart.series)


def kinds(chart: Chart) -> dict[str, str]:
    """What the shapes in the chart stand for: a sign each."""
    return {event.kind: SIGNS[event.shape] for series in chart.series for event in series.events}


def style(i: int) -> tuple[str, Dashes]:
    """Colour and dashes of the line in place ``i``."""
    return INK[f"s{i % STYLES}"], DASHES[i % len(DASHES)]


def plot(axes: Axes, chart: Chart, pixels: int, name: str = "") -> Groups:
    """Draw the chart into axes that are so many pixels wide; ``name`` begins the names of its groups."""
    groups: Groups = {}
    lines = [runs_of(line, log=chart.log, log_x=chart.log_x) for line in chart.series]
    events = [[event for event in line.events if event.x > 0 or not chart.log_x] for line in chart.series]
    xs = [x for line in lines for run in line for x, _ in run] + [event.x for own in events for event in own]
    plain(axes, chart.x, chart.y)
    axes.set_yscale("log" if chart.log else "linear")
    axes.set_xscale("log" if chart.log_x else "linear")
    low, high = _x_limits(axes, xs, log=chart.log_x)
    for begin, end in chart.spans:
        if end >= low and begin <= high:
            wide = (high - low) / pixels
            axes.axvspan(max(begin, low), min(max(end, begin + wide), high), color=INK["bad"], alpha=0.14, lw=0,
                         gid=f"{name}span")  # fmt: skip
    groups[f"{name}span"] = '<g class="span">'
    for label, y in chart.marks:
        if drawable(y, chart.log):
            axes.axhline(y, color=INK["bad"], linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(visible(label), (1, y), (0, 3), axes.get_yaxis_transform(), "offset points",
                          ha="right", color=INK["bad"])  # fmt: skip
    for i, (line, runs) in enumerate(zip(chart.series, lines, strict=True)):
        groups[f"{name}series-{i}"] = f'<g class="series" data-name="{escape(visible(line.name))}">'
        _draw_line(axes, runs, i, f"{name}series-{i}", Pixels(low, high, pixels))
    _draw_events(axes, events, chart, name, groups)
    bottom, top = axes.get_ylim()
    ticks(axes.yaxis, bottom, top, log=chart.log)
    ticks(axes.xaxis, low, high, log=chart.log_x, whole=not chart.log_x, values=sorted(set(xs)))
    return groups


def _x_limits(axes: Axes, xs: Sequence[float], *, log: bool) -> tuple[float, float]:
    """Just over all values; a logarithmic axis has margins."""
    low, high = min(xs), max(xs)
    if log:
        margin = (high / low) ** 0.05 if high > low else 2.0
        low, high = low / margin, high * margin
    elif low == high:
        low, high = low - 0.5, high + 0.5
    axes.set_xlim(low, high)
    return low, high


def _draw_line(axes: Axes, runs: Sequence[Sequence[Vertex]], i: int, gid: str, pixels: Pixels) -> None:
    """The line; of one that is so long that it fills an area, this and the line of its medians."""
    colour, dashes = style(i)

    def put(points: Iterable[Vertex], **how: object) -> None:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, gid=gid, **how)  # type: ignore[arg-type]

    for run in runs:
        thin = thinned(run, pixels)
        if len(run) > 2 * pixels.count:
            put(thin, linewidth=0.8, alpha=0.45)
            put(medians(run, pixels), linewidth=1.5, linestyle=dashes)
        elif len(run) > 1:
            put(thin, linewidth=1.5, linestyle=dashes)
    dotted = runs if sum(map(len, runs)) <= _DOTS else [run for run in runs if len(run) == 1]
    if dotted:
        put([point for run in dotted for point in run], linestyle="none", marker="o", markersize=4, clip_on=False)


def place(axes: Axes, event: Mark, log: bool) -> tuple[float, Transform]:
    """The height of an event, and of which coordinates; what has none lies at the top."""
    if event.y is not None and drawable(event.y, log):
        return event.y, axes.transData
    return 1.0, axes.get_xaxis_transform()


def _draw_events(axes: Axes, events: Sequence[Sequence[Mark]], chart: Chart, name: str, groups: Groups) -> None:
    """Shapes on top of all lines; a label that would lie on another is left out."""
    for i, own in enumerate(events):
        colour = INK[f"s{i % STYLES}"]
        for j, event in enumerate(own):
            gid = f"{name}event-{i}-{j}"
            groups[gid] = f'<g class="event {event.shape}"><title>{escape(visible(event.text or event.kind))}</title>'
            hollow = event.shape in ("cross", "ring")
            y, transform = place(axes, event, chart.log)
            axes.plot(
                [event.x], [y], marker=_MARKERS[event.shape], markersize=6.5, linestyle="none", transform=transform,
                clip_on=False, zorder=5, gid=gid, markerfacecolor="none" if hollow else colour,
                markeredgecolor=colour if hollow else INK["card"], markeredgewidth=1.5 if hollow else 0.8,
            )  # fmt: skip
    labelled: list[Vertex] = []
    groups[f"{name}label"] = '<g class="label">'
    for event in (event for own in events for event in own if event.label):
        y, transform = place(axes, event, chart.log)
        at, height = transform.transform((event.x, y))
        if all(abs(at - x) > 8 + 7 * len(event.label) or abs(height - other) > 12 for x, other in labelled):
            labelled.append((at, height))
            axes.annotate(visible(event.label), (event.x, y), (6, -4), transform, "offset points", color=INK["text"],
                          zorder=6, gid=f"{name}label")  # fmt: skip
