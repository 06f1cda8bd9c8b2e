"""An event that is not back: how it opens, what it is followed by, and when it is over."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from spikepatch.spikes.baseline import StepValue
from spikepatch.spikes.events import BACK, BAND, SETTLED, Event, EventKind
from spikepatch.spikes.statistic import LARGEST, WINDOW, median


@dataclass(frozen=True)
class Excursion:
    """An event that is not back, and what its return is judged by.

    Attributes:
        level, top, band: of x: the level before, the peak, and how near to the level counts as back.
        rows, since: since the onset and since the peak. settled: since the baseline goes on without it; 0 while up.
        total, count: of the mean under way. low: means in a row at the level, the first of which began at ``begins``.
    """

    event: Event
    level: float
    top: float
    band: float
    rows: int = 1
    since: int = 0
    settled: int = 0
    total: float = 0.0
    count: int = 0
    low: int = 0
    begins: int = 0


def opened(
    kind: EventKind,
    recent: tuple[StepValue, ...],
    k: int,
    onset: int,
    at: float,
    unit: float,
    of_rows: float,
    rows: int,
) -> Excursion:
    peak, top = max(recent[-k:], key=lambda row: row[1])
    score = min((top - at) / of_rows, LARGEST) if of_rows else LARGEST
    value, base = (math.exp(top), math.exp(at)) if kind == "gradient_norm" else (top, at)
    return Excursion(Event(kind, onset, peak, value, base, score, k, rows), at, top, BAND * unit, rows)


def followed(
    open_: tuple[Excursion, ...], kind: EventKind, value: float, recent: tuple[StepValue, ...]
) -> tuple[list[Excursion], list[Event]]:
    """Those that are not back after one more row, and the events of those that are."""
    still: list[Excursion] = []
    ended: list[Event] = []
    for excursion in open_:
        after, event = _followed(excursion, value, recent)
        if ended and event is None:  # what began within an excursion is over with it
            event = dataclasses.replace(after.event, back=ended[0].back)
        if event is None:
            still.append(after)
        else:
            ended.append(event)
    return still, ended


def _followed(e: Excursion, value: float, recent: tuple[StepValue, ...]) -> tuple[Excursion, Event | None]:
    """The excursion after one more row, and its event if it is back."""
    (step, x), k = recent[-1], e.event.over
    event = dataclasses.replace(e.event, duration=e.rows + 1)
    settled = e.settled + 1 if e.settled else 0
    e = dataclasses.replace(e, event=event, rows=e.rows + 1, since=e.since + 1, settled=settled)
    if x > e.top and settled < WINDOW:
        e = _higher(e, step, value, x)
        event = e.event
    if k == 1:
        count = min(max(BACK, e.rows // 4), SETTLED)
        last = recent[-count:]
        if e.rows <= count or median([v for _, v in last]) > e.level + e.band:
            return e, None
        low = 1
        while low < count and last[-1 - low][1] <= e.level + 2 * e.band:
            low += 1
        return e, dataclasses.replace(event, back=last[-low][0], duration=max(e.rows - low, 1))
    begins = step if not e.count and not e.low else e.begins
    e = dataclasses.replace(e, count=e.count + 1, total=e.total + x, begins=begins)
    if e.count < k:
        return e, None
    low = e.low + 1 if e.total / k <= e.level + e.band else 0
    back = dataclasses.replace(event, back=begins, duration=max(e.rows - 2 * k, 1)) if low == 2 else None
    return dataclasses.replace(e, count=0, total=0.0, low=low), back


def _higher(e: Excursion, step: int, value: float, x: float) -> Excursion:
    """With a new peak."""
    height = e.top - e.level
    score = (e.event.score or 0.0) * (x - e.level) / height if height > 0 else LARGEST
    event = dataclasses.replace(e.event, peak=step, value=value, score=min(score, LARGEST))
    return dataclasses.replace(e, event=event, top=x, since=0)


def belongs(found: Excursion, outer: Excursion, now: float) -> bool:
    """Whether it goes on with ``outer``: the series, at the level ``now``, had not come half way back, nor been
    elsewhere for long, in rows of what shows it."""
    long = max(WINDOW, 2 * SETTLED * found.event.over)
    return outer.settled < long and now > outer.level + (outer.top - outer.level) / 2


def joined(outer: Excursion, found: Excursion) -> Excursion:
    outer = dataclasses.replace(outer, settled=0, since=0)
    value = found.event.value
    return _higher(outer, found.event.peak, value or 0.0, found.top) if found.top > outer.top else outer
