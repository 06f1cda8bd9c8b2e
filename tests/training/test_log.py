"""The log: what was written is read, and nothing that a kill or a rewind leaves behind misleads."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikepatch.errors import BadSource
from spikepatch.training.log import begun, open_log, read

RUN: dict[str, Any] = {
    "type": "run", "name": "a", "source": "arch:x", "recipe": None, "patched": False, "lr": 1e-3, "multiplier": 1.0,
    "seed": 0, "steps": 10, "warmup_steps": 2, "parameters": 7, "versions": {"torch": "2"}, "command": "train",
}  # fmt: skip


def step(number: int, loss: float = 2.0, norm: float = 1.0) -> dict[str, Any]:
    return {
        "type": "step", "step": number, "batch": number - 1, "loss": loss, "gradient_norm": norm, "lr": 1e-3,
        "tokens": 8 * number, "seconds": 0.1, "applied": True, "flags": [],
    }  # fmt: skip


def event(number: int, onset: int, back: int | None = None, kind: str = "loss") -> dict[str, Any]:
    return {
        "type": "event", "step": number, "kind": kind, "onset": onset, "peak": onset, "value": 5.0, "baseline": 2.0,
        "score": 9.0, "duration": number - onset + 1, "back": back,
    }  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> Path:
    with open_log(path, resume_at=None) as log:
        for record in records:
            log.write(record)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl",
        RUN | {"points": ["h.0"], "layers": ["h.0", "h.1"], "notes": ["n"]},
        step(1),
        {"type": "layers", "step": 1, "stream": [0.5], "gradients": [0.25, math.nan]},
        step(2, loss=1.5),
        {"type": "eval", "step": 2, "loss": 1.25},
        {"type": "stop", "step": 2, "why": "enough"},
    )
    log = read(path)
    assert (log.run.name, log.run.versions, log.run.points) == ("a", {"torch": "2"}, ("h.0",))
    assert [(s.step, s.loss, s.tokens) for s in log.steps] == [(1, 2.0, 8), (2, 1.5, 16)]
    assert log.kept == log.steps
    assert log.layers[0].gradients == (0.25, None)
    assert log.evals[0].loss == 1.25
    assert log.stop is not None
    assert log.stop.why == "enough"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["loss", "gradient_norm"])
def test_what_is_not_finite_is_null_and_flagged(value: float, field: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with open_log(path, resume_at=None) as log:
        log.write(RUN)
        written = log.write(step(1) | {field: value, "flags": ("loss",)})
    assert written == json.loads(path.read_text().splitlines()[1])
    assert (written[field], written["flags"]) == (None, ["loss", "nonfinite"])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert read(path).steps[0].flags == ("loss", "nonfinite")


def test_resume_cuts_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with open_log(path, resume_at=None) as log:
        log.write(RUN)
        log.write(step(1))
        position = log.position()
        before = path.read_bytes()
        log.write(step(2, loss=100.0))
    assert position == len(before)
    path.write_bytes(path.read_bytes() + b'{"type": "st')
    with open_log(path, resume_at=position) as log:
        assert path.read_bytes() == before
        log.write(step(2, loss=1.0))
    assert [s.loss for s in read(path).steps] == [2.0, 1.0]


def test_a_new_run_replaces_the_old_log(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", RUN, step(1), step(2))
    write(path, RUN, step(1))
    assert len(read(path).steps) == 1


@pytest.mark.parametrize("shift", [-1, 1, 1000])
def test_a_position_that_is_none_is_refused(shift: int, tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", RUN, step(1))
    content = path.read_bytes()
    with pytest.raises(BadSource, match="no line of it ends at byte"):
        open_log(path, resume_at=len(content) + shift)
    assert path.read_bytes() == content
    with pytest.raises(BadSource, match="no such file"):
        open_log(tmp_path / "other.jsonl", resume_at=1)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", RUN, step(1), step(2))
    whole = path.read_bytes()
    begin = whole.rstrip(b"\n").rindex(b"\n") + 1
    for size in range(begin, len(whole)):
        path.write_bytes(whole[:size])
        assert [s.step for s in read(path).steps] == [1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "Expecting"),
        (b"\xff", "decode"),
        (b"[]", "not a JSON object"),
        (b"", "Expecting"),
        (b'{"type": "other"}', "no such type of record: 'other'"),
        (b'{"type": "eval", "step": 1}', "loss"),
        (b'{"type": "eval", "step": 1, "loss": 1, "x": 1}', "x"),
        (b'{"type": "eval", "step": 1, "loss": NaN}', "NaN is not JSON"),
        (b'{"type": "event", "step": 1}', "kind"),
        (json.dumps(RUN).encode(), "a second run"),
    ],
)
def test_a_broken_line_is_refused(line: bytes, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", RUN, step(1))
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(step(2)).encode() + b"\n")
    with pytest.raises(BadSource, match=why) as error:
        read(path)
    assert error.value.where == f"{path}:3"


def test_a_log_begins_with_its_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert not begun(path)
    with pytest.raises(BadSource, match="No such file"):
        read(path)
    for content in (b"", b'{"type": "run"'):
        path.write_bytes(content)
        assert not begun(path)
        with pytest.raises(BadSource, match="not the record of a run"):
            read(path)
    write(path, step(1))
    with pytest.raises(BadSource, match="not the record of a run"):
        read(path)
    write(path, RUN)
    assert begun(path)
    assert read(path).steps == ()


def test_a_record_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with open_log(path, resume_at=None) as log:
        for record in ({"type": "eval"}, {"type": "none"}, RUN | {"name": b"bytes"}, RUN | {"more": 1}):
            with pytest.raises(TypeError):
                log.write(record)
    assert path.read_bytes() == b""


def test_rewinds_take_steps_back(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl",
        RUN, *(step(n) for n in range(1, 5)), event(4, onset=4),
        {"type": "rewind", "step": 4, "to": 2, "skipped": [2, 3]},
        *(step(n, loss=1.0) for n in range(3, 5)), event(4, onset=4, kind="gradient_norm"), event(4, onset=4),
        event(5, onset=4, back=5),
    )  # fmt: skip
    log = read(path)
    assert [s.step for s in log.steps] == [1, 2, 3, 4, 3, 4]
    assert [(s.step, s.loss) for s in log.kept] == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]
    assert [(e.kind, e.back) for e in log.events] == [
        ("loss", None), ("gradient_norm", None), ("loss", 5),
    ]  # fmt: skip
    assert log.rewinds[0].skipped == (2, 3)


def test_a_rewind_without_further_steps(tmp_path: Path) -> None:
    rewind = {"type": "rewind", "step": 3, "to": 1, "skipped": [1, 2]}
    log = read(write(tmp_path / "log.jsonl", RUN, *(step(n) for n in range(1, 4)), rewind))
    assert [s.step for s in log.kept] == [1]


KILLED = """
import json, os, signal, sys
from spikepatch.training.log import open_log
log = open_log(sys.argv[1], resume_at=None)
for record in json.loads(sys.argv[2]):
    log.write(record)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_loses_no_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    records = json.dumps([RUN, step(1), step(2)])
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), records], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(read(path).steps) == 2
