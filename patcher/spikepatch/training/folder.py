"""What lies under ``--out``: where a run has its folder, what was run, and that a resumed run is the same one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spikepatch.apply.disk.atomic import locked, placing
from spikepatch.errors import BadSource, BadTarget, first_line, on_one_line
from spikepatch.source.local import local_path, read_file
from spikepatch.source.typed import parsed
from spikepatch.training.run_identity import all_runs

#: What is run. Written before the first step; ``versions`` are those of its beginning.
RECORD = "run.json"

#: The tokens are in files of this beginning, in this folder; ``data.prepare`` has a lock of the same name there.
DATA, TOKENS, LOCK = "data", "tokens-", ".lock"


def check_out(out: Path, *, resume: bool, sources: Iterable[str] = ()) -> None:
    """Refuse a folder that holds something, or with ``resume``, something that is no run; and one inside a source.

    What a command leaves that was killed before its first step is nothing: the lock, and tokens.
    """
    for source in map(local_path, sources):
        if source.is_dir() and Path(os.path.realpath(source)) in (real := Path(os.path.realpath(out)), *real.parents):
            raise BadTarget(
                "the output folder lies in a source",
                where=str(out),
                why=f"{source} is read, and stays as it is",
                remedy="give another folder with --out",
            )
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        why, remedy = "it is a file", "give a folder"
    elif found <= {LOCK, *([DATA] if _holds_tokens(out / DATA) else [])} or (resume and RECORD in found):
        return
    elif resume:
        why, remedy = f"it has no {RECORD}: nothing in it is to be resumed", "give the folder of a run, or a new one"
    elif RECORD in found:
        why, remedy = "runs of two commands would be taken for one", "--resume goes on with them; or give a new folder"
    else:
        why, remedy = "what is in it is not of a training", "give a new folder"
    raise BadTarget("the output folder is not empty", where=str(out), why=why, remedy=remedy)


def check_places(out: Path, runs: Iterable[str]) -> None:
    """Refuse a file that has the name of a folder of ours, and a folder that has the name of a file.

    Args:
        runs: their folders, under ``out``.
    """
    folders = [out / DATA, *(out / run / name for run in runs for name in ("", "checkpoints", "model"))]
    files = [out / "verdict.json", *(out / run / name for run in runs for name in ("log.jsonl", "result.json"))]
    for kind, paths in (("folder", [*folders, *(place.parent for place in folders)]), ("file", files)):
        for path in paths:
            if os.path.lexists(path) and not (path.is_dir() if kind == "folder" else path.is_file()):
                raise BadTarget(
                    "something else has the name of what the training writes",
                    where=str(path),
                    why=f"it is no {kind}",
                    remedy="move it away, and give the command again",
                )


def _holds_tokens(data: Path) -> bool:
    """And nothing else."""
    names = [path.name for path in data.iterdir()] if data.is_dir() else [""]
    return all(name == LOCK or name.lstrip(".").startswith(TOKENS) for name in names)


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the folder against other commands; it is made, and where no run has begun, it is gone again at the end.

    Raises:
        BadTarget: another command holds it, or it cannot be made.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    had_tokens = (out / DATA).exists()
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_unused, made)  # last: the lock lies inside
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / LOCK))
        except BlockingIOError as error:
            raise BadTarget(
                "another command is training into the output folder",
                where=str(out),
                why=f"it holds {LOCK}",
                remedy="wait until it has ended, or give every command a folder of its own",
            ) from error
        except OSError as error:
            raise BadTarget(
                "the output folder cannot be made",
                where=str(out),
                why=error.strerror or str(error),
                remedy="give another one with --out, or mend its parent's permissions",
            ) from error
        try:
            yield
        finally:
            if not (out / RECORD).exists() and not had_tokens:
                shutil.rmtree(out / DATA, ignore_errors=True)


def _remove_unused(made: Iterable[Path]) -> None:
    """Folders that were made and hold nothing."""
    with contextlib.suppress(OSError):
        for path in made:
            path.rmdir()


@dataclass(frozen=True)
class _Lengths:
    steps: int
    batch_tokens: int


@dataclass(frozen=True)
class _Record:
    """What ``run.json`` has to hold, so that it can be read; and may hold more."""

    settings: Mapping[str, Any]
    lr: float
    multipliers: tuple[float, ...]
    seeds: tuple[int, ...]
    models: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    commands: tuple[str, ...]


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json``, with the fields of ``_Record`` and a run for each model at each rate and seed.

    Raises:
        BadSource: there is none, or it is not as it was written.
    """

    def refused(why: str) -> BadSource:
        return BadSource(
            "this is not the folder of a training",
            where=str(folder),
            why=why,
            remedy="give what was --out of `spikepatch train`",
        )

    try:
        record = json.loads(read_file(folder / RECORD))
    except FileNotFoundError as error:
        raise refused(f"it has no {RECORD}" if folder.is_dir() else "there is no such folder") from error
    except OSError as error:
        raise refused(str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise refused(f"{RECORD} is not JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise refused(f"{RECORD} is not a JSON object")
    if missing := [field.name for field in dataclasses.fields(_Record) if field.name not in record]:
        raise refused(f"{RECORD} has no {', '.join(missing)}")
    try:
        whole = parsed(_Record, {field.name: record[field.name] for field in dataclasses.fields(_Record)})
        parsed(_Lengths, {name: whole.settings[name] for name in ("steps", "batch_tokens")})
        for run in all_runs(record):
            _check_name(run.folder)
    except (KeyError, TypeError, ValueError) as error:
        raise refused(f"{RECORD} does not tell which runs there are: {on_one_line(error)}") from error
    return record


def _check_name(folder: str) -> None:
    """Raises ValueError where it is no folder below another one."""
    parts = PurePosixPath(folder).parts
    if folder.startswith("/") or ".." in parts or "\0" in folder or any(len(os.fsencode(part)) > 255 for part in parts):
        raise ValueError(f"{folder[:60]!r} names no folder of a run")


def write_json(path: Path, value: Any) -> None:
    """Write a file that is the old one or the new one, whenever the process is killed."""
    with placing(path) as new:
        new.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
