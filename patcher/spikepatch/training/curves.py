"""The logs of a training as curves and heat maps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence

from spikepatch.report.document import Chart, HeatMap, Line, Mark, Shape, number
from spikepatch.spikes.events import Event
from spikepatch.training.log import Layers, RunLog, Step
from spikepatch.training.tables import KINDS, numbered_events
from spikepatch.training.verdict import RunResult, Verdict, losses_by_rate

_SHAPES: dict[str, Shape] = {"loss": "triangle", "gradient_norm": "diamond", "nonfinite": "cross"}

#: The runs of one learning rate and seed, whose batches are the same.
Pair = tuple[tuple[RunLog, RunResult], ...]


def pairs(logs: Sequence[RunLog], verdict: Verdict) -> list[Pair]:
    """Runs that are compared with each other, in the order in which they were run."""
    found: dict[tuple[float, int], list[tuple[RunLog, RunResult]]] = {}
    for log, run in zip(logs, verdict.runs, strict=True):
        found.setdefault((run.multiplier, run.seed), []).append((log, run))
    return [tuple(pair) for pair in found.values()]


def which(pair: Pair) -> str:
    """What the runs of a pair have in common."""
    run = pair[0][1]
    times = "" if run.multiplier == 1 else f" (x {run.multiplier:g})"
    return f"lr {run.lr:g}{times}, seed {run.seed}"


def curves(pair: Pair, names: Sequence[str], verdict: Verdict) -> tuple[Chart, Chart]:
    """Loss and gradient norm of all models, each with the style of its place in ``names``, events marked."""
    numbers = {(run.name, run.lr, run.seed, event): i for i, run, event in numbered_events(verdict)}
    losses, norms = [], []
    for name in names:
        log, run = next(((log, run) for log, run in pair if run.name == name), (None, None))
        if log is None or run is None:
            losses.append(Line(name, ()))
            norms.append(Line(name, ()))
            continue
        marked = [(numbers[run.name, run.lr, run.seed, event], event) for event in run.events]
        losses.append(Line(name, tuple(_points(log.steps, "loss")), tuple(_marks(log, marked, "loss"))))
        norms.append(
            Line(name, tuple(_points(log.steps, "gradient_norm")), tuple(_marks(log, marked, "gradient_norm")))
        )
    about = which(pair)
    return (
        Chart(f"Loss, {about}", "step", "nats per token", tuple(losses), log=_wide(losses)),
        Chart(f"Gradient norm, {about}", "step", "before clipping", tuple(norms), log=True),
    )


def arm_panels(logs: Sequence[RunLog], verdict: Verdict) -> tuple[tuple[Chart, Chart], ...]:
    """Loss and gradient norm of each model at each learning rate: a row each, all seeds on each other, with events."""
    told = {(arm.model, arm.lr): f": {arm.with_events} of {arm.runs} runs have a loss event" for arm in verdict.arms}
    rows: dict[tuple[float, str], list[tuple[RunLog, RunResult]]] = {}
    for log, run in zip(logs, verdict.runs, strict=True):
        rows.setdefault((run.lr, run.name), []).append((log, run))
    rates = {lr for lr, _ in rows}
    found = []
    for (lr, name), runs in sorted(rows.items(), key=lambda row: row[0][0]):
        title = f"{name}{f', lr {lr:g}' if len(rates) > 1 else ''}{told.get((name, lr), '')}"
        losses, norms = (
            tuple(Line(f"seed {run.seed}", tuple(_points(log.steps, field)), _peaks(run, field)) for log, run in runs)
            for field in ("loss", "gradient_norm")
        )
        loss = Chart(title, "step", "loss, nats per token", losses)
        found.append((loss, Chart(title, "step", "gradient norm", norms, log=True)))
    wide = _wide([line for loss, _ in found for line in loss.series])
    return tuple((dataclasses.replace(loss, log=wide), norm) for loss, norm in found)


def _peaks(run: RunResult, field: str) -> tuple[Mark, ...]:
    events = (event for event in run.events if event.kind in (field, "nonfinite"))
    return tuple(Mark(event.peak, event.value, "ring", "event") for event in events)


def _points(steps: Iterable[Step], field: str) -> Iterator[tuple[float, float | None]]:
    """In the order of the log, with a gap where a run went back."""
    before = 0
    for step in steps:
        if step.step <= before:
            yield step.step, None
        yield step.step, getattr(step, field)
        before = step.step


def _marks(log: RunLog, events: Iterable[tuple[int, Event]], field: str) -> Iterator[Mark]:
    for i, event in events:
        if event.kind in (field, "nonfinite"):
            kind = "not finite" if event.kind == "nonfinite" else f"event of the {KINDS[event.kind]}"
            text = f"{i}: {log.run.name}, {KINDS[event.kind]}, {event.form} from step {event.onset}, {event.status}"
            if event.value is not None:
                text += f"; {number(event.value, 4)} at step {event.peak}, level {number(event.baseline, 4)}"
            label = f"{i} not back" if event.back is None and event.kind != "gradient_norm" else str(i)
            yield Mark(event.peak, event.value, _SHAPES[event.kind], kind, label, text)
    for rewind in log.rewinds:
        text = f"{log.run.name}: at step {rewind.step} back to step {rewind.to}"
        yield Mark(rewind.step, None, "square", "rewind", "", text)


def _wide(series: Iterable[Line]) -> bool:
    """Whether one linear axis cannot show both the calm and the spikes."""
    values = [y for s in series for _, y in s.points if y is not None]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def rates(verdict: Verdict) -> Chart | None:
    """Loss at the end against the learning rate; None where there is but one."""
    series = []
    for model in verdict.models:
        runs = [run for run in verdict.runs if run.name == model.name]
        losses = losses_by_rate(runs)
        means = tuple((lr, statistics.fmean(own)) for lr, own in sorted(losses.items()))
        seeds = [Mark(lr, x, "ring", "one seed") for lr, own in losses.items() if len(own) > 1 for x in own]
        gone = {run.lr: run for run in runs if run.verdict == "not back" and run.lr in losses}
        crosses = [
            Mark(lr, max(losses[lr]), "cross", "not back", text=f"{run.name}: {run.text}") for lr, run in gone.items()
        ]
        series.append(Line(model.name, means, (*seeds, *crosses)))
    if len({run.lr for run in verdict.runs}) < 2:
        return None
    return Chart(
        "Loss at the end against the learning rate", "learning rate", "nats per token", tuple(series), log_x=True
    )


def heat_maps(pair: Pair) -> Iterator[HeatMap]:
    """Stream and gradient, layer by layer, of each model; the models share their scales."""
    for field, title, y, value in (
        ("stream", "Stream", "sub-layer" if any(_is_per_sublayer(log) for log, _ in pair) else "layer", "std"),
        ("gradients", "Gradient", "layer", "norm"),
    ):
        measured = [(log, _measured(log.layers)) for log, _ in pair]
        maps = [(log, kept, _rows(kept, field)) for log, kept in measured if kept]
        values = [v for _, _, rows in maps for row in rows for v in row if v is not None and v > 0]
        scale = (min(values), max(values)) if values else None
        for log, kept, rows in maps:
            if rows:
                yield HeatMap(
                    f"{title}: {log.run.name}, {which(pair)}", "step", y, value,
                    tuple(str(i + 1) for i in range(len(rows))), tuple(kept), rows, scale,
                )  # fmt: skip


def _is_per_sublayer(log: RunLog) -> bool:
    return len(log.run.points) > len(log.run.layers)


def _measured(layers: Iterable[Layers]) -> dict[int, Layers]:
    """By step, without what a rewind took back."""
    kept: dict[int, Layers] = {}
    for record in layers:
        if kept and record.step <= max(kept):
            kept = {step: old for step, old in kept.items() if step < record.step}
        kept[record.step] = record
    return kept


def _rows(kept: dict[int, Layers], field: str) -> tuple[tuple[float | None, ...], ...]:
    """A row for each place, the first at the bottom."""
    columns = [getattr(record, field) for record in kept.values()]
    return tuple(zip(*columns, strict=True))
