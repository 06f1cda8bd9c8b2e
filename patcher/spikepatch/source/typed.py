"""Frozen data and JSON: ``parsed`` is the inverse of ``dataclasses.asdict`` and ``json.dumps``."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

AnyData = TypeVar("AnyData")
_Reader = Callable[[Any], Any]


def finite(value: Any) -> Any:
    """``value``, for strict JSON: with None for every number that is not finite, and lists for tuples."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
    return value


def parsed(kind: type[AnyData], data: Any) -> AnyData:
    """An instance of the dataclass ``kind`` from the object that JSON makes of it.

    By the annotations of its fields, which every value has to fit: a list becomes a tuple and an object a dataclass,
    also inside of each other, of ``X | None`` and of mappings. A whole number is a float too, and a bool is no number.

    Raises:
        TypeError: a field is missing or unknown, or a value is not of the type that the annotation says.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__} is not read from a {type(data).__name__}")
    readers: dict[str, _Reader] = _readers(kind)  # type: ignore[arg-type]  # mypy: a type is hashable
    return kind(**{name: _field(readers, name, value) for name, value in data.items()})


def _field(readers: Mapping[str, _Reader], name: str, value: Any) -> Any:
    """An unknown field is left to the constructor, which names it."""
    try:
        return readers[name](value) if name in readers else value
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


@functools.cache
def _readers(kind: type) -> dict[str, _Reader]:
    return {name: _reader(hint) for name, hint in get_type_hints(kind).items()}


def _reader(hint: Any) -> _Reader:
    """What makes a ``hint`` of a value of JSON."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(parsed, hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return functools.partial(_tuple, [_reader(one) for one in inner if one is not Ellipsis], inner[-1] is Ellipsis)
    if origin in (Union, types.UnionType):
        readers = [_reader(one) for one in inner if one is not type(None)]
        return functools.partial(_one_of, readers, type(None) in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return functools.partial(_mapping, _reader(inner[1]))
    if origin is Literal:
        return functools.partial(_literal, inner)
    return functools.partial(_plain, hint)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(hint: Any, value: Any) -> Any:
    """A value that is as JSON has it."""
    if hint in (int, float):
        kinds: Any = (int, float) if hint is float else int
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{_shown(value)} is no {'number' if hint is float else 'whole number'}")
        try:
            float(value)
        except OverflowError as error:
            raise TypeError("a number is too large") from error
    elif hint is not Any and isinstance(hint, type) and not isinstance(value, hint):
        names = {str: "text", bool: "true or false", type(None): "null"}
        raise TypeError(f"{_shown(value)} is not {names.get(hint, hint.__name__)}")
    return value


def _literal(known: tuple[Any, ...], value: Any) -> Any:
    if not any(type(value) is type(one) and value == one for one in known):
        raise TypeError(f"{_shown(value)} is none of {', '.join(map(repr, known))}")
    return value


def _tuple(readers: list[_Reader], any_length: bool, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{_shown(value)} is no list")
    if not any_length and len(readers) != len(value):
        raise TypeError(f"{_shown(value)} has {len(value)} entries, not {len(readers)}")
    each = readers * len(value) if any_length else readers
    return tuple(reader(one) for reader, one in zip(each, value, strict=True))


def _one_of(readers: list[_Reader], none: bool, value: Any) -> Any:
    """By the first that takes it."""
    if none and value is None:
        return None
    said = []
    for reader in readers:
        try:
            return reader(value)
        except TypeError as error:
            said.append(str(error))
    raise TypeError("; ".join(dict.fromkeys(said)))


def _mapping(reader: _Reader, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{_shown(value)} is no object")
    return {name: reader(one) for name, one in value.items()}
