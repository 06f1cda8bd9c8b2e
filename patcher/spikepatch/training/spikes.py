"""The one detector of loss spikes, gradient-norm spikes and non-finite steps.

**The statistic.** The baseline of a series is its last n <= ``window`` values that were not flagged. The line through
the medians of the older and the newer half of some values is Brown and Mood's. With m the slope per step of that line
through the baseline and b the median of the baseline's newer half, the next value x has

    level = b + max(m, 0) (steps from the middle of the newer half)
    scale = max(1.4826 n / (n - 4) MAD, resolution)
    score = (x - level) / scale,    flagged when score > threshold and n >= warmup

MAD is the median absolute residual, each half of the baseline around a line of its own; 1.4826 makes it the standard
deviation of Gaussian noise, n / (n - 4) makes up for the four fitted parameters. So a trend hardly enters the scale:
the steep fall of early training neither hides a spike nor raises an alarm. A rise is extrapolated; a fall is not, since
a loss that stops falling is no spike: a series that never rises is never flagged. Only values above the level count.

The loss is a mean over many tokens, so its noise is additive and close to Gaussian. A gradient norm is judged by its
logarithm: by Eq. 7 of Takase et al. (arXiv 2312.16903) its size is a product over sub-layers, and the logarithm of a
product of many factors is the sum that tends to a Gaussian; norms themselves are skewed to the right, where alarms are.
It also makes the decision independent of how the loss is scaled. The resolution is 2^-9 of the value, the rounding
error of bfloat16: a series printed in fewer digits has ties, and MAD can be 0.

**The threshold.** For Gaussian noise a MAD of n values has the relative variance 1.36 / n (the standard deviation has
1 / (2n), and MAD's efficiency is 37 %), that of a chi distribution with 0.367 n degrees of freedom; the level has the
variance pi sigma^2 / n, or 2.5 times that where m > 0: about 5 sigma^2 / n. So score / sqrt(1 + 5 / n) is close to
Student's t with 0.367 n degrees of freedom, 12 at n = 32 and 47 at n = 128: the first values decide. Chance of a false
alarm per value, by simulation of the statistic:

    threshold   Gaussian n = 32   n = 64    n = 128   Laplace n = 128   t(5) n = 128
     8          4.0e-6            2.7e-8    1.9e-10   1.9e-4            1.9e-4
     9          1.2e-6            4.2e-9    9.5e-12   7.6e-5            1.1e-4
    10          3.8e-7            7.7e-10   5.1e-13   3.1e-5            6.7e-5

10 is the least integer with fewer than one false alarm in 100,000 runs, each of up to a million steps, both series
counted. The price of noise with heavy tails stands beside it: one alarm in some 10,000 steps.

**Events.** A flagged step opens an event, its onset, and further flags continue it. It ends when 10 steps in a row are
not flagged: Adam's momentum (beta1 = 0.9) carries one bad gradient for 1 / (1 - 0.9) = 10 steps, so echoes of one spike
are one spike. Its outcome is

    recovered   it has ended, at most ``window`` steps long (10 for non-finite steps)
    diverged    it is longer than that: the series does not come back, or the weights are broken
    ongoing     neither, yet

When a series has diverged its baseline starts anew, so a level that has changed for good is the new level after
``warmup`` values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spikepatch.errors import Refused

EventKind = Literal["loss", "gradient_norm", "nonfinite"]
EventOutcome = Literal["ongoing", "recovered", "diverged"]

#: Steps in a row without a flag that end an event.
QUIET = 10

#: What is larger is as good as infinite: training computes in float32 at most.
LARGEST = (2 - 2**-23) * 2.0**127

_RESOLUTION = 2.0**-9


@dataclass(frozen=True)
class Event:
    """One spike, or one stretch of non-finite steps.

    Attributes:
        kind: which series it was seen in.
        onset, peak: the first step, and that of the largest value.
        value, baseline, score: at the peak; the gradient norm itself, not its logarithm. None for ``nonfinite``.
        duration: observed steps from the onset to the last flag, both included.
        outcome: see the module.
    """

    kind: EventKind
    onset: int
    peak: int
    value: float | None = None
    baseline: float | None = None
    score: float | None = None
    duration: int = 1
    outcome: EventOutcome = "ongoing"


@dataclass(frozen=True)
class Series:
    """One kind's baseline, the event under way, steps since its onset, and how many of the last ones had no flag."""

    baseline: tuple[float, ...] = ()
    event: Event | None = None
    age: int = 0
    quiet: int = 0


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
        window: values in a baseline.
        warmup: values that it needs before it judges.
        threshold: in units of the noise's standard deviation; how the default is derived stands in the module.
        flags: kinds flagged at the very last step.
        closed: events that have ended, in the order of their ends.
        loss, gradient_norm, nonfinite: the state of each kind.

    Raises:
        Refused: 8 <= warmup <= window and 0 < threshold do not hold.
    """

    window: int = 128
    warmup: int = 32
    threshold: float = 10.0
    flags: tuple[EventKind, ...] = ()
    closed: tuple[Event, ...] = ()
    loss: Series = Series()
    gradient_norm: Series = Series()
    nonfinite: Series = Series()

    def __post_init__(self) -> None:
        if not (8 <= self.warmup <= self.window and self.threshold > 0):
            raise Refused(
                what=f"window={self.window}, warmup={self.warmup}, threshold={self.threshold:g}",
                where="SpikeDetector",
                why="a baseline has four quarters with a median each, and a spike is above it",
                remedy="8 <= warmup <= window and 0 < threshold",
            )

    def observe(self, step: int, loss: float | None, gradient_norm: float | None = None) -> SpikeDetector:
        """The state after a step; None for a value that is not known.

        Args:
            step: names the step in events; need not be consecutive.
            loss: of the step, in any unit.
            gradient_norm: before clipping.
        """
        values: dict[EventKind, float | None] = {"loss": loss, "gradient_norm": gradient_norm}
        broken = any(value is not None and not abs(value) <= LARGEST for value in values.values())
        changed: dict[str, Series] = {}
        flags: list[EventKind] = []
        closed = list(self.closed)
        for kind, value in values.items():
            series: Series = getattr(self, kind)
            if value is None or not abs(value) <= LARGEST or (kind == "gradient_norm" and value <= 0):
                continue
            found = self._spike(kind, series, step, float(value))
            if found is None:
                kept = (*series.baseline, _scaled(kind, value))[-self.window :]
                series = dataclasses.replace(series, baseline=kept)
            else:
                flags.append(kind)
            changed[kind] = _continued(series, found, self.window, closed)
        if values != {"loss": None, "gradient_norm": None}:
            found = Event("nonfinite", step, step) if broken else None
            flags.extend(["nonfinite"] if broken else [])
            changed["nonfinite"] = _continued(self.nonfinite, found, QUIET, closed)
        return dataclasses.replace(self, flags=tuple(flags), closed=tuple(closed), **changed)  # type: ignore[arg-type]

    @property
    def under_way(self) -> tuple[Event, ...]:
        """Those that have not ended."""
        return tuple(s.event for s in (self.loss, self.gradient_norm, self.nonfinite) if s.event is not None)

    @property
    def events(self) -> tuple[Event, ...]:
        """All of them, in the order of their onsets."""
        return tuple(sorted((*self.closed, *self.under_way), key=lambda event: event.onset))

    @property
    def diverged(self) -> bool:
        """Whether the loss went up and did not come back, or steps stayed non-finite. A gradient norm that settles on a
        new level is an event, but the training may well go on."""
        return any(event.outcome == "diverged" and event.kind != "gradient_norm" for event in self.events)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: no NaN, and every float comes back as the same bits."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpikeDetector:
        """The detector that ``to_dict`` was called on."""
        series = {
            kind: Series(
                tuple(data[kind]["baseline"]),
                data[kind]["event"] and Event(**data[kind]["event"]),
                data[kind]["age"],
                data[kind]["quiet"],
            )
            for kind in ("loss", "gradient_norm", "nonfinite")
        }
        closed = tuple(Event(**event) for event in data["closed"])
        return cls(data["window"], data["warmup"], data["threshold"], tuple(data["flags"]), closed, **series)

    def _spike(self, kind: EventKind, series: Series, step: int, value: float) -> Event | None:
        """The event that ``value`` opens, or None if it is no spike."""
        if len(series.baseline) < self.warmup:
            return None
        level, score = judged(series.baseline, _scaled(kind, value), relative=kind == "loss")
        if not score > self.threshold:
            return None
        return Event(kind, step, step, value, level if kind == "loss" else math.exp(level), score)


def news(before: SpikeDetector, after: SpikeDetector) -> tuple[Event, ...]:
    """Events that opened, diverged or ended from one state to a later one, as they then stood."""
    known = {(event.kind, event.onset, event.outcome) for event in before.under_way}
    changed = (e for e in after.under_way if (e.kind, e.onset, e.outcome) not in known)
    return (*after.closed[len(before.closed) :], *changed)


def judged(baseline: Sequence[float], x: float, *, relative: bool) -> tuple[float, float]:
    """Level and score of the next value (see the module); the score is 0 at and below the level.

    Args:
        baseline: oldest first, at least 8 values.
        x: the value, in the units of the baseline.
        relative: the resolution is 2^-9 of the level, not 2^-9.
    """
    half = len(baseline) // 2
    slope, newer = _line(baseline)
    level = newer + max(slope, 0.0) * (half + 1) / 2
    if x <= level:
        return level, 0.0
    scale = max(noise(baseline), _RESOLUTION * (abs(level) if relative else 1.0))
    # A series of zeros has no scale: nothing is judged until it has.
    return level, min((x - level) / scale, LARGEST) if scale else 0.0


def noise(baseline: Sequence[float]) -> float:
    """Standard deviation of Gaussian noise on a smooth curve, robustly: the scale of the module without resolution."""
    n, half = len(baseline), len(baseline) // 2
    residuals = [*_residuals(baseline[:half]), *_residuals(baseline[half:])]
    return 1.4826 * n / (n - 4) * _median(residuals)


def _residuals(values: Sequence[float]) -> list[float]:
    """Absolute residuals around the line."""
    slope, _ = _line(values)
    level = [value - slope * t for t, value in enumerate(values)]
    middle = _median(level)
    return [abs(value - middle) for value in level]


def _line(values: Sequence[float]) -> tuple[float, float]:
    """Slope per value between the medians of the older and the newer half, and the latter median."""
    n, half = len(values), len(values) // 2
    older, newer = _median(values[:half]), _median(values[n - half :])
    return (newer - older) / (n - half), newer


def _scaled(kind: EventKind, value: float) -> float:
    return math.log(value) if kind == "gradient_norm" else float(value)


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _continued(series: Series, found: Event | None, patience: int, closed: list[Event]) -> Series:
    """The series after a step with or without a flag; an event that ends is appended to ``closed``."""
    event = series.event
    if event is None:
        return series if found is None else dataclasses.replace(series, event=found, age=1, quiet=0)
    age, quiet = series.age + 1, series.quiet + 1
    if found is None:
        if quiet < QUIET:
            return dataclasses.replace(series, age=age, quiet=quiet)
        closed.append(event if event.outcome == "diverged" else dataclasses.replace(event, outcome="recovered"))
        return Series(series.baseline)
    if found.value is not None and event.value is not None and found.value > event.value:
        event = dataclasses.replace(
            event, peak=found.peak, value=found.value, baseline=found.baseline, score=found.score
        )
    diverged = age > patience
    outcome: EventOutcome = "diverged" if diverged else "ongoing"
    baseline = () if diverged and event.outcome == "ongoing" else series.baseline
    return Series(baseline, dataclasses.replace(event, duration=age, outcome=outcome), age, 0)
