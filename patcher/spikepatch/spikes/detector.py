"""The detector of events, one row at a time; ``events.py`` states the theory.

Legend: x a row's value, of a gradient norm its logarithm; k the rows in a value of a scale.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from spikepatch.errors import Refused
from spikepatch.source.typed import parsed
from spikepatch.spikes.baseline import SLIDING, Baseline, Scale, StepValue, grown, moved, reach
from spikepatch.spikes.events import BACK, BAND, EXPLODED, SETTLED, Event, EventKind
from spikepatch.spikes.excursion import Excursion, belongs, followed, joined, opened
from spikepatch.spikes.statistic import (
    LARGEST,
    RESOLUTION,
    THRESHOLD,
    WARMUP,
    level,
    noise,
    print_step,
    threshold,
)

#: Scales: of the loss 1 to 128 rows; a gradient norm is judged row by row.
_SCALES: dict[EventKind, int] = {"loss": 8, "gradient_norm": 1}

#: A stretch is calm whose noise is at most this many times the one before the event.
_CALM = 4.0


@dataclass(frozen=True)
class Series:
    """One kind's baseline, its excursions (the outermost first), its last rows, and its coarsest print step yet."""

    baseline: Baseline = ()
    open: tuple[Excursion, ...] = ()
    recent: tuple[StepValue, ...] = ()
    digit: float = 1.0

    @property
    def up(self) -> bool:
        """Whether it is above its level, and not for long enough to be judged by a new one."""
        return bool(self.open) and not self.open[-1].settled


@dataclass(frozen=True)
class SpikeDetector:
    """Spikes in a training loop of any kind, one call a step.

        detector = spikepatch.SpikeDetector()
        for step in ...:
            detector = detector.observe(step, loss, gradient_norm)
            if detector.flags: ...

    ``observe`` returns a new detector and changes nothing; ``to_dict`` is the whole state in strict JSON, for a
    checkpoint, and a detector read from it decides the same bits. With several processes, reduce loss and gradient norm
    over them first: then every process decides alike.

    Attributes:
        threshold: in units of the noise's standard deviation, for a long baseline.
        flags: kinds of which the very last row opened an event, or is as high as a row that opens one.
        closed: events that are back, in the order in which they came back.
        loss, gradient_norm: the state of each.
        nonfinite: the stretch of rows under way that are not finite.
        finite: rows since its last one.

    Raises:
        Refused: the threshold is not positive.
    """

    threshold: float = THRESHOLD
    flags: tuple[EventKind, ...] = ()
    closed: tuple[Event, ...] = ()
    loss: Series = Series()
    gradient_norm: Series = Series()
    nonfinite: Event | None = None
    finite: int = 0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise Refused(
                what=f"threshold={self.threshold:g}",
                where="SpikeDetector",
                why="a spike is above its level",
                remedy=f"a positive number of deviations; the default is {THRESHOLD:g}",
            )

    def observe(self, step: int, loss: float | None, gradient_norm: float | None = None) -> SpikeDetector:
        """The state after a row; None for a value that is not known.

        Args:
            step: names the row in events; need not be consecutive.
            loss: of the step, in any unit.
            gradient_norm: before clipping.
        """
        values: dict[EventKind, float | None] = {"loss": loss, "gradient_norm": gradient_norm}
        known = [value for value in values.values() if value is not None]
        broken = any(not abs(value) <= LARGEST for value in known)
        changed: dict[str, Any] = {}
        flags: list[EventKind] = []
        closed: list[Event] = []
        for kind, value in values.items():
            if value is None or not abs(value) <= LARGEST or (kind == "gradient_norm" and value <= 0):
                continue
            changed[kind], flagged, ended = _observed(getattr(self, kind), kind, step, float(value), self.threshold)
            closed += ended
            flags += [kind] * flagged
        if known and (broken or self.nonfinite is not None):
            flags += ["nonfinite"] * broken
            changed["nonfinite"], changed["finite"], ended = _nonfinite(self.nonfinite, self.finite, step, broken)
            closed += ended
        return dataclasses.replace(self, flags=tuple(flags), closed=(*self.closed, *closed), **changed)

    @property
    def under_way(self) -> tuple[Event, ...]:
        """Those that are not back."""
        own = (excursion.event for series in (self.loss, self.gradient_norm) for excursion in series.open)
        return (*own, *([self.nonfinite] if self.nonfinite is not None else []))

    @property
    def up(self) -> tuple[Event, ...]:
        """Of those the ones that the last row belongs to: what is up, and has not settled on another level."""
        own = (series.open[-1].event for series in (self.loss, self.gradient_norm) if series.up)
        return (*own, *([self.nonfinite] if self.nonfinite is not None else []))

    @property
    def events(self) -> tuple[Event, ...]:
        """All of them, in the order of their onsets."""
        return tuple(sorted((*self.closed, *self.under_way), key=lambda event: event.onset))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: no NaN, and every float comes back as the same bits."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpikeDetector:
        """The detector that ``to_dict`` was called on."""
        return parsed(cls, data)


def news(before: SpikeDetector, after: SpikeDetector) -> tuple[Event, ...]:
    """Events that opened or came back from one state to a later one, as they then stood."""
    known = {(event.kind, event.onset) for event in before.under_way}
    opened = (event for event in after.under_way if (event.kind, event.onset) not in known)
    return (*after.closed[len(before.closed) :], *opened)


