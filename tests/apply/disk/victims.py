"""For a process of its own: forks runs, kills them, and looks at what each leaves.

Everything is imported once, here, so that a victim's life is its run alone. Prints one JSON object: the steps that a
run takes, and of each victim the kind of run, whether it was to replace a folder, where it was killed, how it ended,
what was at OUT then, and after the next run.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import spikepatch.apply.disk.atomic as atomic
import spikepatch.apply.disk.publish as publish
from spikepatch.apply.disk.write import Planned, write_checkpoint, write_text
from spikepatch.apply.folder.convert import convert
from spikepatch.cli import main as command
from tests.architectures import tiny_config
from tests.folders import hashes

LOG = logging.getLogger("spikepatch.apply.disk.publish")
#: A process that is killed is no power failure: in memory, where nothing waits for a disk, all else is the same.
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None

#: Of a page; longer than what a write takes at once.
NEW_PAGE = "new" * 100_000

OLD = {"config.json": "{}", "old": "old"}

Run = Callable[[Path], object]


def write_few(out: Path) -> None:
    """The whole protocol with two megabytes, in milliseconds."""
    values = {name: torch.arange(100_000.0) + i for i, name in enumerate("abcdef")}
    planned = [Planned(name, torch.float32, (100_000,)) for name in values]
    files = {"one.safetensors": ["a", "b", "c"], "two.safetensors": ["d", "e", "f"]}
    with publish.publishing(out, overwrite=True) as folder:
        written = write_checkpoint(folder, planned, files, values.__getitem__, lambda count: None)
        write_text(folder / "config.json", json.dumps(written.hashes))


class At(logging.Handler):
    """Sends this process a signal at a step of the protocol; without a step, notes the steps."""

    def __init__(self, step: str = "", number: int = 0) -> None:
        super().__init__()
        self.step, self.number, self.seen = step, number, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())
        if self.step == record.getMessage():
            os.kill(os.getpid(), self.number)


def forked(run: Run, out: Path, *, step: str = "", number: int = 0, after: float | None = None) -> int:
    """Run it in a fork; how it ended: an exit code, or minus the signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(2, 1)
            if step:
                LOG.addHandler(At(step, number))
            run(out)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(out: Path, complete: dict[str, str]) -> str:
    """What is at OUT; what is neither absent, old nor complete is named file by file."""
    if not out.exists():
        return "absent"
    if {path.name: path.read_text() for path in out.iterdir() if path.name in OLD} == OLD and len(hashes(out)) == 2:
        return "old"
    return "new" if hashes(out) == complete else f"broken: {sorted(hashes(out))}"


def victim(kind: str, run: Run, complete: dict[str, str], old: bool, **how: object) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        out = Path(scratch, "out")
        if old:
            out.mkdir()
            for name, text in OLD.items():
                (out / name).write_text(text)
        ended = forked(run, out, **how)  # type: ignore[arg-type]
        found, beside = state(out, complete), sorted(os.listdir(scratch))
        again = forked(run, out)
        after, left = state(out, complete), sorted(os.listdir(scratch))
    return {
        "kind": kind,
        "old": old,
        **how,
        "ended": ended,
        "found": found,
        "beside": beside,
        "again": again,
        "after": after,
        "left": left,
    }


def reference(run: Run) -> tuple[dict[str, str], list[str], float]:
    """What a run that is left alone writes, the steps that it takes, and the seconds."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        note = At()
        LOG.addHandler(note)
        start = time.perf_counter()
        run(Path(scratch, "out"))
        seconds = time.perf_counter() - start
        LOG.removeHandler(note)
        return hashes(Path(scratch, "out")), note.seen, seconds


def place_page(out: Path) -> None:
    """As pages, edited source files and what ``train`` records are put in place."""
    with atomic.placing(out) as new:
        new.write_text(NEW_PAGE)


def file_victim(line: int) -> dict[str, object] | None:
    """A page is put in the place of an old one, and the process killed at the ``line``-th line of that; None behind the
    last one.
    """
    count = 0

    def at_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != atomic.__file__:
            return None
        count += event == "line"
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return at_line

    def killed(out: Path) -> None:
        sys.settrace(at_line)
        place_page(out)

    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        out = Path(scratch, "page.html")
        out.write_text("old")
        ended = forked(killed, out)
        found = out.read_text()
        again = forked(place_page, out)
        after, left = out.read_text(), sorted(os.listdir(scratch))
    if ended != -signal.SIGKILL:
        return None
    return {"found": found, "again": again, "after": after, "left": left}


def main(moments: int, conversions: int) -> None:
    """``moments`` random ones for the small run, ``conversions`` for a whole conversion."""
    LOG.setLevel(logging.DEBUG)
    chance = random.Random(0)
    results = []
    complete, steps, seconds = reference(write_few)
    exchange = publish._exchange
    for kind, extra in (("exchange", []), ("two renames", ["swap, second half"])):
        if extra:
            publish._exchange = lambda a, b: False
        for old, number in itertools.product((True, False), (signal.SIGKILL, signal.SIGINT)):
            at = [*steps, *(extra if old else [])]
            results += [victim(kind, write_few, complete, old, step=step, number=number) for step in at]
    publish._exchange = exchange
    for i in range(moments):
        after = chance.uniform(0, 1.5 * seconds)
        results += [victim("moment", write_few, complete, i % 2 == 0, after=after, number=signal.SIGKILL)]

    source = Path(tempfile.mkdtemp())
    try:
        tiny_config("gpt2", n_layer=1).save_pretrained(source)

        def whole(out: Path) -> None:
            convert(str(source), out, overwrite=True)

        def by_command(out: Path) -> None:
            command(["convert", str(source), str(out), "--overwrite"])

        complete, _, seconds = reference(whole)
        for number in (signal.SIGTERM, signal.SIGINT):
            results += [victim("command", by_command, complete, True, step="sync", number=number)]
        for i in range(conversions):
            after = chance.uniform(0, 1.2 * seconds)
            results += [victim("conversion", whole, complete, i % 2 == 0, after=after, number=signal.SIGKILL)]
    finally:
        shutil.rmtree(source)
    files = list(itertools.takewhile(bool, map(file_victim, itertools.count(1))))
    sys.stdout.write(json.dumps({"steps": steps, "victims": results, "files": files}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
