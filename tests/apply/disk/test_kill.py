"""Whenever a run is killed, OUT is absent, the old folder or the complete new one; and the next run cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests import ROOT
from tests.apply.disk.victims import NEW_PAGE

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size


def victims(*arguments: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.apply.disk.victims", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_killed_anywhere() -> None:
    moments, conversions = 60, 30
    report = victims(moments, conversions)
    every = report["victims"]

    for victim in every:
        between = victim.get("step") == "swap, second half"  # where the system cannot exchange: the next run restores
        possible = {"old" if victim["old"] and not between else "absent", "new"}
        assert victim["found"] in possible | ({"old"} if between else set()), victim
        assert (victim["again"], victim["after"], victim["left"]) == (0, "new", ["out"]), victim
    files = report["files"]
    assert len(files) > 20  # lines at which a file's way into place was cut off
    assert {victim["found"] for victim in files} == {"old", NEW_PAGE}
    assert all((victim["again"], victim["after"], victim["left"]) == (0, NEW_PAGE, ["page.html"]) for victim in files)
    kinds = Counter(victim["kind"] for victim in every)
    assert (kinds["moment"], kinds["conversion"], kinds["command"]) == (moments, conversions, 2)
    at_steps = [victim for victim in every if victim["kind"] in ("exchange", "two renames")]
    assert report["steps"] == ["lock", "create", "write", "sync", "swap", "sync the parent", "sweep", "unlock"]
    assert {victim["step"] for victim in at_steps} == {*report["steps"], "swap, second half"}
    ends = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
    assert all(victim["ended"] == ends[victim["number"]] for victim in at_steps)
    for kind in ("exchange", "two renames"):
        assert {victim["found"] for victim in at_steps if victim["kind"] == kind} >= {"old", "absent", "new"}
    moments_found = {victim["found"] for victim in every if victim["kind"] == "moment"}
    assert moments_found & {"old", "absent"}, "each of them came too late"
    for victim in every:
        if victim["kind"] == "command":  # it cleans up itself, with the exit code that the signal has
            assert victim["beside"] == ["out"]
            assert victim["ended"] == (143 if victim["number"] == signal.SIGTERM else 130)
