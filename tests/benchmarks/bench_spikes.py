"""The detector's time a step, against the one that it replaced: ``python -m tests.benchmarks.bench_spikes``.

The old one is stated here as it was: a window of 128 values, Brown and Mood's line through the medians of its halves,
and a MAD around a line of each half, at every step. Target: a ratio of at most 1, both series, in one run.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence

import click

from spikepatch.spikes.detector import SpikeDetector
from spikepatch.spikes.hindsight import Curve, with_hindsight

STEPS, ROUNDS = 2000, 7


def old(baseline: Sequence[float], x: float, relative: bool) -> float:
    """The score of the old detector."""
    half = len(baseline) // 2
    slope, newer = _line(baseline)
    level = newer + max(slope, 0.0) * (half + 1) / 2
    if x <= level:
        return 0.0
    residuals = [*_residuals(baseline[:half]), *_residuals(baseline[half:])]
    noise = 1.4826 * len(baseline) / (len(baseline) - 4) * _median(residuals)
    return (x - level) / max(noise, 2.0**-9 * (abs(level) if relative else 1.0))


def _line(values: Sequence[float]) -> tuple[float, float]:
    n, half = len(values), len(values) // 2
    older, newer = _median(values[:half]), _median(values[n - half :])
    return (newer - older) / (n - half), newer


def _residuals(values: Sequence[float]) -> list[float]:
    slope, _ = _line(values)
    level = [value - slope * t for t, value in enumerate(values)]
    middle = _median(level)
    return [abs(value - middle) for value in level]


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def seconds_old(losses: Sequence[float], norms: Sequence[float]) -> float:
    start = time.process_time()
    series: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    for loss, norm in zip(losses, norms, strict=True):
        kept = []
        for values, x, relative in zip(series, (loss, math.log(norm)), (True, False), strict=True):
            if len(values) >= 32:
                old(values, x, relative)
            kept.append((*values, x)[-128:])
        series = kept[0], kept[1]
    return (time.process_time() - start) / len(losses)


def seconds_new(losses: Sequence[float], norms: Sequence[float]) -> float:
    start, detector = time.process_time(), SpikeDetector()
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        detector = detector.observe(step, loss, norm)
    return (time.process_time() - start) / len(losses)


def seconds_hindsight(losses: Sequence[float], norms: Sequence[float]) -> float:
    start = time.process_time()
    with_hindsight(Curve(range(len(losses)), losses, norms))
    return (time.process_time() - start) / len(losses)


def main() -> None:
    draw = random.Random(0)
    losses = [3 + draw.gauss(0, 0.05) for _ in range(STEPS)]
    norms = [math.exp(draw.gauss(0, 0.2)) for _ in range(STEPS)]
    times = {"old": seconds_old, "new": seconds_new, "new, with hindsight": seconds_hindsight}
    found: dict[str, list[float]] = {name: [] for name in times}
    for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine meets all of them
        for name, measure in times.items():
            found[name].append(measure(losses, norms))
    best = {name: statistics.median(values) for name, values in found.items()}
    for name, seconds in best.items():
        click.echo(f"{name:20} {1e6 * seconds:6.1f} us a step, {seconds / best['old']:.2f} of the old detector")


if __name__ == "__main__":
    main()
