"""Two runs on the same batches: what the data does to both, and what one does alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spikepatch import TrainingLog, judge
from tests.spikes.curves import Array, spike


def log(losses: Array, name: str) -> TrainingLog:
    return TrainingLog(tuple(range(1, len(losses) + 1)), tuple(losses.tolist()), name=name)


def pair(seed: int, same: bool) -> tuple[Array, Array]:
    """Falls of their own, and the noise of the batches in common, with bad batches at 300 and 500."""
    draw = np.random.default_rng(seed)
    batches = draw.normal(0, 0.05, 800)
    batches[[299, 499]] += 1.0
    own = [2 + 6 * np.exp(-np.arange(800) / tau) + draw.normal(0, 0.005, 800) for tau in (80, 100)]
    other = batches if same else draw.permutation(batches)
    return own[0] + batches, own[1] + other


@pytest.mark.parametrize("seed", range(3))
def test_bad_batches_are_the_data_s_and_spikes_the_run_s(seed: int) -> None:
    ours, theirs = pair(seed, same=True)
    ours += spike(800, 599, 1.5, 4.0, rise=2)
    report = judge(log(ours, "a"), against=log(theirs, "b"))
    assert report.twin is not None
    assert report.twin.same_batches
    assert (report.twin.correlation or 0) > 0.9
    assert (report.twin.quieter or 0) > 4
    assert [(e.onset, e.origin) for e in report.events] == [(300, "data"), (500, "data"), (600, "run")]
    assert any(
        "of 3 events of the loss 2 are in both, so the data's, and 1 in this run only" in s for s in report.lines()
    )


@pytest.mark.parametrize("seed", range(3))
def test_runs_on_other_batches_say_nothing(seed: int) -> None:
    ours, theirs = pair(seed, same=False)
    report = judge(log(ours, "a"), against=log(theirs, "b"))
    assert report.twin is not None
    assert not report.twin.same_batches
    assert {e.origin for e in report.events} == {None}
    assert any(
        "have not seen the same batches at the same steps, and it says nothing" in line for line in report.lines()
    )


def test_few_steps_in_common() -> None:
    ours, theirs = pair(0, same=True)
    late = TrainingLog(tuple(range(760, 1560)), tuple(theirs.tolist()), name="late")
    report = judge(log(ours, "a"), against=late)
    assert any("too few steps in common" in line for line in report.lines())


def test_a_twin_that_is_the_same_run() -> None:
    ours, _ = pair(0, same=True)
    report = judge(log(ours, "a"), against=log(ours, "a"))
    assert report.twin is not None
    assert report.twin.quieter == math.inf
    assert report.to_dict()["twin"]["quieter"] is None
    assert any("(correlation 1.000, most rows equal)" in line for line in report.lines())
    assert {e.origin for e in report.events} == {"data"}
