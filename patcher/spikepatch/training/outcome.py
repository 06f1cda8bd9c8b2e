"""What the folder of a training holds so far: from ``run.json`` and the logs alone, while it still runs too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.errors import BadSource
from spikepatch.source.local import local_path, read_file
from spikepatch.training.folder import RECORD
from spikepatch.training.log import RunLog, begun, read
from spikepatch.training.run_identity import all_runs
from spikepatch.training.verdict import Verdict, compared, judge_run, rows_of, summarise


@dataclass(frozen=True)
class Outcome:
    """``record``: run.json. ``logs``: of the runs that have begun, as ``verdict.runs``. ``waiting``: the other runs."""

    record: Mapping[str, Any]
    logs: tuple[RunLog, ...]
    verdict: Verdict
    waiting: tuple[str, ...]

    @property
    def local_sources(self) -> list[str]:
        """Folders that models were read from."""
        named = [str(model.get("source")) for model in self.record["models"].values()]
        return [name for name in named if local_path(name).is_dir()]

    @property
    def under_way(self) -> tuple[RunLog, ...]:
        """Runs that have begun and not ended."""
        return tuple(log for log in self.logs if not ended(log))


def ended(log: RunLog) -> bool:
    return log.stop is not None or bool(log.evals)


def outcome(folder: str | os.PathLike[str]) -> Outcome:
    """Read a folder that ``spikepatch train`` has made, or is making.

    Raises:
        BadSource: it is none, or its files are not as they were written.
    """
    folder = Path(folder)
    record = _record(folder)
    try:
        names = [run.folder for run in all_runs(record)]
        missing = [key for key in ("settings", "data", "versions", "commands") if key not in record]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_training(folder, f"{RECORD} does not tell which runs there are: {error}") from error
    if missing:
        raise _no_training(folder, f"{RECORD} has no {', '.join(missing)}")
    here = [name for name in names if begun(folder / name / "log.jsonl")]
    logs = tuple(read(folder / name / "log.jsonl") for name in here)
    results = compared([judge_run(log) for log in logs], [rows_of(log) for log in logs])
    return Outcome(record, logs, summarise(results), tuple(n for n in names if n not in here))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_file(folder / RECORD))
    except FileNotFoundError as error:
        raise _no_training(folder, f"it has no {RECORD}" if folder.is_dir() else "there is no such folder") from error
    except OSError as error:
        raise _no_training(folder, str(error.strerror)) from error
    except ValueError as error:
        raise _no_training(folder, f"{RECORD} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _no_training(folder, f"{RECORD} is not a JSON object")
    return record


def _no_training(folder: Path, why: str) -> BadSource:
    return BadSource(
        "this is not the folder of a training",
        where=str(folder),
        why=why,
        remedy="give what was --out of `spikepatch train`",
    )
