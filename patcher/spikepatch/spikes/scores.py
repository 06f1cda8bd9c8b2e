"""Scores of spikes that others have published. They stand beside the verdict and decide nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spikepatch.spikes.hindsight import Array

#: Windows that are looked at together: bounds the memory, 33 MB at a window of 1,000.
_CHUNK = 4096


#: Values without which a score says nothing at all: shorter runs have none.
LEAST: dict[str, int] = {
    "spike score, loss": 1001,
    "spike score, gradient norm": 1001,
    "steps 0.1 above the median, per 10k": 201,
    "losses twice the mean, stretches": 101,
}


def scores(losses: Sequence[float | None], gradient_norms: Sequence[float | None]) -> dict[str, float | None]:
    """All of them, by name; None in a series stands for a value that was not finite."""
    loss, norm = _finite(losses), _finite(gradient_norms)
    return {
        "spike score, loss": spike_score(loss),
        "spike score, gradient norm": spike_score(norm),
        "steps 0.1 above the median, per 10k": above_median(loss),
        "losses twice the mean, stretches": loss_doubled(loss),
    }


def spike_score(values: Array, *, window: int = 1000, deviations: float = 7.0) -> float | None:
    """OLMo 2's spike score: the percentage of values that are at least seven standard deviations away from the rolling
    average of the last 1,000 values (arXiv 2501.00656). Used there on training loss and gradient norm.

    "Last" is read as the ones before the value: a value that is part of its own window of n is never more than
    (n - 1) / sqrt(n) deviations away. Both directions count, as "away" says. The deviation is the window's own, with
    divisor n; a window of equal values has none, and judges nothing. Percentage of the values that have a full window
    before them.

    On noise alone it fires 0 times in 200,000 values for Gaussian noise, 9 for Laplace, 64 for Student's t(5).
    """
    if len(values) <= window:
        return None
    found = 0
    for windows, value in _windows(values[:-1], values[window:], window):
        deviation = windows.std(axis=1)
        found += int(np.sum((np.abs(value - windows.mean(axis=1)) >= deviations * deviation) & (deviation > 0)))
    return 100.0 * found / (len(values) - window)


def above_median(losses: Array, *, window: int = 201, margin: float = 0.1) -> float | None:
    """Steps whose loss is more than 0.1 above the rolling median of 201 steps, per 10,000 steps (Qwen team).

    The window ends with the step itself, whose own loss moves a median of 201 by one rank at most. Per step that has a
    full window.
    """
    if len(losses) < window:
        return None
    found = 0
    for windows, value in _windows(losses, losses[window - 1 :], window):
        found += int(np.sum(value > np.median(windows, axis=1) + margin))
    return 10_000.0 * found / (len(losses) - window + 1)


def loss_doubled(losses: Array, *, window: int = 100, factor: float = 2.0, patience: int = 4) -> float | None:
    """Stretches of more than 4 steps in a row whose loss is at least twice the mean of the 100 before it: how often
    ``KillLossSpike`` of llm-foundry would have ended the run.

    Outliers enter the mean, as there. The window has 100 steps, its least; llm-foundry widens it to a twentieth of a
    run of more than 2,000 steps.
    """
    if len(losses) <= window:
        return None
    outlier = np.concatenate(
        [value >= factor * windows.mean(axis=1) for windows, value in _windows(losses[:-1], losses[window:], window)]
    )
    edges = np.diff(np.concatenate([[0], outlier.astype(np.int8), [0]]))
    lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    return float(np.sum(lengths > patience))


def _finite(values: Sequence[float | None]) -> Array:
    array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return array[np.isfinite(array)]


def _windows(values: Array, judged: Array, window: int) -> Iterator[tuple[Array, Array]]:
    """Windows of ``values`` as rows, beside the value that each one judges, a chunk at a time."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    assert len(windows) == len(judged)
    for start in range(0, len(windows), _CHUNK):
        yield windows[start : start + _CHUNK], judged[start : start + _CHUNK]
