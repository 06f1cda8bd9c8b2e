"""A training as a page: the verdict, curves of all models on each other, what happened inside them, how it was run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from spikepatch.report.document import Badge, Page, Section, Table
from spikepatch.spikes.conclusion import norm_line
from spikepatch.spikes.spike_page import TONES
from spikepatch.spikes.statistic import WARMUP
from spikepatch.training.arms import told
from spikepatch.training.curves import Pair, curves, heat_maps, pairs, rates, which
from spikepatch.training.outcome import Outcome, outcome
from spikepatch.training.tables import USUAL, arm_table, event_table, model_table, run_table, score_notes, score_table
from spikepatch.training.verdict import LEVEL, Verdict

_FOOTER = (
    f"Final loss: mean of the last {LEVEL} steps that were applied. Sensitivity to the learning rate: Wortsman et al.,"
    " arXiv 2309.14322. Curves are from log.jsonl of each run; of the steps that share a column of pixels, the lowest"
    " and the highest are drawn."
)


def page(folder: str | os.PathLike[str]) -> Page:
    """What a training's folder holds so far, of one that still runs too.

    Raises:
        BadSource: it is no such folder, or its files are not as they were written.
    """
    return page_of(outcome(folder))


def page_of(found: Outcome) -> Page:
    names, verdict = list(found.record["models"]), found.verdict
    compared = pairs(found.logs, verdict)
    runs = len(found.logs) + len(found.waiting)
    about = f"{_count(len(names), 'model')}, {_count(runs, 'run')}; {_data(found.record)}"
    arms = [arm_table(verdict)] if verdict.arms else []
    sections = [
        Section(
            "Runs",
            (*_state(found), *told(verdict.arms), *_norms(verdict), *score_notes(verdict)),
            (*arms, run_table(_worst_first(verdict), in_words=True), model_table(verdict), score_table(verdict)),
        )
    ]
    if compared:
        charts = [chart for pair in compared for chart in curves(pair, names, verdict)]
        sections.append(Section("Loss and gradient norm", charts=tuple(charts)))
    if (chart := rates(verdict)) is not None:
        sections.append(Section("Over the learning rate", charts=(chart,)))
    sections.append(Section("Events", tuple(_no_events(verdict)), _event_tables(found)))
    sections += _inside(compared)
    sections.append(_how(found))
    return Page(f"Training: {', '.join(names)}", about, tuple(_badges(names, verdict)), tuple(sections), _FOOTER)


def _worst_first(verdict: Verdict) -> Verdict:
    order = list(TONES)
    runs = sorted(verdict.runs, key=lambda run: (-order.index(run.verdict), -(run.largest_excess or 0.0)))
    return dataclasses.replace(verdict, runs=tuple(runs))


def _count(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"


def _data(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    return f"{settings['steps']:,} steps of {settings['batch_tokens']:,} tokens"


def _badges(names: list[str], verdict: Verdict) -> Iterator[Badge]:
    """The worst verdict of each model where its learning rate is not multiplied, which is what counts."""
    order = list(TONES)
    for name in names:
        verdicts = [run.verdict for run in verdict.runs if run.name == name and run.multiplier == 1]
        if verdicts:
            worst = max(verdicts, key=order.index)
            yield Badge(name, worst, TONES[worst])
        else:
            yield Badge(name, "no run at x 1 yet")


def _state(found: Outcome) -> Iterator[str]:
    """What is still to come, and what cannot be seen of a run."""
    if found.under_way or found.waiting:
        at = [f"{log.run.name} is at step {log.kept[-1].step if log.kept else 0}" for log in found.under_way]
        waiting = (
            [f"{_count(len(found.waiting), 'run')} not begun: {', '.join(found.waiting)}"] if found.waiting else []
        )
        yield "Not finished. " + "; ".join([*at, *waiting]) + "."
    yield from dict.fromkeys(f"{log.run.name}: {note}." for log in found.logs for note in log.run.notes)


def _norms(verdict: Verdict) -> Iterator[str]:
    """The gradient norm's line of each run that has events of it."""
    for run in verdict.runs:
        if (line := norm_line(run.events)) is not None:
            yield f"{run.name}, lr {run.lr:g}, seed {run.seed}: {line}."


def _no_events(verdict: Verdict) -> Iterator[str]:
    if not any(run.events for run in verdict.runs):
        yield f"None. A step is judged as soon as {WARMUP} steps before it are known."


def _event_tables(found: Outcome) -> tuple[Table, ...]:
    rewinds = [
        (
            log.run.name,
            f"{log.run.lr:g}",
            str(log.run.seed),
            str(r.step),
            str(r.to),
            f"{r.skipped[0]} to {r.skipped[1]}",
        )
        for log in found.logs
        for r in log.rewinds
    ]
    tables = []
    if any(run.events for run in found.verdict.runs):
        tables.append(event_table(found.verdict))
    if rewinds:
        headers = ("model", "lr", "seed", "at step", "back to step", "batches left out")
        tables.append(Table("Rewinds", headers, tuple(rewinds), USUAL))
    return tuple(tables)


def _inside(compared: list[Pair]) -> Iterator[Section]:
    """Heat maps: those of the first pair that counts are open, the others can be opened."""
    first = True
    for pair in sorted(compared, key=lambda pair: pair[0][1].multiplier != 1):
        if maps := tuple(heat_maps(pair)):
            yield Section(f"Inside the models, {which(pair)}", tuple(_places(pair)), heat_maps=maps, folded=not first)
            first = False


def _places(pair: Pair) -> Iterator[str]:
    for log, _ in pair:
        if points := log.run.points:
            yield f"{log.run.name}: the stream is measured at {len(points)} places, from {points[0]} to {points[-1]}."


def _how(found: Outcome) -> Section:
    record = found.record
    models = [
        (name, str(model["source"]), model["recipe"] or "-", f"{parameters:,}" if parameters else "-")
        for name, model in record["models"].items()
        for parameters in [next((log.run.parameters for log in found.logs if log.run.name == name), None)]
    ]
    settings = {**record["settings"], "ranks": record.get("ranks"), "sharded": record.get("sharded")}
    return Section(
        "How it was run",
        tables=(
            Table("Models", ("model", "source", "recipe", "parameters"), tuple(models)),
            _pairs_table("Settings", settings),
            _pairs_table("Data", record["data"]),
            _pairs_table("Versions", record["versions"]),
        ),
        code=tuple(record["commands"]),
    )


def _pairs_table(title: str, values: Mapping[str, Any]) -> Table:
    shown = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return Table(title, ("", ""), tuple(shown.items()))
