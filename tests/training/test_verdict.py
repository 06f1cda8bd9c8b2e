"""What becomes of runs, from logs written as the loop writes them."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikepatch.source.typed import parsed
from spikepatch.spikes.conclusion import CurveVerdict
from spikepatch.spikes.detector import SpikeDetector, news
from spikepatch.spikes.events import Event
from spikepatch.training.log import open_log, read
from spikepatch.training.verdict import RunResult, Verdict, judge_run, losses_by_rate, sensitivity, summarise

RUN: dict[str, Any] = {
    "type": "run", "name": "a", "source": "arch:x", "recipe": None, "patched": False, "lr": 1e-3, "multiplier": 1.0,
    "seed": 0, "steps": 300, "warmup_steps": 20, "parameters": 10, "versions": {}, "command": "",
}  # fmt: skip


def calm(steps: int, sigma: float = 0.02) -> list[float]:
    noise = np.random.default_rng(steps).normal(0, sigma, steps)
    return [float(2 + 6 * math.exp(-t / 60) + noise[t]) for t in range(steps)]


def judged(
    path: Path, losses: Sequence[float], *, evals: Sequence[float] = (), stop: str = "",
    norms: Mapping[int, float] = types.MappingProxyType({}),
) -> RunResult:  # fmt: skip
    """The result of a run with these losses and a gradient norm of 1, but at the steps that have another one."""
    file, detector = path / "log.jsonl", SpikeDetector()
    with open_log(file, resume_at=None) as log:
        log.write(RUN)
        for step, loss in enumerate(losses, start=1):
            norm = norms.get(step, 1.0)
            before, detector = detector, detector.observe(step, loss, norm)
            log.write({
                "type": "step", "step": step, "batch": step - 1, "loss": loss, "gradient_norm": norm, "lr": 1e-3,
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
    return judge_run(read(file))


def with_spike(losses: list[float], at: int, length: int, height: float) -> list[float]:
    return [loss + height * (at <= step < at + length) for step, loss in enumerate(losses, start=1)]


def test_healthy(tmp_path: Path) -> None:
    losses = calm(300)
    result = judged(tmp_path, losses, evals=[3.0, 2.5])
    assert result.verdict == "healthy"
    assert result.text.startswith("no spike in steps 9 to 300; largest excess 0.0")
    assert result.judged == (9, 300)
    assert result.largest_excess is not None
    assert 0 < result.largest_excess < 0.1
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
    assert result.text.startswith("1 spike, back: longest 3 rows from step 120, highest +3.9")
    assert result.text.endswith("; 1 blip of one row; it stopped at step 300 of 300: two are enough")
    assert [(e.onset, e.duration, e.back, e.form) for e in result.events] == [
        (120, 3, 123, "spike"), (200, 1, 201, "blip"),
    ]  # fmt: skip
    assert result.largest_excess == pytest.approx(4, abs=0.3)


def test_blips_only(tmp_path: Path) -> None:
    result = judged(tmp_path, with_spike(calm(300), 200, 1, 2.0))
    assert result.verdict == "blips only"
    assert result.text.startswith("1 blip of one row, highest +")
    assert summarise([result]).exit_code == 0


def test_a_single_step_that_is_not_finite_is_a_spike(tmp_path: Path) -> None:
    losses = calm(300)
    losses[99] = math.nan
    result = judged(tmp_path, losses)
    assert result.verdict == "spikes"
    assert "1 non-finite stretch, back" in result.text
    assert result.final_loss is not None


def test_the_first_steps_are_judged_from_the_ninth_on_and_an_explosion_shows(tmp_path: Path) -> None:
    """The old detector needed 32 of them."""
    spiked = judged(tmp_path, with_spike(calm(300), 10, 8, 5.0))
    assert spiked.verdict == "spikes"
    assert spiked.events[0].onset == 10
    exploded = judged(tmp_path, with_spike(calm(300), 4, 3, 12.0))
    assert exploded.verdict == "spikes"
    assert exploded.events[0].onset == 4


def test_not_back_at_once(tmp_path: Path) -> None:
    result = judged(tmp_path, with_spike(calm(300), 150, 151, 3.0))
    assert result.verdict == "not back"
    assert result.text.startswith("not back since step 150: it stays on another level, from 2.")


def test_not_back_slowly(tmp_path: Path) -> None:
    """0.3 of the noise a step."""
    losses = [loss + 0.006 * max(0, t - 150) for t, loss in enumerate(calm(500))]
    result = judged(tmp_path, losses)
    assert result.verdict == "not back"
    assert "it rises slowly" in result.text
    assert judged(tmp_path, losses[:160]).verdict == "healthy"


def test_a_loss_that_rises_during_warm_up_is_told(tmp_path: Path) -> None:
    """As learned weights do: from 2 up to 3.5, and not back to where it was."""
    rise = [2 + 1.5 * min(1, max(0, t - 10) / 20) - 0.002 * max(0, t - 30) for t in range(300)]
    noise = np.random.default_rng(0).normal(0, 0.02, 300)
    result = judged(tmp_path, [float(a + b) for a, b in zip(rise, noise, strict=True)])
    assert result.verdict == "not back"
    back = [2 + 1.5 * min(1, max(0, t - 10) / 20) * math.exp(-max(0, t - 30) / 30) for t in range(300)]
    result = judged(tmp_path, [float(a + b) for a, b in zip(back, noise, strict=True)])
    assert result.verdict == "spikes"
    assert "all back" in result.text or ", back: " in result.text


def test_not_back_from_nan(tmp_path: Path) -> None:
    losses = calm(200) + [math.nan] * 20
    result = judged(tmp_path, losses)
    assert (result.verdict, result.text) == ("not back", "not back since step 201: not finite, 20 rows")
    assert result.final_loss == pytest.approx(math.fsum(losses[150:200]) / 50, rel=1e-14)
    nothing = judged(tmp_path, [math.nan] * 12)
    assert (nothing.verdict, nothing.initial_loss, nothing.final_loss) == ("not back", None, None)


@pytest.mark.parametrize(("steps", "verdict"), [(0, "cannot tell"), (51, "cannot tell"), (52, "healthy")])
def test_cannot_tell(tmp_path: Path, steps: int, verdict: str) -> None:
    """32 judged steps after a warm-up of 20."""
    result = judged(tmp_path, calm(300)[:steps])
    assert result.verdict == verdict
    if verdict == "cannot tell":
        left = max(steps - 20, 0)
        assert result.text == f"cannot tell: {left} rows after the warm-up are judged, 32 are needed"
        spiked = judged(tmp_path, with_spike(calm(300)[:steps], 40, 2, 9.0))
        assert spiked.verdict == ("spikes" if steps else "cannot tell")  # what was seen is told


def test_the_gradient_norm_decides_nothing(tmp_path: Path) -> None:
    result = judged(tmp_path, calm(300), norms={150: 40.0, 200: 40.0, 201: 30.0})
    assert result.verdict == "healthy"
    assert [(e.kind, e.onset, e.trace) for e in result.events] == [
        ("gradient_norm", 150, False), ("gradient_norm", 200, False),
    ]  # fmt: skip
    traced = judged(tmp_path, with_spike(calm(300), 152, 3, 4.0), norms={150: 40.0, 200: 40.0})
    assert [e.trace for e in traced.events if e.kind == "gradient_norm"] == [True, False]


def test_what_a_rewind_took_back_counts(tmp_path: Path) -> None:
    file, losses = tmp_path / "log.jsonl", calm(300)
    with open_log(file, resume_at=None) as log:
        log.write(RUN)
        for step in [*range(1, 121), *range(101, 301)]:
            log.write({
                "type": "step", "step": step, "batch": step - 1, "loss": losses[step - 1], "gradient_norm": 1.0,
                "lr": 1e-3, "tokens": 64 * step, "seconds": 0.25, "applied": True, "flags": [],
            })  # fmt: skip
            if step == 120 and not log_has_rewind(file):
                opened = Event("loss", 120, 120, 6.0, 2.8, 90.0)
                log.write({"type": "event", "step": 120, **dataclasses.asdict(opened)})
                log.write({"type": "rewind", "step": 120, "to": 100, "skipped": [100, 119]})
    result = judge_run(read(file))
    assert result.verdict == "spikes"
    assert [(e.onset, e.back, e.form) for e in result.events] == [(120, 121, "spike")]


def log_has_rewind(file: Path) -> bool:
    return '"rewind"' in file.read_text()


def result(
    name: str = "a", verdict: CurveVerdict = "healthy", *, lr: float = 1e-3, multiplier: float = 1.0, seed: int = 0,
    patched: bool = False, initial: float | None = 10.0, final: float | None = 3.0, held_out: float | None = None,
) -> RunResult:  # fmt: skip
    return RunResult(
        name=name, source="arch:x", recipe=None, patched=patched, lr=lr, multiplier=multiplier, seed=seed, steps=300,
        warmup_steps=20, done=300, verdict=verdict, text="",
        judged=(9, 300), largest_excess=0.1, events=(), scores={}, initial_loss=initial,
        final_loss=final, eval_loss=held_out, perplexity=None, tokens=0, seconds=0.0,
    )  # fmt: skip


Results = Callable[[CurveVerdict], list[RunResult]]
BAD: list[CurveVerdict] = ["spikes", "unstable", "not back", "cannot tell"]


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
def test_the_exit_code(results: Results, code: int, bad: CurveVerdict) -> None:
    assert summarise(results(bad)).exit_code == code


def test_the_largest_stable_learning_rate_is_stable_for_every_seed() -> None:
    told: dict[float, tuple[CurveVerdict, CurveVerdict]] = {
        1e-3: ("healthy", "healthy"),
        2e-3: ("blips only", "healthy"),
        4e-3: ("healthy", "spikes"),
        8e-3: ("healthy", "healthy"),  # above one that spikes: luck, and not what is asked for
        1.6e-2: ("not back", "cannot tell"),
    }
    runs = [
        result(lr=lr, multiplier=lr / 1e-3, seed=seed, verdict=verdict)
        for lr, verdicts in told.items()
        for seed, verdict in enumerate(verdicts)
    ]
    (model,) = summarise(runs).models
    assert (model.stable_lr, model.runs) == (2e-3, 10)
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
    assert parsed(Verdict, json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict
