"""What was given in place of what a command takes, and the command that takes it. Nothing heavy is imported for it."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from spikepatch.errors import BadSource
from spikepatch.source.hub import may_be_id, no_folder
from spikepatch.source.local import local_path
from spikepatch.spikes.trainer_output import trainer_state

Kind = Literal[
    "model",
    "part of a model",
    "patched model",
    "named model",
    "source code",
    "log",
    "text",
    "training",
    "run",
    "recipe",
]

#: Commands that read a model.
_OF_MODELS = ("audit", "check", "convert", "inspect")

#: What each command takes as it is.
_TAKEN: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(_OF_MODELS, ("model",)),
    "train": ("model", "patched model", "named model"),
    "fold": ("model",),
    "verify": ("model",),
    "report": ("training",),
    "spikes": ("log", "text", "run"),
    "codemod": ("source code",),
    "recipes": ("recipe",),
}

#: What it is, and why it is not taken.
_WORDS: dict[Kind, tuple[str, str]] = {
    "model": ("is a model", "this command reads none"),
    "part of a model": ("is a file, not a folder", "it is part of a model, which is the folder that it lies in"),
    "patched model": ("is neither a folder nor a model id", "only `train` takes a model and a recipe as MODEL@RECIPE"),
    "named model": ("is neither a folder nor a model id", "only `train` takes a model with a name, as NAME=MODEL"),
    "source code": ("is Python source, not a model", "a recipe is put into source code as a change to it"),
    "log": ("is a log, or data", "`spikes` reads logs, and `train` takes data by --data"),
    "text": (
        "is a file of text",
        "`train` takes it as data; as a log, `spikes` has to be told what its loss is",
    ),
    "training": ("is the folder of a training", "it holds run.json, which `spikepatch train` writes"),
    "run": ("is the folder of one run", "it holds log.jsonl, which `spikepatch train` writes"),
    "recipe": ("is a recipe, not a model", "a recipe goes with a model"),
}

#: Files that may be logs, or data.
_LOGS = (".jsonl", ".csv", ".tsv", ".log", ".txt")


@dataclass(frozen=True)
class Noun:
    """``place``: the path or id that the right command takes; ``recipe``: of MODEL@RECIPE, or a recipe itself."""

    kind: Kind
    place: str
    recipe: str = ""


def check_noun(command: str, given: str) -> None:
    """Refuse what is known to be something else, by the command for it; whatever is not known passes.

    Raises:
        BadSource: with a command that takes it.
    """
    noun = recognised(given)
    if noun is None and command in (*_OF_MODELS, "train", "fold") and given and not may_be_id(given):
        if not os.path.isdir(local_path(given)):
            raise no_folder(given, learned=command == "fold")  # before anything is imported that takes seconds
        return
    if noun is None or _takes(command, noun, given):
        return
    what, why = _WORDS[noun.kind]
    raise BadSource(what, where=given, why=why, remedy=" or ".join(_remedies(command, noun)))


def _takes(command: str, noun: Noun, given: str) -> bool:
    if noun.kind not in _TAKEN[command]:
        return command == "spikes" and _has_log(given)
    if given.startswith("arch:"):
        return command != "verify"
    return noun.kind not in ("training", "log") or noun.place == given


def checked(command: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback for an argument, of one value or several."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                check_noun(command, os.fspath(each))
        return value

    return callback


def meant_by(command: str, complaint: str) -> str | None:
    """What the option parser's ``complaint`` over a word comes from: a noun in a command's place, or one too many."""
    words = re.findall(r"^No such command '(.+)'|^Got unexpected extra arguments? \((.+)\)", complaint)
    if not words:
        return None
    alone, extra = words[0]
    if alone:
        noun = recognised(alone)
        return None if noun is None else next(iter(_remedies("", noun)))
    if command == "architectures":
        return f"spikepatch architectures --filter {shlex.quote(extra.split()[0])}"
    recipe = next((word for word in extra.split() if word in _names()), None)
    return (
        f"spikepatch {command} ... --recipe {recipe}" if recipe and command in ("check", "convert", "codemod") else None
    )


def recognised(given: str) -> Noun | None:
    """What ``given`` is by its name and place; of a file nothing but its first bytes is read."""
    try:
        return _recognised(given)
    except OSError:  # what may not be read is said by who reads it
        return None


def _recognised(given: str) -> Noun | None:
    if given.startswith("arch:") and "@" not in given:
        return Noun("model", given)
    path = local_path(given)
    if path.is_dir():
        return _folder(given, path)
    if given.endswith(".py"):
        return Noun("source code", given)
    if path.is_file():
        return _file(given, path)
    source, at, recipe = given.rpartition("@")
    if at and source and "/" not in recipe.removesuffix(".toml"):
        return Noun("patched model", source.partition("=")[2] or source, _nearest(recipe))
    name, equals, source = given.partition("=")
    if equals and source and "/" not in name:
        return Noun("named model", source)
    return Noun("recipe", given, given) if given in _names() else None


def _folder(given: str, path: Path) -> Noun | None:
    if (path / "run.json").is_file():
        return Noun("training", given)
    if (path / "config.json").is_file():
        return Noun("model", given)
    if (path / "log.jsonl").is_file():
        return Noun("run", given)
    return Noun("log", given) if any(path.glob("events.out.tfevents.*")) or trainer_state(path) else None


def _file(given: str, path: Path) -> Noun | None:
    parent = os.path.dirname(given) or "."
    if path.name in ("run.json", "verdict.json", "report.html") and (path.parent / "run.json").is_file():
        return Noun("training", parent)
    if path.name == "trainer_state.json" or "tfevents" in path.name:
        return Noun("log", given)
    if path.suffix == ".toml":
        return Noun("recipe", given, given)
    if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt") and (path.parent / "config.json").is_file():
        return Noun("part of a model", parent)
    if path.suffix not in _LOGS:
        return None
    from spikepatch.spikes.log_files import is_log

    return Noun("log" if is_log(path) else "text", given)


def _remedies(command: str, noun: Noun) -> Iterable[str]:
    """Commands that take it, the nearest to what was meant first."""
    place, recipe = shlex.quote(noun.place), shlex.quote(noun.recipe)
    match noun.kind:
        case "model" if command in ("report", "spikes") and _has_log(noun.place):
            yield f"spikepatch spikes {place}"
        case "model" if command in ("codemod", "verify"):
            yield f"spikepatch convert {place} OUT"
        case "model":
            yield f"spikepatch check {place}"
        case "part of a model" if command in (*_OF_MODELS, "fold", "verify"):
            yield again(command, place)
        case "part of a model":
            yield again("convert" if command == "codemod" else "check", place)
        case "patched model":
            if command in ("check", "recipes"):
                yield f"spikepatch check {place} --recipe {recipe}"
            yield f"spikepatch convert {place} OUT --recipe {recipe}"
        case "named model":
            yield again(command if command in (*_OF_MODELS, "fold") else "check", place)
        case "source code":
            yield f"spikepatch codemod {place} --factory MODULE:FUNCTION"
        case "log":
            if command == "train":
                yield f"spikepatch train MODEL --data {place}"
            yield f"spikepatch spikes {place}"
        case "text":
            if command in (*_OF_MODELS, "train", "fold"):
                yield f"spikepatch train MODEL --data {place}"
            yield f"spikepatch spikes {place} --loss KEY"
        case "training":
            yield f"spikepatch report {place}"
            yield from _trained(command, noun.place)
        case "run":
            whole = next((str(p) for p in local_path(noun.place).parents if (p / "run.json").is_file()), None)
            if command == "report" and whole is not None:
                yield f"spikepatch report {shlex.quote(whole)}"
            yield from _trained(command, noun.place)
            yield f"spikepatch spikes {place}"
        case "recipe":
            yield f"{again('check' if command == 'check' else 'convert', 'SOURCE')} --recipe {recipe}"


def _trained(command: str, place: str) -> Iterable[str]:
    """The command for a model that a training has left."""
    models = sorted(p.parent for p in local_path(place).glob("**/model/config.json")) if command in _TAKEN else []
    if models and command in (*_OF_MODELS, "fold", "verify"):
        yield again(command, shlex.quote(str(models[0])))


def again(command: str, source: str) -> str:
    """The same command, of ``source``."""
    return f"spikepatch {command} {source}" + (" OUT" if command in ("convert", "fold") else "")


def _has_log(given: str) -> bool:
    """``spikes`` looks for TensorBoard's files in all that lies below, and for a Trainer's state."""
    path = local_path(given)
    return path.is_dir() and (any(path.rglob("events.out.tfevents.*")) or trainer_state(path) is not None)


def _names() -> Iterable[str]:
    from spikepatch.recipes.built_in import RECIPES

    return RECIPES


def _nearest(recipe: str) -> str:
    """A recipe's name as it is spelt, where it is near to one."""
    return next(iter(difflib.get_close_matches(recipe, [*_names()], n=1)), recipe)
