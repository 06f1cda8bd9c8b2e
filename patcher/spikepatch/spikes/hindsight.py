"""The events of a whole curve: the detector's, refined by what came after, and named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spikepatch.spikes.detector import SpikeDetector
from spikepatch.spikes.events import BACK, BAND, Event, Form
from spikepatch.spikes.statistic import LAGS, LARGEST, LEVEL_OF, RESOLUTION, WARMUP, WINDOW, noise

Array = npt.NDArray[np.float64]

#: An excursion is two events where it has come back by so much of the lower one of two peaks between them.
_VALLEY = 0.75

#: Units above the levels before and after that a faint event has.
_FAINT = 5.0

#: Faint events are believed where there are so many of them for each stretch that lies as far below, and one more.
_BELIEVED = 10

#: Units that medians of 8 rows may lie above the lowest one before without an event.
_CREPT = 10.0

#: A last quarter of the rows that lies so far above the first 8, relative to them, and so many standard errors.
_LOST, _SURE = 0.25, 4.0

#: Standard error of a median of many values, over that of their mean.
_OF_MEDIAN = math.sqrt(math.pi / 2)

#: Rows in which a loss rises at once, and after which a spike is a long one.
_AT_ONCE, _LONG = 8, WINDOW

#: Rows after the last one of an event of the gradient norm in which an event of the loss is its trace: Adam's momentum
#: (beta1 = 0.9) carries one gradient for 1 / (1 - 0.9) of them.
_ECHO = 10


@dataclass(frozen=True)
class Curve:
    """A curve to be judged; None for a value that is not known, NaN for one that is not finite."""

    steps: Sequence[int]
    losses: Sequence[float | None]
    norms: Sequence[float | None]


def with_hindsight(rows: Curve) -> tuple[Event, ...]:
    """All events of a curve, in the order of their onsets, each with its form.

    Where this differs from what the detector said row by row:

    - an event that only means of several rows could show begins at its first row, not at a mean's;
    - an excursion with a valley between two peaks, more than three quarters of the way back from the lower one, is two
      events, and the first one is back in the valley;
    - at the end of the log fewer rows at the level are enough for it to be back;
    - what crept up so slowly, or within so few rows, that the baseline went with it is an event: medians of 8 rows more
      than 10 units above the lowest one before; or, in however much noise, a last quarter that lies a quarter above the
      first 8 rows and four standard errors;
    - rows that stand 5 units above the levels on both sides of them are events too, where the curve has ten of them for
      each stretch that lies as far below its levels, and one more: noise falls as often as it rises, so that at most a
      tenth of them is noise (the target-decoy estimate; Barber and Candes 2015, arXiv 1404.5609).
    """
    detector = SpikeDetector()
    for step, loss, norm in zip(rows.steps, rows.losses, rows.norms, strict=True):
        detector = detector.observe(step, loss, norm)
    where = [i for i, loss in enumerate(rows.losses) if loss is not None and abs(loss) <= LARGEST]
    x, steps = np.array([rows.losses[i] for i in where], dtype=float), np.array([rows.steps[i] for i in where])
    curve = _FiniteRows(x, steps)
    losses = [part for e in detector.events if e.kind == "loss" for part in _parts(curve, _placed(curve, e))]
    losses = [e for e in losses if not any(_within(curve, e, other) for other in losses)]
    losses += _faint(curve, losses)
    losses += _crept(curve, losses)
    losses += _risen(curve, losses)
    losses = [_named(curve, e) for e in losses]
    norms = [_traced(e, losses, rows.steps) for e in detector.events if e.kind == "gradient_norm"]
    broken = [dataclasses.replace(e, form="non-finite") for e in detector.events if e.kind == "nonfinite"]
    found = [*losses, *norms, *broken]
    return tuple(sorted(found, key=lambda e: (e.onset, e.kind)))


@dataclass(frozen=True)
class _FiniteRows:
    """The finite losses, and their steps."""

    x: Array
    steps: npt.NDArray[np.int64]

    def row(self, step: int) -> int:
        """The first row of that step or of a later one."""
        return int(np.searchsorted(self.steps, step))

    def span(self, event: Event) -> tuple[int, int]:
        """Its rows: the first one, and the one after the last."""
        first = self.row(event.onset)
        return first, max(first + 1, len(self.x) if event.back is None else self.row(event.back))


def _unit(event: Event) -> float:
    """The noise of single rows that its height was counted in."""
    return (event.height or 0.0) / event.score if event.score else 0.0


def _placed(curve: _FiniteRows, event: Event) -> Event:
    """From its first row that is above the level, with the peak that its rows have."""
    first, end = curve.span(event)
    assert event.baseline is not None
    high = event.baseline + BAND * _unit(event)
    if event.over > 1:
        reach = max(0, first - 2 * event.over)
        while first > reach and curve.x[first - 1] > high:
            first -= 1
    while first + 1 < end and curve.x[first] <= high:
        first += 1
    back = event.back
    if back is None and event.over == 1:  # rows at the level at the end of the log are too few for the detector
        low = 0
        while end - low - 1 > first and curve.x[end - low - 1] <= event.baseline + 2 * BAND * _unit(event):
            low += 1
        enough = low > (0 if end - low - first < BACK else BACK // 2)
        if enough and float(np.median(curve.x[end - low : end])) <= high:
            end -= low
            back = int(curve.steps[end])
    return _between(curve, event, first, end, back)


def _between(curve: _FiniteRows, event: Event, first: int, end: int, back: int | None) -> Event:
    """The part of the event that is these rows."""
    unit, base = _unit(event), event.baseline or 0.0
    peak = first + int(np.argmax(curve.x[first:end]))
    value = float(curve.x[peak])
    score = min((value - base) / unit, LARGEST) if unit else event.score
    return dataclasses.replace(
        event, onset=int(curve.steps[first]), peak=int(curve.steps[peak]), value=value, score=score and float(score),
        duration=end - first, back=back,
    )  # fmt: skip


def _parts(curve: _FiniteRows, event: Event) -> Iterator[Event]:
    """The event, or the ones that it is cut into at its valleys."""
    first, end = curve.span(event)
    base = event.baseline or 0.0
    least = max(7 * _unit(event), RESOLUTION * abs(base))
    cuts, peak, valley, low = [], -math.inf, math.inf, first
    for i in range(first, end):
        excess = float(curve.x[i]) - base
        if excess > peak and valley == math.inf:
            peak = excess
        elif excess < valley:
            valley, low = excess, i
        lower = min(peak, excess)
        if low > first and lower - valley > max(_VALLEY * lower, least):
            cuts.append(low)
            peak, valley = excess, math.inf
        elif excess >= peak:  # a higher peak without a valley worth a cut
            peak, valley = excess, math.inf
    for begin, cut in zip([first, *cuts], [*cuts, end], strict=True):
        last = cut == end
        inner = begin if begin == first else begin + 1
        yield _between(curve, event, min(inner, cut - 1), cut, event.back if last else int(curve.steps[cut]))


def _crept(curve: _FiniteRows, found: Sequence[Event]) -> Iterator[Event]:
    """What crept up so slowly, or so early, that the baseline went with it: medians of 8 rows far above the lowest one
    before."""
    taken = np.zeros(len(curve.x), dtype=bool)
    for event in found:
        taken[slice(*curve.span(event))] = True
    count = len(curve.x) // LEVEL_OF
    medians = np.median(curve.x[: count * LEVEL_OF].reshape(count, LEVEL_OF), axis=1)
    at, unit, i = 0, math.inf, 1
    while i < count:
        if medians[i] < medians[at] or unit == math.inf:
            at = i if medians[i] < medians[at] else at
            rows = curve.x[max(0, (at + 1) * LEVEL_OF - WINDOW) : (at + 1) * LEVEL_OF]
            blocks = medians[max(0, at + 1 - WINDOW) : at + 1]
            wander = noise(blocks.tolist()) if len(blocks) >= WARMUP else 0.0
            unit = max(noise(rows.tolist()), wander, RESOLUTION * abs(medians[at]))
        level = float(medians[at])
        if medians[i] - level > _CREPT * unit and not taken[i * LEVEL_OF : (i + 1) * LEVEL_OF].any():
            first = i * LEVEL_OF
            while curve.x[first - 1] > level + BAND * unit:
                first -= 1
            after = np.flatnonzero(medians[i:] <= level + BAND * unit)
            end = (i + int(after[0])) * LEVEL_OF if len(after) else len(curve.x)
            back = int(curve.steps[end]) if end < len(curve.x) else None
            top = float(curve.x[first:end].max())
            event = Event("loss", 0, 0, top, level, (top - level) / unit, LEVEL_OF)
            yield _between(curve, event, first, end, back)
            i = end // LEVEL_OF
        i += 1


def _risen(curve: _FiniteRows, found: Sequence[Event]) -> Iterator[Event]:
    """A curve that ends far above where it began, though no row stands out of the noise: what was learned is lost."""
    tail = max(2 * LEVEL_OF, len(curve.x) // 4)
    if len(curve.x) < 2 * tail or any(curve.span(event)[1] == len(curve.x) for event in found):
        return
    begin, end = float(np.median(curve.x[:LEVEL_OF])), float(np.median(curve.x[-tail:]))
    before, after = (max(noise(x.tolist()), RESOLUTION * abs(begin)) for x in (curve.x[:WINDOW], curve.x[-tail:]))
    unit, error = max(before, after), _OF_MEDIAN * math.hypot(before / math.sqrt(LEVEL_OF), after / math.sqrt(tail))
    if begin < 2 * unit or end - begin < max(_LOST * begin, _SURE * error):  # the first: near 0, as rewards are
        return
    low = begin + _LOST * begin
    medians = np.median(np.lib.stride_tricks.sliding_window_view(curve.x, LEVEL_OF), axis=1)
    below = np.flatnonzero(medians <= low)
    first = int(below[-1]) + LEVEL_OF if len(below) else LEVEL_OF
    top = float(curve.x[first:].max())
    event = Event("loss", 0, 0, top, begin, (top - begin) / unit, LEVEL_OF)
    yield _between(curve, event, first, len(curve.x), None)


def _within(curve: _FiniteRows, event: Event, other: Event) -> bool:
    """Whether it is a peak of the other one, which is no long one."""
    (first, end), (begin, stop) = curve.span(event), curve.span(other)
    return (first, end) != (begin, stop) and begin <= first and end <= stop and stop - begin <= _LONG


def _faint(curve: _FiniteRows, found: Sequence[Event]) -> list[Event]:
    """Single rows and what follows them, too low for the detector, where they recur."""
    taken = np.zeros(len(curve.x), dtype=bool)
    for event in found:
        first, end = curve.span(event)
        taken[max(0, first - 1) : end + 1] = True
    up, level, unit = _apart(curve.x)
    down = _apart(-curve.x)[0]
    rows = _groups(np.flatnonzero(up))
    if len(rows) < _BELIEVED * (1 + len(_groups(np.flatnonzero(down)))):
        return []
    events = []
    for first, last in rows:
        if taken[first : last + 1].any():
            continue
        end = last + 1
        while end < len(curve.x) and not taken[end] and curve.x[end] > level[first] + 2 * BAND * unit[first]:
            end += 1
        back = int(curve.steps[end]) if end < len(curve.x) else None
        value, base = float(curve.x[first]), float(level[first])
        event = Event(
            "loss", int(curve.steps[first]), int(curve.steps[first]), value, base, (value - base) / float(unit[first])
        )
        events.append(_between(curve, event, first, end, back))
    return events


def _apart(x: Array) -> tuple[npt.NDArray[np.bool_], Array, Array]:
    """Rows that stand out upwards; the level that each one stands on, and the unit there.

    The level is the higher one of the medians of the 8 rows before and of the 8 after; the noise that of the 64 rows
    before and the 64 after, estimated for 8 rows together.
    """
    n = len(x)
    out, level, unit = np.zeros(n, dtype=bool), np.full(n, np.inf), np.ones(n)
    if n < 2 * WINDOW:
        return out, level, unit
    medians = np.median(np.lib.stride_tricks.sliding_window_view(x, LEVEL_OF), axis=1)
    inner = slice(LEVEL_OF, n - LEVEL_OF)
    level[inner] = np.maximum(medians[: n - 2 * LEVEL_OF], medians[LEVEL_OF + 1 :])
    centres = np.arange(0, n, LEVEL_OF)
    starts = np.clip(centres - WINDOW, 0, n - 2 * WINDOW)
    noise = np.zeros(len(centres))
    for some in range(0, len(centres), 4096):
        windows = np.lib.stride_tricks.sliding_window_view(x, 2 * WINDOW)[starts[some : some + 4096]]
        for lag in LAGS:
            d = windows[:, lag:] - windows[:, :-lag]
            d = np.abs(d - np.median(d, axis=1, keepdims=True))
            at = slice(some, some + len(windows))
            noise[at] = np.maximum(noise[at], 1.4826 / math.sqrt(2) * np.median(d, axis=1))
    unit = np.maximum(np.repeat(noise, LEVEL_OF)[:n], RESOLUTION * np.abs(x))
    out[inner] = (x - level)[inner] > _FAINT * unit[inner]
    return out, level, unit


def _groups(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours together: the first and the last row of each group."""
    groups: list[tuple[int, int]] = []
    for row in map(int, rows):
        if groups and row - groups[-1][1] <= 2:
            groups[-1] = groups[-1][0], row
        else:
            groups.append((row, row))
    return groups


