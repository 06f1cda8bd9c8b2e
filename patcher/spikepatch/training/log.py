"""``log.jsonl`` of a run: one record a line, the source of truth of everything that is reported.

Strict JSON: a number that is not finite is written as null, and its step carries the flag "nonfinite". Each line is
handed to the operating system when it is written, so a killed run loses nothing but the line that it was at.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from spikepatch.errors import BadSource, first_line
from spikepatch.source.local import opened, read_file
from spikepatch.source.typed import finite, parsed
from spikepatch.spikes.events import Event
from spikepatch.training.run_identity import Run

#: Bytes of a log: of a million steps, a fifth of it.
_LARGEST = 2_000_000_000

#: Told every record of a run, as it is written to the log.
Reporter = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class RunHeader(Run):
    """The first record. ``Layers.stream`` is measured at the ``points``, ``Layers.gradients`` of the ``layers``."""

    steps: int
    warmup_steps: int
    parameters: int
    versions: Mapping[str, str]
    command: str
    points: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of the optimiser, from 1; ``loss`` in nats per token, ``gradient_norm`` before it is clipped.

    ``tokens``: trained on so far. ``seconds``: of this step. Not ``applied``: the weights are as they were before.
    """

    step: int
    batch: int
    loss: float | None
    gradient_norm: float | None
    lr: float
    tokens: int
    seconds: float
    applied: bool
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Layers:
    """Size of the residual stream at each sub-layer's input (``residual/points.py``); norm of each gradient."""

    step: int
    stream: tuple[float | None, ...]
    gradients: tuple[float | None, ...]


@dataclass(frozen=True)
class Rewind:
    """After ``step`` the run went back to the checkpoint of step ``to``.

    ``skipped``: the first and the last batch that are left out.
    """

    step: int
    to: int
    skipped: tuple[int, int]


@dataclass(frozen=True)
class Eval:
    """Mean loss on the held-out tokens, in nats per token."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class Lengthened:
    """After ``step`` the run has so many ``steps`` in all, more than its first record says."""

    step: int
    steps: int


@dataclass(frozen=True)
class Stop:
    """The run ended before its last step."""

    step: int
    why: str


@dataclass(frozen=True)
class Opened:
    """An event as it stood at ``step``."""

    step: int
    event: Event


LogRecord = RunHeader | Step | Layers | Rewind | Eval | Lengthened | Stop | Opened
_KINDS: dict[str, type[LogRecord]] = {
    "run": RunHeader, "step": Step, "layers": Layers, "rewind": Rewind, "eval": Eval, "stop": Stop,
    "steps": Lengthened,
}  # fmt: skip


@dataclass(frozen=True)
class RunLog:
    """A log as it was written; after a rewind, steps come again."""

    path: Path
    run: RunHeader
    steps: tuple[Step, ...]
    kept: tuple[Step, ...]  # those that no rewind took back: each number once
    layers: tuple[Layers, ...]
    events: tuple[Event, ...]  # each as it last stood; one that a rewind cut short is never back
    rewinds: tuple[Rewind, ...]
    evals: tuple[Eval, ...]
    stop: Stop | None


class Log:
    """The log of a run in progress; one process writes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record and flush it; returns it as it was written.

        Raises:
            TypeError: the record is none of the log's, or holds what JSON does not know.
        """
        written: dict[str, Any] = finite(record)
        if written.get("type") == "step" and None in (written["loss"], written["gradient_norm"]):
            written["flags"] = [*dict.fromkeys([*written["flags"], "nonfinite"])]
        _parse(written)
        self._file.write(json.dumps(written, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return written

    def position(self) -> int:
        """Number of bytes so far, all of them safely on disk: what ``open_log`` takes to go on from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_log(path: str | os.PathLike[str], *, resume_at: int | None) -> Log:
    """Open a log to write to.

    Args:
        resume_at: None starts a new log, in place of an old one; else a ``position()`` of this log, behind which all is
            cut away, in one step.

    Raises:
        BadSource: there is no log that has such a position.
    """
    path = Path(path)
    if resume_at is None:
        return Log(path.open("wb"))
    try:
        file = path.open("r+b")
    except FileNotFoundError as error:
        raise _no_such_log(path, "there is no such file") from error
    ends_a_line = resume_at == 0
    if resume_at > 0:
        file.seek(resume_at - 1)
        ends_a_line = file.read(1) == b"\n"
    if not ends_a_line:
        file.close()
        raise _no_such_log(path, f"no line of it ends at byte {resume_at}")
    file.truncate(resume_at)  # one call of the system: a file is of the old size or of the new one
    file.seek(resume_at)
    return Log(file)


