"""A judged log as a page: the loss with its level and its events, the gradient norm below, each event from near."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from spikepatch.report.document import Badge, Chart, Line, Mark, Page, Section, Shape, Table, Tone, number
from spikepatch.spikes.conclusion import CurveVerdict
from spikepatch.spikes.events import Event, Origin
from spikepatch.spikes.spike_report import SpikeReport
from spikepatch.spikes.statistic import LEVEL_OF, median

#: From good to bad.
TONES: dict[CurveVerdict, Tone] = {
    "healthy": "good", "blips only": "good", "cannot tell": "neutral", "spikes": "warning", "unstable": "bad",
    "not back": "bad",
}  # fmt: skip

#: Where an event is from, by a twin on the same batches.
ORIGINS: dict[Origin | None, str] = {"data": "both: data", "run": "this run only", None: "-"}

#: Events that are drawn from near; the table has all.
_DRAWN = 24

#: Rows on each side of an event that is drawn from near, at least.
_BESIDE = 24

_SERIES = {"loss": "loss", "gradient_norm": "gradient norm", "nonfinite": "not finite"}

_FOOTER = (
    "An event begins where the loss lies several units of noise above the median of the 8 rows before it, and is back"
    " when the median of 5 rows is within 2 units of that level. Of the rows that share a column of pixels, the lowest"
    " and the highest are drawn."
)


def event_table(report: SpikeReport, *, narrow: bool = False) -> Table:
    """A row for each event; ``narrow``: what fits a terminal of 80 columns."""
    twin = report.twin is not None and report.twin.same_batches
    rows = [
        (
            str(i),
            _SERIES[e.kind],
            e.form or "-",
            str(e.onset),
            str(e.peak),
            number(e.baseline, 4),
            number(e.value, 4),
            number(e.height),
            number(e.score),
            str(e.duration),
            "-" if e.back is None else str(e.back),
            number(e.area),
            *([ORIGINS[e.origin]] if twin else []),
        )
        for i, e in enumerate(report.events, start=1)
    ]
    if narrow:
        short = ("#", "in", "kind", "onset", "peak", "value", "height", "rows", "back at", *(["twin"] if twin else []))
        return Table("", short, tuple((*row[:5], *row[6:8], *row[9:11], *row[12:]) for row in rows))
    units = ("level", "value", "height", "units", "rows", "back at", "nats x steps")
    return Table("Events", ("#", "in", "kind", "onset", "peak", *units, *(["twin"] if twin else [])), tuple(rows))


def spike_page(reports: Sequence[SpikeReport]) -> Page:
    """The page of ``spikepatch spikes``, the worst first."""
    reports = sorted(reports, key=lambda report: -[*TONES].index(report.conclusion.verdict))
    badges = [Badge(r.log.name, r.verdict, TONES[r.conclusion.verdict]) for r in reports]
    sections = [section for report in reports for section in _sections(report)]
    title = f"Spikes: {', '.join(report.log.name for report in reports)}"
    rows = sum(len(report.log.steps) for report in reports)
    return Page(title, f"{rows:,} rows judged", tuple(badges), tuple(sections), _FOOTER)


def _sections(report: SpikeReport) -> Iterator[Section]:
    log = report.log
    charts = [_chart(f"Loss, {log.name}", report, "loss", log.steps, log.losses)]
    if any(norm is not None for norm in log.norms):
        charts.append(_chart(f"Gradient norm, {log.name}", report, "gradient_norm", log.steps, log.norms))
    tables = (event_table(report),) if report.events else ()
    yield Section(log.name, (*report.lines(), *log.describe(), *log.limits()), tables, tuple(charts))
    near = [e for e in report.events if e.kind == "loss"]
    drawn = sorted(sorted(near, key=lambda e: -(e.height or 0.0))[:_DRAWN], key=lambda e: e.onset)
    if drawn:
        left = (f"The {_DRAWN} highest of {len(near)} events of the loss.",) if len(near) > len(drawn) else ()
        yield Section(f"From near, {log.name}", left, charts=tuple(_zoom(report, e) for e in drawn))


def _chart(title: str, report: SpikeReport, kind: str, steps: Sequence[int], values: Sequence[float | None]) -> Chart:
    """The whole series, with what it is judged by."""
    events = [(i, e) for i, e in enumerate(report.events, start=1) if e.kind in (kind, "nonfinite")]
    last = steps[-1] if steps else 0
    series = [Line(_SERIES[kind], _points(steps, values), tuple(_mark(i, e) for i, e in events))]
    if kind == "loss":
        series.append(Line("level", _levels(steps, values)))
    known = [v for v in values if v is not None and math.isfinite(v)]
    wide = bool(known) and min(known) > 0 and (kind != "loss" or max(known) > 10 * min(known))
    spans = tuple((e.onset, last if e.back is None else e.back) for _, e in events)
    unit = "nats per token" if kind == "loss" else "before clipping"
    return Chart(title, "step", unit, tuple(series), log=wide, spans=spans)


def _zoom(report: SpikeReport, event: Event) -> Chart:
    log = report.log
    first = next(i for i, step in enumerate(log.steps) if step >= event.onset)
    beside = max(_BESIDE, event.duration)
    part = slice(max(0, first - beside), first + event.duration + beside)
    steps, values = log.steps[part], log.losses[part]
    number_of = report.events.index(event) + 1
    line = Line("loss", _points(steps, values), (_mark(number_of, event),))
    end = steps[-1] if event.back is None else min(event.back, steps[-1])
    marks = (("level", event.baseline),) if event.baseline is not None else ()
    title = f"{number_of}: {event.form}, from step {event.onset}"
    return Chart(title, "step", "nats per token", (line,), marks=marks, spans=((event.onset, end),))


def _points(steps: Sequence[int], values: Sequence[float | None]) -> tuple[tuple[float, float | None], ...]:
    return tuple((s, v if v is not None and math.isfinite(v) else None) for s, v in zip(steps, values, strict=True))


def _levels(steps: Sequence[int], values: Sequence[float | None]) -> tuple[tuple[float, float | None], ...]:
    """The median of the 8 rows before each."""
    known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
    return tuple((known[i][0], median([v for _, v in known[i - LEVEL_OF : i]])) for i in range(LEVEL_OF, len(known)))


def _mark(i: int, event: Event) -> Mark:
    shapes: dict[str, Shape] = {"loss": "triangle", "gradient_norm": "diamond", "nonfinite": "cross"}
    text = f"{i}: {event.form} from step {event.onset}, {event.status}"
    if event.height is not None:
        text += f"; {number(event.value, 4)} at step {event.peak}, level {number(event.baseline, 4)}"
    return Mark(event.peak, event.value, shapes[event.kind], event.form or "event", str(i), text)
