"""What an event of a training curve is: the one theory that the detector, the monitor, ``train``, ``report`` and
``spikes`` share.

**Rows and steps.** A row is one logged value; a step is its name. Rows are judged, steps are printed: of a log of every
tenth step the detector sees every tenth, and says so.

**Scales.** A baseline is kept of single rows, of means of two, of four ... of 128 rows: up to 64 values at each scale,
so that a value twenty deviations high and a rise of half a deviation over a thousand rows are the same thing at
different scales. A loss is judged at all of them (means of up to 8 rows at every row, longer ones as each is complete),
a gradient norm row by row, by its logarithm: by Eq. 7 of Takase et al. (arXiv 2312.16903) its size is a product over
sub-layers.

    level(x)  median of the last 8 values                                                (``statistic.py``)
    noise(x)  max over lags 1, 2, 4 of 1.4826 / sqrt(2) median |d - median d|,  d = x[i] - x[i - lag]
    unit      max(noise, one print step, 2^-9 of the level)
    onset     where a value lies threshold(n) units above it,  threshold(n) = 7 (1 + (16 / n)^2)

The level is near, so the fall of early training hides little; the noise comes from neighbours' differences, so that
neither a trend nor a level that changed enters it, and what drifts from row to row does, through the larger lags. At
coarser scales the noise is at least that of the finer one over sqrt(2). The smaller of two distances counts: 64 values
with their threshold, and the last 16 with theirs, which is twice as high. A print step is the last digit that the log
writes: of a norm printed as 0.23, one hundredth; 2^-9 is bfloat16's rounding. A series that never rises has no event.
Before there are 8 values a loss of more than twice the first one is an event (``KillLossSpike`` of llm-foundry).

**An event** has a level (frozen at the onset), a peak, a height above the level in nats and in units, and it is *back*
when the median of 5 rows is within 2 units of that level (after more than 20 rows, of a quarter of them, up to 16; of
an event that only means of k rows could show, two means of k in a row). Until then it lasts, for as long as that takes.
Its rows never enter a baseline. When 16 rows have gone without a new peak, and calmly, the baseline goes on at the
level that the series has by then, so that further events are seen; one that begins before the series has come half way
back is the same event.

**Kinds**, named with hindsight:

    blip         one row, back
    spike        up within 8 rows or a fifth of its time, back within 64 rows;  long spike: later
    level shift  the same, but 32 rows or more, and it stays near its peak: the median of its first half is above 0.72
                 of its height
    hump         rises slowly, comes back;  slow rise: rises slowly, is not back
    not back     rose at once, and the log ends before it is back
    non-finite   NaN, infinite, or larger than float32

**Simulated** by ``python -m tests.spikes.simulate``; the threshold before any real curve was looked at. In 120,000 rows
each of eleven kinds of series without events, 7 leaves events of several rows in three: one in an autoregression of
0.9, four in a random walk without noise and five in an exponential average of 0.99 (with 6 it is 49 in five). None in
Gaussian, Laplace and Student's noise, in rounded noise, an autoregression of 0.5, a walk with noise, means over ten, a
deviation that doubles. Chance of a false alarm per row, single rows:

    n in the baseline        8         16        32        64
    Gaussian                 1e-8      2e-9      4e-9      2e-9        4e-5 in a run of 20,000 rows
    Laplace                  1e-6      6e-6      4e-5      7e-5        blips: one in 14,000 rows
    t(5)                     1e-6      1e-5      7e-5      2e-4        blips: one in 7,000 rows

**With hindsight** (``hindsight.py``) the onset of a slow event is its first row, an excursion with a valley deeper than
three quarters of both its peaks is two events, and what is too faint to stop a run for is found where it recurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["loss", "gradient_norm", "nonfinite"]
Form = Literal["blip", "spike", "long spike", "hump", "slow rise", "level shift", "not back", "non-finite"]
Origin = Literal["data", "run"]

#: Rows whose median says that a series is back, at least.
BACK = 5

#: Units above the level that are still at the level.
BAND = 2.0

#: Rows without a new peak after which the baseline goes on at the level that the series has then.
SETTLED = 16

#: A loss this many times the first one, before there is a baseline, is an event.
EXPLODED = 2.0


_PLACES = {"loss": "the loss", "gradient_norm": "the gradient norm", "nonfinite": "a value that is not finite"}


@dataclass(frozen=True)
class Event:
    """One excursion of a series above its level, or one stretch of rows that are not finite.

    Attributes:
        kind: which series it was seen in.
        onset, peak: steps of its first row and of its highest one.
        value, baseline: at the peak, and the level before the onset, in nats; of a gradient norm the norm itself, not
            its logarithm. None for ``nonfinite``.
        score: height of the peak in units, of single rows.
        over: rows in the mean that was the evidence; 1 for a single row.
        duration: rows from the onset to the last one before it was back.
        back: the step at which the series was at its level again; None while it is not.
        form: what it is called, with hindsight; None while it is under way.
        area: sum over its rows of loss minus level, times the steps that a row stands for, in nats; with hindsight.
        trace: whether an event of the gradient norm has one of the loss beside it; with hindsight.
        batch: the index of the batch of its peak, where that is known.
        origin: whether a twin on the same batches has it too ("data") or not ("run"); None without one.
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
    form: Form | None = None
    area: float | None = None
    trace: bool | None = None
    batch: int | None = None
    origin: Origin | None = None

    def __str__(self) -> str:
        """As it stands: whether it is a spike or a rise is known when it is over."""
        at = f"step {self.onset}: {_PLACES[self.kind]}"
        rose = (
            "" if self.value is None else f" rose from {self.baseline:.4g} to {self.value:.4g} (score {self.score:.3g})"
        )
        rows = f"{self.duration} step{'' if self.duration == 1 else 's'}"
        end = f"up for {rows}, not back yet" if self.back is None else f"{rows}, back at step {self.back}"
        return f"{at}{rose}, {end}"

    @property
    def height(self) -> float | None:
        """Of the peak above the level, in nats for a loss."""
        return None if self.value is None or self.baseline is None else self.value - self.baseline

    @property
    def status(self) -> str:
        """How it ended, or that it has not."""
        return "not back" if self.back is None else f"back at {self.back}"
