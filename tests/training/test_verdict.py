"""What becomes of runs, from logs written as the loop writes them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikepatch.training.log import open_log, read
from spikepatch.training.spikes import SpikeDetector, news
from spikepatch.training.verdict import RunResult, RunVerdict, Verdict, judge, losses_by_rate, sensitivity, summarise

RUN: dict[str, Any] = {
    "type": "run", "name": "a", "source": "arch:x", "recipe": None, "patched": False, "lr": 1e-3, "multiplier": 1.0,
    "seed": 0, "steps": 300, "warmup_steps": 20, "parameters": 10, "versions": {}, "command": "",
}  # fmt: skip


def calm(steps: int, sigma: float = 0.02) -> list[float]:
    noise = np.random.default_rng(steps).normal(0, sigma, steps)
    return [float(2 + 6 * math.exp(-t / 60) + noise[t]) for t in range(steps)]


def judged(path: Path, losses: Sequence[float], *, evals: Sequence[float] = (), stop: str = "") -> RunResult:
    """The result of a run with these losses and a gradient norm of 1."""
    file, detector = path / "log.jsonl", SpikeDetector()
    with open_log(file, resume_at=None) as log:
        log.write(RUN)
        for step, loss in enumerate(losses, start=1):
            before, detector = detector, detector.observe(step, loss, 1.0)
            log.write({
                "type": "step", "step": step, "batch": step - 1, "loss": loss, "gradient_norm": 1.0, "lr": 1e-3,
                "tokens": 64 * step, "seconds": 0.25, "applied": math.isfinite(loss), "flags": detector.flags,
            })  # fmt: skip
            for event in news(before, detector):
                log.write({"type": "event", "step": step, **dataclasses.asdict(event)})
        for event in detector.under_way:
            log.write({"type": "event", "step": len(losses), **dataclasses.asdict(event)})
        for loss in evals:
            log.write({"type": "eval", "step": len(losses), "loss": loss})
        if stop:
            log.write({"type": "stop", "step": len(losses), "why": stop})
    return judge(read(file))


def with_spike(losses: list[float], at: int, length: int, height: float) -> list[float]:
    return [loss + height * (at <= step < at + length) for step, loss in enumerate(losses, start=1)]


def test_spike_free(tmp_path: Path) -> None:
    losses = calm(300)
    result = judged(tmp_path, losses, evals=[3.0, 2.5])
    assert (result.verdict, result.text) == ("spike-free", "spike-free over 300 steps at lr 0.001")
    assert result.events == ()
    assert result.initial_loss == losses[0]
    assert result.final_loss == pytest.approx(math.fsum(losses[-50:]) / 50, rel=1e-14)
    assert (result.eval_loss, result.perplexity) == (2.5, math.exp(2.5))
    assert (result.done, result.tokens, result.seconds) == (300, 64 * 300, 75.0)
    assert result.scores["losses twice the mean, stretches"] == 0
    assert result.scores["spike score, loss"] is None


def test_spikes(tmp_path: Path) -> None:
    losses = with_spike(with_spike(calm(300), 120, 3, 4.0), 200, 1, 2.0)
    result = judged(tmp_path, losses, stop="two are enough")
    assert result.verdict == "spikes"
    assert result.text == (
        "spikes over 300 steps at lr 0.001: 2 in the loss; it stopped at step 300 of 300: two are enough"
    )
    assert [(e.onset, e.duration, e.outcome) for e in result.events] == [(120, 3, "recovered"), (200, 1, "recovered")]


def test_a_single_step_that_is_not_finite_is_a_spike(tmp_path: Path) -> None:
    losses = calm(300)
    losses[99] = math.nan
    result = judged(tmp_path, losses)
    assert result.verdict == "spikes"
    assert "1 non-finite" in result.text
    assert result.final_loss is not None


def test_the_first_steps_have_no_baseline_but_an_explosion_shows(tmp_path: Path) -> None:
    assert judged(tmp_path, with_spike(calm(300), 10, 8, 5.0)).verdict == "spike-free"
    exploded = judged(tmp_path, with_spike(calm(300), 10, 8, 12.0))
    assert exploded.verdict == "spikes"
    assert exploded.events == ()
    assert "the loss went to 1" in exploded.text


def test_diverged_at_once(tmp_path: Path) -> None:
    result = judged(tmp_path, with_spike(calm(300), 150, 150, 3.0))
    assert result.verdict == "diverged"
    assert result.text == "diverged at step 150, lr 0.001: the loss rose and did not come back"


def test_diverged_slowly(tmp_path: Path) -> None:
    """Far too slow to be an event: 0.3 of the noise a step."""
    losses = [loss + 0.006 * max(0, t - 150) for t, loss in enumerate(calm(500))]
    result = judged(tmp_path, losses)
    assert result.events == ()
    assert result.verdict == "diverged"
    assert "diverged slowly over 500 steps" in result.text
    assert judged(tmp_path, losses[:170]).verdict == "spike-free"


def test_a_loss_that_rises_during_warm_up_only_has_not_diverged(tmp_path: Path) -> None:
    """As learned weights do: from 2 up to 3.5, and not back to where it was."""
    rise = [2 + 1.5 * min(1, t / 20) - 0.002 * max(0, t - 20) for t in range(300)]
    noise = np.random.default_rng(0).normal(0, 0.02, 300)
    result = judged(tmp_path, [float(a + b) for a, b in zip(rise, noise, strict=True)])
    assert result.verdict == "spike-free"


def test_diverged_to_nan(tmp_path: Path) -> None:
    losses = calm(200) + [math.nan] * 20
    result = judged(tmp_path, losses)
    assert (result.verdict, result.text) == ("diverged", "diverged at step 201, lr 0.001: non-finite")
    assert result.final_loss == pytest.approx(math.fsum(losses[150:200]) / 50, rel=1e-14)
    nothing = judged(tmp_path, [math.nan] * 12)
    assert (nothing.verdict, nothing.initial_loss, nothing.final_loss) == ("diverged", None, None)


@pytest.mark.parametrize(("steps", "verdict"), [(0, "too short"), (83, "too short"), (84, "spike-free")])
def test_too_short_to_tell(tmp_path: Path, steps: int, verdict: str) -> None:
    """64 steps after a warm-up of 20."""
    result = judged(tmp_path, calm(300)[:steps])
    assert result.verdict.startswith(verdict)
    if verdict == "too short":
        assert result.text == f"too short to tell: {max(steps - 20, 0)} steps after warm-up, 64 are needed"
        spiked = judged(tmp_path, with_spike(calm(300)[:steps], 60, 1, 9.0))
        assert spiked.verdict == ("spikes" if steps else "too short to tell")  # what was seen is told


def result(
    name: str = "a", verdict: RunVerdict = "spike-free", *, lr: float = 1e-3, multiplier: float = 1.0, seed: int = 0,
    patched: bool = False, initial: float | None = 10.0, final: float | None = 3.0, held_out: float | None = None,
) -> RunResult:  # fmt: skip
    return RunResult(
        name=name, source="arch:x", recipe=None, patched=patched, lr=lr, multiplier=multiplier, seed=seed, steps=300,
        warmup_steps=20, done=300, verdict=verdict, text="", events=(), scores={}, initial_loss=initial,
        final_loss=final, eval_loss=held_out, perplexity=None, tokens=0, seconds=0.0,
    )  # fmt: skip


Results = Callable[[RunVerdict], list[RunResult]]
BAD: list[RunVerdict] = ["spikes", "diverged", "too short to tell"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("results", "code"),
    [
        (lambda bad: [result(), result("p", patched=True)], 0),
        (lambda bad: [result(), result("p", bad, patched=True)], 1),
        (lambda bad: [result("a", bad), result("p", patched=True)], 0),  # only the patched ones count
        (lambda bad: [result("p", patched=True), result("q", bad, patched=True)], 1),
        (lambda bad: [result("a"), result("b", bad)], 1),  # none is patched: all count
        (lambda bad: [result("a"), result("b")], 0),
        (lambda bad: [result("p", patched=True), result("p", bad, patched=True, seed=1)], 1),
        (lambda bad: [result("p", patched=True), result("p", bad, patched=True, lr=4e-3, multiplier=4.0)], 0),
        (lambda bad: [result("p", bad, patched=True), result("p", patched=True, lr=4e-3, multiplier=4.0)], 1),
        (lambda bad: [result("p", patched=True, multiplier=2.0)], 1),  # nothing at multiplier 1 says nothing
        (lambda bad: [result("p", patched=True), result("q", patched=True, multiplier=2.0)], 1),
        (lambda bad: [], 1),
    ],
)
def test_the_exit_code(results: Results, code: int, bad: RunVerdict) -> None:
    assert summarise(results(bad)).exit_code == code


def test_the_largest_stable_learning_rate_is_stable_for_every_seed() -> None:
    told: dict[float, tuple[RunVerdict, RunVerdict]] = {
        1e-3: ("spike-free", "spike-free"),
        2e-3: ("spike-free", "spike-free"),
        4e-3: ("spike-free", "spikes"),
        8e-3: ("diverged", "too short to tell"),
    }
    runs = [
        result(lr=lr, multiplier=lr / 1e-3, seed=seed, verdict=verdict)
        for lr, verdicts in told.items()
        for seed, verdict in enumerate(verdicts)
    ]
    (model,) = summarise(runs).models
    assert (model.stable_lr, model.runs) == (2e-3, 8)
    (model,) = summarise([result(verdict="spikes")]).models
    assert model.stable_lr is None


def test_sensitivity_is_the_mean_excess_over_the_best_rate_capped_at_the_initial_loss() -> None:
    """min(loss, loss_0) - loss*: 0.5, 0, 1, 7 (of 10 and 25 and NaN)."""
    runs = [
        result(lr=3e-4, final=3.5),
        result(lr=1e-3, final=3.0),
        result(lr=3e-3, final=4.0),
        result(lr=1e-2, final=25.0),
    ]
    assert sensitivity(runs) == pytest.approx((0.5 + 0 + 1 + 7) / 4)
    assert sensitivity(runs[:3]) == pytest.approx(0.5)
    assert sensitivity(runs[:1]) is None
    assert sensitivity([runs[0], result(lr=1e-3, final=None)]) == pytest.approx(6.5 / 2)
    assert sensitivity([runs[0], result(lr=1e-3, initial=None)]) is None


def test_sensitivity_averages_seeds_after_the_minimum_and_prefers_held_out_data() -> None:
    runs = [
        result(lr=1e-3, seed=0, held_out=2.0),
        result(lr=1e-3, seed=1, held_out=4.0),
        result(lr=2e-3, seed=0, held_out=30.0),
        result(lr=2e-3, seed=1, held_out=4.0),
    ]
    assert losses_by_rate(runs) == {1e-3: (2.0, 4.0), 2e-3: (10.0, 4.0)}
    assert sensitivity(runs) == pytest.approx((0 + 4) / 2)
    assert losses_by_rate([*runs[:3], result(lr=2e-3, seed=1)])[1e-3] == (3.0, 3.0)  # one has none: final losses


def test_a_run_that_ended_non_finite_counts_its_initial_loss(tmp_path: Path) -> None:
    """Its weights are those of before, which no step made finite again."""
    broken = judged(tmp_path, calm(200) + [math.nan] * 20, evals=[2.2])
    fine = dataclasses.replace(judged(tmp_path, calm(200), evals=[2.2]), lr=5e-4)
    assert losses_by_rate([broken, fine]) == {1e-3: (broken.initial_loss,), 5e-4: (2.2,)}


def test_verdict_json_comes_back(tmp_path: Path) -> None:
    spiked = judged(tmp_path, with_spike(calm(300), 120, 3, 4.0), evals=[2.5])
    verdict = summarise([spiked, result("p", patched=True, lr=0.1 + 0.2)])
    assert verdict.runs[0].events
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict
