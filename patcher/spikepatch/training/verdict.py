"""What became of each run, from its log alone; and of each model, over learning rates and seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spikepatch.spikes.conclusion import PASSED, CurveVerdict, conclude
from spikepatch.spikes.events import Event, Form, Origin
from spikepatch.spikes.hindsight import Curve, with_hindsight
from spikepatch.spikes.scores import scores
from spikepatch.spikes.twin import twin_of
from spikepatch.training.arms import Arm, RunSpikes, arms
from spikepatch.training.log import RunLog
from spikepatch.training.run_identity import Run, TrainedModel, identity

#: Applied steps whose mean is a level of the loss.
LEVEL = 50


@dataclass(frozen=True)
class RunResult(Run):
    """One run, judged.

    Attributes:
        steps, warmup_steps: as in the log's first record.
        done: steps in the log that no rewind took back.
        verdict, text: of ``spikes/conclusion.py``, by the loss, and as a line; what a rewind took back counts too.
        judged: the first and the last step that were judged.
        largest_excess: of the loss over its level, in nats.
        events: in the order of their onsets, with hindsight; those of the gradient norm decide nothing.
        scores: published ones, by name; None is "n/a".
        initial_loss: of the first step, before any update.
        final_loss: mean of the last 50 applied steps; None where none was applied.
        eval_loss, perplexity: the last ones on held-out data.
        tokens: trained on. seconds: of all steps, rewound ones too.
    """

    steps: int
    warmup_steps: int
    done: int
    verdict: CurveVerdict
    text: str
    judged: tuple[int, int] | None
    largest_excess: float | None
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
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ModelResult(TrainedModel):
    """One model over its runs.

    Attributes:
        stable_lr: the largest learning rate such that at it, and at all smaller ones that were run, the runs of all
            seeds are healthy or have blips only; None where there is none.
        sensitivity: to the learning rate, see ``sensitivity``; None for fewer than two rates.
    """

    runs: int
    stable_lr: float | None
    sensitivity: float | None


@dataclass(frozen=True)
class Verdict:
    """What came of a training.

    Attributes:
        runs: all of them, in order.
        models: what all runs of each say.
        arms: two models side by side, where there are two.
        exit_code: 0 if every patched model, or where none is patched every model, is healthy, or has blips only, at
            multiplier 1 for every seed; else 1. Other multipliers do not count.
    """

    runs: tuple[RunResult, ...]
    models: tuple[ModelResult, ...]
    arms: tuple[Arm, ...]
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, the content of ``verdict.json``."""
        return {
            "exit_code": self.exit_code,
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "models": [dataclasses.asdict(model) for model in self.models],
            "runs": [run.to_dict() for run in self.runs],
        }


def judge_run(log: RunLog) -> RunResult:
    """The result of a run, of one in progress too. Pure: the same log gives the same result."""
    run, steps = log.run, log.kept
    applied = [s.loss for s in steps if s.applied and s.loss is not None]
    eval_loss = log.evals[-1].loss if log.evals else None
    done = steps[-1].step if steps else 0
    rows = rows_of(log)
    found = with_hindsight(rows)
    batches = {s.step: s.batch for s in steps}
    found = tuple(dataclasses.replace(event, batch=batches.get(event.peak)) for event in found)
    events = tuple(sorted([*found, *_taken_back(log, found)], key=lambda event: event.onset))
    concluded = conclude(rows, events, after=run.warmup_steps)
    ended = f"; it stopped at step {log.stop.step} of {run.steps}: {log.stop.why}" if log.stop else ""
    return RunResult(
        **identity(run),
        steps=run.steps,
        warmup_steps=run.warmup_steps,
        done=done,
        verdict=concluded.verdict,
        text=concluded.text + ended,
        judged=concluded.judged,
        largest_excess=concluded.largest,
        events=events,
        scores=scores([s.loss for s in log.steps], [s.gradient_norm for s in log.steps]),
        initial_loss=steps[0].loss if steps else None,
        final_loss=statistics.fmean(applied[-LEVEL:]) if applied else None,
        eval_loss=eval_loss,
        perplexity=math.exp(eval_loss) if eval_loss is not None and eval_loss < 700 else None,
        tokens=steps[-1].tokens if steps else 0,
        seconds=math.fsum(s.seconds for s in log.steps),
    )


def compared(runs: Sequence[RunResult], curves: Sequence[Curve]) -> tuple[RunResult, ...]:
    """The runs with the origin of their events: runs of one learning rate and seed have seen the same batches, so an
    event that most of the others have at the same step is the data's (``spikes/twin.py``)."""
    found = []
    for i, run in enumerate(runs):
        others = [
            twin_of(curves[i], run.events, curves[j], other.name).origins
            for j, other in enumerate(runs)
            if j != i and (other.lr, other.seed) == (run.lr, run.seed) and run.events
        ]
        events = tuple(
            _with_origin(event, [own[event.onset] for own in others if event.onset in own]) for event in run.events
        )
        found.append(dataclasses.replace(run, events=events))
    return tuple(found)


def _with_origin(event: Event, told: Sequence[Origin]) -> Event:
    if event.kind != "loss" or not told:
        return event
    return dataclasses.replace(event, origin="data" if 2 * told.count("data") >= len(told) else "run")


def summarise(results: Iterable[RunResult]) -> Verdict:
    """Per model, in the order in which they first come; the exit code."""
    runs = tuple(results)
    by_name: dict[str, list[RunResult]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    models = tuple(
        ModelResult(
            **identity(own[0], TrainedModel),
            runs=len(own),
            stable_lr=_stable_lr(own),
            sensitivity=sensitivity(own),
        )
        for own in by_name.values()
    )
    judged_names = {m.name for m in models if m.patched} or set(by_name)
    at_one = [run for run in runs if run.name in judged_names and run.multiplier == 1]
    passed = {run.name for run in at_one} == judged_names != set() and all(r.verdict in PASSED for r in at_one)
    return Verdict(runs, models, _arms(runs, models), 0 if passed else 1)


def _arms(runs: Sequence[RunResult], models: Sequence[ModelResult]) -> tuple[Arm, ...]:
    """Per learning rate, each model over its seeds; the baseline is the first model without a patch, or the first."""
    if len(models) < 2:
        return ()
    baseline = next((model.name for model in models if not model.patched), models[0].name)
    found: dict[tuple[str, float], list[RunSpikes]] = {}
    for rate in sorted({run.lr for run in runs}):
        for model in models:
            own = [run for run in runs if (run.name, run.lr) == (model.name, rate) and run.verdict != "cannot tell"]
            if own:
                found[model.name, rate] = [_spikes(run) for run in own]
    return arms(found, baseline)


def _spikes(run: RunResult) -> RunSpikes:
    seen = [event for event in run.events if event.kind != "gradient_norm" and event.origin != "data"]
    broken = any(event.kind == "nonfinite" and event.back is None for event in seen)
    return RunSpikes(len(seen), math.inf if broken else run.largest_excess, run.verdict != "not back")


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
        broken = loss is None or any(e.kind == "nonfinite" and e.back is None for e in run.events)
        capped = run.initial_loss if broken or loss is None else min(loss, run.initial_loss)
        by_rate[run.lr] = (*by_rate.get(run.lr, ()), capped)
    return by_rate


def rows_of(log: RunLog) -> Curve:
    """The steps that no rewind took back. Where the loss scaler of fp16 was at work the norm says nothing."""
    norms = [
        None if "overflow" in s.flags else math.nan if s.gradient_norm is None else s.gradient_norm for s in log.kept
    ]
    return Curve([s.step for s in log.kept], [math.nan if s.loss is None else s.loss for s in log.kept], norms)


def _taken_back(log: RunLog, found: Sequence[Event]) -> Iterator[Event]:
    """Events that a rewind took back, as they then stood: over with the rewind."""
    here = {(event.kind, event.onset) for event in found}
    for event in log.events:
        rewind = next((r for r in log.rewinds if r.to < event.onset <= r.step), None)
        if rewind is not None and event.back is None and (event.kind, event.onset) not in here:
            form: Form = "non-finite" if event.kind == "nonfinite" else "spike"
            yield dataclasses.replace(event, back=rewind.step + 1, form=form)


def _stable_lr(runs: Sequence[RunResult]) -> float | None:
    stable = None
    for rate in sorted({run.lr for run in runs}):
        if not all(run.verdict in PASSED for run in runs if run.lr == rate):
            break
        stable = rate
    return stable
