"""The constants of the detector, by simulation: ``python -m tests.spikes.simulate [noise] [false] [power] [back]``.

``noise``: chance of a false alarm per row for a baseline of n values, the tail beyond each simulated baseline exact.
``false``: events that the whole detector sees in series without any, by kind of noise and threshold.
``power``: share of planted excursions that are found, by height in units of noise and length in rows.
``back``: how long after the end of an excursion the detector says so, and how often it says so of one that is not over.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import click
import numpy as np
import numpy.typing as npt

from spikepatch.spikes.detector import SpikeDetector
from spikepatch.spikes.events import BAND
from spikepatch.spikes.statistic import LAGS, LEVEL_OF, THRESHOLD, threshold

Array = npt.NDArray[np.float64]
THRESHOLDS = (6.0, 7.0, 8.0)


def baseline(windows: Array, lags: tuple[int, ...] = LAGS) -> tuple[Array, Array]:
    """Level and noise of each row, as ``statistic.py`` has them, in numpy."""
    n = windows.shape[1]
    found = []
    for lag in (lag for lag in lags if n >= 2 * lag):
        d = windows[:, lag:] - windows[:, :-lag]
        found.append(np.median(np.abs(d - np.median(d, axis=1, keepdims=True)), axis=1))
    last = windows[:, -min(max(4, n // 4), LEVEL_OF) :]
    return np.median(last, axis=1), 1.4826 / math.sqrt(2) * np.max(found, axis=0)


def gaussian_tail(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erfc)(x / math.sqrt(2)) / 2)


def laplace_tail(x: Array) -> Array:
    return np.asarray(np.exp(-np.abs(x)) / 2)


def t5_tail(x: Array) -> Array:
    """Abramowitz and Stegun 26.7.3, five degrees of freedom."""
    angle = np.arctan(x / math.sqrt(5))
    sine, cosine = np.sin(angle), np.cos(angle)
    return np.asarray(0.5 - (angle + sine * (cosine + 2 / 3 * cosine**3)) / math.pi)


DRAWS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, ...]], Array], Callable[[Array], Array]]] = {
    "gaussian": (lambda draw, shape: draw.normal(size=shape), gaussian_tail),
    "laplace": (lambda draw, shape: draw.laplace(size=shape), laplace_tail),
    "t5": (lambda draw, shape: draw.standard_t(5, size=shape), t5_tail),
}


def rate(name: str, n: int, limit: float, windows: int = 20_000) -> float:
    """Chance of an alarm per row."""
    draw, tail = DRAWS[name]
    level, scale = baseline(draw(np.random.default_rng([n, windows]), (windows, n)))
    return float(tail(level + threshold(n, limit) * scale).mean())


def noise() -> None:
    click.echo("false alarms per row of the first scale, by rows in the baseline")
    sizes = (8, 12, 16, 24, 32, 48, 64)
    click.echo(f"{'':16}" + "".join(f"{n:>10}" for n in sizes))
    for name in DRAWS:
        for limit in THRESHOLDS:
            rates = "".join(f"{rate(name, n, limit):>10.1e}" for n in sizes)
            click.echo(f"{name:10} {limit:4.0f} {rates}")


def smooth(draw: np.random.Generator, rows: int, weight: float) -> Array:
    """An autoregression of the first order with deviation 1."""
    values = np.empty(rows)
    value = draw.normal()
    for i, x in enumerate(draw.normal(size=rows) * math.sqrt(1 - weight**2)):
        value = weight * value + x
        values[i] = value
    return values


SERIES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "gaussian": lambda draw, rows: draw.normal(size=rows),
    "laplace": lambda draw, rows: draw.laplace(size=rows),
    "t5": lambda draw, rows: draw.standard_t(5, size=rows),
    "rounded to 1 deviation": lambda draw, rows: np.round(draw.normal(size=rows)),
    "autoregression 0.5": lambda draw, rows: smooth(draw, rows, 0.5),
    "autoregression 0.9": lambda draw, rows: smooth(draw, rows, 0.9),
    "walk of 0.1 a row": lambda draw, rows: draw.normal(size=rows) + 0.1 * np.cumsum(draw.normal(size=rows)),
    "walk alone": lambda draw, rows: 0.1 * np.cumsum(draw.normal(size=rows)),
    "mean over 10, each row": lambda draw, rows: np.convolve(draw.normal(size=rows + 9), np.full(10, 0.1), "valid"),
    "exponential average 0.99": lambda draw, rows: 10 * (smooth(draw, rows, 0.99) - smooth(draw, 1, 0)),
    "deviation doubles": lambda draw, rows: draw.normal(size=rows) * np.repeat([1.0, 2.0], rows // 2 + 1)[:rows],
}


def detected(values: Array, limit: float = THRESHOLD) -> SpikeDetector:
    """The detector behind a series, around a loss of 3 with noise of 0.05."""
    detector = SpikeDetector(threshold=limit)
    for step, loss in enumerate((3 + 0.05 * values).tolist(), start=1):
        detector = detector.observe(step, loss)
    return detector


def false(rows: int = 40_000) -> None:
    click.echo(f"events in three times {rows:,} rows without any: of one row / of several")
    click.echo(f"{'':26}" + "".join(f"{limit:>12g}" for limit in THRESHOLDS))
    for name, series in SERIES.items():
        cells = []
        for limit in THRESHOLDS:
            events = [
                e for seed in (5, 6, 7) for e in detected(series(np.random.default_rng(seed), rows), limit).events
            ]
            single = sum(e.duration == 1 for e in events)
            cells.append(f"{single} / {len(events) - single}")
        click.echo(f"{name:26}" + "".join(f"{cell:>12}" for cell in cells))


def power(trials: int = 200) -> None:
    lengths: tuple[int, ...]
    click.echo("share of excursions found, after 200 rows of Gaussian noise")
    lengths = (1, 2, 3, 5, 8, 20, 80, 300)
    for limit in THRESHOLDS:
        click.echo(f"threshold {limit:g}; rows  " + "".join(f"{n:>6}" for n in lengths))
        for height in (2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 14.0):
            cells = []
            for length in lengths:
                few = trials if length < 50 else trials // 4
                found = 0
                for seed in range(few):
                    values = np.random.default_rng([seed, length]).normal(size=210 + length)
                    values[200 : 200 + length] += height
                    found += any(e.onset >= 196 for e in detected(values, limit).events)
                cells.append(f"{found / few:>6.2f}")
            click.echo(f"  height {height:>4g} sigma     " + "".join(cells))
    click.echo("the same, a hump: half a sine of that height")
    lengths = (20, 80, 300, 1000, 3000)
    click.echo(f"threshold {THRESHOLD:g}; rows  " + "".join(f"{n:>6}" for n in lengths))
    for height in (1.0, 2.0, 4.0, 8.0, 20.0, 60.0):
        cells = []
        for length in lengths:
            few = 40 if length <= 300 else 10
            found = 0
            for seed in range(few):
                before = max(400, length)
                values = np.random.default_rng([seed, length]).normal(size=before + length)
                values[before:] += height * np.sin(np.pi * np.arange(length) / length)
                found += any(e.onset >= before - 4 for e in detected(values).events)
            cells.append(f"{found / few:>6.2f}")
        click.echo(f"  height {height:>4g} sigma     " + "".join(cells))


def back(trials: int = 200) -> None:
    click.echo(f"a step of 30 sigma that leaves an excess behind; band {BAND:g}; share called back within 20, 200 rows")
    for excess in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0):
        within = {20: 0, 200: 0}
        for seed in range(trials):
            values = np.random.default_rng([seed, 9]).normal(size=420)
            values[200:] += excess
            values[200:203] += 30
            event = detected(values).events[0]
            for rows in within:
                within[rows] += event.back is not None and event.back < 204 + rows
        click.echo(f"  excess {excess:>4g}: " + "".join(f"{n / trials:>7.3f}" for n in within.values()))


def main(words: list[str]) -> None:
    parts = {"noise": noise, "false": false, "power": power, "back": back}
    for word in words or list(parts):
        parts[word]()


if __name__ == "__main__":
    main(sys.argv[1:])
