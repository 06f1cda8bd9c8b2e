"""How a training is going, on stderr: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from spikepatch.report.document import number
from spikepatch.training.log import Reporter
from spikepatch.training.tables import KINDS

#: Seconds between two lines where there is no terminal.
_EVERY = 30.0

#: Columns of a line for figures, at least: loss and gradient norm.
_LEAST = 32

#: Steps whose time speaks for the next ones.
_RECENT = 20


@contextlib.contextmanager
def reporting(
    runs: int,
    *,
    main: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Reporter]:
    """A function that takes every record of every run's log, as it is written; the first of a run may come twice.

    Args:
        runs: how many there will be.
        main: whether this process reports; the function does nothing elsewhere.
        console: where to, stderr by default. rich follows NO_COLOR.
    """
    if not main:
        yield lambda record: None
        return
    console = console or Console(stderr=True, highlight=False)
    if console.is_interactive:
        with _live(runs, console) as report:
            yield report
    else:
        yield _lines(runs, console, clock)


@dataclass
class _State:
    """What the records so far amount to."""

    runs: int
    begun: set[tuple[Any, ...]] = field(default_factory=set)
    name: str = ""
    steps: int = 0
    step: Mapping[str, Any] = field(default_factory=dict)
    spikes: set[tuple[Any, ...]] = field(default_factory=set)
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))  # tokens so far, seconds

    def take(self, record: Mapping[str, Any]) -> str | None:
        """Take a record in; what is to be said of it by itself, if anything."""
        match record["type"]:
            case "run" if (key := (record["name"], record["lr"], record["seed"])) not in self.begun:
                self.begun.add(key)
                self.name = f"{record['name']}, lr {record['lr']:g}, seed {record['seed']}"
                self.steps, self.step, self.spikes = record["steps"], {}, set()
                self.recent.clear()
                return self.run()
            case "step":
                self.step = record
                self.recent.append((record["tokens"], record["seconds"]))
            case "event" if (spike := (record["kind"], record["onset"])) not in self.spikes:
                self.spikes.add(spike)
                return _opened(record)
            case "event" if record["back"] is not None:
                rows = f"{record['duration']} step{'' if record['duration'] == 1 else 's'}"
                return f"step {record['step']}: the event of step {record['onset']} is over, back after {rows}"
            case "rewind":
                self.recent.clear()
                return f"step {record['step']}: back to the checkpoint of step {record['to']}"
            case "stop":
                return f"step {record['step']}: stopped, {record['why']}"
            case "evaluating" if record["done"] == 0:
                return f"step {record['step']}: evaluating on {record['total']:,} held-out tokens"
            case "eval" if record["loss"] is not None:
                return f"step {record['step']}: held-out loss {record['loss']:.4g}"
        return None

    def run(self) -> str:
        return f"run {len(self.begun)} of {self.runs}: {self.name}"

    def figures(self, room: int | None = None) -> str:
        """Loss, gradient norm, tokens per second, time left in this run, spikes so far; what has room of it."""
        loss, norm = number(self.step["loss"], 4), number(self.step["gradient_norm"])
        parts = [f"loss {loss}", f"gradient norm {norm}"]
        seconds = sum(spent for _, spent in self.recent)
        if len(self.recent) > 1:
            timed = seconds - self.recent[0][1]
            rate = (self.recent[-1][0] - self.recent[0][0]) / timed if timed > 0 else 0.0
            left = (self.steps - self.step["step"]) * seconds / len(self.recent)
            parts += [f"{rate:,.0f} tokens/s", f"{timedelta(seconds=round(left))} left"]
        count = sum(kind != "gradient_norm" for kind, _ in self.spikes)
        parts.append(f"{count} spike{'' if count == 1 else 's'}" if count else "no spikes")
        while room is not None and len(parts) > 1 and len(", ".join(parts)) > room:
            del parts[-2 if len(parts) > 2 else -1]
        return ", ".join(parts)


def _opened(record: Mapping[str, Any]) -> str:
    if record["kind"] == "nonfinite":
        return f"step {record['step']}: the loss or a gradient is not finite"
    seen = KINDS[record["kind"]]
    return (
        f"step {record['step']}: a spike of the {seen}, {number(record['value'], 4)} where"
        f" {number(record['baseline'], 4)} was expected"
    )


def _lines(runs: int, console: Console, clock: Callable[[], float]) -> Reporter:
    state, said = _State(runs), clock()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def report(record: Mapping[str, Any]) -> None:
        nonlocal said
        news = state.take(record)
        if news is not None:
            say(news if record["type"] == "run" else f"  {news}")
        elif record["type"] == "evaluating" and clock() - said >= _EVERY:
            said = clock()
            say(f"  {record['done']:,} of {record['total']:,} held-out tokens")
        elif record["type"] == "step":
            first, last = len(state.recent) == 1, record["step"] == state.steps
            if first or last or clock() - said >= _EVERY:
                said = clock()
                say(f"  step {record['step']} of {state.steps}: {state.figures()}")

    return report


@contextlib.contextmanager
def _live(runs: int, console: Console) -> Iterator[Reporter]:
    state = _State(runs)
    beside = min(20, max(4, console.width - 80))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=beside),
        TextColumn("{task.completed}/{task.total}", markup=False),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    task = bar.add_task("", total=None, figures="")

    def room(name: str) -> int:
        """Columns that are left for figures."""
        return console.width - len(name) - beside - 2 * len(str(state.steps)) - len("/") - 3

    def name() -> str:
        """Of the run; where its figures had no room beside it, its number alone."""
        whole = state.run()
        return whole if room(whole) >= _LEAST else whole.partition(":")[0]

    def report(record: Mapping[str, Any]) -> None:
        news = state.take(record)
        if record["type"] == "step":
            bar.update(task, completed=record["step"], figures=state.figures(room(name())))
        elif record["type"] == "run" and news is not None:
            if name() != news:
                console.print(news, markup=False, highlight=False)
            bar.reset(task, description=name(), total=record["steps"], figures="")
            bar.start()  # not before: what is prepared until then has a bar of its own
        elif record["type"] == "evaluating":
            figures = f"held out: {record['done']:,} of {record['total']:,}"
            bar.update(task, figures=figures)
        elif news is not None:
            console.print(f"{state.run()}: {news}", markup=False, highlight=False)

    try:
        yield report
    finally:
        bar.stop()
