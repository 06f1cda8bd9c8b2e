"""What a curve's events amount to: a verdict of a few words, and the line that says it, with its size and its range."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spikepatch.spikes.events import Event
from spikepatch.spikes.hindsight import Curve
from spikepatch.spikes.statistic import LARGEST, LEVEL_OF, WARMUP, median

CurveVerdict = Literal["healthy", "blips only", "spikes", "unstable", "not back", "cannot tell"]

#: Verdicts with which an exit code is 0.
PASSED: frozenset[CurveVerdict] = frozenset({"healthy", "blips only"})

#: Judged rows that the absence of spikes needs: with as many in its baseline the threshold is within a quarter of its
#: least.
LEAST_ROWS = 32

#: Events that make a stretch unstable, where the gaps between them are shorter than the longest of them.
_UNSTABLE = 3


@dataclass(frozen=True)
class Conclusion:
    """The verdict of a curve.

    Attributes:
        verdict: in two words at most.
        text: as a line.
        judged: steps of the first and the last row that were judged; None where none was.
        rows: how many were.
        largest: the largest excess of the loss over its level, in nats. at: its step. None where no row was judged.
    """

    verdict: CurveVerdict
    text: str
    judged: tuple[int, int] | None
    rows: int
    largest: float | None
    at: int | None


def conclude(rows: Curve, events: Sequence[Event], *, after: int = 0, shortest: int = 1) -> Conclusion:
    """The verdict, by the loss and by rows that are not finite; the gradient norm has a line of its own, ``norm_line``.

    Args:
        events: of ``with_hindsight``.
        after: steps of a warm-up; fewer than 32 judged rows after them are too few to say that there is no spike.
        shortest: steps of the shortest spike that the log can show.
    """
    finite = [(step, x) for step, x in zip(rows.steps, rows.losses, strict=True) if x is not None and abs(x) <= LARGEST]
    judged = finite[WARMUP:]
    span = (judged[0][0], judged[-1][0]) if judged else None
    seen = [e for e in events if e.kind != "gradient_norm"]
    largest, at = _largest(finite, seen)
    verdict, text = _verdict(seen, rows, span, sum(step > after for step, _ in judged), after, shortest)
    if verdict in PASSED and largest:
        text += f"; largest excess {largest:.3g} nats at step {at}"
    return Conclusion(verdict, text, span, len(judged), largest, at)


def norm_line(events: Sequence[Event]) -> str | None:
    """Events of the gradient norm, which decide nothing; None without any."""
    norms = [e for e in events if e.kind == "gradient_norm"]
    if not norms:
        return None
    traced, highest = sum(bool(e.trace) for e in norms), max(norms, key=lambda e: e.score or 0.0)
    return (
        f"gradient norm: {_count(len(norms), 'event')}, {traced} with and {len(norms) - traced} without a trace in the"
        f" loss; highest {highest.value:.3g} over {highest.baseline:.3g} at step {highest.peak}"
    )


def _verdict(
    seen: Sequence[Event], rows: Curve, span: tuple[int, int] | None, judged: int, after: int, shortest: int
) -> tuple[CurveVerdict, str]:
    last = rows.steps[-1] if rows.steps else 0
    gone = [e for e in seen if e.back is None and e.form != "blip"]
    spikes = [e for e in seen if e.back is not None and e.form not in ("blip", None)]
    blips = [e for e in seen if e.form == "blip"]
    stretch = _stretch([e for e in seen if e.form != "blip"], last)
    single = [f"{_count(len(blips), 'blip')} of one row"] if blips else []
    beside = [*([_counted(spikes)] if spikes else []), *single]
    if gone:
        return "not back", "; ".join([_not_back(min(gone, key=lambda e: e.onset), rows), *beside])
    if stretch:
        inside = [e for e in spikes if stretch[0] <= e.onset <= stretch[1]]
        high = max(inside, key=lambda e: e.height or 0.0)
        others = [_counted([e for e in spikes if e not in inside])] if len(spikes) > len(inside) else []
        told = f"unstable from step {stretch[0]} to {stretch[1]}: {_count(len(inside), 'event')}, {_highest(high)}"
        return "unstable", "; ".join([told, *others, *single])
    if spikes:
        return "spikes", "; ".join(beside)
    if span is None or judged < LEAST_ROWS:
        behind, verb = " after the warm-up" if after else "", "is" if judged == 1 else "are"
        return "cannot tell", f"cannot tell: {_count(judged, 'row')}{behind} {verb} judged, {LEAST_ROWS} are needed"
    of = f" of {shortest} steps or more" if shortest > 1 else ""
    none = f"no spike{of} in steps {span[0]} to {span[1]}"
    if blips:
        high = max(blips, key=lambda e: e.height or 0.0)
        return "blips only", f"{_count(len(blips), 'blip')} of one row, {_highest(high)}; else {none}"
    return "healthy", none


def _counted(spikes: Sequence[Event]) -> str:
    """How many of each form, all back; the longest, the highest, and all together."""
    forms = Counter("non-finite stretch" if e.form == "non-finite" else e.form for e in spikes)
    told = " and ".join(_count(n, str(form)) for form, n in forms.items())
    back = "all back" if len(spikes) > 1 else "back"
    longest = max(spikes, key=lambda e: e.duration)
    parts = [f"{told}, {back}: longest {_count(longest.duration, 'row')} from step {longest.onset}"]
    high = max(spikes, key=lambda e: e.height or 0.0)
    if high.height is not None:
        parts += [_highest(high), f"{math.fsum(e.area or 0.0 for e in spikes):.3g} nats x steps in all"]
    return ", ".join(parts)


def _highest(event: Event) -> str:
    if event.height is None:
        return "not finite"
    return f"highest +{event.height:.3g} nats at step {event.peak}"


def _not_back(event: Event, rows: Curve) -> str:
    count = sum(step >= event.onset for step in rows.steps)
    if event.kind == "nonfinite":
        return f"not back since step {event.onset}: not finite, {_count(count, 'row')}"
    ends = [x for step, x in zip(rows.steps, rows.losses, strict=True) if step >= event.onset and x is not None]
    end = median(ends[-5:])
    how = {"slow rise": "it rises slowly, ", "level shift": "it stays on another level, "}.get(event.form or "", "")
    return (
        f"not back since step {event.onset}: {how}from {event.baseline:.4g} to {event.value:.4g} at step {event.peak},"
        f" {end:.4g} at the end, {_count(count, 'row')} later"
    )


def _stretch(events: Sequence[Event], last: int) -> tuple[int, int] | None:
    """The longest chain of events with gaps between them that are shorter than the longest of them."""
    best: tuple[int, int] | None = None
    chain: list[Event] = []
    for event in sorted(events, key=lambda e: e.onset):
        if chain:
            end = max(_end(e, last) for e in chain)
            lasted = max(_end(e, last) - e.onset for e in (*chain, event))
            if event.onset - end >= lasted:
                chain = []
        chain.append(event)
        if len(chain) >= _UNSTABLE:
            span = chain[0].onset, max(_end(e, last) for e in chain)
            if best is None or span[1] - span[0] > best[1] - best[0]:
                best = span
    return best


def _end(event: Event, last: int) -> int:
    return last if event.back is None else event.back


def _largest(finite: Sequence[tuple[int, float]], events: Sequence[Event]) -> tuple[float | None, int | None]:
    """The largest height of an event; without any, of a row above the median of the 8 before it."""
    values = [x for _, x in finite]
    heights = [(e.height, e.peak) for e in events if e.height is not None] or [
        (max(values[i] - median(values[i - LEVEL_OF : i]), 0.0), finite[i][0]) for i in range(WARMUP, len(finite))
    ]
    return max(heights, default=(None, None), key=lambda pair: pair[0] or 0.0)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"