def _no_such_log(path: Path, why: str) -> BadSource:
    return BadSource(
        "the log is not the one that the checkpoint goes with",
        where=str(path),
        why=why,
        remedy="put the log back, or train into a new folder",
    )


def begun(path: str | os.PathLike[str]) -> bool:
    """Whether there is a log with at least its first record.

    Raises:
        BadSource: what is there is no file, or cannot be read.
    """
    try:
        with opened(path) as file:
            return file.readline(_LARGEST).endswith(b"\n")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(Path(path), error) from error


def read(path: str | os.PathLike[str]) -> RunLog:
    """Read a log, of a run in progress too: a torn last line is left out.

    Raises:
        BadSource: there is none, or a line is not a record of one.
    """
    path = Path(path)
    try:
        lines = read_file(path, limit=_LARGEST).split(b"\n")[:-1]  # behind the last line's end: nothing, or a torn line
    except OSError as error:
        raise _unreadable(path, error) from error
    records = tuple(_records(path, lines))
    if not records or not isinstance(records[0], RunHeader):
        raise _broken(path, 1, "it is not the record of a run")
    for i, record in enumerate(records[1:], start=2):
        if isinstance(record, RunHeader):
            raise _broken(path, i, "a second run begins here")
        if isinstance(record, Layers) and not _fits(record, records[0]):
            raise _broken(path, i, "it has more or fewer places than the first line names")
    stops = [r for r in records if isinstance(r, Stop)]
    lengths = [r.steps for r in records if isinstance(r, Lengthened)]
    return RunLog(
        path=path,
        run=dataclasses.replace(records[0], steps=lengths[-1]) if lengths else records[0],
        steps=tuple(r for r in records if isinstance(r, Step)),
        kept=tuple(_kept(records)),
        layers=tuple(r for r in records if isinstance(r, Layers)),
        events=tuple(_events(records)),
        rewinds=tuple(r for r in records if isinstance(r, Rewind)),
        evals=tuple(r for r in records if isinstance(r, Eval)),
        stop=stops[-1] if stops else None,
    )


def _fits(record: Layers, run: RunHeader) -> bool:
    return (len(record.stream), len(record.gradients)) == (len(run.points), len(run.layers))


def _records(path: Path, lines: Iterable[bytes]) -> Iterator[LogRecord]:
    for i, line in enumerate(lines, start=1):
        try:
            yield _parse(json.loads(line, parse_constant=_no_constant))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _broken(path, i, first_line(error)) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unreadable(path: Path, error: OSError) -> BadSource:
    return BadSource(
        "the log cannot be read",
        where=str(path),
        why=error.strerror or str(error),
        remedy="give the folder of a run of `spikepatch train`",
    )


def _broken(path: Path, line: int, why: str) -> BadSource:
    return BadSource(
        "this line is not a record of a training log",
        where=f"{path}:{line}",
        why=why,
        remedy="it was changed, or another version of spikepatch wrote it: report with that version, or train again",
    )


def _parse(data: Any) -> LogRecord:
    """The record that a JSON object is; TypeError where it is none, a field is missing or unknown."""
    if not isinstance(data, Mapping):
        raise TypeError("not a JSON object")
    fields = dict(data)
    kind = fields.pop("type", None)
    if kind == "event":
        return parsed(Opened, {"step": fields.pop("step"), "event": fields})
    if kind not in _KINDS:
        raise TypeError(f"no such type of record: {kind!r}")
    return parsed(_KINDS[kind], fields)


def _kept(records: Iterable[LogRecord]) -> Iterable[Step]:
    """The steps that made the weights what they are."""
    kept: list[Step] = []
    for record in records:
        if isinstance(record, Rewind):
            kept = [step for step in kept if step.step <= record.to]
        elif isinstance(record, Step):
            kept.append(record)
    return kept


def _events(records: Iterable[LogRecord]) -> Iterable[Event]:
    """Every event as it last stood."""
    events: list[Event] = []
    places: dict[tuple[str, int], int] = {}  # of those that a later record may be about
    for record in records:
        if isinstance(record, Rewind):
            places = {key: place for key, place in places.items() if key[1] <= record.to}
        elif isinstance(record, Opened):
            key = (record.event.kind, record.event.onset)
            if key in places:
                events[places[key]] = record.event
            else:
                places[key] = len(events)
                events.append(record.event)
    return events