def _nonfinite(event: Event | None, finite: int, step: int, broken: bool) -> tuple[Event | None, int, list[Event]]:
    """The stretch under way, the finite rows since, and the stretch that has ended."""
    if broken:
        if event is None:
            return Event("nonfinite", step, step), 0, []
        return dataclasses.replace(event, duration=event.duration + finite + 1, back=None), 0, []
    assert event is not None
    event = event if finite else dataclasses.replace(event, back=step)
    return (event, finite + 1, []) if finite + 1 < BACK else (None, 0, [event])


def _observed(
    series: Series, kind: EventKind, step: int, value: float, limit: float
) -> tuple[Series, bool, list[Event]]:
    """The series after a row, whether the row is flagged, and the events that are back."""
    x = math.log(value) if kind == "gradient_norm" else value
    recent = (*series.recent, (step, x))[-SETTLED:]
    digit = series.digit and min(series.digit, print_step(value))
    unit = digit / value if kind == "gradient_norm" else digit
    baseline = series.baseline or (Scale(),) * _SCALES[kind]
    if not series.open:
        found, baseline = _judged(baseline, kind, recent, unit, limit)
        return Series(baseline, (found,) if found else (), recent, digit), found is not None, []

    still, ended = followed(series.open, kind, value, recent)
    if not series.up:
        found, baseline = _judged(baseline, kind, recent, unit, limit)
        if found is not None:
            goes_on = bool(still) and belongs(found, still[-1], baseline[0].level)
            still = [*still[:-1], joined(still[-1], found)] if goes_on else [*still, found]
        return Series(baseline, tuple(still), recent, digit), found is not None, ended
    if len(still) < len(series.open):
        for at, old in recent:
            if at >= (ended[-1].back or 0):
                baseline = grown(baseline, old, at)
        return Series(baseline, tuple(still), recent, digit), False, ended
    last, finest = still[-1], baseline[0]
    unit = max(finest.noise, _floor(kind, last.level, unit))
    flagged = x > last.level + threshold(max(len(finest.values), WARMUP), limit) * unit
    if last.since >= max(SETTLED, last.event.over) and _calm(recent, unit):
        baseline = moved(baseline, recent)
        still[-1] = dataclasses.replace(last, settled=1)
    return Series(baseline, tuple(still), recent, digit), flagged, ended


def _floor(kind: EventKind, at: float, digit: float) -> float:
    """The least unit there."""
    return max(digit, RESOLUTION * (abs(at) if kind == "loss" else 1.0))


def _calm(recent: tuple[StepValue, ...], unit: float) -> bool:
    return noise([x for _, x in recent]) <= _CALM * unit


def _judged(
    baseline: Baseline, kind: EventKind, recent: tuple[StepValue, ...], digit: float, limit: float
) -> tuple[Excursion | None, Baseline]:
    """The excursion that the last row opens, by itself or as the last one of a mean; else the baseline with it."""
    (step, x), finest = recent[-1], baseline[0]
    if len(finest.values) < WARMUP:
        first = finest.values[0] if finest.values else math.inf
        if kind == "loss" and x > EXPLODED * first > 0:
            return opened(kind, recent, 1, step, first, RESOLUTION * first, RESOLUTION * first, 1), baseline
        return None, grown(baseline, x, step)
    for i, scale in enumerate(baseline):
        k = 2**i
        if k > SLIDING or len(scale.values) < WARMUP:
            break
        mean = x if k == 1 else (sum(finest.values[1 - k :]) + x) / k
        if mean - scale.level <= limit * min(scale.noise, scale.near):  # no more than a part of the distance
            continue
        found = _opened(baseline, kind, i, mean, recent[-k][0], recent, digit, limit)
        if found is not None:
            return found, baseline
    means: list[Excursion] = []

    def judge(at: Baseline, i: int, mean: float, begins: int) -> bool:
        if 2**i > SLIDING and len(at[i].values) >= WARMUP:
            found = _opened(at, kind, i, mean, begins, recent, digit, limit)
            means.extend([found] if found is not None else [])
        return not means

    baseline = grown(baseline, x, step, judge)
    return (means[0] if means else None), baseline


def _opened(
    baseline: Baseline, kind: EventKind, i: int, mean: float, begins: int, recent: tuple[StepValue, ...], digit: float,
    limit: float,
) -> Excursion | None:  # fmt: skip
    """The excursion that a mean of 2^i rows opens."""
    scale, k = baseline[i], 2**i
    at = scale.level
    if mean <= at:
        return None
    floor = _floor(kind, at, digit)
    distance, unit = reach(baseline, i, floor, limit)
    if not mean - at > distance:
        return None
    before = 0  # values of this scale that belong to it already
    while k > 1 and before < len(scale.begins) - 1 and scale.values[-1 - before] > at + BAND * unit:
        before += 1
    if before:
        at = min(at, level(scale.values[:-before]))
        begins = min(begins, scale.begins[-before])
    elif k <= SLIDING:
        high = [step for step, x in recent[-k:] if x > at + BAND * max(baseline[0].noise, floor)]
        begins = high[0] if high else begins
    return opened(kind, recent, k, begins, at, unit, max(baseline[0].noise, floor), (before + 1) * k)
