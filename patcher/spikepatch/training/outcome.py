"""What the folder of a training holds so far: from ``run.json`` and the logs alone, while it still runs too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spikepatch.source.local import local_path
from spikepatch.training.folder import read_record
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
    folder = local_path(folder)
    record = read_record(folder)
    names = [run.folder for run in all_runs(record)]
    here = [name for name in names if begun(folder / name / "log.jsonl")]
    logs = tuple(read(folder / name / "log.jsonl") for name in here)
    results = compared([judge_run(log) for log in logs], [rows_of(log) for log in logs])
    return Outcome(record, logs, summarise(results), tuple(n for n in names if n not in here))
