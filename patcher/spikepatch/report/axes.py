"""Axes of a drawing: values to pixels, and the round numbers that are written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 26, 16, 44


@dataclass(frozen=True)
class Axis:
    """Values to pixels: ``low`` lies at ``begin``, ``high`` at ``end``; ``ticks`` are written beside it."""

    low: float
    high: float
    begin: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)


def vertical(values: Sequence[float], *, log: bool, begin: float = HEIGHT - BOTTOM, end: float = TOP) -> Axis:
    """Upwards, from a round number below all values to one above them."""
    low, high = _decades(values) if log else _rounded(values)
    return Axis(low, high, begin, end, log, tuple(log_ticks(low, high) if log else ticks(low, high)))


def horizontal(values: Sequence[float], *, log: bool) -> Axis:
    """To the right, over just the values; a logarithmic one has margins, and its few values as ticks."""
    if not log:
        low, high = _padded(values)
        return Axis(low, high, LEFT, WIDTH - RIGHT, False, tuple(ticks(low, high, whole=True)))
    distinct = sorted(set(values))
    margin = (distinct[-1] / distinct[0]) ** 0.05 if len(distinct) > 1 else 2.0
    low, high = distinct[0] / margin, distinct[-1] * margin
    return Axis(low, high, LEFT, WIDTH - RIGHT, True, tuple(distinct if len(distinct) <= 8 else log_ticks(low, high)))


def opening(title: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}" class="chart">'


def names(x: str, y: str, right: int = RIGHT) -> Iterable[str]:
    """What the axes are of."""
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text x="{(LEFT + WIDTH - right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    yield f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{escape(y)}</text>'


def nothing() -> Markup:
    return Markup('<p class="empty">nothing to draw: no values</p>')


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rounded(values: Sequence[float]) -> tuple[float, float]:
    low, high = _padded(values)
    step = _step(high - low)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The nearest 1, 2 or 5 times a power of ten below and above."""
    steps = [m * 10.0**e for e in range(-45, 45) for m in (1, 2, 5)]
    least, most = min(values), max(values)
    low = max((s for s in steps if s <= least), default=least)
    high = min((s for s in steps if s >= most), default=most)
    return (low, high) if high > low else (low / 2, high * 2)


def _step(span: float) -> float:
    """A round number that divides ``span`` into about five."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= span / 5)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, some five of them; ``whole``: without a fraction."""
    step = max(_step(high - low), 1.0) if whole else _step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, some ten of them at most."""
    span = math.log10(high) - math.log10(low)
    multiples: Sequence[int] = range(1, 10) if span <= 0.8 else (1, 2, 5) if span <= 2.5 else (1,)
    every = max(1, math.ceil(span / 8))
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**e for e in exponents if e % every == 0 for m in multiples]
    return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
