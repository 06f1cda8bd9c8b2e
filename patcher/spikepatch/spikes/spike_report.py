"""A log, judged: events, verdict, the gradient norm beside it, and what a twin says."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spikepatch.spikes.conclusion import PASSED, Conclusion, conclude, norm_line
from spikepatch.spikes.events import Event
from spikepatch.spikes.hindsight import Curve, with_hindsight
from spikepatch.spikes.read_log import TrainingLog, read_log
from spikepatch.spikes.twin import Twin, twin_of


@dataclass(frozen=True)
class SpikeReport:
    """What ``judge`` finds in a log.

    Attributes:
        log: what was judged.
        events: of loss, gradient norm and rows that are not finite, in the order of their onsets.
        conclusion: the verdict with its line, by the loss alone.
        twin: what another run on the same batches says of them; None without one.
    """

    log: TrainingLog
    events: tuple[Event, ...]
    conclusion: Conclusion
    twin: Twin | None = None

    @property
    def verdict(self) -> str:
        """healthy, blips only, spikes, unstable, not back, or cannot tell."""
        return self.conclusion.verdict

    @property
    def passed(self) -> bool:
        """Whether the exit code is 0: healthy, or blips only."""
        return self.conclusion.verdict in PASSED

    def lines(self) -> Iterator[str]:
        """The verdict, the gradient norm's line, the twin's."""
        yield (
            f"{self.verdict}: {self.conclusion.text}"
            if not self.conclusion.text.startswith(self.verdict)
            else self.conclusion.text
        )
        norm = norm_line(self.events)
        if norm is not None:
            yield norm
        if self.twin is not None:
            yield _twin_line(self.twin)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, without the rows."""
        log = self.log
        return {
            "log": {
                "name": log.name, "format": log.format, "loss_of": log.loss_of, "rows": len(log.steps),
                "steps": [log.steps[0], log.steps[-1]] if log.steps else None, "interval": log.interval,
                "evals": log.evals, "read": list(log.describe()), "limits": list(log.limits()),
            },
            "verdict": self.verdict,
            "passed": self.passed,
            **{key: value for key, value in dataclasses.asdict(self.conclusion).items() if key != "verdict"},
            "gradient_norm": norm_line(self.events),
            "events": [
                {**dataclasses.asdict(event), "height": event.height} for event in self.events
            ],
            "twin": None
            if self.twin is None
            else {
                "name": self.twin.name, "correlation": self.twin.correlation, "same_batches": self.twin.same_batches,
                "quieter": self.twin.quieter if math.isfinite(self.twin.quieter or 0.0) else None,
            },
        }  # fmt: skip


def judge(
    log: TrainingLog | str | os.PathLike[str], *, against: TrainingLog | str | os.PathLike[str] | None = None
) -> SpikeReport:
    """Find the spikes in a training log.

        spikepatch.judge("log.txt").verdict
        spikepatch.judge(spikepatch.TrainingLog(steps=(1, 2, 3), losses=(9.1, 8.7, 8.8)))

    Args:
        log: the log, or the file that ``read_log`` is to read.
        against: the log of another run on the same batches at the same steps: events that it has too are the data's.

    Raises:
        SpikepatchError: a file cannot be read, or is no log that is known.
    """
    log = log if isinstance(log, TrainingLog) else read_log(log)
    rows = _rows(log)
    events = with_hindsight(rows)
    shortest = 2 * log.interval if log.interval > 1 and log.loss_of == "one step" else 1
    conclusion = conclude(rows, events, shortest=shortest)
    if against is None:
        return SpikeReport(log, events, conclusion)
    other = against if isinstance(against, TrainingLog) else read_log(against)
    twin = twin_of(rows, events, _rows(other), other.name)
    events = tuple(dataclasses.replace(e, origin=twin.origins.get(e.onset)) if e.kind == "loss" else e for e in events)
    return SpikeReport(log, events, conclusion, twin)


def _rows(log: TrainingLog) -> Curve:
    return Curve(log.steps, log.losses, log.norms)


def _twin_line(twin: Twin) -> str:
    if twin.correlation is None:
        return f"against {twin.name}: they have too few steps in common to compare"
    if not twin.same_batches:
        return (
            f"against {twin.name}: the losses do not go up and down together (correlation {twin.correlation:.2f}), so"
            " these runs have not seen the same batches at the same steps, and it says nothing"
        )
    data = sum(origin == "data" for origin in twin.origins.values())
    known = twin.quieter is not None and math.isfinite(twin.quieter)
    quieter = f"their difference {twin.quieter:.3g} times quieter" if known else "most rows equal"
    return (
        f"against {twin.name}, on the same batches (correlation {twin.correlation:.3f}, {quieter}):"
        f" of {len(twin.origins)} events of the loss {data} are in both, so the data's, and"
        f" {len(twin.origins) - data} in this run only"
    )
