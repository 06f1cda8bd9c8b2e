"""The published scores, vectorised, against plain loops that read as their definitions do."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from spikepatch.spikes.scores import above_median, loss_doubled, scores, spike_score

Array = npt.NDArray[np.float64]


def slow_spike_score(values: Array, window: int, deviations: float) -> float:
    found = 0.0
    for i in range(window, len(values)):
        last = values[i - window : i]
        mean = math.fsum(last) / window
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in last) / window)
        found += 1.0 if deviation > 0 and abs(values[i] - mean) >= deviations * deviation else 0.0
    return 100 * found / (len(values) - window)


def slow_above_median(losses: Array, window: int, margin: float) -> float:
    judged = range(window - 1, len(losses))
    found = sum(losses[i] > sorted(losses[i - window + 1 : i + 1])[window // 2] + margin for i in judged)
    return 10_000 * float(found) / len(judged)


def slow_loss_doubled(losses: Array, window: int, factor: float, patience: int) -> float:
    """As a callback sees them: a counter that an ordinary loss sets back."""
    fired, counter = 0, 0
    for i in range(window, len(losses)):
        counter = counter + 1 if losses[i] >= factor * (math.fsum(losses[i - window : i]) / window) else 0
        fired += counter == patience + 1
    return float(fired)


def curve(seed: int, steps: int = 1500) -> Array:
    """A fall with noise of heavy tails, single outliers either way, and stretches of high loss, one at the end."""
    draw = np.random.default_rng(seed)
    values = 2 + 6 * np.exp(-np.arange(steps) / 200) + 0.02 * draw.standard_t(3, steps)
    values[draw.integers(0, steps, 20)] += draw.choice([-1.0, 0.5, 3.0], 20)
    for length in (3, 4, 5, 6, 30):
        start = int(draw.integers(100, steps - 100))
        values[start : start + length] *= 2.5
    values[-5:] *= 3
    return values


@pytest.mark.parametrize("seed", range(4))
def test_against_plain_loops(seed: int) -> None:
    values = curve(seed)
    small = {"window": 100, "deviations": 4.0}
    expected = slow_spike_score(values, 100, 4.0)
    assert spike_score(values, **small) == pytest.approx(expected, rel=1e-15)  # type: ignore[arg-type]
    assert expected > 0
    assert spike_score(values) == pytest.approx(slow_spike_score(values, 1000, 7.0), rel=1e-15)
    assert above_median(values) == pytest.approx(slow_above_median(values, 201, 0.1), rel=1e-15)
    assert loss_doubled(values) == slow_loss_doubled(values, 100, 2.0, 4)
    assert (loss_doubled(values) or 0) >= 2


def test_more_values_than_are_looked_at_together() -> None:
    values = curve(0, steps=4096 + 300)
    assert spike_score(values, window=40) == pytest.approx(slow_spike_score(values, 40, 7.0), rel=1e-15)
    assert loss_doubled(values) == slow_loss_doubled(values, 100, 2.0, 4)


@pytest.mark.parametrize(
    ("score", "least"),
    [(spike_score, 1001), (above_median, 201), (loss_doubled, 101)],
    ids=["deviations", "median", "doubled"],
)
def test_not_applicable_below_the_window(score: Callable[[Array], float | None], least: int) -> None:
    assert score(np.linspace(3, 2, least - 1)) is None
    assert score(np.linspace(3, 2, least)) == 0
    assert score(np.zeros(0)) is None


def test_at_least_means_at_least() -> None:
    """Values whose means and deviations are exact."""
    last = np.array([1.0, 3.0] * 50)  # mean 2, deviation 1
    for value, found in ((9.0, 100.0), (np.nextafter(9, 0), 0.0), (-5.0, 100.0), (np.nextafter(-5, 0), 0.0)):
        assert spike_score(np.append(last, value), window=100) == found
    assert spike_score(np.append(np.ones(100), 50.0), window=100) == 0  # no deviation at all
    assert loss_doubled(np.append(last, [4.0, 5.0, 5.0, 5.0, 5.0])) == 1
    assert loss_doubled(np.append(last, [4.0, 5.0, 5.0, 5.0])) == 0  # four in a row are forgiven
    assert loss_doubled(np.append(last, [np.nextafter(4, 0), 5.0, 5.0, 5.0, 5.0])) == 0
    flat = np.append(np.full(200, 2.0), [2.1])  # 2.1 is not above 2 + 0.1
    assert above_median(flat) == 0
    flat[-1] = np.nextafter(2.1, 3)
    assert above_median(flat) == 10_000


def test_all_by_name() -> None:
    losses: list[float | None] = curve(0).tolist()
    losses[700:703] = [None, math.nan, math.inf]
    finite = np.array([v for v in losses if v is not None and math.isfinite(v)])
    found = scores(losses, [None] * 1500)
    assert found["spike score, loss"] == spike_score(finite)
    assert found["steps 0.1 above the median, per 10k"] == above_median(finite)
    assert found["losses twice the mean, stretches"] == loss_doubled(finite)
    assert found["spike score, gradient norm"] is None
    assert set(scores([], []).values()) == {None}
