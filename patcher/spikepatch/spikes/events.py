"""PLACEHOLDER theory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["loss", "gradient_norm", "nonfinite"]

#: Rows whose median says that a series is back.
BACK = 5

#: Units of noise above the level that are still at the level.
BAND = 2.0

#: Rows without a new peak after which the baseline goes on at the level that the series has then.
SETTLED = 16

#: A loss this many times the first one, before there is a baseline, is an event: ``KillLossSpike`` of llm-foundry.
EXPLODED = 2.0


@dataclass(frozen=True)
class Event:
    """One excursion of a series above its level, or one stretch of non-finite rows.

    Attributes:
        kind: which series it was seen in.
        onset, peak: steps of the first row and of the highest one.
        value, baseline: at the peak, and the level before the onset; the gradient norm itself, not its logarithm. None
            for ``nonfinite``.
        score: height of the peak in units of noise.
        over: rows whose mean was the evidence.
        duration: rows from the onset to the last one before it was back.
        back: the step at which the series was at its level again; None while it is not.
    """

    kind: EventKind
    onset: int
    peak: int
    value: float | None = None
    baseline: float | None = None
    score: float | None = None
    over: int = 1
    duration: int = 1
    back: int | None = None

    @property
    def height(self) -> float | None:
        """Of the peak above the level, in nats for a loss."""
        return None if self.value is None or self.baseline is None else self.value - self.baseline
