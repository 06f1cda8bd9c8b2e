"""``run.json`` of a training that is gone on with: what was asked for, and that the same is asked again."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spikepatch._version import __version__
from spikepatch.errors import BadSource, Refused, on_one_line
from spikepatch.source.typed import parsed
from spikepatch.training.folder import RECORD, read_record, write_json
from spikepatch.training.settings import TrainingCommand

_LIBRARIES = ("torch", "transformers", "accelerate", "numpy")


def check_record(out: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with another run than ``out`` holds; where it holds none, there is nothing to compare.

    Raises:
        Refused: something else was run, or on other data; all that differs is named, by its option.
    """
    if not (out / RECORD).exists():
        return
    old, new = _typed(out), json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    changed = [*_changes(_with_warmup_steps({name: old.get(name) for name in new}), _with_warmup_steps(new))]
    if changed:
        raise Refused(
            what="this is not the run that is to be resumed",
            where=str(out),
            why="; ".join(changed),
            remedy=f"spikepatch train --resume {out} takes all that it began with; for another run give a new folder",
        )


@dataclass(frozen=True)
class _GoneOnWith:
    """What ``run.json`` has to hold beside, so that it can be gone on with."""

    settings: _Lasting
    versions_since: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class _Lasting:
    steps: int
    warmup: float = 0.0


def _typed(out: Path) -> dict[str, Any]:
    record = read_record(out)
    settings = {name: record["settings"][name] for name in ("steps", "warmup") if name in record["settings"]}
    try:
        parsed(_GoneOnWith, {"settings": settings, "versions_since": record.get("versions_since", [])})
    except TypeError as error:
        raise _cannot_be_gone_on_with(out, on_one_line(error)) from error
    return record


def _cannot_be_gone_on_with(out: Path, why: str) -> BadSource:
    return BadSource(
        "the record of the training is not as it was written",
        where=str(out / RECORD),
        why=why,
        remedy="put a copy of it back, or train into a new folder",
    )


def _with_warmup_steps(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without the number of steps, which may be raised (see ``harness.py``), and its share for the warm-up."""
    settings = dict(record["settings"])
    steps, warmup = settings.pop("steps"), settings.get("warmup", 0.0)
    return {**record, "settings": settings | {"warmup": round(warmup * steps if warmup < 1 else warmup)}}


def write_record(
    out: Path,
    wanted: Mapping[str, Any],
    asked: TrainingCommand,
    command: str,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write ``run.json``; where there is one, it must be of the same run.

    Args:
        say: told which libraries have other versions since; those that it began with stay recorded.

    Raises:
        Refused: see ``check_record``.
    """
    check_record(out, wanted)
    path = out / RECORD
    versions = {"spikepatch": __version__, "python": platform.python_version()} | {n: version(n) for n in _LIBRARIES}
    commands, since = [command], []
    if path.exists():
        old = _typed(out)
        before = (since := old.get("versions_since", []))[-1] if old.get("versions_since") else old["versions"]
        if changed := [f"{n} was {before.get(n)} and is {at}" for n, at in versions.items() if before.get(n) != at]:
            say(f"since this run was last gone on with, {', '.join(changed)}: results may differ in their last bits")
            since = [*since, versions]
        commands, versions = [*old["commands"], command], old["versions"]
    kept = {"asked": dataclasses.asdict(asked), "folder": os.getcwd()}
    later = {"versions_since": since} if since else {}
    write_json(path, {**wanted, **kept, "versions": versions, **later, "commands": commands})


def recorded(out: Path, *, otherwise: TrainingCommand | None = None) -> TrainingCommand:
    """What was asked for by the command that began the training in ``out``; or ``otherwise``, where an older version
    began it, which did not write that down.

    Raises:
        BadSource: ``out`` holds no training, or its record is not as it was written.
        Refused: it is to be gone on with in the folder where it began: its models or data are named from there.
    """
    record = _typed(out)
    if otherwise is not None and "asked" not in record:
        return otherwise
    if "asked" not in record:
        raise BadSource(
            "what was asked for is not written down",
            where=str(out / RECORD),
            why="an older version of spikepatch began the training",
            remedy="give the models and the options that it began with, beside --out and --resume",
        )
    try:
        asked = parsed(TrainingCommand, record["asked"])
    except TypeError as error:
        raise _cannot_be_gone_on_with(out, f"asked: {on_one_line(error)}") from error
    if dataclasses.asdict(asked.settings)["steps"] != record["settings"]["steps"]:
        raise _cannot_be_gone_on_with(out, "it has two numbers of steps")
    began = record.get("folder")
    if isinstance(began, str) and os.path.realpath(began) != os.getcwd():
        names = [*asked.data, *asked.eval_data, *(model.partition("=")[2] or model for model in asked.models)]
        here = [name for name in names if not os.path.isabs(name) and os.path.lexists(os.path.join(began, name))]
        if here:
            raise Refused(
                what="its models and data are named from another folder",
                where=str(out),
                why=f"{here[0]} is meant as seen from {began}",
                remedy=f"cd {shlex.quote(began)}, and give the command there",
            )
    return asked


def recorded_commits(out: Path) -> dict[str, str | None]:
    """Source -> the commit of the Hub that it stood for when the training began."""
    models = read_record(out)["models"] if (out / RECORD).exists() else {}
    return {model["source"]: model.get("commit") for model in models.values()}


#: What a key of the record is to the user; others are options of their own names.
_SAID = {
    "multipliers": "--lr-multipliers",
    "data.tokens": "the number of tokens of --data and --eval-data", "data.fingerprint": "the content of --data or"
    " --eval-data, as tokens", "ranks": "the number of processes", "sharded": "sharding (--use_fsdp)",
}  # fmt: skip


def _option(key: str) -> str:
    """``settings.grad_clip`` -> ``--grad-clip``; of a model, its name and what of it."""
    first, _, rest = key.partition(".")
    if first == "models":
        model, _, what = rest.partition(".")
        return f"{what} of the model {model}" if what else f"the model {model}"
    return _SAID.get(key) or "--" + (rest or first).replace("_", "-")


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs, one sentence each, by its option."""
    if name == "data.files" or name == "data.evaluation":
        return  # a file may have another name: what it holds counts
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{_option(name)} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
