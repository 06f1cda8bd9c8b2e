"""The theory on real training curves, where they are: ``python -m tests.spikes.real_curves [FOLDER]``.

FOLDER has curves as CSV (step, loss, norm) and ``labels.json``: what an eye saw in them before any detector ran. They
belong to others and are not part of this project; without the folder this prints that it is absent, and ends well.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from spikepatch.spikes.events import Event
from spikepatch.spikes.read_log import TrainingLog, read_log
from spikepatch.spikes.spike_report import SpikeReport, judge
from tests import ROOT

FOLDER = ROOT.parent.parent / "shared/cases/logs"

Label = dict[str, Any]


def found(label: Label, events: list[Event], interval: int) -> bool:
    """Whether an event begins where the label does: within the rows of its rise and three more, or five."""
    near: int = max(5 * interval, label["peak"] - label["first"] + 3 * interval)
    return any(abs(e.onset - label["first"]) <= near for e in events if _overlap(label, e, interval))


def _overlap(label: Label, event: Event, interval: int) -> bool:
    back = event.back if event.back is not None else 10**12
    first, last = int(label["first"]), int(label["back"])
    return event.onset <= last + 2 * interval and back >= first - 2 * interval


def outside(report: SpikeReport, labels: list[Label]) -> list[Event]:
    """Events of the loss that no label is about."""
    interval = report.log.interval
    own = [e for e in report.events if e.kind != "gradient_norm"]
    return [e for e in own if not any(_overlap(label, e, interval) for label in labels)]


def read(path: Path) -> TrainingLog:
    return read_log(path)


def main(folder: Path) -> None:
    if not (folder / "labels.json").is_file():
        click.echo(f"skipped: no real curves at {folder}")
        return
    labels = json.loads((folder / "labels.json").read_text())
    kinds, seen, alarms, gone = Counter[str](), Counter[str](), Counter[str](), []
    click.echo(f"{'curve':30} {'rows':>6}  {'labels found':32} {'outside':>11}  verdict")
    for path in sorted(folder.glob("*.csv")):
        own: list[Label] = labels[path.stem]["loss"]
        report = judge(read(path))
        events = [e for e in report.events if e.kind != "gradient_norm"]
        hits = Counter(label["kind"] for label in own if found(label, events, report.log.interval))
        here = Counter(label["kind"] for label in own)
        kinds, seen = kinds + here, seen + hits
        extra = outside(report, own)
        several = sum(e.form != "blip" for e in extra)
        alarms += Counter({"one row": len(extra) - several, "several rows": several})
        if here["gone"]:
            gone.append(report.verdict)
        told = ", ".join(f"{hits[kind]}/{n} {kind}" for kind, n in here.items()) or "healthy"
        line = f"{path.stem:30} {len(report.log.steps):>6}  {told:32} {len(extra) - several:>7} / {several}"
        click.echo(f"{line}  {report.verdict}")
    for kind, count in kinds.items():
        click.echo(f"{kind}: {seen[kind]} of {count}")
    click.echo(f"verdicts of the {len(gone)} that are gone: {', '.join(gone)}")
    click.echo(f"alarms outside the labels: {alarms['one row']} of one row, {alarms['several rows']} of several")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
