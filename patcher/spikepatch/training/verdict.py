"""What became of each run, from its log alone; and of each model, over learning rates and seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spikepatch.training.log import RunLog, Step
from spikepatch.training.spikes import Event, SpikeDetector, noise

RunVerdict = Literal["spike-free", "spikes", "diverged", "too short to tell"]

#: Steps after warm-up that a run must have before the absence of spikes says anything: twice what the detector needs
#: for a baseline, so that half of them are judged whatever came before.
LEAST_STEPS = 64

#: A loss this many times the initial one, within the steps that the detector needs for its baseline, is a spike: the
#: factor of llm-foundry's ``KillLossSpike``. A fresh model starts near log V, a learned one below.
EXPLODED = 2.0

#: Applied steps whose mean is a level of the loss.
LEVEL = 50


@dataclass(frozen=True)
class RunResult:
    """One run, judged.

    Attributes:
        name, source, recipe, patched, lr, multiplier, seed, steps, warmup_steps: as in the log's first record.
        done: steps in the log that no rewind took back.
        verdict: ``diverged`` where the loss rose and did not come back, or steps stayed non-finite; ``spikes`` where
            the detector saw an event of any kind, one that was rewound or skipped too, or where the loss was more than
            twice the initial one before the detector had a baseline; ``too short to tell`` with fewer than 64 steps
            after warm-up; else ``spike-free``.
        text: the verdict as a sentence.
        events: in the order of their onsets.
        scores: published ones, by name; None is "n/a".
        initial_loss: of the first step, before any update.
        final_loss: mean of the last 50 applied steps; None where none was applied.
        eval_loss, perplexity: the last ones on held-out data.
        tokens: trained on. seconds: of all steps, rewound ones too.
    """

    name: str
    source: str
    recipe: str | None
    patched: bool
    lr: float
    multiplier: float
    seed: int
    steps: int
    warmup_steps: int
    done: int
    verdict: RunVerdict
    text: str
    events: tuple[Event, ...]
    scores: dict[str, float | None]
    initial_loss: float | None
    final_loss: float | None
    eval_loss: float | None
    perplexity: float | None
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {**dataclasses.asdict(self), "events": [dataclasses.asdict(event) for event in self.events]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunResult:
        return cls(**{**data, "events": tuple(Event(**event) for event in data["events"])})


@dataclass(frozen=True)
class ModelResult:
    """One model over its runs.

    Attributes:
        stable_lr: the largest learning rate at which the runs of all seeds are spike-free; None where there is none.
        sensitivity: to the learning rate, see ``sensitivity``; None for fewer than two rates.
    """

    name: str
    source: str
    recipe: str | None
    patched: bool
    runs: int
    stable_lr: float | None
    sensitivity: float | None


@dataclass(frozen=True)
class Verdict:
    """All runs, all models, and the exit code: 0 if every patched model, or where none is patched every model, is
    spike-free at multiplier 1 for every seed; else 1. Other multipliers do not count."""

    runs: tuple[RunResult, ...]
    models: tuple[ModelResult, ...]
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, the content of ``verdict.json``."""
        return {
            "exit_code": self.exit_code,
            "models": [dataclasses.asdict(model) for model in self.models],
            "runs": [run.to_dict() for run in self.runs],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        runs = tuple(RunResult.from_dict(run) for run in data["runs"])
        return cls(runs, tuple(ModelResult(**model) for model in data["models"]), data["exit_code"])


def judge(log: RunLog) -> RunResult:
    """The result of a run, of one in progress too. Pure: the same log gives the same result."""
    run, steps = log.run, log.kept
    applied = [s.loss for s in steps if s.applied and s.loss is not None]
    eval_loss = log.evals[-1].loss if log.evals else None
    done = steps[-1].step if steps else 0
    events = tuple(sorted(log.events, key=lambda event: event.onset))
    verdict, text = _verdict(log, events, done)
    return RunResult(
        name=run.name,
        source=run.source,
        recipe=run.recipe,
        patched=run.patched,
        lr=run.lr,
        multiplier=run.multiplier,
        seed=run.seed,
        steps=run.steps,
        warmup_steps=run.warmup_steps,
        done=done,
        verdict=verdict,
        text=text,
        events=events,
        scores=scores([s.loss for s in log.steps], [s.gradient_norm for s in log.steps]),
        initial_loss=steps[0].loss if steps else None,
        final_loss=statistics.fmean(applied[-LEVEL:]) if applied else None,
        eval_loss=eval_loss,
        perplexity=math.exp(eval_loss) if eval_loss is not None and eval_loss < 700 else None,
        tokens=steps[-1].tokens if steps else 0,
        seconds=math.fsum(s.seconds for s in log.steps),
    )


def summarise(results: Iterable[RunResult]) -> Verdict:
    """Per model, in the order in which they first come; the exit code."""
    runs = tuple(results)
    by_name: dict[str, list[RunResult]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    models = tuple(
        ModelResult(
            name=name,
            source=own[0].source,
            recipe=own[0].recipe,
            patched=own[0].patched,
            runs=len(own),
            stable_lr=_stable_lr(own),
            sensitivity=sensitivity(own),
        )
        for name, own in by_name.items()
    )
    judged_names = {m.name for m in models if m.patched} or set(by_name)
    at_one = [run for run in runs if run.name in judged_names and run.multiplier == 1]
    passed = {run.name for run in at_one} == judged_names != set() and all(r.verdict == "spike-free" for r in at_one)
    return Verdict(runs, models, 0 if passed else 1)


def sensitivity(runs: Sequence[RunResult]) -> float | None:
    """Learning-rate sensitivity of one model (Wortsman et al., arXiv 2309.14322, section 2.2):

        E over eta in [a, b] of ( min(loss(eta), loss_0) - loss* ),   loss* = min over eta of loss(eta)

    with the rates spaced evenly in the logarithm, in nats per token. loss(eta) is the loss on held-out data (the final
    training loss where none of these runs has any), averaged over seeds after the minimum; loss_0 is the loss at
    initialisation, which is also what a run counts that ended non-finite. 0 for a model that does not mind its learning
    rate; None for fewer than two rates, or without a first loss.
    """
    losses = losses_by_rate(runs)
    if len(losses) < 2:
        return None
    means = [statistics.fmean(own) for own in losses.values()]
    return statistics.fmean(mean - min(means) for mean in means)


def losses_by_rate(runs: Sequence[RunResult]) -> dict[float, tuple[float, ...]]:
    """What ``sensitivity`` averages: learning rate -> min(loss, loss_0) of each seed; empty without a first loss."""
    held_out = all(run.eval_loss is not None for run in runs)
    by_rate: dict[float, tuple[float, ...]] = {}
    for run in runs:
        if run.initial_loss is None:
            return {}
        loss = run.eval_loss if held_out else run.final_loss
        broken = loss is None or any(e.kind == "nonfinite" and e.outcome == "diverged" for e in run.events)
        capped = run.initial_loss if broken or loss is None else min(loss, run.initial_loss)
        by_rate[run.lr] = (*by_rate.get(run.lr, ()), capped)
    return by_rate


def _stable_lr(runs: Sequence[RunResult]) -> float | None:
    unstable = {run.lr for run in runs if run.verdict != "spike-free"}
    return max({run.lr for run in runs} - unstable, default=None)


def _verdict(log: RunLog, events: Sequence[Event], done: int) -> tuple[RunVerdict, str]:
    run = log.run
    where = f"over {_steps(done)} at lr {run.lr:g}"
    ended = f"; it stopped at step {log.stop.step} of {run.steps}: {log.stop.why}" if log.stop else ""
    gone = next((e for e in events if e.outcome == "diverged" and e.kind != "gradient_norm"), None)
    if gone is not None:
        what = "non-finite" if gone.kind == "nonfinite" else "the loss rose and did not come back"
        return "diverged", f"diverged at step {gone.onset}, lr {run.lr:g}: {what}{ended}"
    risen = _risen([s for s in log.kept if s.step > run.warmup_steps])
    if risen is not None:
        return "diverged", f"diverged slowly {where}: the loss ends {risen:.3g} above its lowest level{ended}"
    if events:
        kinds = {"loss": "in the loss", "gradient_norm": "in the gradient norm", "nonfinite": "non-finite"}
        counts = {text: sum(e.kind == kind for e in events) for kind, text in kinds.items()}
        told = ", ".join(f"{count} {text}" for text, count in counts.items() if count)
        return "spikes", f"spikes {where}: {told}{ended}"
    exploded = _exploded(log.steps[: SpikeDetector().warmup])
    if exploded is not None:
        loss, step = exploded
        return "spikes", f"spikes {where}: the loss went to {loss:.3g} at step {step}{ended}"
    after = done - run.warmup_steps
    if after < LEAST_STEPS:
        return (
            "too short to tell",
            f"too short to tell: {_steps(max(after, 0))} after warm-up, {LEAST_STEPS} are needed",
        )
    return "spike-free", f"spike-free {where}{ended}"


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def _exploded(steps: Sequence[Step]) -> tuple[float, int] | None:
    """The highest loss and its step, where that is more than ``EXPLODED`` times the first one."""
    losses = [(s.loss, s.step) for s in steps if s.loss is not None]
    highest = max(losses, default=None)
    return highest if highest is not None and highest[0] > EXPLODED * losses[0][0] > 0 else None


def _risen(steps: Sequence[Step]) -> float | None:
    """How far the loss ends above its lowest level, where one value as far above would be a spike: a divergence that
    was too slow to be one. Levels are medians of 50 steps, the noise is that of the last ``window`` ones."""
    losses = [s.loss for s in steps if s.applied and s.loss is not None]
    if len(losses) < 2 * LEVEL:
        return None
    levels = [statistics.median(losses[i : i + LEVEL]) for i in range(len(losses) % LEVEL, len(losses), LEVEL)]
    risen, detector = levels[-1] - min(levels), SpikeDetector()
    return risen if risen > detector.threshold * noise(losses[-detector.window :]) else None


Array = npt.NDArray[np.float64]


#: Windows that are looked at together: bounds the memory, 33 MB at a window of 1,000.
_CHUNK = 4096


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
