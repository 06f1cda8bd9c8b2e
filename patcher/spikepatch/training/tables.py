"""The verdict as tables, the same for the terminal and for the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from spikepatch.report.document import Table, number
from spikepatch.report.terminal import print_table, say
from spikepatch.spikes.conclusion import norm_line
from spikepatch.spikes.events import Event
from spikepatch.spikes.scores import LEAST
from spikepatch.spikes.spike_page import ORIGINS
from spikepatch.training.arms import told
from spikepatch.training.verdict import RunResult, Verdict

#: What goes without saying of a run: no multiplier, the default seed.
USUAL = {"x": "1", "seed": "0"}

#: Events that are printed; the page has all.
_PRINTED = 20

#: What an event is seen in, as it is called everywhere.
KINDS = {"loss": "loss", "gradient_norm": "gradient norm", "nonfinite": "non-finite"}


def run_table(verdict: Verdict, *, in_words: bool = False) -> Table:
    """A row for each run; ``in_words``: the verdict as a sentence."""
    headers = (
        "model", "lr", "x", "seed", "verdict", "largest excess", "final loss", "held-out loss", "perplexity", "events",
        "steps",
    )  # fmt: skip
    rows = [
        (
            *_which(run),
            run.text if in_words else run.verdict,
            number(run.largest_excess),
            number(run.final_loss, 4),
            number(run.eval_loss, 4),
            number(run.perplexity, 4),
            str(len(run.events)),
            str(run.done) if run.done == run.steps else f"{run.done} of {run.steps}",
        )
        for run in verdict.runs
    ]
    return Table("", headers, tuple(rows), USUAL)


def score_table(verdict: Verdict) -> Table:
    """Published scores, a row for each run."""
    scores = tuple(dict.fromkeys(score for run in verdict.runs for score in run.scores))
    rows = [(*_which(run), *(_score(run.scores[score]) for score in scores)) for run in verdict.runs]
    return Table("Published scores, which decide nothing", ("model", "lr", "x", "seed", *scores), tuple(rows), USUAL)


def score_notes(verdict: Verdict) -> Iterator[str]:
    """Which scores say nothing of runs as short as these."""
    done = max((run.done for run in verdict.runs), default=0)
    silent = [f"{name} (from {least:,} steps on)" for name, least in LEAST.items() if done < least]
    if silent:
        yield f"Of runs of {done:,} steps these say nothing: {', '.join(silent)}."


def arm_table(verdict: Verdict) -> Table:
    """A row for each model at each learning rate, over its seeds; empty for one model."""
    rows = [
        (
            f"{arm.lr:g}",
            arm.model,
            f"{arm.with_events} of {arm.runs}",
            str(arm.events),
            f"{number(arm.excess[0])} / {number(arm.excess[1])}",
            str(arm.not_back),
            number(arm.fisher, 2) if arm.baseline else "baseline",
            number(arm.permutation, 2),
        )
        for arm in verdict.arms
    ]
    headers = (
        "lr", "model", "runs with a loss event", "events", "excess, median / largest", "not back", "Fisher's p",
        "p of the excess",
    )  # fmt: skip
    return Table("Arms, over seeds", headers, tuple(rows))


def model_table(verdict: Verdict) -> Table:
    """A row for each model, over its runs."""
    rows = [
        (
            m.name,
            m.source,
            m.recipe or ("in the folder" if m.patched else "-"),
            str(m.runs),
            number(m.stable_lr, 6),
            number(m.sensitivity),
        )
        for m in verdict.models
    ]
    headers = ("model", "source", "recipe", "runs", "largest stable lr", "sensitivity to lr")
    return Table("Over learning rates and seeds", headers, tuple(rows))


def numbered_events(verdict: Verdict) -> Iterator[tuple[int, RunResult, Event]]:
    """Every event with the number by which it is called, from 1."""
    found = ((run, event) for run in verdict.runs for event in run.events)
    yield from ((i, run, event) for i, (run, event) in enumerate(found, start=1))


def event_table(verdict: Verdict) -> Table:
    """A row for each event; where other runs have seen the same batches, with what they say of it."""
    twins = any(event.origin is not None for run in verdict.runs for event in run.events)
    rows = [
        (
            str(i),
            *_which(run),
            KINDS[event.kind],
            str(event.onset),
            str(event.peak),
            number(event.value, 4),
            number(event.baseline, 4),
            number(event.score),
            str(event.duration),
            event.form or "-",
            "-" if event.back is None else str(event.back),
            "-" if event.batch is None else str(event.batch),
            *([ORIGINS[event.origin]] if twins else []),
        )
        for i, run, event in numbered_events(verdict)
    ]
    kinds = ("seen in", "onset", "peak", "at the peak", "level", "score", "steps", "kind", "back at", "batch")
    headers = ("#", "model", "lr", "x", "seed", *kinds, *(["origin"] if twins else []))
    return Table("Events", headers, tuple(rows), USUAL)


def print_verdict(verdict: Verdict) -> None:
    """What is to be seen at the end of a training, on stdout."""
    print_table(run_table(verdict))
    if verdict.arms:
        print_table(arm_table(verdict))
        for line in told(verdict.arms):
            say(line)
    if verdict.models:
        print_table(model_table(verdict))
    if any(value is not None for run in verdict.runs for value in run.scores.values()):
        print_table(score_table(verdict))
        for line in score_notes(verdict):
            say(line)
    if any(run.events for run in verdict.runs):
        table = event_table(verdict)
        print_table(dataclasses.replace(table, rows=table.rows[:_PRINTED]))
        if more := len(table.rows[_PRINTED:]):
            say(f"and {more} more, on the page")
    for run in verdict.runs:
        say(f"{run.name}, lr {run.lr:g}, seed {run.seed}: {run.text}")
        if (norms := norm_line(run.events)) is not None:
            say(f"  {norms}")


def _which(run: RunResult) -> tuple[str, str, str, str]:
    return run.name, f"{run.lr:g}", f"{run.multiplier:g}", str(run.seed)


def _score(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
