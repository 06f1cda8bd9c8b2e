"""Synthetic twins of what real curves do: each by code, with a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spikepatch.spikes.detector import SpikeDetector
from spikepatch.spikes.events import Event
from spikepatch.spikes.hindsight import Curve, with_hindsight

Array = npt.NDArray[np.float64]


def flat(rows: int, level: float = 3.0, sigma: float = 0.05, seed: int = 0) -> Array:
    return level + np.random.default_rng([seed, rows]).normal(0, sigma, rows)


def fall(rows: int, sigma: float = 0.02, seed: int = 0, tau: float = 100.0) -> Array:
    """A loss: an exponential fall from 8 to 2 with Gaussian noise."""
    return 2 + 6 * np.exp(-np.arange(rows) / tau) + np.random.default_rng([seed, rows]).normal(0, sigma, rows)


def spike(rows: int, at: int, height: float, tau: float, rise: int = 1) -> Array:
    """Up in ``rise`` rows, down with a time of ``tau``."""
    t = np.arange(rows) - at
    up = np.clip((t + 1) / rise, 0, 1)
    return height * up * np.where(t < rise, 1.0, np.exp(-np.maximum(t - rise + 1, 0) / tau)) * (t >= 0)


def hump(rows: int, first: int, length: int, height: float) -> Array:
    """Half a sine."""
    t = np.arange(rows) - first
    return np.where((t >= 0) & (t < length), height * np.sin(np.pi * t / length), 0.0)


def ramp(rows: int, first: int, length: int, height: float) -> Array:
    """Up, and not back."""
    return height * np.clip((np.arange(rows) - first) / length, 0, 1)


def observed(losses: Sequence[float | None] | Array, norms: Sequence[float | None] | None = None) -> SpikeDetector:
    """The detector behind a series, steps from 1."""
    detector = SpikeDetector()
    values = losses.tolist() if isinstance(losses, np.ndarray) else list(losses)
    for step, (loss, norm) in enumerate(zip(values, norms or [None] * len(values), strict=True), start=1):
        detector = detector.observe(step, loss, norm)
    return detector


def curve_of(losses: Sequence[float | None] | Array, every: int = 1) -> Curve:
    values = losses.tolist() if isinstance(losses, np.ndarray) else list(losses)
    return Curve(range(every, every * len(values) + 1, every), values, [None] * len(values))


def events(losses: Sequence[float | None] | Array) -> tuple[Event, ...]:
    """With hindsight."""
    return with_hindsight(curve_of(losses))


def edge_of_stability(seed: int = 0, rows: int = 2150) -> Array:
    """Thirteen spikes of 20 to 40 steps in the second half, as at a learning rate that is a little too high."""
    draw = np.random.default_rng(seed)
    loss = 0.05 + 4 * np.exp(-np.arange(rows) / 150) + 0.004 * draw.normal(size=rows)
    for i in range(13):
        at = 1180 + 75 * i + int(draw.integers(-6, 7))
        loss += spike(rows, at, float(draw.uniform(0.3, 0.8)), 8.0, rise=4)
    return np.asarray(loss)


def thinned(losses: Array, every: int) -> list[float]:
    return [float(x) for x in losses[every - 1 :: every]]


def means(losses: Array, every: int) -> list[float]:
    return [math.fsum(losses[i : i + every]) / every for i in range(0, len(losses) - every + 1, every)]
