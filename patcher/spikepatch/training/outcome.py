"""What the folders of a training hold so far: from ``run.json`` and the logs alone, while it still runs too."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.errors import Refused
from spikepatch.source.local import local_path
from spikepatch.training.folder import read_record
from spikepatch.training.log import RunLog, begun, read
from spikepatch.training.run_identity import all_runs
from spikepatch.training.verdict import Verdict, compared, judge_run, rows_of, summarise

#: What the records of one training have together, beside the models.
_TOGETHER = ("multipliers", "seeds", "commands")


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


def outcome(*folders: str | os.PathLike[str]) -> Outcome:
    """Read what ``spikepatch train`` has made, or is making: several folders, such as one for each seed, as one.

    Raises:
        BadSource: one is no such folder, or its files are not as they were written.
        Refused: their runs are not of one training: other settings, data or versions, or a run that is in two.
    """
    paths = [local_path(folder) for folder in folders]
    records = [read_record(path) for path in paths]
    names = [(path, run.folder) for path, record in zip(paths, records, strict=True) for run in all_runs(record)]
    record = _one(paths, records, [name for _, name in names])
    here = [(path, name) for path, name in names if begun(path / name / "log.jsonl")]
    logs = tuple(read(path / name / "log.jsonl") for path, name in here)
    results = compared([judge_run(log) for log in logs], [rows_of(log) for log in logs])
    return Outcome(record, logs, summarise(results), tuple(name for path, name in names if (path, name) not in here))


def _one(paths: Sequence[Path], records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Mapping[str, Any]:
    """The record of all of them."""
    first = records[0]
    whole = {**first, **{key: [*first[key]] for key in _TOGETHER}, "models": {}}
    for path, record in zip(paths, records, strict=True):
        mine, theirs = _shared(first), _shared(record)
        mine |= {f"model {name}": whole["models"][name] for name in record["models"] if name in whole["models"]}
        theirs |= {f"model {name}": model for name, model in record["models"].items() if name in whole["models"]}
        if differing := [key for key in dict.fromkeys((*mine, *theirs)) if mine.get(key) != theirs.get(key)]:
            raise Refused(
                what="these are not the runs of one training",
                where=f"{paths[0]} and {path}",
                why="; ".join(f"{key} is {mine.get(key)} and {theirs.get(key)}" for key in differing),
                remedy=f"spikepatch report {shlex.quote(str(path))}, and the others by themselves",
            )
        whole["models"] |= record["models"]
        for key in _TOGETHER:
            whole[key] += [value for value in record[key] if value not in whole[key]]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise Refused(
            what="a run is in two of the folders",
            where=", ".join(map(str, paths)),
            why=f"{twice[0]} would count twice",
            remedy="give each run once",
        )
    return whole


def _shared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same; the same data may lie elsewhere, under other names."""
    parts = {"settings": record["settings"], "versions": record["versions"]}
    found = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    data = {f"data.{key}": record["data"].get(key) for key in ("tokens", "fingerprint")}
    return found | data | {key: record.get(key) for key in ("lr", "ranks", "sharded")}
