"""A training log of any kind that is known, as rows that can be judged, and what was done to it on the way."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikepatch.errors import Refused
from spikepatch.spikes.line_formats import LossOf
from spikepatch.spikes.log_files import raw_rows
from spikepatch.spikes.log_keys import Keys
from spikepatch.spikes.statistic import WARMUP

_Row = tuple[int, float | None, float | None]

#: Rows whose median is the loss at the end of a stretch of a log, or at its beginning.
_ENDS = 5

#: How much less neighbours differ than rows so far apart, in a moving average: in noise as much, in a walk 0.35 of it.
_SMOOTH, _FAR = 0.5, 8


@dataclass(frozen=True)
class TrainingLog:
    """A curve that ``judge`` can judge; also made by hand, of a run that has no log file.

    Attributes:
        steps: increasing.
        losses, norms: of the same rows; None where a row has none, NaN where it was not finite. Norms before clipping.
        name, format: where it is from, and what it was read as.
        loss_of: whether a row's loss is of one step, a mean over those since the row before, or a moving average.
        evals: evaluations that were left out.
        notes: what else was done on reading it.
    """

    steps: tuple[int, ...]
    losses: tuple[float | None, ...]
    norms: tuple[float | None, ...] = ()
    name: str = ""
    format: str = "rows"
    loss_of: LossOf = "one step"
    evals: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.norms == ():
            object.__setattr__(self, "norms", (None,) * len(self.steps))
        sizes = {len(self.steps), len(self.losses), len(self.norms)}
        if len(sizes) > 1 or any(b <= a for a, b in itertools.pairwise(self.steps)):
            raise Refused(
                "these are not the rows of a log",
                where=self.name or "TrainingLog",
                why=f"it has {len(self.steps)} steps, {len(self.losses)} losses and {len(self.norms)} norms"
                if len(sizes) > 1
                else "its steps do not increase",
                remedy="give a loss, or None, for each step, in the order of the steps",
            )

    @property
    def interval(self) -> int:
        """Steps from one row to the next, mostly."""
        return _interval(self.steps)

    def describe(self) -> Iterator[str]:
        """What was read, line by line."""
        n, every = len(self.steps), self.interval
        spans = f"steps {self.steps[0]} to {self.steps[-1]}" if n else "no steps"
        apart = "every step" if every == 1 else f"every {every} steps"
        yield f"{self.name}: {self.format}; {n:,} row{'s' * (n != 1)}, {spans}, {apart}"
        digits = max((_digits(x) for x in self.losses[:1000] if x is not None), default=0)
        printed = f"{digits} digit{'s' * (digits != 1)} behind the point" if 0 < digits <= 6 else "in full"
        yield f"loss: {_OF[self.loss_of]}, {printed}; gradient norm: {'logged' if self._has_norm else 'not logged'}"
        irregular = sum(b - a != every for a, b in itertools.pairwise(self.steps))
        if irregular:
            gap, at = max((b - a, a) for a, b in itertools.pairwise(self.steps))
            yield f"{irregular:,} times rows are not {every} apart; the longest gap is {gap} steps after step {at}"
        broken = sum(x is not None and not math.isfinite(x) for x in self.losses)
        absent = sum(x is None for x in self.losses)
        counts = (
            (self.evals, "evaluations left out"),
            (broken, "losses that are not finite"),
            (absent, "rows without a loss"),
        )
        if any(count for count, _ in counts):
            yield "; ".join(f"{count:,} {what}" for count, what in counts if count)
        yield from self.notes

    def limits(self) -> Iterator[str]:
        """What cannot be judged by it."""
        every = self.interval
        first = [s for s, x in zip(self.steps, self.losses, strict=True) if x is not None and math.isfinite(x)][:WARMUP]
        if first:
            yield f"the first {len(first)} rows, to step {first[-1]}, only make the baseline"
        if self.loss_of == "moving average":
            yield "the loss is a moving average: spikes are lower and longer in it, and short ones do not show"
        if every > 1 and self.loss_of == "one step":
            yield f"one step in {every} is logged: a spike shorter than {2 * every} steps may be invisible"
        if every > 1 and self.loss_of == "mean":
            yield f"a row is the mean of {every} steps: a spike of n of them is n / {every} as high"

    @property
    def _has_norm(self) -> bool:
        return any(norm is not None for norm in self.norms)


def _interval(steps: Sequence[int]) -> int:
    apart = Counter(b - a for a, b in itertools.pairwise(steps))
    return apart.most_common(1)[0][0] if apart else 1


_OF: dict[LossOf, str] = {
    "one step": "of one step each", "mean": "means since the row before", "moving average": "a moving average",
}  # fmt: skip


def read_log(
    path: str | os.PathLike[str], *, loss: str | None = None, norm: str | None = None, step: str | None = None
) -> TrainingLog:
    """Read a training log.

    Args:
        path: a file, or a folder of TensorBoard's event files, of a run of ``spikepatch train`` or of what a Trainer
            saved.
        loss, norm, step: what these are called in it, where that is not found out.

    Raises:
        BadSource: it cannot be read.
        Refused: it is in no format that is known, or has no such key; the message lists the keys that it has.
    """
    raw = raw_rows(Path(path), Keys(loss, norm, step))
    rows = [(i + 1 if at is None else at, x, n) for i, (at, x, n) in enumerate(raw.rows)]
    if raw.format == "spikepatch's log.jsonl":
        rows, notes = _last_of_each(rows)
    else:
        rows, notes = _in_order(rows)
    if not rows:
        raise Refused(
            "it has no losses",
            where=str(path),
            why=f"read as {raw.format}, none of its rows has one",
            remedy="--loss KEY, if it is called otherwise there",
        )
    rows, more = _averaged_nan(rows, raw.loss_of)
    loss_of = raw.loss_of or ("moving average" if _is_smooth([x for _, x, _ in rows]) else "one step")
    if raw.loss_of is None and loss_of == "one step" and _interval([at for at, _, _ in rows]) > 1:
        more.append("the format does not say whether a loss is of one step or a mean: it is taken to be of one step")
    steps, losses, norms = zip(*rows, strict=True)
    return TrainingLog(
        steps, losses, norms, name=str(path), format=raw.format, loss_of=loss_of, evals=raw.evals,
        notes=(*raw.notes, *notes, *more),
    )  # fmt: skip


def _last_of_each(rows: Sequence[_Row]) -> tuple[list[_Row], list[str]]:
    """Of steps that come again after a rewind, the last ones."""
    kept: list[_Row] = []
    again = 0
    for row in rows:
        while kept and kept[-1][0] >= row[0]:
            kept.pop()
            again += 1
        kept.append(row)
    return kept, [f"{again:,} steps were taken back by rewinds"] if again else []


def _in_order(rows: Sequence[_Row]) -> tuple[list[_Row], list[str]]:
    """Rows by increasing step.

    The same step again, next to it: a row that was written twice, the last one is kept. Back to the first steps: a
    counter that begins anew with each epoch, if the loss goes on where it was, which is counted on; else another start
    of the run, of which the one with the most rows is judged. Back to other steps: a resume; the later rows count.
    """
    notes: list[str] = []
    once: list[_Row] = []
    for row in rows:
        if once and once[-1][0] == row[0]:
            once.pop()
        once.append(row)
    if len(once) < len(rows):
        notes.append(f"{len(rows) - len(once):,} rows repeat the step of the row before, which they replace")
    if not once:
        return [], notes
    stretches: list[list[_Row]] = [[]]
    for row in once:
        if stretches[-1] and row[0] < stretches[-1][-1][0]:
            stretches.append([])
        stretches[-1].append(row)
    starts: list[list[_Row]] = []
    for stretch in stretches:
        if not starts:
            starts.append(stretch)
            continue
        last = starts[-1]
        apart = last[1][0] - last[0][0] if len(last) > 1 else 1
        anew = stretch[0][0] <= last[0][0] + apart
        if anew and _goes_on(last, stretch, starts[0]):
            offset = last[-1][0] - stretch[0][0] + apart
            last += [(step + offset, x, norm) for step, x, norm in stretch]
            on = last[-len(stretch)][0]
            notes.append(f"the counter begins anew at {stretch[0][0]} (an epoch): it is counted on as {on}")
        elif anew:
            starts.append(stretch)
        else:
            again = sum(step >= stretch[0][0] for step, _, _ in last)
            starts[-1] = [row for row in last if row[0] < stretch[0][0]] + stretch
            notes.append(f"resumed at step {stretch[0][0]}: {again} rows come again, the later ones count")
    longest = max(starts, key=len)
    if len(starts) > 1:
        others = len(once) - sum(len(start) for start in starts if start is longest)
        notes.append(
            f"{len(starts)} starts are in one file: the longest is judged, of {len(longest):,} rows, and"
            f" {others:,} rows of the others are not"
        )
    return longest, notes


def _goes_on(before: Sequence[_Row], after: Sequence[_Row], first: Sequence[_Row]) -> bool:
    """Whether the loss after is nearer to the one before than to that of the very first rows."""
    end, begin, start = (
        [x for _, x, _ in part if x is not None and math.isfinite(x)]
        for part in (before[-_ENDS:], after[:_ENDS], first[:_ENDS])
    )
    if not (end and begin and start) or len(before) < 2 * _ENDS:
        return False
    now = statistics.median(begin)
    return abs(now - statistics.median(end)) < abs(now - statistics.median(start))


def _averaged_nan(rows: list[_Row], loss_of: LossOf | None) -> tuple[list[_Row], list[str]]:
    """In a mean or a moving average one NaN may stay for ever; the norm tells that the run goes on."""
    broken = [i for i, (_, x, _) in enumerate(rows) if x is not None and math.isnan(x)]
    if loss_of == "one step" or not broken or broken != list(range(broken[0], len(rows))):
        return rows, []
    first = broken[0]
    after = [norm for _, _, norm in rows[first + 1 :]]
    if not after or not all(norm is not None and math.isfinite(norm) for norm in after):
        return rows, []
    kept = [*rows[: first + 1], *((step, None, norm) for step, _, norm in rows[first + 1 :])]
    return kept, [
        f"from step {rows[first][0]} on the loss is NaN and the gradient norm is finite: one NaN stays in an average,"
        " and the losses after it are not known"
    ]


def _is_smooth(losses: Sequence[float | None]) -> bool:
    """Whether rows eight apart differ much more than neighbours do, as in an average that moves; by second differences,
    so that the fall of a loss does not count."""
    x = [v for v in losses if v is not None and math.isfinite(v)][-1000:]
    if len(x) < 100:
        return False
    near, far = (
        statistics.median(abs(a - 2 * b + c) for a, b, c in zip(x, x[lag:], x[2 * lag :], strict=False))
        for lag in (1, _FAR)
    )
    return near < _SMOOTH * far


def _digits(value: float) -> int:
    return len(repr(value).partition(".")[2]) if math.isfinite(value) else 0
