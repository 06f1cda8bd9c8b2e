"""The detector, one row at a time; the theory that it follows is stated in ``events.py``."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from spikepatch.errors import Refused
from spikepatch.spikes.events import BACK, BAND, EXPLODED, SETTLED, Event, EventKind
from spikepatch.spikes.statistic import (
    LARGEST,
    RESOLUTION,
    THRESHOLD,
    WARMUP,
    WINDOW,
    level,
    median,
    noise,
    print_step,
    threshold,
)

#: Rows in a value of each scale of the loss; a gradient norm is judged row by row.
SCALES: dict[EventKind, tuple[int, ...]] = {"loss": (1, 2, 4, 8, 16, 32, 64, 128), "gradient_norm": (1,)}

NEAR = 16
SLIDING = 8
FEW = 4

#: Values after which the noise is estimated anew, where the baseline is long.
_AGE = 8


@dataclass(frozen=True)
class Scale:
    """The baseline at one scale: values, the steps that the last ones begin at, their noise and its age in values,
    and the first half of the next value with its step."""

    values: tuple[float, ...] = ()
    begins: tuple[int, ...] = ()
    noise: float = 0.0
    near: float = 0.0
    age: int = 0
    half: tuple[float, int] | None = None

    def then(self, value: float, step: int) -> Scale:
        values = (*self.values, value)[-WINDOW:]
        begins = (*self.begins, step)[-BACK:]
        fresh = len(values) < WARMUP or (self.age + 1 < _AGE and len(values) >= WINDOW // 2)
        if fresh:
            return Scale(values, begins, self.noise, self.near, self.age + 1, None)
        return Scale(values, begins, noise(values), noise(values[-NEAR:]), 0, None)


@dataclass(frozen=True)
class Excursion:
    """An event that is not back, and what its return is judged by.

    Attributes:
        event: as it stands. level, band: what the series has to come back to, and how near.
        rows: since the onset. since: since the peak. settled: that the baseline has gone on without it; 0 while up.
        total, count: of the block under way. low: blocks in a row at the level, the first of which begins at ``begins``
            after ``before`` rows.
    """

    event: Event
    level: float
    top: float
    band: float
    rows: int = 0
    since: int = 0
    settled: int = 0
    total: float = 0.0
    count: int = 0
    low: int = 0
    begins: int = 0


@dataclass(frozen=True)
class Series:
    """One kind's baseline at each scale, its excursions, the outermost first, its last rows, and the step of the
    digits that it is printed with."""

    scales: tuple[Scale, ...] = ()
    open: tuple[Excursion, ...] = ()
    recent: tuple[tuple[int, float], ...] = ()
    digit: float = 1.0

    @property
    def up(self) -> bool:
        """Whether it is above its level, and no other one is taken for it yet."""
        return bool(self.open) and not self.open[-1].settled


@dataclass(frozen=True)
class SpikeDetector:
    """Spikes in a training loop of any kind, one call a step."""

    threshold: float = THRESHOLD
    flags: tuple[EventKind, ...] = ()
    closed: tuple[Event, ...] = ()
    loss: Series = Series()
    gradient_norm: Series = Series()
    nonfinite: Event | None = None
    finite: int = 0

    def observe(self, step: int, loss: float | None, gradient_norm: float | None = None) -> SpikeDetector:
        values: dict[EventKind, float | None] = {"loss": loss, "gradient_norm": gradient_norm}
        known = [value for value in values.values() if value is not None]
        broken = any(not abs(value) <= LARGEST for value in known)
        changed: dict[str, Any] = {}
        flags: list[EventKind] = []
        closed: list[Event] = []
        for kind, value in values.items():
            if value is None or not abs(value) <= LARGEST or (kind == "gradient_norm" and value <= 0):
                continue
            series, flagged, ended = _observed(getattr(self, kind), kind, step, float(value), self.threshold)
            changed[kind] = series
            closed += ended
            if flagged:
                flags.append(kind)
        if known:
            flags.extend(["nonfinite"] if broken else [])
            changed["nonfinite"], changed["finite"], ended = _nonfinite(self.nonfinite, self.finite, step, broken)
            closed += ended
        return dataclasses.replace(self, flags=tuple(flags), closed=(*self.closed, *closed), **changed)

    @property
    def under_way(self) -> tuple[Event, ...]:
        """Those that are not back."""
        own = (excursion.event for series in (self.loss, self.gradient_norm) for excursion in series.open)
        return (*own, *([self.nonfinite] if self.nonfinite else []))

    @property
    def events(self) -> tuple[Event, ...]:
        """All of them, in the order of their onsets."""
        return tuple(sorted((*self.closed, *self.under_way), key=lambda event: event.onset))


def _nonfinite(event: Event | None, finite: int, step: int, broken: bool) -> tuple[Event | None, int, list[Event]]:
    if broken:
        if event is None:
            return Event("nonfinite", step, step), 0, []
        return dataclasses.replace(event, duration=event.duration + finite + 1), 0, []
    if event is None:
        return None, 0, []
    if event.back is None or not finite:
        event = dataclasses.replace(event, back=step)
    if finite + 1 < BACK:
        return dataclasses.replace(event, back=event.back), finite + 1, []
    return None, 0, [event]


def _observed(
    series: Series, kind: EventKind, step: int, value: float, limit: float
) -> tuple[Series, bool, list[Event]]:
    """The series after a row, whether the row is flagged, and the events that have ended with it."""
    x = math.log(value) if kind == "gradient_norm" else value
    recent = (*series.recent, (step, x))[-SETTLED:]
    digit = series.digit and min(series.digit, print_step(value))
    unit = digit / value if kind == "gradient_norm" else digit
    scales = series.scales or tuple(Scale() for _ in SCALES[kind])
    if not series.open:
        found, scales = _judged(scales, kind, step, x, unit, limit, recent)
        return Series(scales, (found,) if found else (), recent, digit), found is not None, []

    up, closed, still = series.up, [], []
    for excursion in series.open:
        after, event = _followed(excursion, kind, step, x, value, recent)
        if event is not None:
            closed.append(event)
        else:
            still.append(after)
    if closed:  # what began within it is over with it
        outer = min(event.onset for event in closed)
        closed += [dataclasses.replace(e.event, back=closed[0].back) for e in still if e.event.onset > outer]
        still = [e for e in still if e.event.onset <= outer]
    if not up:
        found, scales = _judged(scales, kind, step, x, unit, limit, recent)
        if found is None:
            return Series(scales, tuple(still), recent, digit), False, closed
        opened = _continued(still[-1], found) if still and _belongs(still[-1], found) else None
        still = [*still[:-1], opened] if opened else [*still, found]
        return Series(scales, tuple(still), recent, digit), True, closed
    if len(still) < len(series.open):
        for at, old in recent[-BACK:]:
            scales = _grown(scales, old, at)
        return Series(scales, tuple(still), recent, digit), False, closed
    last = still[-1]
    unit = max(scales[0].noise, unit, RESOLUTION * (abs(last.level) if kind == "loss" else 1.0))
    flagged = x > last.level + threshold(len(scales[0].values), limit) * unit
    if last.since >= max(SETTLED, last.event.over):
        scales = _moved(scales, recent)
        still[-1] = dataclasses.replace(last, settled=1)
    return Series(scales, tuple(still), recent, digit), flagged, closed


def _judged(
    scales: tuple[Scale, ...], kind: EventKind, step: int, x: float, digit: float, limit: float,
    recent: tuple[tuple[int, float], ...],
) -> tuple[Excursion | None, tuple[Scale, ...]]:  # fmt: skip
    """The excursion that a row opens, by itself or as the last one of a mean; else the baseline with it."""
    finest = scales[0].values
    for scale, k in zip(scales, SCALES[kind], strict=True):
        if k > SLIDING or len(scale.values) < (WARMUP if k > 1 else 0):
            break
        y, begins = (x, step) if k == 1 else ((math.fsum(finest[1 - k :]) + x) / k, recent[-k][0])
        found = _opened(scales, kind, k, begins, y, digit, limit, recent)
        if found is not None:
            return found, scales
    grown, y, begins = list(scales), x, step
    for i, k in enumerate(SCALES[kind]):
        scale = grown[i]
        if i:
            if scale.half is None:
                grown[i] = dataclasses.replace(scale, half=(y, begins))
                break
            y, begins = (scale.half[0] + y) / 2, scale.half[1]
        if k > SLIDING:
            found = _opened(tuple(grown), kind, k, begins, y, digit, limit, recent)
            if found is not None:
                return found, tuple(grown)
        grown[i] = scale.then(y, begins)
    return None, tuple(grown)


def _reach(scales: tuple[Scale, ...], kind: EventKind, k: int, floor: float, limit: float) -> tuple[float, float]:
    """How far above the level a value is an event, and the noise."""
    wide = near = 0.0
    for scale, size in zip(scales, SCALES[kind], strict=True):
        wide, near = max(scale.noise, wide / math.sqrt(2)), max(scale.near, near / math.sqrt(2))
        if size == k:
            break
    wide, near = max(wide, floor), max(near, floor)
    count = min(len(scales[0].values), FEW * len(scale.values))
    return min(threshold(count, limit) * wide, threshold(min(count, NEAR), limit) * near), wide


def _opened(
    scales: tuple[Scale, ...], kind: EventKind, k: int, begins: int, y: float, digit: float, limit: float,
    recent: tuple[tuple[int, float], ...],
) -> Excursion | None:  # fmt: skip
    scale, rows = scales[SCALES[kind].index(k)], scales[0]
    values, n = scale.values, len(scale.values)
    step, x = recent[-1]
    if n < WARMUP:
        first = values[0] if values else math.inf
        if k > 1 or kind != "loss" or not x > EXPLODED * first > 0:
            return None
        unit = RESOLUTION * first
        event = Event(kind, step, step, x, first, min((x - first) / unit, LARGEST))
        return Excursion(event, first, x, BAND * unit, rows=1)
    at = level(values)
    if y <= at:
        return None
    floor = max(digit, RESOLUTION * (abs(at) if kind == "loss" else 1.0))
    reach, unit = _reach(scales, kind, k, floor, limit)
    if not y - at > reach:
        return None
    back = 0  # values before this one that belong to it
    while k > 1 and back < len(scale.begins) - 1 and values[-1 - back] > at + 3 * unit:
        back += 1
    if back:
        at = min(at, level(values[:-back]))
    onset = min(scale.begins[-back], begins) if back else begins
    if k <= SLIDING:
        high = [row for row in recent[-k:] if row[1] > at + 2 * max(rows.noise, floor)]
        if not back and high:
            onset = high[0][0]
    peak, top = max(recent[-k:], key=lambda row: row[1])
    score = min((top - at) / max(rows.noise, floor), LARGEST) if floor or rows.noise else LARGEST
    raw = (math.exp(top), math.exp(at)) if kind == "gradient_norm" else (top, at)
    event = Event(kind, onset, peak, *raw, score, k, (back + 1) * k)
    return Excursion(event, at, top, BAND * unit, rows=(back + 1) * k)


def _followed(
    e: Excursion, kind: EventKind, step: int, x: float, value: float, recent: tuple[tuple[int, float], ...]
) -> tuple[Excursion, Event | None]:
    """The excursion after one more row, and its event if it is over."""
    event, k = e.event, e.event.over
    rows, since = e.rows + 1, e.since + 1
    if x > e.top and e.settled < WINDOW:
        score = event.score * (x - e.level) / (e.top - e.level) if e.top > e.level else event.score
        event, since = dataclasses.replace(event, peak=step, value=value, score=min(score, LARGEST)), 0
    event = dataclasses.replace(event, duration=rows)
    settled = e.settled + 1 if e.settled else 0
    e = dataclasses.replace(e, event=event, top=max(e.top, x) if e.settled < WINDOW else e.top, rows=rows, since=since, settled=settled)
    if k == 1:
        last = recent[-min(BACK, rows) :]
        if rows <= BACK - 1 or median([v for _, v in last]) > e.level + e.band:
            return e, None
        low = 0
        while low < len(last) and last[-1 - low][1] <= e.level + 2 * e.band:
            low += 1
        low = max(low, 1)
        return e, dataclasses.replace(event, back=last[-low][0], duration=max(rows - low, 1))
    count, total = e.count + 1, e.total + x
    begins = step if count == 1 and not e.low else e.begins
    if count < k:
        return dataclasses.replace(e, count=count, total=total, begins=begins), None
    low = e.low + 1 if total / k <= e.level + e.band else 0
    e = dataclasses.replace(e, count=0, total=0.0, low=low, begins=begins)
    if low < 2:
        return e, None
    return e, dataclasses.replace(event, back=begins, duration=max(rows - 2 * k, 1))


def _belongs(outer: Excursion, found: Excursion) -> bool:
    """Whether the series goes on where it left: it had not come half way back, nor been there for long."""
    return outer.settled < WINDOW and found.level > outer.level + (outer.top - outer.level) / 2


def _continued(outer: Excursion, found: Excursion) -> Excursion:
    event = outer.event
    if found.top > outer.top:
        new = found.event
        score = event.score * (found.top - outer.level) / (outer.top - outer.level)
        event = dataclasses.replace(event, peak=new.peak, value=new.value, score=min(score, LARGEST))
    return dataclasses.replace(outer, event=event, top=max(outer.top, found.top), since=0, settled=0)


def _grown(scales: tuple[Scale, ...], x: float, step: int) -> tuple[Scale, ...]:
    """The baseline with one more row, unjudged."""
    grown, y, begins = list(scales), x, step
    for i, scale in enumerate(grown):
        if i:
            if scale.half is None:
                grown[i] = dataclasses.replace(scale, half=(y, begins))
                break
            y, begins = (scale.half[0] + y) / 2, scale.half[1]
        grown[i] = scale.then(y, begins)
    return tuple(grown)


def _moved(scales: tuple[Scale, ...], recent: tuple[tuple[int, float], ...]) -> tuple[Scale, ...]:
    """The baseline at the level of the last rows, which it takes in: its differences stay, and so does its noise."""
    if scales[0].values:
        by = level([x for _, x in recent]) - level(scales[0].values)
        scales = tuple(
            dataclasses.replace(s, values=tuple(v + by for v in s.values), half=None) for s in scales
        )
    for step, x in recent:
        scales = _grown(scales, x, step)
    return scales
