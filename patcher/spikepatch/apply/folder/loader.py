"""A fresh process that loads folders: started early, since it imports what loading needs for seconds. Without torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("fresh_process.py")

#: Set to 0, it leaves the load test out; for what makes many conversions, such as tests.
_SWITCH = "SPIKEPATCH_LOAD_TEST"


class Loader:
    """A process that runs ``fresh_process.py``, with a module cache of its own under ``scratch``."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._errors = open(scratch / "errors", "w+b")  # noqa: SIM115  # closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **offline},
            text=True,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request, and wait for its answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return {"error": f"the process ended with {status}: {said[-1] if said else 'no reason given'}"}

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


_started: ContextVar[Loader | None] = ContextVar("started", default=None)


@contextlib.contextmanager
def loader(wanted: bool) -> Iterator[Loader | None]:
    """A fresh process for the duration; the one of a surrounding block, where there is one. None, if it is not wanted
    or the environment switches it off.
    """
    before = _started.get()
    if not wanted or os.environ.get(_SWITCH) == "0":
        yield None
    elif before is not None:
        yield before
    else:
        with tempfile.TemporaryDirectory(prefix="spikepatch-load-") as scratch:
            found = Loader(Path(scratch))
            token = _started.set(found)
            try:
                yield found
            finally:
                _started.reset(token)
                found.close()
