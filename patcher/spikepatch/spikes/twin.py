"""Two runs on the same batches: which of their events are the data's, and which are one run's alone.

What a batch does to the loss it does to both: with the trend taken out (each loss minus the median of the nine around
it) the losses of two models on the same batches go up and down together, at a correlation near 1. Then an event whose
rows stand out in the twin too is the data's, and one that does not is the run's. Without that correlation the runs did
not see the same batches at the same steps, and nothing can be said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spikepatch.spikes.events import Event, Origin
from spikepatch.spikes.hindsight import Array, Curve
from spikepatch.spikes.statistic import LARGEST

#: Of two runs on the same batches at least so much; of others the largest by chance is 5 / sqrt(rows).
_SAME = 0.5

#: Rows around one whose median is its level, and the least number of rows that both runs have.
_AROUND, _LEAST = 9, 64

#: Share of an event's height that its twin has at its peak, for it to be the data's.
_SHARED = 0.5


@dataclass(frozen=True)
class Twin:
    """How two runs go together.

    Attributes:
        name: of the other one.
        correlation: of what the trend leaves; None for too few rows.
        quieter: how many times quieter the difference of the two is than the loss; None without a correlation.
        origins: for each event of the loss, by its onset.
    """

    name: str
    correlation: float | None
    quieter: float | None
    origins: dict[int, Origin]

    @property
    def same_batches(self) -> bool:
        return self.correlation is not None and self.correlation >= _SAME


def twin_of(rows: Curve, events: Sequence[Event], other: Curve, name: str) -> Twin:
    """What ``other``, another run, says of the events of the loss of ``rows``."""
    theirs = {s: x for s, x in zip(other.steps, other.losses, strict=True) if x is not None and abs(x) <= LARGEST}
    both = [
        (s, x, theirs[s])
        for s, x in zip(rows.steps, rows.losses, strict=True)
        if x is not None and abs(x) <= LARGEST and s in theirs
    ]
    if len(both) < _LEAST:
        return Twin(name, None, None, {})
    steps = np.array([s for s, _, _ in both])
    ours, twin = (_detrended(np.array([row[i] for row in both], dtype=float)) for i in (1, 2))
    difference = _detrended(np.array([a - b for _, a, b in both], dtype=float))
    correlation = _correlation(ours, twin)
    quieter = _size(ours) / _size(difference) if _size(difference) > 0 else math.inf
    if correlation < max(_SAME, 5 / math.sqrt(len(both))):
        return Twin(name, correlation, None, {})
    origins: dict[int, Origin] = {}
    for event in events:
        at = int(np.searchsorted(steps, event.peak))
        if event.form == "slow rise":  # no batch does that
            continue
        if event.kind == "loss" and at < len(steps) and steps[at] == event.peak and event.height is not None:
            origins[event.onset] = "data" if _excess(both, at) > _SHARED * event.height else "run"
    return Twin(name, correlation, quieter, origins)


def _detrended(x: Array) -> Array:
    """Without the median of the nine values around each."""
    padded = np.pad(x, _AROUND // 2, mode="edge")
    return np.asarray(x - np.median(np.lib.stride_tricks.sliding_window_view(padded, _AROUND), axis=1))


def _excess(both: Sequence[tuple[int, float, float]], at: int) -> float:
    """How far the twin stands above the eight rows before."""
    before = [twin for _, _, twin in both[max(0, at - _AROUND + 1) : at]]
    return both[at][2] - float(np.median(before)) if before else 0.0


def _correlation(a: Array, b: Array) -> float:
    """By ranks of what is not far out, so that a spike in one run does not decide it."""
    near = (np.abs(a) < 10 * _size(a)) & (np.abs(b) < 10 * _size(b))
    if near.sum() < _LEAST // 2 or a[near].std() == 0 or b[near].std() == 0:
        return 0.0
    return float(np.corrcoef(a[near], b[near])[0, 1])


def _size(x: Array) -> float:
    """Standard deviation, robustly."""
    return 1.4826 * float(np.median(np.abs(x - np.median(x))))
