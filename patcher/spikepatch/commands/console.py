"""What a command says beside its result, on stderr: how long steps go on, and with -v how long they took."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from spikepatch.errors import visible
from spikepatch.progress import Progress, silent
from spikepatch.report.terminal import columns_of, wrapped

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn

Level = Literal["verbose", "quiet"]
_LEVEL = "spikepatch.level"
#: What rich colours its tables with.
_COLOUR = re.compile(r"(\x1b\[[\d;]*m)")
#: Seconds between two lines that say how far a step is.
_EVERY = 30.0


def _set_level(context: click.Context, option: click.Parameter, given: bool) -> None:
    if not given:
        return
    if context.meta.setdefault(_LEVEL, option.name) != option.name:
        raise click.UsageError("-v and -q cannot be given together.", context)


def level_options() -> list[click.Parameter]:
    """``-v`` and ``-q``, for any command; what they say is read by ``is_quiet`` and ``is_verbose``."""
    texts = {
        "-v/--verbose": "Say more: what is left alone and why, and how long each step took.",
        "-q/--quiet": "Print the result and errors, and nothing else.",
    }
    return [
        click.Option(names.split("/"), is_flag=True, expose_value=False, callback=_set_level, help=text)
        for names, text in texts.items()
    ]


def is_quiet() -> bool:
    """-q was given: results and errors only."""
    return click.get_current_context().meta.get(_LEVEL) == "quiet"


def is_verbose() -> bool:
    """-v was given: details too."""
    return click.get_current_context().meta.get(_LEVEL) == "verbose"


class VisibleStream:
    """A text stream to which names of a source may be written, whatever is in them; colours go through."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        parts = _COLOUR.split(text)  # text, colour, text, ...
        self._stream.write("".join(part if i % 2 else visible(part) for i, part in enumerate(parts)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(wrapped(visible(super().format(record)), columns_of(sys.stderr)))


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Told of long steps: a bar on a terminal; elsewhere a line for each step, and how far it is if it takes long;
    nothing with -q.
    """
    if is_quiet():
        with _warnings(logging.ERROR):
            yield silent
        return
    started: list[tuple[str, float]] = []
    with _bar() if sys.stderr.isatty() else contextlib.nullcontext(_lines()) as show, _warnings(logging.WARNING):

        def update(step: str, done: int = 0, total: int = 0) -> None:
            if not started or started[-1][0] != step:
                started.append((step, time.perf_counter()))
            show(step, done, total)

        yield update
    if is_verbose():
        ends = [start for _, start in started[1:]] + [time.perf_counter()]
        spent: dict[str, float] = {}
        for (step, start), end in zip(started, ends, strict=True):
            spent[step] = spent.get(step, 0.0) + end - start
        for step, seconds in spent.items():
            click.echo(f"{step}: {seconds:.2f} s", err=True)


@contextlib.contextmanager
def _warnings(level: int) -> Iterator[None]:
    """Our own warnings on stderr, from ``level`` on; above the bar, where there is one."""
    log, shown = logging.getLogger("spikepatch"), logging.StreamHandler()
    shown.setFormatter(_Formatter())
    shown.setLevel(level)
    log.addHandler(shown)
    try:
        yield
    finally:
        log.removeHandler(shown)


def _lines() -> Progress:
    seen: set[str] = set()
    last = time.monotonic()

    def show(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        if step not in seen:
            seen.add(step)
            click.echo(f"{step} ...", err=True)
        elif total and time.monotonic() - last > _EVERY:
            click.echo(f"{step}: {100 * done // total} % ...", err=True)
        else:
            return
        last = time.monotonic()

    return show


def bar_on_stderr(*more: ProgressColumn) -> RichProgress:
    """What is done, a bar, how much of it; where it is narrow the words are folded, and no number."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    console = Console(stderr=True)
    bar = BarColumn(bar_width=min(40, max(8, console.width - 60)))
    words = TextColumn("{task.description}", table_column=Column())
    return RichProgress(words, bar, TaskProgressColumn(), *more, console=console, transient=True)


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import TimeElapsedColumn

    with bar_on_stderr(TimeElapsedColumn()) as bar:
        task = bar.add_task("starting", total=None)

        def show(step: str, done: int = 0, total: int = 0) -> None:
            new = bar.tasks[0].description != step  # every step is seen, however short it is
            bar.update(task, description=step, completed=done, total=total or None, refresh=new)

        yield show
