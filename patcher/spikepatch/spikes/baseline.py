"""The values that the next one is judged by, at every scale: single rows, means of two, of four ..."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from spikepatch.spikes.statistic import WARMUP, WINDOW, level, noise, threshold

#: Step and value.
StepValue = tuple[int, float]

#: Means of up to so many rows are judged at every row, longer ones as each is complete.
SLIDING = 8

#: The last values, whose noise counts too where it is small enough.
_NEAR = 16

#: Values after which the noise is estimated anew, where there are many.
_AGE = 16

#: Steps that are remembered at each scale.
_BEGINS = 5

#: A value of a coarse scale says as much of the noise as so many rows: its finer scales bound it from below.
_WORTH = 4


@dataclass(frozen=True)
class Scale:
    """One scale of a baseline, the oldest value first.

    Attributes:
        values: means of 2^i rows. begins: the first step of each of the last ones.
        noise, near: of all of them and of the last 16. age: values since they were estimated.
        half: mean of the rows of the next value's first half, and its first step.
        level: of the values.
    """

    values: tuple[float, ...] = ()
    begins: tuple[int, ...] = ()
    noise: float = 0.0
    near: float = 0.0
    age: int = 0
    half: tuple[float, int] | None = None
    level: float = 0.0

    def then(self, value: float, step: int) -> Scale:
        """With one more value."""
        values = (*self.values, value)[-WINDOW:]
        begins = (*self.begins, step)[-_BEGINS:]
        if len(values) < WARMUP or (self.age + 1 < _AGE and len(values) >= WINDOW // 2):
            return Scale(values, begins, self.noise, self.near, self.age + 1, None, level(values))
        return Scale(values, begins, noise(values), noise(values[-_NEAR:]), 0, None, level(values))


#: The scales of 1, 2, 4 ... rows.
Baseline = tuple[Scale, ...]


def reach(baseline: Baseline, i: int, floor: float, limit: float) -> tuple[float, float]:
    """How far above the level a value of scale ``i`` is an event, and the unit there, at least ``floor``.

    The noise of a mean of two is at least that of its parts over sqrt(2): it has less where they are independent, and
    never in a series that drifts.
    """
    wide = near = 0.0
    for scale in baseline[: i + 1]:
        wide, near = max(scale.noise, wide / math.sqrt(2)), max(scale.near, near / math.sqrt(2))
    wide, near = max(wide, floor), max(near, floor)
    count = min(len(baseline[0].values), _WORTH * len(baseline[i].values))
    return min(threshold(count, limit) * wide, threshold(min(count, _NEAR), limit) * near), wide


def grown(
    baseline: Baseline, x: float, step: int, judge: Callable[[Baseline, int, float, int], bool] | None = None
) -> Baseline:
    """With one more row, and every mean that it completes; up to the one that ``judge`` does not let in.

    Args:
        judge: is asked of every mean, with the baseline so far, the scale, the mean and its first step.
    """
    scales, mean, begins = list(baseline), x, step
    for i, scale in enumerate(scales):
        if i:
            if scale.half is None:
                scales[i] = Scale(*_of(scale), (mean, begins), scale.level)
                break
            mean, begins = (scale.half[0] + mean) / 2, scale.half[1]
            if judge is not None:
                scales[i] = Scale(*_of(scale), None, scale.level)
                if not judge(tuple(scales), i, mean, begins):
                    break
        scales[i] = scales[i].then(mean, begins)
    return tuple(scales)


def _of(scale: Scale) -> tuple[tuple[float, ...], tuple[int, ...], float, float, int]:
    return scale.values, scale.begins, scale.noise, scale.near, scale.age


def moved(baseline: Baseline, recent: tuple[StepValue, ...]) -> Baseline:
    """At the level of the last rows, which it takes in: its differences stay, and so does its noise. Means that are to
    be judged begin after them."""
    at = level([x for _, x in recent])
    baseline = tuple(_at(scale, at) for scale in baseline)
    for step, x in recent:
        baseline = grown(baseline, x, step)
    return tuple(Scale(*_of(scale), None, scale.level) for scale in baseline)


def _at(scale: Scale, at: float) -> Scale:
    """With this level."""
    by = at - scale.level
    return dataclasses.replace(scale, values=tuple(v + by for v in scale.values), half=None, level=at)
