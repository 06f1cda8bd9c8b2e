"""What lies under ``--out``: where a run has its folder, what was run, and that a resumed run is the same one."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spikepatch import __version__
from spikepatch.errors import BadTarget, Refused
from spikepatch.storage.write import sync

#: What is run. Written before the first step; its keys but ``versions`` and ``command`` stay as they are.
RECORD = "run.json"

_LIBRARIES = ("torch", "transformers", "accelerate", "numpy")


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse a folder that holds something, or with ``resume``, something that is no run."""
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        why, remedy = "it is a file", "give a folder"
    elif found and not resume:
        why, remedy = "runs of two commands would be taken for one", "--resume goes on with them; or give a new folder"
    elif found - {"data", ".lock"} and RECORD not in found:
        why, remedy = f"it has no {RECORD}: nothing in it is to be resumed", "give the folder of a run, or a new one"
    else:
        return
    raise BadTarget("the output folder is not empty", where=str(out), why=why, remedy=remedy)


def write_record(out: Path, wanted: Mapping[str, Any], command: str) -> None:
    """Write ``run.json``; where there is one, it must be of the same run.

    Raises:
        Refused: something else was run, or on other data; all that differs is named.
    """
    path = out / RECORD
    new = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    versions = {"spikepatch": __version__, "python": platform.python_version()} | {n: version(n) for n in _LIBRARIES}
    commands = [command]
    if path.exists():
        old = json.loads(path.read_text())
        changed = [*_changes({name: old.get(name) for name in new}, new)]
        if changed:
            raise Refused(
                what="this is not the run that is to be resumed",
                where=str(out),
                why="; ".join(changed),
                remedy="give the options and data that it began with, or a new folder",
            )
        commands = [*old["commands"], command]
    write_json(path, {**new, "versions": versions, "commands": commands})


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs, one sentence each, by the path of its keys."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def run_folder(name: str, lr: float, seed: int) -> str:
    """``NAME/lr5e-4-seed0``."""
    digits, exponent = f"{lr:e}".split("e")
    return f"{name}/lr{digits.rstrip('0').rstrip('.')}e{int(exponent)}-seed{seed}"


def write_json(path: Path, value: Any) -> None:
    """Write a file that is the old one or the new one, whenever the process is killed."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(new)
    os.replace(new, path)
    sync(path.parent)