def _named(curve: _FiniteRows, event: Event) -> Event:
    """With its form and its area."""
    first, end = curve.span(event)
    excess = curve.x[first:end] - (event.baseline or 0.0)
    steps = np.diff(curve.steps[first : end + 1]) if end < len(curve.x) else np.diff(curve.steps[first:end])
    width = np.append(steps, [1] * (end - first - len(steps)))
    area = float(np.sum(np.maximum(excess, 0.0) * width))
    return dataclasses.replace(event, form=_form(event, excess), area=area)


def _form(event: Event, excess: Array) -> Form:
    rows, back = len(excess), event.back is not None
    height = float(excess.max())
    if (back or rows == 1) and int(np.sum(excess > 2 * BAND * _unit(event))) <= 1 and rows <= LEVEL_OF:
        return "blip"
    rise = int(np.argmax(excess > 0.75 * height)) + 1
    if rise > _AT_ONCE and not (back and 5 * rise <= rows):
        return "hump" if back else "slow rise"
    highest = float(np.median(np.sort(excess)[-max(1, rows // 20) :]))
    if rows >= 4 * _AT_ONCE and float(np.median(excess[: rows // 2])) > 0.72 * highest:
        return "level shift"
    if not back:
        return "not back"
    return "spike" if rows <= _LONG else "long spike"


def _traced(event: Event, losses: Sequence[Event], steps: Sequence[int]) -> Event:
    """Whether an event of the loss is beside it."""
    rows = np.asarray(steps)
    last = min(int(np.searchsorted(rows, event.onset)) + event.duration - 1 + _ECHO, len(rows) - 1)
    end = int(rows[last])
    beside = any(e.onset <= end and (e.back is None or e.back >= event.onset) for e in losses)
    return dataclasses.replace(event, trace=beside, form="blip" if event.duration == 1 else "spike")
