"""How far a value lies above the ones before it: level, noise and threshold, at any scale. Stated in ``events.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Values of a baseline, at every scale.
WINDOW = 64

#: Values that a baseline needs before it judges.
WARMUP = 8

#: Units of noise, for a long baseline; ``threshold`` has what a short one adds.
THRESHOLD = 7.0

#: Values whose median is the level.
LEVEL_OF = 8

#: Distances of the neighbours whose differences tell the noise.
LAGS = (1, 2, 4)

#: Rounding error of bfloat16, relative: no scale is finer.
RESOLUTION = 2.0**-9

#: What is larger is as good as infinite: training computes in float32 at most.
LARGEST = (2 - 2**-23) * 2.0**127

#: Standard deviation of Gaussian noise over the median absolute difference of two of its values.
_FROM_DIFFERENCES = 1.4826 / math.sqrt(2)


def level(values: Sequence[float]) -> float:
    """The median of the last 8 values; of fewer where the baseline is short, but at least of 4."""
    return median(values[-min(max(4, len(values) // 4), LEVEL_OF) :])


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise, the largest over ``LAGS`` of

        1.4826 / sqrt(2) median |d - median d|,   d = x[i] - x[i - lag]

    A level that changed and a trend hardly enter; noise that drifts enters through the larger lags.
    """
    return max(_of_differences(values, lag) for lag in LAGS if len(values) >= 2 * lag)


def threshold(count: int, limit: float = THRESHOLD) -> float:
    """``limit`` (1 + (16 / count)^2): what a baseline of so few values does not know of its noise."""
    return limit * (1 + (16 / count) ** 2)


def print_step(value: float) -> float:
    """The last digit that a value was printed with, 10^-d with d from 1 to 4; 0 for more digits behind the point. In
    the digits that float32 keeps, so that it is the same after a way through TensorBoard."""
    text = f"{value:.7g}"
    digits = len(text.partition(".")[2])
    return 10.0 ** -max(digits, 1) if digits <= 4 and "e" not in text else 0.0


def median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _of_differences(values: Sequence[float], lag: int) -> float:
    differences = [b - a for a, b in zip(values, values[lag:], strict=False)]
    middle = median(differences)
    return _FROM_DIFFERENCES * median([abs(d - middle) for d in differences])
