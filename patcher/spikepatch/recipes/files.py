"""A recipe as a TOML file of built-in transforms:

    name = "scaled-002"
    no_decay_embeddings = true        # and the other fields of a Recipe, all but its transforms

    [[transform]]                     # planned in this order
    kind = "small_init"               # a module of spikepatch_transforms
    base = "normal"                   # and the fields of its config; what is left out has its default
    std = 0.02

    [[transform]]
    kind = "embed_scale"

Nothing in such a file is code, so it may come from anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spikepatch.errors import Refused, did_you_mean
from spikepatch.plans.plan import Recipe, Transform
from spikepatch.source.local import read_file
from spikepatch_transforms.embed_detach import EmbedDetach
from spikepatch_transforms.embed_init import EmbedInit
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from spikepatch_transforms.untie import UntieHead

KINDS: dict[str, type[Any]] = {
    "small_init": SmallInit,
    "residual_init": ResidualInit,
    "embed_scale": EmbedScale,
    "embed_norm": EmbedNorm,
    "embed_detach": EmbedDetach,
    "embed_init": EmbedInit,
    "untie": UntieHead,
}

#: Bytes of a recipe, and dots in one key: tomllib takes minutes for thousands.
_LARGEST, _LONGEST = 100_000, 100

#: What no key goes over.
_BETWEEN = re.compile(r"""[=,{}\[\]"']""")

_SHOWN = "`spikepatch recipes --help` shows such a file, and `spikepatch recipes` ends with what it may hold"


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        Refused: the file cannot be read, or says something that no recipe or transform knows.
    """
    try:
        text = read_file(path, limit=_LARGEST).decode("utf-8-sig")
        if any(part.count(".") > _LONGEST for line in text.splitlines() for part in _BETWEEN.split(line)):
            raise ValueError(f"a key has more than {_LONGEST} parts")
        data = tomllib.loads(text)
    except RecursionError:
        raise _refused("the recipe file cannot be read", str(path), "it is nested too deeply", _SHOWN) from None
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise _refused("the recipe file cannot be read", str(path), said, _SHOWN) from None
    transforms = data.pop("transform", [])
    own = [field.name for field in dataclasses.fields(Recipe) if field.name != "transforms"]
    fields = _checked(Recipe, data, str(path), [own[0], "transform", *own[1:]])
    if "name" not in fields:
        raise _refused("the recipe has no name", str(path), "plans and manifests record it", 'add name = "my-recipe"')
    if not isinstance(transforms, list) or not transforms or not all(isinstance(table, dict) for table in transforms):
        why = "they are its tables [[transform]], which say what it does"
        raise _refused("the recipe has no list of transforms", str(path), why, _SHOWN)
    steps = tuple(_transform(table, f"{path}, transform {i}") for i, table in enumerate(transforms, 1))
    return Recipe(**fields, transforms=steps)


def _transform(table: Mapping[str, Any], where: str) -> Transform:
    fields = dict(table)
    if "kind" not in fields:
        why = f"each [[transform]] has a kind, one of {', '.join(KINDS)}"
        raise _refused("the transform has no kind", where, why, 'add kind = "small_init", or another')
    kind = fields.pop("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _refused(
            f"there is no transform {kind!r}",
            where,
            f"they are {', '.join(KINDS)}",
            did_you_mean(kind, KINDS, _SHOWN),
        )
    config = KINDS[kind]
    transform: Transform = config(**_checked(config, fields, where, [f.name for f in dataclasses.fields(config)]))
    return transform


def _checked(config: type[Any], values: Mapping[str, Any], where: str, fields: Sequence[str]) -> dict[str, Any]:
    """``values``, once each is found to be among ``fields`` of the dataclass ``config``, and of its type."""
    hints = get_type_hints(config)
    for name, value in values.items():
        if name not in fields:
            remedy = did_you_mean(name, fields, "leave it out")
            raise _refused(f"there is no field {name!r}", where, f"they are {', '.join(fields)}", remedy)
        if not _fits(value, hints[name]):
            raise _refused(f"{name} = {value!r} does not fit", where, f"it takes {_words(hints[name])}", "change it")
    return dict(values)


def check_choices(transform: Transform, where: str) -> None:
    """Refuse a built-in transform with a value that is not among those to choose from; others may hold what they like.

    In a file that is a mistake like any other. In Python only a type checker sees it.
    """
    config = type(transform)
    if config in KINDS.values():
        hints = get_type_hints(config)
        choices = {name: value for name, value in vars(transform).items() if get_origin(hints[name]) is Literal}
        _checked(config, choices, f"{where}, {config.__name__}", list(choices))


def options(kind: str) -> Iterator[tuple[str, str]]:
    """Each field of a kind of transform as a file sets it, ``cut = 0.0`` by its default, and what else it may be."""
    hints = get_type_hints(KINDS[kind])
    for field in dataclasses.fields(KINDS[kind]):
        hint, default = hints[field.name], field.default
        if get_origin(hint) is Literal:
            others = [json.dumps(choice) for choice in get_args(hint) if choice != default]
            yield f"{field.name} = {json.dumps(default)}", f"or {', '.join(others)}"
        elif default is None:
            yield field.name, f"{_words(hint)}; left out by default"
        else:
            yield f"{field.name} = {json.dumps(default)}", ""


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    return {float: "a number", bool: "true or false", str: "a text"}[hint]


def _refused(what: str, where: str, why: str, remedy: str) -> Refused:
    return Refused(what, where=where, why=why, remedy=remedy)
